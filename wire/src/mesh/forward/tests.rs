//! What a keeper passes on and what it drops, and what the receiver takes.

use std::sync::Arc;

use super::*;
use crate::mesh::{Authority, Facts, MeshConfig, NodeKey, Output, Timing};
use crate::record::{Each, Reach, Reachability, SignedRecord};
use crate::seal::{ClusterKey, KeyRing, MAX_DATAGRAM};

const CLUSTER: &str = "test";

fn ring() -> KeyRing {
    KeyRing::new(vec![ClusterKey::from_bytes([1; 32])]).expect("a ring")
}

fn at(last: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, last], 7117))
}

fn keeper(now: Instant) -> Mesh {
    mesh("keeper", "public", now)
}

fn mesh(node: &str, site: &str, now: Instant) -> Mesh {
    let config = MeshConfig {
        cluster: CLUSTER.into(),
        node: node.parse().expect("a name"),
        site: site.parse().expect("a name"),
        key: NodeKey::from_secret([7; 32]),
        ring: ring(),
        seeds: Vec::new(),
        incarnation: 1,
        timing: Timing::default(),
        verify: Arc::new(Each),
    };
    let mut mesh = Mesh::new(config, [3; 32], now);
    mesh.set_authority(Authority::Claims, now);
    mesh.announce(Facts { gossip: vec![at(1)], ..Facts::default() }, now);
    mesh
}

/// What `from` says, of a site of its own and kept by these.
fn hello(from: &str, to: &str, keepers: &[&str], seq: u64) -> proto::Datagram {
    let reachability = Reachability {
        reach: Reach::Behind,
        keepers: keepers.iter().map(|keeper| name_hash(keeper)).collect(),
        outside: Vec::new(),
    };
    let facts =
        Facts { gossip: vec![SocketAddr::from(([10, 0, 0, 1], 7117))], reachability, ..Facts::default() };
    let key = NodeKey::from_secret([from.len() as u8; 32]);
    let (node, site) = (from.parse().expect("a name"), from.parse().expect("a name"));
    let record = SignedRecord::sign(&key, CLUSTER, node, site, 1, facts, false);
    let update = proto::Update { record: Some(record.to_proto()), ..Default::default() };
    let body = Some(Body::Ping(proto::Ping { token: seq, have: 9, ..Default::default() }));
    let (from, to) = (from.to_owned(), to.to_owned());
    proto::Datagram { from, to, session: 5, seq, updates: vec![update], body, ..Default::default() }
}

fn around(from: &str, to: &str, seq: u64, inner: &proto::Datagram) -> proto::Datagram {
    let body = Some(Body::Forward(proto::Forward { datagram: inner.encode_to_vec() }));
    proto::Datagram { from: from.into(), to: to.into(), session: 5, seq, body, ..Default::default() }
}

fn give(mesh: &mut Mesh, from: SocketAddr, message: &proto::Datagram, now: Instant) -> Result<(), Rejected> {
    mesh.handle_datagram(from, &ring().seal(CLUSTER, [0; 24], &message.encode_to_vec()), now)
}

/// What it sends now: to where, and what.
fn sent(mesh: &mut Mesh, now: Instant) -> Vec<(SocketAddr, proto::Datagram)> {
    let mut sent = Vec::new();
    loop {
        match mesh.poll_output(now) {
            Output::Send { to, datagram } => {
                assert!(datagram.len() <= MAX_DATAGRAM);
                let content = ring().open(CLUSTER, &datagram).expect("sealed here");
                sent.push((to, proto::Datagram::decode(&content[..]).expect("encoded here")));
            }
            Output::Event(_) => {}
            Output::Wait { .. } => return sent,
        }
    }
}

/// Says hello, and answers the question that comes for it.
fn meet(mesh: &mut Mesh, from: SocketAddr, hello: &proto::Datagram, seq: u64, now: Instant) {
    give(mesh, from, hello, now).expect("taken");
    let question = sent(mesh, now).into_iter().filter(|(to, _)| *to == from);
    let mut asked = question.filter_map(|(_, said)| match said.body {
        Some(Body::Ack(ack)) if ack.challenge != 0 => Some(ack.challenge),
        _ => None,
    });
    let token = asked.next_back().expect("who has not answered yet is asked");
    let body = Some(Body::Ack(proto::Ack { token, have: 9, ..Default::default() }));
    let answer = proto::Datagram { seq, updates: Vec::new(), body, ..hello.clone() };
    give(mesh, from, &answer, now).expect("taken");
    sent(mesh, now);
}

