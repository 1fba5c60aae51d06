//! Device memory: which frames of one device are in use, by how many, and what is known about them.
//!
//! Frames are handed out singly, in runs, or as *huge units* of a whole chunk. A chunk is 512 neighbouring frames,
//! 2 MiB, and has a state word that says what it is:
//!
//! ```text
//!            alloc_page, alloc_run                       alloc_huge
//!   small <-------------------------- free (0 in use) --------------> huge, r references
//!   1..512 in use ------------------>                <--------------
//!      ^       the last frame freed                  the last reference put   |
//!      |                                                                      |
//!      +----------------------------- split ----------------------------------+
//! ```
//!
//! Small allocations fill chunks that are partly used, lowest first, and break a free chunk (lowest first) only if
//! none has room. Huge units take free chunks only, highest first. A chunk is free again the moment that its last
//! frame is.
//!
//! # Concurrency
//! Lock-free, and all state is in the given words, so several forked processes may share one pgmap. Small allocation
//! *reserves* in the state word, then *claims* bits of the chunk's bitmap; freeing clears bits, then gives the
//! reservation back. So a chunk never has more bits set than its state word says, and "0 in use" means that no bit is
//! set and no claim is under way. A process that dies at any point loses the allocation or the free that it was at,
//! never another's: 64 frames at most, or one huge unit. Those may stay counted as live. Frames whose references a dead
//! process held stay live; telling is the caller's business.
//!
//! Two bitmaps over the chunks, *partial* and *taken*, are hints that make the search short. Whoever makes a chunk
//! available changes the state word first and the hint second; whoever finds a hint stale withdraws it first and
//! looks at the state word again second. So of two that race at least one sees the other, and a hint never hides a
//! chunk for good. A process killed between the two steps can hide one: allocations that fail look at the state words
//! themselves now and then, and find it.
//!
//! # Not supported
//! Units between one frame and a chunk, as the kernel's folios have: nothing above asks for them. Growing a pgmap:
//! the size of a device's memory is fixed at registration.
//!
//! # Kernel
//! `mm/memremap.c` (`struct dev_pagemap`, `memremap_pages()`, `free_zone_device_folio()`), and the chunk lists that
//! every driver keeps for itself there.

mod bitmap;

use std::{fmt, ops::ControlFlow, time::Duration};

use thiserror::Error;
use uhmm_sys::addr::{PAGE_SIZE, VirtAddr};

use self::bitmap::{Bitmap, Span, WORD_FRAMES};
use crate::{
    device::{DevPfn, DeviceId, FrameRun},
    sync::{AtomicU32, AtomicU64, Ordering, TimedOut, Waiter, Words, WordsNeeded, spin},
};

/// Frames in a chunk, and in a huge unit. Tiny under loom, so that every interleaving can be tried.
pub const CHUNK_FRAMES: u32 = if cfg!(loom) { 4 } else { 512 };
/// log2 of [`CHUNK_FRAMES`]: the order of a huge unit.
pub const HUGE_ORDER: u32 = CHUNK_FRAMES.ilog2();

/// State word of a chunk of small frames that has no room.
const FULL: u64 = CHUNK_FRAMES as u64;

/// State word of a huge unit: this bit, and the references in the low half.
const HUGE: u64 = 1 << 63;
/// A huge unit that is being split. References are still counted in the state word.
const SPLITTING: u64 = 1 << 62;

/// Header words, on cache lines of their own: the live count with [`CLOSED`], where to look for a partly used chunk
/// first, and how often no chunk was found.
const LIVE: usize = 0;
const CURSOR: usize = 8;
const MISSES: usize = 9;
const HEADER_WORDS: usize = 16;
/// Shares a word with the live count, so that an allocation is counted before the pgmap closes or fails after it.
const CLOSED: u64 = 1 << 63;

/// How many partly used chunks a run may look at before it takes the best.
const RUN_LOOKS: u32 = 4;
/// Every so many failures to find a free chunk the state words themselves are searched.
const MISSES_PER_SEARCH: u64 = 1024;
/// How long a split waits for another process that splits the same unit, before it takes it for dead.
const SPLIT_LIMIT: Duration = Duration::from_millis(500);

/// Bytes of metadata for each frame, beside its bit: references, the driver's word, the hint.
const META_BYTES: usize = size_of::<u32>() + size_of::<u32>() + size_of::<u64>();
const _: () = assert!(META_BYTES <= 16);

/// Another process that shares the unit has been splitting it for too long; most likely it died. The unit stays
/// usable as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{id}: frame {}: split by another process did not end: {cause}", unit.get())]
pub struct SplitStuck {
    /// The device.
    pub id: DeviceId,
    /// First frame of the unit.
    pub unit: DevPfn,
    /// How long was waited.
    pub cause: TimedOut,
}

