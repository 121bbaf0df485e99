//! What to tell the others, and how often: news ride on every datagram until told often enough.
//!
//! The queue holds topics, not texts: what is told about a member is read from the table when a datagram is
//! packed, so it is never stale and costs a few bytes. Invariant: a datagram keeps the budget.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Instant;

use prost::Message;
use rand_core::RngCore;

use super::Mesh;
use super::api::Output;
use super::membership::{Id, Tombstone};
use super::proto::{self, Body, Liveness};
use super::timer::Timer;
use crate::seal::{KeyId, MAX_CONTENT};
use crate::site::{SignedStatement, Subject};

/// News is told to so many members at a time.
const FANOUT: usize = 3;
/// Each piece of news is told so many times log10 of the number of members.
const REPEAT: u32 = 4;
/// The most topics that wait to be told. A cluster that starts or heals at once has more news than gossip can carry:
/// the oldest and most told go, and anti-entropy, which follows the difference, brings them.
const MOST_TOPICS: usize = 64;
/// What others wait for is told so many times sooner than other news.
const HURRY: u32 = 10;
/// How many topics that do not fit are passed over when a datagram is packed.
const MISFITS: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Topic {
    Record(u64),
    Liveness(u64),
    Forgotten(u64),
    Statement(Subject),
}

/// News, the least told first and among those the latest first.
///
/// Invariant: at most [`MOST_TOPICS`]; what a node has to say about itself is never given up for other news.
#[derive(Debug)]
pub(super) struct Queue {
    own: Topic,
    order: BTreeSet<(u32, u64, Topic)>,
    topics: BTreeMap<Topic, (u32, u64)>,
    count: u64,
}

impl Queue {
    /// The queue of the node whose name has this hash.
    pub(super) fn new(own: u64) -> Self {
        Self { own: Topic::Record(own), order: BTreeSet::new(), topics: BTreeMap::new(), count: 0 }
    }

    /// Starts to tell `topic`, or starts again.
    pub(super) fn push(&mut self, topic: Topic) {
        self.drop(topic);
        self.count += 1;
        self.insert(topic, 0, u64::MAX - self.count);
        if self.len() > MOST_TOPICS {
            let last = self.order.iter().rev().map(|(_, _, topic)| *topic).find(|topic| *topic != self.own);
            last.into_iter().for_each(|topic| self.drop(topic));
        }
    }

    pub(super) fn clear(&mut self) {
        self.order.clear();
        self.topics.clear();
    }

    pub(super) fn drop(&mut self, topic: Topic) {
        if let Some((told, age)) = self.topics.remove(&topic) {
            self.order.remove(&(told, age, topic));
        }
    }

    pub(super) fn len(&self) -> usize {
        self.topics.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.topics.is_empty()
    }

    fn insert(&mut self, topic: Topic, told: u32, age: u64) {
        self.topics.insert(topic, (told, age));
        self.order.insert((told, age, topic));
    }

    fn told(&mut self, topic: Topic, limit: u32) {
        if let Some((told, age)) = self.topics.get(&topic).copied() {
            self.drop(topic);
            if told + 1 < limit {
                self.insert(topic, told + 1, age);
            }
        }
    }
}

/// log10 of the number of members, rounded up, at least 1.
pub(super) fn log10_ceil(members: usize) -> u32 {
    (members.max(2) as f64 + 1.0).log10().ceil() as u32
}

impl Mesh {
    /// Tells a few random members what is new.
    pub(super) fn on_gossip_timer(&mut self) {
        if self.gossip_at.is_none_or(|at| at > self.now) {
            return;
        }
        self.gossip_at = None;
        if self.queue.is_empty() {
            return;
        }
        for id in self.table.sample(&mut self.rng, FANOUT) {
            if self.queue.is_empty() {
                break;
            }
            self.send_to_member(id, Body::Push(proto::Push { sync: false }), Vec::new());
        }
        if self.table.living() == 0 {
            // Nobody to tell: whoever comes gets it by anti-entropy.
            self.queue.clear();
        }
    }

