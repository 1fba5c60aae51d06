//! What a driver implements: [`Device`], and the shapes that cross the line between engine and driver.
//!
//! The engine calls a device from its own threads only, and sometimes while CPU threads of the program wait for the
//! page being copied. Hence the one rule of this trait: **a device method must not touch managed memory** (the
//! program's heap, stack or mappings) and must not wait for a thread that might. Keep what the methods need in memory
//! that the engine never moves: [`uhmm_sys::arena`], device memory itself, or statics of the crate that links the
//! engine.

use std::{fmt, os::fd::BorrowedFd};

use thiserror::Error;
use uhmm_sys::{
    Errno,
    addr::{PAGE_SHIFT, PageRange},
    mem::HostBytes,
};

/// Number of a registered device within its address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub(crate) u8);

impl DeviceId {
    /// Most devices that one address space can have.
    pub const MAX: usize = 8;

    /// The number as an index, below [`DeviceId::MAX`].
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device {}", self.0)
    }
}

/// Number of a page-sized slot of one device's memory. There is no physical address in user space: it counts frames
/// from the start of the device's own memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevPfn(u32);

impl DevPfn {
    /// Frame number `n`.
    #[must_use]
    pub const fn new(n: u32) -> Self {
        Self(n)
    }

    /// The frame number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Byte offset of the frame in its device's memory.
    #[must_use]
    pub const fn offset(self) -> u64 {
        (self.0 as u64) << PAGE_SHIFT
    }

    /// The frame `n` further on.
    #[must_use]
    pub const fn add(self, n: u32) -> Self {
        Self(self.0 + n)
    }
}

/// A non-empty run of neighbouring frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameRun {
    /// First frame.
    pub first: DevPfn,
    /// How many frames; at least 1.
    pub count: u32,
}

impl FrameRun {
    /// Byte offset of the run in its device's memory.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.first.offset()
    }

    /// Length in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        (self.count as u64) << PAGE_SHIFT
    }
}

/// One piece of a copy job: as many host bytes as the frames hold.
#[derive(Debug, Clone, Copy)]
pub struct CopyOp {
    /// Bytes of the engine's staging memory: always mapped, never the program's.
    pub host: HostBytes,
    /// Frames of the device.
    pub frames: FrameRun,
}

/// Whether a CPU can address a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryKind {
    /// The CPU cannot: a touch brings the page home (the kernel's `MEMORY_DEVICE_PRIVATE`).
    Private,
    /// The CPU can: a page on the device stays mapped in the program (the kernel's `MEMORY_DEVICE_COHERENT`). See
    /// [`Device::host_memory`].
    Coherent,
}

/// The memory that a device offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySpec {
    /// Number of frames; 0 for a device that only mirrors.
    pub frames: u32,
    /// Whether the CPU can address it.
    pub kind: MemoryKind,
    /// Whether the frames stay readable in a forked child (shared memory or a file). Where not, the engine brings
    /// every page home before a fork.
    pub survives_fork: bool,
}

/// Why a device could not do what it was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The device is gone; its memory is lost.
    #[error("device lost")]
    Lost,
    /// The device has no room behind its frames (a full disk, say).
    #[error("device is out of space")]
    NoSpace,
    /// A system call of the device failed.
    #[error("device I/O failed: {0}")]
    Io(Errno),
}

/// Why a translation has to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// The range was unmapped, or its pages were dropped (`munmap`, `madvise`, `mremap`).
    Unmap,
    /// The protection was restricted.
    Protect,
    /// Pages move: to a device, home, or between devices.
    Migrate,
    /// A device takes pages for exclusive access.
    Exclusive,
    /// The process forks.
    Fork,
    /// The address space or the device goes away.
    Release,
}

/// One invalidation: after the callback returns, no access through an old translation of `range` may happen.
#[derive(Debug, Clone, Copy)]
pub struct Invalidation {
    /// Pages concerned.
    pub range: PageRange,
    /// Why.
    pub cause: Cause,
    /// The device whose own migration or exclusive access this is; it updates its table itself.
    pub owner: Option<DeviceId>,
}

/// A device, as the engine sees it. See the module's documentation for the rule on memory.
pub trait Device: Send + Sync + 'static {
    /// A short name for messages.
    fn name(&self) -> &str;

    /// The memory on offer; asked once, at registration.
    fn memory(&self) -> MemorySpec;

    /// Where the frames of a device of [`MemoryKind::Coherent`] are: memory that [`uhmm_sys::arena::pages`] handed out,
    /// aligned to 2 MiB, with a page for each frame. Asked once, at registration.
    ///
    /// The engine moves pages from there into the program and back. The place of a frame whose page is in the program
    /// is empty; the engine lets no translation lead there, and asks for no copy. `None`, and a kernel without
    /// `UFFDIO_MOVE`: the memory is used as if it were [`MemoryKind::Private`].
    fn host_memory(&self) -> Option<HostBytes> {
        None
    }

    /// Copies host bytes into frames. All of `ops` must have arrived when it returns.
    ///
    /// # Errors
    /// On an error none of the frames is used; the pages stay where they were.
    fn copy_to_device(&self, ops: &[CopyOp]) -> Result<(), DeviceError>;

    /// Copies frames into host bytes. All of `ops` must have arrived when it returns.
    ///
    /// # Errors
    /// On [`DeviceError::Lost`] the pages are poisoned; on others the engine tries again within its budget.
    fn copy_to_host(&self, ops: &[CopyOp]) -> Result<(), DeviceError>;

    /// Fills frames with zeros. On a coherent device there are pages in their places afterwards.
    ///
    /// # Errors
    /// As for [`Device::copy_to_device`].
    fn zero(&self, frames: FrameRun) -> Result<(), DeviceError>;

    /// Flushes what the device cached of its page table for `invalidation.range` and waits until no access through an
    /// old translation is under way. The entries are already gone from the [`DeviceTable`](crate::device_table).
    ///
    /// # Locking
    /// Called from the fault path: no allocation, and no lock that is held across an access to managed memory.
    ///
    /// # Kernel
    /// `struct mmu_interval_notifier_ops`: `invalidate`.
    fn flush(&self, invalidation: &Invalidation);

    /// Called before the engine reads events that let blocked threads of the program go on, and `open` after it:
    /// between the two no access to host memory may start. The default is for devices that never touch host memory
    /// except through what [`Device::flush`] covers.
    fn close_gate(&self) {}

    /// Ends what [`Device::close_gate`] began.
    fn open_gate(&self) {}

    /// Called on the thread that forks, before a fork after which the child will use the frames too
    /// ([`MemorySpec::survives_fork`]). `engine_thread` is the id of a thread that has the engine's files: those that the
    /// child is to have must be in the calling thread's table (see [`uhmm_sys::files`]).
    ///
    /// # Errors
    /// The frames cannot be shared: all pages come home before the fork.
    fn before_fork(&self, _engine_thread: u32) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Called in the child, where only the calling thread exists, before anything else is asked of the device: state
    /// that the parent's threads were in the middle of changing has to be made right.
    fn after_fork_in_child(&self) {}

    /// Calls `f` for each file that the device's methods use on engine threads. Asked in a forked child, after
    /// [`Device::after_fork_in_child`].
    fn files(&self, _f: &mut dyn FnMut(BorrowedFd<'_>)) {}

    /// Ends what [`Device::before_fork`] began, whether it succeeded or not: on the thread that forked, in the parent once
    /// it has forked or failed to, and in the child once the engine's threads have their own files there.
    fn end_fork(&self) {}

    /// Tells that frames are free again; the device may give their backing store back.
    fn freed(&self, _frames: FrameRun) {}
}
