//! The cluster keys of a mesh of sites: from whoever changes them to every node, each copy sealed for who gets it.
//!
//! A node that speaks for its site gives them to each other site that is in, by a statement that spreads like all others, and to
//! each node of its own site, in a datagram of its own. How a node goes over to them is for who drives the mesh. Invariants: no
//! copy is sealed for a site that is not in or for a node that the own site's authority does not accept; of two rings that
//! sites give at the same time the same one holds everywhere.

use std::collections::BTreeSet;
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand_core::RngCore;

use super::Mesh;
use super::api::{MeshEvent, Output, SiteStanding};
use super::membership::Id;
use super::proto::{self, Body};
use super::timer::Timer;
use super::trust::WordError;
use crate::seal::{KeyRing, RingName};
use crate::sealed_box;
use crate::site::{ClaimedStatement, KeyGrant, SignedStatement, SiteKey, Statement, Subject};
use crate::types::PublicKey;

/// Keys that another site gave are passed on to sites so long after: what was said before them, as that a site is expelled, has come by then.
const PASS_ON: Duration = Duration::from_secs(5);
/// Keys that are made anew are so many versions ahead: they hold against those that go out at the same time to sites that are let in, which
/// may be known to the very site that is to be shut out.
const ANEW: u64 = 16;
/// Between two rounds of keys, and so many members a round.
const ROUND: (Duration, usize) = (Duration::from_secs(1), 32);

#[derive(Debug, Default)]
pub(super) struct Grants {
    wanted: Option<(u64, KeyRing)>,
    /// When they may be passed on to other sites.
    pass_on: Option<Instant>,
    /// The name hashes of members of the own site that do not have the keys yet.
    waiting: BTreeSet<u64>,
    /// Who was sent them last.
    last: u64,
    /// The timer is set.
    armed: bool,
}

impl Mesh {
    /// Takes the cluster keys that an earlier run was told of last ([`MeshEvent::RingWanted`]).
    pub fn set_wanted_ring(&mut self, version: u64, ring: KeyRing, now: Instant) {
        self.advance(now);
        self.sites.note_keys(version);
        self.grants.wanted = Some((version, ring));
        self.grants.pass_on = Some(self.now + PASS_ON);
        self.note_all_ungranted();
        self.settle();
    }

    /// Returns the cluster keys that the mesh of sites is to have, if sites ever gave them to each other.
    pub fn wanted_ring(&self) -> Option<&KeyRing> {
        self.grants.wanted.as_ref().map(|(_, ring)| ring)
    }

    /// Gives other cluster keys to all sites that are in, and to the nodes of the own one.
    ///
    /// # Errors
    /// On a node without the site's key.
    pub fn rekey(&mut self, ring: KeyRing, now: Instant) -> Result<(), WordError> {
        self.advance(now);
        self.signer.as_ref().ok_or(WordError::NotSigner)?;
        self.want(self.keys_version() + ANEW, ring);
        self.grant_to_sites()?;
        self.settle();
        Ok(())
    }

    /// The version of the cluster keys that holds as far as this node knows; 0 before any were given.
    pub(super) fn keys_version(&self) -> u64 {
        self.sites.best_keys().0.max(self.grants.wanted.as_ref().map_or(0, |(version, _)| *version))
    }

    pub(super) fn want(&mut self, version: u64, ring: KeyRing) {
        self.sites.note_keys(version);
        self.grants.wanted = Some((version, ring.clone()));
        self.outputs.push_back(Output::Event(MeshEvent::RingWanted { version, ring }));
        self.renew_pairs();
        self.note_all_ungranted();
    }

    /// Takes keys that another site gives to this one, where this node speaks for it.
    pub(super) fn take_site_grant(&mut self, grant: &KeyGrant) {
        let Some(signer) = &self.signer else { return };
        if grant.to == signer.public() && self.is_later(grant) {
            let opened = signer.open(&grant.sealed);
            self.take_opened(grant, opened.as_deref().map(Vec::as_slice));
        }
    }

    /// Takes keys that the own site gives to this node.
    pub(super) fn on_grant(&mut self, grant: &proto::Grant) {
        let claimed = grant.statement.as_ref().and_then(|signed| ClaimedStatement::parse(signed).ok());
        let Some(claimed) = claimed else { return };
        let Statement::Keys(grant) = claimed.claim().clone() else { return };
        let wanted = Some(grant.by) == self.sites.own_key() && grant.to == self.config.key.public();
        if wanted && self.is_later(&grant) && claimed.verify(&self.config.cluster).is_ok() {
            let opened = self.config.key.open(&grant.sealed);
            self.take_opened(&grant, opened.as_deref().map(Vec::as_slice));
        }
    }

    fn is_later(&self, grant: &KeyGrant) -> bool {
        let known = self.grants.wanted.as_ref().map(|(version, ring)| (*version, ring.tag()));
        known.is_none_or(|known| (grant.version, grant.ring) > known)
    }

