//! The members of the group, and what each rank waits for. No IO: callers say what happened, and it
//! answers by adding frames to outboxes and events to the mailbox.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_util::sync::CancellationToken;

use crate::link::FRAME_FLOOR;
use crate::wire::{
    Call, FRAME_OVERHEAD, Frame, Heard, Introduction, Outcome, SEAT_BLOCKS, Signal, encode,
};
use crate::{ChannelId, Event, Peer, Role, UPDATES};
use engine_core::control::Said;
use engine_core::{
    BitSet, Error, ErrorKind, ErrorReport, Rank, RankMap, RankSet, Recovery, Result,
};

/// The most channels of one peer with unread messages, [`UPDATES`] not counted.
const CHANNELS: usize = 64;

/// How many bytes of a peer's messages may be unread.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// On the channel of updates.
    pub(super) updates: usize,
    /// On all other channels together.
    pub(super) others: usize,
}

/// The events and outcomes that this process's own handles wait for.
#[derive(Debug)]
pub(super) struct Mailbox {
    inboxes: BTreeMap<ChannelId, Inbox>,
    /// The unread bytes on the channel of updates, by sender.
    updates: RankMap<usize>,
    /// The unread bytes on other channels, by sender.
    unread: BTreeMap<Rank, Unread>,
    bounds: Bounds,
    /// The calls under way, with their outcomes once they have ended.
    pub(super) calls: BTreeMap<u64, Option<Outcome>>,
    pub(super) next_call: u64,
    /// Set once, when nothing can arrive any more.
    pub(super) ended: Option<ErrorReport>,
}

/// A channel's events. Before the channel is opened, only messages are filed.
#[derive(Debug, Default)]
struct Inbox {
    events: VecDeque<Said>,
    is_open: bool,
}

/// The bytes of a peer's unread messages, other than those of updates.
#[derive(Debug, Default)]
struct Unread {
    others: BTreeMap<ChannelId, usize>,
    /// The bytes that were read since the peer was told last.
    read: BTreeMap<ChannelId, u64>,
}

/// How many bytes of a peer's messages were read, by channel: told to the peer.
pub(super) type Read = Vec<(ChannelId, u64)>;

/// The peers to tell, and what to tell them.
pub(super) type Told = Vec<(Rank, Read)>;

fn cost_of(body: &Bytes) -> usize {
    body.len() + FRAME_OVERHEAD
}

impl Mailbox {
    pub(super) fn new(bounds: Bounds) -> Self {
        let updates = Inbox { is_open: true, ..Inbox::default() };
        Self {
            inboxes: BTreeMap::from([(UPDATES, updates)]),
            updates: RankMap::default(),
            unread: BTreeMap::new(),
            bounds,
            calls: BTreeMap::new(),
            next_call: 0,
            ended: None,
        }
    }

    pub(super) fn open(&mut self, channel: ChannelId) {
        self.inboxes.entry(channel).or_default().is_open = true;
    }

    /// Files an event in every open channel. For events of which no peer can cause many.
    pub(super) fn tell(&mut self, event: &Event) {
        for inbox in self.inboxes.values_mut().filter(|inbox| inbox.is_open) {
            inbox.events.push_back(Said::One(event.clone()));
        }
    }

    /// Files a message, with the error of [`charge`](Self::charge).
    pub(super) fn deliver(&mut self, from: Rank, channel: ChannelId, body: Bytes) -> Result<()> {
        let from = RankSet::from([from]);
        if let Some((_, error)) = self.charge(&from, channel, &body).pop() {
            return Err(error);
        }
        self.file(from, channel, body);
        Ok(())
    }

    /// Files the same message from several ranks. Each of them was [charged](Self::charge) for it.
    pub(super) fn file(&mut self, from: RankSet, channel: ChannelId, body: Bytes) {
        let said = match (from.len(), from.first()) {
            (_, None) => return,
            (1, Some(from)) => Said::One(Event::Message { from, body }),
            _ => Said::Alike { from, body },
        };
        self.inboxes.entry(channel).or_default().events.push_back(said);
    }

    /// Counts a message as unread. Returns the senders of which more is unread than honest ranks can cause, with the error
    /// for each: on the channel of updates a rank reads before it says so much, on others it is told how much was read.
    pub(super) fn charge(
        &mut self,
        from: &RankSet,
        channel: ChannelId,
        body: &Bytes,
    ) -> Vec<(Rank, Error)> {
        let (cost, Bounds { updates, others }) = (cost_of(body), self.bounds);
        let (bound, over) = if channel == UPDATES {
            let mut is_over = false;
            self.updates.update(from, |unread| {
                let unread = unread.copied().unwrap_or(0).saturating_add(cost);
                is_over |= unread > updates;
                Some(unread)
            });
            let over = |rank: &Rank| self.updates.get(*rank).is_some_and(|bytes| *bytes > updates);
            let over: Vec<Rank> =
                if is_over { from.iter().filter(over).collect() } else { Vec::new() };
            (updates, over)
        } else {
            let mut over = Vec::new();
            for rank in from.iter() {
                let unread = self.unread.entry(rank).or_default();
                *unread.others.entry(channel).or_default() += cost;
                let all: usize = unread.others.values().sum();
                if all > others || unread.others.len() > CHANNELS {
                    over.push(rank);
                }
            }
            (others, over)
        };
        let refused = |rank: Rank| {
            let message = format!(
                "more than {bound} bytes of its messages are unread (twice max_frame_bytes), the last on \
                 {channel}: its connection ends"
            );
            (rank, Error::new(ErrorKind::Resource, "receiving a message", message).rank(rank))
        };
        over.into_iter().map(refused).collect()
    }

