//! Peers that answer: a session of boringtun's each, at a port of its own, that sends every echo request back as its reply.

use std::net::{IpAddr, UdpSocket};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use weft_wire::mesh::{Carrier, TunnelFacts};
use weft_wire::preshared::PresharedKey;
use weft_wire::seal::KeyRing;
use weft_wire::types::TunnelKey;

const FIRST_PORT: u16 = 40_000;

fn secret(peer: usize) -> StaticSecret {
    let mut bytes = [9; 32];
    bytes[..8].copy_from_slice(&(peer as u64).to_be_bytes());
    StaticSecret::from(bytes)
}

/// What a peer announces of its tunnel.
pub fn facts(peer: usize, ring: &KeyRing) -> TunnelFacts {
    TunnelFacts {
        key: TunnelKey(PublicKey::from(&secret(peer)).to_bytes()),
        port: FIRST_PORT + u16::try_from(peer).expect("peers fit the ports"),
        preshared: ring.ids().collect(),
        pairs: Vec::new(),
        carrier: Some(Carrier::UserSpace),
        detour: None,
    }
}

/// One of them.
pub struct Answering {
    socket: UdpSocket,
    tunn: Tunn,
}

impl Answering {
    /// Waits for the node whose tunnel is known by these facts.
    pub fn new(peer: usize, address: IpAddr, node: &TunnelFacts, ring: &KeyRing) -> Self {
        let own = facts(peer, ring);
        let socket = UdpSocket::bind((address, own.port)).expect("the port is free");
        socket.set_nonblocking(true).expect("a socket can be made not to block");
        let shared = PresharedKey::of_pair(ring, &node.preshared, own.key, node.key).map(|key| *key.secret());
        let index = u32::try_from(peer).expect("few peers");
        let tunn = Tunn::new(secret(peer), PublicKey::from(node.key.0), shared, None, index, None);
        Self { socket, tunn }
    }

    /// Answers what came.
    pub fn answer(&mut self) {
        let (mut datagram, mut room) = ([0; 2048], [0; 2048]);
        while let Ok((length, from)) = self.socket.recv_from(&mut datagram) {
            let mut reply = Vec::new();
            match self.tunn.decapsulate(Some(from.ip()), &datagram[..length], &mut room) {
                TunnResult::WriteToNetwork(answer) => drop(self.socket.send_to(answer, from)),
                TunnResult::WriteToTunnelV4(packet, _) => reply = echoed(packet),
                _ => {}
            }
            if !reply.is_empty()
                && let TunnResult::WriteToNetwork(answer) = self.tunn.encapsulate(&reply, &mut room)
            {
                drop(self.socket.send_to(answer, from));
            }
        }
        // It never asks: the node does, and renews.
        let _ = self.tunn.update_timers(&mut room);
    }
}

/// Turns an echo request into its reply (RFC 792); nothing for what is none.
fn echoed(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet.len() < 28 || packet[9] != 1 || packet[20] != 8 {
        return Vec::new();
    }
    for byte in 12..16 {
        packet.swap(byte, byte + 4);
    }
    packet[20] = 0;
    // The sum is of complements, and 0x0800 less is in it (RFC 1624).
    let sum = u32::from(u16::from_be_bytes([packet[22], packet[23]])) + 0x0800;
    let sum = u16::try_from((sum & 0xffff) + (sum >> 16)).expect("one carry at most");
    packet[22..24].copy_from_slice(&sum.to_be_bytes());
    packet
}
