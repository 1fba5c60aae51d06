//! Locking all memory of the program into RAM, and not the engine's, which has set aside much more than it uses.
//!
//! # Kernel
//! Stands for `mlockall(2)` with `MCL_CURRENT`.
//
// UNSAFETY: locks mappings by their numbers.

use uhmm::addr::{PageRange, VirtAddr};
use uhmm_sys::{Errno, arena, space};

/// Locks every mapping that is not the engine's. `lazily`: pages are locked as they come.
///
/// # Errors
/// `EPERM`: the process may not lock memory. `ENOMEM`: more than it may lock. What was locked before stays so.
pub(crate) fn lock_program(lazily: bool) -> Result<(), Errno> {
    let text = std::fs::read_to_string("/proc/self/maps").map_err(|_| Errno::NOMEM)?;
    let flags = if lazily { libc::MLOCK_ONFAULT } else { 0 };
    for line in text.lines() {
        let Some(range) = program_range(line) else { continue };
        let (start, len) = (range.start().get(), range.bytes());
        // SAFETY: changes no bytes.
        if unsafe { libc::syscall(libc::SYS_mlock2, start, len, flags) } != 0 {
            match std::io::Error::last_os_error().raw_os_error().map(Errno::from_raw_os_error) {
                // `mlockall` minds neither mappings that cannot be filled (`ENOMEM`) nor those that went meanwhile.
                Some(Errno::NOMEM) if may_lock(len) => {}
                Some(errno @ (Errno::PERM | Errno::NOMEM)) => return Err(errno),
                _ => {}
            }
        }
    }
    Ok(())
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

/// Whether the process may lock `bytes` more, as far as its limit says.
fn may_lock(bytes: u64) -> bool {
    uhmm_sys::limits::memlock().is_none_or(|limit| bytes <= limit)
}
