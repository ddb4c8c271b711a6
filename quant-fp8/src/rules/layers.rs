//! Decisions that depend on more than one weight: receivers make one layer of several weights of a
//! checkpoint, and a layer is quantised as a whole or not at all.

use std::collections::{HashMap, VecDeque};

use super::names::{self, Kind};
use super::profile::{Fused, Profile, WholeRows};
use super::{Decision, Rule, Rules};
use crate::QuantError;

/// How many bytes a stream may hold back behind the weight that waits for the rest of its layer.
const HELD_BACK: u64 = 256 << 20;

/// A weight beside others of the same module.
#[derive(Clone, Debug)]
struct Member {
    name: String,
    shape: Vec<usize>,
    /// What was decided: by itself at first, for the layer in the end.
    decision: Decision,
    rule: Rule,
    /// Whether the decision is final, because the weight has been passed on.
    settled: bool,
}

impl Member {
    fn part(&self) -> &str {
        names::part(&self.name)
    }

    fn is_matrix(&self) -> bool {
        self.shape.len() == 2
    }

    fn ignored(&self) -> bool {
        matches!(self.rule, Rule::Ignored(_))
    }

    fn counts(&self) -> bool {
        // Neither biases and norms nor routers are parts of layers that can be quantised.
        self.shape.len() >= 2
            && !matches!(names::kind(&self.name, &self.shape), Kind::Kept(_))
            && !matches!(self.rule, Rule::IsScale | Rule::NotFloat)
    }

    fn keep(&mut self, rule: Rule) {
        (self.decision, self.rule) = (Decision::Keep, rule);
    }
}

/// All weights right under one module that are known.
#[derive(Clone, Debug, Default)]
struct Family {
    members: Vec<Member>,
    /// How many of them were looked at for whether the module has layers of several weights.
    seen: usize,
    has_layers: bool,
}

/// Projections to queries, keys and values as one.
const PACKED: [&str; 5] = ["qkv_proj", "query_key_value", "Wqkv", "wqkv", "att_proj"];

impl Family {
    fn find(&self, part: &str) -> Option<usize> {
        self.members.iter().position(|member| member.is_matrix() && member.part() == part)
    }

    fn shape_of(&self, part: &str) -> Option<&[usize]> {
        let found = self.members.iter().find(|member| member.part() == part);
        found.map(|member| &*member.shape)
    }

    /// The parts of a fused layer that are there, if it is one.
    fn parts(&self, fused: &Fused) -> Option<Vec<usize>> {
        let all_there = fused.when.iter().all(|part| self.find(part).is_some());
        let parts: Vec<usize> = fused.parts.iter().filter_map(|part| self.find(part)).collect();
        (all_there && parts.len() > 1).then_some(parts)
    }

    /// Whether a weight is here that the decision on another one can depend on.
    fn has_layers(&mut self, profile: &Profile) -> bool {
        let new = self.members.get(self.seen..).unwrap_or_default();
        let of_layer = |part: &str| {
            matches!(part, "in_proj" | "gate_up_proj")
                || PACKED.contains(&part)
                || profile.fused().any(|fused| fused.parts.contains(&part))
        };
        self.has_layers |= new.iter().any(|member| of_layer(member.part()));
        self.seen = self.members.len();
        self.has_layers
    }

    /// Keeps whatever cannot be quantised because of what else is in the module, until nothing
    /// changes any more.
    fn decide(&mut self, profile: &Profile, rules: &Rules) -> Result<(), QuantError> {
        // A module without any is as large as its model may be: what is below looks at all of its weights.
        if !self.has_layers(profile) {
            return Ok(());
        }
        let before = self.members.clone();
        if let Some((rows, cols)) = rules.block {
            self.mixers(profile, rows);
            self.packed(profile, rows);
            self.stacks(profile, rows, cols);
        }
        let mut changed = true;
        while changed {
            changed = false;
            for fused in profile.fused() {
                changed |=
                    self.parts(fused).is_some_and(|parts| self.fuse(profile, rules, fused, &parts));
            }
        }
        for fused in profile.fused() {
            if let Some(parts) = self.parts(fused) {
                self.agree(fused, &parts)?;
            }
        }
        // What has been passed on cannot be changed any more.
        for (was, member) in before.iter().zip(&self.members) {
            if was.settled && was.decision != member.decision {
                return Err(self.disagreement(was, &member.rule));
            }
        }
        Ok(())
    }

