//! What a mesh believes: leases, claims, keys, names; and what it does with datagrams that lie.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rand_core::RngCore;
use weft_tests::sim::meshes::*;
use weft_wire::mesh::*;
use weft_wire::types::Epoch;

fn all(nodes: usize) -> Vec<usize> {
    (0..nodes).collect()
}

fn table_of(owners: &[(usize, usize, u8, u64)]) -> Authority {
    let entry = |(number, node, generation, epoch): &(usize, usize, u8, u64)| {
        let owner = Owner { node: name(*node), key: key(*node, *generation).public(), epoch: Epoch(*epoch) };
        (subnet(*number), owner)
    };
    Authority::Store(Arc::new(owners.iter().map(entry).collect()))
}

#[test]
fn replayed_datagrams_change_nothing_and_are_counted() {
    let mut net = Meshes::new("replayed_datagrams");
    net.net.gather(usize::MAX);
    for node in 0..5 {
        net.start(config(node, 1), table(5));
        net.announce(node, facts(node));
    }
    net.run_until("join", seconds(30), |net| net.converged(&all(5)));
    let mut changed = facts(2);
    changed.mtu = 1400;
    net.announce(2, changed);
    net.run(seconds(30));
    let recorded: Vec<_> =
        net.net.gathered().iter().map(|seen| (seen.from, seen.to, seen.datagram.to_vec())).collect();
    net.net.gather(0);
    assert!(recorded.len() > 100);
    for (from, to, datagram) in &recorded {
        for node in 0..5 {
            let before = knowledge(net.mesh(node));
            let replayed = net.mesh(node).counters().rejected(Rejected::Replayed);
            let result = net.inject(*from, node, datagram);
            if *to == address(node) {
                assert_eq!(result, Err(Rejected::Replayed));
                assert_eq!(net.mesh(node).counters().rejected(Rejected::Replayed), replayed + 1);
            }
            assert_eq!(before, knowledge(net.mesh(node)), "WEFT_SEED={}", net.seed);
        }
    }
    // The sessions of an earlier life are not taken either.
    net.crash(2);
    net.start(config(2, 2), table(5));
    net.announce(2, facts(2));
    net.run_until("rejoin", seconds(30), |net| net.converged(&all(5)));
    for (from, to, datagram) in recorded.iter().filter(|(from, ..)| *from == address(2)) {
        if *to == address(0) {
            assert_eq!(net.inject(*from, 0, datagram), Err(Rejected::Replayed));
        }
    }
    net.run(seconds(30));
    assert!(net.converged(&all(5)));
    assert!(net.mesh(0).members().all(|member| member.record.facts.mtu == 1500));
}

#[test]
fn forged_truncated_and_oversized_datagrams_change_nothing_and_are_counted() {
    let mut net = Meshes::with_nodes("forged_datagrams", 3);
    net.run_until("join", seconds(30), |net| net.converged(&all(3)));
    net.net.gather(usize::MAX);
    net.run(seconds(10));
    let recorded: Vec<_> =
        net.net.gathered().iter().map(|seen| (seen.from, seen.to, seen.datagram.to_vec())).collect();
    net.net.gather(0);
    let before: Vec<_> = (0..3).map(|node| knowledge(net.mesh(node))).collect();
    let mut lies = 0;
    for (from, _, datagram) in &recorded {
        let mut forged = datagram.clone();
        let bit = net.net.rng.next_u64() as usize % (forged.len() * 8);
        forged[bit / 8] ^= 1 << (bit % 8);
        let cut = net.net.rng.next_u64() as usize % datagram.len();
        let mut long = datagram.clone();
        long.resize(1201 + cut, 0);
        for lie in [&forged[..], &datagram[..cut], &long, &[], &[0; 9000]] {
            for node in 0..3 {
                net.inject(*from, node, lie).unwrap_err();
            }
            lies += 1;
        }
    }
    for (node, before) in before.iter().enumerate() {
        assert_eq!(*before, knowledge(net.mesh(node)));
        assert_eq!(net.mesh(node).counters().rejections().map(|(_, count)| count).sum::<u64>(), lies);
    }
}

