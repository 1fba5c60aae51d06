//! `uhmm run`: runs a program with its memory under uhmm.
//!
//! The work is done by the preload library inside the program. This side checks that the program can be run so, leaves
//! the orders in the environment, and where a summary is wanted stays to stand in for the program: it passes signals on
//! and ends as the program ended. Where none is wanted it becomes the program itself.
//!
//! Exit status: the program's; as `env` and `timeout` do it, 125 where `uhmm run` itself fails, 126 where the program
//! cannot be run, 127 where it is not found.

mod child;
mod program;
mod summary;

use std::{
    ffi::OsString,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use uhmm::{
    device::MemoryKind,
    session::{self, DeviceSpec, EXIT_FAILED, LimitShift, Session, parse_size},
};
use uhmm_devices::soft::{SoftConfig, SoftDevice};
use uhmm_sys::{
    addr::BLOCK_SIZE,
    arena, limits,
    probe::{self, Cap, Status},
};

use self::summary::Form;

/// Runs a program with its memory under uhmm. Nothing moves unless --resident or --stress is given.
///
/// The program and its children, as far as they are dynamically linked, each have the devices for themselves. Standard
/// streams, exit status and signals are the program's. Exit status 125: uhmm failed; 126: the program cannot be run so;
/// 127: there is no such program.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A device for each process: `soft:SIZE`, with memory in RAM, or in a file without name in DIR. Without this: one with
    /// as much RAM as the machine has. May be repeated. The CPU reaches what is on a coherent one without a fault; it is
    /// RAM of the process, so --resident does not use it.
    #[arg(long = "device", value_name = "soft:SIZE[,file=DIR][,coherent]")]
    devices: Vec<String>,
    /// Keep about as much anonymous memory in RAM (`512M`, say), in each process; move what is cold to the devices.
    #[arg(long, value_name = "SIZE")]
    resident: Option<String>,
    /// Move random memory about all the time. The program's result must not change.
    #[arg(long, value_name = "SEED", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    stress: Option<String>,
    /// Manage each process from its first instruction on: it waits until it can be, for SECONDS at most. Without this one that
    /// ends within some 20 ms is left alone, and what a process does in that time, its forks too, goes unmanaged.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "30",
          value_parser = clap::value_parser!(u64).range(1..))]
    from_start: Option<u64>,
    /// Print all figures to standard error at the end. Without this: one line, where something was to move.
    #[arg(long, value_name = "json", num_args = 0..=1, require_equals = true, default_missing_value = "table",
          conflicts_with = "quiet")]
    stats: Option<String>,
    /// Print no summary.
    #[arg(long)]
    quiet: bool,
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "PROGRAM")]
    command: Vec<OsString>,
}

/// What the arguments ask for.
#[derive(Debug)]
struct Orders {
    devices: Vec<DeviceSpec>,
    resident: Option<u64>,
    stress: Option<u64>,
    from_start: Option<u64>,
    form: Option<Form>,
}

impl Orders {
    const fn moves(&self) -> bool {
        self.resident.is_some() || self.stress.is_some()
    }
}

/// Runs the program. Does not return where it ended by a signal, nor where there is nothing to do after it.
///
/// # Errors
/// None: failures are reported here, for their exit status is not that of other commands.
pub fn run(args: &Args) -> Result<ExitCode> {
    Ok(try_run(args).unwrap_or_else(|failure| {
        eprintln!("uhmm: {:#}", failure.error);
        ExitCode::from(failure.status)
    }))
}

/// Why the program was not run.
#[derive(Debug)]
struct Failure {
    error: anyhow::Error,
    status: u8,
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { error, status: EXIT_FAILED }
    }
}

