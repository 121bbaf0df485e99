//! Takes news in: first every update of a datagram is checked, then all are applied.
//!
//! Invariants: checking changes nothing; of two records of one node every node keeps the same, whatever the
//! order in which they came (as long as both are signed by one key or by keys that endorse one another).

use std::net::SocketAddr;
use std::sync::Arc;

use super::api::{Bound, MeshConfig, MeshEvent, Output, Rejected};
use super::gossip::Topic;
use super::membership::{Id, name_hash};
use super::proto::{self, Liveness};
use super::timer::Timer;
use super::{MOST, Mesh};
use crate::record::{ClaimedRecord, NodeRecord, SignedRecord};
use crate::site::{ClaimedStatement, SignedStatement};
use crate::types::{Epoch, NodeName, PublicKey, SiteName};

/// The most accusers that a rumor names.
const MAX_ACCUSERS: usize = 4;
/// So much news from anti-entropy is told on at once; more is left to anti-entropy.
const RETELL: usize = 16;

/// So many unknown records of this node may turn up in ten seconds after a restart with lost state.
const OWN_RECORDS: u32 = 3;

/// An update whose values are in range and whose signature holds.
#[derive(Debug)]
pub(super) enum Checked {
    Record {
        signed: Arc<SignedRecord>,
        liveness: Liveness,
        incarnation: u64,
    },
    Rumor {
        hash: u64,
        liveness: Liveness,
        incarnation: u64,
        accusers: Vec<NodeName>,
    },
    /// A record of this node that it does not remember.
    OwnRecord {
        version: u64,
    },
    Duplicate {
        key: PublicKey,
        address: Option<SocketAddr>,
    },
    Statement(Arc<SignedStatement>),
    RefusedKey,
    /// A node of another site has the name of one that is known.
    TwoSites {
        node: NodeName,
        kept: SiteName,
        other: SiteName,
    },
    /// A new node for which there is no place.
    TooMany(Bound),
    Nothing,
}

impl Mesh {
    pub(super) fn check_update(&self, update: &proto::Update) -> Result<(Checked, bool), Rejected> {
        let liveness = Liveness::try_from(update.liveness).map_err(|_| Rejected::Malformed)?;
        let incarnation = update.incarnation;
        if incarnation >= MOST || update.accusers.len() > MAX_ACCUSERS {
            return Err(Rejected::Malformed);
        }
        if let Some(statement) = &update.statement {
            return self.check_statement(statement);
        }
        let parse = |name: &String| name.parse::<NodeName>().map_err(|_| Rejected::Malformed);
        let accusers = update.accusers.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        let Some(record) = &update.record else {
            let node = parse(&update.node)?;
            return Ok((
                Checked::Rumor { hash: name_hash(node.as_str()), liveness, incarnation, accusers },
                false,
            ));
        };
        let claimed = ClaimedRecord::parse(record.clone()).map_err(|_| Rejected::Malformed)?;
        if claimed.claim().version >= MOST {
            return Err(Rejected::Malformed);
        }
        if claimed.claim().node == self.config.node {
            return self.check_own(claimed, liveness, incarnation);
        }
        let hash = name_hash(claimed.claim().node.as_str());
        match self.table.find_member(hash) {
            Some(member) => {
                let known = &member.signed;
                if claimed.claim().node != known.record().node {
                    return Ok((Checked::RefusedKey, false)); // Two names with one hash: the first one stays.
                }
                match self.compare(known, claimed.claim(), claimed.order()) {
                    Order::Newer => {}
                    Order::Known => {
                        return Ok((Checked::Rumor { hash, liveness, incarnation, accusers }, false));
                    }
                    Order::Foreign => return Ok((self.foreign(known.record(), claimed), false)),
                }
            }
            None => {
                let buried = self.table.tombstones.get(&hash).is_some_and(|tombstone| {
                    claimed.claim().version <= tombstone.version && incarnation <= tombstone.incarnation
                });
                if buried {
                    return Ok((Checked::Nothing, false));
                }
                if let Err(bound) = self.room_for(claimed.claim()) {
                    return Ok((Checked::TooMany(bound), false));
                }
            }
        }
        let MeshConfig { verify, cluster, .. } = &self.config;
        let signed = verify.verify(claimed, cluster).map_err(|_| Rejected::BadSignature)?;
        Ok((Checked::Record { signed, liveness, incarnation }, true))
    }

