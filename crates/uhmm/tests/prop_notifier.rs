//! Interval notifiers: who is called, against a plain list; and the protocol, with real threads.
#![cfg(not(loom))]

use std::{
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use proptest::prelude::*;
use uhmm::{
    addr::{PAGE_SHIFT, PageRange, VirtAddr},
    device::{Cause, Invalidation},
    notifier::{InsertError, IntervalOps, InvalidateSeq, Invalidated, Notifiers, Subscription},
};

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(20);

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::new(VirtAddr::new(first << PAGE_SHIFT), count << PAGE_SHIFT).unwrap()
}

fn unmap(range: PageRange) -> Invalidation {
    Invalidation { range, cause: Cause::Unmap, owner: None }
}

fn notifiers<const N: usize>(limit: Duration) -> Box<Notifiers<N>> {
    Box::new(Notifiers::new(limit))
}

/// Notes its name when it is called.
struct Note {
    name: u64,
    calls: Arc<Mutex<Vec<u64>>>,
}

impl IntervalOps for Note {
    fn invalidate<'a>(&self, _: &Invalidation, seq: InvalidateSeq<'a>) -> Invalidated<'a> {
        seq.set(|| self.calls.lock().unwrap().push(self.name))
    }
}

#[derive(Debug, Clone)]
enum Op {
    Insert(PageRange),
    Remove(prop::sample::Index),
    Invalidate(PageRange),
}

fn range() -> impl Strategy<Value = PageRange> {
    (0u64..200, prop_oneof![1u64..10, 50u64..200]).prop_map(|(first, count)| pages(first, count))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => range().prop_map(Op::Insert),
        1 => any::<prop::sample::Index>().prop_map(Op::Remove),
        3 => range().prop_map(Op::Invalidate),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_invalidation_calls_what_overlaps_and_once(ops in prop::collection::vec(op(), 1..150)) {
        let set = notifiers::<24>(LONG);
        let calls = Arc::new(Mutex::new(Vec::new()));
        let mut list: Vec<(u64, Subscription)> = Vec::new();
        for (name, op) in (0..).zip(ops) {
            match op {
                Op::Insert(range) => match set.insert(range, Arc::new(Note { name, calls: Arc::clone(&calls) })) {
                    Ok(subscription) => list.push((name, subscription)),
                    Err(error) => {
                        prop_assert_eq!(error, InsertError::Full { range, capacity: 24 });
                        prop_assert_eq!(list.len(), 24);
                    }
                },
                Op::Remove(at) if !list.is_empty() => {
                    let (_, subscription) = list.swap_remove(at.index(list.len()));
                    prop_assert_eq!(set.remove(&subscription), Ok(()));
                    // Once more must not hit whoever has the slot by then.
                    prop_assert_eq!(set.remove(&subscription), Ok(()));
                }
                Op::Remove(_) => {}
                Op::Invalidate(range) => {
                    let seqs: Vec<_> = list.iter().map(|(_, s)| set.read_begin(s).unwrap()).collect();
                    drop(set.invalidate(&unmap(range)));
                    let mut called = std::mem::take(&mut *calls.lock().unwrap());
                    called.sort_unstable();
                    let hit = |s: &Subscription| s.range().overlaps(range);
                    let mut expected: Vec<_> = list.iter().filter(|(_, s)| hit(s)).map(|&(name, _)| name).collect();
                    expected.sort_unstable();
                    prop_assert_eq!(called, expected);
                    for ((_, subscription), seq) in list.iter().zip(seqs) {
                        prop_assert_eq!(set.read_retry(subscription, seq), hit(subscription));
                        prop_assert_eq!(set.commit(subscription, seq).is_err(), hit(subscription));
                    }
                }
            }
            prop_assert_eq!(set.len(), list.len());
        }
    }
}

#[test]
fn readers_wait_for_the_end_and_only_where_they_overlap() {
    let set = notifiers::<4>(SHORT);
    let calls = Arc::new(Mutex::new(Vec::new()));
    let note = |name| Arc::new(Note { name, calls: Arc::clone(&calls) });
    let near = set.insert(pages(0, 10), note(1)).unwrap();
    let far = set.insert(pages(10, 10), note(2)).unwrap();
    let outer = set.invalidate(&unmap(pages(5, 5)));
    let inner = set.invalidate(&unmap(pages(9, 1)));
    let late = set.insert(pages(8, 4), note(3)).unwrap();
    assert!(set.read_begin(&near).is_err());
    assert!(set.read_begin(&late).is_err(), "a subscription made meanwhile waits as well");
    assert!(set.read_begin(&far).is_ok());
    drop(outer);
    assert!(set.read_begin(&near).is_err(), "the inner one still runs");
    drop(inner);
    assert!(set.read_begin(&near).is_ok() && set.read_begin(&late).is_ok());
    assert_eq!(*calls.lock().unwrap(), [1, 1]);
}

