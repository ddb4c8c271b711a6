//! Fills buckets on a device with weights, wherever these are.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

use engine_core::memory::{Job, Pool};
use engine_core::plan::Piece;
use engine_core::{Encoding, Result, Storage};
use quant_fp8::{Fp8Codes, Fp8Format};

use crate::kernels::Run;
use crate::ledger::{Ledger, key};
use crate::storage::address_of;
use crate::table::{Against, Entry, Table, Tables, Task, mode_number};
use crate::turns::Turns;
use crate::work::{Beside, Located, SCALE, Sorting, Work};
use crate::{CudaError, CudaMemory, CudaSlice, Device, DeviceJob, Kernels, PinnedMemory};

/// Packs and quantises the weights of a bucket in one launch, and digests buckets. Clones are the same one.
///
/// Weights on the device are encoded where they are. All others (in host memory, of other devices, in
/// formats that the kernels do not know) are encoded by the CPU and copied, so that a stream may mix
/// them as it likes.
///
/// # Updates that repeat
///
/// What a launch reads beside the weights is a table: 68 bytes for each job, and as many for what is digested after it.
/// Tables that were needed twice stay on the device, at most 32 MiB of them, with a copy of each on the host; they are
/// bytes, and keep no weight alive. So a bucket whose weights are where they were in the last update is launched without
/// sending its table again. Where a weight has moved, the table is another one, and is sent.
#[derive(Clone, Debug)]
pub struct Packer {
    device: Device,
    tools: Arc<Turns<Tools>>,
    /// Each is disconnected once the weights of a bucket are dropped.
    dropping: Arc<Turns<Vec<Receiver<()>>>>,
}

/// The places of the pieces of a bucket on a device, in their order.
#[derive(Debug, Default)]
pub struct Places {
    /// The address of each piece's place.
    addresses: Vec<u64>,
    /// The memory of the places.
    memory: Vec<CudaMemory>,
}

impl Places {
    /// Adds the place of the next piece: its part of a tensor, whose memory is kept.
    ///
    /// # Errors
    ///
    /// `State` if the tensor is shorter.
    pub fn push(&mut self, piece: &Piece, tensor: &CudaSlice) -> Result<()> {
        self.addresses.push(tensor.address_of(piece.start, piece.len)?);
        let memory = tensor.memory();
        if self.memory.last().is_none_or(|last| last.address() != memory.address()) {
            self.memory.push(memory.clone());
        }
        Ok(())
    }
}

/// A copy of an earlier version of what is packed, and where packing says what differs from it.
#[derive(Debug)]
pub(crate) struct Earlier {
    /// As long as the bucket, and laid out as it is.
    pub(crate) copy: CudaSlice,
    /// A bit for each 8 bytes of the bucket, in the order of the bits of a byte.
    pub(crate) marks: CudaSlice,
}

/// Bytes of a bucket that a byte of marks is about.
pub(crate) const MARKED: usize = 8 * 8;

/// What a packer works with.
#[derive(Debug)]
struct Tools {
    kernels: Kernels,
    /// For weights that the CPU encodes, each at its place in the bucket. Taken while the CPU encodes.
    staging: Option<PinnedMemory>,
    scratch: Scratch,
    /// Scales that were not written to their place at once.
    scales: Ledger<CudaSlice>,
    /// The number of weights on devices that the CPU had to encode, by encoding, since the last report.
    over_the_host: BTreeMap<&'static str, u64>,
    /// The memory of the last bucket's work and tables, to be reused.
    spare: (Work, Tables),
}

/// With more jobs, dropping the weights of a bucket takes long enough for another thread to do it.
const MANY_JOBS: usize = 64;

/// So many jobs are sorted before the device begins with them. It then works on them while twice as many are sorted, and so on.
const FIRST_JOBS: usize = 128;

/// Launches for which a bucket has room in the end: those of the rest, however many formats and programs it has.
const LAST_LAUNCHES: usize = 32;

