//! userfaultfd on the real kernel: filling, moving, protecting, and every message.
// UNSAFETY: changes its own mappings behind the messages, and forks.

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::{
    sync::{Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::Duration,
};

use common::{Map, in_child, load, ptr};
use uhmm_sys::{
    Errno, access,
    addr::{BLOCK_SIZE, PAGE_SIZE, PageRange, VirtAddr},
    arena,
    mem::HostBytes,
    pagemap::{Page, Pagemap},
    uffd::{
        Copied, Event, FaultAccess, Features, KernelFaults, OpenError, Protect, RegisterMode, SrcHoles, Uffd, Wake,
    },
};

const ALL_EVENTS: Features =
    Features::EVENT_REMAP.union(Features::EVENT_REMOVE).union(Features::EVENT_UNMAP).union(Features::THREAD_ID);

/// Held by who forks: a fork is told to every userfaultfd of the process that asked for it, so one test's fork would wait
/// for another test to read.
static FORK: Mutex<()> = Mutex::new(());

fn forking() -> MutexGuard<'static, ()> {
    FORK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A userfaultfd with these features, or `None` and the reason, printed.
fn open(features: Features) -> Option<Uffd> {
    let uffd = match Uffd::open(features) {
        Ok(uffd) => uffd,
        Err(why) => {
            println!("skipped: {why}");
            return None;
        }
    };
    let missing = features.difference(uffd.features());
    if missing.is_empty() {
        return Some(uffd);
    }
    println!("skipped: the kernel does not offer {missing:?} here");
    None
}

macro_rules! need {
    ($features:expr) => {
        match open($features) {
            Some(uffd) => uffd,
            None => return,
        }
    };
}

/// A page of staging memory full of `byte`.
fn staging(byte: u8, pages: u64) -> HostBytes {
    let range = arena::pages(pages * PAGE_SIZE, PAGE_SIZE).unwrap();
    let host = HostBytes::in_arena(range.start(), range.bytes()).unwrap();
    host.write(0, &vec![byte; usize::try_from(range.bytes()).unwrap()]);
    host
}

/// The next message, which is due at once.
fn next(uffd: &Uffd) -> Event {
    for _ in 0..200 {
        if uffd.wait(Some(100)).unwrap()
            && let Some(event) = uffd.read().unwrap()
        {
            return event;
        }
    }
    panic!("no message came");
}

#[test]
fn move_takes_pages_out_of_staging_and_leaves_holes() {
    let uffd = need!(Features::MOVE);
    let home = Map::anon(8);
    uffd.register(home.range, RegisterMode::MISSING).unwrap();
    let host = staging(7, 8);
    let moved = uffd.move_pages(home.start(), host.addr(), 8 * PAGE_SIZE, Wake::Now, SrcHoles::Fail);
    assert_eq!(moved, Copied::all(8 * PAGE_SIZE));
    assert!((0..8).all(|page| home.is_filled(page, 7)));
    let mut byte = [1];
    host.read(5 * PAGE_SIZE, &mut byte);
    assert_eq!(byte, [0], "what was moved is a hole, and reads as zero");

    // And out again, into the staging pages, which must be registered to be a destination.
    let out = Map::anon(8);
    uffd.register(out.range, RegisterMode::MISSING).unwrap();
    assert!(uffd.move_pages(out.start(), home.start(), 8 * PAGE_SIZE, Wake::Now, SrcHoles::Fail).is_all());
    assert!((0..8).all(|page| out.is_filled(page, 7)));
}

#[test]
fn move_stops_at_an_occupied_page_and_names_it_when_asked_again() {
    let uffd = need!(Features::MOVE);
    let home = Map::anon(4);
    home.store(2, 9);
    uffd.register(home.range, RegisterMode::MISSING).unwrap();
    let host = staging(7, 4);
    let to = |page: u64| home.start().add(page * PAGE_SIZE);
    let first = uffd.move_pages(home.start(), host.addr(), 4 * PAGE_SIZE, Wake::Now, SrcHoles::Fail);
    assert_eq!(first, Copied { done: 2 * PAGE_SIZE, stop: Some(Errno::AGAIN) });
    let again = uffd.move_pages(to(2), host.addr().add(2 * PAGE_SIZE), 2 * PAGE_SIZE, Wake::Now, SrcHoles::Fail);
    assert_eq!(again, Copied::none(Errno::EXIST));
    assert_eq!((home.load(1), home.load(2)), (7, 9));
}

#[test]
fn move_fails_at_holes_or_passes_over_them_as_asked() {
    let uffd = need!(Features::MOVE);
    let (home, from) = (Map::anon(3), Map::anon(3));
    uffd.register(home.range, RegisterMode::MISSING).unwrap();
    uffd.register(from.range, RegisterMode::MISSING).unwrap();
    assert!(uffd.copy(from.range.page(0), staging(1, 1).addr(), PAGE_SIZE, Wake::Now, Protect::Off).is_all());
    assert!(uffd.copy(from.range.page(2), staging(3, 1).addr(), PAGE_SIZE, Wake::Now, Protect::Off).is_all());
    let strict = uffd.move_pages(home.range.page(1), from.range.page(1), PAGE_SIZE, Wake::Now, SrcHoles::Fail);
    assert_eq!(strict, Copied::none(Errno::NOENT));
    let lax = uffd.move_pages(home.start(), from.start(), 3 * PAGE_SIZE, Wake::Now, SrcHoles::Allow);
    assert_eq!(lax, Copied::all(3 * PAGE_SIZE));
    assert_eq!((home.load(0), home.load(2)), (1, 3));
    assert!(uffd.zeropage(home.pages(1, 1), Wake::Now).is_all(), "the hole came along");
}

#[test]
fn move_of_a_whole_huge_page_keeps_it_whole() {
    let uffd = need!(Features::MOVE);
    let (home, from) = (Map::huge(1), Map::huge(1));
    from.store(0, 1);
    let pagemap = Pagemap::open().unwrap();
    let is_huge = |map: &Map| {
        let mut pages = [Page::empty(); 512];
        pagemap.scan(map.range, &mut pages).unwrap();
        pages.iter().all(|page| page.contains(Page::HUGE))
    };
    if !is_huge(&from) {
        println!("skipped: no huge page to be had, or no PAGEMAP_SCAN");
        return;
    }
    from.fill(3);
    uffd.register(home.range, RegisterMode::MISSING).unwrap();
    let moved = uffd.move_pages(home.start(), from.start(), BLOCK_SIZE, Wake::Now, SrcHoles::Fail);
    assert_eq!(moved, Copied::all(BLOCK_SIZE));
    assert!(is_huge(&home));
    assert!((0..512).all(|page| home.is_filled(page, 3u8.wrapping_add(page.to_le_bytes()[0]))));
}

#[test]
fn copy_and_zeropage_fill_holes_only() {
    let uffd = need!(Features::empty());
    let home = Map::anon(4);
    home.store(3, 9);
    uffd.register(home.range, RegisterMode::MISSING).unwrap();
    assert!(uffd.zeropage(home.pages(0, 1), Wake::Now).is_all());
    let host = staging(5, 3);
    assert!(uffd.copy(home.range.page(1), host.addr(), PAGE_SIZE, Wake::Later, Protect::Off).is_all());
    let partial = uffd.copy(home.range.page(2), host.addr(), 2 * PAGE_SIZE, Wake::Now, Protect::Off);
    assert_eq!(partial, Copied { done: PAGE_SIZE, stop: Some(Errno::AGAIN) });
    assert_eq!(uffd.zeropage(home.pages(3, 1), Wake::Now), Copied::none(Errno::EXIST));
    assert_eq!([0, 1, 2, 3].map(|page| home.load(page)), [0, 5, 5, 9]);
    let hole = Map::anon(1);
    let stray = uffd.copy(hole.start(), host.addr(), PAGE_SIZE, Wake::Now, Protect::Off);
    assert_eq!(stray, Copied::none(Errno::NOENT), "not registered");
    let mut byte = [1];
    host.read(0, &mut byte);
    assert_eq!(byte, [5], "a copy leaves its source");
}

#[test]
fn a_fault_waits_and_is_woken() {
    let uffd = need!(Features::THREAD_ID | Features::EXACT_ADDRESS);
    let home = Map::anon(2);
    uffd.register(home.range, RegisterMode::MISSING).unwrap();
    let host = staging(6, 1);
    for (page, write) in [(0usize, false), (1, true)] {
        thread::scope(|scope| {
            let (tell, told) = mpsc::channel();
            let home = &home;
            let toucher = scope.spawn(move || {
                tell.send(uhmm_sys::thread::gettid()).unwrap();
                if write {
                    home.store(page, 8);
                }
                home.load(page)
            });
            let Event::Fault { addr, access, wp, tid } = next(&uffd) else { panic!("another message") };
            assert_eq!(addr, home.range.page(page));
            assert_eq!(access, if write { FaultAccess::Write } else { FaultAccess::Read });
            assert!(!wp);
            assert_eq!(tid, Some(told.recv().unwrap()));
            assert!(uffd.copy(addr, host.addr(), PAGE_SIZE, Wake::Later, Protect::Off).is_all());
            uffd.wake(home.pages(page, 1)).unwrap();
            assert_eq!(toucher.join().unwrap(), if write { 8 } else { 6 });
        });
    }
    assert!(matches!(uffd.read(), Ok(None)));
    assert!(!uffd.wait(Some(0)).unwrap());
}

#[test]
fn a_system_call_on_a_missing_page_is_served() {
    let uffd = need!(Features::empty());
    if uffd.kernel_faults() == KernelFaults::UserOnly {
        println!("skipped: faults of system calls are not served here");
        return;
    }
    let home = Map::anon(1);
    uffd.register(home.range, RegisterMode::MISSING).unwrap();
    let host = staging(4, 1);
    thread::scope(|scope| {
        let (read, write) = std::io::pipe().unwrap();
        let at = home.ptr(0).expose_provenance();
        let writer = scope.spawn(move || {
            use std::os::fd::AsRawFd;
            // SAFETY: writes ten bytes of a mapping that outlives the thread.
            unsafe { libc::write(write.as_raw_fd(), std::ptr::with_exposed_provenance(at), 10) }
        });
        let Event::Fault { addr, .. } = next(&uffd) else { panic!("another message") };
        assert!(uffd.copy(addr.page(), host.addr(), PAGE_SIZE, Wake::Now, Protect::Off).is_all());
        assert_eq!(writer.join().unwrap(), 10);
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut &read, &mut bytes).unwrap();
        assert_eq!(bytes, [4; 10]);
    });
}

