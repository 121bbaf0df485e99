//! The machine itself: one slot a family, one store request at a time.
//!
//! It is level-triggered: every answer updates the view, `judge` compares each slot with the view, and
//! `next_request` derives what to ask for from the result (both in `judge.rs`). A request whose outcome is unknown therefore
//! needs no memory: the next list shows what became of it.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use weft_wire::types::{PublicKey, Subnet};

use super::value::MOST_EPOCH;
use super::view::{Absorbed, View};
use super::{HeldLease, LeaseConfig, LeaseConflict, LeaseEvent, LeaseView, Output};
use crate::carve::{Family, start_of};
use crate::store::{Change, Entry, Key, Snapshot};

/// A change of the store is followed by a list not sooner than this after the list before.
const RELIST_GAP: Duration = Duration::from_millis(500);
/// The first and the longest wait after a failed request; in between it doubles.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// How long the owner of an entry under this node's name may take to answer whether it runs. Its watch, if broken by
/// the API server's restart, is back within half of it.
pub(super) const ANSWER: Duration = Duration::from_secs(20);
/// An owner that answered is asked again not sooner than this.
pub(super) const ASK_AGAIN: Duration = Duration::from_secs(600);
/// The longest wait after two nodes withdrew overlapping claims.
const WITHDRAW_PAUSE: Duration = Duration::from_secs(2);

/// What ties a held lease to the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Proof {
    /// The store has not been asked in this run.
    Unknown,
    /// The store's entry at this revision.
    Entry(u64),
    /// The store has no entry for it (or an unfinished one of ours): claim it again.
    Missing,
}

#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) lease: HeldLease,
    pub(super) proof: Proof,
    /// The entry is one that this run wrote.
    pub(super) written: bool,
    pub(super) renewals: u64,
    /// `None` if nothing has to be written.
    pub(super) renew_at: Option<Instant>,
}

/// An entry that this run wrote and that is not a lease yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Claim {
    pub(super) lease: HeldLease,
    pub(super) created: u64,
    /// When the write was asked for: others count from then at the earliest.
    pub(super) asked: Instant,
    /// How often the node had moved by then.
    pub(super) moves: u64,
}

/// The one request that waits for its answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct InFlight {
    request: Request,
    /// What it writes or deletes.
    key: Option<Key>,
    asked: Instant,
    moves: u64,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    /// No claim is open.
    Rest,
    /// Written; the next list decides.
    Claimed(Claim),
    /// Alone in the store, but the epoch must be raised to the revision that created it.
    Raise(Claim),
    /// Overlaps another claim or lease: to be deleted.
    Withdraw(Claim),
}

/// A question to the owner of an entry under this node's name, whose key this node does not have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asking {
    pub(super) subnet: Subnet,
    /// The revision of the question.
    pub(super) revision: u64,
    /// The owner has answered by then, or does not run; one that answered is asked again then.
    pub(super) until: Instant,
    /// Who answered.
    pub(super) answer: Option<PublicKey>,
}

