//! The daemon before this one, while it keeps its sessions: boringtun gives no session's keys away, so they cannot move.
//!
//! The later daemon reads the TUN device and the sockets, and passes on what only the earlier one can seal or open; that one
//! sends and writes by itself, for it still has the descriptors. Invariants: the earlier daemon begins no handshake and
//! reads nothing but the channel; what the channel does not take in time is dropped and counted.

use std::collections::{BTreeSet, HashMap};
use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, setsockopt, socketpair, sockopt,
};
use weft_wire::types::NodeName;

use super::Shared;
use super::counters::Reason;
use super::inbound::Inbound;
use super::outbound::Outbound;
use super::udp::wait;
use crate::handover::{Kept, Message, Talk};

/// So long at least the earlier daemon is needed after the last peer has a new session: what is under way, and the
/// confirmation of the new session, may be late.
const OVERLAP: Duration = Duration::from_secs(1);
/// And so long at most after it stopped to read, whether all peers have new sessions or not.
const MOST: Duration = Duration::from_secs(10);
/// What waits in the channel, in bytes of the kernel's count, where it lets the daemon choose.
const BUFFER: usize = 8 << 20;
/// So long the channel may be full before packets are dropped.
const PATIENCE: Duration = Duration::from_millis(200);
/// Before each message: kind, where the datagrams came from, and the size of each.
const HEADER: usize = 28;
const OUTBOUND: u8 = 0;
const INBOUND: u8 = 1;
/// To be sent back once everything before is done.
const MARK: u8 = 2;

/// Which way packets go.
#[derive(Debug, Clone, Copy)]
pub(super) enum Way {
    Out,
    In,
}

/// The earlier daemon as the later one sees it.
#[derive(Debug)]
pub(super) struct Elder {
    channel: OwnedFd,
    talk: Talk,
    /// Whose sessions it keeps, by the upper 24 bits of their receiver indices.
    indices: HashMap<u32, NodeName>,
    /// With whom it can seal.
    ready: BTreeSet<NodeName>,
    since: Instant,
    moved: Mutex<Moved>,
    /// For whom something may still be in the channel, outward and inward.
    passed: [Mutex<BTreeSet<NodeName>>; 2],
    /// The number of the last mark; one is waited for at a time.
    mark: Mutex<u32>,
}

/// How far the sessions have gone over.
#[derive(Debug, Default)]
struct Moved {
    /// Who still seals for the earlier daemon.
    behind: BTreeSet<NodeName>,
    /// Since when nobody is missing.
    whole: Option<Instant>,
}

/// Makes a channel: the later daemon's end and the earlier one's.
pub(super) fn channel() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (later, earlier) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    // Where the forced size is refused the default does: the sender waits sooner.
    let _ = setsockopt(&later, sockopt::SndBufForce, &BUFFER);
    Ok((later, earlier))
}

impl Elder {
    pub(super) fn new(channel: OwnedFd, talk: Talk, kept: Vec<Kept>) -> Self {
        let ready = kept.iter().filter(|kept| kept.ready).map(|kept| kept.node.clone()).collect();
        Self {
            channel,
            talk,
            indices: kept.into_iter().map(|kept| (kept.index, kept.node)).collect(),
            ready,
            since: Instant::now(),
            moved: Mutex::default(),
            passed: Default::default(),
            mark: Mutex::default(),
        }
    }

    /// Returns for whom it can seal.
    pub(super) fn ready(&self) -> impl Iterator<Item = &NodeName> {
        self.ready.iter()
    }

    /// Whether it can seal for this node.
    pub(super) fn seals_for(&self, node: &NodeName) -> bool {
        self.ready.contains(node)
    }

    /// Whether it gave this receiver index out.
    pub(super) fn knows(&self, receiver: u32) -> bool {
        self.indices.contains_key(&(receiver >> 8))
    }

    /// Notes that a peer seals under the session of that index; it has not heard of a newer one, if there is one.
    pub(super) fn note_behind(&self, receiver: u32) {
        if let Some(node) = self.indices.get(&(receiver >> 8)) {
            self.moved().behind.insert(node.clone());
        }
    }

    /// Returns who was noted since the last call.
    pub(super) fn take_behind(&self) -> BTreeSet<NodeName> {
        std::mem::take(&mut self.moved().behind)
    }

    /// Returns whether it is no longer needed; `missing` tells that somebody has no new session yet.
    pub(super) fn is_done(&self, missing: bool) -> bool {
        let mut moved = self.moved();
        if missing {
            moved.whole = None;
        } else {
            moved.whole.get_or_insert_with(Instant::now);
        }
        moved.whole.is_some_and(|whole| whole.elapsed() >= OVERLAP) || self.since.elapsed() >= MOST
    }

    fn moved(&self) -> std::sync::MutexGuard<'_, Moved> {
        self.moved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes on a (super-)packet of the TUN device with its header.
    pub(super) fn seal(&self, node: &NodeName, bytes: &[u8]) -> Result<(), Errno> {
        self.note_passed(Way::Out, node);
        self.pass(&header(OUTBOUND, None, bytes.len()), bytes)
    }

    /// Passes on datagrams of one size.
    pub(super) fn open(&self, from: SocketAddr, bytes: &[u8], size: usize) -> Result<(), Errno> {
        if let Some(node) = super::inbound::receiver(bytes).and_then(|index| self.indices.get(&(index >> 8)))
        {
            self.note_passed(Way::In, node);
        }
        self.pass(&header(INBOUND, Some(from), size), bytes)
    }

