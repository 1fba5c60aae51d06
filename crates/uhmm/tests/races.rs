//! Programs that change their memory in every way while it moves in every way. Each thread knows what each of its own
//! pages must hold; whoever else moves them may not be noticed.
//!
//! What is done is chosen at random from a seed, which is printed; `UHMM_SEED` sets it and `UHMM_RACE_SECONDS` how long.
//
// UNSAFETY: the tests make, change and watch memory by raw system calls and pointers.

#![allow(unsafe_code, reason = "tests make the memory that they then watch")]

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use uhmm::{
    DeviceFaultPolicy, FaultError, MigrateOptions, Mirror, Mm,
    addr::PageRange,
    device_table::Access,
    mm::{Setup, Threads},
};
use uhmm_testkit::{Skip, isolated};

use crate::common::{
    Plain,
    kit::{
        Area, BLOCK, End, PAGE, RW, Random, Shape, Via, WAYS, fork_child, has_fork_events, has_move, map, open,
        page_error, peek, raw_fork_child, syscall, unmap, virt, wait_for, write_page,
    },
};

/// What a page holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    Zero,
    /// What [`write_page`] wrote with this tag and number.
    Stamp(u64, usize),
}

/// Where a thread maps its memory.
///
/// Pages that cannot leave by `UFFDIO_MOVE` may not be mapped at the very moment at which another thread has unmapped what
/// was there (see docs/soundness.md): each thread then has addresses of its own.
#[derive(Debug, Clone, Copy)]
struct Pool(Option<usize>);

impl Pool {
    fn new(thread: u64, rules: &Rules) -> Self {
        let first = usize::try_from(thread + 1).unwrap() << 36;
        Self((rules.protects || !has_move()).then_some(first))
    }

    fn map(&self, len: usize, random: &mut Random) -> usize {
        let Some(first) = self.0 else { return map(0, len, RW, 0) };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        // The last mapping may still be there.
        (0..100)
            .find_map(|_| Via::Libc.mmap(first + random.below(1 << 11) * (1 << 25), len, RW, flags, -1).ok())
            .expect("most of the addresses are free")
    }
}

/// Memory of one thread, and what it knows of it.
struct Own {
    pool: Pool,
    area: Area,
    pages: Vec<Holds>,
    read_only: bool,
}

impl Own {
    fn new(pool: Pool, random: &mut Random) -> Self {
        let pages = 1 + random.below(1200);
        let shape = if random.below(2) == 0 { Shape::Small } else { Shape::Huge };
        let len = pages * PAGE;
        let start = pool.map(len, random);
        if shape == Shape::Huge {
            Via::Libc.madvise(start, len, libc::MADV_HUGEPAGE);
        }
        Self { pool, area: Area { start, pages }, pages: vec![Holds::Zero; pages], read_only: false }
    }

    fn check(&self, n: usize) {
        let addr = self.area.page(n);
        let error = match self.pages[n] {
            Holds::Stamp(tag, number) => page_error(addr, tag, number),
            Holds::Zero => [0, 1096, 4088]
                .into_iter()
                .find_map(|w| (peek(addr + w) != 0).then(|| format!("{:#x} is not zero", addr + w))),
        };
        if let Some(error) = error {
            panic!("page {n} of {:?}, which should hold {:?}: {error}", self.area, self.pages[n]);
        }
    }

    fn check_all(&self) {
        (0..self.area.pages).for_each(|n| self.check(n));
    }

    fn some(&self, random: &mut Random) -> std::ops::Range<usize> {
        let first = random.below(self.area.pages);
        let most = self.area.pages - first;
        let count = 1 + if random.below(3) == 0 { random.below(most) } else { random.below(most.min(40)) };
        first..first + count
    }
}

/// What the threads of a test do.
#[derive(Debug, Clone, Copy)]
struct Rules {
    seed: u64,
    seconds: u64,
    owners: u64,
    movers: u64,
    /// One operation in so many is a fork; 0 for none.
    forks: usize,
    /// Forks by the bare system call, where it is seen.
    bare_forks: bool,
    system_calls: bool,
    /// Memory is read-only at times.
    protects: bool,
}