/// Where a pgmap's words contradict each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("chunk {chunk}: {what}")]
pub struct AuditError {
    /// The chunk, or the number of chunks where the whole is meant.
    pub chunk: u32,
    /// The rule that is broken.
    pub what: &'static str,
}

/// What became of a reference that was put.
#[derive(Debug)]
pub enum Put<'a> {
    /// It was the last.
    Freed(Freed<'a>),
    /// Others are left.
    Shared,
}

impl Put<'_> {
    /// Whether the reference was the last.
    #[must_use]
    pub fn is_freed(&self) -> bool {
        matches!(self, Self::Freed(_))
    }
}

/// Frames without a reference that nobody can allocate yet: dropping this makes them available. Tell the device
/// before ([`Device::freed`](crate::device::Device::freed)), or it throws away what the next owner has written.
#[derive(Debug)]
#[must_use = "dropping it makes the frames available; tell the device first"]
pub struct Freed<'a> {
    map: &'a Pgmap,
    run: FrameRun,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Small,
    Huge,
}

impl Freed<'_> {
    /// The frames.
    #[must_use]
    pub fn run(&self) -> FrameRun {
        self.run
    }
}

impl Drop for Freed<'_> {
    fn drop(&mut self) {
        let (chunk, at) = self.map.place(self.run.first);
        match self.kind {
            Kind::Small => {
                self.map.clear_bits(chunk, Span { at, len: self.run.count });
                self.map.release(chunk, self.run.count);
            }
            Kind::Huge => self.map.release_huge(chunk),
        }
    }
}

/// Which chunks a small allocation may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Partial,
    Whole,
}

impl Class {
    /// Frames that an allocation of this class may take from a chunk in `state`, if any.
    fn room(self, state: u64) -> Option<u32> {
        match self {
            Self::Partial if state > 0 && state < FULL => Some(CHUNK_FRAMES - low32(state)),
            Self::Whole if state == 0 => Some(CHUNK_FRAMES),
            _ => None,
        }
    }
}

/// The frames of one device's memory. See the module's documentation.
///
/// # Locking
/// None is taken or required. Nothing is called while a frame is in an intermediate state.
///
/// # Invariants
/// For every chunk of small frames: bits set <= frames in use by the state word. A frame's reference count is 0
/// unless its bit is set; a frame of a huge unit has neither.
pub struct Pgmap {
    id: DeviceId,
    frames: u32,
    header: &'static [AtomicU64],
    /// State words, one for each chunk.
    states: &'static [AtomicU64],
    /// Hint: a set bit says that the chunk is partly used and has room.
    partial: &'static [AtomicU64],
    /// Hint: a clear bit says that the chunk is free. This way round, zeroed memory describes an empty device.
    taken: &'static [AtomicU64],
    bitmap: &'static [AtomicU64],
    hints: &'static [AtomicU64],
    refs: &'static [AtomicU32],
    driver: &'static [AtomicU32],
}

impl fmt::Debug for Pgmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pgmap({}: {} of {} frames live)", self.id, self.live(), self.frames)
    }
}

impl DeviceId {
    /// The `n`th device, if there can be so many.
    #[must_use]
    pub fn from_index(n: usize) -> Option<Self> {
        u8::try_from(n).ok().filter(|_| n < Self::MAX).map(Self)
    }
}

impl Pgmap {
    /// Memory that [`Pgmap::new`] wants for `frames` frames: some 16 bytes a frame, of which only what belongs to
    /// frames in use is ever touched.
    #[must_use]
    pub fn storage_needed(frames: u32) -> WordsNeeded {
        let chunks = chunks_of(frames) as usize;
        let words64 = HEADER_WORDS + chunks + 2 * chunks.div_ceil(64) + chunks * bitmap::WORDS + frames as usize;
        WordsNeeded { words32: 2 * frames as usize, words64 }
    }

    /// Describes `frames` frames of device `id` in `storage`, which is zeroed or already describes the same number of
    /// frames (it is shared with another process: this is then one more view of the same pgmap).
    ///
    /// # Panics
    /// If `storage` is smaller than [`Pgmap::storage_needed`].
    #[must_use]
    pub fn new(id: DeviceId, frames: u32, storage: Words) -> Self {
        let needed = Self::storage_needed(frames);
        assert!(storage.words32.len() >= needed.words32, "too few 32-bit words for {frames} frames");
        assert!(storage.words64.len() >= needed.words64, "too few 64-bit words for {frames} frames");
        let chunks = chunks_of(frames) as usize;
        let (words32, words64) = storage.atomics();
        let (header, rest) = words64.split_at(HEADER_WORDS);
        let (states, rest) = rest.split_at(chunks);
        let (partial, rest) = rest.split_at(chunks.div_ceil(64));
        let (taken, rest) = rest.split_at(chunks.div_ceil(64));
        let (bitmap, rest) = rest.split_at(chunks * bitmap::WORDS);
        let hints = &rest[..frames as usize];
        let (refs, rest) = words32.split_at(frames as usize);
        let driver = &rest[..frames as usize];
        let map = Self { id, frames, header, states, partial, taken, bitmap, hints, refs, driver };
        map.trim_tail();
        map
    }

