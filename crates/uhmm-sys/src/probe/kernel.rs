//! Probes of everything else: page tables, limits, settings.
// UNSAFETY: system calls on scratch memory.

use std::{
    fs,
    os::fd::{AsFd, BorrowedFd},
};

use super::{Found, scratch::Scratch};
use crate::{
    Errno,
    addr::{PAGE_SHIFT, PAGE_SIZE, VirtAddr},
    pagemap::{IOC_SCAN, IS_PRESENT, Region, ScanArg},
    raw,
};

/// Lifts a limit of the calling shell, whose children inherit it.
fn lift(limit: &str) -> String {
    format!("sudo prlimit --pid $$ --{limit}=unlimited")
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn number(path: &str) -> Option<u64> {
    read(path).parse().ok()
}

pub(super) fn version() -> Found {
    let release = read("/proc/sys/kernel/osrelease");
    // SAFETY: the call takes a number and touches no memory of ours.
    let page_size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    if u64::try_from(page_size) != Ok(PAGE_SIZE) {
        return Found::missing(format!("Linux {release}, pages of {page_size} bytes"));
    }
    Found::ok(format!("Linux {release}"))
}

/// The pagemap entry of the page at `addr`.
pub(super) fn pagemap_entry(addr: VirtAddr) -> Result<u64, Errno> {
    let pagemap = raw::open(c"/proc/self/pagemap", libc::O_RDONLY)?;
    let mut entry = [0; 8];
    match raw::pread(pagemap.as_fd(), &mut entry, (addr.get() >> PAGE_SHIFT) * 8)? {
        8 => Ok(u64::from_ne_bytes(entry)),
        _ => Err(Errno::IO),
    }
}

pub(super) fn syscall_dispatch() -> Found {
    match crate::dispatch::probe() {
        Ok(()) => Found::ok("a thread can have its system calls caught"),
        Err(errno) => {
            Found::missing(format!("PR_SET_SYSCALL_USER_DISPATCH: {errno}")).grant("boot Linux 5.11 or later")
        }
    }
}

/// Two pages, of which the second was touched.
pub(super) fn pagemap_scan() -> Found {
    let try_it = || -> Result<bool, Errno> {
        let scratch = Scratch::new(2)?;
        scratch.advise(libc::MADV_NOHUGEPAGE).or_else(|e| if e == Errno::INVAL { Ok(()) } else { Err(e) })?;
        scratch.store(PAGE_SIZE, 1);
        let pagemap = raw::open(c"/proc/self/pagemap", libc::O_RDONLY)?;
        let mut region = Region::default();
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start: scratch.start().get(),
            end: scratch.range().end().get(),
            vec: raw::ptr_arg(&raw mut region),
            vec_len: 1,
            category_mask: IS_PRESENT,
            return_mask: IS_PRESENT,
            ..ScanArg::default()
        };
        // SAFETY: the structure of this ioctl, all numbers; it points at one region, a local, which the kernel fills.
        let regions = unsafe { raw::ioctl(pagemap.as_fd(), IOC_SCAN, &mut arg) }?;
        let second = (scratch.start().add(PAGE_SIZE).get(), scratch.range().end().get());
        Ok(regions == 1 && (region.start, region.end) == second && region.categories & IS_PRESENT != 0)
    };
    match try_it() {
        Ok(true) => Found::ok("found the touched page of two"),
        Ok(false) => Found::missing("did not tell a touched page from a hole"),
        Err(errno) => Found::missing(format!("PAGEMAP_SCAN: {errno}")).grant("boot Linux 6.7 or later"),
    }
}

/// `struct procmap_query`.
#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

/// `PROCMAP_QUERY`.
const IOC_PROCMAP: u64 = raw::iowr::<ProcmapQuery>(b'f', 17);

pub(super) fn procmap_query() -> Found {
    let try_it = || -> Result<bool, Errno> {
        let scratch = Scratch::new(1)?;
        let maps = raw::open(c"/proc/self/maps", libc::O_RDONLY)?;
        let addr = scratch.start().get();
        let mut query =
            ProcmapQuery { size: size_of::<ProcmapQuery>() as u64, query_addr: addr, ..ProcmapQuery::default() };
        // SAFETY: the structure of this ioctl, all numbers; without buffers for names it writes nothing else.
        unsafe { raw::ioctl(maps.as_fd(), IOC_PROCMAP, &mut query) }?;
        Ok(query.vma_start <= addr && addr < query.vma_end && query.vma_page_size == PAGE_SIZE)
    };
    match try_it() {
        Ok(true) => Found::ok("found a VMA"),
        Ok(false) => Found::missing("named the wrong VMA"),
        Err(errno) => Found::missing(format!("PROCMAP_QUERY: {errno}")).grant("boot Linux 6.11 or later"),
    }
}

