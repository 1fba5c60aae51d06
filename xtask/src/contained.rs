//! Programs that change the machine, in a process of their own that changes it back.
//!
//! A test of the kernel may set sysctls, may leave processes behind and may be killed while it does. So it runs below a
//! second process of this program, the *container*, which ends what the test started and restores the settings, whatever
//! happens:
//!
//! ```text
//!   xtask ----- stdin, held open -----> container ----> program ----> its children
//!         <---- stdout: one report ---- (session of its own,
//!         <---- stderr: the program's    adopts orphans)
//!               outputs
//! ```
//!
//! The container is in a session of its own, where an interrupt from the terminal does not reach it. When its input ends,
//! since xtask was interrupted, panicked or was killed, it takes that for the end of the program's time.
//!
//! What it does not survive: a `SIGKILL` of its own.

use std::{
    ffi::OsString,
    fs,
    io::{BufRead, BufReader, Read},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitOptions, WaitStatus, getrlimit, kill_process, set_child_subreaper, setrlimit,
    setsid, wait,
};

use crate::process;

/// A program to be run in a container.
#[derive(Debug, Default)]
pub struct Contained {
    /// The program and its arguments.
    pub command: Vec<OsString>,
    /// Where it runs; here, if it is empty.
    pub dir: PathBuf,
    /// Variables that the program gets beside those of this process.
    pub env: Vec<(&'static str, OsString)>,
    /// Settings of the machine for as long as the program runs.
    pub settings: Vec<(PathBuf, String)>,
    /// The longest that it may take.
    pub limit: Duration,
    /// Mebibytes of swap for as long as it runs, in a file below `dir`.
    pub swap_mib: u64,
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// With this exit status.
    Exit(i32),
    /// By this signal.
    Signal(i32),
    /// Its time was over.
    TimedOut,
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exit(status) => write!(f, "exit {status}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::TimedOut => write!(f, "timeout"),
        }
    }
}

/// What a run came to.
#[derive(Debug, Clone, Copy)]
pub struct Ran {
    /// How the program ended.
    pub end: End,
    /// Processes that were still there then and were killed.
    pub left: usize,
    /// How long it took.
    pub took: Duration,
}

impl Contained {
    /// Runs it, and calls `line_fn` with each line that it prints.
    ///
    /// # Errors
    /// The program could not be started, or a setting not be made.
    pub fn run(&self, line_fn: &mut dyn FnMut(&str)) -> Result<Ran> {
        // The file of that name may have been built anew meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.arg("contained").arg("--limit-s").arg(self.limit.as_secs().to_string());
        for (name, value) in &self.env {
            let mut word = OsString::from(format!("--env={name}="));
            word.push(value);
            command.arg(word);
        }
        for (path, value) in &self.settings {
            command.arg(format!("--set={}={value}", path.display()));
        }
        if self.swap_mib > 0 {
            command.arg("--swap-mib").arg(self.swap_mib.to_string());
        }
        if !self.dir.as_os_str().is_empty() {
            command.current_dir(&self.dir);
        }
        command.arg("--").args(&self.command);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start a container")?;
        let start = Instant::now();
        let held_open = child.stdin.take();
        let mut output = BufReader::new(child.stderr.take().context("a pipe")?);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line)? > 0 {
            line_fn(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']));
            line.clear();
        }
        let mut report = String::new();
        child.stdout.take().context("a pipe")?.read_to_string(&mut report)?;
        child.wait()?;
        drop(held_open);
        let Some((end, left)) = read_report(&report) else {
            let reason = if report.is_empty() { "the container was killed; settings may stay" } else { report.trim() };
            bail!("{}: {reason}", self.command[0].display());
        };
        Ok(Ran { end, left, took: start.elapsed() })
    }
}

/// `exit 1 left 0`
fn report_line(end: End, left: usize) -> String {
    format!("{end} left {left}\n")
}

