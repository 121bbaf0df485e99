//! What it takes to program and to withdraw the peers of a node: one pass of weft's reconciler against `ip -batch` and
//! `bridge -batch`, each in a network namespace of its own, in turns.
//!
//! `make bench-control`, as root. The devices are the same on both sides; each peer is a route and a neighbour of either
//! family and a forwarding entry. `ip -batch` makes three sets of them: weft's own objects; the same with one metric for
//! all routes, as a person or flannel would; and routes that name nexthop objects. Before anything is timed, `ip -j` and
//! `bridge -j` say that both sides hold the same. A pass includes all that weft does in one (dumps, nftables, settings),
//! `ip -batch` the start of two processes.
#![allow(clippy::unwrap_used, reason = "a failure ends the measurement")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use nix::sched::{CloneFlags, setns, unshare};
use serde_json::Value;
use weft_daemon::kernel::linux::Linux;
use weft_daemon::kernel::{Kernel, UnderlaySpec};
use weft_daemon::plan::desired::desired;
use weft_daemon::plan::model::{Dataplane, Encryption, Inputs, Peer, State};
use weft_daemon::reconcile::reconcile;
use weft_tests::figures::{Figures, interleaved};
use weft_wire::mesh::Carrier;
use weft_wire::types::MacAddress;

/// How many peers, and how many rounds.
const SIZES: [(u32, usize); 2] = [(1_000, 9), (5_000, 5)];
/// Another program's routes.
const FOREIGN: &str = "42";

/// Who programs the peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Weft,
    SameObjects,
    OneMetric,
    NexthopObjects,
}

impl Way {
    const HANDS: [Self; 3] = [Self::SameObjects, Self::OneMetric, Self::NexthopObjects];

    fn name(self) -> &'static str {
        match self {
            Self::Weft => "weft",
            Self::SameObjects => "ip -batch, same objects",
            Self::OneMetric => "ip -batch, one metric",
            Self::NexthopObjects => "ip -batch, nexthop objects",
        }
    }
}

/// A node: a network namespace with an underlay and weft's devices, and whoever programs the peers there.
struct Node {
    way: Way,
    namespace: File,
    kernel: Linux,
    inputs: Inputs,
}

impl Node {
    fn new(way: Way) -> Self {
        unshare(CloneFlags::CLONE_NEWNET).expect("root may make network namespaces");
        run("ip link set lo up");
        run("ip link add eth0 type veth peer name wire");
        run("ip addr add 192.0.2.1/24 dev eth0");
        run("ip addr add 2001:db8::1/64 dev eth0 nodad");
        run("ip link set wire up");
        run("ip link set eth0 up");
        let namespace = File::open("/proc/thread-self/ns/net").unwrap();
        let mut kernel = Linux::open().expect("the kernel speaks netlink");
        let inputs = inputs(&mut kernel);
        let mut node = Self { way, namespace, kernel, inputs };
        // The devices, settings and nftables rules are the same everywhere.
        node.pass(0);
        node
    }

    fn enter(&self) {
        setns(&self.namespace, CloneFlags::CLONE_NEWNET).expect("root may enter a namespace");
    }

    fn with_peers(&self, count: u32) -> Inputs {
        Inputs { peers: (2..2 + count).map(peer).collect(), ..self.inputs.clone() }
    }

    /// One pass of weft's; returns milliseconds and the number of changes.
    fn pass(&mut self, count: u32) -> (f64, usize) {
        let inputs = self.with_peers(count);
        self.pass_over(&inputs)
    }

    fn pass_over(&mut self, inputs: &Inputs) -> (f64, usize) {
        let began = Instant::now();
        let report = reconcile(&mut self.kernel, inputs);
        let took = milliseconds(began);
        assert_eq!(report.failed, [], "the kernel refused nothing");
        (took, report.applied)
    }

    /// Programs peers, or withdraws them; returns milliseconds.
    fn bring(&mut self, batches: &BTreeMap<Way, Batch>, count: u32, there: bool) -> f64 {
        match self.way {
            Way::Weft => self.pass(if there { count } else { 0 }).0,
            way => batches[&way].run(there),
        }
    }

    /// What `ip` and `bridge` say of the peers, without the metrics and the names of nexthop objects.
    fn witness(&self) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        for family in ["-4", "-6"] {
            for route in json(&format!("ip {family} -j route show proto 117")) {
                let [dst, dev, gateway, source] =
                    ["dst", "dev", "gateway", "prefsrc"].map(|field| route[field].to_string());
                seen.insert(format!("route {dst} {dev} {gateway} {source}"));
            }
            for entry in json(&format!("ip {family} -j neigh show dev weft-vx4 nud permanent")) {
                seen.insert(format!("neighbour {} {}", entry["dst"], entry["lladdr"]));
            }
        }
        for entry in json("bridge -j fdb show dev weft-vx4") {
            seen.insert(format!("fdb {} {}", entry["mac"], entry["dst"]));
        }
        seen
    }
}

