//! What a program reads of its own `/proc/self/pagemap`: pages that are away are swapped, not absent.
//!
//! To the kernel a page that the engine took is a hole. A program that asks whether memory is populated would be told that it
//! is not, and that what it wrote is gone. The kernel's HMM leaves an entry that looks as that of a page in swap; so does
//! this, in what the program reads, and in what it asks by `PAGEMAP_SCAN`, by the functions that this library stands in front of. What
//! another process reads of this one shows holes.
//!
//! # Kernel
//! `Documentation/admin-guide/mm/pagemap.rst`: a word for each page, bit 63 present, bit 62 swapped.
//
// UNSAFETY: the program's buffer comes as a pointer.

use std::{
    ffi::{CStr, c_void},
    os::fd::RawFd,
    sync::atomic::{
        AtomicU64, AtomicUsize,
        Ordering::{AcqRel, Acquire, Relaxed, Release},
    },
};

use uhmm_sys::{
    access,
    addr::{PAGE_SHIFT, PageRange, TASK_SIZE, VirtAddr},
    pagemap::{IS_PRESENT, IS_SWAPPED, Region, ScanArg},
    token::TokenId,
};

use crate::{descriptors::identity, engine};

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;

/// Page maps of this process that were opened, by the number of the file: a process has one or two.
static FILES: [[AtomicU64; 2]; 4] = [const { [AtomicU64::new(0), AtomicU64::new(0)] }; 4];
/// How many were noted, so that programs which open none pay for one load.
static NOTED: AtomicUsize = AtomicUsize::new(0);

/// Whether a path is that of the calling process's page map.
fn is_own(path: &CStr) -> bool {
    let Some(rest) = path.to_bytes().strip_prefix(b"/proc/") else { return false };
    let Some(owner) = rest.strip_suffix(b"/pagemap") else { return false };
    owner == b"self"
        || owner == b"thread-self"
        || str::from_utf8(owner).ok().and_then(|pid| pid.parse().ok()) == Some(std::process::id())
}

/// Notes a file that was opened.
pub(crate) fn opened(path: &CStr, fd: RawFd) {
    if !is_own(path) {
        return;
    }
    let Some(id) = identity(fd) else { return };
    let known = FILES.iter().any(|file| is(file, id));
    if !known {
        // The oldest is forgotten where there are more.
        let file = &FILES[NOTED.fetch_add(1, AcqRel) % FILES.len()];
        file[0].store(id.device, Relaxed);
        file[1].store(id.inode, Release);
    }
}

fn is(file: &[AtomicU64; 2], id: TokenId) -> bool {
    file[1].load(Acquire) == id.inode && file[0].load(Relaxed) == id.device
}

/// Whether any descriptor may be a page map's.
pub(crate) fn any() -> bool {
    NOTED.load(Acquire) != 0
}

/// Corrects what was read at `offset` of `fd`, if that is a page map.
///
/// # Safety
/// `len` bytes were just read to `buffer`, and nobody else uses them.
pub(crate) unsafe fn correct(fd: RawFd, buffer: *mut c_void, len: usize, offset: u64) {
    if !engine::is_running()
        || !offset.is_multiple_of(8)
        || !identity(fd).is_some_and(|id| FILES.iter().any(|f| is(f, id)))
    {
        return;
    }
    for n in 0..len / 8 {
        let page = VirtAddr::new((offset / 8 + n as u64) << PAGE_SHIFT);
        if page.get() >= TASK_SIZE {
            return;
        }
        // SAFETY: inside of what was read; it need not be aligned.
        let place = unsafe { buffer.cast::<u64>().add(n) };
        // SAFETY: as above.
        let word = unsafe { place.read_unaligned() };
        if word & (PRESENT | SWAPPED) == 0 && engine::is_away(page) {
            // SAFETY: as above.
            unsafe { place.write_unaligned(word | SWAPPED) };
        }
    }
}

// `PAGEMAP_SCAN`.

/// Its flag by which what is found is protected at once: nothing that is away can be.
const WP_MATCHING: u64 = 1;

const ARG_WORDS: usize = size_of::<ScanArg>() / 8;

