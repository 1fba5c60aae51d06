//! The page table of one device: what the device finds at a virtual address of the program.
//!
//! Entries are for a page or for a block of 2 MiB. An entry names a frame of the device, or says that the page is in
//! host memory, where the device reaches it by its virtual address; and it says what the device may do there. No
//! entry means that the device has to fault.
//!
//! ```text
//!   block number (26 bits):  top directory  ->  leaf directory  ->  slot:  0          no entry in the block
//!                            13 bits            13 bits                    block entry
//!                                                                          table + generation -> 512 page entries
//! ```
//!
//! # Concurrency
//! A lookup takes no lock. Writers take turns by an internal lock, for one block at a time. What orders a change
//! against the snapshot that it came from is the [`notifier`](crate::notifier), not this table.
//!
//! Tables are recycled between blocks, so a lookup that was overtaken could read another block's entry. It therefore
//! loads the slot again after the entry and starts again unless nothing has changed. A table's generation is part of
//! the slot, so a slot that changed and came back differs. The writer changes the slot before it gives the table
//! away, and an entry of the new owner is loaded with acquire ordering, so whoever sees one also sees the changed slot.
//!
//! # Not supported
//! Sizes between a page and a block: a device that can use them finds neighbours by [`DeviceTable::for_each`].
//! Leaf directories are never given back; one covers 16 GiB of addresses, and a program uses few.
//!
//! # Kernel
//! Each driver's own page table there, for which `lib/test_hmm.c` has an xarray.

use std::fmt;

use thiserror::Error;
use uhmm_sys::addr::{PAGE_SHIFT, PAGE_SIZE, PageRange, TASK_SIZE, VirtAddr};

use crate::{
    device::DevPfn,
    sync::{AtomicU32, AtomicU64, Mutex, Ordering, Words, WordsNeeded, lock, spin},
};

/// Pages in a block. Tiny under loom, so that every interleaving can be tried.
pub const TABLE_PAGES: usize = if cfg!(loom) { 2 } else { 512 };
/// log2 of [`TABLE_PAGES`]: the order of a block entry.
pub const BLOCK_ORDER: u32 = TABLE_PAGES.ilog2();
const BLOCK_BYTES: u64 = PAGE_SIZE << BLOCK_ORDER;
const LEAF_SLOTS: usize = if cfg!(loom) { 2 } else { 1 << 13 };
const LEAF_BYTES: u64 = BLOCK_BYTES * LEAF_SLOTS as u64;
const TOP_SLOTS: usize = if cfg!(loom) { 2 } else { 1 << 13 };
/// First address that the table cannot hold.
const SPAN: u64 = LEAF_BYTES * TOP_SLOTS as u64;
const _: () = assert!(cfg!(loom) || SPAN == TASK_SIZE);

/// What a device may do through an entry. Each includes the ones before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// Load.
    Read,
    /// Load and store.
    Write,
    /// Load, store and atomic operations, which no CPU thread can interleave with.
    Atomic,
}

/// An entry of a device's page table.
///
/// # Invariants
/// Zero is no entry. Otherwise `VALID` is set, `ATOMIC` implies `WRITE`, `EXCLUSIVE` implies
/// `HOST`, and there is a frame number unless `HOST`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Pte(u64);

impl Pte {
    /// No entry: the device faults.
    pub const NONE: Self = Self(0);

    const VALID: u64 = 1;
    const WRITE: u64 = 1 << 1;
    const ATOMIC: u64 = 1 << 2;
    const HOST: u64 = 1 << 3;
    const BLOCK: u64 = 1 << 4;
    const EXCLUSIVE: u64 = 1 << 5;
    const PFN_SHIFT: u32 = 16;

    /// An entry for a frame of the device's own memory.
    #[must_use]
    pub const fn frame(pfn: DevPfn, access: Access) -> Self {
        Self((pfn.get() as u64) << Self::PFN_SHIFT | Self::access_bits(access))
    }

    /// An entry for a page that stays in host memory: the device reaches it by its virtual address.
    #[must_use]
    pub const fn host(access: Access) -> Self {
        Self(Self::HOST | Self::access_bits(access))
    }

