//! Commands with a log and a bound on their time.

use std::{
    collections::HashMap,
    fs::{self, File},
    path::Path,
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Exit status 0.
    Ok,
    /// Another exit status, or a signal.
    Failed,
    /// Its time was over; it and all that it had started were killed.
    TimedOut,
}

/// Runs `command` with both of its outputs appended to `log` and nothing on its input, for `limit` at most.
///
/// # Errors
/// The command could not be started, or the log not be opened.
pub fn logged(command: &mut Command, log: &Path, limit: Duration) -> Result<Outcome> {
    let out = File::options().create(true).append(true).open(log).with_context(|| log.display().to_string())?;
    let err = out.try_clone()?;
    let child = command
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
    bounded(child, limit)
}

fn bounded(mut child: std::process::Child, limit: Duration) -> Result<Outcome> {
    let pid = child.id();
    // The watch ends when the sender is dropped, that is, when the child was waited for.
    let (ended, watch) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        let late = watch.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
        if late {
            kill_tree(pid);
        }
        late
    });
    let status = child.wait()?;
    drop(ended);
    let late = watchdog.join().expect("the watchdog does not panic");
    Ok(match (late, status.success()) {
        (true, _) => Outcome::TimedOut,
        (false, true) => Outcome::Ok,
        (false, false) => Outcome::Failed,
    })
}

/// Kills `pid` and everything that descends from it, leaves last, so that no grandchild is left running unnoticed.
fn kill_tree(pid: u32) {
    let mut doomed = descendants(pid);
    doomed.insert(0, pid);
    let list: Vec<String> = doomed.iter().rev().map(u32::to_string).collect();
    // The shell's own `kill`, as the command of that name is not installed everywhere. One that is gone already is fine.
    let _ = Command::new("sh").arg("-c").arg(format!("kill -KILL {} 2>/dev/null", list.join(" "))).status();
}

/// Everything that descends from `pid`, parents before their children.
pub fn descendants(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let by_parent = children();
    let mut parent = Some(pid);
    let mut next = 0;
    while let Some(pid) = parent {
        found.extend(by_parent.get(&pid).into_iter().flatten());
        parent = found.get(next).copied();
        next += 1;
    }
    found
}

/// Every process's children, by the parent's id.
fn children() -> HashMap<u32, Vec<u32>> {
    let mut by_parent: HashMap<u32, Vec<u32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        // The name, in brackets, may hold anything; the state and the parent follow its last bracket.
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
        if let Some(parent) = parent {
            by_parent.entry(parent).or_default().push(pid);
        }
    }
    by_parent
}

/// Whether a program of this name is on the search path.
pub fn on_path(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// Whether this process runs as the superuser.
pub fn is_root() -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| {
        status.lines().any(|line| line.starts_with("Uid:") && line.split_whitespace().nth(2) == Some("0"))
    })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::temp::TempDir;

    #[test]
    fn a_command_past_its_time_is_killed_with_its_children() {
        let dir = TempDir::new("process").unwrap();
        let log = dir.path().join("log");
        // The inner shell prints its id, then sleeps far longer than the limit.
        let mut command = Command::new("sh");
        command.arg("-c").arg("sh -c 'echo $$; sleep 600; :'; :");
        assert_eq!(logged(&mut command, &log, Duration::from_secs(5)).unwrap(), Outcome::TimedOut);
        // A shell may still say that its child was killed before it is itself.
        let inner: u32 = fs::read_to_string(&log).unwrap().lines().next().unwrap().parse().unwrap();
        // The signal is on its way; then the process is a zombie until its new parent has reaped it, or gone at once.
        let deadline = Instant::now() + Duration::from_secs(20);
        while lives(inner) {
            assert!(Instant::now() < deadline, "the grandchild lives on");
            thread::yield_now();
        }
    }

    fn lives(pid: u32) -> bool {
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
        !matches!(stat.rsplit(')').next().and_then(|rest| rest.trim().chars().next()), Some('Z' | 'X') | None)
    }

    #[test]
    fn outcome_follows_the_exit_status() {
        let dir = TempDir::new("process").unwrap();
        let log = dir.path().join("log");
        let minute = Duration::from_secs(60);
        assert_eq!(logged(&mut Command::new("true"), &log, minute).unwrap(), Outcome::Ok);
        assert_eq!(logged(&mut Command::new("false"), &log, minute).unwrap(), Outcome::Failed);
        assert!(logged(&mut Command::new("no-such-program-here"), &log, minute).is_err());
    }
}
