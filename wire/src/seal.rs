//! The datagram envelope: a version byte, a key id, a nonce and an XChaCha20-Poly1305 box.
//!
//! It proves that the sender holds a key of the cluster's ring and means this cluster. It does not say
//! which node sent the datagram, nor that it is fresh: signatures (`record`) and the replay window
//! (`mesh::contact`) do. Invariant: no envelope is longer than [`MAX_DATAGRAM`], and opening one never panics.
//!
//! Layout: `version (1) | key id (4) | nonce (24) | ciphertext | tag (16)`. The additional data are
//! `"weft mesh v1" 0 | cluster id | 0 | version | key id | nonce`.

use std::fmt;
use std::str::FromStr;

use blake2::{Blake2s256, Digest};
use chacha20poly1305::aead::{AeadInPlace, KeyInit};
use chacha20poly1305::{Tag, XChaCha20Poly1305, XNonce};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::types::{KeyError, from_hex, to_hex};

/// The most bytes of a sealed datagram, envelope included: fits every path of IPv6's minimum MTU
/// (1,280) with room for an IPv6 and a UDP header and one layer of encapsulation.
pub const MAX_DATAGRAM: usize = 1200;
/// What the envelope adds to the content, in bytes.
pub const OVERHEAD: usize = HEADER + TAG;
/// The most bytes of content in one datagram.
pub const MAX_CONTENT: usize = MAX_DATAGRAM - OVERHEAD;
/// The most keys in a ring.
pub const MAX_KEYS: usize = 16;

const VERSION: u8 = 1;
const KEY_ID: usize = 4;
const NONCE: usize = 24;
const HEADER: usize = 1 + KEY_ID + NONCE;
const TAG: usize = 16;

/// A secret of 32 bytes that all nodes of a cluster share.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey(Zeroizing<[u8; 32]>);

impl ClusterKey {
    /// Takes 32 bytes from a cryptographic random number generator.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Returns the short public name of the key: a hash, safe to print.
    pub fn id(&self) -> KeyId {
        let hash = Blake2s256::new().chain_update(b"weft key id v1\0").chain_update(*self.0).finalize();
        KeyId([hash[0], hash[1], hash[2], hash[3]])
    }

    pub(crate) fn secret(&self) -> &[u8; 32] {
        &self.0
    }

    /// Writes the secret as 64 hexadecimal digits, for the key file.
    pub fn to_secret_text(&self) -> String {
        to_hex(&*self.0)
    }
}

impl FromStr for ClusterKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        from_hex(text).map(Self::from_bytes).ok_or(KeyError)
    }
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterKey({})", self.id())
    }
}

/// The first four bytes of a hash of a cluster key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct KeyId(pub [u8; 4]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&to_hex(&self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The cluster keys that a node knows: the first seals, every one opens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyRing {
    keys: Vec<(KeyId, ClusterKey)>,
}

/// Names a ring that is wanted everywhere: no two have one name, and of those that sites give each other the later is the higher.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RingName {
    /// What sites count their rings by; 0 for a ring that does not come from a site.
    pub version: u64,
    /// A hash of the keys and their order.
    pub tag: u64,
}

impl RingName {
    /// Names a ring.
    pub fn of(version: u64, ring: &KeyRing) -> Self {
        Self { version, tag: ring.tag() }
    }
}

/// A list of keys that makes no ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyRingError {
    /// There is no key.
    #[error("the cluster key ring is empty; `weft genkey` prints a new key")]
    Empty,
    /// There are more than [`MAX_KEYS`] keys.
    #[error("the cluster key ring has more than {MAX_KEYS} keys; remove those that no node uses")]
    TooMany,
    /// A key occurs twice, or two keys share an id.
    #[error("the cluster key ring has key {0} twice; remove one of them")]
    Duplicate(KeyId),
}

impl KeyRing {
    /// Makes a ring; the first key seals.
    pub fn new(keys: Vec<ClusterKey>) -> Result<Self, KeyRingError> {
        if keys.len() > MAX_KEYS {
            return Err(KeyRingError::TooMany);
        }
        let keys: Vec<_> = keys.into_iter().map(|key| (key.id(), key)).collect();
        for (place, (id, _)) in keys.iter().enumerate() {
            if keys[..place].iter().any(|(earlier, _)| earlier == id) {
                return Err(KeyRingError::Duplicate(*id));
            }
        }
        if keys.is_empty() { Err(KeyRingError::Empty) } else { Ok(Self { keys }) }
    }

