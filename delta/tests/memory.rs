//! Copies lie in whatever kind of memory a rank's device has, and where there is no room for them, updates go on without.

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use bytes::Bytes;
use delta::LAYER;
use engine_core::changes::{
    Applied, Changes, Compared, Cut, Difference, Due, ShadowBytes, ShadowMemory, ShadowPart,
    exchange,
};
use engine_core::memory::Pool;
use engine_core::provider::{Allocation, Lifetime, MemoryKind};
use engine_core::{
    ArenaArc, CheckpointEngineConfig, DType, DeviceChoice, EngineContext, Error, ErrorKind, Rank,
    Registry, Result, RolloutEngine, SendReport, Storage, TensorMeta, TrainerEngine, Version,
    Weight, digest, ensure_async_iterator, form_local_group,
};

/// A device that is only made of copies: one after the other, without threads, on as many bytes as there are.
#[derive(Debug)]
struct Lab {
    /// Bytes that are left on each device, by its number.
    left: [AtomicU64; 9],
    /// The copies on each device, in the order in which they were allocated.
    copies: [Mutex<Vec<Weak<Mutex<Bytes>>>>; 9],
}

static LAB: Lab =
    Lab { left: [const { AtomicU64::new(0) }; 9], copies: [const { Mutex::new(Vec::new()) }; 9] };

/// Changes a bit of the copy of this number, of those that are on a device.
fn flip(device: usize, number: usize) {
    let copies = LAB.copies[device].lock().expect("no panic");
    let mut copies = copies.iter().filter_map(Weak::upgrade);
    let copy = copies.nth(number).expect("so many copies");
    let bytes = &mut *copy.lock().expect("no panic");
    let mut flipped = bytes.to_vec();
    flipped[700] ^= 8;
    *bytes = flipped.into();
}

impl MemoryKind for Lab {
    fn name(&self) -> &'static str {
        "lab"
    }

    fn allocate(&self, _: &DeviceChoice, _: u32, _: u64, _: Lifetime) -> Result<Allocation> {
        Err(Error::new(ErrorKind::Backend, "allocating", "there are no buckets in a lab"))
    }

    fn shadows(&self, device: &DeviceChoice) -> Result<Option<Arc<dyn ShadowMemory>>> {
        Ok(Some(Arc::new(OfLab(device.ordinal().unwrap_or(0) as usize))))
    }
}

#[derive(Debug)]
struct OfLab(usize);

#[derive(Debug)]
struct Copied(Arc<Mutex<Bytes>>);

impl Copied {
    fn bytes(&self) -> Bytes {
        self.0.lock().expect("no panic").clone()
    }
}

impl ShadowBytes for Copied {
    fn len(&self) -> u64 {
        self.bytes().len() as u64
    }
    fn view(&self) -> Storage {
        self.bytes().into()
    }
}

fn bytes_of(copy: &dyn ShadowBytes) -> Bytes {
    let copy: &dyn Any = copy;
    copy.downcast_ref::<Copied>().expect("a copy of the lab").bytes()
}

fn set(copy: &mut dyn ShadowBytes, bytes: Vec<u8>) {
    let copy: &mut dyn Any = copy;
    let copy = copy.downcast_mut::<Copied>().expect("a copy of the lab");
    *copy.0.lock().expect("no panic") = bytes.into();
}

impl ShadowMemory for OfLab {
    fn batch(&self) -> u64 {
        5000
    }

