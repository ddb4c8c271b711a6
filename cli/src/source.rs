//! Where the weights of every update come from, and how a receiver checks them.

mod quantized;

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use checkpoint_engine::NamePattern;
use checkpoint_engine::fp8::rules::RulesConfig;
use engine_core::{
    DeviceChoice, Encoding, Error, ErrorKind, Recovery, Result, TensorMeta, Version, Weight,
};
use serde::{Deserialize, Serialize};

use self::quantized::{Expected, Quantized};
use crate::checkpoint::Checkpoint;
use crate::device::DeviceModel;
use crate::synthetic::{self, ChangeRate, Residency, ResidentModel, StreamedModel, SyntheticModel};

/// What a source is made of: what the trainer tells the rollouts, so that they can check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceSpec {
    /// The model.
    pub model: ModelSpec,
    /// How many updates there will be. Versions count from 1 to this; the last update of a
    /// checkpoint carries exactly the bytes of its files.
    pub updates: u64,
    /// How many elements change from one version to the next. Without it all values of a synthetic model do, and up to a
    /// quarter of a checkpoint's.
    #[serde(default)]
    pub change_rate: Option<ChangeRate>,
    /// The weights that updates after the first one send, by their names; all without any. Those that are not sent stay as they were in
    /// version 1.
    #[serde(default)]
    pub only: Vec<NamePattern>,
}

impl SourceSpec {
    /// Every update of a model, all of whose values change.
    pub fn new(model: ModelSpec, updates: u64) -> Self {
        Self { model, updates, change_rate: None, only: Vec::new() }
    }

    /// Whether a version is sent as a part, by those weights that change in it.
    pub fn is_part(&self, version: Version) -> bool {
        !self.only.is_empty() && version > Version(1)
    }

    /// Of the model's weights those that an update sends.
    pub fn sent(&self, weights: Weights, version: Version) -> Weights {
        if !self.is_part(version) {
            return weights;
        }
        let is_sent = |weight: &Result<Weight>| {
            weight.as_ref().map_or(true, |weight| self.changes(weight.name()))
        };
        let sent: Vec<_> = weights.filter(is_sent).collect();
        Box::new(sent.into_iter())
    }

    /// Whether updates after the first one send a weight.
    fn changes(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|pattern| pattern.matches(name))
    }

    /// The version whose values a weight has when rollouts have a version.
    fn version_of(&self, name: &str, version: Version) -> Version {
        if self.changes(name) { version } else { version.min(Version(1)) }
    }
}

/// Which model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ModelSpec {
    /// A made-up one, or the first so many layers of it.
    Synthetic {
        /// Which one.
        name: SyntheticModel,
        /// How many of its layers; all without a number.
        layers: Option<u32>,
    },
    /// A file or a folder.
    Checkpoint {
        /// Where it is. Rollouts that check must reach it under the same path.
        #[serde(with = "any_path")]
        path: PathBuf,
    },
}

/// Paths as text, and those that are no UTF-8 as the list of their bytes: no file is one that ranks cannot
/// tell each other of.
mod any_path {
    use std::ffi::OsString;
    use std::fmt;
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    use std::path::{Path, PathBuf};

    use serde::de::{SeqAccess, Visitor};
    use serde::{Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        match path.to_str() {
            Some(text) => serializer.serialize_str(text),
            None => serializer.collect_seq(path.as_os_str().as_bytes()),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<PathBuf, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = PathBuf;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a path, or its bytes")
            }

            fn visit_str<E>(self, text: &str) -> Result<PathBuf, E> {
                Ok(text.into())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<PathBuf, A::Error> {
                let mut bytes = Vec::new();
                while let Some(byte) = list.next_element()? {
                    bytes.push(byte);
                }
                Ok(OsString::from_vec(bytes).into())
            }
        }

        deserializer.deserialize_any(Any)
    }
}

