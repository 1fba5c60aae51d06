//! A CPU thread touched a page that is not there.
//!
//! The thread waits in the kernel until the page is put in place or it is woken to look again. The handler never
//! waits for anybody who might wait for the program: it takes page locks only where they are free, and leaves a mark
//! otherwise.

use uhmm_sys::{
    Errno,
    addr::{BLOCK_PAGES, PAGE_SIZE, PageRange, VirtAddr},
    dispatch::Whereabouts,
    maps::Prot,
    pagemap::Page,
    uffd::Wake,
};

use crate::{
    block::{Block, Mark, Place, Transit},
    engine::Core,
    migrate::{SPARE_RECORDS, Stay},
    os::{MANAGED, Os},
    page_set::{PageSet, Run},
    policy,
    thread::Ctx,
    trace::{Counter, Why},
};

/// How often a fault is tried again while events are pending, before the thread is sent to fault anew.
const ATTEMPTS: u32 = 64;
/// The attempt before which it is looked whether the thread itself is what the events wait for.
const SUSPICIOUS: u32 = 8;
/// How many pages a first touch fills at least, where its neighbours were never touched either.
pub(crate) const ZERO_AROUND: usize = 64;

/// Whether a fault may be made to wait while reclaim is behind (see [`crate::parked`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Haste {
    /// Its thread, where the kernel says which, waits in the kernel for whoever answers it.
    CanWait(Option<u32>),
    /// The caller wants the page on return.
    Soon,
    Now,
}

/// What became of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Served {
    /// Its thread goes on, or whoever holds the page will wake it.
    Now,
    /// Reclaim will serve it.
    Later,
}

impl<O: Os> Core<O> {
    /// Serves the fault of a thread at `addr`, or sees to it that somebody wakes the thread.
    pub(crate) fn serve_fault(&'static self, ctx: &mut Ctx, addr: VirtAddr, haste: Haste) -> Served {
        // Registered memory without a record: a hole of a mapping that grew, or that `mremap` brought here. With a record
        // the whole block goes back to native faults.
        let Ok(block) = self.blocks.find_or_add(addr, SPARE_RECORDS) else {
            self.zero_alone(ctx, PageRange::page_of(addr));
            return Served::Now;
        };
        if self.hold_up(block, addr.page_in_block(), haste) {
            return Served::Later;
        }
        let thread = if let Haste::CanWait(thread) = haste { thread } else { None };
        self.serve_now(ctx, block, addr, thread);
        Served::Now
    }

    fn serve_now(&'static self, ctx: &mut Ctx, block: Block, addr: VirtAddr, thread: Option<u32>) {
        let (page, i) = (PageRange::page_of(addr), addr.page_in_block());
        // Of a coherent device, in a mapping that does not take its pages.
        let mut unmappable = false;
        for attempt in 0..ATTEMPTS {
            if attempt == SUSPICIOUS
                && let Some(thread) = thread
                && self.let_grow(ctx, block, addr, thread)
            {
                return;
            }
            let word = block.word(i);
            if word.locked() {
                match block.mark_waited(i) {
                    Mark::Left => return self.stats.add(Counter::FaultsWaited, 1),
                    Mark::Unlocked => continue,
                }
            }
            match word.place() {
                Place::Cpu => {
                    if self.fill_hole(ctx, block, i) {
                        return;
                    }
                }
                Place::Poisoned { .. } => {
                    if !self.poison(ctx, block, i) {
                        return self.os.wake(page);
                    }
                }
                // Mapped meanwhile.
                Place::Coherent { .. } => {
                    self.stats.add(Counter::FaultsStale, 1);
                    return self.os.wake(page);
                }
                Place::Device { .. } if !unmappable && self.is_mappable(block, i) => {
                    let window = policy::fault_window(block.policy(), i, |n| self.is_mappable(block, n));
                    let mapped = self.map_frames(ctx, block, &window);
                    if mapped.done.has(i) {
                        return self.stats.add(Counter::FaultsMapped, 1);
                    }
                    unmappable = mapped.refused.has(i);
                    if !mapped.again {
                        continue;
                    }
                }
                Place::Staged { .. } | Place::Device { .. } => {
                    let is_away = |n| !block.word(n).is_mapped() && !self.is_mappable(block, n);
                    let window = policy::fault_window(block.policy(), i, is_away);
                    let left_at = block.history(i).0;
                    let outcome =
                        self.bring_home(ctx, block, &window, |n| if n == i { Why::CpuFault } else { Why::FaultAround });
                    if outcome.home.has(i) {
                        if matches!(word.place(), Place::Staged { .. }) {
                            block.warm(i);
                        }
                        let away_ms = self.ticks_to_ms(self.ticks().wrapping_sub(left_at));
                        policy::came_home(block.policy(), self.now_ms(), away_ms);
                        return self.stats.add(Counter::FaultsHome, 1);
                    }
                    if !outcome.again && !outcome.busy.has(i) && !outcome.poisoned.has(i) {
                        // Unmapped meanwhile, or out of memory: the thread finds out for itself.
                        self.stats.add(Counter::FaultsStale, 1);
                        return self.os.wake(page);
                    }
                }
            }
            self.settle_events(ctx, attempt);
        }
        self.stats.add(Counter::FaultsStale, 1);
        self.os.wake(page);
    }

