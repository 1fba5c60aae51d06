//! What `uhmm run` and the preload library tell each other.
//!
//! `uhmm run` puts its orders into the environment, where children inherit them, and shares one piece of memory with all
//! processes of the tree, in which they keep their figures:
//!
//! | variable | what it says |
//! | --- | --- |
//! | [`SESSION`] | path of the shared figures; absent where nobody will read them |
//! | [`DEVICES`] | the devices of each process, separated by `;`, each as [`DeviceSpec`] prints it |
//! | [`RESIDENT`] | bytes of anonymous memory that each process keeps in RAM |
//! | [`STRESS`] | seed of the stress threads |
//! | [`FROM_START`] | seconds: each process waits so long, at most, to be managed from its first instruction on |
//! | [`START_DELAY`] | milliseconds by which each engine starts later: for tests |
//! | [`STRICT`] | `1`: a process that cannot be managed ends with status 125 instead of running unmanaged |
//!
//! Without [`RESIDENT`] and [`STRESS`] nothing moves, and no engine is started.

use std::{
    fmt,
    os::fd::{AsFd, AsRawFd},
    path::PathBuf,
    str::FromStr,
    sync::atomic::{
        AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
};

use thiserror::Error;
use uhmm_sys::{
    Errno,
    addr::{BLOCK_SIZE, PAGE_SIZE},
    mem::{self, Mapping},
};

use crate::{
    device::MemoryKind,
    trace::{STATS_WORDS, Stats},
};

/// Name of the variable with the path of the shared figures.
pub const SESSION: &str = "UHMM_SESSION";
/// Name of the variable with the devices.
pub const DEVICES: &str = "UHMM_DEVICES";
/// Name of the variable with the limit of anonymous memory in RAM.
pub const RESIDENT: &str = "UHMM_RESIDENT";
/// Name of the variable with the seed of the stress threads.
pub const STRESS: &str = "UHMM_STRESS";
/// Name of the variable that makes a program wait for its engine.
pub const FROM_START: &str = "UHMM_FROM_START";
/// Name of the variable that has engines start late.
pub const START_DELAY: &str = "UHMM_START_DELAY";
/// Name of the variable that makes failures fatal.
pub const STRICT: &str = "UHMM_STRICT";

/// Exit status of a program that could not be put under management where that was demanded, and of `uhmm run` itself
/// where it fails: the same that `env` and `timeout` use.
pub const EXIT_FAILED: u8 = 125;

/// The first word of the shared memory. Another version of the library must not write into it.
const MAGIC: u64 = u64::from_le_bytes(*b"uhmm-s\x01\x00");
/// Words before the figures.
const HEADER: usize = 2;
const WORDS: usize = HEADER + STATS_WORDS;

/// The shared figures, on the side that made them.
#[derive(Debug)]
pub struct Session {
    file: Mapping,
    stats: Stats,
}

/// Why the shared figures cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The kernel refused.
    #[error("the shared figures cannot be mapped: {0}")]
    Map(#[from] Errno),
    /// Something else is behind the path.
    #[error("the shared figures are of another version of uhmm")]
    Foreign,
}

impl Session {
    /// Makes the shared memory. It lives as long as this value, and with whoever has mapped it.
    ///
    /// # Errors
    /// `EMFILE`, `ENFILE`, `ENOMEM`.
    pub fn create() -> Result<Self, Errno> {
        let bytes = (WORDS * size_of::<AtomicU64>()) as u64;
        let file = Mapping::memfd("uhmm-session", bytes.next_multiple_of(PAGE_SIZE))?;
        let words: &'static [AtomicU64] = mem::shared_slice_from_fd(file.as_fd(), 0, WORDS)?;
        words[1].store(STATS_WORDS as u64, Relaxed);
        words[0].store(MAGIC, Release);
        Ok(Self { file, stats: Stats::new(&words[HEADER..]) })
    }

    /// The path by which other processes of the same user reach it, as long as this process lives.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_fd().as_raw_fd())
    }

    /// The figures.
    #[must_use]
    pub const fn stats(&self) -> Stats {
        self.stats
    }

    /// The figures, on the side of a process of the tree; `file` was opened by [`Session::path`]. They stay mapped.
    ///
    /// # Errors
    /// [`SessionError`].
    pub fn join(file: impl AsFd) -> Result<Stats, SessionError> {
        let words: &'static [AtomicU64] = mem::shared_slice_from_fd(file.as_fd(), 0, WORDS)?;
        if words[0].load(Acquire) != MAGIC || words[1].load(Relaxed) != STATS_WORDS as u64 {
            return Err(SessionError::Foreign);
        }
        Ok(Stats::new(&words[HEADER..]))
    }
}

