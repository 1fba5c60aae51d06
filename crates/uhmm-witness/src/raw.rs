//! System calls without libc: beneath whatever the library under test puts in front of it, and without `errno`.
//
// UNSAFETY: system calls and the pointers that they take.

use std::{
    arch::asm,
    ffi::{CStr, c_int, c_long},
    ops::ControlFlow,
};

#[cfg(not(all(target_arch = "x86_64", target_os = "linux", target_pointer_width = "64")))]
compile_error!("the witness runs on 64-bit Linux on x86-64 only");

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;

/// The largest errno that a system call can answer.
const ERRNO_MAX: u64 = 4095;

/// What the kernel answered: a number, or an errno.
type Answer = Result<u64, c_int>;

/// The number as an index.
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits: see the compile_error above")]
pub(crate) const fn index(n: u64) -> usize {
    n as usize
}

/// Makes a system call. Missing arguments are zero.
///
/// # Safety
/// As for the system call: what it reads and writes must be the caller's to give.
unsafe fn syscall<const N: usize>(nr: c_long, args: [u64; N]) -> Answer {
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
    let errno = ret.wrapping_neg();
    if ret > u64::MAX - ERRNO_MAX { Err(c_int::try_from(errno).unwrap_or(libc::EIO)) } else { Ok(ret) }
}

/// A flag or a descriptor as an argument; sign extended, as C does.
fn arg(n: c_int) -> u64 {
    i64::from(n).cast_unsigned()
}

/// A file that is closed when dropped.
#[derive(Debug)]
pub(crate) struct File {
    fd: c_int,
}

impl File {
    /// Opens with flags of `open(2)`; what is made may be read and written by its owner.
    pub(crate) fn open(path: &CStr, flags: c_int) -> Option<Self> {
        let mode = 0o600;
        let args = [arg(libc::AT_FDCWD), path.as_ptr().expose_provenance() as u64, arg(flags | libc::O_CLOEXEC), mode];
        // SAFETY: the path is a string, which the call reads.
        let fd = unsafe { syscall(libc::SYS_openat, args) }.ok()?;
        c_int::try_from(fd).ok().map(|fd| Self { fd })
    }

    /// Reads from where the last read ended. 0 at the end, and after an error.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> usize {
        let args = [arg(self.fd), buffer.as_mut_ptr().expose_provenance() as u64, buffer.len() as u64];
        // SAFETY: the call writes to the buffer, and no further.
        index(unsafe { syscall(libc::SYS_read, args) }.unwrap_or(0))
    }

    /// Reads words from the given one on. The number of words read.
    pub(crate) fn words(&self, first: u64, words: &mut [u64]) -> usize {
        let address = words.as_mut_ptr().expose_provenance() as u64;
        let args = [arg(self.fd), address, size_of_val(words) as u64, first * 8];
        // SAFETY: the call writes to the words, and no further; each bit pattern is a word.
        index(unsafe { syscall(libc::SYS_pread64, args) }.unwrap_or(0)) / 8
    }

    /// Writes, in one call.
    pub(crate) fn write(&self, bytes: &[u8]) {
        write(self.fd, bytes);
    }

    /// Regions with present pages of `[start, end)`: their number, and how far the kernel looked.
    pub(crate) fn present(&self, start: u64, end: u64, regions: &mut [Region]) -> Result<(usize, u64), c_int> {
        const PAGE_IS_PRESENT: u64 = 1 << 3;
        const PAGEMAP_SCAN: u64 = 0xc060_6610;
        /// `struct pm_scan_arg`.
        #[repr(C)]
        struct Scan {
            size: u64,
            flags: u64,
            start: u64,
            end: u64,
            walk_end: u64,
            regions: u64,
            regions_len: u64,
            pages_max: u64,
            inverted: u64,
            mask: u64,
            anyof_mask: u64,
            return_mask: u64,
        }
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            flags: 0,
            start,
            end,
            walk_end: 0,
            regions: regions.as_mut_ptr().expose_provenance() as u64,
            regions_len: regions.len() as u64,
            pages_max: 0,
            inverted: 0,
            mask: PAGE_IS_PRESENT,
            anyof_mask: 0,
            return_mask: PAGE_IS_PRESENT,
        };
        let args = [arg(self.fd), PAGEMAP_SCAN, (&raw mut scan).expose_provenance() as u64];
        // SAFETY: the call writes to the structure and to as many regions as it names, whose fields are words.
        let found = unsafe { syscall(libc::SYS_ioctl, args) }?;
        Ok((index(found).min(regions.len()), scan.walk_end))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: the descriptor is this value's own.
        let _ = unsafe { syscall(libc::SYS_close, [arg(self.fd)]) };
    }
}

