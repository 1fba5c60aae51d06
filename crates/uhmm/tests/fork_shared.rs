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

use crate::common::{Memory, Plain, stamp};

fn hidden(bytes: u64) -> Result<(Mm, Mirror<Plain>), Skip> {
    let mm = Mm::open_with(Setup { threads: Threads::Hidden, ..Setup::default() })
        .map_err(|error| Skip(format!("{error}")))?;
    if !mm.serves_kernel_faults() {
        return Err(Skip("kernel-mode faults are not served".into()));
    }
    let mirror = mm.register(Plain::sharing(bytes)).expect("room for a device");
    Ok((mm, mirror))
}

/// Forks; the child runs `body` and exits with 0 if it returns. Returns the child's wait status.
fn in_child(body: impl FnOnce()) -> i32 {
    // SAFETY: the child runs ordinary code of this process; its libc is made right by `fork` itself.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork failed");
    if pid == 0 {
        let ok = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_ok();
        // SAFETY: ends the child without running the parent's exit handlers.
        unsafe { libc::_exit(i32::from(!ok)) };
    }
    let mut status = 0;
    // SAFETY: waits for the child just made.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    status
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
        assert_eq!(status, 0);
        assert!(mm.pages_away() > 1900, "the fork brought {} pages home", 2048 - mm.pages_away());
        memory.check();
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
            // SAFETY: as in `in_child`.
            let pid = unsafe { libc::fork() };
            if pid == 0 {
                let ok = (0..512).all(|n| memory.get(n) == stamp(n) ^ round);
                (0..512).for_each(|n| memory.set(n, 1));
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(i32::from(!ok)) };
            }
            (0..512).for_each(|n| memory.set(n, memory.get(n).wrapping_add(1)));
            let mut status = 0;
            // SAFETY: waits for the child just made.
            unsafe { libc::waitpid(pid, &raw mut status, 0) };
            assert_eq!(status, 0, "round {round}: the child saw the parent's writes");
            (0..512).for_each(|n| assert_eq!(memory.get(n), (stamp(n) ^ round).wrapping_add(1), "round {round}"));
        }
        Ok(())
    });
}

#[test]
fn a_child_outlives_its_killed_parent() {
    isolated!(|| {
        let (_mm, _) = hidden(1 << 20)?;
        let mut pipe = [0; 2];
        // SAFETY: `pipe` has room for two descriptors.
        assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
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
            // SAFETY: as in `in_child`.
            let pid = unsafe { libc::fork() };
            if pid == 0 {
                // SAFETY: asks the kernel for the parent's number.
                let parent = || unsafe { libc::getppid() };
                while parent() == me {
                    std::thread::yield_now();
                }
                let ok = (0..1024).all(|n| memory.get(n) == stamp(n));
                let byte = [u8::from(ok)];
                // SAFETY: one byte of a live array.
                unsafe { libc::write(pipe[1], byte.as_ptr().cast(), 1) };
                // SAFETY: ends the grandchild at once.
                unsafe { libc::_exit(0) };
            }
            // SAFETY: kills the calling process.
            unsafe { libc::kill(me, libc::SIGKILL) };
        });
        assert_eq!(status & 0x7f, libc::SIGKILL);
        let mut byte = [9u8];
        // SAFETY: one byte of a live array.
        assert_eq!(unsafe { libc::read(pipe[0], byte.as_mut_ptr().cast(), 1) }, 1);
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
            assert_eq!(status, 0);
            assert_eq!(memory.get(1), stamp(1));
            memory.check_but(0, 100);
        });
        assert_eq!(status, 0);
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
            assert_eq!(status, 0);
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
enum End {
    Exit,
    Killed,
    Exec,
}

#[test]
fn frames_of_a_child_that_has_ended_come_back() {
    isolated!(|| {
        let (mm, mirror) = hidden(64 << 20)?;
        let memory = Memory::new(2048);
        memory.fill();
        for end in [End::Exit, End::Killed, End::Exec] {
            let sent = mirror.migrate(memory.range(), &MigrateOptions::default());
            assert_eq!(sent.count(PageOutcome::Moved), 2048, "{end:?}");
            let (mut is_there, mut tell) = std::io::pipe().unwrap();
            // SAFETY: the child runs ordinary code of this process; its libc is made right by `fork` itself.
            let pid = unsafe { libc::fork() };
            assert!(pid >= 0, "fork failed");
            if pid == 0 {
                assert_eq!(memory.get(5), stamp(5));
                std::io::Write::write_all(&mut tell, &[0]).unwrap();
                match end {
                    // SAFETY: ends the child without running the parent's exit handlers.
                    End::Exit => unsafe { libc::_exit(0) },
                    End::Killed => loop {
                        std::thread::park();
                    },
                    End::Exec => {
                        // It lives on, as another program.
                        let argv = [c"sleep".as_ptr(), c"60".as_ptr(), std::ptr::null()];
                        // SAFETY: strings that end, in a list that ends.
                        unsafe { libc::execvp(argv[0], argv.as_ptr()) };
                        // SAFETY: as above.
                        unsafe { libc::_exit(1) };
                    }
                }
            }
            // One that is killed before it runs keeps what it has.
            std::io::Read::read_exact(&mut is_there, &mut [0]).unwrap();
            assert_eq!(mm.home(memory.range()).count(PageOutcome::Moved), 2048);
            if matches!(end, End::Killed) {
                assert!(mirror.frames_used() > 1900, "the child has its part");
                // SAFETY: the child just made.
                assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
            }
            let start = std::time::Instant::now();
            while mirror.frames_used() != 0 {
                let used = mirror.frames_used();
                assert!(start.elapsed().as_secs() < 30, "{end:?}: {used} frames of a child that has ended are in use");
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            if matches!(end, End::Exec) {
                // SAFETY: the child just made.
                assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
            }
            // SAFETY: waits for the child just made.
            assert_eq!(unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) }, pid);
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
        let (gate_out, mut gate_in) = std::io::pipe().unwrap();
        for _ in 0..70 {
            let _ = mirror.migrate(memory.range(), &MigrateOptions::default());
            // SAFETY: the child runs ordinary code of this process; its libc is made right by `fork` itself.
            let pid = unsafe { libc::fork() };
            assert!(pid >= 0, "fork failed");
            if pid == 0 {
                drop(gate_in);
                // Until all are there.
                let mut gate = gate_out;
                let mut byte = [0];
                let waited = std::io::Read::read(&mut gate, &mut byte).is_ok();
                let ok = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| memory.check())).is_ok();
                // SAFETY: ends the child without running the parent's exit handlers.
                unsafe { libc::_exit(i32::from(!(ok && waited))) };
            }
            children.push(pid);
        }
        std::io::Write::write_all(&mut gate_in, &[0]).unwrap();
        drop(gate_in);
        for pid in children {
            let mut status = 0;
            // SAFETY: waits for a child made above.
            assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
            assert_eq!(status, 0);
        }
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
                assert_eq!(in_child(|| memory.check()), 0);
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            reader.join().expect("the reader saw only what was written");
        });
        memory.check();
        Ok(())
    });
}
