//! A node's secret key, its file, and how one key vouches for the next.

use std::fmt;

use ed25519_dalek::{Signer, SigningKey};
use zeroize::Zeroizing;

use super::{Endorsement, MAX_ENDORSEMENTS, SIGNATURE};
use crate::types::{NodeName, PublicKey, from_hex, to_hex};

const ENDORSEMENT_DOMAIN: &[u8] = b"weft key endorsement v1\0";

/// A node's secret signing key, with the endorsements by the keys before it.
#[derive(Clone)]
pub struct NodeKey {
    pub(super) secret: SigningKey,
    pub(super) endorsements: Vec<Endorsement>,
}

impl NodeKey {
    /// Takes 32 bytes from a cryptographic random number generator.
    pub fn from_secret(secret: [u8; 32]) -> Self {
        Self { secret: SigningKey::from_bytes(&Zeroizing::new(secret)), endorsements: Vec::new() }
    }

    /// Returns the public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.secret.verifying_key().to_bytes())
    }

    /// Returns the same key, endorsed by `old` (and what endorsed that) as the next key of `node`.
    pub fn endorsed_by(mut self, old: &Self, cluster: &str, node: &NodeName) -> Self {
        let statement = endorsement_statement(cluster, node.as_str(), &self.public());
        let signature = old.secret.sign(&statement).to_bytes();
        self.endorsements = vec![Endorsement { key: old.public(), signature }];
        self.endorsements.extend(old.endorsements.iter().take(MAX_ENDORSEMENTS - 1).cloned());
        self
    }

    /// Opens what was sealed for this key.
    pub(crate) fn open(&self, sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        crate::sealed_box::open(&self.secret, sealed)
    }

    /// Signs `content` beside the domain.
    pub(crate) fn sign_bytes(&self, domain: &[u8], content: &[u8]) -> [u8; SIGNATURE] {
        self.secret.sign(&[domain, content].concat()).to_bytes()
    }

    /// Returns whether this key follows `earlier` through its endorsements.
    pub(crate) fn follows(&self, earlier: &PublicKey) -> bool {
        self.endorsements.iter().any(|endorsement| endorsement.key == *earlier)
    }

    /// Returns the keys that this one follows, the latest first.
    pub fn predecessors(&self) -> impl Iterator<Item = PublicKey> {
        self.endorsements.iter().map(|endorsement| endorsement.key)
    }

    /// Writes the secret and its endorsements, for a file that only root reads: one line of hexadecimal
    /// digits for the secret, then one line `KEY SIGNATURE` for each endorsement, the latest first.
    pub fn to_secret_text(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(to_hex(self.secret.as_bytes()));
        text.push('\n');
        for endorsement in &self.endorsements {
            text.push_str(&format!("{} {}\n", endorsement.key, to_hex(&endorsement.signature)));
        }
        text
    }

    /// Reads what [`NodeKey::to_secret_text`] wrote; endorsements are checked by those who receive them.
    pub fn from_secret_text(text: &str) -> Result<Self, NodeKeyError> {
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let secret = Zeroizing::new(lines.next().and_then(from_hex::<32>).ok_or(NodeKeyError)?);
        let endorsements = lines
            .map(|line| {
                let (key, signature) = line.split_once(' ').ok_or(NodeKeyError)?;
                Ok(Endorsement {
                    key: key.parse().map_err(|_| NodeKeyError)?,
                    signature: from_hex(signature).ok_or(NodeKeyError)?,
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        if endorsements.len() > MAX_ENDORSEMENTS {
            return Err(NodeKeyError);
        }
        Ok(Self { secret: SigningKey::from_bytes(&secret), endorsements })
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeKey({:?})", self.public())
    }
}

/// A text that is no node key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a node key file has 64 hexadecimal digits in its first line and at most {MAX_ENDORSEMENTS} endorsements after it"
)]
pub struct NodeKeyError;

/// What an earlier key signs for the next one.
pub(super) fn endorsement_statement(cluster: &str, node: &str, next: &PublicKey) -> Vec<u8> {
    let length = (cluster.len() as u64).to_be_bytes();
    [ENDORSEMENT_DOMAIN, &length, cluster.as_bytes(), &next.0, node.as_bytes()].concat()
}
