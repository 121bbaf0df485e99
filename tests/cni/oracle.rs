//! The reference plugins as an oracle: `bridge` with `host-local` and weft-cni, given the same, leave a pod with the
//! same addresses, routes and reachability, and answer with the same shape. docs/cni.md lists where they differ by intent.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value, json};

use crate::node::{Node, Pod, SUBNETS, executable, possible};

const REFERENCE: &str = "/usr/lib/cni/bridge";

fn reference(node: &Node, version: &str) -> Value {
    let data = node.dir.join("host-local");
    json!({
        "cniVersion": version, "name": "podnet", "type": "bridge", "bridge": "weft0", "isGateway": true,
        "isDefaultGateway": true, "hairpinMode": true, "mtu": 1450,
        "ipam": {
            "type": "host-local", "dataDir": data,
            "ranges": SUBNETS.map(|subnet| json!([{"subnet": subnet}])),
        },
    })
}

/// What a pod can see of its network, without what is drawn by lot.
#[derive(Debug, PartialEq)]
struct Seen {
    addresses: BTreeSet<String>,
    routes: BTreeSet<String>,
    mtu: Value,
    state: Value,
}

fn seen(pod: &Pod) -> Seen {
    let own = |address: &str| address.starts_with("10.32.4.") || address.starts_with("fd00:32:4:");
    let shown = pod.json("ip -j addr show dev eth0");
    let addresses = shown[0]["addr_info"].as_array().unwrap().iter();
    let addresses = addresses
        .filter(|address| address["scope"] == "global")
        .map(|a| {
            let text = a["local"].as_str().unwrap();
            assert!(own(text), "{text}");
            format!("{}/{} broadcast {}", family(text), a["prefixlen"], a["broadcast"])
        })
        .collect();
    let routes = ["-4", "-6"].iter().flat_map(|family| {
        let routes = pod.json(&format!("ip -j {family} route"));
        routes.as_array().unwrap().iter().map(route).collect::<Vec<_>>()
    });
    Seen {
        addresses,
        routes: routes.collect(),
        mtu: shown[0]["mtu"].clone(),
        state: shown[0]["operstate"].clone(),
    }
}

fn family(address: &str) -> &'static str {
    if address.contains(':') { "IPv6" } else { "IPv4" }
}

fn route(route: &Value) -> String {
    let field = |key: &str| route[key].as_str().unwrap_or("-").to_owned();
    // The source of the connected route is the pod's own address, which is not the same by design.
    format!(
        "{} via {} dev {} scope {} metric {}",
        field("dst"),
        field("gateway"),
        field("dev"),
        field("scope"),
        route["metric"]
    )
}

/// A result without names, addresses and paths that are drawn by lot.
fn shape(result: &Value) -> Value {
    let mut result = result.clone();
    for interface in result["interfaces"].as_array_mut().unwrap() {
        interface["mac"] = json!(interface["mac"].as_str().map(str::len));
        if interface.get("sandbox").is_some_and(|sandbox| sandbox != "") {
            interface["sandbox"] = json!("the pod");
        } else {
            interface.as_object_mut().unwrap().remove("sandbox");
        }
        if !["eth0", "weft0"].contains(&interface["name"].as_str().unwrap()) {
            interface["name"] = json!("the host's end");
        }
    }
    for ip in result["ips"].as_array_mut().unwrap() {
        let address = ip["address"].as_str().unwrap();
        let (host, length) = address.split_once('/').unwrap();
        ip["address"] = json!(format!("{}/{length}", family(host)));
    }
    result
}

fn reaches(node: &Node, pod: &Pod, result: &Value) -> Vec<(String, bool)> {
    let mut found = Vec::new();
    for ip in result["ips"].as_array().unwrap() {
        let own = ip["address"].as_str().unwrap().split('/').next().unwrap().to_owned();
        let gateway = ip["gateway"].as_str().unwrap();
        let kind = family(gateway);
        let from_pod = |target: &str| pod.try_run(&format!("ping -q -c1 -W2 {target}")).status.success();
        found.push((format!("{kind} gateway"), from_pod(gateway)));
        // Beyond the gateway: an address that only the default route leads to.
        let beyond = if kind == "IPv4" { "198.51.100.1" } else { "2001:db8:99::1" };
        found.push((format!("{kind} beyond"), from_pod(beyond)));
        let from_node = node.exec(Path::new("/usr/bin/ping"), &["-q", "-c1", "-W2", &own], &[], b"");
        found.push((format!("{kind} from the node"), from_node.status.success()));
    }
    found
}

