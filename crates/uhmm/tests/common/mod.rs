//! What the engine's tests share: the plainest device, and memory to watch.
//
// UNSAFETY: the tests make, change and watch memory by raw system calls and pointers.

#![allow(dead_code, reason = "not every test file uses all of it")]
#![allow(unsafe_code, reason = "tests make the memory that they then watch")]

pub mod kit;
pub mod watcher;

use std::{
    ptr,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use uhmm::{
    Mirror, Mm,
    addr::{PAGE_SIZE, PageRange, VirtAddr},
    device::{CopyOp, DevPfn, Device, DeviceError, FrameRun, Invalidation, MemoryKind, MemorySpec},
};
use uhmm_sys::{
    arena,
    mem::{HostBytes, Mapping},
};

/// Frames in shared memory or, coherent, in memory of the process; and nothing else.
pub struct Plain {
    memory: Frames,
    survives_fork: bool,
    /// Whether copies to the device wait until this changes.
    pub stall_out: AtomicBool,
    /// Whether one waits.
    pub stalls: AtomicBool,
}

enum Frames {
    Shared(Mapping),
    Coherent(HostBytes),
}

impl Plain {
    pub fn new(bytes: u64) -> Self {
        Self::with(Frames::Shared(Mapping::memfd("plain", bytes).unwrap()))
    }

    /// One whose memory the CPU can address.
    pub fn coherent(bytes: u64) -> Self {
        let pages = arena::pages(bytes, 2 << 20).unwrap();
        Self::with(Frames::Coherent(HostBytes::in_arena(pages.start(), bytes).unwrap()))
    }

    const fn with(memory: Frames) -> Self {
        Self { memory, survives_fork: false, stall_out: AtomicBool::new(false), stalls: AtomicBool::new(false) }
    }

    /// The place of a frame of coherent memory.
    pub fn frame(&self, pfn: DevPfn) -> HostBytes {
        let Frames::Coherent(bytes) = &self.memory else { panic!("not coherent") };
        bytes.slice(pfn.offset(), PAGE_SIZE)
    }

    /// One whose frames a forked child shares.
    pub fn sharing(bytes: u64) -> Self {
        Self { survives_fork: true, ..Self::new(bytes) }
    }
}

impl Device for Plain {
    fn name(&self) -> &str {
        "plain"
    }

    fn memory(&self) -> MemorySpec {
        let (bytes, kind) = match &self.memory {
            Frames::Shared(memory) => (memory.len(), MemoryKind::Private),
            Frames::Coherent(memory) => (memory.len(), MemoryKind::Coherent),
        };
        MemorySpec { frames: u32::try_from(bytes / PAGE_SIZE).unwrap(), kind, survives_fork: self.survives_fork }
    }

    fn host_memory(&self) -> Option<HostBytes> {
        match &self.memory {
            Frames::Shared(_) => None,
            Frames::Coherent(memory) => Some(*memory),
        }
    }

    fn copy_to_device(&self, ops: &[CopyOp]) -> Result<(), DeviceError> {
        while self.stall_out.load(Relaxed) {
            self.stalls.store(true, Relaxed);
            std::thread::sleep(Duration::from_millis(1));
        }
        for op in ops {
            match &self.memory {
                Frames::Shared(memory) => op.host.copy_to(memory, op.frames.offset()),
                Frames::Coherent(memory) => {
                    HostBytes::copy_between(op.host, memory.slice(op.frames.offset(), op.frames.bytes()));
                }
            }
        }
        Ok(())
    }

    fn copy_to_host(&self, ops: &[CopyOp]) -> Result<(), DeviceError> {
        for op in ops {
            match &self.memory {
                Frames::Shared(memory) => op.host.copy_from(memory, op.frames.offset()),
                Frames::Coherent(memory) => {
                    HostBytes::copy_between(memory.slice(op.frames.offset(), op.frames.bytes()), op.host);
                }
            }
        }
        Ok(())
    }

    fn zero(&self, frames: FrameRun) -> Result<(), DeviceError> {
        match &self.memory {
            Frames::Shared(memory) => memory.zero(frames.offset(), frames.bytes()),
            Frames::Coherent(memory) => memory.slice(frames.offset(), frames.bytes()).fill_zero(),
        }
        Ok(())
    }

    fn flush(&self, _invalidation: &Invalidation) {}
}

/// Private anonymous memory of the program.
pub struct Memory {
    pub start: *mut u64,
    pub pages: usize,
}

impl Memory {
    pub fn new(pages: usize) -> Self {
        Self::with_prot(pages, libc::PROT_READ | libc::PROT_WRITE)
    }

    pub fn with_prot(pages: usize, prot: i32) -> Self {
        let len = pages * 4096;
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            libc::mmap(ptr::null_mut(), len, prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1, 0)
        };
        assert_ne!(start, libc::MAP_FAILED);
        Self { start: start.cast(), pages }
    }

    /// 2 MiB aligned, and huge where the kernel has a huge page.
    pub fn huge(blocks: usize) -> Self {
        let memory = Self::new((blocks + 1) * 512);
        let addr = (memory.start.addr()).next_multiple_of(2 << 20);
        let start = memory.start.with_addr(addr);
        // SAFETY: the range lies within the mapping just made.
        let advised = unsafe { libc::madvise(start.cast(), blocks << 21, libc::MADV_HUGEPAGE) };
        assert_eq!(advised, 0);
        Self { start, pages: blocks * 512 }
    }

    pub fn range(&self) -> PageRange {
        PageRange::new(VirtAddr::of(self.start), (self.pages * 4096) as u64).unwrap()
    }

    pub fn word(&self, page: usize) -> *mut u64 {
        assert!(page < self.pages);
        self.start.wrapping_add(page * 512)
    }

    pub fn get(&self, page: usize) -> u64 {
        // SAFETY: the page is mapped for as long as the value lives; `word` checked the index.
        unsafe { self.word(page).read_volatile() }
    }

    pub fn set(&self, page: usize, value: u64) {
        // SAFETY: as for `get`.
        unsafe { self.word(page).write_volatile(value) }
    }

    pub fn fill(&self) {
        (0..self.pages).for_each(|n| self.set(n, stamp(n)));
    }

    /// As [`Memory::check`], with another value in one page.
    pub fn check_but(&self, page: usize, value: u64) {
        (0..self.pages).for_each(|n| assert_eq!(self.get(n), if n == page { value } else { stamp(n) }, "page {n}"));
    }

    pub fn check(&self) {
        (0..self.pages).for_each(|n| assert_eq!(self.get(n), stamp(n), "page {n}"));
    }
}

pub fn stamp(n: usize) -> u64 {
    (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

pub fn mm_with(bytes: u64) -> (Mm, Mirror<Plain>) {
    let mm = Mm::open().expect("a userfaultfd");
    let mirror = mm.register(Plain::new(bytes)).expect("room for a device");
    (mm, mirror)
}

/// Waits until `condition` holds, for at most five seconds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed().as_secs() < 5, "not within 5 s: {what}");
        std::thread::yield_now();
    }
}
