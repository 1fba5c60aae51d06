//! Watching the program's system calls, where the kernel's own page faults are not served.
//!
//! A userfaultfd for user mode only does not tell of pages that the kernel touches on behalf of a program: a system call on
//! a page that is away answers `EFAULT`. So each system call of the program is caught before it begins. The memory that
//! it uses is brought home, and does not leave until the call is over.
//!
//! They are caught by *syscall user dispatch*: a thread has said that only the code of this object makes system calls
//! directly; one made by other code raises `SIGSYS`. No privilege is needed, and a program that the process executes is free
//! of it.
//!
//! - [`slot`][]: what each thread keeps from moving.
//! - [`table`][]: which memory each system call uses.
//! - [`entry`][]: the code by which a call is made.
//!
//! # What it does not see, and why
//! - What the kernel does later than the call: `io_uring` and `io_setup` answer `ENOSYS`. Nor what other processes do:
//!   `process_vm_readv` of a debugger answers `EFAULT`.
//! - Stacks of a program's own making (`makecontext`, coroutines): the kernel writes signal frames there. They are
//!   ordinary memory to us.
//! - Mutexes in a thread's robust list that are away when the thread dies are not passed on.
//! - A thread with thread-local storage of its own making that is not laid out as the C library's.
//!
//! # Signals
//! The handler runs on the thread's own stack, with all other signals blocked, and takes about as much of it as one signal
//! frame and 2 KiB. `SIGSYS` is taken out of every mask that the program sets; a handler that it installs for it is
//! noted, and called for those that are not ours.
//!
//! # Kernel
//! `Documentation/admin-guide/syscall-user-dispatch.rst`, from Linux 5.11, on x86-64.
// UNSAFETY: a signal handler that reads and writes the registers of the thread it interrupts.

mod entry;
mod slot;
mod table;

use std::{
    ffi::{c_int, c_void},
    sync::{
        OnceLock,
        atomic::{
            AtomicPtr, AtomicU64,
            Ordering::{Acquire, Relaxed, Release, SeqCst},
            fence,
        },
    },
};

pub use self::slot::{SLOTS, fixed, held};
use self::{
    slot::{Call, FIXED_NEXT_SIGNAL_STACK, FIXED_ROBUST, FIXED_SIGNAL_STACK, SIGNAL_STACK, Slot},
    table::Memory,
};
use crate::{
    Errno, access,
    addr::{PAGE_SIZE, PageRange, TASK_SIZE, VirtAddr},
    arena,
    maps::Maps,
    raw, tls,
};

/// Where pages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Whereabouts {
    /// Where the kernel says.
    Here,
    /// Away.
    Away,
    /// Leaving or coming home just now.
    Moving,
}

/// Who brings pages home.
///
/// # Locking
/// All methods are called in a signal handler, whatever the thread was at: they take no lock that a thread of the program
/// may hold, allocate nothing, and may wait for engine threads.
pub trait Pager: Sync {
    /// Where the pages of `range` are, by the one that is farthest.
    fn look(&self, range: PageRange) -> Whereabouts;
    /// Brings the pages of `range` home that are away, and fills those that were never touched.
    fn bring(&self, range: PageRange);
    /// Whether anything of the 2 MiB around `at` has ever left: what has not, the kernel fills by itself.
    fn is_managed(&self, at: VirtAddr) -> bool;
    /// The program has moved memory to `range`, or made it larger: all of it counts as managed.
    fn moved(&self, range: PageRange);
    /// Brings all of `range` home and unregisters it. Returns whether that is done.
    fn release(&self, range: PageRange) -> bool;
    /// The process is about to fork. Returns whether this had to be prepared, because the C library does not know of it.
    fn before_fork(&self) -> bool;
    /// A fork that had to be prepared is over, in the parent.
    fn after_fork(&self);
}

/// What is known once system calls are watched.
#[derive(Debug)]
struct Watch {
    /// The code that makes system calls directly.
    text: PageRange,
    /// The main thread's stack, as far as it may grow.
    stack: PageRange,
    /// How far below its stack pointer a thread's stack may reach whose size is not known.
    stack_bytes: u64,
}

static WATCH: OnceLock<Watch> = OnceLock::new();
/// The engine of this process; null until it runs, and in a forked child until its own does.
static PAGER: AtomicPtr<&'static dyn Pager> = AtomicPtr::new(std::ptr::null_mut());
/// What the program has installed for `SIGSYS`: as the kernel's structure has it.
static FOREIGN: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];

/// How often pages that are away are asked for before the call is made as it is.
const ROUNDS: u32 = 64;
/// How often pages are that are nowhere.
const FEW_ROUNDS: u32 = 4;
/// How often a page in transit is waited for, 50 us at least each time.
const MOST_NAPS: u32 = 200_000;
/// How far around an argument pages are brought home where it is not known how far it reaches.
const AROUND: u64 = 64 << 10;
/// Addresses below this are numbers.
const LOWEST: u64 = 64 << 10;
/// Bit of `SIGSYS` in a signal mask.
const SIGSYS_BIT: u64 = 1 << (libc::SIGSYS - 1);
/// Farthest that static thread-local storage lies from the end of a stack.
const TLS_BYTES: u64 = 1 << 20;
/// A main thread's stack without a limit is taken to be as large.
const STACK_MOST: u64 = 1 << 30;