    fn check_statement(&self, signed: &proto::SignedStatement) -> Result<(Checked, bool), Rejected> {
        let claimed = ClaimedStatement::parse(signed).map_err(|_| Rejected::Malformed)?;
        if !self.sites.wants(claimed.claim(), claimed.order()) {
            return Ok((Checked::Nothing, false));
        }
        let verified = claimed.verify(&self.config.cluster).map_err(|_| Rejected::BadSignature)?;
        Ok((Checked::Statement(Arc::new(verified)), true))
    }

    /// Looks at a record that has this node's name.
    fn check_own(
        &self,
        claimed: ClaimedRecord,
        liveness: Liveness,
        incarnation: u64,
    ) -> Result<(Checked, bool), Rejected> {
        let claim = claimed.claim();
        let (key, version) = (claim.key, claim.version);
        let address = claim.facts.gossip.first().copied();
        let mine = key == self.config.key.public() || self.config.key.follows(&key);
        let known = self.table.me.map(|me| self.table.at(me).signed.order());
        let relevant = if mine {
            // Before the first announcement there is nothing to compare with but the version to come.
            known.map_or(version > self.version, |known| claimed.order() > known && version >= self.version)
        } else {
            !claim.left && liveness == Liveness::Alive && !self.reported_duplicate()
        };
        let rumor = Checked::Rumor { hash: self.hash, liveness, incarnation, accusers: Vec::new() };
        if !relevant {
            return Ok((if mine { rumor } else { Checked::Nothing }, false));
        }
        claimed.verify(&self.config.cluster).map_err(|_| Rejected::BadSignature)?;
        Ok((if mine { Checked::OwnRecord { version } } else { Checked::Duplicate { key, address } }, true))
    }

    /// How a record relates to the one that is known of its node.
    fn compare(&self, known: &SignedRecord, claim: &NodeRecord, order: (u64, u32)) -> Order {
        let held = known.record();
        if claim.key == held.key {
            return if order > known.order() { Order::Newer } else { Order::Known };
        }
        // The endorsement decides, not the version: the earlier key may be in other hands.
        if claim.succeeds(&held.key) {
            return Order::Newer;
        }
        if held.succeeds(&claim.key) {
            return Order::Known;
        }
        let (rank, of_held) = (self.rank(claim), self.rank(held));
        // Of two sites that certify one name the first stays: the doctor names both.
        let outdone = rank > of_held && (rank.0 > of_held.0 || claim.site == held.site);
        if outdone { Order::Newer } else { Order::Foreign }
    }

    /// What a record is whose name another key holds.
    fn foreign(&self, held: &NodeRecord, claimed: ClaimedRecord) -> Checked {
        let claim = claimed.claim();
        let certified = self.is_foreign(claim) && self.certified_epoch(claim).is_some();
        let (node, kept, other) = (claim.node.clone(), held.site.clone(), claim.site.clone());
        let known = certified || (self.sites.judges() && other == self.config.site);
        if kept == other || !known || claimed.verify(&self.config.cluster).is_err() {
            return Checked::RefusedKey;
        }
        Checked::TwoSites { node, kept, other }
    }

    /// Who says that the record's key speaks for its node: the own site's store, another site at an epoch, or nobody.
    fn rank(&self, record: &NodeRecord) -> (u8, Epoch) {
        if self.is_foreign(record) {
            return self.certified_epoch(record).map_or((0, Epoch(0)), |epoch| (1, epoch));
        }
        (if self.routes.is_owner(&record.node, &record.key) { 2 } else { 0 }, Epoch(0))
    }

