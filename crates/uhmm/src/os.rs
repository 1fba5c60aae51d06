//! The seam between the engine and a kernel: every use of one goes through [`Os`].
//!
//! On Linux the seam is [`crate::linux::LinuxMm`]. The engine is generic over it, so that the same code runs on a
//! simulated kernel, where every call can fail, race, be short or arrive late.

use uhmm_sys::{
    Errno,
    addr::{PageRange, VirtAddr},
    maps::{Prot, Vma},
    mem::HostBytes,
    pagemap::Page,
    uffd::{Copied, RegisterMode, SrcHoles, Wake},
};

/// How the program's memory is registered, all of it: a range that was registered otherwise would be a mapping of its own
/// to the kernel.
pub(crate) const MANAGED: RegisterMode = RegisterMode::MISSING;

/// The address space of a forked child, which nobody serves but its parent.
pub trait ChildMm {
    /// Fills a hole of the child with bytes of the engine's memory.
    fn copy(&self, dst: VirtAddr, src: HostBytes) -> Copied;
    /// Makes a touch of the page kill the child with `SIGBUS` rather than read wrong bytes.
    fn poison(&self, range: PageRange) -> Copied;
}

/// A message of the kernel.
#[derive(Debug)]
pub enum Event<C> {
    /// A thread touched a page that is not there, and waits.
    Fault {
        /// The address touched.
        addr: VirtAddr,
        /// The thread, where the kernel says.
        tid: Option<u32>,
    },
    /// The process forked; the child's registered memory is in `child`'s care.
    Fork(C),
    /// Registered memory was moved by `mremap`; the page tables have changed already.
    Remap {
        /// Where it was.
        from: VirtAddr,
        /// Where it is.
        to: VirtAddr,
        /// Bytes.
        len: u64,
    },
    /// Pages are about to be dropped (`MADV_DONTNEED`, `MADV_FREE`, `MADV_REMOVE`).
    Remove(PageRange),
    /// Memory was unmapped; the page tables have changed already.
    Unmap(PageRange),
}

