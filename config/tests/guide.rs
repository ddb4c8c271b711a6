//! The configurations that README and the guide show.

use engine_config::{Format, parse};

/// Pages whose YAML is that of a Python program.
const OF_PYTHON: [&str; 2] = ["python.md", "verl.md"];

#[test]
fn every_configuration_that_a_page_shows_is_read() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut read = 0;
    for entry in std::fs::read_dir(root.join("docs")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if !name.ends_with(".md") || OF_PYTHON.contains(&name) {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for block in text.split("\n```yaml\n").skip(1) {
            let block = block.split("\n```").next().unwrap();
            let block = match block.trim().strip_prefix("{{#include ") {
                Some(file) => {
                    let file = path.parent().unwrap().join(file.trim_end_matches("}}"));
                    std::fs::read_to_string(file).unwrap()
                }
                None => block.to_owned(),
            };
            if let Err(error) = parse(&block, Format::Yaml) {
                panic!("{name}: {error}\n{block}");
            }
            read += 1;
        }
    }
    assert!(read > 5, "only {read} configurations were found");
}
