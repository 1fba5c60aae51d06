//! Staging: memory of the engine where pages stand between two homes.
//!
//! Staging is cut into chunks of a block's size. On the way out a block's pages are moved into a chunk at the offsets
//! they had in the block, so that a run of pages is one `UFFDIO_MOVE` and a huge folio stays whole. After their bytes
//! were copied to a device the pages stay behind as *garbage*: memory that can be filled with what comes home next,
//! and moved into the program without the kernel having to allocate and clear anything. A chunk full of garbage is
//! worth keeping; up to a bound chunks are kept so, others are given back to the kernel.
//!
//! ```text
//!          take_empty               leave (last page)
//!   EMPTY ------------> IN USE -----------------------> FILLED, if mostly garbage and below the bound
//!     ^                    ^  |                            |
//!     |                    |  +--> zapped -> EMPTY         | take_filled
//!     +--------------------+-------------------------------+  (pages leave it by MOVE, towards home)
//! ```
//!
//! Recycled pages were the program's own before, so no byte passes from one process to another.

use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed},
};

use uhmm_sys::{
    Errno,
    addr::{BLOCK_PAGES, BLOCK_SHIFT, BLOCK_SIZE, PAGE_SHIFT, PageRange, VirtAddr},
    arena,
    mem::HostBytes,
};

use crate::page_set::Run;

/// Slots in a chunk: as many as a block has pages.
const CHUNK_SLOTS: u32 = 512;
const _: () = assert!(CHUNK_SLOTS as usize == BLOCK_PAGES);

/// Number of a page-sized place in staging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot(u32);

impl Slot {
    pub(crate) const fn from_number(n: u32) -> Self {
        Self(n)
    }

    pub(crate) const fn number(self) -> u32 {
        self.0
    }

    pub(crate) const fn chunk(self) -> Chunk {
        Chunk(self.0 / CHUNK_SLOTS)
    }

    pub(crate) const fn index(self) -> usize {
        self.0 as usize % BLOCK_PAGES
    }
}

/// A block-sized piece of staging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunk(u32);

impl Chunk {
    #[expect(clippy::cast_possible_truncation, reason = "an index within a chunk is below 512")]
    pub(crate) fn slot(self, index: usize) -> Slot {
        debug_assert!(index < BLOCK_PAGES);
        Slot(self.0 * CHUNK_SLOTS + index as u32)
    }
}

/// A lock-free stack of chunk numbers; the counter in the upper half keeps a slow popper from taking a stale head.
#[derive(Debug)]
struct Stack {
    head: AtomicU64,
    count: AtomicU32,
}

impl Stack {
    fn new() -> Self {
        Self { head: AtomicU64::new(0), count: AtomicU32::new(0) }
    }

    fn push(&self, next: &[AtomicU32], chunk: Chunk) {
        let mut head = self.head.load(Acquire);
        loop {
            next[chunk.0 as usize].store(low(head), Relaxed);
            let new = (head & !0xffff_ffff).wrapping_add(1 << 32) | u64::from(chunk.0 + 1);
            match self.head.compare_exchange_weak(head, new, AcqRel, Acquire) {
                Ok(_) => break,
                Err(now) => head = now,
            }
        }
        self.count.fetch_add(1, Relaxed);
    }

