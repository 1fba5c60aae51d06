//! Faults that wait for room in RAM.
//!
//! Reclaim says from time to time how much room there is, and faults use it up. Where none is left a fault that would bring
//! much into RAM is not answered: its thread waits in the kernel, and its address here. Reclaim answers it when there is room
//! again; after a second somebody does in any case. So a program gets memory no faster than the devices take it, even while
//! reclaim waits for a processor, and no handler sleeps for that.

use std::sync::atomic::{
    AtomicI64, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};

use uhmm_sys::addr::{BLOCK_PAGES, PAGE_SHIFT, PageRange, VirtAddr};

use crate::{
    block::{Block, Place},
    engine::Core,
    fault::{Haste, ZERO_AROUND},
    os::Os,
    policy,
    thread::Ctx,
    trace::Counter,
};

/// Most faults that can wait; more are answered at once.
const MOST: usize = 256;
/// A fault that brings fewer pages is not worth a wait of several milliseconds.
const WORTH_IT: usize = 32;
/// How long a fault waits at most.
const PATIENCE_NS: u64 = 1_000_000_000;

/// Time is kept in units of 65.5 us, in 29 bits: ten hours before it wraps.
const TIME_SHIFT: u32 = 16;
const TIME_BITS: u32 = 29;

/// The faults that wait.
#[derive(Debug)]
pub(crate) struct Parked {
    /// Page number above, time below; zero is none.
    words: [AtomicU64; MOST],
    /// For how many pages there is room, as of reclaim's last look; less what faults have brought in since.
    room: AtomicI64,
}

/// There is room for everything.
const ENDLESS: i64 = i64::MAX;

impl Parked {
    pub(crate) fn new() -> Self {
        Self { words: std::array::from_fn(|_| AtomicU64::new(0)), room: AtomicI64::new(ENDLESS) }
    }

    /// Says for how many pages there is room; `None`: no fault is to wait.
    pub(crate) fn set_room(&self, pages: Option<u64>) {
        let room = pages.map_or(ENDLESS, |pages| i64::try_from(pages).unwrap_or(ENDLESS));
        // SeqCst: whoever parks looks at this afterwards, and whoever sets it at the faults that are parked.
        self.room.store(room, SeqCst);
    }

    /// Whether somebody keeps a limit.
    fn is_limited(&self) -> bool {
        self.room.load(Relaxed) != ENDLESS
    }

    /// Uses up room for `pages`. Returns whether there was enough.
    fn enough_room(&self, pages: usize) -> bool {
        let pages = i64::try_from(pages).expect("a block's at most");
        let rest = |room| (room != ENDLESS).then_some(room - pages);
        self.room.fetch_update(SeqCst, Relaxed, rest).map_or(true, |room| room >= pages)
    }

    /// How many faults wait.
    pub(crate) fn count(&self) -> usize {
        self.words.iter().filter(|word| word.load(Relaxed) != 0).count()
    }

    /// Leaves a fault to reclaim. Returns whether it will be answered.
    fn put(&self, addr: VirtAddr, now_ns: u64) -> bool {
        let page = addr.get() >> PAGE_SHIFT;
        // A signal has had its thread fault anew. Whoever answers that one answers this.
        if self.words.iter().any(|word| word.load(SeqCst) >> TIME_BITS == page) {
            return true;
        }
        let time = now_ns >> TIME_SHIFT & ((1 << TIME_BITS) - 1);
        let fault = addr.get() >> PAGE_SHIFT << TIME_BITS | time;
        let Some(word) = self.words.iter().find(|word| word.compare_exchange(0, fault, SeqCst, Relaxed).is_ok()) else {
            return false;
        };
        // Reclaim may have caught up, or ended: then it answers no more, unless it has the fault already.
        self.room.load(SeqCst) != ENDLESS || word.compare_exchange(fault, 0, SeqCst, Relaxed).is_err()
    }

    /// Takes fault number `n` out, if there is one of which `f` says so: given its address, and since when it waits.
    fn take(&self, n: usize, now_ns: u64, f: impl Fn(VirtAddr, u64) -> bool) -> Option<(VirtAddr, u64)> {
        let fault = self.words[n].load(SeqCst);
        let time = now_ns >> TIME_SHIFT;
        let waited = time.wrapping_sub(fault) & ((1 << TIME_BITS) - 1);
        // It was put after the caller's look at the clock.
        let waited = if waited >> (TIME_BITS - 1) == 0 { waited } else { 0 };
        let (addr, since) = (VirtAddr::new(fault >> TIME_BITS << PAGE_SHIFT), (time - waited.min(time)) << TIME_SHIFT);
        let takes = fault != 0 && f(addr, since) && self.words[n].compare_exchange(fault, 0, SeqCst, Relaxed).is_ok();
        takes.then_some((addr, since))
    }
}

impl<O: Os> Core<O> {
    /// Makes a fault wait that brings pages into RAM for which there is no room: a little here, or in the kernel
    /// for as long as it takes. Returns whether reclaim is going to answer it.
    pub(crate) fn hold_up(&'static self, block: Block, i: usize, haste: Haste) -> bool {
        // While nothing may leave no room will be made, and perhaps everybody waits for this thread.
        if haste == Haste::Now || !self.parked.is_limited() || self.is_frozen() {
            return false;
        }
        // What an engine thread waits for must not wait for another.
        if let Haste::CanWait(Some(tid)) = haste
            && self.is_engine_thread(tid)
        {
            return false;
        }
        let cost = self.cost(block, i);
        if self.parked.enough_room(cost) {
            return false;
        }
        if matches!(haste, Haste::CanWait(_)) && cost >= WORTH_IT && self.parked.put(block.page(i), self.os.now_ns()) {
            self.stats.add(Counter::FaultsParked, 1);
            self.rouse_mover();
            return true;
        }
        if cost > 0 {
            std::thread::sleep(crate::reclaim::THROTTLE);
        }
        false
    }

