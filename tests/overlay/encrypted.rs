//! What must be encrypted is: tcpdump on the underlay sees no byte of a pod in clear, whatever happens to the daemons.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::Value;
use weft_tests::lab::{Backend, Background, CLEAR, Capture, Families, Lab, LabOptions, wait_until};

const PATIENCE: Duration = Duration::from_secs(30);
/// What pods say: 16 bytes over and over (`ping -p`).
const SECRET: &str = "weft-pod-secret!";
/// Where a test is of what the daemon needs or promises for tunnels of its own, and the kernel does not.
const USER_SPACE: &str = "[encryption]\nimplementation = \"user-space\"";

/// Pods that talk to each other until the lab ends.
fn talk(lab: &Lab, from: &str, to: (&str, &str)) -> Vec<Background> {
    let pattern: String = SECRET.bytes().map(|byte| format!("{byte:02x}")).collect();
    let ping = |ip: std::net::IpAddr| {
        let address = ip.to_string();
        lab.background(
            from,
            &["ping", "-n", "-i", "0.02", "-s", "400", "-p", &pattern, "-w", "120", &address],
        )
    };
    lab.ips(to.0, to.1).into_iter().map(ping).collect()
}

/// How many packets the table kept from going or coming in clear.
fn kept_back(lab: &Lab, node: &str) -> u64 {
    let rules = lab.sh(node, "nft list table inet weft | grep -o 'counter packets [0-9]*' | cut -d' ' -f3");
    rules.lines().filter_map(|line| line.parse::<u64>().ok()).sum()
}

/// The tunnel key of a node under which another has a session with it.
fn key_of(lab: &Lab, observer: &str, node: &str) -> Option<String> {
    let peers = lab.weft(observer, &["peers"]);
    let peer = peers["peers"].as_array()?.iter().find(|peer| peer["node"] == node)?.clone();
    peer["tunnel"]["handshake_ms"].as_u64()?;
    Some(peer["tunnel"]["key"].as_str()?.to_owned())
}

/// Waits until the pods of a node have said some more.
fn carries_on(lab: &Lab, node: &str) {
    let count = || lab.sh(node, "cat /sys/class/net/weft0/statistics/rx_packets").trim().parse::<u64>();
    let before = count().expect("the kernel counts");
    wait_until("pods say more", PATIENCE, || count().expect("the kernel counts") >= before + 20);
}

#[test]
fn no_byte_of_a_pod_crosses_in_clear_whatever_happens_to_the_daemons() {
    let lab = Lab::up(LabOptions::new("enc").nodes(3).started(2).backend(Backend::Wireguard));
    let pods = Capture::start(&lab, "n1", "weft0");
    let underlay = ["n1", "n2"].map(|node| Capture::start(&lab, node, "eth0"));
    let talks = [talk(&lab, "n1/a", ("n2", "a")), talk(&lab, "n2/b", ("n1", "b"))];
    lab.start("n3");
    wait_until("the third node has its routes", PATIENCE, || lab.routes_are_right(&["n1", "n2", "n3"]));
    for node in ["n1", "n2"] {
        lab.kill(node);
        carries_on(&lab, node);
        lab.start(node);
        wait_until("pods reach each other again", PATIENCE, || lab.ping("n1/a", lab.ip("n2", "a")));
    }
    lab.stop("n1");
    lab.start("n1");
    lab.sh("n2", "ip link delete weft-wg");
    wait_until("the device is back", PATIENCE, || lab.ping("n1/a", lab.ip("n2", "a")));
    lab.sh("n1", "ip route flush proto 117");
    wait_until("the routes are back", PATIENCE, || lab.ping("n1/a", lab.ip("n2", "a")));
    lab.meet();
    talks.into_iter().flatten().for_each(|ping| drop(ping.interrupt()));
    let seen = pods.finish(100, CLEAR, SECRET);
    assert!(seen.matching > 100 && seen.secret, "before the tunnel there is something to see: {seen:?}");
    for capture in underlay {
        let found = capture.finish(300, CLEAR, SECRET);
        assert!(found.matching == 0 && !found.secret, "pods in clear on the underlay: {found:?}");
    }
}