    pub(super) fn apply(&mut self, checked: Checked, from: SocketAddr, sync: bool) {
        match checked {
            Checked::Record { signed, liveness, incarnation } => {
                self.merge_record(signed, liveness, incarnation, sync);
            }
            Checked::Rumor { hash, liveness, incarnation, accusers } => {
                if let Some(id) = self.table.find(hash)
                    && self.merge_liveness(id, incarnation, liveness, &accusers)
                    && sync
                {
                    self.sync_soon();
                }
            }
            Checked::OwnRecord { version } => {
                // Signed in an earlier life that this one does not remember.
                self.version = self.version.max(version);
                if self.has_twin() {
                    let key = self.config.key.public();
                    self.apply(Checked::Duplicate { key, address: None }, from, sync);
                } else {
                    self.resign();
                }
            }
            Checked::Duplicate { key, address } => {
                if self.reported_duplicate() {
                    return;
                }
                self.last_duplicate = Some(self.now);
                let from = address.unwrap_or(from);
                self.outputs.push_back(Output::Event(MeshEvent::DuplicateName { from, key }));
            }
            Checked::Statement(signed) => {
                self.merge_statement(signed);
            }
            Checked::RefusedKey => self.counters.refused_keys += 1,
            Checked::TwoSites { node, kept, other } => {
                self.counters.refused_keys += 1;
                if self.last_two_sites.is_none_or(|last| self.now >= last + super::REPORT_INTERVAL) {
                    self.last_two_sites = Some(self.now);
                    self.outputs.push_back(Output::Event(MeshEvent::TwoSites { node, kept, other }));
                }
            }
            Checked::TooMany(bound) => self.refuse_newcomer(bound),
            Checked::Nothing => {}
        }
    }

    /// Whether records under this node's own key keep coming: a clone of the machine signs them, and
    /// bumping above each other would never end.
    fn has_twin(&mut self) -> bool {
        let (since, count) = self.own_records;
        let recent = self.now < since + super::REPORT_INTERVAL;
        self.own_records = if recent { (since, count + 1) } else { (self.now, 1) };
        recent && count >= OWN_RECORDS
    }

    fn reported_duplicate(&self) -> bool {
        self.last_duplicate.is_some_and(|last| self.now < last + super::REPORT_INTERVAL)
    }

    fn merge_record(&mut self, signed: Arc<SignedRecord>, liveness: Liveness, incarnation: u64, sync: bool) {
        let hash = name_hash(signed.record().node.as_str());
        let id = match self.table.find(hash) {
            Some(id) => {
                // An earlier update of the same datagram may have brought a newer one.
                let order = signed.order();
                if self.compare(&self.table.at(id).signed, signed.record(), order) != Order::Newer {
                    return;
                }
                self.replace_record(id, signed);
                self.merge_liveness(id, incarnation, liveness, &[]);
                id
            }
            None => {
                // The same datagram may have brought others.
                if let Err(bound) = self.room_for(signed.record()) {
                    return self.refuse_newcomer(bound);
                }
                let id = self.table.insert(signed, incarnation, false);
                self.routes_dirty = true;
                if self.table.at(id).signed.record().left {
                    self.begin_absence(id);
                }
                if liveness == Liveness::Alive
                    || liveness == Liveness::Forgotten
                    || !self.merge_liveness(id, incarnation, liveness, &[])
                {
                    self.on_member_changed(id);
                }
                id
            }
        };
        self.judge(id, true);
        if sync {
            self.sync_soon();
        }
        if !sync || self.queue.len() < RETELL {
            self.queue.push(Topic::Record(hash));
        }
    }

    /// Puts a newer record of a member, or of this node, in its place.
    pub(super) fn replace_record(&mut self, id: Id, signed: Arc<SignedRecord>) {
        let before = self.table.at(id).state();
        self.withdraw(id);
        self.table.edit(id, |member| {
            member.signed = signed;
            member.certified = None;
        });
        let member = self.table.at(id);
        if self.table.me != Some(id) && member.state() != before {
            self.routes_dirty = true;
            if member.signed.record().left {
                self.begin_absence(id);
            } else if member.liveness != Liveness::Dead {
                self.table.at_mut(id).gone_since = None;
            }
            self.on_member_changed(id);
        }
    }

