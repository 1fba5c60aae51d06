//! Pages leave: out of the program into staging, and on to a device.
//!
//! The kernel's `migrate_vma_setup` / `pages` / `finalize`, per block:
//!
//! 1. *setup*: lock the pages, invalidate the mirrors, then inside the gate register the range and `MOVE` the pages
//!    into a staging chunk. From here on a CPU touch faults and waits.
//! 2. *pages*: find frames and copy. No lock is held but the pages' own, and nobody needs those to make progress.
//! 3. *finalize*: commit what worked; what did not is moved home, or rests in staging until it is touched.
//!
//! Every page ends moved or skipped with a reason. A page that is shared after a fork is made the process's own and
//! tried once more; one that is pinned stays.
//!
//! What is not migrated, and why: file-backed and shared memory (its pages belong to the file, not to the process),
//! huge pages of hugetlbfs (they cannot be split), special mappings, memory of another userfaultfd, and the engine's
//! own.

use uhmm_sys::{
    Errno,
    addr::{BLOCK_PAGES, PAGE_SIZE, PageRange, VirtAddr},
    maps::{Backing, Prot, Sharing, Vma},
    pagemap::Page,
    uffd::{SrcHoles, Wake},
};

use crate::{
    block::{Block, Place, Transit},
    device::{Cause, CopyOp, DevPfn, DeviceId, FrameRun, Invalidation},
    devices::Entry,
    engine::Core,
    home::{frame_run, span},
    os::{MANAGED, Os},
    page_set::{PageSet, Run},
    policy,
    staging::{Chunk, Left, Slot},
    thread::Ctx,
    trace::{Counter, Why},
};

macro_rules! outcomes {
    ($($(#[doc = $doc:literal])* $name:ident = $word:literal),* $(,)?) => {
        /// What became of one page.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        #[repr(u8)]
        pub enum PageOutcome { $($(#[doc = $doc])* $name),* }

        impl PageOutcome {
            /// Every outcome.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// A short phrase for output.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word),* }
            }

            /// Whether it may be another a moment later, though nobody changes the mapping.
            pub(crate) const fn is_passing(self) -> bool {
                matches!(
                    self,
                    Self::Untried
                        | Self::Pinned
                        | Self::Busy
                        | Self::Hole
                        | Self::OtherDevice
                        | Self::ExclusiveElsewhere
                        | Self::TimedOut
                )
            }

            pub(crate) fn from_bits(bits: u64) -> Self {
                usize::try_from(bits).ok().and_then(|n| Self::ALL.get(n)).copied().unwrap_or(Self::Failed)
            }
        }
    };
}

outcomes! {
    /// Nothing was tried.
    Untried = "untried",
    /// It moved.
    Moved = "moved",
    /// It was where it should go.
    Already = "already there",
    /// No memory is mapped there.
    Unmapped = "not mapped",
    /// A page of a file.
    FileBacked = "file-backed",
    /// Memory shared with other processes.
    SharedMapping = "shared mapping",
    /// A page of hugetlbfs.
    Hugetlb = "hugetlb",
    /// A mapping of the kernel or a driver.
    Special = "special mapping",
    /// The mapping allows no access at all.
    NoAccess = "no access",
    /// Another userfaultfd has the range.
    ForeignUserfaultfd = "another userfaultfd's",
    /// The engine's own memory, or a thread's control block.
    EngineOwned = "engine's own",
    /// Pinned for I/O, or still shared after an attempt to unshare it.
    Pinned = "pinned",
    /// In transit elsewhere.
    Busy = "busy",
    /// Never touched, and holes were not to be moved.
    Hole = "hole",
    /// The device has no room.
    Full = "device full",
    /// It came home too short a while ago.
    Hot = "hot",
    /// It is on another device.
    OtherDevice = "on another device",
    /// A device has it for exclusive access.
    ExclusiveElsewhere = "exclusively held",
    /// The device failed to copy it.
    DeviceFailed = "device failed",
    /// Its bytes are lost with a device.
    Poisoned = "poisoned",
    /// The kernel refuses: too many mappings, or out of memory.
    NoMemory = "no memory",
    /// The kernel cannot move pages of this mapping.
    NotMovable = "not movable",
    /// Some other page of an all-or-nothing request could not move.
    RolledBack = "rolled back",
    /// The budget of retries ran out while the program kept changing its address space.
    TimedOut = "timed out",
    /// Something else.
    Failed = "failed",
}

/// What a migration is to do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    /// Where to; `None` sets pages aside in staging.
    pub(crate) to: Option<DeviceId>,
    /// Recorded for each page.
    pub(crate) why: Why,
    /// Whether pages never touched become zero frames, as the kernel does it, or stay holes.
    pub(crate) holes: Holes,
    /// Whether pages on another device are fetched from there.
    pub(crate) other_devices: OtherDevices,
    /// Whether minimum residency counts.
    pub(crate) residency: ResidencyRule,
    /// The device whose request this is: its interval notifiers may ignore the invalidation.
    pub(crate) owner: Option<DeviceId>,
}

/// See [`Plan::holes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holes {
    Skip,
    Zero,
}

/// See [`Plan::other_devices`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OtherDevices {
    Leave,
    Fetch,
}

/// See [`Plan::residency`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ResidencyRule {
    Ignore,
    Obey,
    /// Warm pages stay, and are less warm afterwards.
    Cool,
}

