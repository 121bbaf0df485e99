//! What weft's one nftables table holds, made from a few values. Pure: the kernel's part is `kernel::nft`.
//!
//! Invariant: the same value makes the same table, and [`Table::digest`] names it.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;

// Numbers of linux/netfilter.h, linux/netfilter/nf_tables.h and linux/in.h.
pub(crate) const IPV4: u8 = 2;
pub(crate) const IPV6: u8 = 10;
pub(crate) const HOOK_PREROUTING: u32 = 0;
pub(crate) const HOOK_FORWARD: u32 = 2;
pub(crate) const HOOK_OUTPUT: u32 = 3;
pub(crate) const HOOK_POSTROUTING: u32 = 4;
pub(crate) const PRIORITY_RAW: i32 = -300;
pub(crate) const PRIORITY_MANGLE: i32 = -150;
pub(crate) const PRIORITY_SRCNAT: i32 = 100;
pub(crate) const ACCEPT: u32 = 1;
pub(crate) const SET_INTERVAL: u32 = 4;
pub(crate) const META_IIFNAME: u32 = 6;
pub(crate) const META_OIFNAME: u32 = 7;
pub(crate) const META_NFPROTO: u32 = 15;
pub(crate) const META_L4PROTO: u32 = 16;
pub(crate) const IPPROTO_TCP: u8 = 6;
pub(crate) const IPPROTO_UDP: u8 = 17;
/// How the names of the devices begin that carry packets to other nodes, and no pod's does.
pub(crate) const TUNNEL_NAMES: &[u8] = b"weft-";

/// What table `inet weft` is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// The cluster CIDRs: the sources that are masqueraded and the destinations that are not.
    pub cluster: Vec<IpNet>,
    /// Further destinations that see the pod's own address.
    pub except: Vec<IpNet>,
    /// Whether there is masquerading at all.
    pub masquerade: bool,
    /// The UDP port of the tunnels: no masqueraded datagram gets it as its source port, and connection tracking
    /// does not see what comes to it or goes to it, for what is inside is tracked.
    pub vxlan_port: u16,
    /// Addresses to and from which no clear packet may go.
    pub sealed: Vec<IpNet>,
    /// The bridge of the pods.
    pub bridge: String,
    /// The devices that encrypt, whether they are there or not.
    pub tunnels: [String; 2],
    /// The version of the layout: raised by code that writes other rules for the same input.
    pub version: u32,
}

/// The layout that this code writes.
pub const VERSION: u32 = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expr {
    /// It did not come in by that device.
    NotFrom(Device),
    /// It does not go out by that device.
    NotTo(Device),
    /// It came in by one of the devices that carry packets to other nodes.
    FromTunnels,
    /// It goes out by one of them.
    ToTunnels,
    /// It opens a TCP connection, or agrees to.
    Syn,
    /// The MSS option is at most what the routes there and back leave room for.
    MssOfRoute,
    /// Counted.
    Counter,
    /// Dropped.
    Drop,
    /// A meta value of one byte.
    MetaByte {
        key: u32,
        value: u8,
    },
    /// Bytes of the network header are (not) in a set.
    Address {
        offset: u32,
        len: u32,
        set: &'static str,
        negated: bool,
    },
    Masquerade,
    MasqueradePorts {
        low: u16,
        high: u16,
    },
    /// The destination port of the transport header.
    DestinationPort {
        port: u16,
    },
    /// Connection tracking passes it over.
    NoTrack,
}

/// A device that rules name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    Bridge,
    Tunnel,
    Detour,
    Loopback,
}

pub(crate) struct Chain {
    pub(crate) name: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) hook: u32,
    pub(crate) priority: i32,
    pub(crate) rules: Vec<Vec<Expr>>,
}

pub(crate) struct Set {
    pub(crate) name: &'static str,
    pub(crate) v6: bool,
    pub(crate) elements: Vec<(Vec<u8>, bool)>,
}

impl Table {
    pub(crate) fn device(&self, device: Device) -> &str {
        match device {
            Device::Bridge => &self.bridge,
            Device::Tunnel => &self.tunnels[0],
            Device::Detour => &self.tunnels[1],
            Device::Loopback => "lo",
        }
    }

    pub(crate) fn sets(&self) -> Vec<Set> {
        let multicast: [IpNet; 3] = [
            "224.0.0.0/4".parse().expect("a constant prefix"),
            "255.255.255.255/32".parse().expect("a constant prefix"),
            "ff00::/8".parse().expect("a constant prefix"),
        ];
        let direct: Vec<IpNet> = self.cluster.iter().chain(&self.except).chain(&multicast).copied().collect();
        let masquerade = [
            ("pods4", false, &self.cluster),
            ("pods6", true, &self.cluster),
            ("direct4", false, &direct),
            ("direct6", true, &direct),
        ];
        let guard = [("sealed4", false, &self.sealed), ("sealed6", true, &self.sealed)];
        let masquerade = masquerade.into_iter().filter(|_| self.masquerade);
        masquerade
            .chain(guard.into_iter().filter(|_| !self.sealed.is_empty()))
            .map(|(name, v6, nets)| Set { name, v6, elements: elements(nets, v6) })
            .collect()
    }

