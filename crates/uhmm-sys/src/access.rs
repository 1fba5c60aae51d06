//! The program's memory as a system call reaches it: obeying the mapping's protection, raising page faults that are
//! served, and answering an error where there is nothing, never a signal.
//!
//! Also the calls by which the engine changes the program's mappings. They are safe to call by the argument of
//! [`crate::uffd`]'s *Trust*: the engine's own Rust objects are refused with `EINVAL`, and elsewhere the engine
//! answers for the content.
//!
//! # Kernel
//! `process_vm_readv(2)` and `process_vm_writev(2)` on the process itself. They pin a page while they copy: a
//! `UFFDIO_MOVE` of the same page answers `EBUSY` meanwhile.
// UNSAFETY: copies between addresses, and calls that change mappings.

use std::os::fd::{AsFd, OwnedFd};

use crate::{
    Errno,
    addr::{PageRange, VirtAddr},
    arena,
    maps::Prot,
    mem::{HostBytes, Mapping},
    probe::{self, Cap},
    raw,
};

pub use crate::uffd::Copied;

/// The most that one system call moves; longer copies take several.
const CHUNK: u64 = 1 << 30;

#[derive(Clone, Copy)]
enum Direction {
    FromProgram,
    ToProgram,
}

/// Copies between `local` and `remote` until all is done or a page answers an error. Progress is whole pages of
/// `remote`, but at its ends.
///
/// # Safety
/// `local..local + len` is the caller's: readable for `ToProgram`, writable and unborrowed for `FromProgram`.
unsafe fn copy(direction: Direction, local: VirtAddr, remote: VirtAddr, len: u64) -> Copied {
    let nr = match direction {
        Direction::FromProgram => libc::SYS_process_vm_readv,
        Direction::ToProgram if arena::touches_typed(remote, len) => return Copied::none(Errno::INVAL),
        Direction::ToProgram => libc::SYS_process_vm_writev,
    };
    let pid = u64::from(raw::getpid());
    let mut done = 0;
    while done < len {
        let part = (len - done).min(CHUNK);
        let [local, remote] = [local, remote].map(|addr| [addr.get().wrapping_add(done), part]);
        let vectors = [raw::ptr_arg(local.as_ptr()), 1, raw::ptr_arg(remote.as_ptr()), 1, 0];
        // SAFETY: each vector is one `iovec` (address and length); the local side is the caller's, and the remote side
        // is reached under the protection of its mapping and, when written, is not the engine's typed memory.
        match unsafe { raw::syscall(nr, [pid, vectors[0], vectors[1], vectors[2], vectors[3], vectors[4]]) } {
            // Short: the next call starts at the page that stopped this one, and says why.
            Ok(n) if n > 0 => done += n,
            Ok(_) => return Copied { done, stop: Some(Errno::FAULT) },
            Err(e) => return Copied { done, stop: Some(e) },
        }
    }
    Copied::all(len)
}

/// Reads the program's memory.
///
/// # Errors
/// In [`Copied::stop`]: `EFAULT`: not mapped, not readable, or a page that cannot be had. `EPERM`, `ENOSYS`: the call is
/// forbidden here (by seccomp).
pub fn read(addr: VirtAddr, buf: &mut [u8]) -> Copied {
    // SAFETY: the local side is `buf`, borrowed exclusively.
    unsafe { copy(Direction::FromProgram, VirtAddr::of(buf.as_mut_ptr()), addr, buf.len() as u64) }
}

/// Writes the program's memory.
///
/// # Errors
/// As [`read`], for writing; `EINVAL`: the engine's own typed memory.
pub fn write(addr: VirtAddr, bytes: &[u8]) -> Copied {
    // SAFETY: the local side is `bytes`, borrowed.
    unsafe { copy(Direction::ToProgram, VirtAddr::of(bytes.as_ptr()), addr, bytes.len() as u64) }
}

/// Reads the program's memory into staging memory.
///
/// # Errors
/// As [`read`].
pub fn read_to_host(addr: VirtAddr, host: HostBytes) -> Copied {
    // SAFETY: the local side is untyped memory that stays mapped.
    unsafe { copy(Direction::FromProgram, host.addr(), addr, host.len()) }
}

/// Writes staging memory to the program's.
///
/// # Errors
/// As [`write`].
pub fn write_from_host(addr: VirtAddr, host: HostBytes) -> Copied {
    // SAFETY: the local side is untyped memory that stays mapped.
    unsafe { copy(Direction::ToProgram, host.addr(), addr, host.len()) }
}

/// Reads `len` bytes of the program's memory to `off` of a mapping.
///
/// # Errors
/// As [`read`].
///
/// # Panics
/// If they do not fit.
#[track_caller]
pub fn read_to_mapping(addr: VirtAddr, mapping: &Mapping, off: u64, len: u64) -> Copied {
    let local = within(mapping, off, len);
    // SAFETY: the local side is untyped memory, mapped while `mapping` is borrowed.
    unsafe { copy(Direction::FromProgram, local, addr, len) }
}

