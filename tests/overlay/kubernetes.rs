//! What weft does with the API of a Kubernetes beside its leases, against a real kube-apiserver: keys, Nodes, Events.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};
use weft_tests::kubernetes::{Api, lab_options, no_api};
use weft_tests::lab::{Backend, Lab, LabOptions, Ping, Request, skip, wait_until};

const PATIENCE: Duration = Duration::from_secs(90);
const NODES: [&str; 2] = ["n1", "n2"];
const API: &str = "n3";

/// A lab with the API, whose daemons run and know each other.
struct Scene {
    lab: Lab,
    api: Api,
}

impl Scene {
    /// Nothing runs yet but the API.
    fn quiet(name: &str, mode: &str) -> Option<Self> {
        Self::quiet_with(name, mode, |options| options)
    }

    fn quiet_with(name: &str, mode: &str, more: impl FnOnce(LabOptions) -> LabOptions) -> Option<Self> {
        if let Some(why) = no_api() {
            skip(&why);
            return None;
        }
        let lab = Lab::up(more(lab_options(name, NODES.len(), mode).pods(0)));
        for node in NODES {
            lab.sh(node, "rm /etc/weft/cluster.key");
        }
        let api = Api::start(&lab, API, &NODES);
        Some(Self { lab, api })
    }

    fn up(name: &str) -> Option<Self> {
        Self::quiet(name, "weft-ipam").map(Self::begun)
    }

    /// Starts the daemons, and pods that talk.
    fn begun(self) -> Self {
        let scene = self;
        NODES.iter().for_each(|node| scene.lab.start(node));
        scene.wait_until_ready();
        scene.add_pods();
        scene.lab.meet();
        scene
    }

    fn add_pods(&self) {
        for node in NODES {
            self.lab.tell(Request::PodAdd { node: node.into(), pod: "a".into() });
        }
    }

    fn wait_until_ready(&self) {
        self.wait("the nodes know each other", || {
            NODES
                .iter()
                .all(|node| self.status(node)["peers"]["alive"] == 1 && self.status(node)["ready"] == true)
        });
    }

    fn wait(&self, what: &str, check: impl FnMut() -> bool) {
        wait_until(what, PATIENCE, check);
    }

    fn status(&self, node: &str) -> Value {
        self.lab.weft(node, &["status"])
    }

    fn warns(&self, node: &str, words: &str) -> bool {
        self.status(node)["warnings"].to_string().contains(words)
    }

    fn ids(&self, node: &str) -> Vec<String> {
        let ids = self.lab.weft(node, &["cluster-key", "list"])["ids"].clone();
        serde_json::from_value(ids).expect("a list of ids")
    }

    /// The condition of a Node, as kubectl has it.
    fn condition(&self, node: &str) -> Value {
        let conditions = self.api.get(&self.lab, &["node", node])["status"]["conditions"].clone();
        let list = conditions.as_array().cloned().unwrap_or_default();
        list.into_iter().find(|one| one["type"] == "NetworkUnavailable").unwrap_or(Value::Null)
    }

    /// The reasons and messages of the Events of a Node.
    fn events(&self, node: &str) -> BTreeSet<(String, String)> {
        let selector = format!("--field-selector=involvedObject.kind=Node,involvedObject.name={node}");
        let events = self.api.get(&self.lab, &["events", "-n", "default", &selector]);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let items = events["items"].as_array().cloned().unwrap_or_default();
        items.iter().map(|event| (text(&event["reason"]), text(&event["message"]))).collect()
    }

    fn is_told(&self, node: &str, reason: &str, words: &str) -> bool {
        self.events(node).iter().any(|(why, message)| why == reason && message.contains(words))
    }

    fn set_keys(&self, text: &str) {
        let patch = json!({ "stringData": { "cluster.key": text } }).to_string();
        self.api
            .kubectl(&self.lab, &["patch", "secret", "weft-cluster-key", "-n", "weft-system", "-p", &patch]);
    }

    fn pings(&self) -> Vec<Ping> {
        let ping = |(from, to): (&str, &str)| {
            self.lab.background_ping(format!("{from}/a").as_str(), self.lab.ip(to, "a"))
        };
        [("n1", "n2"), ("n2", "n1")].map(ping).into()
    }