    /// An entry for a page of host memory that the device holds exclusively: no CPU thread reaches it meanwhile.
    #[must_use]
    pub const fn exclusive(access: Access) -> Self {
        Self(Self::HOST | Self::EXCLUSIVE | Self::access_bits(access))
    }

    const fn access_bits(access: Access) -> u64 {
        match access {
            Access::Read => Self::VALID,
            Access::Write => Self::VALID | Self::WRITE,
            Access::Atomic => Self::VALID | Self::WRITE | Self::ATOMIC,
        }
    }

    /// Whether there is no entry.
    #[must_use]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Whether the page is in host memory.
    #[must_use]
    pub const fn is_host(self) -> bool {
        self.0 & Self::HOST != 0
    }

    /// Whether the device holds the page exclusively.
    #[must_use]
    pub const fn is_exclusive(self) -> bool {
        self.0 & Self::EXCLUSIVE != 0
    }

    /// The frame, if the page is in the device's memory.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "a frame number has 32 bits, and the bits above them are 0")]
    pub const fn pfn(self) -> Option<DevPfn> {
        if self.is_none() || self.is_host() { None } else { Some(DevPfn::new((self.0 >> Self::PFN_SHIFT) as u32)) }
    }

    /// What the device may do, if there is an entry.
    #[must_use]
    pub const fn access(self) -> Option<Access> {
        if self.is_none() {
            None
        } else if self.0 & Self::ATOMIC != 0 {
            Some(Access::Atomic)
        } else if self.0 & Self::WRITE != 0 {
            Some(Access::Write)
        } else {
            Some(Access::Read)
        }
    }

    /// Whether the device may do `access` without a fault.
    #[must_use]
    pub fn allows(self, access: Access) -> bool {
        self.access().is_some_and(|most| most >= access)
    }

    /// [`BLOCK_ORDER`] if the entry is one for a whole block, else 0.
    #[must_use]
    pub const fn order(self) -> u32 {
        if self.0 & Self::BLOCK != 0 { BLOCK_ORDER } else { 0 }
    }

    /// The same without permission to change the page.
    #[must_use]
    pub const fn read_only(self) -> Self {
        Self(self.0 & !(Self::WRITE | Self::ATOMIC))
    }

    /// The same for a whole block, as [`DeviceTable::set_block`] sets it: of a frame, the block's first.
    #[must_use]
    pub const fn for_block(self) -> Self {
        Self(self.0 | Self::BLOCK)
    }

    /// What this entry, found for one page, says of the page `pages` further on (or back), which is in the same block: the
    /// frame moves along. For entries of [`BLOCK_ORDER`], of which one look-up serves all pages.
    #[must_use]
    pub const fn further(self, pages: i64) -> Self {
        if self.is_none() || self.is_host() {
            return self;
        }
        Self(self.0.wrapping_add_signed(pages << Self::PFN_SHIFT))
    }

    const fn as_page(self) -> Self {
        Self(self.0 & !Self::BLOCK)
    }

    /// What a block entry says of the block's `n`th page.
    #[expect(clippy::cast_possible_wrap, reason = "a page's number in a block is below 512")]
    const fn nth(self, n: usize) -> Self {
        self.further(n as i64)
    }
}

impl fmt::Debug for Pte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(access) = self.access() else { return write!(f, "Pte(none)") };
        match self.pfn() {
            Some(pfn) => write!(f, "Pte(frame {} {access:?} order {})", pfn.get(), self.order()),
            None if self.is_exclusive() => write!(f, "Pte(exclusive {access:?} order {})", self.order()),
            None => write!(f, "Pte(host {access:?} order {})", self.order()),
        }
    }
}

/// The memory of a [`DeviceTable`] is used up. The page has no entry now: the device can do one access by what it has
/// just learnt, and faults again for the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{addr}: no memory left for device page tables")]
pub struct TableFull {
    /// The page or block that has no entry.
    pub addr: VirtAddr,
}

/// A slot's content, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Empty,
    Block(Pte),
    Table(u32),
}

