//! The secrets that the own site shares with each other one: made, brought to the nodes of both, changed and forgotten.
//!
//! Of two sites the one with the greater key makes their secret, on the nodes that speak for it, and offers it to every node of both
//! that has tunnels and does not announce it. A node that is offered one asks for it with a fresh ML-KEM key
//! (`talk`), so nothing that is recorded opens by breaking X25519. It announces what it has in its record; which of its secrets a
//! tunnel uses follows from the two records ([`crate::pair::common`]). Two nodes that speak for one site may make a secret
//! each: the later generation holds everywhere, of two equal ones the one with the higher id.
//!
//! Invariants: a secret leaves a node only in a box for a node of one of the two sites whose leases its site accepts or certifies; nothing is
//! kept for a site that is not in; a secret that was replaced is forgotten after [`OVERLAP`].

mod talk;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::time::{Duration, Instant};

use rand_core::RngCore;

use super::Mesh;
use super::api::{MeshEvent, Output, SiteStanding, SiteView};
use super::membership::{Id, below};
use super::timer::Timer;
use crate::pair::{self, MAX_PAIRS, PairSecret};
use crate::seal::KeyId;
use crate::site::SiteKey;
use crate::types::{PublicKey, SiteName};
use talk::Talk;
pub(super) use talk::is_part;

/// Between two rounds of offers, and so many members a round, and so many offers a member.
const ROUND: (Duration, usize, usize) = (Duration::from_secs(1), 32, 8);
/// So long nodes have to go over from one secret to the next. Handshakes are at most three minutes apart while packets flow.
pub(super) const OVERLAP: Duration = Duration::from_secs(600);
/// A secret of an earlier run, whose age is not known, is used for so long at most.
const RECALLED: Duration = Duration::from_secs(3600);
/// A secret is used for so long, where nobody says otherwise.
const ROTATE_AFTER: Duration = Duration::from_secs(24 * 3600);
/// A node that knows a later generation than the one that makes them has it make another, this often at most.
const OVERTAKE: Duration = Duration::from_secs(60);
/// So far ahead a generation is believed: nobody can use up the numbers.
const AHEAD: u32 = 1 << 20;

#[derive(Debug)]
pub(super) struct Pairs {
    /// By the key of the other site.
    held: BTreeMap<PublicKey, Held>,
    rotate_after: Duration,
    /// The name hashes of members that lack a secret that this node makes.
    waiting: BTreeSet<u64>,
    /// Who was offered one last.
    last: u64,
    /// When the timer is set.
    wake: Option<Instant>,
    talk: Talk,
}

/// What two sites share.
#[derive(Debug)]
struct Held {
    /// The latest first; none before the first is made.
    secrets: Vec<PairSecret>,
    /// Since when the latest one is known here.
    since: Instant,
    /// When to make another, on a node that speaks for the site that makes them.
    due: Option<Instant>,
    /// When one was made last because a node knew a later one.
    overtaken: Option<Instant>,
}

impl Held {
    fn new(since: Instant, due: Option<Instant>) -> Self {
        Self { secrets: Vec::new(), since, due, overtaken: None }
    }

    fn latest(&self) -> Option<&PairSecret> {
        self.secrets.first()
    }

    /// When the secrets before the latest are to be forgotten.
    fn over(&self) -> Option<Instant> {
        (self.secrets.len() > 1).then(|| self.since + OVERLAP)
    }
}

impl Default for Pairs {
    fn default() -> Self {
        Self {
            held: BTreeMap::new(),
            rotate_after: ROTATE_AFTER,
            waiting: BTreeSet::new(),
            last: 0,
            wake: None,
            talk: Talk::default(),
        }
    }
}

impl Mesh {
    /// Goes on with the secrets that an earlier run had ([`MeshEvent::PairSecretsChanged`]); call it after [`Mesh::set_trust`]. What
    /// it had for sites that are not in is dropped.
    pub fn set_pair_secrets(
        &mut self,
        remembered: impl IntoIterator<Item = (PublicKey, Vec<PairSecret>)>,
        now: Instant,
    ) {
        self.advance(now);
        let within = self.other_members();
        for (other, secrets) in remembered.into_iter().filter(|(other, _)| within.contains(other)) {
            let due = self.makes_with(&other).then(|| self.now + self.pairs.rotate_after.min(RECALLED));
            let held = self.pairs.held.entry(other);
            let held = held.or_insert(Held::new(self.now, due));
            pair::merge(&mut held.secrets, secrets);
            held.due = due;
        }
        self.resign();
        self.note_all_unpaired();
        self.arm_pairs();
        self.settle();
    }