/// The structure from its words, in their order.
const fn from_words(w: [u64; ARG_WORDS]) -> ScanArg {
    let [size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, returned] = w;
    ScanArg {
        size,
        flags,
        start,
        end,
        walk_end,
        vec,
        vec_len,
        max_pages,
        category_inverted: inverted,
        category_mask: mask,
        category_anyof_mask: anyof,
        return_mask: returned,
    }
}

/// Whether a page of these categories is asked for.
const fn wants(arg: &ScanArg, categories: u64) -> bool {
    let seen = categories ^ arg.category_inverted;
    seen & arg.category_mask == arg.category_mask
        && (arg.category_anyof_mask == 0 || seen & arg.category_anyof_mask != 0)
}

/// All that Linux 6.18 knows.
const ALL: u64 = 0xff;

/// Pages that are looked at in one go.
const PIECE: usize = 64;

/// What is given back of a scan.
struct Found<'a> {
    arg: ScanArg,
    regions: u64,
    pages: u64,
    last: Region,
    write_fn: &'a mut dyn FnMut(u64, Region) -> bool,
}

/// Why a scan does not go on.
#[derive(Debug, PartialEq, Eq)]
enum Stop {
    /// There is no room for more, from this page on.
    At(u64),
    /// The caller's memory cannot be written.
    Fault,
}

impl Found<'_> {
    /// Takes a page, in ascending order.
    fn page(&mut self, at: u64, categories: u64) -> Result<(), Stop> {
        if !wants(&self.arg, categories) {
            return Ok(());
        }
        let categories = categories & self.arg.return_mask;
        let next = at + (1 << PAGE_SHIFT);
        if self.arg.vec_len > 0 {
            if self.regions > 0 && self.last.end == at && self.last.categories == categories {
                self.last.end = next;
            } else if self.regions == self.arg.vec_len {
                return Err(Stop::At(at));
            } else {
                self.last = Region { start: at, end: next, categories };
                self.regions += 1;
            }
            if !(self.write_fn)(self.regions - 1, self.last) {
                return Err(Stop::Fault);
            }
        }
        self.pages += 1;
        if self.pages == self.arg.max_pages { Err(Stop::At(next)) } else { Ok(()) }
    }
}