fn try_run(args: &Args) -> Result<ExitCode, Failure> {
    let orders = read_orders(args)?;
    let name = args.command.first().ok_or_else(|| anyhow!("no program"))?;
    let program = program::find(name)?;
    let library = find_library()?;
    if orders.moves() {
        raise_limit(&orders)?;
        check_machine(&orders)?;
    }
    // What nobody named can only fail where it is used.
    if !args.devices.is_empty() {
        orders.devices.iter().try_for_each(check_device)?;
    }

    let mut command = Command::new(&program);
    command.arg0(name).args(&args.command[1..]);
    set_environment(&mut command, &orders, &library)?;
    let Some(form) = orders.form else {
        let error = command.exec();
        return Err(program::not_started(&program, &error));
    };
    let session = Session::create().context("cannot make the shared figures")?;
    command.env(session::SESSION, session.path());
    let end = child::run(&mut command).map_err(|error| program::not_started(&program, &error))?;
    summary::print(form, &session.stats(), orders.stress);
    Ok(end.pass_on())
}

fn read_orders(args: &Args) -> Result<Orders> {
    let mut devices = args
        .devices
        .iter()
        .map(|text| text.parse().with_context(|| format!("--device {text}")))
        .collect::<Result<Vec<DeviceSpec>>>()?;
    for spec in &mut devices {
        // Programs change their directory.
        if let Some(dir) = &spec.dir {
            let whole = dir.canonicalize().with_context(|| format!("--device {spec}: {}", dir.display()))?;
            ensure!(whole.is_dir(), "--device {spec}: {} is no directory", dir.display());
            let text = whole.to_str().with_context(|| format!("--device {spec}: its directory's name is not UTF-8"))?;
            ensure!(!text.contains([',', ';']), "--device {spec}: its directory's name holds `,` or `;`");
            spec.dir = Some(whole);
        }
    }
    if devices.is_empty() {
        let bytes = limits::total_ram().next_multiple_of(BLOCK_SIZE);
        devices.push(DeviceSpec { bytes, dir: None, kind: MemoryKind::Private });
    }
    let resident = match &args.resident {
        None => None,
        Some(text) => Some(parse_size(text).with_context(|| format!("--resident {text}"))?),
    };
    ensure!(
        resident.is_none() || devices.iter().any(|spec| spec.kind == MemoryKind::Private),
        "--resident needs a device that is not coherent: what is on one that is stays in the process's RAM"
    );
    let stress = match args.stress.as_deref() {
        None => None,
        Some("") => Some(any_seed()),
        Some(text) => Some(text.parse().map_err(|_| anyhow!("--stress={text}: a seed is a number"))?),
    };
    let form = match args.stats.as_deref() {
        _ if args.quiet => None,
        Some("table") => Some(Form::Table),
        Some("json") => Some(Form::Json),
        Some(text) => bail!("--stats={text}: there is only --stats and --stats=json"),
        None if resident.is_some() || stress.is_some() => Some(Form::Line),
        None => None,
    };
    Ok(Orders { devices, resident, stress, from_start: args.from_start, form })
}

/// A seed that differs from run to run, short enough to be typed.
fn any_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos());
    u64::from(now) ^ u64::from(std::process::id())
}

/// Whether memory can be moved here. Below a program whose system calls would answer `EFAULT` it must not be.
fn check_machine(orders: &Orders) -> Result<()> {
    let asked = if orders.resident.is_some() { "--resident" } else { "--stress" };
    let report = probe::probe();
    for (cap, consequence) in [
        (Cap::Kernel, "uhmm knows no other kind of machine"),
        (Cap::Userfault, "no page could come home at a touch"),
        (Cap::RemapEvent, "moved memory would read as zero"),
        (Cap::RemoveEvent, "dropped memory would come back"),
        (Cap::UnmapEvent, "unmapped memory would stay in use"),
        (Cap::AddressSpace, "the engine has no place for its own memory"),
        (Cap::KernelFaults, "the program's system calls would answer EFAULT on memory that is away"),
    ] {
        let finding = report.get(cap);
        if finding.status != Status::Missing {
            continue;
        }
        // The other way: each system call is caught, and what it uses brought home before.
        if cap == Cap::KernelFaults && report.get(Cap::SyscallDispatch).status == Status::Ok {
            continue;
        }
        let grant = finding
            .grant
            .as_ref()
            .map_or_else(|| "see `uhmm doctor`".to_owned(), |grant| format!("get it with: {grant}"));
        bail!("{asked} needs `{}` ({}): {consequence}; {grant}", cap.name(), finding.detail);
    }
    Ok(())
}

