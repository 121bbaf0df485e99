//! The table of members: one slot a node, found by name, sampled at random, summed up for anti-entropy.
//!
//! It decides nothing about routes and sends nothing. Invariants: the sums, the lists and the index agree
//! with the slots after every call; liveness only grows in the order (incarnation, alive < suspect < dead),
//! so merging is commutative and idempotent.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Instant;

use blake2::{Blake2s256, Digest};
use rand_chacha::ChaCha8Rng;
use rand_core::RngCore;

use super::api::{MemberState, MemberView, Verdict};
use super::contact::Contact;
use super::proto::Liveness;
use super::quota::{Account, Quotas};
use super::sync::{Item, Sums};
use crate::record::{Reach, SignedRecord};
use crate::types::{NodeName, PublicKey};

/// The most members that a table holds.
pub(super) const MAX_MEMBERS: usize = 1 << 16;
/// The most senders without a record that are remembered, and the most tombstones.
const MAX_STRANGERS: usize = 4096;

pub(super) type Id = u32;
const NOWHERE: u32 = u32::MAX;

#[derive(Debug)]
pub(super) struct Member {
    pub(super) signed: Arc<SignedRecord>,
    /// The record whose routes are in use: the present one, or an earlier one while that is pending.
    pub(super) routed: Option<Arc<SignedRecord>>,
    pub(super) hash: u64,
    pub(super) liveness: Liveness,
    pub(super) incarnation: u64,
    pub(super) verdict: Verdict,
    /// A store or a site once vouched for subnets of it: it is not made up by who has a cluster key, even while its lease is on
    /// the way. With whom it counts now is its account.
    pub(super) once_vouched: bool,
    /// Whether the record's certificate was found to hold, and under which site key.
    pub(super) certified: Option<(PublicKey, bool)>,
    /// With whom it counts; nobody before it was judged.
    account: Option<Account>,
    pub(super) contact: Option<Box<Contact>>,
    pub(super) suspicion: Option<Box<Suspicion>>,
    /// Since when it is dead or gone.
    pub(super) gone_since: Option<Instant>,
    place: u32,
}

#[derive(Debug)]
pub(super) struct Suspicion {
    pub(super) accusers: Vec<NodeName>,
    pub(super) since: Instant,
    pub(super) until: Instant,
    /// When it is told again, if nobody else shares it.
    pub(super) again: Instant,
}

impl Member {
    pub(super) fn name(&self) -> &NodeName {
        &self.signed.record().node
    }

    /// Whether the own store or its site vouches for it, or that was not asked.
    pub(super) fn is_vouched(&self) -> bool {
        self.account != Some(Account::Uncertified)
    }

    pub(super) fn state(&self) -> MemberState {
        match self.liveness {
            _ if self.signed.record().left => MemberState::Left,
            Liveness::Alive => MemberState::Alive,
            Liveness::Suspect => MemberState::Suspect,
            Liveness::Dead | Liveness::Forgotten => MemberState::Dead,
        }
    }

    pub(super) fn view(&self) -> MemberView<'_> {
        let record = self.signed.record();
        let contact = self.contact.as_deref();
        MemberView {
            node: &record.node,
            site: &record.site,
            state: self.state(),
            record,
            routed: self.routed.as_deref().map(SignedRecord::record),
            rtt: contact.and_then(|contact| contact.rtt),
            loss: contact.map_or(0.0, |contact| contact.loss),
            last_seen: contact.map(|contact| contact.last_seen),
            verdict: &self.verdict,
            vouched: self.is_vouched(),
        }
    }

    pub(super) fn item(&self) -> Item {
        let (version, tag) = self.signed.order();
        Item {
            hash: self.hash,
            version,
            tag,
            incarnation: self.incarnation,
            dead: self.liveness == Liveness::Dead,
        }
    }
}

