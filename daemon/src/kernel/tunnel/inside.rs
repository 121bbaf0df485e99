//! Tunnels that the kernel carries: what is wanted, made so by the difference to what the kernel has.
//!
//! The device belongs to the kernel, so it goes on while weftd is not there. Invariant: all that is remembered here can be
//! forgotten; the kernel is read before it is changed.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use weft_wire::types::{NodeName, TunnelKey};

use super::super::KernelError;
use super::super::wireguard::{ChangeKind, Device, FoundPeer, WantedPeer, Wireguard, changes, to_ask};
use crate::plan::model;
use crate::tunnel::{TunnelSecret, TunnelStatus};

/// One device of the kernel's tunnels.
#[derive(Debug)]
pub(super) struct Inside {
    device: String,
    port: u16,
    /// Nothing where the kernel had no WireGuard at the last look.
    socket: Option<Wireguard>,
    set: Option<Set>,
    /// When the device got its key, by the wall clock: a handshake before that is of no use any more.
    keyed: Option<SystemTime>,
    monitor: Option<KernelMonitor>,
}

/// What was last set, and what of it the kernel was to take.
#[derive(Debug)]
struct Set {
    plan: model::Tunnels,
    peers: BTreeMap<TunnelKey, WantedPeer>,
}

fn announced(plan: &model::Tunnels) -> BTreeMap<TunnelKey, SocketAddr> {
    plan.peers.iter().map(|(key, peer)| (*key, peer.endpoint)).collect()
}

/// Whether a device is the node's under that key.
fn is(found: &Device, key: TunnelKey, port: u16) -> bool {
    found.key == Some(key) && found.port == port && found.fwmark == 0
}

impl Inside {
    pub(super) fn new(device: &str, port: u16, socket: Option<Wireguard>) -> Self {
        Self { device: device.into(), port, socket, set: None, keyed: None, monitor: None }
    }

    pub(super) fn device(&self) -> &str {
        &self.device
    }

    /// Looks again for what was not there.
    pub(super) fn open(&mut self) -> Result<(), KernelError> {
        if self.socket.is_none() {
            self.socket = Wireguard::open().map_err(refused)?;
        }
        if self.socket.is_some() { Ok(()) } else { Err(no_wireguard()) }
    }

    pub(super) fn forget(&mut self) {
        self.set = None;
        self.keyed = None;
        self.monitor = None;
    }

    pub(super) fn is_set(&self) -> bool {
        self.set.is_some()
    }

    pub(super) fn monitor(&self) -> Option<KernelMonitor> {
        self.monitor.clone()
    }

    /// Returns what the kernel carries; nothing where it is not what was last set.
    pub(super) fn carried(&mut self) -> Option<model::Tunnels> {
        let found = self.socket.as_mut()?.read(&self.device).ok()?;
        let Set { plan, peers } = self.set.as_ref()?;
        let same = is(&found, plan.key, self.port)
            && changes(&found, peers, &announced(plan), SystemTime::now()).is_empty();
        same.then(|| plan.clone())
    }

    /// Returns the sessions. The kernel tells of handshakes, also of those before its key changed.
    pub(super) fn sessions(&mut self) -> model::Sessions {
        let Some(Ok(found)) = self.socket.as_mut().map(|socket| socket.read(&self.device)) else {
            return model::Sessions::new();
        };
        let wall = SystemTime::now();
        let lives = |peer: &FoundPeer| peer.session(wall).is_some() && peer.handshake > self.keyed;
        let peers = found.peers.iter().filter(|(_, peer)| lives(peer));
        peers.filter_map(|(key, _)| Some((found.key?, *key))).collect()
    }

    /// Is [`Inside::sessions`] by the names of the nodes.
    pub(super) fn sessions_of_nodes(&mut self) -> BTreeSet<NodeName> {
        let sessions = self.sessions();
        let plan = self.set.as_ref().map(|set| &set.plan);
        let peers = plan.into_iter().flat_map(|plan| plan.peers.iter().map(move |peer| (plan.key, peer)));
        peers
            .filter(|(own, (key, _))| sessions.contains(&(*own, **key)))
            .map(|(_, (_, peer))| peer.node.clone())
            .collect()
    }

    /// Makes it so; returns what was left out and why, a sentence each. Who is new here and `in_use` on another device is asked
    /// for a session at once.
    pub(super) fn set(
        &mut self,
        secret: &TunnelSecret,
        wanted: &model::Tunnels,
        in_use: &BTreeSet<NodeName>,
    ) -> Result<Vec<String>, KernelError> {
        let (name, port) = (&self.device, self.port);
        let socket = self.socket.as_mut().ok_or_else(no_wireguard)?;
        let found = socket.read(name).map_err(refused)?;
        let (peers, left_out) = usable(wanted);
        let before = self.set.take();
        let known = before.map(|set| announced(&set.plan)).unwrap_or_default();
        let wall = SystemTime::now();
        let changes = changes(&found, &peers, &known, wall);
        let new_key = found.key != Some(wanted.key);
        if !is(&found, wanted.key, port) {
            socket.set_identity(name, &secret.to_bytes(), port).map_err(|error| at_port(error, port))?;
            tracing::info!(device = name, key = %wanted.key, port, "tunnels carry packets in the kernel");
        }
        if new_key {
            self.keyed = Some(wall);
        }
        let changed = socket.set_peers(name, &changes);
        let mut asked = to_ask(&found, &changes, new_key, &known, wall);
        for change in changes.iter().filter(|change| change.kind == ChangeKind::Add) {
            let node = wanted.peers.get(&change.key).map(|peer| &peer.node);
            if node.is_some_and(|node| in_use.contains(node)) && !asked.contains(&change.key) {
                asked.push(change.key);
            }
        }
        changed.and_then(|()| socket.ask(name, &asked)).map_err(refused)?;
        self.set = Some(Set { plan: wanted.clone(), peers });
        let names = wanted.peers.iter().map(|(key, peer)| (*key, peer.node.clone())).collect();
        match &self.monitor {
            Some(monitor) => *lock(&monitor.0.names) = names,
            None => self.monitor = KernelMonitor::new(name, names),
        }
        Ok(left_out)
    }
}

