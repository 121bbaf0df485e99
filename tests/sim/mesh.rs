//! Meshes of 3 to 60 nodes in virtual time: whatever the network does, they come to agree.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use rand_core::RngCore;
use weft_tests::sim::meshes::*;
use weft_wire::mesh::*;

fn all(nodes: usize) -> Vec<usize> {
    (0..nodes).collect()
}

#[test]
fn meshes_of_any_size_converge() {
    for nodes in [2, 3, 7, 20, 60] {
        let mut net = Meshes::with_nodes("meshes_of_any_size_converge", nodes);
        let time = net.run_until("join", seconds(30), |net| net.converged(&all(nodes)));
        println!("{nodes} nodes converge in {time:?}");
    }
}

#[test]
fn a_lossy_duplicating_reordering_network_only_slows_convergence() {
    let mut net = Meshes::with_nodes("a_lossy_duplicating_reordering_network", 20);
    net.net.loss_percent = 20;
    net.net.duplicate_percent = 20;
    net.net.jitter = Duration::from_millis(150);
    net.run_until("join", seconds(60), |net| net.converged(&all(20)));
    for round in 0..5u16 {
        let node = net.net.rng.next_u64() as usize % 20;
        let mut changed = facts(node);
        changed.mtu = 9000 + round;
        net.announce(node, changed.clone());
        let others: Vec<usize> = all(20).into_iter().filter(|other| *other != node).collect();
        net.run_until("change", seconds(60), |net| {
            others.iter().all(|other| {
                let seen = net.mesh(*other).member(&name(node)).map(|member| member.record);
                seen.is_some_and(|record| {
                    record.facts.mtu == changed.mtu && Some(record) == net.mesh(node).record()
                })
            })
        });
    }
}

#[test]
fn a_change_reaches_sixty_nodes_within_two_seconds() {
    let mut net = Meshes::with_nodes("a_change_reaches_sixty_nodes", 60);
    net.run_until("join", seconds(30), |net| net.converged(&all(60)));
    net.run(seconds(20));
    let mut changed = facts(7);
    changed.mtu = 9000;
    net.announce(7, changed);
    let time = net.run_until("change", seconds(20), |net| {
        (0..60).filter(|node| *node != 7).all(|node| {
            net.mesh(node).members().any(|member| *member.node == name(7) && member.record.facts.mtu == 9000)
        })
    });
    assert!(time <= seconds(2), "{time:?}; WEFT_SEED={}", net.seed);
}

#[test]
fn a_crashed_node_is_dead_everywhere_and_its_routes_stay() {
    for nodes in [3, 12, 40] {
        let mut net = Meshes::with_nodes("a_crashed_node_is_dead_everywhere", nodes);
        net.run_until("join", seconds(30), |net| net.converged(&all(nodes)));
        net.crash(2);
        let rest: Vec<usize> = all(nodes).into_iter().filter(|node| *node != 2).collect();
        let time = net.run_until("death", seconds(60), |net| {
            rest.iter().all(|node| net.state(*node, 2) == Some(MemberState::Dead))
        });
        println!("{nodes} nodes agree on a death after {time:?}");
        for node in &rest {
            let view = net.mesh(*node).members().find(|member| *member.node == name(2)).unwrap();
            assert!(view.verdict.is_accepted() && view.routed.is_some());
        }
        // Nobody else came to harm, and the dead are reaped in the end.
        assert!(net.converged(&rest));
        net.run_until("reap", seconds(700), |net| rest.iter().all(|node| net.state(*node, 2).is_none()));
        net.run(seconds(60));
        assert!(rest.iter().all(|node| net.state(*node, 2).is_none()), "a reaped member stays away");
    }
}

/// Meshes of which so many, from node 1 on, are gateways of their site.
fn with_gateways(test: &str, nodes: usize, gateways: usize) -> Meshes {
    let mut net = Meshes::with_nodes(test, nodes);
    for node in 1..=gateways {
        net.announce(node, Facts { gateway: Some(100), ..facts(node) });
    }
    net.run_until("join", seconds(60), |net| net.converged(&all(nodes)));
    net.run(seconds(20));
    net
}

#[test]
fn a_gateway_that_dies_is_left_by_all_within_a_second() {
    // TCP repeats what is not acknowledged after 0.2, 0.6, 1.4 and 3.0 s.
    for nodes in [3, 12, 60] {
        for gateways in [2, 5].into_iter().filter(|gateways| *gateways < nodes) {
            let mut net = with_gateways("a_gateway_that_dies", nodes, gateways);
            net.crash(2);
            let time = net.run_until("suspicion", seconds(60), |net| {
                (0..nodes)
                    .filter(|node| *node != 2)
                    .all(|node| net.state(node, 2).is_some_and(|state| state != MemberState::Alive))
            });
            println!("{nodes} nodes leave one of {gateways} gateways after {time:?}");
            assert!(time <= Duration::from_millis(1100), "{time:?}; WEFT_SEED={}", net.seed);
        }
    }
}

