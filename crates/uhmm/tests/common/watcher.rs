//! A device that watches the engine's promises to it, and fails when it is told to.

use std::{
    panic::Location,
    sync::{
        OnceLock,
        atomic::{
            AtomicBool, AtomicU32, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
};

use uhmm::{
    Mirror, Mm, Port,
    addr::{PAGE_SIZE, PageRange, VirtAddr},
    device::{Cause, CopyOp, Device, DeviceError, FrameRun, Invalidation, MemoryKind, MemorySpec},
    device_table::Pte,
};
use uhmm_sys::{Errno, mem::Mapping};

/// What [`Watcher::copy_to_host`] does.
pub const WORKS: u32 = 0;
/// It answers an I/O error.
pub const FAILS: u32 = 1;
/// The device is lost.
pub const LOST: u32 = 2;
/// It does not return until it is told something else, and works then.
pub const STALLS: u32 = 3;

/// Frames in shared memory, a gate for its accesses to host memory, and switches for what goes wrong. Everything that
/// its methods touch lies in the device itself, which the engine keeps in memory that never moves.
pub struct Watcher {
    memory: Mapping,
    port: OnceLock<Port>,
    /// Fails this many more copies to the device; `u32::MAX` for all.
    pub fail_out: AtomicU32,
    /// Whether copies to the device wait until this changes.
    pub stall_out: AtomicBool,
    /// Whether closing the gate takes until this changes, and whether it does so just now.
    pub stall_gate: AtomicBool,
    pub gate_stalls: AtomicBool,
    /// What copies home do: [`WORKS`], [`FAILS`], [`LOST`], [`STALLS`].
    pub home: AtomicU32,
    /// Copies home that failed or stalled.
    pub failed_home: AtomicU32,
    pub flushes: AtomicU32,
    /// An access through a translation is under way: no flush ends before it does.
    pub accessing: AtomicBool,
    /// Bits of the causes seen.
    causes: AtomicU32,
    /// A promise that was broken, by line of this file.
    broken: AtomicU32,
    gate: AtomicBool,
    inside: AtomicU64,
}

impl Watcher {
    pub fn new(frames: u64) -> Self {
        // A mapping is never empty.
        Self {
            memory: Mapping::memfd("watcher", frames.max(1) * PAGE_SIZE).unwrap(),
            port: OnceLock::new(),
            fail_out: AtomicU32::new(0),
            stall_out: AtomicBool::new(false),
            stall_gate: AtomicBool::new(false),
            gate_stalls: AtomicBool::new(false),
            home: AtomicU32::new(WORKS),
            failed_home: AtomicU32::new(0),
            flushes: AtomicU32::new(0),
            accessing: AtomicBool::new(false),
            causes: AtomicU32::new(0),
            broken: AtomicU32::new(0),
            gate: AtomicBool::new(false),
            inside: AtomicU64::new(0),
        }
    }

    /// Registers one with that many frames.
    pub fn register(mm: &Mm, frames: u64) -> Mirror<Self> {
        let mirror = mm.register(Self::new(frames)).expect("room for a device");
        assert!(mirror.device().port.set(mirror.port().expect("just registered")).is_ok());
        mirror
    }

    pub fn port(&self) -> Port {
        *self.port.get().expect("set at registration")
    }

    /// What the device's page table says, as the device may look at it: not while the gate is closed.
    pub fn look(&self, addr: VirtAddr) -> Pte {
        loop {
            self.inside.fetch_add(1, SeqCst);
            if !self.gate.load(SeqCst) {
                break;
            }
            self.inside.fetch_sub(1, SeqCst);
            std::thread::yield_now();
        }
        let pte = self.port().table().lookup(addr);
        self.inside.fetch_sub(1, SeqCst);
        pte
    }

    /// Bytes 0..8 of a frame.
    pub fn word(&self, frame: uhmm::device::DevPfn) -> u64 {
        self.memory.load_u64(frame.offset())
    }

    /// The device stores to bytes 0..8 of a frame.
    pub fn store(&self, frame: uhmm::device::DevPfn, word: u64) {
        self.memory.store_u64(frame.offset(), word);
    }

    pub fn saw(&self, cause: Cause) -> bool {
        self.causes.load(Relaxed) & bit(cause) != 0
    }

    pub fn forget(&self) {
        self.causes.store(0, Relaxed);
        self.flushes.store(0, Relaxed);
    }

    /// Every promise to the device was kept.
    pub fn check(&self) {
        assert_eq!(self.broken.load(Relaxed), 0, "the promise at this line of watcher.rs was broken");
    }

    #[track_caller]
    fn expect(&self, kept: bool) {
        if !kept {
            // No panic: that would need memory which may be away.
            self.broken.store(Location::caller().line(), Relaxed);
        }
    }
}

fn bit(cause: Cause) -> u32 {
    1 << match cause {
        Cause::Unmap => 0,
        Cause::Protect => 1,
        Cause::Migrate => 2,
        Cause::Exclusive => 3,
        Cause::Fork => 4,
        Cause::Release => 5,
        _ => 6,
    }
}

impl Device for Watcher {
    fn name(&self) -> &str {
        "watcher"
    }

    fn memory(&self) -> MemorySpec {
        let frames = u32::try_from(self.memory.len() / PAGE_SIZE).unwrap();
        MemorySpec { frames: if frames == 1 { 0 } else { frames }, kind: MemoryKind::Private, survives_fork: false }
    }

    fn copy_to_device(&self, ops: &[CopyOp]) -> Result<(), DeviceError> {
        while self.stall_out.load(Relaxed) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        match self.fail_out.load(Relaxed) {
            0 => {}
            u32::MAX => return Err(DeviceError::NoSpace),
            n => {
                self.fail_out.store(n - 1, Relaxed);
                return Err(DeviceError::Io(Errno::IO));
            }
        }
        for op in ops {
            self.expect(op.host.len() == op.frames.bytes());
            op.host.copy_to(&self.memory, op.frames.offset());
        }
        Ok(())
    }

    fn copy_to_host(&self, ops: &[CopyOp]) -> Result<(), DeviceError> {
        match self.home.load(Relaxed) {
            WORKS => {}
            STALLS => {
                self.failed_home.fetch_add(1, Relaxed);
                while self.home.load(Relaxed) == STALLS {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            }
            mode => {
                self.failed_home.fetch_add(1, Relaxed);
                return Err(if mode == LOST { DeviceError::Lost } else { DeviceError::Io(Errno::IO) });
            }
        }
        for op in ops {
            self.expect(op.host.len() == op.frames.bytes());
            op.host.copy_from(&self.memory, op.frames.offset());
        }
        Ok(())
    }

    fn zero(&self, frames: FrameRun) -> Result<(), DeviceError> {
        if self.fail_out.load(Relaxed) != 0 {
            return Err(DeviceError::NoSpace);
        }
        self.memory.zero(frames.offset(), frames.bytes());
        Ok(())
    }

    fn flush(&self, invalidation: &Invalidation) {
        self.flushes.fetch_add(1, Relaxed);
        self.causes.fetch_or(bit(invalidation.cause), Relaxed);
        // The entries are gone before the device is told.
        if let Some(port) = self.port.get() {
            let range: PageRange = invalidation.range;
            let mut any = false;
            port.table().for_each(range, |_, _| any = true);
            self.expect(!any);
        }
        while self.accessing.load(SeqCst) {
            std::thread::yield_now();
        }
    }

    fn close_gate(&self) {
        while self.stall_gate.load(Relaxed) {
            self.gate_stalls.store(true, Relaxed);
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        self.gate_stalls.store(false, Relaxed);
        self.expect(!self.gate.swap(true, SeqCst));
        while self.inside.load(SeqCst) != 0 {
            std::hint::spin_loop();
        }
    }

    fn open_gate(&self) {
        self.expect(self.gate.swap(false, SeqCst));
    }

    fn freed(&self, frames: FrameRun) {
        self.expect(frames.count > 0 && (frames.first.get() + frames.count) as u64 * PAGE_SIZE <= self.memory.len());
    }
}
