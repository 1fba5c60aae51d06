//! The address space, as programs and drivers use it.
//!
//! There is one [`Mm`] per process: created at first use, right across `fork`, and gone after the last user closes it.
//! The handles are cheap to clone; the last one to go brings all pages home and unregisters all memory.
//!
//! # Kernel
//! `struct mm_struct` with what `mm/hmm.c` hung on it (`hmm_mm_init()`, `hmm_mm_destroy()`).

use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::{
        Mutex,
        atomic::{
            AtomicU32,
            Ordering::{Acquire, Release},
        },
    },
};

use thiserror::Error;
use uhmm_sys::{
    Errno,
    addr::{PAGE_SIZE, PageRange, RangeError, VirtAddr},
    arena,
    dispatch::Whereabouts,
    futex,
    mem::HostBytes,
    thread,
    uffd::OpenError,
};

use crate::{
    block::Place,
    device::{DevPfn, Device, DeviceId},
    device_table::{Access, DeviceTable, Pte},
    devices::Entry,
    engine::{Config, Core, JOB_PAGES, job_pieces},
    family::Member,
    job::{DeviceRef, Job, Reply, Request},
    linux::LinuxMm,
    migrate::{Holes, OtherDevices, PageOutcome, Plan, ResidencyRule},
    mirror::{DeviceFaultPolicy, FaultError},
    os::Os as _,
    range::{Detail, PageReport},
    trace::{STATS_WORDS, Stats, Why},
};

/// How engine threads are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// Ordinary threads with private stacks: for programs that link the engine, whose devices may use all of libc.
    Ordinary,
    /// Threads that libc does not know, with a file table of their own: for the preload library, whose program must
    /// not be able to tell, nor close the engine's descriptors. It begins as a copy of the table of the thread that opens
    /// the address space; that one should hold the files of the devices to come, and none of the program's (see
    /// [`uhmm_sys::files::own_files`]). Devices must get by with plain system calls.
    Hidden,
}

impl Threads {
    pub(crate) const fn kind(self) -> thread::Kind {
        match self {
            Self::Ordinary => thread::Kind::Pthread,
            Self::Hidden => thread::Kind::Raw,
        }
    }
}

/// How to set an address space up.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// How much is set aside.
    pub config: Config,
    /// How engine threads are made.
    pub threads: Threads,
    /// Where figures are kept; `None` for private memory.
    pub stats: Option<Stats>,
}

impl Default for Setup {
    fn default() -> Self {
        Self { config: Config::default(), threads: Threads::Ordinary, stats: None }
    }
}

/// Why an address space could not be set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum StartError {
    /// No userfaultfd.
    #[error("{0}")]
    Userfaultfd(#[from] OpenError),
    /// The process's page map or memory map cannot be read.
    #[error("/proc/self/pagemap or /proc/self/maps: {0}; is /proc mounted?")]
    Proc(Errno),
    /// The engine's own memory could not be had.
    #[error("the engine's memory cannot be set up: {0}; is the address space limited (ulimit -v)?")]
    Memory(Errno),
    /// A thread could not be started.
    #[error("an engine thread cannot be started: {0}")]
    Thread(Errno),
}

/// Why a device could not be registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// There are as many as there can be.
    #[error("there are {max} devices already", max = DeviceId::MAX)]
    TooMany,
    /// The engine's own memory could not be had.
    #[error("the engine has no memory for the device: {0}")]
    Memory(Errno),
}

/// Why a request was not even tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The range is no range.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The device is not registered any more.
    #[error("the device is gone")]
    NoDevice,
}

/// Pages did not come home; they are where they were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{pages} pages could not come home")]
pub struct Left {
    /// How many.
    pub pages: usize,
}

/// The engine of this process, if it runs.
struct Current {
    core: Option<&'static Core<LinuxMm>>,
    threads: Threads,
    users: usize,
}

/// What a process keeps of its engine.
struct Process {
    current: Mutex<Current>,
    /// For the engine's own threads.
    running: Mutex<Option<&'static Core<LinuxMm>>>,
    /// What the thread that starts the engine is given, and tells.
    start: Mutex<Option<Start>>,
    result: Mutex<Option<Result<&'static Core<LinuxMm>, StartError>>>,
    started: AtomicU32,
}

/// A forked child uses the next of these: a lock of its parent may have been held by a thread that the child does not
/// have. A process that is as many forks away from its last `exec` uses its ancestor's, which it then finds free
/// unless that one forked while it was opening or closing.
static PROCESSES: [Process; 64] = [const {
    Process {
        current: Mutex::new(Current { core: None, threads: Threads::Ordinary, users: 0 }),
        running: Mutex::new(None),
        start: Mutex::new(None),
        result: Mutex::new(None),
        started: AtomicU32::new(0),
    }
}; 64];

/// How an engine comes to be.
#[derive(Clone, Copy)]
enum Start {
    Afresh(Setup),
    /// In a forked child, from its copy of the parent's, and where it is in the family.
    TakeOver(&'static Core<LinuxMm>, Member),
}

fn process() -> &'static Process {
    &PROCESSES[crate::fork::generation() % PROCESSES.len()]
}