#[test]
fn a_record_without_a_lease_is_refused() {
    let mut net = Meshes::new("a_record_without_a_lease");
    // Node 2 announces the subnet of node 1; node 3 one that nobody leased, below the latest epoch.
    for node in 0..4 {
        net.start(config(node, 1), table_of(&[(0, 0, 1, 1), (1, 1, 1, 2), (9, 0, 1, 99)]));
    }
    net.announce(0, facts(0));
    net.announce(1, facts(1));
    net.announce(2, Facts { subnets: facts(1).subnets, ..facts(2) });
    net.announce(3, facts(3));
    net.run(seconds(5));
    assert_eq!(net.verdict(0, 1), Some(Verdict::Accepted));
    for refused in [2, 3] {
        assert!(matches!(net.verdict(0, refused), Some(Verdict::Refused { .. })), "{refused}");
        assert_eq!(net.mesh(0).members().find(|m| *m.node == name(refused)).unwrap().routed, None);
    }
    let conflict = MeshEvent::Conflict { subnet: subnet(1), kept: name(1), refused: name(2) };
    assert_eq!(net.events(0).iter().filter(|event| **event == conflict).count(), 1);
}

#[test]
fn a_record_under_another_key_or_of_an_earlier_epoch_than_the_lease_is_refused() {
    let mut net = Meshes::new("a_record_under_another_key");
    // The lease of node 1 names another key of its, that of node 2 is of a later epoch than the record's.
    for node in 0..4 {
        net.start(config(node, 1), table_of(&[(0, 0, 1, 1), (1, 1, 2, 2), (2, 2, 1, 9), (3, 3, 1, 4)]));
        net.announce(node, facts(node));
    }
    net.run(seconds(5));
    assert_eq!(net.verdict(0, 3), Some(Verdict::Accepted));
    for (refused, why) in [(1, "is leased with key"), (2, "the lease is of epoch 9")] {
        let verdict = net.verdict(0, refused);
        assert!(
            matches!(&verdict, Some(Verdict::Refused { why: said }) if said.contains(why)),
            "{verdict:?}"
        );
        assert_eq!(net.mesh(0).member(&name(refused)).unwrap().routed, None);
    }
}

#[test]
fn a_record_ahead_of_the_lease_table_waits_for_it() {
    let mut net = Meshes::new("a_record_ahead");
    net.start(config(0, 1), table_of(&[(0, 0, 1, 1)]));
    net.start(config(1, 1), table(2));
    net.announce(0, facts(0));
    net.announce(1, facts(1));
    net.run(seconds(5));
    assert!(matches!(net.verdict(0, 1), Some(Verdict::Pending { .. })));
    net.with(0, |mesh, now| mesh.set_authority(table(2), now));
    assert_eq!(net.verdict(0, 1), Some(Verdict::Accepted));
    // The lease moved on: the same node with a later epoch keeps its traffic, another node takes it over.
    net.with(0, |mesh, now| mesh.set_authority(table_of(&[(0, 0, 1, 1), (1, 1, 1, 7)]), now));
    assert_eq!(net.verdict(0, 1), Some(Verdict::Accepted));
    net.with(0, |mesh, now| mesh.set_authority(table_of(&[(0, 0, 1, 1), (1, 2, 1, 8)]), now));
    assert!(matches!(net.verdict(0, 1), Some(Verdict::Refused { .. })));
    assert_eq!(net.events(0).last(), Some(&MeshEvent::RoutesChanged));
}

#[test]
fn what_was_accepted_stays_routed_while_a_newer_record_is_pending() {
    let mut net = Meshes::with_nodes("stays_routed_while_pending", 2);
    net.run_until("join", seconds(30), |net| net.converged(&all(2)));
    let mut more = facts(1);
    more.subnets.push(LeasedSubnet { subnet: subnet(50), epoch: Epoch(60) });
    net.announce(1, more.clone());
    net.run(seconds(5));
    let view = |net: &Meshes| {
        let member = net.mesh(0).members().next().unwrap();
        (member.verdict.is_accepted(), member.routed.map(|routed| routed.facts.subnets.len()))
    };
    assert_eq!(view(&net), (false, Some(1)));
    net.with(0, |mesh, now| {
        mesh.set_authority(table_of(&[(0, 0, 1, 1), (1, 1, 1, 2), (50, 1, 1, 60)]), now);
    });
    assert_eq!(view(&net), (true, Some(2)));
}

