//! The nodes of the kernel's HMM test device, for whoever opens them.
//!
//! A program that opens `/dev/hmm_dmirror0`, where the kernel has no such node, is given one by this library: 0 and 1 with
//! private memory, 2 and 3 with coherent memory, where that is to be had. Behind each is a software device like any other,
//! registered with the engine of the process, which is started for it if it does not run. What the commands do is said in
//! [`uhmm_devices::dmirror`].
//!
//! ```text
//!   program's threads                        workers (hidden, with the engine's files)
//!   -----------------                        -----------------------------------------
//!   open   ---> a token (uhmm_sys::token) ->  the device, if it is not there; a watch of the token
//!   ioctl  ---> which token?  -------------->  Dmirror::ioctl
//!   mmap   ---> fresh zeros
//!   close  ---> was it a token?  ----------->  which tokens does nobody hold any more?
//! ```
//!
//! The program's threads carry nothing out themselves: a thread that makes a device's access must not stand on a stack
//! that can be away.
//!
//! # What it does not do, and why
//! - A forked child that has a copy of a descriptor gets `EINVAL` for its commands. In the kernel they work on the parent's
//!   memory.
//! - Where the last descriptor of a node is closed by other means than the functions that this library stands in front of
//!   (`fclose`, a system call by hand, in another process), what it had on the device comes home when the next one is
//!   opened or closed.
//! - Unprivileged programs have no coherent nodes, nor has anybody where the kernel has no `UFFDIO_MOVE`.
//!
//! # Kernel
//! `lib/test_hmm.c`.
//
// UNSAFETY: the workers' state is behind a pointer that a forked child forgets.

use std::{
    ffi::CStr,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{
            AtomicI32, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed, Release},
        },
    },
    time::Duration,
};

use uhmm::{Mm, device::MemoryKind};
use uhmm_devices::{
    dmirror::{Dmirror, Flags, Others},
    soft::{Lane, SoftConfig, SoftDevice},
};
use uhmm_sys::{
    Errno, arena, dispatch, futex, thread,
    token::{self, TokenId, Watch},
};

use crate::{
    descriptors::identity,
    engine,
    say::{Files, say},
    turn::Turns,
};

const NODES: usize = 4;
/// What their names begin with; a digit follows.
const PREFIX: &[u8] = b"/dev/hmm_dmirror";
/// For messages, and in `/proc`.
const NAMES: [&CStr; NODES] = [c"hmm_dmirror0", c"hmm_dmirror1", c"hmm_dmirror2", c"hmm_dmirror3"];
/// Device memory of a node. As for all device memory, what is not used is not there.
const PRIVATE_BYTES: u64 = 4 << 30;
const COHERENT_BYTES: u64 = 256 << 20;
/// How long one access fights for its page, as long as the kernel's driver does.
const ACCESS_BUDGET: Duration = Duration::from_secs(1);
/// Nodes that can be open at once.
const FILES: usize = 64;
/// Commands that can be under way at once; more callers wait.
const WORKERS: usize = 16;

/// Which node a path names.
pub(crate) fn by_path(path: &CStr) -> Option<usize> {
    let [digit] = path.to_bytes().strip_prefix(PREFIX)? else { return None };
    let node = usize::from(digit.checked_sub(b'0')?);
    (node < NODES).then_some(node)
}

// Open files.

/// An open file of a node.
struct OpenFile {
    /// Of its token; 0 where there is none, [`CLAIMED`] until all else is known.
    inode: AtomicU64,
    device: AtomicU64,
    /// The process that opened it: what it mirrors.
    pid: AtomicU32,
    node: AtomicUsize,
    flags: Flags,
}

/// No file has this number.
const CLAIMED: u64 = u64::MAX;

static OPEN_FILES: [OpenFile; FILES] = [const {
    OpenFile {
        inode: AtomicU64::new(0),
        device: AtomicU64::new(0),
        pid: AtomicU32::new(0),
        node: AtomicUsize::new(0),
        flags: Flags::new(),
    }
}; FILES];

/// How many of them there are, so that programs which never opened one pay for one load.
static COUNT: AtomicUsize = AtomicUsize::new(0);

