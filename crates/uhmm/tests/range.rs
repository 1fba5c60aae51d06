//! What a device learns of whole ranges at once: exact reports, and translations for all of it.
//
// UNSAFETY: the tests make, change and watch memory by raw system calls and pointers.

#![allow(unsafe_code, reason = "tests make the memory that they then watch")]

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use uhmm::{
    Detail, DeviceFaultPolicy, FaultError, MigrateOptions, Mirror, PageOutcome, PageReport,
    addr::PageRange,
    device::Cause,
    device_table::{Access, Pte},
    mm::Location,
};
use uhmm_testkit::{Skip, isolated};

use crate::common::{
    eventually,
    kit::{
        Area, BLOCK, End, PAGE, RW, Random, Shape, Via, expect_page, fork_child, map, open, peek, poke, send, unmap,
        virt, wait_for,
    },
    watcher::{STALLS, WORKS, Watcher},
};

/// One page's exact report.
fn look(mirror: &Mirror<Watcher>, addr: usize) -> PageReport {
    let page = PageRange::new(virt(addr), PAGE as u64).unwrap();
    mirror.snapshot_with(page, Detail::Exact).unwrap()[0]
}

/// A page that a forked child shares.
fn shared_page() -> usize {
    Via::Libc.mmap(0, PAGE, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1).unwrap()
}

/// Exact reports need to know physical pages.
fn frames_are_shown() -> Result<(), Skip> {
    match std::fs::File::open("/proc/kpageflags") {
        Ok(_) => Ok(()),
        Err(error) => Err(Skip(format!("/proc/kpageflags: {error}"))),
    }
}

#[test]
fn an_exact_report_says_what_can_be_written_without_a_fault() {
    isolated!(|| {
        frames_are_shown()?;
        let mm = open()?;
        let mirror = Watcher::register(&mm, 1024);
        for shape in [Shape::Small, Shape::Huge] {
            let area = Area::filled(shape, 1, 1);
            let all = |writable: bool| {
                let reports = mirror.snapshot_with(area.range(), Detail::Exact).unwrap();
                reports.iter().all(|r| r.is_valid() && r.is_writable() == writable)
            };
            assert!(all(true), "{shape:?}");
            assert!(mirror.snapshot(area.range()).unwrap().iter().all(|r| !r.is_writable()), "nobody asked");
            assert_eq!(Via::Libc.mprotect(area.start, area.len(), libc::PROT_READ), 0);
            assert!(all(false), "the mapping does not allow it");
            assert_eq!(Via::Libc.mprotect(area.start, area.len(), RW), 0);
            assert!(all(true));
            let ready = shared_page();
            let child = fork_child(|| eventually("told to end", || peek(ready) != 0));
            assert!(all(false), "shared with a child");
            // What is left of a huge page is not told apart; the kernel may also make it one again.
            if shape == Shape::Small {
                poke(area.page(7), 0);
                assert!(look(&mirror, area.page(7)).is_writable(), "a copy of its own");
                assert!(!look(&mirror, area.page(300)).is_writable());
            }
            poke(ready, 1);
            assert_eq!(wait_for(child), End::Exit(0));
            if shape == Shape::Small {
                // The map count says that it is alone; the kernel looks only when it is written.
                assert!(!look(&mirror, area.page(400)).is_writable());
                poke(area.page(400), 0);
                assert!(look(&mirror, area.page(400)).is_writable());
            }
            area.unmap();
        }
        let hole = map(0, BLOCK, RW, 0);
        assert_eq!(look(&mirror, hole), PageReport::NONE);
        assert_eq!(peek(hole), 0);
        let zero = look(&mirror, hole);
        assert!(zero.is_valid() && zero.is_zero_page() && !zero.is_writable());
        unmap(hole, BLOCK);
        Ok(())
    });
}

