//! System calls without libc.
//!
//! Every call is one instruction: no `errno`, no thread-local storage, no cancellation point. So they work on the
//! engine's raw threads (which have no C library thread behind them), in a forked child of a process with threads, and
//! beneath the functions that the preload library puts in front of libc's: the engine's own `mmap` is never intercepted.
// UNSAFETY: system calls and the pointers that they take.

use std::{
    arch::asm,
    ffi::CStr,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::with_exposed_provenance_mut,
};

use crate::{
    Errno,
    addr::{PageRange, VirtAddr},
};

#[cfg(not(all(target_arch = "x86_64", target_os = "linux", target_pointer_width = "64")))]
compile_error!("uhmm runs on 64-bit Linux on x86-64 only");

/// The largest errno that a system call can answer.
const ERRNO_MAX: u64 = 4095;

/// Makes a system call. Missing arguments are zero.
///
/// # Safety
/// As for the system call: what it reads, writes, maps or unmaps must be the caller's to give.
#[inline]
pub(crate) unsafe fn syscall<const N: usize>(nr: libc::c_long, args: [u64; N]) -> Result<u64, Errno> {
    const { assert!(N <= 6, "a system call takes at most six arguments") };
    let arg = |i: usize| args.get(i).copied().unwrap_or(0);
    let ret: u64;
    // SAFETY: the instruction clobbers rax, rcx and r11 only, as declared; memory is assumed clobbered. What the call
    // itself does is the caller's obligation.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") nr => ret,
            in("rdi") arg(0),
            in("rsi") arg(1),
            in("rdx") arg(2),
            in("r10") arg(3),
            in("r8") arg(4),
            in("r9") arg(5),
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    if ret > u64::MAX - ERRNO_MAX { Err(errno(ret.wrapping_neg())) } else { Ok(ret) }
}

fn errno(positive: u64) -> Errno {
    Errno::from_raw_os_error(i32::try_from(positive).unwrap_or(libc::EIO))
}

/// The number as an index. The crate builds for 64-bit targets only, so nothing is cut off.
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits: see the compile_error above")]
pub(crate) const fn index(n: u64) -> usize {
    n as usize
}

/// The low half of a register that the kernel's interface defines as 32 bits wide.
#[expect(clippy::cast_possible_truncation, reason = "the caller's field is defined as 32 bits")]
pub(crate) const fn low32(n: u64) -> u32 {
    n as u32
}

/// A flag or number of libc's as a system call argument; sign extended, as C does.
pub(crate) fn arg(n: i32) -> u64 {
    i64::from(n).cast_unsigned()
}

/// The file descriptor as a system call argument.
pub(crate) fn fd_arg(fd: BorrowedFd<'_>) -> u64 {
    arg(fd.as_raw_fd())
}

/// The address as a pointer, for use by code that says why that is allowed.
pub(crate) fn ptr(addr: VirtAddr) -> *mut u8 {
    with_exposed_provenance_mut(index(addr.get()))
}

/// The address of `p` as a system call argument. Its provenance is exposed: the kernel will use it.
pub(crate) fn ptr_arg<T>(p: *const T) -> u64 {
    p.expose_provenance() as u64
}

