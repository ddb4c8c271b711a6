//! Ranks behind relays: they notice nothing, and the leader hears of all that happens to them.

#![allow(clippy::unwrap_used, reason = "the helpers of tests may panic as tests do")]

use std::time::Duration;

use bytes::Bytes;
use control_plane::{
    Address, ChannelId, Control, ControlConfig, ControlPlane, Event, Relay, Role, Token, UPDATES,
};
use engine_core::control::Said;
use engine_core::{Error, ErrorKind, Rank, RankSet, Result};
use futures::executor::block_on;
use futures::future::try_join_all;

/// Far above what anything here takes, so that a slow machine fails no test.
const DEADLINE: Duration = Duration::from_secs(60);

fn config(address: &Address) -> ControlConfig {
    ControlConfig::new(address.clone(), Token::new(b"the secret of these tests").unwrap())
}

fn any() -> Address {
    "127.0.0.1:0".parse().unwrap()
}

async fn relay(of: &Address) -> Relay {
    Relay::start(config(of), any()).await.unwrap()
}

async fn join(at: &Address, rank: Option<u32>) -> Result<ControlPlane> {
    ControlPlane::join(config(at), Role::Rollout, rank.map(Rank)).await
}

/// A leader and so many rollouts, joined there and gathered.
async fn group(leader: &ControlPlane, at: &[&Address]) -> Vec<ControlPlane> {
    let mut members = Vec::new();
    for at in at {
        members.push(join(at, None).await.unwrap());
    }
    let size = members.len() as u32 + 1;
    let gathers = std::iter::once(leader)
        .chain(&members)
        .map(|plane| plane.gather(size, Bytes::from(plane.rank().to_string()), DEADLINE));
    let tables = try_join_all(gathers).await.unwrap();
    assert!(tables.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(tables[0].len(), members.len() + 1);
    members
}

async fn event(plane: &ControlPlane) -> Event {
    plane.channel(UPDATES).recv(DEADLINE).await.unwrap().expect("an event before the deadline")
}

fn said(from: u32, body: &'static [u8]) -> Event {
    Event::Message { from: Rank(from), body: Bytes::from_static(body) }
}

#[test]
fn ranks_behind_relays_and_relays_behind_relays_talk_as_any_others() {
    block_on(async {
        let leader = ControlPlane::lead(config(&any())).await.unwrap();
        let near = relay(leader.address()).await;
        let far = relay(near.address()).await;
        let at = [leader.address(), near.address(), far.address(), far.address()];
        let members = group(&leader, &at).await;
        let (updates, other) = (leader.channel(UPDATES), ChannelId(20));
        for member in &members {
            let rank = member.rank();
            updates.send(rank, Bytes::from_static(b"down")).unwrap();
            assert_eq!(event(member).await, said(0, b"down"));
            member.channel(UPDATES).send(Rank::LEADER, Bytes::from_static(b"up")).unwrap();
            assert_eq!(event(&leader).await, said(rank.0, b"up"));
            let (above, below) = (leader.channel(other), member.channel(other));
            below.send(Rank::LEADER, Bytes::from_static(b"else")).unwrap();
            let heard = above.recv(DEADLINE).await.unwrap();
            assert_eq!(heard, Some(said(rank.0, b"else")));
            assert!(Control::silence(&updates, rank).unwrap().is_zero());
        }
        let all = std::iter::once(&leader).chain(&members);
        try_join_all(all.map(|plane| plane.barrier("all", DEADLINE))).await.unwrap();
        leader.close().await.unwrap();
        for member in &members {
            assert_eq!(event(member).await, Event::Left { rank: Rank::LEADER });
        }
        assert_eq!(near.ended().await.kind(), ErrorKind::TrainerLeft);
        assert_eq!(far.ended().await.kind(), ErrorKind::TrainerLeft);
    });
}

#[test]
fn what_is_said_to_all_ranks_of_a_relay_crosses_its_connection_once() {
    block_on(async {
        let leader = ControlPlane::lead(config(&any())).await.unwrap();
        let relays = [relay(leader.address()).await, relay(leader.address()).await];
        let at: Vec<&Address> = (0..16).map(|i| relays[i % 2].address()).collect();
        let members = group(&leader, &at).await;
        let updates = leader.channel(UPDATES);
        let ranks: RankSet = members.iter().map(ControlPlane::rank).collect();
        let before = leader.traffic();
        let body = Bytes::from(vec![7; 50_000]);
        assert!(Control::send_all(&updates, &ranks, body.clone()).is_empty());
        for member in &members {
            let message = Event::Message { from: Rank::LEADER, body: body.clone() };
            assert_eq!(event(member).await, message);
        }
        let bytes = leader.traffic().bytes_sent - before.bytes_sent;
        assert!((100_000..150_000).contains(&bytes), "{bytes} bytes for two relays");
        // A rank that is gone is named, and keeps the message from nobody else.
        let two = RankSet::from([Rank(99), Rank(3)]);
        let nobody = Control::send_all(&updates, &two, Bytes::from_static(b"x"));
        assert_eq!(nobody.len(), 1);
        assert_eq!((nobody[0].0, nobody[0].1.kind()), (Rank(99), ErrorKind::PeerLost));
        let third = members.iter().find(|member| member.rank() == Rank(3)).unwrap();
        assert_eq!(event(third).await, said(0, b"x"));
    });
}

#[test]
fn what_ranks_of_a_relay_say_alike_is_heard_together_or_one_by_one_as_the_leader_asks() {
    block_on(async {
        let leader = ControlPlane::lead(config(&any())).await.unwrap();
        let relay = relay(leader.address()).await;
        let members = group(&leader, &[relay.address(); 8]).await;
        let ranks: Vec<Rank> = members.iter().map(ControlPlane::rank).collect();
        let updates = leader.channel(UPDATES);
        // The relay waits a moment for the others.
        let say = |body: &'static [u8]| {
            for member in &members {
                let channel = member.channel(UPDATES);
                channel.send_with_others(Rank::LEADER, Bytes::from_static(body)).unwrap();
            }
        };
        // How many are put together is a matter of time; that all arrive is not.
        let (mut heard, mut events) = (Vec::new(), 0);
        for round in [&b"1"[..], b"2", b"3"] {
            say(round);
            while heard.len() < ranks.len() {
                match Control::recv_all(&updates, DEADLINE).await.unwrap().expect("an event") {
                    Said::Alike { from, body } if body == round => heard.extend(from.iter()),
                    Said::One(Event::Message { from, body }) if body == round => heard.push(from),
                    other => panic!("{other:?}"),
                }
                events += 1;
            }
            heard.sort();
            assert_eq!(std::mem::take(&mut heard), ranks);
        }
        assert!(events < 3 * ranks.len(), "{events} events: nothing was heard together");
        say(b"4");
        for _ in &ranks {
            match event(&leader).await {
                Event::Message { from, body } if body == b"4"[..] => heard.push(from),
                other => panic!("{other:?}"),
            }
        }
        heard.sort();
        assert_eq!(heard, ranks);
        assert_eq!(updates.recv(Duration::ZERO).await.unwrap(), None);
    });
}

