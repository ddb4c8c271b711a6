//! Weights: named tensors, where their bytes are, and how they get into a bucket.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{ArenaArc, DType, Error, ErrorKind, Kernel, Result, Storage, TensorBox};

/// The name, type and shape of a tensor as it travels.
///
/// Cloning shares the name and the shape, and clones are compared without looking at these.
#[derive(Clone, Debug, Eq, Hash, Serialize, Deserialize)]
#[expect(
    clippy::derived_hash_with_manual_eq,
    reason = "equal are the same as with the derived one"
)]
pub struct TensorMeta {
    /// The checkpoint's name of the tensor: `model.layers.0.mlp.up_proj.weight`.
    pub name: Arc<str>,
    /// The type of its elements.
    pub dtype: DType,
    /// Its dimensions, slowest first. Empty for a scalar.
    pub shape: Arc<[u64]>,
}

impl PartialEq for TensorMeta {
    fn eq(&self, other: &Self) -> bool {
        let has_same_shape = || Arc::ptr_eq(&self.shape, &other.shape) || self.shape == other.shape;
        self.dtype == other.dtype && self.has_name_of(other) && has_same_shape()
    }
}

impl TensorMeta {
    /// The longest name that travels, in bytes.
    pub const MAX_NAME_BYTES: usize = 4096;
    /// The most dimensions that travel.
    pub const MAX_DIMENSIONS: usize = 32;

    /// The description of a tensor.
    pub fn new(name: impl Into<Arc<str>>, dtype: DType, shape: impl Into<Arc<[u64]>>) -> Self {
        Self { name: name.into(), dtype, shape: shape.into() }
    }

    /// The number of elements; 1 for a scalar.
    ///
    /// # Errors
    ///
    /// `Weight` if the product of the dimensions does not fit 64 bits.
    pub fn elements(&self) -> Result<u64> {
        self.shape
            .iter()
            .try_fold(1_u64, |product, &dimension| product.checked_mul(dimension))
            .ok_or_else(|| self.invalid(format!("the shape {:?} overflows", self.shape)))
    }

    /// The number of bytes of the contiguous tensor.
    ///
    /// # Errors
    ///
    /// `Weight` if the size does not fit 64 bits, or if elements smaller than a byte do not fill
    /// whole bytes.
    pub fn byte_len(&self) -> Result<u64> {
        let bits = self
            .elements()?
            .checked_mul(self.dtype.bits())
            .ok_or_else(|| self.invalid(format!("the shape {:?} overflows", self.shape)))?;
        if !bits.is_multiple_of(8) {
            return Err(self.invalid(format!(
                "{:?} elements of type {} do not fill whole bytes",
                self.shape, self.dtype
            )));
        }
        Ok(bits / 8)
    }

    /// Checks everything about a description that comes from outside, and returns its byte size.
    ///
    /// # Errors
    ///
    /// `Weight` for an empty or overlong name, too many dimensions, or a size that overflows.
    pub fn validate(&self) -> Result<u64> {
        if self.name.is_empty() || self.name.len() > Self::MAX_NAME_BYTES {
            return Err(Error::new(
                ErrorKind::Weight,
                "checking a weight",
                format!("a name of {} bytes", self.name.len()),
            ));
        }
        if self.shape.len() > Self::MAX_DIMENSIONS {
            return Err(self.invalid(format!("{} dimensions", self.shape.len())));
        }
        self.byte_len()
    }

    /// Whether both have one name.
    pub fn has_name_of(&self, other: &Self) -> bool {
        // In an update that is like the last one, it is the same memory, which need not be read.
        Arc::ptr_eq(&self.name, &other.name) || self.name == other.name
    }

    fn invalid(&self, message: String) -> Error {
        Error::new(ErrorKind::Weight, "checking a weight", message).tensor(&*self.name)
    }
}

