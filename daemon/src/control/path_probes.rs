//! Who is probed when: the part between [`path_mtu`], [`quality`] and the sockets. Pure.
//!
//! A node asks a few peers of its own choice, O(log n) of them, and those that it sends pod packets to. It wakes no
//! WireGuard session that nothing else uses: where a tunnel is idle, gossip's round trips have to do.
//!
//! Invariants: what is remembered is bounded by the peers that have a route; a node sends a bounded number of probes a
//! second, whatever the number of peers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_core::RngCore;
use tracing::{debug, info};
use weft_wire::mesh::{MemberState, MemberView};
use weft_wire::types::{NodeName, Subnet};

use super::path_mtu::Search;
use super::probe::{self, Kind};
use super::quality::{Estimate, Quality};
use super::{Control, Output};
use crate::kernel::Traffic;
use crate::plan::model::Transport;
use crate::reconcile::RouteStatus;

/// Between two probes of a peer that packets are sent to: what it takes to notice a black hole.
const BUSY: Duration = Duration::from_millis(500);
/// With more busy peers than this, each is probed less often.
const BUSY_PEERS: u32 = 32;
/// A peer is busy until nothing was sent to it for so long.
const LINGER: Duration = Duration::from_secs(5);
/// Between two probes of a peer that is only sampled, and how many of these are small for one that is of full size.
const SAMPLED: Duration = Duration::from_secs(5);
const SMALL_ONES: u32 = 12;
/// How long a sample of peers is kept.
const RESAMPLE: Duration = Duration::from_secs(300);
/// How many peers are searched at once.
const SEARCHES: usize = 16;
/// How many probes may wait for an answer.
const OPEN: usize = 4096;
/// How long an answer may take, at least, at most, and where no round trip is known.
const PATIENCE: (Duration, Duration, Duration) =
    (Duration::from_millis(200), Duration::from_secs(2), Duration::from_secs(1));
/// Larger packets are not searched for, in bytes.
const LARGEST: u32 = 9216;
/// What the kernel counts beside the packets themselves and nobody sent: keepalives and handshakes, in bytes.
const SLACK: u64 = 512;
/// The kernel's times of last use are this coarse.
const COARSE: Duration = Duration::from_millis(50);

/// A peer that can be probed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    gateway: IpAddr,
    transport: Transport,
    /// The largest packet that the devices on the way let through.
    ceiling: u32,
    overhead: u32,
    /// Which way it is, in words: another way is another path.
    how: String,
    underlay: Vec<IpAddr>,
    alive: bool,
}

#[derive(Debug)]
struct Tracked {
    target: Target,
    search: Search,
    estimate: Estimate,
    /// When the next probe is due that only measures.
    next: Instant,
    count: u32,
    busy_until: Option<Instant>,
    /// What this node itself sent last, and how much since the kernel was last asked.
    own: Option<Instant>,
    own_bytes: u64,
    /// And between the time before and the last time: what is on its way while the kernel counts is in either.
    own_before: u64,
    /// What the kernel had counted when it was last asked.
    sent_bytes: Option<u64>,
}

#[derive(Debug)]
struct Open {
    node: NodeName,
    size: u32,
    sent: Instant,
    until: Instant,
    /// It is one of those that measure, not of a search.
    measures: bool,
}

/// The probes of one node.
#[derive(Debug)]
pub struct PathProbes {
    peers: BTreeMap<NodeName, Tracked>,
    /// What an earlier run found, until there is a search.
    remembered: BTreeMap<NodeName, u32>,
    sample: BTreeSet<NodeName>,
    busy: BTreeSet<NodeName>,
    resample: Instant,
    open: BTreeMap<u64, Open>,
    draws: ChaCha8Rng,
    wake: Instant,
}

impl PathProbes {
    /// Starts with the limits that an earlier run found.
    pub(super) fn new(remembered: BTreeMap<NodeName, u32>, draws: ChaCha8Rng, now: Instant) -> Self {
        Self {
            peers: BTreeMap::new(),
            remembered,
            sample: BTreeSet::new(),
            busy: BTreeSet::new(),
            resample: now,
            open: BTreeMap::new(),
            draws,
            wake: now,
        }
    }

    /// What a packet to a peer may have at most, where the path carries less than its devices.
    pub fn limit(&self, node: &NodeName) -> Option<u32> {
        match self.peers.get(node) {
            Some(tracked) => tracked.search.limit(),
            None => self.remembered.get(node).copied(),
        }
    }

    /// The size that was measured towards a peer.
    pub fn measured(&self, node: &NodeName) -> Option<u32> {
        self.peers.get(node).and_then(|tracked| tracked.search.measured())
    }

