//! The engine on this kernel, with the plainest device there is.
//
// UNSAFETY: the tests make, change and watch memory by raw system calls and pointers.

#![allow(unsafe_code, reason = "tests make the memory that they then watch")]

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::{
    ptr,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

use uhmm::{MigrateOptions, PageOutcome, addr::PageRange, mm::Location};
use uhmm_testkit::isolated;

use crate::common::{Memory, eventually, kit, mm_with};

#[test]
fn pages_leave_and_a_touch_brings_them_home() {
    isolated!(|| {
        let (mm, mirror) = mm_with(64 << 20);
        let memory = Memory::new(1024);
        memory.fill();
        let report = mirror.migrate(memory.range(), &MigrateOptions::default());
        assert_eq!(report.count(PageOutcome::Moved), 1024, "{:?}", report.summary().collect::<Vec<_>>());
        assert_eq!(mirror.frames_used(), 1024);
        assert_eq!(mm.pages_away(), 1024);
        assert!(matches!(mm.residency(memory.range().start()).at, Location::Device(d, _) if d == mirror.id()));
        memory.check();
        // The thread goes on as soon as the page is there; the books follow.
        eventually("nothing is away", || mm.pages_away() == 0 && mirror.frames_used() == 0);
        assert_eq!(mm.residency(memory.range().start()).at, Location::Cpu);
        drop(mirror);
        mm.close().unwrap();
        Ok(())
    });
}

#[test]
fn a_huge_folio_moves_whole_and_comes_home_whole() {
    isolated!(|| {
        let (mm, mirror) = mm_with(64 << 20);
        let memory = Memory::huge(4);
        memory.fill();
        for _ in 0..3 {
            let report = mirror.migrate(memory.range(), &MigrateOptions::default());
            assert!(report.is_complete(), "{:?}", report.summary().collect::<Vec<_>>());
            let home = mm.home(memory.range());
            assert!(home.is_complete(), "{:?}", home.summary().collect::<Vec<_>>());
            memory.check();
        }
        let stats = mm.stats();
        if kit::has_move() {
            assert_eq!(stats.get(uhmm::trace::Counter::FoliosOut), 12);
            assert_eq!(stats.get(uhmm::trace::Counter::FoliosHome), 12);
        } else {
            println!("skip: huge pages stay whole by UFFDIO_MOVE only");
        }
        Ok(())
    });
}

#[test]
fn cpu_threads_and_migration_agree_on_every_count() {
    isolated!(|| {
        let (mm, mirror) = mm_with(64 << 20);
        let memory = Memory::new(2048);
        memory.fill();
        let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
        let base = memory.start.addr();
        std::thread::scope(|s| {
            for t in 0..2usize {
                let (stop, rounds) = (&stop, &rounds);
                s.spawn(move || {
                    let mut x = t as u64 + 1;
                    while !stop.load(Relaxed) {
                        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        let page = (x >> 33) as usize % 2048;
                        let word = ptr::with_exposed_provenance_mut::<AtomicU64>(base + page * 4096 + 64);
                        // SAFETY: the word is inside the mapping, aligned, and only ever used atomically.
                        unsafe { &*word }.fetch_add(1, Relaxed);
                        rounds.fetch_add(1, Relaxed);
                    }
                });
            }
            for n in 0..300 {
                let first = (n * 97) % 1900;
                let start = memory.range().page(first);
                let range = PageRange::new(start, 4096 * (1 + (n as u64 * 31) % 148)).unwrap();
                let report = mirror.migrate(range, &MigrateOptions::default());
                assert_eq!(report.outcomes().count(), range.pages());
            }
            stop.store(true, Relaxed);
        });
        let mut sum = 0;
        for page in 0..2048 {
            // SAFETY: the word is inside the mapping, and all other threads have ended.
            sum += unsafe { memory.word(page).wrapping_add(8).read_volatile() };
        }
        assert_eq!(sum, rounds.load(Relaxed));
        memory.check();
        assert!(mm.stats().get(uhmm::trace::Counter::PagesOut) > 1000);
        Ok(())
    });
}