    fn disagreement(&self, settled: &Member, reason: &Rule) -> QuantError {
        let latest = self.members.last().unwrap_or(settled);
        disagreement(settled, latest, names::parent(&settled.name), Some(reason))
    }

    /// Whether something was kept because parts of the same layer are, or are no whole blocks.
    fn fuse(&mut self, profile: &Profile, rules: &Rules, fused: &Fused, parts: &[usize]) -> bool {
        let mut reason = None;
        // What the user left out is asked about at the end: that alone keeps no other part.
        let kept = parts.iter().find(|&&index| {
            let member = &self.members[index];
            member.decision == Decision::Keep && !member.ignored()
        });
        if let Some(&index) = kept {
            reason = Some(Rule::Layer(self.members[index].name.clone()));
        }
        let whole = match (profile.whole_rows, parts) {
            (WholeRows::PartsButTheLast, [parts @ .., _]) => parts,
            (WholeRows::Parts, [parts @ .., _]) if fused.one_partition => parts,
            (WholeRows::Parts | WholeRows::All, parts) => parts,
            _ => &[],
        };
        let block_rows = rules.block.map_or(1, |(rows, _)| rows);
        let mut changed = false;
        let partial = whole.iter().find(|&&index| {
            let member = &self.members[index];
            member.decision == Decision::Quantize && !member.shape[0].is_multiple_of(block_rows)
        });
        if let (None, Some(&index)) = (&reason, partial) {
            let member = &mut self.members[index];
            reason = Some(Rule::Layer(member.name.clone()));
            let size = member.shape[0];
            member.keep(Rule::Unaligned { side: "rows", size, block: block_rows });
            changed = true;
        }
        let Some(reason) = reason else { return changed };
        for &index in parts {
            let member = &mut self.members[index];
            if member.decision == Decision::Quantize {
                member.keep(reason.clone());
                changed = true;
            }
        }
        changed
    }

    /// Checks that the parts of a layer end up alike.
    fn agree(&self, fused: &Fused, parts: &[usize]) -> Result<(), QuantError> {
        let members = || parts.iter().map(|&index| &self.members[index]);
        // Some checkpoints come half quantised where only some receivers fuse.
        let ours = |member: &&Member| match member.decision {
            Decision::Quantize => true,
            Decision::Pass => fused.when.is_empty(),
            Decision::Keep => false,
        };
        let quantized = members().find(ours);
        let kept = members().find(|member| member.decision == Decision::Keep);
        let (Some(quantized), Some(kept)) = (quantized, kept) else { return Ok(()) };
        let before = |member: &Member| self.members.iter().position(|m| m.name == member.name);
        let (first, second) =
            if before(quantized) < before(kept) { (quantized, kept) } else { (kept, quantized) };
        let layer = names::join(names::parent(&kept.name), fused.layer);
        Err(disagreement(first, second, &layer, None))
    }

    /// Mixers of state-space models.
    fn mixers(&mut self, profile: &Profile, block_rows: usize) {
        if self.find("in_proj").is_none() {
            return;
        }
        if self.find("x_proj").is_some() || self.shape_of("x_proj_weight").is_some() {
            for part in ["in_proj", "x_proj", "dt_proj", "out_proj"] {
                if let Some(index) = self.find(part).filter(|_| !profile.mamba1) {
                    let rule =
                        Rule::Receiver(format!("{} has Mamba-1 mixers unquantised", profile.title));
                    self.refuse(index, rule);
                }
            }
            return;
        }
        let heads = ["A_log", "dt_bias", "D"].into_iter().find_map(|part| self.shape_of(part));
        let (Some(&[heads]), Some(&[convolved, ..])) = (heads, self.shape_of("conv1d")) else {
            return;
        };
        let rows = self.shape_of("in_proj").and_then(|shape| shape.first().copied()).unwrap_or(0);
        // The rows are gate and input, then two groups of states, and one for each head; the
        // convolution goes over input and states.
        let inner = rows.saturating_sub(convolved + heads);
        let states = convolved.saturating_sub(inner) / 2;
        let part = [inner, states, heads].into_iter().find(|size| !size.is_multiple_of(block_rows));
        if let (Some(size), true, Some(index)) =
            (part, profile.whole_mamba2_parts, self.find("in_proj"))
        {
            self.refuse(index, Rule::Unaligned { side: "rows of a part", size, block: block_rows });
        }
    }

