//! The control plane of one node, without its shell: mesh, leases and plan put together.
//!
//! It decides what is announced, which peers the kernel is programmed for, when a pass is due and what is remembered.
//! Pure: datagrams, answers of the store, reports of passes and `now` go in; [`Output`]s come out. The shell
//! (`node.rs`) owns sockets, store, kernel, pods and disk, and so does the simulation of the tests. Drain
//! [`Control::poll_output`] until [`Output::Wait`] after every call.
//!
//! Invariants: an event wakes, and the pass that follows reads everything; what must be on the disk comes out before
//! what relies on it; a subnet whose lease is lost is no longer announced.

mod checksum;
mod facts;
mod gateways;
mod leases;
mod pairs;
mod path_mtu;
mod path_probes;
pub(crate) mod paths;
mod probe;
mod quality;
mod ring;
mod rotation;
mod schedule;
mod seeds;
mod sites;
mod tunnels;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use tracing::{debug, info, warn};
use weft_ipam::carve::Family;
use weft_ipam::lease::{self, Leasing};
use weft_wire::mesh::{
    Authority, LeaseTable, Mesh, MeshConfig, MeshEvent, NodeKey, RelayRefusal, Timing, Trust,
};
use weft_wire::record::Each;
use weft_wire::seal::KeyRing;
use weft_wire::types::{NodeName, PublicKey, SiteName, Subnet, TunnelKey};

use crate::config::{Config, StoreKind};
use crate::plan::model::{Inputs, Underlay};
use crate::relay::pair::Member;
use crate::state::Memory;
use crate::tunnel::{Candidate, Keep};

use leases::leasing;
pub use leases::{StoreAnswer, StoreRequest};
pub use pairs::PairView;
pub use path_probes::PathProbes;
use paths::Paths;
pub use paths::Seen;
pub use probe::PORT as PROBE_PORT;
use probe::Probe;
#[cfg(fuzzing)]
pub use probe::{Kind as ProbeKind, LENGTH as PROBE_LENGTH, message as probe_message, parse as parse_probe};
pub use quality::{Quality, SiteQuality};
pub use rotation::OwnKeys;
use rotation::Rotation;
pub use schedule::Pass;

/// What is remembered is written at most this often.
const REMEMBER: Duration = Duration::from_millis(500);
/// After a write of the memory that failed.
const RETRY: Duration = Duration::from_secs(1);
/// Peers that an earlier run knew are kept this long without a word of them, where no store speaks for them.
const REMEMBERED_PEER: Duration = Duration::from_secs(600);
/// A node that hears of another with its name this soon after its start is the later one.
const NEWCOMER: Duration = Duration::from_secs(20);

/// What the shell has to do next.
#[derive(Debug)]
pub enum Output {
    /// Write the memory, and tell by [`Control::handle_remembered`] before the next poll.
    Remember {
        /// Whether it must outlive a power cut, or only this boot.
        durable: bool,
    },
    /// Ask the store; answer by [`Control::handle_store`].
    Store(StoreRequest),
    /// Send a gossip datagram.
    Send {
        /// The peer.
        to: SocketAddr,
        /// What to send.
        datagram: Vec<u8>,
    },
    /// Send a probe or its answer, from the node's gateway address so that it takes the tunnel.
    Probe {
        /// The peer's gateway.
        to: SocketAddr,
        /// What to send.
        datagram: Vec<u8>,
    },
    /// The key of the tunnels is now this one, that was the next: write it in the place of the one before.
    TunnelKey(TunnelKey),
    /// Nobody uses the detour's key any more: make another, and tell by [`Control::use_spare_key`].
    SpareKeyUsed,
    /// Give new pods addresses of these subnets only.
    Subnets(Vec<Subnet>),
    /// Listen for gossip on these addresses.
    Listen(Vec<IpAddr>),
    /// Write these cluster keys to the disk, and tell by [`Control::handle_ring_kept`].
    KeepRing(KeyRing),
    /// How joining another site's mesh went: a sentence either way.
    Joined(Result<String, String>),
    /// Look at the tunnels, and tell by [`Control::handle_tunnels`].
    LookAtTunnels,
    /// The peer of this key may be reached at these places.
    Paths {
        /// The key.
        key: TunnelKey,
        /// The places.
        places: Vec<Candidate>,
        /// How long mappings on the way are kept.
        keep: Keep,
        /// Whether to try them now.
        trial: bool,
    },
    /// Have a session with the peer of this key.
    WantSession(TunnelKey),
    /// Relay between these two, if there is room; answer by [`Control::handle_relay`].
    Relay([Member; 2]),
    /// Bring the kernel to this; the shell adds the pods. Answer by [`Control::handle_pass`].
    Reconcile(Box<Inputs>),
    /// A ping was answered.
    Pong {
        /// As given to [`Mesh::ping`].
        token: u64,
        /// The round trip.
        rtt: Duration,
    },
    /// The daemon must end, with this sentence.
    Fatal(String),
    /// Nothing to do before `until` but wait for something to handle.
    Wait {
        /// When to call [`Control::handle_timeout`].
        until: Instant,
    },
}

