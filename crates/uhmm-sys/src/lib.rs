//! What uhmm asks of the Linux kernel, and nothing more.
//!
// UNSAFETY: this crate is the trust boundary: system calls, raw memory and foreign threads are reached from here only.

pub mod addr;

pub use rustix::io::Errno;