/// One result per page of a block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outcomes(pub(crate) [PageOutcome; BLOCK_PAGES]);

impl Outcomes {
    pub(crate) fn new() -> Self {
        Self([PageOutcome::Untried; BLOCK_PAGES])
    }

    fn set(&mut self, pages: &PageSet, outcome: PageOutcome) {
        pages.iter().for_each(|i| self.0[i] = outcome);
    }

    pub(crate) fn pages(&self, outcome: PageOutcome) -> PageSet {
        (0..BLOCK_PAGES).filter(|&i| self.0[i] == outcome).collect()
    }
}

/// For how many ticks of history (16 ms each) a page stays after the program discarded it: half a second. The kernel
/// drops it some time after it has said so, when the thread that asked runs again.
const DISCARD_TICKS: u32 = 32;

/// How often an operation on one block is tried again while the program changes its address space.
pub(crate) const ATTEMPTS: u32 = 200;

impl<O: Os> Core<O> {
    /// Moves the pages of `range`, which lies in one block, according to `plan`.
    ///
    /// # Locking
    /// The caller holds no page and is outside the gate.
    pub(crate) fn migrate_out(&'static self, ctx: &mut Ctx, range: PageRange, plan: &Plan, outcomes: &mut Outcomes) {
        let mut at = range.start();
        while let Ok(rest) = PageRange::from_ends(at, range.end()) {
            let vma = match self.os.vma(at) {
                Ok(vma) => vma,
                Err(_) => return outcomes.set(&PageSet::of(rest), PageOutcome::Failed),
            };
            let Some((vma, piece)) = vma.and_then(|v| v.range.intersection(rest).map(|piece| (v, piece))) else {
                return outcomes.set(&PageSet::of(rest), PageOutcome::Unmapped);
            };
            if let Ok(gap) = PageRange::from_ends(at, piece.start()) {
                outcomes.set(&PageSet::of(gap), PageOutcome::Unmapped);
            }
            match refusal(&vma) {
                Some(reason) => outcomes.set(&PageSet::of(piece), reason),
                None => self.migrate_piece(ctx, piece, vma.prot, plan, outcomes),
            }
            at = piece.end();
        }
    }

    /// Moves pages of one VMA within one block; tries again what deserves it.
    fn migrate_piece(&'static self, ctx: &mut Ctx, piece: PageRange, prot: Prot, plan: &Plan, outcomes: &mut Outcomes) {
        let mut want = PageSet::of(piece);
        let mut exclude = |r| {
            let own = PageSet::of(r);
            outcomes.set(&own, PageOutcome::EngineOwned);
            want = want.minus(&own);
        };
        ctx.excluded.touching(piece, &mut exclude);
        // Only to save the trouble: what counts is what is there when the pages are locked.
        self.os.fixed(piece, &mut exclude);
        if want.is_empty() {
            return;
        }
        let Ok(block) = self.blocks.find_or_add(piece.start(), SPARE_RECORDS) else {
            return outcomes.set(&want, PageOutcome::NoMemory);
        };
        let hot = match plan.residency {
            ResidencyRule::Obey if !policy::may_leave(block.policy(), self.now_ms()) => want,
            ResidencyRule::Ignore | ResidencyRule::Obey => PageSet::EMPTY,
            ResidencyRule::Cool => want.iter().filter(|&i| block.word(i).is_cpu() && block.cool(i)).collect(),
        };
        if !hot.is_empty() {
            self.stats.add(Counter::SkippedHot, hot.count());
            outcomes.set(&hot, PageOutcome::Hot);
            want = want.minus(&hot);
            if want.is_empty() {
                return;
            }
        }
        let mut unshared = PageSet::EMPTY;
        for attempt in 0..ATTEMPTS {
            if !self.wait_thawed() {
                return outcomes.set(&want, PageOutcome::Busy);
            }
            let mut pass = Pass::default();
            self.out_pass(ctx, block, piece, prot, plan, &want, &mut pass, outcomes);
            let shared = pass.shared.minus(&unshared);
            outcomes.set(&pass.shared.and(&unshared), PageOutcome::Pinned);
            self.stats.add(Counter::SkippedPinned, pass.shared.and(&unshared).count());
            // Pages shared after a fork, or merged: make them the process's own, with no lock held, and try once more.
            for run in shared.runs() {
                let _ = self.os.populate_write(block.run(run));
            }
            unshared = unshared.or(&shared);
            want = shared.or(&pass.again);
            if want.is_empty() {
                break;
            }
            if !pass.again.is_empty() {
                self.settle_events(ctx, attempt);
            }
        }
        outcomes.set(&want, PageOutcome::TimedOut);
        if plan.to.is_some_and(|to| self.devices.is_coherent(to)) {
            self.map_migrated(ctx, block, &PageSet::of(piece));
        }
    }

