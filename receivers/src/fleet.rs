//! Decides what the trainer asks of its servers next: a state machine without IO.
//!
//! The states of a server during an update:
//!
//! ```text
//! unknown ─Look─▶ known ─Pause─▶ paused ─Form─▶ in the world ─Start─▶ started ─Bucket…─▶ ─Finish─▶ finished
//!    ▲                                                                  ─Recall─▶ confirmed ─Resume─▶ generating
//!    └── the next update ◀── out: the first failure, wherever
//! ```
//!
//! Its rules:
//!
//! - All servers take each step together. A server that fails is *out* of this update, with its error. The others go on, in a world without
//!   it.
//! - Only a server's own answer says which version it has. If it is another version than this trainer left there, the server was restarted,
//!   or somebody else sends to it: it is asked everything again, and its workers join again.
//! - A server is *half loaded* from the moment that it is told to start until it has confirmed the version. It is never told to generate
//!   before that, however many updates fail in between. What it began is ended (`Reset`) before it begins again: it counts what it has
//!   loaded of a layer, and would include what it has of the old version.
//! - An act has ended before the next one begins, even if its update was dropped: a server may do what it was told at any later time.
//! - A server that fails before it begins to load, and says so itself, is told to generate again with the weights that it has.
//! - No server is asked to take part in a broadcast if some member of the world is known not to take part in it.

use engine_core::{Error, ErrorKind, ErrorReport, Rank, Result, Version};

/// A request to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Whether it is there, what it is and whether the trainer can send to it: answered by [`Said::Facts`].
    Look,
    /// Which version it has: answered by [`Said::Version`].
    Recall,
    /// To stop generating.
    Pause,
    /// To end an update that was left half done.
    Reset,
    /// To leave the world of its workers.
    Leave,
    /// To begin an update: answered by [`Said::Done`] or [`Said::Open`].
    Start,
    /// To end it, with its version.
    Finish,
    /// To generate again.
    Resume,
}

/// A server's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    Done,
    Facts(Facts),
    /// The version of its weights.
    Version(String),
    /// It is within an update that was begun and not ended.
    Open,
}

/// Facts about a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    /// The number of its workers, each a member of the world.
    pub(crate) workers: u32,
    /// The version of its weights.
    pub(crate) weights: String,
    /// The layers that its checkpoint does not quantise, as far as it tells.
    pub(crate) ignored: Vec<String>,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Ask these servers, all at once. Each answer goes to [`Fleet::answer`].
    Ask(Vec<(usize, Ask)>),
    /// Form a world of these servers' workers. The result goes to [`Fleet::formed`].
    Form(Vec<usize>),
    /// Send the next bucket to these servers. The result goes to [`Fleet::sent`], or to [`Fleet::end_of_stream`].
    Send(Vec<usize>),
    /// The update is over. [`Fleet::outcome`] has the result.
    End,
}

impl Act {
    /// Whether it only asks for the servers' state.
    pub(crate) fn looks(&self) -> bool {
        let Self::Ask(asks) = self else { return false };
        asks.iter().any(|(_, ask)| matches!(ask, Ask::Look | Ask::Recall))
    }
}

/// The answers of servers to a call that ends only when all of them and the trainer take part. `None` for a server that did not answer.
pub(crate) type Answers = Vec<(usize, Option<Result<()>>)>;

/// The progress of a server within an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Progress {
    Idle,
    Paused,
    Started,
    Finished,
    Confirmed,
    Resumed,
}

#[derive(Debug)]
enum Standing {
    Unknown,
    Known,
    Out(ErrorReport),
}

#[derive(Debug)]
struct Server {
    standing: Standing,
    progress: Progress,
    workers: u32,
    /// The version that it reported last.
    weights: String,
    /// The layers that its checkpoint does not quantise.
    ignored: Vec<String>,
    /// Whether its workers are in the present world.
    is_member: bool,
    /// Whether it has confirmed a version since it joined. Until then its version does not distinguish it from another process.
    is_marked: bool,
    /// Whether its workers may be in some world of this trainer, present or past.
    has_joined: bool,
    /// Whether it has begun to load a version that it has not confirmed.
    half_loaded: bool,
    /// Whether the update that it began before has been ended.
    is_reset: bool,
    /// Whether it may be paused.
    is_stopped: bool,
}

