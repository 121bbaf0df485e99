//! How a secret of two sites gets to a node: offered, asked for with a key that is used once, answered with a box for that key.
//!
//! The node signs what it asks, the site that makes the secret signs what it answers. Keys and boxes of ML-KEM-768 are longer than a
//! datagram, so a question and an answer go in two parts each, one datagram a part; whoever lost one is offered the secret again.
//! Invariants: a node asks only a member of the site that makes the secret; what parts are kept of whom is bounded.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use blake2::{Blake2s256, Digest};
use prost::Message;
use rand_core::RngCore;
use zeroize::Zeroizing;

use super::{AHEAD, OVERTAKE};
use crate::kem_box::{self, Seed};
use crate::mesh::api::SiteStanding;
use crate::mesh::membership::Id;
use crate::mesh::proto::{self, Body};
use crate::mesh::{Mesh, ReplyTo};
use crate::pair::{PairSecret, makes};
use crate::record::check;
use crate::seal::KeyId;
use crate::types::PublicKey;

/// The most bytes of one of the two parts of a message.
pub(crate) const MAX_PART: usize = 720;
/// The most first parts that are kept until the second comes.
const MOST_PARTS: usize = 256;
/// A question without an answer is repeated at the next offer after this.
const AGAIN: Duration = Duration::from_secs(1);
/// A question that was not answered is forgotten at the next offer after this: who was asked may be gone.
const PATIENCE: Duration = Duration::from_secs(10);
const QUESTION_DOMAIN: &[u8] = b"weft pair question v1\0";
pub(super) const ANSWER_DOMAIN: &[u8] = b"weft pair answer v1\0";

/// Questions under way, and halves of messages.
#[derive(Debug, Default)]
pub(super) struct Talk {
    /// By the other site's key.
    asking: BTreeMap<PublicKey, Asking>,
    /// By the sender's name hash, the attempt, and whether it is an answer: which part came.
    parts: BTreeMap<(u64, u64, bool), (u32, Vec<u8>)>,
}

#[derive(Debug)]
struct Asking {
    /// The name hash of whom.
    whom: u64,
    /// The key of the site that makes the secret.
    maker: PublicKey,
    attempt: u64,
    seed: Seed,
    question: Vec<u8>,
    began: Instant,
    sent: Instant,
}

impl Talk {
    /// Forgets questions about sites that are not in.
    pub(super) fn retain(&mut self, within: &BTreeSet<PublicKey>) {
        self.asking.retain(|other, _| within.contains(other));
    }

    /// The questions under way: with whom the secret is shared, the attempt and what was asked.
    #[cfg(test)]
    pub(super) fn asked_about(&self) -> BTreeMap<PublicKey, (u64, Vec<u8>)> {
        let asked = |asking: &Asking| (asking.attempt, asking.question.clone());
        self.asking.iter().map(|(other, asking)| (*other, asked(asking))).collect()
    }

    /// Keeps one part, or returns both put together.
    fn put_together(&mut self, from: u64, part: &proto::PairPart) -> Option<Vec<u8>> {
        let place = (from, part.attempt, part.answers);
        match self.parts.remove(&place) {
            Some((0, first)) if part.part == 1 => return Some([&first[..], &part.content].concat()),
            Some((1, second)) if part.part == 0 => return Some([&part.content[..], &second].concat()),
            // The same once more.
            _ => {}
        }
        if self.parts.len() >= MOST_PARTS {
            // They are halves whose others were lost: who sent them is offered the secret again.
            self.parts.clear();
        }
        self.parts.insert(place, (part.part, part.content.clone()));
        None
    }
}

/// Whether a part is one.
pub(crate) fn is_part(part: &proto::PairPart) -> bool {
    part.part <= 1 && !part.content.is_empty() && part.content.len() <= MAX_PART
}

impl Mesh {
    pub(super) fn offer(&mut self, id: Id, other: PublicKey, latest: KeyId) {
        let offer = proto::PairOffer { other: other.0.to_vec(), latest: latest.0.to_vec() };
        self.send_to_member(id, Body::PairOffer(offer), Vec::new());
    }

    /// Which pair a member of the site that makes its secrets speaks of: the other site's key as this node sees it, and that of the site
    /// that makes them. `of` is the key of the site that does not.
    fn pair_offered(&self, from: Id, of: PublicKey) -> Option<(PublicKey, PublicKey)> {
        let own = self.sites.own_key()?;
        let record = self.table.at(from).signed.record();
        let other = if record.site == self.config.site {
            self.other_members().contains(&of).then_some(of).filter(|other| makes(&own, other))
        } else {
            let view = self.sites.views().get(&record.site)?;
            let member = matches!(view.standing, SiteStanding::Member { .. });
            Some(view.key).filter(|other| member && of == own && makes(other, &own))
        }?;
        let maker = own.max(other);
        self.may_have(from).then_some((other, maker))
    }

