//! Device coherent memory: pages on a device that the CPU reaches where they are.
//!
//! The memory of such a device is private anonymous memory of the process, a page for each frame, in a *range* of the
//! arena that is registered so that pages can be moved into it. A page migrates there as to any device. Then the frame's
//! page itself is moved into the program (`UFFDIO_MOVE`): the CPU uses the device's memory without a fault, and the
//! frame's place in the range is a hole until the page is moved back.
//!
//! ```text
//!                  migrate::to_device                 map: MOVE to the program
//!   Cpu, Staged ----------------------> Device ------------------------------------> Coherent
//!    ^                                   |  ^      after a migration, at a CPU touch    |
//!    +------- home::device_home ---------+  +-------------------------------------------+
//!                                              unmap: MOVE back, to go home or to another device,
//!                                              for atomic operations of the device
//! ```
//!
//! A page in its frame is out of the CPU's reach, and the device's to use as a private one is; a mapped page the device
//! reaches by the program's address. So an atomic operation of the device moves the page into its frame, and the next
//! touch of a CPU thread moves it back: no byte is copied.
//!
//! Whatever the program does with a mapped page it does with the device's memory. What becomes of the page itself is
//! the kernel's business: where it drops the page, the frame gets another at its next use.
//!
//! # Not supported
//! A page that cannot be moved back (of a mapping that is read-only or locked) comes home as it is: it counts as the
//! kernel's again, though it may lie in the device's part of RAM until the kernel drops it. A forked child, which has a
//! copy of the memory and not the same, does not have the device. Without `UFFDIO_MOVE`
//! the memory is used like that of a private device.
//!
//! # Kernel
//! `MEMORY_DEVICE_COHERENT` of `include/linux/memremap.h`.

use uhmm_sys::{
    Errno,
    addr::{PAGE_SIZE, PageRange, VirtAddr},
    uffd::{RegisterMode, SrcHoles, Wake},
};

use crate::{
    block::{Block, Place, Transit},
    device::{Cause, DevPfn, DeviceId, Invalidation},
    engine::Core,
    home::{frame_run, next_frame_run, span},
    os::{MANAGED, Os},
    page_set::{PageSet, Run},
    thread::Ctx,
    trace::{Counter, Why},
};

/// What became of pages that were to be mapped.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Mapped {
    pub(crate) done: PageSet,
    /// An event is pending: drain, and ask again.
    pub(crate) again: bool,
    /// The mapping does not take the frame's page. It stays in the frame.
    pub(crate) refused: PageSet,
}

/// What became of pages that were to leave the program for their frames. All are still held.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Unmapped {
    /// In their frames.
    pub(crate) in_frames: PageSet,
    /// The kernel's again, and their frames free.
    pub(crate) as_they_are: PageSet,
    /// Shared with a forked child, or pinned: as before.
    pub(crate) shared: PageSet,
    /// An event is pending: as before.
    pub(crate) again: PageSet,
}

/// How often a migration tries to map what it moved; who touches a page later tries again.
const MAP_ATTEMPTS: u32 = 16;

impl<O: Os> Core<O> {
    /// Whether a page of `block` is in a frame that can be mapped.
    pub(crate) fn is_mappable(&self, block: Block, i: usize) -> bool {
        matches!(block.word(i).place(), Place::Device { device, .. } if self.devices.is_coherent(device))
    }

    /// Where a frame is, if the CPU can reach those of its device.
    fn frame_addr(&self, device: DeviceId, pfn: DevPfn) -> Option<VirtAddr> {
        Some(self.devices.get(device)?.coherent_range()?.start().add(pfn.offset()))
    }

    /// Maps pages that have just migrated to a coherent device. Those that cannot be now are mapped when they are touched.
    ///
    /// # Locking
    /// The caller holds no page and is outside the gate.
    pub(crate) fn map_migrated(&'static self, ctx: &mut Ctx, block: Block, pages: &PageSet) {
        for attempt in 0..MAP_ATTEMPTS {
            let rest: PageSet = pages.iter().filter(|&i| self.is_mappable(block, i)).collect();
            if rest.is_empty() || !self.map_frames(ctx, block, &rest).again {
                return;
            }
            self.settle_events(ctx, attempt);
        }
    }

