//! What uhmm asks of the Linux kernel, and nothing more.
//!
//! One module, one thing of the kernel's. Everything answers typed errors where the kernel is too old or a permission is
//! missing; [`uffd`] holds the argument why functions that change memory by address are safe to call.
//!
//! ```text
//! addr              addresses and ranges as types
//! arena, heap, lock the engine's own memory
//! mem               untyped memory: staging bytes, device memory, shared control data
//! uffd              userfaultfd
//! pagemap, maps     what the page tables and the map of the process say
//! access            the program's memory, as a system call reaches it
//! area              ordinary memory to measure with
//! thread, tls       threads whose stacks cannot be away
//! fence, futex      ordering and waiting
//! probe             what this kernel lets this process do; the mask for tests
//! limits, exclude   what the engine must live within, and what it must leave alone
//! dispatch          the program's system calls, caught where the kernel's faults are not served
//! raw               system calls
//! ```
// UNSAFETY: this crate is the trust boundary: system calls, raw memory and foreign threads are reached from here only.

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
pub mod access;
pub mod addr;
pub mod area;
pub mod arena;
pub mod clock;
pub mod dispatch;
pub mod exclude;
pub mod fence;
pub mod files;
pub mod fork;
pub mod futex;
mod heap;
pub mod limits;
mod lock;
pub mod maps;
pub mod mem;
pub mod pagemap;
pub mod probe;
mod raw;
pub mod say;
pub mod signal;
pub mod space;
pub mod thread;
mod tls;
pub mod token;
pub mod uffd;

pub use rustix::io::Errno;
