//! Meshes alone in a network in virtual time: each with its record, under one lease table.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand_core::RngCore;
use weft_wire::mesh::*;
use weft_wire::record::Each;
use weft_wire::seal::{ClusterKey, KeyRing};
use weft_wire::types::{Epoch, NodeName, Subnet};

use super::net::{Host, Net, Output};
use super::seed;

/// The cluster's id.
pub const CLUSTER: &str = "sim";

/// So many seconds.
pub fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// A ring of cluster keys, each of one byte repeated.
pub fn ring(keys: &[u8]) -> KeyRing {
    KeyRing::new(keys.iter().map(|byte| ClusterKey::from_bytes([*byte; 32])).collect())
        .expect("a valid value")
}

/// The name of a node.
pub fn name(node: usize) -> NodeName {
    format!("n{node}").parse().expect("a valid value")
}

/// Where a node gossips.
pub fn address(node: usize) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, (node >> 8) as u8, node as u8)), 7117)
}

/// The subnet of a node.
pub fn subnet(number: usize) -> Subnet {
    format!("10.{}.{}.0/24", 32 + (number >> 8), number & 0xff).parse().expect("a valid value")
}

/// A node's key of a generation.
pub fn key(node: usize, generation: u8) -> NodeKey {
    let mut secret = [generation; 32];
    secret[..8].copy_from_slice(&(node as u64).to_be_bytes());
    NodeKey::from_secret(secret)
}

/// What a node announces.
pub fn facts(node: usize) -> Facts {
    Facts {
        subnets: vec![LeasedSubnet { subnet: subnet(node), epoch: Epoch(node as u64 + 1) }],
        gossip: vec![address(node)],
        underlay: vec![address(node).ip()],
        vni: 1,
        vxlan_port: 8472,
        mtu: 1500,
        capabilities: Capabilities::VXLAN,
        ..Facts::default()
    }
}

/// The lease table of nodes `0..nodes`, each with its subnet and first key.
pub fn table(nodes: usize) -> Authority {
    let owner = |node| Owner { node: name(node), key: key(node, 1).public(), epoch: Epoch(node as u64 + 1) };
    Authority::Store(Arc::new((0..nodes).map(|node| (subnet(node), owner(node))).collect()))
}

/// The configuration of a node; the first two nodes are everyone's seeds.
pub fn config(node: usize, incarnation: u64) -> MeshConfig {
    MeshConfig {
        cluster: CLUSTER.into(),
        node: name(node),
        site: "s1".parse().expect("a valid value"),
        key: key(node, 1),
        ring: ring(&[1]),
        seeds: vec![address(0), address(1)],
        incarnation,
        timing: Timing::default(),
        verify: Arc::new(Each),
    }
}

/// A mesh at an address, with what it told.
#[derive(Debug)]
pub struct MeshHost {
    /// The mesh.
    pub mesh: Mesh,
    /// What it told since it was started.
    pub events: Vec<MeshEvent>,
    keeps_events: bool,
}

impl Host for MeshHost {
    fn handle_datagram(&mut self, from: SocketAddr, datagram: &[u8], now: Instant) {
        // What is refused is counted by the mesh.
        let _ = self.mesh.handle_datagram(from, datagram, now);
    }

    fn handle_timeout(&mut self, now: Instant) {
        self.mesh.handle_timeout(now);
    }

    fn poll(&mut self, now: Instant) -> Output {
        loop {
            match self.mesh.poll_output(now) {
                weft_wire::mesh::Output::Send { to, datagram } => return Output::Send { to, datagram },
                weft_wire::mesh::Output::Event(event) if self.keeps_events => self.events.push(event),
                weft_wire::mesh::Output::Event(_) => {}
                weft_wire::mesh::Output::Wait { until, .. } => return Output::Wait { until },
            }
        }
    }
}

/// Meshes in a network. Nodes are named by number.
#[derive(Debug)]
pub struct Meshes {
    /// The network.
    pub net: Net<MeshHost>,
    /// What the run comes from.
    pub seed: u64,
    /// Whether the meshes that are started from now on keep their events; thousands had better not.
    pub keep_events: bool,
}

impl Meshes {
    /// A network without meshes, from the seed of the environment.
    pub fn new(test: &str) -> Self {
        Self::from_seed(seed::of(test))
    }

    /// A network without meshes, from this seed.
    pub fn from_seed(seed: u64) -> Self {
        Self { net: Net::new(seed), seed, keep_events: true }
    }

    /// A network of `nodes` that all announce, under a lease table that covers them.
    pub fn with_nodes(test: &str, nodes: usize) -> Self {
        let mut meshes = Self::new(test);
        let table = table(nodes);
        for node in 0..nodes {
            meshes.start(config(node, 1), table.clone());
            meshes.announce(node, facts(node));
        }
        meshes
    }

