//! Whom of other sites this node believes: statements in, standings out.
//!
//! A site is in as long as a chain of admissions leads to it from this node's own site, and the own site has expelled none
//! on it. What it may announce is what it says itself, within what the one that let it in allows. The own site's word comes
//! first: its prefixes are nobody else's. Invariants: only statements of sites that are in are kept, so whoever is not
//! in cannot fill the memory; of two statements on one subject every node keeps the same.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::api::{SiteStanding, SiteView};
use crate::site::{Admission, KeyGrant, SignedStatement, SiteRecord, Statement, Subject};
use crate::types::{PublicKey, SiteName, Subnet};

/// The most statements that are kept: two for each pair of sites that met, and one a site.
const MOST: usize = 1024;
/// What the sum of no statements at all is, so that it differs from that of a node that takes none.
const EMPTY: u64 = 1;
/// So far ahead of what is known a version of the mesh's cluster keys may be: nobody can use up the numbers.
pub(super) const AHEAD: u64 = 1 << 20;

#[derive(Debug, Default)]
pub(super) struct Sites {
    own: Option<Own>,
    statements: BTreeMap<Subject, Arc<SignedStatement>>,
    sum: u64,
    views: BTreeMap<SiteName, SiteView>,
    /// The keys that statements are taken from, and whose own word is taken.
    within: BTreeSet<PublicKey>,
    /// The version of the cluster keys that this node knows of.
    keys_version: u64,
}

#[derive(Debug)]
struct Own {
    site: SiteName,
    key: PublicKey,
    prefixes: Vec<Subnet>,
}

impl Sites {
    /// Begins to judge other sites from this node's own one, with what an earlier run remembered.
    pub(super) fn stand_on(
        &mut self,
        site: SiteName,
        key: PublicKey,
        prefixes: Vec<Subnet>,
        mut remembered: Vec<Arc<SignedStatement>>,
    ) {
        remembered.extend(std::mem::take(&mut self.statements).into_values());
        self.own = Some(Own { site, key, prefixes });
        self.sum = EMPTY;
        self.evaluate();
        // Whatever order they come in: a site that is let in may be followed by what it lets in.
        loop {
            let count = remembered.len();
            remembered.retain(|statement| !self.merge(Arc::clone(statement)));
            if remembered.len() == count {
                break;
            }
        }
    }

    /// Whether other sites are judged by their statements.
    pub(super) fn judges(&self) -> bool {
        self.own.is_some()
    }

    pub(super) fn own_key(&self) -> Option<PublicKey> {
        self.own.as_ref().map(|own| own.key)
    }

    pub(super) fn own_prefixes(&self) -> &[Subnet] {
        self.own.as_ref().map_or(&[], |own| &own.prefixes)
    }

