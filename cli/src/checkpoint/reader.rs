//! Reading: a file, or a Hugging Face folder.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use engine_core::{TensorMeta, Weight};
use serde::Deserialize;

use super::CheckpointError;
use super::header::{Entries, Header};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const SUFFIX: &str = ".safetensors";
const INDEX_SUFFIX: &str = ".safetensors.index.json";
/// An index of a million tensors takes about 100 MB.
const MAX_INDEX_BYTES: u64 = 256 << 20;

/// A checkpoint whose files are mapped into memory; its weights share the mapping.
///
/// # Contract
///
/// Opening checks every header against its file, so that all weights lie within the files. No
/// tensor's bytes are read before somebody looks at them. The files must not be truncated while
/// the checkpoint or a weight of it is alive: like every program that maps files, this one then
/// dies of `SIGBUS`.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    index: Option<PathBuf>,
    shards: Vec<Shard>,
    entries: Vec<Entry>,
    by_name: HashMap<Arc<str>, usize>,
}

/// One file of a [`Checkpoint`].
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    name: PathBuf,
    metadata: BTreeMap<String, String>,
    bytes: Bytes,
}

#[derive(Debug)]
struct Entry {
    meta: TensorMeta,
    shard: usize,
    range: Range<usize>,
}

impl Shard {
    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its name in the checkpoint's [folder](Checkpoint::folder), which may have folders in it.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// The `__metadata__` of its header, such as `format: pt`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

impl Checkpoint {
    /// Opens a `.safetensors` file, or a Hugging Face folder.
    ///
    /// Of a folder it takes, as `transformers` does, `model.safetensors` if there is one, else the
    /// shards that `model.safetensors.index.json` names. Where there is neither, it takes the shards
    /// of the only other `*.safetensors.index.json`, else the only `.safetensors` file. The path of an
    /// index stands for the shards that it names.
    ///
    /// # Errors
    ///
    /// [`CheckpointError`] says what is wrong with which file and tensor.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn main() -> Result<(), cli::checkpoint::CheckpointError> {
    /// let checkpoint = cli::checkpoint::Checkpoint::open("Qwen2.5-0.5B-Instruct")?;
    /// for weight in checkpoint.weights() {
    ///     println!("{} {:?}", weight.name(), weight.meta().shape);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        let about =
            std::fs::metadata(path).map_err(|error| CheckpointError::io(path, "open", error))?;
        let mut checkpoint = Self {
            path: path.to_owned(),
            index: None,
            shards: Vec::new(),
            entries: Vec::new(),
            by_name: HashMap::new(),
        };
        if !about.is_dir() {
            if path.to_string_lossy().ends_with(INDEX_SUFFIX) {
                checkpoint.add_indexed(path)?;
            } else {
                checkpoint.add_shard(path.to_owned())?;
            }
            return Ok(checkpoint);
        }
        match find(path)? {
            Found::Single(file) => checkpoint.add_shard(file)?,
            Found::Index(index) => checkpoint.add_indexed(&index)?,
        }
        Ok(checkpoint)
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder that has the model: its shards, its `config.json` and everything else.
    pub fn folder(&self) -> &Path {
        if self.path.is_dir() {
            return &self.path;
        }
        match self.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        }
    }

    /// The index that names the shards, where there is one.
    pub fn index(&self) -> Option<&Path> {
        self.index.as_deref()
    }

    /// Whether it is a single file that was opened by its own name, and not as what a folder has.
    pub fn is_file(&self) -> bool {
        self.index.is_none() && !self.path.is_dir()
    }

    /// The number of tensors.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it has no tensor at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The bytes of all tensors together.
    pub fn byte_len(&self) -> u64 {
        self.entries.iter().map(|entry| entry.range.len() as u64).sum()
    }

    /// The files, in the order of their names.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The file that has a tensor.
    pub fn shard_of(&self, name: &str) -> Option<&Shard> {
        self.by_name.get(name).map(|&index| &self.shards[self.entries[index].shard])
    }

    /// The descriptions of all tensors, file by file, in the order of their data: reading them in
    /// this order reads the disk from front to back.
    pub fn metas(&self) -> impl ExactSizeIterator<Item = &TensorMeta> {
        self.entries.iter().map(|entry| &entry.meta)
    }

