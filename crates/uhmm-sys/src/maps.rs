//! The process's mappings, one at a time and without allocation: engine threads ask while memory is in motion.
//!
//! # Kernel
//! `PROCMAP_QUERY` (Linux 6.11) where there is one; otherwise the lines of `/proc/self/maps`, read from the start for
//! every question.
// UNSAFETY: an ioctl that fills a structure and a name.

use std::{
    ffi::CStr,
    os::fd::{AsFd, OwnedFd},
};

use bitflags::bitflags;

use crate::{
    Errno,
    addr::{PAGE_SIZE, PageRange, TASK_SIZE, VirtAddr},
    probe::{self, Cap},
    raw,
};

bitflags! {
    /// Protection of a mapping.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Prot: u8 {
        /// Can be read.
        const READ = 1 << 0;
        /// Can be written.
        const WRITE = 1 << 1;
        /// Can be executed.
        const EXEC = 1 << 2;
    }
}

/// Whether writes are seen by others who map the same thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sharing {
    /// `MAP_PRIVATE`.
    Private,
    /// `MAP_SHARED`.
    Shared,
}

/// What is behind a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backing {
    /// Nothing: private anonymous memory.
    Anonymous,
    /// A file or a device. Shared anonymous memory and hugetlb memory are files inside the kernel, and count as such.
    File,
    /// Pages of the kernel's own: `[vdso]`, `[vvar]` and their like.
    Special,
    /// The main thread's stack: anonymous memory that grows.
    Stack,
    /// The `brk` heap: anonymous memory.
    Heap,
}

/// A mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vma {
    /// Its addresses.
    pub range: PageRange,
    /// Its protection.
    pub prot: Prot,
    /// Private or shared.
    pub sharing: Sharing,
    /// What is behind it.
    pub backing: Backing,
    /// Size of its pages in bytes: 4096, or more for hugetlb. Without `PROCMAP_QUERY`, 2 MiB stands for any hugetlb
    /// size, and hugetlbfs files that have a name of their own are not recognised.
    pub page_size: u64,
}

impl Vma {
    /// Whether it is private anonymous memory of base pages: what can be managed.
    #[must_use]
    pub fn is_private_anonymous(&self) -> bool {
        self.sharing == Sharing::Private
            && self.page_size == PAGE_SIZE
            && matches!(self.backing, Backing::Anonymous | Backing::Stack | Backing::Heap)
    }
}

#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

const IOC_QUERY: u64 = raw::iowr::<Query>(b'f', 17);
const VMA_READABLE: u64 = 1 << 0;
const VMA_WRITABLE: u64 = 1 << 1;
const VMA_EXECUTABLE: u64 = 1 << 2;
const VMA_SHARED: u64 = 1 << 3;
const COVERING_OR_NEXT: u64 = 1 << 4;

/// Long enough for every name that the kernel gives a mapping without a file.
const NAME: usize = 128;
/// Bytes of `/proc/self/maps` read at a time; longer lines are understood up to here.
const TEXT: usize = 4096;

/// The mappings of the process that opened it. A forked child must open its own.
#[derive(Debug)]
pub struct Maps {
    /// For the query; `None` where the kernel has none.
    query: Option<OwnedFd>,
}

impl Maps {
    /// Opens the map of this process. A masked query ([`probe::mask`]) counts as missing.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`: no `/proc`, or not readable. `EMFILE`, `ENFILE`.
    pub fn open() -> Result<Self, Errno> {
        if probe::masked(Cap::ProcmapQuery) {
            return Ok(Self::text());
        }
        let fd = raw::open(c"/proc/self/maps", libc::O_RDONLY)?;
        let maps = Self { query: Some(fd) };
        let answer = maps.find(VirtAddr::new(0));
        Ok(if answer.is_ok() { maps } else { Self::text() })
    }

    /// A map that reads the text form on any kernel.
    #[must_use]
    pub const fn text() -> Self {
        Self { query: None }
    }

    /// Whether `PROCMAP_QUERY` is there.
    #[must_use]
    pub const fn has_query(&self) -> bool {
        self.query.is_some()
    }

    /// The mapping that covers `addr`, or the next one above it.
    ///
    /// # Errors
    /// Whatever the kernel answers; `EMFILE`, `ENFILE` too without `PROCMAP_QUERY`.
    pub fn find(&self, addr: VirtAddr) -> Result<Option<Vma>, Errno> {
        match &self.query {
            Some(fd) => ask(fd, addr),
            None => {
                let mut found = None;
                read_text(&mut |vma| {
                    let hit = vma.range.end() > addr;
                    if hit {
                        found = Some(vma);
                    }
                    hit
                })?;
                Ok(found)
            }
        }
    }

