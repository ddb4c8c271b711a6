//! `ckpt-engine top`: what the ranks of running updates are doing, from their metrics.
//!
//! Whatever answers is not trusted: time and bytes are limited, what is not one of our metrics is
//! passed over, and nothing of the text reaches the terminal but numbers.

use std::collections::BTreeMap;
use std::time::Duration;

use checkpoint_engine::{Error, ErrorKind, Result};
use futures::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const OPERATION: &str = "asking for metrics";

/// An endpoint has this long to answer in full.
const PATIENCE: Duration = Duration::from_secs(2);

/// The longest answer: a thousand ranks take a few hundred kilobytes.
const LONGEST: u64 = 4 << 20;

/// The most ranks that are shown.
const RANKS: usize = 4096;

/// The stages in the order in which they happen.
const STAGES: [&str; 8] =
    ["collect", "release", "encode", "publish", "confirm", "fetch", "verify", "install"];

/// What is known of a rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// Where its version stands: 0 staging, 1 ready, 2 active, 3 aborted.
    pub state: Option<f64>,
    /// The version that it sends or receives, or else the last one.
    pub version: Option<f64>,
    /// Bytes per second of its last update.
    pub rate: Option<f64>,
    /// Updates that were committed, and aborted.
    pub updates: (f64, f64),
    /// Seconds of all updates, and how many they are, in the order of the stages.
    stages: [(f64, f64); STAGES.len()],
}

impl Row {
    /// The mean seconds of a stage, if the rank has it.
    pub fn stage(&self, name: &str) -> Option<f64> {
        let index = STAGES.iter().position(|stage| *stage == name)?;
        let (sum, count) = self.stages[index];
        (count > 0.0).then(|| sum / count)
    }

    fn merge(&mut self, other: Self) {
        // Of a rank's own endpoint and the trainer's, the one that knows more of it comes last.
        self.state = other.state.or(self.state);
        self.version = other.version.or(self.version);
        self.rate = other.rate.or(self.rate);
        self.updates.0 += other.updates.0;
        self.updates.1 += other.updates.1;
        for (stage, (sum, count)) in self.stages.iter_mut().zip(other.stages) {
            *stage = (stage.0 + sum, stage.1 + count);
        }
    }
}

/// Ranks by number.
pub type Table = BTreeMap<u32, Row>;

/// Asks all endpoints; those that do not answer are told with the reason.
///
/// # Cancel safety
///
/// Dropping the future loses nothing.
pub async fn ask(endpoints: &[String]) -> (Table, Vec<Error>) {
    let answers = join_all(endpoints.iter().map(|endpoint| fetch(endpoint))).await;
    let (mut tables, mut errors) = (Vec::new(), Vec::new());
    for answer in answers {
        match answer.map(|text| parse(&text)) {
            Ok(table) => tables.push(table),
            Err(error) => errors.push(error),
        }
    }
    // The trainer's endpoint knows of all ranks; their own ones know more of themselves.
    tables.sort_by_key(|table| !table.contains_key(&0));
    let mut all = Table::new();
    for (rank, row) in tables.into_iter().flatten() {
        all.entry(rank).or_default().merge(row);
    }
    (all, errors)
}

/// An endpoint's text.
async fn fetch(endpoint: &str) -> Result<String> {
    let address = endpoint.strip_prefix("http://").unwrap_or(endpoint);
    let address = address.split('/').next().unwrap_or(address);
    let operation = format!("{OPERATION} at {address}");
    let asked = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(LONGEST + 1).read_to_end(&mut answer).await?;
        Ok(answer)
    };
    let answer = tokio::time::timeout(PATIENCE, asked)
        .await
        .map_err(|_| {
            let message = format!("no complete answer within {} s", PATIENCE.as_secs());
            Error::new(ErrorKind::Timeout, &*operation, message)
        })?
        .map_err(|error| Error::io(&*operation, error))?;
    let refuse = |message: &str| Error::new(ErrorKind::Protocol, &*operation, message);
    if answer.len() as u64 > LONGEST {
        return Err(refuse("the answer is longer than metrics are"));
    }
    let text = String::from_utf8(answer).map_err(|_| refuse("the answer is no text"))?;
    match text.split_once("\r\n\r\n") {
        Some((head, body)) if is_ok(head) => Ok(body.to_owned()),
        _ => Err(refuse("the answer is not metrics over HTTP")),
    }
}

