//! Device memory that the CPU can address: whose the bytes are, where they are, and what becomes of them.
//
// UNSAFETY: the tests make, change and watch memory by raw system calls and pointers.

#![allow(unsafe_code, reason = "tests make the memory that they then watch")]

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::os::unix::fs::FileExt;

use uhmm::{
    DeviceFaultPolicy::{Map, Migrate},
    MigrateOptions, Mirror, Mm, PageOutcome,
    device::DevPfn,
    device_table::Access,
    mm::Location,
    trace::Counter,
};
use uhmm_testkit::{Skip, isolated};

use crate::common::{
    Plain, eventually,
    kit::{
        Area, BLOCK, End, PAGE, RW, Random, SHAPES, Shape, Via, each_way, fork_child, has_fork_events, has_move, open,
        peek, poke, raw_fork_child, send, summary, unmap, virt, wait_for,
    },
};

/// An address space, with a coherent device of so many frames.
fn world(frames: u64) -> Result<(Mm, Mirror<Plain>), Skip> {
    let mm = open()?;
    if !has_move() {
        return Err(Skip("without UFFDIO_MOVE coherent memory is used like private".to_owned()));
    }
    let mirror = mm.register(Plain::coherent(frames * PAGE as u64)).expect("room for a device");
    Ok((mm, mirror))
}

fn finish(mm: Mm, mirrors: impl IntoIterator<Item = Mirror<Plain>>) {
    for mirror in mirrors {
        mirror.close().unwrap();
    }
    assert_eq!(mm.pages_away(), 0);
    mm.close().unwrap();
}

/// The frame of a page that is mapped from the device.
#[track_caller]
fn frame(mirror: &Mirror<Plain>, addr: usize) -> DevPfn {
    match mirror.mm().residency(virt(addr)).at {
        Location::Coherent(id, pfn) if id == mirror.id() => pfn,
        at => panic!("{addr:#x} is {at:?}"),
    }
}

/// Every page is mapped from the device.
#[track_caller]
fn expect_mapped(mirror: &Mirror<Plain>, area: &Area) {
    for n in 0..area.pages {
        frame(mirror, area.page(n));
    }
}

#[track_caller]
fn expect_at(mm: &Mm, area: &Area, at: Location) {
    (0..area.pages).for_each(|n| assert_eq!(mm.residency(virt(area.page(n))).at, at, "page {n}"));
}

/// The frames in use come to be so many: the thread that raised an event goes on before the books are done.
fn frames_become(mirror: &Mirror<Plain>, frames: usize) {
    eventually(&format!("{frames} frames in use"), || mirror.frames_used() as usize == frames);
}

/// The CPU faults that the engine has had to do with.
fn faults(mm: &Mm) -> u64 {
    use Counter::{FaultsHome, FaultsMapped, FaultsStale, FaultsWaited, FaultsZero};
    [FaultsHome, FaultsMapped, FaultsStale, FaultsWaited, FaultsZero]
        .map(|counter| mm.stats().get(counter))
        .iter()
        .sum()
}

/// The physical page at an address; `None` where there is none, or where it is not told.
fn physical(addr: usize) -> Option<u64> {
    let mut word = [0; 8];
    let map = std::fs::File::open("/proc/self/pagemap").unwrap();
    map.read_exact_at(&mut word, (addr / PAGE * 8) as u64).unwrap();
    let word = u64::from_ne_bytes(word);
    Some(word & ((1 << 55) - 1)).filter(|&page| word >> 63 != 0 && page != 0)
}

