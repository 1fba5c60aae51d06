//! Processes that come out of one with pages away: fork by libc and by the bare system call, vfork, spawn, exec, exit.
//
// UNSAFETY: the tests make, change and watch memory by raw system calls and pointers.

#![allow(unsafe_code, reason = "tests make the memory that they then watch")]

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::{
    ffi::CString,
    io::{Read, Write},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

use uhmm::Mm;
use uhmm_testkit::{Skip, isolated};

use crate::common::kit::{
    Area, BLOCK, End, PAGE, SHAPES, Shape, Via, World, expect_page, fork_child, has_fork_events, map, peek, pointer,
    poke, raw_fork_child, wait_for, write_page,
};

type Fork<'a> = fn(&mut dyn FnMut()) -> i32;

fn by_libc(f: &mut dyn FnMut()) -> i32 {
    fork_child(f)
}

fn by_system_call(f: &mut dyn FnMut()) -> i32 {
    raw_fork_child(f)
}

/// The ways to fork that must be right here.
fn forks() -> Vec<(&'static str, Fork<'static>)> {
    let mut forks: Vec<(&str, Fork<'_>)> = vec![("libc", by_libc)];
    if has_fork_events() {
        forks.push(("system call", by_system_call));
    } else {
        println!("skip: forks by a bare system call raise no event here (CAP_SYS_PTRACE)");
    }
    forks
}

/// A pipe of this test: what is written to `.1` is read from `.0`.
fn pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    std::io::pipe().unwrap()
}

#[test]
fn a_child_sees_the_bytes_of_the_fork_and_neither_sees_the_others_writes() {
    isolated!(|| {
        let world = World::new(32)?;
        for (how, fork) in forks() {
            for shape in SHAPES {
                println!("{how} {shape:?}");
                let area = Area::filled(shape, 2, 1);
                // Some away, some here, some never touched.
                let mixed = Area::new(shape, 1);
                (0..512).step_by(3).for_each(|n| write_page(mixed.page(n), 5, n));
                world.send(&area);
                world.migrate(&mixed.part(100..300));
                let (mut go, mut tell) = pipe();
                let child = fork(&mut || {
                    go.read_exact(&mut [0]).unwrap();
                    area.check(1);
                    for n in 0..512 {
                        if n % 3 == 0 { expect_page(mixed.page(n), 5, n) } else { assert_eq!(peek(mixed.page(n)), 0) }
                    }
                    area.fill(3);
                    area.check(3);
                });
                area.fill(2);
                world.migrate(&area);
                tell.write_all(b"!").unwrap();
                assert_eq!(wait_for(child), End::Exit(0));
                area.check(2);
                area.unmap();
                mixed.unmap();
            }
        }
        world.finish();
        Ok(())
    });
}

#[test]
fn a_child_has_its_bytes_when_the_parent_is_killed_at_once() {
    isolated!(|| {
        // Here nothing may be set up before the middle process, whose engine it is.
        for shape in SHAPES {
            for round in 0..10u64 {
                let (mut answer, mut tell) = pipe();
                let middle = fork_child(|| {
                    let Ok(world) = World::new(32) else {
                        tell.write_all(b"s").unwrap();
                        return;
                    };
                    let area = Area::filled(shape, 2, round);
                    world.send(&area);
                    let parent = std::process::id();
                    let grandchild = fork_child(|| {
                        // Until the parent is dead and this process somebody else's.
                        while std::os::unix::process::parent_id() == parent {
                            std::thread::yield_now();
                        }
                        let right = std::panic::catch_unwind(|| area.check(round)).is_ok();
                        tell.write_all(if right { b"y" } else { b"n" }).unwrap();
                    });
                    assert!(grandchild > 0);
                    // SAFETY: kills this process.
                    unsafe { libc::raise(libc::SIGKILL) };
                });
                drop(tell);
                let end = wait_for(middle);
                let mut byte = [0];
                answer.read_exact(&mut byte).expect("an answer");
                if byte[0] == b's' {
                    return Err(Skip("there is no userfaultfd to be had here".to_owned()));
                }
                assert_eq!((end, byte[0]), (End::Signal(libc::SIGKILL), b'y'), "{shape:?} round {round}");
            }
        }
        Ok(())
    });
}

/// Pairs of counters, one after the other: the first is never behind the second, nor more than one ahead.
struct Counters {
    area: Area,
    next: AtomicU64,
}

impl Counters {
    fn at(&self, n: usize) -> [&AtomicU64; 2] {
        let word = |addr: usize| {
            let word: *const AtomicU64 = pointer(addr);
            // SAFETY: inside the area, aligned, zero or written as such, and only ever used atomically.
            unsafe { &*word }
        };
        [word(self.area.page(n) + 128), word(self.area.page(n) + 4000)]
    }

    /// Counts in pages that only this thread counts in.
    fn run(&self, stop: &AtomicBool, threads: usize) {
        let me = usize::try_from(self.next.fetch_add(1, Relaxed)).unwrap();
        let mut n = me;
        while !stop.load(Relaxed) {
            n = (n + threads * 7) % self.area.pages;
            for word in self.at(n) {
                word.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            }
        }
    }

    fn read(&self) -> Vec<[u64; 2]> {
        // The second first: it never gets ahead of the first.
        (0..self.area.pages).map(|n| self.at(n).map(|w| w.load(std::sync::atomic::Ordering::SeqCst))).collect()
    }
}

/// Forks `rounds` times while threads count and pages move; each child must see a moment between before and after.
fn fork_in_a_storm(world: &World, shape: Shape, rounds: usize, fork: Fork<'_>) {
    const THREADS: usize = 2;
    let counters = Counters { area: Area::filled(shape, 2, 0), next: AtomicU64::new(0) };
    counters.read().iter().enumerate().for_each(|(n, _)| counters.at(n).iter().for_each(|w| w.store(0, Relaxed)));
    let stop = AtomicBool::new(false);
    // What the child compares with must not move with the storm: it is written before the fork, by this thread.
    std::thread::scope(|s| {
        for _ in 0..THREADS {
            s.spawn(|| counters.run(&stop, THREADS));
        }
        s.spawn(|| {
            let mut n = 0;
            while !stop.load(Relaxed) {
                n = (n + 97) % 900;
                world.migrate(&counters.area.part(n..n + 100));
                if n % 5 == 0 {
                    let _ = world.mm.home(counters.area.part(n..n + 50).range());
                }
            }
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for round in 0..rounds {
                let before = counters.read();
                let (mut answer, mut tell) = pipe();
                let child = fork(&mut || {
                    let mut bytes = Vec::new();
                    for (n, (seen, before)) in counters.read().iter().zip(&before).enumerate() {
                        assert!(seen[0] >= before[0] && seen[1] >= before[1], "page {n}: {seen:?} after {before:?}");
                        assert!(seen[0] == seen[1] || seen[0] == seen[1] + 1, "page {n}: torn: {seen:?}");
                        bytes.extend(seen[0].to_ne_bytes());
                    }
                    tell.write_all(&bytes).unwrap();
                });
                let after = counters.read();
                drop(tell);
                let mut bytes = Vec::new();
                answer.read_to_end(&mut bytes).unwrap();
                assert_eq!(wait_for(child), End::Exit(0), "round {round}");
                assert_eq!(bytes.len(), after.len() * 8);
                for (n, (seen, after)) in bytes.chunks(8).zip(&after).enumerate() {
                    let seen = u64::from_ne_bytes(seen.try_into().unwrap());
                    assert!(
                        seen <= after[0],
                        "page {n}: the child saw {seen}, which the parent wrote later: {after:?}"
                    );
                }
            }
        }));
        stop.store(true, Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
    counters.area.unmap();
}

#[test]
fn libc_forks_in_a_storm_of_faults_and_migrations() {
    isolated!(std::time::Duration::from_secs(300), || {
        // The child's libc writes to pages before anybody could bring them: reading and writing a pipe.
        let world = World::with_kernel_faults(32)?;
        for shape in SHAPES {
            fork_in_a_storm(&world, shape, 50, by_libc);
        }
        world.finish();
        Ok(())
    });
}

#[test]
fn bare_forks_in_a_storm_of_faults_and_migrations() {
    isolated!(std::time::Duration::from_secs(300), || {
        let world = World::with_kernel_faults(32)?;
        if !has_fork_events() {
            return Err(Skip("forks by a bare system call raise no event here (CAP_SYS_PTRACE)".to_owned()));
        }
        for shape in SHAPES {
            fork_in_a_storm(&world, shape, 50, by_system_call);
        }
        world.finish();
        Ok(())
    });
}

#[test]
fn children_of_children_use_engines_of_their_own() {
    isolated!(|| {
        let world = World::new(16)?;
        fn descend(depth: u64, inherited: &Area) {
            inherited.check(depth);
            inherited.fill(depth + 1);
            let world = World::new(16).unwrap_or_else(|_| panic!("an engine in generation {depth}"));
            assert_eq!(world.mm.pages_away(), 0, "generation {depth} inherits no pages away");
            let own = Area::filled(Shape::Small, 1, 40 + depth);
            world.send(inherited);
            world.send(&own);
            if depth < 5 {
                let child = fork_child(|| {
                    own.check(40 + depth);
                    descend(depth + 1, inherited);
                });
                assert_eq!(wait_for(child), End::Exit(0), "generation {}", depth + 1);
            }
            inherited.check(depth + 1);
            own.check(40 + depth);
            world.finish();
        }
        let area = Area::filled(Shape::Small, 1, 1);
        world.send(&area);
        let child = fork_child(|| descend(1, &area));
        area.check(1);
        assert_eq!(wait_for(child), End::Exit(0));
        world.finish();
        Ok(())
    });
}

#[test]
fn a_child_that_uses_no_engine_is_an_ordinary_process() {
    isolated!(|| {
        let world = World::new(16)?;
        let area = Area::filled(Shape::Huge, 2, 1);
        world.send(&area);
        let child = fork_child(|| {
            // It has one thread, and no device: only memory.
            assert_eq!(std::fs::read_dir("/proc/self/task").unwrap().count(), 1);
            for round in 0..20 {
                area.fill(round);
                assert_eq!(Via::Libc.madvise(area.start, 100 * PAGE, libc::MADV_DONTNEED), 0);
                area.part(0..100).check_zero();
                area.part(100..1024).check_from(round, 100);
            }
            area.unmap();
            map(area.start, area.len(), libc::PROT_READ, libc::MAP_FIXED_NOREPLACE);
            area.check_zero();
        });
        assert_eq!(wait_for(child), End::Exit(0));
        area.check(1);
        world.finish();
        Ok(())
    });
}

#[test]
fn fork_advice_is_obeyed_for_pages_that_are_away() {
    isolated!(|| {
        let world = World::new(16)?;
        for (how, fork) in forks() {
            for shape in SHAPES {
                println!("{how} {shape:?}");
                let (wiped, left_out) = (Area::filled(shape, 1, 1), Area::filled(shape, 1, 2));
                world.send(&wiped);
                world.send(&left_out);
                assert_eq!(Via::Libc.madvise(wiped.start, wiped.len(), libc::MADV_WIPEONFORK), 0);
                assert_eq!(Via::Libc.madvise(left_out.start, left_out.len(), libc::MADV_DONTFORK), 0);
                let child = fork(&mut || {
                    // Nobody tells the engine that the kernel wiped it: after a bare fork the child has the bytes.
                    if how == "libc" {
                        wiped.check_zero();
                    }
                    let gone = map(left_out.start, left_out.len(), libc::PROT_READ, libc::MAP_FIXED_NOREPLACE);
                    assert_eq!(gone, left_out.start);
                    left_out.check_zero();
                });
                assert_eq!(wait_for(child), End::Exit(0));
                wiped.check(1);
                left_out.check(2);
                wiped.unmap();
                left_out.unmap();
            }
        }
        world.finish();
        Ok(())
    });
}

#[test]
fn programs_start_from_a_process_with_pages_away() {
    isolated!(|| {
        let world = World::with_kernel_faults(64)?;
        for shape in SHAPES {
            let area = Area::filled(shape, 2, 1);
            for round in 0..10 {
                world.send(&area);
                send_heap(&world);
                // posix_spawn, or vfork and exec.
                let out = Command::new("/bin/sh").args(["-c", "echo $0 $1", "spawned", &round.to_string()]).output();
                assert_eq!(out.unwrap().stdout, format!("spawned {round}\n").into_bytes());
                world.send(&area);
                send_heap(&world);
                // Something to do between fork and exec: an ordinary fork.
                let mut command = Command::new("/bin/sh");
                command.args(["-c", "exit 7"]).stdin(Stdio::null());
                // SAFETY: the function touches memory of the test only.
                unsafe {
                    command.pre_exec(move || {
                        expect_page(area.page(700), 1, 700);
                        Ok(())
                    })
                };
                assert_eq!(command.status().unwrap().code(), Some(7));
                world.send(&area);
                send_heap(&world);
                let text = CString::new(format!("exit {round}")).unwrap();
                // SAFETY: a string that outlives the call.
                let status = unsafe { libc::system(text.as_ptr()) };
                assert!(libc::WIFEXITED(status));
                assert_eq!(libc::WEXITSTATUS(status), round);
            }
            area.check(1);
            area.unmap();
        }
        world.finish();
        Ok(())
    });
}

/// Moves what of the heap can move, so that arguments of system calls are away.
fn send_heap(world: &World) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.ends_with("[heap]")).expect("a heap");
    let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
    let [start, end] = [start, end].map(|hex| usize::from_str_radix(hex, 16).unwrap());
    world.migrate(&Area { start, pages: (end - start) / PAGE });
}

#[test]
fn a_vfork_child_runs_in_memory_that_is_away() {
    isolated!(|| {
        let world = World::with_kernel_faults(16)?;
        let area = Area::filled(Shape::Small, 1, 1);
        let arguments = Area::filled(Shape::Small, 1, 2);
        for round in 0..20u64 {
            // The program's name, its arguments and their list, all on pages that are away.
            let strings = ["/bin/sh", "-c", "test \"$0\" = away", "away"];
            let mut at = arguments.start + PAGE;
            for (n, text) in strings.iter().enumerate() {
                poke(arguments.start + n * 8, at as u64);
                text.bytes().chain([0]).for_each(|byte| {
                    // SAFETY: inside the area.
                    unsafe { pointer::<u8>(at).write_volatile(byte) };
                    at += 1;
                });
                at = at.next_multiple_of(PAGE);
            }
            poke(arguments.start + strings.len() * 8, 0);
            poke(arguments.start + 64, 0);
            let path = usize::try_from(peek(arguments.start)).unwrap();
            world.send(&area);
            world.send(&arguments);
            let (list, environment) = (pointer(arguments.start), pointer(arguments.start + 64));
            // SAFETY: the child touches memory that stays as it is, and then becomes another program or ends.
            #[expect(deprecated, reason = "it is what is tested")]
            let pid = unsafe { libc::vfork() };
            if pid == 0 {
                poke(area.page(100), round);
                // SAFETY: strings and lists as `execve` wants them.
                unsafe { libc::execve(pointer(path), list, environment) };
                // SAFETY: ends the child, whose stack is the parent's.
                unsafe { libc::_exit(99) };
            }
            assert!(pid > 0);
            assert_eq!(peek(area.page(100)), round, "the child's memory is the parent's");
            assert_eq!(wait_for(pid), End::Exit(0));
        }
        world.finish();
        Ok(())
    });
}

#[test]
fn exec_and_exit_and_death_with_pages_away() {
    isolated!(|| {
        let check = fork_child(|| drop(Mm::open()));
        wait_for(check);
        if let Err(error) = Mm::open() {
            return Err(Skip(format!("{error}")));
        }
        let with_pages_away = |f: &dyn Fn(&World)| {
            wait_for(fork_child(|| {
                let world = World::new(32).unwrap_or_else(|_| panic!("an engine"));
                let area = Area::filled(Shape::Small, 4, 1);
                world.send(&area);
                f(&world);
            }))
        };
        let exec = |_: &World| {
            let error = Command::new("/bin/sh").args(["-c", "exit 7"]).exec();
            panic!("exec: {error}");
        };
        assert_eq!(with_pages_away(&exec), End::Exit(7));
        // SAFETY: ends the child.
        assert_eq!(with_pages_away(&|_| unsafe { libc::exit(5) }), End::Exit(5));
        // SAFETY: ends the child.
        assert_eq!(with_pages_away(&|_| unsafe { libc::_exit(6) }), End::Exit(6));
        for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGINT] {
            let die = |_: &World| {
                // SAFETY: the default is wanted, then sent.
                unsafe { libc::signal(signal, libc::SIG_DFL) };
                // SAFETY: as above.
                unsafe { libc::raise(signal) };
            };
            assert_eq!(with_pages_away(&die), End::Signal(signal));
        }
        let crash = |_: &World| {
            // SAFETY: the default is wanted.
            unsafe { libc::signal(libc::SIGSEGV, libc::SIG_DFL) };
            let hole = map(0, BLOCK, libc::PROT_NONE, 0);
            poke(hole, 1);
        };
        assert_eq!(with_pages_away(&crash), End::Signal(libc::SIGSEGV));
        Ok(())
    });
}

