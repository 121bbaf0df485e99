//! What a mesh of a certain size costs and how fast it learns, in virtual time: the same for ten nodes and thousands.
//!
//! Times are virtual, so they depend on the seed and on nothing else. Memory is not measured here.

pub mod sites;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand_core::RngCore;
use weft_daemon::kernel::memory::MemoryKernel;
use weft_daemon::plan::model::{Dataplane, Encryption, Inputs, Peer, Underlay};
use weft_daemon::reconcile::reconcile;
use weft_wire::mesh::{Authority, Carrier, MemberState, MemberView, MeshConfig};
use weft_wire::types::MacAddress;

use super::meshes::{Meshes, address, config, facts, name, seconds, subnet, table};
use super::net::Sent;
use super::records::SharedRecords;

/// How often the nodes are looked at: the error of every time.
const LOOK: Duration = Duration::from_millis(50);
/// How long a mesh rests before and after an event, and how long it is watched at rest.
const REST: Duration = Duration::from_secs(30);
/// How long a mesh is cut in two.
const PARTED: Duration = Duration::from_secs(60);

/// What an event cost.
#[derive(Debug, Clone, Default)]
pub struct Event {
    /// For each node and trial, the time until it was right, in seconds.
    pub times: Vec<f64>,
    /// Bytes that a node sent for it beyond what it sends at rest, until the mesh rests again.
    pub bytes: f64,
    /// Datagrams likewise.
    pub datagrams: f64,
    trials: usize,
    /// How long all trials were watched, in seconds.
    watched: f64,
}

/// What a mesh of one size costs and how fast it learns.
#[derive(Debug, Clone, Default)]
pub struct Size {
    /// How many nodes.
    pub nodes: usize,
    /// All start at once: until every node knows every other.
    pub start: Event,
    /// One more node: until everyone knows it, and it knows everyone.
    pub join: Event,
    /// A node says goodbye: until nobody routes to it.
    pub leave: Event,
    /// A node dies: until everyone knows.
    pub crash: Event,
    /// Two halves meet again after a minute: until everyone knows that all live.
    pub heal: Event,
    /// Bytes a second that a node sends at rest.
    pub rest_bytes: f64,
    /// Datagrams a second that a node sends at rest.
    pub rest_datagrams: f64,
}

/// A mesh that is measured.
#[derive(Debug)]
pub struct Measured {
    /// The meshes.
    pub meshes: Meshes,
    /// The nodes that run.
    pub running: BTreeSet<usize>,
    records: Arc<SharedRecords>,
    table: Authority,
    nodes: usize,
}

impl Measured {
    /// Starts all nodes at once but for the last, and waits until they know each other and rest.
    pub fn start(nodes: usize, test: &str) -> (Self, Event) {
        let mut meshes = Meshes::new(test);
        meshes.keep_events = false;
        let records = Arc::new(SharedRecords::default());
        // One number more, for who comes later.
        let table = table(nodes + 1);
        let mut measured = Self { meshes, running: BTreeSet::new(), records, table, nodes };
        let began = measured.meshes.net.now;
        (0..nodes - 1).for_each(|node| measured.add(node, 1));
        let event = measured.watch(began, seconds(300), |measured, node| measured.knows_everyone(node));
        (measured, event)
    }

    /// Starts a node that shares verified records with the others.
    pub fn add(&mut self, node: usize, incarnation: u64) {
        let shared: Arc<SharedRecords> = Arc::clone(&self.records);
        self.add_with(MeshConfig { verify: shared, ..config(node, incarnation) }, self.table.clone(), node);
    }

    /// Starts a node with its own configuration and view of the leases.
    pub fn add_with(&mut self, config: MeshConfig, table: Authority, node: usize) {
        self.meshes.start(config, table);
        self.meshes.announce(node, facts(node));
        self.running.insert(node);
    }

    /// Measures what a node sends at rest, a second: bytes and datagrams.
    pub fn rest(&mut self) -> (f64, f64) {
        let before = self.meshes.net.sent_by_all();
        self.meshes.run(REST);
        let sent = self.since(before);
        (sent.0 / REST.as_secs_f64(), sent.1 / REST.as_secs_f64())
    }

    /// What a node has sent since then: bytes and datagrams.
    fn since(&self, before: Sent) -> (f64, f64) {
        let sent = self.meshes.net.sent_by_all();
        let nodes = self.running.len() as f64;
        let more = |now: u64, then: u64| now.saturating_sub(then) as f64 / nodes;
        (more(sent.bytes, before.bytes), more(sent.datagrams, before.datagrams))
    }

