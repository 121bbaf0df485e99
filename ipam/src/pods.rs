//! The pod addresses of one node: which attachment has which.
//!
//! Pure and not durable: the shell journals an assignment before it uses it, and adopts the journal at
//! start. Invariant: no address is assigned twice, and never a network, gateway, broadcast or reserved one.

use std::net::IpAddr;

use ipnet::IpNet;
use weft_wire::types::Subnet;

/// One interface of one container.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttachmentId {
    /// The runtime's container id.
    pub container: String,
    /// The interface name inside the container.
    pub ifname: String,
}

/// One address of a pod and the node subnet it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodAddress {
    /// The address.
    pub address: IpAddr,
    /// The node subnet: gives the prefix length and the gateway.
    pub subnet: Subnet,
}

/// The addresses of one attachment: at most one a family, IPv4 first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodAddresses(pub Vec<PodAddress>);

/// An address that cannot be assigned. The pool is unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AssignError {
    /// Every address of a subnet is in use.
    #[error(
        "{subnet} has no free pod address: all {capacity} are in use; delete pods on this node, or give nodes larger blocks (a smaller node_prefix)"
    )]
    Exhausted {
        /// The subnet.
        subnet: Subnet,
        /// How many pod addresses it has.
        capacity: u128,
    },
    /// The node holds no subnet.
    #[error("this node holds no pod subnet yet: see `weft status` for the state of its lease")]
    NoSubnet,
}

/// The pod addresses of one node.
#[derive(Debug, Clone)]
pub struct PodPool {
    subnets: Vec<Subnet>,
}

impl PodPool {
    /// Starts with every address free. `seed` chooses where assignment starts.
    pub fn new(subnets: &[Subnet], reserved: &[IpNet], seed: u64) -> Self {
        let _ = (reserved, seed);
        Self { subnets: subnets.to_vec() }
    }

    /// Replaces the subnets that new addresses come from; what is assigned stays assigned.
    pub fn set_subnets(&mut self, subnets: &[Subnet]) {
        self.subnets = subnets.to_vec();
    }

    /// Returns the attachment's addresses, assigning one a family at the first call.
    ///
    /// `requested` are addresses it must have (CNI's `IP=`); empty for any.
    pub fn assign(&mut self, id: &AttachmentId, requested: &[IpAddr]) -> Result<PodAddresses, AssignError> {
        let _ = (id, requested);
        Err(AssignError::NoSubnet)
    }

    /// Frees the attachment's addresses and returns them; `None` if it has none.
    pub fn release(&mut self, id: &AttachmentId) -> Option<PodAddresses> {
        let _ = id;
        None
    }

    /// Takes over an assignment of an earlier run.
    pub fn adopt(&mut self, id: &AttachmentId, addresses: &[IpAddr]) -> Result<PodAddresses, AssignError> {
        let _ = (id, addresses);
        Err(AssignError::NoSubnet)
    }

    /// Returns every assignment.
    pub fn held(&self) -> impl Iterator<Item = (&AttachmentId, &PodAddresses)> {
        std::iter::empty()
    }

    /// Returns the attachment's addresses, if it has some.
    pub fn addresses(&self, id: &AttachmentId) -> Option<&PodAddresses> {
        let _ = id;
        None
    }

    /// Returns how many pod addresses a subnet has.
    pub fn capacity(&self, subnet: Subnet) -> u128 {
        let _ = subnet;
        0
    }

    /// Returns how many pod addresses of a subnet are free.
    pub fn free(&self, subnet: Subnet) -> u128 {
        let _ = subnet;
        0
    }
}
