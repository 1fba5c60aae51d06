//! Functions of the C library that this library stands in front of.
//!
//! Each does what it does anyway, by the next function of its name. Before that
//!
//! - calls that remove or restrict mappings have devices give up their translations. Where memory has moved the kernel
//!   tells of most such calls by itself; it never tells of `mprotect`, nor of memory that only devices look at;
//! - calls that let the kernel refer to pages after they have returned end the recycling of pages;
//! - registration with a userfaultfd of the program's own gets the memory back from ours, and `mremap` finds mappings
//!   whole that registration had split.
//!
//! Calls that the C library makes itself (`free` unmapping a block, say) do not come by here; the events of the kernel
//! cover them.
//!
//! Calls that map or unmap take turns (see [`crate::turn`]).
//!
//! - a descriptor that is a node's (see [`crate::nodes`]) answers as one.
//!
//! All of this is for processes with an engine. In others a call costs one load more than before.
//!
//! # Signals
//! `errno` is left as the next function left it, and everything here may be called in a signal handler that might have
//! called the original.
//
// UNSAFETY: the functions that it stands for take raw pointers and are called by C.

use std::{
    arch::naked_asm,
    ffi::{c_int, c_long, c_uint, c_ulong, c_void},
    os::fd::AsRawFd,
    ptr::with_exposed_provenance_mut,
};

use libc::{off_t, off64_t, size_t, ssize_t};
use uhmm::{
    addr::{PAGE_SIZE, PageRange, TASK_SIZE, VirtAddr},
    device::Cause,
    mm::Changing,
    still::still,
};
use uhmm_sys::{access, dispatch, pagemap::IOC_SCAN};

use crate::{
    engine, locked, next, nodes, pagemap,
    pieces::{self, Remap},
    turn::turn,
};

/// Calls the next function of a type, or answers as a kernel without it does.
macro_rules! call_next {
    ($next:expr, $failed:expr, fn($($arg:ident: $t:ty),*) -> $ret:ty) => {{
        let next: &$crate::next::Next = &$next;
        let address = next.address();
        if address.is_null() {
            set_errno(libc::ENOSYS);
            return $failed;
        }
        // SAFETY: the function of this name has this type, in the C library and in whatever stands in front of it.
        let function = unsafe { ::std::mem::transmute::<*mut ::std::ffi::c_void, unsafe extern "C" fn($($t),*) -> $ret>(address) };
        // SAFETY: the caller's arguments, passed on as they are.
        unsafe { function($($arg),*) }
    }};
}
pub(crate) use call_next;

pub(crate) fn errno() -> c_int {
    // SAFETY: takes nothing, returns where the calling thread's number is.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: the calling thread's own number.
    unsafe { place.read() }
}

pub(crate) fn set_errno(errno: c_int) {
    // SAFETY: takes nothing, returns where the calling thread's number is.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: the calling thread's own number.
    unsafe { place.write(errno) };
}

/// Does something of ours, which the program must not see in `errno`.
pub(crate) fn unseen(f: impl FnOnce()) {
    let before = errno();
    f();
    set_errno(before);
}

fn invalidate(start: *const c_void, len: size_t, cause: Cause) {
    unseen(|| engine::invalidate(VirtAddr::of(start), len as u64, cause));
}

/// As [`invalidate`], until what is returned is dropped.
fn changing(start: *const c_void, len: size_t, cause: Cause) -> Option<Changing> {
    let before = errno();
    let changing = engine::changing(VirtAddr::of(start), len as u64, cause);
    set_errno(before);
    changing
}

/// Whether an advice takes bytes or access away.
const fn drops_pages(advice: c_int) -> bool {
    const DONTNEED_LOCKED: c_int = 24;
    const GUARD_INSTALL: c_int = 102;
    matches!(advice, libc::MADV_DONTNEED | libc::MADV_FREE | libc::MADV_REMOVE | DONTNEED_LOCKED | GUARD_INSTALL)
}

/// # Safety
/// As for `munmap(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn munmap(start: *mut c_void, len: size_t) -> c_int {
    let _turn = turn();
    let _changing = changing(start, len, Cause::Unmap);
    call_next!(next::MUNMAP, -1, fn(start: *mut c_void, len: size_t) -> c_int)
}

