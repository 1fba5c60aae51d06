//! Atomics, locks and waiting, by one name.
//!
//! With `--cfg loom` the model checker's own types stand in for the standard library's, and the tests `loom_*` explore
//! every interleaving of the modules built on this one: [`pgmap`](crate::pgmap), [`device_table`](crate::device_table)
//! and [`notifier`](crate::notifier). The rest of the crate compiles in such a build, and cannot run in it.

use std::{
    sync::atomic,
    time::{Duration, Instant},
};

use thiserror::Error;

#[cfg(loom)]
pub use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU32, AtomicU64, Ordering},
};
#[cfg(not(loom))]
pub use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

/// Takes a lock whose holder cannot leave the data half changed. A panic elsewhere in the process must not turn every
/// later fault into one more panic, so poison is ignored.
#[cfg(not(loom))]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes a lock of the model checker, which ends the run at the first panic.
#[cfg(loom)]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("a thread of the model panicked")
}

/// Lets another thread make the step that the caller spins for.
pub(crate) fn spin() {
    #[cfg(loom)]
    loom::thread::yield_now();
    #[cfg(not(loom))]
    std::hint::spin_loop();
}

/// Memory that a structure is given to live in: zeroed, never freed, touched only where used.
///
/// The engine takes it from its private arena, or from memory that a forked child shares.
#[derive(Clone, Copy)]
pub struct Words {
    /// 32-bit words.
    pub words32: &'static [atomic::AtomicU32],
    /// 64-bit words.
    pub words64: &'static [atomic::AtomicU64],
}

impl std::fmt::Debug for Words {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} words of 32 bits, {} of 64", self.words32.len(), self.words64.len())
    }
}

/// How much memory a structure wants to be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WordsNeeded {
    /// Number of 32-bit words.
    pub words32: usize,
    /// Number of 64-bit words.
    pub words64: usize,
}

impl Words {
    /// The words as this module's atomics.
    #[cfg(not(loom))]
    pub(crate) fn atomics(self) -> (&'static [AtomicU32], &'static [AtomicU64]) {
        (self.words32, self.words64)
    }

    /// As many words of the model checker's, which cannot live in given memory.
    #[cfg(loom)]
    pub(crate) fn atomics(self) -> (&'static [AtomicU32], &'static [AtomicU64]) {
        let words32: Vec<_> = self.words32.iter().map(|_| AtomicU32::new(0)).collect();
        let words64: Vec<_> = self.words64.iter().map(|_| AtomicU64::new(0)).collect();
        (words32.leak(), words64.leak())
    }
}

impl WordsNeeded {
    /// Takes the words from the global allocator and never gives them back: for tests and simulations, whose heap
    /// does not migrate.
    #[must_use]
    pub fn leak(self) -> Words {
        let words32: Vec<_> = (0..self.words32).map(|_| atomic::AtomicU32::new(0)).collect();
        let words64: Vec<_> = (0..self.words64).map(|_| atomic::AtomicU64::new(0)).collect();
        Words { words32: words32.leak(), words64: words64.leak() }
    }
}

/// What was waited for did not happen in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("timed out after {} ms", limit.as_millis())]
pub struct TimedOut {
    /// How long was waited.
    pub limit: Duration,
}

/// A bounded wait without a condition variable: spins, then yields, then sleeps in short steps.
///
/// The waker has nothing to do, which keeps the fault path free of system calls for waiters that hardly ever exist.
///
/// Each step counts for [`Waiter::STEP`] at most: a process that is stopped for a minute, or whose machine is, finds that minute gone
/// on the clock, in which whoever it waits for could not do anything either.
#[derive(Debug)]
pub(crate) struct Waiter {
    limit: Duration,
    waited: Duration,
    /// Read at the first yield: a wait that ends within the spins never looks at the clock.
    last: Option<Instant>,
    tries: u32,
}

impl Waiter {
    const SPINS: u32 = 64;
    const YIELDS: u32 = 64;
    const NAP: Duration = Duration::from_micros(50);
    const STEP: Duration = Duration::from_millis(100);

    pub(crate) const fn new(limit: Duration) -> Self {
        Self { limit, waited: Duration::ZERO, last: None, tries: 0 }
    }

    /// How much of the limit is left.
    pub(crate) const fn left(&self) -> Duration {
        self.limit.saturating_sub(self.waited)
    }

    /// Waits a little.
    ///
    /// # Errors
    /// [`TimedOut`] once the limit has passed. Under loom time does not pass.
    pub(crate) fn pause(&mut self) -> Result<(), TimedOut> {
        if cfg!(loom) {
            spin();
            return Ok(());
        }
        self.tries = self.tries.saturating_add(1);
        if self.tries <= Self::SPINS {
            spin();
            return Ok(());
        }
        let now = Instant::now();
        self.waited += (now - self.last.replace(now).unwrap_or(now)).min(Self::STEP);
        if self.waited >= self.limit {
            return Err(TimedOut { limit: self.limit });
        }
        if self.tries <= Self::SPINS + Self::YIELDS {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Self::NAP);
        }
        Ok(())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_waiter_ends_at_its_limit_and_counts_no_more_than_a_step_of_a_stop() {
        let limit = Duration::from_millis(500);
        let mut waiter = Waiter::new(limit);
        let start = Instant::now();
        while waiter.waited.is_zero() {
            waiter.pause().unwrap();
        }
        // As if all had been stopped meanwhile.
        let before = waiter.waited;
        std::thread::sleep(limit);
        waiter.pause().unwrap();
        assert_eq!(waiter.waited - before, Waiter::STEP);
        while waiter.pause().is_ok() {}
        assert!(start.elapsed() >= 2 * limit - Waiter::STEP, "{:?}", start.elapsed());
    }
}
