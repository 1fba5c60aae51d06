//! `uhmm run` on small programs that check themselves: whatever it does, they cannot tell.
//!
//! The programs are in `programs/`, and compiled here. Where memory is to move they run strictly: a program that could
//! not be put under management fails.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{
        fs::PermissionsExt,
        process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use serde_json::Value;
use uhmm_testkit::build::{Dir, shared_library};

const UHMM: &str = env!("CARGO_BIN_EXE_uhmm");
/// No program takes as long, on whatever machine.
const LIMIT: Duration = Duration::from_secs(180);

const SIGINT: i32 = 2;
const SIGSEGV: i32 = 11;
const SIGTERM: i32 = 15;

// The means.

/// The preload library.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| shared_library("uhmm-preload"))
}

/// What is put into a test's directory.
trait Programs {
    /// Compiles one of the programs.
    fn program(&self, name: &str) -> PathBuf;
    fn program_as(&self, source: &str, name: &str, options: &[&str]) -> PathBuf;
    fn script(&self, name: &str, text: &str) -> PathBuf;
}

impl Programs for Dir {
    fn program(&self, name: &str) -> PathBuf {
        self.program_as(name, name, &[])
    }

    fn program_as(&self, source: &str, name: &str, options: &[&str]) -> PathBuf {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs").join(format!("{source}.c"));
        self.compile(&source, name, options)
    }

    fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }
}

/// `uhmm run` with these options, as the user that runs the tests.
fn uhmm(options: &[&str]) -> Command {
    library();
    let mut command = Command::new(UHMM);
    command
        .arg("run")
        .args(options)
        .arg("--")
        .env_remove("LD_PRELOAD")
        .env_remove("UHMM_PRELOAD")
        .env("UHMM_STRICT", "1");
    command
}

/// How something ended.
struct Done {
    status: ExitStatus,
    out: Vec<u8>,
    err: String,
}

impl Done {
    fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("{}: {}", self.status, self.err))
    }

    fn text(&self) -> &str {
        str::from_utf8(&self.out).unwrap()
    }

    /// The figures that `--stats=json` printed.
    fn figures(&self) -> Value {
        let line =
            self.err.lines().rfind(|line| line.starts_with('{')).unwrap_or_else(|| panic!("no JSON: {}", self.err));
        serde_json::from_str(line).unwrap()
    }
}

/// Runs to the end, with `input`. What does not end is killed, and has failed.
fn run_with(command: &mut Command, input: &[u8]) -> Done {
    let mut child = start(command);
    let mut stdin = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        // It need not read all.
        scope.spawn(move || drop(stdin.write_all(input)));
        finish(child)
    })
}

fn run(command: &mut Command) -> Done {
    run_with(command, b"")
}

/// Starts it in a process group of its own, with pipes.
fn start(command: &mut Command) -> Child {
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn finish(mut child: Child) -> Done {
    fn read(mut stream: impl Read) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        bytes
    }
    let (out, err) = (child.stdout.take(), child.stderr.take().unwrap());
    std::thread::scope(|scope| {
        let out = scope.spawn(move || out.map(read).unwrap_or_default());
        let err = scope.spawn(move || read(err));
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if begin.elapsed() > LIMIT {
                signal(SIGKILL_GROUP, &format!("-{}", child.id()));
                child.wait().unwrap();
                panic!("no end within {LIMIT:?}: {}", String::from_utf8_lossy(&err.join().unwrap()));
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let (out, err) = (out.join().unwrap(), String::from_utf8_lossy(&err.join().unwrap()).into_owned());
        Done { status, out, err }
    })
}

const SIGKILL_GROUP: i32 = 9;

/// Sends a signal to a process, or to the group of `-ID`.
fn signal(signal: i32, to: &str) {
    let status = Command::new("kill").args([&format!("-{signal}"), "--", to]).status().unwrap();
    assert!(status.success(), "kill -{signal} {to}");
}

fn is_root() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    status.lines().any(|line| line.starts_with("Uid:") && line.split_whitespace().nth(2) == Some("0"))
}

/// Whether memory can be moved here. Says why not, once a test.
fn moves() -> bool {
    has_one_of(&["kernelfaults", "syscall-dispatch"])
}

