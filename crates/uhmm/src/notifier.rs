//! Interval notifiers: who has to hear that a translation goes away, and the protocol that keeps a device's page
//! table from ever disagreeing with the CPU's.
//!
//! ```text
//!   device fault                                   invalidation (munmap, migration, ...)
//!   ------------                                   -------------------------------------
//!   seq = read_begin()   waits while one runs      running = invalidate()   marks the range, then for each
//!   snapshot, faults                                  subscription that overlaps, under its lock:
//!   commit(seq)          takes the lock                   sequence + 1, the driver clears its entries
//!     changed: start again                          ... the mapping changes ...
//!     else set entries, unlock                      drop(running)            read_begin goes on
//! ```
//!
//! A snapshot that was taken before the mapping changed began with a sequence from before the callback: `read_begin`
//! waits from the mark to the end. So either it commits before the callback, which then clears what it set, or it
//! commits after, sees the sequence changed and starts again. No order of events installs a stale entry.
//!
//! The lock belongs to the subscription, and both sides can only get what they need by taking it: [`Notifiers::commit`]
//! gives an [`UpdateGuard`] only if the sequence still holds, and the receipt that a callback must return comes only
//! from [`InvalidateSeq::set`], which raises the sequence and clears under the lock.
//!
//! # Concurrency
//! Invalidations overlap and nest freely, in any number of threads. A subscription inserted while one runs may or may
//! not get its callback, but its `read_begin` waits for the end. After [`Notifiers::remove`] has returned no callback
//! of the subscription runs or will run.
//!
//! The internal lock of the index is held for one search and never across a callback. It and the locks of the
//! subscriptions are only ever taken by threads that do not touch managed memory while they hold them. Nothing is
//! allocated after construction.
//!
//! # Not supported
//! Invalidations that must not block (the kernel's OOM reaper has them): in user space the caller can always wait.
//! Skipping the callback for an invalidation of one's own: raising the sequence costs nothing and is what makes
//! snapshots under way start again. Such a callback gives [`InvalidateSeq::set`] nothing to clear.
//!
//! # Kernel
//! `mm/mmu_notifier.c`: `mmu_interval_notifier_insert()`, `mmu_interval_read_begin()` and the rest. *Differences*: a
//! subscription has a sequence of its own, so that an invalidation elsewhere delays nobody; the lock of the driver is
//! part of the subscription; every wait is bounded.

use std::{fmt, marker::PhantomData, sync::Arc, time::Duration};

use thiserror::Error;
use uhmm_sys::addr::{PageRange, VirtAddr};

use crate::{
    device::Invalidation,
    sync::{AtomicU32, AtomicU64, Mutex, MutexGuard, Ordering, TimedOut, Waiter, lock},
};

/// What the owner of a subscription does when translations go away.
pub trait IntervalOps: Send + Sync {
    /// Removes the device's translations of `invalidation.range`: clears the entries in `seq.set`, then waits until no
    /// access through an old one is under way. The range may reach beyond the subscription's.
    ///
    /// Callbacks run at the same time, for ranges that overlap. One that finds no entry may not return before the one that
    /// has just cleared it: the access that the other waits for is under way still.
    ///
    /// # Locking
    /// Called on the fault path, with no lock held: no allocation, no lock that is held across an access to managed
    /// memory. It may start invalidations, and must not remove its own subscription.
    fn invalidate<'a>(&self, invalidation: &Invalidation, seq: InvalidateSeq<'a>) -> Invalidated<'a>;
}

/// The duty of a callback to raise its subscription's sequence.
#[must_use = "set() raises the sequence and gives the receipt"]
pub struct InvalidateSeq<'a> {
    slot: &'a Slot,
}

impl fmt::Debug for InvalidateSeq<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InvalidateSeq")
    }
}

impl<'a> InvalidateSeq<'a> {
    /// Raises the sequence and runs `clear_fn`, both under the subscription's lock. What was committed before is there
    /// for `clear_fn` to remove; what was not will not be.
    ///
    /// # Kernel
    /// `mmu_interval_set_seq()`.
    pub fn set(self, clear_fn: impl FnOnce()) -> Invalidated<'a> {
        let guard = lock(&self.slot.update);
        self.slot.seq.fetch_add(1, Ordering::AcqRel);
        clear_fn();
        drop(guard);
        Invalidated(PhantomData)
    }
}

