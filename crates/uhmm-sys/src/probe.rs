//! What this kernel lets this process do: each capability that uhmm uses, tried for real.
//!
//! A probe does the thing itself, on a scratch mapping: it moves a page, takes a fault, reads an event. Flags and version
//! numbers say what a kernel means to offer; a seccomp filter, a container or a missing privilege says otherwise only when
//! asked for the real thing.
//!
//! `UHMM_MASK` names capabilities, separated by commas, that uhmm is to treat as missing: `UHMM_MASK=move,scan`. It is how
//! the ways of older kernels and of unprivileged users are tested on a machine that could do better. The rest of this crate
//! asks [`masked`] before it uses one.
//!
//! Probing allocates, starts threads and forks. It is for a program's start or for `uhmm doctor`, never for a fault path.
//! [`masked`] does none of that after its first call.

mod kernel;
mod scratch;
mod userfault;

use std::sync::atomic::{AtomicU64, Ordering};

use crate::uffd::Features;

/// Something of the kernel that uhmm uses and that may be missing here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Cap {
    /// Linux on x86-64 with 4 KiB base pages.
    Kernel,
    /// Missing faults can be served, in whatever way the userfaultfd was opened.
    Userfault,
    /// `userfaultfd(2)` answers without restriction.
    UffdSyscall,
    /// `/dev/userfaultfd` may be opened.
    UffdDevice,
    /// A userfaultfd for faults from user mode only.
    UffdUserOnly,
    /// Faults that a system call takes on behalf of the process are served too.
    KernelFaults,
    /// A thread can have its system calls caught: `PR_SET_SYSCALL_USER_DISPATCH`.
    SyscallDispatch,
    /// `UFFD_FEATURE_EVENT_REMAP`.
    RemapEvent,
    /// `UFFD_FEATURE_EVENT_REMOVE`.
    RemoveEvent,
    /// `UFFD_FEATURE_EVENT_UNMAP`.
    UnmapEvent,
    /// `UFFD_FEATURE_EVENT_FORK`.
    ForkEvent,
    /// `UFFDIO_MOVE`.
    Move,
    /// `UFFDIO_WRITEPROTECT` on anonymous memory.
    WriteProtect,
    /// `UFFD_FEATURE_WP_UNPOPULATED`: markers in holes.
    WpUnpopulated,
    /// `UFFDIO_POISON`.
    Poison,
    /// `UFFD_FEATURE_THREAD_ID`.
    ThreadId,
    /// `ioctl(PAGEMAP_SCAN)`.
    PagemapScan,
    /// `ioctl(PROCMAP_QUERY)`.
    ProcmapQuery,
    /// Physical frame numbers in pagemap, and `/proc/kpageflags`.
    Pfn,
    /// `process_vm_readv(2)` on this process itself.
    VmReadv,
    /// `memfd_create(2)`.
    Memfd,
    /// A few GiB of address space can be reserved.
    AddressSpace,
    /// `MADV_POPULATE_READ` and `MADV_POPULATE_WRITE`.
    Populate,
    /// `membarrier(2)`, private expedited.
    Membarrier,
    /// Transparent huge pages on anonymous memory.
    Thp,
    /// `CAP_SYS_PTRACE`.
    SysPtrace,
    /// `vm.max_map_count`.
    MaxMapCount,
    /// `RLIMIT_MEMLOCK`.
    Memlock,
    /// `RLIMIT_AS`.
    RlimitAs,
    /// `vm.overcommit_memory`.
    Overcommit,
}

/// What it means that a capability is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// Nothing by itself: one of several ways to the same end, or a fact that explains others.
    Fact,
    /// uhmm does the same, slower.
    Speed,
    /// uhmm works, and some program or some promise is out of reach.
    Limit,
    /// uhmm cannot manage memory here.
    Required,
}

/// How far a capability is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    /// It works.
    Ok,
    /// It is there with a restriction.
    Degraded,
    /// It is not there.
    Missing,
}

/// What `uhmm run` can do here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// All of it.
    Full,
    /// It works, with limits.
    Limited,
    /// Nothing.
    CannotRun,
}

