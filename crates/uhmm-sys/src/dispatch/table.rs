//! Which memory each system call uses: for each number, the arguments that are addresses and how far they reach.
//!
//! What is not in the table is called as it is; where it then answers `EFAULT` the dispatcher brings home what is around
//! its arguments and calls once more.
//!
//! # Kernel
//! Section 2 of the manual, `include/linux/syscalls.h`; sizes are those of x86-64.

use libc::c_long;

/// How far an argument reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// So many bytes.
    Bytes(u64),
    /// As many bytes as another argument says.
    Arg(u8),
    /// As another argument says, times so many bytes.
    Times(u8, u64),
    /// As many bytes as the 32-bit number says that another argument leads to; that number too.
    Counted(u8),
    /// A string.
    Text,
    /// An array of addresses of strings, up to a null.
    Texts,
    /// An array of `struct iovec`, as long as another argument says, and what those lead to.
    Vectors(u8),
    /// A `struct msghdr` and what it leads to.
    Message,
    /// An array of `struct mmsghdr`, as long as another argument says.
    Messages(u8),
    /// A set of file descriptors, as many as the first argument says.
    Files,
    /// A mask and its size in a structure: `pselect6`.
    MaskPair,
    /// As the number of an `ioctl` in the second argument says.
    Ioctl,
    /// So many bytes, where the argument is an address at all.
    Perhaps(u64),
}

use Reach::{Arg, Bytes, Counted, Files, Ioctl, MaskPair, Message, Messages, Perhaps, Text, Texts, Times, Vectors};

/// One argument that is an address.
type Use = (u8, Reach);

/// Memory as the decoder needs it.
pub(super) trait Memory {
    /// The call uses these bytes: they are there from now on, if they can be.
    fn hold(&mut self, start: u64, len: u64);
    /// Reads words, of bytes that are held. `false` where they cannot be read: the call will find out.
    fn read(&mut self, start: u64, words: &mut [u64]) -> bool;
    /// The call uses a string of any length.
    fn hold_text(&mut self, start: u64);
}

/// What a string is taken to be at most where it is not followed to its end.
const TEXT: u64 = 4096;
/// `struct stat`, `struct statfs`, `struct timespec`, `struct rusage`, `siginfo_t`, `struct msghdr`.
const STAT: u64 = 144;
const STATFS: u64 = 120;
const TIME: u64 = 16;
const USAGE: u64 = 144;
const INFO: u64 = 128;
const MESSAGE: u64 = 56;
const MESSAGES: u64 = 64;
/// Most entries of an array that are followed: more than the kernel takes (`IOV_MAX`, `UIO_MAXIOV`).
const MOST: u64 = 1024;
/// Most strings of an `execve` that are followed.
const MOST_TEXTS: u64 = 1 << 20;

