//! The kernel's other memory management tests, by themselves and under `uhmm run --stress`: what passes must still pass.
//!
//! The programs are the kernel's, from the same package as [`crate::hmm_tests`]. They look at memory harder than other
//! programs do: at page tables, residency, huge pages. Where uhmm cannot hide that pages move, a case is in
//! `xtask/expected/mm-selftests.txt`, with the reason.

use std::{
    collections::HashMap,
    ffi::OsString,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    contained::{Contained, End, Ran},
    kernel_source::{self, Built, KernelSource, Program},
    packages, process, programs, root,
    summary::Counts,
    tap::{self, Case, Outcome},
    target_dir,
    temp::TempDir,
};

/// What to run.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Only programs whose name or arguments contain this.
    #[arg(long)]
    only: Option<String>,
    /// How often under uhmm, each time with another seed.
    #[arg(long, default_value_t = 1)]
    rounds: u64,
    /// The first round's seed of the stress threads.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How much longer calls that change memory take, before and after, so that pages move between a test's steps.
    #[arg(long, default_value_t = 500)]
    slow_us: u32,
    /// Have uhmm treat `UFFDIO_MOVE` as missing, as on a kernel before 6.8.
    #[arg(long)]
    no_move: bool,
}

/// The longest that one run may take.
const LIMIT: Duration = Duration::from_secs(300);

/// One run of a program.
struct Test {
    program: &'static str,
    args: &'static str,
    /// Huge pages that there are meanwhile.
    huge_pages: u32,
    /// Other settings of the machine meanwhile.
    settings: &'static [(&'static str, &'static str)],
    swap_mib: u64,
    /// Whether its calls may take longer: not where there are too many of them.
    pace: Pace,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pace {
    MaySlow,
    AsItIs,
}

const fn test(program: &'static str, args: &'static str) -> Test {
    Test { program, args, huge_pages: 0, settings: &[], swap_mib: 0, pace: Pace::MaySlow }
}

const fn huge(program: &'static str, args: &'static str, huge_pages: u32) -> Test {
    Test { huge_pages, ..test(program, args) }
}

/// What is run, with the arguments and settings of the kernel's own `run_vmtests.sh`.
const TESTS: &[Test] = &[
    test("compaction_test", ""),
    Test { huge_pages: 16, swap_mib: 256, ..test("cow", "") },
    test("droppable", ""),
    huge("gup_longterm", "", 16),
    huge("hugepage-mmap", "", 128),
    huge("hugepage-mremap", "", 128),
    Test {
        settings: &[("/proc/sys/kernel/shmmax", "268435456"), ("/proc/sys/kernel/shmall", "4194304")],
        ..huge("hugepage-shm", "", 128)
    },
    huge("hugepage-vmemmap", "", 128),
    huge("hugetlb-madvise", "", 128),
    huge("hugetlb_dio", "", 128),
    Test { pace: Pace::AsItIs, ..huge("hugetlb_fault_after_madv", "", 1) },
    huge("hugetlb_madv_vs_map", "", 1),
    test("khugepaged", ""),
    test("khugepaged", "-s 2"),
    test("ksm_functional_tests", ""),
    test("ksm_tests", "-M -p 10"),
    test("ksm_tests", "-U"),
    test("ksm_tests", "-Z -p 10 -z 0"),
    test("ksm_tests", "-Z -p 10 -z 1"),
    test("ksm_tests", "-P -s 100"),
    test("ksm_tests", "-H -s 100"),
    test("madv_populate", ""),
    test("map_fixed_noreplace", ""),
    huge("map_hugetlb", "", 128),
    test("map_populate", ""),
    test("mdwe_test", ""),
    test("memfd_secret", ""),
    test("migration", ""),
    test("mkdirty", ""),
    test("mlock-random-test", ""),
    test("mlock2-tests", ""),
    test("mrelease_test", ""),
    test("mremap_dontunmap", ""),
    test("mremap_test", ""),
    test("mseal_test", ""),
    test("on-fault-limit", ""),
    huge("pagemap_ioctl", "", 16),
    test("protection_keys", ""),
    test("seal_elf", ""),
    test("soft-dirty", ""),
    test("split_huge_page_test", ""),
    huge("thuge-gen", "", 16),
    Test { pace: Pace::AsItIs, ..test("transhuge-stress", "-d 20") },
    Test { pace: Pace::AsItIs, ..huge("uffd-unit-tests", "", 128) },
    Test { pace: Pace::AsItIs, ..test("uffd-stress", "anon 20 16") },
    Test { pace: Pace::AsItIs, ..huge("uffd-stress", "hugetlb 128 32", 128) },
    Test { pace: Pace::AsItIs, ..huge("uffd-stress", "hugetlb-private 128 32", 128) },
    Test { pace: Pace::AsItIs, ..test("uffd-stress", "shmem 20 16") },
    Test { pace: Pace::AsItIs, ..test("uffd-stress", "shmem-private 20 16") },
    test("va_high_addr_switch", ""),
    Test {
        pace: Pace::AsItIs,
        settings: &[("/proc/sys/vm/overcommit_memory", "1")],
        ..test("virtual_address_range", "")
    },
];

/// Programs of the kernel that are not run, and why.
const LEFT_OUT: &[(&str, &str)] = &[
    ("gup_test", "needs the kernel's gup_test module, which distributions do not build"),
    ("hmm-tests", "has a command of its own"),
    ("hugetlb-read-hwpoison, hugetlb-soft-offline", "take memory from the machine until it is started anew"),
    ("pkey_sighandler_tests", "uses the processor's protection keys without asking for them"),
    ("write_to_hugetlbfs", "is a part of other tests"),
];

/// Headers and what is to be installed for them.
const HEADERS: &[(&str, &str)] =
    &[("sys/capability.h", "libcap-dev"), ("numa.h", "libnuma-dev"), ("liburing.h", "liburing-dev")];

impl Test {
    fn title(&self) -> String {
        format!("{} {}", self.program, self.args).trim_end().to_owned()
    }

