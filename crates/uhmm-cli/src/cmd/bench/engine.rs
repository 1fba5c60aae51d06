//! What uhmm itself costs, beside the bare mechanism of the same rounds.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use uhmm::{
    DeviceFaultPolicy, MigrateOptions, Mirror, Mm, PageOutcome,
    addr::{BLOCK_PAGES, BLOCK_SIZE, PAGE_SIZE, PageRange},
    device::{CopyOp, Device, DeviceError, FrameRun, Invalidation, MemoryKind, MemorySpec},
    mm::Report,
    trace::Counter,
};
use uhmm_devices::soft::{SoftConfig, SoftDevice};
use uhmm_sys::{
    area::{Area, PageSize},
    mem::Mapping,
    pagemap::{Page, Pagemap},
    thread::Kind,
    uffd::{Features, RegisterMode, SrcHoles, Uffd, Wake},
};

use super::{
    Effort,
    bare::{Bed, Putting, Waiting, cpus, touch},
    mechanism::{all, scan, small, stamp, uffd},
    report::{Bar, Latencies, Row, Samples, Unit, shuffled, timed, try_timed},
};

/// Frames in shared memory, and nothing else: what the engine costs shows best on a device that costs a `memcpy`.
struct Plain {
    memory: Mapping,
}

impl Device for Plain {
    fn name(&self) -> &str {
        "plain"
    }

    fn memory(&self) -> MemorySpec {
        let frames = u32::try_from(self.memory.len() / PAGE_SIZE).expect("a bench needs little memory");
        MemorySpec { frames, kind: MemoryKind::Private, survives_fork: false }
    }

    fn copy_to_device(&self, ops: &[CopyOp]) -> Result<(), DeviceError> {
        ops.iter().for_each(|op| op.host.copy_to(&self.memory, op.frames.offset()));
        Ok(())
    }

    fn copy_to_host(&self, ops: &[CopyOp]) -> Result<(), DeviceError> {
        ops.iter().for_each(|op| op.host.copy_from(&self.memory, op.frames.offset()));
        Ok(())
    }

    fn zero(&self, frames: FrameRun) -> Result<(), DeviceError> {
        self.memory.zero(frames.offset(), frames.bytes());
        Ok(())
    }

    fn flush(&self, _invalidation: &Invalidation) {}
}

/// An engine with one device, and memory to move.
struct Rig<D: Device> {
    mm: Mm,
    mirror: Mirror<D>,
    area: Area,
}

impl Rig<Plain> {
    fn new(pages: usize, size: PageSize) -> Result<Self> {
        Self::with(Plain { memory: device_memory(pages)? }, pages, size)
    }
}

impl Rig<SoftDevice> {
    /// With the software device, which runs.
    fn soft(pages: usize) -> Result<Self> {
        let bytes = (pages as u64 * PAGE_SIZE).next_multiple_of(BLOCK_SIZE);
        let rig = Self::with(SoftDevice::new(&SoftConfig::ram("bench", bytes))?, pages, PageSize::Small)?;
        rig.mirror.device().start(rig.mirror.port().context("the device is gone")?, 0, Kind::Pthread)?;
        Ok(rig)
    }
}

impl<D: Device> Rig<D> {
    fn with(device: D, pages: usize, size: PageSize) -> Result<Self> {
        let area = Area::new(pages, size)?;
        area.fill(stamp);
        let mm = Mm::open().context("starting the engine")?;
        let mirror = mm.register(device).context("registering a device")?;
        Ok(Self { mm, mirror, area })
    }

    /// A page that was touched a moment ago is busy until whoever answered the fault has done its books: it is asked for again.
    fn out(&self, range: PageRange) -> Result<()> {
        let start = Instant::now();
        loop {
            let report = self.mirror.migrate(range, &MigrateOptions::default());
            if report.count(PageOutcome::Busy) == 0 || start.elapsed() > BUSY_PATIENCE {
                return complete(&report);
            }
            std::thread::yield_now();
        }
    }

    fn home(&self, range: PageRange) -> Result<()> {
        complete(&self.mm.home(range))
    }

    fn check(&self) -> Result<()> {
        let wrong = (0..self.area.range().pages()).find(|&n| self.area.load(n) != stamp(n));
        ensure!(wrong.is_none(), "page {wrong:?} came home with other bytes");
        Ok(())
    }

    /// Everything home and no memory registered; says so if not.
    fn close(self) -> Result<()> {
        self.check()?;
        self.mirror.close()?;
        Ok(self.mm.close()?)
    }
}

/// How long pages are asked for that are busy.
const BUSY_PATIENCE: Duration = Duration::from_secs(5);

