//! What `tests/fuzz` needs of the tunnels and no daemon does: two ends without a device, a socket or a thread.
//!
//! Built with `--cfg fuzzing` alone.

use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;
use weft_wire::packet::{VnetHeader, split};

use super::counters::Counters;
use super::inbound::{Recipient, owns, receiver, recipient};
use super::peer::{Opened, Peer};
use super::table::Table;
use super::udp::Batch;
use super::{Identity, TunnelPeer, TunnelSecret};

/// One end of a tunnel.
#[derive(Debug)]
pub struct End {
    identities: Vec<Identity>,
    table: Table,
    counters: Counters,
}

fn address(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 51820))
}

impl End {
    /// The end with a number, which knows the end with another: each has 10.77.N.0/24 and fd77::N:0/112.
    pub fn new(number: u8, other: u8) -> Self {
        let secret = TunnelSecret::from_bytes([number; 32]);
        let prefixes: Vec<IpNet> = [format!("10.77.{other}.0/24"), format!("fd77::{other}:0/112")]
            .iter()
            .map(|prefix| prefix.parse().expect("a prefix"))
            .collect();
        let peer = TunnelPeer {
            node: format!("n{other}").parse().expect("a name"),
            key: TunnelSecret::from_bytes([other; 32]).public(),
            endpoint: address(other),
            prefixes: prefixes.clone(),
            preshared: None,
        };
        let peer = Peer::new(&peer, u32::from(number), secret.clone(), None);
        let (table, refused) = Table::new(vec![(Arc::new(peer), prefixes)]);
        assert!(refused.is_empty());
        Self { identities: vec![Identity::new(&secret)], table, counters: Counters::default() }
    }

    /// Takes what a TUN device could give; returns the datagrams to send.
    pub fn seal(&mut self, header: VnetHeader, packet: &mut [u8]) -> Vec<Vec<u8>> {
        let Some(peer) = weft_wire::packet::destination(packet).and_then(|to| self.table.owner(to)) else {
            return Vec::new();
        };
        let (mut batch, mut session) = (Batch::default(), peer.session());
        let seal = |packet: &[u8]| session.seal(packet, 1440, &mut batch, &self.counters);
        // What cannot be split gives nothing to send.
        let _ = split(header, packet, &mut Vec::new(), seal);
        batch.datagrams()
    }

    /// Takes a datagram of the other end; returns the packet within, if any, and the datagrams to answer with.
    pub fn open(&mut self, from: u8, datagram: &[u8]) -> (Option<Vec<u8>>, Vec<Vec<u8>>) {
        let mut answers = Batch::default();
        let peer = if datagram.first() == Some(&4) {
            receiver(datagram).and_then(|receiver| self.table.by_receiver(receiver)).cloned()
        } else {
            match recipient(&self.table, &self.identities, address(from), datagram, &mut [0; 64]) {
                Recipient::Peer(peer) => Some(peer),
                Recipient::Stranger(_) | Recipient::Cookie(_) | Recipient::None(_) => None,
            }
        };
        let Some(peer) = peer else { return (None, Vec::new()) };
        let mut room = vec![0; 1 << 16];
        let opened = peer.session().open(address(from), datagram, &mut room, &mut answers);
        let packet = match opened {
            Opened::Packet(length, source) if owns(&self.table, &peer, source) => {
                Some(room[..length].to_vec())
            }
            _ => None,
        };
        (packet, answers.datagrams())
    }
}
