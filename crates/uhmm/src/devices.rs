//! The devices of an address space: what the engine keeps of each.

use std::sync::{
    RwLock,
    atomic::{
        AtomicU32, AtomicU64,
        Ordering::{AcqRel, Acquire, Release, SeqCst},
        fence,
    },
};

use uhmm_sys::{
    Errno,
    addr::{PageRange, VirtAddr},
    arena,
};

use crate::{
    device::{DevPfn, Device, DeviceId, FrameRun, MemoryKind, MemorySpec},
    device_table::DeviceTable,
    family::{Ledger, Member},
    notifier::Subscription,
    pgmap::Pgmap,
    sync::Words,
};

const LIVE: u32 = 0;
const LEAVING: u32 = 1;

/// One registered device.
pub(crate) struct Entry {
    id: DeviceId,
    device: &'static dyn Device,
    memory: Option<Memory>,
    /// This process.
    member: Member,
    survives_fork: bool,
    table: &'static DeviceTable,
    subscription: Subscription,
    state: AtomicU32,
}

/// A device's memory, and what processes share of the books on it.
pub(crate) struct Memory {
    pgmap: Pgmap,
    shared: SharedBooks,
    kind: MemoryKind,
    /// Where the frames are, if pages are mapped from them.
    range: Option<PageRange>,
}

/// What a forked child has in common with its parent: the words of the pgmap, and who holds which frames.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SharedBooks {
    words: Words,
    ledger: Ledger,
}

impl SharedBooks {
    /// Books on a device of `frames` frames.
    pub(crate) fn new(frames: u32) -> Result<Self, Errno> {
        let needed = Pgmap::storage_needed(frames);
        let words = Words {
            words32: uhmm_sys::mem::shared_slice(needed.words32)?,
            words64: uhmm_sys::mem::shared_slice(needed.words64)?,
        };
        Ok(Self { words, ledger: Ledger::new(frames)? })
    }
}

impl Memory {
    pub(crate) fn new(id: DeviceId, spec: &MemorySpec, shared: SharedBooks, range: Option<PageRange>) -> Self {
        Self { pgmap: Pgmap::new(id, spec.frames, shared.words), shared, kind: spec.kind, range }
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry").field("id", &self.id).field("name", &self.device.name()).finish_non_exhaustive()
    }
}

impl Entry {
    pub(crate) fn new(
        id: DeviceId,
        device: &'static dyn Device,
        memory: Option<Memory>,
        member: Member,
        survives_fork: bool,
        table: &'static DeviceTable,
        subscription: Subscription,
    ) -> Self {
        Self { id, device, memory, member, survives_fork, table, subscription, state: AtomicU32::new(LIVE) }
    }

    /// Where the frames are, if pages are mapped from them.
    pub(crate) fn coherent_range(&self) -> Option<PageRange> {
        self.memory.as_ref()?.range
    }

    /// Whether a page may go there, and RAM of the process is freed by it: coherent memory is anonymous memory of its own.
    pub(crate) fn frees_ram(&self) -> bool {
        self.is_live() && self.memory.as_ref().is_some_and(|memory| memory.kind != MemoryKind::Coherent)
    }

    /// Whether a forked child can use the frames.
    pub(crate) const fn survives_fork(&self) -> bool {
        self.survives_fork
    }

    /// The books, for a forked child.
    pub(crate) fn shared_books(&self) -> Option<SharedBooks> {
        self.memory.as_ref().map(|memory| memory.shared)
    }

    pub(crate) const fn id(&self) -> DeviceId {
        self.id
    }

