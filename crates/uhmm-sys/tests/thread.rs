//! Threads of both kinds on the real kernel.
// UNSAFETY: asks the kernel and the C library about the threads, and forks.

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::{
    cell::{Cell, RefCell},
    env,
    process::Command,
    sync::{
        Mutex,
        atomic::{
            AtomicU32, AtomicU64, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    time::{Duration, Instant},
};

use uhmm_sys::{
    Errno,
    addr::VirtAddr,
    arena, futex,
    mem::shared_slice,
    thread::{self, CpuSet, Kind},
};

/// Only a broken kernel or a lost wake-up makes a test wait so long.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(20));

/// What a thread found out about itself. Statics, for an entry has no environment.
#[derive(Default)]
struct Facts {
    tid: AtomicU32,
    stack: AtomicU64,
    errno_place: AtomicU64,
    mask: AtomicU64,
    name: [AtomicU64; 2],
    cpus: AtomicUsize,
    cpu: AtomicUsize,
    self_pointer: AtomicU64,
}

fn report(facts: usize) {
    let facts = &FACTS[facts];
    let local = 0u8;
    facts.stack.store(VirtAddr::of(&raw const local).get(), Relaxed);
    facts.tid.store(thread::gettid(), Relaxed);
    // SAFETY: the place of the thread's errno.
    facts.errno_place.store(VirtAddr::of(unsafe { libc::__errno_location() }).get(), Relaxed);
    let mut mask = 0u64;
    // SAFETY: asks for the mask only; eight bytes.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, 0, &raw mut mask, 8) };
    facts.mask.store(mask, Relaxed);
    let mut name = [0u64; 2];
    // SAFETY: the kernel writes 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    facts.name[0].store(name[0], Relaxed);
    facts.name[1].store(name[1], Relaxed);
    let cpus = thread::allowed_cpus();
    facts.cpus.store(cpus.len(), Relaxed);
    facts.cpu.store(thread::current_cpu(), Relaxed);
    facts.self_pointer.store(pthread_self(), Release);
}

fn pthread_self() -> u64 {
    // SAFETY: takes nothing.
    unsafe { libc::pthread_self() }
}

static FACTS: [Facts; 2] = [const {
    Facts {
        tid: AtomicU32::new(0),
        stack: AtomicU64::new(0),
        errno_place: AtomicU64::new(0),
        mask: AtomicU64::new(0),
        name: [const { AtomicU64::new(0) }; 2],
        cpus: AtomicUsize::new(0),
        cpu: AtomicUsize::new(usize::MAX),
        self_pointer: AtomicU64::new(0),
    }
}; 2];

fn facts_of(kind: Kind, index: usize) {
    let cpu = thread::allowed_cpus().iter().last().unwrap();
    let handle = thread::spawn(kind, "a name that is too long", Some(cpu), report, index).unwrap();
    assert_ne!(handle.tid(), thread::gettid());
    assert!(handle.join(PATIENCE));
    assert!(!handle.is_alive());
    let facts = &FACTS[index];
    assert_eq!(facts.tid.load(Acquire), handle.tid());
    let inside = |addr: u64| arena::range().unwrap().contains(VirtAddr::new(addr));
    assert!(inside(facts.stack.load(Relaxed)), "the stack is in the arena");
    assert!(inside(facts.errno_place.load(Relaxed)), "thread-local storage is in the arena");
    assert!(inside(facts.self_pointer.load(Relaxed)), "the control block is in the arena");
    let name: Vec<u8> = facts.name.iter().flat_map(|word| word.load(Relaxed).to_le_bytes()).collect();
    assert_eq!(&name, b"a name that is \0");
    assert_eq!(facts.cpus.load(Relaxed), 1);
    assert_eq!(facts.cpu.load(Relaxed), cpu);
    // KILL and STOP cannot be blocked; the C library keeps two more for itself.
    let unblocked = !facts.mask.load(Relaxed);
    let always = 1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1);
    let library = match kind {
        Kind::Raw => 0,
        Kind::Pthread => 1 << 31 | 1 << 32,
    };
    assert_eq!(unblocked & !library, always);
}

#[test]
fn a_raw_thread_stands_on_arena_memory_with_signals_blocked() {
    facts_of(Kind::Raw, 0);
}

#[test]
fn a_pthread_stands_on_arena_memory_with_signals_blocked() {
    facts_of(Kind::Pthread, 1);
}

#[test]
fn spawning_leaves_the_callers_signal_mask() {
    let mask = || {
        let mut mask = 0u64;
        // SAFETY: asks for the mask only; eight bytes.
        unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, 0, &raw mut mask, 8) };
        mask
    };
    let before = mask();
    for kind in [Kind::Raw, Kind::Pthread] {
        let handle = thread::spawn(kind, "mask", None, |_| (), 0).unwrap();
        assert_eq!(mask(), before);
        assert!(handle.join(PATIENCE));
    }
}

