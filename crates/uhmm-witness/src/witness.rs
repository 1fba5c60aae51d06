//! What the witness knows, how it looks, and the check that is made in every hook.

use std::{
    ffi::c_int,
    fmt,
    sync::atomic::{
        AtomicBool, AtomicUsize,
        Ordering::{Acquire, Relaxed, Release},
    },
};

use crate::{
    book::{Book, Kind, Page, Ranges},
    hash::{self, PAGE_LEN},
    judge::{self, Known, Said, UNWRITTEN, Wanted},
    maps::Maps,
    nodes::{self, NODES},
    raw::{self, File, PAGE, Region},
    say::{Text, say},
    state,
};

/// Pages of a range that are looked at; of longer ranges the first ones.
pub(crate) const LOOK_MAX: usize = 8 * 1024;
/// Pages whose bytes are read in one call.
const BATCH: usize = 64;
/// Regions that one look at the page map returns.
const REGIONS: usize = 512;
/// Violations that a process prints.
const PRINTED_MAX: u64 = 20;

/// Whether a violation is only printed, and the process goes on.
static ONLY_REPORTS: AtomicBool = AtomicBool::new(false);

const LOG_PATH_LEN: usize = 4096;
/// Where the figures go: a string that ends with a zero byte. Written before the program runs.
static LOG_PATH: [std::sync::atomic::AtomicU8; LOG_PATH_LEN] =
    [const { std::sync::atomic::AtomicU8::new(0) }; LOG_PATH_LEN];
static LOG_PATH_USED: AtomicUsize = AtomicUsize::new(0);

/// Takes the orders: where the figures go, and whether the process goes on after a violation.
pub(crate) fn configure(log: Option<&[u8]>, only_reports: bool) {
    ONLY_REPORTS.store(only_reports, Relaxed);
    if let Some(path) = log.filter(|path| !path.is_empty() && path.len() < LOG_PATH_LEN) {
        LOG_PATH.iter().zip(path).for_each(|(to, from)| to.store(*from, Relaxed));
        LOG_PATH_USED.store(path.len(), Release);
    }
}

/// What was known of a page before a command took it away.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Before {
    /// Its word in the page map.
    pub(crate) entry: u64,
    /// Its bytes, where they are known.
    pub(crate) hash: Option<u64>,
    /// Whether it was away already.
    pub(crate) is_away: bool,
    /// The node in whose coherent memory it was, and one; or 0.
    pub(crate) coherent: u8,
}

impl Before {
    const NONE: Self = Self { entry: 0, hash: None, is_away: false, coherent: 0 };
}

/// How often each thing was looked at. All but the last count pages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Counts {
    /// Gone to private device memory.
    pub(crate) moved: u64,
    /// Gone to coherent device memory.
    pub(crate) coherent: u64,
    /// Taken from the CPU.
    pub(crate) exclusive: u64,
    /// Brought home by a command.
    pub(crate) home: u64,
    /// Read by a device: while they were away, or twice.
    pub(crate) read: u64,
    /// Of which a device was asked where they are.
    pub(crate) compared: u64,
    /// Unmapped.
    pub(crate) unmapped: u64,
    /// Protected.
    pub(crate) protected: u64,
    /// Dropped.
    pub(crate) dropped: u64,
    /// Checks that were begun and could not be made.
    pub(crate) skipped: u64,
}

impl Counts {
    const NONE: Self = Self {
        moved: 0,
        coherent: 0,
        exclusive: 0,
        home: 0,
        read: 0,
        compared: 0,
        unmapped: 0,
        protected: 0,
        dropped: 0,
        skipped: 0,
    };

    const fn pages(&self) -> u64 {
        let Self { moved, coherent, exclusive, home, read, compared, unmapped, protected, dropped, skipped: _ } = *self;
        moved + coherent + exclusive + home + read + compared + unmapped + protected + dropped
    }
}

/// Everything. Its arrays are for one check at a time.
#[derive(Debug)]
pub(crate) struct Witness {
    /// Pages that are away.
    pub(crate) book: Book,
    /// Ranges that were ever given to a device.
    pub(crate) known: Ranges,
    pub(crate) maps: Maps,
    /// A command's pages, before it.
    pub(crate) before: [Before; LOOK_MAX],
    /// Words of the page map.
    pub(crate) entries: [u64; LOOK_MAX],
    /// The same from a second look.
    pub(crate) again: [u64; LOOK_MAX],
    /// What a device says.
    pub(crate) report: [u8; LOOK_MAX],
    /// Pages that a search has not found.
    pub(crate) missing: [bool; LOOK_MAX],
    pub(crate) wanted: Wanted<LOOK_MAX>,
    pub(crate) regions: [Region; REGIONS],
    /// Bytes of pages.
    pub(crate) bytes: [u8; BATCH * PAGE_LEN],
    pub(crate) counts: Counts,
    violations: u64,
    /// Pages may be away that are not in the book.
    has_forgotten: bool,
    during: Option<&'static str>,
}

