//! What a device sees of the address space, and what becomes of what it saw: reports, faults, its page table, exclusive
//! pages, other devices, and devices that fail, die or go.
//
// UNSAFETY: the tests make, change and watch memory by raw system calls and pointers.
// LONG: one scene for each thing that a device can see.

#![allow(unsafe_code, reason = "tests make the memory that they then watch")]

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::{
    os::fd::AsRawFd,
    sync::atomic::{
        AtomicBool, AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
    time::{Duration, Instant},
};

use uhmm::{
    DeviceFaultPolicy, FaultError, MigrateOptions, Mirror, Mm, PageOutcome, PageReport,
    addr::PageRange,
    device::{Cause, DeviceId},
    device_table::Access,
    mm::{Location, RegisterError},
    trace::Why,
};
use uhmm_testkit::isolated;

use crate::common::{
    eventually,
    kit::{
        Area, BLOCK, End, PAGE, RW, SHAPES, Shape, Via, arg, each_way, expect_page, expect_zero, fork_child, has_move,
        map, open, peek, poke, send, summary, syscall, unmap, virt, wait_for,
    },
    watcher::{FAILS, LOST, WORKS, Watcher},
};

/// Moves what can move of `area` to the device.
fn migrate(mirror: &Mirror<Watcher>, area: &Area) -> uhmm::mm::Report {
    mirror.migrate(area.range(), &MigrateOptions::default())
}

fn finish(mm: Mm, mirrors: impl IntoIterator<Item = Mirror<Watcher>>) {
    for mirror in mirrors {
        mirror.device().check();
    }
    mm.close().unwrap();
}

/// One page's report in a snapshot.
fn look(mirror: &Mirror<Watcher>, addr: usize) -> PageReport {
    let page = PageRange::new(virt(addr), PAGE as u64).unwrap();
    mirror.snapshot(page).unwrap()[0]
}

// Reports.

#[test]
fn a_snapshot_tells_the_kinds_of_pages_apart_and_faults_nothing_in() {
    isolated!(|| {
        let mm = open()?;
        let (ours, theirs) = (Watcher::register(&mm, 1024), Watcher::register(&mm, 1024));
        let area = Area::new(Shape::Small, 1);
        area.part(0..100).fill(1);
        area.part(100..200).check_zero();
        area.part(500..510).unmap();
        assert_eq!(Via::Libc.mprotect(area.page(300), 10 * PAGE, libc::PROT_NONE), 0);
        assert_eq!(Via::Libc.mprotect(area.page(20), 10 * PAGE, libc::PROT_READ), 0);
        send(&ours, &area.part(50..60));
        send(&theirs, &area.part(60..70));
        let pages = ours.snapshot(area.range()).unwrap();
        assert_eq!(pages.len(), 512);
        let each = |range: std::ops::Range<usize>, what: &str, holds: &dyn Fn(PageReport) -> bool| {
            for n in range {
                assert!(holds(pages[n]), "page {n} should be {what}: {:?}", pages[n]);
            }
        };
        let present = |p: PageReport| p.is_valid() && !p.is_error() && p.order() == 0 && p.local_frame().is_none();
        each(0..20, "present", &|p| present(p) && !p.is_zero_page());
        each(20..30, "present and read-only", &|p| present(p) && !p.is_writable());
        each(50..60, "on the device", &|p| p.is_valid() && p.is_writable() && p.local_frame().is_some());
        each(60..70, "nowhere to be seen: another device has it", &|p| p == PageReport::NONE);
        each(100..200, "the page of zeros", &|p| present(p) && p.is_zero_page() && !p.is_writable());
        each(200..300, "not there yet", &|p| p == PageReport::NONE);
        each(300..310, "impossible", &|p| p == PageReport::IMPOSSIBLE);
        each(500..510, "impossible", &|p| p == PageReport::IMPOSSIBLE);
        // Nothing moved, and nothing was faulted in.
        assert_eq!(mm.pages_away(), 20);
        assert_eq!(ours.snapshot(area.part(200..300).range()).unwrap(), vec![PageReport::NONE; 100]);
        // The frame that the report names holds the page.
        let frame = pages[55].local_frame().unwrap();
        let word = ours.device().word(frame);
        assert_eq!(word, peek(area.page(55)));
        finish(mm, [ours, theirs]);
        Ok(())
    });
}

#[test]
fn a_snapshot_tells_huge_pages_and_pages_of_files() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 1024);
        let area = Area::filled(Shape::Huge, 1, 1);
        let report = mirror.snapshot(area.range()).unwrap();
        if report[0].order() == 9 {
            assert!(report.iter().all(|page| page.is_valid() && page.order() == 9));
        } else {
            println!("skip: the kernel gave no huge page");
        }
        send(&mirror, &area);
        let away = mirror.snapshot(area.range()).unwrap();
        assert!(away.iter().all(|page| page.is_valid() && page.local_frame().is_some()));
        let exe = std::fs::File::open("/proc/self/exe").unwrap();
        let file = Via::Libc.mmap(0, 4 * PAGE, libc::PROT_READ, libc::MAP_PRIVATE, exe.as_raw_fd()).unwrap();
        peek(file);
        assert!(look(&mirror, file).is_valid());
        assert!(!look(&mirror, file).is_writable());
        area.check(1);
        finish(mm, [mirror]);
        Ok(())
    });
}