/// Whether `uhmm doctor` finds one of these capabilities. Says why not.
fn has_one_of(names: &[&str]) -> bool {
    let done = run(Command::new(UHMM).args(["doctor", "--json"]));
    let report: Value = serde_json::from_slice(&done.out).unwrap();
    let capabilities = report["capabilities"].as_array().unwrap();
    let ways: Vec<_> = capabilities.iter().filter(|cap| names.iter().any(|&name| cap["name"] == name)).collect();
    assert_eq!(ways.len(), names.len(), "{report}");
    let has = ways.iter().any(|cap| cap["status"] == "ok");
    if !has {
        let details: Vec<_> = ways.iter().map(|cap| cap["detail"].to_string()).collect();
        println!("skipped: {}", details.join(" and "));
    }
    has
}

/// The ways in which a program runs: as it is, moved about, also on a device that the CPU can address, and with little room.
const WAYS: [&[&str]; 4] = [
    &["--stats=json"],
    &["--from-start", "--stats=json", "--stress"],
    &["--from-start", "--stats=json", "--stress", "--device", "soft:256M,coherent", "--device", "soft:256M"],
    &["--from-start", "--stats=json", "--resident", "4M", "--device", "soft:1G"],
];

/// Runs a program in each way; it must end well. Where memory moves and the program lives long enough, some must have
/// left and come home.
fn in_each_way(program: &Path, arguments: &[&str]) {
    let moves = moves();
    for way in WAYS {
        if !moves && way.len() > 1 {
            continue;
        }
        let done = run(uhmm(way).arg(program).args(arguments));
        assert_eq!(done.status.code(), Some(0), "{way:?}: {}: {}", done.status, done.err);
        let figures = done.figures();
        let [out, home, processes] =
            ["pages_staged", "pages_home", "processes"].map(|name| figures[name].as_u64().unwrap());
        if way.len() > 1 {
            assert!(out > 0 && processes > 0, "{way:?}: nothing moved: {}", done.err);
        } else {
            assert_eq!((out, home, processes), (0, 0, 0), "nothing was to move: {}", done.err);
        }
    }
}

// Status, streams and signals.

#[test]
fn the_exit_status_is_the_programs() {
    for options in [&[][..], &["--stats"], &["--quiet"]] {
        for code in [0, 1, 7, 125, 255] {
            let done = run(uhmm(options).args(["sh", "-c", &format!("exit {code}")]));
            assert_eq!(done.code(), code, "{options:?}");
            assert_eq!(done.err.is_empty(), options != ["--stats"], "{}", done.err);
        }
    }
}

#[test]
fn a_program_that_dies_by_a_signal_is_seen_to() {
    for options in [&[][..], &["--stats"]] {
        for by in [SIGTERM, SIGINT, SIGSEGV] {
            // Where this runs in the background of a shell, it ignores SIGINT.
            let done = run(uhmm(options).args(["env", "--default-signal", "sh", "-c", &format!("kill -{by} $$")]));
            assert_eq!(done.status.signal(), Some(by), "{options:?}: {}", done.err);
        }
    }
}

