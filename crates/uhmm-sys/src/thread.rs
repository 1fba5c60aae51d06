//! Threads of the engine.
//!
//! A handler of page faults must not stand on memory that can be away. So both kinds of thread here have their stack
//! in the arena, with a page without access below it, and block all signals: the program's handlers never run on them.
//!
//! * [`Kind::Pthread`] is a thread of the C library, detached. Its stack and control block are in the arena, but the
//!   library keeps a vector for its thread-local storage in the program's heap, and counts it as a thread of the program.
//! * [`Kind::Raw`] is a thread that the C library does not know of. It exists in a forked child before `malloc` is usable,
//!   it does not keep the process alive when the program's last thread ends, and nothing of it is in the program's
//!   heap. In exchange it may use no function of the C library that wants to know its thread: see `tls.rs`. Its
//!   thread-local storage is fresh.
//!
//! A stack is used again when the kernel has said that its thread is gone (`set_tid_address(2)`).
//!
//! # Kernel
//! `clone(2)`, `pthread_create(3)`, `sched_setaffinity(2)`.
// UNSAFETY: makes threads on memory of its own.

use std::{
    arch::asm,
    ffi::c_void,
    mem::MaybeUninit,
    ptr::null_mut,
    sync::atomic::{
        AtomicPtr, AtomicU32,
        Ordering::{AcqRel, Acquire, Relaxed, Release},
    },
    time::{Duration, Instant},
};

use crate::{
    Errno,
    addr::{PAGE_SIZE, PageRange, VirtAddr},
    arena,
    files::Path,
    futex, raw, tls,
};

/// Bytes of stack of each thread.
pub const STACK_BYTES: u64 = 256 << 10;
/// Longest name that the kernel keeps.
const NAME_MAX: usize = 15;

/// How a thread is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// By the C library.
    Pthread,
    /// By the kernel alone.
    Raw,
}

/// Memory for one thread at a time. Never freed.
///
/// ```text
/// guard | stack -> | block below tp | tp .. | vector |
/// ```
#[derive(Debug)]
struct Slot {
    /// 0: free. [`CLAIMED`]: being set up. Otherwise the thread's id; the kernel stores 0 and wakes one waiter when the
    /// thread is gone.
    tid: AtomicU32,
    /// How a thread of the C library tells its id to the one that made it: it stores the id and waits until that has
    /// taken it by storing 0. Until then the slot cannot become free and somebody else's.
    born: AtomicU32,
    next: AtomicPtr<Slot>,
    guard: VirtAddr,
    stack: VirtAddr,
    tp: VirtAddr,
    vector: VirtAddr,
}

/// No thread has this id.
const CLAIMED: u32 = u32::MAX;

/// How often a thread is asked for where there are none, a millisecond later than before each time: for a second.
const TRIES: u64 = 45;

/// All slots. Only grows.
static SLOTS: AtomicPtr<Slot> = AtomicPtr::new(null_mut());

/// What a new thread finds at the low end of its stack.
#[derive(Clone, Copy)]
struct Record {
    slot: &'static Slot,
    recipe: &'static tls::Recipe,
    entry: fn(usize),
    arg: usize,
    cpu: Option<usize>,
    name: [u8; NAME_MAX + 1],
}

/// A thread that was made here. Dropping the handle leaves it running.
#[derive(Debug)]
pub struct ThreadHandle {
    slot: &'static Slot,
    tid: u32,
}

impl ThreadHandle {
    /// The kernel's id of the thread.
    #[must_use]
    pub const fn tid(&self) -> u32 {
        self.tid
    }

    /// Whether it runs still.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.slot.tid.load(Acquire) == self.tid
    }

    /// Waits until the thread is gone, and says whether it is. `None` waits for ever.
    pub fn join(&self, timeout: Option<Duration>) -> bool {
        let deadline = timeout.map(|t| Instant::now() + t);
        while self.is_alive() {
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return false;
            }
            // The kernel's wake-up at the end of a thread is a shared one.
            let _ = futex::wait_shared(&self.slot.tid, self.tid, left);
        }
        // The kernel wakes one: pass it on.
        futex::wake_shared(&self.slot.tid, u32::MAX);
        true
    }
}

