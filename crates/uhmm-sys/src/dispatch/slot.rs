//! What each thread of the program keeps from moving: memory that the kernel may touch at any time, and memory that a
//! system call under way uses.
//!
//! A thread has a *slot*: its *fixed* ranges (stack, thread-local storage, signal stack), and its *calls*. A call is the
//! record of one system call: the registers to be restored after it, and the ranges that it uses. Calls nest, where a
//! signal handler makes one in the middle of another.
//!
//! # Who sees what
//! A mover locks the words of pages, and then looks for ranges; a thread publishes a range, and then looks at the words.
//! Both put a full fence in between, so that one of them sees the other: the mover lets the pages be, or the thread waits.
//!
//! # Locking
//! None. A slot is written by its own thread; everybody may read.

use std::sync::{
    OnceLock,
    atomic::{
        AtomicU32, AtomicU64,
        Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst},
        fence,
    },
};

use crate::{
    Errno,
    addr::{PageRange, VirtAddr},
    arena::{self, Zeroed},
    raw,
};

/// Threads that a process can have while its system calls are watched.
pub const SLOTS: usize = 4096;
/// Fixed ranges of a thread.
const FIXED: usize = 12;
/// The first of them have places of their own.
pub(super) const FIXED_SIGNAL_STACK: usize = 0;
pub(super) const FIXED_NEXT_SIGNAL_STACK: usize = 1;
pub(super) const FIXED_ROBUST: usize = 2;
const FIXED_PLACES: usize = 3;
/// System calls of a thread that can be under way, one in the middle of the other.
const CALLS: usize = 16;
/// Ranges of a call that are kept apart; further ones widen these.
const RANGES: usize = 24;

/// A range of addresses: empty where `end` is 0.
#[derive(Debug)]
#[repr(C)]
struct Span {
    start: AtomicU64,
    end: AtomicU64,
}

impl Span {
    fn set(&self, range: PageRange) {
        self.end.store(0, SeqCst);
        self.start.store(range.start().get(), SeqCst);
        self.end.store(range.end().get(), SeqCst);
    }

    /// Has it hold `range` too. It only grows, so that what was published stays so at all times.
    fn widen(&self, range: PageRange) {
        let Some(own) = self.get() else { return self.set(range) };
        let all = cover(own, range);
        self.start.store(all.start().get(), SeqCst);
        self.end.store(all.end().get(), SeqCst);
    }

    fn clear(&self) {
        self.end.store(0, SeqCst);
    }

    fn get(&self) -> Option<PageRange> {
        let end = self.end.load(Acquire);
        if end == 0 {
            return None;
        }
        PageRange::from_ends(VirtAddr::new(self.start.load(Acquire)), VirtAddr::new(end)).ok()
    }

    fn holds(&self, range: PageRange) -> bool {
        self.get().is_some_and(|own| own.contains_range(range))
    }
}

/// The record of one system call. The entry code of [`super::entry`] knows the first fields by their places.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Call {
    /// How many threads will still restore their registers from this; 0 where it is free.
    pub(super) users: AtomicU64,
    /// Where the program goes on.
    pub(super) rip: AtomicU64,
    /// The register that leads to this record meanwhile.
    pub(super) rbx: AtomicU64,
    /// The arguments, as they were: `rdi`, `rsi`, `rdx`, `r10`, `r8`, `r9`.
    pub(super) args: [AtomicU64; 6],
    /// Not zero: the answer is looked at before it is given.
    pub(super) review: AtomicU64,
    /// The answer, where it is looked at.
    pub(super) answer: AtomicU64,
    /// The code whose system calls are not watched, for a new thread to say.
    pub(super) text_start: AtomicU64,
    pub(super) text_len: AtomicU64,
    /// A word that a child with memory of its own sets to zero; 0 for none.
    pub(super) clear_in_child: AtomicU64,
    /// The number of the system call.
    pub(super) nr: AtomicU64,
    /// Stack pointer of the program at the call.
    pub(super) sp: AtomicU64,
    /// Number of the new thread's slot, plus one.
    pub(super) child: AtomicU64,
    /// Fixed ranges to be given up afterwards, as bits.
    pub(super) fixed: AtomicU64,
    /// How often the call was made.
    pub(super) tries: AtomicU64,
    /// Room for arguments that had to be changed.
    pub(super) scratch: [AtomicU64; 12],
    count: AtomicU64,
    ranges: [Span; RANGES],
}