fn complete(report: &Report) -> Result<()> {
    ensure!(report.is_complete(), "{:?}", report.summary().collect::<Vec<_>>());
    Ok(())
}

/// Device memory that is allocated already, as a device's is.
fn device_memory(pages: usize) -> Result<Mapping> {
    let memory = Mapping::memfd("bench", pages as u64 * PAGE_SIZE).context("making device memory")?;
    memory.zero(0, memory.len());
    Ok(memory)
}

/// The bare way out and home: what the engine does, without the engine.
struct BareWay {
    uffd: Uffd,
    area: Area,
    staging: Area,
    device: Mapping,
}

impl BareWay {
    fn new(pages: usize) -> Result<Self> {
        let uffd = uffd()?;
        let area = small(pages)?;
        let staging = Area::new(pages, PageSize::Small)?;
        uffd.register(area.range(), RegisterMode::MISSING)?;
        uffd.register(staging.range(), RegisterMode::WP)?;
        Ok(Self { uffd, area, staging, device: device_memory(pages)? })
    }

    fn blocks(&self) -> impl Iterator<Item = usize> {
        (0..self.area.range().pages()).step_by(BLOCK_PAGES)
    }

    fn out(&self) -> Result<()> {
        self.blocks().try_for_each(|n| {
            let (src, dst) = (self.area.part(n, BLOCK_PAGES), self.staging.part(n, BLOCK_PAGES));
            let moved = self.uffd.move_pages(dst.start(), src.start(), src.bytes(), Wake::Later, SrcHoles::Fail);
            all(moved, "UFFDIO_MOVE")?;
            self.staging.copy_to(n, BLOCK_PAGES, &self.device, n as u64 * PAGE_SIZE);
            Ok(())
        })
    }

    fn home(&self) -> Result<()> {
        self.blocks().try_for_each(|n| {
            self.staging.copy_from(n, BLOCK_PAGES, &self.device, n as u64 * PAGE_SIZE);
            let (src, dst) = (self.staging.part(n, BLOCK_PAGES), self.area.part(n, BLOCK_PAGES));
            let moved = self.uffd.move_pages(dst.start(), src.start(), src.bytes(), Wake::Now, SrcHoles::Fail);
            all(moved, "UFFDIO_MOVE")
        })
    }
}

/// `memcpy` of an area to a device's memory, in blocks.
fn memcpy(area: &Area, device: &Mapping) {
    (0..area.range().pages())
        .step_by(BLOCK_PAGES)
        .for_each(|n| area.copy_to(n, BLOCK_PAGES, device, n as u64 * PAGE_SIZE));
}

const SPEED: Unit = Unit::GigabytesPerSecond;
/// What issue 2 asks of pages of 4 KiB, both ways.
const BANDWIDTH_BAR: Bar = Bar::AtLeast(0.60);
/// What it asks of a fault.
const FAULT_BAR: Bar = Bar::AtMost(1.5);

pub fn small_pages(effort: &Effort) -> Result<Vec<Row>> {
    let pages = effort.pages;
    let bare = if uffd()?.features().contains(Features::MOVE) { Some(BareWay::new(pages)?) } else { None };
    let (plain, target) = (small(pages)?, device_memory(pages)?);
    let rig = Rig::new(pages, PageSize::Small)?;
    let (mut copy, mut out, mut home) = (Samples::default(), Samples::default(), Samples::default());
    let (mut bare_out, mut bare_home) = (Samples::default(), Samples::default());
    for round in 0..effort.rounds + 1 {
        let copied = timed(|| memcpy(&plain, &target));
        let went = try_timed(|| rig.out(rig.area.range()))?;
        let came = try_timed(|| rig.home(rig.area.range()))?;
        let bare = bare.as_ref().map(|bare| anyhow::Ok((try_timed(|| bare.out())?, try_timed(|| bare.home())?)));
        let bare = bare.transpose()?;
        if round == 0 {
            // Everybody's first round pays for memory that the kernel has not handed out before.
            continue;
        }
        copy.push(SPEED.of(pages, copied));
        out.push(SPEED.of(pages, went));
        home.push(SPEED.of(pages, came));
        if let Some((went, came)) = bare {
            bare_out.push(SPEED.of(pages, went));
            bare_home.push(SPEED.of(pages, came));
        }
    }
    rig.close()?;
    let against = "memcpy";
    let row =
        |name, what, samples: &Samples, bar| Row::new(name, what, SPEED, samples).against(against, samples, &copy, bar);
    let mut rows = vec![
        row("out-4k", "uhmm, pages of 4 KiB to a device", &out, Some(BANDWIDTH_BAR)),
        row("home-4k", "uhmm, pages of 4 KiB home", &home, Some(BANDWIDTH_BAR)),
    ];
    if bare.is_some() {
        rows.push(row("out-4k-bare", "bare: MOVE to staging and copy", &bare_out, None));
        rows.push(row("home-4k-bare", "bare: copy into recycled staging and MOVE", &bare_home, None));
    }
    Ok(rows)
}

