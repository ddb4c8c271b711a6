//! Simulates how long the transfers of a plan take on links of given speeds.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};

use engine_core::Rank;

use crate::plan::{Pair, ReshardPlan};

/// What links carry, in bytes per second and direction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speeds {
    /// A network card.
    pub network: f64,
    /// A rank to and from the others of its node.
    pub within_node: f64,
    /// Seconds that each transfer between two ranks takes in addition to the time for its bytes.
    pub latency: f64,
    /// The number of transfers that a rank sends at a time, and the number that it receives. With more than one, another transfer fills the
    /// link while one begins or its other end is busy. 0 counts as 1.
    pub at_once: usize,
}

/// The result of a simulation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Simulated {
    /// Seconds until the last byte of weights has arrived.
    pub seconds: f64,
    /// Seconds that the busiest link takes for its bytes alone.
    pub floor: f64,
    /// Seconds until all maxima of straddling blocks are exchanged. They are sent before the weights that need them. The part that does not
    /// overlap with other weights adds to the total time.
    pub maxima: f64,
    /// Bytes of maxima that the busiest rank sends.
    pub maxima_bytes: u64,
    /// Writes that the busiest rank makes, if each contiguous run of bytes takes one write.
    pub writes: u64,
}

/// Simulates an update. Every rank begins its transfers in the order of the plan, `at_once` in each direction at a time. The network and
/// the links within a node work side by side. Transfers that share a link have equal parts of it. Only links take time.
///
/// # Panics
///
/// If a speed is not above zero.
pub fn simulate(plan: &ReshardPlan, speeds: Speeds) -> Simulated {
    assert!(speeds.network > 0.0 && speeds.within_node > 0.0, "links carry something");
    let traffic = plan.traffic();
    let mut writes: HashMap<Rank, u64> = HashMap::new();
    for ((from, _), waves) in &traffic {
        *writes.entry(*from).or_default() += waves.iter().map(|of| of.writes).sum::<u64>();
    }
    let mut order: Vec<(u32, &Pair, u64)> = Vec::new();
    for pair in plan.pairs() {
        let waves = (0..).zip(&traffic[&(pair.from, pair.to)]).filter(|(_, of)| of.bytes > 0);
        order.extend(waves.map(|(wave, of)| (wave, pair, of.bytes)));
    }
    order.sort_by_key(|(wave, pair, _)| (*wave, pair.round));
    let mut links = Numbers::default();
    let mut queues = Numbers::default();
    let jobs: Vec<Job> = order
        .into_iter()
        .map(|(_, pair, bytes)| {
            let near = pair.within_node;
            let speed = if near { speeds.within_node } else { speeds.network };
            let site = |rank: Rank| if near { (2, rank.0) } else { plan.card_of(rank) };
            Job {
                links: [links.of((site(pair.from), 0), speed), links.of((site(pair.to), 1), speed)],
                queues: [
                    queues.of(((u8::from(near), pair.from.0), 0), speed),
                    queues.of(((u8::from(near), pair.to.0), 1), speed),
                ],
                rest: bytes as f64,
            }
        })
        .collect();
    let mut bytes = vec![0.0; links.speeds.len()];
    for job in &jobs {
        job.links.iter().for_each(|&link| bytes[link] += job.rest);
    }
    let times = bytes.iter().zip(&links.speeds).map(|(bytes, speed)| bytes / speed);
    let floor = times.fold(0.0, f64::max);
    let seconds = run(jobs, queues.speeds.len(), &links.speeds, speeds);
    let maxima_bytes = plan.maxima_bytes();
    let maxima = match maxima_bytes {
        0 => 0.0,
        bytes => bytes as f64 / speeds.network + speeds.latency,
    };
    let writes = writes.into_values().max().unwrap_or(0);
    Simulated { seconds, floor, maxima, maxima_bytes, writes }
}

/// Numbers links or queues, each in one direction, in the order in which they occur.
#[derive(Default)]
struct Numbers {
    numbers: HashMap<((u8, u32), u8), usize>,
    speeds: Vec<f64>,
}

impl Numbers {
    fn of(&mut self, what: ((u8, u32), u8), speed: f64) -> usize {
        *self.numbers.entry(what).or_insert_with(|| {
            self.speeds.push(speed);
            self.speeds.len() - 1
        })
    }
}

/// A transfer. It waits in the queues of its two ranks, and shares the speed of two links.
struct Job {
    queues: [usize; 2],
    links: [usize; 2],
    /// Bytes that are left.
    rest: f64,
}

