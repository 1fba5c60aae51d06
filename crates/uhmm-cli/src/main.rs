//! The `uhmm` command.
#![forbid(unsafe_code)]

mod cmd;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Heterogeneous memory management in user space: one address space for a process and its devices.
#[derive(Debug, Parser)]
#[command(name = "uhmm", version, arg_required_else_help = true)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

/// One variant for each module of [`cmd`].
#[derive(Debug, Subcommand)]
enum Command {
    Bench(cmd::bench::Args),
    Doctor(cmd::doctor::Args),
    Run(cmd::run::Args),
}

fn main() -> ExitCode {
    let outcome = match Args::parse().command {
        Command::Bench(args) => cmd::bench::run(&args),
        Command::Doctor(args) => cmd::doctor::run(&args),
        Command::Run(args) => cmd::run::run(&args),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("uhmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}