/// What people should hear of until it is over.
#[derive(Debug, Default)]
pub struct Problems {
    /// Who gossips with a key that is not in the ring, and when last.
    pub wrong_key: Option<(SocketAddr, Instant)>,
    /// Who has this node's name, and when that last showed.
    pub duplicate_name: Option<(SocketAddr, PublicKey, Instant)>,
    /// Who asked for this node's lease under this node's name, and when that last showed.
    pub name_asked: Option<(Subnet, PublicKey, Instant)>,
    /// Subnets that two nodes claim: sentence and time.
    pub route_conflicts: BTreeMap<String, Instant>,
    /// Why this node cannot say what its site announces.
    pub site: Option<String>,
    /// What went wrong between sites: sentence and time.
    pub sites: BTreeMap<String, Instant>,
    /// What keeps the node from its leases: sentence and family.
    pub lease: BTreeMap<String, Family>,
    /// Why the memory could not be written.
    pub memory: Option<String>,
    /// Why the underlay was not there at the last look.
    pub underlay: Option<String>,
    /// Who announces this node's own tunnel key, as the last pass saw it.
    pub tunnel_twin: Option<NodeName>,
    /// What is wrong with the subnets that the cluster chose for this node.
    pub chosen: Vec<String>,
    /// What keeps the node from the cluster keys that are wanted.
    pub ring: Option<String>,
}

/// What a control plane starts from.
#[derive(Debug)]
pub struct Start {
    /// The configuration.
    pub config: Config,
    /// What an earlier run left; its incarnation counts this start and is on the disk.
    pub memory: Memory,
    /// Names this boot of the machine.
    pub boot: String,
    /// The node's signing key.
    pub key: NodeKey,
    /// The cluster keys.
    pub ring: KeyRing,
    /// The keys of the node's tunnels, where it has any.
    pub tunnel: Option<OwnKeys>,
    /// How other sites are judged, where they are judged by what they say.
    pub trust: Option<Trust>,
    /// Fresh random bytes.
    pub seed: [u8; 32],
}