thread_local! {
    static INITIAL: Cell<u64> = const { Cell::new(0x1234_5678_9abc_def0) };
    static ZERO: Cell<u64> = const { Cell::new(0) };
    static LIST: RefCell<[u64; 64]> = const { RefCell::new([7; 64]) };
}

static WRONG: AtomicU32 = AtomicU32::new(0);

fn check_fresh_storage(_: usize) {
    let fresh = INITIAL.get() == 0x1234_5678_9abc_def0
        && ZERO.get() == 0
        && LIST.with_borrow(|list| list.iter().all(|n| *n == 7));
    // SAFETY: the place of the thread's errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let clean = unsafe { errno.read() } == 0;
    if !fresh || !clean {
        WRONG.fetch_add(1, Relaxed);
    }
    INITIAL.set(1);
    ZERO.set(2);
    LIST.with_borrow_mut(|list| list.fill(3));
    // SAFETY: fails and sets errno, which is what is wanted.
    unsafe { libc::close(-1) };
    // SAFETY: as above.
    if unsafe { errno.read() } != libc::EBADF {
        WRONG.fetch_add(1, Relaxed);
    }
}

#[test]
fn a_raw_threads_storage_is_fresh_and_its_own() {
    INITIAL.set(10);
    ZERO.set(20);
    LIST.with_borrow_mut(|list| list.fill(30));
    // Twice, for the second stands on the first one's stack.
    for _ in 0..2 {
        assert!(thread::spawn(Kind::Raw, "fresh", None, check_fresh_storage, 0).unwrap().join(PATIENCE));
    }
    assert_eq!(WRONG.load(Relaxed), 0);
    assert_eq!((INITIAL.get(), ZERO.get()), (10, 20));
    assert!(LIST.with_borrow(|list| list.iter().all(|n| *n == 30)));
}

/// How code of a shared library asks for its thread-local storage: by number of the module, and offset.
#[repr(C)]
struct Index {
    module: usize,
    offset: usize,
}

unsafe extern "C" {
    fn __tls_get_addr(index: *const Index) -> *mut u8;
}

/// The executable's number is 1.
fn by_number(offset: usize) -> VirtAddr {
    // SAFETY: the executable has thread-local storage, and the offset is that of a variable in it.
    VirtAddr::of(unsafe { __tls_get_addr(&Index { module: 1, offset }) })
}

static PLACES: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
static OPENED: AtomicU32 = AtomicU32::new(0);

fn ask_by_number(offset: usize) {
    let ask = |n: usize| {
        PLACES[n].store(by_number(offset).get(), Relaxed);
        PLACES[n + 1].store(INITIAL.with(|cell| VirtAddr::of(cell).get()), Relaxed);
    };
    ask(0);
    OPENED.store(1, Release);
    futex::wake(&OPENED, 1);
    while OPENED.load(Acquire) != 2 {
        let _ = futex::wait(&OPENED, 1, None);
    }
    ask(2);
}

#[test]
fn a_raw_thread_finds_its_storage_by_number_also_after_a_library_was_opened() {
    let offset = INITIAL.with(|cell| VirtAddr::of(cell).get()) - by_number(0).get();
    let handle = thread::spawn(Kind::Raw, "number", None, ask_by_number, usize::try_from(offset).unwrap()).unwrap();
    while OPENED.load(Acquire) != 1 {
        let _ = futex::wait(&OPENED, 0, None);
    }
    // A library with thread-local storage of its own makes every thread's vector out of date.
    // SAFETY: runs the library's constructors, which do nothing of note.
    let library = unsafe { libc::dlopen(c"libstdc++.so.6".as_ptr(), libc::RTLD_NOW) };
    if library.is_null() {
        println!("skipped in part: no library to open");
    }
    OPENED.store(2, Release);
    futex::wake(&OPENED, 1);
    assert!(handle.join(PATIENCE));
    let places = PLACES.each_ref().map(|place| place.load(Relaxed));
    assert!(places.iter().all(|place| *place == places[0]), "{places:x?}");
    assert!(arena::range().unwrap().contains(VirtAddr::new(places[0])));
}

static COUNTED: AtomicUsize = AtomicUsize::new(0);

