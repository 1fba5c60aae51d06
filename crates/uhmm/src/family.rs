//! Who holds which frames, in a family of processes that share devices after forks.
//!
//! A process that ends has no time to give its frames back: it is killed, calls `_exit`, or executes another program. So
//! each process of a family is a *member*, with a word that the kernel marks when the member ends, and for each device a
//! *ledger* in shared memory: a bit for each frame that the member has a reference to. Whoever finds a member dead gives
//! its references back.
//!
//! ```text
//!         fork prepared        the child has taken over        its end             somebody sweeps
//!  free --------------> unborn ------------------------> alive -------> dead ------------------> free
//!    ^                    |                                               (the kernel)
//!    +--------------------+ the fork failed, or nothing was away
//! ```
//!
//! A bit is set after the reference is taken and cleared before it is put. So a process that dies between the two loses
//! a reference, a run of one allocation's at most, and never is one put twice.
//!
//! # Not supported
//! A child that is killed before its engine runs, in its first milliseconds, stays unborn, and its frames stay in use until
//! the family has ended: nothing tells that it is not merely slow.

use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Release},
};

use uhmm_sys::{
    Errno, mem,
    robust::{self, OWNER_DIED, TID_MASK},
};

use crate::device::{DevPfn, FrameRun};

/// Most processes of a family that live at once; more bring everything home when they fork.
pub(crate) const MEMBERS: usize = 64;

const FREE: u32 = 0;
// No thread has one of these ids.
const UNBORN: u32 = TID_MASK;
const SWEPT: u32 = TID_MASK - 1;
/// Alive for all that is known: its engine's threads are libc's.
const UNWATCHED: u32 = TID_MASK - 2;

/// A process of a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Member(usize);

/// The members' words.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Family {
    words: &'static [AtomicU32],
}

impl Family {
    /// A family of one, which is returned.
    pub(crate) fn new() -> Result<(Self, Member), Errno> {
        let family = Self { words: mem::shared_slice(MEMBERS)? };
        family.words[0].store(UNWATCHED, Release);
        Ok((family, Member(0)))
    }

    /// Has the kernel mark `member`, which is this process, when it ends.
    ///
    /// # Errors
    /// `ENOMEM`: the arena is full. Then its end goes unnoticed.
    ///
    /// # Locking
    /// To be called on an engine thread that libc does not know, and that lives as long as the process.
    pub(crate) fn watch(&self, member: Member) -> Result<(), Errno> {
        robust::mark_at_death(&self.words[member.0])
    }

    /// A place for a child. `None`: there are too many members.
    pub(crate) fn conceive(&self) -> Option<Member> {
        self.find(FREE, UNBORN)
    }

    /// Gives the place of a child back that holds no frames.
    pub(crate) fn release(&self, member: Member) {
        self.words[member.0].store(FREE, Release);
    }

    /// A dead member. The caller gives its frames back, and then its place.
    pub(crate) fn bury(&self) -> Option<Member> {
        self.find(OWNER_DIED, SWEPT)
    }

    /// Whether others than `member` live, or have.
    pub(crate) fn has_others(&self, member: Member) -> bool {
        self.words.iter().enumerate().any(|(n, word)| n != member.0 && word.load(Acquire) != FREE)
    }

    fn find(&self, from: u32, to: u32) -> Option<Member> {
        self.words.iter().position(|word| word.compare_exchange(from, to, AcqRel, Acquire).is_ok()).map(Member)
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
            let mut bits = word.swap(0, AcqRel);
            while bits != 0 {
                let at = bits.trailing_zeros();
                let count = (bits >> at).trailing_ones();
                bits &= !(ones(count) << at);
                let first = u32::try_from(n * 64).expect("frames are counted in 32 bits") + at;
                f(FrameRun { first: DevPfn::new(first), count });
            }
        }
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
        let (family, first) = Family::new().unwrap();
        assert!(!family.has_others(first));
        let others: Vec<Member> = std::iter::from_fn(|| family.conceive()).collect();
        assert_eq!(others.len(), MEMBERS - 1);
        assert_eq!(family.bury(), None);
        family.release(others[7]);
        assert_eq!(family.conceive(), Some(others[7]));
        assert!(family.has_others(first));
    }
}