#[test]
fn write_protection_faults_and_is_lifted() {
    let uffd = need!(Features::FAULT_WP);
    let home = Map::anon(1);
    home.store(0, 1);
    uffd.register(home.range, RegisterMode::MISSING | RegisterMode::WP).unwrap();
    uffd.write_protect(home.range, Protect::On, Wake::Now).unwrap();
    assert_eq!(home.load(0), 1, "reads go on");
    thread::scope(|scope| {
        let writer = scope.spawn(|| home.store(0, 2));
        let event = next(&uffd);
        assert!(matches!(event, Event::Fault { access: FaultAccess::Write, wp: true, .. }), "{event:?}");
        assert_eq!(home.load(0), 1);
        uffd.write_protect(home.range, Protect::Off, Wake::Later).unwrap();
        uffd.wake(home.range).unwrap();
        writer.join().unwrap();
    });
    assert_eq!(home.load(0), 2);
}

#[test]
fn a_copied_page_can_come_write_protected() {
    let uffd = need!(Features::FAULT_WP);
    let home = Map::anon(1);
    uffd.register(home.range, RegisterMode::MISSING | RegisterMode::WP).unwrap();
    assert!(uffd.copy(home.start(), staging(1, 1).addr(), PAGE_SIZE, Wake::Now, Protect::On).is_all());
    let mut page = [Page::empty()];
    Pagemap::open().unwrap().scan(home.range, &mut page).unwrap();
    assert_eq!(page[0] & (Page::PRESENT | Page::UFFD_WP), Page::PRESENT | Page::UFFD_WP);
}

