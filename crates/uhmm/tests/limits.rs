//! Bad input, limits, and what is left behind: nothing.
//
// UNSAFETY: the tests make, change and watch memory by raw system calls and pointers.

#![allow(unsafe_code, reason = "tests make the memory that they then watch")]

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::time::{Duration, Instant};

use uhmm::{
    DeviceFaultPolicy, FaultError, MigrateOptions, Mm, PageOutcome, Port,
    addr::{PAGE_SIZE, PageRange, RangeError, TASK_SIZE, VirtAddr},
    device_table::Access,
    engine::Config,
    mm::{Setup, StartError, Threads},
    trace::Counter,
};
use uhmm_sys::{
    arena,
    uffd::{Features, RegisterMode, Uffd},
};
use uhmm_testkit::{Skip, isolated};

use crate::common::{
    Plain, eventually,
    kit::{
        Area, BLOCK, End, PAGE, SHAPES, Shape, World, fork_child, map, open, send, summary, unmap, virt, wait_for,
        write_page,
    },
};

#[test]
fn a_port_is_its_devices_and_not_the_next_ones() {
    isolated!(|| {
        let World { mm, mirror } = World::new(4)?;
        let area = Area::filled(Shape::Small, 1, 1);
        let (id, port) = (mirror.id(), mirror.port().unwrap());
        let fault = |port: &Port| port.fault(virt(area.start), Access::Read, DeviceFaultPolicy::Map);
        assert!(fault(&port).is_ok());
        mirror.close().unwrap();
        assert_eq!(fault(&port), Err(FaultError::NoDevice));
        let next = mm.register(Plain::new(4 << 20)).unwrap();
        assert_eq!(next.id(), id, "the number is used again");
        assert_eq!(fault(&port), Err(FaultError::NoDevice));
        assert!(fault(&next.port().unwrap()).is_ok());
        Ok(())
    });
}

#[test]
fn what_is_no_range_cannot_be_asked_for() {
    let new = |start: u64, len: u64| PageRange::new(VirtAddr::new(start), len);
    let page = PAGE_SIZE;
    assert!(matches!(new(1, page), Err(RangeError::Unaligned { start: 1, .. })));
    assert!(matches!(new(page, 1), Err(RangeError::Unaligned { len: 1, .. })));
    assert!(matches!(new(page, 0), Err(RangeError::Empty { .. })));
    assert!(matches!(new(u64::MAX - page + 1, page), Err(RangeError::OutOfSpace { .. })));
    assert!(matches!(new(u64::MAX - page + 1, 2 * page), Err(RangeError::OutOfSpace { .. })), "it wraps");
    assert!(matches!(new(0, u64::MAX - page + 1), Err(RangeError::OutOfSpace { .. })));
    assert!(matches!(new(TASK_SIZE, page), Err(RangeError::OutOfSpace { .. })));
    assert!(matches!(new(TASK_SIZE - page, 2 * page), Err(RangeError::OutOfSpace { .. })));
    assert!(new(TASK_SIZE - page, page).is_ok() && new(0, TASK_SIZE).is_ok());
    let (a, b) = (VirtAddr::new(2 * page), VirtAddr::new(page));
    assert!(PageRange::from_ends(a, b).is_err(), "upside down");
    assert!(PageRange::from_ends(a, a).is_err(), "empty");
    // An error names what was given.
    let text = new(0x1234, page).unwrap_err().to_string();
    assert!(text.contains("0x1234"), "{text}");
}

#[test]
fn ranges_without_memory_are_answered() {
    isolated!(|| {
        let world = World::new(16)?;
        let hole = Area { start: map(0, 64 * BLOCK, libc::PROT_NONE, 0), pages: 64 * 512 };
        hole.unmap();
        for range in [
            hole.range(),
            PageRange::new(VirtAddr::new(0), PAGE_SIZE).unwrap(),
            PageRange::new(VirtAddr::new(TASK_SIZE - PAGE_SIZE), PAGE_SIZE).unwrap(),
        ] {
            let report = world.mirror.migrate(range, &MigrateOptions::default());
            assert_eq!(report.count(PageOutcome::Unmapped), range.pages(), "{range}: {:?}", summary(&report));
            assert!(world.mm.home(range).is_complete());
            let snapshot = world.mirror.snapshot(range).unwrap();
            assert!(snapshot.iter().all(|page| page.is_error()));
            let report = world.mirror.exclusive(range);
            let told = report.count(PageOutcome::NoAccess) + report.count(PageOutcome::Unmapped);
            assert_eq!(told, range.pages(), "{:?}", summary(&report));
        }
        assert_eq!(world.mm.pages_away(), 0);
        world.finish();
        Ok(())
    });
}

