//! One private reservation for everything that the engine owns.
//!
//! The engine's own memory must never be managed: a page state, a stack or a queue that could be away would make the
//! fault path wait for itself. So all of it comes out of one reservation, made once, whose addresses are easy to
//! recognise: whatever lies in [`range`] is not the program's. Staying inside one reservation also means that the engine
//! never maps memory at a moment when the program is about to use the same hole.
//!
//! ```text
//! base                                                                          base + size
//!  | typed: slices, values, heap, stacks ->|   reserved, PROT_NONE   |<- untyped: pages |
//!  |---------- read and write -------------|                         |- read and write -|
//! ```
//!
//! *Typed* memory holds Rust objects and grows from the low end. *Untyped* memory ([`pages`]) is only ever reached by raw
//! copies ([`crate::mem::HostBytes`]) and by the kernel (`UFFDIO_MOVE`), and grows from the high end. The two never
//! overlap, which is what lets safe code copy bytes about in the one without being able to damage the other.
//!
//! Both ends are committed in steps of 2 MiB with `mprotect`, so the arena stays three VMAs. The kernel commits pages
//! at their first touch; what is handed out is zero until then. Nothing is ever given back, but [`PrivateAlloc`]
//! recycles what it handed out.
//!
//! # Locking
//! One short lock, held for a few instructions and at most one `mprotect`. Nothing is called out to while it is held. Every
//! change of state is one store, made last, so that a forked child finds a consistent arena whatever its parent's
//! other threads were at; the child opens the lock with [`reset_lock_after_fork`].
// UNSAFETY: hands out references into memory that it maps itself.

use std::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize,
    Ordering::{Acquire, Relaxed, Release},
};

use crate::{
    Errno,
    addr::{BLOCK_SIZE, PAGE_SIZE, PageRange, VirtAddr},
    lock::Lock,
    raw,
};

pub use crate::heap::PrivateAlloc;

/// Size of the reservation where an allocation comes before [`init`].
pub const DEFAULT_BYTES: u64 = 4 << 30;
/// The smallest reservation that [`init`] falls back to.
pub const MIN_BYTES: u64 = 256 << 20;

/// How much is committed at a time.
const STEP: u64 = BLOCK_SIZE;
/// Alignment of typed memory: a cache line.
const LINE: u64 = 64;

/// # Invariants
/// With `base != 0`: `base..base + size` is reserved for ever, `base <= low <= low_committed <= high_committed <= high
/// <= base + size`, and both `base..low_committed` and `high_committed..base + size` are readable and writable.
struct Arena {
    lock: Lock,
    /// Zero until the reservation exists. Stored last, with release.
    base: AtomicU64,
    size: AtomicU64,
    low: AtomicU64,
    low_committed: AtomicU64,
    high_committed: AtomicU64,
    high: AtomicU64,
}

static ARENA: Arena = Arena {
    lock: Lock::new(),
    base: AtomicU64::new(0),
    size: AtomicU64::new(0),
    low: AtomicU64::new(0),
    low_committed: AtomicU64::new(0),
    high_committed: AtomicU64::new(0),
    high: AtomicU64::new(0),
};

/// Makes the reservation, or returns the one that exists whatever its size.
///
/// `bytes` is rounded up to 2 MiB. Where the address space limit refuses, half of it is tried, down to
/// [`MIN_BYTES`] (or to `bytes`, if that is less).
///
/// # Errors
/// `ENOMEM`: even the smallest reservation does not fit.
///
/// # Kernel
/// `mmap(2)` with `PROT_NONE` and `MAP_NORESERVE`: costs address space only. Left out of core dumps, and out of
/// transparent huge pages but where [`advise_huge`] asks for them.
pub fn init(bytes: u64) -> Result<PageRange, Errno> {
    let held = ARENA.lock.lock();
    if let Some(range) = range() {
        return Ok(range);
    }
    let smallest = MIN_BYTES.min(bytes.max(1)).next_multiple_of(STEP);
    let mut bytes = bytes.max(1).checked_next_multiple_of(STEP).ok_or(Errno::NOMEM)?;
    let range = loop {
        match reserve(bytes) {
            Ok(range) => break range,
            Err(e) if bytes <= smallest => return Err(e),
            Err(_) => bytes = (bytes / 2).next_multiple_of(STEP).max(smallest),
        }
    };
    let (base, end) = (range.start().get(), range.end().get());
    ARENA.size.store(range.bytes(), Relaxed);
    ARENA.low.store(base, Relaxed);
    ARENA.low_committed.store(base, Relaxed);
    ARENA.high_committed.store(end, Relaxed);
    ARENA.high.store(end, Relaxed);
    // INVARIANT: nothing is committed and nothing handed out, at both ends.
    ARENA.base.store(base, Release);
    drop(held);
    Ok(range)
}

