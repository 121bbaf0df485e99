//! From what the cores know to what the plan needs and what peers are told. Pure but for the logging.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use tracing::info;
use weft_ipam::lease::LeaseView;
use weft_wire::mesh::{
    Authority, Capabilities, Facts, LeaseTable, LeasedSubnet, MemberState, NodeRecord, Owner, Reachability,
    Verdict,
};
use weft_wire::types::{MacAddress, NodeName};

use super::{Control, Output, REMEMBERED_PEER};
use crate::config::{OverlayConfig, StoreKind, TxChecksum};
use crate::plan::model::{self, Dataplane, Encryption, Inputs, Peer, Sessions};
use crate::state::{RememberedLease, RememberedPeer};

/// Derives the Ethernet address of a node's VXLAN device of one family.
fn vtep(node: &NodeName, v4: bool) -> MacAddress {
    MacAddress::derived(node, if v4 { "v4" } else { "v6" })
}

impl Control {
    /// Puts together what a pass reads, but for the pods: the shell adds them at the last moment.
    pub(super) fn inputs(&mut self, now: Instant) -> Inputs {
        self.note_heard_sites(now);
        self.note_pairless(now);
        let peers = self.planned_peers(now);
        self.remember_peers(&peers);
        let detour = self.own_detour(&peers, now);
        let twin = |peer: &&RememberedPeer| {
            peer.peer.tunnel.as_ref().is_some_and(|theirs| Some(theirs.key) == self.tunnel_key())
        };
        self.problems.tunnel_twin = peers.values().find(twin).map(|peer| peer.peer.node.clone());
        let unknown = || model::Underlay {
            device: String::new(),
            index: 0,
            mtu: 0,
            addresses: Vec::new(),
            strict_sources: false,
            tunnel: None,
        };
        let mut peers: Vec<Peer> = peers.into_values().map(|remembered| remembered.peer).collect();
        self.through_gateways(&mut peers);
        Inputs {
            strays: std::mem::take(&mut self.strays),
            node: self.config.node.name.clone(),
            site: self.config.node.site.clone(),
            dataplane: Dataplane { detour, ..self.dataplane() },
            sessions: Sessions::new(),
            underlay: self.underlay.clone().unwrap_or_else(|_| unknown()),
            subnets: self.subnets(),
            peers,
            attachments: Vec::new(),
            ways: self.paths.ways().clone(),
            anew: self.paths.anew().clone(),
        }
    }

    fn dataplane(&self) -> Dataplane {
        let OverlayConfig { vni, port, direct_routing, mtu, .. } = self.config.overlay;
        Dataplane {
            vni,
            vxlan_port: port,
            direct_routing,
            masquerade: self.config.masquerade.enabled,
            cluster_cidrs: self.pod_ranges(),
            non_masquerade: self.config.masquerade.except.clone(),
            mtu,
            tx_checksum: match self.config.overlay.tx_checksum {
                TxChecksum::On => true,
                TxChecksum::Off => false,
                TxChecksum::Auto => self.probe.offload(),
            },
            hairpin: self.config.pods.hairpin,
            encryption: self.config.encryption.policy,
            tunnel: self.tunnel_key(),
            carrier: self.carrier(),
            detour: None,
            preshared: self.config.encryption.preshared.then(|| self.mesh.ring().clone()),
            pairs: self.announced_pair_secrets(),
        }
    }

    /// Returns the peers to have routes to: those whose records are accepted, and those that an earlier run
    /// knew and nothing has contradicted yet.
    fn planned_peers(&self, now: Instant) -> BTreeMap<NodeName, RememberedPeer> {
        let mut heard = BTreeSet::new();
        let mut peers = BTreeMap::new();
        for member in self.mesh.members() {
            if member.state == MemberState::Left || !matches!(member.verdict, Verdict::Pending { .. }) {
                heard.insert(member.node.clone());
            }
            // The record in force, not the latest: that one may wait for the lease table.
            if let Some(record) = member.routed {
                let mut peer = planned(record);
                peer.peer.path_mtu = self.path_probes.limit(member.node);
                peers.insert(member.node.clone(), peer);
            }
        }
        let claimed: BTreeSet<_> = peers.values().flat_map(|peer| peer.peer.subnets.clone()).collect();
        let unclaimed = |remembered: &RememberedPeer| {
            remembered.peer.subnets.iter().all(|subnet| !claimed.contains(subnet))
        };
        let table = self.table(now);
        let young = now.duration_since(self.started) < REMEMBERED_PEER;
        for (node, remembered) in &self.memory.peers {
            let still_owned = match self.site_of(&remembered.peer) {
                // No store here speaks of its leases: as long as nobody of its site is heard who could know better.
                Some(believed) => {
                    believed && self.has_just_heard(&remembered.peer.site, now) && unclaimed(remembered)
                }
                None => match &self.config.store.kind {
                    StoreKind::Static(_) => young,
                    StoreKind::Sqlite(_) | StoreKind::Etcd(_) | StoreKind::Kubernetes(_) => remembered
                        .peer
                        .subnets
                        .iter()
                        .all(|subnet| table.owner(*subnet).is_some_and(|owner| owner.node == *node)),
                },
            };
            if !heard.contains(node) && still_owned && !peers.contains_key(node) {
                peers.insert(node.clone(), remembered.clone());
            }
        }
        peers
    }

    fn remember_peers(&mut self, peers: &BTreeMap<NodeName, RememberedPeer>) {
        if *peers != self.memory.peers {
            self.memory.peers.clone_from(peers);
            // Before the kernel is programmed: a daemon that is killed right after must find what it did.
            self.remember_first(false);
        }
    }