pub fn folios(effort: &Effort) -> Result<Vec<Row>> {
    let pages = effort.pages;
    let (plain, target) = (Area::new(pages, PageSize::Huge)?, device_memory(pages)?);
    plain.fill(stamp);
    let rig = Rig::new(pages, PageSize::Huge)?;
    let mut state = vec![Page::empty(); pages];
    Pagemap::open()?.scan(rig.area.range(), &mut state)?;
    let rows = [("out-2m", "uhmm, folios of 2 MiB to a device"), ("home-2m", "uhmm, folios of 2 MiB home")];
    if !state.iter().all(|page| page.contains(Page::HUGE)) {
        rig.close()?;
        return Ok(rows.map(|(name, what)| Row::absent(name, what, SPEED, "the kernel gave no huge pages")).into());
    }
    let (mut copy, mut out, mut home) = (Samples::default(), Samples::default(), Samples::default());
    for round in 0..effort.rounds + 1 {
        let copied = timed(|| memcpy(&plain, &target));
        let went = try_timed(|| rig.out(rig.area.range()))?;
        let came = try_timed(|| rig.home(rig.area.range()))?;
        if round > 0 {
            copy.push(SPEED.of(pages, copied));
            out.push(SPEED.of(pages, went));
            home.push(SPEED.of(pages, came));
        }
    }
    let folios = (effort.rounds + 1) * pages / BLOCK_PAGES;
    let whole = [Counter::FoliosOut, Counter::FoliosHome].map(|counter| rig.mm.stats().get(counter));
    rig.close()?;
    Ok(rows
        .into_iter()
        .zip([&out, &home])
        .zip(whole)
        .map(|(((name, what), samples), whole)| {
            let row = Row::new(name, what, SPEED, samples).against("memcpy", samples, &copy, None);
            row.note(format!("{whole} of {folios} folios moved whole"))
        })
        .collect())
}

/// Pages between two that are away, so that none comes home with another.
const APART: usize = 16;

pub fn faults(effort: &Effort) -> Result<Vec<Row>> {
    faults_with(Rig::new(effort.faults * APART, PageSize::Small)?, effort, "uhmm", "fault-home")
}

pub fn soft_faults(effort: &Effort) -> Result<Vec<Row>> {
    faults_with(Rig::soft(effort.faults * APART)?, effort, "uhmm and the software device", "soft-fault-home")
}

fn faults_with<D: Device>(rig: Rig<D>, effort: &Effort, who: &str, name: &str) -> Result<Vec<Row>> {
    let (cpu, _) = cpus();
    let on = [Some(cpu)];
    let bed = Bed::new(effort.faults, Waiting::Read, Putting::Copy)?;
    // Memory to recycle, as an engine has that has moved pages before.
    rig.out(rig.area.range())?;
    rig.home(rig.area.range())?;
    let (mut own, mut bare, mut around) = (Latencies::default(), Latencies::default(), Latencies::default());
    bed.with_handlers(&on, || {
        for round in 0..effort.rounds as u64 + 1 {
            bed.send_away()?;
            let (bare_took, _) = bed.touch_all(&on, round)?;
            let order: Vec<usize> = shuffled(effort.faults, round).into_iter().map(|n| n * APART + 5).collect();
            order.iter().try_for_each(|&page| rig.out(rig.area.part(page, 1)))?;
            let (own_took, _) = touch(&rig.area, &order, &on)?;
            rig.out(rig.area.range())?;
            let (around_took, _) = touch(&rig.area, &order, &on)?;
            rig.home(rig.area.range())?;
            if round > 0 {
                bare.push(bare_took);
                own.push(own_took);
                around.push(around_took);
            }
        }
        Ok(())
    })?;
    rig.close()?;
    let what = "bare handler, same CPU";
    Ok(vec![
        Row::latency(name, &format!("{who}, a fault on a page by itself"), &own).against(
            what,
            &own.p50,
            &bare.p50,
            Some(FAULT_BAR),
        ),
        Row::latency(&format!("{name}-around"), &format!("{who}, a fault among pages that are all away"), &around)
            .against(what, &around.p50, &bare.p50, None),
    ])
}

