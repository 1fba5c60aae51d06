//! The engine on this kernel, with the plainest device there is.
#![allow(unsafe_code, reason = "tests make the memory that they then watch")]

use std::{
    ptr,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

use uhmm::{
    MigrateOptions, Mirror, Mm, PageOutcome,
    addr::{PAGE_SIZE, PageRange, VirtAddr},
    device::{CopyOp, Device, DeviceError, FrameRun, Invalidation, MemoryKind, MemorySpec},
    mm::Location,
};
use uhmm_sys::mem::Mapping;
use uhmm_testkit::isolated;

/// Frames in shared memory, and nothing else.
struct Plain {
    memory: Mapping,
}

impl Plain {
    fn new(bytes: u64) -> Self {
        Self { memory: Mapping::memfd("plain", bytes).unwrap() }
    }
}

impl Device for Plain {
    fn name(&self) -> &str {
        "plain"
    }

    fn memory(&self) -> MemorySpec {
        MemorySpec {
            frames: u32::try_from(self.memory.len() / PAGE_SIZE).unwrap(),
            kind: MemoryKind::Private,
            survives_fork: false,
        }
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

    fn flush(&self, _invalidation: &Invalidation) {}
}

/// Private anonymous memory of the program.
struct Memory {
    start: *mut u64,
    pages: usize,
}

impl Memory {
    fn new(pages: usize) -> Self {
        Self::with_prot(pages, libc::PROT_READ | libc::PROT_WRITE)
    }

    fn with_prot(pages: usize, prot: i32) -> Self {
        let len = pages * 4096;
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            libc::mmap(ptr::null_mut(), len, prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1, 0)
        };
        assert_ne!(start, libc::MAP_FAILED);
        Self { start: start.cast(), pages }
    }

    /// 2 MiB aligned, and huge where the kernel has a huge page.
    fn huge(blocks: usize) -> Self {
        let memory = Self::new((blocks + 1) * 512);
        let addr = (memory.start.addr()).next_multiple_of(2 << 20);
        let start = memory.start.with_addr(addr);
        // SAFETY: the range lies within the mapping just made.
        let advised = unsafe { libc::madvise(start.cast(), blocks << 21, libc::MADV_HUGEPAGE) };
        assert_eq!(advised, 0);
        Self { start, pages: blocks * 512 }
    }

    fn range(&self) -> PageRange {
        PageRange::new(VirtAddr::of(self.start), (self.pages * 4096) as u64).unwrap()
    }

    fn word(&self, page: usize) -> *mut u64 {
        assert!(page < self.pages);
        self.start.wrapping_add(page * 512)
    }

    fn get(&self, page: usize) -> u64 {
        // SAFETY: the page is mapped for as long as the value lives; `word` checked the index.
        unsafe { self.word(page).read_volatile() }
    }

    fn set(&self, page: usize, value: u64) {
        // SAFETY: as for `get`.
        unsafe { self.word(page).write_volatile(value) }
    }

    fn fill(&self) {
        (0..self.pages).for_each(|n| self.set(n, stamp(n)));
    }

    fn check(&self) {
        (0..self.pages).for_each(|n| assert_eq!(self.get(n), stamp(n), "page {n}"));
    }
}

fn stamp(n: usize) -> u64 {
    (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

fn mm_with(bytes: u64) -> (Mm, Mirror<Plain>) {
    let mm = Mm::open().expect("a userfaultfd");
    let mirror = mm.register(Plain::new(bytes)).expect("room for a device");
    (mm, mirror)
}

#[test]
fn pages_leave_and_a_touch_brings_them_home() {
    isolated!(|| {
        let (mm, mirror) = mm_with(64 << 20);
        let memory = Memory::new(1024);
        memory.fill();
        let report = mirror.migrate(memory.range(), &MigrateOptions::default());
        assert_eq!(report.count(PageOutcome::Moved), 1024, "{:?}", report.summary().collect::<Vec<_>>());
        assert_eq!(mirror.frames_used(), 1024);
        assert_eq!(mm.pages_away(), 1024);
        assert!(matches!(mm.residency(memory.range().start()).at, Location::Device(d, _) if d == mirror.id()));
        memory.check();
        assert_eq!(mm.pages_away(), 0);
        assert_eq!(mirror.frames_used(), 0);
        assert_eq!(mm.residency(memory.range().start()).at, Location::Cpu);
        drop(mirror);
        mm.close().unwrap();
        Ok(())
    });
}

#[test]
fn a_huge_folio_moves_whole_and_comes_home_whole() {
    isolated!(|| {
        let (mm, mirror) = mm_with(64 << 20);
        let memory = Memory::huge(4);
        memory.fill();
        for _ in 0..3 {
            let report = mirror.migrate(memory.range(), &MigrateOptions::default());
            assert!(report.is_complete(), "{:?}", report.summary().collect::<Vec<_>>());
            let home = mm.home(memory.range());
            assert!(home.is_complete(), "{:?}", home.summary().collect::<Vec<_>>());
            memory.check();
        }
        let stats = mm.stats();
        assert_eq!(stats.get(uhmm::trace::Counter::FoliosOut), 12);
        assert_eq!(stats.get(uhmm::trace::Counter::FoliosHome), 12);
        Ok(())
    });
}

#[test]
fn cpu_threads_and_migration_agree_on_every_count() {
    isolated!(|| {
        let (mm, mirror) = mm_with(64 << 20);
        let memory = Memory::new(2048);
        memory.fill();
        let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
        let base = memory.start.addr();
        std::thread::scope(|s| {
            for t in 0..2usize {
                let (stop, rounds) = (&stop, &rounds);
                s.spawn(move || {
                    let mut x = t as u64 + 1;
                    while !stop.load(Relaxed) {
                        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        let page = (x >> 33) as usize % 2048;
                        let word = ptr::with_exposed_provenance_mut::<AtomicU64>(base + page * 4096 + 64);
                        // SAFETY: the word is inside the mapping, aligned, and only ever used atomically.
                        unsafe { &*word }.fetch_add(1, Relaxed);
                        rounds.fetch_add(1, Relaxed);
                    }
                });
            }
            for n in 0..300 {
                let first = (n * 97) % 1900;
                let start = memory.range().page(first);
                let range = PageRange::new(start, 4096 * (1 + (n as u64 * 31) % 148)).unwrap();
                let report = mirror.migrate(range, &MigrateOptions::default());
                assert_eq!(report.outcomes().len(), range.pages());
            }
            stop.store(true, Relaxed);
        });
        let mut sum = 0;
        for page in 0..2048 {
            // SAFETY: the word is inside the mapping, and all other threads have ended.
            sum += unsafe { memory.word(page).wrapping_add(8).read_volatile() };
        }
        assert_eq!(sum, rounds.load(Relaxed));
        memory.check();
        assert!(mm.stats().get(uhmm::trace::Counter::PagesOut) > 1000);
        Ok(())
    });
}