/// A handle on the address space.
#[derive(Debug)]
pub struct Mm {
    pub(crate) core: &'static Core<LinuxMm>,
}

/// A change of mappings that is under way; see [`Mm::changing`].
#[derive(Debug)]
pub struct Changing {
    core: &'static Core<LinuxMm>,
    number: Option<usize>,
}

impl Changing {
    /// Whether devices wait for it. Otherwise they may have come back, and translations have to be given up again behind the
    /// change.
    #[must_use]
    pub const fn is_announced(&self) -> bool {
        self.number.is_some()
    }
}

impl Drop for Changing {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.core.changes.over(number);
        }
    }
}

/// Where a page is, since when, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Residency {
    /// Where.
    pub at: Location,
    /// For how long, in milliseconds; `None` for a page that never moved.
    pub for_ms: Option<u64>,
    /// Why.
    pub why: Why,
}

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Location {
    /// Where the kernel says: in RAM, swapped, or not yet anywhere.
    Cpu,
    /// Set aside in RAM, out of the program's page table.
    Staged,
    /// As [`Location::Staged`], for a device's exclusive access.
    Exclusive(DeviceId),
    /// In a frame of a device, out of the CPU's reach.
    Device(DeviceId, DevPfn),
    /// In a frame of a device, and mapped there for the CPU.
    Coherent(DeviceId, DevPfn),
    /// Lost with a device.
    Poisoned(DeviceId),
}

/// One outcome per page of a range. Neighbours with the same outcome are kept as one, so that a report on an enormous
/// range is small.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    range: PageRange,
    runs: Vec<(PageOutcome, usize)>,
}

impl Report {
    const fn new(range: PageRange) -> Self {
        Self { range, runs: Vec::new() }
    }

    fn push(&mut self, outcome: PageOutcome, pages: usize) {
        match self.runs.last_mut() {
            _ if pages == 0 => {}
            Some((last, count)) if *last == outcome => *count += pages,
            _ => self.runs.push((outcome, pages)),
        }
    }

    fn put_first(&mut self, outcome: PageOutcome, pages: usize) {
        match self.runs.first_mut() {
            _ if pages == 0 => {}
            Some((first, count)) if *first == outcome => *count += pages,
            _ => self.runs.insert(0, (outcome, pages)),
        }
    }

    /// The range asked for.
    #[must_use]
    pub const fn range(&self) -> PageRange {
        self.range
    }

    /// The outcome for each page, ascending.
    pub fn outcomes(&self) -> impl Iterator<Item = PageOutcome> {
        self.runs.iter().flat_map(|&(outcome, pages)| std::iter::repeat_n(outcome, pages))
    }

    /// The outcomes, ascending, each with the number of neighbouring pages that had it.
    #[must_use]
    pub fn runs(&self) -> &[(PageOutcome, usize)] {
        &self.runs
    }

    /// How many pages had that outcome.
    #[must_use]
    pub fn count(&self, outcome: PageOutcome) -> usize {
        self.runs.iter().filter(|(o, _)| *o == outcome).map(|(_, pages)| pages).sum()
    }

    /// Whether every page is where it should be.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.runs.iter().all(|(o, _)| matches!(o, PageOutcome::Moved | PageOutcome::Already))
    }

    /// How many pages had each outcome that occurred.
    pub fn summary(&self) -> impl Iterator<Item = (PageOutcome, usize)> {
        PageOutcome::ALL.iter().map(|&o| (o, self.count(o))).filter(|&(_, n)| n != 0)
    }
}

/// How to migrate.
#[derive(Debug, Clone, Copy)]
pub struct MigrateOptions {
    /// Pages never touched become zero frames of the device (the kernel's way) instead of staying holes.
    pub holes: bool,
    /// Pages on other devices are fetched from there instead of being left.
    pub from_other_devices: bool,
    /// Where one page cannot move, those that did come home again.
    pub all_or_nothing: bool,
    /// Pages that came home a short while ago stay (see [`crate::policy`]).
    pub obey_residency: bool,
}

impl Default for MigrateOptions {
    fn default() -> Self {
        Self { holes: true, from_other_devices: true, all_or_nothing: false, obey_residency: false }
    }
}

impl Mm {
    /// The address space of this process; set up if it is not.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left behind.
    pub fn open() -> Result<Self, StartError> {
        Self::open_with(Setup::default())
    }

    /// As [`Mm::open`]; `setup` counts if the address space is not set up yet.
    ///
    /// # Errors
    /// As [`Mm::open`].
    pub fn open_with(setup: Setup) -> Result<Self, StartError> {
        let mut current = lock(&process().current);
        let core = match current.core {
            Some(core) => core,
            None => {
                let core = start(setup)?;
                current.core = Some(core);
                current.threads = setup.threads;
                core
            }
        };
        current.users += 1;
        Ok(Self { core })
    }

    /// The address space of this process, if it is set up: in a forked child, say, that took its memory over.
    #[must_use]
    pub fn existing() -> Option<Self> {
        let mut current = lock(&process().current);
        let core = current.core?;
        current.users += 1;
        Some(Self { core })
    }

