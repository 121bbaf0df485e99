//! User-space WireGuard (whitepaper: Donenfeld, "WireGuard: Next Generation Kernel Network Tunnel", 2017) in the
//! daemon: a TUN device, a UDP socket a family, and a thread for each direction.
//!
//! It decides nothing about who is a peer or what goes through it: the control path hands over a whole table, which the
//! data path reads. Invariants: locks are taken once for each read of the device or of a socket, never for each packet of a
//! super-packet; what waits is bounded;
//! every packet that is dropped is counted with its reason; an address within a tunnel is of the peer that sealed it.

mod counters;
mod elder;
mod flood;
#[cfg(fuzzing)]
pub mod fuzz;
mod inbound;
mod outbound;
mod peer;
mod table;
mod tun;
mod udp;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::x25519::{PublicKey, StaticSecret};
use ipnet::IpNet;
use nix::poll::PollFlags;
use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore, SeedableRng};
use weft_wire::preshared::PresharedKey;
use weft_wire::types::{NodeName, TunnelKey};

use counters::Counters;
pub use counters::Reason;
use elder::Elder;
use flood::Flood;
use peer::Peer;
use table::Table;
use tun::Tun;
use udp::{Batch, Udp};

use crate::handover::{Kept, Talk};

/// Between two looks at the timers of sessions.
const TICK: Duration = Duration::from_millis(250);
/// The same while a daemon before this one is waited for, or more sessions are to be asked for.
const SHORT_TICK: Duration = Duration::from_millis(20);
/// So many sessions are asked for at once by a daemon that starts.
const ASK_AT_ONCE: usize = 32;
/// For so long it is remembered that a key asked for a session: news of a node are everywhere by then.
const KNOCKED: Duration = Duration::from_secs(10);
/// Handshakes of all sources together in a second, before cookies are asked for (whitepaper s5.3).
const HANDSHAKES: u64 = 200;

/// A node's secret tunnel key (X25519, RFC 7748).
#[derive(Clone)]
pub struct TunnelSecret(StaticSecret);

impl TunnelSecret {
    /// Takes 32 bytes from a cryptographic random number generator.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(StaticSecret::from(bytes))
    }

    /// Returns the secret bytes, for a file that only root reads.
    pub fn to_bytes(&self) -> [u8; 32] {
        self.0.to_bytes()
    }

    /// Returns the public half.
    pub fn public(&self) -> TunnelKey {
        TunnelKey(PublicKey::from(&self.0).to_bytes())
    }
}

impl fmt::Debug for TunnelSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TunnelSecret({})", self.public())
    }
}

/// Where and as whom to speak WireGuard.
#[derive(Debug, Clone)]
pub struct TunnelConfig {
    /// The TUN device.
    pub device: String,
    /// The UDP port at every address; not 0.
    pub port: u16,
    /// The node's key.
    pub secret: TunnelSecret,
    /// Fresh random bytes.
    pub seed: [u8; 32],
}

/// A peer as the control path wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelPeer {
    /// Its name, for people.
    pub node: NodeName,
    /// Its public key.
    pub key: TunnelKey,
    /// Where it listens, until its packets come from elsewhere.
    pub endpoint: SocketAddr,
    /// What is routed to it, and what its packets may come from.
    pub prefixes: Vec<IpNet>,
    /// Mixed into every handshake (whitepaper s5.2).
    pub preshared: Option<PresharedKey>,
}

/// How a peer's tunnel is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelStatus {
    /// Its name.
    pub node: NodeName,
    /// Its public key.
    pub key: TunnelKey,
    /// Where its packets came from last.
    pub endpoint: SocketAddr,
    /// Since the last handshake; none while there is no session.
    pub handshake: Option<Duration>,
    /// How many packets wait for a session.
    pub waiting: usize,
    /// Packets and bytes that were sent, within the tunnel.
    pub sent: (u64, u64),
    /// Packets and bytes that were received.
    pub received: (u64, u64),
}

