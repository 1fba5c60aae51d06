//! Blocks of 2 MiB that have one entry in the device's page table: when they do, what takes it away, and that what it says is
//! right whatever else happens.

mod common;

use std::{
    sync::atomic::{
        AtomicBool, AtomicU64, AtomicUsize,
        Ordering::{Relaxed, SeqCst},
    },
    time::{Duration, Instant},
};

use uhmm::{
    DeviceFaultPolicy::{Map, Migrate},
    FaultError, MigrateOptions, Mirror, Mm,
    addr::{BLOCK_PAGES, PageRange},
    device::Cause,
    device_table::{Access, Pte},
    mm::Location,
};
use uhmm_devices::soft::{AccessError, Lane, SoftConfig, SoftDevice};
use uhmm_testkit::isolated;

use crate::common::{MIB, Memory, PAGE, Random, configs, eventually, lane, register, stamp};

/// The order of an entry for a block.
const BLOCK: u32 = 9;

fn entries(mirror: &Mirror<SoftDevice>, memory: &Memory) -> Vec<(PageRange, Pte)> {
    let mut all = Vec::new();
    mirror.port().unwrap().table().for_each(memory.range(), |range, pte| all.push((range, pte)));
    all
}

fn send(mirror: &Mirror<SoftDevice>, memory: &Memory) {
    let report = mirror.migrate(memory.range(), &MigrateOptions::default());
    assert!(report.is_complete(), "{:?}", report.summary().collect::<Vec<_>>());
}

/// Asserts that one entry serves the whole block, and returns it.
#[track_caller]
fn one_entry(mirror: &Mirror<SoftDevice>, memory: &Memory) -> Pte {
    let all = entries(mirror, memory);
    assert!(all.len() == 1 && all[0].0 == memory.range() && all[0].1.order() == BLOCK, "{all:?}");
    all[0].1
}

/// Reads all pages of a block through a lane, and checks them.
fn read_all(lane: &mut Lane, memory: &Memory) {
    let mut bytes = vec![0; BLOCK_PAGES * PAGE];
    lane.read(memory.addr(0, 0), &mut bytes).unwrap();
    for (n, word) in bytes.chunks(8).enumerate() {
        assert_eq!(word, stamp(n / 512, n % 512).to_ne_bytes(), "page {} number {}", n / 512, n % 512);
    }
}

#[test]
fn a_block_on_the_device_has_one_entry() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        for config in configs(8 * MIB) {
            for memory in [Memory::new(BLOCK_PAGES), Memory::huge(1)] {
                let mirror = register(&mm, &config, 0);
                memory.fill();
                send(&mirror, &memory);
                let entry = one_entry(&mirror, &memory);
                assert!(entry.pfn().is_some_and(|first| first.get() % 512 == 0) && entry.allows(Access::Atomic));
                let mut lane = lane(&mirror, Map);
                read_all(&mut lane, &memory);
                assert_eq!(lane.walks(), 1, "one look-up serves all pages of the block");
                // A fault installs it too.
                mm.invalidate(memory.range(), Cause::Protect);
                assert!(entries(&mirror, &memory).is_empty());
                assert_eq!(lane.load_u64(memory.addr(77, 8)), Ok(stamp(77, 1)));
                assert_eq!(one_entry(&mirror, &memory), entry);
                let fault = mirror.port().unwrap().fault(memory.addr(77, 0), Access::Read, Map).unwrap();
                assert_eq!((fault.order(), fault.pfn()), (BLOCK, entry.pfn().map(|first| first.add(77))));
                let reports = mirror.snapshot(memory.range()).unwrap();
                assert!(reports.iter().all(|page| page.order() == BLOCK && page.local_frame().is_some()));
                lane.store_u64(memory.addr(511, 8), 5).unwrap();
                assert_eq!(memory.get(511, 1), 5);
                memory.word(511, 1).store(stamp(511, 1), Relaxed);
                memory.check();
                drop(lane);
                mirror.close().unwrap();
            }
        }
        Ok(())
    });
}

