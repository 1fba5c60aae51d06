//! The commands of the kernel's HMM test device, on a [`SoftDevice`].
//!
//! The kernel tests its own HMM through nodes `/dev/hmm_dmirrorN`, each a small device whose commands read, write, migrate and
//! look at the memory of the process that opened it. [`Dmirror`] carries these commands out in user space, by the engine and
//! a software device like any other. The preload library puts nodes in front of it.
//!
//! ```text
//!       ioctl number, address --> Dmirror::ioctl
//!                                    | Cmd
//!                                 Dmirror::execute
//!                                    |        |
//!    Mirror: migrate, snapshot, exclusive    Lane: loads and stores
//! ```
//!
//! Answers are a real kernel's, down to `errno` and counters, but for what its driver gets wrong. Where a range is too bad for
//! a command the command fails at the first page that is, and what it did before that stays, as there.
//!
//! # Not supported
//! - Opens of one node share its page table: what one has faulted in, the other need not. In the kernel each has its own.
//! - Private file memory migrates, and is held exclusively, where the caller's is the only thread of the program. In the kernel that
//!   makes no difference.
//!
//! # Kernel
//! `lib/test_hmm.c`, `lib/test_hmm_uapi.h`.

use std::{
    sync::atomic::{
        AtomicU64,
        Ordering::{AcqRel, Acquire, Release},
    },
    time::{Duration, Instant},
};

use uhmm::{
    Detail, DeviceFaultPolicy, FaultError, MigrateOptions, Mirror, PageOutcome, PageReport,
    device::{Device as _, MemoryKind},
    device_table::{Access, BLOCK_ORDER},
};
use uhmm_sys::{
    Errno,
    access::{self, Copied},
    addr::{BLOCK_PAGES, PAGE_SHIFT, PAGE_SIZE, PageRange, TASK_SIZE, VirtAddr},
    maps::{Backing, Maps, Prot, Sharing, Vma},
};

use crate::soft::{AccessError, Lane, SoftDevice};

/// What is asked of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Request {
    /// Device loads from the range; the bytes go to the buffer.
    Read,
    /// Device stores to the range, from the buffer.
    Write,
    /// The range moves to device memory; the bytes there go to the buffer.
    MigrateToDevice,
    /// What the device has of the range comes home.
    MigrateToSystem,
    /// A byte for each page goes to the buffer: what the device would find there. Faults nothing in.
    Snapshot,
    /// Takes the range for exclusive access; its bytes go to the buffer.
    Exclusive,
    /// Whether the device has nothing of the range exclusively any more.
    CheckExclusive,
    /// Everything that the device has comes home.
    Release,
    /// Sets the flags of the open file.
    Flags,
    /// As [`Request::Read`].
    ReadUnlocked,
}

impl Request {
    const ALL: [Self; 10] = [
        Self::Read,
        Self::Write,
        Self::MigrateToDevice,
        Self::MigrateToSystem,
        Self::Snapshot,
        Self::Exclusive,
        Self::CheckExclusive,
        Self::Release,
        Self::Flags,
        Self::ReadUnlocked,
    ];

    /// The request behind an `ioctl` number.
    #[must_use]
    pub fn from_ioctl(number: u32) -> Option<Self> {
        /// `_IOWR('H', 0, struct hmm_dmirror_cmd)`.
        const FIRST: u32 = 0xc028_4800;
        Self::ALL.get(usize::try_from(number.checked_sub(FIRST)?).ok()?).copied()
    }
}

/// `struct hmm_dmirror_cmd`: what each command is given, and tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cmd {
    /// First address of the range.
    pub addr: u64,
    /// The program's buffer.
    pub ptr: u64,
    /// Pages in the range.
    pub npages: u64,
    /// Told: pages copied or moved.
    pub cpages: u64,
    /// Told: how often the device had to fault.
    pub faults: u64,
}

impl Cmd {
    /// Size of the structure.
    pub const BYTES: usize = 40;

    /// From the bytes of the structure.
    #[must_use]
    pub fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        let mut words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word));
        let mut next = || words.next().expect("five words");
        Self { addr: next(), ptr: next(), npages: next(), cpages: next(), faults: next() }
    }

    /// The bytes of the structure.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let words = [self.addr, self.ptr, self.npages, self.cpages, self.faults];
        for (place, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *place = word.to_ne_bytes();
        }
        bytes
    }
}

