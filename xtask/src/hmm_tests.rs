//! The kernel's own HMM tests, `tools/testing/selftests/mm/hmm-tests.c`, on the preload library's device.
//!
//! The test program is the kernel's, not a byte of it changed; see [`crate::kernel_source`]. What each of its cases is to
//! do here is in `xtask/expected/hmm-tests.txt`.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    contained::{Contained, End},
    kernel_source::{self, Built, Lookup, Program},
    process, root,
    summary::Counts,
    tap::{self, Outcome},
    target_dir,
};

/// What to run.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Have uhmm treat `UFFDIO_MOVE` as missing, as on a kernel before 6.8.
    #[arg(long)]
    no_move: bool,
    /// A library to preload, instead of this tree's; may be repeated.
    #[arg(long = "lib", value_name = "PATH")]
    libs: Vec<PathBuf>,
    /// Only cases whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// How often.
    #[arg(long, default_value_t = 1)]
    rounds: u32,
}

/// The longest that one round may take. The test program itself ends a case after 30 s.
const LIMIT: Duration = Duration::from_secs(600);

/// Huge pages that the cases with hugetlb memory take, with some to spare.
const HUGE_PAGES: u64 = 8;

const HUGE_PAGES_SETTING: &str = "/proc/sys/vm/nr_hugepages";

/// What a case is to do.
#[derive(Debug, PartialEq, Eq)]
struct Expected {
    name: &'static str,
    outcome: Outcome,
    /// It skips where there are no huge pages.
    needs_huge_pages: bool,
}

const EXPECTED: &str = include_str!("../expected/hmm-tests.txt");

/// Remark on a case that cannot run without huge pages.
const NEEDS_HUGE_PAGES: &str = "needs huge pages";

/// Runs the tests; prints what they print, what is not as expected, and the sum last.
///
/// # Errors
/// The run itself could not go on; a case that is worse than expected is no error but `false`.
pub fn run(options: &Options) -> Result<bool> {
    let source = match kernel_source::ensure()? {
        Lookup::There(source) => source,
        Lookup::Missing(reason) => {
            println!("skipped: {reason}");
            println!("{}", Counts { skipped: 1, ..Counts::default() });
            return Ok(true);
        }
    };
    let expected = parse_expected(EXPECTED)?;
    let only = options.only.as_deref().unwrap_or_default();
    let expected: Vec<_> = expected.into_iter().filter(|case| case.name.contains(only)).collect();
    ensure!(!expected.is_empty(), "no case has {only:?} in its name");

    let program = Program { name: "hmm-tests", with: &["vm_util.c"], flags: &[], libs: &[] };
    let binary = match source.build(&program)? {
        Built::There(binary) => binary,
        Built::Failed(complaint) => bail!("hmm-tests does not build: {complaint}"),
    };
    let libraries = if options.libs.is_empty() { vec![build_library()?] } else { options.libs.clone() };
    println!("{} of {} on {}", program.name, source.version(), preload(&libraries)?);

    let mut sum = Counts::default();
    let mut differences = String::new();
    for round in 1..=options.rounds {
        if options.rounds > 1 {
            println!("round {round} of {}", options.rounds);
        }
        let (counts, differ) = one_round(options, &expected, &binary, &libraries)?;
        sum += counts;
        for difference in differ {
            writeln!(differences, "        round {round}: {difference}")?;
        }
    }
    if differences.is_empty() {
        println!("All cases are as expected.");
    } else {
        print!("Not as expected:\n{differences}");
    }
    println!("{sum}");
    Ok(sum.failed == 0)
}

/// Runs the cases once. Returns how many ended how, and what is not as expected.
fn one_round(
    options: &Options,
    expected: &[Expected],
    binary: &Path,
    libraries: &[PathBuf],
) -> Result<(Counts, Vec<String>)> {
    let mut contained = Contained {
        command: vec![binary.into()],
        env: vec![("LD_PRELOAD", preload(libraries)?.into())],
        limit: LIMIT,
        ..Contained::default()
    };
    if options.only.is_some() {
        contained.command.extend(expected.iter().flat_map(|case| ["-r".into(), case.name.into()]));
    }
    if options.no_move {
        contained.env.push(("UHMM_MASK", "move".into()));
    }
    let huge_pages = process::is_root();
    if huge_pages {
        contained.settings.push((HUGE_PAGES_SETTING.into(), huge_pages_wanted()?));
    }
    let mut cases = Vec::new();
    let ran = contained.run(&mut |line| {
        println!("{line}");
        cases.extend(tap::case(line));
    })?;
    println!("{} cases in {:.1} s", cases.len(), ran.took.as_secs_f64());
    let (counts, mut differ) = compare(expected, &cases, huge_pages);
    match ran.end {
        // Its own verdict on the cases, which are compared one by one.
        End::Exit(_) => {}
        End::TimedOut => differ.push(format!("killed after {} s", LIMIT.as_secs())),
        End::Signal(signal) => differ.push(format!("the test program ended by signal {signal}")),
    }
    if ran.left > 0 {
        differ.push(format!("{} processes were left running and were killed", ran.left));
    }
    Ok((counts, differ))
}

