//! userfaultfd: being told of page faults and of changes to the address space, and putting pages in place.
//!
//! # Trust
//! The functions here change the memory of the process by address, and are safe to call all the same. Two arguments
//! carry that:
//! 1. The engine's own Rust objects cannot be reached: every range that touches the typed part of the
//!    [arena](crate::arena) is refused with `EINVAL`.
//! 2. Elsewhere the memory is the program's, and the owner of the [`Uffd`] is responsible for its content. `copy`,
//!    `zeropage`, `move_pages` and `poison` fill holes, and never replace a page that exists. `move_pages` takes pages
//!    out of its source: that is either program memory, registered with this userfaultfd, whose next touch is served by
//!    its owner with the same bytes, or untyped staging memory. To the program's compiler a page that comes back
//!    with the same bytes was never away.
//!
//! So soundness of the whole rests on the engine giving back what it took, which is its promise number one; the crate
//! that calls these functions needs no `unsafe`, but it is part of what must be trusted.
//!
//! # Kernel
//! `userfaultfd(2)`, `ioctl_userfaultfd(2)`, `fs/userfaultfd.c`. While an event (fork, remap, remove, unmap) waits to be
//! read, calls that fill or protect answer `EAGAIN`: drain events before retrying.
//!
//! Not supported: minor faults, hugetlbfs, `SIGBUS` mode. The engine manages private anonymous memory only.
// UNSAFETY: ioctls that change the process's memory, and the messages that the kernel fills in.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use bitflags::bitflags;
use thiserror::Error;

use crate::{
    Errno,
    addr::{PageRange, VirtAddr},
    arena,
    probe::{self, Cap},
    raw,
};

bitflags! {
    /// What a userfaultfd can do. Bits without a name are kept.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Features: u64 {
        /// Write-protect faults.
        const FAULT_WP = 1 << 0;
        /// A message for each fork, with a userfaultfd for the child. Needs `CAP_SYS_PTRACE`.
        const EVENT_FORK = 1 << 1;
        /// A message after `mremap` moved registered memory.
        const EVENT_REMAP = 1 << 2;
        /// A message before `madvise` drops pages.
        const EVENT_REMOVE = 1 << 3;
        /// Missing faults on hugetlbfs.
        const MISSING_HUGETLBFS = 1 << 4;
        /// Missing faults on shared memory.
        const MISSING_SHMEM = 1 << 5;
        /// A message after `munmap`.
        const EVENT_UNMAP = 1 << 6;
        /// `SIGBUS` instead of a message.
        const SIGBUS = 1 << 7;
        /// Fault messages name the thread.
        const THREAD_ID = 1 << 8;
        /// Minor faults on hugetlbfs.
        const MINOR_HUGETLBFS = 1 << 9;
        /// Minor faults on shared memory.
        const MINOR_SHMEM = 1 << 10;
        /// Fault messages carry the address itself, not its page.
        const EXACT_ADDRESS = 1 << 11;
        /// Write protection on hugetlbfs and shared memory.
        const WP_HUGETLBFS_SHMEM = 1 << 12;
        /// Write-protecting a hole leaves a marker.
        const WP_UNPOPULATED = 1 << 13;
        /// `UFFDIO_POISON`.
        const POISON = 1 << 14;
        /// Write protection that the kernel lifts itself.
        const WP_ASYNC = 1 << 15;
        /// `UFFDIO_MOVE`.
        const MOVE = 1 << 16;
        const _ = !0;
    }

    /// Which faults a registered range reports.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct RegisterMode: u64 {
        /// Touches of holes.
        const MISSING = 1 << 0;
        /// Writes to write-protected pages.
        const WP = 1 << 1;
    }
}

/// Whose faults are reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelFaults {
    /// Those of system calls and of the kernel itself too.
    Yes,
    /// Those of user instructions only: a system call on a missing page answers `EFAULT`.
    UserOnly,
}

