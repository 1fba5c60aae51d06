//! Pages come home: from staging without a copy, from a device through recycled staging pages.
//!
//! One path for everything that brings pages back: CPU faults, prefetch, eviction, fork, close. The kernel's names
//! for it are `migrate_to_ram` (for one fault) and `migrate_device_range`.
//!
//! 1. Lock the wanted pages that are away.
//! 2. Invalidate the mirrors, so that no device writes to a frame any more.
//! 3. Copy frames into staging pages; pages in staging need no copy.
//! 4. Inside the gate: `MOVE` them home. Where the VMA is not writable, or `MOVE` is not to be had, `COPY`.
//! 5. Free the frames, let the pages go.
//!
//! What cannot be put home stays where it is, locked by nobody.

use uhmm_sys::{
    Errno,
    addr::{BLOCK_PAGES, PAGE_SIZE},
    uffd::{SrcHoles, Wake},
};

use crate::{
    block::{Block, Place, Transit},
    device::{Cause, CopyOp, DevPfn, DeviceError, DeviceId, FrameRun, Invalidation},
    engine::Core,
    os::{MANAGED, Os},
    page_set::{PageSet, Run},
    staging::{HomeSlots, Left, Slot},
    thread::Ctx,
    trace::{Counter, Why},
};

/// What became of the pages that were wanted home.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Outcome {
    /// Came home.
    pub(crate) home: PageSet,
    /// In transit elsewhere; their holder wakes whoever waits.
    pub(crate) busy: PageSet,
    /// The kernel refused because an event is pending: drain, and ask again.
    pub(crate) again: bool,
    /// Nothing can be put there: unmapped, or without any access. They stay away.
    pub(crate) unmapped: PageSet,
    /// Their bytes are lost with a device.
    pub(crate) poisoned: PageSet,
    /// The device or the kernel failed for now; they stay away.
    pub(crate) failed: PageSet,
    /// Mapped from a frame, and shared with a forked child or pinned: to be made the process's own, and asked for again.
    pub(crate) shared: PageSet,
}

/// How an attempt to put a run home ended.
enum Put {
    Done(usize),
    Again(usize),
    Unmapped(usize),
    NotMovable(usize),
    Failed(usize),
}

/// How pages are put home.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    /// The slots' pages go themselves; no byte is copied.
    Move,
    /// The kernel allocates pages and copies the slots' bytes.
    Copy,
}

/// Where pages stand on their way home from a device.
#[derive(Debug, Clone, Copy)]
enum Slots {
    /// A chunk that is one huge page.
    Whole(Slot),
    /// Some of the thread's own.
    Own(HomeSlots),
}

impl Slots {
    const fn first(self) -> Slot {
        match self {
            Self::Whole(slot) | Self::Own(HomeSlots::Recycled(slot, _) | HomeSlots::Scratch(slot, _)) => slot,
        }
    }

    const fn count(self) -> usize {
        match self {
            Self::Whole(_) => BLOCK_PAGES,
            Self::Own(HomeSlots::Recycled(_, count) | HomeSlots::Scratch(_, count)) => count,
        }
    }

    const fn by(self) -> By {
        match self {
            Self::Whole(_) | Self::Own(HomeSlots::Recycled(..)) => By::Move,
            Self::Own(HomeSlots::Scratch(..)) => By::Copy,
        }
    }
}

