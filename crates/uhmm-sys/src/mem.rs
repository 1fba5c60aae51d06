//! Memory that is only bytes: the engine's staging memory, device memory, and memory shared between processes.
//!
//! [`HostBytes`] and [`Mapping`] name *untyped* memory. No reference ever leads into it; bytes are copied in and out
//! through raw pointers, and numbers in it are changed by atomic instructions.
//!
//! # Soundness
//! 1. The memory is always mapped, readable and writable: a `HostBytes` is checked against what
//!    [`crate::arena::pages`] handed out, which is never unmapped, and a `Mapping` unmaps when dropped, which borrows
//!    forbid while it is used.
//! 2. It holds no Rust object, so nothing that is copied over it can break an invariant of a type.
//! 3. Other threads, other processes and the kernel may change it during a copy. Then the bytes copied are a mixture of
//!    old and new; every such mixture is a valid `[u8]`. The engine orders copies by its page states; nobody relies on
//!    the mixture. Copies are made by `memmove`, a function of the C library beyond the optimiser's sight.
//! 4. A file behind a `Mapping` that somebody cuts short answers a touch with `SIGBUS`: the process ends, but nothing
//!    unsound happens. Memory made by [`Mapping::memfd`] is sealed against that.
// UNSAFETY: raw copies and atomics on memory without type.

use std::{
    ffi::CString,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{
        AtomicU32, AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
};

use crate::{
    Errno,
    addr::{PAGE_SIZE, PageRange, VirtAddr},
    arena::{self, AnyBits, Zeroed},
    raw, space,
};

/// What an atomic operation does with the number it finds and its operand. All are unsigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AtomicOp {
    /// Wrapping sum.
    Add,
    /// Bitwise and.
    And,
    /// Bitwise or.
    Or,
    /// Bitwise exclusive or.
    Xor,
    /// The lesser.
    Min,
    /// The greater.
    Max,
    /// The operand.
    Swap,
}

/// Untyped memory, with the operations that [`HostBytes`] and [`Mapping`] share.
///
/// # Invariants
/// `addr..addr + len` is mapped, readable and writable as long as the span exists, and no Rust reference leads into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    addr: VirtAddr,
    len: u64,
}

impl Span {
    /// The part `off..off + len`.
    #[track_caller]
    fn part(self, off: u64, len: u64) -> Self {
        let fits = off.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(fits, "bytes {off:#x}+{len:#x} of {:#x}: out of range", self.len);
        // INVARIANT: a part of what is mapped is mapped.
        Self { addr: self.addr.add(off), len }
    }

    fn ptr(self) -> *mut u8 {
        raw::ptr(self.addr)
    }

    fn len(self) -> usize {
        raw::index(self.len)
    }

    fn read(self, buf: &mut [u8]) {
        assert!(buf.len() == self.len(), "read of another length");
        // SAFETY: `self` is mapped and readable by its invariant, `buf` is as long; no span overlaps a Rust object.
        unsafe { std::ptr::copy_nonoverlapping(self.ptr(), buf.as_mut_ptr(), buf.len()) };
    }

    fn write(self, bytes: &[u8]) {
        assert!(bytes.len() == self.len(), "write of another length");
        // SAFETY: `self` is mapped and writable by its invariant, `bytes` is as long; no span overlaps a Rust object.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.ptr(), bytes.len()) };
    }

    fn copy_to(self, dst: Self) {
        assert!(self.len == dst.len, "copy between different lengths");
        // SAFETY: both are mapped, of the same length, and may overlap, which `copy` allows.
        unsafe { std::ptr::copy(self.ptr(), dst.ptr(), self.len()) };
    }

    fn fill_zero(self) {
        // SAFETY: `self` is mapped and writable by its invariant and holds no Rust object.
        unsafe { std::ptr::write_bytes(self.ptr(), 0, self.len()) };
    }

    #[track_caller]
    fn u32(&self, off: u64) -> &AtomicU32 {
        let place = self.part(off, 4).ptr().cast::<u32>();
        assert!(place.is_aligned(), "atomic operation on an unaligned number");
        // SAFETY: mapped (invariant), aligned (checked), and shared memory is only ever borrowed as an atomic, never
        // as a plain number; the borrow of `self` keeps it mapped.
        unsafe { AtomicU32::from_ptr(place) }
    }

    #[track_caller]
    fn u64(&self, off: u64) -> &AtomicU64 {
        let place = self.part(off, 8).ptr().cast::<u64>();
        assert!(place.is_aligned(), "atomic operation on an unaligned number");
        // SAFETY: as in `u32`.
        unsafe { AtomicU64::from_ptr(place) }
    }

