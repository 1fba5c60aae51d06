//! Device nodes that the process has open, and what they are asked.

use std::{
    ffi::{CStr, c_int, c_ulong, c_void},
    ptr::with_exposed_provenance_mut,
    sync::atomic::{
        AtomicU8,
        Ordering::{Acquire, Release},
    },
};

use crate::{
    next::{self, call_next},
    raw,
};

/// How many nodes there are.
pub(crate) const NODES: u8 = 4;

/// Descriptors from here on are not known.
const FDS: usize = 1024;

/// What each descriptor is: 0, or a node's number and one.
static OPEN: [AtomicU8; FDS] = [const { AtomicU8::new(0) }; FDS];

/// The node that a path names.
pub(crate) fn named(path: &CStr) -> Option<u8> {
    match path.to_bytes().strip_prefix(b"/dev/hmm_dmirror")? {
        &[digit @ b'0'..=b'3'] => Some(digit - b'0'),
        _ => None,
    }
}

/// Whether a node's memory is out of the CPU's reach.
pub(crate) const fn is_private(node: u8) -> bool {
    node < 2
}

fn slot(fd: c_int) -> Option<&'static AtomicU8> {
    OPEN.get(usize::try_from(fd).ok()?)
}

/// A descriptor was opened, as that of a node or of something else.
pub(crate) fn opened(fd: c_int, node: Option<u8>) {
    if let Some(slot) = slot(fd) {
        slot.store(node.map_or(0, |node| node + 1), Release);
    }
}

/// The node that a descriptor is of.
pub(crate) fn node(fd: c_int) -> Option<u8> {
    slot(fd)?.load(Acquire).checked_sub(1)
}

/// The first descriptor of a node, other than the given one.
pub(crate) fn other_fd(node: u8, than: c_int) -> Option<c_int> {
    let is_it = |&(fd, slot): &(usize, &AtomicU8)| slot.load(Acquire) == node + 1 && c_int::try_from(fd) != Ok(than);
    OPEN.iter().enumerate().find(is_it).and_then(|(fd, _)| c_int::try_from(fd).ok())
}

/// A descriptor of a node.
pub(crate) fn fd(node: u8) -> Option<c_int> {
    other_fd(node, -1)
}

/// Forgets all: those of a parent are not this process's.
pub(crate) fn forget() {
    OPEN.iter().for_each(|slot| slot.store(0, Release));
}

/// The commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    Read,
    Write,
    MigrateToDev,
    MigrateToSys,
    Snapshot,
    Exclusive,
    CheckExclusive,
    Release,
    Other,
}

impl Command {
    const FIRST: c_ulong = 0xc028_4800;

    /// The command that a request is.
    pub(crate) const fn of(request: c_ulong) -> Option<Self> {
        if request & !0xff != Self::FIRST {
            return None;
        }
        Some(match request & 0xff {
            0 | 9 => Self::Read,
            1 => Self::Write,
            2 => Self::MigrateToDev,
            3 => Self::MigrateToSys,
            4 => Self::Snapshot,
            5 => Self::Exclusive,
            6 => Self::CheckExclusive,
            7 => Self::Release,
            _ => Self::Other,
        })
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Read => "READ",
            Self::Write => "WRITE",
            Self::MigrateToDev => "MIGRATE_TO_DEV",
            Self::MigrateToSys => "MIGRATE_TO_SYS",
            Self::Snapshot => "SNAPSHOT",
            Self::Exclusive => "EXCLUSIVE",
            Self::CheckExclusive => "CHECK_EXCLUSIVE",
            Self::Release => "RELEASE",
            Self::Other => "another command",
        }
    }
}

/// `struct hmm_dmirror_cmd`: what a command is given, and what it answers.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Arguments {
    /// First page of the range.
    pub(crate) addr: u64,
    /// Where the program's bytes are or shall be.
    pub(crate) ptr: u64,
    /// Pages of the range.
    pub(crate) npages: u64,
    /// Pages that were dealt with.
    pub(crate) cpages: u64,
    /// Faults that the device took.
    pub(crate) faults: u64,
}

