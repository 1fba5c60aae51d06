//! Messages to the program's standard error: one line each, without allocation, without the C library's streams.
//
// UNSAFETY: writes to descriptors that belong to the program.

use std::{ffi::c_int, fmt::Write as _};

/// A line that is cut off where it is too long.
struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl std::fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let n = text.len().min(self.bytes.len() - self.len);
        self.bytes[self.len..self.len + n].copy_from_slice(&text.as_bytes()[..n]);
        self.len += n;
        Ok(())
    }
}

/// Whose table of file descriptors the calling thread has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Files {
    /// The program's.
    Program,
    /// A hidden thread's own, where standard error has another number or none.
    Own,
}

/// Writes `uhmm: `, the message and the end of the line to the program's standard error.
pub fn say(files: Files, message: std::fmt::Arguments<'_>) {
    let mut line = Line { bytes: [0; 512], len: 0 };
    // Never fails: what does not fit is cut off.
    let _ = write!(line, "uhmm: process {}: {message}", std::process::id());
    let len = line.len.min(line.bytes.len() - 1);
    line.bytes[len] = b'\n';
    let text = &line.bytes[..=len];
    match files {
        Files::Program => write_all(libc::STDERR_FILENO, text),
        Files::Own => {
            let fd = program_stderr();
            if fd >= 0 {
                write_all(fd, text);
                // SAFETY: opened for this.
                unsafe { libc::close(fd) };
            }
        }
    }
}

/// The program's standard error, in the calling thread's own table; negative where it cannot be had.
///
/// # Kernel
/// `pidfd_getfd(2)` (Linux 5.6), which takes sockets and other users' pipes too; before, `/proc/self/fd`.
fn program_stderr() -> c_int {
    // SAFETY: makes a descriptor of this process, whose first thread has the program's table.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) };
    // SAFETY: copies a descriptor; where there is no pidfd it answers an error.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd, libc::STDERR_FILENO, 0) };
    // SAFETY: opened above, if it was.
    unsafe { libc::close(c_int::try_from(pidfd).unwrap_or(-1)) };
    if let Ok(fd @ 0..) = c_int::try_from(fd) {
        return fd;
    }
    let flags = libc::O_WRONLY | libc::O_APPEND | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the path is a string; the kernel reads it and nothing else.
    unsafe { libc::open(c"/proc/self/fd/2".as_ptr(), flags) }
}

fn write_all(fd: c_int, text: &[u8]) {
    // SAFETY: the kernel reads the bytes and nothing else. A message that cannot be written is lost.
    unsafe { libc::write(fd, text.as_ptr().cast(), text.len()) };
}
