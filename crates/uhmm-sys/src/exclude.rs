//! What must never be moved: memory that the kernel or the engine itself touches at moments when a page fault
//! cannot be served.
//!
//! * The kernel writes a thread's rseq area at every preemption, and walks its robust list when it dies; both are in
//!   the thread's control block. A fault there that is not served kills the thread.
//! * The engine runs code of its own object and of a few libraries, whose static data can be private file pages or zeroed
//!   (anonymous) memory.
// UNSAFETY: system calls, and the dynamic linker's list of objects.

use std::{
    ffi::{CStr, c_int, c_void},
    os::fd::AsFd,
    sync::OnceLock,
};

use crate::{
    Errno,
    addr::{PAGE_SIZE, PageRange, VirtAddr},
    raw, tls,
};

/// Bytes of `/proc/self/task` read at a time.
const ENTRIES: usize = 1024;
/// Where a name starts in a directory entry, and its length field.
const ENTRY_NAME: usize = 19;
const ENTRY_LEN: usize = 16;
/// Where no more is known: how far below a robust list's head the control block and what it needs may start, and how far
/// above they may end.
/// glibc places the head some 0.7 KiB into a block of 2.5 KiB.
const CONTROL_BELOW: u64 = PAGE_SIZE;
const CONTROL_ABOVE: u64 = PAGE_SIZE;

/// Calls `f` for the control block pages of every thread of the process that the C library made.
///
/// A thread is found by the head of its robust list, which the library places in its control block. The engine's raw
/// threads have none; their memory is the arena's. A thread that starts or ends meanwhile may be missed. Does not
/// allocate.
///
/// # Errors
/// Whatever listing `/proc/self/task` answers: then control blocks are unknown.
///
/// # Kernel
/// `get_robust_list(2)`, `getdents64(2)`.
pub fn thread_control_pages(f: &mut dyn FnMut(PageRange)) -> Result<(), Errno> {
    threads(&mut |tid| control_pages(tid).into_iter().for_each(&mut *f))
}

/// Calls `f` for the id of each thread of the process.
pub(crate) fn threads(f: &mut dyn FnMut(u64)) -> Result<(), Errno> {
    let dir = raw::open(c"/proc/self/task", libc::O_RDONLY | libc::O_DIRECTORY)?;
    let mut buf = [0u64; ENTRIES / 8];
    loop {
        let args = [raw::fd_arg(dir.as_fd()), raw::ptr_arg(buf.as_mut_ptr()), ENTRIES as u64];
        // SAFETY: the kernel writes at most the size given, to a local.
        let n = raw::index(unsafe { raw::syscall(libc::SYS_getdents64, args) }?);
        if n == 0 {
            return Ok(());
        }
        let mut bytes = [0u8; ENTRIES];
        for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(buf) {
            *to = word.to_ne_bytes();
        }
        let mut rest = &bytes[..n];
        while rest.len() > ENTRY_NAME {
            let len = usize::from(u16::from_ne_bytes([rest[ENTRY_LEN], rest[ENTRY_LEN + 1]]));
            if len <= ENTRY_NAME || len > rest.len() {
                return Err(Errno::IO);
            }
            if let Some(tid) = raw::parse_decimal(&rest[ENTRY_NAME..len]) {
                f(tid);
            }
            rest = &rest[len..];
        }
    }
}

/// The control block pages of the thread `tid`, if it has a robust list.
fn control_pages(tid: u64) -> Option<PageRange> {
    let head = tls::robust_head(tid)?;
    // What lies beside is the program's, and may move.
    let known = tls::recipe().ok().and_then(|recipe| recipe.control_pages(head));
    known.or_else(|| {
        let start = head.get().checked_sub(CONTROL_BELOW)?;
        PageRange::covering(VirtAddr::new(start), CONTROL_BELOW + CONTROL_ABOVE).ok()
    })
}

