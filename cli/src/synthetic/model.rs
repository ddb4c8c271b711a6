//! Synthetic models as trainers have them: in memory, or made as they are sent.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use engine_core::{
    Encoding, Error, ErrorKind, Result, TensorMeta, Treatment, Version, Weight, available_memory,
};
use memmap2::MmapMut;

use super::fill::{ChangeRate, Values};
use crate::threads::pool;

/// Where tensors begin in memory: at multiples of a cache line, and of what every device wants.
const ALIGNMENT: u64 = 256;
/// Bytes that one job of a parallel fill makes.
const JOB: usize = 4 << 20;

/// A model in memory, as a trainer's is: allocated once, changed in place.
#[derive(Debug)]
pub struct ResidentModel {
    tensors: Vec<(TensorMeta, Range<usize>)>,
    memory: Arc<MmapMut>,
    values: Values,
}

struct Shared(Arc<MmapMut>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl ResidentModel {
    /// Allocates a model and fills it with the values of a version.
    ///
    /// # Errors
    ///
    /// `Resource` if the memory is not to be had; `Weight` for an invalid description.
    pub fn new(metas: impl IntoIterator<Item = TensorMeta>, version: Version) -> Result<Self> {
        Self::changing(metas, version, None)
    }

    /// The same of a model of which so many elements change from one version to the next.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn changing(
        metas: impl IntoIterator<Item = TensorMeta>,
        version: Version,
        rate: Option<ChangeRate>,
    ) -> Result<Self> {
        let mut tensors = Vec::new();
        let mut end = 0_u64;
        for meta in metas {
            let start = end.next_multiple_of(ALIGNMENT);
            let size = meta.validate()?;
            end = start.checked_add(size).ok_or_else(|| memory_error(u64::MAX))?;
            tensors.push((meta, start as usize..end as usize));
        }
        let len = usize::try_from(end.max(1)).map_err(|_| memory_error(end))?;
        let memory =
            MmapMut::map_anon(len).map_err(|error| memory_error(end).with_source(error))?;
        // Fewer page faults and TLB misses where the kernel has huge pages; as good without.
        #[cfg(target_os = "linux")]
        memory.advise(memmap2::Advice::HugePage).ok();
        let mut model =
            Self { tensors, memory: Arc::new(memory), values: Values { version, rate } };
        model.advance(version)?;
        Ok(model)
    }

    /// The version whose values are in memory.
    pub fn version(&self) -> Version {
        self.values.version
    }

    /// Refills all tensors, in place and on all cores, with the values of a version.
    ///
    /// # Errors
    ///
    /// `State` while any [`Weight`] of the model is alive, since it would change under its reader;
    /// `Resource` if the threads cannot be started.
    pub fn advance(&mut self, version: Version) -> Result<()> {
        let memory = Arc::get_mut(&mut self.memory).ok_or_else(|| {
            Error::new(
                ErrorKind::State,
                "training a synthetic model",
                "weights of the version before are still in use",
            )
            .version(version)
        })?;
        let mut jobs = Vec::new();
        let (mut rest, mut at) = (&mut memory[..], 0);
        for (meta, range) in &self.tensors {
            let tail = rest.split_at_mut(range.start - at).1;
            let (tensor, tail) = tail.split_at_mut(range.len());
            (rest, at) = (tail, range.end);
            let starts = (0_u64..).step_by(JOB);
            jobs.extend(starts.zip(tensor.chunks_mut(JOB)).map(|job| (meta, job)));
        }
        let values = Values { version, ..self.values };
        pool()?.map(jobs, |(meta, (start, output))| {
            values.fill(meta, start..start + output.len() as u64, output);
        });
        self.values = values;
        Ok(())
    }

    /// All tensors, sharing the model's memory.
    pub fn weights(&self) -> impl ExactSizeIterator<Item = Result<Weight>> + Send + 'static {
        let memory = Bytes::from_owner(Shared(self.memory.clone()));
        let tensors = self.tensors.clone();
        tensors.into_iter().map(move |(meta, range)| Weight::from_meta(meta, memory.slice(range)))
    }
}

fn memory_error(bytes: u64) -> Error {
    Error::new(
        ErrorKind::Resource,
        "allocating a synthetic model",
        format!("cannot allocate {bytes} bytes"),
    )
}

/// A model that is nowhere: each weight's values are made as they are written into a bucket.
///
/// For models larger than the memory. Making values takes time that a trainer with its model in
/// memory would not need; rates of such updates say little about the engine.
#[derive(Clone, Debug)]
pub struct StreamedModel {
    metas: Arc<[TensorMeta]>,
    rate: Option<ChangeRate>,
}

impl StreamedModel {
    /// A model of these tensors.
    pub fn new(metas: impl IntoIterator<Item = TensorMeta>) -> Self {
        Self::changing(metas, None)
    }

    /// The same of a model of which so many elements change from one version to the next.
    pub fn changing(metas: impl IntoIterator<Item = TensorMeta>, rate: Option<ChangeRate>) -> Self {
        Self { metas: metas.into_iter().collect(), rate }
    }

    /// All tensors at a version. Nothing is made before it is [encoded](Weight::encode).
    pub fn weights(
        &self,
        version: Version,
    ) -> impl ExactSizeIterator<Item = Result<Weight>> + Send + 'static {
        let (metas, values) = (self.metas.clone(), Values { version, rate: self.rate });
        (0..metas.len()).map(move |index| {
            let meta = metas[index].clone();
            let bytes = meta.byte_len()?;
            let encoding = Generated { meta: meta.clone(), values, bytes };
            Weight::encoded(meta, Arc::new(encoding), Treatment::Plain)
        })
    }
}

#[derive(Debug)]
struct Generated {
    meta: TensorMeta,
    values: Values,
    bytes: u64,
}

impl Encoding for Generated {
    fn name(&self) -> &'static str {
        "generate"
    }

    fn source_bytes(&self) -> u64 {
        self.bytes
    }

    fn granule(&self) -> u64 {
        8
    }

    fn encode_host(&self, range: Range<u64>, destination: &mut [u8]) -> Result<()> {
        self.values.fill(&self.meta, range, destination);
        Ok(())
    }
}

/// Whether a model is kept in memory, and why. `Display` says both, for a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residency {
    /// Bytes of the model.
    pub model: u64,
    /// Bytes of memory that are to be had now, where that can be known.
    pub available: Option<u64>,
}

impl Residency {
    /// Of the memory that is to be had, at most so many percent go to the model; the rest is for
    /// buckets, rollouts and everybody else.
    pub const PERCENT: u64 = 75;

    /// Looks how much memory there is for a model of so many bytes.
    pub fn of(model: u64) -> Self {
        Self { model, available: available_memory() }
    }

    /// Whether the model is kept in memory.
    pub fn is_resident(&self) -> bool {
        self.available.is_none_or(|available| self.model <= available / 100 * Self::PERCENT)
    }
}

impl fmt::Display for Residency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        let model = gb(self.model);
        match self.available {
            None => write!(f, "the model ({model:.1} GB) is kept in memory"),
            Some(available) if self.is_resident() => {
                let available = gb(available);
                write!(f, "the model ({model:.1} GB of {available:.1} GB free) is kept in memory")
            }
            Some(available) => write!(
                f,
                "the model ({model:.1} GB) is more than {} % of the free memory ({:.1} GB): its \
                 weights are generated as they are sent, which takes time of every update",
                Self::PERCENT,
                gb(available)
            ),
        }
    }
}