/// What a probe found, before it is put beside what the capability is for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    status: Status,
    detail: String,
    /// What grants it, where that depends on what was found.
    grant: Option<String>,
}

impl Found {
    fn ok(detail: impl Into<String>) -> Self {
        Self { status: Status::Ok, detail: detail.into(), grant: None }
    }

    fn degraded(detail: impl Into<String>) -> Self {
        Self { status: Status::Degraded, detail: detail.into(), grant: None }
    }

    fn missing(detail: impl Into<String>) -> Self {
        Self { status: Status::Missing, detail: detail.into(), grant: None }
    }

    fn grant(mut self, command: impl Into<String>) -> Self {
        self.grant = Some(command.into());
        self
    }
}

/// One capability, as found here.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// Which.
    pub cap: Cap,
    /// How far it is there.
    pub status: Status,
    /// What was tried and what the kernel answered.
    pub detail: String,
    /// What is lost without it; `None` where nothing is.
    pub lost: Option<&'static str>,
    /// What grants it: one command where there is one. `None` where it is there.
    pub grant: Option<String>,
}

/// Everything found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// One for each of [`Cap::ALL`], in that order.
    pub findings: Vec<Finding>,
    /// Names in `UHMM_MASK` that name no capability.
    pub unknown_masks: Vec<String>,
}

impl Report {
    /// What `uhmm run` can do here.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let of = |finding: &Finding| match (finding.cap.need(), finding.status) {
            (_, Status::Ok) | (Need::Fact | Need::Speed, _) => Verdict::Full,
            (Need::Required, Status::Missing) => Verdict::CannotRun,
            (Need::Required, Status::Degraded) | (Need::Limit, _) => Verdict::Limited,
        };
        let missing = |cap| self.get(cap).status == Status::Missing;
        if missing(Cap::KernelFaults) && missing(Cap::SyscallDispatch) {
            // One of the two must keep the program's system calls from failing.
            return Verdict::CannotRun;
        }
        self.findings.iter().map(of).max().unwrap_or(Verdict::Full)
    }

    /// What was found of `cap`.
    ///
    /// # Panics
    /// Never: a report holds every capability.
    #[must_use]
    pub fn get(&self, cap: Cap) -> &Finding {
        self.findings.iter().find(|finding| finding.cap == cap).expect("a report holds every capability")
    }
}

impl Cap {
    /// Every capability, in the order in which they are reported.
    pub const ALL: &[Self] = &[
        Self::Kernel,
        Self::Userfault,
        Self::UffdSyscall,
        Self::UffdDevice,
        Self::UffdUserOnly,
        Self::KernelFaults,
        Self::SyscallDispatch,
        Self::RemapEvent,
        Self::RemoveEvent,
        Self::UnmapEvent,
        Self::ForkEvent,
        Self::Move,
        Self::WriteProtect,
        Self::WpUnpopulated,
        Self::Poison,
        Self::ThreadId,
        Self::PagemapScan,
        Self::ProcmapQuery,
        Self::Pfn,
        Self::VmReadv,
        Self::Memfd,
        Self::AddressSpace,
        Self::Populate,
        Self::Membarrier,
        Self::Thp,
        Self::SysPtrace,
        Self::MaxMapCount,
        Self::Memlock,
        Self::RlimitAs,
        Self::Overcommit,
    ];

