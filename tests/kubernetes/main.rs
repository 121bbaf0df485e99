//! A real Kubernetes in the lab, with the pod network under test on it: what a user's pods and Services do.
//!
//! A cluster takes its time to come up, so the cases of a suite share one, one after the other, each in a Kubernetes namespace of
//! its own. That is why this is not libtest: a cluster must be gone when the last case ended, however it ended. Arguments are
//! parts of the names of cases to run, as libtest takes them, `all` for all of them, and `--list`. Without a name those of
//! [`SHORT`] run.

mod cases;
mod scene;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use weft_tests::kubernetes::{Cluster, ClusterOptions, Network, Proxy, Reference, Weft, missing};
use weft_tests::lab::skip;

/// What runs when no case is named: each mode of kube-proxy, each backend, who chooses the blocks, an upgrade, and mistakes. Left
/// out is what takes long, the reference network, and the same cases a second time.
const SHORT: &[&str] = &[
    "weft_nftables::nodes_turn_ready",
    "weft_nftables::pods_reach",
    "weft_nftables::names_resolve",
    "weft_nftables::cluster_ips",
    "weft_nftables::node_ports",
    "weft_nftables::external_ips",
    "weft_nftables::host_ports",
    "weft_nftables::a_pod_is_made_anew",
    "weft_nftables::an_upgrade",
    "weft_iptables::",
    "weft_encrypted::nodes_turn_ready",
    "weft_encrypted::pods_reach",
    "weft_encrypted::nothing_is_in_clear",
    "weft_node_podcidr::nodes_turn_ready",
    "weft_node_podcidr::pods_",
    "weft_node_podcidr::a_node_is_deleted",
    "weft_node_podcidr::a_drained_node",
    "weft_node_podcidr::new_pods",
    "weft_trouble::",
];

/// A cluster, and what is tried on it.
struct Suite {
    name: &'static str,
    network: Box<dyn Network>,
    proxy: Proxy,
    nodes: usize,
    cases: Vec<cases::Case>,
}

fn suites() -> Vec<Suite> {
    vec![
        Suite {
            name: "reference_nftables",
            network: Box::new(Reference),
            proxy: Proxy::Nftables,
            nodes: 2,
            cases: cases::of_any_network(),
        },
        Suite {
            name: "reference_iptables",
            network: Box::new(Reference),
            proxy: Proxy::Iptables,
            nodes: 2,
            cases: cases::of_services(),
        },
        Suite {
            name: "weft_nftables",
            network: Box::new(Weft::Vxlan),
            proxy: Proxy::Nftables,
            nodes: 2,
            cases: cases::of_weft(),
        },
        Suite {
            name: "weft_iptables",
            network: Box::new(Weft::Vxlan),
            proxy: Proxy::Iptables,
            nodes: 2,
            cases: cases::of_services(),
        },
        Suite {
            name: "weft_encrypted",
            network: Box::new(Weft::Encrypted),
            proxy: Proxy::Nftables,
            nodes: 2,
            cases: cases::of_encrypted_weft(),
        },
        Suite {
            name: "weft_node_podcidr",
            network: Box::new(Weft::NodePodCidr),
            proxy: Proxy::Nftables,
            nodes: 3,
            cases: cases::of_node_podcidr(),
        },
        Suite {
            name: "weft_trouble",
            network: Box::new(Weft::Vxlan),
            proxy: Proxy::Nftables,
            nodes: 2,
            cases: cases::of_trouble(),
        },
    ]
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--nocapture").collect();
    let list = args.iter().any(|arg| arg == "--list");
    let mut filters: Vec<&str> =
        args.iter().map(String::as_str).filter(|arg| !arg.starts_with("--")).collect();
    match filters[..] {
        [] => filters = SHORT.to_vec(),
        ["all"] => filters.clear(),
        _ => {}
    }
    let mut suites = suites();
    for suite in &mut suites {
        let name = suite.name;
        suite.cases.push(cases::CONFORMANCE);
        suite.cases.retain(|(case, _)| {
            let full = format!("{name}::{case}");
            let asked_for =
                *case != cases::CONFORMANCE.0 || filters.iter().any(|filter| filter.contains(case));
            asked_for && (filters.is_empty() || filters.iter().any(|filter| full.contains(filter)))
        });
    }
    if list {
        for suite in &suites {
            suite.cases.iter().for_each(|(case, _)| println!("{}::{case}: test", suite.name));
        }
        return ExitCode::SUCCESS;
    }
    if let Some(why) = missing() {
        skip(&why);
        return ExitCode::SUCCESS;
    }
    let mut failed = Vec::new();
    let mut passed = 0;
    for suite in suites.into_iter().filter(|suite| !suite.cases.is_empty()) {
        let (good, bad) = run(&suite);
        passed += good;
        failed.extend(bad);
    }
    println!("\ntest result: {passed} passed; {} failed", failed.len());
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("failed:\n    {}", failed.join("\n    "));
    ExitCode::FAILURE
}

/// How many cases passed, and the names of those that did not.
fn run(suite: &Suite) -> (usize, Vec<String>) {
    let full = |case: &str| format!("{}::{case}", suite.name);
    let began = Instant::now();
    let made = catch_unwind(AssertUnwindSafe(|| {
        let mut options = ClusterOptions::new(&suite.name.replace('_', "-"));
        options.proxy = suite.proxy;
        options.nodes = suite.nodes;
        options.node_cidrs = suite.network.wants_node_cidrs();
        let cluster = Cluster::up(options);
        assert_eq!(cluster.ready_nodes(), 0, "a node is Ready though it has no pod network");
        suite.network.deliver(&cluster);
        suite.network.install(&cluster);
        cluster
    }));
    let Ok(cluster) = made else {
        return (0, suite.cases.iter().map(|(case, _)| full(case)).collect());
    };
    println!("{}: the cluster took {:.1} s", suite.name, began.elapsed().as_secs_f32());
    let mut failed = Vec::new();
    for (case, body) in &suite.cases {
        let began = Instant::now();
        let scene = scene::Scene::new(&cluster, suite.network.as_ref(), case);
        let result = catch_unwind(AssertUnwindSafe(|| body(&scene)));
        let took = began.elapsed().as_secs_f32();
        if result.is_ok() {
            println!("test {} ... ok ({took:.1} s)", full(case));
        } else {
            println!("test {} ... FAILED ({took:.1} s)\n{}", full(case), cluster.describe());
            failed.push(full(case));
        }
    }
    if !failed.is_empty() {
        cluster.show_logs();
    }
    if let Some(path) = std::env::var_os("WEFT_HOLD_WHILE") {
        println!("{}: held while {} exists", suite.name, path.display());
        while std::path::Path::new(&path).exists() {
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
    }
    (suite.cases.len() - failed.len(), failed)
}
