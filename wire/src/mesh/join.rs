//! How a site comes into a mesh of sites with one command there: by a token that a site of the mesh has made.
//!
//! Two nodes talk, each of which speaks for its site, under a key that is made from the token's secret: the joiner asks, the
//! inviter answers, three times. `Who are you` brings each the other's word of itself, and both look whether names and prefixes fit;
//! `let us in` has the inviter let the joiner in and brings its word for that; `give us the keys` brings the mesh's cluster
//! keys, sealed for the joining site. Only then does the joiner install anything. Invariants: a token brings in one site, once, and
//! none after its time, by this node's monotonic clock; a question is as long as a datagram can be, so no answer is longer;
//! neither side changes anything for a site that does not fit.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message;
use rand_core::RngCore;
use zeroize::Zeroizing;

use super::Mesh;
use super::api::{MeshEvent, Output, Rejected};
use super::proto;
use super::sites::AHEAD;
use super::timer::Timer;
use super::trust::WordError;
use crate::invite::{MAX_ADDRESSES, Token};
use crate::record::check;
use crate::seal::{KeyId, KeyRing, MAX_CONTENT, MAX_DATAGRAM, key_id};
use crate::site::{ClaimedStatement, SIGNATURE, SignedStatement, SiteKey, SiteRecord, Statement, Subject};
use crate::types::{SiteName, Subnet};

/// The most invitations that are remembered, those that are over among them.
const MOST_INVITATIONS: usize = 64;
/// An invitation that is over is remembered for so long, for whoever comes late to hear why.
const REMEMBER: Duration = Duration::from_secs(24 * 3600);
/// The longest time that an invitation is good for.
pub const LONGEST_INVITATION: Duration = Duration::from_secs(7 * 24 * 3600);
/// A question without an answer is repeated so often, at another address of the token.
const AGAIN: Duration = Duration::from_millis(400);
/// A joiner that has no answer for so long gives up.
const PATIENCE: Duration = Duration::from_secs(6);
/// So many sites may ask who this one is before one of them goes on.
const MOST_ASKED: usize = 4;
/// Clocks that differ by more are told of.
const CLOCKS: u64 = 60;
const PROOF_DOMAIN: &[u8] = b"weft join v1\0";

const WHO: u32 = 0;
const LET_IN: u32 = 1;
const KEYS: u32 = 2;
const GIVEN_UP: u32 = 3;

/// What an invitation is good for.
#[derive(Debug, Clone)]
pub struct Terms {
    /// The only site that may use it; any where there is none.
    pub site: Option<SiteName>,
    /// What the site may announce at most; what it says itself where this is empty.
    pub prefixes: Vec<Subnet>,
    /// For how long; at most [`LONGEST_INVITATION`].
    pub valid: Duration,
    /// Where the joiner finds this node, before what the node announces.
    pub addresses: Vec<SocketAddr>,
}

/// Why joining did not begin. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// The node cannot speak for its site.
    #[error(transparent)]
    Word(#[from] WordError),
    /// The token is for nodes with another `cluster.id`.
    #[error(
        "the token is of the foreign mesh {theirs:?} and this node's cluster.id is {own:?}: give the nodes of this site that id first, or ask for a token of this mesh"
    )]
    Foreign {
        /// The token's mesh.
        theirs: String,
        /// This node's.
        own: String,
    },
    /// The token was made by this very site.
    #[error("the token was made by this site, {0}: use it on a node of the site that is to join")]
    Own(SiteName),
    /// Names or keys do not fit.
    #[error("{0}")]
    Objection(String),
    /// Another attempt has not ended.
    #[error("this node is joining already: wait some seconds")]
    Busy,
}

#[derive(Debug, Default)]
pub(super) struct Joins {
    invitations: VecDeque<Invitation>,
    joining: Option<Joining>,
    /// What time people say it is, and when this node's caller said so.
    clock: Option<(u64, Instant)>,
}

#[derive(Debug)]
struct Invitation {
    id: KeyId,
    ring: KeyRing,
    site: Option<SiteName>,
    prefixes: Vec<Subnet>,
    until: Instant,
    /// Who asked, and under which attempt.
    asked: VecDeque<(u64, SignedStatement)>,
    /// Who was let in by it.
    used: Option<(u64, SiteRecord)>,
}

