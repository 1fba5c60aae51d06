//! System packages that the tests use: there, or installed, or named.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

use crate::process;

/// Debian packages, each with a program that shows that it is there.
const PACKAGES: &[(&str, &str)] = &[
    ("gcc", "cc"),
    ("python3", "python3"),
    ("redis-server", "redis-server"),
    ("redis-tools", "redis-benchmark"),
    ("sqlite3", "sqlite3"),
    ("util-linux", "setpriv"),
    ("xz-utils", "xz"),
];

/// Packages whose program is not on the search path.
fn missing() -> Vec<&'static str> {
    PACKAGES.iter().filter(|(_, program)| !process::on_path(program)).map(|(package, _)| *package).collect()
}

/// Installs what is missing, where that is allowed, and returns what is missing still. Says what it does.
pub fn ensure() -> Vec<&'static str> {
    let wanted = missing();
    if wanted.is_empty() {
        return wanted;
    }
    if process::is_root() && process::on_path("apt-get") {
        install(&wanted);
    }
    let still = missing();
    if !still.is_empty() {
        println!("missing programs; what needs them is skipped. Install them with:");
        println!("    sudo apt-get install -y --no-install-recommends {}", still.join(" "));
    }
    still
}

/// Installs Debian packages; says so. Whether it worked.
pub fn install(packages: &[&str]) -> bool {
    const INSTALL: &[&str] = &["install", "-y", "--no-install-recommends"];
    println!("installing with apt-get: {}", packages.join(" "));
    let _quiet = NoServices::hold();
    if apt_get(INSTALL, packages) {
        return true;
    }
    // The list of packages may be old or absent.
    apt_get(&["update"], &[]);
    apt_get(INSTALL, packages)
}

fn apt_get(args: &[&str], packages: &[&str]) -> bool {
    Command::new("apt-get")
        .args(args)
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Keeps Debian's maintainer scripts from starting a service (redis) for as long as it lives: the tests start their own
/// and leave none behind.
#[derive(Debug)]
struct NoServices {
    held: bool,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";

impl NoServices {
    fn hold() -> Self {
        // The machine's own policy, if there is one, stays.
        let held = !Path::new(POLICY).exists()
            && fs::write(POLICY, "#!/bin/sh\nexit 101\n").is_ok()
            && fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755)).is_ok();
        Self { held }
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.held {
            let _ = fs::remove_file(POLICY);
        }
    }
}
