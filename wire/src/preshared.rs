//! The secret that a pair of nodes mixes into the handshakes of its tunnel (WireGuard whitepaper s5.2), made from a cluster
//! key: so that traffic which is recorded today and whose X25519 is broken one day stays closed while the cluster key is.
//!
//! Nodes of two sites mix the secret of their sites into it ([`crate::pair`]), which no third site has. It crosses no wire: what a
//! node says of it in its record is the ids of its cluster keys and of its secrets of sites. Invariants: both nodes of a pair
//! find the same from the same two records; no two pairs, and no two keys of a node, have one secret.

use std::fmt;

use blake2::Blake2sMac256;
use blake2::digest::{FixedOutput, KeyInit, Update};
use zeroize::Zeroizing;

use crate::pair::PairSecret;
use crate::seal::{KeyId, KeyRing};
use crate::types::TunnelKey;

const DOMAIN: &[u8] = b"weft tunnel preshared v1\0";
const PAIR_DOMAIN: &[u8] = b"weft tunnel preshared of two sites v1\0";

/// A secret of a pair of tunnel keys.
#[derive(Clone, PartialEq, Eq)]
pub struct PresharedKey {
    /// The cluster key that it is made from.
    pub from: KeyId,
    /// The secret of two sites that is mixed in, if any.
    pub pair: Option<KeyId>,
    bytes: Zeroizing<[u8; 32]>,
}

impl PresharedKey {
    /// Makes the secret of a node's tunnel key and its peer's, in either order, from the cluster key of `ring` that both
    /// know and prefer: `theirs` are the ids that the peer announces, the sealing key's first. Nothing where no key is common.
    ///
    /// While a ring changes node by node, the key changes once both have the new one, and at the latest when one of them
    /// no longer has the old one.
    pub fn of_pair(ring: &KeyRing, theirs: &[KeyId], one: TunnelKey, other: TunnelKey) -> Option<Self> {
        let common = ring.keys().enumerate().filter_map(|(place, key)| {
            let id = key.id();
            let there = theirs.iter().position(|theirs| *theirs == id)?;
            // Which of two that are liked equally is all the same, so long as both nodes take it.
            Some(((place + there, id), key))
        });
        let ((_, from), key) = common.min_by_key(|(rank, _)| *rank)?;
        let (first, second) = (one.min(other), one.max(other));
        let bytes = Blake2sMac256::new(key.secret().into())
            .chain(DOMAIN)
            .chain(first.0)
            .chain(second.0)
            .finalize_fixed();
        Some(Self { from, pair: None, bytes: Zeroizing::new(bytes.into()) })
    }

    /// Mixes in the secret of the two sites: whoever lacks it, or the cluster key, knows nothing of what comes out.
    #[must_use]
    pub fn mixed_with(self, pair: &PairSecret) -> Self {
        let bytes =
            Blake2sMac256::new(pair.secret().into()).chain(PAIR_DOMAIN).chain(*self.bytes).finalize_fixed();
        Self { pair: Some(pair.id()), bytes: Zeroizing::new(bytes.into()), ..self }
    }

