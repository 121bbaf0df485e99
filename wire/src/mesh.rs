//! The gossip mesh: who is in it, who lives, and what each node signed.
//!
//! A pure state machine: datagrams and `now` in, datagrams and events out. It opens no socket and reads no
//! clock, and it neither leases subnets nor programs routes. Drain [`Mesh::poll_output`] until
//! [`Output::Wait`] after every call. `docs/protocol.md` describes what crosses the network.
//!
//! Invariants: a member is a node whose record was verified; a datagram that is rejected changes nothing
//! but a counter; no datagram and no timeout costs time in proportion to the number of members, but for a new word of a site,
//! after which all are judged again, at most five times a second.

mod api;
mod contact;
mod forward;
#[cfg(fuzzing)]
pub mod fuzz;
mod gossip;
mod grants;
mod join;
mod membership;
mod merge;
mod pairs;
mod paths;
mod probe;
mod proof;
pub(crate) mod proto;
mod quota;
mod reach;
mod ring;
mod routes;
mod sites;
mod sync;
mod timer;
mod trust;
mod watch;
mod way;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message;
use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

pub use crate::record::{
    Capabilities, Carrier, Detour, Facts, LeasedSubnet, NodeKey, NodeRecord, Reach, Reachability,
    TunnelFacts, TunnelMapping, TunnelReach,
};
pub use api::{
    Authority, Bound, Counters, LeaseTable, MemberState, MemberView, MeshConfig, MeshEvent, Output, Owner,
    Rejected, SiteStanding, SiteView, Timing, Trust, UnknownNode, Verdict,
};
pub use forward::NotForwarded;
pub use join::{JoinError, LONGEST_INVITATION, Terms};
pub use paths::{MAX_CALLED, PathWord, RelayRefusal};
pub use quota::{MOST_OF_SITE, MOST_UNCERTIFIED};
pub use reach::{KeeperView, Mapping, ReachView};
pub use ring::RingStep;
pub use trust::WordError;

use crate::record::{SignedRecord, socket_from_bytes};
use crate::seal::{KeyId, KeyRing, OpenError, key_id};
use crate::site::{Certificate, SiteKey};
use crate::types::NodeName;
use forward::Shares;
use gossip::{Queue, Topic};
use grants::Grants;
use join::Joins;
use membership::{Table, name_hash};
use pairs::Pairs;
use probe::{Pending, Probe};
use proof::Credit;
use proto::{Body, Liveness};
use ring::Change;
use routes::Routes;
use sites::Sites;
use timer::{Timer, Timers};
use watch::Watch;

/// Versions and incarnations from the network stay below this, so that there is always a next one.
const MOST: u64 = 1 << 63;
/// The bytes of updates that always fit beside a body without updates of its own.
const ROOM: usize = 950;
/// Between two events that report the same trouble.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);
/// Between two challenges of one sender.
const CHALLENGE_INTERVAL: Duration = Duration::from_secs(1);
/// Sequence numbers begin here, so that the encoded ones are of one length and a challenge is no longer than what it answers.
const FIRST_SEQ: u64 = 1 << 28;
/// A node that leaves tells so many members itself; gossip tells the rest.
const FAREWELLS: usize = 8;

