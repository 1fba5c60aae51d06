//! What kinds of memory move, and what is said of the ones that stay. Whatever the answer, the bytes are the same.
//
// UNSAFETY: the tests make, change and watch memory by raw system calls and pointers.

#![allow(unsafe_code, reason = "tests make the memory that they then watch")]

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::{
    collections::BTreeMap,
    fs::File,
    hint::black_box,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
    sync::atomic::{AtomicU64, Ordering::SeqCst},
};

use uhmm::{
    MigrateOptions, PageOutcome,
    addr::{PAGE_SIZE, PageRange, VirtAddr},
    mm::Location,
};
use uhmm_sys::{
    arena,
    uffd::{Features, RegisterMode, Uffd},
};
use uhmm_testkit::{Skip, isolated};

use crate::common::{
    eventually,
    kit::{
        Area, BLOCK, End, PAGE, RW, SHAPES, Shape, Via, World, arg, errno, expect_page, fork_child, has_move,
        locked_memory_moves, map, peek, pointer, poke, summary, syscall, virt, wait_for, write_page,
    },
};

/// Every page of `area` had this outcome.
#[track_caller]
fn expect_all(world: &World, area: &Area, outcome: PageOutcome) {
    let report = world.migrate(area);
    assert_eq!(report.count(outcome), area.pages, "{:?}", summary(&report));
    assert_eq!(world.mm.pages_away(), if outcome == PageOutcome::Moved { area.pages } else { 0 });
}

/// Pages of a private mapping of a file, none of which was written.
fn pages_of_a_file() -> Area {
    let exe = File::open("/proc/self/exe").unwrap();
    let start = Via::Libc.mmap(0, 32 * PAGE, RW, libc::MAP_PRIVATE, exe.as_raw_fd()).unwrap();
    Area { start, pages: 32 }
}

#[test]
fn private_file_pages_stay() {
    isolated!(|| {
        let world = World::new(16)?;
        let area = pages_of_a_file();
        let magic = peek(area.start);
        expect_all(&world, &area, PageOutcome::FileBacked);
        // Also those that the process has written and so made its own.
        poke(area.page(3), 77);
        expect_all(&world, &area, PageOutcome::FileBacked);
        assert_eq!((peek(area.start), peek(area.page(3))), (magic, 77));
        world.finish();
        Ok(())
    });
}

#[test]
fn written_pages_of_a_private_file_can_be_made_to_move() {
    // Written, and in a page of a file mapping that the engine's own code is in.
    static OWN: AtomicU64 = AtomicU64::new(1);
    isolated!(|| {
        let world = World::new(16)?;
        let area = pages_of_a_file();
        let magic = peek(area.start);
        let written = [3, 4, 9];
        written.iter().for_each(|&n| write_page(area.page(n), 1, n));
        assert_eq!(world.mm.make_anonymous(area.range()), Ok(written.len()));
        let report = world.migrate(&area);
        assert_eq!(report.count(PageOutcome::Moved), written.len(), "{:?}", summary(&report));
        assert_eq!(report.count(PageOutcome::FileBacked), area.pages - written.len(), "{:?}", summary(&report));
        written.iter().for_each(|&n| expect_page(area.page(n), 1, n));
        assert_eq!(peek(area.start), magic);
        OWN.store(2, SeqCst);
        assert_eq!(world.mm.make_anonymous(PageRange::page_of(VirtAddr::of(&raw const OWN))), Ok(0));
        world.finish();
        Ok(())
    });
}

#[test]
fn shared_memory_stays() {
    isolated!(|| {
        let world = World::new(16)?;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let area = Area { start: Via::Libc.mmap(0, 64 * PAGE, RW, flags, -1).unwrap(), pages: 64 };
        area.fill(1);
        expect_all(&world, &area, PageOutcome::SharedMapping);
        area.check(1);
        world.finish();
        Ok(())
    });
}

#[test]
fn hugetlb_pages_stay() {
    isolated!(|| {
        let world = World::new(16)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
        let start = match Via::Libc.mmap(0, BLOCK, RW, flags, -1) {
            Ok(start) => start,
            Err(_) => return Err(Skip("no hugetlb pages are configured (vm.nr_hugepages)".to_owned())),
        };
        let area = Area { start, pages: 512 };
        area.fill(1);
        expect_all(&world, &area, PageOutcome::Hugetlb);
        area.check(1);
        world.finish();
        Ok(())
    });
}

