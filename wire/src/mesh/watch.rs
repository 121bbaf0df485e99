//! Gateways of one site watch each other ([decision 19](../../../docs/decisions/0019-gateways.md)).
//!
//! What a gateway carries stands still until all its nodes know that it is dead. The turn of a member to be probed comes once a second
//! and takes another; so each gateway asks those next to it in the order of name hashes several times a second, and news of a
//! gateway's liveness is passed on at once. Invariants: nothing is sent where the own site has not two gateways; the cost does
//! not depend on their number.

use std::collections::BTreeMap;

use super::Mesh;
use super::api::MemberState;
use super::membership::Id;
use super::probe::Purpose;
use super::timer::Timer;

/// So many others each gateway watches, and is watched by.
const WATCHED: usize = 2;
/// A gateway that answered nothing for so many intervals is suspect.
const SILENT: u32 = 3;

/// The gateways that this one watches, by name hash.
#[derive(Debug, Default)]
pub(super) struct Watch {
    asked: BTreeMap<u64, Asked>,
    armed: bool,
}

/// A question that has no answer yet.
#[derive(Debug)]
struct Asked {
    token: u64,
    /// For how many intervals. Counted, not measured: a node that stood still itself accuses nobody for it.
    intervals: u32,
    /// The members that were asked to ask it too.
    relays: Vec<u64>,
}

impl Watch {
    /// Takes an answer; returns whether it was to a question of this kind that was asked more than once.
    pub(super) fn take_answer(&mut self, token: u64, from: u64) -> bool {
        let answered = |(hash, asked): (&u64, &Asked)| {
            asked.token == token && (*hash == from || asked.relays.contains(&from))
        };
        let Some(hash) = self.asked.iter().find(|entry| answered(*entry)).map(|(hash, _)| *hash) else {
            return false;
        };
        self.asked.remove(&hash).is_some_and(|asked| asked.intervals > 0)
    }
}

impl Mesh {
    /// After an announcement.
    pub(super) fn arm_watch(&mut self) {
        let is_gateway = self.facts.as_ref().is_some_and(|facts| facts.gateway.is_some());
        if is_gateway && !self.leaving && !std::mem::replace(&mut self.watch.armed, true) {
            self.timers.set(self.now + self.config.timing.watch_interval, Timer::Watch);
        }
    }

    pub(super) fn on_watch_timer(&mut self) {
        self.watch.armed = false;
        let watched = self.watched();
        self.watch.asked.retain(|hash, _| watched.iter().any(|(_, other)| hash == other));
        for (id, hash) in watched {
            let silent = self.watch.asked.get_mut(&hash).map(|asked| {
                asked.intervals += 1;
                (asked.token, asked.intervals)
            });
            match silent {
                None => self.ask_gateway(id, hash),
                Some((_, SILENT..)) => self.accuse_gateway(id, hash),
                Some((token, intervals)) => {
                    let relays = if intervals == 1 { self.ask_through_others(id, token) } else { Vec::new() };
                    self.ask_everywhere(id, token);
                    self.watch.asked.entry(hash).and_modify(|asked| asked.relays.extend(relays));
                }
            }
        }
        self.arm_watch();
    }

    /// The next living gateways of the own site after this node, around the ring of name hashes.
    fn watched(&self) -> Vec<(Id, u64)> {
        let alive = |hash: u64| {
            let id = self.table.find(hash)?;
            let member = self.table.at(id);
            let is_own = member.signed.record().site == self.config.site;
            (is_own && member.state() == MemberState::Alive).then_some((id, hash))
        };
        self.table.gateways_after(self.hash).filter_map(alive).take(WATCHED).collect()
    }

    fn ask_gateway(&mut self, id: Id, hash: u64) {
        if let Some(token) = self.ping_member(id, Purpose::Watch) {
            self.watch.asked.insert(hash, Asked { token, intervals: 0, relays: Vec::new() });
        }
    }

    fn accuse_gateway(&mut self, id: Id, hash: u64) {
        if let Some(asked) = self.watch.asked.remove(&hash) {
            self.pending.remove(&asked.token);
        }
        self.accuse(id);
        // It hears of it, and objects, if it lives.
        self.ping_member(id, Purpose::Rejoin);
    }

    /// What is said of a gateway's liveness is passed on at once.
    pub(super) fn hurry_if_gateway(&mut self, id: Id) {
        if self.table.at(id).signed.record().facts.gateway.is_some() {
            self.hurry_gossip();
        }
    }
}
