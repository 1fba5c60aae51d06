//! Device memory: a memory file, a file on a disk, or memory of the process for a coherent device; addressed by the byte
//! offset of a frame.
//!
//! The files are sparse, and what is freed goes back in chunks of 2 MiB. Coherent memory stays once it was used: the
//! engine moves pages out of it and back. A chunk's word counts its frames in use:
//!
//! ```text
//!              take                      give the last, few chunks idle
//!   EMPTY ------------> used 1..=512 <--------------------------------> used 0 (idle: memory kept for reuse)
//!     ^                      |                       take
//!     |   hole punched       v  give the last, enough chunks idle
//!     +----------------- PUNCHING            (take waits)
//! ```
//!
//! Punching a hole for every page that goes home would cost more than the move itself, and the next page out would pay
//! for fresh memory. So a few chunks stay as they are when their last frame goes, and only what is beyond them is given
//! back.
//!
//! A file is read and written by system calls instead of being mapped: an I/O error is then an error and no signal, and
//! what lies on disk does not count as the process's memory.
//!
//! # Locking
//! The engine's copies take no lock. Lanes take one of a set of locks around each access to a frame of a *file*, because
//! a read-modify-write there is two system calls. The engine does not copy a frame while a lane may be in it.
//!
//! # Fork
//! The words are in memory that a forked child shares, as the frames are: who puts a frame last may be either process.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicU32, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
    },
    time::Duration,
};

use rustix::fs::{FallocateFlags, Mode, OFlags};
use thiserror::Error;
use uhmm::device::{CopyOp, DevPfn, DeviceError, FrameRun, MemoryKind};
use uhmm_sys::{
    Errno,
    addr::{BLOCK_SIZE, PAGE_SHIFT, PAGE_SIZE},
    arena,
    files::EngineFile,
    mem::{AtomicOp, HostBytes, Mapping, shared_slice},
};

use super::marks::Pause;

/// Frames in a chunk.
const CHUNK_FRAMES: u32 = 512;
/// Chunks without a frame in use whose memory is kept for the next pages: 256 MiB.
const IDLE_CHUNKS_KEPT: u32 = 128;
/// The chunk's bytes are zero and nothing stands behind them.
const EMPTY: u32 = 1 << 30;
/// A hole is being punched.
const PUNCHING: u32 = 1 << 31;
/// The longest wait for a hole that is being punched.
const PUNCH_LIMIT: Duration = Duration::from_secs(1);
/// What one system call moves between a file and the engine's memory, by way of the stack.
const FILE_CHUNK: usize = 16 << 10;
/// Locks for frames of a file.
const STRIPES: usize = 64;

/// Where the memory of a software device comes from. The size is a multiple of 2 MiB, not 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Memory {
    /// RAM, by a memory file.
    Ram {
        /// How much.
        bytes: u64,
    },
    /// A file without a name. It is sparse: it takes up what is used.
    File {
        /// The directory that says which file system.
        dir: PathBuf,
        /// How much.
        bytes: u64,
    },
}

/// Why a device's memory cannot be set up.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SoftError {
    /// The size is 0 or not a multiple of 2 MiB. Nothing is rounded.
    #[error("device memory of {bytes} bytes: not a multiple of 2 MiB above 0")]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// There are not as many frame numbers.
    #[error("device memory of {bytes} bytes: more than 2^32 pages")]
    TooLarge {
        /// What was asked for.
        bytes: u64,
    },
    /// The file system has less free space than the device would have.
    #[error("device memory of {bytes} bytes: {} has {free} bytes free", dir.display())]
    DiskTooSmall {
        /// The directory.
        dir: PathBuf,
        /// What was asked for.
        bytes: u64,
        /// What the file system has for us.
        free: u64,
    },
    /// The file could not be made.
    #[error("device memory in {}: {errno}", dir.display())]
    File {
        /// The directory.
        dir: PathBuf,
        /// What the kernel answered.
        errno: Errno,
    },
    /// A CPU cannot address a file's bytes.
    #[error("device memory in {}: a file cannot be coherent", dir.display())]
    CoherentFile {
        /// The directory.
        dir: PathBuf,
    },
    /// Memory could not be had.
    #[error("device memory: {0}")]
    Memory(Errno),
}

#[derive(Debug)]
enum Backing {
    Ram(Mapping),
    File(EngineFile),
    /// Coherent: the engine moves its pages.
    Process(HostBytes),
}