/// Writes `len` bytes at `off` of a mapping to the program's memory.
///
/// # Errors
/// As [`write`].
///
/// # Panics
/// If the mapping does not hold them.
#[track_caller]
pub fn write_from_mapping(addr: VirtAddr, mapping: &Mapping, off: u64, len: u64) -> Copied {
    let local = within(mapping, off, len);
    // SAFETY: the local side is untyped memory, mapped while `mapping` is borrowed.
    unsafe { copy(Direction::ToProgram, local, addr, len) }
}

#[track_caller]
fn within(mapping: &Mapping, off: u64, len: u64) -> VirtAddr {
    let fits = off.checked_add(len).is_some_and(|end| end <= mapping.len());
    assert!(fits, "bytes {off:#x}+{len:#x} of {:#x}: out of range", mapping.len());
    mapping.range().start().add(off)
}

/// Reads the program's memory without ever waiting for a page of it: a page that a userfaultfd would have to bring
/// answers an error. For whoever must not wait, because it is he who brings pages.
///
/// # Kernel
/// `/proc/self/mem`, read only. Ignores protection.
#[derive(Debug)]
pub struct UnwaitingReader(OwnedFd);

impl UnwaitingReader {
    /// Opens it.
    ///
    /// # Errors
    /// What opening `/proc/self/mem` answers: `EACCES` in a process that is not dumpable.
    pub fn open() -> Result<Self, Errno> {
        raw::open(c"/proc/self/mem", libc::O_RDONLY).map(Self)
    }

    /// Reads the program's memory into staging memory.
    ///
    /// # Errors
    /// In [`Copied::stop`]: `EIO`: not mapped, or a page that is missing in memory registered for missing faults.
    pub fn read_to_host(&self, addr: VirtAddr, host: HostBytes) -> Copied {
        let mut done = 0;
        while done < host.len() {
            let args = [raw::fd_arg(self.0.as_fd()), host.addr().get() + done, host.len() - done, addr.get() + done];
            // SAFETY: the kernel writes to untyped memory that stays mapped.
            match unsafe { raw::syscall(libc::SYS_pread64, args) } {
                Ok(n) if n > 0 => done += n,
                Ok(_) => return Copied { done, stop: Some(Errno::IO) },
                Err(e) => return Copied { done, stop: Some(e) },
            }
        }
        Copied::all(host.len())
    }
}

/// Faults the pages of `range` in for reading, as a load would.
///
/// # Errors
/// `ENOMEM`: part of it is not mapped, or no memory. `EFAULT`: a page that a touch would answer with `SIGBUS`. `EINVAL`:
/// protection, a mapping of the wrong kind, or a kernel before 5.14. `EHWPOISON`.
///
/// # Kernel
/// `madvise(2)` with `MADV_POPULATE_READ`.
pub fn populate_read(range: PageRange) -> Result<(), Errno> {
    populate(range, libc::MADV_POPULATE_READ)
}

/// Faults the pages of `range` in for writing, as a store would, but changes no bytes. Breaks sharing after a fork.
///
/// # Errors
/// As [`populate_read`].
///
/// # Kernel
/// `madvise(2)` with `MADV_POPULATE_WRITE`.
pub fn populate_write(range: PageRange) -> Result<(), Errno> {
    populate(range, libc::MADV_POPULATE_WRITE)
}

/// A masked advice ([`probe::mask`]) is unknown, as to an old kernel.
fn populate(range: PageRange, advice: i32) -> Result<(), Errno> {
    if probe::masked(Cap::Populate) {
        return Err(Errno::INVAL);
    }
    // SAFETY: as a load, or as a store that changes no bytes.
    unsafe { raw::madvise(range, advice) }
}

/// Drops the pages of `range`. Private anonymous memory is a hole afterwards. Pages of `mlock`ed memory too.
///
/// # Errors
/// `EINVAL`: memory that cannot be dropped (or is the engine's own typed memory). `EPERM`: sealed. `ENOMEM`: part of it is
/// not mapped; the rest is done.
///
/// # Kernel
/// `madvise(2)` with `MADV_DONTNEED`, then `MADV_DONTNEED_LOCKED` (Linux 5.18). Where the range is registered for remove
/// events, one is sent first and must be read by another thread.
pub fn zap(range: PageRange) -> Result<(), Errno> {
    if arena::touches_typed(range.start(), range.bytes()) {
        return Err(Errno::INVAL);
    }
    // SAFETY: not the engine's Rust objects; elsewhere the engine answers for the content (see Trust in `uffd`).
    match unsafe { raw::madvise(range, libc::MADV_DONTNEED) } {
        // SAFETY: as above.
        Err(Errno::INVAL) => unsafe { raw::madvise(range, libc::MADV_DONTNEED_LOCKED) },
        done => done,
    }
}

