//! The frame allocator against a model of one reference count a frame, under threads, and over a long life.
#![cfg(not(loom))]
#![expect(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::{
    collections::HashSet,
    sync::{
        Barrier,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use proptest::prelude::*;
use uhmm::{
    addr::{PAGE_SIZE, VirtAddr},
    device::{DevPfn, DeviceId, FrameRun},
    pgmap::{CHUNK_FRAMES, HUGE_ORDER, Pgmap, Put},
};

fn pgmap(frames: u32) -> Pgmap {
    Pgmap::new(DeviceId::from_index(0).unwrap(), frames, Pgmap::storage_needed(frames).leak())
}

fn pfn(n: u32) -> DevPfn {
    DevPfn::new(n)
}

fn run(first: u32, count: u32) -> FrameRun {
    FrameRun { first: pfn(first), count }
}

#[derive(Debug, Clone)]
enum Op {
    Page,
    Run(u32),
    Huge,
    Get(prop::sample::Index),
    Put(prop::sample::Index),
    PutRun(prop::sample::Index, u32),
    Split(prop::sample::Index),
}

fn op() -> impl Strategy<Value = Op> {
    let any = any::<prop::sample::Index>;
    prop_oneof![
        3 => Just(Op::Page),
        3 => (1..=CHUNK_FRAMES).prop_map(Op::Run),
        3 => Just(Op::Huge),
        2 => any().prop_map(Op::Get),
        6 => any().prop_map(Op::Put),
        4 => (any(), 1..300u32).prop_map(|(at, count)| Op::PutRun(at, count)),
        1 => any().prop_map(Op::Split),
    ]
}

/// References of each frame; of a huge unit, in every frame of it.
struct Model {
    refs: Vec<u32>,
    huge: HashSet<u32>,
}

impl Model {
    fn used(&self, chunk: u32) -> u32 {
        let frames = self.refs.iter().skip((chunk * CHUNK_FRAMES) as usize).take(CHUNK_FRAMES as usize);
        frames.filter(|&&refs| refs > 0).count() as u32
    }

    fn size(&self, chunk: u32) -> u32 {
        CHUNK_FRAMES.min(self.refs.len() as u32 - chunk * CHUNK_FRAMES)
    }

    fn chunks(&self) -> impl DoubleEndedIterator<Item = u32> + use<> {
        0..(self.refs.len() as u32).div_ceil(CHUNK_FRAMES)
    }

    fn is_huge(&self, n: u32) -> bool {
        self.huge.contains(&(n / CHUNK_FRAMES))
    }

    /// Whole free chunks; one that lacks frames is never whole.
    fn whole(&self) -> Vec<u32> {
        self.chunks().filter(|&chunk| self.used(chunk) == 0 && self.size(chunk) == CHUNK_FRAMES).collect()
    }

    fn has_partial_room(&self) -> bool {
        self.chunks().any(|chunk| {
            let (used, size) = (self.used(chunk), self.size(chunk));
            used < size && (used > 0 || size < CHUNK_FRAMES)
        })
    }

    /// First frames of what lives.
    fn live(&self) -> Vec<u32> {
        let frames = 0..self.refs.len() as u32;
        frames.filter(|&n| self.refs[n as usize] > 0 && (!self.is_huge(n) || n % CHUNK_FRAMES == 0)).collect()
    }

    fn pick(&self, at: &prop::sample::Index) -> Option<u32> {
        let live = self.live();
        (!live.is_empty()).then(|| live[at.index(live.len())])
    }

    fn unit(&self, n: u32) -> std::ops::Range<usize> {
        let n = n as usize;
        if self.is_huge(n as u32) { n..n + CHUNK_FRAMES as usize } else { n..n + 1 }
    }
}

fn check_new_small(model: &mut Model, got: Option<FrameRun>, max: u32) {
    let Some(got) = got else {
        assert!(model.refs.iter().all(|&refs| refs > 0), "refused although frames are free");
        return;
    };
    assert!(got.count >= 1 && got.count <= max);
    let (first, chunk) = (got.first.get(), got.first.get() / CHUNK_FRAMES);
    assert_eq!((first + got.count - 1) / CHUNK_FRAMES, chunk, "{got:?} crosses a chunk");
    let is_broken_now = model.used(chunk) == 0 && model.size(chunk) == CHUNK_FRAMES;
    assert!(!(is_broken_now && model.has_partial_room()), "{got:?} broke a free chunk without need");
    for n in first..first + got.count {
        assert_eq!(model.refs[n as usize], 0, "frame {n} handed out twice");
        model.refs[n as usize] = 1;
    }
}

fn apply(map: &Pgmap, model: &mut Model, op: &Op) {
    match op {
        Op::Page => check_new_small(model, map.alloc_page().map(|first| FrameRun { first, count: 1 }), 1),
        Op::Run(max) => check_new_small(model, map.alloc_run(*max), *max),
        Op::Huge => {
            let whole = model.whole();
            let got = map.alloc_huge().map(DevPfn::get);
            assert_eq!(got, whole.last().map(|chunk| chunk * CHUNK_FRAMES), "of {whole:?}");
            if let Some(first) = got {
                model.huge.insert(first / CHUNK_FRAMES);
                model.refs[first as usize..(first + CHUNK_FRAMES) as usize].fill(1);
            }
        }
        Op::Get(at) => {
            let Some(n) = model.pick(at) else { return };
            map.get(pfn(n));
            let unit = model.unit(n);
            model.refs[unit].iter_mut().for_each(|refs| *refs += 1);
        }
        Op::Put(at) => {
            let Some(n) = model.pick(at) else { return };
            let unit = model.unit(n);
            let put = map.put(pfn(n));
            model.refs[unit.clone()].iter_mut().for_each(|refs| *refs -= 1);
            match put {
                Put::Freed(freed) => assert_eq!(freed.run(), run(n, unit.len() as u32)),
                Put::Shared => assert!(model.refs[n as usize] > 0),
            }
            if model.refs[n as usize] == 0 {
                model.huge.remove(&(n / CHUNK_FRAMES));
            }
        }
        Op::PutRun(at, count) => {
            let Some(first) = model.pick(at) else { return };
            // As long a run as lives, of whole units only.
            let mut end = first;
            while end < model.refs.len() as u32 && end < first + count && model.refs[end as usize] > 0 {
                if model.is_huge(end) && end % CHUNK_FRAMES != 0 {
                    break;
                }
                end = model.unit(end).end as u32;
            }
            let mut freed = Vec::new();
            let total = map.put_run(run(first, end - first), |run| freed.push(run));
            let mut expected = Vec::new();
            for n in first..end {
                model.refs[n as usize] -= 1;
                if model.refs[n as usize] == 0 {
                    expected.push(n);
                    model.huge.remove(&(n / CHUNK_FRAMES));
                }
            }
            let freed: Vec<u32> = freed.iter().flat_map(|run| run.first.get()..run.first.get() + run.count).collect();
            assert_eq!(freed, expected);
            assert_eq!(total as usize, expected.len());
        }
        Op::Split(at) => {
            let Some(n) = model.pick(at) else { return };
            if model.huge.remove(&(n / CHUNK_FRAMES)) {
                map.set_hint(pfn(n), Some(VirtAddr::new(0x20_0000)));
                map.driver_word(pfn(n)).store(7, Ordering::Relaxed);
                assert_eq!(map.split(pfn(n)).unwrap(), run(n, CHUNK_FRAMES));
                let last = pfn(n + CHUNK_FRAMES - 1);
                let page = 0x20_0000 + u64::from(CHUNK_FRAMES - 1) * PAGE_SIZE;
                assert_eq!(map.hint(last), Some(VirtAddr::new(page)));
                assert_eq!(map.driver_word(last).load(Ordering::Relaxed), 7);
            }
        }
    }
}

fn compare(map: &Pgmap, model: &Model) {
    for n in 0..map.capacity() {
        assert_eq!(map.refs(pfn(n)), model.refs[n as usize], "frame {n}");
        assert_eq!(map.order(pfn(n)), if model.is_huge(n) { HUGE_ORDER } else { 0 }, "frame {n}");
    }
    let live = std::iter::successors(map.next_live(pfn(0)), |at| map.next_live(at.add(1))).map(DevPfn::get);
    assert_eq!(live.collect::<Vec<_>>(), model.live());
    let used = model.refs.iter().filter(|&&refs| refs > 0).count() as u32;
    assert_eq!((map.live(), map.free()), (used, map.capacity() - used));
    map.audit().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_a_count_for_each_frame(
        frames in 1u32..5 * CHUNK_FRAMES,
        ops in prop::collection::vec(op(), 1..200),
    ) {
        let map = pgmap(frames);
        let mut model = Model { refs: vec![0; frames as usize], huge: HashSet::new() };
        for op in &ops {
            apply(&map, &mut model, op);
            prop_assert_eq!(map.audit(), Ok(()));
        }
        compare(&map, &model);
    }
}

#[test]
fn a_device_without_memory_has_no_frames() {
    let map = pgmap(0);
    assert_eq!(map.alloc_page(), None);
    assert_eq!(map.alloc_huge(), None);
    assert_eq!(map.next_live(pfn(0)), None);
    map.audit().unwrap();
}

#[test]
fn an_empty_device_gives_whole_chunks_to_large_runs() {
    let map = pgmap(8 * CHUNK_FRAMES);
    for chunk in 0..8 {
        assert_eq!(map.alloc_run(CHUNK_FRAMES), Some(run(chunk * CHUNK_FRAMES, CHUNK_FRAMES)));
    }
    assert_eq!(map.alloc_run(1), None);
    assert_eq!((map.alloc_run(0), map.free()), (None, 0));
}

#[test]
fn a_run_prefers_the_longest_gap_among_the_first_chunks() {
    let map = pgmap(3 * CHUNK_FRAMES);
    for _ in 0..3 {
        map.alloc_run(CHUNK_FRAMES).unwrap();
    }
    map.put_run(run(10, 5), |_| ());
    map.put_run(run(CHUNK_FRAMES + 100, 150), |_| ());
    map.put_run(run(2 * CHUNK_FRAMES + 7, 20), |_| ());
    assert_eq!(map.alloc_run(200), Some(run(CHUNK_FRAMES + 100, 150)));
    assert_eq!(map.alloc_run(5), Some(run(10, 5)));
    assert_eq!(map.alloc_run(200), Some(run(2 * CHUNK_FRAMES + 7, 20)));
}

#[test]
fn new_frames_know_nothing_of_their_last_owner() {
    let map = pgmap(1);
    let first = map.alloc_page().unwrap();
    map.set_hint(first, Some(VirtAddr::new(0x5000)));
    map.driver_word(first).store(9, Ordering::Relaxed);
    assert_eq!(map.hint(first), Some(VirtAddr::new(0x5000)));
    drop(map.put(first));
    let again = map.alloc_page().unwrap();
    assert_eq!(again, first);
    assert_eq!(map.hint(again), None);
    assert_eq!(map.driver_word(again).load(Ordering::Relaxed), 0);
}

#[test]
fn a_freed_frame_is_not_available_until_the_device_was_told() {
    let map = pgmap(1);
    let first = map.alloc_page().unwrap();
    let Put::Freed(freed) = map.put(first) else { panic!("it was the last reference") };
    assert_eq!((map.live(), map.alloc_page()), (0, None));
    drop(freed);
    assert_eq!(map.alloc_page(), Some(first));
    map.put_run(run(0, 1), |_| assert_eq!(map.alloc_page(), None));
    assert_eq!(map.alloc_page(), Some(first));
}

#[test]
fn a_closed_pgmap_gives_nothing_and_takes_everything_back() {
    let map = pgmap(4 * CHUNK_FRAMES);
    let (page, huge) = (map.alloc_page().unwrap(), map.alloc_huge().unwrap());
    map.close();
    assert_eq!((map.alloc_page(), map.alloc_huge(), map.alloc_run(8)), (None, None, None));
    assert_eq!(map.live(), 1 + CHUNK_FRAMES);
    assert!(map.put(page).is_freed() && map.put(huge).is_freed());
    assert_eq!(map.live(), 0);
    map.audit().unwrap();
}

#[test]
fn a_second_view_of_the_same_words_is_the_same_pgmap() {
    let frames = CHUNK_FRAMES + 3;
    let words = Pgmap::storage_needed(frames).leak();
    let id = DeviceId::from_index(1).unwrap();
    let one = Pgmap::new(id, frames, words);
    let taken: Vec<_> = (0..CHUNK_FRAMES).map(|_| one.alloc_page().unwrap()).collect();
    let other = Pgmap::new(id, frames, words);
    assert_eq!(other.live(), CHUNK_FRAMES);
    assert_eq!((0..5).filter(|_| other.alloc_page().is_some()).count(), 3);
    taken.into_iter().for_each(|page| assert!(other.put(page).is_freed()));
    assert_eq!(one.live(), 3);
    one.audit().unwrap();
}

#[test]
#[should_panic(expected = "put without a reference")]
fn a_double_free_of_a_page_is_fatal() {
    let map = pgmap(10);
    let page = map.alloc_page().unwrap();
    drop(map.put(page));
    drop(map.put(page));
}

#[test]
#[should_panic(expected = "put without a reference")]
fn a_double_free_of_a_huge_unit_is_fatal() {
    let map = pgmap(CHUNK_FRAMES);
    let unit = map.alloc_huge().unwrap();
    drop(map.put(unit));
    drop(map.put(unit));
}

#[test]
#[should_panic(expected = "put of part of a huge unit")]
fn part_of_a_huge_unit_cannot_be_put() {
    let map = pgmap(CHUNK_FRAMES);
    map.alloc_huge().unwrap();
    map.put_run(run(0, 5), |_| ());
}

/// A generator of numbers that is the same every time.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// Hammers one pgmap from several threads. Each frame has an owner's mark while it is allocated, so that a frame given
/// to two is found at once.
#[test]
fn threads_never_get_the_same_frame() {
    const FRAMES: u32 = 6 * CHUNK_FRAMES + 77;
    const THREADS: usize = 4;
    let map = pgmap(FRAMES);
    let owner: Vec<AtomicU32> = (0..FRAMES).map(|_| AtomicU32::new(0)).collect();
    let mark = |run: FrameRun, from: u32, to: u32| {
        for n in run.first.get()..run.first.get() + run.count {
            let old = owner[n as usize].swap(to, Ordering::Relaxed);
            assert_eq!(old, from, "frame {n}");
        }
    };
    let start = Barrier::new(THREADS);
    thread::scope(|scope| {
        for me in 1..=THREADS as u32 {
            let (map, mark, start) = (&map, &mark, &start);
            scope.spawn(move || {
                start.wait();
                let mut random = Random(u64::from(me));
                let mut held: Vec<FrameRun> = Vec::new();
                for _ in 0..60_000 {
                    let got = match random.below(8) {
                        0 | 1 => map.alloc_page().map(|first| FrameRun { first, count: 1 }),
                        2 => map.alloc_run(1 + random.below(300) as u32),
                        3 => map.alloc_huge().map(|first| FrameRun { first, count: CHUNK_FRAMES }),
                        _ => None,
                    };
                    if let Some(run) = got {
                        mark(run, 0, me);
                        held.push(run);
                    } else if !held.is_empty() {
                        let run = held.swap_remove(random.below(held.len()));
                        if map.order(run.first) > 0 && random.below(2) == 0 {
                            map.split(run.first).unwrap();
                        }
                        map.get(run.first);
                        assert!(!map.put(run.first).is_freed());
                        mark(run, me, 0);
                        assert_eq!(map.put_run(run, |_| ()), run.count);
                    }
                }
                for run in held {
                    mark(run, me, 0);
                    map.put_run(run, |_| ());
                }
            });
        }
    });
    assert_eq!(map.live(), 0);
    map.audit().unwrap();
    let whole = std::iter::from_fn(|| map.alloc_huge()).count();
    assert_eq!(whole as u32, FRAMES / CHUNK_FRAMES, "every drained chunk is whole again");
}

/// Two holders of units, as parent and child: one splits while the other puts.
#[test]
fn a_unit_may_be_split_while_another_holder_puts_it() {
    const ROUNDS: usize = 2_000;
    let map = pgmap(CHUNK_FRAMES);
    for _ in 0..ROUNDS {
        let unit = map.alloc_huge().unwrap();
        map.get(unit);
        let start = Barrier::new(2);
        let freed = thread::scope(|scope| {
            let other = scope.spawn(|| {
                start.wait();
                map.put_run(FrameRun { first: unit, count: CHUNK_FRAMES }, |_| ())
            });
            start.wait();
            let run = map.split(unit).unwrap();
            map.put_run(run, |_| ()) + other.join().unwrap()
        });
        assert_eq!(freed, CHUNK_FRAMES);
        map.audit().unwrap();
    }
}

/// Pages and huge units come and go at 90 % fill. Free frames must not end up spread over chunks that are all partly
/// used: most of them have to be there in whole chunks.
#[test]
fn a_long_mixed_life_leaves_whole_chunks() {
    const CHUNKS: u32 = 256;
    let map = pgmap(CHUNKS * CHUNK_FRAMES);
    let target = map.capacity() / 10 * 9;
    let mut random = Random(42);
    let (mut pages, mut units): (Vec<FrameRun>, Vec<DevPfn>) = (Vec::new(), Vec::new());
    let mut refused = 0;
    let mut attempts = 0;
    for step in 0..400_000 {
        // The mix wanders, so that chunks change between the two kinds all the time.
        let share = 30 + (step / 4_000 * 37) % 40;
        if map.live() < target {
            if random.below(100) < share && map.free() >= CHUNK_FRAMES {
                attempts += 1;
                match map.alloc_huge() {
                    Some(unit) => units.push(unit),
                    None => refused += 1,
                }
            } else {
                let mut left = CHUNK_FRAMES;
                while left > 0 {
                    let Some(run) = map.alloc_run(left.min(1 + random.below(64) as u32)) else { break };
                    left -= run.count;
                    pages.push(run);
                }
            }
        } else if random.below(100) < share && !units.is_empty() {
            drop(map.put(units.swap_remove(random.below(units.len()))));
        } else if !pages.is_empty() {
            for _ in 0..16.min(pages.len()) {
                let at = random.below(pages.len());
                map.put_run(pages.swap_remove(at), |_| ());
            }
        }
    }
    map.audit().unwrap();
    assert!(attempts > 1_000, "the test did not try huge units");
    let ratio = refused * 100 / attempts;
    println!("{refused} of {attempts} huge allocations refused, {ratio} %");
    assert!(ratio <= 10, "{refused} of {attempts} huge allocations were refused");
}
