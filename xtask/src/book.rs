//! `cargo xtask book`: the user guide in docs/.
//!
//! mdBook builds pages whose links lead nowhere without a word, so these are looked for here: pages that
//! are missing, broken links and anchors, code that is included and not there, errors that no code says.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::stage;
use crate::setup::{self, Purpose};
use crate::workspace::Workspace;
use crate::{Result, tools};

/// Checks the book, and builds it into the target folder.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    let problems = problems(workspace.root())?;
    if !problems.is_empty() {
        return Err(problems.join("\n"));
    }
    println!("docs: all links, anchors, included code and quoted errors are there");
    setup::prepare(workspace, &[Purpose::Book])?;
    let mut mdbook = Command::new(tools::mdbook(workspace));
    mdbook.arg("build").arg(workspace.root().join("docs"));
    mdbook.arg("--dest-dir").arg(workspace.target().join("book"));
    stage("book", mdbook)
}

/// What is wrong with the book, and with the links of README and CONTRIBUTING.
fn problems(root: &Path) -> Result<Vec<String>> {
    let docs = root.join("docs");
    let summary = docs.join("SUMMARY.md");
    let mut problems = Vec::new();
    let listed: BTreeSet<PathBuf> =
        links(&read(&summary)?).into_iter().map(|link| docs.join(link)).collect();
    let mut pages = vec![summary.clone(), root.join("README.md"), root.join("CONTRIBUTING.md")];
    let entries = fs::read_dir(&docs).map_err(|error| format!("{}: {error}", docs.display()))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_some_and(|extension| extension == "md") && path != summary {
            if !listed.contains(&path) {
                problems.push(format!("{}: SUMMARY.md does not list it", path.display()));
            }
            pages.push(path);
        }
    }
    pages.sort();
    for page in &pages {
        let text = read(page)?;
        let wrong = links(&text).into_iter().filter_map(|link| broken_link(page, &text, &link));
        let missing = includes(&text).into_iter().filter_map(|path| broken_include(page, &path));
        problems
            .extend(wrong.chain(missing).map(|problem| format!("{}: {problem}", page.display())));
    }
    problems.extend(errors_that_nobody_says(root)?);
    problems.extend(picture_of_another_text(root)?);
    Ok(problems)
}

/// What is wrong if a picture is not what its text says.
fn picture_of_another_text(root: &Path) -> Result<Option<String>> {
    let (text, picture) = (root.join("docs/update.txt"), root.join("docs/update.svg"));
    if !text.is_file() {
        return Ok(None);
    }
    let mut draw = Command::new("python3");
    draw.arg(root.join("xtask/tools/sequence.py")).arg(&text);
    let drawn = draw.output().map_err(|error| format!("python3: {error}"))?;
    let is_same = drawn.status.success() && read(&picture)?.as_bytes() == drawn.stdout;
    let remedy = "docs/update.svg: python3 xtask/tools/sequence.py docs/update.txt > docs/update.svg draws it anew";
    Ok((!is_same).then(|| remedy.to_owned()))
}

/// The page that leads from an error's text to its remedy.
const TROUBLESHOOTING: &str = "docs/troubleshooting.md";

/// Texts in the first columns of that page's tables that are nowhere in the code.
fn errors_that_nobody_says(root: &Path) -> Result<Vec<String>> {
    let page = root.join(TROUBLESHOOTING);
    let Ok(text) = fs::read_to_string(&page) else { return Ok(Vec::new()) };
    let mut code = String::new();
    gather_code(root, &mut code)?;
    let first_columns = text.lines().filter_map(|line| line.strip_prefix('|')?.split('|').next());
    let quoted = first_columns.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    let unsaid = quoted.filter(|quoted| !code.contains(*quoted));
    Ok(unsaid.map(|quoted| format!("{}: no code says `{quoted}`", page.display())).collect())
}

/// The code of all crates, with texts that go on in the next line put together.
fn gather_code(folder: &Path, code: &mut String) -> Result<()> {
    let failed = |error| format!("{}: {error}", folder.display());
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && name != "tests" && !name.starts_with('.') {
                gather_code(&path, code)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = read(&path)?;
            let mut goes_on = false;
            for line in text.lines() {
                let line = if goes_on { line.trim_start() } else { line };
                goes_on = line.ends_with('\\');
                code.push_str(line.trim_end_matches('\\'));
                if !goes_on {
                    code.push('\n');
                }
            }
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Lines outside of blocks of code.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut code = false;
    text.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        code ^= fence;
        !code && !fence
    })
}

