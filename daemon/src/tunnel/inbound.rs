//! From the peers to the TUN: a run of datagrams is opened under one lock, then written as few super-packets.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::{Packet, TunnResult};
use nix::errno::Errno;
use nix::poll::PollFlags;
use weft_wire::packet::Coalescer;
use weft_wire::types::TunnelKey;

use super::Shared;
use super::counters::Reason;
use super::peer::{Opened, Peer};
use super::table::Table;
use super::udp::{Batch, Udp, wait};

/// A run of datagrams fills one IP packet at most.
const MOST: usize = 1 << 16;
/// The first byte of what carries packets.
const DATA: u8 = 4;

/// What one thread keeps from batch to batch.
struct Inbound<'a> {
    shared: &'a Shared,
    /// Opened packets end to end: where each begins and how long it is.
    plain: Vec<u8>,
    pieces: Vec<(usize, usize)>,
    answers: Batch,
    coalescer: Coalescer,
}

/// Receives at one socket until the tunnels stop.
pub(super) fn run(shared: &Shared, udp: &Udp) {
    let mut buffer = vec![0; MOST];
    let mut control = Udp::control();
    let mut inbound = Inbound {
        shared,
        plain: vec![0; MOST],
        pieces: Vec::new(),
        answers: Batch::default(),
        coalescer: Coalescer::new(shared.tun.udp()),
    };
    while !shared.stopped() {
        match udp.receive(&mut buffer, &mut control) {
            Ok(arrived) => inbound.take(arrived.from, &buffer[..arrived.length], arrived.size),
            Err(Errno::EAGAIN) => wait(udp.as_fd(), PollFlags::POLLIN),
            // An ICMP error of an earlier datagram is told here; the peer's silence says the same.
            Err(_) => {}
        }
    }
}

impl Inbound<'_> {
    fn take(&mut self, from: SocketAddr, bytes: &[u8], size: usize) {
        let table = self.shared.table();
        let mut datagrams = bytes.chunks(size).peekable();
        while let Some(datagram) = datagrams.next() {
            if datagram.first() != Some(&DATA) {
                self.handshake(&table, from, datagram);
                continue;
            }
            let Some(peer) = receiver(datagram).and_then(|receiver| table.by_receiver(receiver)) else {
                self.shared.unknown_session(from);
                continue;
            };
            self.pieces.clear();
            let mut used = 0;
            {
                let mut session = peer.session();
                let mut next = Some(datagram);
                while let Some(datagram) = next {
                    used += self.open(&table, peer, &mut session, from, datagram, used);
                    next = datagrams.next_if(|next| {
                        next.first() == Some(&DATA)
                            && receiver(next)
                                .and_then(|receiver| table.by_receiver(receiver))
                                .is_some_and(|other| Arc::ptr_eq(other, peer))
                    });
                }
            }
            self.shared.send(from, &self.answers);
            self.answers.clear();
            self.write(peer);
        }
    }

    /// Opens one datagram; returns how much room its packet took.
    fn open(
        &mut self,
        table: &Table,
        peer: &Arc<Peer>,
        session: &mut super::peer::Session,
        from: SocketAddr,
        datagram: &[u8],
        at: usize,
    ) -> usize {
        let room = &mut self.plain[at..];
        match session.open(from, datagram, room, &mut self.answers) {
            Opened::Packet(length, source) if owns(table, peer, source) => {
                self.pieces.push((at, length));
                length
            }
            Opened::Packet(..) => {
                self.shared.counters.drop(Reason::WrongSource);
                0
            }
            Opened::Nothing => 0,
            Opened::Dropped(reason) => {
                self.shared.counters.drop(reason);
                0
            }
        }
    }

    /// Writes what was opened, in order.
    fn write(&mut self, peer: &Peer) {
        let shared = self.shared;
        let mut write = |header, packet: &[u8]| {
            if !shared.tun.write(header, packet) {
                shared.counters.drop(Reason::NotWritten);
            }
        };
        let mut bytes = 0;
        for (at, length) in &self.pieces {
            bytes += length;
            let packet = &self.plain[*at..at + length];
            if shared.tun.takes_super_packets() {
                self.coalescer.push(packet, &mut write);
            } else {
                write(weft_wire::packet::VnetHeader::default(), packet);
            }
        }
        self.coalescer.flush(&mut write);
        peer.traffic.received.fetch_add(self.pieces.len() as u64, Ordering::Relaxed);
        peer.traffic.received_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Takes what is no data: a handshake, its answer, or a cookie.
    fn handshake(&mut self, table: &Table, from: SocketAddr, datagram: &[u8]) {
        let shared = self.shared;
        let drop = |reason| shared.counters.drop(reason);
        if !shared.admit(from.ip()) {
            return drop(Reason::Flood);
        }
        let mut cookie = [0; 64];
        let packet = match shared.limiter.verify_packet(Some(from.ip()), datagram, &mut cookie) {
            Ok(packet) => packet,
            Err(TunnResult::WriteToNetwork(cookie)) => {
                drop(Reason::Flood);
                self.answers.push(cookie.len(), |room| {
                    room.copy_from_slice(cookie);
                    cookie.len()
                });
                shared.send(from, &self.answers);
                return self.answers.clear();
            }
            Err(TunnResult::Err(boringtun::noise::errors::WireGuardError::InvalidMac)) => {
                return drop(Reason::BadMac);
            }
            Err(_) => return drop(Reason::Malformed),
        };
        let peer = match packet {
            Packet::HandshakeInit(init) => {
                match parse_handshake_anon(&shared.secret, &shared.public, &init) {
                    Ok(half) => {
                        table.peers.get(&TunnelKey(half.peer_static_public)).ok_or(Reason::UnknownKey)
                    }
                    Err(_) => Err(Reason::Forged),
                }
            }
            Packet::HandshakeResponse(response) => {
                table.by_receiver(response.receiver_idx).ok_or(Reason::UnknownSession)
            }
            Packet::PacketCookieReply(reply) => {
                table.by_receiver(reply.receiver_idx).ok_or(Reason::UnknownSession)
            }
            Packet::PacketData(_) => Err(Reason::Malformed),
        };
        let peer = match peer {
            Ok(peer) => peer,
            Err(reason) => return drop(reason),
        };
        if let Opened::Dropped(reason) =
            peer.session().open(from, datagram, &mut self.plain, &mut self.answers)
        {
            drop(reason);
        }
        shared.send(from, &self.answers);
        self.answers.clear();
    }
}

fn receiver(datagram: &[u8]) -> Option<u32> {
    datagram.get(4..8).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes)
}

/// The one check of sources: an address within must be of the peer that sealed it.
fn owns(table: &Table, peer: &Arc<Peer>, source: IpAddr) -> bool {
    table.owner(source).is_some_and(|owner| Arc::ptr_eq(owner, peer))
}
