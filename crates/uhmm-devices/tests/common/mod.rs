//! What the device's tests share: memory to watch, and devices on an address space.
// UNSAFETY: the tests map and unmap the memory that devices work on.
#![allow(dead_code, reason = "not every test file uses all of it")]

use std::{
    os::fd::AsRawFd,
    ptr,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use uhmm::{
    DeviceFaultPolicy, Mirror, Mm,
    addr::{BLOCK_PAGES, PageRange, VirtAddr},
    mm::Location,
};
use uhmm_devices::soft::{Lane, SoftConfig, SoftDevice};
use uhmm_sys::{mem::Mapping, thread::Kind};

pub const PAGE: usize = 4096;
pub const MIB: u64 = 1 << 20;

/// Memory of the program, unmapped on drop.
pub struct Memory {
    start: *mut u8,
    pages: usize,
    /// What is mapped: more, where there are pages without access on both sides.
    mapped: (*mut u8, usize),
}

// SAFETY: the mapping belongs to the value; its words are only ever used atomically.
unsafe impl Send for Memory {}
// SAFETY: as for `Send`.
unsafe impl Sync for Memory {}

impl Memory {
    /// Private and anonymous, of small pages, at the start of a block that nothing else is in, so that no history of
    /// other pages counts, and with inaccessible blocks around it, so that no stack of a thread is next to it.
    pub fn new(pages: usize) -> Self {
        let inner = pages.next_multiple_of(BLOCK_PAGES);
        let mut memory = Self::map(None, inner + 3 * BLOCK_PAGES, -1);
        let first = (memory.start.addr() + (1 << 21)).next_multiple_of(1 << 21) - memory.start.addr();
        memory.protect(libc::PROT_NONE);
        (memory.start, memory.pages) = (memory.start.wrapping_add(first), pages);
        memory.protect(libc::PROT_READ | libc::PROT_WRITE);
        memory
    }

    /// As [`Memory::new`], of huge pages as far as the kernel has them.
    pub fn huge(blocks: usize) -> Self {
        let memory = Self::new(blocks * BLOCK_PAGES);
        memory.advise(memory.range(), libc::MADV_HUGEPAGE);
        memory
    }

    /// The same at a given place, where nothing may be.
    pub fn at(start: VirtAddr, pages: usize) -> Self {
        Self::map(Some(start), pages, -1)
    }

    /// A shared mapping of a file.
    pub fn shared_file(file: &Mapping) -> Self {
        use std::os::fd::AsFd;
        Self::map(None, usize::try_from(file.len()).unwrap() / PAGE, file.as_fd().as_raw_fd())
    }

    fn map(start: Option<VirtAddr>, pages: usize, fd: i32) -> Self {
        let place =
            start.map_or(ptr::null_mut(), |a| ptr::with_exposed_provenance_mut(usize::try_from(a.get()).unwrap()));
        let fixed = if start.is_some() { libc::MAP_FIXED_NOREPLACE } else { 0 };
        let kind = if fd < 0 { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS } else { libc::MAP_SHARED };
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping that replaces none.
        let start = unsafe { libc::mmap(place, pages * PAGE, prot, kind | fixed, fd, 0) };
        assert_ne!(start, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        // SAFETY: the advice changes no bytes of the mapping just made.
        unsafe { libc::madvise(start, pages * PAGE, libc::MADV_NOHUGEPAGE) };
        Self { start: start.cast(), pages, mapped: (start.cast(), pages) }
    }

    pub fn range(&self) -> PageRange {
        PageRange::new(VirtAddr::of(self.start), (self.pages * PAGE) as u64).unwrap()
    }

    pub fn part(&self, first: usize, pages: usize) -> PageRange {
        assert!(first + pages <= self.pages);
        PageRange::new(self.addr(first, 0), (pages * PAGE) as u64).unwrap()
    }

    pub const fn pages(&self) -> usize {
        self.pages
    }

    /// The address of a byte.
    pub fn addr(&self, page: usize, byte: usize) -> VirtAddr {
        assert!(page < self.pages && byte < PAGE);
        VirtAddr::of(self.start.wrapping_add(page * PAGE + byte))
    }

    /// A number in a page.
    pub fn word(&self, page: usize, n: usize) -> &AtomicU64 {
        assert!(page < self.pages && n < PAGE / 8);
        // SAFETY: inside the mapping, which lives as long as the borrow, and aligned; numbers are used atomically.
        unsafe { AtomicU64::from_ptr(self.start.wrapping_add(page * PAGE + n * 8).cast()) }
    }

    pub fn get(&self, page: usize, n: usize) -> u64 {
        self.word(page, n).load(Relaxed)
    }

    /// Makes every number of every page one that names it.
    pub fn fill(&self) {
        for page in 0..self.pages {
            (0..PAGE / 8).for_each(|n| self.word(page, n).store(stamp(page, n), Relaxed));
        }
    }

    pub fn check(&self) {
        for page in 0..self.pages {
            for n in 0..PAGE / 8 {
                assert_eq!(self.get(page, n), stamp(page, n), "page {page} number {n}");
            }
        }
    }

    /// Unmaps the pages but not what is around them. Whoever calls it touches them no more.
    pub fn make_hole(&self) -> PageRange {
        // SAFETY: pages of an own mapping, which nothing is borrowed from now.
        let done = unsafe { libc::munmap(self.start.cast(), self.pages * PAGE) };
        assert_eq!(done, 0);
        self.range()
    }

    pub fn protect(&self, prot: i32) {
        self.protect_part(self.range(), prot);
    }

    pub fn protect_part(&self, part: PageRange, prot: i32) {
        let (start, len) = self.place(part);
        // SAFETY: pages of an own mapping, which nothing is borrowed from now.
        let done = unsafe { libc::mprotect(start, len, prot) };
        assert_eq!(done, 0);
    }

    pub fn advise(&self, part: PageRange, advice: i32) {
        let (start, len) = self.place(part);
        // SAFETY: pages of an own mapping; the bytes that the advice may drop are nobody's but the test's.
        let done = unsafe { libc::madvise(start, len, advice) };
        assert_eq!(done, 0);
    }

    /// Unmaps a part. Whoever calls it touches it no more.
    pub fn unmap(&self, part: PageRange) {
        let (start, len) = self.place(part);
        // SAFETY: pages of an own mapping, which nothing is borrowed from now.
        let done = unsafe { libc::munmap(start, len) };
        assert_eq!(done, 0);
    }

    /// Maps a part anew, over what is there.
    pub fn renew(&self, part: PageRange) {
        let (start, len) = self.place(part);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: pages of an own mapping; what is borrowed from them are atomic numbers, which are zero now.
        let mapped = unsafe { libc::mmap(start, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        assert_eq!(mapped, start);
    }

    fn place(&self, part: PageRange) -> (*mut libc::c_void, usize) {
        assert!(self.range().contains_range(part));
        let off = usize::try_from(part.start().get() - self.range().start().get()).unwrap();
        (self.start.wrapping_add(off).cast(), part.pages() * PAGE)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the value owns the mapping, and borrows of it have ended.
        let done = unsafe { libc::munmap(self.mapped.0.cast(), self.mapped.1 * PAGE) };
        assert_eq!(done, 0);
    }
}

pub fn stamp(page: usize, n: usize) -> u64 {
    (page as u64 * 512 + n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// A configuration for each kind of memory.
pub fn configs(bytes: u64) -> [SoftConfig; 2] {
    [SoftConfig::ram("ram", bytes), SoftConfig::file("file", std::env::temp_dir(), bytes)]
}

pub fn register(mm: &Mm, config: &SoftConfig, workers: usize) -> Mirror<SoftDevice> {
    let mirror = mm.register(SoftDevice::new(config).expect("memory")).expect("a free place");
    mirror.device().start(mirror.port().expect("registered"), workers, Kind::Pthread).expect("threads");
    mirror
}

pub fn lane(mirror: &Mirror<SoftDevice>, policy: DeviceFaultPolicy) -> Lane {
    let mut lane = mirror.device().lane().expect("a free lane");
    lane.set_fault_policy(policy);
    lane
}

pub fn is_on(mm: &Mm, mirror: &Mirror<SoftDevice>, addr: VirtAddr) -> bool {
    matches!(mm.residency(addr).at, Location::Device(device, _) if device == mirror.id())
}

/// Waits until `condition` holds, for at most five seconds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(5), "not within 5 s: {what}");
        std::thread::yield_now();
    }
}

/// A small generator of numbers.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % n
    }
}
