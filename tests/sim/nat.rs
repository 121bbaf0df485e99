//! Sites behind NATs, in virtual time: gossip crosses them, whatever they do, and however they change.
//!
//! Site 0 is public. All others have one private range, so an address of theirs means another node in each of them.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use weft_tests::sim::meshes::*;
use weft_tests::sim::nat::Behaviour;
use weft_tests::sim::net::Realm;
use weft_wire::mesh::*;

/// The nodes of a site.
const SIZE: usize = 3;

#[derive(Debug, Clone, Copy)]
enum Kind {
    Nat(Behaviour),
    /// One behind another: a home router behind a carrier's.
    Double(Behaviour, Behaviour),
}

struct World {
    net: Meshes,
    /// What each site but the public one is behind, the outermost last.
    realms: Vec<Vec<Realm>>,
    nodes: usize,
}

fn outside(site: usize, nth: u8) -> IpAddr {
    IpAddr::from([203, 0, 113, 10 * site as u8 + nth])
}

fn inside(node: usize) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, 1 + (node % SIZE) as u8], 7117))
}

impl World {
    /// A public site of `open` nodes, and a site behind each of these.
    fn new(test: &str, open: usize, kinds: &[Kind]) -> Self {
        Self::timed(test, open, kinds, &Timing::default())
    }

    fn timed(test: &str, open: usize, kinds: &[Kind], timing: &Timing) -> Self {
        let mut net = Meshes::new(test);
        let nodes = SIZE * (kinds.len() + 1);
        let mut realms = Vec::new();
        for (place, kind) in kinds.iter().enumerate() {
            let site = place + 1;
            let mut behind = Vec::new();
            let behaviour = match kind {
                Kind::Nat(behaviour) => *behaviour,
                Kind::Double(inner, carrier) => {
                    behind.push(net.net.add_nat(Realm::PUBLIC, outside(site, 1), *carrier));
                    *inner
                }
            };
            let (outer, address) = match behind.last() {
                Some(carrier) => (*carrier, IpAddr::from([100, 64, site as u8, 1])),
                None => (Realm::PUBLIC, outside(site, 1)),
            };
            behind.insert(0, net.net.add_nat(outer, address, behaviour));
            realms.push(behind);
        }
        let mut world = Self { net, realms, nodes };
        for node in (0..open).chain(SIZE..nodes) {
            world.start(node, 1, timing);
        }
        world
    }

    fn start(&mut self, node: usize, starts: u64, timing: &Timing) {
        let site = node / SIZE;
        let mut facts = facts(node);
        if site > 0 {
            self.net.net.move_behind(address(node), self.realms[site - 1][0], inside(node));
            facts.gossip = vec![inside(node)];
            facts.underlay = vec![inside(node).ip()];
        }
        let config = MeshConfig {
            site: format!("s{site}").parse().unwrap(),
            seeds: vec![address(0)],
            timing: timing.clone(),
            ..config(node, starts)
        };
        self.net.start(config, table(self.nodes));
        self.net.announce(node, facts);
    }

    fn running(&self) -> Vec<usize> {
        (0..self.nodes).filter(|node| self.net.runs(*node)).collect()
    }

    fn behind(&self) -> Vec<usize> {
        (SIZE..self.nodes).filter(|node| self.net.runs(*node)).collect()
    }

    fn converge(&mut self, what: &str, limit: Duration) -> Duration {
        let all = self.running();
        self.net.run_until(what, limit, |net| net.converged(&all))
    }

    fn keepers(&self, node: usize) -> Vec<String> {
        self.net.mesh(node).reach().keepers.iter().map(|keeper| keeper.node.to_string()).collect()
    }

    /// Until every node behind a NAT has so many keepers, and its record names them.
    fn await_keepers(&mut self, count: usize) -> Duration {
        let behind = self.behind();
        self.net.run_until("keepers", seconds(30), |net| {
            behind.iter().all(|node| {
                let record = net.mesh(*node).record().unwrap();
                net.mesh(*node).reach().keepers.len() == count
                    && record.facts.reachability.keepers.len() == count
            })
        })
    }

