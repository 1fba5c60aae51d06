//! What the witness remembers: pages that are with a device, and ranges that were ever given to one.
//!
//! Both are arrays of a fixed size: nothing here allocates.

use crate::raw::PAGE;

/// Pages that can be remembered: 128 MiB.
const PAGES_MAX: usize = 32 * 1024;
/// Ranges that can be remembered.
const RANGES_MAX: usize = 256;

/// In which way a page is with a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// In memory that the CPU does not reach.
    Private,
    /// In memory that the CPU reaches.
    Coherent,
    /// Taken away from the CPU, wherever its bytes are.
    Exclusive,
    /// It was with a device of the process that this one was forked from.
    Inherited,
}

/// A page that is with a device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Page {
    /// Its address.
    pub(crate) at: u64,
    /// Its bytes, where they are known.
    pub(crate) hash: Option<u64>,
    /// Its word in the page map, from the look that a check begins with.
    pub(crate) entry: u64,
    /// How it is away.
    pub(crate) kind: Kind,
    /// Which node has it.
    pub(crate) node: u8,
    /// Seen to be home again.
    pub(crate) is_home: bool,
}

impl Page {
    const NONE: Self = Self { at: 0, hash: None, entry: 0, kind: Kind::Private, node: 0, is_home: false };
}

/// Pages that are with devices, by address.
#[derive(Debug)]
pub(crate) struct Book {
    len: usize,
    pages: [Page; PAGES_MAX],
}

impl Book {
    pub(crate) const fn new() -> Self {
        Self { len: 0, pages: [Page::NONE; PAGES_MAX] }
    }

    pub(crate) fn pages(&self) -> &[Page] {
        &self.pages[..self.len]
    }