#[test]
fn keys_rotate_under_traffic_and_nothing_is_lost_or_clear() {
    let options = LabOptions::new("encrot").nodes(3).pods(1).backend(Backend::Wireguard);
    let lab = Lab::up(options.config(USER_SPACE));
    let underlay = Capture::start(&lab, "n1", "eth0");
    let pings = [("n1/a", "n2"), ("n2/a", "n1"), ("n3/a", "n1")]
        .map(|(from, to)| lab.background_ping(from, lab.ip(to, "a")));
    for (node, observer) in [("n1", "n2"), ("n2", "n1"), ("n1", "n3")] {
        let before = key_of(&lab, observer, node);
        lab.run(node, &["weft", "rotate-key"]);
        wait_until("a peer has a session under another key", PATIENCE, || {
            let key = key_of(&lab, observer, node);
            key.is_some() && key != before
        });
        carries_on(&lab, node);
    }
    for (sent, lost) in pings.map(weft_tests::lab::Ping::stop) {
        assert!(sent > 20 && lost.is_empty(), "{lost:?} of {sent} lost");
    }
    let found = underlay.finish(100, CLEAR, SECRET);
    assert!(found.matching == 0, "{found:?}");
}

#[test]
fn keys_rotate_on_schedule_and_nothing_is_lost() {
    let options = LabOptions::new("encsched").nodes(2).pods(1).backend(Backend::Wireguard);
    let lab = Lab::up(options.config("[encryption]\nimplementation = \"user-space\"\nrotate_after = \"2s\""));
    let ping = lab.background_ping("n1/a", lab.ip("n2", "a"));
    let mut keys = BTreeSet::new();
    wait_until("the key has changed twice", PATIENCE, || {
        keys.extend(key_of(&lab, "n2", "n1"));
        keys.len() >= 3
    });
    let (sent, lost) = ping.stop();
    assert!(sent > 100 && lost.is_empty(), "{lost:?} of {sent} lost");
}

#[test]
fn pods_hear_how_much_fits_through_a_narrow_tunnel() {
    let lab = Lab::up(LabOptions::new("encmtu").nodes(2).pods(1).backend(Backend::Wireguard));
    lab.sh("n2", "ip link set eth0 mtu 1400");
    // 60 bytes less for WireGuard over IPv4.
    let narrow = || lab.run("n1", &["ip", "route"]).contains("mtu 1340");
    wait_until("n1 knows what fits", PATIENCE, narrow);
    for ip in lab.ips("n2", "a") {
        let address = ip.to_string();
        let header = if ip.is_ipv4() { 28 } else { 48 };
        let send = |bytes: usize| {
            let size = (bytes - header).to_string();
            let words = ["ping", "-n", "-M", "do", "-c", "2", "-i", "0.2", "-W", "1", "-s", &size, &address];
            let output = lab.exec("n1/a", &words);
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
        };
        assert!(send(1340).contains(" 0% packet loss"), "what fits arrives: {}", send(1340));
        let told = send(1400);
        assert!(told.contains("1340"), "the pod is told what fits: {told}");
    }
}

#[test]
fn what_keeps_tunnels_from_coming_up_is_named_and_they_come_when_it_goes() {
    let lab =
        Lab::up(LabOptions::new("encbad").nodes(2).pods(1).backend(Backend::Wireguard).config(USER_SPACE));
    let failed = || lab.weft("n2", &["status"])["reconcile"]["failed"].to_string();
    let reach = || lab.ping("n1/a", lab.ip("n2", "a"));
    lab.stop("n2");
    lab.sh("n2", "mount --bind /dev/null /dev/net/tun");
    // The lab's own start waits until the daemon is ready, which this one is not.
    let start = || lab.background("n2", &["weftd", "--config", "/etc/weft/weft.toml"]);
    let answers = || lab.exec("n2", &["weft", "status"]).status.code() != Some(3);
    let daemon = start();
    wait_until("the device is named", PATIENCE, || answers() && failed().contains("/dev/net/tun"));
    assert!(!reach(), "nothing goes in clear instead");
    lab.sh("n2", "umount /dev/net/tun");
    wait_until("the tunnels are there", PATIENCE, || reach() && failed() == "[]");

    drop(daemon.interrupt());
    let other = lab.background("n2", &["wireguard-go", "-f", "other0"]);
    let up = "wg set other0 listen-port 51820 && ip link set other0 up";
    wait_until("another WireGuard runs", PATIENCE, || lab.exec("n2", &["sh", "-c", up]).status.success());
    wait_until("the port is taken", PATIENCE, || lab.run("n2", &["ss", "-Hlun"]).contains(":51820"));
    let daemon = start();
    wait_until("the port is named", PATIENCE, || answers() && failed().contains("UDP port 51820"));
    drop(other.interrupt());
    wait_until("the tunnels are there again", PATIENCE, || reach() && failed() == "[]");

    drop(daemon.interrupt());
    for (spoil, named) in [
        ("chmod 644 /var/lib/weft/tunnel.key", "tunnel.key"),
        (
            "chmod 600 /var/lib/weft/tunnel.key; echo nonsense >/var/lib/weft/tunnel.key",
            "44 characters of base64",
        ),
    ] {
        lab.sh("n2", spoil);
        let output = lab.exec("n2", &["timeout", "20", "weftd", "--config", "/etc/weft/weft.toml"]);
        let said =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(output.status.code() == Some(1) && said.contains(named), "{:?}: {said}", output.status);
    }
}

