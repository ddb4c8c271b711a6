//! What ranks declare when they enter an update, and the plan that follows from it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use engine_core::plan::ALIGNMENT;
use engine_core::{ArenaArc, DType, Error, ErrorKind, Rank, Result, Role, TensorBox, TensorMeta};
use protocol::decode;
use quant_fp8::{Fp8Format, Mode, StridedPart};
use reshard::{Declarations, Links, MaximaExchange, Planner};
use serde::{Deserialize, Serialize};

use crate::coordinator::{digest_of, set_of};
use crate::memory::{Lender, LentBytes};
use crate::message::{Declared, Digest};
use crate::pieces::{Place, copied, quantized, scales_of, tiles};

const PLANNING: &str = "planning a placed update";

/// A box that a rollout wants.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Wanted {
    /// The name and the full shape of the tensor, and the wanted type.
    pub meta: ArenaArc<TensorMeta>,
    /// The wanted part.
    pub region: TensorBox,
    /// The format, if the tensor is to be quantised. Then the type is FP8, and the scales of all blocks that the box
    /// touches come with it.
    pub format: Option<Fp8Format>,
}

impl Wanted {
    /// All of a tensor, in the type that the trainer holds.
    pub fn whole(meta: impl Into<ArenaArc<TensorMeta>>) -> Self {
        let meta = meta.into();
        let region = TensorBox::whole(&meta.shape);
        Self { meta, region, format: None }
    }

    /// Only this part of it.
    #[must_use]
    pub fn part(mut self, region: TensorBox) -> Self {
        self.region = region;
        self
    }

    /// Quantised to FP8 in this format.
    #[must_use]
    pub fn quantized(mut self, format: Fp8Format) -> Self {
        let meta = TensorMeta { dtype: DType::F8_E4M3, ..TensorMeta::clone(&self.meta) };
        self.meta = meta.into();
        self.format = Some(format);
        self
    }

    fn refuse(&self, kind: ErrorKind, message: impl Into<String>) -> Error {
        Error::new(kind, "checking what is wanted", message).tensor(&*self.meta.name)
    }

    /// The sides of the blocks; empty without a format.
    pub(crate) fn granule(&self) -> Result<Vec<u64>> {
        let Some(format) = &self.format else { return Ok(Vec::new()) };
        let sides = self.meta.shape.iter().map(|&side| usize::try_from(side));
        let shape = sides.collect::<Result<Vec<_>, _>>();
        let shape = shape.map_err(|_| self.refuse(ErrorKind::Weight, "a side is too large"))?;
        let grid = format.granularity.grid(&shape);
        let grid = grid.map_err(|error| Error::from(error.in_tensor(&self.meta.name)))?;
        let granule: Vec<u64> = grid.block().iter().map(|&side| side as u64).collect();
        let blocks = TensorBox::whole(&self.meta.shape).in_granules(&granule);
        let scales: Vec<u64> = grid.scale_shape().iter().map(|&side| side as u64).collect();
        if blocks != TensorBox::whole(&scales) {
            let message = format!(
                "scales {} are not placed, only those of blocks and rows",
                format.granularity
            );
            return Err(self.refuse(ErrorKind::Config, message));
        }
        Ok(granule)
    }

    /// The scales that come with it, if it is quantised: their name, type and full shape, and the part that comes.
    ///
    /// # Errors
    ///
    /// `Weight` and `Config`, which name the tensor, for a format that does not fit it or cannot be placed.
    pub fn scales(&self) -> Result<Option<(TensorMeta, TensorBox)>> {
        let Some(format) = &self.format else { return Ok(None) };
        let granule = self.granule()?;
        let all = TensorBox::whole(&self.meta.shape).in_granules(&granule);
        let shape: Vec<u64> = all.ranges().iter().map(|range| range.end).collect();
        let name = format.scale_name.of(&self.meta.name);
        Ok(Some((TensorMeta::new(name, DType::F32, shape), self.region.in_granules(&granule))))
    }