    fn pop(&self, next: &[AtomicU32]) -> Option<Chunk> {
        let mut head = self.head.load(Acquire);
        loop {
            let chunk = Chunk(low(head).checked_sub(1)?);
            let after = next[chunk.0 as usize].load(Relaxed);
            let new = (head & !0xffff_ffff).wrapping_add(1 << 32) | u64::from(after);
            match self.head.compare_exchange_weak(head, new, AcqRel, Acquire) {
                Ok(_) => {
                    self.count.fetch_sub(1, Relaxed);
                    return Some(chunk);
                }
                Err(now) => head = now,
            }
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the lower half is what is wanted")]
const fn low(head: u64) -> u32 {
    head as u32
}

/// Pages still standing in a chunk, and garbage left behind in it, packed: `standing << 16 | garbage`.
const STANDING: u32 = 1 << 16;
const GARBAGE_MASK: u32 = STANDING - 1;
/// A chunk with at least this much garbage is worth keeping.
const WORTH_KEEPING: u32 = 3 * CHUNK_SLOTS / 4;
/// Set in a chunk's state while its garbage is one huge page: filling it in pieces would split it.
const HUGE: u32 = 1 << 31;

/// The staging area.
#[derive(Debug)]
pub(crate) struct Staging {
    range: PageRange,
    state: &'static [AtomicU32],
    next: &'static [AtomicU32],
    empty: Stack,
    filled: Stack,
    filled_huge: Stack,
    keep: AtomicU32,
    /// Pages that stand in all chunks together.
    standing: AtomicU32,
}

/// What is to become of a chunk when the last page left it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    /// Others stand in it still, or it was put aside for reuse.
    Nothing,
    /// The caller gives its memory back to the kernel and then calls [`Staging::put_empty`].
    Zap(Chunk),
}

impl Staging {
    /// Takes `chunks` blocks of address space from the arena; keeps up to `keep` chunks of garbage.
    pub(crate) fn new(chunks: u32, keep: u32) -> Result<Self, Errno> {
        let range = arena::pages(u64::from(chunks) << BLOCK_SHIFT, BLOCK_SIZE)?;
        let staging = Self {
            range,
            state: arena::slice(chunks as usize)?,
            next: arena::slice(chunks as usize)?,
            empty: Stack::new(),
            filled: Stack::new(),
            filled_huge: Stack::new(),
            keep: AtomicU32::new(keep),
            standing: AtomicU32::new(0),
        };
        for n in (0..chunks).rev() {
            staging.empty.push(staging.next, Chunk(n));
        }
        Ok(staging)
    }

    /// The same range as a forked child uses it: everything in it is garbage, and its memory is the kernel's again.
    pub(crate) fn inherit(&self) -> Result<Self, Errno> {
        let chunks = self.state.len();
        let staging = Self {
            range: self.range,
            state: arena::slice(chunks)?,
            next: arena::slice(chunks)?,
            empty: Stack::new(),
            filled: Stack::new(),
            filled_huge: Stack::new(),
            keep: AtomicU32::new(self.keep.load(Relaxed)),
            standing: AtomicU32::new(0),
        };
        for n in (0..u32::try_from(chunks).expect("chunks are counted in 32 bits")).rev() {
            staging.empty.push(staging.next, Chunk(n));
        }
        Ok(staging)
    }

    /// All of it.
    pub(crate) const fn range(&self) -> PageRange {
        self.range
    }

    /// Where a slot is.
    pub(crate) const fn addr(&self, slot: Slot) -> VirtAddr {
        self.range.start().add((slot.0 as u64) << PAGE_SHIFT)
    }

    /// The addresses of a run of a chunk's slots.
    pub(crate) fn run(&self, chunk: Chunk, run: Run) -> PageRange {
        PageRange::new(self.addr(chunk.slot(run.first)), run.bytes()).expect("staging lies in user space")
    }

    /// The bytes of `pages` slots from `slot`.
    pub(crate) fn bytes(&self, slot: Slot, pages: usize) -> HostBytes {
        HostBytes::in_arena(self.addr(slot), (pages as u64) << PAGE_SHIFT).expect("staging lies in the arena")
    }

    /// From now on pages that were the program's are given back to the kernel, never filled with others' bytes: the
    /// kernel may still refer to one (a pipe, a socket that sends without copying).
    pub(crate) fn never_recycle(&self) {
        self.keep.store(0, Relaxed);
    }

    /// Keeps no more than `chunks` chunks of garbage from now on.
    pub(crate) fn keep_at_most(&self, chunks: u32) {
        self.keep.fetch_min(chunks, Relaxed);
    }

    /// Whether pages may be filled anew.
    pub(crate) fn recycles(&self) -> bool {
        self.keep.load(Relaxed) != 0
    }

    /// How many pages stand in staging, about.
    pub(crate) fn standing(&self) -> u32 {
        self.standing.load(Relaxed)
    }

    /// A chunk without a page in it, for pages on their way out.
    pub(crate) fn take_empty(&self) -> Option<Chunk> {
        self.empty.pop(self.next)
    }

    /// A chunk whose slots hold garbage (or nothing: the kernel then fills in on a touch), for pages on their way home.
    pub(crate) fn take_filled(&self) -> Option<Chunk> {
        if !self.recycles() {
            return None;
        }
        let chunk = self.filled.pop(self.next)?;
        self.state[chunk.0 as usize].store(0, Relaxed);
        Some(chunk)
    }

    /// As [`Staging::take_filled`], of one huge page.
    pub(crate) fn take_filled_huge(&self) -> Option<Chunk> {
        if !self.recycles() {
            return None;
        }
        let chunk = self.filled_huge.pop(self.next)?;
        self.state[chunk.0 as usize].store(0, Relaxed);
        Some(chunk)
    }

    /// A chunk of garbage that nobody needs, to be given back to the kernel by the caller.
    pub(crate) fn shrink(&self) -> Option<Chunk> {
        let chunk = self.filled.pop(self.next).or_else(|| self.filled_huge.pop(self.next))?;
        self.state[chunk.0 as usize].store(0, Relaxed);
        Some(chunk)
    }

    /// Puts a chunk back whose memory the kernel has.
    pub(crate) fn put_empty(&self, chunk: Chunk) {
        self.state[chunk.0 as usize].store(0, Relaxed);
        self.empty.push(self.next, chunk);
    }

    /// Says that `pages` pages came to stand in `chunk`, one huge folio if `huge`.
    pub(crate) fn arrive(&self, chunk: Chunk, pages: usize, huge: bool) {
        #[expect(clippy::cast_possible_truncation, reason = "at most 512")]
        let pages = pages as u32;
        let add = pages * STANDING + if huge { HUGE } else { 0 };
        self.standing.fetch_add(pages, Relaxed);
        self.state[chunk.0 as usize].fetch_add(add, AcqRel);
    }

    /// Says that `moved` pages left `chunk` by `MOVE`, and `copied` left their bytes behind as garbage.
    #[must_use]
    pub(crate) fn leave(&self, chunk: Chunk, moved: usize, copied: usize) -> Left {
        #[expect(clippy::cast_possible_truncation, reason = "at most 512")]
        let (moved, copied) = (moved as u32, copied as u32);
        self.standing.fetch_sub(moved + copied, Relaxed);
        let old = self.state[chunk.0 as usize].fetch_sub((moved + copied) * STANDING - copied, AcqRel);
        let standing = (old & !HUGE) / STANDING - moved - copied;
        if standing != 0 {
            return Left::Nothing;
        }
        let garbage = (old & GARBAGE_MASK) + copied;
        let huge = old & HUGE != 0 && garbage == CHUNK_SLOTS;
        let stack = if huge { &self.filled_huge } else { &self.filled };
        if garbage >= WORTH_KEEPING && (old & HUGE == 0 || huge) && stack.count.load(Relaxed) < self.keep.load(Relaxed)
        {
            stack.push(self.next, chunk);
            Left::Nothing
        } else {
            Left::Zap(chunk)
        }
    }

    /// The whole chunk.
    pub(crate) fn chunk_range(&self, chunk: Chunk) -> PageRange {
        self.run(chunk, Run { first: 0, count: BLOCK_PAGES })
    }
}

/// Where an engine thread puts pages together on their way home: the rest of a chunk of garbage, filled front to back and
/// moved home from there, and a chunk of its own to copy through where there is no garbage.
#[derive(Debug, Default)]
pub(crate) struct HomeBuffer {
    filled: Option<Chunk>,
    used: usize,
    scratch: Option<Chunk>,
}

/// Slots on the way home.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HomeSlots {
    /// Recycled pages, which are to be moved home themselves.
    Recycled(Slot, usize),
    /// Slots that stay the buffer's, to copy from.
    Scratch(Slot, usize),
}

/// Pages that go through the scratch chunk at a time: few enough to stay in the cache between the two copies.
const SCRATCH_PAGES: usize = 64;

impl HomeBuffer {
    /// A run of slots for `pages` pages, or for as many as are at hand: recycled ones if there are any and there is more
    /// than one page to move.
    ///
    /// A fresh page of staging would be cleared by the kernel before it is written, and cost a page fault; a copy
    /// (`UFFDIO_COPY`) has the kernel allocate a page and fill it at once. A single page is cheaper copied in any case: a
    /// `UFFDIO_MOVE` flushes translations on every CPU that runs the process.
    ///
    /// `None` when staging is exhausted.
    pub(crate) fn take(&mut self, staging: &Staging, pages: usize) -> Option<HomeSlots> {
        if pages > 1 {
            if self.filled.is_none() {
                self.filled = staging.take_filled();
                self.used = 0;
            }
            if let Some(chunk) = self.filled {
                return Some(HomeSlots::Recycled(chunk.slot(self.used), pages.min(BLOCK_PAGES - self.used)));
            }
        }
        Some(HomeSlots::Scratch(self.scratch(staging)?, pages.min(SCRATCH_PAGES)))
    }

