//! A secret that the nodes of two sites share and nobody else gets: mixed into the pre-shared keys of their tunnels.
//!
//! One of the two sites makes it ([`makes`]), and another from time to time; `mesh::pairs` brings it to the nodes. What a node says
//! of it in its record is its id. Invariants: of the secrets that two nodes both have they use the same one, whichever order
//! they came in; no text for people shows a secret.

use std::fmt;
use std::str::FromStr;

use blake2::{Blake2s256, Digest};
use zeroize::Zeroizing;

use crate::seal::KeyId;
use crate::types::{PublicKey, from_hex, to_hex};

/// The most secrets of one pair of sites that a node has: the present one, and those before while nodes go over.
pub const MAX_GENERATIONS: usize = 2;
/// The most ids of such secrets that a record names.
pub const MAX_PAIRS: usize = 64;

/// Returns whether the site of the first key makes the secrets that it shares with the site of the second.
pub fn makes(own: &PublicKey, other: &PublicKey) -> bool {
    own > other
}

/// A secret of a pair of sites.
#[derive(Clone, PartialEq, Eq)]
pub struct PairSecret {
    generation: u32,
    id: KeyId,
    bytes: Zeroizing<[u8; 32]>,
}

impl PairSecret {
    /// Takes 32 bytes from a cryptographic random number generator. A later secret of the pair has a higher generation.
    pub fn new(generation: u32, bytes: [u8; 32]) -> Self {
        let hash = Blake2s256::new()
            .chain_update(b"weft pair secret id v1\0")
            .chain_update(generation.to_be_bytes())
            .chain_update(bytes)
            .finalize();
        let id = KeyId([hash[0], hash[1], hash[2], hash[3]]);
        Self { generation, id, bytes: Zeroizing::new(bytes) }
    }

    /// Returns the short public name of the secret: a hash, safe to print.
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// Returns the generation.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    pub(crate) fn secret(&self) -> &[u8; 32] {
        &self.bytes
    }

    /// The same for everyone who compares two secrets of a pair.
    fn order(&self) -> (u32, KeyId) {
        (self.generation, self.id)
    }

    /// Writes the secret as its generation and 64 hexadecimal digits, for a file that only root reads.
    pub fn to_secret_text(&self) -> Zeroizing<String> {
        Zeroizing::new(format!("{} {}", self.generation, to_hex(&*self.bytes)))
    }

    /// Writes secrets one after another, for a box.
    pub(crate) fn all_to_bytes(secrets: &[Self]) -> Zeroizing<Vec<u8>> {
        let each = secrets.iter().flat_map(|secret| {
            secret.generation.to_be_bytes().into_iter().chain(secret.bytes.iter().copied())
        });
        Zeroizing::new(each.collect())
    }

    /// Reads what [`PairSecret::all_to_bytes`] wrote; nothing where there is none, or too many.
    pub(crate) fn all_from_bytes(bytes: &[u8]) -> Option<Vec<Self>> {
        let (each, []) = bytes.as_chunks::<36>() else { return None };
        let secret = |bytes: &[u8; 36]| {
            let (generation, secret) = bytes.split_first_chunk()?;
            Some(Self::new(u32::from_be_bytes(*generation), secret.try_into().ok()?))
        };
        let secrets = each.iter().map(secret).collect::<Option<Vec<_>>>()?;
        (1..=MAX_GENERATIONS).contains(&secrets.len()).then_some(secrets)
    }
}

/// A text that is no secret of a pair of sites.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a secret of two sites is a number and 64 hexadecimal digits")]
pub struct PairSecretError;

impl FromStr for PairSecret {
    type Err = PairSecretError;

    fn from_str(text: &str) -> Result<Self, PairSecretError> {
        let (generation, secret) = text.split_once(' ').ok_or(PairSecretError)?;
        let generation = generation.parse().map_err(|_| PairSecretError)?;
        Ok(Self::new(generation, from_hex(secret).ok_or(PairSecretError)?))
    }
}

impl fmt::Debug for PairSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PairSecret({} generation {})", self.id, self.generation)
    }
}

