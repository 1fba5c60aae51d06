//! Forks: the child sees exactly the bytes of the moment of `fork`, whatever then happens to the parent.
//!
//! A fork by libc is prepared for: what is leaving ends, nothing leaves any more, and pages in staging come home. For
//! pages on devices there are two ways:
//!
//! - *Home*: they come home too. The child then has all bytes by the kernel's own copy-on-write, and needs nobody.
//! - *Shared*: frames of devices whose memory the child can reach get one reference more, and stay. The child takes
//!   its copy of the page states over, with a userfaultfd and threads of its own, before `fork` returns there. Neither
//!   writes to a frame that the other has too: a device that wants to write brings the page home first. This keeps a
//!   process that forks to save itself (a database) from filling RAM.
//!
//! In the child each page that is away by the books is looked up in the child's own page table: a page that was on its
//! way home at that moment is either there, and then newer, or not, and then still in its frame. What the child has a
//! reference to and no page in (pages that came home between the preparation and the fork) it gives back.
//!
//! A fork by a raw system call raises an event where the process is privileged, and the child is given the bytes of
//! the pages that are away before anything else happens (see [`crate::events`]). `uhmm doctor` says where it is not.
//! `vfork` and `posix_spawn` share the memory; the parent's handlers serve the child's faults as their own.
//!
//! Not covered: an `mremap` or `munmap` of pages that are away by another thread in the very instant of the fork, whose
//! event has not been read yet.

use std::{
    ops::ControlFlow,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{
            AtomicBool, AtomicU32, AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Acquire, Release},
        },
    },
    time::Duration,
};

use uhmm_sys::{
    Errno,
    addr::{BLOCK_PAGES, PageRange},
    fork,
    maps::Prot,
    pagemap::{Page, Pagemap},
    uffd::{RegisterMode, Wake},
};

use crate::{
    block::{Block, Place, Transit},
    device::{Cause, DevPfn, DeviceId, Invalidation},
    engine::Core,
    family::Member,
    gate::pause,
    job::{Reply, Request},
    linux::LinuxMm,
    migrate::PageOutcome,
    mm,
    ops::whole_space,
    os::{MANAGED, Os},
    page_set::PageSet,
    staging::Staging,
    sync::Waiter,
    thread::Ctx,
    trace::{Counter, Why},
};

/// What becomes of pages on devices at a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// They come home.
    Home,
    /// Their frames are shared, where the device can, with a child that will have this place in the family.
    Shared(Member),
}

static REGISTERED: OnceLock<bool> = OnceLock::new();
static IN_CHILD: OnceLock<fn()> = OnceLock::new();
/// How many forks lie between this process and the one that was executed.
static GENERATION: AtomicUsize = AtomicUsize::new(0);
/// Taken from the preparation of a fork to its end: forks take turns.
static TURN: AtomicBool = AtomicBool::new(false);
/// The thread whose fork it is, from its preparation to its end; 0 for none.
static FORKING: AtomicU32 = AtomicU32::new(0);
/// What the fork whose turn it is was prepared for. Only its thread takes the lock.
static UNDER_WAY: Mutex<Option<(&'static Core<LinuxMm>, Sharing)>> = Mutex::new(None);

/// Has `f` called in each forked child, after the engine's state was made right there. The first call counts.
pub fn after_fork_in_child(f: fn()) {
    let _ = IN_CHILD.set(f);
}

/// How many forks lie between this process and the one that was executed.
pub(crate) fn generation() -> usize {
    GENERATION.load(Acquire)
}

/// Whether the calling thread is in the middle of a fork by the C library.
#[must_use]
pub fn is_prepared() -> bool {
    FORKING.load(Acquire) == uhmm_sys::thread::gettid()
}

/// Sees to it that forks are prepared for. Returns whether they are.
pub fn register() -> bool {
    *REGISTERED.get_or_init(|| fork::at_fork(prepare, parent, child).is_ok())
}

extern "C" fn prepare() {
    let mut spins = 0;
    while TURN.swap(true, AcqRel) {
        pause(&mut spins);
    }
    let under_way = mm::current().map(|(core, threads)| {
        // The child needs a userfaultfd at once; a thread that has dropped its privileges may not be able to get one.
        let place = match threads {
            mm::Threads::Hidden if LinuxMm::can_open() => prepare_to_share(core),
            mm::Threads::Hidden | mm::Threads::Ordinary => None,
        };
        let sharing = place.map_or(Sharing::Home, Sharing::Shared);
        core.call(Request::ForkPrepare { sharing }, |_, _| ());
        if place.is_some() {
            // What libc itself touches in the child before it calls us.
            fork::touch_stdio();
        }
        (core, sharing)
    });
    *UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner) = under_way;
    FORKING.store(uhmm_sys::thread::gettid(), Release);
    fork::set_errno(0);
}