// Bytes of a snapshot: one of these, and READ or WRITE.
const ERROR: u8 = 0xff;
const NONE: u8 = 0;
const READ: u8 = 1;
const WRITE: u8 = 2;
const PMD: u8 = 4;
const ZERO: u8 = 0x10;
const PRIVATE_LOCAL: u8 = 0x20;
const COHERENT_LOCAL: u8 = 0x40;
const COHERENT_REMOTE: u8 = 0x50;

/// How long pages are asked to the device that are only busy: the engine may be moving them for somebody else, or they were
/// dropped a moment ago.
const MIGRATE_PATIENCE: Duration = Duration::from_secs(1);
/// How often pages are that the program has lent to the kernel.
const MIGRATE_TRIES: u32 = 20;
/// How often a page of the program's buffer is brought home that leaves again each time.
const REACH_TRIES: u32 = 64;
/// How often a page that a CPU thread takes back is taken again.
const EXCLUSIVE_TRIES: u32 = 100;

/// Flag of an open file: the next allocation of a page fails.
const FAIL_ALLOC: u64 = 1;

/// Flags of an open file, set by [`Request::Flags`].
#[derive(Debug, Default)]
pub struct Flags(AtomicU64);

impl Flags {
    /// None is set.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Sets the flags.
    pub fn set(&self, flags: u64) {
        self.0.store(flags, Release);
    }

    /// Whether the next allocation is to fail. It is the next no longer then.
    fn takes_failure(&self) -> bool {
        self.0.fetch_and(!FAIL_ALLOC, AcqRel) & FAIL_ALLOC != 0
    }

    fn wants_failure(&self) -> bool {
        self.0.load(Acquire) & FAIL_ALLOC != 0
    }
}

/// Whether threads of the program run while a command is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// None does, and none handles a signal: the only one waits for the command.
    None,
    /// Some may.
    Some,
}

/// A node of the test device.
#[derive(Debug)]
pub struct Dmirror {
    mirror: Mirror<SoftDevice>,
    maps: Maps,
    /// What the snapshot of a page of its own says.
    local: u8,
}

impl Dmirror {
    /// A node on a device that was registered and started.
    ///
    /// # Errors
    /// Whatever opening the process's memory map answers.
    pub fn new(mirror: Mirror<SoftDevice>) -> Result<Self, Errno> {
        let is_coherent = mirror.device().memory().kind == MemoryKind::Coherent && mirror.mm().has_coherent_memory();
        Ok(Self { mirror, maps: Maps::open()?, local: if is_coherent { COHERENT_LOCAL } else { PRIVATE_LOCAL } })
    }

    /// The node's device.
    #[must_use]
    pub const fn mirror(&self) -> &Mirror<SoftDevice> {
        &self.mirror
    }

    /// Does what `ioctl(2)` with this number and argument is to do for an open file with these flags.
    ///
    /// # Errors
    /// As [`Dmirror::execute`]. `EFAULT`: the argument leads nowhere.
    ///
    /// # Locking
    /// As [`Dmirror::execute`].
    pub fn ioctl(
        &self,
        lane: &mut Lane,
        flags: &Flags,
        number: u32,
        argument: u64,
        others: Others,
    ) -> Result<(), Errno> {
        let mut bytes = [0; Cmd::BYTES];
        self.fetch(argument, &mut bytes)?;
        let mut cmd = Cmd::from_bytes(bytes);
        let request = Request::from_ioctl(number);
        if others == Others::None && matches!(request, Some(Request::MigrateToDevice | Request::Exclusive)) {
            self.make_anonymous(request == Some(Request::Exclusive), &cmd);
        }
        self.execute(lane, flags, request, &mut cmd)?;
        self.deliver(argument, &cmd.to_bytes())
    }

    /// Makes private memory of files anonymous, as far as it was written, or is about to be given a copy of its own: what is
    /// held exclusively is the process's own.
    fn make_anonymous(&self, to_own: bool, cmd: &Cmd) {
        if whole(cmd).is_none() || !cmd.addr.is_multiple_of(PAGE_SIZE) {
            return;
        }
        // What does not work out here does not move: the command says so.
        let _ = self.each_mapping(cmd, |piece, vma| {
            if vma.backing == Backing::File && vma.sharing == Sharing::Private && vma.prot.contains(Prot::WRITE) {
                if to_own {
                    let _ = access::populate_write(piece);
                }
                let _ = self.mirror.mm().make_anonymous(piece);
            }
            Ok(())
        });
    }