    /// The next event of a channel. If it is time to tell its sender what was read, that is returned too.
    pub(super) fn take(&mut self, channel: ChannelId) -> Option<(Event, Told)> {
        let events = &mut self.inboxes.get_mut(&channel)?.events;
        let event = loop {
            match events.pop_front()? {
                Said::One(event) => break event,
                Said::Alike { mut from, body } => {
                    let Some(rank) = from.pop_first() else { continue };
                    if !from.is_empty() {
                        events.push_front(Said::Alike { from, body: body.clone() });
                    }
                    break Event::Message { from: rank, body };
                }
            }
        };
        let told = match &event {
            Event::Message { from, body } => self.were_read(&[*from].into(), channel, body),
            _ => Told::new(),
        };
        Some((event, told))
    }

    /// As [`take`](Self::take), but equal messages from several ranks come together.
    pub(super) fn take_all(&mut self, channel: ChannelId) -> Option<(Said, Told)> {
        let said = self.inboxes.get_mut(&channel)?.events.pop_front()?;
        let told = match &said {
            Said::One(Event::Message { from, body }) => {
                self.were_read(&[*from].into(), channel, body)
            }
            Said::One(_) => Told::new(),
            Said::Alike { from, body } => self.were_read(from, channel, body),
        };
        Some((said, told))
    }

    fn were_read(&mut self, from: &RankSet, channel: ChannelId, body: &Bytes) -> Told {
        let cost = cost_of(body);
        if channel == UPDATES {
            let left = |unread: Option<&usize>| unread?.checked_sub(cost).filter(|left| *left > 0);
            self.updates.update(from, left);
            return Told::new();
        }
        let told = from.iter().map(|from| Some((from, self.read(from, channel, cost)?)));
        told.flatten().collect()
    }

    fn read(&mut self, from: Rank, channel: ChannelId, cost: usize) -> Option<Read> {
        let unread = self.unread.get_mut(&from)?;
        if let Some(bytes) = unread.others.get_mut(&channel) {
            *bytes = bytes.saturating_sub(cost);
            if *bytes == 0 {
                unread.others.remove(&channel);
            }
        }
        *unread.read.entry(channel).or_default() += cost as u64;
        // Not for each message, but early enough that the peer need not wait.
        let enough = (self.bounds.others / 8) as u64;
        let is_due = unread.others.is_empty() || unread.read.values().sum::<u64>() >= enough;
        is_due.then(|| std::mem::take(&mut unread.read).into_iter().collect())
    }

    /// A new process has a rank. Returns the unread bytes of the process before it.
    fn succeed(&mut self, rank: Rank) -> Read {
        let Some(unread) = self.unread.get_mut(&rank) else { return Read::new() };
        unread.read.clear();
        unread.others.iter().map(|(channel, bytes)| (*channel, *bytes as u64)).collect()
    }

    /// Files an outcome, or drops it if nobody waits for it any more.
    pub(super) fn settle(&mut self, id: u64, outcome: Outcome) {
        if let Some(slot) = self.calls.get_mut(&id) {
            slot.get_or_insert(outcome);
        }
    }
}

/// The frames for a peer that wait until its socket takes them. If the peer does not read, they take no
/// more memory than `budget`.
#[derive(Clone, Debug)]
pub(super) struct Outbox {
    frames: UnboundedSender<Frame>,
    /// The number of bytes that wait.
    waiting: Arc<AtomicUsize>,
    budget: usize,
    /// The peer's seat, if it shares a relay's connection with others.
    seat: Option<u32>,
}

/// The other end of an [`Outbox`].
#[derive(Debug)]
pub(super) struct Queue {
    frames: UnboundedReceiver<Frame>,
    waiting: Arc<AtomicUsize>,
}

/// Why an [`Outbox`] did not take a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotQueued {
    /// The connection has ended.
    Closed,
    /// The peer does not read.
    Full,
}

impl Outbox {
    pub(super) fn new(budget: usize) -> (Self, Queue) {
        let (frames, queue) = unbounded_channel();
        let waiting = Arc::<AtomicUsize>::default();
        let outbox = Self { frames, waiting: Arc::clone(&waiting), budget, seat: None };
        (outbox, Queue { frames: queue, waiting })
    }

    /// The outbox of a seat on this connection of a relay.
    pub(super) fn of_seat(&self, seat: u32) -> Self {
        Self { seat: Some(seat), ..self.clone() }
    }

    pub(super) fn send(&self, frame: Frame) -> std::result::Result<(), NotQueued> {
        self.send_within(self.budget, frame)
    }