/// Prepares the devices for a child that has their frames too, and finds it a place in the family. `None`: it cannot share
/// frames, and nothing is prepared.
fn prepare_to_share(core: &'static Core<LinuxMm>) -> Option<Member> {
    let engine_thread = core.call(Request::EngineThread, |_, reply| match reply {
        Reply::Thread(id) => id,
        reply => unreachable!("{reply:?} is no answer to who the engine is"),
    });
    let mut ready = true;
    core.devices.for_each(|entry| {
        ready &= !entry.survives_fork() || entry.device().before_fork(engine_thread).is_ok();
    });
    let place = if ready { core.family.conceive(engine_thread) } else { None };
    if place.is_none() {
        end_fork(core);
    }
    place
}

/// Closes in the calling thread's table what was opened there for the child.
fn end_fork(core: &Core<LinuxMm>) {
    core.family.claims().end_fork();
    core.devices.for_each(|entry| entry.device().end_fork());
}

extern "C" fn parent() {
    let failed = fork::errno();
    let under_way = UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner).take();
    match under_way {
        Some((core, Sharing::Shared(child))) => {
            // The event of the fork was read; until it is applied, it must be known whose it is.
            core.gate.wait_open();
            core.share(false);
            if failed == 0 {
                // Not a job: the movers may all be waiting for just this.
                core.thaw();
            } else {
                core.call(Request::ForkFailed { child }, |_, _| ());
            }
            // The child's claim with it; without one a child that was never born would be taken for a dead one.
            end_fork(core);
        }
        Some((core, Sharing::Home)) => core.thaw(),
        None => {}
    }
    FORKING.store(0, Release);
    TURN.store(false, Release);
    fork::set_errno(failed);
}

extern "C" fn child() {
    fork::reset_in_child();
    let under_way = UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner).take();
    GENERATION.fetch_add(1, Release);
    FORKING.store(0, Release);
    TURN.store(false, Release);
    mm::forget();
    if let Some((core, Sharing::Shared(member))) = under_way {
        let mut any = core.count_away(whole_space()) != 0;
        core.devices.for_each(|entry| any |= entry.has_any(member));
        if !any {
            // It has no part in any frame.
            core.family.release(member);
        } else {
            core.family.claims().take_over();
            core.devices.for_each(|entry| entry.device().after_fork_in_child());
            if let Err(error) = mm::take_over(core, member) {
                // Going on would read zeros where the bytes are away.
                fork::die(&format!("uhmm: a forked child cannot take its memory over: {error}\n"));
            }
        }
        end_fork(core);
    } else if let Some((core, Sharing::Home)) = under_way
        && !core.os.tells_of_forks()
    {
        core.deny_what_is_away();
    }
    if let Some(f) = IN_CHILD.get() {
        f();
    }
}

impl<O: Os> Core<O> {
    pub(crate) fn prepare_fork(&'static self, ctx: &mut Ctx, sharing: Sharing) {
        self.stats.add(Counter::Forks, 1);
        self.freeze();
        if let Sharing::Shared(child) = sharing {
            self.share(true);
            // No event is applied meanwhile: a page that `mremap` moved to another block would be shared twice, or not at all.
            let _reader = self.lock_reader();
            self.blocks.for_each(whole_space(), |block| {
                if block.away() != 0 {
                    self.share_block(block, child);
                }
                ControlFlow::Continue(())
            });
        }
        // No device may write to a frame that the child has too. After they are shared: who asks now finds them so.
        drop(self.invalidate(&Invalidation { range: whole_space(), cause: Cause::Fork, owner: None }));
        let mut idle = 0;
        while self.any_must_come_home() && idle < 2 {
            let (mut any, mut stuck) = (false, 0);
            self.blocks.for_each(whole_space(), |block| {
                let must = self.must_come_home(block);
                if must.is_empty() {
                    return ControlFlow::Continue(());
                }
                let mut moved = false;
                self.block_home(ctx, block, &must, Why::Fork, &mut |_, outcome| {
                    moved |= outcome != PageOutcome::TimedOut
                });
                any |= moved;
                stuck = if moved { 0 } else { stuck + 1 };
                // A device that fails is not asked for all that it has.
                if stuck < 3 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            });
            // One round without success may be due to pages that `mremap` moved to where they had been looked for.
            idle = if any { 0 } else { idle + 1 };
        }
        if sharing == Sharing::Home {
            self.poison_all(ctx);
            // What stays in host memory belongs to the child too: devices ask anew what they may do to it.
            drop(self.invalidate(&Invalidation { range: whole_space(), cause: Cause::Fork, owner: None }));
        }
    }

