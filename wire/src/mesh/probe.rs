//! Who lives: SWIM's probes, Lifeguard's suspicion (Dadgar, Phillips, Currey: "Lifeguard", 2018).
//!
//! Each interval one member is probed, directly and then through others. A member that does not answer is
//! suspect, and dead when it does not object in time. Invariant: the cost does not depend on the number of
//! members.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand_core::RngCore;

use super::api::{MeshEvent, Output};
use super::gossip::Topic;
use super::membership::{Id, Suspicion, below};
use super::proto::{self, Body, Liveness};
use super::timer::Timer;
use super::way::Way;
use super::{Mesh, ReplyTo};
use crate::record::{socket_from_bytes, socket_to_bytes};
use crate::types::NodeName;

/// Through so many members a silent one is probed.
const RELAYS: usize = 3;
/// So many accusers, after the first, bring suspicion down to its least duration.
const CONFIRMATIONS: usize = 2;
/// Suspicion by a single accuser lasts so many times longer than by enough of them.
const MOST_SUSPICION: u32 = 6;
/// A suspicion that no other node shares is told again each so many intervals.
const ACCUSE: u32 = 2;
/// The worst local health (Lifeguard's S).
const WORST_HEALTH: u32 = 8;
/// The most requests that wait for an answer; others are not sent.
const MAX_PENDING: usize = 4096;
/// In a Ping to a seed, whose name is not known: the longest name with its tag and length.
const SEED_PADDING: usize = 65;
/// The most seeds that are asked at once.
const MAX_SEEDS: usize = 64;

/// A request that waits for its Ack.
#[derive(Debug)]
pub(super) struct Pending {
    target: Option<u64>,
    /// Where the first Ping went straight.
    to: Option<SocketAddr>,
    sent: Instant,
    purpose: Purpose,
}

#[derive(Debug)]
pub(super) enum Purpose {
    Probe,
    /// To keep a way open.
    Keep,
    /// Between gateways.
    Watch,
    Relay {
        reply: ReplyTo,
        token: u64,
    },
    User {
        token: u64,
    },
    Seed(SocketAddr),
    Rejoin,
}

/// The probe of the present interval.
#[derive(Debug)]
pub(super) struct Probe {
    token: u64,
    target: u64,
    answered: bool,
    /// The direct request was sent again, so that its round-trip time is not known.
    repeated: bool,
    relays: Vec<u64>,
    nacks: usize,
}

impl Mesh {
    pub(super) fn on_probe_timer(&mut self) {
        self.conclude_probe();
        let interval = self.config.timing.probe_interval * (self.health + 1);
        self.timers.set(self.now + interval, Timer::Probe);
        if self.leaving {
            return;
        }
        let Some(id) = self.table.next_to_probe(&mut self.rng) else { return };
        let Some(token) = self.ping_member(id, Purpose::Probe) else { return };
        self.counters.probes += 1;
        let target = self.table.at(id).hash;
        self.probe =
            Some(Probe { token, target, answered: false, repeated: false, relays: Vec::new(), nacks: 0 });
        let patience = self.config.timing.probe_timeout * (self.health + 1);
        self.timers.set(self.now + patience, Timer::ProbeLate(token));
    }

    /// Asks others to probe the silent member, and asks it again at every address it has.
    pub(super) fn on_probe_late(&mut self, token: u64) {
        let Some(probe) = self.probe.as_mut().filter(|probe| probe.token == token && !probe.answered) else {
            return;
        };
        probe.repeated = true;
        let Some(id) = self.table.find(probe.target) else { return };
        let relays = self.ask_through_others(id, token);
        if let Some(probe) = &mut self.probe {
            probe.relays = relays;
        }
        self.ask_everywhere(id, token);
    }