    /// Whether both belong to the same connection.
    pub(super) fn is_of(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.waiting, &other.waiting)
    }

    /// The identity of the connection, the same for all its seats.
    pub(super) fn connection(&self) -> *const AtomicUsize {
        Arc::as_ptr(&self.waiting)
    }

    /// Whether half of the budget waits, so that a relay should add no more.
    pub(super) fn is_crowded(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > self.budget / 2
    }

    pub(super) fn seat(&self) -> Option<u32> {
        self.seat
    }

    /// Queues a frame for several seats of the connection.
    pub(super) fn send_to_seats(
        &self,
        seats: &BitSet<u32>,
        frame: &Frame,
    ) -> std::result::Result<(), NotQueued> {
        let connection = Self { seat: None, ..self.clone() };
        seats.parts(SEAT_BLOCKS).try_for_each(|seats| {
            connection.send(Frame::Carried { seats, frame: Box::new(frame.clone()) })
        })
    }

    fn carried(&self, frame: Frame) -> Frame {
        match self.seat {
            Some(seat) => Frame::Carried { seats: BitSet::from([seat]), frame: Box::new(frame) },
            None => frame,
        }
    }

    /// Queues a frame if no more than `part` bytes wait then, or if nothing waits.
    fn send_within(&self, part: usize, frame: Frame) -> std::result::Result<(), NotQueued> {
        let frame = self.carried(frame);
        let cost = frame.cost();
        // Relaxed: no other memory depends on this number.
        let before = self.waiting.fetch_add(cost, Ordering::Relaxed);
        // A frame larger than the budget passes if nothing else waits.
        if before > 0 && before.saturating_add(cost) > part {
            self.waiting.fetch_sub(cost, Ordering::Relaxed);
            return Err(NotQueued::Full);
        }
        self.frames.send(frame).map_err(|_| NotQueued::Closed)
    }

    /// Queues the last frame, however much waits before it.
    pub(super) fn close_with(self, frame: Frame) -> std::result::Result<(), NotQueued> {
        let frame = self.carried(frame);
        self.frames.send(frame).map_err(|_| NotQueued::Closed)
    }
}

impl Queue {
    /// The next frame, or `None` when the outbox is gone and empty.
    pub(super) async fn recv(&mut self) -> Option<Frame> {
        let frame = self.frames.recv().await;
        self.took(frame)
    }

    pub(super) fn try_recv(&mut self) -> Option<Frame> {
        let frame = self.frames.try_recv().ok();
        self.took(frame)
    }

    fn took(&self, frame: Option<Frame>) -> Option<Frame> {
        if let Some(frame) = &frame {
            let cost = frame.cost();
            let less = |waiting: usize| Some(waiting.saturating_sub(cost));
            // This never fails, because the closure always gives a value.
            self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok();
        }
        frame
    }
}

/// The link to a peer.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) outbox: Outbox,
    /// The longest frame that the peer accepts.
    pub(super) limit: usize,
    /// The bytes that this side has sent and the peer has not read, on channels other than [`UPDATES`].
    pub(super) unread: BTreeMap<ChannelId, usize>,
    /// When bytes of the peer came last.
    pub(super) heard: Heard,
    /// How often the peer says something, at the least.
    pub(super) beat: Duration,
    /// The peer's silence according to its relay, and when the relay said so.
    pub(super) silent: Option<(Duration, Instant)>,
    /// Ends the connection from this side, with a reason. For a peer with a seat this is the relay's connection.
    pub(super) cut: Arc<Cut>,
}

/// An order to end a connection.
#[derive(Debug, Default)]
pub(super) struct Cut {
    reason: OnceLock<ErrorReport>,
    ordered: CancellationToken,
}

impl Cut {
    pub(super) fn order(&self, reason: ErrorReport) {
        self.reason.get_or_init(|| reason);
        self.ordered.cancel();
    }

    /// Waits for the order, and returns its reason.
    pub(super) async fn ordered(&self) -> Error {
        self.ordered.cancelled().await;
        let reason = self.reason.get().cloned();
        reason.map_or_else(|| gone(Rank::LEADER), Error::from)
    }
}

impl Link {
    /// Queues a message if the peer has room for it. Without room, only a message of updates ends the connection.
    pub(super) fn message(
        &mut self,
        to: Rank,
        channel: ChannelId,
        body: Bytes,
        patient: bool,
    ) -> Result<()> {
        let (size, cost) = (body.len(), cost_of(&body));
        let frame = Frame::Message { channel, body, patient };
        if channel == UPDATES {
            return self.send(to, size, frame);
        }
        // Half of the budget is reserved for updates.
        let share = self.outbox.budget / 2;
        let limit = self.limit.min(share);
        if cost > limit {
            return Err(too_large(size, limit).rank(to));
        }
        let later = |message: String| {
            let error = Error::new(ErrorKind::Resource, "sending a message", message);
            Err(error.recovery(Recovery::Retry).rank(to))
        };
        let here = self.unread.get(&channel).copied().unwrap_or(0);
        if here + cost > self.limit || here == 0 && self.unread.len() >= CHANNELS {
            return later(format!("{channel} is full: {here} bytes on it wait to be read there"));
        }
        let all: usize = self.unread.values().sum();
        if all + cost > self.limit.saturating_mul(2) {
            let fullest = self.unread.iter().max_by_key(|(_, bytes)| **bytes);
            let (fullest, bytes) = fullest.map_or((channel, 0), |(id, bytes)| (*id, *bytes));
            return later(format!(
                "no room for {channel}: {all} bytes wait to be read there, {bytes} of them on {fullest}"
            ));
        }
        match self.outbox.send_within(share, frame) {
            Ok(()) => {
                *self.unread.entry(channel).or_default() += cost;
                Ok(())
            }
            Err(NotQueued::Closed) => Err(gone(to)),
            Err(NotQueued::Full) => {
                later(format!("no room for {channel}: other messages wait for the connection"))
            }
        }
    }

    /// The peer has read messages.
    pub(super) fn was_read(&mut self, read: &Read) {
        for (channel, bytes) in read {
            let Some(unread) = self.unread.get_mut(channel) else { continue };
            *unread = unread.saturating_sub(usize::try_from(*bytes).unwrap_or(usize::MAX));
            if *unread == 0 {
                self.unread.remove(channel);
            }
        }
    }

