//! Names, through a CoreDNS of the cluster.

use std::net::IpAddr;

use serde_json::json;

use crate::scene::{PATIENCE, Scene, service};

const COREDNS: &str = include_str!("../coredns.yaml");

/// Gives the cluster its names, if it does not have them yet.
pub fn start_coredns(scene: &Scene<'_>) {
    scene.cluster.apply(COREDNS);
    let bound = format!("--timeout={}s", PATIENCE.as_secs());
    scene.cluster.kubectl(&["-n", "kube-system", "rollout", "status", "deployment/coredns", &bound]);
}

pub fn names_resolve_through_coredns(scene: &Scene<'_>) {
    start_coredns(scene);
    let pods = scene.servers("web", 4);
    scene.apply(&[service("web", "web", json!({})), service("each", "web", json!({ "clusterIP": "None" }))]);
    let asker = format!("pod/{}", pods[0].name);
    let ask = |words: &str| -> Vec<IpAddr> {
        let words: Vec<&str> = words.split(' ').collect();
        let mut all = vec!["exec", asker.as_str(), "--", "dig", "+search", "+short", "+time=2"];
        all.extend(words);
        let mut found: Vec<IpAddr> =
            scene.kubectl(&all).lines().filter_map(|line| line.parse().ok()).collect();
        found.sort();
        found
    };
    let of_service = scene.cluster_ips("web");
    let mut of_pods: Vec<IpAddr> = pods.iter().flat_map(|pod| pod.ips.clone()).collect();
    of_pods.sort();
    for transport in ["+notcp", "+tcp"] {
        for (name, expected) in [("web", &of_service), ("each", &of_pods)] {
            for (family, v4) in [("A", true), ("AAAA", false)] {
                let expected: Vec<IpAddr> =
                    expected.iter().copied().filter(|ip| ip.is_ipv4() == v4).collect();
                let question = format!("{transport} {name} {family}");
                // What a headless Service resolves to follows its endpoints.
                scene.until(&format!("{question} is {expected:?}"), || ask(&question) == expected);
            }
        }
    }
    // As an application does it: libc, the search list, and the Service.
    let said = scene.kubectl(&["exec", &asker, "--", "curl", "-sS", "-m", "10", "http://web/hostname"]);
    assert!(pods.iter().any(|pod| pod.name == said), "{said} is none of {pods:?}");
}
