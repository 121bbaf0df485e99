//! One peer: its session behind a lock that is taken once a batch, its endpoint, and what it counted.
//!
//! Invariants: what waits for a session is bounded; a peer without traffic has no
//! session and takes a few hundred bytes.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use weft_wire::preshared::PresharedKey;
use weft_wire::types::{NodeName, TunnelKey};

use super::counters::{Counters, Reason, Traffic};
use super::endpoints::{Endpoints, Heard};
use super::udp::Batch;
use super::{Identity, TunnelPeer};

/// So long after a session under new keys the one before is still heard: a kernel goes over only when it looks.
const OVERLAP: Duration = Duration::from_secs(15);
/// So long a peer that may not have heard of this node's new key is answered under the one before, if none comes after it.
const UNHEARD: Duration = Duration::from_secs(600);
/// So many packets wait for a session; boringtun would keep four times as many.
const WAITING: usize = 64;
/// What WireGuard adds to a packet: header, counter and tag (whitepaper s5.4.6).
pub(super) const OVERHEAD: usize = 32;
/// The least room that boringtun asks for: a handshake initiation.
const LEAST_ROOM: usize = 148;
/// Packets are padded to a multiple of this (whitepaper s5.4.6).
const PADDING: usize = 16;
const DATA: u8 = 4;

/// A peer as long as it has its key.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) node: NodeName,
    pub(super) key: TunnelKey,
    /// 24 random bits: the upper ones of the receiver indices that this node gives out to the peer.
    pub(super) index: u32,
    pub(super) traffic: Traffic,
    session: Mutex<Session>,
    /// The same node under the keys before, and since when these are no longer in force.
    previous: Mutex<Option<(Arc<Peer>, Instant)>>,
}

/// The state that both directions share.
pub(super) struct Session {
    tunn: Option<Box<Tunn>>,
    own: StaticSecret,
    peer: PublicKey,
    preshared: Option<PresharedKey>,
    index: u32,
    /// Where its packets go.
    endpoints: Endpoints,
    /// There is a session to seal with.
    ready: bool,
    waiting: usize,
    /// When a session was asked for last, and how often without an answer.
    asked: Option<(Instant, u32)>,
    /// It is asked for until there is one, though packets may still go under the keys before.
    wanted: bool,
    padded: Vec<u8>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("endpoint", &self.endpoints.current())
            .field("ready", &self.ready)
            .finish_non_exhaustive()
    }
}

/// What opening a datagram gave.
#[derive(Debug)]
pub(super) enum Opened {
    /// A packet of so many bytes at the start of the room, from this source.
    Packet(usize, IpAddr),
    /// Nothing for the pods.
    Nothing,
    /// Not taken.
    Dropped(Reason),
}

impl Peer {
    pub(super) fn new(
        wanted: &TunnelPeer,
        index: u32,
        own: StaticSecret,
        previous: Option<Arc<Peer>>,
    ) -> Self {
        let TunnelPeer { node, key, endpoint, preshared, .. } = wanted.clone();
        let session = Session {
            tunn: None,
            own,
            peer: PublicKey::from(key.0),
            preshared,
            index,
            endpoints: Endpoints::new(endpoint),
            ready: false,
            waiting: 0,
            asked: None,
            wanted: false,
            padded: Vec::new(),
        };
        Self {
            node,
            key,
            index,
            traffic: Traffic::default(),
            session: Mutex::new(session),
            previous: Mutex::new(previous.map(|previous| (previous, Instant::now()))),
        }
    }

    /// Whether the session can go on: its keys are the same.
    pub(super) fn keeps(&self, wanted: &TunnelPeer, own: &StaticSecret) -> bool {
        let session = self.session();
        self.node == wanted.node
            && self.key == wanted.key
            && session.own.as_bytes() == own.as_bytes()
            && session.preshared == wanted.preshared
    }

