//! Rules about what must not get into the tree.

use super::{Problem, Tree};

/// Code is ASCII: what looks like a space, a quote or a letter is one. Documents may use what they need.
pub fn ascii(tree: &Tree) -> Vec<Problem> {
    let mut problems = Vec::new();
    for file in tree.files.iter().filter(|file| !file.is_markdown() && !file.path.starts_with("LICENSE")) {
        for (number, line) in file.text.lines().enumerate() {
            if let Some(c) = line.chars().find(|c| !c.is_ascii() || (c.is_ascii_control() && *c != '\t')) {
                problems.push(file.problem(number + 1, format!("U+{:04X} in code", u32::from(c))));
            }
        }
    }
    problems
}

/// Sites that documents and comments may point to, with what is below them: documentation for everybody.
const HOSTS: &[&str] = &[
    "apache.org",
    "doc.rust-lang.org",
    "docs.kernel.org",
    "docs.rs",
    "git.kernel.org",
    "lwn.net",
    "man7.org",
    "opensource.org",
    "www.apache.org",
    "www.kernel.org",
];

/// The index that cargo writes into every lock file.
const INDEX: &str = concat!("registry+https:", "//github.com/rust-lang/crates.io-index");

/// Addresses in committed files lead to public documentation only; in particular, none names a registry or a mirror of one.
pub fn hosts(tree: &Tree) -> Vec<Problem> {
    let mut problems = Vec::new();
    for file in &tree.files {
        for (number, line) in file.text.lines().enumerate() {
            let line = if file.path == "Cargo.lock" { line.replace(INDEX, "") } else { line.to_owned() };
            for (at, separator) in line.match_indices("://") {
                let rest = &line[at + separator.len()..];
                let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '.' && c != '-').unwrap_or(rest.len());
                let host = rest[..end].trim_end_matches('.');
                if !host.is_empty() && !HOSTS.contains(&host) {
                    problems.push(file.problem(number + 1, format!("`{host}` is not among the sites to point to")));
                }
            }
        }
    }
    problems
}

/// No cargo setting leads to another registry than the standard one.
pub fn registries(tree: &Tree) -> Vec<Problem> {
    const SETTINGS: &[&str] = &["[source", "[registries", "[registry", "replace-with", "registry =", "index ="];
    let mut problems = Vec::new();
    let manifests = tree.files.iter().filter(|file| file.path.ends_with(".toml") && file.path != "deny.toml");
    for file in manifests {
        for (number, line) in file.text.lines().enumerate() {
            if SETTINGS.iter().any(|setting| line.trim_start().starts_with(setting) || line.contains(", registry =")) {
                problems.push(file.problem(number + 1, "a registry setting belongs into the user's configuration"));
            }
        }
    }
    problems
}

/// Directories so common that a path below them says nothing about a machine.
const COMMON: &[&str] = &["/", "/home", "/mnt", "/opt", "/root", "/src", "/srv", "/tmp", "/usr", "/var", "/var/tmp"];

/// No file holds the path of the machine on which it was written. The tree looks for its own place and its parent's.
pub fn machine_paths(tree: &Tree) -> Vec<Problem> {
    let places: Vec<String> = tree
        .root
        .ancestors()
        .take(2)
        .filter_map(|place| place.to_str())
        .filter(|place| !COMMON.contains(place))
        .map(|place| format!("{place}/"))
        .collect();
    let mut problems = Vec::new();
    for file in &tree.files {
        for (number, line) in file.text.lines().enumerate() {
            let named = places.iter().any(|place| {
                line.match_indices(place.as_str()).any(|(at, _)| {
                    // Not as the tail of another path or word.
                    !line[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || "._-/".contains(c))
                })
            });
            if named {
                problems.push(file.problem(number + 1, "a path of this machine"));
            }
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::tree;

    #[test]
    fn code_is_ascii_and_documents_need_not_be() {
        assert_eq!(ascii(&tree(&[("a.rs", "let a = 'x';\n// na\u{ef}ve\n")]))[0].line, 2);
        assert_eq!(ascii(&tree(&[("a.md", "na\u{ef}ve")])), []);
    }

    #[test]
    fn only_known_sites_are_named() {
        let check = |path: &str, text: &str| hosts(&tree(&[(path, text)])).len();
        assert_eq!(check("a.md", "see <https://docs.kernel.org/mm/hmm.html>."), 0);
        assert_eq!(check("a.md", concat!("get it from https:", "//packages.example.com/simple")), 1);
        assert_eq!(check("Cargo.lock", &format!("source = \"{INDEX}\"")), 0);
        assert_eq!(check("Cargo.lock", concat!("source = \"registry+https:", "//mirror.example/index\"")), 1);
        assert_eq!(check("a.md", &format!("source = \"{INDEX}\"")), 1);
    }

    #[test]
    fn registry_settings_are_found() {
        let check = |text: &str| registries(&tree(&[("Cargo.toml", text)])).len();
        assert_eq!(check("[dependencies]\na = \"1\"\n"), 0);
        assert_eq!(check("[registries.mine]\n"), 1);
        assert_eq!(check("a = { version = \"1\", registry = \"mine\" }\n"), 1);
    }

    #[test]
    fn the_place_of_the_tree_is_not_named_in_it() {
        let check = |text: &str| machine_paths(&tree(&[("a.md", text)])).len();
        assert_eq!(check("it lies in /nowhere/in/particular/docs"), 1);
        assert_eq!(check("beside it, in /nowhere/in/other"), 1);
        assert_eq!(check("somewhere/nowhere/in/other and /nowhere/else"), 0);
    }
}
