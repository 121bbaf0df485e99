//! The lease state machine of one node: it acquires, renews, loses and releases the node's subnets.
//!
//! Pure: the shell performs the store requests it asks for and hands back the answers. It is not the pod
//! pool and not the mesh. Invariants: it writes a key only by compare-and-swap from a state it has seen;
//! it reports a subnet as acquired only when the store held no overlapping entry after its own write;
//! it never writes over a live lease of another owner; and a store that fails takes nothing away.
//!
//! Shell contract: after every `handle_*` call drain `poll_output` until `Wait`. At most one store request
//! is outstanding, and each is answered exactly once, by `handle_snapshot`, `handle_put`, `handle_delete`
//! or (any of them failed) `handle_store_error`.

use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use weft_wire::types::{Epoch, NodeName, PublicKey, SiteName, Subnet};

use crate::carve::{Carver, Family};
use crate::store::{Expect, Key};

mod judge;
mod machine;
#[cfg(test)]
mod tests;
mod value;
mod view;

pub use machine::Leasing;
pub use value::{Asked, LeaseValue, ValueError};

/// What a node needs to lease its subnets.
#[derive(Debug, Clone)]
pub struct LeaseConfig {
    /// The node.
    pub node: NodeName,
    /// The node's site.
    pub site: SiteName,
    /// The key that signs the node's records.
    pub key: PublicKey,
    /// Keys that the node had before: entries under them are still its own.
    pub old_keys: Vec<PublicKey>,
    /// Where blocks come from; one lease is held for each family that has a CIDR.
    pub carver: Carver,
    /// Subnets that the operator chose for this node; a family named here leases nothing else.
    pub fixed: Vec<Subnet>,
    /// Whether the node leases nothing else than `fixed`, of any family, even while that is empty: something else chooses
    /// its subnets, and says so by [`Leasing::set_fixed`].
    pub only_fixed: bool,
    /// How long a lease outlives its last renewal, by default 1 h; `None` where the store ends the leases of a node that
    /// is gone, lets nobody else do so, and knows by its credentials who a node is.
    pub ttl: Option<Duration>,
    /// How often the store is listed when nothing wakes the node. Default a sixtieth of `ttl`.
    pub list_every: Duration,
    /// Differs at every start of the daemon: tells the node's own writes from those of a clone.
    pub boot: String,
    /// Where the node receives gossip, for those who know nobody yet; [`Leasing::set_gossip`] changes it.
    pub gossip: Vec<SocketAddr>,
}

impl LeaseConfig {
    /// Returns a configuration with the default times.
    pub fn new(node: NodeName, site: SiteName, key: PublicKey, carver: Carver, boot: String) -> Self {
        let ttl = Duration::from_secs(3600);
        Self {
            node,
            site,
            key,
            old_keys: Vec::new(),
            carver,
            fixed: Vec::new(),
            only_fixed: false,
            ttl: Some(ttl),
            list_every: ttl / 60,
            boot,
            gossip: Vec::new(),
        }
    }

    /// Returns the configuration with this time to live, and the other times derived from it.
    pub fn with_ttl(self, ttl: Duration) -> Self {
        Self { ttl: Some(ttl), list_every: ttl / 60, ..self }
    }

    /// Returns the configuration for a store that ends the leases of a node itself, as Kubernetes does with its Node.
    ///
    /// Leases are not renewed: each write of one of 5,000 nodes is told to all of them. Nor is the store listed much, for
    /// its watch tells everything.
    pub fn kept_by_store(self) -> Self {
        Self { ttl: None, list_every: Duration::from_secs(6 * 3600), ..self }
    }

    /// How often a lease is renewed.
    fn renew_every(&self) -> Option<Duration> {
        self.ttl.map(|ttl| ttl / 3)
    }
}

/// A lease that this node holds. The shell persists it and hands it back at the next start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldLease {
    /// The subnet.
    pub subnet: Subnet,
    /// The fencing number to announce.
    pub epoch: Epoch,
    /// The key that the store names as the owner's.
    pub key: PublicKey,
}

/// One lease of the store, as this node sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseView {
    /// The subnet.
    pub subnet: Subnet,
    /// The owner.
    pub node: NodeName,
    /// The owner's site.
    pub site: SiteName,
    /// The owner's key.
    pub key: PublicKey,
    /// The fencing number.
    pub epoch: Epoch,
    /// How much longer the lease lives without a renewal, zero once expired; `None` if it lives as long as its node.
    pub expires_in: Option<Duration>,
    /// Whether another node may take the subnet.
    pub expired: bool,
    /// Whether the lease is this node's.
    pub own: bool,
    /// Where the owner said that it receives gossip.
    pub gossip: Vec<SocketAddr>,
}