    fn note_passed(&self, way: Way, node: &NodeName) {
        let mut passed = self.passed[way as usize].lock().unwrap_or_else(PoisonError::into_inner);
        if !passed.contains(node) {
            passed.insert(node.clone());
        }
    }

    /// Waits, for a bounded time, until what was passed on for a node is sealed and sent, or opened and written: what comes
    /// under a session of this daemon may not overtake it.
    pub(super) fn settle(&self, way: Way, node: &NodeName) {
        let mut passed = self.passed[way as usize].lock().unwrap_or_else(PoisonError::into_inner);
        if passed.contains(node) {
            self.wait_for_mark();
            passed.clear();
        }
    }

    fn wait_for_mark(&self) {
        let mut mark = self.mark.lock().unwrap_or_else(PoisonError::into_inner);
        *mark = mark.wrapping_add(1);
        let (sent, began) = (header(MARK, None, *mark as usize), Instant::now());
        if self.pass(&sent, &[]).is_err() {
            return;
        }
        let mut back = [0; HEADER];
        while began.elapsed() < PATIENCE {
            match nix::unistd::read(&self.channel, &mut back) {
                Ok(HEADER) if back == sent => return,
                // An earlier one, which came too late.
                Ok(HEADER) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => wait(&[(self.channel.as_fd(), PollFlags::POLLIN)]),
                _ => return,
            }
        }
    }

    fn pass(&self, header: &[u8; HEADER], bytes: &[u8]) -> Result<(), Errno> {
        let began = Instant::now();
        let slices = [IoSlice::new(header), IoSlice::new(bytes)];
        loop {
            match sendmsg::<UnixAddr>(self.channel.as_raw_fd(), &slices, &[], MsgFlags::MSG_NOSIGNAL, None) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if began.elapsed() < PATIENCE => {
                    wait(&[(self.channel.as_fd(), PollFlags::POLLOUT)]);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Tells it that it is no longer needed.
    pub(super) fn dismiss(&self) {
        // One that is gone already needs no word.
        let _ = self.talk.say(&Message::Done, &[]);
    }
}

fn header(kind: u8, from: Option<SocketAddr>, size: usize) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[0] = kind;
    header[4..8].copy_from_slice(&u32::try_from(size).unwrap_or(u32::MAX).to_ne_bytes());
    if let Some(from) = from {
        header[1] = if from.is_ipv4() { 4 } else { 6 };
        header[2..4].copy_from_slice(&from.port().to_ne_bytes());
        match from {
            SocketAddr::V4(from) => header[8..12].copy_from_slice(&from.ip().octets()),
            SocketAddr::V6(from) => {
                header[8..24].copy_from_slice(&from.ip().octets());
                header[24..28].copy_from_slice(&from.scope_id().to_ne_bytes());
            }
        }
    }
    header
}

/// Reads a header: where datagrams of which size came from; nothing for a packet of the TUN device.
fn origin(header: &[u8; HEADER]) -> Option<(SocketAddr, usize)> {
    if header[0] != INBOUND {
        return None;
    }
    let [_, family, port @ .., s0, s1, s2, s3] = *header.first_chunk::<8>()?;
    let (port, size) = (u16::from_ne_bytes(port), u32::from_ne_bytes([s0, s1, s2, s3]) as usize);
    let [ip @ .., c0, c1, c2, c3] = *header.last_chunk::<20>()?;
    let from = if family == 4 {
        SocketAddr::new(IpAddr::V4(Ipv4Addr::from(*ip.first_chunk::<4>()?)), port)
    } else {
        let scope = u32::from_ne_bytes([c0, c1, c2, c3]);
        SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from(ip), port, 0, scope))
    };
    Some((from, size.max(1)))
}

/// Seals and opens for the later daemon, until it hangs up, or until the tunnels stop and nothing is left in the channel.
pub(super) fn serve(shared: &Shared, channel: &OwnedFd) {
    let mut buffer = vec![0; HEADER + super::outbound::MOST];
    let (mut outbound, mut inbound) = (Outbound::new(shared), Inbound::new(shared));
    loop {
        match nix::unistd::read(channel, &mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                let Some((header, bytes)) = buffer[..length].split_first_chunk_mut::<HEADER>() else {
                    shared.counters.drop(Reason::Malformed);
                    continue;
                };
                if header[0] == MARK {
                    outbound.flush();
                    // Who does not take it back waits no longer.
                    let _ = nix::unistd::write(channel, &*header);
                    continue;
                }
                match origin(header) {
                    Some((from, size)) => inbound.take(from, bytes, size),
                    None => outbound.take(bytes),
                }
            }
            Err(Errno::EAGAIN) => {
                outbound.flush();
                if shared.stopped() {
                    return;
                }
                wait(&[(channel.as_fd(), PollFlags::POLLIN), shared.wake()]);
            }
            Err(Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_says_where_datagrams_came_from() {
        for from in ["192.0.2.7:51820", "[2001:db8::7]:1", "[fe80::1%3]:65535"] {
            let from: SocketAddr = from.parse().unwrap();
            assert_eq!(origin(&header(INBOUND, Some(from), 1452)), Some((from, 1452)));
        }
        assert_eq!(origin(&header(OUTBOUND, None, 1500)), None);
    }
}