pub(super) fn pfn() -> Found {
    const GRANT: &str = "sudo \"$(command -v uhmm)\" run -- PROGRAM";
    /// Bits 0 to 54 of a pagemap entry; zero where they are hidden.
    const PFN: u64 = (1 << 55) - 1;
    let entry = Scratch::filled(1, 1).and_then(|scratch| pagemap_entry(scratch.start()));
    match entry {
        Err(errno) => Found::missing(format!("pagemap: {errno}")).grant(GRANT),
        Ok(entry) if entry & PFN == 0 => Found::missing("pagemap hides frame numbers").grant(GRANT),
        Ok(entry) => {
            let mut flags = [0; 8];
            let read = raw::open(c"/proc/kpageflags", libc::O_RDONLY)
                .and_then(|file| raw::pread(file.as_fd(), &mut flags, (entry & PFN) * 8));
            match read {
                Ok(8) => Found::ok("frame numbers and their flags can be read"),
                Ok(_) => Found::degraded("kpageflags does not reach that far"),
                Err(errno) => Found::degraded(format!("kpageflags: {errno}")).grant(GRANT),
            }
        }
    }
}

/// A read that starts on a page and runs into one that may not be read: half of it must come, and no signal.
pub(super) fn vm_readv() -> Found {
    let try_it = || -> Result<u64, Errno> {
        let scratch = Scratch::filled(2, 9)?;
        let second = crate::addr::PageRange::page_of(scratch.range().page(1));
        // SAFETY: no reference leads into the scratch; this probe does not touch the page again.
        unsafe { raw::mprotect(second, libc::PROT_NONE) }?;
        let mut buf = [0u8; 16];
        let local = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        let remote = libc::iovec { iov_base: raw::ptr(second.start().page()).wrapping_sub(8).cast(), iov_len: 16 };
        let pid = u64::from(raw::getpid());
        let args = [pid, raw::ptr_arg(&raw const local), 1, raw::ptr_arg(&raw const remote), 1, 0];
        // SAFETY: the kernel writes at most 16 bytes to `buf`, and reads the scratch through its own page tables.
        let got = unsafe { raw::syscall(libc::SYS_process_vm_readv, args) }?;
        Ok(if buf[..8] == [9; 8] { got } else { 0 })
    };
    match try_it() {
        Ok(8) => Found::ok("read up to a page that may not be read"),
        Ok(_) => Found::missing("read other bytes than asked for"),
        Err(errno) => Found::missing(format!("process_vm_readv: {errno}"))
            .grant("allow the system call process_vm_readv in the sandbox's seccomp filter"),
    }
}

pub(super) fn memfd() -> Found {
    let try_it = || -> Result<(), Errno> {
        let args = [raw::ptr_arg(c"uhmm-probe".as_ptr()), u64::from(libc::MFD_CLOEXEC)];
        // SAFETY: the kernel reads a NUL-terminated string; the call makes a file descriptor.
        let fd = unsafe { raw::syscall(libc::SYS_memfd_create, args) }?;
        // SAFETY: the call succeeded, so `fd` is new.
        let fd = unsafe { raw::take_fd(fd) };
        // SAFETY: the call takes numbers only.
        unsafe { raw::syscall(libc::SYS_ftruncate, [raw::fd_arg(fd.as_fd()), PAGE_SIZE]) }?;
        shared_page(fd.as_fd())
    };
    match try_it() {
        Ok(()) => Found::ok("made and mapped one"),
        Err(errno) => Found::missing(format!("memfd_create or its mapping: {errno}")),
    }
}

fn shared_page(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let at = raw::mmap(PAGE_SIZE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, Some(fd), 0)?;
    // SAFETY: the mapping was made by the line above and is not used.
    unsafe { raw::munmap(at, PAGE_SIZE) }
}

/// What the engine reserves by default.
const RESERVE: u64 = crate::arena::DEFAULT_BYTES;

pub(super) fn address_space() -> Found {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    match raw::mmap(RESERVE, libc::PROT_NONE, flags, None, 0) {
        Ok(at) => {
            // SAFETY: the mapping was made by the line above and is not used.
            let unmapped = unsafe { raw::munmap(at, RESERVE) };
            debug_assert_eq!(unmapped, Ok(()));
            Found::ok(format!("{} GiB can be reserved", RESERVE >> 30))
        }
        Err(errno) => Found::missing(format!("{} GiB: {errno}", RESERVE >> 30)).grant(lift("as")),
    }
}

pub(super) fn populate() -> Found {
    let try_it = || -> Result<bool, Errno> {
        /// Bit 63 of a pagemap entry.
        const PRESENT: u64 = 1 << 63;
        let scratch = Scratch::new(2)?;
        scratch.advise(libc::MADV_POPULATE_READ)?;
        scratch.advise(libc::MADV_POPULATE_WRITE)?;
        Ok(pagemap_entry(scratch.start())? & PRESENT != 0)
    };
    match try_it() {
        Ok(true) => Found::ok("populated two pages"),
        Ok(false) => Found::missing("pages are not there after populating them"),
        Err(errno) => Found::missing(format!("MADV_POPULATE_*: {errno}")).grant("boot Linux 5.14 or later"),
    }
}

