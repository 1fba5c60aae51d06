//! The orders of `uhmm run`, and the engine of this process.
//
// UNSAFETY: descriptors that come as numbers, and the engine behind a pointer that a signal handler may read.

use std::{
    ffi::CString,
    os::{
        fd::{FromRawFd, OwnedFd},
        raw::c_int,
    },
    sync::{
        OnceLock,
        atomic::{
            AtomicBool, AtomicPtr, AtomicU32,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    time::{Duration, Instant},
};

use uhmm::{
    DeviceFaultPolicy, Mirror, Mm,
    addr::{PageRange, VirtAddr},
    device::{Cause, MemoryKind},
    fork,
    linux::LinuxMm,
    mm::{Changing, Setup, Threads},
    session::{self, ARENA_BYTES, DeviceSpec, EXIT_FAILED, LimitShift, NODE_BYTES, Session, address_space},
    stress::StressHooks,
    trace::{Counter, Stats},
};
use uhmm_devices::soft::{SoftConfig, SoftDevice};
use uhmm_sys::{
    Errno, arena,
    dispatch::{self, Pager, Whereabouts},
    exclude, fence,
    files::own_files,
    futex,
    maps::{Maps, anon_rss_bytes},
    space, thread,
};

use crate::{
    Environment, atfork, limits, nodes,
    say::{Files, report_panics, say},
    turn,
};

/// How long a program runs before an engine is started for it. What ends sooner never pays for one.
const HEAD_START: Duration = Duration::from_millis(20);
/// How often to look whether the program takes so much memory that there is no time to lose.
const STEP: Duration = Duration::from_millis(2);
/// How long a program waits for its engine that opens a node.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// The part of its patience for which a program waits at a time.
const PATIENCE_STEP: Duration = Duration::from_millis(100);
/// How long a stress access of a device fights for a page before the next one has its turn.
const ACCESS_BUDGET: Duration = Duration::from_millis(20);

/// What `uhmm run` wants of each process.
#[derive(Debug)]
struct Orders {
    devices: Vec<DeviceSpec>,
    resident: Option<u64>,
    stress: Option<u64>,
    /// How long the program waits for its engine, where it does.
    from_start: Option<Duration>,
    /// How much later the engine starts than it could.
    delay: Duration,
    stats: Option<Stats>,
}

impl Orders {
    /// Whether memory moves by itself. Otherwise it does by order of a node's commands only.
    const fn move_memory(&self) -> bool {
        self.resident.is_some() || self.stress.is_some()
    }
}

/// Set once: in the constructor where something is to move, and when a node is opened first.
static ORDERS: OnceLock<Orders> = OnceLock::new();
/// Whether failures end the process.
static STRICT: AtomicBool = AtomicBool::new(false);
/// Whether the program lets the kernel refer to its pages beyond the end of a system call.
static LENDS_PAGES: AtomicBool = AtomicBool::new(false);
/// The engine of this process; null until it runs, and in a forked child until its own does.
static RUNNING: AtomicPtr<Running> = AtomicPtr::new(std::ptr::null_mut());
/// Whether there is nothing to wait for: the engine runs, or there is none. Threads sleep on it.
static SETTLED: AtomicU32 = AtomicU32::new(0);

/// Whether the thread was made that starts the engine.
static SCHEDULED: AtomicBool = AtomicBool::new(false);

/// An engine that runs.
struct Running {
    mm: Mm,
    /// Whose engine it is: a child that a raw `clone` made finds its parent's here.
    pid: u32,
    devices: Vec<Mirror<SoftDevice>>,
}

/// Reads the orders, and sees to it that an engine is started where something is to move.
pub(crate) fn start(environment: &Environment) {
    if environment.get(session::RESIDENT).is_none() && environment.get(session::STRESS).is_none() {
        return;
    }
    STRICT.store(environment.get(session::STRICT) == Some(b"1"), Relaxed);
    // Before the first allocation, which would make a smaller one; and before the program makes holes that it counts on.
    if let Err(errno) = arena::init(ARENA_BYTES) {
        return fail(Files::Program, format_args!("no address space for the engine: {errno}; see ulimit -v"));
    }
    match read_orders(environment).and_then(prepare) {
        Ok(()) => schedule(),
        Err(why) => fail(Files::Program, format_args!("{why}")),
    }
}

/// The engine of this process, which is started now if it was not, for a program that opens a node.
///
/// # Errors
/// `ENODEV`: it does not start. The user has been told why.
///
/// # Locking
/// As [`schedule`]; one thread at a time.
pub(crate) fn ensure() -> Result<&'static Mm, Errno> {
    if !is_ordered() {
        // See `start`; to open a node is the first that this process has of uhmm.
        let prepared = arena::init(ARENA_BYTES).map_err(|errno| format!("no address space for the engine: {errno}"));
        let orders = Orders {
            devices: Vec::new(),
            resident: None,
            stress: None,
            from_start: Some(START_PATIENCE),
            delay: Duration::ZERO,
            stats: None,
        };
        if let Err(why) = prepared.and_then(|_| prepare(orders)) {
            fail(Files::Program, format_args!("{why}"));
            return Err(Errno::NODEV);
        }
    }
    if !SCHEDULED.load(Acquire) {
        schedule();
    }
    if SCHEDULED.load(Acquire) {
        wait_until_settled(START_PATIENCE);
    }
    running().filter(|running| running.pid == std::process::id()).map(|running| &running.mm).ok_or(Errno::NODEV)
}

/// Prepares this process for an engine that does as ordered.
fn prepare(orders: Orders) -> Result<(), String> {
    limits::shift_by(LimitShift::for_devices(&orders.devices));
    let space = space::reserve(address_space(&orders.devices) + NODE_BYTES);
    space.map_err(|errno| format!("no address space for the devices: {errno}; see ulimit -v"))?;
    let _ = ORDERS.set(orders);
    report_panics();
    // Here, where the process has one thread: with more the kernel takes tens of milliseconds for it, or seconds under load.
    fence::register_membarrier();
    // Here, where no other thread can fork meanwhile: the first call takes a lock of the dynamic linker's.
    exclude::engine_statics(&mut |_| ());
    if !atfork::register_ours() {
        return Err("forks cannot be followed".to_owned());
    }
    fork::after_fork_in_child(in_child);
    if !LinuxMm::can_open()
        && let Err(errno) = dispatch::enable()
    {
        let why = match errno {
            Errno::BUSY => "it has threads already",
            Errno::INVAL => "that needs Linux 5.11, see uhmm doctor",
            _ => "there is no memory for it",
        };
        return Err(format!("its system calls cannot be watched ({errno}): {why}"));
    }
    Ok(())
}

fn read_orders(environment: &Environment) -> Result<Orders, String> {
    let text = |name: &str| match environment.get(name).map(str::from_utf8) {
        None => Ok(None),
        Some(Ok(text)) => Ok(Some(text)),
        Some(Err(_)) => Err(format!("{name} is not UTF-8")),
    };
    let number = |name: &str| match text(name)? {
        None => Ok(None),
        Some(digits) => digits.parse().map(Some).map_err(|_| format!("{name}: `{digits}` is no number")),
    };
    let devices = session::parse_devices(text(session::DEVICES)?.unwrap_or_default())
        .map_err(|why| format!("{}: {why}", session::DEVICES))?;
    // Where the figures cannot be shared (another user's process, another container) nobody misses this one's.
    let stats = text(session::SESSION)?.and_then(join);
    let (resident, stress) = (number(session::RESIDENT)?, number(session::STRESS)?);
    let from_start = match number(session::FROM_START)? {
        Some(0) => return Err(format!("{}: a program waits for a second at least", session::FROM_START)),
        seconds => seconds.map(Duration::from_secs),
    };
    let delay = Duration::from_millis(number(session::START_DELAY)?.unwrap_or(0));
    Ok(Orders { devices, resident, stress, from_start, delay, stats })
}

fn join(path: &str) -> Option<Stats> {
    let path = CString::new(path).ok()?;
    // SAFETY: the path is a string; the kernel reads it and nothing else.
    let fd: c_int = unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    if fd < 0 {
        return None;
    }
    // SAFETY: opened above, and owned by nobody else.
    Session::join(unsafe { OwnedFd::from_raw_fd(fd) }).ok()
}

/// Says why this process is not managed. It runs on as it is, unless that was forbidden.
fn fail(files: Files, why: std::fmt::Arguments<'_>) {
    say(files, format_args!("not managed: {why}"));
    if STRICT.load(Relaxed) {
        // SAFETY: ends the process at once; there is nothing to be tidied up.
        unsafe { libc::_exit(c_int::from(EXIT_FAILED)) };
    }
}

/// Starts the thread that will start the engine, and waits for that where it was ordered.
///
/// # Locking
/// The caller may hold locks of the C library and of the dynamic linker, none of which is taken to start the engine.
fn schedule() {
    if let Err(errno) = thread::spawn(thread::Kind::Raw, "uhmm-start", None, starter, 0) {
        return fail(Files::Program, format_args!("no thread to start with: {errno}"));
    }
    SCHEDULED.store(true, Release);
    if let Some(patience) = ORDERS.get().and_then(|orders| orders.from_start) {
        wait_until_settled(patience);
    }
}

fn wait_until_settled(patience: Duration) {
    if is_settled_within(patience) {
        return;
    }
    if STRICT.load(Relaxed) {
        fail(Files::Program, format_args!("its engine does not start within {patience:?}"));
    }
    say(Files::Program, format_args!("its engine has not started within {patience:?}; not managed until it has"));
}

/// Waits until there is nothing to wait for, and says whether that came.
///
/// Each wait counts for its step at most: a machine that is stopped for a minute (a virtual one that is moved, or
/// a snapshot of which is taken) finds that minute gone on the clock, in which the engine could not do anything either.
fn is_settled_within(patience: Duration) -> bool {
    let mut left = patience;
    while SETTLED.load(Acquire) == 0 && !left.is_zero() {
        let start = Instant::now();
        let _ = futex::wait(&SETTLED, 0, Some(PATIENCE_STEP));
        left = left.saturating_sub(start.elapsed().min(PATIENCE_STEP));
    }
    SETTLED.load(Acquire) != 0
}

/// In a forked child, whose parent's engine is none of its own.
fn in_child() {
    RUNNING.store(std::ptr::null_mut(), Release);
    dispatch::reset_in_child();
    turn::reset_in_child();
    nodes::reset_in_child();
    SETTLED.store(0, Release);
    SCHEDULED.store(false, Release);
    let took_over = Mm::is_set_up();
    if !took_over {
        space::reuse_in_child();
    }
    if took_over || ORDERS.get().is_some_and(Orders::move_memory) {
        schedule();
    }
}

fn starter(_: usize) {
    if let Some(orders) = ORDERS.get() {
        start_engine(orders);
    }
    SETTLED.store(1, Release);
    let _ = futex::wake(&SETTLED, u32::MAX);
}

fn start_engine(orders: &Orders) {
    if orders.from_start.is_none() {
        wait_until_worth_it(orders);
    }
    std::thread::sleep(orders.delay);
    // Before the devices are made, whose files the engine's threads inherit.
    if let Err(errno) = own_files(&mut std::iter::empty()) {
        return fail(Files::Program, format_args!("no files of its own for the engine: {errno}"));
    }
    if let Err(why) = set_up(orders) {
        return fail(Files::Own, format_args!("{why}"));
    }
    // A program that lent its pages meanwhile did not find the engine.
    if LENDS_PAGES.load(Acquire) {
        lends_pages();
    }
}

/// Waits until the program has shown that it will last, or that it takes memory fast.
fn wait_until_worth_it(orders: &Orders) {
    let enough = orders.resident.map_or(u64::MAX, |limit| limit / 4);
    let started = Instant::now();
    while started.elapsed() < HEAD_START && anon_rss_bytes().is_ok_and(|bytes| bytes < enough) {
        std::thread::sleep(STEP);
    }
}

fn set_up(orders: &Orders) -> Result<(), String> {
    // A forked child that took its parent's memory over has an engine already, with the parent's devices.
    let (mm, devices) = match Mm::existing() {
        Some(mm) => (mm, Vec::new()),
        None => open(orders)?,
    };
    if !mm.serves_kernel_faults() && !dispatch::is_on() {
        return Err("the process has lost the privilege to serve the faults of its system calls".to_owned());
    }
    mm.stats().add(Counter::Processes, 1);
    let running = Running { mm, pid: std::process::id(), devices };
    // It is never dropped: pages may be away until the process ends.
    let running = arena::value(running).map_err(|errno| format!("no memory: {errno}"))?;
    {
        // Nobody is in the middle of a change, and whoever begins one from now on finds the engine.
        let _turn = turn::turn();
        RUNNING.store(std::ptr::from_ref(running).cast_mut(), Release);
    }
    if dispatch::is_on() {
        // Before anything leaves.
        dispatch::set_pager(running).map_err(|errno| format!("no memory: {errno}"))?;
    }
    if let Some(limit) = orders.resident {
        running.mm.keep_resident(limit).map_err(|why| why.to_string())?;
    }
    if let Some(seed) = orders.stress {
        // Processes of a tree differ, so that they do not all do the same.
        let seed = seed.wrapping_add(u64::from(running.pid) << 32);
        running.mm.stress(seed, Some(running)).map_err(|why| why.to_string())?;
    }
    Ok(())
}

/// Opens the address space and registers the devices.
fn open(orders: &Orders) -> Result<(Mm, Vec<Mirror<SoftDevice>>), String> {
    let devices: Vec<SoftDevice> = orders.devices.iter().enumerate().map(make_device).collect::<Result<_, _>>()?;
    let setup = Setup { threads: Threads::Hidden, stats: orders.stats, ..Setup::default() };
    let mm = Mm::open_with(setup).map_err(|why| why.to_string())?;
    let register = |device| mm.register(device).map_err(|why| why.to_string());
    let devices: Vec<Mirror<SoftDevice>> = devices.into_iter().map(register).collect::<Result<_, _>>()?;
    for mirror in &devices {
        // Lanes, but no workers: nobody has work for them.
        let port = mirror.port().ok_or("a device is gone already")?;
        mirror.device().start(port, 0, thread::Kind::Raw).map_err(|why| why.to_string())?;
    }
    Ok((mm, devices))
}

fn make_device((n, spec): (usize, &DeviceSpec)) -> Result<SoftDevice, String> {
    let name = format!("uhmm-soft{n}");
    let config = match &spec.dir {
        None => SoftConfig::ram(&name, spec.bytes),
        Some(dir) => SoftConfig::file(&name, dir, spec.bytes),
    };
    // Where system calls are caught no page may come and go behind them, not even from frame to frame.
    let kind = if dispatch::is_on() { MemoryKind::Private } else { spec.kind };
    let config = SoftConfig { kind, access_budget: ACCESS_BUDGET, ..config };
    SoftDevice::new(&config).map_err(|why| format!("device {spec}: {why}"))
}

/// The engine, where it runs and is this process's.
fn running() -> Option<&'static Running> {
    let running = RUNNING.load(Acquire);
    // SAFETY: only `starter` stores a pointer that is not null, and that one leads to a value that is never dropped.
    unsafe { running.cast_const().as_ref() }
}

