//! Who holds which frames, in a family of processes that share devices after forks.
//!
//! A process that ends has no time to give its frames back: it is killed, calls `_exit`, or executes another program. So
//! each process of a family is a *member*, with a claim that ends with the process, and for each device a *ledger* in
//! shared memory: a bit for each frame that the member has a reference to. Whoever finds a member's claim gone gives its
//! references back.
//!
//! ```text
//!        fork prepared: claimed                     its end: no claim         somebody sweeps
//!  free ------------------------> taken (claimed) ---------------------> taken ---------------> free
//!    ^                              |
//!    +------------------------------+ the fork failed, or nothing was away
//! ```
//!
//! The claim is a lock that belongs to an open file (see [`EngineFile::claim`]), made before the fork and handed to the child: it
//! has it from its first instant on.
//!
//! A bit is set after the reference is taken and cleared before it is put. So a process that dies between the two loses
//! a reference, a run of one allocation's at most, and never is one put twice.

use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Release},
};

use uhmm_sys::{Errno, arena, files::EngineFile, mem};

use crate::device::{DevPfn, FrameRun};

/// Most processes of a family that live at once; more bring everything home when they fork.
pub(crate) const MEMBERS: usize = 64;

const FREE: u32 = 0;
const TAKEN: u32 = 1;
/// In the hands of whoever makes it, or looks whether it lives.
const HELD: u32 = 2;

/// A process of a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Member(usize);

/// The members' places.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Family {
    words: &'static [AtomicU32],
    claims: &'static EngineFile,
}

impl Family {
    /// A family of one, which is returned. To be called with the engine's files.
    ///
    /// # Errors
    /// `ENOMEM`; `EMFILE`, `ENFILE`.
    pub(crate) fn new() -> Result<(Self, Member), Errno> {
        let claims = arena::value(EngineFile::empty(c"uhmm-family")?)?;
        let family = Self { words: mem::shared_slice(MEMBERS)?, claims };
        claims.claim(0)?;
        family.words[0].store(TAKEN, Release);
        Ok((family, Member(0)))
    }

    /// What tells which members live.
    pub(crate) const fn claims(&self) -> &'static EngineFile {
        self.claims
    }

    /// A place for a child that is about to be forked by the calling thread. `None`: there are too many members, or the claim
    /// cannot be handed over. The caller ends what was handed over in any case ([`EngineFile::end_fork`]).
    pub(crate) fn conceive(&self, engine_thread: u32) -> Option<Member> {
        self.claims.hand_over(engine_thread).ok()?;
        self.words.iter().enumerate().find_map(|(n, word)| {
            word.compare_exchange(FREE, HELD, AcqRel, Acquire).ok()?;
            // Where a process forked but never was a member, a copy of the claim may last a moment longer.
            let claimed = self.claims.claim_for_child(n as u64).is_ok();
            word.store(if claimed { TAKEN } else { FREE }, Release);
            claimed.then_some(Member(n))
        })
    }

    /// Gives the place of a child back that holds no frames.
    pub(crate) fn release(&self, member: Member) {
        self.words[member.0].store(FREE, Release);
    }

    /// Calls `f` for each dead member, to give its frames back; its place is free then. `me` is the caller's.
    ///
    /// # Locking
    /// To be called with the engine's files.
    pub(crate) fn bury(&self, me: Member, mut f: impl FnMut(Member)) {
        for (n, word) in self.words.iter().enumerate() {
            // Held first: where it is swept by somebody else meanwhile, and taken anew, this would be about another.
            if n == me.0 || word.compare_exchange(TAKEN, HELD, AcqRel, Acquire).is_err() {
                continue;
            }
            let dead = self.claims.is_claimed(n as u64) == Ok(false);
            if dead {
                f(Member(n));
            }
            word.store(if dead { FREE } else { TAKEN }, Release);
        }
    }

    /// Whether others than `member` live, or have.
    pub(crate) fn has_others(&self, member: Member) -> bool {
        self.words.iter().enumerate().any(|(n, word)| n != member.0 && word.load(Acquire) != FREE)
    }
}

/// For one device, the frames that each member has a reference to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ledger {
    bits: &'static [AtomicU64],
    /// Words of each member.
    words: usize,
}

impl Ledger {
    /// For `frames` frames, in memory that forked children share. What is never used is never committed.
    pub(crate) fn new(frames: u32) -> Result<Self, Errno> {
        let words = frames.div_ceil(64) as usize;
        Ok(Self { bits: mem::shared_slice(MEMBERS * words)?, words })
    }

    /// `member` has taken a reference to each of `frames`.
    pub(crate) fn note(&self, member: Member, frames: FrameRun) {
        for (word, mask) in self.parts(member, frames) {
            word.fetch_or(mask, AcqRel);
        }
    }

    /// `member` is about to put a reference of each of `frames`.
    ///
    /// # Panics
    /// If it has none: some page has two frames, or a frame two pages.
    pub(crate) fn strike(&self, member: Member, frames: FrameRun) {
        for (word, mask) in self.parts(member, frames) {
            let had = word.fetch_and(!mask, AcqRel);
            assert_eq!(had & mask, mask, "{member:?} puts references to {frames:?} that it does not have");
        }
    }

    /// Takes all frames of a dead member out, by runs.
    pub(crate) fn clear(&self, member: Member, mut f: impl FnMut(FrameRun)) {
        for (n, word) in self.of(member).iter().enumerate() {
            each_run(n, word.swap(0, AcqRel), &mut f);
        }
    }

