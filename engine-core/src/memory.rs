//! Buckets in host memory: encoding all weights of one at once, and checking one.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use rayon::ThreadPool;
use rayon::prelude::*;

use crate::plan::{ALIGNMENT, Piece};
use crate::{Error, ErrorKind, Result, Storage, Weight, digest};

/// Work below this many bytes is not divided further among threads.
const GRAIN: u64 = 256 << 10;
/// The same where every piece is read from a device.
const DEVICE_GRAIN: u64 = 4 << 20;
/// Bytes that are written and digested at a time, so that the digest reads them from the cache.
const IN_CACHE: u64 = 64 << 10;

/// A part of a weight, to be encoded into a bucket.
#[derive(Clone, Debug)]
pub struct Job {
    /// The weight.
    pub weight: Weight,
    /// Where the part begins in the weight as it travels, in bytes.
    pub start: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Where it goes in the bucket, in bytes.
    pub offset: u64,
}

/// Host memory of a tensor's own, aligned as in a bucket.
#[derive(Debug)]
pub struct TensorMemory {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl TensorMemory {
    /// Zeroed memory of so many bytes.
    ///
    /// # Errors
    ///
    /// `Resource` if there is none.
    pub fn new(len: u64, operation: &str) -> Result<Self> {
        let alignment = ALIGNMENT as usize;
        let refuse = || {
            let message = format!("no memory for {len} bytes");
            Error::new(ErrorKind::Resource, operation, message)
        };
        let size = usize::try_from(len).ok().and_then(|len| len.checked_add(alignment));
        let size = size.ok_or_else(refuse)?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(size).map_err(|_| refuse())?;
        bytes.resize(size, 0);
        let start = bytes.as_ptr().align_offset(alignment).min(alignment);
        Ok(Self { bytes, start, len: size - alignment })
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    /// The bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }

    /// Ends writing.
    pub fn freeze(self) -> Bytes {
        Bytes::from(self.bytes).slice(self.start..self.start + self.len)
    }
}

/// The threads that pack, encode and check buckets: started once, kept for all updates.
#[derive(Clone, Debug)]
pub struct Pool(Arc<ThreadPool>);

impl Pool {
    /// A pool of so many threads; see [`EngineContext::threads`](crate::EngineContext::threads).
    ///
    /// # Errors
    ///
    /// `Resource` if the threads cannot be started.
    pub fn new(threads: usize) -> Result<Self> {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|index| format!("ckpt-pack-{index}"))
            .build()
            .map(|pool| Self(Arc::new(pool)))
            .map_err(|error| {
                let message = format!("{} threads cannot be started: {error}", threads.max(1));
                Error::new(ErrorKind::Resource, "starting the packing threads", message)
            })
    }

    /// How many threads it has.
    pub fn threads(&self) -> usize {
        self.0.current_num_threads()
    }

