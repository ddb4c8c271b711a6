//! The work on bytes. A trainer finds the maxima of blocks that it shares with others, and encodes tiles into the memory
//! of rollouts. A rollout digests what is there.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use engine_core::memory::Pool;
use engine_core::{DType, Error, ErrorKind, Rank, Result, TensorBox, TensorMeta, Weight, digest};
use quant_fp8::{
    BlockMaxima, BoxSource, Codec, Fp8Format, QuantError, SourceType, Store, StridedPart,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::arriving::{Arriving, Came, FIRST, Waits};
use crate::declared::{Piece, Table};
use crate::memory::{Encoded, Encoder, Lender, Reached};
use crate::message::Batch;
use crate::pieces::{Place, Runs, Sum, cut_of, quantized, row_of};

/// The progress of work on other threads, and the order to stop it.
#[derive(Clone, Debug)]
pub(crate) struct Going {
    shared: Arc<(AtomicBool, AtomicU64)>,
    wrote: UnboundedSender<(Rank, Batch)>,
}

impl Going {
    /// Also returns what the work has written so far, as it comes.
    pub(crate) fn new() -> (Self, UnboundedReceiver<(Rank, Batch)>) {
        let (wrote, coming) = unbounded_channel();
        (Self { shared: Arc::default(), wrote }, coming)
    }

    /// Orders the work to stop.
    pub(crate) fn stop(&self) {
        self.shared.0.store(true, Ordering::Relaxed);
    }

    /// The number of steps so far.
    pub(crate) fn steps(&self) -> u64 {
        self.shared.1.load(Ordering::Relaxed)
    }

    /// Says what was written to a rollout.
    fn wrote(&self, to: Rank, batch: Batch) {
        // Nobody listens if the call was given up.
        drop(self.wrote.send((to, batch)));
    }

    /// Counts a step of the work.
    ///
    /// # Errors
    ///
    /// `Aborted` if the work has to stop.
    pub(crate) fn step(&self) -> Result<()> {
        self.shared.1.fetch_add(1, Ordering::Relaxed);
        self.check()
    }

    /// # Errors
    ///
    /// `Aborted` if the work has to stop.
    pub(crate) fn check(&self) -> Result<()> {
        match self.shared.0.load(Ordering::Relaxed) {
            false => Ok(()),
            true => Err(Error::new(ErrorKind::Aborted, "writing tensors", "it was stopped")),
        }
    }
}

/// A trainer's weights in an update, and the known maxima of their blocks.
#[derive(Debug)]
pub(crate) struct Sources {
    /// Those that have come.
    weights: Vec<Weight>,
    arriving: Arc<Arriving>,
    /// Whether the rank has entered with the boxes of its last update, before the stream has ended.
    pub(crate) guessed: bool,
    /// The maxima of the blocks of each weight of which some blocks are cut.
    maxima: BTreeMap<usize, BlockMaxima>,
}

/// Maxima for other trainers.
pub(crate) type Told = Vec<(Rank, Vec<u32>)>;

/// What became of a trainer's writes.
#[derive(Debug)]
pub(crate) enum Sending {
    /// Everything. How many weights on a device the CPU has encoded.
    Sent { through_host: u64 },
    /// Its stream has other boxes than it said.
    Differs {
        /// Whether it has written.
        wrote: bool,
    },
}

fn source_type(dtype: DType) -> Option<SourceType> {
    match dtype {
        DType::BF16 => Some(SourceType::Bf16),
        DType::F16 => Some(SourceType::F16),
        DType::F32 => Some(SourceType::F32),
        _ => None,
    }
}

fn sides(meta: &TensorMeta) -> Vec<usize> {
    // This loses nothing: a shape that does not fit the platform was refused with its layout.
    meta.shape.iter().map(|&side| side as usize).collect()
}

/// Copies a region's elements out of a weight, row-major.
fn gather(weight: &Weight, region: &TensorBox, out: &mut Vec<u8>) -> Result<()> {
    let full = weight.full_meta();
    let size = full.dtype.bytes().unwrap_or(1);
    out.resize((region.elements() * size) as usize, 0);
    let runs = Runs::new(region, &weight.region(), &full.shape);
    let len = (runs.len * size) as usize;
    for (start, to) in runs.starts().zip(out.chunks_mut(len.max(1))) {
        let at = start * size;
        weight.encode(at..at + len as u64, to)?;
    }
    Ok(())
}

impl Sources {
    pub(crate) fn new(arriving: Arc<Arriving>) -> Self {
        Self { weights: Vec::new(), arriving, guessed: false, maxima: BTreeMap::new() }
    }

    /// Whether the stream begins as that of the last update, and is worth beginning with before it has ended. Blocks.
    ///
    /// # Errors
    ///
    /// As [`all`](Self::all).
    pub(crate) fn begins(&mut self, going: &Going) -> Result<bool> {
        if self.arriving.expects() <= FIRST {
            return Ok(false);
        }
        let came = self.arriving.take(Some(FIRST), &mut self.weights, Waits::Before, going)?;
        Ok(came == Came::All)
    }

    /// All weights, once the stream has ended; whether they are the boxes of the last update. Blocks.
    ///
    /// # Errors
    ///
    /// Those of the stream; `Aborted` if the work was stopped.
    pub(crate) fn all(&mut self, waits: Waits, going: &Going) -> Result<(&[Weight], Came)> {
        let came = self.arriving.take(None, &mut self.weights, waits, going)?;
        Ok((&self.weights, came))
    }

    /// The weights that have come.
    pub(crate) fn weights(&self) -> &[Weight] {
        &self.weights
    }

    /// Finds the maxima of blocks that are cut by the boxes of this rank or by its pieces, for which all weights have to be there. Returns the
    /// maxima that other trainers need, in the order of the exchanges, which is the same at both ends; `None` if the stream has other boxes
    /// than this rank said.
    ///
    /// # Errors
    ///
    /// Those of the weights; `Aborted` if the work was stopped.
    pub(crate) fn find_maxima(
        &mut self,
        rank: Rank,
        table: &Table,
        encoder: Option<&dyn Encoder>,
        pool: &Pool,
        going: &Going,
    ) -> Result<Option<Told>> {
        let exchanged = table.exchanges.iter().map(|exchange| exchange.tensor);
        let cut = table.pieces.iter().filter(|piece| piece.cuts_blocks).map(|piece| piece.tensor);
        let tensors: BTreeSet<u32> = exchanged.chain(cut).collect();
        let tensors = tensors.iter().filter_map(|tensor| table.formats.get(tensor));
        let formats: HashMap<&str, Fp8Format> =
            tensors.map(|(meta, format)| (&*meta.name, *format)).collect();
        let mut needed: BTreeMap<usize, Fp8Format> = BTreeMap::new();
        self.maxima.clear();
        if !formats.is_empty() {
            if self.all(Waits::Planning, going)?.1 == Came::Others && self.guessed {
                return Ok(None);
            }
            let all = self.weights.iter().enumerate();
            needed.extend(all.filter_map(|(at, weight)| Some((at, *formats.get(weight.name())?))));
        }
        let weights = &self.weights;
        let takes = |at: usize, format: &Fp8Format| {
            encoder.filter(|encoder| encoder.takes(&weights[at], Some(format)))
        };
        let (there, here): (Vec<_>, Vec<_>) =
            needed.into_iter().partition(|(at, format)| takes(*at, format).is_some());
        let found = pool.map(here, |(at, format)| {
            going.step()?;
            Ok((at, box_maxima(&weights[at], &format)?))
        });
        self.maxima = found.into_iter().collect::<Result<_>>()?;
        if let Some(encoder) = encoder.filter(|_| !there.is_empty()) {
            self.maxima.extend(device_maxima(weights, &there, encoder)?);
        }
        // First merge the maxima of this rank's own boxes of the same tensor.
        let own: Vec<usize> = self.maxima.keys().copied().collect();
        for (place, &one) in own.iter().enumerate() {
            for &other in &own[place + 1..] {
                if self.weights[one].name() != self.weights[other].name() {
                    continue;
                }
                let (Some(a), Some(b)) = (self.maxima.get(&one), self.maxima.get(&other)) else {
                    continue;
                };
                if let Some(common) = a.blocks().intersection(b.blocks()) {
                    let (of_a, of_b) = (a.of(&common)?, b.of(&common)?);
                    self.merge(other, &common, &of_a)?;
                    self.merge(one, &common, &of_b)?;
                }
            }
        }
        let mut told: BTreeMap<Rank, Vec<u32>> = BTreeMap::new();
        for exchange in table.exchanges.iter().filter(|exchange| exchange.from == rank) {
            let values = self.of_tensor(table, exchange.tensor, &exchange.blocks)?;
            told.entry(exchange.to).or_default().extend(values);
        }
        Ok(Some(told.into_iter().collect()))
    }

    /// The weights of a tensor whose maxima were found.
    fn boxes_of(&self, table: &Table, tensor: u32) -> Vec<usize> {
        let Some((meta, _)) = table.formats.get(&tensor) else { return Vec::new() };
        let is_of = |at: &&usize| self.weights[**at].name() == &*meta.name;
        self.maxima.keys().filter(is_of).copied().collect()
    }

    /// This rank's maxima of blocks. Zero for a block that it has no part of.
    fn of_tensor(&self, table: &Table, tensor: u32, blocks: &TensorBox) -> Result<Vec<u32>> {
        let mut all = BlockMaxima::zero(blocks)?;
        for at in self.boxes_of(table, tensor) {
            let own = &self.maxima[&at];
            if let Some(common) = own.blocks().intersection(blocks) {
                all.merge(&common, &own.of(&common)?)?;
            }
        }
        Ok(all.of(blocks)?)
    }

    fn merge(&mut self, at: usize, blocks: &TensorBox, values: &[u32]) -> Result<()> {
        match self.maxima.get_mut(&at) {
            Some(own) => Ok(own.merge(blocks, values)?),
            None => Ok(()),
        }
    }

    /// Takes in the maxima of other trainers.
    ///
    /// # Errors
    ///
    /// `Protocol`, which names the rank, if they are not those of the plan.
    pub(crate) fn hear_maxima(
        &mut self,
        rank: Rank,
        table: &Table,
        heard: &[(Rank, Vec<u32>)],
    ) -> Result<()> {
        let wrong = |from: Rank| {
            let message = "maxima that are not those of the plan";
            Error::new(ErrorKind::Protocol, "taking maxima", message).rank(from)
        };
        let mut rest: BTreeMap<Rank, &[u32]> = BTreeMap::new();
        for (from, values) in heard {
            if rest.insert(*from, values).is_some() {
                return Err(wrong(*from));
            }
        }
        for exchange in table.exchanges.iter().filter(|exchange| exchange.to == rank) {
            let from = exchange.from;
            let values = rest.get_mut(&from).ok_or_else(|| wrong(from))?;
            let count = usize::try_from(exchange.blocks.elements()).unwrap_or(usize::MAX);
            let (own, left) = values.split_at_checked(count).ok_or_else(|| wrong(from))?;
            *values = left;
            let all = BlockMaxima::from_values(&exchange.blocks, own)?;
            for at in self.boxes_of(table, exchange.tensor) {
                let common = self.maxima[&at].blocks().intersection(&exchange.blocks);
                if let Some(common) = common {
                    self.merge(at, &common, &all.of(&common)?)?;
                }
            }
        }
        match rest.into_iter().find(|(_, values)| !values.is_empty()) {
            Some((from, _)) => Err(wrong(from)),
            None => Ok(()),
        }
    }

    /// Writes all pieces, batch by batch, each as soon as its weights have come. With digests, says of each batch that it is written.
    ///
    /// # Errors
    ///
    /// Those of the weights, which name the tensor; `Aborted` if the work was stopped; `Protocol` if a rollout of the plan
    /// lends nothing. After an error some of the pieces may have been written.
    pub(crate) fn write(
        &mut self,
        table: &Table,
        reached: &HashMap<Rank, Arc<dyn Reached>>,
        encoder: Option<&dyn Encoder>,
        digests: bool,
        pool: &Pool,
        going: &Going,
    ) -> Result<Sending> {
        let mut sums = vec![0; table.pieces.len()];
        let mut through_host = BTreeSet::new();
        let mut wrote = false;
        for batch in &table.batches {
            // The pieces of a batch are in the order in which their weights come.
            let needed = batch.last().map_or(0, |&last| table.pieces[last].held + 1);
            let came =
                self.arriving.take(Some(needed), &mut self.weights, Waits::Writing, going)?;
            if came == Came::Others && self.guessed {
                return Ok(Sending::Differs { wrote });
            }
            wrote = true;
            let host =
                self.write_batch(table, batch, reached, encoder, digests, pool, going, &mut sums)?;
            through_host.extend(host);
            if digests {
                tell(table, batch, &sums, going);
            }
        }
        if self.all(Waits::Writing, going)?.1 == Came::Others && self.guessed {
            return Ok(Sending::Differs { wrote });
        }
        Ok(Sending::Sent { through_host: through_host.len() as u64 })
    }

    /// Writes pieces whose weights are there, and adds their digest sums to `sums`. Returns the weights on a device that the CPU has encoded.
    #[expect(clippy::too_many_arguments, reason = "those of `write`, and a batch")]
    fn write_batch(
        &self,
        table: &Table,
        batch: &[usize],
        reached: &HashMap<Rank, Arc<dyn Reached>>,
        encoder: Option<&dyn Encoder>,
        digests: bool,
        pool: &Pool,
        going: &Going,
        sums: &mut [u64],
    ) -> Result<Vec<usize>> {
        let to = |piece: &Piece| {
            reached.get(&piece.peer).ok_or_else(|| {
                let message = "the plan has a rollout that lends nothing";
                Error::new(ErrorKind::Protocol, "writing tensors", message).rank(piece.peer)
            })
        };
        let (mut there, mut here, mut encoded) = (Vec::new(), Vec::new(), Vec::new());
        let all: Vec<(usize, &Piece)> =
            batch.iter().map(|&number| (number, &table.pieces[number])).collect();
        for pieces in all.chunk_by(|(_, one), (_, next)| one.peer == next.peer) {
            let memory = &**to(pieces[0].1)?;
            for &(number, piece) in pieces {
                let (weight, lent) = (&self.weights[piece.held], &piece.lent);
                let (places, format) = ([lent.at, lent.scales_at], lent.wanted.format.as_ref());
                let places = if format.is_some() { &places[..] } else { &places[..1] };
                let takes = |encoder: &dyn Encoder| {
                    encoder.writes_to(memory, places) && encoder.takes(weight, format)
                };
                if encoder.is_some_and(takes) {
                    there.push(number);
                    encoded.push(self.encoded(piece, memory)?);
                } else {
                    here.push(number);
                }
            }
        }
        if let Some(encoder) = encoder.filter(|_| !there.is_empty()) {
            let written = encoder.write(&encoded, &mut || going.step())?;
            if let Some((number, block)) = written.failed {
                return Err(non_finite(
                    there.get(number).map(|number| &table.pieces[*number]),
                    block,
                ));
            }
            there.iter().zip(written.sums).for_each(|(number, sum)| sums[*number] = sum);
        }
        let tiles = here.iter().flat_map(|&number| {
            let piece = &table.pieces[number];
            piece.tiles.iter().map(move |tile| (number, piece, tile))
        });
        let tiles: Vec<(usize, &Piece, &TensorBox)> = tiles.collect();
        let write = |batch: &[(usize, &Piece, &TensorBox)]| {
            let mut scratch = Scratch::default();
            let each = batch.iter().map(|(number, piece, tile)| {
                going.step()?;
                let sum = self
                    .write_tile(piece, tile, &**to(piece)?, digests, &mut scratch)
                    .map_err(|error| error.tensor(&*piece.lent.wanted.meta.name))?;
                Ok((*number, sum))
            });
            each.collect::<Result<Vec<(usize, u64)>>>()
        };
        for found in pool.map(batches(&tiles), write) {
            found?
                .into_iter()
                .for_each(|(number, sum)| sums[number] = sum.wrapping_add(sums[number]));
        }
        let peers: BTreeSet<Rank> = here.iter().map(|&number| table.pieces[number].peer).collect();
        for memory in peers.iter().filter_map(|peer| reached.get(peer)) {
            memory.flush()?;
            going.step()?;
        }
        let through_host = here.iter().map(|&number| table.pieces[number].held);
        Ok(through_host.filter(|&held| self.weights[held].reads_device()).collect())
    }

    fn encoded<'a>(&'a self, piece: &'a Piece, to: &'a dyn Reached) -> Result<Encoded<'a>> {
        let weight = &self.weights[piece.held];
        let is_quantized = piece.lent.wanted.format.is_some();
        let known = match self.maxima.get(&piece.held).filter(|_| is_quantized) {
            Some(known) => Some(known.of(&piece.region.in_granules(&piece.granule))?),
            None => None,
        };
        let ty = source_type(weight.meta().dtype).filter(|_| is_quantized);
        Ok(Encoded { weight, ty, parts: &piece.parts, to, known })
    }

    fn write_tile(
        &self,
        piece: &Piece,
        tile: &TensorBox,
        to: &dyn Reached,
        digests: bool,
        scratch: &mut Scratch,
    ) -> Result<u64> {
        let lent = &piece.lent;
        let weight = &self.weights[piece.held];
        let meta = &lent.wanted.meta;
        let Some(format) = &lent.wanted.format else {
            return copy_tile(weight, piece, tile, to, digests, scratch);
        };
        let full = weight.full_meta();
        let ty = of_blocks(&full)?;
        let from = Runs::new(tile, &weight.region(), &full.shape);
        let bytes = match (weight.contiguous_bytes(), from.count()) {
            (Some(bytes), 1) => {
                let at = from.starts().next().unwrap_or(0) as usize * ty.size();
                &bytes[at..at + tile.elements() as usize * ty.size()]
            }
            _ => {
                gather(weight, tile, &mut scratch.source)?;
                &scratch.source[..]
            }
        };
        let codec = Codec::best();
        let source = BoxSource::new(bytes, ty, &sides(meta), tile)?;
        let maxima = match self.maxima.get(&piece.held) {
            Some(known) => known.part(&tile.in_granules(&piece.granule))?,
            None => codec.box_maxima(&source, format)?,
        };
        scratch.codes.resize(tile.elements() as usize, 0);
        scratch.scales.resize(maxima.blocks().elements() as usize, 0.0);
        let (codes, scales) = (&mut scratch.codes[..], &mut scratch.scales[..]);
        codec.quantize_box(&source, format, &maxima, codes, scales, Store::Cached)?;
        let mut sum = Sum::default();
        let runs = Runs::new(tile, &lent.wanted.region, &meta.shape);
        let (row, cut) = (row_of(tile, 1), cut_of(tile, &piece.granule, 1));
        for (start, run) in runs.starts().zip(codes.chunks(runs.len.max(1) as usize)) {
            to.put(lent.at + start, run)?;
            if digests {
                sum.add(lent.at + start, run, row, cut);
            }
        }
        let all_scales = lent.wanted.region.in_granules(&piece.granule);
        for (own, at) in scale_runs(piece, tile, maxima.blocks(), &all_scales) {
            scratch.bytes.clear();
            scratch.bytes.extend(scales[own].iter().flat_map(|scale| scale.to_le_bytes()));
            to.put(lent.scales_at + at * 4, &scratch.bytes)?;
            if digests {
                sum.add_scales(lent.scales_at + at * 4, &scratch.bytes);
            }
        }
        Ok(sum.value())
    }
}

