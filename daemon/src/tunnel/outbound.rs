//! From the TUN to the peers: one ordered reader at a time, one lock a (super-)packet, and one send for all packets to a peer
//! that are there at once.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use nix::errno::Errno;
use nix::poll::PollFlags;
use weft_wire::packet::{self, VnetHeader, split};

use super::Shared;
use super::counters::Reason;
use super::elder::Way;
use super::peer::Peer;
use super::udp::{Batch, wait};

/// A super-packet is one IP packet.
pub(super) const MOST: usize = VnetHeader::LEN + (1 << 16);

/// What one thread keeps from packet to packet.
pub(super) struct Outbound<'a> {
    shared: &'a Shared,
    scratch: Vec<u8>,
    batch: Batch,
    /// Whom the batch is for, and where that is.
    to: Option<(Arc<Peer>, SocketAddr)>,
}

/// Reads until the tunnels stop.
pub(super) fn run(shared: &Shared) {
    let mut buffer = vec![0; MOST];
    let mut outbound = Outbound::new(shared);
    while !shared.stopped() {
        let turn = shared.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let drained = outbound.drain(&mut buffer, usize::MAX);
        drop(turn);
        if let Err(error) = drained {
            shared.fail(format!("the TUN device cannot be read: {error}"));
            return;
        }
        wait(&[(shared.tun.as_fd(), PollFlags::POLLIN), shared.wake()]);
    }
}

impl<'a> Outbound<'a> {
    pub(super) fn new(shared: &'a Shared) -> Self {
        Self { shared, scratch: Vec::new(), batch: Batch::default(), to: None }
    }

    /// Takes what lies in the device, at most so many (super-)packets, and sends it. Whoever calls has the turn: packets leave
    /// in the order in which they were read.
    pub(super) fn drain(&mut self, buffer: &mut [u8], most: usize) -> Result<(), Errno> {
        let mut taken = 0;
        let mut end = Ok(());
        while taken < most && !self.shared.stopped() {
            match self.shared.tun.read(buffer) {
                Ok(length) => {
                    self.take(&mut buffer[..length]);
                    taken += 1;
                }
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(error) => {
                    end = Err(error);
                    break;
                }
            }
        }
        // Nothing more is to come: what is ready goes.
        self.flush();
        end
    }

    pub(super) fn take(&mut self, bytes: &mut [u8]) {
        let counters = &self.shared.counters;
        let Some((header, packet)) = bytes.split_first_chunk_mut::<{ VnetHeader::LEN }>() else {
            return counters.drop(Reason::NotIp);
        };
        let header = VnetHeader::read(*header);
        let Some(destination) = packet::destination(packet) else { return counters.drop(Reason::NotIp) };
        let table = self.shared.table();
        let Some(peer) = table.owner(destination) else { return counters.drop(Reason::NoPeer) };
        let peer = peer.for_sending();
        if self.pass_on(&peer, header, packet) {
            return;
        }
        if self.to.as_ref().is_some_and(|(other, _)| !Arc::ptr_eq(other, &peer)) {
            self.flush();
        }
        let mtu = self.shared.mtu.load(Ordering::Relaxed);
        let (length, batch) = (packet.len(), &mut self.batch);
        let mut session = peer.session();
        let split =
            split(header, packet, &mut self.scratch, |packet| session.seal(packet, mtu, batch, counters));
        let endpoint = session.endpoint();
        drop(session);
        match split {
            Ok(packets) => {
                peer.traffic.sent.fetch_add(packets as u64, Ordering::Relaxed);
                peer.traffic.sent_bytes.fetch_add(length as u64, Ordering::Relaxed);
            }
            Err(_) => counters.drop(Reason::NotIp),
        }
        if self.batch.is_full() {
            self.shared.send_complete(endpoint, &mut self.batch);
        }
        self.to = Some((peer, endpoint));
    }

    /// Lets the daemon before this one seal what it alone has a session for; a daemon that is that one begins none.
    fn pass_on(&self, peer: &Peer, header: VnetHeader, packet: &[u8]) -> bool {
        let shared = self.shared;
        let elder = shared.elder();
        let sealer = elder.as_ref().filter(|elder| elder.seals_for(&peer.node));
        if sealer.is_none() && !shared.lingers() {
            return false;
        }
        if peer.session().ready() {
            sealer.inspect(|sealer| sealer.settle(Way::Out, &peer.node));
            return false;
        }
        let Some(sealer) = sealer else {
            shared.counters.drop(Reason::NoSession);
            return true;
        };
        let sealed = sealer.seal(&peer.node, &[&header.write()[..], packet].concat());
        if sealed.is_ok() {
            peer.traffic.sent.fetch_add(1, Ordering::Relaxed);
            peer.traffic.sent_bytes.fetch_add(packet.len() as u64, Ordering::Relaxed);
        }
        // If it is gone, the packet waits for a session of this daemon's own.
        shared.took(sealed)
    }

    pub(super) fn flush(&mut self) {
        if let Some((_, endpoint)) = self.to.take() {
            self.shared.send(endpoint, &self.batch);
            self.batch.clear();
        }
    }
}
