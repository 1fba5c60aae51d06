//! The README's first command: a real program, most of its memory away from RAM, the same result.

use std::{
    fs::{self, File},
    io::{BufWriter, Read, Write},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{root, target_dir, temp::TempDir};

/// Size of the demonstration.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Size of the text file, in megabytes.
    #[arg(long, default_value_t = 60)]
    megabytes: u64,
    /// Memory that the program may keep in RAM.
    #[arg(long, default_value = "64M")]
    resident: String,
    /// Where the rest goes.
    #[arg(long, default_value = "soft:1G")]
    device: String,
}

/// Builds uhmm, sorts a text file without and with it, compares, and shows what moved.
///
/// # Errors
/// The build or one of the programs failed, or the results differ.
pub fn run(options: &Options) -> Result<bool> {
    println!("building uhmm (release)");
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "-p", "uhmm-cli", "-p", "uhmm-preload"])
        .current_dir(root())
        .status()?;
    ensure!(status.success(), "the build failed");
    let uhmm = target_dir()?.join("release").join("uhmm");

    let dir = TempDir::new("demo")?;
    let text = dir.path().join("text");
    println!("writing {} MB of text", options.megabytes);
    write_text(&text, options.megabytes.saturating_mul(1_000_000)).context("cannot write the text")?;

    let plain = dir.path().join("sorted-plain");
    let managed = dir.path().join("sorted-uhmm");
    println!("$ {}", sort_words("OUT", "TEXT").join(" "));
    let plain_time = timed(Command::new("sort").args(sort_args(&plain, &text)))?;
    println!("  {:.1} s", plain_time.as_secs_f64());

    println!(
        "$ uhmm run --resident {} --device {} --stats -- {}",
        options.resident,
        options.device,
        sort_words("OUT", "TEXT").join(" ")
    );
    let log = dir.path().join("log");
    let managed_time = timed(
        Command::new(&uhmm)
            .args(["run", "--resident", &options.resident, "--device", &options.device, "--stats", "--", "sort"])
            .args(sort_args(&managed, &text))
            .stderr(File::create(&log)?),
    );
    let figures = fs::read_to_string(&log)?;
    eprint!("{figures}");
    println!("  {:.1} s", managed_time?.as_secs_f64());

    if !same_bytes(&plain, &managed)? {
        bail!("the results differ");
    }
    let pages_out = figures.lines().find_map(|line| line.trim().strip_prefix("pages_out ")?.split_whitespace().next());
    ensure!(pages_out.is_some_and(|pages| pages != "0"), "nothing moved: `uhmm doctor` says what this machine lacks");
    println!("The results are the same, byte for byte.");
    Ok(true)
}

fn sort_args(out: &Path, text: &Path) -> Vec<String> {
    sort_words(&out.display().to_string(), &text.display().to_string()).split_off(1)
}

/// In memory as a whole (`-S`), so that there is something to move.
fn sort_words(out: &str, text: &str) -> Vec<String> {
    ["sort", "--parallel=2", "-S", "1G", "-o", out, text].map(str::to_owned).to_vec()
}

fn timed(command: &mut Command) -> Result<Duration> {
    let start = Instant::now();
    let program = command.get_program().to_owned();
    let status = command.env("LC_ALL", "C").status().with_context(|| format!("cannot run {}", program.display()))?;
    ensure!(status.success(), "{} ended with {status}", program.display());
    Ok(start.elapsed())
}

/// Lines of pseudo-random words, the same in every run.
fn write_text(path: &Path, bytes: u64) -> Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut written = 0;
    while written < bytes {
        // xorshift64: any cheap sequence without a pattern that a sort could profit from.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let line = format!("{:016x} {:08x} page {}\n", state, state.rotate_left(23) >> 32, written / 4096);
        out.write_all(line.as_bytes())?;
        written += line.len() as u64;
    }
    out.flush()?;
    Ok(())
}

fn same_bytes(a: &Path, b: &Path) -> Result<bool> {
    let (mut a, mut b) = (File::open(a)?, File::open(b)?);
    if a.metadata()?.len() != b.metadata()?.len() {
        return Ok(false);
    }
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let n = a.read(&mut left)?;
        if n == 0 {
            return Ok(true);
        }
        b.read_exact(&mut right[..n])?;
        if left[..n] != right[..n] {
            return Ok(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_changed_byte_is_a_difference() {
        let dir = TempDir::new("demo-test").unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        write_text(&a, 3_000_000).unwrap();
        write_text(&b, 3_000_000).unwrap();
        assert!(same_bytes(&a, &b).unwrap());
        let mut bytes = std::fs::read(&b).unwrap();
        bytes[2_500_000] ^= 1;
        std::fs::write(&b, &bytes).unwrap();
        assert!(!same_bytes(&a, &b).unwrap());
        bytes.pop();
        std::fs::write(&b, &bytes).unwrap();
        assert!(!same_bytes(&a, &b).unwrap());
    }
}