/// What the software device itself costs: out and home, and its own accesses.
pub fn soft_device(effort: &Effort) -> Result<Vec<Row>> {
    let pages = effort.pages;
    let (plain, target) = (small(pages)?, device_memory(pages)?);
    let rig = Rig::soft(pages)?;
    let mut lane = rig.mirror.device().lane().context("a lane")?;
    let (mut copy, mut out, mut home) = (Samples::default(), Samples::default(), Samples::default());
    let (mut hit, mut missed) = (Samples::default(), Samples::default());
    for round in 0..effort.rounds + 1 {
        let copied = timed(|| memcpy(&plain, &target));
        let went = try_timed(|| rig.out(rig.area.range()))?;
        let mut load = |page: usize| {
            let n = lane.load_u64(rig.area.range().page(page))?;
            ensure!(n == stamp(page), "the device finds other bytes on page {page}");
            Ok(())
        };
        // Once before: the device's own table and memory are then in the CPU's.
        (0..pages).try_for_each(&mut load)?;
        let loaded = try_timed(|| (0..pages).try_for_each(&mut load))?;
        let came = try_timed(|| rig.home(rig.area.range()))?;
        lane.set_fault_policy(DeviceFaultPolicy::Map);
        let faulted = try_timed(|| {
            (0..effort.faults).try_for_each(|n| {
                let page = n * (pages / effort.faults);
                let found = lane.load_u64(rig.area.range().page(page))?;
                ensure!(found == stamp(page), "the device finds other bytes on page {page}");
                Ok(())
            })
        })?;
        lane.set_fault_policy(DeviceFaultPolicy::Migrate);
        if round > 0 {
            copy.push(SPEED.of(pages, copied));
            out.push(SPEED.of(pages, went));
            home.push(SPEED.of(pages, came));
            hit.push(Unit::Nanos.of(pages, loaded));
            missed.push(Unit::Micros.of(effort.faults, faulted));
        }
    }
    drop(lane);
    rig.close()?;
    Ok(vec![
        Row::new("soft-out-4k", "uhmm and the software device, pages of 4 KiB out", SPEED, &out).against(
            "memcpy",
            &out,
            &copy,
            Some(BANDWIDTH_BAR),
        ),
        Row::new("soft-home-4k", "uhmm and the software device, pages of 4 KiB home", SPEED, &home).against(
            "memcpy",
            &home,
            &copy,
            Some(BANDWIDTH_BAR),
        ),
        Row::new("soft-load", "the software device loads from a frame, another page each time", Unit::Nanos, &hit),
        Row::new("soft-fault", "the software device faults on a page that stays in host memory", Unit::Micros, &missed),
    ])
}

pub fn sequential(effort: &Effort) -> Result<Vec<Row>> {
    let (cpu, _) = cpus();
    let pages = effort.pages / 2;
    let rig = Rig::new(pages, PageSize::Small)?;
    let (plain, target) = (small(pages)?, device_memory(pages)?);
    let order: Vec<usize> = (0..pages).collect();
    let (mut walk, mut copy) = (Samples::default(), Samples::default());
    let before = rig.mm.stats().get(Counter::FaultsHome);
    for _ in 0..effort.rounds {
        copy.push(Unit::NanosPerPage.of(pages, timed(|| memcpy(&plain, &target))));
        rig.out(rig.area.range())?;
        let (_, each) = touch(&rig.area, &order, &[Some(cpu)])?;
        walk.push(each);
    }
    let faults = rig.mm.stats().get(Counter::FaultsHome) - before;
    let walked = (pages * effort.rounds) as u64;
    rig.close()?;
    let row = Row::new("sequential", "uhmm, pages that are away touched in order", Unit::NanosPerPage, &walk)
        .against("memcpy", &walk, &copy, None)
        .note(format!("{} pages a fault", walked / faults.max(1)));
    Ok(vec![row])
}

pub fn snapshots(effort: &Effort) -> Result<Vec<Row>> {
    let pages = effort.pages;
    let rig = Rig::new(pages, PageSize::Small)?;
    let pagemap = Pagemap::open()?;
    let (mut own, mut bare) = (Samples::default(), Samples::default());
    for _ in 0..effort.rounds {
        bare.push(Unit::NanosPerPage.of(pages, try_timed(|| scan(&pagemap, &rig.area))?));
        let mut valid = 0;
        let took = try_timed(|| {
            valid = rig.mirror.snapshot(rig.area.range())?.iter().filter(|page| page.is_valid()).count();
            anyhow::Ok(())
        })?;
        ensure!(valid == pages, "{valid} of {pages} pages are valid");
        own.push(Unit::NanosPerPage.of(pages, took));
    }
    rig.close()?;
    let row = Row::new("snapshot", "uhmm, a snapshot of resident pages", Unit::NanosPerPage, &own).against(
        "PAGEMAP_SCAN",
        &own,
        &bare,
        None,
    );
    Ok(vec![row])
}