    /// Marks the frames that the last chunk lacks as in use, without references: they are never handed out, and the
    /// chunk is never free.
    fn trim_tail(&self) {
        let have = self.frames % CHUNK_FRAMES;
        if have == 0 {
            return;
        }
        let (chunk, lack) = (self.chunks() - 1, CHUNK_FRAMES - have);
        // The state is never 0 again, so that a second view of the same words changes nothing. Bits come first: no
        // claim may find them clear.
        if self.state(chunk).load(Ordering::Acquire) == 0 {
            self.bits(chunk).mark(Span { at: have, len: lack });
            let _ = self.state(chunk).compare_exchange(0, u64::from(lack), Ordering::AcqRel, Ordering::Acquire);
            self.mark_taken(chunk);
            self.mark_partial(chunk);
        }
    }

    /// The device.
    #[must_use]
    pub fn id(&self) -> DeviceId {
        self.id
    }

    /// Number of frames.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.frames
    }

    /// Number of frames that have a reference.
    #[must_use]
    pub fn live(&self) -> u32 {
        low32(self.header[LIVE].load(Ordering::Acquire))
    }

    /// Number of frames that have none. How many of them can be had as huge units is another question.
    #[must_use]
    pub fn free(&self) -> u32 {
        self.frames.saturating_sub(self.live())
    }

    /// Stops allocation for good, for the removal of the device. Every allocation that succeeds all the same is
    /// counted in [`Pgmap::live`] when this returns.
    pub fn close(&self) {
        self.header[LIVE].fetch_or(CLOSED, Ordering::AcqRel);
    }

    /// Whether [`Pgmap::close`] was called.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.header[LIVE].load(Ordering::Acquire) & CLOSED != 0
    }

    /// Allocates a frame with one reference; `None` if there is none or the pgmap is closed.
    #[must_use]
    pub fn alloc_page(&self) -> Option<DevPfn> {
        self.alloc_run(1).map(|run| run.first)
    }

    /// Allocates between 1 and `max` neighbouring frames, each with one reference: a long run where that is cheap, so
    /// that copies are large. Never more than a chunk. `None` if no frame is left, `max` is 0 or the pgmap is closed.
    #[must_use]
    pub fn alloc_run(&self, max: u32) -> Option<FrameRun> {
        let max = max.min(CHUNK_FRAMES);
        if max == 0 || self.header[LIVE].load(Ordering::Acquire) >= u64::from(self.frames) {
            return None;
        }
        self.alloc_partial(max).or_else(|| self.alloc_whole(max)).or_else(|| self.alloc_any(max))
    }

    /// Takes a run from a partly used chunk.
    fn alloc_partial(&self, max: u32) -> Option<FrameRun> {
        let mut best: Option<(u32, u32)> = None;
        let mut looks = 0;
        let found = self.each_partial(|chunk| {
            if max == 1 {
                return match self.take(chunk, 1, Class::Partial) {
                    Some(run) => ControlFlow::Break(Some(run)),
                    None => ControlFlow::Continue(()),
                };
            }
            let gap = self.bits(chunk).longest_gap(max).len;
            if best.is_none_or(|(_, most)| gap > most) {
                best = Some((chunk, gap));
            }
            looks += 1;
            if gap >= max || looks >= RUN_LOOKS { ControlFlow::Break(None) } else { ControlFlow::Continue(()) }
        });
        found.or_else(|| best.and_then(|(chunk, _)| self.take(chunk, max, Class::Partial)))
    }

    /// Shows `visit_fn` the partly used chunks that have room, until it breaks.
    fn each_partial(&self, mut visit_fn: impl FnMut(u32) -> ControlFlow<Option<FrameRun>>) -> Option<FrameRun> {
        let cursor = &self.header[CURSOR];
        let from = low32(cursor.load(Ordering::Relaxed)) as usize;
        let words = self.partial.len();
        for word in (0..words).map(|n| (from + n) % words) {
            for bit in bits_of(self.partial[word].load(Ordering::Acquire)) {
                let chunk = chunk_at(word, bit);
                if Class::Partial.room(self.state(chunk).load(Ordering::Acquire)).is_none() {
                    self.withdraw_partial(chunk);
                } else if let ControlFlow::Break(found) = visit_fn(chunk) {
                    if word != from {
                        cursor.store(word as u64, Ordering::Relaxed);
                    }
                    return found;
                }
            }
        }
        None
    }

    /// Takes a run from the lowest free chunk.
    fn alloc_whole(&self, max: u32) -> Option<FrameRun> {
        for word in 0..self.taken.len() {
            for bit in bits_of(self.free_hints(word)) {
                let chunk = chunk_at(word, bit);
                if let Some(run) = self.take(chunk, max, Class::Whole) {
                    return Some(run);
                }
                self.mark_taken(chunk);
            }
        }
        None
    }

    /// Searches the state words: the last resort when the hints show no room although frames are free, because of a
    /// race or of a process that died between a state word and its hint.
    fn alloc_any(&self, max: u32) -> Option<FrameRun> {
        for chunk in 0..self.chunks() {
            if self.header[LIVE].load(Ordering::Acquire) >= u64::from(self.frames) {
                return None;
            }
            for class in [Class::Partial, Class::Whole] {
                if let Some(run) = self.take(chunk, max, class) {
                    self.mark_partial(chunk);
                    return Some(run);
                }
            }
        }
        None
    }

    /// Allocates a whole chunk as one unit with one reference; its first frame stands for it. `None` if no chunk is
    /// free or the pgmap is closed.
    #[must_use]
    pub fn alloc_huge(&self) -> Option<DevPfn> {
        if self.is_closed() || self.free() < CHUNK_FRAMES {
            return None;
        }
        for word in (0..self.taken.len()).rev() {
            let mut free = self.free_hints(word);
            while free != 0 {
                let bit = free.ilog2();
                free &= !(1 << bit);
                let chunk = chunk_at(word, bit);
                if let Some(unit) = self.take_huge(chunk) {
                    return Some(unit);
                }
                self.mark_taken(chunk);
            }
        }
        let misses = self.header[MISSES].fetch_add(1, Ordering::Relaxed);
        if misses % MISSES_PER_SEARCH != MISSES_PER_SEARCH - 1 {
            return None;
        }
        (0..self.chunks()).rev().find_map(|chunk| self.take_huge(chunk))
    }

    /// Takes up to `max` frames of a chunk, if its state allows `class`.
    ///
    /// They are taken by pieces of a bitmap word: a process that dies meanwhile loses no more than that.
    fn take(&self, chunk: u32, max: u32, class: Class) -> Option<FrameRun> {
        let mut run = self.take_piece(chunk, max, class, None)?;
        while run.len < max && run.at + run.len < CHUNK_FRAMES {
            let next = run.at + run.len;
            let Some(more) = self.take_piece(chunk, max - run.len, Class::Partial, Some(next)) else { break };
            run.len += more.len;
        }
        Some(FrameRun { first: DevPfn::new(chunk * CHUNK_FRAMES + run.at), count: run.len })
    }

    /// Takes up to `max` frames that share a bitmap word, from `at` on or where the longest gap begins.
    fn take_piece(&self, chunk: u32, max: u32, class: Class, at: Option<u32>) -> Option<Span> {
        let (state, bits) = (self.state(chunk), self.bits(chunk));
        let look = |max| at.map_or_else(|| bits.longest_gap(max).first_word(), |at| bits.gap_at(at, max));
        let mut now = state.load(Ordering::Acquire);
        let reserved = loop {
            let room = class.room(now)?;
            // Frames that the run cannot use are better not reserved: others would find no room. Where there is room,
            // a gap that cannot be seen for a moment will be.
            let want = look(max.min(room)).len.max(u32::from(at.is_none()));
            if want == 0 || self.is_closed() {
                return None;
            }
            match state.compare_exchange_weak(now, now + u64::from(want), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break want,
                Err(seen) => now = seen,
            }
        };
        if class == Class::Whole {
            self.mark_taken(chunk);
            if reserved < CHUNK_FRAMES {
                self.mark_partial(chunk);
            }
        }
        // The reservation keeps as many clear bits for this thread, though not which ones, and not in a row. A pass
        // over all bits fails only because another thread has claimed or freed a frame meanwhile, so that somebody
        // always gets on.
        let piece = loop {
            let gap = look(reserved);
            if gap.len > 0 && bits.set(gap) {
                break gap;
            }
            if at.is_some() {
                self.release(chunk, reserved);
                return None;
            }
            spin();
        };
        if piece.len < reserved {
            self.release(chunk, reserved - piece.len);
        }
        if !self.count(piece.len) {
            self.clear_bits(chunk, piece);
            self.release(chunk, piece.len);
            return None;
        }
        let first = (chunk * CHUNK_FRAMES + piece.at) as usize;
        for n in first..first + piece.len as usize {
            let refs = self.refs[n].load(Ordering::Relaxed);
            assert_eq!(
                refs,
                0,
                "{}: frame {n} was free and has references, in process {}",
                self.id,
                std::process::id()
            );
            self.hints[n].store(0, Ordering::Relaxed);
            self.driver[n].store(0, Ordering::Relaxed);
            self.refs[n].store(1, Ordering::Release);
        }
        Some(piece)
    }

    /// Makes a free chunk a huge unit.
    fn take_huge(&self, chunk: u32) -> Option<DevPfn> {
        if self.is_closed() {
            return None;
        }
        self.state(chunk).compare_exchange(0, HUGE, Ordering::AcqRel, Ordering::Acquire).ok()?;
        self.mark_taken(chunk);
        if !self.count(CHUNK_FRAMES) {
            self.release_huge(chunk);
            return None;
        }
        let unit = DevPfn::new(chunk * CHUNK_FRAMES);
        self.hints[unit.get() as usize].store(0, Ordering::Relaxed);
        self.driver[unit.get() as usize].store(0, Ordering::Relaxed);
        // The reference comes last: what has one is counted, so that putting it never counts too far down.
        self.state(chunk).store(HUGE | 1, Ordering::Release);
        Some(unit)
    }

    /// Adds a reference to a frame or, given the first frame of a huge unit, to the unit. The caller holds one.
    ///
    /// # Panics
    /// If there is no reference, or `pfn` is another frame of a huge unit.
    pub fn get(&self, pfn: DevPfn) {
        let (chunk, at) = self.place(pfn);
        let mut now = self.state(chunk).load(Ordering::Acquire);
        while now & HUGE != 0 {
            self.check_unit(pfn, at, now);
            assert_ne!(low32(now), u32::MAX, "{}: frame {}: too many references", self.id, pfn.get());
            match self.state(chunk).compare_exchange_weak(now, now + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                Err(seen) => now = seen,
            }
        }
        let refs = &self.refs[pfn.get() as usize];
        if let Err(old) =
            refs.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| if n == 0 { None } else { n.checked_add(1) })
        {
            panic!("{}: frame {}: get with {old} references, by process {}", self.id, pfn.get(), std::process::id());
        }
    }

    /// Puts a reference of a frame or, given the first frame of a huge unit, of the unit.
    ///
    /// A holder of a unit that is shared with another process puts it with [`Pgmap::put_run`]: the other may have
    /// split it.
    ///
    /// # Panics
    /// If there is no reference (a double free), or `pfn` is another frame of a huge unit.
    ///
    /// # Kernel
    /// `folio_put()`, and `free_zone_device_folio()` with the driver's `folio_free` for the last.
    pub fn put(&self, pfn: DevPfn) -> Put<'_> {
        let (chunk, at) = self.place(pfn);
        if self.state(chunk).load(Ordering::Acquire) & HUGE != 0
            && let Some(put) = self.put_unit(pfn, chunk, at)
        {
            return put;
        }
        if !self.put_small(pfn) {
            return Put::Shared;
        }
        self.uncount(1);
        Put::Freed(Freed { map: self, run: FrameRun { first: pfn, count: 1 }, kind: Kind::Small })
    }

    /// Puts a reference of each frame of `run`, and of each huge unit in it. `freed_fn` sees the frames whose last
    /// reference it was before they become available: huge units, and runs of up to 64 frames. Returns their number.
    ///
    /// # Panics
    /// As [`Pgmap::put`]; and if the run covers part of a huge unit: split it first.
    pub fn put_run(&self, run: FrameRun, mut freed_fn: impl FnMut(FrameRun)) -> u32 {
        let (mut pfn, end) = (run.first.get(), run.first.get() + run.count);
        let mut total = 0;
        let mut give_back = |freed: Freed<'_>| {
            freed_fn(freed.run());
            total += freed.run().count;
        };
        while pfn < end {
            let (chunk, at) = self.place(DevPfn::new(pfn));
            let stop = end.min((chunk + 1).saturating_mul(CHUNK_FRAMES));
            if self.state(chunk).load(Ordering::Acquire) & HUGE != 0 {
                assert_eq!(stop - pfn, CHUNK_FRAMES, "{}: frame {pfn}: put of part of a huge unit", self.id);
                if let Some(put) = self.put_unit(DevPfn::new(pfn), chunk, at) {
                    if let Put::Freed(freed) = put {
                        give_back(freed);
                    }
                    pfn = stop;
                    continue;
                }
            }
            // By pieces of a bitmap word: a process that dies meanwhile loses no more than that.
            while pfn < stop {
                let piece_end = stop.min(pfn / WORD_FRAMES * WORD_FRAMES + WORD_FRAMES);
                let mut count = 0;
                while pfn + count < piece_end && self.put_small(DevPfn::new(pfn + count)) {
                    count += 1;
                }
                if count > 0 {
                    self.uncount(count);
                    let run = FrameRun { first: DevPfn::new(pfn), count };
                    give_back(Freed { map: self, run, kind: Kind::Small });
                }
                // A frame that ended the run before the piece did was put as well, and is shared.
                pfn = piece_end.min(pfn + count + 1);
            }
        }
        total
    }

    /// Puts a reference of a small frame; whether it was the last.
    fn put_small(&self, pfn: DevPfn) -> bool {
        // The count is left as it was where there is none: other processes would trip over what one has done.
        let refs = &self.refs[pfn.get() as usize];
        match refs.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1)) {
            Ok(old) => old == 1,
            Err(_) => {
                panic!("{}: frame {}: put without a reference, by process {}", self.id, pfn.get(), std::process::id())
            }
        }
    }

    /// Puts a reference of a huge unit; `None` if it is one no longer.
    fn put_unit(&self, unit: DevPfn, chunk: u32, at: u32) -> Option<Put<'_>> {
        let mut now = self.state(chunk).load(Ordering::Acquire);
        while now & HUGE != 0 {
            self.check_unit(unit, at, now);
            match self.state(chunk).compare_exchange_weak(now, now - 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) if low32(now) > 1 => return Some(Put::Shared),
                Ok(_) => {
                    self.uncount(CHUNK_FRAMES);
                    let run = FrameRun { first: unit, count: CHUNK_FRAMES };
                    return Some(Put::Freed(Freed { map: self, run, kind: Kind::Huge }));
                }
                Err(seen) => now = seen,
            }
        }
        None
    }

    fn check_unit(&self, pfn: DevPfn, at: u32, state: u64) {
        assert_eq!(at, 0, "{}: frame {} is not the first of its huge unit", self.id, pfn.get());
        assert_ne!(low32(state), 0, "{}: frame {}: huge unit without a reference", self.id, pfn.get());
    }

    /// Makes a huge unit 512 small frames, each with the references of the unit. The caller holds a reference.
    /// Where another process that shares the unit has split it already, there is nothing left to do.
    ///
    /// The driver's word of the unit and its hint pass on to the frames, the hint with each frame's own page.
    ///
    /// # Errors
    /// [`SplitStuck`]: bring the whole unit home instead.
    ///
    /// # Panics
    /// If `unit` is not the first frame of a chunk, or has no reference.
    ///
    /// # Kernel
    /// `mm/huge_memory.c: split_folio()` with the driver's `folio_split` for a device private folio.
    pub fn split(&self, unit: DevPfn) -> Result<FrameRun, SplitStuck> {
        let (chunk, at) = self.place(unit);
        assert_eq!(at, 0, "{}: frame {} is not the first of a chunk", self.id, unit.get());
        let run = FrameRun { first: unit, count: CHUNK_FRAMES };
        let state = self.state(chunk);
        let mut waiter = Waiter::new(SPLIT_LIMIT);
        loop {
            let now = state.load(Ordering::Acquire);
            if now & HUGE == 0 {
                assert_ne!(self.refs(unit), 0, "{}: frame {}: split without a reference", self.id, unit.get());
                return Ok(run);
            }
            self.check_unit(unit, at, now);
            if now & SPLITTING != 0 {
                waiter.pause().map_err(|cause| SplitStuck { id: self.id, unit, cause })?;
            } else if state.compare_exchange(now, now | SPLITTING, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                break;
            }
        }
        // From here no other thread writes the words of the chunk's frames: nobody else splits, and references are
        // counted in the state word until it says otherwise.
        self.bits(chunk).fill(true);
        let first = unit.get() as usize;
        let (hint, driver) = (self.hints[first].load(Ordering::Relaxed), self.driver[first].load(Ordering::Relaxed));
        for n in 1..CHUNK_FRAMES {
            let frame = first + n as usize;
            let page = if hint == 0 { 0 } else { hint + u64::from(n) * PAGE_SIZE };
            self.hints[frame].store(page, Ordering::Relaxed);
            self.driver[frame].store(driver, Ordering::Relaxed);
        }
        let mut now = state.load(Ordering::Acquire);
        loop {
            // References may come and go meanwhile. Each failure is the success of another get or put.
            self.check_unit(unit, at, now);
            for refs in &self.refs[first..first + CHUNK_FRAMES as usize] {
                refs.store(low32(now), Ordering::Relaxed);
            }
            match state.compare_exchange(now, FULL, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(run),
                Err(seen) => now = seen,
            }
        }
    }

    /// References of a frame, or of the huge unit that holds it; 0 for a free frame.
    #[must_use]
    pub fn refs(&self, pfn: DevPfn) -> u32 {
        let (chunk, _) = self.place(pfn);
        let now = self.state(chunk).load(Ordering::Acquire);
        if now & HUGE != 0 { low32(now) } else { self.refs[pfn.get() as usize].load(Ordering::Acquire) }
    }

    /// [`HUGE_ORDER`] for any frame of a huge unit, else 0.
    #[must_use]
    pub fn order(&self, pfn: DevPfn) -> u32 {
        let (chunk, _) = self.place(pfn);
        if self.state(chunk).load(Ordering::Acquire) & HUGE != 0 { HUGE_ORDER } else { 0 }
    }

    /// A word for the driver's use; 0 when a frame is allocated. A huge unit has the one of its first frame.
    #[must_use]
    pub fn driver_word(&self, pfn: DevPfn) -> &AtomicU32 {
        &self.driver[pfn.get() as usize]
    }

    /// The page that the frame was last known to be mapped at. Only a hint: `mremap` and `fork` falsify it.
    #[must_use]
    pub fn hint(&self, pfn: DevPfn) -> Option<VirtAddr> {
        let page = self.hints[pfn.get() as usize].load(Ordering::Relaxed);
        (page != 0).then_some(VirtAddr::new(page))
    }

    /// Notes the page that the frame is mapped at.
    pub fn set_hint(&self, pfn: DevPfn, page: Option<VirtAddr>) {
        let page = page.map_or(0, |page| page.page().get());
        self.hints[pfn.get() as usize].store(page, Ordering::Relaxed);
    }

    /// The first live frame at or after `from`, for eviction by frame; of a huge unit, its first frame only.
    ///
    /// Frames allocated or freed meanwhile may or may not be seen. After [`Pgmap::close`] repeat from 0 until
    /// [`Pgmap::live`] is 0.
    ///
    /// # Kernel
    /// `mm/migrate_device.c: migrate_device_range()`.
    #[must_use]
    pub fn next_live(&self, from: DevPfn) -> Option<DevPfn> {
        let mut pfn = from.get();
        while pfn < self.frames {
            let (chunk, at) = self.place(DevPfn::new(pfn));
            let now = self.state(chunk).load(Ordering::Acquire);
            if now & HUGE != 0 && at == 0 && low32(now) != 0 {
                return Some(DevPfn::new(pfn));
            }
            if now & HUGE == 0 && now != 0 {
                for n in at..CHUNK_FRAMES {
                    let frame = chunk * CHUNK_FRAMES + n;
                    if self.bits(chunk).is_set(n)
                        && self.refs.get(frame as usize).is_some_and(|refs| refs.load(Ordering::Acquire) != 0)
                    {
                        return Some(DevPfn::new(frame));
                    }
                }
            }
            pfn = (chunk + 1).saturating_mul(CHUNK_FRAMES);
        }
        None
    }

    /// Checks that all words agree with each other, hints included. Only meaningful while nobody uses the pgmap and
    /// no process has died while it did.
    ///
    /// # Errors
    /// The first contradiction found.
    pub fn audit(&self) -> Result<(), AuditError> {
        let mut live = 0;
        for chunk in 0..self.chunks() {
            let fail = |what| Err(AuditError { chunk, what });
            let now = self.state(chunk).load(Ordering::Acquire);
            let first = chunk * CHUNK_FRAMES;
            let real = CHUNK_FRAMES.min(self.frames - first);
            let set = self.bits(chunk).count();
            let refs = &self.refs[first as usize..(first + real) as usize];
            let held = refs.iter().fold(0, |n, refs| n + u32::from(refs.load(Ordering::Acquire) != 0));
            let hinted = |map: &[AtomicU64]| map[(chunk / 64) as usize].load(Ordering::Acquire) & hint_bit(chunk) != 0;
            if now == 0 && hinted(self.taken) {
                return fail("free, and its hint says taken");
            }
            if Class::Partial.room(now).is_some() && !hinted(self.partial) {
                return fail("has room, and no hint says so");
            }
            if now & HUGE != 0 {
                if set != 0 || held != 0 {
                    return fail("huge, and frames of it are in use");
                }
                if now & SPLITTING != 0 || low32(now) == 0 {
                    return fail("huge, and halfway to something else");
                }
                live += CHUNK_FRAMES;
            } else {
                if u64::from(set) != now {
                    return fail("bits and state word disagree");
                }
                if held + (CHUNK_FRAMES - real) != set {
                    return fail("bits and references disagree");
                }
                live += held;
            }
        }
        if live == self.live() { Ok(()) } else { Err(AuditError { chunk: self.chunks(), what: "live count is wrong" }) }
    }

    fn chunks(&self) -> u32 {
        chunks_of(self.frames)
    }

    /// Chunk of a frame, and the frame's number in it.
    fn place(&self, pfn: DevPfn) -> (u32, u32) {
        assert!(pfn.get() < self.frames, "{}: no frame {}", self.id, pfn.get());
        (pfn.get() / CHUNK_FRAMES, pfn.get() % CHUNK_FRAMES)
    }

    fn state(&self, chunk: u32) -> &AtomicU64 {
        &self.states[chunk as usize]
    }

    fn bits(&self, chunk: u32) -> Bitmap<'_> {
        Bitmap::of(self.bitmap, chunk)
    }

    fn clear_bits(&self, chunk: u32, span: Span) {
        assert!(self.bits(chunk).clear(span), "{}: chunk {chunk}: a free frame freed", self.id);
    }

    /// Counts `n` frames as live, unless the pgmap is closed.
    fn count(&self, n: u32) -> bool {
        let old = self.header[LIVE].fetch_add(u64::from(n), Ordering::AcqRel);
        if old & CLOSED != 0 {
            self.uncount(n);
        }
        old & CLOSED == 0
    }

    fn uncount(&self, n: u32) {
        self.header[LIVE].fetch_sub(u64::from(n), Ordering::AcqRel);
    }

    /// Gives back `n` reserved frames whose bits are clear.
    fn release(&self, chunk: u32, n: u32) {
        let n = u64::from(n);
        let state = self.state(chunk);
        let mut now = state.load(Ordering::Acquire);
        loop {
            assert!(now >= n && now <= FULL, "{}: chunk {chunk}: {n} frames freed in state {now:#x}", self.id);
            match state.compare_exchange_weak(now, now - n, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break,
                Err(seen) => now = seen,
            }
        }
        if now == n {
            self.clear_taken(chunk);
        } else if now == FULL {
            self.mark_partial(chunk);
        }
    }

    /// Makes the chunk of a huge unit free.
    fn release_huge(&self, chunk: u32) {
        if self.state(chunk).load(Ordering::Acquire) & SPLITTING != 0 {
            // Whoever began to split it is dead, and may have filled in some of this.
            let first = (chunk * CHUNK_FRAMES) as usize;
            self.bits(chunk).fill(false);
            self.refs[first..first + CHUNK_FRAMES as usize].iter().for_each(|refs| refs.store(0, Ordering::Relaxed));
        }
        let old = self.state(chunk).swap(0, Ordering::AcqRel);
        assert_ne!(old & HUGE, 0, "{}: chunk {chunk}: a huge unit freed in state {old:#x}", self.id);
        self.clear_taken(chunk);
    }

    fn mark_partial(&self, chunk: u32) {
        let word = (chunk / 64) as usize;
        self.partial[word].fetch_or(hint_bit(chunk), Ordering::AcqRel);
        self.header[CURSOR].fetch_min(word as u64, Ordering::Relaxed);
    }

    fn withdraw_partial(&self, chunk: u32) {
        self.partial[(chunk / 64) as usize].fetch_and(!hint_bit(chunk), Ordering::AcqRel);
        if Class::Partial.room(self.state(chunk).load(Ordering::Acquire)).is_some() {
            self.mark_partial(chunk);
        }
    }

    fn mark_taken(&self, chunk: u32) {
        self.taken[(chunk / 64) as usize].fetch_or(hint_bit(chunk), Ordering::AcqRel);
        if self.state(chunk).load(Ordering::Acquire) == 0 {
            self.clear_taken(chunk);
        }
    }

    fn clear_taken(&self, chunk: u32) {
        self.taken[(chunk / 64) as usize].fetch_and(!hint_bit(chunk), Ordering::AcqRel);
    }

    /// The chunks that a word of the *taken* hint shows as free.
    fn free_hints(&self, word: usize) -> u64 {
        let chunks = self.states.len() - word * 64;
        let exist = if chunks >= 64 { u64::MAX } else { (1 << chunks) - 1 };
        !self.taken[word].load(Ordering::Acquire) & exist
    }
}