#[test]
fn a_protected_hole_has_a_marker_that_copy_replaces() {
    let uffd = need!(Features::FAULT_WP | Features::WP_UNPOPULATED);
    let home = Map::anon(3);
    uffd.register(home.range, RegisterMode::MISSING | RegisterMode::WP).unwrap();
    uffd.write_protect(home.pages(1, 1), Protect::On, Wake::Now).unwrap();
    let pagemap = Pagemap::open().unwrap();
    let mut scanned = [Page::empty(); 3];
    pagemap.scan(home.range, &mut scanned).unwrap();
    let marker = Page::SWAPPED | Page::UFFD_WP;
    assert_eq!(scanned, [Page::empty(), marker, Page::empty()]);
    let mut words = [Page::empty(); 3];
    pagemap.read_words(home.range, &mut words).unwrap();
    assert_eq!(words[1] & marker, marker);
    assert!(uffd.copy(home.range.page(1), staging(2, 1).addr(), PAGE_SIZE, Wake::Now, Protect::Off).is_all());
    assert_eq!(home.load(1), 2);
}

#[test]
fn a_poisoned_hole_kills_who_touches_it() {
    let uffd = need!(Features::POISON);
    let home = Map::anon(2);
    uffd.register(home.range, RegisterMode::MISSING).unwrap();
    assert!(uffd.poison(home.pages(1, 1), Wake::Now).is_all());
    let mut byte = [0];
    let read = access::read(home.range.page(1), &mut byte);
    assert!(matches!(read, Copied { done: 0, stop: Some(Errno::FAULT | Errno::HWPOISON) }), "{read:?}");
    let _forking = forking();
    // The mark is inherited, so that a child can show what a touch does.
    let at = home.range.page(1);
    assert_eq!(in_child(|| load(at)), 256 + libc::SIGBUS);
    assert_eq!(uffd.poison(home.pages(1, 1), Wake::Now), Copied::none(Errno::EXIST));
}

