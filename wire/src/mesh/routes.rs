//! Which record's subnets may be routed to its node.
//!
//! With a shared store the lease table decides; without one the first claim stays. Nothing here is learnt
//! from gossip alone. Invariants: routes that are in use are never withdrawn for the sake of a later claim;
//! of two accepted claims none overlaps the other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Mesh;
use super::api::{Authority, LeaseTable, MeshEvent, SiteStanding, Verdict};
use super::membership::{Id, MAX_MEMBERS};
use crate::record::{LeasedSubnet, NodeRecord};
use crate::types::{NodeName, PublicKey, Subnet};

#[derive(Debug)]
pub(super) struct Routes {
    authority: Authority,
    /// Without a store: who has which subnet. No two overlap.
    claims: BTreeMap<Subnet, u64>,
    /// Without a store, and of other sites: the name hashes of those that were refused.
    contested: BTreeSet<u64>,
    /// Subnets whose claims were withdrawn, for those that were refused for them.
    released: Vec<Subnet>,
}

impl Default for Routes {
    /// An empty lease table: nothing is accepted before the caller sets an authority.
    fn default() -> Self {
        Self::new(Authority::Store(Arc::default()))
    }
}

impl Routes {
    fn new(authority: Authority) -> Self {
        Self { authority, claims: BTreeMap::new(), contested: BTreeSet::new(), released: Vec::new() }
    }

    /// Takes that the member with this name hash is gone.
    pub(super) fn forget(&mut self, hash: u64) {
        self.contested.remove(&hash);
    }

    /// Whether the store says that `key` speaks for `node`.
    pub(super) fn is_owner(&self, node: &NodeName, key: &PublicKey) -> bool {
        matches!(&self.authority, Authority::Store(table) if table.is_owner(node, key))
    }

    pub(super) fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Whether the store names the record's node, with its key or one that it follows.
    pub(super) fn vouches_for(&self, record: &NodeRecord) -> bool {
        let keys = record.endorsements.iter().map(|earlier| &earlier.key).chain([&record.key]);
        keys.into_iter().any(|key| self.is_owner(&record.node, key))
    }

    /// Who claims an address of `subnet`. Claims do not overlap, so the last one that starts in or before
    /// the subnet is the only candidate before it and the first of those inside it otherwise.
    fn claimed(&self, subnet: Subnet, except: u64) -> Option<(Subnet, u64)> {
        let last = ipnet::IpNet::new(subnet.net().broadcast(), subnet.net().max_prefix_len())
            .ok()
            .and_then(|net| Subnet::try_from(net).ok())?;
        let mut candidates = self.claims.range(..=last).rev();
        candidates
            .by_ref()
            .take_while(|(other, _)| other.overlaps(subnet))
            .find(|(_, holder)| **holder != except)
            .map(|(other, holder)| (*other, *holder))
    }
}

/// What to think of a record.
pub(super) enum Judgement {
    Accepted,
    Pending(String),
    Refused(String),
    /// The lease is the node's, under another key.
    OtherKey(String),
    Conflict {
        subnet: Subnet,
        kept: NodeName,
    },
}

impl Mesh {
    /// Judges a member's record. `fresh`: the record is new, so a conflict is worth an event.
    pub(super) fn judge(&mut self, id: Id, fresh: bool) {
        let member = self.table.at(id);
        let (hash, name) = (member.hash, member.name().clone());
        let signed = Arc::clone(&member.signed);
        let was_routed = member.routed.clone();
        let verdict_before = member.verdict.clone();
        let judgement = if signed.record().left {
            Judgement::Refused("it left the mesh".into())
        } else if self.is_foreign(signed.record()) {
            self.judge_foreign(id)
        } else if self.sites.own_record().is_some_and(|own| own.void.contains(&signed.record().key)) {
            Judgement::Refused("its site has declared its key void: give the node another key".into())
        } else {
            self.judgement(
                signed.record(),
                hash,
                was_routed.as_ref().is_some_and(|routed| **routed == *signed),
            )
        };
        let judgement = match judgement {
            // It may be what the node said last under the key before, and come after news of the lease.
            Judgement::OtherKey(why) if was_routed.is_some() => Judgement::Pending(why),
            other => other,
        };
        let (verdict, routed) = match judgement {
            Judgement::Accepted => (Verdict::Accepted, Some(signed)),
            Judgement::Pending(why) => {
                // What was accepted stays in use while the table does not contradict it.
                let kept = was_routed.clone().filter(|routed| self.holds(routed.record(), hash));
                (Verdict::Pending { why }, kept)
            }
            Judgement::Refused(why) | Judgement::OtherKey(why) => (Verdict::Refused { why }, None),
            Judgement::Conflict { subnet, kept } => {
                let why = format!("{subnet} belongs to node {kept}");
                if fresh || !matches!(verdict_before, Verdict::Refused { .. }) {
                    let event = MeshEvent::Conflict { subnet, kept, refused: name };
                    self.outputs.push_back(super::Output::Event(event));
                }
                (Verdict::Refused { why }, None)
            }
        };
        let foreign = self.is_foreign(self.table.at(id).signed.record());
        if foreign || self.routes.authority == Authority::Claims {
            self.claim(hash, routed.as_deref().map(|routed| routed.record()), &verdict);
        }
        let member = self.table.at_mut(id);
        if member.routed != routed {
            self.routes_dirty = true;
        }
        if member.verdict != verdict {
            self.routes_dirty = true;
            member.verdict = verdict;
        }
        member.once_vouched |=
            routed.as_ref().is_some_and(|signed| !signed.record().facts.subnets.is_empty());
        member.routed = routed;
        self.note_uncertified(id);
        self.count_member(id);
    }

