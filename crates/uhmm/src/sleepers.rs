//! Faults that are read on the way to an event.
//!
//! The kernel tells of faults before it tells of events. A thread that is woken without its page faults anew at once, and
//! while the reader hears of that it hears of no event: not of the one, perhaps, that it waits for. So who looks for an event
//! reads past all faults first and wakes their threads afterwards.

use uhmm_sys::{
    Errno,
    addr::{PageRange, VirtAddr},
};

use crate::os::Event;

/// More threads than are likely to fault between two looks; of others only a range is known that holds their pages.
const MOST: usize = 64;

/// Threads whose faults were read and not served. They are woken when this is dropped, fault anew, and are served by whoever
/// reads that.
#[derive(Debug)]
pub(crate) struct Sleepers<W: FnMut(PageRange)> {
    wake: W,
    pages: [VirtAddr; MOST],
    count: usize,
    others: Option<PageRange>,
}

impl<W: FnMut(PageRange)> Sleepers<W> {
    pub(crate) const fn new(wake: W) -> Self {
        Self { wake, pages: [VirtAddr::new(0); MOST], count: 0, others: None }
    }

    /// The next message of `read` that is no fault.
    pub(crate) fn next_change<C>(
        &mut self,
        mut read: impl FnMut() -> Result<Option<Event<C>>, Errno>,
    ) -> Result<Option<Event<C>>, Errno> {
        loop {
            match read()? {
                Some(Event::Fault { addr, .. }) => self.put(addr),
                other => return Ok(other),
            }
        }
    }

    fn put(&mut self, addr: VirtAddr) {
        if let Some(place) = self.pages.get_mut(self.count) {
            *place = addr;
            self.count += 1;
            return;
        }
        let page = PageRange::page_of(addr);
        let others = self.others.unwrap_or(page);
        let both = PageRange::from_ends(others.start().min(page.start()), others.end().max(page.end()));
        self.others = Some(both.expect("two ranges of pages have one that holds both"));
    }

    pub(crate) fn wake(&mut self) {
        self.pages[..self.count].iter().for_each(|&addr| (self.wake)(PageRange::page_of(addr)));
        self.count = 0;
        if let Some(others) = self.others.take() {
            (self.wake)(others);
        }
    }
}

impl<W: FnMut(PageRange)> Drop for Sleepers<W> {
    fn drop(&mut self) {
        self.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Threads that fault anew as soon as they are woken, and an event behind their faults.
    struct Kernel {
        pending: Vec<VirtAddr>,
        asleep: Vec<VirtAddr>,
        event: Option<Event<()>>,
    }

    impl Kernel {
        fn read(&mut self) -> Option<Event<()>> {
            let Some(addr) = self.pending.pop() else { return self.event.take() };
            self.asleep.push(addr);
            Some(Event::Fault { addr, tid: None })
        }

        fn wake(&mut self, range: PageRange) {
            let woken = self.asleep.extract_if(.., |addr| range.contains(*addr));
            self.pending.extend(woken);
        }
    }

    #[test]
    fn an_event_is_reached_however_soon_threads_fault_anew() {
        for threads in [1, MOST, MOST + 1, 1000] {
            let gone = PageRange::page_of(VirtAddr::new(0x1000));
            let pending: Vec<VirtAddr> = (0..threads as u64).map(|n| VirtAddr::new((n * 7 % 1000) << 12)).collect();
            let kernel = RefCell::new(Kernel { pending, asleep: Vec::new(), event: Some(Event::Remove(gone)) });
            let mut sleepers = Sleepers::new(|range| kernel.borrow_mut().wake(range));
            let mut look = || sleepers.next_change(|| Ok(kernel.borrow_mut().read())).unwrap();
            assert!(matches!(look(), Some(Event::Remove(range)) if range == gone));
            assert!(look().is_none());
            drop(sleepers);
            let Kernel { pending, asleep, .. } = kernel.into_inner();
            assert!(asleep.is_empty() && pending.len() == threads, "all are awake: {} of {threads}", pending.len());
        }
    }
}