    /// Starts work on the pool, without blocking the executor; the future is its result.
    ///
    /// # Cancel safety
    ///
    /// The work goes on to its end when the future is dropped.
    pub fn start<T, F>(&self, work: F) -> Work<T>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T> + Send + 'static,
    {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        self.0.spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
                Err(Error::new(ErrorKind::Aborted, "working on a bucket", "the work panicked"))
            });
            // Nobody waits any more if the future was dropped, and then nobody needs the result.
            drop(sender.send(result));
        });
        Work(receiver)
    }

    /// Runs work of its own division on the threads, and waits for it.
    ///
    /// Blocks. The calling thread helps if it is one of them.
    pub fn install<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.0.install(work)
    }

    /// Does the same with each of some items, in parallel, and returns the results in the order of the
    /// items.
    ///
    /// Blocks, as [`install`](Self::install). It may be called within itself.
    ///
    /// # Examples
    ///
    /// ```
    /// use engine_core::memory::Pool;
    ///
    /// # fn main() -> engine_core::Result<()> {
    /// let pool = Pool::new(2)?;
    /// let mut bytes = [1, 2, 3, 4, 5];
    /// let sums = pool.map(bytes.chunks_mut(2), |part| part.iter().sum::<u8>());
    /// assert_eq!(sums, [3, 7, 5]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn map<I, T>(&self, items: I, each: impl Fn(I::Item) -> T + Sync + Send) -> Vec<T>
    where
        I: IntoIterator<Item: Send>,
        T: Send,
    {
        let items: Vec<I::Item> = items.into_iter().collect();
        #[expect(clippy::disallowed_methods, reason = "it runs within the pool")]
        let all = move || items.into_par_iter().map(each).collect();
        self.0.install(all)
    }

    /// Does two things at the same time where a thread is free for the second.
    ///
    /// Blocks, as [`install`](Self::install).
    pub fn join<A: Send, B: Send>(
        &self,
        a: impl FnOnce() -> A + Send,
        b: impl FnOnce() -> B + Send,
    ) -> (A, B) {
        self.0.join(a, b)
    }

    /// Encodes all jobs of a bucket, in parallel, and returns the bucket's digest sum if it is
    /// wanted, else 0.
    ///
    /// Blocks; call it within [`start`](Self::start).
    ///
    /// # Contract
    ///
    /// The jobs are sorted by offset and do not overlap, as the planner places them. Deferred weights
    /// are encoded after all others.
    ///
    /// # Errors
    ///
    /// The first error of a weight, naming it.
    ///
    /// # Panics
    ///
    /// If a job lies outside the bucket.
    pub fn encode(&self, jobs: &[Job], bucket: &mut [u8], digests: bool) -> Result<u64> {
        let deferred = jobs.iter().any(|job| job.weight.is_deferred());
        let mut pass = |deferred| {
            let encoder = Encoder { digests, deferred };
            self.0.install(|| encoder.divide(jobs, 0, bucket))
        };
        let sum = pass(false)?;
        if deferred { Ok(sum.wrapping_add(pass(true)?)) } else { Ok(sum) }
    }

    /// Each weight as memory of its own, in their order: the memory that it is where its bytes lie contiguous, shared;
    /// new memory that it is encoded into where they do not, in parallel.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, encoding may go on, and keeps clones of its weights until it ends.
    ///
    /// # Errors
    ///
    /// The first error of a weight, naming it; `Resource` if there is no memory for one.
    pub async fn hand_over(&self, weights: Vec<Weight>) -> Result<Vec<Storage>> {
        if weights.iter().all(|weight| weight.storage().is_some()) {
            return Ok(weights.iter().filter_map(Weight::storage).cloned().collect());
        }
        let pool = self.clone();
        let work = self.start(move || {
            let mut handed: Vec<Option<Storage>> =
                weights.iter().map(|weight| weight.storage().cloned()).collect();
            for deferred in [false, true] {
                let encoded = weights.iter().zip(&mut handed).filter(|(weight, storage)| {
                    storage.is_none() && weight.is_deferred() == deferred
                });
                let encode = |(weight, storage): (&Weight, &mut Option<Storage>)| {
                    *storage = Some(pool.encode_whole(weight)?);
                    Ok(())
                };
                pool.map(encoded, encode).into_iter().collect::<Result<()>>()?;
            }
            Ok(handed.into_iter().flatten().collect())
        });
        work.await
    }

    /// A weight in new memory. Blocks, as [`encode`](Self::encode).
    fn encode_whole(&self, weight: &Weight) -> Result<Storage> {
        let len = weight.byte_len();
        let memory = TensorMemory::new(len, "encoding a weight");
        let mut memory = memory.map_err(|error| error.tensor(weight.name()))?;
        let job = Job { weight: weight.clone(), start: 0, len, offset: 0 };
        self.encode(&[job], memory.bytes_mut(), false)?;
        Ok(memory.freeze().into())
    }

    /// The digest sum of a bucket with these parts: by the threads in host memory, by the device on a
    /// device.
    ///
    /// Blocks; call it within [`start`](Self::start).
    ///
    /// # Errors
    ///
    /// Those of the device.
    ///
    /// # Panics
    ///
    /// If a part lies outside the bucket.
    pub fn digest(&self, pieces: &[Piece], bucket: &Storage) -> Result<u64> {
        match bucket {
            Storage::Host(bytes) => Ok(self.0.install(|| sum_pieces(pieces, bytes))),
            Storage::Device(bytes) => bytes.digest(pieces),
        }
    }
}

