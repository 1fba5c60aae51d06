//! An allocator whose memory is the arena's: [`PrivateAlloc`].
//!
//! For the preload library, which lives in a program whose `malloc` it manages: what the engine allocates through
//! `Box` or `Vec` must not be in memory that the engine moves, and must not take `malloc`'s locks. It is made for few
//! and small allocations, not for speed.
//!
//! Sizes are rounded up to a class. Up to 2 KiB, classes are cut from 64 KiB spans; above, they are runs of 1, 2, 3, 4,
//! 6, 8, 12, ... pages. Each class has a list of free pieces, linked through their first word. Pieces are not merged and
//! a class never gives memory to another: the private heap is as large as the sum of its classes' peaks. Large free
//! pieces return their pages to the kernel.
//!
//! # Locking
//! One short lock around each list operation and (for a new piece) the arena's. No signal handler may allocate here.
// UNSAFETY: implements `GlobalAlloc`, whose callers get raw memory.

use std::{
    alloc::{GlobalAlloc, Layout},
    ptr::{NonNull, null_mut},
    sync::atomic::{
        AtomicPtr, AtomicU64,
        Ordering::{Relaxed, Release},
    },
};

use crate::{
    addr::{PAGE_SIZE, PageRange, VirtAddr},
    arena,
    lock::Lock,
    raw,
};

/// Piece sizes below a page. All are multiples of 16; for larger alignments a class that is a multiple is chosen.
const SMALL: [u64; 14] = [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048];
/// Small pieces are cut from spans of this size.
const SPAN: u64 = 64 << 10;
/// Runs: two classes for each power of two of pages, up to 2^27 pages.
const RUNS: usize = 2 * 28;
/// Runs that are aligned to their own size, for alignments above a page: one class for each power of two of pages.
const ALIGNED: usize = 28;
/// Free pieces of at least this size keep only their first page.
const GIVE_BACK: u64 = 64 << 10;

/// The first word of a free piece.
struct Free {
    next: *mut Free,
}

/// A list of free pieces, changed under the lock only. A change is one store: whatever a fork interrupts leaves a whole
/// list, less a piece at worst.
struct List(AtomicPtr<Free>);

impl List {
    const fn new() -> Self {
        Self(AtomicPtr::new(null_mut()))
    }

    /// # Safety
    /// The lock is held; `piece` is aligned, at least a word large, and nobody else's.
    unsafe fn push(&self, piece: NonNull<u8>) {
        let piece = piece.cast::<Free>().as_ptr();
        let first = Free { next: self.0.load(Relaxed) };
        // SAFETY: the caller gives the piece away, so its first word is ours to write.
        unsafe { piece.write(first) };
        self.0.store(piece, Release);
    }

    /// # Safety
    /// The lock is held.
    unsafe fn pop(&self) -> Option<NonNull<u8>> {
        let piece = NonNull::new(self.0.load(Relaxed))?;
        // SAFETY: pieces on the list were written by `push` and belong to the list.
        let next = unsafe { piece.as_ref() }.next;
        self.0.store(next, Release);
        Some(piece.cast())
    }
}

struct Heap {
    lock: Lock,
    small: [List; SMALL.len()],
    /// The rest of the span that each small class cuts from, packed as the address of its next piece; a span is
    /// aligned to its size, so the end follows from the address. Zero: no span.
    cut: [AtomicU64; SMALL.len()],
    runs: [List; RUNS],
    aligned: [List; ALIGNED],
}

static HEAP: Heap = Heap {
    lock: Lock::new(),
    small: [const { List::new() }; SMALL.len()],
    cut: [const { AtomicU64::new(0) }; SMALL.len()],
    runs: [const { List::new() }; RUNS],
    aligned: [const { List::new() }; ALIGNED],
};

pub(crate) fn reset_lock() {
    HEAP.lock.reset();
}

/// Where a layout is served from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// Index into [`SMALL`].
    Small(usize),
    /// Index of a run class, and its bytes.
    Run(usize, u64),
    /// Index of an aligned class, and its bytes.
    Aligned(usize, u64),
}

impl Class {
    /// The class of a layout, or `None` where no class is as large.
    fn of(layout: Layout) -> Option<Self> {
        let (size, align) = (layout.size().max(1) as u64, layout.align() as u64);
        if align > PAGE_SIZE {
            let pages = size.max(align).div_ceil(PAGE_SIZE).checked_next_power_of_two()?;
            let n = pages.trailing_zeros() as usize;
            return (n < ALIGNED).then_some(Self::Aligned(n, pages * PAGE_SIZE));
        }
        let fits = |&class: &u64| class >= size && class % align == 0;
        if let Some(n) = SMALL.iter().position(fits) {
            return Some(Self::Small(n));
        }
        let pages = size.div_ceil(PAGE_SIZE);
        let (n, pages) = Self::run_class(pages)?;
        Some(Self::Run(n, pages * PAGE_SIZE))
    }

    /// The smallest of 1, 2, 3, 4, 6, 8, 12, ... that is at least `pages`, and its index.
    fn run_class(pages: u64) -> Option<(usize, u64)> {
        let power = pages.checked_next_power_of_two()?;
        let (log, three_quarters) = (power.trailing_zeros() as usize, power / 4 * 3);
        // Even indices are the powers of two, the odd index below each is three quarters of it.
        let (n, pages) = if three_quarters >= pages { (2 * log - 1, three_quarters) } else { (2 * log, power) };
        (n < RUNS).then_some((n, pages))
    }
}

