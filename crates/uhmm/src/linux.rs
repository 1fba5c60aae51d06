//! The seam's Linux side: [`LinuxMm`] is the process it runs in.

use uhmm_sys::{
    Errno,
    access::{self, UnwaitingReader},
    addr::{PAGE_SIZE, PageRange, VirtAddr},
    arena, clock, dispatch, exclude,
    maps::{self, Maps, Prot, Vma},
    mem::HostBytes,
    pagemap::{Page, Pagemap},
    probe::{Cap, masked},
    thread,
    uffd::{self, Copied, Features, KernelFaults, Protect, RegisterMode, SrcHoles, Uffd, Wake},
};

use crate::{
    mm::StartError,
    os::{ChildMm, Event, Os},
};

/// The address space of this process.
#[derive(Debug)]
pub struct LinuxMm {
    uffd: Uffd,
    /// Another, which memory of the first one's cannot be registered with.
    other: Uffd,
    pagemap: Pagemap,
    maps: Maps,
    reader: UnwaitingReader,
    has_move: bool,
}

/// A forked child's registered memory.
#[derive(Debug)]
pub struct LinuxChild(Uffd);

impl LinuxMm {
    /// Opens what the engine needs of the kernel.
    ///
    /// # Errors
    /// [`StartError::Userfaultfd`] where there is none to be had, [`StartError::Proc`] where `/proc` is not.
    pub fn open() -> Result<Self, StartError> {
        let wanted = Self::wanted();
        let uffd = Uffd::open(wanted)?;
        let other = Uffd::open(Features::empty())?;
        let has_move = uffd.features().contains(Features::MOVE) && !masked(Cap::Move);
        let pagemap = Pagemap::open().map_err(StartError::Proc)?;
        let maps = Maps::open().map_err(StartError::Proc)?;
        let reader = UnwaitingReader::open().map_err(StartError::Proc)?;
        Ok(Self { uffd, other, pagemap, maps, reader, has_move })
    }

    /// Whether the calling thread could open a userfaultfd as good as the engine's.
    #[must_use]
    pub fn can_open() -> bool {
        Uffd::open(Self::wanted()).is_ok_and(|uffd| uffd.kernel_faults() == KernelFaults::Yes)
    }

    /// Whether forks by bare system calls are told of, so that a child can be given what is away.
    pub(crate) fn tells_of_forks(&self) -> bool {
        self.uffd.features().contains(Features::EVENT_FORK)
    }

    fn wanted() -> Features {
        let mut wanted = Features::EVENT_REMAP
            | Features::EVENT_REMOVE
            | Features::EVENT_UNMAP
            | Features::THREAD_ID
            | Features::POISON
            | Features::MOVE;
        if !masked(Cap::ForkEvent) {
            wanted |= Features::EVENT_FORK;
        }
        wanted
    }

    /// Whether a page is at `dst` and none at `src`, after a move that was refused because something is at `dst`.
    ///
    /// It may be the page itself: Linux 6.18 can move a page and answer `EEXIST` and no bytes (see docs/soundness.md). Who
    /// believes the answer loses the page.
    fn has_moved(&self, dst: VirtAddr, src: VirtAddr) -> bool {
        let is_there = |at| self.page(at).map(Page::is_there);
        is_there(src) == Ok(false) && is_there(dst) == Ok(true)
    }
}

impl ChildMm for LinuxChild {
    fn copy(&self, dst: VirtAddr, src: HostBytes) -> Copied {
        self.0.copy(dst, src.addr(), src.len(), Wake::Now, Protect::Off)
    }

    fn poison(&self, range: PageRange) -> Copied {
        self.0.poison(range, Wake::Now)
    }
}

impl Os for LinuxMm {
    type Child = LinuxChild;

    fn now_ns(&self) -> u64 {
        clock::now_ns()
    }

    fn has_move(&self) -> bool {
        self.has_move
    }

    fn serves_kernel_faults(&self) -> bool {
        self.uffd.kernel_faults() == KernelFaults::Yes
    }

    fn vma(&self, at: VirtAddr) -> Result<Option<Vma>, Errno> {
        self.maps.find(at)
    }

    fn scan(&self, range: PageRange, out: &mut [Page]) -> Result<(), Errno> {
        self.pagemap.scan(range, out)
    }

    fn mark_exclusive(&self, range: PageRange, page_size: u64, pages: &mut [Page]) -> Result<(), Errno> {
        self.pagemap.mark_exclusive(range, page_size, pages)
    }

    fn first_page(&self, range: PageRange) -> Result<Option<VirtAddr>, Errno> {
        self.pagemap.first(range)
    }

