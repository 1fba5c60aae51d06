//! Where each page is: one word a page, one table of blocks.
//!
//! A *block* is 2 MiB of address space. It gets a record the first time anything in it migrates, and keeps it: 13
//! bytes a page. A page without a record, or whose word says [`Place::Cpu`], is where the kernel says it is: resident,
//! swapped, or never touched.
//!
//! The lowest bits of a word are the page's lock. Whoever wants to move a page, or change what its word says, holds it
//! (see [`Transit`]); everybody else may read. A CPU fault on a locked page does not wait in the handler: it leaves a
//! mark, and the holder wakes the faulting thread when it lets go, which faults again if it still must.
//!
//! ```text
//!            MOVE out              copy to frames
//!   Cpu ----------------> Staged ------------------> Device
//!    ^                      |                          |
//!    |      MOVE home       |    copy to staging,      | device died
//!    +----------------------+    MOVE home             v
//!    +------------------------------------------- Poisoned
//! ```
//!
//! From the frames of a device that the CPU can address, pages are mapped into the program (see [`crate::coherent`]). They
//! count as away all the same: what happens to them is the engine's to know.
//!
//! Transitions happen under the page's lock only. `Staged` is a state of rest: a page may stay there for long (set
//! aside to see whether it is touched, or taken by a device for exclusive access).

use std::{
    sync::atomic::{
        AtomicU8, AtomicU32, AtomicU64,
        Ordering::{AcqRel, Acquire, Relaxed, Release},
    },
    time::{Duration, Instant},
};

use uhmm_sys::{
    Errno,
    addr::{BLOCK_PAGES, BLOCK_SHIFT, PAGE_SHIFT, PageRange, TASK_SIZE, VirtAddr},
    arena,
    say::{Files, say},
};

use crate::{
    device::{DevPfn, DeviceId},
    gate::pause,
    page_set::{PageSet, Run},
    staging::Slot,
    trace::Why,
};

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Where the kernel's page table says.
    Cpu,
    /// In staging: still in RAM, but not mapped in the program.
    Staged {
        slot: Slot,
        /// The device that has the page for itself, if any.
        exclusive: Option<DeviceId>,
    },
    /// In a frame of a device, out of the CPU's reach.
    Device { device: DeviceId, pfn: DevPfn },
    /// In a frame of a device and mapped in the program (see [`crate::coherent`]).
    Coherent { device: DeviceId, pfn: DevPfn },
    /// Its bytes went down with a device.
    Poisoned { device: DeviceId },
}

/// A page's word: place, lock and wait mark.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word(u64);

const TAG_MASK: u64 = 0b111;
const TAG_CPU: u64 = 0;
const TAG_STAGED: u64 = 1;
const TAG_DEVICE: u64 = 2;
const TAG_POISONED: u64 = 3;
const TAG_COHERENT: u64 = 4;
const LOCKED: u64 = 1 << 3;
const WAITED: u64 = 1 << 4;
const EXCLUSIVE: u64 = 1 << 5;
const DEVICE_SHIFT: u32 = 8;
const NUMBER_SHIFT: u32 = 16;

impl Word {
    pub(crate) fn of(place: Place) -> Self {
        let number = |n: u32| u64::from(n) << NUMBER_SHIFT;
        let device = |d: DeviceId| u64::from(d.0) << DEVICE_SHIFT;
        Self(match place {
            Place::Cpu => TAG_CPU,
            Place::Staged { slot, exclusive } => {
                TAG_STAGED | number(slot.number()) | exclusive.map_or(0, |d| EXCLUSIVE | device(d))
            }
            Place::Device { device: d, pfn } => TAG_DEVICE | device(d) | number(pfn.get()),
            Place::Coherent { device: d, pfn } => TAG_COHERENT | device(d) | number(pfn.get()),
            Place::Poisoned { device: d } => TAG_POISONED | device(d),
        })
    }

    pub(crate) fn place(self) -> Place {
        #[expect(clippy::cast_possible_truncation, reason = "the masks leave 8 and 32 bits")]
        let (device, number) = (DeviceId((self.0 >> DEVICE_SHIFT) as u8), (self.0 >> NUMBER_SHIFT) as u32);
        match self.0 & TAG_MASK {
            TAG_CPU => Place::Cpu,
            TAG_STAGED => Place::Staged {
                slot: Slot::from_number(number),
                exclusive: (self.0 & EXCLUSIVE != 0).then_some(device),
            },
            TAG_DEVICE => Place::Device { device, pfn: DevPfn::new(number) },
            TAG_COHERENT => Place::Coherent { device, pfn: DevPfn::new(number) },
            TAG_POISONED => Place::Poisoned { device },
            _ => unreachable!("page word {:#x} has no meaning", self.0),
        }
    }

