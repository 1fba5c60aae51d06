//! Functions of the C library that open and close descriptors, as far as nodes come and go by them.
//!
//! Each does what it does anyway, by the next function of its name. Opening a node (see [`crate::nodes`]) is tried where that
//! has found nothing; whatever closes descriptors has the nodes looked through that nobody holds any more.
//!
//! And what the program reads of its page map is corrected (see [`crate::pagemap`]).
//!
//! In a program that does neither this costs some comparisons for each file that is opened, and a load for each read and close.
//
// UNSAFETY: the functions that it stands for take raw pointers and are called by C.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    os::fd::{BorrowedFd, IntoRawFd, RawFd},
};

use libc::{mode_t, off64_t, size_t, ssize_t};
use uhmm_sys::token::TokenId;

use crate::{
    interpose::{call_next, errno, set_errno, unseen},
    next, nodes, pagemap,
};

/// Which file a descriptor of the program's is, if it is one.
pub(crate) fn identity(fd: RawFd) -> Option<TokenId> {
    if fd < 0 {
        return None;
    }
    // SAFETY: for one system call, which answers EBADF where it is no descriptor.
    TokenId::of(unsafe { BorrowedFd::borrow_raw(fd) }).ok()
}

/// The answer of an `open`, which is ours where there was nothing and `path` names a node.
///
/// # Safety
/// `path` was just passed to a function that opens files, which found nothing there: it is a string.
unsafe fn or_node(answer: c_int, path: *const c_char, flags: c_int) -> c_int {
    if answer != -1 && !path.is_null() {
        // SAFETY: a string, by the caller's word.
        let path = unsafe { CStr::from_ptr(path) };
        unseen(|| pagemap::opened(path, answer));
    }
    if answer != -1 || errno() != libc::ENOENT || path.is_null() {
        return answer;
    }
    // SAFETY: a string, by the caller's word.
    let Some(node) = nodes::by_path(unsafe { CStr::from_ptr(path) }) else { return answer };
    match nodes::open(node, flags & libc::O_CLOEXEC != 0) {
        Ok(fd) => fd.into_raw_fd(),
        Err(errno) => {
            set_errno(errno.raw_os_error());
            -1
        }
    }
}

macro_rules! opens {
    ($($name:ident($($before:ident: $b:ty),*; path, flags $(, $after:ident: $a:ty)*) = $next:ident;)*) => {$(
        /// # Safety
        /// As for `open(2)`. The mode is optional there: what stands in its place is passed on unread.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($before: $b,)* path: *const c_char, flags: c_int $(, $after: $a)*) -> c_int {
            let answer = call_next!(next::$next, -1, fn($($before: $b,)* path: *const c_char, flags: c_int $(, $after: $a)*) -> c_int);
            // SAFETY: the kernel has read the path.
            unsafe { or_node(answer, path, flags) }
        }
    )*};
}

opens! {
    open(; path, flags, mode: mode_t) = OPEN;
    open64(; path, flags, mode: mode_t) = OPEN64;
    openat(dir: c_int; path, flags, mode: mode_t) = OPENAT;
    openat64(dir: c_int; path, flags, mode: mode_t) = OPENAT64;
    __open_2(; path, flags) = OPEN_2;
    __open64_2(; path, flags) = OPEN64_2;
    __openat_2(dir: c_int; path, flags) = OPENAT_2;
    __openat64_2(dir: c_int; path, flags) = OPENAT64_2;
}

/// # Safety
/// As for `close(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn close(fd: c_int) -> c_int {
    let is_node = nodes::any() && nodes::is_node(fd);
    let answer = call_next!(next::CLOSE, -1, fn(fd: c_int) -> c_int);
    if is_node {
        unseen(nodes::sweep);
    }
    answer
}

/// Behind a call that may have closed any descriptor.
fn some_may_be_closed() {
    if nodes::any() {
        unseen(nodes::sweep);
    }
}

/// # Safety
/// As for `dup2(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn dup2(old: c_int, new: c_int) -> c_int {
    let answer = call_next!(next::DUP2, -1, fn(old: c_int, new: c_int) -> c_int);
    some_may_be_closed();
    answer
}

/// # Safety
/// As for `dup3(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
    let answer = call_next!(next::DUP3, -1, fn(old: c_int, new: c_int, flags: c_int) -> c_int);
    some_may_be_closed();
    answer
}

/// # Safety
/// As for `close_range(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    let answer = call_next!(next::CLOSE_RANGE, -1, fn(first: c_uint, last: c_uint, flags: c_int) -> c_int);
    some_may_be_closed();
    answer
}

/// # Safety
/// As for `closefrom(3)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn closefrom(first: c_int) {
    call_next!(next::CLOSEFROM, Default::default(), fn(first: c_int) -> ());
    some_may_be_closed();
}

/// What was read of the program's page map is corrected.
fn corrected(fd: c_int, buffer: *mut c_void, answer: ssize_t, offset: impl FnOnce() -> off64_t) -> ssize_t {
    if answer > 0
        && pagemap::any()
        && let Ok(len) = usize::try_from(answer)
    {
        unseen(|| {
            if let Ok(offset) = u64::try_from(offset()) {
                // SAFETY: the kernel has just written there, for the caller.
                unsafe { pagemap::correct(fd, buffer, len, offset) };
            }
        });
    }
    answer
}

/// # Safety
/// As for `pread(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn pread(fd: c_int, buffer: *mut c_void, len: size_t, offset: off64_t) -> ssize_t {
    let answer =
        call_next!(next::PREAD, -1, fn(fd: c_int, buffer: *mut c_void, len: size_t, offset: off64_t) -> ssize_t);
    corrected(fd, buffer, answer, || offset)
}

/// # Safety
/// As for `pread(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn pread64(fd: c_int, buffer: *mut c_void, len: size_t, offset: off64_t) -> ssize_t {
    // SAFETY: the same function on this architecture.
    unsafe { pread(fd, buffer, len, offset) }
}

/// # Safety
/// As for `read(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn read(fd: c_int, buffer: *mut c_void, len: size_t) -> ssize_t {
    let answer = call_next!(next::READ, -1, fn(fd: c_int, buffer: *mut c_void, len: size_t) -> ssize_t);
    corrected(fd, buffer, answer, || {
        // SAFETY: changes nothing; the file is behind what was read.
        unsafe { libc::lseek64(fd, 0, libc::SEEK_CUR) - answer as off64_t }
    })
}