/// Marks a slot that holds a table: its number in the low half, its generation in the bits between.
const TABLE: u64 = 1 << 63;
const GENERATION_MAX: u32 = (1 << 31) - 1;

impl Slot {
    #[expect(clippy::cast_possible_truncation, reason = "the table's number is the low half")]
    const fn decode(word: u64) -> Self {
        if word & TABLE != 0 {
            Self::Table(word as u32)
        } else if word == 0 {
            Self::Empty
        } else {
            Self::Block(Pte(word))
        }
    }
}

/// Where a page's entry is.
#[derive(Debug, Clone, Copy)]
struct Place {
    top: usize,
    leaf: usize,
    page: usize,
}

impl Place {
    fn of(addr: VirtAddr) -> Option<Self> {
        (addr.get() < SPAN).then(|| Self {
            top: index(addr.get() / LEAF_BYTES),
            leaf: index(addr.get() / BLOCK_BYTES) % LEAF_SLOTS,
            page: index(addr.get() >> PAGE_SHIFT) % TABLE_PAGES,
        })
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a page number of a 47-bit address fits a 64-bit usize")]
const fn index(n: u64) -> usize {
    n as usize
}

/// What only writers use.
#[derive(Debug)]
struct Writer {
    /// Leaf directories handed out.
    leaves: u32,
    /// Tables handed out for the first time.
    fresh: u32,
    /// First free table and one, linked through the tables' counts; 0 for none.
    free: u32,
    /// Of the table handed out last.
    generation: u32,
}

/// Which pages of a block a change concerns, `from..to`.
#[derive(Debug, Clone, Copy)]
struct Part {
    from: usize,
    to: usize,
}

impl Part {
    fn is_whole(self) -> bool {
        self.to - self.from == TABLE_PAGES
    }

    fn contains(self, page: usize) -> bool {
        self.from <= page && page < self.to
    }
}

/// A device's page table. See the module's documentation.
pub struct DeviceTable {
    writer: Mutex<Writer>,
    /// Number of entries, changed by the writer only.
    entries: AtomicU64,
    /// Number of a leaf directory and one, for each part of the address space.
    top: &'static [AtomicU32],
    /// Slots of all leaf directories.
    leaves: &'static [AtomicU64],
    /// Entries of all tables.
    tables: &'static [AtomicU64],
    /// For a table in use the number of its entries, for a free one the next free table and one.
    counts: &'static [AtomicU32],
}

impl fmt::Debug for DeviceTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceTable({} entries)", self.entries())
    }
}

impl DeviceTable {
    /// Memory that [`DeviceTable::new`] wants: 64 KiB for each leaf directory, which covers 16 GiB of addresses, and
    /// 4 KiB for each table of page entries. Only what is used is touched.
    #[must_use]
    pub const fn storage_needed(leaves: u32, tables: u32) -> WordsNeeded {
        WordsNeeded {
            words32: TOP_SLOTS + tables as usize,
            words64: leaves as usize * LEAF_SLOTS + tables as usize * TABLE_PAGES,
        }
    }

    /// Makes an empty table in zeroed storage, with room for `leaves` leaf directories and `tables` tables.
    ///
    /// # Panics
    /// If `storage` is smaller than [`DeviceTable::storage_needed`].
    #[must_use]
    pub fn new(leaves: u32, tables: u32, storage: Words) -> Self {
        let needed = Self::storage_needed(leaves, tables);
        assert!(storage.words32.len() >= needed.words32, "too few 32-bit words for {tables} tables");
        assert!(storage.words64.len() >= needed.words64, "too few 64-bit words for {tables} tables");
        let (words32, words64) = storage.atomics();
        let (top, rest) = words32.split_at(TOP_SLOTS);
        let counts = &rest[..tables as usize];
        let (leaves, rest) = words64.split_at(leaves as usize * LEAF_SLOTS);
        let tables = &rest[..tables as usize * TABLE_PAGES];
        let writer = Mutex::new(Writer { leaves: 0, fresh: 0, free: 0, generation: 0 });
        Self { writer, entries: AtomicU64::new(0), top, leaves, tables, counts }
    }

