//! One pair that is relayed for: which address is whose, and what goes where. Pure.
//!
//! The relay has no key of the pair's sessions. A handshake says by its first MAC whom it is meant for, so whom it is from; that
//! anybody can write who knows the public keys, so an address counts for good only once the other end has answered what came from
//! there. Invariants: what is sent is what was received, each message once and only to the other end; what is remembered is
//! bounded.

pub mod state;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use weft_wire::handshake::{Mac1Key, Outside};
use weft_wire::types::{NodeName, TunnelKey};

/// An end that was silent for so long is believed to have moved, when its session's index comes from elsewhere.
const MOVED: Duration = Duration::from_secs(1);
/// A pair without a packet for so long is given up.
const IDLE: Duration = Duration::from_secs(180);
/// So is one that no handshake came for.
const UNUSED: Duration = Duration::from_secs(30);
/// An initiation that waited no longer is answered before its sender asks again, or elsewhere.
const FRESH: Duration = Duration::from_secs(2);
/// The initiations of an end that an answer may still come to, and the indices that its sessions may have.
const RECENT: usize = 4;

/// One of the two, with the public keys that it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub node: NodeName,
    /// Its keys: two while it changes them.
    pub keys: Vec<TunnelKey>,
}

/// Why something was not forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Refused {
    /// It is no message of WireGuard.
    NotWireguard,
    /// It is a handshake for neither of the pair, or answers none.
    NotOfThePair,
    /// It comes from an address that is neither's.
    Stranger,
    /// Nobody has heard of the other end yet.
    NoOtherEnd,
    /// The pair sends more than it may.
    PairLimit,
    /// All pairs together send more than they may.
    TotalLimit,
    /// The kernel did not take it.
    NotSent,
}

impl Refused {
    /// Every reason, in the order of the counters.
    pub const ALL: [Self; 7] = [
        Self::NotWireguard,
        Self::NotOfThePair,
        Self::Stranger,
        Self::NoOtherEnd,
        Self::PairLimit,
        Self::TotalLimit,
        Self::NotSent,
    ];

    /// Returns a short name, for metric labels.
    pub fn label(self) -> &'static str {
        match self {
            Self::NotWireguard => "not_wireguard",
            Self::NotOfThePair => "not_of_the_pair",
            Self::Stranger => "stranger",
            Self::NoOtherEnd => "no_other_end",
            Self::PairLimit => "pair_limit",
            Self::TotalLimit => "total_limit",
            Self::NotSent => "not_sent",
        }
    }
}

/// What to do with a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Send it there; where an initiation waited for its sender, send that to its sender too.
    Forward {
        /// The other end.
        to: SocketAddr,
        /// What the other end had said before.
        held: Option<Vec<u8>>,
    },
    /// It waits for the other end, or is not needed; `held` goes to the sender.
    Hold {
        /// What the other end had said before.
        held: Option<Vec<u8>>,
    },
    /// Nothing.
    Drop(Refused),
}

/// What a pair counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Messages forwarded.
    pub forwarded: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Handshakes of the pair among what came: initiations and answers to them.
    pub handshakes: u64,
    refused: [u64; Refused::ALL.len()],
}

impl Counts {
    /// Returns how many messages were not forwarded, for each reason.
    pub fn refusals(&self) -> impl Iterator<Item = (Refused, u64)> {
        Refused::ALL.into_iter().zip(self.refused)
    }

    /// Returns how many messages were not forwarded.
    pub fn refused(&self) -> u64 {
        self.refused.iter().sum()
    }

    /// Counts messages that were not forwarded.
    pub fn refuse(&mut self, why: Refused, messages: usize) {
        self.refused[why as usize] += messages as u64;
    }

    /// Adds what another pair counted.
    pub fn add(&mut self, other: &Self) {
        self.forwarded += other.forwarded;
        self.bytes += other.bytes;
        self.handshakes += other.handshakes;
        for (sum, count) in self.refused.iter_mut().zip(other.refused) {
            *sum += count;
        }
    }
}

/// A pair.
#[derive(Debug)]
pub struct Pair {
    ends: [End; 2],
    allowance: Allowance,
    made: Instant,
    last: Option<Instant>,
    /// What it counted.
    pub counts: Counts,
}