    /// Whether a daemon wrote into its log that it got a datagram under a key that it has not.
    fn could_not_read(&self) -> bool {
        NODES.iter().any(|node| {
            let log = std::fs::read_to_string(self.lab.handle().log(node)).expect("the daemon has a log");
            assert!(log.contains("cluster keys changed"), "this log has what is looked for");
            log.contains("no key of the ring opens")
        })
    }
}

fn nothing_lost(pings: Vec<Ping>) {
    for ping in pings {
        let (sent, lost) = ping.stop();
        assert!(lost.is_empty(), "no answer to {lost:?} of {sent}");
    }
}

#[test]
fn nodes_come_up_without_seeds_and_keys_and_say_so_on_their_nodes() {
    let Some(scene) = Scene::up("kubefirst") else { return };
    // One of the two made the Secret, and both use it.
    assert_eq!(scene.ids("n1"), scene.ids("n2"));
    assert_eq!(scene.ids("n1").len(), 1);
    let mode = scene.lab.sh("n1", "stat -c %a /var/lib/weft/cluster.key");
    assert_eq!(mode.trim(), "600");
    for node in NODES {
        scene.wait("the Node says that pods can talk", || scene.condition(node)["status"] == "False");
        assert_eq!(scene.condition(node)["reason"], "WeftIsUp");
    }
    // Who resets it is corrected.
    let reset = json!({ "status": { "conditions": [
        { "type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated", "message": "created without a route" },
    ] } });
    scene.api.patch_status(&scene.lab, "n1", &reset);
    scene.wait("the condition is back", || scene.condition("n1")["reason"] == "WeftIsUp");
}

#[test]
fn keys_change_by_editing_the_secret_and_nothing_is_lost() {
    let Some(scene) = Scene::up("kubekeys") else { return };
    keys_change(&scene);
}

/// Where everything is encrypted, the secret that a pair of tunnels mixes in is made from the cluster key.
#[test]
fn keys_change_under_encrypted_traffic_and_nothing_is_lost() {
    let encrypted = |options: LabOptions| options.backend(Backend::Wireguard);
    let Some(scene) = Scene::quiet_with("kubekeysenc", "weft-ipam", encrypted) else { return };
    let scene = scene.begun();
    let preshared = || scene.lab.weft("n1", &["peers"]).to_string();
    assert!(preshared().contains("handshake_ms"), "there is a tunnel: {}", preshared());
    keys_change(&scene);
    scene.lab.ping_all();
}

fn keys_change(scene: &Scene) {
    let before = scene.ids("n1");
    let pings = scene.pings();
    let new = "5e".repeat(32);
    scene.set_keys(&format!("{new}\n"));
    scene.wait("both seal with the new key", || NODES.iter().all(|node| scene.ids(node)[0] != before[0]));
    // With tunnels it is three minutes, so that each has made its secret anew.
    wait_until("both have forgotten the old key", 4 * PATIENCE, || {
        NODES.iter().all(|node| scene.ids(node).len() == 1 && scene.ids(node)[0] != before[0])
    });
    let file = scene.lab.sh("n2", "cat /var/lib/weft/cluster.key");
    assert_eq!(file.trim(), new);

    // Nonsense changes nothing, and is told.
    scene.set_keys("not a key\n");
    scene
        .wait("both say what is wrong", || NODES.iter().all(|node| scene.warns(node, "weft-cluster-key:1:")));
    scene.wait("the Node hears of it", || scene.is_told("n1", "WeftClusterKey", "64 hexadecimal digits"));
    assert_eq!(scene.ids("n1"), scene.ids("n2"));
    scene.set_keys(&format!("{new}\n"));
    scene.wait("it is over", || NODES.iter().all(|node| !scene.warns(node, "weft-cluster-key:1:")));
    // By hand nothing is changed beside the Secret.
    let refused = scene.lab.exec("n1", &["weft", "cluster-key", "add", &"7a".repeat(32)]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("weft-cluster-key"), "{refused:?}");
    nothing_lost(pings);
    assert!(!scene.could_not_read());
}