/// # Safety
/// As for `mremap(2)`. The last argument is optional there: what stands in its place is passed on unread.
#[unsafe(no_mangle)]
unsafe extern "C" fn mremap(
    old: *mut c_void,
    old_len: size_t,
    new_len: size_t,
    flags: c_int,
    new: *mut c_void,
) -> *mut c_void {
    let call = || {
        call_next!(
            next::MREMAP,
            libc::MAP_FAILED,
            fn(old: *mut c_void, old_len: size_t, new_len: size_t, flags: c_int, new: *mut c_void) -> *mut c_void
        )
    };
    let _turn = turn();
    if !engine::is_running() {
        return call();
    }
    invalidate(old, old_len, Cause::Unmap);
    let fixed = flags & libc::MREMAP_FIXED != 0;
    if fixed {
        invalidate(new, new_len, Cause::Unmap);
    }
    let Ok(range) = PageRange::covering(VirtAddr::of(old), old_len as u64) else { return call() };
    let before = errno();
    if !fixed {
        let answer = call();
        // A range of more than one mapping is refused, and then nothing was done.
        if answer != libc::MAP_FAILED || errno() != libc::EFAULT {
            return answer;
        }
    }
    // With a fixed address the kernel unmaps what is there before it refuses. Nobody else gets those addresses meanwhile:
    // it is our turn.
    still(|| {
        unseen(|| {
            if !engine::is_one_mapping(range) {
                engine::unsplit(range);
            }
        });
        set_errno(before);
        if engine::is_one_mapping(range) {
            let answer = call();
            // It may have been split just now: a block that came home went back to native faults.
            if answer != libc::MAP_FAILED || errno() != libc::EFAULT {
                return answer;
            }
        }
        let new_len = (new_len as u64).next_multiple_of(PAGE_SIZE);
        match pieces::remap(Remap { old: range, new_len, flags, new: VirtAddr::of(new) }) {
            Ok(at) => {
                set_errno(before);
                with_exposed_provenance_mut(usize::try_from(at.get()).expect("64-bit"))
            }
            Err(errno) => {
                set_errno(errno.raw_os_error());
                libc::MAP_FAILED
            }
        }
    })
}

/// # Safety
/// As for `madvise(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn madvise(start: *mut c_void, len: size_t, advice: c_int) -> c_int {
    let call = || call_next!(next::MADVISE, -1, fn(start: *mut c_void, len: size_t, advice: c_int) -> c_int);
    if !drops_pages(advice) {
        return call();
    }
    let _turn = turn();
    if !engine::is_running() {
        return call();
    }
    invalidate(start, len, Cause::Unmap);
    // The engine hears of this before the pages go. What it set aside in between would come back.
    still(call)
}

/// Makes a call that changes what may be done to memory.
fn protecting(start: *const c_void, len: size_t, call: impl FnOnce() -> c_int) -> c_int {
    let changing = changing(start, len, Cause::Protect);
    let answer = call();
    // A device that did not wait may have come back in between, under the old protection.
    if !changing.is_some_and(|changing| changing.is_announced()) {
        invalidate(start, len, Cause::Protect);
    }
    answer
}

/// # Safety
/// As for `mprotect(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn mprotect(start: *mut c_void, len: size_t, prot: c_int) -> c_int {
    protecting(start, len, || call_next!(next::MPROTECT, -1, fn(start: *mut c_void, len: size_t, prot: c_int) -> c_int))
}

/// # Safety
/// As for `pkey_mprotect(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn pkey_mprotect(start: *mut c_void, len: size_t, prot: c_int, key: c_int) -> c_int {
    protecting(start, len, || {
        call_next!(next::PKEY_MPROTECT, -1, fn(start: *mut c_void, len: size_t, prot: c_int, key: c_int) -> c_int)
    })
}

/// # Safety
/// As for `mmap(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn mmap(
    start: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    let _turn = turn();
    let _changing = if flags & libc::MAP_FIXED != 0 { changing(start, len, Cause::Unmap) } else { None };
    let call = |fd: c_int| {
        call_next!(
            next::MMAP,
            libc::MAP_FAILED,
            fn(start: *mut c_void, len: size_t, prot: c_int, flags: c_int, fd: c_int, offset: off_t) -> *mut c_void
        )
    };
    let memory = if flags & libc::MAP_ANONYMOUS == 0 && nodes::any() {
        nodes::memory(fd, len as u64, offset.cast_unsigned())
    } else {
        None
    };
    match memory {
        None => call(fd),
        Some(Ok(memory)) => {
            let at = call(memory.as_raw_fd());
            if at != libc::MAP_FAILED
                && let Ok(range) = PageRange::covering(VirtAddr::of(at), len as u64)
            {
                // As a driver fills what it maps. Without access to it nothing need be there.
                unseen(|| {
                    let _ = access::populate_read(range);
                });
            }
            at
        }
        Some(Err(errno)) => {
            set_errno(errno.raw_os_error());
            libc::MAP_FAILED
        }
    }
}

