//! What a test builds for itself.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
};

/// The shared library of a package of this workspace, built where it is not, in the profile that the test is built in.
///
/// # Panics
/// If it cannot be built and is not there.
#[must_use]
pub fn shared_library(package: &str) -> PathBuf {
    // One build at a time: `cargo` would wait for the other one, and say so.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let exe = std::env::current_exe().expect("a test knows its executable");
    let dir = exe.parent().and_then(Path::parent).expect("tests are in target/PROFILE/deps");
    let library = dir.join(format!("lib{}.so", package.replace('-', "_")));
    let mut build = Command::new(option_env!("CARGO").unwrap_or("cargo"));
    build.args(["build", "--quiet", "--offline", "-p", package, "--target-dir"]).args(dir.parent());
    if dir.ends_with("release") {
        build.arg("--release");
    }
    // Another user, who runs what was built before, has neither cargo nor the right to write there.
    let built = build.current_dir(env!("CARGO_MANIFEST_DIR")).status().is_ok_and(|status| status.success());
    assert!(built || library.exists(), "{} cannot be built", library.display());
    library
}

/// A directory of a test's own, removed at the end. Everybody may enter it.
#[derive(Debug)]
pub struct Dir(PathBuf);

impl Dir {
    /// Makes an empty one.
    ///
    /// # Panics
    /// If there is no room for temporary files.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("uhmm-test-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).expect("a directory can be made");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is ours");
        Self(path)
    }

    /// Its own path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The path of something in it.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Compiles a C program, or with `options` something else, to `name`. Warnings are errors.
    ///
    /// # Panics
    /// If it cannot be compiled.
    #[must_use]
    pub fn compile(&self, source: &Path, name: &str, options: &[&str]) -> PathBuf {
        let to = self.join(name);
        let mut gcc = Command::new("gcc");
        gcc.args(["-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"]).arg(&to).arg(source).args(options);
        let output = gcc.output().expect("gcc is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        to
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