#[test]
fn of_two_claims_each_node_keeps_the_one_it_has_and_reports_the_other() {
    let mut net = Meshes::new("two_claims");
    for node in 0..4 {
        net.start(config(node, 1), Authority::Claims);
    }
    for node in 0..3 {
        net.announce(node, facts(node));
    }
    net.run_until("join", seconds(30), |net| net.converged(&all(3)));
    // Inside the subnet of node 2, not equal to it.
    let inside = LeasedSubnet { subnet: "10.32.2.128/25".parse().unwrap(), epoch: Epoch(0) };
    net.announce(3, Facts { subnets: vec![inside], ..facts(3) });
    net.run(seconds(15));
    let conflict = MeshEvent::Conflict { subnet: inside.subnet, kept: name(2), refused: name(3) };
    for node in 0..3 {
        assert!(matches!(net.verdict(node, 3), Some(Verdict::Refused { .. })), "{node}");
        assert!(node == 2 || net.verdict(node, 2) == Some(Verdict::Accepted));
        assert_eq!(net.events(node).iter().filter(|event| **event == conflict).count(), 1, "{node}");
    }
    assert!(net.events(3).contains(&conflict), "the claimant hears it too");
    // When the first one goes, the other is accepted.
    net.with(2, |mesh, now| mesh.leave(now));
    net.run(seconds(5));
    assert_eq!(net.verdict(0, 3), Some(Verdict::Accepted));
}

#[test]
fn a_node_key_rotates_without_a_moment_of_refusal_under_both_authorities() {
    for store_first in [Some(true), Some(false), None] {
        let mut net = Meshes::new("a_node_key_rotates");
        let authority = |generation| {
            store_first.map_or(Authority::Claims, |_| {
                table_of(&[(0, 0, 1, 1), (1, 1, 1, 2), (2, 2, generation, 3), (3, 3, 1, 4)])
            })
        };
        for node in 0..3 {
            net.start(config(node, 1), authority(1));
            net.announce(node, facts(node));
        }
        net.run_until("join", seconds(30), |net| net.converged(&all(3)));
        for generation in 2..=4 {
            let publish = |net: &mut Meshes| {
                (0..3).for_each(|node| {
                    net.with(node, |mesh, now| mesh.set_authority(authority(generation), now))
                });
            };
            if store_first == Some(true) {
                publish(&mut net);
                assert!(net.converged(&all(3)));
            }
            net.with(2, |mesh, now| mesh.rotate_key(key(2, generation), now));
            for _ in 0..50 {
                net.run(Duration::from_millis(100));
                assert!(net.converged(&all(3)), "generation {generation}, {store_first:?}");
            }
            if store_first == Some(false) {
                publish(&mut net);
                assert!(net.converged(&all(3)));
            }
            let last = key(2, generation).public();
            assert!(net.mesh(0).members().any(|member| member.record.key == last));
        }
        // Who joins later gets the endorsements with the record, and the key survives its file.
        net.start(config(3, 1), authority(4));
        net.announce(3, facts(3));
        net.run_until("late join", seconds(30), |net| net.sees(3, &[0, 1, 2, 3]));
        let text = net.mesh(2).key().to_secret_text();
        let restored = NodeKey::from_secret_text(&text).unwrap();
        net.crash(2);
        net.start(MeshConfig { key: restored, ..config(2, 2) }, authority(4));
        net.announce(2, facts(2));
        net.run_until("restart", seconds(30), |net| net.converged(&all(4)));
        assert_eq!(net.mesh(0).counters().refused_keys, 0);
    }
}

#[test]
fn what_a_node_said_last_under_its_earlier_key_costs_it_no_route() {
    let mut net = Meshes::new("what_a_node_said_last");
    let authority = |generation| {
        let of = move |node| (node, node, if node == 2 { generation } else { 1 }, node as u64 + 1);
        table_of(&(0..3).map(of).collect::<Vec<_>>())
    };
    for node in 0..3 {
        net.start(config(node, 1), authority(1));
        net.announce(node, facts(node));
    }
    net.run_until("join", seconds(30), |net| net.converged(&all(3)));
    // The lease names the next key but one already; meanwhile the node says something under its first, and then its second.
    for node in 0..2 {
        net.with(node, |mesh, now| mesh.set_authority(authority(3), now));
    }
    let routed = |net: &Meshes, node: usize| {
        net.mesh(node).member(&name(2)).and_then(|member| member.routed.map(|record| record.facts.mtu))
    };
    net.announce(2, Facts { mtu: 1400, ..facts(2) });
    for generation in [2, 3] {
        for _ in 0..50 {
            net.run(Duration::from_millis(100));
            assert!((0..2).all(|node| routed(&net, node) == Some(1500)), "WEFT_SEED={}", net.seed);
        }
        net.with(2, |mesh, now| mesh.rotate_key(key(2, generation), now));
    }
    net.run_until("the last key", seconds(30), |net| (0..2).all(|node| routed(net, node) == Some(1400)));
    assert!(net.sees(0, &all(3)));
    // Whoever was never believed gets nothing by it.
    net.start(config(3, 1), table_of(&[(3, 3, 9, 4)]));
    let more = table_of(&[(0, 0, 1, 1), (1, 1, 1, 2), (2, 2, 3, 3), (3, 3, 9, 4)]);
    net.with(0, |mesh, now| mesh.set_authority(more, now));
    net.announce(3, facts(3));
    net.run(seconds(10));
    assert!(matches!(net.verdict(0, 3), Some(Verdict::Refused { .. })), "{:?}", net.verdict(0, 3));
}

