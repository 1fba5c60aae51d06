//! The device page table against a map from pages to entries, and lookups against a writer that recycles tables.
#![cfg(not(loom))]
#![expect(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::{
    collections::BTreeMap,
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
};

use proptest::prelude::*;
use uhmm::{
    addr::{BLOCK_SIZE, PAGE_SHIFT, PAGE_SIZE, PageRange, TASK_SIZE, VirtAddr},
    device::DevPfn,
    device_table::{Access, BLOCK_ORDER, DeviceTable, Pte, TableFull},
};

const BLOCK_PAGES: u64 = 512;

fn table(leaves: u32, tables: u32) -> DeviceTable {
    DeviceTable::new(leaves, tables, DeviceTable::storage_needed(leaves, tables).leak())
}

/// Address of a page, by number.
fn va(page: u64) -> VirtAddr {
    VirtAddr::new(page << PAGE_SHIFT)
}

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::new(va(first), count << PAGE_SHIFT).unwrap()
}

/// What the table should hold: for each page its entry, and whether that is part of a block entry.
#[derive(Default)]
struct Model(BTreeMap<u64, (Pte, bool)>);

impl Model {
    fn set(&mut self, page: u64, pte: Pte) {
        self.break_up(page);
        if pte.is_none() {
            self.0.remove(&page)
        } else {
            self.0.insert(page, (pte, false))
        };
    }

    fn set_block(&mut self, page: u64, pte: Pte) {
        let first = page / BLOCK_PAGES * BLOCK_PAGES;
        for n in 0..BLOCK_PAGES {
            self.0.remove(&(first + n));
            if !pte.is_none() {
                let access = pte.access().unwrap();
                let nth = match pte.pfn() {
                    Some(pfn) => Pte::frame(pfn.add(n as u32), access),
                    None => Pte::host(access),
                };
                self.0.insert(first + n, (nth, true));
            }
        }
    }

    /// The block of `page` has page entries from now on.
    fn break_up(&mut self, page: u64) {
        let first = page / BLOCK_PAGES * BLOCK_PAGES;
        self.0.range_mut(first..first + BLOCK_PAGES).for_each(|(_, entry)| entry.1 = false);
    }

    /// Breaks up the blocks that the range covers in part, if `changes` says that one's entries would change.
    fn break_up_ends(&mut self, range: PageRange, changes: impl Fn(Pte) -> bool) {
        for part in range.iter_blocks().filter(|part| part.bytes() < BLOCK_SIZE) {
            let page = part.start().get() >> PAGE_SHIFT;
            if self.0.get(&page).is_some_and(|&(pte, _)| changes(pte)) {
                self.break_up(page);
            }
        }
    }

    fn each(&mut self, range: PageRange) -> impl Iterator<Item = (u64, &mut (Pte, bool))> {
        let numbers = range.start().get() >> PAGE_SHIFT..range.end().get() >> PAGE_SHIFT;
        self.0.range_mut(numbers).map(|(&page, entry)| (page, entry))
    }

    fn clear(&mut self, range: PageRange) -> bool {
        self.break_up_ends(range, |_| true);
        let gone: Vec<u64> = self.each(range).map(|(page, _)| page).collect();
        gone.iter().for_each(|page| {
            self.0.remove(page);
        });
        !gone.is_empty()
    }

    fn restrict(&mut self, range: PageRange) -> bool {
        self.break_up_ends(range, |pte| pte.allows(Access::Write));
        let mut any = false;
        for (_, entry) in self.each(range) {
            any |= entry.0.allows(Access::Write);
            entry.0 = entry.0.read_only();
        }
        any
    }

    fn entries(&self) -> u64 {
        let pages = self.0.values().filter(|entry| !entry.1).count();
        (pages + self.0.values().filter(|entry| entry.1).count() / BLOCK_PAGES as usize) as u64
    }
}

#[derive(Debug, Clone)]
enum Op {
    Set(u64, Pte),
    SetBlock(u64, Pte),
    Clear(PageRange),
    Restrict(PageRange),
}

/// Two blocks at a leaf's start, two that straddle the border of two leaves, and the last two that there are.
fn page() -> impl Strategy<Value = u64> {
    let leaf = 8192 * BLOCK_PAGES;
    let last = (TASK_SIZE >> PAGE_SHIFT) - 2 * BLOCK_PAGES;
    (prop::sample::select(vec![0, leaf - BLOCK_PAGES, last]), 0..2 * BLOCK_PAGES).prop_map(|(base, page)| base + page)
}

