//! What a mesh does with the statements of sites: it tells them on, certifies the nodes of its own site where it has the
//! key, and judges the nodes of others.
//!
//! Invariant: a certificate goes only to a member whose leases the own site's authority accepts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::api::{MeshEvent, Output, SiteStanding, SiteView, Trust};
use super::gossip::{Topic, stated};
use super::membership::{Id, below};
use super::proto::{self, Body};
use super::timer::Timer;
use super::{FAREWELLS, Facts, Mesh};
use crate::record::{MAX_SUBNETS, NodeRecord};
use crate::site::{
    Admission, Certificate, Certified, SignedStatement, SiteKey, SiteRecord, Statement, StatementError,
    Subject,
};
use crate::types::{Epoch, PublicKey, SiteName, Subnet};

/// Between two rounds of certificates, and so many members a round: a site that starts at once is soon certified, since every record
/// goes round twice until it is.
const CERTIFY: (Duration, usize) = (Duration::from_millis(250), 256);
/// After so long, and after twice as long each time, a node says the name of its site again that another one's word replaced.
const RENAME: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(3600));
/// Members are judged again so long after a statement: more often come together.
const JUDGE: Duration = Duration::from_millis(200);

/// Why a site's word was not given. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WordError {
    /// The node does not have the key of its site.
    #[error("this node does not have the key of its site: ask a node that does")]
    NotSigner,
    /// The statement is beyond a limit.
    #[error(transparent)]
    Statement(#[from] StatementError),
}

impl Mesh {
    /// Begins to judge other sites by their statements, with those that an earlier run remembered.
    ///
    /// # Errors
    /// Where the node is to speak for its site, and what it would say is beyond a limit.
    pub fn set_trust(
        &mut self,
        trust: Trust,
        remembered: Vec<SignedStatement>,
        now: Instant,
    ) -> Result<(), WordError> {
        self.advance(now);
        let Trust { site, prefixes, signer } = trust;
        let remembered = remembered.into_iter().map(Arc::new).collect();
        self.sites.stand_on(self.config.site.clone(), site, prefixes.clone(), remembered);
        self.signer = signer;
        if self.signer.is_some() {
            self.restate_site(|record| record.prefixes = prefixes)?;
            let grants: Vec<_> = self.sites.grants().cloned().collect();
            grants.iter().for_each(|grant| self.take_site_grant(grant));
            self.grant_later();
        }
        self.judge_all();
        self.settle();
        Ok(())
    }

    /// Returns whether other sites are judged by what they say.
    pub fn judges_sites(&self) -> bool {
        self.sites.judges()
    }

    /// Returns the key of the own site, if other sites are judged, and whether this node speaks for it.
    pub fn own_site(&self) -> Option<(PublicKey, bool)> {
        Some((self.sites.own_key()?, self.signer.is_some()))
    }

    /// Returns what sites say, to be remembered.
    pub fn statements(&self) -> impl Iterator<Item = &SignedStatement> {
        self.sites.all().map(|signed| &**signed)
    }

    /// Returns what is thought of other sites, by name.
    pub fn sites(&self) -> impl Iterator<Item = &SiteView> {
        self.sites.views().values()
    }

    /// Lets a site in: its nodes are believed for what lies in `prefixes`.
    ///
    /// # Errors
    /// On a node without the site's key, and beyond the limits of a statement.
    pub fn admit(
        &mut self,
        site: SiteName,
        key: PublicKey,
        prefixes: Vec<Subnet>,
        now: Instant,
    ) -> Result<(), WordError> {
        self.speak_of(site, key, prefixes, false, now)
    }

    /// Puts a site out; what it brought in goes with it.
    ///
    /// # Errors
    /// On a node without the site's key.
    pub fn expel(&mut self, site: SiteName, key: PublicKey, now: Instant) -> Result<(), WordError> {
        self.speak_of(site, key, Vec::new(), true, now)
    }

    /// Declares certificates void: that of one node key, or (`None`) all before now.
    ///
    /// # Errors
    /// On a node without the site's key, and where too many keys are void already.
    pub fn declare_void(&mut self, key: Option<PublicKey>, now: Instant) -> Result<(), WordError> {
        self.advance(now);
        self.restate_site(|record| match key {
            Some(key) if record.void.contains(&key) => {}
            Some(key) => record.void.push(key),
            None => {
                record.least_serial += 1;
                record.void.clear();
            }
        })?;
        self.settle();
        Ok(())
    }

