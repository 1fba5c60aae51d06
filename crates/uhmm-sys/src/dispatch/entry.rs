//! The code by which a watched system call is made, and the word by which a thread knows its slot.
//!
//! A call is made with the program's registers and on the program's stack, by an instruction of ours: a signal handler
//! that interrupts it, a debugger, and whoever unwinds the stack from there find nothing between them and the program. All
//! registers are the program's but `rbx`, which leads to the record of the call; the record says what `rbx` was.
//!
//! ```text
//! program: syscall --SIGSYS--> handler: publish, rip = make_call --sigreturn--> make_call: syscall
//!    ^                                                                               |
//!    +----------------- registers from the record, record free ----------------------+
//!    |                                                                               | EFAULT, or a look is wanted
//!    +--- handler: look, perhaps once more <--SIGSYS-- syscall (REVIEW) of the program's own code
//! ```
//!
//! A new thread, or a child that `vfork` made, goes the same way: the record leads it to where it goes on, whatever its
//! stack. Before that it has its own system calls watched, for that is not inherited.
// UNSAFETY: code that the compiler does not know, and a word of thread-local storage that it does not know either.

use std::{arch::asm, arch::global_asm, mem::offset_of};

use super::slot::Call;

/// The number with which `make_call` asks for a look at its answer. No system call has it.
pub(super) const REVIEW: u64 = 0x7568_6d6d;

/// `PR_SET_SYSCALL_USER_DISPATCH`, on.
pub(super) const SET_DISPATCH: u64 = 59;
pub(super) const DISPATCH_ON: u64 = 1;
pub(super) const DISPATCH_OFF: u64 = 0;

const ARGS: usize = offset_of!(Call, args);
const RIP: usize = offset_of!(Call, rip);
const RBX: usize = offset_of!(Call, rbx);
// The unwinding tables below hold offsets of one byte.
const _: () = assert!(RIP == 8 && RBX == 16 && offset_of!(Call, users) == 0);

global_asm!(
    ".pushsection .tbss.uhmm_slot,\"awT\",@nobits",
    ".p2align 3",
    ".hidden uhmm_dispatch_slot",
    ".globl uhmm_dispatch_slot",
    ".type uhmm_dispatch_slot,@object",
    ".size uhmm_dispatch_slot,8",
    "uhmm_dispatch_slot:",
    ".zero 8",
    ".popsection",
);

// Restores the registers from the record in rbx, all but rbx itself, and leaves in r11 what rbx was and in rcx where to
// go on. Both are the system call's to change.
macro_rules! restore {
    () => {
        "mov rcx, [rbx + {rip}]
         mov r11, [rbx + {rbx}]
         mov rdi, [rbx + {args}]
         mov rsi, [rbx + {args} + 8]
         mov rdx, [rbx + {args} + 16]
         mov r10, [rbx + {args} + 24]
         mov r8, [rbx + {args} + 32]
         mov r9, [rbx + {args} + 40]"
    };
}

// Asks for a look at the answer in rax, by a system call of the program's own code: that one is watched.
macro_rules! ask {
    () => {
        "mov [rbx + {answer}], rax
         mov rcx, [rbx + {rip}]
         sub rcx, 2
         mov eax, {review_nr}
         jmp rcx"
    };
}

// To an unwinder the caller is the program, with rip and rbx as the record has them (registers 16 and 3, each at an
// offset from rbx), and rsp as it is.
macro_rules! frame {
    () => {
        ".cfi_startproc
         .cfi_signal_frame
         .cfi_def_cfa rsp, 0
         .cfi_escape 0x10, 16, 2, 0x73, 8
         .cfi_escape 0x10, 3, 2, 0x73, 16"
    };
}

