//! What the page tables, the map of the process and the limits say, on the real kernel; and what must not be moved.
// UNSAFETY: asks the C library where its own things are.

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::{
    ffi::CStr,
    fs::File,
    os::fd::{AsFd, AsRawFd},
    sync::{Barrier, mpsc},
    thread,
};

use common::{Map, RW, Rng, check, in_child};
use uhmm_sys::{
    addr::{BLOCK_SIZE, PAGE_SIZE, PageRange, VirtAddr},
    exclude, limits,
    maps::{Backing, Maps, Prot, Sharing, Vma, anon_rss_bytes},
    mem::Mapping,
    pagemap::{Page, Pagemap},
    thread::Kind,
};

fn scan(range: PageRange) -> Vec<Page> {
    let mut pages = vec![Page::HUGE; range.pages()];
    Pagemap::open().unwrap().scan(range, &mut pages).unwrap();
    pages
}

fn words(range: PageRange) -> Vec<Page> {
    let mut pages = vec![Page::HUGE; range.pages()];
    Pagemap::open().unwrap().read_words(range, &mut pages).unwrap();
    pages
}

#[test]
fn a_scan_tells_holes_data_and_the_zero_page_apart() {
    let map = Map::anon(6);
    map.advise(libc::MADV_NOHUGEPAGE).unwrap();
    map.store(1, 1);
    assert_eq!(map.load(3), 0);
    map.unmap(5, 1);
    let has_scan = Pagemap::open().unwrap().has_scan();
    let zero = if has_scan { Page::PRESENT | Page::ZERO } else { Page::PRESENT };
    let pages = scan(map.range);
    assert_eq!(pages[0], Page::empty());
    assert_eq!(pages[1] - Page::EXCLUSIVE, Page::PRESENT);
    assert_eq!(pages[2], Page::empty());
    assert!(pages[3].contains(zero), "{:?}", pages[3]);
    assert_eq!(pages[4..], [Page::empty(); 2], "what is not mapped is nothing");
}

#[test]
fn a_scan_knows_huge_pages_and_files() {
    let map = Map::huge(1);
    map.store(7, 1);
    let pages = scan(map.range);
    if pages[0].contains(Page::HUGE) {
        assert!(pages.iter().all(|page| page.contains(Page::PRESENT | Page::HUGE)));
    } else {
        println!("skipped in part: no huge page to be had, or no PAGEMAP_SCAN");
    }
    let device = Mapping::memfd("scan", 4 * PAGE_SIZE).unwrap();
    device.write(PAGE_SIZE, &[1]);
    let pages = scan(device.range());
    assert_eq!(pages[0] & Page::PRESENT, Page::empty());
    assert!(pages[1].contains(Page::PRESENT | Page::FILE));
}

#[test]
fn both_ways_of_looking_agree() {
    // More changes than one call reports, and more pages than one read holds.
    let map = Map::anon(3000);
    map.advise(libc::MADV_NOHUGEPAGE).unwrap();
    let mut rng = Rng(11);
    for page in 0..3000 {
        match rng.below(3) {
            0 => map.store(page, 1),
            1 => _ = map.load(page),
            _ => {}
        }
    }
    for (first, count) in [(0, 3000), (1, 1), (2999, 1), (255, 600)] {
        let range = map.pages(first, count);
        let basic = |pages: Vec<Page>| -> Vec<Page> {
            pages.into_iter().map(|page| page & (Page::PRESENT | Page::SWAPPED | Page::UFFD_WP)).collect()
        };
        assert_eq!(basic(scan(range)), basic(words(range)));
    }
}

#[test]
fn frames_are_told_to_the_privileged() {
    let map = Map::anon(2);
    map.store(0, 1);
    let pagemap = Pagemap::open().unwrap();
    assert_eq!(pagemap.pfn(map.range.page(1)), Ok(None));
    let before = pagemap.pfn(map.range.page(0)).unwrap();
    // SAFETY: asks.
    if unsafe { libc::geteuid() } != 0 {
        assert_eq!(before, None);
        println!("skipped: frame numbers are hidden");
        return;
    }
    assert!(before.is_some());
}

