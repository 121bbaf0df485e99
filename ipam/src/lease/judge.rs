//! What each slot makes of the view, and which request follows from it.
//!
//! Why two leases never overlap although a compare-and-swap covers one key only: a claim is written first
//! and becomes a lease only if a list that includes the write shows no other entry that shares an address.
//! Of two overlapping claims the later list sees the other's entry, so at most one becomes a lease.
//!
//! Why a later owner's epoch is higher: a lease's epoch is never below the revision that created it (a
//! claim that guessed too low is raised before it counts), and revisions only grow.

use std::cmp::Ordering;
use std::time::Instant;

use weft_wire::types::{Epoch, PublicKey, Subnet};

use super::machine::{ASK_AGAIN, Asking, Claim, Held, Leasing, Proof, Request, Step};
use super::view::Observed;
use super::{Asked, HeldLease, LeaseConflict, LeaseEvent, LeaseValue, Output};
use crate::carve::Family;
use crate::store::Expect;

/// Whose an entry is.
enum Owner {
    /// Written by this run.
    ThisRun,
    /// Under this node's name and key, by an earlier run or by a clone.
    OtherRun,
    /// Under this node's name with a key that it never had.
    Namesake,
    Other,
}

impl Leasing {
    /// Compares every slot with the view.
    pub(super) fn judge(&mut self, now: Instant) {
        for slot in 0..self.slots.len() {
            self.judge_claim(slot, now);
            if matches!(self.slots[slot].step, Step::Rest) {
                self.judge_held(slot, now);
            }
        }
    }

    /// Returns the most urgent request.
    pub(super) fn next_request(&mut self, now: Instant) -> Option<(Request, Output)> {
        if self.list_now || self.list_at <= now {
            return Some((Request::List, Output::List));
        }
        (0..self.slots.len()).find_map(|slot| self.next_of(slot, now))
    }

    fn judge_claim(&mut self, index: usize, now: Instant) {
        let step = self.slots[index].step;
        let (Step::Claimed(claim) | Step::Raise(claim) | Step::Withdraw(claim)) = step else { return };
        let subnet = claim.lease.subnet;
        let seen = self.view.entries.get(&subnet).filter(|seen| seen.revision == claim.created);
        let value = seen.and_then(|seen| seen.value.as_ref().ok());
        if !value.is_some_and(|value| self.is_claim(value, claim.lease)) {
            // Gone or overwritten: whatever is there now is judged like any other entry.
            self.slots[index].step = Step::Rest;
            return;
        }
        if self.list_now || !matches!(step, Step::Claimed(_)) {
            return; // The view does not include all writes before the claim yet, or that is behind us.
        }
        self.slots[index].step = if self.view.overlapping(subnet).next().is_some() {
            Step::Withdraw(claim)
        } else if claim.lease.epoch.0 < claim.created {
            Step::Raise(claim)
        } else {
            return self.settle(index, claim, now);
        };
    }

    /// Turns a claim into a lease.
    ///
    /// Not if it took so long that others may have seen the entry expire meanwhile: their clocks may be
    /// faster than this one, but not twice as fast. The subnet is then claimed anew, under a later epoch.
    pub(super) fn settle(&mut self, index: usize, claim: Claim, now: Instant) {
        let took = now.saturating_duration_since(claim.asked);
        if self.config.ttl.is_some_and(|ttl| took > ttl / 2) {
            self.list_now = true;
            self.slots[index].step = Step::Rest;
            return;
        }
        let Claim { lease, created, .. } = claim;
        let renew_at = self.next_renewal(now);
        let up_to_date = lease.key == self.config.key && claim.moves == self.moves;
        let renew_at = if up_to_date { renew_at } else { Some(now) };
        let slot = &mut self.slots[index];
        slot.held = Some(Held { lease, proof: Proof::Entry(created), written: true, renewals: 0, renew_at });
        slot.step = Step::Rest;
        slot.fenced = false;
        slot.asking = None;
        slot.told = None;
        self.events.push_back(LeaseEvent::Acquired(lease));
    }

