//! Moves random memory of the program about, all the time: whatever can move may move at any moment, so a program
//! that gives the same result as ever shows that nobody can tell.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use uhmm_sys::addr::{PAGE_SIZE, PageRange, VirtAddr};

use crate::{
    device::DeviceId,
    engine::Core,
    migrate::{Holes, OtherDevices, Outcomes, Plan, ResidencyRule},
    os::Os,
    reclaim::{Look, Walk},
    trace::Why,
};

/// Accesses of devices that a stress thread makes between moves.
pub trait StressHooks: Sync {
    /// Lets a device read at `addr` and add zero to it atomically, or not, as `random` says. Failures are no errors: the
    /// address may be gone by now.
    ///
    /// # Locking
    /// Called on an engine thread that holds nothing.
    fn device_access(&self, addr: VirtAddr, random: u64);
}

/// The seed of the next stress thread.
static SEED: AtomicU64 = AtomicU64::new(0);
static HOOKS: Mutex<Option<&'static dyn StressHooks>> = Mutex::new(None);

pub(crate) fn configure(seed: u64, hooks: Option<&'static dyn StressHooks>) {
    SEED.store(seed, Relaxed);
    *HOOKS.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = hooks;
}

/// xorshift64*: small, seeded, good enough to choose pages.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`, which is not 0.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }
}

impl<O: Os> Core<O> {
    /// A stress thread's life.
    pub(crate) fn run_stress(&'static self) {
        let mut ctx = self.new_ctx();
        let mut random = Random::new(SEED.fetch_add(1, Relaxed));
        let mut walk = Walk::default();
        let mut rounds = 0u64;
        while self.stop.load(Relaxed) == 0 {
            self.wait_thawed();
            if rounds.is_multiple_of(16) {
                self.refresh_excluded(&mut ctx);
            }
            rounds += 1;
            // Walk on by a random number of parts: cheap, and every part has its turn.
            let mut part = None;
            for _ in 0..=random.below(8) {
                part = self.next_part(&mut walk, Look::All);
            }
            if let Some(part) = part {
                self.stress_once(&mut ctx, part, &mut random);
            }
            std::thread::sleep(Duration::from_micros(20 + random.below(400)));
        }
    }

    fn stress_once(&'static self, ctx: &mut crate::thread::Ctx, part: PageRange, random: &mut Random) {
        let pages = part.pages() as u64;
        let whole = random.below(4) == 0;
        let (first, count) = if whole {
            (0, pages)
        } else {
            let first = random.below(pages);
            (first, 1 + random.below((pages - first).min(64)))
        };
        let range = PageRange::new(part.start().add(first * PAGE_SIZE), count * PAGE_SIZE).expect("part of a part");
        let device = self.random_device(random);
        match random.below(10) {
            0..=5 => self.stress_out(ctx, range, device, random),
            6 => self.stress_out(ctx, range, None, random),
            7 | 8 => {
                self.range_home(ctx, range, Why::Stress, &mut |_, _| {});
            }
            _ => {}
        }
        let hooks = *HOOKS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(hooks) = hooks {
            let page = range.start().add(random.below(count) * PAGE_SIZE);
            // The engine's own memory is none of the device's business.
            let mut own = false;
            ctx.excluded.touching(PageRange::page_of(page), |_| own = true);
            if own {
                return;
            }
            hooks.device_access(page.add(random.below(PAGE_SIZE / 8) * 8), random.next());
        }
    }

    fn stress_out(
        &'static self,
        ctx: &mut crate::thread::Ctx,
        range: PageRange,
        to: Option<DeviceId>,
        random: &mut Random,
    ) {
        let plan = Plan {
            to,
            why: Why::Stress,
            holes: if random.below(4) == 0 { Holes::Zero } else { Holes::Skip },
            other_devices: if random.below(2) == 0 { OtherDevices::Fetch } else { OtherDevices::Leave },
            residency: ResidencyRule::Ignore,
            owner: None,
        };
        let mut outcomes = Outcomes::new();
        self.migrate_out(ctx, range, &plan, &mut outcomes);
    }

    fn random_device(&self, random: &mut Random) -> Option<DeviceId> {
        let mut live = [None; DeviceId::MAX];
        let mut n = 0;
        self.devices.for_each(|entry| {
            if entry.is_live() && entry.pgmap().is_some() {
                live[n] = Some(entry.id());
                n += 1;
            }
        });
        if n == 0 { None } else { live[usize::try_from(random.below(n as u64)).expect("few devices")] }
    }
}