/// Why there are no tunnels; each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// No TUN device.
    #[error("no TUN device {device}: {source}; weftd needs /dev/net/tun and CAP_NET_ADMIN")]
    Tun {
        /// Its name.
        device: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The port is taken at every family.
    #[error(
        "UDP port {port} of WireGuard cannot be used: {source}; end what uses it, or set encryption.port"
    )]
    Port {
        /// The port.
        port: u16,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The system gives no thread.
    #[error("no thread for the tunnels: {0}; raise the limit of processes (`ulimit -u`, TasksMax=)")]
    Thread(#[source] io::Error),
}

/// Tunnels that another daemon still carries, as [`Tunnel::adopt`] takes them.
#[derive(Debug)]
pub struct TunnelsOffered {
    /// The TUN device.
    pub device: OwnedFd,
    /// To the other daemon, which keeps its sessions for a while.
    pub channel: OwnedFd,
    /// The device takes and gives super-packets of UDP.
    pub super_udp: bool,
    /// The socket for IPv4.
    pub v4: Option<OwnedFd>,
    /// The socket for IPv6.
    pub v6: Option<OwnedFd>,
    /// To ask the other daemon by, and to dismiss it.
    pub talk: Option<Talk>,
}

impl TunnelsOffered {
    /// Whether the sockets are at this port.
    pub fn are_at(&self, port: u16) -> bool {
        let at = |fd: &OwnedFd| {
            let socket = fd.try_clone().map(std::net::UdpSocket::from);
            socket.and_then(|socket| socket.local_addr()).is_ok_and(|address| address.port() == port)
        };
        self.v4.iter().chain(&self.v6).all(at)
    }
}

/// A key of the node's.
struct Identity {
    secret: StaticSecret,
    public: PublicKey,
    /// Its first MAC, and its cookies.
    limiter: RateLimiter,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({:?})", TunnelKey(self.public.to_bytes()))
    }
}

impl Identity {
    fn new(secret: &TunnelSecret) -> Self {
        let public = PublicKey::from(&secret.0);
        Self { secret: secret.0.clone(), public, limiter: RateLimiter::new(&public, HANDSHAKES) }
    }
}

/// What the threads share.
struct Shared {
    tun: Tun,
    v4: Option<Udp>,
    v6: Option<Udp>,
    /// The node's key, and the one before it while peers may still know no other.
    identities: RwLock<Arc<Vec<Identity>>>,
    flood: Mutex<Flood>,
    table: RwLock<Arc<Table>>,
    /// What the device carries, in bytes.
    mtu: AtomicUsize,
    counters: Counters,
    /// Sources of data without a session: their peers are asked for a new one.
    strangers: Mutex<BTreeSet<SocketAddr>>,
    /// Keys that asked for a session and are no peer's yet, and when: who becomes a peer soon after is asked at once.
    knocked: Mutex<BTreeMap<TunnelKey, Instant>>,
    /// Peers to ask for a session without waiting for traffic, and where they were heard last.
    eager: Mutex<VecDeque<(NodeName, Option<SocketAddr>)>>,
    /// The daemon before this one, while it is needed.
    elder: RwLock<Option<Arc<Elder>>>,
    /// This is the daemon before: it begins no handshake.
    lingering: AtomicBool,
    stop: AtomicBool,
    /// Readable while the threads are to stop.
    wake: PipeReader,
    failure: Mutex<Option<String>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("tun", &self.tun).finish_non_exhaustive()
    }
}