#[test]
fn the_api_server_goes_and_nodes_go_on() {
    let Some(mut scene) = Scene::up("kubegone") else { return };
    let pings = scene.pings();
    scene.api.stop(&scene.lab);
    scene.wait("status says so", || NODES.iter().all(|node| scene.status(node)["store"]["healthy"] == false));
    scene.lab.tell(Request::PodAdd { node: "n1".into(), pod: "x".into() });
    scene.lab.kill("n2");
    scene.lab.start("n2");
    scene.lab.tell(Request::PodAdd { node: "n2".into(), pod: "x".into() });
    scene.wait("n2 is back", || scene.status("n2")["peers"]["alive"] == 1);
    scene.lab.ping_all();
    scene.api.start_again(&scene.lab);
    scene.wait("status says that it is back", || {
        NODES.iter().all(|node| scene.status(node)["store"]["healthy"] == true)
    });
    nothing_lost(pings);
    scene.lab.ping_all();
}

#[test]
fn a_node_object_that_goes_and_comes_back_is_told_and_used() {
    let Some(scene) = Scene::up("kubenode") else { return };
    let pings = scene.pings();
    scene.api.kubectl(&scene.lab, &["delete", "node", "n2"]);
    scene.wait("n2 says so", || scene.warns("n2", "there is no Node n2"));
    scene.api.make_node(&scene.lab, "n2", &json!({}));
    scene.wait("the new Node shows that pods can talk", || scene.condition("n2")["reason"] == "WeftIsUp");
    scene.wait("n2 says no more of it", || !scene.warns("n2", "there is no Node n2"));
    nothing_lost(pings);
    // It moves, as the cluster says, and weft does not.
    let elsewhere = json!({ "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.99" }] } });
    scene.api.patch_status(&scene.lab, "n2", &elsewhere);
    scene.wait("the Node hears of it", || {
        scene.is_told("n2", "WeftNodeAddress", "192.0.2.99 and weft uses 192.0.2.2")
    });
}

/// The DaemonSet has the node's addresses from `status.hostIPs`, which are those of its start.
#[test]
fn an_address_that_the_kubelet_tells_is_used_without_a_restart_once_the_machine_has_it() {
    let Some(scene) = Scene::quiet("kubemoved", "weft-ipam") else { return };
    let daemon = |node: &&str| {
        let said = format!("WEFT_NODE_ADDRESSES=192.0.2.{}", &node[1..]);
        scene.lab.background(*node, &["env", &said, "weftd", "--config", "/etc/weft/weft.toml"])
    };
    let _daemons: Vec<_> = NODES.iter().map(daemon).collect();
    let answers =
        |node: &str| scene.lab.exec(node, &["weft", "status"]).status.code().is_some_and(|code| code < 2);
    scene.wait("the daemons answer", || NODES.iter().all(|node| answers(node)));
    scene.wait_until_ready();
    scene.add_pods();
    scene.lab.meet();
    let say = |address: &str| {
        let status = json!({ "status": { "addresses": [{ "type": "InternalIP", "address": address }] } });
        scene.api.patch_status(&scene.lab, "n2", &status);
    };
    let listener = || scene.lab.sh("n2", "ss -Hxlp src /run/weft/weft.sock");
    let before = listener();
    // An address that the machine has not changes nothing but what is told.
    say("192.0.2.99");
    scene.wait("the Node hears of it", || {
        scene.is_told(
            "n2",
            "WeftNodeAddress",
            "192.0.2.99, which its underlay has not, and weft uses 192.0.2.2",
        )
    });
    scene.lab.ping_all();
    // The machine moves first, as with DHCP, and the kubelet tells it a moment later.
    say("192.0.2.2");
    scene.lab.sh("n2", "ip address del 192.0.2.2/24 dev eth0; ip address add 192.0.2.102/24 dev eth0");
    scene.wait("the Node hears that its address is missed", || {
        scene.is_told(
            "n2",
            "WeftMachine",
            "no device has the address 192.0.2.2 that the Node of this node has",
        )
    });
    say("192.0.2.102");
    let uses = |node: &str| scene.lab.sh(node, "bridge fdb show dev weft-vx4").contains("dst 192.0.2.102");
    scene.wait("the kernel of the peer sends to the new address", || uses("n1"));
    scene.lab.meet();
    assert_eq!(listener(), before, "the daemon is the same");
    scene.wait("the lease says where it gossips", || {
        let leases = scene.api.get(&scene.lab, &["podsubnets"]);
        leases["items"].to_string().contains("192.0.2.102:7117")
    });
    scene.wait("nothing is told any more", || {
        !scene.warns("n2", "192.0.2.99") && !scene.warns("n2", "no device has the address")
    });
}

