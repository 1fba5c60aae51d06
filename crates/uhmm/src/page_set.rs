//! A set of pages of one block, and its runs.

use uhmm_sys::addr::{BLOCK_PAGES, PAGE_SHIFT, PageRange};

const WORDS: usize = BLOCK_PAGES / 64;

/// Pages of one block as a bit set: bit `i` stands for the `i`th page.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct PageSet([u64; WORDS]);

/// Neighbouring pages of one block, `first..first + count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Number of the first page within the block.
    pub first: usize,
    /// How many pages; at least 1.
    pub count: usize,
}

impl Run {
    /// Length in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        (self.count as u64) << PAGE_SHIFT
    }

    /// The page numbers, ascending.
    #[must_use]
    pub const fn pages(self) -> std::ops::Range<usize> {
        self.first..self.first + self.count
    }
}

impl PageSet {
    /// No page.
    pub const EMPTY: Self = Self([0; WORDS]);
    /// Every page of the block.
    pub const ALL: Self = Self([u64::MAX; WORDS]);

    /// The pages of `range`, which lies in one block.
    ///
    /// # Panics
    /// If `range` crosses a block boundary.
    #[must_use]
    pub fn of(range: PageRange) -> Self {
        let first = range.start().page_in_block();
        let end = first + range.pages();
        assert!(end <= BLOCK_PAGES, "range crosses a block boundary");
        Self::span(first, end)
    }

    /// The pages `first..end`.
    #[must_use]
    pub fn span(first: usize, end: usize) -> Self {
        let mut words = [0; WORDS];
        for (n, word) in words.iter_mut().enumerate() {
            let low = n * 64;
            let from = first.clamp(low, low + 64) - low;
            let to = end.clamp(low, low + 64) - low;
            if from < to {
                *word = (u64::MAX >> (64 - (to - from))) << from;
            }
        }
        Self(words)
    }

    /// Whether page `i` is in the set.
    #[must_use]
    pub const fn has(&self, i: usize) -> bool {
        self.0[i / 64] >> (i % 64) & 1 != 0
    }

    /// Adds page `i`.
    pub const fn insert(&mut self, i: usize) {
        self.0[i / 64] |= 1 << (i % 64);
    }

    /// Takes page `i` out.
    pub const fn remove(&mut self, i: usize) {
        self.0[i / 64] &= !(1 << (i % 64));
    }

    /// How many pages of the set come before page `i`.
    #[must_use]
    pub fn rank(&self, i: usize) -> usize {
        let before = |n: usize| {
            if n * 64 + 64 <= i {
                u64::MAX
            } else if n * 64 < i {
                !(u64::MAX << (i % 64))
            } else {
                0
            }
        };
        self.0.iter().enumerate().map(|(n, w)| (w & before(n)).count_ones() as usize).sum()
    }

    /// How many pages.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Whether there is no page in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|&w| w == 0)
    }

    /// Pages in both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|n| self.0[n] & other.0[n]))
    }

    /// Pages in either.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|n| self.0[n] | other.0[n]))
    }

    /// Pages in `self` but not in `other`.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|n| self.0[n] & !other.0[n]))
    }

    /// Page numbers, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> + use<> {
        let words = self.0;
        (0..WORDS).flat_map(move |n| {
            let mut word = words[n];
            std::iter::from_fn(move || {
                (word != 0).then(|| {
                    let bit = word.trailing_zeros() as usize;
                    word &= word - 1;
                    n * 64 + bit
                })
            })
        })
    }

    /// First page at or after `from` that is in the set (`present`) or not in it.
    fn next(&self, from: usize, present: bool) -> Option<usize> {
        let mut n = from / 64;
        let mut mask = u64::MAX << (from % 64);
        while n < WORDS {
            let word = if present { self.0[n] } else { !self.0[n] } & mask;
            if word != 0 {
                return Some(n * 64 + word.trailing_zeros() as usize);
            }
            mask = u64::MAX;
            n += 1;
        }
        None
    }

    /// The set as maximal runs of neighbours, ascending.
    pub fn runs(&self) -> impl Iterator<Item = Run> + use<> {
        let set = *self;
        let mut from = 0;
        std::iter::from_fn(move || {
            if from >= BLOCK_PAGES {
                return None;
            }
            let first = set.next(from, true)?;
            let end = set.next(first, false).unwrap_or(BLOCK_PAGES);
            from = end;
            Some(Run { first, count: end - first })
        })
    }
}

impl FromIterator<usize> for PageSet {
    fn from_iter<I: IntoIterator<Item = usize>>(pages: I) -> Self {
        let mut set = Self::EMPTY;
        pages.into_iter().for_each(|i| set.insert(i));
        set
    }
}

impl std::fmt::Debug for PageSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.runs().map(|r| r.pages())).finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_sorted_set(pages in proptest::collection::btree_set(0usize..BLOCK_PAGES, 0..200),
                                    first in 0usize..=BLOCK_PAGES, len in 0usize..=BLOCK_PAGES) {
            let set: PageSet = pages.iter().copied().collect();
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), pages.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.count(), pages.len());
            for i in 0..BLOCK_PAGES {
                prop_assert_eq!(set.rank(i), pages.range(..i).count());
            }
            let from_runs: Vec<usize> = set.runs().flat_map(|r| r.pages()).collect();
            prop_assert_eq!(from_runs, pages.iter().copied().collect::<Vec<_>>());
            for (a, b) in set.runs().zip(set.runs().skip(1)) {
                prop_assert!(a.first + a.count < b.first, "runs are maximal");
            }
            let end = (first + len).min(BLOCK_PAGES);
            let span = PageSet::span(first, end);
            prop_assert_eq!(span.iter().collect::<Vec<_>>(), (first..end).collect::<Vec<_>>());
            prop_assert_eq!(set.and(&span).count() + set.minus(&span).count(), set.count());
        }
    }
}