    /// Whether the address space of this process is set up.
    #[must_use]
    pub fn is_set_up() -> bool {
        lock(&process().current).core.is_some()
    }

    /// Registers a device. It is moved to where its methods may use it at any time, and never dropped.
    ///
    /// # Errors
    /// [`RegisterError`].
    pub fn register<D: Device>(&self, device: D) -> Result<Mirror<D>, RegisterError> {
        let device: &'static D = arena::value(device).map_err(RegisterError::Memory)?;
        match self.core.call(Request::Register { device: DeviceRef(device) }, |_, reply| reply) {
            Reply::Registered(id) => Ok(Mirror { mm: self.clone(), id, device }),
            Reply::TooManyDevices => Err(RegisterError::TooMany),
            Reply::Failed(errno) => Err(RegisterError::Memory(errno)),
            reply => unreachable!("{reply:?} is no answer to a registration"),
        }
    }

    /// Brings every page of the range home, from staging and from all devices. The report has an outcome other than
    /// [`PageOutcome::Already`] for pages that were away.
    ///
    /// # Kernel
    /// `migrate_vma` with `MIGRATE_VMA_SELECT_DEVICE_PRIVATE`.
    #[must_use]
    pub fn home(&self, range: PageRange) -> Report {
        let request = |range| Request::Home { range, why: Why::Asked };
        let mut report = Report::new(range);
        // What is not mapped is nowhere; what the engine had nothing to do with is there.
        for (outcome, pages) in run_pieces(self.core, range, request).runs {
            let there = matches!(outcome, PageOutcome::Untried | PageOutcome::Unmapped);
            report.push(if there { PageOutcome::Already } else { outcome }, pages);
        }
        report
    }

    /// Where the page of `addr` is, since when and why.
    #[must_use]
    pub fn residency(&self, addr: VirtAddr) -> Residency {
        // As for what is asked of the engine.
        self.core.gate.wait_open();
        let Some(block) = self.core.blocks.find(addr) else {
            return Residency { at: Location::Cpu, for_ms: None, why: Why::Untouched };
        };
        let i = addr.page_in_block();
        let at = match block.word(i).place() {
            Place::Cpu => Location::Cpu,
            Place::Staged { exclusive: None, .. } => Location::Staged,
            Place::Staged { exclusive: Some(device), .. } => Location::Exclusive(device),
            Place::Device { device, pfn } => Location::Device(device, pfn),
            Place::Coherent { device, pfn } => Location::Coherent(device, pfn),
            Place::Poisoned { device } => Location::Poisoned(device),
        };
        let (since, why) = block.history(i);
        let for_ms = (why != Why::Untouched).then(|| self.core.ticks_to_ms(self.core.ticks().wrapping_sub(since)));
        Residency { at, for_ms, why }
    }

    /// Pages that are away, in the whole address space; those that the CPU reaches on a device are among them.
    #[must_use]
    pub fn pages_away(&self) -> usize {
        self.core.count_away(crate::ops::whole_space())
    }

    /// Gives up every translation of the range, because the caller is about to change its mapping in a way that raises
    /// no event (`mprotect`, or any change of memory of which nothing has ever moved).
    pub fn invalidate(&self, range: PageRange, cause: crate::device::Cause) {
        self.core.call(Request::Invalidate { range, cause, until_over: false }, |_, _| ());
    }

    /// As [`Mm::invalidate`]; and no device has new translations of the range until what is returned is dropped, behind the
    /// change. Device faults wait for that, a second at most. Nothing else may be asked of the engine meanwhile.
    ///
    /// Where some dozen threads change mappings at once, or in a signal handler, this may not wait, and devices may fault
    /// once more than needed.
    ///
    /// # Kernel
    /// `mmu_notifier_invalidate_range_start` and `_end`.
    #[must_use = "until it is dropped"]
    pub fn changing(&self, range: PageRange, cause: crate::device::Cause) -> Changing {
        // Where there is nothing to give up no mover is needed. Else one announces it: all of them might wait for what is announced
        // here, and none be left to give anything up.
        if let Some(number) = self.core.changes.announce(range) {
            if !self.is_mirrored() {
                return Changing { core: self.core, number: Some(number) };
            }
            self.core.changes.over(number);
        }
        let request = Request::Invalidate { range, cause, until_over: true };
        let number = self.core.call(request, |_, reply| match reply {
            Reply::Announced(number) => Some(number),
            _ => None,
        });
        Changing { core: self.core, number }
    }

    /// Makes those pages of private file mappings anonymous memory that were written, so that they can move; returns how many
    /// those were. The rest of the mappings stays as it is.
    ///
    /// The caller knows that nobody writes to the range meanwhile: no other thread of the program runs. What somebody wrote would
    /// be lost.
    ///
    /// # Errors
    /// `ENOMEM`: too many mappings, or too much memory; pages before may have been made anonymous.
    pub fn make_anonymous(&self, range: PageRange) -> Result<usize, Errno> {
        match self.core.call(Request::MakeAnonymous { range }, |_, reply| reply) {
            Reply::Adopted(pages) => Ok(pages),
            Reply::Failed(errno) => Err(errno),
            reply => unreachable!("{reply:?} is no answer to making memory anonymous"),
        }
    }