    pub(crate) fn chains(&self) -> Vec<Chain> {
        // The packets inside are tracked; an entry for the tunnel around them would be one more lookup a packet. A
        // pod's own datagrams to that port are nobody's tunnel.
        let tunnel = |mut rule: Vec<Expr>| {
            rule.insert(0, Expr::MetaByte { key: META_L4PROTO, value: IPPROTO_UDP });
            rule.insert(1, Expr::DestinationPort { port: self.vxlan_port });
            rule.push(Expr::NoTrack);
            rule
        };
        let raw = |name, hook, rule| Chain {
            name,
            kind: "filter",
            hook,
            priority: PRIORITY_RAW,
            rules: vec![tunnel(rule)],
        };
        let mut chains = vec![
            raw("prerouting", HOOK_PREROUTING, vec![Expr::NotFrom(Device::Bridge)]),
            raw("output", HOOK_OUTPUT, Vec::new()),
        ];
        chains.push(clamp());
        if !self.sealed.is_empty() {
            chains.extend(guard());
        }
        if self.masquerade {
            let ports = masquerade_ports(self.vxlan_port);
            let mut rules = Vec::new();
            for (proto, offset, len, pods, direct) in
                [(IPV4, (12, 16), 4, "pods4", "direct4"), (IPV6, (8, 24), 16, "pods6", "direct6")]
            {
                let base = vec![
                    Expr::MetaByte { key: META_NFPROTO, value: proto },
                    Expr::Address { offset: offset.0, len, set: pods, negated: false },
                    Expr::Address { offset: offset.1, len, set: direct, negated: true },
                ];
                // Only UDP can take the tunnel's port; whatever else has ports keeps the whole range.
                let mut udp = base.clone();
                udp.push(Expr::MetaByte { key: META_L4PROTO, value: IPPROTO_UDP });
                udp.push(Expr::MasqueradePorts { low: *ports.start(), high: *ports.end() });
                let mut rest = base;
                rest.push(Expr::Masquerade);
                rules.extend([udp, rest]);
            }
            chains.push(Chain {
                name: "postrouting",
                kind: "nat",
                hook: HOOK_POSTROUTING,
                priority: PRIORITY_SRCNAT,
                rules,
            });
        }
        chains
    }

    /// The rules and their inputs as one stable text.
    fn recipe(&self) -> String {
        let mut text = format!("v{} {}\n", self.version, self.bridge);
        for chain in self.chains() {
            for rule in &chain.rules {
                let _ = writeln!(text, "{} {rule:?}", chain.name);
            }
        }
        text + &self.shape()
    }

    /// What [`dump`] can see of the table, as text.
    fn shape(&self) -> String {
        let mut lines = Vec::new();
        let recipe_mark = rule_mark();
        for chain in self.chains() {
            lines.push(chain_line(chain.name, chain.hook, chain.priority, ACCEPT, chain.kind));
            lines.extend(chain.rules.iter().map(|rule| rule_line(chain.name, &recipe_mark, &names(rule))));
        }
        for set in self.sets() {
            lines.push(set_line(set.name, SET_INTERVAL));
            lines.extend(set.elements.iter().map(|(key, end)| element_line(set.name, key, *end)));
        }
        shape_of(lines)
    }

    /// A short stable text that names this value; it is kept in the kernel as the table's comment.
    #[must_use]
    pub fn digest(&self) -> String {
        format!("weft-{:016x}-{:016x}", fnv(self.recipe().as_bytes()), fnv(self.shape().as_bytes()))
    }
}

/// What fails closed whatever the routes say: no packet to or from an address that must be encrypted passes another
/// device than the tunnel, the pods' bridge and the node itself.
fn guard() -> [Chain; 2] {
    let rules = |field: (u32, u32), device: fn(Device) -> Expr| {
        [(IPV4, field.0, 4, "sealed4"), (IPV6, field.1, 16, "sealed6")]
            .map(|(proto, offset, len, set)| {
                let mut rule = vec![
                    Expr::MetaByte { key: META_NFPROTO, value: proto },
                    Expr::Address { offset, len, set, negated: false },
                ];
                rule.extend([Device::Tunnel, Device::Detour, Device::Bridge, Device::Loopback].map(device));
                rule.extend([Expr::Counter, Expr::Drop]);
                rule
            })
            .to_vec()
    };
    let chain = |name, hook, rules| Chain { name, kind: "filter", hook, priority: PRIORITY_MANGLE, rules };
    [
        chain("clear_in", HOOK_PREROUTING, rules((12, 8), Expr::NotFrom)),
        chain("clear_out", HOOK_POSTROUTING, rules((16, 24), Expr::NotTo)),
    ]
}

/// Connections of pods through a tunnel begin with segments that fit: also where no "too big" reaches who sends, and where the
/// path carries less than IPv6 takes, of which no "too big" can tell (RFC 8201 s4).
fn clamp() -> Chain {
    let rules = [Expr::FromTunnels, Expr::ToTunnels].map(|device| {
        let tcp = Expr::MetaByte { key: META_L4PROTO, value: IPPROTO_TCP };
        vec![device, tcp, Expr::Syn, Expr::MssOfRoute]
    });
    let (kind, hook, priority) = ("filter", HOOK_FORWARD, PRIORITY_MANGLE);
    Chain { name: "mss", kind, hook, priority, rules: rules.to_vec() }
}

