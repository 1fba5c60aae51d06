//! One context of execution on the device, and the memory management unit that all its accesses go through.
//!
//! ```text
//!   mark -> look up --- frame, exclusive page ---> access -> clear the mark
//!             |  \---- page in host memory ------> clear the mark -> system call
//!             |                                          | EFAULT
//!             +--- no entry, or not for this access ---> clear the mark -> device fault -> again
//! ```
//!
//! The lane keeps the last translations that it found, for a page or for a block of 2 MiB, and looks none of them up again
//! until the device's table is flushed.
//!
//! Bytes pass through a page of the arena that belongs to the lane: the program's buffers are only touched while the
//! mark is clear, for they may be away (see [`super::marks`]).
//!
//! # What the accesses promise
//! A number that is aligned to its size is loaded and stored as one, but for pages in host memory, which the kernel copies
//! for us: most likely as one. Atomic operations are atomic for all CPU threads and devices. Longer accesses are made
//! page by page.
//!
//! # Not supported
//! A lane's thread must not have its stack migrated, and no signal handler may touch managed memory on it. The device's
//! own workers see to both by themselves.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use thiserror::Error;
use uhmm::{
    DeviceFaultPolicy, FaultError, Port,
    device::DeviceError,
    device_table::{Access, Pte},
};
use uhmm_sys::{
    Errno,
    access::{self, Copied},
    addr::{BLOCK_SHIFT, PAGE_SHIFT, PAGE_SIZE, PageRange, TASK_SIZE, VirtAddr},
    mem::{AtomicOp, HostBytes},
};

use super::{SoftDevice, store::Store};

/// Why an access of a lane failed. Longer accesses may be done in part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AccessError {
    /// The device fault was not served.
    #[error("device access: {0}")]
    Fault(#[from] FaultError),
    /// The address of an atomic operation is not a multiple of the operand's size.
    #[error("{addr}: atomic access not aligned to {align} bytes")]
    Misaligned {
        /// The address.
        addr: VirtAddr,
        /// The operand's size.
        align: u64,
    },
    /// The bytes do not lie in the address space.
    #[error("{addr}+{len:#x}: past the end of the address space")]
    OutOfSpace {
        /// The first byte.
        addr: VirtAddr,
        /// How many bytes.
        len: u64,
    },
    /// Device memory failed. [`DeviceError::Lost`]: the device was killed.
    #[error("{addr}: {error}")]
    Device {
        /// The address.
        addr: VirtAddr,
        /// What failed.
        error: DeviceError,
    },
    /// The page was taken away again each time, until the budget ran out.
    #[error("{addr}: the page was taken away {tries} times before the access was made")]
    Contended {
        /// The page.
        addr: VirtAddr,
        /// How often.
        tries: u32,
    },
    /// The engine kept the device out until the budget ran out.
    #[error("{addr}: the device was kept out")]
    KeptOut {
        /// The address.
        addr: VirtAddr,
    },
    /// The device has no translation for the access, and the lane does not fault.
    #[error("{addr}: no translation, and the lane does not fault")]
    Unmapped {
        /// The page.
        addr: VirtAddr,
    },
    /// The kernel refused the access to host memory.
    #[error("{addr}: {errno}")]
    Kernel {
        /// The address.
        addr: VirtAddr,
        /// What it answered.
        errno: Errno,
    },
}

/// A lane. Its number is free again when it is dropped.
#[derive(Debug)]
pub struct Lane {
    device: &'static SoftDevice,
    port: Port,
    index: usize,
    policy: DeviceFaultPolicy,
    faulting: bool,
    budget: Duration,
    /// A page of the arena, the lane's own.
    bounce: HostBytes,
    /// By the number of the block.
    kept: [Cell<Kept>; KEPT],
    walks: Cell<u64>,
}

/// How many translations a lane keeps: a copy has two ends.
const KEPT: usize = 4;

/// A translation that was looked up in `epoch`, for `range` if there was one.
#[derive(Debug, Clone, Copy)]
struct Kept {
    epoch: u64,
    range: PageRange,
    /// Of the range's first page.
    pte: Pte,
}

impl Kept {
    const NONE: Self = Self { epoch: 0, range: PageRange::page_of(VirtAddr::new(0)), pte: Pte::NONE };
}