    /// Brings everything of the range home and unregisters it, because the caller has a use for it that registered
    /// memory does not allow: a userfaultfd of its own, say. Returns whether that is done.
    #[must_use]
    pub fn release(&self, range: PageRange) -> bool {
        matches!(self.core.call(Request::Release { range }, |_, reply| reply), Reply::Left(0))
    }

    /// Where the pages of the range are, by the one that is farthest.
    ///
    /// # Locking
    /// Takes none; may be called in a signal handler. Who must know puts a full fence before it, behind what keeps pages from
    /// leaving (see [`uhmm_sys::dispatch`]).
    #[must_use]
    pub fn look(&self, range: PageRange) -> Whereabouts {
        self.core.look(range)
    }

    /// Whether anything of the block of `at` may be registered. Where not, the kernel fills its memory by itself.
    ///
    /// # Locking
    /// As [`Mm::look`].
    #[must_use]
    pub fn is_managed(&self, at: VirtAddr) -> bool {
        self.core.blocks.find(at).is_some()
    }

    /// All of the range counts as managed from now on: memory that was moved to it, or made larger, took its registration
    /// along.
    ///
    /// # Locking
    /// As [`Mm::look`].
    pub fn note_managed(&self, range: PageRange) {
        self.core.note_managed(range);
    }

    /// Brings everything home and lets nothing leave until [`Mm::end_fork`]: before a fork that the C library does not know
    /// of, where the kernel does not tell of it either.
    ///
    /// # Locking
    /// As [`Mm::touch`].
    pub fn prepare_fork(&self) {
        self.core.call(Request::ForkPrepare { sharing: crate::fork::Sharing::Home }, |_, _| ());
    }

    /// Ends what [`Mm::prepare_fork`] began, in the parent.
    pub fn end_fork(&self) {
        self.core.thaw();
    }

    /// Serves each page of the range that is not there as if a thread had touched it: those that are away come home, and
    /// those that were never touched are filled.
    ///
    /// # Locking
    /// May be called in a signal handler; waits for an engine thread.
    pub fn touch(&self, range: PageRange) {
        self.core.call(Request::Touch { range }, |_, _| ());
    }

    /// Makes each mapping in the range one to the kernel again, where registration had split it: before an `mremap`,
    /// which refuses more than one.
    pub fn unsplit(&self, range: PageRange) {
        self.core.call(Request::Unsplit { range }, |_, _| ());
    }

    /// Whether any device has translations that an invalidation could concern, or is about to, or a driver watches ([`Mm::subscribe`]).
    #[must_use]
    pub fn is_mirrored(&self) -> bool {
        self.core.is_mirrored()
    }

    /// Keeps the program's anonymous memory in RAM near `limit` bytes, by moving what is cold to the devices (see
    /// [`crate::reclaim`]). A second call changes the limit.
    ///
    /// # Errors
    /// [`StartError::Thread`].
    pub fn keep_resident(&self, limit: u64) -> Result<(), StartError> {
        // Recycled pages count as the program's memory: a few are worth having, a 64th of RAM is not.
        let few = u32::try_from(limit / 64 / uhmm_sys::addr::BLOCK_SIZE).unwrap_or(u32::MAX);
        self.core.staging.keep_at_most(few.clamp(1, 8));
        let before = self.core.resident_limit.swap(limit, std::sync::atomic::Ordering::AcqRel);
        if before != u64::MAX {
            return Ok(());
        }
        self.start_thread(Role::Reclaim)
    }

    /// Moves random memory about from now on (see [`crate::stress`]).
    ///
    /// # Errors
    /// [`StartError::Thread`].
    pub fn stress(&self, seed: u64, hooks: Option<&'static dyn crate::stress::StressHooks>) -> Result<(), StartError> {
        crate::stress::configure(seed, hooks);
        (0..2).try_for_each(|_| self.start_thread(Role::Stress))
    }

    /// Starts one more engine thread. The calling thread has other files than the engine's.
    fn start_thread(&self, role: Role) -> Result<(), StartError> {
        let threads = lock(&process().current).threads;
        match self.core.call(Request::Spawn { threads, role }, |_, reply| reply) {
            Reply::Done => Ok(()),
            Reply::Failed(errno) => Err(StartError::Thread(errno)),
            reply => unreachable!("{reply:?} is no answer to starting a thread"),
        }
    }

    /// Starts a thread beside the engine's own: with its files and like them made, so that it can do without the program's
    /// memory. It runs `entry(arg)` and ends by itself, or with the process.
    ///
    /// `name` is cut off after 15 bytes.
    ///
    /// # Errors
    /// `EAGAIN`: too many threads. `ENOMEM`: no memory for its stack.
    pub fn spawn(&self, name: &'static str, entry: fn(usize), arg: usize) -> Result<(), Errno> {
        let threads = lock(&process().current).threads;
        match self.core.call(Request::SpawnGuest { threads, name, entry, arg }, |_, reply| reply) {
            Reply::Done => Ok(()),
            Reply::Failed(errno) => Err(errno),
            reply => unreachable!("{reply:?} is no answer to starting a thread"),
        }
    }

