//! Address space set aside early, for shared mappings made later.
//!
//! A program may use addresses that it has just unmapped again without asking the kernel, or unmap a range in which it
//! knows of holes. A mapping of the engine's that the kernel placed in such a hole would be destroyed. So a process that
//! was not made for the engine sets its addresses aside before the program begins ([`reserve`]), and the mappings of
//! device memory and control data are made in there. Without a reservation, or when it is used up, the kernel chooses.
//!
//! ```text
//! start                 next                                  end
//!  | mapping | mapping | reserved, no access                  |
//! ```
//!
//! # Locking
//! None: `next` is moved atomically.
// UNSAFETY: maps at addresses of its own choice.

use std::{
    os::fd::BorrowedFd,
    sync::atomic::{
        AtomicU64,
        Ordering::{AcqRel, Acquire, Release},
    },
};

use crate::{
    Errno,
    addr::{BLOCK_SIZE, PAGE_SIZE, PageRange, VirtAddr},
    raw,
};

/// # Invariants
/// With `end != 0`: `start..end` belongs to this module for ever; `start <= next <= end`, and nobody has been given
/// anything at or above `next`.
struct Space {
    start: AtomicU64,
    next: AtomicU64,
    /// Zero until there is a reservation. Stored last.
    end: AtomicU64,
}

static SPACE: Space = Space { start: AtomicU64::new(0), next: AtomicU64::new(0), end: AtomicU64::new(0) };

const RESERVED: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Sets `bytes` of address space aside, rounded up to 2 MiB. To be called once, while the process has one thread; later
/// calls do nothing.
///
/// # Errors
/// `ENOMEM`: there is not as much.
///
/// # Kernel
/// `mmap(2)` with `PROT_NONE`: costs address space only.
pub fn reserve(bytes: u64) -> Result<(), Errno> {
    if range().is_some() {
        return Ok(());
    }
    let bytes = bytes.checked_next_multiple_of(BLOCK_SIZE).ok_or(Errno::NOMEM)?;
    let padded = bytes.checked_add(BLOCK_SIZE).ok_or(Errno::NOMEM)?;
    let mapped = raw::mmap(padded, libc::PROT_NONE, RESERVED, None, 0)?;
    // The ends stay: they are less than a block.
    let start = mapped.get().next_multiple_of(BLOCK_SIZE);
    SPACE.start.store(start, Release);
    SPACE.next.store(start, Release);
    // INVARIANT: all of it was just mapped, and nothing is given out.
    SPACE.end.store(start + bytes, Release);
    Ok(())
}

/// The reservation, if there is one.
#[must_use]
pub fn range() -> Option<PageRange> {
    let end = SPACE.end.load(Acquire);
    if end == 0 {
        return None;
    }
    PageRange::from_ends(VirtAddr::new(SPACE.start.load(Acquire)), VirtAddr::new(end)).ok()
}

/// In a forked child that has no use for what its parent mapped: all of the reservation is free again. What is there stays
/// until something else is put in its place.
///
/// To be called in the child only, while it has one thread.
pub fn reuse_in_child() {
    SPACE.next.store(SPACE.start.load(Acquire), Release);
}

/// Takes `len` bytes, whole pages, aligned to 2 MiB where they are as many.
fn take(len: u64) -> Option<VirtAddr> {
    let end = range()?.end().get();
    let align = if len < BLOCK_SIZE { PAGE_SIZE } else { BLOCK_SIZE };
    let mut taken = 0;
    let advance = |next: u64| {
        taken = next.checked_next_multiple_of(align)?;
        taken.checked_add(len).filter(|&after| after <= end)
    };
    SPACE.next.fetch_update(AcqRel, Acquire, advance).ok()?;
    Some(VirtAddr::new(taken))
}

/// Maps `len` bytes (whole pages, not 0) readable and writable: in the reservation where there is room.
///
/// Also in a program that locks all memory to come, nothing is filled before it is touched.
///
/// # Errors
/// As `mmap(2)`.
pub(crate) fn map_shared(len: u64, fd: Option<BorrowedFd<'_>>, offset: u64) -> Result<VirtAddr, Errno> {
    let anonymous = if fd.is_none() { libc::MAP_ANONYMOUS | libc::MAP_NORESERVE } else { 0 };
    let flags = libc::MAP_SHARED | anonymous;
    // Without access first: a mapping with access would be filled at once where everything is locked.
    let addr = match take(len) {
        None => raw::mmap(len, libc::PROT_NONE, flags, fd, offset)?,
        Some(at) => {
            let fd = fd.map_or(raw::arg(-1), raw::fd_arg);
            let args = [at.get(), len, raw::arg(libc::PROT_NONE), raw::arg(flags | libc::MAP_FIXED), fd, offset];
            // SAFETY: replaces a part of the reservation that nobody else has been given.
            unsafe { raw::syscall(libc::SYS_mmap, args) }.map(VirtAddr::new)?
        }
    };
    let range = PageRange::new(addr, len).map_err(|_| Errno::INVAL)?;
    // SAFETY: changes no bytes. Where it fails, too much is filled.
    let _ = unsafe { raw::syscall(libc::SYS_munlock, [addr.get(), len]) };
    // SAFETY: just mapped, so no reference leads into it.
    unsafe { raw::mprotect(range, libc::PROT_READ | libc::PROT_WRITE) }?;
    Ok(addr)
}

/// Ends a mapping that [`map_shared`] made. Its addresses stay set aside, if they were.
///
/// # Safety
/// Nobody uses it any more.
pub(crate) unsafe fn unmap(addr: VirtAddr, len: u64) -> Result<(), Errno> {
    if range().is_some_and(|space| space.contains(addr)) {
        let flags = raw::arg(RESERVED | libc::MAP_FIXED);
        // SAFETY: replaces a mapping that nobody uses, by the caller's word, in the reservation.
        return unsafe {
            raw::syscall(libc::SYS_mmap, [addr.get(), len, raw::arg(libc::PROT_NONE), flags, raw::arg(-1), 0])
        }
        .map(drop);
    }
    // SAFETY: the caller's obligation is the same.
    unsafe { raw::munmap(addr, len) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::{Mapping, shared_slice};

    #[test]
    fn mappings_are_made_where_addresses_were_set_aside() {
        reserve(8 << 20).unwrap();
        let space = range().unwrap();
        assert_eq!(space.bytes(), 8 << 20);
        // Other tests of this process may have a part.
        let first = Mapping::memfd("space", 2 << 20).unwrap();
        assert!(space.contains_range(first.range()));
        assert!(first.range().start().get().is_multiple_of(BLOCK_SIZE));
        first.write(4096, b"here");
        let words = shared_slice::<AtomicU64>(512).unwrap();
        assert!(space.contains(VirtAddr::of(words.as_ptr())));
        words[511].store(7, Release);
        assert_eq!(words[511].load(Acquire), 7);

        // What is dropped stays set aside: the kernel gives it to nobody.
        let old = first.range();
        drop(first);
        assert_eq!(crate::access::read(old.start(), &mut [0]).stop, Some(Errno::FAULT));
        let elsewhere = raw::mmap(old.bytes(), libc::PROT_NONE, RESERVED, None, 0).unwrap();
        assert!(!space.contains(elsewhere));

        // Where there is no more room the kernel chooses.
        let large = Mapping::memfd("space", 16 << 20).unwrap();
        assert!(!space.overlaps(large.range()));
        large.write(0, b"there");
    }
}
