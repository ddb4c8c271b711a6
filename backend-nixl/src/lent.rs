//! Tracks memory that peers were told to write to, and when it can be used again.
//!
//! No IO and no clock: the caller passes in what is known of the writers.
//!
//! A peer that was asked to write, and was given up since, may still write: it may be slow, stopped or cut off. So its target can be used
//! again only with a proof that nothing more arrives there ([`Quiesced`]). What proves it, and what does not:
//!
//! * "It is written" does: the peer says so when its UCX has flushed the write, which is when the bytes are there.
//! * "It was refused, and not begun" does: nothing was sent.
//! * "It failed" does *not*. Bytes that the writer's UCX gave up may be on the way, and UCX cannot cancel a write.
//! * The loss of a peer does *not*: it may be cut off and come back, and bytes that a dead process has sent still arrive.
//! * The end of this rank's agent does, because its connections end: nobody reads from its sockets any more, and its queue pairs and memory
//!   regions are gone. An exception is a writer on this host, which may write without this process's help (`process_vm_writev`, CUDA IPC).
//!   Then the writer's process must be gone as well, unless there is only TCP.

use std::collections::BTreeMap;

use engine_core::ProcessStat;

use crate::arena::{Arena, Lent, Memory, Range};
use crate::error::NixlError;

/// Identifies a question to a peer: the peer's agent, and a number. Answers carry both.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct AskId {
    /// The name of the peer's agent.
    pub(crate) peer: String,
    pub(crate) id: u64,
}

/// The proof that nothing more arrives at the target of one question.
#[derive(Debug)]
pub(crate) struct Quiesced(AskId);

impl Quiesced {
    /// The peer has said that the bytes are there: the one write of the question has ended.
    pub(crate) fn written(ask: AskId) -> Self {
        Self(ask)
    }

    /// The peer has said that it will not write, and that it has not begun to.
    pub(crate) fn never_begun(ask: AskId) -> Self {
        Self(ask)
    }

    pub(crate) fn is_for(&self, ask: &AskId) -> bool {
        self.0 == *ask
    }
}

/// The properties of a peer that may still write.
#[derive(Clone, Debug)]
pub(crate) struct Writer {
    /// Whether it writes only over connections that end with this rank's agent.
    pub(crate) ends_with_agent: bool,
    /// Its process, if this process can check whether it exists.
    pub(crate) process: Option<Process>,
}

impl Writer {
    /// Whether nothing of it can arrive once this rank's agent has ended.
    pub(crate) fn is_over_with_agent(&self) -> bool {
        self.ends_with_agent || self.process.as_ref().is_some_and(Process::is_gone)
    }
}

/// Memory that peers may still write to, and memory for slots that have lost theirs.
#[derive(Debug)]
pub(crate) struct Retired {
    by: BTreeMap<AskId, (Range, Writer)>,
    /// Registered memory that nobody writes to.
    spares: Vec<Range>,
    /// Slots that wait for memory.
    vacant: Vec<u32>,
    /// The most ranges that are kept for peers.
    most: usize,
}

impl Retired {
    pub(crate) fn new(most: usize) -> Self {
        Self { by: BTreeMap::new(), spares: Vec::new(), vacant: Vec::new(), most }
    }

    /// The number of ranges that are kept for peers that may still write.
    pub(crate) fn len(&self) -> usize {
        self.by.len()
    }

    /// Gives up a peer that may still write to a slot. The slot's range is kept aside. The slot gets a spare, or the range that `more`
    /// makes, or stays without memory until there is some.
    ///
    /// # Errors
    ///
    /// Why the slot is without memory.
    pub(crate) fn give_up(
        &mut self,
        arena: &Arena,
        lent: Lent,
        writer: Writer,
        more: impl FnOnce() -> Result<Range, NixlError>,
    ) -> Result<(), NixlError> {
        let slot = lent.number();
        let other = match self.spares.pop() {
            Some(spare) => Ok(spare),
            None if self.by.len() >= self.most => Err(NixlError::Kept { ranges: self.by.len() }),
            None => more(),
        };
        let (other, result) = match other {
            Ok(range) => (Some(range), Ok(())),
            Err(error) => {
                self.vacant.push(slot);
                (None, Err(error))
            }
        };
        if let Some((ask, range)) = arena.retire(lent, other) {
            self.by.insert(ask, (range, writer));
        }
        result
    }