#[test]
fn pod_cidrs_are_leased_and_their_trouble_told() {
    let Some(scene) = Scene::quiet("kubecidr", "node-podcidr") else { return };
    // The lab's own start waits until a node is ready.
    let daemon = |node: &&str| scene.lab.background(*node, &["weftd", "--config", "/etc/weft/weft.toml"]);
    let _daemons: Vec<_> = NODES.iter().map(daemon).collect();
    scene.wait("the lack of it is told", || scene.is_told("n1", "WeftPodCIDR", "--allocate-node-cidrs=true"));
    scene.wait("and is in the condition", || {
        let condition = scene.condition("n1");
        condition["status"] == "True" && condition["message"].to_string().contains("has no spec.podCIDRs")
    });
    for (node, cidr) in [("n1", "10.32.71.0/24"), ("n2", "10.32.72.0/24")] {
        let patch = json!({ "spec": { "podCIDR": cidr, "podCIDRs": [cidr] } }).to_string();
        scene.api.kubectl(&scene.lab, &["patch", "node", node, "-p", &patch]);
    }
    scene.wait_until_ready();
    assert_eq!(scene.status("n1")["subnets"], json!(["10.32.71.0/24"]));
    scene.wait("the condition follows", || scene.condition("n1")["status"] == "False");
    scene.add_pods();
    assert!(scene.lab.ip("n2", "a").to_string().starts_with("10.32.72."));
    scene.lab.meet();
    scene.wait("that a family is missing is told", || {
        scene.is_told("n1", "WeftPodCIDR", "has no IPv6 subnet though cluster.cidrs has IPv6 ranges: give")
    });

    // podCIDRs never change but with the Node, which a person or a controller may make anew.
    let anew = |cidr: &str| {
        scene.api.kubectl(&scene.lab, &["delete", "node", "n2"]);
        scene.api.make_node(&scene.lab, "n2", &json!({ "podCIDR": cidr, "podCIDRs": [cidr] }));
    };
    anew("10.32.73.0/24");
    scene.wait("the change is told", || {
        scene.is_told(
            "n2",
            "WeftPodSubnet",
            "no longer has 10.32.72.0/24, which this node holds; it is kept while pods use it, drain",
        )
    });
    scene.lab.ping_all();
    scene.lab.tell(Request::PodRemove { node: "n2".into(), pod: "a".into() });
    scene.wait("without pods the node has the new one", || {
        scene.status("n2")["subnets"] == json!(["10.32.73.0/24"])
    });
    anew("10.32.71.0/24");
    scene.wait("an overlap is told", || {
        scene.is_told(
            "n2",
            "WeftPodSubnet",
            "overlaps 10.32.71.0/24, which n1 leases: see that one controller",
        )
    });
    assert_eq!(scene.status("n1")["subnets"], json!(["10.32.71.0/24"]));
    assert_eq!(scene.status("n1")["ready"], true);
}

#[test]
fn what_is_not_permitted_is_named_verb_by_verb() {
    let Some(scene) = Scene::up("kuberbac") else { return };
    let role = json!({ "rules": [
        { "apiGroups": ["weft.dev"], "resources": ["podsubnets"], "verbs": ["get", "list", "watch", "create", "update"] },
        { "apiGroups": ["apiextensions.k8s.io"], "resources": ["customresourcedefinitions"], "verbs": ["get"] },
        { "apiGroups": [""], "resources": ["namespaces"], "verbs": ["get"] },
        { "apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"] },
        { "apiGroups": [""], "resources": ["events"], "verbs": ["create", "patch"] },
    ] });
    scene.api.kubectl(&scene.lab, &["patch", "clusterrole", "weft", "--type=merge", "-p", &role.to_string()]);
    scene.lab.kill("n1");
    scene.lab.start("n1");
    let missing = "may not delete podsubnets.weft.dev, patch nodes/status: apply weft's rbac.yaml";
    scene.wait("status names them", || scene.warns("n1", missing));
    scene.wait("an Event names them", || scene.is_told("n1", "WeftMissingPermission", missing));
    let events = scene.events("n1").len();
    assert!(events <= 6, "{:?}", scene.events("n1"));
}

