//! Messages to the program's standard error.

use uhmm_sys::thread;

pub(crate) use uhmm_sys::say::{Files, say};

/// Has panics of this library's threads reported where the program's standard error is. They end the process.
pub(crate) fn report_panics() {
    std::panic::set_hook(Box::new(|info| {
        // Nearly all of its code runs on hidden threads, in whose table the number of standard error means another file.
        say(Files::Own, format_args!("bug in uhmm, thread {}: {info}", thread::gettid()));
    }));
}
