//! What engine threads do on request: whole ranges, block by block.

use std::{
    ops::ControlFlow,
    sync::atomic::Ordering::SeqCst,
    time::{Duration, Instant},
};

use uhmm_sys::{
    Errno,
    addr::{BLOCK_PAGES, PageRange, TASK_SIZE, VirtAddr},
    arena,
    maps::{Prot, Vma},
};

use crate::{
    block::{Block, Place},
    device::{Cause, DeviceId, Invalidation},
    devices::{AddError, Entry},
    engine::Core,
    job::{DeviceRef, Job, OpsRef, Reply, Request},
    migrate::{Outcomes, PageOutcome, refusal},
    notifier::Ops,
    os::Os,
    page_set::PageSet,
    range::PageReport,
    thread::Ctx,
    trace::Why,
};

/// How long the pages of a block are asked home again while none of them comes: in transit elsewhere, or on a device
/// that fails.
const HOME_PATIENCE: Duration = Duration::from_secs(2);
/// How long a device that leaves is waited for: operations that began before it left still finish.
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);
/// How long the end of the last use waits to unregister memory while some thread is changing its address space.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

/// What is answered where there is nothing to say.
fn done(result: Result<(), Errno>) -> Reply {
    result.map_or_else(Reply::Failed, |()| Reply::Done)
}

impl<O: Os> Core<O> {
    pub(crate) fn execute(&'static self, ctx: &mut Ctx, job: &Job, request: Request) -> Reply {
        // Who asks may have changed its address space just now, and gone on when that was read. To invalidate nothing has to be
        // known, and a callback may do it while an event is applied.
        if !matches!(request, Request::Invalidate { .. }) {
            self.gate.wait_open();
        }
        match request {
            Request::Migrate { range, plan } => {
                self.refresh_excluded(ctx);
                let mut n = 0;
                for part in range.iter_blocks() {
                    let mut outcomes = Outcomes::new();
                    self.migrate_out(ctx, part, &plan, &mut outcomes);
                    for i in PageSet::of(part).iter() {
                        job.set_result(n, outcomes.0[i] as u64);
                        n += 1;
                    }
                    if let Some(entry) = plan.to.and_then(|to| self.devices.get(to)) {
                        self.map_local(entry, part);
                    }
                }
                Reply::Done
            }
            Request::NextMapped { at } => Reply::At(match self.os.vma(at) {
                Ok(Some(vma)) => vma.range.start().max(at),
                Ok(None) => VirtAddr::new(TASK_SIZE),
                // Whoever works on what is there answers with the error.
                Err(_) => at,
            }),
            Request::Home { range, why } => {
                (0..range.pages()).for_each(|n| job.set_result(n, PageOutcome::Untried as u64));
                self.range_home(ctx, range, why, &mut |page, outcome| {
                    let n = page.offset_from(range.start()).expect("a page of the range") >> uhmm_sys::addr::PAGE_SHIFT;
                    job.set_result(usize::try_from(n).expect("64-bit"), outcome as u64);
                });
                Reply::Done
            }
            Request::Register { device } => self.register_device(device),
            Request::Remove { device } => Reply::Left(self.remove_device(ctx, device)),
            Request::Evict { device, frames } => Reply::Left(self.evict(ctx, device, frames, Why::Evicted)),
            Request::DeviceFault { device, table, addr, access, policy } => {
                match self.device_fault(ctx, device, table, addr, access, policy) {
                    Ok(pte) => Reply::Pte(pte),
                    Err(error) => Reply::Fault(error),
                }
            }
            Request::RangeFault { device, range, access, detail } => {
                let mut report = |n, report: PageReport| job.set_result(n, report.bits());
                let done = self.range_fault(ctx, device, range, access, detail, &mut report);
                done.map_or_else(Reply::Fault, |()| Reply::Done)
            }
            Request::MapRange { device, table, range, access, detail } => {
                let done = self.map_range(ctx, (device, table), range, access, detail);
                done.map_or_else(Reply::Fault, |()| Reply::Done)
            }
            Request::Forget { device, table } => {
                self.forget(device, table);
                Reply::Done
            }
            Request::Exclusive { device, range } => {
                self.refresh_excluded(ctx);
                self.exclusive(ctx, device, range, &mut |n, outcome| job.set_result(n, outcome as u64));
                Reply::Done
            }
            Request::Invalidate { range, cause, until_over } => {
                // Before the invalidation: see `Changes`.
                let number = if until_over { self.changes.announce(range) } else { None };
                drop(self.invalidate(&Invalidation { range, cause, owner: None }));
                number.map_or(Reply::Done, Reply::Announced)
            }
            Request::Subscribe { range, ops } => self.subscribe(range, ops),
            Request::Unsubscribe { subscription } => {
                let removed = self.notifiers.remove(subscription);
                if removed.is_ok() {
                    self.watches.fetch_sub(1, SeqCst);
                }
                removed.map_or_else(Reply::TimedOut, |()| Reply::Done)
            }
            Request::MakeAnonymous { range } => {
                self.make_anonymous(ctx, range).map_or_else(Reply::Failed, Reply::Adopted)
            }
            Request::Touch { range } => {
                self.touch(ctx, range);
                Reply::Done
            }
            Request::Release { range } => Reply::Left(usize::from(!self.release_range(ctx, range))),
            Request::Unsplit { range } => {
                self.unsplit(range);
                Reply::Done
            }
            Request::ForkPrepare { sharing } => {
                self.prepare_fork(ctx, sharing);
                Reply::Done
            }
            Request::ForkFailed { child } => {
                self.unshare_frames(child);
                self.thaw();
                Reply::Done
            }
            Request::EngineThread => {
                self.sweep();
                Reply::Thread(uhmm_sys::thread::gettid())
            }
            Request::Spawn { threads, role } => done(crate::mm::spawn(threads, role, None)),
            Request::SpawnGuest { threads, name, entry, arg } => {
                done(uhmm_sys::thread::spawn(threads.kind(), name, None, entry, arg).map(drop))
            }
            Request::Close => Reply::Left(self.close(ctx)),
        }
    }

