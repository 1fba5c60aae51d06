//! The kernel's own HMM tests, `tools/testing/selftests/mm/hmm-tests.c`, on the preload library's device.
//!
//! The test program is the kernel's, not a byte of it changed; see [`crate::kernel_source`]. What each of its cases is to
//! do here is in `xtask/expected/hmm-tests.txt`. Under the witness (`crates/uhmm-witness`) a case also fails where pages are not
//! where the device says; the controls in `xtask/controls`, which have no device, must fail there. See `docs/hmm-tests.md`.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{
    contained::{Contained, End},
    kernel_source::{self, Built, Program},
    process, root,
    summary::Counts,
    tap::{self, Outcome},
    target_dir,
    temp::TempDir,
};

/// What to run.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Have uhmm treat `UFFDIO_MOVE` as missing, as on a kernel before 6.8.
    #[arg(long)]
    no_move: bool,
    /// Have the witness look where pages are; a case fails where that is not as the device says.
    #[arg(long)]
    witness: bool,
    /// Run a control instead of this tree's library: a device that has no memory. It must not pass more than it is known to.
    #[arg(long, value_enum, conflicts_with = "libs")]
    control: Option<Control>,
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

/// A library that serves nodes and has no device. Its source is in `xtask/controls`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
enum Control {
    /// Does nothing, and says that all went well.
    Null,
    /// Reads and writes pages where they are, and takes none away.
    InPlace,
}

impl Control {
    const fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::InPlace => "in_place",
        }
    }

    /// How many cases it passes at most: those in which no page moves, under the witness. Two more than usual where memory is
    /// unmapped soon enough in `anon_teardown` for its read to fail, as it may.
    const fn most_passed(self, witness: bool) -> u64 {
        match (self, witness) {
            (Self::Null, false) => 4,
            (Self::Null, true) => 2,
            (Self::InPlace, false) => 52,
            (Self::InPlace, true) => 12,
        }
    }

    fn build(self) -> Result<PathBuf> {
        let source = root().join("xtask/controls").join(self.name()).with_extension("c");
        let library = target_dir()?.join(format!("control-{}.so", self.name()));
        let mut gcc = Command::new("gcc");
        gcc.args(["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o"]).arg(&library).arg(source).arg("-ldl");
        ensure!(gcc.status().context("gcc")?.success(), "{} does not build", self.name());
        Ok(library)
    }
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
    /// What it is to do under the witness, if not the same.
    witnessed: Option<Outcome>,
    /// It skips where there are no huge pages.
    needs_huge_pages: bool,
    /// It fails where nobody says which frames pages are in.
    needs_frames: bool,
}

/// What the machine and the options allow.
#[derive(Debug, Clone, Copy)]
struct Allowed {
    huge_pages: bool,
    coherent: bool,
    frames: bool,
    witness: bool,
}

impl Expected {
    /// The least that the case is to do.
    fn least(&self, allowed: Allowed) -> Outcome {
        let skips =
            (self.needs_huge_pages && !allowed.huge_pages) || (self.name.contains("coherent") && !allowed.coherent);
        match self.witnessed {
            _ if skips => Outcome::Skip,
            _ if self.outcome != Outcome::Pass => self.outcome,
            _ if self.needs_frames && !allowed.frames => Outcome::Fail,
            Some(outcome) if allowed.witness => outcome,
            _ => Outcome::Pass,
        }
    }
}

const EXPECTED: &str = include_str!("../expected/hmm-tests.txt");

/// Remark on a case that cannot run without huge pages.
const NEEDS_HUGE_PAGES: &str = "needs huge pages";
/// Remark on a case that wants to know what can be written without a fault.
const NEEDS_FRAMES: &str = "needs /proc/kpageflags";