    /// Projections to queries, keys and values that a checkpoint has as one.
    fn packed(&mut self, profile: &Profile, block_rows: usize) {
        if matches!(profile.whole_rows, WholeRows::No | WholeRows::All) {
            return;
        }
        let out = ["o_proj", "dense", "out_proj", "wo", "attn_out"];
        let Some(index) = PACKED.into_iter().find_map(|part| self.find(part)) else { return };
        let Some(queries) = out.into_iter().find_map(|part| self.shape_of(part)) else { return };
        let (rows, &[_, queries]) = (self.members[index].shape[0], queries) else { return };
        let keys = rows.saturating_sub(queries) / 2;
        let part = [queries, keys].into_iter().find(|size| !size.is_multiple_of(block_rows));
        if let Some(size) = part {
            self.refuse(index, Rule::Unaligned { side: "rows of a part", size, block: block_rows });
        }
    }

    /// Stacks of experts whose layout the receiver does not load.
    fn stacks(&mut self, profile: &Profile, block_rows: usize, block_cols: usize) {
        let find = |part: &str| {
            let is = |member: &Member| member.shape.len() == 3 && member.part() == part;
            self.members.iter().position(is)
        };
        let (up, down) = (find("gate_up_proj"), find("down_proj"));
        let (Some(up), Some(down)) = (up, down) else { return };
        let (&[_, up_rows, up_cols], &[_, down_rows, down_cols]) =
            (&*self.members[up].shape, &*self.members[down].shape)
        else {
            return;
        };
        let biases = self.shape_of("gate_up_proj_bias").is_some();
        // The hidden size is the columns of the one and the rows of the other, or the reverse.
        let transposed = up_rows == down_cols && up_cols == 2 * down_rows;
        let rule = if transposed && (biases || !profile.transposed_stacks) {
            Rule::Receiver(format!("{} does not load stacks of [experts, in, out]", profile.title))
        } else {
            let (inner, block) =
                if transposed { (up_cols / 2, block_cols) } else { (up_rows / 2, block_rows) };
            if !profile.whole_columns || inner.is_multiple_of(block) {
                return;
            }
            Rule::Unaligned { side: "rows of a part", size: inner, block }
        };
        self.refuse(up, rule.clone());
        self.refuse(down, rule);
    }

    fn refuse(&mut self, index: usize, rule: Rule) {
        let member = &mut self.members[index];
        if member.decision == Decision::Quantize {
            member.keep(rule);
        }
    }
}

fn disagreement(first: &Member, second: &Member, layer: &str, reason: Option<&Rule>) -> QuantError {
    let words = |member: &Member| format!("{}: {}", member.decision, member.rule);
    QuantError::FusedPartsDisagree {
        first: first.name.clone(),
        first_decision: words(first),
        second: second.name.clone(),
        second_decision: reason.map_or_else(|| words(second), |rule| format!("keep: {rule}")),
        layer: layer.to_owned(),
    }
}

/// What is known of the layers of a model.
#[derive(Debug, Default)]
pub(crate) struct Layers {
    families: HashMap<String, Family>,
    /// The first weight that counts of all experts of a layer.
    experts: HashMap<String, Member>,
}

impl Layers {
    /// Takes note of a weight and of what was decided on it by itself.
    pub(crate) fn add(&mut self, name: &str, shape: &[usize], decision: Decision, rule: Rule) {
        if matches!(rule, Rule::Manifest | Rule::IsScale) {
            return; // The receiver has said itself what it makes of which weight.
        }
        let member =
            Member { name: name.to_owned(), shape: shape.to_vec(), decision, rule, settled: false };
        self.families.entry(names::parent(name).to_owned()).or_default().members.push(member);
    }