/// What an access found, while the mark is set. From the byte asked for to the end of the page.
#[derive(Debug, Clone, Copy)]
enum Near {
    /// Device memory, at an offset.
    Frame(u64),
    /// A page that the device holds exclusively.
    Exclusive(HostBytes),
}

/// The misses of one access.
#[derive(Debug, Default)]
struct Misses {
    first: Option<Instant>,
    tries: u32,
}

impl Lane {
    pub(super) const fn new(device: &'static SoftDevice, port: Port, index: usize, bounce: HostBytes) -> Self {
        let (policy, budget) = (device.config.fault_policy, device.config.access_budget);
        let kept = [const { Cell::new(Kept::NONE) }; KEPT];
        Self { device, port, index, policy, faulting: true, budget, bounce, kept, walks: Cell::new(0) }
    }

    /// The lane's number.
    #[must_use]
    pub const fn index(&self) -> usize {
        self.index
    }

    /// The lane's device.
    #[must_use]
    pub const fn device(&self) -> &'static SoftDevice {
        self.device
    }

    /// Says what the lane's device faults do with pages in host memory; at first what the device was set up with.
    pub const fn set_fault_policy(&mut self, policy: DeviceFaultPolicy) {
        self.policy = policy;
    }

    /// Says whether the lane has misses served, which it does at first. Where not they are [`AccessError::Unmapped`], and the
    /// caller sees to the translations: by [`Port::fault_range`], say.
    pub const fn set_faulting(&mut self, on: bool) {
        self.faulting = on;
    }

    /// How often the lane has looked something up in the device's page table.
    #[must_use]
    pub const fn walks(&self) -> u64 {
        self.walks.get()
    }

    pub(super) fn arm(&self) {
        self.device.marks.arm(self.index);
    }

    pub(super) fn disarm(&self) {
        self.device.marks.disarm(self.index);
    }

    // The memory management unit.

    /// The translation of a page, looked up where the one that is kept does not allow `need`: a fault may have changed it.
    /// To be asked inside, where it stays true.
    fn translate(&self, page: VirtAddr, need: Access) -> Pte {
        let epoch = self.device.marks.epoch();
        let place = &self.kept[usize::try_from((page.get() >> BLOCK_SHIFT) % KEPT as u64).expect("less than KEPT")];
        let kept = place.get();
        if kept.epoch == epoch && kept.range.contains(page) && kept.pte.allows(need) {
            return kept.pte.further(pages_between(kept.range.start(), page));
        }
        self.walks.set(self.walks.get() + 1);
        let pte = self.port.table().lookup(page);
        let range = if pte.order() == 0 { PageRange::page_of(page) } else { PageRange::block_of(page) };
        place.set(Kept { epoch, range, pte: pte.further(pages_between(page, range.start())) });
        pte
    }

    /// Makes one access within a page. `near` runs while the mark is set; `far` while it is clear, for a page in host
    /// memory.
    fn access<T>(
        &self,
        addr: VirtAddr,
        need: Access,
        near: impl Fn(&Store, Near) -> Result<T, DeviceError>,
        far: impl Fn() -> Result<T, Errno>,
    ) -> Result<T, AccessError> {
        let page = addr.page();
        let in_page = addr.get() - page.get();
        let device = self.device;
        let failed = |error| AccessError::Device { addr, error };
        let mut misses = Misses::default();
        loop {
            let inside = device.marks.enter(self.index, self.budget).map_err(|_| AccessError::KeptOut { addr })?;
            let pte = self.translate(page, need);
            if !pte.allows(need) {
                drop(inside);
            } else if let Some(pfn) = pte.pfn() {
                if device.is_killed() {
                    return Err(failed(DeviceError::Lost));
                }
                return near(&device.store, Near::Frame(pfn.offset() + in_page)).map_err(failed);
            } else if pte.is_exclusive() {
                // Stays true while the mark is set: to take the page back the engine has to flush the entry first.
                if let Some(bytes) = self.port.exclusive_bytes(page) {
                    let rest = bytes.slice(in_page, PAGE_SIZE - in_page);
                    return near(&device.store, Near::Exclusive(rest)).map_err(failed);
                }
                drop(inside);
            } else {
                let in_host = inside.into_host(page);
                let done = far();
                drop(in_host);
                match done {
                    Ok(value) => return Ok(value),
                    // The mapping changed, or the page left and faults of system calls are not served.
                    Err(Errno::FAULT) => {}
                    Err(errno) => return Err(AccessError::Kernel { addr, errno }),
                }
            }
            self.miss(addr, need, &mut misses)?;
        }
    }

    /// Has a miss served.
    fn miss(&self, addr: VirtAddr, need: Access, misses: &mut Misses) -> Result<(), AccessError> {
        if !self.faulting {
            return Err(AccessError::Unmapped { addr: addr.page() });
        }
        misses.tries += 1;
        let first = *misses.first.get_or_insert_with(Instant::now);
        if misses.tries > 2 && first.elapsed() > self.budget {
            return Err(AccessError::Contended { addr: addr.page(), tries: misses.tries });
        }
        match self.port.fault(addr, need, self.policy) {
            // The lane's own budget counts.
            Ok(_) | Err(FaultError::TimedOut { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    // Bytes.

    /// Fills `bounce[at..at + len]` from `addr`, within a page.
    fn fetch(&self, addr: VirtAddr, at: u64, len: u64) -> Result<(), AccessError> {
        let bounce = self.bounce.slice(at, len);
        let near = |store: &Store, near| match near {
            Near::Frame(off) => store.read(off, bounce),
            Near::Exclusive(bytes) => {
                HostBytes::copy_between(bytes.slice(0, len), bounce);
                Ok(())
            }
        };
        self.access(addr, Access::Read, near, || whole(access::read_to_host(addr, bounce)))
    }

    /// Puts `bounce[at..at + len]` to `addr`, within a page.
    fn put(&self, addr: VirtAddr, at: u64, len: u64) -> Result<(), AccessError> {
        let bounce = self.bounce.slice(at, len);
        let near = |store: &Store, near| match near {
            Near::Frame(off) => store.write(off, bounce),
            Near::Exclusive(bytes) => {
                HostBytes::copy_between(bounce, bytes.slice(0, len));
                Ok(())
            }
        };
        self.access(addr, Access::Write, near, || whole(access::write_from_host(addr, bounce)))
    }

    /// Reads `buf.len()` bytes at `addr`.
    ///
    /// # Errors
    /// [`AccessError`]; what `buf` holds is then unspecified.
    pub fn read(&mut self, addr: VirtAddr, buf: &mut [u8]) -> Result<(), AccessError> {
        let mut at = check(addr, buf.len() as u64)?;
        let mut rest = buf;
        while !rest.is_empty() {
            let (part, after) = rest.split_at_mut(first_part(at, rest.len()));
            let len = part.len() as u64;
            self.fetch(at, 0, len)?;
            self.bounce.read(0, part);
            (at, rest) = (at.add(len), after);
        }
        Ok(())
    }

    /// Writes `bytes` at `addr`.
    ///
    /// # Errors
    /// [`AccessError`]; some pages may then have been written.
    pub fn write(&mut self, addr: VirtAddr, bytes: &[u8]) -> Result<(), AccessError> {
        let mut at = check(addr, bytes.len() as u64)?;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (part, after) = rest.split_at(first_part(at, rest.len()));
            let len = part.len() as u64;
            self.bounce.write(0, part);
            self.put(at, 0, len)?;
            (at, rest) = (at.add(len), after);
        }
        Ok(())
    }

    /// Copies `len` bytes from `src` to `dst`. They may overlap.
    ///
    /// # Errors
    /// As [`Lane::write`].
    pub fn copy(&mut self, dst: VirtAddr, src: VirtAddr, len: u64) -> Result<(), AccessError> {
        check(dst, len)?;
        check(src, len)?;
        // The end that the other range lies beyond is copied first.
        let backwards = src < dst && dst.get() < src.get() + len;
        let mut done = 0;
        while done < len {
            let left = len - done;
            let (from, part) = if backwards {
                let part = [src, dst].map(|start| (start.get() + left - 1) % PAGE_SIZE + 1);
                let part = part[0].min(part[1]).min(left);
                (left - part, part)
            } else {
                let part = [src, dst].map(|start| PAGE_SIZE - (start.get() + done) % PAGE_SIZE);
                (done, part[0].min(part[1]).min(left))
            };
            self.fetch(src.add(from), 0, part)?;
            self.put(dst.add(from), 0, part)?;
            done += part;
        }
        Ok(())
    }

    /// Stores `byte` to each of `len` bytes at `addr`.
    ///
    /// # Errors
    /// As [`Lane::write`].
    pub fn fill(&mut self, addr: VirtAddr, byte: u8, len: u64) -> Result<(), AccessError> {
        let mut at = check(addr, len)?;
        let mut left = len;
        // `put` leaves the page of bytes as it is.
        self.bounce.write(0, &[byte; PAGE_SIZE_USIZE]);
        while left > 0 {
            let part = (PAGE_SIZE - at.get() % PAGE_SIZE).min(left);
            self.put(at, 0, part)?;
            at = at.add(part);
            left -= part;
        }
        Ok(())
    }

    /// Loads a byte.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn load_u8(&mut self, addr: VirtAddr) -> Result<u8, AccessError> {
        let mut buf = [0];
        self.read(addr, &mut buf)?;
        Ok(buf[0])
    }

    /// Loads a number.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn load_u16(&mut self, addr: VirtAddr) -> Result<u16, AccessError> {
        let mut buf = [0; 2];
        self.read(addr, &mut buf)?;
        Ok(u16::from_ne_bytes(buf))
    }

    /// Stores a byte.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn store_u8(&mut self, addr: VirtAddr, n: u8) -> Result<(), AccessError> {
        self.write(addr, &[n])
    }

    /// Stores a number.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn store_u16(&mut self, addr: VirtAddr, n: u16) -> Result<(), AccessError> {
        self.write(addr, &n.to_ne_bytes())
    }

    /// Loads a number.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn load_f32(&mut self, addr: VirtAddr) -> Result<f32, AccessError> {
        self.load_u32(addr).map(f32::from_bits)
    }

    /// Stores a number.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn store_f32(&mut self, addr: VirtAddr, n: f32) -> Result<(), AccessError> {
        self.store_u32(addr, n.to_bits())
    }

    /// Loads a number.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn load_f64(&mut self, addr: VirtAddr) -> Result<f64, AccessError> {
        self.load_u64(addr).map(f64::from_bits)
    }

    /// Stores a number.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn store_f64(&mut self, addr: VirtAddr, n: f64) -> Result<(), AccessError> {
        self.store_u64(addr, n.to_bits())
    }
}