/// The error of a block that cannot be quantised to finite values.
fn non_finite(piece: Option<&Piece>, [matrix, row, col]: [u64; 3]) -> Error {
    let blocks = piece.and_then(|piece| piece.parts.first()?.blocks.as_ref());
    let first = blocks.map_or([0; 3], |blocks| blocks.block);
    QuantError::NonFinite {
        tensor: piece.map(|piece| piece.lent.wanted.meta.name.to_string()),
        expert: (first[0] + matrix) as usize,
        block_row: (first[1] + row) as usize,
        block_col: (first[2] + col) as usize,
    }
    .into()
}

/// The maxima of weights, found on their device.
fn device_maxima(
    weights: &[Weight],
    needed: &[(usize, Fp8Format)],
    encoder: &dyn Encoder,
) -> Result<Vec<(usize, BlockMaxima)>> {
    let mut all = Vec::with_capacity(needed.len());
    for (at, format) in needed {
        let (weight, region) = (&weights[*at], weights[*at].region());
        let full = weight.full_meta();
        let ty = of_blocks(&full)?;
        let grid = format.granularity.grid(&sides(&full))?;
        let granule = grid.block().map(|side| side as u64);
        let place = Place { at: 0, around: &region, element: ty.size() as u64 };
        let part = quantized(&region, place, place, 0, &granule, *format);
        all.push((*at, weight, ty, part, region.in_granules(&granule)));
    }
    let parts: Vec<(&Weight, SourceType, &StridedPart)> =
        all.iter().map(|(_, weight, ty, part, _)| (*weight, *ty, part)).collect();
    let found = encoder.maxima(&parts)?;
    let named = all.iter().zip(&found);
    named
        .map(|((at, _, _, _, blocks), values)| Ok((*at, BlockMaxima::from_values(blocks, values)?)))
        .collect()
}

