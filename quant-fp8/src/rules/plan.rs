//! The decisions on a whole model.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use serde_json::{Value, json};

use super::layers::Layers;
use super::names::{
    Kind, alias, experts_of, join, kind, module, packed_parts, parallel_mixer, split_last,
};
use super::{Decision, Rule, Rules, RulesConfig, Stored, weight_of_scale};
use crate::{Fp8Format, Granularity, Mode, QuantError, ScaleName};

/// What happens to one parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlanEntry {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What happens to it.
    pub decision: Decision,
    /// The rule that decided.
    pub rule: Rule,
}

impl PlanEntry {
    fn elements(&self) -> u64 {
        self.shape.iter().map(|&side| side as u64).product()
    }

    /// Whether receivers have such weights in FP8 at all: matrices of layers, or stacks of them.
    fn is_quantizable(&self) -> bool {
        let matrices = match self.shape.len() {
            2 => true,
            // Kernels of convolutions have three sides too.
            3 => self.shape[1..].iter().all(|&side| side >= super::NARROW),
            _ => false,
        };
        let by_name = matches!(kind(&self.name, &self.shape), Kind::Kept(_));
        let by_rule = matches!(self.rule, Rule::IsScale | Rule::NotFloat | Rule::Narrow);
        matrices && !by_name && !by_rule
    }
}

/// How much of a model that could be FP8 is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Share {
    /// Elements of matrices that are FP8, or become FP8.
    pub quantized: u64,
    /// Elements of matrices of layers that stay as they are, by the identifier of the rule.
    /// Embeddings, heads, routers, towers and what is narrow do not count.
    pub kept: BTreeMap<&'static str, u64>,
}

impl Share {
    /// The part that stays as it is, from 0 to 1; 0 for a model without such matrices.
    pub fn kept_part(&self) -> f64 {
        let kept: u64 = self.kept.values().sum();
        if kept == 0 { 0.0 } else { kept as f64 / (kept + self.quantized) as f64 }
    }
}

/// The decisions on all parameters of a model, in the order in which they were given.
#[derive(Clone, Debug)]
pub struct QuantPlan {
    format: Fp8Format,
    entries: Vec<PlanEntry>,
    by_name: HashMap<String, usize>,
    unmatched: Vec<String>,
}

impl QuantPlan {
    /// Decides on every parameter, and on the layers that they are parts of.
    ///
    /// # Errors
    ///
    /// Those of [`Rules::new`] and [`Rules::decide`]; [`QuantError::FusedPartsDisagree`] if a part of a
    /// layer is ignored and the rest is not; [`QuantError::MissingScale`],
    /// [`QuantError::MissingWeight`] and [`QuantError::Duplicate`].
    pub fn resolve<N: Into<String>>(
        parameters: impl IntoIterator<Item = (N, Vec<usize>, Stored)>,
        config: &RulesConfig,
    ) -> Result<Self, QuantError> {
        let rules = Rules::new(config)?;
        let parameters: Vec<(String, Vec<usize>, Stored)> = parameters
            .into_iter()
            .map(|(name, shape, stored)| (name.into(), shape, stored))
            .collect();
        let with_scale: HashSet<&str> =
            parameters.iter().filter_map(|(name, ..)| weight_of_scale(name)).collect();

        let mut entries = Vec::new();
        let mut by_name = HashMap::new();
        let mut consistency = Consistency::default();
        let mut layers = Layers::default();
        let mut matched = HashSet::new();
        for (name, shape, stored) in &parameters {
            let has_scale = *stored != Stored::Fp8 && with_scale.contains(name.as_str());
            let (decision, rule) = if has_scale && config.manifest.is_none() {
                (Decision::Pass, Rule::HasScale)
            } else {
                rules.decide(name, shape, *stored)?
            };
            consistency.observe(name, *stored);
            layers.add(name, shape, decision, rule.clone());
            matched.extend(rules.ignored_by(name, shape));
            if by_name.insert(name.clone(), entries.len()).is_some() {
                return Err(QuantError::Duplicate { tensor: name.clone() });
            }
            let (name, shape) = (name.clone(), shape.clone());
            entries.push(PlanEntry { name, shape, decision, rule });
        }
        consistency.finish()?;
        layers.resolve(&rules)?;
        let mut decisions = layers.into_decisions();
        for entry in &mut entries {
            if let Some((decision, rule)) = decisions.remove(&entry.name) {
                (entry.decision, entry.rule) = (decision, rule);
            }
        }
        let mut unmatched: Vec<String> = rules
            .entries
            .iter()
            .filter(|entry| !matched.contains(entry.as_str()))
            .cloned()
            .collect();
        let mut seen = HashSet::new();
        unmatched.retain(|entry| seen.insert(entry.clone()));
        Ok(Self { format: config.format, entries, by_name, unmatched })
    }