/// Makes the device once, here, where a failure can still stop the program.
fn check_device(spec: &DeviceSpec) -> Result<()> {
    arena::init(session::ARENA_BYTES).context("no address space for the engine")?;
    let config = match &spec.dir {
        None => SoftConfig::ram("check", spec.bytes),
        Some(dir) => SoftConfig::file("check", dir, spec.bytes),
    };
    SoftDevice::new(&SoftConfig { kind: spec.kind, ..config }).map(drop).with_context(|| format!("--device {spec}"))
}

/// Makes room for the engine where address space is limited. The program is told the limit as it was.
fn raise_limit(orders: &Orders) -> Result<()> {
    let limit = getrlimit(Resource::As);
    let Some(now) = limit.current else { return Ok(()) };
    let shift = LimitShift::for_devices(&orders.devices);
    let wanted = Rlimit { current: Some(shift.shift(now)), maximum: limit.maximum.map(|maximum| shift.shift(maximum)) };
    let soft = Rlimit { maximum: limit.maximum, ..wanted };
    setrlimit(Resource::As, wanted).or_else(|_| setrlimit(Resource::As, soft)).map_err(|_| {
        anyhow!(
            "address space is limited to {} MiB, and the engine and its devices need {} MiB more; raise it with: ulimit -v {}",
            now >> 20,
            (shift.shift(now) - now) >> 20,
            shift.shift(now).div_ceil(1024)
        )
    })
}

/// Name of the variable that says where the preload library is.
const LIBRARY_VARIABLE: &str = "UHMM_PRELOAD";
const LIBRARY: &str = "libuhmm_preload.so";

fn find_library() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(LIBRARY_VARIABLE) {
        let path = PathBuf::from(path);
        return usable(&path).with_context(|| format!("{LIBRARY_VARIABLE}={}", path.display()));
    }
    let own = std::env::current_exe().context("cannot find out where uhmm itself is")?;
    let dir = own.parent().unwrap_or(Path::new("/"));
    let places = [dir.join(LIBRARY), dir.join("../lib/uhmm").join(LIBRARY)];
    match places.iter().find(|path| path.exists()) {
        Some(path) => usable(path).with_context(|| path.display().to_string()),
        None => bail!(
            "{LIBRARY} is neither in {} nor in {}; build it with: cargo build -p uhmm-preload, or name it in {LIBRARY_VARIABLE}",
            dir.display(),
            dir.join("../lib/uhmm").display()
        ),
    }
}

/// The library's whole path, as `LD_PRELOAD` can hold it.
fn usable(path: &Path) -> Result<PathBuf> {
    let path = path.canonicalize()?;
    let text = path.to_str().context("its path is not UTF-8")?;
    ensure!(!text.contains([':', ' ']), "{text}: its path holds `:` or a blank, which LD_PRELOAD cannot");
    Ok(path)
}

fn set_environment(command: &mut Command, orders: &Orders, library: &Path) -> Result<()> {
    let mut preload = library.as_os_str().to_owned();
    if let Some(others) = std::env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        preload.push(":");
        preload.push(others);
    }
    let devices: Vec<String> = orders.devices.iter().map(DeviceSpec::to_string).collect();
    command.env("LD_PRELOAD", preload).env(session::DEVICES, devices.join(";"));
    for (name, value) in [
        (session::RESIDENT, orders.resident),
        (session::STRESS, orders.stress),
        (session::FROM_START, orders.from_start),
    ] {
        match value {
            Some(value) => command.env(name, value.to_string()),
            None => command.env_remove(name),
        };
    }
    command.env_remove(session::SESSION);
    Ok(())
}