    /// Has the kernel fill what locked memory grows by at its end, if that is what `thread` faults for. Returns whether it is.
    ///
    /// An `mremap` that moves such memory fills it before it raises its event, and until that is read nothing can be installed. What
    /// was there before has moved already, and is told of later; behind it nothing has ever been, and it need not be registered.
    fn let_grow(&self, ctx: &Ctx, block: Block, addr: VirtAddr, thread: u32) -> bool {
        if !self.os.is_changing() || !self.os.is_in_mremap(thread) {
            return false;
        }
        let Ok(Some(vma)) = self.os.vma(addr) else { return false };
        let Ok(_inside) = self.gate.enter(ctx.slot) else { return false };
        let Some(_registration) = block.try_lock_registration() else { return false };
        // Another mapping may lie right behind.
        let (first, unsettled) = (addr.page_in_block(), block.unsettled());
        let end = (first..BLOCK_PAGES).find(|&i| unsettled.has(i)).unwrap_or(BLOCK_PAGES);
        let rest = block.run(Run { first, count: end - first });
        // That wakes the thread.
        end > first && rest.intersection(vma.range).is_some_and(|rest| self.os.unregister(rest).is_ok())
    }

    /// Serves each page of `range` that is not there as if a thread had touched it.
    pub(crate) fn touch(&'static self, ctx: &mut Ctx, range: PageRange) {
        for part in range.iter_blocks() {
            let mut pages = [Page::empty(); BLOCK_PAGES];
            let pages = &mut pages[..part.pages()];
            if self.os.scan(part, pages).is_err() {
                continue;
            }
            for (n, page) in pages.iter().enumerate() {
                let addr = part.start().add(n as u64 * PAGE_SIZE);
                // It may have come along with one before it.
                if !page.is_there() && !self.os.page(addr).is_ok_and(Page::is_there) {
                    self.serve_fault(ctx, addr, Haste::Soon);
                }
            }
        }
    }

    /// Where the pages of `range` are, by the one that is farthest.
    pub(crate) fn look(&self, range: PageRange) -> Whereabouts {
        let mut found = Whereabouts::Here;
        self.blocks.for_each(range, |block| {
            let part = PageRange::block_of(block.base()).intersection(range);
            let of = |i: usize| match block.word(i) {
                word if word.locked() => Whereabouts::Moving,
                word if word.is_mapped() => Whereabouts::Here,
                _ => Whereabouts::Away,
            };
            let farthest = part.and_then(|part| PageSet::of(part).iter().map(of).max());
            found = found.max(farthest.unwrap_or(Whereabouts::Here));
            std::ops::ControlFlow::Continue(())
        });
        found
    }

    /// Makes a record for each block of `range`, so that it counts as memory that may be registered.
    pub(crate) fn note_managed(&self, range: PageRange) {
        // Without room for more records nothing of it can leave either.
        for part in range.iter_blocks() {
            let _ = self.blocks.find_or_add(part.start(), SPARE_RECORDS);
        }
    }