/// Reserves `bytes`, aligned to a block.
fn reserve(bytes: u64) -> Result<PageRange, Errno> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let padded = bytes.checked_add(STEP).ok_or(Errno::NOMEM)?;
    let start = raw::mmap(padded, libc::PROT_NONE, flags, None, 0)?;
    let base = start.get().next_multiple_of(STEP);
    let (before, after) = (base - start.get(), STEP - (base - start.get()));
    if before > 0 {
        // SAFETY: the part before `base` of the mapping just made, unknown to anybody else.
        unsafe { raw::munmap(start, before) }?;
    }
    if after > 0 {
        // SAFETY: the part after the end of the mapping just made, unknown to anybody else.
        unsafe { raw::munmap(VirtAddr::new(base + bytes), after) }?;
    }
    let range = PageRange::new(VirtAddr::new(base), bytes).map_err(|_| Errno::NOMEM)?;
    // SAFETY: the advice changes no bytes. A kernel without it dumps more, which is no reason to fail.
    let _ = unsafe { raw::madvise(range, libc::MADV_DONTDUMP) };
    // SAFETY: changes no bytes. After `mlockall` with `MCL_FUTURE` each step committed would be filled at once, the
    // sparse tables and all of staging with it.
    let _ = unsafe { raw::syscall(libc::SYS_munlock, [range.start().get(), range.bytes()]) };
    // SAFETY: the advice changes no bytes. Sparse tables must not be blown up to whole huge pages.
    let _ = unsafe { raw::madvise(range, libc::MADV_NOHUGEPAGE) };
    Ok(range)
}

/// The whole reservation, once there is one.
#[must_use]
pub fn range() -> Option<PageRange> {
    let base = ARENA.base.load(Acquire);
    if base == 0 {
        return None;
    }
    Some(PageRange::new(VirtAddr::new(base), ARENA.size.load(Relaxed)).expect("the reservation is a range"))
}

/// Bytes handed out so far: typed, and untyped.
#[must_use]
pub fn used() -> (u64, u64) {
    match range() {
        None => (0, 0),
        Some(range) => (ARENA.low.load(Relaxed) - range.start().get(), range.end().get() - ARENA.high.load(Relaxed)),
    }
}

/// Whether `start..start + len` lies in memory that [`pages`] handed out.
pub(crate) fn is_untyped(start: VirtAddr, len: u64) -> bool {
    let Some(range) = range() else { return false };
    let Some(end) = start.get().checked_add(len) else { return false };
    // `high` only ever falls, so an answer of yes stays true.
    ARENA.high.load(Acquire) <= start.get() && end <= range.end().get()
}

/// Whether `start..start + len` touches the arena outside the memory that [`pages`] handed out: Rust objects, stacks,
/// and what is not handed out yet. Safe functions that change memory by address refuse such a range.
pub(crate) fn touches_typed(start: VirtAddr, len: u64) -> bool {
    let Some(range) = range() else { return false };
    let end = start.get().saturating_add(len);
    start.get() < ARENA.high.load(Acquire) && range.start().get() < end
}

/// Typed memory: zero, `align`ed (a power of two).
pub(crate) fn alloc_typed(bytes: u64, align: u64) -> Result<VirtAddr, Errno> {
    if range().is_none() {
        init(DEFAULT_BYTES)?;
    }
    let _held = ARENA.lock.lock();
    let start = ARENA.low.load(Relaxed).checked_next_multiple_of(align.max(1)).ok_or(Errno::NOMEM)?;
    let end = start.checked_add(bytes).ok_or(Errno::NOMEM)?;
    let (committed, limit) = (ARENA.low_committed.load(Relaxed), ARENA.high_committed.load(Relaxed));
    if end > limit {
        return Err(Errno::NOMEM);
    }
    if end > committed {
        let upto = end.next_multiple_of(STEP).min(limit);
        commit(committed, upto)?;
        ARENA.low_committed.store(upto, Relaxed);
    }
    // INVARIANT: `end` is committed. Stored last: what a fork interrupts before this is only unused.
    ARENA.low.store(end, Release);
    Ok(VirtAddr::new(start))
}

/// Memory for raw copies and for `UFFDIO_MOVE`: readable, writable, zero until used, never freed.
///
/// `bytes` is rounded up to pages; `align` is a power of two, at least a page.
///
/// # Errors
/// `ENOMEM`: the arena is full, or the kernel refuses to commit.
///
/// # Panics
/// If `bytes` is zero or `align` is not a power of two.
pub fn pages(bytes: u64, align: u64) -> Result<PageRange, Errno> {
    assert!(bytes > 0 && align.is_power_of_two(), "an allocation has a size and an alignment");
    if range().is_none() {
        init(DEFAULT_BYTES)?;
    }
    let bytes = bytes.checked_next_multiple_of(PAGE_SIZE).ok_or(Errno::NOMEM)?;
    let _held = ARENA.lock.lock();
    let start = ARENA.high.load(Relaxed).checked_sub(bytes).ok_or(Errno::NOMEM)? & !(align.max(PAGE_SIZE) - 1);
    let (committed, limit) = (ARENA.high_committed.load(Relaxed), ARENA.low_committed.load(Relaxed));
    if start < limit {
        return Err(Errno::NOMEM);
    }
    if start < committed {
        let from = (start & !(STEP - 1)).max(limit);
        commit(from, committed)?;
        ARENA.high_committed.store(from, Relaxed);
    }
    // INVARIANT: everything from `start` up is committed.
    ARENA.high.store(start, Release);
    PageRange::new(VirtAddr::new(start), bytes).map_err(|_| Errno::NOMEM)
}