fn dropped(mesh: &Mesh) -> Vec<(&'static str, u64)> {
    let counted = mesh.counters().not_forwarded().filter(|(_, count)| *count > 0);
    counted.map(|(reason, count)| (reason.label(), count)).collect()
}

/// A keeper that "kept" named, and that has heard it and "asker".
fn scene(now: Instant) -> Mesh {
    let mut mesh = keeper(now);
    meet(&mut mesh, at(20), &hello("kept", "keeper", &["keeper"], 1), 0, now);
    meet(&mut mesh, at(30), &hello("asker", "keeper", &["other"], 1), 0, now);
    mesh
}

#[test]
fn what_is_for_a_member_that_named_it_is_passed_on_as_it_came_to_where_that_was_heard() {
    let now = Instant::now();
    let mut mesh = scene(now);
    let inner = hello("asker", "kept", &["other"], 2);
    give(&mut mesh, at(30), &around("asker", "keeper", 3, &inner), now).expect("taken");
    let out = sent(&mut mesh, now);
    assert_eq!(out.len(), 1, "one for one, and no answer");
    let (to, passed) = &out[0];
    assert_eq!((*to, passed.from.as_str(), passed.to.as_str()), (at(20), "keeper", "kept"));
    let Some(Body::Forward(forward)) = &passed.body else { panic!("{passed:?}") };
    assert_eq!(forward.datagram, inner.encode_to_vec());
    assert_eq!((mesh.counters().forwarded, dropped(&mesh)), (1, vec![]));
}

#[test]
fn nothing_is_passed_on_to_who_did_not_ask_for_it_or_was_not_heard_or_twice() {
    let mut now = Instant::now();
    let mut mesh = scene(now);
    // To the other one, which has another keeper; to nobody; and what a keeper passed on already.
    let cases = [
        (around("kept", "keeper", 2, &hello("kept", "asker", &["keeper"], 3)), at(20), "not_kept"),
        (around("kept", "keeper", 4, &hello("kept", "nobody", &["keeper"], 5)), at(20), "not_kept"),
        (around("asker", "keeper", 6, &hello("third", "kept", &["asker"], 7)), at(30), "not_sender"),
    ];
    for (datagram, from, _) in &cases {
        give(&mut mesh, *from, datagram, now).expect("taken");
        assert_eq!(sent(&mut mesh, now), vec![]);
    }
    assert_eq!(dropped(&mesh), [("not_kept", 2), ("not_sender", 1)]);
    now += Duration::from_secs(151);
    give(&mut mesh, at(30), &around("asker", "keeper", 8, &hello("asker", "kept", &[], 9)), now)
        .expect("taken");
    assert_eq!(dropped(&mesh), [("not_kept", 2), ("not_heard", 1), ("not_sender", 1)]);
    assert_eq!(mesh.counters().forwarded, 0);
}

#[test]
fn a_sender_that_floods_a_keeper_has_its_share_passed_on_and_no_more() {
    let now = Instant::now();
    let mut mesh = scene(now);
    for seq in 2..1000 {
        let inner = hello("asker", "kept", &[], seq * 2);
        give(&mut mesh, at(30), &around("asker", "keeper", seq * 2 + 1, &inner), now).expect("taken");
    }
    assert_eq!(mesh.counters().forwarded, u64::from(BURST));
    assert_eq!(dropped(&mesh), [("too_many", 998 - u64::from(BURST))]);
}

#[test]
fn a_forward_in_a_forward_one_with_news_and_one_to_nobody_are_refused_and_change_nothing() {
    let now = Instant::now();
    let mut mesh = scene(now);
    let inner = hello("asker", "kept", &[], 2);
    let nested = around("asker", "keeper", 4, &around("asker", "kept", 3, &inner));
    let with_news =
        proto::Datagram { updates: inner.updates.clone(), ..around("asker", "keeper", 5, &inner) };
    let to_nobody = around("asker", "keeper", 6, &proto::Datagram { to: String::new(), ..inner.clone() });
    let of_itself = around("asker", "keeper", 7, &hello("asker", "keeper", &[], 8));
    let to_itself = around("asker", "keeper", 9, &hello("kept", "kept", &[], 10));
    for datagram in [nested, with_news, to_nobody, of_itself, to_itself] {
        let before = mesh.counters().forwarded;
        assert_eq!(give(&mut mesh, at(30), &datagram, now), Err(Rejected::Malformed));
        assert_eq!(mesh.counters().forwarded, before);
        assert_eq!(sent(&mut mesh, now), vec![]);
    }
}