/// The mappings whose name in `/proc/self/maps` ends with `name`.
fn mappings(name: &str) -> Vec<Area> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let parse = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        let [start, end] = [start, end].map(|hex| usize::from_str_radix(hex, 16).unwrap());
        line.ends_with(name).then_some(Area { start, pages: (end - start) / PAGE })
    };
    maps.lines().filter_map(parse).collect()
}

#[test]
fn mappings_of_the_kernel_stay() {
    isolated!(|| {
        let world = World::new(16)?;
        for name in ["[vdso]", "[vvar]"] {
            let areas = mappings(name);
            assert!(!areas.is_empty() || name != "[vdso]");
            for area in areas {
                expect_all(&world, &area, PageOutcome::Special);
            }
        }
        // The clock is read through both.
        let _ = std::time::Instant::now();
        world.finish();
        Ok(())
    });
}

#[test]
fn the_heap_and_stacks_move_under_the_running_program() {
    isolated!(|| {
        let world = World::with_kernel_faults(64)?;
        let sum = |map: &BTreeMap<u64, String>| map.iter().map(|(n, text)| n + text.len() as u64).sum::<u64>();
        let map: BTreeMap<u64, String> = (0..20_000).map(|n| (n, format!("value {n}"))).collect();
        let before = sum(&map);
        let mut here = 5u64;
        let mut moved = 0;
        for _ in 0..20 {
            // The main thread's, and this thread's own, with what this loop stands on.
            let own = black_box(&raw mut here).expose_provenance() / PAGE * PAGE;
            let own = Area { start: own - 4 * PAGE, pages: 8 };
            for area in mappings("[heap]").into_iter().chain(mappings("[stack]")).chain([own]) {
                moved += world.migrate(&area).count(PageOutcome::Moved);
            }
            here = black_box(here) + 1;
            assert_eq!(sum(&map), before);
        }
        assert_eq!(here, 25);
        assert!(moved >= 20, "only {moved} pages could move in 20 rounds");
        drop(map);
        world.finish();
        Ok(())
    });
}

#[test]
fn read_only_memory_moves_with_data_and_without() {
    isolated!(|| {
        let world = World::new(16)?;
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            assert_eq!(Via::Libc.mprotect(area.start, area.len(), libc::PROT_READ), 0);
            world.send(&area);
            area.check(1);
            world.send(&area);
            // It is still read-only.
            assert_eq!(wait_for(fork_child(|| poke(area.start, 1))), End::Signal(libc::SIGSEGV));
            area.check(1);
            let zeros = Area::new(shape, 1);
            // The kernel's page of zeros, read only.
            zeros.check_zero();
            assert_eq!(Via::Libc.mprotect(zeros.start, zeros.len(), libc::PROT_READ), 0);
            world.send(&zeros);
            zeros.check_zero();
            assert_eq!(Via::Libc.mprotect(zeros.start, zeros.len(), RW), 0);
            zeros.fill(3);
            zeros.check(3);
            area.unmap();
            zeros.unmap();
        }
        world.finish();
        Ok(())
    });
}

#[test]
fn untouched_memory_and_pages_of_zeros_move_as_zeros() {
    isolated!(|| {
        let world = World::new(16)?;
        for shape in SHAPES {
            for touched in [false, true] {
                let area = Area::new(shape, 1);
                if touched {
                    area.check_zero();
                }
                world.send(&area);
                area.part(0..100).check_zero();
                area.fill(9);
                area.check(9);
                area.unmap();
            }
            let holes = Area::new(shape, 1);
            let options = MigrateOptions { holes: false, ..MigrateOptions::default() };
            let report = world.mirror.migrate(holes.range(), &options);
            assert_eq!(report.count(PageOutcome::Hole), 512, "{:?}", summary(&report));
            holes.check_zero();
            holes.unmap();
        }
        world.finish();
        Ok(())
    });
}