/// The operations on numbers, for both widths: the one macro knows the names that the other crates use.
macro_rules! numbers {
    ($n:ty, $load:ident, $store:ident, $rmw:ident, $cas:ident, $($fetch:ident $op:ident $doc:literal),*) => {
        impl Lane {
            /// Loads a number.
            ///
            /// # Errors
            /// [`AccessError`].
            pub fn $load(&mut self, addr: VirtAddr) -> Result<$n, AccessError> {
                const SIZE: u64 = size_of::<$n>() as u64;
                check(addr, SIZE)?;
                if !addr.get().is_multiple_of(SIZE) {
                    let mut buf = [0; size_of::<$n>()];
                    self.read(addr, &mut buf)?;
                    return Ok(<$n>::from_ne_bytes(buf));
                }
                let bounce = self.bounce;
                let near = |store: &Store, near| match near {
                    Near::Frame(off) => store.$load(off, bounce),
                    Near::Exclusive(bytes) => Ok(bytes.$load(0)),
                };
                let far = || {
                    whole(access::read_to_host(addr, bounce.slice(0, SIZE)))?;
                    Ok(bounce.$load(0))
                };
                self.access(addr, Access::Read, near, far)
            }

            /// Stores a number.
            ///
            /// # Errors
            /// [`AccessError`].
            pub fn $store(&mut self, addr: VirtAddr, n: $n) -> Result<(), AccessError> {
                const SIZE: u64 = size_of::<$n>() as u64;
                check(addr, SIZE)?;
                if !addr.get().is_multiple_of(SIZE) {
                    return self.write(addr, &n.to_ne_bytes());
                }
                let bounce = self.bounce;
                let near = |store: &Store, near| match near {
                    Near::Frame(off) => store.$store(off, bounce, n),
                    Near::Exclusive(bytes) => {
                        bytes.$store(0, n);
                        Ok(())
                    }
                };
                let far = || {
                    bounce.$store(0, n);
                    whole(access::write_from_host(addr, bounce.slice(0, SIZE)))
                };
                self.access(addr, Access::Write, near, far)
            }

            /// Changes a number by one atomic operation, sequentially consistent; returns what was there.
            ///
            /// # Errors
            /// [`AccessError`]; the number is unchanged.
            pub fn $rmw(&mut self, addr: VirtAddr, op: AtomicOp, n: $n) -> Result<$n, AccessError> {
                check_atomic(addr, size_of::<$n>() as u64)?;
                let bounce = self.bounce;
                let near = |store: &Store, near| match near {
                    Near::Frame(off) => store.$rmw(off, bounce, op, n),
                    Near::Exclusive(bytes) => Ok(bytes.$rmw(0, op, n)),
                };
                self.access(addr, Access::Atomic, near, || Err(Errno::INVAL))
            }

            /// Replaces `expected` by `new` in one atomic operation, sequentially consistent.
            ///
            /// Returns what was there: `Ok` if it was `expected`, `Err` with the number unchanged if not.
            ///
            /// # Errors
            /// [`AccessError`]; the number is unchanged.
            pub fn $cas(&mut self, addr: VirtAddr, expected: $n, new: $n) -> Result<Result<$n, $n>, AccessError> {
                check_atomic(addr, size_of::<$n>() as u64)?;
                let bounce = self.bounce;
                let near = |store: &Store, near| match near {
                    Near::Frame(off) => store.$cas(off, bounce, expected, new),
                    Near::Exclusive(bytes) => Ok(bytes.$cas(0, expected, new)),
                };
                self.access(addr, Access::Atomic, near, || Err(Errno::INVAL))
            }

            $(
                #[doc = $doc]
                ///
                /// One atomic operation; returns what was there.
                ///
                /// # Errors
                /// [`AccessError`]; the number is unchanged.
                pub fn $fetch(&mut self, addr: VirtAddr, n: $n) -> Result<$n, AccessError> {
                    self.$rmw(addr, AtomicOp::$op, n)
                }
            )*
        }
    };
}
numbers!(u32, load_u32, store_u32, rmw_u32, cas_u32,
    fetch_add_u32 Add "Adds, wrapping.", fetch_and_u32 And "Bitwise and.", fetch_or_u32 Or "Bitwise or.",
    fetch_xor_u32 Xor "Bitwise exclusive or.", fetch_min_u32 Min "Keeps the lesser.",
    fetch_max_u32 Max "Keeps the greater.", swap_u32 Swap "Replaces.");
