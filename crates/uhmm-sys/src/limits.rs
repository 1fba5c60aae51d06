//! Limits and settings of the machine and the process that the engine must live within.
// UNSAFETY: system calls that fill structures.

use std::ffi::CStr;

use crate::{Errno, addr::PAGE_SIZE, raw, thread};

/// When the kernel makes transparent huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThpMode {
    /// In all private anonymous memory.
    Always,
    /// Where `madvise` asks for it.
    Madvise,
    /// Never, or the kernel has none.
    Never,
}

fn sysctl(path: &CStr) -> Result<u64, Errno> {
    let mut buf = [0; 32];
    raw::parse_decimal(raw::read_file(path, &mut buf)?).ok_or(Errno::IO)
}

/// The most VMAs that a process can have.
///
/// # Errors
/// Whatever reading `/proc/sys/vm/max_map_count` answers.
pub fn max_map_count() -> Result<u64, Errno> {
    sysctl(c"/proc/sys/vm/max_map_count")
}

/// The overcommit policy: 0 heuristic, 1 always, 2 never.
///
/// # Errors
/// Whatever reading `/proc/sys/vm/overcommit_memory` answers.
pub fn overcommit() -> Result<u64, Errno> {
    sysctl(c"/proc/sys/vm/overcommit_memory")
}

/// The soft limit of `resource`, `None` where there is none.
fn rlimit(resource: libc::__rlimit_resource_t) -> Option<u64> {
    let mut limit = [0u64; 2];
    let args = [0, u64::from(resource), 0, raw::ptr_arg(limit.as_mut_ptr())];
    // SAFETY: the kernel writes two numbers to a local of that size.
    let answer = unsafe { raw::syscall(libc::SYS_prlimit64, args) };
    (answer.is_ok() && limit[0] != u64::MAX).then_some(limit[0])
}

/// The most address space that the process may have, in bytes; `None`: no limit.
#[must_use]
pub fn rlimit_as() -> Option<u64> {
    rlimit(libc::RLIMIT_AS)
}

/// The most that the main thread's stack may grow to, in bytes; `None`: no limit.
#[must_use]
pub fn stack() -> Option<u64> {
    rlimit(libc::RLIMIT_STACK)
}

/// The most memory that the process may lock, in bytes; `None`: no limit.
#[must_use]
pub fn memlock() -> Option<u64> {
    rlimit(libc::RLIMIT_MEMLOCK)
}

/// Whether `CAP_IPC_LOCK` is effective, with which [`memlock`] does not count.
#[must_use]
pub fn has_ipc_lock() -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    has_capability(CAP_IPC_LOCK)
}

/// Whether the capability number `n` is effective.
pub(crate) fn has_capability(n: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok())
        .is_some_and(|caps| caps >> n & 1 != 0)
}

/// CPUs that the calling thread may run on; at least 1.
#[must_use]
pub fn online_cpus() -> usize {
    thread::allowed_cpus().len().max(1)
}

/// RAM of the machine in bytes.
#[must_use]
pub fn total_ram() -> u64 {
    let mut buf = [0; 256];
    let Ok(text) = raw::read_file(c"/proc/meminfo", &mut buf) else { return 0 };
    let line = text.split(|&b| b == b'\n').find_map(|line| line.strip_prefix(b"MemTotal:"));
    // At least a page, so that nobody divides by it.
    line.and_then(raw::parse_decimal).map_or(0, |kib| kib * 1024).max(PAGE_SIZE)
}

/// When the kernel makes transparent huge pages.
#[must_use]
pub fn thp_mode() -> ThpMode {
    let mut buf = [0; 64];
    let text = raw::read_file(c"/sys/kernel/mm/transparent_hugepage/enabled", &mut buf).unwrap_or(&[]);
    let says = |word: &[u8]| text.windows(word.len()).any(|part| part == word);
    if says(b"[always]") {
        ThpMode::Always
    } else if says(b"[madvise]") {
        ThpMode::Madvise
    } else {
        ThpMode::Never
    }
}