/// Whether system calls of this process are watched.
#[must_use]
pub fn is_on() -> bool {
    WATCH.get().is_some()
}

/// Whether the kernel has what it takes: tried on the calling thread, and undone at once.
///
/// # Errors
/// `EINVAL`: no such kernel.
pub fn probe() -> Result<(), Errno> {
    // All of the address space may make system calls directly: nothing is caught.
    set_dispatch(entry::DISPATCH_ON, 0, TASK_SIZE)?;
    set_dispatch(entry::DISPATCH_OFF, 0, 0)
}

fn set_dispatch(mode: u64, start: u64, len: u64) -> Result<(), Errno> {
    let args = [entry::SET_DISPATCH, mode, start, len, 0];
    // SAFETY: no selector, so that the kernel touches no memory. Where system calls are caught the handler is in place.
    unsafe { raw::syscall(libc::SYS_prctl, args) }.map(drop)
}

/// Has all system calls of the calling thread watched from now on, and those of threads and processes that it makes.
///
/// To be called once, by the only thread of a process.
///
/// # Errors
/// `EINVAL`: the kernel has no syscall user dispatch. `EBUSY`: there are other threads. `ENOMEM`: no memory for the
/// records. `EEXIST`: it is on already.
pub fn enable() -> Result<(), Errno> {
    probe()?;
    let mut threads = 0;
    crate::exclude::threads(&mut |_| threads += 1)?;
    if threads != 1 {
        return Err(Errno::BUSY);
    }
    slot::set_up()?;
    let watch = watch()?;
    let number = slot::claim().ok_or(Errno::NOMEM)?;
    let own = slot::slot(number).ok_or(Errno::NOMEM)?;
    let _ = own.fix(watch.stack);
    fix_control_block(own, tls::thread_pointer().get());
    crate::exclude::own_tls_pages(&mut |pages| {
        let _ = own.fix(pages);
    })?;
    entry::set_slot_word(number as u64 + 1);
    WATCH.set(watch).map_err(|_| Errno::EXIST)?;
    let watch = WATCH.get().ok_or(Errno::NOMEM)?;
    install(&FOREIGN)?;
    let mask = SIGSYS_BIT;
    let unblock = [raw::arg(libc::SIG_UNBLOCK), raw::ptr_arg(&raw const mask), 0, 8];
    // SAFETY: the kernel reads eight bytes.
    unsafe { raw::syscall(libc::SYS_rt_sigprocmask, unblock) }?;
    set_dispatch(entry::DISPATCH_ON, watch.text.start().get(), watch.text.bytes())
}

fn watch() -> Result<Watch, Errno> {
    let maps = Maps::text();
    let here = VirtAddr::new(entry::make_call());
    let text = maps.find(here)?.filter(|vma| vma.range.contains(here)).ok_or(Errno::FAULT)?.range;
    let local = 0u8;
    let stack = maps.find(VirtAddr::of(&raw const local))?.ok_or(Errno::FAULT)?.range;
    let limit = crate::limits::stack().unwrap_or(STACK_MOST).min(STACK_MOST);
    let stack_bytes = limit.next_multiple_of(PAGE_SIZE).clamp(8 << 20, STACK_MOST);
    let low = stack.start().get().min(stack.end().get().saturating_sub(stack_bytes));
    let stack = PageRange::from_ends(VirtAddr::new(low), stack.end()).map_err(|_| Errno::FAULT)?;
    Ok(Watch { text, stack, stack_bytes: stack_bytes.min(64 << 20) })
}

/// Installs the handler, and notes what was there.
fn install(before: &[AtomicU64; 4]) -> Result<(), Errno> {
    let flags = libc::SA_SIGINFO | libc::SA_NODEFER;
    const SA_RESTORER: u64 = 0x0400_0000;
    let handler = (on_sigsys as *const ()).expose_provenance() as u64;
    let action = [handler, raw::arg(flags) | SA_RESTORER, entry::restorer(), !SIGSYS_BIT];
    let mut old = [0u64; 4];
    let args = [raw::arg(libc::SIGSYS), raw::ptr_arg(action.as_ptr()), raw::ptr_arg(old.as_mut_ptr()), 8];
    // SAFETY: structures as large as the kernel's; the handler fits the flags.
    unsafe { raw::syscall(libc::SYS_rt_sigaction, args) }?;
    before.iter().zip(old).for_each(|(word, old)| word.store(old, Relaxed));
    Ok(())
}

/// Says who brings pages home from now on.
///
/// # Errors
/// `ENOMEM`.
pub fn set_pager(pager: &'static dyn Pager) -> Result<(), Errno> {
    let place: &'static &'static dyn Pager = arena::value(pager)?;
    PAGER.store(std::ptr::from_ref(place).cast_mut(), SeqCst);
    Ok(())
}

fn pager() -> Option<&'static dyn Pager> {
    let place = PAGER.load(SeqCst);
    // SAFETY: null, or stored by `set_pager` from a reference that is valid for ever.
    unsafe { place.cast_const().as_ref() }.copied()
}

