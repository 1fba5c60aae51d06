//! A page's bytes as one word.

use crate::raw::{PAGE, index};

/// Bytes of a page, as an index.
pub(crate) const PAGE_LEN: usize = index(PAGE);

/// The hash of a page of zeros.
pub(crate) const ZEROS: u64 = hash(&[0; PAGE_LEN]);

const LANES: usize = 4;
const SEEDS: [u64; LANES] =
    [0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344, 0xa409_3822_299f_31d0, 0x082e_fa98_ec4e_6c89];
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// Hashes a page. Good against accidents; nobody is expected to look for two pages with one hash.
pub(crate) const fn hash(page: &[u8; PAGE_LEN]) -> u64 {
    let (words, _) = page.as_chunks::<8>();
    let mut lanes = SEEDS;
    let mut at = 0;
    while at < words.len() {
        let lane = at % LANES;
        lanes[lane] = (lanes[lane] ^ u64::from_ne_bytes(words[at])).wrapping_mul(FACTOR).rotate_left(29);
        at += 1;
    }
    let mut all = 0;
    let mut lane = 0;
    while lane < LANES {
        all = mix(all ^ lanes[lane]);
        lane += 1;
    }
    all
}

/// Spreads each bit over the word.
const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 32)).wrapping_mul(FACTOR);
    (word ^ (word >> 29)).wrapping_mul(FACTOR) ^ (word >> 32)
}

/// Hashes what is left of a buffer of pages, page by page.
pub(crate) fn pages(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks::<PAGE_LEN>().0.iter().map(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_byte_and_its_place_count() {
        let mut seen = std::collections::BTreeSet::from([ZEROS]);
        for at in 0..PAGE_LEN {
            for bit in [1, 0x80] {
                let mut page = [0; PAGE_LEN];
                page[at] = bit;
                assert!(seen.insert(hash(&page)), "byte {at}");
            }
        }
    }

    #[test]
    fn pages_of_one_number_each_differ() {
        let mut seen = std::collections::BTreeSet::new();
        for n in 0..4096_u32 {
            let mut page = [0; PAGE_LEN];
            for (i, word) in page.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                *word = (n * 1024 + u32::try_from(i).unwrap()).to_ne_bytes();
            }
            assert!(seen.insert(hash(&page)));
        }
    }
}
