//! The device's own threads, and the queue of commands for them.
//!
//! Workers have their stacks in the arena and block signals, so they work whatever of the program's memory is away. A
//! command is a few numbers and so is its answer; both are kept in the device.
//!
//! ```text
//!   FREE -> CLAIMED -> POSTED -> RUNNING -> DONE -> FREE
//!                        |          |
//!         ticket dropped v          v ticket dropped
//!                       FREE     ABANDONED -> FREE
//! ```

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicBool, AtomicU32,
            Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst},
        },
    },
    time::Duration,
};

use thiserror::Error;
use uhmm::Port;
use uhmm_sys::{
    Errno,
    addr::{PAGE_SIZE, VirtAddr},
    futex,
    thread::{self, Kind, ThreadHandle},
};

use super::{
    AccessError, Lane, SoftDevice,
    marks::{LANES, Marks},
};

/// Commands that can be under way or waiting at once.
const JOBS: usize = 64;
/// Most workers of a device.
const WORKERS_MAX: usize = 16;
/// Most devices of a process that can have workers at once.
const DEVICES_MAX: usize = 16;

/// What a worker can do. Addresses are the program's, and every access goes through the device's page table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Reads `len` bytes; answers their wrapping sum.
    Read {
        /// First byte.
        addr: VirtAddr,
        /// How many.
        len: u64,
    },
    /// Writes `len` bytes, byte `n` being the low byte of `seed + n`; answers `len`.
    Write {
        /// First byte.
        addr: VirtAddr,
        /// How many.
        len: u64,
        /// The value of the first.
        seed: u64,
    },
    /// Stores `byte` `len` times; answers `len`.
    Fill {
        /// First byte.
        addr: VirtAddr,
        /// The value.
        byte: u8,
        /// How many.
        len: u64,
    },
    /// Copies `len` bytes, which may overlap; answers `len`.
    Copy {
        /// Where to.
        dst: VirtAddr,
        /// Where from.
        src: VirtAddr,
        /// How many.
        len: u64,
    },
    /// Adds `operand` to the 64-bit number at `addr` atomically, `times` times; answers what was there before the last.
    FetchAdd {
        /// The number.
        addr: VirtAddr,
        /// What is added.
        operand: u64,
        /// How often.
        times: u64,
    },
    /// Adds `count` 64-bit numbers up, wrapping; answers the sum.
    Sum {
        /// The first.
        addr: VirtAddr,
        /// How many.
        count: u64,
    },
    /// Counts each byte value among `len` bytes in one of 256 64-bit numbers at `bins`, atomically; answers `len`.
    Histogram {
        /// First byte.
        src: VirtAddr,
        /// How many.
        len: u64,
        /// The first number.
        bins: VirtAddr,
    },
}

/// Why a device cannot be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum StartError {
    /// It was started already.
    #[error("the device was started already")]
    Twice,
    /// There are not as many workers.
    #[error("{workers} workers asked for; there are {max} at most", max = WORKERS_MAX)]
    TooManyWorkers {
        /// How many were asked for.
        workers: usize,
    },
    /// Too many devices have workers.
    #[error("{max} software devices have workers already", max = DEVICES_MAX)]
    TooManyDevices,
    /// A thread could not be made. The workers made before it run.
    #[error("a worker cannot be started: {0}")]
    Thread(Errno),
}

/// Why a command was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// No worker runs.
    #[error("the device has no workers")]
    NotRunning,
    /// The queue is full.
    #[error("the device has {max} commands already", max = JOBS)]
    Full,
}

/// Why a command has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum JobError {
    /// An access failed; what came before it is done.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// The worker panicked, and goes on with the next command.
    #[error("the device's worker panicked")]
    Panicked,
}

const FREE: u32 = 0;
const CLAIMED: u32 = 1;
const POSTED: u32 = 2;
const RUNNING: u32 = 3;
const DONE: u32 = 4;
const ABANDONED: u32 = 5;

#[derive(Debug)]
struct Job {
    state: AtomicU32,
    command: Mutex<Option<Command>>,
    answer: Mutex<Option<Result<u64, JobError>>>,
}

/// The queue and the workers of a device.
#[derive(Debug)]
pub(super) struct Jobs {
    jobs: [Job; JOBS],
    /// Counts commands, and the order to stop. Workers sleep on it.
    posted: AtomicU32,
    stopped: AtomicBool,
    workers: [Mutex<Option<ThreadHandle>>; WORKERS_MAX],
}

/// A command under way. Dropping it calls the command off, if it has not begun.
#[derive(Debug)]
pub struct Ticket {
    job: &'static Job,
}