global_asm!(
    ".pushsection .text.uhmm_dispatch,\"ax\",@progbits",
    ".p2align 4",
    ".hidden uhmm_dispatch_call",
    ".globl uhmm_dispatch_call",
    ".type uhmm_dispatch_call,@function",
    "uhmm_dispatch_call:",
    frame!(),
    "syscall",
    "cmp rax, -14",
    "je 2f",
    "cmp qword ptr [rbx + {review}], 0",
    "jne 2f",
    restore!(),
    "mov qword ptr [rbx], 0",
    "mov rbx, r11",
    "jmp rcx",
    "2:",
    ask!(),
    ".cfi_endproc",
    ".size uhmm_dispatch_call, .-uhmm_dispatch_call",
    ".p2align 4",
    ".hidden uhmm_dispatch_clone",
    ".globl uhmm_dispatch_clone",
    ".type uhmm_dispatch_clone,@function",
    "uhmm_dispatch_clone:",
    frame!(),
    "syscall",
    "test rax, rax",
    "jz 4f",
    "js 3f",
    "cmp qword ptr [rbx + {review}], 0",
    "jne 3f",
    restore!(),
    "lock dec qword ptr [rbx]",
    "mov rbx, r11",
    "jmp rcx",
    "3:",
    ask!(),
    "4:",
    "mov rcx, [rbx + {clear}]",
    "test rcx, rcx",
    "jz 5f",
    "mov qword ptr [rcx], 0",
    "5:",
    "mov edi, {set_dispatch}",
    "mov esi, {dispatch_on}",
    "mov rdx, [rbx + {text_start}]",
    "mov r10, [rbx + {text_len}]",
    "xor r8d, r8d",
    "mov eax, {prctl}",
    "syscall",
    restore!(),
    "xor eax, eax",
    "lock dec qword ptr [rbx]",
    "mov rbx, r11",
    "jmp rcx",
    ".cfi_endproc",
    ".size uhmm_dispatch_clone, .-uhmm_dispatch_clone",
    // The number is in rax and the arguments are in their places, and it does not come back here.
    ".p2align 4",
    ".hidden uhmm_dispatch_leave",
    ".globl uhmm_dispatch_leave",
    ".type uhmm_dispatch_leave,@function",
    "uhmm_dispatch_leave:",
    "syscall",
    "ud2",
    ".size uhmm_dispatch_leave, .-uhmm_dispatch_leave",
    ".p2align 4",
    ".hidden uhmm_dispatch_restorer",
    ".globl uhmm_dispatch_restorer",
    ".type uhmm_dispatch_restorer,@function",
    // Unwinders know the end of a signal handler by these two instructions.
    "nop",
    "uhmm_dispatch_restorer:",
    "mov rax, {sigreturn}",
    "syscall",
    ".size uhmm_dispatch_restorer, .-uhmm_dispatch_restorer",
    ".popsection",
    rip = const RIP,
    rbx = const RBX,
    args = const ARGS,
    review = const offset_of!(Call, review),
    answer = const offset_of!(Call, answer),
    clear = const offset_of!(Call, clear_in_child),
    text_start = const offset_of!(Call, text_start),
    text_len = const offset_of!(Call, text_len),
    review_nr = const REVIEW,
    set_dispatch = const SET_DISPATCH,
    dispatch_on = const DISPATCH_ON,
    prctl = const libc::SYS_prctl,
    sigreturn = const libc::SYS_rt_sigreturn,
);

unsafe extern "C" {
    fn uhmm_dispatch_call();
    fn uhmm_dispatch_clone();
    fn uhmm_dispatch_leave();
    fn uhmm_dispatch_restorer();
}

fn address(code: unsafe extern "C" fn()) -> u64 {
    (code as *const ()).expose_provenance() as u64
}

/// Makes the call of the record in `rbx`.
pub(super) fn make_call() -> u64 {
    address(uhmm_dispatch_call)
}

/// As [`make_call`], for calls that make threads and processes.
pub(super) fn make_clone() -> u64 {
    address(uhmm_dispatch_clone)
}

/// Makes a call that does not come back.
pub(super) fn leave() -> u64 {
    address(uhmm_dispatch_leave)
}

/// Ends the handler of `SIGSYS`.
pub(super) fn restorer() -> u64 {
    address(uhmm_dispatch_restorer)
}

/// Where a thread's word is, relative to its thread pointer.
pub(super) fn slot_offset() -> u64 {
    let offset: u64;
    // SAFETY: reads a word that the dynamic linker has filled in.
    unsafe {
        asm!("mov {}, qword ptr [rip + uhmm_dispatch_slot@GOTTPOFF]", out(reg) offset,
             options(nostack, readonly, preserves_flags));
    }
    offset
}

/// The number of the calling thread's slot, plus one; 0 for none.
pub(super) fn slot_word() -> u64 {
    let word: u64;
    // SAFETY: the calling thread's own word, in static thread-local storage.
    unsafe {
        asm!("mov {0}, qword ptr [rip + uhmm_dispatch_slot@GOTTPOFF]", "mov {0}, fs:[{0}]", out(reg) word,
             options(nostack, readonly, preserves_flags));
    }
    word
}

/// Sets the calling thread's word.
pub(super) fn set_slot_word(word: u64) {
    let offset = slot_offset();
    // SAFETY: the calling thread's own word, in static thread-local storage, which nothing else refers to.
    unsafe { asm!("mov fs:[{}], {}", in(reg) offset, in(reg) word, options(nostack, preserves_flags)) };
}
