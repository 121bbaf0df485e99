//! The nftables table against the real kernel, each test in network namespaces of its own, judged by `nft`.
#![allow(clippy::unwrap_used, reason = "a test that unwraps names its line")]

mod netns;

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use netns::{Netns, opened_again};
use weft_daemon::kernel::nft::{self, Conn};
use weft_daemon::plan::table::{Table, VERSION};

/// What the tests do to the table of a namespace.
trait Nft {
    fn nft<T: Send + 'static>(&self, job: impl FnOnce(&mut Conn) -> T + Send + 'static) -> T;
    fn dump(&self) -> Option<String>;
    fn apply(&self, table: &Table);
}

impl Nft for Netns {
    fn nft<T: Send + 'static>(&self, job: impl FnOnce(&mut Conn) -> T + Send + 'static) -> T {
        self.run(move || job(&mut Conn::open().unwrap()))
    }

    fn dump(&self) -> Option<String> {
        self.nft(|conn| nft::dump(conn).unwrap())
    }

    fn apply(&self, table: &Table) {
        let table = table.clone();
        self.nft(move |conn| nft::apply(conn, &table).unwrap());
    }
}

fn table() -> Table {
    Table {
        cluster: ["10.32.0.0/12", "fd00:32::/48"].map(|net| net.parse().unwrap()).to_vec(),
        except: ["198.51.100.0/24"].map(|net| net.parse().unwrap()).to_vec(),
        masquerade: true,
        vxlan_port: 8472,
        sealed: Vec::new(),
        bridge: "weft0".into(),
        tunnels: ["weft-wg", "weft-wg1"].map(Into::into),
        version: VERSION,
    }
}

#[test]
fn the_table_that_is_written_is_the_table_that_nft_shows() {
    let Some(ns) = Netns::new() else { return };
    assert_eq!(ns.dump(), None);
    ns.apply(&table());
    let shown = ns.sh("nft list ruleset");
    for line in [
        "type nat hook postrouting priority srcnat; policy accept;",
        "type filter hook prerouting priority raw; policy accept;",
        "udp dport 8472 iifname != \"weft0\" notrack",
        "type filter hook output priority raw; policy accept;",
        "udp dport 8472 notrack",
        "type filter hook forward priority mangle; policy accept;",
        "iifname \"weft-*\" tcp flags syn tcp option maxseg size set rt mtu",
        "oifname \"weft-*\" tcp flags syn tcp option maxseg size set rt mtu",
        "ip saddr @pods4 ip daddr != @direct4 meta l4proto udp masquerade to :16384-65535 fully-random",
        "ip saddr @pods4 ip daddr != @direct4 masquerade fully-random",
        "ip6 saddr @pods6 ip6 daddr != @direct6 masquerade fully-random",
        "elements = { 10.32.0.0/12 }",
        "10.32.0.0/12, 198.51.100.0/24",
        "elements = { fd00:32::/48 }",
        "ff00::/8",
    ] {
        assert!(shown.contains(line), "{line:?} is missing in\n{shown}");
    }
    assert!(ns.sh("nft -j list ruleset").contains("\"masquerade\""));
    assert_eq!(ns.dump(), Some(table().digest()));
}

#[test]
fn a_second_apply_replaces_the_table_and_leaves_foreign_ones_alone() {
    let Some(ns) = Netns::new() else { return };
    ns.sh("nft 'table ip other { chain c { type filter hook input priority 0; }; }'");
    ns.apply(&table());
    ns.apply(&table());
    let once = ns.sh("nft list table inet weft");
    assert_eq!(once.matches("iifname !=").count(), 1, "{once}");
    let without = Table { masquerade: false, ..table() };
    ns.apply(&without);
    assert_eq!(ns.dump(), Some(without.digest()));
    assert_ne!(without.digest(), table().digest());
    assert!(!ns.sh("nft list table inet weft").contains("masquerade"));
    ns.nft(|conn| nft::remove(conn).unwrap());
    ns.nft(|conn| nft::remove(conn).unwrap());
    assert_eq!(ns.dump(), None);
    assert!(ns.sh("nft list ruleset").contains("table ip other"));
}

