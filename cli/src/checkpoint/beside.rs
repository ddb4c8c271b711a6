//! What belongs to a model beside its shards: tokenizers, templates, code, folders of modules.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use engine_core::{Error, ErrorKind, Result};
use serde_json::Value;

use super::{Checkpoint, JsonText};

/// The deepest folder that is looked into.
const DEEPEST: usize = 32;

/// The files of a model's folder that are not the checkpoint itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Beside {
    /// What belongs to the model, by its path in the folder.
    pub copied: BTreeSet<PathBuf>,
    /// Those of them that have weights, which no conversion changes.
    pub weights: BTreeSet<PathBuf>,
    /// What does not belong to it, and why.
    pub left_out: Vec<(PathBuf, &'static str)>,
}

impl Beside {
    /// Looks through the folder of a checkpoint.
    ///
    /// # Errors
    ///
    /// `Io` for what cannot be read; `Source` for a link that leads nowhere, as an interrupted download
    /// leaves them, and for folders that contain themselves.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let folder = checkpoint.folder();
        let (found, above, others) = (Self::default(), Vec::new(), BTreeSet::new());
        let mut walk = Walk { folder, checkpoint, found, above, others };
        walk.others = walk.indexed_by_others()?;
        walk.folder(Path::new(""))?;
        Ok(walk.found)
    }
}

struct Walk<'a> {
    folder: &'a Path,
    checkpoint: &'a Checkpoint,
    found: Beside,
    /// The folders that the present one is in: device and inode.
    above: Vec<(u64, u64)>,
    /// The files that other indices name.
    others: BTreeSet<PathBuf>,
}

fn failed(path: &Path) -> impl Fn(std::io::Error) -> Error {
    let operation = format!("reading {}", path.display());
    move |error| Error::io(&*operation, error)
}

impl Walk<'_> {
    fn folder(&mut self, within: &Path) -> Result<()> {
        let path = self.folder.join(within);
        let about = std::fs::metadata(&path).map_err(failed(&path))?;
        let identity = (about.dev(), about.ino());
        if self.above.contains(&identity) || self.above.len() > DEEPEST {
            let message = format!("{} contains itself", path.display());
            return Err(Error::new(ErrorKind::Source, "reading the model's folder", message));
        }
        self.above.push(identity);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&path).map_err(failed(&path))? {
            names.push(entry.map_err(failed(&path))?.file_name());
        }
        names.sort();
        for name in names {
            self.entry(within.join(name))?;
        }
        self.above.pop();
        Ok(())
    }

    fn entry(&mut self, name: PathBuf) -> Result<()> {
        let text = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let is_top = name.parent().is_some_and(|parent| parent.as_os_str().is_empty());
        let path = self.folder.join(&name);
        let is_shard = self.checkpoint.shards().iter().any(|shard| shard.name() == name);
        if is_shard || is_top && self.is_own_index(&text) {
            return Ok(());
        }
        if text.starts_with(".unfinished-") {
            return Ok(());
        }
        let about = match std::fs::metadata(&path) {
            Ok(about) => about,
            Err(_) if text.starts_with('.') => {
                self.found.left_out.push((name, "it is hidden, and a link that leads nowhere"));
                return Ok(());
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let message = format!(
                    "{} is a link that leads nowhere: the model was not downloaded to the end",
                    path.display()
                );
                return Err(Error::new(ErrorKind::Source, "reading the model's folder", message));
            }
            Err(error) => return Err(failed(&path)(error)),
        };
        if let Some(reason) = self.foreign(&name, &text, is_top, &about) {
            self.found.left_out.push((name, reason));
            return Ok(());
        }
        if about.is_dir() {
            return self.folder(&name);
        }
        if is_weights(&text) {
            self.found.weights.insert(name.clone());
        }
        self.found.copied.insert(name);
        Ok(())
    }

    fn is_own_index(&self, name: &str) -> bool {
        let own = self.checkpoint.index().and_then(Path::file_name);
        own.is_some_and(|own| own == name)
    }

    /// Why something does not belong to the model as it is converted.
    fn foreign(
        &self,
        name: &Path,
        text: &str,
        is_top: bool,
        about: &Metadata,
    ) -> Option<&'static str> {
        if about.is_dir() {
            return text.starts_with('.').then_some("a hidden folder");
        }
        if !about.is_file() {
            return Some("not a regular file");
        }
        if self.others.contains(name) || is_top && is_index(text) {
            return Some("of another copy of the weights, which would be of another type");
        }
        let copies = ["pytorch_model", "consolidated", "tf_model", "flax_model", "rust_model"];
        let is_copy = copies.iter().any(|copy| text.starts_with(copy)) || text.ends_with(".gguf");
        (is_top && is_copy && (is_weights(text) || text.ends_with(".index.json")))
            .then_some("another copy of the weights, which would be of another type")
    }

    /// What the indices of the folder name that are not the checkpoint's.
    fn indexed_by_others(&self) -> Result<BTreeSet<PathBuf>> {
        let mut others = BTreeSet::new();
        for entry in std::fs::read_dir(self.folder).map_err(failed(self.folder))? {
            let path = entry.map_err(failed(self.folder))?.path();
            let text = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if !is_index(&text) || self.is_own_index(&text) {
                continue;
            }
            // What is no index names nothing.
            let Ok(index) = std::fs::read_to_string(&path) else { continue };
            let Ok(index) = JsonText::parse(index) else { continue };
            let map = index.get(&["weight_map"]);
            let files =
                map.as_ref().and_then(Value::as_object).into_iter().flat_map(|map| map.values());
            others.extend(files.filter_map(Value::as_str).map(PathBuf::from));
        }
        Ok(others)
    }
}

fn is_index(name: &str) -> bool {
    name.contains(".safetensors.index.") && name.ends_with(".json")
}

/// Whether a file has weights, by its name.
fn is_weights(name: &str) -> bool {
    let endings = [
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".h5",
        ".msgpack",
        ".ot",
        ".gguf",
        ".onnx",
    ];
    endings.iter().any(|ending| name.ends_with(ending))
}
