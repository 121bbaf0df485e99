//! What a daemon takes: memory and processor time at rest with three and with a thousand peers, with two thousand that it
//! speaks WireGuard with and fifty of them active, and how soon it is ready.
//!
//! `make bench-node`; `BENCH_NODE=tunnels` (or `few`, `many`) runs one part. The thousand are real meshes with records of their own in one process (`--peers`), on one node of a
//! lab; the daemon that is measured has a route, a neighbour and a forwarding entry for each, or a tunnel.

#[path = "node/answering.rs"]
mod answering;

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use answering::Answering;
use weft_tests::figures::Figures;
use weft_tests::lab::{Backend, Families, Lab, LabOptions, Store, wait_until};
use weft_tests::sim::meshes::name;
use weft_tests::sim::records::SharedRecords;
use weft_wire::mesh::{
    Authority, Capabilities, Facts, LeasedSubnet, Mesh, MeshConfig, NodeKey, Output, Timing,
};
use weft_wire::seal::{ClusterKey, KeyRing};
use weft_wire::types::{Epoch, MacAddress};

/// How long a daemon is watched at rest.
const REST: Duration = Duration::from_secs(30);
const MANY: usize = 999;
/// Peers with tunnels, and how many of them have sessions.
const TUNNELS: usize = 2000;
const ACTIVE: usize = 50;
const FIRST_PORT: u16 = 20_000;
const STARTS: usize = 10;