#[test]
fn a_block_in_a_huge_page_of_the_cpu_has_one_entry() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        let mirror = register(&mm, &SoftConfig::ram("soft", 8 * MIB), 0);
        let memory = Memory::huge(1);
        memory.fill();
        if mirror.snapshot(memory.range()).unwrap()[0].order() != BLOCK {
            println!("skip: the kernel gave no huge page, or does not tell");
            return Ok(());
        }
        let mut lane = lane(&mirror, Map);
        read_all(&mut lane, &memory);
        let entry = one_entry(&mirror, &memory);
        assert!(entry.is_host() && !entry.allows(Access::Write));
        lane.store_u64(memory.addr(300, 8), 5).unwrap();
        assert_eq!(memory.get(300, 1), 5);
        assert!(one_entry(&mirror, &memory).allows(Access::Write));
        memory.word(300, 1).store(stamp(300, 1), Relaxed);
        let walks = lane.walks();
        read_all(&mut lane, &memory);
        assert!(lane.walks() <= walks + 1);
        // One page goes to the device, and one is taken exclusively; the others are where they were.
        assert!(mirror.migrate(memory.part(40, 1), &MigrateOptions::default()).is_complete());
        assert!(mirror.exclusive(memory.part(41, 1)).is_complete());
        let look = |page| mirror.port().unwrap().table().lookup(memory.addr(page, 0));
        assert!(look(40).pfn().is_some() && look(41).is_none(), "{:?} {:?}", look(40), look(41));
        assert!((0..BLOCK_PAGES).filter(|n| !(40..42).contains(n)).all(|n| look(n).is_host() && look(n).order() == 0));
        read_all(&mut lane, &memory);
        memory.check();
        Ok(())
    });
}

/// What happens to some pages of a block that has one entry, and what those pages hold afterwards.
struct Change<'a> {
    what: &'a str,
    change: &'a dyn Fn(&Memory, PageRange),
    then: Then,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Same,
    Zero,
    Gone,
}

#[test]
fn a_change_of_some_pages_leaves_the_others_their_entries() {
    isolated!(|| {
        let mm = &Mm::open().unwrap();
        let mirror = &register(mm, &SoftConfig::ram("soft", 8 * MIB), 0);
        let other = &register(mm, &SoftConfig::ram("other", 8 * MIB), 0);
        let changes: [Change<'_>; 8] = [
            Change { what: "munmap", change: &|memory, part| memory.unmap(part), then: Then::Gone },
            Change { what: "a new mapping", change: &|memory, part| memory.renew(part), then: Then::Zero },
            Change {
                what: "MADV_DONTNEED",
                change: &|memory, part| memory.advise(part, libc::MADV_DONTNEED),
                then: Then::Zero,
            },
            Change {
                what: "mprotect",
                change: &|memory, part| {
                    mm.invalidate(part, Cause::Protect);
                    memory.protect_part(part, libc::PROT_NONE);
                },
                then: Then::Gone,
            },
            Change {
                what: "a touch",
                change: &|memory, part| {
                    let page = usize::try_from((part.start().get() - memory.range().start().get()) / 4096).unwrap();
                    assert_eq!(memory.get(page, 3), stamp(page, 3));
                },
                then: Then::Same,
            },
            Change { what: "home", change: &|_, part| assert!(mm.home(part).is_complete()), then: Then::Same },
            Change {
                what: "exclusive access",
                change: &|_, part| assert!(mirror.exclusive(part).is_complete()),
                then: Then::Same,
            },
            Change {
                what: "another device",
                change: &|_, part| assert!(other.migrate(part, &MigrateOptions::default()).is_complete()),
                then: Then::Same,
            },
        ];
        // Each at addresses of its own: what was just discarded stays for a while.
        let memories: Vec<Memory> = changes.iter().map(|_| Memory::huge(1)).collect();
        for (Change { what, change, then }, memory) in changes.into_iter().zip(&memories) {
            println!("{what}");
            memory.fill();
            send(mirror, memory);
            let entry = one_entry(mirror, memory);
            let (first, pages) = (100, 20);
            let part = memory.part(first, pages);
            change(memory, part);
            // Whatever left the device, or the mapping, has no entry, and the rest has what it had. The thread that raised an event
            // goes on before the books are done, and this looks past the gate that a lane waits at meanwhile.
            let is_right = |page: usize| {
                let pte = mirror.port().unwrap().table().lookup(memory.addr(page, 0));
                let changed = then != Then::Same && (first..first + pages).contains(&page);
                match mm.residency(memory.addr(page, 0)).at {
                    Location::Device(id, pfn) if id == mirror.id() && !changed => {
                        let same = entry.pfn().unwrap().add(u32::try_from(page).unwrap());
                        pte.order() == 0 && pte.pfn() == Some(pfn) && pfn == same
                    }
                    _ => pte.is_none(),
                }
            };
            eventually(what, || (0..BLOCK_PAGES).all(is_right));
            let left = BLOCK_PAGES - entries(mirror, memory).len();
            // A touch brings all of what left as one huge page, the rest has what belongs to it.
            let most = if what == "a touch" { BLOCK_PAGES } else { 64 };
            assert!((1..=most).contains(&left), "{what}: {left} pages lost their entries");
            let mut lane = lane(mirror, Map);
            for page in 0..BLOCK_PAGES {
                let changed = (first..first + pages).contains(&page);
                let want = match then {
                    Then::Gone if changed => {
                        let error = lane.load_u64(memory.addr(page, 24));
                        assert!(
                            matches!(
                                error,
                                Err(AccessError::Fault(FaultError::NoVma { .. } | FaultError::Denied { .. }))
                            ),
                            "{what}: page {page}: {error:?}"
                        );
                        continue;
                    }
                    Then::Zero if changed => 0,
                    _ => stamp(page, 3),
                };
                assert_eq!(lane.load_u64(memory.addr(page, 24)), Ok(want), "{what}: page {page}");
                assert_eq!(memory.get(page, 3), want, "{what}: page {page}");
            }
        }
        Ok(())
    });
}

