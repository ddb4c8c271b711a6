//! `ckpt-engine publish` and `pull`: checkpoints into a folder of versions, and out of it.

use std::path::PathBuf;
use std::process::ExitCode;

use checkpoint_engine::dir::{Checksum, Encoding, VersionReader, Versions};
use checkpoint_engine::{
    CheckpointEngineConfig, EngineContext, Rank, Version, ensure_async_iterator, form_local_group,
    registry,
};
use clap::Args;
use cli::checkpoint::{Checkpoint, CheckpointWriter};
use serde::de::DeserializeOwned;

use crate::Failure;
use crate::output::{byte_bar, say};

/// Publishes a checkpoint as a version in a folder, whole or as what changed since the version before.
///
/// The folder is that of the backend dir. slime, miles and their SGLang servers read it as their own disk deltas.
#[derive(Debug, Args)]
#[command(after_help = "\
Example: two versions, the second as what changed
    ckpt-engine publish step-100 /mnt/weights --version 1
    ckpt-engine publish step-101 /mnt/weights --version 2 --changes xor")]
pub(crate) struct PublishArgs {
    /// A .safetensors file, a Hugging Face folder, or the index of one
    model: PathBuf,
    /// The folder of versions; it is made if it is missing
    folder: PathBuf,
    /// The number of the version
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    version: u64,
    /// Publish what changed since the version before, if it is there and has the same tensors: xor or overwrite
    #[arg(long, value_name = "ENCODING", value_parser = named::<Encoding>)]
    changes: Option<Encoding>,
    /// With --changes, publish a whole version after so many
    #[arg(long, value_name = "N", requires = "changes", default_value_t = 20)]
    anchor_every: u64,
    /// The digest of each tensor: xxh3-128, blake3 or adler32
    #[arg(long, value_name = "NAME", value_parser = named::<Checksum>, default_value = "xxh3-128")]
    checksum: Checksum,
    /// How many versions stay in the folder
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    keep: u32,
}

/// Writes a version of a folder as a checkpoint, every tensor verified by its digest.
///
/// The folder is that of the backend dir, or one of slime's disk deltas.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  The newest version:
    ckpt-engine pull /mnt/weights out

  Version 12 of a trainer of slime, whose changes begin at the checkpoint that it started from:
    ckpt-engine pull /shared/delta-updates out --version 12 --base Qwen3-4B")]
pub(crate) struct PullArgs {
    /// The folder of versions
    folder: PathBuf,
    /// The folder to write model.safetensors to
    output: PathBuf,
    /// The number of the version; the newest one without it
    #[arg(long, value_name = "N")]
    version: Option<u64>,
    /// The checkpoint that version 0 is, where versions only have changes
    #[arg(long, value_name = "FOLDER")]
    base: Option<PathBuf>,
}

/// A value by its name in configurations.
fn named<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

pub(crate) async fn publish_command(args: &PublishArgs) -> Result<ExitCode, Failure> {
    let model = Checkpoint::open(&args.model)?;
    let PublishArgs { folder, changes, anchor_every, checksum, keep, .. } = args;
    let mut config = CheckpointEngineConfig::new("dir");
    let options = serde_json::json!({
        "path": folder.to_str().ok_or("the folder's path is not UTF-8")?, "keep": keep, "changes": changes,
        "anchor_every": anchor_every, "checksum": checksum,
    });
    if let serde_json::Value::Object(options) = options {
        config.engine_kwargs.insert("dir".into(), options);
    }
    let registry = registry();
    let context = EngineContext::new(config).with_rank(Rank::LEADER);
    let prepared = registry.prepare_trainer(context).await?;
    let (mut trainers, _) =
        form_local_group(registry.get("dir")?, vec![prepared], Vec::new()).await?;
    let mut trainer = trainers.remove(0);
    let bar = byte_bar(model.byte_len());
    let weights: Vec<_> = model.weights().collect();
    let counted = weights.into_iter().inspect(|weight| bar.inc(weight.byte_len()));
    let version = Version(args.version);
    let report = trainer.send_weights(ensure_async_iterator(counted), version).await;
    bar.finish_and_clear();
    let report = report?;
    trainer.finalize().await?;
    let published = Versions::new(folder).open(version)?;
    let (tensors, gigabytes) = (report.counts.tensors, report.counts.wire_bytes as f64 / 1e9);
    say(format!("version {version}: {tensors} tensors, {gigabytes:.3} GB{}", since(&published)))?;
    Ok(ExitCode::SUCCESS)
}

/// How far a version is from a whole one, in words.
fn since(version: &VersionReader) -> String {
    match version.changes() {
        0 => ", whole".into(),
        1 => ", as changes of the version before, which is whole".into(),
        changes => format!(", as changes; the last whole version is {changes} before"),
    }
}

pub(crate) fn pull_command(args: &PullArgs) -> Result<ExitCode, Failure> {
    let mut versions = Versions::new(&args.folder);
    if let Some(base) = &args.base {
        versions = versions.with_base(base);
    }
    let version = match args.version {
        Some(number) => Version(number),
        None => versions
            .newest()?
            .ok_or_else(|| format!("{} has no version yet", args.folder.display()))?,
    };
    let reader = versions.open(version)?;
    let sizes: u64 = reader.metas().filter_map(|meta| meta.byte_len().ok()).sum();
    let bar = byte_bar(sizes);
    let mut writer = CheckpointWriter::in_folder(&args.output)?;
    let metas: Vec<_> = reader.metas().cloned().collect();
    for meta in &metas {
        let bytes = reader.bytes(&meta.name)?;
        writer.write_chunk(meta, 0, &bytes)?;
        bar.inc(bytes.len() as u64);
    }
    let path = writer.finish()?;
    bar.finish_and_clear();
    let (tensors, gigabytes) = (metas.len(), sizes as f64 / 1e9);
    let path = path.display();
    say(format!("{path}: version {version}, {tensors} tensors, {gigabytes:.3} GB"))?;
    Ok(ExitCode::SUCCESS)
}
