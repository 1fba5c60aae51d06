//! What the tests of the engine on the real kernel are made of: an address space or the reason to skip, areas of memory
//! whose every page says what it is, and the system calls that change them.
//
// UNSAFETY: the tests make, change and watch memory by raw system calls and pointers.

use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
    time::{Duration, Instant},
};

use uhmm::{
    MigrateOptions, Mirror, Mm, PageOutcome,
    addr::{PAGE_SIZE, PageRange, VirtAddr},
    device::Device,
    mm::{Location, Report, StartError},
};
use uhmm_sys::{
    probe::{Cap, masked},
    uffd::{Features, Uffd},
};
use uhmm_testkit::Skip;

use super::{Plain, eventually};

pub const PAGE: usize = 4096;
pub const BLOCK: usize = 2 << 20;

/// An address space with one device.
pub struct World {
    pub mm: Mm,
    pub mirror: Mirror<Plain>,
}

/// The address space of this process, or why this test cannot run here.
pub fn open() -> Result<Mm, Skip> {
    Mm::open().map_err(|error| match error {
        StartError::Userfaultfd(why) => Skip(format!("there is no userfaultfd to be had here: {why}")),
        error => panic!("{error}"),
    })
}

impl World {
    /// With a device of `mib` MiB.
    pub fn new(mib: u64) -> Result<Self, Skip> {
        let mm = open()?;
        let mirror = mm.register(Plain::new(mib << 20)).expect("room for a device");
        Ok(Self { mm, mirror })
    }

    /// As [`World::new`], for tests that let system calls touch pages that are away.
    pub fn with_kernel_faults(mib: u64) -> Result<Self, Skip> {
        let world = Self::new(mib)?;
        if world.mm.serves_kernel_faults() {
            return Ok(world);
        }
        Err(Skip("the userfaultfd here serves no faults of system calls".to_owned()))
    }

    /// Moves all of `area` to the device; not one page may stay.
    pub fn send(&self, area: &Area) {
        send(&self.mirror, area);
    }

    pub fn migrate(&self, area: &Area) -> Report {
        self.mirror.migrate(area.range(), &MigrateOptions::default())
    }

    /// `count` pages of `area` are on the device.
    pub fn expect_away(&self, area: &Area, count: usize) {
        let away = (0..area.pages).filter(|&n| self.is_away(area.page(n))).count();
        assert_eq!(away, count, "pages of {area:?} that are away");
    }

    pub fn is_away(&self, addr: usize) -> bool {
        self.mm.residency(virt(addr)).at != Location::Cpu
    }

    /// The device's frames in use come to be `frames`: the thread that raised an event goes on before the books are done.
    pub fn frames_become(&self, frames: usize) {
        let wanted = u32::try_from(frames).unwrap();
        eventually(&format!("{frames} frames in use"), || self.mirror.frames_used() == wanted);
    }

    /// Brings everything home and shows that nothing was left.
    pub fn finish(self) {
        drop(self.mirror);
        self.mm.close().unwrap();
    }
}

/// Moves all of `area` to `mirror`'s device; not one page may stay.
///
/// A page that has just been touched is busy until the books are done: such pages are asked for again.
pub fn send<D: Device>(mirror: &Mirror<D>, area: &Area) {
    eventually("no page is busy", || {
        let report = mirror.migrate(area.range(), &MigrateOptions::default());
        let busy = report.count(PageOutcome::Busy);
        let there = report.count(PageOutcome::Moved) + report.count(PageOutcome::Already);
        assert_eq!(there + busy, area.pages, "{area:?}: {:?}", summary(&report));
        // A touch that was answered long ago may still bring a page home: its message was read by a second handler.
        busy == 0
            && (0..area.pages).all(|n| {
                let at = mirror.mm().residency(virt(area.page(n))).at;
                matches!(at, Location::Device(id, _) | Location::Coherent(id, _) if id == mirror.id())
            })
    });
}

pub fn virt(addr: usize) -> VirtAddr {
    VirtAddr::new(addr as u64)
}