    /// Has a secret that this node makes replaced after so long; a day where it is not said.
    pub fn rotate_pair_secrets_after(&mut self, after: Duration) {
        self.pairs.rotate_after = after.max(ROUND.0);
    }

    /// Returns the secrets that the own site shares with others, by the other site's key, each with the latest first: to be
    /// persisted.
    pub fn pair_secrets(&self) -> impl Iterator<Item = (PublicKey, &[PairSecret])> {
        let held = self.pairs.held.iter().filter(|(_, held)| !held.secrets.is_empty());
        held.map(|(other, held)| (*other, &held.secrets[..]))
    }

    /// Returns the secrets that the own site shares with another, the latest first.
    pub fn pair_secrets_with(&self, site: &SiteName) -> &[PairSecret] {
        let view = self.sites.views().get(site);
        view.and_then(|view| self.pairs.held.get(&view.key)).map_or(&[], |held| &held.secrets)
    }

    /// The ids for this node's record: first the latest of each pair, then those before.
    pub(super) fn pair_ids(&self) -> Vec<KeyId> {
        let of = |latest: bool| {
            let held = self.pairs.held.values();
            held.flat_map(move |held| {
                let (first, rest) = held.secrets.split_at(held.secrets.len().min(1));
                if latest { first } else { rest }
            })
        };
        of(true).chain(of(false)).map(PairSecret::id).take(MAX_PAIRS).collect()
    }

    /// The keys of the other sites that are in.
    fn other_members(&self) -> BTreeSet<PublicKey> {
        let member = |view: &&SiteView| matches!(view.standing, SiteStanding::Member { .. });
        self.sites.views().values().filter(member).map(|view| view.key).collect()
    }

    /// Whether this node makes the secrets of its site and another.
    fn makes_with(&self, other: &PublicKey) -> bool {
        self.signer.as_ref().is_some_and(|signer| pair::makes(&signer.public(), other))
    }

    /// Forgets what is shared with sites that are not in any more, after sites said something.
    pub(super) fn review_pairs(&mut self) {
        let within = self.other_members();
        let count = self.pairs.held.len();
        self.pairs.held.retain(|other, _| within.contains(other));
        self.pairs.talk.retain(&within);
        if self.pairs.held.len() != count {
            self.pairs_changed();
        }
    }

    /// Replaces all secrets that this node makes, after the cluster keys of the mesh changed: whoever is out has those before.
    pub(super) fn renew_pairs(&mut self) {
        let now = self.now;
        self.pairs.held.values_mut().filter(|held| held.due.is_some()).for_each(|held| held.due = Some(now));
        self.arm_pairs();
    }

    /// Has a member offered what it lacks of the secrets that this node makes.
    pub(super) fn note_unpaired(&mut self, id: Id) {
        if self.signer.is_none() {
            return;
        }
        let hash = self.table.at(id).hash;
        for other in self.pairs_of(id) {
            let (now, held) = (self.now, &mut self.pairs.held);
            held.entry(other).or_insert(Held::new(now, Some(now)));
        }
        if self.lacking(id).is_empty() {
            self.pairs.waiting.remove(&hash);
        } else {
            self.pairs.waiting.insert(hash);
        }
        self.arm_pairs();
    }

    fn note_all_unpaired(&mut self) {
        let ids: Vec<Id> = self.table.range(..).map(|(id, _)| id).collect();
        ids.into_iter().for_each(|id| self.note_unpaired(id));
    }

    /// Whether a member may have secrets of its site: its leases are accepted or certified. One without a lease may be made up.
    fn may_have(&self, id: Id) -> bool {
        let member = self.table.at(id);
        let facts = &member.signed.record().facts;
        member.verdict.is_accepted() && !facts.subnets.is_empty() && self.table.me != Some(id)
    }

    /// The pairs, by the other site's key, whose secrets this node makes and a member uses.
    fn pairs_of(&self, id: Id) -> Vec<PublicKey> {
        let record = self.table.at(id).signed.record();
        let uses = record.facts.tunnel.as_ref().is_some_and(|tunnel| !tunnel.preshared.is_empty());
        if !uses || !self.may_have(id) {
            return Vec::new();
        }
        if record.site == self.config.site {
            return self.pairs.held.keys().copied().filter(|other| self.makes_with(other)).collect();
        }
        let view = self.sites.views().get(&record.site);
        view.map(|view| view.key).filter(|other| self.makes_with(other)).into_iter().collect()
    }

