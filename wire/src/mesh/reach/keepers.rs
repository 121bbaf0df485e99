//! The open members that a node behind NAT keeps a way open to, so that it is reached through them.
//!
//! A keeper is a member that says that it is open, and that answered a Ping of this node at an address of its record. The first
//! to answer of a few is taken: that is the shortest round trip. Invariants: at most [`MAX_KEEPERS`] are named; a
//! look at them costs the same in a mesh of any size; a Ping goes out only after a pause without any datagram to the keeper.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::cadence::Cadence;
use super::{Mapping, Mesh, TICK};
use crate::mesh::ReplyTo;
use crate::mesh::api::MemberState;
use crate::mesh::membership::Id;
use crate::mesh::probe::Purpose;
use crate::mesh::proto::{self, Body};
use crate::mesh::timer::Timer;
use crate::mesh::way::{KEPT, Way};
use crate::record::{MAX_KEEPERS, Reach};
use crate::types::NodeName;

/// Who does not answer so many Pings, one a tick, is no keeper.
const MISSES: u32 = 3;
/// So many members are asked at once, of so many that are looked at.
const RACE: (usize, usize) = (3, 16);
/// A member that failed is not asked again for so long: it may be the only one.
const SHUNNED: Duration = Duration::from_secs(10);
/// The most members that are remembered for having failed.
const MAX_SHUNNED: usize = 16;
/// An Ack that was to come later is late after so long.
const LATE: Duration = Duration::from_secs(3);
/// The most Acks that this node has promised to repeat.
const MAX_AGAIN: usize = 4096;

#[derive(Debug)]
pub(super) struct Keeper {
    pub(super) name: NodeName,
    pub(super) hash: u64,
    /// It answered.
    proven: bool,
    /// A Ping waits for its answer.
    asked: Option<Instant>,
    missed: u32,
    /// When the last datagram went to it, and the longest time without one since it said last where it sees this node.
    sent: Instant,
    rested: Duration,
    /// Where it saw this node last.
    seen: Option<SocketAddr>,
    cadence: Cadence,
    trial: Option<Trial>,
    /// Datagrams to it and from it.
    traffic: u64,
}

/// Whether a mapping lives through a pause: the keeper answers once more after it.
#[derive(Debug)]
struct Trial {
    token: u64,
    pause: Duration,
    /// When the first Ack came, and the traffic until then.
    rests: Option<(Instant, u64)>,
}

impl Keeper {
    fn new(name: NodeName, hash: u64, now: Instant) -> Self {
        Self {
            name,
            hash,
            proven: false,
            asked: None,
            missed: 0,
            sent: now,
            rested: Duration::ZERO,
            seen: None,
            cadence: Cadence::default(),
            trial: None,
            traffic: 0,
        }
    }

    pub(super) fn is_proven(&self) -> bool {
        self.proven
    }

    pub(super) fn named(&self) -> Option<u64> {
        self.proven.then_some(self.hash)
    }

    pub(super) fn pause(&self) -> Duration {
        self.cadence.pause()
    }

    pub(super) fn note_sent(&mut self, now: Instant) {
        self.rested = self.rested.max(now.saturating_duration_since(self.sent));
        self.sent = now;
        self.traffic += 1;
    }

    pub(super) fn note_heard(&mut self) {
        self.traffic += 1;
    }

    /// What it says of where it sees this node: another port is a mapping that was lost, in the longest pause at least. The last
    /// one may be shorter, after a datagram that nobody answered.
    fn take_seen(&mut self, seen: SocketAddr) {
        let rested = std::mem::take(&mut self.rested);
        match self.seen.replace(seen) {
            Some(before) if before.ip() != seen.ip() => self.cadence = Cadence::default(),
            Some(before) if before != seen && rested >= TICK * 5 => self.cadence.lost(rested),
            _ => {}
        }
    }

    /// Takes an Ack; returns whether it was the repeated one of the trial. It says that the mapping lived if nothing else was
    /// heard or said meanwhile, and if it did not come early.
    fn take_ack(&mut self, token: u64, now: Instant) -> bool {
        let Some(trial) = self.trial.as_mut().filter(|trial| trial.token == token) else { return false };
        let Some((from, traffic)) = trial.rests else {
            trial.rests = Some((now, self.traffic));
            return false;
        };
        if self.traffic == traffic + 1 && now + TICK >= from + trial.pause {
            self.cadence.held(trial.pause);
        }
        self.trial = None;
        true
    }

    /// Ends a trial whose time is over. It says something only if nothing else kept the mapping alive.
    fn end_trial(&mut self, now: Instant) -> bool {
        let Some(Trial { pause, rests: Some((from, traffic)), .. }) = &self.trial else {
            // The first Ack did not come: the answer to the next Ping says more.
            return self.trial.take_if(|_| self.asked.is_none()).is_some();
        };
        let (pause, quiet) = (*pause, *traffic == self.traffic);
        if quiet && now < *from + pause + LATE {
            return false;
        }
        if quiet {
            self.cadence.unanswered(pause);
        }
        self.trial = None;
        quiet
    }
}

