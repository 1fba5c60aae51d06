//! The test command: everything that must hold, in one table of steps.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    kernel_source::{self, Lookup},
    packages,
    process::{self, Outcome},
    root,
    summary::{self, Counts, Summary},
    target_dir, tidy,
};

/// What to run.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Options {
    /// Only format, lints, house rules, tests and doctests, once.
    #[arg(long)]
    quick: bool,
    /// Run the tests with `UFFDIO_MOVE` masked off only, as on a kernel before 6.8.
    #[arg(long)]
    no_move: bool,
}

/// How a step ended.
enum Verdict {
    Ok,
    Failed(String),
    Skipped(String),
}

/// One thing that must hold.
struct Step {
    name: &'static str,
    applies: fn(&Options) -> bool,
    run: fn(&Setting, &Path) -> Result<Verdict>,
}

/// What the steps share.
struct Setting {
    options: Options,
    target: PathBuf,
    before: Vec<(&'static str, String)>,
}

/// All steps, in order. To add one, add a line: its log is read for `test result:` lines, which are summed up.
const STEPS: &[Step] = &[
    Step { name: "format", applies: always, run: format },
    Step { name: "lints", applies: always, run: lints },
    Step { name: "house rules", applies: always, run: house_rules },
    Step { name: "build", applies: always, run: build },
    Step { name: "tests", applies: |o| !o.no_move, run: tests },
    Step { name: "doctests", applies: always, run: doctests },
    Step { name: "loom", applies: full, run: loom },
    Step { name: "tests without UFFDIO_MOVE", applies: |o| o.no_move || !o.quick, run: tests_without_move },
    Step { name: "tests as nobody", applies: full, run: tests_as_nobody },
    Step { name: "real programs", applies: full, run: real_programs },
    Step { name: "kernel's hmm-tests", applies: full, run: hmm_tests },
    Step { name: "nothing left behind", applies: always, run: nothing_left_behind },
];

fn always(_: &Options) -> bool {
    true
}

fn full(options: &Options) -> bool {
    !options.quick
}

/// Runs the steps, prints a line for each and the sum of all test results last.
///
/// # Errors
/// The run itself could not go on; a step that does not hold is no error but `false`.
pub fn run(options: &Options) -> Result<bool> {
    let target = target_dir()?;
    let logs = target.join("test-logs");
    fs::create_dir_all(&logs).with_context(|| logs.display().to_string())?;
    let missing = packages::ensure();

    let setting = Setting { options: *options, target, before: machine_state() };
    let mut sum = Counts { skipped: missing.len() as u64, ..Counts::default() };
    let mut skipped_tests = 0;
    for (number, step) in STEPS.iter().enumerate() {
        if !(step.applies)(&setting.options) {
            continue;
        }
        let log = logs.join(format!("{:02}-{}.log", number + 1, step.name.replace(' ', "-")));
        fs::write(&log, "").with_context(|| log.display().to_string())?;
        let start = Instant::now();
        let verdict = (step.run)(&setting, &log).unwrap_or_else(|error| Verdict::Failed(format!("{error:#}")));
        let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        let Summary { mut counts, skipped } = summary::read(&text);
        skipped_tests += skipped.len();
        let mut line = String::new();
        let word = match &verdict {
            Verdict::Ok => "ok",
            Verdict::Failed(_) => {
                // A step that failed without a failed test did not compile, crashed or hung.
                counts.failed = counts.failed.max(1);
                "FAILED"
            }
            Verdict::Skipped(_) => {
                counts.skipped += 1;
                "skipped"
            }
        };
        write!(line, "{word:8}{:28}{:7.1} s", step.name, start.elapsed().as_secs_f64())?;
        if counts != Counts::default() {
            write!(line, "   {counts}")?;
        }
        if let Verdict::Skipped(reason) = &verdict {
            write!(line, ": {reason}")?;
        }
        println!("{line}");
        for (test, reason) in &skipped {
            println!("        {test}: {reason}");
        }
        if let Verdict::Failed(reason) = &verdict {
            println!("        {reason}; all of its output is in {}", log.display());
            println!("{}", excerpt(&text));
        }
        sum += counts;
    }
    if skipped_tests > 0 {
        println!("`cargo run -q -p uhmm-cli -- doctor` says what would let the skipped tests run.");
    }
    println!("{sum}");
    Ok(sum.failed == 0)
}

/// What a reader needs of a failed step's log: each failed test's own output and the errors, or else its end.
fn excerpt(log: &str) -> String {
    const LINES_MAX: usize = 200;
    let mut kept = Vec::new();
    let mut section = Vec::new();
    let mut inside = false;
    for line in log.lines() {
        if line == "failures:" && !inside {
            inside = true;
        }
        if inside {
            section.push(line);
        } else if line.starts_with("error") || line.contains("panicked at") || line.contains("(signal:") {
            kept.push(line);
        }
        if line.starts_with("test result: ") {
            kept.append(&mut section);
            inside = false;
        }
    }
    if kept.is_empty() {
        kept = log.lines().collect();
    }
    let from = kept.len().saturating_sub(LINES_MAX);
    kept[from..].join("\n")
}

fn minutes(n: u64) -> Duration {
    Duration::from_secs(60 * n)
}

fn cargo() -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root());
    command
}

