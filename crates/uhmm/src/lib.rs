//! Heterogeneous memory management in user space.
#![forbid(unsafe_code)]

pub use uhmm_sys::addr;
