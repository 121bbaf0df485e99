//! The pod addresses of one node: which attachment has which.
//!
//! Pure and not durable: the shell journals an assignment before it uses it, and adopts the journal at
//! start. Invariant: no address is assigned twice, and never a network, gateway, broadcast or reserved one.
//!
//! The address that has been free for longest is assigned next, so that a new pod does not meet the
//! connections and neighbour entries of the pod before it.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use weft_wire::types::Subnet;

use crate::carve::Family;
use range::Range;

mod range;
#[cfg(test)]
mod tests;

/// One interface of one container.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttachmentId {
    /// The runtime's container id.
    pub container: String,
    /// The interface name inside the container.
    pub ifname: String,
}

impl fmt::Display for AttachmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.container, self.ifname)
    }
}

/// One address of a pod and the node subnet it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodAddress {
    /// The address.
    pub address: IpAddr,
    /// The node subnet: gives the prefix length and the gateway. The address alone, if it was adopted
    /// and lies in none of the node's subnets.
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
    /// A requested address is of none of the node's subnets.
    #[error("{address} is not in this node's pod subnets ({subnets}): request another, or none")]
    NotOurs {
        /// As requested.
        address: IpAddr,
        /// The node's subnets, for people.
        subnets: String,
    },
    /// A requested address never is a pod's.
    #[error(
        "{address} is the network, gateway, broadcast or a reserved address of {subnet}: request another"
    )]
    Unusable {
        /// As requested.
        address: IpAddr,
        /// The subnet it is in.
        subnet: Subnet,
    },
    /// The address is another attachment's.
    #[error("{address} is in use by {by}: delete that pod first, or request another address")]
    InUse {
        /// As requested or adopted.
        address: IpAddr,
        /// Who has it.
        by: AttachmentId,
    },
    /// More than one address of one family.
    #[error("{first} and {second} are of one family: an interface has at most one address a family")]
    OneAFamily {
        /// One of them.
        first: IpAddr,
        /// The other.
        second: IpAddr,
    },
    /// The attachment already has other addresses.
    #[error("{id} already has {has}, not {wanted}: delete the attachment before adding it differently")]
    Differs {
        /// The attachment.
        id: AttachmentId,
        /// What it has, for people.
        has: String,
        /// What was requested or adopted.
        wanted: IpAddr,
    },
}

/// The pod addresses of one node.
#[derive(Debug, Clone)]
pub struct PodPool {
    ranges: Vec<Range>,
    reserved: Vec<IpNet>,
    seed: u64,
    held: BTreeMap<AttachmentId, PodAddresses>,
    owners: HashMap<IpAddr, AttachmentId>,
}

impl PodPool {
    /// Starts with every address free. `seed` chooses where assignment starts: take another at every
    /// start, so that addresses freed just before are not the first to be used again.
    pub fn new(subnets: &[Subnet], reserved: &[IpNet], seed: u64) -> Self {
        let reserved = reserved.to_vec();
        let mut pool =
            Self { ranges: Vec::new(), reserved, seed, held: BTreeMap::new(), owners: HashMap::new() };
        pool.set_subnets(subnets);
        pool
    }

    /// Replaces the subnets that new addresses come from; what is assigned stays assigned.
    pub fn set_subnets(&mut self, subnets: &[Subnet]) {
        let mut before = std::mem::take(&mut self.ranges);
        for &subnet in subnets {
            let known = before.iter().position(|range| range.subnet == subnet);
            let range = known.map(|index| before.swap_remove(index)).unwrap_or_else(|| {
                let mut range = Range::new(subnet, &self.reserved, self.seed);
                self.owners.keys().for_each(|address| range.take(*address));
                range
            });
            self.ranges.push(range);
        }
        self.ranges.sort_by_key(|range| range.subnet);
        self.ranges.dedup_by_key(|range| range.subnet);
    }

    /// Returns the subnets that new addresses come from.
    pub fn subnets(&self) -> impl Iterator<Item = Subnet> {
        self.ranges.iter().map(|range| range.subnet)
    }

    /// Returns the attachment's addresses, assigning one of each family at the first call.
    ///
    /// `requested` are addresses it must have (CNI's `IP=`); empty for any.
    pub fn assign(&mut self, id: &AttachmentId, requested: &[IpAddr]) -> Result<PodAddresses, AssignError> {
        if let Some(has) = self.held.get(id) {
            return match requested.iter().find(|wanted| !has.contains(**wanted)) {
                Some(&wanted) => Err(AssignError::Differs { id: id.clone(), has: has.to_string(), wanted }),
                None => Ok(has.clone()),
            };
        }
        one_a_family(requested)?;
        if self.ranges.is_empty() {
            return Err(AssignError::NoSubnet);
        }
        for &address in requested {
            self.check_requested(address)?;
        }
        // First find a range for every family, then take: a full family must not cost the other an address.
        let mut chosen = Vec::new();
        for family in Family::ALL {
            if let Some(&address) =
                requested.iter().find(|address| address.is_ipv4() == (family == Family::V4))
            {
                let index = self.range_of(address).expect("check_requested found the range");
                chosen.push((index, Some(address)));
                continue;
            }
            let mut of_family = self
                .ranges
                .iter()
                .enumerate()
                .filter(|(_, range)| Family::of(range.subnet) == family)
                .peekable();
            let Some(&(_, first)) = of_family.peek() else { continue };
            let full = AssignError::Exhausted { subnet: first.subnet, capacity: first.capacity() };
            chosen.push((of_family.find(|(_, range)| range.free() > 0).ok_or(full)?.0, None));
        }
        let mut addresses = Vec::with_capacity(chosen.len());
        for (index, requested) in chosen {
            let range = &mut self.ranges[index];
            let address = match requested {
                Some(address) => {
                    range.take(address);
                    address
                }
                None => range.next().expect("free() counted a free address"),
            };
            addresses.push(PodAddress { address, subnet: range.subnet });
        }
        Ok(self.hold(id, addresses))
    }