/// The memory of one device. See the module's documentation.
#[derive(Debug)]
pub(super) struct Store {
    backing: Backing,
    frames: u32,
    /// A word for each chunk: its state, and how many of its frames are in use.
    chunks: &'static [AtomicU32],
    /// A bit for each frame: in use.
    used: &'static [AtomicU64],
    /// Chunks that are not [`EMPTY`] and have no frame in use.
    idle: &'static AtomicU32,
    stripes: [Mutex<()>; STRIPES],
}

impl Store {
    /// Sets the memory up.
    pub(super) fn new(name: &str, memory: &Memory, kind: MemoryKind) -> Result<Self, SoftError> {
        let (Memory::Ram { bytes } | Memory::File { bytes, .. }) = *memory;
        if bytes == 0 || !bytes.is_multiple_of(BLOCK_SIZE) {
            return Err(SoftError::Size { bytes });
        }
        let frames = u32::try_from(bytes >> PAGE_SHIFT).map_err(|_| SoftError::TooLarge { bytes })?;
        let backing = match memory {
            Memory::Ram { .. } if kind == MemoryKind::Coherent => {
                let pages = arena::pages(bytes, BLOCK_SIZE).map_err(SoftError::Memory)?;
                Backing::Process(HostBytes::in_arena(pages.start(), bytes).expect("pages that the arena handed out"))
            }
            Memory::File { dir, .. } if kind == MemoryKind::Coherent => {
                return Err(SoftError::CoherentFile { dir: dir.clone() });
            }
            Memory::Ram { .. } => {
                let mapping = Mapping::memfd(name, bytes).map_err(SoftError::Memory)?;
                mapping.advise_huge();
                Backing::Ram(mapping)
            }
            Memory::File { dir, .. } => Backing::File(EngineFile::new(open_file(dir, bytes)?)),
        };
        let chunks: &[AtomicU32] = shared_slice((frames / CHUNK_FRAMES) as usize).map_err(SoftError::Memory)?;
        let idle: &[AtomicU32] = shared_slice(1).map_err(SoftError::Memory)?;
        let used = shared_slice((frames / u64::BITS) as usize).map_err(SoftError::Memory)?;
        for chunk in chunks {
            chunk.store(EMPTY, Relaxed);
        }
        let stripes = std::array::from_fn(|_| Mutex::new(()));
        Ok(Self { backing, frames, chunks, used, idle: &idle[0], stripes })
    }

    pub(super) const fn frames(&self) -> u32 {
        self.frames
    }

    // The engine's side.

    /// Copies host bytes into frames, which are in use from now on.
    pub(super) fn copy_in(&self, op: &CopyOp) -> Result<(), DeviceError> {
        self.take(op.frames)?;
        self.write_run(op.frames.offset(), op.host)
    }

    /// Copies frames into host bytes.
    pub(super) fn copy_out(&self, op: &CopyOp) -> Result<(), DeviceError> {
        self.read_run(op.frames.offset(), op.host)
    }

