//! How many members of whom the table takes, so that neither a site nor whoever makes nodes up keeps others out.
//!
//! A member counts with the own store where that names it, with its site where that has certified it, and with the uncertified
//! otherwise. It goes over to another account only where there is room, so no change of what counts makes an account larger than it
//! may be. Only in a mesh of sites: a site alone has the whole table. Invariants: nobody who is in is put out for others;
//! the first [`SURE`] members of every site find a place, whatever others have; a record costs the same, however many are known;
//! of what a node asks and tells of its own accord half at most goes to members that nobody vouches for.

use std::collections::BTreeMap;

use super::api::{Bound, Output, SiteStanding};
use super::membership::{Id, MAX_MEMBERS};
use super::{Authority, Mesh, MeshEvent, REPORT_INTERVAL};
use crate::record::NodeRecord;
use crate::types::SiteName;

/// The most members that a site may have that is not the own one, or that has no store.
pub const MOST_OF_SITE: usize = 8192;
/// The most members that nobody vouches for.
pub const MOST_UNCERTIFIED: usize = 256;
/// The places that every site has for itself. There are at most 512 sites, since each takes two of the statements that are kept.
const SURE: usize = 32;
/// The places that sites share beyond those. With those and the uncertified that is 49,408: the others are the own store's.
const SHARED: usize = 32_768;

const _: () = assert!(MOST_UNCERTIFIED + 512 * SURE + SHARED < MAX_MEMBERS);

/// With whom a member counts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Account {
    /// The own site's store names it, or other sites are not judged.
    Own,
    /// The site has certified it.
    Site(SiteName),
    /// Nobody vouches for it.
    Uncertified,
}

/// How many members count with whom.
#[derive(Debug, Default)]
pub(super) struct Quotas {
    sites: BTreeMap<SiteName, usize>,
    /// What sites have of the places that they share.
    shared: usize,
    uncertified: usize,
}

impl Quotas {
    /// Whether one more member may count with it.
    pub(super) fn has_room(&self, account: &Account) -> bool {
        match account {
            Account::Own => true,
            Account::Uncertified => self.uncertified < MOST_UNCERTIFIED,
            Account::Site(site) => {
                let count = self.sites.get(site).copied().unwrap_or(0);
                count < SURE || (count < MOST_OF_SITE && self.shared < SHARED)
            }
        }
    }

    pub(super) fn enter(&mut self, account: &Account) {
        match account {
            Account::Own => {}
            Account::Uncertified => self.uncertified += 1,
            Account::Site(site) => {
                let count = self.sites.entry(site.clone()).or_insert(0);
                *count += 1;
                self.shared += usize::from(*count > SURE);
            }
        }
    }

    pub(super) fn leave(&mut self, account: &Account) {
        match account {
            Account::Own => {}
            Account::Uncertified => self.uncertified -= 1,
            Account::Site(site) => {
                let Some(count) = self.sites.get_mut(site) else { return };
                self.shared -= usize::from(*count > SURE);
                *count -= 1;
                if *count == 0 {
                    self.sites.remove(site);
                }
            }
        }
    }
}

impl Mesh {
    /// Whether a node that is not known yet finds a place. It takes a look at its certificate only where that decides.
    pub(super) fn room_for(&self, record: &NodeRecord) -> Result<(), Bound> {
        if self.table.len() >= MAX_MEMBERS {
            return Err(Bound::Table);
        }
        let quotas = self.table.quotas();
        let of_site = Account::Site(record.site.clone());
        if !self.sites.judges() || quotas.has_room(&of_site) && quotas.has_room(&Account::Uncertified) {
            return Ok(());
        }
        let account = self.account_of_newcomer(record);
        if quotas.has_room(&account) {
            return Ok(());
        }
        Err(if account == of_site { Bound::Site(record.site.clone()) } else { Bound::Uncertified })
    }

    fn account_of_newcomer(&self, record: &NodeRecord) -> Account {
        let certified = self.is_foreign(record) && self.certified_epoch(record).is_some();
        self.account_of(record, certified)
    }

    fn account_of(&self, record: &NodeRecord, certified: bool) -> Account {
        if !self.sites.judges() {
            return Account::Own;
        }
        let own = record.site == self.config.site;
        match self.routes.authority() {
            Authority::Store(_) if own && self.routes.vouches_for(record) => Account::Own,
            Authority::Store(_) if own => Account::Uncertified,
            // Without a store whoever comes first is believed.
            Authority::Claims if own => Account::Site(record.site.clone()),
            _ if certified => Account::Site(record.site.clone()),
            _ => Account::Uncertified,
        }
    }

    /// Counts a member that was judged with whom it belongs to now, if there is room.
    pub(super) fn count_member(&mut self, id: Id) {
        if self.table.me == Some(id) {
            return;
        }
        let member = self.table.at(id);
        let record = member.signed.record();
        let key = match self.sites.views().get(&record.site) {
            Some(view) if matches!(view.standing, SiteStanding::Member { .. }) => Some(view.key),
            _ => None,
        };
        let certified = key.is_some() && member.certified == key.map(|key| (key, true));
        let account = self.account_of(record, certified);
        self.table.recount(id, account);
    }

    /// Counts a record that found no place, and tells of it.
    pub(super) fn refuse_newcomer(&mut self, bound: Bound) {
        match &bound {
            Bound::Table => self.counters.refused_full += 1,
            Bound::Site(_) => self.counters.refused_site += 1,
            Bound::Uncertified => self.counters.refused_uncertified += 1,
        }
        let now = self.now;
        if self.told_bounds.get(&bound).is_none_or(|told| now >= *told + REPORT_INTERVAL) {
            self.told_bounds.retain(|_, told| now < *told + REPORT_INTERVAL);
            self.told_bounds.insert(bound.clone(), now);
            self.outputs.push_back(Output::Event(MeshEvent::TooMany(bound)));
        }
    }
}

#[cfg(test)]
mod tests;