impl Rules {
    fn new() -> Self {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let seed = number("UHMM_SEED").unwrap_or(u64::from(now.subsec_nanos()));
        println!("UHMM_SEED={seed}");
        let seconds = number("UHMM_RACE_SECONDS").unwrap_or(3);
        Self { seed, seconds, owners: 2, movers: 2, forks: 0, bare_forks: false, system_calls: false, protects: true }
    }
}

/// Stops the other threads of a test where it ends, also by a panic.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

struct Race<'a> {
    mm: &'a Mm,
    mirrors: &'a [Mirror<Plain>],
    rules: Rules,
    /// Where the owners' memory is, or was a moment ago.
    places: Mutex<Vec<Area>>,
    stop: AtomicBool,
    operations: AtomicU64,
    /// Mappings that moved or changed their size.
    moved: AtomicU64,
}

impl Race<'_> {
    fn run(&self) {
        let start = Instant::now();
        let failed = Mutex::new(None);
        let guarded = |f: &dyn Fn()| {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(f)) {
                self.stop.store(true, Relaxed);
                failed.lock().unwrap().get_or_insert(panic);
            }
        };
        let guarded = &guarded;
        std::thread::scope(|s| {
            for n in 0..self.rules.owners {
                s.spawn(move || guarded(&|| self.own(n)));
            }
            for n in 0..self.rules.movers {
                s.spawn(move || guarded(&|| self.move_about(100 + n)));
            }
            while !self.stop.load(Relaxed) && start.elapsed() < Duration::from_secs(self.rules.seconds) {
                std::thread::sleep(Duration::from_millis(10));
            }
            self.stop.store(true, Relaxed);
        });
        if let Some(panic) = failed.into_inner().unwrap() {
            resume_unwind(panic);
        }
        let done = self.operations.load(Relaxed);
        let out = self.mm.stats().get(uhmm::trace::Counter::PagesOut);
        println!("{done} operations, {} mappings moved, {out} pages out", self.moved.load(Relaxed));
        assert!(done > 100, "only {done} operations in {} s", self.rules.seconds);
    }

    /// An owner's life.
    fn own(&self, n: u64) {
        let mut random = Random::new(self.rules.seed.wrapping_mul(31).wrapping_add(n));
        let slot = {
            let mut places = self.places.lock().unwrap();
            places.push(Area { start: 0, pages: 1 });
            places.len() - 1
        };
        let mut own = Own::new(Pool::new(n, &self.rules), &mut random);
        let mut tag = n << 24;
        while !self.stop.load(Relaxed) {
            self.places.lock().unwrap()[slot] = own.area;
            for _ in 0..20 {
                tag += 1;
                self.change(&mut own, &mut random, tag);
                self.operations.fetch_add(1, Relaxed);
            }
        }
        own.check_all();
        unmap(own.area.start, own.area.len());
    }

    fn change(&self, own: &mut Own, random: &mut Random, tag: u64) {
        let via = WAYS[random.below(2)];
        let some = own.some(random);
        let part = own.area.part(some.clone());
        let protect = |own: &mut Own, read_only: bool| {
            let prot = if read_only { libc::PROT_READ } else { RW };
            assert_eq!(via.mprotect(own.area.start, own.area.len(), prot), 0);
            own.read_only = read_only;
        };
        if self.rules.forks != 0 && random.below(self.rules.forks) == 0 {
            let check = || own.check_all();
            let child = if self.rules.bare_forks { raw_fork_child(check) } else { fork_child(check) };
            own.check_all();
            assert_eq!(wait_for(child), End::Exit(0));
            return;
        }
        match random.below(20) {
            0..=5 => some.for_each(|n| own.check(n)),
            6..=10 => {
                if own.read_only {
                    protect(own, false);
                }
                for n in some {
                    write_page(own.area.page(n), tag, n);
                    own.pages[n] = Holds::Stamp(tag, n);
                }
            }
            11 => {
                assert_eq!(via.madvise(part.start, part.len(), libc::MADV_DONTNEED), 0);
                some.for_each(|n| own.pages[n] = Holds::Zero);
            }
            12 => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                let prot = if own.read_only { libc::PROT_READ } else { RW };
                assert_eq!(via.mmap(part.start, part.len(), prot, flags, -1), Ok(part.start));
                some.for_each(|n| own.pages[n] = Holds::Zero);
            }
            13 => {
                // The tail goes.
                if some.start > 0 {
                    let tail = own.area.part(some.start..own.area.pages);
                    assert_eq!(via.munmap(tail.start, tail.len()), 0);
                    own.area.pages = some.start;
                    own.pages.truncate(some.start);
                }
            }
            14 | 15 => self.remap(own, random, via),
            16 if self.rules.protects => {
                let read_only = !own.read_only;
                protect(own, read_only);
            }
            17 => {
                assert_eq!(via.munmap(own.area.start, own.area.len()), 0);
                *own = Own::new(own.pool, random);
            }
            18 if self.rules.system_calls => self.system_call(own, &part, some.start),
            _ => {
                // A quick look and change everywhere.
                if !own.read_only {
                    for n in (random.below(7)..own.area.pages).step_by(7) {
                        own.check(n);
                        write_page(own.area.page(n), tag, n);
                        own.pages[n] = Holds::Stamp(tag, n);
                    }
                }
            }
        }
    }

    /// Moves the memory somewhere else, larger or smaller. The kernel refuses where registration has cut the mapping in
    /// pieces, and must then have changed nothing: a move to a given place that does not grow may stop half-way.
    fn remap(&self, own: &mut Own, random: &mut Random, via: Via) {
        let grown = own.area.pages + 1 + random.below(300);
        let (pages, moved) = if own.pool.0.is_none() && random.below(2) == 0 {
            let pages = if random.below(3) == 0 { 1 + random.below(own.area.pages) } else { grown };
            (pages, via.mremap(own.area.start, own.area.len(), pages * PAGE, libc::MREMAP_MAYMOVE, 0))
        } else {
            // To any page offset within a block, over a mapping that was made for it.
            let room = own.pool.map(grown * PAGE + BLOCK, random);
            let to = room + random.below(512) * PAGE;
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let moved = via.mremap(own.area.start, own.area.len(), grown * PAGE, flags, to);
            if moved.is_err() {
                unmap(room, grown * PAGE + BLOCK);
                return;
            }
            if to > room {
                unmap(room, to - room);
            }
            unmap(to + grown * PAGE, room + BLOCK - to);
            (grown, moved)
        };
        self.moved.fetch_add(u64::from(moved.is_ok()), Relaxed);
        let Ok(start) = moved else { return };
        own.area = Area { start, pages };
        own.pages.resize(pages, Holds::Zero);
    }

    /// The kernel reads pages, and writes them to others.
    fn system_call(&self, own: &mut Own, part: &Area, first: usize) {
        let len = part.len().min(16 * PAGE);
        let copy = map(0, len, RW, 0);
        let (local, remote) = ([copy, len], [part.start, len]);
        let vectors = (local.as_ptr().expose_provenance(), remote.as_ptr().expose_provenance());
        let pid = std::process::id() as usize;
        let read = syscall(libc::SYS_process_vm_readv, [pid, vectors.0, 1, vectors.1, 1, 0]);
        assert_eq!(read, Ok(len));
        for n in 0..len / PAGE {
            if let Holds::Stamp(tag, number) = own.pages[first + n]
                && let Some(error) = page_error(copy + n * PAGE, tag, number)
            {
                panic!("page {} as the kernel read it: {error}", first + n);
            }
        }
        unmap(copy, len);
    }

    /// The life of a thread that moves what is not its own.
    fn move_about(&self, n: u64) {
        let mut random = Random::new(self.rules.seed.wrapping_mul(31).wrapping_add(n));
        while !self.stop.load(Relaxed) {
            let place = {
                let places = self.places.lock().unwrap();
                if places.is_empty() {
                    continue;
                }
                places[random.below(places.len())]
            };
            if place.start == 0 {
                continue;
            }
            let first = random.below(place.pages);
            let count = 1 + random.below(place.pages - first);
            let range = PageRange::new(virt(place.start + first * PAGE), (count * PAGE) as u64).unwrap();
            let mirror = &self.mirrors[random.below(self.mirrors.len())];
            let options = MigrateOptions {
                holes: random.below(2) == 0,
                from_other_devices: random.below(2) == 0,
                all_or_nothing: random.below(8) == 0,
                obey_residency: random.below(4) == 0,
            };
            match random.below(10) {
                0..=4 => drop(mirror.migrate(range, &options)),
                5 => drop(self.mm.home(range)),
                6 => drop(mirror.exclusive(range)),
                7 => {
                    let _ = mirror.evict(u32::try_from(random.below(2000)).unwrap());
                }
                8 => drop(mirror.snapshot(range).expect("a snapshot never fails")),
                _ => {
                    let access = [Access::Read, Access::Write, Access::Atomic][random.below(3)];
                    let policy = [DeviceFaultPolicy::Map, DeviceFaultPolicy::Migrate][random.below(2)];
                    match mirror.port().expect("it is registered").fault(range.start(), access, policy) {
                        Ok(_) | Err(FaultError::NoVma { .. } | FaultError::Denied { .. }) => {}
                        Err(
                            FaultError::TimedOut { .. } | FaultError::Kernel { .. } | FaultError::NotExclusive { .. },
                        ) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            }
            self.operations.fetch_add(1, Relaxed);
        }
    }
}

fn race(mm: Mm, mirrors: Vec<Mirror<Plain>>, rules: Rules) {
    let race = Race {
        mm: &mm,
        mirrors: &mirrors,
        rules,
        places: Mutex::new(Vec::new()),
        stop: AtomicBool::new(false),
        operations: AtomicU64::new(0),
        moved: AtomicU64::new(0),
    };
    race.run();
    finish(mm, mirrors);
}

/// Ends the use of everything. A device from whose frames one was lost, or freed too often, cannot go.
fn finish(mm: Mm, mirrors: Vec<Mirror<Plain>>) {
    for mirror in mirrors {
        let (used, away) = (mirror.frames_used(), mm.pages_away());
        let left = mirror.close();
        assert!(left.is_ok(), "{left:?}: {used} frames were in use and {away} pages away; now {}", mm.pages_away());
    }
    mm.close().unwrap();
}

/// Two devices, the second of which is often full, and one whose memory the CPU can address.
fn devices(mm: &Mm) -> Vec<Mirror<Plain>> {
    let devices = [Plain::new(64 << 20), Plain::new(6 << 20), Plain::coherent(16 << 20)];
    devices.map(|device| mm.register(device).expect("room for a device")).into()
}

#[test]
fn everything_at_once() {
    isolated!(|| {
        let mm = open()?;
        let mirrors = devices(&mm);
        let rules = Rules { system_calls: mm.serves_kernel_faults(), ..Rules::new() };
        race(mm, mirrors, rules);
        Ok(())
    });
}

#[test]
fn everything_at_once_with_more_threads_than_processors() {
    isolated!(|| {
        let mm = open()?;
        let mirrors = devices(&mm);
        let system_calls = mm.serves_kernel_faults();
        // Here threads map what others have just unmapped.
        let rules = Rules { owners: 6, movers: 3, system_calls, protects: false, ..Rules::new() };
        race(mm, mirrors, rules);
        Ok(())
    });
}

#[test]
fn everything_at_once_with_forks() {
    isolated!(|| {
        let mm = open()?;
        let mirrors = devices(&mm);
        race(mm, mirrors, Rules { forks: 60, ..Rules::new() });
        Ok(())
    });
}

#[test]
fn everything_at_once_with_bare_forks() {
    isolated!(|| {
        let mm = open()?;
        if !has_fork_events() {
            return Err(Skip("forks by a bare system call raise no event here (CAP_SYS_PTRACE)".to_owned()));
        }
        let mirrors = devices(&mm);
        race(mm, mirrors, Rules { forks: 60, bare_forks: true, ..Rules::new() });
        Ok(())
    });
}

#[test]
fn everything_at_once_under_stress_and_a_limit_on_ram() {
    isolated!(|| {
        let mm = open()?;
        let mirrors = devices(&mm);
        let rules = Rules { owners: 3, movers: 1, system_calls: mm.serves_kernel_faults(), ..Rules::new() };
        if !mm.serves_kernel_faults() {
            // A policy moves whatever there is, the program's stacks too.
            return Err(Skip("the userfaultfd here serves no faults of system calls".to_owned()));
        }
        mm.stress(rules.seed, None).unwrap();
        mm.keep_resident(16 << 20).unwrap();
        race(mm, mirrors, rules);
        Ok(())
    });
}

#[test]
fn everything_at_once_with_hidden_threads() {
    isolated!(|| {
        let setup = Setup { threads: Threads::Hidden, ..Setup::default() };
        let mm = Mm::open_with(setup).map_err(|error| Skip(error.to_string()))?;
        let mirrors = devices(&mm);
        let rules = Rules { forks: 100, system_calls: mm.serves_kernel_faults(), ..Rules::new() };
        race(mm, mirrors, rules);
        Ok(())
    });
}

#[test]
fn one_page_is_everybodys() {
    isolated!(|| {
        // Threads count in the words of one page, which moves, is shared and taken; no count is lost.
        let mm = open()?;
        let mirrors = devices(&mm);
        let rules = Rules::new();
        let area = Area::filled(Shape::Small, 1, 0);
        let page = area.page(200);
        let word = |n: usize| {
            let word: *const AtomicU64 = common::kit::pointer(page + 8 + n * 64);
            // SAFETY: inside the area, aligned, and only ever used atomically.
            unsafe { &*word }
        };
        let (stop, counted) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|s| {
            for n in 0..4 {
                let (stop, counted) = (&stop, &counted);
                s.spawn(move || {
                    let mut mine = 0;
                    while !stop.load(Relaxed) {
                        word(n % 2).fetch_add(1, Relaxed);
                        mine += 1;
                    }
                    counted.fetch_add(mine, Relaxed);
                });
            }
            let mut random = Random::new(rules.seed);
            let start = Instant::now();
            let one = PageRange::new(virt(page), PAGE as u64).unwrap();
            while start.elapsed() < Duration::from_secs(rules.seconds) {
                let mirror = &mirrors[random.below(mirrors.len())];
                match random.below(6) {
                    0..=2 => drop(mirror.migrate(one, &MigrateOptions::default())),
                    3 => drop(mirror.migrate(area.range(), &MigrateOptions::default())),
                    4 => drop(mirror.exclusive(one)),
                    _ => drop(mm.home(one)),
                }
            }
            stop.store(true, Relaxed);
        });
        assert_eq!(word(0).load(Relaxed) + word(1).load(Relaxed), counted.load(Relaxed));
        finish(mm, mirrors);
        Ok(())
    });
}