#[test]
fn the_cpu_uses_the_frames_own_memory_without_a_fault() {
    isolated!(|| {
        let (mm, mirror) = world(2048)?;
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            send(&mirror, &area);
            expect_mapped(&mirror, &area);
            let before = faults(&mm);
            area.check(1);
            area.fill(2);
            area.check(2);
            assert_eq!(faults(&mm), before, "a touch raised a fault");
            expect_mapped(&mirror, &area);
            assert_eq!(mirror.frames_used(), 512);
            // A device that wants it for itself moves it into its frame; a touch moves it back. It is the same page.
            let (addr, pfn) = (area.page(77), frame(&mirror, area.page(77)));
            let page = physical(addr);
            let pte = mirror.port().unwrap().fault(virt(addr), Access::Atomic, Map).unwrap();
            assert!(pte.pfn() == Some(pfn) && pte.allows(Access::Atomic), "{pte:?}");
            assert_eq!(mm.residency(virt(addr)).at, Location::Device(mirror.id(), pfn));
            let bytes = mirror.device().frame(pfn);
            assert_eq!(physical(usize::try_from(bytes.addr().get()).unwrap()), page);
            let old = bytes.rmw_u64(8, uhmm_sys::mem::AtomicOp::Add, 5);
            assert_eq!(peek(addr + 8), old + 5);
            eventually("it is mapped by the books", || matches!(mm.residency(virt(addr)).at, Location::Coherent(..)));
            assert_eq!((frame(&mirror, addr), physical(addr)), (pfn, page));
            assert!(mirror.port().unwrap().table().lookup(virt(addr)).is_none(), "the entry outlived the touch");
            poke(addr + 8, old);
            // Home is another page.
            assert!(mm.home(area.range()).is_complete());
            expect_at(&mm, &area, Location::Cpu);
            if page.is_some() {
                assert_ne!(physical(addr), page, "the device's page came home with the bytes");
            }
            frames_become(&mirror, 0);
            area.check(2);
            area.unmap();
        }
        finish(mm, [mirror]);
        Ok(())
    });
}

#[test]
fn a_mapped_page_is_everybodys() {
    isolated!(|| {
        let (mm, a) = world(1024)?;
        let b = mm.register(Plain::coherent(4 << 20)).unwrap();
        let c = mm.register(Plain::new(4 << 20)).unwrap();
        let area = Area::filled(Shape::Small, 1, 1);
        send(&a, &area);
        let pfn = frame(&a, area.page(3));
        let report = a.snapshot(area.range()).unwrap()[3];
        assert!(report.is_valid() && report.coherent_device() == Some(a.id()) && report.local_frame() == Some(pfn));
        for other in [&b, &c] {
            let report = other.snapshot(area.range()).unwrap()[3];
            assert!(report.is_valid() && report.coherent_device() == Some(a.id()), "{report:?}");
            assert_eq!(report.local_frame(), None);
            let report = other.range_fault(area.range(), Access::Write).unwrap()[3];
            assert!(report.is_writable() && report.coherent_device() == Some(a.id()), "{report:?}");
            for policy in [Map, Migrate] {
                let pte = other.port().unwrap().fault(virt(area.page(3)), Access::Write, policy).unwrap();
                assert!(pte.is_host(), "{pte:?}");
            }
            assert_eq!(frame(&a, area.page(3)), pfn, "it moved");
        }
        // In its frame, and asked for by another device: mapped, not moved home.
        a.port().unwrap().fault(virt(area.page(3)), Access::Atomic, Map).unwrap();
        assert!(b.port().unwrap().fault(virt(area.page(3)), Access::Read, Map).unwrap().is_host());
        assert_eq!(frame(&a, area.page(3)), pfn);
        // Another device may have it for itself, after it came home.
        assert!(b.port().unwrap().fault(virt(area.page(3)), Access::Atomic, Map).unwrap().is_exclusive());
        assert_eq!(a.frames_used(), 511);
        area.check(1);
        // From device to device, coherent or not.
        eventually("it is home by the books", || mm.residency(virt(area.page(3))).at == Location::Cpu);
        for (from, to) in [(&a, &b), (&b, &c), (&c, &a), (&a, &c), (&c, &b), (&b, &a)] {
            send(to, &area);
            assert_eq!((from.frames_used(), to.frames_used()), (0, 512));
        }
        expect_mapped(&a, &area);
        let stay = MigrateOptions { from_other_devices: false, ..MigrateOptions::default() };
        assert_eq!(b.migrate(area.range(), &stay).count(PageOutcome::OtherDevice), 512);
        area.check(1);
        finish(mm, [a, b, c]);
        Ok(())
    });
}