impl Server {
    /// Whether it answers, even if with an error.
    fn answers(&self) -> bool {
        match &self.standing {
            Standing::Out(report) => {
                !matches!(report.kind, ErrorKind::Timeout | ErrorKind::PeerLost)
            }
            _ => true,
        }
    }
}

/// All servers.
#[derive(Debug)]
pub(crate) struct Fleet {
    servers: Vec<Server>,
    pauses: bool,
    version: Version,
    /// Whether the present world is whole.
    has_world: bool,
    has_ended: bool,
    /// The trainer's own failure, which ends the update.
    failure: Option<ErrorReport>,
    /// What failed first.
    first: Option<ErrorReport>,
}

/// How an update ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The servers that have the version.
    pub(crate) loaded: Vec<usize>,
    /// The servers that were left out, and why.
    pub(crate) out: Vec<(usize, ErrorReport)>,
}

/// The rank of a server in the report. Servers are counted from 1, in the order of the configuration.
pub(crate) fn rank_of(server: usize) -> Rank {
    Rank(server as u32 + 1)
}

impl Fleet {
    pub(crate) fn new(servers: usize, pauses: bool) -> Self {
        let server = || Server {
            standing: Standing::Unknown,
            progress: Progress::Idle,
            workers: 0,
            weights: String::new(),
            ignored: Vec::new(),
            is_member: false,
            is_marked: false,
            has_joined: false,
            half_loaded: false,
            is_reset: false,
            is_stopped: false,
        };
        Self {
            servers: (0..servers).map(|_| server()).collect(),
            pauses,
            version: Version(0),
            has_world: false,
            has_ended: false,
            failure: None,
            first: None,
        }
    }

    /// Begins an update. One that was not completed is over. `has_world` says whether the trainer's own end of the world is intact.
    pub(crate) fn begin(&mut self, version: Version, has_world: bool) {
        self.version = version;
        self.has_world &= has_world;
        (self.has_ended, self.failure, self.first) = (false, None, None);
        // A world is intact as long as each of its members is the process that joined it.
        self.has_world &= self.servers.iter().all(|server| !server.is_member || server.is_marked);
        for server in &mut self.servers {
            server.is_member &= self.has_world;
            server.standing = Standing::Unknown;
            server.progress = Progress::Idle;
            server.is_reset = false;
        }
    }

    /// The number of a server's workers.
    pub(crate) fn workers(&self, server: usize) -> u32 {
        self.servers[server].workers
    }

    /// The layers that a server does not quantise.
    pub(crate) fn ignored(&self, server: usize) -> &[String] {
        &self.servers[server].ignored
    }

    /// The servers that have answered what they are and are not out.
    pub(crate) fn known(&self) -> Vec<usize> {
        let is_known = |index: &usize| matches!(self.servers[*index].standing, Standing::Known);
        (0..self.servers.len()).filter(is_known).collect()
    }

    /// Whether a server still has the version that it confirmed to this trainer last, as far as it says.
    pub(crate) fn has_kept(&self, server: usize) -> bool {
        let server = &self.servers[server];
        server.is_marked && !server.half_loaded
    }

    /// Leaves out a server that cannot take what comes next.
    pub(crate) fn refuse(&mut self, server: usize, error: Error) {
        self.out(server, error);
    }

    /// The servers whose workers are in the present world.
    pub(crate) fn members(&self) -> Vec<usize> {
        let is_member = |index: &usize| self.has_world && self.servers[*index].is_member;
        (0..self.servers.len()).filter(is_member).collect()
    }

    /// The servers that are not out.
    fn usable(&self) -> Vec<usize> {
        let usable = |server: &Server| !matches!(server.standing, Standing::Out(_));
        (0..self.servers.len()).filter(|&index| usable(&self.servers[index])).collect()
    }