    pub(crate) const fn locked(self) -> bool {
        self.0 & LOCKED != 0
    }

    pub(crate) const fn waited(self) -> bool {
        self.0 & WAITED != 0
    }

    /// Whether the page is the kernel's alone.
    pub(crate) const fn is_cpu(self) -> bool {
        self.0 & TAG_MASK == TAG_CPU
    }

    /// Whether the kernel's page table says where the page is.
    pub(crate) const fn is_mapped(self) -> bool {
        matches!(self.0 & TAG_MASK, TAG_CPU | TAG_COHERENT)
    }
}

impl std::fmt::Debug for Word {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.place())?;
        if self.locked() {
            f.write_str(" locked")?;
        }
        if self.waited() {
            f.write_str(" waited")?;
        }
        Ok(())
    }
}

/// What a fault found when it came upon a locked page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    /// The mark is left: the holder of the lock will wake the page.
    Left,
    /// The lock is gone by now: look again.
    Unlocked,
}

/// How often more the hand of reclaim passes a page by that was touched while it was set aside.
const HEAT_STEP: u8 = 8;
/// How often at most: what was used much and is used no more has to go in the end.
const HEAT_MAX: u8 = 24;

/// How long a page may be held before the user is told.
const PATIENCE: Duration = Duration::from_secs(60);

/// How many pages away, the base address and the policy's words of a block.
const HEAD_WORDS: usize = 8;
const HEAD_BASE: usize = 0;
const HEAD_AWAY: usize = 1;
const HEAD_REGISTRATION: usize = 2;
const HEAD_POLICY: usize = 3;

/// A block's record. Cheap to copy: it is a set of references into the arena.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Block {
    base: VirtAddr,
    words: &'static [AtomicU64; BLOCK_PAGES],
    since: &'static [AtomicU32; BLOCK_PAGES],
    heat: &'static [AtomicU8; BLOCK_PAGES],
    head: &'static [AtomicU64; HEAD_WORDS],
}

impl Block {
    pub(crate) const fn base(&self) -> VirtAddr {
        self.base
    }

    pub(crate) const fn page(&self, i: usize) -> VirtAddr {
        VirtAddr::new(self.base.get() + ((i as u64) << PAGE_SHIFT))
    }

    pub(crate) fn run(&self, run: Run) -> PageRange {
        PageRange::new(self.page(run.first), run.bytes()).expect("a block's pages are user addresses")
    }

    pub(crate) fn word(&self, i: usize) -> Word {
        Word(self.words[i].load(Acquire))
    }

    /// Takes page `i`'s lock if it is free, and returns what its word said.
    fn try_lock(&self, i: usize) -> Result<Place, Word> {
        let mut word = self.words[i].load(Relaxed);
        loop {
            if word & LOCKED != 0 {
                return Err(Word(word));
            }
            match self.words[i].compare_exchange_weak(word, word | LOCKED, AcqRel, Relaxed) {
                Ok(_) => return Ok(Word(word).place()),
                Err(now) => word = now,
            }
        }
    }

    /// Leaves a mark that a CPU thread waits for locked page `i`.
    pub(crate) fn mark_waited(&self, i: usize) -> Mark {
        let mut word = self.words[i].load(Relaxed);
        loop {
            if word & LOCKED == 0 {
                return Mark::Unlocked;
            }
            match self.words[i].compare_exchange_weak(word, word | WAITED, AcqRel, Relaxed) {
                Ok(_) => return Mark::Left,
                Err(now) => word = now,
            }
        }
    }

    /// Lets page `i` go; returns whether somebody waits for it.
    fn unlock(&self, i: usize, place: Place) -> bool {
        self.change(i, place, |_| Word::of(place)).waited()
    }

    /// Changes the word of page `i`, which the caller holds, and the count of those away with it.
    fn change(&self, i: usize, place: Place, to: impl Fn(Word) -> Word) -> Word {
        let (held, leaves) = (self.word(i), !matches!(place, Place::Cpu));
        assert!(held.locked(), "page {} was changed by somebody who did not hold it", self.page(i));
        if held.is_cpu() && leaves {
            self.head[HEAD_AWAY].fetch_add(1, AcqRel);
        }
        let mut old = held;
        while let Err(seen) = self.words[i].compare_exchange_weak(old.0, to(old).0, AcqRel, Relaxed) {
            old = Word(seen);
        }
        if !held.is_cpu() && !leaves {
            self.head[HEAD_AWAY].fetch_sub(1, AcqRel);
        }
        old
    }