#[test]
fn a_thousand_threads_of_each_kind_come_and_go_on_few_stacks() {
    for kind in [Kind::Raw, Kind::Pthread] {
        let before = COUNTED.load(Relaxed);
        for round in 0..250 {
            let four: Vec<_> = (0..4)
                .map(|n| {
                    thread::spawn(kind, "many", None, |n| _ = COUNTED.fetch_add(n, Relaxed), n + round % 2).unwrap()
                })
                .collect();
            assert!(four.iter().all(|handle| handle.join(PATIENCE)));
        }
        assert_eq!(COUNTED.load(Relaxed) - before, 250 * 6 + 125 * 4);
    }
    // Without reuse, 2000 stacks of a quarter MiB would be here.
    let (typed, _) = arena::used();
    assert!(typed < 64 << 20, "{typed} bytes of arena used");
}

static ORDER: Mutex<u64> = Mutex::new(0);

#[test]
fn raw_threads_share_memory_and_std_mutexes() {
    let body = |_| {
        for _ in 0..10_000 {
            *ORDER.lock().unwrap() += 1;
        }
    };
    let threads: Vec<_> = (0..4).map(|n| thread::spawn(Kind::Raw, "sum", None, body, n).unwrap()).collect();
    assert!(threads.iter().all(|handle| handle.join(PATIENCE)));
    assert_eq!(*ORDER.lock().unwrap(), 40_000);
}

#[test]
fn join_gives_up_at_its_time() {
    static GO: AtomicU32 = AtomicU32::new(0);
    let body = |_| {
        while GO.load(Acquire) == 0 {
            let _ = futex::wait(&GO, 0, None);
        }
    };
    for kind in [Kind::Raw, Kind::Pthread] {
        GO.store(0, Release);
        let handle = thread::spawn(kind, "wait", None, body, 0).unwrap();
        assert!(!handle.join(Some(Duration::from_millis(20))));
        assert!(handle.is_alive());
        GO.store(1, Release);
        futex::wake(&GO, u32::MAX);
        assert!(handle.join(PATIENCE));
    }
}

#[test]
fn a_forked_child_can_have_raw_threads() {
    // The parent's first spawn notes the layout, which the child cannot ask for.
    assert!(thread::spawn(Kind::Raw, "first", None, |_| (), 0).unwrap().join(PATIENCE));
    static SEEN: AtomicU32 = AtomicU32::new(0);
    let status = common::in_child(|| {
        arena::reset_lock_after_fork();
        thread::forget_after_fork();
        for n in 1..=3 {
            let body = |n: usize| SEEN.store(u32::try_from(n).unwrap_or(99), Release);
            let Ok(handle) = thread::spawn(Kind::Raw, "child", None, body, n) else { return 1 };
            if !handle.join(PATIENCE) {
                return 2;
            }
            if SEEN.load(Acquire) as usize != n {
                return 3;
            }
        }
        0
    });
    assert_eq!(status, 0);
    assert_eq!(SEEN.load(Acquire), 0, "the child's memory is its own");
}

#[test]
fn a_thread_that_cannot_be_had_is_asked_for_for_a_second() {
    assert!(thread::spawn(Kind::Raw, "first", None, |_| (), 0).unwrap().join(PATIENCE));
    let status = common::in_child(|| {
        arena::reset_lock_after_fork();
        thread::forget_after_fork();
        // Nobody may have a thread more, but for root.
        // SAFETY: a plain system call, of a process with one thread.
        unsafe { libc::syscall(libc::SYS_setresuid, 65_534, 65_534, 65_534) };
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the kernel fills the local structure in.
        unsafe { libc::getrlimit(libc::RLIMIT_NPROC, &raw mut limit) };
        let none = libc::rlimit { rlim_cur: 0, ..limit };
        for (round, kind) in [(0, Kind::Raw), (1, Kind::Pthread)] {
            // SAFETY: the kernel reads the local structure.
            unsafe { libc::setrlimit(libc::RLIMIT_NPROC, &raw const none) };
            let start = Instant::now();
            if thread::spawn(kind, "none", None, |_| (), 0).err() != Some(Errno::AGAIN) {
                return 10 * round + 1;
            }
            if start.elapsed() < Duration::from_millis(900) {
                return 10 * round + 2;
            }
            // SAFETY: as above.
            unsafe { libc::setrlimit(libc::RLIMIT_NPROC, &raw const limit) };
            if !thread::spawn(kind, "one", None, |_| (), 0).is_ok_and(|thread| thread.join(PATIENCE)) {
                return 10 * round + 3;
            }
        }
        0
    });
    assert_eq!(status, 0);
}