impl OpenFile {
    /// A free one, or one that this process has from its parent only.
    fn claim() -> Option<&'static Self> {
        let own = std::process::id();
        let take = |file: &&Self, inode: u64| file.inode.compare_exchange(inode, CLAIMED, AcqRel, Relaxed).is_ok();
        let free = OPEN_FILES.iter().find(|file| take(file, 0));
        if free.is_some() {
            COUNT.fetch_add(1, AcqRel);
            return free;
        }
        OPEN_FILES.iter().find(|file| {
            let inode = file.inode.load(Acquire);
            inode != CLAIMED && file.pid.load(Acquire) != own && take(file, inode)
        })
    }

    fn publish(&self, node: usize, id: TokenId) {
        self.node.store(node, Relaxed);
        self.pid.store(std::process::id(), Relaxed);
        self.device.store(id.device, Relaxed);
        self.flags.set(0);
        self.inode.store(id.inode, Release);
    }

    fn free(&self) {
        self.inode.store(0, Release);
        COUNT.fetch_sub(1, AcqRel);
    }

    fn is(&self, id: TokenId) -> bool {
        self.inode.load(Acquire) == id.inode && self.device.load(Relaxed) == id.device
    }

    fn is_own(&self) -> bool {
        self.pid.load(Relaxed) == std::process::id()
    }
}

/// Whether any descriptor may be a node's.
pub(crate) fn any() -> bool {
    COUNT.load(Acquire) != 0
}

/// The open file behind a descriptor.
fn find(fd: RawFd) -> Option<&'static OpenFile> {
    if !any() {
        return None;
    }
    let id = identity(fd)?;
    OPEN_FILES.iter().find(|file| file.is(id))
}

/// Whether a descriptor is a node's.
pub(crate) fn is_node(fd: RawFd) -> bool {
    find(fd).is_some()
}

/// Opens a node, in a process that has an engine from then on.
///
/// # Errors
/// `ENOENT`: it has coherent memory, and there is none here. `ENODEV`: the engine does not start; the user has been told why.
/// `EMFILE`, `ENFILE`, `ENOMEM`.
pub(crate) fn open(node: usize, close_on_exec: bool) -> Result<OwnedFd, Errno> {
    let _turn = OPENING.wait();
    let mm = engine::ensure()?;
    let service = match Service::present() {
        Some(service) => service,
        None => Service::start(mm)?,
    };
    let token = token::make(NAMES[node], close_on_exec)?;
    let id = TokenId::of(token.as_fd())?;
    let file = OpenFile::claim().ok_or(Errno::NFILE)?;
    match service.call(Job::Open { file, node, thread: thread::gettid(), number: token.as_raw_fd() }) {
        Ok(()) => {
            file.publish(node, id);
            Ok(token)
        }
        Err(errno) => {
            file.free();
            Err(errno)
        }
    }
}

/// Carries a command out if `fd` is a node's.
pub(crate) fn ioctl(fd: RawFd, number: u32, argument: u64) -> Option<Result<(), Errno>> {
    let file = find(fd)?;
    // What every file answers by itself is none of a device's business.
    let generic = [libc::FIOCLEX, libc::FIONCLEX, libc::FIONBIO, libc::FIOASYNC];
    if generic.into_iter().any(|known| u64::from(number) == known) {
        return None;
    }
    let Some(service) = Service::present().filter(|_| file.is_own()) else { return Some(Err(Errno::INVAL)) };
    // As in the kernel no signal is handled before the command is done.
    Some(thread::without_signals(|| service.call(Job::Command { file, number, argument })))
}

/// What is to be mapped where a node is: fresh zeros.
pub(crate) fn memory(fd: RawFd, len: u64, offset: u64) -> Option<Result<OwnedFd, Errno>> {
    let file = find(fd)?;
    let end = offset.checked_add(len).ok_or(Errno::OVERFLOW);
    Some(end.and_then(|end| token::zeros(NAMES[file.node.load(Relaxed)], end)))
}

/// Looks which open files are closed by now. To be called behind whatever may have closed one.
pub(crate) fn sweep() {
    if let Some(service) = Service::present() {
        // Where that cannot be done now, it is when the next one is opened.
        let _ = service.call(Job::Sweep);
    }
}