#[test]
fn executable_memory_moves() {
    isolated!(|| {
        let world = World::new(16)?;
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            assert_eq!(Via::Libc.mprotect(area.start, area.len(), RW | libc::PROT_EXEC), 0);
            // mov eax, 42; ret
            poke(area.page(7), 0x0000_c300_0000_2ab8);
            world.send(&area);
            // SAFETY: the bytes written there are a function of this type.
            let f = unsafe { std::mem::transmute::<*mut u8, extern "C" fn() -> i32>(pointer(area.page(7))) };
            if cfg!(target_arch = "x86_64") {
                assert_eq!(f(), 42);
            }
            area.part(0..7).check(1);
            area.part(8..512).check_from(1, 8);
            area.unmap();
        }
        world.finish();
        Ok(())
    });
}

#[test]
fn memory_without_access_stays() {
    isolated!(|| {
        let world = World::new(16)?;
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            assert_eq!(Via::Libc.mprotect(area.start, area.len(), libc::PROT_NONE), 0);
            expect_all(&world, &area, PageOutcome::NoAccess);
            assert_eq!(Via::Libc.mprotect(area.start, area.len(), RW), 0);
            area.check(1);
            area.unmap();
        }
        world.finish();
        Ok(())
    });
}

/// Anonymous memory of this process in RAM, in MiB.
fn rss_mib() -> u64 {
    uhmm_sys::maps::anon_rss_bytes().unwrap() >> 20
}

#[test]
fn everything_may_be_locked_before_the_engine_starts() {
    isolated!(|| {
        locked_memory_moves()?;
        // SAFETY: changes no bytes.
        if unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) } != 0 {
            return Err(Skip(format!("mlockall: {}", std::io::Error::last_os_error())));
        }
        let before = rss_mib();
        let world = World::with_kernel_faults(16)?;
        let grown = rss_mib() - before;
        assert!(grown < 256, "the engine's empty tables were locked into RAM: {grown} MiB");
        let area = Area::filled(Shape::Small, 2, 1);
        world.send(&area);
        area.check(1);
        area.fill(2);
        world.send(&area);
        area.check(2);
        world.finish();
        Ok(())
    });
}

#[test]
fn everything_may_be_locked_while_pages_are_away() {
    isolated!(|| {
        locked_memory_moves()?;
        let world = World::with_kernel_faults(16)?;
        let area = Area::filled(Shape::Small, 2, 1);
        world.send(&area);
        // SAFETY: changes no bytes.
        if unsafe { libc::mlockall(libc::MCL_CURRENT) } != 0 {
            return Err(Skip(format!("mlockall: {}", std::io::Error::last_os_error())));
        }
        area.check(1);
        area.fill(2);
        world.send(&area);
        area.check(2);
        // SAFETY: changes no bytes.
        assert_eq!(unsafe { libc::munlockall() }, 0);
        area.fill(3);
        world.send(&area);
        area.check(3);
        world.finish();
        Ok(())
    });
}

