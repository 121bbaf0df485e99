//! The free addresses of one node subnet, in the order in which they are to be used.
//!
//! Addresses that were never used come first, from a starting place on and around; then the released ones,
//! oldest first. Memory follows the addresses that were used, not those that exist.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;

use ipnet::IpNet;
use weft_wire::types::Subnet;

use crate::ranges::{Ranges, address, bounds, number};

/// So many released addresses wait at most before the oldest goes before never-used ones: in an IPv6
/// subnet the never-used ones would last for ever, and so would the list of the released.
const MOST_WAITING: usize = 65_536;

#[derive(Debug, Clone)]
pub(super) struct Range {
    pub(super) subnet: Subnet,
    /// The first and the last address that pods may have; `None` in a subnet too small for pods.
    usable: Option<(u128, u128)>,
    reserved: Ranges,
    capacity: u128,
    in_use: u128,
    /// Where the search for never-used addresses started, and how many it has passed.
    start: u128,
    passed: u128,
    /// Used, or taken by request or adoption, before the search came by.
    ahead: BTreeSet<u128>,
    released: VecDeque<u128>,
}

impl Range {
    pub(super) fn new(subnet: Subnet, reserved: &[IpNet], seed: u64) -> Self {
        let (first, last) = bounds(subnet.net());
        // The network address stands for the node (its VTEP), the next one is the gateway; IPv6 has no
        // broadcast address.
        let low = number(subnet.gateway()).saturating_add(1).max(first.saturating_add(2));
        let high = if subnet.is_ipv4() { last.saturating_sub(1) } else { last };
        let usable = (low <= high).then_some((low, high));
        let reserved = reserved.iter().filter(|net| matches!(net, IpNet::V4(_)) == subnet.is_ipv4());
        let reserved = Ranges::new(reserved.map(|net| bounds(*net)));
        let (size, lost) = match usable {
            Some((low, high)) => {
                (high - low + 1, reserved.within(low, high).map(|(from, to)| to - from + 1).sum::<u128>())
            }
            None => (0, 0),
        };
        let start = if size == 0 { 0 } else { u128::from(seed) % size };
        Self {
            subnet,
            usable,
            reserved,
            capacity: size - lost,
            in_use: 0,
            start,
            passed: 0,
            ahead: BTreeSet::new(),
            released: VecDeque::new(),
        }
    }

    pub(super) fn capacity(&self) -> u128 {
        self.capacity
    }

    pub(super) fn free(&self) -> u128 {
        self.capacity - self.in_use
    }

    pub(super) fn usable(&self, address: IpAddr) -> bool {
        self.subnet.contains(address) && self.usable_number(number(address))
    }

    /// Takes this address; it is known to be free. An address that is not the range's changes nothing.
    pub(super) fn take(&mut self, address: IpAddr) {
        if self.usable(address) {
            let number = number(address);
            self.in_use += 1;
            match self.released.iter().position(|waiting| *waiting == number) {
                Some(index) => drop(self.released.remove(index)),
                None => drop(self.ahead.insert(number)),
            }
        }
    }

    /// Takes the address that has been free for longest.
    pub(super) fn next(&mut self) -> Option<IpAddr> {
        let number = match self.released.len() {
            MOST_WAITING.. => self.released.pop_front(),
            _ => self.next_never_used().or_else(|| self.released.pop_front()),
        }?;
        self.in_use += 1;
        Some(address(self.subnet.is_ipv4(), number))
    }

    /// Frees a taken address. An address that is not the range's changes nothing.
    pub(super) fn release(&mut self, address: IpAddr) {
        if self.usable(address) {
            self.in_use -= 1;
            self.released.push_back(number(address));
        }
    }

    fn usable_number(&self, number: u128) -> bool {
        self.usable.is_some_and(|(low, high)| (low..=high).contains(&number))
            && self.reserved.meets(number, number).is_none()
    }

    fn next_never_used(&mut self) -> Option<u128> {
        let (low, high) = self.usable?;
        let size = high - low + 1;
        while self.passed < size {
            let number = low + (self.start + self.passed) % size;
            if let Some(last) = self.reserved.meets(number, number) {
                // Over the whole reserved range at once, but not past the end: it may begin there again.
                self.passed += last.min(high) - number + 1;
                continue;
            }
            self.passed += 1;
            if !self.ahead.remove(&number) {
                return Some(number);
            }
        }
        None
    }
}
