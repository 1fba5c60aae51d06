//! The sequence protocol under every interleaving.
#![cfg(loom)]

use std::{sync::Arc, time::Duration};

use loom::{
    sync::atomic::{AtomicU32, Ordering},
    thread,
};
use uhmm::{
    addr::{PAGE_SIZE, PageRange, VirtAddr},
    device::{Cause, Invalidation},
    notifier::{IntervalOps, InvalidateSeq, Invalidated, Notifiers},
};

const OLD: u32 = 1;
const NEW: u32 = 2;

fn model(check: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(check);
}

fn range() -> PageRange {
    PageRange::new(VirtAddr::new(0), PAGE_SIZE).unwrap()
}

fn unmap() -> Invalidation {
    Invalidation { range: range(), cause: Cause::Unmap, owner: None }
}

/// A mapping of one page, and the device's entry that was made from it; 0 for no entry. All accesses are relaxed: the
/// protocol has to order them.
struct Page {
    mapping: AtomicU32,
    entry: AtomicU32,
    calls: AtomicU32,
}

impl IntervalOps for Page {
    fn invalidate<'a>(&self, _: &Invalidation, seq: InvalidateSeq<'a>) -> Invalidated<'a> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        seq.set(|| self.entry.store(0, Ordering::Relaxed))
    }
}

fn page() -> Arc<Page> {
    Arc::new(Page { mapping: AtomicU32::new(OLD), entry: AtomicU32::new(0), calls: AtomicU32::new(0) })
}

fn notifiers() -> Arc<Notifiers<2>> {
    Arc::new(Notifiers::new(Duration::MAX))
}

/// An invalidation as the engine makes it: tell, change, end. What is mirrored after the callbacks is checked as well.
fn change(set: &Notifiers<2>, page: &Page) {
    let running = set.invalidate(&unmap());
    assert_eq!(page.entry.load(Ordering::Relaxed), 0, "mirrored after the callbacks");
    page.mapping.store(NEW, Ordering::Relaxed);
    assert_eq!(page.entry.load(Ordering::Relaxed), 0, "mirrored before the end");
    drop(running);
}

#[test]
fn no_entry_from_before_an_invalidation_is_installed_after_it() {
    model(|| {
        let (set, page) = (notifiers(), page());
        let subscription = set.insert(range(), Arc::clone(&page)).unwrap();
        let (other_set, other_page) = (Arc::clone(&set), Arc::clone(&page));
        let thread = thread::spawn(move || change(&other_set, &other_page));
        let seq = set.read_begin(&subscription).unwrap();
        let snapshot = page.mapping.load(Ordering::Relaxed);
        let commit = set.commit(&subscription, seq).map(|_update| page.entry.store(snapshot, Ordering::Relaxed));
        thread.join().unwrap();
        let entry = page.entry.load(Ordering::Relaxed);
        assert_ne!(entry, OLD, "a stale entry outlived the invalidation");
        assert!(commit.is_ok() || entry == 0);
        // One more try finds the new mapping, and nothing stands in its way.
        let seq = set.read_begin(&subscription).unwrap();
        assert_eq!(page.mapping.load(Ordering::Relaxed), NEW);
        assert!(set.commit(&subscription, seq).is_ok());
    });
}

#[test]
fn a_subscription_inserted_meanwhile_is_called_or_waits() {
    model(|| {
        let (set, page) = (notifiers(), page());
        let (other_set, other_page) = (Arc::clone(&set), Arc::clone(&page));
        let thread = thread::spawn(move || change(&other_set, &other_page));
        let subscription = set.insert(range(), Arc::clone(&page)).unwrap();
        let seq = set.read_begin(&subscription).unwrap();
        let snapshot = page.mapping.load(Ordering::Relaxed);
        if let Ok(_update) = set.commit(&subscription, seq) {
            page.entry.store(snapshot, Ordering::Relaxed);
        }
        thread.join().unwrap();
        assert_ne!(page.entry.load(Ordering::Relaxed), OLD, "a stale entry outlived the invalidation");
    });
}

#[test]
fn no_callback_runs_after_remove() {
    model(|| {
        let (set, page) = (notifiers(), page());
        let subscription = set.insert(range(), Arc::clone(&page)).unwrap();
        let other = Arc::clone(&set);
        let thread = thread::spawn(move || drop(other.invalidate(&unmap())));
        set.remove(&subscription).unwrap();
        let calls = page.calls.load(Ordering::Relaxed);
        thread.join().unwrap();
        assert_eq!(page.calls.load(Ordering::Relaxed), calls, "called after remove() had returned");
    });
}

#[test]
fn two_invalidations_hold_readers_up_until_both_have_ended() {
    model(|| {
        let (set, page) = (notifiers(), page());
        let subscription = set.insert(range(), Arc::clone(&page)).unwrap();
        let (other_set, other_page) = (Arc::clone(&set), Arc::clone(&page));
        let outer = set.invalidate(&unmap());
        let thread = thread::spawn(move || change(&other_set, &other_page));
        drop(outer);
        let seq = set.read_begin(&subscription).unwrap();
        let snapshot = page.mapping.load(Ordering::Relaxed);
        if let Ok(_update) = set.commit(&subscription, seq) {
            page.entry.store(snapshot, Ordering::Relaxed);
        }
        thread.join().unwrap();
        assert_ne!(page.entry.load(Ordering::Relaxed), OLD, "a stale entry outlived an invalidation");
    });
}