    #[track_caller]
    fn rmw_u32(&self, off: u64, op: AtomicOp, operand: u32) -> u32 {
        let place = self.u32(off);
        match op {
            AtomicOp::Add => place.fetch_add(operand, SeqCst),
            AtomicOp::And => place.fetch_and(operand, SeqCst),
            AtomicOp::Or => place.fetch_or(operand, SeqCst),
            AtomicOp::Xor => place.fetch_xor(operand, SeqCst),
            AtomicOp::Min => place.fetch_min(operand, SeqCst),
            AtomicOp::Max => place.fetch_max(operand, SeqCst),
            AtomicOp::Swap => place.swap(operand, SeqCst),
        }
    }

    #[track_caller]
    fn rmw_u64(&self, off: u64, op: AtomicOp, operand: u64) -> u64 {
        let place = self.u64(off);
        match op {
            AtomicOp::Add => place.fetch_add(operand, SeqCst),
            AtomicOp::And => place.fetch_and(operand, SeqCst),
            AtomicOp::Or => place.fetch_or(operand, SeqCst),
            AtomicOp::Xor => place.fetch_xor(operand, SeqCst),
            AtomicOp::Min => place.fetch_min(operand, SeqCst),
            AtomicOp::Max => place.fetch_max(operand, SeqCst),
            AtomicOp::Swap => place.swap(operand, SeqCst),
        }
    }
}

/// The access methods that both kinds of memory have, through their `span()`.
macro_rules! untyped_access {
    () => {
        /// Copies `buf.len()` bytes at `off` into `buf`.
        ///
        /// # Panics
        /// If they are out of range.
        #[track_caller]
        pub fn read(&self, off: u64, buf: &mut [u8]) {
            self.span().part(off, buf.len() as u64).read(buf);
        }

        /// Copies `bytes` to `off`.
        ///
        /// # Panics
        /// If they do not fit.
        #[track_caller]
        pub fn write(&self, off: u64, bytes: &[u8]) {
            self.span().part(off, bytes.len() as u64).write(bytes);
        }

        /// The number at `off`; a relaxed load.
        ///
        /// # Panics
        /// If it is out of range or not aligned.
        #[must_use]
        #[track_caller]
        pub fn load_u32(&self, off: u64) -> u32 {
            self.span().u32(off).load(Relaxed)
        }

        /// The number at `off`; a relaxed load.
        ///
        /// # Panics
        /// If it is out of range or not aligned.
        #[must_use]
        #[track_caller]
        pub fn load_u64(&self, off: u64) -> u64 {
            self.span().u64(off).load(Relaxed)
        }

        /// Puts a number at `off`; a relaxed store.
        ///
        /// # Panics
        /// If it is out of range or not aligned.
        #[track_caller]
        pub fn store_u32(&self, off: u64, n: u32) {
            self.span().u32(off).store(n, Relaxed);
        }

        /// Puts a number at `off`; a relaxed store.
        ///
        /// # Panics
        /// If it is out of range or not aligned.
        #[track_caller]
        pub fn store_u64(&self, off: u64, n: u64) {
            self.span().u64(off).store(n, Relaxed);
        }

        /// Changes the number at `off` by one atomic instruction, sequentially consistent, and returns what was there.
        ///
        /// # Panics
        /// If it is out of range or not aligned.
        #[track_caller]
        pub fn rmw_u32(&self, off: u64, op: AtomicOp, operand: u32) -> u32 {
            self.span().rmw_u32(off, op, operand)
        }

        /// As the 32-bit form.
        ///
        /// # Panics
        /// If it is out of range or not aligned.
        #[track_caller]
        pub fn rmw_u64(&self, off: u64, op: AtomicOp, operand: u64) -> u64 {
            self.span().rmw_u64(off, op, operand)
        }

        /// Replaces `expected` at `off` by `new`, sequentially consistent.
        ///
        /// # Errors
        /// What was there instead.
        ///
        /// # Panics
        /// If it is out of range or not aligned.
        #[track_caller]
        pub fn cas_u32(&self, off: u64, expected: u32, new: u32) -> Result<u32, u32> {
            self.span().u32(off).compare_exchange(expected, new, SeqCst, SeqCst)
        }

        /// As the 32-bit form.
        ///
        /// # Errors
        /// What was there instead.
        ///
        /// # Panics
        /// If it is out of range or not aligned.
        #[track_caller]
        pub fn cas_u64(&self, off: u64, expected: u64, new: u64) -> Result<u64, u64> {
            self.span().u64(off).compare_exchange(expected, new, SeqCst, SeqCst)
        }
    };
}

/// Bytes of the engine's untyped arena memory: a name for them, cheap to copy, never a reference.
///
/// # Invariants
/// They lie in what [`arena::pages`] handed out, so they stay mapped, readable and writable for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostBytes(Span);