    fn thinks(&self, node: usize, of: usize, right: impl Fn(Option<MemberView<'_>>) -> bool) -> bool {
        right(self.meshes.mesh(node).member(&name(of)))
    }

    fn knows_everyone(&self, node: usize) -> bool {
        let mesh = self.meshes.mesh(node);
        // All are looked at only when their number is right, and no more once one is wrong: five thousand times five thousand are many.
        let mut living =
            mesh.members().filter(|member| matches!(member.state, MemberState::Alive | MemberState::Suspect));
        mesh.living() == self.running.len() - 1
            && living.all(|member| member.state == MemberState::Alive && member.verdict.is_accepted())
    }

    /// Runs until every running node is right, and then until the mesh rests; what that costs is counted.
    fn watch(&mut self, began: Instant, limit: Duration, right: impl Fn(&Self, usize) -> bool) -> Event {
        let before = self.meshes.net.sent_by_all();
        let mut wrong: Vec<usize> = self.running.iter().copied().collect();
        let mut times = Vec::new();
        while !wrong.is_empty() {
            let elapsed = self.meshes.net.now - began;
            assert!(elapsed <= limit, "{} nodes of {} not right after {limit:?}", wrong.len(), self.nodes);
            self.meshes.run(LOOK);
            let time = (self.meshes.net.now - began).as_secs_f64();
            wrong.retain(|node| {
                let is_right = right(self, *node);
                if is_right {
                    times.push(time);
                }
                !is_right
            });
        }
        self.meshes.run(REST);
        let (bytes, datagrams) = self.since(before);
        Event { times, bytes, datagrams, trials: 1, watched: (self.meshes.net.now - began).as_secs_f64() }
    }

    fn pick(&mut self) -> usize {
        // The seeds stay: who joins looks for them.
        let choice = 2 + self.meshes.net.rng.next_u64() as usize % (self.running.len() - 2);
        *self.running.iter().nth(choice).expect("the choice is below the number of nodes")
    }

    /// One more node.
    pub fn join(&mut self, node: usize, incarnation: u64) -> Event {
        let began = self.meshes.net.now;
        self.add(node, incarnation);
        let alive = |member: Option<MemberView<'_>>| {
            member.is_some_and(|member| member.state == MemberState::Alive && member.verdict.is_accepted())
        };
        self.watch(began, seconds(120), |measured, of| {
            if of == node { measured.knows_everyone(of) } else { measured.thinks(of, node, alive) }
        })
    }

    /// A node says goodbye; returns which.
    pub fn leave(&mut self) -> (usize, Event) {
        let node = self.pick();
        (node, self.leave_of(node))
    }

    fn leave_of(&mut self, node: usize) -> Event {
        let began = self.meshes.net.now;
        self.meshes.with(node, |mesh, now| mesh.leave(now));
        self.running.remove(&node);
        let gone = |member: Option<MemberView<'_>>| member.is_none_or(|member| member.routed.is_none());
        let event = self.watch(began, seconds(120), |measured, of| measured.thinks(of, node, gone));
        self.meshes.crash(node);
        event
    }

    /// A node dies; returns which.
    pub fn crash(&mut self) -> (usize, Event) {
        let node = self.pick();
        let began = self.meshes.net.now;
        self.meshes.crash(node);
        self.running.remove(&node);
        let dead =
            |member: Option<MemberView<'_>>| member.is_none_or(|member| member.state == MemberState::Dead);
        let event = self.watch(began, seconds(180), |measured, of| measured.thinks(of, node, dead));
        (node, event)
    }

    /// Cuts the mesh in two for a minute, and watches it heal.
    pub fn part_and_heal(&mut self) -> Event {
        for node in self.running.clone() {
            self.meshes.net.sides.insert(address(node), (node % 2) as u8);
        }
        self.meshes.run(PARTED);
        self.meshes.net.sides.clear();
        let began = self.meshes.net.now;
        self.watch(began, seconds(300), |measured, node| measured.knows_everyone(node))
    }

    /// Lets the mesh come to rest.
    pub fn settle(&mut self) {
        self.meshes.run(REST);
    }