    fn build(&self, source: &KernelSource) -> Result<Built> {
        const COMMON: &[&str] = &["vm_util.c", "thp_settings.c"];
        const USERFAULT: &[&str] = &["vm_util.c", "thp_settings.c", "uffd-common.c"];
        let mut program = Program { name: self.program, with: COMMON, flags: &["-no-pie"], libs: &[] };
        match self.program {
            "cow" | "gup_longterm" if has_header("liburing.h") => {
                program.flags = &["-no-pie", "-DLOCAL_CONFIG_HAVE_LIBURING"];
                program.libs = &["-luring"];
            }
            // It forgets to include what it uses.
            "khugepaged" => program.flags = &["-no-pie", "-include", "../kselftest.h"],
            "ksm_tests" | "migration" => program.libs = &["-lnuma"],
            "memfd_secret" | "mlock-random-test" => program.libs = &["-lcap"],
            "protection_keys" => program.flags = &["-no-pie", "-mxsave"],
            "uffd-stress" | "uffd-unit-tests" => program.with = USERFAULT,
            _ => {}
        }
        source.build(&program)
    }
}

fn has_header(name: &str) -> bool {
    Path::new("/usr/include").join(name).exists()
}

/// Runs the tests; prints a line for each and the sum last.
///
/// # Errors
/// The run itself could not go on; a test that does worse under uhmm is no error but `false`.
pub fn run(options: &Options) -> Result<bool> {
    let Some(source) = kernel_source::get_or_skip()? else { return Ok(true) };
    let only = options.only.as_deref().unwrap_or_default();
    let tests: Vec<_> = TESTS.iter().filter(|test| test.title().contains(only)).collect();
    ensure!(!tests.is_empty(), "no test has {only:?} in its name");
    let allowed = parse_allowed(ALLOWED)?;
    let wanted: Vec<_> =
        HEADERS.iter().filter(|(header, _)| !has_header(header)).map(|(_, package)| *package).collect();
    if !wanted.is_empty() && process::is_root() {
        packages::install(&wanted);
    }
    let scratch = TempDir::new("mm-selftests")?;
    let runner = Runner {
        options: options.clone(),
        uhmm: programs::build()?,
        slow: build_slow(scratch.path())?,
        logs: target_dir()?.join("test-logs/mm-selftests"),
    };
    fs::create_dir_all(&runner.logs).with_context(|| runner.logs.display().to_string())?;

    let mut sum = Counts::default();
    println!("tests of {}; cases that passed/failed/were skipped", source.version());
    for test in tests {
        sum += one_test(&runner, test, &source, &allowed)?;
    }
    if only.is_empty() {
        LEFT_OUT.iter().for_each(|(name, reason)| println!("left out {name}: {reason}"));
    }
    println!("All that the programs printed is in {}", runner.logs.display());
    println!("{sum}");
    Ok(sum.failed == 0)
}

/// Runs one test by itself and then under uhmm, and prints a line for each.
fn one_test(runner: &Runner, test: &Test, source: &KernelSource, allowed: &[Allowed]) -> Result<Counts> {
    let title = test.title();
    let skipped = |reason: &str| {
        println!("skipped {title:34} {reason}");
        Counts { skipped: 1, ..Counts::default() }
    };
    if !process::is_root() && (test.huge_pages > 0 || test.swap_mib > 0 || !test.settings.is_empty()) {
        return Ok(skipped("needs root, for settings of the machine"));
    }
    let binary = match test.build(source)? {
        Built::There(binary) => binary,
        Built::Failed(complaint) => return Ok(skipped(&format!("does not build: {complaint}"))),
    };
    let native = runner.run(test, &binary, None)?;
    if native.end != End::Exit(0) && native.passed() == 0 {
        let last = native.lines.iter().rev().find(|line| !line.starts_with('#') && !line.is_empty());
        return Ok(skipped(&format!("by itself: {}, {}", native.end, last.map_or("", |line| line.trim()))));
    }
    if !native.cases.is_empty() && native.passed() == 0 {
        let reason = native.cases.iter().find_map(|(_, case)| case.reason.as_deref()).unwrap_or("no case passes");
        return Ok(skipped(&format!("by itself: {reason}")));
    }
    println!("        {title:34} native   {native}");
    let mut counts = Counts::default();
    for seed in runner.options.seed..runner.options.seed + runner.options.rounds {
        let stress = runner.run(test, &binary, Some(seed))?;
        let worse = worse(&native, &stress);
        let (known, new): (Vec<_>, Vec<_>) =
            worse.iter().partition(|what| allowed.iter().any(|entry| entry.covers(&title, what, &stress)));
        let word = match (new.is_empty(), known.is_empty()) {
            (true, true) => "ok",
            (true, false) => "known",
            (false, _) => "FAILED",
        };
        println!("{word:8}{title:34} stress   {stress}, seed {seed}");
        for what in &new {
            println!("        {what}");
        }
        if !known.is_empty() {
            println!("        {} as in the list of what may differ", known.len());
        }
        if new.is_empty() { counts.passed += 1 } else { counts.failed += 1 }
    }
    Ok(counts)
}

/// What all runs share.
struct Runner {
    options: Options,
    uhmm: PathBuf,
    slow: PathBuf,
    logs: PathBuf,
}

impl Runner {
    /// Runs a test, under uhmm if there is a seed.
    fn run(&self, test: &Test, binary: &Path, seed: Option<u64>) -> Result<Outputs> {
        let dir = TempDir::new("mm-selftest")?;
        let mut command: Vec<OsString> = Vec::new();
        let mut add = |words: &[&str]| command.extend(words.iter().map(OsString::from));
        if process::is_root() && process::on_path("unshare") {
            // What a test mounts, or leaves in shared memory, goes with its name space.
            let script = "mount -t debugfs none /sys/kernel/debug 2>/dev/null; exec \"$@\"";
            add(&["unshare", "--mount", "--ipc", "--", "sh", "-c", script, "sh"]);
        }
        if let Some(seed) = seed {
            let uhmm = self.uhmm.to_str().context("the path of uhmm is not UTF-8")?;
            add(&[
                uhmm,
                "run",
                "--from-start",
                &format!("--stress={seed}"),
                "--stats=json",
                "--device",
                "soft:1G",
                "--",
            ]);
        }
        let mut env = Vec::new();
        if self.options.slow_us > 0 && test.pace == Pace::MaySlow {
            // Before uhmm's library, so that no call takes longer inside of it.
            add(&["sh", "-c", "LD_PRELOAD=$SLOW${LD_PRELOAD:+:$LD_PRELOAD} exec \"$@\"", "sh"]);
            env.push(("SLOW", self.slow.clone().into_os_string()));
            env.push(("SLOW_US", self.options.slow_us.to_string().into()));
        }
        if self.options.no_move && seed.is_some() {
            env.push(("UHMM_MASK", "move".into()));
        }
        command.push(binary.into());
        command.extend(test.args.split_whitespace().map(OsString::from));

        let mut settings: Vec<(PathBuf, String)> =
            test.settings.iter().map(|(path, value)| (path.into(), (*value).to_owned())).collect();
        if test.huge_pages > 0 {
            settings.push(("/proc/sys/vm/nr_hugepages".into(), test.huge_pages.to_string()));
        }
        let contained =
            Contained { command, dir: dir.path().to_owned(), env, settings, limit: LIMIT, swap_mib: test.swap_mib };
        let mut lines = Vec::new();
        let ran = contained.run(&mut |line| lines.push(line.to_owned()))?;
        let mode = seed.map_or_else(|| "native".to_owned(), |seed| format!("stress-{seed}"));
        let log = self.logs.join(format!("{}.{mode}.log", test.title().replace(' ', "_")));
        fs::write(&log, lines.join("\n") + "\n").with_context(|| log.display().to_string())?;
        Ok(Outputs::new(ran, lines))
    }
}

/// Builds the library that makes calls slower.
fn build_slow(dir: &Path) -> Result<PathBuf> {
    let library = dir.join("slow.so");
    let output = Command::new("gcc")
        .args(["-O2", "-shared", "-fPIC", "-fno-builtin", "-o"])
        .arg(&library)
        .arg(root().join("xtask/programs/slow.c"))
        .output()
        .context("gcc")?;
    ensure!(output.status.success(), "slow.c: {}", String::from_utf8_lossy(&output.stderr));
    Ok(library)
}

/// What a program did and printed.
struct Outputs {
    end: End,
    took: Duration,
    lines: Vec<String>,
    cases: Vec<(Key, Case)>,
    /// What went out to devices, where uhmm told.
    out_kib: Option<u64>,
}

/// Names a case of a program: its number or its name, and how many there were of that before.
type Key = (String, usize);

impl Outputs {
    fn new(ran: Ran, lines: Vec<String>) -> Self {
        let mut seen: HashMap<String, usize> = HashMap::new();
        let mut cases = Vec::new();
        for case in lines.iter().filter_map(|line| tap::case(line).or_else(|| tap::plain_case(line))) {
            let word = case.number.map_or_else(|| case.name.clone(), |number| number.to_string());
            let nth = seen.entry(word.clone()).or_default();
            cases.push(((word, *nth), case));
            *nth += 1;
        }
        let figures: Vec<u64> = lines.iter().filter_map(|line| programs::bytes_out(line)).collect();
        let out_kib = (!figures.is_empty()).then(|| figures.iter().sum::<u64>() >> 10);
        Self { end: ran.end, took: ran.took, lines, cases, out_kib }
    }