#[rustfmt::skip]
fn uses(nr: c_long) -> &'static [Use] {
    match nr {
        libc::SYS_read | libc::SYS_write | libc::SYS_pread64 | libc::SYS_pwrite64 => &[(1, Arg(2))],
        libc::SYS_readv | libc::SYS_writev | libc::SYS_preadv | libc::SYS_pwritev | libc::SYS_preadv2
            | libc::SYS_pwritev2 | libc::SYS_vmsplice => &[(1, Vectors(2))],
        libc::SYS_sendto => &[(1, Arg(2)), (4, Arg(5))],
        libc::SYS_recvfrom => &[(1, Arg(2)), (4, Counted(5))],
        libc::SYS_sendmsg | libc::SYS_recvmsg => &[(1, Message)],
        libc::SYS_sendmmsg => &[(1, Messages(2))],
        libc::SYS_recvmmsg => &[(1, Messages(2)), (4, Bytes(TIME))],
        libc::SYS_bind | libc::SYS_connect => &[(1, Arg(2))],
        libc::SYS_accept | libc::SYS_accept4 | libc::SYS_getsockname | libc::SYS_getpeername => &[(1, Counted(2))],
        libc::SYS_socketpair => &[(3, Bytes(8))],
        libc::SYS_setsockopt => &[(3, Arg(4))],
        libc::SYS_getsockopt => &[(3, Counted(4))],
        libc::SYS_sendfile => &[(2, Bytes(8))],
        libc::SYS_splice | libc::SYS_copy_file_range => &[(1, Bytes(8)), (3, Bytes(8))],

        libc::SYS_open | libc::SYS_creat | libc::SYS_access | libc::SYS_mkdir | libc::SYS_rmdir | libc::SYS_unlink
            | libc::SYS_chmod | libc::SYS_chown | libc::SYS_lchown | libc::SYS_truncate | libc::SYS_chdir
            | libc::SYS_chroot | libc::SYS_mknod | libc::SYS_memfd_create | libc::SYS_umount2 | libc::SYS_uselib
            | libc::SYS_swapon | libc::SYS_swapoff | libc::SYS_acct | libc::SYS_mq_unlink => &[(0, Text)],
        libc::SYS_openat | libc::SYS_mkdirat | libc::SYS_mknodat | libc::SYS_fchownat | libc::SYS_unlinkat
            | libc::SYS_fchmodat | libc::SYS_faccessat | libc::SYS_faccessat2 | libc::SYS_inotify_add_watch
            | libc::SYS_open_tree => &[(1, Text)],
        libc::SYS_openat2 => &[(1, Text), (2, Arg(3))],
        libc::SYS_rename | libc::SYS_link | libc::SYS_symlink | libc::SYS_pivot_root => &[(0, Text), (1, Text)],
        libc::SYS_renameat | libc::SYS_renameat2 | libc::SYS_linkat => &[(1, Text), (3, Text)],
        libc::SYS_symlinkat => &[(0, Text), (2, Text)],
        libc::SYS_readlink => &[(0, Text), (1, Arg(2))],
        libc::SYS_readlinkat => &[(1, Text), (2, Arg(3))],
        libc::SYS_getdents | libc::SYS_getdents64 => &[(1, Arg(2))],
        libc::SYS_getcwd => &[(0, Arg(1))],
        libc::SYS_stat | libc::SYS_lstat => &[(0, Text), (1, Bytes(STAT))],
        libc::SYS_fstat => &[(1, Bytes(STAT))],
        libc::SYS_newfstatat => &[(1, Text), (2, Bytes(STAT))],
        libc::SYS_statx => &[(1, Text), (4, Bytes(256))],
        libc::SYS_statfs => &[(0, Text), (1, Bytes(STATFS))],
        libc::SYS_fstatfs => &[(1, Bytes(STATFS))],
        libc::SYS_utime => &[(0, Text), (1, Bytes(TIME))],
        libc::SYS_utimes => &[(0, Text), (1, Bytes(2 * TIME))],
        libc::SYS_utimensat | libc::SYS_futimesat => &[(1, Text), (2, Bytes(2 * TIME))],
        libc::SYS_setxattr | libc::SYS_lsetxattr | libc::SYS_getxattr | libc::SYS_lgetxattr =>
            &[(0, Text), (1, Text), (2, Arg(3))],
        libc::SYS_fsetxattr | libc::SYS_fgetxattr => &[(1, Text), (2, Arg(3))],
        libc::SYS_listxattr | libc::SYS_llistxattr => &[(0, Text), (1, Arg(2))],
        libc::SYS_flistxattr => &[(1, Arg(2))],
        libc::SYS_removexattr | libc::SYS_lremovexattr => &[(0, Text), (1, Text)],
        libc::SYS_fremovexattr => &[(1, Text)],
        libc::SYS_mount => &[(0, Text), (1, Text), (2, Text), (4, Text)],
        libc::SYS_name_to_handle_at => &[(1, Text), (2, Bytes(136)), (3, Bytes(8))],
        libc::SYS_open_by_handle_at => &[(1, Bytes(136))],
        libc::SYS_fcntl => &[(2, Perhaps(32))],
        libc::SYS_ioctl => &[(2, Ioctl)],
        libc::SYS_lookup_dcookie => &[(1, Arg(2))],

        libc::SYS_pipe | libc::SYS_pipe2 => &[(0, Bytes(8))],
        libc::SYS_poll => &[(0, Times(1, 8))],
        libc::SYS_ppoll => &[(0, Times(1, 8)), (2, Bytes(TIME)), (3, Bytes(8))],
        libc::SYS_select => &[(1, Files), (2, Files), (3, Files), (4, Bytes(TIME))],
        libc::SYS_pselect6 => &[(1, Files), (2, Files), (3, Files), (4, Bytes(TIME)), (5, MaskPair)],
        libc::SYS_epoll_ctl => &[(3, Bytes(12))],
        libc::SYS_epoll_wait => &[(1, Times(2, 12))],
        libc::SYS_epoll_pwait => &[(1, Times(2, 12)), (4, Bytes(8))],
        libc::SYS_epoll_pwait2 => &[(1, Times(2, 12)), (3, Bytes(TIME)), (4, Bytes(8))],
        libc::SYS_signalfd | libc::SYS_signalfd4 => &[(1, Bytes(8))],

        libc::SYS_execve => &[(0, Text), (1, Texts), (2, Texts)],
        libc::SYS_execveat => &[(1, Text), (2, Texts), (3, Texts)],
        libc::SYS_wait4 => &[(1, Bytes(4)), (3, Bytes(USAGE))],
        libc::SYS_waitid => &[(2, Bytes(INFO)), (4, Bytes(USAGE))],
        libc::SYS_clone => &[(2, Perhaps(4)), (3, Perhaps(4))],
        libc::SYS_clone3 => &[(0, Arg(1))],

        libc::SYS_rt_sigaction => &[(1, Bytes(32)), (2, Bytes(32))],
        libc::SYS_rt_sigprocmask => &[(1, Bytes(8)), (2, Bytes(8))],
        libc::SYS_rt_sigpending | libc::SYS_rt_sigsuspend => &[(0, Bytes(8))],
        libc::SYS_rt_sigtimedwait => &[(0, Bytes(8)), (1, Bytes(INFO)), (2, Bytes(TIME))],
        libc::SYS_rt_sigqueueinfo | libc::SYS_pidfd_send_signal => &[(2, Bytes(INFO))],
        libc::SYS_rt_tgsigqueueinfo => &[(3, Bytes(INFO))],
        libc::SYS_sigaltstack => &[(0, Bytes(24)), (1, Bytes(24))],

        libc::SYS_time => &[(0, Bytes(8))],
        libc::SYS_gettimeofday | libc::SYS_settimeofday => &[(0, Bytes(TIME)), (1, Bytes(8))],
        libc::SYS_clock_gettime | libc::SYS_clock_settime | libc::SYS_clock_getres => &[(1, Bytes(TIME))],
        libc::SYS_nanosleep => &[(0, Bytes(TIME)), (1, Bytes(TIME))],
        libc::SYS_clock_nanosleep => &[(2, Bytes(TIME)), (3, Bytes(TIME))],
        libc::SYS_clock_adjtime => &[(1, Bytes(208))],
        libc::SYS_adjtimex => &[(0, Bytes(208))],
        libc::SYS_getitimer => &[(1, Bytes(32))],
        libc::SYS_setitimer => &[(1, Bytes(32)), (2, Bytes(32))],
        libc::SYS_timer_create => &[(1, Bytes(64)), (2, Bytes(4))],
        libc::SYS_timer_settime | libc::SYS_timerfd_settime => &[(2, Bytes(32)), (3, Bytes(32))],
        libc::SYS_timer_gettime | libc::SYS_timerfd_gettime => &[(1, Bytes(32))],
        libc::SYS_times => &[(0, Bytes(32))],

        libc::SYS_uname => &[(0, Bytes(390))],
        libc::SYS_sysinfo => &[(0, Bytes(112))],
        libc::SYS_syslog => &[(1, Arg(2))],
        libc::SYS_sethostname | libc::SYS_setdomainname => &[(0, Arg(1))],
        libc::SYS_getrandom => &[(0, Arg(1))],
        libc::SYS_getrusage => &[(1, Bytes(USAGE))],
        libc::SYS_getrlimit | libc::SYS_setrlimit => &[(1, Bytes(16))],
        libc::SYS_prlimit64 => &[(2, Bytes(16)), (3, Bytes(16))],
        libc::SYS_getgroups | libc::SYS_setgroups => &[(1, Times(0, 4))],
        libc::SYS_getresuid | libc::SYS_getresgid => &[(0, Bytes(4)), (1, Bytes(4)), (2, Bytes(4))],
        libc::SYS_capget | libc::SYS_capset => &[(0, Bytes(8)), (1, Bytes(24))],
        libc::SYS_sched_setaffinity | libc::SYS_sched_getaffinity => &[(2, Arg(1))],
        libc::SYS_sched_setparam | libc::SYS_sched_getparam => &[(1, Bytes(4))],
        libc::SYS_sched_setscheduler => &[(2, Bytes(4))],
        libc::SYS_sched_rr_get_interval => &[(1, Bytes(TIME))],
        libc::SYS_sched_setattr => &[(1, Bytes(64))],
        libc::SYS_sched_getattr => &[(1, Arg(2))],
        libc::SYS_getcpu => &[(0, Bytes(4)), (1, Bytes(4))],
        libc::SYS_prctl => &[(1, Perhaps(16))],
        libc::SYS_arch_prctl => &[(1, Perhaps(8))],
        libc::SYS_seccomp => &[(2, Perhaps(16))],
        libc::SYS_bpf => &[(1, Arg(2))],
        libc::SYS_perf_event_open => &[(0, Bytes(128))],
        libc::SYS_landlock_create_ruleset => &[(0, Arg(1))],
        libc::SYS_landlock_add_rule => &[(2, Bytes(16))],

        libc::SYS_set_tid_address => &[(0, Bytes(4))],
        libc::SYS_set_robust_list => &[(0, Bytes(24))],
        libc::SYS_get_robust_list => &[(1, Bytes(8)), (2, Bytes(8))],
        libc::SYS_rseq => &[(0, Arg(1))],
        libc::SYS_futex_waitv => &[(0, Times(1, 24)), (3, Bytes(TIME))],
        SYS_FUTEX_WAIT => &[(0, Bytes(8)), (4, Bytes(TIME))],
        SYS_FUTEX_WAKE => &[(0, Bytes(8))],
        SYS_FUTEX_REQUEUE => &[(0, Bytes(48))],

        libc::SYS_mlock | libc::SYS_mlock2 => &[(0, Arg(1))],
        libc::SYS_mincore => &[(2, Times(1, 0))],
        libc::SYS_process_vm_readv | libc::SYS_process_vm_writev => &[(1, Vectors(2)), (3, Times(4, 16))],
        libc::SYS_process_madvise => &[(1, Times(2, 16))],
        libc::SYS_set_mempolicy => &[(1, Bytes(128))],
        libc::SYS_get_mempolicy => &[(0, Bytes(4)), (1, Bytes(128))],
        libc::SYS_mbind => &[(3, Bytes(128))],

        libc::SYS_semop => &[(1, Times(2, 6))],
        libc::SYS_semtimedop => &[(1, Times(2, 6)), (3, Bytes(TIME))],
        libc::SYS_semctl => &[(3, Perhaps(256))],
        libc::SYS_shmctl | libc::SYS_msgctl => &[(2, Bytes(128))],
        libc::SYS_msgsnd | libc::SYS_msgrcv => &[(1, Times(2, 1)), (1, Bytes(8))],
        libc::SYS_mq_open => &[(0, Text), (3, Bytes(64))],
        libc::SYS_mq_timedsend => &[(1, Arg(2)), (4, Bytes(TIME))],
        libc::SYS_mq_timedreceive => &[(1, Arg(2)), (3, Bytes(4)), (4, Bytes(TIME))],
        libc::SYS_mq_notify => &[(1, Bytes(64))],
        libc::SYS_mq_getsetattr => &[(1, Bytes(64)), (2, Bytes(64))],
        libc::SYS_keyctl => &[(1, Perhaps(TEXT)), (2, Perhaps(TEXT)), (3, Perhaps(TEXT))],
        libc::SYS_add_key => &[(0, Text), (1, Text), (2, Arg(3))],
        libc::SYS_request_key => &[(0, Text), (1, Text), (2, Text)],
        _ => &[],
    }
}