fn find(maps: &Maps, addr: VirtAddr) -> Vma {
    maps.find(addr).unwrap().expect("something is mapped there or above")
}

/// Both ways of asking.
fn both() -> [Maps; 2] {
    [Maps::open().unwrap(), Maps::text()]
}

#[test]
fn mappings_are_found_by_any_of_their_addresses_and_from_below() {
    // Nobody else maps anything between the guards, for they are there.
    let map = Map::anon(7);
    map.protect(0, 1, libc::PROT_NONE);
    map.protect(6, 1, libc::PROT_NONE);
    map.protect(3, 1, libc::PROT_READ);
    for maps in both() {
        for (page, first, count, prot) in
            [(1, 1, 2, Prot::READ | Prot::WRITE), (2, 1, 2, Prot::READ | Prot::WRITE), (3, 3, 1, Prot::READ)]
        {
            for offset in [0, PAGE_SIZE - 1] {
                let vma = find(&maps, map.range.page(page).add(offset));
                assert_eq!((vma.range, vma.prot), (map.pages(first, count), prot));
                assert_eq!(
                    (vma.sharing, vma.backing, vma.page_size),
                    (Sharing::Private, Backing::Anonymous, PAGE_SIZE)
                );
                assert!(vma.is_private_anonymous());
            }
        }
    }
    map.unmap(3, 1);
    for maps in both() {
        // The hole may be taken by another thread at any time, but not by memory that ends elsewhere.
        let vma = find(&maps, map.range.page(3));
        assert!(
            vma.range == map.pages(4, 2) || map.pages(3, 1).contains_range(vma.range) || vma.range.overlaps(map.range)
        );
    }
}

#[test]
fn the_first_and_the_last_mapping_have_neighbours_of_nothing() {
    for maps in both() {
        let mut all = Vec::with_capacity(10_000);
        maps.for_each(&mut |vma| all.push(vma)).unwrap();
        assert!(all.windows(2).all(|two| two[0].range.end() <= two[1].range.start()));
        let last = all.last().unwrap();
        assert_eq!(maps.find(last.range.end()), Ok(None));
        assert_eq!(find(&maps, VirtAddr::new(0)).range.start(), all[0].range.start());
        assert!(all.iter().any(|vma| vma.backing == Backing::Stack && vma.prot.contains(Prot::WRITE)));
        assert!(all.iter().any(|vma| vma.backing == Backing::Special));
        assert!(all.iter().any(|vma| vma.backing == Backing::File && vma.prot.contains(Prot::EXEC)));
        assert!(all.iter().filter(|vma| vma.is_private_anonymous()).count() > 2);
    }
}

#[test]
fn each_kind_of_backing_is_told_the_same_by_both_ways() {
    let file = File::open(std::env::current_exe().unwrap()).unwrap();
    let memfd = Mapping::memfd("a name", PAGE_SIZE).unwrap();
    let private = libc::MAP_PRIVATE;
    let cases = [
        (Map::new(PAGE_SIZE, RW, private | libc::MAP_ANONYMOUS, -1), Backing::Anonymous, Sharing::Private),
        (Map::new(PAGE_SIZE, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1), Backing::File, Sharing::Shared),
        (Map::new(PAGE_SIZE, libc::PROT_READ, private, file.as_raw_fd()), Backing::File, Sharing::Private),
        (Map::new(PAGE_SIZE, RW, private, file.as_raw_fd()), Backing::File, Sharing::Private),
        (Map::new(PAGE_SIZE, RW, private, memfd.as_fd().as_raw_fd()), Backing::File, Sharing::Private),
    ];
    for maps in both() {
        for (map, backing, sharing) in &cases {
            let vma = find(&maps, map.start());
            assert_eq!((vma.backing, vma.sharing), (*backing, *sharing), "{vma:?}");
            assert!(vma.range.contains_range(map.range));
        }
    }
    // A name that is given does not make memory the kernel's own.
    let named = Map::anon(1);
    let name = c"engine test";
    let set_vma = 0x5356_4d41;
    // SAFETY: names a mapping of the test's.
    let done = unsafe { libc::prctl(set_vma, 0, named.ptr(0), 4096, name.as_ptr()) };
    if check(done).is_err() {
        println!("skipped in part: mappings cannot be named here");
    }
    for maps in both() {
        assert_eq!(find(&maps, named.start()).backing, Backing::Anonymous);
    }
}