/// How a weight is turned into the bytes that travel, when it is not simply copied.
///
/// An encoding is *data* that describes the work (cast these elements; scale these blocks) and
/// holds its own source. The kind of memory that the bucket lives in carries it out, all weights of
/// a bucket at once: host memory through [`encode_host`](Self::encode_host), another kind of memory by the
/// [`kernel`](Self::kernel) that the encoding brings for it. For encodings whose outputs belong together, a kind of memory may
/// have kernels of its own: it recognises the concrete type (`&dyn Encoding` upcasts to `&dyn Any`).
///
/// # Contract
///
/// `encode_host` is a pure function of the range: any division of the output into ranges, encoded
/// in any order, on any number of threads, gives the same bytes as one call for the whole. That is
/// what lets a weight larger than a bucket be split anywhere.
pub trait Encoding: Any + fmt::Debug + Send + Sync {
    /// A short name for reports and errors: `cast`.
    fn name(&self) -> &'static str;

    /// Bytes read from the trainer's memory to produce the whole output.
    fn source_bytes(&self) -> u64;

    /// Where splitting costs nothing: ranges that begin and end at multiples of this many output
    /// bytes never make two calls read the same source. At least 1.
    fn granule(&self) -> u64 {
        1
    }

    /// Whether this weight's bytes exist only after other weights of the stream were encoded (the
    /// scales of a converted one). Such a weight follows the ones that it needs in the stream.
    fn is_deferred(&self) -> bool {
        false
    }

    /// Whether [`encode_host`](Self::encode_host) reads the memory of a device. Every read of it takes its time
    /// however short it is: such a weight is asked for in ranges of megabytes, which it reads at once.
    fn reads_device(&self) -> bool {
        false
    }

    /// What does the same in a kind of memory, by its [name](crate::provider::MemoryKind::name); `None` where the CPU has
    /// to.
    ///
    /// # Contract
    ///
    /// It gives the same bytes as [`encode_host`](Self::encode_host), for any division of the output into ranges.
    fn kernel(&self, memory: &str) -> Option<Kernel<'_>> {
        let _ = memory;
        None
    }

    /// Writes the bytes `range` of the output to `destination`, whose length is that of the range.
    ///
    /// # Errors
    ///
    /// Whatever makes the weight impossible to encode, naming the tensor.
    fn encode_host(&self, range: Range<u64>, destination: &mut [u8]) -> Result<()>;
}

/// What happened to a weight on its way, counted in every report.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Treatment {
    /// Nothing: it travels as the trainer has it, and nobody was asked to change it.
    #[default]
    Plain,
    /// A layer converted it to another format, as it was asked to.
    Converted,
    /// A layer added it, because a converted weight needs it. Not counted as a tensor of its own.
    Added,
    /// A layer that converts others left it as it is, for the reason given.
    Kept(Arc<str>),
    /// It was in the layer's format already when it came.
    PassedThrough,
}

#[derive(Clone, Debug)]
pub(crate) enum Content {
    Contiguous(Storage),
    /// Rare, so it is elsewhere: all weights are smaller for it.
    Strided(Arc<Elements>),
    Encoded(Arc<dyn Encoding>),
}

/// Elements of a storage that do not follow one another; see [`Weight::strided`].
#[derive(Debug)]
pub(crate) struct Elements {
    bytes: Storage,
    strides: Arc<[i64]>,
    offset: u64,
}

/// A named tensor on its way to the rollouts.
///
/// It shares its description and the memory of its source by reference count, so that cloning and passing it on are
/// free, and nothing is copied before it is encoded into a bucket.
#[derive(Clone)]
pub struct Weight {
    // An update moves tens of thousands of them through its layers, so it is small.
    pub(crate) meta: ArenaArc<TensorMeta>,
    pub(crate) content: Content,
    pub(crate) treatment: Treatment,
    pub(crate) byte_len: u64,
    pub(crate) part: Option<Arc<Part>>,
    /// The named part of a version that it belongs to, where its name does not say it.
    pub(crate) named_part: Option<u32>,
    /// Whether a bucket ends with it.
    pub(crate) ends_bucket: bool,
}

/// What of a larger tensor a weight is.
#[derive(Debug)]
pub(crate) struct Part {
    shape: Arc<[u64]>,
    region: TensorBox,
}