#[test]
fn a_range_fault_makes_pages_valid_for_what_was_asked() {
    isolated!(|| {
        let mm = open()?;
        let (ours, theirs) = (Watcher::register(&mm, 1024), Watcher::register(&mm, 1024));
        for shape in SHAPES {
            let area = Area::new(shape, 1);
            let first = area.part(0..16);
            let read = ours.range_fault(first.range(), Access::Read).unwrap();
            assert!(read.iter().all(|page| page.is_valid()), "{read:?}");
            let write = ours.range_fault(first.range(), Access::Write).unwrap();
            assert!(
                write.iter().all(|page| page.is_valid() && page.is_writable() && !page.is_zero_page()),
                "{write:?}"
            );
            first.check_zero();
            area.fill(1);
            // What is on the device stays there; what is on another comes home.
            send(&ours, &area.part(100..200));
            send(&theirs, &area.part(200..300));
            let pages = ours.range_fault(area.range(), Access::Write).unwrap();
            assert!(pages.iter().all(|page| page.is_valid() && page.is_writable()), "{pages:?}");
            assert_eq!(pages.iter().filter(|page| page.local_frame().is_some()).count(), 100);
            assert_eq!((ours.frames_used(), theirs.frames_used()), (100, 0));
            area.check(1);
            // Also when it is only read: a device cannot reach another's frames.
            send(&theirs, &area.part(200..300));
            let pages = ours.range_fault(area.part(250..260).range(), Access::Read).unwrap();
            assert!(pages.iter().all(|page| page.is_valid() && page.local_frame().is_none()));
            assert_eq!(theirs.frames_used(), 90, "only what was asked for comes home");
            area.check(1);
            area.unmap();
        }
        finish(mm, [ours, theirs]);
        Ok(())
    });
}

#[test]
fn a_range_fault_says_what_it_cannot_have() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 1024);
        let area = Area::filled(Shape::Small, 1, 1);
        let at = |n: usize| virt(area.page(n));
        area.part(400..410).unmap();
        assert_eq!(Via::Libc.mprotect(area.page(100), 10 * PAGE, libc::PROT_READ), 0);
        assert_eq!(Via::Libc.mprotect(area.page(200), 10 * PAGE, libc::PROT_NONE), 0);
        for policy in [DeviceFaultPolicy::Map, DeviceFaultPolicy::Migrate] {
            let port = mirror.port().unwrap();
            let fault = |n: usize, access| port.fault(at(n), access, policy);
            assert_eq!(fault(405, Access::Read), Err(FaultError::NoVma { addr: at(405) }));
            assert_eq!(fault(105, Access::Write), Err(FaultError::Denied { addr: at(105) }));
            assert_eq!(fault(205, Access::Read), Err(FaultError::Denied { addr: at(205) }));
            assert_eq!(fault(205, Access::Write), Err(FaultError::Denied { addr: at(205) }));
            assert!(fault(105, Access::Read).is_ok());
        }
        let range = |pages: std::ops::Range<usize>| area.part(pages).range();
        assert_eq!(mirror.range_fault(range(90..120), Access::Write), Err(FaultError::Denied { addr: at(100) }));
        assert!(mirror.range_fault(range(90..120), Access::Read).is_ok());
        assert_eq!(mirror.range_fault(range(190..220), Access::Read), Err(FaultError::Denied { addr: at(200) }));
        assert_eq!(mirror.range_fault(range(399..405), Access::Read), Err(FaultError::NoVma { addr: at(400) }));
        // Beyond the end of a file.
        let file = tempfile();
        let mapped = Via::Libc.mmap(0, 4 * PAGE, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd()).unwrap();
        let page = PageRange::new(virt(mapped + 2 * PAGE), PAGE as u64).unwrap();
        assert_eq!(mirror.range_fault(page, Access::Read), Err(FaultError::Denied { addr: page.start() }));
        assert_eq!(Via::Libc.mprotect(area.page(100), 200 * PAGE, RW), 0);
        area.part(0..400).check(1);
        finish(mm, [mirror]);
        Ok(())
    });
}

/// A file of one page.
fn tempfile() -> std::fs::File {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).write(true).custom_flags(libc::O_TMPFILE).open(std::env::temp_dir()).unwrap();
    file.write_all_at(&[1; PAGE], 0).unwrap();
    file
}

// The page table.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    /// The page stays in host memory.
    Host,
    /// The page is in a frame of the device.
    Frame,
}

/// For each kind of entry: sets an area up whose page 100 the device has mapped so, does `f`, and sees the entry gone.
fn entry_goes_after(cause: Cause, f: impl Fn(&Mm, &Mirror<Watcher>, &Area, Via)) {
    let mm = open().expect("looked at before");
    let mirror = Watcher::register(&mm, 2048);
    each_way(|shape, via| {
        for entry in [Entry::Host, Entry::Frame] {
            println!("{entry:?}");
            let area = Area::filled(shape, 1, 1);
            // What has been away is the engine's to watch.
            send(&mirror, &area);
            let watched = area.page(100);
            if entry == Entry::Host {
                peek(watched);
                eventually("it is home by the books", || mm.residency(virt(watched)).at == Location::Cpu);
                let pte = mirror.port().unwrap().fault(virt(watched), Access::Write, DeviceFaultPolicy::Map).unwrap();
                assert!(pte.is_host());
            }
            let pte = mirror.device().look(virt(watched));
            assert!(pte.allows(Access::Write), "{pte:?}");
            assert_eq!(pte.is_host(), entry == Entry::Host);
            mirror.device().forget();
            f(&mm, &mirror, &area, via);
            let pte = mirror.device().look(virt(watched));
            assert!(pte.is_none(), "{pte:?} outlived it");
            assert!(mirror.device().saw(cause), "the device was not told why");
            mirror.device().check();
            unmap(area.start, area.len());
        }
    });
    finish(mm, [mirror]);
}

#[test]
fn munmap_takes_translations_away_before_it_returns() {
    isolated!(|| {
        open()?;
        entry_goes_after(Cause::Unmap, |_, _, area, via| {
            assert_eq!(via.munmap(area.page(90), 20 * PAGE), 0);
        });
        Ok(())
    });
}