fn commit(from: u64, upto: u64) -> Result<(), Errno> {
    let range = PageRange::from_ends(VirtAddr::new(from), VirtAddr::new(upto)).map_err(|_| Errno::NOMEM)?;
    // SAFETY: reserved and not handed out, so no reference leads into it.
    unsafe { raw::mprotect(range, libc::PROT_READ | libc::PROT_WRITE) }
}

/// Asks for huge pages in memory that [`pages`] handed out.
///
/// # Errors
/// `EINVAL`: not such memory, or a kernel without huge pages.
pub fn advise_huge(range: PageRange) -> Result<(), Errno> {
    if !is_untyped(range.start(), range.bytes()) {
        return Err(Errno::INVAL);
    }
    // SAFETY: untyped memory, which no reference leads into; the advice changes no bytes besides.
    unsafe { raw::madvise(range, libc::MADV_HUGEPAGE) }
}

/// Types that can live in fresh arena memory for ever.
///
/// # Safety
/// 1. All-zero bytes are a valid value.
/// 2. The type has no destructor.
/// 3. It is changed through shared references only by atomic operations, if at all.
pub unsafe trait Zeroed: Sync + 'static {}

/// [`Zeroed`] types that have no invalid value at all, so that they can live in memory that another process fills.
///
/// # Safety
/// Every bit pattern is a valid value.
pub unsafe trait AnyBits: Zeroed {}

macro_rules! zeroed {
    ($($t:ty),*) => { $(
        // SAFETY: an atomic number: zero is a value, nothing is dropped, all access is atomic.
        unsafe impl Zeroed for $t {}
        // SAFETY: every bit pattern is a number.
        unsafe impl AnyBits for $t {}
    )* };
}
zeroed!(AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize);

// SAFETY: zero is `false`, nothing is dropped, all access is atomic.
unsafe impl Zeroed for AtomicBool {}
// SAFETY: an array has what its elements have.
unsafe impl<T: Zeroed, const N: usize> Zeroed for [T; N] {}
// SAFETY: an array has what its elements have.
unsafe impl<T: AnyBits, const N: usize> AnyBits for [T; N] {}

/// A slice of `len` zero values, at least 64-byte aligned, never freed.
///
/// The kernel commits its pages one by one at their first touch: a large table that is used sparsely is cheap.
///
/// # Errors
/// `ENOMEM`: the arena is full, or the kernel refuses to commit.
pub fn slice<T: Zeroed>(len: usize) -> Result<&'static [T], Errno> {
    let bytes = (len as u64).checked_mul(size_of::<T>() as u64).ok_or(Errno::NOMEM)?;
    let addr = alloc_typed(bytes, LINE.max(align_of::<T>() as u64))?;
    // SAFETY:
    // 1. `addr` starts `bytes` of arena memory that is mapped for ever, aligned for `T` and handed out only here.
    // 2. It is fresh from the kernel, so it is zero, which is a valid `T` by the contract of `Zeroed`; the same
    //    contract makes shared references to it sound for ever.
    Ok(unsafe { std::slice::from_raw_parts(raw::ptr(addr).cast::<T>(), len) })
}

/// Moves `value` into the arena, for ever: its destructor never runs.
///
/// # Errors
/// `ENOMEM`: the arena is full, or the kernel refuses to commit.
pub fn value<T: Sync + Send + 'static>(value: T) -> Result<&'static T, Errno> {
    let addr = alloc_typed(size_of::<T>() as u64, LINE.max(align_of::<T>() as u64))?;
    let place = raw::ptr(addr).cast::<T>();
    // SAFETY: `place` is aligned for `T`, as large, mapped for ever and handed out only here.
    unsafe { place.write(value) };
    // SAFETY: it was initialised just now, and is never moved or changed but through this reference.
    Ok(unsafe { &*place })
}

/// Opens the arena's and the private heap's locks in a forked child, where the thread that may have held them is
/// not there any more.
///
/// To be called in the child only, before anything else there uses the arena, while the child has one thread.
pub fn reset_lock_after_fork() {
    ARENA.lock.reset();
    crate::heap::reset_lock();
}