fn chunks_of(frames: u32) -> u32 {
    frames.div_ceil(CHUNK_FRAMES)
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
fn low32(word: u64) -> u32 {
    word as u32
}

/// The chunk of a bit in a hint word.
#[expect(clippy::cast_possible_truncation, reason = "`word` indexes a bitmap over fewer than 2^32 chunks")]
fn chunk_at(word: usize, bit: u32) -> u32 {
    word as u32 * 64 + bit
}

fn hint_bit(chunk: u32) -> u64 {
    1 << (chunk % 64)
}

/// The set bits of a word, ascending.
fn bits_of(mut word: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let bit = word.checked_ilog2().map(|_| word.trailing_zeros())?;
        word &= word - 1;
        Some(bit)
    })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_split_that_somebody_else_does_not_end_is_given_up() {
        let frames = CHUNK_FRAMES;
        let pgmap = Pgmap::new(DeviceId::from_index(0).unwrap(), frames, Pgmap::storage_needed(frames).leak());
        let unit = pgmap.alloc_huge().unwrap();
        // Another process, which died there.
        pgmap.state(0).fetch_or(SPLITTING, Ordering::AcqRel);
        let start = std::time::Instant::now();
        let stuck = pgmap.split(unit).unwrap_err();
        assert!(start.elapsed() >= SPLIT_LIMIT, "{:?}", start.elapsed());
        assert_eq!((stuck.id, stuck.unit, stuck.cause.limit), (pgmap.id(), unit, SPLIT_LIMIT));
    }
}