/// In a forked child, where only the calling thread exists, and no engine.
pub fn reset_in_child() {
    PAGER.store(std::ptr::null_mut(), SeqCst);
    if let Some((number, _)) = own_slot() {
        slot::reset_in_child(number);
    }
}

fn own_slot() -> Option<(usize, &'static Slot)> {
    let number = raw::index(entry::slot_word().checked_sub(1)?);
    Some((number, slot::slot(number)?))
}

pub(crate) fn makes_threads(nr: u64) -> bool {
    matches!(libc::c_long::try_from(nr), Ok(libc::SYS_clone | libc::SYS_clone3 | libc::SYS_fork | libc::SYS_vfork))
}

// Registers in the order of the kernel's `struct sigcontext`.
const ARGS: [c_int; 6] = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX, libc::REG_R10, libc::REG_R8, libc::REG_R9];

/// The registers of the thread that was interrupted.
struct Registers<'a>(&'a mut [i64; 23]);

impl Registers<'_> {
    fn get(&self, register: c_int) -> u64 {
        usize::try_from(register).ok().and_then(|n| self.0.get(n)).map_or(0, |r| r.cast_unsigned())
    }

    fn set(&mut self, register: c_int, value: u64) {
        if let Some(place) = usize::try_from(register).ok().and_then(|n| self.0.get_mut(n)) {
            *place = value.cast_signed();
        }
    }

    fn args(&self) -> [u64; 6] {
        ARGS.map(|register| self.get(register))
    }

    fn set_args(&mut self, args: [u64; 6]) {
        ARGS.into_iter().zip(args).for_each(|(register, arg)| self.set(register, arg));
    }

    fn answer(&mut self, answer: Result<u64, Errno>) {
        let value = match answer {
            Ok(value) => value,
            Err(errno) => i64::from(-errno.raw_os_error()).cast_unsigned(),
        };
        self.set(libc::REG_RAX, value);
    }
}

/// Fields of `siginfo_t` for `SIGSYS`.
#[repr(C)]
struct Info {
    signo: c_int,
    errno: c_int,
    code: c_int,
    pad: c_int,
    call_addr: u64,
    nr: c_int,
    arch: u32,
}

const SYS_USER_DISPATCH: c_int = 2;
const ARCH_X86_64: u32 = 0xc000_003e;

unsafe extern "C" fn on_sigsys(signal: c_int, info: *mut Info, context: *mut libc::ucontext_t) {
    // SAFETY: the kernel passes a whole `siginfo_t`, and its fields for this signal are numbers.
    let Info { code, nr, arch, .. } = unsafe { info.read() };
    if code != SYS_USER_DISPATCH {
        return foreign(signal, info, context);
    }
    // SAFETY: the kernel passes the context that it will restore; nobody else refers to it.
    let context = unsafe { &mut *context };
    let mut registers = Registers(&mut context.uc_mcontext.gregs);
    if arch != ARCH_X86_64 {
        // By `int 0x80`: 32-bit calls of a 64-bit program.
        return registers.answer(Err(Errno::NOSYS));
    }
    dispatch(u64::from(nr.cast_unsigned()), &mut registers);
}

/// A `SIGSYS` that is none of ours: what the program has installed for it happens.
#[cold]
fn foreign(signal: c_int, info: *mut Info, context: *mut libc::ucontext_t) {
    let handler = FOREIGN[0].load(Acquire);
    match raw::index(handler) {
        libc::SIG_IGN => {}
        libc::SIG_DFL => {
            let none = [0u64; 4];
            let args = [raw::arg(signal), raw::ptr_arg(none.as_ptr()), 0, 8];
            // SAFETY: a structure as large as the kernel's: no handler.
            let _ = unsafe { raw::syscall(libc::SYS_rt_sigaction, args) };
            let own = [u64::from(raw::getpid()), u64::from(crate::thread::gettid()), raw::arg(signal)];
            // SAFETY: touches no memory; ends the process.
            let _ = unsafe { raw::syscall(libc::SYS_tgkill, own) };
        }
        at => {
            let at: *const c_void = std::ptr::with_exposed_provenance(at);
            type Handler = unsafe extern "C" fn(c_int, *mut Info, *mut libc::ucontext_t);
            // SAFETY: the program has said that this is a handler; one that takes only the number ignores the rest.
            let handler: Handler = unsafe { std::mem::transmute::<*const c_void, Handler>(at) };
            // SAFETY: with what the kernel passed.
            unsafe { handler(signal, info, context) };
        }
    }
}

