//! The examples run, and the document about the smallest device shows the code that runs.

#[path = "../examples/dying_device.rs"]
mod dying_device;
#[path = "../examples/pagerank.rs"]
#[allow(dead_code, reason = "the test names its own file instead of the example's arguments")]
mod pagerank;
#[path = "../examples/tiny_device.rs"]
mod tiny_device;

use std::{fmt::Write as _, fs, path::Path};

use uhmm_testkit::isolated;

#[test]
fn the_tiny_device_computes_what_the_cpu_computes() {
    isolated!(|| {
        tiny_device::main().unwrap();
        Ok(())
    });
}

#[test]
fn the_dying_device_loses_what_it_held_and_nothing_else() {
    isolated!(|| {
        dying_device::main().unwrap();
        Ok(())
    });
}

#[test]
fn the_device_ranks_a_package_list() {
    isolated!(|| {
        let list = "Package: app\nDepends: lib (>= 1), tool | other, lib2:any\n\n\
                    Package: lib\nPre-Depends: base\n\nPackage: tool\nDepends: lib\n\nPackage: base\n";
        pagerank::rank(list, 10).unwrap();
        Ok(())
    });
}

#[test]
fn the_device_ranks_a_graph_of_many_pages() {
    isolated!(|| {
        let mut arrows = String::new();
        let mut x = 1u64;
        for from in 0..20_000u64 {
            for _ in 0..from % 7 {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                writeln!(arrows, "n{from} n{}", (x >> 33) % 20_000).unwrap();
            }
        }
        pagerank::rank(&arrows, 5).unwrap();
        Ok(())
    });
}

/// The document walks through the file from its first line to its last: put together, its blocks are the file.
#[test]
fn the_document_shows_the_tiny_device_as_it_is() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| fs::read_to_string(here.join(path)).unwrap();
    let document = read("../../docs/write-a-device.md");
    let blocks: Vec<&str> =
        document.split("\n```rust\n").skip(1).map(|rest| rest.split_once("\n```").unwrap().0).collect();
    let lines = |text: &str| -> Vec<String> {
        text.lines().map(|line| line.trim_end().to_owned()).filter(|line| !line.is_empty()).collect()
    };
    let file = read("examples/tiny_device.rs");
    let code: Vec<String> = lines(&file).into_iter().filter(|line| !line.starts_with("//!")).collect();
    let shown: Vec<String> = blocks.iter().flat_map(|block| lines(block)).collect();
    let differs = (0..code.len().max(shown.len())).find(|&n| code.get(n) != shown.get(n));
    assert_eq!(differs, None, "{:?} is shown as {:?}", differs.map(|n| code.get(n)), differs.map(|n| shown.get(n)));
}