    /// Queues a frame that carries `size` bytes of the caller.
    pub(super) fn send(&self, to: Rank, size: usize, frame: Frame) -> Result<()> {
        if size.saturating_add(FRAME_OVERHEAD) > self.limit {
            return Err(too_large(size, self.limit).rank(to));
        }
        self.queue(frame).map_err(|why| match why {
            NotQueued::Closed => gone(to),
            NotQueued::Full => self.unread().rank(to),
        })
    }

    pub(super) fn signal(&self, frame: Signal) {
        self.tell(Frame::Signal(frame));
    }

    /// The link to a seat on this connection of a relay.
    pub(super) fn of_seat(&self, seat: u32) -> Self {
        Self {
            outbox: self.outbox.of_seat(seat),
            limit: self.limit,
            unread: BTreeMap::new(),
            heard: self.heard.clone(),
            silent: None,
            beat: self.beat,
            cut: Arc::clone(&self.cut),
        }
    }

    /// Queues a frame in another outbox of the connection.
    pub(super) fn tell_by(&self, way: &Outbox, frame: Frame) {
        if way.send(frame) == Err(NotQueued::Full) {
            self.cut.order(ErrorReport::from(&self.unread()));
        }
    }

    pub(super) fn tell(&self, frame: Frame) {
        if let Err(why) = self.queue(frame) {
            tracing::trace!(?why, "the peer's link ended before this frame");
        }
    }

    /// Queues a frame for several seats of the connection. If the connection has ended, that is no error here: the loss
    /// of each rank is on its way.
    pub(super) fn send_to_seats(&self, seats: &BitSet<u32>, frame: &Frame) {
        if self.outbox.send_to_seats(seats, frame) == Err(NotQueued::Full) {
            self.cut.order(ErrorReport::from(&self.unread()));
        }
    }

    /// Queues a frame, or ends the connection to a peer that does not read.
    fn queue(&self, frame: Frame) -> std::result::Result<(), NotQueued> {
        let result = self.outbox.send(frame);
        if result == Err(NotQueued::Full) {
            self.cut.order(ErrorReport::from(&self.unread()));
        }
        result
    }

    /// How long the peer has been silent, if that is more than two heartbeats; else zero.
    pub(super) fn silence(&self) -> Duration {
        if self.outbox.seat.is_some() {
            // A relay repeats it with each of its heartbeats.
            let told = self.silent.filter(|(_, at)| at.elapsed() < self.beat * 3);
            return told.map_or(Duration::ZERO, |(silence, at)| silence + at.elapsed());
        }
        let silence = self.heard.ago();
        if silence > self.beat * 2 { silence } else { Duration::ZERO }
    }

    fn unread(&self) -> Error {
        let message = format!(
            "more than {} bytes wait for it, as it does not read (twice max_frame_bytes): its \
             connection ends",
            self.outbox.budget
        );
        Error::new(ErrorKind::Resource, "sending a message", message)
    }
}

/// How a link ended.
#[derive(Debug)]
pub(super) enum End {
    Left,
    Lost(Error),
}

/// A member's side: its link to the leader, and the table that it received last.
#[derive(Debug)]
pub(super) struct Membership {
    pub(super) leader: Link,
    pub(super) table: Vec<Peer>,
    /// How many updates had begun on the leader at the last gather.
    pub(super) updates: u64,
}

/// The leader's side.
#[derive(Debug)]
pub(super) struct Group {
    slots: BTreeMap<Rank, Slot>,
    /// The largest size of the group.
    max_world_size: u32,
    formed: bool,
    pending: BTreeMap<Rank, Pending>,
    /// The ranks that the barrier under way waits for: those in the table when it began.
    expected: BTreeSet<Rank>,
    /// How many updates have begun.
    pub(super) updates: u64,
    relays: Vec<Relayed>,
}

/// A relay's connection, and who sits where on it.
#[derive(Debug)]
struct Relayed {
    connection: Outbox,
    seating: Seating,
}

/// The ranks that have seats on a connection.
#[derive(Debug, Default)]
struct Seating {
    seats: BitSet<u32>,
    ranks: RankSet,
    rank_in: BTreeMap<u32, Rank>,
    seat_of: BTreeMap<Rank, u32>,
}

impl Seating {
    fn take(&mut self, seat: u32, rank: Rank) {
        self.seats.insert(seat);
        self.ranks.insert(rank);
        self.rank_in.insert(seat, rank);
        self.seat_of.insert(rank, seat);
    }

    fn leave(&mut self, rank: Rank) {
        if let Some(seat) = self.seat_of.remove(&rank) {
            self.seats.remove(seat);
            self.ranks.remove(rank);
            self.rank_in.remove(&seat);
        }
    }

    /// The ranks in these seats. Empty seats are passed over: their ranks are lost.
    fn ranks_in(&self, seats: &BitSet<u32>) -> RankSet {
        // The most common case: all of them have said the same.
        if *seats == self.seats {
            return self.ranks.clone();
        }
        seats
            .common(&self.seats)
            .iter()
            .filter_map(|seat| self.rank_in.get(&seat).copied())
            .collect()
    }

    /// The seats of these ranks, of those that have one here.
    fn seats_of(&self, ranks: &RankSet) -> BitSet<u32> {
        if *ranks == self.ranks {
            return self.seats.clone();
        }
        ranks.iter().filter_map(|rank| self.seat_of.get(&rank).copied()).collect()
    }
}