/// Gives up all translations of `start..start + len`, whose mapping is about to change, or has.
///
/// # Locking
/// May be called in a signal handler. Takes no lock that the calling thread may hold; waits for an engine thread.
pub(crate) fn invalidate(start: VirtAddr, len: u64, cause: Cause) {
    let Some(running) = running() else { return };
    if !running.mm.is_mirrored() || running.pid != std::process::id() {
        return;
    }
    // Where it is no range the system call will say so.
    if let Ok(range) = PageRange::covering(start, len) {
        running.mm.invalidate(range, cause);
    }
}

/// As [`invalidate`], and no device comes back before the value that is returned is dropped.
///
/// # Locking
/// As [`invalidate`]. Nothing may be asked of the engine meanwhile: where system calls are caught they may, and there
/// devices do not wait.
pub(crate) fn changing(start: VirtAddr, len: u64, cause: Cause) -> Option<Changing> {
    if dispatch::is_on() {
        invalidate(start, len, cause);
        return None;
    }
    let running = running().filter(|running| running.pid == std::process::id())?;
    let range = PageRange::covering(start, len).ok()?;
    Some(running.mm.changing(range, cause))
}

/// Whether this process has an engine, or is about to.
pub(crate) fn is_ordered() -> bool {
    ORDERS.get().is_some()
}