    /// The name in `UHMM_MASK`, and in the output of `uhmm doctor`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.about().0
    }

    /// What it means that it is not there.
    #[must_use]
    pub const fn need(self) -> Need {
        self.about().1
    }

    /// What is lost without it; empty for a fact by itself.
    #[must_use]
    pub const fn lost(self) -> &'static str {
        self.about().2
    }

    /// Name, need, and what is lost without it.
    const fn about(self) -> (&'static str, Need, &'static str) {
        use Need::{Fact, Limit, Required, Speed};
        match self {
            Self::Kernel => ("kernel", Required, "uhmm knows no other kind of machine"),
            Self::Userfault => ("userfault", Required, "no page can leave: nobody would bring it home at a touch"),
            Self::UffdSyscall => ("uffd-syscall", Fact, ""),
            Self::UffdDevice => ("uffd-device", Fact, ""),
            Self::UffdUserOnly => ("uffd-user-only", Fact, ""),
            Self::KernelFaults => (
                "kernelfaults",
                Limit,
                "`uhmm run` catches each system call of a program, which then costs some 2 us more; stacks and thread data stay in \
                 RAM, pages come home before a fork, io_uring is refused; needs syscall-dispatch",
            ),
            Self::SyscallDispatch => ("syscall-dispatch", Fact, ""),
            Self::RemapEvent => ("remap-event", Required, "mremap of memory that is away would read as zero"),
            Self::RemoveEvent => ("remove-event", Required, "dropped memory would come back with its old bytes"),
            Self::UnmapEvent => ("unmap-event", Required, "devices would keep translations of unmapped memory"),
            Self::ForkEvent => (
                "fork-event",
                Limit,
                "a child of a raw clone reads wrong bytes; fork of the C library is followed anyway, and all forks where system \
                 calls are caught",
            ),
            Self::Move => (
                "move",
                Limit,
                "pages leave by mremap and copy: slower, locked memory stays, pages pinned for I/O cannot be told from others, and coherent device memory is used like private",
            ),
            Self::WriteProtect => ("wp", Limit, "staging cannot be registered, and nothing can leave by move"),
            Self::WpUnpopulated => {
                ("wp-unpopulated", Speed, "a page that is away looks like one never touched in pagemap")
            }
            Self::Poison => {
                ("poison", Limit, "a page lost with its device stops the whole program, not only who touches it")
            }
            Self::ThreadId => ("thread-id", Speed, "traces do not say which thread faulted, and its CPU is not known"),
            Self::PagemapScan => {
                ("scan", Speed, "page states are read one by one; zero pages and huge pages are not told apart")
            }
            Self::ProcmapQuery => ("procmap", Speed, "VMAs are found by reading /proc/self/maps as text"),
            Self::Pfn => (
                "pfn",
                Speed,
                "which pages are writable cannot be seen: devices take a write fault for each first store",
            ),
            Self::VmReadv => {
                ("vm-readv", Required, "a device could not read host memory in a way that survives the page vanishing")
            }
            Self::Memfd => ("memfd", Required, "the software device has nowhere to keep its memory"),
            Self::AddressSpace => ("address-space", Required, "the engine has no place for its own memory"),
            Self::Populate => ("populate", Limit, "pages shared after fork cannot be made ready to leave, and stay"),
            Self::Membarrier => ("membarrier", Speed, "devices pay a full fence for each access to host memory"),
            Self::Thp => ("thp", Speed, "no huge folios: every page moves by itself"),
            Self::SysPtrace => ("sys-ptrace", Fact, ""),
            Self::MaxMapCount => {
                ("max-map-count", Limit, "registration splits VMAs; at the limit further ranges stay in RAM")
            }
            Self::Memlock => {
                ("memlock", Limit, "locked memory of the program stays in RAM: staging for it must be locked too")
            }
            Self::RlimitAs => {
                ("rlimit-as", Limit, "the engine's memory counts towards the program's limit of address space")
            }
            Self::Overcommit => {
                ("overcommit", Limit, "the engine's reserved memory counts towards the machine's commit limit")
            }
        }
    }

    const fn bit(self) -> u64 {
        1 << (self as u32)
    }
}

/// A set of capabilities to be treated as missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mask(u64);

impl Mask {
    /// Reads a comma-separated list of names. Unknown names are handed to `unknown_fn` and otherwise ignored.
    pub fn parse(list: &str, mut unknown_fn: impl FnMut(&str)) -> Self {
        let mut bits = 0;
        for name in list.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            match Cap::ALL.iter().find(|cap| cap.name() == name) {
                Some(cap) => bits |= cap.bit(),
                None => unknown_fn(name),
            }
        }
        Self(bits)
    }

    /// Whether `cap` is to be treated as missing.
    #[must_use]
    pub const fn contains(self, cap: Cap) -> bool {
        self.0 & cap.bit() != 0
    }
}

/// The variable that holds the names.
pub const MASK_VARIABLE: &str = "UHMM_MASK";

/// Set in [`MASK`] once the environment was read; no capability has this bit.
const MASK_READ: u64 = 1 << 63;
static MASK: AtomicU64 = AtomicU64::new(0);

