//! Closures of the program on lanes: a kernel launch, for programs that link the engine.

use thiserror::Error;

use super::{Lane, SoftDevice};

/// Why a launch has no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RunError {
    /// The device is not started, or others have too many of its lanes.
    #[error("{wanted} lanes wanted, {free} to be had")]
    NoLanes {
        /// How many were asked for.
        wanted: usize,
        /// How many there were.
        free: usize,
    },
    /// A closure panicked. The others ran to their ends.
    #[error("lane {index} of the launch panicked")]
    Panicked {
        /// The index that the closure was given.
        index: usize,
    },
}

impl SoftDevice {
    /// Runs `kernel_fn` once on each of `lanes` lanes, each on a thread of its own, with the indices from 0 on; returns
    /// the results by index.
    ///
    /// The closures may touch the program's memory outside the lane's methods: they are ordinary threads, with ordinary
    /// stacks. Those must not be migrated while the lanes are in use.
    ///
    /// # Errors
    /// [`RunError`]. All threads have ended then, and their lanes are free.
    pub fn run<T: Send>(
        &'static self,
        lanes: usize,
        kernel_fn: impl Fn(&mut Lane, usize) -> T + Sync,
    ) -> Result<Vec<T>, RunError> {
        let claimed: Vec<Lane> = std::iter::from_fn(|| self.lane()).take(lanes).collect();
        if claimed.len() < lanes {
            return Err(RunError::NoLanes { wanted: lanes, free: claimed.len() });
        }
        let kernel_fn = &kernel_fn;
        std::thread::scope(|s| {
            let start = |(index, mut lane): (usize, Lane)| s.spawn(move || kernel_fn(&mut lane, index));
            let threads: Vec<_> = claimed.into_iter().enumerate().map(start).collect();
            let results: Vec<_> = threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
            let ended = results.into_iter().enumerate();
            ended.map(|(index, result)| result.map_err(|_| RunError::Panicked { index })).collect()
        })
    }
}