#[test]
fn mremap_takes_translations_away_before_it_returns() {
    isolated!(|| {
        open()?;
        entry_goes_after(Cause::Unmap, |_, mirror, area, via| {
            let moved = via.mremap(area.page(90), 20 * PAGE, 40 * PAGE, libc::MREMAP_MAYMOVE, 0).unwrap();
            assert!(mirror.device().look(virt(moved + 10 * PAGE)).is_none());
            expect_page(moved + 10 * PAGE, 1, 100);
            unmap(moved, 40 * PAGE);
        });
        entry_goes_after(Cause::Unmap, |_, mirror, area, via| {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
            let moved = via.mremap(area.page(90), 20 * PAGE, 20 * PAGE, flags, 0).unwrap();
            assert!(mirror.device().look(virt(moved + 10 * PAGE)).is_none());
            expect_page(moved + 10 * PAGE, 1, 100);
            expect_zero(area.page(100));
            unmap(moved, 20 * PAGE);
            // Nothing of what the look at the old place brought may stand in the way of the next round.
            assert_eq!(via.munmap(area.page(90), 20 * PAGE), 0);
        });
        entry_goes_after(Cause::Unmap, |_, _, area, via| {
            let other = Area::filled(Shape::Small, 1, 2);
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // Onto the page that the device has mapped.
            via.mremap(other.page(0), 20 * PAGE, 20 * PAGE, flags, area.page(90)).unwrap();
            expect_page(area.page(100), 2, 10);
            other.part(20..512).unmap();
        });
        Ok(())
    });
}

#[test]
fn madvise_takes_translations_away_before_it_returns() {
    isolated!(|| {
        open()?;
        for advice in [libc::MADV_DONTNEED, libc::MADV_FREE] {
            entry_goes_after(Cause::Unmap, |_, _, area, via| {
                assert_eq!(via.madvise(area.page(90), 20 * PAGE, advice), 0);
            });
        }
        Ok(())
    });
}

#[test]
fn mprotect_takes_translations_away_where_the_engine_is_told() {
    isolated!(|| {
        open()?;
        entry_goes_after(Cause::Protect, |mm, mirror, area, via| {
            let part = area.part(90..110);
            mm.invalidate(part.range(), Cause::Protect);
            assert_eq!(via.mprotect(part.start, part.len(), libc::PROT_READ), 0);
            let port = mirror.port().unwrap();
            let pte = port.fault(virt(area.page(100)), Access::Read, DeviceFaultPolicy::Map).unwrap();
            assert!(!pte.allows(Access::Write));
            mm.invalidate(part.range(), Cause::Protect);
            assert_eq!(via.mprotect(part.start, part.len(), libc::PROT_NONE), 0);
            let addr = virt(area.page(100));
            assert_eq!(port.fault(addr, Access::Read, DeviceFaultPolicy::Map), Err(FaultError::Denied { addr }));
        });
        Ok(())
    });
}

#[test]
fn memory_that_never_moved_needs_a_word_from_the_caller() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 64);
        let area = Area::filled(Shape::Small, 1, 1);
        let addr = virt(area.page(100));
        let port = mirror.port().unwrap();
        port.fault(addr, Access::Write, DeviceFaultPolicy::Map).unwrap();
        // Never registered, so no event: that is what it costs to cost nothing.
        mm.invalidate(area.range(), Cause::Unmap);
        assert!(mirror.device().look(addr).is_none());
        assert!(mirror.device().saw(Cause::Unmap));
        area.unmap();
        assert_eq!(port.fault(addr, Access::Read, DeviceFaultPolicy::Map), Err(FaultError::NoVma { addr }));
        finish(mm, [mirror]);
        Ok(())
    });
}

#[test]
fn moving_a_page_takes_translations_away() {
    isolated!(|| {
        let mm = open()?;
        let (ours, theirs) = (Watcher::register(&mm, 1024), Watcher::register(&mm, 1024));
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            let page = area.part(100..101);
            let addr = virt(page.start);
            let mapped = |access| ours.port().unwrap().fault(addr, access, DeviceFaultPolicy::Map).unwrap();
            // A page of the host that another device takes.
            assert!(mapped(Access::Write).is_host());
            send(&theirs, &page);
            assert!(ours.device().look(addr).is_none());
            // Which this device reads: it comes home, and the other has lost it.
            assert!(mapped(Access::Read).is_host());
            assert!(theirs.device().look(addr).is_none());
            // Its own migration puts its own entry in the place.
            send(&ours, &page);
            assert!(ours.device().look(addr).pfn().is_some());
            // Another device takes it away, home brings it back, a touch does.
            send(&theirs, &page);
            assert!(ours.device().look(addr).is_none() && theirs.device().look(addr).pfn().is_some());
            let _ = mm.home(page.range());
            assert!(theirs.device().look(addr).is_none());
            send(&theirs, &page);
            expect_page(page.start, 1, 100);
            assert!(theirs.device().look(addr).is_none());
            area.check(1);
            area.unmap();
        }
        finish(mm, [ours, theirs]);
        Ok(())
    });
}

#[test]
fn a_page_stays_while_another_invalidation_waits_for_an_access_to_it() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 1024);
        let device = mirror.device();
        let page = Area::filled(Shape::Small, 1, 1).part(100..101);
        send(&mirror, &page);
        let entry = mirror.port().unwrap().fault(virt(page.start), Access::Write, DeviceFaultPolicy::Map).unwrap();
        let frame = entry.pfn().expect("the page is on the device");
        device.forget();
        // The device is in the middle of a store. One invalidation has taken the entry away, and waits; the next finds none.
        device.accessing.store(true, SeqCst);
        std::thread::scope(|s| {
            s.spawn(|| mm.invalidate(page.range(), Cause::Protect));
            eventually("the entry is gone", || device.flushes.load(Relaxed) == 1);
            s.spawn(|| drop(mm.home(page.range())));
            std::thread::sleep(Duration::from_millis(200));
            device.store(frame, 4711);
            device.accessing.store(false, SeqCst);
        });
        assert_eq!(peek(page.start), 4711, "what the device stored is lost");
        finish(mm, [mirror]);
        Ok(())
    });
}