#[derive(Debug)]
struct Joining {
    token: Token,
    ring: KeyRing,
    attempt: u64,
    step: u32,
    until: Instant,
    /// When to repeat the question, and how often one was sent.
    again: Instant,
    asked: usize,
    /// The own site's word of itself.
    own: SignedStatement,
    /// What the other site said, and what this one says of it once it is in.
    heard: Vec<SignedStatement>,
    admission: Option<SignedStatement>,
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

    fn make_room(&mut self, now: Instant) {
        self.invitations.retain(|invitation| now < invitation.until + REMEMBER);
        while self.invitations.len() >= MOST_INVITATIONS {
            let over = |invitation: &Invitation| now >= invitation.until || invitation.used.is_some();
            let place = self.invitations.iter().position(over).unwrap_or(0);
            self.invitations.remove(place);
        }
    }
}

impl Mesh {
    /// Takes what time people say it is, Unix time: only so that they hear of sites where it is another.
    pub fn set_clock(&mut self, unix_seconds: u64, now: Instant) {
        self.advance(now);
        self.joins.clock = Some((unix_seconds, self.now));
    }

    /// Makes a token that brings one site into the mesh, once.
    ///
    /// The node forgets it when it ends: then the token is void.
    ///
    /// # Errors
    /// On a node without the site's key.
    pub fn invite(&mut self, terms: Terms, now: Instant) -> Result<Token, WordError> {
        self.advance(now);
        let key = self.signer.as_ref().ok_or(WordError::NotSigner)?.public();
        self.restate_site(|record| record.left = false)?;
        let mut secret = Zeroizing::new([0; 16]);
        self.rng.fill_bytes(&mut *secret);
        let announced = self.facts.iter().flat_map(|facts| &facts.gossip).copied();
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for address in terms.addresses.iter().copied().chain(announced) {
            if addresses.len() < MAX_ADDRESSES && !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        let (mesh, site) = (self.config.cluster.clone(), self.config.site.clone());
        let token = Token { mesh, site, key, addresses, secret };
        let ring = token.ring();
        let id = ring.first();
        self.joins.make_room(self.now);
        self.joins.invitations.push_back(Invitation {
            id,
            ring,
            site: terms.site,
            prefixes: terms.prefixes,
            until: self.now + terms.valid.min(LONGEST_INVITATION),
            asked: VecDeque::new(),
            used: None,
        });
        self.settle();
        Ok(token)
    }

    /// Begins to bring the own site into the mesh that the token is of; [`MeshEvent::JoinEnded`] says how that went.
    ///
    /// # Errors
    /// Where it cannot succeed. Nothing was sent.
    pub fn join(&mut self, token: Token, now: Instant) -> Result<(), JoinError> {
        self.advance(now);
        let signer = self.signer.as_ref().ok_or(WordError::NotSigner)?;
        let own = self.config.cluster.clone();
        if token.mesh != own {
            return Err(JoinError::Foreign { theirs: token.mesh, own });
        }
        if token.key == signer.public() {
            return Err(JoinError::Own(token.site));
        }
        if let Some(objection) = self.misfit(&token.site, &token.key, &[]) {
            return Err(JoinError::Objection(objection));
        }
        if self.joins.joining.is_some() {
            return Err(JoinError::Busy);
        }
        let mut word = self.sites.own_record().ok_or(WordError::NotSigner)?.clone();
        if word.left {
            (word.left, word.version) = (false, word.version + 1);
        }
        let own = signer.sign(&own, Statement::Site(word)).map_err(WordError::from)?;
        self.joins.joining = Some(Joining {
            ring: token.ring(),
            attempt: self.rng.next_u64(),
            step: WHO,
            until: self.now + PATIENCE,
            again: self.now,
            asked: 0,
            own,
            heard: Vec::new(),
            admission: None,
            token,
        });
        self.ask();
        self.settle();
        Ok(())
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

    // The inviter.

    fn answer(&mut self, place: usize, question: &proto::Joining) -> Result<proto::Joining, Rejected> {
        if question.step == GIVEN_UP {
            let why: String = question.refusal.chars().filter(|c| !c.is_control()).take(300).collect();
            return self.hear_of_failure(place, question.attempt, &why);
        }
        let answer = match question.step {
            WHO => self.answer_who(place, question)?,
            LET_IN => self.answer_let_in(place, question)?,
            KEYS => self.answer_keys(place, question)?,
            _ => return Err(Rejected::Malformed),
        };
        Ok(match answer {
            Ok(signed) => proto::Joining { statement: Some(signed.to_proto()), ..proto::Joining::default() },
            Err(refusal) => proto::Joining { refusal, ..proto::Joining::default() },
        })
    }

    /// What is wrong with the invitation itself.
    fn is_over(&self, place: usize, attempt: u64) -> Option<String> {
        let invitation = &self.joins.invitations[place];
        if let Some((by, record)) = &invitation.used {
            let site = &record.site;
            return (*by != attempt).then(|| {
                format!("the token was used already, by site {site}: ask for another with `weft site invite`")
            });
        }
        let expired = self.now >= invitation.until;
        expired.then(|| "the token has expired: ask for another with `weft site invite`".into())
    }

    fn answer_who(
        &mut self,
        place: usize,
        question: &proto::Joining,
    ) -> Result<Result<Arc<SignedStatement>, String>, Rejected> {
        let signed = self.verified(question)?;
        let Statement::Site(record) = signed.statement().clone() else { return Err(Rejected::Malformed) };
        let proof = proof_content(question.attempt, self.joins.invitations[place].id);
        let signature = question.proof[..].try_into().map_err(|_| Rejected::Malformed)?;
        check(&record.key, &[PROOF_DOMAIN, &proof].concat(), signature)
            .map_err(|_| Rejected::BadSignature)?;
        if let Some(over) = self.is_over(place, question.attempt) {
            return Ok(Err(self.refuse(&record.site, over)));
        }
        if let Some(objection) = self.objection_to(place, &record) {
            return Ok(Err(self.refuse(&record.site, objection)));
        }
        self.compare_clocks(&record.site, question.clock);
        let asked = &mut self.joins.invitations[place].asked;
        if asked.iter().all(|(attempt, _)| *attempt != question.attempt) {
            asked.truncate(MOST_ASKED - 1);
            asked.push_front((question.attempt, signed));
        }
        Ok(self.own_word())
    }

    fn own_word(&self) -> Result<Arc<SignedStatement>, String> {
        let own = self.sites.own_key().and_then(|key| self.sites.find(&Subject(key, key, false)));
        own.cloned().ok_or_else(|| "the inviting node does not speak for its site any more".into())
    }

    fn objection_to(&self, place: usize, record: &SiteRecord) -> Option<String> {
        let invitation = &self.joins.invitations[place];
        if let Some(site) = invitation.site.as_ref().filter(|site| **site != record.site) {
            return Some(format!("the token is for site {site}, and this is site {}", record.site));
        }
        let allowed = |prefix: &&Subnet| {
            invitation.prefixes.is_empty() || invitation.prefixes.iter().any(|within| within.covers(**prefix))
        };
        if let Some(prefix) = record.prefixes.iter().find(|prefix| !allowed(prefix)) {
            return Some(format!("the token does not let a site in with {prefix}: ask for one that does"));
        }
        if record.left || record.prefixes.is_empty() {
            return Some(format!("site {} announces nothing: set cluster.cidrs there", record.site));
        }
        self.misfit(&record.site, &record.key, &record.prefixes)
    }

    fn refuse(&mut self, site: &SiteName, why: String) -> String {
        let sentence = format!("site {site} was not let in: {why}");
        self.outputs.push_back(Output::Event(MeshEvent::JoinRefused(sentence)));
        why
    }

    fn answer_let_in(
        &mut self,
        place: usize,
        question: &proto::Joining,
    ) -> Result<Result<Arc<SignedStatement>, String>, Rejected> {
        let invitation = &self.joins.invitations[place];
        let asked = invitation.asked.iter().find(|(attempt, _)| *attempt == question.attempt);
        let Some(signed) = asked.map(|(_, signed)| signed.clone()) else { return Err(Rejected::Malformed) };
        let Statement::Site(record) = signed.statement().clone() else { return Err(Rejected::Malformed) };
        let own = self.sites.own_key().ok_or(Rejected::Malformed)?;
        let theirs = self.verified(question)?;
        match theirs.statement() {
            Statement::Admission(admission)
                if admission.by == record.key && admission.key == own && !admission.expelled => {}
            _ => return Err(Rejected::Malformed),
        }
        if self.joins.invitations[place].used.is_none() {
            let over = self.is_over(place, question.attempt);
            let why =
                over.or_else(|| self.objection_to(place, &record)).or_else(|| self.leaps(question.version));
            if let Some(why) = why {
                return Ok(Err(self.refuse(&record.site, why)));
            }
            if let Err(error) = self.let_in(&record, signed, theirs, question.version) {
                return Ok(Err(error.to_string()));
            }
            self.joins.invitations[place].used = Some((question.attempt, record.clone()));
        } else if let Some(over) = self.is_over(place, question.attempt) {
            return Ok(Err(self.refuse(&record.site, over)));
        }
        let admission = self.sites.find(&Subject(own, record.key, false)).cloned();
        Ok(admission.ok_or_else(|| format!("site {} was expelled meanwhile", record.site)))
    }

    /// Why the mesh does not go on from the version that the joiner's cluster keys have: the other sites would not follow.
    fn leaps(&self, version: u64) -> Option<String> {
        let own = self.keys_version();
        (version > own.saturating_add(AHEAD)).then(|| {
            format!(
                "its cluster keys have version {version}, which is too far ahead of {own} here to be the number of their changes: remove memory.json of its nodes and join anew"
            )
        })
    }

    /// Lets a site in, and gives the mesh's cluster keys a version that the site takes too.
    fn let_in(
        &mut self,
        record: &SiteRecord,
        word: SignedStatement,
        admission: SignedStatement,
        version: u64,
    ) -> Result<(), WordError> {
        let (site, prefixes) = (record.site.clone(), record.prefixes.clone());
        if let Some(wanted) = self.next_admission(site, record.key, prefixes, false)? {
            self.state(Statement::Admission(wanted))?;
        }
        self.merge_statement(Arc::new(word));
        self.merge_statement(Arc::new(admission));
        let ring = self.wanted_ring().unwrap_or(self.final_ring()).clone();
        self.want(self.keys_version().max(version) + 1, ring);
        self.grant_to_site(record.key).map(drop)
    }

    fn answer_keys(
        &mut self,
        place: usize,
        question: &proto::Joining,
    ) -> Result<Result<Arc<SignedStatement>, String>, Rejected> {
        let used = self.joins.invitations[place].used.as_ref();
        let key = used.filter(|(attempt, _)| *attempt == question.attempt).map(|(_, record)| record.key);
        let Some(key) = key else { return Err(Rejected::Malformed) };
        let grant = self.grant_to_site(key).ok().flatten();
        Ok(grant.ok_or_else(|| "the site was let in and put out again meanwhile".into()))
    }

    fn hear_of_failure(&mut self, place: usize, attempt: u64, why: &str) -> Result<proto::Joining, Rejected> {
        let asked = &mut self.joins.invitations[place].asked;
        let Some(at) = asked.iter().position(|(known, _)| *known == attempt) else {
            return Err(Rejected::Malformed);
        };
        if let Some((_, signed)) = asked.remove(at)
            && let Statement::Site(record) = signed.statement()
        {
            let sentence = format!("site {} did not join: {why}", record.site);
            self.outputs.push_back(Output::Event(MeshEvent::JoinRefused(sentence)));
        }
        Ok(proto::Joining::default())
    }

    // The joiner.

    fn ask(&mut self) {
        let (clock, version) = (self.clock(), self.keys_version());
        let (Some(joining), Some(signer)) = (&mut self.joins.joining, &self.signer) else { return };
        let Joining { step, attempt, .. } = *joining;
        let mut question = proto::Joining { step, attempt, clock, ..proto::Joining::default() };
        match step {
            WHO => {
                let id = joining.ring.first();
                question.statement = Some(joining.own.to_proto());
                question.proof = prove(signer, attempt, id).into();
            }
            LET_IN => {
                question.statement = joining.admission.as_ref().map(SignedStatement::to_proto);
                question.version = version;
            }
            _ => {}
        }
        let addresses = &joining.token.addresses;
        let to = addresses.get(joining.asked % addresses.len().max(1)).copied();
        joining.asked += 1;
        joining.again = self.now + AGAIN;
        let ring = joining.ring.clone();
        if let Some(to) = to {
            self.send_question(&ring, to, question);
        }
        self.timers.set(self.now + AGAIN, Timer::Join);
    }

    pub(super) fn on_join_timer(&mut self) {
        let Some(joining) = &self.joins.joining else { return };
        if self.now < joining.again {
            return;
        }
        if self.now < joining.until {
            return self.ask();
        }
        let Token { site, addresses, .. } = &joining.token;
        let places: Vec<_> = addresses.iter().map(ToString::to_string).collect();
        let how_far = match joining.step {
            WHO => "nothing was changed",
            _ => "site let in there, but not here; expel it there or join anew",
        };
        let why = format!(
            "no answer from site {site} at {} ({how_far}): see that UDP gets there, and that the weftd that made the token has not been restarted since, which makes it void",
            places.join(", ")
        );
        self.end_joining(Err(why));
    }

    fn end_joining(&mut self, outcome: Result<SiteName, String>) {
        self.joins.joining = None;
        self.outputs.push_back(Output::Event(MeshEvent::JoinEnded(outcome)));
    }

    fn on_join_answer(&mut self, answer: &proto::Joining) -> Result<(), Rejected> {
        let Some(joining) = &self.joins.joining else { return Err(Rejected::Reflected) };
        if (answer.attempt, answer.step) != (joining.attempt, joining.step) {
            return Err(Rejected::Replayed);
        }
        let site = joining.token.site.clone();
        if !answer.refusal.is_empty() {
            let why: String = answer.refusal.chars().filter(|c| !c.is_control()).take(400).collect();
            self.end_joining(Err(format!("site {site} refuses: {why}")));
            return Ok(());
        }
        let signed = self.verified(answer)?;
        let (key, own) = (joining.token.key, self.sites.own_key());
        let fits = match (answer.step, signed.statement()) {
            (WHO, Statement::Site(record)) => record.key == key && record.site == site,
            (LET_IN, Statement::Admission(said)) => said.by == key && Some(said.key) == own && !said.expelled,
            (KEYS, Statement::Keys(grant)) => grant.by == key && Some(grant.to) == own,
            _ => false,
        };
        if !fits {
            return Err(Rejected::Malformed);
        }
        if answer.step == WHO {
            self.compare_clocks(&site, answer.clock);
            if let Err(why) = self.prepare(&signed) {
                return self.give_up(why);
            }
        }
        let Some(joining) = &mut self.joins.joining else { return Ok(()) };
        joining.heard.push(signed);
        joining.step += 1;
        joining.until = self.now + PATIENCE;
        if joining.step > KEYS {
            self.install()
        } else {
            self.ask()
        }
        Ok(())
    }

    /// Looks whether the inviting site fits, and signs that it is let in.
    fn prepare(&mut self, signed: &SignedStatement) -> Result<(), String> {
        let Statement::Site(record) = signed.statement() else { return Ok(()) };
        if let Some(objection) = self.misfit(&record.site, &record.key, &record.prefixes) {
            return Err(objection);
        }
        let (site, prefixes) = (record.site.clone(), record.prefixes.clone());
        let wanted =
            self.next_admission(site, record.key, prefixes, false).map_err(|error| error.to_string())?;
        let signer = self.signer.as_ref().ok_or_else(|| WordError::NotSigner.to_string())?;
        let admission = match wanted {
            Some(wanted) => {
                let admission = Statement::Admission(wanted);
                Some(signer.sign(&self.config.cluster, admission).map_err(|error| error.to_string())?)
            }
            None => {
                let subject = Subject(signer.public(), record.key, false);
                self.sites.find(&subject).map(|signed| SignedStatement::clone(signed))
            }
        };
        if let Some(joining) = &mut self.joins.joining {
            joining.admission = admission;
        }
        Ok(())
    }

    /// Ends joining for a reason of this side, which the other side hears.
    fn give_up(&mut self, why: String) -> Result<(), Rejected> {
        if let Some(joining) = &self.joins.joining {
            let (ring, attempt) = (joining.ring.clone(), joining.attempt);
            let addresses = joining.token.addresses.clone();
            for to in addresses {
                let refusal = why.clone();
                let question =
                    proto::Joining { step: GIVEN_UP, attempt, refusal, ..proto::Joining::default() };
                self.send_question(&ring, to, question);
            }
        }
        self.end_joining(Err(why));
        Ok(())
    }

    /// Takes in all that the two sites said, at once.
    fn install(&mut self) {
        let Some(joining) = self.joins.joining.take() else { return };
        let site = joining.token.site.clone();
        for signed in [Some(joining.own), joining.admission].into_iter().flatten().chain(joining.heard) {
            self.merge_statement(Arc::new(signed));
        }
        self.end_joining(Ok(site));
    }

    // Both.

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

fn prove(signer: &SiteKey, attempt: u64, id: KeyId) -> [u8; SIGNATURE] {
    signer.sign_bytes(PROOF_DOMAIN, &proof_content(attempt, id))
}
