//! Forks that share frames: the child takes its memory over, on an engine of its own.
//
// UNSAFETY: the tests make, change and watch memory by raw system calls and pointers.

#![allow(unsafe_code, reason = "tests make the memory that they then watch")]

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use uhmm::{
    MigrateOptions, Mirror, Mm, PageOutcome,
    mm::{Setup, Threads},
};
use uhmm_testkit::{Skip, isolated};

use crate::common::{
    Memory, Plain, eventually,
    kit::{Area, End, PAGE, Shape, Via, fork_child, wait_for},
    stamp,
};

fn hidden(bytes: u64) -> Result<(Mm, Mirror<Plain>), Skip> {
    let mm = Mm::open_with(Setup { threads: Threads::Hidden, ..Setup::default() })
        .map_err(|error| Skip(format!("{error}")))?;
    if !mm.serves_kernel_faults() {
        return Err(Skip("kernel-mode faults are not served".into()));
    }
    let mirror = mm.register(Plain::sharing(bytes)).expect("room for a device");
    Ok((mm, mirror))
}

/// Forks; the child runs `body` and exits with 0 if it returns. Returns how it ended.
fn in_child(body: impl FnOnce()) -> End {
    wait_for(fork_child(body))
}

fn kill(pid: i32) {
    // SAFETY: a process that the test has made.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
}

#[test]
fn the_child_sees_the_moment_of_the_fork_and_frames_stay() {
    isolated!(|| {
        let (mm, mirror) = hidden(64 << 20)?;
        let memory = Memory::new(2048);
        memory.fill();
        assert_eq!(mirror.migrate(memory.range(), &MigrateOptions::default()).count(PageOutcome::Moved), 2048);
        let status = in_child(|| {
            memory.check();
            memory.set(7, 7);
            memory.check_but(7, 7);
        });
        assert_eq!(status, End::Exit(0));
        assert!(mm.pages_away() > 1900, "the fork brought {} pages home", 2048 - mm.pages_away());
        memory.check();
        Ok(())
    });
}

#[test]
fn the_child_knows_for_how_long_pages_are_where_they_are() {
    isolated!(|| {
        let (_mm, mirror) = hidden(8 << 20)?;
        let memory = Memory::new(16);
        memory.fill();
        assert!(mirror.migrate(memory.range(), &MigrateOptions::default()).is_complete());
        std::thread::sleep(std::time::Duration::from_millis(300));
        let status = in_child(|| {
            let mm = Mm::open_with(Setup { threads: Threads::Hidden, ..Setup::default() }).expect("the child's own");
            let residency = mm.residency(memory.range().start());
            // In units of 16 ms.
            assert!(residency.for_ms.is_some_and(|ms| (250..60_000).contains(&ms)), "{residency:?}");
        });
        assert_eq!(status, End::Exit(0));
        Ok(())
    });
}

#[test]
fn much_is_dropped_while_nothing_may_leave() {
    isolated!(|| {
        // Frames that a child could have too, and more of them than any list of the engine has room for.
        let (mm, mirror) = hidden(280 << 20)?;
        let area = Area::new(Shape::Small, 132);
        let away = mirror.migrate(area.range(), &MigrateOptions::default()).count(PageOutcome::Moved);
        assert_eq!(away, area.pages);
        uhmm::still::still(|| {
            // A call goes on when its event is read; the next waits until that was applied.
            for part in [0..area.pages - 2, area.pages - 2..area.pages - 1, area.pages - 1..area.pages] {
                assert_eq!(Via::Raw.munmap(area.page(part.start), part.len() * PAGE), 0);
            }
        });
        eventually("all frames are free", || mirror.frames_used() == 0);
        assert_eq!(mm.pages_away(), 0);
        Ok(())
    });
}

#[test]
fn parent_and_child_write_without_the_other_seeing() {
    isolated!(|| {
        let (_mm, mirror) = hidden(64 << 20)?;
        let memory = Memory::new(512);
        for round in 0..20u64 {
            (0..512).for_each(|n| memory.set(n, stamp(n) ^ round));
            let _ = mirror.migrate(memory.range(), &MigrateOptions::default());
            let child = fork_child(|| {
                (0..512).for_each(|n| assert_eq!(memory.get(n), stamp(n) ^ round, "the child saw the parent's writes"));
                (0..512).for_each(|n| memory.set(n, 1));
            });
            (0..512).for_each(|n| memory.set(n, memory.get(n).wrapping_add(1)));
            assert_eq!(wait_for(child), End::Exit(0), "round {round}");
            (0..512).for_each(|n| assert_eq!(memory.get(n), (stamp(n) ^ round).wrapping_add(1), "round {round}"));
        }
        Ok(())
    });
}