#[test]
fn blocks_are_right_while_parts_of_them_change() {
    isolated!(|| {
        const BLOCKS: usize = 4;
        const PAGES: usize = BLOCKS * BLOCK_PAGES;
        // Every eighth page is dropped, protected and, in the last block, mapped anew; in one block at a time, so that the
        // others are whole for a while: what was dropped stays with the CPU for half a second.
        let is_scratch = |page: usize| page % 8 == 3;
        let mm = &Mm::open().unwrap();
        let mirror = &register(mm, &SoftConfig::ram("soft", 32 * MIB), 0);
        let memory = &Memory::huge(BLOCKS);
        memory.fill();
        for page in 0..PAGES {
            (0..4).for_each(|n| memory.word(page, n).store(0, Relaxed));
        }
        let stop = &AtomicBool::new(false);
        let (by_cpu, by_lanes, reads, whole) =
            (&AtomicU64::new(0), &AtomicU64::new(0), &AtomicU64::new(0), &AtomicU64::new(0));
        let active = &AtomicUsize::new(0);
        // What a scratch page holds in its first number, at least: what was there before is gone.
        let current: &Vec<AtomicU64> = &(0..PAGES).map(|_| AtomicU64::new(0)).collect();
        std::thread::scope(|s| {
            for policy in [Map, Migrate] {
                let mut lane = lane(mirror, policy);
                s.spawn(move || {
                    let mut random = Random(lane.index() as u64 + 11);
                    let mut bytes = vec![0; BLOCK_PAGES * PAGE];
                    while !stop.load(Relaxed) {
                        let page = random.below(PAGES);
                        if random.below(20) == 0 {
                            let block = page / BLOCK_PAGES * BLOCK_PAGES;
                            let before: Vec<u64> =
                                current[block..block + BLOCK_PAGES].iter().map(|n| n.load(SeqCst)).collect();
                            match lane.read(memory.addr(block, 0), &mut bytes) {
                                Ok(()) => {}
                                // A scratch page was not there.
                                Err(AccessError::Fault(FaultError::NoVma { .. } | FaultError::Denied { .. })) => {
                                    continue;
                                }
                                Err(error) => panic!("{error}"),
                            }
                            for (n, one) in bytes.chunks(PAGE).enumerate() {
                                let word = |i: usize| u64::from_ne_bytes(one[i * 8..i * 8 + 8].try_into().unwrap());
                                if is_scratch(block + n) {
                                    assert!(word(0) == 0 || word(0) >= before[n], "page {}", block + n);
                                } else {
                                    assert_eq!(word(300), stamp(block + n, 300), "page {}", block + n);
                                }
                            }
                            reads.fetch_add(1, Relaxed);
                        } else if is_scratch(page) {
                            let before = current[page].load(SeqCst);
                            if let Ok(number) = lane.load_u64(memory.addr(page, 0)) {
                                assert!(number == 0 || number >= before, "page {page}: {number} after {before}");
                            }
                        } else {
                            lane.fetch_add_u64(memory.addr(page, 8), 1).unwrap();
                            by_lanes.fetch_add(1, Relaxed);
                            let own = memory.addr(page, 1024 + lane.index() * 8);
                            lane.store_u64(own, random.0).unwrap();
                            assert_eq!(lane.load_u64(own), Ok(random.0), "page {page}");
                        }
                    }
                });
            }
            s.spawn(move || {
                let mut random = Random(1);
                while !stop.load(Relaxed) {
                    let block = if random.below(64) == 0 { random.below(BLOCKS) } else { active.load(Relaxed) };
                    let page = block * BLOCK_PAGES + random.below(BLOCK_PAGES);
                    if !is_scratch(page) {
                        memory.word(page, 1).fetch_add(1, Relaxed);
                        by_cpu.fetch_add(1, Relaxed);
                    }
                    std::thread::sleep(Duration::from_micros(200));
                }
            });
            s.spawn(move || {
                let mut random = Random(2);
                let mut number = 0;
                let start = Instant::now();
                while !stop.load(Relaxed) {
                    let turn = start.elapsed().as_millis() / 400 % BLOCKS as u128;
                    let block = usize::try_from(turn).unwrap();
                    active.store(block, Relaxed);
                    let page = block * BLOCK_PAGES + random.below(BLOCK_PAGES / 8) * 8 + 3;
                    let part = memory.part(page, 1);
                    number += 1;
                    match random.below(3) {
                        0 => {
                            mm.invalidate(part, Cause::Protect);
                            memory.protect_part(part, libc::PROT_NONE);
                            std::thread::yield_now();
                            memory.protect_part(part, libc::PROT_READ | libc::PROT_WRITE);
                            continue;
                        }
                        1 if block == BLOCKS - 1 => {
                            mm.invalidate(part, Cause::Unmap);
                            memory.renew(part);
                        }
                        _ => memory.advise(part, libc::MADV_DONTNEED),
                    }
                    current[page].store(number, SeqCst);
                    memory.word(page, 0).store(number, Relaxed);
                    std::thread::sleep(Duration::from_micros(500));
                }
            });
            let start = Instant::now();
            let mut random = Random(3);
            while start.elapsed() < Duration::from_secs(4) {
                let block = random.below(BLOCKS) * BLOCK_PAGES;
                let _ = match random.below(4) {
                    0 => mm.home(memory.part(block, BLOCK_PAGES)),
                    1 => mm.home(memory.part(block + random.below(BLOCK_PAGES), 1)),
                    _ => mirror.migrate(memory.part(block, BLOCK_PAGES), &MigrateOptions::default()),
                };
                whole
                    .fetch_add(entries(mirror, memory).iter().filter(|e| e.1.order() == BLOCK).count() as u64, Relaxed);
            }
            stop.store(true, Relaxed);
        });
        let sum: u64 = (0..PAGES).filter(|&page| !is_scratch(page)).map(|page| memory.get(page, 1)).sum();
        let (by_cpu, by_lanes) = (by_cpu.load(Relaxed), by_lanes.load(Relaxed));
        let (reads, whole) = (reads.load(Relaxed), whole.load(Relaxed));
        println!("{by_cpu} by the CPU, {by_lanes} by lanes, {reads} blocks read, {whole} times with one entry");
        assert_eq!(sum, by_cpu + by_lanes);
        assert!(by_cpu > 20 && by_lanes > 20 && reads > 0 && whole > 0);
        Ok(())
    });
}
