//! Cases of placed updates: the contents of a rollout's lent tensors after each, for every transport that supports them.
//!
//! A backend's tests provide a [`Lends`], and call every case.

pub mod processes;

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::task::Poll;

use control_plane::{ControlPlane, join_group};
use engine_core::{
    Backend, CheckpointEngineConfig, DType, EngineContext, Error, ErrorKind, Prepared, Rank,
    ReceiveReport, Result, Role, SendReport, Storage, TensorBox, TensorMeta, TrainerEngine,
    Version, Weight, ensure_async_iterator,
};
use futures::future::{join, join_all};
use placed::{PlacedRollout, TensorState, Wanted};
use quant_fp8::{Codec, Fp8Format, Source, SourceType, Store};

use crate::processes::{LIMIT, address, context, control, runtime};

/// The boxes that a trainer holds.
pub type Boxes = Vec<(TensorMeta, TensorBox)>;

/// A transport with placed updates.
#[derive(Clone, Debug)]
pub struct Lends {
    /// The backend, which prepares trainers.
    pub backend: &'static dyn Backend,
    /// The configuration of trainers, with the backend's option `placed`.
    pub config: CheckpointEngineConfig,
    /// Prepares a rollout.
    pub lend: fn(EngineContext, Vec<Wanted>) -> Result<Prepared<PlacedRollout>>,
    /// Moves a trainer's weight from host memory to where a trainer keeps it.
    pub put: fn(Weight) -> Result<Weight>,
}

impl Lends {
    /// The configuration of rollouts: they are prepared by `lend`, without the option.
    fn of_rollouts(&self) -> CheckpointEngineConfig {
        let mut config = self.config.clone();
        if let Some(options) = config.engine_kwargs.get_mut(&config.backend) {
            options.remove("placed");
        }
        config
    }
}

/// Memory of a program's own for the elements and for the scales of boxes. It is in two allocations, in which neither box nor scales are in
/// order or directly behind one another. `allocate` makes one of so many bytes, or of more.
///
/// # Errors
///
/// Those of [`Wanted::validate`].
pub fn own_memory(
    wanted: Vec<Wanted>,
    allocate: impl Fn(u64) -> Storage,
) -> Result<Vec<(Wanted, [Storage; 2])>> {
    let sizes: Vec<(u64, u64)> =
        wanted.iter().map(|wanted| wanted.validate()).collect::<Result<_>>()?;
    let all: u64 = sizes.iter().map(|(elements, scales)| elements + scales + 64).sum();
    let both = [allocate(all), allocate(all)];
    let mut ends = both.each_ref().map(Storage::len);
    let mut room = |number: usize, bytes: u64| {
        let end = &mut ends[number % 2];
        // As a view of another tensor may begin: at a whole element, and nothing more.
        *end = (*end - bytes) / 8 * 8 - 12;
        both[number % 2].slice(*end..*end + bytes)
    };
    let placed = wanted.into_iter().zip(sizes).enumerate().map(|(number, (wanted, sizes))| {
        let (elements, scales) = sizes;
        (wanted, [room(number, elements), room(number + 1, scales)])
    });
    Ok(placed.collect())
}

/// A tensor of made-up numbers, which differ in every version.
#[derive(Clone, Debug)]
pub struct Tensor {
    meta: TensorMeta,
    seed: u64,
    /// The index of its NaN, if it has one.
    pub nan_at: Option<u64>,
}

impl Tensor {
    /// A tensor of BF16 numbers that depend on a seed.
    pub fn new(meta: TensorMeta, seed: u64) -> Self {
        Self { meta, seed, nan_at: None }
    }

    /// All elements as BF16.
    fn bytes(&self, version: u64) -> Vec<u8> {
        let elements = self.meta.elements().expect("a small tensor");
        let number = |at: u64| {
            let mut x = (self.seed ^ (version << 40) ^ at).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            x ^= x >> 29;
            // Signs, and exponents from 2^-8 to 2^7, so that blocks have different maxima.
            let bits = (x & 0x807f) as u16 | (119 + (x >> 20 & 15) as u16) << 7;
            if self.nan_at == Some(at) { 0x7fff } else { bits }
        };
        (0..elements).flat_map(|at| number(at).to_le_bytes()).collect()
    }
}

/// Tensors by name.
#[derive(Clone, Debug, Default)]
pub struct Model(HashMap<Arc<str>, Tensor>);

/// Elements of a box, by copying each of them.
fn cut(bytes: &[u8], size: usize, shape: &[u64], region: &TensorBox) -> Vec<u8> {
    let mut all = Vec::new();
    let count = region.elements();
    for number in 0..count {
        let (mut rest, mut at, mut stride) = (number, 0, 1);
        for (range, side) in region.ranges().iter().zip(shape).rev() {
            let extent = range.end - range.start;
            at += (range.start + rest % extent) * stride;
            rest /= extent;
            stride *= side;
        }
        let at = at as usize * size;
        all.extend_from_slice(&bytes[at..at + size]);
    }
    all
}