/// Answers a `PAGEMAP_SCAN` in which something is away; `None` where the kernel's own answer is right. `ask_fn` is the next `ioctl`.
pub(crate) fn scan(fd: RawFd, argument: *mut c_void, ask_fn: &dyn Fn(*mut c_void) -> i32) -> Option<Result<i32, i32>> {
    if !engine::is_running() || !identity(fd).is_some_and(|id| FILES.iter().any(|f| is(f, id))) {
        return None;
    }
    let mut bytes = [0; 8 * ARG_WORDS];
    access::read(VirtAddr::of(argument), &mut bytes).stop.is_none().then_some(())?;
    let mut words = [0; ARG_WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_ne_bytes(*bytes);
    }
    let arg = from_words(words);
    let range = PageRange::from_ends(VirtAddr::new(arg.start), VirtAddr::new(arg.end.min(TASK_SIZE))).ok()?;
    let known = (arg.category_mask | arg.category_anyof_mask | arg.category_inverted | arg.return_mask) & !ALL == 0;
    if arg.size != size_of::<ScanArg>() as u64 || !known || arg.flags & WP_MATCHING != 0 || !engine::is_any_away(range)
    {
        return None;
    }
    let write = |at: u64, words: &[u64]| {
        words
            .iter()
            .zip(0..)
            .all(|(word, n)| access::write(VirtAddr::new(at.wrapping_add(8 * n)), &word.to_ne_bytes()).stop.is_none())
    };
    let mut write_fn =
        |n: u64, r: Region| write(arg.vec.wrapping_add(n.wrapping_mul(24)), &[r.start, r.end, r.categories]);
    let mut found = Found { arg, regions: 0, pages: 0, last: Region::default(), write_fn: &mut write_fn };
    let mut end = arg.end;
    let mut from = range.start().get();
    'all: while from < range.end().get() {
        let mut regions = [Region::default(); PIECE];
        // Without a condition each page of a mapping is told of, and no other.
        let mut own = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start: from,
            end: range.end().get(),
            vec: VirtAddr::of(regions.as_mut_ptr()).get(),
            vec_len: PIECE as u64,
            max_pages: PIECE as u64,
            return_mask: ALL,
            ..ScanArg::default()
        };
        let count = usize::try_from(ask_fn((&raw mut own).cast())).ok()?;
        for region in &regions[..count.min(PIECE)] {
            for at in (region.start..region.end).step_by(1 << PAGE_SHIFT) {
                let is_there = region.categories & (IS_PRESENT | IS_SWAPPED) != 0;
                let away = if !is_there && engine::is_away(VirtAddr::new(at)) { IS_SWAPPED } else { 0 };
                match found.page(at, region.categories | away) {
                    Ok(()) => {}
                    Err(Stop::Fault) => return Some(Err(libc::EFAULT)),
                    Err(Stop::At(at)) => {
                        end = at;
                        break 'all;
                    }
                }
            }
        }
        if own.walk_end <= from {
            break;
        }
        from = own.walk_end;
    }
    if !write(VirtAddr::of(argument).get() + 32, &[end]) {
        return Some(Err(libc::EFAULT));
    }
    Some(Ok(i32::try_from(found.regions).unwrap_or(i32::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a scan of these pages gives, and where it ends.
    fn scanned(arg: ScanArg, pages: &[u64]) -> (Vec<(u64, u64, u64)>, u64, Option<Stop>) {
        let mut regions = Vec::new();
        let mut write_fn = |n: u64, r: Region| {
            regions.truncate(usize::try_from(n).unwrap());
            regions.push((r.start >> 12, r.end >> 12, r.categories));
            true
        };
        let mut found = Found { arg, regions: 0, pages: 0, last: Region::default(), write_fn: &mut write_fn };
        let stop = pages.iter().zip(0..).find_map(|(categories, n)| found.page(n << 12, *categories).err());
        let pages = found.pages;
        (regions, pages, stop)
    }

    #[test]
    fn pages_that_are_alike_are_one_region() {
        let arg = ScanArg { vec_len: 9, category_anyof_mask: ALL, return_mask: ALL, ..ScanArg::default() };
        let pages = [8, 8, 0, 8, 16, 16];
        assert_eq!(scanned(arg, &pages), (vec![(0, 2, 8), (3, 4, 8), (4, 6, 16)], 5, None));
        let few = ScanArg { vec_len: 2, ..arg };
        assert_eq!(scanned(few, &pages), (vec![(0, 2, 8), (3, 4, 8)], 3, Some(Stop::At(4 << 12))));
        let most = ScanArg { max_pages: 2, ..arg };
        assert_eq!(scanned(most, &pages), (vec![(0, 2, 8)], 2, Some(Stop::At(2 << 12))));
    }

    #[test]
    fn what_is_asked_for_is_found() {
        let swapped = ScanArg { vec_len: 9, category_mask: IS_SWAPPED, return_mask: IS_SWAPPED, ..ScanArg::default() };
        assert_eq!(scanned(swapped, &[8, 16, 24]).0, [(1, 3, 16)]);
        let not_present = ScanArg { category_inverted: IS_PRESENT, category_mask: IS_PRESENT, ..swapped };
        assert_eq!(scanned(not_present, &[8, 16, 0]).0, [(1, 2, 16), (2, 3, 0)]);
        let counted = ScanArg { vec_len: 0, ..swapped };
        assert_eq!(scanned(counted, &[16, 16]), (vec![], 2, None));
    }

    #[test]
    fn the_own_page_map_is_known_by_its_paths() {
        let own = std::ffi::CString::new(format!("/proc/{}/pagemap", std::process::id())).unwrap();
        assert!(is_own(c"/proc/self/pagemap") && is_own(c"/proc/thread-self/pagemap") && is_own(&own));
        for other in [c"/proc/1/pagemap", c"/proc/self/maps", c"/proc/pagemap", c"pagemap", c"/proc/x/pagemap"] {
            assert!(!is_own(other), "{other:?}");
        }
    }
}
