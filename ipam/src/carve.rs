//! Cluster CIDRs and the node blocks cut from them.
//!
//! It knows no owners: it says which blocks exist and finds one that a given set leaves free.
//! Invariant: every block it returns lies inside a cluster CIDR, has that CIDR's node prefix length and
//! shares no address with a reserved range. Work follows the number of taken ranges, never of blocks.

use std::fmt;

use ipnet::IpNet;
use weft_wire::types::{NodeName, Subnet};

use crate::ranges::{Ranges, address, bounds};

#[cfg(test)]
mod tests;

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// Returns the family of a subnet.
    pub fn of(subnet: Subnet) -> Self {
        if subnet.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    fn of_net(net: IpNet) -> Self {
        if matches!(net, IpNet::V4(_)) { Self::V4 } else { Self::V6 }
    }

    /// Returns the shortest and the longest prefix of a node block.
    ///
    /// The longest still has a network address, a gateway and a pod (and, for IPv4, a broadcast address).
    fn block_prefixes(self) -> (u8, u8) {
        match self {
            Self::V4 => (8, 30),
            Self::V6 => (16, 126),
        }
    }

    fn bits(self) -> u32 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

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

impl ClusterCidr {
    fn family(&self) -> Family {
        Family::of_net(self.cidr)
    }

    /// Returns how many blocks the CIDR has, and how many addresses a block has.
    fn blocks(&self) -> (u128, u128) {
        let count = 1 << (self.node_prefix - self.cidr.prefix_len());
        (count, 1 << (self.family().bits() - u32::from(self.node_prefix)))
    }

    fn block(&self, index: u128) -> Subnet {
        let (_, size) = self.blocks();
        let first = bounds(self.cidr).0 + index * size;
        let first = address(self.family() == Family::V4, first);
        let net = IpNet::new(first, self.node_prefix).expect("Carver::new checked the prefix length");
        net.try_into().expect("a multiple of the block size has no host bits")
    }

    fn capacity(&self) -> u128 {
        let (count, size) = self.blocks();
        let (first, last) = bounds(self.cidr);
        let mut lost = 0;
        // Two reserved ranges in one block count once.
        let mut counted = 0;
        for (start, end) in Ranges::new(self.reserved.iter().map(|net| bounds(*net))).within(first, last) {
            let (from, to) = (((start - first) / size).max(counted), (end - first) / size);
            if from <= to {
                lost += to - from + 1;
                counted = to + 1;
            }
        }
        count - lost
    }

    /// Visits blocks from index `start % count` on, around once, jumping over taken ranges.
    fn first_free(&self, start: u64, taken: &Ranges) -> Option<Subnet> {
        let (count, size) = self.blocks();
        let base = bounds(self.cidr).0;
        let start = u128::from(start) % count;
        let mut index = start;
        let mut end = count;
        loop {
            while index < end {
                let first = base + index * size;
                match taken.meets(first, first + (size - 1)) {
                    None => return Some(self.block(index)),
                    Some(last) => index = (last - base) / size + 1,
                }
            }
            if end == start || start == 0 {
                return None;
            }
            (index, end) = (0, start);
        }
    }
}

/// Cluster CIDRs that cannot be carved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CarveError {
    /// No CIDR was given.
    #[error("no cluster CIDR is configured: add one, for example 10.32.0.0/12 with node_prefix 24")]
    None,
    /// A prefix has bits below its length.
    #[error("{given} has host bits set: write {meant}")]
    HostBits {
        /// As configured.
        given: IpNet,
        /// With the host bits cleared.
        meant: IpNet,
    },
    /// The CIDR overlaps addresses that never are pods'.
    #[error("cluster CIDR {cidr} overlaps {special}, which hosts cannot use for pods: choose another range")]
    Special {
        /// As configured.
        cidr: IpNet,
        /// The range with a meaning of its own.
        special: IpNet,
    },
    /// The CIDR is smaller than one node's block.
    #[error(
        "cluster CIDR {cidr} is too small for one block of node_prefix {node_prefix}: use a larger range, or a node_prefix of at least {at_least}"
    )]
    TooSmall {
        /// As configured.
        cidr: IpNet,
        /// As configured.
        node_prefix: u8,
        /// The CIDR's own prefix length.
        at_least: u8,
    },
    /// A block would have no address for a pod, or be absurdly large.
    #[error("node_prefix {node_prefix} of {cidr} must be from {shortest} to {longest}")]
    BlockSize {
        /// As configured.
        cidr: IpNet,
        /// As configured.
        node_prefix: u8,
        /// The shortest prefix of a block.
        shortest: u8,
        /// The longest prefix of a block: one with room for a pod.
        longest: u8,
    },
    /// Two CIDRs share addresses.
    #[error("cluster CIDRs {first} and {second} overlap: remove one, or make them disjoint")]
    Overlap {
        /// The one configured first.
        first: IpNet,
        /// The other.
        second: IpNet,
    },
    /// A reserved range has nothing to do with its CIDR.
    #[error("reserved range {reserved} is not part of cluster CIDR {cidr}: remove it or correct it")]
    ReservedOutside {
        /// As configured.
        reserved: IpNet,
        /// The CIDR it was given for.
        cidr: IpNet,
    },
    /// Every block is reserved.
    #[error("the reserved ranges of {cidr} leave no block of node_prefix {node_prefix}: reserve less")]
    AllReserved {
        /// As configured.
        cidr: IpNet,
        /// As configured.
        node_prefix: u8,
    },
}

