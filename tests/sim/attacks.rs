//! What attackers of several kinds get from a mesh of sites, and what it costs them and the mesh: docs/security.md has the table.
#![allow(clippy::unwrap_used)]

mod meetings;
mod replies;

use std::net::SocketAddr;
use std::time::Duration;

use meetings::*;
use rand_core::RngCore;
use weft_tests::sim::meshes::*;
use weft_wire::mesh::*;
use weft_wire::seal::MAX_DATAGRAM;
use weft_wire::site::SiteKey;

/// Where an attacker is, or somebody whose address it takes.
fn stranger() -> SocketAddr {
    "203.0.113.66:7117".parse().unwrap()
}

/// What a node knows of members and of sites, without what every datagram touches.
fn believes(sites: &Sites, node: usize) -> (Vec<String>, Vec<String>) {
    let mesh = sites.net.mesh(node);
    let mut members = knowledge(mesh);
    members.sort();
    (members, mesh.statements().map(|signed| format!("{signed:?}")).collect())
}

/// Hands a datagram to a node as if it came from the stranger; returns how many bytes go back there.
fn strike(sites: &mut Sites, node: usize, datagram: &[u8]) -> u64 {
    let before = sites.net.mesh(node).counters().sent_bytes;
    let _ = sites.net.inject(stranger(), node, datagram);
    sites.net.mesh(node).counters().sent_bytes - before
}

/// Everything that crosses the network while site 1 joins site 0 and for a while after it.
fn recorded(sites: &mut Sites) -> Vec<(SocketAddr, Vec<u8>)> {
    sites.net.net.gather(usize::MAX);
    let token = sites.invite(0, hour());
    assert_eq!(sites.join(1, token), Ok(site(0)));
    sites.run_until("one mesh", seconds(60), |sites| sites.all_route(&[0, 1]) && sites.one_ring(&[0, 1]));
    let recorded = sites.net.net.gathered().iter().map(|seen| (seen.to, seen.datagram.to_vec())).collect();
    sites.net.net.gather(0);
    recorded
}

#[test]
fn who_has_no_key_gets_no_answer_to_anything() {
    let mut sites = Sites::joined("who_has_no_key", 2);
    let token = sites.invite(0, hour());
    let before = believes(&sites, 0);
    for length in [0, 1, 28, 44, 45, 46, 100, 500, 1199, 1200, 1201] {
        let mut datagram = vec![0; length];
        for first in 0..=2 {
            sites.net.net.rng.fill_bytes(&mut datagram);
            datagram.iter_mut().take(1).for_each(|byte| *byte = first);
            assert_eq!(strike(&mut sites, 0, &datagram), 0);
            // The id of a key is no secret: that of the invitation, and of the cluster key.
            let ids = [token.ring().first(), sites.net.mesh(0).ring().first()];
            for id in ids.into_iter().filter(|_| length >= 5) {
                datagram[1..5].copy_from_slice(&id.0);
                assert_eq!(strike(&mut sites, 0, &datagram), 0, "{length} bytes");
            }
        }
    }
    assert_eq!(believes(&sites, 0), before);
}

#[test]
fn a_replayed_datagram_teaches_nothing_and_is_never_answered_by_a_larger_one() {
    let mut sites = Sites::up("a_replayed_datagram", 2);
    let recorded = recorded(&mut sites);
    assert!(recorded.iter().filter(|(_, datagram)| datagram.len() == MAX_DATAGRAM).count() >= 3);
    sites.run(seconds(60));
    let mut worst: f64 = 0.0;
    for (to, datagram) in &recorded {
        for node in [0, 1, 4].into_iter().filter(|node| address(*node) == *to) {
            let before = believes(&sites, node);
            let back = strike(&mut sites, node, datagram);
            worst = worst.max(back as f64 / datagram.len() as f64);
            assert!(
                back <= datagram.len() as u64,
                "{back} for {}; WEFT_SEED={}",
                datagram.len(),
                sites.net.seed
            );
            assert_eq!(believes(&sites, node), before, "WEFT_SEED={}", sites.net.seed);
        }
    }
    println!("{} datagrams replayed, at most {worst:.2} bytes back for one", recorded.len());
    assert!(sites.all_route(&[0, 1]));
}