    /// Maps the pages of `want` that are in frames of coherent devices and not in transit.
    ///
    /// # Locking
    /// The caller holds no page and is outside the gate.
    pub(crate) fn map_frames(&'static self, ctx: &Ctx, block: Block, want: &PageSet) -> Mapped {
        let mut out = Mapped::default();
        let mut transit = Transit::new(block, self);
        for i in want.iter().filter(|&i| self.is_mappable(block, i)) {
            if transit.try_hold(i).is_ok() && !self.is_mappable(block, i) {
                transit.put_back(i);
            }
        }
        let mut rest = *transit.held();
        let Some(around) = span(&rest) else { return out };
        // The device uses the frame until it is empty.
        let _invalidating =
            self.invalidate(&Invalidation { range: block.run(around), cause: Cause::Migrate, owner: None });
        while let Some((run, device, first)) = next_frame_run(&transit, &rest) {
            let Some(src) = self.frame_addr(device, first) else { unreachable!("its range stays while it has pages") };
            let (done, stop) = self.map_run(ctx, block, run, src);
            for (i, n) in run.pages().zip(0..).take(done) {
                transit.put(i, Place::Coherent { device, pfn: first.add(n) });
                out.done.insert(i);
                rest.remove(i);
            }
            self.stats.add(Counter::PagesMapped, done);
            match stop {
                None => {}
                Some(Errno::AGAIN) => {
                    out.again = true;
                    break;
                }
                Some(_) => {
                    out.refused.insert(run.first + done);
                    rest.remove(run.first + done);
                }
            }
        }
        out
    }

    /// Moves the pages at `src`, those of neighbouring frames, to the run's addresses. Returns how many went, and why it
    /// stopped.
    fn map_run(&self, ctx: &Ctx, block: Block, run: Run, src: VirtAddr) -> (usize, Option<Errno>) {
        let mut done = 0;
        let (mut registered, mut unshared) = (false, false);
        while done < run.count {
            let Ok(_inside) = self.gate.enter(ctx.slot) else { return (done, Some(Errno::AGAIN)) };
            let rest = block.run(Run { first: run.first + done, count: run.count - done });
            let from = src.add(done as u64 * PAGE_SIZE);
            let result = self.os.move_pages(rest.start(), from, rest.bytes(), SrcHoles::Fail, Wake::Now);
            let moved = usize::try_from(result.done / PAGE_SIZE).expect("a run is at most a block");
            done += moved;
            if moved > 0 {
                (registered, unshared) = (false, false);
                continue;
            }
            match result.stop {
                None => unreachable!("a call without progress says why"),
                // The range lost its registration (a move that raised no event).
                Some(Errno::NOENT) if !registered => {
                    registered = true;
                    if self.os.register(PageRange::page_of(rest.start()), MANAGED).is_err() {
                        return (done, Some(Errno::NOENT));
                    }
                }
                // A child of a bare fork shares the frame's page: a copy of its own is as good.
                Some(Errno::BUSY) if !unshared => {
                    unshared = true;
                    let _ = self.os.populate_write(PageRange::page_of(from));
                }
                Some(Errno::EXIST) => panic!(
                    "page {} has two homes: the kernel has a page where {:?} is away",
                    rest.start(),
                    block.word(run.first + done)
                ),
                stop => return (done, stop),
            }
        }
        (done, None)
    }

    /// Moves held pages that are mapped from frames back there.
    ///
    /// # Locking
    /// The caller is outside the gate.
    pub(crate) fn unmap_frames(&'static self, ctx: &Ctx, transit: &mut Transit<'_>, mapped: &PageSet) -> Unmapped {
        let mut out = Unmapped::default();
        let block = transit.block();
        let Some(around) = span(mapped) else { return out };
        let _invalidating =
            self.invalidate(&Invalidation { range: block.run(around), cause: Cause::Migrate, owner: None });
        let mut rest = *mapped;
        while let Some((run, device, first)) = next_frame_run(transit, &rest) {
            let Some(dst) = self.frame_addr(device, first) else { unreachable!("its range stays while it has pages") };
            let (done, stop) = self.unmap_run(ctx, transit, run, dst);
            for (i, n) in run.pages().zip(0..).take(done) {
                debug_assert_eq!(transit.place(i), Place::Device { device, pfn: first.add(n) });
                out.in_frames.insert(i);
                rest.remove(i);
            }
            let at = run.first + done;
            match stop {
                None => {}
                Some(Errno::AGAIN) => {
                    out.again = rest;
                    break;
                }
                Some(Errno::BUSY) => {
                    out.shared.insert(at);
                    rest.remove(at);
                }
                // Of a mapping that is unlike the frames, or dropped; or the frame's place has been filled by `mlockall`.
                Some(_) => {
                    let Place::Coherent { device, pfn } = transit.place(at) else {
                        unreachable!("only mapped pages are here")
                    };
                    transit.set(at, Place::Cpu);
                    self.free_frames(device, frame_run(pfn, 1));
                    out.as_they_are.insert(at);
                    rest.remove(at);
                }
            }
        }
        out
    }

