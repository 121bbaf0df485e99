//! How nodes of different sites reach each other where not every packet gets through: by opening what stands between them from both
//! sides, by a relay where that cannot work, and directly again once it can.

use std::time::Duration;

use serde_json::Value;
use weft_tests::lab::{Capture, Families, Lab, LabOptions, Nat, Request, wait_until};

const PATIENCE: Duration = Duration::from_secs(120);
/// What pods say: 16 bytes over and over (`ping -p`).
const SECRET: &str = "weft-pod-secret!";
/// Tunnels of the daemon, on which the bounds of this file hold.
const TUNNELS: &str = "[encryption]\npolicy = \"cross-site\"\nimplementation = \"user-space\"";
/// No packet of a tunnel crosses between two nodes, and all gossip does.
const CUT: &str = "table inet cut { chain in { type filter hook input priority -10; \
    ip saddr ADDRESS udp dport 51820 drop; ip saddr ADDRESS udp sport 51820 drop; }; }";

fn peer(lab: &Lab, node: &str, of: &str) -> Value {
    let peers = lab.weft(node, &["peers"])["peers"].as_array().cloned().unwrap_or_default();
    peers.into_iter().find(|peer| peer["node"] == of).unwrap_or_default()
}

fn via(lab: &Lab, node: &str, of: &str) -> String {
    peer(lab, node, of)["via"].as_str().unwrap_or_default().to_owned()
}

fn is_relayed(lab: &Lab, one: &str, other: &str) -> bool {
    [(one, other), (other, one)].into_iter().all(|(node, of)| {
        let peer = peer(lab, node, of);
        peer["transport"] == "relay" && !peer["via"].as_str().unwrap_or_default().is_empty()
    })
}

fn is_direct(lab: &Lab, one: &str, other: &str) -> bool {
    [(one, other), (other, one)].into_iter().all(|(node, of)| {
        let peer = peer(lab, node, of);
        peer["transport"] == "wireguard" && peer["tunnel"]["handshake_ms"].is_u64()
    })
}

fn ping(lab: &Lab, from: &str, to: &str) -> bool {
    lab.ping(format!("{from}/a").as_str(), lab.ip(to, "a"))
}

fn wait_for_pings(lab: &Lab, one: &str, other: &str) -> Duration {
    wait_until("pods of both sites reach each other", PATIENCE, || {
        ping(lab, one, other) && ping(lab, other, one)
    })
}

fn cut_tunnels(lab: &Lab, node: &str, other: &str) {
    let rules = CUT.replace("ADDRESS", &format!("192.0.2.{}", other.trim_start_matches('n')));
    assert!(lab.feed(node, &["nft", "-f", "-"], &rules).status.success());
}

fn heal_tunnels(lab: &Lab, node: &str) {
    lab.run(node, &["nft", "delete", "table", "inet", "cut"]);
}

/// Each node a site: n1 and n2 talk, n3 and n4 can relay.
fn four_sites(name: &str) -> Lab {
    let options = LabOptions::new(name).nodes(4).sites(4).pods(1).overlay(Families::V4).config(TUNNELS);
    let lab = Lab::up(options);
    lab.befriend_sites();
    wait_for_pings(&lab, "n1", "n2");
    lab
}