#[derive(Debug)]
struct Slot {
    role: Role,
    /// `None` for the leader itself, and for a rank that is gone.
    link: Option<Link>,
    /// The rank's metadata. A rank is in the table while it has this.
    payload: Option<Bytes>,
}

#[derive(Debug)]
struct Pending {
    id: u64,
    call: Call,
}

impl Pending {
    fn barrier(&self) -> Option<&str> {
        match &self.call {
            Call::Barrier { name } => Some(name),
            Call::Gather { .. } => None,
        }
    }

    fn gather(&self) -> Option<(Option<u32>, &Bytes)> {
        match &self.call {
            Call::Gather { world_size, payload } => Some((*world_size, payload)),
            Call::Barrier { .. } => None,
        }
    }
}

impl Group {
    pub(super) fn new(max_world_size: u32) -> Self {
        let leader = Slot { role: Role::Trainer, link: None, payload: None };
        Self {
            slots: BTreeMap::from([(Rank::LEADER, leader)]),
            max_world_size,
            formed: false,
            pending: BTreeMap::new(),
            expected: BTreeSet::new(),
            updates: 0,
            relays: Vec::new(),
        }
    }

    /// Gives a newcomer its rank and keeps its link. Returns also the unread bytes of the process that had the rank
    /// before.
    pub(super) fn admit(
        &mut self,
        who: &Introduction,
        link: Link,
        mailbox: &mut Mailbox,
    ) -> Result<(Rank, Read)> {
        let free = |slot: &Slot| slot.link.is_none();
        let rank = match who.rank {
            Some(rank)
                if rank == Rank::LEADER || self.slots.get(&rank).is_some_and(|s| !free(s)) =>
            {
                let message = "another live process has the rank";
                let error =
                    Error::new(ErrorKind::Mismatch, "joining the group", message).rank(rank);
                // Retry: if the process has died, its rank is free once its death is noticed.
                let is_free_later = rank != Rank::LEADER;
                return Err(match is_free_later {
                    true => error.recovery(Recovery::Retry),
                    false => error,
                });
            }
            Some(rank) => rank,
            None => self
                .slots
                .iter()
                .find(|(rank, slot)| **rank != Rank::LEADER && free(slot) && slot.role == who.role)
                .map(|(rank, _)| *rank)
                .or_else(|| (0..=u32::MAX).map(Rank).find(|rank| !self.slots.contains_key(rank)))
                .ok_or_else(|| {
                    Error::new(ErrorKind::Resource, "joining the group", "no rank is left")
                })?,
        };
        // Ranks behind a relay need no sockets here, so the limit of open sockets does not bound their number.
        let is_known = self.slots.contains_key(&rank);
        if !is_known && self.slots.len() >= self.max_world_size as usize {
            let message =
                format!("the group has {} ranks already (max_world_size)", self.max_world_size);
            return Err(Error::new(ErrorKind::Resource, "joining the group", message));
        }
        if let Some(seat) = link.outbox.seat
            && let Some(relay) = self.relayed(&link.outbox)
        {
            relay.seating.take(seat, rank);
        }
        self.slots.insert(rank, Slot { role: who.role, link: Some(link), payload: None });
        Ok((rank, mailbox.succeed(rank)))
    }

    /// A member's link has ended. Drops its calls, and tells the ranks that wait for it.
    pub(super) fn end(&mut self, rank: Rank, end: End, mailbox: &mut Mailbox) {
        let Some(slot) = self.slots.get_mut(&rank) else { return };
        let link = slot.link.take();
        let was_member = slot.payload.take().is_some();
        if let Some(relay) = link.and_then(|link| self.relayed(&link.outbox)) {
            relay.seating.leave(rank);
        }
        self.pending.remove(&rank);
        if !self.formed {
            // Before the group is formed, a rank that has gone leaves no trace.
            self.slots.remove(&rank);
        }
        let expected = self.expected.remove(&rank);
        match end {
            End::Left => {
                if was_member {
                    mailbox.tell(&Event::Left { rank });
                }
                self.try_barrier(mailbox);
            }
            End::Lost(error) => {
                let error = ErrorReport::from(&error.rank(rank));
                if expected {
                    let failure = Error::new(
                        ErrorKind::PeerLost,
                        "waiting in a barrier",
                        format!("a rank was lost: {}", error.message),
                    );
                    self.finish_barrier(&failed(&failure.rank(rank)), mailbox);
                }
                if was_member {
                    mailbox.tell(&Event::Lost { rank, error });
                }
            }
        }
    }

    /// Ends a member's connection. The rank is lost for this reason, and may join again.
    pub(super) fn cut(
        &mut self,
        rank: Rank,
        reason: ErrorReport,
        mailbox: &mut Mailbox,
    ) -> Result<()> {
        let link = self.link(rank)?;
        if link.outbox.seat.is_some() {
            link.signal(Signal::Lost(reason.clone()));
            self.end(rank, End::Lost(reason.into()), mailbox);
        } else {
            link.cut.order(reason);
        }
        Ok(())
    }

