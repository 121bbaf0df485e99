//! User-space WireGuard (whitepaper: Donenfeld, "WireGuard: Next Generation Kernel Network Tunnel", 2017) in the
//! daemon: a TUN device, a UDP socket a family, and a thread for each direction.
//!
//! It decides nothing about who is a peer or what goes through it: the control path hands over a whole table, which the
//! data path reads. Invariants: locks are taken once for each read of the device or of a socket, never for each packet of a
//! super-packet; what waits is bounded; every packet that is dropped is counted with its reason; an address within a tunnel
//! is of the peer that sealed it.

mod counters;
mod elder;
mod endpoints;
mod flood;
#[cfg(fuzzing)]
pub mod fuzz;
mod inbound;
mod monitor;
mod noise;
mod outbound;
mod peer;
mod shared;
mod table;
mod tun;
pub(crate) mod udp;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::io::{self, PipeWriter, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::{self, JoinHandle};

use boringtun::x25519::{PublicKey, StaticSecret};
use ipnet::IpNet;
use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore, SeedableRng};
use weft_wire::preshared::PresharedKey;
use weft_wire::types::{NodeName, TunnelKey};

use counters::Counters;
pub use counters::Reason;
use elder::Elder;
pub use endpoints::{Candidate, Keep, Rank};
pub use monitor::{TunnelMonitor, TunnelStatus};
use noise::Identity;
use peer::Peer;
use shared::Shared;
use table::Table;
use tun::Tun;
use udp::{Batch, Udp};

use crate::handover::{Kept, Talk};

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

impl PartialEq for TunnelSecret {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes() == other.0.as_bytes()
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
            turn: Mutex::default(),
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
        if before[0].secret == *secret {
            return;
        }
        let earlier = before[0].secret.clone();
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
                session.want(&mut batch);
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

    /// Returns the sessions that packets go by, each named by this node's key and the peer's.
    pub(crate) fn sessions(&self) -> BTreeSet<(TunnelKey, TunnelKey)> {
        let identities = self.shared.identities();
        let table = self.shared.table();
        let used = table.peers.values().map(Peer::for_sending).filter(|peer| peer.session().ready());
        used.filter_map(|peer| {
            let own = identities.iter().find(|identity| peer.is_under(identity))?;
            Some((own.public, peer.key))
        })
        .collect()
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
fn unusable(peer: &TunnelPeer, own: &TunnelKey, keys: &mut BTreeSet<TunnelKey>) -> Option<String> {
    let node = &peer.node;
    if peer.key.0 == [0; 32] {
        return Some(format!(
            "{node} announces a tunnel key of zeros; restart its daemon with a key of its own"
        ));
    }
    if peer.key == *own {
        return Some(format!(
            "{node} announces this node's own tunnel key; remove the copied key file there"
        ));
    }
    let first = keys.insert(peer.key);
    (!first).then(|| {
        format!("{node} announces a tunnel key that another node has; remove the copied key file there")
    })
}
