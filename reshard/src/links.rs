//! The nodes and network cards of ranks.

use std::collections::BTreeMap;
use std::ops::Range;

use engine_core::Rank;

/// Which node each rank is on, and by which network card it reaches others.
///
/// Ranks of a node reach one another without the network. A rank that is not known counts as a node of its own, with a card of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Links {
    places: BTreeMap<Rank, Place>,
    nodes: u32,
    cards: u32,
}

/// The node and the card of a rank. Known sites never have the number of an unknown rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Place {
    pub(crate) node: Site,
    pub(crate) card: Site,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Site {
    Known(u32),
    OfRank(Rank),
}

impl Site {
    /// A number that no other site has.
    pub(crate) fn number(self) -> (u8, u32) {
        match self {
            Self::Known(number) => (0, number),
            Self::OfRank(rank) => (1, rank.0),
        }
    }
}

impl Links {
    /// Links without a known rank.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds nodes of `ranks_per_node` consecutive ranks, whose ranks take turns on `cards_per_node` network cards. Zero
    /// of either counts as one.
    pub fn add_nodes(&mut self, ranks: Range<u32>, ranks_per_node: u32, cards_per_node: u32) {
        let (per_node, cards) = (ranks_per_node.max(1), cards_per_node.max(1));
        for rank in ranks.clone() {
            let (node, local) = ((rank - ranks.start) / per_node, (rank - ranks.start) % per_node);
            let place = Place {
                node: Site::Known(self.nodes + node),
                card: Site::Known(self.cards + node * cards + local % cards),
            };
            self.places.insert(Rank(rank), place);
        }
        let nodes = (ranks.end.saturating_sub(ranks.start)).div_ceil(per_node);
        self.nodes += nodes;
        self.cards += nodes * cards;
    }

    pub(crate) fn place(&self, rank: Rank) -> Place {
        let own = Place { node: Site::OfRank(rank), card: Site::OfRank(rank) };
        self.places.get(&rank).copied().unwrap_or(own)
    }
}
