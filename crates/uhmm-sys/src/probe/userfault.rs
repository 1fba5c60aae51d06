//! Probes of userfaultfd: each takes a fault, moves a page or reads an event on scratch memory.
// UNSAFETY: opens userfaultfds by each way, and forks.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, FromRawFd, OwnedFd},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use super::{Found, kernel, scratch::Scratch};
use crate::{
    Errno,
    addr::{PAGE_SIZE, VirtAddr},
    raw,
    uffd::{Copied, Event, Features, KernelFaults, Protect, RegisterMode, SrcHoles, Uffd, Wake},
};

/// How long a probe waits for a message that is due at once. Only a broken kernel makes it wait that long.
const PATIENCE: Duration = Duration::from_secs(5);

/// Grants kernel-mode faults to everybody on the machine.
const GRANT_KERNEL_FAULTS: &str = "sudo sysctl vm.unprivileged_userfaultfd=1";
/// Grants kernel-mode faults to one user, until the next boot.
const GRANT_DEVICE: &str = "sudo chown \"$(id -u)\" /dev/userfaultfd";
/// Runs one program with one privilege. The shell expands the ids, and finds the program, before
/// `sudo` changes either.
const GRANT_PTRACE: &str = "sudo setpriv --reuid=\"$(id -u)\" --regid=\"$(id -g)\" --init-groups \
    --inh-caps=+sys_ptrace --ambient-caps=+sys_ptrace \"$(command -v uhmm)\" run -- PROGRAM";
/// Where the kernel itself would allow it.
const GRANT_SECCOMP: &str = "allow the system call userfaultfd in the sandbox's seccomp filter \
    (docker: --security-opt seccomp=unconfined)";

/// Why a probe came to nothing.
enum Failed {
    /// The kernel does not have it, or does not give it.
    Absent(String),
    /// A system call answered so.
    Call(&'static str, Errno),
    /// It is there and does something else than it should.
    Wrong(&'static str),
}

impl Failed {
    fn call(what: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::Call(what, errno)
    }
}

impl From<Failed> for Found {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Absent(why) => Self::missing(why),
            Failed::Call(what, errno) => Self::missing(format!("{what}: {errno}")),
            Failed::Wrong(what) => Self::missing(what),
        }
    }
}

/// A new userfaultfd that must have these features.
fn open(features: Features) -> Result<Uffd, Failed> {
    let uffd = Uffd::open(features).map_err(|error| Failed::Absent(error.to_string()))?;
    if uffd.features().contains(features) {
        Ok(uffd)
    } else {
        Err(Failed::Absent("the kernel does not offer it".to_owned()))
    }
}

fn all(what: &'static str, copied: Copied) -> Result<(), Failed> {
    copied.stop.map_or(Ok(()), |errno| Err(Failed::Call(what, errno)))
}

/// Reads one message, and gives up after [`PATIENCE`].
fn next_event(uffd: &Uffd) -> Result<Event, Failed> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if uffd.wait(Some(100)).map_err(Failed::call("poll"))?
            && let Some(event) = uffd.read().map_err(Failed::call("read"))?
        {
            return Ok(event);
        }
    }
    Err(Failed::Wrong("no message came"))
}

fn since(result: Result<Found, Failed>, version: &str) -> Found {
    result.unwrap_or_else(|failed| Found::from(failed).grant(format!("boot Linux {version} or later")))
}

/// A thread touches a hole; the fault is read here and answered with a page.
///
/// Returns the thread that the kernel named and the one that it was.
fn serve_one_fault(uffd: Uffd) -> Result<(Option<u32>, u32), Failed> {
    const BYTE: u8 = 0xa5;
    let hole = Scratch::new(1).map_err(Failed::call("mmap"))?;
    let page = Scratch::filled(1, BYTE).map_err(Failed::call("mmap"))?;
    uffd.register(hole.range(), RegisterMode::MISSING).map_err(Failed::call("UFFDIO_REGISTER"))?;
    thread::scope(|scope| {
        let toucher = scope.spawn(|| (hole.load(7), gettid()));
        let served = next_event(&uffd).and_then(|event| match event {
            Event::Fault { addr, tid, .. } if addr.page() == hole.start() => {
                all("UFFDIO_COPY", uffd.copy(hole.start(), page.start(), PAGE_SIZE, Wake::Now, Protect::Off))?;
                Ok(tid)
            }
            _ => Err(Failed::Wrong("the message does not name the page that was touched")),
        });
        // Closed, the file wakes whoever waits still: the thread below ends in any case.
        drop(uffd);
        let (byte, tid) = toucher.join().expect("a load does not panic");
        let named = served?;
        if byte == BYTE { Ok((named, tid)) } else { Err(Failed::Wrong("the thread read other bytes")) }
    })
}

