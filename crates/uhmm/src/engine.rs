//! The engine's heart: everything that belongs to one address space, and the threads that work on it.
//!
//! ```text
//!  program thread                    engine threads (private stacks, signals blocked)
//!  --------------                    ------------------------------------------------
//!  touches a page that is away --+
//!                                |   handler, one for each CPU:  poll -> gate -> read -> serve
//!  munmap, mremap, fork ... -----+                                               -> apply event
//!
//!  Mm::migrate(...) --- job ------>  movers:  take a job, work block by block, answer
//!  (waits on a futex) <-- reply ---
//! ```
//!
//! Program threads never take a lock that a handler can need: they post jobs. That is what keeps a handler from
//! waiting for a thread that waits for the handler.

use std::{
    sync::{
        Mutex, MutexGuard,
        atomic::{
            AtomicBool, AtomicU32, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst},
        },
    },
    time::{Duration, Instant},
};

use uhmm_sys::{
    Errno,
    addr::{PageRange, VirtAddr},
    arena, futex,
    uffd::RegisterMode,
};

use crate::{
    block::{Blocks, Waker},
    changes::Changes,
    device::Invalidation,
    devices::Devices,
    events::Reader,
    family::{Family, Member},
    gate::{Gate, pause},
    job::{JOBS, Job, Reply, Request},
    lift::Lifts,
    notifier::{Invalidating, Notifiers},
    os::Os,
    parked::Parked,
    staging::{Chunk, Staging},
    thread::{Ctx, MAX_THREADS},
    trace::{Latency, Stats},
};

/// How much the engine sets aside.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Most blocks (2 MiB of address space each) that may have pages away over the life of the process.
    pub max_blocks: usize,
    /// Address space for staging, in blocks.
    pub staging_chunks: u32,
    /// Recycled staging pages to keep, in blocks.
    pub keep_chunks: u32,
    /// Threads that work on requests.
    pub movers: usize,
}

impl Default for Config {
    fn default() -> Self {
        // A 64th of RAM, 256 MiB at most, is worth the bandwidth: without recycled pages what comes home waits for the
        // kernel to allocate and clear.
        let share = uhmm_sys::limits::total_ram() / 64 / uhmm_sys::addr::BLOCK_SIZE;
        let keep_chunks = u32::try_from(share.clamp(8, 128)).expect("clamped");
        Self { max_blocks: 32 << 10, staging_chunks: 512, keep_chunks, movers: 2 }
    }
}

/// Everything that belongs to one address space.
#[derive(Debug)]
pub(crate) struct Core<O: Os> {
    pub(crate) os: O,
    pub(crate) blocks: Blocks,
    pub(crate) staging: Staging,
    pub(crate) gate: Gate,
    pub(crate) changes: Changes,
    /// A block of memory for [`Core::make_anonymous`], once that was asked for.
    pub(crate) scratch: Mutex<Option<PageRange>>,
    pub(crate) devices: Devices,
    /// The processes that share devices with this one, and which of them it is.
    pub(crate) family: Family,
    pub(crate) member: Member,
    pub(crate) notifiers: &'static Notifiers<NOTIFIERS>,
    pub(crate) stats: Stats,
    pub(crate) lifts: Lifts,
    reader: Mutex<Reader<O::Child>>,
    /// Whether a mapping has moved since the last time that nothing was changing.
    pub(crate) unsettled: AtomicBool,
    jobs: &'static [Job],
    /// Counts what movers were roused for; they sleep on it.
    posted: AtomicU32,
    /// How many engine threads there have been, and their ids.
    threads: AtomicU32,
    tids: [AtomicU32; MAX_THREADS],
    /// Operations that take pages out, under way: a fork waits for their end.
    outs: AtomicU32,
    /// Operations that look for translations to install, under way.
    translating: AtomicU32,
    /// Notifiers of drivers' own, which may have translations anywhere.
    pub(crate) watches: AtomicU32,
    /// Not zero while a fork is being prepared: nothing may leave.
    frozen: AtomicU32,
    /// Whether the fork under way is one whose child takes its memory over.
    sharing: AtomicBool,
    /// When the first of a family of processes started.
    pub(crate) started_ns: u64,
    /// In which process, by the number of forks: nobody works on requests elsewhere.
    generation: usize,
    /// Most mappings that the kernel lets the process have.
    pub(crate) max_mappings: u64,
    pub(crate) stop: AtomicU32,
    /// The limit that reclaim keeps, in bytes; see [`crate::reclaim`].
    pub(crate) resident_limit: AtomicU64,
    pub(crate) parked: Parked,
}