    /// Starts a mesh at the address of the number in its name.
    pub fn start(&mut self, config: MeshConfig, authority: Authority) {
        let number: usize = config.node.as_str()[1..].parse().expect("a node is named by its number");
        self.start_at(address(number), config, authority);
    }

    /// Starts a mesh at an address.
    pub fn start_at(&mut self, at: SocketAddr, config: MeshConfig, authority: Authority) {
        let mut seed = [0; 32];
        self.net.rng.fill_bytes(&mut seed);
        let mut mesh = Mesh::new(config, seed, self.net.now);
        mesh.set_authority(authority, self.net.now);
        self.net.insert(at, MeshHost { mesh, events: Vec::new(), keeps_events: self.keep_events });
    }

    /// Has a node announce.
    pub fn announce(&mut self, node: usize, facts: Facts) {
        self.with(node, |mesh, now| mesh.announce(facts, now));
    }

    /// Stops a node without a word.
    pub fn crash(&mut self, node: usize) {
        self.net.remove(address(node));
    }

    /// Returns whether a node runs.
    pub fn runs(&self, node: usize) -> bool {
        self.net.host(address(node)).is_some()
    }

    /// Does something to a mesh, and what it asks for after it.
    pub fn with<T>(&mut self, node: usize, call: impl FnOnce(&mut Mesh, Instant) -> T) -> T {
        self.with_at(address(node), call)
    }

    /// Does something to the mesh at an address.
    pub fn with_at<T>(&mut self, at: SocketAddr, call: impl FnOnce(&mut Mesh, Instant) -> T) -> T {
        self.net.with(at, |host, now| call(&mut host.mesh, now))
    }

    fn host(&self, node: usize) -> &MeshHost {
        self.net.host(address(node)).expect("the node runs")
    }

    /// Returns the mesh of a node.
    pub fn mesh(&self, node: usize) -> &Mesh {
        &self.host(node).mesh
    }

    /// Returns what a node told.
    pub fn events(&self, node: usize) -> &[MeshEvent] {
        &self.host(node).events
    }

    /// Hands a datagram to a node at once.
    pub fn inject(&mut self, from: SocketAddr, node: usize, datagram: &[u8]) -> Result<(), Rejected> {
        self.with(node, |mesh, now| mesh.handle_datagram(from, datagram, now))
    }

    /// Lets time pass.
    pub fn run(&mut self, time: Duration) {
        self.net.run(time);
    }

    /// Runs until `done`, at most `limit` of virtual time; returns how long it took.
    ///
    /// # Panics
    /// When the limit passes first.
    pub fn run_until(
        &mut self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut(&Self) -> bool,
    ) -> Duration {
        let start = self.net.now;
        while !done(self) {
            let next = self.net.now + Duration::from_millis(100);
            assert!(next <= start + limit, "{what}: not within {limit:?}; WEFT_SEED={}", self.seed);
            self.run(Duration::from_millis(100));
        }
        self.net.now - start
    }

    /// Whether every host sees exactly the hosts `nodes`, alive, each with its record accepted.
    pub fn converged(&self, nodes: &[usize]) -> bool {
        nodes.iter().all(|node| self.sees(*node, nodes))
    }

    /// Whether `node` sees all of `nodes` alive and accepted, and nobody else alive.
    pub fn sees(&self, node: usize, nodes: &[usize]) -> bool {
        let mut expected: Vec<NodeName> =
            nodes.iter().filter(|other| **other != node).map(|other| name(*other)).collect();
        let mut seen: Vec<NodeName> = self
            .mesh(node)
            .members()
            .filter(|member| member.state == MemberState::Alive && member.verdict.is_accepted())
            .map(|member| member.node.clone())
            .collect();
        expected.sort();
        seen.sort();
        seen == expected
    }

    /// What a node thinks another is.
    pub fn state(&self, node: usize, of: usize) -> Option<MemberState> {
        let of = name(of);
        self.mesh(node).members().find(|member| *member.node == of).map(|member| member.state)
    }

    /// What a node thinks of another's record.
    pub fn verdict(&self, node: usize, of: usize) -> Option<Verdict> {
        let of = name(of);
        self.mesh(node).members().find(|member| *member.node == of).map(|member| member.verdict.clone())
    }
}

/// What a node knows, without what every datagram touches.
pub fn knowledge(mesh: &Mesh) -> Vec<String> {
    mesh.members()
        .map(|member| {
            format!(
                "{} {} {:?} {:?} {:?}",
                member.node, member.state, member.record, member.routed, member.verdict
            )
        })
        .collect()
}