/// The valid cluster CIDRs of one cluster.
#[derive(Debug, Clone)]
pub struct Carver {
    cidrs: Vec<ClusterCidr>,
    reserved: Vec<IpNet>,
}

impl Carver {
    /// Checks the CIDRs. Errors name the CIDR and what to change.
    pub fn new(cidrs: Vec<ClusterCidr>) -> Result<Self, CarveError> {
        if cidrs.is_empty() {
            return Err(CarveError::None);
        }
        for (index, cidr) in cidrs.iter().enumerate() {
            check(cidr)?;
            if let Some(other) = cidrs[..index].iter().find(|other| overlap(other.cidr, cidr.cidr)) {
                return Err(CarveError::Overlap { first: other.cidr, second: cidr.cidr });
            }
        }
        let reserved = cidrs.iter().flat_map(|cidr| cidr.reserved.iter().copied()).collect();
        Ok(Self { cidrs, reserved })
    }

    /// Returns the CIDRs as configured.
    pub fn cidrs(&self) -> &[ClusterCidr] {
        &self.cidrs
    }

    /// Returns the CIDRs of a family.
    pub fn family(&self, family: Family) -> impl Iterator<Item = &ClusterCidr> {
        self.cidrs.iter().filter(move |cidr| cidr.family() == family)
    }

    /// Returns how many nodes can lease a block of a family.
    pub fn capacity(&self, family: Family) -> u128 {
        self.family(family).map(ClusterCidr::capacity).fold(0, u128::saturating_add)
    }

    /// Returns whether a subnet lies in a cluster CIDR and outside all reserved ranges.
    pub fn allows(&self, subnet: Subnet) -> bool {
        let net = subnet.net();
        self.cidrs.iter().any(|cidr| cidr.cidr.contains(&net))
            && !self.reserved.iter().any(|reserved| overlap(*reserved, net))
    }

    /// Returns the first block, from the place `start` on, that shares no address with `taken`.
    pub fn first_free(
        &self,
        family: Family,
        start: u64,
        taken: impl IntoIterator<Item = Subnet>,
    ) -> Option<Subnet> {
        let taken = taken.into_iter().map(Subnet::net);
        let taken = taken.chain(self.reserved.iter().copied()).filter(|net| Family::of_net(*net) == family);
        let taken = Ranges::new(taken.map(bounds));
        self.family(family).find_map(|cidr| cidr.first_free(start, &taken))
    }
}

/// Returns where a node starts to look for a block: the same at every start, spread over the nodes.
pub fn start_of(node: &NodeName) -> u64 {
    // FNV-1a, then the finalizer of splitmix64: names that differ in one digit end up far apart.
    let hash = node.as_str().bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// Ranges with a meaning of their own: this network, loopback, link-local, multicast and class E.
const SPECIAL: [&str; 8] = [
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "224.0.0.0/3",
    "::/96",
    "::ffff:0:0/96",
    "fe80::/10",
    "ff00::/8",
];

fn check(given: &ClusterCidr) -> Result<(), CarveError> {
    let &ClusterCidr { cidr, node_prefix, .. } = given;
    for net in std::iter::once(cidr).chain(given.reserved.iter().copied()) {
        if net.addr() != net.network() {
            return Err(CarveError::HostBits { given: net, meant: net.trunc() });
        }
    }
    if node_prefix < cidr.prefix_len() {
        return Err(CarveError::TooSmall { cidr, node_prefix, at_least: cidr.prefix_len() });
    }
    let (shortest, longest) = given.family().block_prefixes();
    if !(shortest..=longest).contains(&node_prefix) {
        return Err(CarveError::BlockSize { cidr, node_prefix, shortest, longest });
    }
    for special in SPECIAL {
        let special: IpNet = special.parse().expect("the table holds prefixes");
        if overlap(special, cidr) {
            return Err(CarveError::Special { cidr, special });
        }
    }
    if let Some(reserved) = given.reserved.iter().copied().find(|reserved| !overlap(*reserved, cidr)) {
        return Err(CarveError::ReservedOutside { reserved, cidr });
    }
    if given.capacity() == 0 {
        return Err(CarveError::AllReserved { cidr, node_prefix });
    }
    Ok(())
}

fn overlap(a: IpNet, b: IpNet) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}
