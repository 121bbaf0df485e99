//! Whether a sender is there: no datagram is taken twice, and who has not answered yet is sent no more than it sends.
//!
//! Who holds no key can still repeat what it recorded, from any address. A datagram of this session is taken once. A node that has not
//! heard the sender since it started, or not from there, takes what it reads, which was signed and true once, and asks back where
//! more is to be said or done than the datagram pays for: with the Ack, if that is wanted, else by a Ping. Until the sender has answered at that address, all that goes out because of its
//! datagram is no more than the datagram was, on the wire; what did not fit is told by an anti-entropy exchange afterwards.
//!
//! Invariants: while [`Mesh::credit`] is there, nothing is emitted beyond it; a question goes out once a second and sender, besides
//! those in Acks; an address is one to send to only after it answered.

use std::net::SocketAddr;
use std::time::Duration;

use prost::Message;
use rand_core::RngCore;

use super::contact::{Challenge, Contact, Question};
use super::proto::{self, Body};
use super::{CHALLENGE_INTERVAL, Mesh, Rejected, ReplyTo};
use crate::seal::{MAX_CONTENT, MAX_DATAGRAM};

/// What a datagram takes on the wire besides itself (RFC 8200 s3, RFC 768): two small answers are more than a large one.
const HEADERS: usize = 48;
/// What the seal adds.
const SEAL: usize = MAX_DATAGRAM - MAX_CONTENT;
/// A question stays the same for so long, for answers that come late.
const SAME_QUESTION: Duration = Duration::from_secs(10);
/// In a Ping that asks back: room for the Ack to ask back too.
const PADDING: usize = 24;

/// What may still be sent because of a datagram whose sender has not answered yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Credit {
    left: usize,
    /// Something was not sent.
    short: bool,
    /// It was asked back.
    asked: bool,
}

impl Credit {
    /// For a datagram of so many bytes.
    fn of(length: usize) -> Self {
        Self { left: length + HEADERS, short: false, asked: false }
    }

    /// The most content of one more datagram.
    fn room(&self) -> usize {
        self.left.saturating_sub(HEADERS + SEAL).min(MAX_CONTENT)
    }
}

/// What a datagram shows of its sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Proof {
    /// It is of the sender's present session.
    Session,
    /// And the sender is where it came from.
    Address,
}

impl Mesh {
    /// Whether the sender answered in this session, at the address that the datagram came from straight.
    pub(super) fn is_proven(&self, reply: &ReplyTo) -> bool {
        let place = (!reply.forwarded).then_some(reply.from);
        self.table.contact(reply.hash).is_some_and(|contact| contact.is_proven(place))
    }

    /// Begins to answer a datagram of so many bytes.
    pub(super) fn open_credit(&mut self, reply: &ReplyTo, length: usize) {
        self.credit = (!self.is_proven(reply)).then(|| Credit::of(length));
    }

    /// Ends to answer a datagram; whoever answered in it hears what it was not told before.
    pub(super) fn close_credit(&mut self, reply: &ReplyTo) {
        let credit = self.credit.take();
        let Some(contact) = self.table.contact_mut(reply.hash) else { return };
        match credit {
            Some(credit) => contact.stinted |= credit.short,
            None if std::mem::take(&mut contact.stinted) => {
                if let Some(id) = self.table.find(reply.hash) {
                    self.sync_with(id);
                }
            }
            None => {}
        }
    }

    /// The most content of the next datagram, of so much at most.
    pub(super) fn room_within_credit(&self, most: usize) -> usize {
        self.credit.map_or(most, |credit| credit.room().min(most))
    }

    /// Takes that a datagram goes out.
    pub(super) fn spend(&mut self, length: usize) {
        if let Some(credit) = &mut self.credit {
            credit.left = credit.left.saturating_sub(length + HEADERS);
        }
    }

    /// Takes that something does not go out, or not all of it.
    pub(super) fn fall_short(&mut self) {
        if let Some(credit) = &mut self.credit {
            credit.short = true;
        }
    }

