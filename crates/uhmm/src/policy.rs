//! What to move, when, and how much of it: pure decisions, which never touch a page.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use uhmm_sys::addr::BLOCK_PAGES;

use crate::page_set::PageSet;

/// How many pages come home with the first that is touched in a block, where they are away too: 64 KiB.
pub const FAULT_AROUND_FIRST: usize = 16;
/// How many at most.
pub const FAULT_AROUND_MAX: usize = BLOCK_PAGES;

/// The shortest time that a page stays where it was brought, in milliseconds.
pub const RESIDENCY_MIN_MS: u64 = 2;
/// How often that time may double: 2 ms to about 8 s.
pub const RESIDENCY_DOUBLINGS: u64 = 12;

/// A block's policy word, unpacked.
///
/// Minimum residency keeps CPU and device from fighting over a page: what came home stays for a while before a policy
/// moves it again, and each time it comes home soon after it left, twice as long. A block that stays away for longer
/// than its time starts anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Residency {
    /// When the block last came home, ms.
    home_ms: u64,
    /// How often the minimum has doubled.
    doublings: u64,
    /// Faults in this block that fell next to the last one: log2 of the fault-around window in pages.
    window_log: u64,
    /// Page after the last window.
    next: u64,
    /// Whether the block left as one huge page, and nothing of it was touched since.
    whole: bool,
}

impl Residency {
    /// The window of a fault of page `i`: log2 of its pages.
    fn next_window_log(self, i: usize) -> u64 {
        match self.next {
            0 => u64::from(FAULT_AROUND_FIRST.ilog2()),
            next if next == i as u64 => (self.window_log + 1).min(u64::from(FAULT_AROUND_MAX.ilog2())),
            _ => self.window_log.saturating_sub(1),
        }
    }

    // 40 bits of ms (34 years), 4 of doublings, 4 of window, 10 of next, 1 of whole.
    fn unpack(word: u64) -> Self {
        Self {
            home_ms: word & ((1 << 40) - 1),
            doublings: word >> 40 & 0xf,
            window_log: word >> 44 & 0xf,
            next: word >> 48 & 0x3ff,
            whole: word >> 58 & 1 != 0,
        }
    }

    fn pack(self) -> u64 {
        (self.home_ms & ((1 << 40) - 1))
            | self.doublings << 40
            | self.window_log << 44
            | self.next << 48
            | u64::from(self.whole) << 58
    }

    fn minimum_ms(self) -> u64 {
        RESIDENCY_MIN_MS << self.doublings
    }
}

/// Whether a policy may move pages of the block now.
pub(crate) fn may_leave(word: &AtomicU64, now_ms: u64) -> bool {
    let r = Residency::unpack(word.load(Relaxed));
    r.home_ms == 0 || now_ms.saturating_sub(r.home_ms) >= r.minimum_ms()
}

/// Notes that a CPU touch brought pages of the block home, `away_ms` after they had left.
pub(crate) fn came_home(word: &AtomicU64, now_ms: u64, away_ms: u64) {
    let mut r = Residency::unpack(word.load(Relaxed));
    // A block comes home in several windows: they are one homecoming, which ends when the block could leave again.
    let goes_on = r.home_ms != 0 && now_ms.saturating_sub(r.home_ms) < r.minimum_ms();
    r.doublings = if goes_on {
        r.doublings
    } else if away_ms < r.minimum_ms() * 4 {
        (r.doublings + 1).min(RESIDENCY_DOUBLINGS)
    } else {
        0
    };
    r.home_ms = now_ms.max(1);
    // A racing update of the same hint may be lost; it is a hint.
    word.store(r.pack(), Relaxed);
}

/// How many pages a touch of page `i` would bring home at most.
pub(crate) fn next_window(word: &AtomicU64, i: usize) -> usize {
    1 << Residency::unpack(word.load(Relaxed)).next_window_log(i)
}

