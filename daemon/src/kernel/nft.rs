//! The one nftables table of weft, by netlink: what it should hold, whether it holds it, and its replacement.
//!
//! Not a general client: it writes table `inet weft` only and reads others only to name what cuts pods off.
//! Invariant: the table changes in one transaction, so there is never a moment without it, and it carries the
//! digest of what it was made from in its comment.

use std::io;

use crate::plan::table::{
    ACCEPT, Expr, META_IIFNAME, META_OIFNAME, SET_INTERVAL, TUNNEL_NAMES, Table, chain_line, comment,
    element_line, fnv, rule_line, rule_mark, set_line, shape_of,
};

use super::tlv::{self, Conversation, Writer, attrs, find, find_be32, find_text};

pub(super) mod foreign;

pub use foreign::foreign_drops;

/// The table's name, in family `inet`.
pub const TABLE: &str = "weft";
/// What [`dump`] says about a table that carries weft's name but not weft's content.
pub const CHANGED: &str = "changed";

const NETLINK_NETFILTER: isize = 12;
pub(super) const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DEL_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
pub(super) const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const NEW_SET: u16 = 9;
const GET_SET: u16 = 10;
const NEW_ELEMENTS: u16 = 12;
pub(super) const GET_ELEMENTS: u16 = 13;

pub(super) const INET: u8 = 1;
const DROP: u32 = 0;
const VERDICT_REGISTER: u32 = 0;
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
const TCP_FLAGS: u32 = 13;
const TCP_SYN: u8 = 2;
const TCP_OPTION_MSS: u8 = 2;
const RT_TCPMSS: u32 = 3;
const HOST_TO_NETWORK: u32 = 1;
const EXTHDR_TCP_OPTION: u32 = 1;
const INTERVAL_END: u32 = 1;
const MASQUERADE_FULLY_RANDOM: u32 = 16;
const MASQUERADE_PORTS: u32 = 2;
/// Elements in one message: an IPv6 element takes 40 bytes of the 64 KiB a nest can hold.
const ELEMENTS_A_MESSAGE: usize = 1000;

/// Why the table could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The kernel has no nf_tables, or not the part that is needed.
    #[error(
        "the kernel refuses nftables ({0}): load the modules nf_tables, nft_ct, nft_chain_nat and nft_masq, or use a kernel that has them"
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

    fn dump(&mut self, kind: u16, family: u8, fill: impl Fn(&mut Writer)) -> io::Result<Vec<Object>> {
        let answers = self.0.request((SUBSYSTEM << 8) | kind, tlv::DUMP, &generic(family, 0), fill)?;
        Ok(answers.into_iter().filter_map(|(_, body)| object(&body)).collect())
    }
}

/// What a dump answers with: a family, and the attributes.
pub(super) type Object = (u8, Vec<u8>);

pub(super) fn object(body: &[u8]) -> Option<Object> {
    Some((*body.first()?, body.get(4..)?.to_vec()))
}