    /// Calls `f` for each mapping, ascending. Mappings may change meanwhile; each is reported as it was at some moment,
    /// and none overlaps the one before.
    ///
    /// # Errors
    /// As [`Maps::find`].
    pub fn for_each(&self, f: &mut dyn FnMut(Vma)) -> Result<(), Errno> {
        if self.query.is_none() {
            return read_text(&mut |vma| {
                f(vma);
                false
            });
        }
        let mut at = VirtAddr::new(0);
        while let Some(vma) = self.find(at)? {
            let rest = PageRange::from_ends(vma.range.start().max(at), vma.range.end());
            at = vma.range.end();
            if let Ok(range) = rest {
                f(Vma { range, ..vma });
            }
        }
        Ok(())
    }
}

fn ask(fd: &OwnedFd, addr: VirtAddr) -> Result<Option<Vma>, Errno> {
    let mut name = [0u8; NAME];
    let mut query = Query {
        size: size_of::<Query>() as u64,
        query_flags: COVERING_OR_NEXT,
        query_addr: addr.get(),
        vma_name_size: raw::low32(NAME as u64),
        vma_name_addr: raw::ptr_arg(name.as_mut_ptr()),
        ..Query::default()
    };
    // SAFETY: the structure of this ioctl; the name goes to a local buffer of the size given.
    let mut answer = unsafe { raw::ioctl(fd.as_fd(), IOC_QUERY, &mut query) };
    if answer == Err(Errno::NAMETOOLONG) {
        // Only files have such names, and a file is known by its inode.
        query = Query {
            size: size_of::<Query>() as u64,
            query_flags: COVERING_OR_NEXT,
            query_addr: addr.get(),
            ..Query::default()
        };
        name = [0; NAME];
        // SAFETY: the structure of this ioctl; no buffers.
        answer = unsafe { raw::ioctl(fd.as_fd(), IOC_QUERY, &mut query) };
    }
    match answer {
        Ok(_) => {}
        Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(e),
    }
    let Ok(range) = PageRange::from_ends(VirtAddr::new(query.vma_start), VirtAddr::new(query.vma_end)) else {
        // Above the user address space there is nothing that can be managed.
        return Ok(None);
    };
    let len = name.iter().position(|&b| b == 0).unwrap_or(NAME);
    let mut prot = Prot::empty();
    prot.set(Prot::READ, query.vma_flags & VMA_READABLE != 0);
    prot.set(Prot::WRITE, query.vma_flags & VMA_WRITABLE != 0);
    prot.set(Prot::EXEC, query.vma_flags & VMA_EXECUTABLE != 0);
    let sharing = if query.vma_flags & VMA_SHARED != 0 { Sharing::Shared } else { Sharing::Private };
    let backing = backing(query.inode, query.dev_major | query.dev_minor, &name[..len]);
    Ok(Some(Vma { range, prot, sharing, backing, page_size: query.vma_page_size }))
}

fn backing(inode: u64, device: u32, name: &[u8]) -> Backing {
    if inode != 0 || device != 0 {
        return Backing::File;
    }
    match name {
        b"[heap]" => Backing::Heap,
        b"[stack]" => Backing::Stack,
        [] => Backing::Anonymous,
        _ if name.starts_with(b"[anon:") => Backing::Anonymous,
        _ if name.starts_with(b"[") => Backing::Special,
        // A name without an inode: a file of a file system that has no numbers.
        _ => Backing::File,
    }
}

/// Whether part of `range` is sealed. `false` where the kernel does not say; takes long in large processes.
///
/// # Kernel
/// `mseal(2)`; `sl` among the flags in `/proc/self/smaps`.
#[must_use]
pub fn is_any_sealed(range: PageRange) -> bool {
    let (mut here, mut found) = (false, false);
    let _ = each_line(c"/proc/self/smaps", &mut |line| {
        if let Some(vma) = parse_line(line) {
            here = vma.range.overlaps(range);
            return vma.range.start() >= range.end();
        }
        found |= here && line.strip_prefix(b"VmFlags:").is_some_and(|f| f.split(|&b| b == b' ').any(|f| f == b"sl"));
        found
    });
    found
}

/// Calls `f` for each mapping in `/proc/self/maps` until it says to stop.
fn read_text(f: &mut dyn FnMut(Vma) -> bool) -> Result<(), Errno> {
    each_line(c"/proc/self/maps", &mut |line| parse_line(line).is_some_and(&mut *f))
}