#[derive(Debug)]
pub(super) struct Slot {
    pub(super) family: Family,
    pub(super) held: Option<Held>,
    pub(super) step: Step,
    /// A lease was lost in this run and none acquired since.
    pub(super) fenced: bool,
    /// The revision of this run's first write: an entry under our name and key but of another run that
    /// was written later is a clone's.
    pub(super) established: Option<u64>,
    /// Where the search for a block starts.
    pub(super) start: u64,
    pub(super) seek_at: Option<Instant>,
    pub(super) asking: Option<Asking>,
    /// The revision at which another daemon last asked whether this one runs.
    pub(super) asked: u64,
    /// What was last told about not having a lease, so that it is told once.
    pub(super) told: Option<LeaseEvent>,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Request {
    List,
    Claim(usize, HeldLease),
    Raise(usize, HeldLease),
    Renew(usize, PublicKey),
    Withdraw(usize),
    Release(usize),
    /// Asks the owner of an entry under this node's name whether it runs.
    Ask(usize),
    /// Deletes an expired entry, or one of ours that no slot holds.
    Clear,
}

/// The lease state machine of one node.
pub struct Leasing {
    pub(super) config: LeaseConfig,
    pub(super) rng: ChaCha8Rng,
    pub(super) view: View,
    pub(super) slots: [Slot; 2],
    pub(super) in_flight: Option<InFlight>,
    pub(super) events: VecDeque<LeaseEvent>,
    pub(super) list_now: bool,
    pub(super) list_at: Instant,
    /// When a list was last asked for.
    pub(super) asked_at: Option<Instant>,
    pub(super) retry_at: Option<Instant>,
    pub(super) failures: u32,
    /// How many writes in a row failed, whatever lists did in between.
    pub(super) refused: u32,
    pub(super) may_renumber: bool,
    pub(super) releasing: bool,
    pub(super) told: BTreeSet<(Subnet, String)>,
    /// How often the node's gossip addresses changed: what was written before names the former ones.
    pub(super) moves: u64,
}

impl fmt::Debug for Leasing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leasing")
            .field("node", &self.config.node)
            .field("slots", &self.slots)
            .field("in_flight", &self.in_flight)
            .field("revision", &self.view.revision)
            .finish_non_exhaustive()
    }
}

impl Leasing {
    /// Starts from what an earlier run persisted; those leases are held at once, without the store.
    ///
    /// A node that persisted leases may not renumber until `set_may_renumber` says that no pod lives.
    pub fn new(config: LeaseConfig, persisted: Vec<HeldLease>, seed: [u8; 32], now: Instant) -> Self {
        let slot = |family| {
            let sane = |lease: &HeldLease| lease.epoch.0 < MOST_EPOCH && Family::of(lease.subnet) == family;
            let lease = persisted.iter().copied().find(sane);
            let held = lease.map(|lease| Held {
                lease,
                proof: Proof::Unknown,
                written: false,
                renewals: 0,
                renew_at: Some(now),
            });
            let start = start_of(&config.node);
            Slot {
                family,
                held,
                step: Step::Rest,
                fenced: false,
                established: None,
                start,
                seek_at: None,
                asking: None,
                asked: 0,
                told: None,
            }
        };
        let slots = Family::ALL.map(slot);
        let newest = slots.iter().filter_map(|slot| Some(slot.held.as_ref()?.lease.epoch.0)).max();
        Self {
            slots,
            rng: ChaCha8Rng::from_seed(seed),
            view: View::since(newest.unwrap_or(0)),
            in_flight: None,
            events: VecDeque::new(),
            list_now: true,
            list_at: now,
            asked_at: None,
            retry_at: None,
            failures: 0,
            refused: 0,
            may_renumber: persisted.is_empty(),
            releasing: false,
            told: BTreeSet::new(),
            moves: 0,
            config,
        }
    }

    /// Takes the answer to `List`.
    pub fn handle_snapshot(&mut self, snapshot: &Snapshot, now: Instant) {
        if self.in_flight.take_if(|sent| matches!(sent.request, Request::List)).is_none() {
            return;
        }
        let absorbed = self.view.absorb(snapshot, now, self.most_gap());
        if absorbed == Absorbed::Replaced {
            // An entry of an earlier run of this node is then no sign of a second one that runs.
            for slot in &mut self.slots {
                slot.established = None;
                (slot.asking, slot.asked) = (None, 0);
                slot.held.iter_mut().for_each(|held| held.written = false);
            }
        }
        match absorbed {
            Absorbed::Fresh | Absorbed::Replaced => {
                self.answered();
                self.list_now = false;
                self.list_at = now + self.config.list_every;
                self.tell_unreadable();
                self.judge(now);
            }
            Absorbed::Stale => self.back_off(now),
        }
    }