/// A device as the command line describes it: `soft:SIZE[,file=DIR][,coherent]`.
///
/// Displayed with its size in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSpec {
    /// Size of its memory.
    pub bytes: u64,
    /// The directory for the file that is its memory; `None` for RAM.
    pub dir: Option<PathBuf>,
    /// Whether the CPU can address its memory.
    pub kind: MemoryKind,
}

/// Why a device's description is none.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SpecError {
    /// There is only one kind.
    #[error("there is no device kind `{0}`; the one there is is `soft:SIZE`")]
    Kind(String),
    /// The size is none.
    #[error("its size: {0}")]
    Size(#[from] SizeError),
    /// More than frame numbers can count.
    #[error("its size is more than {max} GiB", max = MAX_BYTES >> 30)]
    TooLarge,
    /// An option that there is not.
    #[error("there is no option `{0}`; there are `file=DIR` and `coherent`")]
    Option(String),
    /// `file=` without a directory.
    #[error("`file=` needs a directory")]
    NoDir,
    /// A character that separates devices.
    #[error("a directory's name must hold no `;`")]
    Separator,
}

/// Most bytes of a device: frame numbers have 32 bits, and the last of them stands for none.
const MAX_BYTES: u64 = (1 << 44) - BLOCK_SIZE;

impl FromStr for DeviceSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        if text.contains(';') {
            return Err(SpecError::Separator);
        }
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        if kind != "soft" {
            return Err(SpecError::Kind(kind.to_owned()));
        }
        let mut options = rest.split(',');
        let bytes = parse_size(options.next().unwrap_or_default())?;
        if bytes > MAX_BYTES {
            return Err(SpecError::TooLarge);
        }
        let mut spec = Self { bytes, dir: None, kind: MemoryKind::Private };
        for option in options {
            match option.split_once('=') {
                Some(("file", "")) => return Err(SpecError::NoDir),
                Some(("file", dir)) => spec.dir = Some(PathBuf::from(dir)),
                None if option == "coherent" => spec.kind = MemoryKind::Coherent,
                _ => return Err(SpecError::Option(option.to_owned())),
            }
        }
        Ok(spec)
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "soft:{}", self.bytes)?;
        if let Some(dir) = &self.dir {
            write!(f, ",file={}", dir.display())?;
        }
        if self.kind == MemoryKind::Coherent { f.write_str(",coherent") } else { Ok(()) }
    }
}

/// Reads what [`DEVICES`] holds.
///
/// # Errors
/// [`SpecError`], of the first that is none.
pub fn parse_devices(text: &str) -> Result<Vec<DeviceSpec>, SpecError> {
    text.split(';').filter(|part| !part.is_empty()).map(str::parse).collect()
}

/// Why a size is none.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SizeError {
    /// Not a number with a unit.
    #[error("`{0}` is no size; write `512M`, `64G` or a number of bytes")]
    Malformed(String),
    /// Nothing.
    #[error("it must not be 0")]
    Zero,
    /// More than 64 bits.
    #[error("`{0}` is too large")]
    TooLarge(String),
}

