//! A trainer's weights as they come out of its stream, and whether they are those of the last update.

use std::future::Future;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use engine_core::{Error, ErrorKind, Result, Weight, WeightStream, clock};
use futures::{FutureExt, StreamExt};

use crate::declared::Held;
use crate::encode::Going;

const COLLECTING: &str = "collecting the trainer's weights";

/// So many weights are taken before others get to run.
const TURN: usize = 256;

/// A stream is taken for that of the last update when so many weights are. A shorter one is read to its end.
pub(crate) const FIRST: usize = 256;

/// How long work waits before it looks whether it has to stop.
const LOOK: Duration = Duration::from_millis(20);

/// The weights of one update, in the order of their stream.
#[derive(Debug)]
pub(crate) struct Arriving {
    /// The boxes of the last update.
    expected: Arc<[Held]>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Those that nobody has taken yet.
    weights: Vec<Weight>,
    /// How many have come.
    count: usize,
    /// Whether one is not the box that was expected in its place.
    differs: bool,
    ended: bool,
    /// The stream's error, for the work that waits for its weights.
    failed: Option<engine_core::ErrorReport>,
    /// How long work has waited, by its stage.
    waited: [Duration; 3],
}

/// What waits for weights.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Waits {
    Before,
    Planning,
    Writing,
}

/// What has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Came {
    /// What was waited for.
    All,
    /// A weight that is not the one that was expected, or too few.
    Others,
}

impl Arriving {
    pub(crate) fn new(expected: Arc<[Held]>) -> Self {
        Self { expected, state: Mutex::default(), changed: Condvar::new() }
    }

    /// The number of weights of the last update.
    pub(crate) fn expects(&self) -> usize {
        self.expected.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes all weights of a stream in.
    ///
    /// # Errors
    ///
    /// Those of the stream; `Timeout` if it yields nothing within the deadline; `Weight` for a weight that is not placed.
    pub(crate) async fn read(&self, weights: WeightStream<'_>, deadline: Duration) -> Result<()> {
        let read = self.read_all(weights, deadline).await;
        let mut state = self.lock();
        match &read {
            Ok(()) => {
                state.ended = true;
                state.differs |= state.count != self.expected.len();
            }
            Err(error) => state.failed = Some(error.into()),
        }
        drop(state);
        self.changed.notify_all();
        read
    }

    async fn read_all(&self, mut weights: WeightStream<'_>, deadline: Duration) -> Result<()> {
        let mut turn = Vec::with_capacity(TURN);
        loop {
            // Only a weight that is not ready gets a timer: thousands of timers would take noticeable time.
            let next = match weights.next().now_or_never() {
                Some(next) => next,
                None => {
                    self.push(&mut turn);
                    clock::within(deadline, weights.next()).await.ok_or_else(|| {
                        let message = format!("no weight within {:.1} s", deadline.as_secs_f64());
                        Error::new(ErrorKind::Timeout, COLLECTING, message)
                    })?
                }
            };
            match next.transpose()? {
                None => {
                    self.push(&mut turn);
                    return Ok(());
                }
                Some(weight) if weight.is_deferred() => {
                    let message = "scales that are computed with their weight: in placed updates rollouts say what is quantised";
                    let error = Error::new(ErrorKind::Weight, COLLECTING, message);
                    return Err(error.tensor(weight.name()));
                }
                Some(weight) => turn.push(weight),
            }
            if turn.len() >= TURN {
                self.push(&mut turn);
                yield_now().await;
            }
        }
    }

    fn push(&self, weights: &mut Vec<Weight>) {
        if weights.is_empty() {
            return;
        }
        let mut state = self.lock();
        let expected = self.expected.get(state.count..).unwrap_or_default();
        let mut expected = expected.iter();
        let is_other = |weight: &Weight| {
            expected.next().is_none_or(|held| !weight.is_box_of(&held.meta, &held.region))
        };
        state.differs = state.differs || weights.iter().any(is_other);
        state.count += weights.len();
        state.weights.append(weights);
        drop(state);
        self.changed.notify_all();
    }

    /// Moves weights to `to` until it has the first `count` of them, or all with `None`. Blocks.
    ///
    /// # Errors
    ///
    /// The stream's; `Aborted` if the work was stopped.
    pub(crate) fn take(
        &self,
        count: Option<usize>,
        to: &mut Vec<Weight>,
        waits: Waits,
        going: &Going,
    ) -> Result<Came> {
        let begun = Instant::now();
        let mut state = self.lock();
        let came = loop {
            going.check()?;
            if !state.weights.is_empty() {
                to.append(&mut state.weights);
                going.step()?;
            }
            match (&state.failed, count) {
                (Some(error), _) => return Err(error.clone().into()),
                (None, None) if state.ended && state.differs => break Came::Others,
                (None, None) if state.ended => break Came::All,
                (None, Some(_)) if state.differs => break Came::Others,
                (None, Some(count)) if to.len() >= count => break Came::All,
                _ => {}
            }
            let waiting = self.changed.wait_timeout(state, LOOK);
            state = waiting.unwrap_or_else(PoisonError::into_inner).0;
        };
        state.waited[waits as usize] += begun.elapsed();
        Ok(came)
    }

    /// How long work has waited for weights, before it was planned, while it was, and while it was written.
    pub(crate) fn waited(&self) -> [Duration; 3] {
        self.lock().waited
    }
}

/// Lets others run once.
fn yield_now() -> impl Future<Output = ()> {
    let mut yielded = false;
    std::future::poll_fn(move |cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
}
