//! What a rank other than the leader knows of an update that it has not entered yet.

use std::time::{Duration, Instant};

use super::message::{Begin, ToReceiver};
use super::too_late;
use engine_core::{Error, ErrorKind, Rank, Result, Version};

/// How long an announcement of another version is kept before it is a mismatch: the update's abort may be on its way.
const MOMENT: Duration = Duration::from_millis(300);

/// The announcement of an update that this rank has not entered, and the wait for one.
#[derive(Debug, Default)]
pub(super) struct Announced {
    begin: Option<Begin>,
    /// When the announcement came or the wait began, whichever is later.
    since: Option<Instant>,
    /// The newest update that was announced. Numbers grow, so an older announcement is a late message.
    newest: u64,
    wait: Option<Wanted>,
}

/// The update that is waited for.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    version: Option<Version>,
    until: Instant,
    deadline: Duration,
    operation: &'static str,
}

/// A bucket that nothing on this rank will read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unread {
    pub(super) update: u64,
    pub(super) index: u64,
}

/// How a wait has ended.
#[derive(Debug)]
pub(super) enum Found {
    Update(Begin),
    /// An update of another version goes on: its leader has to be told.
    Other(Begin, Error),
    Late(Error),
}

impl Announced {
    /// For a group that was formed when `updates` updates had begun on its control plane. Those belong to earlier
    /// groups; their messages may still come.
    pub(super) fn after(updates: u64) -> Self {
        Self { newest: updates, ..Self::default() }
    }

    /// Begins to wait for the next update, or for the next one of this version if one is given.
    pub(super) fn wait(
        &mut self,
        version: Option<Version>,
        deadline: Duration,
        operation: &'static str,
        now: Instant,
    ) {
        self.wait = Some(Wanted { version, until: now + deadline, deadline, operation });
        // The announced update may be over already, and its abort still unread.
        self.since = Some(now);
    }

    /// Ends the wait. An announcement stays.
    pub(super) fn stop(&mut self) {
        self.wait = None;
    }

    /// Takes in a message outside of an update.
    pub(super) fn take(&mut self, message: ToReceiver, now: Instant) -> Option<Unread> {
        match message {
            ToReceiver::Begin(begin) => self.keep(begin, now),
            // The announced update has ended without this rank.
            ToReceiver::Abort { update, .. } | ToReceiver::Commit { update } => {
                self.begin.take_if(|begin| begin.update == update);
            }
            ToReceiver::Bucket { update, index, .. } => return Some(Unread { update, index }),
            _ => {}
        }
        None
    }

    /// Keeps the announcement of an update if it is new, and returns whether it is.
    pub(super) fn keep_new(&mut self, begin: Begin, now: Instant) -> bool {
        let is_new = begin.update > self.newest;
        if is_new {
            self.newest = begin.update;
            self.begin = Some(begin);
            self.since = Some(now);
        }
        is_new
    }

    fn keep(&mut self, begin: Begin, now: Instant) {
        self.keep_new(begin, now);
    }

    /// The end of the wait, if it has come. `rank` is this rank.
    pub(super) fn found(&mut self, rank: Rank, now: Instant) -> Option<Found> {
        let wanted = self.wait?;
        let is_other =
            |begin: &mut Begin| wanted.version.is_some_and(|version| version != begin.version);
        // An update that is already over is returned as well: the caller then hears why it failed.
        let found = if let Some(begin) = self.begin.take_if(|begin| !is_other(begin)) {
            Found::Update(begin)
        } else if self.moment().is_some_and(|until| now >= until)
            && let (Some(begin), Some(expected)) = (self.begin.take(), wanted.version)
        {
            let message = format!(
                "the trainer sends version {}, this rank expects {expected}",
                begin.version
            );
            let error = Error::new(ErrorKind::Mismatch, "entering an update", message).rank(rank);
            Found::Other(begin, error)
        } else if now >= wanted.until {
            Found::Late(too_late(wanted.deadline, wanted.operation).rank(Rank::LEADER))
        } else {
            return None;
        };
        self.wait = None;
        Some(found)
    }

    /// When an announced update of another version counts as one that goes on.
    fn moment(&self) -> Option<Instant> {
        self.begin.as_ref().and(self.since).map(|since| since + MOMENT)
    }

    /// When to call [`found`](Self::found) again.
    pub(super) fn timer(&self) -> Option<Instant> {
        let wanted = self.wait?;
        Some(self.moment().map_or(wanted.until, |moment| moment.min(wanted.until)))
    }
}

/// Another update began: the leader has ended the present one, and the message that says so was lost.
pub(super) fn another_began(operation: &str) -> Result<()> {
    let message = "another update began within this one";
    Err(Error::new(ErrorKind::Protocol, operation, message)
        .rank(Rank::LEADER)
        .recovery(engine_core::Recovery::Retry))
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine_core::ErrorReport;

    const LIMIT: Duration = Duration::from_secs(30);

    fn begin(update: u64) -> ToReceiver {
        ToReceiver::Begin(Begin {
            update,
            version: Version(update),
            bucket_bytes: 256,
            slots: 2,
            digests: true,
            routed: false,
            senders: vec![Rank::LEADER],
            ticket: None,
        })
    }

    fn waiting(version: u64, now: Instant) -> Announced {
        let mut announced = Announced::default();
        announced.wait(Some(Version(version)), LIMIT, "waiting", now);
        announced
    }

    #[test]
    fn an_update_that_was_aborted_is_passed_over_when_another_version_is_expected() {
        let now = Instant::now();
        let mut announced = waiting(2, now);
        announced.take(begin(1), now);
        assert!(announced.found(Rank(1), now).is_none(), "its abort may be on its way");
        let error = ErrorReport::from(&Error::new(ErrorKind::Timeout, "sending", "too slow"));
        announced.take(ToReceiver::Abort { update: 1, error }, now);
        announced.take(begin(2), now);
        let found = announced.found(Rank(1), now);
        assert!(matches!(found, Some(Found::Update(begin)) if begin.update == 2));
    }

    #[test]
    fn an_update_that_was_committed_without_this_rank_is_passed_over_as_well() {
        let now = Instant::now();
        let mut announced = waiting(2, now);
        announced.take(begin(1), now);
        announced.take(ToReceiver::Commit { update: 1 }, now);
        announced.take(begin(2), now);
        let found = announced.found(Rank(1), now);
        assert!(matches!(found, Some(Found::Update(begin)) if begin.update == 2));
    }

    #[test]
    fn an_update_of_another_version_that_goes_on_is_a_mismatch_soon() {
        let now = Instant::now();
        let mut announced = waiting(4, now);
        announced.take(begin(3), now);
        let later = announced.timer().unwrap();
        assert!(later < now + Duration::from_secs(1));
        match announced.found(Rank(1), later) {
            Some(Found::Other(begin, error)) => {
                assert_eq!((begin.update, error.kind()), (3, ErrorKind::Mismatch));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_announcement_waits_for_who_asks_and_an_old_one_is_none() {
        let now = Instant::now();
        let mut announced = Announced::default();
        announced.take(begin(7), now);
        announced.take(begin(6), now);
        announced.wait(None, LIMIT, "waiting", now);
        assert!(matches!(announced.found(Rank(1), now), Some(Found::Update(b)) if b.update == 7));
        announced.take(begin(7), now);
        announced.wait(None, LIMIT, "waiting", now);
        assert!(announced.found(Rank(1), now).is_none(), "it was entered before");
        assert!(matches!(announced.found(Rank(1), now + LIMIT), Some(Found::Late(_))));
    }
}
