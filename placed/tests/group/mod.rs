//! Groups of ranks that share a process, with memory that is lent by handing it over.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
pub(crate) use conformance::placed::{Boxes, Model, Tensor};
use engine_core::{
    CheckpointEngine, CheckpointEngineConfig, Encoding, EngineContext, Error, ErrorKind, Rank,
    Result, Role, SendReport, TensorBox, TensorMeta, TrainerEngine, Treatment, Version, Weight,
    digest, ensure_async_iterator,
};
use futures::StreamExt;
use futures::future::{BoxFuture, join, join_all};
use placed::{Layout, Lender, LentBytes, PlacedRollout, PlacedTrainer, Reach, Reached, Wanted};
use protocol::hub::{Hub, Member};
use quant_fp8::StridedPart;

/// All that is lent in a process, by number.
#[derive(Clone, Debug, Default)]
pub(crate) struct Market(Arc<Lots>);

#[derive(Debug, Default)]
struct Lots {
    lent: Mutex<HashMap<u64, Weak<Lot>>>,
    garbles: AtomicBool,
    /// Whether lent memory digests itself, as that of a device does.
    digests: AtomicBool,
    puts: AtomicUsize,
    /// How many times lent memory was digested while it was lent.
    digested: AtomicUsize,
    /// How many ranks have ended what the transport does for them.
    closed: AtomicUsize,
}

impl Market {
    fn close_one(&self) -> BoxFuture<'static, ()> {
        let market = self.clone();
        Box::pin(async move {
            tokio::task::yield_now().await;
            market.0.closed.fetch_add(1, Ordering::Relaxed);
        })
    }
}

type Lot = Mutex<Vec<u8>>;

#[derive(Debug)]
struct Owner {
    market: Market,
    own: Vec<u8>,
    lent: Option<Arc<Lot>>,
}

impl Lender for Owner {
    fn len(&self) -> u64 {
        self.own.len() as u64
    }

    fn lend(&mut self, _: &[Rank]) -> Result<Bytes> {
        let lot = Arc::new(Mutex::new(std::mem::take(&mut self.own)));
        let mut all = self.market.0.lent.lock().unwrap();
        let number = all.len() as u64;
        all.insert(number, Arc::downgrade(&lot));
        self.lent = Some(lot);
        Ok(Bytes::copy_from_slice(&number.to_le_bytes()))
    }

    fn take_back(&mut self) -> Result<bool> {
        if let Some(lot) = self.lent.take() {
            match Arc::try_unwrap(lot) {
                Ok(bytes) => self.own = bytes.into_inner().unwrap(),
                Err(lot) => self.lent = Some(lot),
            }
        }
        Ok(self.lent.is_none())
    }

    fn bytes(&self, at: u64, len: u64) -> Result<LentBytes<'_>> {
        match self.lent {
            None => Ok(LentBytes::Host(&self.own[at as usize..(at + len) as usize])),
            Some(_) => Err(Error::new(ErrorKind::State, "reading", "it is lent")),
        }
    }

    fn sums(
        &self,
        pieces: &[&Arc<[StridedPart]>],
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Vec<u64>>> {
        if !self.market.0.digests.load(Ordering::Relaxed) {
            return Ok(None);
        }
        step()?;
        let lent = self.lent.as_ref().map(|lot| lot.lock().unwrap());
        self.market.0.digested.fetch_add(usize::from(lent.is_some()), Ordering::Relaxed);
        let memory = lent.as_deref().unwrap_or(&self.own);
        let sum = |part: &StridedPart| {
            // Rows of whole words count alone as they do together.
            let [matrices, rows, cols] = part.extent;
            let each = (0..matrices).flat_map(|matrix| (0..rows).map(move |row| (matrix, row)));
            let sums = each.map(|(matrix, row)| {
                let at = part.to.at + matrix * part.to.matrix + row * part.to.row;
                let row = &memory[at as usize..(at + cols * part.element) as usize];
                digest::sum_anywhere(at, row)
            });
            sums.fold(0, u64::wrapping_add)
        };
        let sums = pieces.iter().map(|parts| parts.iter().map(sum).fold(0, u64::wrapping_add));
        Ok(Some(sums.collect()))
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        assert!(self.lent.is_none(), "closed before it is taken back");
        self.market.close_one()
    }
}

