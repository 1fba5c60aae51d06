//! What the page tables say of each page.
//!
//! # Kernel
//! `PAGEMAP_SCAN` (Linux 6.7, `Documentation/admin-guide/mm/pagemap.rst`) where there is one; otherwise the words of
//! `/proc/self/pagemap`, which know neither the zero page nor huge pages. No function here allocates.
// UNSAFETY: an ioctl that fills an array.

use std::os::fd::{AsFd, OwnedFd};

use bitflags::bitflags;

use crate::{
    Errno,
    addr::{BLOCK_SIZE, PAGE_SHIFT, PAGE_SIZE, PageRange, VirtAddr},
    probe::{self, Cap},
    raw,
};

bitflags! {
    /// State of a page. Empty: there is nothing (a hole in the page table, or no mapping at all).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Page: u16 {
        /// Mapped.
        const PRESENT = 1 << 0;
        /// Not mapped, but not a hole: swapped out, or a marker of write protection or poison.
        const SWAPPED = 1 << 1;
        /// A page of a file or of shared memory.
        const FILE = 1 << 2;
        /// The zero page. Known to [`Pagemap::has_scan`] kernels only.
        const ZERO = 1 << 3;
        /// Mapped as part of a huge page. Known to [`Pagemap::has_scan`] kernels only.
        const HUGE = 1 << 4;
        /// Write-protected by userfaultfd, or a marker of that.
        const UFFD_WP = 1 << 5;
        /// Mapped by this page table alone, as the map count says; wrong for a while after a fork. Known to
        /// [`Pagemap::read_words`] only.
        const EXCLUSIVE = 1 << 6;
        /// Anonymous, and this process's alone by the kernel's own mark: where the mapping may be written, the page is
        /// without a fault. Known to [`Pagemap::mark_exclusive`] only.
        const ANON_EXCLUSIVE = 1 << 7;
    }
}

impl Page {
    /// Whether there is a page, in RAM or swapped out, or a marker that stands for one: no hole.
    #[must_use]
    pub const fn is_there(self) -> bool {
        self.intersects(Self::PRESENT.union(Self::SWAPPED))
    }
}

/// `struct pm_scan_arg`: what `PAGEMAP_SCAN` is given, and tells.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScanArg {
    /// Bytes of this structure.
    pub size: u64,
    /// Whether what is found is write-protected, and where.
    pub flags: u64,
    /// First address.
    pub start: u64,
    /// First address behind.
    pub end: u64,
    /// Told: how far the kernel has looked.
    pub walk_end: u64,
    /// Where the regions go.
    pub vec: u64,
    /// How many there is room for.
    pub vec_len: u64,
    /// How many pages are looked for at most; 0 for all.
    pub max_pages: u64,
    /// Categories that are turned round before they are compared.
    pub category_inverted: u64,
    /// Categories all of which a page must have.
    pub category_mask: u64,
    /// Categories one of which it must have, if there are any.
    pub category_anyof_mask: u64,
    /// Categories that are told of.
    pub return_mask: u64,
}

/// `struct page_region`: neighbours of the same categories.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// First address behind.
    pub end: u64,
    /// What its pages are.
    pub categories: u64,
}

/// `PAGEMAP_SCAN`.
pub const IOC_SCAN: u64 = raw::iowr::<ScanArg>(b'f', 16);
const IS_WRITTEN: u64 = 1 << 1;
const IS_FILE: u64 = 1 << 2;
/// `PAGE_IS_PRESENT`.
pub const IS_PRESENT: u64 = 1 << 3;
/// `PAGE_IS_SWAPPED`.
pub const IS_SWAPPED: u64 = 1 << 4;
const IS_PFNZERO: u64 = 1 << 5;
const IS_HUGE: u64 = 1 << 6;

/// Regions asked for at a time; they live on the stack of a fault handler.
const REGIONS: usize = 64;
/// Words read at a time, likewise.
const WORDS: usize = 256;

const WORD_PRESENT: u64 = 1 << 63;
const WORD_SWAPPED: u64 = 1 << 62;
const WORD_FILE: u64 = 1 << 61;
const WORD_UFFD_WP: u64 = 1 << 57;
const WORD_EXCLUSIVE: u64 = 1 << 56;
const WORD_PFN: u64 = (1 << 55) - 1;
/// `KPF_ANON` of `/proc/kpageflags`.
const FLAG_ANON: u64 = 1 << 12;
/// `KPF_COMPOUND_TAIL`: the other flags may be those of the compound page's first.
const FLAG_TAIL: u64 = 1 << 16;
/// The bit of `/proc/kpageflags` that is `PG_anon_exclusive` of an anonymous page (`PG_mappedtodisk`, `PG_owner_2`).
const FLAG_EXCLUSIVE: u64 = 1 << 34;