fn slots() -> impl Iterator<Item = &'static Slot> {
    let deref = |slot: *mut Slot| {
        // SAFETY: null, or stored by `new_slot` from an `arena::value` reference, which is valid for ever.
        unsafe { slot.cast_const().as_ref() }
    };
    std::iter::successors(deref(SLOTS.load(Acquire)), move |slot| deref(slot.next.load(Acquire)))
}

/// A slot that belongs to the caller, marked [`CLAIMED`].
fn claim_slot(recipe: &tls::Recipe) -> Result<&'static Slot, Errno> {
    let free = slots().find(|slot| slot.tid.compare_exchange(0, CLAIMED, Acquire, Relaxed).is_ok());
    match free {
        Some(slot) => Ok(slot),
        None => new_slot(recipe),
    }
}

fn new_slot(recipe: &tls::Recipe) -> Result<&'static Slot, Errno> {
    let bytes = PAGE_SIZE + STACK_BYTES + recipe.below() + tls::ABOVE + tls::VECTOR;
    let guard = arena::alloc_typed(bytes, PAGE_SIZE)?;
    let stack = guard.add(PAGE_SIZE);
    let tp = stack.add(STACK_BYTES + recipe.below());
    // SAFETY: a page just allocated, unknown to anybody else.
    unsafe { raw::mprotect(PageRange::page_of(guard), libc::PROT_NONE) }?;
    let slot = arena::value(Slot {
        tid: AtomicU32::new(CLAIMED),
        born: AtomicU32::new(0),
        next: AtomicPtr::new(null_mut()),
        guard,
        stack,
        tp,
        vector: tp.add(tls::ABOVE),
    })?;
    let pointer = std::ptr::from_ref(slot).cast_mut();
    let mut first = SLOTS.load(Relaxed);
    loop {
        slot.next.store(first, Relaxed);
        match SLOTS.compare_exchange_weak(first, pointer, AcqRel, Relaxed) {
            Ok(_) => return Ok(slot),
            Err(now) => first = now,
        }
    }
}

/// Starts a thread that runs `entry(arg)` with all signals blocked.
///
/// `name` is cut off after 15 bytes. `cpu` is a wish: where the process may not use it, the thread runs anywhere. A panic
/// in `entry` aborts the process.
///
/// # Errors
/// `EAGAIN`: too many threads. `ENOMEM`: no memory for the stack.
pub fn spawn(kind: Kind, name: &str, cpu: Option<usize>, entry: fn(usize), arg: usize) -> Result<ThreadHandle, Errno> {
    let recipe = tls::recipe()?;
    let slot = claim_slot(recipe)?;
    let mut record = Record { slot, recipe, entry, arg, cpu, name: [0; NAME_MAX + 1] };
    let len = name.len().min(NAME_MAX);
    record.name[..len].copy_from_slice(&name.as_bytes()[..len]);
    let place = raw::ptr(slot.stack).cast::<Record>();
    // SAFETY: the low end of the claimed slot's stack, page aligned; the new thread reads it before its stack grows so
    // deep.
    unsafe { place.write(record) };

    let blocked = block_signals(kind);
    let start = || match kind {
        // SAFETY: the slot is claimed, so its stack and block are nobody's, and the record is in place.
        Kind::Raw => unsafe { spawn_raw(slot, recipe) },
        // SAFETY: as above.
        Kind::Pthread => unsafe { spawn_pthread(slot) },
    };
    let mut tid = start();
    // On a machine full of short-lived threads the kernel runs out of them for moments, which pass. It also refuses as long as
    // another thread of the process is about to execute a program: where that succeeds, this one is not there any more.
    for tries in 1..TRIES {
        if tid != Err(Errno::AGAIN) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(tries));
        tid = start();
    }
    set_signals(blocked);
    match tid {
        Ok(tid) => Ok(ThreadHandle { slot, tid }),
        Err(e) => {
            slot.tid.store(0, Release);
            Err(e)
        }
    }
}