impl Reach for Market {
    fn reach(&self, terms: &[(Rank, Bytes)]) -> Result<Vec<Arc<dyn Reached>>> {
        let reach = |(rank, terms): &(Rank, Bytes)| {
            let number = u64::from_le_bytes(terms[..].try_into().unwrap());
            let lot = self.0.lent.lock().unwrap()[&number].upgrade();
            let gone = || Error::new(ErrorKind::PeerLost, "reaching", "it is gone").rank(*rank);
            let garbles = self.0.garbles.load(Ordering::Relaxed);
            let (lot, market) = (lot.ok_or_else(gone)?, self.clone());
            Ok(Arc::new(Hand { lot, garbles, market }) as Arc<dyn Reached>)
        };
        terms.iter().map(reach).collect()
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        self.close_one()
    }
}

#[derive(Debug)]
struct Hand {
    lot: Arc<Lot>,
    garbles: bool,
    market: Market,
}

impl Reached for Hand {
    fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let mut memory = self.lot.lock().unwrap();
        let to = &mut memory[at as usize..at as usize + bytes.len()];
        to.copy_from_slice(bytes);
        self.market.0.puts.fetch_add(1, Ordering::Relaxed);
        if self.garbles {
            to[0] ^= 1;
        }
        Ok(())
    }
}

/// A weight that breaks when it is read.
#[derive(Debug)]
struct Breaks(u64);

impl Encoding for Breaks {
    fn name(&self) -> &'static str {
        "breaks"
    }

    fn source_bytes(&self) -> u64 {
        self.0
    }

    fn encode_host(&self, _: std::ops::Range<u64>, _: &mut [u8]) -> Result<()> {
        Err(Error::new(ErrorKind::Source, "reading a disk", "it is broken"))
    }
}

#[derive(Debug)]
pub(crate) struct Group {
    model: Model,
    pub(crate) holds: Vec<Boxes>,
    wants: Vec<Vec<Wanted>>,
    trainers: Vec<PlacedTrainer>,
    pub(crate) rollouts: Vec<PlacedRollout>,
    market: Market,
    /// A trainer whose weights cannot be read.
    pub(crate) fails: Option<Rank>,
    /// A trainer whose stream ends with an error.
    pub(crate) breaks_off: Option<Rank>,
    /// A trainer whose program sends another version than the others.
    pub(crate) behind: Option<(Rank, u64)>,
    /// The streams stop in front of the weight of this number until something was written, or digested if memory digests itself.
    pub(crate) stops_at: Option<usize>,
    _members: Vec<Member>,
}

impl Group {
    pub(crate) fn new(model: &Model, holds: &[Boxes], wants: &[Vec<Wanted>]) -> Self {
        let (hub, market) = (Hub::new(), Market::default());
        let mut ranks = BTreeMap::new();
        for rank in 0..(holds.len() + wants.len()) as u32 {
            let is_trainer = (rank as usize) < holds.len();
            ranks.insert(Rank(rank), if is_trainer { Role::Trainer } else { Role::Rollout });
        }
        let mut config = CheckpointEngineConfig::default();
        config.threads = std::num::NonZeroUsize::new(2);
        config.timeout_seconds = 10.0;
        let mut members = Vec::new();
        let (mut trainers, mut rollouts) = (Vec::new(), Vec::new());
        for (&rank, &role) in &ranks {
            let control = if rank == Rank::LEADER {
                hub.control()
            } else {
                let member = Member::new(rank, role);
                hub.admit(&member).unwrap();
                let control = member.control();
                members.push(member);
                control
            };
            let context = EngineContext::new(config.clone()).with_control(control);
            if role == Role::Trainer {
                let reach = Arc::new(market.clone());
                trainers.push(PlacedTrainer::new(&context, ranks.clone(), reach).unwrap());
            } else {
                let layout = Layout::new(wants[rank.index() - holds.len()].clone()).unwrap();
                let own = vec![0xa5; layout.bytes() as usize];
                let owner = Owner { market: market.clone(), own, lent: None };
                rollouts.push(PlacedRollout::new(&context, layout, Box::new(owner)).unwrap());
            }
        }
        Self {
            model: model.clone(),
            holds: holds.to_vec(),
            wants: wants.to_vec(),
            trainers,
            rollouts,
            market,
            fails: None,
            breaks_off: None,
            behind: None,
            stops_at: None,
            _members: members,
        }
    }

    pub(crate) fn garble(&self, garbles: bool) {
        self.market.0.garbles.store(garbles, Ordering::Relaxed);
    }

