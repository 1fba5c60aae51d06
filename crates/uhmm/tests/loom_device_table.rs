//! Lookups of the device page table under every interleaving, with tables of two entries.
#![cfg(loom)]

mod race;

use uhmm::{
    addr::{PAGE_SHIFT, PageRange, VirtAddr},
    device::DevPfn,
    device_table::{Access, DeviceTable, Pte, TABLE_PAGES},
};

fn race<A: Send + 'static, B: Send + 'static>(
    setup: fn() -> DeviceTable,
    a: fn(&DeviceTable) -> A,
    b: fn(&DeviceTable) -> B,
    check: fn(&DeviceTable, A, B),
) {
    race::race(4, setup, a, b, check);
}

fn table(tables: u32) -> DeviceTable {
    DeviceTable::new(2, tables, DeviceTable::storage_needed(2, tables).leak())
}

/// A table with room for the page entries of one block, and one entry.
fn with_page_0() -> DeviceTable {
    let table = table(1);
    set(&table, 0, 10);
    table
}

fn va(page: u64) -> VirtAddr {
    VirtAddr::new(page << PAGE_SHIFT)
}

fn block(n: u64) -> PageRange {
    PageRange::new(va(n * TABLE_PAGES as u64), (TABLE_PAGES as u64) << PAGE_SHIFT).unwrap()
}

fn pte(pfn: u32) -> Pte {
    Pte::frame(DevPfn::new(pfn), Access::Write)
}

fn set(table: &DeviceTable, page: u64, pfn: u32) {
    table.set(va(page), pte(pfn)).unwrap();
}

fn lookup(table: &DeviceTable, page: u64) -> Option<u32> {
    table.lookup(va(page)).pfn().map(DevPfn::get)
}

#[test]
fn a_recycled_table_never_shows_another_blocks_entry() {
    race(
        with_page_0,
        |table| {
            table.clear(block(0));
            set(table, 2, 20);
        },
        |table| lookup(table, 0),
        |table, (), found| {
            assert!(found.is_none() || found == Some(10), "{found:?}");
            assert_eq!((lookup(table, 0), lookup(table, 2)), (None, Some(20)));
        },
    );
}

#[test]
fn nor_one_in_a_place_that_was_never_used_before() {
    race(
        with_page_0,
        |table| {
            table.clear(block(0));
            set(table, 3, 30);
        },
        |table| lookup(table, 1),
        |_, (), found| assert_eq!(found, None),
    );
}

#[test]
fn a_table_that_went_and_came_back_shows_nothing_of_the_time_between() {
    race(
        with_page_0,
        |table| {
            table.clear(block(0));
            set(table, 2, 20);
            table.clear(block(1));
            set(table, 0, 11);
        },
        |table| lookup(table, 0),
        |table, (), found| {
            assert!(found.is_none_or(|pfn| pfn == 10 || pfn == 11), "{found:?}");
            assert_eq!(lookup(table, 0), Some(11));
        },
    );
}

#[test]
fn a_page_that_always_has_an_entry_is_always_found() {
    race(
        with_page_0,
        |table| {
            table.set_block(va(0), pte(10)).unwrap();
            set(table, 1, 99);
        },
        |table| lookup(table, 0),
        |table, (), found| {
            assert_eq!(found, Some(10));
            assert_eq!((lookup(table, 0), lookup(table, 1)), (Some(10), Some(99)));
        },
    );
}

#[test]
fn a_split_block_keeps_the_frames_of_the_other_pages() {
    race(
        || {
            let table = table(1);
            table.set_block(va(0), pte(8)).unwrap();
            table
        },
        |table| table.clear(PageRange::page_of(va(0))),
        |table| lookup(table, 1),
        |table, any, found| {
            assert!(any);
            assert_eq!(found, Some(9));
            assert_eq!((lookup(table, 0), lookup(table, 1)), (None, Some(9)));
        },
    );
}

#[test]
fn what_is_cleared_stays_so_for_lookups_that_begin_later() {
    race(
        with_page_0,
        |table| {
            table.clear(block(0));
            lookup(table, 0)
        },
        |table| set(table, 1, 11),
        |table, found, ()| {
            assert_eq!((found, lookup(table, 0)), (None, None));
            assert!(lookup(table, 1).is_none_or(|pfn| pfn == 11));
        },
    );
}

#[test]
fn writers_take_turns() {
    race(
        || table(2),
        |table| {
            set(table, 0, 1);
            table.clear(block(1));
        },
        |table| {
            set(table, 2, 2);
            set(table, 1, 3);
        },
        |table, (), ()| {
            assert_eq!((lookup(table, 0), lookup(table, 1)), (Some(1), Some(3)));
            assert_eq!(table.entries(), 2 + u64::from(lookup(table, 2).is_some()));
        },
    );
}