    /// Returns the secret, for the implementation of WireGuard.
    pub fn secret(&self) -> &[u8; 32] {
        &self.bytes
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pair = self.pair.map(|pair| format!(" and {pair}")).unwrap_or_default();
        write!(f, "PresharedKey(from {}{pair})", self.from)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::subsequence;

    use super::*;
    use crate::seal::ClusterKey;

    fn ring(keys: &[u8]) -> KeyRing {
        KeyRing::new(keys.iter().map(|byte| ClusterKey::from_bytes([*byte; 32])).collect()).expect("a ring")
    }

    fn ids(ring: &KeyRing) -> Vec<KeyId> {
        ring.ids().collect()
    }

    fn pair(one: &KeyRing, other: &KeyRing) -> Option<PresharedKey> {
        PresharedKey::of_pair(one, &ids(other), TunnelKey([1; 32]), TunnelKey([2; 32]))
    }

    fn arb_ring() -> impl Strategy<Value = KeyRing> {
        subsequence((1..=16).collect::<Vec<u8>>(), 1..=16).prop_shuffle().prop_map(|keys| ring(&keys))
    }

    proptest! {
        #[test]
        fn both_nodes_of_a_pair_find_the_same(one in arb_ring(), other in arb_ring(), a: [u8; 32], b: [u8; 32]) {
            let (a, b) = (TunnelKey(a), TunnelKey(b));
            let found = PresharedKey::of_pair(&one, &ids(&other), a, b);
            prop_assert_eq!(&found, &PresharedKey::of_pair(&other, &ids(&one), b, a));
            let common = one.ids().any(|id| other.ids().any(|theirs| theirs == id));
            prop_assert_eq!(found.is_some(), common);
        }
    }

    #[test]
    fn a_cluster_key_gives_way_to_the_next_without_a_pair_in_between_that_has_none() {
        let (old, both, turned, new) = (ring(&[1]), ring(&[1, 2]), ring(&[2, 1]), ring(&[2]));
        let [first, second] = [1, 2].map(|byte| ClusterKey::from_bytes([byte; 32]).id());
        let from = |one, other| pair(one, other).map(|key| key.from);
        assert_eq!(from(&old, &both), Some(first), "only one knows the new key");
        assert_eq!(from(&both, &both), Some(first), "no one prefers it");
        assert!(from(&both, &turned).is_some());
        assert_eq!(from(&turned, &turned), Some(second), "both prefer it");
        assert_eq!(from(&turned, &new), Some(second), "one forgot the old one");
        assert_eq!(from(&old, &new), None);
    }

    #[test]
    fn every_pair_and_every_cluster_key_has_a_secret_of_its_own() {
        let keys = [1, 2, 3].map(|byte| TunnelKey([byte; 32]));
        let mut seen = std::collections::BTreeSet::new();
        for ring in [ring(&[1]), ring(&[2])] {
            for (one, other) in [(0, 1), (0, 2), (1, 2)] {
                let key = PresharedKey::of_pair(&ring, &ids(&ring), keys[one], keys[other]).expect("common");
                assert!(seen.insert(*key.secret()));
                assert!(!format!("{key:?}").contains(&format!("{:?}", key.secret())));
            }
        }
    }

    #[test]
    fn the_secret_of_two_sites_gives_another_one_for_each_pair_of_nodes_and_each_generation() {
        let keys = [1, 2, 3].map(|byte| TunnelKey([byte; 32]));
        let mut seen = std::collections::BTreeSet::new();
        for (one, other) in [(0, 1), (0, 2), (1, 2)] {
            let ring = ring(&[1]);
            let alone = PresharedKey::of_pair(&ring, &ids(&ring), keys[one], keys[other]).expect("common");
            assert!(seen.insert(*alone.secret()));
            for (generation, byte) in [(1, 1), (2, 1), (2, 2)] {
                let pair = PairSecret::new(generation, [byte; 32]);
                let mixed = alone.clone().mixed_with(&pair);
                assert_eq!((mixed.from, mixed.pair), (alone.from, Some(pair.id())));
                // A generation is told apart by its bytes, which are drawn anew.
                assert_eq!(seen.insert(*mixed.secret()), (generation, byte) != (2, 1));
            }
        }
    }

    /// Made with Python's hashlib.blake2s(key=...), an implementation that is not this one.
    #[test]
    fn the_secret_of_two_sites_keys_blake2s_of_the_one_from_the_cluster_key() {
        let key = pair(&ring(&[7]), &ring(&[7])).expect("common").mixed_with(&PairSecret::new(1, [9; 32]));
        assert_eq!(
            crate::types::to_hex(key.secret()),
            "0a2749969263bddafd33c17926935406196b4f56661c24db2564c5762c91cda2"
        );
    }

    /// Made with Python's hashlib.blake2s(key=...), an implementation that is not this one.
    #[test]
    fn the_secret_is_keyed_blake2s_of_the_sorted_tunnel_keys() {
        let key = pair(&ring(&[7]), &ring(&[7])).expect("common");
        assert_eq!(
            crate::types::to_hex(key.secret()),
            "7b313112ae1988700977b9cbcebc77eabbee9b72cb6318800901aa9f37dcbbe2"
        );
    }
}
