//! Who is inside: the marks of lanes, and the gate that keeps them out.
//!
//! A lane sets its mark, looks its page up, makes one access of at most a page, and clears the mark. Whoever removed
//! table entries then waits until every mark that is set has changed: after that no access through the old entries is
//! under way. Whoever closes the gate does the same, and no lane goes in until the gate is open again.
//!
//! ```text
//!   lane                                    flush, close_gate
//!   mark := odd                             remove entries, or closed := 1
//!   light fence                             heavy fence
//!   closed? look the page up. access        mark odd: wait until it is another
//!   mark := even
//! ```
//! By the fences one of the two sees what the other did.
//!
//! Each flush also begins an *epoch*, after the entries were removed and before it waits. A lane may keep what it looked up
//! and use it inside later, as long as the epoch is the one in which it began to look.
//!
//! # The rule
//! While its mark is set a lane touches the arena, device memory and its own stack, and nothing else: a page of the
//! program may be away, and the handler that would bring it home may be waiting for this very mark.
//!
//! # Accesses to host memory
//! These go through system calls, which may themselves wait for a page to come home. So they run with the mark clear, and
//! a second mark set. The kernel checks the mapping of each such access when it is made, so an entry that is out of date
//! can do no harm; a flush waits for them a little all the same, because a page that the kernel is copying from is pinned
//! and cannot move.

use std::{
    sync::atomic::{
        AtomicU32, AtomicU64,
        Ordering::{Acquire, Relaxed, Release, SeqCst},
        fence,
    },
    time::{Duration, Instant},
};

use uhmm_sys::{
    addr::{PageRange, VirtAddr},
    fence as asymmetric,
};

/// Lanes of a device.
pub(super) const LANES: usize = 64;

/// The longest that a flush waits for accesses to host memory. The access may be waiting in a fault for the very
/// thread that flushes, so this cannot be a wait for the end.
const HOST_LIMIT: Duration = Duration::from_millis(2);

/// A limit that is none.
const NEVER: Duration = Duration::from_secs(1 << 30);

/// The wait was too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TimedOut;

/// A bounded wait that costs no system call where it is short.
#[derive(Debug)]
pub(super) struct Pause {
    limit: Duration,
    /// From the first yield on.
    deadline: Option<Instant>,
    tries: u32,
}

impl Pause {
    pub(super) const fn new(limit: Duration) -> Self {
        Self { limit, deadline: None, tries: 0 }
    }

    /// Waits a little, or says that the limit has passed.
    pub(super) fn wait(&mut self) -> Result<(), TimedOut> {
        self.tries = self.tries.saturating_add(1);
        if self.tries < 64 {
            std::hint::spin_loop();
            return Ok(());
        }
        let now = Instant::now();
        if now >= *self.deadline.get_or_insert(now + self.limit) {
            return Err(TimedOut);
        }
        if self.tries < 1024 {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }
}

/// One lane's marks, alone on their cache line. Odd: set. They only ever grow, so that a wait for one access does not
/// become a wait for the next.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Slot {
    /// Inside.
    near: AtomicU32,
    /// In an access to host memory.
    far: AtomicU32,
    /// Of which page.
    far_page: AtomicU64,
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Aligned<T>(T);

/// The marks of all lanes, and the gate.
#[derive(Debug)]
pub(super) struct Marks {
    slots: [Slot; LANES],
    closed: Aligned<AtomicU32>,
    epoch: Aligned<AtomicU64>,
    /// A bit for each lane that somebody has.
    claimed: AtomicU64,
    /// A bit for each lane that may set its mark. While none does, the gate costs next to nothing.
    armed: AtomicU64,
}

/// A lane is inside; it leaves when this is dropped, also by a panic.
#[derive(Debug)]
pub(super) struct Inside<'a>(&'a Slot);

/// A lane is in an access to host memory.
#[derive(Debug)]
pub(super) struct InHost<'a>(&'a Slot);

impl Marks {
    pub(super) fn new() -> Self {
        Self {
            slots: std::array::from_fn(|_| Slot::default()),
            closed: Aligned::default(),
            epoch: Aligned::default(),
            claimed: AtomicU64::new(0),
            armed: AtomicU64::new(0),
        }
    }

