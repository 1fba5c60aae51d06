//! Addresses, ranges and sizes as types.
//!
//! An address that comes from a program, an event or C is an allegation: building a [`VirtAddr`] or a [`PageRange`]
//! proves alignment and the absence of wrap-around, never that anything is mapped there.

use std::fmt;

use thiserror::Error;

/// Bytes in a base page. uhmm supports machines with 4 KiB base pages only.
pub const PAGE_SIZE: u64 = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a block: the 2 MiB aligned unit of policy, and the size of a huge folio.
pub const BLOCK_SIZE: u64 = 2 << 20;
/// log2 of [`BLOCK_SIZE`].
pub const BLOCK_SHIFT: u32 = 21;
/// Base pages in a block.
pub const BLOCK_PAGES: usize = 512;
/// First address above the lower half of the address space (x86-64, four-level page tables).
pub const TASK_SIZE: u64 = 1 << 47;

/// Why a range from outside was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RangeError {
    /// Start or length is not a multiple of the page size.
    #[error("range {start:#x}+{len:#x}: not page aligned")]
    Unaligned {
        /// The start that was given.
        start: u64,
        /// The length in bytes that was given.
        len: u64,
    },
    /// The length is zero.
    #[error("range at {start:#x}: empty")]
    Empty {
        /// The start that was given.
        start: u64,
    },
    /// The end lies past the end of the user address space.
    #[error("range {start:#x}+{len:#x}: past the end of the address space")]
    OutOfSpace {
        /// The start that was given.
        start: u64,
        /// The length in bytes that was given.
        len: u64,
    },
}

/// A virtual address of the process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct VirtAddr(u64);

impl VirtAddr {
    /// Wraps `addr`. Nothing is claimed about what is there.
    #[must_use]
    pub const fn new(addr: u64) -> Self {
        Self(addr)
    }

    /// The address of what `ptr` points to.
    #[must_use]
    pub fn of<T: ?Sized>(ptr: *const T) -> Self {
        Self(ptr.cast::<()>().addr() as u64)
    }

    /// The address as a number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The start of the page that holds this address.
    #[must_use]
    pub const fn page(self) -> Self {
        Self(self.0 & !(PAGE_SIZE - 1))
    }

    /// The start of the block that holds this address.
    #[must_use]
    pub const fn block(self) -> Self {
        Self(self.0 & !(BLOCK_SIZE - 1))
    }

    /// Number of the page within its block, `0..512`.
    #[must_use]
    pub const fn page_in_block(self) -> usize {
        ((self.0 >> PAGE_SHIFT) & (BLOCK_PAGES as u64 - 1)) as usize
    }

    /// The address `bytes` further on; saturates at the end of the 64-bit space.
    #[must_use]
    pub const fn add(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }

    /// Bytes from `start` to this address, or `None` where this address is below it.
    #[must_use]
    pub const fn offset_from(self, start: Self) -> Option<u64> {
        self.0.checked_sub(start.0)
    }
}

impl fmt::Debug for VirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for VirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A non-empty, page-aligned run of addresses, `start..end`, inside the user address space.
///
/// # Invariants
/// `start` and `end` are multiples of [`PAGE_SIZE`], `start < end <= TASK_SIZE`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    start: u64,
    end: u64,
}