/// An operation is under way, and counted.
#[derive(Debug)]
pub(crate) struct UnderWay<'a>(&'a AtomicU32);

impl<'a> UnderWay<'a> {
    fn new(count: &'a AtomicU32) -> Self {
        count.fetch_add(1, SeqCst);
        Self(count)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

/// Interval notifiers that one address space can have, the devices' own included.
pub(crate) const NOTIFIERS: usize = 256;
/// How long a reader waits for an invalidation to end.
pub(crate) const NOTIFIER_WAIT: Duration = Duration::from_secs(10);

/// How often to look whether processes of the family have ended, and whether faults wait for too long.
const SWEEP_INTERVAL: Duration = Duration::from_millis(250);

/// See [`Core::wait_thawed`].
const THAW_PATIENCE: Duration = Duration::from_millis(100);

/// History ticks are 16 ms: 28 bits of them last for seven weeks before they wrap.
const TICK_NS: u64 = 16_000_000;

impl<O: Os> Core<O> {
    /// Sets up an address space on `os`. No thread runs yet.
    ///
    /// # Errors
    /// `ENOMEM` where the arena is too small; what `UFFDIO_REGISTER` answers for the staging area.
    pub(crate) fn new(os: O, config: &Config, stats: Stats) -> Result<Self, Errno> {
        let staging = Staging::new(config.staging_chunks, config.keep_chunks)?;
        // A destination of MOVE has to be registered; for write-protection only, so that its holes fill natively.
        if os.has_move() {
            os.register(staging.range(), RegisterMode::WP)?;
        } else {
            // Nothing is moved home, so nothing can be moved home in it.
            staging.never_recycle();
        }
        Self::assemble(os, Blocks::new(config.max_blocks)?, staging, Lifts::new()?, stats, Family::new()?)
    }

    /// Puts the parts of an address space together.
    pub(crate) fn assemble(
        os: O,
        blocks: Blocks,
        staging: Staging,
        lifts: Lifts,
        stats: Stats,
        (family, member): (Family, Member),
    ) -> Result<Self, Errno> {
        let started_ns = os.now_ns();
        Ok(Self {
            blocks,
            staging,
            gate: Gate::new(),
            changes: Changes::new(),
            scratch: Mutex::new(None),
            devices: Devices::default(),
            family,
            member,
            notifiers: arena::value(Notifiers::new(NOTIFIER_WAIT))?,
            stats,
            lifts,
            reader: Mutex::new(Reader::new()?),
            unsettled: AtomicBool::new(false),
            jobs: Job::table()?,
            posted: AtomicU32::new(0),
            threads: AtomicU32::new(0),
            tids: std::array::from_fn(|_| AtomicU32::new(0)),
            outs: AtomicU32::new(0),
            translating: AtomicU32::new(0),
            watches: AtomicU32::new(0),
            frozen: AtomicU32::new(0),
            sharing: AtomicBool::new(false),
            started_ns,
            generation: crate::fork::generation(),
            max_mappings: uhmm_sys::limits::max_map_count().unwrap_or(65_530),
            stop: AtomicU32::new(0),
            resident_limit: AtomicU64::new(u64::MAX),
            parked: Parked::new(),
            os,
        })
    }

    /// The things of a new engine thread, which is the caller.
    ///
    /// # Panics
    /// When there are too many.
    pub(crate) fn new_ctx(&self) -> Ctx {
        let slot = self.threads.fetch_add(1, AcqRel) as usize;
        assert!(slot < MAX_THREADS, "too many engine threads");
        self.tids[slot].store(uhmm_sys::thread::gettid(), Relaxed);
        Ctx::new(slot)
    }

    pub(crate) fn is_engine_thread(&self, tid: u32) -> bool {
        let count = (self.threads.load(Relaxed) as usize).min(MAX_THREADS);
        self.tids[..count].iter().any(|id| id.load(Relaxed) == tid)
    }

    pub(crate) fn lock_reader(&self) -> MutexGuard<'_, Reader<O::Child>> {
        self.reader.lock().expect("a thread that panics with the reader's lock takes the process down")
    }

    pub(crate) fn now_ms(&self) -> u64 {
        // Never 0: that stands for "not yet".
        (self.os.now_ns() - self.started_ns) / 1_000_000 + 1
    }

    /// The time for page histories.
    #[expect(clippy::cast_possible_truncation, reason = "histories wrap")]
    pub(crate) fn ticks(&self) -> u32 {
        ((self.os.now_ns() - self.started_ns) / TICK_NS) as u32 & 0x0fff_ffff
    }

    pub(crate) fn ticks_to_ms(&self, ticks: u32) -> u64 {
        u64::from(ticks & 0x0fff_ffff) * TICK_NS / 1_000_000
    }

    pub(crate) fn record_fault(&self, read_ns: u64) {
        let took = self.os.now_ns().saturating_sub(read_ns);
        self.stats.record(Latency::FaultHome, Duration::from_nanos(took));
    }

    /// Tells every mirror and notifier that translations of the range go. They are gone on return; until the guard is
    /// dropped none can be made anew.
    pub(crate) fn invalidate(&self, invalidation: &Invalidation) -> Invalidating<'static> {
        self.notifiers.invalidate(invalidation)
    }

