//! The process's mappings, as `/proc/self/maps` has them.

use std::ops::ControlFlow;

use crate::raw::{self, File};

/// Mappings that can be held at once.
const MAPPINGS_MAX: usize = 16 * 1024;
const BUFFER_LEN: usize = 64 * 1024;

/// What the name of a device's memory contains.
const DEVICE_NAME: &[u8] = b"hmm_dmirror";

/// A mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) is_readable: bool,
    /// Private, and of no file: what is not there yet is zeros.
    pub(crate) is_anonymous: bool,
    /// A device's memory.
    pub(crate) is_device: bool,
}

impl Mapping {
    const NONE: Self = Self { start: 0, end: 0, is_readable: false, is_anonymous: false, is_device: false };
}

/// All mappings, at one moment.
#[derive(Debug)]
pub(crate) struct Maps {
    len: usize,
    is_whole: bool,
    mappings: [Mapping; MAPPINGS_MAX],
    buffer: [u8; BUFFER_LEN],
}

impl Maps {
    pub(crate) const fn new() -> Self {
        Self { len: 0, is_whole: false, mappings: [Mapping::NONE; MAPPINGS_MAX], buffer: [0; BUFFER_LEN] }
    }

    /// Looks. Says no where not everything could be seen.
    #[must_use]
    pub(crate) fn read(&mut self) -> bool {
        let Self { len, is_whole, mappings, buffer } = self;
        (*len, *is_whole) = (0, false);
        let Some(file) = File::open(c"/proc/self/maps", libc::O_RDONLY) else { return false };
        let mut is_understood = true;
        raw::lines(&file, buffer, |line| match (parse(line), mappings.get_mut(*len)) {
            (Some(mapping), Some(place)) => {
                *place = mapping;
                *len += 1;
                ControlFlow::Continue(())
            }
            _ => {
                is_understood = false;
                ControlFlow::Break(())
            }
        });
        *is_whole = is_understood && *len != 0;
        *is_whole
    }

    pub(crate) fn all(&self) -> &[Mapping] {
        &self.mappings[..self.len]
    }

    /// The mapping that an address lies in.
    pub(crate) fn find(&self, at: u64) -> Option<&Mapping> {
        let next = self.all().partition_point(|mapping| mapping.end <= at);
        self.all().get(next).filter(|mapping| mapping.start <= at)
    }
}

/// Understands a line: `7f00-7f10 rw-p 00000000 00:00 0   name`.
fn parse(line: &[u8]) -> Option<Mapping> {
    let mut fields = line.split(|&byte| byte == b' ').filter(|field| !field.is_empty());
    let range = fields.next()?;
    let dash = range.iter().position(|&byte| byte == b'-')?;
    let (start, end) = (hex(&range[..dash])?, hex(&range[dash + 1..])?);
    let &[read, _, _, sharing] = fields.next()? else { return None };
    let (_offset, _device) = (fields.next()?, fields.next()?);
    let is_file = fields.next()? != b"0";
    let name = fields.next().unwrap_or_default();
    let is_kernels = name.starts_with(b"[v");
    Some(Mapping {
        start,
        end,
        is_readable: read == b'r',
        is_anonymous: sharing == b'p' && !is_file && !is_kernels,
        is_device: sharing == b's' && name.windows(DEVICE_NAME.len()).any(|part| part == DEVICE_NAME),
    })
}

fn hex(digits: &[u8]) -> Option<u64> {
    u64::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood() {
        let mapping = |line: &str| parse(line.as_bytes()).unwrap();
        let plain = mapping("7f0000001000-7f0000003000 rw-p 00000000 00:00 0 ");
        assert_eq!((plain.start, plain.end), (0x7f00_0000_1000, 0x7f00_0000_3000));
        assert!(plain.is_anonymous && plain.is_readable && !plain.is_device);
        assert!(mapping("1000-2000 rw-p 00000000 00:00 0    [heap]").is_anonymous);
        assert!(!mapping("1000-2000 r-xp 00000000 00:00 0   [vdso]").is_anonymous);
        assert!(!mapping("1000-2000 rw-p 00000000 fe:00 77  /tmp/#77 (deleted)").is_anonymous);
        assert!(!mapping("1000-2000 rw-s 00000000 00:01 77  /dev/zero (deleted)").is_anonymous);
        assert!(!mapping("1000-2000 ---p 00000000 00:00 0 ").is_readable);
        assert!(mapping("1000-2000 rw-s 00000000 00:01 9  /memfd:hmm_dmirror0 (deleted)").is_device);
        assert!(!mapping("1000-2000 rw-p 00000000 00:01 9  /memfd:hmm_dmirror0 (deleted)").is_device);
        assert_eq!(parse(b"nonsense"), None);
    }

    #[test]
    fn a_variable_lies_in_a_mapping_that_can_be_read() {
        let maps = Box::leak(Box::new(const { Maps::new() }));
        assert!(maps.read());
        let variable = 1_u8;
        let mapping = maps.find((&raw const variable).expose_provenance() as u64).unwrap();
        assert!(mapping.is_readable);
        assert_eq!(maps.find(0), None);
        assert!(maps.all().windows(2).all(|pair| pair[0].end <= pair[1].start));
    }
}