#[test]
fn a_clear_route_that_someone_left_is_of_no_use() {
    let lab = Lab::up(
        LabOptions::new("encleft").nodes(2).pods(1).overlay(Families::V4).backend(Backend::Wireguard),
    );
    let underlay = Capture::start(&lab, "n1", "eth0");
    lab.meet();
    let subnet = lab.subnets("n2").into_iter().next().expect("n2 has a subnet");
    lab.sh("n1", &format!("ip route add {subnet} via 192.0.2.2 dev eth0"));
    assert!(!lab.ping("n1/a", lab.ip("n2", "a")), "it does not fall back to the clear route");
    assert!(kept_back(&lab, "n1") > 0, "what was kept back is counted");
    lab.sh("n1", &format!("ip route delete {subnet} via 192.0.2.2 dev eth0"));
    assert!(lab.ping("n1/a", lab.ip("n2", "a")));
    let found = underlay.finish(1, CLEAR, SECRET);
    assert!(found.matching == 0, "{found:?}");
    // A peer that sends in clear is not heard either; its daemon would mend what makes it so.
    lab.kill("n2");
    lab.sh(
        "n2",
        &format!(
            "ip route add {} via 192.0.2.1 dev eth0; nft flush table inet weft",
            lab.subnets("n1").first().expect("n1 has a subnet")
        ),
    );
    let before = kept_back(&lab, "n1");
    lab.sh("n2", &format!("ping -n -c 5 -i 0.2 -W 1 -I $(ip -4 -o address show weft0 | awk '{{print $4}}' | cut -d/ -f1) {} || true", lab.ip("n1", "a")));
    assert!(kept_back(&lab, "n1") > before, "clear packets of a peer that must encrypt are counted");
}

/// The ids of a node's cluster keys, the sealing one first.
fn ring(lab: &Lab, node: &str) -> Vec<String> {
    let list = lab.weft(node, &["cluster-key", "list"])["ids"].as_array().cloned().unwrap_or_default();
    list.iter().filter_map(|id| Some(id.as_str()?.to_owned())).collect()
}

/// Whether all tunnels of all nodes use a secret from this cluster key, by sessions made since.
fn all_follow(lab: &Lab, nodes: &[&str], id: &str, since: Instant) -> bool {
    nodes.iter().all(|node| {
        let routes = lab.weft(node, &["routes"])["routes"].as_array().cloned().unwrap_or_default();
        let peers = lab.weft(node, &["peers"])["peers"].as_array().cloned().unwrap_or_default();
        let age = u64::try_from(since.elapsed().as_millis()).expect("a test is short");
        let young = |peer: &Value| peer["tunnel"]["handshake_ms"].as_u64().is_some_and(|ms| ms < age);
        !routes.is_empty()
            && routes.iter().all(|route| route["reason"].as_str().is_some_and(|reason| reason.contains(id)))
            && peers.iter().all(young)
    })
}