impl Witness {
    pub(crate) const fn new() -> Self {
        Self {
            book: Book::new(),
            known: Ranges::new(),
            maps: Maps::new(),
            before: [Before::NONE; LOOK_MAX],
            entries: [0; LOOK_MAX],
            again: [0; LOOK_MAX],
            report: [0; LOOK_MAX],
            missing: [false; LOOK_MAX],
            wanted: Wanted::new(),
            regions: [Region::NONE; REGIONS],
            bytes: [0; BATCH * PAGE_LEN],
            counts: Counts::NONE,
            violations: 0,
            has_forgotten: false,
            during: None,
        }
    }

    /// Forgets which pages are away.
    pub(crate) fn forget(&mut self) {
        self.book.clear();
        self.has_forgotten = true;
    }

    /// Becomes the witness of a forked child: pages that were away are so still, or home; no device has them here.
    pub(crate) fn inherit(&mut self) {
        self.book.pages_mut().iter_mut().for_each(|page| page.kind = Kind::Inherited);
        self.known.clear();
        self.counts = Counts::NONE;
        self.violations = 0;
    }

    /// What the program is doing; for messages.
    pub(crate) const fn begin(&mut self, during: &'static str) {
        self.during = Some(during);
    }

    /// Something is not as it should be.
    pub(crate) fn violation(&mut self, what: &str, at: u64, detail: fmt::Arguments<'_>) {
        if state::is_disturbed() {
            self.counts.skipped += 1;
            return;
        }
        if self.violations < PRINTED_MAX {
            let during = self.during.unwrap_or("a call");
            say(format_args!("witness: VIOLATION: {what} at {at:#x} ({during}; {detail})"));
        }
        self.violations += 1;
    }

    /// Ends the process where a violation was seen. By a signal: some tests do not look at the status of their children, but all
    /// at whether they ended by themselves.
    pub(crate) fn settle(&mut self) {
        if self.violations != 0 && !ONLY_REPORTS.load(Relaxed) {
            self.log();
            raw::die();
        }
    }

    /// Appends the figures to the log, once, where there are any.
    pub(crate) fn log(&mut self) {
        if LOG_PATH_USED.load(Acquire) == 0 || self.counts.pages() + self.violations == 0 {
            return;
        }
        let mut path = [0; LOG_PATH_LEN];
        path.iter_mut().zip(&LOG_PATH).for_each(|(to, from)| *to = from.load(Relaxed));
        let Ok(path) = std::ffi::CStr::from_bytes_until_nul(&path) else { return };
        let Some(file) = File::open(path, libc::O_WRONLY | libc::O_APPEND | libc::O_CREAT) else { return };
        let Counts { moved, coherent, exclusive, home, read, compared, unmapped, protected, dropped, skipped } =
            self.counts;
        let line = Text::line(format_args!(
            "{{\"pid\":{},\"moved\":{moved},\"coherent\":{coherent},\"exclusive\":{exclusive},\"home\":{home},\
             \"read\":{read},\"compared\":{compared},\"unmapped\":{unmapped},\"protected\":{protected},\
             \"dropped\":{dropped},\"skipped\":{skipped},\"violations\":{}}}",
            raw::getpid(),
            self.violations,
        ));
        file.write(line.bytes());
        (self.counts, self.violations) = (Counts::NONE, 0);
    }

    /// A check could not be made.
    pub(crate) const fn skip(&mut self) {
        self.counts.skipped += 1;
    }

    /// Remembers a page as away, as far as there is room.
    pub(crate) fn put(&mut self, page: Page) {
        if !self.book.put(page) {
            self.has_forgotten = true;
        }
    }

    /// Asks a node what it says of pages, into `report`. Without an answer there is nothing to check.
    pub(crate) fn snapshot(&mut self, fd: c_int, at: u64, pages: usize) -> bool {
        let report = &mut self.report[..pages];
        report.fill(UNWRITTEN);
        let answered = nodes::snapshot(fd, at, pages as u64, report.as_mut_ptr()).is_ok();
        if !answered {
            self.skip();
        }
        answered
    }