    /// Whether this process has a reference to a frame of `device`, which the parent had before it.
    fn has_frame(&self, device: DeviceId, pfn: DevPfn) -> bool {
        self.devices.get(device).is_some_and(|entry| entry.survives_fork() && entry.has(pfn))
    }

    /// Whether a forked child has the frames of `device` too.
    fn is_shared_by_forks(&self, device: DeviceId) -> bool {
        self.devices.get(device).is_some_and(|entry| entry.survives_fork())
    }

    /// Adds a reference to each frame of a block that the child can use. Those of pages that come home before the fork are
    /// the child's to give back.
    ///
    /// # Locking
    /// The caller has the reader's lock.
    fn share_block(&'static self, block: Block, child: Member) {
        let mut transit = Transit::new(block, self);
        for i in self.away(block).iter() {
            let place = transit.hold(i);
            if let Place::Device { device, pfn } = place
                && let Some(entry) = self.devices.get(device).filter(|entry| entry.survives_fork())
            {
                entry.share_with(child, pfn);
            }
            transit.put(i, place);
        }
    }

    /// The pages of a block whose bytes the child could not get at.
    fn must_come_home(&self, block: Block) -> PageSet {
        if block.away() == 0 {
            return PageSet::EMPTY;
        }
        (0..BLOCK_PAGES)
            .filter(|&i| match block.word(i).place() {
                Place::Device { device, .. } => !self.is_sharing() || !self.is_shared_by_forks(device),
                Place::Staged { .. } | Place::Coherent { .. } => true,
                Place::Cpu | Place::Poisoned { .. } => false,
            })
            .collect()
    }