/// The control plane of one node.
#[derive(Debug)]
pub struct Control {
    /// The configuration.
    pub config: Config,
    /// The mesh.
    pub mesh: Mesh,
    /// The leases.
    pub leasing: Leasing,
    /// Why the store did not answer last time; `None` while it answers.
    pub store_error: Option<String>,
    /// What a later run starts from.
    pub memory: Memory,
    /// What carries the tunnels, or why nothing does.
    pub underlay: Result<Underlay, String>,
    /// Where the reconciler stands.
    pub pass: Pass,
    /// What people should hear of.
    pub problems: Problems,
    /// Whether this kernel breaks checksums.
    pub(crate) probe: Probe,
    /// What the paths to peers carry, and how well.
    pub path_probes: PathProbes,
    /// When this run began.
    pub started: Instant,
    boot: String,
    /// By which paths peers are reached, and when the tunnels are looked at for that.
    pub(crate) paths: Paths,
    tunnels_due: Option<Instant>,
    /// How many percent of this node's relay are free.
    relay_room: u8,
    /// Pairs that it refused to relay for, by reason.
    relay_refusals: [u64; RelayRefusal::ALL.len()],
    /// The keys of the tunnels.
    rotation: Rotation,
    authority: Option<Arc<LeaseTable>>,
    /// The next node key, until the leases carry it.
    endorsed: Option<NodeKey>,
    /// Host ends that the last pass found and no pod accounted for.
    strays: BTreeSet<String>,
    memory_due: Option<Instant>,
    /// A write of the memory that nothing may overtake, and whether it is a durable one.
    memory_first: Option<bool>,
    /// A pass that waits for the memory.
    job: Option<Box<Inputs>>,
    leaving: bool,
    /// To the cluster keys that are wanted, where something says which.
    way: Option<ring::Way>,
    /// When to give the site cluster keys of its own, after it left.
    part_at: Option<Instant>,
    /// Where the site that was asked to let this one in gossips.
    asked_at: Vec<SocketAddr>,
    /// When to draw seeds, and from what randomness.
    seeds_due: Instant,
    draws: ChaCha8Rng,
    /// Since when somebody of each site is heard.
    sites_heard: BTreeMap<SiteName, Instant>,
    /// Since when each peer of another site goes without a secret of the two sites.
    pairless: BTreeMap<NodeName, Instant>,
    outputs: VecDeque<Output>,
}

impl Control {
    /// Starts from what an earlier run remembered.
    pub fn new(start: Start, now: Instant) -> Self {
        let mut seeds = ChaCha8Rng::from_seed(start.seed);
        let mut mesh = mesh(&start, random(&mut seeds), now);
        if matches!(start.config.store.kind, StoreKind::Static(_)) {
            mesh.set_authority(Authority::Claims, now);
        }
        let leasing = leasing(&start, &mut seeds, now);
        let Start { config, memory, boot, tunnel, trust, .. } = start;
        let known_broken = memory.tx_checksum_off.as_ref() == Some(&boot);
        let probe = Probe::new(known_broken, seeds.next_u64(), now);
        let rotation = Rotation::new(tunnel, memory.detour, now);
        let draws = ChaCha8Rng::from_seed(random(&mut seeds));
        let limits = memory.peers.iter().filter_map(|(node, peer)| Some((node.clone(), peer.peer.path_mtu?)));
        let path_probes = PathProbes::new(limits.collect(), ChaCha8Rng::from_seed(random(&mut seeds)), now);
        let mut control = Self {
            config,
            mesh,
            leasing,
            store_error: None,
            memory,
            underlay: Err("not looked for yet".into()),
            pass: Pass::default(),
            problems: Problems::default(),
            probe,
            path_probes,
            started: now,
            boot,
            paths: Paths::default(),
            tunnels_due: rotation.has_keys().then_some(now),
            relay_room: 0,
            relay_refusals: Default::default(),
            rotation,
            authority: None,
            endorsed: None,
            strays: BTreeSet::new(),
            memory_due: None,
            memory_first: None,
            job: None,
            leaving: false,
            way: None,
            part_at: None,
            asked_at: Vec::new(),
            seeds_due: now,
            draws,
            sites_heard: BTreeMap::new(),
            pairless: BTreeMap::new(),
            outputs: VecDeque::new(),
        };
        control.take_lease_table(now);
        control.recall_mesh_keys(now);
        trust.into_iter().for_each(|trust| control.trust(trust, now));
        control.recall_pair_secrets(now);
        control.wake(now);
        control
    }

    /// Takes a gossip datagram, or the answer to a probe.
    pub fn handle_datagram(&mut self, from: SocketAddr, datagram: &[u8], now: Instant) {
        if probe::is_answer(datagram) {
            self.take_probe_answer(datagram, now);
        } else if let Err(reason) = self.mesh.handle_datagram(from, datagram, now) {
            debug!(%from, %reason, "gossip datagram dropped");
        }
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.mesh.handle_timeout(now);
        self.leasing.handle_timeout(now);
    }

