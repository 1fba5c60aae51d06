//! Finding a program, and telling beforehand whether it can be run with a library preloaded.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, Metadata},
    io::{self, Read},
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use anyhow::{Result, anyhow};
use rustix::{
    fs::{Access, access, getxattr},
    process::{getegid, geteuid},
};

use super::Failure;

/// Exit status where the program is there and cannot be run.
const EXIT_CANNOT_RUN: u8 = 126;
/// Exit status where it is not there.
const EXIT_NOT_FOUND: u8 = 127;
/// Scripts whose interpreters are scripts: as many as the kernel follows.
const SCRIPTS_DEEP: usize = 4;

/// Where a shell without `PATH` looks.
const DEFAULT_PATH: &str = "/bin:/usr/bin";

fn failure(status: u8, error: anyhow::Error) -> Failure {
    Failure { error, status }
}

fn cannot_run(error: anyhow::Error) -> Failure {
    failure(EXIT_CANNOT_RUN, error)
}

/// Where the program is, if it can be run under uhmm.
pub(super) fn find(name: &OsStr) -> Result<PathBuf, Failure> {
    let path = look_up(name)?;
    check(&path, SCRIPTS_DEEP)?;
    Ok(path)
}

/// Why a program that looked right did not start.
pub(super) fn not_started(path: &Path, error: &io::Error) -> Failure {
    let status = if error.kind() == io::ErrorKind::NotFound { EXIT_NOT_FOUND } else { EXIT_CANNOT_RUN };
    failure(status, anyhow!("cannot run {}: {error}", path.display()))
}

fn look_up(name: &OsStr) -> Result<PathBuf, Failure> {
    let not_found =
        |why: &dyn std::fmt::Display| failure(EXIT_NOT_FOUND, anyhow!("{}: {why}", Path::new(name).display()));
    if name.as_bytes().contains(&b'/') {
        let path = PathBuf::from(name);
        return match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => Err(cannot_run(anyhow!("{}: is a directory", path.display()))),
            Ok(_) => Ok(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(not_found(&"no such file")),
            Err(error) => Err(cannot_run(anyhow!("{}: {error}", path.display()))),
        };
    }
    if name.is_empty() {
        return Err(not_found(&"a program has a name"));
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from(DEFAULT_PATH));
    let mut denied = None;
    for dir in std::env::split_paths(&path) {
        // An empty entry means the current directory.
        let candidate = if dir.as_os_str().is_empty() { Path::new(".").join(name) } else { dir.join(name) };
        match fs::metadata(&candidate) {
            Ok(metadata) if metadata.is_file() => match access(&candidate, Access::EXEC_OK) {
                Ok(()) => return Ok(candidate),
                Err(_) => denied = denied.or(Some(candidate)),
            },
            _ => {}
        }
    }
    match denied {
        Some(path) => Err(cannot_run(anyhow!("{}: permission denied", path.display()))),
        None => Err(not_found(&"no such program in PATH")),
    }
}

fn check(path: &Path, scripts: usize) -> Result<(), Failure> {
    if access(path, Access::EXEC_OK).is_err() {
        return Err(cannot_run(anyhow!("{}: permission denied", path.display())));
    }
    let opened = File::open(path).and_then(|file| Ok((file.metadata()?, file)));
    let (metadata, mut file) = match opened {
        Ok(opened) => opened,
        // Executable and not readable: nothing can be told beforehand.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(()),
        Err(error) => return Err(cannot_run(anyhow!("{}: {error}", path.display()))),
    };
    let refuse = |why: &str| Err(cannot_run(anyhow!("{} {why}, so uhmm cannot run it", path.display())));
    if let Some(why) = gains_privilege(path, &metadata) {
        return refuse(&format!("{why}: the dynamic linker preloads nothing into it"));
    }
    let mut head = Vec::new();
    if let Err(error) = file.by_ref().take(HEAD_BYTES).read_to_end(&mut head) {
        return Err(cannot_run(anyhow!("{}: {error}", path.display())));
    }
    if let Some(interpreter) = script_interpreter(&head) {
        return match scripts.checked_sub(1) {
            Some(scripts) => check(&interpreter, scripts).map_err(|failure| Failure {
                error: failure.error.context(format!("{} is a script", path.display())),
                ..failure
            }),
            None => refuse("is a script of a script of a script"),
        };
    }
    if !head.starts_with(b"\x7fELF") {
        // A script without a first line, or a format that somebody registered: the kernel knows.
        return Ok(());
    }
    match elf_refusal(&head, &file) {
        None => Ok(()),
        Some(why) => refuse(&why),
    }
}

/// Bytes read of a program: as many as the kernel reads of a script's first line, and more than an ELF header has.
const HEAD_BYTES: u64 = 4096;