fn dispatch(nr: u64, registers: &mut Registers<'_>) {
    let args = registers.args();
    let Ok(known) = libc::c_long::try_from(nr) else { return };
    let Some((number, own)) = own_slot() else {
        // A thread with thread-local storage that is not ours to look at.
        // SAFETY: the program's own call.
        return registers.answer(unsafe { raw::syscall(known, args) });
    };
    if nr == entry::REVIEW
        && let Some(call) = own.call_at(registers.get(libc::REG_RBX))
    {
        return review(own, call, registers);
    }
    match known {
        libc::SYS_rt_sigreturn => {
            // The frame's mask is on the stack, where it was put by the kernel.
            let mask = registers.get(libc::REG_RSP) + UC_SIGMASK;
            let mut words = [0];
            if peek(own, registers.get(libc::REG_RSP), mask, &mut words) && words[0] & SIGSYS_BIT != 0 {
                poke(own, registers.get(libc::REG_RSP), mask, &[words[0] & !SIGSYS_BIT]);
            }
            registers.set(libc::REG_RIP, entry::leave());
        }
        libc::SYS_exit => {
            own.leave();
            registers.set(libc::REG_RIP, entry::leave());
        }
        libc::SYS_exit_group => registers.set(libc::REG_RIP, entry::leave()),
        // What these set going goes on behind our back.
        libc::SYS_io_uring_setup | libc::SYS_io_setup => registers.answer(Err(Errno::NOSYS)),
        libc::SYS_prctl if args[0] == entry::SET_DISPATCH => registers.answer(Err(Errno::INVAL)),
        libc::SYS_rt_sigaction if args[0] == u64::from(libc::SIGSYS.cast_unsigned()) => {
            let answer = foreign_action(own, registers.get(libc::REG_RSP), args);
            registers.answer(answer);
        }
        libc::SYS_clone | libc::SYS_clone3 | libc::SYS_fork | libc::SYS_vfork => {
            make_thread(own, known, registers);
        }
        _ => ordinary(number, own, known, registers),
    }
}

/// Offset of the signal mask in the kernel's `struct ucontext`.
const UC_SIGMASK: u64 = 296;

fn begin(own: &'static Slot, nr: libc::c_long, registers: &Registers<'_>) -> &'static Call {
    let sp = registers.get(libc::REG_RSP);
    let Some(call) = own.begin(sp, own_signal_stack(own)) else {
        crate::fork::die("uhmm: too many system calls of one thread, each in the middle of another\n");
    };
    call.begin_ranges();
    call.rip.store(registers.get(libc::REG_RIP), Relaxed);
    call.rbx.store(registers.get(libc::REG_RBX), Relaxed);
    call.args.iter().zip(registers.args()).for_each(|(place, arg)| place.store(arg, Relaxed));
    call.nr.store(nr.cast_unsigned(), Relaxed);
    for word in [&call.review, &call.clear_in_child, &call.child, &call.fixed, &call.tries] {
        word.store(0, Relaxed);
    }
    call
}

fn go(call: &'static Call, code: u64, args: [u64; 6], registers: &mut Registers<'_>) {
    registers.set_args(args);
    registers.set(libc::REG_RAX, call.nr.load(Relaxed));
    registers.set(libc::REG_RBX, raw::ptr_arg(call));
    registers.set(libc::REG_RIP, code);
}

/// A call that returns once.
fn ordinary(number: usize, own: &'static Slot, nr: libc::c_long, registers: &mut Registers<'_>) {
    let call = begin(own, nr, registers);
    let mut args = registers.args();
    let mut memory = Held { own, call, sp: registers.get(libc::REG_RSP) };
    table::decode(nr, args, &mut memory);
    keep_in_place(own, nr, args);
    if nr == libc::SYS_sigaltstack {
        signal_stack(number, &mut args, &mut memory);
    }
    keep_sigsys(nr, &mut args, &mut memory);
    if nr == libc::SYS_mremap {
        call.review.store(1, Relaxed);
        // It touches no memory: its `EFAULT` means what it says.
        call.tries.store(1, Relaxed);
    }
    go(call, entry::make_call(), args, registers);
}

/// Memory that the kernel will touch after this call stays where it is.
fn keep_in_place(own: &'static Slot, nr: libc::c_long, args: [u64; 6]) {
    match nr {
        libc::SYS_set_robust_list => fix_page(own, args[0], Some(FIXED_ROBUST)),
        libc::SYS_set_tid_address | libc::SYS_rseq => fix_page(own, args[0], None),
        _ => {}
    }
}

/// The signal stack of the thread that has this slot.
fn own_signal_stack(own: &Slot) -> Option<PageRange> {
    own.fixed_at(FIXED_SIGNAL_STACK)
}

fn fix_page(own: &Slot, at: u64, place: Option<usize>) {
    let Ok(range) = PageRange::covering(VirtAddr::new(at), 64) else { return };
    if own.is_fixed(range) {
        return;
    }
    match place {
        Some(place) => own.fix_at(place, range),
        None => drop(own.fix(range)),
    }
    settle(range);
}

/// Fixes the control block at a thread pointer.
fn fix_control_block(own: &Slot, tp: u64) {
    let Some(start) = tp.checked_sub(PAGE_SIZE) else { return };
    if let Ok(range) = PageRange::covering(VirtAddr::new(start), 2 * PAGE_SIZE) {
        let _ = own.fix(range);
    }
}

/// After a range was fixed: brings it home and unregisters it.
fn settle(range: PageRange) {
    if let Some(pager) = pager() {
        for _ in 0..ROUNDS {
            if pager.release(range) {
                return;
            }
            nap();
        }
    }
}

/// The bytes of memory that a call in the making uses.
struct Held {
    own: &'static Slot,
    call: &'static Call,
    /// The program's stack pointer.
    sp: u64,
}

