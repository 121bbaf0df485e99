//! What befalls a cluster: its API goes, a node goes and comes back.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::{Value, json};
use weft_tests::lab::Ping;

use crate::scene::{Client, PATIENCE, PAUSE, Pod, Scene, deployment, single};

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

/// Takes all pods from a node that may go elsewhere.
fn drain(scene: &Scene<'_>, node: &str) {
    let bound = format!("--timeout={}s", PATIENCE.as_secs());
    let words = ["drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", &bound];
    scene.cluster.kubectl(&words);
}

/// Servers on these nodes that are no one's, so that nothing moves them, and pings between them in both families.
fn flows(scene: &Scene<'_>, nodes: &[String]) -> Vec<Ping> {
    for node in nodes {
        let spec = json!({ "nodeName": node, "containers": [{ "name": "pause", "image": PAUSE }] });
        scene.apply(&[single(&format!("stays-{node}"), spec)]);
    }
    let pods: Vec<Pod> = nodes
        .iter()
        .map(|node| {
            let name = format!("stays-{node}");
            let bound = format!("--timeout={}s", PATIENCE.as_secs());
            scene.kubectl(&["wait", "--for=condition=Ready", &format!("pod/{name}"), &bound]);
            scene.pods(&name).remove(0)
        })
        .collect();
    let between = |(from, to): (&Pod, &Pod)| -> Vec<Ping> {
        let client = scene.inside(from);
        to.ips.iter().map(|ip| scene.ping(&client, *ip)).collect()
    };
    let (one, other) = pair(&pods);
    [(one, other), (other, one)].into_iter().flat_map(between).collect()
}

fn nothing_lost(pings: Vec<Ping>) {
    for ping in pings {
        let (sent, lost) = ping.stop();
        assert!(lost.is_empty(), "between other nodes no answer to {lost:?} of {sent}");
    }
}

/// A Deployment that is spread over the nodes that take pods, and over the others when one takes none any more.
fn spread(app: &str, replicas: usize) -> Value {
    let mut object = deployment(app, replicas);
    object["spec"]["template"]["spec"]["topologySpreadConstraints"][0]["nodeTaintsPolicy"] = json!("Honor");
    object
}

fn all_reach_all(scene: &Scene<'_>, pods: &[Pod]) {
    for from in pods {
        let client = scene.inside(from);
        for to in pods.iter().filter(|to| to.name != from.name) {
            for ip in &to.ips {
                scene.ask(&client, *ip, 8080, "/hostname");
            }
        }
    }
}

pub fn a_drained_node_disturbs_no_other_and_comes_back(scene: &Scene<'_>) {
    let mut nodes = scene.cluster.nodes();
    let node = nodes.pop().expect("a node");
    let held = || scene.cluster.objects(&["podsubnets"])["items"].as_array().map_or(0, Vec::len);
    // The scheduler has seen that all nodes take pods, once these have begun.
    scene.servers("first", nodes.len() + 1);
    scene.apply(&[spread("moves", 6)]);
    scene.await_deployment("moves");
    assert!(scene.pods("moves").iter().any(|pod| pod.node == node), "there is something to move");
    let blocks = held();
    let pings = flows(scene, &nodes);
    scene.cluster.kubectl(&["cordon", &node]);
    drain(scene, &node);
    scene.await_deployment("moves");
    let moved = scene.pods("moves");
    assert!(moved.iter().all(|pod| pod.node != node), "{moved:?}");
    all_reach_all(scene, &moved);
    // Every address of the node is free again: no pod has a namespace, and no interface leads to one.
    scene.until("nothing of the pods is left on the node", || spaces(scene, &node).is_empty());
    let links = scene.cluster.lab().json(node.as_str(), &["ip", "-j", "link", "show", "type", "veth"]);
    let links = links.as_array().into_iter().flatten().filter_map(|link| link["ifname"].as_str());
    let left: Vec<&str> = links.filter(|name| name.starts_with("weft")).collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(scene.network.addresses_in_use(scene.cluster, &node), 0);
    assert_eq!(held(), blocks, "the node keeps its blocks");
    scene.cluster.kubectl(&["uncordon", &node]);
    scene.apply(&[deployment("back", 6)]);
    scene.await_deployment("back");
    let back = scene.pods("back");
    assert_eq!(back.iter().filter(|pod| pod.node == node).count(), 2, "{back:?}");
    all_reach_all(scene, &back);
    nothing_lost(pings);
}

/// Takes a machine out of the cluster under one name and in again under another.
fn rename(scene: &Scene<'_>, place: &str, from: &str, to: &str) {
    drain(scene, from);
    scene.cluster.stop(place, "kubelet");
    scene.cluster.kubectl(&["delete", "node", from]);
    let of = format!("--field-selector=spec.nodeName={from}");
    scene.until("the pods of the former name are forgotten", || {
        let pods = scene.cluster.objects(&["pods", "-A", &of]);
        pods["items"].as_array().is_some_and(Vec::is_empty)
    });
    scene.cluster.start_kubelet_as(place, to);
    let bound = format!("--timeout={}s", 2 * PATIENCE.as_secs());
    scene.cluster.kubectl(&["wait", "--for=condition=Ready", "node", to, &bound]);
}

/// The nodes whose blocks the API server knows.
fn owners(scene: &Scene<'_>) -> BTreeSet<String> {
    let leases = scene.cluster.objects(&["podsubnets"]);
    let owners = leases["items"].as_array().into_iter().flatten();
    owners.filter_map(|lease| lease["spec"]["node"].as_str().map(str::to_owned)).collect()
}

pub fn a_node_under_another_name_is_a_node_like_any_other(scene: &Scene<'_>) {
    let mut nodes = scene.cluster.nodes();
    let node = nodes.pop().expect("a node");
    let pings = flows(scene, &nodes);
    let other = format!("{node}-renamed");
    rename(scene, &node, &node, &other);
    nodes.push(other.clone());
    scene.until("the blocks of the former name are free, and the new one has its own", || {
        owners(scene) == nodes.iter().cloned().collect()
    });
    scene.apply(&[deployment("renamed", 6)]);
    scene.await_deployment("renamed");
    let mut pods = scene.pods("renamed");
    assert_eq!(pods.iter().filter(|pod| pod.node == other).count(), 2, "{pods:?}");
    // The machine is the lab's under its first name.
    pods.iter_mut().filter(|pod| pod.node == other).for_each(|pod| pod.node.clone_from(&node));
    all_reach_all(scene, &pods);
    for place in scene.cluster.nodes() {
        scene.until(&format!("the daemon on {place} warns of no second node"), || {
            let warnings = scene.cluster.lab().weft(&place, &["status"])["warnings"].to_string();
            !warnings.contains("another node named") && !warnings.contains("another machine")
        });
    }
    let told = scene.cluster.objects(&["events", "-A", "--field-selector=reason=WeftDuplicateNode"]);
    assert_eq!(told["items"], json!([]), "nobody was told of a duplicate");
    nothing_lost(pings);
    rename(scene, &node, &other, &node);
    scene.until("the former name has blocks again", || {
        owners(scene) == scene.cluster.nodes().into_iter().collect()
    });
}