    /// Whether this node is to ask for a session under other keys: the peer's are what changed, so it knows of them, or it is
    /// the secret of the pair and there is a session to follow. Of a key of this node's own the peer has yet to hear.
    pub(super) fn gives_way(self: &Arc<Self>, wanted: &TunnelPeer, own: &StaticSecret) -> bool {
        let in_use = self.for_sending().session().ready;
        let session = self.session();
        session.own.as_bytes() == own.as_bytes()
            && (self.key != wanted.key || (session.preshared != wanted.preshared && in_use))
    }

    /// Returns the peer whose sessions belong to an identity of this node.
    pub(super) fn under(self: &Arc<Self>, identity: &Identity) -> Option<Arc<Self>> {
        let is_under = |peer: &Arc<Self>| peer.is_under(identity);
        Some(Arc::clone(self)).filter(is_under).or_else(|| self.previous().filter(is_under))
    }

    /// Whether its sessions belong to that identity of this node.
    pub(super) fn is_under(&self, identity: &Identity) -> bool {
        self.session().own.as_bytes() == identity.secret.as_bytes()
    }

    /// Returns the same node under the keys before.
    pub(super) fn previous(&self) -> Option<Arc<Peer>> {
        let previous = self.previous.lock().unwrap_or_else(PoisonError::into_inner);
        previous.as_ref().map(|(previous, _)| Arc::clone(previous))
    }

    /// Ends what there is under the keys before.
    pub(super) fn forget_previous(&self) {
        let previous = self.previous.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((previous, _)) = previous {
            previous.session().end();
        }
    }

    /// Ends what there is under the keys before, once the peer has shown that it knows these, or was given the time to.
    pub(super) fn forget_previous_if_over(&self) {
        let previous = self.previous.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some((previous, since)) = previous else { return };
        let confirmed = self.session().age().is_some_and(|age| age >= OVERLAP);
        if confirmed || (since.elapsed() >= UNHEARD && !previous.session().ready()) {
            self.forget_previous();
        }
    }

    /// Seals with `seal` under these keys, or under those before while they alone have a session.
    pub(super) fn for_sending(self: &Arc<Self>) -> Arc<Self> {
        if self.session().ready {
            return Arc::clone(self);
        }
        let earlier = self.previous().filter(|earlier| earlier.session().ready);
        earlier.unwrap_or_else(|| Arc::clone(self))
    }