fn sleep_for_ever(word: usize) {
    let forever: &[AtomicU32] = FOREVER[word].get().expect("set before the thread starts");
    forever[0].store(1, Release);
    futex::wake_shared(&forever[0], 1);
    loop {
        let _ = futex::wait_shared(&forever[0], 1, None);
    }
}

static FOREVER: [std::sync::OnceLock<&'static [AtomicU32]>; 1] = [const { std::sync::OnceLock::new() }; 1];

unsafe extern "C-unwind" {
    fn pthread_exit(value: *mut libc::c_void) -> !;
    fn pthread_create(
        id: *mut libc::pthread_t,
        attr: *const libc::pthread_attr_t,
        entry: extern "C-unwind" fn(*mut libc::c_void) -> *mut libc::c_void,
        arg: *mut libc::c_void,
    ) -> libc::c_int;
}

/// Forks; in the child, ends the only thread that the C library knows of while a raw one runs. Returns the child's exit
/// status. A thread of the C library's, for `pthread_exit` unwinds its caller's frames: there may be none that catches.
extern "C-unwind" fn fork_and_end_the_thread(_: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: the child makes only calls that need no lock of the C library.
    let pid = unsafe { libc::fork() };
    if pid != 0 {
        return std::ptr::without_provenance_mut(usize::try_from(common::wait_for(pid)).unwrap_or(99));
    }
    arena::reset_lock_after_fork();
    thread::forget_after_fork();
    let word = &FOREVER[0].get().unwrap()[0];
    let spawned = thread::spawn(Kind::Raw, "for ever", None, sleep_for_ever, 0).is_ok();
    while spawned && word.load(Acquire) == 0 {
        let _ = futex::wait_shared(word, 0, None);
    }
    if !spawned {
        // SAFETY: ends the child without running anything.
        unsafe { libc::_exit(1) };
    }
    // SAFETY: nothing on this thread's stack needs to be dropped.
    unsafe { pthread_exit(std::ptr::null_mut()) }
}

#[test]
fn the_end_of_the_programs_last_thread_ends_the_process() {
    FOREVER[0].get_or_init(|| shared_slice(1).unwrap());
    assert!(thread::spawn(Kind::Raw, "first", None, |_| (), 0).unwrap().join(PATIENCE));
    let mut id = 0;
    let mut status = std::ptr::without_provenance_mut(99);
    // SAFETY: a thread without an argument.
    let made = unsafe { pthread_create(&raw mut id, std::ptr::null(), fork_and_end_the_thread, std::ptr::null_mut()) };
    assert_eq!(made, 0);
    // SAFETY: joined once.
    assert_eq!(unsafe { libc::pthread_join(id, &raw mut status) }, 0);
    assert_eq!(status.addr(), 0);
}

#[test]
fn a_process_with_raw_threads_ends_when_main_returns() {
    const VARIABLE: &str = "UHMM_TEST_MAIN_RETURNS";
    if env::var_os(VARIABLE).is_some() {
        // The other process: leaves a raw thread behind.
        FOREVER[0].get_or_init(|| shared_slice(1).unwrap());
        thread::spawn(Kind::Raw, "for ever", None, sleep_for_ever, 0).unwrap();
        return;
    }
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "a_process_with_raw_threads_ends_when_main_returns"])
        .env(VARIABLE, "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn unshared_files_are_the_threads_own() {
    static FD: AtomicUsize = AtomicUsize::new(usize::MAX);
    let body = |_| {
        thread::unshare_files().unwrap();
        // SAFETY: opens a file.
        let fd = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
        // SAFETY: as far from other descriptors as a number can be that is allowed everywhere.
        let far = unsafe { libc::dup2(fd, 777) };
        FD.store(usize::try_from(far).unwrap_or(usize::MAX), Release);
    };
    assert!(thread::spawn(Kind::Raw, "files", None, body, 0).unwrap().join(PATIENCE));
    assert_eq!(FD.load(Acquire), 777);
    // SAFETY: asks about a number.
    assert_eq!(unsafe { libc::fcntl(777, libc::F_GETFD) }, -1, "the descriptor is in the thread's table only");
}

#[test]
fn cpu_sets_are_sets() {
    let mut set = CpuSet::new();
    assert!(set.is_empty());
    for cpu in [0, 63, 64, 8191, 8192] {
        set.insert(cpu);
    }
    assert_eq!(set.iter().collect::<Vec<_>>(), [0, 63, 64, 8191]);
    assert_eq!((set.len(), set.contains(63), set.contains(62)), (4, true, false));
    assert!(thread::allowed_cpus().contains(thread::current_cpu()));
    assert!(thread::pin_to(8191).is_err() || set.len() > 4000);
}
