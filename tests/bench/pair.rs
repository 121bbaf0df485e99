//! Two pods on two nodes with some network between them, and how fast it is: iperf3 and ping.

use std::time::Duration;

use serde_json::Value;
use weft_tests::figures::{Figures, median};
use weft_tests::lab::{Background, Lab};

/// How long a stream lasts.
const SECONDS: u64 = 4;

/// What is measured, with its unit.
pub const FIGURES: [(&str, &str); 6] = [
    ("TCP 1", "Gbit/s"),
    ("TCP 8", "Gbit/s"),
    ("UDP 64", "1,000 datagrams/s"),
    ("latency", "ms"),
    ("CPU 1", "CPU s/GB"),
    ("CPU 8", "CPU s/GB"),
];

/// A bridge with one pod. Arguments: own number (in 10.99.N.0/24), MTU.
pub const POD: &str = r#"
set -eu
own=$0 mtu=$1
ip link add hbr type bridge
ip link set hbr mtu $mtu up
ip address add 10.99.$own.1/24 dev hbr
sysctl -qw net.ipv4.ip_forward=1
ip netns add h
ip link add hveth type veth peer name eth0 netns h
ip link set hveth master hbr mtu $mtu up
ip -n h link set eth0 mtu $mtu up
ip -n h address add 10.99.$own.2/24 dev eth0
ip -n h route add default via 10.99.$own.1
"#;

/// What lets the pods of [`POD`] reach the world outside.
pub const MASQUERADE: &str = "nft -f - <<'END'
table ip hand {
  chain postrouting {
    type nat hook postrouting priority srcnat
    ip saddr 10.99.0.0/16 ip daddr != 10.99.0.0/16 masquerade fully-random
  }
}
END";

/// Two pods on two nodes with a network between them.
pub struct Pair {
    /// Whose network it is.
    pub name: &'static str,
    /// Node and name of the namespace: the first sends.
    pub ends: [(&'static str, &'static str); 2],
    /// The address of the second.
    pub to: String,
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

    /// Measures everything once.
    pub fn measure(&self, lab: &Lab, figures: &mut Figures) {
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
        let ping = self.words(0, &["ping", "-n", "-i", "0.002", "-c", "1500", "-w", "20", &self.to]);
        let text = lab.run(self.ends[0].0, &ping);
        let time = |line: &str| line.split_once("time=")?.1.split_once(' ')?.0.parse().ok();
        add("latency", median(&text.lines().filter_map(time).collect::<Vec<f64>>()));
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

/// Prints each figure of each contender.
pub fn print(figures: &Figures, pairs: &[Pair]) {
    for (what, unit) in FIGURES {
        for pair in pairs {
            println!("{what} {}: {:.3} {unit}", pair.name, figures.spread(&format!("{what} {}", pair.name)));
        }
    }
}

/// Prints the first contender's figures as ratios to those of another.
pub fn print_ratios(figures: &Figures, ours: &str, theirs: &str) {
    for (what, _) in FIGURES {
        let [one, other] = [ours, theirs].map(|name| format!("{what} {name}"));
        figures.print_ratio(&format!("{what}, {ours} / {theirs}:"), &one, &other);
    }
}