    /// Queues the same message for several ranks. A message of updates is queued once for each connection. Returns the
    /// ranks that it could not be queued for, and why.
    pub(super) fn message_all(
        &mut self,
        to: &RankSet,
        channel: ChannelId,
        body: &Bytes,
    ) -> Vec<(Rank, Error)> {
        let mut refused = Vec::new();
        let mut alone = to.clone();
        let size = body.len().saturating_add(FRAME_OVERHEAD);
        let frame = Frame::Message { channel, body: body.clone(), patient: false };
        let relays = self.relays.iter().filter(|_| channel == UPDATES);
        for relay in relays {
            let mut here = to.common(&relay.seating.ranks);
            alone.subtract(&here);
            // Whatever is shorter, all ranks accept.
            let mut too_long = RankSet::new();
            if size > FRAME_FLOOR as usize {
                for rank in here.iter() {
                    if let Ok(link) = self.link(rank)
                        && size > link.limit
                    {
                        refused.push((rank, too_large(body.len(), link.limit).rank(rank)));
                        too_long.insert(rank);
                    }
                }
            }
            here.subtract(&too_long);
            if let Some(Ok(link)) = here.first().map(|first| self.link(first)) {
                link.send_to_seats(&relay.seating.seats_of(&here), &frame);
            }
        }
        for rank in alone.iter() {
            let link = self.link_mut(rank);
            let sent = link.and_then(|link| link.message(rank, channel, body.clone(), false));
            refused.extend(sent.err().map(|error| (rank, error)));
        }
        refused
    }

    pub(super) fn link_mut(&mut self, to: Rank) -> Result<&mut Link> {
        self.slots.get_mut(&to).and_then(|slot| slot.link.as_mut()).ok_or_else(|| gone(to))
    }

    pub(super) fn link(&self, to: Rank) -> Result<&Link> {
        self.slots.get(&to).and_then(|slot| slot.link.as_ref()).ok_or_else(|| gone(to))
    }

    pub(super) fn table(&self) -> Vec<Peer> {
        let peer = |(rank, slot): (&Rank, &Slot)| {
            let payload = slot.payload.clone()?;
            Some(Peer { rank: *rank, role: slot.role, payload })
        };
        self.slots.iter().filter_map(peer).collect()
    }

    /// A relay has connected.
    pub(super) fn add_relay(&mut self, connection: Outbox) {
        self.relays.push(Relayed { connection, seating: Seating::default() });
    }

    /// A relay's connection has ended. Returns the ranks that sat there.
    pub(super) fn remove_relay(&mut self, connection: &Outbox) -> RankSet {
        let at = self.relays.iter().position(|relay| relay.connection.is_of(connection));
        at.map(|at| self.relays.remove(at).seating.ranks).unwrap_or_default()
    }

    /// The ranks in these seats of a relay's connection.
    pub(super) fn ranks_in(&mut self, connection: &Outbox, seats: &BitSet<u32>) -> RankSet {
        self.relayed(connection).map(|relay| relay.seating.ranks_in(seats)).unwrap_or_default()
    }

    /// Whether a seat of a relay's connection is taken.
    pub(super) fn is_taken(&mut self, connection: &Outbox, seat: u32) -> bool {
        self.relayed(connection).is_some_and(|relay| relay.seating.seats.contains(seat))
    }

    fn relayed(&mut self, connection: &Outbox) -> Option<&mut Relayed> {
        self.relays.iter_mut().find(|relay| relay.connection.is_of(connection))
    }

    /// Says goodbye to everyone.
    pub(super) fn dissolve(&mut self) {
        for slot in self.slots.values_mut() {
            if let Some(link) = slot.link.take() {
                link.signal(Signal::Goodbye);
            }
        }
        for relay in self.relays.drain(..) {
            if relay.connection.close_with(Frame::Signal(Signal::Goodbye)).is_err() {
                tracing::trace!("the relay is gone already");
            }
        }
    }

    /// A rank gathers or enters a barrier.
    pub(super) fn call(&mut self, rank: Rank, id: u64, call: Call, mailbox: &mut Mailbox) {
        if self.pending.contains_key(&rank) {
            let error = Error::new(
                ErrorKind::State,
                "gathering or waiting in a barrier",
                "this rank does one of them already",
            );
            return self.reply_all(&[(rank, id)], &failed(&error.rank(rank)), mailbox);
        }
        match call {
            Call::Gather { world_size: None, .. } if rank == Rank::LEADER => {
                let message = "the leader has to say how many ranks the group has";
                let error = Error::new(ErrorKind::Config, "gathering the group", message);
                self.reply_all(&[(rank, id)], &failed(&error.rank(rank)), mailbox);
            }
            Call::Gather { world_size: Some(world_size), .. }
                if world_size > self.max_world_size =>
            {
                let message = format!(
                    "a world size of {world_size}: the leader forms groups of up to {} ranks \
                     (max_world_size)",
                    self.max_world_size
                );
                let error = Error::new(ErrorKind::Mismatch, "gathering the group", message);
                self.reply_all(&[(rank, id)], &failed(&error.rank(rank)), mailbox);
            }
            Call::Gather { .. } => {
                self.pending.insert(rank, Pending { id, call });
                self.try_gather(mailbox);
            }
            Call::Barrier { .. } => {
                if self.slots.get(&rank).is_none_or(|slot| slot.payload.is_none()) {
                    let error = Error::new(
                        ErrorKind::State,
                        "waiting in a barrier",
                        "this rank is not in the group; gather first",
                    );
                    return self.reply_all(&[(rank, id)], &failed(&error.rank(rank)), mailbox);
                }
                if self.expected.is_empty() {
                    self.expected = self.members().collect();
                }
                self.pending.insert(rank, Pending { id, call });
                self.try_barrier(mailbox);
            }
        }
    }