    /// What to do next. It stays the same until it is answered.
    pub(crate) fn next(&self) -> Act {
        let usable = self.usable();
        let all = |ask: Ask, wanted: &dyn Fn(&Server) -> bool| {
            let asked = usable.iter().copied().filter(|&index| wanted(&self.servers[index]));
            let asks: Vec<_> = asked.map(|index| (index, ask)).collect();
            (!asks.is_empty()).then_some(Act::Ask(asks))
        };
        let is_at = |progress: Progress| move |server: &Server| server.progress == progress;
        if self.failure.is_some() {
            return self.last();
        }
        let unknown = |server: &Server| matches!(server.standing, Standing::Unknown);
        let rejoins = !self.has_ended && !self.has_whole_world(&usable);
        let before = all(Ask::Recall, &|server| unknown(server) && server.is_member)
            .or_else(|| all(Ask::Look, &unknown))
            .or_else(|| self.pauses.then(|| all(Ask::Pause, &is_at(Progress::Idle))).flatten())
            .or_else(|| all(Ask::Reset, &|server| self.needs_reset(server)))
            .or_else(|| {
                // A server refuses to leave within an update. Joining another world replaces the old one.
                let leaves = |server: &Server| server.has_joined && !self.has_started(server);
                rejoins.then(|| all(Ask::Leave, &leaves)).flatten()
            });
        if let Some(act) = before {
            return act;
        }
        if usable.is_empty() {
            return self.last();
        }
        if rejoins {
            return Act::Form(usable);
        }
        if let Some(act) = all(Ask::Start, &|server| !self.has_started(server)) {
            return act;
        }
        if !self.has_ended {
            return Act::Send(usable);
        }
        all(Ask::Finish, &is_at(Progress::Started))
            .or_else(|| all(Ask::Recall, &is_at(Progress::Finished)))
            .or_else(|| {
                self.pauses.then(|| all(Ask::Resume, &is_at(Progress::Confirmed))).flatten()
            })
            .unwrap_or_else(|| self.last())
    }

    /// What to do when nothing more is sent: servers that were stopped and have loaded nothing generate again, with the weights that they
    /// have.
    fn last(&self) -> Act {
        let stopped = |index: &usize| {
            let server = &self.servers[*index];
            self.pauses && server.is_stopped && !server.half_loaded && server.answers()
        };
        let asks: Vec<_> =
            (0..self.servers.len()).filter(stopped).map(|index| (index, Ask::Resume)).collect();
        if asks.is_empty() { Act::End } else { Act::Ask(asks) }
    }

    fn has_started(&self, server: &Server) -> bool {
        server.progress >= Progress::Started
    }

    fn needs_reset(&self, server: &Server) -> bool {
        server.half_loaded && !server.is_reset && !self.has_started(server)
    }

    /// Whether the present world consists of exactly these servers' workers.
    fn has_whole_world(&self, usable: &[usize]) -> bool {
        let is_member = |index: usize| self.servers[index].is_member;
        self.has_world && (0..self.servers.len()).all(|at| is_member(at) == usable.contains(&at))
    }

    /// Records what a server answered, or the error if it did not answer.
    pub(crate) fn answer(&mut self, index: usize, ask: Ask, said: Result<Said>) {
        let version = self.version;
        let server = &mut self.servers[index];
        server.is_stopped |= ask == Ask::Pause;
        server.is_stopped &= ask != Ask::Resume;
        if matches!(server.standing, Standing::Out(_)) {
            // It was asked to generate again, and its error is recorded already.
            return;
        }
        let said = match said {
            Ok(said) => said,
            Err(error) => {
                // It may have done what it was asked.
                server.half_loaded |= matches!(ask, Ask::Start | Ask::Reset | Ask::Finish);
                return self.out(index, error);
            }
        };
        match (ask, said) {
            (Ask::Look, Said::Facts(Facts { workers, weights, ignored })) => {
                server.standing = Standing::Known;
                server.is_marked &= server.weights == weights;
                (server.workers, server.weights, server.ignored) = (workers, weights, ignored);
            }
            (Ask::Recall, Said::Version(has)) if server.progress == Progress::Finished => {
                if has == version.to_string() {
                    server.progress = Progress::Confirmed;
                    (server.weights, server.half_loaded) = (has, false);
                    server.is_marked = true;
                } else {
                    let words = format!("it says that it has version `{has}` after the update");
                    self.out(
                        index,
                        Error::new(ErrorKind::Mismatch, "confirming the version", words),
                    );
                }
            }
            (Ask::Recall, Said::Version(has)) => {
                if has == server.weights {
                    server.standing = Standing::Known;
                } else {
                    // Its workers have left the world, which is no longer whole.
                    server.is_member = false;
                    self.has_world = false;
                }
            }
            (Ask::Pause, _) => server.progress = Progress::Paused,
            (Ask::Reset, _) => server.is_reset = true,
            (Ask::Leave, _) => (server.is_member, server.has_joined) = (false, false),
            (Ask::Start, Said::Open) if server.is_reset => {
                let words = "it is still within an update that could not be ended; it has to be started anew";
                self.out(index, Error::new(ErrorKind::State, "beginning an update", words));
            }
            (Ask::Start, Said::Open) => server.half_loaded = true,
            (Ask::Start, _) => {
                server.progress = Progress::Started;
                server.half_loaded = true;
            }
            (Ask::Finish, _) => server.progress = Progress::Finished,
            (Ask::Resume, _) => server.progress = Progress::Resumed,
            (Ask::Look | Ask::Recall, said) => {
                let words = format!("an answer to another question: {said:?}");
                self.out(index, Error::new(ErrorKind::Protocol, "asking a server", words));
            }
        }
    }