#[test]
fn closing_leaves_nothing_registered_and_nothing_away() {
    isolated!(|| {
        let world = World::new(64)?;
        let areas: Vec<Area> = SHAPES.iter().map(|&shape| Area::filled(shape, 3, 1)).collect();
        for area in &areas {
            world.send(area);
            // In every state: touched, discarded, moved, split by protection.
            area.part(0..100).check(1);
        }
        let read_only = areas[0].part(600..700);
        let protect = |prot| {
            assert_eq!(common::kit::Via::Libc.mprotect(read_only.start, read_only.len(), prot), 0);
        };
        protect(libc::PROT_READ);
        let moved = common::kit::Via::Libc
            .mremap(areas[1].start, 300 * PAGE, 600 * PAGE, libc::MREMAP_MAYMOVE, 0)
            .expect("mremap");
        let _ = world.mirror.exclusive(areas[0].part(800..810).range());
        world.finish();
        let theirs = Uffd::open(Features::empty()).expect("the engine had one");
        let rest = areas[1].part(300..1536);
        for range in [areas[0].range(), rest.range(), PageRange::new(virt(moved), 600 * PAGE_SIZE).unwrap()] {
            theirs.register(range, RegisterMode::MISSING).unwrap_or_else(|e| panic!("{range}: {e}: still ours"));
            theirs.unregister(range).unwrap();
        }
        areas[0].check(1);
        rest.check_from(1, 300);
        Area { start: moved, pages: 300 }.check(1);
        Area { start: moved + 300 * PAGE, pages: 300 }.check_zero();
        protect(common::kit::RW);
        Ok(())
    });
}

#[test]
fn an_engine_opens_and_closes_again_and_again() {
    isolated!(|| {
        open()?.close().unwrap();
        let area = Area::filled(Shape::Small, 1, 1);
        let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
        let files = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = (threads(), files(), arena::used());
        for round in 0..50 {
            let mm = open()?;
            let mirror = mm.register(Plain::new(4 << 20)).expect("room for a device");
            send(&mirror, &area);
            if round % 2 == 0 {
                area.check(1);
            }
            // Handles that are left to drop, and handles that are closed.
            if round % 3 == 0 {
                drop((mirror, mm));
            } else {
                mirror.close().unwrap();
                mm.close().unwrap();
            }
            let theirs = Uffd::open(Features::empty()).unwrap();
            theirs.register(area.range(), RegisterMode::MISSING).unwrap_or_else(|e| panic!("round {round}: {e}"));
            area.check(1);
        }
        let after = (threads(), files(), arena::used());
        assert_eq!(before.0, after.0, "threads");
        assert_eq!(before.1 + 50, after.1, "descriptors: one for the memory of each device, which is never dropped");
        Ok(())
    });
}

#[test]
fn the_last_of_many_handles_closes() {
    isolated!(|| {
        let mm = open()?;
        let (second, mirror) = (mm.clone(), mm.register(Plain::new(4 << 20)).unwrap());
        let area = Area::filled(Shape::Small, 1, 1);
        send(&mirror, &area);
        mm.close().unwrap();
        assert_eq!(second.pages_away(), 512, "somebody uses it still");
        drop(mirror);
        assert_eq!(second.pages_away(), 512, "somebody uses it still");
        let core = second.clone();
        second.close().unwrap();
        core.close().unwrap();
        let theirs = Uffd::open(Features::empty()).unwrap();
        theirs.register(area.range(), RegisterMode::MISSING).expect("nothing is registered");
        area.check(1);
        Ok(())
    });
}

/// Sets `RLIMIT_AS` to what is mapped now and `more`.
fn limit_address_space(more: u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmSize:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    let limit = libc::rlimit { rlim_cur: kib * 1024 + more, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: reads a local.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) }, 0);
}

