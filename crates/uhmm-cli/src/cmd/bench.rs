//! `uhmm bench`: what the kernel's mechanisms cost on this machine, and what uhmm makes of them.
//!
//! Each measurement runs in a process of its own, which is this program again: an engine belongs to a process, and what
//! one measurement leaves in the kernel's tables must not slow the next.

mod bare;
mod engine;
mod mechanism;
mod report;

use std::{
    fmt::Write as _,
    fs,
    io::{self, Read as _, Write as _},
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Serialize;

use self::report::{Against, Bar, Row};

/// Measures the kernel's bare mechanisms on this machine, and uhmm beside them.
///
/// Every figure is the median of several rounds; those that are held against each other are taken in turns within the
/// same rounds. Exit status: 0 where all was measured, whether or not a bar was missed; 1 where something failed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Run this measurement only; may be given several times.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// List the measurements and run none.
    #[arg(long)]
    list: bool,
    /// Less memory and fewer faults: rougher figures in a few seconds.
    #[arg(long)]
    quick: bool,
    /// Be the process that runs one measurement.
    #[arg(long, hide = true, value_name = "NAME", conflicts_with_all = ["json", "only", "list"])]
    worker: Option<String>,
}

/// How much to measure.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    rounds: usize,
    /// Pages for what moves in bulk.
    pages: usize,
    /// Faults in a round.
    faults: usize,
}

const FULL: Effort = Effort { rounds: 7, pages: 64 << 10, faults: 2048 };
const QUICK: Effort = Effort { rounds: 5, pages: 8 << 10, faults: 512 };
/// A measurement that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(300);

/// One measurement.
struct Bench {
    name: &'static str,
    what: &'static str,
    run: fn(&Effort) -> Result<Vec<Row>>,
}

const BENCHES: &[Bench] = &[
    Bench { name: "memcpy", what: "what a copy costs", run: mechanism::memcpy },
    Bench { name: "move", what: "UFFDIO_MOVE", run: mechanism::moves },
    Bench { name: "copy", what: "UFFDIO_COPY", run: mechanism::copies },
    Bench { name: "protect", what: "write protection and zapping", run: mechanism::protect },
    Bench { name: "scan", what: "PAGEMAP_SCAN and the page map", run: mechanism::scans },
    Bench { name: "touch", what: "the kernel's own first-touch fault", run: mechanism::first_touch },
    Bench { name: "fault-poll", what: "bare handlers in poll and spinning", run: bare::faults_polling },
    Bench { name: "fault-each-cpu", what: "a bare handler on each CPU", run: bare::faults_each_cpu },
    Bench { name: "fault-same-cpu", what: "a bare handler on the faulting CPU", run: bare::faults_same_cpu },
    Bench { name: "fault-around", what: "a bare handler that brings 16 pages", run: bare::fault_around },
    Bench { name: "small-pages", what: "uhmm: pages of 4 KiB out and home", run: engine::small_pages },
    Bench { name: "folios", what: "uhmm: folios of 2 MiB out and home", run: engine::folios },
    Bench { name: "faults", what: "uhmm: a CPU touches pages that are away", run: engine::faults },
    Bench { name: "sequential", what: "uhmm: a CPU walks through pages that are away", run: engine::sequential },
    Bench { name: "soft-device", what: "uhmm: the software device", run: engine::soft_device },
    Bench { name: "soft-faults", what: "uhmm: a CPU touches what the software device holds", run: engine::soft_faults },
    Bench { name: "snapshot", what: "uhmm: what a mirror sees", run: engine::snapshots },
];