impl Model {
    /// Adds a tensor.
    pub fn add(&mut self, tensor: Tensor) {
        self.0.insert(tensor.meta.name.clone(), tensor);
    }

    /// A box of a tensor, as a trainer has it; of zeros if the model has no such tensor.
    ///
    /// # Panics
    ///
    /// If the box is not within the tensor.
    pub fn weight(&self, meta: &TensorMeta, region: &TensorBox, version: u64) -> Weight {
        let extent: Vec<u64> =
            region.ranges().iter().map(|range| range.end - range.start).collect();
        let bytes = match self.0.get(&meta.name).filter(|tensor| tensor.meta == *meta) {
            Some(tensor) => cut(&tensor.bytes(version), 2, &meta.shape, region),
            None => {
                vec![0; (region.elements() * meta.dtype.bytes().expect("whole bytes")) as usize]
            }
        };
        let weight =
            Weight::new(meta.name.clone(), meta.dtype, extent, bytes).expect("a small tensor");
        weight.of_box(meta.shape.clone(), region.clone()).expect("a box of it")
    }

    /// What a rollout must have of a wanted box: elements, and scales.
    ///
    /// # Panics
    ///
    /// If the model has no such tensor, or not in that format.
    pub fn expected(&self, wanted: &Wanted, version: u64) -> Vec<Vec<u8>> {
        let tensor = &self.0[&wanted.meta.name];
        let (bytes, shape) = (tensor.bytes(version), &wanted.meta.shape);
        let Some(format) = &wanted.format else {
            return vec![cut(&bytes, 2, shape, &wanted.region)];
        };
        let sides: Vec<usize> = shape.iter().map(|&side| side as usize).collect();
        let grid = format.granularity.grid(&sides).expect("a matrix");
        let mut codes = vec![0; grid.elements()];
        let mut scales = vec![0.0; grid.scales()];
        let source = Source::new(&bytes, SourceType::Bf16, &sides).expect("a matrix");
        let all = 0..grid.elements();
        let codec = Codec::named("scalar").expect("always there");
        codec
            .quantize(&source, format, all, &mut codes, &mut scales, Store::Cached)
            .expect("finite numbers");
        let scales: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        let granule = grid.block().map(|side| side as u64);
        let blocks = TensorBox::whole(shape).in_granules(&granule);
        let blocks: Vec<u64> = blocks.ranges().iter().map(|range| range.end).collect();
        let of_box = wanted.region.in_granules(&granule);
        vec![cut(&codes, 1, shape, &wanted.region), cut(&scales, 4, &blocks, &of_box)]
    }
}

/// A group of tasks of this process.
struct Group<'a> {
    model: &'a Model,
    put: fn(Weight) -> Result<Weight>,
    wants: Vec<Vec<Wanted>>,
    trainers: Vec<Box<dyn TrainerEngine>>,
    rollouts: Vec<PlacedRollout>,
    /// The reports of the rollouts in the last update.
    received: Vec<ReceiveReport>,
    _planes: Vec<ControlPlane>,
}

impl<'a> Group<'a> {
    async fn form(lends: &Lends, model: &'a Model, trainers: u32, wants: &[Vec<Wanted>]) -> Self {
        let (at, ranks) = (address(), trainers + wants.len() as u32);
        let mut planes =
            vec![ControlPlane::lead(control(at.clone())).await.expect("a free address")];
        for rank in 1..ranks {
            let role = if rank < trainers { Role::Trainer } else { Role::Rollout };
            let joined = ControlPlane::join(control(at.clone()), role, Some(Rank(rank))).await;
            planes.push(joined.expect("the leader"));
        }
        let (lead, lent) = planes.split_at(trainers as usize);
        let engines = lead.iter().map(|plane| async {
            let prepared = lends.backend.prepare_trainer(context(plane, lends.config.clone()));
            let prepared = prepared.await.expect("a trainer");
            join_group(prepared, lends.backend, plane, Some(ranks), LIMIT).await.expect("a group").0
        });
        let tensors = lent.iter().zip(wants).map(|(plane, wants)| async {
            let context = context(plane, lends.of_rollouts());
            let prepared = (lends.lend)(context, wants.clone()).expect("memory");
            join_group(prepared, lends.backend, plane, Some(ranks), LIMIT).await.expect("a group").0
        });
        let (trainers, rollouts) = join(join_all(engines), join_all(tensors)).await;
        Self {
            model,
            put: lends.put,
            wants: wants.to_vec(),
            trainers,
            rollouts,
            received: Vec::new(),
            _planes: planes,
        }
    }

