//! Devices for uhmm.
#![deny(unsafe_code)]

pub mod soft;