    /// Carries a command out, with what `cmd` says, and leaves there what it tells. `lane` is one of this node's device, and
    /// `flags` are those of the open file.
    ///
    /// # Errors
    /// What the kernel's driver answers; `cmd` is then as it was.
    ///
    /// # Locking
    /// Waits for pages in transit. The buffer is the program's memory, so the thread's own stack and `cmd` may not be
    /// managed memory while a fault of that buffer is served.
    pub fn execute(
        &self,
        lane: &mut Lane,
        flags: &Flags,
        request: Option<Request>,
        cmd: &mut Cmd,
    ) -> Result<(), Errno> {
        let len = cmd.npages << PAGE_SHIFT;
        if !cmd.addr.is_multiple_of(PAGE_SIZE) || cmd.addr >= cmd.addr.wrapping_add(len) {
            return Err(Errno::INVAL);
        }
        let request = request.ok_or(Errno::INVAL)?;
        let mut told = Cmd { cpages: 0, faults: 0, ..*cmd };
        match request {
            Request::Read | Request::ReadUnlocked => self.read(lane, &mut told),
            Request::Write => self.write(lane, &mut told),
            Request::MigrateToDevice => self.migrate_to_device(lane, flags, &mut told),
            Request::MigrateToSystem => self.migrate_to_system(flags, &mut told),
            Request::Snapshot => self.snapshot(&mut told),
            Request::Exclusive => self.exclusive(lane, &mut told),
            Request::CheckExclusive => self.check_exclusive(&told),
            Request::Release => self.release(),
            Request::Flags => {
                flags.set(told.npages);
                Ok(())
            }
        }?;
        *cmd = told;
        Ok(())
    }

    /// An open file is closed: everything comes home. With the last one all translations go.
    pub fn close(&self, is_last: bool) {
        let _ = self.release();
        if is_last && let Some(port) = self.mirror.port() {
            port.forget();
        }
    }

    fn read(&self, lane: &mut Lane, cmd: &mut Cmd) -> Result<(), Errno> {
        let mut bytes = buffer(cmd.npages)?;
        let range = whole(cmd).ok_or(Errno::FAULT)?;
        cmd.faults = self.load(lane, range, &mut bytes)?;
        self.deliver(cmd.ptr, &bytes)?;
        cmd.cpages = cmd.npages;
        Ok(())
    }

    /// Has the device load all of `range`. Returns how often it had to fault.
    fn load(&self, lane: &mut Lane, range: PageRange, bytes: &mut [u8]) -> Result<u64, Errno> {
        self.each_page(lane, range, Access::Read, |lane, page, offset| {
            lane.read(page, &mut bytes[offset..offset + PAGE_BYTES])
        })
    }

    fn write(&self, lane: &mut Lane, cmd: &mut Cmd) -> Result<(), Errno> {
        let mut bytes = buffer(cmd.npages)?;
        self.fetch(cmd.ptr, &mut bytes)?;
        let range = whole(cmd).ok_or(Errno::FAULT)?;
        cmd.faults = self.each_page(lane, range, Access::Write, |lane, page, offset| {
            lane.write(page, &bytes[offset..offset + PAGE_BYTES])
        })?;
        cmd.cpages = cmd.npages;
        Ok(())
    }

    /// Makes an access to each page of `range`, given its offset in bytes. Where the device has no translation all of what is left
    /// is faulted in. Returns how often that was.
    fn each_page(
        &self,
        lane: &mut Lane,
        range: PageRange,
        access: Access,
        mut f: impl FnMut(&mut Lane, VirtAddr, usize) -> Result<(), AccessError>,
    ) -> Result<u64, Errno> {
        let port = self.mirror.port().ok_or(Errno::NODEV)?;
        lane.set_faulting(false);
        let mut faults = 0;
        let mut at = range.start();
        while let Ok(rest) = PageRange::from_ends(at, range.end()) {
            // To write what it holds exclusively the device would have to share it.
            let may = access == Access::Read || !port.table().lookup(at).is_exclusive();
            let offset = usize::try_from(at.get() - range.start().get()).expect("64-bit");
            match if may { f(lane, at, offset) } else { Err(AccessError::Unmapped { addr: at }) } {
                Ok(()) => at = at.add(PAGE_SIZE),
                Err(AccessError::Unmapped { .. }) => {
                    let faulted = port.fault_range(rest, access, Detail::Exact);
                    faulted.map_err(|error| self.fault_errno(error, access))?;
                    faults += 1;
                }
                Err(AccessError::Kernel { errno, .. }) => return Err(errno),
                Err(AccessError::KeptOut { .. } | AccessError::Contended { .. }) => return Err(Errno::BUSY),
                Err(_) => return Err(Errno::FAULT),
            }
        }
        Ok(faults)
    }