    /// Gives a chunk's memory back to the kernel, and the chunk to staging.
    pub(crate) fn zap_chunk(&self, chunk: Chunk) {
        // Where the kernel refuses, the chunk is lost to us; its pages are garbage anyway.
        if self.empty_chunk(chunk) {
            self.staging.put_empty(chunk);
        }
    }

    /// Gives a chunk's memory back to the kernel.
    ///
    /// Dropping registered pages raises an event and waits until it is read: by a handler, which may be the caller.
    /// So the chunk is not registered meanwhile.
    pub(crate) fn empty_chunk(&self, chunk: Chunk) -> bool {
        let range = self.staging.chunk_range(chunk);
        if !self.os.has_move() {
            return self.os.zap(range).is_ok();
        }
        self.os.unregister(range).is_ok()
            && self.os.zap(range).is_ok()
            && self.os.register(range, RegisterMode::WP).is_ok()
    }

    /// Collects what must not move, as of now.
    pub(crate) fn refresh_excluded(&self, ctx: &mut Ctx) {
        ctx.excluded.clear();
        self.os.excluded(&mut |range| ctx.excluded.add(range));
    }

    // Family.

    /// Gives back what processes of the family held that have ended. Returns how many frames' references that were.
    pub(crate) fn sweep(&self) -> u32 {
        let mut count = 0;
        self.family.bury(self.member, |dead| self.devices.for_each(|entry| count += entry.sweep(dead)));
        count
    }

    // Fork.