#[test]
fn gateways_watch_each_other_at_a_cost_that_does_not_depend_on_their_number() {
    let sent = |gateways: usize| {
        let mut net = with_gateways("gateways_watch", 40, gateways);
        let before = net.mesh(1).counters().sent;
        net.run(seconds(60));
        (net.mesh(1).counters().sent - before) as f64 / 60.0
    };
    let (none, two, ten, all) = (sent(0), sent(2), sent(10), sent(39));
    println!(
        "datagrams a second of a node: {none:.1}; of one of 2 gateways {two:.1}, of 10 {ten:.1}, of 39 {all:.1}"
    );
    assert!(sent(1) < none * 1.5, "one gateway has nobody to watch");
    // It asks two, and is asked by two, every 150 ms.
    assert!(ten - none < 30.0 && all - none < 30.0, "{ten} and {all}");
}

#[test]
fn loss_makes_no_gateway_suspect_that_another_node_would_not_be() {
    let suspicions = |gateways: usize| {
        let mut net = with_gateways("loss_makes_no_gateway_suspect", 12, gateways);
        net.net.loss_percent = 5;
        net.run(seconds(300));
        all(12).into_iter().map(|node| net.mesh(node).counters().suspicions).sum::<u64>()
    };
    let (without, with) = (suspicions(0), suspicions(4));
    println!("suspicions in 300 s, 5 % lost: {without} without gateways, {with} with four");
    assert!(with <= without + 2, "{with} against {without}");
}

#[test]
fn a_suspicion_that_nobody_heard_of_is_cleared_within_seconds() {
    let suspects =
        |net: &Meshes| all(60).into_iter().any(|of| net.state(7, of) == Some(MemberState::Suspect));
    for run in 0..4 {
        let mut net = Meshes::with_nodes(&format!("a_suspicion_that_nobody_heard_of {run}"), 60);
        net.run_until("join", seconds(30), |net| net.converged(&all(60)));
        net.run(seconds(20));
        // Whom it suspects while it is alone it tells nobody, and the sums of anti-entropy are the same with and without suspicion.
        net.net.sides.insert(address(7), 1);
        net.run_until("suspicion", seconds(10), suspects);
        net.run(seconds(2));
        net.net.sides.clear();
        let time = net.run_until("heal", seconds(60), |net| net.converged(&all(60)));
        println!("cleared after {time:?}");
        assert!(time <= seconds(8), "{time:?}; WEFT_SEED={}", net.seed);
    }
}

#[test]
fn a_restarted_node_is_back_within_seconds() {
    let mut net = Meshes::with_nodes("a_restarted_node_is_back", 12);
    net.run_until("join", seconds(30), |net| net.converged(&all(12)));
    net.crash(4);
    net.run_until("death", seconds(60), |net| net.state(0, 4) == Some(MemberState::Dead));
    net.start(config(4, 2), table(12));
    net.announce(4, facts(4));
    net.run_until("rejoin", seconds(20), |net| net.converged(&all(12)));
}

#[test]
fn a_node_restarted_with_lost_state_signs_above_its_past() {
    let mut net = Meshes::with_nodes("a_node_restarted_with_lost_state", 5);
    net.run_until("join", seconds(30), |net| net.converged(&all(5)));
    let mut second = facts(4);
    second.mtu = 1400;
    net.announce(4, second);
    net.run(seconds(5));
    let before = net.mesh(4).record().unwrap().version;
    net.crash(4);
    net.start(config(4, 0), table(5));
    let mut third = facts(4);
    third.mtu = 1300;
    net.announce(4, third);
    net.run_until("catch up", seconds(60), |net| {
        net.converged(&all(5))
            && (0..4).all(|node| {
                net.mesh(node).members().any(|member| {
                    *member.node == name(4)
                        && member.record.facts.mtu == 1300
                        && member.record.version > before
                })
            })
    });
    assert!(net.mesh(4).record().unwrap().version > before);
}

#[test]
fn a_node_that_leaves_is_gone_at_once_and_may_come_back() {
    let mut net = Meshes::with_nodes("a_node_that_leaves", 12);
    net.run_until("join", seconds(30), |net| net.converged(&all(12)));
    net.with(3, |mesh, now| mesh.leave(now));
    net.run(Duration::from_millis(600));
    net.crash(3);
    let rest: Vec<usize> = all(12).into_iter().filter(|node| *node != 3).collect();
    net.run_until("leave", seconds(5), |net| {
        rest.iter().all(|node| net.state(*node, 3) == Some(MemberState::Left))
    });
    assert!(rest.iter().all(|node| !net.verdict(*node, 3).unwrap().is_accepted()));
    net.start(config(3, 2), table(12));
    net.announce(3, facts(3));
    net.run_until("return", seconds(20), |net| net.converged(&all(12)));
}