    fn fault_errno(&self, error: FaultError, access: Access) -> Errno {
        match error {
            // Of a mapping that may be read it is the write that is refused.
            FaultError::Denied { addr } if access > Access::Read && self.readable(addr).is_ok() => Errno::PERM,
            FaultError::TimedOut { .. } => Errno::BUSY,
            FaultError::NoDevice => Errno::NODEV,
            FaultError::TableFull { .. } | FaultError::Kernel { errno: Errno::NOMEM, .. } => Errno::NOMEM,
            _ => Errno::FAULT,
        }
    }

    /// The mapping of `addr`, if it may be read.
    fn readable(&self, addr: VirtAddr) -> Result<Vma, Errno> {
        let vma = self.maps.find(addr)?.filter(|vma| vma.range.contains(addr) && vma.prot.contains(Prot::READ));
        vma.ok_or(Errno::INVAL)
    }

    /// Calls `f` for the part of `cmd`'s range in each mapping, all of which may be read. What no device may have at all is
    /// refused.
    fn each_mapping(&self, cmd: &Cmd, mut f: impl FnMut(PageRange, &Vma) -> Result<(), Errno>) -> Result<(), Errno> {
        let mut at = VirtAddr::new(cmd.addr);
        let end = cmd.addr + (cmd.npages << PAGE_SHIFT);
        while at.get() < end {
            let vma = self.readable(at)?;
            let piece_end = VirtAddr::new(end.min(vma.range.end().get()));
            if vma.page_size > PAGE_SIZE || vma.backing == Backing::Special {
                return Err(Errno::INVAL);
            }
            f(PageRange::from_ends(at, piece_end).map_err(|_| Errno::INVAL)?, &vma)?;
            at = piece_end;
        }
        Ok(())
    }

    fn migrate_to_device(&self, lane: &mut Lane, flags: &Flags, cmd: &mut Cmd) -> Result<(), Errno> {
        self.each_mapping(cmd, |piece, _| {
            self.send(piece, flags);
            Ok(())
        })?;
        let range = whole(cmd).ok_or(Errno::INVAL)?;
        let mut bytes = buffer(cmd.npages)?;
        self.each_report(range, Detail::Cheap, |_, report| {
            if report.local_frame().is_some() { Ok(()) } else { Err(Errno::NOENT) }
        })?;
        self.load(lane, range, &mut bytes)?;
        self.deliver(cmd.ptr, &bytes)?;
        cmd.cpages = cmd.npages;
        Ok(())
    }

    /// Moves what can move of a piece of one mapping to the device.
    fn send(&self, piece: PageRange, flags: &Flags) {
        let mut piece = piece;
        if flags.wants_failure() {
            piece = match self.without_first(piece, flags) {
                Some(rest) => rest,
                None => return,
            };
        }
        self.send_all(piece);
    }