#[test]
fn a_node_that_may_not_read_the_keys_says_so_and_comes_up_once_it_may() {
    let Some(scene) = Scene::quiet("kubefirstkey", "weft-ipam") else { return };
    let role = scene.api.get(&scene.lab, &["role", "weft", "-n", "weft-system"]);
    scene.api.kubectl(&scene.lab, &["delete", "role", "weft", "-n", "weft-system"]);
    let daemon = |node: &&str| scene.lab.background(*node, &["weftd", "--config", "/etc/weft/weft.toml"]);
    let _daemons: Vec<_> = NODES.iter().map(daemon).collect();
    let missing =
        "may not get secrets in weft-system, watch secrets in weft-system, create secrets in weft-system:";
    scene.wait("each Node hears of it", || {
        NODES.iter().all(|node| scene.is_told(node, "WeftMissingPermission", missing))
    });
    assert!(
        scene.is_told("n1", "WeftClusterKey", "does not let weft get secrets"),
        "{:?}",
        scene.events("n1")
    );
    let rules = json!({ "apiVersion": role["apiVersion"], "kind": "Role", "rules": role["rules"],
        "metadata": { "name": "weft", "namespace": "weft-system" } });
    scene.api.apply(&scene.lab, &rules);
    scene.wait("the daemons answer", || {
        NODES
            .iter()
            .all(|node| scene.lab.exec(*node, &["weft", "status"]).status.code().is_some_and(|code| code < 2))
    });
    scene.wait_until_ready();
    assert_eq!(scene.ids("n1"), scene.ids("n2"));
}

/// Gives n2 the state of n1, as a disk image would: its keys, and what it remembers.
fn clone_n1(scene: &Scene) {
    scene.lab.stop("n2");
    scene.lab.sh("n1", "cp -r /var/lib/weft /run/weft-lab/shared/image");
    // The journal of the pods is of another boot.
    let copy = "rm -rf /var/lib/weft/*; cp -r /run/weft-lab/shared/image/. /var/lib/weft/; rm -f /var/lib/weft/pods.db*";
    scene.lab.sh("n2", copy);
}

#[test]
fn a_second_machine_under_a_nodes_name_is_named_on_that_node() {
    let Some(scene) = Scene::up("kubetwin") else { return };
    clone_n1(&scene);
    let name = "sed -i 's/name = \"n2\"/name = \"n1\"/; s/weft-n2.kubeconfig/weft-n1.kubeconfig/' /etc/weft/weft.toml";
    scene.lab.sh("n2", name);
    let twin = scene.lab.background("n2", &["weftd", "--config", "/etc/weft/weft.toml"]);
    scene.wait("the Node hears of it", || {
        scene.events("n1").iter().any(|(reason, message)| {
            ["WeftDuplicateNode", "WeftEnded"].contains(&reason.as_str())
                && message.contains("another node named n1")
                && message.contains("node.name")
        })
    });
    drop(twin);
}

#[test]
fn a_machine_from_the_image_of_another_node_takes_nothing_from_it() {
    let Some(scene) = Scene::up("kubeimage") else { return };
    let subnets = scene.status("n1")["subnets"].clone();
    scene.lab.tell(Request::PodRemove { node: "n2".into(), pod: "a".into() });
    clone_n1(&scene);
    let _daemon = scene.lab.background("n2", &["weftd", "--config", "/etc/weft/weft.toml"]);
    scene.wait("n2 has a subnet of its own", || {
        scene.lab.exec("n2", &["weft", "status"]).status.code().is_some_and(|code| code < 2)
            && scene.status("n2")["ready"] == true
            && scene.status("n2")["subnets"] != subnets
    });
    assert_eq!(scene.status("n1")["subnets"], subnets);
    assert_eq!(scene.status("n1")["ready"], true);
    scene.wait("its Node hears that it had one of n1", || scene.is_told("n2", "WeftPodSubnet", "lost to n1"));
    scene.lab.tell(Request::PodAdd { node: "n2".into(), pod: "b".into() });
    scene.lab.meet();
}