fn gettid() -> u32 {
    // SAFETY: the call takes no arguments and touches no memory.
    let tid = unsafe { raw::syscall(libc::SYS_gettid, []) };
    raw::low32(tid.unwrap_or(0))
}

pub(super) fn round_trip() -> Found {
    let served = open(Features::empty()).and_then(|uffd| {
        let way = uffd.kernel_faults();
        serve_one_fault(uffd).map(|_| way)
    });
    match served {
        Ok(KernelFaults::Yes) => Found::ok("a missing page was served"),
        Ok(KernelFaults::UserOnly) => Found::ok("a missing page was served; faults from user mode only"),
        Err(failed) => {
            let grant = match by_flags(UFFD_USER_MODE_ONLY) {
                Err(Errno::PERM | Errno::ACCESS) => GRANT_SECCOMP,
                _ => "boot a kernel with CONFIG_USERFAULTFD",
            };
            Found::from(failed).grant(grant)
        }
    }
}

pub(super) fn thread_id() -> Found {
    since(
        open(Features::THREAD_ID).and_then(serve_one_fault).and_then(|(named, was)| match named {
            Some(named) if named == was => Ok(Found::ok("a fault named its thread")),
            _ => Err(Failed::Wrong("a fault named another thread")),
        }),
        "4.14",
    )
}

const UFFD_USER_MODE_ONLY: i32 = 1;
/// `USERFAULTFD_IOC_NEW`.
const IOC_NEW: u64 = 0xAA00;

fn by_flags(flags: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: makes a file descriptor and touches no memory.
    let fd = unsafe { raw::syscall(libc::SYS_userfaultfd, [raw::arg(flags | libc::O_CLOEXEC)]) }?;
    // SAFETY: the call succeeded, so `fd` is new.
    Ok(unsafe { raw::take_fd(fd) })
}

pub(super) fn by_syscall() -> Found {
    match by_flags(0) {
        Ok(_) => Found::ok("userfaultfd(2) answers, for kernel-mode faults too"),
        // With the privilege in hand, it is not the kernel's own rule that refuses.
        Err(Errno::PERM) if kernel::has_sys_ptrace() => {
            Found::missing("refused in spite of CAP_SYS_PTRACE: a sandbox, or a user namespace").grant(GRANT_SECCOMP)
        }
        Err(errno) => Found::missing(format!("userfaultfd(2): {errno}")).grant(GRANT_KERNEL_FAULTS),
    }
}

pub(super) fn by_device() -> Found {
    let device = match raw::open(c"/dev/userfaultfd", libc::O_RDWR) {
        Ok(device) => device,
        Err(Errno::NOENT) => return Found::missing("no /dev/userfaultfd").grant("boot Linux 6.1 or later"),
        Err(errno) => return Found::missing(format!("/dev/userfaultfd: {errno}")).grant(GRANT_DEVICE),
    };
    // SAFETY: this ioctl takes flags, no pointer, and makes a file descriptor.
    let fd =
        unsafe { raw::syscall(libc::SYS_ioctl, [raw::fd_arg(device.as_fd()), IOC_NEW, raw::arg(libc::O_CLOEXEC)]) };
    match fd {
        Ok(fd) => {
            // SAFETY: the call succeeded, so `fd` is new.
            drop(unsafe { raw::take_fd(fd) });
            Found::ok("/dev/userfaultfd may be used")
        }
        Err(errno) => Found::missing(format!("USERFAULTFD_IOC_NEW: {errno}")),
    }
}

pub(super) fn user_only() -> Found {
    match by_flags(UFFD_USER_MODE_ONLY) {
        Ok(_) => Found::ok("userfaultfd(2) answers for user-mode faults"),
        Err(Errno::INVAL) => {
            Found::missing("the kernel knows no UFFD_USER_MODE_ONLY").grant("boot Linux 5.11 or later")
        }
        Err(errno) => Found::missing(format!("userfaultfd(2) with UFFD_USER_MODE_ONLY: {errno}")).grant(GRANT_SECCOMP),
    }
}