impl Memory for Held {
    fn hold(&mut self, start: u64, len: u64) {
        let len = len.min(TASK_SIZE.saturating_sub(start));
        if start < LOWEST || len == 0 {
            return;
        }
        let Ok(range) = PageRange::covering(VirtAddr::new(start), len) else { return };
        if self.own.is_fixed(range) {
            return;
        }
        self.call.hold(range);
        if let Some(pager) = pager() {
            ensure(pager, range);
        }
    }

    fn read(&mut self, start: u64, words: &mut [u64]) -> bool {
        peek(self.own, self.sp, start, words)
    }

    fn hold_text(&mut self, start: u64) {
        /// `MAX_ARG_STRLEN`
        const LONGEST: u64 = 32 * PAGE_SIZE;
        let mut at = start;
        while at < start.saturating_add(LONGEST) && at < TASK_SIZE {
            let end = (at / PAGE_SIZE + 1) * PAGE_SIZE;
            self.hold(at, end - at);
            if ends_before(at, end) {
                return;
            }
            at = end;
        }
    }
}

/// Whether a string that is somewhere in its middle at `at` ends before `end`, or cannot be read on.
fn ends_before(at: u64, end: u64) -> bool {
    let mut bytes = [0u8; 256];
    let mut at = at;
    while at < end {
        let len = raw::index((end - at).min(bytes.len() as u64));
        let part = &mut bytes[..len];
        if !access::read(VirtAddr::new(at), part).is_all() || part.contains(&0) {
            return true;
        }
        at += len as u64;
    }
    false
}

/// Whether these bytes are in use on the thread's own stack, so that they can be touched directly.
fn is_on_stack(own: &Slot, sp: u64, start: u64, len: u64) -> bool {
    // The first bytes below the stack pointer belong to the function that has it.
    start >= sp.saturating_sub(128)
        && PageRange::covering(VirtAddr::new(start), len).is_ok_and(|range| {
            own.is_fixed(range)
                && PageRange::from_ends(VirtAddr::new(sp).page(), range.end()).is_ok_and(|all| own.is_fixed(all))
        })
}

/// Reads words of the program. `false` where they cannot be read.
fn peek(own: &Slot, sp: u64, at: u64, words: &mut [u64]) -> bool {
    if at.is_multiple_of(8) && is_on_stack(own, sp, at, words.len() as u64 * 8) {
        for (n, word) in words.iter_mut().enumerate() {
            let place = raw::ptr(VirtAddr::new(at + n as u64 * 8)).cast::<u64>();
            // SAFETY: on the calling thread's stack, above its stack pointer, and aligned.
            *word = unsafe { place.read_volatile() };
        }
        return true;
    }
    words.iter_mut().enumerate().all(|(n, word)| {
        let mut bytes = [0; 8];
        let read = access::read(VirtAddr::new(at + n as u64 * 8), &mut bytes).is_all();
        *word = u64::from_ne_bytes(bytes);
        read
    })
}

/// Writes words of the program. `false` where they cannot be written.
fn poke(own: &Slot, sp: u64, at: u64, words: &[u64]) -> bool {
    let each = words.iter().enumerate().map(|(n, word)| (VirtAddr::new(at + n as u64 * 8), word));
    if at.is_multiple_of(8) && is_on_stack(own, sp, at, words.len() as u64 * 8) {
        for (place, word) in each {
            // SAFETY: on the calling thread's stack, above its stack pointer, aligned, and the program's to be written.
            unsafe { raw::ptr(place).cast::<u64>().write_volatile(*word) };
        }
        return true;
    }
    each.into_iter().all(|(place, word)| access::write(place, &word.to_ne_bytes()).is_all())
}

/// Sees to it that the kernel can touch the pages of a range that was published, as far as they are there at all.
fn ensure(pager: &dyn Pager, range: PageRange) {
    const CHUNK: u64 = 512 * PAGE_SIZE;
    let mut at = range.start();
    while at < range.end() {
        let end = VirtAddr::new((at.get() / CHUNK + 1) * CHUNK).min(range.end());
        let Ok(chunk) = PageRange::from_ends(at, end) else { return };
        at = end;
        if !pager.is_managed(chunk.start()) {
            continue;
        }
        let (mut asked, mut naps) = (0, 0);
        loop {
            match pager.look(chunk) {
                // A mover may be without a CPU for long.
                Whereabouts::Moving if naps < MOST_NAPS => {
                    naps += 1;
                    nap();
                }
                Whereabouts::Away if asked < ROUNDS => {
                    if asked > 1 {
                        nap();
                    }
                    asked += 1;
                    pager.bring(chunk);
                }
                // Not there after all that: then nothing is mapped, or nothing that could be read.
                Whereabouts::Here if asked < FEW_ROUNDS && !is_there(chunk) => {
                    asked += 1;
                    pager.bring(chunk);
                }
                _ => break,
            }
        }
    }
}

fn nap() {
    let time = [0u64, 50_000];
    // SAFETY: the kernel reads the time, a local.
    let _ = unsafe { raw::syscall(libc::SYS_nanosleep, [raw::ptr_arg(time.as_ptr()), 0]) };
}

