//! The house rules and the test contract as a program: `cargo xtask <command>`.
#![forbid(unsafe_code)]

mod contained;
mod demo;
mod hmm_tests;
mod kernel_source;
mod mm_selftests;
mod packages;
mod process;
mod programs;
mod suite;
mod summary;
mod tap;
mod temp;
mod tidy;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The house rules and the test contract.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Checks the house rules that a compiler does not.
    Tidy,
    /// Runs everything that must hold: format, lints, house rules, all tests, in every mode.
    Test(suite::Options),
    /// Runs a real program under uhmm and shows what moved.
    Demo(demo::Options),
    /// Runs real programs under uhmm and compares their results with those without.
    Programs(programs::Options),
    /// Runs the kernel's own HMM tests on uhmm's device and compares each case with what is expected of it.
    HmmTests(hmm_tests::Options),
    /// Runs the kernel's other memory management tests by themselves and under stress, and compares each case.
    MmSelftests(mm_selftests::Options),
    /// Runs a program that changes the machine, and changes it back.
    #[command(hide = true)]
    Contained(contained::Options),
    /// What continuous integration calls: the same as `test`.
    Ci(suite::Options),
}

fn main() -> ExitCode {
    let outcome = match Args::parse().command {
        Command::Tidy => tidy_command(),
        Command::Test(options) | Command::Ci(options) => suite::run(&options),
        Command::Demo(options) => demo::run(&options),
        Command::Programs(options) => programs::run(&options),
        Command::HmmTests(options) => hmm_tests::run(&options),
        Command::MmSelftests(options) => mm_selftests::run(&options),
        Command::Contained(options) => contained::run(&options),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn tidy_command() -> Result<bool> {
    let problems = tidy::check(root())?;
    for problem in &problems {
        println!("{problem}");
    }
    println!("tidy: {} problem{}", problems.len(), if problems.len() == 1 { "" } else { "s" });
    Ok(problems.is_empty())
}

/// The top of the source tree that this program was built from.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a directory of the workspace")
}

/// Where cargo puts what it builds: this program lies in `<target>/debug`.
fn target_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let dir = exe.parent().and_then(Path::parent).filter(|dir| dir.join("debug").is_dir());
    Ok(dir.map_or_else(|| root().join("target"), Path::to_path_buf))
}