    /// Returns the peers that small packets reach and larger ones do not, of whatever size.
    pub fn closed(&self) -> impl Iterator<Item = &NodeName> {
        self.peers.iter().filter(|(_, tracked)| tracked.search.is_closed()).map(|(node, _)| node)
    }

    /// Returns the peers whose path carries less than its devices, with what it carries and what they do.
    pub fn narrow(&self) -> impl Iterator<Item = (&NodeName, u32, u32)> {
        let narrow =
            |(node, tracked): (_, &Tracked)| Some((node, tracked.search.limit()?, tracked.target.ceiling));
        self.peers.iter().filter_map(narrow)
    }

    pub(super) fn quality(&self, node: &NodeName, now: Instant) -> Option<Quality> {
        self.peers.get(node)?.estimate.quality(now)
    }

    /// Takes which peers have a route; forgets the others.
    fn set_targets(&mut self, targets: BTreeMap<NodeName, Target>, now: Instant) {
        self.peers.retain(|node, _| targets.contains_key(node));
        self.busy.retain(|node| targets.contains_key(node));
        self.sample.retain(|node| targets.contains_key(node));
        for (node, target) in targets {
            let same = |tracked: &&mut Tracked| {
                let known = &tracked.target;
                (known.gateway, known.ceiling, &known.how) == (target.gateway, target.ceiling, &target.how)
            };
            if let Some(tracked) = self.peers.get_mut(&node).filter(same) {
                tracked.target = target;
                continue;
            }
            let before = self.peers.remove(&node);
            let known = before.as_ref().and_then(|tracked| tracked.search.limit());
            let remembered = known.or(self.remembered.remove(&node));
            let align = if target.transport == Transport::WireGuard { 16 } else { 1 };
            let tracked = Tracked {
                search: Search::new(target.ceiling, (target.overhead, align), remembered, now),
                estimate: before.map(|tracked| tracked.estimate).unwrap_or_default(),
                target,
                next: now + SAMPLED,
                count: 0,
                busy_until: None,
                own: None,
                own_bytes: 0,
                own_before: 0,
                sent_bytes: None,
            };
            self.peers.insert(node, tracked);
        }
        if self.sample.len() < self.wanted() {
            self.resample = now;
        }
        self.wake = now;
    }

    /// How many peers are sampled.
    fn wanted(&self) -> usize {
        let most = 4 + (self.peers.len() + 1).ilog2() as usize;
        most.min(self.peers.values().filter(|tracked| tracked.is_sampled()).count())
    }

    fn draw_sample(&mut self, now: Instant) {
        self.resample = now + RESAMPLE;
        let mut candidates: Vec<_> =
            self.peers.iter().filter(|(_, tracked)| tracked.is_sampled()).map(|(node, _)| node).collect();
        let mut drawn = BTreeSet::new();
        for _ in 0..self.wanted() {
            let place = self.draws.next_u64() as usize % candidates.len();
            drawn.insert(candidates.swap_remove(place).clone());
        }
        self.sample = drawn;
    }

    /// Takes what the kernel says of what was sent to whom.
    fn handle_traffic(&mut self, traffic: &Traffic, now: Instant) {
        for (node, tracked) in &mut self.peers {
            let busy = match tracked.target.transport {
                Transport::WireGuard => tracked.sends_in_tunnel(traffic.tunnels.get(node).copied()),
                Transport::Vxlan | Transport::Direct => {
                    let idle =
                        tracked.target.underlay.iter().filter_map(|to| traffic.endpoints.get(to)).min();
                    // What this node sent itself is no traffic.
                    let own = tracked.own.map(|own| now.saturating_duration_since(own));
                    idle.is_some_and(|idle| *idle < LINGER && own.is_none_or(|own| *idle + COARSE < own))
                }
            };
            if busy {
                tracked.busy_until = Some(now + LINGER);
                if self.busy.insert(node.clone()) {
                    debug!(peer = %node, "packets are sent there");
                    tracked.next = tracked.next.min(now);
                    self.wake = now;
                }
            } else if tracked.busy_until.is_some_and(|until| until <= now) {
                tracked.busy_until = None;
                self.busy.remove(node);
            }
        }
    }