/// In a forked child, which has none of the workers.
pub(crate) fn reset_in_child() {
    OPENING.reset_in_child();
    SERVICE.store(std::ptr::null_mut(), Release);
}

// The workers.

/// One thread opens at a time.
static OPENING: Turns = Turns::new();
/// Null until a node is opened in this process.
static SERVICE: AtomicPtr<Service> = AtomicPtr::new(std::ptr::null_mut());

/// What is asked of a worker. It reads nothing of the caller's stack.
#[derive(Clone, Copy)]
enum Job {
    /// Make the node, if it is not there, and watch this descriptor.
    Open { file: &'static OpenFile, node: usize, thread: u32, number: RawFd },
    /// Carry a command out.
    Command { file: &'static OpenFile, number: u32, argument: u64 },
    /// Close the files that nobody holds.
    Sweep,
}

// States of a worker.
const UNBORN: u32 = 0;
const IDLE: u32 = 1;
const TAKEN: u32 = 2;
const POSTED: u32 = 3;
const RUNNING: u32 = 4;
const DONE: u32 = 5;

/// ```text
/// UNBORN --> TAKEN --> POSTED --> RUNNING --> DONE --> IDLE --> TAKEN ...
///         caller    caller     worker     worker   caller   caller
/// ```
struct Worker {
    state: AtomicU32,
    job: Mutex<Option<Job>>,
    /// 0, or an errno.
    answer: AtomicI32,
}

/// A file that is open, and how that is known.
struct Opened {
    file: &'static OpenFile,
    node: usize,
    watch: Watch,
}

struct Service {
    mm: &'static Mm,
    /// Whose workers these are: the child of a bare fork finds its parent's here.
    pid: u32,
    nodes: [OnceLock<Dmirror>; NODES],
    opened: Mutex<Vec<Opened>>,
    workers: [Worker; WORKERS],
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Service {
    /// This process's.
    fn present() -> Option<&'static Self> {
        // SAFETY: null, or stored by `start` from a reference that is valid for ever.
        let service = unsafe { SERVICE.load(Acquire).cast_const().as_ref() };
        service.filter(|service| service.pid == std::process::id())
    }

    fn start(mm: &'static Mm) -> Result<&'static Self, Errno> {
        let workers = std::array::from_fn(|_| Worker {
            state: AtomicU32::new(UNBORN),
            job: Mutex::new(None),
            answer: AtomicI32::new(0),
        });
        let nodes = [const { OnceLock::new() }; NODES];
        let service =
            arena::value(Self { mm, pid: std::process::id(), nodes, opened: Mutex::new(Vec::new()), workers })?;
        SERVICE.store(std::ptr::from_ref(service).cast_mut(), Release);
        Ok(service)
    }

    // The program's side.

    /// Has a worker do it, and waits for that.
    fn call(&self, job: Job) -> Result<(), Errno> {
        let worker = self.take_worker()?;
        *lock(&worker.job) = Some(job);
        worker.tell(POSTED);
        worker.wait_until(DONE);
        let answer = worker.answer.load(Relaxed);
        worker.state.store(IDLE, Release);
        if answer == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(answer)) }
    }

    fn take_worker(&self) -> Result<&Worker, Errno> {
        /// How long to wait while all are busy.
        const NAP: Duration = Duration::from_micros(200);
        loop {
            if let Some(worker) = self.workers.iter().find(|worker| worker.take_from(IDLE)) {
                return Ok(worker);
            }
            if let Some(number) = self.workers.iter().position(|worker| worker.take_from(UNBORN)) {
                let worker = &self.workers[number];
                return match self.mm.spawn("uhmm-node", worker_main, number) {
                    Ok(()) => Ok(worker),
                    Err(errno) => {
                        worker.state.store(UNBORN, Release);
                        Err(errno)
                    }
                };
            }
            std::thread::sleep(NAP);
        }
    }

    // The workers' side.

    fn execute(&self, job: Job, lanes: &mut Lanes) -> Result<(), Errno> {
        match job {
            Job::Sweep => {
                self.close_unheld();
                Ok(())
            }
            Job::Open { file, node, thread, number } => {
                self.close_unheld();
                let watch = Watch::over(thread, number)?;
                if self.nodes[node].get().is_none() {
                    let dmirror = self.make_node(node)?;
                    // One thread opens at a time.
                    let _ = self.nodes[node].set(dmirror);
                }
                lock(&self.opened).push(Opened { file, node, watch });
                Ok(())
            }
            Job::Command { file, number, argument } => {
                let node = file.node.load(Relaxed);
                let dmirror = self.nodes[node].get().ok_or(Errno::INVAL)?;
                let lane = match &mut lanes[node] {
                    Some(lane) => lane,
                    none => none.insert(dmirror.mirror().device().lane().ok_or(Errno::NOMEM)?),
                };
                // The only thread of the program is the one that waits for this, and the kernel writes nothing for it.
                let alone = thread::count_others() == Ok(1) && !engine::has_lent_pages();
                let others = if alone { Others::None } else { Others::Some };
                dmirror.ioctl(lane, &file.flags, number, argument, others)
            }
        }
    }

    fn make_node(&self, node: usize) -> Result<Dmirror, Errno> {
        let (bytes, kind) = match node {
            0 | 1 => (PRIVATE_BYTES, MemoryKind::Private),
            _ => (COHERENT_BYTES, MemoryKind::Coherent),
        };
        if kind == MemoryKind::Coherent && (dispatch::is_on() || !self.mm.has_coherent_memory()) {
            return Err(Errno::NOENT);
        }
        let name = NAMES[node].to_str().map_err(|_| Errno::INVAL)?;
        let refuse = |why: &dyn std::fmt::Display| {
            say(Files::Own, format_args!("{name}: {why}"));
            Errno::NODEV
        };
        let config = SoftConfig { kind, access_budget: ACCESS_BUDGET, ..SoftConfig::ram(name, bytes) };
        let device = SoftDevice::new(&config).map_err(|why| refuse(&why))?;
        let mirror = self.mm.register(device).map_err(|why| refuse(&why))?;
        let port = mirror.port().ok_or(Errno::NODEV)?;
        mirror.device().start(port, 0, thread::Kind::Raw).map_err(|why| refuse(&why))?;
        Dmirror::new(mirror)
    }

    fn close_unheld(&self) {
        let mut opened = lock(&self.opened);
        while let Some(n) = opened.iter().position(|one| one.watch.is_held() == Ok(false)) {
            let closed = opened.swap_remove(n);
            let is_last = opened.iter().all(|other| other.node != closed.node);
            if let Some(dmirror) = self.nodes[closed.node].get() {
                dmirror.close(is_last);
            }
            closed.file.free();
        }
    }
}

impl Worker {
    fn take_from(&self, state: u32) -> bool {
        self.state.compare_exchange(state, TAKEN, AcqRel, Relaxed).is_ok()
    }