#[test]
fn a_limit_on_address_space_is_told_or_lived_with() {
    isolated!(|| {
        drop(open()?);
        // Each in a process of its own: the reservation is for good.
        let start = |more: u64, small: bool| wait_for(spawn_again(&format!("{more}:{small}")));
        assert_eq!(start(64 << 20, false), End::Exit(1), "too little, and told so");
        assert_eq!(start(6 << 30, false), End::Exit(0));
        assert_eq!(start(700 << 20, true), End::Exit(0), "an engine that sets less aside");
        Ok(())
    });
}

/// What [`a_limit_on_address_space_is_told_or_lived_with`] asks of the processes that it starts.
const LIMITED: &str = "UHMM_TEST_LIMITED";

/// Runs this executable again, with a limit to be set before the engine starts.
fn spawn_again(what: &str) -> i32 {
    #[expect(
        clippy::zombie_processes,
        reason = "its output is waited for below, and the test's process group ends with it"
    )]
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "an_engine_under_a_limit", "--nocapture"])
        .env(LIMITED, what)
        .spawn()
        .unwrap();
    i32::try_from(child.id()).unwrap()
}

#[test]
fn an_engine_under_a_limit() {
    // Only when asked by the test above.
    let Ok(what) = std::env::var(LIMITED) else { return };
    let (more, small) = what.split_once(':').unwrap();
    limit_address_space(more.parse().unwrap());
    let config = Config { max_blocks: 1024, staging_chunks: 32, ..Config::default() };
    let setup = if small == "true" { Setup { config, ..Setup::default() } } else { Setup::default() };
    let code = match Mm::open_with(setup) {
        Ok(mm) => {
            let mirror = mm.register(Plain::new(8 << 20)).expect("room for a device");
            let area = Area::filled(Shape::Small, 1, 1);
            send(&mirror, &area);
            area.check(1);
            0
        }
        Err(error @ StartError::Memory(_)) => {
            assert!(error.to_string().contains("ulimit -v"), "{error}");
            1
        }
        Err(error) => panic!("{error}"),
    };
    std::process::exit(code);
}

#[test]
fn an_engine_that_is_out_of_records_says_so() {
    isolated!(|| {
        // A few blocks only, of which 256 are kept back for mappings that move.
        let config = Config { max_blocks: 260, ..Config::default() };
        let mm = Mm::open_with(Setup { config, ..Setup::default() }).map_err(|error| Skip(error.to_string()))?;
        let mirror = mm.register(Plain::new(64 << 20)).unwrap();
        let areas: Vec<Area> = (0..10).map(|n| Area::filled(Shape::Small, 1, n)).collect();
        let mut moved = 0;
        for area in &areas {
            let report = mirror.migrate(area.range(), &MigrateOptions::default());
            moved += report.count(PageOutcome::Moved);
            let told = report.count(PageOutcome::Moved) + report.count(PageOutcome::NoMemory);
            assert_eq!(told, 512, "{:?}", summary(&report));
        }
        assert_eq!(moved, 4 * 512);
        // A mapping that moves has room still.
        let flags = libc::MREMAP_MAYMOVE;
        let to = common::kit::Via::Libc.mremap(areas[0].start, BLOCK, 2 * BLOCK, flags, 0).unwrap();
        Area { start: to, pages: 512 }.check(0);
        (1..10).zip(&areas[1..]).for_each(|(n, area)| area.check(n));
        mm.close().unwrap();
        Ok(())
    });
}

#[test]
fn an_engine_that_is_out_of_staging_goes_on() {
    isolated!(|| {
        let config = Config { staging_chunks: 6, keep_chunks: 2, ..Config::default() };
        let mm = Mm::open_with(Setup { config, ..Setup::default() }).map_err(|error| Skip(error.to_string()))?;
        let mirror = mm.register(Plain::new(64 << 20)).unwrap();
        for shape in SHAPES {
            let area = Area::filled(shape, 16, 1);
            for _ in 0..3 {
                send(&mirror, &area);
                area.check(1);
            }
            // All of staging is taken by pages that a device holds exclusively.
            let report = mirror.exclusive(area.range());
            let held = report.count(PageOutcome::Moved);
            assert!(held > 0 && held < area.pages, "{:?}", summary(&report));
            let other = Area::filled(shape, 4, 2);
            let report = mirror.migrate(other.range(), &MigrateOptions::default());
            let told = report.count(PageOutcome::Moved) + report.count(PageOutcome::NoMemory);
            assert_eq!(told, other.pages, "{:?}", summary(&report));
            other.check(2);
            area.check(1);
            eventually("nothing is away", || mm.pages_away() == 0);
            area.unmap();
            other.unmap();
        }
        mm.close().unwrap();
        Ok(())
    });
}