/// How a worker finds its device: threads of the arena start with a number.
static DEVICES: [Mutex<Option<&'static SoftDevice>>; DEVICES_MAX] = [const { Mutex::new(None) }; DEVICES_MAX];

/// Data that is whole whenever the lock is free.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Jobs {
    pub(super) fn new() -> Self {
        let job = |_| Job { state: AtomicU32::new(FREE), command: Mutex::new(None), answer: Mutex::new(None) };
        Self {
            jobs: std::array::from_fn(job),
            posted: AtomicU32::new(0),
            stopped: AtomicBool::new(true),
            workers: [const { Mutex::new(None) }; WORKERS_MAX],
        }
    }

    fn tell(&self, workers: u32) {
        self.posted.fetch_add(1, SeqCst);
        futex::wake(&self.posted, workers);
    }

    fn take(&self) -> Option<(&Job, Command)> {
        self.jobs.iter().find_map(|job| {
            job.state.compare_exchange(POSTED, RUNNING, AcqRel, Relaxed).ok()?;
            let command = lock(&job.command).take().expect("posted with a command");
            Some((job, command))
        })
    }
}

impl SoftDevice {
    /// Sets the device going: it has lanes from now on, and `workers` threads that carry out commands; 0 will do for a
    /// program that brings its own threads.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(&'static self, port: Port, workers: usize, kind: Kind) -> Result<(), StartError> {
        if workers > WORKERS_MAX {
            return Err(StartError::TooManyWorkers { workers });
        }
        // Before others can have any: a worker without a lane would be of no use.
        let mut lanes = Lanes(&self.marks, std::iter::from_fn(|| self.marks.claim()).take(workers).collect());
        self.port.set(port).map_err(|_| StartError::Twice)?;
        if workers == 0 {
            return Ok(());
        }
        let claim = |place: &Mutex<Option<&'static Self>>| {
            let mut place = lock(place);
            place.is_none().then(|| *place = Some(self)).is_some()
        };
        let number = DEVICES.iter().position(claim).ok_or(StartError::TooManyDevices)?;
        self.jobs.stopped.store(false, SeqCst);
        for place in &self.jobs.workers[..workers] {
            let lane = *lanes.1.last().expect("one for each worker");
            let worker = thread::spawn(kind, "uhmm-soft", None, worker_main, number * LANES + lane);
            *lock(place) = Some(worker.map_err(StartError::Thread)?);
            // The worker's now.
            lanes.1.pop();
        }
        Ok(())
    }

    /// Ends the workers, after what is in the queue, and says whether all have ended within `limit`. Lanes that others
    /// have stay.
    pub fn stop(&self, limit: Duration) -> bool {
        self.jobs.stopped.store(true, SeqCst);
        self.jobs.tell(u32::MAX);
        let mut all = true;
        for place in &self.jobs.workers {
            let mut place = lock(place);
            if place.as_ref().is_some_and(|worker| !worker.join(Some(limit))) {
                all = false;
            } else {
                *place = None;
            }
        }
        if all {
            for place in &DEVICES {
                let mut place = lock(place);
                if place.is_some_and(|device| std::ptr::eq(device, self)) {
                    *place = None;
                }
            }
        }
        all
    }

    /// Gives a command to the workers.
    ///
    /// # Errors
    /// [`SubmitError`]; the command will not be carried out.
    pub fn submit(&'static self, command: Command) -> Result<Ticket, SubmitError> {
        let jobs = &self.jobs;
        if jobs.stopped.load(SeqCst) {
            return Err(SubmitError::NotRunning);
        }
        let claim = |job: &&Job| job.state.compare_exchange(FREE, CLAIMED, AcqRel, Relaxed).is_ok();
        let job = jobs.jobs.iter().find(claim).ok_or(SubmitError::Full)?;
        *lock(&job.command) = Some(command);
        job.state.store(POSTED, SeqCst);
        // A worker looks at the queue once more after it has seen the order to stop. Who does not see that order here has
        // posted before it.
        if jobs.stopped.load(SeqCst) && job.state.compare_exchange(POSTED, FREE, AcqRel, Relaxed).is_ok() {
            return Err(SubmitError::NotRunning);
        }
        jobs.tell(1);
        Ok(Ticket { job })
    }

    /// Has a worker carry out `command`, and waits for the answer.
    ///
    /// # Errors
    /// As [`Ticket::wait`]; `None` where the command was not taken.
    pub fn execute(&'static self, command: Command) -> Option<Result<u64, JobError>> {
        self.submit(command).ok().map(Ticket::wait)
    }
}

impl Ticket {
    /// Waits for the command's answer.
    ///
    /// # Errors
    /// [`JobError`].
    ///
    /// # Locking
    /// Every access of a command has a budget, so the wait ends; a long command takes long.
    pub fn wait(self) -> Result<u64, JobError> {
        loop {
            let state = self.job.state.load(Acquire);
            if state == DONE {
                // Dropping `self` frees the job.
                return lock(&self.job.answer).take().expect("done with an answer");
            }
            let _ = futex::wait(&self.job.state, state, None);
        }
    }