    /// Makes frames zero; they are in use from now on.
    pub(super) fn zero(&self, frames: FrameRun) -> Result<(), DeviceError> {
        let fresh = self.take(frames)? == Fresh::Yes;
        match &self.backing {
            // What is to be moved must be there.
            Backing::Process(bytes) => bytes.slice(frames.offset(), frames.bytes()).fill_zero(),
            _ if fresh => {}
            Backing::Ram(mapping) => mapping.zero(frames.offset(), frames.bytes()),
            Backing::File(fd) => {
                if punch(fd, frames.offset(), frames.bytes()).is_err() {
                    // A file system without holes.
                    let zeros = [0; PAGE_SIZE_USIZE];
                    for n in 0..frames.count {
                        pwrite_all(fd, &zeros, frames.first.add(n).offset())?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes note that frames are free, and may give their memory back. The engine gives the frames away after that.
    pub(super) fn give(&self, frames: FrameRun) {
        for part in chunk_parts(frames) {
            let freed = self.mark_used(part, false);
            if freed == 0 {
                // They never held anything.
                continue;
            }
            let chunk = part.first.get() / CHUNK_FRAMES;
            let word = &self.chunks[chunk as usize];
            let mut now = word.load(Acquire);
            let next = loop {
                let left = now - freed;
                let next = if left == 0 && self.idle.load(Relaxed).cast_signed() >= IDLE_CHUNKS_KEPT.cast_signed() {
                    PUNCHING
                } else {
                    left
                };
                match word.compare_exchange_weak(now, next, AcqRel, Acquire) {
                    Ok(_) => break next,
                    Err(current) => now = current,
                }
            };
            match next {
                0 => {
                    self.idle.fetch_add(1, Relaxed);
                }
                PUNCHING => {
                    let offset = DevPfn::new(chunk * CHUNK_FRAMES).offset();
                    let punched = match &self.backing {
                        Backing::Ram(mapping) => mapping.punch(offset, BLOCK_SIZE),
                        Backing::Process(_) => Err(Errno::OPNOTSUPP),
                        Backing::File(fd) => punch(fd, offset, BLOCK_SIZE),
                    };
                    if punched.is_ok() {
                        word.store(EMPTY, std::sync::atomic::Ordering::Release);
                    } else {
                        // No holes here: the memory stays ours.
                        self.idle.fetch_add(1, Relaxed);
                        word.store(0, std::sync::atomic::Ordering::Release);
                    }
                }
                _ => {}
            }
        }
    }

    /// Takes note that frames are used.
    ///
    /// # Errors
    /// [`DeviceError::Io`] with `ETIMEDOUT`: another process of the device stopped in the middle of punching a hole.
    fn take(&self, frames: FrameRun) -> Result<Fresh, DeviceError> {
        let mut fresh = Fresh::Yes;
        for part in chunk_parts(frames) {
            let taken = self.mark_used(part, true);
            if taken == 0 {
                fresh = Fresh::No;
                continue;
            }
            let word = &self.chunks[(part.first.get() / CHUNK_FRAMES) as usize];
            let mut pause = Pause::new(PUNCH_LIMIT);
            let mut now = word.load(Acquire);
            let before = loop {
                if now == PUNCHING {
                    if pause.wait().is_err() {
                        self.mark_used(part, false);
                        return Err(DeviceError::Io(Errno::TIMEDOUT));
                    }
                    now = word.load(Acquire);
                    continue;
                }
                match word.compare_exchange_weak(now, (now & !EMPTY) + taken, AcqRel, Acquire) {
                    Ok(before) => break before,
                    Err(current) => now = current,
                }
            };
            if before != EMPTY {
                fresh = Fresh::No;
            }
            if before == 0 {
                self.idle.fetch_sub(1, Relaxed);
            }
        }
        Ok(fresh)
    }

    /// Sets or clears the bits of frames of one chunk; returns how many changed.
    fn mark_used(&self, frames: FrameRun, used: bool) -> u32 {
        let (mut at, end) = (frames.first.get(), frames.first.get() + frames.count);
        let mut changed = 0;
        while at < end {
            let bit = at % u64::BITS;
            let n = (u64::BITS - bit).min(end - at);
            let mask = (u64::MAX >> (u64::BITS - n)) << bit;
            let word = &self.used[(at / u64::BITS) as usize];
            changed += if used {
                (mask & !word.fetch_or(mask, AcqRel)).count_ones()
            } else {
                (mask & word.fetch_and(!mask, AcqRel)).count_ones()
            };
            at += n;
        }
        changed
    }

    fn write_run(&self, off: u64, host: HostBytes) -> Result<(), DeviceError> {
        match &self.backing {
            Backing::Ram(mapping) => host.copy_to(mapping, off),
            Backing::Process(bytes) => HostBytes::copy_between(host, bytes.slice(off, host.len())),
            Backing::File(fd) => {
                let mut buf = [0; FILE_CHUNK];
                for (at, len) in file_parts(host.len()) {
                    host.slice(at, len as u64).read(0, &mut buf[..len]);
                    pwrite_all(fd, &buf[..len], off + at)?;
                }
            }
        }
        Ok(())
    }

    fn read_run(&self, off: u64, host: HostBytes) -> Result<(), DeviceError> {
        match &self.backing {
            Backing::Ram(mapping) => host.copy_from(mapping, off),
            Backing::Process(bytes) => HostBytes::copy_between(bytes.slice(off, host.len()), host),
            Backing::File(fd) => {
                let mut buf = [0; FILE_CHUNK];
                for (at, len) in file_parts(host.len()) {
                    pread_all(fd, &mut buf[..len], off + at)?;
                    host.slice(at, len as u64).write(0, &buf[..len]);
                }
            }
        }
        Ok(())
    }

    /// The file, if there is one.
    pub(super) const fn file(&self) -> Option<&EngineFile> {
        match &self.backing {
            Backing::Ram(_) | Backing::Process(_) => None,
            Backing::File(file) => Some(file),
        }
    }

    /// The memory, if it is the process's own.
    pub(super) const fn host_memory(&self) -> Option<HostBytes> {
        match &self.backing {
            Backing::Process(bytes) => Some(*bytes),
            Backing::Ram(_) | Backing::File(_) => None,
        }
    }

    // The lanes' side: at most a page, within one frame.

    /// Copies a part of a frame to `host`.
    pub(super) fn read(&self, off: u64, host: HostBytes) -> Result<(), DeviceError> {
        match &self.backing {
            Backing::Ram(mapping) => host.copy_from(mapping, off),
            Backing::Process(bytes) => HostBytes::copy_between(bytes.slice(off, host.len()), host),
            Backing::File(fd) => {
                let _held = self.stripe(off);
                file_to_host(fd, off, host)?;
            }
        }
        Ok(())
    }

    /// Copies `host` to a part of a frame.
    pub(super) fn write(&self, off: u64, host: HostBytes) -> Result<(), DeviceError> {
        match &self.backing {
            Backing::Ram(mapping) => host.copy_to(mapping, off),
            Backing::Process(bytes) => HostBytes::copy_between(host, bytes.slice(off, host.len())),
            Backing::File(fd) => {
                let _held = self.stripe(off);
                host_to_file(fd, off, host)?;
            }
        }
        Ok(())
    }

    /// Runs `change` on a copy in `scratch` and writes it back, as one step for every lane.
    fn file_rmw<T>(
        &self,
        fd: &EngineFile,
        off: u64,
        scratch: HostBytes,
        change: impl FnOnce(HostBytes) -> T,
    ) -> Result<T, DeviceError> {
        let _held = self.stripe(off);
        file_to_host(fd, off, scratch)?;
        let result = change(scratch);
        host_to_file(fd, off, scratch)?;
        Ok(result)
    }

    fn stripe(&self, off: u64) -> MutexGuard<'_, ()> {
        // The stripes guard no data, so a panic under one leaves nothing half done.
        self.stripes[(off >> PAGE_SHIFT) as usize % STRIPES].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The operations on numbers, for both widths. `off` is aligned to the width; `scratch` holds at least as many bytes.
macro_rules! numbers {
    ($n:ty, $load:ident, $store:ident, $rmw:ident, $cas:ident) => {
        impl Store {
            pub(super) fn $load(&self, off: u64, scratch: HostBytes) -> Result<$n, DeviceError> {
                match &self.backing {
                    Backing::Ram(mapping) => Ok(mapping.$load(off)),
                    Backing::Process(bytes) => Ok(bytes.$load(off)),
                    Backing::File(_) => {
                        self.read(off, scratch.slice(0, size_of::<$n>() as u64))?;
                        Ok(scratch.$load(0))
                    }
                }
            }

            pub(super) fn $store(&self, off: u64, scratch: HostBytes, n: $n) -> Result<(), DeviceError> {
                match &self.backing {
                    Backing::Ram(mapping) => {
                        mapping.$store(off, n);
                        Ok(())
                    }
                    Backing::Process(bytes) => {
                        bytes.$store(off, n);
                        Ok(())
                    }
                    Backing::File(_) => {
                        scratch.$store(0, n);
                        self.write(off, scratch.slice(0, size_of::<$n>() as u64))
                    }
                }
            }

            pub(super) fn $rmw(&self, off: u64, scratch: HostBytes, op: AtomicOp, n: $n) -> Result<$n, DeviceError> {
                match &self.backing {
                    Backing::Ram(mapping) => Ok(mapping.$rmw(off, op, n)),
                    Backing::Process(bytes) => Ok(bytes.$rmw(off, op, n)),
                    Backing::File(fd) => {
                        let scratch = scratch.slice(0, size_of::<$n>() as u64);
                        self.file_rmw(fd, off, scratch, |scratch| scratch.$rmw(0, op, n))
                    }
                }
            }

            pub(super) fn $cas(
                &self,
                off: u64,
                scratch: HostBytes,
                expected: $n,
                new: $n,
            ) -> Result<Result<$n, $n>, DeviceError> {
                match &self.backing {
                    Backing::Ram(mapping) => Ok(mapping.$cas(off, expected, new)),
                    Backing::Process(bytes) => Ok(bytes.$cas(off, expected, new)),
                    Backing::File(fd) => {
                        let scratch = scratch.slice(0, size_of::<$n>() as u64);
                        self.file_rmw(fd, off, scratch, |scratch| scratch.$cas(0, expected, new))
                    }
                }
            }
        }
    };
}
numbers!(u32, load_u32, store_u32, rmw_u32, cas_u32);
numbers!(u64, load_u64, store_u64, rmw_u64, cas_u64);

/// Whether frames that were taken are known to be zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fresh {
    Yes,
    No,
}

#[expect(clippy::cast_possible_truncation, reason = "a page is 4096 bytes")]
const PAGE_SIZE_USIZE: usize = PAGE_SIZE as usize;

/// Cuts a run at the borders of chunks.
fn chunk_parts(run: FrameRun) -> impl Iterator<Item = FrameRun> {
    let (mut at, end) = (run.first.get(), run.first.get() + run.count);
    std::iter::from_fn(move || {
        let count = (end - at).min(CHUNK_FRAMES - at % CHUNK_FRAMES);
        let part = FrameRun { first: DevPfn::new(at), count };
        at += count;
        (count > 0).then_some(part)
    })
}

/// Offsets and lengths of what one system call moves each.
fn file_parts(len: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..len).step_by(FILE_CHUNK).map(move |at| (at, FILE_CHUNK.min(usize::try_from(len - at).unwrap_or(FILE_CHUNK))))
}

fn file_to_host(fd: &EngineFile, off: u64, host: HostBytes) -> Result<(), DeviceError> {
    let mut buf = [0; PAGE_SIZE_USIZE];
    let buf = &mut buf[..page_part(host)];
    pread_all(fd, buf, off)?;
    host.write(0, buf);
    Ok(())
}

fn host_to_file(fd: &EngineFile, off: u64, host: HostBytes) -> Result<(), DeviceError> {
    let mut buf = [0; PAGE_SIZE_USIZE];
    let buf = &mut buf[..page_part(host)];
    host.read(0, buf);
    pwrite_all(fd, buf, off)
}

fn page_part(host: HostBytes) -> usize {
    usize::try_from(host.len()).expect("a lane moves at most a page")
}

fn device_error(errno: Errno) -> DeviceError {
    match errno {
        Errno::NOSPC | Errno::DQUOT => DeviceError::NoSpace,
        errno => DeviceError::Io(errno),
    }
}

fn pread_all(fd: &EngineFile, buf: &mut [u8], off: u64) -> Result<(), DeviceError> {
    let mut done = 0;
    while done < buf.len() {
        match rustix::io::pread(fd, &mut buf[done..], off + done as u64) {
            // The file has its full length, so its end is no answer.
            Ok(0) => return Err(DeviceError::Io(Errno::IO)),
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(device_error(errno)),
        }
    }
    Ok(())
}

fn pwrite_all(fd: &EngineFile, bytes: &[u8], off: u64) -> Result<(), DeviceError> {
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pwrite(fd, &bytes[done..], off + done as u64) {
            Ok(0) => return Err(DeviceError::Io(Errno::IO)),
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(device_error(errno)),
        }
    }
    Ok(())
}

fn punch(fd: &EngineFile, off: u64, len: u64) -> Result<(), Errno> {
    rustix::fs::fallocate(fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, off, len)
}

/// Makes a file without a name, of `bytes` zeros that take up no space.
fn open_file(dir: &Path, bytes: u64) -> Result<OwnedFd, SoftError> {
    let failed = |errno| SoftError::File { dir: dir.to_owned(), errno };
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    let fd = match rustix::fs::open(dir, flags | OFlags::TMPFILE, mode) {
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => open_and_unlink(dir, flags, mode),
        opened => opened,
    }
    .map_err(failed)?;
    let system = rustix::fs::fstatvfs(&fd).map_err(failed)?;
    let free = system.f_bavail.saturating_mul(system.f_frsize);
    if free < bytes {
        return Err(SoftError::DiskTooSmall { dir: dir.to_owned(), bytes, free });
    }
    rustix::fs::ftruncate(&fd, bytes).map_err(failed)?;
    Ok(fd)
}

/// For file systems that cannot make a file without a name.
fn open_and_unlink(dir: &Path, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    let pid = std::process::id();
    for n in 0..100 {
        let path = dir.join(format!(".uhmm-{pid}-{n}"));
        match rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, mode) {
            Ok(fd) => {
                rustix::fs::unlink(&path)?;
                return Ok(fd);
            }
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    Err(Errno::EXIST)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn host(bytes: u64) -> HostBytes {
        let range = arena::pages(bytes, PAGE_SIZE).expect("the arena has room");
        HostBytes::in_arena(range.start(), range.bytes()).expect("just handed out")
    }

    fn run(first: u32, count: u32) -> FrameRun {
        FrameRun { first: DevPfn::new(first), count }
    }

    fn stores(bytes: u64) -> [Store; 2] {
        let file = Memory::File { dir: std::env::temp_dir(), bytes };
        [Memory::Ram { bytes }, file].map(|memory| Store::new("test", &memory, MemoryKind::Private).expect("memory"))
    }

    fn coherent(bytes: u64) -> Store {
        Store::new("test", &Memory::Ram { bytes }, MemoryKind::Coherent).expect("memory")
    }

    /// Bytes that the kernel keeps for the store.
    fn backed(store: &Store) -> u64 {
        let stat = match &store.backing {
            Backing::Ram(mapping) => rustix::fs::fstat(mapping),
            Backing::File(fd) => rustix::fs::fstat(fd),
            Backing::Process(_) => unreachable!("its memory stays"),
        };
        u64::try_from(stat.expect("fstat").st_blocks).expect("not negative") * 512
    }

    fn page(host: HostBytes) -> Vec<u8> {
        let mut buf = vec![0; usize::try_from(host.len()).expect("small")];
        host.read(0, &mut buf);
        buf
    }

    #[test]
    fn what_was_copied_in_comes_out() {
        for store in stores(4 * MIB).into_iter().chain([coherent(4 * MIB)]) {
            // Odd sizes, across the border of the chunks.
            let (from, to) = (host(13 * PAGE_SIZE), host(13 * PAGE_SIZE));
            for n in 0..13 * PAGE_SIZE / 8 {
                from.store_u64(n * 8, n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            }
            let frames = run(505, 13);
            store.copy_in(&CopyOp { host: from, frames }).expect("room");
            store.copy_out(&CopyOp { host: to, frames }).expect("there");
            assert_eq!(page(from), page(to));
            store.zero(run(510, 3)).expect("room");
            store.copy_out(&CopyOp { host: to, frames }).expect("there");
            let (from, to) = (page(from), page(to));
            assert_eq!(from[..5 * 4096], to[..5 * 4096]);
            assert!(to[5 * 4096..8 * 4096].iter().all(|&byte| byte == 0));
            assert_eq!(from[8 * 4096..], to[8 * 4096..]);
        }
    }

    #[test]
    fn memory_is_given_back_past_the_idle_chunks_and_reads_as_zero() {
        let chunks = IDLE_CHUNKS_KEPT + 4;
        for store in stores(u64::from(chunks) * BLOCK_SIZE) {
            let block = host(BLOCK_SIZE);
            (0..BLOCK_SIZE / 8).for_each(|n| block.store_u64(n * 8, u64::MAX));
            for n in 0..chunks {
                store.copy_in(&CopyOp { host: block, frames: run(n * CHUNK_FRAMES, CHUNK_FRAMES) }).expect("room");
            }
            assert!(backed(&store) >= u64::from(chunks) * BLOCK_SIZE);
            for n in 0..chunks {
                store.give(run(n * CHUNK_FRAMES, 500));
                store.give(run(n * CHUNK_FRAMES + 500, 12));
            }
            assert!(backed(&store) <= u64::from(IDLE_CHUNKS_KEPT + 1) * BLOCK_SIZE);
            assert_eq!(store.idle.load(Relaxed), IDLE_CHUNKS_KEPT);
            // The last chunk is a hole, the first keeps its old bytes: neither may show.
            let out = host(PAGE_SIZE);
            for first in [0, (chunks - 1) * CHUNK_FRAMES + 7] {
                store.zero(run(first, 1)).expect("room");
                store.copy_out(&CopyOp { host: out, frames: run(first, 1) }).expect("there");
                assert!(page(out).iter().all(|&byte| byte == 0));
            }
            assert_eq!(store.idle.load(Relaxed), IDLE_CHUNKS_KEPT - 1);
        }
    }

    #[test]
    fn freeing_what_was_never_written_changes_nothing() {
        for store in stores(2 * MIB) {
            store.give(run(3, 20));
            assert_eq!(store.chunks[0].load(Relaxed), EMPTY);
            store.copy_in(&CopyOp { host: host(PAGE_SIZE), frames: run(3, 1) }).expect("room");
            store.give(run(3, 20));
            store.give(run(3, 20));
            assert_eq!((store.chunks[0].load(Relaxed), store.idle.load(Relaxed)), (0, 1));
        }
    }

    #[test]
    fn punching_never_takes_bytes_of_a_neighbour() {
        // Every freed chunk is punched at once, while other threads use other frames of the same chunks.
        let store = &Store::new("test", &Memory::Ram { bytes: 4 * MIB }, MemoryKind::Private).expect("memory");
        store.idle.store(IDLE_CHUNKS_KEPT, Relaxed);
        std::thread::scope(|s| {
            for thread in 0..3u32 {
                s.spawn(move || {
                    let (from, to) = (host(PAGE_SIZE), host(PAGE_SIZE));
                    for round in 0..3000u32 {
                        let frames = run(thread + 5 * (round % 200), 1);
                        from.store_u32(40, round);
                        store.copy_in(&CopyOp { host: from, frames }).expect("room");
                        store.copy_out(&CopyOp { host: to, frames }).expect("there");
                        assert_eq!(to.load_u32(40), round);
                        store.give(frames);
                    }
                });
            }
        });
        assert!(store.chunks.iter().all(|chunk| chunk.load(Relaxed) == EMPTY));
    }

    #[test]
    fn numbers_change_atomically_whatever_is_behind_them() {
        for store in stores(2 * MIB).iter().chain(&[coherent(2 * MIB)]) {
            store.zero(run(0, 1)).expect("room");
            std::thread::scope(|s| {
                for _ in 0..3 {
                    s.spawn(move || {
                        let scratch = host(PAGE_SIZE);
                        for _ in 0..1000 {
                            store.rmw_u64(64, scratch, AtomicOp::Add, 1).expect("there");
                            let mut seen = store.load_u32(80, scratch).expect("there");
                            while let Err(now) = store.cas_u32(80, scratch, seen, seen + 1).expect("there") {
                                seen = now;
                            }
                        }
                    });
                }
            });
            let scratch = host(PAGE_SIZE);
            assert_eq!(store.load_u64(64, scratch), Ok(3000));
            assert_eq!(store.load_u32(80, scratch), Ok(3000));
            store.store_u32(84, scratch, 7).expect("there");
            assert_eq!(store.load_u64(80, scratch), Ok(7 << 32 | 3000));
        }
    }

    #[test]
    fn bad_sizes_and_small_disks_are_refused() {
        let (dir, bytes) = (std::env::temp_dir(), 2 * MIB);
        let file = Memory::File { dir: dir.clone(), bytes };
        let error = Store::new("test", &file, MemoryKind::Coherent).map(drop);
        assert_eq!(error, Err(SoftError::CoherentFile { dir }));
        for bytes in [0, PAGE_SIZE, 3 * MIB] {
            assert_eq!(
                Store::new("test", &Memory::Ram { bytes }, MemoryKind::Private).map(drop),
                Err(SoftError::Size { bytes })
            );
        }
        let bytes = 1 << 45;
        assert_eq!(
            Store::new("test", &Memory::Ram { bytes }, MemoryKind::Private).map(drop),
            Err(SoftError::TooLarge { bytes })
        );
        let (dir, bytes) = (std::env::temp_dir(), 8 << 40);
        match Store::new("test", &Memory::File { dir: dir.clone(), bytes }, MemoryKind::Private) {
            Err(SoftError::DiskTooSmall { bytes: asked, free, .. }) => assert!(asked == bytes && free < bytes),
            other => panic!("{other:?}"),
        }
        let dir = dir.join("no such directory");
        let error =
            Store::new("test", &Memory::File { dir: dir.clone(), bytes: BLOCK_SIZE }, MemoryKind::Private).map(drop);
        assert_eq!(error, Err(SoftError::File { dir, errno: Errno::NOENT }));
    }
}
