//! Thread-local storage for threads that the C library does not know of.
//!
//! A raw thread ([`crate::thread`]) gets a block of its own, laid out as the dynamic linker lays out a new thread's: the
//! initial image of each module that was loaded when the first block was made, a thread control block of which only
//! what compiled code and plain libc wrappers read is filled in, and a vector for modules whose code asks for its
//! storage by number. The block is in the arena, and so is the vector: nothing of it is the program's heap.
//!
//! ```text
//! block                                     tp
//!  | ... module 2 | libc | executable | pad | tcb, pid, rseq ... | vector |
//! ```
//!
//! # What such a thread may not do
//! Call `malloc`, stdio, `dlopen`, `pthread_*`, `setuid` or anything else that wants a real `struct pthread`; touch
//! thread-local storage of a library that was opened later (that faults, by a page without access).
//!
//! # Kernel
//! Layout by the x86-64 ABI (variant II) and glibc's `dtv_t`. The vector is checked against the calling thread's own when
//! the recipe is made; where it does not look as expected, raw threads get a vector that faults.
// UNSAFETY: reads the calling thread's control block and writes that of another.

use std::{
    arch::asm,
    ffi::{c_int, c_void},
    ptr::null_mut,
    sync::atomic::{
        AtomicPtr,
        Ordering::{AcqRel, Acquire},
    },
};

use crate::{
    Errno,
    addr::{PAGE_SIZE, PageRange, VirtAddr},
    arena, raw, thread,
};

/// Bytes at and above the thread pointer: glibc's `struct pthread` is some 2.5 KiB.
pub(crate) const ABOVE: u64 = PAGE_SIZE;
/// Bytes of the vector.
pub(crate) const VECTOR: u64 = 2 * PAGE_SIZE;
/// Entries of the vector, less the one before it and the generation.
const VECTOR_CAPACITY: u64 = VECTOR / 16 - 2;
/// Modules with static storage that a recipe can hold; a process has a handful.
const MODULES: usize = 64;
/// The farthest below the thread pointer that a module is taken to be static storage.
const FARTHEST: u64 = 1 << 20;

/// Words of the control block, as the ABI and glibc place them.
const TCB_SELF: u64 = 0x00;
const TCB_VECTOR: u64 = 0x08;
const TCB_HEADER_SELF: u64 = 0x10;
const TCB_MULTIPLE_THREADS: u64 = 0x18;
/// From the system call entry over the stack and pointer guards to the feature word.
const TCB_COPIED: std::ops::Range<u64> = 0x20..0x50;
/// glibc's thread id, if the calling thread has its own there.
const PTHREAD_TID: u64 = 0x2d0;

/// A module with storage at a fixed distance from the thread pointer.
#[derive(Debug, Clone, Copy)]
struct Module {
    id: u64,
    /// How far below the thread pointer it starts.
    below: u64,
    image: VirtAddr,
    image_len: u64,
}

/// How to make a block.
#[derive(Debug)]
pub(crate) struct Recipe {
    modules: [Module; MODULES],
    count: usize,
    /// Bytes below the thread pointer, whole pages.
    below: u64,
    /// Where glibc keeps the thread's rseq area, relative to the thread pointer.
    rseq: Option<i64>,
    /// How far above the thread pointer glibc keeps the head of the robust list.
    robust: Option<u64>,
    /// Bytes of glibc's `struct pthread`, at the thread pointer.
    control: u64,
    /// Whether glibc's thread id is where it is expected.
    tid_known: bool,
    /// Whether the vector looks as expected.
    vector_known: bool,
}

static RECIPE: AtomicPtr<Recipe> = AtomicPtr::new(null_mut());

/// The calling thread's thread pointer.
pub(crate) fn thread_pointer() -> VirtAddr {
    let tp: u64;
    // SAFETY: the ABI keeps the thread pointer's own value in its first word.
    unsafe { asm!("mov {}, fs:0", out(reg) tp, options(nostack, readonly, preserves_flags)) };
    VirtAddr::new(tp)
}

/// The recipe, made at the first call. Later calls take no lock, so that they work in a forked child.
pub(crate) fn recipe() -> Result<&'static Recipe, Errno> {
    let known = RECIPE.load(Acquire);
    if !known.is_null() {
        // SAFETY: only `arena::value` pointers are stored, which live for ever and are never changed.
        return Ok(unsafe { &*known });
    }
    let made: &'static Recipe = arena::value(collect())?;
    // Whoever comes second has made the same recipe, and drops it.
    let _ = RECIPE.compare_exchange(null_mut(), std::ptr::from_ref(made).cast_mut(), AcqRel, Acquire);
    Ok(made)
}

/// # Safety
/// A word can be read at `addr`.
unsafe fn peek(addr: u64) -> u64 {
    // SAFETY: the caller's obligation; volatile, for the word belongs to the C library.
    unsafe { raw::ptr(VirtAddr::new(addr)).cast::<u64>().read_volatile() }
}

