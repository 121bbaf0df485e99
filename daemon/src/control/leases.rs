//! What the node asks of the store, what it makes of the answers, and what people hear of its leases.

use std::time::Instant;

use rand_chacha::ChaCha8Rng;
use tracing::{debug, error, info, warn};
use weft_ipam::carve::Family;
use weft_ipam::lease::{LeaseConfig, LeaseConflict, LeaseEvent, Leasing};
use weft_ipam::store::kubernetes::Mode;
use weft_ipam::store::{Change, Expect, Key, PutError, Snapshot, StoreError};
use weft_wire::types::{Subnet, to_hex};

use super::{Control, NEWCOMER, Output, Start, duplicate_name, random};
use crate::config::StoreKind;

/// What to ask the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreRequest {
    /// All entries.
    List,
    /// A conditional write.
    Put {
        /// The key.
        key: Key,
        /// The condition.
        expect: Expect,
        /// The value.
        value: Vec<u8>,
    },
    /// A conditional delete.
    Delete {
        /// The key.
        key: Key,
        /// The condition.
        revision: u64,
    },
}

/// An answer of the store, or a change that it saw.
#[derive(Debug)]
pub enum StoreAnswer {
    /// To [`StoreRequest::List`].
    Listed(Result<Snapshot, StoreError>),
    /// To [`StoreRequest::Put`].
    Put(Key, Result<u64, PutError>),
    /// To [`StoreRequest::Delete`].
    Deleted(Key, Result<u64, PutError>),
    /// Another writer changed something.
    Changed(Change),
}

impl Control {
    /// Takes an answer or a change of the store.
    pub fn handle_store(&mut self, answer: StoreAnswer, now: Instant) {
        match answer {
            StoreAnswer::Listed(Ok(snapshot)) => {
                self.leasing.handle_snapshot(&snapshot, now);
                self.reconsider_seeds(now);
                // A store that is full answers lists; what it refused to write stays to be told.
                if !self.leasing.write_refused() {
                    self.store_error = None;
                }
            }
            StoreAnswer::Put(key, Ok(revision)) => {
                self.store_error = None;
                self.leasing.handle_put(key, Ok(revision), now);
            }
            StoreAnswer::Put(key, Err(PutError::Conflict(entry))) => {
                self.leasing.handle_put(key, Err(entry), now)
            }
            StoreAnswer::Deleted(key, Ok(revision)) => self.leasing.handle_delete(key, Ok(revision), now),
            StoreAnswer::Deleted(key, Err(PutError::Conflict(entry))) => {
                self.leasing.handle_delete(key, Err(entry), now);
            }
            StoreAnswer::Changed(change) => {
                self.leasing.handle_change(&change, now);
                self.reconsider_seeds(now);
            }
            StoreAnswer::Listed(Err(error))
            | StoreAnswer::Put(_, Err(PutError::Store(error)))
            | StoreAnswer::Deleted(_, Err(PutError::Store(error))) => {
                self.store_error = Some(error.to_string());
                self.leasing.handle_store_error(now);
            }
        }
        self.take_lease_table(now);
    }

    /// Takes the subnets that the cluster chose for this node.
    ///
    /// `wrong` says what keeps it from others.
    pub fn handle_node_subnets(&mut self, subnets: Vec<Subnet>, wrong: Vec<String>, now: Instant) {
        for sentence in wrong.iter().filter(|sentence| !self.problems.chosen.contains(sentence)) {
            warn!("{sentence}");
        }
        self.problems.chosen = wrong;
        if self.leasing.set_fixed(subnets, now) {
            // What was said of the former ones is over.
            self.problems.lease.clear();
        }
    }

