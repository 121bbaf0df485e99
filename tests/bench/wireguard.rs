//! Pod to pod over weft's user-space WireGuard, against the user-space implementations of others: `make bench-wireguard`.
//!
//! One lab has all, each on two nodes of its own over the same underlay with the same MTU, the same bridge and the same
//! kind of pod, and masquerades what leaves the cluster, as weft does. They take turns. Every load ends by itself; five
//! contenders take about six minutes. In the same rounds the cipher alone is measured, which no path can do without.
//! `BENCH_PEERS=wireguard-go,gotatun` names fewer.

#[path = "cipher.rs"]
mod cipher;
#[path = "pair.rs"]
mod pair;

use std::path::{Path, PathBuf};

use pair::Pair;
use weft_tests::figures::{Figures, interleaved};
use weft_tests::lab::{Backend, Background, Lab, LabOptions};

const ROUNDS: usize = 4;
/// What weft gives its pods over an underlay of 1,500 bytes.
const MTU: &str = "1440";

/// Name, executable, arguments before the device.
const OTHERS: [(&str, &str, &[&str]); 4] = [
    ("wireguard-go", "wireguard", &["-f"]),
    // The first with offloads in both directions, against which the goals were set.
    ("wireguard-go-2023", "2023/wireguard", &["-f"]),
    ("boringtun-cli", "boringtun-cli", &["-f", "--disable-drop-privileges"]),
    ("gotatun", "gotatun", &["-f", "--disable-drop-privileges"]),
];

/// Keys, peer and route of a device. Arguments: device, own number, other number, the other's public key; the secret comes
/// by standard input.
const CONFIGURE: &str = r#"
set -eu
dev=$0 own=$1 other=$2 key=$3
for i in $(seq 200); do [ -S /var/run/wireguard/$dev.sock ] && break; sleep 0.05; done
wg set $dev private-key /dev/stdin listen-port 51820 \
    peer $key endpoint 192.0.2.$other:51820 allowed-ips 10.99.$other.0/24
ip link set $dev mtu 1440 up
ip route add 10.99.$other.0/24 dev $dev
"#;

fn executable(name: &str) -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))?;
    let path = cache.join("weft-tests/bin").join(name);
    path.exists().then_some(path)
}

/// Sets one contender up on two nodes; what runs ends with the values returned.
fn set_up(lab: &Lab, program: &Path, arguments: &[&str], numbers: [usize; 2]) -> Vec<Background> {
    let keys = numbers.map(|_| {
        let secret = lab.run("n1", &["wg", "genkey"]);
        let public =
            String::from_utf8_lossy(&lab.feed("n1", &["wg", "pubkey"], &secret).stdout).trim().to_owned();
        (secret, public)
    });
    let run = |end: usize| {
        let (own, other) = (numbers[end].to_string(), numbers[1 - end].to_string());
        let (node, device) = (format!("n{own}"), format!("hwg{own}"));
        lab.run(node.as_str(), &["sh", "-c", pair::POD, &own, MTU]);
        lab.sh(node.as_str(), pair::MASQUERADE);
        let program = program.to_str().expect("a path of this machine is text");
        let running = lab.background(node.as_str(), &[&[program], arguments, &[&device]].concat());
        let words = ["sh", "-c", CONFIGURE, &device, &own, &other, &keys[1 - end].1];
        let output = lab.feed(node.as_str(), &words, &keys[end].0);
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        running
    };
    [0, 1].map(run).into()
}

fn main() {
    let wanted = std::env::var("BENCH_PEERS").ok();
    let others: Vec<_> = OTHERS
        .into_iter()
        .filter(|(name, ..)| wanted.as_ref().is_none_or(|wanted| wanted.split(',').any(|one| one == *name)))
        .map(|(name, file, arguments)| {
            let path =
                executable(file).unwrap_or_else(|| panic!("{file} is not built: run `make bench-wireguard`"));
            (name, path, arguments)
        })
        .collect();
    let nodes = 2 + 2 * others.len();
    let options = LabOptions::new("bench-wireguard")
        .nodes(nodes)
        .started(2)
        .pods(1)
        .backend(Backend::Wireguard)
        .config("[encryption]\nimplementation = \"user-space\"");
    let lab = Lab::up(options);
    let mut pairs =
        vec![Pair { name: "weft", ends: [("n1", "a"), ("n2", "a")], to: lab.ip("n2", "a").to_string() }];
    let mut running = Vec::new();
    const ENDS: [[&str; 2]; 4] = [["n3", "n4"], ["n5", "n6"], ["n7", "n8"], ["n9", "n10"]];
    for (place, (name, program, arguments)) in others.iter().enumerate() {
        let numbers = [3 + 2 * place, 4 + 2 * place];
        running.push(set_up(&lab, program, arguments, numbers));
        pairs.push(Pair {
            name,
            ends: ENDS[place].map(|node| (node, "h")),
            to: format!("10.99.{}.2", numbers[1]),
        });
    }
    let mut figures = Figures::default();
    interleaved(ROUNDS, &mut pairs, |_, pair| {
        pair.measure(&lab, &mut figures);
        if pair.name == "weft" {
            figures.add("boringtun", cipher::boringtun());
            figures.add("openssl", cipher::openssl());
        }
    });
    pair::print(&figures, &pairs);
    for name in ["boringtun", "openssl"] {
        println!("sealing and opening alone, {name}: {:.3} CPU s/GB", figures.spread(name));
    }
    for other in &pairs[1..] {
        pair::print_ratios(&figures, "weft", other.name);
    }
}