/// Work that was started on a [`Pool`]; a future of its result.
#[derive(Debug)]
pub struct Work<T>(tokio::sync::oneshot::Receiver<Result<T>>);

impl<T> Future for Work<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|result| {
            result.unwrap_or_else(|_| {
                Err(Error::new(ErrorKind::Aborted, "working on a bucket", "the pool is gone"))
            })
        })
    }
}

/// Encodes the jobs that are deferred, or those that are not.
#[derive(Clone, Copy)]
struct Encoder {
    digests: bool,
    deferred: bool,
}

impl Encoder {
    /// Halves the work by bytes until it is small; `bucket` begins at byte `base` of the bucket.
    fn divide(self, jobs: &[Job], base: u64, bucket: &mut [u8]) -> Result<u64> {
        let (Some(first), Some(last)) = (jobs.first(), jobs.last()) else { return Ok(0) };
        let bytes = last.offset + last.len - first.offset;
        let is_device = jobs.iter().any(|job| job.weight.reads_device());
        let grain = if is_device { DEVICE_GRAIN } else { GRAIN };
        if bytes <= grain {
            return jobs.iter().try_fold(0_u64, |sum, job| {
                Ok(sum.wrapping_add(self.encode(job, job.start, base, bucket)?))
            });
        }
        if let [job] = jobs {
            return self.divide_one(job, base, bucket);
        }
        let middle = first.offset + bytes / 2;
        let at = jobs.partition_point(|job| job.offset < middle).clamp(1, jobs.len() - 1);
        let (left, right) = jobs.split_at(at);
        let split = right[0].offset;
        let (low, high) = bucket.split_at_mut((split - base) as usize);
        let (a, b) = join(|| self.divide(left, base, low), || self.divide(right, split, high));
        Ok(a?.wrapping_add(b?))
    }

    /// Divides one large weight, at its granules.
    fn divide_one(self, job: &Job, base: u64, bucket: &mut [u8]) -> Result<u64> {
        let granule = job.weight.granule();
        // Both halves have to begin at an aligned place of the bucket, for the digest.
        let step = least_common_multiple(granule, ALIGNMENT);
        let cut = step.map_or(0, |step| {
            let to_granule = (granule - job.start % granule) % granule;
            if !to_granule.is_multiple_of(ALIGNMENT) {
                return 0;
            }
            to_granule + (job.len / 2).saturating_sub(to_granule) / step * step
        });
        if cut == 0 || cut >= job.len {
            return self.encode(job, job.start, base, bucket);
        }
        let left = Job { len: cut, ..job.clone() };
        let right = Job {
            start: job.start + cut,
            len: job.len - cut,
            offset: job.offset + cut,
            weight: job.weight.clone(),
        };
        let (low, high) = bucket.split_at_mut((right.offset - base) as usize);
        let (a, b) = join(
            || self.divide(std::slice::from_ref(&left), base, low),
            || self.divide(std::slice::from_ref(&right), right.offset, high),
        );
        Ok(a?.wrapping_add(b?))
    }

    /// Encodes one job on this thread, a cacheful at a time.
    fn encode(self, job: &Job, start: u64, base: u64, bucket: &mut [u8]) -> Result<u64> {
        if job.weight.is_deferred() != self.deferred {
            return Ok(0);
        }
        let at = (job.offset - base) as usize;
        let destination = &mut bucket[at..at + job.len as usize];
        if !self.digests {
            job.weight.encode(start..start + job.len, destination)?;
            return Ok(0);
        }
        let granule = job.weight.granule();
        let step = least_common_multiple(granule, ALIGNMENT)
            .filter(|_| !job.weight.reads_device())
            .map_or(job.len, |step| step.max(IN_CACHE / step * step));
        let (mut sum, mut from) = (0_u64, start);
        let mut offset = job.offset;
        for part in destination.chunks_mut(step.max(1) as usize) {
            job.weight.encode(from..from + part.len() as u64, part)?;
            sum = sum.wrapping_add(digest::sum(offset, part));
            from += part.len() as u64;
            offset += part.len() as u64;
        }
        Ok(sum)
    }
}

