//! PageRank on a device, over a graph of ordinary pointers.
//!
//! The program reads a real file into `Box`es and `Vec`s that point to each other, as any program would, and hands the
//! device one address. The device follows the same pointers: nothing is copied, flattened or translated in this source.
//! The pages that it touches move to its memory meanwhile, and come home as the CPU reads the result.
//!
//! ```text
//! cargo run --release -p uhmm-devices --example pagerank [FILE [ROUNDS]]
//! ```
//!
//! `FILE` is a Debian package list (`/var/lib/dpkg/status` if nothing else is said), or lines of two words each: an arrow
//! from the first to the second.
//!
//! # What the device may touch
//! To the compiler a device is another thread that knows the addresses. So what it writes is atomic, what it reads is
//! not written at the same time, and the fields that it looks for are where `repr(C)` puts them.

use std::{
    collections::HashMap,
    error::Error,
    fs,
    mem::offset_of,
    ops::Range,
    sync::{
        OnceLock,
        atomic::{
            AtomicPtr, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
};

use uhmm::{Mm, addr::VirtAddr, trace::Counter};
use uhmm_devices::soft::{AccessError, Lane, SoftConfig, SoftDevice};
use uhmm_sys::thread::Kind;

/// A package, or whatever the file's words stand for.
#[repr(C)]
struct Node {
    /// Bits of an `f64`; the device writes both.
    rank: AtomicU64,
    next: AtomicU64,
    /// How many arrows leave.
    leaving: AtomicU64,
    /// The nodes that point here: where the vector below has them, for a reader that does not know what a `Vec` is.
    first: AtomicPtr<*const Node>,
    count: AtomicU64,
    arriving: OnceLock<Vec<*const Node>>,
    name: Box<str>,
}

impl Node {
    fn new(name: &str) -> Self {
        Self {
            rank: AtomicU64::new(0),
            next: AtomicU64::new(0),
            leaving: AtomicU64::new(0),
            first: AtomicPtr::default(),
            count: AtomicU64::new(0),
            arriving: OnceLock::new(),
            name: name.into(),
        }
    }

    fn rank(&self) -> f64 {
        f64::from_bits(self.rank.load(Acquire))
    }
}

/// Names, and arrows between them by number.
struct Arrows {
    names: Vec<String>,
    arrows: Vec<(usize, usize)>,
}

impl Arrows {
    /// Reads a package list, whose arrows are dependencies, or a list of arrows.
    fn read(text: &str) -> Self {
        let mut this = Self { names: Vec::new(), arrows: Vec::new() };
        let mut numbers: HashMap<String, usize> = HashMap::new();
        let mut number = |names: &mut Vec<String>, name: &str| {
            *numbers.entry(name.to_owned()).or_insert_with(|| {
                names.push(name.to_owned());
                names.len() - 1
            })
        };
        let is_packages = text.lines().any(|line| line.starts_with("Package: "));
        let mut package = None;
        for line in text.lines() {
            if !is_packages {
                if let [from, to] = line.split_whitespace().collect::<Vec<_>>()[..] {
                    let arrow = (number(&mut this.names, from), number(&mut this.names, to));
                    this.arrows.push(arrow);
                }
            } else if let Some(name) = line.strip_prefix("Package: ") {
                package = Some(number(&mut this.names, name.trim()));
            } else if let Some(list) = line.strip_prefix("Depends: ").or_else(|| line.strip_prefix("Pre-Depends: ")) {
                for wanted in list.split(',') {
                    // The first of several alternatives, without version and architecture.
                    let name = wanted.split(['|', '(', ':']).next().unwrap_or(wanted).trim();
                    let to = number(&mut this.names, name);
                    this.arrows.extend(package.map(|from| (from, to)));
                }
            }
        }
        this
    }

    /// The same as objects that point to each other.
    #[expect(clippy::vec_box, reason = "the point is a graph of separate objects on the heap")]
    fn build(&self) -> Vec<Box<Node>> {
        let nodes: Vec<Box<Node>> = self.names.iter().map(|name| Box::new(Node::new(name))).collect();
        let mut arriving = vec![Vec::new(); nodes.len()];
        for &(from, to) in &self.arrows {
            nodes[from].leaving.fetch_add(1, Relaxed);
            arriving[to].push(std::ptr::from_ref::<Node>(&nodes[from]));
        }
        for (node, arriving) in nodes.iter().zip(arriving) {
            let arriving = node.arriving.get_or_init(|| arriving);
            node.first.store(arriving.as_ptr().cast_mut(), Release);
            node.count.store(arriving.len() as u64, Release);
        }
        nodes
    }

    /// What the device should find, worked out by the CPU from the numbers.
    fn ranks(&self, rounds: usize) -> Vec<f64> {
        let n = self.names.len();
        let (mut ranks, mut leaving) = (vec![1.0 / as_f64(n as u64); n], vec![0u64; n]);
        self.arrows.iter().for_each(|&(from, _)| leaving[from] += 1);
        for _ in 0..rounds {
            let stuck: f64 = (0..n).filter(|&i| leaving[i] == 0).map(|i| ranks[i]).sum();
            let mut next = vec![share(n as u64, stuck); n];
            for &(from, to) in &self.arrows {
                next[to] += DAMPING * ranks[from] / as_f64(leaving[from]);
            }
            ranks = next;
        }
        ranks
    }
}

const DAMPING: f64 = 0.85;

/// What every node gets: it may be where a walk begins anew, or goes on from a node without arrows.
fn share(nodes: u64, stuck: f64) -> f64 {
    (1.0 - DAMPING + DAMPING * stuck) / as_f64(nodes)
}

#[expect(clippy::cast_precision_loss, reason = "counts in a file are far below 2^52")]
fn as_f64(n: u64) -> f64 {
    n as f64
}

// What runs on the device. All it is given is the address of the vector of nodes.

/// The `i`th pointer of an array of pointers.
fn pointer(lane: &mut Lane, array: VirtAddr, i: u64) -> Result<VirtAddr, AccessError> {
    lane.load_u64(array.add(i * 8)).map(VirtAddr::new)
}

/// Computes the next rank of some nodes from the ranks of those that point to them.
fn spread(lane: &mut Lane, nodes: VirtAddr, part: Range<u64>, share: f64) -> Result<(), AccessError> {
    for i in part {
        let node = pointer(lane, nodes, i)?;
        let first = pointer(lane, node.add(offset_of!(Node, first) as u64), 0)?;
        let mut next = share;
        for k in 0..lane.load_u64(node.add(offset_of!(Node, count) as u64))? {
            let from = pointer(lane, first, k)?;
            let rank = lane.load_f64(from.add(offset_of!(Node, rank) as u64))?;
            let leaving = lane.load_u64(from.add(offset_of!(Node, leaving) as u64))?;
            next += DAMPING * rank / as_f64(leaving);
        }
        lane.store_f64(node.add(offset_of!(Node, next) as u64), next)?;
    }
    Ok(())
}

/// Makes the next rank of some nodes their rank; returns how much of it stands where no arrow leaves.
fn settle(lane: &mut Lane, nodes: VirtAddr, part: Range<u64>) -> Result<f64, AccessError> {
    let mut stuck = 0.0;
    for i in part {
        let node = pointer(lane, nodes, i)?;
        let rank = lane.load_f64(node.add(offset_of!(Node, next) as u64))?;
        lane.store_f64(node.add(offset_of!(Node, rank) as u64), rank)?;
        if lane.load_u64(node.add(offset_of!(Node, leaving) as u64))? == 0 {
            stuck += rank;
        }
    }
    Ok(stuck)
}

const LANES: usize = 2;

/// Runs PageRank on `text`'s graph and says how it went.
///
/// # Errors
/// Whatever fails, and a result that differs from the CPU's own.
pub fn rank(text: &str, rounds: usize) -> Result<(), Box<dyn Error>> {
    let arrows = Arrows::read(text);
    let graph = arrows.build();
    let count = graph.len() as u64;
    if count == 0 {
        return Err("the file names nothing".into());
    }
    println!("{count} nodes and {} arrows, on the heap", arrows.arrows.len());

    let mm = Mm::open()?;
    let mirror = mm.register(SoftDevice::new(&SoftConfig::ram("soft0", 256 << 20))?)?;
    let device = mirror.device();
    device.start(mirror.port().ok_or("the device is gone")?, 0, Kind::Pthread)?;

    let nodes = VirtAddr::of(graph.as_ptr());
    let part = |lane: usize| {
        let edge = |lane: usize| count * lane as u64 / LANES as u64;
        edge(lane)..edge(lane + 1)
    };
    let first = (1.0 / as_f64(count)).to_bits();
    graph.iter().for_each(|node| node.next.store(first, Release));
    for round in 0..=rounds {
        let stuck = device.run(LANES, |lane, index| settle(lane, nodes, part(index)))?;
        let stuck: f64 = stuck.into_iter().collect::<Result<Vec<_>, _>>()?.iter().sum();
        if round < rounds {
            let share = share(count, stuck);
            let done = device.run(LANES, |lane, index| spread(lane, nodes, part(index), share))?;
            done.into_iter().collect::<Result<Vec<()>, _>>()?;
        }
    }
    let stats = mm.stats();
    let say = |when: &str| {
        let n = |counter| stats.get(counter);
        println!(
            "{when}: {} device faults, {} pages out, {} home, at {} CPU faults",
            n(Counter::DeviceFaults),
            n(Counter::PagesOut),
            n(Counter::PagesHome),
            n(Counter::FaultsHome)
        );
    };
    say("after the device's work");

    // The CPU reads what the device wrote, where it stands.
    let own = arrows.ranks(rounds);
    let difference = graph.iter().zip(&own).map(|(node, own)| (node.rank() - own).abs()).fold(0.0, f64::max);
    say("after the CPU's look");
    let mut best: Vec<&Node> = graph.iter().map(Box::as_ref).collect();
    best.sort_by(|a, b| b.rank().total_cmp(&a.rank()));
    best.iter().take(10).for_each(|node| println!("{:8.5}  {}", node.rank(), node.name));
    println!("the CPU's own ranks differ by {difference:.1e} at most");
    if stats.get(Counter::PagesOut) == 0 {
        return Err("no page moved to the device".into());
    }
    if difference > 1e-12 {
        return Err("the ranks differ".into());
    }
    mirror.close()?;
    Ok(mm.close()?)
}

/// Runs the example.
///
/// # Errors
/// A file that cannot be read, and what [`rank`] answers.
pub fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().unwrap_or_else(|| "/var/lib/dpkg/status".into());
    let rounds = args.next().map_or(Ok(20), |rounds| rounds.parse())?;
    let text = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}; name a file"))?;
    rank(&text, rounds)
}