    /// Merges what was heard about a member's liveness; returns whether that was news.
    pub(super) fn merge_liveness(
        &mut self,
        id: Id,
        incarnation: u64,
        liveness: Liveness,
        accusers: &[NodeName],
    ) -> bool {
        if self.table.me == Some(id) {
            return self.hear_of_self(incarnation, liveness);
        }
        let member = self.table.at(id);
        let (hash, before) = (member.hash, member.state());
        if liveness == Liveness::Forgotten {
            if member.gone_since.is_some() && incarnation >= member.incarnation {
                self.bury(id);
                self.queue.push(Topic::Forgotten(hash));
                return true;
            }
            return false;
        }
        let known = (member.incarnation, member.liveness);
        if (incarnation, liveness) == known && liveness == Liveness::Suspect {
            return self.confirm(id, accusers);
        }
        if (incarnation, liveness) <= known {
            return false;
        }
        self.table.edit(id, |member| {
            member.incarnation = incarnation;
            member.liveness = liveness;
            member.suspicion = None;
        });
        match liveness {
            Liveness::Suspect => self.begin_suspicion(id, accusers),
            Liveness::Dead => self.begin_absence(id),
            Liveness::Alive | Liveness::Forgotten => {
                if !self.table.at(id).signed.record().left {
                    self.table.at_mut(id).gone_since = None;
                }
            }
        }
        self.queue.push(Topic::Liveness(hash));
        self.hurry_if_gateway(id);
        if self.table.at(id).state() != before {
            self.routes_dirty = true;
            self.on_member_changed(id);
        }
        true
    }

    fn hear_of_self(&mut self, incarnation: u64, liveness: Liveness) -> bool {
        let objects = liveness != Liveness::Alive && incarnation >= self.incarnation && !self.leaving;
        if objects {
            self.incarnation = incarnation + 1;
            self.counters.refutations += 1;
            // Being suspected is a hint that this node is slow itself (Lifeguard s4.1).
            self.worsen_health(1);
        } else if incarnation > self.incarnation {
            self.incarnation = incarnation;
        } else {
            return false;
        }
        if let Some(me) = self.table.me {
            let incarnation = self.incarnation;
            self.table.edit(me, |member| member.incarnation = incarnation);
            self.queue.push(Topic::Record(self.hash));
            self.hurry_if_gateway(me);
        }
        true
    }

    fn begin_absence(&mut self, id: Id) {
        let now = self.now;
        let member = self.table.at_mut(id);
        member.gone_since = Some(now);
        let hash = member.hash;
        self.timers.set(now + self.config.timing.reap, Timer::Reap(hash));
    }

    pub(super) fn on_reap_timer(&mut self, hash: u64) {
        let reap = self.config.timing.reap;
        if let Some(id) = self.table.find(hash) {
            if self.table.at(id).gone_since.is_some_and(|since| since + reap <= self.now) {
                self.bury(id);
            }
        } else if self.table.tombstones.get(&hash).is_some_and(|stone| stone.since + reap * 10 <= self.now) {
            self.table.tombstones.remove(&hash);
        }
    }

    /// Drops a member and leaves a tombstone.
    pub(super) fn bury(&mut self, id: Id) {
        self.withdraw(id);
        let hash = self.table.at(id).hash;
        self.routes_dirty |= self.table.at(id).routed.is_some();
        self.routes.forget(hash);
        self.table.remove(id, self.now);
        self.queue.drop(Topic::Record(hash));
        self.queue.drop(Topic::Liveness(hash));
        self.timers.set(self.now + self.config.timing.reap * 10, Timer::Reap(hash));
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Order {
    Newer,
    /// The same, or an older one.
    Known,
    /// Signed by a key that has nothing to do with the known one.
    Foreign,
}
