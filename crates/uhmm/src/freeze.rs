//! The way out where `MOVE` is not to be had: freeze, copy, drop.
//!
//! Kernels before 6.8 have no `UFFDIO_MOVE`, and no kernel moves pages of a mapping that is not writable. There a run
//! of pages is write-protected, so that a writer faults and waits, copied into staging, and dropped with
//! `MADV_DONTNEED`. Dropping raises an event of our own, which the reader recognises (see [`OwnDrops`]).
//!
//! What this way does not see: pages pinned for I/O, whose later contents would be lost. And unlike `MOVE` it is not
//! atomic against an `munmap` and `mmap` of other threads in the instant between the last check and the drop. So
//! policies use it only where the kernel has no `MOVE` at all; a driver that asks for a read-only range gets it.

use std::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Acquire, SeqCst},
};

use uhmm_sys::{
    Errno,
    addr::{BLOCK_PAGES, PAGE_SIZE, PageRange},
    pagemap::Page,
};

use crate::{
    block::{Place, Transit},
    engine::Core,
    gate::{Gate, pause},
    migrate::{Berth, Pass},
    os::Os,
    page_set::{PageSet, Run},
    thread::{Ctx, MAX_THREADS},
};

/// The ranges that engine threads are dropping right now, one a thread: each raises an event that the reader must tell
/// from the program's.
#[derive(Debug)]
pub(crate) struct OwnDrops {
    slots: [AtomicU64; MAX_THREADS],
    /// Counts the messages that the reader has read and told apart.
    looks: AtomicU64,
    /// Counts the events that change mappings.
    changes: AtomicU64,
}

impl OwnDrops {
    pub(crate) fn new() -> Self {
        Self { slots: std::array::from_fn(|_| AtomicU64::new(0)), looks: AtomicU64::new(0), changes: AtomicU64::new(0) }
    }

    // A range lies within a block: its start and its page count fit one word.
    fn pack(range: PageRange) -> u64 {
        range.start().get() | (range.pages() as u64 - 1)
    }

    fn announce(&self, slot: usize, range: PageRange) {
        let _: () = const { assert!(BLOCK_PAGES as u64 <= PAGE_SIZE) };
        self.slots[slot].store(Self::pack(range), SeqCst);
    }

    fn withdraw(&self, slot: usize) {
        self.slots[slot].store(0, SeqCst);
    }

    /// Withdraws an announcement after the drop, whose event has been read by now, if it raised one: not before the
    /// reader has told whose it is, or it would take the event for the program's.
    fn withdraw_told(&self, slot: usize, gate: &Gate) {
        // Between reading our event and telling whose it is the gate is shut, and the reader looks at nothing else.
        let looks = self.looks.load(SeqCst);
        let mut spins = 0;
        while self.slots[slot].load(SeqCst) != 0 && !gate.is_open() && self.looks.load(SeqCst) == looks {
            pause(&mut spins);
        }
        self.withdraw(slot);
    }

    /// Whether `range` is being dropped by an engine thread. Each announcement answers once, or once for each mapping that
    /// its range was cut into meanwhile: those events come in order.
    pub(crate) fn is_own(&self, range: PageRange) -> bool {
        let own = self.slots.iter().any(|slot| {
            let word = slot.load(Acquire);
            let (start, pages) = (word & !(PAGE_SIZE - 1), (word & (PAGE_SIZE - 1)) + 1);
            if word == 0 || start != range.start().get() || range.pages() as u64 > pages {
                return false;
            }
            let left = PageRange::from_ends(range.end(), range.start().add(pages * PAGE_SIZE)).map_or(0, Self::pack);
            slot.compare_exchange(word, left, AcqRel, Acquire).is_ok()
        });
        self.looked();
        own
    }

    /// Says that the reader has told its last message apart.
    pub(crate) fn looked(&self) {
        self.looks.fetch_add(1, SeqCst);
    }

    /// Whether any engine thread is dropping pages.
    pub(crate) fn any(&self) -> bool {
        self.slots.iter().any(|s| s.load(SeqCst) != 0)
    }