    /// What a member lacks: the other site's key and the latest secret.
    fn lacking(&self, id: Id) -> Vec<(PublicKey, KeyId)> {
        let tunnel = self.table.at(id).signed.record().facts.tunnel.as_ref();
        let has = |id: &KeyId| tunnel.is_some_and(|tunnel| tunnel.pairs.contains(id));
        let pairs = self.pairs_of(id).into_iter();
        let latest = pairs.filter_map(|other| Some((other, self.pairs.held.get(&other)?.latest()?.id())));
        latest.filter(|(_, latest)| !has(latest)).collect()
    }

    fn arm_pairs(&mut self) {
        let held = self.pairs.held.values();
        let times = held.flat_map(|held| held.due.into_iter().chain(held.over()));
        let round = (!self.pairs.waiting.is_empty()).then(|| self.now + ROUND.0);
        let next = times.chain(round).min().map(|at| at.max(self.now));
        if let Some(next) = next.filter(|next| self.pairs.wake.is_none_or(|wake| *next < wake)) {
            self.pairs.wake = Some(next);
            self.timers.set(next, Timer::Pairs);
        }
    }

    pub(super) fn on_pair_timer(&mut self) {
        self.pairs.wake = None;
        let now = self.now;
        let mut changed = false;
        for held in self.pairs.held.values_mut().filter(|held| held.over().is_some_and(|over| over <= now)) {
            held.secrets.truncate(1);
            changed = true;
        }
        let due = |(_, held): &(&PublicKey, &Held)| held.due.is_some_and(|due| due <= now);
        let due: Vec<PublicKey> = self.pairs.held.iter().filter(due).map(|(other, _)| *other).collect();
        changed |= !due.is_empty();
        due.iter().for_each(|other| self.make(other, 0));
        if changed {
            self.pairs_changed();
        }
        if !due.is_empty() {
            self.note_all_unpaired();
        }
        self.offer_round();
        self.arm_pairs();
    }

    /// Makes another secret, of a generation above the latest one and above `known`.
    fn make(&mut self, other: &PublicKey, known: u32) {
        let mut bytes = [0; 32];
        self.rng.fill_bytes(&mut bytes);
        let Some(held) = self.pairs.held.get(other) else { return };
        let generation = held.latest().map_or(0, PairSecret::generation).max(known).saturating_add(1);
        self.take_secrets(*other, vec![PairSecret::new(generation, bytes)]);
    }

    /// Takes secrets that are authentic; returns whether one was news.
    fn take_secrets(&mut self, other: PublicKey, secrets: Vec<PairSecret>) -> bool {
        let makes = self.makes_with(&other);
        // Up to an eighth later, so that two that speak for one site do not both make one.
        let spread = self.pairs.rotate_after / 2048 * below(&mut self.rng, 256) as u32;
        let next = self.now + self.pairs.rotate_after + spread;
        let held = self.pairs.held.entry(other);
        let held = held.or_insert(Held::new(self.now, None));
        let latest = held.latest().map(PairSecret::id);
        let changed = pair::merge(&mut held.secrets, secrets);
        if held.latest().map(PairSecret::id) != latest {
            held.since = self.now;
            held.due = makes.then_some(next);
        }
        changed
    }

    /// Has what changed persisted and announced.
    fn pairs_changed(&mut self) {
        self.outputs.push_back(Output::Event(MeshEvent::PairSecretsChanged));
        self.resign();
        self.arm_pairs();
    }

    /// Offers what they lack to some of those that wait; around, so that those who do not take it do not keep it from others.
    fn offer_round(&mut self) {
        let last = self.pairs.last;
        let later = self.pairs.waiting.range((Bound::Excluded(last), Bound::Unbounded));
        let some: Vec<u64> = later.chain(self.pairs.waiting.range(..=last)).copied().take(ROUND.1).collect();
        self.pairs.last = some.last().copied().unwrap_or(0);
        for hash in some {
            let Some(id) = self.table.find(hash) else {
                self.pairs.waiting.remove(&hash);
                continue;
            };
            let lacking = self.lacking(id);
            if lacking.is_empty() {
                self.pairs.waiting.remove(&hash);
            } else if self.table.at(id).gone_since.is_none() {
                lacking.into_iter().take(ROUND.2).for_each(|(other, latest)| self.offer(id, other, latest));
            }
        }
    }

    fn own_signer(&self) -> Option<PublicKey> {
        self.signer.as_ref().map(SiteKey::public)
    }
}

#[cfg(test)]
mod tests;