    /// Lets time pass in which nobody may be thought to be anything but alive by anybody.
    fn stay_calm(&mut self, time: Duration) {
        let all = self.running();
        let end = self.net.net.now + time;
        while self.net.net.now < end {
            self.net.run(seconds(1));
            for node in &all {
                let counts =
                    self.net.mesh(*node).members().filter(|member| member.state != MemberState::Alive);
                let ill: Vec<_> = counts.map(|member| format!("{} {}", member.node, member.state)).collect();
                assert!(ill.is_empty(), "n{node} thinks {ill:?}; WEFT_SEED={}", self.net.seed);
            }
        }
    }

    fn suspicions(&self) -> u64 {
        self.running().into_iter().map(|node| self.net.mesh(node).counters().suspicions).sum()
    }
}

const CARRIER: Behaviour = Behaviour::PORT_RESTRICTED.with_timeout(Duration::from_secs(60));

/// Two sites behind NATs of one kind, and two open nodes: all know all, and for ten minutes nobody is suspected.
fn two_sites_behind(test: &str, kind: Kind, mapping: Mapping) {
    let mut world = World::new(test, 2, &[kind, kind]);
    let took = world.converge("all know all", seconds(30));
    println!("{test}: converged in {took:?}, keepers in {:?}", world.await_keepers(2));
    world.net.run(seconds(20));
    let before = world.suspicions();
    let misdirected =
        |node| if node == 2 { 0 } else { world.net.mesh(node).counters().rejected(Rejected::Misdirected) };
    let astray: Vec<u64> = (0..world.nodes).map(misdirected).collect();
    world.stay_calm(seconds(600));
    assert_eq!(world.suspicions(), before, "WEFT_SEED={}", world.net.seed);
    for node in world.behind() {
        let stray = world.net.mesh(node).counters().rejected(Rejected::Misdirected) - astray[node];
        assert_eq!(stray, 0, "n{node} got what was for a node with its address in another site");
        let view = world.net.mesh(node).reach();
        assert_eq!(
            (view.reach, view.translated, view.mapping),
            (Reach::Behind, Some(true), mapping),
            "n{node}"
        );
        let site = node / SIZE;
        assert!(view.reflexive.iter().all(|seen| seen.ip() == outside(site, 1)), "n{node}: {view:?}");
        assert_eq!(view.reflexive.len() == 1, mapping == Mapping::Independent, "n{node}: {view:?}");
        assert!(world.net.mesh(node).counters().forwarded == 0, "who is not reached passes nothing on");
    }
    for node in [0, 1] {
        let view = world.net.mesh(node).reach();
        assert_eq!((view.reach, view.translated), (Reach::Open, Some(false)), "n{node}");
        assert!(view.keepers.is_empty());
        assert!(world.net.mesh(node).counters().forwarded > 0);
    }
}

#[test]
fn sites_behind_full_cone_nats_know_each_other_and_nobody_is_suspected() {
    two_sites_behind("full_cone", Kind::Nat(Behaviour::FULL_CONE), Mapping::Independent);
}

#[test]
fn sites_behind_address_restricted_nats_know_each_other_and_nobody_is_suspected() {
    two_sites_behind("address_restricted", Kind::Nat(Behaviour::ADDRESS_RESTRICTED), Mapping::Independent);
}

#[test]
fn sites_behind_port_restricted_nats_know_each_other_and_nobody_is_suspected() {
    two_sites_behind("port_restricted", Kind::Nat(Behaviour::PORT_RESTRICTED), Mapping::Independent);
}

#[test]
fn sites_behind_symmetric_nats_know_each_other_and_nobody_is_suspected() {
    two_sites_behind("symmetric", Kind::Nat(Behaviour::SYMMETRIC), Mapping::Dependent);
}

#[test]
fn sites_behind_two_nats_know_each_other_and_nobody_is_suspected() {
    two_sites_behind("double", Kind::Double(Behaviour::PORT_RESTRICTED, CARRIER), Mapping::Independent);
}

/// A site behind each kind, and one open node for all.
fn every_kind(test: &str) -> World {
    let kinds = [
        Kind::Nat(Behaviour::FULL_CONE),
        Kind::Nat(Behaviour::ADDRESS_RESTRICTED),
        Kind::Nat(Behaviour::PORT_RESTRICTED),
        Kind::Nat(Behaviour::SYMMETRIC),
        Kind::Double(Behaviour::SYMMETRIC, CARRIER),
    ];
    World::new(test, 1, &kinds)
}