#[test]
fn streams_are_passed_through_byte_for_byte() {
    let input: Vec<u8> = (0..3_000_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let options = if moves() { &["--stress", "--stats"][..] } else { &["--stats"] };
    let done = run_with(uhmm(options).arg("cat"), &input);
    assert_eq!(done.code(), 0, "{}", done.err);
    assert!(done.out == input, "{} bytes went in, {} others came out", input.len(), done.out.len());
    assert!(done.err.starts_with("uhmm: "), "{}", done.err);
}

#[test]
fn what_is_not_there_or_cannot_run_has_the_status_that_env_gives() {
    let dir = Dir::new("cannot");
    let text = dir.join("text");
    fs::write(&text, "no program").unwrap();
    let text = text.to_str().unwrap();
    for (program, code, says) in [
        ("/no/such/program", 127, "no such file"),
        ("no-such-program-anywhere", 127, "no such program in PATH"),
        ("/tmp", 126, "is a directory"),
        (text, 126, "permission denied"),
    ] {
        let done = run(uhmm(&[]).arg(program));
        assert_eq!(done.code(), code, "{program}: {}", done.err);
        assert!(done.err.contains(says), "{program}: {}", done.err);
        assert_eq!(done.err.lines().count(), 1, "{}", done.err);
    }
}

#[test]
fn a_program_that_loads_no_library_is_refused() {
    let dir = Dir::new("static");
    let program = dir.program_as("hello", "hello", &["-static"]);
    let pie = dir.program_as("hello", "hello-pie", &["-static-pie"]);
    let script = dir.script("script", &format!("#!{}\n", program.display()));
    for program in [program, pie, script] {
        let done = run(uhmm(&[]).arg(&program));
        assert_eq!(done.code(), 126);
        assert!(done.err.contains("is statically linked"), "{}", done.err);
        assert!(done.out.is_empty());
    }
}

#[test]
fn a_program_with_privileges_of_its_own_is_refused() {
    let dir = Dir::new("setuid");
    if !is_root() {
        println!("skipped: only root can make a program another user's");
        return;
    }
    let program = dir.program("hello");
    for (owner, mode, says) in [("65534:0", 0o4755, "is setuid"), ("0:65534", 0o2755, "is setgid")] {
        assert!(Command::new("chown").arg(owner).arg(&program).status().unwrap().success());
        fs::set_permissions(&program, fs::Permissions::from_mode(mode)).unwrap();
        let done = run(uhmm(&[]).arg(&program));
        assert_eq!(done.code(), 126);
        assert!(done.err.contains(says), "{}", done.err);
    }
    // Setuid to who it is anyway changes nothing.
    assert!(Command::new("chown").arg("0:0").arg(&program).status().unwrap().success());
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
    assert_eq!(run(uhmm(&[]).arg(&program)).text(), "hello\n");
}

#[test]
fn scripts_run_by_their_interpreters() {
    let dir = Dir::new("script");
    let options = if moves() { &["--stress", "--quiet"][..] } else { &[] };
    for first in ["#!/bin/sh", "#! /usr/bin/env sh"] {
        let script = dir.script("script", &format!("{first}\necho $1; exit 3\n"));
        let done = run(uhmm(options).args([script.as_os_str(), OsStr::new("argument")]));
        assert_eq!((done.code(), done.text()), (3, "argument\n"), "{}", done.err);
    }
}

#[test]
fn devices_that_cannot_be_are_named_before_the_program_runs() {
    let dir = Dir::new("device");
    let dir = dir.path().to_str().unwrap();
    let huge = format!("soft:8000G,file={dir}");
    let missing = format!("soft:1G,file={dir}/none");
    for (device, says) in [
        ("soft:0", "must not be 0"),
        ("soft:lots", "is no size"),
        ("soft:1000", "not a multiple of 2 MiB"),
        ("soft", "is no size"),
        ("hard:1G", "no device kind"),
        ("soft:1G,fast", "no option `fast`"),
        (&huge, "bytes free"),
        (&missing, "No such file"),
    ] {
        let done = run(uhmm(&["--device", device]).args(["echo", "ran"]));
        assert_eq!(done.code(), 125, "{device}");
        assert!(
            done.err.contains(says) && done.err.contains("--device soft") | done.err.contains("--device hard"),
            "{}",
            done.err
        );
        assert!(done.out.is_empty());
    }
    for (option, says) in [("--resident=0", "must not be 0"), ("--stress=x", "a seed is a number")] {
        let done = run(uhmm(&[option]).args(["echo", "ran"]));
        assert_eq!(done.code(), 125, "{option}");
        assert!(done.err.contains(says) && done.out.is_empty(), "{}", done.err);
    }
    let well = format!("soft:64M,file={dir}");
    let done = run(uhmm(&["--device", &well, "--device", "soft:2M,coherent"]).args(["echo", "ran"]));
    assert_eq!((done.code(), done.text()), (0, "ran\n"), "{}", done.err);
    assert_eq!(fs::read_dir(dir).unwrap().count(), 0, "the device's file has no name");
}

#[test]
fn a_library_that_is_not_there_is_named() {
    let done = run(uhmm(&[]).env("UHMM_PRELOAD", "/no/such/library.so").arg("true"));
    assert_eq!(done.code(), 125);
    assert!(done.err.contains("/no/such/library.so"), "{}", done.err);
}

/// `uhmm run` as a user without privileges, whose userfaultfd is for user mode only. `None`, with the reason printed, where
/// there is none or he cannot run what was built.
fn nobody(options: &[&str]) -> Option<Command> {
    library();
    let mut command = if is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--", UHMM]);
        command
    } else {
        Command::new(UHMM)
    };
    let done = run(Command::new(command.get_program()).args(command.get_args()).arg("--version"));
    if done.status.code() != Some(0) {
        println!("skipped: nobody cannot run {UHMM}");
        return None;
    }
    // On a machine that lets everybody serve the kernel's faults.
    command.env("UHMM_MASK", "kernelfaults");
    command.arg("run").args(options).arg("--").env_remove("LD_PRELOAD").env_remove("UHMM_PRELOAD");
    command.env("UHMM_STRICT", "1");
    Some(command)
}

