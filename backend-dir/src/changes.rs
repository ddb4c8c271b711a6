//! Writes what has changed from one whole version to the next.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use engine_core::memory::Pool;
use engine_core::{DType, Error, ErrorKind, Result, TensorMeta};
use serde_json::json;

use crate::error::io;
use crate::folder::PUBLISHING;
use crate::format::{Checksum, Contents, Delta, change};
use crate::shards::{METADATA, file_name};
use crate::tensors::Tensors;

/// Changes are gathered up to so many bytes before they are written as a file.
const FILE_BYTES: usize = 256 << 20;

/// Why changes cannot be written, if they cannot: the tensors are not the same.
pub(crate) fn differ(old: &Tensors, new: &Tensors) -> Option<String> {
    if old.metas().len() != new.metas().len() {
        return Some("other tensors".into());
    }
    let other = |meta: &&TensorMeta| old.meta(&meta.name) != Some(meta);
    new.metas().find(other).map(|meta| format!("`{}`", meta.name))
}

/// Writes the files of a version that changes `old` to `new`, which [do not differ](differ) in names, types and shapes.
///
/// Takes memory for two tensors and a change on each thread, and for a file of changes.
///
/// # Errors
///
/// `Io`, `Resource`; `Weight` for a tensor that the encoding cannot take.
pub(crate) fn write_changes(
    (old, new): (&Tensors, &Tensors),
    delta: Delta,
    checksum: Checksum,
    folder: &Path,
    pool: &Pool,
) -> Result<Contents> {
    let mut contents = Contents { delta: Some(delta), checksum, ..Contents::default() };
    let metas: Vec<&TensorMeta> = new.metas().collect();
    let mut file = Gathered::default();
    let mut files = 0;
    for some in metas.chunks(pool.threads()) {
        let changed = pool.map(some, |meta| {
            let refuse = |message: String| {
                Error::new(ErrorKind::Weight, PUBLISHING, message).tensor(&*meta.name)
            };
            let read = |from: &Tensors| {
                from.read(&meta.name)?.ok_or_else(|| refuse("it is missing".into()))
            };
            let (old, new) = (read(old)?, read(new)?);
            let changed = change(delta.encoding, &old, &new).map_err(|error| refuse(error.0))?;
            let named = |(frame, _)| (meta.name.to_string(), frame, checksum.of(&new));
            Ok::<_, Error>(changed.map(named))
        });
        for changed in changed {
            let Some((name, frame, digest)) = changed? else { continue };
            contents.total_size += frame.len() as u64;
            contents.weight_map.insert(name.clone(), file_name(files));
            file.add(name, frame, digest);
            if file.bytes >= FILE_BYTES {
                std::mem::take(&mut file).write(&folder.join(file_name(files)))?;
                files += 1;
            }
        }
    }
    if !file.frames.is_empty() {
        file.write(&folder.join(file_name(files)))?;
    }
    Ok(contents)
}

/// Changes that will be a file.
#[derive(Default)]
struct Gathered {
    frames: Vec<(String, Vec<u8>)>,
    digests: BTreeMap<String, String>,
    bytes: usize,
}

impl Gathered {
    fn add(&mut self, name: String, frame: Vec<u8>, digest: String) {
        self.bytes += frame.len();
        self.digests.insert(name.clone(), digest);
        self.frames.push((name, frame));
    }

    fn write(self, path: &Path) -> Result<()> {
        let mut header = serde_json::Map::new();
        header.insert(METADATA.into(), json!(self.digests));
        let mut at = 0;
        for (name, frame) in &self.frames {
            let end = at + frame.len();
            let info =
                json!({"dtype": DType::U8, "shape": [frame.len()], "data_offsets": [at, end]});
            header.insert(name.clone(), info);
            at = end;
        }
        let mut text = serde_json::Value::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let failed = |error| io(PUBLISHING, path, error);
        let mut file = File::create_new(path).map_err(failed)?;
        let length = (text.len() as u64).to_le_bytes();
        file.write_all(&length).and_then(|()| file.write_all(&text)).map_err(failed)?;
        for (_, frame) in &self.frames {
            file.write_all(frame).map_err(failed)?;
        }
        file.sync_all().map_err(failed)
    }
}