#[test]
fn pages_that_the_kernel_may_refer_to_are_not_filled_anew() {
    isolated!(|| {
        let (mm, mirror) = world(512)?;
        mm.never_recycle();
        let area = Area::filled(Shape::Small, 1, 1);
        send(&mirror, &area);
        let mut pipe = [0; 2];
        // SAFETY: writes two descriptors to a local.
        assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
        // The pipe refers to the page that the device has.
        let part = libc::iovec { iov_base: common::kit::pointer(area.page(5)), iov_len: PAGE };
        // SAFETY: reads one descriptor, a local; the page stays the test's.
        let spliced = unsafe { libc::vmsplice(pipe[1], &raw const part, 1, 0) };
        assert_eq!(spliced, 4096, "{}", std::io::Error::last_os_error());
        assert!(mm.home(area.range()).is_complete());
        let other = Area::filled(Shape::Small, 1, 2);
        send(&mirror, &other);
        other.check(2);
        let copy = common::kit::map(0, PAGE, RW, 0);
        // SAFETY: the kernel writes to a page of the test's.
        assert_eq!(unsafe { libc::read(pipe[0], common::kit::pointer(copy), PAGE) }, 4096);
        common::kit::expect_page(copy, 1, 5);
        area.check(1);
        finish(mm, [mirror]);
        Ok(())
    });
}

#[test]
fn without_move_it_is_used_like_private_memory() {
    isolated!(|| {
        let mm = open()?;
        if has_move() {
            return Err(Skip("UFFDIO_MOVE is there (UHMM_MASK=move takes it away)".to_owned()));
        }
        let mirror = mm.register(Plain::coherent(4 << 20)).unwrap();
        let area = Area::filled(Shape::Small, 1, 1);
        send(&mirror, &area);
        assert!(matches!(mm.residency(virt(area.page(3))).at, Location::Device(..)));
        area.check(1);
        eventually("it is home by the books", || mm.residency(virt(area.page(3))).at == Location::Cpu);
        finish(mm, [mirror]);
        Ok(())
    });
}

/// Fills the whole device, and looks whether every frame is as good as before.
fn expect_frames_usable(mirror: &Mirror<Plain>, frames: usize) {
    frames_become(mirror, 0);
    let all = Area::filled(Shape::Small, frames / 512, 99);
    send(mirror, &all);
    expect_mapped(mirror, &all);
    all.check(99);
    all.unmap();
    frames_become(mirror, 0);
}

#[test]
fn what_the_program_drops_frees_its_frames() {
    isolated!(|| {
        let (mm, mirror) = world(1024)?;
        each_way(|shape, via| {
            let area = Area::filled(shape, 1, 1);
            send(&mirror, &area);
            // One of those to be dropped is in its frame.
            mirror.port().unwrap().fault(virt(area.page(110)), Access::Atomic, Map).unwrap();
            assert_eq!(via.munmap(area.page(100), 20 * PAGE), 0);
            frames_become(&mirror, 492);
            for (first, advice) in [(200, libc::MADV_DONTNEED), (300, libc::MADV_FREE)] {
                mirror.port().unwrap().fault(virt(area.page(first + 3)), Access::Atomic, Map).unwrap();
                assert_eq!(via.madvise(area.page(first), 20 * PAGE, advice), 0);
                let part = area.part(first..first + 20);
                if advice == libc::MADV_DONTNEED {
                    part.check_zero();
                }
                eventually("they are dropped by the books", || {
                    (0..20).all(|n| mm.residency(virt(part.page(n))).at == Location::Cpu)
                });
                part.fill(5);
                part.check(5);
            }
            frames_become(&mirror, 452);
            area.part(0..100).check(1);
            area.part(320..512).check_from(1, 320);
            assert_eq!(via.munmap(area.start, area.len()), 0);
            expect_frames_usable(&mirror, 1024);
        });
        finish(mm, [mirror]);
        Ok(())
    });
}