/// Changes the protection of `range`.
///
/// # Errors
/// `ENOMEM`: part of it is not mapped, or too many VMAs. `EACCES`: a file that does not allow it. `EPERM`: sealed.
/// `EINVAL`: the engine's own typed memory.
///
/// # Kernel
/// `mprotect(2)`.
pub fn protect(range: PageRange, prot: Prot) -> Result<(), Errno> {
    if arena::touches_typed(range.start(), range.bytes()) {
        return Err(Errno::INVAL);
    }
    let mut flags = libc::PROT_NONE;
    for (bit, flag) in [(Prot::READ, libc::PROT_READ), (Prot::WRITE, libc::PROT_WRITE), (Prot::EXEC, libc::PROT_EXEC)] {
        if prot.contains(bit) {
            flags |= flag;
        }
    }
    // SAFETY: not the engine's Rust objects; a touch against the new protection is a signal, not a wrong value.
    unsafe { raw::mprotect(range, flags) }
}

/// Takes the pages of `from` out of their mapping, as they are, and puts them at `to`, in memory of [`arena::pages`] or the
/// other way round. The mapping at `from` stays, as a hole; what was at `to` is gone, and the mapping there is afterwards
/// what the one at `from` is. Atomic: no other thread sees a page in both places or in neither while it has its bytes.
///
/// # Errors
/// `EFAULT`: `from` is not within one mapping. `EINVAL`: memory that cannot be lifted, the engine's own typed memory,
/// or a kernel before 5.7. `ENOMEM`: too many mappings, or too much memory. `EPERM`: sealed.
///
/// # Kernel
/// `mremap(2)` with `MREMAP_DONTUNMAP`. A mapping that was locked is not afterwards (see [`is_locked`]). Registered memory
/// raises a remap event, and where `to` was registered an unmap event, which must be read by another thread.
pub fn lift(from: PageRange, to: PageRange) -> Result<(), Errno> {
    let typed = [from, to].iter().any(|r| arena::touches_typed(r.start(), r.bytes()));
    let own = [from, to].iter().filter(|r| arena::is_untyped(r.start(), r.bytes())).count();
    if typed || own != 1 || from.bytes() != to.bytes() {
        return Err(Errno::INVAL);
    }
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    let args = [from.start().get(), from.bytes(), to.bytes(), raw::arg(flags), to.start().get()];
    // SAFETY: one side is untyped memory of the arena, into which no reference leads. On the other, which is not the
    // engine's, the caller answers for the content (see Trust in `uffd`), as for `UFFDIO_MOVE`.
    unsafe { raw::syscall(libc::SYS_mremap, args) }.map(drop)
}

/// Makes `range`, memory of [`arena::pages`], fresh: no page in it, no registration, a mapping as any other.
///
/// # Errors
/// `EINVAL`: not such memory. `ENOMEM`: too many mappings.
///
/// # Kernel
/// `mmap(2)` with `MAP_FIXED`. Registered memory raises an unmap event.
pub fn renew(range: PageRange) -> Result<(), Errno> {
    if !arena::is_untyped(range.start(), range.bytes()) {
        return Err(Errno::INVAL);
    }
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let flags = flags | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let args = [range.start().get(), range.bytes(), raw::arg(prot), raw::arg(flags), raw::arg(-1), 0];
    // SAFETY: untyped memory of the arena, into which no reference leads, stays readable and writable.
    unsafe { raw::syscall(libc::SYS_mmap, args) }?;
    // SAFETY: changes no bytes. See `arena::reserve`.
    unsafe { raw::syscall(libc::SYS_munlock, [range.start().get(), range.bytes()]) }?;
    // After `mlockall` with `MCL_FUTURE` it was filled at once.
    zap(range)
}

/// Makes a mapping of `range`, memory of [`arena::pages`], that counts as locked, so that `UFFDIO_MOVE` takes pages of
/// locked memory to it. Nothing in it is brought into RAM for that.
///
/// # Errors
/// `EINVAL`: not such memory. `ENOMEM`, `EPERM`: the limit of locked memory (`RLIMIT_MEMLOCK`).
///
/// # Kernel
/// `mlock2(2)` with `MLOCK_ONFAULT`.
pub fn lock_on_fault(range: PageRange) -> Result<(), Errno> {
    if !arena::is_untyped(range.start(), range.bytes()) {
        return Err(Errno::INVAL);
    }
    let onfault = u64::from(libc::MLOCK_ONFAULT);
    // SAFETY: changes no bytes.
    unsafe { raw::syscall(libc::SYS_mlock2, [range.start().get(), range.bytes(), onfault]) }.map(drop)
}

/// Whether part of `range` is locked (`mlock(2)`).
///
/// # Kernel
/// `msync(2)` with `MS_INVALIDATE`, which does nothing to anonymous memory but say so.
#[must_use]
pub fn is_locked(range: PageRange) -> bool {
    let args = [range.start().get(), range.bytes(), raw::arg(libc::MS_INVALIDATE)];
    // SAFETY: changes no bytes.
    let answer = unsafe { raw::syscall(libc::SYS_msync, args) };
    answer == Err(Errno::BUSY)
}