    fn allocate(&self, lens: &[u64]) -> Result<Vec<Box<dyn ShadowBytes>>> {
        let all: u64 = lens.iter().sum();
        let take = |left: u64| left.checked_sub(all);
        LAB.left[self.0].fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).map_err(
            |left| {
                let message = format!("{all} bytes of {left}");
                Error::new(ErrorKind::Resource, "allocating in the lab", message)
            },
        )?;
        let mut copies = LAB.copies[self.0].lock().expect("no panic");
        let mut copy = |len: &u64| {
            let bytes = Arc::new(Mutex::new(vec![0; *len as usize].into()));
            copies.push(Arc::downgrade(&bytes));
            Box::new(Copied(bytes))
        };
        Ok(lens.iter().map(|len| copy(len) as Box<dyn ShadowBytes>).collect())
    }

    fn encode(
        &self,
        weights: &[Weight],
        to: &mut [Box<dyn ShadowBytes>],
        pool: &Pool,
    ) -> Result<Vec<u64>> {
        for (weight, to) in weights.iter().zip(&mut *to) {
            set(&mut **to, weight.to_bytes()?.to_vec());
        }
        self.sums(&to.iter().map(|copy| &**copy).collect::<Vec<_>>(), pool)
    }

    fn write(&self, to: &mut [Box<dyn ShadowBytes>], parts: &[ShadowPart], _: &Pool) -> Result<()> {
        for ShadowPart { of, start, bytes } in parts {
            let mut all = bytes_of(&*to[*of]).to_vec();
            bytes.read(0, &mut all[*start as usize..(start + bytes.len()) as usize])?;
            set(&mut *to[*of], all);
        }
        Ok(())
    }

    fn sums(&self, of: &[&dyn ShadowBytes], _: &Pool) -> Result<Vec<u64>> {
        Ok(of.iter().map(|copy| digest::sum(0, &bytes_of(*copy))).collect())
    }

    fn compare(&self, weights: &[(&Weight, &dyn ShadowBytes)], _: &Pool) -> Result<Compared> {
        let mut values = Vec::new();
        let mut found = Vec::new();
        for (weight, copy) in weights {
            let cut = Cut::at(weight.meta().dtype, weight.granule());
            let mut changes = Changes::default();
            changes.compare(cut, 0, &bytes_of(*copy), &weight.to_bytes()?);
            let Changes { words, units, sum, values: own, .. } = changes;
            let all = Difference { cut, words, len: own.len() as u64, units, sum };
            found.push(all.without_words_of_nothing());
            values.extend(own);
        }
        Ok(Compared { weights: found, values: values.into() })
    }

    fn apply(
        &self,
        due: &mut [Due<'_>],
        values: &Storage,
        wanted: bool,
        _: &Pool,
    ) -> Result<Applied> {
        let (mut values, mut sums) = (values.to_host()?.to_vec(), Vec::new());
        let mut rest = &mut values[..];
        for Due { to, cut, words, .. } in due {
            let mut all = bytes_of(&***to).to_vec();
            if words.is_empty() {
                sums.push(0);
                continue;
            }
            let places = cut.places(to.len(), words).expect("a word for each tile");
            let (own, others) = rest.split_at_mut(*places.last().expect("an end") as usize);
            rest = others;
            sums.push(exchange(*cut, &mut all, words, own).expect("changes of this weight"));
            set(&mut ***to, all);
        }
        Ok(Applied { sums, undo: wanted.then(|| values.into()) })
    }
}

fn context(rank: u32, device: &str, on_host: bool) -> EngineContext {
    let mut config = CheckpointEngineConfig::default();
    config.timeout_seconds = 20.0;
    config.device = device.parse().expect("a device");
    config.layers.insert("delta".into(), true.into());
    config.layers.insert("delta_on_host".into(), on_host.into());
    EngineContext::new(config).with_rank(Rank(rank))
}

type Group = (Box<dyn TrainerEngine>, Box<dyn RolloutEngine>);

/// A trainer and a rollout, each on a device of its own.
async fn group(devices: [&str; 2]) -> Group {
    group_with(devices, false).await
}

async fn group_with(devices: [&str; 2], on_host: bool) -> Group {
    static REGISTRY: OnceLock<Registry> = OnceLock::new();
    let registry = REGISTRY.get_or_init(|| {
        Registry::new().with(backend_naive::BACKEND).with_memory(&LAB).with_layer(LAYER)
    });
    let trainer =
        registry.prepare_trainer(context(0, devices[0], on_host)).await.expect("a trainer");
    let rollout =
        registry.prepare_rollout(context(1, devices[1], on_host)).await.expect("a rollout");
    let formed = form_local_group(backend_naive::BACKEND, vec![trainer], vec![rollout]);
    let (mut trainers, mut rollouts) = formed.await.expect("a group");
    (trainers.remove(0), rollouts.remove(0))
}

fn weights(version: u64) -> Vec<Weight> {
    let weight = |at: u64| {
        let mut bytes: Vec<u8> = (0..3000).map(|byte| (byte * 7 + at) as u8).collect();
        bytes.iter_mut().step_by(90).for_each(|byte| *byte = version as u8);
        Weight::new(format!("w{at}"), DType::BF16, [1500], bytes).expect("a weight")
    };
    (0..9).map(weight).collect()
}

