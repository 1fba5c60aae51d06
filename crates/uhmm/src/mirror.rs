//! A device's view of the address space: faults, reports, exclusive access.
//!
//! Everything here follows the sequence protocol of [`crate::notifier`]: begin to read, look, and install the result
//! only if nothing was invalidated meanwhile; else look again, within a budget.
//!
//! # Kernel
//! `mm/hmm.c: hmm_range_fault()`, `mm/memory.c: make_device_exclusive()`.

use std::{
    sync::atomic::{
        AtomicU32,
        Ordering::{Acquire, Relaxed, Release, SeqCst},
        fence,
    },
    time::{Duration, Instant},
};

use thiserror::Error;
use uhmm_sys::{
    Errno,
    addr::{BLOCK_PAGES, PAGE_SHIFT, PageRange, TASK_SIZE, VirtAddr},
    arena,
    maps::{Prot, Vma},
    pagemap::Page,
    uffd::RegisterMode,
};

use crate::{
    block::{Block, Place, Transit},
    device::{Cause, DevPfn, Device, DeviceId, Invalidation, MemoryKind, MemorySpec},
    device_table::{Access, BLOCK_ORDER, DeviceTable, Pte},
    devices::{Entry, Memory, SharedBooks},
    engine::Core,
    migrate::{Holes, OtherDevices, Outcomes, PageOutcome, Plan, ResidencyRule, refusal},
    notifier::{IntervalOps, InvalidateSeq, Invalidated, ReadSeq, Subscription},
    os::Os,
    page_set::PageSet,
    sync::{TimedOut, Waiter, Words},
    thread::Ctx,
    trace::{Counter, Why},
};

/// The protection that a mapping must have for an access.
const fn needed(access: Access) -> Prot {
    match access {
        Access::Read => Prot::READ,
        Access::Write | Access::Atomic => Prot::WRITE,
    }
}

/// What a device may do to a page that no CPU thread reaches: if anything changes it, then atomically.
pub(crate) const fn most(writable: bool) -> Access {
    if writable { Access::Atomic } else { Access::Read }
}

/// What a device fault does with a page that is in host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceFaultPolicy {
    /// Leaves it there and lets the device reach it by its address.
    Map,
    /// Moves the block around it to the device, where that may be; else as [`DeviceFaultPolicy::Map`].
    Migrate,
}

/// Why a device's access, or a range fault, cannot be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FaultError {
    /// Nothing is mapped at the address.
    #[error("{addr}: nothing is mapped there")]
    NoVma {
        /// The page.
        addr: VirtAddr,
    },
    /// The mapping does not allow the access.
    #[error("{addr}: the mapping does not allow the access")]
    Denied {
        /// The page.
        addr: VirtAddr,
    },
    /// The page's bytes were lost with a device.
    #[error("{addr}: the bytes were lost with {device}")]
    Poisoned {
        /// The page.
        addr: VirtAddr,
        /// The device that died.
        device: DeviceId,
    },
    /// The address space kept changing until the budget ran out.
    #[error("{addr}: the address space kept changing for {ms} ms")]
    TimedOut {
        /// The page.
        addr: VirtAddr,
        /// How long was tried.
        ms: u64,
    },
    /// The device is not registered any more.
    #[error("the device is gone")]
    NoDevice,
    /// The kernel failed.
    #[error("{addr}: {errno}")]
    Kernel {
        /// The page.
        addr: VirtAddr,
        /// What it answered.
        errno: Errno,
    },
    /// The device table has no room; the access may be tried again after others were invalidated.
    #[error("{addr}: the device's page table is full")]
    TableFull {
        /// The page.
        addr: VirtAddr,
    },
    /// The page cannot be had for exclusive access, so there are no atomic operations on it: it is of a file, say.
    #[error("{addr}: no exclusive access: {}", outcome.as_str())]
    NotExclusive {
        /// The page.
        addr: VirtAddr,
        /// Why.
        outcome: PageOutcome,
    },
}

/// Leaf directories of a device's page table: 16 GiB of addresses each.
const TABLE_LEAVES: u32 = 64;
/// Blocks of which a device's page table can hold single pages at once: 16 GiB.
const TABLE_BLOCKS: u32 = 8192;

