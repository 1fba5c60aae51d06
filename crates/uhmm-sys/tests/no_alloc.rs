//! Engine threads ask these questions while memory is in motion: nothing here may allocate.
// UNSAFETY: a global allocator that counts.

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use common::Map;
use uhmm_sys::{
    access,
    addr::{PAGE_SIZE, VirtAddr},
    arena, exclude, fence, limits,
    maps::{Maps, anon_rss_bytes},
    mem::HostBytes,
    pagemap::{Page, Pagemap},
    thread::{self, Kind},
    uffd::{Features, Protect, RegisterMode, SrcHoles, Uffd, Wake},
};

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: the caller's obligation is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's obligation is the same.
        unsafe { System.dealloc(ptr, layout) };
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often the calling thread allocates while `f` runs.
fn allocations(f: impl FnOnce()) -> u64 {
    let before = COUNT.get();
    f();
    COUNT.get() - before
}

#[test]
fn the_counter_counts() {
    assert_ne!(allocations(|| drop(std::hint::black_box(vec![1, 2, 3]))), 0);
}

#[test]
fn looking_does_not_allocate() {
    let map = Map::anon(600);
    map.fill(1);
    let (pagemap, maps, text) = (Pagemap::open().unwrap(), Maps::open().unwrap(), Maps::text());
    let mut pages = vec![Page::empty(); 600];
    exclude::own_tls_pages(&mut |_| ()).unwrap();
    let questions: [(&str, &mut dyn FnMut()); 12] = [
        ("scan", &mut || pagemap.scan(map.range, &mut pages).unwrap()),
        ("pfn", &mut || _ = pagemap.pfn(map.start()).unwrap()),
        ("find", &mut || _ = maps.find(map.start()).unwrap()),
        ("find in text", &mut || _ = text.find(map.start()).unwrap()),
        ("for each", &mut || maps.for_each(&mut |_| ()).unwrap()),
        ("for each in text", &mut || text.for_each(&mut |_| ()).unwrap()),
        ("rss", &mut || _ = anon_rss_bytes().unwrap()),
        ("control pages", &mut || exclude::thread_control_pages(&mut |_| ()).unwrap()),
        ("statics", &mut || exclude::engine_statics(&mut |_| ())),
        ("own storage", &mut || exclude::own_tls_pages(&mut |_| ()).unwrap()),
        ("limits", &mut || _ = (limits::max_map_count(), limits::total_ram(), limits::thp_mode(), limits::rlimit_as())),
        ("cpus", &mut || _ = (thread::allowed_cpus().iter().count(), thread::current_cpu())),
    ];
    for (name, ask) in questions {
        ask();
        assert_eq!(allocations(ask), 0, "{name}");
    }
    let mut words = vec![Page::empty(); 600];
    assert_eq!(allocations(|| pagemap.read_words(map.range, &mut words).unwrap()), 0);
}

#[test]
fn acting_does_not_allocate() {
    fence::register_membarrier();
    // A process starts its first thread of the engine's before memory is in motion.
    assert!(thread::spawn(Kind::Raw, "first", None, |_| (), 0).unwrap().join(None));
    let map = Map::anon(4);
    map.fill(1);
    let mut bytes = [0; 64];
    let act = || {
        let words = arena::slice::<std::sync::atomic::AtomicU64>(1000).unwrap();
        arena::value(words).unwrap();
        let range = arena::pages(3 * PAGE_SIZE, PAGE_SIZE).unwrap();
        let host = HostBytes::in_arena(range.start(), range.bytes()).unwrap();
        assert!(access::read_to_host(map.start(), host).is_all());
        assert!(access::read(map.start(), &mut bytes).is_all());
        assert!(!access::write(VirtAddr::new(0), &bytes).is_all());
        access::zap(map.pages(3, 1)).unwrap();
        fence::heavy();
        fence::light();
        assert!(thread::spawn(Kind::Raw, "raw", None, |_| (), 0).unwrap().join(None));
    };
    assert_eq!(allocations(act), 0);
}

#[test]
fn serving_does_not_allocate() {
    let wanted = Features::MOVE | Features::FAULT_WP;
    let uffd = match Uffd::open(wanted) {
        Ok(uffd) if uffd.features().contains(wanted) => uffd,
        other => {
            println!("skipped: {other:?}");
            return;
        }
    };
    let map = Map::anon(4);
    let range = arena::pages(4 * PAGE_SIZE, PAGE_SIZE).unwrap();
    HostBytes::in_arena(range.start(), PAGE_SIZE).unwrap().write(0, &[7]);
    let serve = || {
        uffd.register(map.range, RegisterMode::MISSING | RegisterMode::WP).unwrap();
        let copied = uffd.copy(map.range.page(0), range.start(), PAGE_SIZE, Wake::Now, Protect::Off);
        assert!(copied.is_all());
        let moved = uffd.move_pages(map.range.page(1), range.start(), PAGE_SIZE, Wake::Now, SrcHoles::Fail);
        assert!(moved.is_all());
        assert!(uffd.zeropage(map.pages(2, 1), Wake::Later).is_all());
        uffd.write_protect(map.pages(0, 1), Protect::On, Wake::Now).unwrap();
        uffd.wake(map.range).unwrap();
        assert!(!uffd.wait(Some(0)).unwrap());
        assert!(uffd.read().unwrap().is_none());
        uffd.unregister(map.range).unwrap();
    };
    assert_eq!(allocations(serve), 0);
    assert_eq!([0, 1, 2].map(|page| map.load(page)), [7, 7, 0]);
}
