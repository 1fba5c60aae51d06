//! The address space changed: what follows for page states and mirrors.
//!
//! Messages are read one at a time, with the gate closed (see [`crate::gate`]). A fault opens the gate at once and is
//! served outside; an event is applied before anybody else may look.

use std::{
    ops::ControlFlow,
    sync::atomic::{
        AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
    time::Duration,
};

use uhmm_sys::{
    Errno,
    addr::{PageRange, VirtAddr},
    arena,
};

use crate::{
    block::{Block, Place, Transit},
    device::{Cause, CopyOp, Invalidation},
    engine::Core,
    fault::{Haste, Served},
    gate::pause,
    home::frame_run,
    migrate::SPARE_RECORDS,
    os::{ChildMm, Event, Os},
    page_set::PageSet,
    sleepers::Sleepers,
    staging::Left,
    sync::Waiter,
    thread::Ctx,
    trace::{Counter, Why},
};

/// What a look at the userfaultfd brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pumped {
    Nothing,
    Event,
    Fault,
}

/// How deeply a thread may serve faults that it read while it waited to retry another.
const MAX_DEPTH: u32 = 4;

impl<O: Os> Core<O> {
    /// Reads one message, if there is one, and deals with it.
    ///
    /// # Locking
    /// The caller holds no page and is outside the gate.
    pub(crate) fn pump(&'static self, ctx: &mut Ctx) -> Pumped {
        // Who may serve no more faults lets them wait for whoever keeps this thread from serving its own.
        let mut sleepers = (ctx.depth >= MAX_DEPTH).then(|| Sleepers::new(|pages| self.os.wake(pages)));
        let fault = {
            let mut reader = self.lock_reader();
            self.gate.close();
            self.devices.for_each(|entry| entry.device().close_gate());
            if !reader.arrivals.is_empty() {
                let settled = !self.unsettled.load(SeqCst) || !self.is_changing();
                if settled {
                    reader.arrivals.clear();
                }
            }
            let next = match &mut sleepers {
                None => self.next_event(),
                Some(sleepers) => sleepers.next_change(|| self.next_event()),
            };
            let fault = match next {
                Ok(None) => None,
                Ok(Some(Event::Fault { addr, tid })) => Some((addr, tid)),
                Ok(Some(event)) => {
                    self.gate.applying();
                    let mut next = Some(event);
                    while let Some(event) = next {
                        self.stats.add(Counter::Events, 1);
                        self.apply(ctx, event, &mut reader);
                        next = reader.deferred.take();
                    }
                    self.devices.for_each(|entry| entry.device().open_gate());
                    self.gate.open();
                    return Pumped::Event;
                }
                Err(error) => panic!("{UNREADABLE}: {error}"),
            };
            self.devices.for_each(|entry| entry.device().open_gate());
            self.gate.open();
            fault
        };
        let Some((addr, tid)) = fault else { return Pumped::Nothing };
        let read_ns = self.os.now_ns();
        ctx.depth += 1;
        if self.serve_fault(ctx, addr, Haste::CanWait(tid)) == Served::Now {
            self.record_fault(read_ns);
        }
        ctx.depth -= 1;
        Pumped::Fault
    }

