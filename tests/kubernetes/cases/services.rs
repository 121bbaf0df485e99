//! Services of every type, and the address that a pod sees its client under.
//!
//! What is printed as `client address` is the table of docs/operations.md.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::{Value, json};

use crate::scene::{Client, Pod, Scene, server, service, single};

/// Asks until every pod behind an address has answered, and no one else.
fn reaches_all(scene: &Scene<'_>, client: &Client, address: IpAddr, port: u16, behind: &[Pod]) {
    let expected: BTreeSet<String> = behind.iter().map(|pod| pod.name.clone()).collect();
    let mut answered = BTreeSet::new();
    scene.until(&format!("{client:?} reaches all behind {address} port {port}"), || {
        if let Some(name) = scene.try_ask(client, address, port, "/hostname") {
            assert!(expected.contains(&name), "{name} answers for {address}, and is none of {expected:?}");
            answered.insert(name);
        }
        answered == expected
    });
}

fn note(scene: &Scene<'_>, what: &str, client: &str, seen: IpAddr) {
    println!("client address: {}: {what}, from {client}: {seen}", scene.network.name());
}

/// The first address of that family.
fn like(addresses: &[IpAddr], other: IpAddr) -> IpAddr {
    addresses.iter().copied().find(|ip| ip.is_ipv4() == other.is_ipv4()).expect("both families")
}

/// Every address that a node itself has.
fn own_addresses(scene: &Scene<'_>, node: &str) -> BTreeSet<IpAddr> {
    let links = scene.cluster.lab().json(node, &["ip", "-j", "address"]);
    let links = links.as_array().cloned().unwrap_or_default();
    let infos = links.iter().flat_map(|link| link["addr_info"].as_array().cloned().unwrap_or_default());
    infos.filter_map(|info| info["local"].as_str()?.parse().ok()).collect()
}

pub fn cluster_ips_lead_to_every_pod_behind_them(scene: &Scene<'_>) {
    let pods = scene.servers("web", 4);
    let clients = scene.servers("client", 2);
    scene.apply(&[service("web", "web", json!({})), service("self", "client", json!({}))]);
    for address in scene.cluster_ips("web") {
        for from in &clients {
            let client = scene.inside(from);
            reaches_all(scene, &client, address, 80, &pods);
            let seen = scene.seen_as(&client, address, 80);
            note(scene, "ClusterIP", "a pod", seen);
            assert_eq!(seen, like(&from.ips, address), "a pod reaches a Service under its own address");
        }
        for node in scene.cluster.nodes() {
            let client = Client::Machine(node.clone());
            reaches_all(scene, &client, address, 80, &pods);
            let seen = scene.seen_as(&client, address, 80);
            note(scene, "ClusterIP", "a node", seen);
            assert!(own_addresses(scene, &node).contains(&seen), "{seen} is no address of {node}");
        }
    }
    // Hairpin: a pod reaches itself through its Service.
    for address in scene.cluster_ips("self") {
        for pod in &clients {
            reaches_all(scene, &scene.inside(pod), address, 80, &clients);
        }
    }
}

pub fn node_ports_are_reached_from_outside(scene: &Scene<'_>) {
    let pods = scene.servers("web", 2);
    scene.apply(&[
        service("any", "web", json!({ "type": "NodePort" })),
        service("local", "web", json!({ "type": "NodePort", "externalTrafficPolicy": "Local" })),
    ]);
    let port = |name: &str| -> u16 {
        let service = scene.cluster.objects(&["service", name, "-n", &scene.namespace]);
        service["spec"]["ports"][0]["nodePort"]
            .as_u64()
            .and_then(|port| port.try_into().ok())
            .expect("a node port")
    };
    let outside = Client::Machine(scene.cluster.plane().to_owned());
    let outside_addresses = scene.cluster.addresses(scene.cluster.plane());
    for node in scene.cluster.nodes() {
        for address in scene.cluster.addresses(&node) {
            reaches_all(scene, &outside, address, port("any"), &pods);
            let seen = scene.seen_as(&outside, address, port("any"));
            note(scene, "NodePort", "outside", seen);
            assert!(own_addresses(scene, &node).contains(&seen), "{seen} is no address of {node}");

            let here: Vec<Pod> = pods.iter().filter(|pod| pod.node == node).cloned().collect();
            reaches_all(scene, &outside, address, port("local"), &here);
            let seen = scene.seen_as(&outside, address, port("local"));
            note(scene, "NodePort, policy Local", "outside", seen);
            assert_eq!(seen, like(&outside_addresses, address));

            for pod in &pods {
                let client = scene.inside(pod);
                reaches_all(scene, &client, address, port("any"), &pods);
                let seen = scene.seen_as(&client, address, port("any"));
                note(
                    scene,
                    "NodePort",
                    if pod.node == node { "a pod of the node" } else { "a pod of another node" },
                    seen,
                );
            }
        }
    }
}

