//! The frame allocator under every interleaving, with chunks of four frames in bitmap words of two.
#![cfg(loom)]

mod race;

use uhmm::{
    device::{DevPfn, DeviceId, FrameRun},
    pgmap::{CHUNK_FRAMES, Pgmap},
};

fn race<A: Send + 'static, B: Send + 'static>(
    setup: fn() -> Pgmap,
    a: fn(&Pgmap) -> A,
    b: fn(&Pgmap) -> B,
    check: fn(&Pgmap, A, B),
) {
    race::race(3, setup, a, b, check);
}

fn pgmap(frames: u32) -> Pgmap {
    Pgmap::new(DeviceId::from_index(0).unwrap(), frames, Pgmap::storage_needed(frames).leak())
}

fn empty() -> Pgmap {
    pgmap(CHUNK_FRAMES)
}

fn full() -> Pgmap {
    let map = empty();
    map.alloc_run(CHUNK_FRAMES).unwrap();
    map
}

fn with_one_page() -> Pgmap {
    let map = empty();
    assert_eq!(map.alloc_page(), Some(page(0)));
    map
}

/// One huge unit with two holders.
fn shared_unit() -> Pgmap {
    let map = empty();
    map.get(map.alloc_huge().unwrap());
    map
}

fn page(n: u32) -> DevPfn {
    DevPfn::new(n)
}

fn unit() -> FrameRun {
    FrameRun { first: page(0), count: CHUNK_FRAMES }
}

fn put(map: &Pgmap, n: u32) -> bool {
    map.put(page(n)).is_freed()
}

#[test]
fn two_allocations_get_different_frames() {
    race(
        empty,
        |map| map.alloc_run(3).expect("there is room for both"),
        |map| map.alloc_page().expect("there is room for both"),
        |map, run, page| {
            assert!(page < run.first || page >= run.first.add(run.count), "{page:?} is in {run:?}");
            map.audit().unwrap();
        },
    );
}

#[test]
fn a_frame_freed_meanwhile_is_not_hidden() {
    race(
        full,
        |map| put(map, 1),
        Pgmap::alloc_page,
        |map, freed, got| {
            assert!(freed && got.is_none_or(|got| got == page(1)));
            // The audit wants a hint wherever there is room.
            map.audit().unwrap();
            assert_eq!(map.alloc_page().is_some(), got.is_none());
        },
    );
}

#[test]
fn a_chunk_that_fills_and_drains_meanwhile_keeps_its_hint() {
    race(
        || {
            let map = pgmap(2 * CHUNK_FRAMES);
            // The first chunk ends up full, with the hint that it has room still set; the second has one page.
            map.alloc_run(CHUNK_FRAMES).unwrap();
            map.alloc_page().unwrap();
            assert!(put(&map, 0));
            assert_eq!(map.alloc_page(), Some(page(0)));
            map
        },
        |map| put(map, 0),
        Pgmap::alloc_page,
        |map, freed, got| {
            assert!(freed && got.is_some());
            map.audit().unwrap();
        },
    );
}

#[test]
fn a_frame_may_be_handed_on_while_it_is_freed() {
    race(
        || {
            let map = empty();
            map.alloc_run(2).unwrap();
            map
        },
        |map| put(map, 0),
        Pgmap::alloc_page,
        |map, freed, got| {
            // Either the freed frame or another; its new owner finds no references but its own.
            assert!(freed);
            assert_eq!(map.refs(got.expect("there is room")), 1);
            map.audit().unwrap();
        },
    );
}

#[test]
fn a_chunk_becomes_huge_only_when_its_last_frame_is_all_gone() {
    race(
        with_one_page,
        |map| put(map, 0),
        |map| map.alloc_huge().map(|unit| map.split(unit).unwrap()),
        |map, freed, _| {
            assert!(freed);
            map.audit().unwrap();
        },
    );
}

#[test]
fn the_last_frame_and_a_huge_unit_race_for_the_chunk() {
    race(
        with_one_page,
        |map| put(map, 0),
        |map| (map.alloc_huge(), map.alloc_page()),
        |map, freed, (huge, small)| {
            assert!(freed && (huge.is_none() || small.is_none()), "one chunk is both huge and small");
            map.audit().unwrap();
            huge.or(small).map(|pfn| map.put(pfn));
            assert!(map.alloc_huge().is_some(), "a drained chunk is whole again");
        },
    );
}

#[test]
fn a_page_and_a_huge_unit_race_for_a_free_chunk() {
    race(empty, Pgmap::alloc_page, Pgmap::alloc_huge, |map, page, huge| {
        assert!(page.is_some() != huge.is_some(), "{page:?} and {huge:?}");
        map.audit().unwrap();
    });
}

#[test]
fn a_chunk_that_is_freed_meanwhile_is_not_taken_for_good() {
    race(
        || {
            let map = empty();
            map.alloc_huge().unwrap();
            map
        },
        |map| put(map, 0),
        |map| map.alloc_huge().is_some(),
        |map, freed, again| {
            assert!(freed);
            map.audit().unwrap();
            assert_eq!(map.alloc_huge().is_some(), !again);
        },
    );
}

#[test]
fn one_of_two_holders_puts_last() {
    race(
        || {
            let map = pgmap(1);
            map.get(map.alloc_page().unwrap());
            map
        },
        |map| put(map, 0),
        |map| put(map, 0),
        |map, here, there| {
            assert!(here != there, "exactly one put is the last");
            map.audit().unwrap();
        },
    );
}

#[test]
fn a_unit_is_split_while_its_other_holder_puts_it() {
    race(
        shared_unit,
        |map| map.put_run(map.split(page(0)).unwrap(), |_| ()),
        |map| map.put_run(unit(), |_| ()),
        |map, here, there| {
            assert_eq!(here + there, CHUNK_FRAMES);
            map.audit().unwrap();
            assert!(map.alloc_huge().is_some());
        },
    );
}

#[test]
fn a_unit_is_split_by_both_holders() {
    let split_and_put: fn(&Pgmap) -> bool = |map| {
        map.split(page(0)).unwrap();
        put(map, 0)
    };
    race(shared_unit, split_and_put, split_and_put, |map, here, there| {
        assert!(here != there);
        assert_eq!(map.refs(page(1)), 2);
        map.audit().unwrap();
    });
}

#[test]
fn what_is_allocated_while_the_pgmap_closes_is_counted_or_refused() {
    race(
        empty,
        |map| {
            map.close();
            map.live()
        },
        Pgmap::alloc_page,
        |map, live, got| {
            match got {
                Some(_) => assert_eq!(live, 1, "allocated after the pgmap was closed"),
                None => assert_eq!(map.live(), 0),
            }
            map.audit().unwrap();
        },
    );
}