#[test]
fn a_fork_takes_translations_away() {
    isolated!(|| {
        open()?;
        for bare in [false, true] {
            if bare && !crate::common::kit::has_fork_events() {
                println!("skip: forks by a bare system call raise no event here");
                continue;
            }
            let mm = open()?;
            let mirror = Watcher::register(&mm, 1024);
            let area = Area::filled(Shape::Small, 1, 1);
            let addr = virt(area.page(100));
            // It has been away, so that the bare fork raises an event.
            send(&mirror, &area);
            assert!(mm.home(area.part(0..200).range()).is_complete());
            mirror.port().unwrap().fault(addr, Access::Write, DeviceFaultPolicy::Map).unwrap();
            let child =
                if bare { crate::common::kit::raw_fork_child(|| area.check(1)) } else { fork_child(|| area.check(1)) };
            // The child has the page too: what the device may do to it is to be asked anew.
            let pte = mirror.device().look(addr);
            assert!(!pte.allows(Access::Write), "bare: {bare}: {pte:?}");
            assert_eq!(wait_for(child), End::Exit(0));
            mirror.device().check();
            mirror.close().unwrap();
            area.unmap();
        }
        Ok(())
    });
}

#[test]
fn a_device_fault_may_bring_the_block_to_the_device() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 1024);
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            let port = mirror.port().unwrap();
            let addr = virt(area.page(77));
            let pte = port.fault(addr, Access::Read, DeviceFaultPolicy::Migrate).unwrap();
            assert_eq!(mm.residency(virt(area.page(400))).why, Why::DeviceFault);
            assert_eq!(mirror.device().word(pte.pfn().expect("it is on the device")), {
                // Looked at through the device first: this touch brings it home.
                peek(area.page(77))
            });
            area.check(1);
            // A hole stays one: the device maps the page of zeros where it is.
            let hole = Area::new(shape, 1);
            let pte = port.fault(virt(hole.start), Access::Read, DeviceFaultPolicy::Migrate).unwrap();
            assert!(pte.is_host());
            hole.check_zero();
            // Both stay mapped: in the same place the next would be too hot to move.
        }
        finish(mm, [mirror]);
        Ok(())
    });
}

#[test]
fn translations_never_outlive_munmap_however_fast() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 1024);
        let area = Area::new(Shape::Small, 1);
        let stop = AtomicBool::new(false);
        let (device, port) = (mirror.device(), mirror.port().unwrap());
        let addr = virt(area.page(5));
        std::thread::scope(|s| {
            // A thread of the device that faults the page in again and again.
            s.spawn(|| {
                while !stop.load(Relaxed) {
                    let _ = port.fault(addr, Access::Write, DeviceFaultPolicy::Map);
                }
            });
            let _stop = Stop(&stop);
            for round in 0..1500u64 {
                area.part(0..10).fill(round);
                migrate(&mirror, &area.part(4..8));
                assert_eq!(Via::Libc.munmap(area.start, 10 * PAGE), 0);
                // Nothing is mapped there: no translation may be, from now on.
                let pte = device.look(addr);
                assert!(pte.is_none(), "round {round}: {pte:?}");
                let pte = device.look(addr);
                assert!(pte.is_none(), "round {round}: {pte:?} was set after munmap");
                map(area.start, 10 * PAGE, RW, libc::MAP_FIXED_NOREPLACE);
            }
        });
        device.check();
        finish(mm, [mirror]);
        Ok(())
    });
}

// Several devices.

#[test]
fn pages_go_from_device_to_device() {
    isolated!(|| {
        let mm = open()?;
        let (a, b) = (Watcher::register(&mm, 2048), Watcher::register(&mm, 2048));
        for shape in SHAPES {
            let area = Area::filled(shape, 2, 1);
            for _ in 0..3 {
                send(&a, &area);
                assert_eq!((a.frames_used(), b.frames_used()), (1024, 0));
                let stay = MigrateOptions { from_other_devices: false, ..MigrateOptions::default() };
                let report = b.migrate(area.range(), &stay);
                assert_eq!(report.count(PageOutcome::OtherDevice), 1024, "{:?}", summary(&report));
                send(&b, &area);
                assert_eq!((a.frames_used(), b.frames_used()), (0, 1024));
            }
            area.check(1);
            area.unmap();
        }
        finish(mm, [a, b]);
        Ok(())
    });
}

#[test]
fn a_device_that_goes_gives_its_pages_back() {
    isolated!(|| {
        let mm = open()?;
        for shape in SHAPES {
            let mirror = Watcher::register(&mm, 2048);
            let (area, moved) = (Area::filled(shape, 2, 1), Area::filled(shape, 1, 2));
            send(&mirror, &area);
            send(&mirror, &moved);
            // The frames' notes of where their pages are go wrong.
            let flags = libc::MREMAP_MAYMOVE;
            let to = Via::Libc.mremap(moved.start, moved.len(), moved.len() + BLOCK, flags, 0).unwrap();
            let held = Area::filled(shape, 1, 3);
            assert_eq!(mirror.exclusive(held.range()).count(PageOutcome::Moved), 512);
            let (id, port, device) = (mirror.id(), mirror.port().unwrap(), mirror.device());
            mirror.close().unwrap();
            assert_eq!(mm.pages_away(), 0);
            let addr = virt(area.start);
            assert_eq!(port.fault(addr, Access::Read, DeviceFaultPolicy::Map), Err(FaultError::NoDevice));
            assert!(port.table().lookup(addr).is_none());
            assert!(matches!(mm.residency(addr).why, Why::Evicted));
            area.check(1);
            Area { start: to, pages: 512 }.check(2);
            held.check(3);
            device.check();
            // Its number is free again.
            let next = Watcher::register(&mm, 16);
            assert_eq!(next.id(), id);
            next.close().unwrap();
            [area, held].iter().for_each(Area::unmap);
            unmap(to, moved.len() + BLOCK);
        }
        mm.close().unwrap();
        Ok(())
    });
}

