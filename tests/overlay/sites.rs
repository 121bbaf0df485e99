//! Two sites, each with its own store and ranges and with a key: what they let each other announce, and what they do not.

use std::time::Duration;

use serde_json::Value;
use weft_tests::lab::{Capture, Families, Lab, LabOptions, wait_until};
use weft_wire::site::SiteKey;

const PATIENCE: Duration = Duration::from_secs(60);
/// Nodes n1 and n2 are site s1, n3 and n4 are s2; n1 and n3 speak for them.
const FIRST: [&str; 2] = ["n1", "n2"];
const SECOND: [&str; 2] = ["n3", "n4"];

fn two_sites(name: &str) -> Lab {
    Lab::up(LabOptions::new(name).nodes(4).sites(2).pods(1).overlay(Families::V4))
}

fn reaches(lab: &Lab, from: &str, to: &str) -> bool {
    lab.ping(format!("{from}/a").as_str(), lab.ip(to, "a"))
}

fn all_reach(lab: &Lab, from: [&str; 2], to: [&str; 2]) -> bool {
    from.into_iter().all(|from| to.into_iter().all(|to| reaches(lab, from, to)))
}

/// The device by which a node sends to the pods of another; nothing where it has no route.
fn device(lab: &Lab, node: &str, to: &str) -> String {
    let output = lab.exec(node, &["ip", "-j", "route", "get", &lab.ip(to, "a").to_string()]);
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    answer[0]["dev"].as_str().unwrap_or_default().to_owned()
}

fn has_no_way(lab: &Lab, from: [&str; 2], to: [&str; 2]) -> bool {
    let none = |node: &str, to: &str| !device(lab, node, to).starts_with("weft");
    from.into_iter().all(|node| to.into_iter().all(|to| none(node, to)))
}

fn site(lab: &Lab, node: &str, of: &str) -> Value {
    let output = lab.exec(node, &["weft", "sites", "-o", "json"]);
    let sites: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let sites = sites["sites"].as_array().cloned().unwrap_or_default();
    sites.into_iter().find(|site| site["site"] == of).unwrap_or_default()
}

fn refusal(lab: &Lab, node: &str, words: &[&str]) -> String {
    let output = lab.exec(node, words);
    assert_eq!(output.status.code(), Some(1), "{words:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn sites_with_stores_of_their_own_join_keep_their_peers_and_part() {
    let lab = two_sites("sites");
    assert!(
        all_reach(&lab, FIRST, SECOND) && all_reach(&lab, SECOND, FIRST),
        "the first packets wait for a session"
    );
    assert_eq!((device(&lab, "n1", "n2"), device(&lab, "n1", "n4")), ("weft-vx4".into(), "weft-wg".into()));

    // One word alone is not enough for an answer to come back.
    for (speaker, other) in [("n1", "s2"), ("n3", "s1")] {
        lab.run(speaker, &["weft", "site", "expel", other]);
    }
    wait_until("the sites are apart", PATIENCE, || {
        has_no_way(&lab, FIRST, SECOND) && has_no_way(&lab, SECOND, FIRST)
    });
    assert_eq!(site(&lab, "n2", "s2")["standing"], "expelled");
    assert!(all_reach(&lab, FIRST, FIRST) && !reaches(&lab, "n1", "n3"));
    // Each has a cluster key of its own now, so they come together again by a token.
    let token = String::from_utf8(lab.exec("n1", &["weft", "site", "invite"]).stdout).expect("text");
    lab.run("n3", &["weft", "join", token.trim()]);
    wait_until("the sites reach each other", PATIENCE, || {
        all_reach(&lab, FIRST, SECOND) && all_reach(&lab, SECOND, FIRST)
    });

    // Pods of the other site see the pod's own address.
    let capture = Capture::start(&lab, "n4/a", "eth0");
    assert!(reaches(&lab, "n1", "n4"));
    let filter = format!("icmp and src host {}", lab.ip("n1", "a"));
    assert!(capture.finish(2, &filter, "no such text").matching > 0);

    // A daemon that starts while the other site and the speaker are away believes what it did.
    let routes = || lab.sh("n2", "ip route show proto 117 | sort");
    let before = routes();
    assert_eq!(before.lines().count(), 3, "{before}");
    ["n1", "n3", "n4"].into_iter().for_each(|node| lab.kill(node));
    lab.kill("n2");
    lab.sh("n2", "ip route flush proto 117");
    lab.start("n2");
    wait_until("what was believed is", PATIENCE, || routes() == before);
    ["n1", "n3", "n4"].into_iter().for_each(|node| lab.start(node));
    wait_until("all is as before", PATIENCE, || all_reach(&lab, FIRST, SECOND));
    assert_eq!(routes(), before);

    // What cannot be is said at once.
    let third = SiteKey::from_secret([3; 32]).public().to_string();
    let overlap = refusal(&lab, "n1", &["weft", "site", "admit", "third", &third, "10.50.0.0/16"]);
    assert!(overlap.contains("10.50.0.0/16 overlaps 10.48.0.0/12 of site s2"), "{overlap}");
    let own = refusal(&lab, "n1", &["weft", "site", "admit", "third", &third, "10.32.0.0/16"]);
    assert!(own.contains("10.32.0.0/16 overlaps 10.32.0.0/12 of site s1"), "{own}");
    let name = refusal(&lab, "n1", &["weft", "site", "admit", "s2", &third, "10.96.0.0/16"]);
    assert!(name.contains("a site named s2 is in already"), "{name}");
    let silent = refusal(&lab, "n2", &["weft", "site", "expel", "s2"]);
    assert!(silent.contains("does not have the key of its site"), "{silent}");

    // A stolen key of a node is void in both sites; the rest goes on.
    let known = || lab.weft("n3", &["peers"])["peers"].to_string().contains("\"n4\"");
    wait_until("n3 has heard of n4 again", PATIENCE, known);
    lab.run("n3", &["weft", "site", "void", "n4"]);
    wait_until("the node is out", PATIENCE, || has_no_way(&lab, FIRST, ["n4", "n4"]));
    assert!(reaches(&lab, "n1", "n3") && reaches(&lab, "n3", "n2"));
}

#[test]
fn a_site_key_that_does_not_fit_is_named_before_anything_starts() {
    let lab = Lab::up(LabOptions::new("sitekeys").nodes(1).pods(0));
    lab.stop("n1");
    let secret = SiteKey::from_secret([1; 32]).to_secret_text();
    let other = SiteKey::from_secret([2; 32]).public().to_string();
    let start = |key: &str, file: &str, mode: &str| {
        let script = format!(
            "printf '%s' '{file}' > /run/site.key; chmod {mode} /run/site.key; \
             {{ cat /etc/weft/weft.toml; printf '[site]\nkey = \"%s\"\nkey_file = \"/run/site.key\"\n' \
             {key}; }} > /run/weft.toml; timeout 20 weftd --config /run/weft.toml 2>&1; true",
        );
        lab.sh("n1", &script)
    };
    let told = start(&other, &secret, "600");
    assert!(told.contains("site.key is not the public key of /run/site.key"), "{told}");
    let told = start(&other, "nonsense", "600");
    assert!(told.contains("/run/site.key: a site key file has 64 hexadecimal digits"), "{told}");
    let told = start(&other, &secret, "644");
    assert!(told.contains("chmod 600 /run/site.key"), "{told}");
    let told = start("short", &secret, "600");
    assert!(told.contains("a key is 64 hexadecimal digits"), "{told}");
}