    /// Lets pending events be read, by whoever it is, before an operation that was refused is tried again.
    pub(crate) fn settle_events(&'static self, ctx: &mut Ctx, attempt: u32) {
        self.gate.wait_applied();
        if self.pump(ctx) == Pumped::Nothing {
            // Read already, but the thread that raised it has not gone on yet, and until it has the kernel refuses.
            if attempt < 16 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(std::time::Duration::from_micros(100));
            }
        }
    }

    fn apply(&'static self, ctx: &mut Ctx, event: Event<O::Child>, reader: &mut Reader<O::Child>) {
        match event {
            Event::Fault { .. } => unreachable!("faults are served outside the gate"),
            Event::Unmap(range) => self.unmapped(range, reader),
            Event::Remove(range) => {
                // Before, so that no page leaves once it was looked at; and after, for those that came home meanwhile.
                self.mark_discarded(range);
                self.drop_pages(range, reader);
                self.mark_discarded(range);
            }
            Event::Remap { from, to, len } => self.remap(from, to, len, reader),
            Event::Fork(child) => self.fork_child(ctx, child, reader),
        }
    }

    /// Something was unmapped. What was at its addresses then is gone; not what moved there since.
    ///
    /// The kernel says so when the thread that unmapped it has let go of the address space, and of what an `mremap` leaves
    /// behind even later: when its thread runs again after its [`Event::Remap`] was read. Another mapping may have moved there
    /// by then. It is still there, registered; whatever is mapped there now in its place is not, as long as something is
    /// changing.
    fn unmapped(&'static self, range: PageRange, reader: &mut Reader<O::Child>) {
        if self.was_refused(range) {
            return;
        }
        let mut at = range.start();
        while let Ok(rest) = PageRange::from_ends(at, range.end()) {
            let arrival = reader.arrivals.lowest_in(rest);
            // Up to it, or all of it.
            let part = match arrival.and_then(|arrival| arrival.intersection(rest)) {
                None => rest,
                Some(part) if part.start() > at => PageRange::from_ends(at, part.start()).expect("checked"),
                Some(part) => {
                    let vma = self.os.vma(at).ok().flatten().and_then(|v| Some((v, v.range.intersection(part)?)));
                    match vma {
                        Some((vma, here)) if here.start() == at => {
                            if self.os.is_registered(vma.range) {
                                at = here.end();
                                continue;
                            }
                            here
                        }
                        Some((_, here)) => PageRange::from_ends(at, here.start()).expect("what is here begins above"),
                        None => part,
                    }
                }
            };
            self.forget_histories(part);
            self.drop_pages(part, reader);
            at = part.end();
        }
    }

    /// Whether a `munmap` of `range` was refused because something in it is sealed. Linux 6.18 says that it was done.
    fn was_refused(&self, range: PageRange) -> bool {
        let vma = |at| self.os.vma(at).ok().flatten();
        // Nothing is left there, most likely, and nothing more to be looked at.
        if !vma(range.start()).is_some_and(|vma| vma.range.overlaps(range)) {
            return false;
        }
        let away = self.any_unsettled(range).map(|(block, i)| block.page(i));
        let is_there = |page| vma(page).is_some_and(|vma| vma.range.contains(page));
        away.is_some_and(is_there) && self.os.is_any_sealed(range)
    }

    /// What is mapped there next has no past.
    fn forget_histories(&self, range: PageRange) {
        self.blocks.for_each(range, |block| {
            if let Some(part) = PageRange::block_of(block.base()).intersection(range) {
                PageSet::of(part).iter().for_each(|i| block.set_history(i, 0, Why::Untouched));
            }
            ControlFlow::Continue(())
        });
    }

    /// The contents of `range` are gone for good: forget pages that are away, and every translation.
    fn drop_pages(&'static self, range: PageRange, reader: &mut Reader<O::Child>) {
        let _invalidating = self.invalidate(&Invalidation { range, cause: Cause::Unmap, owner: None });
        self.blocks.for_each(range, |block| {
            if let Some(part) = PageRange::block_of(block.base()).intersection(range) {
                self.drop_in_block(block, &PageSet::of(part), reader);
            }
            ControlFlow::Continue(())
        });
    }

    /// Notes that pages are about to go: the event comes before the kernel drops them, and who asked for it goes on when
    /// it is read. A page that left in between would come back with the bytes that were to be dropped.
    fn mark_discarded(&self, range: PageRange) {
        let ticks = self.ticks();
        for part in range.iter_blocks() {
            if let Ok(block) = self.blocks.find_or_add(part.start(), SPARE_RECORDS) {
                PageSet::of(part).iter().for_each(|i| block.set_history(i, ticks, Why::Discarded));
            }
        }
    }

    fn drop_in_block(&'static self, block: Block, pages: &PageSet, reader: &mut Reader<O::Child>) {
        let mut transit = Transit::new(block, self);
        for i in pages.iter() {
            let word = block.word(i);
            if word.is_cpu() && !word.locked() {
                continue;
            }
            let place = self.hold_draining(&mut transit, i, reader);
            transit.put(i, Place::Cpu);
            match place {
                Place::Cpu | Place::Poisoned { .. } => continue,
                Place::Staged { slot, .. } => {
                    if let Left::Zap(chunk) = self.staging.leave(slot.chunk(), 0, 1) {
                        self.zap_chunk(chunk);
                    }
                }
                // A mapped page is the kernel's to drop; the frame's place is empty.
                Place::Device { device, pfn } | Place::Coherent { device, pfn } => self.free_frame(device, pfn),
            }
            self.stats.add(Counter::PagesDropped, 1);
        }
    }

    /// Pages that are away follow their mapping to its new address.
    fn remap(&'static self, from: VirtAddr, to: VirtAddr, len: u64, reader: &mut Reader<O::Child>) {
        let (Ok(old), Ok(new)) = (PageRange::new(from, len), PageRange::new(to, len)) else { return };
        reader.remaps += 1;
        self.clear_the_way(new, reader);
        reader.remaps -= 1;
        reader.arrivals.put(new);
        self.unsettled.store(true, SeqCst);
        let _old = self.invalidate(&Invalidation { range: old, cause: Cause::Unmap, owner: None });
        let _new = self.invalidate(&Invalidation { range: new, cause: Cause::Unmap, owner: None });
        self.blocks.for_each(old, |block| {
            let Some(part) = PageRange::block_of(block.base()).intersection(old) else {
                return ControlFlow::Continue(());
            };
            let mut source = Transit::new(block, self);
            for i in PageSet::of(part).iter() {
                let word = block.word(i);
                if word.is_cpu() && !word.locked() {
                    continue;
                }
                let place = self.hold_draining(&mut source, i, reader);
                if place == Place::Cpu {
                    source.put(i, Place::Cpu);
                    continue;
                }
                let target = to.add(block.page(i).get() - from.get());
                let (block_to, n) = match self.blocks.find_or_add(target, 0) {
                    Ok(block_to) => (block_to, target.page_in_block()),
                    // Records are kept back for this case; without one the page would be lost.
                    Err(_) => panic!("no record left for page {target}, which moved here from {}", block.page(i)),
                };
                source.put(i, Place::Cpu);
                let mut dest = Transit::new(block_to, self);
                // What was away at the new address went with the mapping that was replaced.
                let replaced = self.hold_draining(&mut dest, n, reader);
                assert_eq!(replaced, Place::Cpu, "page {target} has two homes after mremap");
                let (since, why) = block.history(i);
                block_to.set_history(n, since, why);
                dest.put(n, place);
                if let Place::Device { device, pfn } | Place::Coherent { device, pfn } = place
                    && let Some(entry) = self.devices.get(device)
                {
                    entry.set_hint(pfn, target);
                }
            }
            ControlFlow::Continue(())
        });
    }

    /// Waits until nothing is away at `range`, or on its way, to which a mapping has moved: what was there has left, and who
    /// unmapped or moved it is about to say so, or has in an event that was deferred. If nobody is, it left in a way that the
    /// kernel does not tell of: `shmat` with `SHM_REMAP`.
    fn clear_the_way(&'static self, range: PageRange, reader: &mut Reader<O::Child>) {
        let mut start = std::time::Instant::now();
        let mut spins = 0;
        let mut quiet = Waiter::new(QUIET);
        let mut sleepers = Sleepers::new(|pages| self.os.wake(pages));
        while let Some((block, i)) = self.any_unsettled(range) {
            if block.word(i).is_cpu() {
                // On its way from there, or about to stay: nobody says so in an event.
                self.hold_draining(&mut Transit::new(block, self), i, reader);
                continue;
            }
            let concerns = |event: &Event<O::Child>| match event {
                Event::Unmap(gone) => gone.overlaps(range),
                Event::Remap { from, len, .. } => PageRange::new(*from, *len).is_ok_and(|old| old.overlaps(range)),
                _ => false,
            };
            // First: where nothing is changing now, all that there is to say of what was there before has been read below.
            let changing = self.os.is_changing();
            let event = match reader.deferred.take_first(concerns) {
                Some(event) => Some(event),
                None if reader.deferred.is_full() => None,
                None => {
                    sleepers.next_change(|| self.next_event()).unwrap_or_else(|error| panic!("{UNREADABLE}: {error}"))
                }
            };
            sleepers.wake();
            if changing || event.is_some() {
                quiet = Waiter::new(QUIET);
            }
            match event {
                Some(Event::Unmap(gone)) if gone.overlaps(range) => {
                    // Of these pages it is known that they left.
                    self.drop_pages(gone.intersection(range).expect("they overlap"), reader);
                    for (from, to) in [(gone.start(), range.start()), (range.end(), gone.end())] {
                        if let Ok(beside) = PageRange::from_ends(from, to) {
                            self.unmapped(beside, reader);
                        }
                    }
                }
                Some(Event::Remap { from, to, len }) if concerns(&Event::Remap { from, to, len }) => {
                    self.remap(from, to, len, reader);
                }
                Some(event) => {
                    reader.deferred.put(event);
                    // Whose event was read goes on, and may unmap or move this too: the more so the longer those wait who have been
                    // kept from their processor since they changed something.
                    std::thread::sleep(PACE * u32::try_from(reader.deferred.count).expect("a few hundred"));
                }
                None if quiet.pause().is_ok() => {
                    // Whoever is about to say so needs a processor.
                    pause(&mut spins);
                    block.note_wait(i, spins, &mut start);
                }
                // What moves inside of a move is not in the books yet, and what has just arrived is there.
                None if reader.remaps > 1 || reader.arrivals.lowest_in(range).is_some() => {
                    panic!("page {} has two homes after mremap", block.page(i))
                }
                None => self.drop_pages(range, reader),
            }
            // Who lifts holds pages, and waits to know whether its event was among these.
            self.lifts.looked();
        }
    }

    /// A page of `range` that is away or held, if there is one.
    fn any_unsettled(&self, range: PageRange) -> Option<(Block, usize)> {
        let mut found = None;
        self.blocks.for_each(range, |block| {
            if let Some(part) = PageRange::block_of(block.base()).intersection(range) {
                found = block.unsettled().and(&PageSet::of(part)).iter().next().map(|i| (block, i));
            }
            if found.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        found
    }

    /// A child exists: give it the bytes of the pages that are away, all of them, now. After a prepared fork there are
    /// none, or the child takes them over by itself. Dropping the child's descriptor then ends its registration.
    ///
    /// The bytes are those of this moment: the gate is closed, so that no page comes home, and no device writes.
    fn fork_child(&'static self, ctx: &mut Ctx, child: O::Child, reader: &mut Reader<O::Child>) {
        if self.is_frozen() {
            // Counted when it was prepared.
            if self.is_sharing() {
                return;
            }
        } else {
            self.stats.add(Counter::Forks, 1);
        }
        let whole = crate::ops::whole_space();
        drop(self.invalidate(&Invalidation { range: whole, cause: Cause::Fork, owner: None }));
        self.blocks.for_each(whole, |block| {
            let mut transit = Transit::new(block, self);
            for i in block.unsettled().iter() {
                let place = self.hold_draining(&mut transit, i, reader);
                let bytes = match place {
                    // The child has them from the kernel.
                    Place::Cpu | Place::Coherent { .. } => None,
                    Place::Staged { slot, .. } => Some(self.staging.bytes(slot, 1)),
                    Place::Device { device, pfn } => ctx.home.scratch(&self.staging).and_then(|slot| {
                        let host = self.staging.bytes(slot, 1);
                        let op = CopyOp { host, frames: frame_run(pfn, 1) };
                        let entry = self.devices.get(device)?;
                        entry.device().copy_to_host(&[op]).ok().map(|()| host)
                    }),
                    Place::Poisoned { .. } => None,
                };
                let page = block.run(crate::page_set::Run { first: i, count: 1 });
                match bytes {
                    Some(bytes) => {
                        let _ = child.copy(page.start(), bytes);
                    }
                    None if !matches!(place, Place::Cpu | Place::Coherent { .. }) => {
                        let _ = child.poison(page);
                    }
                    None => {}
                }
                transit.put_back(i);
            }
            ControlFlow::Continue(())
        });
    }

    /// Takes page `i`, waiting for its holder; meanwhile reads the events that holders themselves raise.
    ///
    /// A holder that lifts pages (see [`crate::lift`]) waits in the kernel until its own event is read, and may begin
    /// to at any time.
    fn hold_draining(&self, transit: &mut Transit<'_>, i: usize, reader: &mut Reader<O::Child>) -> Place {
        let mut start = std::time::Instant::now();
        let mut spins = 0;
        loop {
            if let Ok(place) = transit.try_hold(i) {
                return place;
            }
            pause(&mut spins);
            transit.block().note_wait(i, spins, &mut start);
            if self.lifts.any() && !reader.deferred.is_full() {
                let mut sleepers = Sleepers::new(|pages| self.os.wake(pages));
                match sleepers.next_change(|| self.next_event()) {
                    Ok(Some(event)) => reader.deferred.put(event),
                    Ok(None) => {}
                    Err(error) => panic!("{UNREADABLE}: {error}"),
                }
            }
            self.lifts.looked();
        }
    }

    /// Reads one message; what the engine's own lifts raise is told apart and not returned.
    fn next_event(&self) -> Result<Option<Event<O::Child>>, Errno> {
        loop {
            match self.os.next_event()? {
                Some(Event::Remap { from, to, .. }) if self.lifts.moved(from, to) => {}
                event => {
                    if let Some(Event::Remap { .. } | Event::Unmap(_)) = event {
                        self.lifts.changed();
                    }
                    return Ok(event);
                }
            }
        }
    }

    /// As [`Os::is_changing`]. Where nothing is, all that there is to say of earlier changes was read.
    ///
    /// # Locking
    /// The caller is inside the gate, or the reader.
    pub(crate) fn is_changing(&self) -> bool {
        let changing = self.os.is_changing();
        if !changing && self.unsettled.load(SeqCst) {
            self.unsettled.store(false, SeqCst);
        }
        changing
    }
}

/// For how long nothing must be changing, nor be said, before it is believed that nobody will: Linux before 5.15 may forget one
/// change where another ends.
const QUIET: Duration = Duration::from_millis(100);
/// How much longer each event that waits keeps the next from being read.
const PACE: Duration = Duration::from_micros(20);

/// What the kernel is not known to answer.
const UNREADABLE: &str = "reading the userfaultfd failed";

/// What the reader keeps from one message to the next.
#[derive(Debug)]
pub(crate) struct Reader<C> {
    deferred: Deferred<C>,
    arrivals: Arrivals,
    /// How many moves of mappings are being applied, one inside of the other.
    remaps: u32,
}

impl<C> Reader<C> {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self { deferred: Deferred::new(), arrivals: Arrivals::new()?, remaps: 0 })
    }
}