#[test]
fn pages_stay_mapped_when_their_mapping_moves() {
    isolated!(|| {
        let (mm, mirror) = world(1024)?;
        each_way(|shape, via| {
            let area = Area::filled(shape, 1, 1);
            send(&mirror, &area);
            let (first, inside) = (frame(&mirror, area.start), frame(&mirror, area.page(9)));
            mirror.port().unwrap().fault(virt(area.page(9)), Access::Atomic, Map).unwrap();
            let to = via.mremap(area.start, area.len(), area.len() + BLOCK, libc::MREMAP_MAYMOVE, 0).unwrap();
            let moved = Area { start: to, pages: 512 };
            moved.check(1);
            eventually("it is mapped by the books", || {
                matches!(mm.residency(virt(moved.page(9))).at, Location::Coherent(..))
            });
            assert_eq!((frame(&mirror, to), frame(&mirror, moved.page(9))), (first, inside));
            assert_eq!(mirror.frames_used(), 512);
            // Eviction goes by notes of where pages are.
            assert_eq!(mirror.evict(u32::MAX), 0);
            assert_eq!(mirror.frames_used(), 0);
            moved.check(1);
            unmap(to, area.len() + BLOCK);
            expect_frames_usable(&mirror, 1024);
        });
        finish(mm, [mirror]);
        Ok(())
    });
}

#[test]
fn read_only_pages_come_home_too() {
    isolated!(|| {
        let (mm, mirror) = world(1024)?;
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            send(&mirror, &area);
            mirror.port().unwrap().fault(virt(area.page(9)), Access::Atomic, Map).unwrap();
            assert_eq!(Via::Libc.mprotect(area.start, area.len(), libc::PROT_READ), 0);
            assert_eq!(wait_for(fork_child(|| poke(area.start, 1))), End::Signal(libc::SIGSEGV));
            area.check(1);
            // They went home for the fork; memory that is read-only already is in its frames, and comes home at a touch.
            send_quietly(&mirror, &area);
            area.check(1);
            assert!(mm.home(area.range()).is_complete());
            assert_eq!(mirror.frames_used(), 0);
            area.check(1);
            assert_eq!(Via::Libc.mprotect(area.start, area.len(), RW), 0);
            send(&mirror, &area);
            assert_eq!(Via::Libc.mprotect(area.start, area.len(), libc::PROT_NONE), 0);
            assert!(mm.home(area.range()).is_complete());
            assert_eq!(Via::Libc.mprotect(area.start, area.len(), RW), 0);
            area.fill(2);
            area.check(2);
            area.unmap();
            expect_frames_usable(&mirror, 1024);
        }
        finish(mm, [mirror]);
        Ok(())
    });
}

/// Moves all of `area` to the device, or says what did not go.
fn send_quietly(mirror: &Mirror<Plain>, area: &Area) {
    let report = mirror.migrate(area.range(), &MigrateOptions::default());
    assert!(report.is_complete(), "{:?}", summary(&report));
}

#[test]
fn untouched_memory_is_mapped_as_zeros() {
    isolated!(|| {
        let (mm, mirror) = world(1024)?;
        for _ in 0..2 {
            let area = Area::new(Shape::Small, 1);
            send(&mirror, &area);
            expect_mapped(&mirror, &area);
            area.check_zero();
            area.fill(3);
            area.check(3);
            area.unmap();
            frames_become(&mirror, 0);
        }
        finish(mm, [mirror]);
        Ok(())
    });
}