#[test]
fn one_open_node_is_enough_for_sites_behind_all_kinds_of_nat() {
    let mut world = every_kind("one_open_node");
    world.net.net.loss_percent = 2;
    world.converge("all know all", seconds(60));
    world.await_keepers(1);
    world.net.run(seconds(30));
    // With loss there are suspicions, but all of them are objected to in time.
    let all = world.running();
    for _ in 0..600 {
        world.net.run(seconds(1));
        for node in &all {
            let dead = world.net.mesh(*node).members().find(|member| member.state == MemberState::Dead);
            assert!(dead.is_none(), "n{node} thinks {dead:?}; WEFT_SEED={}", world.net.seed);
        }
    }
}

#[test]
fn a_keeper_that_dies_is_replaced_in_seconds_and_those_it_kept_live() {
    let kinds = [Kind::Nat(Behaviour::SYMMETRIC), Kind::Nat(Behaviour::PORT_RESTRICTED)];
    let mut world = World::new("a_keeper_dies", 3, &kinds);
    world.converge("all know all", seconds(30));
    world.await_keepers(2);
    world.net.run(seconds(30));
    let victim = world.keepers(SIZE).first().unwrap()[1..].parse::<usize>().unwrap();
    world.net.crash(victim);
    let dead = name(victim);
    let behind = world.behind();
    let took = world.net.run_until("others", seconds(30), |net| {
        behind.iter().all(|node| {
            let keepers = net.mesh(*node).reach().keepers;
            keepers.len() == 2 && keepers.iter().all(|keeper| keeper.node != dead)
        })
    });
    println!("a_keeper_dies: replaced in {took:?}");
    assert!(took <= seconds(15), "{took:?}; WEFT_SEED={}", world.net.seed);
    // Nobody but the dead one is thought dead, then and later.
    for _ in 0..120 {
        world.net.run(seconds(1));
        for node in world.running() {
            let dead = world.net.mesh(node).members().filter(|member| member.state == MemberState::Dead);
            let dead: Vec<_> = dead.map(|member| member.node.clone()).collect();
            assert!(dead.iter().all(|node| *node == name(victim)), "n{node}: {dead:?}");
        }
    }
}

/// Something happens to the NATs: all are alive again within the bound, and nobody was thought dead.
fn upset(test: &str, bound: Duration, what: impl Fn(&mut World)) {
    let kinds = [
        Kind::Nat(Behaviour::FULL_CONE),
        Kind::Nat(Behaviour::PORT_RESTRICTED),
        Kind::Nat(Behaviour::SYMMETRIC),
        Kind::Double(Behaviour::PORT_RESTRICTED, CARRIER),
    ];
    let mut world = World::new(test, 2, &kinds);
    world.converge("all know all", seconds(60));
    world.await_keepers(2);
    world.net.run(seconds(30));
    for _ in 0..3 {
        what(&mut world);
        let end = world.net.net.now + bound;
        while world.net.net.now < end {
            world.net.run(Duration::from_millis(500));
            for node in world.running() {
                let dead = world.net.mesh(node).members().find(|member| member.state == MemberState::Dead);
                assert!(dead.is_none(), "n{node} thinks {dead:?}; WEFT_SEED={}", world.net.seed);
            }
        }
        world.stay_calm(seconds(60));
    }
}

#[test]
fn nats_that_forget_all_mappings_are_crossed_again_at_once() {
    upset("nats_reboot", seconds(20), |world| {
        for realm in world.realms.iter().flatten() {
            world.net.net.nat(*realm).reboot();
        }
    });
}

#[test]
fn nats_that_change_their_address_are_crossed_again_at_once() {
    upset("nats_move", seconds(20), |world| {
        for (place, realms) in world.realms.iter().enumerate() {
            let nat = world.net.net.nat(*realms.last().unwrap());
            let IpAddr::V4(before) = nat.outside else { panic!("an IPv4 address") };
            nat.reboot();
            nat.outside = outside(place + 1, 1 + before.octets()[3] % 10);
        }
    });
}