numbers!(u64, load_u64, store_u64, rmw_u64, cas_u64,
    fetch_add_u64 Add "Adds, wrapping.", fetch_and_u64 And "Bitwise and.", fetch_or_u64 Or "Bitwise or.",
    fetch_xor_u64 Xor "Bitwise exclusive or.", fetch_min_u64 Min "Keeps the lesser.",
    fetch_max_u64 Max "Keeps the greater.", swap_u64 Swap "Replaces.");

impl Drop for Lane {
    fn drop(&mut self) {
        self.device.marks.release(self.index);
    }
}

/// From one page to another of the same block.
const fn pages_between(from: VirtAddr, to: VirtAddr) -> i64 {
    (to.get().cast_signed() - from.get().cast_signed()) >> PAGE_SHIFT
}

#[expect(clippy::cast_possible_truncation, reason = "a page is 4096 bytes")]
const PAGE_SIZE_USIZE: usize = PAGE_SIZE as usize;

/// Refuses bytes that do not lie in the address space.
fn check(addr: VirtAddr, len: u64) -> Result<VirtAddr, AccessError> {
    match addr.get().checked_add(len) {
        Some(end) if end <= TASK_SIZE => Ok(addr),
        _ => Err(AccessError::OutOfSpace { addr, len }),
    }
}

fn check_atomic(addr: VirtAddr, align: u64) -> Result<(), AccessError> {
    if !addr.get().is_multiple_of(align) {
        return Err(AccessError::Misaligned { addr, align });
    }
    check(addr, align).map(drop)
}

/// How many of `len` bytes at `addr` lie in its page.
fn first_part(addr: VirtAddr, len: usize) -> usize {
    let in_page = usize::try_from(addr.get() % PAGE_SIZE).expect("below a page");
    (PAGE_SIZE_USIZE - in_page).min(len)
}

/// An access within a page is whole or not made.
fn whole(copied: Copied) -> Result<(), Errno> {
    copied.stop.map_or(Ok(()), Err)
}