#[derive(Debug)]
struct End {
    member: Member,
    /// Handshakes for it have a MAC under one of these.
    mac1: Vec<Mac1Key>,
    leg: Option<Leg>,
    /// Where its latest initiations came from, by their index.
    asked: VecDeque<(u32, SocketAddr)>,
    /// What data for it names.
    indices: VecDeque<u32>,
    /// Its last initiation, while nobody has heard of the other end.
    held: Option<(Vec<u8>, Instant)>,
}

#[derive(Debug, Clone, Copy)]
struct Leg {
    at: SocketAddr,
    heard: Instant,
    /// The other end answered what came from there.
    sure: bool,
}

impl End {
    fn new(member: Member) -> Self {
        let mac1 = member.keys.iter().map(Mac1Key::of).collect();
        Self { member, mac1, leg: None, asked: VecDeque::new(), indices: VecDeque::new(), held: None }
    }

    fn is_meant(&self, handshake: &[u8]) -> bool {
        self.mac1.iter().any(|key| key.holds(handshake))
    }

    fn is_at(&mut self, at: SocketAddr, sure: bool, now: Instant) {
        self.leg = Some(Leg { at, heard: now, sure });
    }
}

fn note<T>(recent: &mut VecDeque<T>, item: T) {
    if recent.len() == RECENT {
        recent.pop_front();
    }
    recent.push_back(item);
}

impl Pair {
    /// Begins to relay for a pair, at most so many bytes a second.
    pub fn new(members: [Member; 2], bytes_a_second: u64, now: Instant) -> Self {
        Self {
            ends: members.map(End::new),
            allowance: Allowance::new(bytes_a_second, now),
            made: now,
            last: None,
            counts: Counts::default(),
        }
    }

    /// Whether it is of these two nodes.
    pub fn is_of(&self, one: &NodeName, other: &NodeName) -> bool {
        let [a, b] = self.nodes();
        (a, b) == (one, other) || (a, b) == (other, one)
    }

    /// Returns the names of the two.
    pub fn nodes(&self) -> [&NodeName; 2] {
        [&self.ends[0].member.node, &self.ends[1].member.node]
    }

    /// Returns where the two are, as far as they have been heard.
    pub fn legs(&self) -> [Option<SocketAddr>; 2] {
        [0, 1].map(|end| self.ends[end].leg.map(|leg| leg.at))
    }

    /// Takes the keys that the two have now.
    pub fn follow(&mut self, members: &[Member]) {
        for end in &mut self.ends {
            let member = members.iter().find(|member| member.node == end.member.node);
            if let Some(member) = member.filter(|member| **member != end.member) {
                end.mac1 = member.keys.iter().map(Mac1Key::of).collect();
                end.member = member.clone();
            }
        }
    }

    /// Whether nobody uses it.
    pub fn is_over(&self, now: Instant) -> bool {
        match self.last {
            Some(last) => now.duration_since(last) >= IDLE,
            None => now.duration_since(self.made) >= UNUSED,
        }
    }

    /// Takes a message.
    pub fn handle(&mut self, from: SocketAddr, message: &[u8], now: Instant) -> Step {
        if !self.allowance.take(message.len(), now) {
            self.counts.refuse(Refused::PairLimit, 1);
            return Step::Drop(Refused::PairLimit);
        }
        let outside = Outside::read(message);
        let step = match outside {
            None => Step::Drop(Refused::NotWireguard),
            Some(Outside::Initiation { sender }) => self.initiation(from, sender, message, now),
            Some(Outside::Response { sender, receiver }) => {
                self.response(from, (sender, receiver), message, now)
            }
            Some(Outside::Cookie { receiver } | Outside::Data { receiver }) => self.data(from, receiver, now),
        };
        let mut count = |length: usize| {
            self.counts.forwarded += 1;
            self.counts.bytes += length as u64;
        };
        match &step {
            Step::Forward { held, .. } => {
                count(message.len());
                held.iter().for_each(|held| count(held.len()));
                self.last = Some(now);
            }
            Step::Hold { held } => held.iter().for_each(|held| count(held.len())),
            Step::Drop(why) => self.counts.refuse(*why, 1),
        }
        let shakes_hands = matches!(outside, Some(Outside::Initiation { .. } | Outside::Response { .. }));
        self.counts.handshakes += u64::from(shakes_hands && !matches!(step, Step::Drop(_)));
        step
    }

