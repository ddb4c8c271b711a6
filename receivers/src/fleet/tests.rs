//! Whole updates with servers whose answers a list of numbers decides. The rules are checked after every step. After every schedule, an
//! update without faults has to load all servers.

use super::*;
use proptest::prelude::*;

/// The real state of a server, whatever the machine believes.
#[derive(Debug)]
struct Truth {
    version: String,
    is_whole: bool,
    paused: bool,
    active: bool,
    /// Counts left behind by an update, to which the next one would add.
    stale: bool,
    world: Option<u64>,
    buckets: u32,
}

impl Truth {
    fn new() -> Self {
        Self {
            version: "default".into(),
            is_whole: true,
            paused: false,
            active: false,
            stale: false,
            world: None,
            buckets: 0,
        }
    }

    /// Does what it is asked.
    fn does(&mut self, ask: Ask, version: Version) -> Result<Said> {
        let refuse = |words: &str| Err(Error::new(ErrorKind::Io, "asked", words));
        match ask {
            Ask::Look => {
                return Ok(Said::Facts(Facts {
                    workers: 2,
                    weights: self.version.clone(),
                    ignored: Vec::new(),
                }));
            }
            Ask::Recall => return Ok(Said::Version(self.version.clone())),
            Ask::Pause => self.paused = true,
            Ask::Reset => {
                (self.active, self.stale, self.is_whole) =
                    (false, false, !self.stale && self.is_whole)
            }
            Ask::Leave if self.active => return refuse("within an update"),
            Ask::Leave => self.world = None,
            Ask::Start if self.active => return Ok(Said::Open),
            Ask::Start => {
                assert!(!self.stale, "an update begins on what another one has counted");
                (self.active, self.buckets) = (true, 0);
            }
            Ask::Finish if !self.active => return refuse("no update"),
            Ask::Finish => {
                (self.active, self.stale) = (false, false);
                self.is_whole = self.buckets == BUCKETS;
                self.version = version.to_string();
            }
            Ask::Resume => {
                assert!(self.is_whole && !self.active, "it generates while it is half loaded");
                self.paused = false;
            }
        }
        Ok(Said::Done)
    }

    fn loads(&mut self, world: u64) -> Result<()> {
        assert!(self.active && self.world == Some(world), "a broadcast that it has no part in");
        (self.stale, self.is_whole) = (true, false);
        self.buckets += 1;
        Ok(())
    }
}

const BUCKETS: u32 = 3;

/// How a request goes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Luck {
    Well,
    /// Nothing happens, and the answer is an error or none.
    Before,
    /// It happens, and the answer is an error or none.
    After,
    /// The process was restarted before.
    Anew,
}

fn luck(schedule: &mut impl Iterator<Item = u8>) -> Luck {
    match schedule.next().unwrap_or(0) {
        250.. => Luck::Anew,
        230.. => Luck::After,
        200.. => Luck::Before,
        _ => Luck::Well,
    }
}

fn failed() -> Error {
    Error::new(ErrorKind::Io, "asked", "it failed")
}

struct Group {
    fleet: Fleet,
    servers: Vec<Truth>,
    worlds: u64,
    /// The members of the present world.
    members: Vec<usize>,
}

impl Group {
    fn new(servers: usize) -> Self {
        let truths = (0..servers).map(|_| Truth::new()).collect();
        Self { fleet: Fleet::new(servers, true), servers: truths, worlds: 0, members: Vec::new() }
    }

