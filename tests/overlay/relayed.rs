//! A node that relays for others is upgraded.

use super::*;

/// Tunnels of n1 and n2 do not reach each other, and all else does.
const CUT: &str = "table inet cut { chain in { type filter hook input priority -10; \
    ip saddr ADDRESS udp dport 51820 drop; ip saddr ADDRESS udp sport 51820 drop; }; }";

fn cut(lab: &Lab, node: &str, address: &str) {
    assert!(lab.feed(node, &["nft", "-f", "-"], &CUT.replace("ADDRESS", address)).status.success());
}

/// By which relay a node reaches another, and at which address of it.
fn relay(lab: &Lab, node: &str, of: &str) -> (String, String) {
    let peers = lab.weft(node, &["peers"])["peers"].as_array().cloned().unwrap_or_default();
    let peer = peers.into_iter().find(|peer| peer["node"] == of).unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    (text(&peer["via"]), text(&peer["tunnel"]["endpoint"]))
}

#[test]
fn pairs_lose_nothing_while_the_daemon_that_relays_for_them_is_upgraded() {
    let config = "[encryption]\npolicy = \"cross-site\"\nimplementation = \"user-space\"";
    let lab = Lab::up(LabOptions::new("uprelay").nodes(3).sites(3).pods(1).config(config));
    lab.befriend_sites();
    cut(&lab, "n1", "192.0.2.2");
    cut(&lab, "n2", "192.0.2.1");
    let of_both = || [relay(&lab, "n1", "n2"), relay(&lab, "n2", "n1")];
    wait_until("n3 relays for both", Duration::from_secs(120), || {
        lab.ping("n1/a", lab.ip("n2", "a"))
            && lab.ping("n2/a", lab.ip("n1", "a"))
            && of_both().iter().all(|(relay, _)| relay == "n3")
    });
    let before = of_both();
    let port = before[0].1.rsplit(':').next().expect("an address has a port").to_owned();
    let holders = || {
        let text = lab.run("n3", &["ss", "-Hlnup", &format!("sport = :{port}")]);
        let pids = text.lines().filter_map(|line| line.split("pid=").nth(1)?.split(',').next());
        pids.map(str::to_owned).collect::<Vec<_>>()
    };
    let pings = pings(&lab);
    let mut later = Vec::new();
    for _ in 0..3 {
        later.push(take_over(&lab, "n3"));
        let (one, holders) = (daemons(&lab, "n3"), holders());
        assert!(!holders.is_empty() && holders.iter().all(|pid| *pid == one[0]), "{one:?}: {holders:?}");
    }
    // They go on for a while; the way over a relay is longer, and answers to the last ones are still on it.
    let to = lab.ip("n2", "a").to_string();
    lab.run("n1/a", &["ping", "-n", "-q", "-i", "0.01", "-c", "100", &to]);
    nothing_lost_but(30, pings);
    assert_eq!(of_both(), before, "the pair is where it was");
    let status = String::from_utf8_lossy(&lab.exec("n3", &["weft", "status"]).stdout).into_owned();
    assert!(status.contains(&format!("relays for n1 and n2 at port {port}: ")), "{status}");
    assert!(status.contains("relay      1 pair, "), "{status}");
    let routes = String::from_utf8_lossy(&lab.exec("n1", &["weft", "routes"]).stdout).into_owned();
    assert!(routes.contains("; at present by the relay n3"), "{routes}");
}
