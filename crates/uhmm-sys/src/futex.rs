//! Waiting for a number to change: the one blocking primitive that needs no allocation and no thread behind it.
//!
//! # Kernel
//! `futex(2)`.
// UNSAFETY: one system call.

use std::{sync::atomic::AtomicU32, time::Duration};

use crate::{Errno, raw};

const WAIT: u64 = 0;
const WAKE: u64 = 1;
const PRIVATE: u64 = 128;

/// How a wait ended. Always look at the number again: wake-ups can be stray.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum WaitResult {
    /// Somebody woke us.
    Woken,
    /// The number was not the expected one; there was no wait.
    Changed,
    /// The time is over.
    TimedOut,
    /// A signal was handled.
    Interrupted,
}

#[repr(C)]
struct Timespec {
    sec: i64,
    nsec: i64,
}

fn wait_with(word: &AtomicU32, expected: u32, timeout: Option<Duration>, flags: u64) -> WaitResult {
    let timeout = timeout
        .map(|t| Timespec { sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX), nsec: i64::from(t.subsec_nanos()) });
    let timeout_ptr = timeout.as_ref().map_or(0, |t| raw::ptr_arg(t));
    let args = [raw::ptr_arg(word.as_ptr()), WAIT | flags, u64::from(expected), timeout_ptr];
    // SAFETY: the kernel reads the word atomically and the timeout, a local.
    match unsafe { raw::syscall(libc::SYS_futex, args) } {
        Ok(_) => WaitResult::Woken,
        Err(Errno::AGAIN) => WaitResult::Changed,
        Err(Errno::TIMEDOUT) => WaitResult::TimedOut,
        // The word is a reference and so aligned and mapped: what remains is a signal.
        Err(_) => WaitResult::Interrupted,
    }
}

fn wake_with(word: &AtomicU32, n: u32, flags: u64) -> u32 {
    let n = n.min(i32::MAX.unsigned_abs());
    // SAFETY: the kernel uses the word's address as a name.
    let woken = unsafe { raw::syscall(libc::SYS_futex, [raw::ptr_arg(word.as_ptr()), WAKE | flags, u64::from(n)]) };
    woken.map_or(0, raw::low32)
}

/// Waits while `word` is `expected`, for threads of this process.
pub fn wait(word: &AtomicU32, expected: u32, timeout: Option<Duration>) -> WaitResult {
    wait_with(word, expected, timeout, PRIVATE)
}

/// Wakes at most `n` threads of this process that wait for `word`; returns how many.
pub fn wake(word: &AtomicU32, n: u32) -> u32 {
    wake_with(word, n, PRIVATE)
}

/// As [`wait`], for a word in memory that several processes share.
pub fn wait_shared(word: &AtomicU32, expected: u32, timeout: Option<Duration>) -> WaitResult {
    wait_with(word, expected, timeout, 0)
}

/// As [`wake`], for a word in memory that several processes share.
pub fn wake_shared(word: &AtomicU32, n: u32) -> u32 {
    wake_with(word, n, 0)
}