    fn speak_of(
        &mut self,
        site: SiteName,
        key: PublicKey,
        prefixes: Vec<Subnet>,
        expelled: bool,
        now: Instant,
    ) -> Result<(), WordError> {
        self.advance(now);
        // Who lets another in is in the mesh of sites again itself.
        self.restate_site(|record| record.left &= expelled)?;
        if let Some(wanted) = self.next_admission(site, key, prefixes, expelled)? {
            self.state(Statement::Admission(wanted))?;
        }
        self.settle();
        Ok(())
    }

    /// What the own site has to say of another for it to stand like that; nothing where it has said so.
    pub(super) fn next_admission(
        &self,
        site: SiteName,
        key: PublicKey,
        prefixes: Vec<Subnet>,
        expelled: bool,
    ) -> Result<Option<Admission>, WordError> {
        let by = self.signer.as_ref().ok_or(WordError::NotSigner)?.public();
        let known = self.sites.admission(by, key);
        let version = known.map_or(1, |known| known.version + 1);
        let wanted = Admission { by, site, key, version, prefixes, expelled };
        let is_news = known.is_none_or(|known| Admission { version, ..known.clone() } != wanted);
        Ok(is_news.then_some(wanted))
    }

    /// Takes the own site out: the others drop its routes, and its nodes theirs. It keeps its inside.
    ///
    /// Keep driving the mesh for some seconds before the cluster keys change, so that the others hear of it.
    ///
    /// # Errors
    /// On a node without the site's key.
    pub fn leave_sites(&mut self, now: Instant) -> Result<(), WordError> {
        self.advance(now);
        let own = self.config.site.clone();
        let others: Vec<Id> = self
            .table
            .range(..)
            .filter_map(|(id, _)| (self.table.at(id).signed.record().site != own).then_some(id))
            .take(FAREWELLS)
            .collect();
        self.restate_site(|record| record.left = true)?;
        let key = self.signer.as_ref().ok_or(WordError::NotSigner)?.public();
        if let Some(word) = self.sites.find(&Subject(key, key, false)).map(|signed| stated(signed)) {
            for id in others {
                self.send_to_member(id, Body::Push(proto::Push { sync: false }), vec![word.clone()]);
            }
        }
        self.settle();
        Ok(())
    }

    /// Returns whether the own site has left the mesh of sites.
    pub fn has_left_sites(&self) -> bool {
        self.sites.own_record().is_some_and(|record| record.left)
    }

    /// Returns why a site of this name, key and prefixes cannot be let in, as a sentence.
    pub fn misfit(&self, site: &SiteName, key: &PublicKey, prefixes: &[Subnet]) -> Option<String> {
        let own = self.sites.own_prefixes().iter().map(|taken| (taken, &self.config.site));
        let others = self.sites.views().values().filter(|view| view.key != *key);
        let theirs = others.clone().flat_map(|view| match &view.standing {
            SiteStanding::Member { prefixes, .. } => {
                prefixes.iter().map(|taken| (taken, &view.site)).collect()
            }
            SiteStanding::Unknown | SiteStanding::Expelled | SiteStanding::Left => Vec::new(),
        });
        for (taken, holder) in own.chain(theirs) {
            if let Some(prefix) = prefixes.iter().find(|prefix| prefix.overlaps(*taken)) {
                return Some(format!(
                    "{prefix} overlaps {taken} of site {holder}: give one of the two sites another range first"
                ));
            }
        }
        if self.sites.own_key() == Some(*key) {
            return Some(format!("that is this site, {}, itself", self.config.site));
        }
        if *site == self.config.site {
            return Some(format!("two sites are named {site}: rename one of the two"));
        }
        let out = |view: &&SiteView| matches!(view.standing, SiteStanding::Expelled | SiteStanding::Left);
        let namesake = others.filter(|view| !out(view)).find(|view| view.site == *site)?;
        Some(format!(
            "a site named {site} is in already, with key {}: expel it first, or rename one of the two",
            namesake.key.short()
        ))
    }