    /// Takes the answer to `Put`: the new revision, or what the store holds instead.
    pub fn handle_put(&mut self, key: Key, result: Result<u64, Option<Entry>>, now: Instant) {
        let Some(InFlight { request, asked, moves, .. }) = self.take_request(key) else { return };
        self.refused = 0;
        let revision = match result {
            Ok(revision) => revision,
            Err(current) => return self.conflict(key, current.as_ref(), now),
        };
        self.answered();
        match request {
            Request::Claim(slot, lease) => {
                self.wrote(lease, 0, revision);
                self.slots[slot].established.get_or_insert(revision);
                self.slots[slot].step = Step::Claimed(Claim { lease, created: revision, asked, moves });
                // Acquired only when a list that includes this write shows nothing that overlaps.
                self.list_now = true;
            }
            Request::Raise(slot, lease) => {
                self.wrote(lease, 0, revision);
                self.settle(slot, Claim { lease, created: revision, asked, moves }, now);
            }
            Request::Renew(slot, key) => {
                let renew_at = self.next_renewal(now);
                let up_to_date = key == self.config.key && moves == self.moves;
                self.slots[slot].established.get_or_insert(revision);
                let Some(held) = &mut self.slots[slot].held else { return };
                held.lease.key = key;
                held.proof = Proof::Entry(revision);
                held.written = true;
                held.renewals += 1;
                held.renew_at = if up_to_date { renew_at } else { Some(now) };
                let (lease, renewals) = (held.lease, held.renewals);
                self.wrote(lease, renewals, revision);
                self.events.push_back(LeaseEvent::Renewed(lease));
            }
            Request::Ask(slot) => {
                self.slots[slot].asking =
                    Some(Asking { subnet: key, revision, until: now + ANSWER, answer: None });
                // What was asked is read from the store: this run knows only that it asked.
                self.list_now = true;
            }
            Request::List | Request::Withdraw(_) | Request::Release(_) | Request::Clear => {}
        }
    }

    /// Takes the answer to `Delete`: the revision of the deletion, or what the store holds instead.
    pub fn handle_delete(&mut self, key: Key, result: Result<u64, Option<Entry>>, now: Instant) {
        let Some(InFlight { request, .. }) = self.take_request(key) else { return };
        self.refused = 0;
        let revision = match result {
            Ok(revision) => revision,
            Err(current) => return self.conflict(key, current.as_ref(), now),
        };
        self.answered();
        self.view.set(key, None);
        self.view.revision = self.view.revision.max(revision);
        match request {
            Request::Withdraw(slot) => {
                // Both of two overlapping claims may have withdrawn: look elsewhere, not at the same time.
                let pause = WITHDRAW_PAUSE.mul_f64(self.fraction());
                let start = self.rng.next_u64();
                let slot = &mut self.slots[slot];
                slot.step = Step::Rest;
                slot.start = start;
                slot.seek_at = Some(now + pause);
                self.list_now = true;
            }
            Request::Release(slot) => {
                let slot = &mut self.slots[slot];
                if slot.held.take_if(|held| held.lease.subnet == key).is_some() {
                    self.events.push_back(LeaseEvent::Released(key));
                }
            }
            _ => {}
        }
    }

    /// Takes the failure of the outstanding request: nothing held is given up.
    pub fn handle_store_error(&mut self, now: Instant) {
        let Some(sent) = self.in_flight.take() else { return };
        if sent.key.is_some() {
            // Lists in between may succeed, where a disk is full: they do not make the next write sooner.
            self.failures = self.failures.max(self.refused);
            self.refused = self.refused.saturating_add(1);
            // Who can renew where this node cannot write?
            self.view.count_anew();
        }
        // The write may have happened: list before the next one. An open claim may be gone by then.
        self.back_off(now);
    }

    /// Takes what the store's watch said.
    pub fn handle_change(&mut self, change: &Change, now: Instant) {
        match change {
            Change::Put { key, entry } if self.view.seen_at.is_some() => {
                if self.view.entries.get(key).is_none_or(|seen| seen.revision < entry.revision) {
                    self.view.set(*key, Some(entry));
                    self.judge(now);
                }
            }
            Change::Delete { key, revision } if self.view.seen_at.is_some() => {
                if self.view.entries.get(key).is_some_and(|seen| seen.revision < *revision) {
                    self.view.set(*key, None);
                    self.view.revision = self.view.revision.max(*revision);
                    self.judge(now);
                }
            }
            _ => {
                // A sign of life: after failures, try at once. A store that flaps is not asked in a row.
                let soonest = self.asked_at.map_or(now, |asked| asked + RELIST_GAP).max(now);
                self.list_at = self.list_at.min(soonest);
                self.retry_at = self.retry_at.map(|at| at.min(soonest));
            }
        }
    }

