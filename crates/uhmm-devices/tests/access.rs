//! What a lane reads and writes, wherever the page is, and what it may not.
// UNSAFETY: mounts a file system of its own.

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use uhmm::{
    DeviceFaultPolicy::{Map, Migrate},
    FaultError, MigrateOptions, Mirror, Mm, PageOutcome,
    addr::VirtAddr,
    device::{Cause, CopyOp, Device, DeviceError, FrameRun, Invalidation, MemoryKind, MemorySpec},
    mm::Location,
    trace::Counter,
};
use uhmm_devices::soft::{AccessError, Lane, RunError, SoftConfig, SoftDevice};
use uhmm_sys::{Errno, access, dispatch::Whereabouts, mem::Mapping};
use uhmm_testkit::isolated;

use crate::common::{MIB, Memory, PAGE, configs, eventually, is_on, lane, register};

/// Tries every kind of access but atomics on memory that was filled, and leaves it so that `check_all` holds.
fn try_all(lane: &mut Lane, memory: &Memory) {
    let at = |page, byte| memory.addr(page, byte);
    assert_eq!(lane.load_u64(at(0, 16)), Ok(common::stamp(0, 2)));
    let bytes = common::stamp(0, 3).to_ne_bytes();
    assert_eq!(lane.load_u8(at(0, 25)), Ok(bytes[1]));
    assert_eq!(lane.load_u16(at(0, 25)), Ok(u16::from_ne_bytes([bytes[1], bytes[2]])));
    assert_eq!(lane.load_u32(at(0, 28)), Ok(u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]])));
    // Not aligned, and over the border of two pages.
    let (a, b) = (common::stamp(0, 511).to_ne_bytes(), common::stamp(1, 0).to_ne_bytes());
    let over = u64::from_ne_bytes([a[5], a[6], a[7], b[0], b[1], b[2], b[3], b[4]]);
    assert_eq!(lane.load_u64(at(0, PAGE - 3)), Ok(over));

    lane.store_u8(at(1, 100), 0xab).unwrap();
    lane.store_u16(at(1, 103), 0x1234).unwrap();
    lane.store_u32(at(1, 108), 0xdead_beef).unwrap();
    lane.store_u64(at(1, 112), 0x0123_4567_89ab_cdef).unwrap();
    lane.store_f32(at(1, 120), 1.5).unwrap();
    lane.store_f64(at(1, 128), -2.25).unwrap();
    lane.store_u32(at(1, PAGE - 2), 0x0102_0304).unwrap();
    assert_eq!(lane.load_f32(at(1, 120)), Ok(1.5));
    assert_eq!(lane.load_f64(at(1, 128)), Ok(-2.25));

    let mut buf = vec![0; 2 * PAGE + 100];
    lane.read(at(0, PAGE - 50), &mut buf).unwrap();
    lane.write(at(4, PAGE - 30), &buf).unwrap();
    lane.fill(at(7, PAGE - 10), 0x5a, 20).unwrap();
    // To another place within its page, then by three bytes over itself, both ways.
    lane.copy(at(9, 77), at(4, PAGE - 30), buf.len() as u64).unwrap();
    lane.copy(at(9, 80), at(9, 77), buf.len() as u64).unwrap();
    lane.copy(at(9, 78), at(9, 80), buf.len() as u64).unwrap();
}

fn check_all(memory: &Memory) {
    let mut want: Vec<u8> = (0..12 * 512).flat_map(|n| common::stamp(n / 512, n % 512).to_ne_bytes()).collect();
    let mut put = |page: usize, byte: usize, bytes: &[u8]| {
        want[page * PAGE + byte..][..bytes.len()].copy_from_slice(bytes);
    };
    put(1, 100, &[0xab]);
    put(1, 103, &0x1234u16.to_ne_bytes());
    put(1, 108, &0xdead_beef_u32.to_ne_bytes());
    put(1, 112, &0x0123_4567_89ab_cdef_u64.to_ne_bytes());
    put(1, 120, &1.5f32.to_ne_bytes());
    put(1, 128, &(-2.25f64).to_ne_bytes());
    put(1, PAGE - 2, &0x0102_0304u32.to_ne_bytes());
    let len = 2 * PAGE + 100;
    want.copy_within(PAGE - 50..PAGE - 50 + len, 4 * PAGE + PAGE - 30);
    want[8 * PAGE - 10..8 * PAGE + 10].fill(0x5a);
    want.copy_within(5 * PAGE - 30..5 * PAGE - 30 + len, 9 * PAGE + 77);
    want.copy_within(9 * PAGE + 77..9 * PAGE + 77 + len, 9 * PAGE + 80);
    want.copy_within(9 * PAGE + 80..9 * PAGE + 80 + len, 9 * PAGE + 78);
    for (n, want) in want.chunks(8).enumerate() {
        assert_eq!(memory.get(n / 512, n % 512).to_ne_bytes(), want, "page {} number {}", n / 512, n % 512);
    }
}