    /// Frees the attachment's addresses and returns them; `None` if it has none.
    pub fn release(&mut self, id: &AttachmentId) -> Option<PodAddresses> {
        let addresses = self.held.remove(id)?;
        for &PodAddress { address, .. } in &addresses.0 {
            self.owners.remove(&address);
            self.ranges.iter_mut().for_each(|range| range.release(address));
        }
        Some(addresses)
    }

    /// Takes over an assignment of an earlier run, wherever its addresses lie.
    pub fn adopt(&mut self, id: &AttachmentId, addresses: &[IpAddr]) -> Result<PodAddresses, AssignError> {
        if let Some(has) = self.held.get(id) {
            let same = has.0.len() == addresses.len();
            return match addresses.iter().find(|address| !same || !has.contains(**address)) {
                Some(&wanted) => Err(AssignError::Differs { id: id.clone(), has: has.to_string(), wanted }),
                None => Ok(has.clone()),
            };
        }
        one_a_family(addresses)?;
        for address in addresses {
            if let Some(by) = self.owners.get(address) {
                return Err(AssignError::InUse { address: *address, by: by.clone() });
            }
        }
        let mut adopted = Vec::with_capacity(addresses.len());
        for &address in addresses {
            self.ranges.iter_mut().for_each(|range| range.take(address));
            let subnet = self.range_of(address).map(|index| self.ranges[index].subnet);
            let alone = || IpNet::from(address).try_into().expect("a whole address has no host bits");
            adopted.push(PodAddress { address, subnet: subnet.unwrap_or_else(alone) });
        }
        adopted.sort();
        Ok(self.hold(id, adopted))
    }

    /// Returns every assignment.
    pub fn held(&self) -> impl Iterator<Item = (&AttachmentId, &PodAddresses)> {
        self.held.iter()
    }

    /// Returns the attachment's addresses, if it has some.
    pub fn addresses(&self, id: &AttachmentId) -> Option<&PodAddresses> {
        self.held.get(id)
    }

    /// Returns whose an address is.
    pub fn owner(&self, address: IpAddr) -> Option<&AttachmentId> {
        self.owners.get(&address)
    }

    /// Returns how many pod addresses a subnet has; 0 for a subnet that is not the pool's.
    pub fn capacity(&self, subnet: Subnet) -> u128 {
        self.ranges.iter().find(|range| range.subnet == subnet).map_or(0, Range::capacity)
    }

    /// Returns how many pod addresses of a subnet are free; 0 for a subnet that is not the pool's.
    pub fn free(&self, subnet: Subnet) -> u128 {
        self.ranges.iter().find(|range| range.subnet == subnet).map_or(0, Range::free)
    }

    fn hold(&mut self, id: &AttachmentId, addresses: Vec<PodAddress>) -> PodAddresses {
        for PodAddress { address, .. } in &addresses {
            self.owners.insert(*address, id.clone());
        }
        let addresses = PodAddresses(addresses);
        self.held.insert(id.clone(), addresses.clone());
        addresses
    }

    fn range_of(&self, address: IpAddr) -> Option<usize> {
        self.ranges.iter().position(|range| range.subnet.contains(address))
    }

    fn check_requested(&self, address: IpAddr) -> Result<(), AssignError> {
        let Some(index) = self.range_of(address) else {
            let subnets = self.subnets().map(|subnet| subnet.to_string()).collect::<Vec<_>>().join(", ");
            return Err(AssignError::NotOurs { address, subnets });
        };
        if !self.ranges[index].usable(address) {
            return Err(AssignError::Unusable { address, subnet: self.ranges[index].subnet });
        }
        match self.owners.get(&address) {
            Some(by) => Err(AssignError::InUse { address, by: by.clone() }),
            None => Ok(()),
        }
    }
}

impl PodAddresses {
    /// Returns whether the address is among them.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.iter().any(|held| held.address == address)
    }
}

impl fmt::Display for PodAddresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, held) in self.0.iter().enumerate() {
            write!(f, "{}{}", if index == 0 { "" } else { ", " }, held.address)?;
        }
        Ok(())
    }
}

fn one_a_family(addresses: &[IpAddr]) -> Result<(), AssignError> {
    for (index, &second) in addresses.iter().enumerate() {
        if let Some(&first) = addresses[..index].iter().find(|first| first.is_ipv4() == second.is_ipv4()) {
            return Err(AssignError::OneAFamily { first, second });
        }
    }
    Ok(())
}