pub(super) fn generic(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

fn expression(writer: &mut Writer, name: &str, fill: impl FnOnce(&mut Writer)) {
    writer.nest(1, |writer| {
        writer.text(1, name);
        writer.nest(2, fill);
    });
}

fn meta(writer: &mut Writer, key: u32) {
    expression(writer, "meta", |writer| {
        writer.be32(1, 1);
        writer.be32(2, key);
    });
}

fn payload(writer: &mut Writer, base: u32, offset: u32, len: u32) {
    expression(writer, "payload", |writer| {
        writer.be32(1, 1);
        writer.be32(2, base);
        writer.be32(3, offset);
        writer.be32(4, len);
    });
}

fn compare(writer: &mut Writer, operation: u32, value: &[u8]) {
    expression(writer, "cmp", |writer| {
        writer.be32(1, 1);
        writer.be32(2, operation);
        writer.nest(3, |writer| writer.attr(1, value));
    });
}

fn port(writer: &mut Writer, register: u32, port: u16) {
    expression(writer, "immediate", |writer| {
        writer.be32(1, register);
        writer.nest(2, |writer| writer.attr(1, &port.to_be_bytes()));
    });
}

fn encode(writer: &mut Writer, expr: Expr, table: &Table) {
    match expr {
        Expr::NotFrom(device) => {
            meta(writer, META_IIFNAME);
            compare(writer, NOT_EQUAL, &interface(table.device(device)));
        }
        Expr::NotTo(device) => {
            meta(writer, META_OIFNAME);
            compare(writer, NOT_EQUAL, &interface(table.device(device)));
        }
        Expr::FromTunnels => {
            meta(writer, META_IIFNAME);
            compare(writer, EQUAL, TUNNEL_NAMES);
        }
        Expr::ToTunnels => {
            meta(writer, META_OIFNAME);
            compare(writer, EQUAL, TUNNEL_NAMES);
        }
        Expr::Syn => {
            payload(writer, TRANSPORT_HEADER, TCP_FLAGS, 1);
            expression(writer, "bitwise", |writer| {
                writer.be32(1, 1);
                writer.be32(2, 1);
                writer.be32(3, 1);
                writer.nest(4, |writer| writer.attr(1, &[TCP_SYN]));
                writer.nest(5, |writer| writer.attr(1, &[0]));
            });
            compare(writer, NOT_EQUAL, &[0]);
        }
        Expr::MssOfRoute => mss_of_route(writer),
        Expr::Counter => expression(writer, "counter", |_| {}),
        Expr::Drop => expression(writer, "immediate", |writer| {
            writer.be32(1, VERDICT_REGISTER);
            writer.nest(2, |writer| writer.nest(2, |writer| writer.be32(1, DROP)));
        }),
        Expr::MetaByte { key, value } => {
            meta(writer, key);
            compare(writer, EQUAL, &[value]);
        }
        Expr::DestinationPort { port } => {
            payload(writer, TRANSPORT_HEADER, 2, 2);
            compare(writer, EQUAL, &port.to_be_bytes());
        }
        Expr::Address { offset, len, set, negated } => {
            payload(writer, NETWORK_HEADER, offset, len);
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
        Expr::NoTrack => expression(writer, "notrack", |_| {}),
    }
}

/// Writes what `tcp option maxseg size set rt mtu` is to nft(8): the kernel takes the lesser MTU of the routes there and back,
/// and only ever lowers the option (net/netfilter/nft_rt.c `get_tcpmss`, nft_exthdr.c `nft_exthdr_tcp_set_eval`).
fn mss_of_route(writer: &mut Writer) {
    expression(writer, "rt", |writer| {
        writer.be32(1, 1);
        writer.be32(2, RT_TCPMSS);
    });
    expression(writer, "byteorder", |writer| {
        writer.be32(1, 1);
        writer.be32(2, 1);
        writer.be32(3, HOST_TO_NETWORK);
        writer.be32(4, 2);
        writer.be32(5, 2);
    });
    expression(writer, "exthdr", |writer| {
        writer.attr(2, &[TCP_OPTION_MSS]);
        writer.be32(3, 2);
        writer.be32(4, 2);
        writer.be32(6, EXTHDR_TCP_OPTION);
        writer.be32(7, 1);
    });
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
pub(super) struct Batch {
    pub(super) messages: Vec<(u16, u16, Writer)>,
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
    Ok(replacement(table).commit(conn)?)
}

/// The transaction: whatever there is goes, the table comes.
pub(super) fn replacement(table: &Table) -> Batch {
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
                        encode(writer, *expr, table);
                    }
                });
                writer.attr(7, &rule_mark());
            });
        }
    }
    batch
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
    Ok(digest_of(|kind, fill| conn.dump(kind, INET, fill))?)
}

/// The same with `ask` in place of the socket: what it is given are the kind of the objects and which of them.
pub(super) fn digest_of(
    mut ask: impl FnMut(u16, &dyn Fn(&mut Writer)) -> io::Result<Vec<Object>>,
) -> io::Result<Option<String>> {
    let tables = ask(GET_TABLE, &|_| {})?;
    let Some((_, table)) =
        tables.into_iter().find(|(_, table)| find_text(table, 1).as_deref() == Some(TABLE))
    else {
        return Ok(None);
    };
    let digest = find(&table, 6).and_then(attr_comment).unwrap_or_else(|| CHANGED.to_owned());
    let awake = find_be32(&table, 2).unwrap_or_default() == 0;
    let ours = |body: &[u8]| find_text(body, 1).as_deref() == Some(TABLE);

    let mut lines = Vec::new();
    for (_, chain) in ask(GET_CHAIN, &|_| {})?.iter().filter(|(_, body)| ours(body)) {
        let hook = find(chain, 4).unwrap_or_default();
        lines.push(chain_line(
            &find_text(chain, 3).unwrap_or_default(),
            find_be32(hook, 1).unwrap_or(u32::MAX),
            find_be32(hook, 2).unwrap_or_default().cast_signed(),
            find_be32(chain, 5).unwrap_or(u32::MAX),
            &find_text(chain, 7).unwrap_or_default(),
        ));
    }
    for (_, rule) in ask(GET_RULE, &|writer| writer.text(1, TABLE))?.iter().filter(|(_, body)| ours(body)) {
        let expressions: Vec<String> = attrs(find(rule, 4).unwrap_or_default())
            .map(|(_, expr)| find_text(expr, 1).unwrap_or_default())
            .collect();
        lines.push(rule_line(
            &find_text(rule, 2).unwrap_or_default(),
            find(rule, 7).unwrap_or_default(),
            &expressions,
        ));
    }
    let sets = ask(GET_SET, &|writer| writer.text(1, TABLE))?;
    for (_, set) in sets.iter().filter(|(_, body)| ours(body)) {
        let name = find_text(set, 2).unwrap_or_default();
        lines.push(set_line(&name, find_be32(set, 3).unwrap_or_default()));
        let parts = ask(GET_ELEMENTS, &|writer| {
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
pub(super) fn attr_comment(data: &[u8]) -> Option<String> {
    let len = usize::from(*data.get(1)?);
    if data.first() != Some(&0) {
        return None;
    }
    let text = data.get(2..2 + len)?.strip_suffix(&[0])?;
    String::from_utf8(text.to_vec()).ok()
}