/// Calls `f` for the pages of the calling thread's static thread-local storage, control block and storage vector.
///
/// # Errors
/// `ENOMEM`: no room in the arena to note the layout, at the first call.
pub fn own_tls_pages(f: &mut dyn FnMut(PageRange)) -> Result<(), Errno> {
    let below = tls::recipe()?.below();
    let start = VirtAddr::new(tls::thread_pointer().get().saturating_sub(below));
    f(PageRange::covering(start, below + tls::ABOVE).map_err(|_| Errno::RANGE)?);
    if let Some(pages) = tls::own_vector().and_then(|(start, len)| PageRange::covering(start, len).ok()) {
        f(pages);
    }
    Ok(())
}

/// Libraries that the engine's code calls.
const LIBRARIES: [&[u8]; 8] =
    [b"libc.so", b"libc-2", b"ld-linux", b"libgcc_s", b"libm.so", b"libm-2", b"libpthread", b"libdl"];

/// Most ranges that [`engine_statics`] reports: two for each of a dozen objects.
const STATICS: usize = 64;

/// What [`engine_statics`] reports.
struct Statics {
    ranges: [Option<PageRange>; STATICS],
    len: usize,
}

static KNOWN: OnceLock<Statics> = OnceLock::new();

/// Calls `f` for the writable parts (data and zeroed memory, in whole pages) of the objects that the engine runs code of:
/// the object that holds this function, the C library, the dynamic linker, libgcc, libm. None of them comes or goes while
/// the program runs.
///
/// # Locking
/// The first call takes the dynamic linker's lock. A process that forks in that moment has a child in which the lock
/// stays locked, so the first call is for the program's own thread, before there are others. Later calls take no lock.
///
/// # Panics
/// If there are implausibly many.
///
/// # Kernel
/// `dl_iterate_phdr(3)`.
pub fn engine_statics(f: &mut dyn FnMut(PageRange)) {
    let known = KNOWN.get_or_init(|| {
        let mut statics = Statics { ranges: [None; STATICS], len: 0 };
        let mut add = |range| {
            assert!(statics.len < STATICS, "the engine's code is in a dozen objects");
            statics.ranges[statics.len] = Some(range);
            statics.len += 1;
        };
        let mut add: &mut dyn FnMut(PageRange) = &mut add;
        // SAFETY: `report` is called with this closure before the call returns.
        unsafe { libc::dl_iterate_phdr(Some(report), (&raw mut add).cast::<c_void>()) };
        statics
    });
    known.ranges[..known.len].iter().flatten().copied().for_each(f);
}

unsafe extern "C" fn report(info: *mut libc::dl_phdr_info, _size: usize, f: *mut c_void) -> c_int {
    // SAFETY: `engine_statics` passes its own closure, borrowed until the call returns.
    let f = unsafe { &mut *f.cast::<&mut dyn FnMut(PageRange)>() };
    // SAFETY: the dynamic linker passes a valid record that lives during the call.
    let info = unsafe { &*info };
    // SAFETY: the record's program headers are mapped for as long as the object is.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
    let name = if info.dlpi_name.is_null() {
        c""
    } else {
        // SAFETY: not null, so a NUL-terminated string of the dynamic linker's.
        unsafe { CStr::from_ptr(info.dlpi_name) }
    };
    let name = name.to_bytes().rsplit(|&b| b == b'/').next().unwrap_or(b"");
    let loads = || headers.iter().filter(|h| h.p_type == libc::PT_LOAD);
    let pages = |h: &libc::Elf64_Phdr| {
        PageRange::covering(VirtAddr::new(info.dlpi_addr.wrapping_add(h.p_vaddr)), h.p_memsz).ok()
    };
    let here = VirtAddr::of(engine_statics as *const ());
    let ours = loads().filter_map(pages).any(|range| range.contains(here));
    if ours || LIBRARIES.iter().any(|library| name.starts_with(library)) {
        loads().filter(|h| h.p_flags & libc::PF_W != 0).filter_map(pages).for_each(&mut **f);
    }
    0
}
