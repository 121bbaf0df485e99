//! How many handshakes one source may send: a bucket each, before any expensive arithmetic.
//!
//! IPv6 sources count by /64, which is what one subscriber has. The number of buckets is bounded.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// So many handshakes at once.
const BURST: u32 = 20;
/// One more is allowed after so long.
const REFILL: Duration = Duration::from_millis(50);
/// The most sources that are remembered; with more, the whole memory starts anew.
const SOURCES: usize = 1 << 14;

/// The buckets.
#[derive(Debug, Default)]
pub(super) struct Flood {
    /// How many were taken, and when the count was last lowered.
    taken: HashMap<IpAddr, (u32, Instant)>,
}

impl Flood {
    /// Returns whether a source may send one more.
    pub(super) fn admit(&mut self, source: IpAddr, now: Instant) -> bool {
        let source = match source {
            IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from(u128::from(address) >> 64 << 64)),
            address => address,
        };
        if self.taken.len() >= SOURCES && !self.taken.contains_key(&source) {
            self.taken.clear();
        }
        let (taken, since) = self.taken.entry(source).or_insert((0, now));
        let back = now.saturating_duration_since(*since).as_nanos() / REFILL.as_nanos();
        let back = u32::try_from(back).unwrap_or(u32::MAX);
        if back > 0 {
            *taken = taken.saturating_sub(back);
            *since = now;
        }
        let admitted = *taken < BURST;
        *taken += u32::from(admitted);
        admitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_held_to_its_rate_and_others_are_not() {
        let (mut flood, now) = (Flood::default(), Instant::now());
        let (one, other) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        assert_eq!((0..100).filter(|_| flood.admit(one, now)).count(), BURST as usize);
        assert!(flood.admit(other, now));
        assert!(!flood.admit(one, now + REFILL / 2));
        assert_eq!((0..100).filter(|_| flood.admit(one, now + REFILL * 5)).count(), 5);
    }

    #[test]
    fn a_subscriber_of_ipv6_is_one_source_and_memory_is_bounded() {
        let (mut flood, now) = (Flood::default(), Instant::now());
        let in_prefix = |host: u64| IpAddr::from(Ipv6Addr::from(0x2001_0db8_u128 << 96 | u128::from(host)));
        assert_eq!((0..100).filter(|host| flood.admit(in_prefix(*host), now)).count(), BURST as usize);
        for source in 0..100_000_u32 {
            flood.admit(IpAddr::from(source.to_be_bytes()), now);
        }
        assert!(flood.taken.len() <= SOURCES);
    }
}
