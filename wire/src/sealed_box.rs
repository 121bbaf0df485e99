//! A box that only the holder of an ed25519 key can open: X25519 with a fresh key, ChaCha20-Poly1305, as libsodium's `crypto_box_seal`.
//!
//! It says nothing of who made it: what carries a box is signed. Invariant: each box has a key of its own, so its nonce is zero.
//!
//! Layout: `fresh X25519 public key (32) | ciphertext | tag (16)`. The key of the box is BLAKE2s-256 of
//! `"weft sealed box v1" 0 | shared secret | fresh public key | the receiver's ed25519 public key`. Both ed25519 keys are used as
//! X25519 keys by the birational map of RFC 7748 s4.1.

use blake2::{Blake2s256, Digest};
use chacha20poly1305::aead::{Aead, KeyInit};
use chacha20poly1305::{ChaCha20Poly1305, Nonce};
use ed25519_dalek::{SigningKey, VerifyingKey};
use x25519_dalek::{PublicKey as Point, SharedSecret, StaticSecret};
use zeroize::Zeroizing;

use crate::types::PublicKey;

const DOMAIN: &[u8] = b"weft sealed box v1\0";
const POINT: usize = 32;

/// Seals `content` for a key; `fresh` comes from a cryptographic random number generator and is used once.
///
/// Returns nothing where `to` is no point of the curve, or a weak one.
pub fn seal(to: &PublicKey, fresh: [u8; 32], content: &[u8]) -> Option<Vec<u8>> {
    let point = VerifyingKey::from_bytes(&to.0).ok().filter(|key| !key.is_weak())?;
    let secret = StaticSecret::from(fresh);
    let public = Point::from(&secret);
    let shared = secret.diffie_hellman(&Point::from(point.to_montgomery().to_bytes()));
    let sealed = cipher(&shared, &public, to)?.encrypt(&Nonce::default(), content).ok()?;
    Some([&public.as_bytes()[..], &sealed].concat())
}

/// Opens what was sealed for this key; nothing for anything else.
pub(crate) fn open(key: &SigningKey, sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (public, sealed) = sealed.split_first_chunk::<POINT>()?;
    let public = Point::from(*public);
    let secret = StaticSecret::from(key.to_scalar_bytes());
    let own = PublicKey(key.verifying_key().to_bytes());
    let cipher = cipher(&secret.diffie_hellman(&public), &public, &own)?;
    cipher.decrypt(&Nonce::default(), sealed).ok().map(Zeroizing::new)
}

fn cipher(shared: &SharedSecret, fresh: &Point, to: &PublicKey) -> Option<ChaCha20Poly1305> {
    let hash = Blake2s256::new()
        .chain_update(DOMAIN)
        .chain_update(shared.as_bytes())
        .chain_update(fresh.as_bytes())
        .chain_update(to.0)
        .finalize();
    shared.was_contributory().then(|| ChaCha20Poly1305::new(&hash))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(secret: u8) -> SigningKey {
        SigningKey::from_bytes(&[secret; 32])
    }

    fn public(secret: u8) -> PublicKey {
        PublicKey(key(secret).verifying_key().to_bytes())
    }

    proptest! {
        #[test]
        fn only_the_receiver_opens_a_box_and_no_bit_of_it_can_change(
            fresh: [u8; 32],
            content in prop::collection::vec(any::<u8>(), 0..600),
            bit in any::<prop::sample::Index>(),
        ) {
            let sealed = seal(&public(1), fresh, &content).expect("a key");
            let opened = open(&key(1), &sealed).map(|content| content.to_vec());
            prop_assert_eq!(opened, Some(content));
            prop_assert!(open(&key(2), &sealed).is_none());
            let mut changed = sealed.clone();
            let bit = bit.index(sealed.len() * 8);
            changed[bit / 8] ^= 1 << (bit % 8);
            // The highest bit of an X25519 public key is ignored (RFC 7748 s5), but it is hashed.
            prop_assert!(open(&key(1), &changed).is_none());
        }

        #[test]
        fn any_bytes_open_to_nothing(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(open(&key(1), &bytes).is_none());
        }
    }

    #[test]
    fn a_box_has_one_encoding() {
        let mut sealed = seal(&public(1), [7; 32], b"secret").expect("a key");
        // The bit that X25519 ignores.
        sealed[POINT - 1] ^= 0x80;
        assert!(open(&key(1), &sealed).is_none());
    }

    #[test]
    fn a_box_of_a_weak_fresh_key_does_not_open() {
        // With such a key the shared secret is zero whoever opens it.
        let (zero, to) = ([0; POINT], public(1));
        let hash =
            Blake2s256::new().chain_update(DOMAIN).chain_update(zero).chain_update(zero).chain_update(to.0);
        let cipher = ChaCha20Poly1305::new(&hash.finalize());
        let sealed = cipher.encrypt(&Nonce::default(), &b"no secret"[..]).expect("short");
        assert!(open(&key(1), &[&zero[..], &sealed].concat()).is_none());
    }

    #[test]
    fn nothing_is_sealed_for_a_weak_key() {
        assert!(seal(&PublicKey([0; 32]), [1; 32], b"secret").is_none());
        let identity = std::array::from_fn(|place| u8::from(place == 0));
        assert!(seal(&PublicKey(identity), [1; 32], b"secret").is_none());
    }
}
