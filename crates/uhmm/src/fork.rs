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
//! way home at that moment is either there, and then newer, or not, and then still in its frame. Pages that came home
//! between the preparation and the fork are in a log, so that the child can give their references back.
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
    time::{Duration, Instant},
};

use uhmm_sys::{
    Errno,
    addr::{BLOCK_PAGES, PageRange, VirtAddr},
    arena, fork,
    pagemap::Page,
    uffd::{RegisterMode, Wake},
};

use crate::{
    block::{Block, Place, Transit},
    device::{Cause, DevPfn, DeviceId, Invalidation},
    engine::Core,
    family::Member,
    gate::pause,
    home::frame_run,
    job::{Reply, Request},
    linux::LinuxMm,
    migrate::PageOutcome,
    mm,
    ops::whole_space,
    os::{MANAGED, Os},
    page_set::{PageSet, Run},
    staging::Staging,
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
        if core.count_away(whole_space()) == 0 && core.homecomings.is_empty() {
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
    }
    if let Some(f) = IN_CHILD.get() {
        f();
    }
}

/// Pages that came home, or were dropped, while a fork was under way: the child may have a reference too many.
#[derive(Debug)]
pub(crate) struct Homecomings {
    /// Page, and frame, device and fork packed. A page of 0: being written.
    entries: &'static [[AtomicU64; 2]],
    count: AtomicUsize,
    /// Number of the fork, from 1. It goes on in the child, whose blocks remember it.
    fork: AtomicU64,
}

/// Homecomings that fit the log; handlers wait for the fork's end when it is full.
const HOMECOMINGS: usize = 1 << 16;
const FORK_SHIFT: u32 = 40;

impl Homecomings {
    pub(crate) fn new(fork: u64) -> Result<Self, Errno> {
        Ok(Self { entries: arena::slice(HOMECOMINGS)?, count: AtomicUsize::new(0), fork: AtomicU64::new(fork) })
    }

    fn fork(&self) -> u64 {
        self.fork.load(Acquire)
    }

    /// Begins anew, for the next fork. Entries that a slow handler still adds for the last one tell by their number.
    fn begin(&self) {
        self.fork.fetch_add(1, AcqRel);
        self.count.store(0, Release);
    }

    fn add(&self, fork: u64, page: VirtAddr, device: DeviceId, pfn: DevPfn) -> bool {
        let n = self.count.fetch_add(1, AcqRel);
        let Some([at, what]) = self.entries.get(n) else {
            self.count.fetch_sub(1, AcqRel);
            return false;
        };
        // A fork may copy the entry at any moment: it has no page until all of it is there.
        at.store(0, Release);
        what.store(fork << FORK_SHIFT | u64::from(pfn.get()) << 8 | device.index() as u64, Release);
        at.store(page.get(), Release);
        true
    }

    /// Whether nothing came home.
    fn is_empty(&self) -> bool {
        self.count.load(Acquire) == 0
    }

    /// Each entry of this fork that is complete.
    fn each(&self, mut f: impl FnMut(VirtAddr, DeviceId, DevPfn)) {
        let fork = self.fork() << FORK_SHIFT;
        for [at, what] in &self.entries[..self.count.load(Acquire).min(HOMECOMINGS)] {
            let (at, what) = (at.load(Acquire), what.load(Acquire));
            let pfn = u32::try_from(what >> 8 & 0xffff_ffff).expect("masked to 32 bits");
            if at != 0
                && what >> FORK_SHIFT << FORK_SHIFT == fork
                && let Some(device) = DeviceId::from_index(usize::try_from(what & 0xff).expect("8 bits"))
            {
                f(VirtAddr::new(at), device, DevPfn::new(pfn));
            }
        }
    }
}

impl<O: Os> Core<O> {
    /// Logs pages that are about to leave their frames, if a fork is under way for which those have a reference more.
    pub(crate) fn note_homecoming(&self, block: Block, run: Run, device: DeviceId, first: DevPfn) {
        let fork = self.homecomings.fork();
        // A block whose frames were not shared yet has no references to give back.
        if !self.is_frozen() || block.fork().load(Acquire) != fork || !self.is_shared_by_forks(device) {
            return;
        }
        for (i, n) in run.pages().zip(0..) {
            let mut spins = 0;
            while !self.homecomings.add(fork, block.page(i), device, first.add(n)) && self.is_frozen() {
                pause(&mut spins);
            }
        }
    }

    pub(crate) fn prepare_fork(&'static self, ctx: &mut Ctx, sharing: Sharing) {
        self.stats.add(Counter::Forks, 1);
        self.homecomings.begin();
        self.freeze();
        let Sharing::Shared(child) = sharing else {
            self.range_home(ctx, whole_space(), Why::Fork, &mut |_, _| {});
            self.poison_all(ctx);
            // What stays in host memory belongs to the child too: devices ask anew what they may do to it.
            drop(self.invalidate(&Invalidation { range: whole_space(), cause: Cause::Fork, owner: None }));
            return;
        };
        self.share(true);
        {
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
            let mut any = false;
            self.blocks.for_each(whole_space(), |block| {
                let must = self.must_come_home(block);
                self.block_home(ctx, block, &must, Why::Fork, &mut |_, outcome| any |= outcome == PageOutcome::Moved);
                ControlFlow::Continue(())
            });
            // One round without success may be due to pages that `mremap` moved to where they had been looked for.
            idle = if any { 0 } else { idle + 1 };
        }
    }

