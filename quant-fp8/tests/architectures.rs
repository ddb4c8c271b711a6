//! explore
#![allow(clippy::unwrap_used, reason = "x")]
use std::collections::BTreeMap;
use quant_fp8::rules::*;
#[test]
fn explore() {
    let text = include_str!("data/architectures.tsv");
    let mut fams: Vec<(&str, Vec<(&str, Vec<usize>, bool)>)> = vec![];
    for line in text.lines() {
        if line.starts_with('#') { continue }
        if let Some(f) = line.strip_prefix("= ") { fams.push((f, vec![])); continue }
        let mut c = line.split('\t');
        let (n, s) = (c.next().unwrap(), c.next().unwrap());
        let shape = s.split('x').map(|x| x.parse().unwrap()).collect();
        fams.last_mut().unwrap().1.push((n, shape, c.next() == Some("fp8")));
    }
    for (f, ps) in &fams {
        for r in Receiver::ALL {
            let config = RulesConfig { receiver: r, ..Default::default() };
            let plan = QuantPlan::resolve(ps.iter().map(|(n, s, _)| (*n, s.clone(), Stored::Float)), &config);
            let plan = match plan { Ok(p) => p, Err(e) => { println!("ERR {f} {r} {e}"); continue } };
            let mut kept: BTreeMap<String, f64> = BTreeMap::new();
            let mut total = 0.0;
            for (e, (_, s, h)) in plan.entries().iter().zip(ps) {
                let n: f64 = s.iter().map(|&x| x as f64).product();
                if *h { total += n; if e.decision == Decision::Keep { *kept.entry(e.rule.id().into()).or_default() += n; } }
                let g: String = e.name.split('.').map(|x| if x.bytes().all(|b| b.is_ascii_digit()) { "N" } else { x }).collect::<Vec<_>>().join(".");
                if r == Receiver::Common { println!("{}\t{f}\t{g}\t{s:?}\t{h}\t{}\t{}", if e.decision == Decision::Quantize {"Q"} else {"K"}, e.rule.id(), e.rule); }
            }
            let k: f64 = kept.values().sum();
            println!("S\t{f}\t{r}\t{:.1}\t{:.1}\t{:?}", 100.0 * k / total, plan.share().kept_part() * 100.0, kept.iter().map(|(a, b)| (a, (1000.0 * b / total).round()/10.0)).collect::<Vec<_>>());
        }
    }
}