    /// What the device finds at `addr`. Of a block entry it is the part for this page, with the block's order.
    ///
    /// # Locking
    /// None. It starts again only when a writer has changed the block's slot meanwhile.
    #[must_use]
    pub fn lookup(&self, addr: VirtAddr) -> Pte {
        let Some(place) = Place::of(addr) else { return Pte::NONE };
        let Some(slot) = self.slot(place) else { return Pte::NONE };
        self.entry(slot, place.page)
    }

    fn entry(&self, slot: &AtomicU64, page: usize) -> Pte {
        loop {
            let seen = slot.load(Ordering::Acquire);
            let entry = match Slot::decode(seen) {
                Slot::Empty => return Pte::NONE,
                Slot::Block(pte) => return pte.nth(page),
                Slot::Table(table) => Pte(self.table(table)[page].load(Ordering::Acquire)),
            };
            // Another block's entry was stored after this slot had changed, so the second load cannot miss it.
            if slot.load(Ordering::Acquire) == seen {
                return entry;
            }
            spin();
        }
    }

    /// Sets the entry of the page at `addr`. A block entry there is split: its other pages keep their frames.
    /// [`Pte::NONE`] removes the entry.
    ///
    /// # Errors
    /// [`TableFull`]; the page then has no entry, nor has any other of a block that could not be split.
    ///
    /// # Locking
    /// Takes the table's own lock. The caller holds an [`UpdateGuard`](crate::notifier::UpdateGuard), or moves the
    /// page itself.
    pub fn set(&self, addr: VirtAddr, pte: Pte) -> Result<(), TableFull> {
        let full = TableFull { addr };
        let place = Place::of(addr).ok_or(full)?;
        let pte = pte.as_page();
        if pte.is_none() {
            self.clear(PageRange::page_of(addr));
            return Ok(());
        }
        let mut writer = lock(&self.writer);
        let slot = self.make_slot(&mut writer, place).ok_or(full)?;
        let table = match Slot::decode(slot.load(Ordering::Relaxed)) {
            Slot::Table(table) => table,
            Slot::Empty => {
                let table = self.take_table(&mut writer).ok_or(full)?;
                self.table(table)[place.page].store(pte.0, Ordering::Release);
                self.set_count(table, 1);
                self.change_entries(1, 0);
                self.publish(&writer, slot, table);
                return Ok(());
            }
            Slot::Block(block) => {
                let part = Part { from: place.page, to: place.page + 1 };
                if self.split(&mut writer, slot, block, |page, old| if part.contains(page) { pte } else { old }) {
                    return Ok(());
                }
                // What the block says of this page is out of date, and it cannot be told from the rest.
                slot.store(0, Ordering::Release);
                self.change_entries(0, 1);
                return Err(full);
            }
        };
        let old = self.table(table)[place.page].swap(pte.0, Ordering::AcqRel);
        if old == 0 {
            self.set_count(table, self.count(table) + 1);
            self.change_entries(1, 0);
        }
        Ok(())
    }

    /// Sets one entry for the whole block that holds `addr`, in place of what was there. `pte` is the one of the
    /// block's first page. [`Pte::NONE`] removes all entries of the block.
    ///
    /// # Errors
    /// [`TableFull`], if there was no entry near and none can be made.
    ///
    /// # Locking
    /// As [`DeviceTable::set`].
    pub fn set_block(&self, addr: VirtAddr, pte: Pte) -> Result<(), TableFull> {
        let full = TableFull { addr };
        let place = Place::of(addr).ok_or(full)?;
        let word = if pte.is_none() { 0 } else { pte.for_block().0 };
        let mut writer = lock(&self.writer);
        let slot = self.make_slot(&mut writer, place).ok_or(full)?;
        self.replace(&mut writer, slot, word);
        if word != 0 {
            self.change_entries(1, 0);
        }
        Ok(())
    }

