//! Every pair of kinds of NAT (RFC 4787): whether pods reach each other directly or by a relay, how long the first ping takes, and what
//! the path carries next to one without NAT: `make bench-nat`.
//!
//! Each pair has a lab of its own: n1 and n2 are open, a site each; n3 and n4 are behind the two routers. The streams take turns in one
//! lab. Every load ends by itself.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use serde_json::Value;
use weft_tests::figures::{Figures, interleaved};
use weft_tests::lab::{Families, Lab, LabOptions, Nat, wait_until};

const KINDS: [(Nat, &str); 5] = [
    (Nat::FullCone, "full cone"),
    (Nat::AddressRestricted, "address-restricted"),
    (Nat::PortRestricted, "port-restricted"),
    (Nat::Symmetric, "symmetric"),
    (Nat::Double, "double"),
];
/// What a relay may carry by default is a policy (docs/config.md): here it carries what it can.
const TUNNELS: &str = "[encryption]\npolicy = \"cross-site\"\nimplementation = \"user-space\"\n[relay]\npair_mbit = 100000\ntotal_mbit = 100000";
const ROUNDS: usize = 3;
/// Seconds of a stream, and of the pings in which a path settles: a direct one is tried anew after five.
const STREAM: &str = "2";
const SETTLES: &str = "12";

/// Gbit/s of one TCP stream between the first pods of two nodes.
fn stream(lab: &Lab, from: &str, to: &str) -> f64 {
    let server =
        lab.background(format!("{to}/a").as_str(), &["timeout", "30", "iperf3", "-s", "-1", "--forceflush"]);
    let address = lab.ip(to, "a").to_string();
    let mut report = Value::Null;
    wait_until("iperf3 has a server", Duration::from_secs(20), || {
        let words = ["iperf3", "-c", &address, "--connect-timeout", "3000", "-J", "-t", STREAM];
        let output = lab.exec(format!("{from}/a").as_str(), &words);
        report = serde_json::from_slice(&output.stdout).unwrap_or_default();
        report.get("error").is_none()
    });
    server.finish();
    report["end"]["sum_received"]["bits_per_second"].as_f64().expect("iperf3 reports a number") / 1e9
}

/// By which way a node reaches another.
fn way(lab: &Lab, node: &str, other: &str) -> String {
    let peers = lab.weft(node, &["peers"])["peers"].as_array().cloned().unwrap_or_default();
    let peer = peers.into_iter().find(|peer| peer["node"] == other).unwrap_or_default();
    if peer["transport"] == "relay" { "relayed".into() } else { "direct".into() }
}

fn measure((one, one_name): (Nat, &str), (other, other_name): (Nat, &str)) -> String {
    let options = LabOptions::new("bench-nat").nodes(4).sites(4).pods(1).overlay(Families::V4);
    let lab = Lab::up(LabOptions::nat(options, &[Nat::None, Nat::None, one, other]).config(TUNNELS));
    let address = lab.ip("n4", "a").to_string();
    let began = Instant::now();
    // It sends until one is answered.
    lab.run("n3/a", &["ping", "-n", "-i", "0.02", "-c", "1", "-w", "60", &address]);
    let first = began.elapsed();
    lab.exec("n3/a", &["ping", "-n", "-q", "-i", "0.1", "-w", SETTLES, &address]);
    let ways = [way(&lab, "n3", "n4"), way(&lab, "n4", "n3")];
    let way = if ways[0] == ways[1] { ways[0].clone() } else { ways.join(" and ") };
    let mut figures = Figures::default();
    interleaved(ROUNDS, &mut [("n1", "n2"), ("n3", "n4")], |_, (from, to)| {
        figures.add(from, stream(&lab, from, to));
    });
    let ratio = figures.ratio("n3", "n1");
    eprintln!("{one_name} with {other_name}: {way}, {:.1} s, {ratio}", first.as_secs_f64());
    format!("| {one_name} | {other_name} | {way} | {:.1} | {ratio} |", first.as_secs_f64())
}

fn main() {
    let mut table = String::from(
        "| one | other | way | first ping (s) | TCP, ratio to a path without NAT |\n|---|---|---|---|---|\n",
    );
    for (place, one) in KINDS.into_iter().enumerate() {
        for other in KINDS.into_iter().skip(place) {
            writeln!(table, "{}", measure(one, other)).expect("a string can always be written to");
        }
    }
    print!("{table}");
}