#[test]
fn the_cluster_key_rotates_and_the_tunnels_follow_and_nothing_is_lost() {
    let nodes = ["n1", "n2", "n3"];
    let lab = Lab::up(LabOptions::new("encring").nodes(3).pods(1).backend(Backend::Wireguard));
    lab.ping_all();
    let pings = [("n1/a", "n2"), ("n2/a", "n3"), ("n3/a", "n1")].map(|(from, to)| {
        let address = lab.ip(to, "a").to_string();
        (from, lab.background(from, &["ping", "-n", "-D", "-i", "0.05", &address]))
    });
    let old = ring(&lab, "n1").remove(0);
    assert!(all_follow(&lab, &nodes, &old, Instant::now() - Duration::from_secs(60)));
    for _ in 0..2 {
        let old = ring(&lab, "n1").remove(0);
        let secret = lab.run("n1", &["weft", "cluster-key", "generate"]).trim().to_owned();
        for node in nodes {
            lab.run(node, &["weft", "cluster-key", "add", &secret]);
        }
        let new = ring(&lab, "n1").pop().expect("the new key is listed");
        let since = Instant::now();
        for node in nodes {
            lab.run(node, &["weft", "cluster-key", "use", &new]);
            carries_on(&lab, node);
        }
        wait_until("the tunnels use the new key", PATIENCE, || all_follow(&lab, &nodes, &new, since));
        for node in nodes {
            lab.run(node, &["weft", "cluster-key", "remove", &old]);
            carries_on(&lab, node);
        }
        assert!(all_follow(&lab, &nodes, &new, since));
    }
    for (from, ping) in pings {
        let said = ping.interrupt();
        let number = |line: &str| line.split_once("icmp_seq=")?.1.split(' ').next()?.parse::<u64>().ok();
        let answered: BTreeSet<u64> = said.lines().filter_map(number).collect();
        let last = answered.last().copied().unwrap_or_default();
        let lost: Vec<u64> = (1..=last).filter(|number| !answered.contains(number)).collect();
        assert!(answered.len() > 60 && lost.is_empty(), "{from}: {lost:?} of {last} lost");
        let sent = said.lines().find_map(|line| line.split_once(" packets transmitted")?.0.parse().ok());
        // What is under way at the end gets no answer: on a busy machine that is half a second's.
        assert!(sent.is_some_and(|sent: u64| sent <= last + 10), "{from}: {last} of {sent:?} came");
    }
}

#[test]
fn who_does_not_share_the_cluster_key_gets_no_session() {
    let options =
        LabOptions::new("encpsk").nodes(3).pods(1).overlay(Families::V4).backend(Backend::Wireguard);
    let lab = Lab::up(options.started(2).node_config("n3", "[encryption]\npreshared = false"));
    let ping = lab.background_ping("n1/a", lab.ip("n2", "a"));
    lab.start("n3");
    // Who uses no secret has no tunnel with who does: both say so, and those that agree go on.
    for (node, other) in [("n1", "n3"), ("n3", "n1")] {
        wait_until("the odd one is named", PATIENCE, || {
            let said = lab.weft(node, &["routes"])["routes"].to_string();
            said.contains("encryption.preshared") && said.contains(other)
        });
        let doctor = lab.exec(node, &["weft", "doctor"]);
        let said = String::from_utf8_lossy(&doctor.stdout).into_owned();
        assert!(doctor.status.code() == Some(1) && said.contains("encryption.preshared"), "{said}");
    }
    assert!(!lab.ping("n1/a", lab.ip("n3", "a")) && !lab.ping("n3/a", lab.ip("n1", "a")));
    let (sent, lost) = ping.stop();
    assert!(sent > 10 && lost.is_empty(), "{lost:?} of {sent} lost");

    // A stolen tunnel key alone opens nothing: another WireGuard speaks with all that n2 has but the cluster key.
    let key = lab.weft("n1", &["status"])["tunnels"]["key"].as_str().expect("n1 has a key").to_owned();
    lab.kill("n2");
    let _thief = lab.background("n2", &["wireguard-go", "-f", "thief0"]);
    let set_up = format!(
        "wg set thief0 private-key /var/lib/weft/tunnel.key listen-port 51820 \
         peer {key} endpoint 192.0.2.1:51820 allowed-ips 10.32.0.0/12 && ip link set thief0 up"
    );
    wait_until("the thief is set up", PATIENCE, || lab.exec("n2", &["sh", "-c", &set_up]).status.success());
    let subnet = lab.subnets("n1").into_iter().next().expect("n1 has a subnet");
    // No rule of n2 keeps it from sending.
    lab.sh("n2", &format!("ip route replace {subnet} dev thief0 metric 1; nft flush table inet weft"));
    let underlay = Capture::start(&lab, "n2", "eth0");
    let source = lab.sh("n2", "ip -4 -o address show weft0 | awk '{print $4}' | cut -d/ -f1");
    let address = lab.ip("n1", "a").to_string();
    let words = ["ping", "-n", "-c", "30", "-i", "0.2", "-W", "1", "-I", source.trim(), &address];
    let said = String::from_utf8_lossy(&lab.exec("n2", &words).stdout).into_owned();
    assert!(said.contains(" 0 received"), "{said}");
    // A request has 148 bytes and its answer 92: n1 knows the key, and what it says opens nothing.
    let asked_and_answered =
        underlay.finish(2, "src 192.0.2.1 and udp src port 51820 and udp[4:2] == 100", SECRET);
    assert!(
        asked_and_answered.matching > 0,
        "n1 did not answer, so this shows nothing: {asked_and_answered:?}"
    );
    let handshakes = lab.sh("n2", "wg show thief0 latest-handshakes");
    assert!(handshakes.trim().ends_with("\t0"), "it has a session: {handshakes}");
}

