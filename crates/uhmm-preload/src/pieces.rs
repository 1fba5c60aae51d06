//! `mremap` of what the program sees as one mapping and the kernel as several.
//!
//! Registering a part of a mapping splits it in two, and what was touched while it was split may never become one again.
//! The kernel moves and resizes single mappings only. So the parts are moved one by one, with the same result.
//!
//! # Kernel
//! Stands for `mremap(2)`. *Difference*: other threads can see the range in parts while it moves. What grows is private
//! anonymous memory; other mappings are not split by us.

use std::{
    ffi::{c_int, c_void},
    ptr::{null_mut, with_exposed_provenance_mut},
};

use uhmm::addr::{PageRange, VirtAddr};
use uhmm_sys::{
    Errno,
    maps::{Maps, Prot, Vma},
};

use crate::{
    interpose::{call_next, errno, set_errno},
    next,
};

/// How often a part is looked up again that was split in the meantime.
const TRIES: u32 = 64;

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Remap {
    /// What is to be moved or resized.
    pub(crate) old: PageRange,
    /// Its length afterwards, whole pages.
    pub(crate) new_len: u64,
    /// Flags of `mremap(2)`.
    pub(crate) flags: c_int,
    /// Where to, with `MREMAP_FIXED`.
    pub(crate) new: VirtAddr,
}

fn pointer(at: VirtAddr) -> *mut c_void {
    with_exposed_provenance_mut(index(at.get()))
}

fn index(n: u64) -> usize {
    usize::try_from(n).expect("64-bit")
}

fn answer(pointer: *mut c_void) -> Result<VirtAddr, Errno> {
    if pointer == libc::MAP_FAILED { Err(Errno::from_raw_os_error(errno())) } else { Ok(VirtAddr::of(pointer)) }
}

fn map(at: Option<VirtAddr>, len: u64, prot: c_int, flags: c_int) -> Result<VirtAddr, Errno> {
    fn call(at: *mut c_void, len: usize, prot: c_int, flags: c_int) -> *mut c_void {
        let (fd, offset) = (-1, 0);
        call_next!(
            next::MMAP,
            libc::MAP_FAILED,
            fn(at: *mut c_void, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: libc::off_t) -> *mut c_void
        )
    }
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    answer(call(at.map_or(null_mut(), pointer), index(len), prot, flags))
}

fn unmap(at: VirtAddr, len: u64) -> Result<(), Errno> {
    fn call(at: *mut c_void, len: usize) -> c_int {
        call_next!(next::MUNMAP, -1, fn(at: *mut c_void, len: usize) -> c_int)
    }
    if call(pointer(at), index(len)) == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(errno())) }
}

fn move_one(old: PageRange, flags: c_int, new: VirtAddr) -> Result<(), Errno> {
    fn call(old: *mut c_void, len: usize, flags: c_int, new: *mut c_void) -> *mut c_void {
        let new_len = len;
        call_next!(
            next::MREMAP,
            libc::MAP_FAILED,
            fn(old: *mut c_void, len: usize, new_len: usize, flags: c_int, new: *mut c_void) -> *mut c_void
        )
    }
    answer(call(pointer(old.start()), index(old.bytes()), flags, pointer(new))).map(drop)
}

/// The part of a mapping at `at` that lies in `range`.
fn part_at(maps: &Maps, at: VirtAddr, range: PageRange) -> Result<(Vma, PageRange), Errno> {
    let rest = PageRange::from_ends(at, range.end()).map_err(|_| Errno::INVAL)?;
    let vma = maps.find(at)?.filter(|vma| vma.range.contains(at)).ok_or(Errno::FAULT)?;
    let part = vma.range.intersection(rest).ok_or(Errno::FAULT)?;
    Ok((vma, part))
}

/// Moves or resizes, part by part.
///
/// # Errors
/// As `mremap(2)`. Where a part in the middle cannot be moved, those before it have been.
///
/// # Locking
/// It is the calling thread's turn to change mappings, and nothing leaves.
pub(crate) fn remap(asked: Remap) -> Result<VirtAddr, Errno> {
    let Remap { mut old, new_len, flags, new } = asked;
    let fixed = flags & libc::MREMAP_FIXED != 0;
    let maps = Maps::open()?;
    // Before anything changes: no holes.
    let mut last = None;
    let mut at = old.start();
    while at < old.end() {
        let (vma, part) = part_at(&maps, at, old)?;
        at = part.end();
        last = Some(vma);
    }
    let last = last.ok_or(Errno::INVAL)?;
    if fixed {
        let target = PageRange::new(new, new_len).map_err(|_| Errno::INVAL)?;
        if flags & libc::MREMAP_MAYMOVE == 0 || target.overlaps(old) {
            return Err(Errno::INVAL);
        }
    }
    if new_len < old.bytes() {
        unmap(old.start().add(new_len), old.bytes() - new_len)?;
        old = PageRange::new(old.start(), new_len).map_err(|_| Errno::INVAL)?;
    }
    let grows_by = new_len - old.bytes();
    let prot = [(Prot::READ, libc::PROT_READ), (Prot::WRITE, libc::PROT_WRITE), (Prot::EXEC, libc::PROT_EXEC)]
        .into_iter()
        .fold(0, |all, (prot, bits)| if last.prot.contains(prot) { all | bits } else { all });
    if grows_by != 0 && !last.is_private_anonymous() {
        return Err(Errno::FAULT);
    }
    if !fixed {
        if grows_by == 0 && flags & libc::MREMAP_DONTUNMAP == 0 {
            return Ok(old.start());
        }
        if grows_by != 0 && map(Some(old.end()), grows_by, prot, libc::MAP_FIXED_NOREPLACE).is_ok() {
            return Ok(old.start());
        }
        if flags & libc::MREMAP_MAYMOVE == 0 {
            return Err(Errno::NOMEM);
        }
    }
    let target = if fixed {
        unmap(new, new_len)?;
        new
    } else {
        map(None, new_len, libc::PROT_NONE, libc::MAP_NORESERVE)?
    };
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | flags & libc::MREMAP_DONTUNMAP;
    let mut at = old.start();
    let mut tries = 0;
    while at < old.end() {
        let (_, part) = part_at(&maps, at, old)?;
        match move_one(part, flags, target.add(at.get() - old.start().get())) {
            Ok(()) => at = part.end(),
            // Split once more since it was looked up: a block went back to native faults.
            Err(Errno::FAULT) if tries < TRIES => tries += 1,
            Err(errno) => return Err(errno),
        }
    }
    if grows_by != 0 {
        map(Some(target.add(old.bytes())), grows_by, prot, libc::MAP_FIXED)?;
    }
    Ok(target)
}