/// The receipt of a callback: its sequence was raised. It cannot outlive the call, so it cannot be kept for another.
#[derive(Debug)]
#[must_use = "return it from the callback"]
pub struct Invalidated<'a>(PhantomData<&'a Slot>);

/// A callback, held in one of two ways. The memory behind it is touched on the fault path, so it must be memory that
/// the engine never moves: the arena, a static, or the heap of a process whose allocator is private.
#[derive(Clone)]
pub enum Ops {
    /// For good.
    Static(&'static dyn IntervalOps),
    /// Until the subscription and whoever else holds it are gone.
    Shared(Arc<dyn IntervalOps>),
}

impl Ops {
    fn get(&self) -> &dyn IntervalOps {
        match self {
            Self::Static(ops) => *ops,
            Self::Shared(ops) => &**ops,
        }
    }
}

impl fmt::Debug for Ops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ops")
    }
}

impl<T: IntervalOps + 'static> From<&'static T> for Ops {
    fn from(ops: &'static T) -> Self {
        Self::Static(ops)
    }
}

impl<T: IntervalOps + 'static> From<Arc<T>> for Ops {
    fn from(ops: Arc<T>) -> Self {
        Self::Shared(ops)
    }
}

/// A subscription to the invalidations of a range. It lasts until [`Notifiers::remove`]; dropping it without leaves
/// the callback in place for good.
#[must_use = "without it the subscription can never be removed"]
pub struct Subscription {
    slot: u32,
    /// Of the slot, when the subscription got it: tells this subscription from a later one in the same slot.
    era: u32,
    range: PageRange,
    /// Whether the slot was given back.
    gone: AtomicU32,
    /// Kept so that the driver's object is dropped with the subscription, not by a fault that ran meanwhile.
    _ops: Ops,
}

impl Subscription {
    /// The range subscribed to.
    #[must_use]
    pub fn range(&self) -> PageRange {
        self.range
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Subscription({})", self.range)
    }
}

/// The state of a subscription when a snapshot began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "commit() tells whether the snapshot still holds"]
pub struct ReadSeq {
    slot: u32,
    seq: u64,
}

/// An invalidation hit the range since the sequence was read: take a new one and a new snapshot. A subscription that
/// was removed always gives this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{range}: invalidated since the sequence was read")]
pub struct Retry {
    /// The subscription's range.
    pub range: PageRange,
}

/// The right to set entries from a snapshot that still holds. No invalidation of the range passes while it lives, so
/// keep it short, and touch no managed memory.
#[must_use = "set the device's entries while it lives"]
pub struct UpdateGuard<'a> {
    range: PageRange,
    _update: MutexGuard<'a, ()>,
}

impl UpdateGuard<'_> {
    /// The range whose entries may be set.
    #[must_use]
    pub fn range(&self) -> PageRange {
        self.range
    }
}

impl fmt::Debug for UpdateGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UpdateGuard({})", self.range)
    }
}

/// Why a subscription was not inserted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum InsertError {
    /// There are as many subscriptions as there can be.
    #[error("{range}: all {capacity} subscriptions are in use")]
    Full {
        /// The range that was asked for.
        range: PageRange,
        /// How many there can be.
        capacity: usize,
    },
}

/// An invalidation from its mark to its end. The mapping may change while this lives; dropping it is the end.
#[must_use = "keep it until the mapping has changed: dropping it lets readers go on"]
pub struct Invalidating<'a> {
    active: &'a ActiveSet,
    /// Bit of the active set, `None` where it was full.
    bit: Option<u32>,
}

impl fmt::Debug for Invalidating<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Invalidating")
    }
}

impl Drop for Invalidating<'_> {
    fn drop(&mut self) {
        self.active.end(self.bit);
    }
}

/// What belongs to one subscription, wherever its entry in the index moves.
#[derive(Debug)]
struct Slot {
    /// Invalidations that have reached the subscription. Never reset, so that a sequence of an earlier user of the
    /// slot can only be too old.
    seq: AtomicU64,
    /// Callbacks under way.
    calls: AtomicU32,
    /// Subscriptions that have used the slot; changes when one is removed.
    era: AtomicU32,
    /// Held while entries are set or cleared.
    update: Mutex<()>,
}