fn read_report(report: &str) -> Option<(End, usize)> {
    let (end, left) = report.trim().split_once(" left ")?;
    let end = match end.split_once(' ') {
        Some(("exit", status)) => End::Exit(status.parse().ok()?),
        Some(("signal", signal)) => End::Signal(signal.parse().ok()?),
        _ if end == "timeout" => End::TimedOut,
        _ => return None,
    };
    Some((end, left.parse().ok()?))
}

/// The container's orders.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[arg(long)]
    limit_s: u64,
    #[arg(long)]
    env: Vec<String>,
    #[arg(long)]
    set: Vec<String>,
    #[arg(long, default_value_t = 0)]
    swap_mib: u64,
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// Is the container. Its report is a line on standard output, which the program does not get to see.
pub fn run(options: &Options) -> Result<bool> {
    match contain(options) {
        Ok((end, left)) => print!("{}", report_line(end, left)),
        Err(error) => println!("{error:#}"),
    }
    Ok(true)
}

fn contain(options: &Options) -> Result<(End, usize)> {
    // It is the leader of one already where somebody runs it by hand.
    let _ = setsid();
    set_child_subreaper(Some(rustix::process::getpid()))?;
    // A test that crashes is to leave no file.
    setrlimit(Resource::Core, Rlimit { current: Some(0), ..getrlimit(Resource::Core) })?;

    let orphaned = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&orphaned);
    thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        flag.store(true, Ordering::Relaxed);
    });

    let settings = Settings::keep();
    for assignment in &options.set {
        let (path, value) = assignment.split_once('=').context("--set PATH=VALUE")?;
        settings.set(Path::new(path), value)?;
    }
    let swap = if options.swap_mib > 0 { Swap::make(options.swap_mib) } else { None };
    let mut command = Command::new(&options.command[0]);
    let outputs = std::io::stderr().as_fd().try_clone_to_owned()?;
    command.args(&options.command[1..]).stdin(Stdio::null()).stdout(outputs);
    for variable in &options.env {
        let (name, value) = variable.split_once('=').context("--env NAME=VALUE")?;
        command.env(name, value);
    }
    let program = Pid::from_child(&command.spawn().with_context(|| options.command[0].display().to_string())?);
    let deadline = Instant::now() + Duration::from_secs(options.limit_s);
    let end = loop {
        // Orphans are reaped along the way.
        match wait(WaitOptions::NOHANG)? {
            Some((pid, status)) if pid == program => break end_of(status),
            Some(_) => {}
            None if Instant::now() > deadline || orphaned.load(Ordering::Relaxed) => break End::TimedOut,
            None => thread::sleep(Duration::from_millis(5)),
        }
    };
    let left = end_all()?;
    drop(swap);
    drop(settings);
    Ok((end, if end == End::TimedOut { 0 } else { left }))
}

fn end_of(status: WaitStatus) -> End {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(status), _) => End::Exit(status),
        (None, Some(signal)) => End::Signal(signal),
        // A stopped child is not reported without `WUNTRACED`.
        (None, None) => End::Exit(-1),
    }
}

