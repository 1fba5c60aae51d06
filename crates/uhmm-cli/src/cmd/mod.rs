//! One module for each subcommand: its arguments, and `run`, which returns the exit status.

pub mod bench;
pub mod doctor;
pub mod run;