/// One node's view of the mesh.
#[derive(Debug)]
pub struct Mesh {
    config: MeshConfig,
    hash: u64,
    rng: ChaCha8Rng,
    now: Instant,
    started: Instant,
    session: u64,
    seq: u64,
    /// SWIM's incarnation of this node.
    incarnation: u64,
    /// The version of the record signed last.
    version: u64,
    facts: Option<Facts>,
    leaving: bool,
    table: Table,
    routes: Routes,
    routes_dirty: bool,
    sites: Sites,
    /// The secret key of the own site, on a node that speaks for it.
    signer: Option<SiteKey>,
    /// The site's word for what this node announces.
    certificate: Option<Certificate>,
    /// The name hashes of members that wait for a certificate of this node.
    uncertified: BTreeSet<u64>,
    /// Who was sent one last.
    certified_last: u64,
    /// What sites say has changed, and the members are to be judged again.
    rejudge: bool,
    /// How often another node has given the own site another name.
    renamed: u32,
    /// To the cluster keys that this node follows.
    change: Option<Change>,
    /// The cluster keys that the mesh is to have, and who has not got them.
    grants: Grants,
    /// Invitations of this node, and its own way in.
    joins: Joins,
    /// The secrets that the own site shares with others.
    pairs: Pairs,
    queue: Queue,
    /// When the next round of gossip is.
    gossip_at: Option<Instant>,
    sync_at: Instant,
    /// Until the exchange after the next one: short after news, and twice as long each time without.
    sync_pause: Duration,
    probe: Option<Probe>,
    watch: Watch,
    /// Lifeguard's local health: 0 is well.
    health: u32,
    pending: BTreeMap<u64, Pending>,
    /// What may still be sent because of the datagram that is being taken in; anything where its sender has answered before.
    credit: Option<Credit>,
    seed_owners: BTreeMap<SocketAddr, u64>,
    timers: Timers,
    /// How this node is reached.
    reach: reach::State,
    /// What it passes on for whom.
    shares: Shares,
    outputs: VecDeque<Output>,
    last_duplicate: Option<Instant>,
    last_wrong_key: Option<Instant>,
    last_two_sites: Option<Instant>,
    /// Which bounds were told of lately.
    told_bounds: BTreeMap<Bound, Instant>,
    /// Since when, and how often, records of this node turned up that it does not remember.
    own_records: (Instant, u32),
    counters: Counters,
}

/// Whom a datagram came from, and where an answer goes.
#[derive(Debug, Clone)]
struct ReplyTo {
    from: SocketAddr,
    /// It came through a keeper, at `from`: the sender is elsewhere.
    forwarded: bool,
    /// The cluster key that sealed it.
    key: KeyId,
    name: NodeName,
    hash: u64,
}

impl Mesh {
    /// Makes a mesh that knows only its seeds. `seed` comes from a cryptographic random number generator.
    ///
    /// No record with subnets is accepted before [`Mesh::set_authority`]; nothing is told about the node
    /// before [`Mesh::announce`], though it joins and listens.
    pub fn new(mut config: MeshConfig, seed: [u8; 32], now: Instant) -> Self {
        config.timing = config.timing.bounded();
        let mut rng = ChaCha8Rng::from_seed(seed);
        // Later starts have higher sessions, so a replayed earlier session is known as such.
        let starts = config.incarnation.min(MOST >> 33);
        let session = starts << 32 | u64::from(rng.next_u32());
        let mut timers = Timers::default();
        timers.set(now, Timer::Rejoin);
        let phase = membership::below(&mut rng, 256) as f64 / 256.0;
        timers.set(now + config.timing.probe_interval.mul_f64(phase), Timer::Probe);
        let sync_at = now + config.timing.sync_interval.mul_f64(0.5 + phase / 2.0);
        timers.set(sync_at, Timer::Sync);
        let hash = name_hash(config.node.as_str());
        Self {
            hash,
            rng,
            now,
            started: now,
            session,
            seq: FIRST_SEQ,
            incarnation: starts << 32,
            version: starts << 32,
            facts: None,
            leaving: false,
            table: Table::default(),
            routes: Routes::default(),
            routes_dirty: false,
            sites: Sites::default(),
            signer: None,
            certificate: None,
            uncertified: BTreeSet::new(),
            certified_last: 0,
            rejudge: false,
            renamed: 0,
            change: None,
            grants: Grants::default(),
            joins: Joins::default(),
            pairs: Pairs::default(),
            queue: Queue::new(hash),
            gossip_at: None,
            sync_at,
            sync_pause: config.timing.sync_interval,
            probe: None,
            watch: Watch::default(),
            health: 0,
            pending: BTreeMap::new(),
            credit: None,
            seed_owners: BTreeMap::new(),
            timers,
            reach: reach::State::default(),
            shares: Shares::default(),
            outputs: VecDeque::new(),
            last_duplicate: None,
            last_wrong_key: None,
            last_two_sites: None,
            told_bounds: BTreeMap::new(),
            own_records: (now, 0),
            counters: Counters::default(),
            config,
        }
    }

