//! Pods and nodes, without Services.

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
