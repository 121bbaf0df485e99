//! Whether others reach this node, and what it does where they do not ([decision 15](../../../docs/decisions/0015-gossip-across-nat.md)).
//!
//! Who answers a Ping says where it came from. A node that other sites see elsewhere than at its gossip addresses is behind NAT; one
//! that nobody reached without being asked is behind a filter. Such a node chooses keepers (`keepers.rs`) and names them
//! in its record. Invariant: nothing here happens, and nothing is sent, in a mesh of one site.

mod cadence;
mod keepers;
mod votes;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::timer::Timer;
use super::{Mesh, ReplyTo};
use crate::record::{Reach, Reachability};
use crate::types::NodeName;
use keepers::Keeper;
pub use votes::Mapping;
use votes::Votes;

/// Between two looks at the keepers.
const TICK: Duration = Duration::from_secs(1);
/// A node that is not translated is open once it was reached unasked, and behind a filter if that did not happen in this time.
const PROOF: Duration = Duration::from_secs(30);
/// A filter or a NAT that let this node's datagram out lets answers in for so long, at most.
const LET_IN: Duration = Duration::from_secs(300);
/// Between two changes of what the record says of it.
const CHANGES: Duration = Duration::from_secs(5);
/// The most senders that came unasked and are not known yet.
const MAX_STRANGERS: usize = 64;
/// The most addresses that this node is known to have sent to.
const MAX_SENT: usize = 1024;

/// How this node is reached, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReachView {
    /// Whether other sites reach it unasked.
    pub reach: Reach,
    /// Whether it is seen elsewhere than at its gossip addresses; `None` while nobody says.
    pub translated: Option<bool>,
    /// Whether its mapping depends on whom it sends to.
    pub mapping: Mapping,
    /// Where members of other sites see it, the latest first.
    pub reflexive: Vec<SocketAddr>,
    /// Whom it keeps a way open to.
    pub keepers: Vec<KeeperView>,
}

/// A member that this node keeps a way open to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeeperView {
    /// Its name.
    pub node: NodeName,
    /// After so long without a datagram to it, one is sent.
    pub pause: Duration,
}

#[derive(Debug, Default)]
pub(super) struct State {
    votes: Votes,
    /// Where datagrams went lately, and when last: who comes from elsewhere comes unasked.
    sent: BTreeMap<IpAddr, Instant>,
    /// It sent to more than it remembers, until then.
    blind_until: Option<Instant>,
    /// Whether a datagram came unasked, over IPv4 and over IPv6.
    unasked: [bool; 2],
    /// Who came unasked, and is not known yet: of which site it is, its record will say.
    strangers: BTreeMap<u64, usize>,
    unproven_since: Option<Instant>,
    reach: Reach,
    /// Where it was seen at the last look.
    seen: Vec<SocketAddr>,
    keepers: Vec<Keeper>,
    /// Members that did not do as keepers, and since when.
    shunned: Vec<(u64, Instant)>,
    /// Those whose Ack is to be repeated, with its token, and when.
    again: BTreeMap<u64, (u64, Instant)>,
    announced: Reachability,
    changed: Option<Instant>,
    armed: bool,
}

impl State {
    fn note_sent(&mut self, to: IpAddr, name: &str, now: Instant) {
        if let Some(keeper) = self.keepers.iter_mut().find(|keeper| keeper.name.as_str() == name) {
            keeper.note_sent(now);
        }
        if self.reach == Reach::Open {
            return;
        }
        if self.sent.len() >= MAX_SENT && !self.sent.contains_key(&to) {
            self.sent.retain(|_, at| *at + LET_IN > now);
            if self.sent.len() >= MAX_SENT {
                self.sent.clear();
                self.blind_until = Some(now + LET_IN);
            }
        }
        self.sent.insert(to, now);
    }

    /// Whether a datagram from there can be no answer to one of this node's.
    fn is_unasked(&self, from: IpAddr, now: Instant) -> bool {
        self.blind_until.is_none_or(|until| until <= now)
            && self.sent.get(&from).is_none_or(|at| *at + LET_IN <= now)
    }

    fn judge(&mut self, own: &[SocketAddr], says_outside: bool, now: Instant) -> Reach {
        if says_outside {
            return Reach::Open;
        }
        let (mut voted, mut proven) = (false, true);
        for (place, v4) in [true, false].into_iter().enumerate() {
            match self.votes.translated(own, v4, now) {
                Some(true) => {
                    self.unproven_since = None;
                    return Reach::Behind;
                }
                Some(false) => (voted, proven) = (true, proven && self.unasked[place]),
                None => {}
            }
        }
        if !voted {
            return self.reach;
        }
        if proven {
            self.unproven_since = None;
            return Reach::Open;
        }
        let since = *self.unproven_since.get_or_insert(now);
        if now >= since + PROOF { Reach::Behind } else { self.reach }
    }
}

