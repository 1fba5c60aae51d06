//! A whole program on the private heap: from the first allocation before `main` on, everything is in the arena.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, mpsc},
    thread,
};

use uhmm_sys::{
    addr::VirtAddr,
    arena::{self, PrivateAlloc},
};

#[global_allocator]
static ALLOCATOR: PrivateAlloc = PrivateAlloc;

fn inside<T: ?Sized>(value: &T) -> bool {
    arena::range().is_some_and(|range| range.contains(VirtAddr::of(std::ptr::from_ref(value))))
}

#[test]
fn collections_live_in_the_arena() {
    let mut map = HashMap::new();
    let mut tree = BTreeMap::new();
    for n in 0..20_000u64 {
        let text = format!("number {n}");
        map.insert(n, text.clone());
        tree.insert(text, vec![n; usize::try_from(n % 50).unwrap()]);
        if n % 3 == 0 {
            map.remove(&(n / 2));
        }
    }
    assert!(map.iter().all(|(n, text)| *text == format!("number {n}") && inside(text.as_str())));
    assert!(tree.iter().all(|(text, list)| list.iter().all(|n| *text == format!("number {n}"))));
    let boxed: Box<[u8]> = vec![1; 3 << 20].into();
    assert!(inside(&*boxed) && boxed.iter().all(|byte| *byte == 1));
    assert!(vec![0u8; 1 << 20].iter().all(|byte| *byte == 0), "zeroed means zero, also for recycled memory");
}

#[test]
fn threads_pass_memory_to_each_other() {
    let (send, receive) = mpsc::channel::<Arc<Vec<u64>>>();
    let senders: Vec<_> = (0..4u64)
        .map(|seed| {
            let send = send.clone();
            thread::spawn(move || {
                for n in 0..2000 {
                    send.send(Arc::new(vec![seed; usize::try_from(n % 700).unwrap()])).unwrap();
                }
            })
        })
        .collect();
    drop(send);
    let mut total = 0;
    for list in receive {
        assert!(list.iter().all(|n| *n == list[0]));
        total += list.len();
    }
    senders.into_iter().for_each(|sender| sender.join().unwrap());
    assert_eq!(total, 4 * (0..2000).map(|n| n % 700).sum::<usize>());
}

#[test]
fn the_allocator_made_the_arena_itself() {
    assert_eq!(arena::range().unwrap().bytes(), arena::DEFAULT_BYTES);
}
