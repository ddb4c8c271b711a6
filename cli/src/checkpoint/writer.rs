//! Writing: tensors as they come, one file at the end.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine_core::{TensorMeta, Weight};

use super::CheckpointError;
use super::header::serialize;
use super::staging::{Staging, sync_folder};
use crate::threads::pool;

/// Bytes gathered before they are written: small tensors share a system call.
const BUFFER: usize = 1 << 20;

/// Writes a safetensors file out of tensors that are not known beforehand.
///
/// The header of a safetensors file comes first and lists every tensor, so the data is gathered in
/// a file without a name and copied behind the header by [`finish`](Self::finish) (inside the file
/// system, where it can).
///
/// # Contract
///
/// The file appears under its name complete and on disk, or not at all. Whatever happens before —
/// an error, dropping the writer, a crash — leaves a file of that name as it was. A crash
/// while `finish` copies, or at any time of a writer that knows its tensors, leaves hidden files
/// `.unfinished-…`; the next writer in that folder removes them.
///
/// Tensors come one after the other, and the pieces of each in order. In the file they are ordered
/// by alignment, as the reference implementation does, since loaders cannot view a tensor that is
/// not aligned.
///
/// # Examples
///
/// ```
/// use cli::checkpoint::{Checkpoint, CheckpointWriter};
/// use engine_core::{DType, TensorMeta};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let folder = tempfile::tempdir()?;
/// let mut writer = CheckpointWriter::in_folder(folder.path())?;
/// let meta = TensorMeta::new("norm.weight", DType::BF16, [4]);
/// writer.write_chunk(&meta, 0, &[0, 1, 2])?;
/// writer.write_chunk(&meta, 3, &[3, 4, 5, 6, 7])?;
/// writer.finish()?;
/// assert_eq!(Checkpoint::open(folder.path())?.len(), 1);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct CheckpointWriter {
    path: PathBuf,
    folder: PathBuf,
    data: Data,
    metadata: BTreeMap<String, String>,
    tensors: Vec<(TensorMeta, Range<u64>)>,
    names: HashSet<Arc<str>>,
    /// The end of the data written so far; the last tensor is complete when its range ends here.
    at: u64,
    replace: bool,
}

/// Where the bytes of tensors go.
#[derive(Debug)]
enum Data {
    /// To be copied behind a header that is not known yet.
    Gathered(BufWriter<File>),
    /// To their places behind the header, which is there.
    Placed { staging: Staging, file: File, places: HashMap<Arc<str>, u64> },
}