    /// One attempt at `want`.
    #[expect(clippy::too_many_arguments, reason = "the pass's inputs and its two results")]
    fn out_pass(
        &'static self,
        ctx: &mut Ctx,
        block: Block,
        piece: PageRange,
        prot: Prot,
        plan: &Plan,
        want: &PageSet,
        pass: &mut Pass,
        outcomes: &mut Outcomes,
    ) {
        let Some(_running) = self.begin_out() else {
            pass.again = *want;
            return;
        };
        let mut transit = Transit::new(block, self);
        let mut staged = PageSet::EMPTY;
        let mut resident = PageSet::EMPTY;
        let mut elsewhere = PageSet::EMPTY;
        let mut mapped = PageSet::EMPTY;
        let recently = self.ticks().wrapping_sub(DISCARD_TICKS);
        for i in want.iter() {
            outcomes.0[i] = match transit.try_hold(i) {
                Err(_) => {
                    self.stats.add(Counter::SkippedBusy, 1);
                    PageOutcome::Busy
                }
                // The kernel may be about to drop it.
                Ok(Place::Cpu) if block.is_discarded_since(i, recently) => {
                    transit.put_back(i);
                    PageOutcome::Busy
                }
                Ok(Place::Cpu) => {
                    resident.insert(i);
                    continue;
                }
                Ok(Place::Staged { exclusive: None, .. }) if plan.to.is_some() => {
                    staged.insert(i);
                    continue;
                }
                Ok(Place::Device { device, .. })
                    if plan.other_devices == OtherDevices::Fetch && plan.to.is_some_and(|to| to != device) =>
                {
                    elsewhere.insert(i);
                    continue;
                }
                Ok(Place::Coherent { device, .. })
                    if plan.other_devices == OtherDevices::Fetch && plan.to.is_some_and(|to| to != device) =>
                {
                    mapped.insert(i);
                    continue;
                }
                Ok(place) => {
                    transit.put_back(i);
                    match place {
                        Place::Staged { exclusive: Some(_), .. } => PageOutcome::ExclusiveElsewhere,
                        Place::Staged { exclusive: None, .. } => PageOutcome::Already,
                        Place::Device { device, .. } | Place::Coherent { device, .. }
                            if plan.to.is_none_or(|to| to == device) =>
                        {
                            PageOutcome::Already
                        }
                        Place::Device { .. } | Place::Coherent { .. } => PageOutcome::OtherDevice,
                        Place::Poisoned { .. } => PageOutcome::Poisoned,
                        Place::Cpu => unreachable!("handled above"),
                    }
                }
            };
        }
        let mut holes = PageSet::EMPTY;
        let mut huge = false;
        // Who begins a system call from now on finds the pages locked, and waits.
        let held = self.staying(piece, Stay::Held);
        let used = resident.and(&held);
        if !used.is_empty() {
            self.stats.add(Counter::SkippedPinned, used.count());
            outcomes.set(&used, PageOutcome::Pinned);
            used.iter().for_each(|i| transit.put_back(i));
            resident = resident.minus(&used);
        }
        if !resident.is_empty() {
            let moved = self.take_out(ctx, &mut transit, piece, prot, plan, &resident, &held, pass, outcomes);
            staged = staged.or(&moved.present);
            holes = moved.holes;
            huge = moved.huge;
        }
        let Some(entry) = plan.to.and_then(|to| self.devices.get(to)) else {
            self.rest(&mut transit, &staged, plan.why, outcomes);
            for i in holes.iter() {
                transit.put_back(i);
            }
            outcomes.set(&holes, PageOutcome::Hole);
            return;
        };
        if !mapped.is_empty() {
            let unmapped = self.unmap_frames(ctx, &mut transit, &mapped);
            elsewhere = elsewhere.or(&unmapped.in_frames);
            pass.shared = pass.shared.or(&unmapped.shared);
            pass.again = pass.again.or(&unmapped.again).or(&unmapped.as_they_are);
            for i in mapped.minus(&unmapped.in_frames).iter() {
                transit.put_back(i);
            }
        }
        if !elsewhere.is_empty() {
            let fetched = self.fetch(&mut transit, &elsewhere, outcomes);
            staged = staged.or(&fetched);
        }
        let failed = self.to_device(&mut transit, entry, &staged, huge, plan.why, outcomes);
        if plan.holes == Holes::Zero {
            self.zero_frames(&mut transit, entry, &holes, plan.why, outcomes);
        } else {
            outcomes.set(&holes, PageOutcome::Hole);
        }
        drop(transit);
        if !failed.is_empty() {
            // Outside the locks: whoever touches one of these first brings it home as well.
            self.bring_home(ctx, block, &failed, |_| Why::RolledBack);
        }
    }