/// # Safety
/// The slot is claimed by the caller, and a record is at the low end of its stack.
unsafe fn spawn_raw(slot: &'static Slot, recipe: &tls::Recipe) -> Result<u32, Errno> {
    // SAFETY: block and vector are the claimed slot's, as large as the recipe says.
    unsafe { recipe.lay_out(slot.tp, slot.vector, slot.guard) };
    let top = slot.stack.add(STACK_BYTES - 64);
    // SAFETY: inside the claimed slot's stack, aligned.
    unsafe { raw::ptr(top).cast::<u64>().write(slot.stack.get()) };
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM
        | libc::CLONE_SETTLS
        | libc::CLONE_PARENT_SETTID
        | libc::CLONE_CHILD_CLEARTID;
    let tid_word = raw::ptr_arg(slot.tid.as_ptr());
    let ret: u64;
    // SAFETY:
    // 1. The calling thread goes on behind the block with rax, rcx and r11 changed, as declared.
    // 2. The new thread starts on its own stack, pops the record's address, and calls `raw_main`, which does not return;
    //    so it never sees the calling thread's frame. The stack is aligned to 16 at the call, as the ABI wants.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "pop rdi",
            "and rsp, -16",
            "call {main}",
            "ud2",
            "2:",
            main = sym raw_main,
            inlateout("rax") libc::SYS_clone => ret,
            in("rdi") raw::arg(flags),
            in("rsi") top.get(),
            in("rdx") tid_word,
            in("r10") tid_word,
            in("r8") slot.tp.get(),
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    // The kernel has stored the id before the thread ran, and may have cleared it already.
    match i64::try_from(ret) {
        Ok(tid) => Ok(raw::low32(tid.cast_unsigned())),
        Err(_) => Err(Errno::from_raw_os_error(i32::try_from(ret.wrapping_neg()).unwrap_or(libc::EIO))),
    }
}

unsafe extern "C" fn raw_main(record: *const Record) -> ! {
    // SAFETY: `spawn` wrote the record, and this thread is the only one that reads it.
    let record = unsafe { record.read() };
    let tid = gettid();
    record.recipe.set_own_tid(tid);
    run(&record);
    exit()
}

fn run(record: &Record) {
    // SAFETY: the kernel reads at most 16 bytes of the name, a local.
    let _ = unsafe { raw::syscall(libc::SYS_prctl, [raw::arg(libc::PR_SET_NAME), raw::ptr_arg(record.name.as_ptr())]) };
    if let Some(cpu) = record.cpu {
        // A wish: see `spawn`.
        let _ = pin_to(cpu);
    }
    (record.entry)(record.arg);
}

/// Ends the calling thread, and no other, without a word to the C library.
fn exit() -> ! {
    loop {
        // SAFETY: ends this thread; its stack is not used again before the kernel has cleared the slot.
        let _ = unsafe { raw::syscall(libc::SYS_exit, [0]) };
    }
}

/// # Safety
/// The slot is claimed by the caller, and a record is at the low end of its stack.
unsafe fn spawn_pthread(slot: &'static Slot) -> Result<u32, Errno> {
    let check = |ret: i32| if ret == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(ret)) };
    let mut attr = MaybeUninit::<libc::pthread_attr_t>::uninit();
    // SAFETY: initialises the local attribute.
    check(unsafe { libc::pthread_attr_init(attr.as_mut_ptr()) })?;
    let (base, size) = (raw::ptr(slot.stack).cast::<c_void>(), raw::index(STACK_BYTES));
    // SAFETY: an initialised attribute; the stack is the claimed slot's.
    let stack = check(unsafe { libc::pthread_attr_setstack(attr.as_mut_ptr(), base, size) });
    // SAFETY: an initialised attribute.
    let detach = check(unsafe { libc::pthread_attr_setdetachstate(attr.as_mut_ptr(), libc::PTHREAD_CREATE_DETACHED) });
    let mut thread = MaybeUninit::<libc::pthread_t>::uninit();
    let made = stack.and(detach).and_then(|()| {
        // SAFETY: an initialised attribute, and an entry that takes a pointer to the record, which is in place.
        check(unsafe { libc::pthread_create(thread.as_mut_ptr(), attr.as_ptr(), pthread_main, base) })
    });
    // SAFETY: an initialised attribute that is not used again.
    unsafe { libc::pthread_attr_destroy(attr.as_mut_ptr()) };
    made?;
    loop {
        let tid = slot.born.load(Acquire);
        if tid != 0 {
            slot.born.store(0, Release);
            futex::wake(&slot.born, 1);
            return Ok(tid);
        }
        let _ = futex::wait(&slot.born, 0, None);
    }
}

