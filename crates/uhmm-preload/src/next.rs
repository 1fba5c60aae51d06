//! The functions behind those that this library stands in front of: usually the C library's, or those of another
//! preloaded library.
//!
//! All are looked up in the constructor, because a lookup is nothing that a signal handler may do. A call that comes
//! earlier, from another library's constructor, looks its own up.
//
// UNSAFETY: functions are found by name, as addresses.

use std::{
    ffi::{CStr, c_void},
    sync::atomic::{
        AtomicPtr,
        Ordering::{Acquire, Release},
    },
};

/// One function.
pub(crate) struct Next {
    name: &'static CStr,
    found: AtomicPtr<c_void>,
}

impl Next {
    const fn new(name: &'static CStr) -> Self {
        Self { name, found: AtomicPtr::new(std::ptr::null_mut()) }
    }

    /// Its address; null where there is no such function.
    pub(crate) fn address(&self) -> *mut c_void {
        let found = self.found.load(Acquire);
        if found.is_null() { self.look_up() } else { found }
    }

    #[cold]
    fn look_up(&self) -> *mut c_void {
        // SAFETY: the name is a string.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        self.found.store(found, Release);
        found
    }
}

macro_rules! functions {
    ($($place:ident = $name:literal),* $(,)?) => {
        $(pub(crate) static $place: Next = Next::new($name);)*

        /// Looks up all that were not yet.
        pub(crate) fn resolve_all() {
            for next in [$(&$place),*] {
                next.address();
            }
        }
    };
}

functions! {
    MUNMAP = c"munmap",
    MREMAP = c"mremap",
    MADVISE = c"madvise",
    MPROTECT = c"mprotect",
    PKEY_MPROTECT = c"pkey_mprotect",
    MMAP = c"mmap",
    BRK = c"brk",
    SBRK = c"sbrk",
    SHMAT = c"shmat",
    MLOCKALL = c"mlockall",
    IOCTL = c"ioctl",
    VMSPLICE = c"vmsplice",
    SETSOCKOPT = c"setsockopt",
    SYSCALL = c"syscall",
    SETRLIMIT = c"setrlimit",
    GETRLIMIT = c"getrlimit",
    PRLIMIT = c"prlimit",
    REGISTER_ATFORK = c"__register_atfork",
    OPEN = c"open",
    OPEN64 = c"open64",
    OPENAT = c"openat",
    OPENAT64 = c"openat64",
    OPEN_2 = c"__open_2",
    OPEN64_2 = c"__open64_2",
    OPENAT_2 = c"__openat_2",
    OPENAT64_2 = c"__openat64_2",
    CLOSE = c"close",
    READ = c"read",
    PREAD = c"pread",
    DUP2 = c"dup2",
    DUP3 = c"dup3",
    CLOSE_RANGE = c"close_range",
    CLOSEFROM = c"closefrom",
}