#[test]
fn a_pair_that_is_cut_off_goes_by_a_relay_changes_it_when_it_dies_and_goes_directly_again() {
    let lab = four_sites("paths");
    let capture = ["n3", "n4"].map(|node| Capture::start(&lab, node, "eth0"));
    let pattern: String = SECRET.bytes().map(|byte| format!("{byte:02x}")).collect();
    let address = lab.ip("n2", "a").to_string();
    let secret = lab
        .background("n1/a", &["ping", "-n", "-i", "0.1", "-s", "400", "-p", &pattern, "-w", "600", &address]);

    let flow = lab.background_flow("n1/a", "n2/a", lab.ip("n2", "a"));
    let flows = |what: &str| flow.await_more(what, PATIENCE);
    flows("the flow flows");
    cut_tunnels(&lab, "n1", "n2");
    cut_tunnels(&lab, "n2", "n1");
    wait_until("the pair goes by a relay", PATIENCE, || is_relayed(&lab, "n1", "n2"));
    flows("the flow goes by the relay");
    wait_until("there is a relay to fall back to", PATIENCE, || {
        ["n3", "n4"].into_iter().all(|node| {
            let pairs = lab.weft(node, &["status"])["relaying"]["pairs"].as_array().cloned();
            pairs.is_some_and(|pairs| {
                pairs.iter().any(|pair| pair["legs"].as_array().is_some_and(|legs| legs.len() == 2))
            })
        })
    });

    // The relay dies with all that it has.
    let relay = via(&lab, "n1", "n2");
    let other = if relay == "n3" { "n4" } else { "n3" };
    lab.kill(&relay);
    wait_until("another relay carries", PATIENCE, || {
        via(&lab, "n1", "n2") == other && via(&lab, "n2", "n1") == other
    });
    flows("the flow goes by the other relay");
    lab.start(&relay);

    // No ping is lost when the direct path is back.
    let ping = lab.background_ping("n1/a", lab.ip("n2", "a"));
    heal_tunnels(&lab, "n1");
    heal_tunnels(&lab, "n2");
    wait_until("the pair does without a relay", PATIENCE, || is_direct(&lab, "n1", "n2"));
    let (sent, lost) = ping.stop();
    assert!(sent > 0 && lost.is_empty(), "{} of {sent} pings were lost on the way back", lost.len());

    flows("the flow goes directly again");
    let pause = flow.longest_pause();
    println!("longest pause of the TCP flow: {pause:.2?}");
    assert!(pause < Duration::from_secs(20), "the flow stood for {pause:.1?}");
    secret.interrupt();
    for capture in capture {
        let found = capture.finish(1, "udp portrange 51900-51963", SECRET);
        assert!(found.matching > 0, "it relayed");
        assert!(!found.secret, "a relay sees no byte of a pod");
    }
}

/// n1 and n2 are open and of a site each; n3 and n4 are behind routers.
fn behind(name: &str, nat: Nat) -> Lab {
    let options = LabOptions::new(name).nodes(4).sites(4).pods(1).overlay(Families::V4).config(TUNNELS);
    let lab = Lab::up(options.nat(&[Nat::None, Nat::None, nat, nat]));
    lab.befriend_sites();
    lab
}

#[test]
fn sites_behind_port_restricted_routers_open_both_and_need_no_relay() {
    let lab = behind("punch", Nat::PortRestricted);
    let took = wait_for_pings(&lab, "n3", "n4");
    println!("port-restricted with port-restricted: first pings after {took:?}");
    wait_until("the path is direct", PATIENCE, || is_direct(&lab, "n3", "n4"));
    let endpoint = peer(&lab, "n3", "n4")["tunnel"]["endpoint"].as_str().unwrap_or_default().to_owned();
    assert!(endpoint.starts_with("192.0.2.20"), "the router's address: {endpoint}");
}

#[test]
fn sites_behind_symmetric_routers_go_by_a_relay_until_a_router_is_kinder() {
    let lab = behind("symmetric", Nat::Symmetric);
    let took = wait_for_pings(&lab, "n3", "n4");
    println!("symmetric with symmetric: first pings after {took:?}");
    wait_until("the pair goes by a relay", PATIENCE, || is_relayed(&lab, "n3", "n4"));
    let ping = lab.background_ping("n3/a", lab.ip("n4", "a"));
    for router in ["r3", "r4"] {
        lab.tell(Request::Nat { router: router.into(), nat: Nat::FullCone });
    }
    wait_until("the pair does without a relay", PATIENCE, || is_direct(&lab, "n3", "n4"));
    let (sent, lost) = ping.stop();
    println!("relay to direct with new routers: {} of {sent} pings lost", lost.len());
}
