//! The arena, the private heap and untyped memory on the real kernel.
// UNSAFETY: allocates and frees raw memory, and forks.

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::{
    alloc::{GlobalAlloc, Layout},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    panic::catch_unwind,
    sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed},
    thread,
};

use common::{Rng, in_child};
use uhmm_sys::{
    Errno,
    addr::{BLOCK_SIZE, PAGE_SIZE, PageRange, VirtAddr},
    arena::{self, PrivateAlloc},
    maps::{Maps, Prot},
    mem::{AtomicOp, HostBytes, Mapping, shared_slice, shared_slice_from_fd},
};

fn inside(addr: VirtAddr) -> bool {
    arena::range().is_some_and(|range| range.contains(addr))
}

#[test]
fn the_arena_is_made_once() {
    let first = arena::init(1 << 30).unwrap();
    assert_eq!(arena::init(64 << 20).unwrap(), first);
    assert_eq!(arena::range(), Some(first));
    assert_eq!(first.start().get() % BLOCK_SIZE, 0);
    assert!(first.bytes() >= 1 << 30);
}

#[test]
fn slices_are_zero_aligned_and_apart() {
    let mut last = PageRange::page_of(VirtAddr::new(0)).start();
    for len in [1usize, 3, 1000, 100_000] {
        let slice = arena::slice::<AtomicU32>(len).unwrap();
        let start = VirtAddr::of(slice.as_ptr());
        assert!(inside(start) && start.get().is_multiple_of(64));
        assert_ne!(start, last);
        last = start;
        assert!(slice.iter().all(|word| word.load(Relaxed) == 0));
        slice.iter().for_each(|word| word.store(u32::MAX, Relaxed));
    }
    let nested = arena::slice::<[AtomicU8; 4096]>(3).unwrap();
    assert!(nested.iter().flatten().all(|byte| byte.load(Relaxed) == 0));
    assert_eq!(arena::slice::<AtomicBool>(0).unwrap().len(), 0);
    assert!(matches!(arena::slice::<AtomicU64>(usize::MAX / 8), Err(Errno::NOMEM)));
}

#[test]
fn a_sparse_table_costs_what_is_touched() {
    let resident = || std::fs::read_to_string("/proc/self/statm").unwrap().split(' ').nth(1).unwrap().parse::<u64>();
    let before = resident().unwrap();
    let table = arena::slice::<AtomicU64>(32 << 20).unwrap();
    table[17 << 20].store(1, Relaxed);
    let grown = resident().unwrap().saturating_sub(before);
    // 65536 pages, if it were all there; other tests allocate meanwhile.
    assert!(grown < 32768, "{grown} pages for one word");
    assert_eq!(table[(17 << 20) + 1].load(Relaxed), 0);
}

#[test]
fn values_move_in() {
    #[derive(Debug, PartialEq)]
    #[repr(align(256))]
    struct Wide(u8, Vec<u8>);
    let wide = arena::value(Wide(7, vec![1, 2])).unwrap();
    assert_eq!(VirtAddr::of(wide).get() % 256, 0);
    assert!(inside(VirtAddr::of(wide)));
    assert_eq!(*wide, Wide(7, vec![1, 2]));
}

#[test]
fn untyped_pages_are_aligned_apart_and_known() {
    let mut seen: Vec<PageRange> = Vec::new();
    for (bytes, align) in [(1, 1), (PAGE_SIZE, PAGE_SIZE), (3 * BLOCK_SIZE, BLOCK_SIZE), (5000, 64 << 10)] {
        let range = arena::pages(bytes, align).unwrap();
        assert_eq!(range.start().get() % align.max(PAGE_SIZE), 0);
        assert!(range.bytes() >= bytes && arena::range().unwrap().contains_range(range));
        assert!(seen.iter().all(|other| !other.overlaps(range)));
        let host = HostBytes::in_arena(range.start(), range.bytes()).unwrap();
        let mut last = [1];
        host.read(range.bytes() - 1, &mut last);
        assert_eq!(last, [0]);
        host.write(range.bytes() - 1, &[9]);
        seen.push(range);
    }
    let typed = arena::slice::<AtomicU64>(512).unwrap();
    assert_eq!(HostBytes::in_arena(VirtAddr::of(typed.as_ptr()), 8), None, "Rust objects are not bytes");
    let end = arena::range().unwrap().end();
    assert_eq!(HostBytes::in_arena(end, 1), None);
    assert!(HostBytes::in_arena(VirtAddr::new(end.get() - 1), 1).is_some());
    assert_eq!(HostBytes::in_arena(VirtAddr::new(end.get() - 1), 2), None);
    assert_eq!(HostBytes::in_arena(VirtAddr::new(u64::MAX), 2), None);
    let local = 0u8;
    assert_eq!(HostBytes::in_arena(VirtAddr::of(&raw const local), 1), None);
    assert!(arena::advise_huge(seen[2]).is_ok());
    assert_eq!(arena::advise_huge(PageRange::page_of(VirtAddr::of(typed.as_ptr()))), Err(Errno::INVAL));
}

