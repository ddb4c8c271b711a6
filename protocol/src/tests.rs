//! Tests of each side against a peer that speaks the protocol by hand, and does what no well-behaved peer
//! does.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::message::{Begin, Layout, ToReceiver, ToSender, decode, encode};
use super::{Arrival, Fetch, FetchLink, ReceiveLink, Receiver, SendLink, Sender};
use crate::ranks::Group;
use engine_core::control::{Control, Event};
use engine_core::memory::{Job, Pool};
use engine_core::plan::{BucketKind, BucketLayout, Piece};
use engine_core::{
    Base, CheckpointEngineConfig, CopyOut, DType, Encoding, EngineContext, Error, ErrorKind,
    ErrorReport, Rank, Recovery, Result, RolloutEngine as _, SendReport, Storage, TensorMeta,
    TrainerEngine as _, Treatment, Version, Weight, digest, ensure_async_iterator,
};

const BUCKET: u64 = 1024;
const LIMIT: Duration = Duration::from_secs(20);

/// A link with two slots whose bytes go nowhere.
#[derive(Debug)]
struct Slots(Pool);

#[async_trait]
impl SendLink for Slots {
    fn slots(&self) -> usize {
        2
    }

    fn bucket_bytes(&self) -> u64 {
        BUCKET
    }

    async fn fill(&mut self, _: usize, jobs: Vec<Job>, digests: bool) -> Result<u64> {
        let threads = self.0.clone();
        let mut bucket = vec![0; BUCKET as usize];
        self.0.start(move || threads.encode(&jobs, &mut bucket, digests)).await
    }

    async fn publish(&mut self, _: usize, _: u64) -> Result<()> {
        Ok(())
    }
}

/// A link that receives zeros, whatever was sent.
#[derive(Debug)]
struct Zeros;

#[async_trait]
impl ReceiveLink for Zeros {
    async fn fetch(&mut self, _: u32, filled: u64) -> Result<Storage> {
        Ok(vec![0; filled as usize].into())
    }
}

/// The connections of a leader and one rollout.
fn planes() -> (Arc<dyn Control>, Arc<dyn Control>) {
    planes_at(&Group::default())
}

fn planes_at(at: &Group) -> (Arc<dyn Control>, Arc<dyn Control>) {
    (at.lead(), at.enter(Rank(1)))
}

fn context(timeout: f64) -> EngineContext {
    let mut config = CheckpointEngineConfig::default();
    config.timeout_seconds = timeout;
    EngineContext::new(config)
}

fn sender(leader: &Arc<dyn Control>, timeout: f64) -> Sender<Slots> {
    let link = Slots(Pool::new(1).unwrap());
    Sender::new(link, &context(timeout), leader.clone(), [Rank(1)])
}

/// Weights that each fill a bucket.
fn weights(count: u64) -> Vec<Weight> {
    let weight = |i| Weight::new(format!("w{i}"), DType::U8, [BUCKET], vec![i as u8; 1024]);
    (0..count).map(|i| weight(i).unwrap()).collect()
}

async fn send<L: SendLink>(sender: &mut Sender<L>, version: u64) -> Result<SendReport> {
    sender.send_weights(ensure_async_iterator(weights(3)), Version(version)).await
}

/// A rollout whose messages the test sends by hand.
struct Hand(Arc<dyn Control>);

impl Hand {
    async fn hear(&self) -> ToReceiver {
        loop {
            match self.0.recv(LIMIT).await.unwrap().expect("a message") {
                Event::Message { body, .. } => match decode(&body).unwrap() {
                    ToReceiver::Alive { .. } => {}
                    message => return message,
                },
                event => panic!("{event:?}"),
            }
        }
    }

    /// Whether nothing comes for a while.
    async fn hears_nothing(&self) -> bool {
        self.0.recv(Duration::from_millis(200)).await.unwrap().is_none_or(|event| {
            let Event::Message { body, .. } = event else { return false };
            matches!(decode(&body), Ok(ToReceiver::Alive { .. }))
        })
    }

