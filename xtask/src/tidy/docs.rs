//! Rules about the documents.

use std::collections::BTreeSet;

use super::{Problem, SourceFile, Tree, code::has_word};

/// Decisions are numbered from 0001 without gaps or doubles, and the heading repeats the number.
pub fn adr_numbers(tree: &Tree) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut expected = 1;
    let mut adrs: Vec<_> = tree.markdown().filter(|file| file.path.starts_with("docs/adr/")).collect();
    adrs.sort_by(|a, b| a.path.cmp(&b.path));
    for file in adrs {
        let name = &file.path["docs/adr/".len()..];
        if name == "README.md" {
            continue;
        }
        let number =
            name.get(..4).filter(|_| name.get(4..5) == Some("-")).and_then(|digits| digits.parse::<u32>().ok());
        match number {
            None => problems.push(file.problem(0, "a decision is named NNNN-title.md")),
            Some(number) => {
                if number != expected {
                    problems.push(file.problem(0, format!("decision {number:04} where {expected:04} was due")));
                }
                if !file.text.starts_with(&format!("# {number:04}: ")) {
                    problems.push(file.problem(1, format!("the heading is to begin with `# {number:04}: `")));
                }
                expected = number + 1;
            }
        }
    }
    problems
}

const GLOSSARY: &str = "docs/glossary.md";

/// What the glossary calls a type or function of ours is one, terms are listed once, and a link to the glossary that
/// names a term names one that it has.
pub fn glossary(tree: &Tree) -> Vec<Problem> {
    let Some(file) = tree.get(GLOSSARY) else { return vec![missing(GLOSSARY)] };
    let mut problems = Vec::new();
    let mut terms = BTreeSet::new();
    for (line, cells) in rows(file) {
        let Some(ours) = cells.first() else { continue };
        if *ours == "Ours" {
            continue;
        }
        if !terms.insert(ours.to_lowercase()) {
            problems.push(file.problem(line, format!("`{ours}` is explained twice")));
        }
        // The second column speaks of the kernel. The first and the third speak of us.
        for name in [ours, cells.last().unwrap_or(ours)].into_iter().flat_map(|cell| code_spans(cell)) {
            let is_type = name.starts_with(char::is_uppercase) && name.contains(char::is_lowercase);
            if is_type && !tree.rust().any(|source| has_word(&source.code, name)) {
                problems.push(file.problem(line, format!("no code of ours names a `{name}`")));
            }
        }
    }
    for source in tree.markdown() {
        for (line, text, target) in links_of(source) {
            let to_glossary = target == "glossary.md" || target.ends_with("/glossary.md");
            let term = text.trim_matches(['*', '`']).to_lowercase();
            if to_glossary && term != "glossary" && !term.ends_with(".md") && !terms.contains(&term) {
                problems.push(source.problem(line, format!("the glossary has no `{term}`")));
            }
        }
    }
    problems
}

const FEATURES: &str = "docs/features.md";

/// Every *yes* and *partly* of the feature table names a test function that exists; every row is there, in order.
pub fn features(tree: &Tree) -> Vec<Problem> {
    let Some(file) = tree.get(FEATURES) else { return vec![missing(FEATURES)] };
    let mut problems = Vec::new();
    let mut expected = 1;
    for (line, cells) in rows(file) {
        let Some(number) = cells.first().and_then(|cell| cell.parse::<u32>().ok()) else { continue };
        if number != expected {
            problems.push(file.problem(line, format!("row {number} where {expected} was due")));
        }
        expected = number + 1;
        let [.., state, shown_by] = cells.as_slice() else { continue };
        let tests = code_spans(shown_by);
        match *state {
            "yes" | "partly" => {
                if tests.is_empty() {
                    problems.push(file.problem(line, format!("row {number} says {state} and names no test")));
                }
            }
            "planned" | "-" => {}
            other => problems.push(file.problem(line, format!("row {number}: `{other}` is no state"))),
        }
        for test in tests {
            if !is_test(tree, test) {
                problems.push(file.problem(line, format!("row {number}: there is no test `{test}`")));
            }
        }
    }
    problems
}

/// Whether `path::function` is a function that follows an attribute which makes it a test.
fn is_test(tree: &Tree, name: &str) -> bool {
    let Some((path, function)) = name.split_once("::") else { return false };
    let Some(file) = tree.get(path) else { return false };
    let signature = format!("fn {function}");
    let mut marked = false;
    for line in file.text.lines().map(str::trim) {
        if line.starts_with("#[test]") {
            marked = true;
        } else if line.contains("fn ") && !line.starts_with("//") {
            if marked && has_word(line, &signature) {
                return true;
            }
            marked = false;
        }
    }
    // Property tests carry the attribute inside a macro and are found above; shell and Python tests have none.
    !file.is_rust() && has_word(&file.text, function)
}

/// A link within the tree leads somewhere.
pub fn links(tree: &Tree) -> Vec<Problem> {
    let mut problems = Vec::new();
    for file in tree.markdown() {
        for (line, _, target) in links_of(file) {
            if target.contains("://") || target.starts_with('#') || target.starts_with("mailto:") {
                continue;
            }
            let path = target.split('#').next().unwrap_or_default();
            let directory = file.path.rsplit_once('/').map_or("", |(directory, _)| directory);
            match resolve(directory, path) {
                Some(path) if tree.holds(&path) => {}
                _ => problems.push(file.problem(line, format!("the link to `{target}` leads nowhere"))),
            }
        }
    }
    problems
}