/// Runs something as nobody, moved about and with little room: status and output must be those of `bare`. Each way so many
/// times, with a seed of its own. Returns how many pages left in all; `None` where nobody cannot do that here.
fn as_nobody(arguments: &[&str], rounds: u32, bare: &Done) -> Option<u64> {
    if !moves() {
        return None;
    }
    let mut pages = 0;
    for round in 0..rounds {
        let stress = format!("--stress={round}");
        for way in [
            &["--from-start", "--stats=json", &stress][..],
            &["--from-start", "--stats=json", "--resident", "4M", "--device", "soft:1G"],
        ] {
            let done = run(nobody(way)?.args(arguments));
            assert_eq!(done.status.code(), bare.status.code(), "{way:?} {arguments:?}: {}: {}", done.status, done.err);
            assert!(
                done.out == bare.out,
                "{way:?} {arguments:?}: other output: {}",
                String::from_utf8_lossy(&done.out)
            );
            pages += done.figures()["pages_staged"].as_u64().unwrap();
        }
    }
    Some(pages)
}

#[test]
fn who_may_not_serve_the_kernels_faults_has_system_calls_caught() {
    let dir = Dir::new("nobody");
    let program = dir.program("hello");
    let Some(mut command) = nobody(&[]) else { return };
    let done = run(command.arg(&program));
    assert_eq!((done.code(), done.text()), (0, "hello\n"), "{}", done.err);
    for option in ["--resident=1G", "--stress"] {
        let done = run(nobody(&[option]).unwrap().arg(&program));
        if moves() {
            assert_eq!((done.code(), done.text()), (0, "hello\n"), "{}", done.err);
        }
        // A kernel that cannot do that either.
        let done = run(nobody(&[option]).unwrap().arg(&program).env("UHMM_MASK", "kernelfaults,syscall-dispatch"));
        assert_eq!((done.code(), done.text()), (125, ""), "{}", done.err);
        assert!(done.err.contains("kernelfaults"), "{}", done.err);
    }
}

#[test]
fn system_calls_of_nobody_find_their_memory() {
    let dir = Dir::new("calls");
    let program = dir.program("calls");
    let program = program.to_str().unwrap();
    let bare = run(Command::new(program).arg("0"));
    assert_eq!((bare.code(), bare.text()), (0, "all well\n"), "{}", bare.err);
    let pages = as_nobody(&[program, "2"], 3, &bare);
    assert!(pages.is_none_or(|pages| pages > 1000), "{pages:?} pages left");
}

#[test]
fn tools_give_nobody_the_same() {
    let dir = Dir::new("tools");
    let lines = dir.join("lines");
    let text: String =
        (0..60_000u32).map(|n| format!("{} line {n}\n", n.wrapping_mul(2_654_435_761) % 100_000)).collect();
    fs::write(&lines, text).unwrap();
    let lines = lines.to_str().unwrap();
    let python = "
import multiprocessing, hashlib, subprocess, time
big = {str(n): 'x' * (n % 50) for n in range(60000)}
def work(n):
    return hashlib.md5(''.join(list(big.values())[n::7]).encode()).hexdigest()
if __name__ == '__main__':
    time.sleep(0.1)
    with multiprocessing.get_context('fork').Pool(2) as pool:
        print(pool.map(work, range(4)))
    print(subprocess.run(['sh', '-c', 'cat; exit 4'], input=b'y' * 300000, stdout=subprocess.PIPE).stdout.count(b'y'))
    print(hashlib.md5(''.join(big).encode()).hexdigest())
";
    let compress =
        format!("xz -T2 -0 --block-size=100KiB -c {lines} | xz -dc | cksum; seq 1 20000 | sort -R | wc -l; exit 3");
    let query = "create table t(a integer primary key, b text); \
                 with recursive c(n) as (select 1 union all select n + 1 from c where n < 20000) \
                 insert into t select n, hex(n * 7919) from c; create index i on t(b); \
                 select count(*), sum(a), max(b) from t where b > '3';";
    for arguments in [
        &["sort", "-n", "--parallel=2", "-S", "1M", lines][..],
        // One that everybody may run.
        &["/usr/bin/python3", "-c", python],
        &["bash", "-c", &compress],
        &["sqlite3", ":memory:", query],
    ] {
        let bare = start_if_there(arguments).map(finish);
        match bare {
            Some(bare) => println!("{}: {:?} pages left", arguments[0], as_nobody(arguments, 2, &bare)),
            None => println!("skipped: there is no {}", arguments[0]),
        }
    }
}