const SYS_FUTEX_WAKE: c_long = 454;
const SYS_FUTEX_WAIT: c_long = 455;
const SYS_FUTEX_REQUEUE: c_long = 456;

const ADVICE_POPULATE: std::ops::RangeInclusive<u64> = 22..=23;

/// Holds all memory that the system call uses.
pub(super) fn decode(nr: c_long, args: [u64; 6], memory: &mut impl Memory) {
    match nr {
        libc::SYS_futex => return futex(args, memory),
        libc::SYS_madvise if ADVICE_POPULATE.contains(&args[2]) => return memory.hold(args[0], args[1]),
        libc::SYS_mincore => return memory.hold(args[2], args[1].div_ceil(4096)),
        _ => {}
    }
    for &(n, reach) in uses(nr) {
        let start = args[usize::from(n)];
        if start != 0 {
            follow(start, reach, args, memory);
        }
    }
}

fn follow(start: u64, reach: Reach, args: [u64; 6], memory: &mut impl Memory) {
    let arg = |n: u8| args[usize::from(n)];
    // Counts of the kernel's interface that are an `int` there.
    let count = |n: u8| arg(n) & 0xffff_ffff;
    match reach {
        Bytes(len) | Perhaps(len) => memory.hold(start, len),
        Arg(n) => memory.hold(start, arg(n)),
        Times(n, each) => memory.hold(start, count(n).saturating_mul(each)),
        Counted(n) => {
            let at = arg(n);
            memory.hold(at, 4);
            // The word that the number begins need not be there whole.
            if let Some(len) = read_half(at, memory) {
                memory.hold(start, len);
            }
        }
        Text => memory.hold_text(start),
        Texts => texts(start, memory),
        Vectors(n) => vectors(start, arg(n), memory),
        Message => message(start, memory),
        Messages(n) => {
            let count = count(n).min(MOST);
            memory.hold(start, count * MESSAGES);
            (0..count).for_each(|n| message(start + n * MESSAGES, memory));
        }
        Files => memory.hold(start, (count(0).min(1 << 20)).div_ceil(64) * 8),
        MaskPair => {
            memory.hold(start, 16);
            let mut pair = [0; 2];
            if memory.read(start, &mut pair) && pair[0] != 0 {
                memory.hold(pair[0], 8);
            }
        }
        Ioctl => ioctl(arg(1) & 0xffff_ffff, start, memory),
    }
}

