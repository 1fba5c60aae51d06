//! Bare fault handlers: threads that serve faults with one call to the kernel and keep no books. What an engine's
//! handler is held against.

use std::{
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread::{self, ScopedJoinHandle},
    time::Instant,
};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::fs::{OFlags, fcntl_setfl};
use uhmm_sys::{
    access,
    addr::{BLOCK_PAGES, PAGE_SIZE, VirtAddr},
    area::{Area, PageSize},
    mem::Mapping,
    thread::{allowed_cpus, pin_to},
    uffd::{Event, Features, Protect, RegisterMode, SrcHoles, Uffd, Wake},
};

use super::{
    Effort,
    mechanism::{all, stamp, uffd},
    report::{Latencies, Row, Samples, Unit, shuffled},
};

/// How a handler waits for a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// In `poll`, then a read: what everyone does.
    Poll,
    /// In the read itself.
    Read,
    /// Not at all: it reads again and again.
    Spin,
}

/// How a handler puts a page in place. Both copy the page's bytes out of device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Putting {
    /// `UFFDIO_COPY`, straight from device memory; the kernel allocates the page.
    Copy,
    /// Into a recycled staging page, and `UFFDIO_MOVE` of as many pages at a time.
    Move(usize),
}

/// CPUs to run on; `None` leaves it to the scheduler.
type Cpu = Option<usize>;

/// Memory whose faults bare handlers serve.
pub struct Bed {
    // Before the areas: dropped first, it leaves no registration behind for them.
    uffd: Uffd,
    area: Area,
    staging: Area,
    device: Mapping,
    pages: usize,
    waiting: Waiting,
    putting: Putting,
}

/// Pages at the end of the area whose faults end a handler.
const LAST_PAGES: usize = 64;

impl Bed {
    /// `pages` pages, there until [`Bed::send_away`] is called.
    pub fn new(pages: usize, waiting: Waiting, putting: Putting) -> Result<Self> {
        let uffd = uffd()?;
        if waiting == Waiting::Read {
            fcntl_setfl(&uffd, OFlags::empty()).context("making a userfaultfd block")?;
        }
        let area = Area::new(pages + LAST_PAGES, PageSize::Small)?;
        let staging = Area::new(pages + LAST_PAGES, PageSize::Small)?;
        let bytes = (pages + LAST_PAGES) as u64 * PAGE_SIZE;
        let device = Mapping::memfd("bench", bytes).context("making device memory")?;
        area.fill(stamp);
        area.copy_to(0, pages + LAST_PAGES, &device, 0);
        access::zap(area.part(pages, LAST_PAGES)).context("MADV_DONTNEED")?;
        uffd.register(area.range(), RegisterMode::MISSING)?;
        if matches!(putting, Putting::Move(_)) {
            uffd.register(staging.range(), RegisterMode::WP)?;
        }
        Ok(Self { uffd, area, staging, device, pages, waiting, putting })
    }

    /// Takes the pages away again.
    pub fn send_away(&self) -> Result<()> {
        match self.putting {
            Putting::Copy => access::zap(self.area.range()).context("MADV_DONTNEED"),
            Putting::Move(_) => (0..self.pages).step_by(BLOCK_PAGES).try_for_each(|n| {
                let count = BLOCK_PAGES.min(self.pages - n);
                let (src, dst) = (self.area.part(n, count), self.staging.part(n, count));
                let moved = self.uffd.move_pages(dst.start(), src.start(), src.bytes(), Wake::Later, SrcHoles::Fail);
                all(moved, "UFFDIO_MOVE")
            }),
        }
    }

    /// A handler's life: until a fault on one of the last pages.
    fn handle(&self, cpu: Cpu) -> Result<()> {
        if let Some(cpu) = cpu {
            pin_to(cpu)?;
        }
        loop {
            if self.waiting == Waiting::Poll {
                self.uffd.wait(None)?;
            }
            let addr = match self.uffd.read()? {
                Some(Event::Fault { addr, .. }) => addr,
                Some(event) => return Err(anyhow!("a message that nobody asked for: {event:?}")),
                None => continue,
            };
            let page = self.put(addr)?;
            if page >= self.pages {
                return Ok(());
            }
        }
    }

    fn put(&self, addr: VirtAddr) -> Result<usize> {
        let offset = addr.page().offset_from(self.area.range().start()).context("a fault outside the area")?;
        let page = usize::try_from(offset / PAGE_SIZE)?;
        match self.putting {
            Putting::Copy => {
                let src = self.device.range().start().add(offset);
                all(self.uffd.copy(addr.page(), src, PAGE_SIZE, Wake::Now, Protect::Off), "UFFDIO_COPY")?;
            }
            Putting::Move(around) => {
                let count = if page < self.pages { around } else { 1 };
                let first = page - page % count;
                self.staging.copy_from(first, count, &self.device, first as u64 * PAGE_SIZE);
                let (dst, src) = (self.area.part(first, count), self.staging.part(first, count));
                let moved = self.uffd.move_pages(dst.start(), src.start(), dst.bytes(), Wake::Now, SrcHoles::Fail);
                all(moved, "UFFDIO_MOVE")?;
            }
        }
        Ok(page)
    }

