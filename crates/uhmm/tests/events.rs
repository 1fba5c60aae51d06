//! What a program does to memory that is away: it must look as if the memory had been there.
//!
//! Everything is done by libc and by bare system calls, on small and on huge pages.
//
// UNSAFETY: the tests make, change and watch memory by raw system calls and pointers.

#![allow(unsafe_code, reason = "tests make the memory that they then watch")]

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::fs::OpenOptionsExt,
    },
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use uhmm::{PageOutcome, trace::Why};
use uhmm_testkit::{Skip, isolated};

use crate::common::kit::{
    Area, BLOCK, End, PAGE, RW, Shape, Via, World, arg, each_way, errno, expect_page, expect_zero, fork_child,
    has_move, locked_memory_moves, map, peek, pointer, poke, summary, syscall, unmap, virt, wait_for, write_page,
};

#[test]
fn munmap_forgets_pages_that_are_away() {
    isolated!(|| {
        let world = World::new(32)?;
        each_way(|shape, via| {
            let area = Area::filled(shape, 2, 1);
            world.send(&area);
            assert_eq!(via.munmap(area.start, area.len()), 0);
            world.frames_become(0);
            map(area.start, area.len(), RW, libc::MAP_FIXED_NOREPLACE);
            area.check_zero();
            area.fill(2);
            area.check(2);
            world.send(&area);
            area.check(2);
            area.unmap();
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn partial_munmap_of_a_block_keeps_the_rest() {
    isolated!(|| {
        let world = World::new(32)?;
        each_way(|shape, via| {
            let area = Area::filled(shape, 2, 1);
            world.send(&area);
            let hole = area.part(100..600);
            assert_eq!(via.munmap(hole.start, hole.len()), 0);
            world.frames_become(1024 - 500);
            map(hole.start, hole.len(), RW, libc::MAP_FIXED_NOREPLACE);
            let past = world.mm.residency(virt(hole.page(7)));
            assert_eq!((past.why, past.for_ms), (Why::Untouched, None), "that was another page");
            hole.check_zero();
            area.part(0..100).check(1);
            area.part(600..1024).check_from(1, 600);
            world.frames_become(0);
            area.unmap();
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn a_fixed_mmap_replaces_pages_that_are_away() {
    isolated!(|| {
        let world = World::new(32)?;
        each_way(|shape, via| {
            let area = Area::filled(shape, 2, 1);
            world.send(&area);
            let over = area.part(200..700);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            assert_eq!(via.mmap(over.start, over.len(), RW, flags, -1), Ok(over.start));
            over.check_zero();
            over.fill(2);
            over.check(2);
            area.part(0..200).check(1);
            area.part(700..1024).check_from(1, 700);
            over.check(2);
            world.frames_become(0);
            area.unmap();
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn mremap_grows_shrinks_and_moves_pages_that_are_away() {
    isolated!(|| {
        let world = World::new(32)?;
        each_way(|shape, via| {
            let area = Area::filled(shape, 2, 1);
            world.send(&area);
            // It cannot grow where it is: inaccessible memory follows.
            let grown = via.mremap(area.start, area.len(), area.len() + BLOCK, libc::MREMAP_MAYMOVE, 0).unwrap();
            assert_ne!(grown, area.start);
            let grown = Area { start: grown, pages: area.pages + 512 };
            grown.part(1024..1536).check_zero();
            grown.part(0..1024).check(1);
            grown.fill(2);
            world.send(&grown);
            let shrunk = via.mremap(grown.start, grown.len(), 300 * PAGE, 0, 0).unwrap();
            assert_eq!(shrunk, grown.start);
            world.frames_become(300);
            let shrunk = grown.part(0..300);
            let back = via.mremap(shrunk.start, shrunk.len(), BLOCK, 0, 0).expect("it has just left that place");
            assert_eq!(back, grown.start);
            grown.part(300..512).check_zero();
            shrunk.check(2);
            unmap(grown.start, BLOCK);
            world.frames_become(0);
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn mremap_onto_a_mapping_with_pages_away_replaces_it() {
    isolated!(|| {
        let world = World::new(32)?;
        each_way(|shape, via| {
            let (from, onto) = (Area::filled(shape, 2, 1), Area::filled(shape, 2, 2));
            world.send(&from);
            world.send(&onto);
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            assert_eq!(via.mremap(from.start, from.len(), from.len(), flags, onto.start), Ok(onto.start));
            world.frames_become(1024);
            onto.check(1);
            world.frames_become(0);
            map(from.start, from.len(), RW, libc::MAP_FIXED_NOREPLACE);
            from.check_zero();
            from.unmap();
            onto.unmap();
        });
        world.finish();
        Ok(())
    });
}

/// An aligned hole of `pages` pages that nothing else in this process is going to take: what it was is known.
fn fresh_hole(pages: usize) -> Area {
    let around = map(0, pages * PAGE + 2 * BLOCK, libc::PROT_NONE, 0);
    unmap(around, pages * PAGE + 2 * BLOCK);
    Area { start: (around + PAGE).next_multiple_of(BLOCK), pages }
}

#[test]
fn mremap_onto_a_hole_at_any_page_offset() {
    isolated!(|| {
        let world = World::new(32)?;
        each_way(|shape, via| {
            for offset in [0, 1, 37, 511] {
                let from = Area::filled(shape, 2, 1);
                world.send(&from);
                let to = fresh_hole(from.pages + offset).part(offset..from.pages + offset);
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                assert_eq!(via.mremap(from.start, from.len(), from.len(), flags, to.start), Ok(to.start));
                world.expect_away(&to, 1024);
                // Away again at the new place, half of it touched in between.
                to.part(0..512).check(1);
                world.send(&to);
                to.check(1);
                to.unmap();
                world.frames_become(0);
            }
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn mremap_moves_a_part_of_a_block() {
    isolated!(|| {
        let world = World::new(32)?;
        each_way(|shape, via| {
            let area = Area::filled(shape, 2, 1);
            world.send(&area);
            let part = area.part(300..700);
            let to = fresh_hole(part.pages);
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            assert_eq!(via.mremap(part.start, part.len(), part.len(), flags, to.start), Ok(to.start));
            to.check_from(1, 300);
            area.part(0..300).check(1);
            area.part(700..1024).check_from(1, 700);
            map(part.start, part.len(), RW, libc::MAP_FIXED_NOREPLACE);
            part.check_zero();
            area.unmap();
            to.unmap();
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn a_munmap_that_is_refused_loses_nothing() {
    isolated!(|| {
        const SYS_MSEAL: libc::c_long = 462;
        let world = World::new(16)?;
        let area = Area::filled(Shape::Small, 1, 1);
        let (free, sealed) = (area.part(0..256), area.part(256..512));
        if syscall(SYS_MSEAL, [sealed.start, sealed.len(), 0, 0, 0, 0]).is_err() {
            return Err(Skip("the kernel seals nothing".to_owned()));
        }
        for via in [Via::Libc, Via::Raw] {
            world.send(&free);
            assert_eq!(via.munmap(area.start, area.len()), -1);
            area.check(1);
        }
        assert_eq!(Via::Raw.munmap(free.start, free.len()), 0);
        world.finish();
        Ok(())
    });
}

#[test]
fn locked_memory_grows_where_it_moves_to() {
    isolated!(|| {
        locked_memory_moves()?;
        let world = World::with_kernel_faults(16)?;
        each_way(|shape, via| {
            let area = Area::filled(shape, 1, 1);
            assert_eq!(syscall(libc::SYS_mlock, [area.start, area.len(), 0, 0, 0, 0]), Ok(0));
            world.send(&area);
            // The kernel fills the new half before it tells of the old one's move.
            let moved = via.mremap(area.start, area.len(), 2 * area.len(), libc::MREMAP_MAYMOVE, 0).unwrap();
            assert_ne!(moved, area.start);
            let (old, new) = (Area { start: moved, ..area }, Area { start: moved + area.len(), ..area });
            old.check(1);
            new.check_zero();
            new.fill(2);
            world.send(&old);
            world.send(&new);
            old.check(1);
            new.check(2);
            unmap(moved, 2 * area.len());
        });
        world.frames_become(0);
        world.finish();
        Ok(())
    });
}

#[test]
fn what_a_shared_segment_has_replaced_is_in_nobodys_way() {
    isolated!(|| {
        let world = World::new(16)?;
        let (old, new) = (Area::filled(Shape::Small, 1, 1), Area::filled(Shape::Small, 1, 2));
        world.send(&old);
        world.send(&new);
        // The kernel does not tell that the pages there are gone.
        let id = syscall(libc::SYS_shmget, [arg(libc::IPC_PRIVATE), old.len(), 0o600, 0, 0, 0]).unwrap();
        assert_eq!(syscall(libc::SYS_shmat, [id, old.start, arg(libc::SHM_REMAP), 0, 0, 0]), Ok(old.start));
        syscall(libc::SYS_shmctl, [id, arg(libc::IPC_RMID), 0, 0, 0, 0]).unwrap();
        old.check_zero();
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        assert_eq!(Via::Raw.mremap(new.start, new.len(), new.len(), flags, old.start), Ok(old.start));
        world.frames_become(new.pages);
        old.check(2);
        world.frames_become(0);
        world.finish();
        Ok(())
    });
}

#[test]
fn mremap_dontunmap_leaves_zeros_behind() {
    isolated!(|| {
        let world = World::new(32)?;
        each_way(|shape, via| {
            let area = Area::filled(shape, 2, 1);
            world.send(&area);
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
            let to = Area { start: via.mremap(area.start, area.len(), area.len(), flags, 0).unwrap(), pages: 1024 };
            area.part(0..512).check_zero();
            to.check(1);
            area.check_zero();
            area.fill(2);
            world.send(&area);
            world.send(&to);
            area.check(2);
            to.check(1);
            area.unmap();
            to.unmap();
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn madvise_dontneed_drops_pages_that_are_away() {
    isolated!(|| {
        let world = World::new(32)?;
        each_way(|shape, via| {
            let area = Area::filled(shape, 2, 1);
            world.send(&area);
            let dropped = area.part(100..612);
            assert_eq!(via.madvise(dropped.start, dropped.len(), libc::MADV_DONTNEED), 0);
            world.frames_become(512);
            dropped.check_zero();
            area.part(0..100).check(1);
            area.part(612..1024).check_from(1, 612);
            world.frames_become(0);
            area.unmap();
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn madvise_free_leaves_the_old_bytes_or_zeros_until_a_write() {
    isolated!(|| {
        let world = World::new(32)?;
        each_way(|shape, via| {
            let area = Area::filled(shape, 2, 1);
            world.send(&area);
            let freed = area.part(100..612);
            assert_eq!(via.madvise(freed.start, freed.len(), libc::MADV_FREE), 0);
            for n in 0..freed.pages {
                match peek(freed.page(n)) {
                    0 => expect_zero(freed.page(n)),
                    _ => expect_page(freed.page(n), 1, 100 + n),
                }
            }
            freed.fill(3);
            world.migrate(&area);
            freed.check(3);
            area.part(0..100).check(1);
            area.part(612..1024).check_from(1, 612);
            area.unmap();
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn advice_that_drops_nothing_changes_nothing() {
    isolated!(|| {
        let world = World::new(32)?;
        each_way(|shape, via| {
            let area = Area::filled(shape, 2, 1);
            const MADV_COLLAPSE: i32 = 25;
            for advice in
                [libc::MADV_COLD, libc::MADV_PAGEOUT, libc::MADV_WILLNEED, MADV_COLLAPSE, libc::MADV_NOHUGEPAGE]
            {
                world.send(&area);
                // Half of it is there again.
                area.part(200..712).check_from(1, 200);
                // Whether the kernel has the advice, or anything to do, is its own affair.
                let _ = via.madvise(area.start, area.len(), advice);
                area.check(1);
            }
            area.unmap();
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn the_heap_may_shrink_and_grow_while_it_is_away() {
    isolated!(|| {
        let world = World::new(32)?;
        let brk = |to: usize| {
            // Never below what malloc has handed out.
            syscall(libc::SYS_brk, [to, 0, 0, 0, 0, 0]).unwrap()
        };
        // Malloc's own top lies below; nothing of the heap is handed out while the end is ours, for this thread's
        // allocations come from an arena of its own.
        let old = brk(0);
        let start = old.next_multiple_of(BLOCK);
        assert_eq!(brk(start + 2 * BLOCK), start + 2 * BLOCK);
        let area = Area { start, pages: 1024 };
        area.fill(1);
        world.send(&area);
        assert_eq!(brk(start + 700 * PAGE), start + 700 * PAGE);
        world.frames_become(700);
        assert_eq!(brk(start + 2 * BLOCK), start + 2 * BLOCK);
        area.part(700..1024).check_zero();
        area.part(0..700).check(1);
        area.fill(2);
        world.send(&area);
        assert_eq!(brk(old), old);
        world.frames_become(0);
        assert_eq!(brk(start + BLOCK), start + BLOCK);
        area.part(0..512).check_zero();
        assert_eq!(brk(old), old);
        world.finish();
        Ok(())
    });
}

#[test]
fn pages_come_home_into_a_mapping_made_read_only() {
    isolated!(|| {
        let world = World::new(32)?;
        each_way(|shape, via| {
            let area = Area::filled(shape, 2, 1);
            world.send(&area);
            let part = area.part(100..800);
            assert_eq!(via.mprotect(part.start, part.len(), libc::PROT_READ), 0);
            area.check(1);
            world.frames_become(0);
            assert_eq!(via.mprotect(part.start, part.len(), RW), 0);
            area.fill(2);
            area.check(2);
            area.unmap();
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn pages_wait_behind_a_mapping_without_access() {
    isolated!(|| {
        let world = World::new(32)?;
        each_way(|shape, via| {
            let area = Area::filled(shape, 2, 1);
            for asked in [false, true] {
                world.send(&area);
                let part = area.part(100..800);
                assert_eq!(via.mprotect(part.start, part.len(), libc::PROT_NONE), 0);
                if asked {
                    let home = world.mm.home(area.range());
                    assert_eq!(home.count(PageOutcome::Moved), 1024, "{:?}", summary(&home));
                    // Whatever it took to bring them home, the protection is as it was.
                    assert_eq!(wait_for(fork_child(|| assert_ne!(peek(part.start), 0))), End::Signal(libc::SIGSEGV));
                }
                assert_eq!(via.mprotect(part.start, part.len(), RW), 0);
                area.check(1);
            }
            area.unmap();
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn mlock_brings_pages_home_and_they_may_leave_again() {
    isolated!(|| {
        locked_memory_moves()?;
        let world = World::with_kernel_faults(32)?;
        each_way(|shape, _| {
            let area = Area::filled(shape, 1, 1);
            world.send(&area);
            // SAFETY: locks memory of the test.
            let locked = unsafe { libc::mlock(pointer(area.start), area.len()) };
            assert_eq!(locked, 0, "mlock: {}", errno());
            world.frames_become(0);
            area.check(1);
            // The kernel moves locked pages too: locking is about reclaim, not about where a page is.
            world.send(&area);
            area.check(1);
            area.fill(2);
            world.send(&area);
            // SAFETY: unlocks memory of the test.
            assert_eq!(unsafe { libc::munlock(pointer(area.start), area.len()) }, 0);
            area.check(2);
            area.unmap();
        });
        world.finish();
        Ok(())
    });
}

// System calls on pages that are away.

/// A file without a name.
fn file(flags: i32) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE | flags).open(std::env::temp_dir())
}

/// `read(2)` or `write(2)` of the whole area.
fn transfer(call: libc::c_long, fd: i32, area: &Area) {
    let mut done = 0;
    while done < area.len() {
        let n = syscall(call, [arg(fd), area.start + done, area.len() - done, 0, 0, 0]).expect("I/O");
        assert_ne!(n, 0);
        done += n;
    }
}

#[test]
fn write_and_read_work_on_pages_that_are_away() {
    isolated!(|| {
        let world = World::with_kernel_faults(32)?;
        each_way(|shape, _| {
            let (from, to) = (Area::filled(shape, 2, 1), Area::filled(shape, 2, 2));
            world.send(&from);
            world.send(&to);
            let mut file = file(0).unwrap();
            transfer(libc::SYS_write, file.as_raw_fd(), &from);
            file.seek(SeekFrom::Start(0)).unwrap();
            transfer(libc::SYS_read, file.as_raw_fd(), &to);
            from.check(1);
            to.check(1);
            from.unmap();
            to.unmap();
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn pipes_carry_pages_that_are_away_between_threads() {
    isolated!(|| {
        let world = World::with_kernel_faults(32)?;
        each_way(|shape, _| {
            let (from, to) = (Area::filled(shape, 2, 1), Area::filled(shape, 2, 2));
            world.send(&from);
            world.send(&to);
            let mut ends = [0; 2];
            // SAFETY: writes two descriptors to a local.
            assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
            // SAFETY: the descriptor is new, and nobody else's.
            let [reader, writer] = ends.map(|fd| unsafe { File::from_raw_fd(fd) });
            std::thread::scope(|s| {
                s.spawn(|| transfer(libc::SYS_write, writer.as_raw_fd(), &from));
                s.spawn(|| transfer(libc::SYS_read, reader.as_raw_fd(), &to));
            });
            to.check(1);
            from.check(1);
            from.unmap();
            to.unmap();
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn direct_io_works_on_pages_that_are_away() {
    isolated!(|| {
        let world = World::with_kernel_faults(32)?;
        if let Err(error) = file(libc::O_DIRECT) {
            return Err(Skip(format!("no direct I/O in {}: {error}", std::env::temp_dir().display())));
        }
        each_way(|shape, _| {
            let (from, to) = (Area::filled(shape, 2, 1), Area::filled(shape, 2, 2));
            let mut file = file(libc::O_DIRECT).unwrap();
            world.send(&from);
            world.send(&to);
            // Out and home again and again while the disk works.
            let stop = AtomicBool::new(false);
            std::thread::scope(|s| {
                s.spawn(|| {
                    while !stop.load(Relaxed) {
                        world.migrate(&from);
                        world.migrate(&to);
                    }
                });
                for _ in 0..10 {
                    file.seek(SeekFrom::Start(0)).unwrap();
                    transfer(libc::SYS_write, file.as_raw_fd(), &from);
                    file.seek(SeekFrom::Start(0)).unwrap();
                    if has_move() {
                        transfer(libc::SYS_read, file.as_raw_fd(), &to);
                    }
                }
                stop.store(true, Relaxed);
            });
            if !has_move() {
                // Without MOVE nobody sees that the disk is about to write to a page; the engine says so.
                println!("skip: reads from the disk while pages move need UFFDIO_MOVE");
                file.seek(SeekFrom::Start(0)).unwrap();
                transfer(libc::SYS_read, file.as_raw_fd(), &to);
            }
            to.check(1);
            from.check(1);
            from.unmap();
            to.unmap();
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn process_vm_calls_see_pages_that_are_away() {
    isolated!(|| {
        let world = World::with_kernel_faults(32)?;
        each_way(|shape, _| {
            let (from, to) = (Area::filled(shape, 1, 1), Area::filled(shape, 1, 2));
            for call in [libc::SYS_process_vm_readv, libc::SYS_process_vm_writev] {
                from.fill(1);
                to.fill(2);
                world.send(&from);
                world.send(&to);
                let (local, remote) = if call == libc::SYS_process_vm_readv { (to, from) } else { (from, to) };
                let [local, remote] = [local, remote].map(|area| [area.start, area.len()]);
                let (local, remote) = (local.as_ptr().expose_provenance(), remote.as_ptr().expose_provenance());
                let pid = std::process::id() as usize;
                assert_eq!(syscall(call, [pid, local, 1, remote, 1, 0]), Ok(from.len()));
                to.check(1);
                from.check(1);
            }
            from.unmap();
            to.unmap();
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn a_futex_may_be_on_a_page_that_is_away() {
    isolated!(|| {
        let world = World::with_kernel_faults(32)?;
        each_way(|shape, _| {
            let area = Area::filled(shape, 1, 1);
            let word = area.page(77) + 8;
            for round in 0..50usize {
                poke(word, round as u64);
                world.send(&area);
                let futex = |op: i32, value: usize| syscall(libc::SYS_futex, [word, arg(op), value, 0, 0, 0]);
                // The value differs: the kernel has to look at it to know.
                assert_eq!(futex(libc::FUTEX_WAIT, round + 1), Err(libc::EAGAIN));
                world.send(&area);
                std::thread::scope(|s| {
                    s.spawn(|| {
                        while peek(word) == round as u64 {
                            // An early return is no harm: the loop looks again.
                            let _ = futex(libc::FUTEX_WAIT, round);
                        }
                    });
                    world.migrate(&area);
                    poke(word, round as u64 + 1000);
                    world.migrate(&area);
                    futex(libc::FUTEX_WAKE, 1).unwrap();
                });
            }
            area.unmap();
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn a_shared_read_at_the_edge_of_a_page_that_is_away_is_whole() {
    isolated!(|| {
        let world = World::with_kernel_faults(32)?;
        each_way(|shape, _| {
            // One call that reads across many small runs: every third page is away.
            let area = Area::filled(shape, 1, 1);
            for n in (0..512).step_by(3) {
                world.send(&area.part(n..n + 1));
            }
            let mut file = file(0).unwrap();
            transfer(libc::SYS_write, file.as_raw_fd(), &area);
            file.seek(SeekFrom::Start(0)).unwrap();
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes.len(), area.len());
            for n in 0..512 {
                let word = u64::from_ne_bytes(bytes[n * PAGE..n * PAGE + 8].try_into().unwrap());
                assert_eq!(word, peek(area.page(n)));
            }
            area.check(1);
            area.unmap();
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn user_mode_only_touches_bring_pages_home_and_system_calls_answer() {
    isolated!(|| {
        let world = World::new(32)?;
        if world.mm.serves_kernel_faults() {
            return Err(Skip("the userfaultfd here serves faults of system calls".to_owned()));
        }
        let area = Area::filled(Shape::Small, 1, 1);
        world.send(&area);
        let mut pipe = [0; 2];
        // SAFETY: writes two descriptors to a local.
        assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
        let answer = syscall(libc::SYS_write, [arg(pipe[1]), area.start, 100, 0, 0, 0]);
        assert_eq!(answer, Err(libc::EFAULT), "an error, never wrong bytes");
        area.check(1);
        world.finish();
        Ok(())
    });
}

#[test]
fn a_mapping_of_many_vmas_goes_at_once() {
    isolated!(|| {
        let world = World::new(32)?;
        each_way(|shape, via| {
            let area = Area::filled(shape, 2, 1);
            // Every other page read-only; half of it has been away before.
            for n in (0..1024).step_by(2) {
                assert_eq!(via.mprotect(area.page(n), PAGE, libc::PROT_READ), 0);
            }
            let report = world.migrate(&area.part(200..800));
            assert!(report.is_complete(), "{:?}", summary(&report));
            area.part(300..400).check_from(1, 300);
            assert_eq!(via.munmap(area.start, area.len()), 0);
            world.frames_become(0);
            map(area.start, area.len(), RW, libc::MAP_FIXED_NOREPLACE);
            area.check_zero();
            area.unmap();
        });
        world.finish();
        Ok(())
    });
}

#[test]
fn what_another_thread_maps_in_the_place_is_not_disturbed() {
    isolated!(|| {
        let world = World::new(32)?;
        // The place is mapped, sent away, unmapped and mapped again so fast that events and new mappings meet.
        let area = Area::new(Shape::Small, 1);
        for round in 0..2000 {
            let part = area.part(0..1 + (round * 37) % 512);
            (0..part.pages).step_by(17).for_each(|n| write_page(part.page(n), round as u64, n));
            world.migrate(&part);
            assert_eq!(Via::Libc.munmap(part.start, part.len()), 0);
            map(part.start, part.len(), RW, libc::MAP_FIXED_NOREPLACE);
            for n in (0..part.pages).step_by(5) {
                expect_zero(part.page(n));
                write_page(part.page(n), round as u64, n);
            }
            (0..part.pages).step_by(5).for_each(|n| expect_page(part.page(n), round as u64, n));
            (0..part.pages).filter(|n| n % 5 != 0).for_each(|n| expect_zero(part.page(n)));
        }
        world.finish();
        Ok(())
    });
}