#[test]
fn a_child_outlives_its_killed_parent() {
    isolated!(|| {
        let (_mm, _) = hidden(1 << 20)?;
        let (mut told, mut tell) = std::io::pipe().unwrap();
        // The middle process is the parent to be killed.
        let status = in_child(|| {
            let mirror = Mm::open_with(Setup { threads: Threads::Hidden, ..Setup::default() })
                .expect("an engine")
                .register(Plain::sharing(64 << 20))
                .expect("room");
            let memory = Memory::new(1024);
            memory.fill();
            let _ = mirror.migrate(memory.range(), &MigrateOptions::default());
            // SAFETY: asks the kernel for the process's number.
            let me = unsafe { libc::getpid() };
            fork_child(|| {
                // SAFETY: asks the kernel for the parent's number.
                let parent = || unsafe { libc::getppid() };
                while parent() == me {
                    std::thread::yield_now();
                }
                let ok = (0..1024).all(|n| memory.get(n) == stamp(n));
                std::io::Write::write_all(&mut tell, &[u8::from(ok)]).unwrap();
            });
            kill(me);
        });
        assert_eq!(status, End::Signal(libc::SIGKILL));
        drop(tell);
        let mut byte = [9u8];
        std::io::Read::read_exact(&mut told, &mut byte).unwrap();
        assert_eq!(byte[0], 1, "the grandchild lost bytes when its parent was killed");
        Ok(())
    });
}

#[test]
fn generations_of_children_share_and_part() {
    isolated!(|| {
        let (_mm, mirror) = hidden(64 << 20)?;
        let memory = Memory::new(600);
        memory.fill();
        let _ = mirror.migrate(memory.range(), &MigrateOptions::default());
        let status = in_child(|| {
            memory.set(0, 100);
            let status = in_child(|| {
                assert_eq!(memory.get(0), 100);
                memory.check_but(0, 100);
                memory.set(1, 101);
            });
            assert_eq!(status, End::Exit(0));
            assert_eq!(memory.get(1), stamp(1));
            memory.check_but(0, 100);
        });
        assert_eq!(status, End::Exit(0));
        memory.check();
        Ok(())
    });
}

#[test]
fn a_child_gives_back_only_frames_that_were_shared_with_it() {
    isolated!(|| {
        let (mm, mirror) = hidden(64 << 20)?;
        // Pages of the second device come home before each fork; the child has no part in its frames.
        let other = mm.register(Plain::new(64 << 20)).expect("room for a device");
        let (shared, private) = (Memory::new(300), Memory::new(300));
        shared.fill();
        private.fill();
        for _ in 0..3 {
            let sent = [(&mirror, &shared), (&other, &private)]
                .map(|(mirror, memory)| mirror.migrate(memory.range(), &MigrateOptions::default()));
            assert!(sent.iter().all(uhmm::mm::Report::is_complete), "{sent:?}");
            let status = in_child(|| {
                shared.check();
                private.check();
            });
            assert_eq!(status, End::Exit(0));
            assert_eq!(other.frames_used(), 0);
        }
        // Frames that are in use twice hold the wrong bytes.
        let _ = other.migrate(private.range(), &MigrateOptions::default());
        let _ = other.migrate(shared.range(), &MigrateOptions::default());
        shared.check();
        private.check();
        mm.close().unwrap();
        Ok(())
    });
}

/// How a child ends that has frames in common with its parent.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Exits,
    Killed,
    Executes,
}