impl<O: Os> Core<O> {
    /// Brings the pages of `want` home that are away and not in transit.
    ///
    /// `why` is recorded for each; with `wait` pages in transit are waited for rather than reported busy.
    ///
    /// # Locking
    /// The caller holds no page and is outside the gate.
    pub(crate) fn bring_home(
        &'static self,
        ctx: &mut Ctx,
        block: Block,
        want: &PageSet,
        why: impl Fn(usize) -> Why,
    ) -> Outcome {
        let mut out = Outcome::default();
        let mut transit = Transit::new(block, self);
        let (mut staged, mut on_device, mut visible) = (PageSet::EMPTY, PageSet::EMPTY, PageSet::EMPTY);
        let mut mapped = PageSet::EMPTY;
        for i in want.iter() {
            if block.word(i).is_cpu() && !block.word(i).locked() {
                continue;
            }
            match transit.try_hold(i) {
                Err(_) => out.busy.insert(i),
                Ok(Place::Cpu) => transit.put(i, Place::Cpu),
                Ok(Place::Poisoned { .. }) => {
                    out.poisoned.insert(i);
                    transit.put_back(i);
                }
                Ok(Place::Staged { exclusive, .. }) => {
                    staged.insert(i);
                    if exclusive.is_some() {
                        visible.insert(i);
                    }
                }
                Ok(Place::Device { .. }) => {
                    on_device.insert(i);
                    visible.insert(i);
                }
                Ok(Place::Coherent { .. }) => {
                    mapped.insert(i);
                    visible.insert(i);
                }
            }
        }
        if transit.held().is_empty() {
            return out;
        }
        let _invalidating = span(&visible)
            .map(|run| self.invalidate(&Invalidation { range: block.run(run), cause: Cause::Migrate, owner: None }));
        if !staged.is_empty() {
            self.staged_home(ctx, &mut transit, staged, &why, &mut out);
        }
        if !mapped.is_empty() && !out.again {
            let unmapped = self.unmap_frames(ctx, &mut transit, &mapped);
            self.arrived(&mut transit, &unmapped.as_they_are, &why, &mut out);
            on_device = on_device.or(&unmapped.in_frames);
            out.shared = unmapped.shared;
            out.again = !unmapped.again.is_empty();
        }
        if !on_device.is_empty() && !out.again {
            self.device_home(ctx, &mut transit, on_device, &why, &mut out);
        }
        out
    }

    /// Moves pages home that stand in staging.
    fn staged_home(
        &'static self,
        ctx: &mut Ctx,
        transit: &mut Transit<'_>,
        staged: PageSet,
        why: &impl Fn(usize) -> Why,
        out: &mut Outcome,
    ) {
        let block = transit.block();
        let mut rest = staged;
        while let Some(run) = next_slot_run(transit, &rest) {
            let Place::Staged { slot, .. } = transit.place(run.first) else {
                unreachable!("only staged pages are here")
            };
            let (result, moved) = self.put_run(ctx, block, run, slot, By::Move);
            let done = self.note_put(result, run, out);
            let arrived = Run { first: run.first, count: done };
            if done > 0 {
                self.settle_home(transit, arrived, why, out);
                if let Left::Zap(chunk) = self.staging.leave(slot.chunk(), moved, done - moved) {
                    self.zap_chunk(chunk);
                }
                self.stats.add(Counter::PagesHomeStaged, done);
            }
            if out.again {
                return;
            }
            // The page that stopped the run, if any, is left where it is.
            for i in run.first..run.first + (done + 1).min(run.count) {
                rest.remove(i);
            }
        }
    }

