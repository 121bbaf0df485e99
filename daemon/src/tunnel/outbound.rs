//! From the TUN to the peers: one ordered reader, one lock and one send a super-packet.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::poll::PollFlags;
use weft_wire::packet::{self, VnetHeader, split};

use super::Shared;
use super::counters::Reason;
use super::udp::{Batch, wait};

/// A super-packet is one IP packet.
const MOST: usize = VnetHeader::LEN + (1 << 16);

/// Reads until the tunnels stop.
pub(super) fn run(shared: &Shared) {
    let mut buffer = vec![0; MOST];
    let (mut scratch, mut batch) = (Vec::new(), Batch::default());
    while !shared.stopped() {
        match shared.tun.read(&mut buffer) {
            Ok(length) => carry(shared, &mut buffer[..length], &mut scratch, &mut batch),
            Err(Errno::EAGAIN) => wait(shared.tun.as_fd(), PollFlags::POLLIN),
            Err(Errno::EINTR) => {}
            Err(error) => {
                shared.fail(format!("the TUN device cannot be read: {error}"));
                return;
            }
        }
    }
}

fn carry(shared: &Shared, bytes: &mut [u8], scratch: &mut Vec<u8>, batch: &mut Batch) {
    let counters = &shared.counters;
    let Some((header, packet)) = bytes.split_first_chunk_mut::<{ VnetHeader::LEN }>() else {
        return counters.drop(Reason::NotIp);
    };
    let header = VnetHeader::read(*header);
    let Some(destination) = packet::destination(packet) else { return counters.drop(Reason::NotIp) };
    let table = shared.table();
    let Some(peer) = table.owner(destination) else { return counters.drop(Reason::NoPeer) };
    let peer = peer.for_sending();
    batch.clear();
    let mtu = shared.mtu.load(Ordering::Relaxed);
    let length = packet.len();
    let (endpoint, split) = {
        let mut session = peer.session();
        let split = split(header, packet, scratch, |packet| session.seal(packet, mtu, batch, counters));
        (session.endpoint(), split)
    };
    match split {
        Ok(packets) => {
            peer.traffic.sent.fetch_add(packets as u64, Ordering::Relaxed);
            peer.traffic.sent_bytes.fetch_add(length as u64, Ordering::Relaxed);
        }
        Err(_) => counters.drop(Reason::NotIp),
    }
    shared.send(endpoint, batch);
}