pub fn summary(report: &Report) -> Vec<(PageOutcome, usize)> {
    report.summary().collect()
}

/// Whether pages move by `UFFDIO_MOVE` here.
pub fn has_move() -> bool {
    !masked(Cap::Move) && Uffd::open(Features::MOVE).is_ok_and(|uffd| uffd.features().contains(Features::MOVE))
}

/// Skips where locked memory does not move: it needs `UFFDIO_MOVE`, and more locked memory for the moment of the move.
pub fn locked_memory_moves() -> Result<(), Skip> {
    if !has_move() {
        return Err(Skip("without UFFDIO_MOVE locked memory stays".to_owned()));
    }
    if !may_lock_more() {
        return Err(Skip(
            "locked memory moves by way of locked memory, which is limited here (RLIMIT_MEMLOCK)".to_owned(),
        ));
    }
    Ok(())
}

/// Whether there is no limit to how much memory may be locked.
fn may_lock_more() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let unlimited = limits.lines().any(|line| line.starts_with("Max locked memory") && line.contains("unlimited"));
    // CAP_IPC_LOCK is bit 14.
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    unlimited || capabilities.is_some_and(|bits| u64::from_str_radix(bits.trim(), 16).unwrap_or(0) >> 14 & 1 != 0)
}

/// Whether forks by a raw system call can be seen here.
pub fn has_fork_events() -> bool {
    let wanted = Features::EVENT_FORK;
    !masked(Cap::ForkEvent) && Uffd::open(wanted).is_ok_and(|uffd| uffd.features().contains(wanted))
}

/// Pages of memory at a fixed place. Does not own them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    pub start: usize,
    pub pages: usize,
}

/// The two shapes of anonymous memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Small pages.
    Small,
    /// Huge pages, as far as the kernel has them.
    Huge,
}

pub const SHAPES: [Shape; 2] = [Shape::Small, Shape::Huge];

impl Area {
    /// `blocks` aligned blocks of anonymous memory, between inaccessible memory.
    pub fn new(shape: Shape, blocks: usize) -> Self {
        let around = map(0, (blocks + 2) * BLOCK, libc::PROT_NONE, 0);
        let start = (around + PAGE).next_multiple_of(BLOCK);
        let area = Self { start: map(start, blocks * BLOCK, RW, libc::MAP_FIXED), pages: blocks * 512 };
        let advice = if shape == Shape::Huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        assert_eq!(Via::Libc.madvise(area.start, area.len(), advice), 0);
        area
    }

    /// As [`Area::new`], and every page written.
    pub fn filled(shape: Shape, blocks: usize, tag: u64) -> Self {
        let area = Self::new(shape, blocks);
        area.fill(tag);
        area
    }

    pub const fn len(&self) -> usize {
        self.pages * PAGE
    }

    pub const fn end(&self) -> usize {
        self.start + self.len()
    }

    pub fn range(&self) -> PageRange {
        PageRange::new(virt(self.start), self.pages as u64 * PAGE_SIZE).unwrap()
    }

    pub fn page(&self, n: usize) -> usize {
        assert!(n < self.pages);
        self.start + n * PAGE
    }

    pub fn part(&self, pages: Range<usize>) -> Self {
        assert!(pages.end <= self.pages && !pages.is_empty());
        Self { start: self.start + pages.start * PAGE, pages: pages.len() }
    }

    pub fn fill(&self, tag: u64) {
        (0..self.pages).for_each(|n| write_page(self.page(n), tag, n));
    }

    /// Every page is as [`Area::fill`] left it.
    pub fn check(&self, tag: u64) {
        self.check_from(tag, 0);
    }

    /// As [`Area::check`], where the first page was number `first` when it was filled.
    pub fn check_from(&self, tag: u64, first: usize) {
        (0..self.pages).for_each(|n| expect_page(self.page(n), tag, first + n));
    }

    pub fn check_zero(&self) {
        (0..self.pages).for_each(|n| expect_zero(self.page(n)));
    }

    pub fn unmap(&self) {
        unmap(self.start, self.len());
    }
}