    pub(in crate::mesh) fn on_pair_offer(&mut self, reply: &ReplyTo, offer: &proto::PairOffer) {
        let Some(from) = self.table.find(reply.hash) else { return };
        let (Ok(of), Ok(latest)) = (offer.other[..].try_into(), offer.latest[..].try_into()) else { return };
        let Some((other, maker)) = self.pair_offered(from, PublicKey(of)) else { return };
        let has = |secret: &PairSecret| secret.id() == KeyId(latest);
        if self.pairs.held.get(&other).is_some_and(|held| held.secrets.iter().any(has)) {
            return;
        }
        let now = self.now;
        let asking = self.pairs.talk.asking.get_mut(&other);
        match asking.filter(|asking| now < asking.began + PATIENCE) {
            Some(asking) if asking.whom != reply.hash || now < asking.sent + AGAIN => {}
            Some(asking) => {
                asking.sent = now;
                let (attempt, question) = (asking.attempt, asking.question.clone());
                self.send_parts(from, attempt, false, &question);
            }
            None => self.ask_for_secret(from, other, maker, PublicKey(of)),
        }
    }

    pub(super) fn ask_for_secret(&mut self, from: Id, other: PublicKey, maker: PublicKey, of: PublicKey) {
        let mut seed = Zeroizing::new([0; 64]);
        self.rng.fill_bytes(&mut *seed);
        let (seed, attempt) = (Seed(seed), self.rng.next_u64());
        let known = self.pairs.held.get(&other).and_then(|held| held.latest().map(PairSecret::generation));
        let mut question = proto::PairQuestion {
            other: of.0.to_vec(),
            known: known.unwrap_or(0),
            key: seed.public(),
            signature: Vec::new(),
        };
        let content = self.question_content(&maker, self.config.node.as_str(), attempt, &question);
        question.signature = self.config.key.sign_bytes(QUESTION_DOMAIN, &content).to_vec();
        let question = question.encode_to_vec();
        self.send_parts(from, attempt, false, &question);
        let (whom, began, sent) = (self.table.at(from).hash, self.now, self.now);
        let asking = Asking { whom, maker, attempt, seed, question, began, sent };
        self.pairs.talk.asking.insert(other, asking);
    }

    /// What a node signs when it asks.
    fn question_content(
        &self,
        maker: &PublicKey,
        node: &str,
        attempt: u64,
        question: &proto::PairQuestion,
    ) -> Vec<u8> {
        let text = |text: &str| [&(text.len() as u64).to_be_bytes()[..], text.as_bytes()].concat();
        [
            &text(&self.config.cluster)[..],
            &text(node),
            &maker.0,
            &question.other,
            &attempt.to_be_bytes(),
            &question.known.to_be_bytes(),
            &question.key,
        ]
        .concat()
    }

    /// What a site signs when it answers.
    pub(super) fn answer_content(&self, question: &[u8], sealed: &[u8]) -> Vec<u8> {
        let length = (self.config.cluster.len() as u64).to_be_bytes();
        [&length, self.config.cluster.as_bytes(), &Blake2s256::digest(question), sealed].concat()
    }

    fn send_parts(&mut self, to: Id, attempt: u64, answers: bool, content: &[u8]) {
        let (first, second) = content.split_at(content.len() / 2);
        for (part, content) in [(0, first), (1, second)] {
            let part = proto::PairPart { attempt, part, answers, content: content.to_vec() };
            self.send_to_member(to, Body::PairPart(part), Vec::new());
        }
    }

    /// Takes a part that [`is_part`].
    pub(in crate::mesh) fn on_pair_part(&mut self, reply: &ReplyTo, part: &proto::PairPart) {
        let Some(from) = self.table.find(reply.hash) else { return };
        let asked = |asking: &Asking| (asking.whom, asking.attempt) == (reply.hash, part.attempt);
        let wanted = if part.answers {
            self.pairs.talk.asking.values().any(asked)
        } else {
            self.signer.is_some() && self.may_have(from)
        };
        if !wanted {
            return;
        }
        let Some(content) = self.pairs.talk.put_together(reply.hash, part) else { return };
        if part.answers {
            self.on_pair_answer(part.attempt, &content);
        } else {
            self.on_pair_question(from, part.attempt, &content);
        }
    }

    /// Answers a node of one of the two sites that asks for their secrets. What others ask is dropped: they are not offered any.
    fn on_pair_question(&mut self, from: Id, attempt: u64, content: &[u8]) {
        let Some((other, question)) = self.verified_question(from, attempt, content) else { return };
        self.overtake(&other, question.known);
        let Some(held) = self.pairs.held.get(&other).filter(|held| !held.secrets.is_empty()) else { return };
        let secrets = PairSecret::all_to_bytes(&held.secrets);
        let mut fresh = Zeroizing::new([0; 32]);
        self.rng.fill_bytes(&mut *fresh);
        let Some(sealed) = kem_box::seal(&question.key, *fresh, &secrets) else { return };
        let signed = self.answer_content(content, &sealed);
        let Some(signer) = &self.signer else { return };
        let signature = signer.sign_bytes(ANSWER_DOMAIN, &signed).to_vec();
        let answer = proto::PairAnswer { sealed, signature }.encode_to_vec();
        self.send_parts(from, attempt, true, &answer);
    }

