//! Reading and writing checkpoints.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cli::checkpoint::{Checkpoint, CheckpointError, CheckpointWriter, Difference, Side, verify};
use engine_core::{DType, Error, ErrorKind, TensorMeta, Weight};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView, serialize, serialize_to_file};
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// A file made of a header, as written, and data.
fn raw(path: &Path, header: &str, data: &[u8]) -> PathBuf {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    fs::write(path, bytes).unwrap();
    path.to_owned()
}

fn entry(name: &str, shape: &str, begin: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"U8","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
}

/// A shard, written by the reference implementation.
fn shard(path: &Path, tensors: &[(&str, Dtype, &[usize], &[u8])]) {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| {
            (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap())
        })
        .collect::<Vec<_>>();
    serialize_to_file(views, None, path).unwrap();
}

fn sharded(folder: &Path, index: &str) {
    shard(&folder.join("m-1.safetensors"), &[("a", Dtype::U8, &[4], &[1, 2, 3, 4])]);
    shard(
        &folder.join("m-2.safetensors"),
        &[("b", Dtype::BF16, &[1, 2], &[5, 6, 7, 8]), ("c", Dtype::F32, &[], &[0, 0, 128, 63])],
    );
    fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
}

const INDEX: &str = r#"{"metadata":{"total_size":12},"weight_map":
    {"a":"m-1.safetensors","b":"m-2.safetensors","c":"m-2.safetensors"}}"#;

fn error(path: impl AsRef<Path>) -> CheckpointError {
    Checkpoint::open(path).expect_err("an invalid checkpoint")
}

#[test]
fn a_file_of_the_reference_implementation_is_read_as_it_was_written() {
    let folder = folder();
    let path = folder.path().join("x.safetensors");
    shard(&path, &[("w", Dtype::F32, &[2, 1], &[1, 2, 3, 4, 5, 6, 7, 8])]);
    for path in [path.as_path(), folder.path()] {
        let checkpoint = Checkpoint::open(path).unwrap();
        let weights: Vec<Weight> = checkpoint.weights().collect();
        assert_eq!(weights.len(), 1);
        assert_eq!(**weights[0].meta(), TensorMeta::new("w", DType::F32, [2, 1]));
        assert_eq!(weights[0].to_bytes().unwrap()[..], [1, 2, 3, 4, 5, 6, 7, 8]);
    }
}