    /// From now on lent memory digests itself. Only for tensors that are not quantised and have rows of whole words.
    pub(crate) fn digest_in_place(&self) {
        self.market.0.digests.store(true, Ordering::Relaxed);
    }

    /// One update: the leader's report, or the errors of all ranks.
    pub(crate) fn update(&mut self, version: u64) -> std::result::Result<SendReport, Vec<Error>> {
        let sources = self.holds.iter().zip(0..).map(|(boxes, rank)| {
            let weight = |(meta, region): &(TensorMeta, TensorBox)| {
                let weight = self.model.weight(meta, region, version);
                if self.fails != Some(Rank(rank)) {
                    return weight;
                }
                let breaks = Arc::new(Breaks(weight.byte_len()));
                let broken = Weight::encoded(weight.meta().clone(), breaks, Treatment::Plain);
                broken.unwrap().of_box(meta.shape.clone(), region.clone()).unwrap()
            };
            boxes.iter().map(weight).collect::<Vec<_>>()
        });
        let sources: Vec<_> = sources.collect();
        let (market, stops_at) = (self.market.clone(), self.stops_at);
        let steps = |market: &Market| match market.0.digests.load(Ordering::Relaxed) {
            true => market.0.digested.load(Ordering::Relaxed),
            false => market.0.puts.load(Ordering::Relaxed),
        };
        let before = steps(&market);
        let (breaks_off, behind) = (self.breaks_off, self.behind);
        let sends =
            self.trainers.iter_mut().zip(sources).zip(0..).map(|((trainer, weights), rank)| {
                let market = market.clone();
                let weights = futures::stream::iter(weights.into_iter().enumerate());
                let weights = weights.then(move |(number, weight)| {
                    let market = market.clone();
                    async move {
                        while stops_at == Some(number) && steps(&market) == before {
                            tokio::time::sleep(Duration::from_millis(1)).await;
                        }
                        Ok::<_, Error>(weight)
                    }
                });
                // A moment later, so that all ranks have called.
                let broken = (breaks_off == Some(Rank(rank))).then_some(async {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    Err(Error::new(ErrorKind::Source, "reading a disk", "it is broken"))
                });
                let broken = futures::stream::iter(broken).then(|broken| broken);
                let weights = weights.chain(broken);
                let own = behind.filter(|(behind, _)| *behind == Rank(rank));
                let version = Version(own.map_or(version, |(_, own)| own));
                trainer.send_weights(ensure_async_iterator(weights), version)
            });
        let receives = self.rollouts.iter_mut().map(|rollout| rollout.update(None));
        let all = join(join_all(sends), join_all(receives));
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let limited =
            runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), all).await });
        let (sent, received) = limited.expect("no hang");
        let mut reports = Vec::new();
        let mut errors: Vec<Error> = received.into_iter().filter_map(Result::err).collect();
        for sent in sent {
            match sent {
                Ok(report) => reports.push(report),
                Err(error) => errors.push(error),
            }
        }
        match errors.is_empty() {
            true => Ok(reports.remove(0)),
            false => {
                assert!(reports.is_empty(), "all or none: {errors:?}");
                Err(errors)
            }
        }
    }

    /// Finalizes all ranks. Returns how many have ended what the transport does for them.
    pub(crate) fn finalize(self) -> usize {
        let Self { trainers, rollouts, market, .. } = self;
        futures::executor::block_on(async {
            for trainer in trainers {
                Box::new(trainer).finalize().await.unwrap();
            }
            for rollout in rollouts {
                rollout.finalize().await.unwrap();
            }
        });
        market.0.closed.load(Ordering::Relaxed)
    }

    /// Compares every element of every box, and every scale.
    pub(crate) fn check(&self, version: u64) {
        for (rollout, wants) in self.rollouts.iter().zip(&self.wants) {
            let mut expected = wants.iter().map(|wanted| self.model.expected(wanted, version));
            let read = rollout.read(|tensor| {
                let expected = expected.next().expect("one that is wanted");
                assert!(tensor.bytes()? == expected[0], "{:?}", tensor.wanted);
                let scales = expected.get(1).map_or(&[][..], |scales| &scales[..]);
                assert!(*tensor.scales()? == *scales, "scales of {:?}", tensor.wanted);
                Ok(())
            });
            assert_eq!(read.unwrap(), Version(version));
            assert!(expected.next().is_none());
        }
    }
}