    /// From now on pages that were the program's are given back to the kernel after they moved, never filled with
    /// other bytes: for programs that let the kernel refer to their pages (`vmsplice`, `MSG_ZEROCOPY`).
    pub fn never_recycle(&self) {
        self.core.staging.never_recycle();
    }

    /// The figures.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.core.stats
    }

    /// Whether a device of [`MemoryKind::Coherent`](crate::device::MemoryKind) is one here: elsewhere its memory is used like
    /// private memory.
    #[must_use]
    pub fn has_coherent_memory(&self) -> bool {
        self.core.os.has_move()
    }

    /// Whether faults of system calls are served (see `uhmm doctor`).
    #[must_use]
    pub fn serves_kernel_faults(&self) -> bool {
        self.core.os.serves_kernel_faults()
    }

    /// Ends the use of this handle. The last one brings everything home first.
    ///
    /// # Errors
    /// [`Left`] where pages could not come home; the engine keeps serving them.
    pub fn close(self) -> Result<(), Left> {
        let left = self.end_use();
        std::mem::forget(self);
        left
    }

    fn end_use(&self) -> Result<(), Left> {
        // In a forked child this is a copy, of what the parent still uses.
        if !self.core.is_here() {
            return Ok(());
        }
        let mut current = lock(&process().current);
        current.users -= 1;
        if current.users != 0 {
            return Ok(());
        }
        match self.core.call(Request::Close, |_, reply| reply) {
            Reply::Left(0) => Ok(()),
            Reply::Left(pages) => Err(Left { pages }),
            reply => unreachable!("{reply:?} is no answer to closing"),
        }
    }
}

impl Clone for Mm {
    fn clone(&self) -> Self {
        if self.core.is_here() {
            lock(&process().current).users += 1;
        }
        Self { core: self.core }
    }
}

impl Drop for Mm {
    fn drop(&mut self) {
        // Whoever wants to know what did not come home calls `close`.
        let _ = self.end_use();
    }
}

/// A device's registration on the address space.
#[derive(Debug)]
pub struct Mirror<D: Device> {
    mm: Mm,
    id: DeviceId,
    device: &'static D,
}

impl<D: Device> Mirror<D> {
    /// The device's number.
    #[must_use]
    pub const fn id(&self) -> DeviceId {
        self.id
    }