    /// Writes pages of `want` that stand in staging on to `device`. Returns how many went.
    ///
    /// # Locking
    /// The caller holds no page and is outside the gate.
    pub(crate) fn push_staged(&'static self, block: Block, device: DeviceId, want: &PageSet, why: Why) -> usize {
        let Some(_running) = self.begin_out() else { return 0 };
        let Some(entry) = self.devices.get(device) else { return 0 };
        let mut transit = Transit::new(block, self);
        let mut staged = PageSet::EMPTY;
        for i in want.iter() {
            match transit.try_hold(i) {
                Ok(Place::Staged { exclusive: None, .. }) => staged.insert(i),
                Ok(_) => transit.put_back(i),
                Err(_) => {}
            }
        }
        let mut outcomes = Outcomes::new();
        // What finds no frame rests in staging on.
        let failed = self.to_device(&mut transit, entry, &staged, false, why, &mut outcomes);
        staged.count() - failed.count()
    }

    /// The pages of `piece`, which lies in one block, that must stay.
    ///
    /// # Locking
    /// As [`Os::held`].
    pub(crate) fn staying(&self, piece: PageRange, stay: Stay) -> PageSet {
        let mut pages = PageSet::EMPTY;
        let mut add = |part| pages = pages.or(&PageSet::of(part));
        match stay {
            Stay::Fixed => self.os.fixed(piece, &mut add),
            Stay::Held => self.os.held(piece, &mut add),
        }
        pages
    }

    /// Registers a piece of a block, but for the pages in `held` and those that must never be. Returns the latter too.
    ///
    /// # Errors
    /// As [`Os::register`].
    ///
    /// # Locking
    /// The caller has the block's registration lock: who fixes a range now waits for it, and unregisters the range then.
    fn register_piece(&self, block: Block, piece: PageRange, held: &PageSet) -> Result<PageSet, Errno> {
        let fixed = self.staying(piece, Stay::Fixed);
        let stay = held.or(&fixed);
        if stay.is_empty() {
            self.os.register(piece, MANAGED)?;
        } else {
            PageSet::of(piece).minus(&stay).runs().try_for_each(|run| self.os.register(block.run(run), MANAGED))?;
        }
        Ok(fixed)
    }

