//! From the peers to the TUN: a run of datagrams is opened under one lock, then written as few super-packets.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::poll::PollFlags;
use weft_wire::packet::Coalescer;
use weft_wire::types::TunnelKey;

use super::counters::Reason;
use super::elder::Way;
use super::noise::Examined;
use super::peer::{Opened, Peer};
use super::table::Table;
use super::udp::{Batch, Udp, wait};
use super::{Identity, Shared};

/// A run of datagrams fills one IP packet at most.
const MOST: usize = 1 << 16;
/// The first byte of the answer to a handshake.
const RESPONSE: u8 = 2;
/// The first byte of what carries packets.
const DATA: u8 = 4;

/// What one thread keeps from batch to batch.
pub(super) struct Inbound<'a> {
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
    let mut inbound = Inbound::new(shared);
    while !shared.stopped() {
        match udp.receive(&mut buffer, &mut control) {
            Ok(arrived) => inbound.take(arrived.from, &buffer[..arrived.length], arrived.size),
            Err(Errno::EAGAIN) => wait(&[(udp.as_fd(), PollFlags::POLLIN), shared.wake()]),
            // An ICMP error of an earlier datagram is told here; the peer's silence says the same.
            Err(_) => {}
        }
    }
}

impl<'a> Inbound<'a> {
    pub(super) fn new(shared: &'a Shared) -> Self {
        Self {
            shared,
            plain: vec![0; MOST],
            pieces: Vec::new(),
            answers: Batch::default(),
            coalescer: Coalescer::new(shared.tun.udp()),
        }
    }

    pub(super) fn take(&mut self, from: SocketAddr, bytes: &[u8], size: usize) {
        let table = self.shared.table();
        let mut datagrams = bytes.chunks(size).peekable();
        while let Some(datagram) = datagrams.next() {
            if datagram.first() != Some(&DATA) {
                self.handshake(&table, from, datagram);
                continue;
            }
            let Some(peer) = receiver(datagram).and_then(|receiver| table.by_receiver(receiver)) else {
                if !self.pass_on(from, datagram) {
                    self.shared.unknown_session(from);
                }
                continue;
            };
            if let Some(elder) = self.shared.elder() {
                elder.settle(Way::In, &peer.node);
            }
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

    /// Lets the daemon before this one open what names a session of its; returns whether it is one.
    fn pass_on(&self, from: SocketAddr, datagram: &[u8]) -> bool {
        let shared = self.shared;
        let Some(receiver) = receiver(datagram) else { return false };
        let Some(elder) = shared.elder().filter(|elder| elder.knows(receiver)) else { return false };
        if datagram.first() == Some(&DATA) {
            elder.note_behind(receiver);
        }
        shared.took(elder.open(from, datagram, datagram.len()))
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
            Opened::Dropped(Reason::UnknownSession) => {
                self.shared.unknown_session(from);
                0
            }
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
        let peer = match recipient(table, &shared.identities(), from, datagram, &mut cookie) {
            Recipient::Peer(peer) => peer,
            Recipient::Cookie(length) => {
                drop(Reason::Flood);
                self.answers.push(length, |room| {
                    room.copy_from_slice(&cookie[..length]);
                    length
                });
                shared.send(from, &self.answers);
                return self.answers.clear();
            }
            Recipient::None(Reason::UnknownSession) if self.pass_on(from, datagram) => return,
            Recipient::None(reason) => return drop(reason),
            Recipient::Stranger(key) => return shared.knock(key),
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

/// Whose session a handshake is about.
pub(super) enum Recipient {
    Peer(Arc<Peer>),
    /// Nobody's that is known yet.
    Stranger(TunnelKey),
    /// To be answered with a cookie of so many bytes: the node is under load.
    Cookie(usize),
    None(Reason),
}

/// Finds the node's identity that a handshake is meant for, and the peer.
pub(super) fn recipient(
    table: &Table,
    identities: &[Identity],
    from: SocketAddr,
    datagram: &[u8],
    cookie: &mut [u8; 64],
) -> Recipient {
    let mut found = Reason::Malformed;
    for identity in identities {
        match identity.examine(from.ip(), datagram, cookie) {
            Examined::From(key) => {
                let peer = table.peers.get(&key).and_then(|peer| peer.under(identity));
                return peer.map_or(Recipient::Stranger(key), Recipient::Peer);
            }
            Examined::About(receiver) => {
                let peer = table.by_receiver(receiver).cloned();
                return peer.map_or(Recipient::None(Reason::UnknownSession), Recipient::Peer);
            }
            Examined::Cookie(length) => return Recipient::Cookie(length),
            Examined::Void(reason) => return Recipient::None(reason),
            Examined::Elsewhere(reason) => found = reason,
        }
    }
    Recipient::None(found)
}

/// Returns the index of the session that a message names: the answer to a handshake has its sender's before (whitepaper
/// s5.4.3).
pub(super) fn receiver(datagram: &[u8]) -> Option<u32> {
    let at = if datagram.first() == Some(&RESPONSE) { 8..12 } else { 4..8 };
    datagram.get(at).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes)
}

/// The one check of sources: an address within must be of the peer that sealed it.
pub(super) fn owns(table: &Table, peer: &Peer, source: IpAddr) -> bool {
    table.owner(source).is_some_and(|owner| owner.node == peer.node)
}