/// A region that a scan found: `struct page_region`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Region {
    /// Where it begins.
    pub(crate) start: u64,
    /// Where it ends.
    pub(crate) end: u64,
    categories: u64,
}

impl Region {
    /// None yet.
    pub(crate) const NONE: Self = Self { start: 0, end: 0, categories: 0 };
}

/// Writes to a descriptor, in one call.
pub(crate) fn write(fd: c_int, bytes: &[u8]) {
    let args = [arg(fd), bytes.as_ptr().expose_provenance() as u64, bytes.len() as u64];
    // SAFETY: the call reads the bytes.
    let _ = unsafe { syscall(libc::SYS_write, args) };
}

/// Copies from the process's memory. The number of bytes that could be read; those before them were.
pub(crate) fn peek(from: u64, to: &mut [u8]) -> usize {
    let here = libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() };
    let there = libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(index(from)), iov_len: to.len() };
    let (here, there) = (&raw const here, &raw const there);
    let args =
        [u64::from(getpid().cast_unsigned()), here.expose_provenance() as u64, 1, there.expose_provenance() as u64, 1];
    // SAFETY: the call writes to `to`, and reads from wherever it may.
    index(unsafe { syscall(libc::SYS_process_vm_readv, args) }.unwrap_or(0))
}

/// The process.
pub(crate) fn getpid() -> c_int {
    // SAFETY: the call takes nothing.
    unsafe { syscall(libc::SYS_getpid, []) }.map_or(0, |pid| c_int::try_from(pid).unwrap_or(0))
}

/// The thread.
pub(crate) fn gettid() -> c_int {
    // SAFETY: the call takes nothing.
    unsafe { syscall(libc::SYS_gettid, []) }.map_or(0, |tid| c_int::try_from(tid).unwrap_or(0))
}

/// Ends the process at once, by the signal that cannot be caught.
pub(crate) fn die() -> ! {
    loop {
        // SAFETY: nothing of the process is used any more.
        let _ = unsafe { syscall(libc::SYS_kill, [arg(getpid()), arg(libc::SIGKILL)]) };
    }
}

/// Ends the process at once.
pub(crate) fn exit_group(status: c_int) -> ! {
    loop {
        // SAFETY: nothing of the process is used any more.
        let _ = unsafe { syscall(libc::SYS_exit_group, [arg(status)]) };
    }
}

pub(crate) fn errno() -> c_int {
    // SAFETY: takes nothing, returns where the calling thread's number is.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: the calling thread's own number.
    unsafe { place.read() }
}

pub(crate) fn set_errno(errno: c_int) {
    // SAFETY: takes nothing, returns where the calling thread's number is.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: the calling thread's own number.
    unsafe { place.write(errno) };
}

/// Goes through the lines of a file. Those longer than the buffer are cut.
pub(crate) fn lines(file: &File, buffer: &mut [u8], mut line_fn: impl FnMut(&[u8]) -> ControlFlow<()>) {
    let mut filled = 0;
    loop {
        let read = buffer.get_mut(filled..).map_or(0, |rest| file.read(rest));
        filled += read;
        let mut begin = 0;
        while let Some(len) = buffer[begin..filled].iter().position(|&byte| byte == b'\n') {
            if line_fn(&buffer[begin..begin + len]).is_break() {
                return;
            }
            begin += len + 1;
        }
        if read == 0 {
            return;
        }
        if begin == 0 && filled == buffer.len() {
            filled = 0;
        } else {
            buffer.copy_within(begin..filled, 0);
            filled -= begin;
        }
    }
}
