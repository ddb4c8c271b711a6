//! The format contract: what each rank declares about the format of weights, and whether the declarations agree.

use std::collections::HashMap;

use engine_core::{
    CheckpointEngineConfig, DType, Error, ErrorKind, Rank, ReceivedBucket, ReceivedPiece, Result,
    Role, WorkerMetadata,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::combinator::stored;
use crate::encoding::sizes;
use crate::rules::{
    Decision, Manifest, Receiver, Rules, RulesConfig, Stored, Window, ignored_layers_from_env,
    weight_of_scale,
};
use crate::{Fp8Format, Granularity, Mode, NonFinite, Precast, ScaleName};

/// The `quantization` section of a configuration.
///
/// On the trainer it says how to quantise, on a rollout what it accepts. The other ranks decide what a rank leaves
/// out: a trainer without a `mode` uses the one that its rollouts need.
///
/// # Examples
///
/// ```
/// use engine_config::Format;
/// use quant_fp8::Fp8Config;
///
/// let text = "
/// backend: ipc
/// trainer_quantize_fp8: true
/// quantization:
///   mode: ue8m0
///   granularity: 128x128
///   ignored_layers: [model.layers.0, 're:.*shared_expert']
/// ";
/// let config = engine_config::parse(text, Format::Yaml)?;
/// let section = Fp8Config::of(&config)?.quantization;
/// assert_eq!(section.ignored_layers.len(), 2);
/// # Ok::<(), engine_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "snake_case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub struct Quantization {
    /// Whom the weights are for: `common` if no rank says.
    pub receiver: Option<Receiver>,
    /// How scales are computed: `triton` if no rank says.
    pub mode: Option<Mode>,
    /// Which elements share a scale: `128x128` if no rank says.
    pub granularity: Option<Granularity>,
    /// The name of the scales: that of the receiver if no rank says, `weight_scale_inv` for blocks and
    /// `weight_scale` for rows and tensors.
    pub scale_name: Option<ScaleName>,
    /// What the source is rounded to before it is quantised.
    pub precast: Precast,
    /// What happens at NaN and infinity.
    pub non_finite: NonFinite,
    /// Layers to leave alone; see [`RulesConfig::ignored_layers`].
    pub ignored_layers: Vec<String>,
    /// The same, under the name that `quantization_config` has for it.
    pub modules_to_not_convert: Vec<String>,
    /// The `quantization_config` of the checkpoint's `config.json`.
    pub quantization_config: Option<Value>,
    /// Whether a matrix that no rule knows is an error.
    pub strict: bool,
    /// Rollouts: what the rank can load; both if not set.
    pub accepts: Option<Accepts>,
    /// Rollouts: the exact parameters that it expects.
    #[cfg_attr(feature = "schema", schemars(with = "Option<serde_json::Map<String, Value>>"))]
    pub manifest: Option<Manifest>,
    /// Rollouts: whether this rank quantises weights that arrive unquantised.
    pub quantize_on_receive: bool,
}

/// What a rollout can load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub enum Accepts {
    /// FP8 with scales for what the rules quantise.
    Fp8,
    /// Weights in the precision that the trainer has them in.
    Unquantized,
}

/// A rank's part of the contract, as it travels with its metadata.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Declaration {
    /// Whether the rank quantises: a trainer what it sends, a rollout what it receives.
    pub(crate) quantizes: bool,
    /// Whether it is a rollout whose configuration has it that the trainer quantises.
    #[serde(default)]
    pub(crate) expects_fp8: bool,
    pub(crate) section: Quantization,
}

/// The part of a configuration about FP8: the keys that [`LAYER`](crate::LAYER) understands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub struct Fp8Config {
    /// Whether the trainer quantises to FP8 what it sends.
    pub trainer_quantize_fp8: bool,
    /// How to quantise, and what a rollout takes.
    pub quantization: Quantization,
}