#[test]
fn hidden_threads_serve_as_well() {
    isolated!(|| {
        let setup = Setup { threads: Threads::Hidden, ..Setup::default() };
        let mm = Mm::open_with(setup).map_err(|error| Skip(error.to_string()))?;
        let mirror = mm.register(Plain::new(16 << 20)).unwrap();
        for shape in SHAPES {
            let area = Area::filled(shape, 2, 1);
            for _ in 0..5 {
                send(&mirror, &area);
                area.check(1);
            }
        }
        mm.close().unwrap();
        Ok(())
    });
}

#[test]
fn memory_that_never_moves_is_never_registered() {
    isolated!(|| {
        let world = World::new(16)?;
        let area = Area::filled(Shape::Small, 4, 1);
        let port = world.mirror.port().unwrap();
        for n in (0..area.pages).step_by(7) {
            let policy = uhmm::DeviceFaultPolicy::Map;
            port.fault(virt(area.page(n)), uhmm::device_table::Access::Write, policy).unwrap();
        }
        world.mirror.range_fault(area.range(), uhmm::device_table::Access::Read).unwrap();
        // Only one block of it ever moves.
        world.send(&area.part(512..1024));
        let theirs = Uffd::open(Features::empty()).unwrap();
        for part in [area.part(0..512), area.part(1024..2048)] {
            theirs.register(part.range(), RegisterMode::MISSING).expect("mirrored memory is not registered");
            theirs.unregister(part.range()).unwrap();
        }
        assert!(theirs.register(area.part(512..1024).range(), RegisterMode::MISSING).is_err());
        area.check(1);
        world.finish();
        Ok(())
    });
}

#[test]
fn a_block_goes_back_to_native_faults() {
    isolated!(|| {
        let world = World::new(16)?;
        let area = Area::new(Shape::Small, 1);
        area.part(0..10).fill(1);
        world.send(&area.part(0..10));
        area.part(0..10).check(1);
        eventually("nothing is away", || world.mm.pages_away() == 0);
        let faults = || world.mm.stats().get(Counter::FaultsZero);
        // Holes of a block that nothing of is away are the kernel's again, after one fault at most.
        (10..512).for_each(|n| write_page(area.page(n), 1, n));
        assert!(faults() < 20, "{} faults for 502 fresh pages", faults());
        area.check(1);
        world.finish();
        Ok(())
    });
}

#[test]
fn memory_that_grew_is_native() {
    isolated!(|| {
        let world = World::new(16)?;
        let area = Area::filled(Shape::Small, 1, 1);
        world.send(&area);
        let to = common::kit::Via::Libc.mremap(area.start, BLOCK, 8 * BLOCK, libc::MREMAP_MAYMOVE, 0).unwrap();
        let grown = Area { start: to, pages: 8 * 512 };
        let before = world.mm.stats().get(Counter::FaultsZero);
        grown.part(512..8 * 512).fill(2);
        let faults = world.mm.stats().get(Counter::FaultsZero) - before;
        assert!(faults < 100, "{faults} faults for 3584 fresh pages");
        grown.part(0..512).check(1);
        grown.part(512..8 * 512).check(2);
        world.finish();
        Ok(())
    });
}

#[test]
fn residency_keeps_a_page_that_came_home_for_a_while() {
    isolated!(|| {
        let world = World::new(16)?;
        let area = Area::filled(Shape::Small, 1, 1);
        let obey = MigrateOptions { obey_residency: true, ..MigrateOptions::default() };
        let mut waited = Duration::ZERO;
        for round in 0..6 {
            let start = Instant::now();
            eventually("it may leave again", || world.mirror.migrate(area.range(), &obey).count(PageOutcome::Hot) == 0);
            waited = start.elapsed();
            area.check(1);
            println!("round {round}: {waited:?}");
        }
        // 2 ms, 4, 8, 16, 32: a page that bounces stays longer each time.
        assert!(waited >= Duration::from_millis(10), "{waited:?}");
        // Who does not obey does not wait.
        world.send(&area);
        area.check(1);
        world.finish();
        Ok(())
    });
}

