//! Two sites, of which one has an invitation of the other: any order of questions and answers, lost, repeated, and changed by who
//! has the token. What is refused changes nothing, no answer is longer than its question, and every joining ends.
#![no_main]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use prost::Message;
use weft_wire::mesh::{
    Authority, Facts, LeasedSubnet, Mesh, MeshConfig, MeshEvent, NodeKey, Output, Owner, Terms, Timing, Trust,
};
use weft_wire::record::Each;
use weft_wire::seal::{ClusterKey, KeyRing, MAX_DATAGRAM};
use weft_wire::site::SiteKey;
use weft_wire::types::Epoch;

const CLUSTER: &str = "fuzz";
const INVITER: usize = 0;
const JOINER: usize = 1;

/// As in `wire/proto/mesh.proto`.
#[derive(Clone, PartialEq, prost::Message)]
struct Joining {
    #[prost(uint32, tag = "1")]
    step: u32,
    #[prost(fixed64, tag = "2")]
    attempt: u64,
    #[prost(bool, tag = "3")]
    answers: bool,
    #[prost(bytes = "vec", optional, tag = "4")]
    statement: Option<Vec<u8>>,
    #[prost(bytes = "vec", tag = "5")]
    proof: Vec<u8>,
    #[prost(string, tag = "6")]
    refusal: String,
    #[prost(uint64, tag = "7")]
    clock: u64,
    #[prost(bytes = "vec", tag = "8")]
    padding: Vec<u8>,
    #[prost(uint64, tag = "9")]
    version: u64,
}

fn place(site: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, site as u8 + 1], 7117))
}

fn ring(key: u8) -> KeyRing {
    KeyRing::new(vec![ClusterKey::from_bytes([key; 32])]).expect("one key is a ring")
}

/// The only node of a site, which speaks for it.
fn mesh(site: usize, now: Instant) -> Mesh {
    let number = site as u8 + 1;
    let ring = ring(number);
    let node = format!("n{number}").parse().expect("a name");
    let key = NodeKey::from_secret([number; 32]);
    let subnet = format!("10.{number}.0.0/24").parse().expect("a subnet");
    let epoch = Epoch(u64::from(number));
    let owner = Owner { node, key: key.public(), epoch };
    let config = MeshConfig {
        cluster: CLUSTER.into(),
        node: owner.node.clone(),
        site: format!("s{number}").parse().expect("a name"),
        key,
        ring: ring.clone(),
        seeds: Vec::new(),
        incarnation: 1,
        timing: Timing::default(),
        verify: Arc::new(Each),
    };
    let mut mesh = Mesh::new(config, [number; 32], now);
    mesh.set_authority(Authority::Store(Arc::new([(subnet, owner)].into_iter().collect())), now);
    let signer = SiteKey::from_secret([number + 100; 32]);
    let prefixes = vec![format!("10.{number}.0.0/16").parse().expect("a subnet")];
    let trust = Trust { site: signer.public(), prefixes, signer: Some(signer) };
    mesh.set_trust(trust, Vec::new(), now).expect("it speaks for its site");
    let subnets = vec![LeasedSubnet { subnet, epoch }];
    let keys = ring.ids().collect();
    mesh.announce(Facts { subnets, keys, gossip: vec![place(site)], ..Facts::default() }, now);
    mesh
}

struct World {
    now: Instant,
    meshes: [Mesh; 2],
    /// To which of the two, and what.
    flying: Vec<(usize, Vec<u8>)>,
    /// What the tokens that were made seal with.
    rings: Vec<KeyRing>,
    begun: usize,
    ended: usize,
    sealed: u8,
}

impl World {
    fn new() -> Self {
        let now = Instant::now();
        let meshes = [mesh(INVITER, now), mesh(JOINER, now)];
        Self { now, meshes, flying: Vec::new(), rings: Vec::new(), begun: 0, ended: 0, sealed: 0 }
    }

    /// Takes what both ask for; returns the bytes that the inviter sent.
    fn drain(&mut self) -> usize {
        let mut said = 0;
        for (site, mesh) in self.meshes.iter_mut().enumerate() {
            loop {
                match mesh.poll_output(self.now) {
                    Output::Send { to, datagram } => {
                        assert!(datagram.len() <= MAX_DATAGRAM);
                        said += if site == INVITER { datagram.len() } else { 0 };
                        if to == place(1 - site) && self.flying.len() < 100 {
                            self.flying.push((1 - site, datagram));
                        }
                    }
                    Output::Event(MeshEvent::JoinEnded(_)) => self.ended += 1,
                    Output::Event(MeshEvent::RingWanted { ring, .. }) => mesh.set_ring(ring, self.now),
                    Output::Event(_) => {}
                    Output::Wait { .. } => break,
                }
            }
        }
        said
    }