impl Mesh {
    pub(super) fn tend_keepers(&mut self) {
        self.drop_keepers();
        let moved = self.has_moved();
        let mut tries = self.reach.keepers.iter().all(|keeper| keeper.proven && keeper.trial.is_none())
            && self.reach.keepers.len() == MAX_KEEPERS;
        for place in 0..self.reach.keepers.len() {
            if let Some(trial) = self.keeper_is_due(place, moved) {
                let trial = trial.filter(|_| std::mem::take(&mut tries));
                self.ping_keeper(place, trial);
            }
        }
        self.look_for_keepers();
    }

    /// Whether others see this node where nobody did at the last look: keepers must learn of it at once. Where each sees another port,
    /// a new one says nothing.
    fn has_moved(&mut self) -> bool {
        let depends = self.reach.votes.mapping(self.now) == Mapping::Dependent;
        let seen = self.reach.votes.addresses(self.now);
        let before = std::mem::replace(&mut self.reach.seen, seen);
        let is_new = |seen: &SocketAddr| {
            !before.iter().any(|before| if depends { before.ip() == seen.ip() } else { before == seen })
        };
        self.reach.seen.iter().any(is_new)
    }

    /// Lets go of those that are gone, do not answer, or say that they are not open.
    fn drop_keepers(&mut self) {
        let now = self.now;
        let patience = |keeper: &mut Keeper| {
            if keeper.asked.is_some_and(|asked| asked + TICK <= now) {
                keeper.missed += 1;
            }
        };
        self.reach.keepers.iter_mut().for_each(patience);
        self.reach.shunned.retain(|(_, since)| *since + SHUNNED > now);
        let table = &self.table;
        let shunned = &mut self.reach.shunned;
        self.reach.keepers.retain(|keeper| {
            let member = table.find_member(keeper.hash);
            let there = member.is_some_and(|member| {
                member.gone_since.is_none()
                    && member.signed.record().facts.reachability.reach != Reach::Behind
            });
            let answers = keeper.missed < MISSES;
            if there && !answers && shunned.len() < MAX_SHUNNED {
                shunned.push((keeper.hash, now));
            }
            there && answers
        });
    }

    /// Whether a Ping is due, and which pause may be tried after it.
    fn keeper_is_due(&mut self, place: usize, moved: bool) -> Option<Option<Duration>> {
        let now = self.now;
        let keeper = &mut self.reach.keepers[place];
        let doubted = keeper.end_trial(now);
        let suspect =
            self.table.find(keeper.hash).is_some_and(|id| self.table.at(id).state() != MemberState::Alive);
        if keeper.asked.is_some() {
            return Some(None);
        }
        if doubted || moved || suspect {
            return Some(None);
        }
        if keeper.trial.is_some() || now < keeper.sent + keeper.pause() {
            return None;
        }
        Some(keeper.cadence.trial())
    }

    fn ping_keeper(&mut self, place: usize, trial: Option<Duration>) {
        let keeper = &self.reach.keepers[place];
        let (hash, name) = (keeper.hash, keeper.name.clone());
        let Some(id) = self.table.find(hash) else { return };
        let Some(to) = self.straight(id) else { return };
        let Some(token) = self.expect_ack(Some(hash), Purpose::Keep) else { return };
        let have = self.table.at(id).item().version;
        let again_ms = trial.map_or(0, |pause| pause.as_millis() as u32);
        let now = self.now;
        let keeper = &mut self.reach.keepers[place];
        keeper.asked = Some(now);
        keeper.trial = trial.map(|pause| Trial { token, pause, rests: None });
        self.send(
            to,
            name.as_str(),
            Body::Ping(proto::Ping { token, have, again_ms, ..Default::default() }),
            Vec::new(),
        );
    }

    fn look_for_keepers(&mut self) {
        let proven = self.reach.keepers.iter().filter(|keeper| keeper.proven).count();
        if proven >= MAX_KEEPERS || proven < self.reach.keepers.len() {
            return;
        }
        for id in self.candidates() {
            let member = self.table.at(id);
            let keeper = Keeper::new(member.name().clone(), member.hash, self.now);
            self.reach.keepers.push(keeper);
            self.ping_keeper(self.reach.keepers.len() - 1, None);
        }
    }

    /// A few open members that are none yet: where there are some, those of another site and address than the keeper that is there.
    fn candidates(&mut self) -> Vec<Id> {
        let known = self.reach.keepers.first().and_then(|keeper| self.table.find_member(keeper.hash));
        let place = |id: Id| {
            let member = self.table.at(id);
            let heard = member.contact.as_ref().and_then(|contact| contact.heard).map(|heard| heard.at.ip());
            (member.signed.record().site.clone(), heard)
        };
        let taken = known.and_then(|member| self.table.find(member.hash)).map(place);
        let likeness = |id: &Id| {
            let (site, ip) = place(*id);
            taken.as_ref().map_or(0, |taken| usize::from(taken.0 == site) * 2 + usize::from(taken.1 == ip))
        };
        let mut open = self.table.sample_open(&mut self.rng, RACE.1);
        open.retain(|id| {
            let member = self.table.at(*id);
            let known = self.reach.keepers.iter().any(|keeper| keeper.hash == member.hash)
                || self.reach.shunned.iter().any(|(hash, _)| *hash == member.hash);
            !known && member.state() == MemberState::Alive
        });
        let least = open.iter().map(likeness).min();
        open.retain(|id| Some(likeness(id)) == least);
        open.truncate(RACE.0);
        open
    }