#[test]
fn eviction_makes_room() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 2048);
        let area = Area::filled(Shape::Small, 4, 1);
        send(&mirror, &area);
        assert_eq!(mirror.evict(700), 0);
        assert!(mirror.frames_used() <= 2048 - 700);
        assert!(mirror.frames_used() > 0, "more came home than was asked for: all");
        assert_eq!(mirror.evict(u32::MAX), 0);
        assert_eq!((mirror.frames_used(), mm.pages_away()), (0, 0));
        assert_eq!(mirror.evict(1), 0, "there is nothing to evict");
        area.check(1);
        finish(mm, [mirror]);
        Ok(())
    });
}

#[test]
fn a_full_device_takes_what_fits() {
    isolated!(|| {
        let mm = open()?;
        for shape in SHAPES {
            let mirror = Watcher::register(&mm, 300);
            let area = Area::filled(shape, 1, 1);
            let report = migrate(&mirror, &area);
            assert_eq!(report.count(PageOutcome::Moved), 300, "{:?}", summary(&report));
            assert_eq!(report.count(PageOutcome::Full), 212, "{:?}", summary(&report));
            area.check(1);
            let whole = MigrateOptions { all_or_nothing: true, ..MigrateOptions::default() };
            eventually("no page is busy", || mm.pages_away() == 0);
            let report = mirror.migrate(area.range(), &whole);
            assert_eq!(report.count(PageOutcome::RolledBack), 300, "{:?}", summary(&report));
            assert_eq!((mm.pages_away(), mirror.frames_used()), (0, 0));
            area.check(1);
            // Holes take frames too.
            let holes = Area::new(shape, 1);
            let report = migrate(&mirror, &holes);
            assert_eq!(report.count(PageOutcome::Full), 212, "{:?}", summary(&report));
            holes.check_zero();
            [area, holes].iter().for_each(Area::unmap);
            mirror.device().check();
            mirror.close().unwrap();
        }
        mm.close().unwrap();
        Ok(())
    });
}

#[test]
fn a_device_without_memory_mirrors() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 0);
        let area = Area::filled(Shape::Small, 1, 1);
        let report = migrate(&mirror, &area);
        assert_eq!(report.count(PageOutcome::Full), 512, "{:?}", summary(&report));
        assert_eq!(mm.pages_away(), 0);
        let port = mirror.port().unwrap();
        for policy in [DeviceFaultPolicy::Map, DeviceFaultPolicy::Migrate] {
            assert!(port.fault(virt(area.page(3)), Access::Write, policy).unwrap().is_host());
        }
        assert_eq!((mirror.frames_used(), mirror.evict(10)), (0, 0));
        area.check(1);
        mirror.close().unwrap();
        mm.close().unwrap();
        Ok(())
    });
}

#[test]
fn devices_come_and_go() {
    isolated!(|| {
        let mm = open()?;
        let all: Vec<_> = (0..DeviceId::MAX).map(|_| Watcher::register(&mm, 64)).collect();
        assert_eq!(mm.register(Watcher::new(64)).err(), Some(RegisterError::TooMany));
        all.into_iter().for_each(|mirror| mirror.close().unwrap());
        let area = Area::filled(Shape::Small, 1, 1);
        for round in 0..100 {
            let mirror = Watcher::register(&mm, 64);
            assert_eq!(migrate(&mirror, &area).count(PageOutcome::Moved), 64, "round {round}");
            if round % 2 == 0 {
                area.check(1);
            }
            mirror.device().check();
            mirror.close().unwrap();
        }
        area.check(1);
        mm.close().unwrap();
        Ok(())
    });
}

#[test]
fn a_device_may_go_while_faults_go_on() {
    isolated!(|| {
        let mm = open()?;
        let area = Area::filled(Shape::Small, 2, 1);
        let (stop, touches) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|s| {
            let _stop = Stop(&stop);
            s.spawn(|| {
                let mut n = 0;
                while !stop.load(Relaxed) {
                    n = (n + 61) % 1024;
                    expect_page(area.page(n), 1, n);
                    touches.fetch_add(1, Relaxed);
                }
            });
            for _ in 0..40 {
                let mirror = Watcher::register(&mm, 2048);
                let port = mirror.port().unwrap();
                let gone = AtomicBool::new(false);
                let fault = |first: usize| {
                    let kinds = [
                        (Access::Write, DeviceFaultPolicy::Map),
                        (Access::Write, DeviceFaultPolicy::Migrate),
                        (Access::Atomic, DeviceFaultPolicy::Map),
                    ];
                    let (mut n, mut round) = (first, 0);
                    loop {
                        (n, round) = ((n + 37) % 1024, round + 1);
                        let (access, policy) = kinds[round % kinds.len()];
                        match port.fault(virt(area.page(n)), access, policy) {
                            Ok(_) | Err(FaultError::TimedOut { .. }) => {}
                            Err(FaultError::NoDevice) => break,
                            Err(error) => panic!("{error}"),
                        }
                    }
                    assert!(gone.load(Relaxed));
                };
                std::thread::scope(|inner| {
                    let fault = &fault;
                    for first in [0, 500] {
                        inner.spawn(move || fault(first));
                    }
                    migrate(&mirror, &area);
                    let device = mirror.device();
                    gone.store(true, Relaxed);
                    mirror.close().unwrap();
                    device.check();
                });
                assert_eq!(port.table().entries(), 0, "no translation outlives the device");
                let held = (0..1024).filter(|&n| matches!(mm.residency(virt(area.page(n))).at, Location::Exclusive(_)));
                assert_eq!(held.count(), 0, "nor does its hold on a page");
                let before = touches.load(Relaxed);
                eventually("the CPU goes on", || touches.load(Relaxed) > before);
            }
        });
        area.check(1);
        mm.close().unwrap();
        Ok(())
    });
}

