//! Functions that the witness stands in front of. Each is done by the next function of its name; before and after it the
//! witness looks.
//!
//! `errno` is left as the next function left it. Nothing here allocates, and nobody waits (see [`crate::state`]).
//
// UNSAFETY: the functions that it stands for take raw pointers and are called by C.

use std::ffi::{CStr, c_char, c_int, c_ulong, c_void};

use libc::{mode_t, off_t, off64_t, pid_t, size_t};

use crate::{
    gone,
    home::EVERYWHERE,
    next::{self, call_next},
    nodes::{self, Arguments, Command},
    raw::{self, errno, set_errno},
    state::{self, Entry},
    witness::Witness,
};

/// Makes a call and looks, where the witness is free: at all pages that are away, and at what this call is about.
fn watch<B, R>(
    name: &'static str,
    call_fn: impl FnOnce() -> R,
    before_fn: impl FnOnce(&mut Witness) -> B,
    after_fn: impl FnOnce(&mut Witness, B, &R),
) -> R {
    let mut witness = match state::enter() {
        Entry::Free(witness) => witness,
        _passed_on @ (Entry::Nested | Entry::Taken { .. }) => return call_fn(),
    };
    let errno_before = errno();
    witness.begin(name);
    witness.audit();
    let noted = before_fn(&mut witness);
    witness.settle();
    set_errno(errno_before);
    let answer = call_fn();
    let errno_after = errno();
    if state::is_disturbed() {
        witness.skip();
    } else {
        after_fn(&mut witness, noted, &answer);
    }
    witness.settle();
    set_errno(errno_after);
    answer
}

fn address(pointer: *const c_void) -> u64 {
    pointer.addr() as u64
}

/// # Safety
/// As for `ioctl(2)`. The last argument is optional there: what stands in its place is passed on unread, but for commands
/// of device nodes.
#[unsafe(no_mangle)]
unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    let call = || call_next!(next::IOCTL, -1, fn(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int);
    let command = nodes::node(fd).zip(Command::of(request));
    let Some(((node, command), arguments)) = command.zip(Arguments::read(argument)) else {
        return watch("ioctl", call, |_| (), |_, (), _| ());
    };
    let range = arguments.range().unwrap_or((0, 0));
    match command {
        Command::MigrateToDev | Command::Exclusive => watch(
            command.name(),
            call,
            |witness| witness.before_away(&arguments),
            |witness, noted, &answer| match (noted, answer, command) {
                (false, ..) => {}
                (true, 0, Command::Exclusive) => witness.after_exclusive(node, &arguments),
                (true, 0, _) => witness.after_migrate(fd, node, &arguments),
                (true, ..) => witness.after_failed(fd, node, &arguments),
            },
        ),
        Command::Read => watch(
            command.name(),
            call,
            |witness| witness.before_access(&arguments),
            |witness, noted, &answer| {
                if answer == 0 {
                    if noted {
                        witness.after_read(&arguments);
                    }
                    witness.read_again(fd, &arguments);
                }
            },
        ),
        Command::Write => watch(
            command.name(),
            call,
            |witness| witness.before_access(&arguments),
            |witness, _, &answer| {
                witness.after_write(answer == 0, &arguments);
                if answer == 0 {
                    witness.read_again(fd, &arguments);
                }
            },
        ),
        Command::MigrateToSys => watch(
            command.name(),
            call,
            |witness| witness.before_home(node, range),
            |witness, away, &answer| {
                let done = Arguments::read(argument).map_or(0, |arguments| arguments.cpages);
                if answer == 0 {
                    witness.after_home(node, range, (done < away).then_some(fd));
                }
            },
        ),
        Command::Release => watch(
            command.name(),
            call,
            |witness| witness.before_home(node, EVERYWHERE),
            |witness, _, &answer| {
                if answer == 0 {
                    witness.after_home(node, EVERYWHERE, None);
                }
            },
        ),
        Command::CheckExclusive => watch(
            command.name(),
            call,
            |_| (),
            |witness, (), &answer| witness.after_check_exclusive(answer != 0 && errno() == libc::EPERM, &arguments),
        ),
        Command::Snapshot | Command::Other => watch(command.name(), call, |_| (), |_, (), _| ()),
    }
}

/// # Safety
/// As for `close(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn close(fd: c_int) -> c_int {
    let call = || {
        let node = nodes::node(fd);
        nodes::opened(fd, None);
        let answer = call_next!(next::CLOSE, -1, fn(fd: c_int) -> c_int);
        if answer != 0 && errno() != libc::EINTR {
            nodes::opened(fd, node);
        }
        answer
    };
    let Some(node) = nodes::node(fd) else { return call() };
    let is_last = nodes::other_fd(node, fd).is_none();
    watch(
        "close",
        call,
        |witness| {
            if is_last {
                witness.before_home(node, EVERYWHERE);
            }
        },
        |witness, (), &answer| {
            if is_last && answer == 0 {
                witness.after_home(node, EVERYWHERE, None);
            }
        },
    )
}

/// # Safety
/// As for `munmap(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn munmap(start: *mut c_void, len: size_t) -> c_int {
    let call = || call_next!(next::MUNMAP, -1, fn(start: *mut c_void, len: size_t) -> c_int);
    watch(
        "munmap",
        call,
        |_| (),
        |witness, (), &answer| {
            if let Some((start, end)) = gone::pages(address(start), len as u64).filter(|_| answer == 0) {
                witness.after_unmap(start, end);
            }
        },
    )
}

