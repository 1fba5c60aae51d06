//! The program's memory through system calls, on the real kernel: protection, holes and half-mapped ranges; and the
//! ordering and waiting primitives.
// UNSAFETY: maps and protects scratch memory.

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::{
    sync::atomic::{
        AtomicU32, AtomicUsize,
        Ordering::{Acquire, Relaxed, Release},
    },
    thread,
    time::{Duration, Instant},
};

use common::Map;
use uhmm_sys::{
    Errno,
    access::{self, Copied},
    addr::{BLOCK_SIZE, PAGE_SIZE, VirtAddr},
    arena, fence,
    futex::{self, WaitResult},
    maps::Prot,
    mem::{HostBytes, Mapping},
    pagemap::{Page, Pagemap},
};

const DENIED: Copied = Copied { done: 0, stop: Some(Errno::FAULT) };

#[test]
fn protection_is_obeyed_in_both_directions() {
    let map = Map::anon(3);
    map.fill(1);
    map.protect(1, 1, libc::PROT_NONE);
    map.protect(2, 1, libc::PROT_READ);
    let mut bytes = [0; 16];
    let page = |n| map.range.page(n);
    assert_eq!(access::read(page(0), &mut bytes), Copied::all(16));
    assert_eq!(bytes, [1; 16]);
    assert_eq!(access::read(page(1), &mut bytes), DENIED);
    assert_eq!(access::read(page(2), &mut bytes), Copied::all(16));
    assert_eq!(access::write(page(0), &[9; 16]), Copied::all(16));
    assert_eq!(access::write(page(1), &[9; 16]), DENIED);
    assert_eq!(access::write(page(2), &[9; 16]), DENIED, "a read-only page is not written, unlike by /proc/self/mem");
    assert_eq!((map.load(0), map.load(2)), (9, 3));
}

#[test]
fn progress_ends_at_the_page_that_stops_it() {
    let map = Map::anon(8);
    map.fill(1);
    let start = map.start().add(100);
    let wanted = usize::try_from(7 * PAGE_SIZE).unwrap();
    map.protect(5, 1, libc::PROT_NONE);
    let mut bytes = vec![0; wanted];
    let expected = Copied { done: 5 * PAGE_SIZE - 100, stop: Some(Errno::FAULT) };
    assert_eq!(access::read(start, &mut bytes), expected);
    assert_eq!((bytes[0], bytes[usize::try_from(expected.done).unwrap() - 1]), (1, 5));
    assert_eq!(access::write(start, &vec![7; wanted]), expected);
    assert_eq!((map.load(0), map.load(4), map.load(6)), (1, 7, 7), "page 0 from byte 100 on, nothing past the stop");
}

#[test]
fn what_is_not_mapped_answers_an_error() {
    let mut bytes = [0; 8];
    for addr in [0, 8, 0x7fff_ffff_f000, u64::MAX - 4095, u64::MAX - 3, 1 << 63] {
        assert_eq!(access::read(VirtAddr::new(addr), &mut bytes), DENIED, "{addr:#x}");
        assert_eq!(access::write(VirtAddr::new(addr), &bytes), DENIED, "{addr:#x}");
    }
    assert_eq!(access::read(VirtAddr::new(0), &mut []), Copied::all(0));
}

#[test]
fn staging_and_device_memory_are_ends_too() {
    let map = Map::anon(4);
    map.fill(1);
    let range = arena::pages(4 * PAGE_SIZE, PAGE_SIZE).unwrap();
    let host = HostBytes::in_arena(range.start(), range.bytes()).unwrap();
    let device = Mapping::memfd("ends", 4 * PAGE_SIZE).unwrap();
    assert!(access::read_to_host(map.start(), host).is_all());
    let mut byte = [0];
    host.read(3 * PAGE_SIZE, &mut byte);
    assert_eq!(byte, [4]);
    assert!(access::read_to_mapping(map.start(), &device, PAGE_SIZE, 3 * PAGE_SIZE).is_all());
    device.read(3 * PAGE_SIZE, &mut byte);
    assert_eq!(byte, [3]);
    device.write(0, &[8; 4096]);
    assert!(access::write_from_mapping(map.range.page(2), &device, 0, PAGE_SIZE).is_all());
    assert!(map.is_filled(2, 8));
    host.write(0, &[6; 4096]);
    assert!(access::write_from_host(map.range.page(3), host.slice(0, PAGE_SIZE)).is_all());
    assert!(map.is_filled(3, 6));
    map.unmap(3, 1);
    map.protect(1, 1, libc::PROT_NONE);
    assert_eq!(access::read_to_host(map.start(), host), Copied { done: PAGE_SIZE, stop: Some(Errno::FAULT) });
}

fn states(map: &Map) -> Vec<bool> {
    let mut pages = vec![Page::empty(); map.range.pages()];
    Pagemap::open().unwrap().scan(map.range, &mut pages).unwrap();
    pages.iter().map(|page| page.contains(Page::PRESENT)).collect()
}

