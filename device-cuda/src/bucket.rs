//! Filling buckets of a device with weights, wherever these are.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use engine_core::memory::{Job, Pool};
use engine_core::{Encoding, Error, Result, Weight};
use quant_fp8::{Fp8Codes, Fp8Format, Fp8Scales, Granularity, NonFinite, QuantError};

use crate::ledger::{Ledger, key};
use crate::turns::Turns;
use crate::{CudaError, CudaMemory, CudaSlice, Device, DeviceJob, Kernels, Launch, PinnedMemory};

/// Packs and quantises the weights of a bucket in one launch, and digests buckets. Clones are the same one.
///
/// Weights on the device are encoded where they are. All others (in host memory, of other devices, in
/// formats that the kernels do not know) are encoded by the CPU and copied, so that a stream may mix
/// them as it likes.
#[derive(Clone, Debug)]
pub struct Packer {
    device: Device,
    tools: Arc<Turns<Tools>>,
}

/// What a packer works with.
#[derive(Debug)]
struct Tools {
    kernels: Kernels,
    /// For weights that the CPU encodes; as large as a bucket, once there is one. It is away while the CPU is
    /// at work.
    staging: Option<PinnedMemory>,
    scratch: Scratch,
    /// Scales that were not written to their place at once.
    scales: Ledger<CudaSlice>,
    /// Weights of devices that the CPU had to encode, by their encoding, since somebody asked.
    over_the_host: BTreeMap<&'static str, u64>,
}

/// The work of one bucket, sorted by who does it.
#[derive(Debug, Default)]
struct Work<'a> {
    /// One launch for each format, and one for what is made aside; there hardly ever is a second.
    batches: Vec<Batch<'a>>,
    /// Copies of what the launches made elsewhere.
    late: Vec<DeviceJob>,
    /// Encoded by the CPU.
    host: Vec<&'a Job>,
    /// Copied by the driver: weights of other devices.
    peers: Vec<(CudaSlice, CudaSlice)>,
    /// What no launch adds to the digest while it writes it.
    unsummed: Vec<(u64, CudaSlice)>,
    /// The scales that the launches compute and that are not in their place.
    scales: Ledger<CudaSlice>,
    /// Codes whose scales have all been asked for.
    asked: Vec<usize>,
}

#[derive(Debug)]
struct Batch<'a> {
    format: Fp8Format,
    /// Whether the targets are not in the bucket.
    aside: bool,
    jobs: Vec<DeviceJob>,
    /// The weight of each job, and the first of its blocks, to name what is not finite.
    weights: Vec<(&'a Weight, usize)>,
}

