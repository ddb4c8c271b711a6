//! Entry points for the targets of `fuzz/`: messages of ranks in a placed update. Only in builds for fuzzing.

use bytes::Bytes;
use engine_core::{Rank, Role};
use protocol::decode;
use protocol::fuzzing::same_again;
use reshard::Planner;

use crate::coordinator::{digest_of, set_of};
use crate::declared::{Declaration, table};
use crate::message::{Declared, ToLeader, ToMember};

/// The most elements of a tensor that are planned here, because a plan grows with its tensors.
const MOST_ELEMENTS: u64 = 1 << 20;

/// Decodes bytes as a message of either direction.
pub fn message(body: &[u8]) {
    same_again::<ToMember>(body);
    same_again::<ToLeader>(body);
}

/// Decodes declarations, and makes the plan of one rank from them. Its pieces must lie within what is lent, and its tiles
/// must cover the pieces.
pub fn declarations(rank: u32, bodies: &[(u32, bool, &[u8])]) {
    let mut declared: Vec<Declared> = Vec::new();
    for (rank, is_trainer, body) in bodies {
        same_again::<Declaration>(body);
        let Ok(declaration) = decode::<Declaration>(body) else { return };
        let regions: Vec<_> = match &declaration {
            Declaration::Holds(held) => {
                held.iter().map(|held| (&held.meta, &held.region)).collect()
            }
            Declaration::Wants { tensors, .. } => {
                tensors.iter().map(|lent| (&lent.wanted.meta, &lent.wanted.region)).collect()
            }
        };
        let is_small = |shape: &[u64]| {
            let sides = shape.iter().try_fold(1_u64, |all, side| all.checked_mul((*side).max(1)));
            sides.is_some_and(|elements| elements <= MOST_ELEMENTS)
        };
        if !regions.iter().all(|(meta, _)| is_small(&meta.shape)) {
            return;
        }
        let role = if *is_trainer { Role::Trainer } else { Role::Rollout };
        declared.push(Declared { rank: Rank(*rank), role, body: Bytes::copy_from_slice(body) });
    }
    declared.sort_by_key(|one| one.rank);
    declared.dedup_by_key(|one| one.rank);
    let digests: Vec<_> = declared.iter().map(|one| digest_of(&one.body)).collect();
    let set =
        set_of(declared.iter().zip(&digests).map(|(one, digest)| (one.rank, one.role, digest)));
    let Ok(table) = table(&mut Planner::new(), Rank(rank), set, &declared) else { return };
    for piece in &table.pieces {
        assert!(piece.lent.wanted.region.contains(&piece.region), "outside of what is lent");
        let tiled: u64 = piece.tiles.iter().map(engine_core::TensorBox::elements).sum();
        assert_eq!(tiled, piece.region.elements(), "tiles that are not the piece");
    }
}