    /// What quantised weights look like.
    pub fn format(&self) -> &Fp8Format {
        &self.format
    }

    /// All decisions.
    pub fn entries(&self) -> &[PlanEntry] {
        &self.entries
    }

    /// The decision on a parameter; `None` if the plan was made without it.
    pub fn get(&self, name: &str) -> Option<&PlanEntry> {
        self.by_name.get(name).map(|&index| &self.entries[index])
    }

    /// The matrices that are kept because no rule knows them. Worth a look: one of these may be a
    /// projection under a new name.
    pub fn unlisted(&self) -> impl Iterator<Item = &PlanEntry> {
        self.entries.iter().filter(|entry| entry.rule == Rule::Unlisted)
    }

    /// The entries of `ignored_layers` and `modules_to_not_convert`, the checkpoint's own among them,
    /// that match no parameter: a typing error, or names of another model.
    pub fn unmatched(&self) -> &[String] {
        &self.unmatched
    }

    /// How much of what could be FP8 is.
    pub fn share(&self) -> Share {
        let mut share = Share::default();
        for entry in &self.entries {
            match entry.decision {
                _ if entry.rule == Rule::IsScale => {}
                Decision::Quantize | Decision::Pass => share.quantized += entry.elements(),
                Decision::Keep if entry.is_quantizable() => {
                    *share.kept.entry(entry.rule.id()).or_default() += entry.elements();
                }
                Decision::Keep => {}
            }
        }
        share
    }

    /// The layers that are kept because of their shape, of the layer that they are parts of, or of a list
    /// of layers to ignore: what a stream cannot be expected to find out weight by weight. As
    /// [`ignored_layers`](RulesConfig::ignored_layers) they make rules decide as this plan, in whatever
    /// order weights come.
    pub fn layers_to_ignore(&self) -> Vec<String> {
        self.modules(|rule| {
            matches!(
                rule,
                Rule::Ignored(_) | Rule::Layer(_) | Rule::Receiver(_) | Rule::Unaligned { .. }
            )
        })
    }

    /// The names of layers with a matrix that is kept by such a rule, as receivers have them.
    fn modules(&self, by: impl Fn(&Rule) -> bool) -> Vec<String> {
        let mut quantized_experts = HashSet::new();
        for entry in &self.entries {
            if entry.decision != Decision::Keep {
                quantized_experts.extend(experts_of(&entry.name, &entry.shape));
            }
        }
        let layers = self.parallel_layers();
        let mut kept: Vec<String> = Vec::new();
        let mut listed = HashSet::new();
        let mut list = |layer: String| {
            // Of layers with attention and a mixer vLLM counts the mixers on behind the last layer, and leaves
            // out what they are in.
            let counted =
                parallel_mixer(&layer).filter(|_| layers > 0).map(|(model, layer, rest)| {
                    let model = model.split('.').next().unwrap_or(model);
                    format!("{model}.{}.mixer.{rest}", layers + layer)
                });
            let alias = alias(&layer);
            for name in std::iter::once(layer).chain(alias).chain(counted) {
                if listed.insert(name.clone()) {
                    kept.push(name);
                }
            }
        };
        for entry in &self.entries {
            let layer = module(&entry.name);
            let is_bias = split_last(layer).1.ends_with("bias");
            let is_kept = entry.decision == Decision::Keep && by(&entry.rule);
            if !is_kept || entry.shape.len() < 2 || is_bias {
                continue;
            }
            let by_name = matches!(kind(&entry.name, &entry.shape), Kind::Kept(_));
            let experts = experts_of(&entry.name, &entry.shape)
                .filter(|experts| !by_name && !quantized_experts.contains(experts));
            match experts {
                // What a stack is called in the checkpoint is what transformers looks for.
                Some(experts) if !layer.starts_with(&experts) => {
                    list(experts);
                    list(layer.to_owned());
                }
                Some(experts) => list(experts),
                None => {
                    list(layer.to_owned());
                    // SGLang looks for the parts of what it would fuse, also where the checkpoint has it as one.
                    let (parent, last) = split_last(layer);
                    for part in packed_parts(last) {
                        list(join(parent, part));
                    }
                }
            }
        }
        kept
    }

