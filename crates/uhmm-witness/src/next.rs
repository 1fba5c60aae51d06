//! The functions behind those that the witness stands in front of: those of the library under test, or the C library's.
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

/// Calls the next function of a type, or answers as a kernel without it does.
macro_rules! call_next {
    ($next:expr, $failed:expr, fn($($arg:ident: $t:ty),*) -> $ret:ty) => {{
        let next: &$crate::next::Next = &$next;
        let address = next.address();
        if address.is_null() {
            $crate::raw::set_errno(libc::ENOSYS);
            $failed
        } else {
            // SAFETY: the function of this name has this type, in the C library and in whatever stands in front of it.
            let function = unsafe { ::std::mem::transmute::<*mut ::std::ffi::c_void, unsafe extern "C" fn($($t),*) -> $ret>(address) };
            // SAFETY: the caller's arguments, passed on as they are.
            unsafe { function($($arg),*) }
        }
    }};
}
pub(crate) use call_next;

macro_rules! functions {
    ($($place:ident = $name:literal),* $(,)?) => {
        $(pub(crate) static $place: Next = Next::new($name);)*

        /// Looks up all that were not yet: a lookup is nothing that a signal handler may do.
        pub(crate) fn resolve_all() {
            for next in [$(&$place),*] {
                next.address();
            }
        }
    };
}

functions! {
    OPEN = c"open",
    OPEN64 = c"open64",
    OPENAT = c"openat",
    OPENAT64 = c"openat64",
    CLOSE = c"close",
    IOCTL = c"ioctl",
    MMAP = c"mmap",
    MUNMAP = c"munmap",
    MPROTECT = c"mprotect",
    MREMAP = c"mremap",
    MADVISE = c"madvise",
    FORK = c"fork",
    EXIT = c"_exit",
}