    /// Returns who owns which subnet: the store's view, or the last one remembered while it has not answered.
    fn table(&self, now: Instant) -> LeaseTable {
        if self.leasing.staleness(now).is_none() {
            return self.memory.leases.iter().map(|(subnet, lease)| (*subnet, lease.into())).collect();
        }
        // An expired lease that no one took is let go only where the store answers and its node does not: while
        // the store is away, everyone's lease looks old.
        let answers = self.store_error.is_none();
        let alive: BTreeSet<_> = self
            .mesh
            .members()
            .filter(|member| matches!(member.state, MemberState::Alive | MemberState::Suspect))
            .map(|member| member.node.clone())
            .collect();
        self.lease_views(now)
            .into_iter()
            .filter(|view| !view.expired || !answers || view.own || alive.contains(&view.node))
            .map(|view| (view.subnet, Owner { node: view.node, key: view.key, epoch: view.epoch }))
            .collect()
    }

    /// Returns every lease of the store, as last seen.
    pub fn lease_views(&self, now: Instant) -> Vec<LeaseView> {
        self.leasing.table(now)
    }

    /// Tells the mesh who may announce what, after the store spoke or time passed.
    pub(super) fn take_lease_table(&mut self, now: Instant) {
        if matches!(self.config.store.kind, StoreKind::Static(_)) {
            return;
        }
        let table = self.table(now);
        if self.authority.as_deref() == Some(&table) {
            return;
        }
        self.memory.leases = table
            .leases()
            .iter()
            .map(|(subnet, owner)| {
                let Owner { node, key, epoch } = owner.clone();
                (*subnet, RememberedLease { node, key, epoch })
            })
            .collect();
        self.touch_memory(now);
        let table = Arc::new(table);
        self.mesh.set_authority(Authority::Store(Arc::clone(&table)), now);
        self.authority = Some(table);
        self.wake(now);
    }

    /// After the held leases changed: pods, peers and the memory follow.
    pub(super) fn leases_changed(&mut self, now: Instant) {
        let held = self.leasing.held();
        if self.memory.held != held {
            let subnets: Vec<_> = held.iter().map(|held| held.subnet.to_string()).collect();
            info!(subnets = subnets.join(", "), "node subnets");
            self.memory.held = held;
            // A lease must be on the disk before it is announced: a restart announces what it finds there.
            self.remember_first(true);
        }
        self.outputs.push_back(Output::Subnets(self.subnets()));
        self.take_lease_table(now);
        self.announce(now);
        self.wake(now);
    }

    /// Announces what the node offers; the mesh signs it anew only if it differs.
    pub(super) fn announce(&mut self, now: Instant) {
        let Ok(underlay) = &self.underlay else { return };
        let name = &self.config.node.name;
        let addresses: Vec<_> = underlay.addresses.iter().map(|address| address.addr()).collect();
        let has = |v4: bool| addresses.iter().any(|address| address.is_ipv4() == v4);
        let mut capabilities = Capabilities::VXLAN;
        if self.config.overlay.direct_routing {
            capabilities = capabilities | Capabilities::DIRECT;
        }
        match self.config.encryption.policy {
            Encryption::Never => {}
            Encryption::CrossSite => capabilities = capabilities | Capabilities::ENCRYPT_CROSS_SITE,
            Encryption::Always => capabilities = capabilities | Capabilities::ENCRYPT_ALWAYS,
        }
        let facts = Facts {
            subnets: self
                .leasing
                .held()
                .iter()
                .map(|held| LeasedSubnet { subnet: held.subnet, epoch: held.epoch })
                .collect(),
            gossip: addresses
                .iter()
                .map(|address| SocketAddr::new(*address, self.config.gossip.port))
                .collect(),
            underlay: addresses.clone(),
            vtep_v4: has(true).then(|| vtep(name, true)),
            vtep_v6: has(false).then(|| vtep(name, false)),
            vni: self.config.overlay.vni,
            vxlan_port: self.config.overlay.port,
            mtu: u16::try_from(underlay.mtu).unwrap_or(u16::MAX),
            capabilities,
            // The mesh says these.
            keys: Vec::new(),
            follows: None,
            certificate: None,
            gateway: self.config.site.gateways.get(name).copied(),
            tunnel: self.tunnel_facts(),
            tunnel_reach: self.reach(),
            // The mesh says the rest.
            reachability: Reachability {
                outside: self.config.gossip.advertise.clone(),
                ..Reachability::default()
            },
        };
        self.mesh.announce(facts, now);
    }
}

fn demanded(capabilities: Capabilities) -> Encryption {
    if capabilities.contains(Capabilities::ENCRYPT_ALWAYS) {
        Encryption::Always
    } else if capabilities.contains(Capabilities::ENCRYPT_CROSS_SITE) {
        Encryption::CrossSite
    } else {
        Encryption::Never
    }
}

fn planned(record: &NodeRecord) -> RememberedPeer {
    let facts = &record.facts;
    RememberedPeer {
        peer: Peer {
            node: record.node.clone(),
            subnets: facts.subnets.iter().map(|leased| leased.subnet).collect(),
            underlay: facts.underlay.clone(),
            vtep_v4: facts.vtep_v4,
            vtep_v6: facts.vtep_v6,
            vni: facts.vni,
            vxlan_port: facts.vxlan_port,
            mtu: u32::from(facts.mtu),
            site: record.site.clone(),
            encryption: demanded(facts.capabilities),
            tunnel: facts.tunnel.clone(),
            gateway: facts.gateway,
            via: None,
            path_mtu: None,
        },
        gossip: facts.gossip.clone(),
    }
}
