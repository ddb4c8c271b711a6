//! Sharing work among replicas.

/// Deals `count` units of `size` so that the largest of the loads stays as small as it can, and adds them. Returns how many units
/// each gets.
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
    // The units are water: it rises over the lowest loads until it has a level.
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
    // Fewer units than filled loads are left, each to who has least.
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

/// Puts numbers below `count` in an order in which neighbours come far apart, so that who gets a run of numbers gets a share
/// of all times.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    count: u64,
    step: u64,
}

impl Spread {
    pub(crate) fn new(count: u64) -> Self {
        // About the golden section of the count, and prime to it.
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

fn gcd(one: u64, other: u64) -> u64 {
    if other == 0 { one } else { gcd(other, one % other) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
        fn a_spread_has_every_place_once(count in 1_u64..300) {
            let spread = Spread::new(count);
            let mut places: Vec<_> = (0..count).map(|number| spread.place(number)).collect();
            places.sort_unstable();
            prop_assert_eq!(places, (0..count).collect::<Vec<_>>());
        }
    }
}