    /// Whether something did not go out.
    pub(super) fn fell_short(&self) -> bool {
        self.credit.is_some_and(|credit| credit.short)
    }

    /// Whether it matters that the sender answers: it is owed something, or where it is stands in no record of its own.
    pub(super) fn needs_proof(&self, reply: &ReplyTo) -> bool {
        let owed = self.table.contact(reply.hash).is_some_and(|contact| contact.stinted);
        self.credit.is_some() && (owed || !self.announces(reply.hash, reply.from))
    }

    /// What a datagram shows: an Ack has the token of a question that was sent where it comes from.
    pub(super) fn proof_of(&self, reply: &ReplyTo, message: &proto::Datagram) -> Option<Proof> {
        let Some(Body::Ack(ack)) = &message.body else { return None };
        let at = (!reply.forwarded).then_some(reply.from);
        let shown = |to: Option<SocketAddr>| {
            let there = at.is_some() && (to == at || self.announces(reply.hash, reply.from));
            if there { Proof::Address } else { Proof::Session }
        };
        let contact = self.table.contact(reply.hash);
        let asked =
            contact.filter(|contact| contact.session == message.session).and_then(|known| known.asked);
        if let Some(asked) = asked.filter(|asked| asked.token == ack.token) {
            return Some(shown(asked.to));
        }
        let challenge = contact.and_then(|contact| contact.challenge);
        let challenge = challenge.filter(|sent| (sent.session, sent.token) == (message.session, ack.token));
        if let Some(challenge) = challenge {
            return Some(shown(challenge.to));
        }
        self.asked_by_ping(reply.hash, ack.token).map(shown)
    }

    /// Whether the member's own record has the address.
    fn announces(&self, hash: u64, address: SocketAddr) -> bool {
        self.table.find_member(hash).is_some_and(|member| {
            let facts = &member.signed.record().facts;
            facts.gossip.contains(&address) || facts.reachability.outside.contains(&address)
        })
    }

    /// The token that an Ack to the sender asks for; 0 where it need not answer.
    pub(super) fn question_for(&mut self, reply: &ReplyTo) -> u64 {
        if self.credit.is_none() {
            return 0;
        }
        let (now, to) = (self.now, (!reply.forwarded).then_some(reply.from));
        let drawn = self.rng.next_u64().max(1);
        let Some(contact) = self.table.contact_mut(reply.hash) else { return 0 };
        let same = contact.asked.filter(|asked| asked.to == to && now < asked.drawn + SAME_QUESTION);
        let question = same.unwrap_or(Question { token: drawn, to, drawn: now, sent: None });
        contact.asked = Some(question);
        question.token
    }

    /// Takes that a question went out.
    pub(super) fn note_asked(&mut self, name: &str) {
        let now = self.now;
        if let Some(credit) = &mut self.credit {
            credit.asked = true;
        }
        let hash = super::name_hash(name);
        if let Some(asked) = self.table.contact_mut(hash).and_then(|contact| contact.asked.as_mut()) {
            asked.sent = Some(now);
        }
    }

    /// Whether the sender did not answer a question in time: it may not know those in Acks.
    pub(super) fn is_question_overdue(&self, reply: &ReplyTo) -> bool {
        let asked = self.table.contact(reply.hash).and_then(|contact| contact.asked);
        let sent = asked.and_then(|asked| asked.sent);
        self.credit.is_some() && sent.is_some_and(|sent| self.now >= sent + CHALLENGE_INTERVAL)
    }

    /// Asks a sender that has not answered yet for an Ack.
    pub(super) fn ask_back(&mut self, reply: &ReplyTo) {
        let Some(credit) = self.credit.filter(|credit| !credit.asked) else { return };
        let asked = self.table.contact(reply.hash).and_then(|contact| contact.asked);
        let sent = asked.filter(|asked| asked.to == (!reply.forwarded).then_some(reply.from));
        let sent = sent.and_then(|asked| asked.sent);
        if sent.is_some_and(|sent| self.now < sent + CHALLENGE_INTERVAL) {
            return;
        }
        let token = self.question_for(reply);
        if self.ping_back(reply, token, credit.room()) {
            self.note_asked(reply.name.as_str());
        }
    }

