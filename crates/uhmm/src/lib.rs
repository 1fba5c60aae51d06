//! Heterogeneous memory management in user space.
#![forbid(unsafe_code)]

mod adopt;
mod block;
mod changes;
mod coherent;
pub mod device;
pub mod device_table;
mod devices;
pub mod engine;
mod events;
mod family;
mod fault;
pub mod fork;
mod gate;
mod home;
mod job;
mod lift;
pub mod linux;
mod migrate;
mod mirror;
pub mod mm;
pub mod notifier;
mod ops;
pub mod os;
mod page_set;
mod parked;
pub mod pgmap;
pub mod policy;
mod range;
pub mod reclaim;
pub mod session;
mod sleepers;
mod staging;
pub mod still;
pub mod stress;
pub mod sync;
mod thread;
pub mod trace;
pub mod watch;

pub use uhmm_sys::addr;

pub use crate::{
    migrate::PageOutcome,
    mirror::{DeviceFaultPolicy, FaultError},
    mm::{MigrateOptions, Mirror, Mm, Port},
    range::{Detail, PageReport},
};
