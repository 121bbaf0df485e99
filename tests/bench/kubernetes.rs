//! What weft costs a Kubernetes: from `kubectl apply` to Ready and to the first ping between pods, how long pods take to start
//! against the plugins `bridge` with `host-local` on the same nodes, and what weftd takes at rest and while pods come and go.
//!
//! `make bench-kubernetes`. For pods to start on the reference, its conflist is put before weft's, and taken away again; what is
//! timed is kubelet, containerd and the plugins together.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_tests::figures::{Figures, interleaved};
use weft_tests::kubernetes::{Cluster, ClusterOptions, Network, Reference, Weft, missing, until};
use weft_tests::lab::skip;

const PAUSE: &str = "registry.k8s.io/pause:3.10.2";
const PATIENCE: Duration = Duration::from_secs(180);
/// Clusters made for each network.
const CLUSTERS: usize = 3;
/// Rounds of pods on each network, and how many pods start at once.
const ROUNDS: usize = 5;
const PODS: usize = 10;
/// How long a daemon is watched at rest, and how many pods come and go after that.
const REST: Duration = Duration::from_secs(30);
const WAVE: usize = 60;

fn main() {
    // `cargo test --benches` asks for nothing to be measured.
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    if let Some(why) = missing() {
        return skip(&why);
    }
    let mut figures = Figures::default();
    let weft: &dyn Network = &Weft::Vxlan;
    let cluster = up(weft);
    weft.install(&cluster);
    ready(&cluster);
    // A node is Ready once it has a network configuration, a moment before its daemon runs.
    let bound = format!("--timeout={}s", PATIENCE.as_secs());
    cluster.kubectl(&["-n", "weft-system", "rollout", "status", "daemonset/weft", &bound]);
    at_rest_and_in_waves(&mut figures, &cluster);
    starts(&mut figures, &cluster);
    drop(cluster);
    interleaved(CLUSTERS, &mut [weft, &Reference], |_, network| from_nothing(&mut figures, *network));

    for name in figures.names() {
        println!("{name}: {:.2}", figures.spread(name));
    }
    for what in
        ["apply to Ready (s)", "apply to the first ping (s)", "10 pods to Ready (s)", "1 pod to Ready (s)"]
    {
        let series = |network: &str| format!("{network}: {what}");
        figures.print_ratio(&format!("{what}, weft / reference"), &series("weft"), &series("reference"));
    }
}

fn up(network: &dyn Network) -> Cluster {
    let mut options = ClusterOptions::new("bench");
    options.node_cidrs = network.wants_node_cidrs();
    let cluster = Cluster::up(options);
    // A pod without a controller is refused until then.
    until("the controllers have made the account of pods", PATIENCE, || {
        cluster.try_kubectl(&["get", "serviceaccount", "default"]).status.success()
    });
    network.deliver(&cluster);
    cluster
}

/// Takes a figure, and shows it: a whole run takes a quarter of an hour.
fn note(figures: &mut Figures, name: &str, figure: f64) {
    println!("  {name}: {figure:.2}");
    figures.add(name, figure);
}

fn ready(cluster: &Cluster) {
    let bound = format!("--timeout={}s", PATIENCE.as_secs());
    cluster.kubectl(&["wait", "--for=condition=Ready", "node", "--all", &bound]);
}

/// A new cluster: from the moment that the network is applied.
fn from_nothing(figures: &mut Figures, network: &dyn Network) {
    let cluster = up(network);
    let nodes = cluster.nodes();
    for node in &nodes {
        cluster.apply(&pod(&format!("first-{node}"), node).to_string());
    }
    let began = Instant::now();
    network.install(&cluster);
    ready(&cluster);
    note(figures, &format!("{}: apply to Ready (s)", network.name()), began.elapsed().as_secs_f64());
    let mut address = String::new();
    until("the second node's pod answers the first's", PATIENCE, || {
        if address.is_empty() {
            let path = "jsonpath={.status.podIP}";
            address = cluster.kubectl(&["get", "pod", &format!("first-{}", nodes[1]), "-o", path]);
        }
        // From the first node's only pod, by its network namespace.
        let script = "[ -n \"$0\" ] && nsenter --net=/run/netns/$(ls /run/netns | head -1) -- ping -n -q -c 1 -W 1 \"$0\"";
        cluster.lab().exec(nodes[0].as_str(), &["sh", "-c", script, &address]).status.success()
    });
    note(figures, &format!("{}: apply to the first ping (s)", network.name()), began.elapsed().as_secs_f64());
}