/// # Safety
/// As for `mmap(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn mmap64(
    start: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off64_t,
) -> *mut c_void {
    // SAFETY: the same function on this architecture.
    unsafe { mmap(start, len, prot, flags, fd, offset) }
}

/// Gives up translations of the heap between `end` and the present break, which is about to fall to it.
fn shrink_heap(end: u64, now: u64) {
    if end < now {
        unseen(|| engine::invalidate(VirtAddr::new(end), now - end, Cause::Unmap));
    }
}

/// The present break, as the next `sbrk` has it.
fn present_break() -> Option<u64> {
    fn ask() -> *mut c_void {
        let nothing = 0;
        call_next!(next::SBRK, libc::MAP_FAILED, fn(nothing: isize) -> *mut c_void)
    }
    let now = ask();
    (now != libc::MAP_FAILED).then(|| VirtAddr::of(now).get())
}

/// # Safety
/// As for `brk(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn brk(end: *mut c_void) -> c_int {
    if engine::is_running()
        && let Some(now) = present_break()
    {
        shrink_heap(VirtAddr::of(end).get(), now);
    }
    call_next!(next::BRK, -1, fn(end: *mut c_void) -> c_int)
}

/// # Safety
/// As for `sbrk(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn sbrk(by: isize) -> *mut c_void {
    if by < 0
        && engine::is_running()
        && let Some(now) = present_break()
    {
        shrink_heap(now.saturating_add_signed(by as i64), now);
    }
    call_next!(next::SBRK, libc::MAP_FAILED, fn(by: isize) -> *mut c_void)
}

/// # Safety
/// As for `shmat(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn shmat(id: c_int, start: *const c_void, flags: c_int) -> *mut c_void {
    let _turn = turn();
    if flags & libc::SHM_REMAP != 0 {
        // The length is the segment's, which is not known here: all that lies above counts.
        let start = VirtAddr::of(start).get();
        shrink_heap(start, TASK_SIZE);
    }
    call_next!(next::SHMAT, libc::MAP_FAILED, fn(id: c_int, start: *const c_void, flags: c_int) -> *mut c_void)
}

/// # Safety
/// As for `mlockall(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn mlockall(flags: c_int) -> c_int {
    // The records of caught system calls are there before an engine is.
    if flags & libc::MCL_CURRENT == 0 || !(engine::is_running() || dispatch::is_on()) {
        return call_next!(next::MLOCKALL, -1, fn(flags: c_int) -> c_int);
    }
    // To lock the engine's memory would fill all that it has set aside. So what is there is locked mapping by mapping.
    if let Err(errno) = locked::check_limit() {
        set_errno(errno.raw_os_error());
        return -1;
    }
    let rest = flags & !libc::MCL_CURRENT;
    if rest & libc::MCL_FUTURE != 0 {
        let call = |flags: c_int| call_next!(next::MLOCKALL, -1, fn(flags: c_int) -> c_int);
        let answer = call(rest);
        if answer != 0 {
            return answer;
        }
    }
    match locked::lock_program(rest & libc::MCL_ONFAULT != 0) {
        Ok(()) => 0,
        Err(errno) => {
            set_errno(errno.raw_os_error());
            -1
        }
    }
}

/// `UFFDIO_REGISTER`, by which a userfaultfd takes a range.
const UFFDIO_REGISTER: c_ulong = 0xc020_aa00;

/// The range of a `struct uffdio_register`, which may lie anywhere.
fn registered_range(argument: *const c_void) -> Option<PageRange> {
    let mut words = [0u8; 16];
    let read = access::read(VirtAddr::of(argument), &mut words);
    let ([start, len], []) = words.as_chunks::<8>() else { return None };
    let (start, len) = (u64::from_ne_bytes(*start), u64::from_ne_bytes(*len));
    read.stop.is_none().then(|| PageRange::new(VirtAddr::new(start), len).ok())?
}