    /// Records whether a world was formed: how the trainer joined it, and how the servers answered.
    pub(crate) fn formed(&mut self, own: Result<()>, answers: Answers) {
        for server in &mut self.servers {
            server.is_member = false;
        }
        for &(index, _) in &answers {
            let server = &mut self.servers[index];
            (server.is_member, server.has_joined) = (own.is_ok(), true);
            server.is_marked = false;
        }
        self.has_world = own.is_ok();
        match own {
            Err(error) if answers.iter().all(|(_, answer)| matches!(answer, Some(Ok(())))) => {
                self.fail(error);
            }
            own => self.together(own, answers),
        }
    }

    /// Records whether a bucket was sent: how the trainer's broadcast ended, and how the servers answered.
    pub(crate) fn sent(&mut self, own: Result<()>, answers: Answers) {
        // Servers that have answered have the bucket, whatever happened to the broadcast to others.
        self.has_world &= own.is_ok();
        self.together(own, answers);
    }

    /// Leaves out servers that failed or did not answer. An error that a server reported is the cause; without one, the trainer's own error
    /// is.
    fn together(&mut self, own: Result<()>, answers: Answers) {
        let mut silent = Vec::new();
        let mut somebody_failed = false;
        for (index, answer) in answers {
            match answer {
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    somebody_failed = true;
                    self.out(index, error);
                }
                None => silent.push(index),
            }
        }
        if let Err(error) = own
            && !somebody_failed
        {
            let report = ErrorReport::from(&error.version(self.version));
            self.first.get_or_insert(report);
        }
        for index in silent {
            let words = "no answer, while others failed or were as silent: its workers may wait in NCCL without an \
                         end, and then it has to be started anew";
            self.out(index, Error::new(ErrorKind::Timeout, "waiting for a server", words));
        }
    }

    /// Records the end of the stream of weights. If it ended with an error, so does the update.
    pub(crate) fn end_of_stream(&mut self, ended: Result<()>) {
        self.has_ended = true;
        if let Err(error) = ended {
            self.fail(error);
        }
    }

    /// Records that the trainer itself cannot go on.
    pub(crate) fn fail(&mut self, error: Error) {
        self.failure.get_or_insert_with(|| ErrorReport::from(&error.version(self.version)));
    }

    fn out(&mut self, index: usize, error: Error) {
        let error = error.rank(rank_of(index)).version(self.version);
        tracing::warn!(server = index + 1, %error, "a server is left out of the update");
        let report = ErrorReport::from(&error);
        let server = &mut self.servers[index];
        server.half_loaded |= server.progress == Progress::Started;
        server.standing = Standing::Out(report.clone());
        // A world with a member that takes no part is useless to the others.
        self.has_world &= !server.is_member;
        self.first.get_or_insert(report);
    }

    /// How the update ended.
    ///
    /// # Errors
    ///
    /// The trainer's own failure; the first failure, if no server has the version.
    pub(crate) fn outcome(&self) -> Result<Outcome> {
        if let Some(report) = &self.failure {
            return Err(report.clone().into());
        }
        let mut outcome = Outcome { loaded: Vec::new(), out: Vec::new() };
        for (index, server) in self.servers.iter().enumerate() {
            match &server.standing {
                Standing::Out(report) => outcome.out.push((index, report.clone())),
                _ => outcome.loaded.push(index),
            }
        }
        match &self.first {
            Some(report) if outcome.loaded.is_empty() => Err(report.clone().into()),
            _ => Ok(outcome),
        }
    }
}

#[cfg(test)]
mod tests;