    /// Runs an update. If a number is given, the update is dropped after that many steps.
    fn update(
        &mut self,
        version: u64,
        schedule: &mut impl Iterator<Item = u8>,
        steps: usize,
    ) -> Option<Result<Outcome>> {
        let version = Version(version);
        self.fleet.begin(version, true);
        let mut left = BUCKETS;
        for _ in 0..steps {
            match self.fleet.next() {
                Act::End => return Some(self.fleet.outcome()),
                Act::Ask(asks) => {
                    for (index, ask) in asks {
                        let server = &mut self.servers[index];
                        let said = match luck(schedule) {
                            Luck::Before => Err(failed()),
                            Luck::After => {
                                drop(server.does(ask, version));
                                Err(failed())
                            }
                            Luck::Anew if matches!(ask, Ask::Look | Ask::Recall) => {
                                *server = Truth::new();
                                server.does(ask, version)
                            }
                            _ => server.does(ask, version),
                        };
                        self.fleet.answer(index, ask, said);
                    }
                }
                Act::Form(members) => {
                    self.worlds += 1;
                    self.members.clone_from(&members);
                    let lucks: Vec<Luck> = members.iter().map(|_| luck(schedule)).collect();
                    let well = lucks.iter().all(|luck| matches!(luck, Luck::Well | Luck::Anew));
                    let mut answers = Answers::new();
                    for (&index, luck) in members.iter().zip(lucks) {
                        let answer = match luck {
                            Luck::Before => Some(Err(failed())),
                            // The others wait for those that failed, without an end.
                            _ if !well => None,
                            _ => {
                                self.servers[index].world = Some(self.worlds);
                                Some(Ok(()))
                            }
                        };
                        answers.push((index, answer));
                    }
                    self.fleet.formed(if well { Ok(()) } else { Err(failed()) }, answers);
                }
                Act::Send(_) if left == 0 => self.fleet.end_of_stream(Ok(())),
                Act::Send(members) => {
                    assert_eq!(members, self.members, "a broadcast that some have no part in");
                    left -= 1;
                    if schedule.next().unwrap_or(0) > 245 {
                        self.fleet.end_of_stream(Err(failed()));
                        continue;
                    }
                    let mut own = Ok(());
                    let mut answers = Answers::new();
                    for index in members {
                        let loaded = self.servers[index].loads(self.worlds);
                        answers.push((
                            index,
                            match luck(schedule) {
                                Luck::Before => {
                                    own = Err(failed());
                                    None
                                }
                                Luck::After => {
                                    self.servers[index].active = false;
                                    Some(Err(failed()))
                                }
                                _ => Some(loaded),
                            },
                        ));
                    }
                    self.fleet.sent(own, answers);
                }
            }
        }
        None
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]
    #[test]
    fn whatever_fails_the_rules_hold_and_an_update_without_faults_loads_all(
        servers in 1_usize..4,
        updates in proptest::collection::vec(
            (proptest::collection::vec(any::<u8>(), 0..40), prop_oneof![Just(1000_usize), 0_usize..25]),
            0..5,
        ),
    ) {
        let mut group = Group::new(servers);
        let mut version = 0;
        for (schedule, steps) in updates {
            version += 1;
            let ended = group.update(version, &mut schedule.into_iter(), steps);
            prop_assert!(ended.is_some() || steps < 1000, "an update without an end");
            if let Some(Ok(outcome)) = ended {
                prop_assert_eq!(outcome.loaded.len() + outcome.out.len(), servers);
                for index in outcome.loaded {
                    let server = &group.servers[index];
                    prop_assert!(server.is_whole && server.version == version.to_string());
                    prop_assert!(!server.paused);
                }
            }
        }
        let outcome = group.update(99, &mut std::iter::empty(), 1000).expect("an end").expect("an update");
        prop_assert!(outcome.out.is_empty(), "{:?}", outcome.out);
        for server in &group.servers {
            prop_assert!(server.is_whole && server.version == "99" && !server.paused);
        }
    }
}

/// Answers requests, and returns the first act that is not one.
fn answered(fleet: &mut Fleet, mut answer: impl FnMut(usize, Ask) -> Option<Result<Said>>) -> Act {
    loop {
        let Act::Ask(asks) = fleet.next() else { return fleet.next() };
        for (index, ask) in asks {
            let Some(said) = answer(index, ask) else { return fleet.next() };
            fleet.answer(index, ask, said);
        }
    }
}

fn good(ask: Ask, has: &str) -> Result<Said> {
    Ok(match ask {
        Ask::Look => Said::Facts(Facts { workers: 1, weights: has.into(), ignored: Vec::new() }),
        Ask::Recall => Said::Version(has.into()),
        _ => Said::Done,
    })
}

#[test]
fn a_server_that_says_another_version_after_the_update_is_out_and_never_told_to_generate() {
    let mut fleet = Fleet::new(1, true);
    fleet.begin(Version(7), true);
    assert_eq!(answered(&mut fleet, |_, ask| Some(good(ask, "6"))), Act::Form(vec![0]));
    fleet.formed(Ok(()), vec![(0, Some(Ok(())))]);
    assert_eq!(answered(&mut fleet, |_, ask| Some(good(ask, "6"))), Act::Send(vec![0]));
    fleet.end_of_stream(Ok(()));
    let end = answered(&mut fleet, |_, ask| {
        assert_ne!(ask, Ask::Resume);
        Some(good(ask, "6"))
    });
    assert_eq!(end, Act::End);
    let error = fleet.outcome().expect_err("nobody has it");
    assert_eq!((error.kind(), error.report().rank), (ErrorKind::Mismatch, Some(Rank(1))));
}

#[test]
fn servers_that_were_stopped_for_an_update_that_began_nowhere_generate_again() {
    let mut fleet = Fleet::new(2, true);
    fleet.begin(Version(1), true);
    assert_eq!(answered(&mut fleet, |_, ask| Some(good(ask, ""))), Act::Form(vec![0, 1]));
    fleet.formed(Err(failed()), Vec::new());
    let resumes = Act::Ask(vec![(0, Ask::Resume), (1, Ask::Resume)]);
    assert_eq!(fleet.next(), resumes);
    assert_eq!(answered(&mut fleet, |_, ask| Some(good(ask, ""))), Act::End);
    fleet.outcome().expect_err("the trainer's own failure");
}