    /// Returns the ids, the sealing key's first.
    pub fn ids(&self) -> impl Iterator<Item = KeyId> + '_ {
        self.keys.iter().map(|(id, _)| *id)
    }

    /// Returns the id of the sealing key.
    pub fn first(&self) -> KeyId {
        self.keys[0].0
    }

    /// Returns whether a key is in the ring.
    pub fn has(&self, id: KeyId) -> bool {
        self.keys.iter().any(|(known, _)| *known == id)
    }

    /// Returns the keys, the sealing key first.
    pub fn keys(&self) -> impl Iterator<Item = &ClusterKey> + '_ {
        self.keys.iter().map(|(_, key)| key)
    }

    /// Writes the secrets one after another, for a sealed box.
    pub(crate) fn to_secret_bytes(&self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(self.keys().flat_map(|key| *key.0).collect())
    }

    /// Reads what [`KeyRing::to_secret_bytes`] wrote.
    pub(crate) fn from_secret_bytes(bytes: &[u8]) -> Option<Self> {
        let (keys, rest) = bytes.as_chunks::<32>();
        let ring = Self::new(keys.iter().map(|key| ClusterKey::from_bytes(*key)).collect());
        ring.ok().filter(|_| rest.is_empty())
    }

    /// Returns a hash of all keys and their order: tells two rings apart, and nothing of the keys.
    pub(crate) fn tag(&self) -> u64 {
        let hash = Blake2s256::new()
            .chain_update(b"weft key ring v1\0")
            .chain_update(self.to_secret_bytes())
            .finalize();
        u64::from_be_bytes(hash[..8].try_into().expect("a hash has 32 bytes"))
    }

    /// Seals `content` under the first key. `nonce` must be fresh and random.
    ///
    /// # Panics
    /// When `content` is longer than [`MAX_CONTENT`]: the caller packs to that budget.
    pub fn seal(&self, cluster: &str, nonce: [u8; 24], content: &[u8]) -> Vec<u8> {
        self.seal_with(self.first(), cluster, nonce, content)
    }

    /// Seals `content` under a key of the ring, the first where it is in it no more. `nonce` must be fresh and random.
    ///
    /// # Panics
    /// As [`KeyRing::seal`].
    pub fn seal_with(&self, id: KeyId, cluster: &str, nonce: [u8; 24], content: &[u8]) -> Vec<u8> {
        assert!(content.len() <= MAX_CONTENT, "the content keeps the budget");
        let (id, key) = self.keys.iter().find(|(known, _)| *known == id).unwrap_or(&self.keys[0]);
        let mut datagram = Vec::with_capacity(content.len() + OVERHEAD);
        datagram.push(VERSION);
        datagram.extend_from_slice(&id.0);
        datagram.extend_from_slice(&nonce);
        let aad = additional_data(cluster, &datagram);
        datagram.extend_from_slice(content);
        let tag = XChaCha20Poly1305::new((&*key.0).into())
            .encrypt_in_place_detached(XNonce::from_slice(&nonce), &aad, &mut datagram[HEADER..])
            .expect("a datagram is far below the cipher's length limit");
        datagram.extend_from_slice(&tag);
        datagram
    }

    /// Opens a datagram with the key it names and returns its content.
    pub fn open(&self, cluster: &str, datagram: &[u8]) -> Result<Vec<u8>, OpenError> {
        if datagram.len() > MAX_DATAGRAM {
            return Err(OpenError::TooLong);
        }
        if datagram.len() < OVERHEAD {
            return Err(OpenError::Truncated);
        }
        if datagram[0] != VERSION {
            return Err(OpenError::Version(datagram[0]));
        }
        let id = key_id(datagram).ok_or(OpenError::Truncated)?;
        let key = self.keys.iter().find(|(known, _)| *known == id).ok_or(OpenError::UnknownKey)?;
        let (header, rest) = datagram.split_at(HEADER);
        let (content, tag) = rest.split_at(rest.len() - TAG);
        let mut content = content.to_vec();
        XChaCha20Poly1305::new((&*key.1.0).into())
            .decrypt_in_place_detached(
                XNonce::from_slice(&header[1 + KEY_ID..]),
                &additional_data(cluster, header),
                &mut content,
                Tag::from_slice(tag),
            )
            .map_err(|_| OpenError::Forged)?;
        Ok(content)
    }
}