    /// Returns whose handshake it is: the one that it is not meant for.
    fn author(&self, message: &[u8]) -> Option<usize> {
        [0, 1].into_iter().find(|end| self.ends[1 - end].is_meant(message))
    }

    fn initiation(&mut self, from: SocketAddr, index: u32, message: &[u8], now: Instant) -> Step {
        let Some(author) = self.author(message) else { return Step::Drop(Refused::NotOfThePair) };
        let held = self.ends[1 - author].held.take();
        let other = self.ends[1 - author].leg;
        let end = &mut self.ends[author];
        note(&mut end.asked, (index, from));
        match end.leg.filter(|leg| leg.sure) {
            Some(leg) if leg.at == from => end.is_at(from, true, now),
            // It may have moved; the other's answer will tell.
            Some(_) => {}
            None => end.is_at(from, false, now),
        }
        match (other, held) {
            // The sender answers it. Would both answer, a kernel at each end would forget its own question, and take neither answer.
            (Some(_), Some((held, at))) if now.duration_since(at) < FRESH => Step::Hold { held: Some(held) },
            (Some(other), held) => Step::Forward { to: other.at, held: held.map(|(held, _)| held) },
            (None, held) => {
                end.held = Some((message.to_vec(), now));
                Step::Hold { held: held.map(|(held, _)| held) }
            }
        }
    }

    fn response(
        &mut self,
        from: SocketAddr,
        (sender, receiver): (u32, u32),
        message: &[u8],
        now: Instant,
    ) -> Step {
        let Some(author) = self.author(message) else { return Step::Drop(Refused::NotOfThePair) };
        let asked = self.ends[1 - author].asked.iter().find(|(index, _)| *index == receiver);
        let Some((_, to)) = asked.copied() else { return Step::Drop(Refused::NotOfThePair) };
        self.ends[1 - author].is_at(to, true, now);
        self.ends[author].is_at(from, true, now);
        note(&mut self.ends[1 - author].indices, receiver);
        note(&mut self.ends[author].indices, sender);
        Step::Forward { to, held: None }
    }

    fn data(&mut self, from: SocketAddr, receiver: u32, now: Instant) -> Step {
        let known = [0, 1].into_iter().find(|end| self.ends[*end].leg.is_some_and(|leg| leg.at == from));
        let author = match known {
            Some(author) => {
                let sure = self.ends[author].leg.is_some_and(|leg| leg.sure);
                self.ends[author].is_at(from, sure, now);
                author
            }
            None => {
                // Its translator gave it another port: only the two know the index.
                let author = [0, 1].into_iter().find(|end| self.ends[1 - end].indices.contains(&receiver));
                let Some(author) = author else { return Step::Drop(Refused::Stranger) };
                let silent = self.ends[author].leg.is_none_or(|leg| now.duration_since(leg.heard) >= MOVED);
                if silent {
                    self.ends[author].is_at(from, true, now);
                }
                author
            }
        };
        match self.ends[1 - author].leg {
            Some(leg) => Step::Forward { to: leg.at, held: None },
            None => Step::Drop(Refused::NoOtherEnd),
        }
    }
}

/// Bytes that may be sent: so many a second, and a quarter of a second's at once.
#[derive(Debug)]
pub struct Allowance {
    a_second: u64,
    left: u64,
    at: Instant,
}

impl Allowance {
    /// Makes one that is full.
    pub fn new(a_second: u64, now: Instant) -> Self {
        Self { a_second, left: Self::most(a_second), at: now }
    }

    fn most(a_second: u64) -> u64 {
        (a_second / 4).max(1 << 16)
    }

    /// Takes from it what there is enough for.
    pub fn take(&mut self, length: usize, now: Instant) -> bool {
        let passed = u64::try_from(now.duration_since(self.at).as_micros()).unwrap_or(u64::MAX);
        let more = self.a_second.saturating_mul(passed) / 1_000_000;
        if more > 0 {
            self.left = self.left.saturating_add(more).min(Self::most(self.a_second));
            self.at = now;
        }
        let enough = self.left >= length as u64;
        if enough {
            self.left -= length as u64;
        }
        enough
    }
}

#[cfg(test)]
pub(super) mod tests;
