//! A network of meshes in virtual time: loss, duplication, reordering, partitions, crashes.
//!
//! Deterministic: the same `WEFT_SEED` gives the same run. Nothing here sleeps or reads a clock but for the
//! one `Instant` that all virtual time is counted from.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use weft_wire::mesh::*;
use weft_wire::seal::{ClusterKey, KeyRing, MAX_DATAGRAM};
use weft_wire::types::{Epoch, NodeName, Subnet};

pub const CLUSTER: &str = "sim";

pub fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

pub fn ring(keys: &[u8]) -> KeyRing {
    KeyRing::new(keys.iter().map(|byte| ClusterKey::from_bytes([*byte; 32])).collect()).unwrap()
}

pub fn name(node: usize) -> NodeName {
    format!("n{node}").parse().unwrap()
}

pub fn address(node: usize) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, (node >> 8) as u8, node as u8)), 7117)
}

pub fn subnet(number: usize) -> Subnet {
    format!("10.{}.{}.0/24", 32 + (number >> 8), number & 0xff).parse().unwrap()
}

pub fn key(node: usize, generation: u8) -> NodeKey {
    let mut secret = [generation; 32];
    secret[..8].copy_from_slice(&(node as u64).to_be_bytes());
    NodeKey::from_secret(secret)
}

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
    Authority::Store((0..nodes).map(|node| (subnet(node), owner(node))).collect())
}

pub fn config(node: usize, incarnation: u64) -> MeshConfig {
    MeshConfig {
        cluster: CLUSTER.into(),
        node: name(node),
        site: "s1".parse().unwrap(),
        key: key(node, 1),
        ring: ring(&[1]),
        seeds: vec![address(0), address(1)],
        incarnation,
        timing: Timing::default(),
    }
}

pub struct Host {
    pub mesh: Mesh,
    pub events: Vec<MeshEvent>,
    pub sent_bytes: u64,
    wake: Instant,
}

type Flight = (Instant, u64, SocketAddr, SocketAddr, Vec<u8>);

pub struct Net {
    pub now: Instant,
    pub rng: ChaCha8Rng,
    pub seed: u64,
    pub hosts: BTreeMap<SocketAddr, Host>,
    pub loss_percent: u64,
    pub duplicate_percent: u64,
    /// Latency is 1 ms plus up to this; more than the gap between two datagrams reorders them.
    pub jitter: Duration,
    /// Which side of the partition a host is on; hosts on different sides do not hear each other.
    pub sides: BTreeMap<SocketAddr, u8>,
    /// Every datagram delivered while this is some.
    pub recorded: Option<Vec<(SocketAddr, SocketAddr, Vec<u8>)>>,
    flights: BinaryHeap<Reverse<Flight>>,
    wakes: BinaryHeap<Reverse<(Instant, SocketAddr)>>,
    count: u64,
}