/// Keeps one device's page table in step.
struct TableSink {
    device: &'static dyn Device,
    table: &'static DeviceTable,
    /// Flushes that are due for entries already gone. Counted up under the subscription's lock.
    flushing: AtomicU32,
}

impl IntervalOps for TableSink {
    fn invalidate<'a>(&self, invalidation: &Invalidation, seq: InvalidateSeq<'a>) -> Invalidated<'a> {
        let mut due = false;
        let receipt = seq.set(|| {
            // Where this finds no entry another callback may have taken it a moment ago, and be waiting for an access
            // through it still.
            due = self.table.clear(invalidation.range) || self.flushing.load(Acquire) != 0;
            if due {
                self.flushing.fetch_add(1, Relaxed);
            }
        });
        if due {
            self.device.flush(invalidation);
            self.flushing.fetch_sub(1, Release);
        }
        receipt
    }
}

/// How long an operation tries while the address space keeps changing under it.
const BUDGET: Duration = Duration::from_secs(1);

/// What is left of the budget of an operation on `addr` that began at `start`.
pub(crate) fn budget_left(start: Instant, addr: VirtAddr) -> Result<Duration, FaultError> {
    BUDGET.checked_sub(start.elapsed()).ok_or_else(|| timed_out(addr))
}

fn timed_out(addr: VirtAddr) -> FaultError {
    FaultError::TimedOut { addr, ms: u64::try_from(BUDGET.as_millis()).expect("short") }
}

