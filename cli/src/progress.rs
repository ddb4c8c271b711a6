//! The progress of an update: a bar on a terminal, nothing elsewhere.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use checkpoint_engine::observe::{Observer, Progress};
use checkpoint_engine::{Rank, VersionState};
use indicatif::{ProgressBar, ProgressStyle};

/// Shows bytes, rate and the rollouts' states on standard error, if that is a terminal.
#[derive(Debug)]
pub(crate) struct Bar {
    bar: ProgressBar,
    states: Mutex<BTreeMap<Rank, VersionState>>,
}

impl Bar {
    pub(crate) fn new(bytes: u64) -> Self {
        const TEMPLATE: &str = "{prefix} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {msg}";
        let bar = ProgressBar::new(bytes);
        let bar = match ProgressStyle::with_template(TEMPLATE) {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        };
        Self { bar, states: Mutex::default() }
    }

    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

impl Observer for Bar {
    fn observe(&self, progress: &Progress) {
        // A map of small values: a panic elsewhere cannot leave it half changed.
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        match progress {
            Progress::Began { version, receivers } => {
                self.bar.reset();
                self.bar.set_prefix(format!("version {version}"));
                *states = receivers.iter().map(|rank| (*rank, VersionState::Staging)).collect();
            }
            Progress::Bucket { bytes, .. } => self.bar.inc(*bytes),
            Progress::State { rank, state } => {
                states.insert(*rank, *state);
            }
            _ => {}
        }
        let words: Vec<String> = states
            .iter()
            .map(|(rank, state)| format!("{rank}:{}", format!("{state:?}").to_lowercase()))
            .collect();
        self.bar.set_message(words.join(" "));
    }
}