#[test]
fn a_range_is_faulted_in_and_translated_at_once() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 1024);
        let port = mirror.port().unwrap();
        for shape in [Shape::Small, Shape::Huge] {
            // A piece of two blocks that begins and ends within them.
            let area = Area::filled(shape, 3, 1);
            let part = area.part(100..1400);
            let entry = |n| mirror.device().look(virt(area.page(n)));
            port.fault_range(part.range(), Access::Read, Detail::Cheap).unwrap();
            assert!((100..1400).all(|n| entry(n).access() == Some(Access::Read)), "{shape:?}");
            assert!([99, 1400].into_iter().all(|n| entry(n).is_none()), "neighbours were not asked for");
            assert_eq!(entry(600).order(), if shape == Shape::Huge { 9 } else { 0 }, "a huge page has one entry");
            port.fault_range(part.range(), Access::Write, Detail::Cheap).unwrap();
            assert!((100..1400).all(|n| entry(n).allows(Access::Write) && entry(n).is_host()));
            // Nothing has moved, so the kernel tells of nothing.
            mm.invalidate(area.part(200..201).range(), Cause::Unmap);
            assert_eq!(Via::Libc.madvise(area.page(200), PAGE, libc::MADV_DONTNEED), 0);
            assert!(entry(200).is_none());
            if frames_are_shown().is_ok() {
                port.fault_range(part.range(), Access::Read, Detail::Exact).unwrap();
                assert_eq!(entry(200).access(), Some(Access::Read), "the page of zeros");
                assert!(entry(1100).allows(Access::Write), "the CPU may write it without a fault");
            }
            // Pages of the device stay, and one entry serves a block that is as one there.
            send(&mirror, &area.part(512..1024));
            port.fault_range(part.range(), Access::Write, Detail::Cheap).unwrap();
            assert!((512..1024).all(|n| entry(n).pfn().is_some()) && entry(400).is_host());
            assert_eq!(entry(700).order(), 9);
            // What it holds exclusively comes home: the CPU may use it too.
            assert_eq!(mirror.exclusive(area.part(300..310).range()).count(PageOutcome::Moved), 10);
            port.fault_range(part.range(), Access::Write, Detail::Cheap).unwrap();
            assert!((300..310).all(|n| entry(n).is_host() && !entry(n).is_exclusive()));
            assert_eq!(mm.residency(virt(area.page(305))).at, Location::Cpu);
            area.part(201..1400).check_from(1, 201);
            mirror.device().check();
            area.unmap();
        }
        Ok(())
    });
}

#[test]
fn a_range_with_a_bad_block_keeps_what_comes_before_it() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 16);
        let port = mirror.port().unwrap();
        let area = Area::filled(Shape::Small, 3, 1);
        let fault = |access| port.fault_range(area.range(), access, Detail::Cheap);
        let denied = virt(area.page(1500));
        assert_eq!(Via::Libc.mprotect(area.page(1500), PAGE, libc::PROT_READ), 0);
        assert_eq!(fault(Access::Write), Err(FaultError::Denied { addr: denied }));
        assert!(mirror.device().look(virt(area.page(1023))).allows(Access::Write));
        assert!(mirror.device().look(virt(area.page(1024))).is_none());
        assert_eq!(fault(Access::Read), Ok(()));
        unmap(area.page(1500), PAGE);
        assert_eq!(fault(Access::Read), Err(FaultError::NoVma { addr: denied }));
        mirror.close().unwrap();
        assert_eq!(fault(Access::Read), Err(FaultError::NoDevice));
        Ok(())
    });
}

#[test]
fn a_device_may_forget_its_translations_and_keep_its_pages() {
    isolated!(|| {
        let mm = open()?;
        let (mirror, other) = (Watcher::register(&mm, 1024), Watcher::register(&mm, 16));
        let area = Area::filled(Shape::Small, 2, 1);
        send(&mirror, &area.part(0..512));
        let ports = [mirror.port().unwrap(), other.port().unwrap()];
        let translate = |port: &uhmm::Port| port.fault_range(area.part(512..1024).range(), Access::Read, Detail::Cheap);
        ports.iter().for_each(|port| translate(port).unwrap());
        mirror.device().forget();
        ports[0].forget();
        assert_eq!(ports[0].table().entries(), 0);
        assert!(mirror.device().flushes.load(Relaxed) > 0, "the device was told");
        assert!(ports[1].table().entries() > 0, "another device's stay");
        assert_eq!(mm.pages_away(), 512);
        translate(&ports[0]).unwrap();
        assert!(ports[0].table().entries() > 0);
        mirror.device().check();
        area.check(1);
        Ok(())
    });
}

