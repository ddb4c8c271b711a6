//! A program's own tensors, which an update is copied into: a bucket at a time, on a GPU by one launch.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use device_cuda::{CudaCopyOut, CudaSlice, Device, Packer, Places};
use engine_core::plan::BucketLayout;
use engine_core::{
    CopyOut, Error, ErrorKind, Install, ReceiveReport, ReceivedBucket, ReceivedPiece, Result,
    Storage, TensorMeta,
};
use pyo3::prelude::*;

use crate::engines::Engine;
use crate::errors::OrRaise;
use crate::receiving::Names;
use crate::tensor::{Place, Reader, Target, item, synchronize_torch};
use crate::work::{Own, Owner, Slot, lock};

pub(crate) const WHAT: &str = "receiving into tensors";

/// Tensors, read once and used for many updates.
#[pyclass(frozen)]
#[derive(Debug)]
pub(crate) struct Destination {
    own: Own<(Arc<Slot<Tensors>>, Vec<Device>)>,
}

impl Destination {
    /// Its tensors, once the work is done that this thread has enqueued on torch's streams: it may read them.
    pub(crate) fn tensors(&self, py: Python<'_>) -> PyResult<Arc<Slot<Tensors>>> {
        let (tensors, devices) = self.own.get().or_raise(py)?;
        synchronize_torch(py, devices)?;
        Ok(Arc::clone(tensors))
    }
}

#[pymethods]
impl Destination {
    /// Of pairs of a name and a tensor. A partial one may get updates that bring only some of them.
    #[new]
    fn new(tensors: &Bound<'_, PyAny>, partial: bool) -> PyResult<Self> {
        let py = tensors.py();
        let mut reader = Reader::default();
        let mut targets = Vec::new();
        for pair in tensors.try_iter()? {
            let (name, tensor) = item(&pair?)?;
            targets.push(reader.target(name.to_str()?, &tensor).or_raise(py)?);
        }
        reader.synchronize(py).or_raise(py)?;
        let tensors = Tensors::new(targets, partial).or_raise(py)?;
        let devices = tensors.devices().cloned().collect();
        Ok(Self { own: Own::new((Arc::new(Slot::new("destination", tensors)), devices)) })
    }
}

pub(crate) struct Tensors {
    targets: Vec<Target>,
    /// Their numbers, by name.
    index: HashMap<Arc<str>, usize>,
    /// All names, unless an update may bring only some.
    expected: Option<Arc<[Arc<str>]>>,
    /// By the numbers of the devices that have tensors.
    copies: BTreeMap<i32, Arc<CudaCopyOut>>,
    /// The names that the last update brought.
    came: Vec<Arc<str>>,
}

impl std::fmt::Debug for Tensors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tensors").field("len", &self.targets.len()).finish_non_exhaustive()
    }
}

impl Tensors {
    fn new(targets: Vec<Target>, partial: bool) -> Result<Self> {
        check_apart(&targets)?;
        let names = || targets.iter().map(|target| Arc::clone(&target.meta.name)).collect();
        let expected = if partial { None } else { Some(names()) };
        let mut copies = BTreeMap::new();
        for target in &targets {
            if let Place::Device(memory) = &target.place
                && !copies.contains_key(&memory.device().ordinal())
            {
                let packer = Packer::new(memory.device())?;
                copies.insert(memory.device().ordinal(), Arc::new(CudaCopyOut::new(packer)));
            }
        }
        let names = targets.iter().map(|target| Arc::clone(&target.meta.name));
        let index: HashMap<_, _> = names.zip(0..).collect();
        if index.len() < targets.len() {
            return Err(Error::new(ErrorKind::Weight, WHAT, "two tensors have one name"));
        }
        Ok(Self { targets, index, expected, copies, came: Vec::new() })
    }

    fn devices(&self) -> impl Iterator<Item = &Device> {
        self.copies.values().map(|copies| copies.packer().device())
    }

    /// The tensor that a weight is copied into, and its number.
    fn target(&self, meta: &TensorMeta) -> Result<(usize, &Target)> {
        let refuse = |message| Error::new(ErrorKind::Mismatch, WHAT, message).tensor(&*meta.name);
        let Some(&index) = self.index.get(&meta.name) else {
            return Err(refuse("the destination has no tensor of this name".to_owned()));
        };
        let target = &self.targets[index];
        if (target.meta.dtype, &target.meta.shape) != (meta.dtype, &meta.shape) {
            return Err(refuse(format!(
                "it is {} {:?}, and the destination's is {} {:?}",
                meta.dtype, meta.shape, target.meta.dtype, target.meta.shape
            )));
        }
        Ok((index, target))
    }

