//! What the threads of the tunnels share, and what they do for each other: send, note who asked, and look after sessions.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::io::PipeReader;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use weft_wire::types::{NodeName, TunnelKey};

use super::counters::{Counters, Reason};
use super::elder::Elder;
use super::flood::Flood;
use super::noise::Identity;
use super::peer::Peer;
use super::table::Table;
use super::tun::Tun;
use super::udp::{Batch, Udp};

/// Between two looks at the timers of sessions.
const TICK: Duration = Duration::from_millis(250);
/// The same while a daemon before this one is waited for, or more sessions are to be asked for.
const SHORT_TICK: Duration = Duration::from_millis(20);
/// The same while a path is tried, or waited for.
const PATH_TICK: Duration = Duration::from_millis(50);
/// So many sessions are asked for at once by a daemon that starts.
const ASK_AT_ONCE: usize = 32;
/// For so long it is remembered that a key asked for a session: news of a node, and of the pair's secret, are everywhere by
/// then.
pub(super) const KNOCKED: Duration = Duration::from_secs(10);

/// What the threads share.
pub(super) struct Shared {
    pub(super) tun: Tun,
    /// Who has it reads the device and sends what was read: packets of a flow keep their order.
    pub(super) turn: Mutex<()>,
    pub(super) v4: Option<Udp>,
    pub(super) v6: Option<Udp>,
    /// The node's key, and the one before it while peers may still know no other.
    pub(super) identities: RwLock<Arc<Vec<Identity>>>,
    pub(super) flood: Mutex<Flood>,
    pub(super) table: RwLock<Arc<Table>>,
    /// What the device carries, in bytes.
    pub(super) mtu: AtomicUsize,
    pub(super) counters: Counters,
    /// Sources of data without a session: their peers are asked for a new one.
    pub(super) strangers: Mutex<BTreeSet<SocketAddr>>,
    /// Keys that asked for a session and are no peer's yet, and when: who becomes a peer soon after is asked at once.
    pub(super) knocked: Mutex<BTreeMap<TunnelKey, Instant>>,
    /// Peers to ask for a session without waiting for traffic, and where they were heard last.
    pub(super) eager: Mutex<VecDeque<(NodeName, Option<SocketAddr>)>>,
    /// The daemon before this one, while it is needed.
    pub(super) elder: RwLock<Option<Arc<Elder>>>,
    /// This is the daemon before: it begins no handshake.
    pub(super) lingering: AtomicBool,
    pub(super) stop: AtomicBool,
    /// Readable while the threads are to stop.
    pub(super) wake: PipeReader,
    pub(super) failure: Mutex<Option<String>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("tun", &self.tun).finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn identities(&self) -> Arc<Vec<Identity>> {
        Arc::clone(&self.identities.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn elder(&self) -> Option<Arc<Elder>> {
        self.elder.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn lose_elder(&self) -> Option<Arc<Elder>> {
        self.elder.write().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Takes how passing something to the daemon before this one went; returns whether it is dealt with.
    pub(super) fn took(&self, passed: Result<(), Errno>) -> bool {
        match passed {
            Ok(()) => true,
            Err(Errno::EAGAIN) => {
                self.counters.drop(Reason::HandOver);
                true
            }
            Err(_) => {
                self.lose_elder();
                false
            }
        }
    }

    pub(super) fn lingers(&self) -> bool {
        self.lingering.load(Ordering::Relaxed)
    }

    /// What to wait for besides packets.
    pub(super) fn wake(&self) -> (BorrowedFd<'_>, PollFlags) {
        (self.wake.as_fd(), PollFlags::POLLIN)
    }

    pub(super) fn eager(&self) -> std::sync::MutexGuard<'_, VecDeque<(NodeName, Option<SocketAddr>)>> {
        self.eager.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    pub(super) fn fail(&self, why: String) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.stop.store(true, Ordering::Relaxed);
    }

    pub(super) fn send(&self, to: SocketAddr, batch: &Batch) {
        if batch.is_empty() {
            return;
        }
        let udp = if to.is_ipv4() { &self.v4 } else { &self.v6 };
        let refused = udp.as_ref().map_or(1, |udp| udp.send(to, batch));
        if refused > 0 {
            self.counters.drop_many(Reason::NotSent, refused);
        }
    }

    /// Sends all of a batch but what is better sent with what comes next, and leaves that in it.
    pub(super) fn send_complete(&self, to: SocketAddr, batch: &mut Batch) {
        let udp = if to.is_ipv4() { &self.v4 } else { &self.v6 };
        let refused = udp.as_ref().map_or(1, |udp| udp.send_complete(to, batch));
        if refused > 0 {
            self.counters.drop_many(Reason::NotSent, refused);
        }
        batch.keep_rest();
    }

    pub(super) fn admit(&self, source: IpAddr) -> bool {
        self.flood.lock().unwrap_or_else(PoisonError::into_inner).admit(source, Instant::now())
    }

    /// Data came under a session that is not known: this node was restarted, and its peer does not know yet.
    pub(super) fn unknown_session(&self, from: SocketAddr) {
        self.counters.drop(Reason::UnknownSession);
        let mut strangers = self.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        if strangers.len() < 64 {
            strangers.insert(from);
        }
    }

    /// A handshake came from a key that is no peer's: the news of it may still be on the way.
    pub(super) fn knock(&self, key: TunnelKey) {
        self.counters.drop(Reason::UnknownKey);
        let now = Instant::now();
        let mut knocked = self.knocked.lock().unwrap_or_else(PoisonError::into_inner);
        if knocked.len() >= 64 {
            knocked.retain(|_, at| now.duration_since(*at) < KNOCKED);
        }
        if knocked.len() < 64 {
            knocked.insert(key, now);
        }
    }

    pub(super) fn has_knocked(&self, key: &TunnelKey) -> bool {
        let at = self.knocked.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
        at.is_some_and(|at| at.elapsed() < KNOCKED)
    }

    /// Does what is due for a peer, and asks it for a session where `asks` says so of its endpoint.
    pub(super) fn look_after(&self, peer: &Peer, asks: impl FnOnce(SocketAddr) -> bool, batch: &mut Batch) {
        batch.clear();
        let endpoint = {
            let mut session = peer.session();
            session.tick(batch);
            if !session.ready() && session.may_ask() && asks(session.endpoint()) {
                session.initiate(batch);
            }
            session.endpoint()
        };
        self.send(endpoint, batch);
    }

    /// Sees to the paths of a peer that has several; returns whether it is to be looked after again soon.
    fn look_at_paths(&self, peer: &Peer, now: Instant) -> bool {
        let mut session = peer.session();
        if !session.endpoints().is_managed() {
            return false;
        }
        session.probe_paths(now, |to, batch| self.send(to, batch));
        session.endpoints().is_urgent()
    }

    /// Asks some of the peers that were active when the last daemon ended for a session.
    pub(super) fn ask_eagerly(&self, batch: &mut Batch) {
        let table = self.table();
        if table.peers.is_empty() {
            return;
        }
        let mut some: HashMap<NodeName, Option<SocketAddr>> = {
            let mut eager = self.eager();
            let count = eager.len().min(ASK_AT_ONCE);
            eager.drain(..count).collect()
        };
        if some.is_empty() {
            return;
        }
        for peer in table.peers.values() {
            let Some(heard_at) = some.remove(&peer.node) else { continue };
            batch.clear();
            let endpoint = {
                let mut session = peer.session();
                if !session.ready() && session.may_ask() {
                    heard_at.into_iter().for_each(|endpoint| session.heard_at(endpoint));
                    session.initiate(batch);
                }
                session.endpoint()
            };
            self.send(endpoint, batch);
        }
    }

    /// Sees to it that sessions of this daemon take the place of those of the one before, which then goes.
    pub(super) fn relieve_elder(&self, batch: &mut Batch) {
        let Some(elder) = self.elder() else { return };
        let behind = elder.take_behind();
        let mut missing = !behind.is_empty();
        for peer in self.table().peers.values() {
            let seals = elder.seals_for(&peer.node);
            let is_behind = behind.contains(&peer.node);
            if !seals && !is_behind {
                continue;
            }
            batch.clear();
            let endpoint = {
                let mut session = peer.session();
                if session.ready() {
                    // It has heard of no session that it could use: the confirmation was lost, or is under way.
                    if is_behind {
                        session.confirm(batch);
                    }
                } else {
                    missing = true;
                    if session.may_ask() {
                        session.initiate(batch);
                    }
                }
                session.endpoint()
            };
            self.send(endpoint, batch);
        }
        if elder.is_done(missing) {
            drop(self.lose_elder());
            // Whoever passes something on just now has done so first.
            while Arc::strong_count(&elder) > 1 {
                thread::yield_now();
            }
            elder.dismiss();
        }
    }

    /// Looks after sessions until the tunnels stop.
    pub(super) fn tick(&self) {
        let mut batch = Batch::default();
        let mut second = Instant::now();
        let mut urgent = false;
        while !self.stopped() {
            self.ask_eagerly(&mut batch);
            self.relieve_elder(&mut batch);
            let hurried = self.elder().is_some() || !self.eager().is_empty();
            thread::park_timeout(match (hurried, urgent) {
                (true, _) => SHORT_TICK,
                (false, true) => PATH_TICK,
                (false, false) => TICK,
            });
            urgent = false;
            let now = Instant::now();
            if second.elapsed() >= Duration::from_secs(1) {
                self.identities().iter().for_each(|identity| identity.begin_second());
                second = Instant::now();
            }
            let strangers =
                std::mem::take(&mut *self.strangers.lock().unwrap_or_else(PoisonError::into_inner));
            for peer in self.table().peers.values() {
                // Anyone can send such data: it makes this node ask where it would ask anyway, at most so often.
                self.look_after(peer, |endpoint| strangers.contains(&endpoint), &mut batch);
                urgent |= !self.lingers() && self.look_at_paths(peer, now);
                let Some(previous) = peer.previous() else { continue };
                // A peer that does not answer under the new keys may not have heard of them.
                let waits = peer.session().waiting() > 0;
                if !peer.session().ready() && !self.lingers() {
                    // What is said goes under the keys before, and has to arrive.
                    urgent |= self.look_at_paths(&previous, now);
                }
                self.look_after(&previous, |_| waits, &mut batch);
                peer.forget_previous_if_over();
            }
        }
    }
}