#[test]
fn a_signal_handler_of_the_program_sees_only_its_own_faults() {
    isolated!(|| {
        use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
        static CAUGHT: AtomicU32 = AtomicU32::new(0);
        extern "C" fn handler(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
            // SAFETY: the kernel passes a valid record, which lives as long as the handler runs.
            let info = unsafe { &*info };
            // SAFETY: the record of this signal has an address.
            let addr = unsafe { info.si_addr() }.addr();
            CAUGHT.fetch_add(1, Relaxed);
            // Makes the page accessible; the instruction is then tried again.
            common::kit::Via::Raw.mprotect(addr & !(PAGE - 1), PAGE, common::kit::RW);
        }
        let world = World::with_kernel_faults(16)?;
        // SAFETY: a zeroed action is a valid one.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = (handler as extern "C" fn(_, _, _)) as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        // SAFETY: the handler does no more than a system call.
        assert_eq!(unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut()) }, 0);
        let area = Area::filled(Shape::Small, 1, 1);
        // A collector's trick: no access to a few pages, and a handler that gives it.
        world.send(&area);
        for n in (0..512).step_by(8) {
            assert_eq!(common::kit::Via::Libc.mprotect(area.page(n), PAGE, libc::PROT_NONE), 0);
        }
        area.check(1);
        assert_eq!(CAUGHT.load(Relaxed), 64, "one for each page without access, and none for those that were away");
        world.finish();
        Ok(())
    });
}

#[test]
fn a_program_may_use_a_userfaultfd_of_its_own_beside_the_engine() {
    isolated!(|| {
        let world = World::new(16)?;
        let theirs = Uffd::open(Features::empty()).unwrap();
        let (ours, own) = (Area::filled(Shape::Small, 1, 1), Area::new(Shape::Small, 1));
        theirs.register(own.range(), RegisterMode::MISSING).unwrap();
        let source = Area::filled(Shape::Small, 1, 9);
        std::thread::scope(|s| {
            let reader = s.spawn(|| own.check(9));
            let mut served = 0;
            let start = Instant::now();
            while served < 512 {
                assert!(start.elapsed() < Duration::from_secs(30), "{served} of the program's own faults");
                let _ = theirs.wait(Some(100));
                while let Ok(Some(uhmm_sys::uffd::Event::Fault { addr, .. })) = theirs.read() {
                    let n = (usize::try_from(addr.get()).unwrap() - own.start) / PAGE;
                    let from = virt(source.page(n));
                    let done =
                        theirs.copy(addr, from, PAGE_SIZE, uhmm_sys::uffd::Wake::Now, uhmm_sys::uffd::Protect::Off);
                    assert!(done.is_all(), "{done:?}");
                    served += 1;
                }
                world.migrate(&own);
                world.migrate(&ours);
            }
            reader.join().unwrap();
        });
        ours.check(1);
        own.check(9);
        world.finish();
        Ok(())
    });
}

#[test]
fn sixteen_threads_ask_at_once() {
    isolated!(|| {
        let world = World::new(128)?;
        let areas: Vec<Area> = (0..32).map(|n| Area::filled(SHAPES[n % 2], 1, n as u64)).collect();
        std::thread::scope(|s| {
            for (n, area) in areas.iter().enumerate() {
                let world = &world;
                s.spawn(move || {
                    for _ in 0..10 {
                        world.migrate(area);
                        assert_eq!(world.mirror.snapshot(area.range()).unwrap().len(), 512);
                        area.check(n as u64);
                        let _ = world.mm.home(area.range());
                    }
                });
            }
        });
        assert_eq!(
            wait_for(fork_child(|| areas.iter().enumerate().for_each(|(n, a)| a.check(n as u64)))),
            End::Exit(0)
        );
        unmap(areas[0].start, areas[0].len());
        world.finish();
        Ok(())
    });
}
