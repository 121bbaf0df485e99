//! Many pods that come and go.

use serde_json::json;

use crate::scene::{PATIENCE, PAUSE, Scene, deployment_of};

const PODS: usize = 60;
const WAVES: usize = 3;

pub fn sixty_pods_in_waves_leak_no_address(scene: &Scene<'_>) {
    let others = || {
        let spaces = scene.cluster.objects(&["namespaces"]);
        let spaces = spaces["items"].as_array().cloned().unwrap_or_default();
        spaces.iter().filter(|space| space["status"]["phase"] == "Terminating").count()
    };
    scene.until("what earlier cases left is gone", || others() == 0);
    // What the network says, and what is there: network namespaces, and addresses that pods have.
    let held = || -> Vec<(usize, usize)> {
        let nodes = scene.cluster.nodes();
        nodes
            .iter()
            .map(|node| {
                let spaces = scene.cluster.lab().sh(node.as_str(), "ls /run/netns | wc -l");
                (
                    scene.network.addresses_in_use(scene.cluster, node),
                    spaces.trim().parse().expect("a number"),
                )
            })
            .collect()
    };
    let before = held();
    scene.apply(&[deployment_of("wave", 0, json!({ "name": "pause", "image": PAUSE }))]);
    for wave in 1..=WAVES {
        scene.kubectl(&["scale", "deployment/wave", &format!("--replicas={PODS}")]);
        scene.await_deployment("wave");
        let pods = scene.pods("wave");
        assert_eq!(pods.len(), PODS);
        let mut ips: Vec<_> = pods.iter().flat_map(|pod| pod.ips.clone()).collect();
        ips.sort();
        ips.dedup();
        assert_eq!(ips.len(), 2 * PODS, "wave {wave}: every pod has an address of its own in each family");
        scene.kubectl(&["scale", "deployment/wave", "--replicas=0"]);
        let bound = format!("--timeout={}s", PATIENCE.as_secs());
        scene.kubectl(&["wait", "--for=delete", "pod", "-l", "app=wave", &bound]);
        scene.until(&format!("wave {wave} left nothing"), || held() == before);
    }
}