    /// Does what is due. Everything is decided in `poll_output`, so only the drain after it matters.
    pub fn handle_timeout(&mut self, now: Instant) {
        let _ = now;
    }

    /// Says whether the node may take another subnet than the one it lost or holds: it has no live pods.
    pub fn set_may_renumber(&mut self, may_renumber: bool, now: Instant) {
        let _ = now;
        self.may_renumber = may_renumber;
    }

    /// Gives all leases back and takes no new ones: the node leaves the cluster.
    ///
    /// Done when `held` is empty and a `Released` was told for each; a store that is down delays it.
    pub fn release(&mut self, now: Instant) {
        let _ = now;
        self.releasing = true;
    }

    /// Writes a new key into the node's leases; `Renewed` carries it once the store has it.
    ///
    /// Sign with the new key only then, or peers refuse the record.
    pub fn rotate_key(&mut self, key: PublicKey, now: Instant) {
        if key != self.config.key {
            let old = std::mem::replace(&mut self.config.key, key);
            self.config.old_keys.push(old);
            self.slots
                .iter_mut()
                .filter_map(|slot| slot.held.as_mut())
                .for_each(|held| held.renew_at = Some(now));
        }
    }

    /// Says which subnets were chosen for this node. One that it holds and that is no longer among them is kept while pods
    /// use it.
    ///
    /// Returns whether they are others than before.
    pub fn set_fixed(&mut self, fixed: Vec<Subnet>, now: Instant) -> bool {
        let others = fixed != self.config.fixed;
        if others {
            self.config.fixed = fixed;
            self.slots.iter_mut().for_each(|slot| slot.told = None);
            self.list_at = self.list_at.min(now);
        }
        others
    }

    /// Says where the node receives gossip: its leases tell those who know nobody yet.
    pub fn set_gossip(&mut self, gossip: Vec<SocketAddr>, now: Instant) {
        if gossip != self.config.gossip {
            self.config.gossip = gossip;
            self.moves += 1;
            self.slots
                .iter_mut()
                .filter_map(|slot| slot.held.as_mut())
                .for_each(|held| held.renew_at = Some(now));
        }
    }

    /// Returns what to do next.
    pub fn poll_output(&mut self, now: Instant) -> Output {
        if self.in_flight.is_none() && self.retry_at.is_none_or(|at| at <= now) {
            self.retry_at = None;
            if let Some((request, output)) = self.next_request(now) {
                let key = match &output {
                    Output::Put { key, .. } | Output::Delete { key, .. } => Some(*key),
                    _ => {
                        self.asked_at = Some(now);
                        None
                    }
                };
                self.in_flight = Some(InFlight { request, key, asked: now, moves: self.moves });
                return output;
            }
            // A write whose answer was lost had happened: there is nothing left to write.
            self.refused = 0;
        }
        if let Some(event) = self.events.pop_front() {
            return Output::Event(event);
        }
        Output::Wait { until: self.next_wake(now) }
    }

    /// Returns the leases that the node holds.
    pub fn held(&self) -> Vec<HeldLease> {
        self.slots.iter().filter_map(|slot| slot.held.as_ref()).map(|held| held.lease).collect()
    }

    /// Returns the families that the node is still getting a lease of: it wants one, and nothing was found to be in the way.
    pub fn getting(&self) -> Vec<Family> {
        let gets = |slot: &&Slot| {
            slot.held.is_none() && !slot.fenced && slot.told.is_none() && self.wants(slot.family)
        };
        self.slots.iter().filter(gets).map(|slot| slot.family).collect()
    }

    /// Returns the held subnet that the store is being asked to take back: a pod that got an address of it now would keep an
    /// address that is another node's later.
    pub fn giving_back(&self) -> Option<Subnet> {
        self.in_flight
            .as_ref()
            .filter(|sent| matches!(sent.request, Request::Release(_)))
            .and_then(|sent| sent.key)
    }