#[test]
fn a_node_that_returns_without_its_memory_is_no_twin_of_itself() {
    let mut net = Meshes::with_nodes("a_node_that_returns_without_its_memory", 6);
    net.run_until("join", seconds(30), |net| net.converged(&all(6)));
    net.with(3, |mesh, now| mesh.leave(now));
    net.run(seconds(2));
    net.crash(3);
    net.start(config(3, 0), table(6));
    // It hears of its old self from everyone before it has anything to announce.
    net.run(seconds(8));
    net.announce(3, facts(3));
    net.run_until("return", seconds(20), |net| net.converged(&all(6)));
    let twins = net.events(3).iter().filter(|event| matches!(event, MeshEvent::DuplicateName { .. }));
    assert_eq!(twins.count(), 0, "WEFT_SEED={}", net.seed);
}

#[test]
fn a_partition_heals_and_what_changed_meanwhile_spreads() {
    for nodes in [4, 12, 60] {
        let mut net = Meshes::with_nodes("a_partition_heals", nodes);
        net.run_until("join", seconds(30), |net| net.converged(&all(nodes)));
        for node in 0..nodes {
            net.net.sides.insert(address(node), (node % 2) as u8);
        }
        net.run(seconds(120));
        assert_eq!(net.state(0, 1), Some(MemberState::Dead), "WEFT_SEED={}", net.seed);
        for node in [0, 1] {
            let mut changed = facts(node);
            changed.mtu = 1450;
            net.announce(node, changed);
        }
        net.run(seconds(10));
        net.net.sides.clear();
        let time = net.run_until("heal", seconds(60), |net| {
            net.converged(&all(nodes))
                && (2..nodes).all(|node| {
                    net.mesh(node).members().filter(|member| member.record.facts.mtu == 1450).count() == 2
                })
        });
        println!("{nodes} nodes heal in {time:?}");
    }
}

#[test]
fn members_come_and_go_under_loss_and_all_agree_in_the_end() {
    let nodes = 24;
    let mut net = Meshes::with_nodes("members_come_and_go", nodes);
    net.net.loss_percent = 10;
    net.net.duplicate_percent = 5;
    net.net.jitter = Duration::from_millis(60);
    let mut starts = vec![1; nodes];
    for _ in 0..60 {
        let node = 2 + net.net.rng.next_u64() as usize % (nodes - 2);
        if net.runs(node) {
            if net.net.rng.next_u64().is_multiple_of(2) {
                net.with(node, |mesh, now| mesh.leave(now));
                net.run(Duration::from_millis(300));
            }
            net.crash(node);
        } else {
            starts[node] += 1;
            net.start(config(node, starts[node]), table(nodes));
            net.announce(node, facts(node));
        }
        let pause = net.net.rng.next_u64() % 3000;
        net.run(Duration::from_millis(pause));
    }
    net.net.loss_percent = 0;
    let living: Vec<usize> = all(nodes).into_iter().filter(|n| net.runs(*n)).collect();
    net.run_until("agree", seconds(120), |net| net.converged(&living));
}

#[test]
fn bytes_at_rest_do_not_grow_with_the_mesh() {
    let cost = |nodes: usize| {
        let mut net = Meshes::with_nodes("bytes_at_rest", nodes);
        net.run_until("join", seconds(60), |net| net.converged(&all(nodes)));
        net.run(seconds(60));
        let sum = |net: &Meshes| net.net.sent_by_all().bytes;
        let before = sum(&net);
        net.run(seconds(30));
        (sum(&net) - before) / 30 / nodes as u64
    };
    let (small, large) = (cost(10), cost(200));
    println!("bytes a second and node at rest: 10 nodes {small}, 200 nodes {large}");
    assert!(large <= small * 5 / 4, "10 nodes {small}, 200 nodes {large}");
    assert!(large < 1000);
}

#[test]
fn the_cluster_key_rotates_without_a_lost_datagram() {
    let mut net = Meshes::with_nodes("the_cluster_key_rotates", 7);
    net.run_until("join", seconds(30), |net| net.converged(&all(7)));
    for keys in [&[1, 2][..], &[2, 1], &[2]] {
        for node in 0..7 {
            net.with(node, |mesh, now| mesh.set_ring(ring(keys), now));
            net.run(seconds(3));
        }
    }
    net.run(seconds(10));
    assert!(net.converged(&all(7)));
    for node in 0..7 {
        let counters = net.mesh(node).counters();
        assert_eq!(counters.rejections().map(|(_, count)| count).sum::<u64>(), 0, "{counters:?}");
        assert_eq!(counters.probes_failed, 0);
    }
}

#[test]
fn a_wrong_cluster_key_is_reported_and_changes_nothing() {
    let mut net = Meshes::with_nodes("a_wrong_cluster_key", 3);
    net.run_until("join", seconds(30), |net| net.converged(&all(3)));
    net.start(MeshConfig { ring: ring(&[9]), ..config(3, 1) }, table(4));
    net.announce(3, facts(3));
    net.run(seconds(15));
    assert_eq!(net.state(0, 3), None);
    assert!(net.mesh(0).counters().rejected(Rejected::UnknownKey) > 5);
    let reports = net.events(0).iter().filter(|e| **e == MeshEvent::WrongKey { from: address(3) }).count();
    assert!((1..=2).contains(&reports), "{reports} reports in 15 s");
}
