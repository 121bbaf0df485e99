//! Two sites, each with its own store and ranges and with a key: what they let each other announce, and what they do not.

use std::time::Duration;

use serde_json::Value;
use weft_tests::lab::{Capture, Lab, LabOptions, Ping, wait_until};
use weft_wire::site::SiteKey;

const PATIENCE: Duration = Duration::from_secs(60);
/// Each with its range of pods; node n1 speaks for the first, n3 for the second.
const BERLIN: (&str, &str, [&str; 2]) = ("berlin", "10.32.0.0/12", ["n1", "n2"]);
const OSLO: (&str, &str, [&str; 2]) = ("oslo", "10.64.0.0/12", ["n3", "n4"]);

fn key(site: &str) -> SiteKey {
    let mut secret = [7; 32];
    secret[..site.len()].copy_from_slice(site.as_bytes());
    SiteKey::from_secret(secret)
}

fn config((site, range, _): (&str, &str, [&str; 2])) -> String {
    format!(
        "[node]\nsite = \"{site}\"\n[site]\nkey = \"{key}\"\n\
         [cluster]\ncidrs = [{{ cidr = \"{range}\", node_prefix = 24 }}]\n\
         [store]\npath = \"/run/weft-lab/shared/{site}.db\"\n\
         [encryption]\npolicy = \"cross-site\"\n",
        key = key(site).public(),
    )
}

fn two_sites(name: &str) -> Lab {
    let options = [BERLIN, OSLO].into_iter().fold(LabOptions::new(name).nodes(4).pods(1), |options, site| {
        site.2.into_iter().fold(options, |options, node| options.node_config(node, &config(site)))
    });
    let lab = Lab::up(options);
    for (site, _, nodes) in [BERLIN, OSLO] {
        let secret = key(site).to_secret_text();
        let write = "umask 077; cat > /etc/weft/site.key; \
                     sed -i 's|^\\[site\\]$|[site]\\nkey_file = \"/etc/weft/site.key\"|' /etc/weft/weft.toml";
        assert!(lab.feed(nodes[0], &["sh", "-c", write], &secret).status.success());
        lab.stop(nodes[0]);
        lab.start(nodes[0]);
    }
    lab
}

fn admit(lab: &Lab, at: (&str, &str, [&str; 2]), other: (&str, &str, [&str; 2])) {
    let key = key(other.0).public().to_string();
    lab.run(at.2[0], &["weft", "site", "admit", other.0, &key, other.1]);
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
    let (berlin, oslo) = (BERLIN.2, OSLO.2);
    wait_until("each site is whole", PATIENCE, || {
        all_reach(&lab, berlin, berlin) && all_reach(&lab, oslo, oslo)
    });
    assert!(has_no_way(&lab, berlin, oslo) && has_no_way(&lab, oslo, berlin));

    // One word alone is not enough for an answer to come back.
    admit(&lab, BERLIN, OSLO);
    wait_until("one site has routes", PATIENCE, || device(&lab, "n2", "n4") == "weft-wg");
    assert!(has_no_way(&lab, oslo, berlin));
    admit(&lab, OSLO, BERLIN);
    wait_until("the sites reach each other", PATIENCE, || {
        all_reach(&lab, berlin, oslo) && all_reach(&lab, oslo, berlin)
    });
    assert_eq!(device(&lab, "n1", "n2"), "weft-vx4", "inside a site nothing is encrypted");

    // Pods of the other site see the pod's own address.
    let capture = Capture::start(&lab, "n4/a", "eth0");
    assert!(reaches(&lab, "n1", "n4"));
    let filter = format!("icmp and src host {}", lab.ip("n1", "a"));
    assert!(capture.finish(2, &filter, "no such text").matching > 0);

    // A daemon that is killed, and one that comes back while the speaker is away, change nothing for pods.
    let pings: Vec<Ping> = [("n2", "n3"), ("n4", "n1")]
        .map(|(from, to)| lab.background_ping(format!("{from}/a").as_str(), lab.ip(to, "a")))
        .into();
    lab.stop("n1");
    let routes = || lab.sh("n2", "ip route show proto 117 | sort");
    let before = routes();
    assert!(before.contains("10.64."), "{before}");
    lab.weft("n2", &["status"]);
    lab.start("n1");
    wait_until("the speaker is back", PATIENCE, || site(&lab, "n1", "oslo")["standing"] == "member");
    assert_eq!(routes(), before);
    drop(pings);

    // What cannot be is said at once.
    let third = key("third").public().to_string();
    let overlap = refusal(&lab, "n1", &["weft", "site", "admit", "third", &third, "10.70.0.0/16"]);
    assert!(overlap.contains("10.70.0.0/16 overlaps 10.64.0.0/12 of site oslo"), "{overlap}");
    let own = refusal(&lab, "n1", &["weft", "site", "admit", "third", &third, "10.32.0.0/16"]);
    assert!(own.contains("10.32.0.0/16 overlaps 10.32.0.0/12 of site berlin"), "{own}");
    let name = refusal(&lab, "n1", &["weft", "site", "admit", "oslo", &third, "10.96.0.0/16"]);
    assert!(name.contains("a site named oslo is in already"), "{name}");
    let silent = refusal(&lab, "n2", &["weft", "site", "expel", "oslo"]);
    assert!(silent.contains("does not have the key of its site"), "{silent}");

    // A stolen key of a node is void in both sites; the rest goes on.
    lab.run("n3", &["weft", "site", "void", "n4"]);
    wait_until("the node is out", PATIENCE, || has_no_way(&lab, berlin, ["n4", "n4"]));
    assert!(reaches(&lab, "n1", "n3") && reaches(&lab, "n3", "n2"));

    // Put out, nothing of the other site is believed.
    lab.run("n1", &["weft", "site", "expel", "oslo"]);
    wait_until("the site is out", PATIENCE, || has_no_way(&lab, berlin, oslo));
    assert_eq!(site(&lab, "n2", "oslo")["standing"], "expelled");
    assert!(all_reach(&lab, berlin, berlin) && !reaches(&lab, "n1", "n3"));
}

#[test]
fn a_site_key_that_does_not_fit_is_named_before_anything_starts() {
    let lab = Lab::up(LabOptions::new("sitekeys").nodes(1).pods(0));
    lab.stop("n1");
    let start = |key: &str, file: &str, mode: &str| {
        let other = self::key("other").public();
        let script = format!(
            "printf '%s' '{file}' > /tmp/site.key; chmod {mode} /tmp/site.key; \
             {{ cat /etc/weft/weft.toml; printf '[site]\\nkey = \"%s\"\\nkey_file = \"/tmp/site.key\"\\n' \
             {key}; }} > /tmp/weft.toml; timeout 20 weftd --config /tmp/weft.toml 2>&1; true",
            key = if key.is_empty() { other.to_string() } else { key.to_owned() },
        );
        lab.sh("n1", &script)
    };
    let secret = key("berlin").to_secret_text();
    let told = start("", &secret, "600");
    assert!(told.contains("site.key is not the public key of /tmp/site.key"), "{told}");
    let told = start("", "nonsense", "600");
    assert!(told.contains("/tmp/site.key: a site key file has 64 hexadecimal digits"), "{told}");
    let told = start("", &secret, "644");
    assert!(told.contains("chmod 600 /tmp/site.key"), "{told}");
    let told = start("short", &secret, "600");
    assert!(told.contains("a key is 64 hexadecimal digits"), "{told}");
}