#[test]
fn pages_shared_with_a_child_come_home_before_the_device_may_write_them() {
    isolated!(|| {
        let mm = open()?;
        let mirror = mm.register(common::Plain::sharing(4 << 20)).unwrap();
        let area = Area::filled(Shape::Small, 1, 1);
        send(&mirror, &area);
        let ready = shared_page();
        let child = fork_child(|| {
            eventually("told to look", || peek(ready) != 0);
            area.check(1);
        });
        let port = mirror.port().unwrap();
        let entry = |n| port.table().lookup(virt(area.page(n)));
        port.fault_range(area.range(), Access::Read, Detail::Cheap).unwrap();
        if mm.pages_away() != 0 {
            assert!(entry(9).pfn().is_some() && !entry(9).allows(Access::Write), "{:?}", entry(9));
        }
        port.fault_range(area.range(), Access::Write, Detail::Cheap).unwrap();
        assert!((0..512).all(|n| entry(n).is_host() && entry(n).allows(Access::Write)), "a copy of its own");
        let reports = mirror.range_fault(area.range(), Access::Write).unwrap();
        assert!(reports.iter().all(|r| r.is_writable()));
        (0..512).for_each(|n| poke(area.page(n), 1));
        poke(ready, 1);
        assert_eq!(wait_for(child), End::Exit(0));
        Ok(())
    });
}

#[test]
fn a_page_that_was_touched_is_not_reported_on_the_device() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 1024);
        let area = Area::filled(Shape::Small, 1, 1);
        for _ in 0..40 {
            send(&mirror, &area);
            for n in (0..512).step_by(3) {
                peek(area.page(n));
                let page = PageRange::new(virt(area.page(n)), PAGE as u64).unwrap();
                let report = mirror.snapshot(page).unwrap()[0];
                // Nothing else moves it: where the CPU has been, it is.
                assert!(report.is_valid() && report.local_frame().is_none(), "{report:?}");
            }
        }
        Ok(())
    });
}

#[test]
fn a_device_waits_for_a_change_that_was_announced() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 1024);
        let (area, other) = (Area::filled(Shape::Small, 1, 1), Area::filled(Shape::Small, 1, 2));
        let port = mirror.port().unwrap();
        let load = |range| port.fault_range(range, Access::Read, Detail::Cheap);
        // While no device has anything to give up nobody has to be asked.
        assert!(!mm.is_mirrored());
        let changing = mm.changing(area.range(), Cause::Protect);
        assert!(changing.is_announced());
        assert!(matches!(load(area.range()), Err(FaultError::TimedOut { .. })));
        drop(changing);
        load(area.range()).unwrap();
        assert!(mm.is_mirrored());
        // One that is not over.
        let changing = mm.changing(area.range(), Cause::Protect);
        assert!(changing.is_announced());
        assert!(matches!(load(area.range()), Err(FaultError::TimedOut { .. })));
        let fault = port.fault(virt(area.page(9)), Access::Read, DeviceFaultPolicy::Map);
        assert!(matches!(fault, Err(FaultError::TimedOut { .. })), "{fault:?}");
        load(other.range()).unwrap();
        drop(changing);
        load(area.range()).unwrap();
        // One that takes its time: what was allowed before it is not after.
        for _ in 0..20 {
            let over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let changing = mm.changing(area.range(), Cause::Protect);
                scope.spawn(|| {
                    let answer = load(area.range());
                    assert!(over.load(Relaxed), "did not wait");
                    assert!(matches!(answer, Err(FaultError::Denied { .. })), "{answer:?}");
                });
                std::thread::sleep(std::time::Duration::from_millis(5));
                assert_eq!(Via::Libc.mprotect(area.start, area.len(), libc::PROT_NONE), 0);
                over.store(true, Relaxed);
                drop(changing);
            });
            assert_eq!(Via::Libc.mprotect(area.start, area.len(), RW), 0);
            load(area.range()).unwrap();
        }
        Ok(())
    });
}