    /// Copies pages home that are in frames.
    fn device_home(
        &'static self,
        ctx: &mut Ctx,
        transit: &mut Transit<'_>,
        on_device: PageSet,
        why: &impl Fn(usize) -> Why,
        out: &mut Outcome,
    ) {
        let block = transit.block();
        let mut rest = on_device;
        while let Some((run, device, first)) = next_frame_run(transit, &rest) {
            let Some(slots) = self.home_slots(ctx, run) else {
                out.failed = out.failed.or(&rest);
                return;
            };
            let count = slots.count();
            let run = Run { first: run.first, count };
            let host = self.staging.bytes(slots.first(), count);
            let frames = frame_run(first, count);
            let copied = match self.devices.get(device) {
                Some(entry) => entry.device().copy_to_host(&[CopyOp { host, frames }]),
                None => Err(DeviceError::Lost),
            };
            if let Err(error) = copied {
                for i in run.pages() {
                    rest.remove(i);
                    if error == DeviceError::Lost {
                        out.poisoned.insert(i);
                        self.stats.add(Counter::PagesPoisoned, 1);
                        transit.put(i, Place::Poisoned { device });
                    } else {
                        out.failed.insert(i);
                    }
                }
                if error == DeviceError::Lost {
                    // So that the device can go: nothing of it is needed any more.
                    self.free_frames(device, frames);
                }
                self.return_home_slots(ctx, slots, 0);
                continue;
            }
            let (result, moved) = self.put_run(ctx, block, run, slots.first(), slots.by());
            let done = self.note_put(result, run, out);
            self.return_home_slots(ctx, slots, moved);
            if done > 0 {
                self.settle_home(transit, Run { first: run.first, count: done }, why, out);
                self.renew_frames(device, first, done);
                self.free_frames(device, frame_run(first, done));
                self.stats.add(Counter::PagesHome, done);
                if done == BLOCK_PAGES {
                    self.stats.add(Counter::FoliosHome, 1);
                }
            }
            if out.again {
                return;
            }
            for i in run.first..run.first + (done + 1).min(run.count) {
                rest.remove(i);
            }
        }
    }

    /// Slots for a run on its way home, or for its first pages: a whole huge page for a whole block where one is at hand,
    /// else some of the thread's own.
    fn home_slots(&self, ctx: &mut Ctx, run: Run) -> Option<Slots> {
        if run.count == BLOCK_PAGES
            && let Some(chunk) = self.staging.take_filled_huge()
        {
            return Some(Slots::Whole(chunk.slot(0)));
        }
        ctx.home.take(&self.staging, run.count).map(Slots::Own)
    }

    fn return_home_slots(&self, ctx: &mut Ctx, slots: Slots, moved: usize) {
        let spent = match slots {
            Slots::Whole(slot) => Some(slot.chunk()),
            Slots::Own(HomeSlots::Recycled(..)) => ctx.home.advance(moved),
            Slots::Own(HomeSlots::Scratch(..)) => None,
        };
        if let Some(chunk) = spent {
            self.zap_chunk(chunk);
        }
    }

    /// Puts the pages in `slot..` at the run's addresses. Returns also how many slots that emptied: a copy leaves its slot
    /// as it is.
    fn put_run(&self, ctx: &mut Ctx, block: Block, run: Run, slot: Slot, by: By) -> (Put, usize) {
        let mut emptied = 0;
        (self.put_pages(ctx, block, run, slot, by, &mut emptied), emptied)
    }

    fn put_pages(&self, ctx: &mut Ctx, block: Block, run: Run, slot: Slot, by: By, emptied: &mut usize) -> Put {
        let mut done = 0;
        let mut registered = false;
        let mut by_copy = by == By::Copy || !self.os.has_move();
        let mut one_by_one = false;
        while done < run.count {
            let Ok(_inside) = self.gate.enter(ctx.slot) else { return Put::Again(done) };
            let dst = block.page(run.first + done);
            let src = Slot::from_number(slot.number() + u32::try_from(done).expect("below 512"));
            let pages = if one_by_one { 1 } else { run.count - done };
            let result = if by_copy {
                self.os.copy(dst, self.staging.bytes(src, pages), Wake::Now)
            } else {
                let bytes = pages as u64 * PAGE_SIZE;
                self.os.move_pages(dst, self.staging.addr(src), bytes, SrcHoles::Fail, Wake::Now)
            };
            let moved = usize::try_from(result.done / PAGE_SIZE).expect("a run is at most a block");
            done += moved;
            if moved > 0 {
                *emptied += if by_copy { 0 } else { moved };
                continue;
            }
            match result.stop {
                None => unreachable!("a call without progress says why"),
                Some(Errno::AGAIN) => return Put::Again(done),
                // `EBUSY`: a child of a bare fork shares the staging page.
                Some(Errno::INVAL | Errno::BUSY) if !by_copy => by_copy = true,
                // The run may reach over the end of its mapping, which `COPY` refuses as a whole.
                Some(Errno::NOENT) if by_copy && !one_by_one && run.count - done > 1 => one_by_one = true,
                // The range lost its registration (a move that raised no event): its bytes are here still.
                Some(Errno::NOENT) if !registered => {
                    registered = true;
                    let page = block.run(Run { first: run.first + done, count: 1 });
                    if self.os.register(page, MANAGED).is_err() {
                        return Put::Unmapped(done);
                    }
                }
                Some(Errno::NOENT | Errno::FAULT | Errno::SRCH) => return Put::Unmapped(done),
                Some(Errno::EXIST) => panic!(
                    "page {dst} has two homes: the kernel has a page where {:?} is away",
                    block.word(run.first + done)
                ),
                Some(Errno::INVAL) => return Put::NotMovable(done),
                Some(_) => return Put::Failed(done),
            }
        }
        Put::Done(done)
    }

