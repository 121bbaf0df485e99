//! Which peer owns which address: the one table that the data path reads.
//!
//! It is made anew by the control path and never changed. Invariant: no address belongs to two peers.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use weft_wire::types::TunnelKey;

use super::peer::Peer;

/// The peers of a moment.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) peers: HashMap<TunnelKey, Arc<Peer>>,
    /// By the upper 24 bits of the receiver index of what they send.
    indices: HashMap<u32, Arc<Peer>>,
    /// First and last address of each prefix, ascending.
    ranges: Vec<Range>,
}

#[derive(Debug)]
struct Range {
    first: u128,
    last: u128,
    prefix: IpNet,
    peer: Arc<Peer>,
}

/// Both families on one line: IPv4 as mapped into IPv6 (RFC 4291 s2.5.5.2).
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().into(),
        IpAddr::V6(address) => address.into(),
    }
}

impl Table {
    /// Puts peers and their prefixes together; a prefix that overlaps one of another peer is left out and returned, as
    /// a sentence. Earlier entries win.
    pub(super) fn new(entries: Vec<(Arc<Peer>, Vec<IpNet>)>) -> (Self, Vec<String>) {
        let mut table = Self::default();
        let mut refused = Vec::new();
        for (peer, prefixes) in entries {
            for prefix in prefixes {
                let range = Range {
                    first: number(prefix.network()),
                    last: number(prefix.broadcast()),
                    prefix,
                    peer: Arc::clone(&peer),
                };
                let place = table.ranges.partition_point(|other| other.last < range.first);
                match table.ranges.get(place).filter(|other| other.first <= range.last) {
                    Some(other) if !Arc::ptr_eq(&other.peer, &peer) => refused.push(format!(
                        "{} announces {prefix}, which overlaps {} of {}; {} keeps it here",
                        peer.node, other.prefix, other.peer.node, other.peer.node
                    )),
                    Some(_) => {}
                    None => table.ranges.insert(place, range),
                }
            }
            table.indices.insert(peer.index, Arc::clone(&peer));
            table.indices.extend(peer.previous().map(|earlier| (earlier.index, earlier)));
            table.peers.insert(peer.key, peer);
        }
        (table, refused)
    }

    /// Returns whose an address is.
    pub(super) fn owner(&self, address: IpAddr) -> Option<&Arc<Peer>> {
        let address = number(address);
        let place = self.ranges.partition_point(|range| range.last < address);
        self.ranges.get(place).filter(|range| range.first <= address).map(|range| &range.peer)
    }

    /// Returns the peer that a receiver index was given to.
    pub(super) fn by_receiver(&self, receiver: u32) -> Option<&Arc<Peer>> {
        self.indices.get(&(receiver >> 8))
    }
}