/// See the module's documentation.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Slot {
    state: AtomicU32,
    /// The thread that leaves, to see whether it is gone.
    tid: AtomicU32,
    /// The process that the thread belongs to.
    pid: AtomicU32,
    /// Not zero: several threads use this slot, for they have the same thread-local storage.
    shared: AtomicU32,
    /// The program's signal stack (address, flags, size), where a larger one stands for it; else zeros.
    pub(super) signal_stack: [AtomicU64; 3],
    fixed: [Span; FIXED],
    calls: [Call; CALLS],
}

// SAFETY: numbers, all atomic; zero is a value of each, and nothing is dropped.
unsafe impl Zeroed for Slot {}

const FREE: u32 = 0;
const LIVE: u32 = 1;
const LEAVING: u32 = 2;

/// Bytes of a signal stack that stands for a small one.
pub(super) const SIGNAL_STACK: usize = 64 << 10;

static TABLE: OnceLock<&'static [Slot]> = OnceLock::new();
/// A signal stack for each slot, of which only those are ever memory that are used.
static SIGNAL_STACKS: OnceLock<&'static [[AtomicU64; SIGNAL_STACK / 8]]> = OnceLock::new();
/// Slots in use lie below this.
static HIGH: AtomicU32 = AtomicU32::new(0);

/// Makes the table.
pub(super) fn set_up() -> Result<(), Errno> {
    let table = arena::slice(SLOTS)?;
    SIGNAL_STACKS.set(arena::slice(SLOTS)?).map_err(|_| Errno::EXIST)?;
    TABLE.set(table).map_err(|_| Errno::EXIST)
}

pub(super) fn slot(number: usize) -> Option<&'static Slot> {
    TABLE.get()?.get(number)
}

/// The signal stack that a slot has at its disposal.
pub(super) fn spare_signal_stack(number: usize) -> Option<PageRange> {
    let stack = SIGNAL_STACKS.get()?.get(number)?;
    PageRange::covering(VirtAddr::of(stack.as_ptr()), SIGNAL_STACK as u64).ok()
}

/// Takes a free slot; its number.
pub(super) fn claim() -> Option<usize> {
    let table = TABLE.get()?;
    let pid = raw::getpid();
    for (number, slot) in table.iter().enumerate() {
        if slot.state.load(Acquire) == LEAVING && slot.is_gone() {
            slot.forget();
            let _ = slot.state.compare_exchange(LEAVING, FREE, AcqRel, Relaxed);
        }
        if slot.state.load(Relaxed) == FREE && slot.state.compare_exchange(FREE, LIVE, AcqRel, Relaxed).is_ok() {
            slot.forget();
            slot.pid.store(pid, Relaxed);
            HIGH.fetch_max(raw::low32(number as u64) + 1, SeqCst);
            return Some(number);
        }
    }
    None
}

/// In a forked child: its one thread has slot `own`.
pub(super) fn reset_in_child(own: usize) {
    let Some(table) = TABLE.get() else { return };
    for (number, slot) in table.iter().enumerate().take(HIGH.load(Acquire) as usize) {
        if number == own {
            slot.pid.store(raw::getpid(), Relaxed);
        } else {
            slot.forget();
            slot.state.store(FREE, Release);
        }
    }
}

fn used() -> impl Iterator<Item = &'static Slot> {
    let table = TABLE.get().copied().unwrap_or_default();
    table.iter().take(HIGH.load(SeqCst) as usize).filter(|slot| slot.state.load(SeqCst) != FREE)
}

/// Calls `f` for the parts of `range` that the kernel may touch at any time: they must neither leave nor be registered.
///
/// # Locking
/// The caller has locked what it wants to move; this puts a fence behind that.
pub fn fixed(range: PageRange, f: &mut dyn FnMut(PageRange)) {
    fence(SeqCst);
    let fixed = used().flat_map(|slot| &slot.fixed).filter_map(Span::get);
    fixed.filter_map(|own| own.intersection(range)).for_each(f);
}

/// Calls `f` for the parts of `range` that must stay: those of [`fixed`], and those that a system call under way uses.
///
/// # Locking
/// As [`fixed`].
pub fn held(range: PageRange, f: &mut dyn FnMut(PageRange)) {
    fixed(range, f);
    for call in used().flat_map(|slot| &slot.calls).filter(|call| call.users.load(SeqCst) != 0) {
        let count = usize::try_from(call.count.load(SeqCst)).unwrap_or(RANGES).min(RANGES);
        call.ranges[..count].iter().filter_map(Span::get).filter_map(|own| own.intersection(range)).for_each(&mut *f);
    }
}

