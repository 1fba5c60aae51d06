//! The sequence protocol under every interleaving.
#![cfg(loom)]

mod race;

use std::{sync::Arc, time::Duration};

use loom::sync::atomic::{AtomicU32, Ordering};
use uhmm::{
    addr::{PAGE_SIZE, PageRange, VirtAddr},
    device::{Cause, Invalidation},
    notifier::{IntervalOps, InvalidateSeq, Invalidated, Notifiers, Subscription},
};

const OLD: u32 = 1;
const NEW: u32 = 2;

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

struct World {
    set: Notifiers<2>,
    page: Arc<Page>,
    subscription: Option<Subscription>,
}

impl World {
    fn empty() -> Self {
        let page = Page { mapping: AtomicU32::new(OLD), entry: AtomicU32::new(0), calls: AtomicU32::new(0) };
        Self { set: Notifiers::new(Duration::MAX), page: Arc::new(page), subscription: None }
    }

    fn subscribed() -> Self {
        let mut world = Self::empty();
        world.subscription = Some(world.insert());
        world
    }

    fn insert(&self) -> Subscription {
        self.set.insert(range(), Arc::clone(&self.page)).unwrap()
    }

    fn subscription(&self) -> &Subscription {
        self.subscription.as_ref().unwrap()
    }

    fn entry(&self) -> u32 {
        self.page.entry.load(Ordering::Relaxed)
    }

    fn calls(&self) -> u32 {
        self.page.calls.load(Ordering::Relaxed)
    }

    /// An invalidation as the engine makes it: tell, change, end. Nothing is mirrored between the first and the last.
    fn change(&self) {
        let running = self.set.invalidate(&unmap());
        assert_eq!(self.entry(), 0, "mirrored after the callbacks");
        self.page.mapping.store(NEW, Ordering::Relaxed);
        assert_eq!(self.entry(), 0, "mirrored before the end");
        drop(running);
    }

    /// One try to mirror the page; whether it was committed.
    fn mirror(&self, subscription: &Subscription) -> bool {
        let seq = self.set.read_begin(subscription).unwrap();
        let snapshot = self.page.mapping.load(Ordering::Relaxed);
        let commit = self.set.commit(subscription, seq);
        if commit.is_ok() {
            self.page.entry.store(snapshot, Ordering::Relaxed);
        }
        commit.is_ok()
    }
}

fn range() -> PageRange {
    PageRange::new(VirtAddr::new(0), PAGE_SIZE).unwrap()
}

fn unmap() -> Invalidation {
    Invalidation { range: range(), cause: Cause::Unmap, owner: None }
}

fn race<A: Send + 'static, B: Send + 'static>(
    setup: fn() -> World,
    a: fn(&World) -> A,
    b: fn(&World) -> B,
    check: fn(&World, A, B),
) {
    race::race(3, setup, a, b, check);
}

#[test]
fn no_entry_from_before_an_invalidation_is_installed_after_it() {
    race(
        World::subscribed,
        World::change,
        |world| world.mirror(world.subscription()),
        |world, (), committed| {
            assert_ne!(world.entry(), OLD, "a stale entry outlived the invalidation");
            assert!(committed || world.entry() == 0);
            // One more try finds the new mapping, and nothing stands in its way.
            assert!(world.mirror(world.subscription()));
            assert_eq!(world.entry(), NEW);
        },
    );
}

#[test]
fn a_subscription_inserted_meanwhile_is_called_or_waits() {
    race(
        World::empty,
        World::change,
        |world| {
            let subscription = world.insert();
            world.mirror(&subscription)
        },
        |world, (), _| assert_ne!(world.entry(), OLD, "a stale entry outlived the invalidation"),
    );
}

#[test]
fn no_callback_runs_after_remove() {
    race(
        World::subscribed,
        |world| {
            world.set.remove(world.subscription()).unwrap();
            world.calls()
        },
        |world| drop(world.set.invalidate(&unmap())),
        |world, calls, ()| assert_eq!(world.calls(), calls, "called after remove() had returned"),
    );
}

#[test]
fn no_commit_succeeds_after_remove() {
    race(
        World::subscribed,
        |world| {
            world.set.remove(world.subscription()).unwrap();
            world.entry()
        },
        |world| world.mirror(world.subscription()),
        |world, entry, _| assert_eq!(world.entry(), entry, "an entry was set after remove() had returned"),
    );
}

#[test]
fn two_removals_free_the_slot_once() {
    let remove: fn(&World) = |world| world.set.remove(world.subscription()).unwrap();
    race(World::subscribed, remove, remove, |world, (), ()| {
        let two = [world.insert(), world.insert()];
        assert!(world.set.insert(range(), Arc::clone(&world.page)).is_err(), "there are two slots");
        drop(world.set.invalidate(&unmap()));
        assert_eq!(world.calls(), 2);
        for subscription in &two {
            world.set.remove(subscription).unwrap();
        }
    });
}

#[test]
fn readers_wait_until_each_of_two_invalidations_has_ended() {
    race(
        World::subscribed,
        |world| {
            let outer = world.set.invalidate(&unmap());
            world.change();
            drop(outer);
        },
        |world| world.mirror(world.subscription()),
        |world, (), _| assert_ne!(world.entry(), OLD, "a stale entry outlived an invalidation"),
    );
}
