//! Pages go: `MIGRATE_TO_DEV` and `EXCLUSIVE`.
//!
//! What a page held is noted before the command. After it the page must be where the command says, with these bytes,
//! and the program must have been given them.

use std::ffi::c_int;

use crate::{
    book::{Kind, Page},
    hash,
    judge::{self, Said},
    maps::Mapping,
    nodes::{Arguments, is_private},
    raw::{File, PAGE, Region, index},
    witness::{Before, LOOK_MAX, Witness, each_hash, look},
};

/// Present pages that one search looks at.
const SEARCHED_MAX: u64 = 256 * 1024;
/// Words of the page map that are read where the kernel does not skip what is empty.
const WORDS_MAX: u64 = 4 * 1024 * 1024;
/// Words that are read at once.
const CHUNK: usize = 512;

/// The part of a command's range that is looked at.
fn part(arguments: &Arguments) -> Option<(u64, usize)> {
    let (start, _) = arguments.range()?;
    Some((start, index(arguments.npages).min(LOOK_MAX)))
}

impl Witness {
    /// Before pages go.
    pub(crate) fn before_away(&mut self, arguments: &Arguments) -> bool {
        let Some((start, end)) = arguments.range() else { return false };
        self.known.insert(start, end);
        let Some((at, pages)) = part(arguments) else { return false };
        let noted = look().is_some_and(|look| self.note(&look, at, pages));
        if !noted {
            self.skip();
        }
        noted
    }

    /// After a command that failed: pages may have gone before it did.
    pub(crate) fn after_failed(&mut self, fd: c_int, node: u8, arguments: &Arguments) {
        let Some((at, pages)) = part(arguments) else { return };
        let Some(look) = look() else { return self.skip() };
        if !self.snapshot(fd, at, pages) || look.words(at / PAGE, &mut self.entries[..pages]) != pages {
            return;
        }
        for i in 0..pages {
            let kind = match Said::of(self.report[i]) {
                Said::Private => Kind::Private,
                Said::Coherent { is_own: true } => Kind::Coherent,
                _ => continue,
            };
            let (entry, hash) = (self.entries[i], self.before[i].hash);
            self.put(Page { at: at + i as u64 * PAGE, hash, entry, kind, node, is_home: false });
        }
    }

    /// After `MIGRATE_TO_DEV` has succeeded.
    pub(crate) fn after_migrate(&mut self, fd: c_int, node: u8, arguments: &Arguments) {
        let kind = if is_private(node) { Kind::Private } else { Kind::Coherent };
        let Some((at, pages)) = part(arguments) else { return };
        let Some(look) = look() else { return self.skip() };
        if look.words(at / PAGE, &mut self.entries[..pages]) != pages {
            return self.skip();
        }
        let is_reported = self.snapshot(fd, at, pages);
        for i in 0..pages {
            let (at, entry, said) = (at + i as u64 * PAGE, self.entries[i], Said::of(self.report[i]));
            let is_right = match kind {
                Kind::Coherent => said == Said::Coherent { is_own: true },
                Kind::Private | Kind::Exclusive | Kind::Inherited => said == Said::Private,
            };
            if is_reported && !is_right {
                let byte = self.report[i];
                self.violation(
                    "moved, and not reported as the device's",
                    at,
                    format_args!("node {node} says {byte:#04x}"),
                );
            }
            self.put(Page { at, hash: self.before[i].hash, entry, kind, node, is_home: false });
        }
        if kind == Kind::Private {
            self.expect_absent("still with the CPU after it moved to private memory", at, pages);
            self.find_in_device_memory(&look, at, pages);
            self.counts.moved += pages as u64;
        } else {
            self.expect_elsewhere(at, pages, node);
            self.counts.coherent += pages as u64;
        }
        self.expect_given(arguments, pages);
        self.read_again(fd, arguments);
    }

    /// After `EXCLUSIVE` has succeeded.
    pub(crate) fn after_exclusive(&mut self, node: u8, arguments: &Arguments) {
        let Some((at, pages)) = part(arguments) else { return };
        let Some(look) = look() else { return self.skip() };
        if look.words(at / PAGE, &mut self.entries[..pages]) != pages {
            return self.skip();
        }
        self.expect_absent("still with the CPU while a device has it for itself", at, pages);
        self.find_set_aside(&look, at, pages, arguments.ptr);
        self.expect_given(arguments, pages);
        for i in 0..pages {
            let (hash, entry) = (self.before[i].hash, self.entries[i]);
            self.put(Page { at: at + i as u64 * PAGE, hash, entry, kind: Kind::Exclusive, node, is_home: false });
        }
        self.counts.exclusive += pages as u64;
    }