/// Where mappings have moved to since the last time that nothing was changing.
#[derive(Debug)]
struct Arrivals {
    /// First address and end of each; none overlaps another, and an empty one is none.
    ranges: &'static [[AtomicU64; 2]],
    /// How many were put; the next goes over the oldest.
    count: usize,
}

/// More than threads can make while one of them waits for a processor, most likely.
const MOST_ARRIVALS: usize = 1024;

impl Arrivals {
    fn new() -> Result<Self, Errno> {
        Ok(Self { ranges: arena::slice(MOST_ARRIVALS)?, count: 0 })
    }

    const fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn clear(&mut self) {
        self.count = 0;
    }

    fn put(&mut self, range: PageRange) {
        // What was there has left.
        for [start, end] in self.used() {
            if to_range(start, end).is_some_and(|old| old.overlaps(range)) {
                end.store(start.load(Relaxed), Relaxed);
            }
        }
        let [start, end] = &self.ranges[self.count % MOST_ARRIVALS];
        start.store(range.start().get(), Relaxed);
        end.store(range.end().get(), Relaxed);
        self.count += 1;
    }

    /// The lowest that shares a page with `range`.
    fn lowest_in(&self, range: PageRange) -> Option<PageRange> {
        let all = self.used().iter().filter_map(|[start, end]| to_range(start, end));
        all.filter(|arrival| arrival.overlaps(range)).min_by_key(|arrival| arrival.start())
    }