/// The structure of an `ioctl`, and what it leads to in those that are known.
fn ioctl(request: u64, start: u64, memory: &mut impl Memory) {
    const UFFDIO_COPY: u64 = 0xc028_aa03;
    const SIOCGIFCONF: u64 = 0x8912;
    // Those of terminals and sockets say no size.
    let size = request >> 16 & 0x3fff;
    memory.hold(start, size.max(256));
    let mut words = [0; 3];
    let [address, len] = match request {
        UFFDIO_COPY => [1, 2],
        SIOCGIFCONF => [1, 0],
        _ => return,
    };
    if memory.read(start, &mut words) {
        // Lengths of the latter have 32 bits.
        let mask = if request == UFFDIO_COPY { u64::MAX } else { 0xffff_ffff };
        memory.hold(words[address], words[len] & mask);
    }
}

/// The 32-bit number at `at`.
fn read_half(at: u64, memory: &mut impl Memory) -> Option<u64> {
    let word = at & !7;
    let mut read = [0];
    memory.read(word, &mut read).then(|| read[0] >> (8 * (at - word)) & 0xffff_ffff)
}

fn vectors(start: u64, count: u64, memory: &mut impl Memory) {
    let count = count.min(MOST);
    memory.hold(start, count * 16);
    for n in 0..count {
        let mut vector = [0; 2];
        if !memory.read(start + n * 16, &mut vector) {
            return;
        }
        memory.hold(vector[0], vector[1]);
    }
}