/// # Safety
/// As for `ioctl(2)`. The last argument is optional there: what stands in its place is passed on unread.
#[unsafe(no_mangle)]
unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    /// How often the engine may take the range again before the call gives up.
    const TRIES: u32 = 64;
    if nodes::any()
        // The kernel looks at as much of it.
        && let Ok(number) = u32::try_from(request & u64::from(u32::MAX))
        && let Some(answer) = nodes::ioctl(fd, number, VirtAddr::of(argument).get())
    {
        return match answer {
            Ok(()) => 0,
            Err(errno) => {
                set_errno(errno.raw_os_error());
                -1
            }
        };
    }
    if request == IOC_SCAN && pagemap::any() {
        let ask = |argument: *mut c_void| {
            call_next!(next::IOCTL, -1, fn(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int)
        };
        let before = errno();
        let answer = pagemap::scan(fd, argument, &ask);
        set_errno(before);
        match answer {
            None => {}
            Some(Ok(regions)) => return regions,
            Some(Err(errno)) => {
                set_errno(errno);
                return -1;
            }
        }
    }
    let taken = (request == UFFDIO_REGISTER && engine::is_running()).then(|| registered_range(argument)).flatten();
    if let Some(range) = taken {
        for _ in 1..TRIES {
            let before = errno();
            unseen(|| engine::release(range));
            let answer = call_next!(next::IOCTL, -1, fn(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int);
            if answer == 0 || errno() != libc::EBUSY {
                return answer;
            }
            set_errno(before);
        }
    }
    call_next!(next::IOCTL, -1, fn(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int)
}

/// # Safety
/// As for `vmsplice(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn vmsplice(fd: c_int, parts: *const libc::iovec, count: size_t, flags: c_uint) -> ssize_t {
    unseen(engine::lends_pages);
    call_next!(next::VMSPLICE, -1, fn(fd: c_int, parts: *const libc::iovec, count: size_t, flags: c_uint) -> ssize_t)
}

/// # Safety
/// As for `setsockopt(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn setsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *const c_void,
    len: libc::socklen_t,
) -> c_int {
    if level == libc::SOL_SOCKET && name == libc::SO_ZEROCOPY {
        unseen(engine::lends_pages);
    }
    call_next!(
        next::SETSOCKOPT,
        -1,
        fn(fd: c_int, level: c_int, name: c_int, value: *const c_void, len: libc::socklen_t) -> c_int
    )
}

/// Does for a system call what the function of its name does before it. Returns the next `syscall`.
extern "C" fn before_syscall(nr: c_long, a: u64, b: u64, c: u64, d: u64, e: u64) -> *mut c_void {
    let give_up = |start, len, cause| unseen(|| engine::invalidate(VirtAddr::new(start), len, cause));
    let flag = |word: u64, flag: c_int| word & u64::from(flag.cast_unsigned()) != 0;
    match nr {
        libc::SYS_munmap => give_up(a, b, Cause::Unmap),
        libc::SYS_mprotect | libc::SYS_pkey_mprotect => give_up(a, b, Cause::Protect),
        libc::SYS_madvise if i32::try_from(c).is_ok_and(drops_pages) => give_up(a, b, Cause::Unmap),
        libc::SYS_mmap if flag(d, libc::MAP_FIXED) => give_up(a, b, Cause::Unmap),
        libc::SYS_mremap => {
            give_up(a, b, Cause::Unmap);
            if flag(d, libc::MREMAP_FIXED) {
                give_up(e, c, Cause::Unmap);
            }
        }
        libc::SYS_vmsplice | libc::SYS_io_uring_setup | libc::SYS_io_setup => unseen(engine::lends_pages),
        _ => {}
    }
    next::SYSCALL.address()
}

/// Passes the call on in such a way that the next function finds registers and stack as the caller left them: a system
/// call that returns twice, on another stack or into a caller that the child has left, must not find a frame of ours.
///
/// # Safety
/// As for `syscall(2)`.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn syscall(_nr: c_long, _: u64, _: u64, _: u64, _: u64, _: u64, _: u64) -> c_long {
    naked_asm!(
        "push rdi",
        "push rsi",
        "push rdx",
        "push rcx",
        "push r8",
        "push r9",
        "sub rsp, 8",
        "call {before}",
        "add rsp, 8",
        "pop r9",
        "pop r8",
        "pop rcx",
        "pop rdx",
        "pop rsi",
        "pop rdi",
        "jmp rax",
        before = sym before_syscall,
    )
}