#[test]
fn one_request_may_cover_many_kinds() {
    isolated!(|| {
        let world = World::new(32)?;
        let area = Area::filled(Shape::Small, 4, 1);
        let fixed = |part: &Area, prot: i32, flags: i32, fd: i32| {
            assert_eq!(Via::Libc.mmap(part.start, part.len(), prot, flags | libc::MAP_FIXED, fd), Ok(part.start));
        };
        let exe = File::open("/proc/self/exe").unwrap();
        let (file, shared, none, gap, read_only) =
            (area.part(10..20), area.part(500..530), area.part(600..700), area.part(900..1100), area.part(1500..1600));
        fixed(&file, RW, libc::MAP_PRIVATE, exe.as_raw_fd());
        fixed(&shared, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
        assert_eq!(Via::Libc.mprotect(none.start, none.len(), libc::PROT_NONE), 0);
        gap.unmap();
        assert_eq!(Via::Libc.mprotect(read_only.start, read_only.len(), libc::PROT_READ), 0);
        let report = world.migrate(&area);
        let mut wanted = BTreeMap::new();
        let mut want = |outcome: PageOutcome, pages: usize| wanted.insert(outcome.as_str(), pages);
        want(PageOutcome::FileBacked, file.pages);
        want(PageOutcome::SharedMapping, shared.pages);
        want(PageOutcome::NoAccess, none.pages);
        want(PageOutcome::Unmapped, gap.pages);
        let rest = 2048 - file.pages - shared.pages - none.pages - gap.pages;
        want(PageOutcome::Moved, rest);
        assert_eq!(summary(&report).into_iter().map(|(o, n)| (o.as_str(), n)).collect::<BTreeMap<_, _>>(), wanted);
        // Each outcome stands at its page.
        let outcomes: Vec<_> = report.outcomes().collect();
        assert_eq!(outcomes[9], PageOutcome::Moved);
        assert_eq!(outcomes[10], PageOutcome::FileBacked);
        assert_eq!(outcomes[529], PageOutcome::SharedMapping);
        assert_eq!(outcomes[1099], PageOutcome::Unmapped);
        assert_eq!(outcomes[1550], PageOutcome::Moved);
        assert_eq!(Via::Libc.mprotect(none.start, none.len(), RW), 0);
        for pages in [0..10, 20..500, 530..900, 1100..2048] {
            area.part(pages.clone()).check_from(1, pages.start);
        }
        world.finish();
        Ok(())
    });
}

#[test]
fn all_or_nothing_leaves_a_mixed_range_alone() {
    isolated!(|| {
        let world = World::new(32)?;
        let area = Area::filled(Shape::Small, 2, 1);
        area.part(1000..1010).unmap();
        let before = area.part(0..100);
        world.send(&before);
        let options = MigrateOptions { all_or_nothing: true, ..MigrateOptions::default() };
        let report = world.mirror.migrate(area.range(), &options);
        assert_eq!(report.count(PageOutcome::Unmapped), 10);
        assert_eq!(report.count(PageOutcome::Already), 100, "{:?}", summary(&report));
        assert_eq!(report.count(PageOutcome::RolledBack), 914, "{:?}", summary(&report));
        world.expect_away(&area, 100);
        area.part(0..1000).check(1);
        area.part(1010..1024).check_from(1, 1010);
        world.finish();
        Ok(())
    });
}

#[test]
fn the_whole_address_space_is_a_range() {
    isolated!(|| {
        let world = World::with_kernel_faults(256)?;
        let area = Area::filled(Shape::Small, 2, 1);
        let whole = PageRange::new(VirtAddr::new(0), uhmm::addr::TASK_SIZE).unwrap();
        let report = world.mirror.migrate(whole, &MigrateOptions::default());
        assert_eq!(report.runs().iter().map(|(_, pages)| pages).sum::<usize>(), whole.pages());
        assert!(report.count(PageOutcome::Moved) >= area.pages, "{:?}", summary(&report));
        assert!(report.count(PageOutcome::EngineOwned) > 0);
        assert!(report.count(PageOutcome::Unmapped) > whole.pages() / 2);
        area.check(1);
        assert!(world.mirror.snapshot(whole).is_err(), "there is no memory for that answer");
        let home = world.mm.home(whole);
        assert!(home.is_complete(), "{:?}", summary(&home));
        assert_eq!(world.mm.pages_away(), 0);
        world.finish();
        Ok(())
    });
}

#[test]
fn memory_of_another_userfaultfd_is_mirrored_but_never_moves() {
    isolated!(|| {
        let world = World::new(16)?;
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            let theirs = Uffd::open(Features::empty()).expect("the engine has one too");
            let part = area.part(100..200);
            theirs.register(part.range(), RegisterMode::MISSING).unwrap();
            let report = world.migrate(&area);
            assert_eq!(report.count(PageOutcome::ForeignUserfaultfd), part.pages, "{:?}", summary(&report));
            assert_eq!(report.count(PageOutcome::Moved), 512 - part.pages, "{:?}", summary(&report));
            assert!(world.mirror.snapshot(part.range()).unwrap().iter().all(|page| page.is_valid()));
            area.check(1);
            theirs.unregister(part.range()).unwrap();
            world.send(&area);
            // And the other way: where pages are away the range is ours.
            assert!(theirs.register(part.range(), RegisterMode::MISSING).is_err());
            area.check(1);
            area.unmap();
        }
        world.finish();
        Ok(())
    });
}