    fn judge_held(&mut self, index: usize, now: Instant) {
        let Some(held) = &self.slots[index].held else { return };
        let (lease, written) = (held.lease, held.written);
        let subnet = lease.subnet;
        let Some(seen) = self.view.entries.get(&subnet) else {
            let other = self.view.overlapping(subnet).next().map(|(_, seen)| seen.value.as_ref().ok());
            match other {
                Some(other) => self.lose(index, other.map(|value| value.node.clone())),
                None => self.prove(index, Proof::Missing),
            }
            return;
        };
        let revision = seen.revision;
        let Ok(value) = &seen.value else {
            // Nobody's as far as this version can tell; keep serving, write nothing.
            return self.prove(index, Proof::Unknown);
        };
        let same_epoch = value.epoch == lease.epoch;
        match self.owner(value, lease.key) {
            Owner::ThisRun if same_epoch => {
                let asked = value.asked.clone();
                self.prove(index, Proof::Entry(revision));
                if let Some(Asked { key, .. }) = asked
                    && self.slots[index].asked < revision
                {
                    // The next write answers: it has no question in it.
                    self.renew(index, now);
                    self.slots[index].asked = revision;
                    self.events.push_back(LeaseEvent::Conflict(LeaseConflict::NameAsked { subnet, key }));
                }
            }
            // A write of ours that we gave up on: claim again over it.
            Owner::ThisRun => self.prove(index, Proof::Missing),
            Owner::OtherRun if !written && same_epoch => {
                self.prove(index, Proof::Entry(revision));
                // Put this run's name on it, and show the observers that the owner lives.
                self.renew(index, now);
            }
            Owner::OtherRun if !written => self.prove(index, Proof::Missing),
            Owner::OtherRun | Owner::Namesake => {
                let (node, key) = (value.node.clone(), value.key);
                self.tell_duplicate(subnet, key);
                self.lose(index, Some(node));
            }
            Owner::Other => {
                let node = value.node.clone();
                self.lose(index, Some(node));
            }
        }
    }

    fn prove(&mut self, index: usize, proof: Proof) {
        if let Some(held) = &mut self.slots[index].held {
            held.proof = proof;
        }
    }

    fn renew(&mut self, index: usize, now: Instant) {
        if let Some(held) = &mut self.slots[index].held {
            held.renew_at = Some(now);
        }
    }

    fn lose(&mut self, index: usize, to: Option<weft_wire::types::NodeName>) {
        let slot = &mut self.slots[index];
        if let Some(held) = slot.held.take() {
            slot.fenced = true;
            self.events.push_back(LeaseEvent::Lost { subnet: held.lease.subnet, to });
        }
    }

    fn next_of(&mut self, index: usize, now: Instant) -> Option<(Request, Output)> {
        match self.slots[index].step {
            Step::Claimed(claim) | Step::Raise(claim) | Step::Withdraw(claim) if self.releasing => {
                return Some(delete(Request::Withdraw(index), claim.lease.subnet, claim.created));
            }
            Step::Claimed(_) => return None,
            Step::Withdraw(claim) => {
                return Some(delete(Request::Withdraw(index), claim.lease.subnet, claim.created));
            }
            Step::Raise(claim) => {
                let lease = HeldLease { epoch: Epoch(claim.created), ..claim.lease };
                let expect = Expect::Revision(claim.created);
                return Some(self.put(Request::Raise(index, lease), lease, 0, expect));
            }
            Step::Rest => {}
        }
        let held = self.slots[index].held.clone();
        match held {
            Some(held) if self.releasing => self.release_held(index, &held),
            Some(held) => self.keep(index, &held, now),
            None if self.releasing => None,
            None => self.seek(index, now),
        }
    }