    /// After a program asked whether pages are a device's alone: if some are, the CPU does not have them all.
    pub(crate) fn after_check_exclusive(&mut self, is_exclusive: bool, arguments: &Arguments) {
        let Some((at, pages)) = part(arguments) else { return };
        let Some(look) = look() else { return self.skip() };
        if !is_exclusive || look.words(at / PAGE, &mut self.entries[..pages]) != pages {
            return;
        }
        if self.entries[..pages].iter().all(|&entry| judge::is_present(entry)) {
            self.violation("said to be a device's alone, and the CPU has all of it", at, format_args!("{pages} pages"));
        }
    }

    fn expect_absent(&mut self, what: &str, at: u64, pages: usize) {
        for i in 0..pages {
            let entry = self.entries[i];
            if judge::is_present(entry) {
                self.violation(what, at + i as u64 * PAGE, format_args!("page map {entry:#x}"));
            }
        }
    }

    /// Present, in another physical page than before, with the same bytes.
    ///
    /// A device that first gives a page another one (written pages of a private file mapping get an anonymous one) frees the old, and
    /// the kernel may hand that out again, as the device's memory. So a few of many pages may have the one that they had.
    fn expect_elsewhere(&mut self, at: u64, pages: usize, node: u8) {
        let stays = |before: Before, entry| {
            let was_there = before.coherent == node + 1;
            !was_there && judge::frame(entry).is_some_and(|frame| judge::frame(before.entry) == Some(frame))
        };
        let stay = (0..pages).filter(|&i| stays(self.before[i], self.entries[i])).count();
        for i in 0..pages {
            let (at, before, entry) = (at + i as u64 * PAGE, self.before[i], self.entries[i]);
            if !judge::is_present(entry) {
                self.violation(
                    "not with the CPU after it moved to coherent memory",
                    at,
                    format_args!("page map {entry:#x}"),
                );
            }
            if stay > pages / 64 && stays(before, entry) {
                self.violation("in the same physical page after it moved", at, format_args!("page map {entry:#x}"));
            }
        }
        self.expect_bytes("changed by moving to coherent memory", at, pages);
    }

    /// Those pages that are present by `entries` have the bytes that were noted.
    fn expect_bytes(&mut self, what: &str, at: u64, pages: usize) {
        let Self { before, entries, missing, bytes, .. } = self;
        missing[..pages].fill(false);
        let is_wanted = |i: usize| judge::is_present(entries[i]) && before[i].hash.is_some();
        each_hash(bytes, at, pages, is_wanted, |i, hash| missing[i] = before[i].hash != Some(hash));
        self.report_missing(what, at, pages);
    }

    /// The program has been given the bytes that were noted. It was written just now, so to read there brings nothing in.
    fn expect_given(&mut self, arguments: &Arguments, pages: usize) {
        let Self { before, missing, bytes, .. } = self;
        missing[..pages].fill(false);
        let is_wanted = |i: usize| before[i].hash.is_some();
        each_hash(bytes, arguments.ptr, pages, is_wanted, |i, hash| missing[i] = before[i].hash != Some(hash));
        self.report_missing("the program was given other bytes than were there", arguments.addr, pages);
    }

    pub(crate) fn report_missing(&mut self, what: &str, at: u64, pages: usize) {
        let missing = &self.missing[..pages];
        let Some(first) = missing.iter().position(|&missing| missing) else { return };
        let count = missing.iter().filter(|&&missing| missing).count();
        self.violation(what, at + first as u64 * PAGE, format_args!("the first of {count} pages"));
    }

    /// The bytes of pages that moved are in a device's memory: each in a page of its own, of what is resident there.
    fn find_in_device_memory(&mut self, look: &File, at: u64, pages: usize) {
        let Self { before, wanted, maps, bytes, regions, missing, .. } = self;
        wanted.clear();
        for (i, note) in before[..pages].iter().enumerate() {
            note.hash.filter(|&hash| hash != hash::ZEROS).into_iter().for_each(|hash| wanted.add(hash, i));
        }
        if wanted.is_empty() {
            return;
        }
        wanted.sort();
        if !maps.read() {
            return self.skip();
        }
        let mut budget = SEARCHED_MAX;
        let mut has_memory = false;
        for mapping in maps.all().iter().filter(|mapping| mapping.is_device) {
            has_memory = true;
            each_present(look, regions, mapping.start, mapping.end, &mut budget, |start, end| {
                each_hash(bytes, start, index((end - start) / PAGE), |_| true, |_, hash| wanted.saw(hash));
            });
        }
        missing[..pages].fill(false);
        wanted.each_missing(|i| missing[i] = true);
        if budget == 0 {
            self.skip();
        } else if has_memory {
            self.report_missing("moved, and its bytes are in no device's memory", at, pages);
        } else {
            self.violation("moved, and no device's memory is mapped", at, format_args!("{pages} pages"));
        }
    }