    /// Makes a touch of page `i` a signal, if its bytes are lost. Returns whether it has to be tried again.
    fn poison(&self, ctx: &Ctx, block: Block, i: usize) -> bool {
        let Ok(_inside) = self.gate.enter(ctx.slot) else { return true };
        // As long as this is inside, what was lost cannot be unmapped and another page be there, but for what the kernel has
        // not told yet; then it refuses.
        if !matches!(block.word(i).place(), Place::Poisoned { .. }) {
            return false;
        }
        let page = block.run(Run { first: i, count: 1 });
        match self.os.poison(page).stop {
            Some(Errno::AGAIN) => true,
            // A kernel without poison: no access is the next best.
            Some(Errno::INVAL) => self.os.is_changing() || self.os.protect(page, Prot::empty()).is_err(),
            _ => false,
        }
    }

    /// Poisons every page whose bytes are lost in the page table too, so that a forked child does not find a hole there.
    pub(crate) fn poison_all(&'static self, ctx: &mut Ctx) {
        self.blocks.for_each(crate::ops::whole_space(), |block| {
            if block.away() != 0 {
                for i in self.away(block).iter() {
                    for attempt in 0..ATTEMPTS {
                        if !self.poison(ctx, block, i) {
                            break;
                        }
                        self.settle_events(ctx, attempt);
                    }
                }
            }
            std::ops::ControlFlow::Continue(())
        });
    }

    /// The pages of `block` that are away.
    pub(crate) fn away(&self, block: Block) -> PageSet {
        (0..BLOCK_PAGES).filter(|&i| !block.word(i).is_cpu()).collect()
    }

    /// Fills a page that was never touched (or was discarded). Returns whether the thread is taken care of.
    pub(crate) fn fill_hole(&'static self, ctx: &mut Ctx, block: Block, i: usize) -> bool {
        let page = block.run(Run { first: i, count: 1 });
        if block.away() == 0 && self.release_block(ctx, block) {
            self.os.wake(page);
            return true;
        }
        let mut transit = Transit::new(block, self);
        match transit.try_hold(i) {
            Ok(Place::Cpu) => {}
            Ok(_) | Err(_) => return false,
        }
        // Neighbours too, until one that is not a hole: the next touches then cost no round trip.
        let end = (i + 1..BLOCK_PAGES.min(i + ZERO_AROUND))
            .find(|&n| !matches!(block.word(n).place(), Place::Cpu) || transit.try_hold(n) != Ok(Place::Cpu))
            .unwrap_or(BLOCK_PAGES.min(i + ZERO_AROUND));
        let Ok(_inside) = self.gate.enter(ctx.slot) else { return false };
        let run = Run { first: i, count: end - i };
        let mut result = self.os.zero(block.run(run), Wake::Now);
        if result.done == 0 && result.stop == Some(Errno::NOENT) && run.count > 1 {
            // The run goes beyond the end of the mapping, or of what is registered.
            result = self.os.zero(page, Wake::Now);
        }
        self.stats.add(Counter::FaultsZero, 1);
        match result.stop {
            _ if result.done >= PAGE_SIZE => true,
            Some(Errno::AGAIN) => false,
            _ => {
                // Present already, unmapped, or not to be filled: the thread looks for itself.
                self.os.wake(page);
                true
            }
        }
    }

    /// Fills a single page in memory that has no record.
    fn zero_alone(&'static self, ctx: &mut Ctx, page: PageRange) {
        for attempt in 0..ATTEMPTS {
            if let Ok(_inside) = self.gate.enter(ctx.slot) {
                if self.blocks.find(page.start()).is_some() {
                    break;
                }
                let result = self.os.zero(page, Wake::Now);
                if result.stop != Some(Errno::AGAIN) {
                    break;
                }
            }
            self.settle_events(ctx, attempt);
        }
        self.stats.add(Counter::FaultsZero, 1);
        self.os.wake(page);
    }

    /// Gives a block of which nothing is away back to native faults, unless mappings are to stay as they are (see
    /// [`crate::still`]). Returns whether it was done.
    pub(crate) fn release_block(&'static self, ctx: &mut Ctx, block: Block) -> bool {
        self.begin_out().is_some_and(|_running| self.release_block_now(ctx, block))
    }

    /// As [`Core::release_block`], in any case.
    pub(crate) fn release_block_now(&'static self, ctx: &mut Ctx, block: Block) -> bool {
        let Ok(_inside) = self.gate.enter(ctx.slot) else { return false };
        let Some(_registration) = block.try_lock_registration() else { return false };
        // A page that is lifted out of the program relies on the registration before it counts as away.
        if !block.unsettled().is_empty() {
            return false;
        }
        let released = self.unregister_pieces(PageRange::block_of(block.base()));
        if released {
            self.stats.add(Counter::BlocksReleased, 1);
        }
        released
    }