impl PageRange {
    /// Checks `len` bytes from `start`.
    ///
    /// # Errors
    /// [`RangeError`] says which rule was broken; nothing is rounded.
    pub const fn new(start: VirtAddr, len: u64) -> Result<Self, RangeError> {
        let start = start.0;
        if len == 0 {
            return Err(RangeError::Empty { start });
        }
        if !start.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(RangeError::Unaligned { start, len });
        }
        match start.checked_add(len) {
            // INVARIANT: both ends are aligned, `len` is not zero and the sum did not wrap.
            Some(end) if end <= TASK_SIZE => Ok(Self { start, end }),
            _ => Err(RangeError::OutOfSpace { start, len }),
        }
    }

    /// The pages that hold any byte of `start..start + len`.
    ///
    /// # Errors
    /// [`RangeError::Empty`] and [`RangeError::OutOfSpace`].
    pub const fn covering(start: VirtAddr, len: u64) -> Result<Self, RangeError> {
        if len == 0 {
            return Err(RangeError::Empty { start: start.0 });
        }
        let first = start.page();
        match start.0.checked_add(len) {
            Some(end) if end <= TASK_SIZE => Self::new(first, end.next_multiple_of(PAGE_SIZE) - first.0),
            _ => Err(RangeError::OutOfSpace { start: start.0, len }),
        }
    }

    /// Checks `start..end`.
    ///
    /// # Errors
    /// As [`PageRange::new`]; an end at or below the start is [`RangeError::Empty`].
    pub const fn from_ends(start: VirtAddr, end: VirtAddr) -> Result<Self, RangeError> {
        match end.0.checked_sub(start.0) {
            None => Err(RangeError::Empty { start: start.0 }),
            Some(len) => Self::new(start, len),
        }
    }

    /// The single page that holds `addr`.
    ///
    /// # Panics
    /// If `addr` is outside the user address space.
    #[must_use]
    pub const fn page_of(addr: VirtAddr) -> Self {
        assert!(addr.0 < TASK_SIZE, "address is not a user address");
        let start = addr.page().0;
        Self { start, end: start + PAGE_SIZE }
    }

    /// First address.
    #[must_use]
    pub const fn start(self) -> VirtAddr {
        VirtAddr(self.start)
    }

    /// First address past the range.
    #[must_use]
    pub const fn end(self) -> VirtAddr {
        VirtAddr(self.end)
    }

    /// Length in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.end - self.start
    }

    /// Length in pages.
    #[must_use]
    pub const fn pages(self) -> usize {
        (self.bytes() >> PAGE_SHIFT) as usize
    }

    /// Whether `addr` lies in the range.
    #[must_use]
    pub const fn contains(self, addr: VirtAddr) -> bool {
        self.start <= addr.0 && addr.0 < self.end
    }

    /// Whether every address of `other` lies in the range.
    #[must_use]
    pub const fn contains_range(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Whether the ranges share an address.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// The addresses that both ranges hold.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        (start < end).then_some(Self { start, end })
    }

    /// The `n`th page of the range.
    ///
    /// # Panics
    /// If the range has no such page.
    #[must_use]
    pub const fn page(self, n: usize) -> VirtAddr {
        assert!(n < self.pages(), "page index past the range");
        VirtAddr(self.start + ((n as u64) << PAGE_SHIFT))
    }

    /// Every page's address, ascending.
    pub fn iter_pages(self) -> impl DoubleEndedIterator<Item = VirtAddr> + Clone {
        (self.start >> PAGE_SHIFT..self.end >> PAGE_SHIFT).map(|n| VirtAddr(n << PAGE_SHIFT))
    }

    /// The range cut at block boundaries, ascending.
    pub fn iter_blocks(self) -> impl Iterator<Item = Self> + Clone {
        (self.start >> BLOCK_SHIFT..=(self.end - 1) >> BLOCK_SHIFT)
            .map(move |n| Self { start: self.start.max(n << BLOCK_SHIFT), end: self.end.min((n + 1) << BLOCK_SHIFT) })
    }

    /// The whole block at whose start `addr` lies or that holds it.
    #[must_use]
    pub const fn block_of(addr: VirtAddr) -> Self {
        assert!(addr.0 < TASK_SIZE, "address is not a user address");
        let start = addr.block().0;
        Self { start, end: start + BLOCK_SIZE }
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.end)
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn va(addr: u64) -> VirtAddr {
        VirtAddr::new(addr)
    }

    #[test]
    fn bad_ranges_are_refused_with_the_rule_they_break() {
        assert_eq!(PageRange::new(va(0x1000), 0), Err(RangeError::Empty { start: 0x1000 }));
        assert_eq!(PageRange::new(va(0x1001), 4096), Err(RangeError::Unaligned { start: 0x1001, len: 4096 }));
        assert_eq!(PageRange::new(va(0x1000), 100), Err(RangeError::Unaligned { start: 0x1000, len: 100 }));
        assert!(matches!(PageRange::new(va(0x1000), TASK_SIZE), Err(RangeError::OutOfSpace { .. })));
        assert!(matches!(PageRange::new(va(u64::MAX - 4095), 8192), Err(RangeError::OutOfSpace { .. })));
        assert!(matches!(PageRange::from_ends(va(0x2000), va(0x1000)), Err(RangeError::Empty { .. })));
    }

    #[test]
    fn covering_rounds_outwards() {
        let range = PageRange::covering(va(0x1fff), 2).unwrap();
        assert_eq!((range.start(), range.end()), (va(0x1000), va(0x3000)));
        assert_eq!(range.pages(), 2);
    }

    #[test]
    fn blocks_tile_the_range() {
        let range = PageRange::from_ends(va(BLOCK_SIZE - 4096), va(2 * BLOCK_SIZE + 4096)).unwrap();
        let blocks: Vec<_> = range.iter_blocks().collect();
        assert_eq!(blocks.len(), 3);
        assert_eq!(blocks.iter().map(|b| b.bytes()).sum::<u64>(), range.bytes());
        assert!(blocks.windows(2).all(|w| w[0].end() == w[1].start()));
    }

    #[test]
    fn intersection_agrees_with_overlap() {
        let a = PageRange::new(va(0x1000), 0x3000).unwrap();
        for start in 0..6u64 {
            let b = PageRange::new(va(start << 12), 0x1000).unwrap();
            assert_eq!(a.intersection(b).is_some(), a.overlaps(b), "{b}");
        }
    }
}
