//! Signals, for a process that runs another one and stands in for it: it passes on what it is sent, and ends as the other
//! one ended.
//!
//! Signals are taken from a file, not by handlers, so that no code runs at a moment that nobody chose.
//!
//! # Kernel
//! `signalfd(2)`, `sigprocmask(2)`.
// UNSAFETY: system calls that change how this process takes signals, and a hook between `fork` and `exec`.

use std::{
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use crate::{Errno, raw};

/// Highest signal number.
const MAX: i32 = 64;

/// A set of signals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SignalSet(u64);

impl SignalSet {
    /// No signal.
    pub const NONE: Self = Self(0);

    /// What can be passed on to another process: all but those that stop this process (it stops and goes on with its
    /// process group), those that its own faults raise, and `SIGPIPE`.
    pub const FORWARDABLE: Self = Self::all_but(&[
        libc::SIGKILL,
        libc::SIGSTOP,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
        libc::SIGABRT,
        libc::SIGSYS,
        libc::SIGPIPE,
    ]);

    const fn all_but(signals: &[i32]) -> Self {
        let (mut set, mut n) = (u64::MAX, 0);
        while n < signals.len() {
            set &= !(1 << (signals[n] - 1));
            n += 1;
        }
        Self(set)
    }

    const fn of(signal: i32) -> Self {
        Self(1 << (signal - 1))
    }

    /// Whether the set holds `signal`.
    #[must_use]
    pub const fn contains(self, signal: i32) -> bool {
        signal > 0 && signal <= MAX && self.0 & Self::of(signal).0 != 0
    }
}

fn change_mask(how: i32, set: SignalSet) -> SignalSet {
    let mut old = 0u64;
    let args = [raw::arg(how), raw::ptr_arg(&raw const set.0), raw::ptr_arg(&raw mut old), 8];
    // SAFETY: the kernel reads and writes masks of eight bytes, both locals.
    let _ = unsafe { raw::syscall(libc::SYS_rt_sigprocmask, args) };
    SignalSet(old)
}

/// Blocks signals for the calling thread, in addition to those that are, and returns what was blocked before.
pub fn block(set: SignalSet) -> SignalSet {
    change_mask(libc::SIG_BLOCK, set)
}

/// Has the command's program start with exactly these signals blocked, instead of none.
pub fn block_at_exec(command: &mut Command, set: SignalSet) {
    let hook = move || {
        change_mask(libc::SIG_SETMASK, set);
        Ok(())
    };
    // SAFETY: between `fork` and `exec` the hook makes one system call, without libc: it takes no lock and allocates
    // nothing.
    unsafe { command.pre_exec(hook) };
}

/// Who sent a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// The kernel: a terminal's key for the whole foreground group, the end of a child, a timer.
    Kernel,
    /// A process, by `kill` or its like.
    Process(u32),
}

/// A signal that arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrived {
    /// Which.
    pub signal: i32,
    /// Who sent it.
    pub sender: Sender,
}

/// A file that signals are read from.
#[derive(Debug)]
pub struct SignalFd(OwnedFd);

/// What the kernel writes for each signal: 128 bytes, of which these are the first.
const INFO_BYTES: usize = 128;

impl SignalFd {
    /// Opens one for `set`, which the caller has blocked.
    ///
    /// # Errors
    /// `EMFILE`, `ENFILE`, `ENOMEM`.
    pub fn open(set: SignalSet) -> Result<Self, Errno> {
        let flags = raw::arg(libc::SFD_CLOEXEC);
        let args = [raw::arg(-1), raw::ptr_arg(&raw const set.0), 8, flags];
        // SAFETY: the kernel reads a mask of eight bytes, a local.
        let fd = unsafe { raw::syscall(libc::SYS_signalfd4, args) }?;
        // SAFETY: the call succeeded, so the file is new.
        Ok(Self(unsafe { raw::take_fd(fd) }))
    }

