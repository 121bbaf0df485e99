//! Meshes of several sites that meet: each site has a ring of its own to begin with, and its nodes go over to the keys that they
//! are given, as the daemon does.
#![allow(clippy::unwrap_used, dead_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand_core::RngCore;
use weft_tests::sim::meshes::*;
use weft_wire::invite::Token;
use weft_wire::mesh::*;
use weft_wire::seal::{KeyId, KeyRing, RingName};
use weft_wire::site::{SignedStatement, SiteKey};
use weft_wire::types::{Epoch, SiteName, Subnet, TunnelKey};

/// Sites of four nodes each; the first node of each speaks for it.
pub const SIZE: usize = 4;

pub fn site(number: usize) -> SiteName {
    format!("s{number}").parse().unwrap()
}

pub fn site_key(number: usize) -> SiteKey {
    SiteKey::from_secret([number as u8 + 100; 32])
}

pub fn nodes(site: usize) -> Range<usize> {
    site * SIZE..(site + 1) * SIZE
}

pub fn speaker(site: usize) -> usize {
    site * SIZE
}

/// What covers the subnets of a site's nodes, and of nobody else's.
pub fn prefix_of(site: usize) -> Subnet {
    format!("10.32.{}.0/22", site * SIZE).parse().unwrap()
}

pub fn hour() -> Duration {
    Duration::from_secs(3600)
}

pub fn terms(valid: Duration) -> Terms {
    Terms { site: None, prefixes: Vec::new(), valid, addresses: Vec::new() }
}

fn store(site: usize) -> Authority {
    let owner = |node| {
        let owner = Owner { node: name(node), key: key(node, 1).public(), epoch: Epoch(node as u64 + 1) };
        (subnet(node), owner)
    };
    Authority::Store(Arc::new(nodes(site).map(owner).collect()))
}

/// Several sites in one network.
pub struct Sites {
    pub net: Meshes,
    /// Whether a node ever lost its route to another of its own site, once all had met.
    pub lost_inside: bool,
    watched: bool,
    /// What a node was told last, which outlives it.
    wanted: BTreeMap<usize, (u64, KeyRing)>,
    looked: BTreeMap<usize, usize>,
    parting: Vec<(usize, Instant)>,
    renewals: u8,
    /// Whether nodes say that they have tunnels.
    tunnels: bool,
    running: BTreeSet<usize>,
}

impl Sites {
    pub fn empty(test: &str) -> Self {
        Self::over(Meshes::new(test))
    }

    fn over(net: Meshes) -> Self {
        Self {
            net,
            lost_inside: false,
            watched: false,
            wanted: BTreeMap::new(),
            looked: BTreeMap::new(),
            parting: Vec::new(),
            renewals: 50,
            tunnels: false,
            running: BTreeSet::new(),
        }
    }

    /// Sites that know nothing of each other, each of them whole.
    pub fn up(test: &str, count: usize) -> Self {
        Self::empty(test).filled(count)
    }

    /// The same from a seed.
    pub fn up_from(seed: u64, count: usize) -> Self {
        Self::over(Meshes::from_seed(seed)).filled(count)
    }

    fn filled(self, count: usize) -> Self {
        let mut sites = self;
        (0..count).for_each(|number| sites.start_site(number, site(number), prefix_of(number)));
        sites.run_until("each site is whole", seconds(60), |sites| {
            (0..count).all(|one| sites.routes(one, one))
        });
        // The last certificates and what follows from them.
        sites.run(seconds(10));
        sites.watched = true;
        sites
    }

    /// Has every node say that it has tunnels, whose secrets are made from cluster keys and from what sites share.
    pub fn with_tunnels(mut self) -> Self {
        self.tunnels = true;
        let running: Vec<usize> = self.running.iter().copied().collect();
        for node in running {
            self.announce(node);
        }
        self
    }