    /// A rank has given up waiting.
    pub(super) fn withdraw(&mut self, rank: Rank, id: u64, mailbox: &mut Mailbox) {
        if self.pending.get(&rank).is_none_or(|pending| pending.id != id) {
            return;
        }
        let Some(pending) = self.pending.remove(&rank) else { return };
        let mut missing: Vec<Rank> = match pending.gather() {
            // The leader's world size counts, if it has said one.
            Some((own, _)) => match self.leaders_world().or(own) {
                Some(world_size) => self.missing(world_size),
                None => vec![Rank::LEADER],
            },
            None => self.expected.iter().copied().filter(|r| !self.waits_in_barrier(*r)).collect(),
        };
        missing.retain(|other| *other != rank);
        if !self.pending.values().any(|pending| pending.barrier().is_some()) {
            self.expected.clear();
        }
        self.reply_all(&[(rank, id)], &Outcome::Missing(missing), mailbox);
        // Newcomers may have waited for a gather of the leader, which is withdrawn now: they enter without it.
        self.try_gather(mailbox);
    }

    fn members(&self) -> impl Iterator<Item = Rank> {
        self.slots.iter().filter(|(_, slot)| slot.payload.is_some()).map(|(rank, _)| *rank)
    }

    fn waits_in_barrier(&self, rank: Rank) -> bool {
        self.pending.get(&rank).is_some_and(|pending| pending.barrier().is_some())
    }

    fn gathers(&self, rank: Rank) -> bool {
        self.pending.get(&rank).is_some_and(|pending| pending.gather().is_some())
    }

    /// The ranks that a gather of `world_size` lacks. The first gather needs exactly the ranks below
    /// the world size. Later ones need that many ranks of any number, so that a group may grow and shrink.
    fn missing(&self, world_size: u32) -> Vec<Rank> {
        if !self.formed {
            return (0..world_size).map(Rank).filter(|rank| !self.gathers(*rank)).collect();
        }
        let present = self.pending.values().filter(|pending| pending.gather().is_some()).count();
        let lacking = (world_size as usize).saturating_sub(present);
        let known = self.slots.keys().copied().chain((0..world_size).map(Rank));
        let known: BTreeSet<_> = known.filter(|rank| !self.gathers(*rank)).collect();
        known.into_iter().take(lacking).collect()
    }

    /// Whether a gather of `world_size` lacks no rank: [`missing`](Self::missing), without the list.
    fn is_complete(&self, world_size: u32) -> bool {
        if !self.formed {
            return (0..world_size).all(|rank| self.gathers(Rank(rank)));
        }
        let present = self.pending.values().filter(|pending| pending.gather().is_some()).count();
        present >= world_size as usize
    }

    fn try_gather(&mut self, mailbox: &mut Mailbox) {
        if let Some(world_size) = self.leaders_world() {
            self.refuse_other_worlds(world_size, mailbox);
            if !self.is_complete(world_size) {
                return;
            }
            let first = !std::mem::replace(&mut self.formed, true);
            let round = self.gathering(|rank, _| !first || rank.0 < world_size);
            let entered: Vec<_> = round.into_iter().filter_map(|rank| self.enter(rank)).collect();
            self.reply_all(
                &entered,
                &Outcome::Table { peers: self.table(), updates: self.updates },
                mailbox,
            );
        }
        if self.formed && !self.gathers(Rank::LEADER) {
            for rank in self.gathering(|_, slot| slot.payload.is_none()) {
                let entered = self.enter(rank);
                let table = self.table();
                let joined = table.iter().find(|peer| peer.rank == rank).cloned();
                if let Some(peer) = joined {
                    mailbox.tell(&Event::Joined(peer));
                }
                self.reply_all(
                    entered.as_slice(),
                    &Outcome::Table { peers: table, updates: self.updates },
                    mailbox,
                );
            }
        }
    }

    /// The gathering ranks that `select` accepts.
    fn gathering(&self, select: impl Fn(Rank, &Slot) -> bool) -> Vec<Rank> {
        let selected = |(rank, slot): (&Rank, &Slot)| {
            (self.gathers(*rank) && select(*rank, slot)).then_some(*rank)
        };
        self.slots.iter().filter_map(selected).collect()
    }

    /// The world size of the leader's gather, if it gathers now.
    fn leaders_world(&self) -> Option<u32> {
        self.pending.get(&Rank::LEADER).and_then(Pending::gather).and_then(|(size, _)| size)
    }

    /// Refuses gathering ranks whose world size differs from the leader's. A newcomer to an existing group is not
    /// refused, because it may not know the size.
    fn refuse_other_worlds(&mut self, world_size: u32, mailbox: &mut Mailbox) {
        let newcomers_count = !self.formed;
        for rank in self.gathering(|_, slot| newcomers_count || slot.payload.is_some()) {
            let other =
                self.pending.get(&rank).and_then(Pending::gather).and_then(|(size, _)| size);
            let Some(other) = other.filter(|other| *other != world_size) else { continue };
            let error = Error::new(
                ErrorKind::Mismatch,
                "gathering the group",
                format!("the leader's world size is {world_size}, this rank's is {other}"),
            )
            .rank(rank);
            tracing::warn!(%error, "a member does not belong to this group");
            if let Some(pending) = self.pending.remove(&rank) {
                self.reply_all(&[(rank, pending.id)], &failed(&error), mailbox);
            }
        }
    }

