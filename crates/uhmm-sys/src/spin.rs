//! A lock of one word for the arena: it needs no thread-local storage, no allocation and no libc.

use std::sync::atomic::{
    AtomicU32,
    Ordering::{Acquire, Relaxed, Release},
};

use crate::raw;

/// Tries before the CPU is given to another thread, which may be the holder.
const SPINS: u32 = 100;

/// Mutual exclusion for sections of a few instructions, or one system call.
#[derive(Debug)]
pub(crate) struct SpinLock(AtomicU32);

/// Proof that the lock is held; lets go when dropped.
#[derive(Debug)]
pub(crate) struct Held<'a>(&'a SpinLock);

impl SpinLock {
    pub(crate) const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    pub(crate) fn lock(&self) -> Held<'_> {
        let mut spins = 0;
        while self.0.compare_exchange_weak(0, 1, Acquire, Relaxed).is_err() {
            spins += 1;
            if spins % SPINS == 0 {
                raw::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        Held(self)
    }

    /// Opens the lock whoever holds it: right only where the holder does not exist, in a forked child.
    pub(crate) fn reset(&self) {
        self.0.store(0, Release);
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.0.store(0, Release);
    }
}