/// Sends a version, and checks what arrives.
async fn update((trainer, rollout): &mut Group, version: u64) -> SendReport {
    let send = trainer.send_weights(ensure_async_iterator(weights(version)), Version(version));
    let (sent, received) = futures::join!(send, receive(&mut **rollout));
    assert_is(received.expect("an update"), version);
    sent.expect("an update")
}

async fn receive(rollout: &mut dyn RolloutEngine) -> Result<Vec<(ArenaArc<TensorMeta>, Bytes)>> {
    let mut received = rollout.receive_weights(None).await?;
    let mut all = Vec::new();
    while let Some(weight) = received.next_tensor().await? {
        all.push((weight.meta().clone(), weight.to_bytes()?));
    }
    received.finish().await.map(|_| all)
}

fn assert_is(received: Vec<(ArenaArc<TensorMeta>, Bytes)>, version: u64) {
    let expected = weights(version).into_iter();
    let expected = expected.map(|one| (one.meta().clone(), one.to_bytes().expect("bytes")));
    assert!(received.into_iter().eq(expected));
}

/// Attests the version that was sent last. Returns the trainer's report, and the rollout's weights.
async fn attest(
    group: &mut Group,
) -> (Result<SendReport>, Result<Vec<(ArenaArc<TensorMeta>, Bytes)>>) {
    let (trainer, rollout) = group;
    futures::join!(trainer.attest(), receive(&mut **rollout))
}

fn whole(report: &SendReport) -> Option<&str> {
    report.delta.as_ref().expect("a report").whole.as_deref()
}

#[tokio::test]
async fn ranks_whose_copies_lie_in_other_memory_understand_each_other() {
    for device in 0..2 {
        LAB.left[device].store(100_000, Ordering::Relaxed);
    }
    for devices in [["lab:0", "lab:1"], ["lab:0", "cpu"], ["cpu", "lab:1"]] {
        let mut group = group(devices).await;
        for version in 1..5 {
            let report = update(&mut group, version).await;
            assert_eq!(whole(&report).is_some(), version == 1, "{devices:?}: {report:?}");
            let delta = report.delta.expect("a report");
            assert_eq!(delta.changed_weights, if version == 1 { 0 } else { 9 });
            assert_eq!(delta.shadow_bytes, 27_000);
        }
    }
}

#[tokio::test]
async fn copies_lie_in_host_memory_where_that_is_asked_for() {
    // There is no room in the lab.
    LAB.left[4].store(0, Ordering::Relaxed);
    let mut group = group_with(["lab:4", "lab:4"], true).await;
    for version in 1..4 {
        let report = update(&mut group, version).await;
        assert_eq!(whole(&report).is_some(), version == 1, "{report:?}");
        assert_eq!(report.delta.expect("a report").shadow_bytes, 27_000);
    }
}

#[tokio::test]
async fn a_trainer_without_room_for_a_copy_sends_whole_weights_and_says_so() {
    // Room for some batches, so that others have travelled out of the copy when there is none left.
    for room in [0, 7_000, 20_000] {
        LAB.left[2].store(room, Ordering::Relaxed);
        let mut group = group(["lab:2", "cpu"]).await;
        for version in 1..4 {
            LAB.left[2].store(room, Ordering::Relaxed);
            let report = update(&mut group, version).await;
            assert!(
                whole(&report).is_some_and(|why| why.contains("no copy is kept")),
                "{report:?}"
            );
            assert_eq!(report.delta.expect("a report").shadow_bytes, 0);
        }
        LAB.left[2].store(100_000, Ordering::Relaxed);
        update(&mut group, 8).await;
        assert_eq!(whole(&update(&mut group, 9).await), None);
    }
}

#[tokio::test]
async fn a_rollout_without_room_for_a_copy_gets_whole_weights() {
    LAB.left[3].store(10_000, Ordering::Relaxed);
    let mut group = group(["cpu", "lab:3"]).await;
    for version in 1..4 {
        let report = update(&mut group, version).await;
        assert!(whole(&report).is_some(), "{report:?}");
    }
    LAB.left[3].store(100_000, Ordering::Relaxed);
    update(&mut group, 4).await;
    assert_eq!(whole(&update(&mut group, 5).await), None);
}