#[test]
fn accesses_reach_pages_in_host_memory_and_leave_them_there() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        let mirror = register(&mm, &SoftConfig::ram("soft", 8 * MIB), 0);
        let memory = Memory::new(12);
        memory.fill();
        try_all(&mut lane(&mirror, Map), &memory);
        assert_eq!((mirror.frames_used(), mm.pages_away()), (0, 0));
        check_all(&memory);
        Ok(())
    });
}

#[test]
fn accesses_reach_pages_on_the_device_and_leave_them_there() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        for config in configs(8 * MIB) {
            let mirror = register(&mm, &config, 0);
            let memory = Memory::new(12);
            memory.fill();
            let report = mirror.migrate(memory.range(), &MigrateOptions::default());
            assert!(report.is_complete(), "{:?}", report.summary().collect::<Vec<_>>());
            try_all(&mut lane(&mirror, Map), &memory);
            assert_eq!(mirror.frames_used(), 12, "a page came home for a device access");
            check_all(&memory);
            mirror.close().unwrap();
        }
        Ok(())
    });
}

#[test]
fn a_device_fault_migrates_where_that_is_the_policy() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        // Each in a block of its own: what came home a moment ago would stay.
        let memories = [Memory::new(12), Memory::new(12)];
        for (config, memory) in configs(8 * MIB).iter().zip(&memories) {
            let mirror = register(&mm, config, 0);
            memory.fill();
            try_all(&mut lane(&mirror, Migrate), memory);
            assert!(is_on(&mm, &mirror, memory.addr(0, 0)), "{:?}", mm.residency(memory.addr(0, 0)));
            check_all(memory);
            mirror.close().unwrap();
        }
        Ok(())
    });
}

/// Tries every atomic operation on numbers that are 100.
fn try_atomics(lane: &mut Lane, memory: &Memory, page: usize) {
    let at = |n: usize| memory.addr(page, n * 8);
    assert_eq!(lane.fetch_add_u64(at(0), u64::MAX), Ok(100));
    assert_eq!(lane.fetch_and_u64(at(1), 0x64 ^ 4), Ok(100));
    assert_eq!(lane.fetch_or_u64(at(2), 1), Ok(100));
    assert_eq!(lane.fetch_xor_u64(at(3), 0xff), Ok(100));
    assert_eq!(lane.fetch_min_u64(at(4), 7), Ok(100));
    assert_eq!(lane.fetch_max_u64(at(5), 7), Ok(100));
    assert_eq!(lane.swap_u64(at(6), 8), Ok(100));
    assert_eq!(lane.cas_u64(at(7), 99, 1), Ok(Err(100)));
    assert_eq!(lane.cas_u64(at(7), 100, 1), Ok(Ok(100)));
    assert_eq!(lane.fetch_add_u32(memory.addr(page, 64), u32::MAX), Ok(100));
    assert_eq!(lane.fetch_max_u32(memory.addr(page, 68), 5), Ok(0));
    assert_eq!(lane.cas_u32(memory.addr(page, 72), 100, 1), Ok(Ok(100)));
    // Plain accesses to the same page see it.
    assert_eq!(lane.load_u64(at(0)), Ok(99));
    lane.store_u64(at(9), 77).unwrap();
}