    /// Notes how a put ended, and returns how many pages of it arrived.
    fn note_put(&self, put: Put, run: Run, out: &mut Outcome) -> usize {
        let stopped_at = |done: usize| run.first + done;
        match put {
            Put::Done(done) => done,
            Put::Again(done) => {
                self.stats.add(Counter::RetriesEvent, 1);
                out.again = true;
                done
            }
            Put::Unmapped(done) | Put::NotMovable(done) => {
                out.unmapped.insert(stopped_at(done));
                done
            }
            Put::Failed(done) => {
                out.failed.insert(stopped_at(done));
                done
            }
        }
    }

    /// Lets a run of pages go that arrived.
    fn settle_home(&self, transit: &mut Transit<'_>, run: Run, why: &impl Fn(usize) -> Why, out: &mut Outcome) {
        self.arrived(transit, &PageSet::span(run.first, run.first + run.count), why, out);
    }

    /// Lets pages go that arrived.
    fn arrived(&self, transit: &mut Transit<'_>, pages: &PageSet, why: &impl Fn(usize) -> Why, out: &mut Outcome) {
        let ticks = self.ticks();
        for i in pages.iter() {
            transit.block().set_history(i, ticks, why(i));
            transit.put(i, Place::Cpu);
            out.home.insert(i);
        }
    }
}

/// The smallest run that holds all of `set`.
pub(crate) fn span(set: &PageSet) -> Option<Run> {
    let first = set.iter().next()?;
    let last = set.runs().last().map(|r| r.first + r.count - 1)?;
    Some(Run { first, count: last - first + 1 })
}

pub(crate) fn frame_run(first: DevPfn, count: usize) -> FrameRun {
    FrameRun { first, count: u32::try_from(count).expect("a run is at most a block") }
}

/// The first run of `rest` whose slots are neighbours too.
fn next_slot_run(transit: &Transit<'_>, rest: &PageSet) -> Option<Run> {
    let run = rest.runs().next()?;
    let slot_of = |i| match transit.place(i) {
        Place::Staged { slot, .. } => slot.number(),
        place => unreachable!("page {i} of a staged run is {place:?}"),
    };
    let first = slot_of(run.first);
    let count = run
        .pages()
        .zip(first..)
        .take_while(|&(i, slot)| {
            slot_of(i) == slot && Slot::from_number(slot).chunk() == Slot::from_number(first).chunk()
        })
        .count();
    Some(Run { first: run.first, count })
}

/// The first run of `rest` whose frames are neighbours on one device, mapped or not.
pub(crate) fn next_frame_run(transit: &Transit<'_>, rest: &PageSet) -> Option<(Run, DeviceId, DevPfn)> {
    let run = rest.runs().next()?;
    let frame_of = |i| match transit.place(i) {
        Place::Device { device, pfn } | Place::Coherent { device, pfn } => (device, pfn.get()),
        place => unreachable!("page {i} of a run on a device is {place:?}"),
    };
    let (device, first) = frame_of(run.first);
    let count = run.pages().zip(first..).take_while(|&(i, pfn)| frame_of(i) == (device, pfn)).count();
    Some((Run { first: run.first, count }, device, DevPfn::new(first)))
}