    /// Moves the pages of a run to `dst`, the places of their frames. Returns how many went, and why it stopped.
    fn unmap_run(&self, ctx: &Ctx, transit: &mut Transit<'_>, run: Run, dst: VirtAddr) -> (usize, Option<Errno>) {
        let block = transit.block();
        let mut done = 0;
        while done < run.count {
            let rest = block.run(Run { first: run.first + done, count: run.count - done });
            let Ok(_inside) = self.gate.enter(ctx.slot) else { return (done, Some(Errno::AGAIN)) };
            let _registration = block.lock_registration();
            // What is at these addresses may have come there by a change that the books do not know yet.
            if self.is_changing() {
                return (done, Some(Errno::AGAIN));
            }
            let piece = match self.os.vma(rest.start()) {
                Ok(vma) => vma.and_then(|vma| vma.range.intersection(rest)).filter(|p| p.start() == rest.start()),
                Err(error) => return (done, Some(error)),
            };
            let Some(piece) = piece else { return (done, Some(Errno::AGAIN)) };
            if let Err(error) = self.os.register(piece, MANAGED) {
                return (done, Some(error));
            }
            let to = dst.add(done as u64 * PAGE_SIZE);
            let result = self.os.move_pages(to, piece.start(), piece.bytes(), SrcHoles::Fail, Wake::Later);
            let moved = usize::try_from(result.done / PAGE_SIZE).expect("a run is at most a block");
            for i in run.first + done..run.first + done + moved {
                let Place::Coherent { device, pfn } = transit.place(i) else {
                    unreachable!("only mapped pages are here")
                };
                transit.set(i, Place::Device { device, pfn });
            }
            done += moved;
            if moved == 0 {
                return (done, Some(result.stop.expect("a call without progress says why")));
            }
        }
        (done, None)
    }

    /// Gives pages of frames back to the kernel that were the program's, where they may not be filled anew (see
    /// [`crate::staging::Staging::recycles`]). The frames are nobody's but the caller's, and not mapped.
    pub(crate) fn renew_frames(&self, device: DeviceId, first: DevPfn, count: usize) {
        if self.staging.recycles() {
            return;
        }
        let place = self.frame_addr(device, first).map(|addr| PageRange::new(addr, count as u64 * PAGE_SIZE));
        if let Some(Ok(range)) = place {
            // First the registration, so that dropping the pages raises no event.
            let _ = self.os.unregister(range).and_then(|()| self.os.zap(range));
            let _ = self.os.register(range, RegisterMode::WP);
        }
    }

    /// Moves page `i` back into its frame for an operation of the device that no CPU thread may interleave with. Where it
    /// does not work out, whoever asks looks again.
    ///
    /// # Locking
    /// The caller holds no page and is outside the gate.
    pub(crate) fn unmap_for_device(&'static self, ctx: &mut Ctx, block: Block, i: usize) {
        let mut transit = Transit::new(block, self);
        let Ok(Place::Coherent { .. }) = transit.try_hold(i) else { return };
        let page: PageSet = [i].into_iter().collect();
        let out = self.unmap_frames(ctx, &mut transit, &page);
        if !out.as_they_are.is_empty() {
            block.set_history(i, self.ticks(), Why::Exclusive);
        }
        drop(transit);
        if !out.shared.is_empty() {
            let _ = self.os.populate_write(block.run(Run { first: i, count: 1 }));
        }
        if !out.again.is_empty() {
            self.settle_events(ctx, 0);
        }
    }
}