/// Whether the pages of a range of 2 MiB at most are mapped. Those that are not, the kernel is asked to fill as it fills
/// memory that nobody has registered.
///
/// # Kernel
/// `mincore(2)`, which stops at what is not mapped; `madvise(2)` with `MADV_POPULATE_READ`.
fn is_there(range: PageRange) -> bool {
    let mut pages = [1u8; 512];
    let args = [range.start().get(), range.bytes(), raw::ptr_arg(pages.as_mut_ptr())];
    // SAFETY: the kernel writes a byte for each page, of which there are at most as many.
    let _ = unsafe { raw::syscall(libc::SYS_mincore, args) };
    let mut all = true;
    let mut first = 0;
    let count = range.pages().min(pages.len());
    while let Some(n) = pages[first..count].iter().position(|page| page & 1 == 0) {
        let start = first + n;
        let end = pages[start..count].iter().position(|page| page & 1 != 0).map_or(count, |n| start + n);
        let at = range.start().add(start as u64 * PAGE_SIZE);
        let part = PageRange::new(at, (end - start) as u64 * PAGE_SIZE).expect("part of a range");
        all &= access::populate_read(part).is_ok();
        first = end;
    }
    all
}

/// A call asks for a look at its answer.
fn review(own: &'static Slot, call: &'static Call, registers: &mut Registers<'_>) {
    let answer = call.answer.load(Relaxed);
    let args = registers.args();
    let nr = call.nr.load(Relaxed);
    let failed = answer > u64::MAX - 4095;
    let fault = i64::from(-libc::EFAULT).cast_unsigned();
    if answer == fault && pager().is_some() && !makes_threads(nr) && call.tries.fetch_add(1, Relaxed) == 0 {
        let mut memory = Held { own, call, sp: registers.get(libc::REG_RSP) };
        args.into_iter().for_each(|arg| memory.hold(arg & !(PAGE_SIZE - 1), AROUND));
        return go(call, entry::make_call(), args, registers);
    }
    if nr == libc::SYS_mremap.cast_unsigned()
        && !failed
        && let Some(pager) = pager()
        && let Ok(range) = PageRange::covering(VirtAddr::new(answer), args[2])
    {
        pager.moved(range);
    }
    if nr == libc::SYS_sigaltstack.cast_unsigned() && !failed {
        signal_stack_is_set(own, registers.get(libc::REG_RSP), call);
    }
    if makes_threads(nr) {
        if let Some(child) = call.child.load(Relaxed).checked_sub(1).filter(|_| failed)
            && let Some(child) = slot::slot(raw::index(child))
        {
            child.give_back();
        }
        let mut bits = call.fixed.load(Relaxed);
        while bits != 0 {
            own.unfix(bits.trailing_zeros() as usize);
            bits &= bits - 1;
        }
        match call.scratch[0].load(Relaxed) {
            UNSHARE => {
                // The child's last call, which made it another program, has not come back.
                own.end_others(call.scratch[OWN_CALLS].load(Relaxed));
                own.unshare();
            }
            FORK => pager().into_iter().for_each(Pager::after_fork),
            _ => {}
        }
    }
    registers.set(libc::REG_RAX, answer);
    registers.set_args(std::array::from_fn(|n| call.args[n].load(Relaxed)));
    registers.set(libc::REG_RBX, call.rbx.load(Relaxed));
    if makes_threads(nr) && !failed && call.clear_in_child.load(Relaxed) == 0 {
        // The child has its own use of it.
        call.users.fetch_sub(1, SeqCst);
    } else {
        call.end();
    }
}

// Signals.

/// Signal stacks smaller than this have no room for a second frame above the one of the program's handler.
const SMALL_SIGNAL_STACK: u64 = 16 << 10;
/// Where a call of `sigaltstack` keeps what the program asked for, in its scratch words.
const ASKED: usize = 4;

/// A new signal stack: it stays where it is, and a small one is replaced.
fn signal_stack(number: usize, args: &mut [u64; 6], memory: &mut Held) {
    let scratch = &memory.call.scratch;
    scratch[ASKED..].iter().for_each(|word| word.store(0, Relaxed));
    memory.call.review.store(1, Relaxed);
    memory.own.unfix(FIXED_NEXT_SIGNAL_STACK);
    let mut words = [0; 3];
    if args[0] == 0 || !memory.read(args[0], &mut words) {
        return;
    }
    let [start, flags, size] = words;
    let disable = u64::from(libc::SS_DISABLE.cast_unsigned());
    let smallest = libc::MINSIGSTKSZ as u64;
    let spare = slot::spare_signal_stack(number).filter(|_| (smallest..SMALL_SIGNAL_STACK).contains(&size));
    if flags & disable != 0 {
        return;
    }
    if let Some(spare) = spare {
        scratch[ASKED..].iter().zip(words).for_each(|(word, value)| word.store(value, Relaxed));
        let instead = [spare.start().get(), flags, SIGNAL_STACK as u64];
        scratch.iter().zip(instead).for_each(|(word, value)| word.store(value, Relaxed));
        args[0] = raw::ptr_arg(scratch.as_ptr());
        memory.own.fix_at(FIXED_NEXT_SIGNAL_STACK, spare);
    } else if let Ok(range) = PageRange::covering(VirtAddr::new(start), size) {
        memory.own.fix_at(FIXED_NEXT_SIGNAL_STACK, range);
        settle(range);
    }
}