    /// The first of [`SCRATCH_PAGES`] slots that stay the buffer's.
    pub(crate) fn scratch(&mut self, staging: &Staging) -> Option<Slot> {
        if self.scratch.is_none() {
            self.scratch = staging.take_empty();
        }
        self.scratch.map(|chunk| chunk.slot(0))
    }

    /// Says that the first `moved` slots of the last [`HomeSlots::Recycled`] left the buffer. Returns a chunk to put back
    /// with [`Staging::put_empty`] after it has been given to the kernel.
    #[must_use]
    pub(crate) fn advance(&mut self, moved: usize) -> Option<Chunk> {
        self.used += moved;
        debug_assert!(self.used <= BLOCK_PAGES);
        if self.used == BLOCK_PAGES { self.filled.take() } else { None }
    }
}

/// An engine thread's own chunk, of which pages on their way out get the next slots.
#[derive(Debug, Default)]
pub(crate) struct OutBuffer {
    chunk: Option<Chunk>,
    used: usize,
}

impl OutBuffer {
    /// The first of `pages` slots, if there are so many left.
    pub(crate) fn room(&self, pages: usize) -> Option<Slot> {
        let chunk = self.chunk.filter(|_| self.used + pages <= BLOCK_PAGES)?;
        Some(chunk.slot(self.used))
    }

