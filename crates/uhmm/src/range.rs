//! What a device is told of whole ranges: reports, and pages faulted in for it.
//!
//! # Kernel
//! `mm/hmm.c: hmm_range_fault()`.

use std::time::Instant;

use uhmm_sys::{
    Errno,
    addr::{BLOCK_PAGES, PageRange},
    maps::{Prot, Vma},
    pagemap::Page,
};

use crate::{
    block::{Block, Place},
    device::{DevPfn, DeviceId},
    device_table::{Access, BLOCK_ORDER, DeviceTable, Pte, TableFull},
    devices::Entry,
    engine::Core,
    home::span,
    mirror::{FaultError, budget_left, most},
    os::{MANAGED, Os},
    page_set::PageSet,
    thread::Ctx,
    trace::Why,
};

/// How closely a report looks at whether the CPU may write a page without a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Detail {
    /// Says so where it is known anyway: after a fault for writing, and of pages on the device. Others count as read-only.
    Cheap,
    /// Asks the kernel for each page of physical memory, which costs a system call for each run of such pages, and
    /// `CAP_SYS_ADMIN`. Without that as [`Detail::Cheap`].
    Exact,
}

/// What a snapshot or range fault says of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageReport(u64);

const VALID: u64 = 1;
const WRITE: u64 = 1 << 1;
const ERROR: u64 = 1 << 2;
const ZERO: u64 = 1 << 3;
const HUGE: u64 = 1 << 4;
const LOCAL: u64 = 1 << 5;
const COHERENT: u64 = 1 << 6;
const DEVICE_SHIFT: u32 = 16;
const PFN_SHIFT: u32 = 32;

impl PageReport {
    /// Not there; a fault may bring it.
    pub const NONE: Self = Self(0);
    /// Can never be there: no mapping, or one that cannot be read.
    pub const IMPOSSIBLE: Self = Self(ERROR);

    pub(crate) const fn bits(self) -> u64 {
        self.0
    }

    pub(crate) const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The device may read it.
    #[must_use]
    pub const fn is_valid(self) -> bool {
        self.0 & VALID != 0
    }

    /// The device may write it without a further fault.
    #[must_use]
    pub const fn is_writable(self) -> bool {
        self.0 & WRITE != 0
    }

    /// No fault can make it valid.
    #[must_use]
    pub const fn is_error(self) -> bool {
        self.0 & ERROR != 0
    }

    /// It is the kernel's shared page of zeros.
    #[must_use]
    pub const fn is_zero_page(self) -> bool {
        self.0 & ZERO != 0
    }

    /// log2 of the pages that the CPU maps as one with it, or that are as one in the device's memory: 0 or 9.
    #[must_use]
    pub const fn order(self) -> u32 {
        if self.0 & HUGE != 0 { 9 } else { 0 }
    }

    /// The coherent device whose memory holds it, if it is mapped there: the CPU and every device reach it by its address.
    #[must_use]
    pub fn coherent_device(self) -> Option<DeviceId> {
        let number = usize::try_from(self.0 >> DEVICE_SHIFT & 0xff).expect("8 bits");
        if self.0 & COHERENT != 0 { DeviceId::from_index(number) } else { None }
    }

    /// Whether it is in private memory of the asking device.
    const fn is_here(self) -> bool {
        self.0 & (LOCAL | COHERENT) == LOCAL
    }

    /// The translation that the device may have of a valid page.
    fn pte(self) -> Pte {
        match self.local_frame() {
            Some(pfn) if self.is_here() => Pte::frame(pfn, most(self.is_writable())),
            _ => Pte::host(if self.is_writable() { Access::Write } else { Access::Read }),
        }
    }

    /// The frame of the asking device that holds it, if one does.
    #[must_use]
    pub const fn local_frame(self) -> Option<DevPfn> {
        if self.0 & LOCAL != 0 { Some(DevPfn::new((self.0 >> PFN_SHIFT) as u32)) } else { None }
    }
}

/// How often pages are tried to be faulted in where faults of system calls are not served.
const POPULATE_ATTEMPTS: u32 = 64;

