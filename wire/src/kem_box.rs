//! A box that stays closed to whoever breaks X25519 one day: ML-KEM-768 (FIPS 203) with a key that is used once, ChaCha20-Poly1305.
//!
//! It says nothing of who made it or who asked for it: what carries a key or a box is signed. What is in a box is never all that a
//! tunnel relies on: WireGuard's own X25519 stands beside it, so breaking one of the two opens nothing. Invariant: each box has a key of its own,
//! so its nonce is zero.
//!
//! Layout: `ML-KEM ciphertext (1,088) | ciphertext | tag (16)`. The key of the box is BLAKE2s-256 of
//! `"weft kem box v1" 0 | shared secret | ML-KEM ciphertext | the receiver's encapsulation key`.

use blake2::{Blake2s256, Digest};
use chacha20poly1305::aead::{Aead, KeyInit};
use chacha20poly1305::{ChaCha20Poly1305, Nonce};
use ml_kem::kem::{Decapsulate, KeyExport};
use ml_kem::{Ciphertext, DecapsulationKey768, EncapsulationKey768, MlKem768};
use zeroize::Zeroizing;

const DOMAIN: &[u8] = b"weft kem box v1\0";
/// The bytes of an encapsulation key.
pub(crate) const KEY: usize = 1184;
const CIPHERTEXT: usize = 1088;

/// What a decapsulation key is made from: 64 bytes from a cryptographic random number generator, used for one box.
#[derive(Clone)]
pub(crate) struct Seed(pub(crate) Zeroizing<[u8; 64]>);

impl std::fmt::Debug for Seed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seed")
    }
}

impl Seed {
    fn key(&self) -> DecapsulationKey768 {
        DecapsulationKey768::from_seed((*self.0).into())
    }

    /// Returns the key that boxes for this one are sealed for.
    pub(crate) fn public(&self) -> Vec<u8> {
        self.key().encapsulation_key().to_bytes().to_vec()
    }

    /// Opens what was sealed for this key; nothing for anything else.
    pub(crate) fn open(&self, sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let (encapsulated, sealed) = sealed.split_first_chunk::<CIPHERTEXT>()?;
        let key = self.key();
        let shared = key.decapsulate(&Ciphertext::<MlKem768>::from(*encapsulated));
        let cipher = cipher(&shared, encapsulated, &key.encapsulation_key().to_bytes());
        cipher.decrypt(&Nonce::default(), sealed).ok().map(Zeroizing::new)
    }
}

/// Seals `content` for an encapsulation key; `fresh` comes from a cryptographic random number generator and is used once.
///
/// Returns nothing where `to` is no such key.
pub(crate) fn seal(to: &[u8], fresh: [u8; 32], content: &[u8]) -> Option<Vec<u8>> {
    let to: [u8; KEY] = to.try_into().ok()?;
    let key = EncapsulationKey768::new(&to.into()).ok()?;
    let (encapsulated, shared) = key.encapsulate_deterministic(&fresh.into());
    let sealed = cipher(&shared, &encapsulated, &to).encrypt(&Nonce::default(), content).ok()?;
    Some([&encapsulated[..], &sealed].concat())
}

fn cipher(shared: &[u8], encapsulated: &[u8], to: &[u8]) -> ChaCha20Poly1305 {
    let hash = Blake2s256::new()
        .chain_update(DOMAIN)
        .chain_update(shared)
        .chain_update(encapsulated)
        .chain_update(to)
        .finalize();
    ChaCha20Poly1305::new(&hash)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seed(byte: u8) -> Seed {
        Seed(Zeroizing::new([byte; 64]))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn only_the_receiver_opens_a_box_and_no_bit_of_it_can_change(
            fresh: [u8; 32],
            content in prop::collection::vec(any::<u8>(), 0..100),
            bit in any::<prop::sample::Index>(),
        ) {
            let sealed = seal(&seed(1).public(), fresh, &content).expect("a key");
            prop_assert_eq!(seed(1).open(&sealed).map(|content| content.to_vec()), Some(content));
            prop_assert!(seed(2).open(&sealed).is_none());
            let mut changed = sealed.clone();
            let bit = bit.index(sealed.len() * 8);
            changed[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(seed(1).open(&changed).is_none());
        }

        #[test]
        fn any_bytes_open_to_nothing(bytes in prop::collection::vec(any::<u8>(), 0..1400)) {
            prop_assert!(seed(1).open(&bytes).is_none());
        }
    }

    #[test]
    fn nothing_is_sealed_for_what_is_no_key() {
        assert!(seal(&[], [1; 32], b"secret").is_none());
        // A coefficient that is not below 3,329 (FIPS 203 s7.2).
        assert!(seal(&[0xff; KEY], [1; 32], b"secret").is_none());
        let key = seed(1).public();
        assert_eq!(key.len(), KEY);
        assert!(seal(&key[1..], [1; 32], b"secret").is_none());
    }
}