/// # Safety
/// As for `mprotect(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn mprotect(start: *mut c_void, len: size_t, prot: c_int) -> c_int {
    let call = || call_next!(next::MPROTECT, -1, fn(start: *mut c_void, len: size_t, prot: c_int) -> c_int);
    watch(
        "mprotect",
        call,
        |_| (),
        |witness, (), &answer| {
            if let Some((start, end)) = gone::pages(address(start), len as u64).filter(|_| answer == 0) {
                witness.after_protect(start, end, prot);
            }
        },
    )
}

/// # Safety
/// As for `madvise(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn madvise(start: *mut c_void, len: size_t, advice: c_int) -> c_int {
    const DONTNEED_LOCKED: c_int = 24;
    const GUARD_INSTALL: c_int = 102;
    let call = || call_next!(next::MADVISE, -1, fn(start: *mut c_void, len: size_t, advice: c_int) -> c_int);
    watch(
        "madvise",
        call,
        |_| (),
        |witness, (), &answer| {
            let Some((start, end)) = gone::pages(address(start), len as u64).filter(|_| answer == 0) else { return };
            match advice {
                libc::MADV_DONTNEED => witness.after_drop(start, end),
                // What these leave is not the same everywhere.
                libc::MADV_FREE | libc::MADV_REMOVE | DONTNEED_LOCKED | GUARD_INSTALL => {
                    witness.book.remove(start, end)
                }
                _ => {}
            }
        },
    )
}

/// # Safety
/// As for `mremap(2)`. The last argument is optional there: what stands in its place is passed on unread.
#[unsafe(no_mangle)]
unsafe extern "C" fn mremap(
    old: *mut c_void,
    old_len: size_t,
    new_len: size_t,
    flags: c_int,
    new: *mut c_void,
) -> *mut c_void {
    let call = || {
        call_next!(
            next::MREMAP,
            libc::MAP_FAILED,
            fn(old: *mut c_void, old_len: size_t, new_len: size_t, flags: c_int, new: *mut c_void) -> *mut c_void
        )
    };
    watch(
        "mremap",
        call,
        |_| (),
        |witness, (), &answer| {
            let old = gone::pages(address(old), old_len as u64);
            let new = gone::pages(address(answer), new_len as u64);
            if let Some((old, new)) = old.zip(new).filter(|_| answer != libc::MAP_FAILED) {
                witness.after_remap(old, new, flags & libc::MREMAP_DONTUNMAP != 0);
            }
        },
    )
}

/// # Safety
/// As for `mmap(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn mmap(
    start: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    let call = || {
        call_next!(
            next::MMAP,
            libc::MAP_FAILED,
            fn(start: *mut c_void, len: size_t, prot: c_int, flags: c_int, fd: c_int, offset: off_t) -> *mut c_void
        )
    };
    watch(
        "mmap",
        call,
        |_| (),
        |witness, (), &answer| {
            let new = gone::pages(address(answer), len as u64);
            if let Some((start, end)) = new.filter(|_| answer != libc::MAP_FAILED) {
                witness.book.remove(start, end);
            }
        },
    )
}

/// # Safety
/// As for `mmap(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn mmap64(
    start: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off64_t,
) -> *mut c_void {
    // SAFETY: the same function on this architecture.
    unsafe { mmap(start, len, prot, flags, fd, offset) }
}

/// # Safety
/// As for `fork(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn fork() -> pid_t {
    let call = || call_next!(next::FORK, -1, fn() -> pid_t);
    let Entry::Free(mut witness) = state::enter() else { return call() };
    let errno_before = errno();
    witness.begin("fork");
    witness.audit();
    witness.settle();
    set_errno(errno_before);
    let answer = call();
    if answer == 0 {
        state::began_in_child(&mut witness);
    }
    answer
}

/// Notes what was opened.
fn opened(path: *const c_char, fd: c_int) -> c_int {
    if fd >= 0 {
        // SAFETY: a path that was opened is a string.
        let path = unsafe { CStr::from_ptr(path) };
        nodes::opened(fd, nodes::named(path));
    }
    fd
}

/// # Safety
/// As for `open(2)`. The last argument is optional there: what stands in its place is passed on unread.
#[unsafe(no_mangle)]
unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    let fd = call_next!(next::OPEN, -1, fn(path: *const c_char, flags: c_int, mode: mode_t) -> c_int);
    opened(path, fd)
}

/// # Safety
/// As for `open(2)`. The last argument is optional there: what stands in its place is passed on unread.
#[unsafe(no_mangle)]
unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    let fd = call_next!(next::OPEN64, -1, fn(path: *const c_char, flags: c_int, mode: mode_t) -> c_int);
    opened(path, fd)
}

/// # Safety
/// As for `openat(2)`. The last argument is optional there: what stands in its place is passed on unread.
#[unsafe(no_mangle)]
unsafe extern "C" fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    let fd = call_next!(next::OPENAT, -1, fn(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int);
    opened(path, fd)
}

/// # Safety
/// As for `openat(2)`. The last argument is optional there: what stands in its place is passed on unread.
#[unsafe(no_mangle)]
unsafe extern "C" fn openat64(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    let fd = call_next!(next::OPENAT64, -1, fn(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int);
    opened(path, fd)
}

/// # Safety
/// As for `_exit(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn _exit(status: c_int) -> ! {
    log();
    call_next!(next::EXIT, (), fn(status: c_int) -> ());
    raw::exit_group(status)
}

/// Appends the figures to the log at the process's end.
pub(crate) extern "C" fn log() {
    if let Some(mut witness) = state::at_exit() {
        witness.log();
    }
}