    /// Whether some page has to come home before the fork. Pages do not move between blocks meanwhile.
    fn any_must_come_home(&self) -> bool {
        let _reader = self.lock_reader();
        let mut any = false;
        self.blocks.for_each(whole_space(), |block| {
            any = !self.must_come_home(block).is_empty();
            if any { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        any
    }

    /// Takes the references back that were added for a child that does not exist.
    pub(crate) fn unshare_frames(&self, child: Member) {
        self.devices.for_each(|entry| {
            entry.sweep(child);
        });
        self.family.release(child);
    }

    /// In a forked child: the parent's address space as the child's, on a seam of its own. No engine thread runs yet.
    pub(crate) fn inherit(parent: &Self, member: Member, os: O) -> Result<Self, Errno> {
        let staging: Staging = parent.staging.inherit()?;
        let member = (parent.family, member);
        let lifts = parent.lifts.inherit();
        let mut core = Self::assemble(os, parent.blocks.inherit(), staging, lifts, parent.stats, member)?;
        // What pages have been through is told in the parent's time.
        core.started_ns = parent.started_ns;
        let mut failed = None;
        // The others' memory is not there.
        parent.devices.for_each(|old| {
            if !old.survives_fork() {
                return;
            }
            let made = core.make_entry(old.id(), old.device(), old.shared_books()).and_then(|e| core.devices.put(e));
            failed = failed.or(made.err());
        });
        match failed {
            Some(errno) => Err(errno),
            None => Ok(core),
        }
    }

    /// In a forked child: settles where each page is, and registers the memory of those that are away. The caller is
    /// the only engine thread, and the program's only thread waits.
    pub(crate) fn adopt(&'static self) -> Result<(), Errno> {
        let mut waiter = Waiter::new(PARENTS_PATIENCE);
        let mut named = FrameSets::default();
        let mut result = Ok(());
        self.devices.for_each(|entry| match entry.frame_set() {
            Ok(set) => named[entry.id().index()] = set,
            Err(errno) => result = Err(errno),
        });
        result?;
        self.blocks.for_each(whole_space(), |block| {
            result = self.adopt_block(block, &named, &mut waiter);
            if result.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        result?;
        // What came home, or was dropped, between the preparation and the fork.
        self.devices.for_each(|entry| entry.keep_only(named[entry.id().index()]));
        let staging = self.staging.range();
        self.os.zap(staging)?;
        if self.os.has_move() {
            register_patiently(|| self.os.register(staging, RegisterMode::WP), &mut waiter)?;
        }
        Ok(())
    }

    /// Settles the pages of a block, and puts the frames that they are in into `named`.
    fn adopt_block(&'static self, block: Block, named: &FrameSets, waiter: &mut Waiter) -> Result<(), Errno> {
        let range = PageRange::block_of(block.base());
        let mut pages = [Page::empty(); BLOCK_PAGES];
        self.os.scan(range, &mut pages)?;
        let mut staged = PageSet::EMPTY;
        for (i, page) in pages.iter().enumerate() {
            let place = block.word(i).place();
            let here = page.is_there();
            match place {
                Place::Device { .. } if here => block.settle_in_child(i, Place::Cpu),
                Place::Device { device, pfn } if self.has_frame(device, pfn) => {
                    named[device.index()][pfn.get() as usize / 64].fetch_or(1 << (pfn.get() % 64), AcqRel);
                    block.settle_in_child(i, place);
                }
                // It could not come home before the fork. The frame is the parent's alone.
                Place::Device { device, .. } => block.settle_in_child(i, Place::Poisoned { device }),
                Place::Staged { .. } if !here => staged.insert(i),
                Place::Poisoned { .. } => block.settle_in_child(i, place),
                Place::Cpu | Place::Staged { .. } | Place::Coherent { .. } => block.settle_in_child(i, Place::Cpu),
            }
        }
        block.recount_in_child();
        if block.away() == 0 && staged.is_empty() {
            return Ok(());
        }
        let mut at = range.start();
        while let Ok(rest) = PageRange::from_ends(at, range.end()) {
            let Some(piece) = self.os.vma(at)?.and_then(|v| v.range.intersection(rest)) else { break };
            if !self.away(block).and(&PageSet::of(piece)).is_empty() {
                register_patiently(|| self.os.register(piece, MANAGED), waiter)?;
            }
            at = piece.end();
        }
        // Pages that could not come home before the fork stand in the child's copy of staging.
        for i in staged.iter() {
            let Place::Staged { slot, .. } = block.word(i).place() else { unreachable!("only staged pages are here") };
            let copied = self.os.copy(block.page(i), self.staging.bytes(slot, 1), Wake::Now);
            if let Some(errno) = copied.stop {
                return Err(errno);
            }
            block.settle_in_child(i, Place::Cpu);
        }
        block.recount_in_child();
        Ok(())
    }
}

impl Core<LinuxMm> {
    /// In a forked child that is not told of: pages that could not come home before (their device fails) must not be read as
    /// zeros. Nobody may touch them.
    fn deny_what_is_away(&self) {
        let Ok(pagemap) = Pagemap::open() else { return };
        let mut pages = [Page::empty(); BLOCK_PAGES];
        self.blocks.for_each(whole_space(), |block| {
            if block.away() != 0 && pagemap.scan(PageRange::block_of(block.base()), &mut pages).is_ok() {
                let missing: PageSet = self.away(block).iter().filter(|&i| !pages[i].is_there()).collect();
                for run in missing.runs() {
                    let _ = self.os.protect(block.run(run), Prot::empty());
                }
            }
            ControlFlow::Continue(())
        });
    }
}

/// For each device the frames that pages of this process are in, a bit for each.
type FrameSets = [&'static [AtomicU64]; DeviceId::MAX];

/// How long a child waits for its parent's engine to let go of its memory.
const PARENTS_PATIENCE: Duration = Duration::from_secs(10);

/// Registers memory that the parent's engine may still have to let go of.
fn register_patiently(mut register: impl FnMut() -> Result<(), Errno>, waiter: &mut Waiter) -> Result<(), Errno> {
    loop {
        match register() {
            Err(Errno::BUSY) if waiter.pause().is_ok() => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use uhmm_sys::{
        arena,
        uffd::{Features, Uffd},
    };

    use super::*;

    #[test]
    fn memory_that_another_userfaultfd_has_is_waited_for_until_the_bound() {
        const LIMIT: Duration = Duration::from_millis(300);
        let range = arena::pages(1 << 16, 1 << 16).unwrap();
        let [parents, childs] = [(); 2].map(|()| Uffd::open(Features::empty()).unwrap());
        parents.register(range, MANAGED).unwrap();
        let start = Instant::now();
        let register = || childs.register(range, MANAGED);
        assert_eq!(register_patiently(register, &mut Waiter::new(LIMIT)), Err(Errno::BUSY));
        assert!(start.elapsed() >= LIMIT, "{:?}", start.elapsed());
        std::thread::scope(|s| {
            s.spawn(|| {
                std::thread::sleep(LIMIT);
                drop(parents);
            });
            assert_eq!(register_patiently(register, &mut Waiter::new(100 * LIMIT)), Ok(()));
        });
    }
}