/// Starts a tool, if the machine has it.
fn start_if_there(arguments: &[&str]) -> Option<Child> {
    let mut command = Command::new(arguments[0]);
    command.args(&arguments[1..]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.process_group(0).spawn().ok()
}

/// Starts `interrupt.c` and waits until it works.
fn interruptible(dir: &Dir, options: &[&str]) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = start(uhmm(options).arg(dir.program("interrupt")));
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    (child, out)
}

#[test]
fn ctrl_c_loses_nothing() {
    let dir = Dir::new("ctrl-c");
    let options = if moves() { &["--stress", "--stats=json"][..] } else { &["--stats=json"] };
    let (child, mut out) = interruptible(&dir, options);
    std::thread::sleep(Duration::from_millis(300));
    // A terminal sends it to the whole foreground group.
    signal(SIGINT, &format!("-{}", child.id()));
    let done = finish(child);
    let mut text = String::new();
    out.read_to_string(&mut text).unwrap();
    // From the group, and perhaps passed on: who sent it, a terminal or a process, is not the same to us.
    assert!(text.starts_with("signal 2, "), "{text}{}", done.err);
    assert_eq!(done.code(), 40 + SIGINT, "{}", done.err);
    assert!(done.figures()["pages_out"].is_u64(), "the summary was printed");
}

#[test]
fn a_signal_to_uhmm_reaches_the_program_once() {
    let dir = Dir::new("forward");
    let (child, mut out) = interruptible(&dir, &["--stats=json"]);
    signal(SIGTERM, &child.id().to_string());
    let done = finish(child);
    let mut text = String::new();
    out.read_to_string(&mut text).unwrap();
    assert_eq!(text, "signal 15, 1 times\n");
    assert_eq!(done.code(), 40 + SIGTERM);
}

#[test]
fn without_a_summary_uhmm_becomes_the_program() {
    let dir = Dir::new("become");
    let (child, mut out) = interruptible(&dir, &[]);
    let name = fs::read_to_string(format!("/proc/{}/comm", child.id())).unwrap();
    assert_eq!(name.trim(), "interrupt");
    signal(SIGTERM, &child.id().to_string());
    let done = finish(child);
    let mut text = String::new();
    out.read_to_string(&mut text).unwrap();
    assert_eq!((text.as_str(), done.code()), ("signal 15, 1 times\n", 40 + SIGTERM));
}

// Programs that look closely.

#[test]
fn plain_memory_keeps_its_bytes() {
    let dir = Dir::new("work");
    in_each_way(&dir.program("work"), &[]);
}

#[test]
fn a_handler_for_sigsegv_works() {
    let dir = Dir::new("segv");
    in_each_way(&dir.program("segv"), &[]);
}

#[test]
fn a_userfaultfd_of_the_programs_own_works() {
    let dir = Dir::new("userfault");
    if !moves() {
        return;
    }
    in_each_way(&dir.program("userfault"), &[]);
}

#[test]
fn locked_memory_stays_correct() {
    let dir = Dir::new("locked");
    let program = dir.program("locked");
    let moves = moves();
    for when in ["early", "late"] {
        for way in WAYS {
            if moves || way.len() == 1 {
                let done = run(uhmm(way).arg(&program).arg(when));
                assert_eq!(done.code(), 0, "{way:?} {when}: {}", done.err);
                assert!(done.text() == "locked\n" || !is_root(), "{way:?} {when}: {}", done.err);
            }
        }
    }
}

#[test]
fn a_device_that_is_too_small_takes_what_fits() {
    let dir = Dir::new("small-device");
    let program = dir.program("work");
    if !moves() {
        return;
    }
    let options = ["--stats=json", "--from-start", "--resident", "8M", "--device", "soft:4M"];
    let done = run(uhmm(&options).arg(&program).args(["48", "1"]));
    assert_eq!(done.code(), 0, "{}", done.err);
    let figures = done.figures();
    assert!(figures["skipped_full"].as_u64().unwrap() > 0 && figures["bytes_out"].as_u64().unwrap() > 0, "{figures}");
}