impl Fp8Config {
    pub(crate) const KEYS: [&'static str; 2] = ["trainer_quantize_fp8", "quantization"];

    /// Those keys of a configuration.
    ///
    /// # Errors
    ///
    /// `Config`, naming the key; for an unknown one within `quantization` the message lists the known ones.
    pub fn of(config: &CheckpointEngineConfig) -> Result<Self> {
        config.layer(&Self::KEYS)
    }

    /// Puts the keys into a configuration; those that say nothing are left out.
    ///
    /// # Errors
    ///
    /// `Config` for a section that cannot be written.
    pub fn put_into(&self, config: &mut CheckpointEngineConfig) -> Result<()> {
        for key in Self::KEYS {
            config.layers.remove(key);
        }
        let [on_send, section] = Self::KEYS;
        if self.trainer_quantize_fp8 {
            config.layers.insert(on_send.into(), true.into());
        }
        if self.quantization != Quantization::default() {
            let value = serde_json::to_value(&self.quantization).map_err(|error| {
                Error::new(ErrorKind::Config, "writing the configuration", error.to_string())
                    .with_source(error)
            })?;
            config.layers.insert(section.into(), value);
        }
        Ok(())
    }
}

impl Quantization {
    /// The rules that the section gives by itself, with the layers that
    /// [`SGLANG_FP8_IGNORED_LAYERS`](crate::rules::IGNORED_LAYERS_VARIABLE) names.
    pub fn rules(&self) -> RulesConfig {
        let mut ignored_layers = self.ignored_layers.clone();
        ignored_layers.extend(ignored_layers_from_env());
        let receiver = self.receiver.unwrap_or_default();
        let granularity = self.granularity.unwrap_or_default();
        let named = || receiver.profile().scale_name(granularity);
        RulesConfig {
            format: Fp8Format {
                mode: self.mode.unwrap_or_default(),
                granularity,
                precast: self.precast,
                non_finite: self.non_finite,
                scale_name: self.scale_name.unwrap_or_else(named),
            },
            receiver,
            ignored_layers,
            modules_to_not_convert: self.modules_to_not_convert.clone(),
            quantization_config: self.quantization_config.clone(),
            manifest: self.manifest.clone(),
            strict: self.strict,
        }
    }
}

impl Declaration {
    /// What a rank declares.
    pub(crate) fn of(config: &CheckpointEngineConfig, role: Role) -> Result<Self> {
        let Fp8Config { trainer_quantize_fp8, quantization: mut section } = Fp8Config::of(config)?;
        // What the environment of a rank says is part of what it declares.
        section.ignored_layers.extend(ignored_layers_from_env());
        let quantizes = match role {
            Role::Trainer => trainer_quantize_fp8,
            Role::Rollout => section.quantize_on_receive,
        };
        // A rollout that is told that the trainer quantises wants it to.
        let expects_fp8 = role == Role::Rollout && trainer_quantize_fp8;
        Ok(Self { quantizes, expects_fp8, section })
    }

