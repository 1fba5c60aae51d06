//! The kernel's own test programs: their sources, from Debian's package, and their binaries.
//!
//! The sources are GPL-2.0 and never enter this tree. The few that are needed are unpacked once, below cargo's target
//! directory, in a directory named after the package's version; the binaries lie beside them. What is not complete has a
//! temporary name, so an interrupted run leaves nothing that a later one would take for whole.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::{packages, process, summary::Counts, target_dir};

/// The Debian package, which is also the name of the directory in its archive.
const PACKAGE: &str = "linux-source-6.12";

/// What is unpacked, below the archive's top.
const MEMBERS: &[&str] = &[
    "COPYING",
    "LICENSES/preferred/GPL-2.0",
    "include/vdso",
    "lib/test_hmm_uapi.h",
    "mm/gup_test.h",
    "tools/arch/x86/include",
    "tools/include",
    "tools/testing/selftests/kselftest.h",
    "tools/testing/selftests/kselftest_harness.h",
    "tools/testing/selftests/mm",
    "tools/testing/selftests/pidfd",
];

/// The unpacked sources of one version of the kernel.
#[derive(Debug)]
pub struct KernelSource {
    dir: PathBuf,
    version: String,
}

/// The sources, or why they cannot be had here, in one line.
#[derive(Debug)]
pub enum Lookup {
    /// They are unpacked.
    There(KernelSource),
    /// The reason why they are not.
    Missing(String),
}

/// One test program, as the kernel's own `Makefile` builds it.
#[derive(Debug, Clone, Copy)]
pub struct Program<'a> {
    /// Its name, and that of its source file without `.c`.
    pub name: &'a str,
    /// Further source files, below `tools/testing/selftests/mm`.
    pub with: &'a [&'a str],
    /// Further arguments of the compiler, before the source files.
    pub flags: &'a [&'a str],
    /// Further libraries.
    pub libs: &'a [&'a str],
}

/// Where a program is, or the compiler's first complaint.
#[derive(Debug)]
pub enum Built {
    /// The binary.
    There(PathBuf),
    /// What the compiler said.
    Failed(String),
}

/// The sources. Where they cannot be had here, says so in the runner's lines: there is nothing to do then.
///
/// # Errors
/// What else goes wrong.
pub fn get_or_skip() -> Result<Option<KernelSource>> {
    Ok(match ensure()? {
        Lookup::There(source) => Some(source),
        Lookup::Missing(reason) => {
            println!("skipped: {reason}");
            println!("{}", Counts { skipped: 1, ..Counts::default() });
            None
        }
    })
}

/// Finds the sources, gets them where that is allowed, and says what it does.
///
/// # Errors
/// The package is there and cannot be unpacked.
pub fn ensure() -> Result<Lookup> {
    if !process::on_path("dpkg-query") {
        return Ok(Lookup::Missing(format!("Debian's package {PACKAGE} is needed, and this is another system")));
    }
    let missing: Vec<_> = ["gcc", "xz"].into_iter().filter(|program| !process::on_path(program)).collect();
    if !missing.is_empty() {
        return Ok(Lookup::Missing(format!("{} missing", missing.join(" and "))));
    }
    if installed().is_none() {
        if !process::is_root() || !process::on_path("apt-get") {
            return Ok(Lookup::Missing(format!(
                "needs a package; install it with: sudo apt-get install -y --no-install-recommends {PACKAGE}"
            )));
        }
        packages::install(&[PACKAGE]);
    }
    let Some(version) = installed() else {
        return Ok(Lookup::Missing(format!(
            "apt-get finds no package {PACKAGE}; Debian 12 has it in its security suite"
        )));
    };
    unpack(&target_dir()?.join("kernel-tests"), &version).map(Lookup::There)
}

/// The installed version of the package.
fn installed() -> Option<String> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status} ${Version}", PACKAGE])
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let version = text.strip_prefix("installed ")?.trim();
    archive().is_file().then(|| version.to_owned())
}

fn archive() -> PathBuf {
    Path::new("/usr/src").join(format!("{PACKAGE}.tar.xz"))
}