#[test]
fn atomics_work_on_frames_and_on_pages_taken_exclusively() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        for config in configs(8 * MIB) {
            let mirror = register(&mm, &config, 0);
            let memory = Memory::new(4);
            let mut lane = lane(&mirror, Map);
            for page in 0..4 {
                (0..10).for_each(|n| memory.word(page, n).store(100, std::sync::atomic::Ordering::Relaxed));
            }
            assert!(mirror.migrate(memory.part(1, 1), &MigrateOptions::default()).is_complete());
            // Page 0 is in host memory, 1 on the device, and 2 is taken exclusively beforehand.
            assert_eq!(mirror.exclusive(memory.part(2, 1)).count(PageOutcome::Moved), 1);
            for page in 0..3 {
                try_atomics(&mut lane, &memory, page);
            }
            let at = |page| mm.residency(memory.addr(page, 0)).at;
            assert_eq!(at(0), Location::Exclusive(mirror.id()));
            assert!(is_on(&mm, &mirror, memory.addr(1, 0)));
            assert_eq!(at(2), Location::Exclusive(mirror.id()));
            for page in 0..3 {
                let got: Vec<_> = (0..10).map(|n| memory.get(page, n)).collect();
                let word8 = u64::from(99u32) | 5 << 32;
                assert_eq!(got, [99, 96, 101, 155, 7, 100, 8, 1, word8, 77], "page {page}");
            }
            // The touches took them back.
            eventually("everything is home", || (0..3).all(|page| at(page) == Location::Cpu));
            drop(lane);
            mirror.close().unwrap();
        }
        Ok(())
    });
}

#[test]
fn an_atomic_operation_takes_one_fault() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        let mirror = register(&mm, &SoftConfig::ram("soft", 8 * MIB), 0);
        let memories = [Memory::new(4), Memory::new(4)];
        for (policy, memory) in [Map, Migrate].into_iter().zip(&memories) {
            memory.fill();
            let mut lane = lane(&mirror, policy);
            let before = mm.stats().get(Counter::DeviceFaults);
            assert_eq!(lane.fetch_add_u64(memory.addr(1, 8), 1), Ok(common::stamp(1, 1)));
            assert_eq!(lane.fetch_add_u64(memory.addr(1, 8), 1), Ok(common::stamp(1, 1) + 1));
            assert_eq!(mm.stats().get(Counter::DeviceFaults), before + 1, "{policy:?}");
            assert_eq!(is_on(&mm, &mirror, memory.addr(1, 0)), policy == Migrate);
            assert_eq!(memory.get(1, 1), common::stamp(1, 1) + 2);
        }
        Ok(())
    });
}

#[test]
fn pages_of_a_shared_file_stay_and_have_no_atomics() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        let mirror = register(&mm, &SoftConfig::ram("soft", 8 * MIB), 0);
        let file = Mapping::memfd("shared", 12 * PAGE as u64).unwrap();
        let memory = Memory::shared_file(&file);
        memory.fill();
        for policy in [Map, Migrate] {
            let mut lane = lane(&mirror, policy);
            memory.fill();
            try_all(&mut lane, &memory);
            check_all(&memory);
            assert_eq!(file.load_u64(PAGE as u64 + 112), 0x0123_4567_89ab_cdef);
            let error = lane.fetch_add_u64(memory.addr(3, 8), 1);
            assert!(
                matches!(
                    error,
                    Err(AccessError::Fault(FaultError::NotExclusive {
                        outcome: PageOutcome::SharedMapping | PageOutcome::FileBacked,
                        ..
                    }))
                ),
                "{error:?}"
            );
        }
        assert_eq!(mirror.frames_used(), 0);
        Ok(())
    });
}

fn refused(mirror: &Mirror<SoftDevice>, addr: VirtAddr, want: FaultError) {
    for policy in [Map, Migrate] {
        let mut lane = lane(mirror, policy);
        assert_eq!(lane.store_u64(addr, 1), Err(AccessError::Fault(want)));
        assert_eq!(lane.fetch_add_u64(addr, 1), Err(AccessError::Fault(want)));
    }
}