    /// How many pages a touch of page `i` may bring into RAM.
    fn cost(&self, block: Block, i: usize) -> usize {
        match block.word(i).place() {
            Place::Cpu if block.away() == 0 => BLOCK_PAGES,
            Place::Cpu => ZERO_AROUND,
            Place::Device { .. } if self.is_mappable(block, i) => 0,
            Place::Device { .. } => policy::next_window(block.policy(), i),
            // It is there, but may have been about to leave.
            Place::Staged { .. } => 1,
            Place::Coherent { .. } | Place::Poisoned { .. } => 0,
        }
    }

    /// Answers faults that wait, from number `next` on, while there is room for so many pages; those that have waited for
    /// long in any case. Returns the rest of the room.
    pub(crate) fn serve_parked(&'static self, ctx: &mut Ctx, next: &mut usize, mut room: u64) -> u64 {
        for _ in 0..MOST {
            *next = (*next + 1) % MOST;
            let now = self.os.now_ns();
            let due = |_, since: u64| room > 0 || now - since > PATIENCE_NS;
            let Some((addr, since)) = self.parked.take(*next, now, due) else { continue };
            if let Some(block) = self.blocks.find(addr) {
                room = room.saturating_sub(self.cost(block, addr.page_in_block()) as u64);
            }
            self.serve_fault(ctx, addr, Haste::Now);
            self.record_fault(since);
        }
        room
    }

    /// Sends faults that have waited for long to fault anew: then they do not wait, until reclaim says again how much room there
    /// is. For whoever must not wait for a device that stalls; reclaim may stand in it.
    pub(crate) fn wake_parked(&self) {
        for n in 0..MOST {
            let now = self.os.now_ns();
            if let Some((addr, _)) = self.parked.take(n, now, |_, since| now - since > PATIENCE_NS) {
                self.parked.set_room(None);
                self.os.wake(PageRange::page_of(addr));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: VirtAddr = VirtAddr::new(0x7fff_1234_5000);

    #[test]
    fn a_parked_fault_keeps_its_address_and_its_time() {
        let parked = Parked::new();
        parked.set_room(Some(0));
        let then = 5_000_000_000 + (1 << (TIME_SHIFT + TIME_BITS));
        assert!(parked.put(PAGE, then));
        assert_eq!(parked.count(), 1);
        let later = then + PATIENCE_NS;
        assert_eq!(parked.take(0, later, |_, _| false), None);
        let (addr, since) = parked.take(0, later, |_, since| later - since >= PATIENCE_NS).unwrap();
        assert_eq!(addr, PAGE);
        assert!(then - since < 1 << TIME_SHIFT, "{then} {since}");
        assert_eq!(parked.take(0, later, |_, _| true), None, "it is gone");
        assert!(parked.put(PAGE, later + (1 << TIME_SHIFT)));
        let (_, since) = parked.take(0, later, |_, _| true).unwrap();
        assert!(later - since < 1 << TIME_SHIFT, "it was put after the look at the clock");
    }

    #[test]
    fn nobody_waits_who_would_not_be_answered() {
        let parked = Parked::new();
        assert!(!parked.put(PAGE, 7 << TIME_SHIFT), "there is no limit");
        parked.set_room(Some(0));
        assert!((0..MOST as u64).all(|n| parked.put(PAGE.add(n << PAGE_SHIFT), 7 << TIME_SHIFT)));
        assert!(!parked.put(PAGE.add((MOST as u64) << PAGE_SHIFT), 7 << TIME_SHIFT), "there is room for some only");
        assert!(parked.put(PAGE, 9 << TIME_SHIFT), "it waits already");
        assert_eq!(parked.count(), MOST);
    }

    #[test]
    fn room_is_used_up() {
        let parked = Parked::new();
        assert!((0..100).all(|_| parked.enough_room(BLOCK_PAGES)), "there is no limit");
        parked.set_room(Some(1000));
        assert_eq!((0..5).filter(|_| parked.enough_room(400)).count(), 2);
        parked.set_room(Some(1000));
        assert!(parked.enough_room(1000) && !parked.enough_room(1));
    }

    #[test]
    fn a_fault_is_answered_once_by_one_of_two() {
        let parked = Parked::new();
        let answered = AtomicU64::new(0);
        std::thread::scope(|s| {
            s.spawn(|| {
                for n in 0..20_000 {
                    // As when it ends: whoever parks afterwards answers by itself.
                    parked.set_room((n % 2 == 0).then_some(0));
                    (0..2).for_each(|n| {
                        answered.fetch_add(u64::from(parked.take(n, 1 << 40, |_, _| true).is_some()), Relaxed);
                    });
                }
                parked.set_room(None);
                let rest = (0..MOST).filter(|&n| parked.take(n, 1 << 40, |_, _| true).is_some()).count();
                answered.fetch_add(rest as u64, Relaxed);
            });
            let left = (0..20_000u64).filter(|n| parked.put(PAGE.add(n << PAGE_SHIFT), 1 << 40)).count();
            answered.fetch_add(20_000 - left as u64, Relaxed);
        });
        assert_eq!((answered.load(Relaxed), parked.count()), (20_000, 0));
    }
}
