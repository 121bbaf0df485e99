//! One peer: its session behind a lock that is taken once a batch, its endpoint, and what it counted.
//!
//! Invariants: what waits for a session is bounded; a peer without traffic has no
//! session and takes a few hundred bytes.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use weft_wire::preshared::PresharedKey;
use weft_wire::types::{NodeName, TunnelKey};

use super::counters::{Counters, Reason, Traffic};
use super::endpoints::{Endpoints, Heard};
use super::noise::{Boringtun, Due, LEAST_ROOM, Noise, OVERHEAD, Sealed, Shaken};
use super::shared::KNOCKED;
use super::udp::Batch;
use super::{Identity, TunnelPeer, TunnelSecret};

/// So long after a session under new keys the one before is still heard: a kernel goes over only when it looks.
const OVERLAP: Duration = Duration::from_secs(15);
/// So long a peer that may not have heard of this node's new key is answered under the one before, if none comes after it.
const UNHEARD: Duration = Duration::from_secs(600);
/// So many packets wait for a session.
const WAITING: usize = 64;
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
    /// Of the node, whichever keys it went under.
    pub(super) traffic: Arc<Traffic>,
    session: Mutex<Session>,
    /// The same node under the keys before, and since when these are no longer in force.
    previous: Mutex<Option<(Arc<Peer>, Instant)>>,
}

/// Padded packets that wait for a session with the node, whichever keys it will be under.
type Waiting = Arc<Mutex<VecDeque<Vec<u8>>>>;

/// The state that both directions share.
pub(super) struct Session<N = Boringtun> {
    /// Made when the first packet comes.
    noise: Option<N>,
    own: TunnelSecret,
    peer: TunnelKey,
    preshared: Option<PresharedKey>,
    index: u32,
    /// Where its packets go.
    endpoints: Endpoints,
    /// Where its packets came from last.
    heard_from: Option<SocketAddr>,
    /// There is a session to seal with.
    ready: bool,
    waiting: Waiting,
    /// When a session was asked for last, and how often without an answer.
    asked: Option<(Instant, u32)>,
    /// When the peer's request for a session was answered last.
    answered: Option<Instant>,
    /// It is asked for until there is one, though packets may still go under the keys before.
    wanted: bool,
    padded: Vec<u8>,
}