impl Net {
    pub fn new(test: &str) -> Self {
        let seed = std::env::var("WEFT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
            std::time::UNIX_EPOCH.elapsed().map_or(1, |age| age.as_nanos() as u64 % 1_000_000_000)
        });
        println!("{test}: WEFT_SEED={seed}");
        Self {
            now: Instant::now(),
            rng: ChaCha8Rng::seed_from_u64(seed),
            seed,
            hosts: BTreeMap::new(),
            loss_percent: 0,
            duplicate_percent: 0,
            jitter: Duration::from_millis(4),
            sides: BTreeMap::new(),
            recorded: None,
            flights: BinaryHeap::new(),
            wakes: BinaryHeap::new(),
            count: 0,
        }
    }

    /// A network of `nodes` that all announce, under a lease table that covers them.
    pub fn with_nodes(test: &str, nodes: usize) -> Self {
        let mut net = Self::new(test);
        for node in 0..nodes {
            net.start(config(node, 1), table(nodes));
            net.announce(node, facts(node));
        }
        net
    }

    pub fn start(&mut self, config: MeshConfig, authority: Authority) {
        let number: usize = config.node.as_str()[1..].parse().unwrap();
        self.start_at(address(number), config, authority);
    }

    pub fn start_at(&mut self, at: SocketAddr, config: MeshConfig, authority: Authority) {
        let mut seed = [0; 32];
        self.rng.fill_bytes(&mut seed);
        let mut mesh = Mesh::new(config, seed, self.now);
        mesh.set_authority(authority, self.now);
        self.hosts.insert(at, Host { mesh, events: Vec::new(), sent_bytes: 0, wake: self.now });
        self.drain(at);
    }

    pub fn announce(&mut self, node: usize, facts: Facts) {
        self.with(node, |mesh, now| mesh.announce(facts, now));
    }

    pub fn crash(&mut self, node: usize) {
        self.hosts.remove(&address(node));
    }

    pub fn with<T>(&mut self, node: usize, call: impl FnOnce(&mut Mesh, Instant) -> T) -> T {
        let now = self.now;
        let result = call(&mut self.hosts.get_mut(&address(node)).unwrap().mesh, now);
        self.drain(address(node));
        result
    }

    pub fn mesh(&self, node: usize) -> &Mesh {
        &self.hosts[&address(node)].mesh
    }

    pub fn events(&self, node: usize) -> &[MeshEvent] {
        &self.hosts[&address(node)].events
    }

    /// Hands a datagram to a host at once.
    pub fn inject(&mut self, from: SocketAddr, node: usize, datagram: &[u8]) -> Result<(), Rejected> {
        self.with(node, |mesh, now| mesh.handle_datagram(from, datagram, now))
    }

    pub fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.step(end) {}
        self.now = end;
    }

    /// Runs until `done`, at most `limit` of virtual time.
    pub fn run_until(
        &mut self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut(&Self) -> bool,
    ) -> Duration {
        let start = self.now;
        while !done(self) {
            let next = self.now + Duration::from_millis(100);
            assert!(next <= start + limit, "{what}: not within {limit:?}; WEFT_SEED={}", self.seed);
            self.run(Duration::from_millis(100));
        }
        self.now - start
    }

    fn step(&mut self, end: Instant) -> bool {
        let flight = self.flights.peek().map(|Reverse(flight)| flight.0);
        let wake = self.wakes.peek().map(|Reverse(wake)| wake.0);
        let Some(at) = flight.into_iter().chain(wake).min().filter(|at| *at <= end) else { return false };
        self.now = self.now.max(at);
        if flight == Some(at) {
            let Some(Reverse((_, _, from, to, datagram))) = self.flights.pop() else { return false };
            if self.sides.get(&from) == self.sides.get(&to)
                && let Some(host) = self.hosts.get_mut(&to)
            {
                if let Some(recorded) = &mut self.recorded {
                    recorded.push((from, to, datagram.clone()));
                }
                let _ = host.mesh.handle_datagram(from, &datagram, self.now);
                self.drain(to);
            }
        } else if let Some(Reverse((at, host))) = self.wakes.pop()
            && self.hosts.get(&host).is_some_and(|host| host.wake == at)
        {
            self.hosts.get_mut(&host).unwrap().mesh.handle_timeout(self.now);
            self.drain(host);
        }
        true
    }

    fn drain(&mut self, at: SocketAddr) {
        loop {
            let now = self.now;
            let host = self.hosts.get_mut(&at).unwrap();
            match host.mesh.poll_output(now) {
                Output::Send { to, datagram } => {
                    assert!(datagram.len() <= MAX_DATAGRAM, "{} bytes", datagram.len());
                    host.sent_bytes += datagram.len() as u64;
                    self.transmit(at, to, datagram);
                }
                Output::Event(event) => host.events.push(event),
                Output::Wait { until, .. } => {
                    host.wake = until;
                    self.wakes.push(Reverse((until, at)));
                    return;
                }
            }
        }
    }

    fn transmit(&mut self, from: SocketAddr, to: SocketAddr, datagram: Vec<u8>) {
        let copies = 1 + u64::from(self.rng.next_u64() % 100 < self.duplicate_percent);
        for _ in 0..copies {
            if self.rng.next_u64() % 100 < self.loss_percent {
                continue;
            }
            let jitter = self.rng.next_u64() % (self.jitter.as_micros() as u64 + 1);
            let at = self.now + Duration::from_micros(1000 + jitter);
            self.count += 1;
            self.flights.push(Reverse((at, self.count, from, to, datagram.clone())));
        }
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

    pub fn state(&self, node: usize, of: usize) -> Option<MemberState> {
        let of = name(of);
        self.mesh(node).members().find(|member| *member.node == of).map(|member| member.state)
    }

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
