//! The same of a mesh of several sites, each with a key and leases of its own and 40 ms away from the others.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use weft_wire::mesh::{Authority, MemberView, MeshConfig, Owner, Trust, Verdict};
use weft_wire::site::SiteKey;
use weft_wire::types::{Epoch, SiteName, Subnet};

use super::super::meshes::{Meshes, address, config, facts, key, name, seconds, subnet};
use super::super::records::SharedRecords;
use super::{Event, Measured, PARTED};

/// So many numbers of nodes has a site: the subnets of one are a prefix.
const ROOM: usize = 1 << ROOM_BITS;
const ROOM_BITS: u8 = 10;
/// How much longer a datagram takes between sites.
const FAR: Duration = Duration::from_millis(40);

/// Which nodes have their site's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signers {
    /// One a site: it certifies the others, whose second record says so and whose third that they are reached from outside.
    One,
    /// All, and each says where it is reached from outside: its first record says all.
    All,
}

/// What a mesh of several sites costs and how fast it learns.
#[derive(Debug, Clone, Default)]
pub struct SitesSize {
    /// How many sites.
    pub sites: usize,
    /// How many nodes in all.
    pub nodes: usize,
    /// Each event: what happened, and what it cost.
    pub events: Vec<(&'static str, Event)>,
    /// Bytes and datagrams a second that a node sends at rest.
    pub rest: (f64, f64),
}

/// A mesh of several sites that is measured.
#[derive(Debug)]
struct Sites {
    measured: Measured,
    sites: usize,
    each: usize,
    signers: Signers,
}

fn site(number: usize) -> SiteName {
    format!("s{number}").parse().expect("a valid name")
}

fn site_key(number: usize) -> SiteKey {
    SiteKey::from_secret([number as u8 + 100; 32])
}

fn site_of(node: usize) -> usize {
    node / ROOM
}

/// The node that speaks for a site.
fn speaker(site: usize) -> usize {
    site * ROOM
}

fn prefix(site: usize) -> Subnet {
    let first = subnet(speaker(site)).to_string();
    let address = first.split('/').next().expect("a subnet has an address");
    format!("{address}/{}", 24 - ROOM_BITS).parse().expect("a subnet")
}

fn distance(from: SocketAddr, to: SocketAddr) -> Duration {
    let site = |at: SocketAddr| match at.ip() {
        std::net::IpAddr::V4(ip) => u32::from(ip) >> ROOM_BITS,
        std::net::IpAddr::V6(_) => 0,
    };
    if site(from) == site(to) { Duration::ZERO } else { FAR }
}

impl Sites {
    /// Nodes of a site: one more has a lease than runs from the start.
    fn nodes(&self, site: usize) -> std::ops::Range<usize> {
        speaker(site)..speaker(site) + self.each
    }

    fn add(&mut self, node: usize, incarnation: u64, store: &Authority) {
        let verify: Arc<SharedRecords> = Arc::clone(&self.measured.records);
        let of = site_of(node);
        let settings = MeshConfig { verify, site: site(of), ..config(node, incarnation) };
        let meshes = &mut self.measured.meshes;
        meshes.start(settings, store.clone());
        let signs = node == speaker(of) || self.signers == Signers::All;
        let signer = signs.then(|| site_key(of));
        let trust = Trust { site: site_key(of).public(), prefixes: vec![prefix(of)], signer };
        let trusted = meshes.with(node, |mesh, now| mesh.set_trust(trust, Vec::new(), now));
        trusted.expect("a site may state its own prefix");
        let mut facts = facts(node);
        if self.signers == Signers::All {
            facts.reachability.outside = facts.gossip.clone();
        }
        meshes.announce(node, facts);
        self.measured.running.insert(node);
    }

    fn store(&self, of: usize) -> Authority {
        let owner =
            |node| Owner { node: name(node), key: key(node, 1).public(), epoch: Epoch(node as u64 + 1) };
        let nodes = speaker(of)..=speaker(of) + self.each;
        Authority::Store(Arc::new(nodes.map(|node| (subnet(node), owner(node))).collect()))
    }

    fn admit(&mut self, by: usize, of: usize) {
        let (key, prefixes) = (site_key(of).public(), vec![prefix(of)]);
        let said =
            self.measured.meshes.with(speaker(by), |mesh, now| mesh.admit(site(of), key, prefixes, now));
        said.expect("the site may be let in");
    }