    /// Takes whether the node has pods: one without may move to another subnet.
    pub fn handle_pods(&mut self, none: bool, now: Instant) {
        self.leasing.set_may_renumber(none, now);
        self.wake(now);
    }

    /// Takes how the last [`Output::Remember`] went.
    pub fn handle_remembered(&mut self, outcome: Result<(), String>, now: Instant) {
        self.problems.memory = outcome.err().inspect(|error| {
            warn!(err = error, "memory not written");
            self.memory_due = Some(now + RETRY);
        });
    }

    /// Signs with this key, which the present one endorses, as soon as every lease names it. It must be on the disk.
    pub fn use_key(&mut self, key: NodeKey, now: Instant) {
        self.leasing.rotate_key(key.public(), now);
        self.endorsed = Some(key);
        self.use_next_key(now);
    }

    /// Replaces the cluster keys. They must be on the disk.
    pub fn use_ring(&mut self, ring: KeyRing, now: Instant) {
        self.mesh.set_ring(ring, now);
        // Another site may be understood from now on.
        self.seeds_due = now;
        self.announce(now);
        self.wake(now);
    }

    /// Gives the leases back and tells the mesh; no pass follows.
    pub fn leave(&mut self, now: Instant) {
        self.leaving = true;
        self.leasing.release(now);
        self.mesh.leave(now);
    }

    /// Returns what to do next; call until it returns [`Output::Wait`].
    pub fn poll_output(&mut self, now: Instant) -> Output {
        loop {
            if let Some(durable) = self.memory_first.take() {
                if durable {
                    self.memory_due = None;
                }
                return Output::Remember { durable };
            }
            if let Some(output) = self.outputs.pop_front() {
                return output;
            }
            if let Some(inputs) = self.job.take() {
                return Output::Reconcile(inputs);
            }
            let lease_wake = match self.leasing.poll_output(now) {
                lease::Output::List => return Output::Store(StoreRequest::List),
                lease::Output::Put { key, expect, value } => {
                    return Output::Store(StoreRequest::Put { key, expect, value });
                }
                lease::Output::Delete { key, revision } => {
                    return Output::Store(StoreRequest::Delete { key, revision });
                }
                lease::Output::Event(event) => {
                    self.handle_lease_event(event, now);
                    continue;
                }
                lease::Output::Wait { until } => until,
            };
            if self.leasing.failures() == 0 && !self.leasing.write_refused() {
                self.store_error = None;
            }
            let mesh_wake = match self.mesh.poll_output(now) {
                weft_wire::mesh::Output::Send { to, datagram } => return Output::Send { to, datagram },
                weft_wire::mesh::Output::Event(event) => {
                    self.handle_mesh_event(event, now);
                    continue;
                }
                weft_wire::mesh::Output::Wait { until, .. } => until,
            };
            if self.part_if_due(now)
                || self.go_on_with_keys(now)
                || self.draw_seeds(now)
                || self.run_probe(now)
                || self.probe_paths(now)
                || self.look_at_tunnels(now)
                || self.start_pass(now)
                || self.remember_if_due(now)
            {
                continue;
            }
            let wakes = [
                Some(lease_wake),
                Some(mesh_wake),
                Some(self.seeds_due),
                self.ring_wake(),
                self.part_at,
                self.pass_wake(),
                self.memory_due,
                self.probe_wake(),
                Some(self.path_probes_wake()),
                self.tunnels_wake(),
            ];
            let until = wakes.into_iter().flatten().min().expect("the mesh always has a next time");
            return Output::Wait { until };
        }
    }

