//! Pod to pod over weft's VXLAN, against the same VXLAN made by hand with iproute2: `make bench-vxlan`.
//!
//! One lab has all: n1 and n2 run weft, n3 and n4 have what a careful person sets up, over the same underlay, and n5 and
//! n6 have that and masquerade what leaves the cluster, as weft does. They take turns. Every load ends by itself.

use std::time::Duration;

use serde_json::Value;
use weft_tests::figures::{Figures, interleaved};
use weft_tests::lab::{Background, Lab, LabOptions};

const ROUNDS: usize = 5;
/// How long a stream lasts.
const SECONDS: u64 = 4;

const FIGURES: [(&str, &str); 6] = [
    ("TCP 1", "Gbit/s"),
    ("TCP 8", "Gbit/s"),
    ("UDP 64", "1,000 datagrams/s"),
    ("latency", "ms"),
    ("CPU 1", "CPU s/GB"),
    ("CPU 8", "CPU s/GB"),
];
const HANDS: [&str; 2] = ["by hand", "by hand, masquerading"];

/// A bridge, a VXLAN device that learns nothing, a permanent neighbour and forwarding entry, a route, and a pod.
/// Arguments: own number, other number (in 10.99.N.0/24 and 192.0.2.N).
const BY_HAND: &str = r#"
set -eu
own=$0 other=$1
ip link add hvx type vxlan id 9 dstport 4789 local 192.0.2.$own dev eth0 nolearning
ip link set hvx address 02:99:00:00:00:0$own mtu 1450 up
ip link add hbr type bridge
ip link set hbr mtu 1450 up
ip address add 10.99.$own.1/24 dev hbr
bridge fdb append 02:99:00:00:00:0$other dev hvx dst 192.0.2.$other
ip neighbour add 10.99.$other.0 lladdr 02:99:00:00:00:0$other dev hvx nud permanent
ip route add 10.99.$other.0/24 via 10.99.$other.0 dev hvx onlink
sysctl -qw net.ipv4.ip_forward=1
ip netns add h
ip link add hveth type veth peer name eth0 netns h
ip link set hveth master hbr mtu 1450 up
ip -n h link set eth0 mtu 1450 up
ip -n h address add 10.99.$own.2/24 dev eth0
ip -n h route add default via 10.99.$own.1
"#;

/// What lets the pods above reach the world outside.
const MASQUERADE: &str = "nft -f - <<'END'
table ip hand {
  chain postrouting {
    type nat hook postrouting priority srcnat
    ip saddr 10.99.0.0/16 ip daddr != 10.99.0.0/16 masquerade fully-random
  }
}
END";

/// Two pods on two nodes with a network between them.
struct Pair {
    name: &'static str,
    /// Node and name of the namespace: the first sends.
    ends: [(&'static str, &'static str); 2],
    to: String,
}

impl Pair {
    fn words<'a>(&'a self, end: usize, words: &[&'a str]) -> Vec<&'a str> {
        [&["ip", "netns", "exec", self.ends[end].1], words].concat()
    }

    /// Starts a server that ends after one client, or after a minute.
    fn serve(&self, lab: &Lab) -> Background {
        let server = self.words(1, &["timeout", "60", "iperf3", "-s", "-1", "--forceflush"]);
        lab.background(self.ends[1].0, &server)
    }

    fn client(&self, lab: &Lab, words: &[&str]) -> Value {
        let server = self.serve(lab);
        let base = ["iperf3", "-c", &self.to, "--connect-timeout", "3000", "-J", "-t"];
        let seconds = SECONDS.to_string();
        let all = [&base[..], &[&seconds], words].concat();
        let mut report = Value::Null;
        // The server may not listen yet.
        for _ in 0..50 {
            let output = lab.exec(self.ends[0].0, &self.words(0, &all));
            report = serde_json::from_slice(&output.stdout).unwrap_or_default();
            if report.get("error").is_none() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(report.get("error").is_none(), "{}: {}", self.name, report["error"]);
        server.finish();
        report
    }

    fn measure(&self, lab: &Lab, figures: &mut Figures) {
        let mut add = |what: &str, figure: f64| figures.add(&format!("{what} {}", self.name), figure);
        for streams in ["1", "8"] {
            let before = busy();
            let report = self.client(lab, &["-P", streams]);
            let sum = &report["end"]["sum_received"];
            add(&format!("TCP {streams}"), number(&sum["bits_per_second"]) / 1e9);
            add(&format!("CPU {streams}"), (busy() - before) / (number(&sum["bytes"]) / 1e9));
        }
        let report = self.client(lab, &["-u", "-l", "64", "-b", "0"]);
        // What the server got: its report counts sent and lost.
        let sum = &report["end"]["sum"];
        let received = number(&sum["packets"]) - number(&sum["lost_packets"]);
        add("UDP 64", received / number(&sum["seconds"]) / 1e3);
        let ping = self.words(0, &["ping", "-q", "-n", "-i", "0.002", "-c", "1500", "-w", "20", &self.to]);
        let text = lab.run(self.ends[0].0, &ping);
        let line = text.lines().find(|line| line.starts_with("rtt")).expect("ping sums up");
        let mean = line.split('/').nth(4).and_then(|mean| mean.parse().ok()).expect("the mean round trip");
        add("latency", mean);
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("iperf3 reports a number")
}

/// The seconds that all processors of the machine have been busy.
fn busy() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").expect("/proc is mounted");
    let line = stat.lines().next().expect("the first line is of all processors");
    let ticks: Vec<f64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal: proc(5); a tick is a hundredth of a second.
    (ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6]) / 100.0
}

fn main() {
    let lab = Lab::up(LabOptions::new("bench-vxlan").nodes(6).started(2).pods(1));
    for (own, other) in [("3", "4"), ("4", "3"), ("5", "6"), ("6", "5")] {
        lab.run(format!("n{own}").as_str(), &["sh", "-c", BY_HAND, own, other]);
    }
    for node in ["n5", "n6"] {
        lab.sh(node, MASQUERADE);
    }
    let by_hand = |name, ends: [&'static str; 2], to: &str| Pair {
        name,
        ends: ends.map(|node| (node, "h")),
        to: to.to_owned(),
    };
    let mut pairs = [
        Pair { name: "weft", ends: [("n1", "a"), ("n2", "a")], to: lab.ip("n2", "a").to_string() },
        by_hand(HANDS[0], ["n3", "n4"], "10.99.4.2"),
        by_hand(HANDS[1], ["n5", "n6"], "10.99.6.2"),
    ];
    let mut figures = Figures::default();
    interleaved(ROUNDS, &mut pairs, |_, pair| pair.measure(&lab, &mut figures));
    for (what, unit) in FIGURES {
        for pair in &pairs {
            println!("{what} {}: {:.3} {unit}", pair.name, figures.spread(&format!("{what} {}", pair.name)));
        }
    }
    for hand in HANDS {
        for (what, _) in FIGURES {
            let [ours, theirs] = ["weft", hand].map(|name| format!("{what} {name}"));
            figures.print_ratio(&format!("{what}, weft / {hand}:"), &ours, &theirs);
        }
    }
}