/// Whether the threads that wait for a page are woken once it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// At once.
    Now,
    /// By [`Uffd::wake`].
    Later,
}

/// Write protection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protect {
    /// Writes fault.
    On,
    /// Writes do not.
    Off,
}

/// What [`Uffd::move_pages`] does about holes in its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SrcHoles {
    /// Stops with `ENOENT`.
    Fail,
    /// Passes over them, leaving a hole in the destination; they count as moved.
    Allow,
}

/// How far an operation on a range got. An error does not undo what was done before it.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copied {
    /// Bytes done, from the start of the range.
    pub done: u64,
    /// Why it stopped there; `None` where all is done. After partial progress the kernel says `EAGAIN` whatever the
    /// reason was: ask again from where it stopped to learn it.
    pub stop: Option<Errno>,
}

impl Copied {
    /// Everything done.
    pub const fn all(bytes: u64) -> Self {
        Self { done: bytes, stop: None }
    }

    /// Nothing done.
    pub const fn none(why: Errno) -> Self {
        Self { done: 0, stop: Some(why) }
    }

    /// Whether all was done.
    #[must_use]
    pub const fn is_all(&self) -> bool {
        self.stop.is_none()
    }

    /// Decodes an `ioctl`'s answer: `field` holds bytes done, or a negative errno that the answer repeats.
    fn decode(answer: Result<u64, Errno>, field: i64, len: u64) -> Self {
        match answer {
            Ok(_) => Self::all(len),
            Err(why) => Self { done: u64::try_from(field).unwrap_or(0), stop: Some(why) },
        }
    }
}

/// Why no userfaultfd could be had. Each variant carries the errno of that way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// No way is open: not for kernel faults, by system call or device file, and not for user faults only.
    #[error("userfaultfd: system call: {syscall}; /dev/userfaultfd: {device}; user mode only: {user_only}")]
    Denied {
        /// What `userfaultfd(2)` answered.
        syscall: Errno,
        /// What opening or using `/dev/userfaultfd` answered.
        device: Errno,
        /// What `userfaultfd(2)` with `UFFD_USER_MODE_ONLY` answered.
        user_only: Errno,
    },
    /// There is a userfaultfd, but the kernel does not speak its interface.
    #[error("userfaultfd: UFFDIO_API: {0}")]
    Api(Errno),
}

/// Kind of access that faulted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultAccess {
    /// A load, or an instruction fetch.
    Read,
    /// A store.
    Write,
}

/// A message of the kernel.
#[derive(Debug)]
pub enum Event {
    /// A thread touched registered memory and waits for [`Uffd::wake`] (or an operation that wakes).
    Fault {
        /// The address, cut down to its page unless `EXACT_ADDRESS` is on.
        addr: VirtAddr,
        /// What it did.
        access: FaultAccess,
        /// The page is there, but write-protected.
        wp: bool,
        /// The thread, where `THREAD_ID` is on.
        tid: Option<u32>,
    },
    /// The process forked. The child's memory is registered with `child` as the parent's is with this userfaultfd.
    Fork {
        /// The child's. Dropping it leaves the child's holes to read as zero.
        child: Uffd,
    },
    /// Registered memory was moved; the page tables have changed already.
    Remap {
        /// Where it was.
        from: VirtAddr,
        /// Where it is.
        to: VirtAddr,
        /// Bytes.
        len: u64,
    },
    /// Pages are about to be dropped; the caller goes on when this message has been read.
    Remove {
        /// First byte.
        start: VirtAddr,
        /// First byte past the end.
        end: VirtAddr,
    },
    /// Memory was unmapped; the page tables have changed already.
    Unmap {
        /// First byte.
        start: VirtAddr,
        /// First byte past the end.
        end: VirtAddr,
    },
}

mod abi {
    //! The kernel's structures and numbers.

    use crate::raw::{ior, iowr};