    /// Returns all leases of the store as last seen, by subnet; those that cannot be read are left out.
    pub fn table(&self, now: Instant) -> Vec<LeaseView> {
        let watched = self.view.watched(now, self.most_gap());
        let readable = self.view.entries.values().filter_map(|seen| Some((seen, seen.value.as_ref().ok()?)));
        let lease = |(seen, value): (&super::view::Observed, &super::LeaseValue)| LeaseView {
            subnet: value.subnet,
            node: value.node.clone(),
            site: value.site.clone(),
            key: value.key,
            epoch: value.epoch,
            expires_in: value.ttl.map(|ttl| ttl.saturating_sub(seen.quiet() + watched)),
            expired: self.expired(seen),
            own: value.node == self.config.node && self.is_own_key(value.key),
            gossip: value.gossip.clone(),
        };
        readable.map(lease).collect()
    }

    /// Returns the age of the node's view of the store; `None` before the first answer.
    pub fn staleness(&self, now: Instant) -> Option<Duration> {
        self.view.seen_at.map(|seen| now.saturating_duration_since(seen))
    }

    /// Returns how many requests in a row the store has failed.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Returns whether the last write failed and is still to be made, though lists may succeed.
    pub fn write_refused(&self) -> bool {
        self.refused > 0
    }

    /// Two periods: one answer may be late and the time still counts as watched.
    fn most_gap(&self) -> Duration {
        self.config.list_every * 2
    }

    fn take_request(&mut self, key: Key) -> Option<InFlight> {
        self.in_flight.take_if(|sent| sent.key == Some(key))
    }

    fn answered(&mut self) {
        self.failures = 0;
        self.retry_at = None;
    }

    /// Another writer was first: learn what it wrote, and list before the next write.
    fn conflict(&mut self, key: Key, current: Option<&Entry>, now: Instant) {
        self.answered();
        self.view.set(key, current);
        self.list_now = true;
        self.judge(now);
    }

    fn back_off(&mut self, now: Instant) {
        let wait = BACKOFF.0.saturating_mul(1 << self.failures.min(10)).min(BACKOFF.1);
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(now + self.jittered(wait));
        self.list_now = true;
    }

    /// Records in the view what this node wrote.
    fn wrote(&mut self, lease: HeldLease, renewals: u64, revision: u64) {
        let value = self.value(lease, renewals).encode();
        self.view.set(lease.subnet, Some(&Entry { value, revision }));
    }

    fn next_wake(&self, now: Instant) -> Instant {
        let far = now + self.config.list_every;
        if self.in_flight.is_some() {
            return far;
        }
        if let Some(at) = self.retry_at {
            return at.max(now);
        }
        let slots = self.slots.iter().flat_map(|slot| {
            let asked = slot.asking.map(|asking| asking.until);
            [slot.held.as_ref().and_then(|held| held.renew_at), slot.seek_at, asked].into_iter().flatten()
        });
        // What is past and led to no request waits for an answer or a call, not for time.
        slots.chain([self.list_at]).filter(|at| *at > now).min().unwrap_or(far)
    }

    fn tell_unreadable(&mut self) {
        for (&subnet, seen) in &self.view.entries {
            if let Err(error) = &seen.value {
                let why = error.to_string();
                if self.told.insert((subnet, why.clone())) {
                    let conflict = LeaseConflict::Unreadable { subnet, why };
                    self.events.push_back(LeaseEvent::Conflict(conflict));
                }
            }
        }
    }

    /// Returns when a lease that is written now is to be renewed.
    pub(super) fn next_renewal(&mut self, now: Instant) -> Option<Instant> {
        let every = self.config.renew_every()?;
        Some(now + self.jittered(every))
    }

    /// From 0.9 to 1.1 of a time, so that nodes do not act in step.
    pub(super) fn jittered(&mut self, time: Duration) -> Duration {
        time.mul_f64(0.9 + 0.2 * self.fraction())
    }

    fn fraction(&mut self) -> f64 {
        f64::from(self.rng.next_u32()) / f64::from(u32::MAX)
    }
}
