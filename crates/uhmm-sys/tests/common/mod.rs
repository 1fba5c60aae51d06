//! Memory of the test's own, as a program would map it, and children to try things in.
// UNSAFETY: maps scratch memory and forks, as the programs do that the crate is for.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::{
    io,
    ptr::{null_mut, with_exposed_provenance_mut},
    sync::Mutex,
};

use uhmm_sys::addr::{PAGE_SIZE, PageRange, VirtAddr};

/// A mapping that is there as long as the value. Parts that a test unmaps or moves away are remembered: unmapping them
/// again could hit another thread's memory.
#[derive(Debug)]
pub struct Map {
    pub range: PageRange,
    gone: Mutex<Vec<PageRange>>,
}

pub const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

impl Map {
    /// Private anonymous memory.
    pub fn anon(pages: u64) -> Self {
        Self::new(pages * PAGE_SIZE, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// Private anonymous memory aligned to 2 MiB, with the advice to use huge pages.
    pub fn huge(blocks: u64) -> Self {
        let map = Self::aligned(blocks);
        map.advise(libc::MADV_HUGEPAGE).unwrap();
        map
    }

    /// Private anonymous memory aligned to 2 MiB.
    pub fn aligned(blocks: u64) -> Self {
        let block = 2 << 20;
        let big = Self::new((blocks + 1) * block, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
        let start = big.range.start().get().next_multiple_of(block);
        let (end, big_end) = (start + blocks * block, big.range.end().get());
        big.unmap(0, (start - big.range.start().get()) / PAGE_SIZE);
        big.unmap((end - big.range.start().get()) / PAGE_SIZE, (big_end - end) / PAGE_SIZE);
        std::mem::forget(big);
        Self::of(PageRange::new(VirtAddr::new(start), blocks * block).unwrap())
    }

    pub fn new(len: u64, prot: i32, flags: i32, fd: i32) -> Self {
        let len_usize = usize::try_from(len).unwrap();
        // SAFETY: a new mapping at addresses that nobody uses.
        let addr = unsafe { libc::mmap(null_mut(), len_usize, prot, flags, fd, 0) };
        assert_ne!(addr, libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
        Self::of(PageRange::new(VirtAddr::of(addr), len).unwrap())
    }

    fn of(range: PageRange) -> Self {
        Self { range, gone: Mutex::new(Vec::new()) }
    }

    pub fn start(&self) -> VirtAddr {
        self.range.start()
    }

    /// The range of `count` pages from page `first` on.
    pub fn pages(&self, first: usize, count: usize) -> PageRange {
        PageRange::new(self.range.page(first), count as u64 * PAGE_SIZE).unwrap()
    }

    pub fn ptr(&self, page: usize) -> *mut u8 {
        ptr(self.range.page(page))
    }

    pub fn store(&self, page: usize, byte: u8) {
        // SAFETY: the test owns the mapping and borrows nothing of it.
        unsafe { self.ptr(page).write_volatile(byte) };
    }

    pub fn load(&self, page: usize) -> u8 {
        load(self.range.page(page))
    }

    /// Fills each page with its number plus `base`.
    pub fn fill(&self, base: u8) {
        for page in 0..self.range.pages() {
            self.fill_page(page, base.wrapping_add(page.to_le_bytes()[0]));
        }
    }

    pub fn fill_page(&self, page: usize, byte: u8) {
        // SAFETY: the test owns the mapping and borrows nothing of it.
        unsafe { self.ptr(page).write_bytes(byte, 4096) };
    }

    /// Whether each byte of the page is `byte`.
    pub fn is_filled(&self, page: usize, byte: u8) -> bool {
        let mut bytes = [0u8; 4096];
        // SAFETY: as in `fill_page`.
        unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(self.ptr(page), 4096) };
        bytes.iter().all(|b| *b == byte)
    }

    pub fn advise(&self, advice: i32) -> io::Result<()> {
        let len = usize::try_from(self.range.bytes()).unwrap();
        // SAFETY: the test owns the mapping and borrows nothing of it.
        check(unsafe { libc::madvise(self.ptr(0).cast(), len, advice) })
    }

    pub fn protect(&self, first: usize, count: usize, prot: i32) {
        // SAFETY: the test owns the mapping and borrows nothing of it.
        check(unsafe { libc::mprotect(self.ptr(first).cast(), count * 4096, prot) }).unwrap();
    }

    pub fn unmap(&self, first: u64, count: u64) {
        if count == 0 {
            return;
        }
        let range = PageRange::new(self.range.start().add(first * PAGE_SIZE), count * PAGE_SIZE).unwrap();
        // Before the call, after which the addresses may be anybody's.
        self.forget(range);
        unmap(range);
    }

    /// Takes note that `range` is not the value's any more.
    pub fn forget(&self, range: PageRange) {
        self.gone.lock().unwrap().push(range);
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        let gone = self.gone.get_mut().unwrap();
        let mut at = self.range.start();
        gone.sort_by_key(|range| range.start());
        for range in gone.iter() {
            if let Ok(kept) = PageRange::from_ends(at, range.start()) {
                unmap(kept);
            }
            at = range.end();
        }
        if let Ok(kept) = PageRange::from_ends(at, self.range.end()) {
            unmap(kept);
        }
    }
}

fn unmap(range: PageRange) {
    let len = usize::try_from(range.bytes()).unwrap();
    // SAFETY: the caller's mapping, which nothing borrows.
    check(unsafe { libc::munmap(ptr(range.start()).cast(), len) }).unwrap();
}

pub fn ptr(addr: VirtAddr) -> *mut u8 {
    with_exposed_provenance_mut(usize::try_from(addr.get()).unwrap())
}

pub fn load(addr: VirtAddr) -> u8 {
    // SAFETY: the tests load from their own mappings only.
    unsafe { ptr(addr).read_volatile() }
}

pub fn check(ret: i32) -> io::Result<()> {
    if ret == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Runs `f` in a forked child and returns its exit status; `f` must not allocate, for the child has one thread of many.
/// A child killed by a signal counts as 256 plus its number.
pub fn in_child(f: impl FnOnce() -> u8) -> i32 {
    // SAFETY: the child makes only calls that need no lock of the C library, as documented.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: {}", io::Error::last_os_error());
    if pid == 0 {
        let status = f();
        // SAFETY: ends the child without running anything.
        unsafe { libc::_exit(i32::from(status)) };
    }
    wait_for(pid)
}

/// Waits for a child, as [`in_child`].
pub fn wait_for(pid: i32) -> i32 {
    let mut status = 0;
    // SAFETY: the status is a local.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(waited, pid, "waitpid: {}", io::Error::last_os_error());
    if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 256 + libc::WTERMSIG(status) }
}

/// A small generator of reproducible numbers.
#[derive(Debug)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}
