//! Gossip between sites behind routers that translate, with one open node for all of them.

use std::time::Duration;

use weft_tests::lab::{Capture, Families, Lab, LabOptions, Nat, Request, wait_until};

const PATIENCE: Duration = Duration::from_secs(120);
const NODES: [&str; 4] = ["n1", "n2", "n3", "n4"];

fn alive(lab: &Lab, node: &str) -> Vec<String> {
    let peers = lab.weft(node, &["peers"])["peers"].as_array().cloned().unwrap_or_default();
    let alive = peers.into_iter().filter(|peer| peer["state"] == "alive");
    alive.map(|peer| peer["node"].as_str().unwrap_or_default().to_owned()).collect()
}

fn all_alive(lab: &Lab) -> bool {
    NODES.iter().all(|node| alive(lab, node).len() == NODES.len() - 1)
}

fn reach(lab: &Lab, node: &str) -> serde_json::Value {
    lab.weft(node, &["status"])["reach"].clone()
}

fn kept(lab: &Lab) -> bool {
    NODES[1..].iter().all(|node| reach(lab, node)["keepers"] == serde_json::json!(["n1"]))
}

/// Whether a node gets an answer of another through the mesh.
fn answers(lab: &Lab, from: &str, of: &str) -> bool {
    lab.exec(from, &["weft", "ping", of]).status.success()
}

fn nat_check(lab: &Lab, node: &str) -> serde_json::Value {
    let doctor = lab.weft(node, &["doctor"]);
    let checks = doctor["checks"].as_array().cloned().unwrap_or_default();
    checks.into_iter().find(|check| check["name"] == "nat").expect("the doctor looks at it")
}

#[test]
fn one_open_node_keeps_sites_behind_three_kinds_of_nat_together() {
    let kinds = [Nat::None, Nat::PortRestricted, Nat::Symmetric, Nat::Double];
    let options = LabOptions::new("natgossip").nodes(4).pods(0).sites(4).nat(&kinds);
    let lab = Lab::up(options.underlay(Families::V4));
    wait_until("all know all", PATIENCE, || all_alive(&lab));
    wait_until("each has its keeper", PATIENCE, || kept(&lab));
    assert_eq!(reach(&lab, "n1")["reach"], "open");
    for (node, router) in [("n2", "192.0.2.202"), ("n3", "192.0.2.203"), ("n4", "192.0.2.204")] {
        let reach = reach(&lab, node);
        assert_eq!(reach["reach"], "behind-nat", "{node}: {reach}");
        let seen = reach["reflexive"][0].as_str().unwrap_or_default();
        assert!(seen.starts_with(&format!("{router}:")), "{node}: {reach}");
        assert_eq!(nat_check(&lab, node)["ok"], true);
    }

    // Between two sites behind NAT it goes through the open node, and no other way, as the routers and the wire say.
    let capture = Capture::start(&lab, "n3", "eth0");
    for (from, of) in [("n2", "n3"), ("n4", "n3"), ("n3", "n2")] {
        wait_until(&format!("{of} answers {from}"), PATIENCE, || answers(&lab, from, of));
    }
    let from_outside = "udp port 7117 and src host 192.0.2.1";
    let counts = capture.finish_with(
        from_outside,
        &[from_outside, "udp port 7117 and not host 192.0.2.1 and dst host 198.51.100.3"],
    );
    assert!(counts[0] > 3 && counts[1] == 0, "{counts:?}");
    let flows = lab.sh("r3", "conntrack -L -p udp --dport 7117 2>/dev/null");
    assert!(flows.contains("dst=192.0.2.1 "), "{flows}");
    assert!(reach(&lab, "n1")["forwarded"].as_u64().is_some_and(|count| count > 0));

    // A router that forgets what it knew is crossed again before anybody takes its site for dead.
    lab.tell(Request::Nat { router: "r3".into(), nat: Nat::Symmetric });
    wait_until("n3 answers through its new mapping", PATIENCE, || answers(&lab, "n2", "n3"));
    assert!(NODES.iter().filter(|node| **node != "n3").all(|node| alive(&lab, node).contains(&"n3".into())));

    // Without the open node nobody is reached, and the doctor says what is missing.
    lab.kill("n1");
    wait_until("the doctor misses an open node", PATIENCE, || nat_check(&lab, "n2")["ok"] == false);
    let check = nat_check(&lab, "n2").to_string();
    assert!(
        check.contains("no node of the mesh can be reached from outside") && check.contains("open UDP"),
        "{check}"
    );
    lab.start("n1");
    wait_until("all know all again", PATIENCE, || all_alive(&lab) && kept(&lab));
}