    pub(crate) fn device(&self) -> &'static dyn Device {
        self.device
    }

    pub(crate) const fn table(&self) -> &'static DeviceTable {
        self.table
    }

    pub(crate) const fn subscription(&self) -> &Subscription {
        &self.subscription
    }

    pub(crate) fn pgmap(&self) -> Option<&Pgmap> {
        self.memory.as_ref().map(|memory| &memory.pgmap)
    }

    /// Frames for up to `pages` pages: for a whole block one unit if there is one, so that one translation serves it, else as
    /// long a run as is cheap. `None` when the device is full or leaving.
    pub(crate) fn alloc(&self, pages: usize) -> Option<FrameRun> {
        let Memory { pgmap, shared, .. } = self.memory.as_ref()?;
        if self.state.load(Acquire) != LIVE {
            return None;
        }
        let unit = if pages == uhmm_sys::addr::BLOCK_PAGES { pgmap.alloc_huge() } else { None };
        let frames = match unit {
            // Kept as single frames: each page may later leave by itself, and the run stays contiguous meanwhile.
            Some(first) => pgmap.split(first).ok(),
            None => pgmap.alloc_run(u32::try_from(pages).expect("at most a block")),
        }?;
        shared.ledger.note(self.member, frames);
        Some(frames)
    }

    /// Gives frames back; those that nobody shares become free.
    pub(crate) fn free(&self, frames: FrameRun) {
        self.free_of(self.member, frames);
    }

    /// Gives frames back that `member` has a reference to.
    pub(crate) fn free_of(&self, member: Member, frames: FrameRun) {
        let Some(Memory { pgmap, shared, .. }) = &self.memory else { return };
        shared.ledger.strike(member, frames);
        pgmap.put_run(frames, |run| self.device.freed(run));
    }

    /// Adds a reference to a frame for a child that is not born yet.
    pub(crate) fn share_with(&self, child: Member, pfn: DevPfn) {
        let Memory { pgmap, shared, .. } = self.memory.as_ref().expect("a device with frames in use has memory");
        pgmap.get(pfn);
        shared.ledger.note(child, FrameRun { first: pfn, count: 1 });
    }

    /// Gives back what a dead member had. Returns how many references that were.
    pub(crate) fn sweep(&self, member: Member) -> u32 {
        let mut count = 0;
        if let Some(Memory { pgmap, shared, .. }) = &self.memory {
            shared.ledger.clear(member, |frames| {
                pgmap.put_run(frames, |run| self.device.freed(run));
                count += frames.count;
            });
        }
        count
    }

    /// In a forked child: a set for the frames that its pages are in, a bit for each.
    pub(crate) fn frame_set(&self) -> Result<&'static [AtomicU64], Errno> {
        self.memory.as_ref().map_or(Ok(&[]), |memory| memory.shared.ledger.set())
    }

    /// Whether this process has a reference to a frame.
    pub(crate) fn has(&self, pfn: DevPfn) -> bool {
        self.memory.as_ref().is_some_and(|memory| memory.shared.ledger.has(self.member, pfn))
    }

    /// Whether `member` has a reference to any frame.
    pub(crate) fn has_any(&self, member: Member) -> bool {
        self.memory.as_ref().is_some_and(|memory| !memory.shared.ledger.is_empty(member))
    }

    /// Gives back what this process has a reference to, but for the frames in `named`.
    pub(crate) fn keep_only(&self, named: &[AtomicU64]) {
        if let Some(memory) = &self.memory {
            memory.shared.ledger.others(self.member, named, |frames| self.free(frames));
        }
    }

    /// Whether a frame belongs to a forked child as well.
    pub(crate) fn is_shared(&self, pfn: DevPfn) -> bool {
        self.pgmap().is_some_and(|p| p.refs(pfn) > 1)
    }

    pub(crate) fn set_hint(&self, pfn: DevPfn, page: VirtAddr) {
        if let Some(pgmap) = self.pgmap() {
            pgmap.set_hint(pfn, Some(page));
        }
    }

    /// Takes no more pages, and gets no more translations. The fence goes with that of who takes a page for the device's
    /// exclusive access (`mirror.rs`).
    pub(crate) fn leave(&self) {
        self.state.store(LEAVING, Release);
        fence(SeqCst);
        if let Some(pgmap) = self.pgmap() {
            pgmap.close();
        }
    }

    pub(crate) fn is_live(&self) -> bool {
        self.state.load(Acquire) == LIVE
    }
}

/// The devices by number. Readers are on the fault path; writers register and remove, on engine threads only.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    slots: [RwLock<Option<&'static Entry>>; DeviceId::MAX],
    /// A bit for each device from whose frames pages are mapped.
    coherent: AtomicU32,
}

impl Devices {
    /// The device with that number, dead or alive.
    pub(crate) fn get(&self, id: DeviceId) -> Option<&'static Entry> {
        *self.slots[id.index()].read().expect("nobody panics with this lock held")
    }

    /// The device with that number, if `table` is its own: another may have the number by now.
    pub(crate) fn with_table(&self, id: DeviceId, table: &'static DeviceTable) -> Option<&'static Entry> {
        self.get(id).filter(|entry| std::ptr::eq(entry.table(), table))
    }

    pub(crate) fn for_each(&self, mut f: impl FnMut(&'static Entry)) {
        for slot in &self.slots {
            let entry = *slot.read().expect("nobody panics with this lock held");
            if let Some(entry) = entry {
                f(entry);
            }
        }
    }

    /// Puts a device into the first free place.
    pub(crate) fn add(&self, make: impl FnOnce(DeviceId) -> Result<Entry, Errno>) -> Result<&'static Entry, AddError> {
        for (n, slot) in self.slots.iter().enumerate() {
            let mut place = slot.write().expect("nobody panics with this lock held");
            if place.is_none() {
                let id = DeviceId(u8::try_from(n).expect("fewer than 256 devices"));
                let entry = arena::value(make(id).map_err(AddError::NoMemory)?).map_err(AddError::NoMemory)?;
                *place = Some(entry);
                self.note_kind(entry);
                return Ok(entry);
            }
        }
        Err(AddError::TooMany)
    }

    /// Puts a device into the place of its number, in a table that is not in use yet.
    pub(crate) fn put(&self, entry: Entry) -> Result<(), Errno> {
        let entry: &'static Entry = arena::value(entry)?;
        *self.slots[entry.id().index()].write().expect("nobody panics with this lock held") = Some(entry);
        self.note_kind(entry);
        Ok(())
    }

    fn note_kind(&self, entry: &Entry) {
        let bit = 1 << entry.id().index();
        if entry.coherent_range().is_some() {
            self.coherent.fetch_or(bit, AcqRel);
        } else {
            self.coherent.fetch_and(!bit, AcqRel);
        }
    }

    /// Whether pages are mapped from the device's frames.
    pub(crate) fn is_coherent(&self, id: DeviceId) -> bool {
        self.coherent.load(Acquire) >> id.index() & 1 != 0
    }

    pub(crate) fn remove(&self, id: DeviceId) {
        *self.slots[id.index()].write().expect("nobody panics with this lock held") = None;
    }
}

/// Why a device could not be registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AddError {
    TooMany,
    NoMemory(Errno),
}
