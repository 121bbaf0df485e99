//! How long CNI calls take as whole processes, alone and twenty at once: weft-cni against Debian's `bridge` with
//! `host-local`, with and without `ipMasq`.
//!
//! `cargo bench -p weft-tests --bench cni`; contenders take turns call by call. The executables come from WEFT_BIN_DIR.
#![allow(clippy::unwrap_used, reason = "a failure ends the measurement")]
#![allow(dead_code, reason = "the tests use more of the node")]

#[path = "../cni/node.rs"]
mod node;

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};
use weft_tests::figures::{Figures, interleaved, median};

use node::{Node, Pod, SUBNETS, executable};

/// So many calls are made one after another in a round.
const CALLS: usize = 15;
/// So many are made at once.
const AT_ONCE: usize = 20;
const ROUNDS: usize = 5;

struct Contender {
    name: &'static str,
    node: Node,
    plugin: PathBuf,
    config: Value,
}

/// Debian's plugins on a node of their own.
fn reference(name: &'static str, masquerade: bool) -> Contender {
    let node = Node::new();
    let ranges = SUBNETS.map(|subnet| json!([{"subnet": subnet}]));
    let config = json!({
        "cniVersion": "1.0.0", "name": "podnet", "type": "bridge", "bridge": "weft0", "isGateway": true,
        "isDefaultGateway": true, "hairpinMode": true, "mtu": 1450, "ipMasq": masquerade,
        "ipam": {"type": "host-local", "dataDir": node.dir.join("host-local"), "ranges": ranges},
    });
    Contender { name, node, plugin: "/usr/lib/cni/bridge".into(), config }
}

impl Contender {
    /// Makes a call and returns how long it took in milliseconds; CHECK and DEL want what ADD answered.
    fn call(&self, verb: &str, container: &str, pod: &Pod, answer: Option<&Value>) -> (f64, Value) {
        let mut config = self.config.clone();
        if let Some(answer) = answer {
            config["prevResult"] = answer.clone();
        }
        let began = Instant::now();
        let output = self.node.cni(Path::new(&self.plugin), verb, container, "eth0", &pod.netns(), &config);
        let took = began.elapsed().as_secs_f64() * 1e3;
        (took, output.unwrap_or_else(|error| panic!("{}: {verb}: {error}", self.name)))
    }

    fn measure(&self, round: usize, figures: &mut Figures) {
        let mut times = [vec![], vec![], vec![]];
        for call in 0..CALLS {
            let (pod, container) = (Pod::new(), format!("r{round}c{call}"));
            let (add, answer) = self.call("ADD", &container, &pod, None);
            let (check, _) = self.call("CHECK", &container, &pod, Some(&answer));
            let (del, _) = self.call("DEL", &container, &pod, Some(&answer));
            for (times, time) in times.iter_mut().zip([add, check, del]) {
                times.push(time);
            }
        }
        for (verb, times) in ["ADD", "CHECK", "DEL"].iter().zip(&times) {
            figures.add(&format!("{verb} {}", self.name), median(times));
        }
        let pods: Vec<Pod> = (0..AT_ONCE).map(|_| Pod::new()).collect();
        let mut answers = vec![None; AT_ONCE];
        for verb in ["ADD", "DEL"] {
            let began = Instant::now();
            answers = std::thread::scope(|scope| {
                let call = |(place, pod)| {
                    let answer: Option<Value> = std::mem::take(&mut answers[place]);
                    let container = format!("r{round}p{place}");
                    scope.spawn(move || self.call(verb, &container, pod, answer.as_ref()).1)
                };
                let calls: Vec<_> = pods.iter().enumerate().map(call).collect();
                calls.into_iter().map(|call| Some(call.join().expect("the call succeeds"))).collect()
            });
            figures.add(&format!("{verb} x{AT_ONCE} {}", self.name), began.elapsed().as_secs_f64() * 1e3);
        }
    }
}

fn main() {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP: needs root to make network namespaces");
        return;
    }
    let weft = Node::new();
    let config = weft.config("1.0.0");
    let mut contenders = [
        Contender { name: "weft-cni", node: weft, plugin: executable("weft-cni"), config },
        reference("bridge + host-local", false),
        reference("bridge + host-local with ipMasq", true),
    ];
    let mut figures = Figures::default();
    interleaved(ROUNDS, &mut contenders, |round, contender| contender.measure(round, &mut figures));
    let many = [format!("ADD x{AT_ONCE}"), format!("DEL x{AT_ONCE}")];
    let verbs = ["ADD", "CHECK", "DEL", &many[0], &many[1]];
    println!("milliseconds, nsenter and fork included; x{AT_ONCE}: until the last of so many is done");
    for verb in verbs {
        for contender in &contenders {
            println!("{verb} {}: {}", contender.name, figures.spread(&format!("{verb} {}", contender.name)));
        }
    }
    for verb in verbs {
        for other in &contenders[1..] {
            let name = format!("{verb}: weft-cni / {}", other.name);
            figures.print_ratio(&name, &format!("{verb} weft-cni"), &format!("{verb} {}", other.name));
        }
    }
}
