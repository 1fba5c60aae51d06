//! The rules: what a device may say of a page, given where the page is. And searching for many pages at once.

use crate::book::Kind;

/// Bits of a word of `/proc/self/pagemap`.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FRAME: u64 = (1 << 55) - 1;

/// Whether the CPU finds a page there without a fault.
pub(crate) const fn is_present(entry: u64) -> bool {
    entry & PRESENT != 0
}

/// Whether there is nothing, not even a note of where the page is.
pub(crate) const fn is_empty(entry: u64) -> bool {
    entry & (PRESENT | SWAPPED) == 0
}

/// The physical page. Nothing without privileges.
pub(crate) fn frame(entry: u64) -> Option<u64> {
    Some(entry & FRAME).filter(|frame| is_present(entry) && *frame != 0)
}

/// What stands in a report before the device writes it. No device says this of a page.
pub(crate) const UNWRITTEN: u8 = 0xa5;

/// What a device says of a page: a byte of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Said {
    /// The program may not read there.
    Error,
    /// No page, or one that this device cannot know of.
    Nothing,
    /// In the host's memory.
    Host,
    /// In the device's own memory, out of the CPU's reach.
    Private,
    /// In a device's memory that the CPU reaches; whether in this one's.
    Coherent { is_own: bool },
    /// Nothing that a device can say.
    Nonsense,
}

impl Said {
    /// Understands a byte of a snapshot.
    pub(crate) const fn of(byte: u8) -> Self {
        const ACCESS: u8 = 0x03;
        const SIZE: u8 = 0x0c;
        if byte == 0xff {
            return Self::Error;
        }
        match (byte & 0xf0, byte & ACCESS) {
            (0x00, 0) if byte & SIZE == 0 => Self::Nothing,
            (0x00, 1 | 2) | (0x10, 1) => Self::Host,
            (0x20, 1 | 2) => Self::Private,
            (0x40, 1 | 2) => Self::Coherent { is_own: true },
            (0x50, 1 | 2) => Self::Coherent { is_own: false },
            _ => Self::Nonsense,
        }
    }
}

/// What the witness remembers of a page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Known {
    /// How it went away.
    pub(crate) kind: Kind,
    /// Whether it went to the device that is asked.
    pub(crate) is_asked: bool,
    /// Whether its bytes are known to be other than zeros.
    pub(crate) has_bytes: bool,
}

/// Why what a node says of a page cannot be true, if so.
///
/// `entry` is the page's word in the page map, the same before and after the node was asked.
pub(crate) const fn contradiction(said: Said, is_private_node: bool, entry: u64, known: Known) -> Option<&'static str> {
    match (said, is_present(entry)) {
        (Said::Nonsense, _) => Some("the report is none that a device can give"),
        (Said::Private, _) if !is_private_node => Some("a coherent device reports private memory"),
        (Said::Private, true) => Some("reported in private device memory, and the CPU has it"),
        (Said::Coherent { is_own: true }, _) if is_private_node => Some("a private device reports coherent memory"),
        (Said::Coherent { .. }, false) => Some("reported in coherent device memory, and the CPU does not have it"),
        (Said::Host, false) => Some("reported in the host's memory, and the CPU does not have it"),
        (Said::Nothing, true) => Some("reported as nothing, and the CPU has it"),
        (Said::Nothing, false)
            if is_empty(entry) && known.is_asked && known.has_bytes && matches!(known.kind, Kind::Private) =>
        {
            Some("lost: neither the device nor the CPU has it")
        }
        (Said::Error | Said::Nothing | Said::Host | Said::Private | Said::Coherent { .. }, _) => None,
    }
}

/// Whether a page that was with the asked node is so no more.
pub(crate) const fn came_home(said: Said, entry: u64, kind: Kind) -> bool {
    match kind {
        Kind::Coherent => matches!(said, Said::Host | Said::Nothing),
        Kind::Private | Kind::Exclusive | Kind::Inherited => is_present(entry),
    }
}

/// Many words that are searched for at once. One that is wanted twice has to be seen twice.
#[derive(Debug)]
pub(crate) struct Wanted<const N: usize> {
    len: usize,
    /// `(word, whose it is, how often it was seen)`; the last counts in the first of those that are equal.
    items: [(u64, u32, u32); N],
}