    /// Asks others to ask a member; returns their name hashes.
    pub(super) fn ask_through_others(&mut self, id: Id, token: u64) -> Vec<u64> {
        let name = self.table.at(id).name().to_string();
        let relays = self.table.sample_vouched(&mut self.rng, RELAYS, Some(id));
        for relay in &relays {
            let request = proto::PingRequest { token, target: name.clone() };
            self.send_to_member(*relay, Body::PingRequest(request), Vec::new());
        }
        relays.into_iter().map(|relay| self.table.at(relay).hash).collect()
    }

    /// Asks a member again, at every address that it has.
    pub(super) fn ask_everywhere(&mut self, id: Id, token: u64) {
        let have = self.table.at(id).item().version;
        for way in self.ways(id) {
            self.send_by(way, id, Body::Ping(proto::Ping { token, have, ..Default::default() }), Vec::new());
        }
    }

    fn conclude_probe(&mut self) {
        let Some(probe) = self.probe.take() else { return };
        self.pending.remove(&probe.token);
        let direct = probe.answered && !probe.repeated;
        if let Some(contact) = self.table.contact_mut(probe.target) {
            contact.on_probe(direct);
        }
        if probe.answered {
            self.health = self.health.saturating_sub(1);
            return;
        }
        let Some(id) = self.table.find(probe.target) else { return };
        self.counters.probes_failed += 1;
        let member = self.table.at(id);
        // Relays that do not even say "no answer" point to a fault on this side; so does silence, if not of who may be made up.
        if !probe.relays.is_empty() || member.is_vouched() {
            self.worsen_health(match probe.relays.len() {
                0 => 1,
                relays => (relays - probe.nacks) as u32,
            });
        }
        self.accuse(id);
    }

    /// Suspects a member that answers nobody.
    pub(super) fn accuse(&mut self, id: Id) {
        let member = self.table.at(id);
        if member.liveness <= Liveness::Suspect {
            let (incarnation, me) = (member.incarnation, [self.config.node.clone()]);
            self.counters.suspicions += u64::from(member.liveness == Liveness::Alive);
            self.merge_liveness(id, incarnation, Liveness::Suspect, &me);
        }
    }

    pub(super) fn worsen_health(&mut self, by: u32) {
        self.health = (self.health + by).min(WORST_HEALTH);
    }

    pub(super) fn begin_suspicion(&mut self, id: Id, accusers: &[NodeName]) {
        let now = self.now;
        let again = now + self.config.timing.probe_interval * ACCUSE;
        let member = self.table.at_mut(id);
        let hash = member.hash;
        let accusers = accusers.iter().take(CONFIRMATIONS + 1).cloned().collect();
        member.suspicion = Some(Box::new(Suspicion { accusers, since: now, until: now, again }));
        self.timers.set(again, Timer::Accuse(hash));
        self.set_suspicion_end(id);
    }

    /// Tells a suspect, and others, again what this node alone holds against it. What it said may have been lost with whatever made the
    /// suspect silent; the sums of anti-entropy do not show it; and the next probe of the suspect is as far away as there are members.
    pub(super) fn on_accuse_timer(&mut self, hash: u64) {
        let again = self.now + self.config.timing.probe_interval * ACCUSE;
        let Some(id) = self.table.find(hash).filter(|_| !self.leaving) else { return };
        let (now, own) = (self.now, &self.config.node);
        let Some(suspicion) = &mut self.table.at_mut(id).suspicion else { return };
        if suspicion.again > now || suspicion.accusers != [own.clone()] {
            return;
        }
        suspicion.again = again;
        self.timers.set(again, Timer::Accuse(hash));
        self.queue.push(Topic::Liveness(hash));
        self.ping_member(id, Purpose::Rejoin);
    }

    /// Counts further accusers; returns whether there was a new one.
    pub(super) fn confirm(&mut self, id: Id, accusers: &[NodeName]) -> bool {
        let member = self.table.at_mut(id);
        let hash = member.hash;
        let Some(suspicion) = &mut member.suspicion else { return false };
        let before = suspicion.accusers.len();
        for accuser in accusers {
            if suspicion.accusers.len() <= CONFIRMATIONS && !suspicion.accusers.contains(accuser) {
                suspicion.accusers.push(accuser.clone());
            }
        }
        if suspicion.accusers.len() == before {
            return false;
        }
        self.set_suspicion_end(id);
        self.queue.push(Topic::Liveness(hash));
        true
    }