#[test]
fn the_arena_stays_a_few_mappings() {
    for _ in 0..50 {
        arena::slice::<AtomicU64>(100_000).unwrap();
        arena::pages(BLOCK_SIZE, PAGE_SIZE).unwrap();
    }
    let arena = arena::range().unwrap();
    let mut count = 0;
    let mut total = 0;
    Maps::open()
        .unwrap()
        .for_each(&mut |vma| {
            if let Some(part) = vma.range.intersection(arena) {
                count += 1;
                total += part.bytes();
                assert!(vma.prot == Prot::empty() || vma.prot == Prot::READ | Prot::WRITE);
            }
        })
        .unwrap();
    assert_eq!(total, arena.bytes());
    // Three, but for the tests beside that advise, and commits that the count runs into.
    assert!(count <= 16, "{count} mappings");
}

#[test]
fn a_small_address_space_gets_a_small_arena() {
    // A process of its own: this one has an arena already.
    const VARIABLE: &str = "UHMM_TEST_SMALL_ARENA";
    if std::env::var_os(VARIABLE).is_some() {
        assert_eq!(arena::range(), None, "nothing allocated before");
        let limit = libc::rlimit { rlim_cur: 3 << 30, rlim_max: 3 << 30 };
        // SAFETY: limits this process.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) }, 0);
        assert_eq!(uhmm_sys::limits::rlimit_as(), Some(3 << 30));
        let range = arena::init(16 << 30).unwrap();
        assert_eq!(range.bytes(), 2 << 30);
        assert!(matches!(arena::slice::<AtomicU64>(300 << 20), Err(Errno::NOMEM)));
        assert!(arena::pages(1 << 30, BLOCK_SIZE).is_ok());
        assert!(matches!(arena::pages(2 << 30, BLOCK_SIZE), Err(Errno::NOMEM)));
        assert!(arena::slice::<AtomicU64>(100 << 20).is_ok());
        assert!(matches!(arena::slice::<AtomicU64>(100 << 20), Err(Errno::NOMEM)), "the ends must not meet");
        return;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_small_address_space_gets_a_small_arena", "--test-threads=1"])
        .env(VARIABLE, "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// What the stress test believes of a piece.
struct Piece {
    at: usize,
    layout: Layout,
    mark: u8,
}

impl Piece {
    fn new(layout: Layout, mark: u8) -> Self {
        // SAFETY: the layout's size is not zero.
        let at = unsafe { PrivateAlloc.alloc(layout) };
        assert!(!at.is_null());
        assert_eq!(at.addr() % layout.align(), 0);
        assert!(inside(VirtAddr::of(at)));
        let piece = Self { at: at.expose_provenance(), layout, mark };
        piece.fill();
        piece
    }

    fn ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.at)
    }

    fn fill(&self) {
        // SAFETY: the piece is as large as its layout and the test's own.
        unsafe { self.ptr().write_bytes(self.mark, self.layout.size()) };
    }

    fn check(&self, len: usize) {
        // SAFETY: as above; filled before.
        let bytes = unsafe { std::slice::from_raw_parts(self.ptr(), len) };
        assert!(bytes.iter().all(|byte| *byte == self.mark), "a piece of {:?} was overwritten", self.layout);
    }

    fn free(self) {
        self.check(self.layout.size());
        // SAFETY: allocated with this layout, and not used again.
        unsafe { PrivateAlloc.dealloc(self.ptr(), self.layout) };
    }

    fn resize(&mut self, size: usize) {
        // SAFETY: allocated with this layout; the new size is not zero.
        let at = unsafe { PrivateAlloc.realloc(self.ptr(), self.layout, size) };
        assert!(!at.is_null());
        let kept = self.layout.size().min(size);
        self.at = at.expose_provenance();
        self.layout = Layout::from_size_align(size, self.layout.align()).unwrap();
        self.check(kept);
        self.fill();
    }
}

fn layout(rng: &mut Rng) -> Layout {
    let align = 1usize << rng.below(14);
    let size = match rng.below(10) {
        0..=6 => 1 + rng.below(600),
        7 | 8 => 1 + rng.below(20_000),
        _ => 1 + rng.below(300_000),
    };
    Layout::from_size_align(usize::try_from(size).unwrap(), align).unwrap()
}

fn stress(seed: u64, rounds: usize) {
    let mut rng = Rng(seed);
    let mut live: Vec<Piece> = Vec::new();
    for round in 0..rounds {
        match rng.below(8) {
            0..=3 => live.push(Piece::new(layout(&mut rng), round.to_le_bytes()[0])),
            4..=6 if !live.is_empty() => {
                let n = usize::try_from(rng.below(live.len() as u64)).unwrap();
                live.swap_remove(n).free();
            }
            _ if !live.is_empty() => {
                let n = usize::try_from(rng.below(live.len() as u64)).unwrap();
                let size = layout(&mut rng).size();
                live[n].resize(size);
            }
            _ => {}
        }
    }
    live.into_iter().for_each(Piece::free);
}

#[test]
fn the_private_heap_never_overlaps_or_forgets() {
    thread::scope(|scope| {
        for seed in 1..=4 {
            scope.spawn(move || stress(seed * 0x9e37_79b9, 4000));
        }
    });
}

#[test]
fn the_private_heap_recycles() {
    let round = || {
        let mut rng = Rng(77);
        let pieces: Vec<_> = (0..500).map(|_| Piece::new(layout(&mut rng), 1)).collect();
        pieces.into_iter().for_each(Piece::free);
    };
    // A process of its own thread of allocation: beside other tests the arena grows anyhow.
    let status = in_child(|| {
        arena::reset_lock_after_fork();
        let layout = Layout::new::<[u64; 40]>();
        let mut first = [std::ptr::null_mut(); 64];
        for pass in 0..100 {
            let before = arena::used();
            let mut pieces = [std::ptr::null_mut(); 64];
            for piece in &mut pieces {
                // SAFETY: the layout's size is not zero.
                *piece = unsafe { PrivateAlloc.alloc(layout) };
            }
            if pass == 0 {
                first = pieces;
            } else if arena::used() != before || !first.iter().all(|piece| pieces.contains(piece)) {
                return 1;
            }
            for piece in pieces {
                // SAFETY: allocated above with this layout.
                unsafe { PrivateAlloc.dealloc(piece, layout) };
            }
        }
        0
    });
    assert_eq!(status, 0);
    round();
}

#[test]
fn a_fork_in_the_middle_leaves_a_usable_heap() {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut seed = 5;
            while !stop.load(Relaxed) {
                seed += 1;
                stress(seed, 200);
            }
        });
        let mut statuses = [0; 50];
        for status in &mut statuses {
            *status = in_child(|| {
                arena::reset_lock_after_fork();
                let mut last = 0usize;
                for n in 0..200usize {
                    let layout = Layout::from_size_align(1 + n * 37 % 3000, 16).unwrap_or(Layout::new::<u64>());
                    // SAFETY: the layout's size is not zero.
                    let at = unsafe { PrivateAlloc.alloc(layout) };
                    if at.is_null() || at.addr() == last {
                        return 1;
                    }
                    last = at.addr();
                    // SAFETY: as large as its layout.
                    unsafe { at.write_bytes(1, layout.size()) };
                    if n % 3 != 0 {
                        // SAFETY: allocated with this layout.
                        unsafe { PrivateAlloc.dealloc(at, layout) };
                        last = 0;
                    }
                }
                0
            });
        }
        // First of all, for a failure would wait for the other thread.
        stop.store(true, Relaxed);
        assert_eq!(statuses, [0; 50]);
    });
}