#[test]
fn what_is_mapped_where_pages_are_just_leaving_keeps_its_bytes() {
    isolated!(|| {
        // Read-only memory leaves by `mremap`, which does not see that another mapping has come there.
        let mm = open()?;
        let (mirrors, rules) = (devices(&mm), Rules::new());
        let area = Area { start: map(0, 8 * PAGE, RW, 0), pages: 8 };
        let stop = AtomicBool::new(false);
        let mut rounds = 0;
        std::thread::scope(|s| {
            for mirror in [&mirrors[0], &mirrors[1], &mirrors[0]] {
                let stop = &stop;
                s.spawn(move || {
                    while !stop.load(Relaxed) {
                        drop(mirror.migrate(area.range(), &MigrateOptions::default()));
                    }
                });
            }
            let (start, _stops) = (Instant::now(), Stops(&stop));
            while start.elapsed() < Duration::from_secs(rules.seconds) {
                rounds += 1;
                map(area.start, area.len(), RW, libc::MAP_FIXED);
                area.fill(rounds);
                assert_eq!(Via::Raw.mprotect(area.start, area.len(), libc::PROT_READ), 0);
                area.check(rounds);
            }
        });
        println!("{rounds} rounds");
        assert!(rounds > 100, "{rounds} rounds");
        area.unmap();
        finish(mm, mirrors);
        Ok(())
    });
}

