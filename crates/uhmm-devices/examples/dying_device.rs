//! A device that dies in the middle of a copy, on purpose, and what the program is told.
//!
//! ```text
//! cargo run -p uhmm-devices --example dying_device
//! ```
//!
//! What was on its way to the device when it died is in the program, untouched. What was on the device is lost: the range
//! is poisoned, and whoever asks for it is told which address and which device. Nothing is silently zero.

use std::{
    error::Error,
    sync::atomic::{
        AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
};

use uhmm::{
    DeviceFaultPolicy, MigrateOptions, Mm, PageOutcome,
    addr::{BLOCK_SIZE, PAGE_SIZE, PageRange, VirtAddr},
    device::{CopyOp, Device, DeviceError, FrameRun, Invalidation, MemoryKind, MemorySpec},
    device_table::Access,
    mm::{Location, Report},
};
use uhmm_sys::{access, mem::Mapping};

/// A device that copies so many bytes in all, and is dead from then on.
#[derive(Debug)]
pub struct Dying {
    memory: Mapping,
    lifetime_bytes: AtomicU64,
}

impl Dying {
    /// Uses up some of the lifetime. Returns how many of the bytes can still be copied.
    fn live(&self, bytes: u64) -> u64 {
        let before = self.lifetime_bytes.fetch_update(SeqCst, SeqCst, |left| Some(left.saturating_sub(bytes)));
        bytes.min(before.unwrap_or(0))
    }

    fn copy(&self, ops: &[CopyOp], copy_fn: impl Fn(&CopyOp, u64)) -> Result<(), DeviceError> {
        ops.iter().try_for_each(|op| {
            let alive = self.live(op.frames.bytes());
            copy_fn(op, alive);
            if alive < op.frames.bytes() { Err(DeviceError::Lost) } else { Ok(()) }
        })
    }
}

impl Device for Dying {
    fn name(&self) -> &str {
        "dying"
    }

    fn memory(&self) -> MemorySpec {
        let frames = u32::try_from(self.memory.len() / PAGE_SIZE).unwrap_or(u32::MAX);
        MemorySpec { frames, kind: MemoryKind::Private, survives_fork: false }
    }

    fn copy_to_device(&self, ops: &[CopyOp]) -> Result<(), DeviceError> {
        self.copy(ops, |op, bytes| op.host.slice(0, bytes).copy_to(&self.memory, op.frames.offset()))
    }

    fn copy_to_host(&self, ops: &[CopyOp]) -> Result<(), DeviceError> {
        self.copy(ops, |op, bytes| op.host.slice(0, bytes).copy_from(&self.memory, op.frames.offset()))
    }

    fn zero(&self, frames: FrameRun) -> Result<(), DeviceError> {
        let alive = self.live(frames.bytes());
        self.memory.zero(frames.offset(), alive);
        if alive < frames.bytes() { Err(DeviceError::Lost) } else { Ok(()) }
    }

    fn flush(&self, _invalidation: &Invalidation) {}
}

const PAGES: usize = 256;

fn say(what: &str, report: &Report) {
    let outcomes: Vec<String> = report.summary().map(|(o, pages)| format!("{pages} pages: {}", o.as_str())).collect();
    println!("{what}: {}", outcomes.join(", "));
}

/// Some whole pages of a vector, from one on. They lie in one block of 2 MiB, and so are copied at once.
fn pages(numbers: &[AtomicU64], first: usize) -> Result<PageRange, Box<dyn Error>> {
    let start = VirtAddr::of(numbers.as_ptr()).add(BLOCK_SIZE - 1).block();
    Ok(PageRange::new(start.add(first as u64 * PAGE_SIZE), PAGES as u64 * PAGE_SIZE)?)
}

/// Runs the example.
///
/// # Errors
/// Whatever fails otherwise than it should.
pub fn main() -> Result<(), Box<dyn Error>> {
    // Enough for one of the ranges below and a half.
    let lifetime_bytes = AtomicU64::new(PAGES as u64 * PAGE_SIZE * 3 / 2);
    let mm = Mm::open()?;
    let mirror = mm.register(Dying { memory: Mapping::memfd("dying", 16 << 20)?, lifetime_bytes })?;
    let numbers: Vec<AtomicU64> = (0..2 * BLOCK_SIZE / 8).map(AtomicU64::new).collect();
    let (lost, kept) = (pages(&numbers, 0)?, pages(&numbers, PAGES)?);

    let report = mirror.migrate(lost, &MigrateOptions::default());
    say("the first range, to the device", &report);
    assert!(report.is_complete(), "the device lives so far");

    let report = mirror.migrate(kept, &MigrateOptions::default());
    say("the second range, as the device dies", &report);
    assert_eq!(report.count(PageOutcome::DeviceFailed), PAGES, "none of the copy counts");
    let first = lost.end().offset_from(VirtAddr::of(numbers.as_ptr())).ok_or("the range is of the vector")? / 8;
    let first = usize::try_from(first)?;
    let words = PAGES * usize::try_from(PAGE_SIZE)? / 8;
    let intact = (first..first + words).all(|n| numbers[n].load(Relaxed) == n as u64);
    println!("the second range is {}", if intact { "where it was, byte for byte" } else { "damaged" });
    assert!(intact, "a migration that cannot finish leaves the page where it was");

    let report = mm.home(lost);
    say("the first range, home", &report);
    assert_eq!(report.count(PageOutcome::Poisoned), PAGES, "every page of it is accounted for");
    let residency = mm.residency(lost.start());
    println!("its first page is {:?}", residency.at);
    assert_eq!(residency.at, Location::Poisoned(mirror.id()));

    // A load would end the program by SIGBUS, as for memory with a hardware error. A system call answers.
    let mut bytes = [0; 8];
    let answer = access::read(lost.start(), &mut bytes);
    println!("a system call on it: {}", answer.stop.map_or("the bytes!".into(), |errno| errno.to_string()));
    assert!(!answer.is_all() && bytes == [0; 8], "there is nothing to be had");
    let port = mirror.port().ok_or("the device is gone")?;
    match port.fault(lost.start(), Access::Read, DeviceFaultPolicy::Map) {
        Err(error) => println!("a device's access to it: {error}"),
        Ok(pte) => return Err(format!("a translation for lost bytes: {pte:?}").into()),
    }

    // The program may end its use of the range; until then the address space does not pretend that all is well.
    let left = mm.pages_away();
    println!("{left} pages stay marked as lost until they are unmapped");
    assert_eq!(left, PAGES);
    drop(numbers);
    Ok(())
}
