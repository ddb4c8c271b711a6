//! Changes that a GPU finds and applies, bit for bit those of the CPU.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use device_cuda::{CudaShadows, Device, upload};
use engine_core::changes::{
    Changes, Compared, Cut, Difference, Due, ShadowBytes, ShadowMemory, ShadowPart, exchange,
};
use engine_core::memory::Pool;
use engine_core::{DType, ErrorKind, Storage, Weight, digest};
use futures::StreamExt;
use quant_fp8::rules::{Receiver, Rules, RulesConfig};
use quant_fp8::{Fp8Quantizer, QuantizeFp8};

const DTYPES: [DType; 5] = [DType::U8, DType::BF16, DType::F32, DType::F64, DType::F8_E4M3];

/// Numbers that look random.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }
}

/// A weight of a name, a type and so many bytes, and how it is changed: of 10 000 bytes so many.
struct Case {
    dtype: DType,
    old: Vec<u8>,
    new: Vec<u8>,
}

fn case(numbers: &mut Numbers, dtype: DType, elements: usize, rate: u64) -> Case {
    let len = elements * dtype.bytes().unwrap() as usize;
    let old: Vec<u8> = (0..len).map(|_| numbers.next() as u8).collect();
    let mut new = old.clone();
    for byte in &mut new {
        if numbers.below(10_000) < rate {
            *byte = numbers.next() as u8;
        }
    }
    Case { dtype, old, new }
}

fn weight(at: usize, dtype: DType, bytes: &[u8]) -> Weight {
    let elements = bytes.len() as u64 / dtype.bytes().unwrap();
    Weight::new(format!("w{at}"), dtype, [elements], bytes.to_vec()).unwrap()
}

/// Lengths around vectors, tiles and launches, at rates that give all forms.
fn cases() -> Vec<Case> {
    let mut numbers = Numbers(77);
    let mut cases = Vec::new();
    for dtype in DTYPES {
        let size = dtype.bytes().unwrap() as usize;
        let tile = (64 << 10) / size;
        let edges = [0, 1, 3, 16, 17, 100, tile - 1, tile, tile + 1, 5 * tile + 33];
        for (at, elements) in edges.into_iter().enumerate() {
            let rate = [0, 1, 20, 150, 1500, 4000, 9999][at % 7];
            cases.push(case(&mut numbers, dtype, elements, rate));
            let rate = [9999, 0, 150, 1, 4000, 20][at % 6];
            cases.push(case(&mut numbers, dtype, elements, rate));
        }
    }
    cases
}

fn on_the_cpu(pairs: &[(Cut, &[u8], &[u8])]) -> (Vec<Difference>, Vec<u8>) {
    let mut values = Vec::new();
    let found = pairs.iter().map(|(cut, old, new)| {
        let mut changes = Changes::default();
        changes.compare(*cut, 0, old, new);
        let (units, sum, len) = (changes.units, changes.sum, changes.values.len() as u64);
        values.extend(changes.values);
        let words = if units == 0 { Vec::new() } else { changes.words };
        Difference { cut: *cut, words, len, units, sum }
    });
    (found.collect(), values)
}

fn kept(shadows: &CudaShadows, bytes: &[&[u8]], pool: &Pool) -> Vec<Box<dyn ShadowBytes>> {
    let lens: Vec<u64> = bytes.iter().map(|bytes| bytes.len() as u64).collect();
    let mut copies = shadows.allocate(&lens).unwrap();
    let parts = bytes.iter().enumerate().map(|(of, bytes)| ShadowPart {
        of,
        start: 0,
        bytes: bytes.to_vec().into(),
    });
    shadows.write(&mut copies, &parts.collect::<Vec<_>>(), pool).unwrap();
    copies
}

fn bytes_of(copy: &dyn ShadowBytes) -> Vec<u8> {
    copy.view().to_host().unwrap().to_vec()
}

fn compare(
    shadows: &CudaShadows,
    weights: &[Weight],
    copies: &[Box<dyn ShadowBytes>],
    pool: &Pool,
) -> Compared {
    let pairs: Vec<_> = weights.iter().zip(copies).map(|(one, copy)| (one, &**copy)).collect();
    shadows.compare(&pairs, pool).unwrap()
}

fn due<'a>(copies: &'a mut [Box<dyn ShadowBytes>], found: &'a [Difference]) -> Vec<Due<'a>> {
    let each = |(to, found): (&'a mut Box<dyn ShadowBytes>, &'a Difference)| Due {
        name: "one",
        to,
        cut: found.cut,
        words: &found.words,
    };
    copies.iter_mut().zip(found).map(each).collect()
}

