//! The one nftables table of weft, by netlink: what it should hold, whether it holds it, and its replacement.
//!
//! Not a general client: it writes table `inet weft` only and reads others only to name what cuts pods off.
//! Invariant: the table changes in one transaction, so there is never a moment without it, and it carries the
//! digest of what it was made from in its comment.

use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;

use super::tlv::{self, Conversation, Writer, attrs, find, find_be32, find_text};

/// The table's name, in family `inet`.
pub const TABLE: &str = "weft";
/// What [`dump`] says about a table that carries weft's name but not weft's content.
pub const CHANGED: &str = "changed";

const NETLINK_NETFILTER: isize = 12;
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DEL_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const NEW_SET: u16 = 9;
const GET_SET: u16 = 10;
const NEW_ELEMENTS: u16 = 12;
const GET_ELEMENTS: u16 = 13;

const INET: u8 = 1;
const IPV4: u8 = 2;
const IPV6: u8 = 10;
const HOOK_FORWARD: u32 = 2;
const HOOK_POSTROUTING: u32 = 4;
const PRIORITY_FILTER: i32 = 0;
const PRIORITY_SRCNAT: i32 = 100;
const ACCEPT: u32 = 1;
const DROP: u32 = 0;
const SET_INTERVAL: u32 = 4;
const INTERVAL_END: u32 = 1;
const MASQUERADE_FULLY_RANDOM: u32 = 16;
const MASQUERADE_PORTS: u32 = 2;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const IPPROTO_UDP: u8 = 17;
/// Elements in one message: an IPv6 element takes 40 bytes of the 64 KiB a nest can hold.
const ELEMENTS_A_MESSAGE: usize = 1000;

/// Why the table could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The kernel has no nf_tables, or not the part that is needed.
    #[error(
        "the kernel refuses nftables ({0}): load the modules nf_tables, nft_chain_nat and nft_masq, or use a kernel that has them"
    )]
    Unsupported(io::Error),
    /// The capability is missing.
    #[error("nftables may not be changed ({0}): run weftd as root or with CAP_NET_ADMIN")]
    NotPermitted(io::Error),
    /// Anything else.
    #[error("nftables: {0}")]
    Io(io::Error),
}

impl From<io::Error> for NftError {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT) => Self::Unsupported(error),
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted(error),
            _ => Self::Io(error),
        }
    }
}

/// A netlink socket for nf_tables, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Conn(Conversation);

impl Conn {
    /// Opens the socket.
    ///
    /// # Errors
    /// When the kernel has no netfilter netlink.
    pub fn open() -> Result<Self, NftError> {
        Ok(Self(Conversation::open(NETLINK_NETFILTER)?))
    }

    fn dump(&mut self, kind: u16, family: u8, fill: impl Fn(&mut Writer)) -> io::Result<Vec<(u8, Vec<u8>)>> {
        let answers = self.0.request((SUBSYSTEM << 8) | kind, tlv::DUMP, &generic(family, 0), fill)?;
        Ok(answers
            .into_iter()
            .filter_map(|(_, body)| Some((*body.first()?, body.get(4..)?.to_vec())))
            .collect())
    }
}

fn generic(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

/// What table `inet weft` is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// The cluster CIDRs: the sources that are masqueraded and the destinations that are not.
    pub cluster: Vec<IpNet>,
    /// Further destinations that see the pod's own address.
    pub except: Vec<IpNet>,
    /// Whether there is masquerading at all.
    pub masquerade: bool,
    /// The UDP port of the tunnels: no masqueraded datagram gets it as its source port.
    pub vxlan_port: u16,
    /// The bridge of the pods.
    pub bridge: String,
    /// The version of the layout: raised by code that writes other rules for the same input.
    pub version: u32,
}

/// The layout that this code writes.
pub const VERSION: u32 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expr {
    /// An interface name equals the bridge.
    Bridge {
        key: u32,
    },
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
    Accept,
}

struct Chain {
    name: &'static str,
    kind: &'static str,
    hook: u32,
    priority: i32,
    rules: Vec<Vec<Expr>>,
}

struct Set {
    name: &'static str,
    v6: bool,
    elements: Vec<(Vec<u8>, bool)>,
}