#[test]
fn the_leader_hears_of_each_rank_behind_a_relay_that_leaves_or_is_cut() {
    block_on(async {
        let leader = ControlPlane::lead(config(&any())).await.unwrap();
        let relay = relay(leader.address()).await;
        let mut members = group(&leader, &[relay.address(); 3]).await;
        let left = members.remove(0);
        let rank = left.rank();
        left.close().await.unwrap();
        assert_eq!(event(&leader).await, Event::Left { rank });
        let (cut, stays) = (members.remove(0), members.remove(0));
        let words = "it does not keep to the rules";
        leader.cut(cut.rank(), &Error::new(ErrorKind::Protocol, "testing", words)).unwrap();
        let Event::Lost { rank, error } = event(&leader).await else { panic!("not lost") };
        assert_eq!((rank, error.kind), (cut.rank(), ErrorKind::Protocol));
        let Event::Lost { error, .. } = event(&cut).await else { panic!("it was not told") };
        assert!(error.to_string().contains(words), "{error}");
        // The rank is free, also while the one before it still closes, and the others notice nothing.
        let again = join(relay.address(), Some(cut.rank().0)).await.unwrap();
        assert_eq!(again.rank(), cut.rank());
        let taken = join(relay.address(), Some(Rank::LEADER.0)).await.unwrap_err();
        assert_eq!(taken.kind(), ErrorKind::Mismatch);
        leader.channel(UPDATES).send(stays.rank(), Bytes::from_static(b"on")).unwrap();
        assert_eq!(event(&stays).await, said(0, b"on"));
    });
}

#[test]
fn ranks_of_a_relay_that_is_gone_are_lost_and_may_join_elsewhere() {
    block_on(async {
        let leader = ControlPlane::lead(config(&any())).await.unwrap();
        let relay = relay(leader.address()).await;
        let members = group(&leader, &[relay.address(), relay.address(), leader.address()]).await;
        relay.close().await.unwrap();
        let mut lost = Vec::new();
        for _ in 0..2 {
            let Event::Lost { rank, error } = event(&leader).await else { panic!("not lost") };
            assert_eq!(error.kind, ErrorKind::PeerLost);
            assert!(error.to_string().contains("relay"), "{error}");
            lost.push(rank);
        }
        lost.sort();
        assert_eq!(lost, [Rank(1), Rank(2)]);
        for member in &members[..2] {
            let Event::Lost { rank: Rank::LEADER, error } = event(member).await else { panic!() };
            assert!(error.to_string().contains("the relay has closed"), "{error}");
        }
        let again = join(leader.address(), Some(1)).await.unwrap();
        assert_eq!(again.rank(), Rank(1));
        leader.channel(UPDATES).send(Rank(3), Bytes::from_static(b"on")).unwrap();
        assert_eq!(event(&members[2]).await, said(0, b"on"));
    });
}

#[test]
fn a_relay_with_another_token_is_refused() {
    block_on(async {
        let leader = ControlPlane::lead(config(&any())).await.unwrap();
        let other = Token::new(b"the secret of another group").unwrap();
        let config = ControlConfig::new(leader.address().clone(), other);
        let error = Relay::start(config, any()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Authentication, "{error}");
    });
}

#[test]
fn a_group_takes_no_more_ranks_than_it_may_have_whatever_way_they_come() {
    block_on(async {
        let mut config = config(&any());
        config.max_world_size = 3;
        let leader = ControlPlane::lead(config).await.unwrap();
        let relay = relay(leader.address()).await;
        let mut members = group(&leader, &[relay.address(), leader.address()]).await;
        for at in [relay.address(), leader.address()] {
            let mut config = self::config(at);
            config.connect_timeout = Duration::from_millis(300);
            let refused = ControlPlane::join(config, Role::Rollout, None).await.unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Timeout, "{refused}");
            let source = std::error::Error::source(&refused).unwrap().to_string();
            assert!(source.contains("max_world_size"), "{source}");
        }
        // The place of one that has left is free.
        let rank = members[0].rank();
        members.remove(0).close().await.unwrap();
        assert_eq!(event(&leader).await, Event::Left { rank });
        assert_eq!(join(relay.address(), None).await.unwrap().rank(), rank);
    });
}