    /// Where the pieces of a bucket belong, if all of them belong on a device.
    fn places(&self, layout: &BucketLayout, device: &Device) -> Result<Option<Places>> {
        let mut places = Places::default();
        for piece in layout.pieces() {
            match &self.target(&piece.meta)?.1.place {
                Place::Device(memory) if memory.device().ordinal() == device.ordinal() => {
                    places.push(piece, memory)?;
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(places))
    }
}

/// Tensors that share memory would be written by two threads at once, and the last one would win.
fn check_apart(targets: &[Target]) -> Result<()> {
    let range = |target: &Target| match &target.place {
        Place::Host(memory) => (None, memory.range()),
        Place::Device(memory) => {
            let start = memory.address();
            (Some(memory.device().ordinal()), start..start + memory.len() as u64)
        }
    };
    let mut ranges: Vec<_> = targets.iter().map(|target| (range(target), target)).collect();
    ranges.retain(|((_, range), _)| !range.is_empty());
    ranges.sort_by_key(|((device, range), _)| (*device, range.start));
    for pair in ranges.windows(2) {
        if let [((device, before), one), ((same, after), other)] = pair
            && device == same
            && after.start < before.end
        {
            let message = format!("it shares memory with `{}`: give one of the two", one.meta.name);
            return Err(Error::new(ErrorKind::Weight, WHAT, message).tensor(&*other.meta.name));
        }
    }
    Ok(())
}

impl Install for Tensors {
    fn install(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        for copies in self.copies.values() {
            let place = |layout: &BucketLayout| self.places(layout, copies.packer().device());
            if copies.install(bucket, place)? {
                return Ok(());
            }
        }
        self.install_apart(bucket)
    }

    /// Of tensors that are all on one device: an update comes to one.
    fn copies(&self) -> Option<Arc<dyn CopyOut>> {
        let mut devices = self.copies.values();
        match (devices.next(), devices.next()) {
            (Some(one), None) => Some(one.clone()),
            _ => None,
        }
    }

    fn expects(&self) -> Option<Arc<[Arc<str>]>> {
        self.expected.clone()
    }

    fn completed(&mut self, names: Vec<Arc<str>>) {
        self.came = names;
    }
}

impl Tensors {
    /// Installs a bucket whose pieces are not all in one memory, or do not all belong there.
    fn install_apart(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        let mut on_devices: BTreeMap<i32, Vec<(CudaSlice, CudaSlice)>> = BTreeMap::new();
        let mut on_host = Vec::new();
        for piece in bucket.pieces() {
            let (index, target) = self.target(&piece.meta)?;
            let Place::Device(memory) = &target.place else {
                on_host.push((index, piece));
                continue;
            };
            let part = memory.slice(piece.start as usize, piece.bytes.len() as usize)?;
            match CudaSlice::of_storage(&piece.bytes) {
                Some(source) => {
                    let copies = on_devices.entry(memory.device().ordinal()).or_default();
                    copies.push((source, part));
                }
                None => part.write(&piece.bytes.to_host()?)?,
            }
        }
        bucket.copy_out(self.on_host(&mut on_host)?)?;
        for (number, pieces) in on_devices {
            // `new` has made one for each device that a tensor is on.
            if let Some(copies) = self.copies.get(&number) {
                copies.packer().copy(pieces)?;
            }
        }
        Ok(())
    }

    /// What is to be copied within the host, and where to; no two of the pieces are of one tensor.
    fn on_host<'a>(
        &'a mut self,
        pieces: &'a mut [(usize, ReceivedPiece)],
    ) -> Result<Vec<(&'a Storage, &'a mut [u8])>> {
        pieces.sort_unstable_by_key(|(index, _)| *index);
        let (mut rest, mut passed) = (&mut self.targets[..], 0);
        let mut copies = Vec::with_capacity(pieces.len());
        for (index, piece) in pieces {
            let (start, len) = (piece.start as usize, piece.bytes.len() as usize);
            let between =
                index.checked_sub(passed).and_then(|skip| rest.split_at_mut_checked(skip));
            let target = between.and_then(|(_, from)| from.split_first_mut());
            let Some((Target { place: Place::Host(memory), .. }, after)) = target else {
                let message = "a bucket has two parts of it";
                return Err(
                    Error::new(ErrorKind::Protocol, WHAT, message).tensor(&*piece.meta.name)
                );
            };
            // The engine has checked that a part lies within its weight, which has the tensor's size.
            copies.push((&piece.bytes, &mut memory.bytes()[start..start + len]));
            (rest, passed) = (after, *index + 1);
        }
        Ok(copies)
    }
}

/// One update, into a destination that no other update uses meanwhile.
pub(crate) async fn receive(
    slot: &Slot<Engine>,
    names: &Names,
    destination: &Slot<Tensors>,
    version: Option<u64>,
    owner: &Owner,
) -> Result<ReceiveReport> {
    let mut tensors = destination.take(WHAT, owner)?;
    let mut engine = slot.take(WHAT, owner)?;
    let received = engine.get()?.receive(version).await?;
    let version = received.version();
    let report = received.install(tensors.get()?).await?;
    *lock(names) = Some((version.0, std::mem::take(&mut tensors.get()?.came)));
    Ok(report)
}