/// The words of a page that are looked at: its first, its last, one in the middle.
const WORDS: [usize; 3] = [0, 1096, 4088];

fn stamp(tag: u64, n: usize, word: usize) -> u64 {
    (tag << 32 | n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ word as u64 | 1 << 63
}

pub fn write_page(addr: usize, tag: u64, n: usize) {
    WORDS.iter().for_each(|&word| poke(addr + word, stamp(tag, n, word)));
}

/// What is wrong with the page, if anything.
pub fn page_error(addr: usize, tag: u64, n: usize) -> Option<String> {
    WORDS.iter().find_map(|&word| {
        let (found, wanted) = (peek(addr + word), stamp(tag, n, word));
        (found != wanted).then(|| format!("{:#x}: {found:#x} where {wanted:#x} was written", addr + word))
    })
}

#[track_caller]
pub fn expect_page(addr: usize, tag: u64, n: usize) {
    if let Some(error) = page_error(addr, tag, n) {
        panic!("page {n}: {error}");
    }
}

#[track_caller]
pub fn expect_zero(addr: usize) {
    for word in WORDS {
        assert_eq!(peek(addr + word), 0, "{:#x} should be zero", addr + word);
    }
}

pub fn poke(addr: usize, value: u64) {
    // SAFETY: tests write to memory that they have mapped, writable, and that no Rust object lives in.
    unsafe { ptr::with_exposed_provenance_mut::<u64>(addr).write_volatile(value) }
}

pub fn peek(addr: usize) -> u64 {
    // SAFETY: tests read memory that they have mapped, and that no Rust object lives in.
    unsafe { ptr::with_exposed_provenance::<u64>(addr).read_volatile() }
}

pub const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Private anonymous memory; at `at` where `flags` say so.
pub fn map(at: usize, len: usize, prot: i32, flags: i32) -> usize {
    let mapped =
        Via::Libc.mmap(at, len, prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | flags, -1);
    mapped.unwrap_or_else(|errno| panic!("mmap: {}", std::io::Error::from_raw_os_error(errno)))
}

pub fn unmap(at: usize, len: usize) {
    assert_eq!(Via::Libc.munmap(at, len), 0);
}

/// How a system call is made. The engine must not depend on seeing the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    Libc,
    Raw,
}

pub const WAYS: [Via; 2] = [Via::Libc, Via::Raw];

pub fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

pub fn pointer<T>(addr: usize) -> *mut T {
    ptr::with_exposed_provenance_mut(addr)
}

/// A system call by its number: what it answered, or errno.
pub fn syscall(number: libc::c_long, args: [usize; 6]) -> Result<usize, i32> {
    let [a, b, c, d, e, f] = args;
    // SAFETY: tests let the kernel read and write only memory that they have mapped for it, in which no Rust object
    // lives, or locals that outlive the call.
    let answer = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if answer == -1 { Err(errno()) } else { Ok(usize::try_from(answer.cast_unsigned()).unwrap()) }
}

/// A flag or a descriptor as an argument of [`syscall`].
pub fn arg(n: i32) -> usize {
    usize::try_from(n).expect("flags and descriptors are not negative")
}

fn zero_or_minus_one(answer: Result<usize, i32>) -> i32 {
    if answer == Ok(0) { 0 } else { -1 }
}

impl Via {
    pub fn mmap(self, at: usize, len: usize, prot: i32, flags: i32, fd: i32) -> Result<usize, i32> {
        if self == Self::Raw {
            let fd = usize::try_from(fd).unwrap_or(usize::MAX);
            return syscall(libc::SYS_mmap, [at, len, arg(prot), arg(flags), fd, 0]);
        }
        // SAFETY: tests map over nothing but what they have mapped themselves.
        let mapped = unsafe { libc::mmap(pointer(at), len, prot, flags, fd, 0) };
        if mapped == libc::MAP_FAILED { Err(errno()) } else { Ok(mapped.expose_provenance()) }
    }