    /// The device.
    #[must_use]
    pub const fn device(&self) -> &'static D {
        self.device
    }

    /// The address space.
    #[must_use]
    pub const fn mm(&self) -> &Mm {
        &self.mm
    }

    /// A handle for device threads, which may outlive the mirror: it answers [`FaultError::NoDevice`] then.
    #[must_use]
    pub fn port(&self) -> Option<Port> {
        Some(Port { core: self.mm.core, id: self.id, table: self.entry()?.table() })
    }

    fn entry(&self) -> Option<&'static Entry> {
        self.mm.core.devices.get(self.id)
    }

    /// Moves the range's pages to the device's memory.
    ///
    /// Every page ends moved or skipped with a reason; nothing is lost whatever happens.
    ///
    /// # Kernel
    /// `migrate_vma_setup()`, `migrate_vma_pages()`, `migrate_vma_finalize()`; several VMAs in one call.
    #[must_use]
    pub fn migrate(&self, range: PageRange, options: &MigrateOptions) -> Report {
        let plan = Plan {
            to: Some(self.id),
            why: Why::Asked,
            holes: if options.holes { Holes::Zero } else { Holes::Skip },
            other_devices: if options.from_other_devices { OtherDevices::Fetch } else { OtherDevices::Leave },
            residency: if options.obey_residency { ResidencyRule::Obey } else { ResidencyRule::Ignore },
            owner: Some(self.id),
        };
        let report = run_pieces(self.mm.core, range, |range| Request::Migrate { range, plan });
        if options.all_or_nothing && !report.is_complete() { self.roll_back(&report) } else { report }
    }

    /// Brings home what a request moved, and nothing else.
    fn roll_back(&self, report: &Report) -> Report {
        let mut rolled = Report::new(report.range);
        let mut at = report.range.start();
        for &(outcome, pages) in &report.runs {
            let run = PageRange::new(at, pages as u64 * PAGE_SIZE).expect("a part of the report's range");
            at = run.end();
            if outcome != PageOutcome::Moved {
                rolled.push(outcome, pages);
                continue;
            }
            for (back, pages) in self.mm.home(run).runs {
                let is_back = matches!(back, PageOutcome::Moved | PageOutcome::Already);
                rolled.push(if is_back { PageOutcome::RolledBack } else { back }, pages);
            }
        }
        rolled
    }

    /// Reports each page of the range as it is; faults nothing in.
    ///
    /// # Errors
    /// [`FaultError::Kernel`]: also `ENOMEM` for a range so large that there is no memory for the answer.
    /// [`FaultError::NoDevice`].
    ///
    /// # Kernel
    /// `hmm_range_fault()` without `HMM_PFN_REQ_FAULT`.
    pub fn snapshot(&self, range: PageRange) -> Result<Vec<PageReport>, FaultError> {
        self.reports(range, None, Detail::Cheap)
    }

    /// As [`Mirror::snapshot`], looking at as much detail as asked for.
    ///
    /// # Errors
    /// As [`Mirror::snapshot`].
    pub fn snapshot_with(&self, range: PageRange, detail: Detail) -> Result<Vec<PageReport>, FaultError> {
        self.reports(range, None, detail)
    }

    /// Makes each page of the range valid for `access` and reports it. Pages on this device stay there.
    ///
    /// The reports are true of a moment: a device installs translations by [`Port::fault`] and [`Port::fault_range`], which
    /// check that nothing changed meanwhile.
    ///
    /// # Errors
    /// [`FaultError`] for the first page that cannot be had.
    ///
    /// # Kernel
    /// `hmm_range_fault()` with `HMM_PFN_REQ_FAULT` and `HMM_PFN_REQ_WRITE`.
    pub fn range_fault(&self, range: PageRange, access: Access) -> Result<Vec<PageReport>, FaultError> {
        self.reports(range, Some(access), Detail::Cheap)
    }

    fn reports(&self, range: PageRange, access: Option<Access>, detail: Detail) -> Result<Vec<PageReport>, FaultError> {
        let mut reports = Vec::new();
        let no_memory = |_| FaultError::Kernel { addr: range.start(), errno: Errno::NOMEM };
        reports.try_reserve_exact(range.pages()).map_err(no_memory)?;
        for piece in job_pieces(range) {
            let request = Request::RangeFault { device: self.id, range: piece, access, detail };
            self.mm.core.call(request, |job, reply| match reply {
                Reply::Fault(error) => Err(error),
                _ => {
                    reports.extend((0..piece.pages()).map(|n| PageReport::from_bits(job.result(n))));
                    Ok(())
                }
            })?;
        }
        Ok(reports)
    }

    /// Takes the range's pages for this device's exclusive access: any CPU touch takes them back, after telling the
    /// device.
    ///
    /// # Kernel
    /// `make_device_exclusive()`.
    #[must_use]
    pub fn exclusive(&self, range: PageRange) -> Report {
        run_pieces(self.mm.core, range, |range| Request::Exclusive { device: self.id, range })
    }

    /// Brings at least `frames` frames' pages home, to make room. Returns how many are missing from that.
    #[must_use]
    pub fn evict(&self, frames: u32) -> usize {
        match self.mm.core.call(Request::Evict { device: self.id, frames }, |_, reply| reply) {
            Reply::Left(missing) => missing,
            reply => unreachable!("{reply:?} is no answer to an eviction"),
        }
    }

    /// Frames in use.
    #[must_use]
    pub fn frames_used(&self) -> u32 {
        self.entry().and_then(Entry::pgmap).map_or(0, crate::pgmap::Pgmap::live)
    }

    /// Evicts all pages and takes the device out.
    ///
    /// # Errors
    /// [`Left`] where pages could not come home: they are served still, and the device takes no more.
    pub fn close(self) -> Result<(), Left> {
        match self.mm.core.call(Request::Remove { device: self.id }, |_, reply| reply) {
            Reply::Left(0) => Ok(()),
            Reply::Left(pages) => Err(Left { pages }),
            reply => unreachable!("{reply:?} is no answer to a removal"),
        }
    }
}

/// What a device's own threads hold: its page table, and a way to fault.
#[derive(Debug, Clone, Copy)]
pub struct Port {
    core: &'static Core<LinuxMm>,
    id: DeviceId,
    table: &'static DeviceTable,
}