    /// Runs `body` while a handler on each of `cpus` serves the bed, and ends them.
    pub fn with_handlers<T>(&self, cpus: &[Cpu], body: impl FnOnce() -> Result<T>) -> Result<T> {
        assert!(cpus.len() <= LAST_PAGES, "more handlers than pages to end them with");
        thread::scope(|scope| {
            let handlers: Vec<_> = cpus.iter().map(|&cpu| scope.spawn(move || self.handle(cpu))).collect();
            let result = body();
            // One fault ends one handler, whichever reads it. These pages are never touched otherwise.
            let ended = handlers.iter().enumerate().try_for_each(|(n, _)| {
                if handlers.iter().all(ScopedJoinHandle::is_finished) {
                    return Err(anyhow!("the handlers ended early"));
                }
                self.check(self.pages + n)
            });
            let answers = handlers.into_iter().map(|h| h.join().unwrap_or_else(|_| Err(anyhow!("a handler panicked"))));
            let first_error = answers.filter_map(Result::err).next();
            first_error.map_or_else(|| ended.and(result), Err)
        })
    }

    fn check(&self, page: usize) -> Result<()> {
        ensure!(self.area.load(page) == stamp(page), "page {page} came with other bytes");
        Ok(())
    }

    /// Touches every page once, in random order, a part of them from each of `cpus`. Returns the time that each
    /// fault took and what the whole came to per page, in nanoseconds.
    pub fn touch_all(&self, cpus: &[Cpu], seed: u64) -> Result<(Vec<u64>, f64)> {
        let order = shuffled(self.pages, seed);
        touch(&self.area, &order, cpus)
    }
}

/// Touches the pages of `order`, a part of them from each of `cpus`, and checks their stamps.
pub fn touch(area: &Area, order: &[usize], cpus: &[Cpu]) -> Result<(Vec<u64>, f64)> {
    let ready = AtomicUsize::new(0);
    let parts: Vec<_> = order.chunks(order.len().div_ceil(cpus.len())).collect();
    let threads = parts.len();
    let toucher = |part: &[usize], cpu: Cpu| -> Result<(Vec<u64>, Instant, Instant)> {
        if let Some(cpu) = cpu {
            pin_to(cpu)?;
        }
        let mut took = vec![0; part.len()];
        ready.fetch_add(1, Relaxed);
        while ready.load(Relaxed) < threads {
            thread::yield_now();
        }
        let begin = Instant::now();
        let mut last = begin;
        for (&page, took) in part.iter().zip(&mut took) {
            ensure!(area.load(page) == stamp(page), "page {page} came with other bytes");
            let now = Instant::now();
            *took = u64::try_from((now - last).as_nanos())?;
            last = now;
        }
        Ok((took, begin, last))
    };
    thread::scope(|scope| {
        let toucher = &toucher;
        let threads: Vec<_> =
            parts.iter().zip(cpus).map(|(&part, &cpu)| scope.spawn(move || toucher(part, cpu))).collect();
        let mut latencies = Vec::with_capacity(order.len());
        let (mut begin, mut end) = (None::<Instant>, None::<Instant>);
        for thread in threads {
            let (took, from, to) = thread.join().map_err(|_| anyhow!("a touching thread panicked"))??;
            latencies.extend(took);
            begin = Some(begin.map_or(from, |b| b.min(from)));
            end = Some(end.map_or(to, |e| e.max(to)));
        }
        let wall = end.zip(begin).map_or(0.0, |(end, begin)| Unit::NanosPerPage.of(order.len(), end - begin));
        Ok((latencies, wall))
    })
}

/// The first two CPUs that this process may use, if there are two.
pub fn cpus() -> (usize, Option<usize>) {
    let set = allowed_cpus();
    let mut cpus = set.iter();
    (cpus.next().unwrap_or(0), cpus.next())
}

/// One way of handling faults, measured by itself.
struct Trial<'a> {
    name: &'a str,
    what: &'a str,
    waiting: Waiting,
    putting: Putting,
    handlers: &'a [Cpu],
    touchers: &'a [Cpu],
}

