//! Layouts of models: tensor, pipeline, expert and data parallelism.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use engine_core::{Error, ErrorKind, Rank, Result, TensorBox, TensorMeta};

use crate::mesh::chunk;
use crate::{Layout, ShardedTensor, Sharding};

/// How a model is divided over consecutive ranks, by the names of a Hugging Face checkpoint.
///
/// Ranks are ordered as in Megatron by default, and as in vLLM and SGLang. From innermost to outermost: tensor parallelism, data-parallel
/// replicas, stages of the pipeline. For experts: tensor parallelism of experts (`etp`), expert parallelism (`ep`), replicas, stages.
/// Context parallelism divides no weights: its ranks count as replicas.
///
/// Column-parallel tensors (`q_proj`, `gate_proj`, embeddings, …) are divided along their first dimension, row-parallel tensors (`o_proj`,
/// `down_proj`) along their second. All others are whole on each rank. Replicas may divide their part again along the first dimension
/// (`fsdp`), as FSDP2 does.
///
/// The text form is `tp=8,ep=64,ranks=128`. A size that is not given is 1, and `kv-heads` is 0. Without `ep` and `etp`, tensor parallelism
/// divides experts too, as in vLLM, SGLang and Megatron: `etp` is `tp`. The number of ranks is by default the larger of `tp`·`pp`·`fsdp`
/// and `ep`·`etp`·`pp`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parallelism {
    /// The number of ranks.
    pub ranks: u32,
    /// Tensor parallelism, of all but experts.
    pub tp: u32,
    /// Stages of the pipeline. Layers are divided over them as `torch.chunk` does it. The embedding is on the first stage, all other
    /// tensors outside the layers are on the last.
    pub pp: u32,
    /// Expert parallelism: consecutive experts are divided over this many groups of ranks.
    pub ep: u32,
    /// Tensor parallelism of experts.
    pub etp: u32,
    /// The number of replicas that divide their common part among them.
    pub fsdp: u32,
    /// The number of key and value heads. If it is less than `tp`, neighbours hold the same head. 0 if it is not known.
    pub kv_heads: u32,
}

/// What the layout of a tensor depends on besides its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Role {
    /// The dimension that tensor parallelism divides.
    divided: Option<usize>,
    /// The group of ranks that holds its expert, if it belongs to one.
    expert: Option<u32>,
    stage: u32,
    /// The number of key and value heads; 0 for other tensors, and if it is not known.
    heads: u32,
}

const COLUMNS: [&str; 10] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "gate_proj",
    "up_proj",
    "q_b_proj",
    "kv_b_proj",
    "embed_tokens",
    "lm_head",
    "gate_up_proj",
];
const ROWS: [&str; 2] = ["o_proj", "down_proj"];

impl Parallelism {
    /// The layouts of a model's tensors, on ranks from `first` on. Each tensor comes with its granule: the sides of the blocks in which it
    /// is encoded, empty if there are none.
    ///
    /// # Errors
    ///
    /// `Config` if the numbers do not fit each other or the model; `Weight`, naming the tensor, if it occurs twice.
    pub fn sharding(
        &self,
        first: Rank,
        tensors: impl IntoIterator<Item = (TensorMeta, Arc<[u64]>)>,
    ) -> Result<Sharding> {
        self.validate()?;
        let tensors: Vec<_> = tensors.into_iter().collect();
        let most = |segment: &str| {
            let numbers = tensors.iter().filter_map(|(meta, _)| number_after(&meta.name, segment));
            numbers.max().map_or(0, |last| last.saturating_add(1))
        };
        let (layers, experts) = (most("layers"), most("experts"));
        if self.ep > 1 && (experts == 0 || experts < self.ep) {
            return Err(refuse(format!("ep={} for {experts} experts", self.ep)));
        }
        let mut layouts: HashMap<(Arc<[u64]>, Role), Arc<Layout>> = HashMap::new();
        let mut sharding = Sharding::new();
        for (meta, granule) in tensors {
            let role = self.role(&meta, layers, experts);
            let key = (meta.shape.clone(), role);
            let layout = match layouts.get(&key) {
                Some(layout) => layout.clone(),
                None => {
                    let layout = self.layout(first, &meta.shape, role);
                    let layout = Arc::new(layout.map_err(|error| error.tensor(&*meta.name))?);
                    layouts.insert(key, layout.clone());
                    layout
                }
            };
            sharding.add(ShardedTensor { meta, granule, layout })?;
        }
        Ok(sharding)
    }

    /// The tensor parallelism of experts where it is not given.
    fn usual_etp(&self) -> u32 {
        if self.ep == 1 { self.tp } else { 1 }
    }

    fn validate(&self) -> Result<()> {
        let sizes = [self.ranks, self.tp, self.pp, self.ep, self.etp, self.fsdp];
        let divides = |sizes: &[u32]| {
            let product = sizes.iter().try_fold(1_u32, |product, &n| product.checked_mul(n));
            product.is_some_and(|product| product > 0 && self.ranks.is_multiple_of(product))
        };
        if sizes.contains(&0)
            || !divides(&[self.tp, self.pp, self.fsdp])
            || !divides(&[self.ep, self.etp, self.pp])
        {
            return Err(refuse(format!("{self}: the sizes do not divide the number of ranks")));
        }
        Ok(())
    }