    #[repr(C)]
    pub(super) struct Api {
        pub api: u64,
        pub features: u64,
        pub ioctls: u64,
    }
    #[repr(C)]
    #[derive(Clone, Copy)]
    pub(super) struct Range {
        pub start: u64,
        pub len: u64,
    }
    #[repr(C)]
    pub(super) struct Register {
        pub range: Range,
        pub mode: u64,
        pub ioctls: u64,
    }
    /// `uffdio_copy` and `uffdio_move`, which have the same shape.
    #[repr(C)]
    pub(super) struct Transfer {
        pub dst: u64,
        pub src: u64,
        pub len: u64,
        pub mode: u64,
        pub done: i64,
    }
    /// `uffdio_zeropage` and `uffdio_poison`, which have the same shape.
    #[repr(C)]
    pub(super) struct Fill {
        pub range: Range,
        pub mode: u64,
        pub done: i64,
    }
    #[repr(C)]
    pub(super) struct WriteProtect {
        pub range: Range,
        pub mode: u64,
    }
    /// `uffd_msg`: four bytes of kind and padding, four of padding, then up to three words by kind.
    #[repr(C)]
    #[derive(Default)]
    pub(super) struct Message {
        pub event: u8,
        pub reserved: [u8; 7],
        pub arg: [u64; 3],
    }
    const _: () = assert!(size_of::<Message>() == 32);

    pub(super) const API: u64 = 0xAA;
    const KIND: u8 = 0xAA;
    pub(super) const IOC_REGISTER: u64 = iowr::<Register>(KIND, 0x00);
    pub(super) const IOC_UNREGISTER: u64 = ior::<Range>(KIND, 0x01);
    pub(super) const IOC_WAKE: u64 = ior::<Range>(KIND, 0x02);
    pub(super) const IOC_COPY: u64 = iowr::<Transfer>(KIND, 0x03);
    pub(super) const IOC_ZEROPAGE: u64 = iowr::<Fill>(KIND, 0x04);
    pub(super) const IOC_MOVE: u64 = iowr::<Transfer>(KIND, 0x05);
    pub(super) const IOC_WRITEPROTECT: u64 = iowr::<WriteProtect>(KIND, 0x06);
    pub(super) const IOC_POISON: u64 = iowr::<Fill>(KIND, 0x08);
    pub(super) const IOC_API: u64 = iowr::<Api>(KIND, 0x3F);
    /// `USERFAULTFD_IOC_NEW`, on the device file.
    pub(super) const IOC_NEW: u64 = 0xAA00;

    pub(super) const USER_MODE_ONLY: i32 = 1;
    /// In the mode of every operation that can wake.
    pub(super) const DONT_WAKE: u64 = 1 << 0;
    pub(super) const COPY_WP: u64 = 1 << 1;
    pub(super) const MOVE_ALLOW_SRC_HOLES: u64 = 1 << 1;
    pub(super) const PROTECT_WP: u64 = 1 << 0;
    pub(super) const PROTECT_DONT_WAKE: u64 = 1 << 1;

    pub(super) const EVENT_FAULT: u8 = 0x12;
    pub(super) const EVENT_FORK: u8 = 0x13;
    pub(super) const EVENT_REMAP: u8 = 0x14;
    pub(super) const EVENT_REMOVE: u8 = 0x15;
    pub(super) const EVENT_UNMAP: u8 = 0x16;
    pub(super) const FAULT_WRITE: u64 = 1 << 0;
    pub(super) const FAULT_WP: u64 = 1 << 1;
}

impl abi::Range {
    fn of(range: PageRange) -> Self {
        Self { start: range.start().get(), len: range.bytes() }
    }
}

/// A userfaultfd of one address space.
///
/// May be used from any number of threads; a message is read by one of them. In a forked child a `Uffd` of the parent
/// still speaks of the parent's memory.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    features: Features,
    kernel_faults: KernelFaults,
}