    fn set_suspicion_end(&mut self, id: Id) {
        let nodes = self.table.living() + 1;
        let timing = &self.config.timing;
        let scale = (nodes as f64).log10().max(1.0);
        let least = (timing.probe_interval * timing.suspicion_factor).mul_f64(scale);
        // In a small mesh there is nobody to confirm.
        let wanted = if nodes < CONFIRMATIONS + 3 { 0 } else { CONFIRMATIONS };
        let member = self.table.at_mut(id);
        let hash = member.hash;
        let Some(suspicion) = &mut member.suspicion else { return };
        let until =
            suspicion.since + suspicion_time(least, wanted, suspicion.accusers.len().saturating_sub(1));
        suspicion.until = until;
        self.timers.set(until.max(self.now), Timer::Suspicion(hash));
    }

    pub(super) fn on_suspicion_timer(&mut self, hash: u64) {
        let Some(id) = self.table.find(hash) else { return };
        let member = self.table.at(id);
        if member.suspicion.as_ref().is_some_and(|suspicion| suspicion.until <= self.now) {
            self.merge_liveness(id, member.incarnation, Liveness::Dead, &[]);
        }
    }

    /// Looks for what a partition or a restart took away: a dead member, a seed that is no living member.
    pub(super) fn on_rejoin_timer(&mut self) {
        let timing = &self.config.timing;
        let alone = self.table.living() == 0;
        let interval = if alone { timing.probe_interval } else { timing.rejoin_interval };
        self.timers.set(self.now + interval.min(timing.rejoin_interval), Timer::Rejoin);
        if self.leaving {
            return;
        }
        if let Some(id) = self.table.random_dead(&mut self.rng) {
            self.ping_member(id, Purpose::Rejoin);
        }
        let seeds = self.strange_seeds();
        if alone {
            self.ping_seeds(seeds);
        } else if !seeds.is_empty() {
            let seed = seeds[below(&mut self.rng, seeds.len())];
            self.ping_seed(seed);
        }
    }

    /// The seeds that are neither this node's nor known to be a living member's.
    pub(super) fn strange_seeds(&self) -> Vec<SocketAddr> {
        let is_own = |seed: &SocketAddr| self.facts.as_ref().is_some_and(|facts| facts.gossip.contains(seed));
        let strange = |seed: &&SocketAddr| {
            let owner = self.seed_owners.get(seed).and_then(|hash| self.table.find_member(*hash));
            !is_own(seed) && owner.is_none_or(|owner| owner.gone_since.is_some())
        };
        self.config.seeds.iter().filter(strange).copied().collect()
    }

    pub(super) fn ping_seeds(&mut self, seeds: Vec<SocketAddr>) {
        seeds.into_iter().take(MAX_SEEDS).for_each(|seed| self.ping_seed(seed));
    }

    fn ping_seed(&mut self, seed: SocketAddr) {
        let Some(token) = self.expect_ack(None, Purpose::Seed(seed)) else { return };
        let first = self.table.me.map(|me| self.full_update(me)).into_iter().collect();
        self.send(
            seed,
            "",
            Body::Ping(proto::Ping { token, padding: vec![0; SEED_PADDING], ..Default::default() }),
            first,
        );
    }

    pub(super) fn ping_for_user(&mut self, id: Id, token: u64) -> bool {
        self.ping_member(id, Purpose::User { token }).is_some()
    }

    pub(super) fn ping_member(&mut self, id: Id, purpose: Purpose) -> Option<u64> {
        let way = self.way(id)?;
        let (hash, have) = (self.table.at(id).hash, self.table.at(id).item().version);
        let token = self.expect_ack(Some(hash), purpose)?;
        if let (Way::At(to), Some(pending)) = (way, self.pending.get_mut(&token)) {
            pending.to = Some(to);
        }
        self.send_by(way, id, Body::Ping(proto::Ping { token, have, ..Default::default() }), Vec::new());
        Some(token)
    }