/// Adds secrets to those of a pair and keeps the latest of them, the latest first; returns whether anything changed.
pub(crate) fn merge(held: &mut Vec<PairSecret>, others: Vec<PairSecret>) -> bool {
    let before: Vec<KeyId> = held.iter().map(PairSecret::id).collect();
    for other in others {
        if held.iter().all(|known| known.id != other.id) {
            held.push(other);
        }
    }
    held.sort_by_key(|secret| std::cmp::Reverse(secret.order()));
    held.truncate(MAX_GENERATIONS);
    !held.iter().map(PairSecret::id).eq(before)
}

/// Returns the latest secret that two nodes of a pair of sites both have: `own` are this node's, the latest first, as far as it
/// announces them, and `theirs` the ids that the other announces.
pub fn common<'a>(own: &'a [PairSecret], theirs: &[KeyId]) -> Option<&'a PairSecret> {
    own.iter().find(|secret| theirs.contains(&secret.id))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::subsequence;

    use super::*;

    /// A secret of one of few generations, so that two of one generation differ.
    fn secret(number: u8) -> PairSecret {
        PairSecret::new(u32::from(number / 2), [number; 32])
    }

    fn arb_some() -> impl Strategy<Value = Vec<PairSecret>> {
        subsequence((0..12).collect::<Vec<u8>>(), 0..=12)
            .prop_shuffle()
            .prop_map(|numbers| numbers.into_iter().map(secret).collect())
    }

    fn merged(parts: &[&[PairSecret]]) -> Vec<PairSecret> {
        let mut held = Vec::new();
        for part in parts {
            merge(&mut held, part.to_vec());
        }
        held
    }

    fn ids(secrets: &[PairSecret]) -> Vec<KeyId> {
        secrets.iter().map(PairSecret::id).collect()
    }

    proptest! {
        #[test]
        fn merging_commutes_and_is_idempotent_and_keeps_the_latest(one in arb_some(), other in arb_some()) {
            let both = merged(&[&one, &other]);
            prop_assert_eq!(&both, &merged(&[&other, &one]));
            let mut again = both.clone();
            prop_assert!(!merge(&mut again, both.clone()));
            prop_assert!(both.len() <= MAX_GENERATIONS && both.is_sorted_by_key(|secret| std::cmp::Reverse(secret.order())));
            let latest = one.iter().chain(&other).map(PairSecret::order).max();
            prop_assert_eq!(both.first().map(PairSecret::order), latest);
        }

        #[test]
        fn both_nodes_of_a_pair_use_the_same_and_only_what_both_have(one in arb_some(), other in arb_some()) {
            let (one, other) = (merged(&[&one]), merged(&[&other]));
            let used = common(&one, &ids(&other));
            prop_assert_eq!(used, common(&other, &ids(&one)));
            prop_assert_eq!(used.is_some(), one.iter().any(|secret| other.contains(secret)));
        }

        #[test]
        fn texts_and_bytes_of_secrets_read_back(generation: u32, bytes: [u8; 32]) {
            let secret = PairSecret::new(generation, bytes);
            prop_assert_eq!(secret.to_secret_text().parse(), Ok(secret.clone()));
            let all = vec![secret.clone(), super::tests::secret(1)];
            prop_assert_eq!(PairSecret::all_from_bytes(&PairSecret::all_to_bytes(&all)), Some(all));
            let shown = format!("{secret:?}");
            prop_assert!(!shown.contains(&to_hex(&bytes)[..16]), "{}", shown);
        }

        #[test]
        fn of_two_sites_exactly_one_makes_their_secrets(one: [u8; 32], other: [u8; 32]) {
            let (one, other) = (PublicKey(one), PublicKey(other));
            prop_assert_eq!(makes(&one, &other) != makes(&other, &one), one != other);
        }
    }

    #[test]
    fn bytes_that_are_no_secrets_are_none() {
        for length in [0, 1, 35, 37, 36 * (MAX_GENERATIONS + 1)] {
            assert_eq!(PairSecret::all_from_bytes(&vec![0; length]), None, "{length}");
        }
        for text in ["", "1", "1 00", "x 00", "-1 aa"] {
            assert_eq!(text.parse::<PairSecret>(), Err(PairSecretError), "{text}");
        }
    }
}
