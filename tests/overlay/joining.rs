//! Sites with stores and cluster keys of their own, joined, left and expelled by the commands of docs/multi-site.md.

mod commands;

use std::path::Path;
use std::time::Duration;

use commands::*;
use serde_json::Value;
use weft_tests::kubernetes::{Api, no_api};
use weft_tests::lab::{Families, Lab, LabOptions, Request, Store, skip, wait_until};

/// A command of the document, where it is run, and what it prints there.
#[derive(Debug)]
struct Step {
    node: String,
    command: String,
    output: Vec<String>,
}

fn steps() -> Vec<Step> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/multi-site.md");
    let text = std::fs::read_to_string(page).expect("the page is there");
    let mut steps: Vec<Step> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        if line.starts_with("```") {
            inside = line == "```console";
        } else if inside {
            match line.split_once("# ").filter(|(node, _)| node.starts_with('n') && node.len() == 2) {
                Some((node, command)) => {
                    steps.push(Step { node: node.into(), command: command.into(), output: Vec::new() });
                }
                None => steps.last_mut().expect("output follows a command").output.push(line.into()),
            }
        }
    }
    steps
}

/// The words of a line; what differs from run to run is `#`, also where it is not known yet, and has no unit.
fn shape(line: &str) -> Vec<String> {
    let differs = |word: &str| {
        let core = word.trim_end_matches([',', ':']);
        let number = core == "-" || core.parse::<f64>().is_ok() && (core.contains('.') || core.len() > 3);
        let key = core.len() >= 8 && core.bytes().all(|byte| byte.is_ascii_hexdigit());
        number || key || core.starts_with("weft1.")
    };
    let words = line.split_whitespace().filter(|word| !["ms", "%"].contains(word));
    words.map(|word| if differs(word) { "#".into() } else { word.to_owned() }).collect()
}

fn shapes<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<Vec<String>> {
    lines.map(shape).filter(|words| !words.is_empty()).collect()
}

fn has_way(lab: &Lab, node: &str, to: &str) -> bool {
    let output = lab.exec(node, &["ip", "-j", "route", "get", &lab.ip(to, "a").to_string()]);
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    answer[0]["dev"].as_str().is_some_and(|device| device.starts_with("weft"))
}

/// Whether two nodes have no cluster key in common.
fn strangers(lab: &Lab, one: &str, other: &str) -> bool {
    let theirs = ids(lab, other);
    ids(lab, one).iter().all(|id| !theirs.contains(id))
}

#[test]
fn the_commands_of_the_document_join_leave_and_expel_a_site_and_print_what_it_says() {
    let lab = Lab::up(LabOptions::new("joining").nodes(4).sites(2).apart().pods(1).overlay(Families::V4));
    assert!(strangers(&lab, "n1", "n3") && !has_way(&lab, "n1", "n3"));
    let inside = [("n1", "n2"), ("n3", "n4")]
        .map(|(from, to)| lab.background_ping(format!("{from}/a").as_str(), lab.ip(to, "a")));
    let mut token = String::new();
    for Step { node, command, output } in steps() {
        let command = command.replace("TOKEN", &token);
        let expected = shapes(output.iter().map(String::as_str));
        let fits = |text: &str| output == ["..."] || shapes(text.lines()) == expected;
        // What changes something is done once; what only looks may have to wait for what was done.
        let mut last = said(&lab, &node, &command);
        let looks = ["weft sites", "weft ping", "weft doctor"].iter().any(|look| command.starts_with(look));
        if looks && !fits(&last) {
            let began = std::time::Instant::now();
            while !fits(&last) && began.elapsed() < PATIENCE {
                last = said(&lab, &node, &command);
            }
        }
        assert!(fits(&last), "{node}# {command}\nprints\n{last}\nand the page says\n{}", output.join("\n"));
        if last.starts_with("weft1.") {
            token = last.trim().to_owned();
        }
        let (first, second) = (["n1", "n2"], ["n3", "n4"]);
        if command.starts_with("weft join weft1.") && !last.starts_with("weft: ") {
            wait_until("the sites reach each other", PATIENCE, || {
                all_reach(&lab, &first, &second) && all_reach(&lab, &second, &first)
            });
            wait_until("they have one ring", PATIENCE, || ids(&lab, "n2")[0] == ids(&lab, "n4")[0]);
        }
        if command == "weft site leave" || command.starts_with("weft site expel") {
            let apart = || first.iter().all(|from| second.iter().all(|to| !has_way(&lab, from, to)));
            let took = wait_until("the others have no route to it", Duration::from_secs(20), apart);
            println!("{command}: out after {took:?}");
        }
    }
    wait_until("the expelled site does not have the key that seals", PATIENCE, || {
        second_has_not(&lab, &ids(&lab, "n1")[0]) && second_has_not(&lab, &ids(&lab, "n2")[0])
    });
    assert!(all_reach(&lab, &["n1", "n2"], &["n1", "n2"]) && all_reach(&lab, &["n3", "n4"], &["n3", "n4"]));
    for ping in inside {
        let (sent, lost) = ping.stop();
        assert!(lost.is_empty(), "inside of a site no answer to {lost:?} of {sent}");
    }
}