#[test]
fn every_edit_by_hand_is_seen() {
    let Some(ns) = Netns::new() else { return };
    for edit in [
        "nft flush chain inet weft postrouting",
        "nft flush chain inet weft prerouting; nft delete chain inet weft prerouting",
        "nft add rule inet weft prerouting counter drop",
        "nft delete element inet weft direct4 '{ 10.32.0.0/12 }'",
        "nft add element inet weft direct4 '{ 203.0.113.0/24 }'",
        "nft add set inet weft more '{ type ipv4_addr; }'",
        "nft chain inet weft prerouting '{ policy drop; }'",
        "nft add chain inet weft more",
        "nft add table inet weft '{ flags dormant; }'",
        "nft replace rule inet weft prerouting handle $(nft -a list chain inet weft prerouting | sed -n 's/.*iifname.*handle //p') drop",
        "nft flush chain inet weft mss",
        "nft delete table inet weft; nft add table inet weft",
    ] {
        ns.apply(&table());
        assert_eq!(ns.dump(), Some(table().digest()));
        ns.sh(edit);
        assert_eq!(ns.dump().as_deref(), Some(nft::CHANGED), "{edit}");
    }
    ns.apply(&table());
    assert_eq!(ns.dump(), Some(table().digest()), "the next apply repairs it");
}

#[test]
fn ten_thousand_excepted_networks_are_one_transaction() {
    let Some(ns) = Netns::new() else { return };
    let mut large = table();
    large.except = (0..10_000u32)
        .map(|at| ipnet::IpNet::new(IpAddr::from((0x0b00_0000 + at * 512).to_be_bytes()), 24).unwrap())
        .collect();
    ns.apply(&large);
    assert_eq!(ns.dump(), Some(large.digest()));
}