fn pte() -> impl Strategy<Value = Pte> {
    let access = prop::sample::select(vec![Access::Read, Access::Write, Access::Atomic]);
    (0u32..4, any::<u32>(), access).prop_map(|(kind, pfn, access)| match kind {
        0 => Pte::NONE,
        1 => Pte::host(access),
        // The frames of a block have to exist, to the last.
        _ => Pte::frame(DevPfn::new(pfn & !0xfff), access),
    })
}

fn range() -> impl Strategy<Value = PageRange> {
    (page(), 1..=3 * BLOCK_PAGES).prop_map(|(page, count)| pages(page, count.min((TASK_SIZE >> PAGE_SHIFT) - page)))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (page(), pte()).prop_map(|(page, pte)| Op::Set(page, pte)),
        2 => (page(), pte()).prop_map(|(page, pte)| Op::SetBlock(page, pte)),
        2 => range().prop_map(Op::Clear),
        2 => range().prop_map(Op::Restrict),
    ]
}

fn shown(table: &DeviceTable, range: PageRange) -> BTreeMap<u64, (Pte, bool)> {
    let mut seen = BTreeMap::new();
    table.for_each(range, |part, pte| {
        for (n, addr) in (0..).zip(part.iter_pages()) {
            let access = pte.access().unwrap();
            let page = match pte.pfn() {
                Some(pfn) => Pte::frame(pfn.add(n), access),
                None => Pte::host(access),
            };
            assert!(seen.insert(addr.get() >> PAGE_SHIFT, (page, pte.order() > 0)).is_none(), "{addr} shown twice");
        }
    });
    seen
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_a_map_of_pages(ops in prop::collection::vec(op(), 1..60)) {
        let table = table(3, 6);
        let mut model = Model::default();
        for op in &ops {
            match *op {
                Op::Set(page, pte) => {
                    prop_assert_eq!(table.set(va(page), pte), Ok(()));
                    // Taking nothing away changes nothing, not even the size of the entries.
                    if !pte.is_none() || model.0.contains_key(&page) {
                        model.set(page, pte);
                    }
                }
                Op::SetBlock(page, pte) => {
                    prop_assert_eq!(table.set_block(va(page), pte), Ok(()));
                    model.set_block(page, pte);
                }
                Op::Clear(range) => prop_assert_eq!(table.clear(range), model.clear(range)),
                Op::Restrict(range) => prop_assert_eq!(table.restrict(range), model.restrict(range)),
            }
            prop_assert_eq!(table.entries(), model.entries(), "after {:?}", op);
        }
        let whole = PageRange::new(VirtAddr::new(0), TASK_SIZE).unwrap();
        prop_assert_eq!(&shown(&table, whole), &model.0);
        for (page, &(pte, is_block)) in &model.0 {
            let found = table.lookup(va(*page).add(123));
            prop_assert_eq!((found.pfn(), found.access(), found.is_host()), (pte.pfn(), pte.access(), pte.is_host()));
            prop_assert_eq!(found.order(), if is_block { BLOCK_ORDER } else { 0 });
        }
        prop_assert_eq!(table.clear(whole), !model.0.is_empty());
        prop_assert_eq!(table.entries(), 0);
        // Every table came back: all six can be taken again.
        for block in 0..6 {
            prop_assert_eq!(table.set(va(block * BLOCK_PAGES), Pte::host(Access::Read)), Ok(()));
        }
        prop_assert!(table.set(va(6 * BLOCK_PAGES), Pte::host(Access::Read)).is_err());
    }
}

#[test]
fn access_levels_include_the_lower_ones() {
    let pte = Pte::frame(DevPfn::new(u32::MAX), Access::Write);
    assert_eq!(pte.pfn(), Some(DevPfn::new(u32::MAX)));
    assert!(pte.allows(Access::Read) && pte.allows(Access::Write) && !pte.allows(Access::Atomic));
    assert_eq!(pte.read_only().access(), Some(Access::Read));
    assert!(!Pte::NONE.allows(Access::Read));
    let exclusive = Pte::exclusive(Access::Atomic);
    assert!(exclusive.is_exclusive() && exclusive.is_host() && exclusive.pfn().is_none());
    assert!(exclusive.read_only().is_exclusive() && !exclusive.read_only().allows(Access::Write));
}