#[test]
fn what_a_pipe_refers_to_keeps_its_bytes() {
    isolated!(|| {
        let world = World::with_kernel_faults(16)?;
        // The program lets the kernel refer to its pages: that is what this call is for.
        world.mm.never_recycle();
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            let mut ends = [0; 2];
            // SAFETY: writes two descriptors to a local.
            assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
            // SAFETY: the descriptor is new, and nobody else's.
            let [reader, writer] = ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
            let part = area.part(40..56);
            let vector = [part.start, part.len()];
            let vector = vector.as_ptr().expose_provenance();
            let spliced = syscall(libc::SYS_vmsplice, [arg(writer.as_raw_fd()), vector, 1, 0, 0, 0]);
            assert_eq!(spliced, Ok(part.len()));
            for _ in 0..4 {
                world.migrate(&area);
                area.check(1);
            }
            // Other bytes go through all the staging pages there are.
            let other = Area::filled(shape, 1, 2);
            world.migrate(&other);
            other.check(2);
            let copy = Area::new(Shape::Small, 1).part(0..part.pages);
            let read = syscall(libc::SYS_read, [arg(reader.as_raw_fd()), copy.start, copy.len(), 0, 0, 0]);
            assert_eq!(read, Ok(copy.len()));
            copy.check_from(1, 40);
            area.unmap();
            other.unmap();
        }
        world.finish();
        Ok(())
    });
}

#[test]
fn pages_pinned_for_io_stay() {
    isolated!(|| {
        let world = World::with_kernel_faults(16)?;
        if !has_move() {
            return Err(Skip("only UFFDIO_MOVE sees that a page is pinned".to_owned()));
        }
        // struct io_uring_params: ten words of four bytes, then two tables of offsets.
        let mut params = [0u64; 15];
        let ring = match syscall(libc::SYS_io_uring_setup, [1, params.as_mut_ptr().expose_provenance(), 0, 0, 0, 0]) {
            Ok(fd) => i32::try_from(fd).unwrap(),
            Err(errno) => {
                return Err(Skip(format!("io_uring: {}", std::io::Error::from_raw_os_error(errno))));
            }
        };
        // SAFETY: the descriptor is new, and nobody else's.
        let ring = unsafe { OwnedFd::from_raw_fd(ring) };
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            let pinned = area.part(100..116);
            let vector = [pinned.start, pinned.len()];
            let (vector, ring_fd) = (vector.as_ptr().expose_provenance(), arg(ring.as_raw_fd()));
            const REGISTER_BUFFERS: usize = 0;
            const UNREGISTER_BUFFERS: usize = 1;
            syscall(libc::SYS_io_uring_register, [ring_fd, REGISTER_BUFFERS, vector, 1, 0, 0])
                .expect("io_uring_register");
            let report = world.migrate(&area);
            let stay = report.count(PageOutcome::Pinned);
            // A huge page is pinned as one.
            assert!(stay == pinned.pages || shape == Shape::Huge && stay == 512, "{:?}", summary(&report));
            assert_eq!(report.count(PageOutcome::Moved), 512 - stay, "{:?}", summary(&report));
            area.check(1);
            syscall(libc::SYS_io_uring_register, [ring_fd, UNREGISTER_BUFFERS, 0, 0, 0, 0]).unwrap();
            world.send(&area);
            area.check(1);
            area.unmap();
        }
        world.finish();
        Ok(())
    });
}

#[test]
fn merged_pages_move() {
    isolated!(|| {
        let world = World::new(16)?;
        let run = std::fs::read_to_string("/sys/kernel/mm/ksm/run").unwrap_or_default();
        if run.trim() != "1" {
            return Err(Skip("the kernel does not merge pages here (/sys/kernel/mm/ksm/run)".to_owned()));
        }
        let area = Area::new(Shape::Small, 1);
        let fill = || (0..512).for_each(|n| common::kit::write_page(area.page(n), 7, 0));
        fill();
        assert_eq!(Via::Libc.madvise(area.start, area.len(), libc::MADV_MERGEABLE), 0);
        std::thread::sleep(std::time::Duration::from_secs(3));
        world.send(&area);
        (0..512).for_each(|n| expect_page(area.page(n), 7, 0));
        world.finish();
        Ok(())
    });
}