#[test]
fn a_site_that_loses_the_wan_keeps_itself_and_comes_back_through_its_nat() {
    for kind in [Behaviour::PORT_RESTRICTED, Behaviour::SYMMETRIC] {
        let mut world = World::new("wan_lost", 2, &[Kind::Nat(kind), Kind::Nat(kind)]);
        world.converge("all know all", seconds(30));
        world.await_keepers(2);
        let all = world.running();
        let (cut, others): (Vec<_>, Vec<_>) = all.iter().copied().partition(|node| node / SIZE == 1);
        for node in &cut {
            world.net.net.sides.insert(address(*node), 1);
        }
        world.net.run_until("apart", seconds(90), |net| {
            cut.iter().all(|node| net.sees(*node, &cut)) && others.iter().all(|node| net.sees(*node, &others))
        });
        world.net.run(seconds(120));
        world.net.net.sides.clear();
        let took = world.converge("healed", seconds(60));
        println!("wan_lost: healed in {took:?}");
        world.net.run(seconds(20));
        world.await_keepers(2);
        world.stay_calm(seconds(120));
    }
}

#[test]
fn no_keeper_to_be_had_is_seen_and_ends_when_an_open_node_comes() {
    let mut world = World::new("no_keeper", 1, &[Kind::Nat(Behaviour::SYMMETRIC)]);
    world.converge("all know all", seconds(30));
    world.await_keepers(1);
    world.net.crash(0);
    let behind = world.behind();
    world.net.run_until("no keeper", seconds(30), |net| {
        behind.iter().all(|node| net.mesh(*node).reach().keepers.is_empty())
    });
    assert!(behind.iter().all(|node| world.net.mesh(*node).reach().reach == Reach::Behind));
    world.start(0, 2, &Timing::default());
    world.converge("back", seconds(30));
    world.await_keepers(1);
}

/// A mesh that says hardly anything, so that nothing but the node itself keeps its mappings.
fn quiet() -> Timing {
    Timing {
        probe_interval: seconds(3600),
        probe_timeout: seconds(1),
        sync_interval: seconds(7200),
        rejoin_interval: seconds(3600),
        ..Timing::default()
    }
}

/// What one ping from a node to another takes; nothing where it has no answer within two seconds.
fn ping(net: &mut Meshes, from: usize, to: usize, token: u64) -> Option<Duration> {
    net.with(from, |mesh, now| mesh.ping(&name(to), token, now)).unwrap();
    net.run(seconds(2));
    net.events(from).iter().find_map(|event| match event {
        MeshEvent::Pong { token: answered, rtt, .. } if *answered == token => Some(*rtt),
        _ => None,
    })
}

#[test]
fn a_quiet_node_finds_how_seldom_it_may_use_its_mapping() {
    for lives in [30, 60, 90, 300] {
        let behaviour = Behaviour::SYMMETRIC.with_timeout(seconds(lives));
        let mut world = World::timed("quiet", 2, &[Kind::Nat(behaviour)], &quiet());
        world.converge("all know all", seconds(60));
        let (all, behind) = (world.running(), world.behind());
        // Once each asks each, those inside first: then all know how they are reached.
        for (from, to) in behind.iter().chain(&all).flat_map(|from| all.iter().map(move |to| (*from, *to))) {
            if from != to {
                ping(&mut world.net, from, to, 1);
            }
        }
        world.await_keepers(2);
        world.net.run(seconds(3600));
        let node = behind[0];
        let pauses: Vec<_> =
            world.net.mesh(node).reach().keepers.iter().map(|keeper| keeper.pause.as_secs()).collect();
        println!("quiet: mappings live {lives} s, used every {pauses:?} s");
        let wanted = lives.min(120);
        assert!(
            pauses.iter().all(|pause| *pause < lives && pause * 8 / 7 + 13 >= wanted),
            "{pauses:?} of {lives} s; WEFT_SEED={}",
            world.net.seed
        );
        // So seldom is enough: its keepers reach it at any time, and it sends no more than it must.
        let before = world.net.net.sent(address(node)).datagrams;
        let mut asked = 0;
        for round in 0..60 {
            world.net.run(seconds(58));
            if round % 6 == 0 {
                asked += 2;
                for keeper in [0, 1] {
                    let answer = ping(&mut world.net, keeper, node, 1000 + round);
                    assert!(
                        answer.is_some(),
                        "n{keeper} does not reach n{node}; WEFT_SEED={}",
                        world.net.seed
                    );
                }
            }
        }
        let sent = world.net.net.sent(address(node)).datagrams - before;
        let most = 3600 * 2 / pauses.iter().min().unwrap() + asked + 60;
        println!("quiet: {sent} datagrams in an hour, at most {most}");
        assert!(sent <= most, "{sent} datagrams, {most} are enough");
    }
}