#[test]
fn what_the_mapping_forbids_is_denied() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        let mirror = register(&mm, &SoftConfig::ram("soft", 8 * MIB), 0);
        for migrated in [false, true] {
            let memory = Memory::new(8);
            memory.fill();
            let addr = memory.addr(3, 8);
            let denied = FaultError::Denied { addr: addr.page() };
            let mut lane = lane(&mirror, Map);
            lane.store_u64(addr, common::stamp(3, 1)).unwrap();
            if migrated {
                assert!(mirror.migrate(memory.range(), &MigrateOptions::default()).is_complete());
                lane.store_u64(addr, common::stamp(3, 1)).unwrap();
            }
            // No event tells of a change of protection, so whoever makes it says so beforehand.
            mm.invalidate(memory.range(), Cause::Protect);
            memory.protect(libc::PROT_READ);
            assert_eq!(lane.load_u64(addr), Ok(common::stamp(3, 1)));
            refused(&mirror, addr, denied);
            mm.invalidate(memory.range(), Cause::Protect);
            memory.protect(libc::PROT_NONE);
            assert_eq!(lane.load_u64(addr), Err(AccessError::Fault(denied)));
            refused(&mirror, addr, denied);
            memory.protect(libc::PROT_READ | libc::PROT_WRITE);
            memory.check();
        }
        Ok(())
    });
}

#[test]
fn bad_addresses_are_typed_errors() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        let mirror = register(&mm, &SoftConfig::ram("soft", 8 * MIB), 0);
        let memory = Memory::new(8);
        memory.fill();
        let addr = memory.addr(5, 0);
        let mut lane = lane(&mirror, Map);
        assert_eq!(lane.load_u64(addr), Ok(common::stamp(5, 0)));
        let odd = addr.add(4);
        assert_eq!(lane.fetch_add_u64(odd, 1), Err(AccessError::Misaligned { addr: odd, align: 8 }));
        assert_eq!(lane.cas_u32(addr.add(2), 0, 1), Err(AccessError::Misaligned { addr: addr.add(2), align: 4 }));
        let end = VirtAddr::new(uhmm::addr::TASK_SIZE - 4);
        assert_eq!(lane.load_u64(end), Err(AccessError::OutOfSpace { addr: end, len: 8 }));
        let top = VirtAddr::new(u64::MAX);
        assert_eq!(lane.store_u8(top, 1), Err(AccessError::OutOfSpace { addr: top, len: 1 }));
        drop(memory);
        let gone = FaultError::NoVma { addr };
        assert_eq!(lane.load_u64(addr), Err(AccessError::Fault(gone)));
        refused(&mirror, addr, gone);
        // A long access stops where the memory does, and what came before it is done.
        let memory = Memory::at(addr, 1);
        let error = lane.fill(addr.add(8), 7, 2 * PAGE as u64);
        assert_eq!(error, Err(AccessError::Fault(FaultError::NoVma { addr: addr.add(PAGE as u64) })));
        assert_eq!(
            (memory.get(0, 0), memory.get(0, 1), memory.get(0, 511)),
            (0, 0x0707_0707_0707_0707, 0x0707_0707_0707_0707)
        );
        Ok(())
    });
}

#[test]
fn copies_that_fail_lose_nothing() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        let mirror = register(&mm, &SoftConfig::ram("soft", 8 * MIB), 0);
        let device = mirror.device();
        let memory = Memory::new(64);
        memory.fill();
        device.fail_next_copies(1000, DeviceError::NoSpace);
        let report = mirror.migrate(memory.range(), &MigrateOptions::default());
        assert_eq!(report.count(PageOutcome::DeviceFailed), 64, "{:?}", report.summary().collect::<Vec<_>>());
        assert_eq!(mirror.frames_used(), 0);
        memory.check();
        device.fail_next_copies(0, DeviceError::NoSpace);
        assert!(mirror.migrate(memory.range(), &MigrateOptions::default()).is_complete());
        device.fail_next_copies(1, DeviceError::Io(Errno::IO));
        memory.check();
        Ok(())
    });
}