/// # Safety
/// A word can be written at `addr`, and nobody borrows it.
unsafe fn poke(addr: u64, value: u64) {
    // SAFETY: the caller's obligation.
    unsafe { raw::ptr(VirtAddr::new(addr)).cast::<u64>().write_volatile(value) };
}

fn collect() -> Recipe {
    let empty = Module { id: 0, below: 0, image: VirtAddr::new(0), image_len: 0 };
    let mut recipe = Recipe {
        modules: [empty; MODULES],
        count: 0,
        below: 0,
        rseq: None,
        robust: None,
        control: ABOVE,
        tid_known: false,
        vector_known: true,
    };
    // SAFETY: `add_module` is called with this recipe, which nobody else uses, before the call returns.
    unsafe { libc::dl_iterate_phdr(Some(add_module), (&raw mut recipe).cast::<c_void>()) };

    let tp = thread_pointer().get();
    // SAFETY: the offset lies inside the calling thread's `struct pthread`, or in other libraries in the same page of
    // static storage, which is only read.
    recipe.tid_known = unsafe { peek(tp + PTHREAD_TID) } & 0xffff_ffff == u64::from(thread::gettid());
    // SAFETY: the name is NUL-terminated; the call only looks it up.
    let rseq = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()) };
    if !rseq.is_null() {
        // SAFETY: glibc 2.35 and later define it as a constant `ptrdiff_t`.
        recipe.rseq = Some(unsafe { rseq.cast::<i64>().read() });
    }
    recipe.robust = robust_head(0).and_then(|head| head.get().checked_sub(tp)).filter(|&above| above < ABOVE);
    // SAFETY: as above.
    let size = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"_thread_db_sizeof_pthread".as_ptr()) };
    if !size.is_null() {
        // SAFETY: glibc defines it as a constant `uint32_t`, for debuggers.
        recipe.control = u64::from(unsafe { size.cast::<u32>().read() }).clamp(PTHREAD_TID, ABOVE);
    }
    let deepest_module = recipe.modules[..recipe.count].iter().map(|m| m.below).max().unwrap_or(0);
    let deepest = deepest_module.max(recipe.rseq.map_or(0, |off| off.min(0).unsigned_abs()));
    // A page more: modules without an image of their own, and the alignment of the lowest one.
    recipe.below = deepest.next_multiple_of(PAGE_SIZE) + PAGE_SIZE;
    recipe
}

/// The head of the robust list of a thread, 0 for the calling one: the C library places it in the control block.
///
/// # Kernel
/// `get_robust_list(2)`.
pub(crate) fn robust_head(tid: u64) -> Option<VirtAddr> {
    let (mut head, mut len) = (0u64, 0u64);
    let args = [tid, raw::ptr_arg(&raw mut head), raw::ptr_arg(&raw mut len)];
    // SAFETY: the kernel writes two words, both locals. A thread that has ended meanwhile answers an error.
    unsafe { raw::syscall(libc::SYS_get_robust_list, args) }.ok()?;
    (head != 0).then(|| VirtAddr::new(head))
}

/// Adds a module's static storage to the recipe.
unsafe extern "C" fn add_module(info: *mut libc::dl_phdr_info, _size: usize, recipe: *mut c_void) -> c_int {
    // SAFETY: `collect` passes its recipe, which nobody else uses meanwhile.
    let recipe = unsafe { &mut *recipe.cast::<Recipe>() };
    // SAFETY: the dynamic linker passes a valid record that lives during the call.
    let info = unsafe { &*info };
    let (tp, data) = (thread_pointer().get(), VirtAddr::of(info.dlpi_tls_data).get());
    let is_static = data != 0 && data < tp && tp - data <= FARTHEST;
    if info.dlpi_tls_modid == 0 || !is_static || recipe.count == MODULES {
        return 0;
    }
    // SAFETY: the record's program headers are mapped for as long as the module is.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
    let Some(header) = headers.iter().find(|h| h.p_type == libc::PT_TLS) else { return 0 };
    let id = info.dlpi_tls_modid as u64;
    recipe.modules[recipe.count] = Module {
        id,
        below: tp - data,
        image: VirtAddr::new(info.dlpi_addr.wrapping_add(header.p_vaddr)),
        image_len: header.p_filesz,
    };
    recipe.count += 1;

    // SAFETY: by the ABI the thread pointer's second word is the vector.
    let vector = unsafe { peek(tp + TCB_VECTOR) };
    // SAFETY: the vector is preceded by an entry that tells its capacity.
    let capacity = unsafe { peek(vector - 16) };
    let in_bounds = id <= capacity && capacity < 1 << 20 && id <= VECTOR_CAPACITY;
    // SAFETY: only read where the entry lies within the capacity.
    recipe.vector_known &= in_bounds && unsafe { peek(vector + id * 16) } == data;
    0
}

impl Recipe {
    /// What the kernel uses of the control block whose robust list has this head, if it is known where such a block has it.
    pub(crate) fn control_pages(&self, head: VirtAddr) -> Option<PageRange> {
        /// The kernel's area, with room for what it may grow.
        const RSEQ: i64 = 64;
        let tp = head.get().checked_sub(self.robust?)?;
        let rseq = self.rseq.unwrap_or(0);
        let start = tp.checked_add_signed(rseq.min(0))?;
        let end = (tp + self.control).max(tp.checked_add_signed(rseq + RSEQ)?);
        PageRange::covering(VirtAddr::new(start), end - start).ok()
    }

