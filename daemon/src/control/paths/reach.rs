//! What peers see of this node, and what that says of the translator before it (RFC 4787 s4.1). Pure.
//!
//! Invariant: what nobody has seen for a while is not announced.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use weft_wire::mesh::{TunnelMapping, TunnelReach};
use weft_wire::types::NodeName;

/// A word counts for so long; peers repeat theirs.
const VALID: Duration = Duration::from_secs(600);
/// So many words are remembered.
const MOST: usize = 16;

/// Where peers see this node's packets come from.
#[derive(Debug, Default)]
pub struct Observations {
    seen: BTreeMap<NodeName, (SocketAddr, Instant)>,
}

impl Observations {
    /// Takes a peer's word.
    pub fn take(&mut self, from: &NodeName, endpoint: SocketAddr, now: Instant) {
        if self.seen.len() >= MOST && !self.seen.contains_key(from) {
            let oldest = self.seen.iter().min_by_key(|(_, (_, at))| *at).map(|(node, _)| node.clone());
            if let Some(node) = oldest {
                self.seen.remove(&node);
            }
        }
        self.seen.insert(from.clone(), (endpoint, now));
    }

    /// Forgets the words of who is no peer any more, and old ones.
    pub fn expire(&mut self, peers: &BTreeSet<&NodeName>, now: Instant) {
        self.seen.retain(|node, (_, at)| peers.contains(node) && now.duration_since(*at) < VALID);
    }

    /// Returns what the words amount to, for a node whose tunnels are at these places of its own.
    pub fn reach(&self, own: &[SocketAddr]) -> TunnelReach {
        let mut reach = TunnelReach::default();
        let mut kinds = BTreeSet::new();
        for v4 in [true, false] {
            let mut words: Vec<_> =
                self.seen.values().filter(|(endpoint, _)| endpoint.is_ipv4() == v4).collect();
            words.sort_by_key(|(_, at)| *at);
            let translated: Vec<_> = words.iter().filter(|(endpoint, _)| !own.contains(endpoint)).collect();
            let Some((latest, _)) = translated.last() else {
                kinds.extend((!words.is_empty()).then_some(Kind::None));
                continue;
            };
            reach.reflexive.push(*latest);
            let places: BTreeSet<_> = translated.iter().map(|(endpoint, _)| endpoint).collect();
            kinds.insert(match (places.len(), translated.len()) {
                (1, 1) => Kind::Unknown,
                (1, _) => Kind::Independent,
                _ => Kind::Dependent,
            });
        }
        reach.mapping = match kinds.last() {
            None | Some(Kind::Unknown) => TunnelMapping::Unknown,
            Some(Kind::None) => TunnelMapping::None,
            Some(Kind::Independent) => TunnelMapping::Independent,
            Some(Kind::Dependent) => TunnelMapping::Dependent,
        };
        reach
    }
}

/// The worst of the families counts.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    None,
    Unknown,
    Independent,
    Dependent,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    fn reach(words: &[(&str, &str)]) -> TunnelReach {
        let (mut observations, now) = (Observations::default(), Instant::now());
        for (place, (from, endpoint)) in words.iter().enumerate() {
            let now = now + Duration::from_secs(place as u64);
            observations.take(&from.parse().expect("a name"), at(endpoint), now);
        }
        observations.reach(&[at("198.51.100.2:51820"), at("[2001:db8::2]:51820")])
    }

    #[test]
    fn two_observers_tell_whether_the_mapping_depends_on_the_destination() {
        assert_eq!(reach(&[]), TunnelReach::default());
        let open = reach(&[("a", "198.51.100.2:51820")]);
        assert_eq!((open.mapping, open.reflexive), (TunnelMapping::None, vec![]));
        let one = reach(&[("a", "192.0.2.201:40000")]);
        assert_eq!(
            (one.mapping, &one.reflexive[..]),
            (TunnelMapping::Unknown, &[at("192.0.2.201:40000")][..])
        );
        let same = reach(&[("a", "192.0.2.201:40000"), ("b", "192.0.2.201:40000")]);
        assert_eq!(same.mapping, TunnelMapping::Independent);
        let other = reach(&[("a", "192.0.2.201:40000"), ("b", "192.0.2.201:40001")]);
        assert_eq!(
            (other.mapping, &other.reflexive[..]),
            (TunnelMapping::Dependent, &[at("192.0.2.201:40001")][..])
        );
    }

    #[test]
    fn a_family_that_is_not_translated_is_not_announced_twice() {
        let both = reach(&[("a", "192.0.2.201:40000"), ("b", "[2001:db8::2]:51820")]);
        assert_eq!(both.reflexive, [at("192.0.2.201:40000")]);
    }

    #[test]
    fn a_word_is_withdrawn_when_it_is_old_or_its_observer_is_gone() {
        let (mut observations, now) = (Observations::default(), Instant::now());
        let node: NodeName = "a".parse().expect("a name");
        observations.take(&node, at("192.0.2.201:40000"), now);
        observations.expire(&BTreeSet::from([&node]), now + VALID / 2);
        assert_eq!(observations.reach(&[]).reflexive.len(), 1);
        observations.expire(&BTreeSet::from([&node]), now + VALID);
        assert_eq!(observations.reach(&[]), TunnelReach::default());
        observations.take(&node, at("192.0.2.201:40000"), now);
        observations.expire(&BTreeSet::new(), now);
        assert_eq!(observations.reach(&[]), TunnelReach::default());
    }

    #[test]
    fn no_number_of_observers_fills_the_memory() {
        let (mut observations, now) = (Observations::default(), Instant::now());
        for number in 0..100 {
            let node = format!("n{number}").parse().expect("a name");
            observations.take(&node, at("192.0.2.201:40000"), now + Duration::from_secs(number));
        }
        assert_eq!(observations.seen.len(), MOST);
    }
}