/// Kills whatever descends from this process, until nothing does, and says how many there were at first.
fn end_all() -> Result<usize> {
    const PATIENCE: Duration = Duration::from_secs(30);
    let start = Instant::now();
    let mut first = None;
    loop {
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        let doomed = process::descendants(std::process::id());
        let count = doomed.len();
        first.get_or_insert(count);
        if count == 0 {
            return Ok(first.unwrap_or(0));
        }
        if start.elapsed() > PATIENCE {
            bail!("{count} processes do not end");
        }
        for pid in doomed.into_iter().filter_map(|pid| Pid::from_raw(pid.cast_signed())) {
            // One that is gone already is fine.
            let _ = kill_process(pid, Signal::KILL);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// A file to swap to, in the current directory; gone on drop.
#[derive(Debug)]
struct Swap;

const SWAP: &str = "swap";

impl Swap {
    /// None where it cannot be made; says why.
    fn make(mib: u64) -> Option<Self> {
        // Blocks and all: a file with holes is no swap.
        let made = Command::new("dd")
            .args(["if=/dev/zero", "bs=1M", &format!("count={mib}"), &format!("of={SWAP}")])
            .stderr(Stdio::null())
            .status();
        let swap = Self;
        let run = |program: &str| Command::new(program).arg(SWAP).stdout(Stdio::null()).status();
        for step in [made, run("mkswap"), run("swapon")] {
            if !step.is_ok_and(|status| status.success()) {
                eprintln!("xtask: no swap could be made; what needs it is skipped");
                return None;
            }
        }
        Some(swap)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // It may not have come to be.
        let _ = Command::new("swapoff").arg(SWAP).stderr(Stdio::null()).status();
        let _ = fs::remove_file(SWAP);
    }
}

/// Settings of the machine that tests change, as they were; written back on drop where they are no longer so.
#[derive(Debug)]
struct Settings {
    kept: Vec<(PathBuf, String)>,
}

impl Settings {
    fn keep() -> Self {
        let mut paths: Vec<PathBuf> = [
            "/proc/sys/kernel/shmall",
            "/proc/sys/kernel/shmmax",
            "/proc/sys/kernel/yama/ptrace_scope",
            "/proc/sys/vm/compact_unevictable_allowed",
            "/proc/sys/vm/enable_soft_offline",
            "/proc/sys/vm/max_map_count",
            "/proc/sys/vm/nr_hugepages",
            "/proc/sys/vm/nr_overcommit_hugepages",
            "/proc/sys/vm/overcommit_memory",
            "/proc/sys/vm/unprivileged_userfaultfd",
        ]
        .into_iter()
        .map(PathBuf::from)
        .collect();
        for dir in ["/sys/kernel/mm/hugepages", "/sys/kernel/mm/ksm", "/sys/kernel/mm/transparent_hugepage"] {
            files_below(Path::new(dir), &mut paths);
        }
        let kept = paths.into_iter().filter_map(|path| Some((value_of(&path)?, path))).map(|(v, p)| (p, v)).collect();
        Self { kept }
    }

    fn set(&self, path: &Path, value: &str) -> Result<()> {
        if !self.kept.iter().any(|(kept, _)| kept == path) {
            bail!("{} is not among the settings that are restored, or not there", path.display());
        }
        fs::write(path, value).with_context(|| format!("cannot set {} to {value}", path.display()))?;
        match value_of(path) {
            Some(now) if now != value => eprintln!("xtask: {} is {now} instead of {value}", path.display()),
            _ => {}
        }
        Ok(())
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        for (path, before) in &self.kept {
            if value_of(path).is_some_and(|now| now != *before)
                && let Err(error) = fs::write(path, before)
            {
                eprintln!("xtask: {} is not {before} again: {error}", path.display());
            }
        }
    }
}

/// Files that root may write, below `dir`.
fn files_below(dir: &Path, found: &mut Vec<PathBuf>) {
    use std::os::unix::fs::PermissionsExt;
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_dir() {
            files_below(&entry.path(), found);
        } else if metadata.permissions().mode() & 0o200 != 0 {
            found.push(entry.path());
        }
    }
}

/// What a setting is; of a list of words, the one in brackets.
fn value_of(path: &Path) -> Option<String> {
    Some(chosen(fs::read_to_string(path).ok()?.trim()).to_owned())
}

fn chosen(text: &str) -> &str {
    text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or(text, |(word, _)| word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_as_it_was_written() {
        for end in [End::Exit(0), End::Exit(4), End::Signal(11), End::TimedOut] {
            assert_eq!(read_report(&report_line(end, 3)), Some((end, 3)));
        }
        assert_eq!(read_report("cannot set /proc/x: denied"), None);
        assert_eq!(read_report(""), None);
    }

    #[test]
    fn the_word_in_brackets_is_the_setting() {
        assert_eq!(chosen("always [madvise] never"), "madvise");
        assert_eq!(chosen("65530"), "65530");
    }

    #[test]
    fn settings_that_are_not_restored_are_not_made() {
        assert!(Settings { kept: Vec::new() }.set(Path::new("/proc/sys/vm/nr_hugepages"), "0").is_err());
    }
}
