//! What uhmm's tests share: a process for each test, with a limit on its time; and what tests build.
//!
//! An engine belongs to a process, and a test that hangs must fail: so a test that uses one runs itself again as a
//! child, and kills it when its time is up.
#![forbid(unsafe_code)]

pub mod build;

use std::{
    io::Read,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Name of the variable that tells the child that it is one.
const CHILD: &str = "UHMM_TEST_CHILD";

/// How long a test may take unless it says otherwise.
pub const LIMIT: Duration = Duration::from_secs(120);

/// A reason for which a test cannot run here; printed, and counted as passed by the harness.
#[derive(Debug)]
pub struct Skip(pub String);

/// Runs `body` in a process of its own. `name` is the test's full path, as the harness knows it.
///
/// # Panics
/// If the child fails, dies by a signal, or takes longer than `limit`; its output is in the message.
pub fn isolated(name: &str, limit: Duration, body: impl FnOnce() -> Result<(), Skip>) {
    if std::env::var(CHILD).is_ok_and(|child| child == name) {
        // It has a process group of its own: Ctrl-C reaches the parent only.
        let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
        match body() {
            Ok(()) => println!("child done"),
            Err(Skip(why)) => println!("child skipped: {why}"),
        }
        return;
    }
    let exe = std::env::current_exe().expect("a test knows its executable");
    let mut child = Command::new(exe)
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CHILD, name)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .expect("a test can run itself again");
    let mut streams = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let readers =
        (std::thread::spawn(move || read_all(&mut streams.0)), std::thread::spawn(move || read_all(&mut streams.1)));
    let start = Instant::now();
    let status = loop {
        match child.try_wait().expect("a child can be waited for") {
            Some(status) => break Some(status),
            None if start.elapsed() > limit => {
                let state = describe(child.id());
                child.kill().expect("a child can be killed");
                let _ = child.wait();
                println!("killed after {limit:?}; its threads were:\n{state}");
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    // What the child left running holds its output open, and the test with it.
    let _ = Command::new("kill").args(["-KILL", "--", &format!("-{}", child.id())]).stderr(Stdio::null()).status();
    let (out, err) = (readers.0.join().unwrap_or_default(), readers.1.join().unwrap_or_default());
    let Some(status) = status else { panic!("{name}: no end within {limit:?}\n{out}\n{err}") };
    assert!(status.success(), "{name}: {status}\n{out}\n{err}");
    // What the child skipped of a test that otherwise ran.
    out.lines().filter(|line| line.starts_with("skip")).for_each(|line| println!("{line}"));
    // Not at the start of its line: the harness has begun one with the test's name.
    if let Some((_, why)) = out.lines().find_map(|line| line.split_once("child skipped: ")) {
        println!("skipped: {why}");
    } else {
        assert!(out.contains("child done"), "{name}: the child ran no test of that name\n{out}\n{err}");
    }
}

/// Whether this is such a process: what the test sets up before is set up by its parent.
#[must_use]
pub fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Runs the body of the enclosing test function in a process of its own, see [`isolated`].
#[macro_export]
macro_rules! isolated {
    ($body:expr) => {
        $crate::isolated!($crate::LIMIT, $body)
    };
    ($limit:expr, $body:expr) => {{
        fn here() {}
        let name = ::std::any::type_name_of_val(&here);
        let name = name.trim_end_matches("::here");
        let name = name.split_once("::").map_or(name, |(_, rest)| rest);
        $crate::isolated(name, $limit, $body)
    }};
}

fn read_all(stream: &mut impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What each thread of a process waits for, for the message of a test that hung.
fn describe(pid: u32) -> String {
    let mut text = String::new();
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return text };
    for task in tasks.flatten() {
        let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        text += &format!("{} {} {}\n", read("comm").trim(), read("wchan").trim(), read("syscall").trim());
    }
    text
}