    /// Changes what the own site says of itself, if it is not so already.
    pub(super) fn restate_site(&mut self, change: impl FnOnce(&mut SiteRecord)) -> Result<(), WordError> {
        let key = self.signer.as_ref().ok_or(WordError::NotSigner)?.public();
        let (site, prefixes, void) = (self.config.site.clone(), Vec::new(), Vec::new());
        let nothing = SiteRecord { site, key, version: 0, prefixes, least_serial: 0, void, left: false };
        let known = self.sites.own_record().unwrap_or(&nothing);
        let mut wanted = known.clone();
        // It may have had another name when it spoke last.
        wanted.site = self.config.site.clone();
        change(&mut wanted);
        if wanted != *known || known.version == 0 {
            wanted.version = known.version + 1;
            self.state(Statement::Site(wanted))?;
        }
        Ok(())
    }

    pub(super) fn state(&mut self, statement: Statement) -> Result<(), WordError> {
        let signer = self.signer.as_ref().ok_or(WordError::NotSigner)?;
        let signed = signer.sign(&self.config.cluster, statement)?;
        self.merge_statement(Arc::new(signed));
        Ok(())
    }

    /// Takes what a site says, if it is news, and tells it on.
    pub(super) fn merge_statement(&mut self, signed: Arc<SignedStatement>) -> bool {
        let subject: Subject = signed.statement().subject();
        if !self.sites.merge(Arc::clone(&signed)) {
            return false;
        }
        match signed.statement() {
            Statement::Keys(grant) => self.take_site_grant(grant),
            Statement::Site(record) if self.is_other_name(record) => self.note_other_name(record),
            Statement::Site(record) if record.left => self.note_departure(record),
            Statement::Site(_) | Statement::Admission(_) => {}
        }
        self.grant_later();
        self.queue.push(Topic::Statement(subject));
        // Whoever is let in now said what it has to say long ago, and nobody kept it.
        self.sync_soon();
        self.outputs.push_back(Output::Event(MeshEvent::StatementsChanged));
        if !std::mem::replace(&mut self.rejudge, true) {
            self.timers.set(self.now + JUDGE, Timer::Judge);
        }
        true
    }

    /// Whether it is what another node under the key of the own site says, which gives the site another name.
    fn is_other_name(&self, record: &SiteRecord) -> bool {
        self.signer.as_ref().is_some_and(|own| own.public() == record.key) && record.site != self.config.site
    }

    /// The latest word stands, so nodes that are renamed one after another have to end with that of one that was: each says
    /// its name again, and who has long been at odds with the others does so ever more seldom.
    fn note_other_name(&mut self, record: &SiteRecord) {
        let (first, most) = RENAME;
        let pause = first.saturating_mul(1 << self.renamed.min(16)).min(most);
        self.renamed = self.renamed.saturating_add(1);
        let jitter = pause.mul_f64(below(&mut self.rng, 256) as f64 / 256.0);
        self.timers.set(self.now + pause + jitter, Timer::Rename);
        self.outputs.push_back(Output::Event(MeshEvent::OtherName { site: record.site.clone() }));
    }

    pub(super) fn on_rename_timer(&mut self) {
        if self.sites.own_record().is_some_and(|record| record.site != self.config.site) {
            // It is what was said before under this name, so no limit is passed.
            let _ = self.restate_site(|_| ());
        }
    }

    fn note_departure(&mut self, record: &SiteRecord) {
        let signer = self.signer.as_ref().map(SiteKey::public).filter(|own| *own != record.key);
        let admitted = signer.and_then(|own| self.sites.admission(own, record.key));
        if admitted.is_some_and(|admission| !admission.expelled) {
            let site = record.site.clone();
            self.outputs.push_back(Output::Event(MeshEvent::SiteLeft { site }));
        }
    }

    pub(super) fn on_judge_timer(&mut self) {
        if std::mem::take(&mut self.rejudge) {
            self.review_pairs();
            self.judge_all();
        }
    }

    /// Whether the record is of a site that is judged by what it says.
    pub(super) fn is_foreign(&self, record: &NodeRecord) -> bool {
        self.sites.judges() && record.site != self.config.site
    }

    /// The highest epoch of a record that its site has certified.
    pub(super) fn certified_epoch(&self, record: &NodeRecord) -> Option<Epoch> {
        let site = self.certifier(record).ok()?;
        let holds = self.config.verify.verify_certificate(&site, &self.config.cluster, record);
        let epochs = record.facts.subnets.iter().map(|leased| leased.epoch);
        holds.then(|| epochs.max().unwrap_or_default())
    }