    pub(super) fn arm_gossip(&mut self) {
        if !self.queue.is_empty() && self.gossip_at.is_none() {
            self.gossip_by(self.now + self.config.timing.gossip_interval);
        }
    }

    /// Brings the next round forward: what others wait for is to be told.
    pub(super) fn hurry_gossip(&mut self) {
        let soon = self.now + self.config.timing.gossip_interval / HURRY;
        if self.gossip_at.is_none_or(|at| at > soon) {
            self.gossip_by(soon);
        }
    }

    fn gossip_by(&mut self, at: Instant) {
        self.gossip_at = Some(at);
        self.timers.set(at, Timer::Gossip);
    }

    /// Seals and queues one datagram: the body, `first`, then as much news as fits.
    pub(super) fn send(&mut self, to: SocketAddr, name: &str, body: Body, first: Vec<proto::Update>) {
        self.send_under(self.key_for(name, None), to, name, body, first);
    }

    /// The same under a key of the ring.
    pub(super) fn send_under(
        &mut self,
        key: KeyId,
        to: SocketAddr,
        name: &str,
        body: Body,
        first: Vec<proto::Update>,
    ) {
        let room = self.room_within_credit(MAX_CONTENT);
        match self.pack(name, body, first, room) {
            Some(content) => self.emit(key, to, name, &content),
            None => debug_assert!(self.credit.is_some(), "every body fits a datagram"),
        }
    }

    /// Seals and queues what was packed.
    pub(super) fn emit(&mut self, key: KeyId, to: SocketAddr, name: &str, content: &[u8]) {
        let mut nonce = [0; 24];
        self.rng.fill_bytes(&mut nonce);
        let datagram = self.config.ring.seal_with(key, &self.config.cluster, nonce, content);
        self.note_sent(to, name);
        self.spend(datagram.len());
        self.counters.sent += 1;
        self.counters.sent_bytes += datagram.len() as u64;
        self.outputs.push_back(Output::Send { to, datagram });
    }

    /// Packs a datagram of at most `room` bytes; nothing where the body alone is longer.
    pub(super) fn pack(
        &mut self,
        name: &str,
        body: Body,
        first: Vec<proto::Update>,
        room: usize,
    ) -> Option<Vec<u8>> {
        let mut updates = first;
        updates.extend(self.objection(name));
        let (version, incarnation) = self
            .table
            .me
            .map_or((0, self.incarnation), |me| (self.table.at(me).item().version, self.incarnation));
        self.seq += 1;
        let mut datagram = proto::Datagram {
            from: self.config.node.to_string(),
            to: name.to_string(),
            session: self.session,
            seq: self.seq,
            version,
            incarnation,
            updates: Vec::new(),
            body: Some(body),
        };
        if datagram.encoded_len() > room && self.credit.is_some() {
            shorten(&mut datagram, room);
        }
        let mut used = datagram.encoded_len();
        if used > room {
            self.fall_short();
            return None;
        }
        if matches!(&datagram.body, Some(Body::Ack(ack)) if ack.challenge != 0) {
            self.note_asked(name);
        }
        for update in updates {
            let length = framed_len(&update);
            if used + length <= room {
                used += length;
                datagram.updates.push(update);
            } else {
                self.fall_short();
            }
        }
        self.piggyback(&mut datagram, used, room);
        Some(datagram.encode_to_vec())
    }

    fn piggyback(&mut self, datagram: &mut proto::Datagram, mut used: usize, room: usize) {
        let limit = REPEAT * log10_ceil(self.table.len());
        let (mut told, mut gone, mut misfits) = (Vec::new(), Vec::new(), 0);
        for (_, _, topic) in &self.queue.order {
            let Some(update) = self.tell(*topic) else {
                gone.push(*topic);
                continue;
            };
            let length = framed_len(&update);
            if used + length <= room {
                used += length;
                datagram.updates.push(update);
                told.push(*topic);
            } else {
                misfits += 1;
            }
            if misfits > MISFITS || used + 16 > room {
                break;
            }
        }
        gone.into_iter().for_each(|topic| self.queue.drop(topic));
        told.into_iter().for_each(|topic| self.queue.told(topic, limit));
    }