#[test]
fn more_invalidations_than_can_be_told_apart_hold_up_every_reader() {
    let set = notifiers::<1>(SHORT);
    let calls = Arc::new(Mutex::new(Vec::new()));
    let far = set.insert(pages(1_000, 1), Arc::new(Note { name: 0, calls })).unwrap();
    let mut running: Vec<_> = (0..64).map(|n| set.invalidate(&unmap(pages(n, 1)))).collect();
    assert!(set.read_begin(&far).is_ok());
    running.push(set.invalidate(&unmap(pages(64, 1))));
    assert!(set.read_begin(&far).is_err());
    running.pop();
    assert!(set.read_begin(&far).is_ok());
    running.clear();
    assert!(set.read_begin(&far).is_ok());
}

#[test]
fn nothing_is_committed_on_a_removed_subscription() {
    let set = notifiers::<1>(SHORT);
    let calls = Arc::new(Mutex::new(Vec::new()));
    let old = set.insert(pages(0, 1), Arc::new(Note { name: 0, calls: Arc::clone(&calls) })).unwrap();
    let seq = set.read_begin(&old).unwrap();
    set.remove(&old).unwrap();
    assert!(set.commit(&old, seq).is_err());
    let new = set.insert(pages(0, 1), Arc::new(Note { name: 1, calls: Arc::clone(&calls) })).unwrap();
    let seq = set.read_begin(&old).unwrap();
    assert!(set.commit(&old, seq).is_err());
    set.remove(&old).unwrap();
    drop(set.invalidate(&unmap(pages(0, 1))));
    assert_eq!(*calls.lock().unwrap(), [1]);
    set.remove(&new).unwrap();
}

#[test]
fn the_callback_is_dropped_with_its_subscription() {
    let set = notifiers::<1>(SHORT);
    let calls = Arc::new(Mutex::new(Vec::new()));
    let note = Arc::new(Note { name: 0, calls });
    let subscription = set.insert(pages(0, 1), Arc::clone(&note)).unwrap();
    drop(set.invalidate(&unmap(pages(0, 1))));
    set.remove(&subscription).unwrap();
    drop(subscription);
    assert_eq!(Arc::strong_count(&note), 1);
}

/// Stays in its callback until it is let go.
struct Stuck {
    entered: Barrier,
    leave: Barrier,
}

impl IntervalOps for Stuck {
    fn invalidate<'a>(&self, _: &Invalidation, seq: InvalidateSeq<'a>) -> Invalidated<'a> {
        self.entered.wait();
        self.leave.wait();
        seq.set(|| ())
    }
}

#[test]
fn remove_waits_for_a_running_callback_and_can_be_called_again() {
    let set = notifiers::<1>(SHORT);
    let stuck = Arc::new(Stuck { entered: Barrier::new(2), leave: Barrier::new(2) });
    let subscription = set.insert(pages(0, 1), Arc::clone(&stuck)).unwrap();
    thread::scope(|scope| {
        let invalidation = scope.spawn(|| drop(set.invalidate(&unmap(pages(0, 1)))));
        stuck.entered.wait();
        let removed = set.remove(&subscription);
        let inserted = set.insert(pages(0, 1), Arc::clone(&stuck));
        stuck.leave.wait();
        invalidation.join().unwrap();
        assert!(removed.is_err(), "the callback still ran");
        assert!(inserted.is_err(), "its slot was not free yet");
        set.remove(&subscription).unwrap();
        assert!(set.insert(pages(0, 1), Arc::clone(&stuck)).is_ok());
    });
}

/// Tells the other threads of a test when the last of some has ended, be it by a panic.
struct Last<'a> {
    running: &'a AtomicU64,
    over: &'a AtomicBool,
}

impl Drop for Last<'_> {
    fn drop(&mut self) {
        if self.running.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.over.store(true, Ordering::Release);
        }
    }
}

const PAGES: usize = 64;

/// A device that mirrors: for each page the generation of the mapping that its entry was made from; 0 for no entry.
struct Mirror {
    range: PageRange,
    entries: Vec<AtomicU64>,
    removed: AtomicBool,
}

fn numbers(range: PageRange) -> std::ops::Range<usize> {
    (range.start().get() >> PAGE_SHIFT) as usize..(range.end().get() >> PAGE_SHIFT) as usize
}

impl IntervalOps for Mirror {
    fn invalidate<'a>(&self, invalidation: &Invalidation, seq: InvalidateSeq<'a>) -> Invalidated<'a> {
        assert!(!self.removed.load(Ordering::SeqCst), "called after remove() had returned");
        let range = self.range.intersection(invalidation.range).expect("called without an overlap");
        seq.set(|| numbers(range).for_each(|n| self.entries[n].store(0, Ordering::Relaxed)))
    }
}