    fn handle_mesh_event(&mut self, event: MeshEvent, now: Instant) {
        match event {
            MeshEvent::RoutesChanged => self.wake(now),
            MeshEvent::StatementsChanged => self.remember_statements(now),
            MeshEvent::PairSecretsChanged => self.remember_pair_secrets(now),
            MeshEvent::MemberChanged { node, state } => {
                info!(peer = %node, %state, "peer changed");
                self.wake(now);
            }
            MeshEvent::Pong { token, rtt, .. } => self.outputs.push_back(Output::Pong { token, rtt }),
            MeshEvent::Conflict { subnet, kept, refused } => {
                let sentence = format!(
                    "{refused} and {kept} both claim addresses of {subnet}; {kept} keeps them here, give {refused} another subnet"
                );
                if self.problems.route_conflicts.insert(sentence.clone(), now).is_none() {
                    warn!(%subnet, %kept, %refused, "two nodes claim one subnet");
                }
            }
            MeshEvent::DuplicateName { from, key } => {
                let sentence =
                    duplicate_name(self.config.node.name.as_str(), &format!("gossips at {from}"), &key);
                if now.duration_since(self.started) < NEWCOMER && !self.established() {
                    return self.outputs.push_front(Output::Fatal(sentence));
                }
                warn!(%from, ?key, "another node has this node's name");
                self.problems.duplicate_name = Some((from, key, now));
            }
            MeshEvent::RingWanted { .. }
            | MeshEvent::JoinEnded(_)
            | MeshEvent::JoinRefused(_)
            | MeshEvent::ClocksApart { .. }
            | MeshEvent::SiteLeft { .. }
            | MeshEvent::TooMany(_)
            | MeshEvent::OtherName { .. }
            | MeshEvent::TwoSites { .. } => self.handle_site_event(event, now),
            MeshEvent::WrongKey { from } if self.is_of_site_that_is_out(from) => {
                debug!(%from, "gossip comes from a site that is out");
            }
            MeshEvent::PathWord { from, word } => self.handle_path_word(&from, word, now),
            MeshEvent::WrongKey { from } => {
                warn!(%from, "gossip comes that no key of the ring opens");
                self.problems.wrong_key = Some((from, now));
            }
        }
    }

    /// Whether the node has been announced with a lease of its own.
    fn established(&self) -> bool {
        self.mesh.record().is_some_and(|record| !record.facts.subnets.is_empty())
            && self.mesh.members().next().is_some()
    }

    fn use_next_key(&mut self, now: Instant) {
        let Some(key) = &self.endorsed else { return };
        let public = key.public();
        // No peer may see a record without a lease.
        if self.leasing.held().iter().all(|held| held.key == public)
            && let Some(key) = self.endorsed.take()
        {
            self.mesh.rotate_key(key, now);
            info!(key = public.short(), "node key rotated");
        }
    }

    fn touch_memory(&mut self, now: Instant) {
        self.memory_due.get_or_insert(now + REMEMBER);
    }

    /// Has the memory written before anything else comes out.
    fn remember_first(&mut self, durable: bool) {
        self.memory_first = Some(durable || self.memory_first == Some(true));
    }

    fn remember_if_due(&mut self, now: Instant) -> bool {
        let due = self.memory_due.is_some_and(|due| due <= now);
        if due {
            self.remember_first(true);
        }
        due
    }

    /// Returns whether the memory has something that was not written yet.
    pub fn unremembered(&self) -> bool {
        self.memory_due.is_some() || self.memory_first.is_some()
    }
}

fn random(seeds: &mut ChaCha8Rng) -> [u8; 32] {
    let mut bytes = [0; 32];
    seeds.fill_bytes(&mut bytes);
    bytes
}

fn mesh(start: &Start, seed: [u8; 32], now: Instant) -> Mesh {
    let Start { config, memory, .. } = start;
    let timing = Timing {
        probe_interval: config.gossip.probe_interval,
        probe_timeout: config.gossip.probe_interval / 2,
        ..Timing::default()
    };
    let mesh_config = MeshConfig {
        cluster: config.cluster.id.clone(),
        node: config.node.name.clone(),
        site: config.node.site.clone(),
        key: start.key.clone(),
        ring: start.ring.clone(),
        seeds: Vec::new(), // `draw_seeds` gives the first before anything is sent.
        incarnation: memory.incarnation,
        timing,
        verify: Arc::new(Each),
    };
    Mesh::new(mesh_config, seed, now)
}

/// The sentence about a second node of one name.
pub fn duplicate_name(name: &str, what: &str, key: &PublicKey) -> String {
    format!(
        "another node named {name} (key {}) {what}; give this node its own node.name, or stop the other",
        key.short()
    )
}
