//! Where others see this node: its reflexive addresses, by the word of who answers it.
//!
//! Invariants: one vote for each address of an observer, so that many names at one address weigh as one; at most
//! [`OBSERVERS`] of them, the longest silent goes first.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// The most observers that are remembered.
pub(in crate::mesh) const OBSERVERS: usize = 16;
/// A vote counts so long.
const VALID: Duration = Duration::from_secs(600);
/// Another observer at the same address takes the place of one that has been silent so long.
const SILENT: Duration = Duration::from_secs(60);

/// Whether a node's mapping depends on whom it sends to (RFC 4787 s4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Too few observers to tell.
    Unknown,
    /// All observers see one address: no translation, or endpoint-independent mapping.
    Independent,
    /// Two observers saw different addresses at the same time: address-dependent, or address and port-dependent mapping.
    Dependent,
}

/// What one observer says.
#[derive(Debug, Clone, Copy)]
struct Vote {
    /// The observer's address and name hash.
    by: (IpAddr, u64),
    seen: SocketAddr,
    /// It said so from then until then.
    since: Instant,
    until: Instant,
}

#[derive(Debug, Default)]
pub(in crate::mesh) struct Votes {
    votes: Vec<Vote>,
}

impl Votes {
    /// Takes what an observer at an address said.
    pub(in crate::mesh) fn take(&mut self, by: (IpAddr, u64), seen: SocketAddr, now: Instant) {
        let seen = SocketAddr::new(seen.ip().to_canonical(), seen.port());
        if seen.ip().is_unspecified() || seen.ip().is_multicast() || seen.port() == 0 {
            return;
        }
        let same = |vote: &&mut Vote| vote.by.0 == by.0 && vote.seen.is_ipv4() == seen.is_ipv4();
        if let Some(vote) = self.votes.iter_mut().find(same) {
            if vote.by.1 == by.1 || vote.until + SILENT <= now {
                let since = if (vote.by, vote.seen) == (by, seen) { vote.since } else { now };
                *vote = Vote { by, seen, since, until: now };
            }
            return;
        }
        self.votes.retain(|vote| vote.until + VALID > now);
        if self.votes.len() >= OBSERVERS
            && let Some(oldest) = (0..self.votes.len()).min_by_key(|place| self.votes[*place].until)
        {
            self.votes.swap_remove(oldest);
        }
        self.votes.push(Vote { by, seen, since: now, until: now });
    }

    pub(in crate::mesh) fn is_empty(&self) -> bool {
        self.votes.is_empty()
    }

    fn valid(&self, now: Instant) -> impl Iterator<Item = &Vote> {
        self.votes.iter().filter(move |vote| vote.until + VALID > now)
    }

    /// Whether the node is seen elsewhere than at the addresses `own` of a family; `None` while it is not known, as where
    /// two observers say two things.
    pub(in crate::mesh) fn translated(&self, own: &[SocketAddr], v4: bool, now: Instant) -> Option<bool> {
        let (mut elsewhere, mut at_home) = (0, 0);
        for vote in self.valid(now).filter(|vote| vote.seen.is_ipv4() == v4) {
            *(if own.contains(&vote.seen) { &mut at_home } else { &mut elsewhere }) += 1;
        }
        if elsewhere == at_home { None } else { Some(elsewhere > at_home) }
    }

    /// Whether the mapping depends on whom the node sends to. A mapping that changed for all at once is no such thing:
    /// the two must have been seen at one time.
    pub(in crate::mesh) fn mapping(&self, now: Instant) -> Mapping {
        let votes: Vec<_> = self.valid(now).collect();
        let mut mapping = Mapping::Unknown;
        for (place, one) in votes.iter().enumerate() {
            for other in &votes[..place] {
                if one.seen.is_ipv4() != other.seen.is_ipv4() {
                    continue;
                }
                let together = one.since.max(other.since) <= one.until.min(other.until);
                if one.seen == other.seen {
                    mapping = Mapping::Independent;
                } else if together {
                    return Mapping::Dependent;
                }
            }
        }
        mapping
    }

    /// The addresses that the node is seen at, those of the latest votes first: one a family where all agree.
    pub(in crate::mesh) fn addresses(&self, now: Instant) -> Vec<SocketAddr> {
        let mut votes: Vec<_> = self.valid(now).collect();
        votes.sort_by_key(|vote| std::cmp::Reverse(vote.until));
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for vote in votes {
            if !addresses.contains(&vote.seen) {
                addresses.push(vote.seen);
            }
        }
        addresses
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    fn at(last: u8, port: u16) -> SocketAddr {
        SocketAddr::new(ip(last), port)
    }

    const HOME: [u8; 4] = [198, 51, 100, 1];

    fn translated(votes: &Votes, now: Instant) -> Option<bool> {
        votes.translated(&[SocketAddr::from((HOME, 7117))], true, now)
    }

    #[test]
    fn one_liar_convinces_only_who_hears_nobody_else() {
        let now = Instant::now();
        let mut votes = Votes::default();
        votes.take((ip(1), 1), SocketAddr::from((HOME, 7117)), now);
        assert_eq!(translated(&votes, now), Some(false));
        // However many names the liar has, they are at one address.
        for name in 100..200 {
            votes.take((ip(9), name), at(77, 7117), now);
        }
        assert_eq!(translated(&votes, now), None, "one says this, one says that");
        votes.take((ip(2), 2), SocketAddr::from((HOME, 7117)), now);
        assert_eq!(translated(&votes, now), Some(false));
        assert_eq!(translated(&votes, now + VALID), None, "votes do not count for ever");
    }

    #[test]
    fn two_addresses_at_one_time_are_a_mapping_that_depends_and_one_after_the_other_is_a_change() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let mut votes = Votes::default();
        votes.take((ip(1), 1), at(200, 1000), now);
        assert_eq!(votes.mapping(now), Mapping::Unknown);
        votes.take((ip(2), 2), at(200, 1000), now + second);
        assert_eq!(votes.mapping(now + second), Mapping::Independent);
        // The NAT forgot: both see the new address, one later than the other.
        votes.take((ip(1), 1), at(200, 1001), now + second * 3);
        votes.take((ip(2), 2), at(200, 1001), now + second * 4);
        assert_eq!(votes.mapping(now + second * 4), Mapping::Independent);
        assert_eq!(votes.addresses(now + second * 4), [at(200, 1001)]);
        // The first goes on to see the one while another sees another.
        votes.take((ip(3), 3), at(200, 1002), now + second * 5);
        votes.take((ip(1), 1), at(200, 1001), now + second * 6);
        assert_eq!(votes.mapping(now + second * 6), Mapping::Dependent);
    }

    #[test]
    fn observers_are_bounded_and_nonsense_is_no_vote() {
        let now = Instant::now();
        let mut votes = Votes::default();
        for last in 0..=255 {
            votes.take(
                (ip(last), 1),
                at(200, 1000 + u16::from(last)),
                now + Duration::from_secs(last.into()),
            );
        }
        assert_eq!(votes.votes.len(), OBSERVERS);
        assert_eq!(votes.addresses(now + Duration::from_secs(255))[0], at(200, 1255));
        let mut votes = Votes::default();
        for seen in ["0.0.0.0:7117", "224.0.0.1:7117", "192.0.2.1:0", "[::]:1", "[ff02::1]:1"] {
            votes.take((ip(1), 1), seen.parse().expect("an address"), now);
        }
        assert!(votes.is_empty());
    }
}