#[test]
fn a_table_without_room_holds_no_stale_entry() {
    let table = table(2, 1);
    let read = Pte::host(Access::Read);
    table.set_block(va(0), Pte::frame(DevPfn::new(512), Access::Write)).unwrap();
    table.set(va(BLOCK_PAGES), read).unwrap();
    // The only table is in use, so the block at 0 cannot be split: it has to go.
    assert_eq!(table.set(va(7), read), Err(TableFull { addr: va(7) }));
    assert_eq!(table.lookup(va(7)), Pte::NONE);
    assert_eq!(table.lookup(va(8)), Pte::NONE);
    table.set_block(va(0), Pte::frame(DevPfn::new(512), Access::Write)).unwrap();
    assert!(table.restrict(pages(3, 1)));
    assert_eq!(table.lookup(va(200)), table.lookup(va(200)).read_only());
    assert!(table.clear(pages(3, 1)));
    assert_eq!((table.lookup(va(3)), table.lookup(va(200))), (Pte::NONE, Pte::NONE));
    assert_eq!(table.entries(), 1);
}

#[test]
fn addresses_past_the_leaf_directories_or_the_space_have_no_entry() {
    let table = table(1, 4);
    table.set(va(1), Pte::host(Access::Read)).unwrap();
    let far = VirtAddr::new(TASK_SIZE - PAGE_SIZE);
    assert!(table.set(far, Pte::host(Access::Read)).is_err());
    assert!(table.set_block(far, Pte::host(Access::Read)).is_err());
    assert_eq!(table.lookup(far), Pte::NONE);
    assert_eq!(table.lookup(VirtAddr::new(TASK_SIZE)), Pte::NONE);
    assert!(table.set(VirtAddr::new(u64::MAX), Pte::host(Access::Read)).is_err());
}

/// Tells the readers when the writer has ended, be it by a panic.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Frames say which page and which era they belong to, so a foreign or an old entry is told at once. Two tables serve
/// four blocks, which change between the sizes all the time.
#[test]
fn a_lookup_finds_what_was_set_for_its_page_in_its_era() {
    const BLOCKS: u64 = 4;
    const PAGES: u64 = BLOCKS * BLOCK_PAGES;
    const ERAS: u32 = 60_000;
    const READERS: usize = 2;
    let table = table(1, 2);
    let (begun, done) = (AtomicU32::new(0), AtomicU32::new(0));
    let over = AtomicBool::new(false);
    let start = Barrier::new(READERS + 1);
    let frame = |page: u64, era: u32| DevPfn::new(page as u32 + PAGES as u32 * era);
    let found = thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS)
            .map(|me| {
                let (table, begun, done, over, start) = (&table, &begun, &done, &over, &start);
                scope.spawn(move || {
                    start.wait();
                    let mut page = me as u64;
                    let mut found = 0u64;
                    while !over.load(Ordering::Acquire) {
                        page = (page + 61) % PAGES;
                        let low = done.load(Ordering::SeqCst);
                        let pte = table.lookup(va(page));
                        let high = begun.load(Ordering::SeqCst);
                        let Some(pfn) = pte.pfn() else { continue };
                        found += 1;
                        assert_eq!(u64::from(pfn.get()) % PAGES, page, "an entry of another page");
                        let era = pfn.get() / PAGES as u32;
                        assert!(low <= era && era <= high, "page {page}: era {era} of {low}..={high}");
                    }
                    found
                })
            })
            .collect();
        start.wait();
        let end = End(&over);
        for era in 1..=ERAS {
            begun.store(era, Ordering::SeqCst);
            for block in 0..BLOCKS {
                let first = block * BLOCK_PAGES;
                let turn = (u64::from(era) + block) % BLOCKS;
                if turn < 2 {
                    // Make room before another block needs the table.
                    table.clear(pages(first, BLOCK_PAGES));
                }
                match turn {
                    0 => {}
                    1 => table.set_block(va(first), Pte::frame(frame(first, era), Access::Write)).unwrap(),
                    _ => {
                        table.clear(pages(first, BLOCK_PAGES));
                        for n in (0..8).map(|n| (n * 61 + u64::from(era)) % BLOCK_PAGES) {
                            let _ = table.set(va(first + n), Pte::frame(frame(first + n, era), Access::Read));
                        }
                    }
                }
            }
            done.store(era, Ordering::SeqCst);
        }
        drop(end);
        readers.into_iter().map(|reader| reader.join().unwrap()).sum::<u64>()
    });
    assert!(found > 1_000, "the readers found {found} entries: nothing was tested");
}