impl Port {
    /// The device's page table.
    #[must_use]
    pub const fn table(&self) -> &'static DeviceTable {
        self.table
    }

    /// Serves a miss at `addr`: afterwards the table has a translation, until it is invalidated.
    ///
    /// A translation for [`Access::Atomic`] is one for a page that no CPU thread reaches: a frame of the device, or a page of
    /// host memory that the device holds exclusively ([`Pte::is_exclusive`], [`Port::exclusive_bytes`]) until a CPU thread
    /// touches it.
    ///
    /// # Errors
    /// [`FaultError`].
    ///
    /// # Locking
    /// May wait for pages in transit, for a second at most. The caller must not be between
    /// [`Device::close_gate`] and [`Device::open_gate`], nor hold what [`Device::flush`] waits for.
    ///
    /// # Kernel
    /// `hmm_range_fault()` for one page; with [`Access::Atomic`] `make_device_exclusive()`.
    pub fn fault(&self, addr: VirtAddr, access: Access, policy: DeviceFaultPolicy) -> Result<Pte, FaultError> {
        let request = Request::DeviceFault { device: self.id, table: self.table, addr, access, policy };
        match self.core.call(request, |_, reply| reply) {
            Reply::Pte(pte) => Ok(pte),
            Reply::Fault(error) => Err(error),
            reply => unreachable!("{reply:?} is no answer to a fault"),
        }
    }

    /// Faults all pages of a range in and installs their translations, for a device that is about to use them all: fewer
    /// requests, and entries of 2 MiB where a block is one huge page. Nothing migrates: pages that are on the device stay, and
    /// others are reached in host memory; a page that the device holds exclusively comes home. [`Access::Atomic`] counts as
    /// [`Access::Write`].
    ///
    /// With [`Detail::Exact`] a translation for reading allows writing too where the CPU may write without a fault.
    ///
    /// # Errors
    /// [`FaultError`] for the first block of 2 MiB that cannot be had; those before it have translations.
    ///
    /// # Locking
    /// As [`Port::fault`], for a second a block at most.
    ///
    /// # Kernel
    /// `hmm_range_fault()`, with what the driver does after it.
    pub fn fault_range(&self, range: PageRange, access: Access, detail: Detail) -> Result<(), FaultError> {
        let access = access.min(Access::Write);
        let (device, table) = (self.id, self.table);
        job_pieces(range).try_for_each(|range| {
            let request = Request::MapRange { device, table, range, access, detail };
            self.core.call(request, |_, reply| match reply {
                Reply::Done => Ok(()),
                Reply::Fault(error) => Err(error),
                reply => unreachable!("{reply:?} is no answer to a fault"),
            })
        })
    }

    /// Gives up all of the device's translations. Its pages stay where they are.
    ///
    /// # Locking
    /// As [`Device::flush`]: waits for accesses under way.
    ///
    /// # Kernel
    /// `mmu_interval_notifier_remove()`, after which a driver frees its table.
    pub fn forget(&self) {
        self.core.call(Request::Forget { device: self.id, table: self.table }, |_, _| ());
    }

    /// The bytes of a page that the device holds exclusively. Valid while the translation is.
    #[must_use]
    pub fn exclusive_bytes(&self, addr: VirtAddr) -> Option<HostBytes> {
        self.core.exclusive_bytes(self.id, addr)
    }
}

/// Runs one request per piece of `range` and collects the outcomes, two pieces under way at a time. Passes over what is
/// not mapped at once, so that the whole address space is a range like any other.
fn run_pieces(core: &Core<LinuxMm>, range: PageRange, request: impl Fn(PageRange) -> Request) -> Report {
    let mut report = Report::new(range);
    let mut collect = |(job, piece): (&'static Job, PageRange), gap: usize| {
        Core::<LinuxMm>::collect(job, |job, _| {
            (0..piece.pages()).for_each(|n| report.push(PageOutcome::from_bits(job.result(n)), 1));
        });
        report.push(PageOutcome::Unmapped, gap);
    };
    let mut first_gap = 0;
    let mut under_way: Option<(&'static Job, PageRange)> = None;
    let mut at = range.start();
    while let Ok(rest) = PageRange::from_ends(at, range.end()) {
        let mapped = if rest.pages() <= JOB_PAGES { at } else { next_mapped(core, at).min(range.end()) };
        let gap = mapped.offset_from(at).expect("the search goes up") / PAGE_SIZE;
        let gap = usize::try_from(gap).expect("64-bit");
        let piece = PageRange::from_ends(mapped, range.end()).ok().and_then(|rest| job_pieces(rest).next());
        let posted = piece.map(|piece| (core.post(request(piece)), piece));
        match std::mem::replace(&mut under_way, posted) {
            Some(earlier) => collect(earlier, gap),
            None => first_gap = gap,
        }
        at = piece.map_or(range.end(), PageRange::end);
    }
    if let Some(last) = under_way {
        collect(last, 0);
    }
    report.put_first(PageOutcome::Unmapped, first_gap);
    report
}

/// The first mapped address at or above `at`, or the end of the address space.
fn next_mapped(core: &Core<LinuxMm>, at: VirtAddr) -> VirtAddr {
    match core.call(Request::NextMapped { at }, |_, reply| reply) {
        Reply::At(addr) => addr,
        reply => unreachable!("{reply:?} is no answer to where memory is"),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What an engine thread is to be.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Role {
    Starter,
    Handler,
    Mover,
    Doorkeeper,
    Reclaim,
    Stress,
}

impl Role {
    const fn arg(self) -> usize {
        self as usize
    }

    fn from_arg(arg: usize) -> Self {
        match arg {
            0 => Self::Starter,
            1 => Self::Handler,
            2 => Self::Mover,
            3 => Self::Doorkeeper,
            4 => Self::Reclaim,
            _ => Self::Stress,
        }
    }
}

/// Sets an address space up.
fn start(setup: Setup) -> Result<&'static Core<LinuxMm>, StartError> {
    crate::fork::register();
    arena::init(ARENA_BYTES).map_err(StartError::Memory)?;
    launch(Start::Afresh(setup), setup.threads)
}

/// Starts the engine's threads; the first of them opens what the others use.
fn launch(start: Start, threads: Threads) -> Result<&'static Core<LinuxMm>, StartError> {
    let process = process();
    *lock(&process.start) = Some(start);
    *lock(&process.result) = None;
    process.started.store(0, Release);
    spawn(threads, Role::Starter, None).map_err(StartError::Thread)?;
    while process.started.load(Acquire) == 0 {
        let _ = futex::wait(&process.started, 0, None);
    }
    lock(&process.result).take().expect("the starter left a result")
}

/// Most handlers. On a machine with more CPUs the others' faults are served from these: each look at the gate goes over
/// the marks of all threads.
const MAX_HANDLERS: usize = 48;
const _: () = assert!(MAX_HANDLERS + 8 < crate::thread::MAX_THREADS);

/// Address space for the engine. Only what is used is ever memory. Nothing is given back, so that there is room for the
/// tables of every device that comes and goes, and for a generation of forked children each.
const ARENA_BYTES: u64 = 64 << 30;

pub(crate) fn spawn(threads: Threads, role: Role, cpu: Option<usize>) -> Result<(), Errno> {
    let name = if matches!(role, Role::Handler) { "uhmm-fault" } else { "uhmm-move" };
    thread::spawn(threads.kind(), name, cpu, thread_main, role.arg()).map(drop)
}

fn thread_main(arg: usize) {
    match Role::from_arg(arg) {
        Role::Starter => starter_main(),
        Role::Handler => running_core().run_handler(),
        Role::Mover => running_core().run_mover(),
        Role::Doorkeeper => running_core().run_doorkeeper(),
        Role::Reclaim => running_core().run_reclaim(),
        Role::Stress => running_core().run_stress(),
    }
}

/// The engine, from one of its threads.
fn running_core() -> &'static Core<LinuxMm> {
    lock(&process().running).expect("threads start after the engine is there")
}