impl Uffd {
    /// Opens a userfaultfd for this process with those of the `wanted` features that can be had.
    ///
    /// Tries, in this order: `userfaultfd(2)`, `/dev/userfaultfd`, `userfaultfd(2)` with `UFFD_USER_MODE_ONLY`. Without
    /// `CAP_SYS_PTRACE` it goes without `EVENT_FORK`. [`Uffd::features`] and [`Uffd::kernel_faults`] say what it came to.
    /// What [`probe::mask`] hides is not tried.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(wanted: Features) -> Result<Self, OpenError> {
        let (fd, kernel_faults) = Self::new_fd()?;
        // An api call settles the features for good, so the question needs a file of its own.
        let (scratch, _) = Self::new_fd()?;
        let supported = handshake(scratch.as_fd(), Features::empty()).map_err(OpenError::Api)?;
        drop(scratch);
        let mut features = probe::unmasked(wanted).intersection(supported);
        let mut answer = handshake(fd.as_fd(), features);
        if answer == Err(Errno::PERM) && features.contains(Features::EVENT_FORK) {
            features.remove(Features::EVENT_FORK);
            answer = handshake(fd.as_fd(), features);
        }
        answer.map_err(OpenError::Api)?;
        Ok(Self { fd, features, kernel_faults })
    }

    fn new_fd() -> Result<(OwnedFd, KernelFaults), OpenError> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let by_syscall = |flags: i32, caps: [Cap; 2]| {
            if caps.into_iter().any(probe::masked) {
                return Err(Errno::PERM);
            }
            // SAFETY: makes a file descriptor and touches no memory.
            let fd = unsafe { raw::syscall(libc::SYS_userfaultfd, [raw::arg(flags)]) }?;
            // SAFETY: the call succeeded, so `fd` is new.
            Ok(unsafe { raw::take_fd(fd) })
        };
        let by_device = || {
            if probe::masked(Cap::UffdDevice) || probe::masked(Cap::KernelFaults) {
                return Err(Errno::ACCESS);
            }
            let device = raw::open(c"/dev/userfaultfd", libc::O_RDWR)?;
            // SAFETY: this ioctl takes flags, no pointer, and makes a file descriptor.
            let fd =
                unsafe { raw::syscall(libc::SYS_ioctl, [raw::fd_arg(device.as_fd()), abi::IOC_NEW, raw::arg(flags)]) }?;
            // SAFETY: the call succeeded, so `fd` is new.
            Ok(unsafe { raw::take_fd(fd) })
        };
        let syscall = match by_syscall(flags, [Cap::UffdSyscall, Cap::KernelFaults]) {
            Ok(fd) => return Ok((fd, KernelFaults::Yes)),
            Err(e) => e,
        };
        let device = match by_device() {
            Ok(fd) => return Ok((fd, KernelFaults::Yes)),
            Err(e) => e,
        };
        match by_syscall(flags | abi::USER_MODE_ONLY, [Cap::UffdUserOnly; 2]) {
            Ok(fd) => Ok((fd, KernelFaults::UserOnly)),
            Err(user_only) => Err(OpenError::Denied { syscall, device, user_only }),
        }
    }

    /// The features that are on.
    #[must_use]
    pub const fn features(&self) -> Features {
        self.features
    }

    /// Whether faults of system calls are reported too.
    #[must_use]
    pub const fn kernel_faults(&self) -> KernelFaults {
        self.kernel_faults
    }

    /// Asks for faults on `range`. Registering a range again changes its mode.
    ///
    /// # Errors
    /// `EBUSY`: another userfaultfd has part of it. `EINVAL`: part of it is not mapped, cannot be registered, or is the
    /// engine's own typed memory. `ENOMEM`: too many VMAs.
    ///
    /// # Kernel
    /// `UFFDIO_REGISTER`; splits VMAs at the range's ends and merges them with registered neighbours.
    pub fn register(&self, range: PageRange, mode: RegisterMode) -> Result<(), Errno> {
        guard(range.start(), range.bytes())?;
        let mut arg = abi::Register { range: abi::Range::of(range), mode: mode.bits(), ioctls: 0 };
        // SAFETY: the structure of this ioctl; registering changes no bytes.
        unsafe { raw::ioctl(self.as_fd(), abi::IOC_REGISTER, &mut arg) }.map(drop)
    }

    /// Ends faults on `range` and wakes who waits in it. Holes read as zero from now on; so do markers.
    ///
    /// # Errors
    /// `EINVAL`: nothing is mapped at its start, or something that cannot be registered.
    ///
    /// # Kernel
    /// `UFFDIO_UNREGISTER`.
    pub fn unregister(&self, range: PageRange) -> Result<(), Errno> {
        guard(range.start(), range.bytes())?;
        let mut arg = abi::Range::of(range);
        // SAFETY: the structure of this ioctl; that holes read as zero is the owner's business (see Trust above).
        unsafe { raw::ioctl(self.as_fd(), abi::IOC_UNREGISTER, &mut arg) }.map(drop)
    }

    /// Fills holes at `dst` with copies of the pages at `src`, which may be any readable memory.
    ///
    /// With [`Protect::On`] the new pages are write-protected.
    ///
    /// # Errors
    /// In [`Copied::stop`]: `EEXIST`: there is a page already (wake who waits for it). `ENOENT`: not registered, or no
    /// such mapping any more. `EAGAIN`: an event is pending, or partial progress. `ENOMEM`. `EFAULT`: `src` cannot be read.
    /// `ESRCH`: the address space is gone. `EINVAL`: not aligned.
    ///
    /// # Kernel
    /// `UFFDIO_COPY`.
    pub fn copy(&self, dst: VirtAddr, src: VirtAddr, len: u64, wake: Wake, protect: Protect) -> Copied {
        if let Err(e) = guard(dst, len) {
            return Copied::none(e);
        }
        let wp = if protect == Protect::On { abi::COPY_WP } else { 0 };
        let mut arg = abi::Transfer { dst: dst.get(), src: src.get(), len, mode: dont_wake(wake) | wp, done: 0 };
        // SAFETY: the structure of this ioctl; it reads `src` by itself, and fills only holes (see Trust above).
        let answer = unsafe { raw::ioctl(self.as_fd(), abi::IOC_COPY, &mut arg) };
        Copied::decode(answer, arg.done, len)
    }

    /// Fills holes with the zero page.
    ///
    /// # Errors
    /// As [`Uffd::copy`].
    ///
    /// # Kernel
    /// `UFFDIO_ZEROPAGE`.
    pub fn zeropage(&self, range: PageRange, wake: Wake) -> Copied {
        self.fill(abi::IOC_ZEROPAGE, range, wake)
    }

    /// Whether the address space has changed, or is about to, in a way of which the event was not read yet. What fills
    /// holes answers `EAGAIN` then; registering does not, and would be done to memory that is not what the caller takes
    /// it for.
    #[must_use]
    pub fn is_changing(&self) -> bool {
        let mut arg = abi::Fill { range: abi::Range { start: 0, len: 0 }, mode: 0, done: 0 };
        // An empty range is refused, but not before the kernel has looked at this.
        // SAFETY: the structure of this ioctl, which fills nothing here.
        let answer = unsafe { raw::ioctl(self.as_fd(), abi::IOC_ZEROPAGE, &mut arg) };
        answer == Err(Errno::AGAIN)
    }

    /// Makes a touch of the holes of `range` raise `SIGBUS` (`EHWPOISON` in system calls) from now on.
    ///
    /// # Errors
    /// As [`Uffd::copy`]; `EINVAL` too on a kernel without it.
    ///
    /// # Kernel
    /// `UFFDIO_POISON`, from Linux 6.6.
    pub fn poison(&self, range: PageRange, wake: Wake) -> Copied {
        self.fill(abi::IOC_POISON, range, wake)
    }

    fn fill(&self, request: u64, range: PageRange, wake: Wake) -> Copied {
        if let Err(e) = guard(range.start(), range.bytes()) {
            return Copied::none(e);
        }
        let mut arg = abi::Fill { range: abi::Range::of(range), mode: dont_wake(wake), done: 0 };
        // SAFETY: the structure of both ioctls; they fill only holes (see Trust above).
        let answer = unsafe { raw::ioctl(self.as_fd(), request, &mut arg) };
        Copied::decode(answer, arg.done, range.bytes())
    }

    /// Moves pages from `src` to holes at `dst` without copying them. Both are private anonymous memory of this
    /// process with the same protection and `mlock` state; `dst` is registered.
    ///
    /// # Errors
    /// In [`Copied::stop`]: `EEXIST`: a page at `dst`. `ENOENT`: a hole at `src` (with [`SrcHoles::Fail`]), or no such
    /// mapping. `EBUSY`: a page that is pinned, or shared since a fork. `EAGAIN`: an event is pending, partial
    /// progress, or a page locked just now. `EINVAL`: memory of the wrong kind, or a kernel without it. `ENOMEM`, `ESRCH`.
    ///
    /// # Kernel
    /// `UFFDIO_MOVE`, from Linux 6.8.
    pub fn move_pages(&self, dst: VirtAddr, src: VirtAddr, len: u64, wake: Wake, holes: SrcHoles) -> Copied {
        if let Err(e) = guard(dst, len).and(guard(src, len)) {
            return Copied::none(e);
        }
        let allow = if holes == SrcHoles::Allow { abi::MOVE_ALLOW_SRC_HOLES } else { 0 };
        let mut arg = abi::Transfer { dst: dst.get(), src: src.get(), len, mode: dont_wake(wake) | allow, done: 0 };
        // SAFETY: the structure of this ioctl; it fills only holes, from pages that their owner gives (see Trust above).
        let answer = unsafe { raw::ioctl(self.as_fd(), abi::IOC_MOVE, &mut arg) };
        Copied::decode(answer, arg.done, len)
    }

    /// Sets or lifts write protection. `wake` matters for [`Protect::Off`] only.
    ///
    /// # Errors
    /// `ENOENT`: not registered for it. `EAGAIN`: an event is pending. `EINVAL`, `ESRCH`.
    ///
    /// # Kernel
    /// `UFFDIO_WRITEPROTECT`.
    pub fn write_protect(&self, range: PageRange, on: Protect, wake: Wake) -> Result<(), Errno> {
        guard(range.start(), range.bytes())?;
        let mode = match (on, wake) {
            (Protect::On, _) => abi::PROTECT_WP,
            (Protect::Off, Wake::Now) => 0,
            (Protect::Off, Wake::Later) => abi::PROTECT_DONT_WAKE,
        };
        let mut arg = abi::WriteProtect { range: abi::Range::of(range), mode };
        // SAFETY: the structure of this ioctl; protection changes no bytes.
        unsafe { raw::ioctl(self.as_fd(), abi::IOC_WRITEPROTECT, &mut arg) }.map(drop)
    }

    /// Wakes the threads that wait in `range`; they touch again.
    ///
    /// # Errors
    /// `EINVAL` only, which a `PageRange` rules out.
    ///
    /// # Kernel
    /// `UFFDIO_WAKE`.
    pub fn wake(&self, range: PageRange) -> Result<(), Errno> {
        let mut arg = abi::Range::of(range);
        // SAFETY: the structure of this ioctl; it changes no memory.
        unsafe { raw::ioctl(self.as_fd(), abi::IOC_WAKE, &mut arg) }.map(drop)
    }

    /// Reads one message, or `None` where there is none.
    ///
    /// Once a message about a fork, remap, remove or unmap has been read, the thread that caused it goes on.
    ///
    /// # Errors
    /// `EMFILE`, `ENFILE`: no file descriptor for a forked child (the message stays). `EPROTO`: a message of unknown
    /// kind, which can only come from a feature that nobody asked for.
    pub fn read(&self) -> Result<Option<Event>, Errno> {
        let mut message = abi::Message::default();
        let buf = raw::ptr_arg(&raw mut message);
        let len = size_of::<abi::Message>() as u64;
        // SAFETY: the kernel writes at most one message, whose fields are plain numbers, to a local of that size.
        match unsafe { raw::syscall(libc::SYS_read, [raw::fd_arg(self.as_fd()), buf, len]) } {
            Ok(n) if n == len => self.decode(&message).map(Some),
            Ok(_) => Err(Errno::PROTO),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn decode(&self, message: &abi::Message) -> Result<Event, Errno> {
        let [a, b, c] = message.arg;
        Ok(match message.event {
            abi::EVENT_FAULT => Event::Fault {
                addr: VirtAddr::new(b),
                access: if a & abi::FAULT_WRITE != 0 { FaultAccess::Write } else { FaultAccess::Read },
                wp: a & abi::FAULT_WP != 0,
                tid: self.features.contains(Features::THREAD_ID).then_some(raw::low32(c)),
            },
            abi::EVENT_FORK => {
                // SAFETY: the kernel installed a new file descriptor for us when it delivered this message.
                let fd = unsafe { raw::take_fd(u64::from(raw::low32(a))) };
                Event::Fork { child: Self { fd, features: self.features, kernel_faults: self.kernel_faults } }
            }
            abi::EVENT_REMAP => Event::Remap { from: VirtAddr::new(a), to: VirtAddr::new(b), len: c },
            abi::EVENT_REMOVE => Event::Remove { start: VirtAddr::new(a), end: VirtAddr::new(b) },
            abi::EVENT_UNMAP => Event::Unmap { start: VirtAddr::new(a), end: VirtAddr::new(b) },
            _ => return Err(Errno::PROTO),
        })
    }

    /// Waits until there may be a message, for `timeout_ms` at most; says whether there may be one. A signal ends
    /// the wait with `false`.
    ///
    /// Another thread may be faster: [`Uffd::read`] can still find nothing.
    ///
    /// # Errors
    /// Whatever `poll(2)` answers but `EINTR`; `EIO` where the kernel says that the file is not usable.
    pub fn wait(&self, timeout_ms: Option<u32>) -> Result<bool, Errno> {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let timeout = timeout_ms.map_or(-1, |ms| i32::try_from(ms).unwrap_or(i32::MAX));
        // SAFETY: one pollfd, a local, which the kernel reads and writes.
        match unsafe { raw::syscall(libc::SYS_poll, [raw::ptr_arg(&raw mut poll), 1, raw::arg(timeout)]) } {
            Ok(0) | Err(Errno::INTR) => Ok(false),
            Ok(_) if poll.revents & libc::POLLIN != 0 => Ok(true),
            Ok(_) => Err(Errno::IO),
            Err(e) => Err(e),
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Refuses the engine's own typed memory: see Trust above.
fn guard(start: VirtAddr, len: u64) -> Result<(), Errno> {
    if arena::touches_typed(start, len) { Err(Errno::INVAL) } else { Ok(()) }
}

fn dont_wake(wake: Wake) -> u64 {
    match wake {
        Wake::Now => 0,
        Wake::Later => abi::DONT_WAKE,
    }
}

/// `UFFDIO_API`: turns `features` on and returns all that the kernel has.
fn handshake(fd: BorrowedFd<'_>, features: Features) -> Result<Features, Errno> {
    let mut arg = abi::Api { api: abi::API, features: features.bits(), ioctls: 0 };
    // SAFETY: the structure of this ioctl; it changes no memory besides.
    unsafe { raw::ioctl(fd, abi::IOC_API, &mut arg) }?;
    Ok(Features::from_bits_retain(arg.features))
}