    fn subscribe(&self, range: PageRange, ops: OpsRef) -> Reply {
        // Before it can be called: see `Core::is_mirrored`.
        self.watches.fetch_add(1, SeqCst);
        let reply = match self.notifiers.insert(range, Ops::Static(ops.0)) {
            Ok(subscription) => arena::value(subscription).map_or_else(Reply::Failed, Reply::Subscribed),
            Err(error) => Reply::NotSubscribed(error),
        };
        if !matches!(reply, Reply::Subscribed(_)) {
            self.watches.fetch_sub(1, SeqCst);
        }
        reply
    }

    /// Brings everything of `range` home that is away, and tells what became of each such page.
    pub(crate) fn range_home(
        &'static self,
        ctx: &mut Ctx,
        range: PageRange,
        why: Why,
        report: &mut dyn FnMut(VirtAddr, PageOutcome),
    ) {
        self.blocks.for_each(range, |block| {
            if block.away() != 0
                && let Some(part) = PageRange::block_of(block.base()).intersection(range)
            {
                self.block_home(ctx, block, &PageSet::of(part), why, report);
            }
            ControlFlow::Continue(())
        });
    }

    /// Brings the pages of `want` home that are away, as long as it takes.
    pub(crate) fn block_home(
        &'static self,
        ctx: &mut Ctx,
        block: Block,
        want: &PageSet,
        why: Why,
        report: &mut dyn FnMut(VirtAddr, PageOutcome),
    ) {
        let mut rest = self.away(block).and(want);
        let mut forced = false;
        let mut progress = Instant::now();
        for attempt in 0.. {
            if rest.is_empty() {
                return;
            }
            if progress.elapsed() > HOME_PATIENCE {
                break;
            }
            let out = self.bring_home(ctx, block, &rest, |_| why);
            if !out.home.is_empty() {
                progress = Instant::now();
            }
            for (pages, outcome) in [(out.home, PageOutcome::Moved), (out.poisoned, PageOutcome::Poisoned)] {
                pages.iter().for_each(|i| report(block.page(i), outcome));
                rest = rest.minus(&pages);
            }
            if !out.unmapped.is_empty() {
                if forced {
                    out.unmapped.iter().for_each(|i| report(block.page(i), PageOutcome::NoAccess));
                    rest = rest.minus(&out.unmapped);
                } else {
                    forced = true;
                    self.home_without_access(ctx, block, &out.unmapped, why, report);
                }
            }
            rest = self.away(block).and(&rest);
            // Of a coherent device, and a forked child has them too.
            for run in out.shared.runs() {
                let _ = self.os.populate_write(block.run(run));
            }
            if out.again {
                self.settle_events(ctx, attempt);
            } else if !out.shared.is_empty() || !out.busy.is_empty() || !out.failed.is_empty() {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        rest.iter().for_each(|i| report(block.page(i), PageOutcome::TimedOut));
    }

    /// Pages of mappings without any access: nothing can be put there, so access is given for the moment it takes.
    fn home_without_access(
        &'static self,
        ctx: &mut Ctx,
        block: Block,
        pages: &PageSet,
        why: Why,
        report: &mut dyn FnMut(VirtAddr, PageOutcome),
    ) {
        for run in pages.runs() {
            let range = block.run(run);
            let Ok(Some(vma)) = self.os.vma(range.start()) else { continue };
            let Some(part) = vma.range.intersection(range) else { continue };
            if vma.prot.contains(Prot::READ) || self.os.protect(part, vma.prot | Prot::READ).is_err() {
                continue;
            }
            let out = self.bring_home(ctx, block, &PageSet::of(part), |_| why);
            out.home.iter().for_each(|i| report(block.page(i), PageOutcome::Moved));
            // The program may have given itself access meanwhile.
            let as_it_was = |now: Vma| now.range.intersection(part) == Some(part) && now.prot == vma.prot | Prot::READ;
            if self.os.vma(part.start()).is_ok_and(|now| now.is_some_and(as_it_was)) {
                let _ = self.os.protect(part, vma.prot);
            }
        }
    }

    /// Pages of `range` that are away.
    pub(crate) fn count_away(&self, range: PageRange) -> usize {
        let mut count = 0;
        self.blocks.for_each(range, |block| {
            count += usize::try_from(block.away()).expect("64-bit");
            ControlFlow::Continue(())
        });
        count
    }

    fn register_device(&'static self, device: DeviceRef) -> Reply {
        // A device that came between the reader's closing its gate and opening it would be told of one of them only.
        let _reader = self.lock_reader();
        match self.devices.add(|id| self.make_entry(id, device.0, None)) {
            Ok(entry) => Reply::Registered(entry.id()),
            Err(AddError::TooMany) => Reply::TooManyDevices,
            Err(AddError::NoMemory(errno)) => Reply::Failed(errno),
        }
    }

    /// Evicts a device's frames by frame, not by address: an address kept with a frame is a hint only. Stops when
    /// `frames` came free. Returns how many pages did not come home.
    ///
    /// # Kernel
    /// `mm/migrate_device.c: migrate_device_range()`.
    pub(crate) fn evict(&'static self, ctx: &mut Ctx, device: DeviceId, frames: u32, why: Why) -> usize {
        let Some(entry) = self.devices.get(device) else { return 0 };
        let Some(pgmap) = entry.pgmap() else { return 0 };
        let target = pgmap.live().saturating_sub(frames);
        let mut stuck = Stuck::default();
        let mut at = crate::device::DevPfn::new(0);
        while pgmap.live() > target && !stuck.is_hopeless() {
            let Some(pfn) = pgmap.next_live(at) else { break };
            at = pfn.add(1);
            if let Some(page) = pgmap.hint(pfn)
                && let Some(block) = self.blocks.find(page)
                && matches!(
                    block.word(page.page_in_block()).place(),
                    Place::Device { device: d, pfn: p } | Place::Coherent { device: d, pfn: p } if d == device && p == pfn
                )
            {
                self.evict_block(ctx, block, device, why, &mut stuck);
            }
        }
        if pgmap.live() > target {
            // Hints that led nowhere (the page moved with `mremap`): look through all blocks.
            self.blocks.for_each(whole_space(), |block| {
                self.evict_block(ctx, block, device, why, &mut stuck);
                let go_on = pgmap.live() > target && !stuck.is_hopeless();
                if go_on { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            });
        }
        (pgmap.live().saturating_sub(target)) as usize
    }

    /// Brings the pages home that `device` has of the block, unless that has just failed.
    fn evict_block(&'static self, ctx: &mut Ctx, block: Block, device: DeviceId, why: Why, stuck: &mut Stuck) {
        let mine = self.pages_on(block, device);
        if mine.is_empty() || stuck.last == Some(block.base()) {
            return;
        }
        let mut any = false;
        self.block_home(ctx, block, &mine, why, &mut |_, outcome| any |= outcome != PageOutcome::TimedOut);
        if any {
            *stuck = Stuck::default();
        } else {
            *stuck = Stuck { last: Some(block.base()), blocks: stuck.blocks + 1 };
        }
    }

    fn pages_on(&self, block: Block, device: DeviceId) -> PageSet {
        (0..BLOCK_PAGES)
            .filter(|&i| match block.word(i).place() {
                Place::Device { device: d, .. } | Place::Coherent { device: d, .. } => d == device,
                Place::Staged { exclusive, .. } => exclusive == Some(device),
                Place::Cpu | Place::Poisoned { .. } => false,
            })
            .collect()
    }

    /// Evicts everything and takes the device out of the table. Returns how many pages could not come home; the device
    /// stays then, taking no more pages.
    fn remove_device(&'static self, ctx: &mut Ctx, device: DeviceId) -> usize {
        let Some(entry) = self.devices.get(device) else { return 0 };
        entry.leave();
        let mut stuck = Stuck::default();
        // Pages it holds exclusively have no frame.
        self.blocks.for_each(whole_space(), |block| {
            self.evict_block(ctx, block, device, Why::Evicted, &mut stuck);
            if stuck.is_hopeless() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let start = Instant::now();
        let mut left = self.evict(ctx, device, u32::MAX, Why::Evicted);
        while left != 0 && start.elapsed() < LEAVE_PATIENCE {
            // A move that had its frames before the device left.
            std::thread::sleep(Duration::from_micros(100));
            left = self.evict(ctx, device, u32::MAX, Why::Evicted);
        }
        if left == 0 {
            self.take_out_device(entry);
        }
        left
    }

    /// Brings everything home and unregisters all memory. Returns how many pages could not come home.
    fn close(&'static self, ctx: &mut Ctx) -> usize {
        self.freeze();
        let whole = whole_space();
        self.range_home(ctx, whole, Why::Asked, &mut |_, _| {});
        // What the program has just unmapped does not count, though its event may still be in somebody's hands.
        self.settle_events(ctx, 0);
        let left = {
            // No event is applied meanwhile: pages that `mremap` moves to another block would not be counted.
            let _reader = self.lock_reader();
            self.count_away(whole)
        };
        if left == 0 {
            let start = Instant::now();
            self.blocks.for_each(whole, |block| {
                self.until_settled(ctx, start, |ctx| self.release_block_now(ctx, block));
                ControlFlow::Continue(())
            });
            self.unregister_rest(ctx, start);
            // Whoever could use one of them holds the address space too, and nobody does.
            self.devices.for_each(|entry| {
                entry.leave();
                self.take_out_device(entry);
            });
        }
        self.thaw();
        left
    }

    /// Calls `f` until it says that it is done, while events settle; until [`CLOSE_PATIENCE`] is over, counted from `start`.
    /// What is registered then stays so: its touches are answered as before.
    fn until_settled(&'static self, ctx: &mut Ctx, start: Instant, mut f: impl FnMut(&mut Ctx) -> bool) {
        for attempt in 0.. {
            if f(ctx) || start.elapsed() > CLOSE_PATIENCE {
                return;
            }
            self.settle_events(ctx, attempt);
        }
    }

    /// Unregisters memory that belongs to no record: mappings that grew, or that `mremap` brought somewhere else.
    fn unregister_rest(&'static self, ctx: &mut Ctx, start: Instant) {
        let mut at = VirtAddr::new(0);
        while let Ok(Some(vma)) = self.os.vma(at) {
            at = vma.range.end();
            if refusal(&vma) == Some(PageOutcome::Special) || vma.range.overlaps(self.staging.range()) {
                continue;
            }
            self.until_settled(ctx, start, |ctx| {
                self.gate.enter(ctx.slot).is_ok_and(|_inside| self.unregister_pieces(vma.range))
            });
        }
    }

    /// Takes a device out of the table that has no pages any more.
    fn take_out_device(&'static self, entry: &'static Entry) {
        drop(self.invalidate(&Invalidation { range: whole_space(), cause: Cause::Release, owner: None }));
        self.drop_entry(entry);
        if let Some(range) = entry.coherent_range() {
            // First the registration, so that dropping the pages raises no event.
            let _ = self.os.unregister(range).and_then(|()| self.os.zap(range));
        }
        let _reader = self.lock_reader();
        self.devices.remove(entry.id());
    }
}

/// How an eviction fares: a device that fails is not asked for every page that it has.
#[derive(Debug, Default)]
struct Stuck {
    /// The block of which nothing came home.
    last: Option<VirtAddr>,
    /// How many there were in a row.
    blocks: u32,
}

impl Stuck {
    const fn is_hopeless(&self) -> bool {
        self.blocks >= 3
    }
}

/// The user address space.
pub(crate) fn whole_space() -> PageRange {
    PageRange::new(VirtAddr::new(0), TASK_SIZE).expect("the user address space is a range")
}