/// The interpreter in the first line of a script.
fn script_interpreter(head: &[u8]) -> Option<PathBuf> {
    let line = head.strip_prefix(b"#!")?.split(|&b| b == b'\n').next()?;
    let word = line.split(|b| matches!(b, b' ' | b'\t')).find(|word| !word.is_empty())?;
    Some(PathBuf::from(OsString::from_vec(word.to_vec())))
}

/// What gives the program other privileges than its caller has.
fn gains_privilege(path: &Path, metadata: &Metadata) -> Option<&'static str> {
    const SETUID: u32 = 0o4000;
    const SETGID_AND_EXECUTABLE: u32 = 0o2010;
    let mode = metadata.mode();
    if mode & SETUID != 0 && metadata.uid() != geteuid().as_raw() {
        return Some("is setuid");
    }
    if mode & SETGID_AND_EXECUTABLE == SETGID_AND_EXECUTABLE && metadata.gid() != getegid().as_raw() {
        return Some("is setgid");
    }
    let mut buf = [0u8; 64];
    let capabilities = !geteuid().is_root() && getxattr(path, "security.capability", &mut buf).is_ok();
    capabilities.then_some("has file capabilities")
}

const ELF_CLASS_64: u8 = 2;
const ELF_LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const PT_INTERP: u32 = 3;
/// Bytes of the fixed header, and of an entry of the program header table.
const HEADER: usize = 64;
const ENTRY: usize = 56;
/// A file with more entries is not one that the kernel runs.
const ENTRIES_MAX: usize = 1024;

/// Why an ELF file cannot be run with a library preloaded, if so.
fn elf_refusal(head: &[u8], file: &File) -> Option<String> {
    let u16_at = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let u32_at = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let u64_at = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    if head.len() < HEADER {
        return Some("is cut off".to_owned());
    }
    if head[4] != ELF_CLASS_64 {
        return Some("is a 32-bit program".to_owned());
    }
    if head[5] != ELF_LITTLE_ENDIAN || u16_at(head, 18) != MACHINE_X86_64 {
        return Some("is for another kind of machine".to_owned());
    }
    let (offset, entry_bytes, entries) =
        (u64_at(head, 32), usize::from(u16_at(head, 54)), usize::from(u16_at(head, 56)));
    if entry_bytes != ENTRY || entries > ENTRIES_MAX {
        return Some("has a program header that is none".to_owned());
    }
    let mut table = vec![0; ENTRY * entries];
    if file.read_exact_at(&mut table, offset).is_err() {
        return Some("is cut off".to_owned());
    }
    let Some(entry) = table.chunks_exact(ENTRY).find(|entry| u32_at(entry, 0) == PT_INTERP) else {
        return Some("is statically linked: it loads no library".to_owned());
    };
    let len = usize::try_from(u64_at(entry, 32)).unwrap_or(usize::MAX).min(libc_path_max());
    let mut linker = vec![0; len];
    if file.read_exact_at(&mut linker, u64_at(entry, 8)).is_err() {
        return Some("is cut off".to_owned());
    }
    let linker = linker.split(|&b| b == 0).next().unwrap_or_default();
    let name = linker.rsplit(|&b| b == b'/').next().unwrap_or_default();
    if name.starts_with(b"ld-linux-x86-64") {
        return None;
    }
    let linker = String::from_utf8_lossy(linker);
    Some(if name.starts_with(b"ld-musl") {
        format!("uses the C library musl ({linker}), and uhmm's library needs glibc")
    } else {
        format!("uses the dynamic linker {linker}, and uhmm's library needs glibc's")
    })
}

/// Longest path that the kernel takes.
const fn libc_path_max() -> usize {
    4096
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interpreter_is_the_first_word() {
        let of = |text: &str| script_interpreter(text.as_bytes());
        assert_eq!(of("#!/bin/sh\necho"), Some(PathBuf::from("/bin/sh")));
        assert_eq!(of("#! /usr/bin/env python3\n"), Some(PathBuf::from("/usr/bin/env")));
        assert_eq!(of("#!\n"), None);
        assert_eq!(of("echo"), None);
    }

    #[test]
    fn this_very_program_can_be_run() {
        let own = std::env::current_exe().unwrap();
        assert!(check(&own, SCRIPTS_DEEP).is_ok());
    }

    #[test]
    fn another_machines_program_is_refused() {
        let own = std::env::current_exe().unwrap();
        let file = File::open(&own).unwrap();
        let mut head = vec![0; HEADER];
        file.read_exact_at(&mut head, 0).unwrap();
        assert_eq!(elf_refusal(&head, &file), None);
        let with = |at: usize, byte: u8| {
            let mut head = head.clone();
            head[at] = byte;
            elf_refusal(&head, &file).unwrap()
        };
        assert!(with(4, 1).contains("32-bit"));
        assert!(with(18, 183).contains("another kind of machine"));
        assert!(with(56, 0).contains("statically linked"));
        assert!(with(39, 0x7f).contains("cut off"));
        assert!(elf_refusal(&head[..20], &file).unwrap().contains("cut off"));
    }
}