/// Huge pages for the time of the test: those that there are, if they are enough.
fn huge_pages_wanted() -> Result<String> {
    let now = fs::read_to_string(HUGE_PAGES_SETTING).context(HUGE_PAGES_SETTING)?;
    Ok(now.trim().parse::<u64>()?.max(HUGE_PAGES).to_string())
}

/// The value of `LD_PRELOAD`.
fn preload(libraries: &[PathBuf]) -> Result<String> {
    let mut paths = Vec::new();
    for library in libraries {
        let path = library.canonicalize().with_context(|| library.display().to_string())?;
        let path = path.to_str().context("a library's path is not UTF-8")?.to_owned();
        ensure!(!path.contains([':', ' ']), "{path}: LD_PRELOAD takes no path with `:` or a blank");
        paths.push(path);
    }
    Ok(paths.join(":"))
}

fn build_library() -> Result<PathBuf> {
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "-p", "uhmm-preload"])
        .current_dir(root())
        .status()?;
    ensure!(status.success(), "the release build failed");
    Ok(target_dir()?.join("release/libuhmm_preload.so"))
}

/// Counts the cases, and names those that are not as expected. A case that is known to fail counts as skipped.
fn compare(expected: &[Expected], cases: &[tap::Case], huge_pages: bool) -> (Counts, Vec<String>) {
    let mut counts = Counts::default();
    let mut differ = Vec::new();
    for expectation in expected {
        let name = expectation.name;
        let Some(case) = cases.iter().find(|case| case.name == name) else {
            counts.failed += 1;
            differ.push(format!("{name}: no result"));
            continue;
        };
        let least = match expectation.outcome {
            Outcome::Pass if expectation.needs_huge_pages && !huge_pages => Outcome::Skip,
            outcome => outcome,
        };
        match case.outcome {
            Outcome::Pass => counts.passed += 1,
            outcome if outcome >= least => counts.skipped += 1,
            _ => counts.failed += 1,
        }
        if case.outcome != least {
            let better = if case.outcome > least { ", better" } else { "" };
            let reason = case.reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
            differ.push(format!("{name}: {}{reason} instead of {}{better}", case.outcome.name(), least.name()));
        }
    }
    for case in cases.iter().filter(|case| expected.iter().all(|expectation| expectation.name != case.name)) {
        counts.failed += u64::from(case.outcome == Outcome::Fail);
        differ.push(format!("{}: {}, and it is not in the list", case.name, case.outcome.name()));
    }
    (counts, differ)
}

/// Reads `NAME OUTCOME [REASON]` lines.
fn parse_expected(text: &'static str) -> Result<Vec<Expected>> {
    let mut list = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut words = line.splitn(3, ' ');
        let (Some(name), Some(word)) = (words.next(), words.next()) else {
            bail!("line {}: a name and an outcome are wanted", number + 1);
        };
        let outcome = Outcome::named(word).with_context(|| format!("line {}: {word} is no outcome", number + 1))?;
        let reason = words.next().unwrap_or_default();
        ensure!(outcome == Outcome::Pass || !reason.is_empty(), "line {}: a reason is wanted", number + 1);
        list.push(Expected { name, outcome, needs_huge_pages: reason == NEEDS_HUGE_PAGES });
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_whole_and_names_each_case_once() {
        let list = parse_expected(EXPECTED).unwrap();
        assert_eq!(list.len(), 58);
        for (i, case) in list.iter().enumerate() {
            assert!(list[..i].iter().all(|other| other.name != case.name), "{} is there twice", case.name);
        }
    }

    #[test]
    fn what_does_not_pass_needs_a_reason() {
        assert!(parse_expected("a pass\n# remark\n\nb skip no such device").is_ok());
        for wrong in ["a", "a skip", "a perhaps so"] {
            assert!(parse_expected(wrong).is_err(), "{wrong}");
        }
    }

    fn compared(cases: &[&str], huge_pages: bool) -> (Counts, Vec<String>) {
        let expected = parse_expected("a pass\nb skip no such device\nc fail not written yet\nd pass needs huge pages");
        let cases: Vec<_> = cases.iter().filter_map(|line| tap::case(line)).collect();
        compare(&expected.unwrap(), &cases, huge_pages)
    }

    #[test]
    fn as_expected() {
        let cases = ["ok 1 a", "ok 2 b # SKIP no", "not ok 3 c", "ok 4 d"];
        assert_eq!(compared(&cases, true), (Counts { passed: 2, failed: 0, skipped: 2 }, vec![]));
        let cases = ["ok 1 a", "ok 2 b # SKIP no", "not ok 3 c", "ok 4 d # SKIP no"];
        assert_eq!(compared(&cases, false), (Counts { passed: 1, failed: 0, skipped: 3 }, vec![]));
    }

    #[test]
    fn what_is_worse_fails_and_what_is_better_is_told() {
        let (counts, differ) = compared(&["ok 1 a # SKIP tired", "ok 2 b", "ok 4 d # SKIP no"], true);
        assert_eq!(counts, Counts { passed: 1, failed: 3, skipped: 0 });
        assert_eq!(
            differ,
            [
                "a: skip (tired) instead of pass",
                "b: pass instead of skip, better",
                "c: no result",
                "d: skip (no) instead of pass",
            ]
        );
        assert_eq!(compared(&["not ok 9 new"], true).1.last().unwrap(), "new: fail, and it is not in the list");
    }
}