#[test]
fn pages_shared_with_children_leave_while_they_are_protected_and_written() {
    isolated!(|| {
        // Where the kernel loses count of what it has moved.
        let mm = open()?;
        let (mirrors, rules) = (devices(&mm), Rules::new());
        let area = Area { start: map(0, 128 * PAGE, RW, 0), pages: 128 };
        let stop = AtomicBool::new(false);
        let mut rounds = 0;
        std::thread::scope(|s| {
            s.spawn(|| {
                let mut random = Random::new(rules.seed);
                while !stop.load(Relaxed) {
                    let first = random.below(20);
                    drop(mirrors[0].migrate(area.part(first..128).range(), &MigrateOptions::default()));
                    drop(mm.home(area.range()));
                }
            });
            let (start, _stops) = (Instant::now(), Stops(&stop));
            let mut random = Random::new(rules.seed + 1);
            let mut tags = [1; 128];
            area.fill(1);
            while start.elapsed() < Duration::from_secs(rules.seconds) {
                rounds += 1;
                let child =
                    fork_child(|| (0..128).for_each(|n| assert_eq!(page_error(area.page(n), tags[n], n), None)));
                for tag in 6 * rounds..6 * rounds + 6 {
                    let written = random.below(7);
                    for (n, old) in tags.iter_mut().enumerate() {
                        assert_eq!(page_error(area.page(n), *old, n), None, "page {n}");
                        if n % 7 == written {
                            write_page(area.page(n), tag, n);
                            *old = tag;
                        }
                    }
                    if random.below(4) == 0 {
                        for prot in [libc::PROT_READ, RW] {
                            assert_eq!(Via::Raw.mprotect(area.start, area.len(), prot), 0);
                        }
                    }
                }
                assert_eq!(wait_for(child), End::Exit(0));
            }
        });
        println!("{rounds} rounds");
        assert!(rounds > 10, "{rounds} rounds");
        area.unmap();
        finish(mm, mirrors);
        Ok(())
    });
}