    fn take_opened(&mut self, grant: &KeyGrant, opened: Option<&[u8]>) {
        // Who seals something else than it says gives nothing.
        let ring = opened.and_then(KeyRing::from_secret_bytes).filter(|ring| ring.tag() == grant.ring);
        if let Some(ring) = ring {
            self.grants.pass_on = Some(self.now + PASS_ON);
            self.want(grant.version, ring);
        }
    }

    /// Has a look soon whether every site that is in has the keys.
    pub(super) fn grant_later(&mut self) {
        if self.signer.is_some() && self.grants.wanted.is_some() {
            self.arm_grants(ROUND.0);
        }
    }

    fn arm_grants(&mut self, after: Duration) {
        if !std::mem::replace(&mut self.grants.armed, true) {
            self.timers.set(self.now + after, Timer::Grant);
        }
    }

    /// Gives the keys to every site that is in and was not given them by anybody.
    fn grant_to_sites(&mut self) -> Result<(), WordError> {
        let Some((version, ring)) = self.grants.wanted.clone() else { return Ok(()) };
        let tag = ring.tag();
        if self.sites.best_keys() > (version, tag) {
            return Ok(());
        }
        let has = |key: &PublicKey| {
            let mut grants =
                self.sites.grants().filter(|grant| (grant.version, grant.ring) == (version, tag));
            grants.any(|grant| grant.to == *key || grant.by == *key)
        };
        let member = |standing: &SiteStanding| matches!(standing, SiteStanding::Member { .. });
        let views = self.sites.views().values().filter(|view| member(&view.standing));
        let without: Vec<PublicKey> = views.map(|view| view.key).filter(|key| !has(key)).collect();
        for key in without {
            if let Some(grant) = self.grant_for(key) {
                self.state(Statement::Keys(grant))?;
            }
        }
        Ok(())
    }

    fn grant_for(&mut self, to: PublicKey) -> Option<KeyGrant> {
        let (version, ring) = self.grants.wanted.clone()?;
        let by = self.signer.as_ref().map(SiteKey::public)?;
        let mut fresh = [0; 32];
        self.rng.fill_bytes(&mut fresh);
        let sealed = sealed_box::seal(&to, fresh, &ring.to_secret_bytes())?;
        Some(KeyGrant { by, to, version, ring: ring.tag(), sealed })
    }

    /// Gives the keys to one site now and returns the statement.
    pub(super) fn grant_to_site(
        &mut self,
        key: PublicKey,
    ) -> Result<Option<Arc<SignedStatement>>, WordError> {
        let own = self.signer.as_ref().ok_or(WordError::NotSigner)?.public();
        self.grant_to_sites()?;
        Ok(self.sites.find(&Subject(own, key, true)).cloned())
    }

    fn note_all_ungranted(&mut self) {
        self.grants.waiting.clear();
        if self.signer.is_some() {
            let ids: Vec<Id> = self.table.range(..).map(|(id, _)| id).collect();
            ids.into_iter().for_each(|id| self.note_ungranted(id));
        }
    }

    /// Has a member wait for the keys, if it is of the own site and does not say that it has them.
    pub(super) fn note_ungranted(&mut self, id: Id) {
        let Some((version, ring)) = &self.grants.wanted else { return };
        let wanted = RingName::of(*version, ring);
        let member = self.table.at(id);
        let (hash, record) = (member.hash, member.signed.record());
        let own = record.site == self.config.site && member.verdict.is_accepted();
        let has = record.facts.follows.is_some_and(|follows| follows >= wanted);
        let needs = own && !record.facts.subnets.is_empty() && !has && self.table.me != Some(id);
        if !needs {
            self.grants.waiting.remove(&hash);
        } else if self.grants.waiting.insert(hash) && self.grants.waiting.len() == 1 {
            self.arm_grants(Duration::ZERO);
        }
    }

    pub(super) fn on_grant_timer(&mut self) {
        self.grants.armed = false;
        let early = self.grants.pass_on.is_some_and(|at| at > self.now);
        if !early && self.grant_to_sites().is_err() {
            return;
        }
        // Around, so that those who do not take theirs do not keep them from others.
        let last = self.grants.last;
        let later = self.grants.waiting.range((Bound::Excluded(last), Bound::Unbounded));
        let some: Vec<u64> = later.chain(self.grants.waiting.range(..=last)).copied().take(ROUND.1).collect();
        self.grants.last = some.last().copied().unwrap_or(0);
        for hash in some {
            let Some(id) = self.table.find(hash) else {
                self.grants.waiting.remove(&hash);
                continue;
            };
            let key = self.table.at(id).signed.record().key;
            let grant = self.grant_for(key).map(Statement::Keys);
            let signer = self.signer.as_ref();
            let signed =
                grant.zip(signer).and_then(|(grant, signer)| signer.sign(&self.config.cluster, grant).ok());
            if let Some(signed) = signed {
                let body = Body::Grant(proto::Grant { statement: Some(signed.to_proto()) });
                self.send_to_member(id, body, Vec::new());
            }
        }
        if early || !self.grants.waiting.is_empty() {
            self.arm_grants(ROUND.0);
        }
    }
}
