//! Keeps the program's anonymous memory in RAM near a limit, by moving what is cold to devices.
//!
//! What is cold is found out by trying: a clock hand goes round the program's memory and sets pages aside in staging,
//! where they cost no copy. A page that is touched there comes back for the price of a fault and a `MOVE`, and is *warm*
//! from then on: the hand passes it by some times before it is tried again. One that is not touched until it reaches the
//! end of the queue is written to a device, and is not warm when it comes back. Not to a coherent device, whose memory is
//! RAM of the process. So what is used again and again stays, what is used once goes first, without sampling and without
//! access bits.
//!
//! While more memory is in RAM than the limit allows, faults that bring in more wait for room (see [`crate::parked`]). So do
//! first touches: they come to the engine then, one for each block.
//!
//! ```text
//!   program --(clock hand)--> staging, first in ... first out --(still untouched, room needed)--> device
//!      ^                         |
//!      +--------- touched -------+
//! ```

use std::{
    sync::atomic::{
        AtomicU64,
        Ordering::{Acquire, Relaxed},
    },
    time::{Duration, Instant},
};

use uhmm_sys::{
    Errno,
    addr::{BLOCK_SIZE, PAGE_SIZE, PageRange, VirtAddr},
    arena,
    maps::{Backing, Prot, Vma},
};

use crate::{
    block::{Block, Place},
    device::DeviceId,
    devices::Entry,
    engine::Core,
    migrate::{Holes, OtherDevices, Outcomes, PageOutcome, Plan, ResidencyRule, refusal},
    os::{MANAGED, Os},
    page_set::PageSet,
    thread::Ctx,
    trace::Why,
};

/// Whether policies move memory of this mapping: not read-only memory, which takes the long way out (see
/// [`crate::lift`]), and not the main thread's stack, whose bounds programs read from `/proc/self/maps`.
fn is_for_policies(vma: &Vma) -> bool {
    refusal(vma).is_none() && vma.prot.contains(Prot::WRITE) && vma.backing != Backing::Stack
}

/// Blocks that can stand in the queue.
const QUEUE: usize = 1 << 15;
/// How long to sleep when there is nothing to do, or little room left.
const TICK: Duration = Duration::from_millis(4);
/// A page stands in the queue at least so long before it is written out, unless room is needed at once.
const TRIAL_TICKS: u32 = 2;
/// The share of the limit that stands in staging while memory must go: the more, the better what is cold is told from what
/// is warm, and the more touches of warm memory cost a fault.
const TRIAL_SHARE: u64 = 8;

/// Pages in staging, first in first out: their block, and when they were set aside, in the arena.
struct Queue {
    ring: &'static [[AtomicU64; 2]],
    head: usize,
    len: usize,
}

impl Queue {
    fn new() -> Result<Self, Errno> {
        Ok(Self { ring: arena::slice(QUEUE)?, head: 0, len: 0 })
    }

    fn push(&mut self, at: VirtAddr, ticks: u32) -> Result<(), Errno> {
        if self.len == self.ring.len() {
            return Err(Errno::NOBUFS);
        }
        let n = (self.head + self.len) % self.ring.len();
        self.ring[n][0].store(at.get(), Relaxed);
        self.ring[n][1].store(u64::from(ticks), Relaxed);
        self.len += 1;
        Ok(())
    }

    #[expect(clippy::cast_possible_truncation, reason = "stored from 32 bits")]
    fn front(&self) -> Option<(VirtAddr, u32)> {
        let [at, since] = &self.ring[self.head];
        (self.len != 0).then(|| (VirtAddr::new(at.load(Relaxed)), since.load(Relaxed) as u32))
    }

    fn pop(&mut self) {
        self.head = (self.head + 1) % self.ring.len();
        self.len -= 1;
    }
}

/// The longest sleep where memory must go and cannot: pages that a forked child shares, or that the program has pinned.
const LONGEST_PAUSE: Duration = Duration::from_millis(64);

/// The most rounds that go by without a page to set aside before what stands in the queue has to go.
const MOST_ROUNDS: u32 = 8;

/// How long a fault that brings in little waits while reclaim is behind.
pub(crate) const THROTTLE: Duration = Duration::from_micros(250);

/// How many mappings are made to wait for reclaim in one go.
const SLOWED_AT_ONCE: usize = 256;
/// How long reclaim may go without freeing anything before faults do not wait for it any more.
const IDLE: Duration = Duration::from_millis(100);
/// Smaller mappings grow too little to matter.
const SLOWED_BYTES: u64 = 2 * BLOCK_SIZE;

/// What one reclaim thread knows.
struct Reclaim {
    queue: Queue,
    walk: Walk,
    /// The next mapping whose growth is to be slowed down.
    slowed: VirtAddr,
    /// The last parked fault that was looked at.
    parked: usize,
    /// Rounds since anything could be set aside.
    idle_rounds: u32,
    /// How long to sleep when nothing can go. Longer each time: nobody is helped by a thread that tries all the time.
    pause: Duration,
    /// When RAM came free last, or need not.
    freed: Instant,
}

