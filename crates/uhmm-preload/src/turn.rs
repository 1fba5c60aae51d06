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

/// The thread whose turn it is, or 0.
static OWNER: AtomicU32 = AtomicU32::new(0);
/// Threads that wait.
static WAITING: AtomicU32 = AtomicU32::new(0);

/// A turn; ends when dropped.
pub(crate) struct Turn {
    ends: bool,
}

/// Waits for the calling thread's turn, in a process that has an engine or is about to.
pub(crate) fn turn() -> Turn {
    if !engine::is_ordered() {
        return Turn { ends: false };
    }
    let own = thread::gettid();
    if OWNER.load(Relaxed) == own {
        return Turn { ends: false };
    }
    loop {
        match OWNER.compare_exchange(0, own, Acquire, Relaxed) {
            Ok(_) => return Turn { ends: true },
            Err(owner) => {
                // Either the owner sees that somebody waits, or the wait sees that the owner has changed.
                WAITING.fetch_add(1, SeqCst);
                let _ = futex::wait(&OWNER, owner, None);
                WAITING.fetch_sub(1, SeqCst);
            }
        }
    }
}

/// In a forked child, where the thread whose turn it was may not exist.
pub(crate) fn reset_in_child() {
    OWNER.store(0, Relaxed);
    WAITING.store(0, Relaxed);
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.ends {
            OWNER.store(0, SeqCst);
            if WAITING.load(SeqCst) != 0 {
                futex::wake(&OWNER, 1);
            }
        }
    }
}