fn missing(path: &str) -> Problem {
    Problem { path: path.to_owned(), line: 0, text: "the file is missing".to_owned() }
}

/// `path` as seen from `directory`, without `.` and `..`; `None` where it leaves the tree.
fn resolve(directory: &str, path: &str) -> Option<String> {
    let mut parts: Vec<&str> = directory.split('/').filter(|part| !part.is_empty()).collect();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// Rows of the file's tables, with their line numbers, cells trimmed; without the rules below headings.
fn rows(file: &SourceFile) -> impl Iterator<Item = (usize, Vec<&str>)> {
    file.text.lines().enumerate().filter_map(|(number, line)| {
        let inner = line.trim().strip_prefix('|')?.strip_suffix('|')?;
        let cells: Vec<_> = inner.split('|').map(str::trim).collect();
        let rule = cells.iter().all(|cell| cell.chars().all(|c| c == '-' || c == ':') && cell.len() > 1);
        (!rule).then_some((number + 1, cells))
    })
}

/// What stands between single backticks.
fn code_spans(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// `(line, text, target)` of each inline link outside code blocks.
fn links_of(file: &SourceFile) -> Vec<(usize, &str, &str)> {
    let mut links = Vec::new();
    let mut in_code = false;
    for (number, line) in file.text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        for (at, _) in line.match_indices("](") {
            let Some(target) = line[at + 2..].split(')').next() else { continue };
            let text = line[..at].rsplit('[').next().unwrap_or_default();
            links.push((number + 1, text, target));
        }
    }
    links
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::tree;

    #[test]
    fn decisions_have_no_gaps() {
        let good = tree(&[("docs/adr/0001-a.md", "# 0001: A\n"), ("docs/adr/0002-b.md", "# 0002: B\n")]);
        assert_eq!(adr_numbers(&good), []);
        let gap = tree(&[("docs/adr/0001-a.md", "# 0001: A\n"), ("docs/adr/0003-b.md", "# 0003: B\n")]);
        assert_eq!(adr_numbers(&gap).len(), 1);
        let twice = tree(&[("docs/adr/0001-a.md", "# 0001: A\n"), ("docs/adr/0001-b.md", "# 0001: B\n")]);
        assert_eq!(adr_numbers(&twice).len(), 1);
        assert_eq!(adr_numbers(&tree(&[("docs/adr/first.md", "# A\n")])).len(), 1);
        assert_eq!(adr_numbers(&tree(&[("docs/adr/0001-a.md", "# A\n")])).len(), 1);
    }

    #[test]
    fn the_glossary_names_what_exists_once() {
        let text = "| Ours | Kernel | Difference |\n|--|--|--|\n| mm | `Foreign` | Our `Mm`. |\n";
        assert_eq!(glossary(&tree(&[(GLOSSARY, text), ("a.rs", "struct Mm;")])), []);
        assert_eq!(glossary(&tree(&[(GLOSSARY, text), ("a.rs", "struct Other;")])).len(), 1);
        let twice = format!("{text}| mm | none | Again. |\n");
        assert_eq!(glossary(&tree(&[(GLOSSARY, &twice), ("a.rs", "struct Mm;")])).len(), 1);
    }

    #[test]
    fn a_term_that_is_referred_to_is_in_the_glossary() {
        let text = "| Ours | Kernel | Difference |\n|--|--|--|\n| staging | none | Ours. |\n";
        let with = |link: &str| glossary(&tree(&[(GLOSSARY, text), ("README.md", link)])).len();
        assert_eq!(with("[*staging*](docs/glossary.md) and [the words](docs/words.md)"), 0);
        assert_eq!(with("[*stagnation*](docs/glossary.md)"), 1);
    }

    #[test]
    fn a_yes_needs_a_test_that_exists() {
        let row =
            |state: &str, by: &str| format!("| # | F | uhmm | Shown by |\n|--|--|--|--|\n| 1 | f | {state} | {by} |\n");
        let code = "fn helper() {}\n#[test]\n#[should_panic]\nfn works() {}\n";
        let check = |text: &str| features(&tree(&[(FEATURES, text), ("t.rs", code)])).len();
        assert_eq!(check(&row("yes", "`t.rs::works`")), 0);
        assert_eq!(check(&row("planned", "")), 0);
        assert_eq!(check(&row("yes", "")), 1);
        assert_eq!(check(&row("yes", "`t.rs::helper`")), 1);
        assert_eq!(check(&row("yes", "`t.rs::work`")), 1);
        assert_eq!(check(&row("yes", "`gone.rs::works`")), 1);
        assert_eq!(check(&row("maybe", "")), 1);
        assert_eq!(check(&row("-", "").replace("| 1 |", "| 2 |")), 1);
    }

    #[test]
    fn dead_links_are_found() {
        let check = |text: &str| links(&tree(&[("docs/a.md", text), ("docs/b.md", ""), ("c/d.rs", "")])).len();
        assert_eq!(check("[b](b.md) [d](../c/d.rs) [c](../c) [x](https://docs.kernel.org/) [h](#h)"), 0);
        assert_eq!(check("[b](c.md)"), 1);
        assert_eq!(check("[b](../../b.md)"), 1);
        assert_eq!(check("```\n[b](c.md)\n```"), 0);
    }
}
