//! How long one CNI call takes as a whole process: weft-cni against Debian's `bridge` with `host-local`.
//!
//! `cargo bench -p weft-tests --bench cni` prints the medians of 30 calls, three times, interleaved. The executables come
//! from WEFT_BIN_DIR.
#![allow(clippy::unwrap_used, reason = "a failure ends the measurement")]
#![allow(dead_code, reason = "the tests use more of the node")]

#[path = "../cni/node.rs"]
mod node;

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};

use node::{Node, Pod, SUBNETS, executable};

const CALLS: usize = 30;

fn main() {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP: needs root to make network namespaces");
        return;
    }
    let nodes = [Node::new(), Node::new()];
    let ranges = SUBNETS.map(|subnet| json!([{"subnet": subnet}]));
    let reference = json!({
        "cniVersion": "1.0.0", "name": "podnet", "type": "bridge", "bridge": "weft0", "isGateway": true,
        "isDefaultGateway": true, "hairpinMode": true, "mtu": 1450,
        "ipam": {"type": "host-local", "dataDir": nodes[1].dir.join("host-local"), "ranges": ranges},
    });
    let single = json!({
        "cniVersion": "1.0.0", "name": "podnet4", "type": "bridge", "bridge": "weft0", "isGateway": true,
        "isDefaultGateway": true, "hairpinMode": true, "mtu": 1450,
        "ipam": {"type": "host-local", "dataDir": nodes[1].dir.join("host-local"), "ranges": [[{"subnet": SUBNETS[0]}]]},
    });
    let plugins: [(&str, &Node, PathBuf, Value); 3] = [
        ("weft-cni, IPv4 and IPv6", &nodes[0], executable("weft-cni"), nodes[0].config("1.0.0")),
        ("bridge + host-local, IPv4 and IPv6", &nodes[1], "/usr/lib/cni/bridge".into(), reference),
        ("bridge + host-local, IPv4 only", &nodes[1], "/usr/lib/cni/bridge".into(), single),
    ];
    println!("median of {CALLS} calls in ms, nsenter and fork included");
    println!("{:<36} {:>8} {:>8} {:>8}", "", "VERSION", "ADD", "DEL");
    let mut rounds = Vec::new();
    for _ in 0..3 {
        let mut times = vec![[vec![], vec![], vec![]]; plugins.len()];
        for call in 0..CALLS {
            for ((_, node, plugin, config), times) in plugins.iter().zip(&mut times) {
                let pod = Pod::new();
                let container = format!("c{call}");
                for (verb, times) in ["VERSION", "ADD", "DEL"].iter().zip(times) {
                    times.push(timed(node, plugin, verb, &container, &pod, config));
                }
            }
        }
        let mut medians = Vec::new();
        for ((name, ..), times) in plugins.iter().zip(&mut times) {
            let [version, add, del] = times.each_mut().map(|times| median(times));
            println!("{name:<36} {version:>8.2} {add:>8.2} {del:>8.2}");
            medians.push([add, del]);
        }
        rounds.push(medians);
    }
    for (place, verb) in ["ADD", "DEL"].into_iter().enumerate() {
        for (other, (name, ..)) in plugins.iter().enumerate().skip(1) {
            let mut ratios: Vec<f64> =
                rounds.iter().map(|round| round[0][place] / round[other][place]).collect();
            ratios.sort_by(f64::total_cmp);
            println!("{verb}: weft-cni / {name} = {:.2} [{:.2}..{:.2}]", ratios[1], ratios[0], ratios[2]);
        }
    }
}

fn timed(node: &Node, plugin: &Path, verb: &str, container: &str, pod: &Pod, config: &Value) -> f64 {
    let began = Instant::now();
    node.cni(plugin, verb, container, "eth0", &pod.netns(), config)
        .unwrap_or_else(|error| panic!("{verb}: {error}"));
    began.elapsed().as_secs_f64() * 1e3
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