/// The targets of links.
fn links(text: &str) -> Vec<String> {
    let mut links = Vec::new();
    for line in prose(text) {
        for rest in line.split("](").skip(1) {
            if let Some((target, _)) = rest.split_once(')') {
                links.push(target.to_owned());
            }
        }
    }
    links
}

fn broken_link(page: &Path, text: &str, link: &str) -> Option<String> {
    if link.starts_with("https://") || link.starts_with("http://") {
        return None;
    }
    let (path, anchor) = link.split_once('#').map_or((link, None), |(p, a)| (p, Some(a)));
    let target = page.parent()?.join(path);
    if !path.is_empty() && !target.exists() {
        return Some(format!("the link {link} leads nowhere"));
    }
    let anchor = anchor?;
    let there = match path.is_empty() {
        true => headings(text).contains(anchor),
        false => headings(&fs::read_to_string(&target).unwrap_or_default()).contains(anchor),
    };
    (!there).then(|| format!("{link}: there is no such heading"))
}

/// The anchors that mdBook and GitHub give to headings.
fn headings(text: &str) -> BTreeSet<String> {
    prose(text)
        .filter(|line| line.starts_with('#'))
        .map(|line| {
            let title = line.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
            title.chars().filter(|c| c.is_alphanumeric() || ['-', '_'].contains(c)).collect()
        })
        .collect()
}

/// What mdBook is told to include.
fn includes(text: &str) -> Vec<String> {
    let parts = text.split("{{#include ").skip(1);
    parts.filter_map(|rest| Some(rest.split_once("}}")?.0.to_owned())).collect()
}

fn broken_include(page: &Path, include: &str) -> Option<String> {
    let (path, anchor) = include.split_once(':').map_or((include, None), |(p, a)| (p, Some(a)));
    let Ok(text) = fs::read_to_string(page.parent()?.join(path)) else {
        return Some(format!("{path}, which it includes, is not there"));
    };
    let anchor = anchor?;
    let line = |mark: &str| {
        text.lines().position(|line| line.trim_end().ends_with(&format!("{mark}: {anchor}")))
    };
    match (line("ANCHOR"), line("ANCHOR_END")) {
        (Some(start), Some(end)) if start + 1 < end => None,
        _ => Some(format!("{path} has nothing between ANCHOR and ANCHOR_END: {anchor}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_book_has_no_broken_links_and_no_missing_code() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        assert_eq!(problems(&root), Ok(vec![]));
    }

    #[test]
    fn links_includes_and_pages_that_are_missing_are_found() {
        let root = std::env::temp_dir().join(format!("xtask-book-{}", std::process::id()));
        let docs = root.join("docs");
        fs::create_dir_all(&docs).expect("a folder");
        let write = |path: &str, text: &str| fs::write(root.join(path), text).expect("a file");
        write("README.md", "[a](docs/a.md#first-one), [b](docs/a.md#second), [c](docs/c.md)");
        write("CONTRIBUTING.md", "```\n[not a link](nowhere.md)\n```\n[web](https://x.example/y)");
        write("docs/SUMMARY.md", "- [A](a.md)\n- [Gone](gone.md)\n- [T](troubleshooting.md)");
        write("docs/a.md", "# First, `one`\n{{#include ../x.rs:full}}{{#include ../x.rs:empty}}");
        write("docs/lonely.md", "{{#include ../y.rs}}");
        write(
            TROUBLESHOOTING,
            "| `one of two`, `a long one` | why |\n|---|---|\n| x `unsaid` | `y` |",
        );
        write("crate.rs", "const A: &str = \"one of two\"; const B: &str = \"a long \\\n   one\";");
        write(
            "x.rs",
            "// ANCHOR: full\n1\n// ANCHOR_END: full\n// ANCHOR: empty\n// ANCHOR_END: empty",
        );
        let found = problems(&root).expect("pages").join("\n");
        fs::remove_dir_all(&root).expect("it was there");
        for problem in [
            "README.md: docs/a.md#second: there is no such heading",
            "README.md: the link docs/c.md leads nowhere",
            "SUMMARY.md: the link gone.md leads nowhere",
            "lonely.md: SUMMARY.md does not list it",
            "lonely.md: ../y.rs, which it includes, is not there",
            "troubleshooting.md: no code says `unsaid`",
            "a.md: ../x.rs has nothing between ANCHOR and ANCHOR_END: empty",
        ] {
            assert!(found.contains(problem), "{problem} is not among\n{found}");
        }
        assert_eq!(found.lines().count(), 7, "{found}");
    }
}
