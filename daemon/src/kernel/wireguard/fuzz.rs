//! What `tests/fuzz` needs of the reader of WireGuard devices: bytes in place of a socket.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use ipnet::IpNet;
use weft_wire::types::TunnelKey;

use super::{Change, ChangeKind, Device, Writer, wire};

/// Reads a run of answers about a device, each after its length in two bytes; returns how many peers and prefixes there are.
pub fn wireguard_device(mut bytes: &[u8]) -> (usize, usize) {
    let mut device = Device::default();
    while let Some((length, rest)) = bytes.split_first_chunk::<2>() {
        let (answer, rest) = rest.split_at(usize::from(u16::from_be_bytes(*length)).min(rest.len()));
        wire::merge(answer, &mut device);
        bytes = rest;
    }
    (device.peers.len(), device.peers.values().map(|peer| peer.prefixes.len()).sum())
}

/// Whether a peer is read as it is written, in as many messages as it takes.
pub fn wireguard_reads_back(key: [u8; 32], endpoint: SocketAddr, keepalive: u16, prefixes: &[IpNet]) -> bool {
    let key = TunnelKey(key);
    let change = Change {
        endpoint: Some(endpoint),
        keepalive: Some(keepalive),
        preshared: Some(key.0),
        prefixes: prefixes.to_vec(),
        ..Change::new(key, ChangeKind::Add)
    };
    let mut device = Device::default();
    for message in wire::messages(&[change]) {
        let mut writer = Writer::default();
        wire::peers(&mut writer, "weft-wg", &message);
        wire::merge(&writer.bytes, &mut device);
    }
    let prefixes: BTreeSet<IpNet> = prefixes.iter().copied().collect();
    device.peers.len() == 1
        && device.peers.get(&key).is_some_and(|peer| {
            (peer.endpoint, peer.keepalive, peer.preshared, &peer.prefixes)
                == (Some(endpoint), keepalive, key.0, &prefixes)
        })
}