    fn is_any_sealed(&self, range: PageRange) -> bool {
        maps::is_any_sealed(range)
    }

    fn is_in_mremap(&self, thread: u32) -> bool {
        thread::is_in_mremap(thread)
    }

    fn excluded(&self, f: &mut dyn FnMut(PageRange)) {
        if let Some(range) = arena::range() {
            f(range);
        }
        exclude::engine_statics(f);
        if exclude::thread_control_pages(f).is_err() {
            // Without knowing the threads nothing is safe to move.
            f(crate::ops::whole_space());
        }
    }

    fn fixed(&self, range: PageRange, f: &mut dyn FnMut(PageRange)) {
        dispatch::fixed(range, f);
    }

    fn held(&self, range: PageRange, f: &mut dyn FnMut(PageRange)) {
        dispatch::held(range, f);
    }

    fn anon_rss(&self) -> Result<u64, Errno> {
        maps::anon_rss_bytes()
    }

    fn is_changing(&self) -> bool {
        self.uffd.is_changing()
    }

    fn register(&self, range: PageRange, mode: RegisterMode) -> Result<(), Errno> {
        self.uffd.register(range, mode)
    }

    fn is_registered(&self, whole: PageRange) -> bool {
        match self.other.register(whole, RegisterMode::WP) {
            Err(errno) => errno == Errno::BUSY,
            Ok(()) => {
                // Nothing was write-protected meanwhile, so nobody waits. Where it is unmapped by now there is nothing to undo.
                let _ = self.other.unregister(whole);
                false
            }
        }
    }

    fn unregister(&self, range: PageRange) -> Result<(), Errno> {
        self.uffd.unregister(range)
    }

    fn copy(&self, dst: VirtAddr, src: HostBytes, wake: Wake) -> Copied {
        self.uffd.copy(dst, src.addr(), src.len(), wake, Protect::Off)
    }

    fn zero(&self, range: PageRange, wake: Wake) -> Copied {
        self.uffd.zeropage(range, wake)
    }

    fn move_pages(&self, dst: VirtAddr, src: VirtAddr, len: u64, holes: SrcHoles, wake: Wake) -> Copied {
        let result = self.uffd.move_pages(dst, src, len, wake, holes);
        if result.done == 0 && result.stop == Some(Errno::EXIST) && self.has_moved(dst, src) {
            if wake == Wake::Now {
                self.wake(PageRange::page_of(dst));
            }
            return Copied { done: PAGE_SIZE, ..result };
        }
        result
    }

    fn poison(&self, range: PageRange) -> Copied {
        self.uffd.poison(range, Wake::Now)
    }

    fn wake(&self, range: PageRange) {
        // Waking needs no mapping: it fails for a malformed range only, which a `PageRange` is not.
        let _ = self.uffd.wake(range);
    }

    fn next_event(&self) -> Result<Option<Event<LinuxChild>>, Errno> {
        let range = |start, end| PageRange::from_ends(start, end).expect("the kernel's ranges are page ranges");
        Ok(self.uffd.read()?.map(|event| match event {
            uffd::Event::Fault { addr, tid, .. } => Event::Fault { addr, tid },
            uffd::Event::Fork { child } => Event::Fork(LinuxChild(child)),
            uffd::Event::Remap { from, to, len } => Event::Remap { from, to, len },
            uffd::Event::Remove { start, end } => Event::Remove(range(start, end)),
            uffd::Event::Unmap { start, end } => Event::Unmap(range(start, end)),
        }))
    }

    fn wait_event(&self, timeout_ms: Option<u32>) -> Result<bool, Errno> {
        self.uffd.wait(timeout_ms)
    }

    fn zap(&self, range: PageRange) -> Result<(), Errno> {
        access::zap(range)
    }

    fn lift(&self, from: PageRange, to: PageRange) -> Result<(), Errno> {
        access::lift(from, to)
    }

    fn renew(&self, range: PageRange) -> Result<(), Errno> {
        access::renew(range)
    }

    fn lock_on_fault(&self, range: PageRange) -> Result<(), Errno> {
        access::lock_on_fault(range)
    }

    fn is_locked(&self, range: PageRange) -> bool {
        access::is_locked(range)
    }

    fn populate_read(&self, range: PageRange) -> Result<(), Errno> {
        access::populate_read(range)
    }

    fn populate_write(&self, range: PageRange) -> Result<(), Errno> {
        access::populate_write(range)
    }

    fn protect(&self, range: PageRange, prot: Prot) -> Result<(), Errno> {
        access::protect(range, prot)
    }

    fn read(&self, src: VirtAddr, dst: HostBytes) -> Copied {
        self.reader.read_to_host(src, dst)
    }
}