#[test]
fn a_datagram_of_an_earlier_session_is_challenged_by_no_more_than_it_brings() {
    let mut sites = Sites::up("a_datagram_of_an_earlier_session", 1);
    sites.net.net.gather(usize::MAX);
    sites.run(seconds(20));
    let from = address(1);
    let of_one = sites.net.net.gathered().iter().filter(|seen| seen.from == from && seen.to == address(0));
    let recorded: Vec<Vec<u8>> = of_one.map(|seen| seen.datagram.to_vec()).collect();
    sites.net.net.gather(0);
    // Node 1 is restarted, and node 0 hears of it: what it said before is of an earlier session.
    sites.restart(1, 2);
    sites.run(seconds(30));
    let mut answered = 0;
    for datagram in &recorded {
        let back = strike(&mut sites, 0, datagram);
        assert!(back <= datagram.len() as u64, "{back} for {}", datagram.len());
        answered += u64::from(back > 0);
        sites.run(Duration::from_millis(1100));
    }
    assert!(answered > 0, "no challenge at all of {}", recorded.len());
    assert!(sites.routes(0, 0));
}

#[test]
fn a_question_of_a_joiner_that_is_changed_or_cut_is_not_answered() {
    let mut sites = Sites::up("a_changed_question", 2);
    let recorded = recorded(&mut sites);
    let of_joiner =
        recorded.iter().filter(|(to, datagram)| *to == address(0) && datagram.len() == MAX_DATAGRAM);
    let questions: Vec<Vec<u8>> = of_joiner.map(|(_, datagram)| datagram.clone()).take(3).collect();
    assert_eq!(questions.len(), 3);
    let before = believes(&sites, 0);
    for question in questions {
        for bit in (0..question.len() * 8).step_by(37) {
            let mut forged = question.clone();
            forged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(strike(&mut sites, 0, &forged), 0, "bit {bit}");
        }
        for length in (0..question.len()).step_by(97) {
            assert_eq!(strike(&mut sites, 0, &question[..length]), 0, "length {length}");
        }
    }
    assert_eq!(believes(&sites, 0), before);
}

#[test]
fn whatever_a_token_holder_says_is_taken_or_changes_nothing() {
    let mut sites = Sites::up("whatever_a_token_holder_says", 3);
    let token = sites.invite(0, hour());
    sites.net.net.gather(usize::MAX);
    assert_eq!(sites.join(1, token.clone()), Ok(site(0)));
    let seen = sites.net.net.gathered().iter();
    let seen: Vec<_> = seen.map(|seen| (seen.to, seen.datagram.to_vec())).collect();
    sites.net.net.gather(0);
    sites.run_until("one mesh", seconds(60), |sites| sites.all_route(&[0, 1]) && sites.one_ring(&[0, 1]));
    let ring = token.ring();
    let open = |datagram: &Vec<u8>| ring.open(CLUSTER, datagram).ok();
    let contents: Vec<(SocketAddr, Vec<u8>)> =
        seen.iter().filter_map(|(to, datagram)| Some((*to, open(datagram)?))).collect();
    assert!(contents.len() >= 6, "three questions and three answers");
    let before = [0, 4].map(|node| believes(&sites, node).1);
    for (to, content) in &contents {
        for _ in 0..300 {
            let mut changed = content.clone();
            for _ in 0..=sites.net.net.rng.next_u32() % 4 {
                // The interesting fields come before the padding.
                let place = sites.net.net.rng.next_u32() as usize % changed.len().min(400);
                changed[place] = sites.net.net.rng.next_u32() as u8;
            }
            let datagram = ring.seal(CLUSTER, [7; 24], &changed);
            for node in [0, 4] {
                let back = strike(&mut sites, node, &datagram);
                assert!(back <= datagram.len() as u64, "{back} to {to}; WEFT_SEED={}", sites.net.seed);
            }
        }
    }
    assert_eq!([0, 4].map(|node| believes(&sites, node).1), before, "WEFT_SEED={}", sites.net.seed);
    assert!(sites.all_route(&[0, 1]) && !sites.lost_inside);
}