#[test]
fn threads_end_while_what_they_use_is_away() {
    isolated!(|| {
        let world = World::with_kernel_faults(32)?;
        let area = Area::filled(Shape::Small, 2, 1);
        for round in 0..50 {
            world.send(&area);
            // Threads whose stacks and results are away when they end.
            let threads: Vec<_> = (0..4)
                .map(|t| {
                    std::thread::spawn(move || {
                        let local = [round + t; 5000];
                        expect_page(area.page(t * 100), 1, t * 100);
                        std::hint::black_box(&local).iter().sum::<usize>()
                    })
                })
                .collect();
            send_heap(&world);
            for (t, thread) in threads.into_iter().enumerate() {
                assert_eq!(thread.join().unwrap(), (round + t) * 5000);
            }
        }
        area.check(1);
        world.finish();
        Ok(())
    });
}

#[test]
fn a_fork_by_one_thread_does_not_stop_the_others() {
    isolated!(|| {
        let world = World::new(16)?;
        let area = Area::filled(Shape::Small, 1, 1);
        let (stop, touched) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|s| {
            s.spawn(|| {
                let mut n = 0;
                while !stop.load(Relaxed) {
                    n = (n + 13) % 512;
                    expect_page(area.page(n), 1, n);
                    touched.fetch_add(1, Relaxed);
                }
            });
            for _ in 0..30 {
                world.migrate(&area);
                assert_eq!(wait_for(fork_child(|| area.check(1))), End::Exit(0));
                let before = touched.load(Relaxed);
                common::eventually("the other thread goes on", || touched.load(Relaxed) > before);
            }
            stop.store(true, Relaxed);
        });
        world.finish();
        Ok(())
    });
}