#[test]
fn a_node_that_missed_two_rotations_follows_the_endorsements() {
    let mut net = Meshes::new("a_node_that_missed_two_rotations");
    for node in 0..3 {
        net.start(config(node, 1), Authority::Claims);
        net.announce(node, facts(node));
    }
    net.run_until("join", seconds(30), |net| net.converged(&all(3)));
    net.net.sides.insert(address(0), 1);
    net.run(seconds(30));
    net.with(2, |mesh, now| mesh.rotate_key(key(2, 2), now));
    net.with(2, |mesh, now| mesh.rotate_key(key(2, 3), now));
    net.run(seconds(10));
    net.net.sides.clear();
    net.run_until("heal", seconds(60), |net| net.converged(&all(3)));
    assert!(net.mesh(0).members().any(|member| member.record.key == key(2, 3).public()));
}

#[test]
fn a_second_node_of_the_same_name_is_reported_and_not_believed() {
    for authority in [Authority::Claims, table(3)] {
        let mut net = Meshes::new("a_second_node_of_the_same_name");
        for node in 0..3 {
            net.start(config(node, 1), authority.clone());
            net.announce(node, facts(node));
        }
        net.run_until("join", seconds(30), |net| net.converged(&all(3)));
        let elsewhere: SocketAddr = "198.51.100.9:7117".parse().unwrap();
        net.start_at(elsewhere, MeshConfig { key: key(2, 9), ..config(2, 1) }, authority);
        // It hears of its namesake before it announces anything.
        let expected = MeshEvent::DuplicateName { from: address(2), key: key(2, 1).public() };
        net.run_until("report", seconds(15), |net| {
            net.net.host(elsewhere).unwrap().events.contains(&expected)
        });
        let imposter = Facts { gossip: vec![elsewhere], ..facts(2) };
        net.with_at(elsewhere, |mesh, now| mesh.announce(imposter, now));
        net.run(seconds(60));
        for node in 0..2 {
            let mesh = net.mesh(node);
            assert!(mesh.members().all(|member| member.record.key != key(2, 9).public()));
            assert_eq!(net.verdict(node, 2), Some(Verdict::Accepted));
        }
        // The first one goes on as before once the second is gone.
        net.net.remove(elsewhere);
        net.run_until("calm", seconds(60), |net| net.converged(&all(3)));
    }
}

#[test]
fn a_clone_of_a_node_with_its_key_is_reported_and_starts_no_race() {
    let mut net = Meshes::with_nodes("a_clone_of_a_node", 3);
    net.run_until("join", seconds(30), |net| net.converged(&all(3)));
    let elsewhere: SocketAddr = "198.51.100.9:7117".parse().unwrap();
    net.start_at(elsewhere, config(2, 1), table(3));
    let clone = Facts { gossip: vec![elsewhere], ..facts(2) };
    net.with_at(elsewhere, |mesh, now| mesh.announce(clone, now));
    net.run(seconds(120));
    let reported = |host: &MeshHost| {
        let own = key(2, 1).public();
        host.events.iter().any(|event| matches!(event, MeshEvent::DuplicateName { key, .. } if *key == own))
    };
    assert!(reported(net.net.host(elsewhere).unwrap()) || reported(net.net.host(address(2)).unwrap()));
    let bumps = net.mesh(2).record().unwrap().version & 0xffff_ffff;
    assert!(bumps < 200, "{bumps} versions in two minutes");
    net.net.remove(elsewhere);
    net.run_until("calm", seconds(60), |net| net.converged(&all(3)));
}