    /// Takes an answer of a keeper, or of a member that may become one. Returns whether it was the repeated Ack of a trial.
    pub(in crate::mesh) fn keeper_answered(
        &mut self,
        reply: &ReplyTo,
        token: u64,
        seen: Option<SocketAddr>,
    ) -> bool {
        let now = self.now;
        if reply.forwarded {
            return false;
        }
        let others =
            self.reach.keepers.iter().filter(|keeper| keeper.proven && keeper.hash != reply.hash).count();
        let Some(keeper) = self.reach.keepers.iter_mut().find(|keeper| keeper.hash == reply.hash) else {
            return false;
        };
        if keeper.take_ack(token, now) {
            return true;
        }
        (keeper.asked, keeper.missed) = (None, 0);
        if let Some(seen) = seen {
            keeper.take_seen(seen);
        }
        keeper.proven |= others < MAX_KEEPERS;
        if keeper.proven && others + 1 >= MAX_KEEPERS {
            self.reach.keepers.retain(|keeper| keeper.proven);
        }
        false
    }

    /// Whether a member named this node as its keeper.
    pub(in crate::mesh) fn keeps(&self, id: Id) -> bool {
        self.table.at(id).signed.record().facts.reachability.keepers.contains(&self.hash)
    }

    /// Promises a member that this node keeps to answer once more.
    pub(in crate::mesh) fn promise_again(&mut self, reply: &ReplyTo, ping: &proto::Ping) {
        let kept = self.table.find(reply.hash).is_some_and(|id| self.keeps(id));
        let after = Duration::from_millis(ping.again_ms.into());
        if kept && !reply.forwarded && after <= KEPT && self.reach.again.len() < MAX_AGAIN {
            self.reach.again.insert(reply.hash, (ping.token, self.now + after));
            self.timers.set(self.now + after, Timer::Again(reply.hash));
        }
    }

    pub(in crate::mesh) fn on_again_timer(&mut self, hash: u64) {
        // The timer of an earlier promise is not that of the present one.
        let Some((token, at)) = self.reach.again.get(&hash).copied() else { return };
        if at > self.now {
            return;
        }
        self.reach.again.remove(&hash);
        let Some(id) = self.table.find(hash) else { return };
        if let Some(Way::At(to)) = self.way(id) {
            let (name, have) = (self.table.at(id).name().to_string(), self.table.at(id).item().version);
            self.send(to, &name, Body::Ack(proto::Ack { token, have, ..Default::default() }), Vec::new());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a trial of a minute says where the second Ack comes after so long, and so much else crossed the mapping.
    fn said(after: u64, else_crossed: u32) -> bool {
        let now = Instant::now();
        let mut keeper = Keeper::new("k".parse().expect("a name"), 1, now);
        let pause = Duration::from_secs(60);
        keeper.trial = Some(Trial { token: 5, pause, rests: None });
        keeper.note_heard();
        assert!(!keeper.take_ack(5, now));
        (0..else_crossed).for_each(|_| keeper.note_sent(now));
        keeper.note_heard();
        assert!(!keeper.take_ack(6, now), "of another Ping");
        assert!(keeper.take_ack(5, now + Duration::from_secs(after)));
        keeper.pause() > Cadence::default().pause()
    }

    #[test]
    fn a_mapping_that_is_gone_was_lost_in_the_longest_pause_and_not_in_the_last() {
        let (mut now, second) = (Instant::now(), Duration::from_secs(1));
        let mut keeper = Keeper::new("k".parse().expect("a name"), 1, now);
        keeper.cadence.held(second * 73);
        keeper.take_seen("192.0.2.1:20001".parse().expect("an address"));
        // What nobody answers goes through a new mapping; the next Ping, which tells, comes sooner after it.
        for rest in [95, 64] {
            now += second * rest;
            keeper.note_sent(now);
        }
        keeper.take_seen("192.0.2.1:20002".parse().expect("an address"));
        assert_eq!(keeper.cadence.trial(), Some(second * 84), "between 73 and 95");
        // The pauses before that say nothing of the next loss.
        now += second * 78;
        keeper.note_sent(now);
        keeper.take_seen("192.0.2.1:20003".parse().expect("an address"));
        assert_eq!(keeper.cadence.trial(), None, "between 73 and 78 there is nothing to gain");
    }

    #[test]
    fn a_trial_says_nothing_if_the_answer_is_early_or_the_mapping_was_used() {
        assert!(said(60, 0));
        assert!(!said(1, 0), "a keeper that lies wins nothing");
        assert!(!said(60, 1));
    }
}