    pub(crate) fn to_value(&self) -> Result<Value> {
        serde_json::to_value(self).map_err(|error| {
            Error::new(ErrorKind::Config, "declaring the format", error.to_string())
                .with_source(error)
        })
    }
}

/// What the group agreed on.
#[derive(Clone, Debug)]
pub(crate) struct Agreement {
    /// Whether the trainer quantises.
    pub(crate) trainer_quantizes: bool,
    /// How, on the trainer or on the rollout.
    pub(crate) rules: RulesConfig,
}

/// A choice, and the rank that made it.
struct Choice<T>(Option<(T, Rank)>);

impl<T: PartialEq + std::fmt::Debug> Choice<T> {
    fn add(&mut self, what: &str, rank: Rank, choice: Option<T>) -> Result<()> {
        let Some(choice) = choice else { return Ok(()) };
        match &self.0 {
            Some((first, by)) if *first != choice => Err(disagreement(
                rank,
                format!("rank {by} wants {what} {first:?}, rank {rank} wants {choice:?}"),
            )),
            Some(_) => Ok(()),
            None => {
                self.0 = Some((choice, rank));
                Ok(())
            }
        }
    }
}

fn disagreement(rank: Rank, message: String) -> Error {
    Error::new(ErrorKind::Mismatch, "agreeing on the format", message).rank(rank)
}

/// What follows from all ranks' declarations. A pure function: every rank computes the same result.
///
/// A rank without a declaration (its program has no quantisation) sends its weights unchanged and accepts any format.
///
/// # Errors
///
/// `Mismatch` that says which rank wants what.
pub(crate) fn agree(peers: &[WorkerMetadata]) -> Result<Agreement> {
    let mut trainer = Declaration::default();
    let (mut mode, mut granularity) = (Choice(None), Choice(None));
    let mut receiver = Choice(None);
    let (mut scale_name, mut manifest) = (Choice(None), Choice(None));
    let mut ignored = Vec::new();
    // The trainer's declaration comes before those that have to fit it.
    let mut peers: Vec<&WorkerMetadata> = peers.iter().collect();
    peers.sort_by_key(|peer| peer.rank);
    for peer in peers {
        let rank = peer.rank;
        if peer.format.is_null() {
            continue;
        }
        let declared: Declaration =
            serde_json::from_value(peer.format.clone()).map_err(|error| {
                let message = format!("rank {rank}'s declaration cannot be read: {error}");
                disagreement(rank, message).with_source(error)
            })?;
        let Declaration { quantizes, expects_fp8, section } = declared.clone();
        receiver.add("weights for the receiver", rank, section.receiver)?;
        mode.add("scales of mode", rank, section.mode)?;
        granularity.add("blocks of", rank, section.granularity)?;
        scale_name.add("scales named", rank, section.scale_name)?;
        manifest.add("the parameters", rank, section.manifest)?;
        for layer in section.ignored_layers.into_iter().chain(section.modules_to_not_convert) {
            if !ignored.contains(&layer) {
                ignored.push(layer);
            }
        }
        if rank == Rank::LEADER {
            trainer = declared;
        } else if peer.role == Role::Rollout {
            fits(trainer.quantizes, rank, quantizes, section.accepts, expects_fp8)?;
        }
    }
    let mut section = trainer.section.clone();
    section.receiver = receiver.0.map(|(value, _)| value);
    section.mode = mode.0.map(|(value, _)| value);
    section.granularity = granularity.0.map(|(value, _)| value);
    section.scale_name = scale_name.0.map(|(value, _)| value);
    let mut rules = section.rules();
    rules.manifest = manifest.0.map(|(value, _)| value);
    rules.ignored_layers = ignored;
    rules.modules_to_not_convert = Vec::new();
    Ok(Agreement { trainer_quantizes: trainer.quantizes, rules })
}

/// How weights are quantised when a rollout's program gets them from its engine, by the trainer or by the rollout,
/// according to all declarations. `None` if they are not quantised.
///
/// # Errors
///
/// `Mismatch` that says which rank wants what: then the group does not form either.
pub fn agreed_rules(workers: &[WorkerMetadata], rollout: Rank) -> Result<Option<RulesConfig>> {
    let agreement = agree(workers)?;
    let own = workers.iter().find(|worker| worker.rank == rollout).map(|worker| &worker.format);
    let on_receive = own.is_some_and(|format| format["quantizes"] == true);
    Ok((agreement.trainer_quantizes || on_receive).then_some(agreement.rules))
}

/// Whether a rollout can load what arrives there.
fn fits(
    trainer_quantizes: bool,
    rank: Rank,
    on_receive: bool,
    accepts: Option<Accepts>,
    expects_fp8: bool,
) -> Result<()> {
    match accepts {
        None if expects_fp8 && !trainer_quantizes && !on_receive => Err(disagreement(
            rank,
            format!(
                "rank {rank} has trainer_quantize_fp8, which the trainer has not: set it on the trainer, or \
                 quantize_on_receive on the rollout"
            ),
        )),
        Some(Accepts::Unquantized) if trainer_quantizes => Err(disagreement(
            rank,
            format!(
                "the trainer quantises to FP8 (trainer_quantize_fp8), rank {rank} accepts \
                 unquantized weights only"
            ),
        )),
        Some(Accepts::Unquantized) if on_receive => Err(disagreement(
            rank,
            format!("rank {rank} accepts unquantized weights only, and has quantize_on_receive"),
        )),
        Some(Accepts::Fp8) if !trainer_quantizes && !on_receive => Err(disagreement(
            rank,
            format!(
                "rank {rank} accepts fp8 only, the trainer sends unquantized weights: set \
                 trainer_quantize_fp8 on the trainer or quantize_on_receive on the rollout"
            ),
        )),
        _ => Ok(()),
    }
}

/// Checks at a rollout that the weights that arrive are what it declared.
///
/// The trainer follows the declarations of the ranks that it formed the group with. This check also covers ranks that
/// joined later, trainers without quantisation whose checkpoint is FP8 already, and any other sender.
#[derive(Debug)]
pub(crate) struct Inspector {
    section: Quantization,
    rules: Rules,
    /// Unquantised weights whose layer is not known yet.
    window: Window<(DType, String)>,
    /// The shapes that the scales of FP8 weights have to have, until these arrive.
    scale_shapes: HashMap<String, Vec<usize>>,
}

impl Inspector {
    /// An inspector for one update; `None` if the rollout takes anything.
    pub(crate) fn new(section: &Quantization, rules: &Rules) -> Option<Self> {
        let Quantization { mode, granularity, scale_name, accepts, manifest, .. } = section;
        let anything = mode.is_none_or(|mode| mode != Mode::Ue8m0)
            && (granularity.is_none() && scale_name.is_none() && accepts.is_none())
            && manifest.is_none();
        (!anything).then(|| Self {
            section: section.clone(),
            rules: rules.clone(),
            window: Window::default(),
            scale_shapes: HashMap::new(),
        })
    }

