//! Plans who sends which part of which weight to whom, for trainers and rollouts that hold parts of tensors.
//!
//! - A [`Layout`] says which [boxes](engine_core::TensorBox) of a tensor are on which ranks. A [`Sharding`] holds the layouts of all
//!   tensors. They come from what each rank declares ([`Declarations`]), or from the layouts of frameworks: a [`Mesh`] with [`Placement`]s,
//!   a [`Parallelism`]. A [`FusedTensor`] consists of boxes of several tensors of the checkpoint.
//! - A [`Planner`] makes a [`ReshardPlan`] from what trainers hold and what rollouts want. The plan depends on these alone, so all ranks
//!   that know the same boxes have the same plan.
//!
//! - [`simulate()`] computes how long the transfers of a plan take on links of given speeds.
//!
//! The crate does no IO, reads no clock and uses no device.
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