    /// Where pages are and what their bytes are, before a command: into `before`.
    pub(crate) fn note(&mut self, look: &File, at: u64, pages: usize) -> bool {
        let Self { before, entries, bytes, book, maps, has_forgotten, .. } = self;
        if look.words(at / PAGE, &mut entries[..pages]) != pages {
            return false;
        }
        let has_maps = maps.read();
        for (i, note) in before[..pages].iter_mut().enumerate() {
            let (at, entry) = (at + i as u64 * PAGE, entries[i]);
            let known = book.get(at);
            let is_fresh = || {
                let is_anonymous = has_maps && maps.find(at).is_some_and(|mapping| mapping.is_anonymous);
                judge::is_empty(entry) && is_anonymous && !*has_forgotten
            };
            *note = Before {
                entry,
                hash: known.map_or_else(|| is_fresh().then_some(hash::ZEROS), |page| page.hash),
                is_away: known.is_some(),
                coherent: known.filter(|page| page.kind == Kind::Coherent).map_or(0, |page| page.node + 1),
            };
            if judge::is_present(entry) {
                note.hash = None;
            }
        }
        let entries = &entries[..pages];
        each_hash(bytes, at, pages, |i| judge::is_present(entries[i]), |i, hash| before[i].hash = Some(hash));
        true
    }

    /// Compares, of all pages that are away, what the nodes say with where they are.
    pub(crate) fn audit(&mut self) {
        if self.book.pages().is_empty() {
            return;
        }
        let Some(look) = look() else { return self.skip() };
        let mut first = 0;
        while let Some(page) = self.book.pages().get(first) {
            let at = page.at;
            let pages = self.book.run(first, LOOK_MAX);
            for node in 0..NODES {
                if let Some(fd) = nodes::fd(node) {
                    self.compare(&look, fd, node, at, pages);
                }
            }
            self.drop_inherited(&look, at, pages);
            first += pages;
        }
        self.book.drop_home();
    }

    /// Compares what a node says of pages with where they are. Only what is so before and after counts.
    pub(crate) fn compare(&mut self, look: &File, fd: c_int, node: u8, at: u64, pages: usize) {
        let first = at / PAGE;
        if look.words(first, &mut self.entries[..pages]) != pages
            || !self.snapshot(fd, at, pages)
            || look.words(first, &mut self.again[..pages]) != pages
        {
            return;
        }
        for i in 0..pages {
            let (at, entry, byte) = (at + i as u64 * PAGE, self.entries[i], self.report[i]);
            let Some(page) = self.book.get_mut(at) else { continue };
            if entry != self.again[i] {
                continue;
            }
            let said = Said::of(byte);
            let is_asked = page.node == node && page.kind != Kind::Inherited;
            let has_bytes = page.hash.is_some_and(|hash| hash != hash::ZEROS);
            if is_asked && judge::came_home(said, entry, page.kind) {
                page.is_home = true;
            }
            let known = Known { kind: page.kind, is_asked, has_bytes };
            if let Some(what) = judge::contradiction(said, nodes::is_private(node), entry, known) {
                self.violation(what, at, format_args!("node {node} says {byte:#04x}, page map {entry:#x}"));
            }
            self.counts.compared += 1;
        }
    }

    /// Pages of a parent that have come home here.
    fn drop_inherited(&mut self, look: &File, at: u64, pages: usize) {
        if look.words(at / PAGE, &mut self.entries[..pages]) != pages {
            return;
        }
        for i in 0..pages {
            let is_present = judge::is_present(self.entries[i]);
            if let Some(page) = self.book.get_mut(at + i as u64 * PAGE)
                && page.kind == Kind::Inherited
                && is_present
            {
                page.is_home = true;
            }
        }
    }
}

/// The page map. Opened anew each time: a forked child's is another one.
pub(crate) fn look() -> Option<File> {
    File::open(c"/proc/self/pagemap", libc::O_RDONLY)
}

/// Hashes those pages from `at` on that are asked for, as far as they can be read. `at` need not be aligned.
pub(crate) fn each_hash(
    bytes: &mut [u8],
    at: u64,
    pages: usize,
    wants_fn: impl Fn(usize) -> bool,
    mut hash_fn: impl FnMut(usize, u64),
) {
    let batch = bytes.len() / PAGE_LEN;
    let mut first = 0;
    while first < pages {
        let len = (first..pages).take(batch).take_while(|&i| wants_fn(i)).count();
        if len == 0 {
            first += 1;
            continue;
        }
        let buffer = &mut bytes[..len * PAGE_LEN];
        let read = raw::peek(at + first as u64 * PAGE, buffer);
        hash::pages(&buffer[..read]).enumerate().for_each(|(i, hash)| hash_fn(first + i, hash));
        first += len;
    }
}
