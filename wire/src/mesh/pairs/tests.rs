//! Three sites of one node each, which speaks for it: who gets the secret of two, and who does not.

use super::*;
use crate::kem_box;
use crate::mesh::proto::{self, Body};
use crate::mesh::{Authority, Facts, LeasedSubnet, MeshConfig, NodeKey, Timing, Trust, TunnelFacts};
use crate::seal::{ClusterKey, KeyRing};
use crate::site::SiteKey;
use crate::types::{Epoch, Subnet, TunnelKey};
use prost::Message;
use std::net::SocketAddr;
use std::sync::Arc;

const CLUSTER: &str = "test";

fn ring() -> KeyRing {
    KeyRing::new(vec![ClusterKey::from_bytes([1; 32])]).expect("a ring")
}

fn site(number: u8) -> SiteName {
    format!("s{number}").parse().expect("a name")
}

fn site_key(number: u8) -> SiteKey {
    SiteKey::from_secret([number + 100; 32])
}

fn prefix(number: u8) -> Subnet {
    format!("10.{number}.0.0/16").parse().expect("a subnet")
}

fn address(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 7117))
}

/// Three nodes, and the time.
struct Three {
    meshes: [Mesh; 3],
    now: Instant,
    /// What is not delivered: from, to.
    cut: Vec<(u8, u8)>,
    /// How many parts of answers went from one to another.
    answers: BTreeMap<(u8, u8), usize>,
}

impl Three {
    fn up() -> Self {
        let now = Instant::now();
        let meshes = [0, 1, 2].map(|number| start(number, now));
        let mut three = Self { meshes, now, cut: Vec::new(), answers: BTreeMap::new() };
        three.run(30);
        three
    }

    fn node(&mut self, number: u8) -> &mut Mesh {
        &mut self.meshes[usize::from(number)]
    }

    fn run(&mut self, seconds: u32) {
        for _ in 0..seconds * 10 {
            self.now += Duration::from_millis(100);
            for number in 0..3 {
                let now = self.now;
                self.node(number).handle_timeout(now);
                self.deliver(number);
            }
        }
    }

    fn deliver(&mut self, from: u8) {
        let now = self.now;
        loop {
            let output = self.node(from).poll_output(now);
            let (to, datagram) = match output {
                Output::Send { to, datagram } => (to, datagram),
                Output::Event(_) => continue,
                Output::Wait { .. } => return,
            };
            let receiver = (0..3).find(|number| address(*number) == to).expect("one of three");
            let content = ring().open(CLUSTER, &datagram).expect("sealed here");
            let message = proto::Datagram::decode(&content[..]).expect("encoded here");
            if matches!(&message.body, Some(Body::PairPart(part)) if part.answers) {
                *self.answers.entry((from, receiver)).or_default() += 1;
            }
            if !self.cut.contains(&(from, receiver)) {
                let _ = self.node(receiver).handle_datagram(address(from), &datagram, now);
            }
        }
    }

    /// The secrets that one has with another, by id.
    fn held(&self, number: u8, other: u8) -> Vec<KeyId> {
        let secrets = self.meshes[usize::from(number)].pair_secrets_with(&site(other));
        secrets.iter().map(PairSecret::id).collect()
    }
}

fn start(number: u8, now: Instant) -> Mesh {
    let config = MeshConfig {
        cluster: CLUSTER.into(),
        node: format!("n{number}").parse().expect("a name"),
        site: site(number),
        key: NodeKey::from_secret([number + 1; 32]),
        ring: ring(),
        seeds: (0..3).filter(|other| *other != number).map(address).collect(),
        incarnation: 1,
        timing: Timing::default(),
        verify: Arc::new(crate::record::Each),
    };
    let mut mesh = Mesh::new(config, [number + 50; 32], now);
    mesh.set_authority(Authority::Claims, now);
    let trust = Trust {
        site: site_key(number).public(),
        prefixes: vec![prefix(number)],
        signer: Some(site_key(number)),
    };
    mesh.set_trust(trust, Vec::new(), now).expect("it speaks");
    for other in (0..3).filter(|other| *other != number) {
        mesh.admit(site(other), site_key(other).public(), vec![prefix(other)], now).expect("it speaks");
    }
    let subnet = format!("10.{number}.0.0/24").parse().expect("a subnet");
    let tunnel = TunnelFacts {
        key: TunnelKey([number + 1; 32]),
        port: 51820,
        preshared: ring().ids().collect(),
        pairs: Vec::new(),
        carrier: None,
        detour: None,
    };
    let facts = Facts {
        subnets: vec![LeasedSubnet { subnet, epoch: Epoch(1) }],
        gossip: vec![address(number)],
        tunnel: Some(tunnel),
        ..Facts::default()
    };
    mesh.announce(facts, now);
    mesh
}

/// One that makes its secret with the second, the second, and the third.
fn parts() -> (u8, u8, u8) {
    let mut by_key = [0, 1, 2];
    by_key.sort_by_key(|number| site_key(*number).public());
    (by_key[2], by_key[1], by_key[0])
}