/// Runs the tests; prints what they print, what is not as expected, and the sum last.
///
/// # Errors
/// The run itself could not go on; a case that is worse than expected is no error but `false`.
pub fn run(options: &Options) -> Result<bool> {
    let Some(source) = kernel_source::get_or_skip()? else { return Ok(true) };
    let expected = parse_expected(EXPECTED)?;
    let only = options.only.as_deref().unwrap_or_default();
    let expected: Vec<_> = expected.into_iter().filter(|case| case.name.contains(only)).collect();
    ensure!(!expected.is_empty(), "no case has {only:?} in its name");

    let program = Program { name: "hmm-tests", with: &["vm_util.c"], flags: &[], libs: &[] };
    let binary = match source.build(&program)? {
        Built::There(binary) => binary,
        Built::Failed(complaint) => bail!("hmm-tests does not build: {complaint}"),
    };
    let mut libraries = match options.control {
        Some(control) => vec![control.build()?],
        None if options.libs.is_empty() => vec![build_library("uhmm-preload", "libuhmm_preload.so")?],
        None => options.libs.clone(),
    };
    if options.witness {
        libraries.insert(0, build_library("uhmm-witness", "libuhmm_witness.so")?);
    }
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
    if let Some(control) = options.control {
        return Ok(judge_control(control, options, sum));
    }
    if differences.is_empty() {
        println!("All cases are as expected.");
    } else {
        print!("Not as expected:\n{differences}");
    }
    println!("{sum}");
    Ok(sum.failed == 0)
}

/// Whether a control passed no more than it is known to.
fn judge_control(control: Control, options: &Options, sum: Counts) -> bool {
    let most = control.most_passed(options.witness) * u64::from(options.rounds);
    let (name, passed) = (control.name(), sum.passed);
    let is_right = passed <= most;
    println!("{name}, which has no device, passed {passed} cases; {most} are known to ask for none");
    println!("{}", Counts { passed: u64::from(is_right), failed: u64::from(!is_right), skipped: 0 });
    is_right
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
    let log = options.witness.then(|| TempDir::new("witness")).transpose()?;
    if let Some(log) = &log {
        contained.env.push(("UHMM_WITNESS_LOG", log.path().join("log").into()));
    }
    if options.no_move {
        contained.env.push(("UHMM_MASK", "move".into()));
    }
    let is_root = process::is_root();
    let allowed = Allowed {
        huge_pages: is_root,
        coherent: is_root && !options.no_move,
        frames: fs::File::open("/proc/kpageflags").is_ok(),
        witness: options.witness,
    };
    if allowed.huge_pages {
        contained.settings.push((HUGE_PAGES_SETTING.into(), huge_pages_wanted()?));
    }
    let mut cases = Vec::new();
    let ran = contained.run(&mut |line| {
        println!("{line}");
        cases.extend(tap::case(line));
    })?;
    println!("{} cases in {:.1} s", cases.len(), ran.took.as_secs_f64());
    let (mut counts, mut differ) = compare(expected, &cases, allowed);
    match ran.end {
        // Its own verdict on the cases, which are compared one by one.
        End::Exit(_) => {}
        End::TimedOut => differ.push(format!("killed after {} s", LIMIT.as_secs())),
        End::Signal(signal) => differ.push(format!("the test program ended by signal {signal}")),
    }
    if let Some(log) = &log
        && options.control.is_none()
        && options.only.is_none()
    {
        let text = fs::read_to_string(log.path().join("log")).unwrap_or_default();
        let failed = cases.iter().filter(|case| case.outcome == Outcome::Fail).count();
        let wrong = judge_witness(&text, failed)?;
        counts.failed += wrong.len() as u64;
        differ.extend(wrong);
    }
    if ran.left > 0 {
        differ.push(format!("{} processes were left running and were killed", ran.left));
    }
    Ok((counts, differ))
}