fn of_blocks(full: &TensorMeta) -> Result<SourceType> {
    source_type(full.dtype).ok_or_else(|| {
        let message = format!("{} has no FP8 form here", full.dtype);
        Error::new(ErrorKind::Weight, "quantising", message).tensor(&*full.name)
    })
}

/// Buffers that a thread reuses from tile to tile.
#[derive(Default)]
struct Scratch {
    source: Vec<u8>,
    codes: Vec<u8>,
    scales: Vec<f32>,
    bytes: Vec<u8>,
}

fn box_maxima(weight: &Weight, format: &Fp8Format) -> Result<BlockMaxima> {
    let full = weight.full_meta();
    let ty = of_blocks(&full)?;
    let bytes = weight.to_bytes()?;
    let source = BoxSource::new(&bytes, ty, &sides(&full), &weight.region())?;
    Ok(Codec::best().box_maxima(&source, format)?)
}

fn copy_tile(
    weight: &Weight,
    piece: &Piece,
    tile: &TensorBox,
    to: &dyn Reached,
    digests: bool,
    scratch: &mut Scratch,
) -> Result<u64> {
    let (full, lent) = (weight.full_meta(), &piece.lent);
    let size = full.dtype.bytes().unwrap_or(1);
    let from = Runs::new(tile, &weight.region(), &full.shape);
    let runs = Runs::new(tile, &lent.wanted.region, &full.shape);
    let len = runs.len * size;
    let mut sum = Sum::default();
    let (row, cut) = (row_of(tile, size), cut_of(tile, &piece.granule, size));
    for (start, at) in from.starts().zip(runs.starts()) {
        let start = start * size;
        let run = match weight.contiguous_bytes() {
            Some(bytes) => &bytes[start as usize..(start + len) as usize],
            None => {
                scratch.bytes.resize(len as usize, 0);
                weight.encode(start..start + len, &mut scratch.bytes)?;
                &scratch.bytes[..]
            }
        };
        to.put(lent.at + at * size, run)?;
        if digests {
            sum.add(lent.at + at * size, run, row, cut);
        }
    }
    Ok(sum.value())
}