    /// Tells the user each minute what somebody waits for: that a page is let go. Most likely its device does not answer; to
    /// give up would lose the page.
    pub(crate) fn note_wait(&self, i: usize, spins: u32, start: &mut Instant) {
        if spins >= 8192 && start.elapsed() >= PATIENCE {
            *start = Instant::now();
            let (page, word) = (self.page(i), self.word(i));
            say(
                Files::Own,
                format_args!("page {page} ({word:?}) is waited for since a minute: does its device answer?"),
            );
        }
    }

    /// How many pages of the block are away: never fewer than that.
    pub(crate) fn away(&self) -> u64 {
        self.head[HEAD_AWAY].load(Acquire)
    }

    /// The pages that are away, or that somebody holds: those may be on their way out, and not count as away yet.
    ///
    /// A page that leaves is held first and away afterwards. One look at its word sees one or the other, two looks may
    /// see neither.
    pub(crate) fn unsettled(&self) -> PageSet {
        let at_rest = |word: Word| word.is_cpu() && !word.locked();
        (0..BLOCK_PAGES).filter(|&i| !at_rest(self.word(i))).collect()
    }

    /// In a forked child, before any of its engine threads runs: gives page `i` a place, whoever held its lock.
    pub(crate) fn settle_in_child(&self, i: usize, place: Place) {
        self.words[i].store(Word::of(place).0, Release);
    }

    /// In a forked child, before any of its engine threads runs: makes the head agree with the words.
    pub(crate) fn recount_in_child(&self) {
        let away = self.words.iter().filter(|w| !Word(w.load(Relaxed)).is_cpu()).count();
        self.head[HEAD_AWAY].store(away as u64, Release);
        self.head[HEAD_REGISTRATION].store(0, Release);
    }

    /// Since when page `i` is where it is, and why.
    pub(crate) fn history(&self, i: usize) -> (u32, Why) {
        let packed = self.since[i].load(Relaxed);
        (packed >> 4, Why::from_bits(packed & 0xf))
    }

    /// Whether the last that happened to page `i` is `what`, and not before `ticks`.
    fn happened_since(&self, i: usize, what: Why, ticks: u32) -> bool {
        let (at, why) = self.history(i);
        // Ticks have 28 bits; a time that lies more than half of that ahead lies behind.
        why == what && at.wrapping_sub(ticks) & 0x0fff_ffff < 0x0800_0000
    }

    /// Whether the program discarded page `i` after `ticks`, and nothing has moved it since.
    pub(crate) fn is_discarded_since(&self, i: usize, ticks: u32) -> bool {
        self.happened_since(i, Why::Discarded, ticks)
    }

    /// Notes that page `i` was touched while it was set aside.
    pub(crate) fn warm(&self, i: usize) {
        let heat = &self.heat[i];
        heat.store((heat.load(Relaxed) + HEAT_STEP).min(HEAT_MAX), Relaxed);
    }

    /// Takes a little of page `i`'s warmth, and says whether there was any.
    pub(crate) fn cool(&self, i: usize) -> bool {
        let heat = self.heat[i].load(Relaxed);
        self.heat[i].store(heat.saturating_sub(1), Relaxed);
        heat != 0
    }

    /// Whether page `i` was set aside after `ticks`, to see whether it is cold.
    pub(crate) fn was_set_aside_after(&self, i: usize, ticks: u32) -> bool {
        self.happened_since(i, Why::Cold, ticks.wrapping_add(1))
    }

    /// Records that page `i` changed places at `ticks` (see `trace::ticks`).
    pub(crate) fn set_history(&self, i: usize, ticks: u32, why: Why) {
        self.since[i].store(ticks << 4 | why.bits(), Relaxed);
    }