/// A system call reads a hole: a byte of it is written to a pipe, which the kernel does by itself.
pub(super) fn kernel_faults() -> Found {
    const BYTE: u8 = 0x5a;
    let try_it = || {
        let hole = Scratch::new(1).map_err(Failed::call("mmap"))?;
        let page = Scratch::filled(1, BYTE).map_err(Failed::call("mmap"))?;
        let (mut reader, writer) = pipe().map_err(|e| Failed::Absent(format!("pipe: {e}")))?;
        let uffd = open(Features::empty())?;
        uffd.register(hole.range(), RegisterMode::MISSING).map_err(Failed::call("UFFDIO_REGISTER"))?;
        thread::scope(|scope| {
            // Closed at the end of this block, whatever happened: then the thread below ends too.
            let uffd = uffd;
            let (answer_tx, answer_rx) = mpsc::channel();
            let addr = hole.start();
            scope.spawn(move || {
                // Nobody listens where the probe gave up.
                let _ = answer_tx.send(write_from(&writer, addr));
            });
            // Either the call comes back at once with an error, or its fault arrives here.
            let deadline = Instant::now() + PATIENCE;
            let answer = loop {
                if let Ok(answer) = answer_rx.try_recv() {
                    break answer;
                }
                if uffd.wait(Some(10)).map_err(Failed::call("poll"))? && uffd.read().is_ok_and(|event| event.is_some())
                {
                    all("UFFDIO_COPY", uffd.copy(hole.start(), page.start(), PAGE_SIZE, Wake::Now, Protect::Off))?;
                    break answer_rx.recv().map_err(|_| Failed::Wrong("the thread is gone"))?;
                }
                if Instant::now() > deadline {
                    return Err(Failed::Wrong("no message came"));
                }
            };
            answer.map_err(Failed::call("write(2) from a missing page"))?;
            let mut byte = [0];
            reader.read_exact(&mut byte).map_err(|e| Failed::Absent(format!("pipe: {e}")))?;
            if byte == [BYTE] { Ok(()) } else { Err(Failed::Wrong("write(2) from a missing page took other bytes")) }
        })
    };
    match try_it() {
        Ok(()) => Found::ok("write(2) from a missing page was served"),
        Err(failed) => Found::from(failed).grant(GRANT_KERNEL_FAULTS),
    }
}

fn pipe() -> io::Result<(File, File)> {
    let mut fds = [0; 2];
    // SAFETY: the kernel writes two numbers to a local array.
    let answer = unsafe { raw::syscall(libc::SYS_pipe2, [raw::ptr_arg(fds.as_mut_ptr()), raw::arg(libc::O_CLOEXEC)]) };
    answer?;
    // SAFETY: the call succeeded, so the descriptor is new and nobody's.
    let reader = unsafe { File::from_raw_fd(fds[0]) };
    // SAFETY: as the line above.
    let writer = unsafe { File::from_raw_fd(fds[1]) };
    Ok((reader, writer))
}

/// `write(2)` of one byte at `addr`, which may be missing.
fn write_from(file: &File, addr: VirtAddr) -> Result<u64, Errno> {
    // SAFETY: the kernel reads a byte of a probe's scratch, or answers `EFAULT`; it writes nothing.
    unsafe { raw::syscall(libc::SYS_write, [raw::fd_arg(file.as_fd()), addr.get(), 1]) }
}

/// Does `act_fn` on pages that a userfaultfd with `feature` has, while another thread reads the message about it.
///
/// What `act_fn` gives back is unmapped when the userfaultfd is closed.
fn event(
    feature: Features,
    act_fn: impl FnOnce(Scratch) -> Result<Option<Scratch>, Errno>,
    is_it_fn: impl FnOnce(&Event) -> bool + Send,
) -> Result<Found, Failed> {
    let pages = Scratch::filled(2, 1).map_err(Failed::call("mmap"))?;
    let uffd = open(feature)?;
    uffd.register(pages.range(), RegisterMode::MISSING).map_err(Failed::call("UFFDIO_REGISTER"))?;
    thread::scope(|scope| {
        // The thread owns the file: should no message come, its end lets the call below go on.
        let reader = scope.spawn(move || next_event(&uffd).map(|event| is_it_fn(&event)));
        // Blocks until the other thread has read the message.
        let acted = act_fn(pages);
        let is_it = reader.join().expect("reading a message does not panic")?;
        acted.map_err(Failed::call("the call that should raise the event"))?;
        if is_it { Ok(Found::ok("the event came")) } else { Err(Failed::Wrong("another event came")) }
    })
}

pub(super) fn remap_event() -> Found {
    let target = match Scratch::new(2) {
        Ok(target) => target,
        Err(errno) => return Found::missing(format!("mmap: {errno}")),
    };
    let expected = target.start();
    let result = event(
        Features::EVENT_REMAP,
        |pages| pages.move_over(target).map(Some),
        |event| matches!(event, Event::Remap { to, len, .. } if *to == expected && *len == 2 * PAGE_SIZE),
    );
    since(result, "4.11")
}

pub(super) fn remove_event() -> Found {
    let result = event(
        Features::EVENT_REMOVE,
        |pages| pages.advise(libc::MADV_DONTNEED).map(|()| Some(pages)),
        |event| matches!(event, Event::Remove { .. }),
    );
    since(result, "4.11")
}