    fn release_held(&mut self, index: usize, held: &Held) -> Option<(Request, Output)> {
        let subnet = held.lease.subnet;
        match held.proof {
            Proof::Entry(revision) => Some(delete(Request::Release(index), subnet, revision)),
            Proof::Missing => {
                self.slots[index].held = None;
                self.events.push_back(LeaseEvent::Released(subnet));
                None
            }
            Proof::Unknown => None,
        }
    }

    fn keep(&mut self, index: usize, held: &Held, now: Instant) -> Option<(Request, Output)> {
        let lease = held.lease;
        if !self.wanted(self.slots[index].family, lease.subnet) {
            self.tell(index, LeaseEvent::Conflict(LeaseConflict::Outside { subnet: lease.subnet }));
            if self.may_renumber {
                return self.release_held(index, held);
            }
        }
        match held.proof {
            Proof::Unknown => None,
            Proof::Missing => {
                let entry = self.view.entries.get(&lease.subnet).map(|seen| seen.revision);
                Some(self.claim(index, lease.subnet, entry, Some(lease.epoch)))
            }
            Proof::Entry(revision) if held.renew_at.is_some_and(|at| at <= now) => {
                let lease = HeldLease { key: self.config.key, ..lease };
                let request = Request::Renew(index, lease.key);
                Some(self.put(request, lease, held.renewals + 1, Expect::Revision(revision)))
            }
            Proof::Entry(_) => {
                let leftover = self.clear_leftover(self.slots[index].family, lease.subnet);
                leftover.or_else(|| self.clear_former(index, lease.subnet, now))
            }
        }
    }

    /// Deletes what an unanswered write of this run left beside the held lease.
    fn clear_leftover(&self, family: Family, held: Subnet) -> Option<(Request, Output)> {
        let leftover = |(key, seen): (&Subnet, &Observed)| {
            let value = seen.value.as_ref().ok()?;
            let ours = matches!(self.owner(value, self.config.key), Owner::ThisRun);
            (*key != held && Family::of(*key) == family && ours).then_some((*key, seen.revision))
        };
        let (key, revision) = self.view.entries.iter().find_map(leftover)?;
        Some(delete(Request::Clear, key, revision))
    }

    /// Deletes what is left under this node's name from before its state was lost, where nothing else would.
    fn clear_former(&mut self, index: usize, held: Subnet, now: Instant) -> Option<(Request, Output)> {
        let family = self.slots[index].family;
        let (subnet, seen) = self.former(family).find(|(subnet, _)| *subnet != held)?;
        match self.question(index, subnet, &seen, now) {
            Answer::Silent => Some(delete(Request::Clear, subnet, seen.revision)),
            Answer::Ask(request, output) => Some((request, output)),
            Answer::Alive(key) => {
                self.tell_duplicate(subnet, key);
                None
            }
            Answer::Wait => None,
        }
    }

