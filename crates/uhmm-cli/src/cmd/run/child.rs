//! Standing in for a program: it runs as a child, in the same process group and on the same terminal.
//!
//! A key like Ctrl-C reaches both; this process survives it to report. A signal that somebody sends to this process is
//! passed on. Signals that stop a process are not held back: the whole group stops and goes on together.

use std::{
    io,
    os::unix::process::ExitStatusExt,
    process::{Command, ExitCode, ExitStatus},
};

use uhmm_sys::{
    files,
    signal::{self, Arrived, Sender, SignalFd, SignalSet},
};

/// How the program ended.
#[derive(Debug)]
pub struct End(ExitStatus);

impl End {
    /// Ends this process in the same way: does not return where the program died by a signal.
    pub fn pass_on(self) -> ExitCode {
        if let Some(signal) = self.0.signal() {
            signal::die_of(signal);
        }
        self.0.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
    }
}

/// Runs the program to its end.
///
/// # Errors
/// It cannot be started.
pub fn run(command: &mut Command) -> io::Result<End> {
    let before = signal::block(SignalSet::FORWARDABLE);
    signal::block_at_exec(command, before);
    let signals = SignalFd::open(SignalSet::FORWARDABLE)?;
    let mut child = command.spawn()?;
    // The summary goes to standard error. Where this fails, the far end of a pipe learns of its closing only at our end.
    let _ = files::let_go_of_streams();
    loop {
        // One `SIGCHLD` can stand for several, and one may have come before this.
        if let Some(status) = child.try_wait()? {
            return Ok(End(status));
        }
        let Arrived { signal, sender } = signals.next()?;
        match sender {
            // The group's, or news of a child.
            Sender::Kernel => {}
            // Sent to its own group by the program itself.
            Sender::Process(pid) if pid == child.id() => {}
            // It may have ended just now.
            Sender::Process(_) => drop(signal::send(child.id(), signal)),
        }
    }
}