    /// Does what is due; returns what to send, and whether a limit changed.
    fn poll(&mut self, now: Instant) -> (Vec<(SocketAddr, Vec<u8>)>, bool) {
        if self.resample <= now {
            self.draw_sample(now);
        }
        let before: Vec<_> = self.active().map(|node| (node.clone(), self.limit(node))).collect();
        self.expire(now);
        let between = BUSY * (self.busy.len() as u32).div_ceil(BUSY_PEERS).max(1);
        let mut searches = self.active().filter(|node| self.peers[*node].search.is_asking()).count();
        let mut out = Vec::new();
        for (node, _) in &before {
            let Some(tracked) = self.peers.get_mut(node).filter(|tracked| tracked.target.alive) else {
                continue;
            };
            let patience = tracked.patience();
            let may_search = tracked.search.is_asking() || searches < SEARCHES;
            let asked = if may_search { tracked.search.poll(patience, now) } else { None };
            let smallest = tracked.smallest();
            let mut sizes = Vec::new();
            if let Some(ask) = asked {
                debug!(peer = %node, sizes = ?ask.sizes, small = ask.small, "path searched");
                searches += 1;
                sizes.extend(ask.sizes.into_iter().map(|size| (size, false)));
                sizes.extend(ask.small.then_some((smallest, false)));
            } else if tracked.next <= now && tracked.estimate.heard() && !tracked.search.is_asking() {
                let busy = self.busy.contains(node);
                tracked.next = now + if busy { between } else { SAMPLED };
                tracked.count += 1;
                let full = busy || tracked.count.is_multiple_of(SMALL_ONES);
                sizes.push((tracked.search.measured().filter(|_| full).unwrap_or(smallest), true));
            } else if tracked.next <= now {
                tracked.next = now + SAMPLED;
            }
            for (size, measures) in sizes {
                if self.open.len() >= OPEN {
                    break;
                }
                let token = self.draws.next_u64();
                let until = now + patience;
                self.open.insert(token, Open { node: node.clone(), size, sent: now, until, measures });
                tracked.note_own(size, now);
                let header = tracked.target.headers();
                let datagram = probe::message(Kind::Echo, token, size.saturating_sub(header) as usize);
                out.push((SocketAddr::new(tracked.target.gateway, probe::PORT), datagram));
            }
        }
        self.set_wake(now);
        let mut changed = false;
        for (node, limit) in before {
            let found = self.limit(&node);
            if found != limit {
                info!(peer = %node, mtu = ?found, "path MTU changed");
                changed = true;
            }
        }
        (out, changed)
    }

    /// Takes an answer; returns whether a limit changed.
    fn handle_answer(&mut self, from: IpAddr, token: u64, now: Instant) -> bool {
        let expected =
            |open: &Open| self.peers.get(&open.node).is_some_and(|tracked| tracked.target.gateway == from);
        if !self.open.get(&token).is_some_and(expected) {
            return false;
        }
        let Some(open) = self.open.remove(&token) else { return false };
        let Some(tracked) = self.peers.get_mut(&open.node) else { return false };
        let before = tracked.search.limit();
        tracked.estimate.answered(now.saturating_duration_since(open.sent), now);
        if open.measures {
            tracked.estimate.counted(false);
        }
        tracked.search.handle_answer(open.size, now);
        self.wake = self.wake.min(tracked.search.wake().unwrap_or(self.wake));
        let found = tracked.search.limit();
        if found != before {
            info!(peer = %open.node, mtu = ?found, "path MTU changed");
        }
        found != before
    }

    fn expire(&mut self, now: Instant) {
        for (_, open) in self.open.extract_if(.., |_, open| open.until <= now) {
            let Some(tracked) = self.peers.get_mut(&open.node).filter(|_| open.measures) else { continue };
            tracked.estimate.counted(true);
            if tracked.search.measured() == Some(open.size) {
                tracked.search.doubt(now);
            }
        }
    }

    fn active(&self) -> impl Iterator<Item = &NodeName> {
        self.sample.union(&self.busy)
    }

    fn set_wake(&mut self, now: Instant) {
        let peers = self.active().filter_map(|node| self.peers.get(node));
        let peers = peers.filter(|tracked| tracked.target.alive);
        let dues = peers.flat_map(|tracked| {
            let probe = Some(tracked.next).filter(|_| !tracked.search.is_asking());
            [probe, tracked.search.wake()].into_iter().flatten()
        });
        let open = self.open.values().map(|open| open.until);
        let next = dues.chain(open).chain([self.resample]).min().unwrap_or(self.resample);
        // Searches that wait for others to end are looked at soon.
        self.wake = next.max(now + Duration::from_millis(10));
    }
}

impl Target {
    /// The headers of a probe, in bytes: IP and UDP.
    fn headers(&self) -> u32 {
        if self.gateway.is_ipv4() { 28 } else { 48 }
    }
}

impl Tracked {
    /// Whether it may be probed while nothing else is sent to it.
    fn is_sampled(&self) -> bool {
        self.target.transport != Transport::WireGuard
    }

    fn smallest(&self) -> u32 {
        self.target.headers() + probe::LENGTH as u32
    }

    fn patience(&self) -> Duration {
        let (least, most, unknown) = PATIENCE;
        self.estimate.rtt().map_or(unknown, |rtt| (rtt * 4).clamp(least, most))
    }

