//! A node's own address on the underlay changes while its daemon runs: no restart, and its peers follow.

use std::time::Duration;

use serde_json::Value;
use weft_tests::lab::{Backend, CLEAR, Capture, Families, Lab, LabOptions, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);
/// Nobody says which address is the node's: the device's own are.
const FOLLOWS: &str = "[underlay]\naddress = []\n";

/// What `bridge fdb` of a node says about where a device of the tunnels sends to.
fn destinations(lab: &Lab, node: &str, device: &str) -> Vec<String> {
    let entries = lab.json(node, &["bridge", "-j", "fdb", "show", "dev", device]);
    let entries = entries.as_array().cloned().unwrap_or_default();
    entries.iter().filter_map(|entry| entry["dst"].as_str().map(str::to_owned)).collect()
}

/// The process of a node's daemon, by the one socket that it listens on for callers.
fn daemon(lab: &Lab, node: &str) -> String {
    let listening = lab.sh(node, "ss -Hxlp src /run/weft/weft.sock");
    let pid = listening.split("pid=").nth(1).and_then(|rest| rest.split(',').next());
    pid.unwrap_or_else(|| panic!("nobody listens: {listening}")).to_owned()
}

fn reaches_all(lab: &Lab) -> bool {
    [("n1", "n2"), ("n2", "n1"), ("n3", "n1"), ("n1", "n3")]
        .iter()
        .all(|(from, to)| lab.ips(to, "a").into_iter().all(|ip| lab.ping(format!("{from}/a").as_str(), ip)))
}

/// Gives a node other addresses in the place of those that it has.
fn readdress(lab: &Lab, node: &str, pairs: &[(&str, &str)]) {
    for (old, new) in pairs {
        let nodad = if new.contains(':') { "nodad" } else { "" };
        lab.sh(node, &format!("ip address del {old} dev eth0; ip address add {new} dev eth0 {nodad}"));
    }
}

#[test]
fn a_node_that_gets_other_addresses_is_followed_without_a_restart() {
    let lab = Lab::up(
        LabOptions::new("readdress").config(FOLLOWS).pods(1).underlay(Families::Dual).overlay(Families::Dual),
    );
    let addresses = lab.state().node("n1").expect("a node").underlay.clone();
    assert_eq!(addresses.iter().map(ToString::to_string).collect::<Vec<_>>(), ["192.0.2.1", "2001:db8::1"]);
    let before = daemon(&lab, "n1");
    let still = lab.background_ping("n2/a", lab.ip("n3", "a"));
    assert!(destinations(&lab, "n2", "weft-vx4").contains(&"192.0.2.1".to_owned()));
    readdress(&lab, "n1", &[("192.0.2.1/24", "192.0.2.101/24"), ("2001:db8::1/64", "2001:db8::101/64")]);
    wait_until("pods of all nodes reach each other again", PATIENCE, || reaches_all(&lab));
    for node in ["n2", "n3"] {
        wait_until("the kernel of the peer sends to the new address, and to it alone", PATIENCE, || {
            let found = destinations(&lab, node, "weft-vx4");
            found.contains(&"192.0.2.101".to_owned()) && !found.contains(&"192.0.2.1".to_owned())
        });
    }
    let link: Value = lab.json("n1", &["ip", "-d", "-j", "link", "show", "weft-vx4"]);
    assert_eq!(link[0]["linkinfo"]["info_data"]["local"], "192.0.2.101", "{link}");
    let sockets = lab.sh("n1", "ss -Hlun 'sport = :7117'");
    assert!(sockets.contains("192.0.2.101:7117") && sockets.contains("[2001:db8::101]:7117"), "{sockets}");
    assert!(!sockets.contains("192.0.2.1:7117"), "{sockets}");
    // Whoever begins now finds it by its lease, whose text is in the store.
    let told = ["grep", "-aqr", "192.0.2.101:7117", "/run/weft-lab/shared"];
    wait_until("the lease says where it gossips", PATIENCE, || lab.exec("n2", &told).status.success());
    assert_eq!(daemon(&lab, "n1"), before, "the daemon is the same");
    let (sent, lost) = still.stop();
    assert!(lost.is_empty(), "between nodes that stayed no answer to {lost:?} of {sent}");
}

#[test]
fn an_address_that_comes_before_the_other_goes_costs_nothing_until_it_goes() {
    let lab = Lab::up(LabOptions::new("twoaddr").config(FOLLOWS).pods(1));
    let ping = lab.background_ping("n2/a", lab.ip("n1", "a"));
    lab.sh("n1", "ip address add 192.0.2.101/24 dev eth0");
    // What it is for: the daemon looked and kept the address that peers know.
    let passes = || lab.weft("n1", &["status"])["reconcile"]["passes"].as_u64();
    let before = passes();
    lab.sh("n1", "ip link set weft0 mtu 1400");
    wait_until("the daemon looked at its kernel", PATIENCE, || {
        lab.sh("n1", "ip link show weft0").contains("mtu 1450") && passes() != before
    });
    let (sent, lost) = ping.stop();
    assert!(lost.is_empty(), "no answer to {lost:?} of {sent}");
    lab.sh("n1", "ip address del 192.0.2.1/24 dev eth0; ip address replace 192.0.2.101/24 dev eth0");
    wait_until("pods of all nodes reach each other again", PATIENCE, || reaches_all(&lab));
}

#[test]
fn all_nodes_may_get_other_addresses_at_once() {
    let lab = Lab::up(LabOptions::new("readdressall").config(FOLLOWS).pods(1));
    for node in ["n1", "n2", "n3"] {
        let number = &node[1..];
        let (old, new) = (format!("192.0.2.{number}/24"), format!("192.0.2.10{number}/24"));
        readdress(&lab, node, &[(&old, &new)]);
    }
    wait_until("pods of all nodes reach each other again", PATIENCE, || reaches_all(&lab));
}

#[test]
fn encrypted_tunnels_follow_a_node_and_nothing_goes_in_clear() {
    let lab = Lab::up(LabOptions::new("readdressenc").config(FOLLOWS).pods(1).backend(Backend::Wireguard));
    let capture = Capture::start(&lab, "n2", "eth0");
    let before = daemon(&lab, "n1");
    readdress(&lab, "n1", &[("192.0.2.1/24", "192.0.2.101/24")]);
    wait_until("pods of all nodes reach each other again", PATIENCE, || reaches_all(&lab));
    assert_eq!(daemon(&lab, "n1"), before, "the daemon is the same");
    let found = capture.finish(1, CLEAR, "weft-pod-secret!");
    assert_eq!(found.matching, 0, "pods in clear on the underlay: {found:?}");
}