/// Whether this process has an engine.
pub(crate) fn is_running() -> bool {
    running().is_some_and(|running| running.pid == std::process::id())
}

/// Brings `range` home and unregisters it, for a userfaultfd of the program's own.
///
/// # Locking
/// As [`invalidate`].
pub(crate) fn release(range: PageRange) {
    if let Some(running) = running()
        && running.pid == std::process::id()
    {
        // Where that fails the program's own call answers as if somebody else had it.
        let _ = running.mm.release(range);
    }
}

/// Undoes what registration did to the mappings of `range`, which the program sees as one.
///
/// # Locking
/// As [`invalidate`].
pub(crate) fn unsplit(range: PageRange) {
    if let Some(running) = running()
        && running.pid == std::process::id()
    {
        running.mm.unsplit(range);
    }
}

/// Whether the page of `addr` is away, or on its way.
///
/// # Locking
/// None.
pub(crate) fn is_away(addr: VirtAddr) -> bool {
    is_any_away(PageRange::page_of(addr))
}

/// Whether any page of `range` is away, or on its way.
///
/// # Locking
/// None.
pub(crate) fn is_any_away(range: PageRange) -> bool {
    running().is_some_and(|running| running.mm.look(range) != Whereabouts::Here)
}

/// Whether `range` is one mapping to the kernel.
pub(crate) fn is_one_mapping(range: PageRange) -> bool {
    let vma = Maps::open().and_then(|maps| maps.find(range.start()));
    // Where it cannot be told, it is as it may be.
    vma.map_or(true, |vma| vma.is_some_and(|vma| vma.range.contains_range(range)))
}