    /// Pages that were taken from the CPU are mapped elsewhere, by their physical pages; or at least their bytes are.
    fn find_set_aside(&mut self, look: &File, at: u64, pages: usize, ptr: u64) {
        let own = (&raw const *self).addr() as u64;
        let len = pages as u64 * PAGE;
        let elsewhere = [(at, at + len), (ptr, ptr + len), (own, own + size_of::<Self>() as u64)];
        let Self { before, wanted, maps, bytes, regions, missing, .. } = self;
        if !maps.read() {
            return self.skip();
        }
        missing[..pages].fill(false);
        wanted.clear();
        for (i, note) in before[..pages].iter().enumerate() {
            let frame = judge::frame(note.entry);
            // A page of zeros may be the one that all share.
            let has_bytes = note.hash.is_some_and(|hash| hash != hash::ZEROS);
            missing[i] = has_bytes && frame.is_none();
            frame.filter(|_| has_bytes).into_iter().for_each(|frame| wanted.add(frame, i));
        }
        wanted.sort();
        let mut budget = SEARCHED_MAX;
        if !wanted.is_empty() {
            for mapping in maps.all().iter().filter(|mapping| mapping.is_anonymous) {
                each_present(look, regions, mapping.start, mapping.end, &mut budget, |start, end| {
                    each_frame(look, start, end, |at, frame| {
                        if !lies_in(at, &elsewhere) {
                            wanted.saw(frame);
                        }
                    });
                });
            }
            wanted.each_missing(|i| missing[i] = true);
        }
        // A page that was shared before is copied on its way.
        wanted.clear();
        for (i, note) in before[..pages].iter().enumerate() {
            note.hash.filter(|_| missing[i]).into_iter().for_each(|hash| wanted.add(hash, i));
        }
        if wanted.is_empty() {
            return;
        }
        wanted.sort();
        let is_searched = |mapping: &&Mapping| mapping.is_readable && (mapping.is_anonymous || mapping.is_device);
        for mapping in maps.all().iter().filter(is_searched) {
            each_present(look, regions, mapping.start, mapping.end, &mut budget, |start, end| {
                let pages = index((end - start) / PAGE);
                let is_wanted = |i: usize| !lies_in(start + i as u64 * PAGE, &elsewhere);
                each_hash(bytes, start, pages, is_wanted, |_, hash| wanted.saw(hash));
            });
        }
        missing[..pages].fill(false);
        wanted.each_missing(|i| missing[i] = true);
        if budget == 0 {
            self.skip();
        } else {
            self.report_missing("taken from the CPU, and neither its page nor its bytes are set aside", at, pages);
        }
    }
}

/// Whether a page touches one of some ranges.
fn lies_in(at: u64, ranges: &[(u64, u64)]) -> bool {
    ranges.iter().any(|&(start, end)| at + PAGE > start && at < end)
}

/// Calls with each stretch of present pages in `[start, end)`, until the budget of pages is used up. Nothing is brought in.
fn each_present(
    look: &File,
    regions: &mut [Region],
    start: u64,
    end: u64,
    budget: &mut u64,
    mut stretch_fn: impl FnMut(u64, u64),
) {
    let mut at = start;
    while at < end && *budget != 0 {
        let Ok((found, walked)) = look.present(at, end, regions) else {
            return each_present_by_words(look, at, end, budget, stretch_fn);
        };
        for region in &regions[..found] {
            let len = ((region.end - region.start) / PAGE).min(*budget);
            *budget -= len;
            if len != 0 {
                stretch_fn(region.start, region.start + len * PAGE);
            }
        }
        if walked <= at {
            return;
        }
        at = walked;
    }
}

/// The same on kernels that do not scan.
fn each_present_by_words(look: &File, start: u64, end: u64, budget: &mut u64, mut stretch_fn: impl FnMut(u64, u64)) {
    let mut words = [0; CHUNK];
    let end = end.min(start.saturating_add(WORDS_MAX * PAGE));
    let mut at = start;
    while at < end && *budget != 0 {
        let pages = index((end - at) / PAGE).min(CHUNK);
        let read = look.words(at / PAGE, &mut words[..pages]);
        if read == 0 {
            return;
        }
        for (i, _) in words[..read].iter().enumerate().filter(|(_, word)| judge::is_present(**word)) {
            if *budget == 0 {
                return;
            }
            *budget -= 1;
            let at = at + i as u64 * PAGE;
            stretch_fn(at, at + PAGE);
        }
        at += read as u64 * PAGE;
    }
}

/// Calls with the address and the physical page of each page of `[start, end)` that has one.
fn each_frame(look: &File, start: u64, end: u64, mut frame_fn: impl FnMut(u64, u64)) {
    let mut words = [0; CHUNK];
    let mut at = start;
    while at < end {
        let pages = index((end - at) / PAGE).min(CHUNK);
        let read = look.words(at / PAGE, &mut words[..pages]);
        if read == 0 {
            return;
        }
        for (i, &word) in words[..read].iter().enumerate() {
            if let Some(frame) = judge::frame(word) {
                frame_fn(at + i as u64 * PAGE, frame);
            }
        }
        at += read as u64 * PAGE;
    }
}