#[test]
fn a_forgotten_node_is_gone_everywhere_and_welcome_when_it_returns() {
    let mut net = Meshes::with_nodes("a_forgotten_node", 8);
    net.run_until("join", seconds(30), |net| net.converged(&all(8)));
    net.with(0, |mesh, _| mesh.forget(&name(5)));
    assert_eq!(net.state(0, 5), Some(MemberState::Alive), "a living node is not forgotten");
    net.crash(5);
    let rest: Vec<usize> = all(8).into_iter().filter(|node| *node != 5).collect();
    net.run_until("death", seconds(60), |net| {
        rest.iter().all(|node| net.state(*node, 5) == Some(MemberState::Dead))
    });
    net.with(0, |mesh, _| mesh.forget(&name(5)));
    // A rumour may pass a node by (seed 661517093); anti-entropy, every ten seconds with a random member, brings it the rest of the way.
    net.run_until("forget", seconds(90), |net| rest.iter().all(|node| net.state(*node, 5).is_none()));
    net.run(seconds(60));
    assert!(rest.iter().all(|node| net.state(*node, 5).is_none()));
    net.start(config(5, 1), table(8));
    net.announce(5, facts(5));
    net.run_until("return", seconds(60), |net| net.converged(&all(8)));
}

#[test]
fn a_reaped_node_that_lived_on_behind_a_partition_returns() {
    let mut net = Meshes::with_nodes("a_reaped_node_returns", 6);
    net.run_until("join", seconds(30), |net| net.converged(&all(6)));
    net.net.sides.insert(address(5), 1);
    net.run(seconds(700));
    assert!((0..5).all(|node| net.state(node, 5).is_none()));
    net.net.sides.clear();
    net.run_until("return", seconds(60), |net| net.converged(&all(6)));
}

#[test]
fn ping_measures_the_round_trip() {
    let mut net = Meshes::with_nodes("ping_measures", 3);
    net.run_until("join", seconds(30), |net| net.converged(&all(3)));
    assert_eq!(net.with(0, |mesh, now| mesh.ping(&name(9), 1, now)), Err(UnknownNode(name(9))));
    net.with(0, |mesh, now| mesh.ping(&name(2), 77, now)).unwrap();
    net.run(seconds(1));
    let rtt = net.events(0).iter().find_map(|event| match event {
        MeshEvent::Pong { node, token: 77, rtt } if *node == name(2) => Some(*rtt),
        _ => None,
    });
    let (least, most) = (Duration::from_millis(2), Duration::from_millis(10));
    assert!(rtt.is_some_and(|rtt| (least..=most).contains(&rtt)), "{rtt:?}");
    net.run(seconds(10));
    for member in net.mesh(0).members() {
        assert!(member.rtt.is_some_and(|rtt| (least..=most).contains(&rtt)), "{:?}", member.rtt);
        assert!(member.loss == 0.0 && member.last_seen.is_some());
    }
}

#[test]
fn the_largest_records_and_names_keep_the_budget() {
    let mut net = Meshes::new("the_largest_records");
    let long = |node: usize| MeshConfig {
        node: format!("{}{}", "x".repeat(60), 100 + node).parse().unwrap(),
        site: "s".repeat(63).parse().unwrap(),
        incarnation: u64::MAX,
        ..config(node, 1)
    };
    for node in 0..40 {
        net.start_at(address(node), long(node), Authority::Claims);
        let v6 = |port| SocketAddr::new("2001:db8:ffff:ffff:ffff:ffff:ffff:ffff".parse().unwrap(), port);
        let mut large = facts(node);
        large.gossip.extend([v6(1), v6(2), v6(3)]);
        large.underlay.push(v6(0).ip());
        large.subnets.extend((0..20).map(|number| LeasedSubnet {
            subnet: format!("fd00:{node:x}:ffff:ffff:ffff:ffff:ffff:{number:x}/128").parse().unwrap(),
            epoch: Epoch(u64::MAX),
        }));
        large.vni = (1 << 24) - 1;
        large.capabilities = Capabilities(u64::MAX);
        net.with(node, |mesh, now| mesh.announce(large, now));
        for generation in 2..6 {
            net.with(node, |mesh, now| mesh.rotate_key(key(node, generation), now));
        }
    }
    // The network asserts the length of every datagram.
    net.run_until("join", seconds(60), |net| {
        net.net.hosts().all(|(_, host)| host.mesh.members().filter(|m| m.verdict.is_accepted()).count() == 39)
    });
    net.crash(7);
    net.run(seconds(60));
}