#[test]
fn a_server_that_fails_before_it_begins_to_load_and_says_so_generates_again() {
    for (kind, resumed) in
        [(ErrorKind::Io, true), (ErrorKind::Config, true), (ErrorKind::Timeout, false)]
    {
        let mut fleet = Fleet::new(2, true);
        fleet.begin(Version(1), true);
        answered(&mut fleet, |_, ask| Some(good(ask, "0")));
        let failed = Err(Error::new(kind, "joining", "it failed"));
        fleet.formed(Err(self::failed()), vec![(0, None), (1, Some(failed))]);
        // The silent server waits in a collective, and is told nothing.
        let mut asked = Vec::new();
        let end = answered(&mut fleet, |index, ask| {
            asked.push((index, ask));
            Some(Err(self::failed()))
        });
        let wanted = if resumed { vec![(1, Ask::Resume)] } else { vec![] };
        assert_eq!((end, asked), (Act::End, wanted));
        let error = fleet.outcome().expect_err("nobody has it");
        assert_eq!((error.kind(), error.report().rank), (kind, Some(Rank(2))));
    }
}

#[test]
fn a_server_that_has_begun_to_load_and_fails_is_not_told_to_generate_in_this_update_nor_the_next() {
    let mut fleet = Fleet::new(1, true);
    for version in 1..=2 {
        fleet.begin(Version(version), true);
        answered(&mut fleet, |_, ask| {
            assert_ne!(ask, Ask::Resume);
            // The second time it fails before.
            let fails = if version == 1 { Ask::Start } else { Ask::Reset };
            Some(if ask == fails { Err(failed()) } else { good(ask, "0") })
        });
        if version == 1 {
            fleet.formed(Ok(()), vec![(0, Some(Ok(())))]);
            answered(&mut fleet, |_, ask| {
                assert_ne!(ask, Ask::Resume);
                Some(if ask == Ask::Start { Err(failed()) } else { good(ask, "0") })
            });
        }
        assert_eq!(fleet.next(), Act::End);
    }
}

#[test]
fn servers_leave_one_world_before_they_join_the_next_one() {
    let mut fleet = Fleet::new(2, true);
    fleet.begin(Version(1), true);
    answered(&mut fleet, |_, ask| Some(good(ask, "1")));
    fleet.formed(Ok(()), vec![(0, Some(Ok(()))), (1, Some(Ok(())))]);
    answered(&mut fleet, |_, ask| Some(good(ask, "1")));
    fleet.end_of_stream(Ok(()));
    assert_eq!(answered(&mut fleet, |_, ask| Some(good(ask, "1"))), Act::End);
    fleet.begin(Version(2), true);
    let mut left = Vec::new();
    let act = answered(&mut fleet, |index, ask| {
        if ask == Ask::Leave {
            left.push(index);
        }
        Some(if (index, ask) == (1, Ask::Recall) { Err(failed()) } else { good(ask, "1") })
    });
    assert_eq!((act, left), (Act::Form(vec![0]), vec![0]));
}

#[test]
fn a_broadcast_that_failed_at_the_trainer_alone_is_followed_by_a_new_world() {
    let mut fleet = Fleet::new(1, false);
    fleet.begin(Version(1), true);
    answered(&mut fleet, |_, ask| Some(good(ask, "1")));
    fleet.formed(Ok(()), vec![(0, Some(Ok(())))]);
    assert_eq!(answered(&mut fleet, |_, ask| Some(good(ask, "1"))), Act::Send(vec![0]));
    fleet.sent(Err(failed()), vec![(0, Some(Ok(())))]);
    assert_eq!(answered(&mut fleet, |_, ask| Some(good(ask, "1"))), Act::Form(vec![0]));
}

#[test]
fn a_trainer_whose_own_end_of_the_world_is_gone_forms_another_one_before_it_sends() {
    let mut fleet = Fleet::new(1, false);
    let loads = |fleet: &mut Fleet| {
        fleet.formed(Ok(()), vec![(0, Some(Ok(())))]);
        answered(fleet, |_, ask| Some(good(ask, "1")));
        fleet.end_of_stream(Ok(()));
        assert_eq!(answered(fleet, |_, ask| Some(good(ask, "1"))), Act::End);
    };
    fleet.begin(Version(1), true);
    answered(&mut fleet, |_, ask| Some(good(ask, "1")));
    loads(&mut fleet);
    fleet.begin(Version(1), true);
    assert_eq!(answered(&mut fleet, |_, ask| Some(good(ask, "1"))), Act::Send(vec![0]));
    fleet.end_of_stream(Ok(()));
    answered(&mut fleet, |_, ask| Some(good(ask, "1")));
    fleet.begin(Version(1), false);
    assert_eq!(answered(&mut fleet, |_, ask| Some(good(ask, "1"))), Act::Form(vec![0]));
}