const _: () = assert!(Cap::ALL.len() < 63, "a mask has 63 bits for capabilities");

/// What `UHMM_MASK` says. The environment is read at the first call, which allocates; later calls are one load.
#[must_use]
pub fn mask() -> Mask {
    // Relaxed: the word is all there is. Two first calls at once read the same environment.
    let bits = MASK.load(Ordering::Relaxed);
    if bits & MASK_READ != 0 {
        return Mask(bits & !MASK_READ);
    }
    let mask = Mask::parse(&std::env::var(MASK_VARIABLE).unwrap_or_default(), |_| ());
    MASK.store(mask.0 | MASK_READ, Ordering::Relaxed);
    mask
}

/// Whether `cap` is to be treated as missing, whatever the kernel offers. See [`mask`].
#[must_use]
pub fn masked(cap: Cap) -> bool {
    mask().contains(cap)
}

/// Those of a userfaultfd's features that are not masked; for whoever is about to ask the kernel for them.
#[must_use]
pub fn unmasked(features: Features) -> Features {
    let mask = mask();
    FEATURES.iter().filter(|(cap, _)| mask.contains(*cap)).fold(features, |left, (_, bits)| left.difference(*bits))
}

/// Capabilities that are features of a userfaultfd.
const FEATURES: &[(Cap, Features)] = &[
    (Cap::RemapEvent, Features::EVENT_REMAP),
    (Cap::RemoveEvent, Features::EVENT_REMOVE),
    (Cap::UnmapEvent, Features::EVENT_UNMAP),
    (Cap::ForkEvent, Features::EVENT_FORK),
    (Cap::Move, Features::MOVE),
    (Cap::WriteProtect, Features::FAULT_WP.union(Features::WP_UNPOPULATED)),
    (Cap::WpUnpopulated, Features::WP_UNPOPULATED),
    (Cap::Poison, Features::POISON),
    (Cap::ThreadId, Features::THREAD_ID),
];

/// Tries every capability.
///
/// # Locking
/// Takes none. Forks once (the child exits at once) and starts threads that end before it returns.
#[must_use]
pub fn probe() -> Report {
    let mask = mask();
    let mut unknown_masks = Vec::new();
    Mask::parse(&std::env::var(MASK_VARIABLE).unwrap_or_default(), |name| unknown_masks.push(name.to_owned()));
    let findings = Cap::ALL.iter().map(|cap| find(*cap, mask)).collect();
    Report { findings, unknown_masks }
}

fn find(cap: Cap, mask: Mask) -> Finding {
    let found = if mask.contains(cap) {
        Found::missing(format!("masked by {MASK_VARIABLE}")).grant(format!("unset {MASK_VARIABLE}"))
    } else {
        try_it(cap)
    };
    let ok = found.status == Status::Ok;
    Finding {
        cap,
        status: found.status,
        detail: found.detail,
        lost: (!ok && !cap.lost().is_empty()).then_some(cap.lost()),
        grant: if ok { None } else { found.grant },
    }
}