fn names(rule: &[Expr]) -> Vec<&'static str> {
    rule.iter()
        .flat_map(|expr| match expr {
            Expr::NotFrom(_)
            | Expr::NotTo(_)
            | Expr::MetaByte { .. }
            | Expr::FromTunnels
            | Expr::ToTunnels => &["meta", "cmp"][..],
            Expr::Syn => &["payload", "bitwise", "cmp"],
            Expr::MssOfRoute => &["rt", "byteorder", "exthdr"],
            Expr::DestinationPort { .. } => &["payload", "cmp"],
            Expr::Address { .. } => &["payload", "lookup"],
            Expr::Masquerade => &["masq"],
            Expr::MasqueradePorts { .. } => &["immediate", "immediate", "masq"],
            Expr::NoTrack => &["notrack"],
            Expr::Counter => &["counter"],
            Expr::Drop => &["immediate"],
        })
        .copied()
        .collect()
}

pub(crate) fn chain_line(name: &str, hook: u32, priority: i32, policy: u32, kind: &str) -> String {
    format!("chain {name} {hook} {priority} {policy} {kind}")
}

pub(crate) fn rule_line<T: AsRef<str>>(chain: &str, mark: &[u8], expressions: &[T]) -> String {
    let expressions: Vec<&str> = expressions.iter().map(AsRef::as_ref).collect();
    format!("rule {chain} {mark:?} {}", expressions.join(" "))
}

pub(crate) fn set_line(name: &str, flags: u32) -> String {
    format!("set {name} {flags}")
}

pub(crate) fn element_line(set: &str, key: &[u8], end: bool) -> String {
    format!("element {set} {key:?} {end}")
}

pub(crate) fn shape_of(mut lines: Vec<String>) -> String {
    lines.sort();
    lines.join("\n")
}

/// Fowler-Noll-Vo 1a: stable over versions, and nobody attacks it here.
pub(crate) fn fnv(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The ports that masqueraded datagrams may come from: never the tunnel's.
fn masquerade_ports(vxlan: u16) -> RangeInclusive<u16> {
    const LOW: u16 = 16384;
    if vxlan < LOW {
        LOW..=u16::MAX
    } else if vxlan - LOW > u16::MAX - vxlan {
        LOW..=vxlan - 1
    } else {
        vxlan + 1..=u16::MAX
    }
}

/// A comment as `nft` writes it: type 0, length, text with a zero byte.
pub(crate) fn comment(text: &str) -> Vec<u8> {
    let len = u8::try_from(text.len() + 1).expect("the comments are short");
    let mut out = vec![0, len];
    out.extend_from_slice(text.as_bytes());
    out.push(0);
    out
}

pub(crate) fn rule_mark() -> Vec<u8> {
    comment("weft")
}

/// The interval elements of the networks of one family: merged, in order, each start and the end after it.
fn elements(nets: &[IpNet], v6: bool) -> Vec<(Vec<u8>, bool)> {
    let top = if v6 { u128::MAX } else { u128::from(u32::MAX) };
    let number = |addr: IpAddr| match addr {
        IpAddr::V4(addr) => u128::from(u32::from(addr)),
        IpAddr::V6(addr) => u128::from(addr),
    };
    let bytes = |number: u128| {
        let all = number.to_be_bytes();
        all[if v6 { 0 } else { 12 }..].to_vec()
    };
    let mut ranges: Vec<(u128, u128)> = nets
        .iter()
        .filter(|net| net.addr().is_ipv6() == v6)
        .map(|net| (number(net.network()), number(net.broadcast())))
        .collect();
    ranges.sort_unstable();
    let mut merged: Vec<(u128, u128)> = Vec::new();
    for (start, end) in ranges {
        match merged.last_mut() {
            Some(last) if start <= last.1.saturating_add(1) => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    let mut out = Vec::new();
    for (start, end) in merged {
        out.push((bytes(start), false));
        if end < top {
            out.push((bytes(end + 1), true));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masqueraded_ports_never_hold_the_tunnel_port_and_stay_a_large_range() {
        for vxlan in 1..=u16::MAX {
            let ports = masquerade_ports(vxlan);
            assert!(!ports.contains(&vxlan), "{vxlan}");
            assert!(ports.end() - ports.start() > 20_000, "{vxlan}");
        }
    }

    #[test]
    fn neighbouring_and_nested_networks_become_one_interval_and_the_top_stays_open() {
        let nets: Vec<IpNet> = ["11.0.0.0/8", "10.0.0.0/8", "10.1.0.0/16", "255.0.0.0/8", "fd00::/8"]
            .map(|net| net.parse().unwrap())
            .to_vec();
        assert_eq!(
            elements(&nets, false),
            vec![(vec![10, 0, 0, 0], false), (vec![12, 0, 0, 0], true), (vec![255, 0, 0, 0], false)]
        );
    }
}