    fn send_all(&self, piece: PageRange) {
        let options = MigrateOptions { from_other_devices: false, ..MigrateOptions::default() };
        let (start, mut tries) = (Instant::now(), 0);
        loop {
            let report = self.mirror.migrate(piece, &options);
            tries += 1;
            let busy = report.count(PageOutcome::Busy) + report.count(PageOutcome::TimedOut) != 0;
            let lent = report.count(PageOutcome::Pinned) != 0 && tries < MIGRATE_TRIES;
            if !(busy || lent) || start.elapsed() > MIGRATE_PATIENCE {
                return;
            }
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    /// What is left of `piece` where the allocation of its first page fails; of a huge page the device takes small ones then.
    fn without_first(&self, piece: PageRange, flags: &Flags) -> Option<PageRange> {
        let first = PageRange::page_of(piece.start());
        let report = *self.mirror.snapshot(first).ok()?.first()?;
        if report.local_frame().is_some() || !flags.takes_failure() {
            return Some(piece);
        }
        let is_whole = PageRange::block_of(piece.start()).intersection(piece).is_some_and(|b| b.pages() == BLOCK_PAGES);
        if is_whole && report.order() == BLOCK_ORDER {
            // Once one is apart from the others they are small pages.
            let last = PageRange::page_of(piece.start().add((BLOCK_PAGES as u64 - 1) << PAGE_SHIFT));
            self.send_all(last);
            return Some(piece);
        }
        PageRange::from_ends(first.end(), piece.end()).ok()
    }

    fn migrate_to_system(&self, flags: &Flags, cmd: &mut Cmd) -> Result<(), Errno> {
        let (mut count, mut failed) = (0, false);
        self.each_mapping(cmd, |piece, _| {
            self.each_run(piece, |run, unit| {
                if flags.takes_failure() && !unit {
                    failed = true;
                    return;
                }
                let came = self.mirror.mm().home(run).count(PageOutcome::Moved);
                count += if unit { came.min(1) } else { came };
            })
        })?;
        if failed {
            return Err(Errno::NOMEM);
        }
        cmd.cpages = count as u64;
        Ok(())
    }

    /// Calls `f` for each run of pages that the device has of `range`, and whether the run is one huge page there.
    fn each_run(&self, range: PageRange, mut f: impl FnMut(PageRange, bool)) -> Result<(), Errno> {
        for part in range.iter_blocks() {
            let reports = self.mirror.snapshot(part).map_err(|error| self.fault_errno(error, Access::Read))?;
            let is_here = |report: &PageReport| report.local_frame().is_some();
            let unit = reports.len() == BLOCK_PAGES
                && reports.iter().all(|report| {
                    is_here(report) && report.coherent_device().is_none() && report.order() == BLOCK_ORDER
                });
            let mut at = part.start();
            for alike in reports.chunk_by(|a, b| is_here(a) == is_here(b)) {
                let run = PageRange::new(at, (alike.len() as u64) << PAGE_SHIFT).expect("a part of the range");
                at = run.end();
                if is_here(&alike[0]) {
                    f(run, unit);
                }
            }
        }
        Ok(())
    }

    /// Calls `f` for the report of each page of `range`, with its number.
    fn each_report(
        &self,
        range: PageRange,
        detail: Detail,
        mut f: impl FnMut(usize, PageReport) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut number = 0;
        for part in range.iter_blocks() {
            let reports = self.mirror.snapshot_with(part, detail);
            for report in reports.map_err(|error| self.fault_errno(error, Access::Read))? {
                f(number, report)?;
                number += 1;
            }
        }
        Ok(())
    }

    fn snapshot(&self, cmd: &mut Cmd) -> Result<(), Errno> {
        let mut done = 0;
        while done < cmd.npages {
            let start = cmd.addr + (done << PAGE_SHIFT);
            let mut bytes = [ERROR; BLOCK_PAGES];
            let pages = (cmd.npages - done).min(BLOCK_PAGES as u64);
            // Above the address space nothing is mapped.
            let end = (start + (pages << PAGE_SHIFT)).min(TASK_SIZE);
            if let Ok(range) = PageRange::from_ends(VirtAddr::new(start), VirtAddr::new(end)) {
                self.each_report(range, Detail::Exact, |n, report| {
                    bytes[n] = self.describe(report);
                    Ok(())
                })?;
            }
            let ptr = cmd.ptr.checked_add(done).ok_or(Errno::FAULT)?;
            self.deliver(ptr, &bytes[..usize::try_from(pages).expect("a block's at most")])?;
            done += pages;
        }
        cmd.cpages = cmd.npages;
        Ok(())
    }

    fn describe(&self, report: PageReport) -> u8 {
        if report.is_error() {
            return ERROR;
        }
        if !report.is_valid() {
            return NONE;
        }
        let place = match report.coherent_device() {
            _ if report.local_frame().is_some() => self.local,
            Some(_) => COHERENT_REMOTE,
            None if report.is_zero_page() => ZERO,
            None => 0,
        };
        let access = if report.is_writable() { WRITE } else { READ };
        let order = if report.order() == BLOCK_ORDER { PMD } else { 0 };
        place | access | order
    }

    fn exclusive(&self, lane: &mut Lane, cmd: &mut Cmd) -> Result<(), Errno> {
        let range = whole(cmd).ok_or(Errno::FAULT)?;
        let port = self.mirror.port().ok_or(Errno::NODEV)?;
        let mut bytes = buffer(cmd.npages)?;
        // All at once first, and then what of it did not work, page by page.
        drop(self.mirror.exclusive(range));
        for page in range.iter_pages() {
            let mut tries = 0;
            loop {
                match port.fault(page, Access::Atomic, DeviceFaultPolicy::Map) {
                    Ok(pte) if pte.is_exclusive() => break,
                    // In its own memory, where no CPU thread reaches it anyway.
                    Ok(_) => drop(self.mirror.mm().home(PageRange::page_of(page))),
                    Err(FaultError::NotExclusive { .. }) => return Err(Errno::OPNOTSUPP),
                    Err(FaultError::Denied { .. }) => return Err(Errno::FAULT),
                    Err(error) => return Err(self.fault_errno(error, Access::Read)),
                }
                tries += 1;
                if tries == EXCLUSIVE_TRIES {
                    return Err(Errno::BUSY);
                }
            }
        }
        self.load(lane, range, &mut bytes)?;
        self.deliver(cmd.ptr, &bytes)?;
        cmd.cpages = cmd.npages;
        Ok(())
    }

    fn check_exclusive(&self, cmd: &Cmd) -> Result<(), Errno> {
        let (Some(range), Some(port)) = (whole(cmd), self.mirror.port()) else { return Ok(()) };
        let mut any = false;
        port.table().for_each(range, |_, pte| any |= pte.is_exclusive());
        if any { Err(Errno::PERM) } else { Ok(()) }
    }

    fn release(&self) -> Result<(), Errno> {
        if self.mirror.evict(u32::MAX) == 0 { Ok(()) } else { Err(Errno::BUSY) }
    }

    // The program's buffer.

    fn fetch(&self, ptr: u64, bytes: &mut [u8]) -> Result<(), Errno> {
        let len = bytes.len();
        self.reach(ptr, len, |done| access::read(VirtAddr::new(ptr + done as u64), &mut bytes[done..]))
    }

    fn deliver(&self, ptr: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.reach(ptr, bytes.len(), |done| access::write(VirtAddr::new(ptr + done as u64), &bytes[done..]))
    }

    /// Has `copy` copy what is left of `len` bytes at `ptr`, given how many are done. Where faults of system calls are not served
    /// pages that are away are brought home for it.
    fn reach(&self, ptr: u64, len: usize, mut copy: impl FnMut(usize) -> Copied) -> Result<(), Errno> {
        if ptr.checked_add(len as u64).is_none_or(|end| end > TASK_SIZE) {
            return Err(Errno::FAULT);
        }
        let mm = self.mirror.mm();
        let (mut done, mut tries) = (0, 0);
        loop {
            let copied = copy(done);
            done += usize::try_from(copied.done).expect("at most what was left");
            if done == len {
                return Ok(());
            }
            if mm.serves_kernel_faults() || tries == REACH_TRIES {
                return Err(Errno::FAULT);
            }
            tries = if copied.done == 0 { tries + 1 } else { 0 };
            mm.touch(PageRange::page_of(VirtAddr::new(ptr + done as u64)));
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a page is 4096 bytes")]
const PAGE_BYTES: usize = PAGE_SIZE as usize;

/// The range of a command, if it lies in the address space.
fn whole(cmd: &Cmd) -> Option<PageRange> {
    PageRange::new(VirtAddr::new(cmd.addr), cmd.npages << PAGE_SHIFT).ok()
}

/// Memory for the bytes of so many pages: never more than the machine has.
fn buffer(pages: u64) -> Result<Vec<u8>, Errno> {
    if pages > uhmm_sys::limits::total_ram() >> PAGE_SHIFT {
        return Err(Errno::NOMEM);
    }
    let len = usize::try_from(pages << PAGE_SHIFT).map_err(|_| Errno::NOMEM)?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len).map_err(|_| Errno::NOMEM)?;
    bytes.resize(len, 0);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_known_by_their_numbers() {
        assert_eq!(Request::from_ioctl(0xc028_4800), Some(Request::Read));
        assert_eq!(Request::from_ioctl(0xc028_4802), Some(Request::MigrateToDevice));
        assert_eq!(Request::from_ioctl(0xc028_4809), Some(Request::ReadUnlocked));
        for other in [0, 0xc028_47ff, 0xc028_480a, 0x8028_4800] {
            assert_eq!(Request::from_ioctl(other), None);
        }
    }

    #[test]
    fn a_command_is_five_words() {
        let cmd = Cmd { addr: 1, ptr: 2, npages: 3, cpages: 4, faults: u64::MAX };
        let bytes = cmd.to_bytes();
        assert_eq!(bytes[8..16], 2u64.to_ne_bytes());
        assert_eq!(Cmd::from_bytes(bytes), cmd);
    }

    #[test]
    fn a_failure_is_taken_once() {
        let flags = Flags::new();
        assert!(!flags.takes_failure());
        flags.set(FAIL_ALLOC | 2);
        assert!(flags.wants_failure() && flags.takes_failure());
        assert!(!flags.wants_failure() && !flags.takes_failure());
    }
}
