//! What a mesh of several sites believes: each site has its own store and its own key, and knows the others by what they say.
#![allow(clippy::unwrap_used)]

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use weft_tests::sim::meshes::*;
use weft_wire::mesh::*;
use weft_wire::site::{SiteKey, Statement};
use weft_wire::types::{Epoch, PublicKey, SiteName, Subnet};

/// Sites of four nodes each; the first node of each speaks for it.
const SIZE: usize = 4;

fn site(number: usize) -> SiteName {
    format!("s{number}").parse().unwrap()
}

fn site_key(number: usize) -> SiteKey {
    SiteKey::from_secret([number as u8 + 100; 32])
}

fn nodes(site: usize) -> Range<usize> {
    site * SIZE..(site + 1) * SIZE
}

/// What covers the subnets of a site's nodes, and of nobody else's.
fn prefix(site: usize) -> Subnet {
    format!("10.32.{}.0/22", site * SIZE).parse().unwrap()
}

fn owner(node: usize, epoch: u64) -> (Subnet, Owner) {
    (subnet(node), Owner { node: name(node), key: key(node, 1).public(), epoch: Epoch(epoch) })
}

/// What the store of a site says: only of its own nodes.
fn store(site: usize) -> Authority {
    Authority::Store(Arc::new(nodes(site).map(|node| owner(node, node as u64 + 1)).collect()))
}

fn start(net: &mut Meshes, node: usize, starts: u64) {
    let of = node / SIZE;
    start_as(net, node, starts, site(of), node == nodes(of).start);
}

/// Starts a node that remembers nothing, gives its site this name, and speaks for it or not.
fn start_as(net: &mut Meshes, node: usize, starts: u64, name: SiteName, speaks: bool) {
    let of = node / SIZE;
    net.start(MeshConfig { site: name, ..config(node, starts) }, store(of));
    let signer = speaks.then(|| site_key(of));
    let trust = Trust { site: site_key(of).public(), prefixes: vec![prefix(of)], signer };
    net.with(node, |mesh, now| mesh.set_trust(trust, Vec::new(), now)).unwrap();
    net.announce(node, facts(node));
}

fn sites(test: &str, count: usize) -> Meshes {
    let mut net = Meshes::new(test);
    (0..count * SIZE).for_each(|node| start(&mut net, node, 1));
    net
}

fn admit(net: &mut Meshes, by: usize, of: usize) {
    let speaker = nodes(by).start;
    net.with(speaker, |mesh, now| mesh.admit(site(of), site_key(of).public(), vec![prefix(of)], now))
        .unwrap();
}

fn befriend(net: &mut Meshes, one: usize, other: usize) {
    admit(net, one, other);
    admit(net, other, one);
}

fn all(count: usize) -> Vec<usize> {
    (0..count * SIZE).collect()
}

/// Whether every node of a site routes to every node of another.
fn routes(net: &Meshes, from: usize, to: usize) -> bool {
    let accepts = |node, other| node == other || net.verdict(node, other) == Some(Verdict::Accepted);
    nodes(from).all(|node| nodes(to).all(|other| accepts(node, other)))
}

fn routes_nothing(net: &Meshes, from: usize, to: usize) -> bool {
    let nothing = |node: usize, other: usize| {
        net.mesh(node).member(&name(other)).is_none_or(|member| member.routed.is_none())
    };
    nodes(from).all(|node| nodes(to).all(|other| nothing(node, other)))
}

fn refused(net: &Meshes, node: usize, of: usize) -> String {
    match net.verdict(node, of) {
        Some(Verdict::Refused { why } | Verdict::Pending { why }) => why,
        other => panic!("n{node} thinks of n{of}: {other:?}; WEFT_SEED={}", net.seed),
    }
}

#[test]
fn sites_believe_each_other_once_both_have_said_so() {
    let mut net = sites("sites_believe_each_other", 2);
    net.run(seconds(20));
    assert!(routes(&net, 0, 0) && routes(&net, 1, 1), "WEFT_SEED={}", net.seed);
    assert!(routes_nothing(&net, 0, 1) && routes_nothing(&net, 1, 0), "WEFT_SEED={}", net.seed);
    admit(&mut net, 0, 1);
    net.run_until("one way", seconds(60), |net| routes(net, 0, 1));
    assert!(routes_nothing(&net, 1, 0));
    admit(&mut net, 1, 0);
    net.run_until("both ways", seconds(20), |net| net.converged(&all(2)));
    // A node that comes later is certified and believed without anybody's doing.
    net.crash(6);
    net.run(seconds(30));
    start(&mut net, 6, 2);
    net.run_until("back", seconds(30), |net| net.converged(&all(2)));
}