fn is_ok(head: &str) -> bool {
    let mut words = head.split(' ');
    words.next().is_some_and(|word| word.starts_with("HTTP/1.")) && words.next() == Some("200")
}

/// The ranks of an endpoint's text; lines that are none of ours are passed over.
pub fn parse(text: &str) -> Table {
    let mut table = Table::new();
    for sample in text.lines().filter_map(sample) {
        let Some(rank) = sample.label("rank").and_then(|rank| rank.parse().ok()) else { continue };
        if table.len() >= RANKS && !table.contains_key(&rank) {
            continue;
        }
        let mut set = |put: &dyn Fn(&mut Row)| put(table.entry(rank).or_default());
        let value = sample.value;
        match sample.name {
            "ckpt_engine_state" => set(&|row| row.state = Some(value)),
            "ckpt_engine_version" => set(&|row| row.version = Some(value)),
            "ckpt_engine_bytes_per_second" => set(&|row| row.rate = Some(value)),
            "ckpt_engine_updates_total" => match sample.label("outcome") {
                Some("committed") => set(&|row| row.updates.0 += value),
                Some("aborted") => set(&|row| row.updates.1 += value),
                _ => {}
            },
            "ckpt_engine_stage_seconds_sum" | "ckpt_engine_stage_seconds_count" => {
                let stage = sample.label("stage");
                let Some(index) = STAGES.iter().position(|name| Some(*name) == stage) else {
                    continue;
                };
                let is_sum = sample.name.ends_with("_sum");
                set(&|row| {
                    let (sum, count) = &mut row.stages[index];
                    *(if is_sum { sum } else { count }) += value;
                });
            }
            _ => {}
        }
    }
    table
}

struct Sample<'a> {
    name: &'a str,
    labels: &'a str,
    value: f64,
}

impl Sample<'_> {
    fn label(&self, wanted: &str) -> Option<&str> {
        // None of our values has a comma or a quotation mark in it.
        self.labels.split(',').find_map(|label| {
            let (name, value) = label.split_once('=')?;
            (name == wanted).then(|| value.trim_matches('"'))
        })
    }
}

/// `name{label="value",…} number`; numbers that are none, or not finite, are no samples.
fn sample(line: &str) -> Option<Sample<'_>> {
    let (series, value) = line.rsplit_once(' ')?;
    let (name, labels) = series.strip_suffix('}')?.split_once('{')?;
    let value: f64 = value.parse().ok()?;
    (value.is_finite() && value >= 0.0).then_some(Sample { name, labels, value })
}

/// The table as text, a line for each rank.
pub fn render(table: &Table) -> String {
    let mut text =
        format!("{:>5} {:<8} {:>8} {:>8} {:>9}  ", "rank", "state", "version", "GB/s", "updates");
    text.push_str("mean of stages\n");
    for (rank, row) in table {
        let state = match row.state {
            Some(0.0) => "staging",
            Some(1.0) => "ready",
            Some(2.0) => "active",
            Some(3.0) => "aborted",
            _ => "-",
        };
        let version = row.version.map_or("-".into(), |version| format!("{version:.0}"));
        let rate = row.rate.map_or("-".into(), |rate| format!("{:.2}", rate / 1e9));
        let updates = match row.updates {
            (committed, 0.0) => format!("{committed:.0}"),
            (committed, aborted) => format!("{committed:.0}+{aborted:.0}!"),
        };
        let stages: Vec<String> = STAGES
            .iter()
            .filter_map(|stage| Some(format!("{stage} {}", seconds(row.stage(stage)?))))
            .collect();
        let stages = stages.join(" ");
        text.push_str(&format!(
            "{rank:>5} {state:<8} {version:>8.8} {rate:>8.8} {updates:>9.9}  {stages}"
        ));
        text.push('\n');
    }
    text
}

fn seconds(seconds: f64) -> String {
    match seconds {
        ..0.001 => format!("{:.0}us", seconds * 1e6),
        0.001..1.0 => format!("{:.0}ms", seconds * 1e3),
        _ => format!("{seconds:.1}s"),
    }
}
