//! `uhmm doctor` as root, as nobody, and with capabilities masked off.

use std::process::{Command, Output};

use serde_json::Value;

const UHMM: &str = env!("CARGO_BIN_EXE_uhmm");

fn is_root() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    status.lines().any(|line| line.starts_with("Uid:") && line.split_whitespace().nth(2) == Some("0"))
}

fn run(command: &mut Command) -> (Output, String) {
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    (output, text)
}

/// `uhmm doctor --json` as the user that runs the tests, without whatever mask they run under.
fn json(mask: &str) -> (i32, Value) {
    let (output, text) = run(Command::new(UHMM).args(["doctor", "--json"]).env("UHMM_MASK", mask));
    (output.status.code().unwrap(), serde_json::from_str(&text).unwrap())
}

fn status<'v>(report: &'v Value, name: &str) -> &'v str {
    capability(report, name)["status"].as_str().unwrap()
}

fn capability<'v>(report: &'v Value, name: &str) -> &'v Value {
    report["capabilities"].as_array().unwrap().iter().find(|cap| cap["name"] == name).unwrap()
}

#[test]
fn whoever_runs_it_userfault_works_and_the_json_agrees_with_the_exit_status() {
    let (code, report) = json("");
    assert_eq!(report["exit_status"], code);
    assert_eq!(status(&report, "userfault"), "ok");
    for required in ["kernel", "remap-event", "remove-event", "unmap-event", "vm-readv", "memfd", "address-space"] {
        assert_eq!(status(&report, required), "ok", "{required}");
    }
    for cap in report["capabilities"].as_array().unwrap() {
        let ok = cap["status"] == "ok";
        assert!(!cap["detail"].as_str().unwrap().is_empty(), "{cap}");
        // What is there needs no advice; what is not says what it costs.
        assert!(!ok || (cap["lost"].is_null() && cap["grant"].is_null()), "{cap}");
        assert!(ok || cap["need"] == "fact" || cap["lost"].is_string(), "{cap}");
    }
}

#[test]
fn root_may_serve_kernel_faults_and_follow_forks() {
    if !is_root() {
        println!("skipped: needs root");
        return;
    }
    let (code, report) = json("");
    if status(&report, "uffd-syscall") != "ok" {
        println!("skipped: root without privilege ({})", capability(&report, "uffd-syscall")["detail"]);
        return;
    }
    assert_eq!(status(&report, "kernelfaults"), "ok");
    assert_eq!(status(&report, "fork-event"), "ok");
    assert_eq!(status(&report, "pfn"), "ok");
    assert!(code < 2);
}

#[test]
fn nobody_is_told_what_is_lost_and_how_to_get_it() {
    let mut command = if is_root() {
        // Below a directory that only root may enter, nobody cannot start it.
        let nobody = |program: &str| {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--", program]);
            command
        };
        if !nobody("test").args(["-x", UHMM]).status().is_ok_and(|status| status.success()) {
            println!("skipped: nobody cannot run {UHMM}");
            return;
        }
        nobody(UHMM)
    } else {
        Command::new(UHMM)
    };
    let (output, text) = run(command.arg("doctor").env("UHMM_MASK", ""));
    let has = |word: &str, name: &str| text.lines().any(|line| line.split_whitespace().take(2).eq([word, name]));
    assert!(has("missing", "fork-event"), "{text}");
    assert!(text.contains("--ambient-caps=+sys_ptrace"), "{text}");
    assert!(has("ok", "move"), "{text}");
    assert_eq!(output.status.code(), Some(1), "{text}");
    // A machine may grant kernel-mode faults to everybody; where it does not, the way is named.
    assert!(has("ok", "kernelfaults") || text.contains("sysctl vm.unprivileged_userfaultfd=1"), "{text}");
}

#[test]
fn a_masked_capability_counts_as_missing() {
    let (code, report) = json("move,scan,nonsense");
    assert_eq!(status(&report, "move"), "missing");
    assert_eq!(status(&report, "scan"), "missing");
    assert_eq!(capability(&report, "move")["grant"], "unset UHMM_MASK");
    assert_eq!(report["unknown_masks"], serde_json::json!(["nonsense"]));
    assert_eq!(code, 1);
}

#[test]
fn without_userfaultfd_it_cannot_run() {
    let (output, text) = run(Command::new(UHMM).arg("doctor").env("UHMM_MASK", "userfault"));
    assert_eq!(output.status.code(), Some(2));
    assert!(text.trim_end().ends_with("cannot work here."), "{text}");
}

#[test]
fn an_old_address_space_limit_is_found() {
    // Half of what the engine reserves: enough for the program itself.
    let script = format!("ulimit -v 2000000; exec {UHMM} doctor --json");
    let (output, text) = run(Command::new("sh").args(["-c", &script]).env("UHMM_MASK", ""));
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(status(&report, "address-space"), "missing");
    assert_eq!(status(&report, "rlimit-as"), "degraded");
    assert_eq!(output.status.code(), Some(2));
}
