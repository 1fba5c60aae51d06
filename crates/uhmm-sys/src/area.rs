//! Ordinary memory to measure with: what a program would map for itself, under a name that safe code can hold.
//!
//! `uhmm bench` times the kernel's bare mechanisms on memory that goes away and comes back. An [`Area`] is such memory:
//! private and anonymous, block aligned, of small pages or of huge ones.
//!
//! # Soundness
//! As for [`crate::mem`]: an area holds no Rust object and no reference ever leads into it. Its words are loaded and
//! stored atomically, its bytes are copied by `memmove`, and every mixture of old and new bytes is a valid `[u8]`. A touch
//! of a page that is missing waits for whoever registered the area with userfaultfd; where nobody serves it, it waits for
//! ever, which is no unsoundness.
// UNSAFETY: raw copies and atomics on memory that may be taken away and put back.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::{
    Errno,
    addr::{BLOCK_SIZE, PAGE_SIZE, PageRange, VirtAddr},
    mem::Mapping,
    raw,
};

/// How the kernel is to back an [`Area`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageSize {
    /// By pages of 4 KiB, whatever the system's setting is.
    Small,
    /// By huge pages of 2 MiB, where it has some; see [`crate::pagemap`] for how to find out.
    Huge,
}

/// Private anonymous memory of the process, readable and writable, unmapped on drop.
#[derive(Debug)]
pub struct Area {
    /// # Invariants
    /// Mapped, readable and writable while the value lives, and part of `mapped`, which the value owns.
    range: PageRange,
    mapped: PageRange,
}