/// A model whose weights change between updates as training would change them.
///
/// Opening one takes no memory to speak of; only asking for [`weights`](Self::weights) or
/// [`advance`](Self::advance) allocates a synthetic model. A rollout that only
/// [checks](Self::check) never does.
#[derive(Debug)]
pub struct Source {
    spec: SourceSpec,
    metas: HashMap<Arc<str>, TensorMeta>,
    byte_len: u64,
    kind: Kind,
    quantized: Option<Quantized>,
    device: Option<OnDevice>,
}

/// A source whose weights are put on a device before they are sent.
#[derive(Debug)]
struct OnDevice {
    choice: DeviceChoice,
    model: Option<(Version, DeviceModel)>,
}

/// A piece of a tensor that was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checked {
    /// The bytes of the source that it stands for: the scales of a quantised weight for none,
    /// because its codes stand for all.
    pub source_bytes: u64,
    /// Whether it ends a tensor of the source.
    pub ends_tensor: bool,
}

#[derive(Debug)]
enum Kind {
    Synthetic { metas: Vec<TensorMeta>, residency: Residency, model: Option<Model> },
    Checkpoint(Arc<Checkpoint>),
}

#[derive(Debug)]
enum Model {
    Resident(ResidentModel),
    Streamed(StreamedModel),
}

/// The weights of one update, in order.
pub type Weights = Box<dyn ExactSizeIterator<Item = Result<Weight>> + Send>;