/// What is left of a member that was dropped, so that others do not bring it back.
#[derive(Debug, Clone)]
pub(super) struct Tombstone {
    pub(super) node: NodeName,
    pub(super) version: u64,
    pub(super) incarnation: u64,
    pub(super) since: Instant,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    slots: Vec<Option<Member>>,
    free: Vec<Id>,
    index: BTreeMap<u64, Id>,
    living: Vec<Id>,
    /// The living that nobody vouches for.
    doubtful: Vec<Id>,
    /// Those of the dead that somebody vouches for: the others are not looked for.
    dead: Vec<Id>,
    /// The name hashes of those of the living that say that they are open.
    open: BTreeSet<u64>,
    /// The name hashes of those of the living that are gateways of their sites.
    gateways: BTreeSet<u64>,
    /// How far the present round of probes has come in `living`.
    cursor: usize,
    pub(super) sums: Sums,
    pub(super) tombstones: BTreeMap<u64, Tombstone>,
    strangers: BTreeMap<u64, Contact>,
    pub(super) me: Option<Id>,
    quotas: Quotas,
}

/// Hashes a node's name: its key in the table and its place in the anti-entropy tree.
pub(super) fn name_hash(node: &str) -> u64 {
    let hash = Blake2s256::new().chain_update(b"weft name v1\0").chain_update(node).finalize();
    u64::from_be_bytes(hash[..8].try_into().expect("a hash has 32 bytes"))
}

/// Picks a number below `limit`, which is not 0; the bias is below 2^-32.
pub(super) fn below(rng: &mut ChaCha8Rng, limit: usize) -> usize {
    ((u128::from(rng.next_u64()) * limit as u128) >> 64) as usize
}

impl Table {
    pub(super) fn insert(&mut self, signed: Arc<SignedRecord>, incarnation: u64, is_self: bool) -> Id {
        let hash = name_hash(signed.record().node.as_str());
        self.tombstones.remove(&hash);
        let member = Member {
            signed,
            routed: None,
            hash,
            liveness: Liveness::Alive,
            incarnation,
            verdict: Verdict::Pending { why: "not judged yet".into() },
            once_vouched: false,
            certified: None,
            account: None,
            contact: self.strangers.remove(&hash).map(Box::new),
            suspicion: None,
            gone_since: None,
            place: NOWHERE,
        };
        let id = self.free.pop().unwrap_or(self.slots.len() as Id);
        self.sums.toggle(&member.item(), true);
        match self.slots.get_mut(id as usize) {
            Some(slot) => *slot = Some(member),
            None => self.slots.push(Some(member)),
        }
        self.index.insert(hash, id);
        if is_self {
            self.me = Some(id);
        }
        self.enlist(id);
        id
    }

    pub(super) fn remove(&mut self, id: Id, now: Instant) {
        self.delist(id);
        let Some(member) = self.slots.get_mut(id as usize).and_then(Option::take) else { return };
        self.sums.toggle(&member.item(), false);
        self.index.remove(&member.hash);
        member.account.iter().for_each(|account| self.quotas.leave(account));
        self.free.push(id);
        if self.tombstones.len() >= MAX_STRANGERS {
            self.tombstones.pop_first();
        }
        let (node, version) = (member.name().clone(), member.signed.record().version);
        let tombstone = Tombstone { node, version, incarnation: member.incarnation, since: now };
        self.tombstones.insert(member.hash, tombstone);
    }

    /// Changes what is summed up or listed: the record or the liveness.
    pub(super) fn edit(&mut self, id: Id, change: impl FnOnce(&mut Member)) {
        self.delist(id);
        if let Some(Some(member)) = self.slots.get_mut(id as usize) {
            self.sums.toggle(&member.item(), false);
            change(member);
            self.sums.toggle(&member.item(), true);
        }
        self.enlist(id);
    }

    pub(super) fn quotas(&self) -> &Quotas {
        &self.quotas
    }