    fn count(&self, outcome: Outcome) -> usize {
        self.cases.iter().filter(|(_, case)| case.outcome == outcome).count()
    }

    fn passed(&self) -> usize {
        self.count(Outcome::Pass)
    }
}

impl std::fmt::Display for Outputs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut cases = String::from("-");
        if !self.cases.is_empty() {
            cases.clear();
            write!(cases, "{}/{}/{}", self.passed(), self.count(Outcome::Fail), self.count(Outcome::Skip))?;
        }
        write!(f, "{cases:>12} {:9} {:6.1} s", self.end.to_string(), self.took.as_secs_f64())?;
        match self.out_kib {
            Some(kib) => write!(f, ", {kib} KiB out"),
            None => Ok(()),
        }
    }
}

/// Something that went well by itself and did not under uhmm.
#[derive(Debug, PartialEq, Eq)]
enum Worse {
    /// This case passed.
    Case { name: String, now: Outcome },
    /// These had no result at all, the first of which was this one.
    Missing { first: String, count: usize },
    /// The exit status was 0.
    End(String),
}

impl std::fmt::Display for Worse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Case { name, now } => write!(f, "{name}: {}", now.name()),
            Self::Missing { first, count } => write!(f, "{first}: no result; {count} cases have none"),
            Self::End(end) => write!(f, "{end}"),
        }
    }
}