#[test]
fn messages_tell_of_remap_remove_and_unmap() {
    let uffd = need!(ALL_EVENTS);
    let home = Map::anon(6);
    home.fill(1);
    uffd.register(home.range, RegisterMode::MISSING).unwrap();
    let elsewhere = Map::anon(6);
    let (from, to) = (home.start(), elsewhere.start());
    thread::scope(|scope| {
        let dropper = scope.spawn(|| home.advise(libc::MADV_DONTNEED).unwrap());
        match next(&uffd) {
            Event::Remove { start, end } => assert_eq!((start, end), (home.range.start(), home.range.end())),
            other => panic!("{other:?}"),
        }
        dropper.join().unwrap();

        home.forget(home.range);
        let mover = scope.spawn(move || {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY: moves a mapping of the test's over another of the test's.
            unsafe { libc::mremap(ptr(from).cast(), 6 * 4096, 6 * 4096, flags, ptr(to).cast::<libc::c_void>()) }
                .expose_provenance()
        });
        match next(&uffd) {
            Event::Remap { from: was, to: is, len } => assert_eq!((was, is, len), (from, to, 6 * PAGE_SIZE)),
            other => panic!("{other:?}"),
        }
        // The old place is told of as unmapped too.
        while !mover.is_finished() {
            if uffd.wait(Some(10)).unwrap()
                && let Some(event) = uffd.read().unwrap()
            {
                assert!(matches!(event, Event::Unmap { start, .. } if start == from), "{event:?}");
            }
        }
        assert_eq!(mover.join().unwrap() as u64, to.get());

        let unmapper = scope.spawn(|| elsewhere.unmap(2, 3));
        match next(&uffd) {
            Event::Unmap { start, end } => {
                assert_eq!((start, end), (elsewhere.range.page(2), elsewhere.range.page(5)));
            }
            other => panic!("{other:?}"),
        }
        unmapper.join().unwrap();
    });
    // Dropping the mappings would wait for messages to be read.
    drop(uffd);
}

