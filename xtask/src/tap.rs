//! Results of single cases, read from what a kernel selftest prints: the Test Anything Protocol, as `kselftest.h` and
//! `kselftest_harness.h` write it, and what two programs print instead.

/// How a case ended, worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// It did not hold, or it never came to an end.
    Fail,
    /// It could not run and said so.
    Skip,
    /// It held, or failed as its author expected.
    Pass,
}

impl Outcome {
    /// Its name in lists.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fail => "fail",
            Self::Skip => "skip",
            Self::Pass => "pass",
        }
    }

    /// The outcome of this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Fail, Self::Skip, Self::Pass].into_iter().find(|outcome| outcome.name() == name)
    }
}

/// One result line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// Its number, where cases have numbers.
    pub number: Option<u32>,
    /// Its name; for a case that is skipped without one, the reason.
    pub name: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it was skipped.
    pub reason: Option<String>,
}

/// Reads a line, where it is the result of a case.
pub fn case(line: &str) -> Option<Case> {
    let (passed, rest) = match line.strip_prefix("not ok ") {
        Some(rest) => (false, rest),
        None => (true, line.strip_prefix("ok ")?),
    };
    let (number, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let number = Some(number.parse().ok()?);
    let rest = rest.strip_prefix("- ").unwrap_or(rest).trim();
    // Of a case without a name, what follows the directive is all there is.
    let (name, directive) = rest.split_once("# ").map_or((rest, ""), |(name, directive)| (name.trim(), directive));
    let (outcome, reason) = match directive.split_once(' ').unwrap_or((directive, "")) {
        ("SKIP", reason) => (Outcome::Skip, Some(reason.trim().to_owned())),
        // Failed as expected.
        ("XFAIL", _) => (Outcome::Pass, None),
        _ if passed => (Outcome::Pass, None),
        _ => (Outcome::Fail, None),
    };
    let name = match name {
        "" => directive.split_once(' ').map_or(directive, |(_, text)| text.trim()),
        name => name,
    };
    Some(Case { number, name: name.to_owned(), outcome, reason })
}

/// Reads a line of `uffd-unit-tests` or of `khugepaged`, where it is the result of a case.
///
/// ```text
/// Testing move-pmd on anon... done
/// Collapse PTE table with single PTE entry present.... ESC[32mOK ESC[0m
/// ```
pub fn plain_case(line: &str) -> Option<Case> {
    // Progress is shown on one line.
    let line = line.rsplit('\r').next()?;
    let (name, outcome, rest) = if let Some(rest) = line.strip_prefix("Testing ") {
        let (name, rest) = rest.split_once("... ")?;
        let outcome = match rest.split(' ').next()? {
            "done" => Outcome::Pass,
            "skipped" => Outcome::Skip,
            _ => Outcome::Fail,
        };
        (name, outcome, rest)
    } else {
        let (name, rest) = line.strip_suffix("\x1b[0m")?.rsplit_once(" \x1b[")?;
        let (colour, rest) = rest.split_once('m')?;
        let outcome = match colour {
            "32" => Outcome::Pass,
            "33" => Outcome::Skip,
            _ => Outcome::Fail,
        };
        // One dot for each look at something that took its time.
        (name.trim_end_matches('.'), outcome, rest)
    };
    let reason = (outcome == Outcome::Skip).then(|| rest.to_owned());
    Some(Case { number: None, name: name.to_owned(), outcome, reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> (String, Outcome, Option<String>) {
        let case = case(line).unwrap_or_else(|| panic!("{line} is no result"));
        (case.name, case.outcome, case.reason)
    }

    #[test]
    fn results_of_the_harness() {
        assert_eq!(read("ok 1 hmm.private.migrate"), ("hmm.private.migrate".into(), Outcome::Pass, None));
        assert_eq!(read("not ok 12 hmm.private.migrate"), ("hmm.private.migrate".into(), Outcome::Fail, None));
        assert_eq!(
            read("ok 58 hmm2.coherent.snapshot # SKIP DEVICE_COHERENT not available"),
            ("hmm2.coherent.snapshot".into(), Outcome::Skip, Some("DEVICE_COHERENT not available".into()))
        );
    }

    #[test]
    fn results_of_plain_programs() {
        assert_eq!(read("ok 3 Huge page #1 is one"), ("Huge page #1 is one".into(), Outcome::Pass, None));
        assert_eq!(
            read("ok 7 # SKIP needs hugetlb"),
            ("needs hugetlb".into(), Outcome::Skip, Some("needs hugetlb".into()))
        );
        assert_eq!(read("ok 2 # XFAIL as expected"), ("as expected".into(), Outcome::Pass, None));
        assert_eq!(read("not ok 2 # error mmap failed"), ("mmap failed".into(), Outcome::Fail, None));
        assert_eq!(read("ok 1 - with a dash"), ("with a dash".into(), Outcome::Pass, None));
    }

    #[test]
    fn results_of_programs_that_do_not_speak_the_protocol() {
        let read = |line: &str| plain_case(line).map(|case| (case.name, case.outcome));
        assert_eq!(read("Testing move on anon... done"), Some(("move on anon".into(), Outcome::Pass)));
        assert_eq!(read("Testing move on anon... skipped [reason: no]"), Some(("move on anon".into(), Outcome::Skip)));
        assert_eq!(read("Testing move on anon... ERROR: UFFDIO_MOVE"), Some(("move on anon".into(), Outcome::Fail)));
        assert_eq!(read("Collapse..... \x1b[32mOK\x1b[0m"), Some(("Collapse".into(), Outcome::Pass)));
        assert_eq!(read("  1/2...\r  2/2... \x1b[31mFail\x1b[0m"), Some(("  2/2".into(), Outcome::Fail)));
        assert_eq!(read("Allocate... \x1b[33mSkip\x1b[0m"), Some(("Allocate".into(), Outcome::Skip)));
        assert_eq!(read("Run test: collapse_full (khugepaged:anon)"), None);
    }

    #[test]
    fn other_lines_are_no_results() {
        for line in ["# ok 1 x", "okay", "ok then", "TAP version 13", "", "not okay 1"] {
            assert_eq!(case(line), None, "{line}");
        }
    }
}
