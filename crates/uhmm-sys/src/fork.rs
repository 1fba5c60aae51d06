//! Functions to call around `fork`.
//!
//! `pthread_atfork(3)` reaches every fork that libc makes, its internal ones (`daemon`, `forkpty`) included. It does
//! not reach `vfork`, `posix_spawn` and raw system calls: the first two share the memory, and the last raise an event
//! (see [`crate::uffd`]).

use crate::{Errno, arena, thread};

/// Calls `prepare` in the parent before each fork, then `parent` there and `child` in the child after it.
///
/// `prepare` runs after the handlers that were registered later, the other two before them.
///
/// # Errors
/// `ENOMEM`.
///
/// # Kernel
/// `pthread_atfork(3)`.
pub fn at_fork(prepare: extern "C" fn(), parent: extern "C" fn(), child: extern "C" fn()) -> Result<(), Errno> {
    // SAFETY: the functions are safe to call at any time, and live as long as the code does.
    let answer = unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    if answer == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(answer)) }
}

/// Makes this crate's own state right in a forked child, where only the calling thread exists: to be called first.
pub fn reset_in_child() {
    arena::reset_lock_after_fork();
    thread::forget_after_fork();
}