impl<O: Os> Core<O> {
    /// `books` are the parent's, where this is a forked child.
    pub(crate) fn make_entry(
        &self,
        id: DeviceId,
        device: &'static dyn Device,
        books: Option<SharedBooks>,
    ) -> Result<Entry, Errno> {
        let spec = device.memory();
        let range = self.coherent_memory(device, &spec);
        if let Some(range) = range {
            self.os.register(range, RegisterMode::WP)?;
        }
        let memory = match (spec.frames, books) {
            (0, _) => None,
            (_, Some(books)) => Some(Memory::new(id, &spec, books, range)),
            (frames, None) => Some(Memory::new(id, &spec, SharedBooks::new(frames)?, range)),
        };
        let table: &'static DeviceTable = {
            let needed = DeviceTable::storage_needed(TABLE_LEAVES, TABLE_BLOCKS);
            let words = Words { words32: arena::slice(needed.words32)?, words64: arena::slice(needed.words64)? };
            arena::value(DeviceTable::new(TABLE_LEAVES, TABLE_BLOCKS, words))?
        };
        let sink: &'static TableSink = arena::value(TableSink { device, table, flushing: AtomicU32::new(0) })?;
        let subscription = self.notifiers.insert(crate::ops::whole_space(), sink).map_err(|_| Errno::NOMEM)?;
        // A forked child has a copy of coherent memory, not the same.
        let survives_fork = spec.survives_fork && range.is_none();
        Ok(Entry::new(id, device, memory, self.member, survives_fork, table, subscription))
    }

    /// Where the device's frames are, if pages can be mapped from there.
    fn coherent_memory(&self, device: &dyn Device, spec: &MemorySpec) -> Option<PageRange> {
        if spec.kind != MemoryKind::Coherent || spec.frames == 0 || !self.os.has_move() {
            return None;
        }
        let bytes = device.host_memory()?;
        let fits = bytes.addr() == bytes.addr().block() && bytes.len() == u64::from(spec.frames) << PAGE_SHIFT;
        if fits { PageRange::new(bytes.addr(), bytes.len()).ok() } else { None }
    }

    pub(crate) fn drop_entry(&self, entry: &'static Entry) {
        let _ = self.notifiers.remove(entry.subscription());
    }

    /// Gives up all translations of a device, whose own `table` is. A fault that is being served begins again.
    pub(crate) fn forget(&self, device: DeviceId, table: &'static DeviceTable) {
        if let Some(entry) = self.devices.with_table(device, table) {
            let invalidation = Invalidation { range: crate::ops::whole_space(), cause: Cause::Release, owner: None };
            self.notifiers.invalidate_one(entry.subscription(), &invalidation);
        }
    }

    /// Begins to look at what a translation of `addr`, or of all of its block, is to be made from, which takes `left` at most:
    /// no change of it that was announced is under way.
    pub(crate) fn begin_translation(
        &self,
        entry: &Entry,
        addr: VirtAddr,
        left: Duration,
    ) -> Result<ReadSeq, FaultError> {
        let seq = self.begin_look(entry.subscription(), PageRange::block_of(addr), left);
        let seq = seq.map_err(|_| timed_out(addr))?;
        // A device that leaves says so before its translations are given up: this one is, or is not made.
        if entry.is_live() { Ok(seq) } else { Err(FaultError::NoDevice) }
    }

    /// Begins to look at `range`, for a subscription that has it, when no change of it is under way: neither one that was announced
    /// nor an invalidation. Waits for `limit` at most.
    pub(crate) fn begin_look(
        &self,
        subscription: &Subscription,
        range: PageRange,
        limit: Duration,
    ) -> Result<ReadSeq, TimedOut> {
        let mut waiter = Waiter::new(limit);
        loop {
            let seq = self.notifiers.read_begin_within(subscription, waiter.left())?;
            if !self.changes.any_in(range) {
                return Ok(seq);
            }
            waiter.pause()?;
        }
    }

    /// Serves a device's fault at `addr`: installs a translation in its table and returns it. The table is the device's own;
    /// where another has its number by now, the device is gone.
    ///
    /// For [`Access::Atomic`] a page of host memory that does not migrate is taken for the device's exclusive access. A CPU
    /// thread may take it back at any time, also before the translation is there: then it is taken anew.
    pub(crate) fn device_fault(
        &'static self,
        ctx: &mut Ctx,
        device: DeviceId,
        table: &'static DeviceTable,
        addr: VirtAddr,
        access: Access,
        policy: DeviceFaultPolicy,
    ) -> Result<Pte, FaultError> {
        let start = Instant::now();
        if addr.get() >= TASK_SIZE {
            return Err(FaultError::NoVma { addr });
        }
        let page = PageRange::page_of(addr);
        let addr = page.start();
        let mut may_migrate = policy == DeviceFaultPolicy::Migrate;
        self.stats.add(Counter::DeviceFaults, 1);
        let _translating = self.begin_translating();
        loop {
            let left = budget_left(start, addr)?;
            let entry = self.devices.with_table(device, table).ok_or(FaultError::NoDevice)?;
            let seq = self.begin_translation(entry, addr, left)?;
            let vma = self.check_access(addr, access)?;
            let writable = vma.prot.contains(Prot::WRITE);
            // A block of one mapping may have one entry.
            let uniform = vma.range.contains_range(PageRange::block_of(addr));
            let pte = match self.blocks.find(addr).map(|block| (block, block.word(addr.page_in_block()))) {
                Some((_, word)) if word.locked() => {
                    std::thread::yield_now();
                    continue;
                }
                Some((block, word)) => match word.place() {
                    Place::Cpu => None,
                    Place::Poisoned { device } => return Err(FaultError::Poisoned { addr, device }),
                    Place::Device { device: d, pfn }
                        if d == device && (access == Access::Read || !entry.is_shared(pfn)) =>
                    {
                        Some(Pte::frame(pfn, most(writable && !entry.is_shared(pfn))))
                    }
                    Place::Staged { exclusive: Some(d), .. } if d == device => Some(Pte::exclusive(most(writable))),
                    // Into its frame, where no CPU thread gets in between.
                    Place::Coherent { device: d, .. } if d == device && access == Access::Atomic => {
                        self.unmap_for_device(ctx, block, addr.page_in_block());
                        continue;
                    }
                    Place::Coherent { .. } => None,
                    Place::Device { device: d, .. } if d != device && self.map_for_device(ctx, block, addr) => continue,
                    Place::Device { .. } | Place::Staged { .. } => {
                        // Another's, or shared with a child: home first, page by page, as the kernel does it.
                        let i = addr.page_in_block();
                        self.block_home(ctx, block, &[i].into_iter().collect(), Why::DeviceFault, &mut |_, _| {});
                        continue;
                    }
                },
                None => None,
            };
            let pte = match pte {
                Some(pte) => pte,
                None if may_migrate && refusal(&vma).is_none() => {
                    // Once: where it does not work out, the page is mapped where it is.
                    may_migrate = false;
                    self.refresh_excluded(ctx);
                    if let Some(window) = PageRange::block_of(addr).intersection(vma.range) {
                        let plan = Plan {
                            to: Some(device),
                            why: Why::DeviceFault,
                            holes: Holes::Skip,
                            other_devices: OtherDevices::Leave,
                            residency: ResidencyRule::Obey,
                            owner: Some(device),
                        };
                        let mut outcomes = Outcomes::new();
                        self.migrate_out(ctx, window, &plan, &mut outcomes);
                    }
                    continue;
                }
                None if access == Access::Atomic => {
                    self.refresh_excluded(ctx);
                    let mut outcomes = Outcomes::new();
                    match self.exclusive_in_block(ctx, device, page, &mut outcomes) {
                        Ok(()) | Err(FaultError::Kernel { errno: Errno::INTR | Errno::AGAIN, .. }) => {}
                        Err(error) => return Err(error),
                    }
                    match outcomes.0[addr.page_in_block()] {
                        PageOutcome::Moved | PageOutcome::Already => {}
                        // Until the device asks again a mover can see to whoever wants nothing to leave.
                        outcome if outcome.is_passing() && self.is_frozen() => {
                            let ms = u64::try_from(start.elapsed().as_millis()).expect("short");
                            return Err(FaultError::TimedOut { addr, ms });
                        }
                        outcome if outcome.is_passing() => std::thread::yield_now(),
                        outcome => return Err(FaultError::NotExclusive { addr, outcome }),
                    }
                    continue;
                }
                None => match self.populate_pages(ctx, page, access) {
                    Ok(()) if uniform && self.is_huge_page(addr) => Pte::host(access).for_block(),
                    Ok(()) => Pte::host(access),
                    Err(Errno::NOMEM) => return Err(FaultError::NoVma { addr }),
                    Err(Errno::FAULT | Errno::ACCESS) => return Err(FaultError::Denied { addr }),
                    Err(Errno::INTR | Errno::AGAIN) => continue,
                    Err(errno) => return Err(FaultError::Kernel { addr, errno }),
                },
            };
            let unit = (uniform && !pte.is_host()).then(|| self.unit(entry, addr)).flatten();
            if let Ok(_update) = self.notifiers.commit(entry.subscription(), seq) {
                let set = match unit {
                    Some(first) => table.set_block(addr, Pte::frame(first, most(writable))),
                    None if pte.order() != 0 => table.set_block(addr, pte),
                    None => table.set(addr, pte),
                };
                return set.map(|()| table.lookup(addr)).map_err(|_| FaultError::TableFull { addr });
            }
        }
    }

    /// The first frame of the block of `addr`, if the whole block is in frames of the device that are as good as one huge
    /// page: neighbours, aligned, and nobody else's.
    ///
    /// Pages in transit do not count. What is found holds until the block is invalidated.
    pub(crate) fn unit(&self, entry: &Entry, addr: VirtAddr) -> Option<DevPfn> {
        let block = self.blocks.find(addr)?;
        let Place::Device { pfn: first, .. } = block.word(0).place() else { return None };
        let is_next = |i: usize, pfn: DevPfn| {
            let word = block.word(i);
            !word.locked() && word.place() == Place::Device { device: entry.id(), pfn } && !entry.is_shared(pfn)
        };
        let aligned = first.get().is_multiple_of(1 << BLOCK_ORDER);
        (aligned && (0..BLOCK_PAGES).zip(0..).all(|(i, n)| is_next(i, first.add(n)))).then_some(first)
    }

    /// Whether the CPU maps the page of `addr` as part of a huge page. All of that is there then.
    fn is_huge_page(&self, addr: VirtAddr) -> bool {
        self.os.page(addr).is_ok_and(|page| page.contains(Page::HUGE | Page::PRESENT))
            && self.blocks.find(addr).is_none_or(|block| block.away() == 0)
    }

    /// Maps the page of `addr`, which is in a frame of another device, if it can be. Returns whether something changed.
    fn map_for_device(&'static self, ctx: &mut Ctx, block: Block, addr: VirtAddr) -> bool {
        let i = addr.page_in_block();
        if !self.is_mappable(block, i) {
            return false;
        }
        let mapped = self.map_frames(ctx, block, &[i].into_iter().collect());
        if mapped.again {
            self.settle_events(ctx, 0);
        }
        !mapped.refused.has(i)
    }

    /// The VMA of `addr`, if it allows `access`.
    pub(crate) fn check_access(&self, addr: VirtAddr, access: Access) -> Result<Vma, FaultError> {
        let vma = self
            .os
            .vma(addr)
            .map_err(|errno| FaultError::Kernel { addr, errno })?
            .filter(|v| v.range.contains(addr))
            .ok_or(FaultError::NoVma { addr })?;
        if !vma.prot.contains(Prot::READ) || !vma.prot.contains(needed(access)) {
            return Err(FaultError::Denied { addr });
        }
        Ok(vma)
    }

    /// Takes pages for a device's exclusive access: out of the program, into staging. Reports an outcome per page.
    pub(crate) fn exclusive(
        &'static self,
        ctx: &mut Ctx,
        device: DeviceId,
        range: PageRange,
        report: &mut dyn FnMut(usize, PageOutcome),
    ) {
        let mut n = 0;
        for part in range.iter_blocks() {
            let mut outcomes = Outcomes::new();
            if self.exclusive_in_block(ctx, device, part, &mut outcomes).is_err() {
                PageSet::of(part).iter().for_each(|i| outcomes.0[i] = PageOutcome::NoAccess);
            }
            for i in PageSet::of(part).iter() {
                report(n, outcomes.0[i]);
                n += 1;
            }
        }
    }

    fn exclusive_in_block(
        &'static self,
        ctx: &mut Ctx,
        device: DeviceId,
        range: PageRange,
        outcomes: &mut Outcomes,
    ) -> Result<(), FaultError> {
        // The kernel takes only pages that are there and writable, and faults them in so.
        self.fault_in_for_exclusive(ctx, range)?;
        let plan = Plan {
            to: None,
            why: Why::Exclusive,
            holes: Holes::Skip,
            other_devices: OtherDevices::Leave,
            residency: ResidencyRule::Ignore,
            owner: Some(device),
        };
        self.migrate_out(ctx, range, &plan, outcomes);
        let Some(block) = self.blocks.find(range.start()) else { return Ok(()) };
        let mut transit = Transit::new(block, self);
        let candidates =
            outcomes.pages(PageOutcome::Moved).or(&outcomes.pages(PageOutcome::Already)).and(&PageSet::of(range));
        for i in candidates.iter() {
            outcomes.0[i] = match transit.try_hold(i) {
                Ok(Place::Staged { slot, exclusive: None }) => {
                    transit.put(i, Place::Staged { slot, exclusive: Some(device) });
                    PageOutcome::Moved
                }
                Ok(Place::Staged { exclusive: Some(d), .. }) if d == device => {
                    transit.put_back(i);
                    PageOutcome::Already
                }
                // Touched again already: the caller asks again, or does without.
                Ok(_) => {
                    transit.put_back(i);
                    PageOutcome::Busy
                }
                Err(_) => PageOutcome::Busy,
            };
        }
        drop(transit);
        // Who removes the device says so and then looks for its pages: one of the two sees what the other did.
        fence(SeqCst);
        if !self.devices.get(device).is_some_and(Entry::is_live) {
            self.block_home(ctx, block, &PageSet::of(range), Why::Evicted, &mut |_, _| {});
            return Err(FaultError::NoDevice);
        }
        Ok(())
    }

    fn fault_in_for_exclusive(&'static self, ctx: &mut Ctx, range: PageRange) -> Result<(), FaultError> {
        let mut at = range.start();
        while let Ok(rest) = PageRange::from_ends(at, range.end()) {
            let vma = self.check_access(at, Access::Write)?;
            let piece = vma.range.intersection(rest).expect("the VMA holds the address");
            if let Some(block) = self.blocks.find(at) {
                // Another device's, exclusive or not, comes home, which tells that device.
                self.block_home(ctx, block, &PageSet::of(piece), Why::Exclusive, &mut |_, _| {});
            }
            self.populate(ctx, piece, Access::Write)?;
            at = piece.end();
        }
        Ok(())
    }

    /// The bytes of a page that `device` holds exclusively.
    pub(crate) fn exclusive_bytes(&self, device: DeviceId, addr: VirtAddr) -> Option<uhmm_sys::mem::HostBytes> {
        match self.blocks.find(addr)?.word(addr.page_in_block()).place() {
            Place::Staged { slot, exclusive: Some(d) } if d == device => Some(self.staging.bytes(slot, 1)),
            _ => None,
        }
    }
}