    /// Takes note of a weight that has been passed on.
    pub(crate) fn add_settled(
        &mut self,
        name: &str,
        shape: &[usize],
        decision: Decision,
        rule: Rule,
    ) {
        self.add(name, shape, decision, rule);
        let family = self.families.get_mut(names::parent(name));
        if let Some(member) = family.and_then(|family| family.members.last_mut()) {
            member.settled = true;
            if let Some(experts) = names::experts_of(name, shape).filter(|_| member.counts()) {
                self.experts.entry(experts).or_insert_with(|| member.clone());
            }
        }
    }

    /// The decision on a weight, in view of what is known of its layer; it is final.
    ///
    /// # Errors
    ///
    /// [`QuantError::FusedPartsDisagree`] if the layer would be quantised in part.
    pub(crate) fn settle(
        &mut self,
        rules: &Rules,
        name: &str,
        shape: &[usize],
    ) -> Result<Option<(Decision, Rule)>, QuantError> {
        let Some(family) = self.families.get_mut(names::parent(name)) else { return Ok(None) };
        family.decide(rules.profile, rules)?;
        // It is one of the latest.
        let Some(member) = family.members.iter_mut().rev().find(|member| member.name == name)
        else {
            return Ok(None);
        };
        if let Some(experts) = names::experts_of(name, shape).filter(|_| member.counts()) {
            let first = self.experts.entry(experts.clone()).or_insert_with(|| member.clone());
            match (first.decision, member.decision) {
                (Decision::Keep, Decision::Quantize) if !first.ignored() => {
                    member.keep(Rule::Layer(first.name.clone()));
                }
                (Decision::Keep, Decision::Quantize) | (Decision::Quantize, Decision::Keep) => {
                    return Err(disagreement(first, member, &experts, None));
                }
                _ => {}
            }
        }
        member.settled = true;
        Ok(Some((member.decision, member.rule.clone())))
    }

    /// Decides on all layers, with all of their weights known.
    ///
    /// # Errors
    ///
    /// [`QuantError::FusedPartsDisagree`] if the user left out a part of a layer.
    pub(crate) fn resolve(&mut self, rules: &Rules) -> Result<(), QuantError> {
        for family in self.families.values_mut() {
            family.decide(rules.profile, rules)?;
        }
        let mut kept: HashMap<String, Member> = HashMap::new();
        let mut left_out: HashMap<String, Member> = HashMap::new();
        let members = self.families.values().flat_map(|family| &family.members);
        for member in members.filter(|member| member.decision == Decision::Keep) {
            let experts = names::experts_of(&member.name, &member.shape);
            if let Some(experts) = experts.filter(|_| member.counts()) {
                let of = if member.ignored() { &mut left_out } else { &mut kept };
                let first = of.entry(experts).or_insert_with(|| member.clone());
                if member.name < first.name {
                    *first = member.clone();
                }
            }
        }
        for family in self.families.values_mut() {
            for member in &mut family.members {
                if member.decision != Decision::Quantize || !member.counts() {
                    continue;
                }
                let Some(experts) = names::experts_of(&member.name, &member.shape) else {
                    continue;
                };
                if let Some(first) = kept.get(&experts) {
                    member.keep(Rule::Layer(first.name.clone()));
                } else if let Some(first) = left_out.get(&experts) {
                    return Err(disagreement(first, member, &experts, None));
                }
            }
        }
        Ok(())
    }

    /// The decisions on all weights.
    pub(crate) fn into_decisions(self) -> HashMap<String, (Decision, Rule)> {
        let members = self.families.into_values().flat_map(|family| family.members);
        members.map(|member| (member.name, (member.decision, member.rule))).collect()
    }