fn host(pages: u64) -> HostBytes {
    let range = arena::pages(pages * PAGE_SIZE, PAGE_SIZE).unwrap();
    HostBytes::in_arena(range.start(), range.bytes()).unwrap()
}

#[test]
fn bytes_travel_between_staging_and_device() {
    let device = Mapping::memfd("device", 16 * PAGE_SIZE).unwrap();
    let (one, two) = (host(2), host(2));
    let pattern: Vec<u8> = (0..2 * 4096u32).map(|n| (n % 251).to_le_bytes()[0]).collect();
    one.write(0, &pattern);
    one.copy_to(&device, 3 * PAGE_SIZE);
    device.copy(3 * PAGE_SIZE, &device, 3 * PAGE_SIZE + 100, 8192);
    device.copy(3 * PAGE_SIZE + 100, &device, 9 * PAGE_SIZE, 8192);
    two.copy_from(&device, 9 * PAGE_SIZE);
    let mut back = vec![0; pattern.len()];
    two.read(0, &mut back);
    assert!(back == pattern, "also where source and destination overlap");
    HostBytes::copy_between(two.slice(4096, 4096), one.slice(0, 4096));
    one.read(0, &mut back[..4096]);
    assert!(back[..4096] == pattern[4096..]);
    one.fill_zero();
    one.read(0, &mut back);
    assert!(back.iter().all(|byte| *byte == 0));
    device.zero(9 * PAGE_SIZE, 100);
    device.read(9 * PAGE_SIZE + 99, &mut back[..2]);
    assert_eq!(back[..2], [0, pattern[100]]);
}

