//! The side that asks: it has a token, and comes in with it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand_core::RngCore;

use super::super::Mesh;
use super::super::api::{MeshEvent, Output, Rejected};
use super::super::proto;
use super::super::timer::Timer;
use super::super::trust::WordError;
use super::{GIVEN_UP, KEYS, LET_IN, PROOF_DOMAIN, WHO, proof_content};
use crate::invite::Token;
use crate::seal::{KeyId, KeyRing};
use crate::site::{SIGNATURE, SignedStatement, SiteKey, Statement, Subject};
use crate::types::SiteName;

/// A question without an answer is repeated so often, at another address of the token.
const AGAIN: Duration = Duration::from_millis(400);
/// A joiner that has no answer for so long gives up.
const PATIENCE: Duration = Duration::from_secs(6);

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

#[derive(Debug)]
pub(super) struct Joining {
    token: Token,
    pub(super) ring: KeyRing,
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

impl Mesh {
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
        // Another node may have given the site another name meanwhile.
        let name = self.config.site.clone();
        if word.left || word.site != name {
            (word.left, word.site, word.version) = (false, name, word.version + 1);
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

    pub(in crate::mesh) fn on_join_timer(&mut self) {
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

    pub(super) fn on_join_answer(&mut self, answer: &proto::Joining) -> Result<(), Rejected> {
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
}

fn prove(signer: &SiteKey, attempt: u64, id: KeyId) -> [u8; SIGNATURE] {
    signer.sign_bytes(PROOF_DOMAIN, &proof_content(attempt, id))
}