#[test]
fn limits_of_address_space_are_as_without_uhmm() {
    let dir = Dir::new("limit");
    let program = dir.program("limit");
    let moves = moves();
    // `CAP_SYS_RESOURCE`, which a container's root may not have.
    let raises = run(Command::new("bash").args(["-c", "ulimit -Hv 1048576 && ulimit -Hv 2097152"])).code() == 0;
    for way in WAYS {
        if !moves && way.len() > 1 {
            continue;
        }
        for arguments in [&[][..], &["late"]] {
            let done = run(uhmm(way).arg(&program).args(arguments));
            assert_eq!(done.code(), 0, "{way:?} {arguments:?}: {}", done.err);
        }
        // Set before uhmm runs. Where the hard limit cannot be raised there is no room for an engine.
        let line = format!(
            "ulimit -Sv 1048576; ulimit -Hv 2097152; exec {UHMM} run {} -- {} inherited",
            way.join(" "),
            program.display()
        );
        let done = run(Command::new("bash").args(["-c", &line]).env("UHMM_STRICT", "1"));
        let refused = !raises && way.len() > 1;
        assert_eq!(done.code(), if refused { 125 } else { 0 }, "{way:?} inherited: {}", done.err);
        assert!(!refused || done.err.contains("ulimit -v"), "{}", done.err);
    }
}

#[test]
fn mappings_are_moved_grown_cut_and_dropped_by_three_threads() {
    let dir = Dir::new("remap");
    in_each_way(&dir.program("remap"), &[]);
}

#[test]
fn forked_children_see_the_moment_of_their_fork() {
    let dir = Dir::new("forks");
    let program = dir.program("forks");
    in_each_way(&program, &[]);
    if moves() {
        let device = format!("soft:1G,file={}", dir.path().display());
        let done = run(uhmm(&["--from-start", "--stats=json", "--resident", "2M", "--device", &device]).arg(&program));
        assert_eq!(done.code(), 0, "{}", done.err);
        let figures = done.figures();
        assert!(figures["forks"].as_u64().unwrap() > 0 && figures["processes"].as_u64().unwrap() > 1, "{figures}");
    }
}

#[test]
fn with_from_start_even_what_ends_at_once_is_managed() {
    if !moves() {
        return;
    }
    let script = "(exit 3) & wait $!; test $? = 3 && exec true";
    for (options, processes) in [(&["--from-start", "--stats=json", "--stress"][..], 3), (&["--stats=json"], 0)] {
        let done = run(uhmm(options).args(["sh", "-c", script]));
        assert_eq!(done.code(), 0, "{options:?}: {}", done.err);
        // The shell, its child, and the program that takes the shell's place.
        assert_eq!(done.figures()["processes"], processes, "{options:?}: {}", done.err);
    }
}

#[test]
fn a_program_waits_for_its_engine_no_longer_than_it_is_told() {
    if !moves() {
        return;
    }
    for (strict, code, says) in [("0", 7, "has not started within 1s"), ("1", 125, "does not start within 1s")] {
        let start = Instant::now();
        let mut command = uhmm(&["--from-start=1", "--stress"]);
        command.args(["sh", "-c", "exit 7"]).env("UHMM_STRICT", strict).env("UHMM_START_DELAY", "60000");
        let done = run(&mut command);
        assert_eq!(done.code(), code, "{}", done.err);
        assert!(done.err.contains(says), "{}", done.err);
        assert!(start.elapsed() >= Duration::from_secs(1), "{:?}", start.elapsed());
    }
    assert_eq!(run(uhmm(&["--from-start=0", "--stress"]).arg("true")).code(), 2);
}

#[test]
fn children_of_children_of_children_each_have_an_engine() {
    let dir = Dir::new("deep");
    let program = dir.program("deep");
    if !moves() {
        return;
    }
    for way in &WAYS[1..] {
        let done = run(uhmm(way).arg(&program));
        assert_eq!(done.code(), 0, "{way:?}: {}", done.err);
        assert!(done.figures()["processes"].as_u64().unwrap() >= 16, "{way:?}: {}", done.err);
    }
}