/// A bucket that is being filled. The device may be at work on it already.
struct Filling {
    jobs: Arc<Vec<Job>>,
    work: Work,
    tables: Tables,
    run: Run,
    against: Option<Against>,
    /// The scales that the launches compute outside their place.
    scales: Ledger<CudaSlice>,
    /// Codes of which all scales have been asked for.
    asked: Vec<usize>,
    staging: Option<PinnedMemory>,
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
            spare: Default::default(),
        };
        let tools = Arc::new(Turns::new(tools));
        Ok(Self { device: device.clone(), tools, dropping: Arc::default() })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Encodes all jobs of a bucket and returns its digest sum if it is wanted, else 0. Blocks until the bytes have arrived. When it
    /// returns, the device reads none of the weights any more, not even after an error. Another thread of the pool may be about to drop
    /// them: [`settle`](Self::settle) waits for that.
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
        jobs: Vec<Job>,
        bucket: &CudaSlice,
        pool: &Pool,
        digests: bool,
    ) -> Result<u64> {
        self.filled(jobs, bucket, None, pool, digests)
    }

    /// Encodes all jobs of a bucket, as [`fill`](Self::fill) does, except that codes which are as in the copy need not be written: where a
    /// mark is 0, the bytes are those of the copy, and what the bucket has there is undefined. Where it is 1, they are in the bucket, and
    /// may be the same all the same.
    ///
    /// # Errors
    ///
    /// Those of `fill`; `State` if the copy or the marks have another length than the bucket needs.
    pub(crate) fn fill_what_differs(
        &self,
        jobs: Vec<Job>,
        bucket: &CudaSlice,
        earlier: &Earlier,
        pool: &Pool,
    ) -> Result<()> {
        let Earlier { copy, marks } = earlier;
        self.check_device(copy)?;
        self.check_device(marks)?;
        let lens = (copy.len(), marks.len());
        if lens != (bucket.len(), bucket.len().div_ceil(MARKED)) {
            let words = format!("a copy and marks of {lens:?} bytes for {} bytes", bucket.len());
            return Err(CudaError::Range(words).into());
        }
        self.filled(jobs, bucket, Some(earlier), pool, false).map(drop)
    }

    fn filled(
        &self,
        jobs: Vec<Job>,
        bucket: &CudaSlice,
        earlier: Option<&Earlier>,
        pool: &Pool,
        digests: bool,
    ) -> Result<u64> {
        self.check_device(bucket)?;
        self.tools
            .in_steps(
                |tools| tools.begin(jobs, bucket, earlier, digests),
                |filling| {
                    let Filling { jobs, work, staging, .. } = filling;
                    let Some(staging) = staging else { return Ok(()) };
                    let own: Vec<Job> =
                        work.host.iter().map(|&index| jobs[index].clone()).collect();
                    pool.encode(&own, staging.bytes()?, false).map(drop)
                },
                |tools, filling, encoded| tools.finish(filling, bucket, digests, encoded),
            )
            .map(|(sum, jobs)| {
                self.drop_beside(jobs, pool);
                sum
            })
    }

    /// Drops weights while the device works on the next bucket: thousands take as long as it does.
    fn drop_beside(&self, jobs: Arc<Vec<Job>>, pool: &Pool) {
        if jobs.len() < MANY_JOBS {
            return;
        }
        let (ends, dropped) = channel();
        let work = pool.start(move || {
            drop(jobs);
            drop::<Sender<()>>(ends);
            Ok(())
        });
        // It goes on without anybody who waits for its result.
        drop(work);
        self.dropping.take(|all| {
            all.retain(|one| one.try_recv() == Err(TryRecvError::Empty));
            all.push(dropped);
        });
    }

    /// Waits until the weights of all buckets that were filled are dropped. Blocks, for as long as the pool is busy.
    pub fn settle(&self) {
        for dropped in self.dropping.take(std::mem::take) {
            // It ends when the other end is dropped.
            for () in dropped {}
        }
    }

    /// Checks the device: kernels take addresses of their own device.
    fn check_device(&self, memory: &CudaSlice) -> Result<()> {
        let (there, here) = (memory.device().ordinal(), self.device.ordinal());
        if there == here {
            return Ok(());
        }
        Err(CudaError::Range(format!("memory of device {there} for kernels of {here}")).into())
    }

    /// What was slower than possible since the last call, in words for [`SendReport::slower`]: weights in memory of a device that have no
    /// kernel for their encoding, so that the CPU had to fetch and encode them.
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

    /// Copies slices of the device to others, in one launch. Blocks until the bytes have arrived.
    ///
    /// # Errors
    ///
    /// `State` if the lengths differ; what the driver reports.
    pub fn copy(&self, copies: impl IntoIterator<Item = (CudaSlice, CudaSlice)>) -> Result<()> {
        let copy = |(source, target)| DeviceJob::Copy { source, target };
        let jobs: Vec<DeviceJob> = copies.into_iter().map(copy).collect();
        Ok(self.tools.take(|tools| tools.kernels.encode(&jobs, &Fp8Format::default()))?)
    }

    /// Copies the pieces of a bucket to these places, and returns the bucket's digest sum if it is wanted, else 0. The bucket
    /// is read once. Blocks.
    ///
    /// # Errors
    ///
    /// `State` if there are not as many places as pieces, or for pieces beyond the bucket; what the driver reports.
    pub(crate) fn copy_out(
        &self,
        bucket: &CudaSlice,
        pieces: &[Piece],
        places: &Places,
        digests: bool,
    ) -> Result<u64> {
        self.check_device(bucket)?;
        if pieces.len() != places.addresses.len() {
            let words = format!("{} pieces for {} places", pieces.len(), places.addresses.len());
            return Err(CudaError::Range(words).into());
        }
        let (mut copies, mut unsummed) = (Table::default(), Table::default());
        for (piece, &place) in pieces.iter().zip(&places.addresses) {
            let source = bucket.address_of(piece.offset, piece.len)?;
            let (copy, tiles) = Entry::copy(source, place, piece.len);
            // The digest reads whole words at their place.
            let part = Entry::part(source, piece.offset, piece.len);
            match copy.is_summable() && digests {
                true => copies.push((part.map(|_| copy.summed_from())?, tiles))?,
                false => {
                    copies.push((copy, tiles))?;
                    if digests {
                        unsummed.push(part?)?;
                    }
                }
            }
        }
        self.tools.take(|tools| {
            let mut tables = Tables::default();
            let mode = mode_number(Fp8Format::default().mode);
            tables.add(&copies, Task::Encode { mode, base: bucket.address() });
            tables.add(&unsummed, Task::Digest);
            tables.keep(bucket.memory());
            places.memory.iter().for_each(|memory| tables.keep(memory));
            Ok(tools.kernels.run_tables(&mut tables)?.sum)
        })
    }

    /// The digest sum of a bucket with these pieces. Blocks.
    ///
    /// # Errors
    ///
    /// `State` for pieces beyond the bucket; what the driver reports.
    pub fn digest(&self, bucket: &CudaSlice, pieces: &[Piece]) -> Result<u64> {
        self.check_device(bucket)?;
        let mut table = Table::default();
        for piece in pieces {
            let address = bucket.address_of(piece.offset, piece.len)?;
            table.push(Entry::part(address, piece.offset, piece.len)?)?;
        }
        self.tools.take(|tools| {
            let mut tables = Tables::default();
            tables.add(&table, Task::Digest);
            tables.keep(bucket.memory());
            Ok(tools.kernels.run_tables(&mut tables)?.sum)
        })
    }
}

