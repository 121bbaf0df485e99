//! Sets of addresses of one family as sorted, disjoint, inclusive ranges of integers.

use std::net::IpAddr;

use ipnet::IpNet;

/// Returns an address as an integer; IPv4 addresses use the low 32 bits.
pub(crate) fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

/// Returns the first and the last address of a prefix.
pub(crate) fn bounds(net: IpNet) -> (u128, u128) {
    (number(net.network()), number(net.broadcast()))
}

/// Returns the address of an integer.
pub(crate) fn address(v4: bool, number: u128) -> IpAddr {
    if v4 {
        IpAddr::V4(u32::try_from(number).expect("an IPv4 range ends within 32 bits").into())
    } else {
        IpAddr::V6(number.into())
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ranges(Vec<(u128, u128)>);

impl Ranges {
    pub(crate) fn new(ranges: impl IntoIterator<Item = (u128, u128)>) -> Self {
        let mut ranges: Vec<_> = ranges.into_iter().collect();
        ranges.sort_unstable();
        let mut merged: Vec<(u128, u128)> = Vec::with_capacity(ranges.len());
        for (first, last) in ranges {
            match merged.last_mut() {
                Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
                _ => merged.push((first, last)),
            }
        }
        Self(merged)
    }

    /// Returns the last address of the last range that meets `first..=last`.
    pub(crate) fn meets(&self, first: u128, last: u128) -> Option<u128> {
        let after = self.0.partition_point(|range| range.0 <= last);
        let range = self.0[..after].last()?;
        (range.1 >= first).then_some(range.1)
    }

    /// Returns the parts of the ranges inside `first..=last`.
    pub(crate) fn within(&self, first: u128, last: u128) -> impl Iterator<Item = (u128, u128)> {
        let inside = self.0.iter().filter(move |range| range.0 <= last && range.1 >= first);
        inside.map(move |range| (range.0.max(first), range.1.min(last)))
    }
}
