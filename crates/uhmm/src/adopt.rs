//! Written pages of private file mappings become anonymous memory.
//!
//! A page of such a mapping that was written is a copy of the process's own, and the kernel's HMM migrates it. No userfaultfd
//! takes the mapping that it is in, so here it gets another one: anonymous memory with the same bytes takes its place.
//!
//! ```text
//!   file mapping:  F F w w w F        F: the file's page, w: written
//!                      | copy
//!                  F F A A A F        A: anonymous, put in place by one mremap
//! ```
//!
//! # What is different afterwards
//! `/proc/self/maps` shows more mappings; and where the file is cut short, the pages stay, where the kernel would take them
//! away.
//!
//! # Kernel
//! `migrate_vma_setup(9)` takes anonymous pages of any private mapping.

use uhmm_sys::{
    Errno,
    addr::{BLOCK_SIZE, PageRange},
    arena,
    maps::{Backing, Prot, Sharing, Vma},
    mem::HostBytes,
    pagemap::Page,
};

use crate::{
    device::{Cause, Invalidation},
    engine::Core,
    os::Os,
    page_set::PageSet,
    thread::Ctx,
};

/// Whether pages of a mapping can be adopted.
fn is_adoptable(vma: &Vma) -> bool {
    vma.sharing == Sharing::Private
        && vma.backing == Backing::File
        && vma.page_size == uhmm_sys::addr::PAGE_SIZE
        && vma.prot.contains(Prot::READ | Prot::WRITE)
}

impl<O: Os> Core<O> {
    /// See [`crate::Mm::make_anonymous`].
    pub(crate) fn make_anonymous(&self, ctx: &mut Ctx, range: PageRange) -> Result<usize, Errno> {
        self.refresh_excluded(ctx);
        let mut scratch = self.scratch.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let scratch = match *scratch {
            Some(pages) => pages,
            None => *scratch.insert(arena::pages(BLOCK_SIZE, BLOCK_SIZE)?),
        };
        let mut adopted = 0;
        for part in range.iter_blocks() {
            let mut at = part.start();
            while let Ok(rest) = PageRange::from_ends(at, part.end()) {
                let vma = self.os.vma(at)?;
                let Some((vma, piece)) = vma.and_then(|v| v.range.intersection(rest).map(|piece| (v, piece))) else {
                    break;
                };
                // Locked memory would not be locked any more.
                if is_adoptable(&vma) && !self.os.is_locked(piece) {
                    adopted += self.adopt_written(ctx, &vma, piece, scratch)?;
                }
                at = piece.end();
            }
        }
        Ok(adopted)
    }

    /// Adopts the written pages of a piece of one block. Returns how many those were.
    fn adopt_written(&self, ctx: &Ctx, vma: &Vma, piece: PageRange, scratch: PageRange) -> Result<usize, Errno> {
        let mut pages = [Page::empty(); uhmm_sys::addr::BLOCK_PAGES];
        let pages = &mut pages[..piece.pages()];
        self.os.scan(piece, pages)?;
        let is_own = |page: Page| page.contains(Page::PRESENT) && !page.intersects(Page::FILE | Page::ZERO);
        let own = piece.iter_pages().zip(pages.iter()).filter(|(_, page)| is_own(**page));
        let mut own: PageSet = own.map(|(addr, _)| addr.page_in_block()).collect();
        // What the engine's own code uses stays as it is.
        ctx.excluded.touching(piece, |range| own = own.minus(&PageSet::of(range)));
        let block = PageRange::block_of(piece.start()).start();
        let mut adopted = 0;
        for run in own.runs() {
            let bytes = run.count as u64 * uhmm_sys::addr::PAGE_SIZE;
            let of = |base: uhmm_sys::addr::VirtAddr| {
                PageRange::new(base.add(run.first as u64 * uhmm_sys::addr::PAGE_SIZE), bytes).expect("part of a block")
            };
            let (target, copy) = (of(block), of(scratch.start()));
            let host = HostBytes::in_arena(copy.start(), bytes).expect("pages that the arena handed out");
            // Before the copy: what a device stores behind it would be lost.
            let change = self.changes.announce(target);
            drop(self.invalidate(&Invalidation { range: target, cause: Cause::Unmap, owner: None }));
            let copied = self.os.read(target.start(), host).done == bytes;
            let mut done = if copied { self.os.lift(copy, target) } else { Ok(()) };
            if copied && done.is_ok() && vma.prot != Prot::READ | Prot::WRITE {
                done = self.os.protect(target, vma.prot);
            }
            if let Some(number) = change {
                self.changes.over(number);
            }
            done?;
            adopted += if copied { run.count } else { 0 };
        }
        Ok(adopted)
    }
}
