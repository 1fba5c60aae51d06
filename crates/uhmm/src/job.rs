//! Requests of program threads to engine threads.
//!
//! A job lives in the arena: the engine reads the request and writes the results there, never in memory of the caller,
//! which might be away.

use std::sync::{
    Mutex,
    atomic::{
        AtomicU32, AtomicU64,
        Ordering::{AcqRel, Acquire, Relaxed, Release},
    },
};

use uhmm_sys::{
    Errno,
    addr::{PageRange, VirtAddr},
    arena, futex,
};

use crate::{
    device::{Device, DeviceId},
    device_table::{Access, DeviceTable, Pte},
    engine::JOB_PAGES,
    family::Member,
    migrate::Plan,
    mirror::{DeviceFaultPolicy, FaultError},
    mm::{Role, Threads},
    notifier::{InsertError, IntervalOps, Subscription},
    range::Detail,
    sync::TimedOut,
    trace::Why,
};

/// Jobs that can be under way at once; more callers wait.
pub(crate) const JOBS: usize = 16;

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Request {
    /// Move pages out. A result per page: a `PageOutcome`.
    Migrate { range: PageRange, plan: Plan },
    /// Find the first mapped address at or above `at`.
    NextMapped { at: VirtAddr },
    /// Bring pages home. A result per page: a `PageOutcome`.
    Home { range: PageRange, why: Why },
    /// Take a device into the table.
    Register { device: DeviceRef },
    /// Evict and remove a device.
    Remove { device: DeviceId },
    /// Evict a device's frames, the device staying.
    Evict { device: DeviceId, frames: u32 },
    /// Serve a device's fault. `table` is the device's own: another may have its number by now.
    DeviceFault {
        device: DeviceId,
        table: &'static DeviceTable,
        addr: VirtAddr,
        access: Access,
        policy: DeviceFaultPolicy,
    },
    /// Fault pages in and report them. A result per page: a `PageReport`.
    RangeFault { device: DeviceId, range: PageRange, access: Option<Access>, detail: Detail },
    /// Fault pages in and install their translations in the device's own table.
    MapRange { device: DeviceId, table: &'static DeviceTable, range: PageRange, access: Access, detail: Detail },
    /// Give up all translations in the device's own table.
    Forget { device: DeviceId, table: &'static DeviceTable },
    /// Take pages for exclusive access. A result per page: a `PageOutcome`.
    Exclusive { device: DeviceId, range: PageRange },
    /// Give up all translations of a range because the program is about to change its mapping. With `until_over` the change
    /// is announced as well: its number is the answer.
    Invalidate { range: PageRange, cause: crate::device::Cause, until_over: bool },
    /// Subscribe to the invalidations of a range.
    Subscribe { range: PageRange, ops: OpsRef },
    /// End a subscription.
    Unsubscribe { subscription: &'static Subscription },
    /// Make written pages of private file mappings anonymous.
    MakeAnonymous { range: PageRange },
    /// Serve each page that is not there as if it had been touched.
    Touch { range: PageRange },
    /// Bring everything home and unregister the range.
    Release { range: PageRange },
    /// Register each mapping as a whole.
    Unsplit { range: PageRange },
    /// Prepare for a fork: with everything home, or with frames shared where the device can.
    ForkPrepare { sharing: crate::fork::Sharing },
    /// A fork that was prepared with sharing failed.
    ForkFailed { child: Member },
    /// Which thread answers. It gives back first what ended processes held.
    EngineThread,
    /// Start one more thread of the engine: only those that one of its own makes have its files.
    Spawn { threads: Threads, role: Role },
    /// As [`Request::Spawn`], for a thread of the caller's.
    SpawnGuest { threads: Threads, name: &'static str, entry: fn(usize), arg: usize },
    /// Bring everything home and unregister all memory.
    Close,
}

/// A device on its way into the table.
#[derive(Clone, Copy)]
pub(crate) struct DeviceRef(pub(crate) &'static dyn Device);

impl std::fmt::Debug for DeviceRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0.name())
    }
}

/// A notifier's callbacks on their way into the table.
#[derive(Clone, Copy)]
pub(crate) struct OpsRef(pub(crate) &'static dyn IntervalOps);

impl std::fmt::Debug for OpsRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OpsRef")
    }
}

/// What is answered.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Reply {
    /// See the results per page, or nothing to say.
    Done,
    /// An address.
    At(VirtAddr),
    /// A device was registered.
    Registered(DeviceId),
    /// A subscription was made.
    Subscribed(&'static Subscription),
    /// A subscription was refused.
    NotSubscribed(InsertError),
    /// A wait had no end within its limit.
    TimedOut(TimedOut),
    /// There are too many devices.
    TooManyDevices,
    /// How many pages did not come home.
    Left(usize),
    /// A device's fault was served.
    Pte(Pte),
    /// A device's fault, or a range fault, failed.
    Fault(FaultError),
    /// How many pages were made anonymous.
    Adopted(usize),
    /// The number of an announced change.
    Announced(usize),
    /// The id of the thread that answers.
    Thread(u32),
    /// Memory or the kernel failed.
    Failed(Errno),
}

const FREE: u32 = 0;
const CLAIMED: u32 = 1;
const POSTED: u32 = 2;
const RUNNING: u32 = 3;
const DONE: u32 = 4;

/// One place for a request and its answer.
#[derive(Debug)]
pub(crate) struct Job {
    state: AtomicU32,
    request: Mutex<Option<Request>>,
    reply: Mutex<Option<Reply>>,
    results: &'static [AtomicU64],
}

impl Job {
    pub(crate) fn table() -> Result<&'static [Self], Errno> {
        let results: &'static [AtomicU64] = arena::slice(JOBS * JOB_PAGES)?;
        let jobs: [Self; JOBS] = std::array::from_fn(|n| Self {
            state: AtomicU32::new(FREE),
            request: Mutex::new(None),
            reply: Mutex::new(None),
            results: &results[n * JOB_PAGES..(n + 1) * JOB_PAGES],
        });
        Ok(arena::value(jobs)?)
    }

    pub(crate) fn claim(&self) -> bool {
        self.state.compare_exchange(FREE, CLAIMED, AcqRel, Relaxed).is_ok()
    }

    pub(crate) fn post(&self, request: Request) {
        *self.request.lock().expect("no panic under this lock") = Some(request);
        self.state.store(POSTED, Release);
    }

    pub(crate) fn take(&self) -> Option<Request> {
        self.state.compare_exchange(POSTED, RUNNING, AcqRel, Relaxed).ok()?;
        self.request.lock().expect("no panic under this lock").take()
    }

    pub(crate) fn finish(&self, reply: Reply) {
        *self.reply.lock().expect("no panic under this lock") = Some(reply);
        self.state.store(DONE, Release);
        let _ = futex::wake(&self.state, 1);
    }

    pub(crate) fn wait(&self) -> Reply {
        loop {
            let state = self.state.load(Acquire);
            if state == DONE {
                return self.reply.lock().expect("no panic under this lock").take().expect("the mover left a reply");
            }
            let _ = futex::wait(&self.state, state, None);
        }
    }

    pub(crate) fn release(&self) {
        self.state.store(FREE, Release);
    }

    /// The result for the `n`th page of the request's range.
    pub(crate) fn result(&self, n: usize) -> u64 {
        self.results[n].load(Relaxed)
    }

    pub(crate) fn set_result(&self, n: usize, result: u64) {
        self.results[n].store(result, Relaxed);
    }
}