/// After `sigaltstack` has succeeded.
fn signal_stack_is_set(own: &Slot, sp: u64, call: &Call) {
    let [new, old] = [0, 1].map(|n| call.args[n].load(Relaxed));
    let before: [u64; 3] = std::array::from_fn(|n| own.signal_stack[n].load(Relaxed));
    let mut flags = [0];
    if old != 0 && before[2] != 0 && peek(own, sp, old + 8, &mut flags) {
        // The kernel has just told of the stack that stood for it.
        poke(own, sp, old, &[before[0], flags[0], before[2]]);
    }
    if new == 0 {
        return;
    }
    own.signal_stack.iter().zip(&call.scratch[ASKED..]).for_each(|(to, from)| to.store(from.load(Relaxed), Relaxed));
    match own.fixed_at(FIXED_NEXT_SIGNAL_STACK) {
        Some(range) => own.fix_at(FIXED_SIGNAL_STACK, range),
        None => own.unfix(FIXED_SIGNAL_STACK),
    }
    own.unfix(FIXED_NEXT_SIGNAL_STACK);
}

/// Takes `SIGSYS` out of masks that the call sets: a system call that is caught while it is blocked ends the program.
fn keep_sigsys(nr: libc::c_long, args: &mut [u64; 6], memory: &mut Held) {
    let scratch = &memory.call.scratch;
    let place = raw::ptr_arg(scratch.as_ptr());
    match nr {
        libc::SYS_rt_sigprocmask
        | libc::SYS_rt_sigsuspend
        | libc::SYS_ppoll
        | libc::SYS_epoll_pwait
        | libc::SYS_epoll_pwait2 => {
            let n = match nr {
                libc::SYS_rt_sigprocmask if args[0] == u64::from(libc::SIG_UNBLOCK.cast_unsigned()) => return,
                libc::SYS_rt_sigprocmask => 1,
                libc::SYS_rt_sigsuspend => 0,
                libc::SYS_ppoll => 3,
                _ => 4,
            };
            let mut mask = [0];
            if args[n] != 0 && memory.read(args[n], &mut mask) && mask[0] & SIGSYS_BIT != 0 {
                scratch[0].store(mask[0] & !SIGSYS_BIT, Relaxed);
                args[n] = place;
            }
        }
        libc::SYS_pselect6 => {
            let (mut pair, mut mask) = ([0; 2], [0]);
            if args[5] != 0
                && memory.read(args[5], &mut pair)
                && pair[0] != 0
                && memory.read(pair[0], &mut mask)
                && mask[0] & SIGSYS_BIT != 0
            {
                scratch[0].store(mask[0] & !SIGSYS_BIT, Relaxed);
                scratch[1].store(place, Relaxed);
                scratch[2].store(pair[1], Relaxed);
                args[5] = place + 8;
            }
        }
        libc::SYS_rt_sigaction => {
            let mut action = [0; 4];
            if args[1] != 0 && memory.read(args[1], &mut action) && action[3] & SIGSYS_BIT != 0 {
                action[3] &= !SIGSYS_BIT;
                scratch.iter().zip(action).for_each(|(word, value)| word.store(value, Relaxed));
                args[1] = place;
            }
        }
        _ => {}
    }
}

/// `rt_sigaction` for `SIGSYS`: noted only.
fn foreign_action(own: &'static Slot, sp: u64, args: [u64; 6]) -> Result<u64, Errno> {
    let [_, new, old, size, ..] = args;
    if size != 8 {
        return Err(Errno::INVAL);
    }
    if let Some(pager) = pager() {
        for at in [new, old] {
            if at >= LOWEST
                && let Ok(range) = PageRange::covering(VirtAddr::new(at), 32)
            {
                ensure(pager, range);
            }
        }
    }
    let mut action = [0; 4];
    if new != 0 && !peek(own, sp, new, &mut action) {
        return Err(Errno::FAULT);
    }
    let before: [u64; 4] = std::array::from_fn(|n| FOREIGN[n].load(Relaxed));
    if old != 0 && !poke(own, sp, old, &before) {
        return Err(Errno::FAULT);
    }
    if new != 0 {
        FOREIGN.iter().zip(action).rev().for_each(|(word, value)| word.store(value, Release));
    }
    Ok(0)
}

// Threads and processes.

/// What a call that makes a thread notes for when it is over: the slot was not shared before.
const UNSHARE: u64 = 1;
/// A fork was prepared.
const FORK: u64 = 2;
/// Where it notes which calls of the slot are the parent's. In between is a copy of a `struct clone_args`, but for its end.
const OWN_CALLS: usize = 11;
/// Words of that structure that can be copied.
const CLONE_WORDS: usize = 10;
/// `CLONE_CLEAR_SIGHAND`: signals have no handlers in the child.
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;

/// What a new thread or process is to be.
struct Plan {
    flags: u64,
    /// Its stack, where it has one of its own.
    stack: Option<PageRange>,
    tls: u64,
    /// Words that the kernel writes for the child, later.
    child_tid: u64,
}

