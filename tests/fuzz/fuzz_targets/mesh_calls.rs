//! Three meshes, and any order of calls, losses, changes and replays between them: nothing panics, nothing grows
//! beyond its bound, and with peace they agree.
#![no_main]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use weft_wire::mesh::{
    Authority, Facts, LeasedSubnet, MemberState, Mesh, MeshConfig, NodeKey, Output, Owner, Timing,
};
use weft_wire::record::Each;
use weft_wire::seal::{ClusterKey, KeyRing, MAX_DATAGRAM};
use weft_wire::types::Epoch;

const NODES: u8 = 3;

fn place(node: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, node + 1], 7117))
}

fn ring(keys: &[u8]) -> KeyRing {
    KeyRing::new(keys.iter().map(|key| ClusterKey::from_bytes([*key; 32])).collect()).expect("there are keys")
}

fn name(node: u8) -> weft_wire::types::NodeName {
    format!("n{node}").parse().expect("a name")
}

fn facts(node: u8, mtu: u16) -> Facts {
    let subnet = format!("10.32.{node}.0/24").parse().expect("a subnet");
    let leased = LeasedSubnet { subnet, epoch: Epoch(u64::from(node) + 1) };
    Facts { subnets: vec![leased], gossip: vec![place(node)], mtu, ..Facts::default() }
}

fn table() -> Authority {
    let owner = |node: u8| Owner {
        node: name(node),
        key: NodeKey::from_secret([node + 1; 32]).public(),
        epoch: Epoch(u64::from(node) + 1),
    };
    let leases =
        (0..NODES).map(|node| (format!("10.32.{node}.0/24").parse().expect("a subnet"), owner(node)));
    Authority::Store(Arc::new(leases.collect()))
}

fn mesh(node: u8, incarnation: u64, now: Instant) -> Mesh {
    let config = MeshConfig {
        cluster: "fuzz".into(),
        node: name(node),
        site: "s1".parse().expect("a name"),
        key: NodeKey::from_secret([node + 1; 32]),
        ring: ring(&[1]),
        seeds: vec![place(0), place(1)],
        incarnation,
        timing: Timing::default(),
        verify: Arc::new(Each),
    };
    let mut mesh = Mesh::new(config, [node; 32], now);
    mesh.set_authority(table(), now);
    mesh.announce(facts(node, 1500), now);
    mesh
}

struct World {
    now: Instant,
    meshes: Vec<Mesh>,
    flying: Vec<(SocketAddr, usize, Vec<u8>)>,
    starts: [u64; NODES as usize],
}

impl World {
    fn drain(&mut self) {
        for (node, mesh) in self.meshes.iter_mut().enumerate() {
            loop {
                match mesh.poll_output(self.now) {
                    Output::Send { to, datagram } => {
                        assert!(datagram.len() <= MAX_DATAGRAM);
                        let to = (0..NODES).find(|other| place(*other) == to);
                        if let Some(to) = to
                            && self.flying.len() < 400
                        {
                            self.flying.push((place(node as u8), usize::from(to), datagram));
                        }
                    }
                    Output::Event(_) => {}
                    Output::Wait { .. } => break,
                }
            }
        }
    }

    fn deliver(&mut self, which: usize, keep: bool, flip: Option<usize>) {
        if self.flying.is_empty() {
            return;
        }
        let which = which % self.flying.len();
        let (from, to, mut datagram) =
            if keep { self.flying[which].clone() } else { self.flying.remove(which) };
        if let Some(bit) = flip {
            let bit = bit % (datagram.len() * 8);
            datagram[bit / 8] ^= 1 << (bit % 8);
        }
        let taken = self.meshes[to].handle_datagram(from, &datagram, self.now);
        assert!(flip.is_none() || taken.is_err(), "a changed datagram is refused");
        self.drain();
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        for mesh in &mut self.meshes {
            mesh.handle_timeout(self.now);
        }
        self.drain();
    }
}

fuzz_target!(|bytes: &[u8]| {
    let now = Instant::now();
    let meshes = (0..NODES).map(|node| mesh(node, 1, now)).collect();
    let mut world = World { now, meshes, flying: Vec::new(), starts: [1; NODES as usize] };
    world.drain();
    for pair in bytes.chunks_exact(2).take(300) {
        let (call, choice) = (pair[0], usize::from(pair[1]));
        let node = choice % usize::from(NODES);
        let now = world.now;
        match call % 16 {
            0..=4 => world.deliver(choice, false, None),
            5 => world.deliver(choice, true, None),
            6 => world.deliver(choice, true, Some(choice * 31)),
            7 => drop(world.flying.split_off(world.flying.len() - world.flying.len().min(choice))),
            8 | 9 => world.pass(Duration::from_millis(10 * choice as u64)),
            10 => world.meshes[node].announce(facts(node as u8, 1000 + choice as u16), now),
            11 => world.meshes[node].leave(now),
            12 => {
                world.starts[node] += 1;
                world.meshes[node] = mesh(node as u8, world.starts[node], now);
            }
            13 => world.meshes[node].forget(&name((choice / 3) as u8 % NODES)),
            14 => drop(world.meshes[node].ping(&name((choice / 3) as u8 % NODES), 1, now)),
            _ => world.pass(Duration::from_secs(choice as u64)),
        }
        world.drain();
    }
    // Peace: everyone announces and everything arrives. A minute is six rounds of anti-entropy.
    for node in 0..NODES {
        let now = world.now;
        world.meshes[usize::from(node)].announce(facts(node, 900), now);
    }
    world.drain();
    for _ in 0..600 {
        let count = world.flying.len();
        (0..count).for_each(|_| world.deliver(0, false, None));
        world.pass(Duration::from_millis(100));
    }
    for (node, mesh) in world.meshes.iter().enumerate() {
        let alive = mesh.members().filter(|member| {
            member.state == MemberState::Alive
                && member.verdict.is_accepted()
                && member.record.facts.mtu == 900
        });
        assert_eq!(alive.count(), usize::from(NODES) - 1, "n{node} does not know the others");
    }
});