impl Weight {
    /// A contiguous tensor, in host memory or on a device.
    ///
    /// `bytes` holds the elements in row-major order, little-endian. [`Bytes::from_owner`] wraps
    /// anything that owns host memory (a mapped file, an `Arc` of a tensor's storage) without a copy,
    /// [`DeviceBytes`](crate::DeviceBytes) the memory of a device. The shape is in `u64`, as it travels. For numbers that the
    /// program holds, in shapes of `usize`, see [`Weight::of`]. A plain slice is taken only if it is `'static`, because
    /// weights outlive the call.
    ///
    /// # Errors
    ///
    /// `Weight` if the length is not that of the type and shape, or the description is invalid.
    ///
    /// # Examples
    ///
    /// ```
    /// use engine_core::{DType, Weight};
    ///
    /// let weight = Weight::new("lm_head.weight", DType::BF16, [2, 3], vec![0_u8; 12])?;
    /// assert_eq!(weight.byte_len(), 12);
    /// assert!(Weight::new("too.short", DType::F32, [2, 3], vec![0_u8; 12]).is_err());
    /// # Ok::<(), engine_core::Error>(())
    /// ```
    pub fn new(
        name: impl Into<Arc<str>>,
        dtype: DType,
        shape: impl Into<Arc<[u64]>>,
        bytes: impl Into<Storage>,
    ) -> Result<Self> {
        Self::from_meta(TensorMeta::new(name, dtype, shape), bytes)
    }