    /// Checks it, and returns the bytes of the box and of its scales.
    ///
    /// # Errors
    ///
    /// `Weight` and `Config`, which name the tensor, for a box outside of the tensor, and for what cannot be placed.
    pub fn validate(&self) -> Result<(u64, u64)> {
        self.meta.validate()?;
        if !self.region.fits(&self.meta.shape) {
            let (region, shape) = (&self.region, &self.meta.shape);
            let message = format!("the box {region} is not within the shape {shape:?}");
            return Err(self.refuse(ErrorKind::Weight, message));
        }
        let Some(size) = self.meta.dtype.bytes() else {
            let message = format!("{} elements share bytes: they are not placed", self.meta.dtype);
            return Err(self.refuse(ErrorKind::Weight, message));
        };
        let scales = match (&self.format, self.scales()?) {
            (Some(format), Some((_, blocks))) => {
                if self.meta.dtype != DType::F8_E4M3 {
                    let message = format!("{} is no type of an FP8 format", self.meta.dtype);
                    return Err(self.refuse(ErrorKind::Config, message));
                }
                if format.mode == Mode::TritonGpu {
                    let message =
                        "the mode triton-gpu exists on GPUs alone, and this is host memory";
                    return Err(self.refuse(ErrorKind::Config, message));
                }
                blocks.elements() * 4
            }
            _ => 0,
        };
        Ok((self.region.elements() * size, scales))
    }
}

/// A box that a rollout lends, and where it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Lent {
    pub(crate) wanted: Wanted,
    /// Where its elements begin in the rollout's memory, row-major.
    pub(crate) at: u64,
    /// Where its scales begin.
    pub(crate) scales_at: u64,
}

/// A box that a trainer holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Held {
    pub(crate) meta: ArenaArc<TensorMeta>,
    pub(crate) region: TensorBox,
}

/// What a rank holds or wants.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Declaration {
    Holds(Vec<Held>),
    Wants { tensors: Vec<Lent>, bytes: u64 },
}

/// Lays boxes out in memory, one behind the other. Returns also the bytes that they take.
pub(crate) fn lay_out(wanted: Vec<Wanted>) -> Result<(Vec<Lent>, u64)> {
    let mut end = 0_u64;
    let too_large =
        || Error::new(ErrorKind::Resource, "lending tensors", "they do not fit 64 bits");
    let mut place = |bytes: u64| {
        let at = end.checked_next_multiple_of(ALIGNMENT).ok_or_else(too_large)?;
        end = at.checked_add(bytes).ok_or_else(too_large)?;
        Ok::<_, Error>(at)
    };
    let lent = wanted.into_iter().map(|wanted| {
        let (bytes, scales) = wanted.validate()?;
        Ok(Lent { at: place(bytes)?, scales_at: place(scales)?, wanted })
    });
    let lent = lent.collect::<Result<Vec<_>>>()?;
    Ok((lent, end))
}

impl Lent {
    /// Its elements and its scales in the rollout's memory, while that is not lent.
    ///
    /// # Errors
    ///
    /// Those of the memory, with the name of the tensor.
    pub(crate) fn bytes<'a>(
        &self,
        memory: &'a dyn Lender,
    ) -> Result<(LentBytes<'a>, LentBytes<'a>)> {
        let (len, scales) = self.wanted.validate()?;
        let bytes =
            |at, len| memory.bytes(at, len).map_err(|error| error.tensor(&*self.wanted.meta.name));
        let elements = match len {
            0 => LentBytes::Host(&[]),
            _ => bytes(self.at, len)?,
        };
        let scales = match (scales, &elements) {
            (0, LentBytes::Host(_)) => LentBytes::Host(&[]),
            (0, LentBytes::Device(elements)) => LentBytes::Device(elements.slice(0..0)),
            _ => bytes(self.scales_at, scales)?,
        };
        Ok((elements, scales))
    }
}

