//! A word that the kernel marks when a thread ends, however it ends: by itself, killed, or by `exec`.
//!
//! # Kernel
//! `get_robust_list(2)`: the list of locks whose holder the kernel declares dead. The lock here is never waited for.
// UNSAFETY: tells the kernel where to look when the thread ends.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Release};

use crate::{Errno, arena, raw, thread};

/// What the kernel leaves in the word of a thread that has ended.
pub const OWNER_DIED: u32 = 0x4000_0000;
/// No thread's id has other bits.
pub const TID_MASK: u32 = 0x3fff_ffff;

/// Words of the kernel's `struct robust_list_head` (first entry, where the lock is from its entry, pending entry), and an
/// entry (the next, which is the head again).
const LIST_WORDS: usize = 4;
const HEAD_BYTES: u64 = 24;

/// Puts the calling thread's id into `word`, and has the kernel replace it by [`OWNER_DIED`] when the thread ends. `word` may
/// be in memory that other processes share: they see it too.
///
/// For threads that libc does not know: those of its own use the same list for its locks.
///
/// # Errors
/// `ENOMEM`: the arena is full.
pub fn mark_at_death(word: &'static AtomicU32) -> Result<(), Errno> {
    let list: &'static [AtomicU64] = arena::slice(LIST_WORDS)?;
    let head = raw::ptr_arg(list.as_ptr());
    let entry = head + HEAD_BYTES;
    // Wraps round: the kernel adds it to the entry's address again.
    let offset = raw::ptr_arg(word.as_ptr()).wrapping_sub(entry);
    for (place, value) in list.iter().zip([entry, offset, 0, head]) {
        place.store(value, Release);
    }
    word.store(thread::gettid(), Release);
    // SAFETY: the list and the word are mapped for ever, and the list is never changed. When the thread ends the kernel reads
    // the list, and changes the word atomically if it holds the thread's id.
    unsafe { raw::syscall(libc::SYS_set_robust_list, [head, HEAD_BYTES]) }.map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Acquire;

    use super::*;

    static WORD: AtomicU32 = AtomicU32::new(0);

    fn short_life(_: usize) {
        mark_at_death(&WORD).unwrap();
        assert_eq!(WORD.load(Acquire), thread::gettid());
    }

    #[test]
    fn the_word_of_a_thread_that_has_ended_is_marked() {
        arena::init(64 << 20).unwrap();
        thread::spawn(thread::Kind::Raw, "short-life", None, short_life, 0).unwrap();
        let start = std::time::Instant::now();
        while WORD.load(Acquire) != OWNER_DIED {
            assert!(start.elapsed().as_secs() < 20, "{:#x}", WORD.load(Acquire));
            std::thread::yield_now();
        }
    }
}
