//! Holding still: for a moment nothing leaves the program's memory.
//!
//! Registration splits the kernel's mappings, and some calls of the program mind that (`mremap` of a range refuses more
//! than one). Between putting the mappings together and the call nothing must split them again.

use crate::{engine::Core, linux::LinuxMm, mm};

/// Thaws on the way out, also by a panic.
struct Frozen(&'static Core<LinuxMm>);

impl Drop for Frozen {
    fn drop(&mut self) {
        self.0.thaw();
    }
}

/// Runs `f` while no page leaves and nothing is registered or unregistered, but by what is asked of the
/// [`Mm`](crate::Mm) in `f`. Pages come home; migrations wait.
///
/// # Locking
/// Waits for what is leaving just now. Not for engine threads, nor for devices.
pub fn still<T>(f: impl FnOnce() -> T) -> T {
    let _frozen = mm::current().map(|(core, _)| {
        core.freeze();
        Frozen(core)
    });
    f()
}