    /// Returns the entries under this node's name that this run did not write, where the name is beyond doubt.
    fn former(&self, family: Family) -> impl Iterator<Item = (Subnet, Observed)> + use<'_> {
        let bound = self.config.ttl.is_none();
        self.view.entries.iter().filter_map(move |(&subnet, seen)| {
            let value = seen.value.as_ref().ok().filter(|_| bound && Family::of(subnet) == family)?;
            let owner = self.owner(value, self.config.key);
            matches!(owner, Owner::OtherRun | Owner::Namesake).then(|| (subnet, seen.clone()))
        })
    }

    /// Asks the owner of an entry under this node's name whether it runs.
    ///
    /// An owner that runs answers by a write (`judge_held`): it watches its entry. One that is silent for long enough
    /// was this node before it lost its state, and the node's credentials say that it is the same node.
    fn question(&mut self, index: usize, subnet: Subnet, seen: &Observed, now: Instant) -> Answer {
        let Ok(value) = &seen.value else { return Answer::Wait };
        let slot = &mut self.slots[index];
        let asked = slot.asking.filter(|asking| asking.subnet == subnet);
        if let Some(asking) = asked {
            if asking.until > now
                && let Some(key) = asking.answer
            {
                return Answer::Alive(key);
            }
            if asking.answer.is_none() {
                match asking.revision.cmp(&seen.revision) {
                    Ordering::Equal if asking.until <= now => return Answer::Silent,
                    // Not answered yet, or the view is older than the question.
                    Ordering::Equal | Ordering::Greater => return Answer::Wait,
                    Ordering::Less => {}
                }
                let key = value.asked.as_ref().map_or(value.key, |other| other.key);
                slot.asking = Some(Asking { until: now + ASK_AGAIN, answer: Some(key), ..asking });
                return Answer::Alive(key);
            }
        }
        let us = Asked { key: self.config.key, boot: self.config.boot.clone() };
        let value = LeaseValue { asked: Some(us), ..value.clone() }.encode();
        let expect = Expect::Revision(seen.revision);
        Answer::Ask(Request::Ask(index), Output::Put { key: subnet, expect, value })
    }

    /// Finds a subnet to claim, or an expired entry to clear first.
    fn seek(&mut self, index: usize, now: Instant) -> Option<(Request, Output)> {
        let slot = &self.slots[index];
        let family = slot.family;
        if slot.fenced && !self.may_renumber || slot.seek_at.is_some_and(|at| at > now) {
            return None;
        }
        let start = slot.start;
        if self.config.only_fixed && self.fixed(family).next().is_none() {
            return None; // Nothing is chosen for the node yet.
        }
        self.slots[index].seek_at = None;
        match self.own_entry(index, now) {
            OwnEntry::Ask(request, output) => return Some((request, output)),
            OwnEntry::Wait => return None,
            OwnEntry::Clear(subnet, revision) => return Some(delete(Request::Clear, subnet, revision)),
            OwnEntry::Adopt(subnet, revision, epoch) => {
                return Some(self.claim(index, subnet, Some(revision), Some(epoch)));
            }
            OwnEntry::Clone(subnet, key) => {
                self.tell_duplicate(subnet, key);
                return None;
            }
            OwnEntry::None => {}
        }
        let fixed: Vec<Subnet> = self.fixed(family).collect();
        if !fixed.is_empty() {
            return self.seek_fixed(index, &fixed);
        }
        let leased = self.view.entries.keys().copied();
        if let Some(block) = self.config.carver.first_free(family, start, leased) {
            return Some(self.claim(index, block, None, None));
        }
        let carver = &self.config.carver;
        let useful = |subnet: Subnet| {
            carver.family(family).any(|cidr| {
                cidr.cidr.contains(&subnet.net().network()) || subnet.net().contains(&cidr.cidr.network())
            })
        };
        let expired = self.view.entries.iter().filter(|(key, seen)| self.expired(seen) && useful(**key));
        if let Some((&key, seen)) = expired.max_by_key(|(_, seen)| seen.quiet()) {
            return Some(delete(Request::Clear, key, seen.revision));
        }
        let cidrs: Vec<_> = carver.family(family).map(|cidr| cidr.cidr).collect();
        if !cidrs.is_empty() {
            let capacity = carver.capacity(family);
            self.tell(index, LeaseEvent::Exhausted { family, cidrs, capacity });
        }
        None
    }

    fn seek_fixed(&mut self, index: usize, fixed: &[Subnet]) -> Option<(Request, Output)> {
        let mut taken = None;
        for &subnet in fixed {
            let same = self.view.entries.get_key_value(&subnet);
            match same.or_else(|| self.view.overlapping(subnet).next()) {
                None => return Some(self.claim(index, subnet, None, None)),
                Some((&key, seen)) if self.expired(seen) => {
                    return Some(delete(Request::Clear, key, seen.revision));
                }
                Some((&key, seen)) => {
                    let owner = seen.value.as_ref().ok().map(|value| value.node.clone());
                    taken = taken.or(owner.map(|owner| (key, owner)));
                }
            }
        }
        if let Some((subnet, owner)) = taken {
            self.tell(index, LeaseEvent::Conflict(LeaseConflict::FixedTaken { subnet, owner }));
        }
        None
    }

    fn fixed(&self, family: Family) -> impl Iterator<Item = Subnet> {
        self.config.fixed.iter().copied().filter(move |subnet| Family::of(*subnet) == family)
    }

    /// Returns whether the node is to have a lease of a family.
    pub(super) fn wants(&self, family: Family) -> bool {
        let chosen = self.fixed(family).next().is_some();
        chosen || (!self.config.only_fixed && self.config.carver.family(family).next().is_some())
    }

    fn wanted(&self, family: Family, subnet: Subnet) -> bool {
        let mut fixed = self.fixed(family).peekable();
        if fixed.peek().is_some() {
            fixed.any(|chosen| chosen == subnet)
        } else if self.config.only_fixed {
            // Nothing was said yet of either family, or of this one no more.
            self.config.fixed.is_empty()
        } else {
            self.config.carver.allows(subnet)
        }
    }

    /// Returns whether another node may take the subnet of an entry.
    pub(super) fn expired(&self, seen: &Observed) -> bool {
        self.config.ttl.is_some() && seen.expired()
    }

    /// Looks for an entry that an earlier run, or an unanswered write of this one, left under our name.
    fn own_entry(&mut self, index: usize, now: Instant) -> OwnEntry {
        match self.entry_of_ours(index) {
            OwnEntry::None => self.former_entry(index, now),
            found => found,
        }
    }

    /// Looks for an entry under this node's name whose key it has lost.
    fn former_entry(&mut self, index: usize, now: Instant) -> OwnEntry {
        let family = self.slots[index].family;
        let established = self.slots[index].established;
        let mut found = None;
        for (subnet, seen) in self.former(family) {
            // Who writes under this node's name after this run has done so runs as well.
            let asked = self.slots[index].asking.is_some_and(|asking| asking.revision == seen.revision);
            if established.is_some_and(|since| seen.revision > since) && !asked {
                let key = seen.value.as_ref().map_or(self.config.key, |value| value.key);
                return OwnEntry::Clone(subnet, key);
            }
            let useful = self.wanted(family, subnet) && self.view.overlapping(subnet).next().is_none();
            if found.as_ref().is_none_or(|(_, _, before)| useful && !before) {
                found = Some((subnet, seen, useful));
            }
        }
        let Some((subnet, seen, useful)) = found else { return OwnEntry::None };
        let epoch = seen.value.as_ref().map_or(Epoch(0), |value| value.epoch);
        match self.question(index, subnet, &seen, now) {
            Answer::Silent if useful => OwnEntry::Adopt(subnet, seen.revision, epoch),
            Answer::Silent => OwnEntry::Clear(subnet, seen.revision),
            Answer::Ask(request, output) => OwnEntry::Ask(request, output),
            Answer::Alive(key) => OwnEntry::Clone(subnet, key),
            Answer::Wait => OwnEntry::Wait,
        }
    }

    fn entry_of_ours(&self, index: usize) -> OwnEntry {
        let (family, established) = (self.slots[index].family, self.slots[index].established);
        let mut found = OwnEntry::None;
        for (&subnet, seen) in self.view.entries.iter().filter(|(key, _)| Family::of(**key) == family) {
            let Ok(value) = &seen.value else { continue };
            let owner = self.owner(value, self.config.key);
            match owner {
                Owner::ThisRun => {}
                Owner::OtherRun if established.is_none_or(|since| seen.revision < since) => {}
                Owner::OtherRun if self.expired(seen) => {}
                Owner::OtherRun => return OwnEntry::Clone(subnet, value.key),
                Owner::Namesake | Owner::Other => continue,
            }
            let alone = self.view.overlapping(subnet).next().is_none();
            if alone && self.wanted(family, subnet) {
                if matches!(found, OwnEntry::None) {
                    found = OwnEntry::Adopt(subnet, seen.revision, value.epoch);
                }
            } else if matches!(owner, Owner::ThisRun) {
                return OwnEntry::Clear(subnet, seen.revision);
            }
        }
        found
    }

    fn owner(&self, value: &LeaseValue, persisted: PublicKey) -> Owner {
        if value.node != self.config.node {
            Owner::Other
        } else if !self.is_own_key(value.key) && value.key != persisted {
            Owner::Namesake
        } else if value.boot == self.config.boot {
            Owner::ThisRun
        } else {
            Owner::OtherRun
        }
    }

    pub(super) fn is_own_key(&self, key: PublicKey) -> bool {
        key == self.config.key || self.config.old_keys.contains(&key)
    }

    /// Asks to write a claim: over our own entry at a revision, or where there is none.
    fn claim(
        &mut self,
        index: usize,
        subnet: Subnet,
        over: Option<u64>,
        after: Option<Epoch>,
    ) -> (Request, Output) {
        // The revision that this write will get if nobody else writes; `after` counts in a store that
        // was emptied, where revisions start again.
        let epoch = Epoch((self.view.revision + 1).max(after.map_or(0, |epoch| epoch.0 + 1)));
        let lease = HeldLease { subnet, epoch, key: self.config.key };
        let expect = over.map_or(Expect::Absent, Expect::Revision);
        self.put(Request::Claim(index, lease), lease, 0, expect)
    }

    fn put(&self, request: Request, lease: HeldLease, renewals: u64, expect: Expect) -> (Request, Output) {
        let value = self.value(lease, renewals).encode();
        (request, Output::Put { key: lease.subnet, expect, value })
    }

    pub(super) fn value(&self, lease: HeldLease, renewals: u64) -> LeaseValue {
        LeaseValue {
            subnet: lease.subnet,
            node: self.config.node.clone(),
            site: self.config.site.clone(),
            key: lease.key,
            epoch: lease.epoch,
            ttl: self.config.ttl,
            renewals,
            boot: self.config.boot.clone(),
            gossip: self.config.gossip.clone(),
            asked: None,
        }
    }

    /// Returns whether an entry is this run's claim, wherever the node has moved since.
    fn is_claim(&self, value: &LeaseValue, lease: HeldLease) -> bool {
        let claim = LeaseValue { gossip: value.gossip.clone(), ..self.value(lease, 0) };
        *value == claim
    }

    fn tell(&mut self, index: usize, event: LeaseEvent) {
        let slot = &mut self.slots[index];
        if slot.told.as_ref() != Some(&event) {
            slot.told = Some(event.clone());
            self.events.push_back(event);
        }
    }

    fn tell_duplicate(&mut self, subnet: Subnet, key: PublicKey) {
        if self.told.insert((subnet, key.to_string())) {
            let conflict = LeaseConflict::DuplicateName { subnet, key };
            self.events.push_back(LeaseEvent::Conflict(conflict));
        }
    }
}

/// What is known of the owner of an entry under this node's name.
enum Answer {
    /// It does not run.
    Silent,
    /// It runs, or another that asks does, under this key.
    Alive(PublicKey),
    /// It was asked, or will be.
    Wait,
    Ask(Request, Output),
}

enum OwnEntry {
    None,
    Ask(Request, Output),
    Wait,
    Adopt(Subnet, u64, Epoch),
    /// Ours, of no use and in the way.
    Clear(Subnet, u64),
    /// A live entry under our name and key that another running daemon writes.
    Clone(Subnet, PublicKey),
}

fn delete(request: Request, key: Subnet, revision: u64) -> (Request, Output) {
    (request, Output::Delete { key, revision })
}