    /// Whether what is in use may stay while a later record of the member is pending.
    fn holds(&self, record: &NodeRecord, hash: u64) -> bool {
        if self.is_foreign(record) {
            return self.certified_epoch(record).is_some() && self.contested_by(record, hash).is_none();
        }
        matches!(self.judgement(record, hash, true), Judgement::Accepted)
    }

    /// Judges a record of another site: by the chain from this node's site to that one, and by that one's certificate.
    fn judge_foreign(&mut self, id: Id) -> Judgement {
        let member = self.table.at(id);
        let (hash, signed) = (member.hash, Arc::clone(&member.signed));
        let record = signed.record();
        let site = &record.site;
        let key = match self.certifier(record) {
            Ok(key) => key,
            Err(judgement) => return judgement,
        };
        if !self.is_certified(id, &key) {
            return Judgement::Pending(format!("site {site} has not certified what it announces"));
        }
        let Some((subnet, holder)) = self.contested_by(record, hash) else { return Judgement::Accepted };
        let Some(other) = self.table.find(holder) else { return Judgement::Accepted };
        let theirs = self.table.at(other).signed.record();
        let kept = theirs.node.clone();
        let epoch = |record: &NodeRecord| {
            let overlapping = |leased: &&LeasedSubnet| leased.subnet.overlaps(subnet);
            record.facts.subnets.iter().filter(overlapping).map(|leased| leased.epoch).max()
        };
        // Within a site the later lease of a subnet has the higher epoch.
        if theirs.site == *site && epoch(record) > epoch(theirs) {
            self.withdraw(other);
            self.displace(other, format!("{subnet} belongs to node {} now", record.node));
            return Judgement::Accepted;
        }
        Judgement::Conflict { subnet, kept }
    }

    /// Returns the site key that the certificate in a record of another site has to be by, where that site may certify what the
    /// record says; else what to think of the record.
    pub(super) fn certifier(&self, record: &NodeRecord) -> Result<PublicKey, Judgement> {
        let site = &record.site;
        let Some(view) = self.sites.views().get(site) else {
            return Err(Judgement::Pending(format!("site {site} is not let in, or not known here yet")));
        };
        let (prefixes, least_serial, void) = match &view.standing {
            SiteStanding::Unknown => {
                return Err(Judgement::Pending(format!("site {site} has not said what it announces")));
            }
            SiteStanding::Expelled => return Err(Judgement::Refused(format!("site {site} is expelled"))),
            SiteStanding::Left => return Err(Judgement::Refused(format!("site {site} has left"))),
            SiteStanding::Member { prefixes, least_serial, void } => (prefixes, least_serial, void),
        };
        let outside = |leased: &&LeasedSubnet| !prefixes.iter().any(|prefix| prefix.covers(leased.subnet));
        if let Some(leased) = record.facts.subnets.iter().find(outside) {
            let why = format!("{} is not of the prefixes of site {site}", leased.subnet);
            return Err(Judgement::Refused(why));
        }
        let Some(certificate) = record.facts.certificate else {
            return Err(Judgement::Pending(format!("site {site} has not certified it yet")));
        };
        if certificate.serial < *least_serial || void.contains(&record.key) {
            return Err(Judgement::Refused(format!("site {site} has declared its certificate void")));
        }
        Ok(view.key)
    }

    fn displace(&mut self, id: Id, why: String) {
        let member = self.table.at_mut(id);
        let hash = member.hash;
        (member.routed, member.verdict) = (None, Verdict::Refused { why });
        self.routes_dirty = true;
        self.routes.contested.insert(hash);
    }

    /// Which subnet of the record another member has in use.
    fn contested_by(&self, record: &NodeRecord, hash: u64) -> Option<(Subnet, u64)> {
        let mut subnets = record.facts.subnets.iter();
        subnets.find_map(|leased| self.routes.claimed(leased.subnet, hash))
    }

