//! Messages: made in a buffer on the stack, written in one call.

use std::fmt;

use crate::raw;

const LEN: usize = 512;

/// Text of limited length; what is longer is cut.
#[derive(Debug)]
pub(crate) struct Text {
    len: usize,
    bytes: [u8; LEN],
}

impl Text {
    /// A line.
    pub(crate) fn line(args: fmt::Arguments<'_>) -> Self {
        let mut text = Self { len: 0, bytes: [0; LEN] };
        // What does not fit is left out; nothing else fails.
        let _ = fmt::Write::write_fmt(&mut text, args);
        text.len = text.len.min(LEN - 1);
        text.bytes[text.len] = b'\n';
        text.len += 1;
        text
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl fmt::Write for Text {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let rest = &mut self.bytes[self.len..];
        let len = s.len().min(rest.len());
        rest[..len].copy_from_slice(&s.as_bytes()[..len]);
        self.len += len;
        if len == s.len() { Ok(()) } else { Err(fmt::Error) }
    }
}

/// Writes a line to standard error.
pub(crate) fn say(args: fmt::Arguments<'_>) {
    raw::write(libc::STDERR_FILENO, Text::line(args).bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_and_are_cut() {
        assert_eq!(Text::line(format_args!("{} {:#x}", "a", 16)).bytes(), b"a 0x10\n");
        let long = "x".repeat(LEN + 1);
        let text = Text::line(format_args!("{long}"));
        assert_eq!(text.bytes().len(), LEN);
        assert!(text.bytes().ends_with(b"x\n"));
    }
}