impl Packer {
    /// A packer for a device.
    ///
    /// # Errors
    ///
    /// Those of [`Kernels::load`].
    pub fn new(device: &Device) -> Result<Self> {
        let tools = Tools {
            kernels: Kernels::load(device)?,
            staging: None,
            scratch: Scratch::default(),
            scales: Ledger::default(),
            over_the_host: BTreeMap::new(),
        };
        Ok(Self { device: device.clone(), tools: Arc::new(Turns::new(tools)) })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Encodes all jobs of a bucket and returns its digest sum if it is wanted, else 0. Blocks until the
    /// bytes are there; also when this is an error, the device reads none of the weights any more.
    ///
    /// # Contract
    ///
    /// As [`Pool::encode`], whose threads encode what this device cannot.
    ///
    /// # Errors
    ///
    /// The first error of a weight, naming it; what the driver reports.
    pub fn fill(
        &self,
        jobs: &[Job],
        bucket: &CudaSlice,
        pool: &Pool,
        digests: bool,
    ) -> Result<u64> {
        self.tools.in_steps(
            |tools| {
                let work = tools.sort(jobs, bucket, digests)?;
                let staging = match work.host.is_empty() {
                    true => None,
                    false => Some(tools.staging(bucket.len())?),
                };
                Ok((work, staging))
            },
            |(work, staging)| {
                let Some(staging) = staging else { return Ok(()) };
                let own: Vec<Job> = work.host.iter().map(|&job| job.clone()).collect();
                pool.encode(&own, staging.bytes()?, false).map(drop)
            },
            |tools, (work, staging), encoded| {
                let filled = encoded
                    .and_then(|()| tools.enqueue(&work, staging.as_ref(), bucket))
                    .and_then(|()| tools.launch(&work, bucket, digests));
                if filled.is_err()
                    && let Err(error) = tools.kernels.stream().synchronize()
                {
                    tracing::debug!(%error, "while the filling of a bucket was given up");
                }
                tools.staging = staging.or_else(|| tools.staging.take());
                let sum = filled?;
                tools.scales.extend(work.scales);
                for job in work.host.iter().filter(|job| job.start == 0) {
                    if let Some(encoding) = job.weight.encoding().filter(|it| it.reads_device()) {
                        *tools.over_the_host.entry(encoding.name()).or_default() += 1;
                    }
                }
                work.asked.into_iter().for_each(|codes| tools.scales.forget(codes));
                Ok(sum)
            },
        )
    }

    /// What was slower than it could be since the last call, in words for [`SendReport::slower`]: weights in memory of a
    /// device for whose encoding there is no kernel, so that the CPU had to fetch and encode them.
    ///
    /// [`SendReport::slower`]: engine_core::SendReport::slower
    pub fn slower(&self) -> Vec<String> {
        let counted = self.tools.take(|tools| std::mem::take(&mut tools.over_the_host));
        let words = |(encoding, count)| {
            format!(
                "{count} weights on a device were encoded by the CPU: `{encoding}` has no kernel for what they are"
            )
        };
        counted.into_iter().map(words).collect()
    }

    /// Copies slices of the device to others, in one launch. Blocks until the bytes are there.
    ///
    /// # Errors
    ///
    /// `State` if the lengths differ; what the driver reports.
    pub fn copy(&self, copies: impl IntoIterator<Item = (CudaSlice, CudaSlice)>) -> Result<()> {
        let copy = |(source, target)| DeviceJob::Copy { source, target };
        let jobs: Vec<DeviceJob> = copies.into_iter().map(copy).collect();
        Ok(self.tools.take(|tools| tools.kernels.encode(&jobs, &Fp8Format::default()))?)
    }

    /// The digest sum of a bucket's parts, each with its offset in the bucket. Blocks.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn digest(&self, parts: &[(u64, CudaSlice)]) -> Result<u64> {
        Ok(self.tools.take(|tools| tools.kernels.run(&[Launch::Digest(parts)]))?.sum)
    }
}

impl Tools {
    /// Pinned memory of at least so many bytes, which nobody else has.
    fn staging(&mut self, len: usize) -> Result<PinnedMemory> {
        match self.staging.take().filter(|staging| staging.len() >= len) {
            Some(staging) => Ok(staging),
            None => Ok(PinnedMemory::new(self.kernels.stream(), len)?),
        }
    }

    /// Enqueues all copies that the driver makes.
    fn enqueue(
        &self,
        work: &Work<'_>,
        staging: Option<&PinnedMemory>,
        bucket: &CudaSlice,
    ) -> Result<()> {
        if let Some(staging) = staging {
            for job in &work.host {
                staging.copy_to(job.offset as usize, &target(job, bucket)?)?;
            }
        }
        for (source, target) in &work.peers {
            target.copy_from(source, self.kernels.stream())?;
        }
        Ok(())
    }

    fn launch(&mut self, work: &Work<'_>, bucket: &CudaSlice, digests: bool) -> Result<u64> {
        let copies = Fp8Format::default();
        let mut launches: Vec<Launch<'_>> = Vec::new();
        for batch in &work.batches {
            let summed = (digests && !batch.aside).then_some(bucket);
            launches.push(Launch::Encode { jobs: &batch.jobs, format: &batch.format, summed });
        }
        launches.push(Launch::Encode { jobs: &work.late, format: &copies, summed: None });
        let unsummed: &[_] = if digests { &work.unsummed } else { &[] };
        launches.push(Launch::Digest(unsummed));
        let ran = self.kernels.run(&launches)?;
        match ran
            .failed
            .and_then(|(launch, job, block)| Some((work.batches.get(launch)?, job, block)))
        {
            None => Ok(ran.sum),
            Some((batch, job, block)) => Err(batch.failed(job, block)),
        }
    }