fn starter_main() {
    let start = lock(&process().start).take().expect("the starter is told how");
    let result = set_up(start);
    let core = result.as_ref().ok().copied();
    *lock(&process().result) = Some(result);
    process().started.store(1, Release);
    let _ = futex::wake(&process().started, 1);
    if let Some(core) = core {
        core.run_mover();
    }
}

fn set_up(start: Start) -> Result<&'static Core<LinuxMm>, StartError> {
    let (threads, movers) = match start {
        Start::Afresh(setup) => (setup.threads, setup.config.movers),
        Start::TakeOver(..) => (Threads::Hidden, Config::default().movers),
    };
    match start {
        Start::Afresh(_) if threads == Threads::Ordinary => {}
        // The caller's: see `Threads::Hidden`.
        Start::Afresh(_) => thread::unshare_files().map_err(StartError::Thread)?,
        // The caller is the program.
        Start::TakeOver(parent, _) => own_files(parent).map_err(StartError::Thread)?,
    }
    let os = LinuxMm::open()?;
    let core = match start {
        Start::Afresh(setup) => {
            let stats = match setup.stats {
                Some(stats) => stats,
                None => Stats::new(arena::slice(STATS_WORDS).map_err(StartError::Memory)?),
            };
            Core::new(os, &setup.config, stats)
        }
        Start::TakeOver(parent, member) => Core::inherit(parent, member, os),
    };
    let core: &'static Core<LinuxMm> = core.and_then(arena::value).map_err(StartError::Memory)?;
    if matches!(start, Start::TakeOver(..)) {
        core.adopt().map_err(StartError::Memory)?;
    }
    *lock(&process().running) = Some(core);
    for cpu in thread::allowed_cpus().iter().take(MAX_HANDLERS) {
        spawn(threads, Role::Handler, Some(cpu)).map_err(StartError::Thread)?;
    }
    for _ in 1..movers {
        spawn(threads, Role::Mover, None).map_err(StartError::Thread)?;
    }
    spawn(threads, Role::Doorkeeper, None).map_err(StartError::Thread)?;
    Ok(core)
}

/// Gives the calling thread a table of files with the family's and those that the devices use, and no others.
fn own_files(core: &Core<LinuxMm>) -> Result<(), Errno> {
    /// Most files of all devices, and the family's.
    const MAX: usize = 4 * DeviceId::MAX + 1;
    let (mut files, mut count) = ([const { None }; MAX], 0);
    let mut keep = |file: BorrowedFd<'_>| {
        assert!(count < MAX, "a device has few files");
        files[count] = Some(file.as_raw_fd());
        count += 1;
    };
    keep(core.family.claims().as_fd());
    core.devices.for_each(|entry| {
        let device: &'static dyn Device = entry.device();
        device.files(&mut keep);
    });
    uhmm_sys::files::own_files(&mut files.iter().flatten().copied())
}

/// For `fork`: the engine that runs, and how its threads were made.
pub(crate) fn current() -> Option<(&'static Core<LinuxMm>, Threads)> {
    let current = lock(&process().current);
    current.core.map(|core| (core, current.threads))
}

/// In a forked child: the parent's engine is none of ours.
pub(crate) fn forget() {
    // A process so many forks away may have left something in this place.
    if let Ok(mut current) = process().current.try_lock() {
        *current = Current { core: None, threads: Threads::Ordinary, users: 0 };
    }
}

/// In a forked child: takes over the pages that are away, with an engine of the child's own.
pub(crate) fn take_over(parent: &'static Core<LinuxMm>, member: Member) -> Result<(), StartError> {
    let mut current = lock(&process().current);
    let core = launch(Start::TakeOver(parent, member), Threads::Hidden)?;
    *current = Current { core: Some(core), threads: Threads::Hidden, users: 1 };
    Ok(())
}