    /// An empty set of frames: a bit for each.
    pub(crate) fn set(&self) -> Result<&'static [AtomicU64], Errno> {
        arena::slice(self.words)
    }

    /// Calls `f` for the frames that `member` has a reference to and that are not in `named`, by runs: a bit for each frame.
    pub(crate) fn others(&self, member: Member, named: &[AtomicU64], mut f: impl FnMut(FrameRun)) {
        for (n, (word, named)) in self.of(member).iter().zip(named).enumerate() {
            each_run(n, word.load(Acquire) & !named.load(Acquire), &mut f);
        }
    }

    /// Whether `member` has a reference to a frame.
    pub(crate) fn has(&self, member: Member, pfn: DevPfn) -> bool {
        let pfn = pfn.get() as usize;
        self.of(member)[pfn / 64].load(Acquire) >> (pfn % 64) & 1 != 0
    }

    /// Whether `member` has none.
    pub(crate) fn is_empty(&self, member: Member) -> bool {
        self.of(member).iter().all(|word| word.load(Acquire) == 0)
    }

    fn of(&self, member: Member) -> &'static [AtomicU64] {
        &self.bits[member.0 * self.words..][..self.words]
    }

    /// The words that hold the bits of `frames`, and which bits.
    fn parts(&self, member: Member, frames: FrameRun) -> impl Iterator<Item = (&'static AtomicU64, u64)> {
        let words = self.of(member);
        let end = frames.first.get() + frames.count;
        let mut at = frames.first.get();
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let count = (end - at).min(64 - at % 64);
                let part = (&words[at as usize / 64], ones(count) << (at % 64));
                at += count;
                part
            })
        })
    }
}

/// Calls `f` for each run of ones in word number `n`.
fn each_run(n: usize, mut bits: u64, f: &mut impl FnMut(FrameRun)) {
    while bits != 0 {
        let at = bits.trailing_zeros();
        let count = (bits >> at).trailing_ones();
        bits &= !(ones(count) << at);
        let first = u32::try_from(n * 64).expect("frames are counted in 32 bits") + at;
        f(FrameRun { first: DevPfn::new(first), count });
    }
}

/// So many ones, at most 64.
const fn ones(count: u32) -> u64 {
    if count == 64 { u64::MAX } else { (1 << count) - 1 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_ledger_is_a_set_of_frames_for_each_member(
            steps in proptest::collection::vec((0usize..3, 0u32..300, 1u32..200), 1..40)
        ) {
            let ledger = Ledger::new(500).unwrap();
            let mut model = vec![std::collections::BTreeSet::new(); 3];
            for (member, first, count) in steps {
                let count = count.min(500 - first);
                ledger.note(Member(member), FrameRun { first: DevPfn::new(first), count });
                model[member].extend(first..first + count);
                let cut = FrameRun { first: DevPfn::new(first), count: count.div_ceil(2) };
                ledger.strike(Member(member), cut);
                (first..first + cut.count).for_each(|pfn| assert!(model[member].remove(&pfn)));
            }
            for (member, model) in model.iter().enumerate() {
                let named: Vec<_> = (0..8).map(|n| AtomicU64::new(0x5555_5555_0000_ffff << n)).collect();
                let is_named = |pfn: u32| named[pfn as usize / 64].load(Acquire) >> (pfn % 64) & 1 != 0;
                let mut others = std::collections::BTreeSet::new();
                ledger.others(Member(member), &named, |run| others.extend(run.first.get()..run.first.get() + run.count));
                prop_assert_eq!(others, model.iter().copied().filter(|&pfn| !is_named(pfn)).collect());
                (0..500).for_each(|pfn| assert_eq!(ledger.has(Member(member), DevPfn::new(pfn)), model.contains(&pfn)));
                prop_assert_eq!(ledger.is_empty(Member(member)), model.is_empty());
                let mut found = std::collections::BTreeSet::new();
                ledger.clear(Member(member), |run| found.extend(run.first.get()..run.first.get() + run.count));
                prop_assert_eq!(&found, model);
                ledger.clear(Member(member), |run| panic!("{run:?} is there still"));
            }
        }
    }

    #[test]
    #[should_panic(expected = "does not have")]
    fn what_is_not_held_cannot_be_put() {
        let ledger = Ledger::new(64).unwrap();
        ledger.note(Member(1), FrameRun { first: DevPfn::new(3), count: 2 });
        ledger.strike(Member(1), FrameRun { first: DevPfn::new(3), count: 3 });
    }

    #[test]
    fn places_are_few_and_used_again() {
        let me = uhmm_sys::thread::gettid();
        arena::init(64 << 20).unwrap();
        let (family, first) = Family::new().unwrap();
        assert!(!family.has_others(first));
        // Each claim stays, as if a child had it.
        let others: Vec<Member> = (1..MEMBERS).map(|_| family.conceive(me).unwrap()).collect();
        let last = others[MEMBERS - 2];
        family.claims().end_fork();
        family.release(last);
        assert_eq!(family.conceive(me), Some(last));
        assert_eq!(family.conceive(me), None);
        assert!(family.has_others(first));
    }

    #[test]
    fn who_has_no_claim_any_more_is_dead() {
        arena::init(64 << 20).unwrap();
        let (family, first) = Family::new().unwrap();
        let child = family.conceive(uhmm_sys::thread::gettid()).unwrap();
        family.bury(first, |member| panic!("{member:?} lives"));
        assert!(family.has_others(first));
        family.claims().end_fork();
        let mut dead = Vec::new();
        family.bury(first, |member| dead.push(member));
        assert_eq!(dead, [child]);
        assert!(!family.has_others(first));
        family.bury(first, |member| panic!("{member:?} is buried"));
    }
}