/// Runs meshes over real sockets for so long; all gossip at one address.
fn run_peers(count: usize, lab: &str, address: &str, key: &str, length: Duration, tunnels: bool) {
    let began = Instant::now();
    let place = |peer: usize| -> SocketAddr {
        let port = FIRST_PORT + u16::try_from(peer).expect("peers fit the ports");
        SocketAddr::new(address.parse().expect("an address"), port)
    };
    let records = Arc::new(SharedRecords::default());
    let ring =
        KeyRing::new(vec![key.parse::<ClusterKey>().expect("a cluster key")]).expect("one key is a ring");
    let mut peers: Vec<(UdpSocket, Mesh, Instant)> = Vec::new();
    for peer in 0..count {
        let socket = UdpSocket::bind(place(peer)).expect("the port is free");
        socket.set_nonblocking(true).expect("a socket can be made not to block");
        let mut secret = [7; 32];
        secret[..8].copy_from_slice(&(peer as u64).to_be_bytes());
        let config = MeshConfig {
            cluster: lab.to_owned(),
            node: name(peer + 10),
            site: "default".parse().expect("a name"),
            key: NodeKey::from_secret(secret),
            ring: ring.clone(),
            seeds: vec![place(0)],
            incarnation: 1,
            // With one process for all of them, more would suspect each other: they have no other work here.
            timing: Timing {
                probe_interval: Timing::default().probe_interval * if tunnels { 10 } else { 1 },
                probe_timeout: Timing::default().probe_timeout * if tunnels { 10 } else { 1 },
                ..Timing::default()
            },
            verify: Arc::<SharedRecords>::clone(&records),
        };
        let mut mesh = Mesh::new(config, secret, began);
        mesh.set_authority(Authority::Claims, began);
        let subnet = subnet(peer).parse().expect("a subnet");
        let facts = Facts {
            subnets: vec![LeasedSubnet { subnet, epoch: Epoch(1) }],
            gossip: vec![place(peer)],
            underlay: vec![place(peer).ip()],
            vtep_v4: Some(MacAddress::derived(&name(peer + 10), "v4")),
            vni: 1,
            vxlan_port: 8472,
            mtu: 1500,
            capabilities: Capabilities::VXLAN,
            tunnel: tunnels.then(|| answering::facts(peer, &ring)),
            ..Facts::default()
        };
        mesh.announce(facts, began);
        peers.push((socket, mesh, began));
    }
    let mut answering: Vec<Answering> = Vec::new();
    let mut buffer = [0; 2048];
    while began.elapsed() < length {
        for (socket, mesh, wake) in &mut peers {
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                // What is refused is counted by the mesh.
                let _ = mesh.handle_datagram(from, &buffer[..length], Instant::now());
                *wake = began;
            }
            let now = Instant::now();
            if *wake > now {
                continue;
            }
            mesh.handle_timeout(now);
            loop {
                match mesh.poll_output(now) {
                    // A full queue loses it, as a network does.
                    Output::Send { to, datagram } => drop(socket.send_to(&datagram, to)),
                    Output::Event(_) => {}
                    Output::Wait { until, .. } => break *wake = until,
                }
            }
        }
        let met = || peers[0].1.members().find(|member| member.node.as_str() == "n1");
        if tunnels
            && answering.is_empty()
            && let Some(facts) = met().and_then(|member| member.record.facts.tunnel.clone())
        {
            let one = |peer| Answering::new(peer, place(peer).ip(), &facts, &ring);
            answering.extend((0..ACTIVE).map(one));
        }
        answering.iter_mut().for_each(Answering::answer);
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The subnet of one of many peers.
fn subnet(peer: usize) -> String {
    format!("10.{}.{}.0/24", 36 + peer / 256, peer % 256)
}

/// A line of the daemon's `/proc` status in MiB.
fn memory(lab: &Lab, line: &str) -> f64 {
    let pid = lab.state().node("n1").expect("n1 exists").daemon.expect("it runs");
    let file = if line == "Pss" { "smaps_rollup" } else { "status" };
    let text = lab.sh("n1", &format!("awk '/^{line}:/{{print $2}}' /proc/{pid}/{file}"));
    text.trim().parse::<f64>().expect("a number of kB") / 1024.0
}

/// The processor time that the daemon has had, in seconds.
fn used(lab: &Lab) -> f64 {
    let pid = lab.state().node("n1").expect("n1 exists").daemon.expect("it runs");
    let text = lab.sh("n1", &format!("awk '{{print $14 + $15}}' /proc/{pid}/stat"));
    // A tick is a hundredth of a second: proc(5).
    text.trim().parse::<f64>().expect("a number of ticks") / 100.0
}

fn report(lab: &Lab, peers: usize) {
    let before = used(lab);
    std::thread::sleep(REST);
    let share = (used(lab) - before) / REST.as_secs_f64() * 100.0;
    println!(
        "{peers} peers: resident {:.1} MiB, proportional {:.1} MiB, {share:.2} % of a processor at rest",
        memory(lab, "VmRSS"),
        memory(lab, "Pss")
    );
}

fn starts(lab: &Lab) {
    let mut figures = Figures::default();
    for _ in 0..STARTS {
        lab.kill("n1");
        let began = Instant::now();
        // The lab says that a daemon runs once it is ready for pods.
        lab.start("n1");
        figures.add("ready", began.elapsed().as_secs_f64() * 1e3);
    }
    println!("start to ready, as `weft status` tells, asked every 50 ms: {:.0} ms", figures.spread("ready"));
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    if let Some(place) = words.iter().position(|word| word == "--peers") {
        let [count, lab, address, key, seconds, tunnels] = &words[place + 1..][..6] else { return };
        let number = |word: &String| word.parse().expect("a number");
        let length = Duration::from_secs(number(seconds) as u64);
        return run_peers(number(count), lab, address, key, length, tunnels == "tunnels");
    }
    let only = std::env::var("BENCH_NODE").ok();
    let wanted = |part: &str| only.as_deref().is_none_or(|only| only == part);
    if wanted("few") {
        let lab = Lab::up(LabOptions::new("bench-node").nodes(4).pods(1));
        starts(&lab);
        report(&lab, 3);
    }
    if wanted("many") {
        crowd(MANY, Backend::Vxlan);
    }
    if wanted("tunnels") {
        crowd(TUNNELS, Backend::Wireguard);
    }
}

/// One daemon with so many peers.
fn crowd(count: usize, backend: Backend) {
    let tunnels = backend == Backend::Wireguard;
    let probe = if tunnels { "10s" } else { "1s" };
    let seeds = format!("[gossip]\nseeds = [\"192.0.2.2:{FIRST_PORT}\"]\nprobe_interval = \"{probe}\"\n");
    let options =
        LabOptions::new("bench-node").nodes(2).started(1).pods(1).store(Store::Static).backend(backend);
    let lab = Lab::up(options.overlay(Families::V4).config(&seeds));
    let program = std::env::current_exe().expect("the program knows where it is");
    let program = program.to_str().expect("a path of text");
    let key = lab.sh("n2", "cat /etc/weft/cluster.key");
    let name = lab.state().options.name;
    let kind = if tunnels { "tunnels" } else { "none" };
    let peers = lab.background(
        "n2",
        &[program, "--peers", &count.to_string(), &name, "192.0.2.2", key.trim(), "600", kind],
    );
    let routes = || lab.weft_routes("n1").len();
    let took = wait_until("n1 has a route to everyone", Duration::from_secs(400), || {
        std::thread::sleep(Duration::from_secs(1));
        routes() == count
    });
    println!("{count} peers: known after {:.0} s", took.as_secs_f64());
    report(&lab, count);
    if tunnels {
        // A packet a second each way with every active peer.
        let addresses: Vec<_> = (0..ACTIVE).map(|peer| subnet(peer).replace(".0/24", ".9")).collect();
        let script = format!("for to in {}; do ping -n -q -i 1 $to & done; wait", addresses.join(" "));
        let pings = lab.background("n1/a", &["sh", "-c", &script]);
        let sessions = || {
            let peers = lab.weft("n1", &["peers"])["peers"].as_array().cloned().unwrap_or_default();
            peers.iter().filter(|peer| peer["tunnel"]["handshake_ms"].is_u64()).count()
        };
        wait_until("the active peers have sessions", Duration::from_secs(60), || sessions() == ACTIVE);
        print!("{ACTIVE} of them active, ");
        report(&lab, count);
        assert_eq!(sessions(), ACTIVE, "they all last");
        drop(pings);
    }
    drop(peers);
}
