//! Devices for uhmm.
#![deny(unsafe_code)]

pub mod dmirror;
pub mod soft;