/// Sets entries for pages of one block: a single one where the block is one huge page.
fn install(table: &DeviceTable, part: PageRange, reports: &[PageReport]) -> Result<(), FaultError> {
    let first = reports[0];
    let alike = |r: &PageReport| {
        (r.order(), r.is_writable(), r.is_here()) == (BLOCK_ORDER, first.is_writable(), first.is_here())
    };
    let full = |full: TableFull| FaultError::TableFull { addr: full.addr };
    if part == PageRange::block_of(part.start()) && reports.iter().all(alike) {
        let pte = if first.is_here() { first.pte() } else { first.pte().for_block() };
        return table.set_block(part.start(), pte).map_err(full);
    }
    part.iter_pages().zip(reports).try_for_each(|(page, report)| table.set(page, report.pte()).map_err(full))
}

impl<O: Os> Core<O> {
    /// Reports each page of `range`; with `access`, faults in first what is not there.
    pub(crate) fn range_fault(
        &'static self,
        ctx: &mut Ctx,
        device: DeviceId,
        range: PageRange,
        access: Option<Access>,
        detail: Detail,
        report: &mut dyn FnMut(usize, PageReport),
    ) -> Result<(), FaultError> {
        let entry = self.devices.get(device).ok_or(FaultError::NoDevice)?;
        if let Some(access) = access {
            for part in range.iter_blocks() {
                self.fault_in(ctx, entry, part, access)?;
            }
        }
        let mut n = 0;
        for part in range.iter_blocks() {
            self.report_block(entry, part, access, detail, &mut |page_report| {
                report(n, page_report);
                n += 1;
            })?;
        }
        Ok(())
    }

    /// Makes every page of a range of one block valid for `access`.
    fn fault_in(
        &'static self,
        ctx: &mut Ctx,
        entry: &Entry,
        range: PageRange,
        access: Access,
    ) -> Result<(), FaultError> {
        let device = entry.id();
        let mut at = range.start();
        while let Ok(rest) = PageRange::from_ends(at, range.end()) {
            let vma = self.check_access(at, access)?;
            let piece = vma.range.intersection(rest).expect("the VMA holds the address");
            if let Some(block) = self.blocks.find(at) {
                // What is on other devices, or shared with a child, comes home; what is on this one stays.
                let mut foreign = PageSet::EMPTY;
                // A coherent device's pages are everybody's once they are mapped.
                let others =
                    |i: &usize| matches!(block.word(*i).place(), Place::Device { device: d, .. } if d != device);
                self.map_migrated(ctx, block, &PageSet::of(piece).iter().filter(others).collect());
                for i in PageSet::of(piece).iter() {
                    match block.word(i).place() {
                        Place::Device { device: d, pfn }
                            if d == device && (access == Access::Read || !entry.is_shared(pfn)) => {}
                        Place::Cpu | Place::Coherent { .. } => {}
                        Place::Poisoned { device } => return Err(FaultError::Poisoned { addr: block.page(i), device }),
                        Place::Device { .. } | Place::Staged { .. } => foreign.insert(i),
                    }
                }
                self.block_home(ctx, block, &foreign, Why::DeviceFault, &mut |_, _| {});
                let here: PageSet = PageSet::of(piece).iter().filter(|&i| block.word(i).is_mapped()).collect();
                for run in here.runs() {
                    self.populate(ctx, block.run(run), access)?;
                }
            } else {
                self.populate(ctx, piece, access)?;
            }
            at = piece.end();
        }
        Ok(())
    }