    fn note_own(&mut self, size: u32, now: Instant) {
        self.own = Some(now);
        self.own_bytes += u64::from(size);
    }

    /// Whether more was sent in the tunnel than this node's own probes and answers.
    fn sends_in_tunnel(&mut self, sent: Option<u64>) -> bool {
        let before = std::mem::replace(&mut self.sent_bytes, sent);
        let recent = std::mem::take(&mut self.own_bytes);
        let own = recent + std::mem::replace(&mut self.own_before, recent);
        // Another device, or a new session, counts from the beginning.
        let more = sent.zip(before).map(|(sent, before)| sent.saturating_sub(before));
        more.is_some_and(|more| more > own + own / 4 + SLACK)
    }
}

impl Control {
    /// Takes a datagram that came through a tunnel or over the common link to the node's gateway address.
    pub fn handle_probe(&mut self, from: SocketAddr, datagram: &[u8], now: Instant) {
        match probe::parse(datagram) {
            Some((Kind::Checksum, token)) => self.answer_checksum_probe(from, token),
            Some((Kind::Echo, token)) => {
                // Only a peer's gateway is answered, where it listens, by less than it sent.
                let Some(node) = self.gateway_owner(from.ip()) else { return };
                let answer = probe::message(Kind::EchoAnswer, token, probe::LENGTH);
                if let Some(tracked) = self.path_probes.peers.get_mut(&node) {
                    tracked.note_own(tracked.smallest(), now);
                    let size = datagram.len() as u32 + tracked.target.headers();
                    tracked.search.hint(size, now);
                    let wake = tracked.search.wake().unwrap_or(self.path_probes.wake);
                    self.path_probes.wake = self.path_probes.wake.min(wake);
                }
                let to = SocketAddr::new(from.ip(), probe::PORT);
                self.outputs.push_back(Output::Probe { to, datagram: answer });
            }
            Some((Kind::EchoAnswer, token)) => {
                if self.path_probes.handle_answer(from.ip(), token, now) {
                    self.wake(now);
                }
            }
            Some((Kind::ChecksumAnswer, _)) | None => {}
        }
    }

    /// Takes what the kernel says of what was sent to whom.
    pub fn handle_traffic(&mut self, traffic: &Traffic, now: Instant) {
        self.path_probes.handle_traffic(traffic, now);
    }

    /// Returns whose gateway address it is.
    fn gateway_owner(&self, address: IpAddr) -> Option<NodeName> {
        let owns = |member: &MemberView<'_>| {
            member.routed.is_some_and(|record| {
                record.facts.subnets.iter().any(|leased| leased.subnet.gateway() == address)
            })
        };
        self.mesh.members().find(owns).map(|member| member.node.clone())
    }

    pub(super) fn path_probes_wake(&self) -> Instant {
        self.path_probes.wake
    }

    /// Probes whom it is time for; returns whether there was anything to do.
    pub(super) fn probe_paths(&mut self, now: Instant) -> bool {
        if self.path_probes.wake > now {
            return false;
        }
        let (probes, changed) = self.path_probes.poll(now);
        self.outputs.extend(probes.into_iter().map(|(to, datagram)| Output::Probe { to, datagram }));
        if changed {
            self.wake(now);
        }
        true
    }

    /// Follows the routes of the last pass: who has one can be probed.
    pub(super) fn follow_routes(&mut self, now: Instant) {
        let Some(report) = self.pass.report.as_ref().filter(|report| report.pod_mtu > 0) else { return };
        let own = self.subnets();
        let reached = |route: &&RouteStatus| {
            route.installed && own.iter().any(|subnet| subnet.is_ipv4() == route.prefix.addr().is_ipv4())
        };
        let mut targets: BTreeMap<NodeName, Target> = BTreeMap::new();
        for route in report.routes.iter().filter(reached) {
            let first = targets.get(&route.node).is_none_or(|known| !known.gateway.is_ipv4());
            let Some(member) = self.mesh.member(&route.node).filter(|_| first) else { continue };
            let Ok(subnet) = Subnet::try_from(route.prefix) else { continue };
            if targets.contains_key(&route.node) && !subnet.is_ipv4() {
                continue;
            }
            let target = Target {
                gateway: subnet.gateway(),
                transport: route.transport,
                ceiling: route.room.min(report.pod_mtu).min(LARGEST),
                overhead: route.overhead,
                how: route.reason.clone(),
                underlay: member.record.facts.underlay.clone(),
                alive: member.state == MemberState::Alive,
            };
            targets.insert(route.node.clone(), target);
        }
        self.path_probes.set_targets(targets, now);
    }
}

#[cfg(test)]
mod tests;
