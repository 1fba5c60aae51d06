//! The bitmap of one chunk: which of its small frames are in use.

use super::CHUNK_FRAMES;
use crate::sync::{AtomicU64, Ordering};

/// Frames that one word stands for.
pub(super) const WORD_FRAMES: u32 = if cfg!(loom) { 2 } else { 64 };
/// A word with every frame in use.
const WORD_FULL: u64 = u64::MAX >> (64 - WORD_FRAMES);
/// Words in a bitmap.
pub(super) const WORDS: usize = (CHUNK_FRAMES / WORD_FRAMES) as usize;

/// Neighbouring frames of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    /// First frame, counted within the chunk.
    pub(super) at: u32,
    /// How many; may be 0.
    pub(super) len: u32,
}

impl Span {
    /// The part in the first word.
    pub(super) fn first_word(self) -> Self {
        Self { len: self.len.min(WORD_FRAMES - self.at % WORD_FRAMES), ..self }
    }

    /// The words that hold these frames, each with the mask of the frames.
    fn words(self) -> impl Iterator<Item = (usize, u64)> {
        let end = self.at + self.len;
        let words = if self.len == 0 { 0..0 } else { self.at / WORD_FRAMES..(end - 1) / WORD_FRAMES + 1 };
        words.map(move |word| {
            let (low, high) = (self.at.max(word * WORD_FRAMES), end.min((word + 1) * WORD_FRAMES));
            let mask = (WORD_FULL >> (WORD_FRAMES - (high - low))) << (low % WORD_FRAMES);
            (word as usize, mask)
        })
    }
}

/// A chunk's bitmap; a set bit is a frame in use. It says nothing while the chunk is a huge unit.
#[derive(Clone, Copy)]
pub(super) struct Bitmap<'a>(&'a [AtomicU64]);

impl<'a> Bitmap<'a> {
    /// The bitmap of the `chunk`th chunk, in the words of all.
    pub(super) fn of(words: &'a [AtomicU64], chunk: u32) -> Self {
        Self(&words[chunk as usize * WORDS..][..WORDS])
    }

    /// Sets the bits of `span`, which lies in one word, if all are clear; whether they were.
    #[must_use]
    pub(super) fn set(self, span: Span) -> bool {
        span.words().all(|(n, mask)| {
            let word = &self.0[n];
            let mut now = word.load(Ordering::Acquire);
            while now & mask == 0 {
                match word.compare_exchange_weak(now, now | mask, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => return true,
                    Err(seen) => now = seen,
                }
            }
            false
        })
    }

    /// Sets the bits of `span`, whatever they are.
    pub(super) fn mark(self, span: Span) {
        for (n, mask) in span.words() {
            self.0[n].fetch_or(mask, Ordering::AcqRel);
        }
    }

    /// Clears the bits of `span`; whether all were set.
    #[must_use]
    pub(super) fn clear(self, span: Span) -> bool {
        span.words().fold(true, |all, (n, mask)| {
            let old = self.0[n].fetch_and(!mask, Ordering::AcqRel);
            all && old & mask == mask
        })
    }

    /// Sets or clears every bit of a bitmap that nobody else uses.
    pub(super) fn fill(self, set: bool) {
        let word = if set { WORD_FULL } else { 0 };
        self.0.iter().for_each(|w| w.store(word, Ordering::Relaxed));
    }

    /// Whether the bit of frame `n` is set.
    pub(super) fn is_set(self, n: u32) -> bool {
        self.0[(n / WORD_FRAMES) as usize].load(Ordering::Acquire) & (1 << (n % WORD_FRAMES)) != 0
    }

    /// Number of bits set.
    pub(super) fn count(self) -> u32 {
        self.0.iter().map(|word| word.load(Ordering::Acquire).count_ones()).sum()
    }

    /// The row of clear bits from frame `at` on that lies in one word; cut to `max`.
    pub(super) fn gap_at(self, at: u32, max: u32) -> Span {
        let word = self.0[(at / WORD_FRAMES) as usize].load(Ordering::Acquire) >> (at % WORD_FRAMES);
        Span { at, len: word.trailing_zeros().min(max) }.first_word()
    }

    /// The first row of clear bits that reaches `max`, or else the longest there is; cut to `max`.
    pub(super) fn longest_gap(self, max: u32) -> Span {
        let mut best = Span { at: 0, len: 0 };
        let (mut start, mut len) = (0, 0);
        for (n, word) in (0..).zip(self.0) {
            let word = word.load(Ordering::Acquire);
            let mut at = 0;
            while at < WORD_FRAMES {
                let clear = (word >> at).trailing_zeros().min(WORD_FRAMES - at);
                if len == 0 {
                    start = n * WORD_FRAMES + at;
                }
                len += clear;
                if len > best.len {
                    best = Span { at: start, len: len.min(max) };
                    if len >= max {
                        return best;
                    }
                }
                at += clear;
                if at < WORD_FRAMES {
                    len = 0;
                    at += (word >> at).trailing_ones();
                }
            }
        }
        best
    }
}