fn message(start: u64, memory: &mut impl Memory) {
    memory.hold(start, MESSAGE);
    let mut words = [0; 6];
    if !memory.read(start, &mut words) {
        return;
    }
    let [name, name_len, vector, count, control, control_len] = words;
    memory.hold(name, name_len & 0xffff_ffff);
    memory.hold(control, control_len);
    vectors(vector, count, memory);
}

fn texts(start: u64, memory: &mut impl Memory) {
    for n in 0..MOST_TEXTS {
        let at = start + n * 8;
        let mut text = [0];
        memory.hold(at, 8);
        if !memory.read(at, &mut text) || text[0] == 0 {
            return;
        }
        memory.hold_text(text[0]);
    }
}

fn futex(args: [u64; 6], memory: &mut impl Memory) {
    const PRIVATE: u64 = 128;
    const WAKE: u64 = 1;
    const WAKE_BITSET: u64 = 10;
    // Without the flags for private words and for the clock.
    let command = args[1] & 0x7f;
    let (waits, two) = match command {
        // The address is only a name.
        WAKE | WAKE_BITSET if args[1] & PRIVATE != 0 => return,
        // WAIT, LOCK_PI, WAIT_BITSET, LOCK_PI2
        0 | 6 | 9 | 13 => (true, false),
        // REQUEUE, CMP_REQUEUE, WAKE_OP, CMP_REQUEUE_PI
        3 | 4 | 5 | 12 => (false, true),
        // WAIT_REQUEUE_PI
        11 => (true, true),
        _ => (false, false),
    };
    memory.hold(args[0], 4);
    if waits && args[3] != 0 {
        memory.hold(args[3], TIME);
    }
    if two {
        memory.hold(args[4], 4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads this process's own memory, and notes what is held.
    #[derive(Default)]
    struct Notes(Vec<(u64, u64)>);

    impl Memory for Notes {
        fn hold(&mut self, start: u64, len: u64) {
            if start != 0 && len != 0 {
                self.0.push((start, len));
            }
        }

        fn read(&mut self, start: u64, words: &mut [u64]) -> bool {
            words.iter_mut().enumerate().all(|(n, word)| {
                let mut bytes = [0; 8];
                let at = crate::addr::VirtAddr::new(start + n as u64 * 8);
                let read = crate::access::read(at, &mut bytes).is_all();
                *word = u64::from_ne_bytes(bytes);
                read
            })
        }

        fn hold_text(&mut self, start: u64) {
            self.hold(start, TEXT);
        }
    }

    fn held(nr: c_long, args: &[u64]) -> Vec<(u64, u64)> {
        let mut notes = Notes::default();
        decode(nr, std::array::from_fn(|n| args.get(n).copied().unwrap_or(0)), &mut notes);
        notes.0
    }

    fn at<T>(value: &T) -> u64 {
        std::ptr::from_ref(value).expose_provenance() as u64
    }

    #[test]
    fn buffers_reach_as_far_as_their_length_says() {
        assert_eq!(held(libc::SYS_read, &[0, 0x10_0000, 5000]), [(0x10_0000, 5000)]);
        assert_eq!(held(libc::SYS_write, &[0, 0, 5000]), []);
        assert_eq!(held(libc::SYS_sendto, &[3, 0x10_0000, 7, 0, 0x20_0000, 16]), [(0x10_0000, 7), (0x20_0000, 16)]);
        assert_eq!(held(libc::SYS_poll, &[0x10_0000, 3, 0]), [(0x10_0000, 24)]);
        // `nfds` is a long there, but no more than an int.
        assert_eq!(held(libc::SYS_select, &[65, 0x10_0000, 0, 0x20_0000]), [(0x10_0000, 16), (0x20_0000, 16)]);
        assert_eq!(held(libc::SYS_getpid, &[1, 2, 3, 4, 5, 6]), []);
    }

    #[test]
    fn lengths_behind_addresses_are_followed() {
        let len = [0u32, 110];
        let place = at(&len[1]);
        assert_eq!(held(libc::SYS_accept, &[3, 0x10_0000, place]), [(place, 4), (0x10_0000, 110)]);
        // No name wanted, no length read.
        assert_eq!(held(libc::SYS_accept, &[3, 0, 0]), []);
    }

    #[test]
    fn vectors_and_messages_are_followed() {
        let vectors = [0x10_0000u64, 10, 0x20_0000, 20];
        let list = at(&vectors);
        assert_eq!(held(libc::SYS_writev, &[1, list, 2]), [(list, 32), (0x10_0000, 10), (0x20_0000, 20)]);
        let message = [0x30_0000u64, 16 | 0xdead << 32, list, 1, 0x40_0000, 40, 0];
        let place = at(&message);
        let expected = [(place, 56), (0x30_0000, 16), (0x40_0000, 40), (list, 16), (0x10_0000, 10)];
        assert_eq!(held(libc::SYS_recvmsg, &[1, place]), expected);
        let none: [(u64, u64); 1] = [(0x50_0000, 56)];
        // Not mapped: the call will say so.
        assert_eq!(held(libc::SYS_sendmsg, &[1, 0x50_0000]), none);
        let mask = [0x60_0000u64, 8];
        assert_eq!(held(libc::SYS_pselect6, &[0, 0, 0, 0, 0, at(&mask)]), [(at(&mask), 16), (0x60_0000, 8)]);
    }

    #[test]
    fn strings_of_a_new_program_are_followed_to_the_null() {
        let list = [0x10_0000u64, 0x20_0000, 0, 0x30_0000];
        let place = at(&list);
        let texts = held(libc::SYS_execve, &[0x40_0000, place, 0]);
        let expected =
            [(0x40_0000, TEXT), (place, 8), (0x10_0000, TEXT), (place + 8, 8), (0x20_0000, TEXT), (place + 16, 8)];
        assert_eq!(texts, expected);
    }

    #[test]
    fn a_futex_is_held_where_the_kernel_reads_it() {
        let word = 0x10_0000;
        assert_eq!(held(libc::SYS_futex, &[word, 129, 1]), []);
        assert_eq!(held(libc::SYS_futex, &[word, 1, 1]), [(word, 4)]);
        assert_eq!(held(libc::SYS_futex, &[word, 128, 0, 0x20_0000]), [(word, 4), (0x20_0000, 16)]);
        // The fourth argument is a number there.
        assert_eq!(held(libc::SYS_futex, &[word, 132, 1, 0x20_0000, 0x30_0000]), [(word, 4), (0x30_0000, 4)]);
    }

    #[test]
    fn an_ioctl_reaches_as_far_as_its_number_says() {
        assert_eq!(held(libc::SYS_ioctl, &[0, 0x5401, 0x10_0000]), [(0x10_0000, 256)]);
        assert_eq!(held(libc::SYS_ioctl, &[0, 0xc800_aa00, 0x10_0000]), [(0x10_0000, 0x800)]);
        let copy = [0x20_0000u64, 0x30_0000, 0x2000, 0, 0];
        assert_eq!(held(libc::SYS_ioctl, &[3, 0xc028_aa03, at(&copy)]), [(at(&copy), 256), (0x30_0000, 0x2000)]);
        let list = [40u64, 0x30_0000, 0];
        assert_eq!(held(libc::SYS_ioctl, &[3, 0x8912, at(&list)]), [(at(&list), 256), (0x30_0000, 40)]);
    }
}