    /// Measures everything, each event so many times.
    pub fn measure(nodes: usize, trials: usize, test: &str) -> (Self, Size) {
        let (mut mesh, start) = Self::start(nodes, test);
        eprintln!("{test}: all know each other");
        let mut size = Size { nodes, start, ..Size::default() };
        let mut incarnation = 1;
        for trial in 0..trials {
            size.join.add(mesh.join(nodes - 1, incarnation));
            if trial == 0 {
                (size.rest_bytes, size.rest_datagrams) = mesh.rest();
            }
            for crash in [false, true] {
                let (node, event) = if crash { mesh.crash() } else { mesh.leave() };
                let sum = if crash { &mut size.crash } else { &mut size.leave };
                sum.add(event);
                incarnation += 1;
                size.join.add(mesh.join(node, incarnation));
            }
            eprintln!("{test}: trial {} of {trials} comes to the partition", trial + 1);
            size.heal.add(mesh.part_and_heal());
            if trial + 1 < trials {
                mesh.meshes.crash(nodes - 1);
                mesh.running.remove(&(nodes - 1));
                incarnation += 1;
                mesh.settle();
            }
        }
        let rest = (size.rest_bytes, size.rest_datagrams);
        for event in [&mut size.start, &mut size.join, &mut size.leave, &mut size.crash, &mut size.heal] {
            event.average(rest);
        }
        (mesh, size)
    }
}

impl Event {
    fn add(&mut self, other: Event) {
        self.times.extend(other.times);
        self.bytes += other.bytes;
        self.datagrams += other.datagrams;
        self.trials += other.trials;
        self.watched += other.watched;
    }

    /// Turns sums over trials into averages, without what nodes send at rest.
    fn average(&mut self, rest: (f64, f64)) {
        let trials = self.trials.max(1) as f64;
        let beyond = |sent: f64, rest: f64| (sent - rest * self.watched).max(0.0) / trials;
        (self.bytes, self.datagrams) = (beyond(self.bytes, rest.0), beyond(self.datagrams, rest.1));
    }
}

/// What one pass of the reconciler does.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// Changes to the kernel.
    pub changes: usize,
    /// How long the plan and the comparison took, with a kernel in memory.
    pub time: Duration,
}

/// What a node's reconciler does: at a start with all peers, when nothing changed, and when one peer came.
pub fn reconciler_work(nodes: usize) -> [Work; 3] {
    let peer = |node: usize| {
        let facts = facts(node);
        Peer {
            node: name(node),
            subnets: vec![subnet(node)],
            underlay: facts.underlay,
            vtep_v4: Some(MacAddress::derived(&name(node), "v4")),
            vtep_v6: None,
            vni: facts.vni,
            vxlan_port: facts.vxlan_port,
            mtu: u32::from(facts.mtu),
            site: "default".parse().expect("a valid name"),
            encryption: Encryption::Never,
            tunnel: None,
            gateway: None,
            via: None,
            path_mtu: None,
        }
    };
    let net = ipnet::IpNet::new(address(0).ip(), 16).expect("16 is a prefix length");
    let underlay = Underlay {
        device: "eth0".into(),
        index: 2,
        mtu: 1500,
        addresses: vec![net],
        strict_sources: false,
        tunnel: None,
    };
    let mut inputs = Inputs {
        node: name(0),
        site: "default".parse().expect("a valid name"),
        dataplane: Dataplane {
            vni: 1,
            vxlan_port: 8472,
            direct_routing: false,
            masquerade: true,
            cluster_cidrs: vec!["10.32.0.0/11".parse().expect("a prefix")],
            non_masquerade: Vec::new(),
            mtu: None,
            tx_checksum: true,
            hairpin: false,
            encryption: Encryption::Never,
            preshared: None,
            pairs: Default::default(),
            tunnel: None,
            carrier: Carrier::UserSpace,
            detour: None,
        },
        underlay: underlay.clone(),
        subnets: vec![subnet(0)],
        peers: (1..nodes).map(peer).collect(),
        attachments: Vec::new(),
        ways: BTreeMap::new(),
        anew: BTreeSet::new(),
        strays: BTreeSet::new(),
        sessions: BTreeSet::new(),
    };
    let mut kernel = MemoryKernel::new(Ok(underlay));
    let mut pass = |inputs: &Inputs| {
        let began = Instant::now();
        let report = reconcile(&mut kernel, inputs);
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        Work { changes: report.applied, time: began.elapsed() }
    };
    let (all, none) = (pass(&inputs), pass(&inputs));
    inputs.peers.push(peer(nodes));
    [all, none, pass(&inputs)]
}
