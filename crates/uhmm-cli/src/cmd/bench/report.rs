//! What a measurement comes to: figures with their spread, and what they are held against.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The unit of a figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    #[serde(rename = "GB/s")]
    GigabytesPerSecond,
    #[serde(rename = "ns/page")]
    NanosPerPage,
    #[serde(rename = "ns")]
    Nanos,
    #[serde(rename = "us")]
    Micros,
}

impl Unit {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::GigabytesPerSecond => "GB/s",
            Self::NanosPerPage => "ns/page",
            Self::Nanos => "ns",
            Self::Micros => "us",
        }
    }

    /// The figure for `pages` pages of 4 KiB, or as many operations, in `took`.
    #[expect(clippy::cast_precision_loss, reason = "counts of pages are far below 2^52")]
    pub fn of(self, pages: usize, took: Duration) -> f64 {
        let (pages, ns) = (pages as f64, took.as_secs_f64() * 1e9);
        match self {
            Self::GigabytesPerSecond => pages * 4096.0 / ns,
            Self::NanosPerPage | Self::Nanos => ns / pages,
            Self::Micros => ns / pages / 1e3,
        }
    }
}

/// One figure for each round of a measurement.
#[derive(Debug, Clone, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    pub fn push(&mut self, figure: f64) {
        self.0.push(figure);
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }

    pub fn median(&self) -> f64 {
        let sorted = self.sorted();
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }

    /// The median of the rounds' ratios: what one round had to bear, the other of the same round had to bear too.
    fn ratio(&self, baseline: &Self) -> f64 {
        Self(self.0.iter().zip(&baseline.0).map(|(a, b)| a / b).collect()).median()
    }
}

/// What a ratio has to be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bar {
    AtLeast(f64),
    AtMost(f64),
}

impl Bar {
    fn is_met(self, ratio: f64) -> bool {
        match self {
            Self::AtLeast(bar) => ratio >= bar,
            Self::AtMost(bar) => ratio <= bar,
        }
    }
}

/// What a figure is held against: another one, measured in the same rounds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Against {
    pub what: String,
    pub value: f64,
    pub ratio: f64,
    pub bar: Option<Bar>,
    pub met: Option<bool>,
}

/// One line of the table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    pub name: String,
    pub what: String,
    pub unit: Unit,
    /// The median over the rounds; `None` where it could not be measured, for the reason in `note`.
    pub value: Option<f64>,
    pub min: Option<f64>,
    pub max: Option<f64>,
    pub rounds: usize,
    /// The 99th percentile of single operations, where they were timed one by one; `value` is then their median.
    pub p99: Option<f64>,
    pub against: Option<Against>,
    pub note: Option<String>,
}

impl Row {
    pub fn new(name: &str, what: &str, unit: Unit, samples: &Samples) -> Self {
        let sorted = samples.sorted();
        Self {
            name: name.into(),
            what: what.into(),
            unit,
            value: Some(samples.median()),
            min: sorted.first().copied(),
            max: sorted.last().copied(),
            rounds: sorted.len(),
            p99: None,
            against: None,
            note: None,
        }
    }

    /// The latencies of single operations.
    pub fn latency(name: &str, what: &str, rounds: &Latencies) -> Self {
        Self { p99: Some(rounds.p99.median()), ..Self::new(name, what, Unit::Micros, &rounds.p50) }
    }

    /// Something that cannot be measured here.
    pub fn absent(name: &str, what: &str, unit: Unit, why: impl Into<String>) -> Self {
        Self {
            value: None,
            min: None,
            max: None,
            rounds: 0,
            note: Some(why.into()),
            ..Self::new(name, what, unit, &Samples::default())
        }
    }

    pub fn against(mut self, what: &str, samples: &Samples, baseline: &Samples, bar: Option<Bar>) -> Self {
        let ratio = samples.ratio(baseline);
        let met = bar.map(|bar| bar.is_met(ratio));
        self.against = Some(Against { what: what.into(), value: baseline.median(), ratio, bar, met });
        self
    }

    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.note = Some(note.into());
        self
    }
}

/// Percentiles of single operations, round by round, in microseconds.
#[derive(Debug, Clone, Default)]
pub struct Latencies {
    pub p50: Samples,
    pub p99: Samples,
}

impl Latencies {
    /// Adds a round of single latencies in nanoseconds.
    ///
    /// # Panics
    /// If the round is empty.
    #[expect(clippy::cast_precision_loss, reason = "latencies are far below 2^52 ns")]
    pub fn push(&mut self, mut round: Vec<u64>) {
        round.sort_unstable();
        let at = |permille: usize| round[(round.len() * permille / 1000).min(round.len() - 1)] as f64 / 1e3;
        self.p50.push(at(500));
        self.p99.push(at(990));
    }
}

/// How long `work` takes.
pub fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// How long `work` takes, or why it could not be done.
pub fn try_timed<E>(work: impl FnOnce() -> Result<(), E>) -> Result<Duration, E> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

/// A fixed pseudo-random order of `0..n`, another one for each seed.
pub fn shuffled(n: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    let mut state = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    for i in (1..n).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let j = usize::try_from((state >> 33) % (i as u64 + 1)).expect("below n");
        order.swap(i, j);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(figures: &[f64]) -> Samples {
        Samples(figures.to_vec())
    }

    #[test]
    fn a_ratio_is_taken_round_by_round() {
        let (fast, slow) = (samples(&[10.0, 5.0, 8.0]), samples(&[20.0, 10.0, 16.0]));
        let row = Row::new("x", "x", Unit::GigabytesPerSecond, &fast);
        let against = row.clone().against("y", &fast, &slow, Some(Bar::AtLeast(0.5))).against.unwrap();
        assert_eq!((against.ratio, against.value, against.met), (0.5, 16.0, Some(true)));
        let missed = row.against("y", &fast, &slow, Some(Bar::AtMost(0.4))).against.unwrap();
        assert_eq!(missed.met, Some(false));
    }

    #[test]
    fn units_mean_what_they_say() {
        let took = Duration::from_micros(100);
        assert!((Unit::GigabytesPerSecond.of(256, took) - 10.485_76).abs() < 1e-9);
        assert!((Unit::NanosPerPage.of(100, took) - 1000.0).abs() < 1e-9);
        assert!((Unit::Micros.of(100, took) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn percentiles_are_of_the_round() {
        let mut latencies = Latencies::default();
        latencies.push((1..=1000).rev().map(|n| n * 1000).collect());
        assert_eq!((latencies.p50.median(), latencies.p99.median()), (501.0, 991.0));
    }

    #[test]
    fn an_order_is_a_permutation() {
        let mut order = shuffled(1000, 7);
        assert_ne!(order, shuffled(1000, 8));
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
    }
}