    /// Begins taking pages out, unless a fork is being prepared.
    pub(crate) fn begin_out(&self) -> Option<UnderWay<'_>> {
        let under_way = UnderWay::new(&self.outs);
        (self.frozen.load(SeqCst) == 0).then_some(under_way)
    }

    /// Says that translations are looked for, which may be installed as long as what is returned lives.
    pub(crate) fn begin_translating(&self) -> UnderWay<'_> {
        UnderWay::new(&self.translating)
    }

    /// Whether any device has translations, or is about to, or a driver may have some of its own.
    ///
    /// After a change was announced ([`Changes`]) a `false` stays true until it is over, as far as the change goes: whoever begins
    /// to look now finds the announcement.
    pub(crate) fn is_mirrored(&self) -> bool {
        // In this order: of a look that has ended the translations are there.
        let mut any = self.translating.load(SeqCst) != 0 || self.watches.load(SeqCst) != 0;
        self.devices.for_each(|entry| any |= entry.table().entries() != 0);
        any
    }

    /// Waits while nothing may leave, for a tenth of a second at most. Returns whether it may now.
    ///
    /// Not for longer: whoever forbids it (see [`crate::still`]) may be waiting for a mover, and all of them may be here.
    pub(crate) fn wait_thawed(&self) -> bool {
        let start = Instant::now();
        let mut spins = 0;
        while self.frozen.load(Acquire) != 0 {
            if start.elapsed() > THAW_PATIENCE {
                return false;
            }
            pause(&mut spins);
        }
        true
    }

    /// Lets nothing leave any more, and waits for what is leaving.
    pub(crate) fn freeze(&self) {
        self.frozen.fetch_add(1, SeqCst);
        let mut spins = 0;
        while self.outs.load(SeqCst) != 0 {
            pause(&mut spins);
        }
    }

    pub(crate) fn thaw(&self) {
        self.frozen.fetch_sub(1, SeqCst);
    }

    /// Says whether the child of the fork under way will take its memory over.
    pub(crate) fn share(&self, sharing: bool) {
        self.sharing.store(sharing, SeqCst);
    }

    /// Whether the child of the fork under way takes its memory over.
    pub(crate) fn is_sharing(&self) -> bool {
        self.sharing.load(SeqCst)
    }

    /// Whether a fork is under way.
    pub(crate) fn is_frozen(&self) -> bool {
        self.frozen.load(SeqCst) != 0
    }

    // Threads.

    /// A handler's life: waits for messages and deals with them.
    pub(crate) fn run_handler(&'static self) {
        let mut ctx = self.new_ctx();
        while self.stop.load(Relaxed) == 0 {
            match self.os.wait_event(None) {
                Ok(true) => while self.pump(&mut ctx) != crate::events::Pumped::Nothing {},
                Ok(false) => {}
                Err(error) => panic!("waiting for the userfaultfd failed: {error}"),
            }
        }
    }

    /// A mover's life: takes jobs.
    pub(crate) fn run_mover(&'static self) {
        let mut ctx = self.new_ctx();
        while self.stop.load(Relaxed) == 0 {
            let seen = self.posted.load(Acquire);
            let mut worked = false;
            for job in self.jobs {
                if let Some(request) = job.take() {
                    worked = true;
                    let reply = self.execute(&mut ctx, job, request);
                    job.finish(reply);
                }
            }
            if !worked {
                // The end of another process raises no event, and reclaim may stand in a device that stalls.
                let (others, waits) = (self.family.has_others(self.member), self.parked.count() > 0);
                let _ = futex::wait(&self.posted, seen, (others || waits).then_some(SWEEP_INTERVAL));
                if others {
                    self.sweep();
                }
                if waits {
                    self.wake_parked();
                }
            }
        }
    }

    /// Has an engine thread carry out `request`, and waits for it; `read` sees the results before they go.
    ///
    /// # Locking
    /// To be called by threads that are not the engine's.
    pub(crate) fn call<T>(&self, request: Request, read: impl FnOnce(&Job, Reply) -> T) -> T {
        Self::collect(self.post(request), read)
    }

    /// Waits for a posted job; `read` sees the results before they go.
    pub(crate) fn collect<T>(job: &'static Job, read: impl FnOnce(&Job, Reply) -> T) -> T {
        let reply = job.wait();
        let result = read(job, reply);
        job.release();
        result
    }

    /// Whether this is the process that the engine belongs to, and not one forked from it by the C library.
    pub(crate) fn is_here(&self) -> bool {
        self.generation == crate::fork::generation()
    }

    /// Posts a job, to be collected.
    ///
    /// # Panics
    /// In a forked child, where nobody would ever answer.
    pub(crate) fn post(&self, request: Request) -> &'static Job {
        assert!(self.is_here(), "a forked child used its parent's address space; `Mm::open` gives it its own");
        let mut spins = 0;
        let job = loop {
            match self.jobs.iter().find(|job| job.claim()) {
                Some(job) => break job,
                None => pause(&mut spins),
            }
        };
        job.post(request);
        self.rouse_mover();
        job
    }

    /// Has a mover look for what there is to do.
    pub(crate) fn rouse_mover(&self) {
        self.posted.fetch_add(1, Release);
        let _ = futex::wake(&self.posted, 1);
    }
}

impl<O: Os> Waker for Core<O> {
    fn wake(&self, range: PageRange) {
        self.os.wake(range);
    }
}

/// Most pages that one job answers for.
pub(crate) const JOB_PAGES: usize = 8192;
const _: () = assert!(JOBS >= 4);

/// Cuts `range` into pieces that one job can answer for.
pub(crate) fn job_pieces(range: PageRange) -> impl Iterator<Item = PageRange> {
    // Cut at block boundaries: a huge folio must not end up in two jobs.
    let step = (JOB_PAGES as u64) << uhmm_sys::addr::PAGE_SHIFT;
    let end = range.end().get();
    let mut at = range.start().get();
    std::iter::from_fn(move || {
        let next = end.min((at / step + 1) * step);
        let piece = PageRange::from_ends(VirtAddr::new(at), VirtAddr::new(next)).ok()?;
        at = next;
        Some(piece)
    })
}