#[test]
fn a_full_device_takes_what_fits_and_gives_all_back_when_it_goes() {
    isolated!(|| {
        let (mm, mirror) = world(1024)?;
        let area = Area::filled(Shape::Small, 3, 1);
        let report = mirror.migrate(area.range(), &MigrateOptions::default());
        assert_eq!(report.count(PageOutcome::Moved), 1024, "{:?}", summary(&report));
        assert_eq!(report.count(PageOutcome::Full), 512, "{:?}", summary(&report));
        area.check(1);
        // By whole blocks.
        assert_eq!(mirror.evict(100), 0);
        assert_eq!(mirror.frames_used(), 512);
        area.check(1);
        let id = mirror.id();
        mirror.close().unwrap();
        assert_eq!(mm.pages_away(), 0);
        expect_at(&mm, &area, Location::Cpu);
        area.check(1);
        let mirror = mm.register(Plain::coherent(4 << 20)).unwrap();
        assert_eq!(mirror.id(), id);
        send(&mirror, &area.part(0..512));
        area.check(1);
        finish(mm, [mirror]);
        Ok(())
    });
}

#[test]
fn a_forked_child_has_the_bytes() {
    isolated!(|| {
        let (mm, mirror) = world(1024)?;
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            send(&mirror, &area);
            mirror.port().unwrap().fault(virt(area.page(9)), Access::Atomic, Map).unwrap();
            let child = fork_child(|| {
                area.check(1);
                area.fill(7);
                area.check(7);
            });
            area.check(1);
            area.fill(2);
            assert_eq!(wait_for(child), End::Exit(0));
            area.check(2);
            frames_become(&mirror, 0);
            area.unmap();
        }
        finish(mm, [mirror]);
        Ok(())
    });
}

#[test]
fn a_child_of_a_bare_fork_shares_the_pages_until_somebody_writes() {
    isolated!(|| {
        let (mm, mirror) = world(1024)?;
        if !has_fork_events() {
            return Err(Skip("forks by a bare system call raise no event here (CAP_SYS_PTRACE)".to_owned()));
        }
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            send(&mirror, &area);
            mirror.port().unwrap().fault(virt(area.page(9)), Access::Atomic, Map).unwrap();
            let child = raw_fork_child(|| {
                std::thread::sleep(std::time::Duration::from_millis(300));
                area.check(1);
                area.fill(7);
                area.check(7);
            });
            // While the child has them too: written, taken by the device, sent home, and some left to the end.
            area.part(0..100).fill(2);
            mirror.port().unwrap().fault(virt(area.page(150)), Access::Atomic, Map).unwrap();
            area.check_part(150..151, 1);
            assert!(mm.home(area.part(200..300).range()).is_complete());
            assert_eq!(wait_for(child), End::Exit(0));
            area.part(0..100).check(2);
            area.check_part(100..512, 1);
            assert!(mm.home(area.range()).is_complete());
            area.check_part(100..512, 1);
            assert_eq!(mirror.frames_used(), 0);
            area.unmap();
        }
        finish(mm, [mirror]);
        Ok(())
    });
}

trait CheckPart {
    fn check_part(&self, pages: std::ops::Range<usize>, tag: u64);
}

impl CheckPart for Area {
    /// Pages of an area that was filled as a whole.
    fn check_part(&self, pages: std::ops::Range<usize>, tag: u64) {
        self.part(pages.clone()).check_from(tag, pages.start);
    }
}

#[test]
fn everything_at_once_with_a_touching_thread() {
    isolated!(|| {
        let (mm, mirror) = world(1024)?;
        let area = Area::filled(Shape::Small, 1, 1);
        send(&mirror, &area);
        // What goes on at random, with one page touched by the CPU and the device all the time.
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                let mut n = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    n = (n + 61) % 512;
                    common::kit::expect_page(area.page(n), 1, n);
                }
            });
            let mut random = Random::new(7);
            for _ in 0..2000 {
                let n = random.below(512);
                let part = area.part(n..512.min(n + 20));
                match random.below(4) {
                    0 => drop(mm.home(part.range())),
                    1 => drop(mirror.migrate(part.range(), &MigrateOptions::default())),
                    2 => drop(mirror.exclusive(part.range())),
                    _ => drop(mirror.port().unwrap().fault(virt(area.page(n)), Access::Atomic, Map)),
                }
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        area.check(1);
        finish(mm, [mirror]);
        Ok(())
    });
}
