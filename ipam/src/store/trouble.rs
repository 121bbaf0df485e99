//! What goes wrong between this node and a store behind a network: a sentence, and what follows from it.
//!
//! What may follow (`T`) is each store's own, and so are the sentences: `etcd/trouble.rs`, `kubernetes/trouble.rs`.

use std::fmt;

use tokio_rustls::rustls::CertificateError;

use super::{Entry, PutError, StoreError};

/// A failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trouble<T> {
    pub(super) then: T,
    pub(super) sentence: String,
}

impl<T> Trouble<T> {
    pub(super) fn new(then: T, sentence: impl Into<String>) -> Self {
        Self { then, sentence: sentence.into() }
    }
}

impl<T> fmt::Display for Trouble<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl<T> From<Trouble<T>> for StoreError {
    fn from(trouble: Trouble<T>) -> Self {
        Self(trouble.sentence)
    }
}

/// Why a write did not happen, or may not have.
pub(super) enum Failed<T> {
    Conflict(Option<Entry>),
    Trouble(Trouble<T>),
}

impl<T> From<Trouble<T>> for Failed<T> {
    fn from(trouble: Trouble<T>) -> Self {
        Self::Trouble(trouble)
    }
}

impl<T> From<Failed<T>> for PutError {
    fn from(failed: Failed<T>) -> Self {
        match failed {
            Failed::Conflict(entry) => Self::Conflict(entry),
            Failed::Trouble(trouble) => Self::Store(trouble.into()),
        }
    }
}

/// Says what is wrong with the certificate of a server (`etcd at URL`), where it is its time or its issuer; `ca` is where
/// the CA is configured.
pub(super) fn mistrusted(server: &str, ca: &str, error: &CertificateError) -> Option<String> {
    use CertificateError as Bad;
    let what = match error {
        Bad::Expired | Bad::ExpiredContext { .. } => {
            "has expired by this node's clock: renew it, or set the clock".to_owned()
        }
        Bad::NotValidYet | Bad::NotValidYetContext { .. } => {
            "is not valid yet by this node's clock: set the clock, or renew the certificate".to_owned()
        }
        Bad::UnknownIssuer | Bad::BadSignature => {
            format!("is not signed by the CA in {ca}: name the CA that signed it")
        }
        _ => return None,
    };
    Some(format!("the certificate of {server} {what}"))
}