    fn claim(&mut self, hash: u64, record: Option<&NodeRecord>, verdict: &Verdict) {
        let claims = &mut self.routes.claims;
        for leased in record.iter().flat_map(|record| &record.facts.subnets) {
            claims.insert(leased.subnet, hash);
        }
        // What is pending waits for other news than that a subnet is free.
        if !matches!(verdict, Verdict::Refused { .. }) {
            self.routes.contested.remove(&hash);
        } else if self.routes.contested.len() < MAX_MEMBERS {
            self.routes.contested.insert(hash);
        }
    }

    /// Takes a member's claims away, before its record is replaced or dropped.
    pub(super) fn withdraw(&mut self, id: Id) {
        let member = self.table.at(id);
        let Some(routed) = &member.routed else { return };
        for leased in &routed.record().facts.subnets {
            if self.routes.claims.get(&leased.subnet) == Some(&member.hash) {
                self.routes.claims.remove(&leased.subnet);
                self.routes.released.push(leased.subnet);
            }
        }
    }

    /// Judges those again that a withdrawn claim may have kept out: the lower epoch first, then the lower key.
    pub(super) fn judge_contested(&mut self) {
        let released = std::mem::take(&mut self.routes.released);
        if released.is_empty() || self.routes.contested.is_empty() {
            return;
        }
        let wants = |id: &Id| {
            let mut subnets = self.table.at(*id).signed.record().facts.subnets.iter();
            subnets.any(|leased| released.iter().any(|subnet| subnet.overlaps(leased.subnet)))
        };
        let contested = self.routes.contested.iter().filter_map(|hash| self.table.find(*hash));
        let ids = contested.filter(wants).collect();
        self.judge_in_order(ids);
    }

    fn judge_in_order(&mut self, mut ids: Vec<Id>) {
        ids.sort_by_key(|id| {
            let record = self.table.at(*id).signed.record();
            (record.facts.subnets.iter().map(|leased| leased.epoch).min(), record.key)
        });
        ids.into_iter().for_each(|id| self.judge(id, false));
    }

    pub(super) fn replace_authority(&mut self, authority: Authority) {
        if authority == self.routes.authority {
            return;
        }
        self.routes = Routes::new(authority);
        self.judge_all();
    }

    /// Judges every member.
    pub(super) fn judge_all(&mut self) {
        self.routes.claims.clear();
        self.routes.contested.clear();
        // Whoever has routes keeps them against other claims, so they are judged first.
        let (installed, others): (Vec<Id>, Vec<Id>) =
            self.table.range(..).map(|(id, _)| id).partition(|id| self.table.at(*id).routed.is_some());
        self.judge_in_order(installed);
        self.judge_in_order(others);
    }

    fn judgement(&self, record: &NodeRecord, hash: u64, in_use: bool) -> Judgement {
        match &self.routes.authority {
            Authority::Store(table) => {
                for leased in &record.facts.subnets {
                    match self.judge_lease(table, record, *leased, in_use) {
                        Judgement::Accepted => {}
                        other => return other,
                    }
                }
                Judgement::Accepted
            }
            Authority::Claims => {
                for leased in &record.facts.subnets {
                    if let Some((_, holder)) = self.routes.claimed(leased.subnet, hash) {
                        let kept = self.table.find_member(holder).map(|member| member.name().clone());
                        let kept = kept.unwrap_or_else(|| self.config.node.clone());
                        return Judgement::Conflict { subnet: leased.subnet, kept };
                    }
                }
                Judgement::Accepted
            }
        }
    }

    fn judge_lease(
        &self,
        table: &LeaseTable,
        record: &NodeRecord,
        leased: LeasedSubnet,
        in_use: bool,
    ) -> Judgement {
        let LeasedSubnet { subnet, epoch } = leased;
        let Some(owner) = table.owner(subnet) else {
            return if epoch > table.latest {
                Judgement::Pending(format!("the lease table does not show the lease on {subnet} yet"))
            } else {
                Judgement::Refused(format!("no node has a lease on {subnet}"))
            };
        };
        if owner.node == record.node && in_use {
            // The table and the record change at different moments when a node renews with another key;
            // the traffic goes to the same node either way.
            return Judgement::Accepted;
        }
        if epoch > owner.epoch {
            let (seen, here) = (epoch, owner.epoch);
            return Judgement::Pending(format!("{subnet} has epoch {seen}, the lease table still {here}"));
        }
        if owner.node != record.node {
            return Judgement::Conflict { subnet, kept: owner.node.clone() };
        }
        if epoch < owner.epoch {
            let here = owner.epoch;
            return Judgement::Refused(format!("{subnet} has epoch {epoch}, the lease is of epoch {here}"));
        }
        if owner.key != record.key && !record.succeeds(&owner.key) {
            return Judgement::OtherKey(format!(
                "{subnet} is leased with key {}, the record is signed with key {}",
                owner.key.short(),
                record.key.short()
            ));
        }
        Judgement::Accepted
    }
}