#[test]
#[ignore = "needs a CUDA device"]
fn what_changed_is_found_and_applied_and_taken_back_as_on_the_cpu() {
    let device = Device::open(0).unwrap();
    let pool = Pool::new(4).unwrap();
    let cases = cases();
    // With a small batch there are several launches, and weights that need more than one.
    for batch in [256 << 20, 128 << 10] {
        let shadows = CudaShadows::with_batch(&device, batch).unwrap();
        let olds: Vec<&[u8]> = cases.iter().map(|case| &case.old[..]).collect();
        let mut copies = kept(&shadows, &olds, &pool);
        let sums = |copies: &[Box<dyn ShadowBytes>]| {
            let copies: Vec<&dyn ShadowBytes> = copies.iter().map(|copy| &**copy).collect();
            shadows.sums(&copies, &pool).unwrap()
        };
        let expected: Vec<u64> = olds.iter().map(|old| digest::sum(0, old)).collect();
        assert_eq!(sums(&copies), expected);
        // In turn on the device, where they are compared in place, and on the host, from where they are encoded beside.
        let weights: Vec<Weight> = cases
            .iter()
            .enumerate()
            .map(|(at, case)| {
                let weight = weight(at, case.dtype, &case.new);
                if at % 3 == 0 || case.new.is_empty() {
                    weight
                } else {
                    upload(&device, &weight).unwrap()
                }
            })
            .collect();
        let pairs: Vec<(Cut, &[u8], &[u8])> = cases
            .iter()
            .map(|case| (Cut::at(case.dtype, 1), &case.old[..], &case.new[..]))
            .collect();
        let (expected, values) = on_the_cpu(&pairs);
        let forms: std::collections::BTreeSet<u32> =
            expected.iter().flat_map(|found| &found.words).map(|word| word >> 30).collect();
        assert_eq!(forms.len(), 4, "all forms are there");
        let found = compare(&shadows, &weights, &copies, &pool);
        for (at, (found, expected)) in found.weights.iter().zip(&expected).enumerate() {
            assert_eq!(found, expected, "weight {at} of {:?}", cases[at].dtype);
        }
        assert!(found.values.device().is_some() || found.values.is_empty());
        assert!(found.values.to_host().unwrap() == values);

        // Somebody reads some of them: these views keep their bytes.
        let views: Vec<(usize, Storage)> =
            (0..copies.len()).step_by(5).map(|at| (at, copies[at].view())).collect();
        let here = found.values.to_host().unwrap();
        for values in [&found.values, &Storage::from(here)] {
            let applied =
                shadows.apply(&mut due(&mut copies, &found.weights), values, true, &pool).unwrap();
            let expected: Vec<u64> = found.weights.iter().map(|found| found.sum).collect();
            assert_eq!(applied.sums, expected);
            for (at, (copy, case)) in copies.iter().zip(&cases).enumerate() {
                assert!(bytes_of(&**copy) == case.new, "weight {at} of {:?}", case.dtype);
            }
            for (at, view) in &views {
                assert!(view.to_host().unwrap() == cases[*at].old, "a view of weight {at}");
            }
            let undo = applied.undo.unwrap();
            let mut expected = values.to_host().unwrap().to_vec();
            let mut rest = &mut expected[..];
            for ((case, found), _) in cases.iter().zip(&found.weights).zip(0..) {
                let (own, others) = rest.split_at_mut(found.len as usize);
                rest = others;
                if found.units > 0 {
                    exchange(found.cut, &mut case.old.clone(), &found.words, own).unwrap();
                }
            }
            assert!(undo.to_host().unwrap() == expected);
            let back =
                shadows.apply(&mut due(&mut copies, &found.weights), &undo, false, &pool).unwrap();
            assert!(back.undo.is_none());
            let negated: Vec<u64> =
                found.weights.iter().map(|found| 0_u64.wrapping_sub(found.sum)).collect();
            assert_eq!(back.sums, negated);
            for (copy, case) in copies.iter().zip(&cases) {
                assert!(bytes_of(&**copy) == case.old);
            }
        }
    }
}

/// A model's weights, quantised, from memory of the host or of the device, and the BF16 values that are changed.
fn quantised(device: Option<&Device>, seed: u64, changed: bool) -> Vec<Weight> {
    let mut numbers = Numbers(seed);
    let shapes: [&[u64]; 6] =
        [&[256, 384], &[130, 200], &[3, 128, 128], &[64], &[1000, 72], &[512, 256]];
    let weights = shapes.iter().enumerate().map(|(at, shape)| {
        let len = shape.iter().product::<u64>();
        let mut change = Numbers(seed + 1 + at as u64);
        let bytes: Vec<u8> = (0..len)
            .flat_map(|element| {
                let value = (numbers.below(2000) as f32 - 1000.0) / 4096.0;
                let bits = (value.to_bits() >> 16) as u16;
                // Of the last one's first tile, nine tenths are new: more than its changes would be shorter than all of it.
                let is_new = at == 5 && element < 230 * 256;
                let moves = changed && (is_new || change.below(50) == 0);
                (if moves { bits ^ 0x61 } else { bits }).to_le_bytes()
            })
            .collect();
        let name = format!("model.layers.{at}.mlp.up_proj.weight");
        let weight = Weight::new(name, DType::BF16, *shape, bytes).unwrap();
        device.map_or(weight.clone(), |device| upload(device, &weight).unwrap())
    });
    in_fp8(weights.collect())
}

