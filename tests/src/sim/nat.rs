//! A NAT in virtual time, by the behaviours of RFC 4787: what its mapping depends on (s4.1), what it lets in (s5), how long it keeps
//! what is not used (s4.3), and whether it turns around what comes from inside (s6).
//!
//! It translates one datagram at a time and carries nothing: `net.rs` does. Port numbers are handed out one after the other, so a mapping
//! that was lost never comes back as it was.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// What a mapping, or a filter, depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depends {
    /// Nothing outside.
    Nothing,
    /// The address outside.
    Address,
    /// The address and the port outside.
    AddressAndPort,
}

/// How a NAT behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Behaviour {
    /// What the mapping depends on.
    pub mapping: Depends,
    /// What is let in depends on whom the mapping was used to send to.
    pub filtering: Depends,
    /// A mapping that nothing was sent through for so long is gone.
    pub timeout: Duration,
    /// Datagrams from inside to a mapping of the NAT itself come back in.
    pub hairpin: bool,
}

impl Behaviour {
    const fn of(mapping: Depends, filtering: Depends) -> Self {
        Self { mapping, filtering, timeout: Duration::from_secs(30), hairpin: false }
    }

    /// One mapping for all, and all are let in.
    pub const FULL_CONE: Self = Self::of(Depends::Nothing, Depends::Nothing);
    /// One mapping for all; who was sent to is let in.
    pub const ADDRESS_RESTRICTED: Self = Self::of(Depends::Nothing, Depends::Address);
    /// One mapping for all; the very port that was sent to is let in.
    pub const PORT_RESTRICTED: Self = Self::of(Depends::Nothing, Depends::AddressAndPort);
    /// A mapping for each that is sent to.
    pub const SYMMETRIC: Self = Self::of(Depends::AddressAndPort, Depends::AddressAndPort);

    /// The same, but a mapping lives so long.
    pub const fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }
}

type Key = (SocketAddr, Option<IpAddr>, Option<u16>);

#[derive(Debug)]
struct Mapping {
    port: u16,
    used: Instant,
    sent_to: BTreeSet<SocketAddr>,
}

/// A NAT with its mappings.
#[derive(Debug)]
pub struct Nat {
    /// How it behaves.
    pub behaviour: Behaviour,
    /// Its address outside.
    pub outside: IpAddr,
    mappings: BTreeMap<Key, Mapping>,
    next_port: u16,
}

impl Nat {
    /// A NAT without mappings.
    pub fn new(outside: IpAddr, behaviour: Behaviour) -> Self {
        Self { behaviour, outside, mappings: BTreeMap::new(), next_port: 20_000 }
    }

    /// Forgets all mappings.
    pub fn reboot(&mut self) {
        self.mappings.clear();
    }

    /// Returns how many mappings there are.
    pub fn mappings(&self, now: Instant) -> usize {
        self.mappings.values().filter(|mapping| mapping.used + self.behaviour.timeout > now).count()
    }

    /// Translates what goes out: returns the address that it comes from outside.
    pub fn outbound(&mut self, from: SocketAddr, to: SocketAddr, now: Instant) -> SocketAddr {
        let timeout = self.behaviour.timeout;
        self.mappings.retain(|_, mapping| mapping.used + timeout > now);
        let key = match self.behaviour.mapping {
            Depends::Nothing => (from, None, None),
            Depends::Address => (from, Some(to.ip()), None),
            Depends::AddressAndPort => (from, Some(to.ip()), Some(to.port())),
        };
        let next_port = &mut self.next_port;
        let mapping = self.mappings.entry(key).or_insert_with(|| {
            *next_port = next_port.checked_add(1).unwrap_or(20_000);
            Mapping { port: *next_port, used: now, sent_to: BTreeSet::new() }
        });
        mapping.used = now;
        mapping.sent_to.insert(to);
        SocketAddr::new(self.outside, mapping.port)
    }

    /// Translates what comes in at a port: returns the address inside, or nothing where it is not let in.
    pub fn inbound(&self, from: SocketAddr, port: u16, now: Instant) -> Option<SocketAddr> {
        let alive = |mapping: &&Mapping| mapping.used + self.behaviour.timeout > now;
        let lets_in = |mapping: &Mapping| match self.behaviour.filtering {
            Depends::Nothing => true,
            Depends::Address => mapping.sent_to.iter().any(|to| to.ip() == from.ip()),
            Depends::AddressAndPort => mapping.sent_to.contains(&from),
        };
        let (key, mapping) = self.mappings.iter().find(|(_, mapping)| mapping.port == port)?;
        (alive(&mapping) && lets_in(mapping)).then_some(key.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(last: u8, port: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, last], port))
    }

    fn inside() -> SocketAddr {
        SocketAddr::from(([198, 51, 100, 1], 7117))
    }

    fn nat(behaviour: Behaviour) -> Nat {
        Nat::new(at(200, 0).ip(), behaviour)
    }

    /// Who of three reaches a host that sent to the first: the first, another port of it, another address.
    fn let_in(behaviour: Behaviour) -> [bool; 3] {
        let (mut nat, now) = (nat(behaviour), Instant::now());
        let port = nat.outbound(inside(), at(1, 1), now).port();
        [at(1, 1), at(1, 2), at(2, 1)].map(|from| nat.inbound(from, port, now) == Some(inside()))
    }

    #[test]
    fn each_filter_lets_in_what_it_is_named_for() {
        assert_eq!(let_in(Behaviour::FULL_CONE), [true, true, true]);
        assert_eq!(let_in(Behaviour::ADDRESS_RESTRICTED), [true, true, false]);
        assert_eq!(let_in(Behaviour::PORT_RESTRICTED), [true, false, false]);
        assert_eq!(let_in(Behaviour::SYMMETRIC), [true, false, false]);
    }

    #[test]
    fn only_a_symmetric_nat_shows_two_addresses() {
        let now = Instant::now();
        for behaviour in [Behaviour::FULL_CONE, Behaviour::ADDRESS_RESTRICTED, Behaviour::PORT_RESTRICTED] {
            let mut nat = nat(behaviour);
            assert_eq!(nat.outbound(inside(), at(1, 1), now), nat.outbound(inside(), at(2, 1), now));
        }
        let mut nat = nat(Behaviour::SYMMETRIC);
        let first = nat.outbound(inside(), at(1, 1), now);
        assert_ne!(first, nat.outbound(inside(), at(1, 2), now));
        assert_eq!(first, nat.outbound(inside(), at(1, 1), now));
        assert_eq!(nat.mappings(now), 2);
    }

    #[test]
    fn what_goes_out_keeps_a_mapping_and_what_comes_in_does_not() {
        let mut now = Instant::now();
        let mut nat = nat(Behaviour::PORT_RESTRICTED);
        let first = nat.outbound(inside(), at(1, 1), now);
        for _ in 0..5 {
            now += Duration::from_secs(29);
            assert_eq!(nat.outbound(inside(), at(1, 1), now), first);
        }
        now += Duration::from_secs(29);
        assert!(nat.inbound(at(1, 1), first.port(), now).is_some());
        now += Duration::from_secs(1);
        assert!(nat.inbound(at(1, 1), first.port(), now).is_none());
        assert_ne!(nat.outbound(inside(), at(1, 1), now), first, "a lost mapping does not come back");
        nat.reboot();
        assert_eq!(nat.mappings(now), 0);
    }
}