#[tokio::test]
async fn a_bit_that_changed_by_itself_is_found_on_demand_and_its_rank_and_tensor_named() {
    for device in [5, 6] {
        LAB.left[device].store(1_000_000, Ordering::Relaxed);
    }
    let mut group = group(["lab:5", "lab:6"]).await;
    let mut version = 0;
    for (device, rank, number, name) in [(6, 1, 4, "w4"), (5, 0, 0, "w0"), (6, 1, 8, "w8")] {
        for whole_comes in [true, false] {
            version += 1;
            let report = update(&mut group, version).await;
            assert_eq!(whole(&report).is_some(), whole_comes, "{report:?}");
            let (sent, received) = attest(&mut group).await;
            let report = sent.expect("nothing changed");
            assert_eq!((report.version, whole(&report)), (Version(version), None));
            assert!(report.delta.expect("a report").attested);
            assert!(report.counts.wire_bytes < 1000, "{:?}", report.counts);
            assert_is(received.expect("nothing changed"), version);
        }
        flip(device, number);
        let (sent, received) = attest(&mut group).await;
        let error = sent.expect_err("a bit changed");
        let context = (error.report().rank, error.report().tensor.as_deref());
        assert_eq!((error.kind(), context), (ErrorKind::Digest, (Some(Rank(rank)), Some(name))));
        assert!(received.is_err(), "the rollout took the version");
    }
    update(&mut group, 50).await;
    flip(5, 3);
    assert!(attest(&mut group).await.0.is_err());
    // The trainer knows by itself that it has no copy now.
    let error = group.0.attest().await.expect_err("no copy");
    assert_eq!(error.kind(), ErrorKind::State);
    assert!(error.to_string().contains("w3"), "{error}");
    let report = update(&mut group, 51).await;
    assert!(whole(&report).is_some_and(|why| why.contains("w3")), "{report:?}");
}

#[tokio::test]
async fn sums_are_computed_again_every_64_versions_on_both_sides() {
    for device in [0, 1] {
        LAB.left[device].store(1_000_000, Ordering::Relaxed);
    }
    let mut group = group(["lab:0", "lab:1"]).await;
    let mut attested = Vec::new();
    for version in 1..=140 {
        let report = update(&mut group, version).await;
        if report.delta.expect("a report").attested {
            attested.push(version);
        }
    }
    assert_eq!(attested, [65, 129]);
}

#[tokio::test]
async fn a_rollout_without_a_copy_gets_what_a_part_does_not_bring_out_of_the_trainers() {
    LAB.left[7].store(1_000_000, Ordering::Relaxed);
    LAB.left[8].store(10_000, Ordering::Relaxed);
    let mut group = group(["lab:7", "lab:8"]).await;
    update(&mut group, 1).await;
    let send = async |version: u64, group: &mut Group| {
        let (trainer, rollout) = group;
        let part = weights(version).into_iter().take(2);
        let send = trainer.send_part(ensure_async_iterator(part), Version(version));
        let (sent, received) = futures::join!(send, receive(&mut **rollout));
        let expected = weights(version).into_iter().take(2).chain(weights(1).into_iter().skip(2));
        let expected: Vec<_> =
            expected.map(|one| (one.meta().clone(), one.to_bytes().expect("bytes"))).collect();
        sent.inspect(|_| assert_eq!(received.expect("an update"), expected))
    };
    for (version, room, is_whole) in [(2, 10_000, true), (3, 100_000, true), (4, 100_000, false)] {
        LAB.left[8].store(room, Ordering::Relaxed);
        let report = send(version, &mut group).await.expect("a part");
        assert_eq!(whole(&report).is_some(), is_whole, "version {version}: {report:?}");
    }
    // Of what is sent whole out of the copy, every sum is computed before.
    flip(8, 0);
    assert!(attest(&mut group).await.0.is_err());
    flip(7, 5);
    let error = send(5, &mut group).await.expect_err("a bit changed");
    assert_eq!((error.kind(), error.report().rank), (ErrorKind::Digest, Some(Rank(0))));
    update(&mut group, 6).await;
}
