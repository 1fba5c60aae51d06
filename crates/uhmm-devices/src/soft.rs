//! A device in software: its own memory, its own memory management unit, its own threads.
//!
//! It is what a GPU is to the engine, so that everything can be tried and tested without one; and with its memory in a
//! file it is a place for pages that do not fit into RAM. Whatever its threads do to the program's memory goes through
//! the device's page table, and what is not there raises a device fault.
//!
//! ```text
//!            engine                                   device
//!   copy_to_device, copy_to_host, zero  ------->  store: frames in RAM or in a file
//!   flush, close_gate, open_gate        ------->  marks: who is inside
//!   DeviceTable <------------------------------>  lanes: look up, access, fault -----> Port
//!                                                   ^            ^
//!                                          jobs: own workers     |
//!                                          run: the program's closures
//! ```
//!
//! # Fault path
//! The methods of [`Device`] allocate nothing, take no lock, and use no thread-local storage. They touch device memory,
//! the engine's bytes and atomics. The value moves to the arena when the engine registers it, and points to nothing in
//! the program's heap.
//!
//! # Not supported
//! Coherent memory of a NUMA node's own: nothing binds it to one. Memory is not encrypted, and a file is not durable: it ends with the process.
//!
//! # Kernel
//! `lib/test_hmm.c`, the driver for HMM's own tests; unlike that one it computes.

mod jobs;
mod lane;
mod marks;
mod run;
mod store;

use std::{
    os::fd::{AsFd, BorrowedFd},
    path::PathBuf,
    sync::{
        OnceLock,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed, Release},
        },
    },
    time::Duration,
};

use uhmm::{
    DeviceFaultPolicy, Port,
    device::{CopyOp, Device, DeviceError, FrameRun, Invalidation, MemoryKind, MemorySpec},
};
use uhmm_sys::{
    Errno,
    addr::{PAGE_SIZE, PageRange},
    arena, fence,
    mem::HostBytes,
};

use self::{jobs::Jobs, marks::Marks, store::Store};
pub use self::{
    jobs::{Command, JobError, StartError, SubmitError, Ticket},
    lane::{AccessError, Lane},
    run::RunError,
    store::{Memory, SoftError},
};

/// Bytes of a name that are kept.
const NAME_MAX: usize = 32;

/// What a software device is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SoftConfig {
    /// A name for messages and for `/proc/self/maps`; 32 bytes of it are kept.
    pub name: String,
    /// Where its memory comes from.
    pub memory: Memory,
    /// Whether the engine may map it for CPUs. Coherent memory is anonymous memory of the process and counts as that;
    /// a file cannot be coherent.
    pub kind: MemoryKind,
    /// What device faults do with pages in host memory. A lane can change it for itself.
    pub fault_policy: DeviceFaultPolicy,
    /// The longest that one access tries while its page is taken away each time.
    pub access_budget: Duration,
}

impl SoftConfig {
    /// A device with `bytes` of RAM of its own.
    #[must_use]
    pub fn ram(name: &str, bytes: u64) -> Self {
        Self::with(name, Memory::Ram { bytes })
    }

    /// A device with `bytes` in a file of the file system that `dir` is on.
    #[must_use]
    pub fn file(name: &str, dir: impl Into<PathBuf>, bytes: u64) -> Self {
        Self::with(name, Memory::File { dir: dir.into(), bytes })
    }

    fn with(name: &str, memory: Memory) -> Self {
        Self {
            name: name.to_owned(),
            memory,
            kind: MemoryKind::Private,
            fault_policy: DeviceFaultPolicy::Migrate,
            access_budget: Duration::from_secs(5),
        }
    }
}

/// What of the configuration is needed later; nothing in the heap.
#[derive(Debug, Clone, Copy)]
struct Config {
    name: [u8; NAME_MAX],
    name_len: usize,
    kind: MemoryKind,
    fault_policy: DeviceFaultPolicy,
    access_budget: Duration,
}