/// Whether a sealed datagram carries another one (`proto/mesh.proto`: the body after from, to, session and seq).
fn is_forward(datagram: &[u8]) -> bool {
    let content = ring(&[1]).open(CLUSTER, datagram).unwrap();
    let mut rest = &content[..];
    for tag in [0x0a, 0x12] {
        if rest[0] == tag {
            rest = &rest[2 + usize::from(rest[1])..];
        }
    }
    rest = &rest[9..];
    let seq = rest[1..].iter().position(|byte| byte & 0x80 == 0).unwrap();
    rest[seq + 2..].starts_with(&[0xa2, 0x01])
}

#[test]
fn a_keeper_that_passes_nothing_on_cuts_nobody_off_who_has_another() {
    let kinds = [Kind::Nat(Behaviour::SYMMETRIC), Kind::Nat(Behaviour::PORT_RESTRICTED)];
    let mut world = World::new("a_keeper_lies", 2, &kinds);
    world.converge("all know all", seconds(30));
    world.await_keepers(2);
    world.net.run(seconds(30));
    // It answers whoever asks, and drops what it is to pass on.
    world.net.net.withheld.insert(address(1), is_forward);
    let all = world.running();
    for _ in 0..300 {
        world.net.run(seconds(1));
        for node in &all {
            let dead = world.net.mesh(*node).members().find(|member| member.state == MemberState::Dead);
            assert!(dead.is_none(), "n{node} thinks {dead:?}; WEFT_SEED={}", world.net.seed);
        }
    }
    let lost = world.net.mesh(1).counters().forwarded;
    assert!(lost > 100, "it was to pass on {lost}");
}

#[test]
fn a_replayed_datagram_moves_nobody() {
    let mut world = World::new("replay", 1, &[Kind::Nat(Behaviour::PORT_RESTRICTED)]);
    world.net.net.gather(200);
    world.converge("all know all", seconds(30));
    world.await_keepers(1);
    world.net.run(seconds(10));
    let node = SIZE;
    let attacker: SocketAddr = "192.0.2.66:4242".parse().unwrap();
    let heard: Vec<_> =
        world.net.net.gathered().iter().filter(|gathered| gathered.to == address(0)).cloned().collect();
    assert!(heard.len() > 10);
    for gathered in &heard {
        let outcome = world.net.inject(attacker, 0, &gathered.datagram);
        assert_eq!(outcome, Err(Rejected::Replayed));
        // And what it would not open, from the right place.
        let mut forged = gathered.datagram.to_vec();
        forged[60] ^= 1;
        assert_eq!(world.net.inject(gathered.from, 0, &forged), Err(Rejected::Forged));
    }
    assert!(ping(&mut world.net, 0, node, 7).is_some(), "it is reached where it was heard");
    assert!(world.net.net.gathered().iter().all(|gathered| gathered.to != attacker));
    world.stay_calm(seconds(60));
}

#[test]
fn an_address_that_is_announced_makes_a_node_behind_nat_a_keeper() {
    // The NAT of site 1 lets all in: the same as a port that is forwarded.
    let kinds = [Kind::Nat(Behaviour::FULL_CONE), Kind::Nat(Behaviour::SYMMETRIC)];
    let mut world = World::new("advertise", 1, &kinds);
    world.converge("all know all", seconds(30));
    let seen = world.net.mesh(SIZE).reach().reflexive[0];
    let mut told = world.net.mesh(SIZE).record().unwrap().facts.clone();
    told.certificate = None;
    told.reachability = Reachability { outside: vec![seen], ..Reachability::default() };
    world.net.announce(SIZE, told);
    // The record says both at once: no second one follows for what the first could say.
    let record = world.net.mesh(SIZE).record().unwrap();
    assert_eq!(
        (record.facts.reachability.reach, &record.facts.reachability.outside[..]),
        (Reach::Open, &[seen][..])
    );
    let of_the_other_site = 2 * SIZE..3 * SIZE;
    world.net.run_until("kept by both", seconds(60), |net| {
        of_the_other_site.clone().all(|node| {
            let keepers = net.mesh(node).reach().keepers;
            keepers.iter().any(|keeper| keeper.node == name(SIZE))
        })
    });
    assert_eq!(world.net.mesh(SIZE).reach().reach, Reach::Open);
    world.net.run(seconds(20));
    world.stay_calm(seconds(120));
}
