//! Pods and nodes, without Services.

use std::net::IpAddr;

use serde_json::json;

use crate::scene::{AGNHOST, PATIENCE, Scene, single};

pub fn nodes_turn_ready(scene: &Scene<'_>) {
    let bound = format!("--timeout={}s", PATIENCE.as_secs());
    scene.cluster.kubectl(&["wait", "--for=condition=Ready", "node", "--all", &bound]);
    let nodes = scene.cluster.objects(&["nodes"]);
    let nodes = nodes["items"].as_array().expect("a list");
    assert_eq!(nodes.len(), scene.cluster.nodes().len());
    for node in nodes {
        let name = node["metadata"]["name"].as_str().expect("a name");
        let internal: Vec<String> = node["status"]["addresses"]
            .as_array()
            .expect("a list")
            .iter()
            .filter(|address| address["type"] == "InternalIP")
            .map(|address| address["address"].as_str().expect("an address").to_owned())
            .collect();
        let expected: Vec<String> = scene.cluster.addresses(name).iter().map(ToString::to_string).collect();
        assert_eq!(internal, expected, "{name} has both families");
    }
}

pub fn pods_reach_pods_across_nodes_without_nat(scene: &Scene<'_>) {
    let pods = scene.servers("web", 6);
    for node in scene.cluster.nodes() {
        assert!(pods.iter().any(|pod| pod.node == node), "no pod is on {node}: {pods:?}");
    }
    for from in &pods {
        assert_eq!(from.ips.len(), 2, "{from:?}: one address a family");
        let client = scene.inside(from);
        for to in pods.iter().filter(|to| to.name != from.name) {
            for (own, other) in from.ips.iter().zip(&to.ips) {
                let seen = scene.seen_as(&client, *other, 8080);
                assert_eq!(seen, *own, "{from:?} is seen by {to:?} under another address");
            }
        }
    }
    // And the nodes reach the pods, as kubelet's probes do.
    for node in scene.cluster.nodes() {
        for pod in &pods {
            for ip in &pod.ips {
                scene.ask(&crate::scene::Client::Machine(node.clone()), *ip, 8080, "/hostname");
            }
        }
    }
}

pub fn host_network_and_host_path_are_the_nodes_own(scene: &Scene<'_>) {
    for node in scene.cluster.nodes() {
        let spec = json!({
            "nodeName": node, "hostNetwork": true,
            "containers": [{ "name": "look", "image": AGNHOST, "args": ["pause"],
                "volumeMounts": [{ "name": "etc", "mountPath": "/host" }] }],
            "volumes": [{ "name": "etc", "hostPath": { "path": "/etc" } }],
        });
        scene.apply(&[single(&format!("look-{node}"), spec)]);
    }
    for node in scene.cluster.nodes() {
        let pod = format!("pod/look-{node}");
        scene.kubectl(&[
            "wait",
            "--for=condition=Ready",
            &pod,
            &format!("--timeout={}s", PATIENCE.as_secs()),
        ]);
        let inside = scene.kubectl(&["exec", &pod, "--", "cat", "/host/machine-id"]);
        assert_eq!(inside, scene.cluster.lab().run(node.as_str(), &["cat", "/etc/machine-id"]));
        let own = scene.kubectl(&["exec", &pod, "--", "cat", "/sys/class/net/eth0/address"]);
        assert_eq!(own, scene.cluster.lab().run(node.as_str(), &["cat", "/sys/class/net/eth0/address"]));
    }
}

pub fn pods_are_in_the_cidrs_of_their_nodes(scene: &Scene<'_>) {
    let strays = strays(scene, "web");
    assert!(strays.is_empty(), "{strays:#?}");
}

/// A Node that is made anew may get other CIDRs. What it had before is kept while pods use it, and no longer.
pub fn new_pods_are_in_the_cidrs_of_a_node_made_anew(scene: &Scene<'_>) {
    let mut turn = 0;
    scene.until("no new pod is outside of its node's CIDRs", || {
        turn += 1;
        let app = format!("web-{turn}");
        let strays = strays(scene, &app);
        println!("turn {turn}: {strays:?}");
        scene.kubectl(&["delete", "deployment", &app, "--cascade=foreground", "--wait"]);
        strays.is_empty()
    });
}

/// Starts two pods on each node, and says which have addresses that are not in the CIDRs of their nodes.
fn strays(scene: &Scene<'_>, app: &str) -> Vec<String> {
    let nodes = scene.cluster.nodes();
    let pods = scene.servers(app, 2 * nodes.len());
    let mut strays = Vec::new();
    for node in nodes {
        let spec = scene.cluster.objects(&["node", &node])["spec"].clone();
        let cidrs = spec["podCIDRs"].as_array().into_iter().flatten();
        let cidrs: Vec<&str> = cidrs.filter_map(|cidr| cidr.as_str()).collect();
        assert_eq!(cidrs.len(), 2, "{node}: {spec}");
        let here: Vec<_> = pods.iter().filter(|pod| pod.node == node).collect();
        assert_eq!(here.len(), 2, "{pods:?}");
        let outside = here.iter().flat_map(|pod| &pod.ips);
        let outside = outside.filter(|ip| !cidrs.iter().any(|cidr| contains(cidr, **ip)));
        strays.extend(outside.map(|ip| format!("{ip} on {node}, which has {cidrs:?}")));
    }
    strays
}

/// Whether an address is in a CIDR.
fn contains(cidr: &str, ip: IpAddr) -> bool {
    let (network, length) = cidr.split_once('/').expect("an address and a length");
    let bits = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => (u128::from(ip.to_bits()) << 96, true),
        IpAddr::V6(ip) => (ip.to_bits(), false),
    };
    let (network, ip) = (bits(network.parse().expect("an address")), bits(ip));
    let length: u32 = length.parse().expect("a length");
    network.1 == ip.1 && (network.0 ^ ip.0).leading_zeros() >= length
}