pub fn external_ips_and_load_balancers_are_reached_from_outside(scene: &Scene<'_>) {
    let pods = scene.servers("web", 2);
    let (external, balanced) = (["203.0.113.10", "2001:db8:10::10"], ["203.0.113.20", "2001:db8:10::20"]);
    scene.apply(&[
        service("external", "web", json!({ "externalIPs": external })),
        service("balanced", "web", json!({ "type": "LoadBalancer" })),
        service("local", "web", json!({ "type": "LoadBalancer", "externalTrafficPolicy": "Local" })),
    ]);
    // What the controller of a load balancer does: it assigns an address, and leads it to nodes.
    let assign = |name: &str, addresses: &[&str]| {
        let ingress: Vec<Value> = addresses.iter().map(|ip| json!({ "ip": ip })).collect();
        let patch = json!({ "status": { "loadBalancer": { "ingress": ingress } } }).to_string();
        scene.kubectl(&["patch", "service", name, "--subresource=status", "--type=merge", "-p", &patch]);
    };
    let of_local = ["203.0.113.30", "2001:db8:10::30"];
    assign("balanced", &balanced);
    assign("local", &of_local);
    let nodes = scene.cluster.nodes();
    let outside = Client::Machine(scene.cluster.plane().to_owned());
    let outside_addresses = scene.cluster.addresses(scene.cluster.plane());
    for node in &nodes {
        for (what, addresses) in
            [("ExternalIP", external), ("LoadBalancer", balanced), ("LoadBalancer, policy Local", of_local)]
        {
            for address in addresses {
                let address: IpAddr = address.parse().expect("an address");
                let via = like(&scene.cluster.addresses(node), address).to_string();
                let route = ["ip", "route", "replace", &address.to_string(), "via", &via];
                scene.cluster.lab().run(scene.cluster.plane(), &route);
                let local = what.ends_with("Local");
                let behind: Vec<Pod> =
                    pods.iter().filter(|pod| !local || pod.node == *node).cloned().collect();
                reaches_all(scene, &outside, address, 80, &behind);
                let seen = scene.seen_as(&outside, address, 80);
                note(scene, what, "outside", seen);
                if local {
                    assert_eq!(seen, like(&outside_addresses, address));
                } else {
                    assert!(own_addresses(scene, node).contains(&seen), "{seen} is no address of {node}");
                }
                for pod in &pods {
                    let client = scene.inside(pod);
                    // Within the cluster every pod behind it serves, whatever the policy.
                    reaches_all(scene, &client, address, 80, &pods);
                    note(scene, what, "a pod", scene.seen_as(&client, address, 80));
                }
                scene
                    .cluster
                    .lab()
                    .run(scene.cluster.plane(), &["ip", "route", "delete", &address.to_string()]);
            }
        }
    }
}

pub fn host_ports_are_reached_from_outside(scene: &Scene<'_>) {
    let node = scene.cluster.nodes().remove(0);
    let mut container = server();
    container["ports"] = json!([{ "containerPort": 8080, "hostPort": 18080 }]);
    scene.apply(&[single("shown", json!({ "nodeName": node, "containers": [container] }))]);
    let clients = scene.servers("client", 2);
    scene.kubectl(&["wait", "--for=condition=Ready", "pod/shown", "--timeout=120s"]);
    let shown = scene.pods("shown");
    let outside = Client::Machine(scene.cluster.plane().to_owned());
    let outside_addresses = scene.cluster.addresses(scene.cluster.plane());
    for address in scene.cluster.addresses(&node) {
        reaches_all(scene, &outside, address, 18080, &shown);
        let seen = scene.seen_as(&outside, address, 18080);
        note(scene, "hostPort", "outside", seen);
        assert_eq!(seen, like(&outside_addresses, address));
        for pod in clients.iter().chain(&shown) {
            let client = scene.inside(pod);
            reaches_all(scene, &client, address, 18080, &shown);
            let from = match (pod.name == "shown", pod.node == node) {
                (true, _) => "the pod itself",
                (_, true) => "a pod of the node",
                _ => "a pod of another node",
            };
            note(scene, "hostPort", from, scene.seen_as(&client, address, 18080));
        }
        reaches_all(scene, &Client::Machine(node.clone()), address, 18080, &shown);
    }
    // It is closed again when the pod is gone.
    scene.kubectl(&["delete", "pod", "shown"]);
    let address = scene.cluster.addresses(&node)[0];
    scene.until("the host port is closed", || scene.try_ask(&outside, address, 18080, "/hostname").is_none());
}
