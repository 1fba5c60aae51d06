//! A lock of one word for the arena: it needs no thread-local storage, no allocation and no libc.

use std::sync::atomic::{
    AtomicU32,
    Ordering::{Acquire, Relaxed, Release},
};

use crate::futex;

/// Tries before the thread sleeps. A holder that runs is done sooner; one that does not must get the CPU.
const SPINS: u32 = 100;

const FREE: u32 = 0;
const HELD: u32 = 1;
/// Held, and somebody may sleep.
const AWAITED: u32 = 2;

/// Mutual exclusion for sections of a few instructions, or one system call.
#[derive(Debug)]
pub(crate) struct Lock(AtomicU32);

/// Proof that the lock is held; lets go when dropped.
#[derive(Debug)]
pub(crate) struct Held<'a>(&'a Lock);

impl Lock {
    pub(crate) const fn new() -> Self {
        Self(AtomicU32::new(FREE))
    }

    pub(crate) fn lock(&self) -> Held<'_> {
        for _ in 0..SPINS {
            if self.0.compare_exchange_weak(FREE, HELD, Acquire, Relaxed).is_ok() {
                return Held(self);
            }
            std::hint::spin_loop();
        }
        // Whoever takes the lock from here on says that somebody may sleep, for it cannot know that nobody does.
        while self.0.swap(AWAITED, Acquire) != FREE {
            let _ = futex::wait(&self.0, AWAITED, None);
        }
        Held(self)
    }

    /// Opens the lock whoever holds it: right only where the holder does not exist, in a forked child.
    pub(crate) fn reset(&self) {
        self.0.store(FREE, Release);
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.0.0.swap(FREE, Release) == AWAITED {
            futex::wake(&self.0.0, 1);
        }
    }
}