impl Slot {
    fn forget(&self) {
        self.fixed.iter().for_each(Span::clear);
        self.signal_stack.iter().for_each(|word| word.store(0, SeqCst));
        self.calls.iter().for_each(|call| call.users.store(0, SeqCst));
        self.shared.store(0, SeqCst);
    }

    /// Whether the thread that was leaving does not exist any more: the kernel touches nothing of it.
    fn is_gone(&self) -> bool {
        let (pid, tid) = (u64::from(self.pid.load(Acquire)), u64::from(self.tid.load(Acquire)));
        // SAFETY: touches no memory; signal 0 only asks.
        let answer = unsafe { raw::syscall(libc::SYS_tgkill, [pid, tid, 0]) };
        answer == Err(Errno::SRCH)
    }

    /// The thread is about to end. Its memory stays fixed until it is gone: the kernel still writes there.
    pub(super) fn leave(&self) {
        if self.is_shared() || self.pid.load(Relaxed) != raw::getpid() {
            return;
        }
        self.calls.iter().for_each(|call| call.users.store(0, SeqCst));
        self.tid.store(crate::thread::gettid(), Release);
        self.state.store(LEAVING, Release);
    }

    /// The thread that was to have this slot was not made.
    pub(super) fn give_back(&self) {
        self.forget();
        self.state.store(FREE, Release);
    }

    pub(super) fn share(&self) {
        self.shared.store(1, SeqCst);
    }

    pub(super) fn unshare(&self) {
        self.shared.store(0, SeqCst);
    }

    pub(super) fn is_shared(&self) -> bool {
        self.shared.load(SeqCst) != 0
    }

    /// Whether the range never moves, because it is this thread's stack or the like.
    pub(super) fn is_fixed(&self, range: PageRange) -> bool {
        self.fixed.iter().any(|own| own.holds(range))
    }

    /// Publishes a fixed range; its number. Where there is no room, the last one is widened to hold it, and that is `None`.
    pub(super) fn fix(&self, range: PageRange) -> Option<usize> {
        let free = (FIXED_PLACES..FIXED).find(|&n| self.fixed[n].end.load(Relaxed) == 0);
        match free {
            Some(number) => self.fixed[number].set(range),
            None => self.fixed[FIXED - 1].widen(range),
        }
        fence(SeqCst);
        free
    }

    /// The fixed range in a place of its own.
    pub(super) fn fixed_at(&self, number: usize) -> Option<PageRange> {
        self.fixed[number].get()
    }

    /// Publishes a fixed range in a place of its own, which later ones of the same kind replace.
    pub(super) fn fix_at(&self, number: usize, range: PageRange) {
        self.fixed[number].set(range);
        fence(SeqCst);
    }

    pub(super) fn unfix(&self, number: usize) {
        self.fixed[number].clear();
    }