/// A subscription's place in the index.
struct Entry {
    start: u64,
    end: u64,
    /// Greatest end in the part of the array that the search tree roots here.
    max_end: u64,
    slot: u32,
    ops: Option<Ops>,
}

impl Entry {
    const EMPTY: Self = Self { start: 0, end: 0, max_end: 0, slot: 0, ops: None };

    fn key(&self) -> Key {
        (self.start, self.slot)
    }
}

/// The order of the index.
type Key = (u64, u32);

/// Subscriptions sorted by start. The array is also a balanced search tree, the middle of each part being its root,
/// and with the greatest end of each part a search for overlaps goes down one path.
struct Index<const N: usize> {
    len: usize,
    entries: [Entry; N],
    /// Slots not in use are `free[..free_len]`.
    free: [u32; N],
    free_len: usize,
}

impl<const N: usize> Index<N> {
    #[expect(clippy::cast_possible_truncation, reason = "the assertion bounds N")]
    const fn new() -> Self {
        const { assert!(N > 0 && N <= u32::MAX as usize) };
        let mut free = [0; N];
        let mut n = 0;
        while n < N {
            free[n] = (N - 1 - n) as u32;
            n += 1;
        }
        Self { len: 0, entries: [const { Entry::EMPTY }; N], free, free_len: N }
    }

    /// Position of the first entry whose key is not below `key`.
    fn position(&self, key: Key) -> usize {
        self.entries[..self.len].partition_point(|entry| entry.key() < key)
    }

    fn insert(&mut self, range: PageRange, ops: Ops) -> Option<u32> {
        self.free_len = self.free_len.checked_sub(1)?;
        let slot = self.free[self.free_len];
        let (start, end) = (range.start().get(), range.end().get());
        let at = self.position((start, slot));
        self.entries[at..=self.len].rotate_right(1);
        self.entries[at] = Entry { start, end, max_end: end, slot, ops: Some(ops) };
        self.len += 1;
        self.rebuild(0, self.len);
        Some(slot)
    }

    /// Takes a subscription out of the index, if it is there; its slot stays in use.
    fn unlink(&mut self, key: Key) -> Option<Ops> {
        let at = self.position(key);
        if self.entries[..self.len].get(at).is_none_or(|entry| entry.key() != key) {
            return None;
        }
        let ops = self.entries[at].ops.take();
        self.entries[at..self.len].rotate_left(1);
        self.len -= 1;
        self.rebuild(0, self.len);
        ops
    }

    fn free(&mut self, slot: u32) {
        self.free[self.free_len] = slot;
        self.free_len += 1;
    }

    /// Computes the greatest ends of `low..high`. The recursion is as deep as the logarithm of the length.
    fn rebuild(&mut self, low: usize, high: usize) -> u64 {
        if low == high {
            return 0;
        }
        let mid = usize::midpoint(low, high);
        let most = self.rebuild(low, mid).max(self.rebuild(mid + 1, high)).max(self.entries[mid].end);
        self.entries[mid].max_end = most;
        most
    }

    /// The first entry at or after position `from` that overlaps `range`, searching `low..high`. The recursion is as
    /// deep as the logarithm of the length.
    fn overlap(&self, low: usize, high: usize, from: usize, range: PageRange) -> Option<&Entry> {
        if low >= high || high <= from {
            return None;
        }
        let mid = usize::midpoint(low, high);
        let entry = &self.entries[mid];
        if entry.max_end <= range.start().get() {
            return None;
        }
        if let Some(found) = self.overlap(low, mid, from, range) {
            return Some(found);
        }
        if entry.start >= range.end().get() {
            return None;
        }
        if mid >= from && entry.end > range.start().get() {
            return Some(entry);
        }
        self.overlap(mid + 1, high, from, range)
    }
}

/// Most invalidations at a time that are told apart. More are possible: they hold up every reader.
const ACTIVE_MAX: usize = if cfg!(loom) { 2 } else { 64 };