    fn befriend(&mut self, last: usize) {
        for other in 0..last {
            self.admit(other, last);
            self.admit(last, other);
        }
    }

    fn start(sites: usize, each: usize, signers: Signers, test: &str) -> (Self, Event) {
        let mut meshes = Meshes::new(test);
        meshes.keep_events = false;
        meshes.net.distance = Some(distance);
        let (records, running) = (Arc::new(SharedRecords::default()), BTreeSet::new());
        let table = Authority::Store(Arc::default());
        let measured = Measured { meshes, running, records, table, nodes: sites * each };
        let mut sites = Self { measured, sites, each, signers };
        let began = sites.measured.meshes.net.now;
        for site in 0..sites.sites {
            let store = sites.store(site);
            sites.nodes(site).for_each(|node| sites.add(node, 1, &store));
        }
        (0..sites.sites).for_each(|site| sites.befriend(site));
        let event = sites.measured.watch(began, seconds(600), |measured, node| measured.knows_everyone(node));
        (sites, event)
    }

    fn join(&mut self) -> Event {
        let node = speaker(1) + self.each;
        let began = self.measured.meshes.net.now;
        let store = self.store(1);
        self.add(node, 1, &store);
        let accepted = |member: Option<MemberView<'_>>| {
            member.is_some_and(|member| *member.verdict == Verdict::Accepted)
        };
        self.measured.watch(began, seconds(120), |measured, of| {
            if of == node { measured.knows_everyone(of) } else { measured.thinks(of, node, accepted) }
        })
    }

    fn cut_off_and_heal(&mut self) -> Event {
        let last = self.sites - 1;
        for node in self.nodes(last) {
            self.measured.meshes.net.sides.insert(address(node), 1);
        }
        self.measured.meshes.run(PARTED);
        self.measured.meshes.net.sides.clear();
        let began = self.measured.meshes.net.now;
        self.measured.watch(began, seconds(300), |measured, node| measured.knows_everyone(node))
    }

    /// All others put the last site out: until none of their nodes has a route to it.
    fn expel(&mut self) -> Event {
        let last = self.sites - 1;
        let began = self.measured.meshes.net.now;
        for by in 0..last {
            let key = site_key(last).public();
            let said = self.measured.meshes.with(speaker(by), |mesh, now| mesh.expel(site(last), key, now));
            said.expect("a site may be put out");
        }
        let nodes: Vec<usize> = self.nodes(last).collect();
        let has_route = |member: Option<MemberView<'_>>| member.is_some_and(|member| member.routed.is_some());
        self.measured.watch(began, seconds(300), |measured, of| {
            let routed = |node: &usize| measured.thinks(of, *node, has_route);
            site_of(of) == last || !nodes.iter().any(routed)
        })
    }

    /// All let it in again: until everybody has a route to everybody.
    fn admit_again(&mut self) -> Event {
        let began = self.measured.meshes.net.now;
        self.befriend(self.sites - 1);
        self.measured.watch(began, seconds(300), |measured, node| measured.knows_everyone(node))
    }
}

/// Measures a mesh of so many sites of so many nodes each, two at least; each event once.
pub fn measure(sites: usize, each: usize, signers: Signers, test: &str) -> (Measured, SitesSize) {
    assert!(each < ROOM, "a site has at most {} nodes here", ROOM - 1);
    let (mut mesh, start) = Sites::start(sites, each, signers, test);
    eprintln!("{test}: all know each other");
    let mut size = SitesSize { sites, nodes: sites * each, ..SitesSize::default() };
    size.rest = mesh.measured.rest();
    size.events.push(("start of all", start));
    size.events.push(("a node joins", mesh.join()));
    let left = mesh.measured.leave_of(speaker(0) + 1);
    size.events.push(("a node leaves", left));
    eprintln!("{test}: a node came and one went");
    size.events.push(("a site is cut off for a minute and heals", mesh.cut_off_and_heal()));
    size.events.push(("a site is expelled", mesh.expel()));
    size.events.push(("a site joins", mesh.admit_again()));
    for (_, event) in &mut size.events {
        event.trials = 1;
        event.average(size.rest);
    }
    (mesh.measured, size)
}