    /// Makes an update in which trainers hold these boxes. A trainer that gives up does so after a number of steps of its call.
    async fn update(
        &mut self,
        version: u64,
        holds: &[Boxes],
        gives_up: Option<(usize, u32)>,
    ) -> std::result::Result<SendReport, Vec<Error>> {
        let (model, put) = (self.model, self.put);
        let put = |weight: Weight| {
            let (full, region) = (weight.full_meta().shape.clone(), weight.region());
            put(weight).and_then(|weight| weight.of_box(full, region)).expect("memory")
        };
        let sends = self.trainers.iter_mut().zip(holds).enumerate().map(|(at, (engine, boxes))| {
            let weights: Vec<Weight> = boxes
                .iter()
                .map(|(meta, region)| put(model.weight(meta, region, version)))
                .collect();
            let sent = engine.send_weights(ensure_async_iterator(weights), Version(version));
            let given = gives_up.filter(|(who, _)| *who == at).map(|(_, after)| after);
            limited(sent, given)
        });
        let takes = self.rollouts.iter_mut().map(|rollout| limited(rollout.update(None), None));
        let (sent, taken) = join(join_all(sends), join_all(takes)).await;
        let mut errors: Vec<Error> = Vec::new();
        self.received.clear();
        for taken in taken {
            match taken {
                Ok(report) => self.received.push(report),
                Err(error) => errors.push(error),
            }
        }
        let mut reports = Vec::new();
        for sent in sent {
            match sent {
                Ok(report) => reports.push(report),
                Err(error) => errors.push(error),
            }
        }
        if errors.is_empty() { Ok(reports.remove(0)) } else { Err(errors) }
    }

    /// Compares every element and every scale of every box.
    fn check(&self, version: u64) {
        for (rollout, wants) in self.rollouts.iter().zip(&self.wants) {
            let mut expected = wants.iter().map(|wanted| self.model.expected(wanted, version));
            let read = rollout.read(|tensor| {
                let expected = expected.next().expect("a box that is wanted");
                assert!(tensor.bytes()? == expected[0], "{:?}", tensor.wanted);
                let scales = expected.get(1).map_or(&[][..], |scales| &scales[..]);
                assert!(*tensor.scales()? == *scales, "scales of {:?}", tensor.wanted);
                Ok(())
            });
            assert_eq!(read.expect("a version"), Version(version));
        }
    }
}

async fn limited<T>(call: impl Future<Output = Result<T>>, gives_up: Option<u32>) -> Result<T> {
    let given_up = || Error::new(ErrorKind::Aborted, "updating", "given up here");
    match gives_up {
        Some(mut steps) => {
            let mut call = std::pin::pin!(call);
            std::future::poll_fn(move |cx| {
                steps = steps.saturating_sub(1);
                match call.as_mut().poll(cx) {
                    Poll::Pending if steps == 0 => Poll::Ready(Err(given_up())),
                    polled => polled,
                }
            })
            .await
        }
        None => tokio::time::timeout(LIMIT, call).await.expect("no hang"),
    }
}

/// Tensors with rows on trainers and columns on rollouts: one is cut within blocks, one has experts, one is only cut between blocks, and
/// one is not quantised.
fn sharded() -> (Model, Vec<Boxes>, Vec<Vec<Wanted>>) {
    let part = |offset: &[u64], extent: &[u64]| TensorBox::new(offset, extent).expect("a box");
    let dense = TensorMeta::new("dense", DType::BF16, [300, 260]);
    let stack = TensorMeta::new("experts", DType::BF16, [3, 140, 96]);
    let even = TensorMeta::new("even", DType::BF16, [256, 1024]);
    let norm = TensorMeta::new("norm", DType::BF16, [1031]);
    let mut model = Model::default();
    for (seed, meta) in (3..).zip([&dense, &stack, &even, &norm]) {
        model.add(Tensor::new(meta.clone(), seed));
    }
    let half = |start| (even.clone(), part(&[start, 0], &[128, 1024]));
    let all = (norm.clone(), TensorBox::whole(&norm.shape));
    let rows = |start, n| (dense.clone(), part(&[start, 0], &[n, 260]));
    let experts = |first, n, start, rows| (stack.clone(), part(&[first, start, 0], &[n, rows, 96]));
    let holds = vec![
        vec![rows(0, 100), experts(0, 2, 0, 140), half(0), all.clone()],
        vec![rows(100, 200), half(128), all, experts(2, 1, 0, 140)],
    ];
    let format = Fp8Format::default();
    let cols = |start, n| Wanted::whole(dense.clone()).part(part(&[0, start], &[300, n]));
    let even = |start| Wanted::whole(even.clone()).part(part(&[0, start], &[256, 512]));
    let norms = |start, n| Wanted::whole(norm.clone()).part(part(&[start], &[n]));
    let wants = vec![
        vec![
            norms(0, 500),
            even(0).quantized(format),
            cols(0, 131).quantized(format),
            Wanted::whole(stack.clone()).part(part(&[0, 30, 0], &[3, 110, 96])).quantized(format),
        ],
        vec![
            norms(5, 1026),
            even(512).quantized(format),
            cols(131, 129).quantized(format),
            Wanted::whole(stack.clone()).part(part(&[1, 0, 50], &[1, 140, 46])).quantized(format),
        ],
    ];
    (model, holds, wants)
}

