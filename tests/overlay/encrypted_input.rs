//! What peers and machines get wrong about tunnels: each is named, and no other tunnel is disturbed.

use std::time::Duration;

use weft_tests::lab::{Backend, Families, Lab, LabOptions, Store, wait_until};

const PATIENCE: Duration = Duration::from_secs(30);

fn tunnel_key(lab: &Lab, node: &str) -> String {
    lab.weft(node, &["status"])["tunnels"]["key"].as_str().unwrap_or_default().to_owned()
}

/// What doctor says; it must find something.
fn doctor(lab: &Lab, node: &str) -> String {
    let output = lab.exec(node, &["weft", "doctor"]);
    assert_eq!(output.status.code(), Some(1), "doctor finds nothing");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_tunnel_key_that_two_nodes_have_is_replaced_and_others_never_notice() {
    let options = LabOptions::new("enctwin").nodes(3).pods(1).overlay(Families::V4);
    let lab = Lab::up(options.backend(Backend::Wireguard));
    lab.ping_all();
    let pings = [("n1/a", "n2"), ("n2/a", "n1")].map(|(from, to)| lab.background_ping(from, lab.ip(to, "a")));
    // As on a machine that was made from another's disk.
    lab.stop("n3");
    let copied = lab.run("n2", &["cat", "/var/lib/weft/tunnel.key"]);
    lab.feed("n3", &["sh", "-c", "cat >/var/lib/weft/tunnel.key"], &copied);
    let before = tunnel_key(&lab, "n2");
    lab.start("n3");
    // The newcomer remembers whose key it is; a peer that learns of it first replaces its own.
    wait_until("each has a key of its own", PATIENCE, || {
        let now = ["n2", "n3"].map(|node| tunnel_key(&lab, node));
        now[0] != now[1] && now.iter().all(|key| !key.is_empty()) && now[1] != before
    });
    for (from, to) in [("n1/a", "n3"), ("n2/a", "n3"), ("n3/a", "n1"), ("n3/a", "n2")] {
        wait_until("the third node is reached again", PATIENCE, || lab.ping(from, lab.ip(to, "a")));
    }
    for ping in pings {
        let (sent, lost) = ping.stop();
        assert!(sent > 20 && lost.is_empty(), "{lost:?} of {sent} lost");
    }
    wait_until("nothing is left to say", PATIENCE, || {
        ["n1", "n2", "n3"].iter().all(|node| lab.exec(*node, &["weft", "doctor"]).status.success())
    });
}

#[test]
fn a_subnet_that_two_nodes_announce_stays_where_it_was_and_both_are_named() {
    let options = LabOptions::new("encover").nodes(3).started(2).pods(1).overlay(Families::V4);
    let options = options.store(Store::Static).backend(Backend::Wireguard);
    let lab = Lab::up(options.node_config("n3", "[store]\nsubnets = [\"10.32.2.0/24\"]"));
    let ping = lab.background_ping("n1/a", lab.ip("n2", "a"));
    let _third = lab.background("n3", &["weftd", "--config", "/etc/weft/weft.toml"]);
    wait_until("n1 names both", PATIENCE, || {
        let warnings = lab.weft("n1", &["status"])["warnings"].to_string();
        ["n2", "n3", "10.32.2.0/24"].iter().all(|word| warnings.contains(word))
    });
    let said = doctor(&lab, "n1");
    assert!(said.contains("both claim") && said.contains("10.32.2.0/24"), "{said}");
    assert!(lab.weft_routes("n1").contains("10.32.2.0/24"));
    let (sent, lost) = ping.stop();
    assert!(sent > 5 && lost.is_empty(), "{lost:?} of {sent} lost");
}

#[test]
fn an_mtu_too_small_for_ipv6_is_named_and_ipv4_goes_on() {
    let lab = Lab::up(LabOptions::new("encsmall").nodes(3).pods(1).backend(Backend::Wireguard));
    let v4 = |node: &str| {
        let ips = lab.ips(node, "a");
        ips.into_iter().find(|ip| ip.is_ipv4()).expect("pods have IPv4")
    };
    let others = lab.background_ping("n1/a", v4("n3"));
    // 60 bytes less for WireGuard over IPv4, which leaves 1,240.
    lab.sh("n2", "ip link set eth0 mtu 1300");
    wait_until("n2 says what is too small, and what would do", PATIENCE, || {
        let warnings = lab.weft("n2", &["status"])["warnings"].to_string();
        ["1240", "1300 to 1340", "IPv6 needs 1280"].iter().all(|word| warnings.contains(word))
    });
    assert!(doctor(&lab, "n2").contains("IPv6 needs 1280"));
    wait_until("IPv4 goes on", PATIENCE, || lab.ping("n1/a", v4("n2")) && lab.ping("n2/a", v4("n1")));
    let (sent, lost) = others.stop();
    assert!(sent > 5 && lost.is_empty(), "{lost:?} of {sent} lost");
    lab.sh("n2", "ip link set eth0 mtu 1500");
    wait_until("IPv6 is back", PATIENCE, || {
        lab.ips("n2", "a").into_iter().all(|ip| lab.ping("n1/a", ip))
            && lab.exec("n2", &["weft", "doctor"]).status.success()
    });
}