impl Area {
    /// Maps `pages` holes, aligned to a block.
    ///
    /// # Errors
    /// `EINVAL`: no pages. `ENOMEM`. Where the kernel has no huge pages, the area has small ones.
    ///
    /// # Kernel
    /// `mmap(2)`, `madvise(2)` with `MADV_HUGEPAGE` or `MADV_NOHUGEPAGE`.
    pub fn new(pages: usize, size: PageSize) -> Result<Self, Errno> {
        let len = (pages as u64).checked_mul(PAGE_SIZE).ok_or(Errno::NOMEM)?;
        let padded = len.checked_next_multiple_of(BLOCK_SIZE).and_then(|len| len.checked_add(BLOCK_SIZE));
        let padded = padded.ok_or(Errno::NOMEM)?;
        if len == 0 {
            return Err(Errno::INVAL);
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let start = raw::mmap(padded, libc::PROT_READ | libc::PROT_WRITE, flags, None, 0)?;
        let first = VirtAddr::new(start.get().next_multiple_of(BLOCK_SIZE));
        // INVARIANT: just mapped; `len` bytes from the next block's start on lie within it, which is a block longer.
        let area = Self {
            range: PageRange::new(first, len).expect("the kernel maps user memory"),
            mapped: PageRange::new(start, padded).expect("the kernel maps user memory"),
        };
        let advice = if size == PageSize::Huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        // SAFETY: the advice changes no bytes. A kernel without huge pages refuses it, which is as good.
        let _ = unsafe { raw::madvise(area.mapped, advice) };
        Ok(area)
    }

    /// The addresses.
    #[must_use]
    pub const fn range(&self) -> PageRange {
        self.range
    }

    /// `count` pages from page `first` on.
    ///
    /// # Panics
    /// If they are no pages of the area.
    #[must_use]
    #[track_caller]
    pub fn part(&self, first: usize, count: usize) -> PageRange {
        let fits = count > 0 && first.checked_add(count).is_some_and(|end| end <= self.range.pages());
        assert!(fits, "pages {first}+{count} of {}: out of range", self.range.pages());
        PageRange::new(self.range.page(first), count as u64 * PAGE_SIZE).expect("a part of a range")
    }

    /// The first number of a page. Waits while the page is missing.
    ///
    /// # Panics
    /// If there is no such page.
    #[must_use]
    #[track_caller]
    pub fn load(&self, page: usize) -> u64 {
        self.word(page).load(Relaxed)
    }

    /// Stores the first number of a page. Waits while the page is missing.
    ///
    /// # Panics
    /// If there is no such page.
    #[track_caller]
    pub fn store(&self, page: usize, n: u64) {
        self.word(page).store(n, Relaxed);
    }

    #[track_caller]
    fn word(&self, page: usize) -> &AtomicU64 {
        let place = raw::ptr(self.part(page, 1).start()).cast::<u64>();
        // SAFETY: mapped and writable by the invariant, page aligned, and never borrowed but as an atomic number; the
        // borrow of `self` keeps it mapped.
        unsafe { AtomicU64::from_ptr(place) }
    }

    /// Fills every page with bytes that are not zero, and its first number with `stamp(page)`.
    pub fn fill(&self, stamp: impl Fn(usize) -> u64) {
        let bytes = raw::index(self.range.bytes());
        // SAFETY: mapped and writable by the invariant; no reference leads into it.
        unsafe { std::ptr::write_bytes(raw::ptr(self.range.start()), 0xa5, bytes) };
        (0..self.range.pages()).for_each(|page| self.store(page, stamp(page)));
    }

    /// Copies `count` pages from page `first` on to page `to` of another area (or of the same one).
    ///
    /// # Panics
    /// If either run is out of range.
    #[track_caller]
    pub fn copy(&self, first: usize, count: usize, dst: &Self, to: usize) {
        let (src, dst) = (self.part(first, count), dst.part(to, count));
        // SAFETY: both are mapped by the invariant and as long; they may overlap, which `copy` allows.
        unsafe { std::ptr::copy(raw::ptr(src.start()), raw::ptr(dst.start()), raw::index(src.bytes())) };
    }

    /// Copies `count` pages from page `first` on to byte `off` of a mapping.
    ///
    /// # Panics
    /// If either is out of range.
    #[track_caller]
    pub fn copy_to(&self, first: usize, count: usize, dst: &Mapping, off: u64) {
        let src = self.part(first, count);
        let dst = within(dst, off, src.bytes());
        // SAFETY: the area is mapped by its invariant, the mapping while it is borrowed, and both ranges are as long.
        unsafe { std::ptr::copy(raw::ptr(src.start()), raw::ptr(dst), raw::index(src.bytes())) };
    }

    /// Fills `count` pages from page `first` on with what is at byte `off` of a mapping.
    ///
    /// # Panics
    /// If either is out of range.
    #[track_caller]
    pub fn copy_from(&self, first: usize, count: usize, src: &Mapping, off: u64) {
        let dst = self.part(first, count);
        let src = within(src, off, dst.bytes());
        // SAFETY: as in `copy_to`.
        unsafe { std::ptr::copy(raw::ptr(src), raw::ptr(dst.start()), raw::index(dst.bytes())) };
    }
}

#[track_caller]
fn within(mapping: &Mapping, off: u64, len: u64) -> VirtAddr {
    let fits = off.checked_add(len).is_some_and(|end| end <= mapping.len());
    assert!(fits, "bytes {off:#x}+{len:#x} of {:#x}: out of range", mapping.len());
    mapping.range().start().add(off)
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the value owns the mapping, and borrows of it have ended.
        let unmapped = unsafe { raw::munmap(self.mapped.start(), self.mapped.bytes()) };
        debug_assert_eq!(unmapped, Ok(()), "munmap of an own mapping");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_out_and_come_back() {
        let (a, b) = (Area::new(8, PageSize::Small).unwrap(), Area::new(8, PageSize::Small).unwrap());
        let file = Mapping::memfd("area", 8 * PAGE_SIZE).unwrap();
        a.fill(|n| n as u64 + 7);
        a.copy_to(2, 3, &file, PAGE_SIZE);
        assert_eq!(file.load_u64(PAGE_SIZE), 9);
        assert_eq!(file.load_u64(PAGE_SIZE + 8), 0xa5a5_a5a5_a5a5_a5a5);
        b.copy_from(0, 3, &file, PAGE_SIZE);
        a.copy(7, 1, &b, 7);
        assert_eq!([0, 1, 2, 3, 7].map(|n| b.load(n)), [9, 10, 11, 0, 14]);
        assert!(a.range().start().get().is_multiple_of(BLOCK_SIZE));
        assert_eq!(Area::new(0, PageSize::Huge).unwrap_err(), Errno::INVAL);
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn a_page_past_the_end_is_refused() {
        let area = Area::new(2, PageSize::Small).unwrap();
        let _ = area.load(2);
    }
}
