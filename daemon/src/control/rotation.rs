//! How the key of the node's tunnels changes without a lost packet, and what it does for peers whose keys change.
//!
//! A device of the kernel has one key, and an address there belongs to one key of a peer. So a key changes while packets take
//! another way, the detour: a second device with a key and a port of its own at whoever's kernel carries the tunnels, a second
//! key at one place in user space. The node that changes its key prefers the detour and says so; its peers open theirs; either
//! end sends by it as soon as there is a session (`plan::desired`), and both take packets from both ways all the time. Once all
//! do, the key that nobody uses any more is replaced, and everybody goes back in the same manner.
//!
//! A change begins when no other is seen under way, since the key of a detour must not change while packets take it: in user
//! space the next key is that of the detour, and a pair that is on another's detour already would lose what is sent there.
//! Changes that begin before they can have heard of each other find no packets on any detour.
//!
//! Pure. Invariants: a node has at most two keys in force; what waits for peers is bounded; the detour outlasts its use.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use tracing::{info, warn};
use weft_wire::mesh::{Carrier, Detour, TunnelFacts};
use weft_wire::types::{NodeName, TunnelKey};

use super::{Control, Output};
use crate::plan::model::OwnDetour;
use crate::state::RememberedPeer;

/// So long nothing must be pending before the key changes: peers look at their sessions more often.
const CALM: Duration = Duration::from_secs(3);
/// So long peers have to come by the detour. Two kernels that ask each other at once ask again after five seconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// So long a change waits for those of others: for two that take as long as one can. Who died in the middle holds up nobody for
/// ever.
const TURN: Duration = Duration::from_secs(150);
/// So long a detour stays after it was preferred last: sessions on the usual way come up meanwhile.
const LINGER: Duration = Duration::from_secs(15);
/// Between two looks whether peers have followed.
const LOOK: Duration = Duration::from_millis(250);
/// Between two looks whether the detour can go.
const LINGER_LOOK: Duration = Duration::from_secs(2);

/// The keys of the node's tunnels; all are on the disk, and the kernel's shell has the secrets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnKeys {
    /// The one in force.
    pub main: TunnelKey,
    /// The one that was about to follow it.
    pub next: Option<TunnelKey>,
    /// That of the next detour.
    pub spare: TunnelKey,
    /// Who carries the tunnels.
    pub carrier: Carrier,
}

/// What peers are told of the tunnels, once the kernel has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Told {
    key: TunnelKey,
    /// The key of the detour, and whether it is preferred.
    detour: Option<(TunnelKey, bool)>,
}

/// Where a change of keys stands.
#[derive(Debug, Default)]
pub(super) struct Rotation {
    keys: Option<OwnKeys>,
    /// Since when the next key waits for the changes of others to be over.
    waiting: Option<Instant>,
    /// Since when the detour is preferred.
    since: Option<Instant>,
    /// Since when nothing is pending.
    calm: Option<Instant>,
    /// When this node preferred the detour last.
    preferred: Option<Instant>,
    /// When each peer was last seen to prefer it.
    peers: BTreeMap<NodeName, Instant>,
    /// The detour's key in user space: that which the node goes over to.
    heir: Option<TunnelKey>,
    told: Option<Told>,
    /// What the pass under way will have made so.
    pass: Option<Told>,
}

impl Rotation {
    pub(super) fn new(keys: Option<OwnKeys>, was_open: bool, now: Instant) -> Self {
        let mut rotation = Self { keys, ..Self::default() };
        let Some(keys) = keys else { return rotation };
        if keys.next.is_some() && was_open {
            rotation.since = Some(now);
        } else if keys.next.is_some() {
            rotation.waiting = Some(now);
        } else if was_open {
            rotation.preferred = Some(now);
        }
        rotation.heir = keys.next.filter(|_| was_open);
        // What the last daemon told is still so: peers that heard otherwise would close the detour while it is in use.
        let detour = match keys.carrier {
            Carrier::Kernel => Some(keys.spare),
            Carrier::UserSpace => keys.next,
        };
        let detour = detour.filter(|_| was_open).map(|key| (key, keys.next.is_some()));
        rotation.told = Some(Told { key: keys.main, detour });
        rotation
    }