    /// Sites of which the first has let all others in.
    pub fn joined(test: &str, count: usize) -> Self {
        let mut sites = Self::up(test, count);
        for joiner in 1..count {
            let token = sites.invite(0, hour());
            assert_eq!(sites.join(joiner, token), Ok(site(0)));
            let all: Vec<_> = (0..=joiner).collect();
            sites.run_until("joined", seconds(180), |sites| sites.all_route(&all) && sites.one_ring(&all));
        }
        sites
    }

    pub fn start_site(&mut self, number: usize, name: SiteName, prefix: Subnet) {
        for node in nodes(number) {
            self.start(node, name.clone(), prefix);
        }
    }

    fn start(&mut self, node: usize, site: SiteName, prefix: Subnet) {
        let of = node / SIZE;
        let seeds = nodes(of).take(2).map(address).collect();
        let ring = ring(&[of as u8 + 1]);
        self.net.start(MeshConfig { site, seeds, ring, ..config(node, 1) }, store(of));
        let signer = (node == speaker(of)).then(|| site_key(of));
        let trust = Trust { site: site_key(of).public(), prefixes: vec![prefix], signer };
        self.net.with(node, |mesh, now| mesh.set_trust(trust, Vec::new(), now)).unwrap();
        self.running.insert(node);
        self.net.announce(node, facts(node));
    }

    /// Has a node start anew, for the time `starts`.
    pub fn restart(&mut self, node: usize, starts: u64) {
        let ring = self.net.mesh(node).ring().clone();
        self.stop(node);
        self.start_again(node, starts, ring, Vec::new(), None);
    }

    /// Ends a node without a word.
    pub fn stop(&mut self, node: usize) {
        self.net.crash(node);
        self.running.remove(&node);
    }

    /// Starts a node that ran before, with what it remembers.
    pub fn start_again(
        &mut self,
        node: usize,
        starts: u64,
        ring: KeyRing,
        statements: Vec<SignedStatement>,
        signer: Option<SiteKey>,
    ) {
        let of = node / SIZE;
        let seeds = nodes(of).take(2).map(address).collect();
        let config = MeshConfig { site: site(of), seeds, ring, ..config(node, starts) };
        self.net.start(config, store(of));
        let trust = Trust { site: site_key(of).public(), prefixes: vec![prefix_of(of)], signer };
        self.net.with(node, |mesh, now| mesh.set_trust(trust, statements, now)).unwrap();
        self.looked.remove(&node);
        if let Some((version, ring)) = self.wanted.get(&node).cloned() {
            self.net.with(node, |mesh, now| {
                mesh.set_wanted_ring(version, ring.clone(), now);
                mesh.follow_ring(RingName::of(version, &ring), ring, now);
            });
        }
        self.running.insert(node);
        self.announce(node);
    }

    fn announce(&mut self, node: usize) {
        let tunnel = TunnelFacts {
            key: TunnelKey([node as u8 + 1; 32]),
            port: 51820,
            preshared: self.net.mesh(node).ring().ids().collect(),
            pairs: Vec::new(),
            carrier: None,
            detour: None,
        };
        let tunnel = Some(tunnel).filter(|_| self.tunnels);
        self.net.announce(node, Facts { tunnel, ..facts(node) });
    }

    /// Has a node start anew under the name of another, with its own key and lease.
    pub fn rename(&mut self, node: usize, as_node: usize) -> usize {
        let of = node / SIZE;
        let ring = self.net.mesh(node).ring().clone();
        self.net.crash(node);
        self.running.remove(&node);
        let seeds = nodes(of).take(2).map(address).collect();
        let config = MeshConfig { site: site(of), seeds, ring, ..config(node, 2) };
        let renamed = MeshConfig { node: name(as_node), ..config };
        let owner = |owned: usize| {
            let node = if owned == node { name(as_node) } else { name(owned) };
            (subnet(owned), Owner { node, key: key(owned, 1).public(), epoch: Epoch(owned as u64 + 1) })
        };
        let table = Authority::Store(Arc::new(nodes(of).map(owner).collect()));
        for other in nodes(of).filter(|other| *other != node) {
            let table = table.clone();
            self.net.with(other, |mesh, now| mesh.set_authority(table, now));
        }
        self.net.start_at(address(node), renamed, table);
        let trust = Trust { site: site_key(of).public(), prefixes: vec![prefix_of(of)], signer: None };
        self.net.with(node, |mesh, now| mesh.set_trust(trust, Vec::new(), now)).unwrap();
        self.net.announce(node, facts(node));
        node
    }

