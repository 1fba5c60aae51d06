//! CPU threads, devices and migrations on the same pages at the same time: every count is exact, and nothing old shows.

mod common;

use std::{
    sync::{
        Mutex,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::{Duration, Instant},
};

use uhmm::{
    DeviceFaultPolicy::{Map, Migrate},
    FaultError, MigrateOptions, Mirror, Mm,
    device::MemoryKind,
    engine::Config,
    mm::Setup,
    trace::Counter,
};
use uhmm_devices::soft::{AccessError, SoftConfig, SoftDevice};
use uhmm_testkit::isolated;

use crate::common::{MIB, Memory, PAGE, Random, configs, lane, register};

/// How long each of these tests runs.
const TIME: Duration = Duration::from_secs(4);

/// Two lanes of each device and one CPU thread add ones to random numbers, while pages move back and forth.
fn add_and_move(mm: &Mm, mirrors: &[Mirror<SoftDevice>], pages: usize) {
    let memory = &Memory::new(pages);
    // Every thread's sum of what it added, and how often a CPU thread and a lane had a turn.
    let (stop, by_cpu, by_lanes) = (&AtomicBool::new(false), &AtomicU64::new(0), &AtomicU64::new(0));
    std::thread::scope(|s| {
        for (number, mirror) in mirrors.iter().enumerate() {
            for policy in [Map, Migrate] {
                let mut lane = lane(mirror, policy);
                s.spawn(move || {
                    let mut random = Random(number as u64 * 2 + 7);
                    while !stop.load(Relaxed) {
                        let (page, n) = (random.below(pages), random.below(4));
                        let add = |lane: &mut uhmm_devices::soft::Lane| lane.fetch_add_u64(memory.addr(page, n * 8), 1);
                        match add(&mut lane) {
                            Ok(_) => by_lanes.fetch_add(1, Relaxed),
                            Err(error) => panic!("lane {}: {error}", lane.index()),
                        };
                        // A store of its own next to it.
                        let own = memory.addr(page, 1024 + (number * 64 + lane.index()) * 8);
                        lane.store_u64(own, random.0 | 1).expect("mapped");
                        let seen = lane.load_u64(own).expect("mapped");
                        assert_eq!(seen, random.0 | 1, "lane {} page {page}", lane.index());
                    }
                });
            }
        }
        s.spawn(move || {
            let mut random = Random(1);
            while !stop.load(Relaxed) {
                let (page, n) = (random.below(pages), random.below(4));
                memory.word(page, n).fetch_add(1, Relaxed);
                by_cpu.fetch_add(1, Relaxed);
                // Leaves the others a share of the machine.
                if random.below(8) == 0 {
                    std::thread::yield_now();
                }
            }
        });
        let start = Instant::now();
        let mut random = Random(3);
        while start.elapsed() < TIME {
            let first = random.below(pages);
            let range = memory.part(first, 1 + random.below(pages - first));
            if random.below(3) == 0 {
                let _ = mm.home(range);
            } else {
                let _ = mirrors[random.below(mirrors.len())].migrate(range, &MigrateOptions::default());
            }
        }
        stop.store(true, Relaxed);
    });
    let sum: u64 = (0..pages).flat_map(|page| (0..4).map(move |n| memory.get(page, n))).sum();
    let (by_cpu, by_lanes) = (by_cpu.load(Relaxed), by_lanes.load(Relaxed));
    let out = mm.stats().get(Counter::PagesOut);
    println!("{by_cpu} by the CPU, {by_lanes} by lanes, {out} pages out");
    assert_eq!(sum, by_cpu + by_lanes);
    assert!(by_cpu > 100 && by_lanes > 100 && out > 100, "{by_cpu} {by_lanes} {out}");
}

#[test]
fn one_device_in_ram_and_the_cpu_count_exactly() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        let mirror = register(&mm, &SoftConfig::ram("ram", 8 * MIB), 0);
        add_and_move(&mm, &[mirror], 450);
        Ok(())
    });
}

#[test]
fn one_device_on_disk_and_the_cpu_count_exactly() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        let mirror = register(&mm, &SoftConfig::file("file", std::env::temp_dir(), 8 * MIB), 0);
        add_and_move(&mm, &[mirror], 450);
        Ok(())
    });
}

#[test]
fn two_devices_and_the_cpu_count_exactly() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        let mirrors = configs(8 * MIB).map(|config| register(&mm, &config, 0));
        add_and_move(&mm, &mirrors, 450);
        Ok(())
    });
}

#[test]
fn a_coherent_device_a_private_one_and_the_cpu_count_exactly() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        let coherent = SoftConfig { kind: MemoryKind::Coherent, ..SoftConfig::ram("coherent", 8 * MIB) };
        let mirrors = [coherent, SoftConfig::ram("private", 8 * MIB)].map(|config| register(&mm, &config, 0));
        add_and_move(&mm, &mirrors, 450);
        Ok(())
    });
}

#[test]
fn few_pages_contended_by_two_devices_and_the_cpu_count_exactly() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        let mirrors = configs(4 * MIB).map(|config| register(&mm, &config, 0));
        add_and_move(&mm, &mirrors, 5);
        Ok(())
    });
}

#[test]
fn a_small_device_evicts_and_counts_exactly() {
    isolated!(|| {
        // A chunk of staging for each page that a lane may take exclusively, and some for the moves.
        let config = Config { staging_chunks: 1100, ..Config::default() };
        let mm = Mm::open_with(Setup { config, ..Setup::default() }).unwrap();
        let mirror = register(&mm, &SoftConfig::ram("ram", 2 * MIB), 0);
        add_and_move(&mm, &[mirror], 1000);
        Ok(())
    });
}

