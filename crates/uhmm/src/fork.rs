//! Forks: the child sees exactly the bytes of the moment of `fork`, whatever then happens to the parent.
//!
//! - A fork by libc is prepared for: what is leaving ends, nothing leaves any more, and every page comes home. The
//!   child then has all bytes by the kernel's own copy-on-write, and needs nobody.
//! - A fork by a raw system call raises an event where the process is privileged, and the child is given the bytes of
//!   the pages that are away before anything else happens (see [`crate::events`]). `uhmm doctor` says where it is not.
//! - `vfork` and `posix_spawn` share the memory; the parent's handlers serve the child's faults as their own.
//!
//! In the child the parent's engine does not exist: its threads are not there, its devices are not the child's. The
//! child starts its own at the first use.

use std::sync::{
    OnceLock,
    atomic::{
        AtomicBool, AtomicUsize,
        Ordering::{Acquire, Relaxed, Release},
    },
};

use uhmm_sys::fork;

use crate::{
    job::Request,
    mm::{self, current_core},
};

static REGISTERED: OnceLock<bool> = OnceLock::new();
static PREPARED: AtomicBool = AtomicBool::new(false);
static IN_CHILD: OnceLock<fn()> = OnceLock::new();
/// How many forks lie between this process and the one that was executed.
static GENERATION: AtomicUsize = AtomicUsize::new(0);

/// Has `f` called in each forked child, after the engine's state was made right there. The first call counts.
pub fn after_fork_in_child(f: fn()) {
    let _ = IN_CHILD.set(f);
}

/// How many forks lie between this process and the one that was executed.
pub(crate) fn generation() -> usize {
    GENERATION.load(Acquire)
}

/// Sees to it that forks are prepared for. Returns whether they are.
pub fn register() -> bool {
    *REGISTERED.get_or_init(|| fork::at_fork(prepare, parent, child).is_ok())
}

extern "C" fn prepare() {
    if let Some(core) = current_core() {
        core.call(Request::ForkPrepare, |_, _| ());
        PREPARED.store(true, Relaxed);
    }
}

extern "C" fn parent() {
    if PREPARED.swap(false, Relaxed)
        && let Some(core) = current_core()
    {
        // Not a job: the movers may all be waiting for just this.
        core.thaw();
    }
}

extern "C" fn child() {
    fork::reset_in_child();
    PREPARED.store(false, Relaxed);
    GENERATION.fetch_add(1, Release);
    mm::forget();
    if let Some(f) = IN_CHILD.get() {
        f();
    }
}
