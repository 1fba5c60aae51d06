//! Changes of mappings that program threads have announced and not finished.
//!
//! Who is about to unmap or protect memory has devices give up their translations first. A device that faults between that
//! and the change would be served from a mapping that is about to go. So a change stays announced until it is over, and
//! translations of what it covers are not made meanwhile:
//!
//! ```text
//!   program thread:  announce, invalidate ---- munmap ---- over
//!   device fault:          read_begin, any?  ... waits ...   read_begin, any? no, ... commit
//! ```
//!
//! A fault that has looked before the announcement is caught by the invalidation, which comes behind it.
//!
//! # Locking
//! None. Waiting is for device faults: nothing that a change in progress needs may depend on one.
//!
//! # Kernel
//! What the kernel has `mmap_lock` and the odd sequence number of `mmu_notifier_invalidate_range_start` for.

use std::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, SeqCst},
};

use uhmm_sys::addr::PageRange;

/// Changes that can be announced at once. Others are not: their devices may have to fault twice.
const SLOTS: usize = 32;
/// In [`Slot::end`]: being filled in.
const CLAIMED: u64 = 1;

#[derive(Debug)]
struct Slot {
    start: AtomicU64,
    /// 0: free.
    end: AtomicU64,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Changes([Slot; SLOTS]);

impl Changes {
    pub(crate) const fn new() -> Self {
        Self([const { Slot { start: AtomicU64::new(0), end: AtomicU64::new(0) } }; SLOTS])
    }

    /// Announces a change of `range`. `None` where too many are.
    pub(crate) fn announce(&self, range: PageRange) -> Option<usize> {
        let claim = |slot: &Slot| slot.end.compare_exchange(0, CLAIMED, Acquire, Relaxed).is_ok();
        let number = self.0.iter().position(claim)?;
        let slot = &self.0[number];
        slot.start.store(range.start().get(), Relaxed);
        slot.end.store(range.end().get(), SeqCst);
        Some(number)
    }

    /// The change that was announced under this number is over.
    pub(crate) fn over(&self, number: usize) {
        self.0[number].end.store(0, SeqCst);
    }

    /// Whether a change of any page of `range` is under way.
    pub(crate) fn any_in(&self, range: PageRange) -> bool {
        self.0.iter().any(|slot| {
            let end = slot.end.load(SeqCst);
            end > range.start().get() && slot.start.load(Relaxed) < range.end().get()
        })
    }
}

#[cfg(test)]
mod tests {
    use uhmm_sys::addr::VirtAddr;

    use super::*;

    fn pages(first: u64, count: u64) -> PageRange {
        PageRange::new(VirtAddr::new(first << 12), count << 12).unwrap()
    }

    #[test]
    fn a_change_covers_its_pages_until_it_is_over() {
        let changes = Changes::new();
        let number = changes.announce(pages(10, 5)).unwrap();
        let covered: Vec<u64> = (0..30).filter(|&n| changes.any_in(pages(n, 1))).collect();
        assert_eq!(covered, [10, 11, 12, 13, 14]);
        assert!(changes.any_in(pages(0, 11)) && changes.any_in(pages(14, 9)) && !changes.any_in(pages(15, 9)));
        changes.over(number);
        assert!(!changes.any_in(pages(0, 100)));
    }

    #[test]
    fn there_is_room_for_so_many() {
        let changes = Changes::new();
        let numbers: Vec<_> = (0..SLOTS as u64).map(|n| changes.announce(pages(n, 1)).unwrap()).collect();
        assert_eq!(changes.announce(pages(99, 1)), None);
        changes.over(numbers[7]);
        assert!(!changes.any_in(pages(7, 1)) && changes.any_in(pages(6, 1)));
        assert_eq!(changes.announce(pages(99, 1)), Some(numbers[7]));
    }
}
