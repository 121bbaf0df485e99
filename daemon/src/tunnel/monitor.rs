//! A look at running tunnels, for status and doctor.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use weft_wire::types::{NodeName, TunnelKey};

use super::counters::Reason;
use super::endpoints::{Candidate, Keep};
use super::peer::Peer;
use super::shared::Shared;
use super::udp::Batch;

/// How a peer's tunnel is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelStatus {
    /// Its name.
    pub node: NodeName,
    /// Its public key.
    pub key: TunnelKey,
    /// Where its packets go.
    pub endpoint: SocketAddr,
    /// Whether its packets came from there last.
    pub heard: bool,
    /// Since the last handshake; none while there is no session.
    pub handshake: Option<Duration>,
    /// How many packets wait for a session.
    pub waiting: usize,
    /// Packets and bytes that were sent, within the tunnel.
    pub sent: (u64, u64),
    /// Packets and bytes that were received.
    pub received: (u64, u64),
}

/// A look at running tunnels.
#[derive(Debug, Clone)]
pub struct TunnelMonitor(pub(super) Arc<Shared>);

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
            let used = peer.for_sending();
            let session = used.session();
            TunnelStatus {
                node: peer.node.clone(),
                key: peer.key,
                endpoint: session.endpoint(),
                heard: session.is_heard_there(),
                handshake: session.age(),
                waiting: session.waiting(),
                sent: (count(&peer.traffic.sent), count(&peer.traffic.sent_bytes)),
                received: (count(&peer.traffic.received), count(&peer.traffic.received_bytes)),
            }
        };
        self.0.table().peers.values().map(status).collect()
    }

    /// Tells where else a peer may be reached; with `trial` that is tried at once. A peer that is gone needs nothing.
    pub fn set_paths(&self, key: &TunnelKey, candidates: &[Candidate], keep: Keep, trial: bool) {
        let table = self.0.table();
        let Some(peer) = table.peers.get(key) else { return };
        for peer in [Some(Arc::clone(peer)), peer.previous()].into_iter().flatten() {
            peer.session().endpoints().set_candidates(candidates, keep, trial, Instant::now());
        }
    }

    /// Asks a peer for a session though nothing waits for one.
    pub fn want(&self, key: &TunnelKey) {
        let Some(peer) = self.0.table().peers.get(key).cloned() else { return };
        let mut batch = Batch::default();
        let endpoint = {
            let mut session = peer.session();
            if session.ready() || !session.may_ask() {
                return;
            }
            session.want(&mut batch);
            session.endpoint()
        };
        self.0.send(endpoint, &batch);
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