#[test]
fn out_of_range_panics_before_it_copies() {
    let device = Mapping::memfd("bounds", PAGE_SIZE).unwrap();
    let host = host(1);
    let panics = |f: &dyn Fn()| catch_unwind(std::panic::AssertUnwindSafe(f)).is_err();
    std::panic::set_hook(Box::new(|_| ()));
    let all = [
        panics(&|| device.write(PAGE_SIZE - 1, &[1, 2])),
        panics(&|| device.read(u64::MAX, &mut [0; 2])),
        panics(&|| host.copy_to(&device, 1)),
        panics(&|| host.copy_from(&device, 1)),
        panics(&|| _ = host.slice(1, PAGE_SIZE)),
        panics(&|| _ = device.load_u64(PAGE_SIZE - 4)),
        panics(&|| _ = device.load_u64(4)),
        panics(&|| _ = device.rmw_u32(2, AtomicOp::Add, 1)),
        panics(&|| HostBytes::copy_between(host, host.slice(0, 1))),
        panics(&|| device.copy(0, &device, 1, PAGE_SIZE)),
        panics(&|| _ = device.punch(PAGE_SIZE, 1)),
    ];
    drop(std::panic::take_hook());
    assert_eq!(all, [true; 11]);
    let mut byte = [9];
    device.read(PAGE_SIZE - 1, &mut byte);
    assert_eq!(byte, [0]);
}

#[test]
fn atomic_operations_agree_with_arithmetic() {
    let device = Mapping::memfd("atomics", PAGE_SIZE).unwrap();
    let host = host(1);
    let ops = [AtomicOp::Add, AtomicOp::And, AtomicOp::Or, AtomicOp::Xor, AtomicOp::Min, AtomicOp::Max, AtomicOp::Swap];
    let model = |op, found: u64, operand: u64, bits: u32| {
        let mask = u64::MAX >> (64 - bits);
        mask & match op {
            AtomicOp::Add => found.wrapping_add(operand),
            AtomicOp::And => found & operand,
            AtomicOp::Or => found | operand,
            AtomicOp::Xor => found ^ operand,
            AtomicOp::Min => found.min(operand),
            AtomicOp::Max => found.max(operand),
            _ => operand,
        }
    };
    let mut rng = Rng(3);
    let (mut wide, mut narrow) = (0u64, 0u32);
    for round in 0..700usize {
        let (op, operand) = (ops[round % 7], rng.next());
        let small = u32::try_from(operand >> 32).unwrap();
        assert_eq!(device.rmw_u64(16, op, operand), wide);
        assert_eq!(host.rmw_u64(16, op, operand), wide);
        assert_eq!(device.rmw_u32(28, op, small), narrow);
        assert_eq!(host.rmw_u32(28, op, small), narrow);
        wide = model(op, wide, operand, 64);
        narrow = u32::try_from(model(op, u64::from(narrow), u64::from(small), 32)).unwrap();
    }
    assert_eq!((device.load_u64(16), device.load_u32(28)), (wide, narrow));
    assert_eq!(device.cas_u64(16, wide ^ 1, 5), Err(wide));
    assert_eq!(device.cas_u64(16, wide, 5), Ok(wide));
    assert_eq!(host.cas_u32(28, narrow, 6), Ok(narrow));
    host.store_u64(0, 1 << 40);
    device.store_u32(0, 8);
    assert_eq!((host.load_u64(0), device.load_u64(0), device.load_u64(16), host.load_u32(28)), (1 << 40, 8, 5, 6));
}

