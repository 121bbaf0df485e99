//! Datagrams for members that are not reached straight: from the sender to a keeper of the receiver, and from there on.
//!
//! Invariants: what is passed on came from its sender itself, so that nothing is passed on twice; it goes to members only that
//! named this node as their keeper; each sender and each receiver has its share; one datagram goes out for one that comes in.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use prost::Message;

use super::membership::{Id, name_hash};
use super::proto::{self, Body};
use super::way::Way;
use super::{Mesh, Rejected, ReplyTo};
use crate::seal::MAX_CONTENT;
use crate::types::NodeName;

/// What the datagram around another one takes besides the two names: the tags and lengths of the names (4), session (9), sequence
/// number (11), body (5), inner datagram (4).
const AROUND: usize = 33;
/// A sender, and a receiver, has one datagram in this time on average.
const EACH: Duration = Duration::from_millis(20);
/// And so many at once.
const BURST: u32 = 200;
/// The most shares that are remembered.
const MAX_SHARES: usize = 8192;

/// Why a datagram was not passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NotForwarded {
    /// Its receiver did not name this node as its keeper.
    NotKept,
    /// Its receiver has not been heard for too long.
    NotHeard,
    /// It was passed on already, or its sender is not whom it came from.
    NotSender,
    /// Its sender or its receiver had its share.
    TooMany,
    /// It does not fit: of this node's own datagrams too.
    TooLong,
}

impl NotForwarded {
    /// Every reason, in the order of the counters.
    pub const ALL: [Self; 5] = [Self::NotKept, Self::NotHeard, Self::NotSender, Self::TooMany, Self::TooLong];

    /// Returns a short name, for metric labels.
    pub fn label(self) -> &'static str {
        match self {
            Self::NotKept => "not_kept",
            Self::NotHeard => "not_heard",
            Self::NotSender => "not_sender",
            Self::TooMany => "too_many",
            Self::TooLong => "too_long",
        }
    }
}

/// How much was passed on for whom: for each the time at which it has all of its share again (the generic cell rate algorithm,
/// ITU-T I.371).
#[derive(Debug, Default)]
pub(super) struct Shares {
    whole_at: BTreeMap<(Side, u64), Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Sender,
    Receiver,
}

impl Shares {
    /// Takes one datagram from both shares, if both have one left.
    fn take(&mut self, sender: u64, receiver: u64, now: Instant) -> bool {
        if self.whole_at.len() + 2 > MAX_SHARES {
            self.whole_at.retain(|_, at| *at > now);
        }
        let keys = [(Side::Sender, sender), (Side::Receiver, receiver)];
        let whole_at = keys.map(|key| self.whole_at.get(&key).copied().unwrap_or(now).max(now));
        let has_left = whole_at.iter().all(|at| *at < now + EACH * BURST);
        if has_left && self.whole_at.len() + 2 <= MAX_SHARES {
            self.whole_at.extend(keys.into_iter().zip(whole_at.map(|at| at + EACH)));
            return true;
        }
        false
    }
}

impl Mesh {
    /// The bytes that a datagram may have that goes to `name` through `keeper`; it is the same on both parts of its way.
    fn room_through(&self, keeper: &NodeName, name: &str) -> usize {
        let (own, keeper) = (self.config.node.as_str().len(), keeper.as_str().len());
        MAX_CONTENT - AROUND - keeper - own.max(name.len())
    }

    /// Sends a datagram to a member through one of its keepers.
    pub(super) fn send_through(&mut self, keeper: Id, name: &str, body: Body, first: Vec<proto::Update>) {
        let Some(to) = self.straight(keeper) else { return };
        let keeper = self.table.at(keeper).name().clone();
        let most = self.room_through(&keeper, name);
        let room = most.min(self.room_within_credit(MAX_CONTENT).saturating_sub(MAX_CONTENT - most));
        let Some(datagram) = self.pack(name, body, first, room) else {
            self.counters.not_forwarded[NotForwarded::TooLong as usize] += u64::from(room == most);
            return;
        };
        self.send_around(to, keeper.as_str(), datagram);
    }

    fn send_around(&mut self, to: SocketAddr, name: &str, datagram: Vec<u8>) {
        self.seq += 1;
        let around = proto::Datagram {
            from: self.config.node.to_string(),
            to: name.to_string(),
            session: self.session,
            seq: self.seq,
            body: Some(Body::Forward(proto::Forward { datagram })),
            ..proto::Datagram::default()
        };
        if around.encoded_len() > MAX_CONTENT {
            self.counters.not_forwarded[NotForwarded::TooLong as usize] += 1;
            return;
        }
        let key = self.key_for(name, None);
        self.emit(key, to, name, &around.encode_to_vec());
    }

    /// Takes a datagram around another: it is for this node, or to be passed on.
    pub(super) fn receive_forward(
        &mut self,
        reply: &ReplyTo,
        around: &proto::Datagram,
        forward: &proto::Forward,
        length: usize,
    ) -> Result<(), Rejected> {
        let inner = proto::Datagram::decode(&forward.datagram[..]).map_err(|_| Rejected::Malformed)?;
        let stray = !around.updates.is_empty() || matches!(inner.body, Some(Body::Forward(_)));
        if stray || inner.to.is_empty() || inner.from == inner.to {
            return Err(Rejected::Malformed);
        }
        if inner.to != self.config.node.as_str() {
            self.remember(reply, around, None);
            self.note_arrival(reply);
            self.open_credit(reply, length);
            self.ask_back(reply);
            self.close_credit(reply);
            let outcome = self.pass_on(reply, &inner, &forward.datagram);
            match outcome {
                Ok(()) => self.counters.forwarded += 1,
                Err(reason) => self.counters.not_forwarded[reason as usize] += 1,
            }
            return Ok(());
        }
        // Who wraps its own datagram for this node reaches it without.
        if inner.from == around.from {
            return Err(Rejected::Malformed);
        }
        self.receive_message(reply.from, inner, reply.key, true, length)?;
        self.remember(reply, around, None);
        self.note_arrival(reply);
        Ok(())
    }

    fn pass_on(
        &mut self,
        reply: &ReplyTo,
        inner: &proto::Datagram,
        datagram: &[u8],
    ) -> Result<(), NotForwarded> {
        if inner.from != reply.name.as_str() {
            return Err(NotForwarded::NotSender);
        }
        let receiver = name_hash(&inner.to);
        let id = self.table.find(receiver).filter(|id| self.keeps(*id)).ok_or(NotForwarded::NotKept)?;
        let Some(Way::At(to)) = self.way(id) else { return Err(NotForwarded::NotHeard) };
        if !self.shares.take(reply.hash, receiver, self.now) {
            return Err(NotForwarded::TooMany);
        }
        self.send_around(to, &inner.to, datagram.to_vec());
        Ok(())
    }
}

#[cfg(test)]
mod tests;