#[test]
fn a_flood_of_joins_with_a_stolen_token_brings_one_site_in_and_fills_nothing() {
    let mut sites = Sites::up("a_flood_of_joins", 3);
    let token = sites.invite(0, hour());
    // Both others have the token, as whoever read it in a chat has: one is in, the other is told, and so is site 0.
    for joiner in [1, 2] {
        let token = token.clone();
        sites.with_speaker(joiner, |mesh, now| mesh.join(token, now)).unwrap();
    }
    sites.run(seconds(20));
    let standing = sites.standing(speaker(0));
    assert_eq!(standing.values().filter(|word| *word == "member").count(), 1, "{standing:?}");
    let told = sites.told(0);
    assert!(told.iter().any(|told| told.contains("the token was used already")), "{told:?}");
    // The same question 5,000 times, of both: answered, each time by no more than it brings, and nothing is kept of it.
    let before = sites.net.mesh(0).statements().count();
    sites.net.net.gather(usize::MAX);
    for number in 0..40 {
        let token = token.clone();
        let _ = sites.with_speaker(1 + number % 2, |mesh, now| mesh.join(token, now));
        sites.run(Duration::from_millis(500));
    }
    let questions: Vec<Vec<u8>> = sites
        .net
        .net
        .gathered()
        .iter()
        .filter(|seen| seen.to == address(0) && seen.datagram.len() == MAX_DATAGRAM)
        .map(|seen| seen.datagram.to_vec())
        .collect();
    sites.net.net.gather(0);
    assert!(questions.len() > 10);
    for round in 0..5_000 {
        let question = &questions[round % questions.len()];
        assert!(strike(&mut sites, 0, question) <= question.len() as u64);
    }
    assert_eq!(sites.net.mesh(0).statements().count(), before);
    assert!((0..3).all(|site| sites.inside_whole(site)));
}

#[test]
fn invitations_do_not_fill_the_memory_and_the_latest_are_good() {
    let mut sites = Sites::up("invitations_do_not_fill", 2);
    let tokens: Vec<_> = (0..200).map(|_| sites.invite(0, hour())).collect();
    let oldest = sites.join(1, tokens[0].clone()).unwrap_err();
    assert!(oldest.contains("no answer from site s0"), "{oldest}");
    assert_eq!(sites.join(1, tokens[199].clone()), Ok(site(0)));
}

#[test]
fn a_joiner_whose_seeds_all_lie_installs_nothing_and_says_who_did_not_answer() {
    let mut sites = Sites::up("a_joiner_whose_seeds_all_lie", 3);
    let token = sites.invite(0, hour());
    // All that the joiner sends goes to the liar, site 2, which has a mesh and keys of its own.
    let lies = weft_wire::invite::Token { addresses: vec![address(speaker(2))], ..token };
    let before = believes(&sites, speaker(1));
    let why = sites.join(1, lies).unwrap_err();
    assert!(why.contains("no answer from site s0 at"), "{why}");
    assert_eq!(believes(&sites, speaker(1)), before);
    assert!(sites.standing(speaker(1)).is_empty() && sites.standing(speaker(2)).is_empty());
    // A liar that has an invitation of its own for the same secret cannot be made: the site's key is in the token.
    let own = sites.invite(2, hour());
    let mixed = weft_wire::invite::Token { site: site(0), key: site_key(0).public(), ..own };
    let why = sites.join(1, mixed).unwrap_err();
    assert!(why.contains("no answer from site s0"), "{why}");
    assert_eq!(believes(&sites, speaker(1)), before);
}