// Exclusive access.

#[test]
fn a_cpu_touch_takes_an_exclusive_page_back() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 1024);
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            let report = mirror.exclusive(area.range());
            assert_eq!(report.count(PageOutcome::Moved), 512, "{:?}", summary(&report));
            let addr = virt(area.page(9));
            assert_eq!(mm.residency(addr).at, Location::Exclusive(mirror.id()));
            assert_eq!(mirror.frames_used(), 0, "the page stays in host memory");
            let port = mirror.port().unwrap();
            let pte = port.fault(addr, Access::Atomic, DeviceFaultPolicy::Map).unwrap();
            assert!(pte.allows(Access::Atomic));
            assert!(mirror.device().look(addr).allows(Access::Atomic));
            // The device counts, atomically: no CPU thread can get in between.
            let bytes = port.exclusive_bytes(addr).expect("it is held");
            let before = bytes.load_u64(0);
            bytes.store_u64(8, 4711);
            mirror.device().forget();
            assert_eq!(peek(area.page(9)), before);
            assert_eq!(peek(area.page(9) + 8), 4711, "what the device wrote");
            assert!(mirror.device().look(addr).is_none(), "the entry outlived the touch");
            assert!(mirror.device().flushes.load(Relaxed) > 0, "the device was told");
            eventually("it is home by the books", || mm.residency(addr).at == Location::Cpu);
            assert!(port.exclusive_bytes(addr).is_none());
            // A fault takes it as well; memory that is mapped read-only, or not at all, is not to be had.
            eventually("it is held again", || {
                let pte = port.fault(addr, Access::Atomic, DeviceFaultPolicy::Map).unwrap();
                assert!(pte.is_exclusive() && pte.allows(Access::Atomic), "{pte:?}");
                mirror.device().look(addr) == pte && mm.residency(addr).at == Location::Exclusive(mirror.id())
            });
            assert_eq!(peek(area.page(9) + 8), 4711);
            eventually("it is home by the books", || mm.residency(addr).at == Location::Cpu);
            assert_eq!(Via::Libc.mprotect(area.page(20), PAGE, libc::PROT_READ), 0);
            let read_only = virt(area.page(20));
            let fault = |addr| port.fault(addr, Access::Atomic, DeviceFaultPolicy::Map);
            assert_eq!(fault(read_only), Err(FaultError::Denied { addr: read_only }));
            assert_eq!(mirror.exclusive(area.part(20..21).range()).count(PageOutcome::NoAccess), 1);
            area.check(1);
            area.unmap();
            assert_eq!(fault(addr), Err(FaultError::NoVma { addr }));
            assert_eq!(mirror.exclusive(area.part(9..10).range()).count(PageOutcome::NoAccess), 1);
        }
        finish(mm, [mirror]);
        Ok(())
    });
}

#[test]
fn an_exclusive_page_goes_to_whoever_asks_next() {
    isolated!(|| {
        let mm = open()?;
        let (a, b) = (Watcher::register(&mm, 1024), Watcher::register(&mm, 1024));
        let area = Area::filled(Shape::Small, 1, 1);
        let addr = virt(area.page(9));
        // A touch that was answered long ago may still take it back.
        let take = |mirror: &Mirror<Watcher>| {
            eventually("it is held", || {
                let pte = mirror.port().unwrap().fault(addr, Access::Atomic, DeviceFaultPolicy::Map).unwrap();
                assert!(pte.is_exclusive(), "{pte:?}");
                mm.residency(addr).at == Location::Exclusive(mirror.id())
            });
        };
        take(&a);
        a.device().forget();
        take(&b);
        assert!(a.device().look(addr).is_none() && a.device().flushes.load(Relaxed) > 0);
        // A migration leaves it, and says so; a system call takes it back; so do munmap and fork.
        let one = area.part(9..10);
        assert_eq!(migrate(&a, &one).count(PageOutcome::ExclusiveElsewhere), 1);
        if mm.serves_kernel_faults() {
            let mut pipe = [0; 2];
            // SAFETY: writes two descriptors to a local.
            assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
            assert_eq!(syscall(libc::SYS_write, [arg(pipe[1]), one.start, 64, 0, 0, 0]), Ok(64));
            eventually("it is home by the books", || mm.residency(addr).at == Location::Cpu);
            take(&b);
        }
        assert_eq!(wait_for(fork_child(|| area.check(1))), End::Exit(0));
        assert_eq!(mm.residency(addr).at, Location::Cpu);
        take(&b);
        area.check(1);
        take(&b);
        area.unmap();
        eventually("it is gone by the books", || mm.residency(addr).at == Location::Cpu);
        // Pages of one device come home before another holds them.
        let area = Area::filled(Shape::Small, 1, 2);
        send(&a, &area);
        assert_eq!(b.exclusive(area.range()).count(PageOutcome::Moved), 512);
        assert_eq!(a.frames_used(), 0);
        area.check(2);
        finish(mm, [a, b]);
        Ok(())
    });
}

