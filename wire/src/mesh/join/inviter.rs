//! The side that is asked: it makes tokens, and lets in who has one.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand_core::RngCore;
use zeroize::Zeroizing;

use super::super::Mesh;
use super::super::api::{MeshEvent, Output, Rejected};
use super::super::proto;
use super::super::sites::AHEAD;
use super::super::trust::WordError;
use super::{GIVEN_UP, Joins, KEYS, LET_IN, PROOF_DOMAIN, WHO, proof_content};
use crate::invite::{MAX_ADDRESSES, Token};
use crate::record::check;
use crate::seal::{KeyId, KeyRing};
use crate::site::{SignedStatement, SiteRecord, Statement, Subject};
use crate::types::{SiteName, Subnet};

/// The most invitations that are remembered, those that are over among them.
const MOST_INVITATIONS: usize = 64;
/// An invitation that is over is remembered for so long, for whoever comes late to hear why.
const REMEMBER: Duration = Duration::from_secs(24 * 3600);
/// The longest time that an invitation is good for.
pub const LONGEST_INVITATION: Duration = Duration::from_secs(7 * 24 * 3600);
/// So many sites may ask who this one is before one of them goes on.
const MOST_ASKED: usize = 4;

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

#[derive(Debug)]
pub(super) struct Invitation {
    pub(super) id: KeyId,
    pub(super) ring: KeyRing,
    site: Option<SiteName>,
    prefixes: Vec<Subnet>,
    until: Instant,
    /// Who asked, and under which attempt.
    asked: VecDeque<(u64, SignedStatement)>,
    /// Who was let in by it.
    used: Option<(u64, SiteRecord)>,
}

impl Joins {
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

    pub(super) fn answer(
        &mut self,
        place: usize,
        question: &proto::Joining,
    ) -> Result<proto::Joining, Rejected> {
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
}