    fn used(&self) -> &'static [[AtomicU64; 2]] {
        &self.ranges[..self.count.min(MOST_ARRIVALS)]
    }
}

fn to_range(start: &AtomicU64, end: &AtomicU64) -> Option<PageRange> {
    PageRange::from_ends(VirtAddr::new(start.load(Relaxed)), VirtAddr::new(end.load(Relaxed))).ok()
}

/// Most events that can wait for another. Threads whose events were read go on, and may raise more.
const MOST_DEFERRED: usize = 256;

/// Events that were read while another was being applied, in order.
#[derive(Debug)]
struct Deferred<C> {
    events: [Option<Event<C>>; MOST_DEFERRED],
    first: usize,
    count: usize,
}

impl<C> Deferred<C> {
    fn new() -> Self {
        Self { events: std::array::from_fn(|_| None), first: 0, count: 0 }
    }

    fn is_full(&self) -> bool {
        self.count == self.events.len()
    }

    fn put(&mut self, event: Event<C>) {
        let n = (self.first + self.count) % self.events.len();
        assert!(self.events[n].replace(event).is_none(), "the caller asked whether there was room");
        self.count += 1;
    }

    /// The first of which `f` says so.
    fn take_first(&mut self, f: impl Fn(&Event<C>) -> bool) -> Option<Event<C>> {
        let size = self.events.len();
        let place = |n| (self.first + n) % size;
        let found = (0..self.count).find(|&n| self.events[place(n)].as_ref().is_some_and(&f))?;
        let event = self.events[place(found)].take();
        for n in found..self.count - 1 {
            self.events.swap(place(n), place(n + 1));
        }
        self.count -= 1;
        event
    }

    fn take(&mut self) -> Option<Event<C>> {
        let event = self.events[self.first].take()?;
        self.first = (self.first + 1) % self.events.len();
        self.count -= 1;
        Some(event)
    }
}