    fn say(&self, message: ToSender) {
        self.0.send(Rank::LEADER, encode(&message).unwrap()).unwrap();
    }

    /// The next update that begins. Late messages of other updates are skipped.
    async fn begin(&self) -> Begin {
        loop {
            if let ToReceiver::Begin(begin) = self.hear().await {
                return begin;
            }
        }
    }

    fn enter(&self, update: u64, plan: Option<u64>, held: Vec<(u64, u64)>) {
        let (card, base) = (Bytes::new(), Base::Unable);
        self.say(ToSender::Entered { update, card, plan, held, base, wants: None });
    }

    /// Releases the buckets of an update at once. Returns their layouts and the plan's digest.
    async fn rest(&self, update: u64) -> (Vec<Layout>, u64) {
        let mut layouts = Vec::new();
        loop {
            match self.hear().await {
                ToReceiver::Bucket { update: of, index, layout, .. } => {
                    assert_eq!(of, update);
                    layouts.push(layout);
                    self.say(ToSender::Release { update, index });
                }
                ToReceiver::End { digest, plan, .. } => {
                    let notes = "null".to_owned();
                    self.say(ToSender::Confirm { update, digest, seconds: 0.0, notes });
                    assert_eq!(self.hear().await, ToReceiver::Commit { update });
                    return (layouts, plan);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Takes part in an update from its beginning to its end.
    async fn receive(&self) {
        let Begin { update, .. } = self.begin().await;
        self.enter(update, None, Vec::new());
        self.rest(update).await;
    }

    fn fail(&self, update: u64) {
        let error = ErrorReport::from(&Error::new(ErrorKind::Resource, "installing", "no room"));
        self.say(ToSender::Failed { update, error });
    }
}

/// An update that succeeds.
async fn works(sender: &mut Sender<Slots>, version: u64, hand: &Hand) {
    let (sent, ()) = futures::future::join(send(sender, version), hand.receive()).await;
    sent.unwrap();
}

/// An update that fails because of what the rollout does.
async fn fails(
    sender: &mut Sender<Slots>,
    version: u64,
    rollout: impl Future<Output = ()>,
) -> Error {
    futures::future::join(send(sender, version), rollout).await.0.unwrap_err()
}

#[tokio::test]
async fn a_release_that_was_lost_is_made_good_by_what_the_rank_says_when_it_enters() {
    let (leader, rollout) = planes();
    let (mut sender, hand) = (sender(&leader, 5.0), Hand(rollout));
    let failing = async {
        let Begin { update, .. } = hand.begin().await;
        hand.enter(update, None, Vec::new());
        assert!(matches!(hand.hear().await, ToReceiver::Bucket { index: 0, .. }));
        // It holds two buckets, and never releases them.
        assert!(matches!(hand.hear().await, ToReceiver::Bucket { index: 1, .. }));
        hand.fail(update);
    };
    assert_eq!(fails(&mut sender, 1, failing).await.kind(), ErrorKind::Resource);
    works(&mut sender, 2, &hand).await;
}

#[tokio::test]
async fn a_bucket_that_a_rank_says_it_holds_is_not_written_to() {
    let (leader, rollout) = planes();
    let (mut sender, hand) = (sender(&leader, 5.0), Hand(rollout));
    let mut first = 0;
    let failing = async {
        first = hand.begin().await.update;
        hand.enter(first, None, Vec::new());
        assert!(matches!(hand.hear().await, ToReceiver::Bucket { index: 0, .. }));
        hand.fail(first);
    };
    fails(&mut sender, 1, failing).await;
    let next = async {
        let Begin { update, .. } = hand.begin().await;
        hand.enter(update, None, vec![(first, 0)]);
        assert!(hand.hears_nothing().await, "the slot was filled while it is read");
        hand.say(ToSender::Release { update: first, index: 0 });
        hand.rest(update).await;
    };
    let (sent, ()) = futures::future::join(send(&mut sender, 2), next).await;
    sent.unwrap();
}

#[tokio::test]
async fn a_rank_is_told_layouts_by_what_it_says_that_it_knows() {
    let (leader, rollout) = planes();
    let (mut sender, hand) = (sender(&leader, 5.0), Hand(rollout));
    let mut plan = None;
    // It knows no plan, then has lost the plan, then knows it.
    for (version, knows) in [(1, false), (2, false), (3, true)] {
        let update = async {
            let Begin { update, .. } = hand.begin().await;
            hand.enter(update, plan.filter(|_| knows), Vec::new());
            let (layouts, digest) = hand.rest(update).await;
            for layout in layouts {
                assert_eq!(matches!(layout, Layout::Known { .. }), knows, "update {version}");
            }
            digest
        };
        let (sent, digest) = futures::future::join(send(&mut sender, version), update).await;
        sent.unwrap();
        plan = Some(digest);
    }
}

/// A weight that nobody may encode.
#[derive(Debug)]
struct Unwanted;

impl Encoding for Unwanted {
    fn name(&self) -> &'static str {
        "unwanted"
    }

    fn source_bytes(&self) -> u64 {
        8
    }

    fn encode_host(&self, _: Range<u64>, _: &mut [u8]) -> Result<()> {
        Err(Error::new(ErrorKind::Weight, "encoding", "nobody wants it"))
    }
}

#[tokio::test]
async fn what_nobody_wants_is_not_encoded_and_a_plan_is_known_as_far_as_it_is_wanted() {
    let (leader, rollout) = planes();
    let mut context = context(20.0);
    context.config.parts.insert("draft".into(), vec!["mtp.*".into()]);
    let mut sender = Sender::new(Slots(Pool::new(1).unwrap()), &context, leader, [Rank(1)]);
    let hand = Hand(rollout);
    let weights = || {
        let meta = |name: &str| TensorMeta::new(name, DType::U8, [8]);
        let policy =
            |name| Weight::encoded(meta(name), Arc::new(Unwanted), Treatment::Plain).unwrap();
        let draft = |name| Weight::new(name, DType::U8, [8], vec![7; 8]).unwrap();
        vec![policy("w0"), draft("mtp.a"), policy("w1"), policy("w2"), draft("mtp.b")]
    };
    let mut known = None;
    for version in 1..3 {
        let send = sender.send_weights(ensure_async_iterator(weights()), Version(version));
        let receive = async {
            let Begin { update, .. } = hand.begin().await;
            assert!(hand.hears_nothing().await, "a bucket before it is known who wants it");
            let (card, held, base) = (Bytes::new(), Vec::new(), Base::Unable);
            let wants = Some(vec!["draft".to_owned()]);
            hand.say(ToSender::Entered { update, card, plan: known, held, base, wants });
            hand.rest(update).await
        };
        let (sent, (layouts, plan)) = futures::future::join(send, receive).await;
        let report = sent.unwrap();
        assert_eq!(report.receivers[0].parts, ["draft"]);
        assert_eq!((report.counts.tensors, report.buckets), (2, 1));
        match (&*layouts, known) {
            ([Layout::Explicit { pieces }], None) => {
                let names = pieces.iter().map(|piece| &*piece.meta.name);
                assert_eq!(names.collect::<Vec<_>>(), ["mtp.a", "mtp.b"]);
            }
            ([Layout::Known { .. }], Some(_)) => {}
            other => panic!("{other:?}"),
        }
        known = Some(plan);
    }
}

#[tokio::test]
async fn nothing_is_told_of_an_update_to_a_rank_that_has_not_entered_it() {
    let (leader, rollout) = planes();
    let (mut sender, hand) = (sender(&leader, 5.0), Hand(rollout));
    let late = async {
        let Begin { update, .. } = hand.begin().await;
        assert!(hand.hears_nothing().await);
        hand.enter(update, None, Vec::new());
        hand.rest(update).await;
    };
    let (sent, ()) = futures::future::join(send(&mut sender, 1), late).await;
    sent.unwrap();
}

#[tokio::test]
async fn no_two_updates_of_a_control_plane_have_one_number_whatever_groups_there_are() {
    let (leader, rollout) = planes();
    let hand = Hand(rollout);
    let mut numbers = Vec::new();
    for version in 1..4 {
        // A group that is formed anew has a new sender.
        let mut sender = sender(&leader, 5.0);
        let update = async {
            let Begin { update, .. } = hand.begin().await;
            hand.enter(update, None, Vec::new());
            hand.rest(update).await;
            update
        };
        let (sent, update) = futures::future::join(send(&mut sender, version), update).await;
        sent.unwrap();
        assert!(!numbers.contains(&update), "{update} was used before: {numbers:?}");
        numbers.push(update);
    }
}

#[tokio::test]
async fn a_rank_that_does_not_keep_to_the_protocol_is_cut_off_and_may_join_again() {
    let unasked = encode(&ToSender::Filled { update: 1, index: 0, digest: 0 }).unwrap();
    for (garbage, words) in [
        (Bytes::from_static(&[0xff; 9]), "reading a message"),
        (unasked, "it was not asked to fill bucket 0"),
    ] {
        let at = Group::default();
        let (leader, rollout) = planes_at(&at);
        let (mut sender, hand) = (sender(&leader, 5.0), Hand(rollout));
        let failing = async {
            let Begin { update, .. } = hand.begin().await;
            hand.enter(update, None, Vec::new());
            hand.0.send(Rank::LEADER, garbage.clone()).unwrap();
            while let Ok(Some(_)) = hand.0.recv(LIMIT).await {}
        };
        let error = tokio::time::timeout(LIMIT, fails(&mut sender, 1, failing)).await.unwrap();
        let told = error.report();
        assert_eq!((told.kind, told.rank), (ErrorKind::Protocol, Some(Rank(1))), "{error}");
        assert_eq!(told.recovery, Recovery::Retry);
        assert!(error.to_string().contains(words), "{error}");

        let again = Hand(at.join(Rank(1)));
        works(&mut sender, 2, &again).await;
    }
}

#[tokio::test]
async fn a_rank_that_says_what_nobody_understands_between_updates_is_cut_off_as_well() {
    let at = Group::default();
    let (leader, rollout) = planes_at(&at);
    let (mut sender, hand) = (sender(&leader, 5.0), Hand(rollout));
    works(&mut sender, 1, &hand).await;
    hand.0.send(Rank::LEADER, Bytes::from_static(&[0xff; 9])).unwrap();
    // The trainer reads the bad message when the next update begins.
    let ended = async { while let Ok(Some(_)) = hand.0.recv(LIMIT).await {} };
    let sent = tokio::time::timeout(LIMIT, fails(&mut sender, 2, ended)).await.unwrap();
    assert_eq!((sent.kind(), sent.report().rank), (ErrorKind::Protocol, Some(Rank(1))), "{sent}");
    let again = Hand(at.join(Rank(1)));
    works(&mut sender, 3, &again).await;
}

/// A rollout that follows the protocol, whether updates succeed or fail.
async fn behave(hand: &Hand) {
    loop {
        match hand.hear().await {
            ToReceiver::Begin(Begin { update, .. }) => hand.enter(update, None, Vec::new()),
            ToReceiver::Bucket { update, index, .. } => {
                hand.say(ToSender::Release { update, index });
            }
            ToReceiver::End { update, digest, .. } => {
                let notes = "null".to_owned();
                hand.say(ToSender::Confirm { update, digest, seconds: 0.0, notes });
            }
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_rank_that_fails_one_update_after_the_other_is_expelled_with_the_reason_and_the_others_go_on()
 {
    let at = Group::default();
    let (leader, good) = planes_at(&at);
    let (good, stuck) = (Hand(good), at.enter(Rank(2)));
    let link = Slots(Pool::new(1).unwrap());
    let ranks = [Rank(1), Rank(2)];
    let mut sender = Sender::new(link, &context(0.2), leader, ranks);
    let trainer = async {
        for version in 1..=3 {
            let error = send(&mut sender, version).await.unwrap_err();
            let told = error.report();
            assert_eq!((told.kind, told.rank), (ErrorKind::Timeout, Some(Rank(2))), "{error}");
        }
        // The leader may hear only now that the connection has ended.
        let sent = match send(&mut sender, 4).await {
            Err(error) if error.report().rank == Some(Rank(2)) => send(&mut sender, 5).await,
            sent => sent,
        };
        assert_eq!(sent.unwrap().absent, [Rank(2)]);
        // A rank that comes back and fails again is expelled sooner.
        let again = at.join(Rank(2));
        assert!(send(&mut sender, 6).await.is_err());
        let sent = match send(&mut sender, 7).await {
            Err(error) if error.report().rank == Some(Rank(2)) => send(&mut sender, 8).await,
            sent => sent,
        };
        assert_eq!(sent.unwrap().absent, [Rank(2)]);
        drop(again);
    };
    tokio::select! {
        () = behave(&good) => unreachable!("it goes on for ever"),
        ended = tokio::time::timeout(LIMIT, trainer) => ended.unwrap(),
    }
    drop(stuck);
}

#[tokio::test]
async fn a_rank_whose_caller_gives_updates_up_is_not_expelled() {
    let (leader, rollout) = planes();
    let (mut sender, hand) = (sender(&leader, 5.0), Hand(rollout));
    for version in 1..=4 {
        let failing = async {
            let Begin { update, .. } = hand.begin().await;
            hand.enter(update, None, Vec::new());
            let error =
                Error::new(ErrorKind::Aborted, "receiving", "the caller has changed its mind");
            hand.say(ToSender::Failed { update, error: ErrorReport::from(&error) });
        };
        let error = fails(&mut sender, version, failing).await;
        assert_eq!(error.kind(), ErrorKind::Aborted, "{error}");
    }
    works(&mut sender, 5, &hand).await;
}

#[tokio::test]
async fn a_stream_that_blocks_its_thread_for_longer_than_a_deadline_makes_nobody_late() {
    let (leader, rollout) = planes();
    let (mut sender, hand) = (sender(&leader, 0.3), Hand(rollout));
    let blocking = weights(3).into_iter().inspect(|_| std::thread::sleep(LIMIT / 60));
    let sending = sender.send_weights(ensure_async_iterator(blocking), Version(1));
    let (sent, ()) = futures::future::join(sending, hand.receive()).await;
    sent.unwrap();
}

/// An encoding that blocks until the test lets it go on.
#[derive(Debug, Default)]
struct Stuck(Mutex<bool>, Condvar);

impl Stuck {
    fn let_go(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
}

impl Encoding for Stuck {
    fn name(&self) -> &'static str {
        "stuck"
    }

    fn source_bytes(&self) -> u64 {
        0
    }

    fn encode_host(&self, _: Range<u64>, _: &mut [u8]) -> Result<()> {
        let free = self.1.wait_while(self.0.lock().unwrap(), |free| !*free).unwrap();
        drop(free);
        Ok(())
    }
}

#[tokio::test]
async fn a_bucket_that_is_never_filled_is_a_timeout_that_says_that_its_weights_are_still_read() {
    let (leader, rollout) = planes();
    let (mut sender, hand) = (sender(&leader, 0.5), Hand(rollout));
    let stuck = Arc::new(Stuck::default());
    let meta = TensorMeta::new("stuck", DType::U8, [16]);
    let weight = Weight::encoded(meta, stuck.clone(), Treatment::Plain);
    let sending = sender.send_weights(ensure_async_iterator([weight]), Version(1));
    let entering = async { hand.enter(hand.begin().await.update, None, Vec::new()) };
    let (sent, ()) =
        tokio::time::timeout(LIMIT, futures::future::join(sending, entering)).await.unwrap();
    let error = sent.unwrap_err();
    assert_eq!((error.kind(), error.report().recovery), (ErrorKind::Timeout, Recovery::Abort));
    assert!(error.to_string().contains("must not be changed"), "{error}");
    stuck.let_go();
    works(&mut sender, 2, &hand).await;
}

/// The next message at a trainer whose messages the test sends by hand.
async fn hear(leader: &Arc<dyn Control>) -> ToSender {
    match leader.recv(LIMIT).await.unwrap().expect("a message") {
        Event::Message { body, .. } => decode(&body).unwrap(),
        event => panic!("{event:?}"),
    }
}

fn tell(leader: &Arc<dyn Control>, message: &ToReceiver) {
    leader.send(Rank(1), encode(message).unwrap()).unwrap();
}

fn begin(update: u64) -> ToReceiver {
    ToReceiver::Begin(Begin {
        update,
        version: Version(update),
        bucket_bytes: BUCKET,
        slots: 2,
        digests: false,
        routed: false,
        senders: vec![Rank::LEADER],
        ticket: None,
    })
}

#[tokio::test]
async fn a_bucket_that_is_refused_is_released_and_the_next_update_is_entered_without_it() {
    let (leader, rollout) = planes();
    let pool = Pool::new(1).unwrap();
    let mut receiver = Receiver::new(Zeros, &context(5.0), rollout, pool);
    // A bucket out of order, an unknown layout, and bytes that are no message.
    let refused = |update, index, layout| {
        encode(&ToReceiver::Bucket { update, index, slot: 0, digest: 0, layout })
    };
    let explicit = Layout::Explicit { pieces: Vec::new() };
    let cases = [
        (refused(1, 5, explicit).unwrap(), Some(5)),
        (refused(2, 0, Layout::Known { digest: 7 }).unwrap(), Some(0)),
        (Bytes::from_static(&[0xff; 9]), None),
    ];
    for (update, (body, index)) in (1..).zip(cases) {
        tell(&leader, &begin(update));
        leader.send(Rank(1), body).unwrap();
        let mut received = receiver.receive_weights(None).await.unwrap();
        assert_eq!(received.next_bucket().await.unwrap_err().kind(), ErrorKind::Protocol);
        drop(received);
        let entered = hear(&leader).await;
        assert!(
            matches!(&entered, ToSender::Entered { held, .. } if held.is_empty()),
            "{entered:?}"
        );
        let mut heard = vec![hear(&leader).await];
        if let Some(index) = index {
            heard.push(hear(&leader).await);
            assert!(heard.contains(&ToSender::Release { update, index }), "{heard:?}");
        }
        assert!(
            heard.iter().any(|message| matches!(message, ToSender::Failed { .. })),
            "{heard:?}"
        );
    }
}

/// A link that receives lists of zeros, whatever was sent.
#[derive(Debug)]
struct Lists(Vec<u64>);

#[async_trait]
impl FetchLink for Lists {
    fn card(&self) -> Bytes {
        Bytes::new()
    }

    fn bucket_kind(&self) -> BucketKind {
        BucketKind::List
    }

    async fn fetch(&mut self, _: Fetch, arrival: Arrival) {
        arrival.tell_list(Ok(self.0.iter().map(|len| vec![0; *len as usize].into()).collect()));
    }

    fn abandon(&mut self, _: Rank) {}
}

fn whole(name: &str, len: u64, offset: u64) -> Piece {
    Piece { meta: TensorMeta::new(name, DType::U8, [len]).into(), start: 0, len, offset }
}

fn bucket(update: u64, index: u64, pieces: Vec<Piece>) -> ToReceiver {
    let slot = (index % 2) as u32;
    ToReceiver::Bucket { update, index, slot, digest: 0, layout: Layout::Explicit { pieces } }
}

#[tokio::test]
async fn a_weight_that_is_larger_than_a_bucket_is_whole_where_buckets_are_lists_and_nowhere_else() {
    let larger = || vec![whole("larger", 2 * BUCKET, 0)];
    let (leader, rollout) = planes();
    let mut receiver = Receiver::new(Zeros, &context(5.0), rollout, Pool::new(1).unwrap());
    tell(&leader, &begin(1));
    tell(&leader, &bucket(1, 0, larger()));
    let mut received = receiver.receive_weights(None).await.unwrap();
    assert_eq!(received.next_bucket().await.unwrap_err().kind(), ErrorKind::Protocol);

    let (leader, rollout) = planes();
    let link = Lists(vec![2 * BUCKET]);
    let mut receiver = Receiver::new(link, &context(5.0), rollout, Pool::new(1).unwrap());
    tell(&leader, &begin(1));
    tell(&leader, &bucket(1, 0, larger()));
    let mut received = receiver.receive_weights(None).await.unwrap();
    let bucket = received.next_bucket().await.unwrap().unwrap();
    assert_eq!(bucket.pieces().next().unwrap().bytes.len(), 2 * BUCKET);
}

#[tokio::test]
async fn a_list_is_released_when_more_is_asked_for_whatever_of_it_is_kept() {
    let (leader, rollout) = planes();
    let link = Lists(vec![8, 16]);
    let mut receiver = Receiver::new(link, &context(5.0), rollout, Pool::new(1).unwrap());
    let pieces = || vec![whole("a", 8, 0), whole("b", 16, 256)];
    tell(&leader, &begin(1));
    tell(&leader, &bucket(1, 0, pieces()));
    tell(&leader, &bucket(1, 1, pieces()));
    let mut received = receiver.receive_weights(None).await.unwrap();
    assert!(matches!(hear(&leader).await, ToSender::Entered { .. }));
    let first = received.next_bucket().await.unwrap().unwrap();
    assert_eq!(leader.recv(Duration::ZERO).await.unwrap(), None, "it is at work on it");
    let second = received.next_bucket().await.unwrap().unwrap();
    assert_eq!(hear(&leader).await, ToSender::Release { update: 1, index: 0 });
    assert_eq!(leader.recv(Duration::ZERO).await.unwrap(), None);
    assert_eq!((first.index(), second.index()), (0, 1));
    drop(received);
    let mut heard = [hear(&leader).await, hear(&leader).await];
    heard.sort_by_key(|message| matches!(message, ToSender::Failed { .. }));
    assert_eq!(heard[0], ToSender::Release { update: 1, index: 1 });
}

#[tokio::test]
async fn an_update_that_begins_within_another_one_is_received_next() {
    let (leader, rollout) = planes();
    let pool = Pool::new(1).unwrap();
    let mut receiver = Receiver::new(Zeros, &context(5.0), rollout, pool);
    tell(&leader, &begin(1));
    // The end of the first update was lost.
    tell(&leader, &begin(2));
    let mut received = receiver.receive_weights(None).await.unwrap();
    assert_eq!(received.version(), Version(1));
    let error = received.next_bucket().await.unwrap_err();
    assert_eq!((error.kind(), error.report().recovery), (ErrorKind::Protocol, Recovery::Retry));
    drop(received);
    assert_eq!(receiver.receive_weights(None).await.unwrap().version(), Version(2));
}

/// Two slots that a trainer and a rollout share. The rollout may see damaged bytes of a slot.
#[derive(Clone, Debug)]
struct Shared {
    pool: Pool,
    slots: Arc<Mutex<[Vec<u8>; 2]>>,
    damaged: Option<u32>,
}

impl Shared {
    fn new() -> Self {
        Self { pool: Pool::new(1).unwrap(), slots: Arc::default(), damaged: None }
    }
}

#[async_trait]
impl SendLink for Shared {
    fn slots(&self) -> usize {
        2
    }

    fn bucket_bytes(&self) -> u64 {
        BUCKET
    }

    async fn fill(&mut self, slot: usize, jobs: Vec<Job>, digests: bool) -> Result<u64> {
        let threads = self.pool.clone();
        let mut bucket = vec![0; BUCKET as usize];
        let work = move || Ok((threads.encode(&jobs, &mut bucket, digests)?, bucket));
        let (sum, bucket) = self.pool.start(work).await?;
        self.slots.lock().unwrap()[slot] = bucket;
        Ok(sum)
    }

    async fn publish(&mut self, _: usize, _: u64) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl ReceiveLink for Shared {
    async fn fetch(&mut self, slot: u32, filled: u64) -> Result<Storage> {
        let mut bytes = self.slots.lock().unwrap()[slot as usize][..filled as usize].to_vec();
        if self.damaged == Some(slot) {
            bytes[3] ^= 1;
        }
        Ok(bytes.into())
    }
}

/// Copies whole buckets, except those whose first weight is `strange`.
#[derive(Debug, Default)]
struct Copies {
    made: Mutex<Vec<Bytes>>,
    strange: Option<&'static str>,
}

impl CopyOut for Copies {
    fn copy_out(&self, layout: &BucketLayout, bucket: &Storage) -> Result<Option<u64>> {
        if self.strange.is_some_and(|name| *layout.pieces()[0].meta.name == *name) {
            return Ok(None);
        }
        let bytes = Bytes::copy_from_slice(&bucket.to_host()?);
        self.made.lock().unwrap().push(bytes.clone());
        let sum = |piece: &Piece| {
            digest::sum(piece.offset, &bytes[piece.offset as usize..][..piece.len as usize])
        };
        Ok(Some(layout.pieces().iter().map(sum).fold(0, u64::wrapping_add)))
    }
}

/// The number of buckets before the failure, and its error.
struct Failed(usize, Error);

/// A trainer and a rollout that share their buckets.
fn pair(damaged: Option<u32>) -> (Sender<Shared>, Receiver<Shared>) {
    let (leader, rollout) = planes();
    let link = Shared::new();
    let sender = Sender::new(link.clone(), &context(20.0), leader, [Rank(1)]);
    let pool = Pool::new(1).unwrap();
    (sender, Receiver::new(Shared { damaged, ..link }, &context(20.0), rollout, pool))
}

#[tokio::test]
async fn a_bucket_is_verified_by_what_copies_it_out_and_given_only_if_that_has_read_the_right_bytes()
 {
    for (damaged, given_before) in [(None, 3), (Some(1), 1)] {
        let (mut sender, mut receiver) = pair(damaged);
        let copies = Arc::new(Copies { strange: Some("w2"), ..Copies::default() });
        let by: Arc<dyn CopyOut> = copies.clone();
        let another: Arc<dyn CopyOut> = Arc::new(Copies::default());
        let receive = async {
            let mut received = receiver.receive_weights(None).await.unwrap();
            received.copy_by(by.clone());
            let mut given = 0;
            while let Some(bucket) =
                received.next_bucket().await.map_err(|error| Failed(given, error))?
            {
                // A bucket that `by` does not know is verified as usual, and left for the caller to install.
                assert_eq!(bucket.was_copied_by(&by), given != 2, "bucket {given}");
                assert!(!bucket.was_copied_by(&another));
                given += 1;
            }
            Ok::<_, Failed>(given)
        };
        let (sent, received) = futures::join!(send(&mut sender, 1), receive);
        match received {
            Ok(given) => {
                assert_eq!((given, damaged), (given_before, None));
                sent.unwrap();
            }
            Err(Failed(given, error)) => {
                assert_eq!((given, error.kind()), (given_before, ErrorKind::Digest), "{error}");
                sent.unwrap_err();
            }
        }
        let made = copies.made.lock().unwrap();
        assert!(made.iter().enumerate().all(|(index, bytes)| bytes[0] == index as u8));
        drop(made);
        drop(by);
        assert_eq!(Arc::strong_count(&copies), 1, "nobody copies any more");
    }
}