/// Reads a size in bytes: a whole number, with a unit `K`, `M`, `G` or `T` (powers of 1024; `KiB` and `KB` mean the same)
/// or none.
///
/// # Errors
/// [`SizeError`].
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let malformed = || SizeError::Malformed(text.to_owned());
    let too_large = || SizeError::TooLarge(text.to_owned());
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    if digits.is_empty() {
        return Err(malformed());
    }
    let number: u64 = digits.parse().map_err(|_| too_large())?;
    let unit = unit.to_ascii_uppercase();
    let shift = match unit.strip_suffix("IB").or(unit.strip_suffix('B')).unwrap_or(&unit) {
        "" if unit.is_empty() || unit == "B" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(malformed()),
    };
    match number.checked_mul(1 << shift) {
        Some(0) => Err(SizeError::Zero),
        Some(bytes) => Ok(bytes),
        None => Err(too_large()),
    }
}

/// How limits of address space (`RLIMIT_AS`) are shifted, so that a program can use as much as without uhmm.
///
/// The engine's own reservations count against the limit. So the kernel is given a higher one, and the program is told
/// the lower one when it asks. A limit is inherited by programs that are executed, which must be able to tell whether
/// it is shifted already: shifted limits are marked by their remainder, which no limit that a shell sets has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LimitShift(u64);

/// The unit in which shells set limits.
const LIMIT_UNIT: u64 = 1024;
/// The remainder that marks a shifted limit.
const LIMIT_MARK: u64 = 677;
/// Address space for the engine's own memory in a process that was not made for it. A forked child's engine takes what its
/// parent's left, some 1.3 GiB each, so this bounds how many forks deep a process can be managed.
pub const ARENA_BYTES: u64 = 64 << 30;
/// Address space for the nodes of the kernel's HMM test device, should the program open them: two devices of 4 GiB, and the
/// books of all four.
pub const NODE_BYTES: u64 = 2 * (4 << 30) + (128 << 20);
/// What the engine reserves besides what its devices need: the arena, the nodes, and a little.
const ENGINE_BYTES: u64 = ARENA_BYTES + NODE_BYTES + (64 << 20);
/// No limit.
const UNLIMITED: u64 = u64::MAX;

/// Address space that the devices of a process need: their memory, unless it is in a file, and the engine's books on it.
#[must_use]
pub fn address_space(devices: &[DeviceSpec]) -> u64 {
    devices
        .iter()
        .map(|spec| {
            // The books are some 18 bytes for each page.
            let books = (spec.bytes / 128).next_multiple_of(BLOCK_SIZE) + 2 * BLOCK_SIZE;
            if spec.dir.is_none() { spec.bytes.next_multiple_of(BLOCK_SIZE) + books } else { books }
        })
        .fold(0, |sum: u64, bytes: u64| sum.saturating_add(bytes).min(UNLIMITED / 4))
}

impl LimitShift {
    /// The shift where each process has these devices.
    #[must_use]
    pub fn for_devices(devices: &[DeviceSpec]) -> Self {
        Self((ENGINE_BYTES + address_space(devices)) & !(LIMIT_UNIT - 1))
    }

    /// What to tell the kernel where the program says `limit`.
    #[must_use]
    pub const fn shift(self, limit: u64) -> u64 {
        if limit == UNLIMITED || self.is_shifted(limit) {
            return limit;
        }
        match (limit & !(LIMIT_UNIT - 1)).checked_add(self.0 + LIMIT_MARK) {
            Some(shifted) => shifted,
            None => UNLIMITED,
        }
    }

    /// What to tell the program where the kernel says `limit`.
    #[must_use]
    pub const fn unshift(self, limit: u64) -> u64 {
        if self.is_shifted(limit) { limit - LIMIT_MARK - self.0 } else { limit }
    }