    fn deliver(&mut self, to: usize, datagram: &[u8]) -> bool {
        let knowledge = |mesh: &Mesh| {
            let (statements, sites): (Vec<_>, Vec<_>) = (mesh.statements().collect(), mesh.sites().collect());
            format!("{statements:?} {sites:?} {:?}", mesh.wanted_ring())
        };
        let before = knowledge(&self.meshes[to]);
        let taken = self.meshes[to].handle_datagram(place(1 - to), datagram, self.now).is_ok();
        assert!(taken || before == knowledge(&self.meshes[to]), "what is refused changes nothing");
        let of_a_token = self.rings.iter().any(|ring| ring.open(CLUSTER, datagram).is_ok());
        let said = self.drain();
        assert!(!(of_a_token && to == INVITER) || said <= datagram.len(), "{said} bytes in answer");
        taken
    }

    fn deliver_one(&mut self, which: usize, keep: bool) {
        if self.flying.is_empty() {
            return;
        }
        let which = which % self.flying.len();
        let (to, datagram) = if keep { self.flying[which].clone() } else { self.flying.remove(which) };
        self.deliver(to, &datagram);
    }

    /// Delivers what is under way with something in it changed, by who has the token.
    fn deliver_changed(&mut self, which: usize, field: u8, value: u8) {
        if self.flying.is_empty() {
            return;
        }
        let (to, datagram) = self.flying[which % self.flying.len()].clone();
        let opened = self.rings.iter().find_map(|ring| Some((ring, ring.open(CLUSTER, &datagram).ok()?)));
        let Some((ring, content)) = opened else { return };
        let mut message = Joining::decode(&content[..]).expect("it is as documented");
        let flip = |bytes: &mut Vec<u8>| {
            let length = bytes.len().max(1);
            bytes.resize(length, 0);
            bytes[usize::from(value) * 3 % length] ^= 1 << (value % 8);
        };
        match field % 9 {
            0 => message.step = u32::from(value % 5),
            1 => message.attempt ^= u64::from(value),
            2 => message.answers = !message.answers,
            3 => message.statement.iter_mut().for_each(flip),
            4 => flip(&mut message.proof),
            5 => message.refusal = "\u{7}no ".repeat(usize::from(value)),
            6 => message.clock = u64::from(value) << (value % 57),
            7 => message.version = 1 << (value % 64),
            _ => message.statement = None,
        }
        // A question has its length whatever is in it.
        let spare = message.encoded_len().saturating_sub(content.len());
        message.padding.truncate(message.padding.len().saturating_sub(spare));
        let short = content.len().saturating_sub(message.encoded_len());
        message.padding.extend(vec![0; if message.padding.is_empty() { 0 } else { short }]);
        self.sealed = self.sealed.wrapping_add(1);
        let content = message.encode_to_vec();
        if content.len() <= MAX_DATAGRAM - 60 {
            let datagram = ring.seal(CLUSTER, [self.sealed; 24], &content);
            self.deliver(to, &datagram);
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.meshes.iter_mut().for_each(|mesh| mesh.handle_timeout(self.now));
        self.drain();
    }

    fn join(&mut self, choice: usize) {
        let now = self.now;
        let prefix = |text: &str| text.parse().expect("a subnet");
        let terms = Terms {
            site: (choice & 1 > 0).then(|| "s3".parse().expect("a name")),
            prefixes: if choice & 2 > 0 { vec![prefix("10.9.0.0/16")] } else { Vec::new() },
            valid: Duration::from_secs(1 + choice as u64 * 4),
            addresses: Vec::new(),
        };
        let token = self.meshes[INVITER].invite(terms, now).expect("it speaks for its site");
        self.rings.push(token.ring());
        let token = token.to_secret_text().parse().expect("as it was written");
        self.begun += usize::from(self.meshes[JOINER].join(token, now).is_ok());
        self.drain();
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut world = World::new();
    world.drain();
    world.join(64);
    for step in bytes.chunks_exact(3).take(60) {
        let (call, choice, value) = (step[0], usize::from(step[1]), step[2]);
        match call % 16 {
            0..=5 => world.deliver_one(choice, false),
            6 => world.deliver_one(choice, true),
            7..=11 => world.deliver_changed(choice, call / 16, value),
            12 => drop(world.flying.split_off(world.flying.len() - world.flying.len().min(choice))),
            13 => world.pass(Duration::from_millis(20 * choice as u64)),
            14 if world.rings.len() < 4 => world.join(choice),
            _ => {
                // What anybody with the token seals.
                let content = &bytes[bytes.len().min(choice)..];
                let content = &content[..content.len().min(usize::from(value))];
                let datagram = world.rings[choice % world.rings.len()].seal(CLUSTER, [7; 24], content);
                world.deliver(choice / 4 % 2, &datagram);
            }
        }
    }
    // Peace: whoever joins has an answer, or gives up after six seconds of silence at each of three steps.
    for _ in 0..60 {
        for (to, datagram) in std::mem::take(&mut world.flying) {
            world.deliver(to, &datagram);
        }
        world.pass(Duration::from_millis(400));
    }
    assert_eq!(world.begun, world.ended, "every joining ends, and once");
    for mesh in &world.meshes {
        assert!(
            mesh.sites().count() <= 1,
            "a token brings in the one who uses it: {:?}",
            mesh.sites().collect::<Vec<_>>()
        );
    }
});
