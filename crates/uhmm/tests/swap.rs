//! Pages that the kernel has swapped out, on a small swap file of the test's own.
//
// UNSAFETY: the tests make, change and watch memory by raw system calls and pointers, and switch swap on and off.

#![allow(unsafe_code, reason = "tests make the memory that they then watch")]

#[expect(clippy::unnecessary_safety_comment, reason = "clippy reads the word UNSAFETY above as a safety comment")]
mod common;

use std::{
    ffi::CString,
    fs::{File, Permissions, remove_file, set_permissions},
    io::Write,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::PathBuf,
    process::Command,
};

use uhmm::{PageOutcome, mm::Location};
use uhmm_sys::pagemap::{Page, Pagemap};
use uhmm_testkit::{Skip, is_child, isolated};

use crate::common::kit::{Area, End, Shape, Via, World, fork_child, summary, virt, wait_for};

/// Swap, until this is dropped: by the process that waits for the test, whatever becomes of the test.
struct Swap(PathBuf);

impl Swap {
    fn new() -> Result<Self, String> {
        let path = std::env::temp_dir().join(format!("uhmm-swap-{}", std::process::id()));
        let swap = Self(path);
        let file = File::create(&swap.0).and_then(|mut file| (0..32).try_for_each(|_| file.write_all(&[0; 1 << 20])));
        file.and_then(|()| set_permissions(&swap.0, Permissions::from_mode(0o600)))
            .map_err(|error| error.to_string())?;
        let made = Command::new("mkswap").arg(&swap.0).output().map_err(|error| format!("mkswap: {error}"))?;
        if !made.status.success() {
            return Err(String::from_utf8_lossy(&made.stderr).into_owned());
        }
        // SAFETY: a path, which the kernel reads.
        if unsafe { libc::swapon(swap.path().as_ptr(), 0) } != 0 {
            return Err(std::io::Error::last_os_error().to_string());
        }
        Ok(swap)
    }

    fn path(&self) -> CString {
        CString::new(self.0.as_os_str().as_bytes()).unwrap()
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // SAFETY: a path, which the kernel reads. It fails where swapon has.
        unsafe { libc::swapoff(self.path().as_ptr()) };
        let _ = remove_file(&self.0);
    }
}

/// How many pages of the area are swapped out.
fn swapped(area: &Area) -> usize {
    let mut pages = vec![Page::empty(); area.pages];
    Pagemap::open().unwrap().scan(area.range(), &mut pages).unwrap();
    pages.iter().filter(|page| page.contains(Page::SWAPPED)).count()
}

/// An area that is mostly swapped out.
fn paged_out(shape: Shape) -> Result<Area, Skip> {
    let area = Area::filled(shape, 1, 1);
    (0..20).find(|_| {
        assert_eq!(Via::Libc.madvise(area.start, area.len(), libc::MADV_PAGEOUT), 0);
        swapped(&area) > area.pages / 2
    });
    let count = swapped(&area);
    if count == 0 {
        return Err(Skip("the kernel swaps nothing out here".to_owned()));
    }
    println!("{count} of {} pages are swapped out", area.pages);
    Ok(area)
}

#[test]
fn swapped_pages_leave_and_come_home_with_their_bytes() {
    let swap = (!is_child()).then(Swap::new);
    if let Some(Err(why)) = &swap {
        return println!("skipped: no swap can be had: {why}");
    }
    isolated!(|| {
        let world = World::new(16)?;
        for shape in [Shape::Small, Shape::Huge] {
            // To a device, and home by a touch.
            let area = paged_out(shape)?;
            let report = world.migrate(&area);
            assert_eq!(report.count(PageOutcome::Moved), area.pages, "{:?}", summary(&report));
            assert_eq!(swapped(&area), 0);
            area.check(1);
            area.unmap();
            // A child has the swapped pages too: they go, or stay, and both see their own.
            let area = paged_out(shape)?;
            let child = fork_child(|| {
                area.check(1);
                area.fill(2);
                area.check(2);
            });
            let report = world.migrate(&area);
            let left = report.count(PageOutcome::Moved) + report.count(PageOutcome::Pinned);
            assert_eq!(left, area.pages, "{:?}", summary(&report));
            assert_eq!(wait_for(child), End::Exit(0));
            area.check(1);
            // What is away can be asked to be swapped out, and what comes home after it is right.
            world.send(&area);
            assert_eq!(Via::Libc.madvise(area.start, area.len(), libc::MADV_PAGEOUT), 0);
            assert!(matches!(world.mm.residency(virt(area.page(3))).at, Location::Device(..)));
            area.check(1);
            area.unmap();
        }
        world.finish();
        Ok(())
    });
    drop(swap);
}