/// Divides work among the threads of the pool that it runs on.
#[expect(clippy::disallowed_methods, reason = "it is called within the pool only")]
fn join<A: Send, B: Send>(a: impl FnOnce() -> A + Send, b: impl FnOnce() -> B + Send) -> (A, B) {
    rayon::join(a, b)
}

fn sum_pieces(pieces: &[Piece], bucket: &[u8]) -> u64 {
    let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else { return 0 };
    let bytes = last.offset + last.len - first.offset;
    if bytes <= GRAIN {
        return pieces.iter().fold(0, |sum, piece| {
            let at = piece.offset as usize;
            sum.wrapping_add(digest::sum(piece.offset, &bucket[at..at + piece.len as usize]))
        });
    }
    if let [piece] = pieces {
        let at = piece.offset as usize;
        return sum_bytes(piece.offset, &bucket[at..at + piece.len as usize]);
    }
    let middle = first.offset + bytes / 2;
    let at = pieces.partition_point(|piece| piece.offset < middle).clamp(1, pieces.len() - 1);
    let (left, right) = pieces.split_at(at);
    let (a, b) = join(|| sum_pieces(left, bucket), || sum_pieces(right, bucket));
    a.wrapping_add(b)
}

fn sum_bytes(offset: u64, bytes: &[u8]) -> u64 {
    if bytes.len() as u64 <= GRAIN {
        return digest::sum(offset, bytes);
    }
    let cut = (bytes.len() / 2).next_multiple_of(ALIGNMENT as usize);
    let (low, high) = bytes.split_at(cut);
    let (a, b) = join(|| sum_bytes(offset, low), || sum_bytes(offset + cut as u64, high));
    a.wrapping_add(b)
}

