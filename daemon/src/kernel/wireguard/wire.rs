//! The attributes of the generic netlink family `wireguard` (include/uapi/linux/wireguard.h), written and read.
//!
//! Pure. Invariants: a reader believes no length; a peer that spans several answers becomes one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::{Duration, UNIX_EPOCH};

use ipnet::IpNet;
use weft_wire::types::TunnelKey;

use super::super::tlv::{Writer, attrs, find};
use super::{Change, ChangeKind, Device, FoundPeer};

pub(super) const DEVICE_NAME: u16 = 2;
const DEVICE_SECRET: u16 = 3;
const DEVICE_KEY: u16 = 4;
const DEVICE_PORT: u16 = 6;
const DEVICE_FWMARK: u16 = 7;
const DEVICE_PEERS: u16 = 8;

const PEER_KEY: u16 = 1;
const PEER_PRESHARED: u16 = 2;
const PEER_FLAGS: u16 = 3;
const PEER_ENDPOINT: u16 = 4;
const PEER_KEEPALIVE: u16 = 5;
const PEER_HANDSHAKE: u16 = 6;
const PEER_RECEIVED: u16 = 7;
const PEER_SENT: u16 = 8;
const PEER_PREFIXES: u16 = 9;

const PREFIX_FAMILY: u16 = 1;
const PREFIX_ADDRESS: u16 = 2;
const PREFIX_LENGTH: u16 = 3;

const REMOVE_ME: u32 = 1;
const REPLACE_PREFIXES: u32 = 2;
const UPDATE_ONLY: u32 = 4;

/// The most bytes of one message's peers: below the 64 KiB of a nest, with room for one more piece.
const MESSAGE: usize = 32 * 1024;
/// The most prefixes of one peer in one piece.
const PIECE: usize = 256;
/// The most bytes that a peer takes without its prefixes, and that a prefix takes.
const PEER_BYTES: usize = 160;
const PREFIX_BYTES: usize = 44;

/// Cuts changes into messages: each is a run of peers, and a peer with many prefixes comes in pieces, of which the first alone
/// replaces what was there.
pub(super) fn messages(changes: &[Change]) -> Vec<Vec<Change>> {
    let mut messages: Vec<Vec<Change>> = Vec::new();
    let mut room = 0;
    for piece in changes.iter().flat_map(pieces) {
        let bytes = PEER_BYTES + PREFIX_BYTES * piece.prefixes.len();
        match messages.last_mut().filter(|_| bytes <= room) {
            Some(message) => {
                room -= bytes;
                message.push(piece);
            }
            None => {
                room = MESSAGE.saturating_sub(bytes);
                messages.push(vec![piece]);
            }
        }
    }
    messages
}

fn pieces(change: &Change) -> Vec<Change> {
    let first = change.prefixes.len().min(PIECE);
    let (head, rest) = change.prefixes.split_at(first);
    let mut pieces = vec![Change { prefixes: head.to_vec(), ..change.clone() }];
    pieces.extend(rest.chunks(PIECE).map(|prefixes| Change {
        prefixes: prefixes.to_vec(),
        ..Change::new(change.key, ChangeKind::Update)
    }));
    pieces
}

/// Writes what the device is.
pub(super) fn identity(writer: &mut Writer, name: &str, secret: &[u8; 32], port: u16) {
    writer.text(DEVICE_NAME, name);
    writer.attr(DEVICE_SECRET, secret);
    writer.attr(DEVICE_PORT, &port.to_ne_bytes());
    writer.attr(DEVICE_FWMARK, &0_u32.to_ne_bytes());
}

/// Writes the peers of one message.
pub(super) fn peers(writer: &mut Writer, name: &str, changes: &[Change]) {
    writer.text(DEVICE_NAME, name);
    writer.nest(DEVICE_PEERS, |list| {
        for change in changes {
            list.nest(0, |peer| write_peer(peer, change));
        }
    });
}

fn write_peer(peer: &mut Writer, change: &Change) {
    peer.attr(PEER_KEY, &change.key.0);
    let flags = match change.kind {
        ChangeKind::Add => 0,
        ChangeKind::Update => UPDATE_ONLY,
        ChangeKind::Replace => UPDATE_ONLY | REPLACE_PREFIXES,
        ChangeKind::Remove => UPDATE_ONLY | REMOVE_ME,
    };
    peer.attr(PEER_FLAGS, &u32::to_ne_bytes(flags));
    if let Some(secret) = change.preshared {
        peer.attr(PEER_PRESHARED, &secret);
    }
    if let Some(endpoint) = change.endpoint {
        peer.attr(PEER_ENDPOINT, &sockaddr(endpoint));
    }
    if let Some(keepalive) = change.keepalive {
        peer.attr(PEER_KEEPALIVE, &keepalive.to_ne_bytes());
    }
    if !change.prefixes.is_empty() {
        peer.nest(PEER_PREFIXES, |list| change.prefixes.iter().for_each(|net| write_prefix(list, *net)));
    }
}

