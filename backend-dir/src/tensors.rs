//! Tensors of the safetensors files of one folder, read where they lie.
//!
//! Files are read, not mapped: others may change or remove them at any time, and what was mapped would end this process.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine_core::{DType, Error, ErrorKind, Result, TensorMeta};
use safetensors::tensor::Metadata;

use crate::error::{io, wrong};
use crate::format::READING;

/// The longest header that is read, as in the format's own library.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The tensors of some files.
#[derive(Debug, Default)]
pub(crate) struct Tensors {
    files: Vec<(PathBuf, Arc<File>)>,
    /// In the order of the files, and of their data.
    tensors: Vec<Tensor>,
    by_name: HashMap<Arc<str>, usize>,
    /// What the files say beside their tensors.
    pub(crate) metadata: BTreeMap<String, String>,
}

/// Where a tensor lies.
#[derive(Debug)]
struct Tensor {
    meta: TensorMeta,
    file: usize,
    at: u64,
    len: u64,
}

impl Tensors {
    /// Opens files of a folder, and keeps them open.
    ///
    /// # Errors
    ///
    /// `Io`; `Protocol` for what is no safetensors file, or has a tensor twice.
    pub(crate) fn open(folder: &Path, names: &[String]) -> Result<Self> {
        let mut all = Self::default();
        for name in names {
            all.add(folder.join(name))?;
        }
        Ok(all)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let failed = |error| io(READING, &path, error);
        let mut file = File::open(&path).map_err(failed)?;
        let file_len = file.metadata().map_err(failed)?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(failed)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER_BYTES || length > file_len.saturating_sub(8) {
            let message = format!("a header of {length} bytes in a file of {file_len}");
            return Err(wrong(READING, &path, message));
        }
        let mut text = vec![0; length as usize];
        file.read_exact(&mut text).map_err(failed)?;
        let (tensors, metadata) = header(&text).map_err(|words| wrong(READING, &path, words))?;
        let data = file_len - 8 - length;
        let end = tensors.last().map_or(0, |(_, at, len)| at + len);
        if end != data {
            let message = format!("its tensors take {end} bytes, it has {data} of them");
            return Err(wrong(READING, &path, message));
        }
        for (meta, at, len) in tensors {
            let tensor = Tensor { at: 8 + length + at, len, meta, file: self.files.len() };
            if self.by_name.insert(tensor.meta.name.clone(), self.tensors.len()).is_some() {
                return Err(wrong(READING, &path, "a tensor that another file has as well")
                    .tensor(&*tensor.meta.name));
            }
            self.tensors.push(tensor);
        }
        self.metadata.extend(metadata);
        self.files.push((path, Arc::new(file)));
        Ok(())
    }

    /// The descriptions of all tensors, in the order of the files and their data.
    pub(crate) fn metas(&self) -> impl ExactSizeIterator<Item = &TensorMeta> {
        self.tensors.iter().map(|tensor| &tensor.meta)
    }

    /// The description of a tensor.
    pub(crate) fn meta(&self, name: &str) -> Option<&TensorMeta> {
        self.by_name.get(name).map(|&index| &self.tensors[index].meta)
    }

    /// Reads a tensor; `None` if there is none of that name.
    ///
    /// # Errors
    ///
    /// `Io`; `Resource` if there is no memory for it.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let Some(&index) = self.by_name.get(name) else { return Ok(None) };
        let Tensor { file, at, len, .. } = self.tensors[index];
        let (path, file) = &self.files[file];
        let mut bytes = Vec::new();
        // The file has so many: memory for it is all that can be missing.
        bytes.try_reserve_exact(len as usize).map_err(|_| {
            let message = format!("no memory for {len} bytes");
            Error::new(ErrorKind::Resource, READING, message).tensor(name)
        })?;
        bytes.resize(len as usize, 0);
        let read = file.read_exact_at(&mut bytes, at);
        read.map_err(|error| io(READING, path, error).tensor(name))?;
        Ok(Some(bytes))
    }
}

/// A tensor, and where its bytes are behind the header.
type Placed = (TensorMeta, u64, u64);

/// Reads the text of a header: its tensors in the order of their data, which they cover without holes, and its notes.
///
/// # Errors
///
/// What is wrong with it, in words.
pub(crate) fn header(text: &[u8]) -> Result<(Vec<Placed>, BTreeMap<String, String>), String> {
    let words = |error: &dyn std::fmt::Display| format!("its header is invalid: {error}");
    // It checks that sizes fit types and shapes, and that there are no holes.
    let metadata: Metadata = serde_json::from_slice(text).map_err(|error| words(&error))?;
    let mut tensors = Vec::new();
    for name in metadata.offset_keys() {
        let Some(info) = metadata.info(&name) else { continue };
        let dtype = DType::try_from(info.dtype).map_err(|error| words(&error))?;
        let shape: Vec<u64> = info.shape.iter().map(|&side| side as u64).collect();
        let meta = TensorMeta::new(name, dtype, shape);
        let len = meta.validate().map_err(|error| words(&error))?;
        tensors.push((meta, info.data_offsets.0 as u64, len));
    }
    let notes = metadata.metadata().clone().unwrap_or_default();
    Ok((tensors, notes.into_iter().collect()))
}