    pub(super) fn expect_ack(&mut self, target: Option<u64>, purpose: Purpose) -> Option<u64> {
        if self.pending.len() >= MAX_PENDING {
            return None;
        }
        let token = self.rng.next_u64();
        let patience = match purpose {
            // The relay's "no answer" must arrive before the asker's interval ends.
            Purpose::Relay { .. } => self.config.timing.probe_timeout.mul_f64(0.7),
            _ => self.config.timing.probe_interval * (WORST_HEALTH + 2),
        };
        self.timers.set(self.now + patience, Timer::Expire(token));
        let to = match purpose {
            Purpose::Seed(seed) => Some(seed),
            _ => None,
        };
        self.pending.insert(token, Pending { target, to, sent: self.now, purpose });
        Some(token)
    }

    /// Where a Ping with this token went that the member, or whoever is at a seed's address, was to answer; `None` within it where that
    /// was not straight.
    pub(super) fn asked_by_ping(&self, hash: u64, token: u64) -> Option<Option<SocketAddr>> {
        let pending = self.pending.get(&token)?;
        pending.target.is_none_or(|target| target == hash).then_some(pending.to)
    }

    pub(super) fn on_expire_timer(&mut self, token: u64) {
        if let Some(Pending { purpose: Purpose::Relay { reply, token }, .. }) = self.pending.remove(&token) {
            self.reply(&reply, Body::Nack(proto::Nack { token }), Vec::new());
        }
    }

    pub(super) fn on_ping(&mut self, reply: &ReplyTo, ping: &proto::Ping) {
        let first = self.own_record_beyond(ping.have);
        if self.is_question_overdue(reply) {
            self.ask_back(reply);
        }
        let wants = !first.is_empty() || ping.again_ms > 0 || self.needs_proof(reply);
        let challenge = if wants { self.question_for(reply) } else { 0 };
        let (have, seen) = (self.version_of(reply.hash), self.seen_at(reply));
        self.reply(reply, Body::Ack(proto::Ack { token: ping.token, have, seen, challenge }), first);
        if ping.again_ms > 0 && self.credit.is_none() {
            self.promise_again(reply, ping);
        }
    }

    pub(super) fn on_ping_request(
        &mut self,
        reply: &ReplyTo,
        request: &proto::PingRequest,
        target: &NodeName,
    ) {
        let token = request.token;
        let relayed = self
            .table
            .find_name(target)
            .filter(|id| Some(*id) != self.table.me && self.credit.is_none())
            .and_then(|id| self.ping_member(id, Purpose::Relay { reply: reply.clone(), token }));
        if relayed.is_none() {
            self.reply(reply, Body::Nack(proto::Nack { token }), Vec::new());
        }
    }

    pub(super) fn on_nack(&mut self, reply: &ReplyTo, nack: &proto::Nack) {
        if let Some(probe) = &mut self.probe
            && probe.token == nack.token
            && probe.relays.contains(&reply.hash)
            && probe.nacks < probe.relays.len()
        {
            probe.nacks += 1;
        }
    }