pub(super) fn unmap_event() -> Found {
    let result = event(
        Features::EVENT_UNMAP,
        |pages| pages.unmap().map(|()| None),
        |event| matches!(event, Event::Unmap { .. }),
    );
    since(result, "4.11")
}

pub(super) fn fork_event() -> Found {
    let result = event(
        Features::EVENT_FORK,
        |pages| fork_and_wait().map(|()| Some(pages)),
        |event| matches!(event, Event::Fork { .. }),
    );
    match result {
        Ok(found) => found,
        Err(Failed::Absent(_)) if !kernel::has_sys_ptrace() => {
            Found::missing("needs CAP_SYS_PTRACE").grant(GRANT_PTRACE)
        }
        Err(failed) => Found::from(failed).grant(GRANT_PTRACE),
    }
}

/// A child that exits at once, without the C library: nothing runs in it but the next system call.
fn fork_and_wait() -> Result<(), Errno> {
    // SAFETY: SYS_fork takes nothing. The child has this thread only and a copy of the memory; it makes one system call,
    // which does not return.
    let pid = unsafe { raw::syscall(libc::SYS_fork, []) }?;
    if pid == 0 {
        // SAFETY: ends the child; takes no memory.
        let _ = unsafe { raw::syscall(libc::SYS_exit_group, [0]) };
    }
    loop {
        // SAFETY: the null pointers ask for no status and no usage.
        match unsafe { raw::syscall(libc::SYS_wait4, [pid, 0, 0, 0]) } {
            Err(Errno::INTR) => {}
            answer => return answer.map(drop),
        }
    }
}

pub(super) fn move_page() -> Found {
    const BYTE: u8 = 0x3c;
    let try_it = || {
        let from = Scratch::filled(1, BYTE).map_err(Failed::call("mmap"))?;
        let to = Scratch::new(1).map_err(Failed::call("mmap"))?;
        let uffd = open(Features::MOVE)?;
        uffd.register(to.range(), RegisterMode::MISSING).map_err(Failed::call("UFFDIO_REGISTER"))?;
        all("UFFDIO_MOVE", uffd.move_pages(to.start(), from.start(), PAGE_SIZE, Wake::Now, SrcHoles::Fail))?;
        match (to.load(0), to.load(PAGE_SIZE - 1), from.load(0)) {
            (BYTE, BYTE, 0) => Ok(Found::ok("a page was moved")),
            _ => Err(Failed::Wrong("a moved page has other bytes")),
        }
    };
    since(try_it(), "6.8")
}

/// Bit 57 of a pagemap entry: write-protected by a userfaultfd.
const PAGEMAP_UFFD_WP: u64 = 1 << 57;

fn protect(scratch: &Scratch, features: Features) -> Result<Found, Failed> {
    let uffd = open(features)?;
    uffd.register(scratch.range(), RegisterMode::MISSING | RegisterMode::WP)
        .map_err(Failed::call("UFFDIO_REGISTER"))?;
    uffd.write_protect(scratch.range(), Protect::On, Wake::Later).map_err(Failed::call("UFFDIO_WRITEPROTECT"))?;
    let entry = kernel::pagemap_entry(scratch.start()).map_err(Failed::call("pagemap"))?;
    if entry & PAGEMAP_UFFD_WP != 0 {
        Ok(Found::ok("protected, and pagemap shows it"))
    } else {
        Err(Failed::Wrong("pagemap does not show the protection"))
    }
}

pub(super) fn write_protect() -> Found {
    let result =
        Scratch::filled(1, 1).map_err(Failed::call("mmap")).and_then(|scratch| protect(&scratch, Features::FAULT_WP));
    since(result, "5.7")
}

pub(super) fn write_protect_hole() -> Found {
    let result = Scratch::new(1)
        .map_err(Failed::call("mmap"))
        .and_then(|scratch| protect(&scratch, Features::FAULT_WP | Features::WP_UNPOPULATED));
    since(result, "6.4")
}

pub(super) fn poison() -> Found {
    let try_it = || {
        let scratch = Scratch::new(1).map_err(Failed::call("mmap"))?;
        let (_reader, writer) = pipe().map_err(|e| Failed::Absent(format!("pipe: {e}")))?;
        let uffd = open(Features::POISON)?;
        uffd.register(scratch.range(), RegisterMode::MISSING).map_err(Failed::call("UFFDIO_REGISTER"))?;
        all("UFFDIO_POISON", uffd.poison(scratch.range(), Wake::Now))?;
        match write_from(&writer, scratch.start()) {
            Err(Errno::FAULT | Errno::HWPOISON) => Ok(Found::ok("a poisoned page could not be read")),
            _ => Err(Failed::Wrong("a poisoned page could be read")),
        }
    };
    since(try_it(), "6.6")
}
