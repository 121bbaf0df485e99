//! What befalls a cluster: its API goes, a node goes and comes back.

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