/// The page map of the process that opened it. A forked child must open its own.
#[derive(Debug)]
pub struct Pagemap {
    fd: OwnedFd,
    scan: bool,
    /// `/proc/kpageflags`, for whoever may read it.
    flags: Option<OwnedFd>,
}

impl Pagemap {
    /// Opens the page map of this process. A masked scan ([`probe::mask`]) counts as missing.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`: no `/proc`, or not readable. `EMFILE`, `ENFILE`.
    pub fn open() -> Result<Self, Errno> {
        let fd = raw::open(c"/proc/self/pagemap", libc::O_RDONLY)?;
        let flags = raw::open(c"/proc/kpageflags", libc::O_RDONLY).ok();
        let mut map = Self { fd, scan: true, flags };
        // One page that need not exist: only whether the kernel knows the request matters.
        let page = PageRange::page_of(VirtAddr::new(PAGE_SIZE));
        map.scan = !probe::masked(Cap::PagemapScan) && map.scan_regions(page, &mut [Page::empty()]).is_ok();
        Ok(map)
    }

    /// Whether `PAGEMAP_SCAN` is there.
    #[must_use]
    pub const fn has_scan(&self) -> bool {
        self.scan
    }

    /// Tells the state of each page of `range`; pages may change while it looks.
    ///
    /// # Errors
    /// `EINTR` where the thread is being killed, `ENOMEM`.
    ///
    /// # Panics
    /// If `out` is not one entry a page.
    pub fn scan(&self, range: PageRange, out: &mut [Page]) -> Result<(), Errno> {
        if self.scan { self.scan_regions(range, out) } else { self.read_words(range, out) }
    }

    fn scan_regions(&self, range: PageRange, out: &mut [Page]) -> Result<(), Errno> {
        assert!(out.len() == range.pages(), "one entry a page");
        out.fill(Page::empty());
        let mut start = range.start();
        while let Ok(rest) = PageRange::from_ends(start, range.end()) {
            let mut regions = [Region::default(); REGIONS];
            let (filled, walk_end) = self.some_regions(rest, &mut regions, 0)?;
            for region in &regions[..filled] {
                let first = region.start.saturating_sub(range.start().get()) >> PAGE_SHIFT;
                let end = region.end.min(range.end().get()).saturating_sub(range.start().get()) >> PAGE_SHIFT;
                out[raw::index(first)..raw::index(end)].fill(from_categories(region.categories));
            }
            if walk_end <= start {
                // The kernel made no progress without saying why. Never seen; a loop would never end.
                return Err(Errno::IO);
            }
            start = walk_end;
        }
        Ok(())
    }