/// Refuses tensors that lie outside of the memory or overlap in it, with an error of this kind.
pub(crate) fn check_places(tensors: &[Lent], bytes: u64, kind: ErrorKind) -> Result<()> {
    let mut places = Vec::with_capacity(tensors.len() * 2);
    for lent in tensors {
        let (len, scales) = lent.wanted.validate()?;
        for (at, len) in [(lent.at, len), (lent.scales_at, scales)] {
            if len > 0 {
                places.push((at, len, lent));
            }
        }
    }
    places.sort_by_key(|(at, _, _)| *at);
    let mut end = 0;
    for (at, len, lent) in places {
        let until = at.checked_add(len).filter(|until| *until <= bytes && at >= end);
        let message = "its memory overlaps that of another, or ends outside of what is lent";
        end = until.ok_or_else(|| lent.wanted.refuse(kind, message))?;
    }
    Ok(())
}

/// A transfer of the plan, in the form that both ends use.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    /// The tensor's number in the plan.
    pub(crate) tensor: u32,
    pub(crate) region: TensorBox,
    /// The rank at the other end.
    pub(crate) peer: Rank,
    /// The number of the trainer's box.
    pub(crate) held: usize,
    pub(crate) lent: Arc<Lent>,
    pub(crate) granule: Arc<[u64]>,
    /// The scales that come with it, if it is quantised.
    pub(crate) scales: Option<TensorBox>,
    pub(crate) tiles: Vec<TensorBox>,
    /// Whether it is quantised and has only a part of some block. The maximum of that block then depends on elements
    /// outside of the piece.
    pub(crate) cuts_blocks: bool,
    /// The whole piece in the form that a device uses.
    pub(crate) parts: Arc<[StridedPart]>,
    /// The bytes that are written.
    pub(crate) bytes: u64,
}

/// The work of a rank in an update, for a set of declarations.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) set: Digest,
    pub(crate) digest: Digest,
    /// In the order of the plan. Both ranks of a pair have their common pieces in the same order.
    pub(crate) pieces: Vec<Piece>,
    /// On a trainer, the numbers of the pieces in the order in which their weights come, in batches that are written one after the other.
    pub(crate) batches: Vec<Vec<usize>>,
    /// On a rollout, for each trainer the numbers of its pieces, in the order of its boxes, which is that of its batches.
    pub(crate) of_trainers: BTreeMap<Rank, Vec<usize>>,
    /// The bytes of all pieces.
    pub(crate) bytes: u64,
    /// The number of tensors of the plan, and how many of them are quantised.
    pub(crate) tensors: u64,
    pub(crate) quantized: u64,
    /// The bytes of weights that the pieces are made from.
    pub(crate) source_bytes: u64,
    /// Only those that this rank takes part in.
    pub(crate) exchanges: Vec<MaximaExchange>,
    /// On a trainer, the quantised tensors of the plan by their number, with their formats.
    pub(crate) formats: HashMap<u32, (TensorMeta, Fp8Format)>,
}

/// The plan of the present update.
///
/// # Errors
///
/// `Protocol` if there is none: the leader has asked for a later step.
pub(crate) fn planned(table: &Mutex<Option<Arc<Table>>>) -> Result<Arc<Table>> {
    // It is replaced by one assignment.
    table.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(no_plan)
}

pub(crate) fn no_plan() -> Error {
    Error::new(ErrorKind::Protocol, "updating", "there is no plan")
}

/// Divides the pieces of a trainer into batches of about the same bytes, in the order of its boxes. All pieces of a box are in one batch.
fn batches_of(pieces: &[Piece]) -> Vec<Vec<usize>> {
    /// With more of them, the work on one begins earlier, and a device waits for the host more often.
    const MOST: u64 = 8;
    const LEAST_BYTES: u64 = 64 << 20;
    let all: u64 = pieces.iter().map(|piece| piece.bytes).sum();
    let each = all.div_ceil(MOST).max(LEAST_BYTES);
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    order.sort_by_key(|&number| pieces[number].held);
    let (mut batches, mut batch, mut bytes) = (Vec::new(), Vec::new(), 0);
    for of_box in order.chunk_by(|&one, &next| pieces[one].held == pieces[next].held) {
        batch.extend(of_box);
        bytes += of_box.iter().map(|&number| pieces[number].bytes).sum::<u64>();
        if bytes >= each {
            batches.push(std::mem::take(&mut batch));
            bytes = 0;
        }
    }
    batches.extend((!batch.is_empty()).then_some(batch));
    batches
}

