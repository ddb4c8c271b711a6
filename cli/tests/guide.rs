//! The commands that README and the guide show: the program knows them and all their options.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::path::Path;
use std::process::Command;

/// The arguments of each command of the program in a page's blocks of code.
fn commands(page: &str) -> Vec<Vec<String>> {
    let blocks = page.split("```").skip(1).step_by(2);
    let text = blocks.collect::<String>().replace("\\\n", " ");
    let mut commands = Vec::new();
    for line in text.lines() {
        let line = line.split(" #").next().unwrap_or_default();
        let mut words = line.split_whitespace().skip_while(|word| word.contains('='));
        match (words.next(), line) {
            (Some("ckpt-engine" | "target/release/ckpt-engine"), _) => {}
            (Some("cargo"), line) if line.starts_with("cargo run --release -- ") => {
                words.by_ref().take(3).for_each(drop);
            }
            _ => continue,
        }
        let words = words.take_while(|word| !["|", ">", "&", "&&"].contains(word));
        // `[--option]` may be left out, of `a|b` either will do, and `…` are others.
        let words =
            words.filter(|word| *word != "…").map(|word| word.trim_matches(['[', ']', ';']));
        let words = words.map(|word| match word.split('|').next().unwrap_or_default() {
            "MODEL" => "tiny-moe".to_owned(),
            "TRAINERS" => "fsdp=2".to_owned(),
            word => word.to_owned(),
        });
        commands.push(words.collect());
    }
    commands
}

#[test]
fn the_program_takes_every_command_that_a_page_shows() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let docs = std::fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let pages = docs.chain([root.join("README.md")]);
    let pages = pages.filter(|path| path.extension().is_some_and(|ending| ending == "md"));
    let mut taken = 0;
    for page in pages {
        for arguments in commands(&std::fs::read_to_string(&page).unwrap()) {
            let mut program = Command::new(env!("CARGO_BIN_EXE_ckpt-engine"));
            // Options are read in their order: what comes before `--help` has to be right.
            let output = program.args(&arguments).arg("--help").output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{}: {arguments:?}: {said}", page.display());
            taken += 1;
        }
    }
    assert!(taken > 20, "only {taken} commands were found");
}