#[test]
fn nothing_is_filled_while_a_message_waits_to_be_read() {
    let uffd = need!(ALL_EVENTS);
    let (home, other) = (Map::anon(2), Map::anon(1));
    home.store(0, 1);
    uffd.register(home.range, RegisterMode::MISSING).unwrap();
    uffd.register(other.range, RegisterMode::MISSING).unwrap();
    let host = staging(1, 1);
    thread::scope(|scope| {
        let unmapper = scope.spawn(|| home.unmap(0, 1));
        assert!(uffd.wait(None).unwrap());
        let refused = uffd.copy(other.start(), host.addr(), PAGE_SIZE, Wake::Now, Protect::Off);
        assert_eq!(refused, Copied::none(Errno::AGAIN));
        assert!(!unmapper.is_finished(), "the caller waits for the message to be read");
        assert!(matches!(uffd.read(), Ok(Some(Event::Unmap { .. }))));
        unmapper.join().unwrap();
        let filled = uffd.copy(other.start(), host.addr(), PAGE_SIZE, Wake::Now, Protect::Off);
        assert_eq!(filled, Copied::all(PAGE_SIZE));
    });
    drop(uffd);
}

#[test]
fn a_fork_brings_a_userfaultfd_for_the_child() {
    let _forking = forking();
    let uffd = need!(Features::EVENT_FORK);
    let home = Map::anon(2);
    home.store(1, 9);
    uffd.register(home.range, RegisterMode::MISSING).unwrap();
    let host = staging(5, 1);
    thread::scope(|scope| {
        let at = home.start();
        // The child reads a page that the parent has not: somebody must serve it, or it reads zero.
        let forker = scope.spawn(move || in_child(|| load(at).wrapping_add(load(at.add(PAGE_SIZE)))));
        let Event::Fork { child } = next(&uffd) else { panic!("another message") };
        assert_eq!(child.features(), uffd.features());
        let Event::Fault { addr, .. } = next(&child) else { panic!("another message") };
        assert_eq!(addr.page(), at);
        assert!(child.copy(at, host.addr(), PAGE_SIZE, Wake::Now, Protect::Off).is_all());
        assert_eq!(forker.join().unwrap(), 14);
        let gone = child.copy(at, host.addr(), PAGE_SIZE, Wake::Now, Protect::Off);
        assert_eq!(gone, Copied::none(Errno::SRCH), "the child's memory went with it");
    });
    let mut page = [Page::empty(); 2];
    Pagemap::open().unwrap().scan(home.range, &mut page).unwrap();
    assert_eq!(page[0], Page::empty(), "the parent's hole is its own");
}