    /// Removes every entry of `range`, and says whether there was any. A block entry that is covered in part is
    /// split, and the pages outside keep their frames; where no memory is left for that, all of it goes, and the
    /// device faults for the rest.
    ///
    /// When it returns, lookups that begin find nothing in the range. What a device looked up before is for
    /// [`Device::flush`](crate::device::Device::flush) to wait for.
    ///
    /// # Locking
    /// Takes the table's own lock, for one block at a time.
    pub fn clear(&self, range: PageRange) -> bool {
        let mut any = false;
        self.each_slot(range, |slot, _, part| {
            let mut writer = lock(&self.writer);
            match Slot::decode(slot.load(Ordering::Relaxed)) {
                Slot::Empty => {}
                Slot::Block(block) => {
                    any = true;
                    let keep = |page, old| if part.contains(page) { Pte::NONE } else { old };
                    if part.is_whole() || !self.split(&mut writer, slot, block, keep) {
                        self.replace(&mut writer, slot, 0);
                    }
                }
                Slot::Table(_) if part.is_whole() => {
                    any = true;
                    self.replace(&mut writer, slot, 0);
                }
                Slot::Table(table) => {
                    let gone = self.table(table)[part.from..part.to]
                        .iter()
                        .filter(|entry| entry.swap(0, Ordering::AcqRel) != 0)
                        .fold(0, |n, _| n + 1);
                    any |= gone > 0;
                    self.change_entries(0, gone);
                    self.set_count(table, self.count(table) - gone);
                    if self.count(table) == 0 {
                        self.replace(&mut writer, slot, 0);
                    }
                }
            }
        });
        any
    }

    /// Takes the permission to write, and for atomics, from every entry of `range`, and says whether any had it. A
    /// block entry that is covered in part is split, or loses it as a whole where no memory is left for that.
    ///
    /// # Locking
    /// As [`DeviceTable::clear`].
    pub fn restrict(&self, range: PageRange) -> bool {
        let mut any = false;
        self.each_slot(range, |slot, _, part| {
            let mut writer = lock(&self.writer);
            match Slot::decode(slot.load(Ordering::Relaxed)) {
                Slot::Block(block) if block.allows(Access::Write) => {
                    any = true;
                    let keep = |page, old: Pte| if part.contains(page) { old.read_only() } else { old };
                    if part.is_whole() || !self.split(&mut writer, slot, block, keep) {
                        slot.store(block.read_only().0, Ordering::Release);
                    }
                }
                Slot::Table(table) => {
                    for entry in &self.table(table)[part.from..part.to] {
                        let old = Pte(entry.load(Ordering::Relaxed));
                        if old.allows(Access::Write) {
                            any = true;
                            entry.store(old.read_only().0, Ordering::Release);
                        }
                    }
                }
                Slot::Empty | Slot::Block(_) => {}
            }
        });
        any
    }

    /// Shows every entry in `range`, ascending: a page and its entry or, once for each block entry, the part of the
    /// block that lies in the range with the entry of that part's first page.
    ///
    /// # Locking
    /// None, so each entry is true by itself only. Nothing is held while `f` runs.
    pub fn for_each(&self, range: PageRange, mut f: impl FnMut(PageRange, Pte)) {
        self.each_slot(range, |slot, start, part| {
            let mut page = part.from;
            while page < part.to {
                let entry = self.entry(slot, page);
                let pages = if entry.order() > 0 { part.to - page } else { 1 };
                if !entry.is_none() {
                    let first = start.add((page as u64) << PAGE_SHIFT);
                    let run = PageRange::new(first, (pages as u64) << PAGE_SHIFT).expect("lies inside a PageRange");
                    f(run, entry);
                }
                page += pages;
            }
        });
    }

