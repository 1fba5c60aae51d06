//! The container that the kernel's tests run in.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

fn container(limit_s: &str, script: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.args(["contained", "--limit-s", limit_s, "--env=WORD=hello", "--", "sh", "-c", script]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Report, and what the script printed.
fn run(limit_s: &str, script: &str) -> (String, String) {
    let mut child = container(limit_s, script).spawn().unwrap();
    // The container ends when its input does.
    let held_open = child.stdin.take();
    let output = child.wait_with_output().unwrap();
    drop(held_open);
    (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// Whether a process is still there after a little while.
fn stays(pid: &str) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Path::new("/proc").join(pid).exists() {
        if Instant::now() > deadline {
            return true;
        }
        std::thread::yield_now();
    }
    false
}

#[test]
fn the_end_of_the_program_is_reported() {
    assert_eq!(run("60", "echo $WORD; exit 3"), ("exit 3 left 0\n".into(), "hello\n".into()));
    assert_eq!(run("60", "kill -SEGV $$").0, "signal 11 left 0\n");
}

#[test]
fn what_is_left_running_is_killed_also_in_another_session() {
    let (report, output) = run("60", "setsid sh -c 'sleep 600 & echo $!; wait' & sleep 0.5");
    assert!(report.starts_with("exit 0 left "), "{report}");
    assert!(!report.ends_with("left 0\n"), "{report}");
    assert!(!stays(output.trim()));
}

#[test]
fn a_program_past_its_time_is_killed() {
    let (report, output) = run("1", "echo $$; sleep 600; :");
    assert_eq!(report, "timeout left 0\n");
    assert!(!stays(output.trim()));
}

#[test]
fn when_the_one_who_asked_is_gone_the_program_is_killed() {
    use std::io::{BufRead, BufReader};
    let mut child = container("600", "echo $$; sleep 600; :").spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
    drop(child.stdin.take());
    assert!(!stays(line.trim()));
    child.wait().unwrap();
}