    /// A contiguous tensor, for a description that exists already.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn from_meta(
        meta: impl Into<ArenaArc<TensorMeta>>,
        bytes: impl Into<Storage>,
    ) -> Result<Self> {
        let meta = meta.into();
        let byte_len = meta.validate()?;
        let bytes = bytes.into();
        if bytes.len() != byte_len {
            return Err(meta.invalid(format!(
                "{} bytes were given for {} {:?}, which needs {byte_len}",
                bytes.len(),
                meta.dtype,
                meta.shape
            )));
        }
        Ok(Self::whole(meta, Content::Contiguous(bytes), Treatment::Plain, byte_len))
    }

    /// A whole weight, of which nothing else is known.
    fn whole(
        meta: ArenaArc<TensorMeta>,
        content: Content,
        treatment: Treatment,
        byte_len: u64,
    ) -> Self {
        Self {
            meta,
            content,
            treatment,
            byte_len,
            part: None,
            named_part: None,
            ends_bucket: false,
        }
    }

    /// A tensor whose elements are not contiguous, in host memory or on a device: a transposed or sliced view.
    ///
    /// Element `[i, j, …]` is at byte `(offset + i·strides[0] + j·strides[1] + …) · size` of
    /// `bytes`, all counted in elements. It is packed as it is written into the bucket.
    ///
    /// # Errors
    ///
    /// `Weight` if the number of strides is not that of dimensions, if any element lies outside
    /// `bytes`, or if the elements are smaller than a byte.
    pub fn strided(
        name: impl Into<Arc<str>>,
        dtype: DType,
        shape: impl Into<Arc<[u64]>>,
        strides: impl Into<Arc<[i64]>>,
        offset: u64,
        bytes: impl Into<Storage>,
    ) -> Result<Self> {
        let meta = TensorMeta::new(name, dtype, shape);
        let byte_len = meta.validate()?;
        let (strides, bytes) = (strides.into(), bytes.into());
        if strides.len() != meta.shape.len() {
            return Err(meta.invalid(format!(
                "{} strides for {} dimensions",
                strides.len(),
                meta.shape.len()
            )));
        }
        let Some(size) = dtype.bytes() else {
            return Err(meta.invalid(format!("a strided view of {dtype} elements")));
        };
        if byte_len > 0 {
            let (mut low, mut high) = (i128::from(offset), i128::from(offset));
            for (&dimension, &stride) in meta.shape.iter().zip(strides.iter()) {
                let reach = i128::from(dimension - 1) * i128::from(stride);
                if reach < 0 { low += reach } else { high += reach }
            }
            let available = bytes.len() as i128 / i128::from(size);
            if low < 0 || high >= available {
                return Err(meta.invalid(format!(
                    "the view reaches elements {low} to {high} of a storage of {available}"
                )));
            }
        }
        let content = Content::Strided(Arc::new(Elements { bytes, strides, offset }));
        Ok(Self::whole(meta.into(), content, Treatment::Plain, byte_len).simplified(size))
    }

    /// A weight whose bytes an encoding produces.
    ///
    /// # Errors
    ///
    /// `Weight` if the description is invalid.
    pub fn encoded(
        meta: impl Into<ArenaArc<TensorMeta>>,
        encoding: Arc<dyn Encoding>,
        treatment: Treatment,
    ) -> Result<Self> {
        let meta = meta.into();
        let byte_len = meta.validate()?;
        Ok(Self::whole(meta, Content::Encoded(encoding), treatment, byte_len))
    }

    /// The same weight as a part of a tensor of the shape `full`: the elements of the box `region`. Without this a weight is a whole
    /// tensor.
    ///
    /// # Errors
    ///
    /// `Weight`, naming the tensor, if the box is not within that shape, or the weight does not have its extent in each
    /// dimension.
    ///
    /// # Examples
    ///
    /// ```
    /// use engine_core::{DType, TensorBox, Weight};
    ///
    /// // Rows 4 to 7 of a tensor of eight.
    /// let rows = Weight::new("lm_head.weight", DType::BF16, [4, 3], vec![0_u8; 24])?;
    /// let rows = rows.of_box([8, 3], TensorBox::new(&[4, 0], &[4, 3])?)?;
    /// assert_eq!(*rows.full_meta().shape, [8, 3]);
    /// assert!(rows.require_whole("sending").is_err());
    /// # Ok::<(), engine_core::Error>(())
    /// ```
    pub fn of_box(mut self, full: impl Into<Arc<[u64]>>, region: TensorBox) -> Result<Self> {
        let shape = full.into();
        TensorMeta { shape: shape.clone(), ..TensorMeta::clone(&self.meta) }.validate()?;
        let extent = region.ranges().iter().map(|range| range.end - range.start);
        if !region.fits(&shape) || !extent.eq(self.meta.shape.iter().copied()) {
            return Err(self.meta.invalid(format!(
                "{:?} elements are not the box {region} of a tensor of shape {shape:?}",
                self.meta.shape
            )));
        }
        let is_part = region != TensorBox::whole(&shape);
        self.part = is_part.then(|| Arc::new(Part { shape, region }));
        Ok(self)
    }

    /// The same weight as one of the named part of this number, whatever its name says: see [`Parts`](crate::Parts).
    #[must_use]
    pub fn in_part(self, part: u32) -> Self {
        Self { named_part: Some(part), ..self }
    }

    /// The number of the named part that it was put [in](Self::in_part).
    pub fn named_part(&self) -> Option<u32> {
        self.named_part
    }

    /// The same weight, with which a bucket ends though others would fit: what was sent so far does not wait for them. A stream says so at the
    /// same weights in each update, or the plan of the last one does not fit.
    #[must_use]
    pub fn ending_bucket(self) -> Self {
        Self { ends_bucket: true, ..self }
    }

    /// Whether a bucket [ends](Self::ending_bucket) with it.
    pub fn ends_bucket(&self) -> bool {
        self.ends_bucket
    }

    /// Name and type of the weight, with the shape of the full tensor that it is a box of.
    pub fn full_meta(&self) -> ArenaArc<TensorMeta> {
        match &self.part {
            None => self.meta.clone(),
            Some(part) => {
                TensorMeta { shape: part.shape.clone(), ..TensorMeta::clone(&self.meta) }.into()
            }
        }
    }

    /// The box of the full tensor that it is.
    pub fn region(&self) -> TensorBox {
        match &self.part {
            None => TensorBox::whole(&self.meta.shape),
            Some(part) => part.region.clone(),
        }
    }

    /// Whether it is this box of the tensor that `full` describes.
    pub fn is_box_of(&self, full: &TensorMeta, region: &TensorBox) -> bool {
        match &self.part {
            None => *self.meta == *full && region.is_whole(&full.shape),
            Some(part) => {
                let same = Arc::ptr_eq(&part.shape, &full.shape) || part.shape == full.shape;
                same && part.region == *region
                    && self.meta.dtype == full.dtype
                    && self.meta.has_name_of(full)
            }
        }
    }

    /// For whatever takes whole tensors alone: says that a part of one is none.
    ///
    /// # Errors
    ///
    /// `Weight`, naming tensor and box, if the weight is not a whole tensor.
    pub fn require_whole(&self, operation: &str) -> Result<()> {
        let Some(part) = &self.part else { return Ok(()) };
        let message = format!(
            "it is the box {} of a tensor of shape {:?}, and this takes whole tensors: placed updates take boxes",
            part.region, part.shape
        );
        Err(Error::new(ErrorKind::Weight, operation, message).tensor(self.name()))
    }

    /// A strided view that happens to be contiguous is a plain one, which copies faster.
    fn simplified(mut self, size: u64) -> Self {
        let Content::Strided(elements) = &self.content else {
            return self;
        };
        let Elements { bytes, strides, offset } = &**elements;
        let mut expected = 1_i128;
        let contiguous = self.meta.shape.iter().zip(strides.iter()).rev().all(|(&n, &stride)| {
            let matches = n <= 1 || i128::from(stride) == expected;
            expected *= i128::from(n);
            matches
        });
        if contiguous || self.byte_len == 0 {
            let start = if self.byte_len == 0 { 0 } else { offset * size };
            self.content = Content::Contiguous(bytes.slice(start..start + self.byte_len));
        }
        self
    }

    /// Name, type and shape as they travel; of a [box](Self::of_box) its extent, not the shape of the full tensor.
    ///
    /// It is shared. A clone of it is cheap, and clones are equal without a look at what they say.
    pub fn meta(&self) -> &ArenaArc<TensorMeta> {
        &self.meta
    }

    /// The tensor's name.
    pub fn name(&self) -> &str {
        &self.meta.name
    }

    /// Bytes that travel.
    pub fn byte_len(&self) -> u64 {
        self.byte_len
    }

    /// Bytes read from the trainer's memory.
    pub fn source_bytes(&self) -> u64 {
        match &self.content {
            Content::Encoded(encoding) => encoding.source_bytes(),
            _ => self.byte_len,
        }
    }

    /// The encoding, unless the weight is copied as it is.
    pub fn encoding(&self) -> Option<&Arc<dyn Encoding>> {
        match &self.content {
            Content::Encoded(encoding) => Some(encoding),
            _ => None,
        }
    }

    /// The tensor's bytes where they lie contiguous, in host memory or on a device.
    pub fn storage(&self) -> Option<&Storage> {
        match &self.content {
            Content::Contiguous(storage) => Some(storage),
            _ => None,
        }
    }

    /// Where the elements are, if they do not follow one another.
    pub fn strides(&self) -> Option<StridedView<'_>> {
        match &self.content {
            Content::Strided(elements) => {
                let Elements { bytes, strides, offset } = &**elements;
                Some(StridedView { storage: bytes, strides, offset: *offset })
            }
            _ => None,
        }
    }

    /// The tensor's bytes where they lie contiguous in host memory, shared and not copied.
    pub fn contiguous_bytes(&self) -> Option<&Bytes> {
        self.storage().and_then(Storage::host)
    }

    /// What happened to the weight so far.
    pub fn treatment(&self) -> &Treatment {
        &self.treatment
    }

    /// The same weight under another name.
    #[must_use]
    pub fn with_name(mut self, name: impl Into<Arc<str>>) -> Self {
        let meta = TensorMeta { name: name.into(), ..TensorMeta::clone(&self.meta) };
        self.meta = meta.into();
        self
    }

    /// The same weight, recorded as treated so.
    #[must_use]
    pub fn with_treatment(mut self, treatment: Treatment) -> Self {
        self.treatment = treatment;
        self
    }

    /// Where splitting the weight over buckets costs nothing, in bytes.
    pub fn granule(&self) -> u64 {
        match &self.content {
            Content::Encoded(encoding) => encoding.granule().max(1),
            _ => 1,
        }
    }

    /// Whether the weight's bytes exist only after earlier weights were encoded.
    pub fn is_deferred(&self) -> bool {
        self.encoding().is_some_and(|encoding| encoding.is_deferred())
    }

    /// Whether encoding it in host memory reads the memory of a device.
    pub fn reads_device(&self) -> bool {
        match &self.content {
            Content::Contiguous(storage) => storage.device().is_some(),
            Content::Strided(elements) => elements.bytes.device().is_some(),
            Content::Encoded(encoding) => encoding.reads_device(),
        }
    }

    /// Writes the bytes `range` of the tensor, as they travel, to `destination`.
    ///
    /// # Errors
    ///
    /// `Weight` if the range is not within the tensor or `destination` has another length, and
    /// whatever its encoding reports; all name the tensor.
    pub fn encode(&self, range: Range<u64>, destination: &mut [u8]) -> Result<()> {
        let len = range.end.checked_sub(range.start);
        if range.end > self.byte_len || len != Some(destination.len() as u64) {
            return Err(self.meta.invalid(format!(
                "bytes {range:?} of {} asked into {} bytes",
                self.byte_len,
                destination.len()
            )));
        }
        match &self.content {
            Content::Contiguous(storage) => {
                storage.read(range.start, destination).map_err(|e| e.tensor(self.name()))
            }
            Content::Strided(elements) => {
                let Elements { bytes, strides, offset } = &**elements;
                // `strided` refuses types whose elements share bytes.
                let size = self.meta.dtype.bytes().unwrap_or(1) as usize;
                let view = Strided { shape: &self.meta.shape, strides, offset: *offset, size };
                let read = view.reach(&range);
                let packed = match bytes.host() {
                    Some(bytes) => Ok(bytes.clone()),
                    // Every read of a device takes its time: all that it needs comes at once.
                    None => bytes.slice(read.clone()).to_host(),
                };
                let from = if bytes.host().is_some() { 0 } else { read.start };
                let bytes = packed.map_err(|e| e.tensor(self.name()))?;
                view.pack(&bytes, from, range.start, destination);
                Ok(())
            }
            Content::Encoded(encoding) => {
                encoding.encode_host(range, destination).map_err(|e| e.tensor(self.name()))
            }
        }
    }

    /// The whole tensor as contiguous bytes in host memory: shared where they are that, encoded or
    /// copied into new memory where they are not.
    ///
    /// # Errors
    ///
    /// As [`encode`](Self::encode).
    pub fn to_bytes(&self) -> Result<Bytes> {
        if let Some(bytes) = self.contiguous_bytes() {
            return Ok(bytes.clone());
        }
        let mut bytes = vec![0; self.byte_len as usize];
        self.encode(0..self.byte_len, &mut bytes)?;
        Ok(bytes.into())
    }
}