    pub fn with_speaker<T>(&mut self, site: usize, call: impl FnOnce(&mut Mesh, Instant) -> T) -> T {
        self.net.with(speaker(site), call)
    }

    pub fn invite(&mut self, site: usize, valid: Duration) -> Token {
        self.invite_with(site, terms(valid))
    }

    pub fn invite_with(&mut self, site: usize, terms: Terms) -> Token {
        self.with_speaker(site, |mesh, now| mesh.invite(terms, now)).unwrap()
    }

    /// Joins, and returns what the person who asked for it hears.
    pub fn join(&mut self, site: usize, token: Token) -> Result<SiteName, String> {
        let addresses = token.addresses.clone();
        self.with_speaker(site, |mesh, now| mesh.join(token, now)).map_err(|error| error.to_string())?;
        let ended = self.ended(site);
        if ended.is_ok() {
            let seeds = nodes(site).take(2).map(address).chain(addresses).collect();
            self.with_speaker(site, |mesh, now| mesh.set_seeds(seeds, now));
        }
        ended
    }

    /// Waits for the end of the joining that was begun last.
    pub fn ended(&mut self, site: usize) -> Result<SiteName, String> {
        let count = |sites: &Self| {
            let ended = |event: &&MeshEvent| matches!(event, MeshEvent::JoinEnded(_));
            sites.net.events(speaker(site)).iter().filter(ended).count()
        };
        let before = count(self);
        self.run_until("joining ends", seconds(30), |sites| count(sites) > before);
        let events = self.net.events(speaker(site)).iter().rev();
        let mut ended = events.filter_map(|event| match event {
            MeshEvent::JoinEnded(outcome) => Some(outcome.clone()),
            _ => None,
        });
        ended.next().unwrap()
    }

    /// What the speaker of a site told of joins that could not be.
    pub fn told(&self, site: usize) -> Vec<String> {
        let told = |event: &MeshEvent| match event {
            MeshEvent::JoinRefused(sentence) => Some(sentence.clone()),
            _ => None,
        };
        self.net.events(speaker(site)).iter().filter_map(told).collect()
    }

    /// How a node thinks that the other sites stand.
    pub fn standing(&self, node: usize) -> BTreeMap<SiteName, String> {
        let word = |view: &SiteView| match view.standing {
            SiteStanding::Unknown => "unknown",
            SiteStanding::Member { .. } => "member",
            SiteStanding::Expelled => "expelled",
            SiteStanding::Left => "left",
        };
        self.net.mesh(node).sites().map(|view| (view.site.clone(), word(view).to_owned())).collect()
    }

    /// Gives the mesh another key, from the speaker of a site.
    pub fn renew(&mut self, site: usize) {
        self.renewals += 1;
        let ring = ring(&[self.renewals]);
        self.with_speaker(site, |mesh, now| mesh.rekey(ring, now)).unwrap();
    }

    /// Has a site that has left change its keys after a while.
    pub fn part_in(&mut self, site: usize, after: Duration) {
        self.parting.push((site, self.net.net.now + after));
    }

    /// A random time below so many seconds.
    pub fn some_seconds(&mut self, most: u64) -> Duration {
        seconds(self.net.net.rng.next_u64() % most)
    }

    /// Has a site hear nobody else, and nobody else it, until it is joined up again.
    pub fn cut_off(&mut self, site: usize) {
        self.net.net.sides.extend(nodes(site).map(|node| (address(node), 1)));
    }

    pub fn join_up(&mut self, site: usize) {
        self.net.net.sides.retain(|at, _| !nodes(site).map(address).any(|node| node == *at));
    }