/// The files that `ip` and `bridge` read.
struct Batch {
    add: [PathBuf; 2],
    remove: [PathBuf; 2],
}

impl Batch {
    fn new(dir: &Path, way: Way, state: &State) -> Self {
        let (mut add, mut remove) = (String::new(), String::new());
        let (mut add_fdb, mut remove_fdb) = (String::new(), String::new());
        for ((dev, mac), to) in &state.fdb {
            writeln!(add_fdb, "fdb add {mac} dev {dev} dst {to} self permanent").unwrap();
            writeln!(remove_fdb, "fdb del {mac} dev {dev} dst {to} self").unwrap();
        }
        for ((dev, to), mac) in &state.neighbours {
            writeln!(add, "neigh add {to} lladdr {mac} dev {dev} nud permanent").unwrap();
        }
        let mut objects = String::new();
        for (id, ((prefix, metric), route)) in (1..).zip(&state.routes) {
            let metric = if way == Way::SameObjects { *metric } else { 2117 };
            let (dev, via, source) = (&route.dev, route.via.unwrap(), route.source.unwrap());
            let tail = format!("proto 117 metric {metric}");
            if way == Way::NexthopObjects {
                writeln!(add, "nexthop add id {id} via {via} dev {dev} onlink proto 117").unwrap();
                writeln!(add, "route add {prefix} nhid {id} src {source} {tail}").unwrap();
                writeln!(objects, "nexthop del id {id}").unwrap();
            } else {
                writeln!(add, "route add {prefix} via {via} dev {dev} onlink src {source} {tail}").unwrap();
            }
            writeln!(remove, "route del {prefix} {tail}").unwrap();
        }
        remove += &objects;
        for (dev, to) in state.neighbours.keys() {
            writeln!(remove, "neigh del {to} dev {dev}").unwrap();
        }
        let file = |name: &str, text: String| {
            let path = dir.join(format!("{way:?}.{name}"));
            std::fs::write(&path, text).unwrap();
            path
        };
        Self {
            add: [file("ip-add", add), file("bridge-add", add_fdb)],
            remove: [file("ip-remove", remove), file("bridge-remove", remove_fdb)],
        }
    }

    fn run(&self, there: bool) -> f64 {
        let [ip, bridge] = if there { &self.add } else { &self.remove };
        // As weft does: what routes need comes first, and goes last.
        let mut steps = [("bridge", bridge), ("ip", ip)];
        if !there {
            steps.reverse();
        }
        let began = Instant::now();
        for (tool, file) in steps {
            let done = Command::new(tool).arg("-batch").arg(file).stdin(Stdio::null()).output().unwrap();
            assert!(done.status.success(), "{tool}: {}", String::from_utf8_lossy(&done.stderr));
        }
        milliseconds(began)
    }
}

/// Another program that reads the routes of a namespace all the time; ends when dropped.
struct Reader(Child);

impl Reader {
    fn new() -> Self {
        let script = "while :; do ip -4 route show table all; ip -6 route show table all; done";
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::null());
        Self(shell.spawn().expect("sh is there"))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // The dump that the shell has just started ends by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn run(line: &str) -> String {
    let mut words = line.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output().expect("the tool is there");
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(line: &str) -> Vec<Value> {
    let text = run(line);
    if text.trim().is_empty() { Vec::new() } else { serde_json::from_str(&text).unwrap() }
}

/// Peer number `i`, with a subnet and an endpoint of either family.
fn peer(i: u32) -> Peer {
    let node = format!("p{i}").parse().unwrap();
    let v6 = u128::from("2001:db8::1000".parse::<Ipv6Addr>().unwrap()) + u128::from(i);
    Peer {
        subnets: vec![
            format!("10.{}.{}.0/24", 40 + (i >> 8), i & 255).parse().unwrap(),
            format!("fd00:32:0:{i:x}::/64").parse().unwrap(),
        ],
        underlay: vec![
            IpAddr::from(Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 0, 0)) + i)),
            IpAddr::from(Ipv6Addr::from(v6)),
        ],
        vtep_v4: Some(MacAddress::derived(&node, "v4")),
        vtep_v6: Some(MacAddress::derived(&node, "v6")),
        node,
        vni: 1,
        vxlan_port: 8472,
        mtu: 1500,
        site: "default".parse().unwrap(),
        encryption: Encryption::Never,
        tunnel: None,
        gateway: None,
        via: None,
        path_mtu: None,
    }
}

