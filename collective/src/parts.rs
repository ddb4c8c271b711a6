//! Decides the duties of ranks in a collective backend's updates, from the ranks' metadata. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{CollectiveOptions, Shape, Share};
use engine_core::control::Peer;
use engine_core::{Error, ErrorKind, Placement, Rank, Result, Role, WorkerMetadata};
use protocol::{Members, Part};

/// The data about a rank for the topology.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Details {
    pub(super) shape: Shape,
    pub(super) version: String,
    pub(super) senders: u32,
    #[serde(default)]
    pub(super) share: Option<Share>,
    /// Only on the leader.
    #[serde(default)]
    pub(super) first: Option<First>,
}

/// The groups of the first update, which ranks join as soon as they know one another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct First {
    /// The id of each sender's group.
    pub(super) ids: Vec<Bytes>,
    /// How many updates had begun on the leader when it made them. A rank that comes when there were more comes too late to join.
    pub(super) updates: u64,
}

/// A device of a host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Seat {
    host: String,
    device: String,
}

fn details(worker: &WorkerMetadata) -> Option<Details> {
    serde_json::from_value(worker.details.clone()).ok()
}

fn share(worker: &WorkerMetadata) -> Option<Share> {
    details(worker)?.share
}

/// What the leader has made for the first update.
pub(super) fn first(peers: &[WorkerMetadata]) -> Option<First> {
    details(peers.iter().find(|peer| peer.rank == Rank::LEADER)?)?.first
}

impl Seat {
    /// The device of a rank, if its library does not allow two ranks of a group there.
    fn of(worker: &WorkerMetadata) -> Option<Self> {
        share(worker).map(|share| Self { host: worker.host.clone(), device: share.device })
    }
}

/// The duties of all ranks but the leader.
#[derive(Debug)]
pub(super) struct Parts {
    parts: BTreeMap<Rank, Part>,
    leader: Option<Seat>,
    key: Result<Bytes, String>,
    /// The devices of the trainers that take part.
    trainers: BTreeMap<Seat, Rank>,
}

impl Parts {
    /// The duties in a group of these ranks, which are in their order. Trainers that neither send nor relay are idle.
    pub(super) fn new(options: CollectiveOptions, peers: &[WorkerMetadata]) -> Self {
        let first = peers.iter().find(|peer| peer.rank == Rank::LEADER);
        let leader = first.and_then(Seat::of);
        let key = first.and_then(share).map(|share| share.key);
        let key = key.unwrap_or_else(|| Err("the library does not share memory".into()));
        let mut this = Self { parts: BTreeMap::new(), leader, key, trainers: BTreeMap::new() };
        let ranks = || peers.iter().filter(|peer| peer.rank != Rank::LEADER);
        let mut taken: Vec<Seat> = this.leader.iter().cloned().collect();
        for peer in ranks().filter(|peer| peer.role == Role::Rollout) {
            let seat = Seat::of(peer);
            let part = if this.is_leaders(&seat) { Part::Colocated } else { Part::Receiver };
            this.parts.insert(peer.rank, part);
            taken.extend(seat);
        }
        let host = first.map(|leader| &leader.host);
        let trainers = ranks().filter(|peer| peer.role == Role::Trainer);
        for (index, peer) in (1..).zip(trainers) {
            let seat = Seat::of(peer);
            let is_free = seat.as_ref().is_none_or(|seat| !taken.contains(seat));
            let part = if index < options.senders {
                Part::Sender
            } else if options.relays && Some(&peer.host) == host && is_free {
                Part::Relay
            } else {
                this.parts.insert(peer.rank, Part::Idle);
                continue;
            };
            this.parts.insert(peer.rank, part);
            if let Some(seat) = seat {
                taken.push(seat.clone());
                this.trainers.insert(seat, peer.rank);
            }
        }
        this
    }

    fn is_leaders(&self, seat: &Option<Seat>) -> bool {
        seat.is_some() && *seat == self.leader
    }

    pub(super) fn of(&self, rank: Rank) -> Option<Part> {
        self.parts.get(&rank).copied()
    }