/// Takes the file descriptor that a system call returned.
///
/// # Safety
/// `ret` is the result of a successful call that makes a new file descriptor, and nobody else owns it.
pub(crate) unsafe fn take_fd(ret: u64) -> OwnedFd {
    let fd = i32::try_from(ret).expect("a file descriptor is a small number");
    // SAFETY: `fd` is new and unowned, by the contract of this function.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// `open(2)` with `O_CLOEXEC`.
pub(crate) fn open(path: &CStr, flags: i32) -> Result<OwnedFd, Errno> {
    let flags = arg(flags | libc::O_CLOEXEC);
    // SAFETY: `path` is NUL-terminated and outlives the call, which reads nothing else.
    let fd = unsafe { syscall(libc::SYS_openat, [arg(libc::AT_FDCWD), ptr_arg(path.as_ptr()), flags]) }?;
    // SAFETY: `openat` succeeded, so `fd` is new.
    Ok(unsafe { take_fd(fd) })
}

/// `read(2)`.
pub(crate) fn read(fd: BorrowedFd<'_>, buf: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: the kernel writes at most `buf.len()` bytes to `buf`, which is borrowed exclusively.
    unsafe { syscall(libc::SYS_read, [fd_arg(fd), ptr_arg(buf.as_mut_ptr()), buf.len() as u64]) }.map(index)
}

/// `pread(2)`.
pub(crate) fn pread(fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Result<usize, Errno> {
    // SAFETY: the kernel writes at most `buf.len()` bytes to `buf`, which is borrowed exclusively.
    unsafe { syscall(libc::SYS_pread64, [fd_arg(fd), ptr_arg(buf.as_mut_ptr()), buf.len() as u64, offset]) }.map(index)
}

/// Reads a small file of `/proc` or `/sys` into `buf` and returns what was read, cut off at the buffer's end.
pub(crate) fn read_file<'b>(path: &CStr, buf: &'b mut [u8]) -> Result<&'b [u8], Errno> {
    use std::os::fd::AsFd;
    let file = open(path, libc::O_RDONLY)?;
    let mut len = 0;
    while len < buf.len() {
        match read(file.as_fd(), &mut buf[len..]) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(&buf[..len])
}

/// `ioctl(2)` with a structure that the kernel reads and writes.
///
/// # Safety
/// `T` is the `repr(C)` structure that `request` is defined for, any bytes the kernel may write into it are a valid
/// `T`, and whatever its fields point at is the caller's to give.
pub(crate) unsafe fn ioctl<T>(fd: BorrowedFd<'_>, request: u64, value: &mut T) -> Result<u64, Errno> {
    // SAFETY: `value` is exclusively borrowed and as large as `request` says; the rest is the caller's obligation.
    unsafe { syscall(libc::SYS_ioctl, [fd_arg(fd), request, ptr_arg(&raw mut *value)]) }
}

/// The number of an `ioctl` that reads and writes a `T`, as the C macro `_IOWR` makes it.
pub(crate) const fn iowr<T>(kind: u8, nr: u8) -> u64 {
    ioc(3, kind, nr, size_of::<T>())
}

/// The number of an `ioctl` as the C macro `_IOR` makes it.
pub(crate) const fn ior<T>(kind: u8, nr: u8) -> u64 {
    ioc(2, kind, nr, size_of::<T>())
}

const fn ioc(dir: u64, kind: u8, nr: u8, size: usize) -> u64 {
    dir << 30 | (size as u64) << 16 | (kind as u64) << 8 | nr as u64
}

/// `mmap(2)` at an address of the kernel's choice.
pub(crate) fn mmap(
    len: u64,
    prot: i32,
    flags: i32,
    fd: Option<BorrowedFd<'_>>,
    offset: u64,
) -> Result<VirtAddr, Errno> {
    assert!(flags & (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE) == 0, "mmap must not replace a mapping");
    let fd = fd.map_or(arg(-1), fd_arg);
    // SAFETY: without MAP_FIXED a new mapping takes unused addresses only, so it changes no memory that exists.
    unsafe { syscall(libc::SYS_mmap, [0, len, arg(prot), arg(flags), fd, offset]) }.map(VirtAddr::new)
}

/// `munmap(2)`.
///
/// # Safety
/// `start..start + len` belongs to the caller and nobody uses it any more.
pub(crate) unsafe fn munmap(start: VirtAddr, len: u64) -> Result<(), Errno> {
    // SAFETY: the caller owns the range.
    unsafe { syscall(libc::SYS_munmap, [start.get(), len]) }.map(drop)
}

/// `mprotect(2)`.
///
/// # Safety
/// No Rust reference leads into the range, unless it stays valid under the new protection.
pub(crate) unsafe fn mprotect(range: PageRange, prot: i32) -> Result<(), Errno> {
    // SAFETY: the caller's obligation is the same.
    unsafe { syscall(libc::SYS_mprotect, [range.start().get(), range.bytes(), arg(prot)]) }.map(drop)
}

/// `madvise(2)`.
///
/// # Safety
/// No Rust reference leads into the range, if `advice` changes its bytes.
pub(crate) unsafe fn madvise(range: PageRange, advice: i32) -> Result<(), Errno> {
    // SAFETY: the caller's obligation is the same.
    unsafe { syscall(libc::SYS_madvise, [range.start().get(), range.bytes(), arg(advice)]) }.map(drop)
}

/// The process's id: `getpid(2)`, never cached, so that it is right in a forked child.
pub(crate) fn getpid() -> u32 {
    // SAFETY: the call takes no arguments and touches no memory.
    let ret = unsafe { syscall(libc::SYS_getpid, []) };
    low32(ret.unwrap_or(0))
}

/// Reads decimal digits at the start of `text`, after blanks.
pub(crate) fn parse_decimal(text: &[u8]) -> Option<u64> {
    let start = text.iter().position(|b| !b.is_ascii_whitespace())?;
    let digits = &text[start..];
    let len = digits.iter().position(|b| !b.is_ascii_digit()).unwrap_or(digits.len());
    if len == 0 {
        return None;
    }
    digits[..len].iter().try_fold(0u64, |n, b| n.checked_mul(10)?.checked_add(u64::from(b - b'0')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_come_back_as_errno() {
        assert_eq!(open(c"/no/such/file", libc::O_RDONLY).unwrap_err(), Errno::NOENT);
        assert_eq!(getpid(), std::process::id());
    }

    #[test]
    fn decimals_stop_at_the_first_other_byte() {
        assert_eq!(parse_decimal(b"  42 7"), Some(42));
        assert_eq!(parse_decimal(b"x42"), None);
        assert_eq!(parse_decimal(b""), None);
        assert_eq!(parse_decimal(b"99999999999999999999"), None);
    }

    #[test]
    fn ioctl_numbers_match_the_c_macros() {
        // Values printed by a C program on this architecture.
        assert_eq!(iowr::<[u64; 3]>(0xAA, 0x3F), 0xc018_aa3f);
        assert_eq!(ior::<[u64; 2]>(0xAA, 0x02), 0x8010_aa02);
    }
}