/// Sends one datagram from `from` to `to` and gives back the source that the receiver saw.
fn seen(from: (&Netns, &str), to: (&Netns, &str)) -> SocketAddr {
    let target = to.1.to_owned();
    let receiver = to.0.run(move || {
        let socket = UdpSocket::bind((target.parse::<IpAddr>().unwrap(), 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket
    });
    let address = receiver.local_addr().unwrap();
    let source = from.1.to_owned();
    from.0.run(move || {
        let source = source.parse::<IpAddr>().unwrap();
        let socket = opened_again(|| UdpSocket::bind((source, 8472)));
        socket.send_to(b"weft", address).unwrap();
    });
    receiver.recv_from(&mut [0; 16]).expect("the datagram arrives").1
}

#[test]
fn the_outside_sees_the_node_and_the_cluster_sees_the_pod() {
    let (Some(node), Some(pod), Some(outside)) = (Netns::new(), Netns::new(), Netns::new()) else { return };
    node.sh(&format!(
        "ip link add weft0 type bridge
         ip link add vpod type veth peer name eth0 netns {}
         ip link add uplink type veth peer name eth0 netns {}
         ip link set vpod master weft0
         for dev in weft0 vpod uplink; do ip link set $dev up; done
         ip addr add 10.32.1.1/24 dev weft0; ip addr add 192.0.2.1/24 dev uplink
         ip -6 addr add fd00:32:0:1::1/64 dev weft0 nodad; ip -6 addr add 2001:db8::1/64 dev uplink nodad
         ip route add 10.33.0.0/24 via 192.0.2.2
         ip route add 198.51.100.0/24 via 192.0.2.2
         echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding",
        pod.tid, outside.tid
    ));
    pod.sh("ip link set eth0 up; ip addr add 10.32.1.5/24 dev eth0; ip route add default via 10.32.1.1
            ip -6 addr add fd00:32:0:1::5/64 dev eth0 nodad; ip -6 route add default via fd00:32:0:1::1");
    outside.sh("ip link set eth0 up; ip addr add 192.0.2.2/24 dev eth0; ip addr add 10.33.0.9/32 dev eth0
         ip addr add 198.51.100.9/32 dev eth0; ip route add default via 192.0.2.1
         ip -6 addr add 2001:db8::2/64 dev eth0 nodad; ip -6 route add default via 2001:db8::1
         ping -c 1 -w 10 192.0.2.1; ping -6 -c 1 -w 10 2001:db8::1");
    node.apply(&table());
    pod.sh("ping -c 1 -w 10 192.0.2.2; ping -6 -c 1 -w 10 2001:db8::2");

    let masqueraded = seen((&pod, "10.32.1.5"), (&outside, "192.0.2.2"));
    assert_eq!(masqueraded.ip(), "192.0.2.1".parse::<IpAddr>().unwrap());
    assert!(masqueraded.port() >= 16384, "never the port of the tunnel: {masqueraded}");
    let masqueraded = seen((&pod, "fd00:32:0:1::5"), (&outside, "2001:db8::2"));
    assert_eq!(masqueraded.ip(), "2001:db8::1".parse::<IpAddr>().unwrap());
    for kept in ["10.33.0.9", "198.51.100.9"] {
        let from = seen((&pod, "10.32.1.5"), (&outside, kept));
        assert_eq!(from, "10.32.1.5:8472".parse().unwrap(), "{kept} sees the pod's own address and port");
    }

    let off = Table { masquerade: false, ..table() };
    node.apply(&off);
    let plain = seen((&pod, "10.32.1.5"), (&outside, "192.0.2.2"));
    assert_eq!(plain.ip(), "10.32.1.5".parse::<IpAddr>().unwrap());
}

fn drops(ns: &Netns) -> Vec<String> {
    ns.nft(|conn| nft::foreign_drops(conn, "weft0", &table().cluster).unwrap())
}

#[test]
fn a_foreign_drop_policy_is_named_until_a_rule_accepts_the_pods() {
    let Some(ns) = Netns::new() else { return };
    ns.apply(&table());
    assert_eq!(drops(&ns), Vec::<String>::new());
    ns.sh("nft 'table inet fw { chain through { type filter hook forward priority 0; policy drop; ct state established accept; }; }'");
    let found = drops(&ns);
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("chain through of the nftables table inet fw"), "{}", found[0]);

    // What the sentence advises is what helps.
    for advice in found[0].split('`').skip(1).step_by(2) {
        ns.sh(advice);
    }
    assert_eq!(drops(&ns), Vec::<String>::new());
    ns.sh("nft flush chain inet fw through; nft add rule inet fw through 'iifname \"weft*\" counter accept'");
    assert_eq!(drops(&ns).len(), 1, "one direction is not enough");
    ns.sh("nft add rule inet fw through 'oifname \"weft*\" counter accept'");
    assert_eq!(drops(&ns), Vec::<String>::new());

    ns.sh("nft flush chain inet fw through
           nft add rule inet fw through ip saddr 10.32.0.0/12 accept; nft add rule inet fw through ip daddr 10.0.0.0/8 accept");
    assert_eq!(drops(&ns).len(), 1, "IPv6 is still cut off");
    ns.sh("nft add rule inet fw through ip6 saddr fd00:32::/48 accept; nft add rule inet fw through ip6 daddr fd00:32::/48 accept");
    assert_eq!(drops(&ns), Vec::<String>::new());
    ns.sh("nft delete table inet fw; nft 'table ip nothing { chain through { type filter hook input priority 0; policy drop; }; }'");
    assert_eq!(drops(&ns), Vec::<String>::new(), "another hook");
}

#[test]
fn a_drop_policy_of_iptables_is_named_with_the_command_that_helps() {
    let Some(ns) = Netns::new() else { return };
    if ns.sh("iptables-nft --version || true").is_empty() {
        println!("SKIP: iptables-nft is not installed");
        return;
    }
    ns.sh("iptables-nft -P FORWARD DROP");
    let found = drops(&ns);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("chain FORWARD of the nftables table ip filter"), "{}", found[0]);
    for advice in found[0].split('`').skip(1).step_by(2) {
        ns.sh(&advice.replace("iptables ", "iptables-nft "));
    }
    assert_eq!(drops(&ns), Vec::<String>::new());
}
