//! Functions to call around `fork`.
//!
//! `pthread_atfork(3)` reaches every fork that libc makes, its internal ones (`daemon`, `forkpty`) included. It does
//! not reach `vfork`, `posix_spawn` and raw system calls: the first two share the memory, and the last raise an event
//! (see [`crate::uffd`]).

use crate::{Errno, access, addr::VirtAddr, arena, fence, thread};

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
    fence::renew_in_child();
}

/// Reads of each open `FILE` what glibc reads and writes of it in a forked child before it calls the handlers there,
/// so that those pages are in RAM when the process forks.
///
/// Does nothing with another libc. The list may change meanwhile: what is read of it is not trusted.
pub fn touch_stdio() {
    /// Offsets in glibc's `struct _IO_FILE`, which is part of its binary interface.
    const CHAIN: u64 = 0x68;
    const LOCK: u64 = 0x88;
    // SAFETY: looks a name up.
    let list = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"_IO_list_all".as_ptr()) };
    if list.is_null() {
        return;
    }
    let word = |addr: u64| {
        let mut bytes = [0; 8];
        let read = access::read(VirtAddr::new(addr), &mut bytes);
        read.is_all().then(|| u64::from_ne_bytes(bytes)).filter(|&word| word != 0)
    };
    let mut file = word(VirtAddr::of(list).get());
    for _ in 0..4096 {
        let Some(at) = file else { return };
        let _ = word(at);
        let _ = word(at + LOCK).and_then(word);
        file = word(at + CHAIN);
    }
}

/// The calling thread's `errno`.
#[must_use]
pub fn errno() -> i32 {
    // SAFETY: libc gives each thread a place of its own, valid while the thread lives.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above; nobody else writes it.
    unsafe { place.read() }
}

/// Sets the calling thread's `errno`.
pub fn set_errno(value: i32) {
    // SAFETY: libc gives each thread a place of its own, valid while the thread lives.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above; nobody else writes it.
    unsafe { place.write(value) };
}

/// Writes `message` to the standard error output and ends the process by `SIGABRT`, without touching anything that a
/// half-made child might not have.
pub fn die(message: &str) -> ! {
    // SAFETY: the pointer and length are those of a string.
    let _ = unsafe { libc::write(2, message.as_ptr().cast(), message.len()) };
    std::process::abort()
}