fn mirror(range: PageRange) -> Arc<Mirror> {
    let entries = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    Arc::new(Mirror { range, entries, removed: AtomicBool::new(false) })
}

/// Threads change a mapping, others mirror it. Between the callbacks and the end of an invalidation no mirror may have
/// an entry for what it covers, and never one of an older mapping than there is.
#[test]
fn no_mirror_is_ever_older_than_the_mapping() {
    const ROUNDS: u64 = 30_000;
    let set = notifiers::<8>(LONG);
    let mapping: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(1)).collect();
    let wide = mirror(pages(0, PAGES as u64));
    let narrow = mirror(pages(20, 20));
    let over = AtomicBool::new(false);
    let commits = AtomicU64::new(0);
    let running = AtomicU64::new(2);
    let subscriptions =
        [set.insert(wide.range, Arc::clone(&wide)).unwrap(), set.insert(narrow.range, Arc::clone(&narrow)).unwrap()];
    let mirrors = [&wide, &narrow];
    let covered = |range: PageRange| {
        mirrors.iter().flat_map(move |mirror| {
            mirror.range.intersection(range).into_iter().flat_map(numbers).map(|n| (n, &mirror.entries[n]))
        })
    };
    thread::scope(|scope| {
        for me in 0..2u64 {
            let (set, mapping, covered, commits) = (&set, &mapping, &covered, &commits);
            let last = Last { running: &running, over: &over };
            scope.spawn(move || {
                let _last = last;
                for round in 0..100 * ROUNDS {
                    // On a loaded machine the mirrors' threads may get no turn for long.
                    if round >= ROUNDS && commits.load(Ordering::Relaxed) > 100 {
                        break;
                    }
                    let first = (round * 7 + me * 31) % PAGES as u64;
                    let range = pages(first, (1 + round % 9).min(PAGES as u64 - first));
                    let invalidating = set.invalidate(&unmap(range));
                    for (n, entry) in covered(range) {
                        assert_eq!(entry.load(Ordering::Relaxed), 0, "page {n} is mirrored while it changes");
                    }
                    numbers(range).for_each(|n| {
                        mapping[n].fetch_add(1, Ordering::Relaxed);
                    });
                    if round % 64 == 0 {
                        thread::yield_now();
                    }
                    for (n, entry) in covered(range) {
                        assert_eq!(entry.load(Ordering::Relaxed), 0, "page {n} was mirrored while it changed");
                    }
                    drop(invalidating);
                }
            });
        }
        for (subscription, mirror) in subscriptions.iter().zip(mirrors) {
            let (set, mapping, commits, over) = (&set, &mapping, &commits, &over);
            scope.spawn(move || {
                while !over.load(Ordering::Acquire) {
                    let seq = set.read_begin(subscription).unwrap();
                    let snapshot: Vec<_> =
                        numbers(mirror.range).map(|n| (n, mapping[n].load(Ordering::Relaxed))).collect();
                    let Ok(_update) = set.commit(subscription, seq) else { continue };
                    for (n, generation) in snapshot {
                        mirror.entries[n].store(generation, Ordering::Relaxed);
                    }
                    commits.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    for (n, entry) in covered(pages(0, PAGES as u64)) {
        let (entry, now) = (entry.load(Ordering::Relaxed), mapping[n].load(Ordering::Relaxed));
        assert!(entry == 0 || entry == now, "page {n}: entry of generation {entry}, mapping of {now}");
    }
    assert!(commits.load(Ordering::Relaxed) > 100, "hardly anything was committed: nothing was tested");
}

/// Subscriptions come and go while invalidations run. Who is subscribed throughout is never missed, who was removed is
/// never called.
#[test]
fn subscriptions_may_come_and_go_during_invalidations() {
    const ROUNDS: u64 = 20_000;
    let set = notifiers::<16>(LONG);
    let stay = mirror(pages(10, 30));
    let steady = set.insert(stay.range, Arc::clone(&stay)).unwrap();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for me in 0..2u64 {
            let (set, over) = (&set, &over);
            scope.spawn(move || {
                let mut round = me;
                while !over.load(Ordering::Acquire) {
                    round += 3;
                    let guest = mirror(pages(round % 40, 1 + round % 20));
                    let subscription = set.insert(guest.range, Arc::clone(&guest)).unwrap();
                    if let Ok(seq) = set.read_begin(&subscription) {
                        drop(set.commit(&subscription, seq));
                    }
                    set.remove(&subscription).unwrap();
                    guest.removed.store(true, Ordering::SeqCst);
                }
            });
        }
        let _last = Last { running: &AtomicU64::new(1), over: &over };
        for _ in 0..ROUNDS {
            let seq = set.read_begin(&steady).unwrap();
            drop(set.invalidate(&unmap(pages(0, PAGES as u64))));
            assert!(set.read_retry(&steady, seq), "the callback was missed");
        }
    });
    assert_eq!(set.len(), 1);
}