    /// Says that mappings have changed, before anything waits for page locks on that account.
    pub(crate) fn mappings_changed(&self) {
        self.changes.fetch_add(1, SeqCst);
    }
}

impl<O: Os> Core<O> {
    /// Takes held pages of a range that is registered for write-protection out by copying. Returns those that are gone
    /// from the program (holes included); the others stay in `left`, with their protection lifted.
    pub(crate) fn copy_out(
        &'static self,
        ctx: &mut Ctx,
        transit: &mut Transit<'_>,
        berth: Berth,
        left: &mut PageSet,
        pass: &mut Pass,
    ) -> PageSet {
        let mut taken = PageSet::EMPTY;
        for run in left.runs() {
            let mut stuck = PageSet::EMPTY;
            if let Err(error) = self.copy_run_out(ctx, transit, berth, run, &mut taken, &mut stuck) {
                let rest = PageSet::span(run.first, run.first + run.count).minus(&taken);
                for part in rest.runs() {
                    let range = transit.block().run(part);
                    // Where this fails the mapping is gone, and with it the protection.
                    let _ = self.os.write_unprotect(range);
                    self.os.wake(range);
                }
                if error == Errno::AGAIN {
                    pass.again = pass.again.or(&rest.minus(&stuck));
                }
            }
        }
        *left = left.minus(&taken);
        taken
    }

    /// Adds to `taken` what is gone from the program, also when it stops half-way, and to `stuck` what is there but no
    /// page (a guard, say).
    fn copy_run_out(
        &'static self,
        ctx: &mut Ctx,
        transit: &mut Transit<'_>,
        berth: Berth,
        run: Run,
        taken: &mut PageSet,
        stuck: &mut PageSet,
    ) -> Result<(), Errno> {
        let range = transit.block().run(run);
        let changes = self.own_drops.changes.load(SeqCst);
        {
            let _inside = self.gate.enter(ctx.slot).map_err(|_| Errno::AGAIN)?;
            self.os.write_protect(range)?;
        }
        let mut pages = [Page::empty(); BLOCK_PAGES];
        let pages = &mut pages[..run.count];
        self.os.scan(range, pages)?;
        let present: PageSet =
            run.pages().filter(|i| pages[i - run.first].intersects(Page::PRESENT | Page::SWAPPED)).collect();
        for part in present.runs() {
            let bytes = self.staging.bytes(berth.slot(part.first), part.count);
            let copied = self.os.read(transit.block().page(part.first), bytes);
            if copied.stop.is_some_and(|why| why != Errno::IO) {
                return Err(Errno::FAULT);
            }
            if copied.done != part.bytes() {
                let i = part.first + usize::try_from(copied.done / PAGE_SIZE).expect("below 512");
                let mut page = [Page::empty(); 1];
                self.os.scan(transit.block().run(Run { first: i, count: 1 }), &mut page)?;
                if page[0].intersects(Page::PRESENT | Page::SWAPPED) {
                    stuck.insert(i);
                }
                // Else the program has dropped it a moment ago. Look anew either way.
                return Err(Errno::AGAIN);
            }
        }
        for part in present.runs() {
            let range = transit.block().run(part);
            self.own_drops.announce(ctx.slot, range);
            if self.own_drops.changes.load(SeqCst) != changes || self.os.is_changing() {
                self.own_drops.withdraw(ctx.slot);
                return Err(Errno::AGAIN);
            }
            let dropped = self.os.zap(range);
            self.own_drops.withdraw_told(ctx.slot, &self.gate);
            match dropped {
                // Unmapped in part meanwhile: that event waits for these pages, and drops them then.
                Ok(()) | Err(Errno::NOMEM) => {}
                Err(error) => return Err(error),
            }
            for i in part.pages() {
                transit.set(i, Place::Staged { slot: berth.slot(i), exclusive: None });
                taken.insert(i);
            }
        }
        *taken = taken.or(&PageSet::span(run.first, run.first + run.count));
        Ok(())
    }
}
