//! What happened, how often, how long it took, and why: counters, latency histograms, causes.
//!
//! Everything here is a set of atomics in memory that the caller provides, so that it costs a few nanoseconds on the
//! fault path, and so that a parent process can read the figures of a child that was killed.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// Why a page is where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Why {
    /// It was never moved.
    Untouched,
    /// A CPU thread touched it.
    CpuFault,
    /// It came along with a page that a CPU thread touched.
    FaultAround,
    /// The program or driver asked for it (`migrate`, `prefetch`).
    Asked,
    /// A device touched it.
    DeviceFault,
    /// It was cold, and memory was to be kept below a limit.
    Cold,
    /// Its device was full or is being removed.
    Evicted,
    /// A device took it for exclusive access.
    Exclusive,
    /// The process forked.
    Fork,
    /// A move was undone.
    RolledBack,
    /// A stress thread moved it.
    Stress,
    /// The program discarded its content.
    Discarded,
}

const WHY: [Why; 12] = [
    Why::Untouched,
    Why::CpuFault,
    Why::FaultAround,
    Why::Asked,
    Why::DeviceFault,
    Why::Cold,
    Why::Evicted,
    Why::Exclusive,
    Why::Fork,
    Why::RolledBack,
    Why::Stress,
    Why::Discarded,
];

impl Why {
    #[expect(clippy::cast_possible_truncation, reason = "there are twelve causes")]
    pub(crate) fn bits(self) -> u32 {
        WHY.iter().position(|&w| w == self).expect("every cause is in the table") as u32
    }

    /// Whether the program or a device asked for it, rather than a policy.
    pub(crate) fn is_asked(self) -> bool {
        matches!(self, Self::Asked | Self::DeviceFault | Self::Exclusive)
    }

    pub(crate) fn from_bits(bits: u32) -> Self {
        WHY[bits as usize % WHY.len()]
    }

    /// A short word for output.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Untouched => "untouched",
            Self::CpuFault => "cpu-fault",
            Self::FaultAround => "fault-around",
            Self::Asked => "asked",
            Self::DeviceFault => "device-fault",
            Self::Cold => "cold",
            Self::Evicted => "evicted",
            Self::Exclusive => "exclusive",
            Self::Fork => "fork",
            Self::RolledBack => "rolled-back",
            Self::Stress => "stress",
            Self::Discarded => "discarded",
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])* $name:ident = $word:literal),* $(,)?) => {
        /// Something that is counted.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Counter { $($(#[doc = $doc])* $name),* }

        impl Counter {
            /// Every counter, in the order in which they are stored.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// Its name in output and JSON.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word),* }
            }
        }
    };
}

counters! {
    /// Pages moved out of the program into staging.
    PagesStaged = "pages_staged",
    /// Pages whose bytes went to a device.
    PagesOut = "pages_out",
    /// Pages that came home from a device.
    PagesHome = "pages_home",
    /// Pages that came home from staging, without a copy.
    PagesHomeStaged = "pages_home_staged",
    /// Whole 2 MiB folios that went to a device in one piece.
    FoliosOut = "folios_out",
    /// Whole 2 MiB folios that came home in one piece.
    FoliosHome = "folios_home",
    /// CPU faults on pages that were away.
    FaultsHome = "faults_home",
    /// CPU faults on pages never touched before in a managed range.
    FaultsZero = "faults_zero",
    /// CPU faults that met a page in transit.
    FaultsWaited = "faults_waited",
    /// CPU faults that waited for reclaim to make room.
    FaultsParked = "faults_parked",
    /// CPU faults for which nothing was left to do.
    FaultsStale = "faults_stale",
    /// Device faults.
    DeviceFaults = "device_faults",
    /// Events read: fork, remap, remove, unmap.
    Events = "events",
    /// Pages dropped because the program unmapped or discarded them.
    PagesDropped = "pages_dropped",
    /// Times the kernel refused because an event was pending.
    RetriesEvent = "retries_event",
    /// Pages skipped: pinned for I/O.
    SkippedPinned = "skipped_pinned",
    /// Pages skipped: shared with another process.
    SkippedShared = "skipped_shared",
    /// Pages skipped: in transit elsewhere.
    SkippedBusy = "skipped_busy",
    /// Pages skipped: the device had no room.
    SkippedFull = "skipped_full",
    /// Pages skipped: came home a short while ago.
    SkippedHot = "skipped_hot",
    /// Pages skipped for another reason.
    SkippedOther = "skipped_other",
    /// Blocks that went back to native faults because nothing of them is away.
    BlocksReleased = "blocks_released",
    /// Device reads that were made to exercise the mirror.
    DeviceReads = "device_reads",
    /// Device atomics.
    DeviceAtomics = "device_atomics",
    /// Forks seen.
    Forks = "forks",
    /// Processes that came under management.
    Processes = "processes",
    /// Pages whose bytes were lost with a device.
    PagesPoisoned = "pages_poisoned",
    /// Pages of coherent device memory that were mapped for the CPU.
    PagesMapped = "pages_mapped",
    /// CPU faults on pages of coherent device memory that were not mapped.
    FaultsMapped = "faults_mapped",
}