/// The ranges of the invalidations that run.
#[derive(Debug)]
struct ActiveSet {
    /// Places taken, by bit.
    claimed: AtomicU64,
    /// Places whose range is filled in, by bit. Changed by read-modify-write only: a reader that sees any later value
    /// sees everything that happened before an end.
    visible: AtomicU64,
    /// Invalidations that found no place.
    wide: AtomicU64,
    starts: [AtomicU64; ACTIVE_MAX],
    ends: [AtomicU64; ACTIVE_MAX],
}

impl ActiveSet {
    fn begin(&self, range: PageRange) -> Option<u32> {
        let mut claimed = self.claimed.load(Ordering::Relaxed);
        let bit = loop {
            let bit = claimed.trailing_ones();
            if bit as usize >= ACTIVE_MAX {
                self.wide.fetch_add(1, Ordering::AcqRel);
                return None;
            }
            match self.claimed.compare_exchange_weak(claimed, claimed | 1 << bit, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => break bit,
                Err(seen) => claimed = seen,
            }
        };
        self.starts[bit as usize].store(range.start().get(), Ordering::Release);
        self.ends[bit as usize].store(range.end().get(), Ordering::Release);
        self.visible.fetch_or(1 << bit, Ordering::AcqRel);
        Some(bit)
    }

    fn end(&self, bit: Option<u32>) {
        match bit {
            Some(bit) => {
                self.visible.fetch_and(!(1 << bit), Ordering::AcqRel);
                self.claimed.fetch_and(!(1 << bit), Ordering::AcqRel);
            }
            None => {
                self.wide.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    /// Whether an invalidation that overlaps `range` runs. Sees every one that began before something the caller has
    /// seen; of others the ends may be torn, which is no matter: a later callback will raise the sequence.
    fn hits(&self, range: PageRange) -> bool {
        let mut visible = self.visible.load(Ordering::Acquire);
        while visible != 0 {
            let place = visible.trailing_zeros() as usize;
            visible &= visible - 1;
            let start = self.starts[place].load(Ordering::Acquire);
            let end = self.ends[place].load(Ordering::Acquire);
            let active = PageRange::from_ends(VirtAddr::new(start), VirtAddr::new(end));
            // A torn range may be empty or upside down; wait until it is whole.
            if active.map_or(true, |active| active.overlaps(range)) {
                return true;
            }
        }
        self.wide.load(Ordering::Acquire) != 0
    }
}

/// A callback that is about to run. The fields are dropped in this order: the slot is let go last.
struct Call<'a> {
    ops: Ops,
    key: Key,
    hold: Hold<'a>,
}

/// Keeps [`Notifiers::remove`] waiting.
struct Hold<'a>(&'a Slot);

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The subscriptions of one address space, at most `N`. Some 100 bytes for each, all inside: keep it in a static or
/// in memory that the engine never moves.
pub struct Notifiers<const N: usize = 1024> {
    wait_limit: Duration,
    index: Mutex<Index<N>>,
    active: ActiveSet,
    slots: [Slot; N],
}

impl<const N: usize> fmt::Debug for Notifiers<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Notifiers({} of {N} subscriptions)", self.len())
    }
}

impl<const N: usize> Notifiers<N> {
    /// Makes an empty set. Waits of [`Notifiers::read_begin`] and [`Notifiers::remove`] end after `wait_limit`.
    #[must_use]
    #[cfg(not(loom))]
    pub const fn new(wait_limit: Duration) -> Self {
        const fn slot() -> Slot {
            Slot { seq: AtomicU64::new(0), calls: AtomicU32::new(0), era: AtomicU32::new(0), update: Mutex::new(()) }
        }
        Self {
            wait_limit,
            index: Mutex::new(Index::new()),
            active: ActiveSet {
                claimed: AtomicU64::new(0),
                visible: AtomicU64::new(0),
                wide: AtomicU64::new(0),
                starts: [const { AtomicU64::new(0) }; ACTIVE_MAX],
                ends: [const { AtomicU64::new(0) }; ACTIVE_MAX],
            },
            slots: [const { slot() }; N],
        }
    }