/// The scales of a tile that are written with its piece, in runs. For each run: its range among the scales of the tile's
/// blocks, and its start among the scales that the rollout lends.
fn scale_runs(
    piece: &Piece,
    tile: &TensorBox,
    of_tile: &TensorBox,
    lent: &TensorBox,
) -> Vec<(std::ops::Range<usize>, u64)> {
    let blocks = tile.in_granules(&piece.granule);
    let Some(own) = piece.scales.as_ref().and_then(|scales| scales.intersection(&blocks)) else {
        return Vec::new();
    };
    // The shape is larger than the box in every dimension, so no dimension counts as complete: runs are rows in both.
    let shape: Vec<u64> = own.ranges().iter().map(|range| range.end.saturating_add(1)).collect();
    let (here, there) = (Runs::new(&own, of_tile, &shape), Runs::new(&own, lent, &shape));
    let starts = here.starts().zip(there.starts());
    starts.map(|(at, to)| (at as usize..(at + here.len) as usize, to)).collect()
}

/// Tells the rollouts of a batch what was written there.
fn tell(table: &Table, batch: &[usize], sums: &[u64], going: &Going) {
    let until = batch.last().map_or(0, |&last| table.pieces[last].held as u64 + 1);
    let mut digests: BTreeMap<Rank, Vec<u64>> = BTreeMap::new();
    for &number in batch {
        let piece = &table.pieces[number];
        let digest = digest::finish(sums[number], piece.bytes);
        digests.entry(piece.peer).or_default().push(digest);
    }
    for (to, digests) in digests {
        going.wrote(to, Batch { until, digests });
    }
}

