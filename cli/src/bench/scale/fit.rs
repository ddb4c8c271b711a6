//! Exponents of growth.

use super::{Cost, ScaleLine};

/// How one cost grows with one quantity: as its power.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Exponent {
    /// What grows: `forming CPU`, for example.
    pub cost: String,
    /// With what: `rollouts`, `tensors` or `buckets`.
    pub with: &'static str,
    /// The slope of the logarithms, by least squares.
    pub exponent: f64,
    /// The settings that it was fitted to.
    pub points: usize,
}

/// The exponents of all costs, for each quantity that varies while the others stay what they are; fitted from the
/// largest such family of at least three settings.
pub fn exponents(lines: &[ScaleLine]) -> Vec<Exponent> {
    type Of = fn(&ScaleLine) -> u32;
    type Phase = fn(&ScaleLine) -> &Cost;
    let quantities: [(&str, Of, [Of; 2]); 3] = [
        ("rollouts", |l| l.setting.rollouts, [|l| l.setting.tensors, |l| l.setting.buckets]),
        ("tensors", |l| l.setting.tensors, [|l| l.setting.rollouts, |l| l.setting.buckets]),
        ("buckets", |l| l.setting.buckets, [|l| l.setting.rollouts, |l| l.setting.tensors]),
    ];
    let mut fitted = Vec::new();
    for (with, quantity, others) in quantities {
        let family = |line: &ScaleLine| -> Vec<&ScaleLine> {
            let like = |other: &&ScaleLine| others.iter().all(|of| of(other) == of(line));
            lines.iter().filter(like).collect()
        };
        let Some(family) = lines.iter().map(family).max_by_key(Vec::len).filter(|f| f.len() > 2)
        else {
            continue;
        };
        let mut fit = |cost: &str, of: &dyn Fn(&ScaleLine) -> f64| {
            let points: Vec<_> =
                family.iter().map(|line| (f64::from(quantity(line)), of(line))).collect();
            if let Some(exponent) = slope(&points) {
                let points = points.len();
                fitted.push(Exponent { cost: cost.to_owned(), with, exponent, points });
            }
        };
        let phases: [(&str, Phase); 3] = [
            ("forming", |line| &line.forming),
            ("first update", |line| &line.first),
            ("later updates", |line| &line.steady),
        ];
        for (phase, of) in phases {
            fit(&format!("{phase}, CPU of rank 0"), &|line| of(line).cpu);
            fit(&format!("{phase}, bytes"), &|line| of(line).bytes as f64);
        }
        fit("memory of rank 0", &|line| line.memory as f64);
        fit("memory of a rollout", &|line| line.rollout_memory as f64);
    }
    fitted
}

/// The slope of the logarithms of points, by least squares; nothing if they do not differ or one is not above zero.
fn slope(points: &[(f64, f64)]) -> Option<f64> {
    if points.iter().any(|(x, y)| *x <= 0.0 || *y <= 0.0) {
        return None;
    }
    let logs: Vec<_> = points.iter().map(|(x, y)| (x.ln(), y.ln())).collect();
    let count = logs.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| logs.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let (along, square) = logs.iter().fold((0.0, 0.0), |(along, square), p| {
        (along + (p.0 - x) * (p.1 - y), square + (p.0 - x).powi(2))
    });
    (square > 0.0).then(|| along / square)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_slope_of_a_power_is_its_exponent(exponent in -2.0..3.0_f64, factor in 0.01..100.0_f64) {
            let points: Vec<_> = [1.0, 4.0, 64.0, 500.0_f64]
                .into_iter()
                .map(|x| (x, factor * x.powf(exponent)))
                .collect();
            let slope = slope(&points).unwrap();
            prop_assert!((slope - exponent).abs() < 1e-9, "{slope} {exponent}");
        }
    }

    #[test]
    fn points_that_say_nothing_have_no_slope() {
        assert_eq!(slope(&[(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]), None);
        assert_eq!(slope(&[(1.0, 1.0), (2.0, 0.0), (3.0, 3.0)]), None);
    }
}