/// What a policy walks through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    /// All memory that may move.
    All,
    /// That of which something is there, as far as that can be told at once.
    Used,
}

/// A policy's walk through the program's memory, round and round.
#[derive(Debug, Default)]
pub(crate) struct Walk {
    at: VirtAddr,
    /// Mappings seen in this round, and in the last.
    mappings: u64,
    last_mappings: u64,
}

impl<O: Os> Core<O> {
    /// A reclaim thread's life.
    pub(crate) fn run_reclaim(&'static self) {
        let mut ctx = self.new_ctx();
        self.reclaim_on(&mut ctx);
        self.parked.set_room(None);
        self.serve_parked(&mut ctx, &mut 0, u64::MAX);
    }

    /// Reclaims until the engine stops.
    fn reclaim_on(&'static self, ctx: &mut Ctx) {
        let Ok(queue) = Queue::new() else { return };
        // It must keep up with a program that allocates on every CPU. Without the privilege it is one among many.
        let _ = uhmm_sys::thread::set_nice(-10);
        let mut state = Reclaim {
            queue,
            walk: Walk::default(),
            slowed: VirtAddr::new(0),
            parked: 0,
            idle_rounds: 0,
            pause: TICK,
            freed: Instant::now(),
        };
        let mut last_rss = 0u64;
        while self.stop.load(Relaxed) == 0 {
            let limit = self.resident_limit.load(Acquire);
            let Ok(rss) = self.os.anon_rss() else { return };
            // Where nothing can go nobody has to wait for it.
            let stuck = state.freed.elapsed() > IDLE || self.roomy_device(1).is_none();
            let most = if stuck { u64::MAX } else { limit.saturating_add(limit / 16 + (8 << 20)) };
            let room = most.saturating_sub(rss) / PAGE_SIZE;
            let room = self.serve_parked(ctx, &mut state.parked, room);
            self.parked.set_room((!stuck).then_some(room));
            // What the program may add until the next look counts as there already.
            let waits = self.parked.count() as u64 * BLOCK_SIZE;
            let growth = rss.saturating_sub(last_rss).max(waits).min(limit / 4);
            last_rss = rss;
            // Before it is too much: it may be some time until this thread looks again.
            let slow = rss.saturating_add(4 * growth) > most;
            // Some more than is over, so that there is room for a while.
            let over = (rss + growth + limit / 32).saturating_sub(limit);
            let enough = over <= limit / 32;
            if enough {
                state.freed = Instant::now();
            } else if !self.wait_thawed() {
                continue;
            }
            if slow || !enough {
                self.refresh_excluded(ctx);
            }
            if slow {
                self.slow_growth(ctx, &mut state.slowed);
            }
            if enough {
                state.pause = TICK;
                std::thread::sleep(TICK);
            } else if self.reclaim(ctx, &mut state, over, limit, rss > limit) {
                state.pause = TICK;
            } else {
                std::thread::sleep(state.pause);
                state.pause = (state.pause * 2).min(LONGEST_PAUSE);
            }
        }
    }

    /// Has the first touch of a block come to the engine, where it waits for reclaim (see [`crate::parked`]): registers
    /// mappings that can grow. Memory that the kernel fills by itself would outrun any device.
    ///
    /// Not where system calls are caught: each would have to look up memory that nothing has ever left.
    fn slow_growth(&'static self, ctx: &Ctx, at: &mut VirtAddr) {
        let Some(_running) = self.begin_out().filter(|_| self.os.serves_kernel_faults()) else { return };
        for _ in 0..SLOWED_AT_ONCE {
            let Ok(Some(vma)) = self.os.vma(*at) else {
                *at = VirtAddr::new(0);
                return;
            };
            *at = vma.range.end();
            let mut is_ordinary = is_for_policies(&vma) && vma.range.bytes() >= SLOWED_BYTES;
            ctx.excluded.touching(vma.range, |_| is_ordinary = false);
            if is_ordinary {
                let Ok(_inside) = self.gate.enter(ctx.slot) else { return };
                // Where the kernel refuses it fills that memory on.
                if !self.is_changing() {
                    let _ = self.os.register(vma.range, MANAGED);
                }
            }
        }
    }

    /// Frees about `over` bytes of RAM, or fewer in [`TICK`]: then it is time to look again how many there are. Returns
    /// `false` where there is nothing to do for now.
    fn reclaim(&'static self, ctx: &mut Ctx, state: &mut Reclaim, over: u64, limit: u64, urgent: bool) -> bool {
        let start = Instant::now();
        let mut need = over / PAGE_SIZE;
        let mut worked = false;
        // What could not move a tick ago may be able to now. Where nothing could for long, one round will tell.
        state.idle_rounds = 0;
        let most_rounds = if state.pause == LONGEST_PAUSE { 1 } else { MOST_ROUNDS };
        while need != 0 && start.elapsed() < TICK {
            // Something stands in the queue at all times, so that what leaves for good has been tried first.
            let tried = (limit / TRIAL_SHARE).max(BLOCK_SIZE) / PAGE_SIZE;
            let out = if u64::from(self.staging.standing()) < tried && state.idle_rounds < most_rounds {
                let (any, out) = self.set_aside_next(ctx, state);
                worked |= any;
                out
            } else {
                let Some((at, since)) = state.queue.front() else { break };
                if !urgent && self.ticks().wrapping_sub(since) < TRIAL_TICKS {
                    break;
                }
                state.queue.pop();
                self.write_out(at, since)
            };
            if out != 0 {
                worked = true;
                state.freed = Instant::now();
                need = need.saturating_sub(out);
            }
        }
        // Time may be over before the hand was round.
        worked || (start.elapsed() >= TICK && state.idle_rounds == 0)
    }

