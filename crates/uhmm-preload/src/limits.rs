//! Limits of address space (`RLIMIT_AS`), as the program is to see them: without what the engine takes.
//!
//! See [`LimitShift`]. A limit that the kernel refuses, because the shifted one lies above the hard limit and the program
//! has no privilege to raise that, is tried as it is.
//
// UNSAFETY: limits come and go through pointers of the program.

use std::{ffi::c_int, sync::OnceLock};

use uhmm::session::LimitShift;

use crate::{
    interpose::{call_next, errno, set_errno},
    next,
};

static SHIFT: OnceLock<LimitShift> = OnceLock::new();

/// Shifts limits from now on.
pub(crate) fn shift_by(shift: LimitShift) {
    let _ = SHIFT.set(shift);
}

type Limit = libc::rlimit64;

/// What the kernel is told for `limit`, where `resource` is shifted.
fn shifted(resource: c_int, limit: &Limit) -> Option<Limit> {
    let shift = SHIFT.get()?;
    let is_address_space = u32::try_from(resource).is_ok_and(|r| r == libc::RLIMIT_AS);
    is_address_space.then(|| Limit { rlim_cur: shift.shift(limit.rlim_cur), rlim_max: shift.shift(limit.rlim_max) })
}

/// Changes what the kernel said of `resource` into what the program is told.
fn unshift(resource: c_int, limit: &mut Limit) {
    if let Some(shift) = SHIFT.get()
        && u32::try_from(resource).is_ok_and(|r| r == libc::RLIMIT_AS)
    {
        limit.rlim_cur = shift.unshift(limit.rlim_cur);
        limit.rlim_max = shift.unshift(limit.rlim_max);
    }
}

/// # Safety
/// As for `setrlimit(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn setrlimit(resource: c_int, limit: *const Limit) -> c_int {
    let call = |limit: *const Limit| call_next!(next::SETRLIMIT, -1, fn(resource: c_int, limit: *const Limit) -> c_int);
    // SAFETY: null, or the caller's to be read.
    let wanted = unsafe { limit.as_ref() };
    match wanted.and_then(|limit| shifted(resource, limit)) {
        None => call(limit),
        Some(shifted) => match call(&raw const shifted) {
            -1 if errno() == libc::EPERM => call(limit),
            answer => answer,
        },
    }
}

/// # Safety
/// As for `setrlimit(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn setrlimit64(resource: c_int, limit: *const Limit) -> c_int {
    // SAFETY: the same function on this architecture.
    unsafe { setrlimit(resource, limit) }
}

/// # Safety
/// As for `getrlimit(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrlimit(resource: c_int, limit: *mut Limit) -> c_int {
    let answer = call_next!(next::GETRLIMIT, -1, fn(resource: c_int, limit: *mut Limit) -> c_int);
    if answer == 0
        // SAFETY: the kernel has just written there.
        && let Some(limit) = unsafe { limit.as_mut() }
    {
        unshift(resource, limit);
    }
    answer
}

/// # Safety
/// As for `getrlimit(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrlimit64(resource: c_int, limit: *mut Limit) -> c_int {
    // SAFETY: the same function on this architecture.
    unsafe { getrlimit(resource, limit) }
}

/// Limits of other processes too: those of the tree are shifted alike, and shifted limits of others are unlikely enough.
///
/// # Safety
/// As for `prlimit(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn prlimit(pid: libc::pid_t, resource: c_int, new: *const Limit, old: *mut Limit) -> c_int {
    let call = |new: *const Limit| {
        call_next!(
            next::PRLIMIT,
            -1,
            fn(pid: libc::pid_t, resource: c_int, new: *const Limit, old: *mut Limit) -> c_int
        )
    };
    // SAFETY: null, or the caller's to be read.
    let wanted = unsafe { new.as_ref() };
    let answer = match wanted.and_then(|limit| shifted(resource, limit)) {
        None => call(new),
        Some(shifted) => match call(&raw const shifted) {
            -1 if errno() == libc::EPERM => call(new),
            answer => answer,
        },
    };
    if answer == 0
        // SAFETY: null, or the kernel has just written there.
        && let Some(old) = unsafe { old.as_mut() }
    {
        unshift(resource, old);
    }
    answer
}

/// # Safety
/// As for `prlimit(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn prlimit64(pid: libc::pid_t, resource: c_int, new: *const Limit, old: *mut Limit) -> c_int {
    // SAFETY: the same function on this architecture.
    unsafe { prlimit(pid, resource, new, old) }
}
