// UNSAFETY: a preload library is entered from C: the constructor, the environment, and the calls that it interposes.

//! The witness: watches a library that serves the kernel's HMM test devices, while the kernel's unmodified tests run.
//!
//! ```text
//! LD_PRELOAD="libuhmm_witness.so LIBRARY_UNDER_TEST.so" ./hmm-tests
//! ```
//!
//! In the kernel the test driver reads physical pages of the device, so that a device without memory of its own cannot
//! pass. In user space one can: a library that leaves pages where they are passes 52 of the 58 tests (see
//! `docs/hmm-tests.md`). The witness stands in front of the library, looks before and after each call, and asks the kernel
//! where pages are. Nothing comes from the engine's own books: this crate does not use it.
//!
//! # What it checks, and by what evidence
//!
//! | when | what | evidence |
//! |--|--|--|
//! | `MIGRATE_TO_DEV`, nodes 0 and 1 | no page is present | `/proc/self/pagemap` |
//! | | the bytes that were there are in device memory, each page's in a page of its own | hashes of the resident pages of shared mappings whose name contains `hmm_dmirror` |
//! | `MIGRATE_TO_DEV`, nodes 2 and 3 | pages are present, in other physical pages than before (but for one in 64), with the same bytes | page map, with privileges; hashes |
//! | `EXCLUSIVE` | no page is present | page map |
//! | | its physical page is mapped elsewhere, or at least its bytes are | page map of private anonymous mappings, with privileges; else hashes |
//! | these three | the program was given these bytes | hashes |
//! | `MIGRATE_TO_SYS`, `RELEASE`, last `close` | pages are present again, with the bytes that they left with | page map, hashes |
//! | `READ` | what was away, and is so still, has the bytes that it left with | hashes |
//! | `READ`, `WRITE`, `MIGRATE_TO_DEV` | the device has translations now: a `READ` of the same range takes no fault and gives the same bytes | `READ` |
//! | `CHECK_EXCLUSIVE` | where something is exclusive, the CPU does not have all of it | page map |
//! | every call below | what each open node says of each page that is away is so | a `SNAPSHOT` between two equal looks at the page map |
//! | `munmap`, `mremap` | no node knows what was unmapped, or reads there | `SNAPSHOT` and `READ` of what has no mapping |
//! | `mprotect` | no node reads or writes against it | `READ` or `WRITE`, which must fail |
//! | `madvise(MADV_DONTNEED)` | no node has a page there | `SNAPSHOT` |
//!
//! "Every call" is `ioctl`, `mmap`, `munmap`, `mprotect`, `mremap`, `madvise`, `fork`, and `close` of a node. The last four rows are for
//! ranges that were given to a node in this process.
//!
//! It brings nothing in by looking: it reads the bytes of present pages only, expects zeros of anonymous pages that were
//! never touched, and keeps the hash of pages that are away. It gives nodes no command that has an effect on a device that
//! answers right: snapshots, reads and writes that must fail, and reads of what that very device has just used.
//!
//! # What happens then
//! A violation is a line on standard error, and the process dies by `SIGKILL`, whatever the test would have made of it: the tests fail
//! where a child does not end by itself, and do not all look at its status. With `UHMM_WITNESS_GO_ON=1` it goes on. With `UHMM_WITNESS_LOG=PATH` each process that checked something appends a line of
//! figures at its end: pages by kind of check, checks that could not be made, violations.
//!
//! # What it does not see
//! - Where bytes are that it cannot know: pages of files that were not present, swapped pages.
//! - Changes by raw system calls, and those that the C library makes itself (`free`); a device's `fd` by `dup`.
//! - Whether memory named as a device's is one that a device uses, or a copy that is kept for show. Stale bytes in it count.
//! - Without privileges: physical pages. That a kernel moved a page for its own reasons looks like a move to a coherent
//!   device.
//! - A program that writes to pages while it gives a command for them from another thread looks like a violation. Calls of
//!   several threads at once are passed on unwatched, all but the first.
//! - Of ranges beyond 32 MiB the rest, and more than 128 MiB of pages that are away.
//! - A child of `vfork` that calls one of these functions makes its parent's witness forget.
//!
//! # Parts
//! - [`hooks`][]: the functions that it stands in front of.
//! - [`state`][]: its memory, and who may use it.
//! - [`witness`][]: what it knows, and the check of every call.
//! - [`away`][], [`home`][], [`gone`][]: the checks of single calls.
//! - [`judge`][], [`book`][], [`hash`][]: rules, memory of pages, bytes; without a kernel.
//! - [`maps`][], [`nodes`][], [`raw`][], [`next`][], [`say`][]: the process's mappings, device nodes, system calls, the functions behind,
//!   messages.
// UNSAFETY: stands in front of functions of the C library, which are called with whatever the program passes.

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod away;
mod book;
mod gone;
mod hash;
mod home;
mod hooks;
mod judge;
mod maps;
mod next;
mod nodes;
mod raw;
mod say;
mod state;
mod witness;

use std::ffi::{CStr, c_char, c_int};

/// Runs before the program does, and after the C library is ready.
#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: unsafe extern "C" fn(c_int, *const *const c_char, *const *const c_char) = construct;

/// Runs when the program has returned.
#[used]
#[unsafe(link_section = ".fini_array")]
static DESTRUCTOR: extern "C" fn() = hooks::log;

/// # Safety
/// To be called by the dynamic linker, with the program's environment.
unsafe extern "C" fn construct(_argc: c_int, _argv: *const *const c_char, environment: *const *const c_char) {
    next::resolve_all();
    // SAFETY: the dynamic linker passes the environment, which nobody changes before the program runs.
    let log = unsafe { variable(environment, b"UHMM_WITNESS_LOG=") };
    // SAFETY: as above.
    let goes_on = unsafe { variable(environment, b"UHMM_WITNESS_GO_ON=") };
    witness::configure(log, goes_on == Some(b"1"));
}

/// The value of a variable of the environment.
///
/// # Safety
/// `environment` leads to pointers to strings, the last of which is null, or is null itself. The strings stay as they are while
/// the value is used.
unsafe fn variable<'a>(environment: *const *const c_char, prefix: &[u8]) -> Option<&'a [u8]> {
    let mut at = environment;
    if at.is_null() {
        return None;
    }
    loop {
        // SAFETY: by the caller's contract, and the null pointer was not reached yet.
        let entry = unsafe { at.read() };
        if entry.is_null() {
            return None;
        }
        // SAFETY: a string of the environment.
        let entry = unsafe { CStr::from_ptr(entry) }.to_bytes();
        if let Some(value) = entry.strip_prefix(prefix) {
            return Some(value);
        }
        // SAFETY: the null pointer was not reached yet, so there is another entry.
        at = unsafe { at.add(1) };
    }
}
