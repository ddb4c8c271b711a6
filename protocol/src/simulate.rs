//! Simulated updates of groups too large to run on one machine: the real state machines, without connections.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::follower::{self, Follower};
use super::leader::{Leader, Settings};
use super::link::Part;
use super::message::{ToSender, encode};
use super::work::{Act, Collected, Done, Machine};
use engine_core::control::Event;
use engine_core::plan::{BucketLayout, Piece};
use engine_core::{Base, DType, Error, ErrorKind, Parts, Rank, RankSet, Result};
use engine_core::{TensorMeta, Version};

/// The deadline: no rank is late in a simulation.
const NEVER: Duration = Duration::from_secs(1 << 20);
const BUCKET: u64 = 256;

/// A group, and an update of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Simulation {
    /// The number of ranks beside the trainer.
    pub rollouts: u32,
    /// How many of them share a relay. 0 means no relays.
    pub behind: u32,
    /// The number of buckets, each of one tensor.
    pub buckets: u64,
    /// The latency of a message.
    pub latency: Duration,
    /// How long the trainer takes to fill a bucket.
    pub fill: Duration,
}

/// The cost of the update.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Simulated {
    /// The simulated duration of the update, in which only fills and messages take time.
    pub lasts: Duration,
    /// The measured time that the leader's state machine ran.
    pub machine: Duration,
    /// The messages that the leader sent and received. A message to or from several ranks counts once for each.
    pub messages: u64,
    /// The frames that carried them over the leader's connections.
    pub frames: u64,
}

/// A message that arrives: at ranks of one connection, or at the leader from such ranks.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Arrival {
    Down { to: RankSet, body: Bytes },
    Up { from: RankSet, body: Bytes },
    Filled,
}

struct World {
    simulation: Simulation,
    now: Instant,
    /// Ordered by time of arrival, then by the order of sending.
    coming: BinaryHeap<Reverse<(Instant, u64, Arrival)>>,
    count: u64,
    leader: Leader,
    followers: Vec<Follower>,
    took: Simulated,
}

/// Runs one update of a group whose ranks know no plan.
///
/// # Errors
///
/// Those of the update. None is expected, because nothing fails in a simulation.
pub fn simulate(simulation: Simulation) -> Result<Simulated> {
    let began = Instant::now();
    let settings = Settings {
        deadline: NEVER,
        slots: 2,
        bucket_bytes: BUCKET,
        digests: false,
        card: Bytes::new(),
        asks_bases: false,
        needs_receivers: true,
        parts: Parts::default(),
        keeps_all: false,
    };
    let mut leader = Leader::new(settings, Box::new(|_| None), Box::new(|_| None));
    let ranks = (1..=simulation.rollouts).map(Rank);
    ranks.clone().for_each(|rank| leader.admit(rank, Part::Receiver));
    let followers = ranks.map(|rank| Follower::new(rank, NEVER, 0)).collect();
    let (now, coming, took) = (began, BinaryHeap::new(), Simulated::default());
    let mut world = World { simulation, now, coming, count: 0, leader, followers, took };
    for follower in &mut world.followers {
        follower.wait(None, "waiting for an update to begin", began);
    }
    world.leader.begin(1, Version(1), None, began)?;
    world.act();
    while let Some(Reverse((at, _, arrival))) = world.coming.pop() {
        world.now = at;
        match arrival {
            Arrival::Down { to, body } => world.arrive_below(&to, &body)?,
            Arrival::Up { from, body } => world.arrive_above(&from, &body),
            Arrival::Filled => world.work(|leader, now| leader.done(Done::Filled(Ok(0)), now)),
        }
    }
    world.took.lasts = world.now.duration_since(began);
    let unfinished = || Error::new(ErrorKind::State, "simulating", "the update has no end");
    world.leader.end().unwrap_or_else(|| Err(unfinished()))?;
    for follower in &mut world.followers {
        follower.end().unwrap_or_else(|| Err(unfinished()))?;
    }
    Ok(world.took)
}

impl World {
    /// Gives the leader an event, and does what it asks for.
    fn work(&mut self, event: impl FnOnce(&mut Leader, Instant)) {
        let begun = Instant::now();
        event(&mut self.leader, self.now);
        self.took.machine += begun.elapsed();
        self.act();
    }

    fn act(&mut self) {
        while let Some(act) = self.leader.act() {
            let done = match act {
                Act::Send { to, body } => {
                    self.send(&RankSet::from([to]), &body);
                    continue;
                }
                Act::SendAll { to, body } => {
                    self.send(&to, &body);
                    continue;
                }
                Act::Fill { .. } => {
                    self.arrives(self.simulation.fill, Arrival::Filled);
                    continue;
                }
                Act::Begin { .. } => Done::Begun(Ok(None)),
                Act::Publish { .. } => Done::Published(Ok(())),
                Act::Collect { index } => Done::Collected(Ok((index < self.simulation.buckets)
                    .then(|| Collected {
                        layout: layout(index),
                        known: None,
                        source_bytes: BUCKET,
                        class: 0,
                    }))),
                _ => continue,
            };
            let begun = Instant::now();
            self.leader.done(done, self.now);
            self.took.machine += begun.elapsed();
        }
    }