fn second_has_not(lab: &Lab, key: &str) -> bool {
    ["n3", "n4"].iter().all(|node| !ids(lab, node).iter().any(|id| id == key))
}

/// Site s1 keeps its leases in SQLite, s2 in etcd, s3 in a Kubernetes, whose API is on the machine n9.
fn three_stores() -> Option<(Lab, Api)> {
    if let Some(why) = no_api() {
        skip(&why);
        return None;
    }
    let options = LabOptions::new("stores").nodes(9).sites(3).apart().started(0).pods(0);
    let mut options = options.store(Store::Etcd).overlay(Families::V4);
    for node in 1..=3 {
        let own = "[store]\ntype = \"sqlite\"\npath = \"/run/weft-lab/shared/store.db\"";
        options = options.node_config(&format!("n{node}"), own);
    }
    for node in 7..=8 {
        let own = format!(
            "[gossip]\nseeds = []\n[cluster]\nkey_file = \"/var/lib/weft/cluster.key\"\n[store]\ntype = \"kubernetes\"\n\
             mode = \"weft-ipam\"\nkubeconfig = \"/run/weft-lab/shared/pki/weft-n{node}.kubeconfig\"\n"
        );
        options = options.node_config(&format!("n{node}"), &own);
    }
    let lab = Lab::up(options);
    let api = Api::start(&lab, "n9", &["n7", "n8"]);
    let nodes = (1..=8).map(|node| format!("n{node}"));
    nodes.clone().for_each(|node| lab.start(&node));
    for node in nodes {
        wait_until("the node has its subnet", PATIENCE, || lab.weft(&node, &["status"])["ready"] == true);
        lab.tell(Request::PodAdd { node, pod: "a".into() });
    }
    Some((lab, api))
}

#[test]
fn sites_with_sqlite_etcd_and_a_kubernetes_become_one_pod_network() {
    let Some((lab, api)) = three_stores() else { return };
    let sites = [["n1", "n2"], ["n4", "n5"], ["n7", "n8"]];
    // Any site that is in may invite.
    join(&lab, "n1", "n4");
    wait_until("two sites are one", PATIENCE, || all_reach(&lab, &sites[0], &sites[1]));
    join(&lab, "n4", "n7");
    wait_until("three sites are one", PATIENCE, || {
        sites.iter().all(|from| sites.iter().all(|to| all_reach(&lab, from, to)))
    });
    // Each store has the leases of its own site and of no other.
    for (speaker, own) in [("n1", "s1"), ("n4", "s2"), ("n7", "s3")] {
        let leases = lab.weft(speaker, &["leases"])["leases"].as_array().cloned().unwrap_or_default();
        assert!(leases.len() >= 2 && leases.iter().all(|lease| lease["site"] == own), "{leases:?}");
    }
    let subnets = api.get(&lab, &["podsubnets"])["items"].as_array().cloned().unwrap_or_default();
    assert_eq!(subnets.len(), 2, "{subnets:?}");
    // The Secret is what a new node of the cluster begins with: the doctor says that it is behind, until it is not.
    let words = "Secret weft-cluster-key has other keys than the mesh of sites";
    wait_until("the keys are the mesh's", PATIENCE, || ids(&lab, "n7")[0] == ids(&lab, "n1")[0]);
    wait_until("the Secret is named", PATIENCE, || said(&lab, "n8", "weft status").contains(words));
    let text = lab.sh("n7", "cat /var/lib/weft/cluster.key");
    let patch = serde_json::json!({ "stringData": { "cluster.key": text } }).to_string();
    api.kubectl(&lab, &["patch", "secret", "weft-cluster-key", "-n", "weft-system", "-p", &patch]);
    wait_until("it is well", PATIENCE, || !said(&lab, "n8", "weft status").contains(words));
    // One of them is put out: the two others go on.
    let site = said(&lab, "n4", "weft site expel s3");
    assert!(site.starts_with("site s3 is expelled"), "{site}");
    wait_until("it is out", PATIENCE, || !has_way(&lab, "n1", "n7") && !has_way(&lab, "n5", "n8"));
    assert!(all_reach(&lab, &sites[0], &sites[1]) && all_reach(&lab, &sites[2], &sites[2]));
    wait_until("it has no key of theirs", PATIENCE, || {
        let key = &ids(&lab, "n1")[0];
        *key == ids(&lab, "n5")[0] && !ids(&lab, "n7").contains(key) && !ids(&lab, "n8").contains(key)
    });
}
