//! The smallest device: a page of explanation for each part of it is in `docs/write-a-device.md`.

use std::{
    error::Error,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use uhmm::{
    DeviceFaultPolicy, FaultError, Mm, Port,
    addr::{PAGE_SIZE, VirtAddr},
    device::{CopyOp, Device, DeviceError, FrameRun, Invalidation, MemoryKind, MemorySpec},
    device_table::Access,
    trace::Counter,
};
use uhmm_sys::{Errno, access, mem::Mapping};

/// A device with some memory and nothing else.
#[derive(Debug)]
pub struct Tiny {
    memory: Mapping,
    /// Held by whoever uses a translation, for as long as he uses it.
    translating: Mutex<()>,
}

impl Tiny {
    /// # Errors
    /// The memory cannot be had.
    pub fn new(bytes: u64) -> Result<Self, Errno> {
        Ok(Self { memory: Mapping::memfd("tiny", bytes)?, translating: Mutex::new(()) })
    }

    fn translating(&self) -> MutexGuard<'_, ()> {
        self.translating.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Tiny {
    fn name(&self) -> &str {
        "tiny"
    }

    fn memory(&self) -> MemorySpec {
        let frames = u32::try_from(self.memory.len() / PAGE_SIZE).unwrap_or(u32::MAX);
        MemorySpec { frames, kind: MemoryKind::Private, survives_fork: false }
    }

    fn copy_to_device(&self, ops: &[CopyOp]) -> Result<(), DeviceError> {
        ops.iter().for_each(|op| op.host.copy_to(&self.memory, op.frames.offset()));
        Ok(())
    }

    fn copy_to_host(&self, ops: &[CopyOp]) -> Result<(), DeviceError> {
        ops.iter().for_each(|op| op.host.copy_from(&self.memory, op.frames.offset()));
        Ok(())
    }

    fn zero(&self, frames: FrameRun) -> Result<(), DeviceError> {
        self.memory.zero(frames.offset(), frames.bytes());
        Ok(())
    }

    fn flush(&self, _invalidation: &Invalidation) {
        drop(self.translating());
    }
}

/// What runs on the device.
#[derive(Debug)]
pub struct Processor {
    device: &'static Tiny,
    port: Port,
}

/// How often an access is tried while its page keeps being taken away.
const TRIES: u32 = 1000;

impl Processor {
    /// Does something to the number at `addr`, wherever its page is.
    fn at<T>(
        &self,
        addr: VirtAddr,
        access: Access,
        in_frame: impl Fn(&Mapping, u64) -> T,
        in_host: impl Fn() -> Option<T>,
    ) -> Result<T, FaultError> {
        for _ in 0..TRIES {
            let translating = self.device.translating();
            let pte = self.port.table().lookup(addr.page());
            if let Some(pfn) = pte.pfn().filter(|_| pte.allows(access)) {
                return Ok(in_frame(&self.device.memory, pfn.offset() + addr.get() % PAGE_SIZE));
            }
            drop(translating);
            if pte.is_host()
                && pte.allows(access)
                && let Some(value) = in_host()
            {
                return Ok(value);
            }
            self.port.fault(addr, access, DeviceFaultPolicy::Migrate)?;
        }
        Err(FaultError::Kernel { addr, errno: Errno::BUSY })
    }

    /// # Errors
    /// The address cannot be read.
    pub fn load(&self, addr: VirtAddr) -> Result<u64, FaultError> {
        let in_host = || {
            let mut bytes = [0; 8];
            access::read(addr, &mut bytes).is_all().then(|| u64::from_ne_bytes(bytes))
        };
        self.at(addr, Access::Read, Mapping::load_u64, in_host)
    }

    /// # Errors
    /// The address cannot be written.
    pub fn store(&self, addr: VirtAddr, n: u64) -> Result<(), FaultError> {
        let in_host = || access::write(addr, &n.to_ne_bytes()).is_all().then_some(());
        self.at(addr, Access::Write, |memory, at| memory.store_u64(at, n), in_host)
    }
}

/// # Errors
/// Whatever fails, and a wrong sum.
pub fn main() -> Result<(), Box<dyn Error>> {
    let mm = Mm::open()?;
    let mirror = mm.register(Tiny::new(64 << 20)?)?;
    let processor = Processor { device: mirror.device(), port: mirror.port().ok_or("the device is gone")? };

    let numbers: Vec<AtomicU64> = (0..1 << 20).map(AtomicU64::new).collect();
    let first = VirtAddr::of(numbers.as_ptr());
    let device_thread = std::thread::spawn(move || {
        let mut sum = 0;
        for i in 0..1 << 20 {
            let addr = first.add(i * 8);
            let n = processor.load(addr)?;
            processor.store(addr, n + 1)?;
            sum += n;
        }
        Ok::<u64, FaultError>(sum)
    });
    let sum = device_thread.join().map_err(|_| "the device's thread panicked")??;
    println!("the device added up {sum}, with {} pages in its memory", mirror.frames_used());

    let own: u64 = numbers.iter().map(|n| n.load(Relaxed) - 1).sum();
    println!("the CPU finds {own}; {} faults brought the pages home", mm.stats().get(Counter::FaultsHome));
    if sum != own {
        return Err("the sums differ".into());
    }
    mirror.close()?;
    Ok(mm.close()?)
}