/// A lane may see the memory of a mapping only until `munmap` has returned.
///
/// Each mapping holds its number. A number that is less than the one that was current before the access began comes from
/// a translation that should be gone.
#[test]
fn nothing_of_an_unmapped_mapping_shows_after_munmap() {
    isolated!(|| {
        const PAGES: usize = 40;
        let mm = Mm::open().unwrap();
        for config in configs(4 * MIB) {
            let mirror = &register(&mm, &config, 0);
            let around = Memory::new(PAGES);
            let range = around.make_hole();
            // The number of the mapping that is there, or was last.
            let (current, stop, seen) = (&AtomicU64::new(0), &AtomicBool::new(false), &AtomicU64::new(0));
            let keep: &Mutex<Option<Memory>> = &Mutex::new(None);
            std::thread::scope(|s| {
                for policy in [Map, Migrate] {
                    let mut lane = lane(mirror, policy);
                    s.spawn(move || {
                        let mut random = Random(lane.index() as u64);
                        while !stop.load(Relaxed) {
                            let before = current.load(SeqCst);
                            let page = random.below(PAGES);
                            let addr = range.page(page).add(8);
                            match lane.load_u64(addr) {
                                // Zero is a page of the next mapping that nothing was stored to yet.
                                Ok(0) => {}
                                Ok(number) => {
                                    assert!(number >= before, "page {page}: {number} seen after {before}");
                                    seen.fetch_add(1, Relaxed);
                                }
                                Err(AccessError::Fault(FaultError::NoVma { .. })) => {}
                                // The mapping kept changing.
                                Err(AccessError::Contended { .. }) => {}
                                Err(error) => panic!("{error}"),
                            }
                        }
                    });
                }
                let start = Instant::now();
                let mut random = Random(5);
                let mut number = 0;
                while start.elapsed() < TIME / 2 {
                    number += 1;
                    let memory = Memory::at(range.start(), PAGES);
                    // From here on nothing older may show: `munmap` has returned.
                    current.store(number, SeqCst);
                    (0..PAGES).for_each(|page| memory.word(page, 1).store(number, Relaxed));
                    let first = random.below(PAGES);
                    let _ = mirror.migrate(memory.part(first, PAGES - first), &MigrateOptions::default());
                    if random.below(2) == 0 {
                        (0..PAGES).step_by(3).for_each(|page| assert_eq!(memory.get(page, 1), number));
                    }
                    *keep.lock().unwrap() = Some(memory);
                    *keep.lock().unwrap() = None;
                }
                stop.store(true, Relaxed);
                println!("{number} mappings, {} loads", seen.load(Relaxed));
                assert!(number > 20, "{number} mappings");
            });
            assert!(seen.load(Relaxed) > 100);
        }
        Ok(())
    });
}

#[test]
fn lanes_compute_while_pages_move() {
    isolated!(|| {
        // A sum over memory that nobody changes is right whatever moves, and a transform is done once for each number.
        const PAGES: usize = 1024;
        let mm = &Mm::open().unwrap();
        for config in configs(8 * MIB) {
            let mirror = &register(mm, &config, 0);
            let memory = &Memory::new(PAGES);
            memory.fill();
            let stop = &AtomicBool::new(false);
            std::thread::scope(|s| {
                s.spawn(move || {
                    let mut random = Random(9);
                    while !stop.load(Relaxed) {
                        let first = random.below(PAGES);
                        let range = memory.part(first, 1 + random.below(PAGES - first));
                        let _ = if random.below(2) == 0 {
                            mm.home(range)
                        } else {
                            mirror.migrate(range, &MigrateOptions::default())
                        };
                    }
                });
                for _ in 0..3 {
                    let done = mirror.device().run(2, |lane, half| {
                        let mut page_bytes = vec![0; PAGE];
                        for page in (half * PAGES / 2)..((half + 1) * PAGES / 2) {
                            let addr = memory.addr(page, 0);
                            lane.read(addr, &mut page_bytes).unwrap();
                            for word in page_bytes.chunks_mut(8) {
                                let n = u64::from_ne_bytes(word.try_into().unwrap());
                                word.copy_from_slice(&(n ^ 0xffff).to_ne_bytes());
                            }
                            lane.write(addr, &page_bytes).unwrap();
                        }
                    });
                    assert_eq!(done.map(|done| done.len()), Ok(2));
                }
                stop.store(true, Relaxed);
            });
            for page in 0..PAGES {
                for n in 0..512 {
                    assert_eq!(memory.get(page, n), common::stamp(page, n) ^ 0xffff, "page {page} number {n}");
                }
            }
        }
        Ok(())
    });
}

#[test]
fn more_pages_than_staging_chunks_are_taken_exclusively_one_by_one() {
    isolated!(|| {
        const PAGES: usize = 1500;
        let mm = Mm::open().unwrap();
        let mirror = register(&mm, &SoftConfig::ram("soft", 8 * MIB), 0);
        let memory = Memory::new(PAGES);
        memory.fill();
        let mut lane = lane(&mirror, Map);
        for page in 0..PAGES {
            let old =
                lane.fetch_add_u64(memory.addr(page, 0), 1).unwrap_or_else(|error| panic!("page {page}: {error}"));
            assert_eq!(old, common::stamp(page, 0));
        }
        for page in 0..PAGES {
            assert_eq!(memory.get(page, 0), common::stamp(page, 0) + 1);
        }
        Ok(())
    });
}