    /// Sets the pages of the next block aside that the hand comes upon. Returns whether any could be, and how many went on
    /// to a device at once: where pages are copied to be set aside (no `MOVE`), and again to come home, that is as cheap.
    fn set_aside_next(&'static self, ctx: &mut Ctx, state: &mut Reclaim) -> (bool, u64) {
        let Some(part) = self.next_part(&mut state.walk, Look::Used) else {
            state.idle_rounds += 1;
            return (false, 0);
        };
        let to = if self.os.has_move() { None } else { self.roomy_device(part.pages()) };
        let plan = Plan {
            to,
            why: Why::Cold,
            holes: Holes::Skip,
            other_devices: OtherDevices::Leave,
            residency: ResidencyRule::Cool,
            owner: None,
        };
        let mut outcomes = Outcomes::new();
        self.migrate_out(ctx, part, &plan, &mut outcomes);
        let moved = outcomes.pages(PageOutcome::Moved).count();
        if moved == 0 {
            if !outcomes.pages(PageOutcome::NoMemory).is_empty() {
                // Staging is full: what stands there has to go first.
                state.idle_rounds = MOST_ROUNDS;
            }
            return (false, 0);
        }
        state.idle_rounds = 0;
        if to.is_some() {
            return (true, moved as u64);
        }
        // A full queue only means that these pages are tried for as long as it takes to come round again.
        let _ = state.queue.push(part.start().block(), self.ticks());
        (true, 0)
    }

    /// The first device that has room for so many pages.
    fn roomy_device(&self, pages: usize) -> Option<DeviceId> {
        let mut found = None;
        self.devices.for_each(|entry| {
            let room = entry.frees_ram() && entry.pgmap().is_some_and(|map| map.free() as usize >= pages);
            if found.is_none() && room {
                found = Some(entry.id());
            }
        });
        found
    }

    /// The next part of a block with memory that may move; the walk goes past it. `None` at the end of a round, or where
    /// the process has so many mappings that registering more could keep it from making its own.
    pub(crate) fn next_part(&self, walk: &mut Walk, look: Look) -> Option<PageRange> {
        loop {
            let at = &mut walk.at;
            let vma: Vma = match self.os.vma(*at) {
                Ok(Some(vma)) => vma,
                Ok(None) | Err(_) => {
                    *walk = Walk { at: VirtAddr::new(0), mappings: 0, last_mappings: walk.mappings };
                    return None;
                }
            };
            if *at <= vma.range.start() {
                walk.mappings += 1;
            }
            let crowded = walk.mappings.max(walk.last_mappings) > self.max_mappings / 2;
            let start = (*at).max(vma.range.start());
            let rest = PageRange::from_ends(start, vma.range.end());
            match rest {
                Ok(rest) if is_for_policies(&vma) && !crowded => {
                    let start = match look {
                        Look::Used => self.os.first_page(rest).unwrap_or(Some(start)),
                        Look::All => Some(start),
                    };
                    let Some(start) = start else {
                        *at = rest.end();
                        continue;
                    };
                    let rest = PageRange::from_ends(start, rest.end()).expect("the page lies in it");
                    let part = rest.intersection(PageRange::block_of(start)).expect("the block holds its address");
                    *at = part.end();
                    return Some(part);
                }
                _ => *at = vma.range.end(),
            }
        }
    }

    /// Writes the pages of a block out that have stood in staging since `since` or longer. Returns how many went.
    fn write_out(&'static self, at: VirtAddr, since: u32) -> u64 {
        let Some(block) = self.blocks.find(at) else { return 0 };
        let mut out = 0;
        for device in (0..u8::try_from(DeviceId::MAX).expect("few")).map(DeviceId) {
            let rest = self.staged(block, since);
            if rest.is_empty() {
                break;
            }
            if !self.devices.get(device).is_some_and(Entry::frees_ram) {
                continue;
            }
            out += self.push_staged(block, device, &rest, Why::Cold) as u64;
        }
        out
    }

    fn staged(&self, block: Block, since: u32) -> PageSet {
        (0..uhmm_sys::addr::BLOCK_PAGES)
            .filter(|&i| matches!(block.word(i).place(), Place::Staged { exclusive: None, .. }))
            .filter(|&i| !block.was_set_aside_after(i, since))
            .collect()
    }
}