#[test]
fn pages_are_populated_and_dropped() {
    let map = Map::anon(6);
    map.advise(libc::MADV_NOHUGEPAGE).unwrap();
    if access::populate_read(map.pages(0, 2)) == Err(Errno::INVAL) {
        println!("skipped: MADV_POPULATE_READ is not there or is masked");
        return;
    }
    access::populate_write(map.pages(3, 2)).unwrap();
    assert_eq!(states(&map), [true, true, false, true, true, false]);
    map.store(3, 9);
    access::populate_write(map.pages(3, 1)).unwrap();
    assert_eq!(map.load(3), 9);
    access::zap(map.pages(1, 3)).unwrap();
    assert_eq!(states(&map), [true, false, false, false, true, false]);
    assert_eq!(map.load(3), 0);
    map.protect(5, 1, libc::PROT_READ);
    assert_eq!(access::populate_write(map.pages(5, 1)), Err(Errno::INVAL));
    map.unmap(2, 1);
    let half = map.pages(1, 2);
    assert_eq!(access::populate_read(half), Err(Errno::NOMEM));
    assert_eq!(access::zap(half), Err(Errno::NOMEM));
}

#[test]
fn locked_pages_are_dropped_too() {
    let map = Map::anon(1);
    map.store(0, 7);
    // SAFETY: locks the test's own page.
    if unsafe { libc::mlock(map.ptr(0).cast(), 4096) } != 0 {
        println!("skipped: no memory may be locked here");
        return;
    }
    access::zap(map.range).unwrap();
    assert_eq!(map.load(0), 0);
}

#[test]
fn protection_is_changed() {
    let map = Map::anon(2);
    map.fill(1);
    access::protect(map.range, Prot::READ).unwrap();
    assert_eq!(access::write(map.start(), &[1]), DENIED);
    access::protect(map.range, Prot::empty()).unwrap();
    assert_eq!(access::read(map.start(), &mut [0]), DENIED);
    access::protect(map.range, Prot::READ | Prot::WRITE).unwrap();
    assert_eq!(access::write(map.start(), &[5]), Copied::all(1));
    assert_eq!(map.load(0), 5);
}

#[test]
fn untyped_arena_memory_may_be_dropped_and_protected() {
    let range = arena::pages(BLOCK_SIZE, BLOCK_SIZE).unwrap();
    let host = HostBytes::in_arena(range.start(), range.bytes()).unwrap();
    host.write(0, &[1]);
    access::zap(range).unwrap();
    let mut byte = [1];
    host.read(0, &mut byte);
    assert_eq!(byte, [0]);
}

/// Store, fence, load on two threads: both must not read the old value. Without the barrier in `heavy` some of ten
/// thousand rounds fail on x86-64, where a load overtakes a store: one store lets both sides off, at slightly different
/// moments.
#[test]
fn light_and_heavy_fences_pair() {
    println!("membarrier: {}", fence::register_membarrier());
    const ROUNDS: usize = 20_000;
    static X: Line = Line(AtomicUsize::new(0));
    static Y: Line = Line(AtomicUsize::new(0));
    static START: Line = Line(AtomicUsize::new(0));
    static DONE: Line = Line(AtomicUsize::new(0));
    let until = |line: &Line, round: usize| {
        for spin in 0u64.. {
            if line.0.load(Acquire) >= round {
                return;
            }
            if spin % 4096 == 4095 {
                // The other side has no CPU.
                thread::yield_now();
            }
        }
    };
    let pause = |steps: usize| (0..steps).for_each(|_| std::hint::spin_loop());
    thread::scope(|scope| {
        let light = scope.spawn(move || {
            let mut seen = Vec::with_capacity(ROUNDS);
            for round in 1.. {
                until(&START, round);
                if START.0.load(Relaxed) == usize::MAX {
                    break;
                }
                pause(round % 7);
                X.0.store(round, Relaxed);
                fence::light();
                seen.push(Y.0.load(Relaxed) >= round);
                DONE.0.store(round, Release);
            }
            seen
        });
        let mut heavy = Vec::with_capacity(ROUNDS);
        // On a busy machine the two sides seldom run at the same time; such rounds tell little and take long.
        let deadline = Instant::now() + Duration::from_secs(4);
        for round in 1..=ROUNDS {
            if Instant::now() > deadline {
                break;
            }
            START.0.store(round, Release);
            pause(round % 11);
            Y.0.store(round, Relaxed);
            fence::heavy();
            heavy.push(X.0.load(Relaxed) >= round);
            until(&DONE, round);
        }
        START.0.store(usize::MAX, Release);
        let light = light.join().unwrap();
        let missed = light.iter().zip(&heavy).filter(|(saw_y, saw_x)| !**saw_y && !**saw_x).count();
        assert_eq!(missed, 0, "rounds in which neither saw the other");
    });
}

/// A number on a cache line of its own.
#[repr(align(128))]
struct Line(AtomicUsize);

#[test]
fn futexes_wait_wake_and_time_out() {
    let word = AtomicU32::new(1);
    assert_eq!(futex::wait(&word, 0, None), WaitResult::Changed);
    let start = Instant::now();
    assert_eq!(futex::wait(&word, 1, Some(Duration::from_millis(20))), WaitResult::TimedOut);
    assert!(start.elapsed() >= Duration::from_millis(20));
    assert_eq!(futex::wake(&word, 10), 0);
    thread::scope(|scope| {
        let waiters: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    while word.load(Acquire) == 1 {
                        assert_ne!(futex::wait(&word, 1, None), WaitResult::TimedOut);
                    }
                })
            })
            .collect();
        let mut woken = 0;
        while woken < 1 {
            woken += futex::wake(&word, 1);
        }
        word.store(2, Release);
        futex::wake(&word, u32::MAX);
        waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
    });
}