    /// Takes a datagram from the network.
    ///
    /// State is unchanged, but for the counters, when this returns an error.
    pub fn handle_datagram(
        &mut self,
        from: SocketAddr,
        datagram: &[u8],
        now: Instant,
    ) -> Result<(), Rejected> {
        self.advance(now);
        self.counters.received += 1;
        self.counters.received_bytes += datagram.len() as u64;
        let result = self.receive(from, datagram);
        if let Err(reason) = result {
            self.counters.rejected[reason as usize] += 1;
            if reason == Rejected::UnknownKey
                && self.last_wrong_key.is_none_or(|last| self.now >= last + REPORT_INTERVAL)
            {
                self.last_wrong_key = Some(self.now);
                self.outputs.push_back(Output::Event(MeshEvent::WrongKey { from }));
            }
        }
        self.settle();
        result
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.advance(now);
        while let Some((at, timer)) = self.timers.pop_due(self.now) {
            match timer {
                Timer::Probe => self.on_probe_timer(),
                Timer::ProbeLate(token) => self.on_probe_late(token),
                Timer::Gossip => self.on_gossip_timer(),
                Timer::Sync if at == self.sync_at => self.on_sync_timer(),
                Timer::Sync => {}
                Timer::Rejoin => self.on_rejoin_timer(),
                Timer::Suspicion(hash) => self.on_suspicion_timer(hash),
                Timer::Accuse(hash) => self.on_accuse_timer(hash),
                Timer::Reap(hash) => self.on_reap_timer(hash),
                Timer::Expire(token) => self.on_expire_timer(token),
                Timer::Certify => self.on_certify_timer(),
                Timer::Rename => self.on_rename_timer(),
                Timer::Judge => self.on_judge_timer(),
                Timer::Watch => self.on_watch_timer(),
                Timer::Reach => self.on_reach_timer(),
                Timer::Again(hash) => self.on_again_timer(hash),
                Timer::Grant => self.on_grant_timer(),
                Timer::Join => self.on_join_timer(),
                Timer::Pairs => self.on_pair_timer(),
            }
        }
        self.settle();
    }

    /// Signs and spreads what the node offers, if it differs from the last announcement.
    ///
    /// What goes beyond the limits of [`Facts`] is left out. After [`Mesh::leave`] the node joins again.
    pub fn announce(&mut self, facts: Facts, now: Instant) {
        self.advance(now);
        if self.facts.as_ref() != Some(&facts) || self.leaving {
            self.facts = Some(facts);
            self.leaving = false;
            self.take_outside();
            self.resign();
            self.arm_watch();
        }
        self.settle();
    }

    /// Replaces the view of who owns what, and judges all known records again.
    pub fn set_authority(&mut self, authority: Authority, now: Instant) {
        self.advance(now);
        self.replace_authority(authority);
        self.settle();
    }

    /// Replaces the addresses to look for peers at.
    pub fn set_seeds(&mut self, seeds: Vec<SocketAddr>, now: Instant) {
        self.advance(now);
        if seeds != self.config.seeds {
            self.seed_owners.retain(|seed, _| seeds.contains(seed));
            self.config.seeds = seeds;
        }
        self.settle();
    }

    /// Returns the cluster keys.
    pub fn ring(&self) -> &KeyRing {
        &self.config.ring
    }