    /// Takes a proof for one of the ranges kept aside. Returns whether there was one.
    pub(crate) fn quiesced(&mut self, arena: &Arena, proof: Quiesced) -> bool {
        let Some((range, _)) = self.by.remove(&proof.0) else { return false };
        self.spares.push(range);
        self.refill(arena);
        true
    }

    /// Whether there is something that the end of this rank's agent would make usable.
    pub(crate) fn is_worth_an_end(&self) -> bool {
        self.by.values().any(|(_, writer)| writer.is_over_with_agent())
    }

    /// Records that this rank's agent has ended, with all of its connections. Returns how many ranges can be used again.
    pub(crate) fn agent_ended(&mut self, arena: &Arena) -> usize {
        let over: Vec<AskId> = self
            .by
            .iter()
            .filter(|(_, (_, writer))| writer.is_over_with_agent())
            .map(|(ask, _)| ask.clone())
            .collect();
        for ask in &over {
            self.quiesced(arena, Quiesced(ask.clone()));
        }
        over.len()
    }

    /// Gives memory to slots that have none.
    pub(crate) fn refill(&mut self, arena: &Arena) {
        let mut left = Vec::new();
        for slot in std::mem::take(&mut self.vacant) {
            // The slot may be locked at this moment: it is tried again next time.
            match self.spares.pop().map(|range| arena.install(slot, range)) {
                Some(Ok(())) => {}
                Some(Err(range)) => {
                    self.spares.push(range);
                    left.push(slot);
                }
                None => left.push(slot),
            }
        }
        self.vacant = left;
    }

    /// The memory of all ranges: spares, and those kept for peers.
    pub(crate) fn memory(&self) -> Vec<Memory> {
        let kept = self.by.values().map(|(range, _)| range);
        self.spares.iter().chain(kept).map(|range| range.place().memory).collect()
    }

    /// Frees all but `most` spares.
    pub(crate) fn keep_spares(&mut self, most: usize) {
        self.spares.truncate(most);
    }

    /// All ranges that are kept for peers that may still write.
    pub(crate) fn into_kept(self) -> Vec<Range> {
        self.by.into_values().map(|(range, _)| range).collect()
    }
}

/// A process of this host, as other processes identify it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Process {
    pid: u32,
    /// When it started, in the kernel's ticks: numbers are reused.
    began: u64,
    /// The namespace that the number belongs to.
    namespace: String,
}

impl Process {
    /// The present process.
    pub(crate) fn this() -> Option<Self> {
        let pid = std::process::id();
        Some(Self { pid, began: ProcessStat::of(pid)?.began, namespace: Self::namespace()? })
    }

    /// Whether it has certainly ended, and with it all its work.
    pub(crate) fn is_gone(&self) -> bool {
        if Self::namespace().as_ref() != Some(&self.namespace) {
            return false;
        }
        let pid = i32::try_from(self.pid).ok().and_then(rustix::process::Pid::from_raw);
        match pid.map(rustix::process::test_kill_process) {
            Some(Err(rustix::io::Errno::SRCH)) => true,
            // Another process may have the number by now. A process that cannot be inspected counts as running.
            _ => ProcessStat::of(self.pid)
                .is_some_and(|stat| stat.began != self.began || stat.has_ended),
        }
    }