extern "C" fn pthread_main(record: *mut c_void) -> *mut c_void {
    // SAFETY: `spawn` wrote the record, and this thread is the only one that reads it.
    let record = unsafe { record.cast::<Record>().read() };
    let tid = gettid();
    record.slot.tid.store(tid, Release);
    // The library waits for its own word only where a thread is joined, and this one is detached. By ours we learn
    // when the stack is free.
    // SAFETY: the word is in the arena, for ever.
    let _ = unsafe { raw::syscall(libc::SYS_set_tid_address, [raw::ptr_arg(record.slot.tid.as_ptr())]) };
    record.slot.born.store(tid, Release);
    futex::wake(&record.slot.born, 1);
    while record.slot.born.load(Acquire) != 0 {
        let _ = futex::wait(&record.slot.born, tid, None);
    }
    run(&record);
    null_mut()
}

/// How many threads the process has that were not made here.
///
/// # Errors
/// Whatever listing `/proc/self/task` answers.
pub fn count_others() -> Result<usize, Errno> {
    let mut others = 0;
    crate::exclude::threads(&mut |tid| {
        others += usize::from(!slots().any(|slot| u64::from(slot.tid.load(Acquire)) == tid));
    })?;
    Ok(others)
}

/// Calls `f` while no signal is handled on the calling thread, but `SIGSYS`: where system calls are caught (see
/// [`crate::dispatch`]) that is how `f` makes them.
pub fn without_signals<T>(f: impl FnOnce() -> T) -> T {
    const SIGSYS: u64 = 1 << (31 - 1);
    let before = set_signals(!(LIBRARY_SIGNALS | SIGSYS));
    let result = f();
    set_signals(before);
    result
}

/// Signals that glibc sends to its own threads, for `setuid` and cancellation.
const LIBRARY_SIGNALS: u64 = 1 << (32 - 1) | 1 << (33 - 1);

/// Blocks all signals for the calling thread and the threads it makes, and returns the mask that was.
fn block_signals(kind: Kind) -> u64 {
    set_signals(match kind {
        Kind::Raw => u64::MAX,
        Kind::Pthread => !LIBRARY_SIGNALS,
    })
}

fn set_signals(mask: u64) -> u64 {
    let mut old = 0u64;
    let args = [raw::arg(libc::SIG_SETMASK), raw::ptr_arg(&raw const mask), raw::ptr_arg(&raw mut old), 8];
    // SAFETY: the kernel reads and writes masks of eight bytes, both locals.
    let _ = unsafe { raw::syscall(libc::SYS_rt_sigprocmask, args) };
    old
}

/// Frees the slots of all threads in a forked child, where none of them exists.
///
/// To be called in the child only, by its one thread, which must not be one of the engine's, before it spawns any.
pub fn forget_after_fork() {
    for slot in slots() {
        slot.born.store(0, Relaxed);
        slot.tid.store(0, Release);
    }
}

/// Gives the calling thread a table of file descriptors of its own, so that the program cannot close its files.
///
/// # Errors
/// `ENOMEM`, `EMFILE`.
///
/// # Kernel
/// `unshare(2)` with `CLONE_FILES`.
pub fn unshare_files() -> Result<(), Errno> {
    // SAFETY: touches no memory.
    unsafe { raw::syscall(libc::SYS_unshare, [raw::arg(libc::CLONE_FILES)]) }.map(drop)
}