    /// Setup: takes pages out of the program into staging. Held pages that did not move are let go.
    #[expect(clippy::too_many_arguments, reason = "the pass's inputs and its two results")]
    fn take_out(
        &'static self,
        ctx: &mut Ctx,
        transit: &mut Transit<'_>,
        piece: PageRange,
        prot: Prot,
        plan: &Plan,
        resident: &PageSet,
        held: &PageSet,
        pass: &mut Pass,
        outcomes: &mut Outcomes,
    ) -> TakenOut {
        let block = transit.block();
        let around = block.run(span(resident).expect("the caller has pages to move"));
        let _invalidating = self.invalidate(&Invalidation { range: around, cause: Cause::Migrate, owner: plan.owner });
        let mut refuse = |transit: &mut Transit<'_>, pages: &PageSet, outcome| {
            outcomes.set(pages, outcome);
            pages.iter().for_each(|i| transit.put_back(i));
        };
        let Some(berth) = self.berth(ctx, resident) else {
            refuse(transit, resident, PageOutcome::NoMemory);
            return TakenOut::default();
        };
        let lifted = !self.os.has_move() || !prot.contains(Prot::WRITE);
        let mut taken = PageSet::EMPTY;
        let mut left = *resident;
        let mut stop = None;
        let mut holes = Src::NoHoles;
        let changes;
        {
            let Ok(_inside) = self.gate.enter(ctx.slot) else {
                self.leave_berth(ctx, berth, Berthed::Untouched);
                pass.again = pass.again.or(resident);
                resident.iter().for_each(|i| transit.put_back(i));
                return TakenOut::default();
            };
            let _registration = block.lock_registration();
            changes = self.lifts.changes();
            // What is at these addresses may have come there by a change that the books do not know yet.
            if self.is_changing() {
                stop = Some(Errno::AGAIN);
            } else {
                match self.register_piece(block, piece, held) {
                    Ok(fixed) => {
                        // A thread was made meanwhile whose stack is here.
                        let stay = left.and(&fixed);
                        left = left.minus(&stay);
                        refuse(transit, &stay, PageOutcome::Pinned);
                    }
                    Err(error) => stop = Some(error),
                }
                if stop.is_none() && lifted && !self.is_still_movable(piece) {
                    stop = Some(Errno::SRCH);
                }
            }
            if stop.is_none() && !lifted {
                let to = |i| self.staging.addr(berth.slot(i));
                holes = self.move_runs(block, &to, &mut left, &mut taken, pass, &mut stop);
                // Under the registration lock: whoever looks for a block of which nothing is away must see these.
                for i in taken.iter() {
                    transit.set(i, Place::Staged { slot: berth.slot(i), exclusive: None });
                }
            }
        }
        // `MOVE` refuses memory that differs from staging in more than its place.
        let differs =
            stop == Some(Errno::INVAL) && taken.is_empty() && plan.why.is_asked() && self.differs(piece, prot);
        if lifted && stop.is_none() || differs {
            (taken, stop) = self.lift_out(ctx, transit, berth, changes, &mut left, pass);
            holes = Src::Told;
        }
        let (present, huge) = match holes {
            Src::NoHoles => (taken, taken == PageSet::ALL && self.is_huge(self.staging.chunk_range(berth.chunk))),
            Src::MayHaveHoles => self.present(berth, &taken),
            Src::Told => (taken.iter().filter(|&i| transit.place(i) != Place::Cpu).collect(), false),
        };
        let holes = taken.minus(&present);
        for i in holes.iter() {
            transit.set(i, Place::Cpu);
        }
        if !present.is_empty() {
            self.staging.arrive(berth.chunk, present.count(), huge && !berth.shared);
            self.stats.add(Counter::PagesStaged, present.count());
        }
        let berthed = match stop {
            _ if !present.is_empty() => Berthed::Standing,
            Some(Errno::EXIST) => Berthed::Blocked,
            _ => Berthed::Empty,
        };
        self.leave_berth(ctx, berth, berthed);
        // What is left was not taken: shared or pinned pages, or all of it where the kernel refused.
        if !left.is_empty() {
            let outcome = match stop {
                // `EEXIST`: the program has locked all of its memory, which filled the empty chunk; it is empty again now.
                Some(Errno::AGAIN | Errno::EXIST) => {
                    pass.again = pass.again.or(&left.minus(&pass.shared));
                    PageOutcome::Untried
                }
                Some(Errno::BUSY) => PageOutcome::ForeignUserfaultfd,
                Some(Errno::NOMEM) => PageOutcome::NoMemory,
                Some(Errno::NOENT | Errno::SRCH) => PageOutcome::Unmapped,
                _ => PageOutcome::NotMovable,
            };
            self.stats.add(Counter::SkippedOther, if outcome == PageOutcome::Untried { 0 } else { left.count() });
            refuse(transit, &left, outcome);
        }
        TakenOut { present, holes, huge: huge && present == PageSet::ALL }
    }

    /// The mapping that holds all of `piece`, if one does.
    fn whole_vma(&self, piece: PageRange) -> Option<Vma> {
        self.os.vma(piece.start()).ok()?.filter(|vma| vma.range.contains_range(piece))
    }

    /// Whether memory with this protection is unlike staging: it is locked or executable. If not, the mapping was cut
    /// since it was looked up.
    fn differs(&self, piece: PageRange, prot: Prot) -> bool {
        self.whole_vma(piece).is_some() && (prot != Prot::READ | Prot::WRITE || self.os.is_locked(piece))
    }

    /// Whether the mapping that the caller knows of is there, after it was registered: what is there then need not be what
    /// was there before, and registering only asks that something is. From now on every change raises an event.
    fn is_still_movable(&self, piece: PageRange) -> bool {
        self.whole_vma(piece).is_some_and(|vma| refusal(&vma).is_none())
    }

    /// `MOVE`s runs of held pages, each to where `to` says. Pages found shared or pinned go to `pass.shared`; they and those
    /// after `stop` stay in `left`. Says whether some of those taken may have been holes.
    pub(crate) fn move_runs(
        &self,
        block: Block,
        to: &dyn Fn(usize) -> VirtAddr,
        left: &mut PageSet,
        taken: &mut PageSet,
        pass: &mut Pass,
        stop: &mut Option<Errno>,
    ) -> Src {
        let mut src = Src::NoHoles;
        for run in left.runs() {
            let mut first = run.first;
            let end = run.first + run.count;
            while first < end {
                let from = block.page(first);
                let len = (end - first) as u64 * PAGE_SIZE;
                // Where all pages are there, nobody has to look afterwards which of them were.
                let holes = if src == Src::NoHoles { SrcHoles::Fail } else { SrcHoles::Allow };
                let result = self.os.move_pages(to(first), from, len, holes, Wake::Later);
                let moved = usize::try_from(result.done / PAGE_SIZE).expect("at most a block");
                for i in first..first + moved {
                    taken.insert(i);
                    left.remove(i);
                }
                first += moved;
                if moved > 0 {
                    continue;
                }
                match result.stop {
                    None => unreachable!("a call without progress says why"),
                    Some(Errno::NOENT) if src == Src::NoHoles => src = Src::MayHaveHoles,
                    Some(Errno::BUSY) => {
                        // A huge page is pinned as one; going on behind its first piece would split it.
                        let huge = self.is_huge(block.run(Run { first, count: 1 }));
                        let until = if huge { end } else { first + 1 };
                        (first..until).for_each(|i| pass.shared.insert(i));
                        first = until;
                    }
                    // What is there is no page (a guard, say): the others go on.
                    Some(Errno::FAULT) => first += 1,
                    Some(error) => {
                        *stop = Some(error);
                        return src;
                    }
                }
            }
        }
        src
    }

    /// Whether the first page of `range` is mapped as part of a huge page.
    fn is_huge(&self, range: PageRange) -> bool {
        self.os.page(range.start()).is_ok_and(|page| page.contains(Page::HUGE))
    }

    /// Which of `taken` stand in `chunk`, and whether they are one huge page. The others were holes.
    fn present(&self, berth: Berth, taken: &PageSet) -> (PageSet, bool) {
        let mut pages = [Page::empty(); BLOCK_PAGES];
        let slots = Run { first: berth.first, count: berth.pages.count() };
        let pages = &mut pages[..slots.count];
        if self.os.scan(self.staging.run(berth.chunk, slots), pages).is_err() {
            // Treating a hole as a page costs a copy of zeros; the reverse would lose a page.
            return (*taken, false);
        }
        let present = taken.iter().filter(|&i| pages[berth.pages.rank(i)].is_there()).collect();
        (present, pages[0].contains(Page::HUGE))
    }

    /// Lets pages rest in staging.
    fn rest(&self, transit: &mut Transit<'_>, staged: &PageSet, why: Why, outcomes: &mut Outcomes) {
        let ticks = self.ticks();
        for i in staged.iter() {
            transit.block().set_history(i, ticks, why);
            transit.put_back(i);
        }
        outcomes.set(staged, PageOutcome::Moved);
    }

    /// Pages and finalize: copies staged pages to frames of `entry`. Returns those that found no frame or whose copy
    /// failed; they were let go in staging.
    fn to_device(
        &self,
        transit: &mut Transit<'_>,
        entry: &'static Entry,
        staged: &PageSet,
        huge: bool,
        why: Why,
        outcomes: &mut Outcomes,
    ) -> PageSet {
        let mut failed = PageSet::EMPTY;
        let mut rest = *staged;
        while let Some(run) = rest.runs().next() {
            let slot_of = |i: usize| match transit.place(i) {
                Place::Staged { slot, .. } => slot,
                place => unreachable!("page {i} of a staged run is {place:?}"),
            };
            let slot = slot_of(run.first);
            let same = run
                .pages()
                .zip(slot.index()..)
                .take_while(|&(i, index)| slot_of(i).chunk() == slot.chunk() && slot_of(i).index() == index)
                .count();
            let give_up = |transit: &mut Transit<'_>, rest: &mut PageSet, failed: &mut PageSet, pages: PageSet| {
                for i in pages.iter() {
                    rest.remove(i);
                    failed.insert(i);
                    transit.put_back(i);
                }
            };
            let Some(frames) = self.alloc(entry, same) else {
                outcomes.set(&rest, PageOutcome::Full);
                self.stats.add(Counter::SkippedFull, rest.count());
                let all = rest;
                give_up(transit, &mut rest, &mut failed, all);
                break;
            };
            let run = Run { first: run.first, count: frames.count as usize };
            let host = self.staging.bytes(slot, run.count);
            if entry.device().copy_to_device(&[CopyOp { host, frames }]).is_err() {
                entry.free(frames);
                let pages = PageSet::span(run.first, run.first + run.count);
                outcomes.set(&pages, PageOutcome::DeviceFailed);
                give_up(transit, &mut rest, &mut failed, pages);
                continue;
            }
            self.commit(transit, entry, run, frames, why);
            for i in run.pages() {
                rest.remove(i);
                outcomes.0[i] = PageOutcome::Moved;
            }
            if let Left::Zap(chunk) = self.staging.leave(slot.chunk(), 0, run.count) {
                self.zap_chunk(chunk);
            }
            self.stats.add(Counter::PagesOut, run.count);
            if huge && run.count == BLOCK_PAGES {
                self.stats.add(Counter::FoliosOut, 1);
                // What was cold is as likely to be wanted in part.
                if why != Why::Cold {
                    policy::left_whole(transit.block().policy());
                }
            }
        }
        failed
    }

    /// Gives pages that were never touched zero frames.
    fn zero_frames(
        &self,
        transit: &mut Transit<'_>,
        entry: &'static Entry,
        holes: &PageSet,
        why: Why,
        outcomes: &mut Outcomes,
    ) {
        let mut rest = *holes;
        while let Some(run) = rest.runs().next() {
            let Some(frames) = self.alloc(entry, run.count) else {
                outcomes.set(&rest, PageOutcome::Full);
                self.stats.add(Counter::SkippedFull, rest.count());
                return;
            };
            let run = Run { first: run.first, count: frames.count as usize };
            let outcome = if entry.device().zero(frames).is_ok() {
                self.commit(transit, entry, run, frames, why);
                self.stats.add(Counter::PagesOut, run.count);
                PageOutcome::Moved
            } else {
                entry.free(frames);
                run.pages().for_each(|i| transit.put_back(i));
                PageOutcome::DeviceFailed
            };
            for i in run.pages() {
                rest.remove(i);
                outcomes.0[i] = outcome;
            }
        }
    }

    fn commit(&self, transit: &mut Transit<'_>, entry: &Entry, run: Run, frames: FrameRun, why: Why) {
        let ticks = self.ticks();
        let block = transit.block();
        for (i, n) in run.pages().zip(0..) {
            let pfn = frames.first.add(n);
            entry.set_hint(pfn, block.page(i));
            block.set_history(i, ticks, why);
            transit.put(i, Place::Device { device: entry.id(), pfn });
        }
    }

    /// Copies pages from other devices into staging, on their way to this one. What fails is let go where it is.
    fn fetch(&self, transit: &mut Transit<'_>, elsewhere: &PageSet, outcomes: &mut Outcomes) -> PageSet {
        let block = transit.block();
        let around = span(elsewhere).expect("the caller has pages to fetch");
        let _invalidating =
            self.invalidate(&Invalidation { range: block.run(around), cause: Cause::Migrate, owner: None });
        let mut fetched = PageSet::EMPTY;
        let chunk = self.staging_chunk();
        for i in elsewhere.iter() {
            let Place::Device { device, pfn } = transit.place(i) else { unreachable!("only device pages are here") };
            let copied = chunk.zip(self.devices.get(device)).is_some_and(|(chunk, entry)| {
                let host = self.staging.bytes(chunk.slot(i), 1);
                entry.device().copy_to_host(&[CopyOp { host, frames: frame_run(pfn, 1) }]).is_ok()
            });
            match chunk {
                Some(chunk) if copied => {
                    self.staging.arrive(chunk, 1, false);
                    transit.set(i, Place::Staged { slot: chunk.slot(i), exclusive: None });
                    self.renew_frames(device, pfn, 1);
                    self.free_frames(device, frame_run(pfn, 1));
                    fetched.insert(i);
                }
                _ => {
                    outcomes.0[i] = PageOutcome::OtherDevice;
                    transit.put_back(i);
                }
            }
        }
        if let Some(chunk) = chunk.filter(|_| fetched.is_empty()) {
            self.zap_chunk(chunk);
        }
        fetched
    }

    /// Slots for `pages` on their way out, side by side: the same as they have in their block where it is all of them, so
    /// that a huge folio stays whole, or the next ones of the thread's own chunk for a few.
    fn berth(&self, ctx: &mut Ctx, pages: &PageSet) -> Option<Berth> {
        let pages = *pages;
        if pages.count() > FEW_PAGES {
            return Some(Berth { chunk: self.staging_chunk()?, first: 0, pages, shared: false });
        }
        if let Some(slot) = ctx.out.room(pages.count()) {
            return Some(Berth { chunk: slot.chunk(), first: slot.index(), pages, shared: true });
        }
        let chunk = self.staging_chunk()?;
        // The thread's own use counts as a page that stands in it, so that the chunk outlives those that leave.
        self.staging.arrive(chunk, 1, false);
        self.retire(ctx.out.replace(Some(chunk)));
        Some(Berth { chunk, first: 0, pages, shared: true })
    }

    /// Ends the use of a berth.
    fn leave_berth(&self, ctx: &mut Ctx, berth: Berth, berthed: Berthed) {
        match (berthed, berth.shared) {
            (Berthed::Untouched, true) | (Berthed::Standing, false) => {}
            (Berthed::Untouched, false) => self.staging.put_empty(berth.chunk),
            (Berthed::Empty | Berthed::Standing, true) => ctx.out.advance(berth.pages.count()),
            // Whatever was in the way goes with the chunk.
            (Berthed::Blocked, true) => self.retire(ctx.out.replace(None)),
            (Berthed::Blocked | Berthed::Empty, false) => self.zap_chunk(berth.chunk),
        }
    }

    /// Gives up a thread's own chunk.
    fn retire(&self, chunk: Option<Chunk>) {
        if let Some(chunk) = chunk
            && let Left::Zap(chunk) = self.staging.leave(chunk, 1, 0)
        {
            self.zap_chunk(chunk);
        }
    }

    /// An empty chunk, if need be one that held garbage.
    fn staging_chunk(&self) -> Option<Chunk> {
        self.staging.take_empty().or_else(|| {
            let chunk = self.staging.shrink()?;
            self.empty_chunk(chunk).then_some(chunk)
        })
    }

    /// As [`Entry::alloc`]; where there is no room, ended processes may have some.
    fn alloc(&self, entry: &'static Entry, pages: usize) -> Option<FrameRun> {
        entry.alloc(pages).or_else(|| if self.sweep() == 0 { None } else { entry.alloc(pages) })
    }

    /// Frees `frames`, and tells the device.
    pub(crate) fn free_frames(&self, device: DeviceId, frames: FrameRun) {
        if let Some(entry) = self.devices.get(device) {
            entry.free(frames);
        }
    }

    /// A frame that `device` uses for page `i` no more.
    pub(crate) fn free_frame(&self, device: DeviceId, pfn: DevPfn) {
        self.free_frames(device, frame_run(pfn, 1));
    }
}

