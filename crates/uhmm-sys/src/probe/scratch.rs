//! A few pages of memory for a probe to play with.
// UNSAFETY: raw loads and stores on memory that may be taken away and put back.

use std::mem;

use crate::{
    Errno,
    addr::{PAGE_SIZE, PageRange, VirtAddr},
    raw,
};

/// Private anonymous pages that belong to one probe; unmapped on drop.
///
/// A probe declares its scratch before its userfaultfd: dropped in reverse order, the file is closed before the memory
/// is unmapped, and no unmap event is left waiting for a reader.
#[derive(Debug)]
pub(super) struct Scratch {
    range: PageRange,
}

impl Scratch {
    /// Maps `pages` holes.
    pub(super) fn new(pages: u64) -> Result<Self, Errno> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let start = raw::mmap(pages * PAGE_SIZE, prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None, 0)?;
        let range = PageRange::new(start, pages * PAGE_SIZE).expect("the kernel maps whole pages of user memory");
        Ok(Self { range })
    }

    /// Maps `pages` pages, each filled with `byte`.
    pub(super) fn filled(pages: u64, byte: u8) -> Result<Self, Errno> {
        let scratch = Self::new(pages)?;
        for n in 0..pages * PAGE_SIZE {
            scratch.store(n, byte);
        }
        Ok(scratch)
    }

    pub(super) fn range(&self) -> PageRange {
        self.range
    }

    pub(super) fn start(&self) -> VirtAddr {
        self.range.start()
    }

    /// Loads the byte at `offset`. Blocks where that page is missing and a userfaultfd has it.
    pub(super) fn load(&self, offset: u64) -> u8 {
        let at = self.at(offset);
        // SAFETY: `at` lies in this scratch, which is mapped for reading as long as `self` lives. The load is volatile, as
        // the byte changes without the compiler's knowledge.
        unsafe { at.read_volatile() }
    }

    /// Stores the byte at `offset`. Blocks as [`Scratch::load`] does.
    pub(super) fn store(&self, offset: u64, byte: u8) {
        let at = self.at(offset);
        // SAFETY: `at` lies in this scratch, mapped for writing as long as `self` lives; no reference leads into it.
        unsafe { at.write_volatile(byte) }
    }

    fn at(&self, offset: u64) -> *mut u8 {
        assert!(offset < self.range.bytes(), "outside the scratch");
        raw::ptr(self.start().add(offset))
    }

    /// `madvise(2)` on all of it.
    pub(super) fn advise(&self, advice: i32) -> Result<(), Errno> {
        // SAFETY: no reference leads into the scratch; see `load` and `store`.
        unsafe { raw::madvise(self.range, advice) }
    }

    /// Gives up the pages without unmapping them.
    pub(super) fn leak(self) -> PageRange {
        let range = self.range;
        mem::forget(self);
        range
    }

    /// `munmap(2)`, with the answer.
    pub(super) fn unmap(self) -> Result<(), Errno> {
        let range = self.leak();
        // SAFETY: the range was this scratch's, which nobody can name any more.
        unsafe { raw::munmap(range.start(), range.bytes()) }
    }

    /// `mremap(2)` of all of it over `target`, which takes its place.
    pub(super) fn move_over(self, target: Self) -> Result<Self, Errno> {
        assert_eq!(self.range.pages(), target.range.pages(), "both are as large");
        let flags = raw::arg(libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
        let (from, to) = (self.range, target.range);
        let args = [from.start().get(), from.bytes(), to.bytes(), flags, to.start().get()];
        // SAFETY: both ranges belong to scratches that this function owns, and no reference leads into either.
        unsafe { raw::syscall(libc::SYS_mremap, args) }?;
        self.leak();
        Ok(target)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: the range is this scratch's, and nobody can name it any more.
        let unmapped = unsafe { raw::munmap(self.range.start(), self.range.bytes()) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}