fn in_fp8(weights: Vec<Weight>) -> Vec<Weight> {
    let mut config = RulesConfig::default();
    config.receiver = Receiver::Any;
    let quantizer: Fp8Quantizer = Rules::new(&config).unwrap().into();
    let quantized = weights.quantize_fp8(&quantizer).map(|weight| weight.unwrap());
    let quantized: Vec<Weight> = futures::executor::block_on(quantized.collect());
    assert!(quantized.iter().any(|weight| weight.meta().dtype == DType::F8_E4M3));
    quantized
}

#[test]
#[ignore = "needs a CUDA device"]
fn codes_and_scales_are_compared_as_they_travel() {
    let device = Device::open(0).unwrap();
    let pool = Pool::new(4).unwrap();
    for batch in [256 << 20, 64 << 10] {
        let shadows = CudaShadows::with_batch(&device, batch).unwrap();
        let old = quantised(Some(&device), 5, false);
        let lens: Vec<u64> = old.iter().map(Weight::byte_len).collect();
        let mut copies = shadows.allocate(&lens).unwrap();
        let sums = shadows.encode(&old, &mut copies, &pool).unwrap();
        let olds: Vec<_> =
            quantised(None, 5, false).iter().map(|one| one.to_bytes().unwrap()).collect();
        for ((copy, bytes), sum) in copies.iter().zip(&olds).zip(sums) {
            assert!(bytes_of(&**copy) == bytes[..]);
            assert_eq!(sum, digest::sum(0, bytes));
        }
        let new = quantised(Some(&device), 5, true);
        let news: Vec<_> =
            quantised(None, 5, true).iter().map(|one| one.to_bytes().unwrap()).collect();
        let pairs: Vec<(Cut, &[u8], &[u8])> = new
            .iter()
            .zip(olds.iter().zip(&news))
            .map(|(one, (old, new))| (Cut::at(one.meta().dtype, one.granule()), &old[..], &new[..]))
            .collect();
        let (expected, values) = on_the_cpu(&pairs);
        assert!(expected.iter().flat_map(|one| &one.words).any(|word| word >> 30 == 3));
        let found = compare(&shadows, &new, &copies, &pool);
        assert_eq!(found.weights, expected);
        assert!(found.values.to_host().unwrap() == values && !values.is_empty());
        // In another order than the copies lie. Scales come after their codes.
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for (at, weight) in new.iter().enumerate() {
            match groups.last_mut().filter(|_| weight.is_deferred()) {
                Some(group) => group.push(at),
                None => groups.push(vec![at]),
            }
        }
        let order: Vec<usize> = groups.into_iter().rev().flatten().collect();
        let pairs: Vec<_> = order.iter().map(|at| (&new[*at], &*copies[*at])).collect();
        let reordered = shadows.compare(&pairs, &pool).unwrap();
        for (found, at) in reordered.weights.iter().zip(&order) {
            assert_eq!(found, &expected[*at]);
        }
        shadows.apply(&mut due(&mut copies, &found.weights), &found.values, false, &pool).unwrap();
        for (copy, bytes) in copies.iter().zip(&news) {
            assert!(bytes_of(&**copy) == bytes[..]);
        }
        let again = compare(&shadows, &new, &copies, &pool);
        assert!(again.values.is_empty() && again.weights.iter().all(|one| one.words.is_empty()));
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn places_that_are_none_are_refused_and_the_weight_named() {
    let device = Device::open(0).unwrap();
    let pool = Pool::new(2).unwrap();
    let shadows = CudaShadows::new(&device).unwrap();
    let cut = Cut::at(DType::BF16, 1);
    let (positions, bitmap) = (1_u32 << 30, 2_u32 << 30);
    let refused: [(u32, Vec<u8>); 7] = [
        (positions | 2, [5_u16, 5, 0, 0].iter().flat_map(|at| at.to_le_bytes()).collect()),
        (positions | 2, [6_u16, 5, 0, 0].iter().flat_map(|at| at.to_le_bytes()).collect()),
        (positions | 1, [50_u16, 0].iter().flat_map(|at| at.to_le_bytes()).collect()),
        (positions | 1, vec![1, 0, 0]),
        (bitmap | 1, vec![3, 0, 0, 0, 0, 0, 0, 1, 1]),
        (bitmap | 1, vec![0, 0, 0, 0, 0, 0, 4, 1, 1]),
        (3 << 30, vec![0; 99]),
    ];
    for (at, (word, values)) in refused.into_iter().enumerate() {
        let mut copies = kept(&shadows, &[&[1; 100]], &pool);
        let words = [word];
        let mut due = [Due { name: "w", to: &mut copies[0], cut, words: &words }];
        let error = shadows.apply(&mut due, &values.into(), true, &pool).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol, "case {at}: {error}");
    }
    let mut copies = kept(&shadows, &[&[1; 100]], &pool);
    let mut due = [Due { name: "w", to: &mut copies[0], cut, words: &[] }];
    assert!(shadows.apply(&mut due, &Vec::new().into(), true, &pool).is_ok());
}