/// Values by rank and by the name of the tensor.
type OfRanks<T> = BTreeMap<Rank, HashMap<Arc<str>, Vec<T>>>;

/// Plans the work of a rank, from the declarations of all ranks.
///
/// # Errors
///
/// `Mismatch` and `Weight`, which name tensor and rank, for types, shapes or formats that contradict each other, for boxes
/// that overlap, and for wanted boxes that nobody holds. `Protocol` for declarations that do not have the digest `set`.
pub(crate) fn table(
    planner: &mut Planner,
    rank: Rank,
    set: Digest,
    declared: &[Declared],
) -> Result<Table> {
    let digests: Vec<Digest> = declared.iter().map(|one| digest_of(&one.body)).collect();
    let of = declared.iter().zip(&digests).map(|(one, digest)| (one.rank, one.role, digest));
    if set_of(of) != set {
        let message = "declarations of another digest than the trainer says";
        return Err(Error::new(ErrorKind::Protocol, PLANNING, message).rank(Rank::LEADER));
    }
    let (mut held, mut wanted) = (Declarations::new(), Declarations::new());
    let mut holds: OfRanks<(usize, Held)> = BTreeMap::new();
    let mut wants: OfRanks<Arc<Lent>> = BTreeMap::new();
    let mut types: HashMap<Arc<str>, (Rank, DType)> = HashMap::new();
    let mut formats: BTreeMap<Arc<str>, (Rank, Option<Fp8Format>)> = BTreeMap::new();
    let mut links = Links::new();
    for one in declared {
        // All ranks are on one host, so nothing is passed on.
        let body: Declaration = decode(&one.body).map_err(|error| error.rank(one.rank))?;
        match (one.role, body) {
            (Role::Trainer, Declaration::Holds(boxes)) => {
                let own = holds.entry(one.rank).or_default();
                for (number, part) in boxes.into_iter().enumerate() {
                    held.add(one.rank, &part.meta, &[], part.region.clone())?;
                    types.entry(part.meta.name.clone()).or_insert((one.rank, part.meta.dtype));
                    own.entry(part.meta.name.clone()).or_default().push((number, part));
                }
            }
            (Role::Rollout, Declaration::Wants { tensors, bytes }) => {
                check_places(&tensors, bytes, ErrorKind::Protocol)
                    .map_err(|error| error.rank(one.rank))?;
                let own = wants.entry(one.rank).or_default();
                for lent in tensors {
                    let Wanted { meta, region, format } = &lent.wanted;
                    let granule = lent.wanted.granule().map_err(|error| error.rank(one.rank))?;
                    wanted.add(one.rank, meta, &granule, region.clone())?;
                    let first = formats.entry(meta.name.clone()).or_insert((one.rank, *format));
                    if first.1 != *format {
                        let message =
                            format!("it is quantised in another way for rank {}", first.0);
                        let error = Error::new(ErrorKind::Mismatch, PLANNING, message);
                        return Err(error.tensor(&*meta.name).rank(one.rank));
                    }
                    own.entry(meta.name.clone()).or_default().push(lent.into());
                }
            }
            _ => {
                let message = "a declaration that is not that of its role";
                return Err(Error::new(ErrorKind::Protocol, PLANNING, message).rank(one.rank));
            }
        }
    }
    for (name, (rank, format)) in &formats {
        let Some((holder, from)) = types.get(name) else { continue };
        let to = wants[rank][name][0].wanted.meta.dtype;
        let fits = match format {
            None => *from == to,
            Some(_) => matches!(from, DType::BF16 | DType::F16 | DType::F32),
        };
        if !fits {
            let message =
                format!("it is wanted as {to}, and rank {holder} holds {from}: cast the stream");
            let error = Error::new(ErrorKind::Mismatch, PLANNING, message);
            return Err(error.tensor(&**name).rank(*rank));
        }
    }
    let last = declared.iter().map(|one| one.rank.0).max().unwrap_or(0);
    links.add_nodes(0..last.saturating_add(1), last.saturating_add(1), 1);
    let plan = planner.plan(&held.finish()?, &wanted.finish()?, &links)?;
    let is_trainer = holds.contains_key(&rank);
    let transfers = if is_trainer { plan.transfers_from(rank) } else { plan.transfers_to(rank) };
    let mut granules: HashMap<Arc<str>, Arc<[u64]>> = HashMap::new();
    let mut pieces = Vec::with_capacity(transfers.len());
    let mut source_bytes = 0;
    for transfer in transfers {
        let meta = plan.tensor(transfer.tensor);
        let lost = || {
            let message = "a transfer of the plan that this rank has no part in";
            Error::new(ErrorKind::Protocol, PLANNING, message).tensor(&*meta.name).rank(rank)
        };
        if transfer.passed_on {
            return Err(lost());
        }
        let lent = wants.get(&transfer.to).and_then(|own| own.get(&meta.name));
        let lent = lent
            .and_then(|own| own.iter().find(|lent| lent.wanted.region.contains(&transfer.region)));
        let lent = lent.ok_or_else(lost)?.clone();
        let own = holds.get(&transfer.from).and_then(|own| own.get(&meta.name));
        let own =
            own.and_then(|own| own.iter().find(|(_, held)| held.region.contains(&transfer.region)));
        let (held, from) = own.ok_or_else(lost)?;
        let granule = match granules.get(&meta.name) {
            Some(granule) => granule.clone(),
            None => {
                let granule: Arc<[u64]> = lent.wanted.granule()?.into();
                granules.insert(meta.name.clone(), granule.clone());
                granule
            }
        };
        let each = from.meta.dtype.bytes().unwrap_or(1);
        source_bytes += transfer.region.elements() * each;
        let scales = lent
            .wanted
            .format
            .is_some()
            .then(|| scales_of(&transfer.region, &lent.wanted.region, &granule));
        let written = lent.wanted.meta.dtype.bytes().unwrap_or(1);
        let source = Place { at: 0, around: &from.region, element: each };
        let target = Place { at: lent.at, around: &lent.wanted.region, element: written };
        let parts = match lent.wanted.format {
            None => copied(&transfer.region, source, target),
            Some(format) => {
                let at = lent.scales_at;
                vec![quantized(&transfer.region, source, target, at, &granule, format)]
            }
        };
        let whole = transfer.region.to_granules(&granule, &lent.wanted.meta.shape);
        pieces.push(Piece {
            cuts_blocks: lent.wanted.format.is_some() && whole != transfer.region,
            bytes: transfer.region.elements() * written
                + scales.as_ref().map_or(0, TensorBox::elements) * 4,
            parts: parts.into(),
            tensor: transfer.tensor,
            tiles: tiles(&transfer.region, &granule, each),
            peer: if is_trainer { transfer.to } else { transfer.from },
            region: transfer.region,
            held: *held,
            lent,
            granule,
            scales,
        });
    }
    let (mut exchanges, mut of_tensor) = (Vec::new(), HashMap::new());
    if is_trainer {
        for (number, meta) in (0..).zip(plan.tensors()) {
            let Some((_, Some(format))) = formats.get(&meta.name) else { continue };
            let found = plan.maxima(number);
            let own = found.into_iter().filter(|one| one.from == rank || one.to == rank);
            exchanges.extend(own);
            of_tensor.insert(number, (meta.clone(), *format));
        }
    }
    let digest = digest_of(&[plan.digest(), set].concat());
    let tensors = plan.tensors().len() as u64;
    let of_format = formats.values().filter(|(_, format)| format.is_some()).count() as u64;
    let formats = of_tensor;
    let batches = if is_trainer { batches_of(&pieces) } else { Vec::new() };
    let mut of_trainers: BTreeMap<Rank, Vec<usize>> = BTreeMap::new();
    if !is_trainer {
        for (number, piece) in pieces.iter().enumerate() {
            of_trainers.entry(piece.peer).or_default().push(number);
        }
        for own in of_trainers.values_mut() {
            own.sort_by_key(|&number| pieces[number].held);
        }
    }
    Ok(Table {
        batches,
        of_trainers,
        set,
        digest,
        bytes: pieces.iter().map(|piece| piece.bytes).sum(),
        pieces,
        tensors,
        quantized: of_format,
        source_bytes,
        exchanges,
        formats,
    })
}
