//! Who sends which part of which weight to whom, where trainers and rollouts have parts of tensors.
//!
//! - A [`Layout`] says which [boxes](engine_core::TensorBox) of a tensor are on which ranks, a [`Sharding`] has those of all
//!   tensors. They come from what each rank declares ([`Declarations`]), or from the layouts that frameworks
//!   have: a [`Mesh`] with [`Placement`]s, a [`Parallelism`]. A [`FusedTensor`] is boxes of several tensors of the checkpoint.
//! - A [`Planner`] makes a [`ReshardPlan`] of what trainers hold and rollouts want: a pure function, so that all ranks have the same
//!   plan if they know the same boxes.
//!
//! - [`simulate()`] says how long the transfers of a plan would take on links of given speeds.
//!
//! There is no IO here, no clock and no device: numbers and names.
//!
//! ```
//! use engine_core::{DType, Rank, TensorMeta};
//! use reshard::{Links, Parallelism, plan};
//!
//! // Four trainers have a quarter of the rows each, two rollouts want half of the columns each.
//! let down = TensorMeta::new("model.layers.0.mlp.down_proj.weight", DType::BF16, [512, 256]);
//! let tensors = || [(down.clone(), [].into())];
//! let held = "fsdp=4".parse::<Parallelism>()?.sharding(Rank(0), tensors())?;
//! let wanted = "tp=2".parse::<Parallelism>()?.sharding(Rank(4), tensors())?;
//! let plan = plan(&held, &wanted, &Links::new())?;
//!
//! let sent = plan.transfers_from(Rank(1));
//! let to: Vec<_> = sent.iter().map(|transfer| (transfer.to, transfer.region.to_string())).collect();
//! assert!(to.contains(&(Rank(4), "[128..256, 0..128]".into())));
//! assert!(to.contains(&(Rank(5), "[128..256, 128..256]".into())));
//! # Ok::<(), engine_core::Error>(())
//! ```

#![forbid(unsafe_code)]

mod crossing;
mod deal;
mod dealer;
mod fused;
mod layout;
mod links;
mod mesh;
mod parallel;
mod plan;
mod planner;
mod rounds;
mod search;
mod sharding;
mod simulate;

pub use fused::{FusedPart, FusedTensor};
pub use layout::{Layout, Share};
pub use links::Links;
pub use mesh::{Mesh, Placement};
pub use parallel::Parallelism;
pub use plan::{CardLoad, Load, MaximaExchange, Pair, ReshardPlan, Transfer, WAVES};
pub use planner::{Planner, Work, plan};
pub use sharding::{Declarations, ShardedTensor, Sharding};
pub use simulate::{Simulated, Speeds, simulate};