#[test]
fn the_engines_own_objects_are_refused() {
    let uffd = need!(Features::empty());
    let words = arena::slice::<std::sync::atomic::AtomicU64>(1024).unwrap();
    let page = PageRange::page_of(VirtAddr::of(&raw const words[512]));
    let host = staging(1, 1);
    assert_eq!(uffd.register(page, RegisterMode::MISSING), Err(Errno::INVAL));
    assert_eq!(uffd.unregister(page), Err(Errno::INVAL));
    assert_eq!(uffd.zeropage(page, Wake::Now), Copied::none(Errno::INVAL));
    let onto = uffd.copy(page.start(), host.addr(), PAGE_SIZE, Wake::Now, Protect::Off);
    assert_eq!(onto, Copied::none(Errno::INVAL));
    let home = Map::anon(1);
    uffd.register(home.range, RegisterMode::MISSING).unwrap();
    let out = uffd.move_pages(home.start(), page.start(), PAGE_SIZE, Wake::Now, SrcHoles::Fail);
    assert_eq!(out, Copied::none(Errno::INVAL));
    assert_eq!(access::zap(page), Err(Errno::INVAL));
    assert_eq!(access::protect(page, uhmm_sys::maps::Prot::READ), Err(Errno::INVAL));
    assert_eq!(access::write(page.start(), &[1]), Copied::none(Errno::INVAL));
    assert_eq!(words[512].load(std::sync::atomic::Ordering::Relaxed), 0);
}

#[test]
fn registration_answers_typed_errors() {
    let (one, two) = (need!(Features::empty()), need!(Features::empty()));
    let map = Map::anon(2);
    one.register(map.range, RegisterMode::MISSING).unwrap();
    assert_eq!(two.register(map.range, RegisterMode::MISSING), Err(Errno::BUSY));
    map.unmap(1, 1);
    let hole = PageRange::new(map.range.page(1), PAGE_SIZE).unwrap();
    assert_eq!(one.register(hole, RegisterMode::MISSING), Err(Errno::INVAL));
    one.unregister(map.pages(0, 1)).unwrap();
    two.register(map.pages(0, 1), RegisterMode::MISSING).unwrap();
}

#[test]
fn without_privilege_there_is_user_mode_only() {
    // SAFETY: asks.
    if unsafe { libc::geteuid() } != 0 {
        println!("skipped: only root can become somebody else");
        return;
    }
    let unprivileged = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if unprivileged.is_ok_and(|text| text.trim() == "1") {
        println!("skipped: here everybody has it");
        return;
    }
    let _forking = forking();
    // The mask is read before the fork, for that allocates.
    let masked = uhmm_sys::probe::mask();
    let status = in_child(|| {
        let nobody: libc::uid_t = 65534;
        // SAFETY: gives privileges up, in this child alone; the raw call, for libc's would signal other threads.
        if unsafe { libc::syscall(libc::SYS_setresuid, nobody, nobody, nobody) } != 0 {
            return 1;
        }
        match Uffd::open(Features::EVENT_FORK | Features::EVENT_UNMAP) {
            Ok(uffd) if uffd.kernel_faults() == KernelFaults::Yes => 2,
            Ok(uffd) if uffd.features().contains(Features::EVENT_FORK) => 3,
            Ok(_) => 0,
            Err(OpenError::Denied { .. }) => 4,
            Err(_) => 5,
        }
    });
    let expected = if masked.contains(uhmm_sys::probe::Cap::UffdUserOnly) { 4 } else { 0 };
    assert_eq!(status, expected);
}

#[test]
fn errors_say_each_way_that_failed() {
    let error = OpenError::Denied { syscall: Errno::PERM, device: Errno::NOENT, user_only: Errno::NOSYS };
    let text = error.to_string();
    assert!(text.contains("/dev/userfaultfd: No such file"), "{text}");
}

#[test]
fn wait_ends_at_its_time_and_wakes_for_a_fault() {
    let uffd = need!(Features::empty());
    let home = Map::anon(1);
    uffd.register(home.range, RegisterMode::MISSING).unwrap();
    let start = std::time::Instant::now();
    assert!(!uffd.wait(Some(30)).unwrap());
    assert!(start.elapsed() >= Duration::from_millis(29));
    thread::scope(|scope| {
        let toucher = scope.spawn(|| home.load(0));
        assert!(uffd.wait(None).unwrap());
        assert!(uffd.zeropage(home.range, Wake::Now).is_all());
        assert_eq!(toucher.join().unwrap(), 0);
    });
}