fn logged(command: &mut Command, log: &Path, limit: Duration) -> Result<Verdict> {
    Ok(match process::logged(command, log, limit)? {
        Outcome::Ok => Verdict::Ok,
        Outcome::Failed => Verdict::Failed("it failed".to_owned()),
        Outcome::TimedOut => Verdict::Failed(format!("killed after {} minutes", limit.as_secs() / 60)),
    })
}

fn format(_: &Setting, log: &Path) -> Result<Verdict> {
    logged(cargo().args(["fmt", "--all", "--check", "--", "--color", "never"]), log, minutes(5))
}

fn lints(_: &Setting, log: &Path) -> Result<Verdict> {
    logged(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]), log, minutes(30))
}

fn house_rules(_: &Setting, log: &Path) -> Result<Verdict> {
    let problems = tidy::check(root())?;
    fs::write(log, problems.iter().fold(String::new(), |text, problem| text + &problem.to_string() + "\n"))?;
    Ok(if problems.is_empty() {
        Verdict::Ok
    } else {
        Verdict::Failed(format!("{} house rules are broken", problems.len()))
    })
}

/// The preload library and the command, which tests of whole programs use.
fn build(_: &Setting, log: &Path) -> Result<Verdict> {
    logged(cargo().args(["build", "--workspace"]), log, minutes(30))
}

/// Unit and integration tests. All binaries run, whichever fails; tests that skip themselves can say so.
const TEST: &[&str] = &["test", "--workspace", "--lib", "--bins", "--tests", "--examples", "--no-fail-fast"];

fn tests(_: &Setting, log: &Path) -> Result<Verdict> {
    logged(cargo().args(TEST).args(["--", "--show-output"]), log, minutes(60))
}

fn tests_without_move(_: &Setting, log: &Path) -> Result<Verdict> {
    let mut command = cargo();
    command.args(TEST).args(["--exclude", "xtask", "--", "--show-output"]).env("UHMM_MASK", "move");
    logged(&mut command, log, minutes(60))
}

fn doctests(_: &Setting, log: &Path) -> Result<Verdict> {
    logged(cargo().args(["test", "--workspace", "--doc", "--no-fail-fast"]), log, minutes(20))
}

/// Every interleaving of the small protocols, in a build of its own: `cfg(loom)` replaces the atomics.
fn loom(setting: &Setting, log: &Path) -> Result<Verdict> {
    let mut found = 0;
    for member in fs::read_dir(root().join("crates"))? {
        let member = member?;
        let Ok(tests) = fs::read_dir(member.path().join("tests")) else { continue };
        let package = member.file_name();
        for test in tests {
            let path = test?.path();
            let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            if !name.starts_with("loom_") {
                continue;
            }
            found += 1;
            let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
            let mut command = cargo();
            command
                .args(["test", "--release", "--test", name, "--package"])
                .arg(&package)
                .env("RUSTFLAGS", format!("{flags} --cfg loom"))
                .env("CARGO_TARGET_DIR", setting.target.join("loom"));
            let verdict = logged(&mut command, log, minutes(30))?;
            if !matches!(verdict, Verdict::Ok) {
                return Ok(verdict);
            }
        }
    }
    Ok(if found == 0 { Verdict::Skipped("no tests/loom_*.rs".to_owned()) } else { Verdict::Ok })
}

/// `cargo xtask programs`, as a process of its own: its output is the log.
fn real_programs(_: &Setting, log: &Path) -> Result<Verdict> {
    // By way of cargo: this program's own file may have been built anew meanwhile.
    logged(cargo().args(["run", "--quiet", "--package", "xtask", "--", "programs"]), log, minutes(20))
}

/// `cargo xtask hmm-tests`: as it is, under the witness, and without `UFFDIO_MOVE`; and the controls, which must fail.
fn hmm_tests(setting: &Setting, log: &Path) -> Result<Verdict> {
    if let Lookup::Missing(reason) = kernel_source::ensure()? {
        return Ok(Verdict::Skipped(reason));
    }
    let ways: [&[&str]; 5] = [
        &["--no-move"],
        &[],
        &["--witness"],
        &["--witness", "--control", "null"],
        &["--witness", "--control", "in_place"],
    ];
    let mut worst = Verdict::Ok;
    for way in ways.into_iter().filter(|way| !setting.options.no_move || way.contains(&"--no-move")) {
        let mut command = cargo();
        command.args(["run", "--quiet", "--package", "xtask", "--", "hmm-tests"]).args(way);
        let verdict = logged(&mut command, log, minutes(20))?;
        if !matches!(verdict, Verdict::Ok) {
            worst = verdict;
        }
    }
    Ok(worst)
}