    /// Says that the next `pages` slots were used.
    pub(crate) fn advance(&mut self, pages: usize) {
        self.used += pages;
    }

    /// Begins another chunk, and returns the one before.
    #[must_use]
    pub(crate) fn replace(&mut self, chunk: Option<Chunk>) -> Option<Chunk> {
        self.used = 0;
        std::mem::replace(&mut self.chunk, chunk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_full_of_garbage_is_kept_up_to_the_bound() {
        arena::init(256 << 20).unwrap();
        let staging = Staging::new(4, 1).unwrap();
        let (a, b) = (staging.take_empty().unwrap(), staging.take_empty().unwrap());
        assert_ne!(a, b);
        for chunk in [a, b] {
            staging.arrive(chunk, 512, false);
            assert_eq!(staging.leave(chunk, 0, 100), Left::Nothing, "412 pages stand in it still");
        }
        assert_eq!(staging.leave(a, 12, 400), Left::Nothing);
        assert_eq!(staging.leave(b, 12, 400), Left::Zap(b), "one chunk of garbage is the bound");
        assert_eq!(staging.take_filled(), Some(a));
        assert_eq!(staging.take_filled(), None);
    }

    #[test]
    fn pages_go_home_in_recycled_slots_while_there_are_any() {
        arena::init(256 << 20).unwrap();
        let staging = Staging::new(4, 2).unwrap();
        let mut buffer = HomeBuffer::default();
        let scratch = buffer.scratch(&staging).unwrap();
        assert_eq!(buffer.take(&staging, 600), Some(HomeSlots::Scratch(scratch, SCRATCH_PAGES)));
        let chunk = staging.take_empty().unwrap();
        staging.arrive(chunk, 512, false);
        assert_eq!(staging.leave(chunk, 0, 512), Left::Nothing);
        assert_eq!(buffer.take(&staging, 1), Some(HomeSlots::Scratch(scratch, 1)), "a single page is copied");
        assert_eq!(buffer.take(&staging, 500), Some(HomeSlots::Recycled(chunk.slot(0), 500)));
        assert_eq!(buffer.advance(500), None);
        assert_eq!(buffer.take(&staging, 500), Some(HomeSlots::Recycled(chunk.slot(500), 12)));
        assert_eq!(buffer.advance(12), Some(chunk));
        assert_eq!(buffer.take(&staging, 500), Some(HomeSlots::Scratch(scratch, SCRATCH_PAGES)));
    }

    #[test]
    fn a_huge_page_in_pieces_is_not_kept() {
        arena::init(256 << 20).unwrap();
        let staging = Staging::new(2, 2).unwrap();
        let chunk = staging.take_empty().unwrap();
        staging.arrive(chunk, 512, true);
        assert_eq!(staging.leave(chunk, 0, 512), Left::Nothing);
        assert_eq!(staging.take_filled(), None);
        assert_eq!(staging.take_filled_huge(), Some(chunk));
        staging.arrive(chunk, 512, true);
        assert_eq!(staging.leave(chunk, 1, 511), Left::Zap(chunk));
    }
}