#[test]
fn a_site_that_comes_through_another_is_believed_until_that_one_is_expelled() {
    let mut net = sites("a_site_that_comes_through_another", 3);
    befriend(&mut net, 0, 1);
    befriend(&mut net, 1, 2);
    net.run_until("three sites", seconds(60), |net| net.converged(&all(3)));
    net.with(0, |mesh, now| mesh.expel(site(1), site_key(1).public(), now)).unwrap();
    let took =
        net.run_until("expelled", seconds(30), |net| routes_nothing(net, 0, 1) && routes_nothing(net, 0, 2));
    assert!(took < seconds(10), "{took:?}");
    assert_eq!(refused(&net, 3, 5), "site s1 is expelled");
    // The others go on with each other, and the first site with those it lets in itself.
    assert!(routes(&net, 1, 2) && routes(&net, 2, 1));
    befriend(&mut net, 0, 2);
    net.run_until("let in again", seconds(30), |net| routes(net, 0, 2) && routes(net, 2, 0));
    net.run(seconds(60));
    assert!(routes_nothing(&net, 0, 1), "WEFT_SEED={}", net.seed);
}

#[test]
fn a_site_that_is_renamed_node_by_node_ends_with_the_name_of_all() {
    let mut net = sites("a_site_that_is_renamed", 2);
    start_as(&mut net, 5, 2, site(1), true);
    befriend(&mut net, 0, 1);
    net.run_until("two sites", seconds(60), |net| net.converged(&all(2)));
    let calls_itself = |net: &Meshes, node: usize, wanted: SiteName| {
        let own = |statement: &Statement| match statement {
            Statement::Site(record) => (record.key == site_key(1).public()).then(|| record.site.clone()),
            Statement::Admission(_) | Statement::Keys(_) => None,
        };
        net.mesh(node).statements().find_map(|signed| own(signed.statement())) == Some(wanted)
    };
    for (starts, called) in [(3, 9), (4, 1)] {
        let mut named_twice = false;
        for node in nodes(1) {
            net.crash(node);
            start_as(&mut net, node, starts, site(called), node < 6);
            // Both speakers sign, under two names, again and again.
            net.run(seconds(10));
            named_twice |= net.events(5).iter().any(|event| matches!(event, MeshEvent::OtherName { .. }));
        }
        assert!(named_twice, "WEFT_SEED={}", net.seed);
        net.run_until("one name", seconds(60), |net| {
            all(2).into_iter().all(|node| calls_itself(net, node, site(called)))
        });
        net.run(seconds(120));
        assert!(calls_itself(&net, 0, site(called)), "WEFT_SEED={}", net.seed);
    }
    net.run_until("as before", seconds(60), |net| net.converged(&all(2)));
}

#[test]
fn a_stolen_node_key_announces_no_other_subnet() {
    let mut net = sites("a_stolen_node_key", 2);
    befriend(&mut net, 0, 1);
    net.run_until("two sites", seconds(60), |net| net.converged(&all(2)));
    // Whoever has the key of node 5 says that the subnet of node 6 is its own, and one of the other site.
    for stolen in [6, 1] {
        let lie = Facts { subnets: facts(stolen).subnets, ..facts(5) };
        net.announce(5, lie);
        for _ in 0..100 {
            net.run(Duration::from_millis(100));
            for node in nodes(0) {
                let member = net.mesh(node).member(&name(5)).map(|member| member.routed.cloned());
                let routed = member.flatten().map(|record| record.facts.subnets);
                assert!(routed.is_none_or(|routed| routed == facts(5).subnets), "WEFT_SEED={}", net.seed);
                assert!(net.verdict(node, 6) == Some(Verdict::Accepted));
            }
        }
    }
    assert_eq!(refused(&net, 2, 5), format!("{} is not of the prefixes of site s1", subnet(1)));
    // The site declares the key void: it is out everywhere, at home too.
    net.announce(5, facts(5));
    net.run_until("as before", seconds(30), |net| net.converged(&all(2)));
    let speaker = nodes(1).start;
    net.with(speaker, |mesh, now| mesh.declare_void(Some(key(5, 1).public()), now)).unwrap();
    let out =
        |net: &Meshes, node| net.mesh(node).member(&name(5)).is_none_or(|member| member.routed.is_none());
    let took =
        net.run_until("void", seconds(30), |net| all(2).into_iter().all(|node| node == 5 || out(net, node)));
    assert!(took < seconds(10), "{took:?}");
}