impl Shared {
    fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn identities(&self) -> Arc<Vec<Identity>> {
        Arc::clone(&self.identities.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn elder(&self) -> Option<Arc<Elder>> {
        self.elder.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn lose_elder(&self) -> Option<Arc<Elder>> {
        self.elder.write().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn lingers(&self) -> bool {
        self.lingering.load(Ordering::Relaxed)
    }

    /// What to wait for besides packets.
    fn wake(&self) -> (BorrowedFd<'_>, PollFlags) {
        (self.wake.as_fd(), PollFlags::POLLIN)
    }

    fn eager(&self) -> std::sync::MutexGuard<'_, VecDeque<(NodeName, Option<SocketAddr>)>> {
        self.eager.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn fail(&self, why: String) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.stop.store(true, Ordering::Relaxed);
    }

    fn send(&self, to: SocketAddr, batch: &Batch) {
        if batch.is_empty() {
            return;
        }
        let udp = if to.is_ipv4() { &self.v4 } else { &self.v6 };
        let refused = udp.as_ref().map_or(1, |udp| udp.send(to, batch));
        if refused > 0 {
            self.counters.drop_many(Reason::NotSent, refused);
        }
    }

    fn admit(&self, source: IpAddr) -> bool {
        self.flood.lock().unwrap_or_else(PoisonError::into_inner).admit(source, Instant::now())
    }

    /// Data came under a session that is not known: this node was restarted, and its peer does not know yet.
    fn unknown_session(&self, from: SocketAddr) {
        self.counters.drop(Reason::UnknownSession);
        let mut strangers = self.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        if strangers.len() < 64 {
            strangers.insert(from);
        }
    }

    /// A handshake came from a key that is no peer's: the news of it may still be on the way.
    fn knock(&self, key: TunnelKey) {
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

    fn has_knocked(&self, key: &TunnelKey) -> bool {
        let at = self.knocked.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
        at.is_some_and(|at| at.elapsed() < KNOCKED)
    }

    /// Does what is due for a peer, and asks it for a session where `asks` says so of its endpoint.
    fn look_after(&self, peer: &Peer, asks: impl FnOnce(SocketAddr) -> bool, batch: &mut Batch) {
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

    /// Asks some of the peers that were active when the last daemon ended for a session.
    fn ask_eagerly(&self, batch: &mut Batch) {
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
    fn relieve_elder(&self, batch: &mut Batch) {
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
    fn tick(&self) {
        let mut batch = Batch::default();
        let mut second = Instant::now();
        while !self.stopped() {
            self.ask_eagerly(&mut batch);
            self.relieve_elder(&mut batch);
            let hurried = self.elder().is_some() || !self.eager().is_empty();
            thread::park_timeout(if hurried { SHORT_TICK } else { TICK });
            if second.elapsed() >= Duration::from_secs(1) {
                self.identities().iter().for_each(|identity| identity.limiter.reset_count());
                second = Instant::now();
            }
            let strangers =
                std::mem::take(&mut *self.strangers.lock().unwrap_or_else(PoisonError::into_inner));
            for peer in self.table().peers.values() {
                // Anyone can send such data: it makes this node ask where it would ask anyway, at most so often.
                self.look_after(peer, |endpoint| strangers.contains(&endpoint), &mut batch);
                let Some(previous) = peer.previous() else { continue };
                // A peer that does not answer under the new keys may not have heard of them.
                let waits = peer.session().waiting() > 0;
                self.look_after(&previous, |_| waits, &mut batch);
                peer.forget_previous_if_over();
            }
        }
    }
}

/// The running tunnels; dropping it ends the threads and leaves the device.
#[derive(Debug)]
pub struct Tunnel {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Ends the threads' waiting.
    waker: PipeWriter,
    /// The daemon that carries these tunnels until the peers are known.
    carrier: Option<(OwnedFd, Talk)>,
    /// What a later daemon passes on comes here.
    channel: Option<OwnedFd>,
    rng: ChaCha20Rng,
    /// Indices that were given out.
    drawn: BTreeSet<u32>,
}

impl Tunnel {
    /// Opens the device and the sockets, and begins to carry packets for whoever [`Tunnel::set_peers`] names.
    ///
    /// # Errors
    /// What is missing, and what to do.
    pub fn open(config: TunnelConfig) -> Result<Self, TunnelError> {
        let TunnelConfig { device, port, secret, seed } = config;
        let [v4, v6] = [true, false].map(|v4| Udp::open(v4, port));
        let (v4, v6) = match (v4, v6) {
            (Err(source), Err(_)) => return Err(TunnelError::Port { port, source }),
            // A machine without IPv6 has one family; a port that is taken is not taken for one of them only by design.
            (Err(source), _) | (_, Err(source)) if source.kind() == io::ErrorKind::AddrInUse => {
                return Err(TunnelError::Port { port, source });
            }
            (v4, v6) => (v4.ok(), v6.ok()),
        };
        let tun = Tun::open(&device).map_err(|source| TunnelError::Tun { device, source })?;
        let mut tunnel = Self::new(tun, [v4, v6], &secret, seed)?;
        tunnel.start()?;
        Ok(tunnel)
    }

    /// Takes tunnels over that another daemon carries. It goes on to, until [`Tunnel::set_peers`] is called for the first
    /// time: then this one reads, and that one keeps its sessions until there are new ones.
    ///
    /// # Errors
    /// What is missing, and what to do.
    pub fn adopt(config: TunnelConfig, offered: TunnelsOffered) -> Result<Self, TunnelError> {
        let TunnelsOffered { device, channel, super_udp, v4, v6, talk } = offered;
        let sockets = [v4, v6].map(|socket| socket.map(Udp::adopt));
        let tun = Tun::adopt(device, super_udp);
        let mut tunnel = Self::new(tun, sockets, &config.secret, config.seed)?;
        tunnel.carrier = talk.map(|talk| (channel, talk));
        Ok(tunnel)
    }

    fn new(
        tun: Tun,
        [v4, v6]: [Option<Udp>; 2],
        secret: &TunnelSecret,
        seed: [u8; 32],
    ) -> Result<Self, TunnelError> {
        let (wake, waker) = io::pipe().map_err(TunnelError::Thread)?;
        let shared = Arc::new(Shared {
            tun,
            v4,
            v6,
            identities: RwLock::new(Arc::new(vec![Identity::new(secret)])),
            flood: Mutex::default(),
            table: RwLock::default(),
            mtu: AtomicUsize::new(0),
            counters: Counters::default(),
            strangers: Mutex::default(),
            knocked: Mutex::default(),
            eager: Mutex::default(),
            elder: RwLock::default(),
            lingering: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            wake,
            failure: Mutex::default(),
        });
        Ok(Self {
            shared,
            threads: Vec::new(),
            waker,
            carrier: None,
            channel: None,
            rng: ChaCha20Rng::from_seed(seed),
            drawn: BTreeSet::new(),
        })
    }

    /// Begins to read.
    fn start(&mut self) -> Result<(), TunnelError> {
        self.spawn("tunnel-out", outbound::run)?;
        self.spawn("tunnel-timers", Shared::tick)?;
        for v4 in [true, false] {
            let udp = move |shared: &Shared| {
                if let Some(udp) = if v4 { &shared.v4 } else { &shared.v6 } {
                    inbound::run(shared, udp);
                }
            };
            self.spawn(if v4 { "tunnel-in4" } else { "tunnel-in6" }, udp)?;
        }
        Ok(())
    }

    /// Ends all threads; what they read is dealt with.
    fn halt(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // A pipe that is empty takes a byte.
        let _ = self.waker.write_all(&[0]);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A thread that panicked has said so.
            drop(thread.join());
        }
        let _ = (&self.shared.wake).read_exact(&mut [0]);
        self.shared.stop.store(false, Ordering::Relaxed);
    }

    /// Has these peers asked for a session as soon as they are known, without waiting for traffic.
    pub fn ask_first(&self, peers: impl IntoIterator<Item = NodeName>) {
        self.shared.eager().extend(peers.into_iter().map(|peer| (peer, None)));
    }

    /// Makes the channel to a later daemon; returns that one's end.
    pub(crate) fn channel(&mut self) -> io::Result<OwnedFd> {
        let (later, earlier) = elder::channel()?;
        self.channel = Some(earlier);
        Ok(later)
    }

    /// Returns whether the device has super-packets of UDP, the device, and the sockets.
    pub(crate) fn descriptors(&self) -> (bool, BorrowedFd<'_>, [Option<BorrowedFd<'_>>; 2]) {
        let Shared { tun, v4, v6, .. } = &*self.shared;
        (tun.udp(), tun.as_fd(), [v4, v6].map(|udp| udp.as_ref().map(AsFd::as_fd)))
    }

    /// Reads no more, but serves a later daemon through the channel; returns the sessions that it can be asked to use.
    pub(crate) fn linger(&mut self) -> Result<Vec<Kept>, TunnelError> {
        self.halt();
        self.shared.lingering.store(true, Ordering::Relaxed);
        if let Some(channel) = self.channel.take() {
            self.spawn("tunnel-elder", move |shared| elder::serve(shared, &channel))?;
        }
        let table = self.shared.table();
        let all = table.peers.values().flat_map(|peer| [Some(Arc::clone(peer)), peer.previous()]);
        let kept = all.flatten().filter_map(|peer| {
            let session = peer.session();
            let (ready, endpoint) = (session.ready(), session.endpoint());
            let begun = ready || session.waiting() > 0;
            begun.then(|| Kept { node: peer.node.clone(), index: peer.index, endpoint, ready })
        });
        Ok(kept.collect())
    }

    /// Reads again after [`Tunnel::linger`]: the later daemon is gone, and peers may have sessions with it.
    pub(crate) fn resume(&mut self) -> Result<(), TunnelError> {
        if !self.shared.lingering.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.halt();
        self.shared.lingering.store(false, Ordering::Relaxed);
        let mut batch = Batch::default();
        for peer in self.shared.table().peers.values() {
            batch.clear();
            let endpoint = {
                let mut session = peer.session();
                if session.ready() {
                    session.initiate(&mut batch);
                }
                session.endpoint()
            };
            self.shared.send(endpoint, &batch);
        }
        self.start()
    }

    /// Has the daemon that carries the tunnels read no more, and learns what it keeps.
    fn relieve(&mut self, channel: OwnedFd, talk: Talk) {
        match talk.take() {
            Ok(kept) => {
                tracing::info!(sessions = kept.len(), "tunnels taken over");
                self.drawn.extend(kept.iter().map(|kept| kept.index));
                *self.shared.eager() =
                    kept.iter().map(|kept| (kept.node.clone(), Some(kept.endpoint))).collect();
                let elder = Arc::new(Elder::new(channel, talk, kept));
                *self.shared.elder.write().unwrap_or_else(PoisonError::into_inner) = Some(elder);
            }
            Err(error) => {
                tracing::warn!(err = %error, "the daemon before this one is gone, and its sessions with it");
            }
        }
    }

    fn spawn(&mut self, name: &str, run: impl FnOnce(&Shared) + Send + 'static) -> Result<(), TunnelError> {
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new().name(name.into()).spawn(move || run(&shared));
        self.threads.push(thread.map_err(TunnelError::Thread)?);
        Ok(())
    }

    /// Goes over to another key: peers that know only the one before are still answered, and sessions go on until there
    /// are new ones. To be followed by [`Tunnel::set_peers`].
    pub fn set_secret(&mut self, secret: &TunnelSecret) {
        let before = self.shared.identities();
        if before[0].public == PublicKey::from(&secret.0) {
            return;
        }
        let earlier = TunnelSecret(before[0].secret.clone());
        let identities = vec![Identity::new(secret), Identity::new(&earlier)];
        *self.shared.identities.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(identities);
    }

    /// Takes the MTU of the device: packets are padded up to it.
    pub fn set_mtu(&self, mtu: usize) {
        self.shared.mtu.store(mtu, Ordering::Relaxed);
    }

    /// Replaces the peers. Who keeps key and pre-shared key keeps the session; who has others is asked for a session at once,
    /// and keeps the one it has until then; so is who asked for one while it was not known. Returns what was left out and
    /// why, a sentence each.
    pub fn set_peers(&mut self, wanted: &[TunnelPeer]) -> Vec<String> {
        // Packets wait in the kernel between the one daemon's last read and the other's first.
        let taken_over = self.carrier.take().map(|(channel, talk)| self.relieve(channel, talk)).is_some();
        let before = self.shared.table();
        let identities = self.shared.identities();
        let own = &identities[0];
        let by_node: HashMap<&NodeName, &Arc<Peer>> =
            before.peers.values().map(|peer| (&peer.node, peer)).collect();
        let mut refused = Vec::new();
        let mut entries: Vec<(Arc<Peer>, Vec<IpNet>)> = Vec::with_capacity(wanted.len());
        let (mut keys, mut asked, mut fresh) = (BTreeSet::new(), Vec::new(), Vec::new());
        for peer in wanted {
            if let Some(why) = unusable(peer, &own.public, &mut keys) {
                refused.push(why);
                continue;
            }
            let known = by_node.get(&peer.node).copied();
            let entry = match known.filter(|known| known.keeps(peer, &own.secret)) {
                Some(known) => {
                    known.session().follow(peer.endpoint);
                    Arc::clone(known)
                }
                None => {
                    let earlier = known.map(|known| known.for_sending());
                    let index = self.fresh_index(&before);
                    let entry = Arc::new(Peer::new(peer, index, own.secret.clone(), earlier));
                    if known.is_some_and(|known| known.gives_way(peer, &own.secret))
                        || self.shared.has_knocked(&peer.key)
                    {
                        asked.push(Arc::clone(&entry));
                    }
                    fresh.push(Arc::clone(&entry));
                    entry
                }
            };
            entries.push((entry, peer.prefixes.clone()));
        }
        let (table, overlaps) = Table::new(entries);
        refused.extend(overlaps);
        *self.shared.table.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
        // One generation is kept.
        fresh.iter().filter_map(|peer| peer.previous()).for_each(|previous| previous.forget_previous());
        if taken_over && let Err(error) = self.start() {
            self.shared.fail(error.to_string());
        }
        // The peer knows its key, and this node has just learned of it: so it is this node that asks.
        for peer in asked {
            let mut batch = Batch::default();
            let endpoint = {
                let mut session = peer.session();
                session.initiate(&mut batch);
                session.endpoint()
            };
            self.shared.send(endpoint, &batch);
        }
        refused
    }

    /// Draws an index that no peer has or had.
    fn fresh_index(&mut self, before: &Table) -> u32 {
        loop {
            let index = self.rng.next_u32() >> 8;
            if self.drawn.insert(index) && before.by_receiver(index << 8).is_none() {
                return index;
            }
        }
    }

    /// Returns what others may look through.
    pub fn monitor(&self) -> TunnelMonitor {
        TunnelMonitor(Arc::clone(&self.shared))
    }

    /// Returns why the tunnels no longer work, if so: open them again.
    pub fn failure(&self) -> Option<String> {
        self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A look at running tunnels.
#[derive(Debug, Clone)]
pub struct TunnelMonitor(Arc<Shared>);

impl PartialEq for TunnelMonitor {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl TunnelMonitor {
    /// Returns how each peer's tunnel is, in no particular order.
    pub fn status(&self) -> Vec<TunnelStatus> {
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let status = |peer: &Arc<Peer>| {
            let session = peer.session();
            TunnelStatus {
                node: peer.node.clone(),
                key: peer.key,
                endpoint: session.endpoint(),
                handshake: session.age(),
                waiting: session.waiting(),
                sent: (count(&peer.traffic.sent), count(&peer.traffic.sent_bytes)),
                received: (count(&peer.traffic.received), count(&peer.traffic.received_bytes)),
            }
        };
        self.0.table().peers.values().map(status).collect()
    }

    /// Returns the peers that there is a session with, or that are being asked for one, by name.
    pub fn active(&self) -> BTreeSet<NodeName> {
        let table = self.0.table();
        let active = table.peers.values().filter(|peer| {
            let session = peer.session();
            session.ready() || session.is_asked()
        });
        let mut names: BTreeSet<NodeName> = active.map(|peer| peer.node.clone()).collect();
        names.extend(self.0.eager().iter().map(|(node, _)| node.clone()));
        names.extend(self.0.elder().iter().flat_map(|elder| elder.ready().cloned().collect::<Vec<_>>()));
        names
    }

    /// Whether the daemon before this one still keeps sessions.
    pub fn has_elder(&self) -> bool {
        self.0.elder().is_some()
    }

    /// Returns how many packets were dropped for each reason.
    pub fn drops(&self) -> Vec<(Reason, u64)> {
        self.0.counters.drops()
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.halt();
        // Ended on purpose: the daemon before this one is not to go on in its place.
        if let Some(elder) = self.shared.lose_elder() {
            elder.dismiss();
        }
    }
}

/// Why a peer's key cannot be used.
fn unusable(peer: &TunnelPeer, own: &PublicKey, keys: &mut BTreeSet<TunnelKey>) -> Option<String> {
    let node = &peer.node;
    if peer.key.0 == [0; 32] {
        return Some(format!(
            "{node} announces a tunnel key of zeros; restart its daemon with a key of its own"
        ));
    }
    if peer.key.0 == *own.as_bytes() {
        return Some(format!(
            "{node} announces this node's own tunnel key; remove the copied key file there"
        ));
    }
    let first = keys.insert(peer.key);
    (!first).then(|| {
        format!("{node} announces a tunnel key that another node has; remove the copied key file there")
    })
}
