//! The witness sees each lie that a device can tell, and none where there is none.
//!
//! `fixtures/device.c` is a device that really moves pages and can be told to lie in one point; `fixtures/program.c` gives it every
//! command. Both are ours. The kernel's own tests run by `cargo xtask hmm-tests`.

use std::{
    fs,
    os::unix::{fs::MetadataExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

use uhmm_testkit::build::{Dir, shared_library};

const SIGKILL: i32 = 9;

/// The witness.
fn witness() -> &'static Path {
    static WITNESS: OnceLock<PathBuf> = OnceLock::new();
    WITNESS.get_or_init(|| shared_library("uhmm-witness"))
}

/// What is compiled for one test.
trait Fixtures {
    fn program(&self) -> PathBuf;
    fn library(&self, source: &str) -> PathBuf;
    fn log(&self) -> PathBuf;
}

impl Fixtures for Dir {
    fn program(&self) -> PathBuf {
        self.compile(&source("tests/fixtures/program.c"), "program", &["-ldl"])
    }

    fn library(&self, name: &str) -> PathBuf {
        self.compile(&source(name), "device.so", &["-shared", "-fPIC", "-ldl"])
    }

    fn log(&self) -> PathBuf {
        self.join("log")
    }
}

fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

const DEVICE: &str = "tests/fixtures/device.c";

fn watched(program: &Path, device: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("LD_PRELOAD", format!("{}:{}", witness().display(), device.display()));
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Physical pages are shown to root only.
fn sees_frames() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

#[test]
fn an_honest_device_has_nothing_to_fear() {
    let dir = Dir::new("honest");
    let (program, device) = (dir.program(), dir.library(DEVICE));
    for _ in 0..8 {
        let output = watched(&program, &device).env("UHMM_WITNESS_LOG", dir.log()).output().unwrap();
        assert!(output.status.success(), "{}: {}", output.status, said(&output));
        assert_eq!(said(&output), "");
    }
    // The checks were made, in the program and in its children.
    let log = fs::read_to_string(dir.log()).unwrap();
    assert_eq!(log.lines().count(), 8 * 3, "{log}");
    let figure = |name: &str| -> u64 {
        let key = format!("\"{name}\":");
        log.split(&key).skip(1).map(|rest| rest.split([',', '}']).next().unwrap().parse::<u64>().unwrap()).sum()
    };
    for name in ["moved", "coherent", "exclusive", "home", "read", "compared", "unmapped", "protected", "dropped"] {
        assert!(figure(name) > 0, "{name}: {log}");
    }
    assert_eq!(figure("violations"), 0);
}

#[test]
fn each_lie_is_seen() {
    const LIES: &[(&str, &str)] = &[
        ("stays", "still with the CPU after it moved to private memory"),
        ("no-memory", "moved, and no device's memory is mapped"),
        ("wrong-bytes", "moved, and its bytes are in no device's memory"),
        ("wrong-given", "the program was given other bytes than were there"),
        ("unreported", "moved, and not reported as the device's"),
        ("unwritten", "moved, and not reported as the device's"),
        ("coherent-changed", "changed by moving to coherent memory"),
        ("exclusive-stays", "still with the CPU while a device has it for itself"),
        ("exclusive-lost", "taken from the CPU, and neither its page nor its bytes are set aside"),
        ("exclusive-false", "said to be a device's alone, and the CPU has all of it"),
        ("home-changed", "came home with other bytes than it left with"),
        ("home-absent", "not with the CPU after its device let go of it"),
        ("close-forgets", "not with the CPU after its device let go of it"),
        ("lost", "lost: neither the device nor the CPU has it"),
        ("crept-home", "reported in private device memory, and the CPU has it"),
        ("reported-host", "reported in the host's memory, and the CPU does not have it"),
        ("reads-wrong", "a device read other bytes than it gave or took"),
        ("no-translation", "the device has no translation of what it just used"),
        ("reads-unmapped", "read by a device after it was unmapped"),
        ("reads-protected", "read by a device where the program may not"),
        ("writes-protected", "written by a device where the program may not"),
        ("knows-unmapped", "unmapped, and a device knows it"),
        ("keeps-dropped", "dropped, and a device has it"),
    ];
    const LIES_ABOUT_FRAMES: &[(&str, &str)] = &[
        ("coherent-stays", "in the same physical page after it moved"),
        ("coherent-home-stays", "came home and is in the device's physical page"),
    ];
    let dir = Dir::new("lies");
    let (program, device) = (dir.program(), dir.library(DEVICE));
    let about_frames = if sees_frames() { LIES_ABOUT_FRAMES } else { &[] };
    if about_frames.is_empty() {
        println!("skipped: lies about physical pages: only root sees these");
    }
    for (lie, seen) in LIES.iter().chain(about_frames) {
        let output = watched(&program, &device).env("LIE", lie).output().unwrap();
        let said = said(&output);
        assert_eq!(output.status.signal(), Some(SIGKILL), "{lie}: {}: {said}", output.status);
        assert!(said.contains(&format!("witness: VIOLATION: {seen} at 0x")), "{lie}: {said}");
    }
}

#[test]
fn the_controls_do_not_pass() {
    for control in ["null", "in_place"] {
        let dir = Dir::new(control);
        let device = dir.library(&format!("../../xtask/controls/{control}.c"));
        let output = watched(&dir.program(), &device).output().unwrap();
        assert_eq!(output.status.signal(), Some(SIGKILL), "{control}: {}", said(&output));
    }
}

#[test]
fn a_process_can_go_on_and_says_no_more_than_twenty_lines() {
    let dir = Dir::new("goes-on");
    let mut command = watched(&dir.program(), &dir.library(DEVICE));
    let output = command.env("LIE", "stays").env("UHMM_WITNESS_GO_ON", "1").output().unwrap();
    assert!(output.status.signal().is_none(), "{}", output.status);
    let said = said(&output);
    // The child is a process of its own.
    let lines = said.lines().filter(|line| line.starts_with("witness: VIOLATION: ")).count();
    assert!((1..=20 * 3).contains(&lines), "{said}");
}

#[test]
fn a_program_without_devices_is_left_alone() {
    let dir = Dir::new("alone");
    let output = Command::new("sh")
        .args(["-c", "echo a | cat; exit 3"])
        .env("LD_PRELOAD", witness())
        .env("UHMM_WITNESS_LOG", dir.log())
        .output()
        .unwrap();
    assert_eq!(
        (output.status.code(), output.stdout.as_slice(), said(&output).as_str()),
        (Some(3), b"a\n".as_slice(), "")
    );
    assert!(!dir.log().exists(), "nothing was checked");
}