    /// Whether the answer is there.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.job.state.load(Acquire) == DONE
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let state = &self.job.state;
        let swap = |from, to| state.compare_exchange(from, to, AcqRel, Relaxed).is_ok();
        let _gone = swap(DONE, FREE) || swap(POSTED, FREE) || swap(RUNNING, ABANDONED) || swap(DONE, FREE);
    }
}

/// Lanes that have no owner yet, free again on drop.
struct Lanes<'a>(&'a Marks, Vec<usize>);

impl Drop for Lanes<'_> {
    fn drop(&mut self) {
        self.1.iter().for_each(|&lane| self.0.release(lane));
    }
}

/// A worker's life, by the numbers of device and lane.
fn worker_main(numbers: usize) {
    let Some(device) = *lock(&DEVICES[numbers / LANES]) else { return };
    let mut lane = device.claimed_lane(numbers % LANES).expect("started with a port");
    let jobs = &device.jobs;
    loop {
        let seen = jobs.posted.load(Acquire);
        let stopped = jobs.stopped.load(SeqCst);
        if let Some((job, command)) = jobs.take() {
            let answer =
                catch_unwind(AssertUnwindSafe(|| carry_out(&mut lane, command))).unwrap_or(Err(JobError::Panicked));
            *lock(&job.answer) = Some(answer);
            if job.state.compare_exchange(RUNNING, DONE, Release, Relaxed).is_ok() {
                futex::wake(&job.state, 1);
            } else {
                job.state.store(FREE, Release);
            }
        } else if stopped {
            return;
        } else {
            // Asleep it costs those who close the gate nothing.
            lane.disarm();
            let _ = futex::wait(&jobs.posted, seen, None);
            lane.arm();
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a page is 4096 bytes")]
const PAGE_SIZE_USIZE: usize = PAGE_SIZE as usize;

/// Calls `f` for pieces of `len` bytes at `addr`, each within a page: where it is, its offset, and its length.
fn pieces(
    addr: VirtAddr,
    len: u64,
    mut f: impl FnMut(VirtAddr, u64, usize) -> Result<(), AccessError>,
) -> Result<(), AccessError> {
    let mut done = 0;
    while done < len {
        let at = addr.add(done);
        let part = (PAGE_SIZE - at.get() % PAGE_SIZE).min(len - done);
        f(at, done, usize::try_from(part).expect("at most a page"))?;
        done += part;
    }
    Ok(())
}

fn carry_out(lane: &mut Lane, command: Command) -> Result<u64, JobError> {
    let mut page = [0; PAGE_SIZE_USIZE];
    match command {
        Command::Read { addr, len } => {
            let mut sum = 0u64;
            pieces(addr, len, |at, _, part| {
                lane.read(at, &mut page[..part])?;
                sum = page[..part].iter().fold(sum, |sum, &byte| sum.wrapping_add(u64::from(byte)));
                Ok(())
            })?;
            Ok(sum)
        }
        Command::Write { addr, len, seed } => {
            pieces(addr, len, |at, done, part| {
                for (n, byte) in page[..part].iter_mut().enumerate() {
                    *byte = seed.wrapping_add(done).wrapping_add(n as u64).to_le_bytes()[0];
                }
                lane.write(at, &page[..part])
            })?;
            Ok(len)
        }
        Command::Fill { addr, byte, len } => {
            lane.fill(addr, byte, len)?;
            Ok(len)
        }
        Command::Copy { dst, src, len } => {
            lane.copy(dst, src, len)?;
            Ok(len)
        }
        Command::FetchAdd { addr, operand, times } => {
            let mut last = 0;
            for _ in 0..times {
                last = lane.fetch_add_u64(addr, operand)?;
            }
            Ok(last)
        }
        Command::Sum { addr, count } => {
            let mut sum = 0u64;
            for n in 0..count {
                sum = sum.wrapping_add(lane.load_u64(addr.add(n.saturating_mul(8)))?);
            }
            Ok(sum)
        }
        Command::Histogram { src, len, bins } => {
            let mut counts = [0u64; 256];
            pieces(src, len, |at, _, part| {
                lane.read(at, &mut page[..part])?;
                page[..part].iter().for_each(|&byte| counts[usize::from(byte)] += 1);
                Ok(())
            })?;
            for (bin, &count) in (0..).zip(&counts) {
                if count > 0 {
                    lane.fetch_add_u64(bins.add(bin * 8), count)?;
                }
            }
            Ok(len)
        }
    }
}