    fn sort<'a>(&mut self, jobs: &'a [Job], bucket: &CudaSlice, digests: bool) -> Result<Work<'a>> {
        let mut work = Work::default();
        // Scales that lie in this bucket as a whole can be written to their place at once.
        let mut scales_here: HashMap<usize, CudaSlice> = HashMap::new();
        // Codes whose scales the launch writes to their place.
        let mut in_place: HashSet<usize> = HashSet::new();
        let device = self.kernels.device().clone();
        for job in jobs {
            if let Some(scales) = encoding::<Fp8Scales>(&job.weight)
                && job.len == job.weight.byte_len()
            {
                scales_here.insert(key(scales.codes()), target(job, bucket)?);
            }
        }
        for job in jobs {
            if job.len == 0 {
                continue;
            }
            let target = target(job, bucket)?;
            let part = job.start as usize..(job.start + job.len) as usize;
            if let Some(storage) = job.weight.storage() {
                match CudaSlice::of_storage(storage) {
                    Some(source) if source.device().ordinal() == device.ordinal() => {
                        let source = source.slice(part.start, part.len())?;
                        let copy = DeviceJob::Copy { source, target };
                        let batch = work.batch(None, false);
                        work.add(batch, copy, (&job.weight, 0), job.offset, digests);
                    }
                    Some(source) => {
                        let source = source.slice(part.start, part.len())?;
                        work.unsummed.push((job.offset, target.clone()));
                        work.peers.push((source, target));
                    }
                    None => work.host(job, target),
                }
            } else if let (Some(of), Some(codes)) =
                (job.weight.encoding(), encoding::<Fp8Codes>(&job.weight))
            {
                let Some(source) = source_of(codes, &device) else {
                    work.host(job, target);
                    continue;
                };
                let here = if part.len() == codes.grid().elements() {
                    scales_here.remove(&key(of))
                } else {
                    None
                };
                let is_here = here.is_some();
                let scales = match here {
                    Some(place) => place,
                    None => self.kept(&work, of, codes)?,
                };
                let quantized = Quantized { codes, source, scales };
                let covering = covering(codes, &part);
                if is_here {
                    in_place.insert(key(of));
                } else {
                    work.scales.add(of, &quantized.scales, codes.grid().scales_of(&covering));
                }
                if covering == part {
                    let batch = work.batch(Some(*codes.format()), false);
                    let (encode, first) = quantized.job(&part, target)?;
                    work.add(batch, encode, (&job.weight, first), job.offset, digests);
                } else {
                    // A part that begins or ends within a row of blocks: whole ones are made elsewhere.
                    let whole = self.scratch.take(&device, covering.len())?;
                    let batch = work.batch(Some(*codes.format()), true);
                    let (encode, first) = quantized.job(&covering, whole.clone())?;
                    let skipped = part.start - covering.start;
                    let source = whole.slice(skipped, part.len())?;
                    work.batches[batch].push(encode, (&job.weight, first));
                    work.unsummed.push((job.offset, target.clone()));
                    work.late.push(DeviceJob::Copy { source, target });
                }
            } else if let Some(scales) = encoding::<Fp8Scales>(&job.weight) {
                let codes = key(scales.codes());
                let wanted = part.start / SCALE..part.end.div_ceil(SCALE);
                if in_place.contains(&codes) {
                    work.unsummed.push((job.offset, target));
                } else if let Some(kept) = self.scales.covers(&work.scales, codes, &wanted) {
                    let source = kept.slice(part.start, part.len())?;
                    work.unsummed.push((job.offset, target.clone()));
                    work.late.push(DeviceJob::Copy { source, target });
                    if part.end as u64 == job.weight.byte_len() {
                        work.asked.push(codes);
                    }
                } else {
                    // Not all of them were computed on this device: another rank may have sent some of the codes.
                    work.host(job, target);
                }
            } else {
                work.host(job, target);
            }
        }
        Ok(work)
    }

    /// Memory for scales that are not written to their place at once.
    fn kept(
        &mut self,
        work: &Work<'_>,
        of: &Arc<dyn Encoding>,
        codes: &Fp8Codes,
    ) -> Result<CudaSlice> {
        let kept = self.scales.place(key(of)).or_else(|| work.scales.place(key(of)));
        match kept {
            Some(scales) => Ok(scales.clone()),
            None => self.scratch.take(self.kernels.device(), codes.grid().scales() * SCALE),
        }
    }
}

/// Bytes of a scale.
const SCALE: usize = size_of::<f32>();

/// Where the source of codes is on a device, if they can be computed there.
fn source_of(codes: &Fp8Codes, device: &Device) -> Option<CudaSlice> {
    let Fp8Format { granularity, non_finite, .. } = codes.format();
    let known = matches!(granularity, Granularity::Block { .. });
    if !known || *non_finite == NonFinite::Reproduce {
        return None;
    }
    let source = CudaSlice::of_storage(codes.source().storage()?)?;
    let here = source.device().ordinal() == device.ordinal();
    // The kernels read whole elements.
    let aligned = source.address().is_multiple_of(codes.source_type().size() as u64);
    (here && aligned).then_some(source)
}