    /// Waits for the next signal.
    ///
    /// # Errors
    /// Whatever `read(2)` answers but `EINTR`.
    pub fn next(&self) -> Result<Arrived, Errno> {
        let mut info = [0u8; INFO_BYTES];
        loop {
            match raw::read(self.0.as_fd(), &mut info) {
                Ok(INFO_BYTES) => break,
                Ok(_) => return Err(Errno::IO),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        let word = |at: usize| i32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
        // `ssi_signo`, `ssi_code`, `ssi_pid`; codes up to 0 are those of processes.
        let (signal, code, pid) = (word(0), word(8), word(12));
        let sender = if code <= 0 { Sender::Process(pid.cast_unsigned()) } else { Sender::Kernel };
        Ok(Arrived { signal, sender })
    }
}

/// Sends a signal to a process.
///
/// # Errors
/// `ESRCH`: no such process. `EPERM`: it is another user's. `EINVAL`: no such signal.
///
/// # Kernel
/// `kill(2)`.
pub fn send(pid: u32, signal: i32) -> Result<(), Errno> {
    // SAFETY: touches no memory.
    unsafe { raw::syscall(libc::SYS_kill, [u64::from(pid), raw::arg(signal)]) }.map(drop)
}

/// Ends this process by `signal`, without a core file of its own. Where the signal does not end a process, exits with
/// the status by which shells report it.
pub fn die_of(signal: i32) -> ! {
    let no_core = [0u64; 2];
    let args = [0, u64::from(libc::RLIMIT_CORE), raw::ptr_arg(no_core.as_ptr())];
    // SAFETY: the kernel reads two numbers, a local. Where it refuses there may be a second core file.
    let _ = unsafe { raw::syscall(libc::SYS_prlimit64, args) };
    // SAFETY: gives up a handler; whoever installed it is not returned to.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    let _ = send(raw::getpid(), signal);
    change_mask(libc::SIG_UNBLOCK, SignalSet::of(signal));
    std::process::exit(128 + signal)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_blocked_signal_is_read_with_its_sender() {
        // Signals to a process go to any of its threads: this one is sent to the thread that blocks it.
        let set = SignalSet::of(libc::SIGUSR2);
        block(set);
        let file = SignalFd::open(set).unwrap();
        let (pid, tid) = (u64::from(raw::getpid()), u64::from(crate::thread::gettid()));
        // SAFETY: touches no memory; the signal is blocked.
        unsafe { raw::syscall(libc::SYS_tgkill, [pid, tid, raw::arg(libc::SIGUSR2)]) }.unwrap();
        let arrived = file.next().unwrap();
        assert_eq!(arrived, Arrived { signal: libc::SIGUSR2, sender: Sender::Process(std::process::id()) });
    }

    #[test]
    fn a_program_starts_with_the_mask_that_it_was_given() {
        let mut command = Command::new("grep");
        block_at_exec(command.args(["SigBlk", "/proc/self/status"]), SignalSet::of(libc::SIGUSR1));
        let text = String::from_utf8(command.output().unwrap().stdout).unwrap();
        assert_eq!(text.split_whitespace().last(), Some("0000000000000200"));
    }

    #[test]
    fn the_set_to_forward_leaves_out_what_stops_or_faults() {
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGCHLD, libc::SIGCONT, libc::SIGWINCH, 34, 64] {
            assert!(SignalSet::FORWARDABLE.contains(signal), "{signal}");
        }
        for signal in [0, -1, 65, libc::SIGTSTP, libc::SIGSEGV, libc::SIGKILL] {
            assert!(!SignalSet::FORWARDABLE.contains(signal), "{signal}");
        }
    }

    #[test]
    fn dying_of_a_signal_is_seen_by_the_parent() {
        // A process that runs this test again, and ends by it.
        if std::env::var_os("UHMM_TEST_DIE").is_some() {
            block(SignalSet::of(libc::SIGTERM));
            die_of(libc::SIGTERM);
        }
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "signal::tests::dying_of_a_signal_is_seen_by_the_parent", "--test-threads=1"])
            .env("UHMM_TEST_DIE", "1")
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(libc::SIGTERM));
    }
}
