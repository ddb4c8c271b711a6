//! Collects the weights of buckets from a trainer's stream, and follows the plan of the last update as long as
//! it fits.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, StreamExt};

use super::within;
use engine_core::TensorCounts;
use engine_core::memory::Job;
use engine_core::plan::{BucketLayout, BucketPlanner, Piece, Place, Plan};
use engine_core::{Error, ErrorKind, Parts, Result, Weight, WeightStream};

/// The weights of one bucket, collected from the trainer's stream.
pub(super) struct Bucket {
    pub(super) jobs: Vec<Job>,
    pub(super) layout: Arc<BucketLayout>,
    /// The digest of the last plan, if that has the same layout for this bucket.
    pub(super) known: Option<u64>,
    pub(super) source_bytes: u64,
    /// The class of its weights, if parts travel apart; else 0.
    pub(super) class: u32,
}

/// Packs the stream into buckets, following the last update's plan as long as it fits.
pub(super) struct Collector {
    planner: BucketPlanner,
    last: Plan,
    last_digest: Option<u64>,
    buckets: usize,
    /// The weight that did not fit into the last bucket, and how many of its bytes are placed already.
    pending: Option<Pending>,
    /// All names so far. `None` while they are those of the last plan, which has no name twice.
    names: Option<HashSet<Arc<str>>>,
    differs: bool,
    parts: Parts,
    /// The class of each part, if parts travel apart.
    classes: Option<Vec<Option<u32>>>,
    /// The class of the last weight.
    class: Option<u32>,
    pub(super) counts: TensorCounts,
}

/// A weight, how many of its bytes are placed already, and its class.
type Pending = (Weight, u64, u32);

impl Collector {
    pub(super) fn new(last: &Plan, planner: BucketPlanner, parts: Parts) -> Self {
        let last = last.clone();
        let last_digest = (!last.buckets.is_empty()).then(|| last.digest());
        Self {
            planner,
            names: last_digest.is_none().then(HashSet::new),
            last,
            last_digest,
            buckets: 0,
            pending: None,
            differs: false,
            parts,
            classes: None,
            class: Some(0),
            counts: TensorCounts::default(),
        }
    }

    /// Keeps weights of each class in buckets of their own: the class of each part. A part without one is left out.
    pub(super) fn keep_apart(&mut self, classes: Vec<Option<u32>>) {
        self.classes = Some(classes);
    }

    /// The class of the next weight of the stream; `None` if nobody wants it.
    fn class_of(&mut self, weight: &Weight) -> Option<u32> {
        let classes = self.classes.as_deref()?;
        // Scales are made of the weight before them, and go wherever it goes.
        if !weight.is_deferred() {
            let part = weight.named_part().unwrap_or_else(|| self.parts.part_of(weight.name()));
            self.class = classes.get(part as usize).copied().flatten();
        }
        self.class
    }

    /// Whether all buckets were those of the last plan.
    pub(super) fn reused(&self, buckets: usize) -> bool {
        !self.differs && self.last_digest.is_some() && self.last.buckets.len() == buckets
    }

