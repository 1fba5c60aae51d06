//! A driver's own interval notifiers, on real events.
//
// UNSAFETY: the tests make, change and watch memory by raw system calls and pointers.
#![allow(unsafe_code, reason = "tests make the memory that they then watch")]

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    time::Duration,
};

use uhmm::{
    MigrateOptions,
    addr::PageRange,
    device::{Cause, Invalidation},
    notifier::{IntervalOps, InvalidateSeq, Invalidated},
};
use uhmm_testkit::isolated;

use crate::common::{Memory, mm_with};

/// Counts its calls.
struct Count(&'static AtomicUsize);

impl IntervalOps for Count {
    fn invalidate<'a>(&self, _: &Invalidation, seq: InvalidateSeq<'a>) -> Invalidated<'a> {
        seq.set(|| {
            self.0.fetch_add(1, SeqCst);
        })
    }
}

#[test]
fn overlapping_and_nested_notifiers_hear_of_what_concerns_them() {
    isolated!(|| {
        static WIDE: AtomicUsize = AtomicUsize::new(0);
        static INNER: AtomicUsize = AtomicUsize::new(0);
        static AFTER: AtomicUsize = AtomicUsize::new(0);
        let (mm, mirror) = mm_with(64 << 20);
        let memory = Memory::new(512);
        memory.fill();
        let part = |first: usize, pages: u64| PageRange::new(memory.range().page(first), pages * 4096).unwrap();
        let wide = mm.subscribe(memory.range(), Count(&WIDE)).unwrap();
        let inner = mm.subscribe(part(100, 10), Count(&INNER)).unwrap();
        let after = mm.subscribe(part(105, 50), Count(&AFTER)).unwrap();

        let seq = (wide.read_begin().unwrap(), inner.read_begin().unwrap());
        assert!(mirror.migrate(part(0, 100), &MigrateOptions::default()).is_complete());
        assert!(WIDE.load(SeqCst) > 0);
        assert_eq!((INNER.load(SeqCst), AFTER.load(SeqCst)), (0, 0));
        assert!(wide.commit(seq.0).is_err(), "the snapshot was overtaken");
        assert!(inner.commit(seq.1).is_ok(), "nothing happened in the inner range");

        assert!(mirror.migrate(part(100, 5), &MigrateOptions::default()).is_complete());
        assert!(INNER.load(SeqCst) > 0);
        assert_eq!(AFTER.load(SeqCst), 0, "pages 100 to 104 are not its");

        // A CPU touch of a page that is on the device is an invalidation as well.
        let before = WIDE.load(SeqCst);
        assert_eq!(memory.get(3), common::stamp(3));
        assert!(WIDE.load(SeqCst) > before);

        after.remove().unwrap();
        let before = AFTER.load(SeqCst);
        assert!(mirror.migrate(part(105, 50), &MigrateOptions::default()).is_complete());
        // SAFETY: the memory is the test's own; it is not used any more.
        assert_eq!(unsafe { libc::munmap(memory.start.cast(), 512 * 4096) }, 0);
        assert_eq!(AFTER.load(SeqCst), before, "it was removed");
        wide.remove().unwrap();
        inner.remove().unwrap();
        Ok(())
    });
}

#[test]
fn a_driver_waits_for_a_change_that_was_announced() {
    isolated!(|| {
        static CALLS: AtomicUsize = AtomicUsize::new(0);
        let (mm, mirror) = mm_with(64 << 20);
        let memory = Memory::new(64);
        let watch = mm.subscribe(memory.range(), Count(&CALLS)).unwrap();
        let before = watch.read_begin().unwrap();
        let over = AtomicBool::new(false);
        let changing = mm.changing(memory.range(), Cause::Protect);
        assert_eq!(CALLS.load(SeqCst), 1);
        assert!(watch.commit(before).is_err(), "it looked before the change");
        std::thread::scope(|scope| {
            let begun = scope.spawn(|| {
                let seq = watch.read_begin().unwrap();
                (seq, over.load(SeqCst))
            });
            std::thread::sleep(Duration::from_millis(20));
            over.store(true, SeqCst);
            drop(changing);
            let (seq, waited) = begun.join().unwrap();
            assert!(waited && watch.commit(seq).is_ok());
        });
        watch.remove().unwrap();
        mirror.close().unwrap();
        Ok(())
    });
}