#[test]
fn a_site_announces_nothing_of_another_even_if_it_certifies_it() {
    let mut net = sites("a_site_announces_nothing_of_another", 2);
    befriend(&mut net, 0, 1);
    net.run_until("two sites", seconds(60), |net| net.converged(&all(2)));
    // The store and the key of site 1 are in wrong hands: it leases a subnet of site 0 to node 5 and certifies that.
    let lease = (subnet(2), Owner { node: name(5), key: key(5, 1).public(), epoch: Epoch(1000) });
    let owners: Vec<_> =
        nodes(1).filter(|node| *node != 5).map(|node| owner(node, node as u64 + 1)).collect();
    let table = Authority::Store(Arc::new(owners.into_iter().chain([lease]).collect()));
    for node in nodes(1) {
        let table = table.clone();
        net.with(node, |mesh, now| mesh.set_authority(table, now));
    }
    let subnets = vec![LeasedSubnet { subnet: subnet(2), epoch: Epoch(1000) }];
    net.announce(5, Facts { subnets, ..facts(5) });
    net.run(seconds(30));
    for node in nodes(0) {
        assert_eq!(refused(&net, node, 5), format!("{} is not of the prefixes of site s1", subnet(2)));
        assert!(node == 2 || net.verdict(node, 2) == Some(Verdict::Accepted));
    }
    // Nor does it help to claim the prefix: it was not let in with it.
    let trust =
        Trust { site: site_key(1).public(), prefixes: vec![prefix(1), prefix(0)], signer: Some(site_key(1)) };
    net.with(nodes(1).start, |mesh, now| mesh.set_trust(trust, Vec::new(), now)).unwrap();
    net.run(seconds(30));
    assert!(nodes(0).all(|node| net.mesh(node).member(&name(5)).unwrap().routed.is_none()));
    let view = net.mesh(3).sites().find(|view| view.site == site(1)).cloned().unwrap();
    assert_eq!(view.problems, [format!("it was not let in with {}: invite it again", prefix(0))]);
}

#[test]
fn an_earlier_certificate_does_not_bring_a_lost_subnet_back() {
    let mut net = sites("an_earlier_certificate", 2);
    befriend(&mut net, 0, 1);
    net.run_until("two sites", seconds(60), |net| net.converged(&all(2)));
    // Node 5 is away, and its subnet goes to node 6, at a later epoch.
    net.net.sides.insert(address(5), 1);
    net.run(seconds(60));
    let mut table: Vec<_> = [4, 6, 7].map(|node| owner(node, node as u64 + 1)).into();
    table.push((subnet(5), Owner { node: name(6), key: key(6, 1).public(), epoch: Epoch(50) }));
    let table = Authority::Store(Arc::new(table.into_iter().collect()));
    for node in [4, 6, 7] {
        let table = table.clone();
        net.with(node, |mesh, now| mesh.set_authority(table, now));
    }
    let moved = Facts {
        subnets: vec![facts(6).subnets[0], LeasedSubnet { subnet: subnet(5), epoch: Epoch(50) }],
        ..facts(6)
    };
    net.announce(6, moved.clone());
    let uses = |net: &Meshes, node: usize| {
        let member = net.mesh(node).member(&name(6));
        member.and_then(|member| member.routed.map(|routed| routed.facts.subnets.clone()))
            == Some(moved.subnets.clone())
    };
    net.run_until("moved", seconds(60), |net| nodes(0).all(|node| uses(net, node)));
    // It comes back with what it had, and does not know better.
    net.net.sides.clear();
    for _ in 0..300 {
        net.run(Duration::from_millis(100));
        assert!(nodes(0).all(|node| uses(&net, node)), "WEFT_SEED={}", net.seed);
    }
    assert!(nodes(0).all(|node| net.mesh(node).member(&name(5)).unwrap().routed.is_none()));
}

#[test]
fn sites_cut_off_from_each_other_keep_what_works_and_catch_up() {
    let mut net = sites("sites_cut_off", 2);
    befriend(&mut net, 0, 1);
    net.run_until("two sites", seconds(60), |net| net.converged(&all(2)));
    for node in nodes(1) {
        net.net.sides.insert(address(node), 1);
    }
    net.run(seconds(120));
    assert!(routes(&net, 0, 0) && routes(&net, 1, 1) && routes(&net, 0, 1) && routes(&net, 1, 0));
    // Meanwhile a node of the other site is declared void.
    let key: PublicKey = key(6, 1).public();
    net.with(nodes(1).start, |mesh, now| mesh.declare_void(Some(key), now)).unwrap();
    net.run(seconds(10));
    net.net.sides.clear();
    net.run_until("healed", seconds(60), |net| {
        nodes(0).all(|node| {
            net.mesh(node).member(&name(6)).is_none_or(|member| member.routed.is_none())
                && net.verdict(node, 5) == Some(Verdict::Accepted)
        })
    });
}

#[test]
fn a_node_that_remembers_statements_needs_nobody_to_believe_them() {
    let mut net = sites("a_node_that_remembers", 2);
    befriend(&mut net, 0, 1);
    net.run_until("two sites", seconds(60), |net| net.converged(&all(2)));
    let remembered: Vec<_> = net.mesh(2).statements().cloned().collect();
    assert_eq!(remembered.len(), 4);
    let trust = Trust { site: site_key(0).public(), prefixes: vec![prefix(0)], signer: None };
    // In whatever order they were written down.
    for order in [remembered.clone(), remembered.into_iter().rev().collect()] {
        net.crash(2);
        net.start(MeshConfig { site: site(0), ..config(2, 2) }, store(0));
        net.with(2, |mesh, now| mesh.set_trust(trust.clone(), order, now)).unwrap();
        let is_member = |view: &SiteView| matches!(view.standing, SiteStanding::Member { .. });
        assert!(net.mesh(2).sites().any(is_member));
        assert_eq!(net.mesh(2).statements().count(), 4);
    }
}
