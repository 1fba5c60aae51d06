//! Asymmetric fences: one side pays nearly nothing, the other pays for both.
//!
//! A thread that stores and then loads with [`light`] between, and a thread that stores and then loads with [`heavy`]
//! between, cannot both miss the other's store. Where the kernel has `membarrier`, `light` only keeps the compiler
//! from reordering, and `heavy` makes every CPU that runs the process execute a full fence. Elsewhere both are full
//! fences.
// UNSAFETY: one system call.

use std::sync::atomic::{
    AtomicBool,
    Ordering::{Acquire, Release, SeqCst},
    compiler_fence, fence,
};

use crate::{
    probe::{self, Cap},
    raw,
};

const PRIVATE_EXPEDITED: u64 = 1 << 3;
const REGISTER_PRIVATE_EXPEDITED: u64 = 1 << 4;

/// Set once, never cleared: a process stays registered. See [`renew_in_child`] for its children.
static REGISTERED: AtomicBool = AtomicBool::new(false);

fn membarrier(command: u64) -> bool {
    // SAFETY: changes no memory.
    unsafe { raw::syscall(libc::SYS_membarrier, [command, 0, 0]) }.is_ok()
}

/// Registers the process for cheap light fences and says whether that worked. Masked
/// ([`probe::mask`]), it does not.
///
/// To be called before the threads that use the fences exist: a thread that has not heard of it makes a full fence,
/// which pairs with either kind, but a [`heavy`] that has not heard of it would not pair with a light one that has.
///
/// The first call takes microseconds while the process has one thread. Later the kernel waits for a grace period: 10 ms and more,
/// and seconds on a machine under load.
///
/// # Kernel
/// `membarrier(2)`, `MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED`, from Linux 4.14.
pub fn register_membarrier() -> bool {
    if !REGISTERED.load(Acquire) && !probe::masked(Cap::Membarrier) && membarrier(REGISTER_PRIVATE_EXPEDITED) {
        REGISTERED.store(true, Release);
    }
    REGISTERED.load(Acquire)
}

/// Registers a forked child whose parent was registered. It inherits that, unless the parent registered in the very moment
/// of the fork: then the child may have a copy of what this module knows, and none of what the kernel knew.
///
/// To be called in the child only, while it has one thread.
pub(crate) fn renew_in_child() {
    if REGISTERED.load(Acquire) {
        let done = membarrier(REGISTER_PRIVATE_EXPEDITED);
        debug_assert!(done, "what worked in the parent works in the child");
    }
}

/// The expensive side: some microseconds where CPUs must be interrupted.
///
/// # Panics
/// If a registered process is refused the barrier, which the kernel does not do: to go on would be wrong.
///
/// # Kernel
/// `membarrier(2)`, `MEMBARRIER_CMD_PRIVATE_EXPEDITED`.
pub fn heavy() {
    fence(SeqCst);
    if REGISTERED.load(Acquire) {
        assert!(membarrier(PRIVATE_EXPEDITED), "membarrier refused to a registered process");
    }
}

/// The cheap side.
#[inline]
pub fn light() {
    if REGISTERED.load(Acquire) {
        compiler_fence(SeqCst);
    } else {
        fence(SeqCst);
    }
}
