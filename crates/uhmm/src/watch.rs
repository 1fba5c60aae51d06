//! A driver's own interval notifiers on the address space.
//!
//! The engine keeps each device's page table in step by itself. A driver that keeps translations elsewhere (in hardware,
//! in a descriptor ring) subscribes to the ranges it uses.

use thiserror::Error;
use uhmm_sys::{Errno, addr::PageRange, arena};

use crate::{
    engine::NOTIFIER_WAIT,
    job::{OpsRef, Reply, Request},
    mm::Mm,
    notifier::{InsertError, IntervalOps, ReadSeq, Retry, Subscription, UpdateGuard},
    sync::TimedOut,
};

impl Mm {
    /// Subscribes to the invalidations of `range`: `ops` hears of each translation of it that goes away, before it does.
    /// Ranges may overlap, nest and be the same. `ops` is moved to where the engine may use it at any time, and never
    /// dropped.
    ///
    /// # Errors
    /// [`SubscribeError`].
    ///
    /// # Kernel
    /// `mm/mmu_notifier.c: mmu_interval_notifier_insert()`.
    pub fn subscribe<T: IntervalOps + 'static>(&self, range: PageRange, ops: T) -> Result<Watch, SubscribeError> {
        let ops: &'static T = arena::value(ops).map_err(SubscribeError::Memory)?;
        match self.core.call(Request::Subscribe { range, ops: OpsRef(ops) }, |_, reply| reply) {
            Reply::Subscribed(subscription) => Ok(Watch { mm: self.clone(), subscription }),
            Reply::NotSubscribed(error) => Err(SubscribeError::Refused(error)),
            Reply::Failed(errno) => Err(SubscribeError::Memory(errno)),
            reply => unreachable!("{reply:?} is no answer to a subscription"),
        }
    }
}

/// Why a range could not be subscribed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SubscribeError {
    /// See [`InsertError`].
    #[error(transparent)]
    Refused(#[from] InsertError),
    /// The engine's own memory could not be had.
    #[error("the engine has no memory for the subscription: {0}")]
    Memory(Errno),
}

/// A subscription to the invalidations of a range, with the sequence protocol of [`crate::notifier`].
#[derive(Debug)]
pub struct Watch {
    mm: Mm,
    subscription: &'static Subscription,
}

impl Watch {
    /// The range subscribed to.
    #[must_use]
    pub fn range(&self) -> PageRange {
        self.subscription.range()
    }

    /// Begins a snapshot: waits while an invalidation that overlaps the range runs, or a change of it that was announced
    /// ([`Mm::changing`]) is not over.
    ///
    /// # Errors
    /// [`TimedOut`], if one does not end in ten seconds.
    pub fn read_begin(&self) -> Result<ReadSeq, TimedOut> {
        self.mm.core.begin_look(self.subscription, self.range(), NOTIFIER_WAIT)
    }

    /// Whether the snapshot is known to be out of date; a hint to stop early.
    #[must_use]
    pub fn read_retry(&self, seq: ReadSeq) -> bool {
        self.mm.core.notifiers.read_retry(self.subscription, seq)
    }

    /// Ends a snapshot: gives the right to use it, unless an invalidation has come in since [`Watch::read_begin`].
    ///
    /// # Errors
    /// [`Retry`]: begin again.
    ///
    /// # Locking
    /// While the guard lives invalidations of the range wait, and with them fault handlers: touch no managed memory.
    pub fn commit(&self, seq: ReadSeq) -> Result<UpdateGuard<'_>, Retry> {
        self.mm.core.notifiers.commit(self.subscription, seq)
    }

    /// Ends the subscription. When it returns, no callback runs or will run.
    ///
    /// # Errors
    /// [`TimedOut`], if a callback does not end in time; no new one begins.
    pub fn remove(self) -> Result<(), TimedOut> {
        match self.mm.core.call(Request::Unsubscribe { subscription: self.subscription }, |_, reply| reply) {
            Reply::TimedOut(error) => Err(error),
            _ => Ok(()),
        }
    }
}