fn least_common_multiple(a: u64, b: u64) -> Option<u64> {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    (a / x).checked_mul(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Encoding, TensorMeta, Treatment};
    use std::ops::Range;
    use std::sync::Mutex;

    fn bytes(len: usize, seed: usize) -> Vec<u8> {
        (0..len).map(|i| (i.wrapping_mul(31) ^ (i >> 9) ^ seed) as u8).collect()
    }

    fn job(name: &str, data: Vec<u8>, offset: u64) -> Job {
        let len = data.len() as u64;
        let weight = Weight::new(name, DType::U8, [len], data).unwrap();
        Job { weight, start: 0, len, offset }
    }

    #[test]
    fn encoding_places_every_weight_and_its_digest_is_the_one_of_the_bytes() {
        let pool = Pool::new(3).unwrap();
        let sizes = [0, 1, 255, 256, 257, 5000, 3 << 20, 7];
        let (mut jobs, mut pieces, mut offset) = (Vec::new(), Vec::new(), 0_u64);
        for (index, size) in sizes.into_iter().enumerate() {
            let job = job(&format!("w{index}"), bytes(size, index), offset);
            pieces.push(Piece { meta: job.weight.meta().clone(), start: 0, len: job.len, offset });
            offset = (offset + size as u64).next_multiple_of(ALIGNMENT);
            jobs.push(job);
        }
        let mut bucket = vec![0xee; offset as usize];
        let sum = pool.encode(&jobs, &mut bucket, true).unwrap();
        let digest = |bucket: &[u8]| pool.digest(&pieces, &bucket.to_vec().into()).unwrap();
        for job in &jobs {
            let at = job.offset as usize;
            assert_eq!(bucket[at..at + job.len as usize], job.weight.to_bytes().unwrap());
        }
        let expected = jobs.iter().fold(0_u64, |sum, job| {
            let at = job.offset as usize;
            sum.wrapping_add(digest::sum(job.offset, &bucket[at..at + job.len as usize]))
        });
        assert_eq!(sum, expected);
        assert_eq!(digest(&bucket), expected);
        bucket[1 << 20] ^= 1;
        assert_ne!(digest(&bucket), expected);
    }

    /// Counts the calls of another weight's encoding, and is deferred until they are done.
    #[derive(Debug)]
    struct Late(Arc<Mutex<u64>>);
    #[derive(Debug)]
    struct Early(Arc<Mutex<u64>>);

    impl Encoding for Early {
        fn name(&self) -> &'static str {
            "early"
        }
        fn source_bytes(&self) -> u64 {
            1 << 20
        }
        fn granule(&self) -> u64 {
            3000
        }
        fn encode_host(&self, range: Range<u64>, to: &mut [u8]) -> Result<()> {
            assert_eq!(range.start % 3000, 0, "split within a granule");
            to.fill(1);
            *self.0.lock().unwrap() += range.end - range.start;
            Ok(())
        }
    }

    impl Encoding for Late {
        fn name(&self) -> &'static str {
            "late"
        }
        fn source_bytes(&self) -> u64 {
            0
        }
        fn is_deferred(&self) -> bool {
            true
        }
        fn encode_host(&self, _: Range<u64>, to: &mut [u8]) -> Result<()> {
            to.copy_from_slice(&self.0.lock().unwrap().to_le_bytes());
            Ok(())
        }
    }

    fn encoded(name: &str, len: u64, encoding: Arc<dyn Encoding>) -> Weight {
        let meta = TensorMeta::new(name, DType::U8, [len]);
        Weight::encoded(meta, encoding, Treatment::Plain).unwrap()
    }

    #[test]
    fn deferred_weights_are_encoded_after_all_others_and_weights_split_at_granules() {
        let pool = Pool::new(2).unwrap();
        let counter = Arc::new(Mutex::new(0));
        let late = encoded("late", 8, Arc::new(Late(counter.clone())));
        let early = encoded("early", 1 << 20, Arc::new(Early(counter)));
        let jobs = [
            Job { weight: late, start: 0, len: 8, offset: 0 },
            Job { weight: early, start: 0, len: 1 << 20, offset: 256 },
        ];
        let mut bucket = vec![0; 256 + (1 << 20)];
        pool.encode(&jobs, &mut bucket, true).unwrap();
        assert_eq!(bucket[..8], (1_u64 << 20).to_le_bytes());
        assert!(bucket[256..].iter().all(|&byte| byte == 1));
    }

    #[tokio::test]
    async fn weights_are_handed_over_as_the_memory_that_they_are_or_encoded_deferred_ones_last() {
        let pool = Pool::new(2).unwrap();
        let counter = Arc::new(Mutex::new(0));
        let late = encoded("late", 8, Arc::new(Late(counter.clone())));
        let plain = job("plain", bytes(5000, 1), 0).weight;
        let early = encoded("early", 1 << 20, Arc::new(Early(counter)));
        let handed = pool.hand_over(vec![late, plain.clone(), early]).await.unwrap();
        let handed: Vec<Bytes> = handed.iter().map(|each| each.to_host().unwrap()).collect();
        assert_eq!(handed[0], (1_u64 << 20).to_le_bytes()[..]);
        assert_eq!(handed[1].as_ptr(), plain.contiguous_bytes().unwrap().as_ptr());
        assert!(handed[2].len() == 1 << 20 && handed[2].iter().all(|&byte| byte == 1));
    }

    #[tokio::test]
    async fn work_that_panics_is_an_error() {
        let pool = Pool::new(1).unwrap();
        let error = pool.start::<(), _>(|| panic!("no")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Aborted);
        assert_eq!(pool.start(|| Ok(5)).await.unwrap(), 5);
    }
}
