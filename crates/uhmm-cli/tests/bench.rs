//! `uhmm bench`: that it measures, says what, and leaves nothing behind. What the figures are is the machine's business.

use std::process::{Command, Output};

use serde_json::Value;

const UHMM: &str = env!("CARGO_BIN_EXE_uhmm");

fn bench(args: &[&str]) -> (Output, String) {
    let output = Command::new(UHMM).arg("bench").args(args).output().unwrap();
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    (output, text)
}

fn quick(only: &[&str]) -> Value {
    let args: Vec<&str> = only.iter().flat_map(|name| ["--only", name]).chain(["--quick", "--json"]).collect();
    let (output, text) = bench(&args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(&text).unwrap()
}

fn row<'v>(report: &'v Value, name: &str) -> &'v Value {
    report["rows"].as_array().unwrap().iter().find(|row| row["name"] == name).unwrap()
}

#[test]
fn every_measurement_is_listed_and_none_other_runs() {
    let (output, list) = bench(&["--list"]);
    assert!(output.status.success());
    for name in ["memcpy", "move", "fault-same-cpu", "small-pages", "faults", "snapshot"] {
        assert!(list.lines().any(|line| line.split_whitespace().next() == Some(name)), "{name}");
    }
    let (output, _) = bench(&["--only", "nonsense"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no measurement `nonsense`"));
}

#[test]
fn a_bare_mechanism_has_a_figure_with_its_spread() {
    let report = quick(&["memcpy", "touch"]);
    assert_eq!(report["failed"], Value::Array(Vec::new()));
    assert!(report["machine"]["cpus"].as_u64().unwrap() > 0);
    for name in ["memcpy-large", "memcpy-random", "touch-write", "touch-read"] {
        let row = row(&report, name);
        let [min, value, max] = ["min", "value", "max"].map(|key| row[key].as_f64().unwrap());
        assert!(0.0 < min && min <= value && value <= max, "{row}");
        assert!(row["rounds"].as_u64().unwrap() >= 5, "{row}");
    }
}

#[test]
fn the_engine_is_held_against_the_bare_mechanism_of_the_same_rounds() {
    let report = quick(&["small-pages", "faults"]);
    assert_eq!(report["failed"], Value::Array(Vec::new()));
    for name in ["out-4k", "home-4k", "fault-home"] {
        let against = &row(&report, name)["against"];
        assert!(against["ratio"].as_f64().unwrap() > 0.0, "{name}: {against}");
        assert!(against["met"].is_boolean(), "{name} has a bar: {against}");
    }
    assert!(row(&report, "fault-home")["p99"].as_f64() >= row(&report, "fault-home")["value"].as_f64());
}