/// A software device. See the module's documentation.
///
/// ```no_run
/// use uhmm::Mm;
/// use uhmm_devices::soft::{SoftConfig, SoftDevice};
/// use uhmm_sys::{addr::VirtAddr, thread::Kind};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mm = Mm::open()?;
/// let mirror = mm.register(SoftDevice::new(&SoftConfig::ram("soft0", 64 << 20))?)?;
/// let device = mirror.device();
/// device.start(mirror.port().ok_or("removed")?, 1, Kind::Pthread)?;
/// let numbers = vec![1u64; 1 << 20];
/// let first = VirtAddr::of(numbers.as_ptr());
/// let mut lane = device.lane().ok_or("all lanes are taken")?;
/// assert_eq!(lane.load_u64(first)?, 1);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct SoftDevice {
    config: Config,
    store: Store,
    marks: Marks,
    jobs: Jobs,
    port: OnceLock<Port>,
    /// A page for each lane.
    bounce: PageRange,
    killed: AtomicBool,
    /// How many of the next copies fail, and with what; see [`Failure`].
    failing: AtomicU64,
}

impl SoftDevice {
    /// Makes a device. The engine takes it over by [`Mm::register`](uhmm::Mm::register), and [`SoftDevice::start`] sets it
    /// going.
    ///
    /// # Errors
    /// [`SoftError`].
    pub fn new(config: &SoftConfig) -> Result<Self, SoftError> {
        // Before any lane exists: see `uhmm_sys::fence`.
        fence::register_membarrier();
        let store = Store::new(&config.name, &config.memory, config.kind)?;
        let bounce = arena::pages(marks::LANES as u64 * PAGE_SIZE, PAGE_SIZE).map_err(SoftError::Memory)?;
        let mut name = [0; NAME_MAX];
        let name_len = config.name.floor_char_boundary(NAME_MAX);
        name[..name_len].copy_from_slice(&config.name.as_bytes()[..name_len]);
        let SoftConfig { kind, fault_policy, access_budget, .. } = *config;
        Ok(Self {
            config: Config { name, name_len, kind, fault_policy, access_budget },
            store,
            marks: Marks::new(),
            jobs: Jobs::new(),
            port: OnceLock::new(),
            bounce,
            killed: AtomicBool::new(false),
            failing: AtomicU64::new(0),
        })
    }

    /// A lane for the calling thread; `None` before [`SoftDevice::start`], and while all 64 are taken.
    #[must_use]
    pub fn lane(&'static self) -> Option<Lane> {
        self.port.get()?;
        let index = self.marks.claim()?;
        self.claimed_lane(index)
    }

    /// The lane whose number the caller has claimed.
    fn claimed_lane(&'static self, index: usize) -> Option<Lane> {
        let port = *self.port.get()?;
        let start = self.bounce.start().add(index as u64 * PAGE_SIZE);
        let bounce = HostBytes::in_arena(start, PAGE_SIZE).expect("a page that the arena handed out");
        Some(Lane::new(self, port, index, bounce))
    }

    /// Has the device die: its memory is lost, and every later copy answers [`DeviceError::Lost`]. For tests.
    pub fn kill(&self) {
        self.killed.store(true, Release);
    }

    /// Has the next `n` copies fail with `error`. For tests. Counted are calls, not pages; [`Device::zero`] is one.
    pub fn fail_next_copies(&self, n: u32, error: DeviceError) {
        self.failing.store(Failure { left: n, error }.pack(), Release);
    }

    fn is_killed(&self) -> bool {
        self.killed.load(Acquire)
    }

    /// What a copy must answer by order of a test.
    fn injected(&self) -> Result<(), DeviceError> {
        if self.is_killed() {
            return Err(DeviceError::Lost);
        }
        // Nearly always zero: then there is no write to a shared line.
        if self.failing.load(Relaxed) == 0 {
            return Ok(());
        }
        let one_less = |word| {
            let failure = Failure::unpack(word)?;
            Some(Failure { left: failure.left - 1, ..failure }.pack())
        };
        match self.failing.fetch_update(AcqRel, Acquire, one_less).ok().and_then(Failure::unpack) {
            Some(failure) => Err(failure.error),
            None => Ok(()),
        }
    }
}

/// An order for failures, in one word: how many are left in the upper half, the error in the lower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Failure {
    left: u32,
    error: DeviceError,
}

impl Failure {
    const LOST: u32 = 1 << 30;
    const NO_SPACE: u32 = 1 << 31;