    fn tell(&self, topic: Topic) -> Option<proto::Update> {
        match topic {
            Topic::Record(hash) => self.table.find(hash).map(|id| self.full_update(id)),
            Topic::Liveness(hash) => self.table.find(hash).map(|id| self.rumor(id)),
            Topic::Forgotten(hash) => self.table.tombstones.get(&hash).map(forgotten),
            Topic::Statement(subject) => self.sites.find(&subject).map(|signed| stated(signed)),
        }
    }

    /// The member's record and liveness.
    pub(super) fn full_update(&self, id: Id) -> proto::Update {
        let mut update = self.rumor(id);
        update.node = String::new();
        update.record = Some(self.table.at(id).signed.to_proto());
        // A datagram must hold the largest record; accusations travel as rumors.
        update.accusers = Vec::new();
        update
    }

    /// The member's liveness alone.
    pub(super) fn rumor(&self, id: Id) -> proto::Update {
        let member = self.table.at(id);
        let accusers = member.suspicion.iter().flat_map(|suspicion| &suspicion.accusers);
        proto::Update {
            node: member.name().to_string(),
            liveness: member.liveness as i32,
            incarnation: member.incarnation,
            accusers: accusers.map(ToString::to_string).collect(),
            record: None,
            statement: None,
        }
    }

    /// What a receiver must hear first: that this node thinks it is suspect, dead or forgotten.
    fn objection(&self, name: &str) -> Option<proto::Update> {
        if name.is_empty() {
            return None;
        }
        let hash = super::membership::name_hash(name);
        match self.table.find(hash) {
            Some(id) if self.table.at(id).liveness != Liveness::Alive => Some(self.rumor(id)),
            Some(_) => None,
            None => self
                .table
                .tombstones
                .get(&hash)
                .map(|tombstone| proto::Update { liveness: Liveness::Dead as i32, ..forgotten(tombstone) }),
        }
    }
}

pub(super) fn forgotten(tombstone: &Tombstone) -> proto::Update {
    proto::Update {
        node: tombstone.node.to_string(),
        liveness: Liveness::Forgotten as i32,
        incarnation: tombstone.incarnation,
        accusers: Vec::new(),
        record: None,
        statement: None,
    }
}

pub(super) fn stated(signed: &SignedStatement) -> proto::Update {
    proto::Update { statement: Some(signed.to_proto()), ..proto::Update::default() }
}

/// Leaves out what an answer can do without, as far as it has to.
fn shorten(datagram: &mut proto::Datagram, room: usize) {
    (datagram.version, datagram.incarnation) = (0, 0);
    if let Some(Body::Ack(ack)) = &mut datagram.body {
        ack.seen.clear();
    }
    if datagram.encoded_len() > room
        && let Some(Body::Ack(ack)) = &mut datagram.body
    {
        ack.challenge = 0;
    }
}

/// The bytes that one more update adds to a datagram.
pub(super) fn framed_len(update: &proto::Update) -> usize {
    let length = update.encoded_len();
    1 + prost::length_delimiter_len(length) + length
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_news_drops_the_most_told_and_the_oldest_but_never_the_own() {
        let mut queue = Queue::new(7);
        let own = Topic::Record(7);
        queue.push(own);
        queue.told(own, 9);
        (100..1000).for_each(|hash| queue.push(Topic::Liveness(hash)));
        assert_eq!(queue.len(), MOST_TOPICS);
        assert!(queue.topics.contains_key(&own));
        assert!(queue.topics.contains_key(&Topic::Liveness(999)));
        assert!(!queue.topics.contains_key(&Topic::Liveness(100)));
        assert_eq!(queue.order.len(), queue.topics.len());
        queue.told(Topic::Liveness(999), 9);
        queue.push(Topic::Liveness(1000));
        assert!(!queue.topics.contains_key(&Topic::Liveness(999)), "it was told, the others were not");
    }
}
