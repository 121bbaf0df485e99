//! Cluster CIDRs and the node blocks cut from them.
//!
//! It knows no owners: it says which blocks exist and finds one that a given set leaves free.
//! Invariant: every block it returns lies inside a cluster CIDR, has that CIDR's node prefix length and
//! shares no address with a reserved range. Work follows the number of taken ranges, never of blocks.

use ipnet::IpNet;
use weft_wire::types::{NodeName, Subnet};

#[cfg(test)]
mod tests;

/// A range of pod addresses of the whole cluster, cut into equal blocks, one a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterCidr {
    /// The range.
    pub cidr: IpNet,
    /// The prefix length of a node's block.
    pub node_prefix: u8,
    /// Ranges that no node may lease, such as addresses used on the LAN.
    pub reserved: Vec<IpNet>,
}

/// Cluster CIDRs that cannot be carved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CarveError {
    /// No CIDR was given.
    #[error("no cluster CIDR is configured: add one, for example 10.32.0.0/12 with node_prefix 24")]
    None,
}

/// The valid cluster CIDRs of one cluster.
#[derive(Debug, Clone)]
pub struct Carver {
    cidrs: Vec<ClusterCidr>,
}

impl Carver {
    /// Checks the CIDRs. Errors name the CIDR and what to change.
    pub fn new(cidrs: Vec<ClusterCidr>) -> Result<Self, CarveError> {
        if cidrs.is_empty() {
            return Err(CarveError::None);
        }
        Ok(Self { cidrs })
    }

    /// Returns the CIDRs as configured.
    pub fn cidrs(&self) -> &[ClusterCidr] {
        &self.cidrs
    }

    /// Returns how many nodes of a family can lease a block.
    pub fn capacity(&self, _family: Family) -> u128 {
        0
    }

    /// Returns whether a subnet lies in a cluster CIDR and outside all reserved ranges.
    pub fn allows(&self, _subnet: Subnet) -> bool {
        false
    }

    /// Returns the first block, in the node's own order, that shares no address with `taken`.
    pub fn first_free(&self, _family: Family, _start: u64, _taken: &[Subnet]) -> Option<Subnet> {
        None
    }
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Returns the family of a subnet.
    pub fn of(subnet: Subnet) -> Self {
        if subnet.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// Returns where a node starts to look for a block: the same at every start, spread over the nodes.
pub fn start_of(node: &NodeName) -> u64 {
    let _ = node;
    0
}