impl Source {
    /// Opens what a specification names.
    ///
    /// # Errors
    ///
    /// `Config` for a slice of more layers than there are, and what
    /// [`CheckpointError`](crate::checkpoint::CheckpointError) becomes.
    ///
    /// # Examples
    ///
    /// ```
    /// use cli::source::{ModelSpec, Source, SourceSpec};
    /// use cli::synthetic::SyntheticModel;
    /// use engine_core::Version;
    ///
    /// # fn main() -> engine_core::Result<()> {
    /// let model = ModelSpec::Synthetic { name: SyntheticModel::TinyMoe, layers: None };
    /// let mut trainer = Source::open(SourceSpec::new(model, 3))?;
    /// let rollout = Source::open(trainer.spec().clone())?;
    /// for weight in trainer.weights(Version(1))? {
    ///     let weight = weight?;
    ///     rollout.check(weight.meta(), Version(1), 0, &weight.to_bytes()?)?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn open(spec: SourceSpec) -> Result<Self> {
        let (list, kind) = match &spec.model {
            ModelSpec::Synthetic { name, layers } => {
                let metas = name.metas(*layers)?;
                let residency = Residency::of(total(&metas)?);
                (metas.clone(), Kind::Synthetic { metas, residency, model: None })
            }
            ModelSpec::Checkpoint { path } => {
                let checkpoint = Checkpoint::open(path)?;
                (checkpoint.metas().cloned().collect(), Kind::Checkpoint(checkpoint.into()))
            }
        };
        let byte_len = total(&list)?;
        let metas = list.into_iter().map(|meta| (meta.name.clone(), meta)).collect();
        Ok(Self { spec, metas, byte_len, kind, quantized: None, device: None })
    }

    /// Checks what arrives against what quantisation by these rules makes of the source.
    ///
    /// # Errors
    ///
    /// What the rules refuse.
    pub fn quantized_by(mut self, rules: &RulesConfig) -> Result<Self> {
        self.quantized = Some(Quantized::new(self.metas(), rules)?);
        Ok(self)
    }

    /// Keeps the weights on a device, as a trainer that trains there does.
    #[must_use]
    pub fn on_device(mut self, device: &DeviceChoice) -> Self {
        self.device = crate::device::keeps_tensors(device)
            .then(|| OnDevice { choice: device.clone(), model: None });
        self
    }

    /// What the source was opened with.
    pub fn spec(&self) -> &SourceSpec {
        &self.spec
    }

    /// The number of tensors of such names, and their bytes.
    pub fn only(&self, is_one: impl Fn(&str) -> bool) -> (u64, u64) {
        let metas = self.metas.values().filter(|meta| is_one(&meta.name));
        metas.fold((0, 0), |(tensors, bytes), meta| {
            (tensors + 1, bytes + meta.byte_len().unwrap_or_default())
        })
    }

    /// The number of tensors.
    pub fn tensors(&self) -> usize {
        self.metas.len()
    }

    /// The bytes of all tensors together.
    pub fn byte_len(&self) -> u64 {
        self.byte_len
    }

    /// The description of a tensor by its name.
    pub fn meta(&self, name: &str) -> Option<&TensorMeta> {
        self.metas.get(name)
    }

    /// The descriptions of all tensors, in the order of [`weights`](Self::weights).
    pub fn metas(&self) -> Box<dyn ExactSizeIterator<Item = &TensorMeta> + '_> {
        match &self.kind {
            Kind::Synthetic { metas, .. } => Box::new(metas.iter()),
            Kind::Checkpoint(checkpoint) => Box::new(checkpoint.metas()),
        }
    }

    /// Whether a synthetic model is kept in memory, and why; nothing for a checkpoint, whose files
    /// are mapped, and for a model on a device.
    pub fn residency(&self) -> Option<Residency> {
        match &self.kind {
            _ if self.device.is_some() => None,
            Kind::Synthetic { residency, .. } => Some(*residency),
            Kind::Checkpoint(_) => None,
        }
    }

    /// Brings the model to a version: the "training" between two updates, so that its time is none
    /// of the update's. Without it [`weights`](Self::weights) does the same.
    ///
    /// # Errors
    ///
    /// `State` if weights of another version are still in use; `Resource` if there is no memory.
    pub fn advance(&mut self, version: Version) -> Result<()> {
        if let Some(mut device) = self.device.take() {
            let result = self.advance_on(&mut device, version);
            self.device = Some(device);
            return result;
        }
        let rate = self.spec.change_rate;
        let Kind::Synthetic { metas, residency, model } = &mut self.kind else { return Ok(()) };
        match model {
            Some(Model::Resident(model)) if model.version() != version => model.advance(version),
            Some(_) => Ok(()),
            None => {
                *model = Some(if residency.is_resident() {
                    Model::Resident(ResidentModel::changing(metas.iter().cloned(), version, rate)?)
                } else {
                    Model::Streamed(StreamedModel::changing(metas.iter().cloned(), rate))
                });
                Ok(())
            }
        }
    }

    fn advance_on(&mut self, device: &mut OnDevice, version: Version) -> Result<()> {
        if device.model.as_ref().is_some_and(|(present, _)| *present == version) {
            return Ok(());
        }
        // Made as they are copied there: the model is in memory once.
        let mut weights: Weights = match &self.kind {
            Kind::Synthetic { metas, .. } => {
                let rate = self.spec.change_rate;
                Box::new(StreamedModel::changing(metas.iter().cloned(), rate).weights(version))
            }
            Kind::Checkpoint(_) => self.weights(version)?,
        };
        match &mut device.model {
            Some((present, model)) => {
                model.refill(&mut weights)?;
                *present = version;
            }
            None => {
                let model = DeviceModel::new(&device.choice, &mut weights)?;
                device.model = Some((version, model));
            }
        }
        Ok(())
    }

    /// The weights of an update. They share the source's memory or are made as they are encoded;
    /// none is copied.
    ///
    /// # Errors
    ///
    /// As [`advance`](Self::advance).
    pub fn weights(&mut self, version: Version) -> Result<Weights> {
        self.advance(version)?;
        if let Some(OnDevice { model: Some((_, model)), .. }) = &self.device {
            return Ok(Box::new(model.weights().into_iter()));
        }
        Ok(match &self.kind {
            Kind::Synthetic { model: Some(Model::Resident(model)), .. } => {
                Box::new(model.weights())
            }
            Kind::Synthetic { model: Some(Model::Streamed(model)), .. } => {
                Box::new(model.weights(version))
            }
            // `advance` has made one.
            Kind::Synthetic { model: None, .. } => Box::new(std::iter::empty()),
            Kind::Checkpoint(checkpoint) => {
                let steps = self.steps(version);
                let weights: Vec<Weight> = checkpoint.weights().collect();
                {
                    let rate = self.spec.change_rate;
                    Box::new(weights.into_iter().map(move |weight| changed(weight, steps, rate)))
                }
            }
        })
    }

    /// Checks received bytes of a tensor, from `offset` on, against what an update carries, bit for
    /// bit and in constant memory. The scales of a quantised weight are checked after its codes. A weight that updates do not send has to be
    /// that of version 1.
    ///
    /// # Errors
    ///
    /// `Mismatch` for a tensor that the source does not have, or not with this type and shape;
    /// `Digest` for bytes that differ, naming the first.
    pub fn check(
        &self,
        meta: &TensorMeta,
        version: Version,
        offset: u64,
        bytes: &[u8],
    ) -> Result<Checked> {
        const OPERATION: &str = "verifying a received weight";
        let mismatch = |message: String| {
            Err(Error::new(ErrorKind::Mismatch, OPERATION, message)
                .tensor(&*meta.name)
                .version(version))
        };
        let expected = match &self.quantized {
            Some(quantized) => quantized.expected(&meta.name, |name| self.metas.get(name)),
            None => Expected::Source,
        };
        let in_source = self.metas.get(&meta.name);
        let weight = match &expected {
            Expected::Scales { weight, .. } => weight,
            _ => &*meta.name,
        };
        let version = self.spec.version_of(weight, version);
        let wanted = match &expected {
            Expected::Source => in_source,
            Expected::Codes(wanted) | Expected::Scales { meta: wanted, .. } => Some(wanted),
        };
        let Some(wanted) = wanted else {
            return mismatch("the source has no tensor of this name".into());
        };
        if wanted != meta {
            return mismatch(format!(
                "received as {} {:?}, {} {:?} was expected",
                meta.dtype, meta.shape, wanted.dtype, wanted.shape
            ));
        }
        let size = wanted.byte_len()?;
        let end = offset.checked_add(bytes.len() as u64).filter(|&end| end <= size);
        let Some(end) = end else {
            return mismatch(format!("{} bytes at {offset} of {size}", bytes.len()));
        };
        let mut checked = Checked { source_bytes: bytes.len() as u64, ends_tensor: end == size };
        let result = match (&self.quantized, &expected, in_source) {
            (Some(quantized), Expected::Codes(_), Some(source)) => {
                let make = |meta: &TensorMeta, range: Range<u64>, block: &mut [u8]| {
                    self.make(meta, version, range, block);
                };
                quantized
                    .check_codes(source, version, offset, bytes, &make)?
                    .map(|source_bytes| checked.source_bytes = source_bytes)
            }
            (Some(quantized), Expected::Scales { weight, .. }, _) => {
                checked = Checked { source_bytes: 0, ends_tensor: false };
                quantized.check_scales(weight, version, offset, bytes)
            }
            _ => match &self.kind {
                Kind::Synthetic { .. } if self.spec.change_rate.is_none() => {
                    synthetic::compare(meta, version, offset, bytes)
                }
                _ => synthetic::blockwise(offset, bytes, |range, block| {
                    self.make(meta, version, range, block);
                }),
            },
        };
        result.map(|()| checked).map_err(|at| {
            let element = at * 8 / meta.dtype.bits();
            Error::new(
                ErrorKind::Digest,
                OPERATION,
                format!("byte {at} of {size} (element {element}) is not the one that was sent"),
            )
            // Sending it again makes the same bytes.
            .recovery(Recovery::Abort)
            .tensor(&*meta.name)
            .version(version)
        })
    }

    /// Whether a tensor is the scales of a weight that is quantised on the way: to be checked after
    /// the weight.
    pub fn follows_a_weight(&self, name: &str) -> bool {
        let quantized = self.quantized.as_ref();
        let expected = quantized.map(|quantized| quantized.expected(name, |n| self.metas.get(n)));
        matches!(expected, Some(Expected::Scales { .. }))
    }

    /// A tensor of the source as an update carries it.
    ///
    /// # Errors
    ///
    /// `Weight` if its size overflows.
    pub fn bytes_of(&self, meta: &TensorMeta, version: Version) -> Result<Vec<u8>> {
        let len = meta.byte_len()?;
        let mut bytes = vec![0; len as usize];
        self.make(meta, version, 0..len, &mut bytes);
        Ok(bytes)
    }

    /// Makes bytes of one of the source's tensors as an update carries them. The range is within
    /// the tensor.
    fn make(&self, meta: &TensorMeta, version: Version, range: Range<u64>, block: &mut [u8]) {
        match &self.kind {
            Kind::Synthetic { .. } => {
                let rate = self.spec.change_rate;
                synthetic::Values { version, rate }.fill(meta, range, block);
            }
            Kind::Checkpoint(checkpoint) => {
                let original = checkpoint.bytes(&meta.name).unwrap_or_default();
                block.copy_from_slice(&original[range.start as usize..range.end as usize]);
                let (steps, rate) = (self.steps(version), self.spec.change_rate);
                synthetic::perturb(meta, steps, rate, range.start, block);
            }
        }
    }

    /// How many steps of training are left until the checkpoint's own bytes.
    fn steps(&self, version: Version) -> u64 {
        self.spec.updates.saturating_sub(version.0)
    }
}

