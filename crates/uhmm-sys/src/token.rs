//! Descriptors that stand for something of the engine's in the program's hands.
//!
//! A token is a file without content in the program's table, where the program does with it what it does with descriptors:
//! it duplicates and passes it on, and closes it. Two things must be known of it: which one a descriptor is, told by the
//! file's inode, and when the last descriptor is closed.
//!
//! ```text
//!   program's table                        engine's table
//!    3 ---+                                  5 ---> description 2 --+
//!    7 ---+--> description 1 [lock] --+             (no lock)       |
//!                                     +----------> inode <----------+
//!                                           5 asks: is it locked?
//! ```
//!
//! A lock that belongs to an open file description ends with the last descriptor of it, in whatever process that is. So
//! a second description of the same file finds no lock any more when all are closed.
//!
//! # Kernel
//! `memfd_create(2)`, `F_OFD_SETLK` and `F_OFD_GETLK` in `fcntl(2)`.

use std::{
    ffi::CStr,
    os::fd::{BorrowedFd, OwnedFd},
};

use rustix::fs::{MemfdFlags, SealFlags};

use crate::{
    Errno, files,
    files::{claim, is_claimed},
};

/// Which file a descriptor stands for. Not used again while somebody has a [`Watch`] of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenId {
    /// The kernel's number of the file system that all tokens are in.
    pub device: u64,
    /// The file's number there.
    pub inode: u64,
}

impl TokenId {
    /// Which file `fd` is. Any file has such a number, token or not.
    ///
    /// # Errors
    /// `EBADF`.
    ///
    /// # Kernel
    /// `fstat(2)`.
    pub fn of(fd: BorrowedFd<'_>) -> Result<Self, Errno> {
        let stat = rustix::fs::fstat(fd)?;
        Ok(Self { device: stat.st_dev, inode: stat.st_ino })
    }
}

/// Makes a token in the calling thread's table. Nothing can be written to it.
///
/// # Errors
/// `EMFILE`, `ENFILE`, `ENOMEM`; `ENOLCK`: no memory for the lock.
pub fn make(name: &CStr, close_on_exec: bool) -> Result<OwnedFd, Errno> {
    let cloexec = if close_on_exec { MemfdFlags::CLOEXEC } else { MemfdFlags::empty() };
    let fd = rustix::fs::memfd_create(name, MemfdFlags::ALLOW_SEALING | cloexec)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::WRITE | SealFlags::SEAL)?;
    claim(&fd, 0)?;
    Ok(fd)
}

/// A second description of a token's file, in the table of the thread that made it.
#[derive(Debug)]
pub struct Watch(OwnedFd);

impl Watch {
    /// Watches descriptor `number` of a thread of this process, which may have another table than the calling one.
    ///
    /// # Errors
    /// `ENOENT`: no such descriptor, or no `/proc`. `EMFILE`, `ENFILE`.
    ///
    /// # Kernel
    /// `/proc/self/task/TID/fd/N`, see `proc(5)`.
    pub fn over(thread: u32, number: i32) -> Result<Self, Errno> {
        files::open_of(thread, number).map(Self)
    }

    /// Whether a descriptor of what is watched is open, anywhere.
    ///
    /// # Errors
    /// None is known.
    pub fn is_held(&self) -> Result<bool, Errno> {
        is_claimed(&self.0, 0)
    }
}

/// A file of `len` zeros in memory, to be mapped.
///
/// # Errors
/// `EMFILE`, `ENFILE`, `ENOMEM`; `EFBIG`, `EINVAL`: no file can be as long.
///
/// # Kernel
/// `memfd_create(2)`, `ftruncate(2)`.
pub fn zeros(name: &CStr, len: u64) -> Result<OwnedFd, Errno> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&fd, len)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd};

    use super::*;
    use crate::thread;

    #[test]
    fn a_token_is_known_by_all_its_descriptors_and_until_the_last_is_closed() {
        let first = make(c"token", true).unwrap();
        let other = make(c"token", true).unwrap();
        let watch = Watch::over(thread::gettid(), first.as_raw_fd()).unwrap();
        let second = first.try_clone().unwrap();
        let id = |fd: &OwnedFd| TokenId::of(fd.as_fd()).unwrap();
        assert_eq!(id(&first), id(&second));
        assert_ne!(id(&first), id(&other));
        assert_eq!(id(&first), id(&watch.0));
        drop(first);
        assert_eq!(watch.is_held(), Ok(true));
        drop(second);
        assert_eq!(watch.is_held(), Ok(false));
        assert_eq!(Watch::over(thread::gettid(), 1 << 20).err(), Some(Errno::NOENT));
    }

    #[test]
    fn nothing_can_be_written_to_a_token() {
        let token = make(c"token", false).unwrap();
        assert_eq!(rustix::io::write(&token, b"x"), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(&token, 1), Err(Errno::PERM));
        assert!(!rustix::io::fcntl_getfd(&token).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    fn zeros_are_as_many_as_wanted() {
        let fd = zeros(c"zeros", 8192).unwrap();
        assert_eq!(rustix::fs::fstat(&fd).unwrap().st_size, 8192);
        assert!(zeros(c"zeros", u64::MAX).is_err());
    }
}
