//! The way out where `MOVE` is not to be had: the pages are lifted out of their mapping.
//!
//! Kernels before 6.8 have no `UFFDIO_MOVE`, and no kernel moves pages of a mapping that is not writable. There
//! `mremap` with `MREMAP_DONTUNMAP` takes the pages to the *hop*, a block of the engine's memory, and leaves the mapping
//! behind as a hole. It does so at once: whoever touches a page afterwards faults and waits. Then the bytes are copied
//! from the hop to staging.
//!
//! `MOVE` refuses while the address space is changing; `mremap` does not know. A change that comes after the lift finds
//! the pages away, as it would at any time. One that came before it, since the engine last looked, may have put another
//! mapping there. So the gate is shut to the reader from that look until the pages are gone: whoever unmaps something
//! meanwhile stays in the kernel. Another thread could still map something new in the same instant. An `mremap` of
//! registered memory raises an event, and the caller waits until it is read: a new mapping is not registered and raises
//! none, and its pages are put back.
//!
//! Locked memory would not be locked any more after an `mremap`. `MOVE` takes its pages to a hop that is locked too.
//!
//! What this way does not see: pages pinned for I/O that a device is still going to write.

use std::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst},
};

use uhmm_sys::{
    Errno,
    addr::{BLOCK_PAGES, BLOCK_SIZE, PAGE_SIZE, PageRange, VirtAddr},
    arena, futex,
    maps::{Prot, Vma},
    mem::HostBytes,
    pagemap::Page,
    uffd::{RegisterMode, Wake},
};

use crate::{
    block::{Block, Place, Transit},
    engine::Core,
    gate::pause,
    migrate::{Berth, Pass, refusal},
    os::{MANAGED, Os},
    page_set::{PageSet, Run},
    thread::Ctx,
};

// The doorkeeper's states: it turns ASKED into one of the next two, and DONE into IDLE; the lifting thread does the rest.
const IDLE: u32 = 0;
const ASKED: u32 = 1;
const INSIDE: u32 = 2;
const REFUSED: u32 = 3;
const LIFTING: u32 = 4;
const DONE: u32 = 5;

/// The hop, and what the reader knows of who uses it. One thread at a time does.
#[derive(Debug)]
pub(crate) struct Lifts {
    hop: PageRange,
    /// The hop and a page behind it: one mapping while no pages stand there.
    bed: PageRange,
    busy: AtomicBool,
    /// Whether the event of the lift was read.
    told: AtomicBool,
    /// What the doorkeeper is to do, or does; see [`Core::run_doorkeeper`].
    door: AtomicU32,
    /// A page that is there when a lift is done.
    probe: AtomicU64,
    /// Counts the program's changes of its mappings, as they are read.
    changes: AtomicU64,
    /// Counts the messages that the reader has read and told apart.
    looks: AtomicU64,
}

impl Lifts {
    pub(crate) fn new() -> Result<Self, Errno> {
        arena::pages(BLOCK_SIZE + PAGE_SIZE, BLOCK_SIZE).map(Self::at)
    }

    /// In a forked child: the same addresses, used by nobody.
    pub(crate) fn inherit(&self) -> Self {
        Self::at(self.bed)
    }

    fn at(bed: PageRange) -> Self {
        let hop = PageRange::block_of(bed.start());
        let count = || AtomicU64::new(0);
        let (door, probe) = (AtomicU32::new(IDLE), count());
        let flag = || AtomicBool::new(false);
        Self { hop, bed, busy: flag(), told: flag(), door, probe, changes: count(), looks: count() }
    }

    /// Where a run of a block's pages stands in the hop: at the same offset, so that a huge folio stays whole.
    fn place(&self, run: Run) -> PageRange {
        let start = self.hop.start().add(run.first as u64 * PAGE_SIZE);
        PageRange::new(start, run.bytes()).expect("the hop is a block")
    }

    /// Has the doorkeeper go inside the gate. Returns whether it did.
    fn ask_doorkeeper(&self) -> bool {
        let mut spins = 0;
        while self.door.compare_exchange(IDLE, ASKED, AcqRel, Acquire).is_err() {
            pause(&mut spins);
        }
        let _ = futex::wake(&self.door, 1);
        let mut spins = 0;
        loop {
            match self.door.load(Acquire) {
                ASKED => pause(&mut spins),
                INSIDE => return true,
                _ => {
                    self.door.store(DONE, Release);
                    return false;
                }
            }
        }
    }

    /// Whether a lift is under way, whose event must be read.
    pub(crate) fn any(&self) -> bool {
        self.busy.load(SeqCst)
    }

