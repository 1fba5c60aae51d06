//! Tables of file descriptors: the hidden engine's threads have one of their own, and a forked child needs some of
//! what is in it.
//!
//! A descriptor is a number in the table of the thread that uses it. The engine's table is not the program's, so that
//! the program can neither see nor close the engine's files, and so that no pipe of the program stays open because the
//! engine has a copy of its end. A forked child has a copy of the table of the thread that forked, which is the
//! program's; so what the child's engine is to have must be there in the moment of the fork:
//!
//! ```text
//!   program's table      engine's table
//!                        file = 5
//!   handed = 9  <------- hand_over()            before the fork
//!   ------------------------------------ fork ------------------------------------
//!   end_fork(): closed                          child: take_over(): file = 9
//!                                               starter: own_files(keep 9)
//!                                               end_fork(): 9 closed in the program's table
//! ```
// UNSAFETY: makes a descriptor out of a number, whose table is known to the caller only.

use std::{
    ffi::CStr,
    fmt::Write as _,
    os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
    sync::atomic::{
        AtomicI32,
        Ordering::{Acquire, Release},
    },
};

use crate::{Errno, raw, thread};

/// No descriptor.
const NONE: RawFd = -1;

/// A file that the engine's threads use, in this process and in those forked from it. Never closed.
///
/// Because it is never closed, it tells when a process has ended, or executes another program: see [`EngineFile::claim`].
///
/// # Invariants
/// `number` is open in the engine's table of the process that looks at it, from [`EngineFile::take_over`] and the start of
/// that process's engine on.
#[derive(Debug)]
pub struct EngineFile {
    number: AtomicI32,
    /// What [`EngineFile::hand_over`] opened; in the table of the thread that forks.
    handed: AtomicI32,
}

impl EngineFile {
    /// Takes a file over whose descriptor is in the engine's table, or in the one that it will be copied from.
    #[must_use]
    pub fn new(file: OwnedFd) -> Self {
        // INVARIANT: the owner gave the descriptor away, and it is never closed.
        Self { number: AtomicI32::new(file.into_raw_fd()), handed: AtomicI32::new(NONE) }
    }

    /// A file of no bytes, in memory.
    ///
    /// # Errors
    /// `EMFILE`, `ENFILE`, `ENOMEM`.
    ///
    /// # Kernel
    /// `memfd_create(2)`.
    pub fn empty(name: &CStr) -> Result<Self, Errno> {
        rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).map(Self::new)
    }

    /// Opens the file once more in the calling thread's table, which a child about to be forked will have a copy of.
    ///
    /// `engine_thread` is the id of a thread of this process with the engine's table.
    ///
    /// # Errors
    /// `ENOENT`: no `/proc`. `EACCES`: the process has given up the privilege to open it. `EMFILE`, `ENFILE`.
    ///
    /// # Kernel
    /// `/proc/self/task/TID/fd/N`, see `proc(5)`.
    pub fn hand_over(&self, engine_thread: u32) -> Result<(), Errno> {
        let handed = open_of(engine_thread, self.number.load(Acquire))?;
        self.handed.store(handed.into_raw_fd(), Release);
        Ok(())
    }

    /// Has this process claim byte `at` for as long as it has the file. A claim is told from others' by the file having been
    /// opened more than once, as [`EngineFile::hand_over`] does.
    ///
    /// # Errors
    /// `EAGAIN`: another has it. `ENOLCK`: no memory.
    ///
    /// # Kernel
    /// `F_OFD_SETLK`, see `fcntl(2)`. No byte need be there.
    pub fn claim(&self, at: u64) -> Result<(), Errno> {
        claim(self, at)
    }

    /// As [`EngineFile::claim`], for the child that is about to be forked: what was handed over has the claim.
    ///
    /// # Errors
    /// As [`EngineFile::claim`]; `EBADF`: nothing was handed over.
    pub fn claim_for_child(&self, at: u64) -> Result<(), Errno> {
        let handed = self.handed.load(Acquire);
        if handed == NONE {
            return Err(Errno::BADF);
        }
        // SAFETY: opened by `hand_over` in this table, and closed by `end_fork` on this thread.
        claim(unsafe { BorrowedFd::borrow_raw(handed) }, at)
    }

    /// Whether another has a claim to byte `at`, and lives. For threads with the engine's table.
    ///
    /// # Errors
    /// None is known.
    ///
    /// # Kernel
    /// `F_OFD_GETLK`, see `fcntl(2)`.
    pub fn is_claimed(&self, at: u64) -> Result<bool, Errno> {
        is_claimed(self, at)
    }

    /// In the child, where the calling thread's table holds what was handed over: uses that from now on.
    pub fn take_over(&self) {
        let handed = self.handed.load(Acquire);
        if handed != NONE {
            self.number.store(handed, Release);
        }
    }

    /// Closes what was handed over in the calling thread's table, if anything was: in the parent once it has forked, and
    /// in the child once the engine has its own table.
    pub fn end_fork(&self) {
        let handed = self.handed.swap(NONE, Acquire);
        if handed != NONE {
            // SAFETY: opened by `hand_over` in this table, or in the one that it was copied from, for nobody else.
            drop(unsafe { OwnedFd::from_raw_fd(handed) });
        }
    }
}

