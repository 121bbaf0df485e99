//! Between which nodes pods speak encrypted: pairs with different demands, demands that change, and every underlay.

use std::time::Duration;

use serde_json::Value;
use weft_tests::lab::{Backend, CLEAR, Capture, Families, Lab, LabOptions, Ping, wait_until};

const PATIENCE: Duration = Duration::from_secs(30);
/// The padding of `ping -p`, as no other packet has it.
const SECRET: &str = "weft-pod-secret!";

/// The devices by which the kernel of a node sends to the pods of another.
fn devices(lab: &Lab, node: &str, to: &str) -> Vec<String> {
    let device = |ip: std::net::IpAddr| {
        // Without a route ip has an error and no answer.
        let output = lab.exec(node, &["ip", "-j", "route", "get", &ip.to_string()]);
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        answer[0]["dev"].as_str().unwrap_or_default().to_owned()
    };
    lab.ips(to, "a").into_iter().map(device).collect()
}

fn all_by(lab: &Lab, node: &str, to: &str, device: &str) -> bool {
    devices(lab, node, to).iter().all(|found| found.starts_with(device))
}

fn all_reach(lab: &Lab, pairs: &[(&str, &str)]) -> bool {
    let reach = |from: &str, to: &str| {
        lab.ips(to, "a").into_iter().all(|ip| lab.ping(format!("{from}/a").as_str(), ip))
    };
    pairs.iter().all(|(a, b)| reach(a, b) && reach(b, a))
}

fn peer(lab: &Lab, node: &str, of: &str) -> Value {
    let peers = lab.weft(node, &["peers"]);
    let peers = peers["peers"].as_array().cloned().unwrap_or_default();
    peers.into_iter().find(|peer| peer["node"] == of).unwrap_or_default()
}

/// Starts a node's daemon again with another setting of `[encryption]`.
fn set(lab: &Lab, node: &str, key: &str, value: &str) {
    lab.stop(node);
    lab.sh(node, &format!("sed -i 's/^{key} = .*/{key} = {value}/' /etc/weft/weft.toml"));
    lab.start(node);
}

#[test]
fn a_cluster_goes_over_to_encryption_and_back_node_by_node() {
    let lab = Lab::up(
        LabOptions::new("polroll").pods(1).config("[encryption]\npolicy = \"never\"\ntunnels = true"),
    );
    let nodes = ["n1", "n2", "n3"];
    let pairs = [("n1", "n2"), ("n2", "n3"), ("n3", "n1")];
    let start = |(from, to): (&str, &str)| {
        let ping = |ip| lab.background_ping(format!("{from}/a").as_str(), ip);
        lab.ips(to, "a").into_iter().map(ping).collect::<Vec<Ping>>()
    };
    let pings: Vec<Ping> = pairs.into_iter().flat_map(start).collect();
    for (number, node) in nodes.into_iter().enumerate() {
        set(&lab, node, "policy", "\"always\"");
        // What peers send in clear until they have heard is dropped; the node itself sends nothing more in clear.
        let own: Vec<String> = lab.subnets(node).iter().map(|subnet| format!("src net {subnet}")).collect();
        let in_vxlan = format!("src host 192.0.2.{} and udp port 8472", number + 1);
        let clear = format!("{} or ({in_vxlan})", own.join(" or "));
        let underlay = Capture::start(&lab, node, "eth0");
        // From then on it neither sends nor takes clear packets, and its peers have followed.
        wait_until("the pairs of the node are encrypted", PATIENCE, || {
            let others = || nodes.into_iter().filter(|other| *other != node);
            others().all(|other| all_by(&lab, node, other, "weft-wg") && all_by(&lab, other, node, "weft-wg"))
        });
        // Sessions end with the daemon that had them; new ones take a round trip.
        wait_until("all reach each other", PATIENCE, || all_reach(&lab, &pairs));
        let found = underlay.finish(20, &clear, SECRET);
        assert!(found.matching == 0, "{node} sent in clear: {found:?}");
    }
    let underlay = Capture::start(&lab, "n2", "eth0");
    lab.ping_all();
    let found = underlay.finish(100, CLEAR, SECRET);
    assert!(found.matching == 0, "{found:?}");
    for node in nodes {
        set(&lab, node, "policy", "\"never\"");
    }
    wait_until("no pair is encrypted", PATIENCE, || {
        pairs.into_iter().all(|(a, b)| all_by(&lab, a, b, "weft-vx") && all_by(&lab, b, a, "weft-vx"))
    });
    assert!(all_reach(&lab, &pairs));
    // They were there to be seen in clear. A daemon that stops ends its tunnels: what that costs, upgrade.rs looks at.
    assert!(pings.into_iter().map(Ping::stop).all(|(sent, lost)| sent > lost.len() as u64 + 50));
}

