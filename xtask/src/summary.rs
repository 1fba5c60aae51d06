//! Counts of tests, read from what libtest prints.

use std::{collections::BTreeMap, fmt, ops::AddAssign};

/// How many tests passed, failed and were skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Ran and held.
    pub passed: u64,
    /// Ran and did not hold, or never came to an end.
    pub failed: u64,
    /// Could not run here and said so.
    pub skipped: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// What a log of test binaries says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Sums over all binaries.
    pub counts: Counts,
    /// Tests that skipped themselves, and why.
    pub skipped: BTreeMap<String, String>,
}

/// Reads the output of `cargo test -- --show-output`.
///
/// libtest knows no skipping at run time: a test that cannot run here prints a line that begins with "skip" and returns,
/// and libtest counts it as passed. It is counted as skipped here.
pub fn read(log: &str) -> Summary {
    let mut summary = Summary::default();
    let mut current: Option<String> = None;
    let mut skipped_here = 0;
    for line in log.lines() {
        if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            current = Some(name.to_owned());
        } else if let Some(rest) = line.strip_prefix("test result: ") {
            let mut counts = result_line(rest);
            counts.passed = counts.passed.saturating_sub(skipped_here);
            counts.skipped += skipped_here;
            summary.counts += counts;
            (current, skipped_here) = (None, 0);
        } else if let Some(counts) = closing_line(line) {
            summary.counts += counts;
        } else if line == "failures:" || line == "successes:" {
            current = None;
        } else if line.get(..4).is_some_and(|word| word.eq_ignore_ascii_case("skip")) {
            // One test, one skip, whatever else it prints.
            if let Some(name) = current.take() {
                skipped_here += 1;
                summary.skipped.insert(name, line.to_owned());
            }
        }
    }
    summary
}

/// `3 passed, 0 failed, 1 skipped`
fn closing_line(line: &str) -> Option<Counts> {
    let mut parts = line.split(", ");
    let mut count = |word: &str| parts.next()?.strip_suffix(word)?.trim().parse().ok();
    Some(Counts { passed: count("passed")?, failed: count("failed")?, skipped: count("skipped")? })
}

/// `ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s`
fn result_line(rest: &str) -> Counts {
    let count = |word: &str| {
        rest.split([';', '.']).find_map(|part| part.trim().strip_suffix(word)?.trim().parse().ok()).unwrap_or(0)
    };
    Counts { passed: count("passed"), failed: count("failed"), skipped: count("ignored") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
running 3 tests
test a ... ok

successes:

---- needs_root stdout ----
skipped: needs root
skipped: really

---- talks stdout ----
it does not skip anything

successes:
    needs_root

test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s

running 1 test
test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s
";

    #[test]
    fn a_test_that_skips_itself_is_not_counted_as_passed() {
        let summary = read(LOG);
        assert_eq!(summary.counts, Counts { passed: 2, failed: 1, skipped: 2 });
        assert_eq!(summary.skipped.len(), 1);
        assert_eq!(summary.skipped["needs_root"], "skipped: needs root");
    }

    #[test]
    fn a_log_without_results_counts_nothing() {
        assert_eq!(read("error: could not compile"), Summary::default());
    }
}