impl HostBytes {
    /// The bytes `start..start + len`, if all of them lie in memory that [`arena::pages`] handed out.
    #[must_use]
    pub fn in_arena(start: VirtAddr, len: u64) -> Option<Self> {
        // INVARIANT: checked here.
        arena::is_untyped(start, len).then_some(Self(Span { addr: start, len }))
    }

    /// Where they are.
    #[must_use]
    pub const fn addr(&self) -> VirtAddr {
        self.0.addr
    }

    /// How many.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.0.len
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// `len` of the bytes, from `off` on.
    ///
    /// # Panics
    /// If they are out of range.
    #[must_use]
    #[track_caller]
    pub fn slice(&self, off: u64, len: u64) -> Self {
        Self(self.0.part(off, len))
    }

    /// Copies all of the bytes to `dst_off` of `dst`.
    ///
    /// # Panics
    /// If they do not fit.
    #[track_caller]
    pub fn copy_to(&self, dst: &Mapping, dst_off: u64) {
        self.0.copy_to(dst.span().part(dst_off, self.0.len));
    }

    /// Fills all of the bytes from `src_off` of `src`.
    ///
    /// # Panics
    /// If `src` does not hold as many.
    #[track_caller]
    pub fn copy_from(&self, src: &Mapping, src_off: u64) {
        src.span().part(src_off, self.0.len).copy_to(self.0);
    }

    /// Copies `src` to `dst`, which may overlap.
    ///
    /// # Panics
    /// If their lengths differ.
    #[track_caller]
    pub fn copy_between(src: Self, dst: Self) {
        src.0.copy_to(dst.0);
    }

    /// Makes all of the bytes zero.
    pub fn fill_zero(&self) {
        self.0.fill_zero();
    }

    const fn span(&self) -> &Span {
        &self.0
    }

    untyped_access!();
}

/// Device memory: a shared mapping of a memory file or another file, unmapped when dropped.
///
/// A forked child sees the same memory. The addresses are those of [`crate::space`].
#[derive(Debug)]
pub struct Mapping {
    /// # Invariants
    /// The whole of a mapping that this value owns.
    span: Span,
    fd: OwnedFd,
}

impl Mapping {
    /// Makes `len` bytes of zeroed shared memory. `name` shows in `/proc/self/maps`.
    ///
    /// # Errors
    /// `EINVAL`: `len` is zero or not whole pages, or `name` is too long or holds a NUL. `ENOMEM`, `EMFILE`, `ENFILE`.
    ///
    /// # Kernel
    /// `memfd_create(2)`, sealed against changes of size; `mmap(2)`. Needs no privilege.
    pub fn memfd(name: &str, len: u64) -> Result<Self, Errno> {
        let name = CString::new(name).map_err(|_| Errno::INVAL)?;
        let flags = u64::from(libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        // SAFETY: the kernel reads the NUL-terminated name and nothing else.
        let fd = unsafe { raw::syscall(libc::SYS_memfd_create, [raw::ptr_arg(name.as_ptr()), flags]) }?;
        // SAFETY: `memfd_create` succeeded, so `fd` is new.
        let fd = unsafe { raw::take_fd(fd) };
        // SAFETY: changes the size of a file that nobody has mapped.
        unsafe { raw::syscall(libc::SYS_ftruncate, [raw::fd_arg(fd.as_fd()), len]) }?;
        let seals = raw::arg(libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL);
        // SAFETY: touches no memory.
        unsafe { raw::syscall(libc::SYS_fcntl, [raw::fd_arg(fd.as_fd()), raw::arg(libc::F_ADD_SEALS), seals]) }?;
        Self::from_fd(fd, len)
    }

    /// Maps the first `len` bytes of a file.
    ///
    /// # Errors
    /// `EINVAL`: `len` is zero or not whole pages, or the file is shorter. `EACCES`: not open for reading and writing.
    /// `ENODEV`: cannot be mapped. `ENOMEM`.
    ///
    /// # Kernel
    /// `mmap(2)` with `MAP_SHARED`.
    pub fn from_fd(fd: OwnedFd, len: u64) -> Result<Self, Errno> {
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) {
            return Err(Errno::INVAL);
        }
        check_length(fd.as_fd(), len)?;
        let addr = space::map_shared(len, Some(fd.as_fd()), 0)?;
        // INVARIANT: just mapped, readable and writable, unknown to anybody else.
        Ok(Self { span: Span { addr, len }, fd })
    }

    /// The addresses.
    #[must_use]
    pub fn range(&self) -> PageRange {
        PageRange::new(self.span.addr, self.span.len).expect("a mapping is a range")
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.span.len
    }

