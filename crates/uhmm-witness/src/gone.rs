//! Mappings change: what a device knew of them must not outlive them.
//!
//! Devices are asked only what has no effect on one that answers right: a snapshot, or a command that must fail.

use std::ffi::c_int;

use crate::{
    judge::Said,
    nodes::{self, NODES},
    raw::{PAGE, index},
    witness::{LOOK_MAX, Witness},
};

/// What a device must not do.
#[derive(Debug, Clone, Copy)]
enum Deed {
    Read,
    Write,
}

/// Whole pages that a range of bytes touches.
pub(crate) fn pages(start: u64, len: u64) -> Option<(u64, u64)> {
    let end = start.checked_add(len)?.checked_next_multiple_of(PAGE)?;
    (start.is_multiple_of(PAGE) && start < end).then_some((start, end))
}

impl Witness {
    /// After `[start, end)` was unmapped.
    pub(crate) fn after_unmap(&mut self, start: u64, end: u64) {
        self.book.remove(start, end);
        let mut at = start;
        while let Some((from, to)) = self.known.first_in(at, end) {
            self.expect_unmapped(from, to);
            at = to;
        }
        self.known.remove(start, end);
    }

    /// No device knows of pages that are not mapped, nor reads there.
    fn expect_unmapped(&mut self, start: u64, end: u64) {
        let pages = index((end - start) / PAGE).min(LOOK_MAX);
        for node in 0..NODES {
            let Some(fd) = nodes::fd(node) else { continue };
            if !self.maps.read() {
                return self.skip();
            }
            self.missing.fill(false);
            for i in 0..pages {
                self.missing[i] = self.maps.find(start + i as u64 * PAGE).is_none();
            }
            if !self.snapshot(fd, start, pages) {
                continue;
            }
            // Another thread, or the library under test, may have mapped something there.
            if !self.maps.read() {
                return self.skip();
            }
            let mut first = None;
            for i in 0..pages {
                let (at, byte) = (start + i as u64 * PAGE, self.report[i]);
                if !self.missing[i] || self.maps.find(at).is_some() {
                    continue;
                }
                first = first.or(Some(at));
                if Said::of(byte) != Said::Error {
                    self.violation("unmapped, and a device knows it", at, format_args!("node {node} says {byte:#04x}"));
                }
                self.counts.unmapped += 1;
            }
            if let Some(at) = first {
                self.expect_refused(fd, Deed::Read, at, libc::EFAULT, "read by a device after it was unmapped");
            }
        }
    }

    /// A command to one page that must fail.
    fn expect_refused(&mut self, fd: c_int, deed: Deed, at: u64, errno: c_int, what: &str) {
        let buffer = self.bytes.as_mut_ptr();
        let answer = match deed {
            Deed::Read => nodes::read(fd, at, 1, buffer).map(drop),
            Deed::Write => nodes::write(fd, at, 1, buffer),
        };
        if answer != Err(errno) {
            let (answer, node) = (answer.err().unwrap_or(0), nodes::node(fd).unwrap_or(NODES));
            self.violation(what, at, format_args!("node {node}: errno {answer} where {errno} was due"));
        }
    }

    /// After `[start, end)` was protected.
    pub(crate) fn after_protect(&mut self, start: u64, end: u64, prot: c_int) {
        let (deed, errno, what) = if prot == libc::PROT_NONE {
            (Deed::Read, libc::EFAULT, "read by a device where the program may not")
        } else if prot & libc::PROT_READ != 0 && prot & libc::PROT_WRITE == 0 {
            (Deed::Write, libc::EPERM, "written by a device where the program may not")
        } else {
            return;
        };
        let Some((at, to)) = self.known.first_in(start, end) else { return };
        for node in 0..NODES {
            if let Some(fd) = nodes::fd(node) {
                for at in [at, to - PAGE] {
                    self.expect_refused(fd, deed, at, errno, what);
                    self.counts.protected += 1;
                }
            }
        }
    }

    /// After the bytes of `[start, end)` were dropped: no device has any.
    pub(crate) fn after_drop(&mut self, start: u64, end: u64) {
        self.book.remove(start, end);
        let mut at = start;
        while let Some((from, to)) = self.known.first_in(at, end) {
            let pages = index((to - from) / PAGE).min(LOOK_MAX);
            for node in 0..NODES {
                if let Some(fd) = nodes::fd(node)
                    && self.snapshot(fd, from, pages)
                {
                    self.expect_dropped(node, from, pages);
                }
            }
            at = to;
        }
    }

    fn expect_dropped(&mut self, node: u8, start: u64, pages: usize) {
        for i in 0..pages {
            let (at, byte) = (start + i as u64 * PAGE, self.report[i]);
            if !matches!(Said::of(byte), Said::Error | Said::Nothing | Said::Host) {
                self.violation("dropped, and a device has it", at, format_args!("node {node} says {byte:#04x}"));
            }
            self.counts.dropped += 1;
        }
    }

    /// After a mapping moved from `[old, old + old_len)` to `[new, new + new_len)`, or changed its size in place.
    pub(crate) fn after_remap(&mut self, old: (u64, u64), new: (u64, u64), leaves_old: bool) {
        let moved = (old.1 - old.0).min(new.1 - new.0);
        if new.0 != old.0 {
            self.book.remove(new.0, new.1);
            if !self.book.rename(old.0, moved, new.0) {
                self.forget();
            }
            let mut at = old.0;
            while let Some((from, to)) = self.known.first_in(at, old.0 + moved) {
                self.known.insert(from - old.0 + new.0, to - old.0 + new.0);
                at = to;
            }
            if leaves_old {
                self.book.remove(old.0, old.1);
            } else {
                self.after_unmap(old.0, old.1);
            }
        } else if new.1 < old.1 {
            self.after_unmap(new.1, old.1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_bytes_are_whole_pages() {
        assert_eq!(pages(0x1000, 1), Some((0x1000, 0x2000)));
        assert_eq!(pages(0x1000, 0x1001), Some((0x1000, 0x3000)));
        assert_eq!(pages(0x1001, 1), None);
        assert_eq!(pages(0x1000, 0), None);
        assert_eq!(pages(0x1000, u64::MAX), None);
    }
}
