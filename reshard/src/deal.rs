//! Distributes work over replicas.

use engine_core::Rank;

/// Distributes `count` units of `size` so that the largest load stays as small as possible, and adds them to the loads. Returns the number
/// of units for each.
pub(crate) fn fill(loads: &mut [u64], count: u64, size: u64) -> Vec<u64> {
    let mut given = vec![0; loads.len()];
    if let [only] = loads {
        *only += count * size;
        return vec![count];
    }
    if size == 0 {
        if let Some(first) = given.first_mut() {
            *first = count;
        }
        return given;
    }
    let mut order: Vec<usize> = (0..loads.len()).collect();
    order.sort_by_key(|&at| (loads[at], at));
    // Water filling: the units raise the lowest loads to a common level.
    let (mut sum, mut filled) = (0_u128, 0);
    let water = u128::from(count) * u128::from(size);
    for (below, &at) in (0_u128..).zip(&order) {
        let bottom = u128::from(loads[at]);
        if bottom * below >= water + sum {
            break;
        }
        sum += bottom;
        filled += 1;
    }
    let level = (water + sum) / (filled as u128).max(1);
    let mut rest = count;
    for &at in &order[..filled] {
        let units = ((level - u128::from(loads[at]).min(level)) / u128::from(size)) as u64;
        given[at] = units.min(rest);
        rest -= given[at];
        loads[at] += given[at] * size;
    }
    // The units that are left go to the lowest loads, one each.
    let mut order: Vec<usize> = order[..filled].to_vec();
    while rest > 0 {
        order.sort_by_key(|&at| (loads[at], at));
        for &at in order.iter().take(rest.min(order.len() as u64) as usize) {
            given[at] += 1;
            loads[at] += size;
            rest -= 1;
        }
    }
    given
}

/// Permutes the numbers below `count` so that neighbours come far apart. A rank with a range of places thus has tensors of all waves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    count: u64,
    step: u64,
}

impl Spread {
    pub(crate) fn new(count: u64) -> Self {
        // About the golden section of the count, and coprime to it.
        let mut step = (count as f64 * 0.618_033_988_75) as u64;
        while step > 1 && gcd(step, count) != 1 {
            step -= 1;
        }
        Self { count: count.max(1), step: step.max(1) }
    }

    pub(crate) fn place(self, number: u64) -> u64 {
        (u128::from(number) * u128::from(self.step) % u128::from(self.count)) as u64
    }
}

/// Which rank does a task, for each tensor of a group.
#[derive(Clone, Debug)]
pub(crate) enum Dealt {
    /// One rank does it for all tensors.
    One(Rank),
    /// The end of each rank's range, in [spread](Spread) order.
    Many(Box<[(u64, Rank)]>),
}

impl Dealt {
    /// Takes the number of tensors of each rank.
    pub(crate) fn new(given: impl IntoIterator<Item = (Rank, u64)>) -> Self {
        let mut end = 0;
        let given = given.into_iter().filter(|&(_, count)| count > 0);
        let ends: Box<[_]> = given
            .map(|(rank, count)| {
                end += count;
                (end, rank)
            })
            .collect();
        match *ends {
            [(_, only)] => Self::One(only),
            _ => Self::Many(ends),
        }
    }

    pub(crate) fn of(&self, number: u64, spread: Spread) -> Rank {
        match self {
            Self::One(rank) => *rank,
            Self::Many(ends) => {
                let place = spread.place(number);
                ends[ends.partition_point(|&(end, _)| end <= place).min(ends.len() - 1)].1
            }
        }
    }

    pub(crate) fn has(&self, rank: Rank) -> bool {
        match self {
            Self::One(only) => *only == rank,
            Self::Many(ends) => ends.iter().any(|&(_, own)| own == rank),
        }
    }

    /// The ranks that have a tensor here and in `other`, with the number of such tensors out of `count`.
    pub(crate) fn beside(&self, other: &Self, count: u64) -> Vec<(Rank, Rank, u64)> {
        let (one, two) = (self.ends(count), other.ends(count));
        let (mut one, mut two) = (one.iter().peekable(), two.iter().peekable());
        let (mut before, mut all) = (0, Vec::new());
        while let (Some(&&(end, own)), Some(&&(their_end, theirs))) = (one.peek(), two.peek()) {
            let until = end.min(their_end);
            all.push((own, theirs, until - before));
            before = until;
            one.next_if(|(end, _)| *end == until);
            two.next_if(|(end, _)| *end == until);
        }
        all
    }

    /// The end of each rank's range of `count` tensors, in spread order.
    pub(crate) fn ends(&self, count: u64) -> Vec<(u64, Rank)> {
        match self {
            Self::One(rank) => vec![(count, *rank)],
            Self::Many(ends) => ends.to_vec(),
        }
    }
}

fn gcd(one: u64, other: u64) -> u64 {
    if other == 0 { one } else { gcd(other, one % other) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn units_are_dealt_as_one_after_the_other_to_who_has_least(
            loads in prop::collection::vec(0_u64..40, 1..6), count in 0_u64..50, size in 1_u64..7,
        ) {
            let mut naive = loads.clone();
            for _ in 0..count {
                let least = (0..naive.len()).min_by_key(|&at| naive[at]).unwrap();
                naive[least] += size;
            }
            let mut dealt = loads.clone();
            let given = fill(&mut dealt, count, size);
            prop_assert_eq!(given.iter().sum::<u64>(), count);
            for (at, units) in given.iter().enumerate() {
                prop_assert_eq!(dealt[at], loads[at] + units * size);
            }
            naive.sort_unstable();
            dealt.sort_unstable();
            prop_assert_eq!(dealt.last(), naive.last());
        }

        #[test]
        fn what_two_deals_say_of_tensors_is_what_they_say_of_their_numbers(
            one in prop::collection::vec(0_u64..4, 1..5), other in prop::collection::vec(0_u64..4, 1..5),
        ) {
            let count = one.iter().sum::<u64>().max(other.iter().sum());
            prop_assume!(count > 0);
            let dealt = |counts: &[u64]| {
                let rest = count - counts.iter().sum::<u64>();
                let all = counts.iter().copied().chain([rest]);
                Dealt::new((0..).map(Rank).zip(all))
            };
            let (one, other) = (dealt(&one), dealt(&other));
            let mut naive = BTreeMap::new();
            for number in 0..count {
                let spread = Spread::new(count);
                let both = (one.of(number, spread), other.of(number, spread));
                prop_assert!(one.has(both.0) && other.has(both.1));
                *naive.entry(both).or_insert(0) += 1;
            }
            let found = one.beside(&other, count).into_iter().map(|(a, b, count)| ((a, b), count));
            prop_assert_eq!(found.collect::<BTreeMap<_, _>>(), naive);
        }

        #[test]
        fn a_spread_has_every_place_once(count in 1_u64..300) {
            let spread = Spread::new(count);
            let mut places: Vec<_> = (0..count).map(|number| spread.place(number)).collect();
            places.sort_unstable();
            prop_assert_eq!(places, (0..count).collect::<Vec<_>>());
        }
    }
}
