//! What the kernel's mechanisms cost by themselves, with no engine around them.

use anyhow::{Context, Result, ensure};
use uhmm_sys::{
    access,
    addr::{BLOCK_PAGES, PAGE_SIZE, PageRange},
    area::{Area, PageSize},
    pagemap::{Page, Pagemap},
    uffd::{Copied, Features, Protect, RegisterMode, SrcHoles, Uffd, Wake},
};

use super::{
    Effort,
    report::{Row, Samples, Unit, shuffled, timed, try_timed},
};

/// A number for each page that no other page has.
pub fn stamp(page: usize) -> u64 {
    (page as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Filled memory of small pages.
pub fn small(pages: usize) -> Result<Area> {
    let area = Area::new(pages, PageSize::Small).context("mapping memory")?;
    area.fill(stamp);
    Ok(area)
}

/// A userfaultfd without events: a `madvise` of the bench itself does not wait for a reader.
pub fn uffd() -> Result<Uffd> {
    Ok(Uffd::open(Features::MOVE | Features::FAULT_WP)?)
}

/// All of an operation, or why not.
pub fn all(copied: Copied, what: &str) -> Result<()> {
    match copied.stop {
        None => Ok(()),
        Some(errno) => Err(errno).with_context(|| format!("{what}, after {} bytes", copied.done)),
    }
}

/// The range in pieces of `pages` pages.
pub fn pieces(area: &Area, pages: usize) -> impl Iterator<Item = PageRange> {
    let total = area.range().pages();
    (0..total).step_by(pages).map(move |first| area.part(first, pages.min(total - first)))
}

pub fn memcpy(effort: &Effort) -> Result<Vec<Row>> {
    let pages = effort.pages;
    let (src, dst) = (small(pages)?, small(pages)?);
    let (from, to) = (shuffled(pages, 1), shuffled(pages, 2));
    let (mut large, mut random) = (Samples::default(), Samples::default());
    for _ in 0..effort.rounds {
        let took = timed(|| (0..pages).step_by(BLOCK_PAGES).for_each(|n| src.copy(n, BLOCK_PAGES, &dst, n)));
        large.push(Unit::GigabytesPerSecond.of(pages, took));
        let took = timed(|| from.iter().zip(&to).for_each(|(&from, &to)| src.copy(from, 1, &dst, to)));
        random.push(Unit::GigabytesPerSecond.of(pages, took));
    }
    Ok(vec![
        Row::new("memcpy-large", "memcpy, blocks of 2 MiB", Unit::GigabytesPerSecond, &large),
        Row::new("memcpy-random", "memcpy, 4 KiB from and to random places", Unit::GigabytesPerSecond, &random),
    ])
}

/// Two areas of one userfaultfd between which pages can be moved.
struct Shuttle {
    // Before the areas: dropped first, it leaves no registration behind for them.
    uffd: Uffd,
    home: Area,
    staging: Area,
}

impl Shuttle {
    fn new(pages: usize, size: PageSize) -> Result<Self> {
        let uffd = uffd()?;
        let home = Area::new(pages, size)?;
        home.fill(stamp);
        let staging = Area::new(pages, size)?;
        uffd.register(home.range(), RegisterMode::MISSING)?;
        uffd.register(staging.range(), RegisterMode::WP)?;
        Ok(Self { uffd, home, staging })
    }

    fn shift(&self, from: &Area, to: &Area, step: usize) -> Result<()> {
        pieces(from, step).zip(pieces(to, step)).try_for_each(|(from, to)| {
            let moved = self.uffd.move_pages(to.start(), from.start(), from.bytes(), Wake::Later, SrcHoles::Fail);
            all(moved, "UFFDIO_MOVE")
        })
    }

    fn out(&self, step: usize) -> Result<()> {
        self.shift(&self.home, &self.staging, step)
    }

    fn back(&self, step: usize) -> Result<()> {
        self.shift(&self.staging, &self.home, step)
    }

    fn is_huge(&self) -> Result<bool> {
        let mut pages = vec![Page::empty(); self.home.range().pages()];
        Pagemap::open()?.scan(self.home.range(), &mut pages)?;
        Ok(pages.iter().all(|page| page.contains(Page::HUGE)))
    }

    fn check(&self) -> Result<()> {
        let wrong = (0..self.home.range().pages()).find(|&n| self.home.load(n) != stamp(n));
        ensure!(wrong.is_none(), "page {wrong:?} came back with other bytes");
        Ok(())
    }
}

pub fn moves(effort: &Effort) -> Result<Vec<Row>> {
    let pages = effort.pages / 4;
    let mut rows = Vec::new();
    if !uffd()?.features().contains(Features::MOVE) {
        let why = "this kernel has no UFFDIO_MOVE (Linux 6.8)";
        return Ok(vec![Row::absent("move", "UFFDIO_MOVE", Unit::NanosPerPage, why)]);
    }
    let shuttle = Shuttle::new(pages, PageSize::Small)?;
    let steps =
        [(1, "4k", "4 KiB a call"), (16, "64k", "64 KiB a call"), (BLOCK_PAGES, "2m", "2 MiB of small pages a call")];
    let mut samples = [const { Vec::new() }; 3];
    for _ in 0..effort.rounds {
        for (figures, (step, ..)) in samples.iter_mut().zip(steps) {
            figures.push(Unit::NanosPerPage.of(pages, try_timed(|| shuttle.out(step))?));
            shuttle.back(BLOCK_PAGES)?;
        }
    }
    shuttle.check()?;
    drop(shuttle);
    for ((_, name, what), figures) in steps.iter().zip(&samples) {
        let mut all = Samples::default();
        figures.iter().for_each(|&figure| all.push(figure));
        rows.push(Row::new(&format!("move-{name}"), &format!("UFFDIO_MOVE, {what}"), Unit::NanosPerPage, &all));
    }
    rows.extend(folio_moves(effort, pages)?);
    Ok(rows)
}

fn folio_moves(effort: &Effort, pages: usize) -> Result<Vec<Row>> {
    let (whole_name, whole_what) = ("move-folio", "UFFDIO_MOVE, a whole folio of 2 MiB");
    let (split_name, split_what) = ("move-split", "UFFDIO_MOVE, 64 KiB a call, splitting folios");
    let (mut whole, mut split) = (Samples::default(), Samples::default());
    for _ in 0..effort.rounds {
        // Anew each round: what was split stays split.
        let shuttle = Shuttle::new(pages, PageSize::Huge)?;
        if !shuttle.is_huge()? {
            let why = "the kernel gave no huge pages";
            return Ok(vec![
                Row::absent(whole_name, whole_what, Unit::Micros, why),
                Row::absent(split_name, split_what, Unit::NanosPerPage, why),
            ]);
        }
        whole.push(Unit::Micros.of(pages / BLOCK_PAGES, try_timed(|| shuttle.out(BLOCK_PAGES))?));
        shuttle.back(BLOCK_PAGES)?;
        split.push(Unit::NanosPerPage.of(pages, try_timed(|| shuttle.out(16))?));
        shuttle.back(BLOCK_PAGES)?;
        shuttle.check()?;
    }
    Ok(vec![
        Row::new(whole_name, whole_what, Unit::Micros, &whole),
        Row::new(split_name, split_what, Unit::NanosPerPage, &split),
    ])
}

pub fn copies(effort: &Effort) -> Result<Vec<Row>> {
    let pages = effort.pages / 4;
    let uffd = uffd()?;
    let src = small(pages)?;
    let dst = Area::new(pages, PageSize::Small)?;
    uffd.register(dst.range(), RegisterMode::MISSING)?;
    let fill = |step| {
        access::zap(dst.range())?;
        let copy = |(to, from): (PageRange, PageRange)| {
            all(uffd.copy(to.start(), from.start(), to.bytes(), Wake::Later, Protect::Off), "UFFDIO_COPY")
        };
        try_timed(|| pieces(&dst, step).zip(pieces(&src, step)).try_for_each(copy))
    };
    let (mut one, mut many) = (Samples::default(), Samples::default());
    for _ in 0..effort.rounds {
        one.push(Unit::NanosPerPage.of(pages, fill(1)?));
        many.push(Unit::NanosPerPage.of(pages, fill(BLOCK_PAGES)?));
    }
    Ok(vec![
        Row::new("copy-4k", "UFFDIO_COPY, 4 KiB a call", Unit::NanosPerPage, &one),
        Row::new("copy-2m", "UFFDIO_COPY, 2 MiB a call", Unit::NanosPerPage, &many),
    ])
}

pub fn protect(effort: &Effort) -> Result<Vec<Row>> {
    let pages = effort.pages / 4;
    let uffd = uffd()?;
    let area = Area::new(pages, PageSize::Small)?;
    uffd.register(area.range(), RegisterMode::WP)?;
    let (mut protect, mut zap) = (Samples::default(), Samples::default());
    for _ in 0..effort.rounds {
        area.fill(stamp);
        let took =
            try_timed(|| pieces(&area, BLOCK_PAGES).try_for_each(|r| uffd.write_protect(r, Protect::On, Wake::Later)))?;
        protect.push(Unit::NanosPerPage.of(pages, took));
        let took = try_timed(|| pieces(&area, BLOCK_PAGES).try_for_each(access::zap))?;
        zap.push(Unit::NanosPerPage.of(pages, took));
    }
    Ok(vec![
        Row::new("protect", "UFFDIO_WRITEPROTECT, 2 MiB a call", Unit::NanosPerPage, &protect),
        Row::new("zap", "MADV_DONTNEED, 2 MiB a call", Unit::NanosPerPage, &zap),
    ])
}

/// What the page map says of all of `area`, by blocks.
pub fn scan(pagemap: &Pagemap, area: &Area) -> Result<()> {
    let mut out = [Page::empty(); BLOCK_PAGES];
    pieces(area, BLOCK_PAGES).try_for_each(|r| pagemap.scan(r, &mut out[..r.pages()])).context("PAGEMAP_SCAN")
}

pub fn scans(effort: &Effort) -> Result<Vec<Row>> {
    let area = small(effort.pages)?;
    let pagemap = Pagemap::open()?;
    let mut out = [Page::empty(); BLOCK_PAGES];
    let (mut scanned, mut read) = (Samples::default(), Samples::default());
    for _ in 0..effort.rounds {
        scanned.push(Unit::NanosPerPage.of(effort.pages, try_timed(|| scan(&pagemap, &area))?));
        let took =
            try_timed(|| pieces(&area, BLOCK_PAGES).try_for_each(|r| pagemap.read_words(r, &mut out[..r.pages()])))?;
        read.push(Unit::NanosPerPage.of(effort.pages, took));
    }
    let scan_what = "PAGEMAP_SCAN, 2 MiB a call";
    let scan_row = if pagemap.has_scan() {
        Row::new("scan", scan_what, Unit::NanosPerPage, &scanned)
    } else {
        Row::absent("scan", scan_what, Unit::NanosPerPage, "this kernel has none (Linux 6.7)")
    };
    Ok(vec![scan_row, Row::new("pagemap", "/proc/self/pagemap, 1 MiB of memory a read", Unit::NanosPerPage, &read)])
}

pub fn first_touch(effort: &Effort) -> Result<Vec<Row>> {
    let pages = effort.pages / 4;
    let area = Area::new(pages, PageSize::Small)?;
    let (mut write, mut read) = (Samples::default(), Samples::default());
    for _ in 0..effort.rounds {
        access::zap(area.range())?;
        let took = timed(|| {
            (0..pages).for_each(|n| {
                let _ = area.load(n);
            });
        });
        read.push(Unit::NanosPerPage.of(pages, took));
        access::zap(area.range())?;
        write.push(Unit::NanosPerPage.of(pages, timed(|| (0..pages).for_each(|n| area.store(n, stamp(n))))));
    }
    Ok(vec![
        Row::new("touch-write", "first touch of a page of 4 KiB, a store", Unit::NanosPerPage, &write),
        Row::new("touch-read", "first touch, a load (the zero page)", Unit::NanosPerPage, &read),
    ])
}

const _: () = assert!(PAGE_SIZE == 4096, "the rows say 4 KiB");