    pub(super) fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Session {
    pub(super) fn endpoint(&self) -> SocketAddr {
        self.endpoints.current()
    }

    /// Returns the paths.
    pub(super) fn endpoints(&mut self) -> &mut Endpoints {
        &mut self.endpoints
    }

    /// Takes what the record says: only a change of it outweighs what packets taught.
    pub(super) fn follow(&mut self, announced: SocketAddr) {
        self.endpoints.follow(announced);
    }

    pub(super) fn ready(&self) -> bool {
        self.ready
    }

    /// Takes where a daemon before this one heard the peer last.
    pub(super) fn heard_at(&mut self, endpoint: SocketAddr) {
        self.endpoints.move_to(endpoint);
    }

    /// Does what the paths need: sends a packet, or a request where there is no session, to each place that is to hear one.
    pub(super) fn probe_paths(&mut self, now: Instant, send: impl Fn(SocketAddr, &Batch)) {
        let due = self.endpoints.due(self.ready, now);
        let mut batch = Batch::default();
        let (ask, tries): (_, &[SocketAddr]) =
            if self.ready { (due.ask, &due.try_at) } else { ([due.ask, due.try_at].concat(), &[]) };
        if !ask.is_empty() {
            self.initiate(&mut batch);
            // The same request everywhere: the peer answers the first that comes.
            ask.iter().for_each(|to| send(*to, &batch));
        }
        for to in tries {
            batch.clear();
            self.confirm(&mut batch);
            send(*to, &batch);
        }
    }

    /// Lets the peer know that there is a session: an empty packet under it, if there is one.
    pub(super) fn confirm(&mut self, batch: &mut Batch) {
        let Some(tunn) = self.tunn.as_mut().filter(|_| self.ready) else { return };
        batch.push(LEAST_ROOM, |room| match tunn.encapsulate(&[], room) {
            TunnResult::WriteToNetwork(datagram) => datagram.len(),
            _ => 0,
        });
    }

    /// How many packets wait for a session.
    pub(super) fn waiting(&self) -> usize {
        if self.ready { 0 } else { self.waiting }
    }

    /// Since the last handshake.
    pub(super) fn age(&self) -> Option<Duration> {
        self.tunn.as_ref().and_then(|tunn| tunn.time_since_last_handshake())
    }

    fn tunn(&mut self) -> &mut Tunn {
        self.tunn.get_or_insert_with(|| {
            let preshared = self.preshared.as_ref().map(|key| *key.secret());
            Box::new(Tunn::new(self.own.clone(), self.peer, preshared, None, self.index, None))
        })
    }

    /// Seals a packet, padded within `mtu` bytes, into the batch, or keeps it until there is a session, which is asked for.
    pub(super) fn seal(&mut self, packet: &[u8], mtu: usize, batch: &mut Batch, counters: &Counters) {
        if !self.ready {
            if self.waiting >= WAITING {
                return counters.drop(Reason::NoSession);
            }
            self.waiting += 1;
        }
        let length = packet.len().next_multiple_of(PADDING).min(mtu.max(packet.len()));
        let mut padded = std::mem::take(&mut self.padded);
        let padded_packet = if length == packet.len() {
            packet
        } else {
            padded.clear();
            padded.extend_from_slice(packet);
            padded.resize(length, 0);
            &padded
        };
        let tunn = self.tunn();
        let mut is_data = false;
        batch.push((length + OVERHEAD).max(LEAST_ROOM), |room| match tunn.encapsulate(padded_packet, room) {
            TunnResult::WriteToNetwork(datagram) => {
                is_data = datagram[0] == DATA;
                datagram.len()
            }
            _ => 0,
        });
        self.ready = is_data;
        if is_data && self.endpoints.is_managed() {
            self.endpoints.sent(true, Instant::now());
        }
        if !is_data && self.asked.is_none() {
            self.asked = Some((Instant::now(), 0));
        }
        self.padded = padded;
    }

    /// Opens a datagram that names this peer. What is to be answered goes into `answers`.
    pub(super) fn open(
        &mut self,
        from: SocketAddr,
        datagram: &[u8],
        room: &mut [u8],
        answers: &mut Batch,
    ) -> Opened {
        let is_data = datagram.first() == Some(&DATA);
        let tunn = self.tunn();
        let mut answer = Vec::new();
        let opened = if is_data {
            match tunn.decapsulate(Some(from.ip()), datagram, room) {
                TunnResult::WriteToTunnelV4(packet, source) => Opened::Packet(packet.len(), source.into()),
                TunnResult::WriteToTunnelV6(packet, source) => Opened::Packet(packet.len(), source.into()),
                TunnResult::Done => Opened::Nothing,
                TunnResult::WriteToNetwork(_) => Opened::Nothing,
                TunnResult::Err(error) => Opened::Dropped(reason(&error)),
            }
        } else {
            let mut reply = [0; 256];
            match tunn.decapsulate(Some(from.ip()), datagram, &mut reply) {
                TunnResult::WriteToNetwork(datagram) => {
                    answer.extend_from_slice(datagram);
                    Opened::Nothing
                }
                TunnResult::Err(error) => Opened::Dropped(reason(&error)),
                // A cookie, which does not say where the peer is.
                _ => return Opened::Nothing,
            }
        };
        if matches!(opened, Opened::Dropped(_)) {
            return opened;
        }
        if self.endpoints.is_managed() {
            let what = match opened {
                Opened::Packet(..) => Heard::Data,
                _ if is_data => Heard::Empty,
                _ => Heard::Handshake,
            };
            self.endpoints.heard(from, what, Instant::now());
        } else {
            self.endpoints.move_to(from);
        }
        if !answer.is_empty() {
            answers.push(answer.len(), |room| {
                room.copy_from_slice(&answer);
                answer.len()
            });
        }
        // An answer of kind 4 is the keepalive that confirms a session; data confirms one that the peer asked for.
        if (is_data || answer.first() == Some(&DATA)) && !self.ready {
            self.ready = true;
            self.release(answers);
        }
        opened
    }

    /// Sends what waited for a session.
    fn release(&mut self, answers: &mut Batch) {
        self.waiting = 0;
        self.asked = None;
        self.wanted = false;
        let Some(tunn) = &mut self.tunn else { return };
        let mut more = true;
        while more {
            more = false;
            // The longest packet that a device of any MTU hands over.
            answers.push((1 << 16) + OVERHEAD, |room| match tunn.decapsulate(None, &[], room) {
                TunnResult::WriteToNetwork(datagram) => {
                    more = datagram[0] == DATA;
                    datagram.len()
                }
                _ => 0,
            });
        }
    }

    /// Does what is due: keepalives, new handshakes, the end of sessions.
    pub(super) fn tick(&mut self, batch: &mut Batch) {
        let Some(tunn) = &mut self.tunn else { return };
        let mut expired = false;
        batch.push(LEAST_ROOM.max(OVERHEAD), |room| match tunn.update_timers(room) {
            TunnResult::WriteToNetwork(datagram) => datagram.len(),
            TunnResult::Err(WireGuardError::ConnectionExpired) => {
                expired = true;
                0
            }
            _ => 0,
        });
        if expired {
            self.end();
        } else if self.ready && tunn.time_since_last_handshake().is_none() {
            self.ready = false;
        }
        if self.is_overdue() {
            self.initiate(batch);
        }
    }

    /// Forgets all session keys.
    fn end(&mut self) {
        self.tunn = None;
        self.ready = false;
        self.waiting = 0;
        self.asked = None;
        self.wanted = false;
    }

    /// Asks for a session now, and again while there is no answer.
    pub(super) fn want(&mut self, batch: &mut Batch) {
        self.wanted = true;
        self.initiate(batch);
    }

    /// Whether packets wait and the answer to the last request is late. WireGuard asks again after five seconds (whitepaper
    /// s6.1); the first requests of a node that just came, moved or was cut off are often lost, so they are repeated sooner.
    fn is_overdue(&self) -> bool {
        !self.ready && (self.waiting > 0 || self.wanted) && self.may_ask()
    }

    /// Whether a session is being asked for.
    pub(super) fn is_asked(&self) -> bool {
        self.asked.is_some()
    }

    /// Whether the last request for a session had the time to be answered.
    pub(super) fn may_ask(&self) -> bool {
        self.asked.is_none_or(|(at, times)| at.elapsed() >= Duration::from_secs(1 << times.min(2)))
    }

    /// Asks for a session, whether one is being asked for or not.
    pub(super) fn initiate(&mut self, batch: &mut Batch) {
        let times = self.asked.map_or(0, |(_, times)| times + 1);
        self.asked = Some((Instant::now(), times));
        let tunn = self.tunn();
        batch.push(LEAST_ROOM, |room| match tunn.format_handshake_initiation(room, true) {
            TunnResult::WriteToNetwork(datagram) => datagram.len(),
            _ => 0,
        });
    }
}

fn reason(error: &WireGuardError) -> Reason {
    match error {
        WireGuardError::DuplicateCounter | WireGuardError::InvalidCounter => Reason::Replayed,
        WireGuardError::WrongTai64nTimestamp | WireGuardError::InvalidTai64nTimestamp => Reason::Replayed,
        WireGuardError::NoCurrentSession | WireGuardError::WrongIndex => Reason::UnknownSession,
        WireGuardError::InvalidMac => Reason::BadMac,
        WireGuardError::UnderLoad => Reason::Flood,
        WireGuardError::InvalidPacket | WireGuardError::IncorrectPacketLength => Reason::Malformed,
        _ => Reason::Forged,
    }
}