impl<const N: usize> Wanted<N> {
    pub(crate) const fn new() -> Self {
        Self { len: 0, items: [(0, 0, 0); N] }
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a word, in the name of `of`. To be sorted afterwards.
    pub(crate) fn add(&mut self, word: u64, of: usize) {
        if let (Some(item), Ok(of)) = (self.items.get_mut(self.len), u32::try_from(of)) {
            *item = (word, of, 0);
            self.len += 1;
        }
    }

    /// To be called between the last `add` and the first `saw`.
    pub(crate) fn sort(&mut self) {
        self.items[..self.len].sort_unstable();
    }

    /// A word was found.
    pub(crate) fn saw(&mut self, word: u64) {
        let items = &mut self.items[..self.len];
        let first = items.partition_point(|item| item.0 < word);
        if let Some(item) = items.get_mut(first).filter(|item| item.0 == word) {
            item.2 += 1;
        }
    }

    /// Calls with the name of each that was not found.
    pub(crate) fn each_missing(&self, mut missing_fn: impl FnMut(usize)) {
        for same in self.items[..self.len].chunk_by(|a, b| a.0 == b.0) {
            let seen = same.first().map_or(0, |item| item.2 as usize);
            same.iter().skip(seen).for_each(|item| missing_fn(item.1 as usize));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HAVE: u64 = PRESENT | 0x1234;
    const MARKED: u64 = SWAPPED;

    fn known(kind: Kind) -> Known {
        Known { kind, is_asked: true, has_bytes: true }
    }

    #[test]
    fn bytes_of_a_snapshot_are_understood() {
        for (byte, said) in [
            (0xff, Said::Error),
            (0x00, Said::Nothing),
            (0x01, Said::Host),
            (0x06, Said::Host),
            (0x0a, Said::Host),
            (0x11, Said::Host),
            (0x21, Said::Private),
            (0x26, Said::Private),
            (0x42, Said::Coherent { is_own: true }),
            (0x51, Said::Coherent { is_own: false }),
            (0x04, Said::Nonsense),
            (0x12, Said::Nonsense),
            (0x20, Said::Nonsense),
            (0x32, Said::Nonsense),
            (UNWRITTEN, Said::Nonsense),
        ] {
            assert_eq!(Said::of(byte), said, "{byte:#04x}");
        }
    }

    #[test]
    fn what_the_device_says_is_where_the_page_is() {
        let private = known(Kind::Private);
        for (byte, entry, is_right) in [
            (0x22, 0, true),
            (0x22, MARKED, true),
            (0x22, HAVE, false),
            (0x02, HAVE, true),
            (0x11, HAVE, true),
            (0x02, 0, false),
            (0x02, MARKED, false),
            (0x00, HAVE, false),
            (0x00, MARKED, true),
            (0x00, 0, false),
            (0xff, 0, true),
            (0xff, HAVE, true),
            (0x42, HAVE, false),
            (0x52, HAVE, true),
        ] {
            assert_eq!(
                contradiction(Said::of(byte), true, entry, private).is_none(),
                is_right,
                "{byte:#04x} {entry:#x}"
            );
        }
        let coherent = known(Kind::Coherent);
        for (byte, entry, is_right) in [(0x42, HAVE, true), (0x42, 0, false), (0x22, 0, false), (0x00, 0, true)] {
            assert_eq!(
                contradiction(Said::of(byte), false, entry, coherent).is_none(),
                is_right,
                "{byte:#04x} {entry:#x}"
            );
        }
    }

    #[test]
    fn only_pages_of_the_asked_device_with_bytes_can_be_lost() {
        let nothing = Said::Nothing;
        for known in [
            Known { is_asked: false, ..known(Kind::Private) },
            Known { has_bytes: false, ..known(Kind::Private) },
            known(Kind::Exclusive),
        ] {
            assert_eq!(contradiction(nothing, true, 0, known), None);
        }
    }

    #[test]
    fn frames_are_known_of_present_pages_with_privileges() {
        assert_eq!(frame(HAVE), Some(0x1234));
        assert_eq!(frame(PRESENT), None);
        assert_eq!(frame(SWAPPED | 0x1234), None);
    }

    #[test]
    fn a_page_is_home_where_the_cpu_has_it() {
        assert!(came_home(Said::Host, HAVE, Kind::Private));
        assert!(!came_home(Said::Private, MARKED, Kind::Private));
        assert!(!came_home(Said::Coherent { is_own: true }, HAVE, Kind::Coherent));
        assert!(came_home(Said::Host, HAVE, Kind::Coherent));
    }

    #[test]
    fn what_is_wanted_twice_has_to_be_there_twice() {
        let mut wanted = Wanted::<8>::new();
        for (of, word) in [7, 3, 7, 9].into_iter().enumerate() {
            wanted.add(word, of);
        }
        wanted.sort();
        let missing = |wanted: &Wanted<8>| {
            let mut missing = vec![];
            wanted.each_missing(|of| missing.push(of));
            missing.sort_unstable();
            missing
        };
        assert_eq!(missing(&wanted), [0, 1, 2, 3]);
        for word in [1, 7, 9, 9, 100] {
            wanted.saw(word);
        }
        assert_eq!(missing(&wanted), [1, 2]);
        wanted.saw(7);
        wanted.saw(7);
        assert_eq!(missing(&wanted), [1]);
    }
}