fn inputs(kernel: &mut Linux) -> Inputs {
    let spec = UnderlaySpec { device: Some("eth0".into()), ..UnderlaySpec::default() };
    Inputs {
        node: "n1".parse().unwrap(),
        site: "default".parse().unwrap(),
        dataplane: Dataplane {
            vni: 1,
            vxlan_port: 8472,
            direct_routing: false,
            masquerade: true,
            cluster_cidrs: vec!["10.32.0.0/11".parse().unwrap(), "fd00:32::/48".parse().unwrap()],
            non_masquerade: Vec::new(),
            mtu: None,
            tx_checksum: true,
            hairpin: true,
            encryption: Encryption::Never,
            preshared: None,
            pairs: Default::default(),
            tunnel: None,
            carrier: Carrier::UserSpace,
            detour: None,
        },
        underlay: kernel.underlay(&spec).unwrap(),
        subnets: vec!["10.32.1.0/24".parse().unwrap(), "fd00:32:0:f001::/64".parse().unwrap()],
        peers: Vec::new(),
        attachments: Vec::new(),
        ways: BTreeMap::new(),
        anew: BTreeSet::new(),
        strays: BTreeSet::new(),
        sessions: BTreeSet::new(),
    }
}

/// As many routes of another program, of either family.
fn foreign_routes(dir: &Path, count: u32) -> PathBuf {
    let mut text = String::new();
    for i in 0..count {
        let tail = format!("dev eth0 proto {FOREIGN}");
        writeln!(text, "route add 172.{}.{}.0/24 via 192.0.2.9 {tail}", 16 + (i >> 8), i & 255).unwrap();
        writeln!(text, "route add 2001:db8:1:{i:x}::/64 via 2001:db8::9 {tail}").unwrap();
    }
    let path = dir.join("foreign");
    std::fs::write(&path, text).unwrap();
    path
}

/// Programs and withdraws in turns.
fn measure(
    figures: &mut Figures,
    scene: &str,
    nodes: &mut [Node],
    batches: &BTreeMap<Way, Batch>,
    count: u32,
    rounds: usize,
    read: bool,
) {
    interleaved(rounds, nodes, |round, node| {
        node.enter();
        let reader = read.then(Reader::new);
        let way = node.way;
        let mut add =
            |what: &str, figure| figures.add(&format!("{what} {count} peers{scene}: {}", way.name()), figure);
        add("program", node.bring(batches, count, true));
        if way == Way::Weft {
            let (took, changes) = node.pass(count);
            assert_eq!(changes, 0, "a second pass finds nothing to do");
            add("nothing to do,", took);
            let mut inputs = node.with_peers(count);
            let moved = IpAddr::from([198, 51, 100, u8::try_from(round).unwrap()]);
            inputs.peers[7].underlay[0] = moved;
            let (took, changes) = node.pass_over(&inputs);
            assert_eq!(changes, 1, "the endpoint of one peer is one forwarding entry");
            add("one peer moved,", took);
        }
        add("withdraw", node.bring(batches, count, false));
        drop(reader);
    });
}

fn main() {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP: needs root to make network namespaces");
        return;
    }
    let dir = std::env::temp_dir().join(format!("weft-bench-control-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let mut nodes = vec![Node::new(Way::Weft)];
    nodes.extend(Way::HANDS.map(Node::new));
    let mut figures = Figures::default();
    for (count, rounds) in SIZES {
        let plan = desired(&nodes[0].with_peers(count));
        let batches: BTreeMap<Way, Batch> =
            Way::HANDS.into_iter().map(|way| (way, Batch::new(&dir, way, &plan.state))).collect();
        assert_same(&mut nodes, &batches, count);
        measure(&mut figures, "", &mut nodes, &batches, count, rounds, false);
        let foreign = foreign_routes(&dir, count);
        for node in &nodes {
            node.enter();
            run(&format!("ip -batch {}", foreign.display()));
        }
        measure(&mut figures, ", as many foreign routes", &mut nodes, &batches, count, rounds, false);
        measure(&mut figures, ", foreign routes being dumped", &mut nodes, &batches, count, rounds, true);
        for node in &nodes {
            node.enter();
            run(&format!("ip route flush proto {FOREIGN}"));
            run(&format!("ip -6 route flush proto {FOREIGN}"));
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
    report(&figures);
}

/// Has the witnesses say that all sides make the same objects and take them away again.
fn assert_same(nodes: &mut [Node], batches: &BTreeMap<Way, Batch>, count: u32) {
    let mut pictures = Vec::new();
    for node in nodes {
        node.enter();
        let before = node.witness();
        node.bring(batches, count, true);
        pictures.push(node.witness());
        node.bring(batches, count, false);
        assert_eq!(node.witness(), before, "{} withdraws what it made", node.way.name());
    }
    assert!(pictures[0].len() >= 5 * count as usize, "{} objects are there", pictures[0].len());
    assert!(pictures.iter().all(|picture| *picture == pictures[0]), "all sides hold the same objects");
}

fn report(figures: &Figures) {
    println!("milliseconds, median [least..most]");
    for name in figures.names() {
        println!("{name:<80} {:.1}", figures.spread(name));
    }
    println!();
    let weft = Way::Weft.name();
    for name in figures.names().filter(|name| !name.ends_with(weft)) {
        let (what, hand) = name.rsplit_once(": ").unwrap();
        figures.print_ratio(&format!("{what}: weft / {hand}"), &format!("{what}: {weft}"), name);
    }
}
