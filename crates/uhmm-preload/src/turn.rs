//! Changes of the address space, one after the other.
//!
//! The kernel tells the engine of a change when it is over, and what was unmapped is free before that: another thread may
//! be given the same addresses, change them in turn, and be heard of first. To the engine, which knows pages by their
//! addresses, the one change then looks like the other. So threads that change mappings take turns, from the call until
//! the engine has heard of it.
//!
//! A signal handler that interrupts a turn goes on in the same turn. Calls that the C library makes itself take none;
//! nor do they leave addresses free for long.

use std::sync::atomic::{
    AtomicU32,
    Ordering::{Acquire, Relaxed, SeqCst},
};

use uhmm_sys::{futex, thread};

use crate::engine;

/// For changes of mappings.
static CHANGES: Turns = Turns::new();

/// Something that one thread does at a time.
pub(crate) struct Turns {
    /// The thread whose turn it is, or 0.
    owner: AtomicU32,
    /// Threads that wait.
    waiting: AtomicU32,
}

impl Turns {
    pub(crate) const fn new() -> Self {
        Self { owner: AtomicU32::new(0), waiting: AtomicU32::new(0) }
    }

    /// Waits for the calling thread's turn.
    pub(crate) fn wait(&self) -> Turn<'_> {
        let own = thread::gettid();
        if self.owner.load(Relaxed) == own {
            return Turn(None);
        }
        loop {
            match self.owner.compare_exchange(0, own, Acquire, Relaxed) {
                Ok(_) => return Turn(Some(self)),
                Err(owner) => {
                    // Either the owner sees that somebody waits, or the wait sees that the owner has changed.
                    self.waiting.fetch_add(1, SeqCst);
                    let _ = futex::wait(&self.owner, owner, None);
                    self.waiting.fetch_sub(1, SeqCst);
                }
            }
        }
    }

    /// In a forked child, where the thread whose turn it was may not exist.
    pub(crate) fn reset_in_child(&self) {
        self.owner.store(0, Relaxed);
        self.waiting.store(0, Relaxed);
    }
}

/// A turn; ends when dropped, if it is not a part of one.
pub(crate) struct Turn<'a>(Option<&'a Turns>);

/// Waits for the calling thread's turn to change mappings, in a process that has an engine or is about to.
pub(crate) fn turn() -> Turn<'static> {
    if engine::is_ordered() { CHANGES.wait() } else { Turn(None) }
}

/// In a forked child: see [`Turns::reset_in_child`].
pub(crate) fn reset_in_child() {
    CHANGES.reset_in_child();
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(turns) = self.0 {
            turns.owner.store(0, SeqCst);
            if turns.waiting.load(SeqCst) != 0 {
                futex::wake(&turns.owner, 1);
            }
        }
    }
}