#[test]
fn a_full_disk_loses_nothing() {
    isolated!(|| {
        let Some(dir) = small_file_system() else {
            return Err(uhmm_testkit::Skip("mounting a file system takes privilege".to_owned()));
        };
        let mm = Mm::open().unwrap();
        let mirror = register(&mm, &SoftConfig::file("soft", &dir, 4 * MIB), 0);
        let memory = Memory::new(512);
        memory.fill();
        // Somebody else takes most of the room that there was.
        let hog = std::fs::File::create(dir.join("hog")).unwrap();
        let hog_bytes = vec![1; 7 << 20];
        std::os::unix::fs::FileExt::write_all_at(&hog, &hog_bytes, 0).unwrap();
        let report = mirror.migrate(memory.range(), &MigrateOptions::default());
        let failed = report.count(PageOutcome::DeviceFailed);
        assert!(failed > 0, "{:?}", report.summary().collect::<Vec<_>>());
        memory.check();
        // With room again it goes on.
        hog.set_len(0).unwrap();
        assert!(mirror.migrate(memory.range(), &MigrateOptions::default()).is_complete());
        memory.check();
        Ok(())
    });
}

/// A file system of 8 MiB that only this process sees, over the directory for temporary files: so nothing is left behind.
fn small_file_system() -> Option<std::path::PathBuf> {
    let dir = std::env::temp_dir();
    // SAFETY: changes what this process, a test of its own, sees of the file systems.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return None;
    }
    let private = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: names that end in NUL; changes the own namespace only.
    let alone = unsafe { libc::mount(c"none".as_ptr(), c"/".as_ptr(), std::ptr::null(), private, std::ptr::null()) };
    let target = std::ffi::CString::new(dir.as_os_str().as_encoded_bytes()).ok()?;
    let kind = c"tmpfs".as_ptr();
    // SAFETY: as above.
    let mounted = unsafe { libc::mount(kind, target.as_ptr(), kind, 0, c"size=8m".as_ptr().cast()) };
    (alone == 0 && mounted == 0).then_some(dir)
}

#[test]
fn the_pages_of_a_dead_device_are_named_and_never_zero() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        for config in configs(8 * MIB) {
            let mirror = register(&mm, &config, 0);
            let other = register(&mm, &SoftConfig::ram("other", 8 * MIB), 0);
            let memory = Memory::new(16);
            memory.fill();
            assert!(mirror.migrate(memory.part(4, 8), &MigrateOptions::default()).is_complete());
            mirror.device().kill();
            let addr = memory.addr(5, 8);
            let mut lane = lane(&mirror, Map);
            assert_eq!(lane.load_u64(addr), Err(AccessError::Device { addr, error: DeviceError::Lost }));
            let home = mm.home(memory.range());
            assert_eq!(home.count(PageOutcome::Poisoned), 8, "{:?}", home.summary().collect::<Vec<_>>());
            let poisoned = FaultError::Poisoned { addr: addr.page(), device: mirror.id() };
            let mut other_lane = common::lane(&other, Map);
            assert_eq!(other_lane.load_u64(addr), Err(AccessError::Fault(poisoned)));
            assert_eq!(mm.residency(addr).at, Location::Poisoned(mirror.id()));
            for page in 0..16 {
                let mut buf = [0; 8];
                let copied = access::read(memory.addr(page, 0), &mut buf);
                if (4..12).contains(&page) {
                    assert!(!copied.is_all(), "page {page} reads {buf:?}");
                } else {
                    assert!(copied.is_all(), "page {page}: {copied:?}");
                    assert_eq!(u64::from_ne_bytes(buf), common::stamp(page, 0));
                }
            }
            // A program that gives the pages up can have the memory again.
            drop((lane, other_lane));
            drop(memory);
            assert_eq!(Memory::at(addr.page(), 1).get(0, 1), 0);
            other.close().unwrap();
        }
        Ok(())
    });
}

#[test]
fn a_closure_that_panics_is_an_error_and_nothing_hangs() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        let mirror = register(&mm, &SoftConfig::ram("soft", 8 * MIB), 0);
        let device = mirror.device();
        let memory = Memory::new(16);
        memory.fill();
        for _ in 0..30 {
            let result = device.run(3, |lane, index| {
                for page in 0..16 {
                    lane.load_u64(memory.addr(page, 0)).unwrap();
                    assert!(index != 1 || page < 7, "as ordered");
                }
            });
            assert_eq!(result, Err(RunError::Panicked { index: 1 }));
            // Whoever waits for lanes would hang here.
            let _ = mm.home(memory.range());
            assert!(mirror.migrate(memory.range(), &MigrateOptions::default()).is_complete());
        }
        let sums = device.run(64, |lane, index| lane.load_u64(memory.addr(index % 16, 0)).unwrap()).unwrap();
        assert_eq!(sums.len(), 64);
        assert_eq!(device.run(65, |_, _| ()), Err(RunError::NoLanes { wanted: 65, free: 64 }));
        memory.check();
        Ok(())
    });
}

