//! Sites behind routers whose kernels carry the tunnels: the kernel has one endpoint for each peer and asks by itself once in five
//! seconds, so which path it takes is the daemon's part. The judges are ping and `wg`.

use std::time::Instant;

use serde_json::Value;
use weft_tests::lab::{Families, Lab, LabOptions, Nat, wait_until};

use super::{PATIENCE, kind, own_key, wg};

const TUNNELS: &str = "[encryption]\npolicy = \"cross-site\"\nimplementation = \"kernel\"";

fn peer(lab: &Lab, node: &str, of: &str) -> Value {
    let peers = lab.weft(node, &["peers"])["peers"].as_array().cloned().unwrap_or_default();
    peers.into_iter().find(|peer| peer["node"] == of).unwrap_or_default()
}

/// By which relay a node reaches another; nothing where it does without.
fn via(lab: &Lab, node: &str, of: &str) -> String {
    peer(lab, node, of)["via"].as_str().unwrap_or_default().to_owned()
}

fn ping(lab: &Lab, from: &str, to: &str) -> bool {
    lab.ping(format!("{from}/a").as_str(), lab.ip(to, "a"))
}

/// Where a node's kernel sends what is for another.
fn endpoint(lab: &Lab, node: &str, of: &str) -> String {
    wg(lab, node, "endpoints").get(&own_key(lab, of)).cloned().unwrap_or_default()
}

fn wait_for_ping(lab: &Lab, what: &str, from: &str, to: &str) {
    let began = Instant::now();
    wait_until(what, PATIENCE, || ping(lab, from, to));
    println!(
        "{what}: {from} reaches {to} after {:?}, at {} and {}",
        began.elapsed(),
        endpoint(lab, from, to),
        endpoint(lab, to, from)
    );
}

#[test]
fn kernels_behind_routers_reach_each_other_and_leave_a_path_that_dies() {
    let options = LabOptions::new("vmpaths").nodes(4).sites(4).pods(1).overlay(Families::V4).config(TUNNELS);
    let lab = Lab::up(options.nat(&[Nat::None, Nat::None, Nat::PortRestricted, Nat::PortRestricted]));
    lab.befriend_sites();
    assert!(["n1", "n3", "n4"].iter().all(|node| kind(&lab, node) == "wireguard"));
    // One asks; the other has nothing to say, so nothing but its daemon makes its kernel open its router.
    wait_for_ping(&lab, "first", "n3", "n4");
    wait_for_ping(&lab, "back", "n4", "n3");

    // No packet of a tunnel comes any more from where the other is, but by a relay.
    for (node, router) in [("n3", "192.0.2.204"), ("n4", "192.0.2.203")] {
        let rules = format!(
            "table ip cut {{ chain in {{ type filter hook input priority -10; ip saddr {router} udp dport 51820 drop; }}; }}"
        );
        assert!(lab.feed(node, &["nft", "-f", "-"], &rules).status.success());
    }
    let relay = relayed(&lab, "the direct path is cut", &["n1", "n2"]);
    lab.kill(&relay);
    let other = if relay == "n1" { "n2" } else { "n1" };
    relayed(&lab, "the relay died", &[other]);
}

/// Pings until n3 and n4 reach each other by one of these relays, and both say so; returns which.
fn relayed(lab: &Lab, what: &str, relays: &[&str]) -> String {
    let mut relay = String::new();
    wait_until(&format!("{what}: one of {relays:?} carries"), PATIENCE, || {
        let carries = ping(lab, "n3", "n4");
        relay = via(lab, "n3", "n4");
        carries && relays.contains(&relay.as_str()) && via(lab, "n4", "n3") == relay
    });
    relay
}