    /// The reader has read that memory moved. Returns whether that was a lift.
    pub(crate) fn moved(&self, from: VirtAddr, to: VirtAddr) -> bool {
        let own = self.hop.contains(from) || self.hop.contains(to);
        if own {
            self.told.store(true, SeqCst);
        }
        own
    }

    /// The reader has read that the program changed its mappings.
    pub(crate) fn changed(&self) {
        self.changes.fetch_add(1, SeqCst);
    }

    /// Grows with every change of the mappings that is read.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(SeqCst)
    }

    /// Says that the reader has told its last message apart.
    pub(crate) fn looked(&self) {
        self.looks.fetch_add(1, SeqCst);
    }
}

/// The use of the hop; it is empty again when this is dropped.
struct Hop<'a, O: Os> {
    core: &'a Core<O>,
    used: PageRange,
}

impl<O: Os> Drop for Hop<'_, O> {
    fn drop(&mut self) {
        // First the registration, so that emptying it raises no event. Not registered is as good.
        let _ = self.core.os.unregister(self.used);
        let _ = self.core.os.renew(self.core.lifts.bed);
        self.core.lifts.busy.store(false, SeqCst);
    }
}

impl<O: Os> Core<O> {
    /// Takes held pages of a range out without `MOVE` that was registered when there had been so many `changes`. Returns
    /// those that are gone from the program (holes included), the others stay in `left`; and why it stopped, if it did.
    pub(crate) fn lift_out(
        &'static self,
        ctx: &Ctx,
        transit: &mut Transit<'_>,
        berth: Berth,
        changes: u64,
        left: &mut PageSet,
        pass: &mut Pass,
    ) -> (PageSet, Option<Errno>) {
        let mut taken = PageSet::EMPTY;
        let mut stop = None;
        'runs: for run in left.runs() {
            let mut first = run.first;
            while first < run.first + run.count {
                let rest = Run { first, count: run.first + run.count - first };
                match self.lift_some(ctx, transit, berth, changes, rest, &mut taken, pass) {
                    Ok(count) => first += count,
                    Err(error) => {
                        stop = Some(error);
                        break 'runs;
                    }
                }
            }
        }
        *left = left.minus(&taken);
        (taken, stop)
    }

    /// Takes the first pages of `run` out, those of one mapping, and says how many it dealt with. Adds to `taken` what is
    /// gone from the program, and to `pass` what is to be tried again.
    #[expect(clippy::too_many_arguments, reason = "the pass's inputs and its two results")]
    fn lift_some(
        &'static self,
        ctx: &Ctx,
        transit: &mut Transit<'_>,
        berth: Berth,
        changes: u64,
        run: Run,
        taken: &mut PageSet,
        pass: &mut Pass,
    ) -> Result<usize, Errno> {
        let wanted = transit.block().run(run);
        let vma = self.os.vma(wanted.start())?.filter(|vma| refusal(vma).is_none()).ok_or(Errno::SRCH)?;
        let part = vma.range.intersection(wanted).filter(|part| part.start() == wanted.start()).ok_or(Errno::SRCH)?;
        let run = Run { first: run.first, count: part.pages() };
        if self.os.is_locked(part) {
            let ordinary = vma.prot == Prot::READ | Prot::WRITE && self.os.has_move();
            return if ordinary { self.hop_locked(ctx, transit, berth, run, taken, pass) } else { Err(Errno::INVAL) };
        }
        let (run, probe) = match self.survey(berth, run, transit.block())? {
            // What is there is no page (a guard, say): it stays.
            (0, _) => return Ok(1),
            (count, None) => {
                // Nothing but holes: they stay so while they are held, if that is what they are.
                let _inside = self.gate.enter(ctx.slot).map_err(|_| Errno::AGAIN)?;
                if !self.is_known(changes) {
                    return Err(Errno::AGAIN);
                }
                let (count, there) = self.survey(berth, Run { first: run.first, count }, transit.block())?;
                if there.is_none() {
                    *taken = taken.or(&PageSet::span(run.first, run.first + count));
                }
                return if there.is_some() || count == 0 { Err(Errno::AGAIN) } else { Ok(count) };
            }
            (count, Some(probe)) => (Run { first: run.first, count }, probe),
        };
        let part = transit.block().run(run);
        let hop = self.hop(run);
        self.lift(part, hop.used, probe, changes)?;
        if self.is_foreign(hop.used, probe) {
            // At once, before its owner misses them; where that fails they go back by copy, below. Nothing but what was there:
            // the owner of a mapping that was still empty may have filled it by now.
            let back = |there: Run| self.os.lift(self.lifts.place(there), transit.block().run(there)).is_ok();
            if self.in_hop(run).runs().all(back) {
                return Err(Errno::AGAIN);
            }
        }
        let ours = self.was_told();
        let present = self.in_hop(run);
        let (mut readable, mut stuck) = (PageSet::EMPTY, PageSet::EMPTY);
        for there in present.runs() {
            let mut first = there.first;
            while first < there.first + there.count {
                let rest = Run { first, count: there.first + there.count - first };
                let read =
                    self.os.read(self.lifts.place(rest).start(), self.staging.bytes(berth.slot(first), rest.count));
                let until = first + usize::try_from(read.done / PAGE_SIZE).expect("at most a block");
                (first..until).for_each(|i| readable.insert(i));
                first = until;
                if read.stop.is_some() {
                    // It became so a moment ago, and goes back as it is. It has no bytes: where it cannot, a touch is to be
                    // a signal on. The others are not given up for it.
                    let one = Run { first, count: 1 };
                    let home = transit.block().run(one);
                    if self.os.lift(self.lifts.place(one), home).is_err() {
                        let _ = self.os.poison(home);
                    }
                    stuck.insert(first);
                    first += 1;
                }
            }
        }
        if !ours {
            readable.iter().for_each(|i| self.put_back(transit.block().page(i), self.staging.bytes(berth.slot(i), 1)));
            return Err(Errno::AGAIN);
        }
        for i in readable.iter() {
            transit.set(i, Place::Staged { slot: berth.slot(i), exclusive: None });
        }
        *taken = taken.or(&PageSet::span(run.first, run.first + run.count).minus(&stuck));
        Ok(run.count)
    }

    /// Lifts `part`, of which page number `probe` is there, to `to`. The caller has the hop.
    fn lift(&self, part: PageRange, to: PageRange, probe: usize, changes: u64) -> Result<(), Errno> {
        let lifts = &self.lifts;
        if !lifts.ask_doorkeeper() {
            return Err(Errno::AGAIN);
        }
        lifts.told.store(false, SeqCst);
        lifts.probe.store(to.start().add(probe as u64 * PAGE_SIZE).get(), Release);
        lifts.door.store(LIFTING, Release);
        let lifted = if self.is_known(changes) { self.os.lift(part, to) } else { Err(Errno::AGAIN) };
        lifts.door.store(DONE, Release);
        match lifted {
            // Another thread has cut the mapping.
            Err(Errno::FAULT) => Err(Errno::AGAIN),
            result => result,
        }
    }

    /// Whether nothing has changed since there had been so many `changes`. Where it has, what is at an address may be
    /// something that the books do not know yet. To be asked inside the gate.
    fn is_known(&self, changes: u64) -> bool {
        !self.os.is_changing() && self.lifts.changes() == changes
    }

    /// The doorkeeper's life: stands inside the gate from before a lift until it has happened.
    ///
    /// Meanwhile no event is read: a thread that changes mappings cannot go on. The lifting thread cannot stand there by
    /// itself, because it waits in the kernel until its event is read, long after it has lifted.
    pub(crate) fn run_doorkeeper(&'static self) {
        let ctx = self.new_ctx();
        let lifts = &self.lifts;
        // Whoever lifts waits for it. Without the privilege it is one among many.
        let _ = uhmm_sys::thread::set_nice(-20);
        while self.stop.load(Relaxed) == 0 {
            let seen = lifts.door.load(Acquire);
            if seen != ASKED {
                let _ = futex::wait(&lifts.door, seen, None);
                continue;
            }
            if let Ok(_inside) = self.gate.enter(ctx.slot) {
                lifts.door.store(INSIDE, Release);
                let mut spins = 0;
                while lifts.door.load(Acquire) != DONE && !self.has_lifted(spins % 64 == 63) {
                    pause(&mut spins);
                }
            } else {
                lifts.door.store(REFUSED, Release);
            }
            let mut spins = 0;
            while lifts.door.load(Acquire) != DONE {
                pause(&mut spins);
            }
            lifts.door.store(IDLE, Release);
        }
    }

    /// Whether the lift under way has happened. The page that was to tell may be gone since it was seen; with a `close`
    /// look, which takes longer, the mapping tells.
    fn has_lifted(&self, close: bool) -> bool {
        let lifts = &self.lifts;
        if lifts.door.load(Acquire) != LIFTING {
            return false;
        }
        let at = VirtAddr::new(lifts.probe.load(Acquire));
        // What is there at other times reaches beyond the hop.
        let is_lifted = |vma: Option<Vma>| vma.is_some_and(|vma| vma.range.end() <= lifts.hop.end());
        self.os.page(at).is_ok_and(Page::is_there) || close && self.os.vma(at).is_ok_and(is_lifted)
    }

    /// How many pages there are in `run` before the first that is there and has no bytes; and the number
    /// of the first of them that is no hole.
    fn survey(&self, berth: Berth, run: Run, block: Block) -> Result<(usize, Option<usize>), Errno> {
        let mut pages = [Page::empty(); BLOCK_PAGES];
        let pages = &mut pages[..run.count];
        self.os.scan(block.run(run), pages)?;
        // Swapped pages are read on trial.
        let is_stuck = |n: &usize| {
            let at = block.page(run.first + n);
            pages[*n].contains(Page::SWAPPED)
                && self.os.read(at, self.staging.bytes(berth.slot(run.first + n), 1)).stop.is_some()
        };
        let count = (0..run.count).find(is_stuck).unwrap_or(run.count);
        Ok((count, pages[..count].iter().position(|page| page.is_there())))
    }

    /// Waits until nobody uses the hop, and takes it for a run of pages.
    fn hop(&self, run: Run) -> Hop<'_, O> {
        let mut spins = 0;
        while self.lifts.busy.compare_exchange(false, true, AcqRel, Acquire).is_err() {
            pause(&mut spins);
        }
        Hop { core: self, used: self.lifts.place(run) }
    }

    /// The pages of `run` that stand in the hop. Without an answer all do: a hole costs a page of zeros then.
    fn in_hop(&self, run: Run) -> PageSet {
        let mut pages = [Page::empty(); BLOCK_PAGES];
        let pages = &mut pages[..run.count];
        let known = self.os.scan(self.lifts.place(run), pages).is_ok();
        run.pages().filter(|i| !known || pages[i - run.first].is_there()).collect()
    }

    /// Whether what was lifted to `to` was not registered, as far as that can be told at once.
    fn is_foreign(&self, to: PageRange, probe: usize) -> bool {
        // Where there is a page already a zero page is refused, but for another reason where nothing is registered.
        let at = PageRange::page_of(to.start().add(probe as u64 * PAGE_SIZE));
        (0..8)
            .map(|_| self.os.zero(at, Wake::Later).stop)
            .find(|&stop| stop != Some(Errno::AGAIN))
            .is_some_and(|stop| stop == Some(Errno::NOENT))
    }

    /// Whether the lift that was made raised an event.
    fn was_told(&self) -> bool {
        // It was read then, but the reader may not have said so yet. Until it does the gate is shut, and it looks at nothing
        // else.
        let lifts = &self.lifts;
        let looks = lifts.looks.load(SeqCst);
        let mut spins = 0;
        while !lifts.told.load(SeqCst) && !self.gate.is_open() && lifts.looks.load(SeqCst) == looks {
            pause(&mut spins);
        }
        lifts.told.load(SeqCst)
    }

    /// Puts a page of another mapping, lifted by mistake, back where it came from.
    fn put_back(&self, page: VirtAddr, bytes: HostBytes) {
        let mut spins = 0;
        loop {
            match self.os.copy(page, bytes, Wake::Later).stop {
                // Until all events have been read, which another thread does.
                Some(Errno::AGAIN) => pause(&mut spins),
                // Where this fails it has been unmapped.
                Some(Errno::NOENT) if self.os.register(PageRange::page_of(page), MANAGED).is_ok() => {}
                // Where one is there, it is newer.
                _ => return,
            }
        }
    }

    /// Takes pages of locked memory out by `MOVE`, through a hop that is locked too.
    fn hop_locked(
        &self,
        ctx: &Ctx,
        transit: &mut Transit<'_>,
        berth: Berth,
        run: Run,
        taken: &mut PageSet,
        pass: &mut Pass,
    ) -> Result<usize, Errno> {
        let hop = self.hop(run);
        self.os.lock_on_fault(hop.used).map_err(|_| Errno::INVAL)?;
        self.os.register(hop.used, RegisterMode::WP)?;
        let mut left = PageSet::span(run.first, run.first + run.count);
        let (mut moved, mut stop) = (PageSet::EMPTY, None);
        {
            let _inside = self.gate.enter(ctx.slot).map_err(|_| Errno::AGAIN)?;
            let _registration = transit.block().lock_registration();
            let to = |i| self.lifts.place(Run { first: i, count: 1 }).start();
            self.move_runs(transit.block(), &to, &mut left, &mut moved, pass, &mut stop);
            for i in moved.iter() {
                transit.set(i, Place::Staged { slot: berth.slot(i), exclusive: None });
            }
        }
        let present = self.in_hop(run);
        for i in moved.iter() {
            if !present.has(i) {
                transit.set(i, Place::Cpu);
                continue;
            }
            let there = self.lifts.place(Run { first: i, count: 1 });
            let there = HostBytes::in_arena(there.start(), PAGE_SIZE).expect("the hop is in the arena");
            HostBytes::copy_between(there, self.staging.bytes(berth.slot(i), 1));
        }
        *taken = taken.or(&moved);
        stop.map_or(Ok(run.count), Err)
    }
}