/// Compares case by case.
fn worse(native: &Outputs, stress: &Outputs) -> Vec<Worse> {
    let results: HashMap<&Key, &Case> = stress.cases.iter().map(|(key, case)| (key, case)).collect();
    let mut found = Vec::new();
    let mut missing = Vec::new();
    for (key, case) in native.cases.iter().filter(|(_, case)| case.outcome == Outcome::Pass) {
        match results.get(key) {
            Some(now) if now.outcome == Outcome::Pass => {}
            Some(now) => found.push(Worse::Case { name: case.name.clone(), now: now.outcome }),
            None => missing.push(&case.name),
        }
    }
    if let Some(first) = missing.first() {
        found.push(Worse::Missing { first: (*first).clone(), count: missing.len() });
    }
    if native.end != stress.end && (native.end == End::Exit(0) || !matches!(stress.end, End::Exit(_))) {
        found.push(Worse::End(stress.end.to_string()));
    }
    found
}

const ALLOWED: &str = include_str!("../expected/mm-selftests.txt");

/// A line of the list of what may differ.
#[derive(Debug)]
struct Allowed {
    title: &'static str,
    what: What,
}

#[derive(Debug)]
enum What {
    /// A case of this name; where it ends with `*`, of a name that begins so. The exit status may tell of it.
    Case(&'static str),
    /// Any cases and the exit status, where the program prints a line with this.
    Says(&'static str),
}

impl Allowed {
    fn covers(&self, title: &str, worse: &Worse, stress: &Outputs) -> bool {
        if self.title != title {
            return false;
        }
        match (&self.what, worse) {
            (What::Case(pattern), Worse::Case { name, .. }) => matches(pattern, name),
            // The case is among those that failed here.
            (What::Case(pattern), Worse::End(end)) => {
                end.starts_with("exit")
                    && stress
                        .cases
                        .iter()
                        .any(|(_, case)| case.outcome != Outcome::Pass && matches(pattern, &case.name))
            }
            (What::Says(text), _) => stress.lines.iter().any(|line| line.contains(text)),
            (What::Case(_), Worse::Missing { .. }) => false,
        }
    }
}

fn matches(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |begin| name.starts_with(begin))
}

/// Reads `TITLE | case NAME | REASON` and `TITLE | says TEXT | REASON` lines.
fn parse_allowed(text: &'static str) -> Result<Vec<Allowed>> {
    let mut list = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let parts: Vec<_> = line.split(" | ").map(str::trim).collect();
        let [title, what, reason] = parts[..] else { bail!("line {}: three parts are wanted", number + 1) };
        ensure!(TESTS.iter().any(|test| test.title() == title), "line {}: there is no test {title}", number + 1);
        ensure!(!reason.is_empty(), "line {}: a reason is wanted", number + 1);
        let what = match what.split_once(' ') {
            Some(("case", name)) => What::Case(name),
            Some(("says", text)) => What::Says(text),
            _ => bail!("line {}: `case` or `says` is wanted", number + 1),
        };
        list.push(Allowed { title, what });
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outputs(status: i32, lines: &[&str]) -> Outputs {
        let ran = Ran { end: End::Exit(status), left: 0, took: Duration::from_secs(1) };
        Outputs::new(ran, lines.iter().map(|&line| line.to_owned()).collect())
    }

    #[test]
    fn only_what_passed_by_itself_is_compared() {
        let native = outputs(0, &["ok 1 a", "not ok 2 b", "ok 3 # SKIP c", "ok 4 d", "ok 5 e"]);
        let stress = outputs(0, &["ok 1 a changed name", "ok 3 c", "not ok 4 d"]);
        assert_eq!(
            worse(&native, &stress),
            [Worse::Case { name: "d".into(), now: Outcome::Fail }, Worse::Missing { first: "e".into(), count: 1 },]
        );
        assert_eq!(worse(&native, &native), []);
    }

    #[test]
    fn the_exit_status_is_compared() {
        assert_eq!(worse(&outputs(0, &[]), &outputs(3, &[])), [Worse::End("exit 3".into())]);
        // It failed already.
        assert_eq!(worse(&outputs(1, &[]), &outputs(3, &[])), []);
    }

    #[test]
    fn cases_without_numbers_are_told_apart_by_their_order() {
        let native = outputs(0, &["Testing x on y... done", "Testing x on y... done"]);
        let stress = outputs(0, &["Testing x on y... done", "Testing x on y... failed [reason: z]"]);
        assert_eq!(worse(&native, &stress), [Worse::Case { name: "x on y".into(), now: Outcome::Fail }]);
    }

    #[test]
    fn the_list_of_what_may_differ_is_readable() {
        parse_allowed(ALLOWED).unwrap();
        for wrong in ["cow | case x", "nothing | case x | y", "cow | x | y", "cow | case x | "] {
            assert!(parse_allowed(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_may_differ_is_covered_and_nothing_else() {
        let list = parse_allowed("cow | case a* | because\nmseal_test | says it is gone | because").unwrap();
        let covers = |title: &str, worse: &Worse, lines: &[&str]| {
            list.iter().any(|entry| entry.covers(title, worse, &outputs(1, lines)))
        };
        let case = |name: &str| Worse::Case { name: name.into(), now: Outcome::Fail };
        assert!(covers("cow", &case("abc"), &[]) && !covers("cow", &case("b"), &[]));
        assert!(!covers("mseal_test", &case("abc"), &[]));
        assert!(covers("mseal_test", &case("abc"), &["# it is gone!"]));
        let end = Worse::End("exit 1".into());
        assert!(covers("cow", &end, &["not ok 1 abc"]) && !covers("cow", &end, &["not ok 1 b", "ok 2 abc"]));
        assert!(!covers("cow", &Worse::End("signal 11".into()), &["not ok 1 abc"]));
        let missing = Worse::Missing { first: "abc".into(), count: 1 };
        assert!(!covers("cow", &missing, &["not ok 1 abc"]) && covers("mseal_test", &missing, &["it is gone"]));
    }
}