/// A device that stands still where it is told to.
#[derive(Debug)]
struct Stall {
    gate: AtomicBool,
    out: AtomicBool,
}

impl Stall {
    const fn new() -> Self {
        Self { gate: AtomicBool::new(false), out: AtomicBool::new(false) }
    }

    fn stand(still: &AtomicBool) {
        while still.load(Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Device for Stall {
    fn name(&self) -> &'static str {
        "stall"
    }

    fn memory(&self) -> MemorySpec {
        MemorySpec { frames: 512, kind: MemoryKind::Private, survives_fork: false }
    }

    fn copy_to_device(&self, _: &[CopyOp]) -> Result<(), DeviceError> {
        Self::stand(&self.out);
        Err(DeviceError::NoSpace)
    }

    fn copy_to_host(&self, _: &[CopyOp]) -> Result<(), DeviceError> {
        Err(DeviceError::NoSpace)
    }

    fn zero(&self, _: FrameRun) -> Result<(), DeviceError> {
        Err(DeviceError::NoSpace)
    }

    fn flush(&self, _: &Invalidation) {}

    fn close_gate(&self) {
        Self::stand(&self.gate);
    }
}

#[test]
fn an_access_ends_within_its_budget() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        let budget = Duration::from_millis(200);
        let config = SoftConfig { access_budget: budget, ..SoftConfig::ram("soft", 4 * MIB) };
        let mirror = register(&mm, &config, 0);
        let stall = mm.register(Stall::new()).unwrap();
        let (memory, other) = (Memory::new(64), Memory::new(64));
        memory.fill();
        other.fill();
        let page = memory.addr(3, 0);
        let mut lane = lane(&mirror, Map);
        let mut load = || {
            let start = Instant::now();
            (lane.load_u64(page), start.elapsed())
        };
        // Another device keeps the page on its way.
        stall.device().out.store(true, Relaxed);
        std::thread::scope(|s| {
            s.spawn(|| stall.migrate(memory.part(0, 8), &MigrateOptions::default()));
            eventually("the page is held", || mm.look(memory.part(3, 1)) == Whereabouts::Moving);
            let (answer, took) = load();
            assert!(matches!(answer, Err(AccessError::Contended { .. })), "{answer:?}");
            assert!(took > budget && took < 100 * budget, "{took:?}");
            stall.device().out.store(false, Relaxed);
        });
        assert!(load().0.is_ok());
        // Another device keeps the engine from opening the gates.
        assert!(mirror.migrate(other.range(), &MigrateOptions::default()).is_complete());
        stall.device().gate.store(true, Relaxed);
        std::thread::scope(|s| {
            s.spawn(|| drop(other));
            eventually(
                "the lane is kept out",
                || matches!(load(), (Err(AccessError::KeptOut { .. }), took) if took > budget),
            );
            stall.device().gate.store(false, Relaxed);
        });
        assert!(load().0.is_ok());
        memory.check();
        Ok(())
    });
}

#[test]
fn a_lane_of_a_device_that_was_removed_says_so() {
    isolated!(|| {
        let mm = Mm::open().unwrap();
        let mirror = register(&mm, &SoftConfig::ram("soft", 8 * MIB), 1);
        let device = mirror.device();
        let memory = Memory::new(16);
        memory.fill();
        let mut lane = lane(&mirror, Migrate);
        lane.load_u64(memory.addr(0, 0)).unwrap();
        mirror.close().unwrap();
        assert_eq!(lane.load_u64(memory.addr(0, 0)), Err(AccessError::Fault(FaultError::NoDevice)));
        memory.check();
        assert!(device.stop(Duration::from_secs(10)));
        Ok(())
    });
}