    fn namespace() -> Option<String> {
        let link = std::fs::read_link("/proc/self/ns/pid").ok()?;
        link.into_os_string().into_string().ok()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const SLOTS: u32 = 3;
    const BYTES: u64 = 4096;
    const MOST: usize = 4;

    /// What may happen, in any order.
    #[derive(Clone, Debug)]
    enum Step {
        /// A slot is lent, and comes back with an answer.
        Write(u32),
        /// A slot is lent, and its writer is given up. `more`: whether there is more memory; `ends`: whether its writes end with the agent.
        GiveUp { slot: u32, more: bool, ends: bool },
        /// A writer that was given up answers late that it has written.
        Answer(prop::sample::Index),
        /// A writer that was given up says that it never began.
        Refuse(prop::sample::Index),
        /// An agent that was not asked answers with the number of another's question.
        Lie(prop::sample::Index),
        /// This rank's agent is replaced.
        Renew,
    }

    fn step() -> impl Strategy<Value = Step> {
        let index = any::<prop::sample::Index>;
        let give_up = (0..SLOTS, prop::bool::weighted(0.8), any::<bool>());
        prop_oneof![
            2 => (0..SLOTS).prop_map(Step::Write),
            6 => give_up.prop_map(|(slot, more, ends)| Step::GiveUp { slot, more, ends }),
            3 => index().prop_map(Step::Answer),
            2 => index().prop_map(Step::Refuse),
            2 => index().prop_map(Step::Lie),
            1 => Just(Step::Renew),
        ]
    }

    /// The addresses of the slots.
    fn installed(arena: &Arena) -> Vec<usize> {
        (0..arena.slots())
            .filter_map(|slot| arena.place(slot, BYTES).ok())
            .map(|place| place.address)
            .collect()
    }

    fn overlap(one: usize, other: usize) -> bool {
        one.abs_diff(other) < BYTES as usize
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn slots_never_share_bytes_and_none_is_where_a_peer_may_still_write(
            steps in proptest::collection::vec(step(), 1..60),
        ) {
            let arena = Arena::of_host(SLOTS, BYTES).unwrap();
            let mut retired = Retired::new(MOST);
            // The writers that may still write, where, and whether that ends with the agent.
            let mut writers: BTreeMap<AskId, (usize, bool)> = BTreeMap::new();
            let mut count = 0;
            for step in steps {
                let mut next = || {
                    count += 1;
                    AskId { peer: format!("peer {}", count % 3), id: count }
                };
                let pick = |writers: &BTreeMap<AskId, (usize, bool)>, index: prop::sample::Index| {
                    (!writers.is_empty()).then(|| writers.keys().nth(index.index(writers.len())).unwrap().clone())
                };
                match step.clone() {
                    Step::Write(slot) => {
                        let Ok(slot) = arena.try_lock(slot, BYTES) else { continue };
                        let ask = next();
                        let lent = slot.lend(ask.clone());
                        // A proof for another question is refused.
                        let other = Quiesced::written(AskId { peer: "other".into(), ..ask.clone() });
                        let lent = lent.back(&other).expect_err("of another agent");
                        drop(lent.back(&Quiesced::written(ask)).expect("of this one"));
                    }
                    Step::GiveUp { slot, more, ends } => {
                        let Ok(slot) = arena.try_lock(slot, BYTES) else { continue };
                        let (ask, number) = (next(), slot.number());
                        let address = slot.place().unwrap().address;
                        writers.insert(ask.clone(), (address, ends));
                        let writer = Writer { ends_with_agent: ends, process: None };
                        let more = || if more { arena.spare() } else { Err(NixlError::Full(BYTES)) };
                        let given = retired.give_up(&arena, slot.lend(ask), writer, more);
                        prop_assert_eq!(given.is_ok(), arena.place(number, BYTES).is_ok());
                    }
                    Step::Answer(index) => {
                        let Some(ask) = pick(&writers, index) else { continue };
                        writers.remove(&ask);
                        prop_assert!(retired.quiesced(&arena, Quiesced::written(ask)));
                    }
                    Step::Refuse(index) => {
                        let Some(ask) = pick(&writers, index) else { continue };
                        writers.remove(&ask);
                        prop_assert!(retired.quiesced(&arena, Quiesced::never_begun(ask)));
                    }
                    Step::Lie(index) => {
                        let Some(ask) = pick(&writers, index) else { continue };
                        let ask = AskId { peer: "liar".into(), ..ask };
                        prop_assert!(!retired.quiesced(&arena, Quiesced::written(ask)));
                    }
                    Step::Renew => {
                        writers.retain(|_, (_, ends)| !*ends);
                        retired.agent_ended(&arena);
                        retired.keep_spares(2);
                    }
                }
                let installed = installed(&arena);
                for (at, one) in installed.iter().enumerate() {
                    for other in &installed[at + 1..] {
                        prop_assert!(!overlap(*one, *other), "two slots share bytes after {step:?}");
                    }
                    for (address, _) in writers.values() {
                        prop_assert!(!overlap(*one, *address), "a peer may write to a slot after {step:?}");
                    }
                }
                prop_assert_eq!(retired.len(), writers.len());
            }
            // When all have answered, every slot has memory again.
            for ask in writers.into_keys() {
                retired.quiesced(&arena, Quiesced::written(ask));
            }
            retired.refill(&arena);
            let all: BTreeSet<usize> = installed(&arena).into_iter().collect();
            prop_assert_eq!(all.len(), SLOTS as usize);
        }
    }

    #[test]
    fn no_more_memory_than_a_limit_is_kept_for_peers_and_slots_go_without_then() {
        let arena = Arena::of_host(2, BYTES).unwrap();
        let mut retired = Retired::new(3);
        let writer = Writer { ends_with_agent: false, process: None };
        let ask = |id| AskId { peer: "peer".into(), id };
        let mut give_up = |id| {
            let lent = arena.try_lock(1, BYTES).unwrap().lend(ask(id));
            retired.give_up(&arena, lent, writer.clone(), || arena.spare())
        };
        (1..=3).for_each(|id| give_up(id).unwrap());
        let error = give_up(4).unwrap_err();
        assert!(matches!(error, NixlError::Kept { ranges: 3 }), "{error}");
        let error = arena.try_lock(1, BYTES).unwrap_err();
        assert!(matches!(error, NixlError::Vacant { slot: 1 }), "{error}");
        assert!(arena.place(1, BYTES).is_err() && arena.place(0, BYTES).is_ok());
        assert!(retired.quiesced(&arena, Quiesced::written(ask(2))));
        drop(arena.try_lock(1, BYTES).unwrap());
    }

    #[test]
    fn a_process_is_gone_when_it_has_ended_and_not_before() {
        let this = Process::this().unwrap();
        assert!(!this.is_gone());
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let began = ProcessStat::of(child.id()).unwrap().began;
        let process = Process { pid: child.id(), began, ..this.clone() };
        assert!(!process.is_gone());
        child.kill().unwrap();
        // It is gone although nobody has waited for it.
        while !process.is_gone() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(ProcessStat::of(child.id()).is_some());
        child.wait().unwrap();
        assert!(process.is_gone());
        // Another process has the number by now.
        assert!(Process { began: this.began + 1, ..this.clone() }.is_gone());
        // A process of another namespace cannot be checked from here.
        assert!(!Process { namespace: "pid:[1]".into(), ..process }.is_gone());
    }

    #[test]
    fn what_a_process_of_this_host_wrote_by_itself_is_over_when_it_is_gone() {
        let arena = Arena::of_host(1, BYTES).unwrap();
        let mut retired = Retired::new(3);
        let this = Process::this().unwrap();
        let gone = Process { began: this.began + 1, ..this.clone() };
        for (id, process) in [(1, Some(this)), (2, Some(gone)), (3, None)] {
            let lent = arena.try_lock(0, BYTES).unwrap();
            let lent = lent.lend(AskId { peer: "peer".into(), id });
            let writer = Writer { ends_with_agent: false, process };
            retired.give_up(&arena, lent, writer, || arena.spare()).unwrap();
        }
        assert!(retired.is_worth_an_end());
        assert_eq!(retired.agent_ended(&arena), 1);
        assert!(!retired.is_worth_an_end());
        assert_eq!(retired.into_kept().len(), 2);
    }
}