/// What is wrong with what the witness has seen, given its log and how many cases failed: it must have looked at pages, and a
/// process with violations must have failed a case, which one that its parent kills anyway does not.
fn judge_witness(log: &str, failed: usize) -> Result<Vec<String>> {
    const LOOKED_AT: [&str; 6] = ["moved", "exclusive", "read", "compared", "unmapped", "protected"];
    let lines: Vec<Value> = log.lines().map(serde_json::from_str).collect::<Result<_, _>>().context("witness's log")?;
    let sum = |figure: &str| lines.iter().filter_map(|line| line[figure].as_u64()).sum::<u64>();
    let figures: Vec<String> = LOOKED_AT.iter().map(|figure| format!("{figure} {}", sum(figure))).collect();
    println!("pages looked at by the witness: {}", figures.join(", "));
    let mut wrong: Vec<String> = LOOKED_AT
        .iter()
        .filter(|figure| sum(figure) == 0)
        .map(|figure| format!("the witness looked at nothing that was {figure}"))
        .collect();
    let violating = lines.iter().filter(|line| line["violations"].as_u64() != Some(0)).count();
    if violating > failed {
        wrong.push(format!("{violating} processes had violations, and {failed} cases failed"));
    }
    Ok(wrong)
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

fn build_library(package: &str, file: &str) -> Result<PathBuf> {
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "-p", package])
        .current_dir(root())
        .status()?;
    ensure!(status.success(), "the release build failed");
    Ok(target_dir()?.join("release").join(file))
}

/// Counts the cases, and names those that are not as expected. A case that is known to fail counts as skipped.
fn compare(expected: &[Expected], cases: &[tap::Case], allowed: Allowed) -> (Counts, Vec<String>) {
    let mut counts = Counts::default();
    let mut differ = Vec::new();
    for expectation in expected {
        let name = expectation.name;
        let Some(case) = cases.iter().find(|case| case.name == name) else {
            counts.failed += 1;
            differ.push(format!("{name}: no result"));
            continue;
        };
        let least = expectation.least(allowed);
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

/// Reads `NAME OUTCOME [REASON]` lines, and `witness NAME OUTCOME REASON` lines for cases that have one before.
fn parse_expected(text: &'static str) -> Result<Vec<Expected>> {
    let mut list: Vec<Expected> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        let (line, witnessed) = line.strip_prefix("witness ").map_or((line, false), |line| (line, true));
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
        if witnessed {
            let case = list.iter_mut().find(|case| case.name == name);
            case.with_context(|| format!("line {}: {name} is not there", number + 1))?.witnessed = Some(outcome);
            continue;
        }
        list.push(Expected {
            name,
            outcome,
            witnessed: None,
            needs_huge_pages: reason == NEEDS_HUGE_PAGES,
            needs_frames: reason == NEEDS_FRAMES,
        });
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

    const ALL: Allowed = Allowed { huge_pages: true, coherent: true, frames: true, witness: false };

    fn compared(cases: &[&str], huge_pages: bool) -> (Counts, Vec<String>) {
        let expected = parse_expected("a pass\nb skip no such device\nc fail not written yet\nd pass needs huge pages");
        let cases: Vec<_> = cases.iter().filter_map(|line| tap::case(line)).collect();
        compare(&expected.unwrap(), &cases, Allowed { huge_pages, ..ALL })
    }

    #[test]
    fn what_is_not_there_is_not_expected() {
        let list = parse_expected(
            "x.coherent.a pass\nx.private.b pass needs /proc/kpageflags\nwitness x.coherent.a fail not the CPU's\n",
        );
        let least =
            |allowed: Allowed| list.as_ref().unwrap().iter().map(|case| case.least(allowed)).collect::<Vec<_>>();
        assert_eq!(least(ALL), [Outcome::Pass, Outcome::Pass]);
        assert_eq!(least(Allowed { coherent: false, ..ALL }), [Outcome::Skip, Outcome::Pass]);
        assert_eq!(least(Allowed { frames: false, ..ALL }), [Outcome::Pass, Outcome::Fail]);
        assert_eq!(least(Allowed { witness: true, ..ALL }), [Outcome::Fail, Outcome::Pass]);
        assert!(parse_expected("witness a fail nobody knows it").is_err());
    }

    #[test]
    fn a_witness_must_have_seen_something() {
        let line = r#"{"moved":1,"exclusive":1,"read":1,"compared":1,"unmapped":1,"protected":1,"violations":N}"#;
        let log = |violations: &str| line.replace('N', violations);
        assert!(judge_witness(&log("0"), 0).unwrap().is_empty());
        assert_eq!(judge_witness("", 0).unwrap().len(), 6);
        assert!(judge_witness(&log("2"), 1).unwrap().is_empty());
        assert_eq!(judge_witness(&(log("2") + "\n" + &log("1")), 1).unwrap().len(), 1);
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