#[test]
fn records_of_made_up_nodes_get_no_routes_take_none_away_and_are_forgotten() {
    let mut sites = Sites::joined("records_of_made_up_nodes", 2);
    // Whoever has the cluster key makes up nodes of both sites, with subnets of theirs and of real ones.
    let count = 40;
    let ring = sites.net.mesh(0).ring().clone();
    for number in 0..count {
        let at = 1000 + number;
        let config = MeshConfig {
            site: site(number % 2),
            ring: ring.clone(),
            seeds: vec![address(0)],
            ..config(at, 1)
        };
        sites.net.start(config, Authority::Claims);
        sites.net.announce(at, Facts { subnets: facts(number % 8).subnets, ..facts(at) });
    }
    sites.run_until("they are known", seconds(120), |sites| sites.net.mesh(0).members().count() >= count);
    for node in (0..2).flat_map(nodes) {
        let mesh = sites.net.mesh(node);
        let made_up = mesh.members().filter(|member| member.node.as_str().len() > 2);
        assert!(made_up.into_iter().all(|member| member.routed.is_none()), "WEFT_SEED={}", sites.net.seed);
    }
    assert!(sites.all_route(&[0, 1]) && !sites.lost_inside);
    for number in 0..count {
        sites.net.crash(1000 + number);
    }
    sites.run_until("they are forgotten", seconds(1200), |sites| sites.net.mesh(0).members().count() == 7);
    assert!(sites.all_route(&[0, 1]) && !sites.lost_inside);
}

#[test]
fn cluster_keys_come_only_from_sites_that_are_in_and_only_for_who_they_are_for() {
    let mut sites = Sites::joined("cluster_keys_come_only_from", 2);
    let rings =
        |sites: &Sites| -> Vec<_> { (0..8).map(|node| sites.net.mesh(node).ring().clone()).collect() };
    let before = rings(&sites);
    // A node with the cluster key that says it is of a site, under a key that nobody let in, gives keys to all.
    let stranger = SiteKey::from_secret([9; 32]);
    let ring = before[0].clone();
    let config = MeshConfig { site: site(7), ring, seeds: vec![address(0), address(4)], ..config(50, 1) };
    sites.net.start(config, Authority::Claims);
    let trust = Trust { site: stranger.public(), prefixes: vec![prefix_of(7)], signer: Some(stranger) };
    sites.net.with(50, |mesh, now| mesh.set_trust(trust, Vec::new(), now)).unwrap();
    for one in 0..2 {
        let key = site_key(one).public();
        sites.net.with(50, |mesh, now| mesh.admit(site(one), key, vec![prefix_of(one)], now)).unwrap();
    }
    sites.net.announce(50, facts(50));
    sites.run(seconds(10));
    sites.net.with(50, |mesh, now| mesh.rekey(weft_tests::sim::meshes::ring(&[200]), now)).unwrap();
    sites.run(seconds(60));
    assert_eq!(rings(&sites), before, "WEFT_SEED={}", sites.net.seed);
    // Nor is an expelled site heard, which was in and has the last key.
    let key = site_key(1).public();
    sites.with_speaker(0, |mesh, now| mesh.expel(site(1), key, now)).unwrap();
    sites.run(seconds(10));
    sites.renew(1);
    sites.run(seconds(60));
    assert_eq!(rings(&sites)[..4], before[..4]);
}

/// Makes a node up, and hands its first words to some as seeds hear them from who joins.
fn make_up(sites: &mut Sites, number: usize, at: &[usize]) {
    let (ring, now) = (sites.net.mesh(at[0]).ring().clone(), sites.net.net.now);
    let made_up = 1000 + number;
    let config = MeshConfig {
        site: site(number % 3),
        ring,
        seeds: at.iter().copied().map(address).collect(),
        ..config(made_up, 1)
    };
    let mut mesh = Mesh::new(config, [number as u8; 32], now);
    mesh.set_authority(Authority::Claims, now);
    mesh.announce(facts(made_up), now);
    mesh.handle_timeout(now);
    loop {
        match mesh.poll_output(now) {
            Output::Send { to, datagram } => {
                let node = at.iter().find(|node| address(**node) == to).unwrap();
                sites.net.inject(address(made_up), *node, &datagram).unwrap();
            }
            Output::Event(_) => {}
            Output::Wait { .. } => return,
        }
    }
}