/// Runs jobs, which every queue admits in this order. Returns the time at which the last one ends.
fn run(jobs: Vec<Job>, queues: usize, links: &[f64], speeds: Speeds) -> f64 {
    let mut waiting: Vec<VecDeque<usize>> = vec![VecDeque::new(); queues];
    for (number, job) in jobs.iter().enumerate() {
        job.queues.iter().for_each(|&queue| waiting[queue].push_back(number));
    }
    let mut run = Run {
        links,
        latency: speeds.latency,
        states: jobs.iter().map(|_| State::default()).collect(),
        jobs,
        waiting,
        on: vec![Vec::new(); links.len()],
        events: BinaryHeap::new(),
        now: 0.0,
        edition: 0,
    };
    for queue in 0..queues {
        (0..speeds.at_once.max(1)).for_each(|_| run.admit(queue));
    }
    while let Some(Reverse((at, number, edition))) = run.events.pop() {
        let state = &run.states[number];
        if state.edition == edition {
            run.now = f64::from_bits(at);
            match state.rate {
                // Its latency is over.
                0.0 => run.begin(number),
                _ => run.end(number),
            }
        }
    }
    run.now
}

#[derive(Clone, Copy, Default)]
struct State {
    /// How many of its queues let it begin.
    admitted: u8,
    rate: f64,
    /// The time at which `rest` was computed.
    since: f64,
    /// Changes with every rate, so that an end foreseen earlier is ignored.
    edition: u64,
}

struct Run<'a> {
    /// The speeds of all links.
    links: &'a [f64],
    latency: f64,
    jobs: Vec<Job>,
    states: Vec<State>,
    /// For each queue, the jobs that it has not admitted.
    waiting: Vec<VecDeque<usize>>,
    /// For each link, the jobs that it carries.
    on: Vec<Vec<usize>>,
    /// When jobs begin or end, as foreseen. Times are not negative, so their bits are ordered as they are.
    events: BinaryHeap<Reverse<(u64, usize, u64)>>,
    now: f64,
    edition: u64,
}

impl Run<'_> {
    fn admit(&mut self, queue: usize) {
        let Some(number) = self.waiting[queue].pop_front() else { return };
        self.states[number].admitted += 1;
        if self.states[number].admitted == 2 {
            self.foresee(number, self.latency);
        }
    }

    fn foresee(&mut self, number: usize, after: f64) {
        self.edition += 1;
        self.states[number].edition = self.edition;
        self.events.push(Reverse(((self.now + after).to_bits(), number, self.edition)));
    }

    fn begin(&mut self, number: usize) {
        let links = self.jobs[number].links;
        links.iter().for_each(|&link| self.on[link].push(number));
        self.states[number].since = self.now;
        self.settle(links);
    }

    fn end(&mut self, number: usize) {
        let Job { links, queues, .. } = self.jobs[number];
        links.iter().for_each(|&link| self.on[link].retain(|&other| other != number));
        self.settle(links);
        queues.iter().for_each(|&queue| self.admit(queue));
    }

    /// Updates the rates of all jobs on two links.
    fn settle(&mut self, links: [usize; 2]) {
        let mut numbers: Vec<usize> =
            links.iter().flat_map(|&link| self.on[link].iter().copied()).collect();
        numbers.sort_unstable();
        numbers.dedup();
        for number in numbers {
            let (job, state) = (&mut self.jobs[number], &mut self.states[number]);
            job.rest = (job.rest - state.rate * (self.now - state.since)).max(0.0);
            let share = |link: usize| self.links[link] / self.on[link].len() as f64;
            state.rate = share(job.links[0]).min(share(job.links[1]));
            state.since = self.now;
            let after = job.rest / state.rate;
            self.foresee(number, after);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A job of a sender and a receiver, each with a queue and a link of its number.
    fn job(from: usize, to: usize, rest: f64) -> Job {
        Job { queues: [from, to], links: [from, to], rest }
    }

    fn seconds(jobs: Vec<Job>, speeds: &[f64], latency: f64) -> f64 {
        let of = Speeds { network: 1.0, within_node: 1.0, latency, at_once: 2 };
        run(jobs, speeds.len(), speeds, of)
    }

    #[test]
    fn who_shares_a_link_has_an_equal_part_of_it_until_one_is_done() {
        // Two of 10 and 30 bytes from one sender, at 10 bytes a second: the first is done after 2 s, the other after 4.
        assert_eq!(seconds(vec![job(0, 1, 10.0), job(0, 2, 30.0)], &[10.0; 3], 0.0), 4.0);
        // While one sender is slow, another sends in the other part.
        let jobs = vec![job(0, 2, 10.0), job(1, 2, 25.0), job(1, 2, 25.0)];
        assert_eq!(seconds(jobs, &[1.0, 10.0, 10.0], 0.0), 10.0);
    }

    #[test]
    fn ranks_have_so_many_transfers_at_a_time_in_their_order() {
        // The third waits for one of the first two, with its latency.
        let jobs = || vec![job(0, 3, 10.0), job(1, 3, 10.0), job(2, 3, 10.0)];
        assert_eq!(seconds(jobs(), &[10.0; 4], 0.0), 3.0);
        assert_eq!(seconds(jobs(), &[10.0; 4], 0.5), 0.5 + 2.0 + 0.5 + 1.0);
        // The last one's receiver is free, but its sender has two before it.
        let jobs = vec![job(0, 1, 10.0), job(0, 2, 10.0), job(0, 3, 10.0)];
        assert_eq!(seconds(jobs, &[10.0, 10.0, 10.0, 10.0], 0.5), 0.5 + 2.0 + 0.5 + 1.0);
    }
}
