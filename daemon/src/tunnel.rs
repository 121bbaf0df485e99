//! User-space WireGuard (whitepaper: Donenfeld, "WireGuard: Next Generation Kernel Network Tunnel", 2017) in the
//! daemon: a TUN device, a UDP socket a family, and a thread for each direction.
//!
//! It decides nothing about who is a peer or what goes through it: the control path hands over a whole table, which the
//! data path reads. Invariants: locks are taken once for each read of the device or of a socket, never for each packet of a
//! super-packet; what waits is bounded;
//! every packet that is dropped is counted with its reason; an address within a tunnel is of the peer that sealed it.

mod counters;
mod flood;
#[cfg(fuzzing)]
pub mod fuzz;
mod inbound;
mod outbound;
mod peer;
mod table;
mod tun;
mod udp;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::x25519::{PublicKey, StaticSecret};
use ipnet::IpNet;
use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore, SeedableRng};
use weft_wire::preshared::PresharedKey;
use weft_wire::types::{NodeName, TunnelKey};

use counters::Counters;
pub use counters::Reason;
use flood::Flood;
use peer::Peer;
use table::Table;
use tun::Tun;
use udp::{Batch, Udp};

/// Between two looks at the timers of sessions.
const TICK: Duration = Duration::from_millis(250);
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
    stop: AtomicBool,
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

    /// Looks after sessions until the tunnels stop.
    fn tick(&self) {
        let mut batch = Batch::default();
        let mut second = Instant::now();
        while !self.stopped() {
            thread::park_timeout(TICK);
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
        let shared = Arc::new(Shared {
            tun,
            v4,
            v6,
            identities: RwLock::new(Arc::new(vec![Identity::new(&secret)])),
            flood: Mutex::default(),
            table: RwLock::default(),
            mtu: AtomicUsize::new(0),
            counters: Counters::default(),
            strangers: Mutex::default(),
            knocked: Mutex::default(),
            stop: AtomicBool::new(false),
            failure: Mutex::default(),
        });
        let mut tunnel =
            Self { shared, threads: Vec::new(), rng: ChaCha20Rng::from_seed(seed), drawn: BTreeSet::new() };
        tunnel.spawn("tunnel-out", outbound::run)?;
        tunnel.spawn("tunnel-timers", Shared::tick)?;
        for v4 in [true, false] {
            let udp = move |shared: &Shared| {
                if let Some(udp) = if v4 { &shared.v4 } else { &shared.v6 } {
                    inbound::run(shared, udp);
                }
            };
            tunnel.spawn(if v4 { "tunnel-in4" } else { "tunnel-in6" }, udp)?;
        }
        Ok(tunnel)
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

    /// Returns how many packets were dropped for each reason.
    pub fn drops(&self) -> Vec<(Reason, u64)> {
        self.0.counters.drops()
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A thread that panicked has said so.
            drop(thread.join());
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
