//! Decodes what files say, for the targets of `fuzz/`. Compiled only for fuzzing.

use crate::format::{self, Contents, Encoding, Index};
use crate::tensors;
use engine_core::Version;

/// Reads an index. What it says can be written, and says the same then.
pub fn index(version: u64, text: &[u8]) {
    let version = Version(version);
    let Ok(index) = Index::read(text, Some(version)) else { return };
    let weight_map = index.files.iter().map(|file| (file.clone(), file.clone())).collect();
    let Index { delta, checksum, checksums, files, .. } = index;
    let checksum = checksum.unwrap_or_default();
    let contents = Contents { delta, checksum, checksums, weight_map, total_size: 0 };
    let text = contents.text(version).expect("it can be written");
    let again = Index::read(&text, Some(version)).expect("what was written can be read");
    assert_eq!((again.delta, again.files), (delta, files));
}

/// Reads the text of a file's header: its tensors follow one another without holes.
pub fn header(text: &[u8]) {
    let Ok((tensors, _)) = tensors::header(text) else { return };
    let mut end = 0;
    for (meta, at, len) in tensors {
        assert_eq!((at, meta.byte_len().ok()), (end, Some(len)), "{meta:?}");
        end += len;
    }
}

/// Applies a change to a tensor: it is refused, or a change of these bytes to those.
pub fn change(encoding: Encoding, tensor: &[u8], change: &[u8]) {
    let mut bytes = tensor.to_vec();
    if format::apply(encoding, &mut bytes, change).is_err() {
        return;
    }
    let mut again = tensor.to_vec();
    if let Some((change, _)) = format::change(encoding, tensor, &bytes).expect("it is small") {
        format::apply(encoding, &mut again, &change).expect("a change that was made");
    }
    assert!(again == bytes, "a change that is not what it makes");
}