/// A test binary and the directory that its tests expect to run in.
struct TestBinary {
    path: PathBuf,
    package_dir: PathBuf,
}

/// The test binaries of all packages but this one, built if they are not.
fn test_binaries() -> Result<Vec<TestBinary>> {
    let output = cargo()
        .args(TEST)
        .args(["--exclude", "xtask", "--no-run", "--message-format=json"])
        .stderr(Stdio::null())
        .output()?;
    ensure!(output.status.success(), "the tests do not build");
    let mut binaries = Vec::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        if message["profile"]["test"] != true {
            continue;
        }
        if let (Some(path), Some(manifest)) = (message["executable"].as_str(), message["manifest_path"].as_str()) {
            let package_dir = Path::new(manifest).parent().context("a manifest without a directory")?.to_owned();
            binaries.push(TestBinary { path: path.into(), package_dir });
        }
    }
    Ok(binaries)
}

/// The same tests with no privilege at all, as far as the kernel lets them.
fn tests_as_nobody(_: &Setting, log: &Path) -> Result<Verdict> {
    const NOBODY: &[&str] = &["--reuid=65534", "--regid=65534", "--clear-groups", "--"];
    if !process::is_root() {
        return Ok(Verdict::Skipped("the tests ran without privilege already".to_owned()));
    }
    if !process::on_path("setpriv") {
        return Ok(Verdict::Skipped("setpriv is missing".to_owned()));
    }
    let mut worst = Verdict::Ok;
    for binary in test_binaries()? {
        // Below a home directory, say, that only its owner may enter.
        let reachable = Command::new("setpriv").args(NOBODY).args(["test", "-x"]).arg(&binary.path).status()?;
        if !reachable.success() {
            return Ok(Verdict::Skipped(format!("nobody may not enter {}", binary.path.display())));
        }
        let mut command = Command::new("setpriv");
        command
            .args(NOBODY)
            .arg(&binary.path)
            .arg("--show-output")
            .current_dir(&binary.package_dir)
            .env("CARGO_MANIFEST_DIR", &binary.package_dir)
            .env("HOME", "/nonexistent");
        let verdict = logged(&mut command, log, minutes(30))?;
        if !matches!(verdict, Verdict::Ok) {
            worst = verdict;
        }
    }
    Ok(worst)
}

/// Settings of the machine that a test could have changed.
fn machine_state() -> Vec<(&'static str, String)> {
    [
        "/proc/swaps",
        "/proc/sys/vm/nr_hugepages",
        "/proc/sys/vm/max_map_count",
        "/proc/sys/vm/overcommit_memory",
        "/proc/sys/vm/unprivileged_userfaultfd",
        "/sys/kernel/mm/transparent_hugepage/enabled",
    ]
    .into_iter()
    .map(|path| {
        let text = fs::read_to_string(path).unwrap_or_default();
        // Of the swaps, which there are; not how full they are.
        let text = if path == "/proc/swaps" {
            text.lines().filter_map(|line| line.split_whitespace().next()).collect::<Vec<_>>().join(" ")
        } else {
            text.trim().to_owned()
        };
        (path, text)
    })
    .collect()
}

fn nothing_left_behind(setting: &Setting, log: &Path) -> Result<Verdict> {
    let mut text = String::new();
    for ((path, before), (_, after)) in setting.before.iter().zip(machine_state()) {
        if *before != after {
            writeln!(text, "{path}: was {before:?}, is {after:?}")?;
        }
    }
    fs::write(log, &text)?;
    Ok(if text.is_empty() { Verdict::Ok } else { Verdict::Failed("the machine is not as it was".to_owned()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excerpt_keeps_the_failed_test_and_drops_the_rest() {
        let log = "noise\n\nfailures:\n\n---- a stdout ----\nleft: 1\n\nfailures:\n    a\n\ntest result: FAILED. 0 passed\nmore";
        let kept = excerpt(log);
        assert!(kept.contains("left: 1") && !kept.contains("noise") && !kept.contains("more"), "{kept}");
    }

    #[test]
    fn excerpt_of_a_log_without_failures_is_its_end() {
        assert_eq!(excerpt("a\nb"), "a\nb");
    }

    #[test]
    fn quick_leaves_out_the_slow_modes_only() {
        let names = |options: Options| -> Vec<_> {
            STEPS.iter().filter(|step| (step.applies)(&options)).map(|step| step.name).collect()
        };
        let quick = names(Options { quick: true, no_move: false });
        assert!(quick.contains(&"tests") && !quick.contains(&"loom") && !quick.contains(&"tests as nobody"));
        // The suite without MOVE has a run of its own.
        assert_eq!(names(Options { quick: false, no_move: false }).len(), STEPS.len());
        let no_move = names(Options { quick: true, no_move: true });
        assert!(no_move.contains(&"tests without UFFDIO_MOVE") && !no_move.contains(&"tests"));
    }
}
