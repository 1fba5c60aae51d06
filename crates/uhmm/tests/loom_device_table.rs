//! Lookups of the device page table under every interleaving, with tables of two entries.
#![cfg(loom)]

use std::sync::Arc;

use loom::thread;
use uhmm::{
    addr::{PAGE_SHIFT, PageRange, VirtAddr},
    device::DevPfn,
    device_table::{Access, DeviceTable, Pte, TABLE_PAGES},
};

fn model(check: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(4);
    builder.check(check);
}

fn table(tables: u32) -> Arc<DeviceTable> {
    Arc::new(DeviceTable::new(2, tables, DeviceTable::storage_needed(2, tables).leak()))
}

fn va(page: u64) -> VirtAddr {
    VirtAddr::new(page << PAGE_SHIFT)
}

fn block(n: u64) -> PageRange {
    PageRange::new(va(n * TABLE_PAGES as u64), (TABLE_PAGES as u64) << PAGE_SHIFT).unwrap()
}

fn pte(n: u32) -> Pte {
    Pte::frame(DevPfn::new(n), Access::Write)
}

fn pfn(pte: Pte) -> Option<u32> {
    pte.pfn().map(DevPfn::get)
}

#[test]
fn a_recycled_table_never_shows_another_blocks_entry() {
    model(|| {
        let table = table(1);
        table.set(va(0), pte(10)).unwrap();
        let writer = Arc::clone(&table);
        let thread = thread::spawn(move || {
            writer.clear(block(0));
            writer.set(va(2), pte(20)).unwrap();
        });
        let found = pfn(table.lookup(va(0)));
        assert!(found.is_none() || found == Some(10), "{found:?}");
        thread.join().unwrap();
        assert_eq!(table.lookup(va(0)), Pte::NONE);
        assert_eq!(pfn(table.lookup(va(2))), Some(20));
    });
}

#[test]
fn a_table_that_went_and_came_back_shows_nothing_of_the_time_between() {
    model(|| {
        let table = table(1);
        table.set(va(0), pte(10)).unwrap();
        let writer = Arc::clone(&table);
        let thread = thread::spawn(move || {
            writer.clear(block(0));
            writer.set(va(2), pte(20)).unwrap();
            writer.clear(block(1));
            writer.set(va(0), pte(11)).unwrap();
        });
        let found = pfn(table.lookup(va(0)));
        assert!(found.is_none_or(|n| n == 10 || n == 11), "{found:?}");
        thread.join().unwrap();
        assert_eq!(pfn(table.lookup(va(0))), Some(11));
    });
}

#[test]
fn a_page_that_always_has_an_entry_is_always_found() {
    model(|| {
        let table = table(1);
        table.set(va(0), pte(10)).unwrap();
        let writer = Arc::clone(&table);
        let thread = thread::spawn(move || {
            writer.set_block(va(0), pte(10)).unwrap();
            writer.set(va(1), pte(99)).unwrap();
        });
        assert_eq!(pfn(table.lookup(va(0))), Some(10));
        thread.join().unwrap();
        assert_eq!((pfn(table.lookup(va(0))), pfn(table.lookup(va(1)))), (Some(10), Some(99)));
    });
}

#[test]
fn a_split_block_keeps_the_frames_of_the_other_pages() {
    model(|| {
        let table = table(1);
        table.set_block(va(0), pte(8)).unwrap();
        let writer = Arc::clone(&table);
        let thread = thread::spawn(move || writer.clear(PageRange::page_of(va(0))));
        assert_eq!(pfn(table.lookup(va(1))), Some(9));
        assert!(thread.join().unwrap());
        assert_eq!((table.lookup(va(0)), pfn(table.lookup(va(1)))), (Pte::NONE, Some(9)));
    });
}

#[test]
fn writers_take_turns() {
    model(|| {
        let table = table(2);
        let writer = Arc::clone(&table);
        let thread = thread::spawn(move || {
            writer.set(va(0), pte(1)).unwrap();
            writer.clear(block(1));
        });
        table.set(va(2), pte(2)).unwrap();
        table.set(va(1), pte(3)).unwrap();
        thread.join().unwrap();
        assert_eq!((pfn(table.lookup(va(0))), pfn(table.lookup(va(1)))), (Some(1), Some(3)));
        let both = table.lookup(va(2)).is_none();
        assert_eq!(table.entries(), if both { 2 } else { 3 });
    });
}