#[test]
fn pairs_go_over_to_direct_routes_and_back_without_loss() {
    let lab = Lab::up(
        LabOptions::new("poldirect")
            .nodes(2)
            .pods(1)
            .underlay(Families::Dual)
            .config("[overlay]\ndirect_routing = false"),
    );
    let pings = [("n1", "n2"), ("n2", "n1")].map(|(from, to)| {
        lab.ips(to, "a").into_iter().map(|ip| lab.background_ping(format!("{from}/a").as_str(), ip)).collect()
    });
    for (direct, device) in [("true", "eth0"), ("false", "weft-vx")] {
        for node in ["n1", "n2"] {
            set(&lab, node, "direct_routing", direct);
        }
        wait_until("both ways are others", PATIENCE, || {
            all_by(&lab, "n1", "n2", device) && all_by(&lab, "n2", "n1", device)
        });
        wait_until("both reach each other", PATIENCE, || all_reach(&lab, &[("n1", "n2")]));
    }
    for ping in pings.into_iter().flat_map(|pings: Vec<Ping>| pings) {
        let (sent, lost) = ping.stop();
        assert!(sent > 50 && lost.is_empty(), "{lost:?} of {sent} lost");
    }
}

#[test]
fn nodes_with_different_demands_share_a_network() {
    let lab = Lab::up(
        LabOptions::new("polmix")
            .nodes(4)
            .pods(1)
            .config("[encryption]\ntunnels = true")
            .node_config("n1", "[encryption]\npolicy = \"always\"")
            .node_config("n4", "[node]\nsite = \"far\"\n[encryption]\npolicy = \"cross-site\""),
    );
    set(&lab, "n3", "tunnels", "false");
    let ways =
        [("n1", "n2", "weft-wg"), ("n1", "n4", "weft-wg"), ("n2", "n4", "weft-wg"), ("n2", "n3", "weft-vx")];
    for (a, b, device) in ways {
        for (from, to) in [(a, b), (b, a)] {
            wait_until(&format!("{from} sends to {to} by {device}"), PATIENCE, || {
                all_by(&lab, from, to, device)
            });
            let transport = if device == "weft-wg" { "wireguard" } else { "vxlan" };
            wait_until(&format!("{from} says that it reaches {to} by {transport}"), PATIENCE, || {
                peer(&lab, from, to)["transport"] == transport
            });
        }
        wait_until("both reach each other", PATIENCE, || all_reach(&lab, &[(a, b)]));
    }
    // Who cannot encrypt does not reach who must, and both say why.
    for (from, to) in [("n1", "n3"), ("n3", "n1"), ("n4", "n3"), ("n3", "n4")] {
        wait_until("the clear way is gone", PATIENCE, || !all_by(&lab, from, to, "weft-"));
        assert!(!lab.ping(format!("{from}/a").as_str(), lab.ip(to, "a")), "{from} reaches {to} in clear");
        let routes = lab.weft(from, &["routes"]).to_string();
        assert!(routes.contains("set encryption.policy"), "{from} says what to do: {routes}");
    }
}

#[test]
fn tunnels_cross_every_underlay() {
    for (name, underlay) in [("pol6", Families::V6), ("poldual", Families::Dual)] {
        let lab = Lab::up(LabOptions::new(name).underlay(underlay).pods(1).backend(Backend::Wireguard));
        let capture = Capture::start(&lab, "n1", "eth0");
        lab.ping_all();
        let pattern: String = SECRET.bytes().map(|byte| format!("{byte:02x}")).collect();
        for ip in lab.ips("n2", "a") {
            let words = ["ping", "-n", "-c", "20", "-i", "0.02", "-s", "1200", "-p", &pattern, "-W", "2"];
            lab.run("n1/a", &[&words[..], &[&ip.to_string()]].concat());
        }
        let found = capture.finish(40, CLEAR, SECRET);
        assert!(found.matching == 0 && !found.secret, "{name}: {found:?}");
    }
}