#[test]
fn pages_shared_with_a_living_child_become_the_parents_own_and_move() {
    isolated!(|| {
        let world = World::new(16)?;
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            let mut ends = [0; 2];
            // SAFETY: writes two descriptors to a local.
            assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
            let child = fork_child(|| {
                let mut byte = 0u8;
                // SAFETY: writes one byte to a local.
                let n = unsafe { libc::read(ends[0], ptr::from_mut(&mut byte).cast(), 1) };
                assert_eq!((n, byte), (1, b'x'));
                area.check(1);
            });
            world.send(&area);
            area.check(1);
            area.fill(2);
            world.send(&area);
            // SAFETY: reads one byte of a literal.
            assert_eq!(unsafe { libc::write(ends[1], b"x".as_ptr().cast(), 1) }, 1);
            assert_eq!(wait_for(child), End::Exit(0));
            area.check(2);
            area.unmap();
        }
        world.finish();
        Ok(())
    });
}

static mut ZEROED: [u64; 4096] = [0; 4096];

#[test]
fn the_engine_never_moves_what_is_its_own() {
    isolated!(|| {
        let world = World::new(64)?;
        let own = arena::range().expect("the engine runs");
        let report = world.mirror.migrate(own, &MigrateOptions::default());
        // What is not handed out yet is inaccessible.
        let stay = report.count(PageOutcome::EngineOwned) + report.count(PageOutcome::NoAccess);
        assert_eq!(stay, own.pages(), "{:?}", summary(&report));
        // SAFETY: asks for this thread's own handle.
        let control = unsafe { libc::pthread_self() };
        let control = Area { start: usize::try_from(control).unwrap() / PAGE * PAGE, pages: 1 };
        expect_all(&world, &control, PageOutcome::EngineOwned);
        // Zeroed statics of the object that the engine's code is in: the test's executable.
        let zeroed = (&raw mut ZEROED).expose_provenance().next_multiple_of(PAGE);
        let zeroed = Area { start: zeroed, pages: 2 };
        let report = world.migrate(&zeroed);
        let stay = report.count(PageOutcome::EngineOwned) + report.count(PageOutcome::FileBacked);
        assert_eq!(stay, zeroed.pages, "{:?}", summary(&report));
        assert_eq!(world.mm.pages_away(), 0);
        world.finish();
        Ok(())
    });
}

#[test]
fn thp_may_be_switched_off_for_the_process() {
    isolated!(|| {
        // SAFETY: changes a setting of this process.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) }, 0);
        let world = World::new(16)?;
        for shape in SHAPES {
            let area = Area::filled(shape, 2, 1);
            world.send(&area);
            area.check(1);
            world.send(&area);
            assert!(world.mm.home(area.range()).is_complete());
            area.check(1);
            area.unmap();
        }
        world.finish();
        Ok(())
    });
}

#[test]
fn sealed_memory_keeps_its_bytes() {
    isolated!(|| {
        let world = World::new(16)?;
        const SYS_MSEAL: libc::c_long = 462;
        for (shape, prot) in SHAPES.into_iter().flat_map(|shape| [(shape, RW), (shape, libc::PROT_READ)]) {
            let area = Area::filled(shape, 1, 1);
            world.send(&area.part(0..100));
            assert_eq!(Via::Libc.mprotect(area.start, area.len(), prot), 0);
            if let Err(errno) = syscall(SYS_MSEAL, [area.start, area.len(), 0, 0, 0, 0]) {
                return Err(Skip(format!("mseal: {}", std::io::Error::from_raw_os_error(errno))));
            }
            let report = world.migrate(&area);
            println!("{shape:?} {prot}: {:?}", summary(&report));
            let told = [PageOutcome::Moved, PageOutcome::Already, PageOutcome::NotMovable];
            assert!(report.outcomes().all(|o| told.contains(&o)), "{:?}", summary(&report));
            area.check(1);
            if prot == RW {
                area.fill(2);
                world.migrate(&area);
                area.check(2);
            }
        }
        world.finish();
        Ok(())
    });
}