impl AsFd for EngineFile {
    /// The file, for threads with the engine's table.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: open in the engine's table by the type's invariant, and never closed there.
        unsafe { BorrowedFd::borrow_raw(self.number.load(Acquire)) }
    }
}

/// Opens once more, in the calling thread's table, what another thread of this process has as `number`.
pub(crate) fn open_of(thread: u32, number: RawFd) -> Result<OwnedFd, Errno> {
    raw::open(Path::of(thread, number).as_c_str(), libc::O_RDWR)
}

/// Takes an exclusive lock of byte `at` for the open file description of `file`.
pub(crate) fn claim(file: impl AsFd, at: u64) -> Result<(), Errno> {
    record_lock(file.as_fd(), libc::F_OFD_SETLK, at).map(drop)
}

/// Whether another description of the same file has a lock of byte `at`.
pub(crate) fn is_claimed(file: impl AsFd, at: u64) -> Result<bool, Errno> {
    record_lock(file.as_fd(), libc::F_OFD_GETLK, at).map(|lock| i32::from(lock.l_type) != libc::F_UNLCK)
}

/// Asks for an exclusive lock of byte `at`, and returns what the kernel says of it.
fn record_lock(file: BorrowedFd<'_>, command: i32, at: u64) -> Result<libc::flock, Errno> {
    let (l_type, l_whence) = (i16::try_from(libc::F_WRLCK), i16::try_from(libc::SEEK_SET));
    let mut lock = libc::flock {
        l_type: l_type.expect("a small number"),
        l_whence: l_whence.expect("a small number"),
        l_start: i64::try_from(at).map_err(|_| Errno::INVAL)?,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: the structure of these commands; they change no memory but it.
    unsafe { raw::syscall(libc::SYS_fcntl, [raw::fd_arg(file), raw::arg(command), raw::ptr_arg(&raw mut lock)]) }?;
    Ok(lock)
}

/// A path with a few numbers in it, without allocation: a fork may be under way, or a fault be served.
pub(crate) struct Path {
    bytes: [u8; 64],
    len: usize,
}

impl Path {
    pub(crate) fn new(text: std::fmt::Arguments<'_>) -> Self {
        let mut path = Self { bytes: [0; 64], len: 0 };
        path.write_fmt(text).expect("a few numbers fit");
        path
    }

    /// That of another thread's descriptor.
    fn of(thread: u32, number: RawFd) -> Self {
        Self::new(format_args!("/proc/self/task/{thread}/fd/{number}"))
    }

    pub(crate) fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).expect("the path ends before the buffer does")
    }
}

impl std::fmt::Write for Path {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        // One byte stays zero.
        let end = self.len + text.len();
        let place = self.bytes[..63].get_mut(self.len..end).ok_or(std::fmt::Error)?;
        place.copy_from_slice(text.as_bytes());
        self.len = end;
        Ok(())
    }
}

/// Gives the calling thread a table of its own that holds `keep`, under the same numbers, and nothing else.
///
/// What is closed here stays open in the table that was left, also where that has record locks.
///
/// # Errors
/// `ENOMEM`, `EMFILE`. `ENOSYS`: a kernel before 5.9.
///
/// # Panics
/// If `keep` holds more than 64.
///
/// # Kernel
/// `unshare(2)` with `CLONE_FILES`, `close_range(2)`.
pub fn own_files(keep: &mut dyn Iterator<Item = RawFd>) -> Result<(), Errno> {
    let mut numbers = [RawFd::MAX; 64];
    let mut count = 0;
    for number in keep {
        assert!(count < numbers.len(), "the engine keeps a handful of files");
        numbers[count] = number;
        count += 1;
    }
    numbers[..count].sort_unstable();
    thread::unshare_files()?;
    let mut first = 0;
    for number in &numbers[..count] {
        close_range(first, number.cast_unsigned().checked_sub(1))?;
        first = number.cast_unsigned() + 1;
    }
    close_range(first, Some(u32::MAX))
}