/// Calls `f` for each line of a file until it says to stop. Long lines are cut off.
fn each_line(path: &CStr, f: &mut dyn FnMut(&[u8]) -> bool) -> Result<(), Errno> {
    let file = raw::open(path, libc::O_RDONLY)?;
    let mut buf = [0u8; TEXT];
    let mut held = 0;
    // Set while the rest of a line longer than the buffer is passed over.
    let mut skipping = false;
    loop {
        let n = match raw::read(file.as_fd(), &mut buf[held..]) {
            Ok(n) => n,
            Err(Errno::INTR) => continue,
            Err(e) => return Err(e),
        };
        if n == 0 {
            return Ok(());
        }
        held += n;
        let mut from = 0;
        while let Some(len) = buf[from..held].iter().position(|&b| b == b'\n') {
            let line = &buf[from..from + len];
            from += len + 1;
            if std::mem::take(&mut skipping) {
                continue;
            }
            if f(line) {
                return Ok(());
            }
        }
        buf.copy_within(from..held, 0);
        held -= from;
        if held == TEXT {
            if !skipping && f(&buf) {
                return Ok(());
            }
            skipping = true;
            held = 0;
        }
    }
}

/// Parses `start-end perms offset major:minor inode   name`. `None` for what lies above the user address space.
fn parse_line(line: &[u8]) -> Option<Vma> {
    let mut fields = line.split(|&b| b == b' ').filter(|field| !field.is_empty());
    let range = fields.next()?;
    let perms = fields.next()?;
    let _offset = fields.next()?;
    let device = fields.next()?;
    let inode = raw::parse_decimal(fields.next()?)?;
    let name = fields.next().unwrap_or(b"");
    let dash = range.iter().position(|&b| b == b'-')?;
    let (start, end) = (parse_hex(&range[..dash])?, parse_hex(&range[dash + 1..])?);
    if end > TASK_SIZE {
        return None;
    }
    let mut prot = Prot::empty();
    prot.set(Prot::READ, perms.first() == Some(&b'r'));
    prot.set(Prot::WRITE, perms.get(1) == Some(&b'w'));
    prot.set(Prot::EXEC, perms.get(2) == Some(&b'x'));
    let sharing = if perms.get(3) == Some(&b's') { Sharing::Shared } else { Sharing::Private };
    let device = u32::from(device.iter().any(|b| !matches!(b, b'0' | b':')));
    let huge = name.starts_with(b"/anon_hugepage");
    Some(Vma {
        range: PageRange::from_ends(VirtAddr::new(start), VirtAddr::new(end)).ok()?,
        prot,
        sharing,
        backing: backing(inode, device, name),
        page_size: if huge { 2 << 20 } else { PAGE_SIZE },
    })
}

fn parse_hex(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |n, b| {
        let digit = char::from(*b).to_digit(16)?;
        Some(n.checked_mul(16)? | u64::from(digit))
    })
}

/// Anonymous memory of the process that is in RAM, in bytes.
///
/// # Errors
/// Whatever reading `/proc/self/statm` answers.
pub fn anon_rss_bytes() -> Result<u64, Errno> {
    let mut buf = [0; 128];
    let text = raw::read_file(c"/proc/self/statm", &mut buf)?;
    let mut fields = text.split(|&b| b == b' ').map(raw::parse_decimal);
    let (_size, resident, shared) = (fields.next(), fields.next().flatten(), fields.next().flatten());
    match (resident, shared) {
        (Some(resident), Some(shared)) => Ok(resident.saturating_sub(shared) * PAGE_SIZE),
        _ => Err(Errno::IO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_every_kind_are_understood() {
        let vma = |line: &str| parse_line(line.as_bytes());
        let heap = vma("55d0c000-55d0e000 rw-p 00000000 00:00 0      [heap]").unwrap();
        assert_eq!((heap.range.start().get(), heap.range.end().get()), (0x55d0_c000, 0x55d0_e000));
        assert_eq!((heap.prot, heap.sharing), (Prot::READ | Prot::WRITE, Sharing::Private));
        assert_eq!((heap.backing, heap.is_private_anonymous()), (Backing::Heap, true));
        let named = vma("7f00000000-7f00001000 rw-p 00000000 00:00 0 [anon:a name]").unwrap();
        assert_eq!(named.backing, Backing::Anonymous);
        let shared = vma("7f00000000-7f00001000 rw-s 00000000 00:01 1024 /dev/zero (deleted)").unwrap();
        assert_eq!((shared.backing, shared.sharing), (Backing::File, Sharing::Shared));
        let vdso = vma("7ffff7fc1000-7ffff7fc3000 r-xp 00000000 00:00 0 [vdso]").unwrap();
        assert_eq!(vdso.backing, Backing::Special);
        let huge = vma("7f00000000-7f00200000 rw-p 00000000 00:0f 77 /anon_hugepage (deleted)").unwrap();
        assert_eq!((huge.page_size, huge.is_private_anonymous()), (2 << 20, false));
        assert_eq!(vma("ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]"), None);
        assert_eq!(vma("garbage"), None);
    }
}