/// Runs the measurements and prints what they came to.
///
/// # Errors
/// A name that is none; a measurement's process that cannot be started; the standard output cannot be written.
pub fn run(args: &Args) -> Result<ExitCode> {
    let effort = if args.quick { QUICK } else { FULL };
    if let Some(name) = &args.worker {
        let rows = (find(name)?.run)(&effort)?;
        print(&serde_json::to_string(&rows)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.list {
        let list = BENCHES.iter().fold(String::new(), |list, b| format!("{list}{:15} {}\n", b.name, b.what));
        print(&list)?;
        return Ok(ExitCode::SUCCESS);
    }
    let chosen = if args.only.is_empty() {
        BENCHES.iter().collect()
    } else {
        args.only.iter().map(|name| find(name)).collect::<Result<Vec<_>>>()?
    };
    let mut outcome = Outcome { machine: Machine::find(), quick: args.quick, rows: Vec::new(), failed: Vec::new() };
    for bench in chosen {
        match work(bench, args.quick) {
            Ok(rows) => {
                rows.iter().for_each(|row| eprintln!("{}", line(row)));
                outcome.rows.extend(rows);
            }
            Err(error) => {
                eprintln!("{}: {error:#}", bench.name);
                outcome.failed.push(Failure { bench: bench.name, why: format!("{error:#}") });
            }
        }
    }
    print(&if args.json { serde_json::to_string_pretty(&outcome)? + "\n" } else { outcome.table() })?;
    Ok(if outcome.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn find(name: &str) -> Result<&'static Bench> {
    BENCHES
        .iter()
        .find(|bench| bench.name == name)
        .ok_or_else(|| anyhow!("there is no measurement `{name}`; `uhmm bench --list` names them"))
}

fn print(text: &str) -> Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        // A reader that has seen enough (`| head`) is no reason to complain.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        answer => Ok(answer?),
    }
}

/// Has a process of its own run `bench`. It is gone on return.
fn work(bench: &Bench, quick: bool) -> Result<Vec<Row>> {
    let mut command = Command::new(std::env::current_exe().context("finding this program")?);
    command.args(["bench", "--worker", bench.name]).args(quick.then_some("--quick"));
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("starting a measurement")?;
    let mut answer = child.stdout.take().expect("piped");
    let reader = thread::spawn(move || {
        let mut text = String::new();
        answer.read_to_string(&mut text).map(|_| text)
    });
    let start = Instant::now();
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if start.elapsed() > LIMIT => {
                child.kill().context("ending a measurement")?;
                child.wait()?;
                bail!("no end within {LIMIT:?}");
            }
            None => thread::sleep(Duration::from_millis(10)),
        }
    };
    let text = reader.join().map_err(|_| anyhow!("reading the figures failed"))??;
    ensure!(status.success(), "its process ended with {status}");
    serde_json::from_str(&text).context("its process wrote no figures")
}

#[derive(Serialize)]
struct Outcome {
    machine: Machine,
    quick: bool,
    rows: Vec<Row>,
    failed: Vec<Failure>,
}

#[derive(Serialize)]
struct Failure {
    bench: &'static str,
    why: String,
}

/// Where the figures are from: only those of one machine can be compared.
#[derive(Serialize)]
struct Machine {
    version: &'static str,
    kernel: String,
    cpu: String,
    cpus: usize,
    /// Processes that ran or wanted to, as the measurements began.
    load: String,
}

impl Machine {
    fn find() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let model = |info: &str| {
            let line = info.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        Self {
            version: env!("CARGO_PKG_VERSION"),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu: model(&read("/proc/cpuinfo")).unwrap_or_else(|| "unknown".into()),
            cpus: uhmm_sys::thread::allowed_cpus().len(),
            load: read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned(),
        }
    }
}

impl Outcome {
    fn table(&self) -> String {
        let m = &self.machine;
        let mut text =
            format!("uhmm {} on Linux {}, {} CPUs of {}, load {}\n\n", m.version, m.kernel, m.cpus, m.cpu, m.load);
        self.rows.iter().for_each(|row| writeln!(text, "{}", line(row)).expect("a string takes what is written to it"));
        for failure in &self.failed {
            text += &format!("failed: {}: {}\n", failure.bench, failure.why);
        }
        let bars: Vec<_> =
            self.rows.iter().filter(|row| row.against.as_ref().is_some_and(|a| a.met.is_some())).collect();
        let missed: Vec<_> = bars
            .iter()
            .filter(|row| row.against.as_ref().and_then(|a| a.met) == Some(false))
            .map(|row| row.name.as_str())
            .collect();
        text + &match (bars.len(), missed.len()) {
            (0, _) => String::new(),
            (n, 0) => format!("\nAll {n} bars are met.\n"),
            (n, m) => format!("\n{m} of {n} bars missed: {}.\n", missed.join(", ")),
        }
    }
}

fn line(row: &Row) -> String {
    let Some(value) = row.value else {
        return format!("{:20} {:>24}  {} ({})", row.name, "-", row.what, row.note.as_deref().unwrap_or("not here"));
    };
    let figure = format!("{} {}", short(value), row.unit.as_str());
    let p99 = row.p99.map_or_else(String::new, |p99| format!("p99 {}", short(p99)));
    let note = row.note.as_ref().map_or_else(String::new, |note| format!(" ({note})"));
    let against = row.against.as_ref().map_or_else(String::new, held_against);
    format!("{:20} {figure:>15} {p99:>10}  {}{note}{against}", row.name, row.what)
}

fn held_against(against: &Against) -> String {
    let bar = match against.bar {
        None => String::new(),
        Some(Bar::AtLeast(bar)) => format!(", bar >= {bar}"),
        Some(Bar::AtMost(bar)) => format!(", bar <= {bar}"),
    };
    let verdict = match against.met {
        None => "",
        Some(true) => ": met",
        Some(false) => ": MISSED",
    };
    format!(": {:.2} of {} ({}){bar}{verdict}", against.ratio, against.what, short(against.value))
}

/// Three digits that matter.
fn short(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}