#[test]
fn pages_lent_to_a_pipe_keep_their_bytes() {
    let dir = Dir::new("lend");
    in_each_way(&dir.program("lend"), &[]);
}

#[test]
fn sixty_thousand_mappings_are_borne() {
    let dir = Dir::new("many");
    in_each_way(&dir.program("many"), &[]);
}

#[test]
fn thread_local_storage_of_a_late_library_works() {
    let dir = Dir::new("storage");
    let library = dir.program_as("storage_library", "libstorage.so", &["-shared", "-fPIC"]);
    in_each_way(&dir.program("storage"), &[library.to_str().unwrap()]);
}

#[test]
fn the_programs_files_are_its_own() {
    let dir = Dir::new("files");
    let program = dir.program("files");
    let moves = moves();
    let bare = run(&mut Command::new(&program)).text().to_owned();
    for way in WAYS {
        if !moves && way.len() > 1 {
            continue;
        }
        let mut child = start(uhmm(way).arg(&program));
        let mut out = child.stdout.take().unwrap();
        // Ends when the program closes its end, while it runs on.
        let mut text = String::new();
        out.read_to_string(&mut text).unwrap();
        assert_eq!(text, bare, "{way:?}");
        assert!(child.try_wait().unwrap().is_none(), "{way:?}: it waits for the end of its input");
        drop(child.stdin.take());
        let done = finish(child);
        assert_eq!(done.code(), 0, "{way:?}: {}", done.err);
    }
}

#[test]
fn pipelines_of_short_lived_programs_give_the_same() {
    let line = "for i in 1 2 3; do seq 1 30000 | sort -R --random-source=/dev/zero | sort -n | tail -n 1000 | cksum; done; \
                (sleep 0.1; echo late) & wait; echo $(echo $(echo nested))";
    let bare = run(Command::new("bash").args(["-c", line]));
    assert_eq!(bare.code(), 0);
    let moves = moves();
    for way in WAYS {
        if moves || way.len() == 1 {
            let done = run(uhmm(way).args(["bash", "-c", line]));
            assert_eq!((done.code(), done.text()), (0, bare.text()), "{way:?}: {}", done.err);
        }
    }
}

#[test]
fn python_forks_workers() {
    let program = "
import multiprocessing, hashlib, time
big = [str(n) * 3 for n in range(200000)]
def work(n):
    time.sleep(0.05)
    return hashlib.md5(''.join(big[n::7]).encode()).hexdigest()
if __name__ == '__main__':
    time.sleep(0.2)
    with multiprocessing.get_context('fork').Pool(3) as pool:
        print(pool.map(work, range(12)))
    print(hashlib.md5(''.join(big).encode()).hexdigest())
";
    let bare = run(Command::new("python3").args(["-c", program]));
    assert_eq!(bare.code(), 0, "{}", bare.err);
    if moves() {
        for way in &WAYS[1..] {
            let done = run(uhmm(way).args(["python3", "-c", program]));
            assert_eq!((done.code(), done.text()), (0, bare.text()), "{way:?}: {}", done.err);
        }
    }
}

// Orders.

#[test]
fn memory_in_ram_is_kept_near_the_limit() {
    let dir = Dir::new("resident");
    let program = dir.program("work");
    if !moves() {
        return;
    }
    // Eight times as much as may stay, used again and again. It grows no faster than a program that computes something.
    let figures = stays_near_the_limit(&dir, &[], &program, &["256", "3", "4"]);
    assert!(figures["bytes_out"].as_u64().unwrap() > 200 << 20, "{figures}");
}

#[test]
fn memory_that_grows_at_full_speed_waits_for_reclaim() {
    let dir = Dir::new("growth");
    let program = dir.program("grow");
    // Without, the kernel fills first touches by itself.
    if !has_one_of(&["kernelfaults"]) {
        return;
    }
    // Reclaim is one among many threads, and these are faster: they have to wait for it.
    let figures = stays_near_the_limit(&dir, &["--from-start"], &program, &["256"]);
    assert!(figures["faults_parked"].as_u64().unwrap() > 0, "{figures}");
}