    /// Faults the pages of `range` in for `access` and installs their translations in the device's page table, block by
    /// block. The table is the device's own, as in [`Core::device_fault`]. Pages that are on the device stay there.
    pub(crate) fn map_range(
        &'static self,
        ctx: &mut Ctx,
        (device, table): (DeviceId, &'static DeviceTable),
        range: PageRange,
        access: Access,
        detail: Detail,
    ) -> Result<(), FaultError> {
        let _translating = self.begin_translating();
        for part in range.iter_blocks() {
            let start = Instant::now();
            loop {
                let left = budget_left(start, part.start())?;
                let entry = self.devices.with_table(device, table).ok_or(FaultError::NoDevice)?;
                match self.fault_in(ctx, entry, part, access) {
                    // A page has left again meanwhile.
                    Err(FaultError::Kernel { errno: Errno::INTR | Errno::AGAIN, .. }) => continue,
                    done => done?,
                }
                let seq = self.begin_translation(entry, part.start(), left)?;
                // Who holds a page may have had its translations given up already.
                let is_held = |block: Block| PageSet::of(part).iter().any(|i| block.word(i).locked());
                if self.blocks.find(part.start()).is_some_and(is_held) {
                    std::thread::yield_now();
                    continue;
                }
                let mut reports = [PageReport::NONE; BLOCK_PAGES];
                let mut places = reports.iter_mut();
                self.report_block(entry, part, Some(access), detail, &mut |report| {
                    *places.next().expect("one for each page") = report;
                })?;
                let reports = &reports[..part.pages()];
                let allows = |r: &PageReport| r.is_valid() && (access == Access::Read || r.is_writable());
                if !reports.iter().all(allows) {
                    // It has left again.
                    continue;
                }
                if let Ok(_update) = self.notifiers.commit(entry.subscription(), seq) {
                    install(table, part, reports)?;
                    break;
                }
            }
        }
        Ok(())
    }

    /// Faults pages of one block in.
    pub(crate) fn populate_pages(&'static self, ctx: &mut Ctx, range: PageRange, access: Access) -> Result<(), Errno> {
        let mut attempt = 0;
        loop {
            let populated = match access {
                Access::Read => self.os.populate_read(range),
                Access::Write | Access::Atomic => self.os.populate_write(range),
            };
            if populated == Err(Errno::INVAL) && attempt < POPULATE_ATTEMPTS {
                // The kernel's answer where the mapping does not allow it, as it may for a moment.
                self.check_access(range.start(), access).map_err(|error| match error {
                    FaultError::NoVma { .. } => Errno::NOMEM,
                    _ => Errno::ACCESS,
                })?;
                attempt += 1;
                continue;
            }
            let block = self.blocks.find(range.start());
            let (Err(Errno::FAULT), Some(block)) = (populated, block) else { return populated };
            if self.os.serves_kernel_faults() || attempt == POPULATE_ATTEMPTS {
                return populated;
            }
            if PageSet::of(range).iter().any(|i| !block.word(i).is_mapped()) {
                // Gone meanwhile: the caller looks again.
                return Err(Errno::AGAIN);
            }
            // The kernel asks no handler for a page that a system call touches. So holes of registered memory are filled
            // as a handler would; not another userfaultfd's, which the kernel would let us fill.
            if self.os.is_registered(range) && self.os.register(range, MANAGED) == Err(Errno::BUSY) {
                return populated;
            }
            for i in PageSet::of(range).iter().filter(|&i| block.word(i).is_cpu()) {
                let _ = self.fill_hole(ctx, block, i);
            }
            self.settle_events(ctx, attempt);
            attempt += 1;
        }
    }

    pub(crate) fn populate(&'static self, ctx: &mut Ctx, range: PageRange, access: Access) -> Result<(), FaultError> {
        let addr = range.start();
        let populated = self.populate_pages(ctx, range, access);
        populated.map_err(|errno| match errno {
            Errno::NOMEM => FaultError::NoVma { addr },
            Errno::FAULT | Errno::ACCESS => FaultError::Denied { addr },
            errno => FaultError::Kernel { addr, errno },
        })
    }

    /// Reports the pages of a range of one block as they are.
    fn report_block(
        &self,
        entry: &Entry,
        range: PageRange,
        asked: Option<Access>,
        detail: Detail,
        report: &mut dyn FnMut(PageReport),
    ) -> Result<(), FaultError> {
        let mut at = range.start();
        while let Ok(rest) = PageRange::from_ends(at, range.end()) {
            let vma = self.os.vma(at).map_err(|errno| FaultError::Kernel { addr: at, errno })?;
            let Some((vma, piece)) = vma.and_then(|v| v.range.intersection(rest).map(|piece| (v, piece))) else {
                rest.iter_pages().for_each(|_| report(PageReport::IMPOSSIBLE));
                break;
            };
            if let Ok(gap) = PageRange::from_ends(at, piece.start()) {
                gap.iter_pages().for_each(|_| report(PageReport::IMPOSSIBLE));
            }
            let mut pages = [Page::empty(); BLOCK_PAGES];
            let pages = &mut pages[..piece.pages()];
            let failed = |errno| FaultError::Kernel { addr: piece.start(), errno };
            self.os.scan(piece, pages).map_err(failed)?;
            if detail == Detail::Exact && vma.prot.contains(Prot::WRITE) {
                self.os.mark_exclusive(piece, vma.page_size, pages).map_err(failed)?;
            }
            let block = self.blocks.find(piece.start());
            let uniform = vma.range.contains_range(PageRange::block_of(piece.start()));
            let unit = if uniform { self.unit(entry, piece.start()) } else { None };
            for (page, flags) in piece.iter_pages().zip(pages.iter()) {
                let word = block.map(|block| block.word(page.page_in_block()));
                let place = match word {
                    // On its way home and there already: the thread that touched it may have gone on.
                    Some(word) if word.locked() && flags.contains(Page::PRESENT) && !word.is_mapped() => Place::Cpu,
                    Some(word) => word.place(),
                    None => Place::Cpu,
                };
                report(self.page_report(entry, &vma, place, unit.is_some(), *flags, asked));
            }
            at = piece.end();
        }
        Ok(())
    }

    /// `unit`: whether the page's block is in device memory as one huge page.
    fn page_report(
        &self,
        entry: &Entry,
        vma: &Vma,
        place: Place,
        unit: bool,
        flags: Page,
        asked: Option<Access>,
    ) -> PageReport {
        if !vma.prot.contains(Prot::READ) {
            return PageReport::IMPOSSIBLE;
        }
        let writable = vma.prot.contains(Prot::WRITE);
        match place {
            Place::Device { device, pfn } if device == entry.id() => {
                let write = if writable && !entry.is_shared(pfn) { WRITE } else { 0 };
                let huge = if unit { HUGE } else { 0 };
                PageReport(VALID | LOCAL | write | huge | u64::from(pfn.get()) << PFN_SHIFT)
            }
            Place::Device { .. } | Place::Staged { .. } => PageReport::NONE,
            Place::Poisoned { .. } => PageReport::IMPOSSIBLE,
            Place::Cpu | Place::Coherent { .. } if !flags.contains(Page::PRESENT) => PageReport::NONE,
            Place::Cpu | Place::Coherent { .. } => {
                let zero = if flags.contains(Page::ZERO) { ZERO } else { 0 };
                let huge =
                    if flags.contains(Page::HUGE) || vma.page_size > uhmm_sys::addr::PAGE_SIZE { HUGE } else { 0 };
                // After a write fault a page's entry is writable, and where the kernel was asked and says so. When in doubt:
                // not, and the device asks for a write fault.
                let faulted = asked.is_some_and(|a| a > Access::Read) || flags.contains(Page::ANON_EXCLUSIVE);
                let write = if faulted && writable { WRITE } else { 0 };
                let on_device = match place {
                    Place::Coherent { device, pfn } => {
                        let local = if device == entry.id() { LOCAL } else { 0 };
                        COHERENT | local | (device.index() as u64) << DEVICE_SHIFT | u64::from(pfn.get()) << PFN_SHIFT
                    }
                    _ => 0,
                };
                PageReport(VALID | zero | huge | write | on_device)
            }
        }
    }

    /// Installs translations for pages of `range` that are on the device: after a migration, so that its first access
    /// need not fault. Gives up quietly where anything changes meanwhile; the access then faults.
    pub(crate) fn map_local(&'static self, entry: &'static Entry, range: PageRange) {
        let _translating = self.begin_translating();
        for part in range.iter_blocks() {
            let Some(block) = self.blocks.find(part.start()) else { continue };
            let Ok(seq) = self.notifiers.read_begin(entry.subscription()) else { return };
            if !entry.is_live() {
                return;
            }
            // A change that was announced is not over: what is found now will not be so.
            if self.changes.any_in(PageRange::block_of(part.start())) {
                continue;
            }
            let Ok(Some(vma)) = self.os.vma(part.start()) else { continue };
            let Some(part) = vma.range.intersection(part) else { continue };
            let writable = vma.prot.contains(Prot::WRITE);
            if !vma.prot.contains(Prot::READ) {
                continue;
            }
            let local: PageSet = PageSet::of(part)
                .iter()
                .filter(|&i| matches!(block.word(i).place(), Place::Device { device, .. } if device == entry.id()))
                .collect();
            if span(&local).is_none() {
                continue;
            }
            let uniform = part == PageRange::block_of(part.start());
            let unit = if uniform { self.unit(entry, part.start()) } else { None };
            let Ok(_update) = self.notifiers.commit(entry.subscription(), seq) else { continue };
            if let Some(first) = unit {
                let _ = entry.table().set_block(part.start(), Pte::frame(first, most(writable)));
                continue;
            }
            for i in local.iter() {
                let word = block.word(i);
                if let Place::Device { device, pfn } = word.place()
                    && device == entry.id()
                    && !word.locked()
                {
                    let pte = Pte::frame(pfn, most(writable && !entry.is_shared(pfn)));
                    let _ = entry.table().set(block.page(i), pte);
                }
            }
        }
    }
}