// Where a page is, since when, and why.

#[test]
fn residency_has_a_cause_and_an_age() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 1024);
        let area = Area::filled(Shape::Small, 1, 1);
        let at = |n: usize| mm.residency(virt(area.page(n)));
        assert_eq!((at(0).at, at(0).why, at(0).for_ms), (Location::Cpu, Why::Untouched, None));
        let expect = |n: usize, why: Why, since: Instant| {
            let (r, most) = (at(n), since.elapsed());
            assert_eq!(r.why, why, "page {n}: {r:?}");
            let age = Duration::from_millis(r.for_ms.expect("it has moved"));
            // Ages are kept in ticks of 16 ms.
            assert!(age <= most + Duration::from_millis(32), "page {n}: {age:?} of at most {most:?}");
            age
        };
        let start = Instant::now();
        send(&mirror, &area);
        expect(0, Why::Asked, start);
        assert!(matches!(at(0).at, Location::Device(id, _) if id == mirror.id()));
        std::thread::sleep(Duration::from_millis(200));
        assert!(expect(0, Why::Asked, start) >= Duration::from_millis(160));
        let start = Instant::now();
        peek(area.page(0));
        eventually("the books are done", || at(15).at == Location::Cpu && at(0).at == Location::Cpu);
        expect(0, Why::CpuFault, start);
        expect(15, Why::FaultAround, start);
        assert_eq!(at(100).why, Why::Asked);
        let start = Instant::now();
        assert_eq!(mirror.evict(10), 0);
        let evicted = (0..512).filter(|&n| at(n).why == Why::Evicted).count();
        assert!(evicted >= 10);
        send(&mirror, &area);
        assert_eq!(wait_for(fork_child(|| area.check(1))), End::Exit(0));
        expect(5, Why::Fork, start);
        let _ = mirror.exclusive(area.part(7..8).range());
        expect(7, Why::Exclusive, start);
        area.check(1);
        finish(mm, [mirror]);
        Ok(())
    });
}

/// Tells the other threads of a test to stop when this one leaves, by a panic too.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

// Devices that fail.

#[test]
fn a_copy_that_fails_on_the_way_out_leaves_the_page() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 1024);
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            mirror.device().fail_out.store(u32::MAX, Relaxed);
            let report = migrate(&mirror, &area);
            assert_eq!(report.count(PageOutcome::DeviceFailed), 512, "{:?}", summary(&report));
            assert_eq!((mm.pages_away(), mirror.frames_used()), (0, 0));
            let holes = Area::new(shape, 1);
            let report = migrate(&mirror, &holes);
            assert_eq!(report.count(PageOutcome::DeviceFailed), 512, "{:?}", summary(&report));
            area.check(1);
            holes.check_zero();
            mirror.device().fail_out.store(1, Relaxed);
            let report = migrate(&mirror, &area);
            let moved = report.count(PageOutcome::Moved);
            assert_eq!(moved + report.count(PageOutcome::DeviceFailed), 512, "{:?}", summary(&report));
            area.check(1);
            mirror.device().fail_out.store(0, Relaxed);
            send(&mirror, &area);
            area.check(1);
            [area, holes].iter().for_each(Area::unmap);
        }
        finish(mm, [mirror]);
        Ok(())
    });
}

#[test]
fn a_copy_that_fails_on_the_way_home_is_tried_again() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 1024);
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            send(&mirror, &area);
            mirror.device().home.store(FAILS, Relaxed);
            mirror.device().failed_home.store(0, Relaxed);
            let device = mirror.device();
            std::thread::scope(|s| {
                // It recovers after a while; the thread that touches the page waits for that.
                s.spawn(|| {
                    eventually("the device was asked", || device.failed_home.load(Relaxed) > 3);
                    device.home.store(WORKS, Relaxed);
                });
                area.check(1);
            });
            send(&mirror, &area);
            mirror.device().home.store(FAILS, Relaxed);
            let home = mm.home(area.part(0..10).range());
            assert_eq!(home.count(PageOutcome::TimedOut), 10, "{:?}", summary(&home));
            assert_eq!(mirror.frames_used(), 512, "the pages stay where they are");
            mirror.device().home.store(WORKS, Relaxed);
            area.check(1);
            area.unmap();
        }
        finish(mm, [mirror]);
        Ok(())
    });
}

#[test]
fn a_device_that_cannot_give_its_pages_back_stays() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 1024);
        let area = Area::filled(Shape::Small, 1, 1);
        send(&mirror, &area.part(0..20));
        let device = mirror.device();
        device.home.store(FAILS, Relaxed);
        assert_eq!(mirror.close().map_err(|left| left.pages), Err(20));
        device.home.store(WORKS, Relaxed);
        // It is served still.
        area.check(1);
        eventually("everything is home", || mm.pages_away() == 0);
        device.check();
        mm.close().unwrap();
        Ok(())
    });
}

/// What a touch of the page does, in a process of its own that has the engine and the dead device.
fn with_a_dead_device(f: impl FnOnce(&Mm, &Mirror<Watcher>, &Area)) -> End {
    wait_for(fork_child(|| {
        let mm = Mm::open().expect("looked at before");
        let mirror = Watcher::register(&mm, 2048);
        let area = Area::filled(Shape::Small, 2, 1);
        send(&mirror, &area);
        area.part(512..1024).check_from(1, 512);
        mirror.device().home.store(LOST, Relaxed);
        // SAFETY: the default is wanted: the harness has handlers.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        f(&mm, &mirror, &area);
    }))
}