    /// Has a member count with this account; one that counts with another stays there where this one has no room.
    pub(super) fn recount(&mut self, id: Id, account: Account) {
        let counts = self.at(id).account.as_ref();
        if counts == Some(&account) || (counts.is_some() && !self.quotas.has_room(&account)) {
            return;
        }
        self.delist(id);
        self.quotas.enter(&account);
        if let Some(former) = self.at_mut(id).account.replace(account) {
            self.quotas.leave(&former);
        }
        self.enlist(id);
    }

    pub(super) fn find(&self, hash: u64) -> Option<Id> {
        self.index.get(&hash).copied()
    }

    pub(super) fn find_name(&self, node: &NodeName) -> Option<Id> {
        self.find(name_hash(node.as_str()))
    }

    pub(super) fn at(&self, id: Id) -> &Member {
        self.slots[id as usize].as_ref().expect("ids of removed members are not kept")
    }

    /// For what is neither summed up nor listed.
    pub(super) fn at_mut(&mut self, id: Id) -> &mut Member {
        self.slots[id as usize].as_mut().expect("ids of removed members are not kept")
    }

    pub(super) fn find_member(&self, hash: u64) -> Option<&Member> {
        self.find(hash).map(|id| self.at(id))
    }

    pub(super) fn contact(&self, hash: u64) -> Option<&Contact> {
        match self.find_member(hash) {
            Some(member) => member.contact.as_deref(),
            None => self.strangers.get(&hash),
        }
    }

    pub(super) fn contact_mut(&mut self, hash: u64) -> Option<&mut Contact> {
        match self.find(hash) {
            Some(id) => self.at_mut(id).contact.as_deref_mut(),
            None => self.strangers.get_mut(&hash),
        }
    }

    pub(super) fn set_contact(&mut self, hash: u64, contact: Contact) {
        match self.find(hash) {
            Some(id) => self.at_mut(id).contact = Some(Box::new(contact)),
            None => {
                if self.strangers.len() >= MAX_STRANGERS {
                    self.strangers.pop_first();
                }
                self.strangers.insert(hash, contact);
            }
        }
    }

    /// All members, the node itself too, by name hash.
    pub(super) fn range(
        &self,
        range: impl std::ops::RangeBounds<u64>,
    ) -> impl DoubleEndedIterator<Item = (Id, &Member)> {
        self.index.range(range).map(|(_, id)| (*id, self.at(*id)))
    }

    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    /// How many others are alive or suspect.
    pub(super) fn living(&self) -> usize {
        self.living.len() + self.doubtful.len()
    }

    /// Whether it is the turn of those that nobody vouches for: they have turns by their number, and half of them at most.
    fn is_turn_of_doubtful(&self, rng: &mut ChaCha8Rng) -> bool {
        let doubtful = self.doubtful.len().min(self.living.len().max(1));
        doubtful > 0 && below(rng, self.living.len() + doubtful) < doubtful
    }

    /// The next member to probe: every living one once a round, each round in another order; in between those that nobody vouches for.
    pub(super) fn next_to_probe(&mut self, rng: &mut ChaCha8Rng) -> Option<Id> {
        if self.is_turn_of_doubtful(rng) {
            return Some(self.doubtful[below(rng, self.doubtful.len())]);
        }
        if self.living.is_empty() {
            return None;
        }
        if self.cursor >= self.living.len() {
            self.cursor = 0;
        }
        // One step of Fisher and Yates's shuffle at a time.
        let pick = self.cursor + below(rng, self.living.len() - self.cursor);
        self.living.swap(self.cursor, pick);
        self.mark(Class::Living, self.cursor);
        self.mark(Class::Living, pick);
        self.cursor += 1;
        Some(self.living[self.cursor - 1])
    }

    /// Up to `count` different living members, those that nobody vouches for among them.
    pub(super) fn sample(&self, rng: &mut ChaCha8Rng, count: usize) -> Vec<Id> {
        if self.doubtful.is_empty() {
            return self.sample_vouched(rng, count, None);
        }
        let doubtful = (0..count).filter(|_| self.is_turn_of_doubtful(rng)).count();
        let mut picked = self.sample_vouched(rng, count - doubtful, None);
        for _ in 0..doubtful {
            let id = self.doubtful[below(rng, self.doubtful.len())];
            if !picked.contains(&id) {
                picked.push(id);
            }
        }
        picked
    }

