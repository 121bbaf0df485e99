//! Two sites, each with its own store: what whole nodes keep while the way between them is gone.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use ipnet::IpNet;
use rand_core::RngCore;
use weft_daemon::config::Config;
use weft_tests::sim::net::Net;
use weft_wire::mesh::{NodeKey, Trust};
use weft_wire::seal::{ClusterKey, KeyRing};
use weft_wire::site::SiteKey;
use weft_wire::types::{Subnet, TunnelKey};

use super::disk::Disk;
use super::machine::Machine;
use super::store::SharedStore;

/// So many nodes has each site; the first speaks for it.
const SIZE: usize = 3;
const MINUTE: Duration = Duration::from_secs(60);

struct Sites {
    net: Net<Machine>,
    seed: u64,
}

fn site_key(site: usize) -> SiteKey {
    SiteKey::from_secret([site as u8 + 100; 32])
}

fn range(site: usize) -> Subnet {
    format!("10.32.{site}.0/24").parse().expect("a subnet")
}

fn address(node: usize) -> std::net::SocketAddr {
    std::net::SocketAddr::from(([192, 0, 2, node as u8 + 1], 7117))
}

fn config(node: usize) -> Config {
    let site = node / SIZE;
    // A seed of its own site at most: of others a node knows what it was told.
    let text = format!(
        "[node]\nname = \"n{node}\"\nsite = \"s{site}\"\n[site]\nkey = \"{}\"\n\
         [cluster]\nid = \"sim\"\ncidrs = [{{ cidr = \"{}\", node_prefix = 27 }}]\n[store]\nlease_ttl = \"60s\"\n\
         [encryption]\npolicy = \"cross-site\"\n",
        site_key(site).public(),
        range(site),
    );
    Config::parse(&text, Path::new("weft.toml"), "host").expect("the configuration is valid")
}

fn nodes() -> std::ops::Range<usize> {
    0..2 * SIZE
}

impl Sites {
    fn new(seed: u64) -> Self {
        let mut net = Net::new(seed);
        let stores: [Rc<RefCell<SharedStore>>; 2] = Default::default();
        for node in nodes() {
            let site = node / SIZE;
            let mut secret = [0; 32];
            net.rng.fill_bytes(&mut secret);
            let key = ClusterKey::from_bytes([1; 32]);
            let ring = KeyRing::new(vec![key]).expect("there is a key");
            let disk = Disk::new(NodeKey::from_secret(secret), TunnelKey([node as u8 + 1; 32]), ring);
            let store = Rc::clone(&stores[site]);
            let mut machine =
                Machine::new(node, config(node), address(node), disk, store, &mut net.rng, net.now);
            let signer = (node % SIZE == 0).then(|| site_key(site));
            machine.trust =
                Some(Trust { site: site_key(site).public(), prefixes: vec![range(site)], signer });
            net.insert(address(node), machine);
        }
        let mut sites = Self { net, seed };
        nodes().for_each(|node| sites.net.with(address(node), Machine::start));
        sites.net.run(Duration::from_secs(10));
        for (by, of) in [(0, 1), (1, 0)] {
            sites.net.with(address(by * SIZE), |machine, now| {
                let local = machine.clock.read(now);
                let mesh = &mut machine.daemon.as_mut().expect("it runs").control.mesh;
                // As a person would who brings them together.
                mesh.set_seeds(vec![address(of * SIZE)], local);
                let name = format!("s{of}").parse().expect("a name");
                mesh.admit(name, site_key(of).public(), vec![range(of)], local).expect("it may be let in");
            });
        }
        sites.until("all have routes to all", 2 * MINUTE, |sites| {
            nodes().all(|node| sites.routes(node) == 2 * SIZE - 1)
        });
        sites
    }

    /// How many of weft's routes to other nodes the kernel of a node has.
    fn routes(&self, node: usize) -> usize {
        let machine = self.net.host(address(node)).expect("it is there");
        let blocks: BTreeSet<IpNet> = machine
            .kernel
            .actual
            .state
            .routes
            .keys()
            .map(|(to, _)| *to)
            .filter(|to| to.prefix_len() == 27)
            .collect();
        blocks.len()
    }

    fn knows(&self, node: usize, other: usize) -> bool {
        let machine = self.net.host(address(node)).expect("it is there");
        let name = format!("n{other}").parse().expect("a name");
        machine.daemon.as_ref().is_some_and(|daemon| {
            let member = daemon.control.mesh.member(&name);
            member.is_some_and(|member| member.state == weft_wire::mesh::MemberState::Alive)
        })
    }

    fn until(&mut self, what: &str, bound: Duration, done: impl Fn(&Self) -> bool) {
        let began = self.net.now;
        while !done(self) {
            assert!(self.net.now - began < bound, "{what}: not within {bound:?}; WEFT_SEED={}", self.seed);
            self.net.run(Duration::from_millis(200));
        }
    }

    fn cut(&mut self, is_cut: bool) {
        for node in SIZE..2 * SIZE {
            if is_cut {
                self.net.sides.insert(address(node), 1);
            } else {
                self.net.sides.remove(&address(node));
            }
        }
    }
}

pub fn cut_off_for_long(seed: u64) {
    let mut sites = Sites::new(seed);
    sites.cut(true);
    // Longer than a dead member is remembered.
    for minute in 0..25 {
        sites.net.run(MINUTE);
        if minute == 15 {
            // A daemon that starts meanwhile knows what it did.
            sites.net.with(address(1), |machine, now| {
                machine.kill();
                machine.start(now);
            });
        }
        let whole = nodes().all(|node| sites.routes(node) == 2 * SIZE - 1);
        assert!(whole, "minute {minute}: a route is gone; WEFT_SEED={seed}");
    }
    assert!(!sites.knows(0, SIZE), "the sites do not hear each other");
    sites.cut(false);
    sites.until("all hear all", 3 * MINUTE, |sites| {
        nodes().all(|node| nodes().all(|other| node == other || sites.knows(node, other)))
    });
    assert!(nodes().all(|node| sites.routes(node) == 2 * SIZE - 1));
}

pub fn a_node_goes_while_its_site_is_cut_off(seed: u64) {
    let mut sites = Sites::new(seed);
    sites.cut(true);
    sites.net.run(12 * MINUTE);
    let last = 2 * SIZE - 1;
    sites.net.with(address(last), |machine, now| machine.leave(now));
    sites.net.run(Duration::from_secs(10));
    sites.net.with(address(last), |machine, _| machine.end_leaving());
    sites.net.run(12 * MINUTE);
    assert_eq!(sites.routes(0), 2 * SIZE - 1, "nobody told it");
    sites.cut(false);
    sites.until("its route is gone", 15 * MINUTE, |sites| {
        (0..SIZE).all(|node| sites.routes(node) == 2 * SIZE - 2)
    });
    sites.net.run(11 * MINUTE);
    assert!((0..SIZE).all(|node| sites.routes(node) == 2 * SIZE - 2), "WEFT_SEED={seed}");
}
