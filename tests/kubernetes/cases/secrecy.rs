//! What crosses between nodes where everything is to be encrypted.

use weft_tests::lab::Capture;

use crate::scene::Scene;

/// Whatever has a pod's address outside of a tunnel, and VXLAN.
const CLEAR: &str = "net 10.244.0.0/16 or net fd00:10:244::/48 or udp port 8472";
const SECRET: &str = "a-secret-that-no-one-else-may-read";

pub fn nothing_is_in_clear_between_nodes(scene: &Scene<'_>) {
    let pods = scene.servers("web", 4);
    let from = &pods[0];
    let client = scene.inside(from);
    let lab = scene.cluster.lab();
    let underlay = Capture::start(lab, &from.node, "eth0");
    // The same packets before they are encrypted, so that the filter is known to find them.
    let bridge = Capture::start(lab, &from.node, "weft0");
    for to in pods.iter().filter(|to| to.node != from.node) {
        for ip in &to.ips {
            for _ in 0..10 {
                assert_eq!(scene.ask(&client, *ip, 8080, &format!("/echo?msg={SECRET}")), SECRET);
            }
        }
    }
    let clear = bridge.finish(100, CLEAR, SECRET);
    assert!(clear.matching >= 100 && clear.secret, "on the bridge: {clear:?}");
    let found = underlay.finish(100, CLEAR, SECRET);
    assert!(found.matching == 0 && !found.secret, "on the underlay: {found:?}");
}