    /// Whether a weight that is still to come could change the decision on this one, in a stream that
    /// has the weights of a module together.
    fn is_open(&self, rules: &Rules, name: &str) -> bool {
        let family = self.families.get(names::parent(name));
        let member = family
            .and_then(|family| family.members.iter().rev().find(|member| member.name == name));
        let Some(member) = member.filter(|member| member.decision == Decision::Quantize) else {
            return false;
        };
        let part = member.part();
        if member.shape.len() == 3 {
            return matches!(part, "gate_up_proj" | "down_proj");
        }
        let profile = rules.profile;
        // Parts of one shape would all have been refused by themselves, but for their rows.
        let block_rows = rules.block.map_or(1, |(rows, _)| rows);
        let whole =
            member.shape[0].is_multiple_of(block_rows) || profile.whole_rows == WholeRows::No;
        let mut fused = profile.fused().filter(|fused| !fused.alike || !whole);
        fused.any(|fused| fused.parts.contains(&part))
            || matches!(
                part,
                "in_proj" | "qkv_proj" | "query_key_value" | "Wqkv" | "wqkv" | "att_proj"
            )
            || matches!(part, "dt_proj" | "out_proj") && !profile.mamba1
    }
}

/// A stream's weights on their way through the rules: a weight is held back until what follows cannot
/// change the decision on it any more.
///
/// The weights of a module come together in most streams. Then whatever is held back belongs to one
/// module, and never more than `HELD_BACK` bytes and one weight wait behind the first one. Where they do not
/// come together, a layer that would be quantised in part is an error.
#[derive(Debug)]
pub(crate) struct Window<T> {
    layers: Layers,
    waiting: VecDeque<Waiting<T>>,
    bytes: u64,
}

#[derive(Debug)]
struct Waiting<T> {
    item: T,
    name: String,
    shape: Vec<usize>,
    bytes: u64,
    decision: Decision,
    rule: Rule,
}

impl<T> Default for Window<T> {
    fn default() -> Self {
        Self { layers: Layers::default(), waiting: VecDeque::new(), bytes: 0 }
    }
}

impl<T> Window<T> {
    /// Takes note of a weight that went through before.
    pub(crate) fn passed(&mut self, name: &str, shape: &[usize], decision: Decision, rule: Rule) {
        self.layers.add_settled(name, shape, decision, rule);
    }

    /// The next weight of the stream, with the decision on it by itself.
    pub(crate) fn push(
        &mut self,
        item: T,
        name: &str,
        shape: &[usize],
        bytes: u64,
        (decision, rule): (Decision, Rule),
    ) {
        self.layers.add(name, shape, decision, rule.clone());
        self.bytes += bytes;
        let (name, shape) = (name.to_owned(), shape.to_vec());
        self.waiting.push_back(Waiting { item, name, shape, bytes, decision, rule });
    }

    /// The first weight that waits, with the final decision on it, if more of the stream would not
    /// change that.
    ///
    /// # Errors
    ///
    /// As [`Layers::settle`].
    pub(crate) fn pop(
        &mut self,
        rules: &Rules,
        ended: bool,
    ) -> Result<Option<(T, Decision, Rule)>, QuantError> {
        let Some(first) = self.waiting.front() else { return Ok(None) };
        let others = || self.waiting.iter().skip(1);
        let module = names::parent(&first.name);
        let is_within = |name: &str| {
            module.is_empty() || name.strip_prefix(module).is_some_and(|rest| rest.starts_with('.'))
        };
        let open = !ended
            && self.bytes - first.bytes <= HELD_BACK
            && others().all(|other| is_within(&other.name))
            && self.layers.is_open(rules, &first.name);
        if open {
            return Ok(None);
        }
        let Some(first) = self.waiting.pop_front() else { return Ok(None) };
        self.bytes -= first.bytes;
        let settled = self.layers.settle(rules, &first.name, &first.shape)?;
        let (decision, rule) = settled.unwrap_or((first.decision, first.rule));
        Ok(Some((first.item, decision, rule)))
    }

    /// The first weight that waits, with the decision that it came with.
    pub(crate) fn pop_as_it_is(&mut self) -> Option<(T, Decision, Rule)> {
        let first = self.waiting.pop_front()?;
        self.bytes -= first.bytes;
        Some((first.item, first.decision, first.rule))
    }
}