#[test]
fn a_pod_looks_as_the_reference_plugins_leave_it() {
    if !possible() {
        return;
    }
    if !Path::new(REFERENCE).exists() {
        return weft_tests::lab::skip(
            "the reference plugins are not installed (containernetworking-plugins)",
        );
    }
    for version in ["0.4.0", "1.0.0"] {
        let nodes = [Node::new(), Node::new()];
        let pods = [Pod::new(), Pod::new()];
        let plugins = [
            (executable("weft-cni"), nodes[0].config(version)),
            (REFERENCE.into(), reference(&nodes[1], version)),
        ];
        let mut outcomes = Vec::new();
        for ((node, pod), (plugin, config)) in nodes.iter().zip(&pods).zip(&plugins) {
            node.run("ip addr add 198.51.100.1/32 dev lo");
            node.run("ip addr add 2001:db8:99::1/128 dev lo nodad");
            let call =
                |verb: &str, config: &Value| node.cni(plugin, verb, "c1", "eth0", &pod.netns(), config);
            let result = call("ADD", config).unwrap_or_else(|error| panic!("{plugin:?}: {error}"));
            let reached = reaches(node, pod, &result);
            assert!(reached.iter().all(|(_, reached)| *reached), "{plugin:?}: {reached:?}");
            let mut checked = config.clone();
            checked["prevResult"] = result.clone();
            assert_eq!(call("CHECK", &checked), Ok(Value::Null), "{plugin:?}");
            let port = result["interfaces"][1]["name"].as_str().unwrap();
            let port = &node.json(&format!("ip -j -d link show {port}"))[0];
            let port = (
                port["master"].clone(),
                port["mtu"].clone(),
                port["linkinfo"]["info_slave_data"]["hairpin"].clone(),
            );
            let pod_seen = seen(pod);
            assert_eq!(call("DEL", &checked), Ok(Value::Null), "{plugin:?}");
            let after = (pod.json("ip -j link").as_array().unwrap().len(), node.links().len());
            assert_eq!(call("DEL", &checked), Ok(Value::Null), "{plugin:?}");
            outcomes.push((pod_seen, shape(&result), reached, port, after));
        }
        let oracle = outcomes.pop().unwrap();
        let ours = outcomes.pop().unwrap();
        assert_eq!(ours, oracle, "version {version}");
    }
}

#[test]
fn errors_come_in_the_form_that_the_reference_plugins_use() {
    if !possible() {
        return;
    }
    if !Path::new(REFERENCE).exists() {
        return weft_tests::lab::skip(
            "the reference plugins are not installed (containernetworking-plugins)",
        );
    }
    let node = Node::new();
    let pod = Pod::new();
    let keys = |error: &Value| error.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    for (container, ifname, netns, version) in [
        ("", "eth0", pod.netns(), "1.0.0"),
        ("c1", "", pod.netns(), "1.0.0"),
        ("c1", "eth0", pod.netns(), "9.9.9"),
    ] {
        let call = |plugin: &Path, mut config: Value| {
            config["cniVersion"] = json!(version);
            node.cni(plugin, "ADD", container, ifname, &netns, &config).expect_err("refused")
        };
        let ours = call(&executable("weft-cni"), node.config("1.0.0"));
        let oracle = call(Path::new(REFERENCE), reference(&node, "1.0.0"));
        assert_eq!(ours["code"], oracle["code"], "{ours} against {oracle}");
        assert!(keys(&ours).is_superset(&["cniVersion", "code", "msg"].map(String::from).into()), "{ours}");
    }
}