#[test]
fn weights_share_the_mapped_file_and_outlive_the_checkpoint() {
    let folder = folder();
    shard(&folder.path().join("x.safetensors"), &[("w", Dtype::U8, &[3], &[1, 2, 3])]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let mapped = checkpoint.bytes("w").unwrap().as_ptr();
    let weight = checkpoint.get("w").unwrap();
    drop(checkpoint);
    let bytes = weight.contiguous_bytes().unwrap();
    assert_eq!(bytes.as_ptr(), mapped);
    assert_eq!(bytes[..], [1, 2, 3]);
}

#[test]
fn a_sharded_folder_is_one_checkpoint_in_the_order_of_its_files() {
    let folder = folder();
    sharded(folder.path(), INDEX);
    for path in [folder.path().to_owned(), folder.path().join("model.safetensors.index.json")] {
        let checkpoint = Checkpoint::open(path).unwrap();
        let names: Vec<_> = checkpoint.metas().map(|meta| meta.name.to_string()).collect();
        assert_eq!(names, ["a", "c", "b"]);
        assert_eq!(checkpoint.byte_len(), 12);
        assert_eq!(checkpoint.shards().len(), 2);
        assert!(checkpoint.shard_of("b").unwrap().path().ends_with("m-2.safetensors"));
        assert!(checkpoint.get("d").is_none());
    }
}

#[test]
fn missing_shards_are_all_named() {
    let folder = folder();
    let index =
        r#"{"weight_map":{"a":"m-1.safetensors","y":"m-4.safetensors","x":"m-3.safetensors"}}"#;
    sharded(folder.path(), index);
    match error(folder.path()) {
        CheckpointError::MissingShards { missing, total, .. } => {
            assert_eq!(missing, ["m-3.safetensors", "m-4.safetensors"]);
            assert_eq!(total, 3);
        }
        other => panic!("{other}"),
    }
}

#[test]
fn an_index_that_promises_a_tensor_which_its_shard_lacks_is_refused() {
    for place in ["m-1.safetensors", "m-2.safetensors"] {
        let folder = folder();
        let other = "m-1.safetensors";
        let index =
            format!(r#"{{"weight_map":{{"a":"{other}","b":"m-2.safetensors","d":"{place}"}}}}"#);
        sharded(folder.path(), &index);
        let error = error(folder.path());
        assert!(
            matches!(&error, CheckpointError::NotInShard { shard, tensor }
                if tensor == "d" && shard.ends_with(place)),
            "{error}"
        );
        let error = Error::from(error);
        assert_eq!(error.kind(), ErrorKind::Weight);
        assert_eq!(error.report().tensor.as_deref(), Some("d"));
    }
}

#[test]
fn a_name_in_two_shards_is_refused_naming_both() {
    let folder = folder();
    sharded(folder.path(), INDEX);
    shard(&folder.path().join("m-2.safetensors"), &[("a", Dtype::U8, &[1], &[9])]);
    let error = error(folder.path());
    assert!(matches!(error, CheckpointError::Duplicate { .. }));
    let text = error.to_string();
    assert!(text.contains("m-1.") && text.contains("m-2.") && text.contains("`a`"), "{text}");
}

#[test]
fn an_index_cannot_reach_outside_its_folder_nor_name_a_tensor_twice() {
    for file in ["../m-1.safetensors", "/etc/passwd", ""] {
        let folder = folder();
        sharded(folder.path(), &format!(r#"{{"weight_map":{{"a":"{file}"}}}}"#));
        assert!(matches!(error(folder.path()), CheckpointError::Index { .. }), "{file}");
    }
    let folder = folder();
    let index = r#"{"weight_map":{"a":"m-1.safetensors","a":"m-2.safetensors"}}"#;
    sharded(folder.path(), index);
    assert!(matches!(error(folder.path()), CheckpointError::Duplicate { .. }));
}

#[test]
fn a_folder_without_a_checkpoint_says_what_was_looked_for() {
    let folder = folder();
    let text = error(folder.path()).to_string();
    assert!(text.contains("model.safetensors") && text.contains("index.json"), "{text}");
    shard(&folder.path().join("a.safetensors"), &[]);
    shard(&folder.path().join("b.safetensors"), &[]);
    let text = error(folder.path()).to_string();
    assert!(text.contains("2 .safetensors files"), "{text}");
}

#[test]
fn a_path_that_does_not_exist_is_an_io_error_that_names_it() {
    let error = error("/nonexistent/model.safetensors");
    assert!(error.to_string().contains("/nonexistent/model.safetensors"));
    assert_eq!(Error::from(error).kind(), ErrorKind::Io);
}

#[test]
fn a_truncated_file_is_refused_at_every_length() {
    let folder = folder();
    let view = TensorView::new(Dtype::U8, vec![16], &[7; 16]).unwrap();
    let whole = serialize([("w", view)], None).unwrap();
    let path = folder.path().join("t.safetensors");
    for len in 0..whole.len() {
        fs::write(&path, &whole[..len]).unwrap();
        match error(&path) {
            CheckpointError::NotSafetensors { .. } if len < 8 => {}
            CheckpointError::Truncated { len: there, .. } => assert_eq!(there, len as u64),
            other => panic!("{len}: {other}"),
        }
    }
}

#[test]
fn lying_headers_are_refused_naming_the_tensor() {
    let folder = folder();
    let path = folder.path().join("l.safetensors");
    let max = u64::MAX;
    let cases = [
        ("beyond the file", format!("{{{}}}", entry("w", "[99]", 0, 99))),
        ("overlap", format!("{{{},{}}}", entry("v", "[3]", 0, 3), entry("w", "[3]", 1, 4))),
        ("hole", format!("{{{},{}}}", entry("v", "[1]", 0, 1), entry("w", "[2]", 2, 4))),
        ("too small", format!("{{{}}}", entry("w", "[3]", 0, 4))),
        ("backwards", format!("{{{}}}", entry("w", "[4]", 4, 0))),
        ("overflow", format!("{{{}}}", entry("w", "[4294967296,4294967296,4]", 0, 4))),
        ("huge", format!("{{{}}}", entry("w", &format!("[{max}]"), 0, max))),
        (
            "wraps around",
            format!(
                "{{{},{}}}",
                entry("v", "[4]", 0, 4),
                entry("w", &format!("[{}]", max - 4), 4, max)
            ),
        ),
        ("unknown type", r#"{"w":{"dtype":"Q3","shape":[4],"data_offsets":[0,4]}}"#.into()),
        ("no shape", r#"{"w":{"dtype":"U8","data_offsets":[0,4]}}"#.into()),
        ("not an entry", r#"{"w":7}"#.into()),
        ("half a byte", r#"{"w":{"dtype":"F4","shape":[7],"data_offsets":[0,4]}}"#.into()),
        ("twice", format!("{{{},{}}}", entry("w", "[4]", 0, 4), entry("w", "[4]", 0, 4))),
        (
            "empty twice",
            format!(
                "{{{},{},{}}}",
                entry("w", "[0]", 0, 0),
                entry("w", "[0]", 0, 0),
                entry("v", "[4]", 0, 4)
            ),
        ),
    ];
    for (case, header) in cases {
        let error = error(raw(&path, &header, &[1, 2, 3, 4]));
        let text = error.to_string();
        assert!(text.contains("l.safetensors"), "{case}: {text}");
        if !matches!(error, CheckpointError::Truncated { .. }) {
            assert!(text.contains("`w`"), "{case}: {text}");
            assert_eq!(Error::from(error).kind(), ErrorKind::Weight, "{case}");
        }
    }
}

#[test]
fn an_absurd_header_length_is_refused_before_anything_is_allocated() {
    let folder = folder();
    let path = folder.path().join("a.safetensors");
    for length in [100_000_001, u64::MAX, u64::MAX - 7] {
        fs::write(&path, [&length.to_le_bytes()[..], b"{}"].concat()).unwrap();
        assert!(matches!(error(&path), CheckpointError::NotSafetensors { .. }));
    }
}

#[test]
fn bytes_that_belong_to_no_tensor_are_refused() {
    let folder = folder();
    let path = raw(&folder.path().join("x.safetensors"), "{}", &[0]);
    assert!(matches!(error(path), CheckpointError::Header { .. }));
}

#[test]
fn other_files_are_not_mistaken_for_checkpoints() {
    let folder = folder();
    let path = folder.path().join("x.safetensors");
    for bytes in [&b""[..], b"PK\x03\x04 a zip archive, long enough", b"\x02\0\0\0\0\0\0\0[]"] {
        fs::write(&path, bytes).unwrap();
        assert!(matches!(error(&path), CheckpointError::NotSafetensors { .. }));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let folder = folder();
        let path = folder.path().join("x.safetensors");
        fs::write(&path, bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(&path) {
            prop_assert!(checkpoint.weights().all(|weight| weight.to_bytes().is_ok()));
        }
    }

    #[test]
    fn no_damage_to_a_valid_file_makes_the_reader_panic(
        damage in prop::collection::vec((0..400_usize, any::<u8>()), 1..4),
        cut in 0..400_usize,
        keep in any::<bool>(),
    ) {
        let folder = folder();
        let path = folder.path().join("x.safetensors");
        let a = TensorView::new(Dtype::F32, vec![2, 5], &[1; 40]).unwrap();
        let b = TensorView::new(Dtype::BF16, vec![7], &[2; 14]).unwrap();
        let c = TensorView::new(Dtype::F8_E4M3, vec![0, 3], &[]).unwrap();
        let mut bytes = serialize([("a", a), ("b", b), ("c", c)], None).unwrap();
        for (position, byte) in damage {
            let len = bytes.len();
            // Printable bytes keep the header plausible for longer.
            bytes[position % len] = if keep { b' ' + byte % 95 } else { byte };
        }
        if cut < bytes.len() && !keep {
            bytes.truncate(cut);
        }
        fs::write(&path, bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(&path) {
            prop_assert!(checkpoint.weights().all(|weight| weight.to_bytes().is_ok()));
        }
    }

    #[test]
    fn whatever_is_written_in_pieces_is_read_back(
        tensors in prop::collection::vec((0..6_usize, 0..3000_u64), 0..12),
        piece in 1..2000_usize,
    ) {
        let types = [DType::U8, DType::BF16, DType::F32, DType::F64, DType::F8_E4M3, DType::I16];
        let folder = folder();
        let mut writer = CheckpointWriter::in_folder(folder.path()).unwrap();
        let mut expected = Vec::new();
        for (index, (dtype, len)) in tensors.into_iter().enumerate() {
            let meta = TensorMeta::new(format!("t{index}"), types[dtype], [len]);
            let size = meta.byte_len().unwrap() as usize;
            let bytes: Vec<u8> = (0..size).map(|i| (i * 7 + index) as u8).collect();
            if size == 0 {
                writer.write_chunk(&meta, 0, &[]).unwrap();
            }
            for (chunk, at) in bytes.chunks(piece).zip((0..).step_by(piece)) {
                writer.write_chunk(&meta, at, chunk).unwrap();
            }
            expected.push((meta, bytes));
        }
        let path = writer.finish().unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        prop_assert_eq!(checkpoint.len(), expected.len());
        let start = fs::read(&path).unwrap().as_slice()[..8].try_into().map(u64::from_le_bytes);
        prop_assert_eq!(start.unwrap() % 8, 0);
        for (meta, bytes) in &expected {
            prop_assert_eq!(checkpoint.meta(&meta.name), Some(meta));
            let found = checkpoint.bytes(&meta.name).unwrap();
            prop_assert_eq!(found, &bytes[..]);
            // Mappings begin at page boundaries, so that addresses tell alignment in the file.
            let alignment = meta.dtype.bytes().unwrap() as usize;
            prop_assert_eq!(found.as_ptr() as usize % alignment, 0);
        }
        // The reference implementation accepts it, too.
        let bytes = fs::read(&path).unwrap();
        prop_assert_eq!(safetensors::SafeTensors::deserialize(&bytes).unwrap().len(), expected.len());
    }
}

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn a_writer_that_does_not_finish_leaves_the_old_file_and_nothing_else() {
    let folder = folder();
    fs::write(folder.path().join("model.safetensors"), "old").unwrap();
    let meta = TensorMeta::new("w", DType::U8, [1 << 21]);
    let mut writer = CheckpointWriter::in_folder(folder.path()).unwrap();
    writer.write_chunk(&meta, 0, &vec![1; 1 << 20]).unwrap();
    assert_eq!(entries(folder.path()), ["model.safetensors"]);
    drop(writer);
    let mut writer = CheckpointWriter::in_folder(folder.path()).unwrap();
    writer.write_chunk(&meta, 0, &vec![1; 1 << 20]).unwrap();
    let error = writer.finish().unwrap_err();
    assert!(matches!(error, CheckpointError::OutOfOrder { .. }), "{error}");
    assert_eq!(entries(folder.path()), ["model.safetensors"]);
    assert_eq!(fs::read(folder.path().join("model.safetensors")).unwrap(), b"old");
}

#[test]
fn a_finished_writer_replaces_the_file_while_the_old_one_is_still_mapped() {
    let folder = folder();
    let meta = TensorMeta::new("w", DType::U8, [4]);
    let write = |byte| {
        let mut writer = CheckpointWriter::in_folder(folder.path()).unwrap();
        writer.write_chunk(&meta, 0, &[byte; 4]).unwrap();
        writer.finish().unwrap()
    };
    write(1);
    let old = Checkpoint::open(folder.path()).unwrap();
    write(2);
    assert_eq!(old.bytes("w").unwrap(), [1; 4]);
    assert_eq!(Checkpoint::open(folder.path()).unwrap().bytes("w").unwrap(), [2; 4]);
    assert_eq!(entries(folder.path()), ["model.safetensors"]);
}

#[test]
fn pieces_that_do_not_follow_each_other_are_refused() {
    let folder = folder();
    let writer = || CheckpointWriter::in_folder(folder.path()).unwrap();
    let w = TensorMeta::new("w", DType::U8, [4]);
    let v = TensorMeta::new("v", DType::U8, [4]);
    let order = |result: Result<(), CheckpointError>| {
        let error = result.unwrap_err();
        assert!(matches!(error, CheckpointError::OutOfOrder { .. }), "{error}");
    };
    order(writer().write_chunk(&w, 1, &[0]));
    order(writer().write_chunk(&w, 0, &[0; 5]));
    let mut gap = writer();
    gap.write_chunk(&w, 0, &[0]).unwrap();
    order(gap.write_chunk(&w, 2, &[0]));
    let mut again = writer();
    again.write_chunk(&w, 0, &[0]).unwrap();
    order(again.write_chunk(&w, 0, &[0]));
    let mut early = writer();
    early.write_chunk(&w, 0, &[0]).unwrap();
    order(early.write_chunk(&v, 0, &[0; 4]));
    let mut other = writer();
    other.write_chunk(&w, 0, &[0]).unwrap();
    order(other.write_chunk(&TensorMeta::new("w", DType::I8, [4]), 1, &[0]));
    let mut twice = writer();
    twice.write_chunk(&w, 0, &[0; 4]).unwrap();
    assert!(matches!(twice.write_chunk(&w, 0, &[0; 4]), Err(CheckpointError::Duplicate { .. })));
}

#[test]
fn whole_weights_and_metadata_are_written() {
    let folder = folder();
    let path = folder.path().join("deep/down/x.safetensors");
    let metadata = BTreeMap::from([("quantized".to_owned(), "no".to_owned())]);
    let mut writer = CheckpointWriter::create(&path).unwrap().with_metadata(metadata.clone());
    // A transposed view, so that it has to be packed.
    let bytes: Vec<u8> = (0..6).collect();
    let weight = Weight::strided("t", DType::U8, [3, 2], [1_i64, 3], 0, bytes).unwrap();
    writer.write_weight(&weight).unwrap();
    writer.write_weight(&Weight::new("e", DType::F32, [0], vec![]).unwrap()).unwrap();
    writer.finish().unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.bytes("t").unwrap(), [0, 3, 1, 4, 2, 5]);
    assert_eq!(checkpoint.len(), 2);
    assert_eq!(checkpoint.shards()[0].metadata(), &metadata);
}

#[test]
fn checkpoints_are_equal_whatever_their_shards_and_order() {
    let (a, b) = (folder(), folder());
    sharded(a.path(), INDEX);
    let mut writer = CheckpointWriter::in_folder(b.path()).unwrap();
    let a = Checkpoint::open(a.path()).unwrap();
    let mut weights: Vec<Weight> = a.weights().collect();
    weights.reverse();
    weights.iter().for_each(|weight| writer.write_weight(weight).unwrap());
    writer.finish().unwrap();
    let progress = std::sync::atomic::AtomicU64::new(0);
    let report = verify(&a, &Checkpoint::open(b.path()).unwrap(), |bytes| {
        progress.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
    });
    let report = report.unwrap();
    assert!(report.is_equal());
    assert_eq!((report.compared, report.bytes), (3, 12));
    assert_eq!(progress.into_inner(), 12);
    assert_eq!(report.to_string(), "equal: 3 tensors, 12 bytes");
}

#[test]
fn every_difference_is_found_and_said() {
    let (a, b) = (folder(), folder());
    let big = vec![0_u8; 8 << 20];
    let mut changed = big.clone();
    for index in [3_500_000, 4_000_000, 8_000_001] {
        changed[index] = 0x3f;
    }
    let (x, y) = (a.path().join("x.safetensors"), b.path().join("x.safetensors"));
    shard(
        &x,
        &[
            ("values", Dtype::BF16, &[2, 1 << 21], &big),
            ("type", Dtype::I8, &[2], &[1, 2]),
            ("shape", Dtype::U8, &[2], &[1, 2]),
            ("left", Dtype::U8, &[], &[1]),
            ("same", Dtype::U8, &[], &[1]),
        ],
    );
    shard(
        &y,
        &[
            ("values", Dtype::BF16, &[2, 1 << 21], &changed),
            ("type", Dtype::U8, &[2], &[1, 2]),
            ("shape", Dtype::U8, &[1, 2], &[1, 2]),
            ("right", Dtype::U8, &[], &[1]),
            ("same", Dtype::U8, &[], &[1]),
        ],
    );
    let report = verify(&Checkpoint::open(x).unwrap(), &Checkpoint::open(y).unwrap(), |_| {});
    let report = report.unwrap();
    let mut lines: Vec<String> = report.differences.iter().map(ToString::to_string).collect();
    lines.sort();
    assert_eq!(
        lines,
        [
            "left: only in A (U8 [])",
            "right: only in B (U8 [])",
            "shape: shape [2] in A, [1, 2] in B",
            "type: type I8 in A, U8 in B",
            "values: 3 of 4194304 elements differ, first at [0, 1750000]: \
             0.0 (0x0000) in A, 5.785636e-39 (0x003f) in B",
        ]
    );
    assert!(report.differences.iter().any(|difference| {
        matches!(difference, Difference::OnlyIn { side: Side::B, meta } if &*meta.name == "right")
    }));
    assert_eq!(report.compared, 2);
    assert_eq!(report.to_string(), "different: 5 tensors differ; 2 compared, 8388609 bytes");
}

#[test]
fn a_writer_that_knows_its_tensors_writes_the_same_file_and_takes_no_others() {
    let folder = folder();
    let metas = [
        TensorMeta::new("codes", DType::F8_E4M3, [5]),
        TensorMeta::new("scales", DType::F32, [2]),
        TensorMeta::new("norm", DType::BF16, [3]),
    ];
    let bytes = |meta: &TensorMeta| vec![meta.name.len() as u8; meta.byte_len().unwrap() as usize];
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let planned = |name: &str, metas: &[TensorMeta]| {
        let path = folder.path().join(name);
        CheckpointWriter::with_tensors(path, metadata.clone(), metas)
    };
    let mut gathered = CheckpointWriter::create(folder.path().join("a.safetensors")).unwrap();
    let mut placed = planned("b.safetensors", &metas).unwrap();
    for writer in [&mut gathered, &mut placed] {
        for meta in &metas {
            writer.write_chunk(meta, 0, &bytes(meta)[..1]).unwrap();
            writer.write_chunk(meta, 1, &bytes(meta)[1..]).unwrap();
        }
    }
    let files = [gathered.finish().unwrap(), placed.finish().unwrap()];
    assert_eq!(fs::read(&files[0]).unwrap(), fs::read(&files[1]).unwrap());

    let twice = [metas[0].clone(), metas[0].clone()];
    let error = planned("c.safetensors", &twice).unwrap_err();
    assert!(matches!(error, CheckpointError::Duplicate { .. }), "{error}");
    let mut writer = planned("c.safetensors", &metas[..1]).unwrap();
    let error = writer.write_chunk(&metas[1], 0, &bytes(&metas[1])).unwrap_err();
    assert!(matches!(error, CheckpointError::OutOfOrder { .. }), "{error}");
    drop(writer);
    let writer = planned("c.safetensors", &metas[..1]).unwrap();
    let error = writer.finish().unwrap_err();
    assert!(error.to_string().contains("`codes`"), "{error}");
    let mut writer = planned("b.safetensors", &metas[..1]).unwrap().without_replacing();
    writer.write_chunk(&metas[0], 0, &bytes(&metas[0])).unwrap();
    writer.finish().unwrap_err();
    assert_eq!(entries(folder.path()), ["a.safetensors", "b.safetensors"]);
}