fn total(metas: &[TensorMeta]) -> Result<u64> {
    metas.iter().try_fold(0_u64, |sum, meta| {
        sum.checked_add(meta.byte_len()?).ok_or_else(|| {
            Error::new(ErrorKind::Weight, "adding up a model", "its size does not fit 64 bits")
        })
    })
}

/// A weight changed as `steps` steps of training would change it, while it is encoded; with 0 steps
/// the weight itself.
///
/// The lowest mantissa bits of an eighth of its elements flip, chosen by its name and `steps`;
/// weights of types that are not trained stay as they are.
///
/// # Errors
///
/// Whatever the weight's description makes impossible.
pub fn perturbed(weight: Weight, steps: u64) -> Result<Weight> {
    changed(weight, steps, None)
}

fn changed(weight: Weight, steps: u64, rate: Option<ChangeRate>) -> Result<Weight> {
    if steps == 0 {
        return Ok(weight);
    }
    let (meta, treatment) = (weight.meta().clone(), weight.treatment().clone());
    Weight::encoded(meta, Arc::new(Perturbed { weight, steps, rate }), treatment)
}

#[derive(Debug)]
struct Perturbed {
    weight: Weight,
    steps: u64,
    rate: Option<ChangeRate>,
}

impl Encoding for Perturbed {
    fn name(&self) -> &'static str {
        "perturb"
    }

    fn source_bytes(&self) -> u64 {
        self.weight.source_bytes()
    }

    fn granule(&self) -> u64 {
        // The elements of a word are changed together. All that a weight's own granules divide is
        // a power of two here, so that the larger one is a multiple of both.
        self.weight.granule().max(8)
    }

    fn is_deferred(&self) -> bool {
        self.weight.is_deferred()
    }

    fn encode_host(&self, range: Range<u64>, destination: &mut [u8]) -> Result<()> {
        let meta = self.weight.meta();
        let mut start = range.start;
        // While the piece is in the nearest cache, changing it costs next to nothing.
        for piece in destination.chunks_mut(16 << 10) {
            let end = start + piece.len() as u64;
            self.weight.encode(start..end, piece)?;
            synthetic::perturb(meta, self.steps, self.rate, start, piece);
            start = end;
        }
        Ok(())
    }
}
