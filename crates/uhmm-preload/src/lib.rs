// UNSAFETY: a preload library is entered from C: the constructor, the environment, and the calls that it interposes.

//! The preload library: puts a program that nobody prepared under uhmm.
//!
//! `uhmm run` names it in `LD_PRELOAD` and leaves its orders in the environment (see [`uhmm::session`]). Where nothing is to
//! move, the library reads the environment and does nothing more, until the program opens a node of the kernel's HMM test
//! device (see [`nodes`]): for that the library may also be preloaded by hand. Otherwise a hidden thread starts an engine a little
//! after the program began, so that programs which end at once do not pay for one:
//!
//! ```text
//!   program's threads                        hidden threads (unknown to libc, files of their own)
//!   -----------------                        ----------------------------------------------------
//!   constructor: orders, fork handlers
//!        |------------------------------->   starter: sleeps, makes devices, opens the Mm, and ends
//!      main()                                        handlers, movers, reclaim or stress
//!        |  mprotect, munmap ...  -- invalidate -->  mover
//!        |  fork ------ child: a starter of its own
//! ```
//!
//! - [`atfork`][]: being first after a fork.
//! - [`descriptors`][]: functions of the C library that open and close nodes.
//! - [`engine`][]: orders, and the engine of this process.
//! - [`interpose`][]: functions of the C library that this library stands in front of.
//! - [`limits`][]: limits of address space, as the program is to see them.
//! - [`locked`][]: all memory of the program locked, and not the engine's.
//! - [`nodes`][]: the nodes of the kernel's HMM test device.
//! - [`pagemap`][]: pages that are away, as a program sees them in its page map.
//! - [`pieces`][]: `mremap` of mappings that registration has split.
//! - [`say`][]: messages.
//! - [`turn`][]: changes of mappings, one after the other.
//!
//! # What it does not do, and why
//! - Static programs and those with privileges of their own (setuid) load no library: `uhmm run` refuses them.
//! - A process that a raw `clone` made, without libc's `fork`, has no engine: nothing of it moves. Its bytes are right where
//!   `uhmm doctor` says that such forks are followed, and where system calls are caught.
//! - Where the kernel's own faults are not served, system calls are caught before the program begins: see
//!   [`uhmm_sys::dispatch`] for what that does not see.
//! - A process with an engine has more threads than it knows of: `unshare(CLONE_NEWUSER)`, which wants a single one,
//!   answers `EINVAL`.
//! - When a program gives up privileges (`setuid`), the engine's threads keep theirs.
// UNSAFETY: stands in front of functions of the C library, which are called with whatever the program passes.

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod atfork;
mod descriptors;
mod engine;
mod interpose;
mod limits;
mod locked;
mod next;
mod nodes;
mod pagemap;
mod pieces;
mod say;
mod turn;

use std::ffi::{CStr, c_char, c_int};

/// The engine's memory must be neither the program's heap nor under its locks.
#[global_allocator]
static ALLOCATOR: uhmm_sys::arena::PrivateAlloc = uhmm_sys::arena::PrivateAlloc;

/// Runs before the program does, and after the C library is ready.
#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: unsafe extern "C" fn(c_int, *const *const c_char, *const *const c_char) = construct;

/// # Safety
/// To be called by the dynamic linker, with the program's environment.
unsafe extern "C" fn construct(_argc: c_int, _argv: *const *const c_char, environment: *const *const c_char) {
    // SAFETY: the dynamic linker passes the environment, which nobody changes before the program runs.
    let environment = unsafe { Environment::new(environment) };
    next::resolve_all();
    engine::start(&environment);
}

/// The environment as it was at the program's start. Reading it allocates nothing.
struct Environment {
    first: *const *const c_char,
}

impl Environment {
    /// # Safety
    /// `first` leads to pointers to strings, the last of which is null; or it is null itself. Nothing of it changes while
    /// this value is used.
    const unsafe fn new(first: *const *const c_char) -> Self {
        Self { first }
    }

    /// The value of a variable.
    fn get(&self, name: &str) -> Option<&[u8]> {
        let mut at = self.first;
        if at.is_null() {
            return None;
        }
        loop {
            // SAFETY: by the contract of `new`, and the null pointer was not reached yet.
            let entry = unsafe { at.read() };
            if entry.is_null() {
                return None;
            }
            // SAFETY: a string of the environment.
            let entry = unsafe { CStr::from_ptr(entry) }.to_bytes();
            if let Some(value) = entry.strip_prefix(name.as_bytes()).and_then(|rest| rest.strip_prefix(b"=")) {
                return Some(value);
            }
            // SAFETY: the null pointer was not reached yet, so there is another entry.
            at = unsafe { at.add(1) };
        }
    }
}