#[test]
fn pages_that_die_with_a_device_are_poisoned_and_never_zero() {
    isolated!(|| {
        drop(open()?);
        let touched = with_a_dead_device(|_, _, area| {
            let read = peek(area.page(3));
            panic!("a lost page read as {read:#x}");
        });
        assert_eq!(touched, End::Signal(libc::SIGBUS));
        let written = with_a_dead_device(|_, _, area| {
            poke(area.page(3), 1);
            panic!("a lost page took a write");
        });
        assert_eq!(written, End::Signal(libc::SIGBUS));
        let told = with_a_dead_device(|mm, mirror, area| {
            let id = mirror.id();
            let home = mm.home(area.part(0..100).range());
            assert_eq!(home.count(PageOutcome::Poisoned), 100, "{:?}", summary(&home));
            let addr = virt(area.page(7));
            assert_eq!(mm.residency(addr).at, Location::Poisoned(id));
            let error = FaultError::Poisoned { addr, device: id };
            let port = mirror.port().unwrap();
            assert_eq!(port.fault(addr, Access::Read, DeviceFaultPolicy::Map), Err(error));
            assert!(error.to_string().contains(&id.to_string()), "{error}");
            assert_eq!(mirror.range_fault(area.part(7..9).range(), Access::Read), Err(error));
            assert!(look(mirror, area.page(7)).is_error());
            let again = migrate(mirror, &area.part(0..100));
            assert_eq!(again.count(PageOutcome::Poisoned), 100, "{:?}", summary(&again));
            // A system call that wants the bytes fails.
            if mm.serves_kernel_faults() {
                let mut pipe = [0; 2];
                // SAFETY: writes two descriptors to a local.
                assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
                let answer = syscall(libc::SYS_write, [arg(pipe[1]), area.page(7), 64, 0, 0, 0]);
                assert_eq!(answer, Err(libc::EFAULT));
            }
            // What the program drops by itself is its own again, and the rest was never in danger.
            assert_eq!(Via::Libc.madvise(area.page(7), PAGE, libc::MADV_DONTNEED), 0);
            assert_eq!(peek(area.page(7)), 0);
            assert_eq!(Via::Libc.munmap(area.start, 512 * PAGE), 0);
            map(area.start, 512 * PAGE, RW, libc::MAP_FIXED_NOREPLACE);
            area.part(0..512).check_zero();
            area.part(512..1024).check_from(1, 512);
            // The dead device holds nothing any more, and may go. Unmapping goes on when its event is read, before that is
            // applied.
            eventually("the frames are free", || mirror.frames_used() == 0);
        });
        assert_eq!(told, End::Exit(0));
        let gone = wait_for(fork_child(|| {
            let mm = Mm::open().expect("looked at before");
            let mirror = Watcher::register(&mm, 2048);
            let area = Area::filled(Shape::Small, 2, 1);
            send(&mirror, &area);
            mirror.device().home.store(LOST, Relaxed);
            mirror.close().expect("there is nothing to wait for");
            assert!(matches!(mm.residency(virt(area.page(7))).at, Location::Poisoned(_)));
            assert_eq!(migrate(&Watcher::register(&mm, 64), &area).count(PageOutcome::Poisoned), 1024);
            area.unmap();
            mm.close().expect("what was lost is unmapped");
        }));
        assert_eq!(gone, End::Exit(0));
        Ok(())
    });
}

#[test]
fn a_child_does_not_read_zeros_where_the_parents_pages_died() {
    isolated!(|| {
        drop(open()?);
        for known in [false, true] {
            let parent = with_a_dead_device(|mm, _, area| {
                if known {
                    assert_eq!(mm.home(area.part(0..100).range()).count(PageOutcome::Poisoned), 100);
                }
                let child = wait_for(fork_child(|| {
                    let read = peek(area.page(3));
                    panic!("a page that was lost before the fork read as {read:#x}");
                }));
                assert_eq!(child, End::Signal(libc::SIGBUS), "known: {known}");
            });
            assert_eq!(parent, End::Exit(0));
        }
        Ok(())
    });
}

#[test]
fn poison_moves_with_its_mapping() {
    isolated!(|| {
        drop(open()?);
        let moved = with_a_dead_device(|mm, _, area| {
            assert_eq!(mm.home(area.part(0..100).range()).count(PageOutcome::Poisoned), 100);
            let to = Via::Libc.mremap(area.start, 100 * PAGE, 200 * PAGE, libc::MREMAP_MAYMOVE, 0).unwrap();
            assert_eq!(peek(to + 150 * PAGE), 0, "the part that is new");
            let read = peek(to + 50 * PAGE);
            panic!("a lost page read as {read:#x} after mremap");
        });
        assert_eq!(moved, End::Signal(libc::SIGBUS));
        Ok(())
    });
}

#[test]
fn whole_folios_go_to_a_device_in_one_piece() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 2048);
        let area = Area::filled(Shape::Huge, 2, 1);
        if mirror.snapshot(area.range()).unwrap().iter().any(|page| page.order() == 0) {
            println!("skip: the kernel gave no huge pages");
            return Ok(());
        }
        send(&mirror, &area);
        let frames: Vec<_> = mirror.snapshot(area.range()).unwrap().iter().map(|p| p.local_frame().unwrap()).collect();
        assert!(mirror.snapshot(area.range()).unwrap().iter().all(|page| page.order() == 9), "two units on the device");
        for block in frames.chunks(512) {
            assert!(block.windows(2).all(|pair| pair[1].get() == pair[0].get() + 1), "a folio was cut up");
        }
        if has_move() {
            assert!(mm.home(area.range()).is_complete());
            let back = mirror.snapshot(area.range()).unwrap();
            assert!(back.iter().all(|page| page.order() == 9), "a folio came home in pieces");
        }
        area.check(1);
        finish(mm, [mirror]);
        Ok(())
    });
}
