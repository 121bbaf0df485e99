//! Two sites share a secret that their tunnels are made from: both ends use it, and it changes under traffic without a lost packet.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::Value;
use weft_tests::lab::{Families, Lab, LabOptions, wait_until};

const PATIENCE: Duration = Duration::from_secs(90);
/// So many of the last pings may be on their way when they are ended: a tenth of a second on a busy machine.
const ON_THE_WAY: u64 = 10;
/// Nodes n1 and n2 are site s1, n3 and n4 are s2; n1 and n3 speak for them.
const FIRST: [&str; 2] = ["n1", "n2"];
const SECOND: [&str; 2] = ["n3", "n4"];

/// What a node says of the secret with the other site.
fn shared(lab: &Lab, node: &str) -> Value {
    lab.weft(node, &["status"])["pair_secrets"][0].clone()
}

/// The secret that a node has, where every living node of the other site has it too.
fn complete(lab: &Lab, node: &str) -> Option<String> {
    let shared = shared(lab, node);
    let id = shared["id"].as_str().filter(|id| !id.is_empty())?.to_owned();
    shared["without"].as_array().is_some_and(Vec::is_empty).then_some(id)
}

/// The one secret of all nodes, if there is one.
fn one_secret(lab: &Lab) -> Option<String> {
    let ids: BTreeSet<Option<String>> =
        FIRST.into_iter().chain(SECOND).map(|node| complete(lab, node)).collect();
    if ids.len() == 1 { ids.into_iter().next().flatten() } else { None }
}

/// What the routes of a node say of the tunnels to another.
fn reason(lab: &Lab, node: &str, to: &str) -> String {
    let routes = lab.weft(node, &["routes"])["routes"].as_array().cloned().unwrap_or_default();
    let of = routes.into_iter().find(|route| route["node"] == to).unwrap_or_default();
    of["reason"].as_str().unwrap_or_default().to_owned()
}

/// How long ago a node and another shook hands.
fn handshake(lab: &Lab, node: &str, with: &str) -> Option<Duration> {
    let peers = lab.weft(node, &["peers"])["peers"].as_array().cloned().unwrap_or_default();
    let peer = peers.into_iter().find(|peer| peer["node"] == with)?;
    peer["tunnel"]["handshake_ms"].as_u64().map(Duration::from_millis)
}

#[test]
fn the_tunnels_of_two_sites_use_a_secret_of_the_two_which_changes_under_traffic_without_a_loss() {
    let options = LabOptions::new("pairs").nodes(4).sites(2).pods(1).overlay(Families::V4);
    let lab =
        Lab::up(options.config("[encryption]\npolicy = \"cross-site\"\nimplementation = \"user-space\""));
    wait_until("all nodes have the secret", PATIENCE, || one_secret(&lab).is_some());
    let first = one_secret(&lab).expect("it was there");
    let uses = |secret: &str| {
        let words = format!(" and secret {secret} of the two sites");
        let pairs = FIRST.into_iter().flat_map(|one| SECOND.map(|other| (one, other)));
        let mut both = pairs.flat_map(|(one, other)| [(one, other), (other, one)]);
        both.all(|(node, to)| reason(&lab, node, to).ends_with(&words))
    };
    wait_until("every tunnel between the sites uses it", PATIENCE, || uses(&first));
    assert!(!reason(&lab, "n1", "n2").contains("of the two sites"), "{}", reason(&lab, "n1", "n2"));
    let told = lab.sh("n2", "weft routes; weft status; weft doctor || true");
    let memory = lab.sh("n2", "stat -c %a /var/lib/weft/memory.json; cat /var/lib/weft/memory.json");
    let (mode, memory) = memory.split_once('\n').expect("two lines");
    let memory: Value = serde_json::from_str(memory).expect("JSON");
    let secrets = memory["pair_secrets"].as_object().expect("it is remembered").values().next().cloned();
    let secret =
        secrets.as_ref().and_then(|secrets| secrets[0].as_str()?.split(' ').nth(1)).expect("a secret");
    assert_eq!((mode, secret.len()), ("600", 64));
    assert!(!told.contains(secret), "a secret is shown");

    let pings = [("n1/a", "n3"), ("n4/a", "n2"), ("n2/a", "n3")]
        .map(|(from, to)| lab.background_ping(from, lab.ip(to, "a")));
    wait_until("pods talk", PATIENCE, || handshake(&lab, "n1", "n3").is_some());
    let began = Instant::now();
    lab.run("n1", &["weft", "site", "rekey"]);
    wait_until("another secret is in use", PATIENCE, || {
        one_secret(&lab).is_some_and(|secret| secret != first && uses(&secret))
    });
    // Sessions are made anew under it: a handshake is whole only where both ends have the same.
    wait_until("there are sessions under it", PATIENCE, || {
        let fresh =
            |node: &str, with: &str| handshake(&lab, node, with).is_some_and(|age| age < began.elapsed());
        fresh("n1", "n3") && fresh("n4", "n2") && fresh("n2", "n3")
    });
    // And carry more than what was on its way.
    let received = |node: &str, with: &str| {
        let peers = lab.weft(node, &["peers"])["peers"].as_array().cloned().unwrap_or_default();
        let peer = peers.into_iter().find(|peer| peer["node"] == with).unwrap_or_default();
        peer["tunnel"]["received"].as_u64().unwrap_or(0)
    };
    let before = received("n2", "n3");
    wait_until("they carry packets", PATIENCE, || received("n2", "n3") > before + 10 * ON_THE_WAY);
    for (number, ping) in pings.into_iter().enumerate() {
        let (sent, lost) = ping.stop();
        let lost: Vec<u64> = lost.into_iter().filter(|sequence| sequence + ON_THE_WAY < sent).collect();
        assert!(sent > 50 && lost.is_empty(), "ping {number}: {lost:?} of {sent} lost");
    }
    // A daemon that starts again goes on with what it remembers.
    let second = one_secret(&lab).expect("it is in use");
    lab.kill("n4");
    lab.start("n4");
    wait_until("it is back with the same", PATIENCE, || complete(&lab, "n4").as_ref() == Some(&second));
    assert!(lab.ping("n4/a", lab.ip("n1", "a")));
}