impl Heap {
    fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(class) = Class::of(layout) else { return null_mut() };
        let _held = self.lock.lock();
        let list = match class {
            Class::Small(n) => &self.small[n],
            Class::Run(n, _) => &self.runs[n],
            Class::Aligned(n, _) => &self.aligned[n],
        };
        // SAFETY: the lock is held.
        if let Some(piece) = unsafe { list.pop() } {
            return piece.as_ptr();
        }
        let fresh = match class {
            Class::Small(n) => self.cut(n),
            Class::Run(_, bytes) => arena::alloc_typed(bytes, PAGE_SIZE).ok(),
            Class::Aligned(_, bytes) => arena::alloc_typed(bytes, bytes).ok(),
        };
        fresh.map_or(null_mut(), raw::ptr)
    }

    /// Cuts a piece from the class's span, or from a new one. The lock is held.
    fn cut(&self, n: usize) -> Option<VirtAddr> {
        let (size, rest) = (SMALL[n], self.cut[n].load(Relaxed));
        let span_end = rest.next_multiple_of(SPAN);
        // `rest` at a span's start means that the span before it was used up to its last byte.
        let piece =
            if rest != span_end && rest + size <= span_end { rest } else { arena::alloc_typed(SPAN, SPAN).ok()?.get() };
        self.cut[n].store(piece + size, Release);
        Some(VirtAddr::new(piece))
    }

    /// # Safety
    /// `piece` came from [`Heap::alloc`] with the same layout and is used no more.
    unsafe fn free(&self, piece: NonNull<u8>, layout: Layout) {
        let Some(class) = Class::of(layout) else { return };
        let (list, bytes) = match class {
            Class::Small(n) => (&self.small[n], SMALL[n]),
            Class::Run(n, bytes) => (&self.runs[n], bytes),
            Class::Aligned(n, bytes) => (&self.aligned[n], bytes),
        };
        if bytes >= GIVE_BACK {
            let rest = VirtAddr::of(piece.as_ptr()).add(PAGE_SIZE);
            if let Ok(rest) = PageRange::new(rest, bytes - PAGE_SIZE) {
                // SAFETY: inside the piece, which nobody uses any more. Failure only keeps the memory.
                let _ = unsafe { raw::madvise(rest, libc::MADV_DONTNEED) };
            }
        }
        let _held = self.lock.lock();
        // SAFETY: the lock is held and the caller gives the piece away; classes are at least 16 bytes, 16-aligned.
        unsafe { list.push(piece) };
    }
}

/// The engine's private heap, for `#[global_allocator]` in the preload library.
///
/// Works from the first instruction on (it makes the arena with [`arena::DEFAULT_BYTES`] if [`arena::init`] did not come
/// first), on any thread, and in a forked child after [`arena::reset_lock_after_fork`]. All instances are the same heap.
#[derive(Debug, Clone, Copy, Default)]
pub struct PrivateAlloc;

// SAFETY:
// 1. `alloc` returns null or a piece of its class, which is at least as large as the layout and aligned for it (see
//    `Class::of`), and in no list and no other caller's hands.
// 2. `dealloc` puts the piece on the list of the same class, since the class depends on the layout only.
// 3. Nothing here unwinds: no allocation, no indexing by outside values.
unsafe impl GlobalAlloc for PrivateAlloc {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HEAP.alloc(layout)
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        if let Some(piece) = NonNull::new(ptr) {
            // SAFETY: `ptr` came from `alloc` with this layout, by the contract of `GlobalAlloc`.
            unsafe { HEAP.free(piece, layout) };
        }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        let Ok(new) = Layout::from_size_align(new_size, layout.align()) else { return null_mut() };
        if Class::of(new) == Class::of(layout) {
            return ptr;
        }
        let to = HEAP.alloc(new);
        if to.is_null() {
            return to;
        }
        // SAFETY: both pieces are at least as large as the smaller layout, and two live pieces never overlap.
        unsafe { std::ptr::copy_nonoverlapping(ptr, to, layout.size().min(new_size)) };
        // SAFETY: `ptr` came from `alloc` with `layout`, and its bytes have moved.
        unsafe { self.dealloc(ptr, layout) };
        to
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize, align: usize) -> Layout {
        Layout::from_size_align(size, align).unwrap()
    }

    #[test]
    fn classes_hold_their_layouts() {
        for size in (0..70_000).chain([1 << 20, (1 << 20) + 1, 3 << 20, (3 << 20) + 1]) {
            for align in (0..14).map(|n| 1usize << n) {
                let (bytes, natural) = match Class::of(layout(size, align)).unwrap() {
                    Class::Small(n) => (SMALL[n], SMALL[n] & SMALL[n].wrapping_neg()),
                    Class::Run(n, bytes) => {
                        assert_eq!(Class::run_class(bytes / PAGE_SIZE), Some((n, bytes / PAGE_SIZE)));
                        (bytes, PAGE_SIZE)
                    }
                    Class::Aligned(_, bytes) => (bytes, bytes),
                };
                assert!(bytes >= size as u64, "{size} bytes in a class of {bytes}");
                assert!(natural >= align as u64, "{size} bytes aligned {align} in a class aligned {natural}");
            }
        }
        assert_eq!(Class::of(layout(1 << 40, 8)), None);
    }

    #[test]
    fn run_classes_ascend_without_gap() {
        let mut last = 0;
        for n in 0..RUNS {
            if n == 1 {
                // Three quarters of two pages is no whole number.
                continue;
            }
            let (index, pages) = Class::run_class(last + 1).unwrap();
            assert_eq!(index, n, "after {last} pages");
            assert!(pages > last);
            last = pages;
        }
    }
}