    /// The sum of all statements for anti-entropy, 0 for a node that takes none.
    pub(super) fn sum(&self) -> u64 {
        self.sum
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<SignedStatement>> {
        self.statements.values()
    }

    pub(super) fn find(&self, subject: &Subject) -> Option<&Arc<SignedStatement>> {
        self.statements.get(subject)
    }

    /// Whether a statement is news that would be kept.
    pub(super) fn wants(&self, statement: &Statement, order: (u64, u32)) -> bool {
        let subject = statement.subject();
        if let Statement::Keys(grant) = statement {
            let best = self.best_keys();
            if rank(grant) < best || grant.version > best.0.max(self.keys_version).saturating_add(AHEAD) {
                return false;
            }
        }
        self.within.contains(&subject.0)
            && match self.find(&subject) {
                Some(known) => order > known.order(),
                None => self.statements.len() < MOST,
            }
    }

    /// Takes a statement; returns whether it was news.
    pub(super) fn merge(&mut self, signed: Arc<SignedStatement>) -> bool {
        if !self.wants(signed.statement(), signed.order()) {
            return false;
        }
        if let Statement::Keys(grant) = signed.statement() {
            self.drop_keys_below(rank(grant));
        }
        self.sum ^= digest(&signed);
        if let Some(earlier) = self.statements.insert(signed.statement().subject(), signed) {
            self.sum ^= digest(&earlier);
        }
        self.evaluate();
        true
    }

    fn drop_keys_below(&mut self, best: (u64, u64)) {
        let sum = &mut self.sum;
        self.statements.retain(|_, signed| {
            let kept = !matches!(signed.statement(), Statement::Keys(grant) if rank(grant) < best);
            if !kept {
                *sum ^= digest(signed);
            }
            kept
        });
    }

    /// What sites say that the cluster keys of the mesh are: only what holds is kept.
    pub(super) fn grants(&self) -> impl Iterator<Item = &KeyGrant> {
        self.statements.values().filter_map(|signed| match signed.statement() {
            Statement::Keys(grant) => Some(grant),
            Statement::Site(_) | Statement::Admission(_) => None,
        })
    }

    /// The version of the cluster keys that holds, and what tells them from others.
    pub(super) fn best_keys(&self) -> (u64, u64) {
        self.grants().map(rank).max().unwrap_or_default()
    }

    /// Takes that this node knows of cluster keys of this version.
    pub(super) fn note_keys(&mut self, version: u64) {
        self.keys_version = self.keys_version.max(version);
    }

    /// What the own site says of itself.
    pub(super) fn own_record(&self) -> Option<&SiteRecord> {
        self.own_key().and_then(|key| self.record(&key))
    }

    fn record(&self, key: &PublicKey) -> Option<&SiteRecord> {
        match self.find(&Subject(*key, *key, false))?.statement() {
            Statement::Site(record) => Some(record),
            Statement::Admission(_) | Statement::Keys(_) => None,
        }
    }

    pub(super) fn admission(&self, by: PublicKey, of: PublicKey) -> Option<&Admission> {
        match self.find(&Subject(by, of, false))?.statement() {
            Statement::Admission(admission) => Some(admission),
            Statement::Site(_) | Statement::Keys(_) => None,
        }
    }

    /// What is thought of the sites that this node has heard of, its own one not among them.
    pub(super) fn views(&self) -> &BTreeMap<SiteName, SiteView> {
        &self.views
    }

    fn admissions(&self, by: PublicKey) -> impl Iterator<Item = &Admission> {
        let zero = PublicKey([0; 32]);
        let of_one =
            self.statements.range(Subject(by, zero, false)..).take_while(move |(subject, _)| subject.0 == by);
        of_one.filter_map(|(_, signed)| match signed.statement() {
            Statement::Admission(admission) => Some(admission),
            Statement::Site(_) | Statement::Keys(_) => None,
        })
    }

    /// Follows the chains anew, and forgets the statements that no chain leads to.
    fn evaluate(&mut self) {
        let Some(own) = &self.own else { return };
        let before = std::mem::take(&mut self.views);
        let was_in = |admission: &Admission| {
            before.get(&admission.site).is_some_and(|view| {
                view.key == admission.key && matches!(view.standing, SiteStanding::Member { .. })
            })
        };
        let mut views = BTreeMap::new();
        let mut within = BTreeSet::from([own.key]);
        let mut taken: Vec<(Subnet, SiteName)> =
            own.prefixes.iter().map(|prefix| (*prefix, own.site.clone())).collect();
        let mut queue = VecDeque::from([own.key]);
        // Who left believes nobody, until it joins again.
        if self.record(&own.key).is_some_and(|record| record.left) {
            queue.clear();
        }
        while let Some(by) = queue.pop_front() {
            let mut admissions: Vec<&Admission> = self.admissions(by).collect();
            // Whoever is in stays in when another claims its name or its prefixes.
            admissions.sort_by_key(|admission| (!was_in(admission), &admission.site, admission.key));
            for admission in admissions {
                if within.contains(&admission.key) {
                    continue;
                }
                if by == own.key && admission.expelled {
                    let view = SiteView::new(admission, SiteStanding::Expelled);
                    views.entry(admission.site.clone()).or_insert(view);
                    continue;
                }
                let put_out = self.admission(own.key, admission.key).is_some_and(|own| own.expelled);
                if admission.expelled || put_out {
                    continue;
                }
                let holder = views.get_mut(&admission.site);
                let holder = holder.filter(|view: &&mut SiteView| {
                    !matches!(view.standing, SiteStanding::Expelled | SiteStanding::Left)
                });
                if admission.site == own.site || holder.is_some() {
                    let problem = format!(
                        "a second site is named {} (key {}): rename one of them",
                        admission.site,
                        admission.key.short()
                    );
                    match holder {
                        Some(holder) => holder.problems.push(problem),
                        None => {
                            let mut view = SiteView::new(admission, SiteStanding::Unknown);
                            view.problems.push(problem);
                            views.insert(admission.site.clone(), view);
                        }
                    }
                    continue;
                }
                within.insert(admission.key);
                if self.record(&admission.key).is_some_and(|record| record.left) {
                    views.insert(admission.site.clone(), SiteView::new(admission, SiteStanding::Left));
                    continue;
                }
                queue.push_back(admission.key);
                let view = self.view(admission, &mut taken);
                views.insert(admission.site.clone(), view);
            }
        }
        self.views = views;
        self.within = within;
        let (within, sum) = (&self.within, &mut self.sum);
        self.statements.retain(|subject, signed| {
            let kept = within.contains(&subject.0);
            if !kept {
                *sum ^= digest(signed);
            }
            kept
        });
    }

    /// What a site that is let in may announce, given what is taken already.
    fn view(&self, admission: &Admission, taken: &mut Vec<(Subnet, SiteName)>) -> SiteView {
        let Some(record) = self.record(&admission.key) else {
            return SiteView::new(admission, SiteStanding::Unknown);
        };
        let mut view = SiteView::new(admission, SiteStanding::Unknown);
        if record.site != admission.site {
            view.problems.push(format!(
                "it was let in as {} and calls itself {}: invite it again under that name",
                admission.site, record.site
            ));
            return view;
        }
        let mut prefixes = Vec::new();
        for prefix in &record.prefixes {
            if !admission.prefixes.iter().any(|allowed| allowed.covers(*prefix)) {
                view.problems.push(format!("it was not let in with {prefix}: invite it again"));
            } else if let Some((other, site)) = taken.iter().find(|(other, _)| other.overlaps(*prefix)) {
                view.problems.push(format!(
                    "its {prefix} overlaps {other} of site {site}, which keeps it: give one of the two another range"
                ));
            } else {
                taken.push((*prefix, admission.site.clone()));
                prefixes.push(*prefix);
            }
        }
        view.standing = SiteStanding::Member {
            prefixes,
            least_serial: record.least_serial,
            void: record.void.iter().copied().collect(),
        };
        view
    }
}

fn rank(grant: &KeyGrant) -> (u64, u64) {
    (grant.version, grant.ring)
}

fn digest(signed: &SignedStatement) -> u64 {
    let (version, tag) = signed.order();
    signed.statement().subject().digest(version, tag)
}

#[cfg(test)]
mod tests;