#[test]
fn each_two_have_one_secret_and_no_other_has_it() {
    let three = Three::up();
    let mut all = BTreeSet::new();
    for (one, other) in [(0, 1), (0, 2), (1, 2)] {
        let secrets = three.held(one, other);
        assert_eq!((secrets.len(), &secrets), (1, &three.held(other, one)));
        all.extend(secrets);
    }
    assert_eq!(all.len(), 3);
}

#[test]
fn a_node_of_a_third_site_that_asks_is_not_answered() {
    let (maker, second, third) = parts();
    let mut three = Three::up();
    let answered = three.answers.get(&(maker, third)).copied();
    let (key, of) = (site_key(maker).public(), site_key(second).public());
    let now = three.now;
    let name = format!("n{maker}").parse().expect("a name");
    let thief = three.node(third);
    thief.advance(now);
    let id = thief.table.find_name(&name).expect("it is known");
    // As the second would, but under the third's own name and key.
    thief.ask_for_secret(id, of, key, of);
    three.run(5);
    assert_eq!(three.answers.get(&(maker, third)).copied(), answered);
    assert!(!three.held(maker, second).is_empty() && three.held(third, second) != three.held(maker, second));
}

#[test]
fn an_offer_from_who_does_not_make_the_secret_is_not_asked_about() {
    let (maker, second, third) = parts();
    let mut three = Three::up();
    let names = [maker, second, third].map(|number| format!("n{number}").parse().expect("a name"));
    let keys = [maker, second, third].map(|number| site_key(number).public());
    let now = three.now;
    // The third offers the secret of the two others, and one that the second would have to make with it.
    for (to, other) in [(0, keys[1]), (1, keys[0]), (1, keys[1]), (1, keys[2]), (0, keys[0]), (0, keys[2])] {
        let node = three.node(third);
        node.advance(now);
        let id = node.table.find_name(&names[to]).expect("it is known");
        node.offer(id, other, KeyId([7; 4]));
    }
    three.deliver(third);
    for number in [maker, second] {
        assert!(three.node(number).pairs.talk.asked_about().is_empty(), "n{number}");
    }
}

#[test]
fn an_answer_that_the_maker_did_not_sign_or_that_was_changed_is_not_taken() {
    let (maker, second, third) = parts();
    let mut three = Three::up();
    three.cut = vec![(maker, second)];
    three.node(maker).renew_pairs();
    three.run(1);
    let before = three.held(second, maker);
    let key = site_key(maker).public();
    let now = three.now;
    let name = format!("n{maker}").parse().expect("a name");
    let node = three.node(second);
    node.advance(now);
    let id = node.table.find_name(&name).expect("it is known");
    node.ask_for_secret(id, key, key, site_key(second).public());
    let (attempt, question) = node.pairs.talk.asked_about().remove(&key).expect("it asked");
    let public = proto::PairQuestion::decode(&question[..]).expect("encoded here").key;
    let secrets = [PairSecret::new(99, [9; 32])];
    let sealed = kem_box::seal(&public, [1; 32], &PairSecret::all_to_bytes(&secrets)).expect("a key");
    let content = node.answer_content(&question, &sealed);
    let answer = |signer: &SiteKey, sealed: &[u8], content: &[u8]| {
        let signature = signer.sign_bytes(talk::ANSWER_DOMAIN, content).to_vec();
        proto::PairAnswer { sealed: sealed.to_vec(), signature }.encode_to_vec()
    };
    let mut changed = sealed.clone();
    changed[0] ^= 1;
    let own = site_key(maker);
    let wrong = [
        answer(&site_key(third), &sealed, &content),
        answer(&own, &changed, &content),
        answer(&own, &changed, &node.answer_content(&question, &changed)),
        answer(&own, &sealed, &node.answer_content(b"another question", &sealed)),
        Vec::new(),
        vec![0; 100],
    ];
    for content in wrong {
        node.on_pair_answer(attempt, &content);
        let held: Vec<_> = node.pair_secrets_with(&site(maker)).iter().map(PairSecret::id).collect();
        assert_eq!(held, before);
    }
    node.on_pair_answer(attempt, &answer(&own, &sealed, &content));
    assert_eq!(node.pair_secrets_with(&site(maker)).first(), Some(&secrets[0]), "the right one is");
}

#[test]
fn a_secret_that_was_replaced_is_forgotten_and_a_node_that_asks_too_often_changes_nothing() {
    let (maker, second, _) = parts();
    let mut three = Three::up();
    let first = three.held(maker, second);
    three.node(maker).renew_pairs();
    three.run(5);
    let both = three.held(second, maker);
    assert_eq!((both.len(), both[1], &both), (2, first[0], &three.held(maker, second)));
    three.run(OVERLAP.as_secs() as u32);
    assert_eq!(
        (three.held(maker, second), three.held(second, maker)),
        (both[..1].to_vec(), both[..1].to_vec())
    );
    // It says that it knows later ones, over and over: one is made, and no more for a while.
    let key = site_key(second).public();
    let now = three.now;
    let node = three.node(maker);
    node.advance(now);
    let before = node.pairs.held[&key].secrets[0].generation();
    for ahead in [1, 5, AHEAD, u32::MAX - before] {
        node.overtake(&key, before + ahead);
    }
    assert_eq!(node.pairs.held[&key].secrets[0].generation(), before + 2);
}