impl Table {
    fn sets(&self) -> Vec<Set> {
        if !self.masquerade {
            return Vec::new();
        }
        let multicast: [IpNet; 3] = [
            "224.0.0.0/4".parse().expect("a constant prefix"),
            "255.255.255.255/32".parse().expect("a constant prefix"),
            "ff00::/8".parse().expect("a constant prefix"),
        ];
        let direct: Vec<IpNet> = self.cluster.iter().chain(&self.except).chain(&multicast).copied().collect();
        [
            ("pods4", false, &self.cluster),
            ("pods6", true, &self.cluster),
            ("direct4", false, &direct),
            ("direct6", true, &direct),
        ]
        .into_iter()
        .map(|(name, v6, nets)| Set { name, v6, elements: elements(nets, v6) })
        .collect()
    }

    fn chains(&self) -> Vec<Chain> {
        let mut chains = vec![Chain {
            name: "forward",
            kind: "filter",
            hook: HOOK_FORWARD,
            priority: PRIORITY_FILTER,
            rules: [META_IIFNAME, META_OIFNAME]
                .into_iter()
                .map(|key| vec![Expr::Bridge { key }, Expr::Accept])
                .collect(),
        }];
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

fn names(rule: &[Expr]) -> Vec<&'static str> {
    rule.iter()
        .flat_map(|expr| match expr {
            Expr::Bridge { .. } | Expr::MetaByte { .. } => &["meta", "cmp"][..],
            Expr::Address { .. } => &["payload", "lookup"],
            Expr::Masquerade => &["masq"],
            Expr::MasqueradePorts { .. } => &["immediate", "immediate", "masq"],
            Expr::Accept => &["immediate"],
        })
        .copied()
        .collect()
}

fn chain_line(name: &str, hook: u32, priority: i32, policy: u32, kind: &str) -> String {
    format!("chain {name} {hook} {priority} {policy} {kind}")
}

fn rule_line<T: AsRef<str>>(chain: &str, mark: &[u8], expressions: &[T]) -> String {
    let expressions: Vec<&str> = expressions.iter().map(AsRef::as_ref).collect();
    format!("rule {chain} {mark:?} {}", expressions.join(" "))
}

fn set_line(name: &str, flags: u32) -> String {
    format!("set {name} {flags}")
}

fn element_line(set: &str, key: &[u8], end: bool) -> String {
    format!("element {set} {key:?} {end}")
}

fn shape_of(mut lines: Vec<String>) -> String {
    lines.sort();
    lines.join("\n")
}

/// Fowler-Noll-Vo 1a: stable over versions, and nobody attacks it here.
fn fnv(bytes: &[u8]) -> u64 {
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
fn comment(text: &str) -> Vec<u8> {
    let len = u8::try_from(text.len() + 1).expect("the comments are short");
    let mut out = vec![0, len];
    out.extend_from_slice(text.as_bytes());
    out.push(0);
    out
}

fn rule_mark() -> Vec<u8> {
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

fn expression(writer: &mut Writer, name: &str, fill: impl FnOnce(&mut Writer)) {
    writer.nest(1, |writer| {
        writer.text(1, name);
        writer.nest(2, fill);
    });
}

fn meta(writer: &mut Writer, key: u32, value: &[u8]) {
    expression(writer, "meta", |writer| {
        writer.be32(1, 1);
        writer.be32(2, key);
    });
    expression(writer, "cmp", |writer| {
        writer.be32(1, 1);
        writer.be32(2, 0);
        writer.nest(3, |writer| writer.attr(1, value));
    });
}

fn port(writer: &mut Writer, register: u32, port: u16) {
    expression(writer, "immediate", |writer| {
        writer.be32(1, register);
        writer.nest(2, |writer| writer.attr(1, &port.to_be_bytes()));
    });
}

fn encode(writer: &mut Writer, expr: Expr, bridge: &str) {
    match expr {
        Expr::Bridge { key } => meta(writer, key, &interface(bridge)),
        Expr::MetaByte { key, value } => meta(writer, key, &[value]),
        Expr::Address { offset, len, set, negated } => {
            expression(writer, "payload", |writer| {
                writer.be32(1, 1);
                writer.be32(2, 1);
                writer.be32(3, offset);
                writer.be32(4, len);
            });
            expression(writer, "lookup", |writer| {
                writer.text(1, set);
                writer.be32(2, 1);
                writer.be32(5, u32::from(negated));
            });
        }
        Expr::Masquerade => {
            expression(writer, "masq", |writer| writer.be32(1, MASQUERADE_FULLY_RANDOM));
        }
        Expr::MasqueradePorts { low, high } => {
            port(writer, 1, low);
            port(writer, 2, high);
            expression(writer, "masq", |writer| {
                writer.be32(1, MASQUERADE_FULLY_RANDOM | MASQUERADE_PORTS);
                writer.be32(2, 1);
                writer.be32(3, 2);
            });
        }
        Expr::Accept => expression(writer, "immediate", |writer| {
            writer.be32(1, 0);
            writer.nest(2, |writer| writer.nest(2, |writer| writer.be32(1, ACCEPT)));
        }),
    }
}

/// An interface name as the kernel compares it: 16 bytes, filled with zeros.
fn interface(name: &str) -> [u8; 16] {
    let mut out = [0; 16];
    for (to, from) in out.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    out
}

/// One transaction under construction.
struct Batch {
    messages: Vec<(u16, u16, Writer)>,
}

impl Batch {
    fn new() -> Self {
        Self { messages: Vec::new() }
    }

    fn push(&mut self, kind: u16, flags: u16, fill: impl FnOnce(&mut Writer)) {
        let mut writer = Writer::default();
        fill(&mut writer);
        self.messages.push((kind, flags, writer));
    }

    /// Sends all in one go. Only the last operation asks for an acknowledgement: the marks around the batch
    /// are acknowledged by new kernels only, and thousands of answers would overrun the socket.
    fn commit(&self, conn: &mut Conn) -> io::Result<()> {
        let mut attempt = 1;
        loop {
            let mut bytes = Writer::default();
            let first = conn.0.next_seq();
            bytes.message(BATCH_BEGIN, tlv::REQUEST, first, &generic(0, SUBSYSTEM), |_| {});
            let mut last = first;
            for (at, (kind, flags, attributes)) in self.messages.iter().enumerate() {
                last = conn.0.next_seq();
                let ack = if at + 1 == self.messages.len() { tlv::ACK } else { 0 };
                bytes.message(
                    (SUBSYSTEM << 8) | kind,
                    tlv::REQUEST | flags | ack,
                    last,
                    &generic(INET, 0),
                    |writer| writer.bytes.extend_from_slice(&attributes.bytes),
                );
            }
            let end = conn.0.next_seq();
            bytes.message(BATCH_END, tlv::REQUEST, end, &generic(0, SUBSYSTEM), |_| {});
            match conn.0.transact(&bytes.bytes, first, last) {
                Err(error) if tlv::busy(&error) && attempt < 8 => attempt += 1,
                other => return other.map(drop),
            }
        }
    }

    /// Deletes the table whether it exists or not: creating one that exists is no error.
    fn delete(&mut self) {
        self.push(NEW_TABLE, tlv::CREATE, |writer| writer.text(1, TABLE));
        self.push(DEL_TABLE, 0, |writer| writer.text(1, TABLE));
    }
}

/// Replaces table `inet weft` by what `table` says, in one transaction.
///
/// # Errors
/// The kernel's refusal; the table is then as it was.
pub fn apply(conn: &mut Conn, table: &Table) -> Result<(), NftError> {
    let mut batch = Batch::new();
    batch.delete();
    let digest = table.digest();
    batch.push(NEW_TABLE, tlv::CREATE, |writer| {
        writer.text(1, TABLE);
        writer.attr(6, &comment(&digest));
    });
    for (id, set) in (1u32..).zip(table.sets()) {
        batch.push(NEW_SET, tlv::CREATE, |writer| {
            writer.text(1, TABLE);
            writer.text(2, set.name);
            writer.be32(3, SET_INTERVAL);
            writer.be32(4, if set.v6 { 8 } else { 7 });
            writer.be32(5, if set.v6 { 16 } else { 4 });
            writer.be32(10, id);
        });
        for part in set.elements.chunks(ELEMENTS_A_MESSAGE) {
            batch.push(NEW_ELEMENTS, tlv::CREATE, |writer| {
                writer.text(1, TABLE);
                writer.text(2, set.name);
                writer.nest(3, |writer| {
                    for (key, end) in part {
                        writer.nest(1, |writer| {
                            writer.nest(1, |writer| writer.attr(1, key));
                            if *end {
                                writer.be32(3, INTERVAL_END);
                            }
                        });
                    }
                });
            });
        }
    }
    for chain in table.chains() {
        batch.push(NEW_CHAIN, tlv::CREATE, |writer| {
            writer.text(1, TABLE);
            writer.text(3, chain.name);
            writer.nest(4, |writer| {
                writer.be32(1, chain.hook);
                writer.be32(2, chain.priority.cast_unsigned());
            });
            writer.be32(5, ACCEPT);
            writer.text(7, chain.kind);
        });
        for rule in &chain.rules {
            batch.push(NEW_RULE, tlv::CREATE | tlv::APPEND, |writer| {
                writer.text(1, TABLE);
                writer.text(2, chain.name);
                writer.nest(4, |writer| {
                    for expr in rule {
                        encode(writer, *expr, &table.bridge);
                    }
                });
                writer.attr(7, &rule_mark());
            });
        }
    }
    Ok(batch.commit(conn)?)
}

/// Removes table `inet weft`; without one, nothing happens.
///
/// # Errors
/// The kernel's refusal.
pub fn remove(conn: &mut Conn) -> Result<(), NftError> {
    let mut batch = Batch::new();
    batch.delete();
    Ok(batch.commit(conn)?)
}

/// The digest of the table in the kernel; [`CHANGED`] when somebody edited it, `None` when there is none.
///
/// # Errors
/// The kernel's refusal.
pub fn dump(conn: &mut Conn) -> Result<Option<String>, NftError> {
    let tables = conn.dump(GET_TABLE, INET, |_| {})?;
    let Some((_, table)) =
        tables.into_iter().find(|(_, table)| find_text(table, 1).as_deref() == Some(TABLE))
    else {
        return Ok(None);
    };
    let digest = find(&table, 6).and_then(attr_comment).unwrap_or_else(|| CHANGED.to_owned());
    let awake = find_be32(&table, 2).unwrap_or_default() == 0;
    let ours = |body: &[u8]| find_text(body, 1).as_deref() == Some(TABLE);

    let mut lines = Vec::new();
    for (_, chain) in conn.dump(GET_CHAIN, INET, |_| {})?.iter().filter(|(_, body)| ours(body)) {
        let hook = find(chain, 4).unwrap_or_default();
        lines.push(chain_line(
            &find_text(chain, 3).unwrap_or_default(),
            find_be32(hook, 1).unwrap_or(u32::MAX),
            find_be32(hook, 2).unwrap_or_default().cast_signed(),
            find_be32(chain, 5).unwrap_or(u32::MAX),
            &find_text(chain, 7).unwrap_or_default(),
        ));
    }
    for (_, rule) in
        conn.dump(GET_RULE, INET, |writer| writer.text(1, TABLE))?.iter().filter(|(_, body)| ours(body))
    {
        let expressions: Vec<String> = attrs(find(rule, 4).unwrap_or_default())
            .map(|(_, expr)| find_text(expr, 1).unwrap_or_default())
            .collect();
        lines.push(rule_line(
            &find_text(rule, 2).unwrap_or_default(),
            find(rule, 7).unwrap_or_default(),
            &expressions,
        ));
    }
    let sets = conn.dump(GET_SET, INET, |writer| writer.text(1, TABLE))?;
    for (_, set) in sets.iter().filter(|(_, body)| ours(body)) {
        let name = find_text(set, 2).unwrap_or_default();
        lines.push(set_line(&name, find_be32(set, 3).unwrap_or_default()));
        let parts = conn.dump(GET_ELEMENTS, INET, |writer| {
            writer.text(1, TABLE);
            writer.text(2, &name);
        })?;
        for (_, part) in &parts {
            for (_, element) in attrs(find(part, 3).unwrap_or_default()) {
                let key = find(element, 1).and_then(|key| find(key, 1)).unwrap_or_default();
                let end = find_be32(element, 3).unwrap_or_default() & INTERVAL_END != 0;
                lines.push(element_line(&name, key, end));
            }
        }
    }
    let seen = format!("-{:016x}", fnv(shape_of(lines).as_bytes()));
    Ok(Some(if awake && digest.ends_with(&seen) { digest } else { CHANGED.to_owned() }))
}

/// The text of a comment in user data.
fn attr_comment(data: &[u8]) -> Option<String> {
    let len = usize::from(*data.get(1)?);
    if data.first() != Some(&0) {
        return None;
    }
    let text = data.get(2..2 + len)?.strip_suffix(&[0])?;
    String::from_utf8(text.to_vec()).ok()
}

/// What else in the kernel drops forwarded traffic and so may cut pods off: a sentence each, with what to do.
///
/// A chain that accepts the bridge in both directions, or the cluster CIDRs in both, is not named. What is seen
/// is the policy of base chains at the forward hook, not a drop by a rule.
///
/// # Errors
/// The kernel's refusal.
pub fn foreign_drops(conn: &mut Conn, bridge: &str, cluster: &[IpNet]) -> Result<Vec<String>, NftError> {
    let mut out = Vec::new();
    for (family, chain) in conn.dump(GET_CHAIN, 0, |_| {})? {
        let Some(word) = (match family {
            INET => Some("inet"),
            IPV4 => Some("ip"),
            IPV6 => Some("ip6"),
            _ => None,
        }) else {
            continue;
        };
        let hook = find(&chain, 4).unwrap_or_default();
        let table = find_text(&chain, 1).unwrap_or_default();
        let name = find_text(&chain, 3).unwrap_or_default();
        if find_be32(hook, 1) != Some(HOOK_FORWARD)
            || find_be32(&chain, 5) != Some(DROP)
            || (family == INET && table == TABLE)
        {
            continue;
        }
        let rules = conn.dump(GET_RULE, family, |writer| {
            writer.text(1, &table);
            writer.text(2, &name);
        })?;
        let accepted: Vec<Accepted> = rules
            .iter()
            .filter(|(_, rule)| {
                find_text(rule, 1).as_deref() == Some(&table) && find_text(rule, 2).as_deref() == Some(&name)
            })
            .filter_map(|(_, rule)| accepts(find(rule, 4).unwrap_or_default()))
            .collect();
        if passes(&accepted, family, bridge, cluster) {
            continue;
        }
        let advice = if family != INET && table == "filter" && name == "FORWARD" {
            let tool = if family == IPV4 { "iptables" } else { "ip6tables" };
            format!("{tool} -I FORWARD -i {bridge} -j ACCEPT` and `{tool} -I FORWARD -o {bridge} -j ACCEPT")
        } else {
            format!(
                "nft insert rule {word} {table} {name} iifname {bridge} accept` and `nft insert rule {word} {table} {name} oifname {bridge} accept"
            )
        };
        out.push(format!(
            "chain {name} of the nftables table {word} {table} drops forwarded traffic by its policy, which cuts pods off: allow the pods' bridge by `{advice}`"
        ));
    }
    out.extend(legacy_drop(bridge));
    Ok(out)
}

/// What one rule accepts, if it is simple enough to tell.
#[derive(Debug, PartialEq, Eq)]
enum Accepted {
    /// Everything from (`true`) or to an interface whose name starts so; ended by a zero byte if it is whole.
    Interface { from: bool, name: Vec<u8> },
    /// Everything from (`true`) or to a network: where the address is compared, and with what.
    Network { from: bool, v6: bool, address: Vec<u8>, mask: Vec<u8> },
    /// Everything.
    All,
}

fn accepts(expressions: &[u8]) -> Option<Accepted> {
    let mut rest = attrs(expressions)
        .filter_map(|(_, expr)| Some((find_text(expr, 1)?, find(expr, 2).unwrap_or_default())))
        .filter(|(name, _)| name != "counter")
        .peekable();
    let verdict = |data: &[u8]| {
        find_be32(data, 1) == Some(0)
            && find(data, 2).and_then(|data| find(data, 2)).and_then(|data| find_be32(data, 1))
                == Some(ACCEPT)
    };
    let (name, data) = rest.next()?;
    let equal = |name: &str, data: &[u8]| -> Option<Vec<u8>> {
        if name != "cmp" || find_be32(data, 2) != Some(0) {
            return None;
        }
        Some(find(find(data, 3)?, 1)?.to_vec())
    };
    let accepted = match name.as_str() {
        "immediate" => return (verdict(data) && rest.next().is_none()).then_some(Accepted::All),
        "meta" => {
            let from = match find_be32(data, 2)? {
                META_IIFNAME => true,
                META_OIFNAME => false,
                META_NFPROTO => {
                    // `ip saddr` in an inet table starts by the protocol: what follows tells the family anyway.
                    rest.next()?;
                    let (name, data) = rest.next()?;
                    return network(&name, data, &mut rest).filter(|_| {
                        rest.next().is_some_and(|(name, data)| name == "immediate" && verdict(data))
                            && rest.next().is_none()
                    });
                }
                _ => return None,
            };
            let (name, data) = rest.next()?;
            Accepted::Interface { from, name: equal(&name, data)? }
        }
        _ => network(&name, data, &mut rest)?,
    };
    let (name, data) = rest.next()?;
    (name == "immediate" && verdict(data) && rest.next().is_none()).then_some(accepted)
}

fn network<'a>(
    name: &str,
    data: &[u8],
    rest: &mut impl Iterator<Item = (String, &'a [u8])>,
) -> Option<Accepted> {
    if name != "payload" || find_be32(data, 2) != Some(1) {
        return None;
    }
    let len = find_be32(data, 4)? as usize;
    let (from, v6) = match find_be32(data, 3)? {
        12 if len <= 4 => (true, false),
        16 if len <= 4 => (false, false),
        8 if len <= 16 => (true, true),
        24 if len <= 16 => (false, true),
        _ => return None,
    };
    let (mut name, mut data) = rest.next()?;
    let mut mask = vec![0xff; len];
    if name == "bitwise" {
        mask = find(find(data, 4)?, 1)?.to_vec();
        (name, data) = rest.next()?;
    }
    if name != "cmp" || find_be32(data, 2) != Some(0) {
        return None;
    }
    Some(Accepted::Network { from, v6, address: find(find(data, 3)?, 1)?.to_vec(), mask })
}

/// Whether these rules let the pods of the chain's families through, in both directions.
fn passes(accepted: &[Accepted], family: u8, bridge: &str, cluster: &[IpNet]) -> bool {
    let whole = interface(bridge);
    let both = |test: &dyn Fn(bool) -> bool| test(true) && test(false);
    if accepted.contains(&Accepted::All) {
        return true;
    }
    if both(&|wanted| {
        accepted.iter().any(|one| {
            matches!(one, Accepted::Interface { from, name } if *from == wanted && whole.starts_with(name))
        })
    }) {
        return true;
    }
    let mut relevant =
        cluster.iter().filter(|net| family == INET || (family == IPV6) == net.addr().is_ipv6()).peekable();
    relevant.peek().is_some()
        && relevant.all(|net| both(&|wanted| accepted.iter().any(|one| covers(one, wanted, net))))
}

fn covers(accepted: &Accepted, wanted: bool, net: &IpNet) -> bool {
    let Accepted::Network { from, v6, address, mask } = accepted else { return false };
    let bytes = match net.network() {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    };
    let bits: u32 = mask.iter().map(|byte| byte.count_ones()).sum();
    *from == wanted
        && *v6 == net.addr().is_ipv6()
        && bits <= u32::from(net.prefix_len())
        && mask.len() == address.len()
        && mask.iter().zip(address).zip(&bytes).all(|((mask, address), byte)| byte & mask == *address)
}

/// The policy of FORWARD in the tables of the old iptables, which netlink does not show: read through its own
/// tool if the table is loaded and the tool is there, else passed over.
fn legacy_drop(bridge: &str) -> Vec<String> {
    let mut out = Vec::new();
    for (names, tool) in [("ip_tables_names", "iptables-legacy"), ("ip6_tables_names", "ip6tables-legacy")] {
        let loaded = std::fs::read_to_string(format!("/proc/thread-self/net/{names}")).unwrap_or_default();
        if !loaded.lines().any(|line| line == "filter") {
            continue;
        }
        let Ok(output) = std::process::Command::new(tool).args(["-S", "FORWARD"]).output() else { continue };
        let text = String::from_utf8_lossy(&output.stdout);
        let has = |line: &str| text.lines().any(|found| found == line);
        if has("-P FORWARD DROP")
            && !(has(&format!("-A FORWARD -i {bridge} -j ACCEPT"))
                && has(&format!("-A FORWARD -o {bridge} -j ACCEPT")))
        {
            out.push(format!(
                "chain FORWARD of {tool}, table filter, drops forwarded traffic by its policy, which cuts pods off: allow the pods' bridge by `{tool} -I FORWARD -i {bridge} -j ACCEPT` and `{tool} -I FORWARD -o {bridge} -j ACCEPT`"
            ));
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