    /// Bytes below the thread pointer, whole pages.
    pub(crate) const fn below(&self) -> u64 {
        self.below
    }

    /// Lays out a block at the thread pointer `tp`, whose vector is at `vector`. A module's storage that is not there
    /// leads to `no_access`.
    ///
    /// # Safety
    /// `tp - below()..tp + ABOVE` and `vector..vector + VECTOR` are writable and nobody uses them.
    pub(crate) unsafe fn lay_out(&self, tp: VirtAddr, vector: VirtAddr, no_access: VirtAddr) {
        let (tp, vector) = (tp.get(), vector.get());
        let block = raw::ptr(VirtAddr::new(tp - self.below));
        // SAFETY: the caller gives the block away.
        unsafe { block.write_bytes(0, raw::index(self.below + ABOVE)) };
        for module in &self.modules[..self.count] {
            let to = raw::ptr(VirtAddr::new(tp - module.below));
            // SAFETY:
            // 1. The image is part of a module that was loaded at start or is linked against, and stays.
            // 2. It fits, for `below` covers the deepest module and an image is no longer than its storage.
            unsafe { to.copy_from_nonoverlapping(raw::ptr(module.image), raw::index(module.image_len)) };
        }

        let own = thread_pointer().get();
        let mut copy = TCB_COPIED;
        while copy.start < copy.end {
            // SAFETY: inside the calling thread's control block.
            let word = unsafe { peek(own + copy.start) };
            // SAFETY: inside the new one.
            unsafe { poke(tp + copy.start, word) };
            copy.start += 8;
        }
        // SAFETY: inside the new control block.
        unsafe { poke(tp + TCB_SELF, tp) };
        // SAFETY: inside the new control block.
        unsafe { poke(tp + TCB_HEADER_SELF, tp) };
        // SAFETY: inside the new control block.
        unsafe { poke(tp + TCB_MULTIPLE_THREADS, 1) };
        if let Some(at) = self.rseq.and_then(|off| tp.checked_add_signed(off)) {
            // CPU numbers: start 0, current "not registered", so that `sched_getcpu` asks the kernel.
            // SAFETY: glibc's rseq area is inside the block, by `below` or by `ABOVE`.
            unsafe { poke(at, u64::from(u32::MAX) << 32) };
        }
        if !self.vector_known {
            // SAFETY: inside the new control block.
            unsafe { poke(tp + TCB_VECTOR, no_access.get()) };
            return;
        }

        // Entry -1 tells the capacity, entry 0 the generation, entry n a module's storage and what to free for it.
        let entry_0 = vector + 16;
        // SAFETY: as where the recipe was made: the second word of the calling thread's control block.
        let own_vector = unsafe { peek(own + TCB_VECTOR) };
        // SAFETY: entry 0 of the calling thread's vector.
        let generation = unsafe { peek(own_vector) };
        // SAFETY: the first entry of the vector given away.
        unsafe { poke(vector, VECTOR_CAPACITY) };
        // SAFETY: its second entry.
        unsafe { poke(entry_0, generation) };
        for id in 1..=VECTOR_CAPACITY {
            let storage = self.modules[..self.count].iter().find(|m| m.id == id).map(|m| tp - m.below);
            // SAFETY: entry `id` is within the capacity.
            unsafe { poke(entry_0 + id * 16, storage.unwrap_or(no_access.get())) };
            // SAFETY: the same entry's second word: nothing to free.
            unsafe { poke(entry_0 + id * 16 + 8, 0) };
        }
        // SAFETY: inside the new control block.
        unsafe { poke(tp + TCB_VECTOR, entry_0) };
    }

    /// Tells glibc's locks which thread this is: a recursive lock compares the id.
    ///
    /// To be called by the new thread, on its own block.
    pub(crate) fn set_own_tid(&self, tid: u32) {
        if self.tid_known {
            let tp = thread_pointer().get();
            // SAFETY: inside the calling thread's own control block, where the recipe found a thread id; the word's
            // other half is unused on a raw thread.
            unsafe { poke(tp + PTHREAD_TID, u64::from(tid)) };
        }
    }
}

/// The calling thread's vector: its first byte and length. `None` where it does not look like one.
pub(crate) fn own_vector() -> Option<(VirtAddr, u64)> {
    let known = recipe().is_ok_and(|r| r.vector_known);
    if !known {
        return None;
    }
    // SAFETY: by the ABI the thread pointer's second word is the vector.
    let vector = unsafe { peek(thread_pointer().get() + TCB_VECTOR) };
    // SAFETY: the recipe checked that glibc's layout holds: the entry before tells the capacity.
    let capacity = unsafe { peek(vector - 16) };
    Some((VirtAddr::new(vector - 16), (capacity + 2) * 16))
}
