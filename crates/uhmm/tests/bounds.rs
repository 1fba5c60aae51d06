//! Waits that end: each is made to last as long as it may.
//
// UNSAFETY: the tests make, change and watch memory by raw system calls and pointers.

#![allow(unsafe_code, reason = "tests make the memory that they then watch")]

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use uhmm::{
    DeviceFaultPolicy, FaultError, MigrateOptions, Mm, PageOutcome,
    addr::{PAGE_SIZE, PageRange, TASK_SIZE, VirtAddr},
    device_table::Access,
    mm::Location,
};
use uhmm_testkit::isolated;

use crate::common::{
    eventually,
    kit::{Area, End, PAGE, Shape, fork_child, open, peek, send, virt, wait_for},
    watcher::{FAILS, STALLS, WORKS, Watcher},
};

/// Runs `f`, which must take so many milliseconds.
#[track_caller]
fn takes<T>(ms: Range<u64>, f: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = f();
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(ms.start) && took < Duration::from_millis(ms.end), "{took:?}, not {ms:?} ms");
    result
}

#[test]
fn a_device_fault_ends_within_its_budget_while_another_device_stalls() {
    isolated!(|| {
        let mm = open()?;
        let (stalled, other) = (Watcher::register(&mm, 512), Watcher::register(&mm, 512));
        let (away, here) = (Area::filled(Shape::Small, 1, 1), Area::filled(Shape::Small, 1, 2));
        send(&stalled, &away.part(0..20));
        let device = stalled.device();
        device.home.store(STALLS, Relaxed);
        std::thread::scope(|s| {
            s.spawn(|| away.check(1));
            eventually("the device stalls", || device.failed_home.load(Relaxed) > 0);
            // While it copies, nothing may be read that was known of the address space before.
            let port = other.port().unwrap();
            let addr = virt(here.page(7));
            let fault = || port.fault(addr, Access::Read, DeviceFaultPolicy::Map);
            // Loaded machines are late.
            assert_eq!(takes(900..20_000, fault).unwrap_err(), FaultError::TimedOut { addr, ms: 1000 });
            device.home.store(WORKS, Relaxed);
            eventually("the device works again", || fault().is_ok());
        });
        away.check(1);
        here.check(2);
        Ok(())
    });
}

#[test]
fn a_migration_does_not_wait_for_a_fork_for_ever() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 512);
        let area = Area::filled(Shape::Small, 1, 1);
        let send = || mirror.migrate(area.range(), &MigrateOptions::default());
        // What holds still here may just as well be another thread's fork.
        let report = uhmm::still::still(|| takes(90..20_000, send));
        assert_eq!(report.count(PageOutcome::Busy), area.pages);
        let atomic = || mirror.port().unwrap().fault(virt(area.start), Access::Atomic, DeviceFaultPolicy::Map);
        let addr = virt(area.start);
        assert_eq!(
            uhmm::still::still(|| takes(90..20_000, atomic)).unwrap_err(),
            FaultError::TimedOut { addr, ms: 100 }
        );
        assert_eq!(send().count(PageOutcome::Moved), area.pages);
        area.check(1);
        Ok(())
    });
}

#[test]
fn a_device_that_fails_is_not_asked_for_each_of_its_blocks() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 8 * 512);
        let area = Area::filled(Shape::Small, 8, 1);
        (0..8).for_each(|n| send(&mirror, &area.part(512 * n..512 * n + 4)));
        mirror.device().home.store(FAILS, Relaxed);
        // Two seconds for each of three blocks, as often as it is looked for pages, and not for eight.
        let device = mirror.device();
        assert_eq!(takes(2_000..60_000, || mirror.close()).unwrap_err().pages, 32);
        device.home.store(WORKS, Relaxed);
        area.check(1);
        Ok(())
    });
}

#[test]
fn no_address_is_too_large_to_be_asked_for() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 512);
        let port = mirror.port().unwrap();
        for addr in [0, TASK_SIZE - 1, TASK_SIZE, TASK_SIZE + PAGE_SIZE, 1 << 63, u64::MAX].map(VirtAddr::new) {
            for access in [Access::Read, Access::Write, Access::Atomic] {
                for policy in [DeviceFaultPolicy::Map, DeviceFaultPolicy::Migrate] {
                    let answer = port.fault(addr, access, policy).unwrap_err();
                    assert!(matches!(answer, FaultError::NoVma { .. }), "{addr}: {answer}");
                }
            }
            assert_eq!(port.exclusive_bytes(addr), None);
            assert_eq!(mm.residency(addr).at, Location::Cpu);
            assert!(!mm.is_managed(addr));
        }
        Ok(())
    });
}

#[test]
fn a_child_that_uses_its_parents_handles_is_told_so() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 512);
        let area = Area::filled(Shape::Small, 1, 1);
        let range = PageRange::new(virt(area.start), PAGE as u64).unwrap();
        let child = fork_child(|| {
            // Nobody is here who could answer.
            std::panic::set_hook(Box::new(|_| {}));
            let told = |f: &dyn Fn()| catch_unwind(AssertUnwindSafe(f)).is_err();
            assert!(told(&|| drop(mirror.migrate(range, &MigrateOptions::default()))));
            assert!(told(&|| drop(mm.home(range))));
            let port = mirror.port().unwrap();
            assert!(told(&|| {
                let _ = port.fault(range.start(), Access::Read, DeviceFaultPolicy::Map);
            }));
            // What goes out of scope is no use.
            drop(mm.clone());
            let own = Mm::open().expect("the parent has one");
            let mirror = Watcher::register(&own, 512);
            send(&mirror, &area);
            area.check(1);
        });
        assert_eq!(wait_for(child), End::Exit(0));
        send(&mirror, &area);
        area.check(1);
        Ok(())
    });
}

#[test]
fn a_child_reads_no_zeros_where_pages_could_not_come_home_before_the_fork() {
    isolated!(|| {
        // Without an event nobody gives the child what is missing.
        // SAFETY: the process has one thread that looks at its environment, this one.
        unsafe { std::env::set_var("UHMM_MASK", "fork-event") };
        let mm = open()?;
        let mirror = Watcher::register(&mm, 1024);
        let area = Area::filled(Shape::Small, 1, 1);
        send(&mirror, &area.part(0..20));
        mirror.device().home.store(FAILS, Relaxed);
        let child = takes(1_000..60_000, || {
            fork_child(|| {
                let read = peek(area.page(3));
                panic!("a page that is not there read as {read:#x}");
            })
        });
        assert!(matches!(wait_for(child), End::Signal(libc::SIGSEGV | libc::SIGBUS)));
        mirror.device().home.store(WORKS, Relaxed);
        area.check(1);
        Ok(())
    });
}