    /// The first regions of `range` with pages, `max_pages` of these at most (0: any number). Returns how many there are, and
    /// how far the kernel has looked.
    fn some_regions(
        &self,
        range: PageRange,
        regions: &mut [Region],
        max_pages: u64,
    ) -> Result<(usize, VirtAddr), Errno> {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start: range.start().get(),
            end: range.end().get(),
            vec: raw::ptr_arg(regions.as_mut_ptr()),
            vec_len: regions.len() as u64,
            max_pages,
            // Holes are not reported.
            category_anyof_mask: IS_PRESENT | IS_SWAPPED,
            return_mask: IS_WRITTEN | IS_FILE | IS_PRESENT | IS_SWAPPED | IS_PFNZERO | IS_HUGE,
            ..ScanArg::default()
        };
        // SAFETY: the structure of this ioctl; `vec` is an array of `vec_len` plain structures.
        let filled = unsafe { raw::ioctl(self.fd.as_fd(), IOC_SCAN, &mut arg) }?;
        Ok((raw::index(filled), VirtAddr::new(arg.walk_end)))
    }

    /// The first page of `range` that is there, or its start where only looking at each page would tell. `None`: nothing is.
    ///
    /// # Errors
    /// As [`Pagemap::scan`].
    pub fn first(&self, range: PageRange) -> Result<Option<VirtAddr>, Errno> {
        if !self.scan {
            return Ok(Some(range.start()));
        }
        let mut region = [Region::default()];
        let (filled, _) = self.some_regions(range, &mut region, 1)?;
        Ok((filled > 0).then(|| VirtAddr::new(region[0].start)))
    }

    /// As [`Pagemap::scan`], from the words of the page map: no `ZERO` and `HUGE`, but `EXCLUSIVE`.
    ///
    /// # Errors
    /// Whatever `pread(2)` answers.
    ///
    /// # Panics
    /// If `out` is not one entry a page.
    pub fn read_words(&self, range: PageRange, out: &mut [Page]) -> Result<(), Errno> {
        assert!(out.len() == range.pages(), "one entry a page");
        let first = range.start().get() >> PAGE_SHIFT;
        let mut words = [0; WORDS];
        for (n, part) in out.chunks_mut(WORDS).enumerate() {
            read_words(&self.fd, first + (n * WORDS) as u64, &mut words[..part.len()])?;
            for (page, word) in part.iter_mut().zip(words) {
                *page = from_word(word);
            }
        }
        Ok(())
    }

    /// Adds [`Page::ANON_EXCLUSIVE`] to the pages of `range`, in one mapping of `page_size`, of which `pages` says that
    /// they are mapped. Without the privilege to know physical pages nothing is added, nor to parts of a huge page that are
    /// mapped by themselves.
    ///
    /// # Errors
    /// Whatever `pread(2)` answers.
    ///
    /// # Panics
    /// If `pages` is not one entry a page.
    pub fn mark_exclusive(&self, range: PageRange, page_size: u64, pages: &mut [Page]) -> Result<(), Errno> {
        assert!(pages.len() == range.pages(), "one entry a page");
        let Some(flags) = &self.flags else { return Ok(()) };
        // Of a huge page that is mapped as one, the first page has the mark.
        let unit = page_size.max(BLOCK_SIZE) >> PAGE_SHIFT;
        let first = range.start().get() >> PAGE_SHIFT;
        let mut words = [0; WORDS];
        for (n, part) in pages.chunks_mut(WORDS).enumerate() {
            read_words(&self.fd, first + (n * WORDS) as u64, &mut words[..part.len()])?;
            let mut at = 0;
            while at < part.len() {
                let pfn = words[at] & WORD_PFN;
                if words[at] & WORD_PRESENT == 0 || pfn == 0 {
                    at += 1;
                    continue;
                }
                let huge = part[at].contains(Page::HUGE);
                let alike = |&(n, next): &(usize, &u64)| {
                    next & WORD_PRESENT != 0 && part[at + n].contains(Page::HUGE) == huge && {
                        let expected = pfn + n as u64;
                        next & WORD_PFN == expected && (!huge || expected / unit == pfn / unit)
                    }
                };
                let run = words[at..part.len()].iter().enumerate().take_while(alike).count();
                let mut of_pages = [0; WORDS];
                if huge {
                    let mut of_unit = [0];
                    read_words(flags, pfn / unit * unit, &mut of_unit)?;
                    of_pages = [of_unit[0]; WORDS];
                } else {
                    read_words(flags, pfn, &mut of_pages[..run])?;
                }
                for (page, word) in part[at..at + run].iter_mut().zip(of_pages) {
                    let exclusive = word & (FLAG_ANON | FLAG_TAIL | FLAG_EXCLUSIVE) == FLAG_ANON | FLAG_EXCLUSIVE;
                    page.set(Page::ANON_EXCLUSIVE, exclusive);
                }
                at += run;
            }
        }
        Ok(())
    }

    /// The physical frame behind `addr`: `None` where no page is mapped, or where frame numbers are hidden (without
    /// `CAP_SYS_ADMIN`).
    ///
    /// # Errors
    /// Whatever `pread(2)` answers.
    pub fn pfn(&self, addr: VirtAddr) -> Result<Option<u64>, Errno> {
        let mut word = [0];
        read_words(&self.fd, addr.get() >> PAGE_SHIFT, &mut word)?;
        let [word] = word;
        let pfn = word & WORD_PFN;
        Ok((word & WORD_PRESENT != 0 && pfn != 0).then_some(pfn))
    }
}

/// Reads words from number `first` on: `/proc/self/pagemap` has one for each page, `/proc/kpageflags` for each frame.
fn read_words(fd: &OwnedFd, first: u64, words: &mut [u64]) -> Result<(), Errno> {
    let mut buf = [0u8; WORDS * 8];
    let bytes = &mut buf[..words.len() * 8];
    let mut done = 0;
    while done < bytes.len() {
        match raw::pread(fd.as_fd(), &mut bytes[done..], first * 8 + done as u64)? {
            0 => return Err(Errno::IO),
            n => done += n,
        }
    }
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_ne_bytes(*bytes);
    }
    Ok(())
}

fn from_categories(categories: u64) -> Page {
    let mut page = Page::empty();
    page.set(Page::PRESENT, categories & IS_PRESENT != 0);
    page.set(Page::SWAPPED, categories & IS_SWAPPED != 0);
    page.set(Page::FILE, categories & IS_FILE != 0);
    page.set(Page::ZERO, categories & IS_PFNZERO != 0);
    page.set(Page::HUGE, categories & IS_HUGE != 0);
    // The kernel calls a page written where userfaultfd does not write-protect it.
    page.set(Page::UFFD_WP, categories & IS_WRITTEN == 0);
    page
}

fn from_word(word: u64) -> Page {
    let mut page = Page::empty();
    page.set(Page::PRESENT, word & WORD_PRESENT != 0);
    page.set(Page::SWAPPED, word & WORD_SWAPPED != 0);
    page.set(Page::FILE, word & WORD_FILE != 0);
    page.set(Page::UFFD_WP, word & WORD_UFFD_WP != 0);
    page.set(Page::EXCLUSIVE, word & WORD_EXCLUSIVE != 0);
    page
}