    /// Replaces the cluster keys: the first seals from now on, every one opens, and the record says so.
    pub fn set_ring(&mut self, ring: KeyRing, now: Instant) {
        self.advance(now);
        if self.config.ring != ring {
            let seals_anew = self.config.ring.first() != ring.first();
            self.config.ring = ring;
            self.resign();
            if seals_anew && !self.leaving {
                // Whoever could not open what this node sealed until now.
                self.ping_seeds(self.strange_seeds());
            }
        }
        self.settle();
    }

    /// Signs with another key from now on, which the present one endorses. Persist [`Mesh::key`] after it.
    pub fn rotate_key(&mut self, key: NodeKey, now: Instant) {
        self.advance(now);
        let old = &self.config.key;
        if key.public() != old.public() {
            self.config.key = key.endorsed_by(old, &self.config.cluster, &self.config.node);
            self.resign();
        }
        self.settle();
    }

    /// Returns the signing key with its endorsements, to be persisted after [`Mesh::rotate_key`].
    pub fn key(&self) -> &NodeKey {
        &self.config.key
    }

    /// Removes a dead or departed member, here and on all nodes. Does nothing to a member that lives.
    pub fn forget(&mut self, node: &NodeName) {
        let id = self.table.find_name(node).filter(|id| self.table.at(*id).gone_since.is_some());
        if let Some(id) = id {
            let hash = self.table.at(id).hash;
            self.bury(id);
            self.queue.push(Topic::Forgotten(hash));
        }
        self.settle();
    }

    /// Sends a probe whose answer becomes [`MeshEvent::Pong`]; without an answer nothing happens.
    pub fn ping(&mut self, node: &NodeName, token: u64, now: Instant) -> Result<(), UnknownNode> {
        self.advance(now);
        let id = self.table.find_name(node).filter(|id| Some(*id) != self.table.me);
        match id {
            Some(id) if self.ping_for_user(id, token) => Ok(()),
            _ => Err(UnknownNode(node.clone())),
        }
    }

    /// Tells the mesh that the node goes away on purpose.
    ///
    /// Keep driving the mesh for two or three gossip intervals if possible, then drop it.
    pub fn leave(&mut self, now: Instant) {
        self.advance(now);
        if !self.leaving {
            self.leaving = true;
            self.resign();
            if let Some(me) = self.table.me {
                for id in self.table.sample(&mut self.rng, FAREWELLS) {
                    let first = vec![self.full_update(me)];
                    self.send_to_member(id, Body::Push(proto::Push { sync: false }), first);
                }
            }
        }
        self.settle();
    }

    /// Returns what to do next; call until it returns [`Output::Wait`].
    pub fn poll_output(&mut self, now: Instant) -> Output {
        if let Some(output) = self.outputs.pop_front() {
            return output;
        }
        if std::mem::take(&mut self.routes_dirty) {
            return Output::Event(MeshEvent::RoutesChanged);
        }
        let (until, reason) = self.timers.next().expect("the probe timer is always set");
        Output::Wait { until: until.max(now), reason }
    }

