//! weft's DaemonSet is restarted and upgraded while pods talk.

use serde_json::Value;
use weft_tests::kubernetes::WEFT_IMAGE;

use crate::scene::{Client, PATIENCE, Scene};

/// What an upgrade is to; the same program under another name, since there is no later one.
const NEXT_IMAGE: &str = "ghcr.io/weft-net/weft:next";

pub fn a_rolling_restart_loses_nothing(scene: &Scene<'_>) {
    while_pods_talk(scene, || {
        scene.cluster.kubectl(&["-n", "weft-system", "rollout", "restart", "daemonset/weft"]);
    });
}

pub fn an_upgrade_loses_nothing(scene: &Scene<'_>) {
    let ctr = scene.cluster.program("ctr");
    for node in scene.cluster.nodes() {
        let words = [&ctr, "-n", "k8s.io", "images", "tag", "--local", WEFT_IMAGE, NEXT_IMAGE];
        scene.cluster.lab().run(node.as_str(), &words);
    }
    while_pods_talk(scene, || {
        let all = format!("*={NEXT_IMAGE}");
        scene.cluster.kubectl(&["-n", "weft-system", "set", "image", "daemonset/weft", &all]);
    });
    let pods = scene.cluster.objects(&["pods", "-n", "weft-system", "-l", "app.kubernetes.io/name=weft"]);
    for pod in pods["items"].as_array().expect("a list") {
        assert_eq!(pod["spec"]["containers"][0]["image"], NEXT_IMAGE);
    }
}

/// The daemons of all nodes, by the kernel's word. The machine's processes are in sight, also those of other labs.
fn daemons(scene: &Scene<'_>) -> Vec<String> {
    let of_node = "own=$(readlink /proc/self/ns/net); for pid in $(pgrep -x weftd); do \
                   [ \"$(readlink /proc/$pid/ns/net)\" = \"$own\" ] && echo $pid; done; true";
    let nodes = scene.cluster.nodes();
    let all = nodes.iter().map(|node| scene.cluster.lab().sh(node.as_str(), of_node));
    all.flat_map(|said| said.lines().map(str::to_owned).collect::<Vec<_>>()).collect()
}

fn while_pods_talk(scene: &Scene<'_>, change: impl FnOnce()) {
    let pods = scene.servers("web", 2);
    let clients: Vec<Client> = pods.iter().map(|pod| scene.inside(pod)).collect();
    let others = [&pods[1], &pods[0]];
    let pings: Vec<_> = clients
        .iter()
        .zip(others)
        .flat_map(|(client, to)| to.ips.iter().map(move |ip| (format!("to {ip}"), scene.ping(client, *ip))))
        .collect();
    let server = scene.background(&clients[1], &["iperf3", "-s", "-1"]);
    let to = pods[1].ips[0].to_string();
    scene.until("the server of the long flow listens", || {
        let listeners = scene.exec(&clients[1], &["ss", "-Hltn", "sport = :5201"]);
        !listeners.stdout.is_empty()
    });
    // Longer than any change takes; it is interrupted.
    let flow = scene.background(&clients[0], &["iperf3", "-J", "-b", "8M", "-t", "600", "-c", &to]);

    let before = daemons(scene);
    change();
    let bound = format!("--timeout={}s", 2 * PATIENCE.as_secs());
    scene.cluster.kubectl(&["-n", "weft-system", "rollout", "status", "daemonset/weft", &bound]);
    scene.until("every node has another daemon, and one", || {
        let now = daemons(scene);
        now.len() == before.len() && now.iter().all(|pid| !before.contains(pid))
    });
    // Everything goes on for a while after it.
    scene.exec(&clients[0], &["ping", "-n", "-q", "-i", "0.01", "-c", "300", &to]);

    let report: Value = serde_json::from_str(&flow.interrupt()).expect("iperf3 reports in JSON");
    drop(server);
    let intervals = report["intervals"].as_array().cloned().unwrap_or_default();
    let bytes: Vec<u64> = intervals.iter().filter_map(|one| one["sum"]["bytes"].as_u64()).collect();
    println!("long flow: {} intervals, {} sent again", bytes.len(), report["end"]["sum_sent"]["retransmits"]);
    // The last one was cut short.
    let whole = &bytes[..bytes.len().saturating_sub(1)];
    assert!(whole.last().is_some_and(|last| *last > 0), "the flow ended before the change did: {bytes:?}");
    let mut losses = Vec::new();
    for (what, ping) in pings {
        let (sent, lost) = ping.stop();
        println!("{what}: {} of {sent} lost", lost.len());
        if !lost.is_empty() {
            losses.push(format!("{what}: {lost:?} of {sent}"));
        }
    }
    assert!(losses.is_empty(), "{losses:#?}");
}