#[test]
fn hugetlb_memory_is_not_base_pages() {
    let len = usize::try_from(BLOCK_SIZE).unwrap();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at addresses that nobody uses; never touched, so it needs no page.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, RW, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        println!("skipped: no hugetlb here");
        return;
    }
    for maps in both() {
        let vma = find(&maps, VirtAddr::of(at));
        assert_eq!((vma.page_size, vma.is_private_anonymous()), (BLOCK_SIZE, false));
    }
    // SAFETY: mapped above.
    check(unsafe { libc::munmap(at, len) }).unwrap();
}

#[test]
fn a_long_file_name_does_not_hide_a_mapping() {
    let dir = std::env::temp_dir().join(format!("uhmm-{}", std::process::id()));
    let deep = dir.join("d".repeat(200)).join("e".repeat(200));
    std::fs::create_dir_all(&deep).unwrap();
    let path = deep.join("f".repeat(200));
    std::fs::write(&path, [0; 4096]).unwrap();
    let file = File::open(&path).unwrap();
    let map = Map::new(PAGE_SIZE, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd());
    std::fs::remove_dir_all(&dir).unwrap();
    for maps in both() {
        let vma = find(&maps, map.start());
        assert_eq!((vma.range, vma.backing), (map.range, Backing::File));
    }
}

#[test]
fn anonymous_memory_is_counted() {
    let pages = 4096;
    let map = Map::anon(pages);
    map.advise(libc::MADV_NOHUGEPAGE).unwrap();
    // In a child, where no other test allocates.
    let status = in_child(|| {
        let Ok(before) = anon_rss_bytes() else { return 1 };
        for page in 0..map.range.pages() {
            map.store(page, 1);
        }
        let Ok(after) = anon_rss_bytes() else { return 1 };
        let grown = after.saturating_sub(before);
        // The kernel counts some pages late, a CPU's worth at a time.
        let slack = 512 * PAGE_SIZE;
        if grown.abs_diff(pages * PAGE_SIZE) < slack { 0 } else { 2 }
    });
    assert_eq!(status, 0);
}

#[test]
fn control_blocks_of_all_threads_are_excluded() {
    let (tell, told) = mpsc::channel();
    let done = Barrier::new(4);
    thread::scope(|scope| {
        for _ in 0..3 {
            let (tell, done) = (tell.clone(), &done);
            scope.spawn(move || {
                tell.send(kernel_touched()).unwrap();
                done.wait();
            });
        }
        let mut touched: Vec<VirtAddr> = (0..3).flat_map(|_| told.recv().unwrap()).collect();
        touched.extend(kernel_touched());
        let mut pages = Vec::new();
        exclude::thread_control_pages(&mut |range| pages.push(range)).unwrap();
        done.wait();
        for addr in touched {
            assert!(pages.iter().any(|range| range.contains(addr)), "{addr} is not in {pages:?}");
        }
    });
}

