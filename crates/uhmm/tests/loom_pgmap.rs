//! The frame allocator under every interleaving, with chunks of four frames in bitmap words of two.
#![cfg(loom)]

use std::sync::Arc;

use loom::thread;
use uhmm::{
    device::{DevPfn, DeviceId, FrameRun},
    pgmap::{CHUNK_FRAMES, Pgmap},
};

fn model(check: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(check);
}

fn pgmap(frames: u32) -> Arc<Pgmap> {
    Arc::new(Pgmap::new(DeviceId::from_index(0).unwrap(), frames, Pgmap::storage_needed(frames).leak()))
}

fn unit() -> FrameRun {
    FrameRun { first: DevPfn::new(0), count: CHUNK_FRAMES }
}

#[test]
fn two_allocations_get_different_frames() {
    model(|| {
        let map = pgmap(CHUNK_FRAMES);
        let other = Arc::clone(&map);
        let thread = thread::spawn(move || other.alloc_page());
        let run = map.alloc_run(3).expect("there is room for both");
        let page = thread.join().unwrap().expect("there is room for both");
        assert!(page < run.first || page >= run.first.add(run.count), "{page:?} is in {run:?}");
        map.audit().unwrap();
    });
}

#[test]
fn a_frame_freed_meanwhile_is_not_hidden() {
    model(|| {
        let map = pgmap(CHUNK_FRAMES);
        let full = map.alloc_run(CHUNK_FRAMES).unwrap();
        let other = Arc::clone(&map);
        let thread = thread::spawn(move || other.put(full.first.add(1)).is_freed());
        let got = map.alloc_page();
        assert!(thread.join().unwrap());
        if let Some(page) = got {
            assert_eq!(page, full.first.add(1));
        }
        // The audit wants a hint wherever there is room.
        map.audit().unwrap();
        assert_eq!(map.alloc_page().is_some(), got.is_none());
    });
}

#[test]
fn the_last_frame_and_a_huge_unit_race_for_the_chunk() {
    model(|| {
        let map = pgmap(CHUNK_FRAMES);
        let page = map.alloc_page().unwrap();
        let other = Arc::clone(&map);
        let thread = thread::spawn(move || drop(other.put(page)));
        let huge = map.alloc_huge();
        let small = map.alloc_page();
        thread.join().unwrap();
        assert!(huge.is_none() || small.is_none(), "one chunk is both huge and small");
        map.audit().unwrap();
        huge.or(small).map(|pfn| map.put(pfn));
        assert!(map.alloc_huge().is_some(), "a drained chunk is whole again");
    });
}

#[test]
fn a_page_and_a_huge_unit_race_for_a_free_chunk() {
    model(|| {
        let map = pgmap(CHUNK_FRAMES);
        let other = Arc::clone(&map);
        let thread = thread::spawn(move || other.alloc_huge());
        let page = map.alloc_page();
        let huge = thread.join().unwrap();
        assert!(page.is_some() != huge.is_some(), "{page:?} and {huge:?}");
        map.audit().unwrap();
    });
}

#[test]
fn both_ends_of_a_shared_frame_race() {
    model(|| {
        let map = pgmap(1);
        let page = map.alloc_page().unwrap();
        map.get(page);
        let other = Arc::clone(&map);
        let thread = thread::spawn(move || other.put(page).is_freed());
        let here = map.put(page).is_freed();
        assert!(here != thread.join().unwrap(), "exactly one put is the last");
        map.audit().unwrap();
    });
}

#[test]
fn a_unit_is_split_while_its_other_holder_puts_it() {
    model(|| {
        let map = pgmap(CHUNK_FRAMES);
        let first = map.alloc_huge().unwrap();
        map.get(first);
        let other = Arc::clone(&map);
        let thread = thread::spawn(move || other.put_run(unit(), |_| ()));
        map.split(first).unwrap();
        let freed = map.put_run(unit(), |_| ());
        assert_eq!(freed + thread.join().unwrap(), CHUNK_FRAMES);
        map.audit().unwrap();
        assert!(map.alloc_huge().is_some());
    });
}

#[test]
fn a_unit_is_split_by_both_holders() {
    model(|| {
        let map = pgmap(CHUNK_FRAMES);
        let first = map.alloc_huge().unwrap();
        map.get(first);
        let other = Arc::clone(&map);
        let thread = thread::spawn(move || {
            other.split(first).unwrap();
            other.put(first).is_freed()
        });
        map.split(first).unwrap();
        let here = map.put(first).is_freed();
        assert!(here != thread.join().unwrap());
        assert_eq!(map.refs(first.add(1)), 2);
        map.audit().unwrap();
    });
}

#[test]
fn what_is_allocated_while_the_pgmap_closes_is_counted_or_refused() {
    model(|| {
        let map = pgmap(CHUNK_FRAMES);
        let other = Arc::clone(&map);
        let thread = thread::spawn(move || other.alloc_page());
        map.close();
        let live = map.live();
        match thread.join().unwrap() {
            Some(_) => assert_eq!(live, 1, "allocated after the pgmap was closed"),
            None => assert_eq!(map.live(), 0),
        }
        map.audit().unwrap();
    });
}
