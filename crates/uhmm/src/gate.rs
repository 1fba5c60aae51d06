//! The read gate: nothing may act on what it knows of the address space while an event is being read.
//!
//! Reading a userfaultfd is what lets a thread that is blocked in `munmap`, `mremap`, `madvise` or `fork` go on, and
//! what makes the kernel accept `COPY` and `MOVE` again. Between that read and the moment the event has been applied
//! to the page states, an install that was decided on the old states would put a page where it no longer belongs (a
//! zero page over one that has just moved there, say). So:
//!
//! - whoever decides on page states and then changes page tables does both *inside* the gate ([`Gate::enter`]);
//! - the reader closes the gate, which waits for those inside, reads one message, applies it if it is an event, and
//!   opens the gate again.
//!
//! Applying waits for page locks, and page locks are held by threads that want to enter. They must not wait for each
//! other: while an event is being applied, `enter` refuses, and the caller puts its pages back into a state of rest,
//! lets go of their locks, and begins again. The same answer serves for `EAGAIN` from the kernel.
//!
//! ```text
//!            close()            read: event
//!   OPEN ------------> CLOSED ------------> APPLYING
//!    ^  \                |                      |
//!    |   enter: in       | enter: waits         | enter: refused
//!    +-------------------+----------------------+
//!                      open()
//! ```

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use crate::thread::MAX_THREADS;

const OPEN: u32 = 0;
const CLOSED: u32 = 1;
const APPLYING: u32 = 2;

/// One engine thread's mark, alone on its cache line.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Mark(AtomicU32);

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Gate {
    state: AtomicU32,
    marks: [Mark; MAX_THREADS],
}

/// Proof of being inside; leaves on drop.
#[derive(Debug)]
pub(crate) struct Inside<'a> {
    mark: &'a Mark,
}

/// The gate is closed for an event: back out, let go of page locks, begin again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refused;

impl Gate {
    pub(crate) fn new() -> Self {
        Self { state: AtomicU32::new(OPEN), marks: std::array::from_fn(|_| Mark::default()) }
    }

    /// Goes in, as engine thread number `slot`.
    ///
    /// # Locking
    /// Not re-entrant. Waits while a message is being read (a system call's time).
    pub(crate) fn enter(&self, slot: usize) -> Result<Inside<'_>, Refused> {
        let mark = &self.marks[slot];
        debug_assert_eq!(mark.0.load(SeqCst), 0, "the gate is not re-entrant");
        loop {
            // The store must be visible before the state is read, and the closer's store before it reads the marks:
            // one of the two then sees the other. Hence SeqCst on both sides.
            mark.0.store(1, SeqCst);
            match self.state.load(SeqCst) {
                OPEN => return Ok(Inside { mark }),
                state => {
                    mark.0.store(0, SeqCst);
                    if state == APPLYING {
                        return Err(Refused);
                    }
                }
            }
            let mut spins = 0u32;
            while self.state.load(SeqCst) == CLOSED {
                pause(&mut spins);
            }
        }
    }

    /// Closes the gate and waits until nobody is inside. One closer at a time: the caller holds the reader's lock.
    pub(crate) fn close(&self) {
        self.state.store(CLOSED, SeqCst);
        for mark in &self.marks {
            let mut spins = 0u32;
            while mark.0.load(SeqCst) != 0 {
                pause(&mut spins);
            }
        }
    }

    /// Says that an event was read and is being applied.
    pub(crate) fn applying(&self) {
        self.state.store(APPLYING, SeqCst);
    }

    /// Opens the gate.
    pub(crate) fn open(&self) {
        self.state.store(OPEN, SeqCst);
    }

    /// Whether nobody is reading a message or applying an event.
    pub(crate) fn is_open(&self) -> bool {
        self.state.load(SeqCst) == OPEN
    }

    /// Waits until the gate is open. Who raised an event, and goes on because it was read, knows then that it was applied.
    pub(crate) fn wait_open(&self) {
        let mut spins = 0u32;
        while self.state.load(SeqCst) != OPEN {
            pause(&mut spins);
        }
    }

    /// Waits until no event is being applied any more; where one is not, returns at once.
    pub(crate) fn wait_applied(&self) {
        let mut spins = 0u32;
        while self.state.load(SeqCst) == APPLYING {
            pause(&mut spins);
        }
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.mark.0.store(0, SeqCst);
    }
}

/// Spins a little, then gives the CPU away: on two cores the one waited for may need this one.
pub(crate) fn pause(spins: &mut u32) {
    *spins += 1;
    if *spins < 64 {
        std::hint::spin_loop();
    } else if *spins < 4096 {
        std::thread::yield_now();
    } else {
        std::thread::sleep(std::time::Duration::from_micros(50));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

    use super::*;

    #[test]
    fn nobody_is_inside_while_the_gate_is_closed() {
        let gate = Gate::new();
        let (inside, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|s| {
            for slot in 0..3 {
                let (gate, inside, stop) = (&gate, &inside, &stop);
                s.spawn(move || {
                    while !stop.load(Relaxed) {
                        match gate.enter(slot) {
                            Ok(_inside) => {
                                inside.fetch_add(1, SeqCst);
                                std::hint::spin_loop();
                                inside.fetch_sub(1, SeqCst);
                            }
                            Err(Refused) => gate.wait_applied(),
                        }
                    }
                });
            }
            for round in 0..20_000 {
                gate.close();
                assert_eq!(inside.load(SeqCst), 0);
                if round % 3 == 0 {
                    gate.applying();
                    assert_eq!(gate.enter(3).map(drop), Err(Refused));
                }
                gate.open();
            }
            stop.store(true, Relaxed);
        });
    }
}