/// The program lets the kernel refer to its pages beyond the end of a system call: a page that moved must not be filled
/// with other bytes.
pub(crate) fn lends_pages() {
    LENDS_PAGES.store(true, Release);
    if let Some(running) = running() {
        running.mm.never_recycle();
    }
}

/// Whether the program lets the kernel refer to its pages.
pub(crate) fn has_lent_pages() -> bool {
    LENDS_PAGES.load(Acquire)
}

impl Pager for Running {
    fn look(&self, range: PageRange) -> Whereabouts {
        self.mm.look(range)
    }

    fn bring(&self, range: PageRange) {
        self.mm.touch(range);
    }

    fn is_managed(&self, at: VirtAddr) -> bool {
        self.mm.is_managed(at)
    }

    fn moved(&self, range: PageRange) {
        self.mm.note_managed(range);
    }

    fn release(&self, range: PageRange) -> bool {
        // Most stacks are fresh memory, of which nobody has ever moved anything.
        let managed = range.iter_blocks().any(|part| self.mm.is_managed(part.start()));
        !managed || self.mm.release(range)
    }

    fn before_fork(&self) -> bool {
        let bare = !fork::is_prepared();
        if bare {
            self.mm.prepare_fork();
        }
        bare
    }

    fn after_fork(&self) {
        self.mm.end_fork();
    }
}

impl StressHooks for Running {
    fn device_access(&self, addr: VirtAddr, random: u64) {
        let Some(n) = usize::try_from(random >> 32).ok().and_then(|n| n.checked_rem(self.devices.len())) else {
            return;
        };
        let Some(mut lane) = self.devices[n].device().lane() else { return };
        lane.set_fault_policy(if random & 1 == 0 { DeviceFaultPolicy::Map } else { DeviceFaultPolicy::Migrate });
        let (done, counter) = if random & 6 == 0 {
            (lane.fetch_add_u64(addr, 0).is_ok(), Counter::DeviceAtomics)
        } else {
            (lane.load_u64(addr).is_ok(), Counter::DeviceReads)
        };
        self.mm.stats().add(counter, usize::from(done));
    }
}