#[test]
fn an_insider_that_floods_made_up_nodes_keeps_no_honest_one_out() {
    let mut sites = Sites::up("an_insider_that_floods", 3);
    let token = sites.invite(0, hour());
    assert_eq!(sites.join(1, token), Ok(site(0)));
    sites.run_until("one mesh", seconds(60), |sites| sites.all_route(&[0, 1]) && sites.one_ring(&[0, 1]));
    // Of a site that is in, of the other, and of one that is not in yet, said to a node of each that is in.
    let count = MOST_UNCERTIFIED + 200;
    (0..count).for_each(|number| make_up(&mut sites, number, &[0, 5]));
    sites.run(seconds(30));
    for node in [0, 5] {
        let mesh = sites.net.mesh(node);
        let made_up = mesh.members().filter(|member| member.node.as_str().len() > 2).count();
        assert_eq!(made_up, MOST_UNCERTIFIED);
        assert!(mesh.counters().refused_uncertified > 0);
        let told =
            sites.net.events(node).iter().filter(|told| **told == MeshEvent::TooMany(Bound::Uncertified));
        assert!(told.count() >= 1);
    }
    assert!(sites.all_route(&[0, 1]) && !sites.lost_inside, "WEFT_SEED={}", sites.net.seed);
    // New honest nodes get in, those of a whole site.
    let token = sites.invite(0, hour());
    assert_eq!(sites.join(2, token), Ok(site(0)));
    let took = sites.run_until("three sites are one", seconds(60), |sites| {
        sites.all_route(&[0, 1, 2]) && sites.one_ring(&[0, 1, 2])
    });
    println!("a site came in {took:?} after its token was used, with {count} made-up nodes");
    assert!(!sites.lost_inside, "WEFT_SEED={}", sites.net.seed);
}

#[test]
fn who_is_expelled_reads_nothing_more_while_its_key_still_opens() {
    let mut sites = Sites::joined("who_is_expelled_reads_nothing", 3);
    let old = sites.net.mesh(0).ring().clone();
    let those_in = || (0..2).flat_map(nodes);
    let key = site_key(2).public();
    sites.with_speaker(0, |mesh, now| mesh.expel(site(2), key, now)).unwrap();
    sites.renew(0);
    sites.run_until("another key seals", seconds(30), |sites| {
        those_in().all(|node| sites.net.mesh(node).ring().first() != old.first())
    });
    // It also makes up a node of a site that is in, which asks under the old key.
    let config = MeshConfig { site: site(0), ring: old.clone(), seeds: vec![address(0)], ..config(50, 1) };
    sites.net.start(config, Authority::Claims);
    sites.net.announce(50, Facts { subnets: Vec::new(), ..facts(50) });
    sites.run(seconds(1));
    sites.net.net.gather(usize::MAX);
    sites.run(seconds(20));
    assert!(those_in().all(|node| sites.net.mesh(node).ring().has(old.first())), "it is forgotten already");
    assert!(sites.net.mesh(0).member(&name(50)).is_some(), "nobody hears it");
    let mut said =
        sites.net.net.gathered().iter().filter(|seen| those_in().map(address).any(|at| at == seen.from));
    assert!(said.all(|seen| old.open(CLUSTER, &seen.datagram).is_err()), "WEFT_SEED={}", sites.net.seed);
    // Nobody waits for who is made up.
    sites.run_until("the key is forgotten", seconds(60), |sites| sites.no_common_key(&[0, 1], 2));
}
