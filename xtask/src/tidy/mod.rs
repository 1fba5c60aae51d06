//! The house rules that no compiler checks, as a program.
//!
//! Each rule reads the tree and reports places; none changes anything. A rule is a function over [`Tree`] and has a test
//! that shows it failing.

mod code;
mod docs;
mod hygiene;
mod rust;

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

/// A broken rule and its place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    path: String,
    line: usize,
    text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line == 0 {
            write!(f, "{}: {}", self.path, self.text)
        } else {
            write!(f, "{}:{}: {}", self.path, self.line, self.text)
        }
    }
}

/// One text file of the tree.
#[derive(Debug, Clone)]
pub struct SourceFile {
    /// Path from the top of the tree, with `/` between its parts.
    path: String,
    text: String,
    /// The text without comments and the contents of literals, line for line. Rust files only; else empty.
    code: String,
}

impl SourceFile {
    fn new(path: &str, text: &str) -> Self {
        let code = if path.ends_with(".rs") { code::strip(text) } else { String::new() };
        Self { path: path.to_owned(), text: text.to_owned(), code }
    }

    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    fn is_markdown(&self) -> bool {
        self.path.ends_with(".md")
    }

    fn problem(&self, line: usize, text: impl Into<String>) -> Problem {
        Problem { path: self.path.clone(), line, text: text.into() }
    }
}

/// The text files that are, or would be, committed.
#[derive(Debug, Default)]
pub struct Tree {
    root: PathBuf,
    files: Vec<SourceFile>,
}

impl Tree {
    /// Reads the files that git follows in the tree at `root`, or all of them where there is no git.
    fn read(root: &Path) -> Result<Self> {
        let mut files = Vec::new();
        for path in paths(root)? {
            // Deleted but not yet committed so, or not text: nothing to check.
            let Ok(bytes) = fs::read(root.join(&path)) else { continue };
            if let Ok(text) = String::from_utf8(bytes) {
                files.push(SourceFile::new(&path, &text));
            }
        }
        Ok(Self { root: root.to_owned(), files })
    }

    fn get(&self, path: &str) -> Option<&SourceFile> {
        self.files.iter().find(|file| file.path == path)
    }

    /// Whether the tree holds this file, or files below this directory.
    fn holds(&self, path: &str) -> bool {
        let path = path.trim_end_matches('/');
        self.files.iter().any(|file| {
            file.path.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) || path.is_empty()
        })
    }

    fn rust(&self) -> impl Iterator<Item = &SourceFile> {
        self.files.iter().filter(|file| file.is_rust())
    }

    fn markdown(&self) -> impl Iterator<Item = &SourceFile> {
        self.files.iter().filter(|file| file.is_markdown())
    }
}

fn paths(root: &Path) -> Result<Vec<String>> {
    let git = Command::new("git").args(["ls-files", "-z"]).current_dir(root).output();
    if let Ok(output) = git
        && output.status.success()
        && !output.stdout.is_empty()
    {
        let list = String::from_utf8(output.stdout).context("a file name is not UTF-8")?;
        return Ok(list.split_terminator('\0').map(str::to_owned).collect());
    }
    let mut found = Vec::new();
    walk(root, "", &mut found)?;
    Ok(found)
}

fn walk(root: &Path, below: &str, found: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(root.join(below))? {
        let entry = entry?;
        let name = entry.file_name().into_string().ok().context("a file name is not UTF-8")?;
        let path = if below.is_empty() { name.clone() } else { format!("{below}/{name}") };
        if entry.file_type()?.is_dir() {
            if name != "target" && name != ".git" {
                walk(root, &path, found)?;
            }
        } else {
            found.push(path);
        }
    }
    Ok(())
}

/// All rules.
const RULES: &[fn(&Tree) -> Vec<Problem>] = &[
    rust::unsafety,
    rust::forbidden_words,
    rust::file_length,
    docs::adr_numbers,
    docs::glossary,
    docs::features,
    docs::links,
    hygiene::ascii,
    hygiene::hosts,
    hygiene::registries,
    hygiene::machine_paths,
];

/// Checks every rule on the tree at `root`.
///
/// # Errors
/// The tree could not be read. Broken rules are no error; they are what is returned.
pub fn check(root: &Path) -> Result<Vec<Problem>> {
    let tree = Tree::read(root)?;
    let mut problems: Vec<_> = RULES.iter().flat_map(|rule| rule(&tree)).collect();
    problems.sort();
    Ok(problems)
}

/// A tree made of `(path, text)`, for tests of rules.
#[cfg(test)]
fn tree(files: &[(&str, &str)]) -> Tree {
    Tree {
        root: PathBuf::from("/nowhere/in/particular"),
        files: files.iter().map(|(path, text)| SourceFile::new(path, text)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_keeps_the_house_rules() {
        let problems = check(crate::root()).unwrap();
        let list: String = problems.iter().map(|problem| format!("{problem}\n")).collect();
        assert!(problems.is_empty(), "\n{list}");
    }

    #[test]
    fn the_tree_is_read_at_all() {
        let tree = Tree::read(crate::root()).unwrap();
        assert!(tree.get("xtask/src/tidy/mod.rs").is_some() && tree.holds("crates/uhmm") && !tree.holds("crates/uhm"));
    }
}