    /// Gives `range` back to native faults, everything home: for a caller that is about to have another use for it.
    /// Returns whether nothing of it is registered any more.
    pub(crate) fn release_range(&'static self, ctx: &mut Ctx, range: PageRange) -> bool {
        let mut done = true;
        for part in range.iter_blocks() {
            let mut released = false;
            for attempt in 0..ATTEMPTS {
                if let Some(block) = self.blocks.find(part.start()) {
                    self.block_home(ctx, block, &PageSet::of(part), Why::Asked, &mut |_, _| {});
                    if let Ok(_inside) = self.gate.enter(ctx.slot) {
                        let _registration = block.lock_registration();
                        let pages = PageSet::of(part);
                        released = block.unsettled().and(&pages).is_empty() && self.unregister_pieces(part);
                    }
                } else {
                    // Whoever makes a record now registers the block after this.
                    released = self.alone(|| self.blocks.find(part.start()).is_none() && self.unregister_pieces(part));
                }
                if released {
                    break;
                }
                self.settle_events(ctx, attempt);
            }
            done &= released;
        }
        done
    }

    /// Runs `f` while nobody is inside the gate.
    fn alone<T>(&self, f: impl FnOnce() -> T) -> T {
        let _reader = self.lock_reader();
        self.gate.close();
        let result = f();
        self.gate.open();
        result
    }

    /// Makes each mapping of `range` registered as a whole, if any part is: a mapping that is registered in parts is
    /// several to the kernel, and `mremap` refuses more than one.
    pub(crate) fn unsplit(&self, range: PageRange) {
        let mut any = false;
        self.blocks.for_each(range, |_| {
            any = true;
            std::ops::ControlFlow::Break(())
        });
        let mut at = range.start();
        while any && let Ok(rest) = PageRange::from_ends(at, range.end()) {
            let Ok(Some(vma)) = self.os.vma(at) else { return };
            let Some(piece) = vma.range.intersection(rest) else { return };
            if crate::migrate::refusal(&vma).is_none() {
                self.note_managed(piece);
                // Where it fails the mapping was not split by us.
                let _ = self.register_but(piece, Stay::Held);
            }
            at = piece.end();
        }
    }

    /// Unregisters `range` VMA by VMA: the kernel refuses a range with a VMA that cannot be registered in it. Returns
    /// whether it did.
    ///
    /// An `mremap` may bring memory here with pages that are away, and the books say so only when its event is read. That
    /// memory must stay registered: until then whoever moved it waits, and nobody else knows of it.
    ///
    /// # Locking
    /// The caller is inside the gate.
    pub(crate) fn unregister_pieces(&self, range: PageRange) -> bool {
        if self.os.is_changing() || self.each_piece(range, |piece| self.os.unregister(piece)).is_err() {
            return false;
        }
        if !self.os.is_changing() {
            return true;
        }
        // It may have come while this was under way.
        let _ = self.each_piece(range, |piece| self.register_but(piece, Stay::Fixed));
        false
    }

    /// Registers `piece` but for the pages that are to stay.
    fn register_but(&self, piece: PageRange, stay: Stay) -> Result<(), Errno> {
        for part in piece.iter_blocks() {
            let stay = self.staying(part, stay);
            let at = |n: usize| part.start().block().add(n as u64 * PAGE_SIZE);
            for run in PageSet::of(part).minus(&stay).runs() {
                let range = PageRange::new(at(run.first), run.bytes()).expect("part of a block");
                self.os.register(range, MANAGED)?;
            }
        }
        Ok(())
    }

    /// Calls `f` for the part of each VMA in `range`. What cannot be registered, or is another userfaultfd's, is passed
    /// over.
    fn each_piece(&self, range: PageRange, f: impl Fn(PageRange) -> Result<(), Errno>) -> Result<(), Errno> {
        let mut at = range.start();
        while let Ok(rest) = PageRange::from_ends(at, range.end()) {
            let Some(piece) = self.os.vma(at)?.and_then(|v| v.range.intersection(rest)) else { break };
            match f(piece) {
                Ok(()) | Err(Errno::INVAL | Errno::BUSY | Errno::NOENT) => at = piece.end(),
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }
}