    pub(crate) fn pages_mut(&mut self) -> &mut [Page] {
        &mut self.pages[..self.len]
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// Where the first page at or behind an address stands.
    fn position(&self, at: u64) -> usize {
        self.pages().partition_point(|page| page.at < at)
    }

    pub(crate) fn get(&self, at: u64) -> Option<&Page> {
        self.pages().get(self.position(at)).filter(|page| page.at == at)
    }

    pub(crate) fn get_mut(&mut self, at: u64) -> Option<&mut Page> {
        let position = self.position(at);
        self.pages_mut().get_mut(position).filter(|page| page.at == at)
    }

    /// Remembers a page, or says that there is no room for it.
    #[must_use]
    pub(crate) fn put(&mut self, page: Page) -> bool {
        if let Some(known) = self.get_mut(page.at) {
            *known = page;
            return true;
        }
        if self.len == PAGES_MAX {
            return false;
        }
        let position = self.position(page.at);
        self.pages.copy_within(position..self.len, position + 1);
        self.pages[position] = page;
        self.len += 1;
        true
    }

    /// Forgets the pages of `[start, end)`.
    pub(crate) fn remove(&mut self, start: u64, end: u64) {
        let (from, to) = (self.position(start), self.position(end));
        if from < to {
            self.pages.copy_within(to..self.len, from);
            self.len -= to - from;
        }
    }

    /// Forgets those that are home.
    pub(crate) fn drop_home(&mut self) {
        let mut kept = 0;
        for i in 0..self.len {
            if !self.pages[i].is_home {
                self.pages[kept] = self.pages[i];
                kept += 1;
            }
        }
        self.len = kept;
    }

    /// How many pages from the given one on lie side by side, at most `max`.
    pub(crate) fn run(&self, first: usize, max: usize) -> usize {
        let rest = self.pages().get(first..).unwrap_or_default();
        let breaks = rest.windows(2).position(|pair| pair[0].at + PAGE != pair[1].at);
        breaks.map_or(rest.len(), |at| at + 1).min(max)
    }

    /// Moves what is known of `[old, old + len)` to another address. Says no where there is no room.
    #[must_use]
    pub(crate) fn rename(&mut self, old: u64, len: u64, new: u64) -> bool {
        self.remove(new, new + len);
        let mut all = true;
        while let Some(page) = self.pages().get(self.position(old)).copied().filter(|page| page.at < old + len) {
            self.remove(page.at, page.at + PAGE);
            all &= self.put(Page { at: page.at - old + new, ..page });
        }
        all
    }
}

/// A set of addresses, as ranges that neither touch nor overlap, in order.
#[derive(Debug)]
pub(crate) struct Ranges {
    len: usize,
    ranges: [(u64, u64); RANGES_MAX],
}

impl Ranges {
    pub(crate) const fn new() -> Self {
        Self { len: 0, ranges: [(0, 0); RANGES_MAX] }
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    fn all(&self) -> &[(u64, u64)] {
        &self.ranges[..self.len]
    }

    /// Adds `[start, end)`. Where there is no room for it, it is left out.
    pub(crate) fn insert(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let from = self.all().partition_point(|range| range.1 < start);
        let to = self.all().partition_point(|range| range.0 <= end);
        let merged =
            self.all()[from..to].iter().fold((start, end), |all, range| (all.0.min(range.0), all.1.max(range.1)));
        self.splice(from, to, &[merged]);
    }

    /// Takes `[start, end)` out.
    pub(crate) fn remove(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let from = self.all().partition_point(|range| range.1 <= start);
        let to = self.all().partition_point(|range| range.0 < end);
        if from == to {
            return;
        }
        let (left, right) = ((self.ranges[from].0, start), (end, self.ranges[to - 1].1));
        match (left.0 < left.1, right.0 < right.1) {
            (true, true) => self.splice(from, to, &[left, right]),
            (true, false) => self.splice(from, to, &[left]),
            (false, true) => self.splice(from, to, &[right]),
            (false, false) => self.splice(from, to, &[]),
        }
    }

    fn splice(&mut self, from: usize, to: usize, with: &[(u64, u64)]) {
        let len = self.len - (to - from) + with.len();
        if len > RANGES_MAX {
            return;
        }
        self.ranges.copy_within(to..self.len, from + with.len());
        self.ranges[from..from + with.len()].copy_from_slice(with);
        self.len = len;
    }

    /// The first part of `[start, end)` that is in the set.
    pub(crate) fn first_in(&self, start: u64, end: u64) -> Option<(u64, u64)> {
        let at = self.all().partition_point(|range| range.1 <= start);
        let &(from, to) = self.all().get(at)?;
        let (from, to) = (from.max(start), to.min(end));
        (from < to).then_some((from, to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(n: u64) -> Page {
        Page { at: n * PAGE, hash: Some(n), ..Page::NONE }
    }

    fn numbers(book: &Book) -> Vec<u64> {
        book.pages().iter().map(|page| page.at / PAGE).collect()
    }

    /// The arrays are too large for a test's stack.
    fn book(pages: &[u64]) -> &'static mut Book {
        let book = Box::leak(Box::new(const { Book::new() }));
        for &n in pages {
            assert!(book.put(page(n)));
        }
        book
    }

    #[test]
    fn pages_are_kept_in_order_and_once() {
        let book = book(&[5, 1, 3, 5, 4]);
        assert_eq!(numbers(book), [1, 3, 4, 5]);
        assert_eq!(book.get(3 * PAGE).unwrap().hash, Some(3));
        assert!(book.get(2 * PAGE).is_none());
        book.remove(3 * PAGE, 5 * PAGE);
        assert_eq!(numbers(book), [1, 5]);
    }

    #[test]
    fn runs_lie_side_by_side() {
        let book = book(&[1, 2, 3, 7, 8, 20]);
        assert_eq!(book.run(0, 100), 3);
        assert_eq!(book.run(0, 2), 2);
        assert_eq!(book.run(3, 100), 2);
        assert_eq!(book.run(5, 100), 1);
    }

    #[test]
    fn what_is_home_is_forgotten() {
        let book = book(&[1, 2, 3]);
        book.get_mut(2 * PAGE).unwrap().is_home = true;
        book.drop_home();
        assert_eq!(numbers(book), [1, 3]);
    }

    #[test]
    fn pages_move_with_their_mapping() {
        let book = book(&[1, 2, 3, 4, 10, 11]);
        assert!(book.rename(2 * PAGE, 2 * PAGE, 10 * PAGE));
        assert_eq!(numbers(book), [1, 4, 10, 11]);
        assert_eq!(book.get(10 * PAGE).unwrap().hash, Some(2));
    }

    #[test]
    fn a_full_book_says_so() {
        let book = book(&[]);
        for n in 0..PAGES_MAX {
            assert!(book.put(page(n as u64)));
        }
        assert!(!book.put(page(PAGES_MAX as u64)));
        assert!(book.put(page(7)), "one that it has");
    }

    #[test]
    fn ranges_agree_with_a_set_of_numbers() {
        let mut model = std::collections::BTreeSet::new();
        let mut ranges = Ranges::new();
        let mut state = 1_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..2000 {
            let start = random(60);
            let end = start + random(9);
            if random(2) == 0 {
                ranges.insert(start, end);
                model.extend(start..end);
            } else {
                ranges.remove(start, end);
                model.retain(|n| !(start..end).contains(n));
            }
            let held: Vec<u64> = ranges.all().iter().flat_map(|range| range.0..range.1).collect();
            assert_eq!(held, model.iter().copied().collect::<Vec<_>>());
            assert!(ranges.all().windows(2).all(|pair| pair[0].1 < pair[1].0), "neither touch nor overlap");
            let (from, to) = (random(60), random(70));
            let first = ranges.first_in(from, to).map(|range| range.0);
            assert_eq!(first, (from..to).find(|n| model.contains(n)));
        }
    }
}