#[test]
fn frames_of_a_child_that_has_ended_come_back() {
    isolated!(|| {
        let (mm, mirror) = hidden(64 << 20)?;
        let memory = Memory::new(2048);
        memory.fill();
        for fate in [Fate::Exits, Fate::Killed, Fate::Executes] {
            let sent = mirror.migrate(memory.range(), &MigrateOptions::default());
            assert_eq!(sent.count(PageOutcome::Moved), 2048, "{fate:?}");
            let (mut is_there, mut tell) = std::io::pipe().unwrap();
            let child = fork_child(|| {
                assert_eq!(memory.get(5), stamp(5));
                std::io::Write::write_all(&mut tell, &[0]).unwrap();
                match fate {
                    Fate::Exits => {}
                    Fate::Killed => loop {
                        std::thread::park();
                    },
                    Fate::Executes => {
                        // It lives on, as another program.
                        let argv = [c"sleep".as_ptr(), c"60".as_ptr(), std::ptr::null()];
                        // SAFETY: strings that end, in a list that ends.
                        unsafe { libc::execvp(argv[0], argv.as_ptr()) };
                        panic!("sleep cannot be executed");
                    }
                }
            });
            std::io::Read::read_exact(&mut is_there, &mut [0]).unwrap();
            assert_eq!(mm.home(memory.range()).count(PageOutcome::Moved), 2048);
            if matches!(fate, Fate::Killed) {
                assert!(mirror.frames_used() > 1900, "the child has its part");
                kill(child);
            }
            eventually(&format!("{fate:?}: the frames come back"), || mirror.frames_used() == 0);
            if matches!(fate, Fate::Executes) {
                kill(child);
            }
            let killed = matches!(fate, Fate::Killed | Fate::Executes);
            assert_eq!(wait_for(child), if killed { End::Signal(libc::SIGKILL) } else { End::Exit(0) });
            memory.check();
        }
        mm.close().unwrap();
        Ok(())
    });
}

#[test]
fn frames_of_a_child_that_is_killed_as_soon_as_it_is_born_come_back() {
    isolated!(|| {
        let (mm, mirror) = hidden(64 << 20)?;
        let memory = Memory::new(2048);
        memory.fill();
        for round in 0..40 {
            let sent = mirror.migrate(memory.range(), &MigrateOptions::default());
            assert!(sent.is_complete(), "round {round}: {sent:?}");
            let child = fork_child(|| {
                loop {
                    std::thread::park();
                }
            });
            // Before its engine runs, and while that takes its memory over.
            std::thread::sleep(std::time::Duration::from_micros(50 * round));
            kill(child);
            assert_eq!(wait_for(child), End::Signal(libc::SIGKILL));
            assert_eq!(mm.home(memory.range()).count(PageOutcome::Moved), 2048);
            eventually("the frames come back", || mirror.frames_used() == 0);
            memory.check();
        }
        mm.close().unwrap();
        Ok(())
    });
}

#[test]
fn more_children_than_a_family_has_places_for_see_their_bytes() {
    isolated!(|| {
        let (mm, mirror) = hidden(64 << 20)?;
        let memory = Memory::new(256);
        memory.fill();
        let mut children = Vec::new();
        let (mut gate_out, mut gate_in) = std::io::pipe().unwrap();
        for _ in 0..70 {
            let _ = mirror.migrate(memory.range(), &MigrateOptions::default());
            children.push(fork_child(|| {
                // Until all are there.
                std::io::Read::read_exact(&mut gate_out, &mut [0]).unwrap();
                memory.check();
            }));
        }
        std::io::Write::write_all(&mut gate_in, &[0; 70]).unwrap();
        children.into_iter().for_each(|child| assert_eq!(wait_for(child), End::Exit(0)));
        memory.check();
        mm.close().unwrap();
        Ok(())
    });
}

#[test]
fn forks_among_faults_and_migrations() {
    isolated!(|| {
        let (_mm, mirror) = hidden(64 << 20)?;
        let memory = Memory::new(1024);
        memory.fill();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let addr = memory.start.addr();
        std::thread::scope(|s| {
            let reader = s.spawn(|| {
                let mut n = 0usize;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    n = (n * 5 + 1) % 1024;
                    let word = std::ptr::with_exposed_provenance::<u64>(addr + n * 4096);
                    // SAFETY: the page is mapped for the whole test, and nobody writes it.
                    assert_eq!(unsafe { word.read_volatile() }, stamp(n));
                }
            });
            for _ in 0..60 {
                let _ = mirror.migrate(memory.range(), &MigrateOptions::default());
                assert_eq!(in_child(|| memory.check()), End::Exit(0));
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            reader.join().expect("the reader saw only what was written");
        });
        memory.check();
        Ok(())
    });
}