#[test]
fn what_was_passed_on_is_taken_once_and_does_not_move_its_sender() {
    let now = Instant::now();
    let mut mesh = mesh("me", "mine", now);
    give(&mut mesh, at(40), &hello("keeper", "me", &[], 1), now).expect("taken");
    sent(&mut mesh, now);
    let inner = hello("asker", "me", &["keeper"], 2);
    let passed = |seq, inner: &proto::Datagram| around("keeper", "me", seq, inner);
    give(&mut mesh, at(40), &passed(2, &inner), now).expect("taken");
    // The keeper again, with the same, and with its own name on what another said.
    assert_eq!(give(&mut mesh, at(40), &passed(3, &inner), now), Err(Rejected::Replayed));
    let id = mesh.table.find(name_hash("asker")).expect("its record came with it");
    let contact = mesh.table.at(id).contact.as_ref().expect("it was heard");
    assert_eq!(contact.heard, None, "of where it is nothing is known");
    // Heard straight, and where it answers, it is answered there, and what comes through the keeper after that changes nothing.
    give(&mut mesh, at(50), &hello("asker", "me", &["keeper"], 3), now).expect("taken");
    assert_ne!(mesh.way(id), Some(Way::At(at(50))), "anybody may have sent that from there");
    sent(&mut mesh, now);
    meet(&mut mesh, at(50), &hello("asker", "me", &["keeper"], 5), 1, now);
    give(&mut mesh, at(40), &passed(4, &hello("asker", "me", &["keeper"], 6)), now).expect("taken");
    assert_eq!(mesh.way(id), Some(Way::At(at(50))));
    // One that was held back on its way, and comes from elsewhere, moves nothing either.
    give(&mut mesh, at(66), &hello("asker", "me", &["keeper"], 4), now).expect("taken");
    assert_eq!(mesh.way(id), Some(Way::At(at(50))));
    sent(&mut mesh, now);
    meet(&mut mesh, at(51), &hello("asker", "me", &["keeper"], 7), 8, now);
    assert_eq!(mesh.way(id), Some(Way::At(at(51))), "who roams is followed");
}

#[test]
fn what_fills_the_room_fits_through_a_keeper_whatever_the_names() {
    let now = Instant::now();
    let name = |letter: &str| letter.repeat(63).parse::<NodeName>().expect("a name");
    let mut mesh = mesh(name("m").as_str(), "mine", now);
    let room = mesh.room_through(&name("k"), name("x").as_str());
    let body = Body::Push(proto::Push { sync: true });
    let packed = mesh.pack(name("x").as_str(), body, Vec::new(), room).expect("it fits");
    mesh.send_around(at(9), name("k").as_str(), vec![0; room]);
    assert_eq!(dropped(&mesh), vec![], "what fills the room fits around");
    assert!(packed.len() <= room);
    // What is promised to anti-entropy of a forwarded datagram.
    assert!(room >= 63 * 2 + 50 + 790, "{room}");
}

#[test]
fn a_share_is_bounded_for_sender_and_receiver_and_comes_back() {
    let mut now = Instant::now();
    let mut shares = Shares::default();
    let passed = (0..1000).filter(|receiver| shares.take(1, 100 + receiver, now)).count();
    assert_eq!(passed, BURST as usize);
    assert!(shares.take(2, 100, now), "another sender has its own");
    now += Duration::from_secs(1);
    let passed = (0..1000).filter(|_| shares.take(1, 99, now)).count();
    assert_eq!(passed as u128, Duration::from_secs(1).as_millis() / EACH.as_millis());
    let passed = (0..1000).filter(|sender| shares.take(1000 + sender, 99, now)).count();
    assert!(passed < BURST as usize, "many senders share what one receiver may have: {passed}");
}

#[test]
fn shares_are_bounded() {
    let now = Instant::now();
    let mut shares = Shares::default();
    let passed = (0..MAX_SHARES as u64 * 2).filter(|number| shares.take(*number, *number, now)).count();
    assert_eq!(passed, MAX_SHARES / 2);
    assert!(shares.take(1, 1, now + EACH * 2), "who is done makes room");
}