/// Addresses that the kernel touches on behalf of the calling thread: its robust list and its rseq area.
fn kernel_touched() -> Vec<VirtAddr> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: the kernel writes two words.
    let done = unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut len) };
    assert_eq!(done, 0);
    let mut touched = vec![VirtAddr::new(head), VirtAddr::new(head + len - 1)];
    // SAFETY: looks a name up.
    let offset = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()) };
    if !offset.is_null() {
        // SAFETY: glibc defines it as a constant of that type.
        let offset = unsafe { offset.cast::<i64>().read() };
        // SAFETY: the C library's handle is the thread pointer.
        let tp = unsafe { libc::pthread_self() };
        touched.push(VirtAddr::new(tp.checked_add_signed(offset).unwrap()));
        touched.push(VirtAddr::new(tp.checked_add_signed(offset).unwrap() + 31));
    }
    touched
}

thread_local! {
    static LOCAL: std::cell::Cell<u64> = const { std::cell::Cell::new(1) };
}

fn own_pages_are_complete() -> bool {
    let mut pages = [PageRange::page_of(VirtAddr::new(0)); 4];
    let mut count = 0;
    exclude::own_tls_pages(&mut |range| {
        pages[count] = range;
        count += 1;
    })
    .unwrap();
    let has = |addr: u64| pages[..count].iter().any(|range| range.contains(VirtAddr::new(addr)));
    // SAFETY: the place of the thread's errno.
    let errno = VirtAddr::of(unsafe { libc::__errno_location() }).get();
    // SAFETY: the C library's handle is the thread pointer.
    let tp = unsafe { libc::pthread_self() };
    // SAFETY: by the ABI, the thread pointer's second word is the storage vector.
    let vector = unsafe { std::ptr::with_exposed_provenance::<u64>(usize::try_from(tp + 8).unwrap()).read() };
    LOCAL.with(|local| has(VirtAddr::of(local).get())) && has(errno) && has(tp) && has(vector) && has(vector + 16)
}

#[test]
fn a_threads_own_storage_is_excluded() {
    assert!(own_pages_are_complete());
    thread::spawn(|| assert!(own_pages_are_complete())).join().unwrap();
    static RAW: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    let body = |_| RAW.store(own_pages_are_complete(), std::sync::atomic::Ordering::Release);
    uhmm_sys::thread::spawn(Kind::Raw, "own", None, body, 0).unwrap().join(None);
    assert!(RAW.load(std::sync::atomic::Ordering::Acquire));
}

#[test]
fn the_engines_statics_are_excluded() {
    static DATA: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(7);
    static ZEROED: [std::sync::atomic::AtomicU64; 5000] = [const { std::sync::atomic::AtomicU64::new(0) }; 5000];
    let mut pages = Vec::new();
    exclude::engine_statics(&mut |range| pages.push(range));
    let symbol = |name: &CStr| {
        // SAFETY: looks a name up.
        VirtAddr::of(unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) })
    };
    for addr in
        [VirtAddr::of(&raw const DATA), VirtAddr::of(&raw const ZEROED[4999]), symbol(c"stdout"), symbol(c"environ")]
    {
        assert!(pages.iter().any(|range| range.contains(addr)), "{addr} is not in {pages:?}");
    }
    let heap = Box::new(1);
    assert!(!pages.iter().any(|range| range.contains(VirtAddr::of(&raw const *heap))));
    for range in pages {
        // Readable: they are mapped, not only named.
        let mut byte = [0];
        assert!(uhmm_sys::access::read(range.start(), &mut byte).is_all());
    }
}

#[test]
fn limits_agree_with_the_c_library() {
    // SAFETY: asks.
    let page_count = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
    assert_eq!(limits::total_ram(), u64::try_from(page_count).unwrap() * PAGE_SIZE);
    assert_eq!(limits::online_cpus(), thread::available_parallelism().unwrap().get());
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is a local.
    check(unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) }).unwrap();
    assert_eq!(limits::memlock(), (limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur));
    assert!(limits::max_map_count().unwrap() > 1000);
    assert!(limits::overcommit().unwrap() <= 2);
    let text = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let name = format!("[{:?}]", limits::thp_mode()).to_lowercase();
    assert!(text.is_empty() || text.contains(&name), "{name} in {text}");
}
