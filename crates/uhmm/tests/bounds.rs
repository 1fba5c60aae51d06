//! Waits that end: each is made to last as long as it may.
//
// UNSAFETY: the tests make, change and watch memory by raw system calls and pointers.

#![allow(unsafe_code, reason = "tests make the memory that they then watch")]

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::{
    fs::File,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use uhmm::{
    DeviceFaultPolicy, FaultError, MigrateOptions, Mirror, Mm, PageOutcome,
    addr::{PAGE_SIZE, PageRange, TASK_SIZE, VirtAddr},
    device_table::Access,
    mm::Location,
    trace::Counter,
};
use uhmm_sys::{
    Errno, thread,
    uffd::{Features, RegisterMode, Uffd},
};
use uhmm_testkit::{Skip, isolated};

use crate::common::{
    Plain, eventually,
    kit::{Area, End, PAGE, Shape, Via, fork_child, has_move, open, peek, send, summary, virt, wait_for, write_page},
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

/// A thread that changes the address space and does not get on: its event is read, and it has no processor to go on with. Until
/// then the kernel refuses whatever the engine wants to install or move.
struct Held {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Held {
    fn new(mirror: &Mirror<Watcher>) -> Result<Self, Skip> {
        let area = Self::area(mirror);
        Self::begin(mirror.device(), area, Duration::ZERO)
    }

    /// Memory whose end the engine is told of.
    fn area(mirror: &Mirror<Watcher>) -> Area {
        let area = Area::filled(Shape::Small, 1, 9);
        send(mirror, &area);
        area
    }

    /// Unmaps `area`; the event is read no sooner than after `unread`.
    fn begin(device: &Watcher, area: Area, unread: Duration) -> Result<Self, Skip> {
        let over = Arc::new(AtomicBool::new(false));
        device.stall_gate.store(true, Relaxed);
        let (changer, spinner) = (Arc::clone(&over), Arc::clone(&over));
        let (running, runs) = std::sync::mpsc::channel();
        let (started, starts) = std::sync::mpsc::channel();
        let change = std::thread::spawn(move || {
            started.send(thread::gettid()).unwrap();
            assert_eq!(Via::Raw.munmap(area.start, area.len()), 0);
            changer.store(true, Relaxed);
        });
        let changer = starts.recv().unwrap();
        eventually("the thread waits for its event to be read", || {
            waits_in_the_kernel(changer) && device.gate_stalls.load(Relaxed) || over.load(Relaxed)
        });
        put_on_the_other_processor(changer);
        let spin = std::thread::spawn(move || {
            let may = thread::pin_to(1).is_ok() && run_before_all_others();
            running.send(may).unwrap();
            while may && !spinner.load(Relaxed) {
                std::hint::spin_loop();
            }
        });
        let may = runs.recv().unwrap();
        std::thread::sleep(unread);
        device.stall_gate.store(false, Relaxed);
        let held = Self { over, threads: vec![spin, change] };
        eventually("the event is read", || !device.gate_stalls.load(Relaxed));
        if may { Ok(held) } else { Err(Skip("no thread can be kept from its processor by this user".to_owned())) }
    }

    fn is_over(&self) -> bool {
        self.over.load(Relaxed)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.over.store(true, Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

/// Whether a thread sleeps where no signal but a deadly one wakes it.
fn waits_in_the_kernel(tid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('D'))
}

fn put_on_the_other_processor(tid: u32) {
    let set = [0b10_u64; 16];
    // SAFETY: the kernel reads the local array. A thread that is gone needs none.
    unsafe { libc::syscall(libc::SYS_sched_setaffinity, tid, size_of_val(&set), set.as_ptr()) };
}

/// Returns whether the calling thread may.
fn run_before_all_others() -> bool {
    let param = libc::sched_param { sched_priority: 1 };
    // SAFETY: a local that the kernel reads.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const param) == 0 }
}

/// Calls `f` while a change is held; again where it was not held to its end, which the kernel sees to after a second.
fn while_changing<T>(mirror: &Mirror<Watcher>, mut f: impl FnMut(&Held) -> T) -> Result<T, Skip> {
    for _ in 0..50 {
        let held = Held::new(mirror)?;
        let result = f(&held);
        if !held.is_over() {
            return Ok(result);
        }
    }
    panic!("the thread that changes the address space always gets on");
}

/// An address space and a device, where a thread can be kept from its processor.
fn with_two_processors(frames: u64) -> Result<(Mm, Mirror<Watcher>), Skip> {
    leave_a_processor()?;
    let mm = open()?;
    let mirror = Watcher::register(&mm, frames);
    Ok((mm, mirror))
}

/// Leaves the second processor to threads that are to be kept from it. Nobody else gets on there either: one test at a time.
fn leave_a_processor() -> Result<(), Skip> {
    static TURN: OnceLock<File> = OnceLock::new();
    if !thread::allowed_cpus().iter().take(2).eq([0, 1]) {
        return Err(Skip("this process may not use the first two processors".to_owned()));
    }
    let turn = File::open(std::env::current_exe().unwrap()).unwrap();
    turn.lock().unwrap();
    TURN.set(turn).unwrap();
    thread::pin_to(0).unwrap();
    Ok(())
}

#[test]
fn a_migration_gives_up_while_the_address_space_changes() {
    isolated!(|| {
        let (_mm, mirror) = with_two_processors(2048)?;
        let (area, report) = while_changing(&mirror, |_| {
            let area = Area::filled(Shape::Small, 1, 1);
            (area, mirror.migrate(area.range(), &MigrateOptions::default()))
        })?;
        assert_eq!(report.count(PageOutcome::TimedOut), area.pages, "{:?}", summary(&report));
        send(&mirror, &area);
        area.check(1);
        Ok(())
    });
}

#[test]
fn memory_is_not_released_while_the_address_space_changes() {
    isolated!(|| {
        let (mm, mirror) = with_two_processors(2048)?;
        let area = Area::filled(Shape::Small, 1, 1);
        let released = while_changing(&mirror, |_| mm.release(area.range()))?;
        assert!(!released);
        send(&mirror, &area);
        assert!(mm.release(area.range()));
        area.check(1);
        Ok(())
    });
}

#[test]
fn a_touch_is_sent_to_fault_anew_while_the_address_space_changes() {
    isolated!(|| {
        let (mm, mirror) = with_two_processors(4096)?;
        let areas: Vec<_> = (0..50).map(|_| Area::filled(Shape::Small, 1, 1).part(0..20)).collect();
        areas.iter().for_each(|area| send(&mirror, area));
        let mut rest = areas.iter();
        let stale = || mm.stats().get(Counter::FaultsStale);
        std::thread::scope(|s| {
            let touched = while_changing(&mirror, |held| {
                let before = stale();
                let area = rest.next().expect("as many as there are attempts");
                s.spawn(|| area.check(1));
                while stale() == before && !held.is_over() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                stale() > before
            });
            assert!(touched?, "the fault waits for the change");
            Ok(())
        })?;
        areas.iter().for_each(|area| area.check(1));
        Ok(())
    });
}

#[test]
fn what_cannot_be_mapped_while_the_address_space_changes_is_mapped_at_a_touch() {
    isolated!(|| {
        let (mm, watcher) = with_two_processors(4096)?;
        if !has_move() {
            return Err(Skip("without UFFDIO_MOVE coherent memory is used like private".to_owned()));
        }
        let mirror = mm.register(Plain::coherent(8 << 20)).unwrap();
        let device = mirror.device();
        for _ in 0..20 {
            let area = Area::filled(Shape::Small, 1, 1).part(0..20);
            device.stall_out.store(true, Relaxed);
            device.stalls.store(false, Relaxed);
            let held = std::thread::scope(|s| {
                s.spawn(|| assert!(mirror.migrate(area.range(), &MigrateOptions::default()).is_complete()));
                eventually("the device copies", || device.stalls.load(Relaxed));
                let held = Held::new(&watcher);
                device.stall_out.store(false, Relaxed);
                held
            })?;
            let at = |n| mm.residency(virt(area.page(n))).at;
            let in_frames = (0..area.pages).all(|n| matches!(at(n), Location::Device(id, _) if id == mirror.id()));
            let was_held = in_frames && !held.is_over();
            drop(held);
            area.check(1);
            // A touch goes on before the books are done.
            let is_mapped = |n| matches!(at(n), Location::Coherent(id, _) if id == mirror.id());
            eventually("all pages are mapped", || (0..area.pages).all(is_mapped));
            if was_held {
                return Ok(());
            }
        }
        panic!("the thread that changes the address space always gets on");
    });
}

#[test]
fn the_end_waits_for_a_change_and_leaves_nothing_registered() {
    isolated!(|| {
        let (mm, mirror) = with_two_processors(2048)?;
        let area = Area::filled(Shape::Small, 1, 1);
        send(&mirror, &area);
        assert!(mm.home(area.range()).is_complete());
        let held = Held::new(&mirror)?;
        drop(mirror);
        std::thread::scope(|s| {
            s.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                drop(held);
            });
            mm.close().unwrap();
        });
        area.check(1);
        // Another's userfaultfd can have it.
        let other = Uffd::open(Features::empty()).unwrap();
        other.register(area.range(), RegisterMode::MISSING).unwrap();
        Ok(())
    });
}

#[test]
fn the_end_does_not_wait_for_changes_for_ever_and_what_stays_registered_is_served() {
    isolated!(|| {
        leave_a_processor()?;
        let area = Area::filled(Shape::Small, 1, 1);
        let other = Uffd::open(Features::empty()).unwrap();
        for _ in 0..10 {
            let mm = open()?;
            let mirror = Watcher::register(&mm, 4096);
            send(&mirror, &area);
            let (device, last) = (mirror.device(), Held::area(&mirror));
            // All is home, and registered still.
            assert!(mm.home(area.range()).is_complete() && mm.home(last.range()).is_complete());
            // One change makes it wait for the next event, which comes late and brings another.
            let first = Held::new(&mirror)?;
            drop(mirror);
            let (took, second) = std::thread::scope(|s| {
                let end = s.spawn(move || {
                    let start = Instant::now();
                    mm.close().unwrap();
                    start.elapsed()
                });
                std::thread::sleep(Duration::from_millis(200));
                let second = Held::begin(device, last, Duration::from_millis(2500));
                (end.join().unwrap(), second)
            });
            let was_held = !second?.is_over();
            drop(first);
            if took < Duration::from_secs(2) || !was_held {
                continue;
            }
            assert_eq!(other.register(area.range(), RegisterMode::MISSING), Err(Errno::BUSY));
            area.check(1);
            // Somebody has to fill what is dropped.
            assert_eq!(Via::Raw.madvise(area.page(7), PAGE, libc::MADV_DONTNEED), 0);
            assert_eq!(peek(area.page(7)), 0);
            // The next end gives it back.
            open()?.close().unwrap();
            other.register(area.range(), RegisterMode::MISSING).unwrap();
            return Ok(());
        }
        panic!("the threads that change the address space always get on");
    });
}

#[test]
fn a_fault_waits_a_second_for_a_device_that_stalls() {
    isolated!(|| {
        let mm = open()?;
        let mirror = Watcher::register(&mm, 64 * 512);
        if !mm.serves_kernel_faults() {
            return Err(Skip("first touches do not come to the engine".to_owned()));
        }
        let (used, fresh) = (Area::filled(Shape::Small, 32, 1), Area::new(Shape::Small, 200));
        mirror.device().stall_out.store(true, Relaxed);
        mm.keep_resident(1 << 20).unwrap();
        // Until reclaim has registered it the kernel fills it in by itself.
        let parked = || mm.stats().get(Counter::FaultsParked);
        let mut blocks = 0..200;
        let mut longest = Duration::ZERO;
        while parked() == 0 {
            let start = Instant::now();
            write_page(fresh.page(512 * blocks.next().expect("some touch waits")), 2, 0);
            longest = longest.max(start.elapsed());
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(longest > Duration::from_millis(900) && longest < Duration::from_secs(20), "{longest:?}");
        mirror.device().stall_out.store(false, Relaxed);
        used.check(1);
        Ok(())
    });
}

/// CPU time that this process has used.
fn cpu_time() -> Duration {
    // SAFETY: a structure of numbers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the local structure in.
    assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) }, 0);
    let of = |t: libc::timeval| {
        Duration::from_secs(t.tv_sec.unsigned_abs()) + Duration::from_micros(t.tv_usec.unsigned_abs())
    };
    of(usage.ru_utime) + of(usage.ru_stime)
}

#[test]
fn reclaim_that_can_free_nothing_does_not_try_all_the_time() {
    isolated!(|| {
        let mm = open()?;
        let _mirror = Watcher::register(&mm, 8 * 512);
        let area = Area::filled(Shape::Small, 4, 1);
        // Less than the process needs whatever goes.
        mm.keep_resident(64 << 10).unwrap();
        eventually("all that can go is gone", || mm.pages_away() >= area.pages);
        std::thread::sleep(Duration::from_millis(500));
        let before = cpu_time();
        std::thread::sleep(Duration::from_secs(1));
        let used = cpu_time() - before;
        assert!(used < Duration::from_millis(50), "{used:?} in a second");
        // What comes home goes again.
        area.check(1);
        eventually("all that can go is gone", || mm.pages_away() >= area.pages);
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
        let answer = uhmm::still::still(|| takes(90..20_000, atomic)).unwrap_err();
        assert!(matches!(answer, FaultError::TimedOut { ms: 100.., .. }), "{answer}");
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