impl fmt::Debug for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Weight")
            .field("meta", &self.meta)
            .field("part", &self.part)
            .field("encoding", &self.encoding().map_or("copy", |encoding| encoding.name()))
            .field("treatment", &self.treatment)
            .finish_non_exhaustive()
    }
}

/// Elements that do not follow one another, all counted in elements; see [`Weight::strided`].
#[derive(Clone, Copy, Debug)]
pub struct StridedView<'a> {
    /// What they are in.
    pub storage: &'a Storage,
    /// How far it is from one to the next in each dimension.
    pub strides: &'a [i64],
    /// Where the first is.
    pub offset: u64,
}

struct Strided<'a> {
    shape: &'a [u64],
    strides: &'a [i64],
    offset: u64,
    size: usize,
}

impl Strided<'_> {
    /// Packs the output bytes from `start` on, row by row of the innermost dimension.
    ///
    /// The range may begin and end in the middle of an element; bounds were checked when the weight
    /// was made, so the slicing below cannot fail.
    /// `source` begins at byte `base` of the storage.
    fn pack(&self, source: &[u8], base: u64, start: u64, mut destination: &mut [u8]) {
        let size = self.size as u64;
        let mut element = start / size;
        let mut skip = (start % size) as usize;
        let row = self.shape.last().copied().unwrap_or(1);
        let stride = self.strides.last().copied().unwrap_or(1);
        while !destination.is_empty() {
            let column = element % row;
            let mut at = self.position(element);
            for _ in column..row {
                let from = (at * i128::from(size) - i128::from(base)) as usize + skip;
                let take = (self.size - skip).min(destination.len());
                let (now, rest) = destination.split_at_mut(take);
                now.copy_from_slice(&source[from..from + take]);
                destination = rest;
                skip = 0;
                element += 1;
                at += i128::from(stride);
                if destination.is_empty() {
                    return;
                }
            }
        }
    }

    /// Which bytes of the storage the output bytes of a range lie in.
    fn reach(&self, range: &Range<u64>) -> Range<u64> {
        if range.is_empty() {
            return 0..0;
        }
        let size = self.size as u64;
        let (first, last) = (range.start / size, (range.end - 1) / size);
        // Sides within which first and last agree are fixed; of the first that differs, all between may occur; of those within
        // it, any.
        let (mut low, mut high) = (i128::from(self.offset), i128::from(self.offset));
        let mut count: u64 = self.shape.iter().product();
        let mut is_same = true;
        let (mut first, mut last) = (first, last);
        for (&side, &stride) in self.shape.iter().zip(self.strides) {
            count /= side;
            let (a, b) = (first / count, last / count);
            (first, last) = (first % count, last % count);
            let ends = if is_same { [a, b] } else { [0, side - 1] };
            is_same &= a == b;
            let reaches = ends.map(|end| i128::from(end) * i128::from(stride));
            low += reaches[0].min(reaches[1]);
            high += reaches[0].max(reaches[1]);
        }
        // Within the storage, as the whole view is.
        (low as u64 * size)..((high as u64 + 1) * size)
    }

    /// Where an element of the packed tensor lies in the storage, in elements.
    fn position(&self, mut element: u64) -> i128 {
        let mut at = i128::from(self.offset);
        for (&dimension, &stride) in self.shape.iter().zip(self.strides).rev() {
            at += i128::from(element % dimension) * i128::from(stride);
            element /= dimension;
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DeviceBytes;
    use crate::storage::tests::Elsewhere;
    use proptest::prelude::*;

    #[test]
    fn a_transposed_view_is_packed_row_by_row() {
        let storage: Vec<u8> = (0..12_u8).collect();
        // The transpose of a 2 × 3 matrix of two-byte elements.
        let weight = Weight::strided("t", DType::U16, [3, 2], [1_i64, 3], 0, storage).unwrap();
        assert_eq!(&weight.to_bytes().unwrap()[..], [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]);
        let mut middle = [0; 5];
        weight.encode(3..8, &mut middle).unwrap();
        assert_eq!(middle, [7, 2, 3, 8, 9]);
    }

    proptest! {
        #[test]
        fn any_part_of_a_view_on_a_device_reads_within_the_view_and_is_as_on_the_host(
            dimensions in proptest::collection::vec((1_u64..5, any::<bool>()), 1..4),
            order in any::<u64>(),
            part in (0.0..1.0_f64, 0.0..1.0_f64),
        ) {
            // A dense tensor whose dimensions lie in another order, some of them from their end.
            let mut places: Vec<usize> = (0..dimensions.len()).collect();
            places.sort_by_key(|&place| order.rotate_left(place as u32 * 17) ^ place as u64);
            let (mut strides, mut step, mut offset) = (vec![0_i64; places.len()], 1, 0);
            for &place in &places {
                let (side, is_reversed) = dimensions[place];
                strides[place] = if is_reversed { -step } else { step };
                offset += if is_reversed { (side as i64 - 1) * step } else { 0 };
                step *= side as i64;
            }
            let shape: Vec<u64> = dimensions.iter().map(|&(side, _)| side).collect();
            let bytes: Vec<u8> = (0..step as u32 * 2).map(|n| (n * 7 % 251) as u8).collect();
            let weight = |storage: Storage| {
                Weight::strided("v", DType::U16, &*shape, &*strides, offset as u64, storage).unwrap()
            };
            let host = weight(bytes.clone().into());
            let there = weight(DeviceBytes::new(Arc::new(Elsewhere(bytes))).into());
            let ends = [part.0, part.1].map(|at| (at * host.byte_len() as f64) as u64);
            let range = ends[0].min(ends[1])..ends[0].max(ends[1]);
            let mut expected = vec![0; (range.end - range.start) as usize];
            let mut found = expected.clone();
            host.encode(range.clone(), &mut expected).unwrap();
            there.encode(range, &mut found).unwrap();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn a_box_is_its_extent_of_the_full_tensor_or_refused_and_the_whole_is_no_part() {
        let half = || Weight::new("w", DType::U8, [2, 3], vec![0; 6]).unwrap();
        let region = |offset: [u64; 2], extent: [u64; 2]| TensorBox::new(&offset, &extent).unwrap();
        for (full, wrong) in [
            ([4, 3], region([3, 0], [2, 3])),
            ([4, 3], region([0, 0], [3, 2])),
            ([u64::MAX, 3], region([0, 0], [2, 3])),
        ] {
            let error = half().of_box(full, wrong).unwrap_err();
            assert_eq!(error.report().tensor.as_deref(), Some("w"), "{error}");
        }
        let lower = half().of_box([4, 3], region([2, 0], [2, 3])).unwrap();
        assert_eq!(lower.region(), region([2, 0], [2, 3]));
        let error = lower.require_whole("sending").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Weight);
        assert!(error.to_string().contains("[2..4, 0..3]"), "{error}");
        let whole = half().of_box([2, 3], region([0, 0], [2, 3])).unwrap();
        whole.require_whole("sending").unwrap();
    }

    #[test]
    fn a_contiguous_slice_of_a_storage_is_shared_not_copied() {
        let storage = Bytes::from((0..32_u8).collect::<Vec<_>>());
        let weight =
            Weight::strided("s", DType::U8, [2, 4], [4_i64, 1], 8, storage.clone()).unwrap();
        let bytes = weight.contiguous_bytes().expect("contiguous");
        assert_eq!(bytes.as_ptr(), storage[8..].as_ptr());
    }

    #[test]
    fn a_view_that_leaves_its_storage_is_refused() {
        for (strides, offset) in [([4_i64, 1], 9), ([4, -1], 0), ([i64::MAX, 1], 0)] {
            let error = Weight::strided("v", DType::U8, [2, 4], strides, offset, vec![0; 16]);
            assert_eq!(error.unwrap_err().kind(), ErrorKind::Weight);
        }
    }

    #[test]
    fn sizes_that_overflow_or_share_bytes_are_refused() {
        for (dtype, shape) in [
            (DType::F32, vec![u64::MAX, 2]),
            (DType::F64, vec![u64::MAX / 4]),
            (DType::F4, vec![3]),
        ] {
            assert!(TensorMeta::new("x", dtype, shape).validate().is_err());
        }
        assert_eq!(TensorMeta::new("x", DType::F4, [2, 3]).validate().unwrap(), 3);
        assert_eq!(TensorMeta::new("x", DType::F32, []).validate().unwrap(), 4);
        assert_eq!(TensorMeta::new("x", DType::F32, [0, 9]).validate().unwrap(), 0);
    }

    #[test]
    fn descriptions_are_equal_whether_they_share_their_memory_or_not() {
        let meta = |name: &str, dtype, shape: &[u64]| TensorMeta::new(name, dtype, shape);
        let one = meta("a", DType::F32, &[2, 3]);
        assert!(one == one.clone() && one == meta("a", DType::F32, &[2, 3]));
        for other in [
            TensorMeta { dtype: DType::F16, ..one.clone() },
            TensorMeta { name: "b".into(), ..one.clone() },
            TensorMeta { shape: [3, 2].into(), ..one.clone() },
        ] {
            assert_ne!(one, other);
        }
    }
}