impl<'a> Work<'a> {
    /// The batch for a format; for copies, any.
    fn batch(&mut self, format: Option<Fp8Format>, aside: bool) -> usize {
        let fits = |batch: &Batch<'_>| {
            batch.aside == aside && format.is_none_or(|format| batch.format == format)
        };
        match self.batches.iter().position(fits) {
            Some(index) => index,
            None => {
                let format = format.unwrap_or_default();
                self.batches.push(Batch { format, aside, jobs: Vec::new(), weights: Vec::new() });
                self.batches.len() - 1
            }
        }
    }

    fn add(
        &mut self,
        batch: usize,
        job: DeviceJob,
        weight: (&'a Weight, usize),
        offset: u64,
        digests: bool,
    ) {
        let batch = &mut self.batches[batch];
        if digests && !job.is_summable(&batch.format) {
            self.unsummed.push((offset, job.target().clone()));
        }
        batch.push(job, weight);
    }

    fn host(&mut self, job: &'a Job, target: CudaSlice) {
        self.unsummed.push((job.offset, target));
        self.host.push(job);
    }
}

impl<'a> Batch<'a> {
    fn push(&mut self, job: DeviceJob, weight: (&'a Weight, usize)) {
        self.jobs.push(job);
        self.weights.push(weight);
    }

    /// The error of a block without a finite form, which names its weight.
    fn failed(&self, job: usize, block: usize) -> Error {
        let found = self.weights.get(job).and_then(|(weight, first)| {
            encoding::<Fp8Codes>(weight).map(|codes| (weight, codes, first))
        });
        let Some((weight, codes, first)) = found else {
            return CudaError::NonFinite { job, block }.into();
        };
        let (grid, block) = (codes.grid(), first + block);
        let band = block / grid.scales_per_band();
        QuantError::NonFinite {
            tensor: Some(weight.name().to_owned()),
            expert: band / grid.bands_per_matrix(),
            block_row: band % grid.bands_per_matrix(),
            block_col: block % grid.scales_per_band(),
        }
        .into()
    }
}

/// Codes to be computed on the device.
struct Quantized<'a> {
    codes: &'a Fp8Codes,
    source: CudaSlice,
    /// The place of all scales of the weight.
    scales: CudaSlice,
}

impl Quantized<'_> {
    /// The job for elements that are whole granules, and the first of its blocks.
    fn job(
        &self,
        elements: &std::ops::Range<usize>,
        target: CudaSlice,
    ) -> Result<(DeviceJob, usize)> {
        let (codes, grid) = (self.codes, self.codes.grid());
        let size = codes.source_type().size();
        let blocks = grid.scales_of(elements);
        let shape = match *codes.shape() {
            _ if elements.len() == grid.elements() => codes.shape().to_vec(),
            // Uneven experts come whole.
            [_, rows, cols] if elements.len().is_multiple_of(rows * cols) => {
                vec![elements.len() / (rows * cols), rows, cols]
            }
            [.., cols] => vec![elements.len() / cols, cols],
            [] => Vec::new(),
        };
        let job = DeviceJob::Fp8 {
            source: self.source.slice(elements.start * size, elements.len() * size)?,
            ty: codes.source_type(),
            shape,
            codes: target,
            scales: self.scales.slice(blocks.start * SCALE, blocks.len() * SCALE)?,
        };
        Ok((job, blocks.start))
    }
}

/// The smallest range of whole granules around a range of codes.
fn covering(codes: &Fp8Codes, part: &std::ops::Range<usize>) -> std::ops::Range<usize> {
    let granule = codes.granule() as usize;
    let end = part.end.next_multiple_of(granule).min(codes.grid().elements());
    part.start / granule * granule..end
}

fn target(job: &Job, bucket: &CudaSlice) -> Result<CudaSlice> {
    Ok(bucket.slice(job.offset as usize, job.len as usize)?)
}

/// A weight's encoding, if it is of this type.
fn encoding<T: Encoding>(weight: &Weight) -> Option<&T> {
    let encoding: &dyn std::any::Any = &**weight.encoding()?;
    encoding.downcast_ref()
}

/// Small memory that is used again when nobody holds it any more: its users' work is on one stream.
#[derive(Debug, Default)]
struct Scratch(Vec<CudaMemory>);

impl Scratch {
    fn take(&mut self, device: &Device, len: usize) -> Result<CudaSlice> {
        let fits = |memory: &&CudaMemory| memory.len() >= len && memory.is_unshared();
        let memory = match self.0.iter().find(fits) {
            Some(memory) => memory.clone(),
            None => {
                let memory = CudaMemory::new(device, len.next_power_of_two().max(1 << 16))?;
                self.0.push(memory.clone());
                memory
            }
        };
        Ok(memory.slice(0, len)?)
    }
}