    /// Number of entries. A block entry counts once.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.entries.load(Ordering::Relaxed)
    }

    /// Shows every slot of `range` that is not empty, with its block's address and the pages concerned.
    fn each_slot(&self, range: PageRange, mut f: impl FnMut(&AtomicU64, VirtAddr, Part)) {
        let end = range.end().get().min(SPAN);
        let mut at = range.start().get();
        while at < end {
            let place = Place::of(VirtAddr::new(at)).expect("below SPAN");
            let Some(slot) = self.slot(place) else {
                at = (at / LEAF_BYTES + 1) * LEAF_BYTES;
                continue;
            };
            let block = at / BLOCK_BYTES * BLOCK_BYTES;
            let next = block + BLOCK_BYTES;
            // Entries that the caller has to find were set before it called, so the load cannot miss them.
            if slot.load(Ordering::Acquire) != 0 {
                let part = Part { from: place.page, to: index((end.min(next) - block) >> PAGE_SHIFT) };
                f(slot, VirtAddr::new(block), part);
            }
            at = next;
        }
    }

    fn slot(&self, place: Place) -> Option<&AtomicU64> {
        let leaf = self.top[place.top].load(Ordering::Acquire).checked_sub(1)?;
        Some(&self.leaves[leaf as usize * LEAF_SLOTS + place.leaf])
    }

    /// The slot of a place, in a new leaf directory if there is none.
    fn make_slot(&self, writer: &mut Writer, place: Place) -> Option<&AtomicU64> {
        if self.slot(place).is_none() {
            if writer.leaves as usize == self.leaves.len() / LEAF_SLOTS {
                return None;
            }
            writer.leaves += 1;
            self.top[place.top].store(writer.leaves, Ordering::Release);
        }
        self.slot(place)
    }

    fn table(&self, table: u32) -> &[AtomicU64] {
        &self.tables[table as usize * TABLE_PAGES..][..TABLE_PAGES]
    }

    fn count(&self, table: u32) -> u32 {
        self.counts[table as usize].load(Ordering::Relaxed)
    }

    fn set_count(&self, table: u32, count: u32) {
        self.counts[table as usize].store(count, Ordering::Relaxed);
    }

    fn change_entries(&self, more: u32, fewer: u32) {
        let now = self.entries.load(Ordering::Relaxed) + u64::from(more) - u64::from(fewer);
        self.entries.store(now, Ordering::Relaxed);
    }

    /// Takes a table without entries, and begins its generation.
    fn take_table(&self, writer: &mut Writer) -> Option<u32> {
        let table = match writer.free.checked_sub(1) {
            Some(table) => {
                writer.free = self.count(table);
                table
            }
            None if (writer.fresh as usize) < self.counts.len() => {
                writer.fresh += 1;
                writer.fresh - 1
            }
            None => return None,
        };
        writer.generation = (writer.generation + 1) & GENERATION_MAX;
        Some(table)
    }

    /// Makes the table that was taken last the content of a slot.
    fn publish(&self, writer: &Writer, slot: &AtomicU64, table: u32) {
        slot.store(TABLE | u64::from(writer.generation) << 32 | u64::from(table), Ordering::Release);
    }

    /// Puts `word`, no table, into a slot, and gives back the table that was there.
    fn replace(&self, writer: &mut Writer, slot: &AtomicU64, word: u64) {
        let old = slot.swap(word, Ordering::AcqRel);
        match Slot::decode(old) {
            Slot::Empty => {}
            Slot::Block(_) => self.change_entries(0, 1),
            Slot::Table(table) => {
                self.change_entries(0, self.count(table));
                for entry in self.table(table) {
                    if entry.load(Ordering::Relaxed) != 0 {
                        entry.store(0, Ordering::Release);
                    }
                }
                self.set_count(table, writer.free);
                writer.free = table + 1;
            }
        }
    }

    /// Replaces a block entry by page entries, as `page_fn` wants them; whether there was a table for them.
    fn split(&self, writer: &mut Writer, slot: &AtomicU64, block: Pte, page_fn: impl Fn(usize, Pte) -> Pte) -> bool {
        let Some(table) = self.take_table(writer) else { return false };
        let mut count = 0;
        for (page, entry) in self.table(table).iter().enumerate() {
            let pte = page_fn(page, block.nth(page).as_page());
            if !pte.is_none() {
                entry.store(pte.0, Ordering::Release);
                count += 1;
            }
        }
        self.set_count(table, count);
        self.change_entries(count, 1);
        self.publish(writer, slot, table);
        true
    }
}
