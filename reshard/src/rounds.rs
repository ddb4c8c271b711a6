//! Orders transfers so that no two ranks send to the same rank at a time.

/// Assigns a round to each pair of a sender and a receiver, both numbered from 0. In each round, a sender or receiver has at most one pair.
/// There are as many rounds as the busiest rank has partners, which is the minimum.
///
/// Every bipartite graph has such an edge colouring (König). Edges are coloured one after the other. If the colours that are free at the
/// two ends of an edge differ, they are exchanged along the path of these two colours from one end.
pub(crate) fn rounds(pairs: &[(u32, u32)]) -> Vec<u32> {
    const NONE: u32 = u32::MAX;

    let count =
        |of: fn(&(u32, u32)) -> u32| pairs.iter().map(of).max().map_or(0, |n| n as usize + 1);
    let (senders, receivers) = (count(|pair| pair.0), count(|pair| pair.1));
    let mut degrees = vec![0_usize; senders + receivers];
    for &(from, to) in pairs {
        degrees[from as usize] += 1;
        degrees[senders + to as usize] += 1;
    }
    let colours = degrees.iter().copied().max().unwrap_or(0);
    // For each rank and colour, the pair that has it.
    let mut taken = vec![NONE; (senders + receivers) * colours];
    let mut colour_of = vec![NONE; pairs.len()];
    let ends = |pair: u32| {
        let (from, to) = pairs[pair as usize];
        [from as usize, senders + to as usize]
    };
    for pair in (0..).take(pairs.len()) {
        let [from, to] = ends(pair);
        let free = |taken: &[u32], rank: usize| {
            let own = &taken[rank * colours..(rank + 1) * colours];
            // A colour is free: the rank has at most `colours` pairs, and at least one of them has no colour yet.
            own.iter().position(|&pair| pair == NONE).unwrap_or_default()
        };
        let (at_from, at_to) = (free(&taken, from), free(&taken, to));
        if taken[to * colours + at_from] != NONE {
            // The path from the receiver never reaches the sender: it enters senders by `at_from`, which no pair of this sender has.
            let (mut path, mut rank, mut colour) = (Vec::new(), to, at_from);
            loop {
                let next = taken[rank * colours + colour];
                if next == NONE {
                    break;
                }
                path.push(next);
                let [one, other] = ends(next);
                rank = if one == rank { other } else { one };
                colour = if colour == at_from { at_to } else { at_from };
            }
            for &pair in &path {
                for end in ends(pair) {
                    taken[end * colours + colour_of[pair as usize] as usize] = NONE;
                }
            }
            for &pair in &path {
                let old = colour_of[pair as usize] as usize;
                let new = if old == at_from { at_to } else { at_from };
                colour_of[pair as usize] = new as u32;
                for end in ends(pair) {
                    taken[end * colours + new] = pair;
                }
            }
        }
        colour_of[pair as usize] = at_from as u32;
        taken[from * colours + at_from] = pair;
        taken[to * colours + at_from] = pair;
    }
    colour_of
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn no_rank_has_two_pairs_in_a_round_and_there_are_no_more_rounds_than_partners(
            pairs in prop::collection::btree_set((0_u32..9, 0_u32..7), 0..63),
        ) {
            let pairs: Vec<_> = pairs.into_iter().collect();
            let rounds = rounds(&pairs);
            let (mut seen, mut partners) = (BTreeSet::new(), [0_u32; 16]);
            for (&(from, to), &round) in pairs.iter().zip(&rounds) {
                prop_assert!(seen.insert((0, from, round)) && seen.insert((1, to, round)));
                partners[from as usize] += 1;
                partners[9 + to as usize] += 1;
            }
            let most = partners.iter().max().unwrap();
            prop_assert!(rounds.iter().all(|round| round < most));
        }
    }
}
