//! The engines: the protocol's own over links of files, and the publishing of a version when its update has succeeded.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use engine_core::memory::Pool;
use engine_core::{
    CheckpointEngine, EngineContext, Error, ErrorKind, Prepared, PreparedRollout, PreparedTrainer,
    Rank, Result, Role, RolloutEngine, SendReport, TrainerEngine, Version, WeightStream,
    WorkerMetadata, no_copies,
};
use protocol::hub::Hub;
use protocol::{Receiver, Sender};
use serde::{Deserialize, Serialize};

use crate::folder::{Folder, check_mark};
use crate::links::{Incoming, Outgoing, Writing};
use crate::publish::publish;
use crate::{DirOptions, NAME};

/// The default size of a bucket.
const BUCKET_BYTES: u64 = 64 << 20;

/// What rollouts need to know of the trainer's folder.
#[derive(Debug, Serialize, Deserialize)]
struct Offer {
    mark: String,
    /// Where the trainer's host has it, for errors.
    path: String,
}

/// The options, and the folder that they name.
fn options(context: &EngineContext) -> Result<(DirOptions, PathBuf)> {
    let options = context.config.kwargs::<DirOptions>(NAME)?;
    let refuse = |message: &str| {
        let message = format!("engine_kwargs.{NAME}: {message}");
        Error::new(ErrorKind::Config, "preparing", message)
    };
    if options.changes.is_some() && options.keep == 0 {
        return Err(refuse("`changes` are changes of versions that are kept, and `keep` is 0"));
    }
    let path = options.path.clone().ok_or_else(|| {
        refuse("set `path` to the folder that the trainer and its rollouts share")
    })?;
    Ok((options, path))
}

/// The trainer's engine.
#[derive(Debug)]
struct Publisher {
    engine: Box<Sender<Outgoing>>,
    writing: Writing,
    folder: Arc<Folder>,
    options: DirOptions,
    pool: Pool,
    /// The queues of a trainer without rollouts.
    _alone: Option<Hub>,
}

#[async_trait]
impl CheckpointEngine for Publisher {
    async fn finalize(self: Box<Self>) -> Result<()> {
        self.engine.finalize().await
    }
}

#[async_trait]
impl TrainerEngine for Publisher {
    async fn send_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        let report = self.engine.send_weights(weights, version).await?;
        let staged = self.writing.finish()?;
        let (folder, options, pool) =
            (self.folder.clone(), self.options.clone(), self.pool.clone());
        let published = self.pool.start(move || publish(&folder, staged, version, &options, &pool));
        published.await.map_err(|error| error.version(version))?;
        Ok(report)
    }

    async fn send_part(&mut self, _: WeightStream<'_>, _: Version) -> Result<SendReport> {
        Err(no_copies("sending a part of a version"))
    }

    async fn attest(&mut self) -> Result<SendReport> {
        Err(no_copies("attesting a version"))
    }
}

pub(crate) async fn prepare_trainer(context: EngineContext) -> Result<PreparedTrainer> {
    let (options, path) = options(&context)?;
    let pool = Pool::new(context.threads(Role::Trainer))?;
    let bucket_bytes = context.config.bucket_bytes().unwrap_or(BUCKET_BYTES);
    let folder = Arc::new(Folder::own(path.clone()).await?);
    let left = folder.clone();
    pool.start(move || left.tidy()).await?;
    let link = Outgoing::new(folder.clone(), options.checksum, bucket_bytes, pool.clone())?;
    // A trainer that only publishes is a group of one.
    let alone = context.control.is_none().then(Hub::new);
    let control = match &alone {
        Some(hub) => hub.control(),
        None => context.require_control()?,
    };
    let rank = context.rank().unwrap_or(Rank::LEADER);
    let offer = Offer { mark: folder.mark().into(), path: path.display().to_string() };
    let details = serde_json::json!(offer);
    let metadata = WorkerMetadata::of_this_process(NAME, rank, Role::Trainer, details);
    Ok(Prepared::new(metadata, move |place| async move {
        let has_rollouts = place.rollouts().next().is_some();
        if alone.is_some() && has_rollouts {
            // The error says that one is needed.
            context.require_control()?;
        }
        if options.keep > 0 && context.bases.is_wanted() {
            let message = "with `delta`, what travels is no version that others could read: set \
                           engine_kwargs.dir.keep to 0, or engine_kwargs.dir.changes instead of `delta`";
            return Err(Error::new(ErrorKind::Config, "joining the group", message));
        }
        let link = link.with_rollouts(has_rollouts);
        let writing = link.writing();
        let engine = Box::new(Sender::new(link, &context, control, place.rollouts()));
        let engine = Publisher { engine, writing, folder, options, pool, _alone: alone };
        Ok(Box::new(engine) as Box<dyn TrainerEngine>)
    }))
}

pub(crate) async fn prepare_rollout(context: EngineContext) -> Result<PreparedRollout> {
    let (_, path) = options(&context)?;
    let control = context.require_control()?;
    let pool = Pool::new(context.threads(Role::Rollout))?;
    let nothing = serde_json::Value::Null;
    let metadata = WorkerMetadata::of_this_process(NAME, control.rank(), Role::Rollout, nothing);
    Ok(Prepared::new(metadata, move |place| async move {
        let details = &place.peer(Rank::LEADER)?.details;
        let offer = Offer::deserialize(details).map_err(|error| {
            let words = format!("the trainer's folder is not what {NAME} knows: {error}");
            Error::new(ErrorKind::Protocol, "joining the group", words).with_source(error)
        })?;
        check_mark(&path, &offer.mark, &offer.path)?;
        let engine = Receiver::new(Incoming::new(path, pool.clone()), &context, control, pool);
        Ok(Box::new(engine) as Box<dyn RolloutEngine>)
    }))
}