#[test]
fn pages_that_were_dropped_are_not_reported_on_the_device() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 1024);
        for via in [Via::Libc, Via::Raw] {
            for _ in 0..20 {
                let area = Area::filled(Shape::Small, 1, 1);
                send(&mirror, &area);
                for n in (0..512).step_by(8) {
                    let page = PageRange::new(virt(area.page(n)), PAGE as u64).unwrap();
                    assert_eq!(via.madvise(area.page(n), PAGE, libc::MADV_DONTNEED), 0);
                    let report = mirror.snapshot(page).unwrap()[0];
                    assert!(report.local_frame().is_none(), "{via:?}: {report:?}");
                    assert_eq!(mm.residency(virt(area.page(n))).at, Location::Cpu);
                }
                area.unmap();
            }
        }
        Ok(())
    });
}

#[test]
fn pages_on_their_way_home_get_no_translation() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 1024);
        let device = mirror.device();
        let area = Area::filled(Shape::Small, 1, 1);
        send(&mirror, &area);
        device.home.store(STALLS, Relaxed);
        std::thread::scope(|s| {
            s.spawn(|| expect_page(area.page(40), 1, 40));
            eventually("the copy home stalls", || device.failed_home.load(Relaxed) != 0);
            let fault =
                |pages| mirror.port().unwrap().fault_range(area.part(pages).range(), Access::Read, Detail::Cheap);
            assert!(matches!(fault(30..60), Err(FaultError::TimedOut { .. })));
            assert!(device.look(virt(area.page(40))).is_none());
            device.home.store(WORKS, Relaxed);
        });
        device.check();
        Ok(())
    });
}

#[test]
fn translations_of_a_range_do_not_outlive_what_they_are_of() {
    isolated!(|| {
        // Pages come and go while ranges are translated; in the end each translation must be true of its page.
        let mm = open()?;
        let mirror = Watcher::register(&mm, 2048);
        let port = mirror.port().unwrap();
        let area = Area::filled(Shape::Small, 2, 1);
        let stop = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                let mut random = Random::new(1);
                while !stop.load(Relaxed) {
                    let first = random.below(1000);
                    let part = area.part(first..first + 24);
                    match random.below(4) {
                        0 => drop(mirror.migrate(part.range(), &MigrateOptions::default())),
                        1 => drop(mirror.exclusive(part.range())),
                        2 => drop(mm.home(part.range())),
                        _ => part.check_from(1, first),
                    }
                }
            });
            let mut random = Random::new(2);
            for _ in 0..1500 {
                let first = random.below(1000);
                let access = [Access::Read, Access::Write][random.below(2)];
                match port.fault_range(area.part(first..first + 24).range(), access, Detail::Cheap) {
                    Ok(()) | Err(FaultError::TimedOut { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            stop.store(true, Relaxed);
        });
        for n in 0..1024 {
            let addr = virt(area.page(n));
            let pte: Pte = mirror.device().look(addr);
            let at = mm.residency(addr).at;
            let is_true = match at {
                Location::Device(_, pfn) => pte.is_none() || pte.pfn() == Some(pfn),
                Location::Exclusive(_) => pte.is_none() || pte.is_exclusive(),
                Location::Cpu => pte.is_none() || (pte.is_host() && !pte.is_exclusive()),
                _ => pte.is_none(),
            };
            assert!(is_true, "page {n}: {pte:?}, which is {at:?}");
        }
        area.check(1);
        mirror.device().check();
        mm.close().unwrap();
        Ok(())
    });
}