    /// Takes the number of a lane that nobody has, armed.
    pub(super) fn claim(&self) -> Option<usize> {
        let mut now = self.claimed.load(Relaxed);
        loop {
            let lane = now.trailing_ones() as usize;
            if lane == LANES {
                return None;
            }
            match self.claimed.compare_exchange_weak(now, now | 1 << lane, Acquire, Relaxed) {
                Ok(_) => {
                    self.arm(lane);
                    return Some(lane);
                }
                Err(current) => now = current,
            }
        }
    }

    /// Gives a lane's number back.
    pub(super) fn release(&self, lane: usize) {
        self.disarm(lane);
        self.claimed.fetch_and(!(1 << lane), Release);
    }

    /// The lane will set its mark from now on.
    pub(super) fn arm(&self, lane: usize) {
        self.armed.fetch_or(1 << lane, SeqCst);
        // Pairs with the fence in `armed`: who misses the bit there has done before what this lane looks at later.
        fence(SeqCst);
    }

    /// The lane will not set its mark until it is armed again.
    pub(super) fn disarm(&self, lane: usize) {
        debug_assert_eq!(self.slots[lane].near.load(Relaxed) & 1, 0, "a lane inside cannot be disarmed");
        self.armed.fetch_and(!(1 << lane), Release);
    }

    /// Goes in with a lane.
    ///
    /// # Locking
    /// Waits while the gate is closed, for `limit` at most. Not re-entrant.
    pub(super) fn enter(&self, lane: usize, limit: Duration) -> Result<Inside<'_>, TimedOut> {
        let slot = &self.slots[lane];
        let mut pause = Pause::new(limit);
        loop {
            let mark = slot.near.load(Relaxed);
            debug_assert_eq!(mark & 1, 0, "the gate is not re-entrant");
            slot.near.store(mark.wrapping_add(1), Relaxed);
            asymmetric::light();
            if self.closed.0.load(Acquire) == 0 {
                return Ok(Inside(slot));
            }
            slot.near.store(mark.wrapping_add(2), Release);
            while self.closed.0.load(Relaxed) != 0 {
                pause.wait()?;
            }
        }
    }

    /// Closes the gate and waits until no lane is inside. One closer at a time.
    pub(super) fn close(&self) {
        self.closed.0.store(1, SeqCst);
        self.wait(self.armed());
    }

    pub(super) fn open(&self) {
        self.closed.0.store(0, Release);
    }

    /// The epoch. To be asked inside.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch.0.load(Acquire)
    }

    /// Waits until no access begun before is under way: strictly for those inside, a little for those to host memory
    /// in `range`.
    pub(super) fn flush(&self, range: PageRange) {
        self.epoch.0.fetch_add(1, SeqCst);
        let lanes = self.armed();
        self.wait(lanes);
        let mut pause = Pause::new(HOST_LIMIT);
        for slot in self.slots_of(lanes) {
            let seen = slot.far.load(Acquire);
            if seen & 1 == 0 || !range.contains(VirtAddr::new(slot.far_page.load(Relaxed))) {
                continue;
            }
            while slot.far.load(Acquire) == seen {
                if pause.wait().is_err() {
                    return;
                }
            }
        }
    }

    /// The lanes that may have missed what the caller did before.
    fn armed(&self) -> u64 {
        fence(SeqCst);
        self.armed.load(SeqCst)
    }

    fn wait(&self, lanes: u64) {
        if lanes == 0 {
            return;
        }
        asymmetric::heavy();
        for slot in self.slots_of(lanes) {
            let seen = slot.near.load(Acquire);
            if seen & 1 == 0 {
                continue;
            }
            // Without a limit: the access is one of a page at most, which waits for no page to come home, and to go on
            // before its end would break it. It may be a read from a disk.
            let mut pause = Pause::new(NEVER);
            while slot.near.load(Acquire) == seen {
                let _ = pause.wait();
            }
        }
    }

    fn slots_of(&self, lanes: u64) -> impl Iterator<Item = &Slot> {
        self.slots.iter().enumerate().filter(move |(n, _)| lanes >> n & 1 != 0).map(|(_, slot)| slot)
    }
}