/// So many pages share a chunk with others; more have one to themselves.
const FEW_PAGES: usize = 64;

/// Where pages stand in staging on their way out: in neighbouring slots, in order.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Berth {
    chunk: Chunk,
    /// The first slot of the chunk.
    first: usize,
    pages: PageSet,
    /// Whether other blocks' pages may stand in the chunk too.
    shared: bool,
}

impl Berth {
    /// The slot of page `i`, which is one of the berth's.
    pub(crate) fn slot(&self, i: usize) -> Slot {
        self.chunk.slot(self.first + self.pages.rank(i))
    }
}

/// How the use of a berth ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Berthed {
    /// Nothing was tried.
    Untouched,
    /// Something was in the way.
    Blocked,
    /// No page stands there.
    Empty,
    /// Pages stand there.
    Standing,
}

/// Records kept back for events that move pages, which cannot be refused.
pub(crate) const SPARE_RECORDS: u32 = 256;

/// Which pages are to stay where they are, and as they are registered.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stay {
    /// Those that never move.
    Fixed,
    /// Those and what a system call under way uses.
    Held,
}

/// What one attempt leaves to be done.
#[derive(Debug, Default)]
pub(crate) struct Pass {
    /// Refused because an event is pending.
    pub(crate) again: PageSet,
    /// Refused as shared or pinned.
    pub(crate) shared: PageSet,
}

/// What is known of the pages that setup took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Src {
    NoHoles,
    MayHaveHoles,
    /// Those that were there are known as staged already.
    Told,
}

/// What setup took.
#[derive(Debug, Default)]
struct TakenOut {
    present: PageSet,
    holes: PageSet,
    huge: bool,
}

/// Why pages of `vma` never migrate, if so.
pub(crate) fn refusal(vma: &Vma) -> Option<PageOutcome> {
    match (vma.sharing, vma.backing) {
        _ if vma.page_size > PAGE_SIZE => Some(PageOutcome::Hugetlb),
        (_, Backing::Special) => Some(PageOutcome::Special),
        (Sharing::Shared, _) => Some(PageOutcome::SharedMapping),
        (Sharing::Private, Backing::File) => Some(PageOutcome::FileBacked),
        (Sharing::Private, Backing::Anonymous | Backing::Stack | Backing::Heap) => {
            (!vma.prot.contains(Prot::READ)).then_some(PageOutcome::NoAccess)
        }
    }
}
