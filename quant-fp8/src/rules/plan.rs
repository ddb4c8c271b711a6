//! The decisions on a whole model.

use std::collections::{HashMap, HashSet};

use serde_json::{Value, json};

use super::{
    Decision, FUSED, Rule, Rules, RulesConfig, Stored, module, split_last, weight_of_scale,
};
use crate::{Fp8Format, Granularity, Mode, QuantError, ScaleName};

/// What happens to one parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
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

/// The decisions on all parameters of a model, in the order in which they were given.
#[derive(Clone, Debug)]
pub struct QuantPlan {
    format: Fp8Format,
    entries: Vec<PlanEntry>,
    by_name: HashMap<String, usize>,
}

impl QuantPlan {
    /// Decides on every parameter.
    ///
    /// # Errors
    ///
    /// Those of [`Rules::new`], [`Rules::decide`] and [`Consistency`], and
    /// [`QuantError::Duplicate`].
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

        let mut plan = Self { format: config.format, entries: Vec::new(), by_name: HashMap::new() };
        let mut consistency = Consistency::default();
        for (name, shape, stored) in &parameters {
            let has_scale = *stored != Stored::Fp8 && with_scale.contains(name.as_str());
            let (decision, rule) = if has_scale && config.manifest.is_none() {
                (Decision::Pass, Rule::HasScale)
            } else {
                rules.decide(name, shape, *stored)?
            };
            consistency.observe(name, *stored, decision, &rule)?;
            if plan.by_name.insert(name.clone(), plan.entries.len()).is_some() {
                return Err(QuantError::Duplicate { tensor: name.clone() });
            }
            let (name, shape) = (name.clone(), shape.clone());
            plan.entries.push(PlanEntry { name, shape, decision, rule });
        }
        consistency.finish()?;
        Ok(plan)
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

    /// The `quantization_config` for `config.json` that makes vLLM and SGLang expect exactly this
    /// plan: every layer with a kept matrix is in `modules_to_not_convert`, by its full name.
    ///
    /// # Errors
    ///
    /// [`QuantError::Config`] for scales per row, and for scales named `weight_scale` on blocks:
    /// `quant_method` `fp8` cannot say these.
    pub fn quantization_config(&self) -> Result<Value, QuantError> {
        let mut kept = Vec::new();
        for entry in &self.entries {
            let layer = module(&entry.name);
            let is_bias = split_last(layer).1.ends_with("bias");
            if entry.decision == Decision::Keep && entry.shape.len() >= 2 && !is_bias {
                kept.push(layer);
            }
        }
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
            (Granularity::PerRow, _) => return Err(unsayable("scales per row")),
            (Granularity::Block { .. }, ScaleName::WeightScale) => {
                return Err(unsayable("block scales named weight_scale"));
            }
            (Granularity::Block { rows, cols }, ScaleName::WeightScaleInv) => {
                config["weight_block_size"] = json!([rows, cols]);
            }
            (Granularity::PerTensor, _) => {}
        }
        if self.format.mode == Mode::Ue8m0 {
            config["scale_fmt"] = json!("ue8m0");
        }
        Ok(config)
    }
}

/// What must hold between parameters, checked as they come by: a weight that is FP8 comes with its
/// scale and a scale with its weight, and the parts of a fused layer are treated alike.
#[derive(Clone, Debug, Default)]
pub struct Consistency {
    /// What has been seen of each weight and its scale, by the name of the weight.
    weights: HashMap<String, Half>,
    /// The first part of each fused layer.
    parts: HashMap<(String, &'static str), Part>,
}

#[derive(Clone, Debug, Default)]
struct Half {
    /// Whether the weight itself has been seen.
    weight: bool,
    needs_scale: bool,
    scale: Option<String>,
}

#[derive(Clone, Debug)]
struct Part {
    name: String,
    decision: Decision,
    reason: String,
}

impl Consistency {
    /// Takes note of a decision.
    ///
    /// # Errors
    ///
    /// [`QuantError::FusedPartsDisagree`], which names both parts.
    pub fn observe(
        &mut self,
        name: &str,
        stored: Stored,
        decision: Decision,
        rule: &Rule,
    ) -> Result<(), QuantError> {
        if let Some(weight) = weight_of_scale(name) {
            self.weights.entry(weight.to_owned()).or_default().scale = Some(name.to_owned());
            return Ok(());
        }
        let half = self.weights.entry(name.to_owned()).or_default();
        half.weight = true;
        half.needs_scale = stored == Stored::Fp8;

        let (parent, last) = split_last(module(name));
        let fused = FUSED.iter().find(|(_, parts)| parts.contains(&last));
        // Biases of the parts are not quantised by anyone.
        let Some((fused, _)) = fused.filter(|_| module(name) != name) else { return Ok(()) };
        let part = Part { name: name.to_owned(), decision, reason: rule.to_string() };
        let first = self.parts.entry((parent.to_owned(), fused)).or_insert_with(|| part.clone());
        // What passes arrives as FP8 like what is quantised.
        if (first.decision == Decision::Keep) != (decision == Decision::Keep) {
            let words = |part: &Part| format!("{}: {}", part.decision, part.reason);
            return Err(QuantError::FusedPartsDisagree {
                first: first.name.clone(),
                first_decision: words(first),
                second: part.name.clone(),
                second_decision: words(&part),
            });
        }
        Ok(())
    }

    /// Checks that nothing waits for its other half.
    ///
    /// # Errors
    ///
    /// [`QuantError::MissingScale`] or [`QuantError::MissingWeight`], for the first name in
    /// alphabetical order.
    pub fn finish(self) -> Result<(), QuantError> {
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
