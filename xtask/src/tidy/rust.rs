//! Rules about Rust source.

use super::{
    Problem, SourceFile, Tree,
    code::{has_word, strip},
};

/// Lines in which a file must have said why it is allowed unsafe code.
const OPENING_LINES: usize = 30;

/// Unsafe code is allowed where the crate's root or the file itself opens with the comment that says what for, and every
/// crate either does so, or denies unsafe code.
pub fn unsafety(tree: &Tree) -> Vec<Problem> {
    let mut problems = Vec::new();
    for file in tree.rust() {
        let says_why = opens_with_unsafety(file);
        if says_why == Some(false) {
            problems
                .push(file.problem(0, "`// UNSAFETY:` must be followed by a sentence that says what it is needed for"));
        }
        let opted_in =
            says_why.is_some() || crate_root(tree, file).is_some_and(|root| opens_with_unsafety(root).is_some());
        if !opted_in && let Some(line) = file.code.lines().position(|line| has_word(line, "unsafe")) {
            problems.push(file.problem(line + 1, "unsafe code in a file that does not open with `// UNSAFETY:`"));
        }
        let is_root = file.path.ends_with("src/lib.rs") || file.path.ends_with("src/main.rs");
        let denies = ["#![forbid(unsafe_code)]", "#![deny(unsafe_code)]"].iter().any(|deny| file.code.contains(deny));
        if is_root && !denies && says_why.is_none() {
            problems.push(file.problem(0, "a crate forbids or denies unsafe code, or opens with `// UNSAFETY:`"));
        }
    }
    problems
}

/// Whether that comment stands near the top, and if so whether it has a sentence.
fn opens_with_unsafety(file: &SourceFile) -> Option<bool> {
    let mut lines = file.text.lines().take(OPENING_LINES);
    lines.find_map(|line| line.trim().strip_prefix("// UNSAFETY:")).map(|why| why.split_whitespace().count() >= 3)
}

/// The root of the library or program that a file in `src` belongs to. Tests, examples and benches are their own.
fn crate_root<'tree>(tree: &'tree Tree, file: &SourceFile) -> Option<&'tree SourceFile> {
    let (package, _) = file.path.split_once("/src/")?;
    ["lib.rs", "main.rs"].iter().find_map(|root| tree.get(&format!("{package}/src/{root}")))
}

/// What must not be committed: code that is not there yet, and tests that do not run.
pub fn forbidden_words(tree: &Tree) -> Vec<Problem> {
    const FORBIDDEN: &[(&str, &str)] = &[
        ("todo!", "`todo!`: write it or leave it out"),
        ("unimplemented!", "`unimplemented!`: write it or leave it out"),
        ("dbg!", "`dbg!`"),
        ("#[ignore", "an ignored test is no test: skip at run time and print why"),
    ];
    let mut problems = Vec::new();
    for file in tree.rust() {
        for (number, line) in file.code.lines().enumerate() {
            for (word, why) in FORBIDDEN {
                if line.contains(word) {
                    problems.push(file.problem(number + 1, *why));
                }
            }
        }
    }
    problems
}

/// Past this many lines of code there is a second noun in the file.
const CODE_LINES_MAX: usize = 800;

/// Long files say why they are long: `// LONG:` and the reason, near the top. Comments and the tests at the end are free.
pub fn file_length(tree: &Tree) -> Vec<Problem> {
    let mut problems = Vec::new();
    for file in tree.rust() {
        let before_tests = file.text.split("\n#[cfg(test)]\nmod ").next().unwrap_or_default();
        let lines = strip(before_tests).lines().filter(|line| !line.trim().is_empty()).count();
        let excused = file.text.lines().take(OPENING_LINES).any(|line| line.starts_with("// LONG: "));
        if lines > CODE_LINES_MAX && !excused {
            problems.push(file.problem(
                0,
                format!("{lines} lines of code; past {CODE_LINES_MAX} split it, or say why not in a `// LONG:` line"),
            ));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::tree;

    #[test]
    fn unsafe_code_needs_an_opening() {
        let bare = tree(&[
            ("a/src/lib.rs", "#![deny(unsafe_code)]\nmod m;\n"),
            ("a/src/m.rs", "fn f() {\n    unsafe { g() }\n}\n"),
        ]);
        assert_eq!(unsafety(&bare).iter().map(|p| (p.path.as_str(), p.line)).collect::<Vec<_>>(), [("a/src/m.rs", 2)]);

        let said = tree(&[
            ("a/src/lib.rs", "//! Doc.\n// UNSAFETY: this crate talks to the kernel.\nmod m;\n"),
            ("a/src/m.rs", "fn f() { unsafe { g() } }\n"),
            ("a/tests/t.rs", "// UNSAFETY: maps memory of its own.\nfn f() { unsafe { g() } }\n"),
        ]);
        assert_eq!(unsafety(&said), []);

        // A test is a crate of its own: the library's opening does not cover it.
        let test = tree(&[
            ("a/src/lib.rs", "// UNSAFETY: this crate talks to the kernel.\n"),
            ("a/tests/t.rs", "fn f() { unsafe { g() } }\n"),
        ]);
        assert_eq!(unsafety(&test).len(), 1);
    }

    #[test]
    fn an_empty_reason_is_none_and_a_crate_takes_a_side() {
        assert_eq!(unsafety(&tree(&[("a/src/lib.rs", "// UNSAFETY: yes\n")])).len(), 1);
        assert_eq!(unsafety(&tree(&[("a/src/lib.rs", "fn f() {}\n")])).len(), 1);
        assert_eq!(unsafety(&tree(&[("a/src/main.rs", "#![forbid(unsafe_code)]\n")])), []);
    }

    #[test]
    fn unfinished_code_and_ignored_tests_are_found_and_prose_is_not() {
        let bad = tree(&[("a.rs", "fn f() { todo!() }\n#[ignore = \"slow\"]\nfn g() {}\n")]);
        assert_eq!(forbidden_words(&bad).len(), 2);
        assert_eq!(forbidden_words(&tree(&[("a.rs", "// todo!\nconst A: &str = \"todo!\";\n")])), []);
    }

    #[test]
    fn a_long_file_says_why() {
        let long = "fn f() {}\n".repeat(CODE_LINES_MAX + 1);
        assert_eq!(file_length(&tree(&[("a.rs", &long)])).len(), 1);
        assert_eq!(file_length(&tree(&[("a.rs", &format!("// LONG: generated.\n{long}"))])), []);
        let comments = "// prose\n\n".repeat(CODE_LINES_MAX);
        assert_eq!(file_length(&tree(&[("a.rs", &format!("{comments}#[cfg(test)]\nmod tests {{\n{long}}}\n"))])), []);
    }
}
