//! What the way between two tunnels may do to them. The ideas are those of WireGuard's own self-test (tools/testing/selftests/
//! wireguard/netns.sh in Linux): address translation and keepalives, an underlay of IPv6, fragments, a small MTU.

use super::interop::{Kind, Other};
use super::*;

/// weft's numbers 1 and 2 with a cable, each at an address that the other knows.
fn met(at: [SocketAddr; 2]) -> Option<[Weft; 2]> {
    let (one, two) = two()?;
    let nodes = [(one, 1), (two, 2)].map(|(place, number)| Weft::open(place, number));
    nodes[0].set_peers(&[peer(2, secret(2).public(), at[1])]);
    nodes[1].set_peers(&[peer(1, secret(1).public(), at[0])]);
    Some(nodes)
}

const V6: [&str; 2] = ["[2001:db8::1]:51820", "[2001:db8::2]:51820"];

#[test]
fn both_families_go_over_an_underlay_of_either() {
    for at in [["192.0.2.1:51820", "192.0.2.2:51820"], V6] {
        let Some(nodes) = met(at.map(|at| at.parse().unwrap())) else { return };
        for to in ["10.77.2.1", "fd77::2:1"] {
            ping(&nodes[0].place, to, 5);
        }
        for to in ["10.77.1.1", "fd77::1:1"] {
            ping(&nodes[1].place, to, 5);
        }
        assert_eq!(nodes[0].status().endpoint, at[1].parse().unwrap());
        assert_eq!(nodes[1].status().endpoint, at[0].parse().unwrap());
    }
}

#[test]
fn the_largest_packets_go_in_fragments_whatever_the_devices_carry() {
    for (underlay, mtu) in [(1500, 1420), (9000, 8920), (1500, 1500)] {
        let Some(nodes) = met(V6.map(|at| at.parse().unwrap())) else { return };
        for node in &nodes {
            node.place.sh(&format!("ip link set eth0 mtu {underlay}; ip link set weft-wg mtu {mtu}"));
            node.tunnel.lock().unwrap().set_mtu(mtu);
        }
        // Without a session only so many packets wait.
        ping(&nodes[0].place, "10.77.2.1", 1);
        // The last is more than the underlay takes in one piece: what is sealed is in fragments itself.
        for (from, to) in [(0, "10.77.2.1"), (0, "fd77::2:1"), (1, "10.77.1.1"), (1, "fd77::1:1")] {
            nodes[from].place.sh(&format!("ping -n -q -c 3 -i 0.05 -s 65000 -w 10 {to}"));
            let fits = mtu - if to.contains(':') { 48 } else { 28 };
            for size in [fits - 1, fits] {
                nodes[from].place.sh(&format!("ping -n -q -c 2 -i 0.05 -M do -s {size} -w 10 {to}"));
            }
            nodes[from].place.sh(&format!("! ping -n -q -c 1 -M do -s {} -W 0.3 {to}", fits + 1));
        }
        let drops: u64 = nodes.iter().map(Weft::losses).sum();
        assert_eq!(drops, 0, "{:?} {:?}", nodes[0].drops(), nodes[1].drops());
    }
}

/// 198.51.100.2 behind a translator that is 203.0.113.9 to the outside, and 203.0.113.1 there.
fn translated() -> Option<[Netns; 3]> {
    let (inside, between, outside) = (Netns::new()?, Netns::new()?, Netns::new()?);
    inside.sh(&format!("ip link add eth0 type veth peer name in0 netns {}", between.tid));
    outside.sh(&format!("ip link add eth0 type veth peer name out0 netns {}", between.tid));
    inside.sh(
        "ip addr add 198.51.100.2/24 dev eth0; ip link set eth0 up; ip route add default via 198.51.100.1",
    );
    outside.sh("ip addr add 203.0.113.1/24 dev eth0; ip link set eth0 up");
    between.sh(
        "ip addr add 198.51.100.1/24 dev in0; ip link set in0 up; ip addr add 203.0.113.9/24 dev out0; ip link set out0 up
         sysctl -qw net.ipv4.ip_forward=1
         nft -f - <<END
         table ip nat {
             chain out { type nat hook postrouting priority srcnat; oifname out0 masquerade fully-random; }
             chain in { type filter hook forward priority filter; iifname out0 ct state new drop; }
         }
END
         sysctl -qw net.netfilter.nf_conntrack_udp_timeout=2 net.netfilter.nf_conntrack_udp_timeout_stream=2",
    );
    Some([inside, between, outside])
}

#[test]
fn a_peer_behind_a_translator_is_found_and_stays_reachable_by_its_keepalives() {
    let Some([inside, between, outside]) = translated() else { return };
    let weft = Weft::open(outside, 1);
    // No record knows what the translator makes of it.
    weft.set_peers(&[peer(2, secret(2).public(), "198.51.100.2:51820".parse().unwrap())]);
    let key = secret(1).public();
    let Some(other) = Other::start(Kind::WireguardGo, inside, 2, key) else { return };
    let keepalive = |seconds: &str| {
        other.set(&format!("peer {key} endpoint 203.0.113.1:51820 persistent-keepalive {seconds}"));
    };
    keepalive("1");
    wait_until("weft has a session", || weft.status().handshake.is_some());
    let seen = weft.status().endpoint;
    assert!(seen.ip().to_string() == "203.0.113.9" && seen.port() != 51820, "{seen}");
    // Nobody says anything for longer than the translator remembers, but for the keepalives.
    let arrived = || -> u64 {
        weft.place.sh("awk '/^Udp: [0-9]/ {print $2}' /proc/thread-self/net/snmp").trim().parse().unwrap()
    };
    let before = arrived();
    wait_until("keepalives come", || arrived() >= before + 5);
    ping(&weft.place, "10.77.2.1", 5);
    assert_eq!(weft.status().endpoint, seen, "the translation stands");
    // Without them it is forgotten.
    keepalive("off");
    wait_until("the translator forgets", || {
        // To look at an entry whose time is over ends it; by itself the kernel may take a minute more.
        !between.sh("cat /proc/net/nf_conntrack").contains("dport=51820")
    });
    weft.place.sh("! ping -n -q -c 2 -i 0.2 -W 1 10.77.2.1");
    // The one that is behind it speaks, comes from another port, and is answered there.
    ping(&other.place, "10.77.1.1", 3);
    let now = weft.status().endpoint;
    assert!(now.ip() == seen.ip() && now != seen, "{now} after {seen}");
    ping(&weft.place, "10.77.2.1", 3);
}