    pub(super) fn handle_lease_event(&mut self, event: LeaseEvent, now: Instant) {
        match event {
            LeaseEvent::Acquired(held) | LeaseEvent::Renewed(held) => {
                debug!(subnet = %held.subnet, epoch = %held.epoch, "lease held");
                self.use_next_key(now);
                let family = Family::of(held.subnet);
                self.problems.lease.retain(|_, of| *of != family);
            }
            LeaseEvent::Lost { subnet, to } => {
                let owner = to.map_or_else(|| "no one".to_owned(), |node| node.to_string());
                error!(%subnet, owner, "lease lost, the subnet is no longer announced");
                self.problems.lease.insert(
                    format!("the lease of {subnet} was lost to {owner}; recreate the pods that still use it"),
                    Family::of(subnet),
                );
            }
            LeaseEvent::Released(subnet) => info!(%subnet, "lease released"),
            LeaseEvent::Exhausted { family, cidrs, capacity } => {
                let cidrs: Vec<_> = cidrs.iter().map(ToString::to_string).collect();
                let sentence = format!(
                    "no free node subnet in {}: all {capacity} are leased; add a CIDR to cluster.cidrs or remove nodes that are gone",
                    cidrs.join(", ")
                );
                self.tell_lease_problem(sentence, family);
            }
            LeaseEvent::Conflict(conflict) => self.handle_lease_conflict(&conflict, now),
            other => debug!(event = ?other, "lease event"),
        }
        self.leases_changed(now);
    }

    fn handle_lease_conflict(&mut self, conflict: &LeaseConflict, now: Instant) {
        let name = &self.config.node.name;
        let family = Family::of(conflict.subnet());
        let sentence = match conflict {
            LeaseConflict::DuplicateName { subnet, key } => {
                let sentence = duplicate_name(name.as_str(), &format!("writes the lease of {subnet}"), key);
                if now.duration_since(self.started) < NEWCOMER {
                    return self.outputs.push_front(Output::Fatal(sentence));
                }
                sentence
            }
            LeaseConflict::FixedTaken { subnet, owner } if self.node_chooses() => format!(
                "spec.podCIDRs of Node {name} overlaps {subnet}, which {owner} leases: see that one controller allocates them, then delete the Node of this or of the other node, so that it gets another"
            ),
            LeaseConflict::Outside { subnet } if self.node_chooses() => format!(
                "spec.podCIDRs of Node {name} no longer has {subnet}, which this node holds; it is kept while pods use it, drain the node to renumber it"
            ),
            LeaseConflict::NameAsked { subnet, key } => {
                self.problems.name_asked = Some((*subnet, *key, now));
                return warn!(%subnet, key = key.short(), "another daemon under this node's name asked for its lease");
            }
            LeaseConflict::FixedTaken { subnet, owner } => format!(
                "the configured subnet overlaps {subnet}, which {owner} leases; choose another in store.subnets"
            ),
            LeaseConflict::Outside { subnet } => format!(
                "the held subnet {subnet} is outside cluster.cidrs; it is kept while pods use it, drain the node to renumber it"
            ),
            LeaseConflict::Unreadable { subnet, why } => {
                format!("the store's entry for {subnet} cannot be read ({why}); it is left alone")
            }
            other => format!("lease conflict: {other:?}"),
        };
        self.tell_lease_problem(sentence, family);
    }

    /// Whether the Node object names the node's subnets.
    fn node_chooses(&self) -> bool {
        matches!(&self.config.store.kind, StoreKind::Kubernetes(options) if options.mode == Mode::NodePodCidr)
    }

    fn tell_lease_problem(&mut self, sentence: String, family: Family) {
        if self.problems.lease.insert(sentence.clone(), family).is_none() {
            warn!("{sentence}");
        }
    }
}

/// Begins with what an earlier run held.
pub(super) fn leasing(start: &Start, seeds: &mut ChaCha8Rng, now: Instant) -> Leasing {
    let Start { config, memory, .. } = start;
    let key = start.key.public();
    let run = to_hex(&random(seeds)[..8]);
    let (node, site) = (config.node.name.clone(), config.node.site.clone());
    let mut lease_config = LeaseConfig::new(node, site, key, config.cluster.carver.clone(), run)
        .with_ttl(config.store.lease_ttl);
    match &config.store.kind {
        StoreKind::Static(subnets) => {
            lease_config.fixed.clone_from(subnets);
            lease_config.only_fixed = true;
        }
        StoreKind::Kubernetes(options) => {
            lease_config = lease_config.kept_by_store();
            lease_config.only_fixed = options.mode == Mode::NodePodCidr;
        }
        StoreKind::Sqlite(_) | StoreKind::Etcd(_) => {}
    }
    let remembered = memory.held.iter().map(|held| held.key).filter(|held| *held != key);
    lease_config.old_keys.extend(remembered.chain(start.key.predecessors()));
    Leasing::new(lease_config, memory.held.clone(), random(seeds), now)
}
