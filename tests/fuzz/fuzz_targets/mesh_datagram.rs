//! A datagram that holders of the cluster key sealed, whatever is in it: it is taken or changes nothing.
#![no_main]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use weft_wire::mesh::{Authority, Facts, LeasedSubnet, Mesh, MeshConfig, NodeKey, Output, Owner, Timing};
use weft_wire::record::Each;
use weft_wire::seal::{ClusterKey, KeyRing, MAX_DATAGRAM};
use weft_wire::types::Epoch;

fn ring() -> KeyRing {
    KeyRing::new(vec![ClusterKey::from_bytes([1; 32])]).expect("one key is a ring")
}

fn mesh(node: u8, now: Instant) -> Mesh {
    let address: SocketAddr = SocketAddr::from(([192, 0, 2, node], 7117));
    let config = MeshConfig {
        cluster: "fuzz".into(),
        node: format!("n{node}").parse().expect("a name"),
        site: "s1".parse().expect("a name"),
        key: NodeKey::from_secret([node; 32]),
        ring: ring(),
        seeds: vec![SocketAddr::from(([192, 0, 2, 1], 7117))],
        incarnation: 1,
        timing: Timing::default(),
        verify: Arc::new(Each),
    };
    let mut mesh = Mesh::new(config, [node; 32], now);
    let subnet = |node: u8| format!("10.32.{node}.0/24").parse().expect("a subnet");
    let owner = |node: u8| Owner {
        node: format!("n{node}").parse().expect("a name"),
        key: NodeKey::from_secret([node; 32]).public(),
        epoch: Epoch(u64::from(node)),
    };
    let table = (1..4).map(|node| (subnet(node), owner(node))).collect();
    mesh.set_authority(Authority::Store(Arc::new(table)), now);
    let leased = LeasedSubnet { subnet: subnet(node), epoch: Epoch(u64::from(node)) };
    mesh.announce(Facts { subnets: vec![leased], gossip: vec![address], ..Facts::default() }, now);
    mesh
}

fn knowledge(mesh: &Mesh) -> String {
    let members: Vec<_> = mesh
        .members()
        .map(|member| format!("{} {} {:?} {:?}", member.node, member.state, member.record, member.verdict))
        .collect();
    format!("{members:?} {:?}", mesh.record())
}

/// Drains what the mesh asks for; returns what it sends.
fn drain(mesh: &mut Mesh, now: Instant) -> Vec<Vec<u8>> {
    let mut sent = Vec::new();
    loop {
        match mesh.poll_output(now) {
            Output::Send { datagram, .. } => {
                assert!(datagram.len() <= MAX_DATAGRAM);
                sent.push(datagram);
            }
            Output::Event(_) => {}
            Output::Wait { .. } => return sent,
        }
        assert!(sent.len() < 1000, "one call is answered with a bounded number of datagrams");
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut now = Instant::now();
    let (mut one, mut two) = (mesh(1, now), mesh(2, now));
    let places = [1, 2].map(|node: u8| SocketAddr::from(([192, 0, 2, node], 7117)));
    // They meet first, so that there are sessions and members to hit.
    for _ in 0..4 {
        two.handle_timeout(now);
        for datagram in drain(&mut two, now) {
            one.handle_datagram(places[1], &datagram, now).expect("a mesh takes what another sends");
        }
        for datagram in drain(&mut one, now) {
            two.handle_datagram(places[0], &datagram, now).expect("a mesh takes what another sends");
        }
        now += Duration::from_millis(100);
    }
    for part in bytes.split(|byte| *byte == 0xfe).take(4) {
        let sealed = ring().seal("fuzz", [9; 24], part);
        let before = knowledge(&one);
        if one.handle_datagram(places[1], &sealed, now).is_err() {
            assert_eq!(before, knowledge(&one), "what is refused changes nothing");
        }
        drain(&mut one, now);
        now += Duration::from_millis(700);
        one.handle_timeout(now);
        drain(&mut one, now);
    }
});
