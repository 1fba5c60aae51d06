//! The witness's memory, and who may use it: one thread at a time, and nobody waits.
//!
//! A hook that finds the witness in use passes its call on unwatched:
//!
//! ```text
//!   in use by the same thread    the library under test called, or a signal handler: nothing to note
//!   in use by another thread     the call may change what the other is looking at: the witness is *disturbed*,
//!                                reports nothing of the check it is in, and forgets what it knew of pages
//! ```
//!
//! A forked child starts with what its parent knew of bytes, and without nodes.
//
// UNSAFETY: a static that one thread at a time has a reference to.

use std::{
    cell::UnsafeCell,
    ffi::c_int,
    ops::{Deref, DerefMut},
    sync::atomic::{
        AtomicBool, AtomicI32, AtomicU32,
        Ordering::{Acquire, Relaxed, Release, SeqCst},
    },
};

use crate::{nodes, raw, witness::Witness};

struct Shared(UnsafeCell<Witness>);

// SAFETY: the contents are reached through `Guard` only, of which there is one at a time.
unsafe impl Sync for Shared {}

/// All zeros, so that it costs pages only where it is used. It is there from the moment the library is loaded: the witness
/// maps nothing while tests run, which leave holes and expect them to stay.
static WITNESS: Shared = Shared(UnsafeCell::new(Witness::new()));

/// The thread that uses the witness, or 0.
static OWNER: AtomicI32 = AtomicI32::new(0);
/// The process whose witness this is.
static PROCESS: AtomicI32 = AtomicI32::new(0);
/// Calls that are passed on unwatched at this moment.
static PASSING: AtomicU32 = AtomicU32::new(0);
/// Whether there were such calls since the book was last right.
static DISTURBED: AtomicBool = AtomicBool::new(false);

/// The right to use the witness; ends when dropped.
pub(crate) struct Guard(());

/// A call that is passed on unwatched, until dropped.
pub(crate) struct Passing(());

/// What a hook finds.
pub(crate) enum Entry {
    /// The witness is the caller's.
    Free(Guard),
    /// The caller is within a hook already.
    Nested,
    /// Another thread has it.
    Taken { _until: Passing },
}

/// Enters a hook.
pub(crate) fn enter() -> Entry {
    let (process, thread) = (raw::getpid(), raw::gettid());
    let of = PROCESS.load(Acquire);
    if of != process {
        begin_process(of, process, thread);
    }
    if OWNER.load(Relaxed) == thread {
        return Entry::Nested;
    }
    if OWNER.compare_exchange(0, thread, Acquire, Relaxed).is_err() {
        PASSING.fetch_add(1, SeqCst);
        DISTURBED.store(true, SeqCst);
        return Entry::Taken { _until: Passing(()) };
    }
    let mut guard = Guard(());
    if DISTURBED.load(SeqCst) {
        guard.forget();
        DISTURBED.store(PASSING.load(SeqCst) != 0, SeqCst);
    }
    Entry::Free(guard)
}

/// The first hook in a process: a new one, or a forked child.
#[cold]
fn begin_process(parent: c_int, process: c_int, thread: c_int) {
    if PROCESS.compare_exchange(parent, process, SeqCst, SeqCst).is_err() {
        return;
    }
    if parent == 0 {
        return;
    }
    // The thread that used the witness may not exist here, and may have been in the middle of a change.
    let was_used = OWNER.swap(thread, SeqCst) != 0;
    PASSING.store(0, SeqCst);
    DISTURBED.store(false, SeqCst);
    nodes::forget();
    let mut guard = Guard(());
    guard.inherit();
    if was_used {
        guard.forget();
    }
}

/// In a child that a hook for `fork` made, whose parent's thread had the witness: so this one has it.
pub(crate) fn began_in_child(guard: &mut Guard) {
    PROCESS.store(raw::getpid(), SeqCst);
    OWNER.store(raw::gettid(), SeqCst);
    PASSING.store(0, SeqCst);
    DISTURBED.store(false, SeqCst);
    nodes::forget();
    guard.inherit();
}

/// Whether another thread's call may have changed what the witness is looking at.
pub(crate) fn is_disturbed() -> bool {
    DISTURBED.load(SeqCst)
}

/// The witness, where it is free and this process's: at the process's end.
pub(crate) fn at_exit() -> Option<Guard> {
    if PROCESS.load(Acquire) != raw::getpid() {
        return None;
    }
    match enter() {
        Entry::Free(guard) => Some(guard),
        Entry::Nested | Entry::Taken { .. } => None,
    }
}

impl Deref for Guard {
    type Target = Witness;

    fn deref(&self) -> &Witness {
        // SAFETY: this is the only guard, so nobody has a mutable reference.
        unsafe { &*WITNESS.0.get() }
    }
}

impl DerefMut for Guard {
    fn deref_mut(&mut self) -> &mut Witness {
        // SAFETY: this is the only guard, and borrowed mutably.
        unsafe { &mut *WITNESS.0.get() }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        OWNER.store(0, Release);
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        // In a forked child the count may have begun anew.
        let _ = PASSING.fetch_update(SeqCst, SeqCst, |passing| passing.checked_sub(1));
    }
}