    fn arrives(&mut self, after: Duration, arrival: Arrival) {
        self.count += 1;
        self.coming.push(Reverse((self.now + after, self.count, arrival)));
    }

    fn send(&mut self, to: &RankSet, body: &Bytes) {
        self.took.messages += to.len() as u64;
        let behind = self.simulation.behind;
        let connection = |rank: &Rank| (rank.0 - 1).checked_div(behind).unwrap_or(rank.0);
        let to: Vec<Rank> = to.iter().collect();
        for to in to.chunk_by(|a, b| connection(a) == connection(b)) {
            self.took.frames += 1;
            let (to, body) = (to.iter().copied().collect(), body.clone());
            self.arrives(self.simulation.latency, Arrival::Down { to, body });
        }
    }

    fn arrive_above(&mut self, from: &RankSet, body: &Bytes) {
        self.took.frames += 1;
        self.took.messages += from.len() as u64;
        self.work(|leader, now| leader.alike(from, body, now));
    }

    fn arrive_below(&mut self, to: &RankSet, body: &Bytes) -> Result<()> {
        // Equal messages from ranks of one connection travel as one frame.
        let mut said = BTreeMap::<(usize, Bytes), RankSet>::new();
        for rank in to.iter() {
            let Some(follower) = self.followers.get_mut(rank.index() - 1) else { continue };
            follower.event(Event::Message { from: Rank::LEADER, body: body.clone() }, self.now);
            for (order, message) in answers(follower, self.now)?.iter().enumerate() {
                said.entry((order, encode(message)?)).or_default().insert(rank);
            }
        }
        for ((_, body), from) in said {
            self.arrives(self.simulation.latency, Arrival::Up { from, body });
        }
        Ok(())
    }
}

/// The messages of a rollout whose fetches end at once and whose caller drops each bucket at once.
fn answers(follower: &mut Follower, now: Instant) -> Result<Vec<ToSender>> {
    let mut said = Vec::new();
    loop {
        while let Some(act) = follower.act() {
            match act {
                follower::Act::Enter { update, plan, wants } => {
                    let (card, held, base) = (Bytes::new(), Vec::new(), Base::Unable);
                    said.push(ToSender::Entered { update, card, plan, held, base, wants });
                }
                follower::Act::Send(message) => said.push(message),
                follower::Act::Fetch { index, .. } => follower.arrived(index, Ok(None), now),
                follower::Act::Give { index, .. } => {
                    said.push(ToSender::Release { update: 1, index });
                    follower.want(now);
                }
                follower::Act::Check => follower.checked(Ok("null".into()), now),
                _ => {}
            }
        }
        match follower.entered() {
            Some(entered) => entered.map(|_| follower.want(now))?,
            None => return Ok(said),
        }
    }
}

fn layout(index: u64) -> Arc<BucketLayout> {
    let meta = TensorMeta::new(format!("w{index}"), DType::U8, [BUCKET]).into();
    Arc::new(BucketLayout::new(vec![Piece { meta, start: 0, len: BUCKET, offset: 0 }]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(rollouts: u32, behind: u32, buckets: u64) -> Simulated {
        let (latency, fill) = (Duration::from_micros(50), Duration::from_millis(1));
        simulate(Simulation { rollouts, behind, buckets, latency, fill }).unwrap()
    }

    #[test]
    fn an_update_comes_to_its_end_on_all_ranks_with_the_messages_of_the_protocol() {
        for (rollouts, behind, buckets) in [(1, 0, 0), (3, 0, 1), (7, 3, 20), (100, 64, 5)] {
            let took = of(rollouts, behind, buckets);
            // Begin, Entered, End, Confirm, Commit, and for each bucket its announcement and its Release.
            let least = u64::from(rollouts) * (5 + 2 * buckets);
            assert!(took.messages >= least, "{took:?} of {least}");
            assert!(took.messages <= least + u64::from(rollouts) * 8, "{took:?} of {least}");
        }
    }

    #[test]
    fn frames_grow_with_connections_and_not_with_rollouts() {
        let (alone, shared) = (of(128, 0, 20), of(128, 32, 20));
        assert_eq!(alone.messages, shared.messages);
        assert_eq!(alone.frames, alone.messages);
        assert!(shared.frames * 16 < alone.frames, "{shared:?}");
    }

    #[test]
    fn an_update_lasts_as_long_as_its_fills_where_messages_are_faster() {
        let took = of(10, 0, 100).lasts;
        assert!(took >= Duration::from_millis(100), "{took:?}");
        assert!(took < Duration::from_millis(102), "{took:?}");
    }
}