/// Unpacks the sources of `version` below `place`, if they are not there, and removes those of other versions.
fn unpack(place: &Path, version: &str) -> Result<KernelSource> {
    let source = KernelSource { dir: place.join(format!("{PACKAGE}_{version}")), version: version.to_owned() };
    // The list of members says whether it is a tree of this program or of an older one.
    let members = MEMBERS.join("\n");
    if fs::read_to_string(source.dir.join("members")).is_ok_and(|text| text == members) {
        return Ok(source);
    }
    println!("unpacking a few files of {}", archive().display());
    fs::create_dir_all(place).with_context(|| place.display().to_string())?;
    for entry in fs::read_dir(place)? {
        let entry = entry?;
        if is_stale(&entry.file_name()) {
            fs::remove_dir_all(entry.path()).with_context(|| entry.path().display().to_string())?;
        }
    }
    let temporary = place.join(format!("{UNPACKING}{}", std::process::id()));
    let tree = temporary.join("tree");
    fs::create_dir_all(&tree).with_context(|| tree.display().to_string())?;
    fs::create_dir(temporary.join("bin"))?;
    let output = Command::new("tar")
        .arg("-xJf")
        .arg(archive())
        .arg("-C")
        .arg(&tree)
        .arg("--strip-components=1")
        .args(MEMBERS.iter().map(|member| format!("{PACKAGE}/{member}")))
        .output()
        .context("tar")?;
    ensure!(output.status.success(), "tar: {}", first_line(&output));
    // The kernel's own build looks for libraries and writes what it has found here. `Program::flags` say it instead.
    fs::write(tree.join("tools/testing/selftests/mm/local_config.h"), "")?;
    fs::write(temporary.join("members"), &members)?;
    fs::rename(&temporary, &source.dir).with_context(|| source.dir.display().to_string())?;
    Ok(source)
}

/// Begin of the name of a directory that is being filled; its maker's process id follows.
const UNPACKING: &str = "unpacking-";

/// Whether nobody is filling this directory: another version, an older list, or left by a run that was interrupted.
fn is_stale(name: &OsStr) -> bool {
    let maker = name.to_str().and_then(|name| name.strip_prefix(UNPACKING));
    maker.is_none_or(|pid| pid.parse() == Ok(std::process::id()) || !Path::new("/proc").join(pid).exists())
}

impl KernelSource {
    /// Version of the package.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Directory of the memory management tests' sources.
    pub fn tests(&self) -> PathBuf {
        self.dir.join("tree/tools/testing/selftests/mm")
    }

    /// Builds a program, unless the same command of the same compiler has built it before.
    ///
    /// # Errors
    /// The compiler cannot be run, or the binary not be kept. That the compiler refuses the program is no error.
    pub fn build(&self, program: &Program<'_>) -> Result<Built> {
        let (tree, tests) = (self.dir.join("tree"), self.tests());
        let binary = self.dir.join("bin").join(program.name);
        let temporary = self.dir.join("bin").join(format!("{}.{}", program.name, std::process::id()));
        let mut gcc = Command::new("gcc");
        gcc.current_dir(&tests)
            .args(["-Wall", "-O2", "-I"])
            .arg(&tree)
            .arg("-isystem")
            .arg(tree.join("tools/include/uapi"))
            .args(["-U_FORTIFY_SOURCE", "-D_GNU_SOURCE="])
            .args(program.flags)
            .arg(format!("{}.c", program.name))
            .args(program.with)
            .args(["-lrt", "-lpthread", "-lm"])
            .args(program.libs);
        let compiler = Command::new("gcc").arg("--version").output().context("gcc")?;
        let key = format!("{}\n{gcc:?}\n", first_line(&compiler));
        let key_file = self.dir.join("bin").join(format!("{}.built", program.name));
        if binary.is_file() && fs::read_to_string(&key_file).is_ok_and(|text| text == key) {
            return Ok(Built::There(binary));
        }
        let output = gcc.arg("-o").arg(&temporary).output().context("gcc")?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            let complaint = text.lines().find(|line| line.contains("error") || line.contains("cannot find"));
            return Ok(Built::Failed(complaint.unwrap_or("gcc failed").to_owned()));
        }
        fs::rename(&temporary, &binary).with_context(|| binary.display().to_string())?;
        fs::write(&key_file, &key).with_context(|| key_file.display().to_string())?;
        Ok(Built::There(binary))
    }
}

fn first_line(output: &Output) -> String {
    let text = if output.stdout.is_empty() { &output.stderr } else { &output.stdout };
    String::from_utf8_lossy(text).lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_somebody_fills_is_not_stale() {
        let stale = |name: &str| is_stale(OsStr::new(name));
        assert!(stale("linux-source-6.12_6.12.1-1"));
        assert!(stale(&format!("{UNPACKING}{}", std::process::id())));
        assert!(!stale(&format!("{UNPACKING}1")));
        assert!(stale(&format!("{UNPACKING}4194305")));
    }
}