    fn tell(&self, state: u32) {
        self.state.store(state, Release);
        futex::wake(&self.state, u32::MAX);
    }

    fn wait_until(&self, wanted: u32) {
        loop {
            let state = self.state.load(Acquire);
            if state == wanted {
                return;
            }
            let _ = futex::wait(&self.state, state, None);
        }
    }
}

/// A worker's lanes of each node's device.
type Lanes = [Option<Lane>; NODES];

fn worker_main(number: usize) {
    let Some(service) = Service::present() else { return };
    let worker = &service.workers[number];
    let mut lanes = Lanes::default();
    loop {
        worker.wait_until(POSTED);
        worker.state.store(RUNNING, Release);
        let job = lock(&worker.job).take();
        let answer = job.map_or(Err(Errno::INVAL), |job| service.execute(job, &mut lanes));
        worker.answer.store(answer.map_or_else(Errno::raw_os_error, |()| 0), Relaxed);
        worker.tell(DONE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_known_by_their_paths() {
        let all = [c"/dev/hmm_dmirror0", c"/dev/hmm_dmirror1", c"/dev/hmm_dmirror2", c"/dev/hmm_dmirror3"];
        assert_eq!(all.map(by_path), [Some(0), Some(1), Some(2), Some(3)]);
        for other in [c"/dev/hmm_dmirror4", c"/dev/hmm_dmirror", c"/dev/hmm_dmirror00", c"hmm_dmirror0", c""] {
            assert_eq!(by_path(other), None, "{other:?}");
        }
    }
}