    /// Takes a free record for a call made with this stack pointer.
    ///
    /// Frees those of calls that were left by a jump out of a signal handler: the stack has been unwound beyond them.
    pub(super) fn begin(&'static self, sp: u64, signal_stack: Option<PageRange>) -> Option<&'static Call> {
        if !self.is_shared() {
            let aside = |sp: u64| signal_stack.is_some_and(|stack| stack.contains(VirtAddr::new(sp)));
            for call in &self.calls {
                let users = call.users.load(Relaxed);
                let theirs = call.sp.load(Relaxed);
                // The last is never true of a signal handler's call, which lies deeper than what it interrupted.
                let left = if aside(theirs) == aside(sp) { theirs <= sp } else { aside(theirs) };
                if users == 1 && !call.makes_threads() && left {
                    call.users.store(0, SeqCst);
                }
            }
        }
        let free = |call: &&Call| call.users.compare_exchange(0, 1, AcqRel, Relaxed).is_ok();
        let call = self.calls.iter().find(free)?;
        call.sp.store(sp, Relaxed);
        Some(call)
    }

    /// The calls under way, as bits.
    pub(super) fn calls_in_use(&self) -> u64 {
        let in_use = |&n: &usize| self.calls[n].users.load(SeqCst) != 0;
        (0..CALLS).filter(in_use).fold(0, |bits, n| bits | 1 << n)
    }

    /// Ends the calls that are not in `bits`.
    pub(super) fn end_others(&self, bits: u64) {
        (0..CALLS).filter(|n| bits >> n & 1 == 0).for_each(|n| self.calls[n].end());
    }

    /// The record at this address, if it is one of this slot's.
    pub(super) fn call_at(&'static self, addr: u64) -> Option<&'static Call> {
        self.calls.iter().find(|call| raw::ptr_arg(*call) == addr && call.users.load(Acquire) != 0)
    }
}

fn cover(a: PageRange, b: PageRange) -> PageRange {
    PageRange::from_ends(a.start().min(b.start()), a.end().max(b.end())).expect("covers two ranges")
}

impl Call {
    fn makes_threads(&self) -> bool {
        self.child.load(Relaxed) != 0 || super::makes_threads(self.nr.load(Relaxed))
    }

    /// Ends the call.
    pub(super) fn end(&self) {
        self.users.store(0, SeqCst);
    }

    /// Forgets all ranges.
    pub(super) fn begin_ranges(&self) {
        self.count.store(0, SeqCst);
    }

    /// Publishes a range. Where there is no room for one more, the nearest is widened.
    pub(super) fn hold(&self, range: PageRange) {
        let count = usize::try_from(self.count.load(Relaxed)).unwrap_or(RANGES).min(RANGES);
        let known = &self.ranges[..count];
        if known.iter().any(|own| own.holds(range)) {
            return;
        }
        let near = known.iter().filter_map(|own| own.get().map(|r| (own, r)));
        let touching = near.clone().find(|(_, r)| r.start() <= range.end() && range.start() <= r.end());
        let widest = || near.min_by_key(|(_, r)| cover(*r, range).bytes() - r.bytes());
        let widened = touching.or_else(|| if count == RANGES { widest() } else { None });
        match widened {
            Some((own, _)) => own.widen(range),
            None => {
                self.ranges[count].set(range);
                self.count.store(count as u64 + 1, SeqCst);
            }
        }
        fence(SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(first: u64, count: u64) -> PageRange {
        PageRange::new(VirtAddr::new(0x10_0000 + first * 4096), count * 4096).unwrap()
    }

    fn published(range: PageRange) -> Vec<PageRange> {
        let mut found = Vec::new();
        held(range, &mut |part| found.push(part));
        found
    }

    #[test]
    fn what_a_call_holds_is_seen_until_it_ends_however_much_it_is() {
        // The table is the process's: this is the only test that makes one.
        set_up().unwrap();
        let own = slot(claim().unwrap()).unwrap();
        let call = own.begin(0x1000, None).unwrap();
        call.begin_ranges();
        call.hold(pages(0, 1));
        call.hold(pages(1, 2));
        call.hold(pages(100, 1));
        assert_eq!(published(pages(0, 200)), [pages(0, 3), pages(100, 1)]);
        // More than there is room for: never less than was asked for.
        (0..200).for_each(|n| call.hold(pages(1000 + 3 * n, 1)));
        for n in 0..200 {
            assert!(!published(pages(1000 + 3 * n, 1)).is_empty(), "{n}");
        }
        assert!(published(pages(3000, 10)).is_empty());

        // A handler's call, deeper; then one that finds the stack unwound beyond both.
        let deeper = own.begin(0x800, None).unwrap();
        deeper.begin_ranges();
        deeper.hold(pages(5000, 1));
        assert!(!published(pages(5000, 1)).is_empty() && !published(pages(100, 1)).is_empty());
        let later = own.begin(0x2000, None).unwrap();
        later.begin_ranges();
        assert!(published(pages(0, 10_000)).is_empty());
        later.end();

        // Of a signal stack above the other: left when there is a call on the other again.
        let aside = Some(pages(0, 1));
        let outer = own.begin(0x2000, aside).unwrap();
        let inner = own.begin(0x10_0800, aside).unwrap();
        assert_eq!(outer.users.load(Relaxed), 1);
        let after = own.begin(0x1800, aside).unwrap();
        assert!(std::ptr::eq(after, inner) && outer.users.load(Relaxed) == 1);

        let number = own.fix(pages(7000, 8)).unwrap();
        assert!(own.is_fixed(pages(7001, 2)) && !own.is_fixed(pages(7007, 2)));
        assert_eq!(published(pages(7006, 4)), [pages(7006, 2)]);
        own.unfix(number);
        assert!(published(pages(7006, 4)).is_empty());
        for n in 0..20 {
            let _ = own.fix(pages(8000 + 10 * n, 1));
        }
        assert!((0..20).all(|n| own.is_fixed(pages(8000 + 10 * n, 1))));
    }
}