fn make_thread(own: &'static Slot, nr: libc::c_long, registers: &mut Registers<'_>) {
    const FLAGS: usize = 0;
    let call = begin(own, nr, registers);
    let mut args = registers.args();
    let mut memory = Held { own, call, sp: registers.get(libc::REG_RSP) };
    table::decode(nr, args, &mut memory);
    let bit = |flag: c_int| u64::from(flag.cast_unsigned());
    let plan = match nr {
        libc::SYS_clone => clone_plan(args),
        libc::SYS_clone3 => {
            let mut words = [0; CLONE_WORDS];
            let count = raw::index(args[1] / 8).min(words.len());
            // Where it cannot be read the call will say so.
            let read = count >= 8 && memory.read(args[0], &mut words[..count]);
            if read && words[FLAGS] & CLONE_CLEAR_SIGHAND != 0 && words[FLAGS] & bit(libc::CLONE_VM) != 0 {
                // Ours is needed until the child becomes another program, which has none either.
                words[FLAGS] &= !CLONE_CLEAR_SIGHAND;
                call.scratch[1..].iter().zip(words).for_each(|(word, value)| word.store(value, Relaxed));
                args[0] = raw::ptr_arg(&raw const call.scratch[1]);
                args[1] = args[1].min(CLONE_WORDS as u64 * 8);
            }
            let stack = PageRange::covering(VirtAddr::new(words[5]), words[6]).ok();
            Plan { flags: words[FLAGS], stack, tls: words[7], child_tid: words[2] }
        }
        libc::SYS_vfork => Plan { flags: bit(libc::CLONE_VM | libc::CLONE_VFORK), stack: None, tls: 0, child_tid: 0 },
        _ => Plan { flags: 0, stack: None, tls: 0, child_tid: 0 },
    };
    let has = |flag| plan.flags & bit(flag) != 0;
    let Some(watch) = WATCH.get() else { return };
    call.text_start.store(watch.text.start().get(), Relaxed);
    call.text_len.store(watch.text.bytes(), Relaxed);
    call.scratch[0].store(0, Relaxed);
    if !has(libc::CLONE_VM) {
        call.clear_in_child.store(PAGER.as_ptr().expose_provenance() as u64, Relaxed);
        if pager().is_some_and(Pager::before_fork) {
            call.scratch[0].store(FORK, Relaxed);
            call.review.store(1, Relaxed);
        }
        // Its child has a record of its own.
        return go(call, entry::make_clone(), args, registers);
    }
    let fixes = [plan.stack, control_block(&plan), word_page(&plan, libc::CLONE_CHILD_CLEARTID)];
    if has(libc::CLONE_SETTLS) {
        let Some((n, child)) = slot::claim().and_then(|n| Some((n, slot::slot(n)?))) else {
            call.end();
            return registers.answer(Err(Errno::AGAIN));
        };
        for range in fixes.into_iter().flatten() {
            let _ = child.fix(range);
            settle(range);
        }
        call.child.store(n as u64 + 1, Relaxed);
        let place = raw::ptr(VirtAddr::new(plan.tls.wrapping_add(entry::slot_offset()))).cast::<u64>();
        // SAFETY: the new thread's static thread-local storage, which the caller has laid out.
        unsafe { place.write_volatile(n as u64 + 1) };
    } else {
        // Two use one slot from now on: for good, or until the child is another program or gone.
        let before = own.is_shared();
        own.share();
        if has(libc::CLONE_VFORK) {
            if !before {
                call.scratch[0].store(UNSHARE, Relaxed);
                call.scratch[OWN_CALLS].store(own.calls_in_use(), Relaxed);
            }
            call.review.store(1, Relaxed);
        }
        for range in fixes.into_iter().flatten() {
            if let Some(n) = own.fix(range).filter(|_| has(libc::CLONE_VFORK)) {
                call.fixed.fetch_or(1 << n, Relaxed);
            }
            settle(range);
        }
    }
    call.users.store(2, SeqCst);
    fence(SeqCst);
    go(call, entry::make_clone(), args, registers);
}

/// The plan of a plain `clone`, which says nothing of how large a stack is.
fn clone_plan(args: [u64; 6]) -> Plan {
    let [flags, sp, _, child_tid, tls, _] = args;
    let below = WATCH.get().map_or(8 << 20, |watch| watch.stack_bytes).min(sp);
    // What the caller has put above the stack pointer for the new thread's first function.
    let stack = PageRange::covering(VirtAddr::new(sp - below), below + 64).ok().filter(|_| sp != 0);
    Plan { flags, stack, tls, child_tid }
}

/// From the end of the stack over the static thread-local storage to the control block, where they lie so; or the latter.
fn control_block(plan: &Plan) -> Option<PageRange> {
    if plan.flags & u64::from(libc::CLONE_SETTLS.cast_unsigned()) == 0 {
        return None;
    }
    let near = plan.stack.map(PageRange::end).map(VirtAddr::get);
    let start = near.filter(|end| (*end..end + TLS_BYTES).contains(&plan.tls)).unwrap_or(plan.tls - PAGE_SIZE);
    PageRange::from_ends(VirtAddr::new(start).page(), VirtAddr::new(plan.tls + PAGE_SIZE).page()).ok()
}

/// The page of the word that the kernel sets to zero when the thread ends.
fn word_page(plan: &Plan, flag: c_int) -> Option<PageRange> {
    let wanted = plan.flags & u64::from(flag.cast_unsigned()) != 0;
    PageRange::covering(VirtAddr::new(plan.child_tid), 4).ok().filter(|_| wanted)
}