impl CheckpointWriter {
    /// Will write `path`, whose folder is made if it is missing.
    ///
    /// # Errors
    ///
    /// `Io` if the folder cannot be made or written to.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self, CheckpointError> {
        let path = path.into();
        let folder = folder_of(&path)?;
        let data = tempfile::tempfile_in(&folder)
            .map_err(|error| CheckpointError::io(&folder, "make a file", error))?;
        let data = Data::Gathered(BufWriter::with_capacity(BUFFER, data));
        Ok(Self {
            path,
            folder,
            data,
            // What loaders look for to know that the names are PyTorch's.
            metadata: BTreeMap::from([("format".into(), "pt".into())]),
            tensors: Vec::new(),
            names: HashSet::new(),
            at: 0,
            replace: true,
        })
    }

    /// Will write `path` with exactly these tensors, each of which is written to its place at once:
    /// for half the disk's work of [`create`](Self::create). An empty `metadata` is left out.
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create); `Tensor` and `Duplicate` for impossible descriptions.
    pub fn with_tensors<'a>(
        path: impl Into<PathBuf>,
        metadata: BTreeMap<String, String>,
        tensors: impl IntoIterator<Item = &'a TensorMeta>,
    ) -> Result<Self, CheckpointError> {
        let path = path.into();
        let folder = folder_of(&path)?;
        let mut order: Vec<&TensorMeta> = tensors.into_iter().collect();
        order.sort_by_key(|meta| std::cmp::Reverse(alignment(meta)));
        let mut end = 0_u64;
        let mut placed = Vec::with_capacity(order.len());
        for meta in order {
            let size = meta.validate().map_err(|error| {
                CheckpointError::tensor(&path, &meta.name, error.report().message.clone())
            })?;
            let start = end;
            end = end.checked_add(size).ok_or_else(|| {
                CheckpointError::tensor(&path, &meta.name, format!("{size} bytes more overflow"))
            })?;
            placed.push((meta, start..end));
        }
        let header = serialize(&path, &metadata, &placed)?;
        let mut places = HashMap::with_capacity(placed.len());
        for (meta, range) in &placed {
            let place = header.len() as u64 + range.start;
            if places.insert(meta.name.clone(), place).is_some() {
                return Err(duplicate(&path, meta));
            }
        }
        let (staging, mut file) = Staging::file(&folder)
            .map_err(|error| CheckpointError::io(&folder, "make a file", error))?;
        file.write_all(&header)
            .map_err(|error| CheckpointError::io(&path, "write the header", error))?;
        Ok(Self {
            path,
            folder,
            data: Data::Placed { staging, file, places },
            metadata,
            tensors: Vec::new(),
            names: HashSet::new(),
            at: 0,
            replace: true,
        })
    }

    /// Will write `folder/model.safetensors`, where Hugging Face loaders look.
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create).
    pub fn in_folder(folder: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        Self::create(folder.as_ref().join("model.safetensors"))
    }

    /// Replaces the header's `__metadata__`, which is `format: pt` otherwise. A header that is
    /// written already stays.
    #[must_use]
    pub fn with_metadata(mut self, metadata: BTreeMap<String, String>) -> Self {
        self.metadata = metadata;
        self
    }

    /// Refuses to replace a file: one that is there when the writer finishes stays.
    #[must_use]
    pub fn without_replacing(mut self) -> Self {
        self.replace = false;
        self
    }

    /// Adds the bytes of a tensor from `offset` on. A piece at offset 0 begins the tensor.
    ///
    /// # Errors
    ///
    /// `Duplicate` for a name used before, `OutOfOrder` for a piece that does not follow the one
    /// before it or reaches beyond its tensor, `Tensor` for an invalid description, `Io` if writing
    /// fails, the disk being full for example. After an error the writer can only be dropped.
    pub fn write_chunk(
        &mut self,
        meta: &TensorMeta,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), CheckpointError> {
        let continues = self.tensors.last().is_some_and(|(last, range)| {
            last.name == meta.name && (offset > 0 || range.start == self.at && self.at < range.end)
        });
        if !continues {
            self.begin(meta, offset)?;
        }
        // `begin` put one there if there was none.
        let Some((last, range)) = self.tensors.last() else { return Ok(()) };
        let (written, size) = (self.at - range.start, range.end - range.start);
        let write = |error| CheckpointError::io(&self.path, "write the tensors", error);
        if last != meta {
            return Err(self.out_of_order(meta, format!("it began as {last:?}")));
        }
        if offset != written || bytes.len() as u64 > size - written {
            let len = bytes.len();
            return Err(self.out_of_order(
                meta,
                format!("{len} bytes at {offset}, after {written} of {size} bytes"),
            ));
        }
        match &mut self.data {
            Data::Gathered(data) => data.write_all(bytes).map_err(write)?,
            Data::Placed { file, places, .. } => {
                let Some(place) = places.get(&meta.name) else {
                    return Err(self.out_of_order(meta, "the header does not have it".into()));
                };
                file.write_all_at(bytes, place + offset).map_err(write)?;
            }
        }
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Adds a whole tensor; an encoded one in pieces of a few MiB, made by all threads of the
    /// program, so that it is never whole in memory.
    ///
    /// # Errors
    ///
    /// As [`write_chunk`](Self::write_chunk), and what its encoding reports; `Resource` if the threads cannot
    /// be started.
    pub fn write_weight(&mut self, weight: &Weight) -> Result<(), engine_core::Error> {
        if let Some(bytes) = weight.contiguous_bytes() {
            return Ok(self.write_chunk(weight.meta(), 0, bytes)?);
        }
        let len = weight.byte_len();
        let granule = weight.granule();
        let step = (4_u64 << 20).next_multiple_of(granule).min(len).max(1);
        let pool = pool()?;
        let jobs = pool.threads() as u64;
        let encode = |offset: u64| -> Result<Vec<u8>, engine_core::Error> {
            let batch = (step * jobs).min(len - offset);
            let mut bytes = vec![0; batch as usize];
            let pieces = bytes.chunks_mut(step as usize).enumerate();
            let results = pool.map(pieces, |(index, piece)| {
                let start = offset + index as u64 * step;
                weight.encode(start..start + piece.len() as u64, piece)
            });
            // In order, so that the same place is named whichever thread was first.
            results.into_iter().collect::<Result<(), _>>()?;
            Ok(bytes)
        };
        let mut offset = 0;
        let mut batch = encode(offset)?;
        loop {
            let next = offset + batch.len() as u64;
            // The next pieces are made while these are written.
            let (encoded, written) = pool.join(
                || if next < len { encode(next).map(Some) } else { Ok(None) },
                || self.write_chunk(weight.meta(), offset, &batch),
            );
            written?;
            let Some(bytes) = encoded? else { return Ok(()) };
            (offset, batch) = (next, bytes);
        }
    }

    /// Writes the file, makes sure that it is on disk, and only then gives it its name.
    ///
    /// # Errors
    ///
    /// `OutOfOrder` if the last tensor is incomplete, and `Io`.
    pub fn finish(self) -> Result<PathBuf, CheckpointError> {
        self.complete()?;
        let path = &self.path;
        let io = |action| move |error| CheckpointError::io(path, action, error);
        let mut data = match self.data {
            Data::Gathered(data) => data,
            Data::Placed { staging, file, places } => {
                if let Some(missing) = places.keys().find(|name| !self.names.contains(*name)) {
                    let reason = "the header has it, and it was not written";
                    return Err(CheckpointError::tensor(path, missing, reason));
                }
                file.sync_all().map_err(io("write the file to disk"))?;
                staging.finish(path, self.replace).map_err(io("rename"))?;
                sync_folder(&self.folder).map_err(io("write the folder to disk"))?;
                return Ok(self.path);
            }
        };
        data.flush().map_err(io("write the tensors"))?;
        let mut order: Vec<&(TensorMeta, Range<u64>)> = self.tensors.iter().collect();
        // Stable: within one alignment the order stays, and neighbours are copied in one go.
        order.sort_by_key(|(meta, _)| std::cmp::Reverse(alignment(meta)));
        let mut end = 0;
        let placed: Vec<(&TensorMeta, Range<u64>)> = order
            .iter()
            .map(|(meta, range)| {
                let start = end;
                end += range.end - range.start;
                (meta, start..end)
            })
            .collect();
        let header = serialize(path, &self.metadata, &placed)?;
        let (staging, mut file) = Staging::file(&self.folder)
            .map_err(|error| CheckpointError::io(&self.folder, "make a file", error))?;
        let output = &mut file;
        output.write_all(&header).map_err(io("write the header"))?;
        let mut ranges = order.iter().map(|(_, range)| range.clone()).peekable();
        while let Some(mut run) = ranges.next() {
            while let Some(next) = ranges.next_if(|next| next.start == run.end) {
                run.end = next.end;
            }
            let mut input = data.get_ref();
            input.seek(SeekFrom::Start(run.start)).map_err(io("read the tensors back"))?;
            let len = run.end - run.start;
            let copied =
                std::io::copy(&mut input.take(len), output).map_err(io("write the file"))?;
            if copied != len {
                let error = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
                return Err(io("read the tensors back")(error));
            }
        }
        output.sync_all().map_err(io("write the file to disk"))?;
        staging.finish(path, self.replace).map_err(io("rename"))?;
        // Without this a crash may forget the name. The file is complete either way.
        sync_folder(&self.folder).map_err(io("write the folder to disk"))?;
        Ok(self.path)
    }

    /// Begins a tensor.
    fn begin(&mut self, meta: &TensorMeta, offset: u64) -> Result<(), CheckpointError> {
        self.complete()?;
        if offset != 0 {
            return Err(self.out_of_order(meta, format!("its first piece is at {offset}")));
        }
        let size = meta.validate().map_err(|error| {
            CheckpointError::tensor(&self.path, &meta.name, error.report().message.clone())
        })?;
        let end = self.at.checked_add(size).ok_or_else(|| {
            CheckpointError::tensor(&self.path, &meta.name, format!("{size} bytes more overflow"))
        })?;
        if !self.names.insert(meta.name.clone()) {
            return Err(duplicate(&self.path, meta));
        }
        self.tensors.push((meta.clone(), self.at..end));
        Ok(())
    }

    /// Checks that the last tensor is complete.
    fn complete(&self) -> Result<(), CheckpointError> {
        match self.tensors.last() {
            Some((last, range)) if range.end != self.at => Err(self.out_of_order(
                last,
                format!(
                    "it ended after {} of {} bytes",
                    self.at - range.start,
                    range.end - range.start
                ),
            )),
            _ => Ok(()),
        }
    }

    fn out_of_order(&self, meta: &TensorMeta, reason: String) -> CheckpointError {
        CheckpointError::OutOfOrder {
            path: self.path.clone(),
            tensor: meta.name.to_string(),
            reason,
        }
    }
}

/// The folder of a file, made if it is missing.
fn folder_of(path: &Path) -> Result<PathBuf, CheckpointError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    };
    std::fs::create_dir_all(&folder)
        .map_err(|error| CheckpointError::io(&folder, "make the folder", error))?;
    Ok(folder)
}

fn duplicate(path: &Path, meta: &TensorMeta) -> CheckpointError {
    CheckpointError::Duplicate {
        tensor: meta.name.to_string(),
        first: path.to_owned(),
        second: path.to_owned(),
    }
}

/// What the address of a tensor must be a multiple of; types whose elements share bytes pack into
/// the smallest whole number of bytes.
fn alignment(meta: &TensorMeta) -> u64 {
    meta.dtype.bytes().unwrap_or(1)
}