/// Notes that somebody had the block leave as one huge page.
pub(crate) fn left_whole(word: &AtomicU64) {
    let r = Residency::unpack(word.load(Relaxed));
    word.store(Residency { whole: true, ..r }.pack(), Relaxed);
}

/// The pages that come home together when page `i` is touched, given which pages are away.
///
/// Starts with the aligned 64 KiB around it. Doubles each time a touch falls just behind the last window, as a
/// sequential reader's do, and halves each time one falls elsewhere in the block: what comes along with a random access
/// has to leave again, and pushes out something better.
///
/// A huge page that left as one comes home as one.
pub(crate) fn fault_window(word: &AtomicU64, i: usize, is_away: impl Fn(usize) -> bool) -> PageSet {
    let mut r = Residency::unpack(word.load(Relaxed));
    let (first, end) = if std::mem::take(&mut r.whole) {
        (0, BLOCK_PAGES)
    } else {
        r.window_log = r.next_window_log(i);
        let pages = 1usize << r.window_log;
        let first = i & !(pages.min(FAULT_AROUND_FIRST) - 1);
        (first, (first + pages).min(BLOCK_PAGES))
    };
    r.next = end as u64;
    word.store(r.pack(), Relaxed);
    let mut window: PageSet = (first..end).filter(|&n| is_away(n)).collect();
    window.insert(i);
    window
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_bounces_stays_twice_as_long_each_time() {
        let word = AtomicU64::new(0);
        assert!(may_leave(&word, 1000), "a block that never came home may leave");
        let mut now = 1000;
        let mut last = 0;
        for _ in 0..20 {
            came_home(&word, now, 0);
            let stays = (0..).find(|ms| may_leave(&word, now + ms)).unwrap();
            assert!(stays > last || stays == RESIDENCY_MIN_MS << RESIDENCY_DOUBLINGS);
            last = stays;
            now += stays;
        }
        assert_eq!(last, RESIDENCY_MIN_MS << RESIDENCY_DOUBLINGS);
        for _ in 0..8 {
            came_home(&word, now, 0);
            assert!(may_leave(&word, now + last), "the other windows of one homecoming count once");
        }
        now += last;
        came_home(&word, now, 1_000_000);
        assert!(may_leave(&word, now + RESIDENCY_MIN_MS), "a long absence starts anew");
    }

    #[test]
    fn a_sequential_reader_gets_ever_larger_windows() {
        let word = AtomicU64::new(0);
        let (mut i, mut sizes) = (0, Vec::new());
        while i < BLOCK_PAGES {
            let window = fault_window(&word, i, |_| true);
            assert!(window.has(i));
            sizes.push(window.count());
            i = window.iter().last().unwrap() + 1;
        }
        assert_eq!(sizes.iter().sum::<usize>(), BLOCK_PAGES);
        assert_eq!(sizes, [16, 32, 64, 128, 256, 16], "the last window ends with the block");
    }

    #[test]
    fn a_random_reader_gets_ever_smaller_windows() {
        let word = AtomicU64::new(0);
        let sizes: Vec<usize> =
            [300, 40, 500, 7, 222, 111].into_iter().map(|i| fault_window(&word, i, |_| true).count()).collect();
        assert_eq!(sizes, [16, 8, 4, 2, 1, 1]);
    }

    #[test]
    fn what_left_whole_comes_home_whole_once() {
        let word = AtomicU64::new(0);
        left_whole(&word);
        came_home(&word, 5, 1);
        assert_eq!(fault_window(&word, 300, |_| true).count(), BLOCK_PAGES);
        assert_eq!(fault_window(&word, 300, |_| true).count(), 1);
        assert!(!may_leave(&word, 6));
    }

    #[test]
    fn a_window_holds_only_what_is_away_and_the_page_itself() {
        let word = AtomicU64::new(0);
        let away: PageSet = [3, 4, 40].into_iter().collect();
        assert_eq!(fault_window(&word, 4, |n| away.has(n)).iter().collect::<Vec<_>>(), [3, 4]);
    }
}
