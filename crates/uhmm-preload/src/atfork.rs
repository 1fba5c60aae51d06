//! Being first after a fork.
//!
//! In a forked child the handlers of `pthread_atfork` run in the order in which they were registered. An allocator's
//! touches its books there, some of which may be away: before the child's engine has taken the memory over it would find
//! zeros, and its writes would hide the bytes for good. Libraries register before this one's constructor runs, so the
//! function that they do it with is one of ours, and registers ours before the first of theirs.
//
// UNSAFETY: handlers come as pointers to C functions.

use std::{
    ffi::{c_int, c_void},
    sync::atomic::{AtomicBool, Ordering::AcqRel},
};

use uhmm::fork;

use crate::{interpose::call_next, interpose::set_errno, next};

type Handler = Option<unsafe extern "C" fn()>;

static FIRST: AtomicBool = AtomicBool::new(true);

/// Registers our handlers if they were not yet. `pthread_atfork` comes back to [`__register_atfork`], which passes it on.
pub(crate) fn register_ours() -> bool {
    // Not again from within: what registers once waits for itself then.
    !FIRST.swap(false, AcqRel) || fork::register()
}

/// Stands for what `pthread_atfork(3)` calls in the C library.
///
/// # Safety
/// As `pthread_atfork(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __register_atfork(
    prepare: Handler,
    parent: Handler,
    child: Handler,
    dso: *mut c_void,
) -> c_int {
    // Where that fails there is no memory for the program's own either; the engine will not start.
    let _ = register_ours();
    call_next!(
        next::REGISTER_ATFORK,
        libc::ENOMEM,
        fn(prepare: Handler, parent: Handler, child: Handler, dso: *mut c_void) -> c_int
    )
}