/// What happened to this node's leases.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum LeaseEvent {
    /// The node now holds this lease (again): persist it, then announce it.
    Acquired(HeldLease),
    /// The lease lives on, perhaps under a new key.
    Renewed(HeldLease),
    /// The subnet belongs to another: stop announcing it. Pods that use it must be renumbered.
    Lost {
        /// The subnet.
        subnet: Subnet,
        /// The new owner, if the store names one.
        to: Option<NodeName>,
    },
    /// The lease was given back.
    Released(Subnet),
    /// No block of this family is free.
    Exhausted {
        /// The family.
        family: Family,
        /// The cluster CIDRs of the family.
        cidrs: Vec<ipnet::IpNet>,
        /// How many blocks they hold.
        capacity: u128,
    },
    /// Something only a person can resolve. Nothing was changed.
    Conflict(LeaseConflict),
}

/// A conflict that needs a person.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum LeaseConflict {
    /// Another running daemon writes leases under this node's name.
    DuplicateName {
        /// The subnet where it showed.
        subnet: Subnet,
        /// The other daemon's key.
        key: PublicKey,
    },
    /// Another daemon under this node's name asked whether this one runs, to have its lease. It was answered.
    NameAsked {
        /// The subnet.
        subnet: Subnet,
        /// The other daemon's key.
        key: PublicKey,
    },
    /// The subnet that was chosen for the node is leased by another node.
    FixedTaken {
        /// The subnet that overlaps.
        subnet: Subnet,
        /// Who leases it.
        owner: NodeName,
    },
    /// The held subnet is outside the configured CIDRs; it is kept while pods use it.
    Outside {
        /// The subnet.
        subnet: Subnet,
    },
    /// An entry of the store cannot be read; its subnet is left alone.
    Unreadable {
        /// The entry.
        subnet: Subnet,
        /// Why.
        why: String,
    },
}

impl LeaseConflict {
    /// Returns the subnet that it is about.
    pub fn subnet(&self) -> Subnet {
        match self {
            Self::DuplicateName { subnet, .. }
            | Self::NameAsked { subnet, .. }
            | Self::FixedTaken { subnet, .. }
            | Self::Outside { subnet }
            | Self::Unreadable { subnet, .. } => *subnet,
        }
    }
}

/// What the shell has to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// List the store; answer by `handle_snapshot`.
    List,
    /// Write an entry; answer by `handle_put`.
    Put {
        /// The key.
        key: Key,
        /// The condition.
        expect: Expect,
        /// The value.
        value: Vec<u8>,
    },
    /// Delete an entry; answer by `handle_delete`.
    Delete {
        /// The key.
        key: Key,
        /// The condition.
        revision: u64,
    },
    /// Tell.
    Event(LeaseEvent),
    /// Nothing to do before `until` but wait for an answer, a change or a call.
    Wait {
        /// When to call `handle_timeout`.
        until: Instant,
    },
}

impl fmt::Display for LeaseEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Acquired(lease) => write!(f, "leased {} at epoch {}", lease.subnet, lease.epoch),
            Self::Renewed(lease) => write!(f, "renewed {}", lease.subnet),
            Self::Lost { subnet, to: Some(node) } => write!(f, "{subnet} now belongs to {node}"),
            Self::Lost { subnet, to: None } => write!(f, "{subnet} is no longer this node's"),
            Self::Released(subnet) => write!(f, "released {subnet}"),
            Self::Exhausted { family, cidrs, capacity } => {
                let cidrs = cidrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                write!(
                    f,
                    "no free {family} subnet in {cidrs}: all {capacity} blocks are leased; remove nodes that are gone, add a cluster CIDR, or use a longer node_prefix"
                )
            }
            Self::Conflict(conflict) => conflict.fmt(f),
        }
    }
}

impl fmt::Display for LeaseConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DuplicateName { subnet, key } => write!(
                f,
                "{subnet} is leased under this node's name by another daemon (key {}): give one of them another name; the lease of a reinstalled node expires by itself",
                key.short()
            ),
            Self::NameAsked { subnet, key } => write!(
                f,
                "another daemon under this node's name (key {}) asked for {subnet}: stop it, or give it another name",
                key.short()
            ),
            Self::FixedTaken { subnet, owner } => write!(
                f,
                "{subnet} is leased by {owner} and overlaps the subnet chosen for this node: change one of the two"
            ),
            Self::Outside { subnet } => write!(
                f,
                "{subnet} is held by this node but is no longer in the configured ranges: it is kept until no pod uses it"
            ),
            Self::Unreadable { subnet, why } => write!(
                f,
                "the store's entry for {subnet} cannot be read ({why}): the subnet is left alone; remove the entry if no node uses it"
            ),
        }
    }
}