impl Trial<'_> {
    fn rows(&self, effort: &Effort) -> Result<Vec<Row>> {
        let bed = Bed::new(effort.faults, self.waiting, self.putting)?;
        let (mut single, mut wall) = (Latencies::default(), Samples::default());
        bed.with_handlers(self.handlers, || {
            for round in 0..effort.rounds as u64 + 1 {
                bed.send_away()?;
                let (latencies, each) = bed.touch_all(self.touchers, round)?;
                // The first round pays for pages that the kernel has not handed out before.
                if round > 0 {
                    single.push(latencies);
                    wall.push(each / 1e3);
                }
            }
            Ok(())
        })?;
        let row = Row::latency(self.name, self.what, &single);
        if self.touchers.len() == 1 {
            return Ok(vec![row]);
        }
        let name = format!("{}-wall", self.name);
        let what = format!("{}: time by faults", self.what);
        Ok(vec![row, Row::new(&name, &what, Unit::Micros, &wall)])
    }
}

fn without_move(putting: Putting) -> Result<bool> {
    Ok(matches!(putting, Putting::Move(_)) && !uffd()?.features().contains(Features::MOVE))
}

fn run(trials: &[Trial<'_>], effort: &Effort) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for trial in trials {
        if without_move(trial.putting)? {
            rows.push(Row::absent(trial.name, trial.what, Unit::Micros, "this kernel has no UFFDIO_MOVE (Linux 6.8)"));
        } else {
            rows.extend(trial.rows(effort)?);
        }
    }
    Ok(rows)
}

pub fn faults_polling(effort: &Effort) -> Result<Vec<Row>> {
    let (cpu, other) = cpus();
    let mut rows = run(
        &[Trial {
            name: "fault-poll",
            what: "fault, one handler in poll wherever it may run, COPY",
            waiting: Waiting::Poll,
            putting: Putting::Copy,
            handlers: &[None],
            touchers: &[None],
        }],
        effort,
    )?;
    let (name, what) = ("fault-spin", "fault, a handler that spins on another CPU, COPY");
    rows.extend(match other {
        None => vec![Row::absent(name, what, Unit::Micros, "one CPU")],
        Some(other) => run(
            &[Trial {
                name,
                what,
                waiting: Waiting::Spin,
                putting: Putting::Copy,
                handlers: &[Some(other)],
                touchers: &[Some(cpu)],
            }],
            effort,
        )?,
    });
    Ok(rows)
}

pub fn faults_each_cpu(effort: &Effort) -> Result<Vec<Row>> {
    let (cpu, other) = cpus();
    let handlers: Vec<Cpu> = allowed_cpus().iter().take(LAST_PAGES).map(Some).collect();
    let each = Trial {
        name: "fault-each-cpu",
        what: "fault, a handler on each CPU in read, COPY",
        waiting: Waiting::Read,
        putting: Putting::Copy,
        handlers: &handlers,
        touchers: &[Some(cpu)],
    };
    let mut rows = run(&[each], effort)?;
    let (name, what) = ("fault-two", "two threads fault, a handler on each CPU in read, COPY");
    rows.extend(match other {
        None => vec![Row::absent(name, what, Unit::Micros, "one CPU")],
        Some(other) => run(
            &[Trial {
                name,
                what,
                waiting: Waiting::Read,
                putting: Putting::Copy,
                handlers: &handlers,
                touchers: &[Some(cpu), Some(other)],
            }],
            effort,
        )?,
    });
    Ok(rows)
}

pub fn faults_same_cpu(effort: &Effort) -> Result<Vec<Row>> {
    let (cpu, _) = cpus();
    let on = [Some(cpu)];
    let trial =
        |name, what, putting| Trial { name, what, waiting: Waiting::Read, putting, handlers: &on, touchers: &on };
    run(
        &[
            trial("fault-same-cpu", "fault, one handler on the faulting CPU in read, COPY", Putting::Copy),
            trial("fault-same-cpu-move", "the same, copy into staging and MOVE", Putting::Move(1)),
        ],
        effort,
    )
}

pub fn fault_around(effort: &Effort) -> Result<Vec<Row>> {
    let (name, what) = ("fault-around", "16 pages at one fault, handler on the faulting CPU, copy and MOVE");
    if without_move(Putting::Move(16))? {
        return Ok(vec![Row::absent(name, what, Unit::NanosPerPage, "this kernel has no UFFDIO_MOVE (Linux 6.8)")]);
    }
    let (cpu, _) = cpus();
    let bed = Bed::new(effort.faults * 4, Waiting::Read, Putting::Move(16))?;
    let order: Vec<usize> = (0..bed.pages).collect();
    let mut wall = Samples::default();
    bed.with_handlers(&[Some(cpu)], || {
        for round in 0..effort.rounds + 1 {
            bed.send_away()?;
            let (_, each) = touch(&bed.area, &order, &[Some(cpu)])?;
            if round > 0 {
                wall.push(each);
            }
        }
        Ok(())
    })?;
    Ok(vec![Row::new(name, what, Unit::NanosPerPage, &wall)])
}