    /// Moves a rank's gathered metadata into the table.
    fn enter(&mut self, rank: Rank) -> Option<(Rank, u64)> {
        let pending = self.pending.remove(&rank)?;
        if let (Call::Gather { payload, .. }, Some(slot)) =
            (pending.call, self.slots.get_mut(&rank))
        {
            slot.payload = Some(payload);
        }
        Some((rank, pending.id))
    }

    fn try_barrier(&mut self, mailbox: &mut Mailbox) {
        let waiting = self.pending.iter().filter_map(|(rank, p)| Some((*rank, p.barrier()?)));
        let mut waiting = waiting.collect::<Vec<_>>().into_iter();
        let Some((one, name)) = waiting.next() else { return };
        if let Some((other, other_name)) = waiting.find(|(_, other_name)| *other_name != name) {
            let error = Error::new(
                ErrorKind::Mismatch,
                "waiting in a barrier",
                format!("rank {one} is in barrier `{name}`, rank {other} in `{other_name}`"),
            );
            return self.finish_barrier(&failed(&error.rank(other)), mailbox);
        }
        if self.expected.iter().all(|rank| self.waits_in_barrier(*rank)) {
            self.finish_barrier(&Outcome::Passed, mailbox);
        }
    }

    /// Ends the present barrier for all ranks that wait in it.
    fn finish_barrier(&mut self, outcome: &Outcome, mailbox: &mut Mailbox) {
        self.expected.clear();
        let waiting: Vec<_> = self
            .pending
            .extract_if(.., |_, p| p.barrier().is_some())
            .map(|(r, p)| (r, p.id))
            .collect();
        self.reply_all(&waiting, outcome, mailbox);
    }

    fn reply_all(&self, to: &[(Rank, u64)], outcome: &Outcome, mailbox: &mut Mailbox) {
        let encoded = encode(outcome).map(Bytes::from);
        // Ranks that share a connection get the same reply once.
        let mut relays: BTreeMap<(*const AtomicUsize, u64), (&Link, BitSet<u32>)> = BTreeMap::new();
        for (rank, id) in to.iter().copied() {
            if rank == Rank::LEADER {
                mailbox.settle(id, outcome.clone());
                continue;
            }
            // If the link has ended, nobody is left to tell.
            let Ok(link) = self.link(rank) else { continue };
            let reply = |outcome| Frame::Reply { id, outcome };
            let sent = encoded.as_ref().map_err(ErrorReport::from).and_then(|bytes| {
                let fits = bytes.len().saturating_add(FRAME_OVERHEAD) <= link.limit;
                if let Some(seat) = link.outbox.seat.filter(|_| fits) {
                    let connection = link.outbox.connection();
                    let entry = relays.entry((connection, id)).or_insert((link, BitSet::new()));
                    entry.1.insert(seat);
                    return Ok(());
                }
                let frame = reply(bytes.clone());
                link.send(rank, bytes.len(), frame).map_err(|error| ErrorReport::from(&error))
            });
            if let Err(report) = sent {
                tracing::warn!(%rank, error = %report, "the answer to a call does not fit");
                match encode(&Outcome::Failed(report)) {
                    Ok(bytes) => link.tell(reply(bytes.into())),
                    Err(error) => tracing::error!(%error, "an error report does not encode"),
                }
            }
        }
        let Ok(bytes) = encoded else { return };
        for ((_, id), (link, seats)) in relays {
            link.send_to_seats(&seats, &Frame::Reply { id, outcome: bytes.clone() });
        }
    }
}

fn too_large(size: usize, limit: usize) -> Error {
    let message = format!("{size} bytes do not fit the limit of {limit} (max_frame_bytes)");
    Error::new(ErrorKind::Config, "sending a message", message)
}

fn gone(rank: Rank) -> Error {
    Error::new(ErrorKind::PeerLost, "sending a message", "there is no connection to it").rank(rank)
}

fn failed(error: &Error) -> Outcome {
    Outcome::Failed(ErrorReport::from(error))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranks_and_seats_of_a_relay_are_found_by_each_other(
            changes in prop::collection::vec((0..80_u32, any::<bool>()), 0..60),
            asked in prop::collection::btree_set(0..80_u32, 0..80),
        ) {
            let (mut seating, mut naive) = (Seating::default(), BTreeMap::<u32, Rank>::new());
            for (seat, (rank, takes)) in (0..).zip(changes) {
                // A rank that is lost may come back, to another seat.
                seating.leave(Rank(rank));
                naive.retain(|_, seated| *seated != Rank(rank));
                if takes {
                    seating.take(seat, Rank(rank));
                    naive.insert(seat, Rank(rank));
                }
            }
            let everyone = (naive.keys().copied().collect(), naive.values().copied().collect());
            let some: BitSet<u32> = asked.iter().copied().collect();
            let ranks: RankSet = asked.iter().copied().map(Rank).collect();
            let sat = |seats: &BitSet<u32>| naive.iter().filter(|(seat, _)| seats.contains(**seat)).map(|(_, r)| *r).collect::<RankSet>();
            let where_sat = |ranks: &RankSet| naive.iter().filter(|(_, r)| ranks.contains(**r)).map(|(s, _)| *s).collect::<BitSet<u32>>();
            prop_assert_eq!(seating.ranks_in(&some), sat(&some));
            prop_assert_eq!(seating.seats_of(&ranks), where_sat(&ranks));
            prop_assert_eq!(&seating.ranks_in(&everyone.0), &everyone.1);
            prop_assert_eq!(seating.seats_of(&everyone.1), everyone.0);
        }
    }
}
