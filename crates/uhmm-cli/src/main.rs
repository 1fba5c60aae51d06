//! The uhmm command.
#![forbid(unsafe_code)]
fn main() {}