impl Tools {
    /// Sorts the jobs of a bucket, and has the device begin with them.
    fn begin(
        &mut self,
        jobs: Vec<Job>,
        bucket: &CudaSlice,
        earlier: Option<&Earlier>,
        digests: bool,
    ) -> Result<Filling> {
        let jobs = Arc::new(jobs);
        let begun = self.sort(&jobs, bucket, earlier, digests);
        if begun.is_err() {
            self.kernels.give_up();
        }
        begun
    }

    fn sort(
        &mut self,
        jobs: &Arc<Vec<Job>>,
        bucket: &CudaSlice,
        earlier: Option<&Earlier>,
        digests: bool,
    ) -> Result<Filling> {
        let device = self.kernels.device().clone();
        let (mut work, mut tables) = std::mem::take(&mut self.spare);
        let mut beside = Kept {
            device: &device,
            known: &self.scales,
            now: Ledger::default(),
            asked: Vec::new(),
            scratch: &mut self.scratch,
            used: Vec::new(),
        };
        let locate = |storage: &Storage| located(storage, device.ordinal());
        let place = (bucket.address(), bucket.len() as u64);
        let mut run = self.kernels.begin()?;
        let against = earlier.map(|Earlier { copy, marks }| {
            marks.fill(0xff, self.kernels.stream())?;
            Ok::<_, CudaError>(Against { old: copy.address(), marks: marks.address() })
        });
        let against = against.transpose()?;
        work.begin(jobs.len());
        let mut sorting =
            Sorting::new(jobs, place, digests, against.is_some(), locate, &mut beside);
        let mut most = FIRST_JOBS;
        loop {
            let last = work.sort(&mut sorting, most)?;
            if !last && run.room() <= LAST_LAUNCHES {
                continue;
            }
            tables.clear();
            tables.keep(bucket.memory());
            if let Some(Earlier { copy, marks }) = earlier {
                tables.keep(copy.memory());
                tables.keep(marks.memory());
            }
            tables.used.push(jobs.clone());
            tables.used.push(Arc::new(std::mem::take(&mut sorting.beside.used)));
            if last {
                break;
            }
            work.tables(bucket.address(), digests, against, false, &mut tables);
            self.kernels.enqueue(&mut run, &mut tables)?;
            most *= 2;
        }
        let Kept { now, asked, .. } = beside;
        // Up to the last of them: pinning a whole bucket of gigabytes takes most of a second.
        let end = work.host.iter().map(|&index| jobs[index].offset + jobs[index].len).max();
        // Rounded up, so that a bucket with a little more than the last one does not need new memory.
        let len = end.map(|end| (end as usize).next_power_of_two().min(bucket.len()));
        let staging = len.map(|len| self.staging(len)).transpose()?;
        let jobs = jobs.clone();
        Ok(Filling { jobs, work, tables, run, against, scales: now, asked, staging })
    }