    /// Sends a Ping that only the living sender can answer, of at most so much content; returns whether it went out.
    fn ping_back(&mut self, reply: &ReplyTo, token: u64, room: usize) -> bool {
        if reply.forwarded {
            // It goes where the member is known to be.
            let before = self.counters.sent;
            self.reply(reply, Body::Ping(proto::Ping { token, ..Default::default() }), Vec::new());
            return self.counters.sent > before;
        }
        self.seq += 1;
        let mut ping = proto::Datagram {
            from: self.config.node.to_string(),
            to: reply.name.to_string(),
            session: self.session,
            seq: self.seq,
            body: Some(Body::Ping(proto::Ping { token, ..Default::default() })),
            ..proto::Datagram::default()
        };
        let spare = room.saturating_sub(ping.encoded_len());
        // Its tag and its length are two bytes.
        let padding = vec![0; spare.saturating_sub(2).min(PADDING)];
        ping.body = Some(Body::Ping(proto::Ping { token, padding, ..Default::default() }));
        let fits = ping.encoded_len() <= room;
        if fits {
            let key = self.key_for(reply.name.as_str(), Some(reply.key));
            self.emit(key, reply.from, reply.name.as_str(), &ping.encode_to_vec());
        }
        fits
    }

    /// Takes no datagram twice; returns whether it answers a challenge.
    pub(super) fn check_fresh(
        &mut self,
        reply: &ReplyTo,
        message: &proto::Datagram,
        length: usize,
    ) -> Result<bool, Rejected> {
        let Some(contact) = self.table.contact(reply.hash) else { return Ok(false) };
        if contact.session == message.session {
            return if contact.window.is_fresh(message.seq) { Ok(false) } else { Err(Rejected::Replayed) };
        }
        if message.session > contact.session && !contact.strict {
            return Ok(false);
        }
        let challenge = contact.challenge;
        if let (Some(challenge), Some(Body::Ack(ack))) = (challenge, &message.body)
            && (challenge.session, challenge.token) == (message.session, ack.token)
        {
            return Ok(true);
        }
        if challenge.is_none_or(|challenge| self.now >= challenge.at + CHALLENGE_INTERVAL) {
            self.challenge(reply, message.session, length);
        }
        Err(Rejected::Replayed)
    }

    /// Asks whoever sent a datagram of an earlier session whether it is there; replayed or not, it is sent no more than it sent.
    fn challenge(&mut self, reply: &ReplyTo, session: u64, length: usize) {
        let token = self.rng.next_u64();
        let credit = Credit::of(length);
        self.credit = Some(credit);
        let sent = self.ping_back(reply, token, credit.room());
        self.credit = None;
        let to = (!reply.forwarded).then_some(reply.from);
        if sent && let Some(contact) = self.table.contact_mut(reply.hash) {
            contact.challenge = Some(Challenge { session, token, at: self.now, to });
        }
    }

    pub(super) fn remember(&mut self, reply: &ReplyTo, message: &proto::Datagram, proof: Option<Proof>) {
        let known = self.table.contact(reply.hash);
        let stale = known.is_none_or(|contact| contact.session != message.session);
        if stale {
            let mut contact = Contact::new(message.session, self.now);
            if let Some(known) = known {
                // From here on every other session has to answer a challenge: there are two, or one is old.
                contact.strict = known.strict || message.session < known.session;
                (contact.rtt, contact.loss, contact.preferred) = (known.rtt, known.loss, known.preferred);
                contact.heard = known.heard;
            }
            self.table.set_contact(reply.hash, contact);
        }
        let (now, straight) = (self.now, (!reply.forwarded).then_some(reply.from));
        if let Some(contact) = self.table.contact_mut(reply.hash) {
            if let Some(proof) = proof {
                contact.prove(straight.filter(|_| proof == Proof::Address));
            }
            contact.take(message.seq, straight, now);
        }
    }
}
