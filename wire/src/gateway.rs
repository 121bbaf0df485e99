//! Which gateway of a site carries what one of its nodes exchanges with another site.
//!
//! Both ends must say the same, since tunnels take a pod's packets from one peer only: the choice follows from what records
//! say and from nothing else. Highest random weight (Thaler and Ravishankar 1998): when a gateway comes or goes, only the nodes
//! that it carries move.

use blake2::{Blake2s256, Digest};

use crate::types::{NodeName, SiteName};

/// The most weight that a gateway can have.
pub const MAX_WEIGHT: u8 = 100;

/// Chooses among a site's gateways, each with its weight, for one of its nodes and another site. A gateway has a share of the
/// nodes in proportion to its weight; one of weight 0 is being drained, and chosen only where all are.
pub fn choose<'a>(
    gateways: impl IntoIterator<Item = (&'a NodeName, u8)>,
    node: &NodeName,
    other: &SiteName,
) -> Option<&'a NodeName> {
    let draws = gateways.into_iter().map(|(gateway, weight)| (draw(gateway, weight, node, other), gateway));
    draws.max().map(|(_, gateway)| gateway)
}

/// The best of as many draws as the gateway has weight; without weight it loses against everyone who has some.
fn draw(gateway: &NodeName, weight: u8, node: &NodeName, other: &SiteName) -> (bool, u64) {
    let mut hash = Blake2s256::new().chain_update(b"weft gateway v1\0");
    for name in [gateway.as_str(), node.as_str(), other.as_str()] {
        hash.update((name.len() as u64).to_be_bytes());
        hash.update(name);
    }
    let bytes: [u8; 32] = hash.finalize().into();
    let [first, ..] = bytes.as_chunks::<8>().0 else { return (false, 0) };
    let mut state = u64::from_be_bytes(*first);
    let draws = (0..weight.clamp(1, MAX_WEIGHT)).map(|_| {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    });
    (weight > 0, draws.max().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    /// Whom each of a thousand nodes gets.
    fn all(gateways: &[(&str, u8)]) -> Vec<String> {
        let gateways: Vec<_> = gateways.iter().map(|(gateway, weight)| (name(gateway), *weight)).collect();
        let other = "far".parse().unwrap();
        let of = |node: usize| {
            choose(gateways.iter().map(|(name, weight)| (name, *weight)), &name(&format!("n{node}")), &other)
        };
        (0..1000).map(|node| of(node).unwrap().to_string()).collect()
    }

    fn shares(chosen: &[String]) -> BTreeMap<&str, usize> {
        let mut shares = BTreeMap::new();
        chosen.iter().for_each(|gateway| *shares.entry(gateway.as_str()).or_default() += 1);
        shares
    }

    #[test]
    fn shares_follow_weights_whatever_the_order() {
        let chosen = all(&[("a", 20), ("b", 60), ("c", 20)]);
        let shares = shares(&chosen);
        assert!((150..250).contains(&shares["a"]) && (540..660).contains(&shares["b"]), "{shares:?}");
        assert_eq!(chosen, all(&[("c", 20), ("a", 20), ("b", 60)]));
    }

    #[test]
    fn only_the_nodes_of_a_gateway_that_goes_are_moved() {
        let (before, after) = (all(&[("a", 10), ("b", 10), ("c", 10)]), all(&[("a", 10), ("c", 10)]));
        for (before, after) in before.iter().zip(&after) {
            assert!(before == after || before == "b");
        }
    }

    #[test]
    fn a_drained_gateway_carries_nobody_unless_all_are() {
        assert_eq!(shares(&all(&[("a", 0), ("b", 1)])), BTreeMap::from([("b", 1000)]));
        assert_eq!(shares(&all(&[("a", 0), ("b", 0)])).len(), 2);
        assert_eq!(choose([], &name("n"), &"far".parse().unwrap()), None);
    }
}