    pub fn munmap(self, at: usize, len: usize) -> i32 {
        if self == Self::Raw {
            return zero_or_minus_one(syscall(libc::SYS_munmap, [at, len, 0, 0, 0, 0]));
        }
        // SAFETY: tests unmap what they have mapped themselves, when they do not use it any more.
        unsafe { libc::munmap(pointer(at), len) }
    }

    /// The new address, or errno.
    pub fn mremap(self, at: usize, len: usize, new_len: usize, flags: i32, to: usize) -> Result<usize, i32> {
        if self == Self::Raw {
            return syscall(libc::SYS_mremap, [at, len, new_len, arg(flags), to, 0]);
        }
        // SAFETY: tests move what they have mapped themselves, onto holes or onto mappings of their own.
        let moved = unsafe { libc::mremap(pointer(at), len, new_len, flags, pointer::<u8>(to)) };
        if moved == libc::MAP_FAILED { Err(errno()) } else { Ok(moved.expose_provenance()) }
    }

    pub fn madvise(self, at: usize, len: usize, advice: i32) -> i32 {
        if self == Self::Raw {
            return zero_or_minus_one(syscall(libc::SYS_madvise, [at, len, arg(advice), 0, 0, 0]));
        }
        // SAFETY: advice on memory of the test, whose content it does not rely on where the advice drops it.
        unsafe { libc::madvise(pointer(at), len, advice) }
    }

    pub fn mprotect(self, at: usize, len: usize, prot: i32) -> i32 {
        if self == Self::Raw {
            return zero_or_minus_one(syscall(libc::SYS_mprotect, [at, len, arg(prot), 0, 0, 0]));
        }
        // SAFETY: memory of the test, which touches it as the new protection allows.
        unsafe { libc::mprotect(pointer(at), len, prot) }
    }
}

/// Runs `f` once for each shape of memory and each way to make a system call.
pub fn each_way(mut f: impl FnMut(Shape, Via)) {
    for shape in SHAPES {
        for via in WAYS {
            println!("{shape:?} {via:?}");
            f(shape, via);
        }
    }
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Exit(i32),
    Signal(i32),
}

/// Forks by libc, and runs `f` in the child, which exits with 0 unless it panics.
pub fn fork_child(f: impl FnOnce()) -> i32 {
    // SAFETY: the child calls `f`, which the test keeps to what a forked child may do, and ends without returning.
    child_of(unsafe { libc::fork() }, f)
}

/// As [`fork_child`], by the bare system call: nobody is told but by an event of the kernel's.
pub fn raw_fork_child(f: impl FnOnce()) -> i32 {
    // Without a new stack this is fork.
    let pid = syscall(libc::SYS_clone, [arg(libc::SIGCHLD), 0, 0, 0, 0, 0]).expect("clone");
    child_of(i32::try_from(pid).unwrap(), f)
}

fn child_of(pid: i32, f: impl FnOnce()) -> i32 {
    assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    if pid > 0 {
        return pid;
    }
    let code = if catch_unwind(AssertUnwindSafe(f)).is_ok() { 0 } else { 101 };
    // SAFETY: ends the child without running the harness's exit handlers a second time.
    unsafe { libc::_exit(code) }
}

/// Waits for a child, for at most a minute; a child that takes longer is killed, and the test fails.
pub fn wait_for(pid: i32) -> End {
    let start = Instant::now();
    loop {
        let mut status = 0;
        // SAFETY: writes one integer, a local.
        let answer = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
        assert!(answer >= 0, "waitpid: {}", std::io::Error::last_os_error());
        if answer == pid {
            return if libc::WIFSIGNALED(status) {
                End::Signal(libc::WTERMSIG(status))
            } else {
                End::Exit(libc::WEXITSTATUS(status))
            };
        }
        if start.elapsed() > Duration::from_secs(60) {
            let wchan = std::fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
            // SAFETY: the child is this test's own.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            panic!("child {pid} did not end within a minute; it was in {wchan}");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// xorshift64*: seeded, for tests that do things at random.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from((self.next() >> 16) % n as u64).unwrap()
    }
}