/// What the engine asks of a kernel. No method allocates; all may be called from several engine threads.
///
/// Results keep progress and error apart: see [`Copied`].
pub trait Os: Send + Sync + std::fmt::Debug + 'static {
    /// See [`ChildMm`].
    type Child: ChildMm + Send + std::fmt::Debug;

    /// Nanoseconds since some moment, the same for a process and those that it forks.
    fn now_ns(&self) -> u64;
    /// Whether `UFFDIO_MOVE` may be used.
    fn has_move(&self) -> bool;
    /// Whether faults of system calls are served, not only those of the program's own instructions.
    fn serves_kernel_faults(&self) -> bool;

    /// The VMA that holds `at`, or the next above it.
    ///
    /// # Errors
    /// Whatever reading the process's map answers.
    fn vma(&self, at: VirtAddr) -> Result<Option<Vma>, Errno>;
    /// What the page tables say of each page of `range`.
    ///
    /// # Errors
    /// Whatever reading the page map answers.
    fn scan(&self, range: PageRange, out: &mut [Page]) -> Result<(), Errno>;
    /// What the page tables say of the page of `at`.
    ///
    /// # Errors
    /// As [`Os::scan`].
    fn page(&self, at: VirtAddr) -> Result<Page, Errno> {
        let mut page = [Page::empty(); 1];
        self.scan(PageRange::page_of(at), &mut page).map(|()| page[0])
    }
    /// Adds [`Page::ANON_EXCLUSIVE`] to pages of one mapping that [`Os::scan`] found, where the kernel tells: of those the
    /// mapping's `page_size` counts.
    ///
    /// # Errors
    /// As [`Os::scan`].
    fn mark_exclusive(&self, range: PageRange, page_size: u64, pages: &mut [Page]) -> Result<(), Errno>;
    /// The first page of `range` that is there, or its start where that cannot be told at once. `None`: nothing is.
    ///
    /// # Errors
    /// As [`Os::scan`].
    fn first_page(&self, range: PageRange) -> Result<Option<VirtAddr>, Errno>;
    /// Whether part of `range` is sealed (`mseal(2)`), as far as the kernel says. Takes long.
    fn is_any_sealed(&self, range: PageRange) -> bool;
    /// Whether a thread of the program waits inside of `mremap`.
    fn is_in_mremap(&self, thread: u32) -> bool;
    /// Calls `f` for memory that must stay: the engine's own, and what the kernel writes to behind a dying thread.
    fn excluded(&self, f: &mut dyn FnMut(PageRange));
    /// Calls `f` for the parts of `range` that the kernel may touch at any time without being served: they must neither leave
    /// nor be registered. None where faults of system calls are served.
    ///
    /// # Locking
    /// The caller has taken the locks that keep others from doing so meanwhile; this puts a full fence behind them.
    fn fixed(&self, range: PageRange, f: &mut dyn FnMut(PageRange));
    /// Calls `f` for the parts of `range` that must stay for now: as [`Os::fixed`], and what a system call under way uses.
    ///
    /// # Locking
    /// As [`Os::fixed`]. Who begins a system call from now on finds the pages locked, and waits.
    fn held(&self, range: PageRange, f: &mut dyn FnMut(PageRange));
    /// Anonymous memory of the process in RAM, in bytes.
    ///
    /// # Errors
    /// Whatever reading the process's statistics answers.
    fn anon_rss(&self) -> Result<u64, Errno>;

    /// Whether the address space has changed, or is about to, in a way of which the event was not read yet.
    fn is_changing(&self) -> bool;
    /// `UFFDIO_REGISTER`.
    ///
    /// # Errors
    /// `EBUSY`: another userfaultfd has it. `EINVAL`: memory of a kind that cannot be registered, or a hole.
    fn register(&self, range: PageRange, mode: RegisterMode) -> Result<(), Errno>;
    /// Whether memory of the mapping `whole` is registered, also while the address space is changing. A mapping that is not
    /// counts as another userfaultfd's for a moment.
    fn is_registered(&self, whole: PageRange) -> bool;
    /// `UFFDIO_UNREGISTER`.
    ///
    /// # Errors
    /// As [`Os::register`].
    fn unregister(&self, range: PageRange) -> Result<(), Errno>;
    /// `UFFDIO_COPY` from the engine's memory into holes of the program.
    fn copy(&self, dst: VirtAddr, src: HostBytes, wake: Wake) -> Copied;
    /// `UFFDIO_ZEROPAGE`.
    fn zero(&self, range: PageRange, wake: Wake) -> Copied;
    /// `UFFDIO_MOVE`.
    fn move_pages(&self, dst: VirtAddr, src: VirtAddr, len: u64, holes: SrcHoles, wake: Wake) -> Copied;
    /// `UFFDIO_POISON`.
    fn poison(&self, range: PageRange) -> Copied;
    /// `UFFDIO_WAKE`.
    fn wake(&self, range: PageRange);
    /// Reads one message, if there is one.
    ///
    /// # Errors
    /// Whatever `read(2)` answers but `EAGAIN`.
    fn next_event(&self) -> Result<Option<Event<Self::Child>>, Errno>;
    /// Waits until there may be a message.
    ///
    /// # Errors
    /// Whatever `poll(2)` answers but `EINTR`.
    fn wait_event(&self, timeout_ms: Option<u32>) -> Result<bool, Errno>;

    /// `MADV_DONTNEED` on the engine's own memory.
    ///
    /// # Errors
    /// `EINVAL` where the kernel refuses.
    fn zap(&self, range: PageRange) -> Result<(), Errno>;
    /// See [`uhmm_sys::access::lift`].
    ///
    /// # Errors
    /// See there.
    fn lift(&self, from: PageRange, to: PageRange) -> Result<(), Errno>;
    /// See [`uhmm_sys::access::renew`].
    ///
    /// # Errors
    /// See there.
    fn renew(&self, range: PageRange) -> Result<(), Errno>;
    /// See [`uhmm_sys::access::lock_on_fault`].
    ///
    /// # Errors
    /// See there.
    fn lock_on_fault(&self, range: PageRange) -> Result<(), Errno>;
    /// See [`uhmm_sys::access::is_locked`].
    fn is_locked(&self, range: PageRange) -> bool;
    /// `MADV_POPULATE_READ`.
    ///
    /// # Errors
    /// `ENOMEM`: a hole in the address space. `EFAULT`: a page that cannot be had. `EINVAL`: no such advice.
    fn populate_read(&self, range: PageRange) -> Result<(), Errno>;
    /// `MADV_POPULATE_WRITE`.
    ///
    /// # Errors
    /// As [`Os::populate_read`].
    fn populate_write(&self, range: PageRange) -> Result<(), Errno>;
    /// `mprotect(2)`; used for pages that have to come home where nothing can be put.
    ///
    /// # Errors
    /// Whatever `mprotect(2)` answers.
    fn protect(&self, range: PageRange, prot: Prot) -> Result<(), Errno>;
    /// Reads the program's memory, surviving its absence. Never waits for a page that only the engine could bring:
    /// where one is missing it stops with `EIO`.
    fn read(&self, src: VirtAddr, dst: HostBytes) -> Copied;
}
