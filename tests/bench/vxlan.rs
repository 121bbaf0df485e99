//! Pod to pod over weft's VXLAN, against the same VXLAN made by hand with iproute2: `make bench-vxlan`.
//!
//! One lab has all: n1 and n2 run weft, n3 and n4 have what a careful person sets up, over the same underlay, and n5 and
//! n6 have that and masquerade what leaves the cluster, as weft does. They take turns. Every load ends by itself.

#[path = "pair.rs"]
mod pair;

use pair::Pair;
use weft_tests::figures::{Figures, interleaved};
use weft_tests::lab::{Lab, LabOptions};

const ROUNDS: usize = 5;
const HANDS: [&str; 2] = ["by hand", "by hand, masquerading"];

/// A VXLAN device that learns nothing, a permanent neighbour and forwarding entry, and a route, beside the bridge and pod
/// of [`pair::POD`]. Arguments: own number, other number (in 10.99.N.0/24 and 192.0.2.N).
const BY_HAND: &str = r#"
set -eu
own=$0 other=$1
ip link add hvx type vxlan id 9 dstport 4789 local 192.0.2.$own dev eth0 nolearning
ip link set hvx address 02:99:00:00:00:0$own mtu 1450 up
bridge fdb append 02:99:00:00:00:0$other dev hvx dst 192.0.2.$other
ip neighbour add 10.99.$other.0 lladdr 02:99:00:00:00:0$other dev hvx nud permanent
ip route add 10.99.$other.0/24 via 10.99.$other.0 dev hvx onlink
"#;

fn main() {
    let lab = Lab::up(LabOptions::new("bench-vxlan").nodes(6).started(2).pods(1));
    for (own, other) in [("3", "4"), ("4", "3"), ("5", "6"), ("6", "5")] {
        let node = format!("n{own}");
        lab.run(node.as_str(), &["sh", "-c", pair::POD, own, "1450"]);
        lab.run(node.as_str(), &["sh", "-c", BY_HAND, own, other]);
    }
    for node in ["n5", "n6"] {
        lab.sh(node, pair::MASQUERADE);
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
    pair::print(&figures, &pairs);
    for hand in HANDS {
        pair::print_ratios(&figures, "weft", hand);
    }
}