    /// The weights of the next bucket, or `None` at the end of the stream.
    pub(super) async fn next_bucket(
        &mut self,
        weights: &mut WeightStream<'_>,
        deadline: Duration,
    ) -> Result<Option<Bucket>> {
        let like_last = self.last.buckets.get(self.buckets).filter(|_| !self.differs);
        let mut jobs: Vec<Job> =
            Vec::with_capacity(like_last.map_or(0, |layout| layout.pieces().len()));
        let (mut source_bytes, mut bucket) = (0, 0);
        loop {
            let (weight, start, class) = match self.pending.take() {
                Some(pending) => pending,
                None => {
                    let operation = "waiting for the trainer's next weight";
                    // Only a weight that is not ready gets a timer: thousands of timers would take noticeable time.
                    let weight = match weights.next().now_or_never() {
                        Some(weight) => weight,
                        None => within(deadline, operation, weights.next())
                            .await
                            .map_err(|error| error.bucket(self.buckets as u64))?,
                    };
                    match weight.transpose()? {
                        Some(weight) => {
                            let class = match &self.classes {
                                None => 0,
                                Some(_) => match self.class_of(&weight) {
                                    Some(class) => class,
                                    None => continue,
                                },
                            };
                            self.admit(&weight, jobs.len())?;
                            self.counts.add(&weight);
                            (weight, 0, class)
                        }
                        None if jobs.is_empty() => return Ok(None),
                        None => break,
                    }
                }
            };
            if jobs.is_empty() {
                bucket = class;
            } else if class != bucket {
                self.pending = Some((weight, start, class));
                break;
            }
            let total = weight.byte_len();
            let name = weight.name().len();
            match self.planner.place(name, total, total - start, weight.granule()) {
                Some(Place { offset, len }) => {
                    source_bytes += share(weight.source_bytes(), len, total);
                    let end = start + len;
                    let rest = (end < total).then(|| (weight.clone(), end, class));
                    let ends = weight.ends_bucket();
                    let job = Job { weight, start, len, offset };
                    self.compare(&job, jobs.len());
                    jobs.push(job);
                    if rest.is_some() || ends {
                        self.pending = rest;
                        break;
                    }
                }
                None => {
                    self.pending = Some((weight, start, class));
                    break;
                }
            }
        }
        self.planner.close();
        let known = match self.last.buckets.get(self.buckets) {
            Some(layout) if !self.differs && layout.pieces().len() == jobs.len() => {
                Some(layout.clone())
            }
            _ => None,
        };
        if known.is_none() {
            // All later weights have another place than in the last plan.
            self.diverge(jobs.len());
            if let (Some(names), Some((weight, ..))) = (&mut self.names, &self.pending) {
                names.insert(weight.meta().name.clone());
            }
        }
        self.buckets += 1;
        let plan = known.is_some().then_some(self.last_digest).flatten();
        let layout = known.unwrap_or_else(|| {
            let pieces = jobs.iter().map(|job| Piece {
                meta: job.weight.meta().clone(),
                start: job.start,
                len: job.len,
                offset: job.offset,
            });
            Arc::new(BucketLayout::new(pieces.collect()))
        });
        Ok(Some(Bucket { jobs, layout, known: plan, source_bytes, class: bucket }))
    }

    /// Checks that a weight is whole and that its name is new.
    fn admit(&mut self, weight: &Weight, placed: usize) -> Result<()> {
        weight.require_whole("collecting a bucket")?;
        if self.names.is_none() {
            let expected = self.last.buckets.get(self.buckets).and_then(|bucket| {
                bucket.pieces().get(placed).or_else(|| {
                    self.last.buckets.get(self.buckets + 1).and_then(|next| next.pieces().first())
                })
            });
            if expected.is_some_and(|piece| piece.meta.has_name_of(weight.meta())) {
                return Ok(());
            }
            self.diverge(placed);
        }
        let Some(names) = &mut self.names else { return Ok(()) };
        if names.insert(weight.meta().name.clone()) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Weight,
            "reading the trainer's weights",
            "the stream has a weight of this name already",
        )
        .tensor(weight.name()))
    }

    fn compare(&mut self, job: &Job, placed: usize) {
        if self.differs {
            return;
        }
        let same = self
            .last
            .buckets
            .get(self.buckets)
            .and_then(|bucket| bucket.pieces().get(placed))
            .is_some_and(|piece| {
                (piece.start, piece.len, piece.offset) == (job.start, job.len, job.offset)
                    && piece.meta == *job.weight.meta()
            });
        if !same {
            self.diverge(placed);
            if let Some(names) = &mut self.names {
                names.insert(job.weight.meta().name.clone());
            }
        }
    }

    /// Leaves the last plan. From here on, every name is compared with all names before it.
    fn diverge(&mut self, placed: usize) {
        self.differs = true;
        if self.names.is_some() {
            return;
        }
        let before = self.last.buckets.iter().take(self.buckets);
        let mut names: HashSet<Arc<str>> =
            before.flat_map(|bucket| bucket.pieces()).map(|p| p.meta.name.clone()).collect();
        if let Some(bucket) = self.last.buckets.get(self.buckets) {
            names.extend(bucket.pieces().iter().take(placed).map(|p| p.meta.name.clone()));
        }
        self.names = Some(names);
    }
}

/// The part of a weight's source bytes that belongs to `len` of its `total` bytes.
fn share(source: u64, len: u64, total: u64) -> u64 {
    // Nearly every weight is in one piece, and a division of 128 bits is slow.
    if len == total {
        return source;
    }
    (u128::from(source) * u128::from(len) / u128::from(total)) as u64
}