    /// Zero for none.
    fn pack(self) -> u64 {
        let error = match self.error {
            DeviceError::NoSpace => Self::NO_SPACE,
            DeviceError::Io(errno) => errno.raw_os_error().unsigned_abs(),
            // Also for an error of a later version.
            _ => Self::LOST,
        };
        if self.left == 0 { 0 } else { u64::from(self.left) << 32 | u64::from(error) }
    }

    #[expect(clippy::cast_possible_truncation, reason = "the halves of a word")]
    fn unpack(word: u64) -> Option<Self> {
        let (left, error) = ((word >> 32) as u32, word as u32);
        let error = match error {
            Self::LOST => DeviceError::Lost,
            Self::NO_SPACE => DeviceError::NoSpace,
            raw => DeviceError::Io(Errno::from_raw_os_error(raw.cast_signed())),
        };
        (left > 0).then_some(Self { left, error })
    }
}

impl Device for SoftDevice {
    fn name(&self) -> &str {
        std::str::from_utf8(&self.config.name[..self.config.name_len]).expect("cut at a character")
    }

    fn memory(&self) -> MemorySpec {
        // A forked child has a copy of coherent memory, not the same.
        let survives_fork = self.config.kind == MemoryKind::Private;
        MemorySpec { frames: self.store.frames(), kind: self.config.kind, survives_fork }
    }

    fn host_memory(&self) -> Option<HostBytes> {
        self.store.host_memory()
    }

    fn copy_to_device(&self, ops: &[CopyOp]) -> Result<(), DeviceError> {
        self.injected()?;
        ops.iter().try_for_each(|op| self.store.copy_in(op))
    }

    fn copy_to_host(&self, ops: &[CopyOp]) -> Result<(), DeviceError> {
        self.injected()?;
        ops.iter().try_for_each(|op| self.store.copy_out(op))
    }

    fn zero(&self, frames: FrameRun) -> Result<(), DeviceError> {
        self.injected()?;
        self.store.zero(frames)
    }

    fn flush(&self, invalidation: &Invalidation) {
        self.marks.flush(invalidation.range);
    }

    fn close_gate(&self) {
        self.marks.close();
    }

    fn open_gate(&self) {
        self.marks.open();
    }

    fn before_fork(&self, engine_thread: u32) -> Result<(), DeviceError> {
        self.store.file().map_or(Ok(()), |file| file.hand_over(engine_thread).map_err(DeviceError::Io))
    }

    fn after_fork_in_child(&self) {
        if let Some(file) = self.store.file() {
            file.take_over();
        }
    }

    fn files(&self, f: &mut dyn FnMut(BorrowedFd<'_>)) {
        if let Some(file) = self.store.file() {
            f(file.as_fd());
        }
    }

    fn end_fork(&self) {
        if let Some(file) = self.store.file() {
            file.end_fork();
        }
    }

    fn freed(&self, frames: FrameRun) {
        self.store.give(frames);
    }
}

#[cfg(test)]
mod tests {
    use uhmm::device::DevPfn;

    use super::*;

    #[test]
    fn ordered_failures_come_as_often_as_ordered() {
        let device = SoftDevice::new(&SoftConfig::ram("test", 2 << 20)).expect("memory");
        let frames = FrameRun { first: DevPfn::new(0), count: 1 };
        for error in [DeviceError::Lost, DeviceError::NoSpace, DeviceError::Io(Errno::IO)] {
            device.fail_next_copies(2, error);
            assert_eq!(device.zero(frames), Err(error));
            assert_eq!(device.copy_to_host(&[]), Err(error));
            assert_eq!(device.zero(frames), Ok(()));
        }
        device.kill();
        assert_eq!(device.copy_to_device(&[]), Err(DeviceError::Lost));
        assert_eq!(device.copy_to_device(&[]), Err(DeviceError::Lost));
    }

    #[test]
    fn a_name_is_cut_at_a_character() {
        let name = "x".repeat(31) + "\u{e4}";
        let device = SoftDevice::new(&SoftConfig::ram(&name, 2 << 20)).expect("memory");
        assert_eq!(device.name(), &name[..31]);
    }

    #[test]
    fn without_an_address_space_there_are_no_lanes() {
        let device = arena::value(SoftDevice::new(&SoftConfig::ram("test", 2 << 20)).expect("memory")).expect("room");
        assert!(device.lane().is_none());
    }
}