    /// The policy's word of this block.
    pub(crate) fn policy(&self) -> &'static AtomicU64 {
        &self.head[HEAD_POLICY]
    }

    /// Holds the block's registration lock: between checking that nothing is away and unregistering, or between
    /// registering and moving pages out, nobody may do the other.
    ///
    /// # Locking
    /// A spin lock over one or two system calls. Taken inside the gate and under page locks; nothing is taken under it.
    pub(crate) fn lock_registration(&self) -> RegistrationLock {
        let word = &self.head[HEAD_REGISTRATION];
        let mut spins = 0;
        while word.compare_exchange_weak(0, 1, Acquire, Relaxed).is_err() {
            pause(&mut spins);
        }
        RegistrationLock(word)
    }

    /// As [`Block::lock_registration`], where it is free.
    pub(crate) fn try_lock_registration(&self) -> Option<RegistrationLock> {
        let word = &self.head[HEAD_REGISTRATION];
        word.compare_exchange(0, 1, Acquire, Relaxed).ok().map(|_| RegistrationLock(word))
    }
}

/// See [`Block::lock_registration`].
#[derive(Debug)]
pub(crate) struct RegistrationLock(&'static AtomicU64);

impl Drop for RegistrationLock {
    fn drop(&mut self) {
        self.0.store(0, Release);
    }
}

/// The locks that one operation holds on pages of one block.
///
/// Pages are let go one by one with [`Transit::put`], and the rest on drop, unchanged: an operation that stops half-way
/// leaves every page in a state of rest. The pages whose faults wait are collected; the owner wakes them
/// ([`Transit::take_waiting`]) after the locks are gone.
#[derive(Debug)]
pub(crate) struct Transit<'w> {
    block: Block,
    held: PageSet,
    waiting: PageSet,
    waker: &'w dyn Waker,
}

/// Wakes threads that wait in a fault.
pub(crate) trait Waker: std::fmt::Debug {
    /// Wakes every thread that waits on a page of `range`.
    fn wake(&self, range: PageRange);
}

impl<'w> Transit<'w> {
    pub(crate) fn new(block: Block, waker: &'w dyn Waker) -> Self {
        Self { block, held: PageSet::EMPTY, waiting: PageSet::EMPTY, waker }
    }

    pub(crate) const fn block(&self) -> Block {
        self.block
    }

    pub(crate) const fn held(&self) -> &PageSet {
        &self.held
    }

    /// Takes page `i` if its lock is free.
    pub(crate) fn try_hold(&mut self, i: usize) -> Result<Place, Word> {
        let place = self.block.try_lock(i)?;
        self.held.insert(i);
        Ok(place)
    }

    /// Takes page `i`, waiting for its holder.
    ///
    /// Only for whoever holds no page that the other might want: the reader while it applies an event, or an operation
    /// that goes up through the pages of one block.
    ///
    /// Holders let go when the device that copies for them returns.
    pub(crate) fn hold(&mut self, i: usize) -> Place {
        let mut start = Instant::now();
        let mut spins = 0;
        loop {
            match self.try_hold(i) {
                Ok(place) => return place,
                Err(_) => {
                    pause(&mut spins);
                    self.block.note_wait(i, spins, &mut start);
                }
            }
        }
    }

    /// Where held page `i` is.
    pub(crate) fn place(&self, i: usize) -> Place {
        debug_assert!(self.held.has(i));
        self.block.word(i).place()
    }

    /// Changes where held page `i` is, and keeps holding it.
    pub(crate) fn set(&mut self, i: usize, place: Place) {
        debug_assert!(self.held.has(i));
        // The mark of who waits must survive.
        self.block.change(i, place, |old| Word(Word::of(place).0 | LOCKED | old.0 & WAITED));
    }

    /// Lets page `i` go at `place`.
    pub(crate) fn put(&mut self, i: usize, place: Place) {
        assert!(self.held.has(i), "page {} is not held by this operation", self.block.page(i));
        self.held.remove(i);
        if self.block.unlock(i, place) {
            self.waiting.insert(i);
        }
    }

    /// Lets page `i` go where it is.
    pub(crate) fn put_back(&mut self, i: usize) {
        let place = self.place(i);
        self.put(i, place);
    }

    /// Lets all pages go where they are.
    pub(crate) fn put_all_back(&mut self) {
        for i in self.held.iter() {
            self.put_back(i);
        }
    }
}

impl Drop for Transit<'_> {
    fn drop(&mut self) {
        self.put_all_back();
        for run in self.waiting.runs() {
            self.waker.wake(self.block.run(run));
        }
    }
}

const LEAF_SHIFT: u32 = 13;
const LEAF_ENTRIES: usize = 1 << LEAF_SHIFT;
const ROOT_ENTRIES: usize = (TASK_SIZE >> (BLOCK_SHIFT + LEAF_SHIFT)) as usize;
const MAX_LEAVES: usize = 1024;

