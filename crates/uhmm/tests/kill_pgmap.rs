//! Processes that share a pgmap are killed in the middle of what they do. The others must get on, and nothing but what
//! the dead were at may be lost.
#![cfg(not(loom))]

use std::{
    env,
    fs::File,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use uhmm::{
    device::{DevPfn, DeviceId, FrameRun},
    pgmap::{CHUNK_FRAMES, Pgmap},
    sync::Words,
};
use uhmm_sys::mem::shared_slice_from_fd;

const FRAMES: u32 = 64 * CHUNK_FRAMES + 100;
/// Offset of the 64-bit words in the file; the 32-bit ones come first and are shorter.
const WORDS64_AT: u64 = 1 << 20;
/// Tells the child's part from an ordinary run, and where the file is.
const FILE: &str = "UHMM_KILL_PGMAP_FILE";
const ROUNDS: u64 = 25;
const CHILDREN: u64 = 2;

/// Opens the pgmap in the file, and a counter of the steps that children have made.
fn open(path: &Path) -> (Pgmap, &'static AtomicU64) {
    let needed = Pgmap::storage_needed(FRAMES);
    let file = File::options().read(true).write(true).open(path).expect("the parent made the file");
    let words32 = shared_slice_from_fd(file.as_fd(), 0, needed.words32).expect("the file is long enough");
    let words64: &'static [AtomicU64] =
        shared_slice_from_fd(file.as_fd(), WORDS64_AT, needed.words64 + 1).expect("the file is long enough");
    let (words64, steps) = words64.split_at(needed.words64);
    (Pgmap::new(DeviceId::from_index(0).unwrap(), FRAMES, Words { words32, words64 }), &steps[0])
}

/// The child's part: allocates, splits and frees until it is killed. An ordinary run of the tests does nothing here.
#[test]
fn child_works_until_it_is_killed() {
    let Some(path) = env::var_os(FILE) else { return };
    let (map, steps) = open(Path::new(&path));
    let mut seed = u64::from(process::id());
    let mut below = |n: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).expect("31 bits") % n
    };
    let mut held: Vec<FrameRun> = Vec::new();
    loop {
        let got = match below(6) {
            0 => map.alloc_page().map(|first| FrameRun { first, count: 1 }),
            1 => map.alloc_run(u32::try_from(1 + below(64)).expect("small")),
            2 => map.alloc_huge().map(|first| FrameRun { first, count: CHUNK_FRAMES }),
            _ => None,
        };
        if let Some(run) = got {
            held.push(run);
        } else if !held.is_empty() {
            let run = held.swap_remove(below(held.len()));
            if map.order(run.first) > 0 && below(2) == 0 {
                map.split(run.first).expect("nobody else has the unit");
            }
            map.put_run(run, |_| ());
        }
        steps.fetch_add(1, Ordering::Relaxed);
    }
}

/// Removes the file, and ends the children if the test panics.
struct Cleanup {
    path: PathBuf,
    children: Vec<Child>,
}

impl Cleanup {
    fn kill_all(&mut self) {
        for mut child in self.children.drain(..) {
            child.kill().expect("it runs until it is killed");
            child.wait().expect("it is ours");
        }
    }
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

#[test]
fn the_dead_take_nothing_with_them_but_what_they_were_at() {
    let path = env::temp_dir().join(format!("uhmm-kill-pgmap-{}", process::id()));
    let bytes = WORDS64_AT + 8 * (Pgmap::storage_needed(FRAMES).words64 as u64 + 1);
    let file = File::create_new(&path).expect("a fresh file in the temporary directory");
    let mut cleanup = Cleanup { path, children: Vec::new() };
    file.set_len(bytes).expect("room for a sparse file");
    let (map, steps) = open(&cleanup.path);
    let mut lost_in_all = 0;
    for round in 0..ROUNDS {
        let before = steps.load(Ordering::Relaxed);
        for _ in 0..CHILDREN {
            let child = Command::new(env::current_exe().expect("this program"))
                .args(["--exact", "child_works_until_it_is_killed"])
                .env(FILE, &cleanup.path)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("this program starts");
            cleanup.children.push(child);
        }
        while steps.load(Ordering::Relaxed) < before + 2_000 + 777 * round {
            for child in &mut cleanup.children {
                assert!(child.try_wait().expect("it is ours").is_none(), "a child gave up: run it by hand");
            }
            thread::yield_now();
        }
        cleanup.kill_all();

        // What the dead held has references, and is found and freed by frame.
        let mut at = DevPfn::new(0);
        while let Some(pfn) = map.next_live(at) {
            while !map.put(pfn).is_freed() {}
            at = pfn;
        }
        // Each of the dead can have lost one allocation or one free, of a chunk at most.
        let mut runs: Vec<FrameRun> = Vec::new();
        while let Some(run) = map.alloc_run(CHUNK_FRAMES) {
            runs.push(run);
        }
        let got: u32 = runs.iter().map(|run| run.count).sum();
        let lost = FRAMES - got;
        let most = (round + 1) * CHILDREN * u64::from(CHUNK_FRAMES);
        assert!(u64::from(lost) <= most, "round {round}: {lost} frames are lost, of at most {most}");
        assert!(lost >= lost_in_all, "round {round}: lost frames came back: somebody else may have had them");
        lost_in_all = lost;
        let freed: u32 = runs.into_iter().map(|run| map.put_run(run, |_| ())).sum();
        assert_eq!(freed, got);
        assert!(map.live() <= lost, "{} frames are counted as live, {lost} are lost", map.live());
    }
    println!("{lost_in_all} of {FRAMES} frames were lost in {} kills", ROUNDS * CHILDREN);
}