    /// Up to `count` different living members that somebody vouches for, without `except`.
    pub(super) fn sample_vouched(&self, rng: &mut ChaCha8Rng, count: usize, except: Option<Id>) -> Vec<Id> {
        let mut picked = Vec::with_capacity(count);
        if self.living.len() <= count * 2 {
            picked.extend(self.living.iter().copied().filter(|id| Some(*id) != except));
            while picked.len() > count {
                picked.swap_remove(below(rng, picked.len()));
            }
            return picked;
        }
        for _ in 0..count * 4 {
            let id = self.living[below(rng, self.living.len())];
            if Some(id) != except && !picked.contains(&id) {
                picked.push(id);
                if picked.len() == count {
                    break;
                }
            }
        }
        picked
    }

    /// Up to `count` living members that say that they are open, from anywhere.
    pub(super) fn sample_open(&self, rng: &mut ChaCha8Rng, count: usize) -> Vec<Id> {
        let start = rng.next_u64();
        let around = self.open.range(start..).chain(self.open.range(..start));
        around.take(count).filter_map(|hash| self.find(*hash)).collect()
    }

    /// The name hashes of living gateways, from the one after `hash` around.
    pub(super) fn gateways_after(&self, hash: u64) -> impl Iterator<Item = u64> {
        let after = (Bound::Excluded(hash), Bound::Unbounded);
        self.gateways.range(after).chain(self.gateways.range(..hash)).copied()
    }

    pub(super) fn random_dead(&self, rng: &mut ChaCha8Rng) -> Option<Id> {
        if self.dead.is_empty() { None } else { Some(self.dead[below(rng, self.dead.len())]) }
    }

    fn class(&self, id: Id) -> Option<Class> {
        if self.me == Some(id) {
            return None;
        }
        match self.at(id).state() {
            MemberState::Alive | MemberState::Suspect if self.at(id).is_vouched() => Some(Class::Living),
            MemberState::Alive | MemberState::Suspect => Some(Class::Doubtful),
            MemberState::Dead if self.at(id).is_vouched() => Some(Class::Dead),
            MemberState::Dead | MemberState::Left => None,
        }
    }

    fn list(&mut self, class: Class) -> &mut Vec<Id> {
        match class {
            Class::Living => &mut self.living,
            Class::Doubtful => &mut self.doubtful,
            Class::Dead => &mut self.dead,
        }
    }

    fn enlist(&mut self, id: Id) {
        let Some(class) = self.class(id) else { return };
        let member = self.at(id);
        if matches!(class, Class::Living) {
            let (hash, facts) = (member.hash, &member.signed.record().facts);
            let (is_open, is_gateway) = (facts.reachability.reach == Reach::Open, facts.gateway.is_some());
            self.open.extend(is_open.then_some(hash));
            self.gateways.extend(is_gateway.then_some(hash));
        }
        let list = self.list(class);
        list.push(id);
        let place = list.len() - 1;
        self.mark(class, place);
    }

    fn delist(&mut self, id: Id) {
        let Some(class) = self.class(id) else { return };
        let hash = self.at(id).hash;
        self.open.remove(&hash);
        self.gateways.remove(&hash);
        let place = self.at(id).place as usize;
        let list = self.list(class);
        list.swap_remove(place);
        if place < list.len() {
            self.mark(class, place);
        }
        self.at_mut(id).place = NOWHERE;
    }

    fn mark(&mut self, class: Class, place: usize) {
        let id = self.list(class)[place];
        self.at_mut(id).place = place as u32;
    }
}

#[derive(Debug, Clone, Copy)]
enum Class {
    Living,
    Doubtful,
    Dead,
}