impl<'a> Inside<'a> {
    /// Leaves for an access to host memory.
    pub(super) fn into_host(self, page: VirtAddr) -> InHost<'a> {
        let slot = self.0;
        slot.far_page.store(page.get(), Relaxed);
        // Set before the other is cleared, so that a flush finds one of them.
        slot.far.store(slot.far.load(Relaxed).wrapping_add(1), Release);
        InHost(slot)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.near.store(self.0.near.load(Relaxed).wrapping_add(1), Release);
    }
}

impl Drop for InHost<'_> {
    fn drop(&mut self) {
        self.0.far.store(self.0.far.load(Relaxed).wrapping_add(1), Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn page(n: u64) -> PageRange {
        PageRange::page_of(VirtAddr::new(n << 12))
    }

    #[test]
    fn nobody_is_inside_between_close_and_open() {
        asymmetric::register_membarrier();
        let (marks, inside, stop) = (&Marks::new(), &AtomicU32::new(0), &AtomicBool::new(false));
        std::thread::scope(|s| {
            for _ in 0..2 {
                s.spawn(move || {
                    let lane = marks.claim().expect("free");
                    while !stop.load(Relaxed) {
                        let entered = marks.enter(lane, LONG).expect("opened soon");
                        inside.fetch_add(1, Relaxed);
                        std::hint::spin_loop();
                        inside.fetch_sub(1, Relaxed);
                        drop(entered);
                    }
                    marks.release(lane);
                });
            }
            for _ in 0..20_000 {
                marks.close();
                assert_eq!(inside.load(Acquire), 0);
                marks.open();
            }
            stop.store(true, Relaxed);
        });
        assert_eq!((marks.claimed.load(Relaxed), marks.armed.load(Relaxed)), (0, 0));
    }

    #[test]
    fn a_flush_ends_accesses_through_what_was_removed() {
        asymmetric::register_membarrier();
        // The entry is the number of a buffer that the lane may use; a buffer that was removed and flushed is poisoned.
        let buffers: &[AtomicU32; 2] = &[AtomicU32::new(0), AtomicU32::new(0)];
        let (marks, entry, stop) = (&Marks::new(), &AtomicU32::new(0), &AtomicBool::new(false));
        std::thread::scope(|s| {
            for _ in 0..2 {
                s.spawn(move || {
                    let lane = marks.claim().expect("free");
                    while !stop.load(Relaxed) {
                        let _inside = marks.enter(lane, LONG).expect("the gate is open");
                        let buffer = &buffers[entry.load(Acquire) as usize];
                        for _ in 0..8 {
                            assert_eq!(buffer.load(Relaxed), 0, "used after the flush");
                        }
                    }
                });
            }
            for round in 0..20_000u32 {
                let (old, new) = (round % 2, (round + 1) % 2);
                buffers[new as usize].store(0, Relaxed);
                entry.store(new, Release);
                marks.flush(page(1));
                buffers[old as usize].store(1, Relaxed);
            }
            stop.store(true, Relaxed);
        });
    }

    #[test]
    fn a_flush_does_not_hang_on_an_access_to_host_memory() {
        let marks = Marks::new();
        let lane = marks.claim().expect("free");
        let inside = marks.enter(lane, LONG).expect("open");
        let in_host = inside.into_host(page(7).start());
        let start = Instant::now();
        marks.flush(page(8));
        marks.flush(page(7));
        assert!(start.elapsed() >= HOST_LIMIT, "the page's access was not waited for");
        drop(in_host);
        drop(marks.enter(lane, LONG).expect("open"));
    }

    #[test]
    fn a_closed_gate_is_waited_for_with_a_limit() {
        let marks = Marks::new();
        let lane = marks.claim().expect("free");
        marks.close();
        assert_eq!(marks.enter(lane, Duration::from_millis(1)).map(drop), Err(TimedOut));
        marks.open();
        assert!(marks.enter(lane, Duration::from_millis(1)).is_ok());
    }

    #[test]
    fn there_are_as_many_lanes_as_bits() {
        let marks = Marks::new();
        let lanes: Vec<_> = std::iter::from_fn(|| marks.claim()).collect();
        assert_eq!(lanes, (0..LANES).collect::<Vec<_>>());
        marks.release(17);
        assert_eq!(marks.claim(), Some(17));
    }
}