#[test]
fn guard_pages_guard_on() {
    isolated!(|| {
        let world = World::new(16)?;
        const MADV_GUARD_INSTALL: i32 = 102;
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            let guard = area.part(200..201);
            if Via::Libc.madvise(guard.start, guard.len(), MADV_GUARD_INSTALL) != 0 {
                return Err(Skip(format!("MADV_GUARD_INSTALL: {}", std::io::Error::from_raw_os_error(errno()))));
            }
            for _ in 0..3 {
                let mut report = world.migrate(&area);
                eventually("no page is busy", || {
                    report = world.migrate(&area);
                    report.count(PageOutcome::Busy) == 0
                });
                assert_eq!(report.count(PageOutcome::NotMovable), 1, "{:?}", summary(&report));
                world.expect_away(&area, 511);
                area.part(0..200).check(1);
                area.part(201..512).check_from(1, 201);
            }
            assert_eq!(wait_for(fork_child(|| poke(guard.start, 1))), End::Signal(libc::SIGSEGV));
            area.unmap();
        }
        world.finish();
        Ok(())
    });
}

#[test]
fn sixty_thousand_mappings_have_a_defined_outcome() {
    isolated!(std::time::Duration::from_secs(300), || {
        let world = World::new(512)?;
        let limit = uhmm_sys::limits::max_map_count().unwrap_or(65_530);
        if limit > 70_000 {
            println!("skip: nearness to the limit ({limit} mappings are allowed here)");
        }
        let area = Area::filled(Shape::Small, 118, 1);
        for n in (0..area.pages).step_by(2) {
            assert_eq!(Via::Libc.mprotect(area.page(n), PAGE, libc::PROT_READ), 0);
        }
        let report = world.migrate(&area);
        println!("{:?}", summary(&report));
        let told = [PageOutcome::Moved, PageOutcome::NoMemory];
        assert!(report.outcomes().all(|o| told.contains(&o)), "{:?}", summary(&report));
        assert!(report.count(PageOutcome::Moved) > area.pages / 2, "{:?}", summary(&report));
        area.check(1);
        let home = world.mm.home(area.range());
        assert!(home.is_complete(), "{:?}", summary(&home));
        area.check(1);
        // The program can still map something.
        let more = map(0, BLOCK, RW, 0);
        poke(more, 1);
        assert_eq!(world.mm.residency(virt(more)).at, Location::Cpu);
        world.finish();
        Ok(())
    });
}

#[test]
fn a_program_at_the_limit_of_mappings_loses_nothing() {
    isolated!(std::time::Duration::from_secs(300), || {
        let world = World::new(64)?;
        let limit = uhmm_sys::limits::max_map_count().unwrap_or(65_530);
        if limit > 70_000 {
            return Err(Skip(format!("{limit} mappings are allowed here")));
        }
        // Nothing can be split any more: registering a part of a mapping must be refused, and said so.
        let whole = Area::filled(Shape::Small, 4, 1);
        let crowd = map(0, 70_000 * PAGE, RW, 0);
        let mut n = 0;
        while Via::Libc.mprotect(crowd + n * 2 * PAGE, PAGE, libc::PROT_READ) == 0 {
            n += 1;
            assert!(n < 35_000, "the limit does not hold");
        }
        assert_eq!(errno(), libc::ENOMEM);
        for pages in [100..200, 600..700, 1100..1600] {
            let part = whole.part(pages);
            let report = world.migrate(&part);
            let told = [PageOutcome::Moved, PageOutcome::NoMemory];
            assert!(report.outcomes().all(|o| told.contains(&o)), "{:?}", summary(&report));
        }
        whole.check(1);
        let home = world.mm.home(whole.range());
        assert!(home.is_complete(), "{:?}", summary(&home));
        world.finish();
        Ok(())
    });
}

#[test]
fn a_page_at_a_time_is_as_good_as_a_block() {
    isolated!(|| {
        let world = World::new(16)?;
        for shape in SHAPES {
            let area = Area::filled(shape, 1, 1);
            for n in (0..512).rev() {
                let one = PageRange::new(virt(area.page(n)), PAGE_SIZE).unwrap();
                let report = world.mirror.migrate(one, &MigrateOptions::default());
                assert_eq!(report.count(PageOutcome::Moved), 1, "page {n}: {:?}", summary(&report));
            }
            world.expect_away(&area, 512);
            area.check(1);
            area.unmap();
        }
        world.finish();
        Ok(())
    });
}
