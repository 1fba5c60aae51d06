//! Pages come home by a command or by the end of a device, and devices read and write them while they are away.

use std::ffi::c_int;

use crate::{
    book::{Kind, Page},
    hash::{self, PAGE_LEN},
    judge::{self, Said},
    nodes::{self, Arguments, is_private},
    raw::{File, PAGE, index},
    witness::{LOOK_MAX, Witness, each_hash, look},
};

/// All addresses.
pub(crate) const EVERYWHERE: (u64, u64) = (0, u64::MAX);

impl Witness {
    /// Before pages of a node come home: notes where they are. How many are away.
    pub(crate) fn before_home(&mut self, node: u8, range: (u64, u64)) -> u64 {
        let Some(look) = look() else {
            self.skip();
            return 0;
        };
        let Self { book, bytes, .. } = self;
        let mut away = 0;
        for page in book.pages_mut().iter_mut().filter(|page| is_concerned(page, node, range)) {
            let mut entry = [0];
            look.words(page.at / PAGE, &mut entry);
            page.entry = entry[0];
            // What the CPU reaches it may have changed.
            if judge::is_present(page.entry) {
                page.hash = None;
                each_hash(bytes, page.at, 1, |_| true, |_, hash| page.hash = Some(hash));
            }
            away += 1;
        }
        away
    }

    /// After pages of a node came home: all of them, or those that the device does not report as its own any more.
    pub(crate) fn after_home(&mut self, node: u8, range: (u64, u64), stays: Option<c_int>) {
        if self.book.pages().is_empty() {
            return;
        }
        let Some(look) = look() else { return self.skip() };
        if !self.maps.read() {
            return self.skip();
        }
        for i in 0..self.book.pages().len() {
            let page = self.book.pages()[i];
            if is_concerned(&page, node, range) && self.is_readable(page.at) {
                let is_home = self.expect_home(&look, node, page, stays);
                self.book.pages_mut()[i].is_home = is_home;
            }
        }
        self.book.drop_home();
    }

    /// Pages of mappings that the program may not read can stay where they are.
    fn is_readable(&self, at: u64) -> bool {
        self.maps.find(at).is_some_and(|mapping| mapping.is_readable)
    }

    /// One page came home, as it left. Whether it did.
    fn expect_home(&mut self, look: &File, node: u8, page: Page, stays: Option<c_int>) -> bool {
        let at = page.at;
        let mut entry = [0];
        look.words(at / PAGE, &mut entry);
        let [entry] = entry;
        if let Some(fd) = stays
            && self.snapshot(fd, at, 1)
            && matches!(Said::of(self.report[0]), Said::Private | Said::Coherent { is_own: true })
        {
            return false;
        }
        self.counts.home += 1;
        if !judge::is_present(entry) {
            // A page of zeros need not be there to be read.
            if page.hash.is_some_and(|hash| hash != hash::ZEROS) {
                self.violation("not with the CPU after its device let go of it", at, format_args!("node {node}"));
            }
            return true;
        }
        let mut now = None;
        each_hash(&mut self.bytes, at, 1, |_| true, |_, hash| now = Some(hash));
        if page.hash.is_some() && now != page.hash {
            self.violation("came home with other bytes than it left with", at, format_args!("node {node}"));
        }
        let before = judge::frame(page.entry);
        if page.kind == Kind::Coherent && before.is_some() && judge::frame(entry) == before {
            self.violation("came home and is in the device's physical page", at, format_args!("page map {entry:#x}"));
        }
        true
    }

    /// Before a device reads or writes: which pages of the range are away, into `before`.
    pub(crate) fn before_access(&mut self, arguments: &Arguments) -> bool {
        let Some((start, end)) = arguments.range() else { return false };
        self.known.insert(start, end);
        let pages = index(arguments.npages).min(LOOK_MAX);
        let is_concerned = |page: &Page| page.at >= start && page.at < end;
        if !self.book.pages().iter().any(is_concerned) {
            return false;
        }
        let noted = look().is_some_and(|look| self.note(&look, start, pages));
        if !noted {
            self.skip();
        }
        noted
    }

    /// After a device has read: what was away and is so still has the bytes that it left with.
    pub(crate) fn after_read(&mut self, arguments: &Arguments) {
        let Some((at, _)) = arguments.range() else { return };
        let pages = index(arguments.npages).min(LOOK_MAX);
        let Some(look) = look() else { return self.skip() };
        if look.words(at / PAGE, &mut self.entries[..pages]) != pages {
            return self.skip();
        }
        let Self { before, entries, missing, bytes, counts, .. } = self;
        missing[..pages].fill(false);
        let is_wanted = |i: usize| {
            let was_away = before[i].is_away && !judge::is_present(before[i].entry);
            was_away && before[i].hash.is_some() && !judge::is_present(entries[i])
        };
        each_hash(bytes, arguments.ptr, pages, is_wanted, |i, hash| {
            missing[i] = before[i].hash != Some(hash);
            counts.read += 1;
        });
        self.report_missing("a device read other bytes than were there", at, pages);
    }

    /// After a device has read, written or got pages: it has translations now. So the same read again takes no fault, changes
    /// nothing, and gives the bytes that the program has at `ptr`.
    pub(crate) fn read_again(&mut self, fd: c_int, arguments: &Arguments) {
        let Some((at, _)) = arguments.range() else { return };
        let pages = index(arguments.npages).min(self.bytes.len() / PAGE_LEN);
        let Ok(faults) = nodes::read(fd, at, pages as u64, self.bytes.as_mut_ptr()) else {
            return self.violation(
                "cannot be read again by the device that just did",
                at,
                format_args!("{pages} pages"),
            );
        };
        if faults != 0 {
            self.violation("the device has no translation of what it just used", at, format_args!("{faults} faults"));
        }
        let Self { before, bytes, missing, counts, .. } = self;
        let hashes = hash::pages(&bytes[..pages * PAGE_LEN]);
        before.iter_mut().zip(hashes).for_each(|(note, hash)| note.hash = Some(hash));
        missing[..pages].fill(false);
        each_hash(bytes, arguments.ptr, pages, |_| true, |i, hash| missing[i] = before[i].hash != Some(hash));
        counts.read += pages as u64;
        self.report_missing("a device read other bytes than it gave or took", at, pages);
    }

    /// After a device has written, or tried to: what is known of the bytes of pages that are away.
    pub(crate) fn after_write(&mut self, is_done: bool, arguments: &Arguments) {
        let Some((start, end)) = arguments.range() else { return };
        let Self { book, bytes, .. } = self;
        for page in book.pages_mut().iter_mut().filter(|page| page.at >= start && page.at < end) {
            page.hash = None;
            if is_done {
                let from = arguments.ptr + (page.at - start);
                each_hash(bytes, from, 1, |_| true, |_, hash| page.hash = Some(hash));
            }
        }
    }
}

/// Whether a page is with a node, and in a range.
fn is_concerned(page: &Page, node: u8, range: (u64, u64)) -> bool {
    let kind = if is_private(node) { Kind::Private } else { Kind::Coherent };
    page.node == node && page.kind == kind && range.0 <= page.at && page.at < range.1
}