/// The kernel's id of the calling thread.
#[must_use]
pub fn gettid() -> u32 {
    // SAFETY: touches no memory, never fails.
    raw::low32(unsafe { raw::syscall(libc::SYS_gettid, []) }.unwrap_or(0))
}

/// The CPU that the calling thread is on, at this moment.
///
/// # Kernel
/// `sched_getcpu(3)`: no system call.
#[must_use]
pub fn current_cpu() -> usize {
    // SAFETY: takes no arguments.
    usize::try_from(unsafe { libc::sched_getcpu() }).unwrap_or(0)
}

/// Words of a [`CpuSet`]: 8192 CPUs, the most that the kernel can be built for.
const CPU_WORDS: usize = 128;

/// A set of CPUs, of fixed size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuSet([u64; CPU_WORDS]);

impl CpuSet {
    /// No CPU.
    #[must_use]
    pub const fn new() -> Self {
        Self([0; CPU_WORDS])
    }

    /// Adds a CPU; numbers that no machine has are ignored.
    pub fn insert(&mut self, cpu: usize) {
        if let Some(word) = self.0.get_mut(cpu / 64) {
            *word |= 1 << (cpu % 64);
        }
    }

    /// Whether `cpu` is in the set.
    #[must_use]
    pub fn contains(&self, cpu: usize) -> bool {
        self.0.get(cpu / 64).is_some_and(|word| word >> (cpu % 64) & 1 != 0)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The CPUs, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..CPU_WORDS * 64).filter(|&cpu| self.contains(cpu))
    }
}

impl Default for CpuSet {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether a thread of this process waits inside of `mremap`. `false` where the kernel does not say.
///
/// # Kernel
/// `proc_pid_syscall(5)`: the number of the system call in which a thread sleeps, and its arguments.
#[must_use]
pub fn is_in_mremap(tid: u32) -> bool {
    let path = Path::new(format_args!("/proc/self/task/{tid}/syscall"));
    let mut buf = [0; 128];
    let Ok(text) = raw::read_file(path.as_c_str(), &mut buf) else { return false };
    let number = text.split(|&byte| byte == b' ').next().and_then(|number| str::from_utf8(number).ok());
    number.is_some_and(|number| number.parse() == Ok(libc::SYS_mremap))
}

/// The CPUs that the calling thread may run on; empty where the kernel does not say.
///
/// # Kernel
/// `sched_getaffinity(2)`.
#[must_use]
pub fn allowed_cpus() -> CpuSet {
    let mut set = CpuSet::new();
    let args = [0, size_of::<CpuSet>() as u64, raw::ptr_arg(set.0.as_mut_ptr())];
    // SAFETY: the kernel writes at most the size given, to a local.
    let _ = unsafe { raw::syscall(libc::SYS_sched_getaffinity, args) };
    set
}

/// Lets the calling thread run on `cpus` only.
///
/// # Errors
/// `EINVAL`: the process may use none of them.
///
/// # Kernel
/// `sched_setaffinity(2)`.
pub fn set_allowed_cpus(cpus: &CpuSet) -> Result<(), Errno> {
    let args = [0, size_of::<CpuSet>() as u64, raw::ptr_arg(cpus.0.as_ptr())];
    // SAFETY: the kernel reads the set.
    unsafe { raw::syscall(libc::SYS_sched_setaffinity, args) }.map(drop)
}

/// Lets the calling thread run on `cpu` only.
///
/// # Errors
/// `EINVAL`: the process may not use it.
pub fn pin_to(cpu: usize) -> Result<(), Errno> {
    let mut set = CpuSet::new();
    set.insert(cpu);
    set_allowed_cpus(&set)
}

/// Sets the calling thread's nice value.
///
/// # Errors
/// `EACCES`: lower than now, without `CAP_SYS_NICE`.
///
/// # Kernel
/// `setpriority(2)`; on Linux a nice value is a thread's.
pub fn set_nice(nice: i32) -> Result<(), Errno> {
    // SAFETY: touches no memory.
    unsafe { raw::syscall(libc::SYS_setpriority, [0, 0, raw::arg(nice)]) }.map(drop)
}