    pub fn run(&mut self, time: Duration) {
        let end = self.net.net.now + time;
        while self.net.net.now < end {
            self.net.run(Duration::from_millis(100));
            self.drive();
        }
    }

    pub fn run_until(
        &mut self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut(&Self) -> bool,
    ) -> Duration {
        let start = self.net.net.now;
        while !done(self) {
            assert!(
                self.net.net.now < start + limit,
                "{what}: not within {limit:?}; WEFT_SEED={}",
                self.net.seed
            );
            self.run(Duration::from_millis(100));
        }
        self.net.net.now - start
    }

    /// What the daemon around each mesh does.
    fn drive(&mut self) {
        let now = self.net.net.now;
        let (due, later) = std::mem::take(&mut self.parting).into_iter().partition(|(_, at)| *at <= now);
        self.parting = later;
        let due: Vec<(usize, Instant)> = due;
        due.into_iter().for_each(|(site, _)| self.renew(site));
        let running: Vec<usize> = self.running.iter().copied().collect();
        for node in running {
            let seen = self.looked.get(&node).copied().unwrap_or(0);
            let events = self.net.events(node)[seen..].to_vec();
            self.looked.insert(node, seen + events.len());
            let mut left = false;
            for event in events {
                match event {
                    MeshEvent::RingWanted { version, ring } => {
                        self.wanted.insert(node, (version, ring.clone()));
                        let name = RingName::of(version, &ring);
                        self.net.with(node, |mesh, now| mesh.follow_ring(name, ring, now));
                    }
                    MeshEvent::SiteLeft { .. } => left = true,
                    _ => {}
                }
            }
            if left {
                self.renew(node / SIZE);
            }
            self.step(node);
            if self.watched && !self.inside(node) {
                self.lost_inside = true;
            }
        }
    }

    /// One step from the ring that a node has to the one that is wanted, if there is one to take.
    fn step(&mut self, node: usize) {
        let step = self.net.with(node, |mesh, now| mesh.ring_step(false, now)).unwrap();
        if let RingStep::Take(ring) = step {
            self.net.with(node, |mesh, now| mesh.set_ring(ring, now));
            if self.tunnels {
                self.announce(node);
            }
        }
    }

    fn accepts(&self, node: usize, other: usize) -> bool {
        node == other
            || self.net.mesh(node).member(&name(other)).is_some_and(|member| member.routed.is_some())
    }

    fn inside(&self, node: usize) -> bool {
        nodes(node / SIZE).filter(|other| self.running.contains(other)).all(|other| self.accepts(node, other))
    }

    pub fn inside_whole(&self, site: usize) -> bool {
        nodes(site).all(|node| self.inside(node))
    }

    /// Whether every node of a site routes to every node of another.
    pub fn routes(&self, from: usize, to: usize) -> bool {
        nodes(from).all(|node| nodes(to).all(|other| self.accepts(node, other)))
    }

    pub fn all_route(&self, sites: &[usize]) -> bool {
        sites.iter().all(|from| sites.iter().all(|to| self.routes(*from, *to)))
    }

    pub fn routes_nothing(&self, from: usize, to: usize) -> bool {
        nodes(from).all(|node| nodes(to).all(|other| !self.accepts(node, other)))
    }

    fn rings(&self, sites: &[usize]) -> BTreeSet<Vec<KeyId>> {
        let nodes = sites.iter().flat_map(|site| nodes(*site));
        nodes.map(|node| self.net.mesh(node).ring().ids().collect()).collect()
    }

    /// Whether all nodes of these sites have the same single ring.
    pub fn one_ring(&self, sites: &[usize]) -> bool {
        self.rings(sites).len() == 1
    }

    /// Whether no node of `other` opens anything that these sites say.
    pub fn no_common_key(&self, sites: &[usize], other: usize) -> bool {
        let theirs: BTreeSet<KeyId> = self.rings(&[other]).into_iter().flatten().collect();
        self.rings(sites).into_iter().flatten().all(|id| !theirs.contains(&id))
    }
}
