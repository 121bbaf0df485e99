//! How a site comes into a mesh of sites with one command there: by a token that a site of the mesh has made.
//!
//! Two nodes talk, each of which speaks for its site, under a key that is made from the token's secret: the joiner asks, the
//! inviter answers, three times. `Who are you` brings each the other's word of itself, and both look whether names and prefixes fit;
//! `let us in` has the inviter let the joiner in and brings its word for that; `give us the keys` brings the mesh's cluster
//! keys, sealed for the joining site. Only then does the joiner install anything. Invariants: a token brings in one site, once, and
//! none after its time, by this node's monotonic clock; a question is as long as a datagram can be, so no answer is longer;
//! neither side changes anything for a site that does not fit.

mod inviter;
mod joiner;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Instant;

use prost::Message;
use rand_core::RngCore;

use super::Mesh;
use super::api::{MeshEvent, Output, Rejected};
use super::proto;
use crate::seal::{KeyId, KeyRing, MAX_CONTENT, MAX_DATAGRAM, key_id};
use crate::site::{ClaimedStatement, SignedStatement};
use crate::types::SiteName;
use inviter::Invitation;
pub use inviter::{LONGEST_INVITATION, Terms};
pub use joiner::JoinError;
use joiner::Joining;

/// Clocks that differ by more are told of.
const CLOCKS: u64 = 60;
const PROOF_DOMAIN: &[u8] = b"weft join v1\0";

const WHO: u32 = 0;
const LET_IN: u32 = 1;
const KEYS: u32 = 2;
const GIVEN_UP: u32 = 3;

#[derive(Debug, Default)]
pub(super) struct Joins {
    invitations: VecDeque<Invitation>,
    joining: Option<Joining>,
    /// What time people say it is, and when this node's caller said so.
    clock: Option<(u64, Instant)>,
}

impl Joins {
    /// Whether a datagram is sealed with the key of an invitation of this node, or of the one that it follows.
    pub(super) fn knows(&self, datagram: &[u8]) -> bool {
        self.ring(datagram).is_some()
    }

    fn ring(&self, datagram: &[u8]) -> Option<&KeyRing> {
        let id = key_id(datagram)?;
        let joining = self.joining.iter().map(|joining| &joining.ring);
        let mut rings = self.invitations.iter().map(|invitation| &invitation.ring).chain(joining);
        rings.find(|ring| ring.first() == id)
    }
}

impl Mesh {
    /// Takes what time people say it is, Unix time: only so that they hear of sites where it is another.
    pub fn set_clock(&mut self, unix_seconds: u64, now: Instant) {
        self.advance(now);
        self.joins.clock = Some((unix_seconds, self.now));
    }

    pub(super) fn receive_joining(&mut self, from: SocketAddr, datagram: &[u8]) -> Result<(), Rejected> {
        let Some(ring) = self.joins.ring(datagram).cloned() else { return Err(Rejected::UnknownKey) };
        let content = ring.open(&self.config.cluster, datagram)?;
        let message = proto::Joining::decode(&content[..]).map_err(|_| Rejected::Malformed)?;
        if message.answers {
            return self.on_join_answer(&message);
        }
        if datagram.len() < MAX_DATAGRAM - 1 {
            return Err(Rejected::Malformed);
        }
        let id = ring.first();
        let place = self.joins.invitations.iter().position(|invitation| invitation.id == id);
        let Some(place) = place else { return Err(Rejected::Reflected) };
        let answer = self.answer(place, &message)?;
        let answer = proto::Joining {
            step: message.step,
            attempt: message.attempt,
            answers: true,
            clock: self.clock(),
            ..answer
        };
        self.send_joining(&ring, from, &answer);
        Ok(())
    }

    fn verified(&self, message: &proto::Joining) -> Result<SignedStatement, Rejected> {
        let signed = message.statement.as_ref().ok_or(Rejected::Malformed)?;
        let claimed = ClaimedStatement::parse(signed).map_err(|_| Rejected::Malformed)?;
        claimed.verify(&self.config.cluster).map_err(|_| Rejected::BadSignature)
    }

    fn clock(&self) -> u64 {
        let since = |at: Instant| self.now.saturating_duration_since(at).as_secs();
        self.joins.clock.map_or(0, |(unix, at)| unix + since(at))
    }

    fn compare_clocks(&mut self, site: &SiteName, theirs: u64) {
        let seconds = self.clock().abs_diff(theirs);
        if theirs > 0 && self.clock() > 0 && seconds > CLOCKS {
            let site = site.clone();
            self.outputs.push_back(Output::Event(MeshEvent::ClocksApart { site, seconds }));
        }
    }

    fn send_question(&mut self, ring: &KeyRing, to: SocketAddr, mut question: proto::Joining) {
        let length = question.encoded_len();
        // A tag of one byte and a length of one or two: of 127 bytes more than these one is missing.
        let room = MAX_CONTENT.saturating_sub(length + 2);
        question.padding =
            vec![0; if room >= 128 { room.max(129) - 1 - usize::from(room == 128) } else { room }];
        self.send_joining(ring, to, &question);
    }

    fn send_joining(&mut self, ring: &KeyRing, to: SocketAddr, message: &proto::Joining) {
        let mut nonce = [0; 24];
        self.rng.fill_bytes(&mut nonce);
        let datagram = ring.seal(&self.config.cluster, nonce, &message.encode_to_vec());
        self.counters.sent += 1;
        self.counters.sent_bytes += datagram.len() as u64;
        self.outputs.push_back(Output::Send { to, datagram });
    }
}

fn proof_content(attempt: u64, id: KeyId) -> Vec<u8> {
    [&attempt.to_be_bytes()[..], &id.0].concat()
}