    /// The same for loom, whose types cannot be made at compile time.
    #[must_use]
    #[cfg(loom)]
    pub fn new(wait_limit: Duration) -> Self {
        let zeros = || std::array::from_fn(|_| AtomicU64::new(0));
        Self {
            wait_limit,
            index: Mutex::new(Index::new()),
            active: ActiveSet {
                claimed: AtomicU64::new(0),
                visible: AtomicU64::new(0),
                wide: AtomicU64::new(0),
                starts: zeros(),
                ends: zeros(),
            },
            slots: std::array::from_fn(|_| Slot {
                seq: AtomicU64::new(0),
                calls: AtomicU32::new(0),
                era: AtomicU32::new(0),
                update: Mutex::new(()),
            }),
        }
    }

    /// Number of subscriptions.
    #[must_use]
    pub fn len(&self) -> usize {
        lock(&self.index).len
    }

    /// Whether there is no subscription.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Subscribes to the invalidations of `range`, which may overlap others, nest or be the same.
    ///
    /// # Errors
    /// [`InsertError::Full`].
    ///
    /// # Locking
    /// The index, while entries are moved: some microseconds with thousands of subscriptions.
    ///
    /// # Kernel
    /// `mm/mmu_notifier.c: mmu_interval_notifier_insert()`.
    pub fn insert(&self, range: PageRange, ops: impl Into<Ops>) -> Result<Subscription, InsertError> {
        let ops = ops.into();
        let inserted = lock(&self.index).insert(range, ops.clone());
        let slot = inserted.ok_or(InsertError::Full { range, capacity: N })?;
        let era = self.slot(slot).era.load(Ordering::Acquire);
        Ok(Subscription { slot, era, range, gone: AtomicU32::new(0), _ops: ops })
    }

    /// Ends a subscription. When it returns, no callback runs or will run, and no commit succeeds. Removing it once
    /// more does nothing.
    ///
    /// # Errors
    /// [`TimedOut`], if a callback does not end in time. No new one begins; call again to wait on.
    ///
    /// # Locking
    /// May block: the caller holds no [`UpdateGuard`] of it and no lock that the callback takes, and is not the
    /// callback.
    ///
    /// # Kernel
    /// `mm/mmu_notifier.c: mmu_interval_notifier_remove()`.
    pub fn remove(&self, subscription: &Subscription) -> Result<(), TimedOut> {
        let slot = self.slot(subscription.slot);
        let mut index = lock(&self.index);
        let mut unlinked = None;
        // The next user of the slot can have the same key, so only the era tells whether the entry is this one's.
        if slot.era.load(Ordering::Relaxed) == subscription.era {
            unlinked = index.unlink((subscription.range.start().get(), subscription.slot));
            slot.era.store(subscription.era.wrapping_add(1), Ordering::Release);
        }
        drop(index);
        drop(unlinked);
        // A commit that has seen the old era holds this lock until it is done; later ones see the new era.
        drop(lock(&slot.update));
        let mut waiter = Waiter::new(self.wait_limit);
        while subscription.gone.load(Ordering::Acquire) == 0 && slot.calls.load(Ordering::Acquire) != 0 {
            waiter.pause()?;
        }
        if subscription.gone.swap(1, Ordering::AcqRel) == 0 {
            lock(&self.index).free(subscription.slot);
        }
        Ok(())
    }

    /// Begins a snapshot: waits while an invalidation that overlaps the subscription's range runs.
    ///
    /// # Errors
    /// [`TimedOut`], if one does not end in time.
    ///
    /// # Locking
    /// May block: the caller holds no [`UpdateGuard`] and no [`Invalidating`] of an overlapping range.
    ///
    /// # Kernel
    /// `mm/mmu_notifier.c: mmu_interval_read_begin()`.
    pub fn read_begin(&self, subscription: &Subscription) -> Result<ReadSeq, TimedOut> {
        self.read_begin_within(subscription, self.wait_limit)
    }

    /// As [`Notifiers::read_begin`], for as long as `limit` at most.
    pub(crate) fn read_begin_within(&self, subscription: &Subscription, limit: Duration) -> Result<ReadSeq, TimedOut> {
        let mut waiter = Waiter::new(limit);
        loop {
            // The sequence comes first. One that includes the callback of an invalidation makes its mark visible too;
            // the other way round, one could begin, call back and still run after the look at the marks.
            let seq = self.slot(subscription.slot).seq.load(Ordering::Acquire);
            if !self.active.hits(subscription.range) {
                return Ok(ReadSeq { slot: subscription.slot, seq });
            }
            waiter.pause()?;
        }
    }