impl Arguments {
    /// What the program passes, which may lie anywhere.
    pub(crate) fn read(at: *const c_void) -> Option<Self> {
        let mut bytes = [0; size_of::<Self>()];
        if raw::peek(at.addr() as u64, &mut bytes) != bytes.len() {
            return None;
        }
        let ([addr, ptr, npages, cpages, faults], []) = bytes.as_chunks::<8>() else { return None };
        let word = |bytes: &[u8; 8]| u64::from_ne_bytes(*bytes);
        Some(Self {
            addr: word(addr),
            ptr: word(ptr),
            npages: word(npages),
            cpages: word(cpages),
            faults: word(faults),
        })
    }

    /// The range, as addresses, where it is one.
    pub(crate) fn range(&self) -> Option<(u64, u64)> {
        let end = self.npages.checked_mul(raw::PAGE)?.checked_add(self.addr)?;
        (self.addr.is_multiple_of(raw::PAGE) && self.npages != 0).then_some((self.addr, end))
    }
}

/// Gives a node a command of the witness's own. What it answers, or the errno.
fn command(fd: c_int, nr: c_ulong, mut arguments: Arguments) -> Result<Arguments, c_int> {
    fn call(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
        call_next!(next::IOCTL, -1, fn(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int)
    }
    let place = with_exposed_provenance_mut((&raw mut arguments).expose_provenance());
    if call(fd, Command::FIRST + nr, place) != 0 {
        return Err(raw::errno());
    }
    // The call has written there by the address.
    Arguments::read(place).ok_or(libc::EFAULT)
}

fn arguments(addr: u64, npages: u64, ptr: *mut u8) -> Arguments {
    Arguments { addr, ptr: ptr.expose_provenance() as u64, npages, cpages: 0, faults: 0 }
}

/// Has a node read. How many faults it took.
pub(crate) fn read(fd: c_int, addr: u64, npages: u64, to: *mut u8) -> Result<u64, c_int> {
    command(fd, 0, arguments(addr, npages, to)).map(|answer| answer.faults)
}

/// Has a node write.
pub(crate) fn write(fd: c_int, addr: u64, npages: u64, from: *mut u8) -> Result<(), c_int> {
    command(fd, 1, arguments(addr, npages, from)).map(drop)
}

/// Has a node say where pages are, a byte a page.
pub(crate) fn snapshot(fd: c_int, addr: u64, npages: u64, to: *mut u8) -> Result<(), c_int> {
    command(fd, 4, arguments(addr, npages, to)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_nodes() {
        assert_eq!(named(c"/dev/hmm_dmirror0"), Some(0));
        assert_eq!(named(c"/dev/hmm_dmirror3"), Some(3));
        for other in [c"/dev/hmm_dmirror4", c"/dev/hmm_dmirror", c"/dev/hmm_dmirror00", c"/dev/null"] {
            assert_eq!(named(other), None);
        }
    }

    #[test]
    fn requests_are_commands() {
        assert_eq!(Command::of(0xc028_4802), Some(Command::MigrateToDev));
        assert_eq!(Command::of(0xc028_4809), Some(Command::Read));
        assert_eq!(Command::of(0xc028_48ff), Some(Command::Other));
        assert_eq!(Command::of(0xc020_aa00), None);
    }

    #[test]
    fn arguments_are_read_and_ranges_checked() {
        let here = Arguments { addr: 0x1000, ptr: 5, npages: 3, cpages: 4, faults: 6 };
        let read = Arguments::read((&raw const here).cast()).unwrap();
        assert_eq!((read.addr, read.ptr, read.npages, read.cpages, read.faults), (0x1000, 5, 3, 4, 6));
        assert_eq!(read.range(), Some((0x1000, 0x4000)));
        assert!(Arguments::read(std::ptr::null()).is_none());
        let range = |addr, npages| Arguments { addr, npages, ..Arguments::default() }.range();
        assert_eq!((range(1, 1), range(0x1000, 0), range(0x1000, u64::MAX / 4096)), (None, None, None));
    }
}
