//! What an engine thread carries with it.
//!
//! Every lock that a fault handler can need is only ever taken by engine threads. Their stacks, and all they touch
//! while they hold one, are in the private arena, so that they never fault on memory that a handler would have to
//! bring home for them. [`Ctx`] is the proof: whoever has one runs on an engine thread.

use uhmm_sys::addr::PageRange;

use crate::staging::{HomeBuffer, OutBuffer};

/// Most engine threads that can exist.
pub(crate) const MAX_THREADS: usize = 64;
/// Most ranges that are kept out of migration.
const MAX_EXCLUDED: usize = 2048;

/// An engine thread's own things.
#[derive(Debug)]
pub(crate) struct Ctx {
    /// Its number, below [`MAX_THREADS`].
    pub(crate) slot: usize,
    /// Where it puts pages together on their way home.
    pub(crate) home: HomeBuffer,
    /// Where it puts a few pages at a time on their way out.
    pub(crate) out: OutBuffer,
    /// How deeply serving faults is nested.
    pub(crate) depth: u32,
    /// Ranges that must stay, as of the operation's start.
    pub(crate) excluded: Excluded,
}

impl Ctx {
    pub(crate) fn new(slot: usize) -> Self {
        assert!(slot < MAX_THREADS, "too many engine threads");
        Self { slot, home: HomeBuffer::default(), out: OutBuffer::default(), depth: 0, excluded: Excluded::new() }
    }
}

/// A short list of ranges, in place.
pub(crate) struct Excluded {
    ranges: [Option<PageRange>; MAX_EXCLUDED],
    len: usize,
    overflowed: bool,
}

impl Excluded {
    const fn new() -> Self {
        Self { ranges: [None; MAX_EXCLUDED], len: 0, overflowed: false }
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
        self.overflowed = false;
    }

    /// Adds `range`. Where the list is full everything counts as excluded: better to move nothing than the wrong page.
    pub(crate) fn add(&mut self, range: PageRange) {
        match self.ranges.get_mut(self.len) {
            Some(place) => {
                *place = Some(range);
                self.len += 1;
            }
            None => self.overflowed = true,
        }
    }

    /// Calls `f` for each excluded range that touches `range`.
    pub(crate) fn touching(&self, range: PageRange, mut f: impl FnMut(PageRange)) {
        if self.overflowed {
            return f(range);
        }
        self.ranges[..self.len].iter().flatten().filter_map(|r| r.intersection(range)).for_each(&mut f);
    }
}

impl std::fmt::Debug for Excluded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.ranges[..self.len].iter().flatten()).finish()
    }
}