impl<N> std::fmt::Debug for Session<N> {
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
        own: TunnelSecret,
        previous: Option<Arc<Peer>>,
    ) -> Self {
        let mut session = Session::new(wanted, index, own);
        if let Some(previous) = &previous {
            let previous = previous.session();
            session.endpoints = previous.endpoints.for_other_keys(wanted.endpoint, Instant::now());
            session.waiting = Arc::clone(&previous.waiting);
        }
        Self {
            node: wanted.node.clone(),
            key: wanted.key,
            index,
            traffic: previous.as_ref().map(|previous| Arc::clone(&previous.traffic)).unwrap_or_default(),
            session: Mutex::new(session),
            previous: Mutex::new(previous.map(|previous| (previous, Instant::now()))),
        }
    }

    /// Whether the session can go on: its keys are the same.
    pub(super) fn keeps(&self, wanted: &TunnelPeer, own: &TunnelSecret) -> bool {
        let session = self.session();
        self.node == wanted.node
            && self.key == wanted.key
            && session.own == *own
            && session.preshared == wanted.preshared
    }

    /// Whether this node is to ask for a session under other keys: the peer's are what changed, so it knows of them, or it is
    /// the secret of the pair and there is a session to follow, or one that came to nothing as the two had different secrets.
    /// Of a key of this node's own the peer has yet to hear.
    pub(super) fn gives_way(self: &Arc<Self>, wanted: &TunnelPeer, own: &TunnelSecret) -> bool {
        let is_begun = self.for_sending().session().is_begun();
        let session = self.session();
        session.own == *own && (self.key != wanted.key || (session.preshared != wanted.preshared && is_begun))
    }

    /// Returns the peer whose sessions belong to an identity of this node.
    pub(super) fn under(self: &Arc<Self>, identity: &Identity) -> Option<Arc<Self>> {
        let is_under = |peer: &Arc<Self>| peer.is_under(identity);
        Some(Arc::clone(self)).filter(is_under).or_else(|| self.previous().filter(is_under))
    }

    /// Whether its sessions belong to that identity of this node.
    pub(super) fn is_under(&self, identity: &Identity) -> bool {
        self.session().own == identity.secret
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

impl<N: Noise> Session<N> {
    fn new(wanted: &TunnelPeer, index: u32, own: TunnelSecret) -> Self {
        let TunnelPeer { key, endpoint, preshared, .. } = wanted.clone();
        Self {
            noise: None,
            own,
            peer: key,
            preshared,
            index,
            endpoints: Endpoints::new(endpoint),
            heard_from: None,
            ready: false,
            waiting: Waiting::default(),
            asked: None,
            answered: None,
            wanted: false,
            padded: Vec::new(),
        }
    }

    pub(super) fn endpoint(&self) -> SocketAddr {
        self.endpoints.current()
    }

    /// Whether its packets came last from where this node's go.
    pub(super) fn is_heard_there(&self) -> bool {
        self.heard_from == Some(self.endpoint())
    }

    /// Returns the paths.
    pub(super) fn endpoints(&mut self) -> &mut Endpoints {
        &mut self.endpoints
    }

    /// Takes what the record says: only a change of it outweighs what packets taught.
    pub(super) fn follow(&mut self, announced: SocketAddr) {
        self.endpoints.follow(announced, Instant::now());
    }

    pub(super) fn ready(&self) -> bool {
        self.ready
    }

    /// Takes where a daemon before this one heard the peer last.
    pub(super) fn heard_at(&mut self, endpoint: SocketAddr) {
        self.heard_from = Some(endpoint);
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
        let Some(noise) = self.noise.as_mut().filter(|_| self.ready) else { return };
        batch.push(LEAST_ROOM, |room| match noise.seal(&[], room) {
            Sealed::Data(length) | Sealed::Kept(length) => length,
        });
    }

    /// How many packets wait for a session.
    pub(super) fn waiting(&self) -> usize {
        if self.ready { 0 } else { self.queue().len() }
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Vec<u8>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since the last handshake.
    pub(super) fn age(&self) -> Option<Duration> {
        self.noise.as_ref().and_then(N::age)
    }

    fn noise(&mut self) -> &mut N {
        self.noise.get_or_insert_with(|| N::new(&self.own, self.peer, self.preshared.as_ref(), self.index))
    }

    /// Seals a packet, padded within `mtu` bytes, into the batch, or keeps it until there is a session, which is asked for.
    pub(super) fn seal(&mut self, packet: &[u8], mtu: usize, batch: &mut Batch, counters: &Counters) {
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
        if self.ready {
            self.seal_padded(padded_packet, batch);
        } else {
            self.keep(padded_packet, batch, counters);
        }
        self.padded = padded;
    }

    fn seal_padded(&mut self, packet: &[u8], batch: &mut Batch) {
        let noise = self.noise();
        let mut is_data = false;
        batch.push((packet.len() + OVERHEAD).max(LEAST_ROOM), |room| match noise.seal(packet, room) {
            Sealed::Data(length) => {
                is_data = true;
                length
            }
            // The session ended since the last tick: this one packet is kept there.
            Sealed::Kept(length) => length,
        });
        self.ready = is_data;
        if is_data && self.endpoints.is_managed() {
            self.endpoints.sent(true, Instant::now());
        }
        if !is_data && self.asked.is_none() {
            self.asked = Some((Instant::now(), 0));
        }
    }

    /// Keeps a packet until there is a session, and asks for one unless the answer to a request may be on the way.
    fn keep(&mut self, packet: &[u8], batch: &mut Batch, counters: &Counters) {
        if self.queue().len() >= WAITING {
            return counters.drop(Reason::NoSession);
        }
        self.queue().push_back(packet.to_vec());
        if self.may_ask() {
            self.initiate(batch);
        }
    }

    /// Opens a datagram that names this peer. What is to be answered goes into `answers`.
    pub(super) fn open(
        &mut self,
        from: SocketAddr,
        datagram: &[u8],
        room: &mut [u8],
        answers: &mut Batch,
    ) -> Opened {
        if datagram.first() != Some(&DATA) {
            return self.shake(from, datagram, answers);
        }
        let opened = match self.noise().open(from.ip(), datagram, room) {
            Ok(Some((length, source))) => Opened::Packet(length, source),
            Ok(None) => Opened::Nothing,
            Err(reason) => return Opened::Dropped(reason),
        };
        let what = if matches!(opened, Opened::Packet(..)) { Heard::Data } else { Heard::Empty };
        self.heard(from, what);
        // Data confirms a session that the peer asked for.
        self.begin(answers);
        opened
    }

    /// Takes that something authentic came from there.
    fn heard(&mut self, from: SocketAddr, what: Heard) {
        self.heard_from = Some(from);
        if self.endpoints.is_managed() {
            self.endpoints.heard(from, what, Instant::now());
        } else {
            self.endpoints.move_to(from);
        }
    }

    /// Takes what is no data.
    fn shake(&mut self, from: SocketAddr, datagram: &[u8], answers: &mut Batch) -> Opened {
        let mut answer = [0; 256];
        let shaken = match self.noise().shake(from.ip(), datagram, &mut answer) {
            Ok(shaken) => shaken,
            Err(reason) => return Opened::Dropped(reason),
        };
        let (Shaken::Confirmed(length) | Shaken::Answered(length)) = shaken else { return Opened::Nothing };
        if let Shaken::Answered(_) = shaken {
            self.answered = Some(Instant::now());
        }
        self.heard(from, Heard::Handshake);
        answers.push(length, |room| {
            room.copy_from_slice(&answer[..length]);
            length
        });
        if let Shaken::Confirmed(_) = shaken {
            self.begin(answers);
        }
        Opened::Nothing
    }

    /// Notes that there is a session to seal with, if there was none.
    fn begin(&mut self, answers: &mut Batch) {
        if !self.ready {
            self.ready = true;
            self.release(answers);
        }
    }

    /// Sends what waited for a session.
    fn release(&mut self, answers: &mut Batch) {
        self.asked = None;
        self.wanted = false;
        let noise = self.noise();
        let mut more = true;
        while more {
            more = false;
            // The longest packet that a device of any MTU hands over.
            answers.push((1 << 16) + OVERHEAD, |room| match noise.seal_kept(room) {
                Some(Sealed::Data(length)) => {
                    more = true;
                    length
                }
                Some(Sealed::Kept(length)) => length,
                None => 0,
            });
        }
        let waiting = std::mem::take(&mut *self.queue());
        waiting.iter().for_each(|packet| self.seal_padded(packet, answers));
    }

    /// Does what is due: keepalives, new handshakes, the end of sessions.
    pub(super) fn tick(&mut self, batch: &mut Batch) {
        let Some(noise) = &mut self.noise else { return };
        let mut expired = false;
        batch.push(LEAST_ROOM, |room| match noise.tick(room) {
            Due::Send(length) => length,
            Due::Expired => {
                expired = true;
                0
            }
        });
        if expired {
            self.queue().clear();
            self.end();
        } else if self.ready && noise.age().is_none() {
            self.ready = false;
        }
        if self.is_overdue() {
            self.initiate(batch);
        }
    }

    /// Forgets all session keys.
    fn end(&mut self) {
        self.noise = None;
        self.ready = false;
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
        !self.ready && (self.wanted || !self.queue().is_empty()) && self.may_ask()
    }

    /// Whether there is a session, or one side asked the other for one just now.
    fn is_begun(&self) -> bool {
        let was_answered = self.answered.is_some_and(|at| at.elapsed() < KNOCKED);
        self.ready || self.asked.is_some() || was_answered
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
        let noise = self.noise();
        batch.push(LEAST_ROOM, |room| noise.initiate(room));
    }
}

#[cfg(test)]
mod tests;