    /// Never true: a mapping is not empty.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.span.len == 0
    }

    /// Copies `len` bytes at `off` to `dst_off` of `dst`, which may be the same mapping; ranges may overlap.
    ///
    /// # Panics
    /// If either is out of range.
    #[track_caller]
    pub fn copy(&self, off: u64, dst: &Mapping, dst_off: u64, len: u64) {
        self.span.part(off, len).copy_to(dst.span.part(dst_off, len));
    }

    /// Makes `len` bytes at `off` zero. The memory stays allocated: see [`Mapping::punch`].
    ///
    /// # Panics
    /// If they are out of range.
    #[track_caller]
    pub fn zero(&self, off: u64, len: u64) {
        self.span.part(off, len).fill_zero();
    }

    /// Gives the memory behind `off..off + len` back; it reads as zero afterwards.
    ///
    /// Needs no file descriptor, so that it works on threads that do not have it.
    ///
    /// # Errors
    /// `EOPNOTSUPP`, `EINVAL`: the file cannot have holes; its bytes are unchanged.
    ///
    /// # Panics
    /// If the bytes are out of range, or not whole pages.
    ///
    /// # Kernel
    /// `madvise(2)` with `MADV_REMOVE`.
    #[track_caller]
    pub fn punch(&self, off: u64, len: u64) -> Result<(), Errno> {
        let part = self.span.part(off, len);
        if part.len == 0 {
            return Ok(());
        }
        let range = PageRange::new(part.addr, part.len).expect("holes are whole pages");
        // SAFETY: untyped memory of this mapping, which no reference leads into.
        unsafe { raw::madvise(range, libc::MADV_REMOVE) }
    }

    /// Asks for huge pages behind the mapping; a kernel or file that has none is no error.
    pub fn advise_huge(&self) {
        // SAFETY: the advice changes no bytes.
        let _ = unsafe { raw::madvise(self.range(), libc::MADV_HUGEPAGE) };
    }

    const fn span(&self) -> &Span {
        &self.span
    }

    untyped_access!();
}

impl AsFd for Mapping {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and borrows of it have ended.
        let done = unsafe { space::unmap(self.span.addr, self.span.len) };
        debug_assert!(done.is_ok(), "munmap of an own mapping: {done:?}");
    }
}

/// Refuses a regular file that is shorter than `len`: touching what is past its end would kill the process. Devices
/// have no length; their driver answers `mmap`.
fn check_length(fd: BorrowedFd<'_>, len: u64) -> Result<(), Errno> {
    let stat = rustix::fs::fstat(fd)?;
    let regular = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile;
    let short = u64::try_from(stat.st_size).map_or(true, |size| size < len);
    if regular && short { Err(Errno::INVAL) } else { Ok(()) }
}

/// A slice of `len` zero values in memory that this process and the children it forks later see alike. Never unmapped.
///
/// For control data of device memory that outlives a fork. Page aligned.
///
/// # Errors
/// `ENOMEM`; `EINVAL` where `len` is zero.
///
/// # Kernel
/// `mmap(2)` with `MAP_SHARED | MAP_ANONYMOUS`.
pub fn shared_slice<T: Zeroed>(len: usize) -> Result<&'static [T], Errno> {
    let bytes = bytes_of::<T>(len)?.checked_next_multiple_of(PAGE_SIZE).ok_or(Errno::NOMEM)?;
    let addr = space::map_shared(bytes, None, 0)?;
    // SAFETY: fresh zero pages, mapped for ever, aligned to a page, at least `len` values long; zero is a valid `T`
    // by the contract of `Zeroed`, and another process changes them by the same code: atomically.
    Ok(unsafe { std::slice::from_raw_parts(raw::ptr(addr).cast::<T>(), len) })
}

/// A slice of `len` values in a file, from the page-aligned `offset` on. Never unmapped.
///
/// All processes that map the file must change it by atomic operations only; they are part of the trusted base.
///
/// # Errors
/// `EINVAL`: the file is shorter, `len` is zero, or `offset` is not page aligned. Otherwise as [`Mapping::from_fd`].
pub fn shared_slice_from_fd<T: AnyBits>(fd: BorrowedFd<'_>, offset: u64, len: usize) -> Result<&'static [T], Errno> {
    let bytes = bytes_of::<T>(len)?;
    check_length(fd, offset.checked_add(bytes).ok_or(Errno::INVAL)?)?;
    let addr = raw::mmap(bytes, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, Some(fd), offset)?;
    // SAFETY: mapped for ever, aligned to a page, at least `len` values long; any bytes are a valid `T` by the
    // contract of `AnyBits`, and the documented rule for the file is that it is changed atomically.
    Ok(unsafe { std::slice::from_raw_parts(raw::ptr(addr).cast::<T>(), len) })
}

fn bytes_of<T>(len: usize) -> Result<u64, Errno> {
    const { assert!(align_of::<T>() <= 4096, "a mapping is aligned to pages only") };
    let bytes = (len as u64).checked_mul(size_of::<T>() as u64).ok_or(Errno::NOMEM)?;
    if bytes == 0 { Err(Errno::INVAL) } else { Ok(bytes) }
}
