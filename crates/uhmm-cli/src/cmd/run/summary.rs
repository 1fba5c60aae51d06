//! The summary at the end: one line, a table, or JSON, to standard error.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    time::Duration,
};

use serde_json::{Map, Value, json};
use uhmm::trace::{Counter, Latency, Stats};
use uhmm_sys::addr::PAGE_SIZE;

/// How much is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// One line.
    Line,
    /// Everything, for people.
    Table,
    /// Everything, for programs: one line with one object.
    Json,
}

/// Latencies of which p50 and p99 are told.
const LATENCIES: [(Latency, &str); 2] = [(Latency::FaultHome, "fault_home"), (Latency::DeviceFault, "device_fault")];

/// Prints the summary.
pub fn print(form: Form, stats: &Stats, seed: Option<u64>) {
    let text = match form {
        Form::Line => line(stats, seed),
        Form::Table => table(stats, seed),
        Form::Json => json_line(stats, seed),
    };
    // Nobody may be listening any more.
    let _ = io::stderr().write_all(text.as_bytes());
}

fn bytes(pages: u64) -> u64 {
    pages.saturating_mul(PAGE_SIZE)
}

fn amount(pages: u64) -> String {
    let bytes = bytes(pages);
    match bytes {
        0..1_048_576 => format!("{} KiB", bytes >> 10),
        #[expect(clippy::cast_precision_loss, reason = "one digit after the point is shown")]
        1_048_576..1_073_741_824 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        #[expect(clippy::cast_precision_loss, reason = "one digit after the point is shown")]
        _ => format!("{:.1} GiB", bytes as f64 / 1_073_741_824.0),
    }
}

fn duration(time: Option<Duration>) -> String {
    match time {
        None => "-".to_owned(),
        Some(time) if time < Duration::from_millis(1) => format!("{:.1} us", time.as_secs_f64() * 1e6),
        Some(time) => format!("{:.1} ms", time.as_secs_f64() * 1e3),
    }
}

fn home_pages(stats: &Stats) -> u64 {
    stats.get(Counter::PagesHome) + stats.get(Counter::PagesHomeStaged)
}

fn line(stats: &Stats, seed: Option<u64>) -> String {
    let mut text = format!(
        "uhmm: {} out to devices, {} home, {} faults (p50 {}, p99 {}), {} processes",
        amount(stats.get(Counter::PagesOut)),
        amount(home_pages(stats)),
        stats.get(Counter::FaultsHome),
        duration(stats.quantile(Latency::FaultHome, 500)),
        duration(stats.quantile(Latency::FaultHome, 990)),
        stats.get(Counter::Processes),
    );
    if let Some(seed) = seed {
        write!(text, ", seed {seed}").expect("a string takes what is written to it");
    }
    text + "\n"
}

fn table(stats: &Stats, seed: Option<u64>) -> String {
    let mut text = line(stats, seed);
    for counter in Counter::ALL {
        let count = stats.get(*counter);
        let size = if counter.as_str().starts_with("pages_") { format!("  {}", amount(count)) } else { String::new() };
        writeln!(text, "  {:20} {count:>12}{size}", counter.as_str()).expect("a string takes what is written to it");
    }
    for (latency, name) in LATENCIES {
        for (permille, quantile) in [(500, "p50"), (990, "p99"), (1000, "max")] {
            let time = duration(stats.quantile(latency, permille));
            writeln!(text, "  {:20} {time:>12}", format!("{name}_{quantile}"))
                .expect("a string takes what is written to it");
        }
    }
    text
}

fn json_line(stats: &Stats, seed: Option<u64>) -> String {
    let mut object: Map<String, Value> =
        Counter::ALL.iter().map(|counter| (counter.as_str().to_owned(), json!(stats.get(*counter)))).collect();
    object.insert("bytes_out".to_owned(), json!(bytes(stats.get(Counter::PagesOut))));
    object.insert("bytes_home".to_owned(), json!(bytes(home_pages(stats))));
    for (latency, name) in LATENCIES {
        for (permille, quantile) in [(500, "p50"), (990, "p99"), (1000, "max")] {
            let ns = stats.quantile(latency, permille).map(|time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
            object.insert(format!("{name}_ns_{quantile}"), json!(ns));
        }
    }
    object.insert("seed".to_owned(), json!(seed));
    Value::Object(object).to_string() + "\n"
}

#[cfg(test)]
mod tests {
    use uhmm::session::Session;

    use super::*;

    #[test]
    fn every_form_tells_what_moved() {
        let session = Session::create().unwrap();
        let stats = session.stats();
        stats.add(Counter::PagesOut, 1024);
        stats.add(Counter::PagesHome, 256);
        stats.add(Counter::PagesHomeStaged, 256);
        stats.record(Latency::FaultHome, Duration::from_micros(11));
        assert_eq!(line(&stats, None).lines().count(), 1);
        for text in [line(&stats, Some(7)), table(&stats, Some(7))] {
            assert!(text.contains("4.0 MiB out") && text.contains("2.0 MiB home") && text.contains("seed 7"), "{text}");
        }
        let object: Value = serde_json::from_str(&json_line(&stats, Some(7))).unwrap();
        assert_eq!(object["pages_out"], 1024);
        assert_eq!(object["bytes_out"], 4 << 20);
        assert_eq!(object["bytes_home"], 2 << 20);
        assert_eq!(object["seed"], 7);
        assert!((11_000..13_000).contains(&object["fault_home_ns_p50"].as_u64().unwrap()));
        assert!(object["device_fault_ns_p50"].is_null());
    }

    #[test]
    fn amounts_have_units() {
        assert_eq!([amount(0), amount(3), amount(256), amount(1 << 18)], ["0 KiB", "12 KiB", "1.0 MiB", "1.0 GiB"]);
    }
}