/// The contents of rollouts equal those of the unsharded tensors, quantised or not.
///
/// # Panics
///
/// If they differ.
pub fn every_box_is_bit_for_bit_that_of_the_unsharded_tensor(lends: &Lends) {
    runtime().block_on(async {
        let (model, holds, quantized) = sharded();
        let plain = quantized.iter().map(|wants| {
            wants
                .iter()
                .map(|one| Wanted {
                    format: None,
                    meta: TensorMeta { dtype: DType::BF16, ..TensorMeta::clone(&one.meta) }.into(),
                    ..one.clone()
                })
                .collect()
        });
        let plain: Vec<Vec<Wanted>> = plain.collect();
        for wants in [&quantized, &plain] {
            let mut group = Group::form(lends, &model, 2, wants).await;
            for version in 1..=3 {
                let report = group.update(version, &holds, None).await.expect("an update");
                assert_eq!(report.receivers.len(), 2);
                assert_eq!(report.plan_reused, version > 1);
                group.check(version);
            }
        }
    });
}

/// Makes an update of two trainers and two rollouts, whose ranks are 2 and 3. Returns what the reports of the leader and of the rollouts say that
/// made it slower than possible.
///
/// # Panics
///
/// If it fails.
pub fn what_made_an_update_slower(lends: &Lends) -> (Vec<String>, Vec<Vec<String>>) {
    runtime().block_on(async {
        let (model, holds, wants) = sharded();
        let mut group = Group::form(lends, &model, 2, &wants).await;
        let report = group.update(1, &holds, None).await.expect("an update");
        let received = group.received.drain(..).map(|report| report.slower);
        (report.slower, received.collect())
    })
}

/// A plan that does not fit is an error on every rank that names tensor and rank, and every rollout keeps its version.
///
/// # Panics
///
/// If it does not hold.
pub fn what_nobody_holds_is_named_and_leaves_the_version_that_is_there(lends: &Lends) {
    runtime().block_on(async {
        let (model, holds, wants) = sharded();
        let mut group = Group::form(lends, &model, 2, &wants).await;
        group.update(1, &holds, None).await.expect("an update");
        let mut hole = holds.clone();
        hole[1].truncate(3);
        let errors = group.update(2, &hole, None).await.expect_err("a hole");
        assert_eq!(errors.len(), 4, "{errors:?}");
        for error in &errors {
            assert_eq!(error.kind(), ErrorKind::Weight, "{error}");
            assert_eq!(error.report().tensor.as_deref(), Some("experts"), "{error}");
            assert!(error.report().rank.is_some_and(|rank| rank.0 >= 2), "{error}");
        }
        group.check(1);
        group.update(3, &holds, None).await.expect("an update");
        group.check(3);
    });
}

/// A trainer whose program gives an update up, at any time, ends it for all. Rollouts report whether they have a version, and the next
/// update makes them whole.
///
/// # Panics
///
/// If it does not.
pub fn a_call_that_is_given_up_ends_the_update_everywhere_and_the_next_one_works(lends: &Lends) {
    runtime().block_on(async {
        let (model, holds, wants) = sharded();
        let mut group = Group::form(lends, &model, 2, &wants).await;
        group.update(1, &holds, None).await.expect("an update");
        let (mut version, mut failed) = (1, 0);
        for steps in 1..=8 {
            for who in [0, 1] {
                version += 1;
                match group.update(version, &holds, Some((who, steps))).await {
                    Ok(_) => group.check(version),
                    Err(_) => {
                        failed += 1;
                        for rollout in &group.rollouts {
                            match rollout.state() {
                                TensorState::Active(_) => {}
                                TensorState::Updating { failed: Some(_), .. } => {
                                    assert!(rollout.read(|_| Ok(())).is_err());
                                }
                                state => panic!("{state:?}"),
                            }
                        }
                    }
                }
                version += 1;
                group.update(version, &holds, None).await.expect("the next update");
                group.check(version);
            }
        }
        assert!(failed > 0, "nothing was given up in time");
    });
}