#[test]
fn concurrent_additions_are_all_counted() {
    let device = Mapping::memfd("sum", PAGE_SIZE).unwrap();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..10_000).for_each(|_| _ = device.rmw_u32(8, AtomicOp::Add, 1)));
        }
    });
    assert_eq!(device.load_u32(8), 40_000);
}

#[test]
fn punched_memory_is_zero_and_given_back() {
    let device = Mapping::memfd("punch", 64 * PAGE_SIZE).unwrap();
    let blocks = || rustix::fs::fstat(device.as_fd()).unwrap().st_blocks;
    for page in 0..64 {
        device.write(page * PAGE_SIZE, &[7; 4096]);
    }
    let before = blocks();
    device.punch(PAGE_SIZE, 32 * PAGE_SIZE).unwrap();
    assert_eq!(before - blocks(), 32 * 8);
    let mut byte = [1; 3];
    device.read(PAGE_SIZE - 1, &mut byte);
    assert_eq!(byte, [7, 0, 0]);
    device.punch(0, 0).unwrap();
}

#[test]
fn a_mapping_of_a_short_file_is_refused_and_a_memfd_cannot_shrink() {
    let device = Mapping::memfd("sealed", 4 * PAGE_SIZE).unwrap();
    // SAFETY: asks for something that must fail.
    assert_ne!(unsafe { libc::ftruncate(device.as_fd().as_raw_fd(), 4096) }, 0);
    let again = |pages: u64| {
        let fd: OwnedFd = device.as_fd().try_clone_to_owned().unwrap();
        Mapping::from_fd(fd, pages * PAGE_SIZE)
    };
    assert_eq!(again(5).unwrap_err(), Errno::INVAL);
    assert_eq!(again(0).unwrap_err(), Errno::INVAL);
    let second = again(4).unwrap();
    second.write(0, b"same");
    let mut bytes = [0; 4];
    device.read(0, &mut bytes);
    assert_eq!(&bytes, b"same");
    assert_eq!(Mapping::memfd("a\0b", PAGE_SIZE).unwrap_err(), Errno::INVAL);
    let place = second.range();
    drop(second);
    let gone = Maps::open().unwrap().find(place.start()).unwrap();
    assert!(gone.is_none_or(|vma| !vma.range.overlaps(place) || vma.range != place));
}

#[test]
fn parent_and_child_see_shared_slices_alike() {
    let words = shared_slice::<AtomicU64>(1000).unwrap();
    let device = Mapping::memfd("control", 4 * PAGE_SIZE).unwrap();
    let mapped = shared_slice_from_fd::<[AtomicU32; 4]>(device.as_fd(), PAGE_SIZE, 256).unwrap();
    assert!(words.iter().all(|word| word.load(Relaxed) == 0));
    let status = in_child(|| {
        words[999].store(5, Relaxed);
        mapped[255][3].store(6, Relaxed);
        0
    });
    assert_eq!((status, words[999].load(Relaxed), mapped[255][3].load(Relaxed)), (0, 5, 6));
    assert_eq!(device.load_u32(2 * PAGE_SIZE - 4), 6);
    assert_eq!(shared_slice::<AtomicU64>(0).unwrap_err(), Errno::INVAL);
    assert_eq!(shared_slice_from_fd::<AtomicU8>(device.as_fd(), 0, 4 * 4096 + 1).unwrap_err(), Errno::INVAL);
    assert_eq!(shared_slice_from_fd::<AtomicU8>(device.as_fd(), 1, 1).unwrap_err(), Errno::INVAL);
}