    /// Pinned memory of at least `len` bytes, which is not in use.
    fn staging(&mut self, len: usize) -> Result<PinnedMemory> {
        match self.staging.take().filter(|staging| staging.len() >= len) {
            Some(staging) => Ok(staging),
            None => Ok(PinnedMemory::new(self.kernels.stream(), len)?),
        }
    }

    /// Does the rest of the device's work on a bucket, after the other jobs were encoded, and waits for all of it.
    fn finish(
        &mut self,
        filling: Filling,
        bucket: &CudaSlice,
        digests: bool,
        encoded: Result<()>,
    ) -> Result<(u64, Arc<Vec<Job>>)> {
        let Filling { jobs, mut work, mut tables, mut run, against, scales, asked, staging } =
            filling;
        let filled = encoded
            .and_then(|()| self.enqueue(&jobs, &work, staging.as_ref(), bucket))
            .and_then(|()| {
                work.tables(bucket.address(), digests, against, true, &mut tables);
                self.kernels.enqueue(&mut run, &mut tables)?;
                Ok(self.kernels.collect(run)?)
            });
        if filled.is_err() {
            self.kernels.give_up();
        }
        self.staging = staging.or_else(|| self.staging.take());
        let sum = filled.and_then(|ran| match ran.failed {
            None => Ok(ran.sum),
            Some(failed) => Err(work.failed(&jobs, failed)),
        });
        if sum.is_ok() {
            self.scales.extend(scales);
            asked.into_iter().for_each(|codes| self.scales.forget(codes));
            for job in work.host.iter().map(|&index| &jobs[index]).filter(|job| job.start == 0) {
                if job.weight.reads_device() {
                    let encoding = job.weight.encoding().map_or("strided", |it| it.name());
                    *self.over_the_host.entry(encoding).or_default() += 1;
                }
            }
        }
        tables.clear();
        self.spare = (work, tables);
        sum.map(|sum| (sum, jobs))
    }

    /// Enqueues all copies that the driver makes.
    fn enqueue(
        &self,
        jobs: &[Job],
        work: &Work,
        staging: Option<&PinnedMemory>,
        bucket: &CudaSlice,
    ) -> Result<()> {
        let target = |job: &Job| bucket.slice(job.offset as usize, job.len as usize);
        if let Some(staging) = staging {
            for job in work.host.iter().map(|&index| &jobs[index]) {
                staging.copy_to(job.offset as usize, &target(job)?)?;
            }
        }
        for job in work.peers.iter().map(|&index| &jobs[index]) {
            // A peer is a weight whose storage is on another device.
            let Some(source) = job.weight.storage().and_then(CudaSlice::of_storage) else {
                continue;
            };
            let source = source.slice(job.start as usize, job.len as usize)?;
            target(job)?.copy_from(&source, self.kernels.stream())?;
        }
        Ok(())
    }
}

/// Where the bytes of a storage are, seen from a device.
fn located(storage: &Storage, ordinal: i32) -> Located {
    match address_of(storage) {
        None => Located::Elsewhere,
        Some((device, address)) if device == ordinal => Located::Here(address),
        Some(_) => Located::Peer,
    }
}

/// Memory outside a bucket that is being filled.
struct Kept<'a> {
    device: &'a Device,
    known: &'a Ledger<CudaSlice>,
    now: Ledger<CudaSlice>,
    asked: Vec<usize>,
    scratch: &'a mut Scratch,
    /// The memory that the launches use.
    used: Vec<CudaSlice>,
}

impl Beside for Kept<'_> {
    fn place(
        &mut self,
        of: &Arc<dyn Encoding>,
        codes: &Fp8Codes,
        now: Range<usize>,
    ) -> Result<u64> {
        let key = key(of);
        let place = match self.known.place(key).or_else(|| self.now.place(key)) {
            Some(place) => place.clone(),
            None => self.scratch.take(self.device, codes.grid().scales() * SCALE)?,
        };
        self.now.add(of, &place, now);
        let address = place.address();
        self.used.push(place);
        Ok(address)
    }

    fn find(&mut self, codes: usize, scales: &Range<usize>, ends: bool) -> Option<u64> {
        let place = self.known.covers(&self.now, codes, scales)?;
        if ends {
            self.asked.push(codes);
        }
        self.used.push(place.clone());
        Some(place.address())
    }

    fn scratch(&mut self, len: usize) -> Result<u64> {
        let place = self.scratch.take(self.device, len)?;
        let address = place.address();
        self.used.push(place);
        Ok(address)
    }
}

/// Small memory that is reused when nobody holds it any more: its users' work is on one stream.
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