    /// How many layers the model has, if they have attention and a state space mixer side by side (Falcon-H1).
    fn parallel_layers(&self) -> usize {
        let mixers: BTreeSet<(&str, usize)> = self
            .entries
            .iter()
            .filter_map(|entry| parallel_mixer(&entry.name))
            .map(|(model, layer, _)| (model, layer))
            .collect();
        let has_attention = |&(model, layer): &(&str, usize)| {
            let attention = format!("{model}.layers.{layer}.self_attn.");
            self.entries.iter().any(|entry| entry.name.starts_with(&attention))
        };
        match mixers.last() {
            Some(last) if has_attention(last) => last.1 + 1,
            _ => 0,
        }
    }

    /// The `quantization_config` for `config.json` that makes vLLM and SGLang expect exactly this
    /// plan: every layer with a kept matrix is in `modules_to_not_convert`, by its full name. Experts
    /// that are all kept are there once, under the name that receivers have for all of them.
    ///
    /// # Errors
    ///
    /// [`QuantError::Config`] for scales per row, for scales named `weight_scale` on blocks and for
    /// scales named `weight_scale_inv` on whole tensors: `quant_method` `fp8` cannot say these.
    pub fn quantization_config(&self) -> Result<Value, QuantError> {
        let kept = self.modules(|_| true);
        let mut config = json!({
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "modules_to_not_convert": kept,
        });
        let unsayable = |what: &str| QuantError::Config {
            reason: format!("quant_method fp8 cannot express {what}"),
        };
        match (self.format.granularity, self.format.scale_name) {
            (Granularity::PerRow, _) => {
                return Err(unsayable(
                    "scales per row; blocks such as 128x128 it can, and per-tensor",
                ));
            }
            (Granularity::Block { .. }, ScaleName::WeightScale) => {
                return Err(unsayable("block scales named weight_scale"));
            }
            (Granularity::PerTensor, ScaleName::WeightScaleInv) => {
                return Err(unsayable("scales per tensor named weight_scale_inv"));
            }
            (Granularity::Block { rows, cols }, ScaleName::WeightScaleInv) => {
                config["weight_block_size"] = json!([rows, cols]);
            }
            (Granularity::PerTensor, ScaleName::WeightScale) => {}
        }
        if self.format.mode == Mode::Ue8m0 {
            config["scale_fmt"] = json!("ue8m0");
        }
        Ok(config)
    }
}

/// That a weight which is FP8 comes with its scale, and a scale with its weight; checked as they come
/// by.
#[derive(Clone, Debug, Default)]
pub(crate) struct Consistency {
    /// What has been seen of each weight and its scale, by the name of the weight.
    weights: HashMap<String, Half>,
}

#[derive(Clone, Debug, Default)]
struct Half {
    /// Whether the weight itself has been seen.
    weight: bool,
    needs_scale: bool,
    scale: Option<String>,
}

impl Consistency {
    /// Takes note of a parameter.
    pub(crate) fn observe(&mut self, name: &str, stored: Stored) {
        if let Some(weight) = weight_of_scale(name) {
            self.weights.entry(weight.to_owned()).or_default().scale = Some(name.to_owned());
            return;
        }
        let half = self.weights.entry(name.to_owned()).or_default();
        half.weight = true;
        half.needs_scale = stored == Stored::Fp8;
    }

    /// Checks that nothing waits for its other half.
    ///
    /// # Errors
    ///
    /// [`QuantError::MissingScale`] or [`QuantError::MissingWeight`], for the first name in
    /// alphabetical order.
    pub(crate) fn finish(self) -> Result<(), QuantError> {
        let mut weights: Vec<_> = self.weights.into_iter().collect();
        weights.sort_by(|(a, _), (b, _)| a.cmp(b));
        for (tensor, half) in weights {
            match half {
                Half { weight: false, scale: Some(scale), .. } => {
                    return Err(QuantError::MissingWeight { tensor: scale });
                }
                Half { needs_scale: true, scale: None, .. } => {
                    return Err(QuantError::MissingScale { tensor });
                }
                _ => {}
            }
        }
        Ok(())
    }
}