    const fn is_shifted(self, limit: u64) -> bool {
        limit != UNLIMITED && limit % LIMIT_UNIT == LIMIT_MARK && limit - LIMIT_MARK >= self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_1024() {
        for (text, bytes) in
            [("1", 1), ("4096B", 4096), ("2k", 2048), ("512M", 512 << 20), ("64GiB", 64 << 30), ("1TB", 1 << 40)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "-1", "1.5G", "1X", "1iB", "G1", "1 G", "1KK"] {
            assert_eq!(parse_size(text), Err(SizeError::Malformed(text.to_owned())), "{text}");
        }
        assert_eq!(parse_size("0G"), Err(SizeError::Zero));
        assert!(matches!(parse_size("99999999999T"), Err(SizeError::TooLarge(_))));
        assert!(matches!(parse_size("99999999999999999999999"), Err(SizeError::TooLarge(_))));
    }

    #[test]
    fn a_device_reads_back_as_it_was_printed() {
        for text in ["soft:1G", "soft:64G,file=/mnt/x", "soft:2M,coherent", "soft:3G,file=/a b/c,coherent"] {
            let spec: DeviceSpec = text.parse().unwrap();
            assert_eq!(spec.to_string().parse(), Ok(spec), "{text}");
        }
        let both = parse_devices("soft:1024;soft:2048,file=/tmp").unwrap();
        assert_eq!(both.iter().map(|d| d.bytes).collect::<Vec<_>>(), [1024, 2048]);
        assert_eq!(parse_devices(""), Ok(Vec::new()));
    }

    #[test]
    fn what_is_no_device_says_why() {
        let of = |text: &str| text.parse::<DeviceSpec>().unwrap_err();
        assert_eq!(of("hard:1G"), SpecError::Kind("hard".into()));
        assert_eq!(of("soft"), SpecError::Size(SizeError::Malformed(String::new())));
        assert_eq!(of("soft:0"), SpecError::Size(SizeError::Zero));
        assert_eq!(of("soft:1G,file="), SpecError::NoDir);
        assert_eq!(of("soft:1G,fast"), SpecError::Option("fast".into()));
        assert_eq!(of("soft:1G,file=/a;b"), SpecError::Separator);
        assert_eq!(of("soft:16T"), SpecError::TooLarge);
    }

    #[test]
    fn a_shifted_limit_is_known_again_and_shifted_once() {
        let shift = LimitShift::for_devices(&["soft:1G".parse().unwrap()]);
        for limit in [0, 1 << 20, 2_000_000 * 1024, 1 << 40] {
            let shifted = shift.shift(limit);
            assert!(shifted >= limit + (5 << 30));
            assert_eq!(shift.shift(shifted), shifted);
            assert_eq!(shift.unshift(shifted), limit);
            assert_eq!(shift.unshift(limit), limit, "a limit that was not shifted is left alone");
        }
        assert_eq!(shift.shift(u64::MAX), u64::MAX);
        assert_eq!(shift.unshift(u64::MAX), u64::MAX);
        assert_eq!(shift.shift(u64::MAX - 2048), u64::MAX);
        let file = LimitShift::for_devices(&["soft:64G,file=/x".parse().unwrap()]);
        assert!(file.shift(0) < ENGINE_BYTES + (2 << 30), "what is in a file is not mapped");
    }

    #[test]
    fn figures_are_shared_through_the_path() {
        let session = Session::create().unwrap();
        let file = std::fs::File::options().read(true).write(true).open(session.path()).unwrap();
        let stats = Session::join(file).unwrap();
        stats.add(crate::trace::Counter::PagesOut, 3);
        assert_eq!(session.stats().get(crate::trace::Counter::PagesOut), 3);

        let other = Mapping::memfd("other", 1 << 20).unwrap();
        assert!(matches!(Session::join(&other), Err(SessionError::Foreign)));
        let short = Mapping::memfd("short", PAGE_SIZE).unwrap();
        assert!(matches!(Session::join(&short), Err(SessionError::Map(Errno::INVAL))));
    }
}
