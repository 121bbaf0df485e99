//! A site that loses the others, its store, or both keeps its pods talking, and nobody has to mend anything after it.

use std::time::Duration;

use weft_tests::lab::{Families, Lab, LabOptions, wait_until};

const PATIENCE: Duration = Duration::from_secs(90);
/// Nodes n1 and n2 are site s1, n3 and n4 are s2.
const ACROSS: [(&str, &str); 4] = [("n1", "n3"), ("n1", "n4"), ("n2", "n3"), ("n2", "n4")];

/// A lab of two sites whose stores are in directories that can be taken away.
fn two_sites(name: &str) -> Lab {
    let options = LabOptions::new(name).nodes(4).started(0).sites(2).pods(1).overlay(Families::V4);
    let store = |place: &str| format!("[store]\npath = \"/run/weft-lab/shared/{place}/store.db\"");
    let options = [("n1", "one"), ("n2", "one"), ("n3", "two"), ("n4", "two")]
        .into_iter()
        .fold(options, |options, (node, place)| options.node_config(node, &store(place)));
    let lab = Lab::up(options);
    lab.sh(
        "n1",
        "cd /run/weft-lab/shared && mkdir real-one real-two && ln -s real-one one && ln -s real-two two",
    );
    ["n1", "n2", "n3", "n4"].into_iter().for_each(|node| lab.start(node));
    lab.befriend_sites();
    all_reach(&lab, "the sites are one network");
    lab
}

fn reaches(lab: &Lab, from: &str, to: &str) -> bool {
    lab.ping(format!("{from}/a").as_str(), lab.ip(to, "a"))
}

fn all_reach(lab: &Lab, what: &str) {
    wait_until(what, PATIENCE, || {
        ACROSS
            .into_iter()
            .chain([("n1", "n2"), ("n3", "n4")])
            .all(|(a, b)| reaches(lab, a, b) && reaches(lab, b, a))
    });
}

fn state(lab: &Lab, node: &str, of: &str) -> String {
    let peers = lab.weft(node, &["peers"])["peers"].as_array().cloned().unwrap_or_default();
    let peer = peers.into_iter().find(|peer| peer["node"] == of).unwrap_or_default();
    peer["state"].as_str().unwrap_or_default().to_owned()
}

fn routes(lab: &Lab, node: &str) -> String {
    lab.sh(node, "ip route show proto 117 | sort")
}

fn point_store_at(lab: &Lab, to: &str) {
    lab.sh("n1", &format!("cd /run/weft-lab/shared && ln -s {to} new && mv -T new two"));
}

/// Has a node remember for good where its neighbours are: whether the underlay's own search for one is under way when the WAN comes
/// back decides whether the next packet waits for a second.
fn keep_neighbours(lab: &Lab, node: &str) {
    let known = lab.sh(node, "ip -4 neigh show dev eth0 nud reachable nud stale nud delay nud probe");
    let known: Vec<&str> = known.lines().collect();
    assert_eq!(known.len(), 3, "{node} has heard of every other: {known:?}");
    for line in known {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [address, "lladdr", mac, ..] = words[..] else {
            panic!("{node} knows where its neighbours are: {line}")
        };
        lab.run(node, &["ip", "neigh", "replace", address, "lladdr", mac, "dev", "eth0", "nud", "permanent"]);
    }
}

#[test]
fn a_site_without_the_others_and_without_its_store_goes_on_and_comes_back_by_itself() {
    let lab = two_sites("degraded");
    let before: Vec<String> = ["n1", "n3"].map(|node| routes(&lab, node)).into();

    // The WAN goes, and with it the store of one site.
    ["n1", "n2", "n3", "n4"].into_iter().for_each(|node| keep_neighbours(&lab, node));
    point_store_at(&lab, "gone");
    ACROSS.into_iter().for_each(|(a, b)| lab.cut(a, b));
    let inside = lab.background_ping("n3/a", lab.ip("n4", "a"));
    wait_until("each site takes the other's nodes for dead", PATIENCE, || {
        ACROSS.into_iter().all(|(a, b)| state(&lab, a, b) == "dead" && state(&lab, b, a) == "dead")
    });
    wait_until("the store is missed", PATIENCE, || lab.weft("n3", &["status"])["store"]["healthy"] == false);
    assert_eq!(routes(&lab, "n1"), before[0], "what may work once the WAN is back is not withdrawn");
    assert_eq!(routes(&lab, "n3"), before[1]);

    // New pods get addresses of the held lease, and a daemon that starts comes up from what it remembers.
    lab.kill("n4");
    lab.start("n4");
    for node in ["n3", "n4"] {
        lab.tell(weft_tests::lab::Request::PodAdd { node: node.into(), pod: "late".into() });
    }
    let late = lab.ip("n4", "late");
    wait_until("the new pods reach each other", PATIENCE, || lab.ping("n3/late", late));
    assert_eq!(routes(&lab, "n4").lines().count(), 3, "the routes of before: {}", routes(&lab, "n4"));

    // All comes back, and nobody does anything. The data plane does not wait for it: sessions whose daemons live go on.
    ACROSS.into_iter().for_each(|(a, b)| lab.heal(a, b));
    let without_n4 = || ACROSS.into_iter().filter(|(_, b)| *b != "n4");
    assert!(without_n4().all(|(a, b)| reaches(&lab, a, b)), "the tunnels are as they were");
    point_store_at(&lab, "real-two");
    wait_until("all hear each other", PATIENCE, || {
        ACROSS.into_iter().all(|(a, b)| state(&lab, a, b) == "alive" && state(&lab, b, a) == "alive")
    });
    wait_until("the store is back", PATIENCE, || lab.weft("n3", &["status"])["store"]["healthy"] == true);
    wait_until("a new pod is reached from the other site", PATIENCE, || lab.ping("n1/a", late));
    all_reach(&lab, "all is as before");
    let (sent, lost) = inside.stop();
    assert!(sent > 0 && lost.is_empty(), "inside the site {} of {sent} pings were lost", lost.len());
}