    /// The members of an update with all of these ranks.
    pub(super) fn members(&self) -> Members {
        let with = |wanted: &[Part]| {
            let ranks = self.iter().filter(|(_, part)| wanted.contains(part));
            ranks.map(|(rank, _)| rank).collect::<Vec<_>>()
        };
        let senders = [vec![Rank::LEADER], with(&[Part::Sender])].concat();
        Members { senders, others: with(&[Part::Receiver, Part::Relay]) }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Rank, Part)> + '_ {
        self.parts.iter().map(|(rank, part)| (*rank, *part))
    }

    /// The key with which a colocated rollout maps the leader's slots.
    pub(super) fn key(&self) -> Result<Bytes> {
        self.key.clone().map_err(|reason| {
            let message = format!(
                "this rank is on the leader's device and would read its slots there, but {reason}: give \
                 it a device of its own"
            );
            Error::new(ErrorKind::Mismatch, "building the topology", message)
        })
    }

    /// The duty of a rank that joins the group now; none if weights cannot reach it.
    pub(super) fn of_newcomer(&self, peer: &Peer) -> Option<Part> {
        if peer.role == Role::Trainer {
            return self.of(peer.rank);
        }
        // Ranks whose metadata does not come over the control plane count as receivers.
        let worker = serde_json::from_slice::<WorkerMetadata>(&peer.payload).ok();
        let seat = worker.as_ref().and_then(Seat::of);
        if self.is_leaders(&seat) {
            // It gets the reason when it builds its topology.
            return self.key.is_ok().then_some(Part::Colocated);
        }
        let trainer = seat.as_ref().and_then(|seat| self.trainers.get(seat));
        if let (Some(trainer), Some(seat)) = (trainer, seat.as_ref()) {
            warn!(
                rank = %peer.rank, %trainer, device = seat.device,
                "a rollout joined on the device of a trainer that takes part in updates, where the library \
                 has room for one rank: it gets none. Give it a device of its own, or the trainers \
                 `relays: false`"
            );
            return None;
        }
        Some(Part::Receiver)
    }
}

/// Places the ranks of a collective backend: the first and largest part of
/// [`Backend::build_topology`](engine_core::Backend::build_topology). A pure function.
///
/// # Errors
///
/// `Mismatch`, naming the rank, for a rank whose library, slot size or number of senders differs; if there are fewer trainers than senders;
/// and, if a library allows one rank of a group on a device, for a second one that is not on the leader's device, or for a rollout that is
/// but cannot read the leader's slots.
pub fn build_topology(backend: &str, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
    let places = Placement::for_all(backend, workers)?;
    if ::placed::are_placed(&places)? {
        return Ok(places);
    }
    let refuse =
        |message: String| Error::new(ErrorKind::Mismatch, "building the topology", message);
    // In the order of the ranks, which begins with the leader.
    let workers = Arc::clone(&places[0].peers);
    let details = |worker: &WorkerMetadata| -> Result<Details> {
        serde_json::from_value(worker.details.clone()).map_err(|error| {
            let message = format!("its metadata are not what {backend} knows: {error}");
            refuse(message).rank(worker.rank).with_source(error)
        })
    };
    let leader = details(&workers[0])?;
    for worker in &workers[1..] {
        let here = details(worker)?;
        if here.version != leader.version {
            return Err(refuse(format!(
                "it runs {}, rank 0 {}: all ranks need the same version",
                here.version, leader.version
            ))
            .rank(worker.rank));
        }
        if (here.shape, here.senders) != (leader.shape, leader.senders) {
            return Err(refuse(format!(
                "it has {} slots of {} bytes for {} senders, rank 0 {} of {} for {}: give all ranks the \
                 same update_weights_bucket_megabytes and senders",
                here.shape.slots,
                here.shape.slot_bytes,
                here.senders,
                leader.shape.slots,
                leader.shape.slot_bytes,
                leader.senders
            ))
            .rank(worker.rank));
        }
    }
    let trainers = workers.iter().filter(|worker| worker.role == Role::Trainer).count();
    if trainers < leader.senders as usize {
        return Err(refuse(format!("senders: {}: there are {trainers} trainers", leader.senders)));
    }
    check_devices(leader.senders, &workers)?;
    Ok(places)
}