    pub(crate) fn inspect(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        for piece in bucket.pieces() {
            let name = &*piece.meta.name;
            let checked = if piece.meta.dtype == DType::F32 && weight_of_scale(name).is_some() {
                self.scales(&piece)
            } else {
                self.weight(&piece)
            };
            let refuse = |message: String, name: &str| {
                Error::new(ErrorKind::Mismatch, "checking the format of weights", message)
                    .tensor(name)
            };
            checked.map_err(|message| refuse(message, name))?;
            // What would have been quantised, its whole layer considered. The last layer of a model is
            // followed by its norm or its head.
            while let Some((dtype, decision, name)) = self.settled()? {
                if decision == Decision::Quantize {
                    return Err(refuse(
                        format!("it is {dtype}, this rank accepts fp8 only"),
                        &name,
                    ));
                }
            }
        }
        Ok(())
    }

    fn settled(&mut self) -> Result<Option<(DType, Decision, String)>> {
        let settled = self.window.pop(&self.rules, false)?;
        Ok(settled.map(|((dtype, name), decision, _)| (dtype, decision, name)))
    }

    fn weight(&mut self, piece: &ReceivedPiece) -> Result<(), String> {
        if piece.start > 0 {
            return Ok(());
        }
        let name = &*piece.meta.name;
        let shape = sizes(&piece.meta).map_err(|error| error.to_string())?;
        let stored = stored(piece.meta.dtype);
        if self.section.accepts == Some(Accepts::Unquantized) && stored == Stored::Fp8 {
            return Err("it is FP8, this rank accepts unquantized weights only".into());
        }
        // A manifest is checked by deciding.
        let by_itself =
            self.rules.decide(name, &shape, stored).map_err(|error| error.to_string())?;
        if self.section.accepts == Some(Accepts::Fp8) {
            let item = (piece.meta.dtype, name.to_owned());
            self.window.push(item, name, &shape, 0, by_itself);
        }
        if let (Stored::Fp8, Some(granularity)) = (stored, self.section.granularity) {
            let expected = granularity.scale_shape(&shape).map_err(|error| error.to_string())?;
            self.scale_shapes.insert(name.to_owned(), expected);
        }
        Ok(())
    }

    fn scales(&mut self, piece: &ReceivedPiece) -> Result<(), String> {
        const MANTISSA: u32 = (1 << 23) - 1;

        let name = &*piece.meta.name;
        if let Some(wanted) = self.section.scale_name
            && !name.ends_with(wanted.suffix())
        {
            return Err(format!("this rank wants scales named ..{}", wanted.suffix()));
        }
        let weight = weight_of_scale(name).unwrap_or_default();
        if piece.start == 0
            && let Some(expected) = self.scale_shapes.remove(weight)
        {
            let shape = sizes(&piece.meta).map_err(|error| error.to_string())?;
            if shape != expected {
                let granularity = self.section.granularity.unwrap_or_default();
                return Err(format!(
                    "its shape is {shape:?}, for the {granularity} that this rank wants it would \
                     be {expected:?}"
                ));
            }
        }
        if self.section.mode == Some(Mode::Ue8m0) {
            let bytes = piece.bytes.to_host().map_err(|error| error.to_string())?;
            let (scales, _) = bytes.as_chunks::<4>();
            let power_of_two = |scale: &[u8; 4]| u32::from_le_bytes(*scale) & MANTISSA == 0;
            if !scales.iter().all(power_of_two) {
                return Err("this rank wants scales that are powers of two (ue8m0)".into());
            }
        }
        Ok(())
    }
}