impl Mesh {
    /// Returns how this node is reached.
    pub fn reach(&self) -> ReachView {
        let state = &self.reach;
        let translated = [true, false].map(|v4| state.votes.translated(self.own_gossip(), v4, self.now));
        let keepers = state.keepers.iter().filter(|keeper| keeper.is_proven());
        ReachView {
            reach: state.reach,
            translated: translated.into_iter().flatten().reduce(|one, other| one || other),
            mapping: state.votes.mapping(self.now),
            reflexive: state.votes.addresses(self.now),
            keepers: keepers
                .map(|keeper| KeeperView { node: keeper.name.clone(), pause: keeper.pause() })
                .collect(),
        }
    }

    fn own_gossip(&self) -> &[SocketAddr] {
        self.facts.as_ref().map_or(&[], |facts| &facts.gossip)
    }

    /// What the next record says of how this node is reached.
    pub(super) fn own_reachability(&self, outside: Vec<SocketAddr>) -> Reachability {
        Reachability { outside, ..self.reach.announced.clone() }
    }

    /// Before an announcement: who says where it is reached from outside is open in the same record, not in another one.
    pub(super) fn take_outside(&mut self) {
        if self.facts.as_ref().is_some_and(|facts| !facts.reachability.outside.is_empty()) {
            self.reach.reach = Reach::Open;
            self.reach.announced = Reachability { reach: Reach::Open, ..Reachability::default() };
            self.arm_reach();
        }
    }

    pub(super) fn arm_reach(&mut self) {
        if !std::mem::replace(&mut self.reach.armed, true) {
            self.timers.set(self.now + TICK, Timer::Reach);
        }
    }

    pub(super) fn on_reach_timer(&mut self) {
        self.reach.armed = false;
        let (own, outside) = self.facts.as_ref().map_or((Vec::new(), false), |facts| {
            (facts.gossip.clone(), !facts.reachability.outside.is_empty())
        });
        let before = self.reach.reach;
        let reach = self.reach.judge(&own, outside, self.now);
        if before == Reach::Open && reach != Reach::Open {
            // Nothing was noted of whom it sent to.
            self.reach.unasked = [false; 2];
            self.reach.blind_until = Some(self.now + LET_IN);
        }
        self.reach.reach = reach;
        if reach == Reach::Behind && !self.leaving {
            self.tend_keepers();
        } else {
            self.reach.keepers.clear();
        }
        self.announce_reach();
        if reach != Reach::Unsaid || outside || !self.reach.votes.is_empty() {
            self.arm_reach();
        }
    }

    fn announce_reach(&mut self) {
        let mut keepers: Vec<u64> = self.reach.keepers.iter().filter_map(Keeper::named).collect();
        keepers.sort_unstable();
        let wanted = Reachability { reach: self.reach.reach, keepers, outside: Vec::new() };
        let due = self.reach.changed.is_none_or(|changed| changed + CHANGES <= self.now);
        if due && wanted != self.reach.announced && !self.leaving {
            self.reach.announced = wanted;
            self.reach.changed = Some(self.now);
            self.resign();
        }
    }

    /// Notes a datagram of this node.
    pub(super) fn note_sent(&mut self, to: SocketAddr, name: &str) {
        self.reach.note_sent(to.ip(), name, self.now);
    }

    /// Notes a datagram of a member; to be called before anything is sent to it in answer.
    pub(super) fn note_arrival(&mut self, reply: &ReplyTo) {
        if reply.forwarded {
            return;
        }
        if let Some(keeper) = self.reach.keepers.iter_mut().find(|keeper| keeper.hash == reply.hash) {
            keeper.note_heard();
        }
        if self.reach.reach == Reach::Open {
            return;
        }
        let family = usize::from(!reply.from.is_ipv4());
        let unasked = self.reach.is_unasked(reply.from.ip(), self.now).then_some(family);
        if self.table.find(reply.hash).is_none() {
            if self.reach.strangers.len() < MAX_STRANGERS {
                self.reach.strangers.extend(unasked.map(|family| (reply.hash, family)));
            }
            return;
        }
        let unasked = self.reach.strangers.remove(&reply.hash).or(unasked);
        if let Some(family) = unasked.filter(|_| self.is_elsewhere(reply.hash)) {
            self.reach.unasked[family] = true;
        }
    }

    /// Takes the word of who answered for where this node's Ping came from.
    pub(super) fn take_seen(&mut self, reply: &ReplyTo, seen: SocketAddr) {
        // Members of one site share a network: they see no translation.
        if !reply.forwarded && self.is_elsewhere(reply.hash) {
            self.reach.votes.take((reply.from.ip(), reply.hash), seen, self.now);
            self.arm_reach();
        }
    }

    /// Whether the name hash is of a member of another site.
    fn is_elsewhere(&self, hash: u64) -> bool {
        let member = self.table.find_member(hash);
        member.is_some_and(|member| member.signed.record().site != self.config.site)
    }
}