pub(super) fn membarrier() -> Found {
    let call = |command: libc::c_int| {
        // SAFETY: the call takes numbers only and touches no memory.
        unsafe { raw::syscall(libc::SYS_membarrier, [raw::arg(command), 0, 0]) }
    };
    let done = call(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)
        .and_then(|_| call(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED));
    match done {
        Ok(_) => Found::ok("registered and fenced"),
        Err(errno) => Found::missing(format!("membarrier: {errno}")).grant("boot Linux 4.14 or later"),
    }
}

pub(super) fn thp() -> Found {
    const GRANT: &str = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled";
    let modes = read("/sys/kernel/mm/transparent_hugepage/enabled");
    // The one in force stands in brackets.
    let mode = modes.split_whitespace().find_map(|mode| mode.strip_prefix('[')?.strip_suffix(']'));
    // SAFETY: this option takes numbers only and answers one.
    let disabled = unsafe { raw::syscall(libc::SYS_prctl, [raw::arg(libc::PR_GET_THP_DISABLE), 0, 0, 0, 0]) };
    match mode {
        _ if disabled.is_ok_and(|answer| answer != 0) => Found::missing("switched off for this process by prctl"),
        Some(mode @ ("always" | "madvise")) => Found::ok(mode),
        Some(mode) => Found::missing(mode).grant(GRANT),
        None => Found::missing("the kernel has none").grant("boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE"),
    }
}

/// Whether `CAP_SYS_PTRACE` is effective.
pub(super) fn has_sys_ptrace() -> bool {
    const CAP_SYS_PTRACE: u32 = 19;
    crate::limits::has_capability(CAP_SYS_PTRACE)
}

pub(super) fn sys_ptrace() -> Found {
    if has_sys_ptrace() { Found::ok("effective") } else { Found::missing("not held") }
}

pub(super) fn max_map_count() -> Found {
    /// The kernel's default, with which ordinary programs get by.
    const ENOUGH: u64 = 65530;
    const GRANT: &str = "sudo sysctl vm.max_map_count=1048576";
    match number("/proc/sys/vm/max_map_count") {
        Some(count) if count >= ENOUGH => Found::ok(count.to_string()),
        Some(count) => Found::degraded(count.to_string()).grant(GRANT),
        None => Found::degraded("cannot be read"),
    }
}

/// A limit of this process; `None` is none.
fn soft_limit(resource: libc::__rlimit_resource_t) -> Result<Option<u64>, Errno> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    let args = [0, u64::from(resource), 0, raw::ptr_arg(&raw mut limit)];
    // SAFETY: asks about this process; the kernel writes the old limit to a local and reads no new one.
    unsafe { raw::syscall(libc::SYS_prlimit64, args) }?;
    Ok((limit.rlim_cur != libc::RLIM64_INFINITY).then_some(limit.rlim_cur))
}

fn bytes(n: u64) -> String {
    match n {
        n if n >= 1 << 30 => format!("{} GiB", n >> 30),
        n if n >= 1 << 20 => format!("{} MiB", n >> 20),
        n => format!("{} KiB", n >> 10),
    }
}

/// Locks a page, and looks at how many could be.
pub(super) fn memlock() -> Found {
    /// A staging area's worth: what is locked moves in batches of this size.
    const ENOUGH: u64 = 4 << 20;
    let locked = Scratch::filled(1, 1).and_then(|scratch| {
        // SAFETY: locking changes no bytes.
        unsafe { raw::syscall(libc::SYS_mlock, [scratch.start().get(), PAGE_SIZE]) }
    });
    match (locked, soft_limit(libc::RLIMIT_MEMLOCK)) {
        (Err(errno), _) => Found::degraded(format!("mlock: {errno}")).grant(lift("memlock")),
        (Ok(_), Ok(None)) => Found::ok("unlimited"),
        (Ok(_), Ok(Some(limit))) if limit >= ENOUGH => Found::ok(bytes(limit)),
        (Ok(_), Ok(Some(limit))) => Found::degraded(bytes(limit)).grant(lift("memlock")),
        (Ok(_), Err(errno)) => Found::degraded(format!("prlimit: {errno}")),
    }
}

pub(super) fn rlimit_as() -> Found {
    match soft_limit(libc::RLIMIT_AS) {
        Ok(None) => Found::ok("unlimited"),
        Ok(Some(limit)) => Found::degraded(bytes(limit)).grant(lift("as")),
        Err(errno) => Found::degraded(format!("prlimit: {errno}")),
    }
}

pub(super) fn overcommit() -> Found {
    match read("/proc/sys/vm/overcommit_memory").as_str() {
        "0" => Found::ok("0 (heuristic)"),
        "1" => Found::ok("1 (always)"),
        "2" => Found::degraded("2 (strict)").grant("sudo sysctl vm.overcommit_memory=0"),
        _ => Found::degraded("cannot be read"),
    }
}