    /// All tensors, in the order of [`metas`](Self::metas). They share the mapped files.
    pub fn weights(&self) -> impl ExactSizeIterator<Item = Weight> + '_ {
        self.entries.iter().map(|entry| self.weight(entry))
    }

    /// A tensor by its name.
    pub fn get(&self, name: &str) -> Option<Weight> {
        self.by_name.get(name).map(|&index| self.weight(&self.entries[index]))
    }

    /// The description of a tensor by its name.
    pub fn meta(&self, name: &str) -> Option<&TensorMeta> {
        self.by_name.get(name).map(|&index| &self.entries[index].meta)
    }

    /// The bytes of a tensor by its name, where they are mapped.
    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        let entry = &self.entries[*self.by_name.get(name)?];
        self.shards[entry.shard].bytes.get(entry.range.clone())
    }

    fn weight(&self, entry: &Entry) -> Weight {
        let bytes = self.shards[entry.shard].bytes.slice(entry.range.clone());
        Weight::from_meta(entry.meta.clone(), bytes)
            .expect("the header was checked against the file when it was opened")
    }

    fn add_shard(&mut self, path: PathBuf) -> Result<(), CheckpointError> {
        let name = path.file_name().map(PathBuf::from).unwrap_or_default();
        self.add_named(path, name)
    }

    fn add_named(&mut self, path: PathBuf, name: PathBuf) -> Result<(), CheckpointError> {
        // Opening a pipe would wait for its writer.
        let about =
            std::fs::metadata(&path).map_err(|error| CheckpointError::io(&path, "open", error))?;
        if !about.is_file() {
            let reason = "it is not a regular file".into();
            return Err(CheckpointError::NotSafetensors { path, reason });
        }
        let file = File::open(&path).map_err(|error| CheckpointError::io(&path, "open", error))?;
        let map = crate::ffi::map_file(&file)
            .map_err(|error| CheckpointError::io(&path, "map", error))?;
        let header = Header::parse(&path, &map)?;
        let shard = self.shards.len();
        self.entries.reserve(header.tensors.len());
        for (meta, range) in header.tensors {
            let index = self.entries.len();
            if let Some(&first) = self.by_name.get(&meta.name) {
                return Err(CheckpointError::Duplicate {
                    tensor: meta.name.to_string(),
                    first: self.shards[self.entries[first].shard].path.clone(),
                    second: path,
                });
            }
            self.by_name.insert(meta.name.clone(), index);
            self.entries.push(Entry { meta, shard, range });
        }
        let bytes = Bytes::from_owner(map);
        self.shards.push(Shard { path, name, metadata: header.metadata, bytes });
        Ok(())
    }

    fn add_indexed(&mut self, index: &Path) -> Result<(), CheckpointError> {
        let weight_map = read_index(index)?;
        let folder = index.parent().unwrap_or(Path::new(""));
        let files: BTreeSet<&str> = weight_map.iter().map(|(_, file)| &**file).collect();
        let missing: Vec<String> = files
            .iter()
            .filter(|file| !folder.join(file).is_file())
            .map(|&file| file.to_owned())
            .collect();
        if !missing.is_empty() {
            let total = files.len();
            return Err(CheckpointError::MissingShards { path: index.into(), missing, total });
        }
        for file in files {
            self.add_named(folder.join(file), file.into())?;
        }
        self.index = Some(index.to_owned());
        for (tensor, file) in &weight_map {
            let shard = folder.join(file);
            let there = self.shard_of(tensor).is_some_and(|holder| holder.path == shard);
            if !there {
                return Err(CheckpointError::NotInShard { shard, tensor: tensor.clone() });
            }
        }
        Ok(())
    }
}

enum Found {
    Single(PathBuf),
    Index(PathBuf),
}

/// What a folder's checkpoint is.
fn find(folder: &Path) -> Result<Found, CheckpointError> {
    let list = || -> std::io::Result<(Vec<PathBuf>, Vec<PathBuf>)> {
        let (mut files, mut indices) = (Vec::new(), Vec::new());
        for entry in std::fs::read_dir(folder)? {
            let name = entry?.file_name();
            let text = name.to_string_lossy();
            // Hidden files are unfinished checkpoints of this program, or nobody's business.
            if text.starts_with('.') {
                continue;
            }
            if text.ends_with(INDEX_SUFFIX) {
                indices.push(folder.join(&name));
            } else if text.ends_with(SUFFIX) {
                files.push(folder.join(&name));
            }
        }
        Ok((files, indices))
    };
    let (mut files, mut indices) =
        list().map_err(|error| CheckpointError::io(folder, "list", error))?;
    let single = folder.join(SINGLE);
    if files.contains(&single) {
        return Ok(Found::Single(single));
    }
    // Repositories also have `consolidated.safetensors.index.json`, of the same weights by other names.
    let index = folder.join(INDEX);
    if indices.contains(&index) {
        return Ok(Found::Index(index));
    }
    match (indices.len(), files.len()) {
        (1, _) => Ok(Found::Index(indices.remove(0))),
        (0, 1) => Ok(Found::Single(files.remove(0))),
        (indices, files) => Err(CheckpointError::NoCheckpoint {
            path: folder.into(),
            found: format!(
                "looked for {SINGLE}, for {INDEX} or one *{INDEX_SUFFIX}, and for one *{SUFFIX}; \
                 found {indices} indices and {files} {SUFFIX} files"
            ),
        }),
    }
}

/// The entries `tensor name → file name` of an index, each file name checked to stay in the folder.
fn read_index(path: &Path) -> Result<Vec<(String, String)>, CheckpointError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: Entries<String>,
    }

    let invalid = |reason: String| CheckpointError::Index { path: path.into(), reason };
    let io = |error| CheckpointError::io(path, "read", error);
    let file = File::open(path).map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    if len > MAX_INDEX_BYTES {
        return Err(invalid(format!("{len} bytes; at most {MAX_INDEX_BYTES} are read")));
    }
    let text = std::io::read_to_string(file).map_err(io)?;
    let Index { weight_map: Entries(mut entries) } =
        serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
    // `./a//b` and `a/b` are one file.
    for (_, file) in &mut entries {
        let plain: PathBuf =
            Path::new(file).components().filter(|part| *part != Component::CurDir).collect();
        if let Some(plain) = plain.to_str().filter(|plain| !plain.is_empty()) {
            *file = plain.to_owned();
        }
    }
    let mut seen = BTreeMap::new();
    for (tensor, file) in &entries {
        let inside = Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
        if file.is_empty() || !inside {
            return Err(invalid(format!(
                "tensor `{tensor}` is said to be in `{file}`, which is not a file of the folder"
            )));
        }
        if let Some(first) = seen.insert(tensor, file) {
            let folder = path.parent().unwrap_or(Path::new(""));
            return Err(CheckpointError::Duplicate {
                tensor: tensor.clone(),
                first: folder.join(first),
                second: folder.join(file),
            });
        }
    }
    Ok(entries)
}