/// Buckets of a latency histogram: eight to each power of two, from 1 ns to about 18 minutes.
pub const BUCKETS: usize = 320;
/// Words of memory that [`Stats`] needs.
pub const STATS_WORDS: usize = Counter::ALL.len() + 2 * BUCKETS;

/// Counters and the histogram of the time from a fault's being read to its being served, and of device faults.
#[derive(Debug, Clone, Copy)]
pub struct Stats {
    words: &'static [AtomicU64],
}

/// Which histogram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Latency {
    /// From a CPU fault's being read to its being served.
    FaultHome = 0,
    /// From a device fault's being raised to its being served.
    DeviceFault = 1,
}

impl Stats {
    /// Keeps figures in `words`, which are zero or hold earlier figures to be added to.
    ///
    /// # Panics
    /// If there are fewer than [`STATS_WORDS`] words.
    #[must_use]
    pub fn new(words: &'static [AtomicU64]) -> Self {
        assert!(words.len() >= STATS_WORDS, "too few words for the figures");
        Self { words }
    }

    /// Adds `n` to `counter`.
    pub fn add(&self, counter: Counter, n: usize) {
        if n != 0 {
            self.words[counter as usize].fetch_add(n as u64, Relaxed);
        }
    }

    /// The value of `counter`.
    #[must_use]
    pub fn get(&self, counter: Counter) -> u64 {
        self.words[counter as usize].load(Relaxed)
    }

    /// Records one duration.
    pub fn record(&self, latency: Latency, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).max(1);
        self.words[Self::bucket_word(latency, bucket(ns))].fetch_add(1, Relaxed);
    }

    /// The duration below which `permille` thousandths of what was recorded lie, or `None` where nothing was.
    #[must_use]
    pub fn quantile(&self, latency: Latency, permille: u64) -> Option<Duration> {
        let count = |b| self.words[Self::bucket_word(latency, b)].load(Relaxed);
        let total: u64 = (0..BUCKETS).map(count).sum();
        if total == 0 {
            return None;
        }
        let rank = (total * permille).div_ceil(1000).max(1);
        let mut seen = 0;
        (0..BUCKETS)
            .find(|&b| {
                seen += count(b);
                seen >= rank
            })
            .map(|b| Duration::from_nanos(bucket_end(b)))
    }

    const fn bucket_word(latency: Latency, bucket: usize) -> usize {
        Counter::ALL.len() + latency as usize * BUCKETS + bucket
    }
}

fn bucket(ns: u64) -> usize {
    if ns < 8 {
        return usize::try_from(ns).expect("below 8");
    }
    let exponent = ns.ilog2();
    let within = (ns >> (exponent - 3)) & 7;
    ((exponent as usize - 2) * 8 + within as usize).min(BUCKETS - 1)
}

fn bucket_end(bucket: usize) -> u64 {
    if bucket < 8 {
        return bucket as u64;
    }
    let (exponent, within) = (bucket / 8 + 2, bucket % 8);
    ((8 + within as u64 + 1) << (exponent - 3)) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats() -> Stats {
        let words: Vec<AtomicU64> = (0..STATS_WORDS).map(|_| AtomicU64::new(0)).collect();
        Stats::new(Vec::leak(words))
    }

    #[test]
    fn every_cause_survives_packing() {
        for why in WHY {
            assert_eq!(Why::from_bits(why.bits()), why);
        }
    }

    #[test]
    fn quantiles_are_within_an_eighth() {
        let stats = stats();
        for ns in 1..=10_000u64 {
            stats.record(Latency::FaultHome, Duration::from_nanos(ns));
        }
        for (permille, exact) in [(500, 5_000u64), (990, 9_900), (1000, 10_000)] {
            let got = u64::try_from(stats.quantile(Latency::FaultHome, permille).unwrap().as_nanos()).unwrap();
            assert!(got >= exact && got <= exact + exact / 8 + 1, "{permille}: {got} for {exact}");
        }
        assert_eq!(stats.quantile(Latency::DeviceFault, 500), None);
    }

    #[test]
    fn buckets_cover_without_gaps() {
        let mut last = 0;
        for b in 1..BUCKETS {
            assert_eq!(bucket(bucket_end(b)), b);
            assert_eq!(bucket(last + 1), b);
            last = bucket_end(b);
        }
    }
}