/// Checks that no two ranks of a group are on one device, if the library requires it.
fn check_devices(senders: u32, workers: &[WorkerMetadata]) -> Result<()> {
    let refuse = |rank: Rank, message: String| {
        Err(Error::new(ErrorKind::Mismatch, "building the topology", message).rank(rank))
    };
    let parts = Parts::new(CollectiveOptions { senders, ..CollectiveOptions::default() }, workers);
    let mut seats: BTreeMap<Seat, Rank> = BTreeMap::new();
    seats.extend(parts.leader.clone().map(|seat| (seat, Rank::LEADER)));
    for (rank, part) in parts.iter().filter(|(_, part)| *part != Part::Idle) {
        if part == Part::Colocated {
            parts.key().map_err(|error| error.rank(rank))?;
            if senders > 1 {
                let message = format!(
                    "it is on the leader's device and reads the leader's slots there, and {senders} \
                     trainers send: set senders to 1, or give it a device of its own"
                );
                return refuse(rank, message);
            }
            continue;
        }
        let worker = workers.iter().find(|worker| worker.rank == rank);
        let Some(seat) = worker.and_then(Seat::of) else { continue };
        if let Some(other) = seats.insert(seat.clone(), rank) {
            let message = format!(
                "ranks {other} and {rank} are both on {} of one host, and the library has room for one \
                 rank of a group on a device: give each a device of its own, or have rollouts share \
                 that of the leader, rank 0",
                seat.device
            );
            return refuse(rank, message);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A rank on a device of a host; without a device, its library allows any number of ranks on one.
    fn worker(role: Role, host: &str, device: Option<u32>) -> WorkerMetadata {
        let share = device.map(|device| Share {
            device: format!("device {device}"),
            key: Ok(Bytes::from_static(b"key")),
        });
        let shape = Shape { slots: 4, slot_bytes: 256 };
        let details = Details { shape, version: "1".into(), senders: 1, share, first: None };
        let details = serde_json::json!(details);
        let mut worker = WorkerMetadata::of_this_process("test", Rank::LEADER, role, details);
        worker.host = host.into();
        worker
    }

    fn of_rank(rank: Rank, mut worker: WorkerMetadata) -> WorkerMetadata {
        worker.rank = rank;
        worker
    }

    /// Workers of the ranks 0, 1, ….
    fn ranked<const N: usize>(workers: [WorkerMetadata; N]) -> [WorkerMetadata; N] {
        let mut ranks = (0..).map(Rank);
        workers.map(|worker| of_rank(ranks.next().unwrap(), worker))
    }

    fn trainer(device: u32) -> WorkerMetadata {
        worker(Role::Trainer, "a", Some(device))
    }

    fn rollout(device: u32) -> WorkerMetadata {
        worker(Role::Rollout, "a", Some(device))
    }

    fn parts(workers: &[WorkerMetadata]) -> Vec<Option<Part>> {
        let parts = Parts::new(CollectiveOptions::default(), workers);
        (1..workers.len() as u32).map(|rank| parts.of(Rank(rank))).collect()
    }

    fn refused(workers: &[WorkerMetadata]) -> Error {
        let error = build_topology("test", workers).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
        error
    }

    fn peer(rank: u32, worker: &WorkerMetadata) -> Peer {
        let payload = serde_json::to_vec(worker).unwrap().into();
        Peer { rank: Rank(rank), role: worker.role, payload }
    }

    #[test]
    fn a_rollout_on_the_leaders_device_of_the_leaders_host_is_colocated_and_no_other() {
        let elsewhere = worker(Role::Rollout, "b", Some(0));
        let workers = ranked([trainer(0), rollout(0), rollout(1), elsewhere, rollout(0)]);
        let (colocated, receiver) = (Some(Part::Colocated), Some(Part::Receiver));
        assert_eq!(parts(&workers), [colocated, receiver, receiver, colocated]);
        build_topology("test", &workers).unwrap();
        // A library that does not name its devices allows any ranks in a group.
        let workers = [Role::Trainer, Role::Rollout, Role::Rollout];
        let workers = ranked(workers.map(|role| worker(role, "a", None)));
        assert_eq!(parts(&workers), [receiver, receiver]);
        build_topology("test", &workers).unwrap();
    }

    #[test]
    fn a_trainer_beside_a_rollout_or_the_leader_or_another_relay_is_idle() {
        let workers =
            ranked([trainer(0), trainer(0), trainer(1), trainer(2), trainer(2), rollout(1)]);
        let (relay, receiver) = (Some(Part::Relay), Some(Part::Receiver));
        let idle = Some(Part::Idle);
        assert_eq!(parts(&workers), [idle, idle, relay, idle, receiver]);
        build_topology("test", &workers).unwrap();
    }

    #[test]
    fn two_rollouts_of_a_device_that_is_not_the_leaders_are_refused_with_what_to_do() {
        let error = refused(&ranked([trainer(0), rollout(1), rollout(0), rollout(1)]));
        assert_eq!(error.report().rank, Some(Rank(3)));
        let words = error.to_string();
        assert!(words.contains("ranks 1 and 3 are both on device 1"), "{words}");
        assert!(words.contains("give each a device of its own"), "{words}");
    }

    #[test]
    fn a_leader_that_cannot_share_its_slots_or_several_senders_refuse_colocated_rollouts() {
        let mut workers = ranked([trainer(0), rollout(1), rollout(0)]);
        workers[0].details["share"]["key"] = serde_json::json!({"Err": "it is too old"});
        let error = refused(&workers);
        assert_eq!(error.report().rank, Some(Rank(2)));
        let words = error.to_string();
        assert!(words.contains("it is too old: give it a device of its own"), "{words}");
        build_topology("test", &workers[..2]).unwrap();

        let mut workers = ranked([trainer(0), trainer(1), rollout(0)]);
        workers.iter_mut().for_each(|worker| worker.details["senders"] = 2.into());
        let error = refused(&workers);
        assert!(error.to_string().contains("set senders to 1"), "{error}");
    }

    #[test]
    fn a_rank_that_joins_late_gets_the_part_of_its_place() {
        let workers = ranked([trainer(0), trainer(1), trainer(2), rollout(2)]);
        let group = Parts::new(CollectiveOptions::default(), &workers);
        let part = |worker: &WorkerMetadata| group.of_newcomer(&peer(9, worker));
        assert_eq!(part(&rollout(0)), Some(Part::Colocated));
        assert_eq!(part(&rollout(5)), Some(Part::Receiver));
        assert_eq!(part(&worker(Role::Rollout, "b", Some(0))), Some(Part::Receiver));
        // There is no room beside a trainer that takes part, but there is beside an idle one.
        assert_eq!(part(&rollout(1)), None);
        assert_eq!(part(&rollout(2)), Some(Part::Receiver));
        // Trainers keep their duties.
        assert_eq!(group.of_newcomer(&peer(1, &trainer(1))), Some(Part::Relay));
        assert_eq!(group.of_newcomer(&peer(9, &trainer(3))), None);
        // Metadata that did not come over the control plane.
        let stranger = Peer { rank: Rank(9), role: Role::Rollout, payload: Bytes::new() };
        assert_eq!(group.of_newcomer(&stranger), Some(Part::Receiver));

        let mut old = workers.clone();
        old[0].details["share"]["key"] = serde_json::json!({"Err": "it is too old"});
        let old = Parts::new(CollectiveOptions::default(), &old);
        assert_eq!(old.of_newcomer(&peer(9, &rollout(0))), None);
    }

    proptest! {
        #[test]
        fn no_group_of_an_accepted_topology_has_two_ranks_on_a_device(
            trainers in proptest::collection::vec(0_u32..4, 1..5),
            rollouts in proptest::collection::vec(0_u32..4, 1..5),
        ) {
            let trainers = trainers.into_iter().map(trainer);
            let workers = trainers.chain(rollouts.into_iter().map(rollout));
            let ranked = |(rank, worker)| of_rank(Rank(rank), worker);
            let workers: Vec<_> = (0..).zip(workers).map(ranked).collect();
            prop_assume!(build_topology("test", &workers).is_ok());
            let parts = Parts::new(CollectiveOptions::default(), &workers);
            let is_member = |part| !matches!(part, Part::Colocated | Part::Idle);
            let members = parts.iter().filter(|(_, part)| is_member(*part));
            let ranks = members.map(|(rank, _)| rank).chain([Rank::LEADER]);
            let mut seats: Vec<_> = ranks.map(|rank| Seat::of(&workers[rank.index()])).collect();
            let all = seats.len();
            seats.sort();
            seats.dedup();
            prop_assert_eq!(seats.len(), all);
        }
    }
}