fn try_it(cap: Cap) -> Found {
    match cap {
        Cap::Kernel => kernel::version(),
        Cap::Userfault => userfault::round_trip(),
        Cap::UffdSyscall => userfault::by_syscall(),
        Cap::UffdDevice => userfault::by_device(),
        Cap::UffdUserOnly => userfault::user_only(),
        Cap::SyscallDispatch => kernel::syscall_dispatch(),
        Cap::KernelFaults => userfault::kernel_faults(),
        Cap::RemapEvent => userfault::remap_event(),
        Cap::RemoveEvent => userfault::remove_event(),
        Cap::UnmapEvent => userfault::unmap_event(),
        Cap::ForkEvent => userfault::fork_event(),
        Cap::Move => userfault::move_page(),
        Cap::WriteProtect => userfault::write_protect(),
        Cap::WpUnpopulated => userfault::write_protect_hole(),
        Cap::Poison => userfault::poison(),
        Cap::ThreadId => userfault::thread_id(),
        Cap::PagemapScan => kernel::pagemap_scan(),
        Cap::ProcmapQuery => kernel::procmap_query(),
        Cap::Pfn => kernel::pfn(),
        Cap::VmReadv => kernel::vm_readv(),
        Cap::Memfd => kernel::memfd(),
        Cap::AddressSpace => kernel::address_space(),
        Cap::Populate => kernel::populate(),
        Cap::Membarrier => kernel::membarrier(),
        Cap::Thp => kernel::thp(),
        Cap::SysPtrace => kernel::sys_ptrace(),
        Cap::MaxMapCount => kernel::max_map_count(),
        Cap::Memlock => kernel::memlock(),
        Cap::RlimitAs => kernel::rlimit_as(),
        Cap::Overcommit => kernel::overcommit(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(changes: &[(Cap, Status)]) -> Report {
        let findings = Cap::ALL.iter().map(|cap| Finding {
            cap: *cap,
            status: changes.iter().find(|(changed, _)| changed == cap).map_or(Status::Ok, |(_, status)| *status),
            detail: String::new(),
            lost: None,
            grant: None,
        });
        Report { findings: findings.collect(), unknown_masks: Vec::new() }
    }

    #[test]
    fn every_capability_is_listed_once_and_has_its_own_name() {
        for (n, cap) in Cap::ALL.iter().enumerate() {
            assert_eq!(*cap as usize, n, "{cap:?} is out of order");
            assert!(Cap::ALL.iter().filter(|other| other.name() == cap.name()).count() == 1, "{}", cap.name());
            assert_eq!(cap.need() == Need::Fact, cap.lost().is_empty(), "{cap:?}: what is lost");
        }
        assert_eq!(Cap::ALL.last(), Some(&Cap::Overcommit), "the list ends before the enum does");
    }

    #[test]
    fn a_mask_is_read_by_name_and_unknown_names_are_told() {
        let mut unknown = Vec::new();
        let mask = Mask::parse(" move, scan,,fork-event,movee", |name| unknown.push(name.to_owned()));
        let masked: Vec<_> = Cap::ALL.iter().filter(|cap| mask.contains(**cap)).collect();
        assert_eq!(masked, [&Cap::ForkEvent, &Cap::Move, &Cap::PagemapScan]);
        assert_eq!(unknown, ["movee"]);
    }

    #[test]
    fn the_verdict_is_that_of_the_worst_capability() {
        assert_eq!(report(&[]).verdict(), Verdict::Full);
        assert_eq!(report(&[(Cap::UffdDevice, Status::Missing), (Cap::Thp, Status::Missing)]).verdict(), Verdict::Full);
        assert_eq!(report(&[(Cap::Move, Status::Missing)]).verdict(), Verdict::Limited);
        assert_eq!(report(&[(Cap::MaxMapCount, Status::Degraded)]).verdict(), Verdict::Limited);
        assert_eq!(report(&[(Cap::KernelFaults, Status::Missing)]).verdict(), Verdict::Limited);
        let neither = [(Cap::KernelFaults, Status::Missing), (Cap::SyscallDispatch, Status::Missing)];
        assert_eq!(report(&neither).verdict(), Verdict::CannotRun);
        let worst = [(Cap::Move, Status::Missing), (Cap::VmReadv, Status::Missing)];
        assert_eq!(report(&worst).verdict(), Verdict::CannotRun);
    }

    #[test]
    fn a_masked_capability_is_not_even_tried() {
        let finding = find(Cap::VmReadv, Mask::parse("vm-readv", |_| ()));
        assert_eq!(finding.status, Status::Missing);
        assert!(finding.lost.is_some() && finding.detail.contains(MASK_VARIABLE));
        assert_eq!(find(Cap::VmReadv, Mask::default()).status, Status::Ok);
    }

    #[test]
    fn probing_twice_finds_the_same_and_leaves_nothing_open() {
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let first = probe();
        // Other tests of this process open files too; a leak of probes would grow with every round.
        let before = open();
        for _ in 0..20 {
            assert_eq!(probe(), first);
        }
        assert!(open() < before + 20, "each round leaves a file open");
        assert_eq!(first.findings.len(), Cap::ALL.len());
        assert_eq!(first.get(Cap::Memfd).status, Status::Ok);
    }
}