    fn prefers(&self) -> bool {
        self.since.is_some()
    }

    /// Whether the node has tunnels.
    pub(super) fn has_keys(&self) -> bool {
        self.keys.is_some()
    }

    /// Whether this node's own detour is in place, or lingers.
    fn own_open(&self, now: Instant) -> bool {
        self.prefers() || self.preferred.is_some_and(|at| now < at + LINGER)
    }

    /// Takes which peers prefer their detours.
    fn note_preferences(&mut self, peers: &BTreeMap<NodeName, RememberedPeer>, now: Instant) {
        let prefers = |facts: &TunnelFacts| facts.detour.as_ref().is_some_and(|detour| detour.preferred);
        for (node, _) in peers.iter().filter(|(_, peer)| peer.peer.tunnel.as_ref().is_some_and(prefers)) {
            self.peers.insert(node.clone(), now);
        }
        self.peers.retain(|node, at| now < *at + LINGER && peers.contains_key(node));
    }

    /// Begins the change that waits, if it is its turn.
    fn take_turn(&mut self, now: Instant) {
        let Some(asked) = self.waiting else { return };
        // A session that is left from the last detour may be one that the peer has no longer.
        let is_closed = self.told.is_none_or(|told| told.detour.is_none());
        let is_quiet = self.peers.is_empty() && is_closed;
        if is_quiet || now >= asked + TURN {
            if !is_quiet {
                warn!(
                    others = self.peers.len(),
                    "peers change their tunnel keys all the time, this node no longer waits"
                );
            }
            self.waiting = None;
            self.since = Some(now);
            self.calm = None;
        }
    }
}

impl Control {
    /// Returns the key of the node's tunnels, where it has any.
    pub fn tunnel_key(&self) -> Option<TunnelKey> {
        self.rotation.keys.map(|keys| keys.main)
    }

    /// Returns who carries the node's tunnels, or would if it had any.
    pub fn carrier(&self) -> Carrier {
        self.rotation.keys.map_or(Carrier::UserSpace, |keys| keys.carrier)
    }

    /// Whether the key is changing, or the last change is not over yet: another one has to wait.
    pub fn is_rotating(&self, now: Instant) -> bool {
        self.rotation.waiting.is_some() || self.rotation.own_open(now)
    }

    /// Goes over to another key of the tunnels, as soon as peers permit. It must be on the disk as the next one, and the kernel's
    /// shell must have the secret. [`Output::TunnelKey`] tells when it is in force.
    pub fn rotate_tunnel_key(&mut self, next: TunnelKey, now: Instant) {
        let Some(keys) = &mut self.rotation.keys else { return };
        keys.next = Some(next);
        self.rotation.since = None;
        self.rotation.waiting = Some(now);
        self.wake(now);
    }

    /// Speaks WireGuard with another key from the next pass on, whoever follows. It must be on the disk.
    fn use_next_tunnel_key(&mut self, now: Instant) {
        let Some(keys) = &mut self.rotation.keys else { return };
        let Some(next) = keys.next.take() else { return };
        keys.main = next;
        self.rotation.since = None;
        self.rotation.calm = None;
        self.outputs.push_back(Output::TunnelKey(next));
        // Told to peers once the kernel has it (`tell_tunnel_keys`): who hears of a key asks for a session under it.
        self.pass.due = Some(now);
    }

    /// Takes the key of the next detour. It must be on the disk, and the kernel's shell must have the secret.
    pub fn use_spare_key(&mut self, spare: TunnelKey) {
        if let Some(keys) = &mut self.rotation.keys {
            keys.spare = spare;
        }
    }

