//! Real programs under uhmm: the same bytes and the same exit status as without, and RAM kept near the limit.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{packages, root, temp::TempDir};

/// What to run, and how large.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Full size: working sets of some 500 MB.
    #[arg(long)]
    full: bool,
    /// Only programs whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Seed of the stress threads.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// One program: a script that prints what must not change, and its sizes.
struct Program {
    name: &'static str,
    needs: &'static [&'static str],
    /// `$SCALE` for the test suite and for `--full`.
    scale: (u32, u32),
}

const PROGRAMS: &[Program] = &[
    Program { name: "sort", needs: &["sort"], scale: (24, 500) },
    Program { name: "xz", needs: &["xz"], scale: (16, 300) },
    Program { name: "python", needs: &["python3"], scale: (20, 400) },
    Program { name: "sqlite", needs: &["sqlite3"], scale: (40, 500) },
    Program { name: "redis", needs: &["redis-server", "redis-cli", "redis-benchmark"], scale: (40, 500) },
];

/// The longest that one run may take.
const LIMIT: Duration = Duration::from_secs(1500);

/// Memory beyond the limit that is allowed for: 15 %, and 64 MiB for the engine.
fn allowed_mib(limit_mib: u64) -> u64 {
    limit_mib + limit_mib * 15 / 100 + 64
}

/// Runs the programs; prints a line for each mode and the sum last.
///
/// # Errors
/// The run itself could not go on; a program that behaves differently is no error but `false`.
pub fn run(options: &Options) -> Result<bool> {
    let missing = packages::ensure();
    let uhmm = build()?;
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for program in PROGRAMS.iter().filter(|p| options.only.as_ref().is_none_or(|only| p.name.contains(only.as_str()))) {
        if let Some(lack) = program.needs.iter().find(|need| !crate::process::on_path(need)) {
            println!("skipped {:10} {lack} is not here ({} packages missing)", program.name, missing.len());
            skipped += 1;
            continue;
        }
        let scale = if options.full { program.scale.1 } else { program.scale.0 };
        let dir = TempDir::new(program.name)?;
        let native = execute(program, scale, "", dir.path())?;
        println!("        {:10} {:10} {native}", program.name, "native");
        // A quarter of what it takes by itself.
        let limit_mib = (native.peak_mib / 4).max(8);
        let device_mib = 16 * limit_mib.max(32);
        let modes = [
            (
                "stress",
                format!("{} run --stress={} --stats=json --device soft:{device_mib}M --", uhmm.display(), options.seed),
                None,
            ),
            (
                "resident",
                format!(
                    "{} run --resident {limit_mib}M --stats=json --device soft:{device_mib}M,file={} --",
                    uhmm.display(),
                    dir.path().display()
                ),
                Some(limit_mib),
            ),
        ];
        for (mode, prefix, limit) in modes {
            let run = execute(program, scale, &prefix, dir.path())?;
            let mut wrong = Vec::new();
            if run.status != native.status {
                wrong.push(format!("{} instead of {}", run.status, native.status));
            }
            if run.output != native.output {
                wrong.push(format!("other output:\n{}\ninstead of\n{}", run.output, native.output));
            }
            if let Some(limit) = limit.filter(|&limit| run.peak_mib > allowed_mib(limit)) {
                wrong.push(format!("{} MiB in RAM with a limit of {limit} MiB", run.peak_mib));
            }
            // What a run under uhmm shows depends on how much moves.
            let expected = limit.map_or(native.peak_mib / 8, |limit| native.peak_mib.saturating_sub(limit) / 2);
            if run.out_mib < expected {
                wrong
                    .push(format!("{} MiB went out to devices, {expected} or more would have been right", run.out_mib));
            }
            let word = if wrong.is_empty() { "ok" } else { "FAILED" };
            let limit = limit.map_or(String::new(), |limit| format!(", limit {limit} MiB"));
            println!("{word:8}{:10} {mode:10} {run}{limit}", program.name);
            wrong.iter().for_each(|w| println!("        {w}"));
            if wrong.is_empty() { passed += 1 } else { failed += 1 }
        }
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    Ok(failed == 0)
}

/// Builds the command and the preload library; they end up side by side.
pub fn build() -> Result<PathBuf> {
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "-p", "uhmm-cli", "-p", "uhmm-preload"])
        .current_dir(root())
        .status()?;
    if !status.success() {
        bail!("the release build failed");
    }
    Ok(crate::target_dir()?.join("release/uhmm"))
}

/// What one run came to.
struct Run {
    status: ExitStatus,
    output: String,
    took: Duration,
    peak_mib: u64,
    /// What its processes' engines sent to devices.
    out_mib: u64,
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { took, peak_mib, out_mib, .. } = self;
        write!(f, "{:7.1} s, {peak_mib:5} MiB in RAM at most, {out_mib:6} MiB out", took.as_secs_f64())
    }
}

/// Runs a program's script, with `prefix` before the program.
fn execute(program: &Program, scale: u32, prefix: &str, dir: &Path) -> Result<Run> {
    let script = root().join("xtask/programs").join(format!("{}.sh", program.name));
    let out = dir.join("output");
    let _ = fs::remove_file(dir.join("log"));
    fs::write(&out, "")?;
    // Both streams at its end, wherever that is by then.
    let output = fs::File::options().append(true).open(&out)?;
    let start = Instant::now();
    let mut child = Command::new("sh")
        .arg(&script)
        .env("RUN", prefix)
        .env("SCALE", scale.to_string())
        .env("DIR", dir)
        .env("LC_ALL", "C")
        .env("UHMM_STRICT", "1")
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .process_group(0)
        .spawn()
        .with_context(|| script.display().to_string())?;
    let mut peaks = BTreeMap::new();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        sample(child.id(), &mut peaks);
        if start.elapsed() > LIMIT {
            let _ = Command::new("kill").args(["-KILL", "--", &format!("-{}", child.id())]).status();
            child.wait()?;
            bail!("{}: no end within {} s", program.name, LIMIT.as_secs());
        }
        thread::sleep(Duration::from_millis(10));
    };
    let (figures, output): (Vec<_>, Vec<_>) =
        fs::read_to_string(&out)?.lines().map(str::to_owned).partition(|line| bytes_out(line).is_some());
    // What does not write to the script's output.
    let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
    let bytes: u64 = figures.iter().map(String::as_str).chain(log.lines()).filter_map(bytes_out).sum();
    Ok(Run {
        status,
        output: output.join("\n"),
        took: start.elapsed(),
        peak_mib: peaks.values().max().copied().unwrap_or(0) / 1024,
        out_mib: bytes >> 20,
    })
}

/// What went out to devices, where the line is one of `--stats=json`.
pub fn bytes_out(line: &str) -> Option<u64> {
    serde_json::from_str::<serde_json::Value>(line).ok()?.get("bytes_out")?.as_u64()
}

/// Notes the anonymous memory of each process below `pid`, in KiB.
fn sample(pid: u32, peaks: &mut BTreeMap<u32, u64>) {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return };
    for task in tasks.flatten() {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for child in children.split_whitespace().filter_map(|c| c.parse().ok()) {
            let status = fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
            let anon = status
                .lines()
                .find_map(|line| line.strip_prefix("RssAnon:"))
                .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
            if let Some(anon) = anon {
                let peak = peaks.entry(child).or_default();
                *peak = anon.max(*peak);
            }
            sample(child, peaks);
        }
    }
}
