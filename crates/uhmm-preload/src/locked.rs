//! Locking all memory of the program into RAM, and not the engine's, which has set aside much more than it uses.
//!
//! # Kernel
//! Stands for `mlockall(2)` with `MCL_CURRENT`.
//
// UNSAFETY: locks mappings by their numbers.

use uhmm::addr::{PageRange, VirtAddr};
use uhmm_sys::{Errno, arena, limits, space};

/// Whether the process may lock all that the program has mapped: as the kernel, by the size of it.
///
/// # Errors
/// `ENOMEM`: it is more than the limit. `EPERM`: nothing may be locked.
pub(crate) fn check_limit() -> Result<(), Errno> {
    let mapped = program_ranges()?.iter().map(|range| range.bytes()).sum::<u64>();
    match limits::memlock() {
        Some(limit) if mapped > limit && !limits::has_ipc_lock() => {
            Err(if limit == 0 { Errno::PERM } else { Errno::NOMEM })
        }
        _ => Ok(()),
    }
}

/// Locks every mapping that is not the engine's. `lazily`: pages are locked as they come. As for `mlockall`, mappings that
/// cannot be filled do not matter, nor those that went meanwhile.
///
/// # Errors
/// `EPERM`: the process may not lock memory. What was locked before stays so.
pub(crate) fn lock_program(lazily: bool) -> Result<(), Errno> {
    let flags = if lazily { libc::MLOCK_ONFAULT } else { 0 };
    for range in program_ranges()? {
        let (start, len) = (range.start().get(), range.bytes());
        // SAFETY: changes no bytes.
        if unsafe { libc::syscall(libc::SYS_mlock2, start, len, flags) } != 0
            && std::io::Error::last_os_error().raw_os_error() == Some(libc::EPERM)
        {
            return Err(Errno::PERM);
        }
    }
    Ok(())
}

/// What the program has mapped.
fn program_ranges() -> Result<Vec<PageRange>, Errno> {
    let text = std::fs::read_to_string("/proc/self/maps").map_err(|_| Errno::NOMEM)?;
    Ok(text.lines().filter_map(program_range).collect())
}

/// The range of a line of `/proc/self/maps`, where it is the program's.
fn program_range(line: &str) -> Option<PageRange> {
    let (ends, rest) = line.split_once(' ')?;
    let (start, end) = ends.split_once('-')?;
    let at = |text| u64::from_str_radix(text, 16).ok().map(VirtAddr::new);
    let range = PageRange::from_ends(at(start)?, at(end)?).ok()?;
    let engines = [arena::range(), space::range()].into_iter().flatten().any(|own| own.overlaps(range));
    // The kernel's own mappings cannot be locked, and need not be.
    let other = ["[vvar", "[vdso]", "[vsyscall]"].iter().any(|name| rest.contains(name));
    (!engines && !other).then_some(range)
}