/// What a rollout has compared with what trainers say in an update.
#[derive(Debug)]
pub(crate) struct Compared {
    /// For each trainer, how many of its pieces it has said to be written.
    said: BTreeMap<Rank, usize>,
    /// The digest of each piece that was said to be written.
    digests: Vec<u64>,
    /// Those that could not be compared while trainers wrote elsewhere.
    left: Vec<usize>,
}

impl Compared {
    /// Nothing of a table yet.
    pub(crate) fn new(table: &Table) -> Self {
        Self { said: BTreeMap::new(), digests: vec![0; table.pieces.len()], left: Vec::new() }
    }

    /// Digests the pieces of a batch in the rollout's memory, and compares the digests with those of the trainer that has written them. If
    /// that has to wait until no trainer writes any more, [`end`](Self::end) does it.
    ///
    /// # Errors
    ///
    /// `Digest`, which names the tensor and the trainer; `Protocol` if the batch is none of the plan; `Aborted` if the work was stopped.
    pub(crate) fn batch(
        &mut self,
        table: &Table,
        memory: &dyn Lender,
        from: Rank,
        batch: &Batch,
        going: &Going,
    ) -> Result<()> {
        let all = table.of_trainers.get(&from).map_or(&[][..], Vec::as_slice);
        let said = self.said.entry(from).or_default();
        let rest = &all[*said..];
        let is_in = |&&number: &&usize| (table.pieces[number].held as u64) < batch.until;
        let pieces = &rest[..rest.iter().take_while(is_in).count()];
        if pieces.len() != batch.digests.len() {
            return Err(unsaid(from));
        }
        *said += pieces.len();
        for (&number, digest) in pieces.iter().zip(&batch.digests) {
            self.digests[number] = *digest;
        }
        let parts: Vec<&Arc<[StridedPart]>> =
            pieces.iter().map(|&number| &table.pieces[number].parts).collect();
        match memory.sums(&parts, &mut || going.step())? {
            Some(sums) => self.compare(table, pieces, &sums),
            None => {
                self.left.extend(pieces);
                Ok(())
            }
        }
    }