/// All blocks that have a record. Lookup takes two loads and no lock.
#[derive(Debug)]
pub(crate) struct Blocks {
    /// Leaf number + 1 for each 16 GiB, 0 where there is none.
    root: &'static [AtomicU32],
    /// Block number + 1 for each block, 0 where there is none.
    leaves: &'static [[AtomicU32; LEAF_ENTRIES]],
    leaves_used: AtomicU32,
    words: &'static [[AtomicU64; BLOCK_PAGES]],
    since: &'static [[AtomicU32; BLOCK_PAGES]],
    heat: &'static [[AtomicU8; BLOCK_PAGES]],
    heads: &'static [[AtomicU64; HEAD_WORDS]],
    used: AtomicU32,
}

/// No room for another block's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NoRecord;

impl Blocks {
    /// Makes room for `capacity` blocks. The memory is committed as blocks come into use.
    pub(crate) fn new(capacity: usize) -> Result<Self, Errno> {
        Ok(Self {
            root: arena::slice(ROOT_ENTRIES)?,
            leaves: arena::slice(MAX_LEAVES)?,
            leaves_used: AtomicU32::new(0),
            words: arena::slice(capacity)?,
            since: arena::slice(capacity)?,
            heat: arena::slice(capacity)?,
            heads: arena::slice(capacity)?,
            used: AtomicU32::new(0),
        })
    }

    /// The records as a forked child has them: its own copy of the same memory.
    pub(crate) fn inherit(&self) -> Self {
        Self {
            root: self.root,
            leaves: self.leaves,
            leaves_used: AtomicU32::new(self.leaves_used.load(Acquire)),
            words: self.words,
            since: self.since,
            heat: self.heat,
            heads: self.heads,
            used: AtomicU32::new(self.used.load(Acquire)),
        }
    }

    fn slot(addr: VirtAddr) -> Option<(usize, usize)> {
        (addr.get() < TASK_SIZE).then(|| {
            let n = (addr.get() >> BLOCK_SHIFT) as usize;
            (n >> LEAF_SHIFT, n & (LEAF_ENTRIES - 1))
        })
    }

    fn at(&self, number: u32) -> Block {
        let n = number as usize;
        Block {
            base: VirtAddr::new(self.heads[n][HEAD_BASE].load(Acquire)),
            words: &self.words[n],
            since: &self.since[n],
            heat: &self.heat[n],
            head: &self.heads[n],
        }
    }

    /// The record of the block that holds `addr`.
    pub(crate) fn find(&self, addr: VirtAddr) -> Option<Block> {
        let (root, leaf) = Self::slot(addr)?;
        let leaf_number = self.root[root].load(Acquire).checked_sub(1)?;
        let number = self.leaves[leaf_number as usize][leaf].load(Acquire).checked_sub(1)?;
        Some(self.at(number))
    }

    /// As [`Blocks::find`]; makes the record where there is none.
    ///
    /// `spare` records are left for callers that cannot do without (an event that moves pages).
    pub(crate) fn find_or_add(&self, addr: VirtAddr, spare: u32) -> Result<Block, NoRecord> {
        if let Some(block) = self.find(addr) {
            return Ok(block);
        }
        let (root, leaf) = Self::slot(addr).ok_or(NoRecord)?;
        let leaf_number = match self.root[root].load(Acquire).checked_sub(1) {
            Some(n) => n,
            None => {
                let fresh = take(&self.leaves_used, MAX_LEAVES, 0)?;
                match self.root[root].compare_exchange(0, fresh + 1, AcqRel, Acquire) {
                    Ok(_) => fresh,
                    // Somebody else was first; the leaf taken here stays unused, which costs address space only.
                    Err(theirs) => theirs - 1,
                }
            }
        };
        let fresh = take(&self.used, self.words.len(), spare)?;
        self.heads[fresh as usize][HEAD_BASE].store(addr.block().get(), Release);
        let number = match self.leaves[leaf_number as usize][leaf].compare_exchange(0, fresh + 1, AcqRel, Acquire) {
            Ok(_) => fresh,
            Err(theirs) => theirs - 1,
        };
        Ok(self.at(number))
    }