fn write_prefix(list: &mut Writer, net: IpNet) {
    list.nest(0, |prefix| {
        let family = if net.addr().is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let family = u16::try_from(family).expect("the two families are small numbers");
        prefix.attr(PREFIX_FAMILY, &family.to_ne_bytes());
        match net.addr() {
            IpAddr::V4(address) => prefix.attr(PREFIX_ADDRESS, &address.octets()),
            IpAddr::V6(address) => prefix.attr(PREFIX_ADDRESS, &address.octets()),
        }
        prefix.attr(PREFIX_LENGTH, &[net.prefix_len()]);
    });
}

/// `struct sockaddr_in` or `sockaddr_in6`: the family in the host's byte order, the port in the network's.
fn sockaddr(address: SocketAddr) -> Vec<u8> {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut bytes = u16::try_from(family).expect("the two families are small numbers").to_ne_bytes().to_vec();
    bytes.extend(address.port().to_be_bytes());
    match address {
        SocketAddr::V4(address) => {
            bytes.extend(address.ip().octets());
            bytes.extend([0; 8]);
        }
        SocketAddr::V6(address) => {
            bytes.extend([0; 4]);
            bytes.extend(address.ip().octets());
            bytes.extend(address.scope_id().to_ne_bytes());
        }
    }
    bytes
}

fn read_sockaddr(bytes: &[u8]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(part(bytes, 2)?);
    match i32::from(u16::from_ne_bytes(part(bytes, 0)?)) {
        libc::AF_INET => Some((Ipv4Addr::from(part::<4>(bytes, 4)?), port).into()),
        libc::AF_INET6 => {
            let scope = u32::from_ne_bytes(part(bytes, 24)?);
            Some(SocketAddrV6::new(Ipv6Addr::from(part::<16>(bytes, 8)?), port, 0, scope).into())
        }
        _ => None,
    }
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// Reads a value of exactly that size.
fn exact<const N: usize>(bytes: &[u8], kind: u16) -> Option<[u8; N]> {
    find(bytes, kind)?.try_into().ok()
}

/// Adds what one answer says to what those before said.
pub(super) fn merge(answer: &[u8], device: &mut Device) {
    if let Some(key) = exact(answer, DEVICE_KEY) {
        device.key = Some(TunnelKey(key));
    }
    if let Some(port) = exact(answer, DEVICE_PORT) {
        device.port = u16::from_ne_bytes(port);
    }
    if let Some(mark) = exact(answer, DEVICE_FWMARK) {
        device.fwmark = u32::from_ne_bytes(mark);
    }
    for (_, bytes) in attrs(find(answer, DEVICE_PEERS).unwrap_or_default()) {
        let Some(key) = exact(bytes, PEER_KEY) else { continue };
        read_peer(bytes, device.peers.entry(TunnelKey(key)).or_default());
    }
}

fn read_peer(bytes: &[u8], peer: &mut FoundPeer) {
    if let Some(endpoint) = find(bytes, PEER_ENDPOINT).and_then(read_sockaddr) {
        peer.endpoint = Some(endpoint);
    }
    if let Some(keepalive) = exact(bytes, PEER_KEEPALIVE) {
        peer.keepalive = u16::from_ne_bytes(keepalive);
    }
    if let Some(secret) = exact(bytes, PEER_PRESHARED) {
        peer.preshared = secret;
    }
    // `struct __kernel_timespec`; all zero before the first.
    if let Some(time) = exact::<16>(bytes, PEER_HANDSHAKE) {
        let number =
            |at| part(&time, at).map(i64::from_ne_bytes).and_then(|number| u64::try_from(number).ok());
        let (seconds, nanos) = (number(0).unwrap_or_default(), number(8).unwrap_or_default());
        let since = Duration::from_secs(seconds).saturating_add(Duration::from_nanos(nanos));
        peer.handshake = UNIX_EPOCH.checked_add(since).filter(|_| !since.is_zero());
    }
    if let Some(bytes) = exact(bytes, PEER_RECEIVED) {
        peer.received = u64::from_ne_bytes(bytes);
    }
    if let Some(bytes) = exact(bytes, PEER_SENT) {
        peer.sent = u64::from_ne_bytes(bytes);
    }
    let prefixes = attrs(find(bytes, PEER_PREFIXES).unwrap_or_default());
    peer.prefixes.extend(prefixes.filter_map(|(_, bytes)| read_prefix(bytes)));
}

fn read_prefix(bytes: &[u8]) -> Option<IpNet> {
    let [length] = exact(bytes, PREFIX_LENGTH)?;
    let v4 = exact::<4>(bytes, PREFIX_ADDRESS).map(|octets| IpAddr::from(Ipv4Addr::from(octets)));
    let address =
        v4.or_else(|| exact::<16>(bytes, PREFIX_ADDRESS).map(|octets| Ipv6Addr::from(octets).into()))?;
    IpNet::new(address, length).ok()
}
