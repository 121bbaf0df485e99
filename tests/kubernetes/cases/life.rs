//! What befalls a cluster: its API goes, a node goes and comes back.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::Value;

use crate::scene::{Client, PATIENCE, Pod, Scene};

/// A pod of each of two nodes.
fn pair(pods: &[Pod]) -> (&Pod, &Pod) {
    let one = &pods[0];
    let other = pods.iter().find(|pod| pod.node != one.node).expect("pods are spread over nodes");
    (one, other)
}

pub fn pods_talk_while_the_api_is_gone_for_a_minute(scene: &Scene<'_>) {
    let pods = scene.servers("web", 4);
    let (one, other) = pair(&pods);
    let pings: Vec<_> = [(one, other), (other, one)]
        .iter()
        .flat_map(|(from, to)| {
            to.ips.iter().map(|ip| scene.ping(&scene.inside(from), *ip)).collect::<Vec<_>>()
        })
        .collect();
    scene.cluster.stop(scene.cluster.plane(), "kube-apiserver");
    // A minute, told by pings that are sent every second.
    let minute = ["ping", "-n", "-q", "-i", "1", "-c", "60", &other.ips[0].to_string()];
    let said = scene.exec(&scene.inside(one), &minute);
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stdout));
    assert!(!scene.cluster.try_kubectl(&["get", "nodes"]).status.success(), "the API is gone");
    for pod in &pods {
        scene.ask(&scene.inside(one), pod.ips[0], 8080, "/hostname");
    }
    scene.cluster.start_api();
    let bound = format!("--timeout={}s", PATIENCE.as_secs());
    scene.cluster.kubectl(&["wait", "--for=condition=Ready", "node", "--all", &bound]);
    let later = scene.servers("later", 2);
    for pod in &later {
        scene.ask(&scene.inside(one), pod.ips[0], 8080, "/hostname");
    }
    for ping in pings {
        let (sent, lost) = ping.stop();
        assert!(lost.is_empty(), "no answer to {lost:?} of {sent}");
        assert!(sent > 5000, "{sent} pings in more than a minute");
    }
}

/// The network namespaces of pods on a node.
fn spaces(scene: &Scene<'_>, node: &str) -> BTreeSet<String> {
    scene.cluster.lab().sh(node, "ls /run/netns").split_whitespace().map(str::to_owned).collect()
}

pub fn a_pod_is_made_anew_while_the_api_is_gone(scene: &Scene<'_>) {
    let pods = scene.servers("web", 2);
    let (one, other) = pair(&pods);
    let client = scene.inside(one);
    let before = spaces(scene, &other.node);
    let Client::Pod { netns, .. } = scene.inside(other) else { unreachable!("a pod has a namespace") };
    scene.cluster.stop(scene.cluster.plane(), "kube-apiserver");
    // With the process that holds its namespaces goes the sandbox, and with that the address.
    let end = "kill -9 $(ip netns pids \"$(basename \"$0\")\")";
    scene.cluster.lab().run(other.node.as_str(), &["sh", "-c", end, &netns]);
    let mut now = Vec::new();
    scene.until("the pod has another sandbox, whose addresses answer another node's pod", || {
        now = spaces(scene, &other.node)
            .difference(&before)
            .flat_map(|space| {
                let look = ["ip", "-n", space, "-j", "address", "show", "dev", "eth0"];
                let seen = scene.cluster.lab().exec(other.node.as_str(), &look);
                addresses(&serde_json::from_slice(&seen.stdout).unwrap_or_default())
            })
            .collect();
        now.len() == 2 && now.iter().all(|ip| scene.try_ask(&client, *ip, 8080, "/hostname").is_some())
    });
    assert!(!scene.cluster.try_kubectl(&["get", "nodes"]).status.success(), "the API is gone");
    scene.cluster.start_api();
    let bound = format!("--timeout={}s", PATIENCE.as_secs());
    scene.cluster.kubectl(&["wait", "--for=condition=Ready", "node", "--all", &bound]);
    now.sort();
    scene.until("the API hears of the pod's addresses", || {
        scene.pods("web").iter().any(|pod| pod.name == other.name && pod.ips == now)
    });
}

/// The global addresses in what `ip -j address` says.
fn addresses(links: &Value) -> Vec<IpAddr> {
    let all = links.as_array().into_iter().flatten();
    let all = all.flat_map(|link| link["addr_info"].as_array().into_iter().flatten());
    let all = all.filter(|address| address["scope"] == "global");
    all.filter_map(|address| address["local"].as_str()?.parse().ok()).collect()
}

pub fn a_node_is_deleted_and_added_again(scene: &Scene<'_>) {
    let cluster = scene.cluster;
    let node = cluster.nodes().pop().expect("a node");
    let bound = format!("--timeout={}s", PATIENCE.as_secs());
    let before = scene.servers("before", 2);
    let stays = before.iter().find(|pod| pod.node != node).expect("pods are spread over nodes").clone();
    cluster.kubectl(&["drain", &node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", &bound]);
    cluster.stop(&node, "kubelet");
    cluster.kubectl(&["delete", "node", &node]);
    let pods_of_node = || {
        let pods = cluster.objects(&["pods", "-A", &format!("--field-selector=spec.nodeName={node}")]);
        pods["items"].as_array().map_or(0, Vec::len)
    };
    scene.until("the pods of the node are forgotten", || pods_of_node() == 0);
    scene.network.left(cluster, &node);
    cluster.start_kubelet(&node);
    scene.network.joined(cluster, &node);
    cluster.kubectl(&["wait", "--for=condition=Ready", "node", &node, &bound]);
    let after = scene.servers("after", 4);
    let (one, other) = pair(&after);
    assert!(after.iter().any(|pod| pod.node == node));
    for (from, to) in [(one, other), (other, one), (&stays, other), (&stays, one)] {
        let client = scene.inside(from);
        for (own, ip) in from.ips.iter().zip(&to.ips) {
            let reached = || scene.try_ask(&client, *ip, 8080, "/hostname").is_some();
            scene.until(&format!("{from:?} reaches {to:?}"), reached);
            assert_eq!(scene.seen_as(&client, *ip, 8080), *own);
        }
    }
    for ip in &other.ips {
        scene.ask(&Client::Machine(one.node.clone()), *ip, 8080, "/hostname");
    }
}