    /// Whether a site key has certified a member's present record; looked at once a record.
    pub(super) fn is_certified(&mut self, id: Id, site: &PublicKey) -> bool {
        let member = self.table.at(id);
        if let Some((key, holds)) = member.certified
            && key == *site
        {
            return holds;
        }
        let record = member.signed.record();
        let holds = self.config.verify.verify_certificate(site, &self.config.cluster, record);
        self.table.at_mut(id).certified = Some((*site, holds));
        holds
    }

    /// Has a member wait for a certificate of this node, if it needs one.
    pub(super) fn note_uncertified(&mut self, id: Id) {
        let Some(signer) = &self.signer else { return };
        let key = signer.public();
        self.note_ungranted(id);
        self.note_unpaired(id);
        let member = self.table.at(id);
        let (hash, record) = (member.hash, member.signed.record());
        let own = record.site == self.config.site && member.verdict.is_accepted();
        let serial = self.sites.own_record().map_or(0, |own| own.least_serial);
        let late = |certificate: Certificate| certificate.serial < serial;
        let needs = own
            && !record.facts.subnets.is_empty()
            && (record.facts.certificate.is_none_or(late) || !self.is_certified(id, &key));
        if !needs {
            self.uncertified.remove(&hash);
        } else if self.uncertified.insert(hash) && self.uncertified.len() == 1 {
            self.timers.set(self.now, Timer::Certify);
        }
    }

    pub(super) fn on_certify_timer(&mut self) {
        // Around, so that those who do not take theirs do not keep it from others.
        let after = (std::ops::Bound::Excluded(self.certified_last), std::ops::Bound::Unbounded);
        let (later, earlier) =
            (self.uncertified.range(after), self.uncertified.range(..=self.certified_last));
        let some: Vec<u64> = later.chain(earlier).copied().take(CERTIFY.1).collect();
        self.certified_last = some.last().copied().unwrap_or(0);
        for hash in some {
            let Some(id) = self.table.find(hash) else {
                self.uncertified.remove(&hash);
                continue;
            };
            let record = self.table.at(id).signed.record();
            let Some(certificate) = self.certify(record) else { return };
            if self.table.me == Some(id) {
                self.take_certificate(certificate);
            } else {
                let body = Body::Certify(proto::Certify { certificate: certificate.to_bytes() });
                self.send_to_member(id, body, Vec::new());
            }
        }
        if !self.uncertified.is_empty() {
            self.timers.set(self.now + CERTIFY.0, Timer::Certify);
        }
    }

    fn certify(&self, record: &NodeRecord) -> Option<Certificate> {
        let serial = self.sites.own_record().map_or(0, |own| own.least_serial);
        let signer = self.signer.as_ref()?;
        Some(signer.certify(&self.config.cluster, serial, Certified::of(record)))
    }

    pub(super) fn on_certify(&mut self, certify: &proto::Certify) {
        if let Some(certificate) = Certificate::from_bytes(&certify.certificate) {
            self.take_certificate(certificate);
        }
    }

    fn take_certificate(&mut self, certificate: Certificate) {
        let Some(me) = self.table.me else { return };
        let record = self.table.at(me).signed.record();
        let is_news = record.facts.certificate.is_none_or(|held| {
            held.serial < certificate.serial || !self.is_valid(held, Certified::of(record))
        });
        if is_news && self.is_valid(certificate, Certified::of(record)) {
            self.certificate = Some(certificate);
            self.resign();
        }
    }

    fn is_valid(&self, certificate: Certificate, certified: Certified<'_>) -> bool {
        let site = self.sites.own_key();
        site.is_some_and(|site| certificate.verify(&site, &self.config.cluster, certified).is_ok())
    }

    /// Returns the certificate for what is about to be announced: the last one, if it says the same.
    pub(super) fn certificate_for(&self, facts: &Facts) -> Option<Certificate> {
        let (site, node) = (&self.config.site, &self.config.node);
        let key = self.config.key.public();
        let subnets = &facts.subnets[..facts.subnets.len().min(MAX_SUBNETS)];
        let certified = Certified { site, node, key: &key, subnets };
        self.certificate.filter(|certificate| self.is_valid(*certificate, certified))
    }
}