    /// Whether a forked child has the frames of `device` too.
    fn is_shared_by_forks(&self, device: DeviceId) -> bool {
        self.devices.get(device).is_some_and(|entry| entry.survives_fork())
    }

    /// Adds a reference to each frame of a block that the child can use.
    ///
    /// # Locking
    /// The caller has the reader's lock.
    fn share_block(&'static self, block: Block, child: Member) {
        let mut transit = Transit::new(block, self);
        // All at once: a page that is on its way home is either home before, or finds the block marked.
        for i in self.away(block).iter() {
            transit.hold(i);
        }
        for i in transit.held().iter() {
            if let Place::Device { device, pfn } = transit.place(i)
                && let Some(entry) = self.devices.get(device).filter(|entry| entry.survives_fork())
            {
                entry.share_with(child, pfn);
            }
        }
        block.fork().store(self.homecomings.fork(), Release);
    }

    /// The pages of a block whose bytes the child could not get at.
    fn must_come_home(&self, block: Block) -> PageSet {
        if block.away() == 0 {
            return PageSet::EMPTY;
        }
        (0..BLOCK_PAGES)
            .filter(|&i| match block.word(i).place() {
                Place::Device { device, .. } => !self.is_shared_by_forks(device),
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
    pub(crate) fn unshare_frames(&'static self, child: Member) {
        let give_back = |device, pfn| {
            if let Some(entry) = self.devices.get(device) {
                entry.free_of(child, frame_run(pfn, 1));
            }
        };
        let _reader = self.lock_reader();
        self.blocks.for_each(whole_space(), |block| {
            let mut transit = Transit::new(block, self);
            // All at once, as they were added: a page that comes home later must not be logged.
            for i in self.away(block).iter() {
                transit.hold(i);
            }
            block.fork().store(0, Release);
            for i in transit.held().iter() {
                if let Place::Device { device, pfn } = transit.place(i)
                    && self.is_shared_by_forks(device)
                {
                    give_back(device, pfn);
                }
            }
            ControlFlow::Continue(())
        });
        self.homecomings.each(|_, device, pfn| give_back(device, pfn));
        self.family.release(child);
    }

    /// In a forked child: the parent's address space as the child's, on a seam of its own. No engine thread runs yet.
    pub(crate) fn inherit(parent: &Self, member: Member, os: O) -> Result<Self, Errno> {
        let staging: Staging = parent.staging.inherit()?;
        let fork = parent.homecomings.fork();
        let member = (parent.family, member);
        let lifts = parent.lifts.inherit();
        let core = Self::assemble(os, parent.blocks.inherit(), staging, lifts, parent.stats, member, fork)?;
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
    pub(crate) fn adopt(&'static self, parent: &Self) -> Result<(), Errno> {
        let deadline = Instant::now() + Duration::from_secs(10);
        parent.homecomings.each(|page, device, pfn| {
            let still = self.blocks.find(page).map(|b| b.word(page.page_in_block()).place());
            if still != Some(Place::Device { device, pfn }) {
                self.free_frame(device, pfn);
            }
        });
        let mut result = Ok(());
        self.blocks.for_each(whole_space(), |block| {
            result = self.adopt_block(block, deadline);
            if result.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        result?;
        let staging = self.staging.range();
        self.os.zap(staging)?;
        if self.os.has_move() {
            register_patiently(&self.os, staging, RegisterMode::WP, deadline)?;
        }
        Ok(())
    }

    fn adopt_block(&'static self, block: Block, deadline: Instant) -> Result<(), Errno> {
        let range = PageRange::block_of(block.base());
        let mut pages = [Page::empty(); BLOCK_PAGES];
        self.os.scan(range, &mut pages)?;
        let mut staged = PageSet::EMPTY;
        for (i, page) in pages.iter().enumerate() {
            let place = block.word(i).place();
            let here = page.is_there();
            match place {
                Place::Device { device, .. } if !self.is_shared_by_forks(device) => {
                    // It could not come home before the fork. The frame is the parent's alone.
                    block.settle_in_child(i, if here { Place::Cpu } else { Place::Poisoned { device } });
                }
                Place::Device { device, pfn } if here => {
                    block.settle_in_child(i, Place::Cpu);
                    self.free_frame(device, pfn);
                }
                Place::Staged { .. } if !here => staged.insert(i),
                Place::Device { .. } | Place::Poisoned { .. } => block.settle_in_child(i, place),
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
                register_patiently(&self.os, piece, MANAGED, deadline)?;
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

/// Registers memory that the parent's engine may still have to let go of.
fn register_patiently(os: &impl Os, range: PageRange, mode: RegisterMode, deadline: Instant) -> Result<(), Errno> {
    loop {
        match os.register(range, mode) {
            Err(Errno::BUSY) if Instant::now() < deadline => std::thread::sleep(Duration::from_micros(50)),
            result => return result,
        }
    }
}