/// Runs a program whose memory may not stay; all but 32 MiB goes to a file, which is nobody's memory. Returns the figures.
fn stays_near_the_limit(dir: &Dir, options: &[&str], program: &Path, arguments: &[&str]) -> Value {
    let device = format!("soft:2G,file={}", dir.path().display());
    let mut command = uhmm(&[&["--stats=json", "--resident", "32M", "--device", &device], options].concat());
    let child = start(command.arg(program).args(arguments));
    let name = program.file_name().unwrap().to_str().unwrap();
    let pid = child_of(child.id(), name);
    let mut peak = 0;
    while let Some(kib) = anonymous_kib(pid) {
        peak = peak.max(kib);
        std::thread::sleep(Duration::from_millis(5));
    }
    let done = finish(child);
    assert_eq!(done.code(), 0, "{}", done.err);
    let allowed = (32 + 32 * 15 / 100 + 64) * 1024;
    assert!(peak > 0 && peak < allowed, "{peak} KiB of anonymous memory in RAM, {allowed} allowed; {}", done.err);
    done.figures()
}

/// The child of a process that runs a program of that name, once it has one.
fn child_of(pid: u32, name: &str) -> u32 {
    let begin = Instant::now();
    loop {
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let runs =
            |child: &&str| fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|comm| comm.trim() == name);
        if let Some(child) = children.split_whitespace().find(runs) {
            return child.parse().unwrap();
        }
        assert!(begin.elapsed() < LIMIT, "no child runs {name}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Anonymous memory of a process in RAM; `None` when it has ended.
fn anonymous_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[test]
fn the_summary_is_as_long_as_asked_for() {
    let dir = Dir::new("summary");
    let program = dir.program("work");
    if !moves() {
        return;
    }
    let err = |options: &[&str]| run(uhmm(options).arg(&program).args(["8", "0.2"])).err;
    assert_eq!(err(&["--stress", "--quiet"]), "");
    let line = err(&["--stress=42"]);
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(line.contains("1 processes") && line.contains("seed 42"), "{line}");
    let table = err(&["--stress", "--stats"]);
    assert!(table.lines().any(|line| line.trim_start().starts_with("skipped_pinned")), "{table}");
    let done = run(uhmm(&["--stress", "--stats=xml"]).arg("true"));
    assert_eq!(done.code(), 125, "{}", done.err);
}

#[test]
fn a_process_that_cannot_be_managed_says_so_and_runs_on() {
    if !moves() {
        return;
    }
    // The library alone, with orders that are none.
    let damaged = |strict: &str| {
        let mut command = Command::new("echo");
        command.arg("ran").env("LD_PRELOAD", library()).env("UHMM_STRESS", "1").env("UHMM_DEVICES", "soft:none");
        run(command.env("UHMM_STRICT", strict))
    };
    let done = damaged("0");
    assert_eq!((done.code(), done.text()), (0, "ran\n"));
    assert!(done.err.contains("not managed: UHMM_DEVICES"), "{}", done.err);
    let done = damaged("1");
    assert_eq!((done.code(), done.text()), (125, ""), "{}", done.err);
}

// Nodes of the kernel's HMM test device.

/// The program, with the library and nothing else.
fn preloaded(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("LD_PRELOAD", library()).env_remove("UHMM_PRELOAD");
    command
}

/// Whether a device can know what is written without a fault.
fn frames_are_shown() -> &'static str {
    if fs::File::open("/proc/kpageflags").is_ok() { "frames" } else { "blind" }
}

#[test]
fn nodes_answer_as_the_kernels_do() {
    let dir = Dir::new("nodes");
    let programs = ["nodes", "nodes_huge"].map(|name| dir.program(name));
    if !moves() {
        return;
    }
    for (program, kind) in programs.iter().flat_map(|program| [(program, "private"), (program, "coherent")]) {
        let done = run(preloaded(program).args([kind, frames_are_shown()]));
        assert_eq!(done.code(), 0, "{kind}: {}{}", done.text(), done.err);
        done.text().lines().filter(|line| line.starts_with("skip")).for_each(|line| println!("{line}"));
    }
}

#[test]
fn a_node_of_the_kernels_own_is_not_replaced_and_none_is_there_without_the_library() {
    let dir = Dir::new("no-nodes");
    let program = dir.program("nodes");
    if Path::new("/dev/hmm_dmirror0").exists() {
        println!("skipped: the kernel has nodes");
        return;
    }
    let done = run(Command::new(program).args(["private", "blind"]));
    assert_eq!(done.code(), 1);
    assert!(done.err.contains("nodes[0] >= 0"), "{}", done.err);
}