    /// Returns the detour that the plan is to have, with regard to what the peers prefer.
    pub(super) fn own_detour(
        &mut self,
        peers: &BTreeMap<NodeName, RememberedPeer>,
        now: Instant,
    ) -> Option<OwnDetour> {
        let keys = self.rotation.keys?;
        self.rotation.note_preferences(peers, now);
        self.rotation.take_turn(now);
        let mut facts = peers.values().filter_map(|peer| peer.peer.tunnel.as_ref());
        let kernels = facts.any(|facts| facts.carrier == Some(Carrier::Kernel));
        if self.rotation.prefers() && keys.carrier == Carrier::UserSpace && !kernels {
            // Everybody takes packets under both keys.
            self.use_next_tunnel_key(now);
        }
        let keys = self.rotation.keys?;
        let rotation = &mut self.rotation;
        if rotation.prefers() {
            rotation.preferred = Some(now);
        }
        let own = rotation.own_open(now);
        let detour = match keys.carrier {
            Carrier::UserSpace => {
                rotation.heir = keys.next.filter(|_| rotation.prefers()).or(rotation.heir).filter(|_| own);
                rotation.heir.map(|key| (key, BTreeSet::new()))
            }
            Carrier::Kernel if own => Some((keys.spare, peers.keys().cloned().collect())),
            Carrier::Kernel => {
                let nodes: BTreeSet<_> = rotation.peers.keys().cloned().collect();
                Some((keys.spare, nodes)).filter(|(_, nodes)| !nodes.is_empty())
            }
        };
        let preferred = rotation.prefers();
        let detour = detour.map(|(key, peers)| OwnDetour { key, preferred, peers });
        rotation.pass =
            Some(Told { key: keys.main, detour: detour.as_ref().map(|detour| (detour.key, preferred)) });
        let is_open = detour.is_some();
        if is_open != self.memory.detour {
            self.memory.detour = is_open;
            // Before the kernel has it: a later daemon must find what is there.
            self.remember_first(false);
        }
        detour
    }

    /// Tells the peers what the kernel has now, and looks how far they are.
    pub(super) fn tell_tunnel_keys(&mut self, pending: usize, now: Instant) {
        let made = self.rotation.pass.take();
        if made.is_some() && made != self.rotation.told {
            let ended = self.rotation.told.is_some_and(|told| told.detour.is_some())
                && made.is_some_and(|made| made.detour.is_none());
            if ended && self.rotation.keys.is_some_and(|keys| keys.carrier == Carrier::Kernel) {
                self.outputs.push_back(Output::SpareKeyUsed);
            }
            self.rotation.told = made;
            self.announce(now);
        }
        let rotation = &mut self.rotation;
        let is_told = rotation.told.is_some_and(|told| told.detour.is_some_and(|(_, preferred)| preferred));
        let open = rotation.told.is_some_and(|told| told.detour.is_some());
        if pending == 0 && is_told {
            rotation.calm.get_or_insert(now);
        } else {
            rotation.calm = None;
        }
        if let Some(since) = rotation.since.filter(|_| is_told) {
            let calm = rotation.calm.is_some_and(|calm| now >= calm + CALM);
            if calm || now >= since + PATIENCE {
                if calm {
                    info!("peers have followed, the tunnel key changes");
                } else {
                    warn!(pending, "peers have not followed, the tunnel key changes all the same");
                }
                self.use_next_tunnel_key(now);
            }
        }
        let hurries = self.rotation.prefers() || self.rotation.waiting.is_some();
        if open || hurries {
            let look = if pending > 0 || hurries { LOOK } else { LINGER_LOOK };
            let due = now + look;
            self.pass.due = Some(self.pass.due.map_or(due, |earlier| earlier.min(due)));
        }
    }

    /// Returns what peers are told of the tunnels.
    pub(super) fn tunnel_facts(&self) -> Option<TunnelFacts> {
        let told = self.rotation.told?;
        let carrier = self.rotation.keys?.carrier;
        let encryption = &self.config.encryption;
        let port = if carrier == Carrier::Kernel { encryption.detour_port } else { encryption.port };
        Some(TunnelFacts {
            key: told.key,
            port: encryption.port,
            preshared: if encryption.preshared { self.mesh.ring().ids().collect() } else { Vec::new() },
            pairs: Vec::new(),
            carrier: Some(carrier),
            detour: told.detour.map(|(key, preferred)| Detour { key, port, preferred }),
        })
    }
}