    fn role(&self, meta: &TensorMeta, layers: u32, experts: u32) -> Role {
        let segments = || meta.name.rsplit('.');
        let has = |names: &[&str]| segments().any(|segment| names.contains(&segment));
        let is_bias = meta.name.ends_with(".bias");
        let divided = match meta.shape.len() {
            0 => None,
            _ if has(&COLUMNS) => Some(0),
            2 if has(&ROWS) && !is_bias => Some(1),
            _ => None,
        };
        let layer = number_after(&meta.name, "layers");
        let per_stage = layers.div_ceil(self.pp).max(1);
        let stage = match layer {
            Some(layer) => layer / per_stage,
            None if has(&["embed_tokens"]) => 0,
            None => self.pp - 1,
        };
        let expert = number_after(&meta.name, "experts").map(|expert| {
            // Only the group of ranks matters, so experts of one group share a layout.
            let group = chunk_of(experts, self.ep, expert);
            if self.ep == 1 { 0 } else { group }
        });
        let heads = if has(&["k_proj", "v_proj"]) { self.kv_heads } else { 0 };
        Role { divided, expert, stage: stage.min(self.pp - 1), heads }
    }

    fn layout(&self, first: Rank, shape: &[u64], role: Role) -> Result<Layout> {
        let per_stage = self.ranks / self.pp;
        let tp = if role.expert.is_some() { self.etp } else { self.tp };
        let boxes = (0..per_stage).filter_map(|local| {
            let (tensor, mut replica) = (local % tp, local / tp);
            if let Some(group) = role.expert {
                if replica % self.ep != group {
                    return None;
                }
                replica /= self.ep;
            }
            let mut region = TensorBox::whole(shape);
            if let Some(dimension) = role.divided {
                let along = region.ranges()[dimension].clone();
                // With fewer heads than ranks, neighbours hold the same head.
                let parts = if (1..tp).contains(&role.heads) { role.heads } else { tp };
                let part = u64::from(tensor) * u64::from(parts) / u64::from(tp);
                region = region.narrowed(dimension, chunk(along, parts.into(), part));
            }
            // FSDP divides the first dimension of the part that a rank would hold.
            let fsdp = self.fsdp.min(self.replicas(role));
            if fsdp > 1 {
                // A scalar is not divided.
                if let Some(along) = region.ranges().first().cloned() {
                    let part = u64::from(replica % fsdp);
                    region = region.narrowed(0, chunk(along, fsdp.into(), part));
                }
            }
            Some((Rank(first.0 + role.stage * per_stage + local), region))
        });
        Layout::new(shape, boxes.collect::<Vec<_>>())
    }

    fn replicas(&self, role: Role) -> u32 {
        let per_stage = self.ranks / self.pp;
        match role.expert {
            Some(_) => per_stage / (self.etp * self.ep),
            None => per_stage / self.tp,
        }
        .max(1)
    }
}

/// The chunk that contains `number` when `torch.chunk` divides `count` into `chunks`.
fn chunk_of(count: u32, chunks: u32, number: u32) -> u32 {
    number / count.div_ceil(chunks.max(1)).max(1)
}

/// The number after a segment: `Some(3)` for `model.layers.3.mlp` and `layers`.
fn number_after(name: &str, segment: &str) -> Option<u32> {
    let mut segments = name.split('.');
    segments.find(|found| *found == segment)?;
    segments.next()?.parse().ok()
}

impl FromStr for Parallelism {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut found = Self { ranks: 0, tp: 1, pp: 1, ep: 1, etp: 0, fsdp: 1, kv_heads: 0 };
        let mut has_etp = false;
        for pair in text.split(',') {
            let wrong = || refuse(format!("`{pair}` of `{text}` is no NAME=NUMBER"));
            let (name, number) = pair.split_once('=').ok_or_else(wrong)?;
            let number: u32 = number.parse().map_err(|_| wrong())?;
            let field = match name {
                "ranks" => &mut found.ranks,
                "tp" => &mut found.tp,
                "pp" => &mut found.pp,
                "ep" => &mut found.ep,
                "etp" => &mut found.etp,
                "fsdp" => &mut found.fsdp,
                "kv-heads" => &mut found.kv_heads,
                _ => {
                    let known = "ranks, tp, pp, ep, etp, fsdp and kv-heads";
                    return Err(refuse(format!("there is no `{name}`: known are {known}")));
                }
            };
            *field = number;
            has_etp |= name == "etp";
        }
        if !has_etp {
            found.etp = found.usual_etp();
        }
        if found.ranks == 0 {
            let product =
                |sizes: [u32; 3]| sizes.iter().try_fold(1_u32, |all, &n| all.checked_mul(n));
            let dense = product([found.tp, found.pp, found.fsdp]);
            let experts = product([found.ep, found.etp, found.pp]);
            let (Some(dense), Some(experts)) = (dense, experts) else {
                return Err(refuse(format!("`{text}` takes more ranks than there are numbers")));
            };
            found.ranks = dense.max(experts);
        }
        found.validate()?;
        Ok(found)
    }
}

impl fmt::Display for Parallelism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes = [
            ("tp", self.tp, 1),
            ("pp", self.pp, 1),
            ("ep", self.ep, 1),
            ("etp", self.etp, self.usual_etp()),
            ("fsdp", self.fsdp, 1),
        ];
        for (name, size, _) in sizes.into_iter().filter(|(_, size, usual)| size != usual) {
            write!(f, "{name}={size},")?;
        }
        if self.kv_heads > 0 {
            write!(f, "kv-heads={},", self.kv_heads)?;
        }
        write!(f, "ranks={}", self.ranks)
    }
}

fn refuse(message: String) -> Error {
    Error::new(ErrorKind::Config, "laying out a model", message)
}