    pub(super) fn on_ack(&mut self, reply: &ReplyTo, ack: &proto::Ack) {
        let seen = socket_from_bytes(&ack.seen);
        if ack.challenge != 0 {
            let have = self.version_of(reply.hash);
            let answer = proto::Ack { token: ack.challenge, have, seen: self.seen_at(reply), challenge: 0 };
            self.reply(reply, Body::Ack(answer), Vec::new());
        }
        if self.keeper_answered(reply, ack.token, seen) {
            return;
        }
        let first = self.own_record_beyond(ack.have);
        if !first.is_empty() {
            self.reply(reply, Body::Push(proto::Push { sync: false }), first);
        }
        let Some(pending) = self.pending.get(&ack.token) else { return };
        let rtt = self.now.saturating_duration_since(pending.sent);
        let direct = pending.target.is_none_or(|target| target == reply.hash);
        if let Some(seen) = seen.filter(|_| direct) {
            self.take_seen(reply, seen);
        }
        if let Some(probe) = &mut self.probe
            && probe.token == ack.token
        {
            probe.answered |= direct || probe.relays.contains(&reply.hash);
            // An answer through others, or to a repeated request, is a direct answer that was lost.
            if direct && !probe.repeated {
                self.learn_path(reply, Some(rtt));
            } else if direct {
                self.learn_path(reply, None);
            }
            return;
        }
        let repeated = self.watch.take_answer(ack.token, reply.hash);
        if !direct {
            return;
        }
        let Some(pending) = self.pending.remove(&ack.token) else { return };
        self.learn_path(reply, (!repeated).then_some(rtt));
        match pending.purpose {
            Purpose::Relay { reply: asker, token } => {
                let have = self.version_of(asker.hash);
                self.reply(&asker, Body::Ack(proto::Ack { token, have, ..Default::default() }), Vec::new());
            }
            Purpose::User { token } => {
                if let Some(member) = self.table.find_member(reply.hash) {
                    let event = MeshEvent::Pong { node: member.name().clone(), token, rtt };
                    self.outputs.push_back(Output::Event(event));
                }
            }
            Purpose::Seed(seed) => {
                // Whoever had to ask a seed knows few.
                self.sync_soon();
                if self.seed_owners.len() < MAX_SEEDS {
                    self.seed_owners.insert(seed, reply.hash);
                }
            }
            Purpose::Probe | Purpose::Keep | Purpose::Watch | Purpose::Rejoin => {}
        }
    }

    /// What an Ack says of where the Ping came from: to the own site nothing, as nothing is between.
    fn seen_at(&self, reply: &ReplyTo) -> Vec<u8> {
        let neighbour = self
            .table
            .find(reply.hash)
            .is_some_and(|id| self.table.at(id).signed.record().site == self.config.site);
        if neighbour || reply.forwarded { Vec::new() } else { socket_to_bytes(&reply.from) }
    }

    fn learn_path(&mut self, reply: &ReplyTo, rtt: Option<Duration>) {
        if reply.forwarded {
            return;
        }
        let Some(id) = self.table.find(reply.hash) else { return };
        let gossip = &self.table.at(id).signed.record().facts.gossip;
        let place = gossip.iter().position(|address| *address == reply.from);
        if let Some(contact) = &mut self.table.at_mut(id).contact {
            contact.preferred = place.map(|place| place as u8).or(contact.preferred);
            if let Some(rtt) = rtt {
                contact.on_rtt(rtt);
            }
        }
    }

    fn version_of(&self, hash: u64) -> u64 {
        self.table.find_member(hash).map_or(0, |member| member.item().version)
    }

    fn own_record_beyond(&self, have: u64) -> Vec<proto::Update> {
        let me = self.table.me.filter(|me| self.table.at(*me).item().version > have);
        me.map(|me| self.full_update(me)).into_iter().collect()
    }
}

/// Lifeguard's formula: from the most to the least with the logarithm of the confirmations.
fn suspicion_time(least: Duration, wanted: usize, confirmed: usize) -> Duration {
    if wanted == 0 {
        return least;
    }
    let most = least * MOST_SUSPICION;
    let share = ((confirmed + 1) as f64).ln() / ((wanted + 1) as f64).ln();
    most - (most - least).mul_f64(share.min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suspicion_shrinks_with_every_accuser() {
        let second = Duration::from_secs(1);
        assert_eq!(suspicion_time(second, 2, 0), second * 6);
        assert!(suspicion_time(second, 2, 1) < second * 4);
        assert_eq!(suspicion_time(second, 2, 2), second);
        assert_eq!(suspicion_time(second, 0, 0), second);
    }
}