/// Lets go of standard input and output: they lead to `/dev/null` from now on.
///
/// For a process that waits for another one which has them too: whoever is at the other end of a pipe shall see when that
/// one closes its end.
///
/// # Errors
/// `ENOENT`: no `/dev/null`. `EMFILE`, `ENFILE`.
///
/// # Kernel
/// `dup2(2)`.
pub fn let_go_of_streams() -> Result<(), Errno> {
    let null = raw::open(c"/dev/null", libc::O_RDWR)?;
    for stream in [libc::STDIN_FILENO, libc::STDOUT_FILENO] {
        // SAFETY: replaces a descriptor that Rust treats as always open, by one that is.
        unsafe { raw::syscall(libc::SYS_dup3, [raw::fd_arg(null.as_fd()), raw::arg(stream), 0]) }?;
    }
    Ok(())
}

/// Closes `first..=last`; `None` stands for what is before the first number.
fn close_range(first: u32, last: Option<u32>) -> Result<(), Errno> {
    match last {
        Some(last) if first <= last => {
            // SAFETY: the calling thread's own table, which `own_files` has just made: nobody else's files close.
            unsafe { raw::syscall(libc::SYS_close_range, [u64::from(first), u64::from(last), 0]) }.map(drop)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Seek, Write},
        os::fd::AsRawFd,
    };

    use super::*;

    /// Runs `f` on a thread, whose table can be its own.
    fn on_thread<T: Send>(f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| scope.spawn(f).join().expect("the thread ends well"))
    }

    fn scratch(text: &str) -> File {
        let path = std::env::temp_dir().join(format!("uhmm-files-{}-{}", std::process::id(), thread::gettid()));
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn an_own_table_holds_what_was_kept_and_nothing_else() {
        let (kept, other) = (scratch("kept"), scratch("other"));
        on_thread(|| {
            own_files(&mut [kept.as_raw_fd()].into_iter()).unwrap();
            let mut open: Vec<_> = std::fs::read_dir(format!("/proc/self/task/{}/fd", thread::gettid()))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap().parse::<RawFd>().unwrap())
                .collect();
            open.sort_unstable();
            // The kept one, and the one by which the directory was read.
            assert!(open.contains(&kept.as_raw_fd()) && open.len() == 2, "{open:?}");
        });
        assert_eq!(rustix::fs::fstat(&other).map(|stat| stat.st_size), Ok(5));
    }

    #[test]
    fn a_pipe_ends_though_the_engine_has_a_table_of_its_own() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let (ask, asked) = std::sync::mpsc::channel::<()>();
        let (give, given) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            // Has its table for as long as the reader reads.
            scope.spawn(move || {
                own_files(&mut std::iter::empty()).unwrap();
                give.send(()).unwrap();
                let _ = asked.recv();
            });
            given.recv().unwrap();
            drop(writer);
            assert_eq!(reader.read(&mut [0]).unwrap(), 0);
            drop(ask);
        });
    }

    #[test]
    fn a_claim_lasts_as_long_as_what_was_handed_over() {
        let file = EngineFile::empty(c"claims").unwrap();
        file.claim(0).unwrap();
        assert_eq!(file.claim_for_child(1), Err(Errno::BADF));
        file.hand_over(thread::gettid()).unwrap();
        assert_eq!(file.claim_for_child(0), Err(Errno::AGAIN));
        file.claim_for_child(1).unwrap();
        // One's own is no other's.
        assert_eq!([0, 1, 2].map(|at| file.is_claimed(at)), [Ok(false), Ok(true), Ok(false)]);
        file.end_fork();
        assert_eq!(file.is_claimed(1), Ok(false));
        assert_eq!(file.is_claimed(u64::MAX), Err(Errno::INVAL));
    }

    #[test]
    fn a_file_is_handed_over_from_one_table_to_another() {
        let (ask, asked) = std::sync::mpsc::channel::<()>();
        let (give, given) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                own_files(&mut std::iter::empty()).unwrap();
                let file = EngineFile::new(scratch("bytes").into());
                give.send((std::sync::Arc::new(file), thread::gettid())).unwrap();
                let _ = asked.recv();
            });
            let (file, engine_thread) = given.recv().unwrap();
            file.hand_over(engine_thread).unwrap();
            let handed = file.handed.load(Acquire);
            assert_ne!(handed, NONE);
            file.take_over();
            let mut text = String::new();
            let mut copy = File::from(file.as_fd().try_clone_to_owned().unwrap());
            copy.rewind().unwrap();
            copy.read_to_string(&mut text).unwrap();
            assert_eq!(text, "bytes");
            file.end_fork();
            assert_eq!(file.handed.load(Acquire), NONE);
            file.end_fork();
            assert_eq!(file.hand_over(u32::MAX), Err(Errno::NOENT));
            drop(ask);
        });
    }
}