#[test]
fn a_node_that_was_cut_off_and_missed_rotations_comes_back_by_itself() {
    let lab = Lab::up(LabOptions::new("enccut").nodes(3).pods(1).backend(Backend::Wireguard));
    lab.ping_all();
    let others = lab.background_ping("n1/a", lab.ip("n3", "a"));
    // One rotation, then more than a record has room to vouch for; on the one that is cut off, and on the others.
    for times in [1, 5] {
        lab.cut("n1", "n2");
        lab.cut("n3", "n2");
        assert!(!lab.ping("n1/a", lab.ip("n2", "a")));
        let keys = || ["n1", "n2"].map(|node| lab.weft(node, &["status"])["tunnels"]["key"].to_string());
        let before = keys();
        for _ in 0..times {
            for node in ["n1", "n2"] {
                lab.run(node, &["weft", "rotate-key"]);
            }
        }
        // Not all at once: a key that was changed just now is changed again a few seconds later.
        wait_until("both have other keys", PATIENCE, || {
            let after = keys();
            before[0] != after[0] && before[1] != after[1]
        });
        assert!(!lab.ping("n2/a", lab.ip("n1", "a")));
        lab.heal("n1", "n2");
        lab.heal("n3", "n2");
        for (from, to) in [("n1/a", "n2"), ("n2/a", "n1"), ("n3/a", "n2")] {
            wait_until("pods reach each other again", PATIENCE, || lab.ping(from, lab.ip(to, "a")));
        }
        wait_until("they know each other's key of today", PATIENCE, || {
            let known = |observer, node| key_of(&lab, observer, node).map(|key| format!("\"{key}\""));
            let [first, second] = keys();
            known("n1", "n2") == Some(second) && known("n2", "n1") == Some(first)
        });
        lab.ping_all();
    }
    let (sent, lost) = others.stop();
    assert!(sent > 20 && lost.is_empty(), "{lost:?} of {sent} lost");
}

#[test]
fn the_implementation_that_is_asked_for_is_used_or_its_lack_is_named() {
    let lab = Lab::up(LabOptions::new("encimpl").nodes(2).pods(1).backend(Backend::Wireguard));
    // The kernel's own word on what it can.
    let try_it = "ip link add try0 type wireguard && ip link delete try0";
    let has_wireguard = lab.exec("n1", &["sh", "-c", try_it]).status.success();
    let status = || lab.weft("n1", &["status"]);
    let chosen = if has_wireguard { "kernel" } else { "user-space" };
    assert_eq!(status()["tunnels"]["implementation"], chosen, "auto");
    lab.meet();
    lab.stop("n1");
    lab.sh("n1", "printf 'implementation = \"kernel\"\\n' >/tmp/encimpl && sed -i '/^policy = /r /tmp/encimpl' /etc/weft/weft.toml; rm /tmp/encimpl");
    let daemon = lab.background("n1", &["weftd", "--config", "/etc/weft/weft.toml"]);
    let answers = || lab.exec("n1", &["weft", "status"]).status.code() != Some(3);
    wait_until("the daemon answers", PATIENCE, answers);
    if has_wireguard {
        wait_until("pods reach each other", PATIENCE, || lab.ping("n1/a", lab.ip("n2", "a")));
        assert_eq!(status()["tunnels"]["implementation"], "kernel");
    } else {
        let failed = || status()["reconcile"]["failed"].to_string();
        wait_until("its lack is named", PATIENCE, || failed().contains("this kernel has no WireGuard"));
        assert!(!lab.ping("n1/a", lab.ip("n2", "a")), "nothing goes in clear instead");
        assert!(failed().contains("encryption.implementation"), "{}", failed());
    }
    drop(daemon.interrupt());
}