    fn compare(&self, table: &Table, pieces: &[usize], sums: &[u64]) -> Result<()> {
        for (&number, sum) in pieces.iter().zip(sums) {
            let piece = &table.pieces[number];
            if digest::finish(*sum, piece.bytes) != self.digests[number] {
                let message = format!("the box {} is not what was written", piece.region);
                let error = Error::new(ErrorKind::Digest, "verifying tensors", message);
                return Err(error.tensor(&*piece.lent.wanted.meta.name).rank(piece.peer));
            }
        }
        Ok(())
    }

    /// Compares what is left, when no trainer writes any more. Returns the digest of all pieces.
    ///
    /// # Errors
    ///
    /// As [`batch`](Self::batch), and `Protocol` if a trainer has not said of each piece that it is written.
    pub(crate) fn end(
        &self,
        table: &Table,
        memory: &dyn Lender,
        pool: &Pool,
        going: &Going,
    ) -> Result<u64> {
        for (from, all) in &table.of_trainers {
            if self.said.get(from).copied().unwrap_or(0) != all.len() {
                return Err(unsaid(*from));
            }
        }
        let sums = host_sums(table, &self.left, memory, pool, going)?;
        self.compare(table, &self.left, &sums)?;
        Ok(self.digests.iter().fold(0, |whole, digest| digest::chain(whole, *digest)))
    }
}