fn refused(error: io::Error) -> KernelError {
    KernelError(match error.raw_os_error() {
        Some(libc::EPERM) => {
            format!("{error}: weftd needs the capability CAP_NET_ADMIN; run it as root, or grant it")
        }
        _ => error.to_string(),
    })
}

fn at_port(error: io::Error, port: u16) -> KernelError {
    match error.raw_os_error() {
        Some(libc::EADDRINUSE) => KernelError(format!(
            "UDP port {port} of WireGuard cannot be used: {error}; end what uses it, or set encryption.port"
        )),
        _ => refused(error),
    }
}

fn no_wireguard() -> KernelError {
    KernelError(
        "this kernel has no WireGuard; load the module (modprobe wireguard), or set encryption.implementation to \"auto\" or \"user-space\"".into(),
    )
}

/// Sorts out what the kernel would take and no one could use. As in user space, the earlier of two peers keeps an address.
fn usable(wanted: &model::Tunnels) -> (BTreeMap<TunnelKey, WantedPeer>, Vec<String>) {
    let (mut peers, mut left_out) = (BTreeMap::new(), Vec::new());
    let mut taken: Vec<(IpNet, &NodeName)> = Vec::new();
    for (key, peer) in &wanted.peers {
        let node = &peer.node;
        if key.0 == [0; 32] {
            left_out.push(format!(
                "{node} announces a tunnel key of zeros; restart its daemon with a key of its own"
            ));
            continue;
        }
        if *key == wanted.key {
            left_out.push(format!(
                "{node} announces this node's own tunnel key; remove the copied key file there"
            ));
            continue;
        }
        let mut prefixes = BTreeSet::new();
        for net in &peer.prefixes {
            let overlaps = |other: &&(IpNet, &NodeName)| other.0.contains(net) || net.contains(&other.0);
            match taken.iter().find(overlaps).filter(|(_, owner)| *owner != node) {
                Some((other, owner)) => left_out.push(format!(
                    "{node} announces {net}, which overlaps {other} of {owner}; {owner} keeps it here"
                )),
                None => {
                    taken.push((*net, node));
                    prefixes.insert(*net);
                }
            }
        }
        let preshared = peer.preshared.as_ref().map(|secret| *secret.secret()).unwrap_or_default();
        peers.insert(*key, WantedPeer { endpoint: peer.endpoint, anew: peer.anew, preshared, prefixes });
    }
    (peers, left_out)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A look at the tunnels that the kernel carries.
#[derive(Debug, Clone)]
pub struct KernelMonitor(Arc<Looking>);

#[derive(Debug)]
struct Looking {
    device: String,
    socket: Mutex<Wireguard>,
    names: Mutex<BTreeMap<TunnelKey, NodeName>>,
}

impl PartialEq for KernelMonitor {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl KernelMonitor {
    fn new(device: &str, names: BTreeMap<TunnelKey, NodeName>) -> Option<Self> {
        let socket = Mutex::new(Wireguard::open().ok().flatten()?);
        Some(Self(Arc::new(Looking { device: device.into(), socket, names: Mutex::new(names) })))
    }

    /// Has the kernel ask a peer for a session, if it is one here.
    pub(crate) fn want(&self, key: &TunnelKey) {
        if lock(&self.0.names).contains_key(key)
            && let Err(error) = lock(&self.0.socket).ask(&self.0.device, &[*key])
        {
            tracing::debug!(err = %error, "no session asked for");
        }
    }

    /// Returns how each peer's tunnel is, as the kernel tells it now. It counts bytes on the underlay and no packets, and does
    /// not tell how many wait: a peer that was written to and never answered counts as one that has some waiting.
    pub(super) fn status(&self) -> Vec<TunnelStatus> {
        let device: Device = lock(&self.0.socket).read(&self.0.device).unwrap_or_default();
        let names = lock(&self.0.names);
        let wall = SystemTime::now();
        let status = |(key, node): (&TunnelKey, &NodeName)| {
            let peer = device.peers.get(key)?;
            let handshake: Option<Duration> = peer.session(wall);
            let nowhere = SocketAddr::new(IpAddr::from([0; 4]), 0);
            Some(TunnelStatus {
                node: node.clone(),
                key: *key,
                endpoint: peer.endpoint.unwrap_or(nowhere),
                // The kernel does not tell an endpoint that it was given from one that packets came from.
                heard: handshake.is_some(),
                handshake,
                waiting: usize::from(peer.handshake.is_none() && peer.sent > 0),
                sent: (0, peer.sent),
                received: (0, peer.received),
            })
        };
        names.iter().filter_map(status).collect()
    }
}