    /// Calls `f` for each block with a record that shares an address with `range`, ascending. Stops when `f` says so.
    pub(crate) fn for_each(&self, range: PageRange, mut f: impl FnMut(Block) -> std::ops::ControlFlow<()>) {
        let first = (range.start().get() >> BLOCK_SHIFT) as usize;
        let last = ((range.end().get() - 1) >> BLOCK_SHIFT) as usize;
        let mut n = first;
        while n <= last {
            let Some(leaf) = self.root[n >> LEAF_SHIFT].load(Acquire).checked_sub(1) else {
                n = (n | (LEAF_ENTRIES - 1)) + 1;
                continue;
            };
            if let Some(number) = self.leaves[leaf as usize][n & (LEAF_ENTRIES - 1)].load(Acquire).checked_sub(1)
                && f(self.at(number)).is_break()
            {
                return;
            }
            n += 1;
        }
    }
}

/// Takes the next number below `limit - spare`.
fn take(counter: &AtomicU32, limit: usize, spare: u32) -> Result<u32, NoRecord> {
    counter
        .fetch_update(AcqRel, Acquire, |n| (n as usize + (spare as usize) < limit).then_some(n + 1))
        .map_err(|_| NoRecord)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    use super::*;

    #[derive(Debug)]
    struct NoWaker;

    impl Waker for NoWaker {
        fn wake(&self, _: PageRange) {}
    }

    #[test]
    fn a_warm_page_is_passed_by_and_cools() {
        arena::init(256 << 20).unwrap();
        let block = Blocks::new(1).unwrap().find_or_add(VirtAddr::new(0x4000_0000), 0).unwrap();
        assert!(!block.cool(3), "nothing is known of it");
        block.warm(3);
        assert!(!block.cool(4));
        assert_eq!((0..100).take_while(|_| block.cool(3)).count(), usize::from(HEAT_STEP));
        (0..100).for_each(|_| block.warm(3));
        assert_eq!((0..100).take_while(|_| block.cool(3)).count(), usize::from(HEAT_MAX));
    }

    #[test]
    fn a_page_on_its_way_out_is_never_taken_for_one_at_rest() {
        arena::init(256 << 20).unwrap();
        let block = Blocks::new(1).unwrap().find_or_add(VirtAddr::new(0x4000_0000), 0).unwrap();
        let (registered, done) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|s| {
            // As `release_block` does.
            s.spawn(|| {
                while !done.load(Relaxed) {
                    let _registration = block.lock_registration();
                    if block.unsettled().is_empty() {
                        registered.store(false, SeqCst);
                    }
                }
            });
            // As `lift_out` does: the page does not count as away before the registration lock is free again.
            for _ in 0..20_000 {
                let mut transit = Transit::new(block, &NoWaker);
                transit.hold(BLOCK_PAGES - 1);
                let registration = block.lock_registration();
                registered.store(true, SeqCst);
                drop(registration);
                transit.put(BLOCK_PAGES - 1, Place::Staged { slot: Slot::from_number(1), exclusive: None });
                transit.hold(BLOCK_PAGES - 1);
                let lost = !registered.load(SeqCst);
                transit.put(BLOCK_PAGES - 1, Place::Cpu);
                if lost {
                    done.store(true, Relaxed);
                    panic!("the block was released while its page was away");
                }
            }
            done.store(true, Relaxed);
        });
    }

    #[test]
    fn what_was_set_aside_later_is_told_apart() {
        arena::init(256 << 20).unwrap();
        let block = Blocks::new(1).unwrap().find_or_add(VirtAddr::new(0x4000_0000), 0).unwrap();
        block.set_history(0, 7, Why::Cold);
        assert!(!block.was_set_aside_after(0, 7));
        assert!(block.was_set_aside_after(0, 6));
        block.set_history(0, 7, Why::CpuFault);
        assert!(!block.was_set_aside_after(0, 6), "it came home");
    }

    #[test]
    fn a_word_keeps_what_it_is_told() {
        for place in [
            Place::Cpu,
            Place::Staged { slot: Slot::from_number(0xdead_beef), exclusive: None },
            Place::Staged { slot: Slot::from_number(7), exclusive: Some(DeviceId(0)) },
            Place::Device { device: DeviceId(7), pfn: DevPfn::new(u32::MAX) },
            Place::Coherent { device: DeviceId(1), pfn: DevPfn::new(77) },
            Place::Poisoned { device: DeviceId(3) },
        ] {
            assert_eq!(Word::of(place).place(), place);
            assert!(!Word::of(place).locked() && !Word::of(place).waited());
        }
    }
}