#[test]
fn mappings_move_to_where_others_were_a_moment_ago() {
    isolated!(|| {
        // The kernel says that a range was left by `mremap` some time after the next mapping may have moved there.
        if !has_move() {
            return Err(Skip(
                "without UFFDIO_MOVE other threads' new mappings are lifted by mistake at times".to_owned(),
            ));
        }
        let mm = open()?;
        let (mirrors, rules) = (devices(&mm), Rules::new());
        let moved = AtomicU64::new(0);
        std::thread::scope(|s| {
            for thread in 0..6 {
                let (mirror, moved) = (&mirrors[0], &moved);
                s.spawn(move || {
                    let mut random = Random::new(rules.seed.wrapping_mul(31).wrapping_add(thread));
                    let (start, mut tag) = (Instant::now(), thread << 24);
                    while start.elapsed() < Duration::from_secs(rules.seconds) {
                        tag += 1;
                        let (pages, more) = (1 + random.below(30), 1 + random.below(30));
                        // It cannot grow where it is.
                        let guard = map(0, (pages + 1) * PAGE, RW, 0) + pages * PAGE;
                        assert_eq!(Via::Raw.mprotect(guard, PAGE, libc::PROT_NONE), 0);
                        let area = Area { start: guard - pages * PAGE, pages };
                        area.fill(tag);
                        drop(mirror.migrate(area.range(), &MigrateOptions::default()));
                        let (len, grown) = (area.len(), (pages + more) * PAGE);
                        // Refused where the mapping is registered in part.
                        if let Ok(to) = Via::Raw.mremap(area.start, len, grown, libc::MREMAP_MAYMOVE, 0) {
                            Area { start: to, pages }.check(tag);
                            unmap(to, grown);
                            moved.fetch_add(1, Relaxed);
                        } else {
                            area.unmap();
                        }
                        unmap(guard, PAGE);
                    }
                });
            }
        });
        let moved = moved.into_inner();
        println!("{moved} mappings moved");
        assert!(moved > 10, "{moved} mappings moved");
        finish(mm, mirrors);
        Ok(())
    });
}
