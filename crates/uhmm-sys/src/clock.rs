//! The time that all processes have in common.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since some moment, the same for all processes of the machine. Stands still while that sleeps.
///
/// # Kernel
/// `clock_gettime(2)`, `CLOCK_MONOTONIC`.
#[must_use]
pub fn now_ns() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    // Neither is negative, and the sum wraps in 584 years.
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn it_goes_as_fast_as_the_standard_librarys() {
        let (start, before) = (Instant::now(), now_ns());
        std::thread::sleep(Duration::from_millis(20));
        let (after, took) = (now_ns(), start.elapsed());
        let gone = Duration::from_nanos(after - before);
        assert!(gone >= Duration::from_millis(20) && gone <= took, "{gone:?} of {took:?}");
    }
}