    /// Reads a question of a node that may have the secrets that it asks for, signed by its key.
    fn verified_question(
        &self,
        from: Id,
        attempt: u64,
        content: &[u8],
    ) -> Option<(PublicKey, proto::PairQuestion)> {
        let question = proto::PairQuestion::decode(content).ok()?;
        let other = PublicKey(question.other[..].try_into().ok()?);
        let (own, record) = (self.own_signer()?, self.table.at(from).signed.record());
        let signature = question.signature[..].try_into().ok()?;
        let signed = self.question_content(&own, record.node.as_str(), attempt, &question);
        let may = self.pairs_of(from).contains(&other)
            && check(&record.key, &[QUESTION_DOMAIN, &signed].concat(), signature).is_ok();
        may.then_some((other, question))
    }

    /// Makes a secret of a generation that the node that asks does not know, if it knows the present one or later ones: this node lost
    /// what it had made, or another that speaks for the site made that.
    pub(super) fn overtake(&mut self, other: &PublicKey, known: u32) {
        let (now, held) = (self.now, self.pairs.held.get_mut(other));
        let Some(held) = held.filter(|held| held.overtaken.is_none_or(|at| now >= at + OVERTAKE)) else {
            return;
        };
        let latest = held.latest().map_or(0, PairSecret::generation);
        if known >= latest && known - latest < AHEAD {
            held.overtaken = Some(now);
            self.make(other, known);
            self.pairs_changed();
            self.note_all_unpaired();
        }
    }

    pub(super) fn on_pair_answer(&mut self, attempt: u64, content: &[u8]) {
        let asking = &self.pairs.talk.asking;
        let Some((other, asking)) = asking.iter().find(|(_, asking)| asking.attempt == attempt) else {
            return;
        };
        let (other, maker) = (*other, asking.maker);
        let opened = proto::PairAnswer::decode(content).ok().and_then(|answer| {
            let signed = [ANSWER_DOMAIN, &self.answer_content(&asking.question, &answer.sealed)].concat();
            check(&maker, &signed, answer.signature[..].try_into().ok()?).ok()?;
            asking.seed.open(&answer.sealed)
        });
        // What does not hold is no answer: the question stays.
        let Some(secrets) = opened.as_deref().and_then(|bytes| PairSecret::all_from_bytes(bytes)) else {
            return;
        };
        self.pairs.talk.asking.remove(&other);
        if self.take_secrets(other, secrets) {
            self.pairs_changed();
            if self.makes_with(&other) {
                self.note_all_unpaired();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(attempt: u64, part: u32, content: &[u8]) -> proto::PairPart {
        proto::PairPart { attempt, part, answers: false, content: content.to_vec() }
    }

    #[test]
    fn two_parts_of_one_message_come_together_in_either_order() {
        let mut talk = Talk::default();
        assert_eq!(talk.put_together(1, &part(5, 0, b"one ")), None);
        assert_eq!(talk.put_together(1, &part(5, 0, b"one ")), None, "the same part twice is no message");
        assert_eq!(talk.put_together(2, &part(5, 1, b"other")), None, "of another sender");
        assert_eq!(talk.put_together(1, &part(6, 1, b"other")), None, "of another attempt");
        assert_eq!(talk.put_together(1, &part(5, 1, b"whole")), Some(b"one whole".to_vec()));
        assert_eq!(talk.put_together(1, &part(6, 0, b"an")), Some(b"another".to_vec()));
        assert_eq!(talk.parts.len(), 1);
    }

    #[test]
    fn halves_that_stay_alone_are_few() {
        let mut talk = Talk::default();
        for attempt in 0..10 * MOST_PARTS as u64 {
            assert_eq!(talk.put_together(attempt, &part(attempt, 1, &[0; MAX_PART])), None);
            assert!(talk.parts.len() <= MOST_PARTS);
        }
    }

    #[test]
    fn every_part_of_a_message_is_within_the_limit() {
        let question = proto::PairQuestion {
            other: vec![1; 32],
            known: u32::MAX,
            key: vec![0; kem_box::KEY],
            signature: vec![0; 64],
        };
        let secrets = [PairSecret::new(1, [1; 32]), PairSecret::new(2, [2; 32])];
        let seed = Seed(Zeroizing::new([1; 64]));
        let sealed =
            kem_box::seal(&seed.public(), [1; 32], &PairSecret::all_to_bytes(&secrets)).expect("a key");
        let answer = proto::PairAnswer { sealed, signature: vec![0; 64] };
        for length in [question.encoded_len(), answer.encoded_len()] {
            assert!(length.div_ceil(2) <= MAX_PART, "{length}");
            assert!(is_part(&part(u64::MAX, 1, &vec![0; length.div_ceil(2)])));
        }
    }
}