    /// Returns the peers, without the node itself, in no particular order.
    pub fn members(&self) -> impl Iterator<Item = MemberView<'_>> {
        self.table.range(..).filter(|(id, _)| Some(*id) != self.table.me).map(|(_, member)| member.view())
    }

    /// Returns a peer.
    pub fn member(&self, node: &NodeName) -> Option<MemberView<'_>> {
        let id = self.table.find_name(node).filter(|id| Some(*id) != self.table.me);
        id.map(|id| self.table.at(id).view())
    }

    /// Returns how many peers are alive or suspect, without looking at each.
    pub fn living(&self) -> usize {
        self.table.living()
    }

    /// Returns the record that the node announces, once it has.
    pub fn record(&self) -> Option<&NodeRecord> {
        self.table.me.map(|me| self.table.at(me).signed.record())
    }

    /// Returns what was counted.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    fn advance(&mut self, now: Instant) {
        self.now = self.now.max(now);
    }

    /// What every call ends with.
    fn settle(&mut self) {
        self.judge_contested();
        self.arm_gossip();
    }

    /// Signs the present facts under the next version.
    fn resign(&mut self) {
        let Some(mut facts) = self.facts.clone() else { return };
        facts.keys = self.config.ring.ids().collect();
        facts.follows = self.follows();
        facts.certificate = self.certificate_for(&facts);
        facts.reachability = self.own_reachability(std::mem::take(&mut facts.reachability.outside));
        if let Some(tunnel) = facts.tunnel.as_mut().filter(|tunnel| !tunnel.preshared.is_empty()) {
            tunnel.pairs = self.pair_ids();
        }
        self.version += 1;
        let MeshConfig { key, cluster, node, site, .. } = &self.config;
        let signed =
            SignedRecord::sign(key, cluster, node.clone(), site.clone(), self.version, facts, self.leaving);
        let signed = Arc::new(signed);
        let me = match self.table.me {
            Some(me) => {
                self.replace_record(me, signed);
                me
            }
            None => self.table.insert(signed, self.incarnation, true),
        };
        self.judge(me, true);
        self.queue.push(Topic::Record(self.hash));
    }

    fn reply(&mut self, reply: &ReplyTo, body: Body, first: Vec<proto::Update>) {
        if !reply.forwarded {
            let key = self.key_for(reply.name.as_str(), Some(reply.key));
            return self.send_under(key, reply.from, reply.name.as_str(), body, first);
        }
        // Whoever passed it on passes nothing on to somebody who did not name it: the sender's own keepers do.
        if let Some(id) = self.table.find(reply.hash) {
            self.send_to_member(id, body, first);
        }
    }

    fn receive(&mut self, from: SocketAddr, datagram: &[u8]) -> Result<(), Rejected> {
        let content = match self.config.ring.open(&self.config.cluster, datagram) {
            Err(OpenError::UnknownKey) if self.joins.knows(datagram) => {
                return self.receive_joining(from, datagram);
            }
            opened => opened?,
        };
        let message = proto::Datagram::decode(&content[..]).map_err(|_| Rejected::Malformed)?;
        let key = key_id(datagram).ok_or(Rejected::Malformed)?;
        self.receive_message(from, message, key, false, datagram.len())
    }

    fn receive_message(
        &mut self,
        from: SocketAddr,
        message: proto::Datagram,
        key: KeyId,
        forwarded: bool,
        length: usize,
    ) -> Result<(), Rejected> {
        let name: NodeName = message.from.parse().map_err(|_| Rejected::Malformed)?;
        if !message.to.is_empty() && message.to != self.config.node.as_str() {
            return Err(Rejected::Misdirected);
        }
        if name == self.config.node {
            return Err(self.look_at_namesake(from, &message));
        }
        if message.version >= MOST || message.incarnation >= MOST {
            return Err(Rejected::Malformed);
        }
        let hash = name_hash(name.as_str());
        let reply = ReplyTo { from, forwarded, key, name, hash };
        let answers_challenge = self.check_fresh(&reply, &message, length)?;
        if let Some(Body::Forward(forward)) = &message.body {
            return self.receive_forward(&reply, &message, forward, length);
        }
        let target = self.check_body(message.body.as_ref())?;
        let mut updates = Vec::with_capacity(message.updates.len());
        for update in &message.updates {
            let (checked, verified) = self.check_update(update)?;
            self.counters.verified += u64::from(verified);
            updates.push(checked);
        }
        let proof = self.proof_of(&reply, &message);
        self.remember(&reply, &message, proof);
        self.open_credit(&reply, length);
        if answers_challenge && let Some(id) = self.table.find(reply.hash) {
            // With the record that is known: who lost its state catches up, who is a clone learns of it.
            let first = vec![self.full_update(id)];
            self.reply(&reply, Body::Push(proto::Push { sync: false }), first);
        }
        self.take_in(&reply, message, updates, target);
        self.close_credit(&reply);
        Ok(())
    }

    fn check_body(&self, body: Option<&Body>) -> Result<Option<NodeName>, Rejected> {
        match body {
            Some(Body::PingRequest(request)) => {
                request.target.parse().map(Some).map_err(|_| Rejected::Malformed)
            }
            Some(Body::SyncBuckets(buckets)) => self.check_buckets(buckets).map(|()| None),
            Some(Body::SyncItems(items)) => Self::check_items(items).map(|()| None),
            Some(Body::PairPart(part)) if !pairs::is_part(part) => Err(Rejected::Malformed),
            Some(body) if paths::from_body(body) == Some(None) => Err(Rejected::Malformed),
            Some(Body::Ack(ack)) if !ack.seen.is_empty() => {
                socket_from_bytes(&ack.seen).map(|_| None).ok_or(Rejected::Malformed)
            }
            _ => Ok(None),
        }
    }

    /// Applies a datagram that passed every check.
    fn take_in(
        &mut self,
        reply: &ReplyTo,
        message: proto::Datagram,
        updates: Vec<merge::Checked>,
        target: Option<NodeName>,
    ) {
        let alone = self.table.living() == 0;
        let gone =
            |mesh: &Self| mesh.table.find_member(reply.hash).is_none_or(|member| member.gone_since.is_some());
        let was_gone = gone(self);
        let sync = matches!(&message.body, Some(Body::Push(push)) if push.sync);
        for checked in updates {
            self.apply(checked, reply.from, sync);
        }
        if let Some(id) = self.table.find(reply.hash) {
            self.merge_liveness(id, message.incarnation, Liveness::Alive, &[]);
        }
        self.note_arrival(reply);
        let asks = message.body.as_ref().is_some_and(paths::asks_for_packets);
        if !matches!(message.body, Some(Body::Ping(_))) && (asks || self.needs_proof(reply)) {
            self.ask_back(reply);
        }
        match message.body {
            Some(Body::Ping(ping)) => self.on_ping(reply, &ping),
            Some(Body::Ack(ack)) => self.on_ack(reply, &ack),
            Some(Body::Nack(nack)) => self.on_nack(reply, &nack),
            Some(Body::PingRequest(request)) => {
                if let Some(target) = target {
                    self.on_ping_request(reply, &request, &target);
                }
            }
            Some(Body::SyncRoot(root)) => self.on_sync_root(reply, &root),
            Some(Body::SyncBuckets(buckets)) => self.on_sync_buckets(reply, &buckets),
            Some(Body::SyncItems(items)) => self.on_sync_items(reply, &items),
            Some(Body::SyncWant(want)) => self.on_sync_want(reply, &want),
            Some(Body::Certify(certify)) => self.on_certify(&certify),
            Some(Body::Grant(grant)) => self.on_grant(&grant),
            Some(Body::PairOffer(offer)) => self.on_pair_offer(reply, &offer),
            Some(Body::PairPart(part)) => self.on_pair_part(reply, &part),
            Some(Body::Push(_) | Body::Forward(_)) | None => {}
            Some(body) => {
                if let Some(Some(word)) = paths::from_body(&body) {
                    self.on_path_word(reply, word);
                }
            }
        }
        if self.fell_short() {
            self.ask_back(reply);
        }
        // Who joins, or meets somebody from the other side of a partition, compares at once.
        let back = was_gone && !gone(self);
        if let Some(id) = self.table.find(reply.hash).filter(|_| back && (alone || self.table.living() > 1)) {
            self.sync_with(id);
        }
    }

    /// A datagram in this node's name: its own, or another node has the name.
    fn look_at_namesake(&mut self, from: SocketAddr, message: &proto::Datagram) -> Rejected {
        if message.session == self.session {
            return Rejected::Reflected;
        }
        for update in &message.updates {
            if let Ok((duplicate @ merge::Checked::Duplicate { .. }, _)) = self.check_update(update) {
                self.apply(duplicate, from, false);
            }
        }
        Rejected::OwnName
    }
}

#[cfg(test)]
mod tests;
