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
                let start = table.ranges.partition_point(|other| other.last < range.first);
                let met = table.ranges[start..].partition_point(|other| other.first <= range.last);
                let met = start..start + met;
                match table.ranges[met.clone()].iter().find(|other| !Arc::ptr_eq(&other.peer, &peer)) {
                    Some(other) => refused.push(format!(
                        "{} announces {prefix}, which overlaps {} of {}; {} keeps it here",
                        peer.node, other.prefix, other.peer.node, other.peer.node
                    )),
                    // Of two prefixes one contains the other, or they have nothing in common.
                    None if met.len() == 1 && table.ranges[start].prefix.contains(&prefix) => {}
                    None => drop(table.ranges.splice(met, [range])),
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tunnel::{TunnelPeer, TunnelSecret};

    fn entry(number: u8, prefixes: &[IpNet]) -> (Arc<Peer>, Vec<IpNet>) {
        let wanted = TunnelPeer {
            node: format!("n{number}").parse().expect("a name"),
            key: TunnelSecret::from_bytes([number; 32]).public(),
            endpoint: ([192, 0, 2, number], 51820).into(),
            prefixes: prefixes.to_vec(),
            preshared: None,
        };
        let peer = Peer::new(&wanted, u32::from(number), TunnelSecret::from_bytes([99; 32]), None);
        (Arc::new(peer), prefixes.to_vec())
    }

    /// Few addresses, so that prefixes meet.
    fn arb_prefix() -> impl Strategy<Value = IpNet> {
        let v4 = (0_u8..4, any::<u8>(), 8_u8..=32).prop_map(|(third, last, length)| {
            IpNet::new([10, 0, third, last].into(), length).expect("a length of the family").trunc()
        });
        let v6 = (0_u16..4, any::<u16>(), 16_u8..=128).prop_map(|(fourth, last, length)| {
            let address = std::net::Ipv6Addr::new(0xfd00, 0, 0, fourth, 0, 0, 0, last);
            IpNet::new(address.into(), length).expect("a length of the family").trunc()
        });
        prop_oneof![v4, v6]
    }

    proptest! {
        /// As a list that is gone through from the first prefix to the last would say.
        #[test]
        fn an_address_is_of_the_peer_whose_prefix_it_is_in(
            wanted in prop::collection::vec(prop::collection::vec(arb_prefix(), 0..4), 0..6),
            asked in prop::collection::vec(arb_prefix(), 1..20),
        ) {
            let entries = wanted.iter().zip(1..).map(|(prefixes, number)| entry(number, prefixes)).collect();
            let (table, refused) = Table::new(entries);
            let mut list: Vec<(IpNet, usize)> = Vec::new();
            let mut left_out = 0;
            for (number, prefixes) in wanted.iter().enumerate() {
                for prefix in prefixes {
                    let met: Vec<usize> = list
                        .iter()
                        .filter(|(other, _)| other.contains(prefix) || prefix.contains(other))
                        .map(|(_, owner)| *owner)
                        .collect();
                    match met.iter().any(|owner| *owner != number) {
                        true => left_out += 1,
                        false => list.push((*prefix, number)),
                    }
                }
            }
            prop_assert_eq!(refused.len(), left_out);
            for address in asked.iter().flat_map(|prefix| [prefix.network(), prefix.broadcast()]) {
                let expected = list.iter().find(|(prefix, _)| prefix.contains(&address));
                let expected = expected.map(|(_, number)| format!("n{}", number + 1));
                prop_assert_eq!(table.owner(address).map(|peer| peer.node.to_string()), expected);
            }
        }
    }
}