fn pod(name: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": { "app": "bench" } },
        "spec": {
            "nodeName": node, "terminationGracePeriodSeconds": 0,
            "containers": [{ "name": "pause", "image": PAUSE }],
        },
    })
}

/// weft's daemon on the first node: memory, and processor time in 30 s without a change and in a wave of pods.
fn at_rest_and_in_waves(figures: &mut Figures, cluster: &Cluster) {
    let node = &cluster.nodes()[0];
    let daemon = || {
        let script = "own=$(readlink /proc/self/ns/net); for pid in $(pgrep -x weftd); do \
                      [ \"$(readlink /proc/$pid/ns/net)\" = \"$own\" ] && echo $pid; done; true";
        cluster.lab().sh(node.as_str(), script).trim().to_owned()
    };
    let pid = daemon();
    let memory = || -> f64 {
        let text =
            cluster.lab().sh(node.as_str(), &format!("awk '/^VmRSS/ {{print $2}}' /proc/{pid}/status"));
        text.trim().parse::<f64>().expect("a number of KiB") / 1024.0
    };
    let ticks = || -> f64 {
        let text = cluster.lab().sh(node.as_str(), &format!("cut -d' ' -f14,15 /proc/{pid}/stat"));
        text.split_whitespace().map(|field| field.parse::<f64>().expect("a number of ticks")).sum()
    };
    let began = (Instant::now(), ticks());
    cluster.lab().run(node.as_str(), &["sleep", &REST.as_secs().to_string()]);
    let share = |began: (Instant, f64)| (ticks() - began.1) / began.0.elapsed().as_secs_f64();
    note(figures, "weftd at rest: % of a core", share(began));
    note(figures, "weftd at rest: MiB", memory());
    let began = (Instant::now(), ticks());
    many(cluster, WAVE, &cluster.nodes());
    note(figures, "weftd in a wave of 60 pods: MiB", memory());
    gone(cluster);
    note(figures, "weftd in a wave of 60 pods: % of a core", share(began));
    assert_eq!(daemon(), pid, "the daemon was another one in the end");
}

/// Starts so many pods at once and waits until all are Ready.
fn many(cluster: &Cluster, count: usize, nodes: &[String]) -> Duration {
    let items: Vec<Value> =
        (0..count).map(|index| pod(&format!("p{index}"), &nodes[index % nodes.len()])).collect();
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string();
    let bound = format!("--timeout={}s", PATIENCE.as_secs());
    let began = Instant::now();
    cluster.apply(&list);
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod", "-l", "app=bench", &bound]);
    began.elapsed()
}

fn gone(cluster: &Cluster) {
    cluster.kubectl(&["delete", "pod", "-l", "app=bench", "--wait"]);
}

/// Pods on one node, whose next pods get one network or the other.
fn starts(figures: &mut Figures, cluster: &Cluster) {
    let node = cluster.nodes()[..1].to_vec();
    let conflist = json!({
        "cniVersion": "1.0.0",
        "name": "reference",
        "plugins": [
            { "type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "hairpinMode": true,
              "ipam": { "type": "host-local",
                        "ranges": [[{ "subnet": "10.99.0.0/24" }], [{ "subnet": "fd00:99::/64" }]] } },
            { "type": "portmap", "capabilities": { "portMappings": true } },
            { "type": "bandwidth", "capabilities": { "bandwidth": true } },
        ],
    });
    let mut turns = [
        ("weft", "rm -f /etc/cni/net.d/05-reference.conflist"),
        ("reference", "cat > /etc/cni/net.d/05-reference.conflist"),
    ];
    interleaved(ROUNDS, &mut turns, |_, (network, script)| {
        let output = cluster.lab().feed(node[0].as_str(), &["sh", "-c", script], &conflist.to_string());
        assert!(output.status.success());
        // containerd reads the directory when it changes; a pod tells which network is the next one's.
        until("the next pods get the network", PATIENCE, || {
            many(cluster, 1, &node);
            let address = cluster.kubectl(&["get", "pod", "p0", "-o", "jsonpath={.status.podIP}"]);
            gone(cluster);
            address.starts_with("10.99.") == (*network == "reference")
        });
        for (count, what) in [(1, "1 pod to Ready (s)"), (PODS, "10 pods to Ready (s)")] {
            note(figures, &format!("{network}: {what}"), many(cluster, count, &node).as_secs_f64());
            gone(cluster);
        }
    });
    cluster.lab().run(node[0].as_str(), &["rm", "-f", "/etc/cni/net.d/05-reference.conflist"]);
}
