//! House rules.
#![forbid(unsafe_code)]
fn main() {}