/// Why a datagram does not open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Longer than [`MAX_DATAGRAM`].
    #[error("the datagram is longer than {MAX_DATAGRAM} bytes")]
    TooLong,
    /// Shorter than an empty envelope.
    #[error("the datagram is too short for an envelope")]
    Truncated,
    /// Another envelope version, or no weft datagram at all.
    #[error("envelope version {0} is not known")]
    Version(u8),
    /// Sealed with a key that is not in the ring.
    #[error("no key of the ring has the datagram's key id")]
    UnknownKey,
    /// Changed on its way, made up, or of another cluster.
    #[error("the datagram's seal does not hold")]
    Forged,
}

/// Returns the id of the key that a datagram says it is sealed with.
pub(crate) fn key_id(datagram: &[u8]) -> Option<KeyId> {
    datagram.get(1..)?.first_chunk().copied().map(KeyId)
}

fn additional_data(cluster: &str, header: &[u8]) -> Vec<u8> {
    [b"weft mesh v1\0", cluster.as_bytes(), b"\0", header].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(keys: &[u8]) -> KeyRing {
        KeyRing::new(keys.iter().map(|byte| ClusterKey::from_bytes([*byte; 32])).collect()).expect("a ring")
    }

    #[test]
    fn every_key_of_the_ring_opens_and_only_the_first_seals() {
        let sealed = ring(&[1]).seal("c", [7; 24], b"content");
        assert_eq!(ring(&[2, 1]).open("c", &sealed), Ok(b"content".to_vec()));
        let sealed = ring(&[2, 1]).seal("c", [7; 24], b"content");
        assert_eq!(ring(&[1]).open("c", &sealed), Err(OpenError::UnknownKey));
    }

    #[test]
    fn another_key_of_the_ring_seals_where_it_is_named() {
        let (second, unknown) = (ring(&[1]).first(), ring(&[3]).first());
        let sealed = ring(&[2, 1]).seal_with(second, "c", [7; 24], b"content");
        assert_eq!(ring(&[1]).open("c", &sealed), Ok(b"content".to_vec()));
        let sealed = ring(&[2, 1]).seal_with(unknown, "c", [7; 24], b"content");
        assert_eq!(ring(&[2]).open("c", &sealed), Ok(b"content".to_vec()));
    }

    #[test]
    fn no_bit_of_a_datagram_can_change() {
        let ring = ring(&[1]);
        let sealed = ring.seal("c", [7; 24], b"content");
        for bit in 0..sealed.len() * 8 {
            let mut forged = sealed.clone();
            forged[bit / 8] ^= 1 << (bit % 8);
            assert!(ring.open("c", &forged).is_err(), "bit {bit}");
        }
        for length in 0..sealed.len() {
            assert!(ring.open("c", &sealed[..length]).is_err(), "length {length}");
        }
        assert_eq!(ring.open("d", &sealed), Err(OpenError::Forged));
        assert_eq!(ring.open("c", &[1; 1201]), Err(OpenError::TooLong));
    }

    #[test]
    fn the_largest_content_fills_the_budget_exactly() {
        assert_eq!(ring(&[1]).seal("c", [0; 24], &[0; MAX_CONTENT]).len(), MAX_DATAGRAM);
    }

    #[test]
    fn a_ring_has_one_to_sixteen_different_keys() {
        assert_eq!(KeyRing::new(vec![]), Err(KeyRingError::Empty));
        let key = ClusterKey::from_bytes([1; 32]);
        assert_eq!(KeyRing::new(vec![key.clone(), key.clone()]), Err(KeyRingError::Duplicate(key.id())));
        let many = (0..17).map(|byte| ClusterKey::from_bytes([byte; 32])).collect();
        assert_eq!(KeyRing::new(many), Err(KeyRingError::TooMany));
    }

    #[test]
    fn debug_text_never_shows_the_secret() {
        let key = ClusterKey::from_bytes([0xab; 32]);
        assert!(!format!("{key:?}").contains("abab"));
        assert_eq!(key.to_secret_text().parse(), Ok(key));
    }
}