    /// Whether the snapshot is known to be out of date. Only a hint to stop early: to use the snapshot,
    /// [`Notifiers::commit`] it.
    ///
    /// # Kernel
    /// `mmu_interval_check_retry()`.
    #[must_use]
    pub fn read_retry(&self, subscription: &Subscription, seq: ReadSeq) -> bool {
        self.check_owner(subscription, seq);
        self.slot(seq.slot).seq.load(Ordering::Acquire) != seq.seq
    }

    /// Ends a snapshot: takes the subscription's lock and gives the right to set the device's entries, unless an
    /// invalidation has reached the subscription since [`Notifiers::read_begin`].
    ///
    /// # Errors
    /// [`Retry`]: begin again.
    ///
    /// # Locking
    /// Takes the subscription's lock until the guard is dropped. The caller holds no other guard of it, and starts no
    /// invalidation meanwhile.
    ///
    /// # Panics
    /// If `seq` belongs to another subscription.
    ///
    /// # Kernel
    /// `mmu_interval_read_retry()` under the driver's lock.
    pub fn commit(&self, subscription: &Subscription, seq: ReadSeq) -> Result<UpdateGuard<'_>, Retry> {
        self.check_owner(subscription, seq);
        let slot = self.slot(seq.slot);
        let update = lock(&slot.update);
        if slot.seq.load(Ordering::Relaxed) != seq.seq || slot.era.load(Ordering::Relaxed) != subscription.era {
            return Err(Retry { range: subscription.range });
        }
        Ok(UpdateGuard { range: subscription.range, _update: update })
    }

    /// Starts an invalidation: marks the range, then calls every subscription that overlaps it, the invalidation's
    /// owner as well. When it returns no device uses an old translation, and the mapping may change.
    ///
    /// # Locking
    /// None is held across a callback. The caller holds no [`UpdateGuard`].
    ///
    /// # Kernel
    /// `mmu_notifier_invalidate_range_start()`; dropping the result is `mmu_notifier_invalidate_range_end()`.
    pub fn invalidate(&self, invalidation: &Invalidation) -> Invalidating<'_> {
        let range = invalidation.range;
        let running = Invalidating { active: &self.active, bit: self.active.begin(range) };
        let mut last = None;
        // Ascending by key: a subscription that was there at the start is met once, whatever else comes and goes.
        while let Some(call) = self.next_call(range, last) {
            last = Some(call.key);
            let Invalidated(_) = call.ops.get().invalidate(invalidation, InvalidateSeq { slot: call.hold.0 });
        }
        running
    }

    /// Has one subscription give up what it has, and its snapshots begin again. No mapping changes.
    pub(crate) fn invalidate_one(&self, subscription: &Subscription, invalidation: &Invalidation) {
        let key = (subscription.range.start().get(), subscription.slot);
        let call = {
            let index = lock(&self.index);
            let at = index.position(key);
            index.entries[..index.len].get(at).filter(|entry| entry.key() == key).map(|entry| self.call(entry))
        };
        if let Some(call) = call {
            let Invalidated(_) = call.ops.get().invalidate(invalidation, InvalidateSeq { slot: call.hold.0 });
        }
    }

    /// The first callback after `last` for `range`, held against removal.
    fn next_call(&self, range: PageRange, last: Option<Key>) -> Option<Call<'_>> {
        let index = lock(&self.index);
        let from = last.map_or(0, |(start, slot)| index.position((start, slot + 1)));
        index.overlap(0, index.len, from, range).map(|entry| self.call(entry))
    }

    /// An entry's callback, held against removal. The caller has the index locked.
    fn call(&self, entry: &Entry) -> Call<'_> {
        let slot = self.slot(entry.slot);
        slot.calls.fetch_add(1, Ordering::AcqRel);
        let hold = Hold(slot);
        let ops = entry.ops.clone().expect("an entry in the index has its callback");
        Call { ops, key: entry.key(), hold }
    }

    fn slot(&self, slot: u32) -> &Slot {
        &self.slots[slot as usize]
    }

    fn check_owner(&self, subscription: &Subscription, seq: ReadSeq) {
        assert_eq!(subscription.slot, seq.slot, "{}: sequence of another subscription", subscription.range);
    }
}