fn unsaid(from: Rank) -> Error {
    let message = "what it says that it wrote is not what it has to write";
    Error::new(ErrorKind::Protocol, "verifying tensors", message).rank(from)
}

/// The digest sum of each of these pieces in host memory.
fn host_sums(
    table: &Table,
    pieces: &[usize],
    memory: &dyn Lender,
    pool: &Pool,
    going: &Going,
) -> Result<Vec<u64>> {
    let all = pieces.iter().map(|&number| &table.pieces[number]).enumerate();
    let tiles = all.flat_map(|(place, piece)| piece.tiles.iter().map(move |t| (place, piece, t)));
    let tiles: Vec<(usize, &Piece, &TensorBox)> = tiles.collect();
    let found = pool.map(batches(&tiles), |batch| {
        let digest = |(place, piece, tile): &(usize, &Piece, &TensorBox)| {
            going.step()?;
            Ok((*place, digest_tile(piece, tile, memory)?))
        };
        batch.iter().map(digest).collect::<Result<Vec<(usize, u64)>>>()
    });
    let mut sums = vec![0_u64; pieces.len()];
    for found in found {
        found?.into_iter().for_each(|(place, sum)| sums[place] = sum.wrapping_add(sums[place]));
    }
    Ok(sums)
}

fn digest_tile(piece: &Piece, tile: &TensorBox, memory: &dyn Lender) -> Result<u64> {
    let lent = &piece.lent;
    let wanted = &lent.wanted;
    let size = wanted.meta.dtype.bytes().unwrap_or(1);
    let mut sum = Sum::default();
    let (elements, scales) = lent.bytes(memory)?;
    let (elements, scales) = (elements.to_host()?, scales.to_host()?);
    // Planning has checked that the piece lies within the box that is lent.
    let within = |at: u64, len: u64| at as usize..(at + len) as usize;
    let (row, cut) = (row_of(tile, size), cut_of(tile, &piece.granule, size));
    let runs = Runs::new(tile, &wanted.region, &wanted.meta.shape);
    for start in runs.starts() {
        let run = &elements[within(start * size, runs.len * size)];
        sum.add(lent.at + start * size, run, row, cut);
    }
    if piece.scales.is_some() {
        let (blocks, all) =
            (tile.in_granules(&piece.granule), wanted.region.in_granules(&piece.granule));
        for (own, at) in scale_runs(piece, tile, &blocks, &all) {
            let run = &scales[within(at * 4, own.len() as u64 * 4)];
            sum.add_scales(lent.scales_at + at * 4, run);
        }
    }
    Ok(sum.value())
}

/// Batches of tiles. A single tile is often too little work for a thread: many are norms of a few kilobytes.
fn batches<'a, 'b>(
    tiles: &'a [(usize, &'b Piece, &'b TensorBox)],
) -> Vec<&'a [(usize, &'b Piece, &'b TensorBox)]> {
    const BATCH: u64 = 128 << 10;
    let mut batches = Vec::new();
    let (mut first, mut elements) = (0, 0);
    for (at, (_, _, tile)) in tiles.iter().enumerate() {
        elements += tile.elements();
        if elements >= BATCH {
            batches.push(&tiles[first..=at]);
            (first, elements) = (at + 1, 0);
        }
    }
    if first < tiles.len() {
        batches.push(&tiles[first..]);
    }
    batches
}
