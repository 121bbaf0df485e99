//! What may go wrong between this node and etcd, as sentences that say what to do.

use std::error::Error;
use std::io;

use tokio_rustls::rustls::{AlertDescription, CertificateError, Error as TlsError};
use tonic::{Code, Status};

use super::access::{Endpoint, EtcdOptions};
use crate::store::cause::{deepest, find};
use crate::store::trouble::{self, mistrusted};

/// What follows from a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// Another member may do better.
    Elsewhere,
    /// The token is not valid any more; nothing was done.
    Login,
    /// The lease of etcd is gone; nothing was done.
    Lease,
    /// It is the same everywhere: only a person can help.
    Tell,
}

/// A failure.
pub(super) type Trouble = trouble::Trouble<Then>;

/// Why a write did not happen, or may not have.
pub(super) type Failed = trouble::Failed<Then>;

impl Trouble {
    pub(super) fn tell(sentence: impl Into<String>) -> Self {
        Self::new(Then::Tell, sentence)
    }

    pub(super) fn elsewhere(sentence: impl Into<String>) -> Self {
        Self::new(Then::Elsewhere, sentence)
    }

    /// A call or a connection that took too long.
    pub(super) fn late(endpoint: &Endpoint, bound: std::time::Duration) -> Self {
        Self::elsewhere(format!(
            "etcd at {endpoint} did not answer within {} s: look at `etcdctl endpoint status --cluster`",
            bound.as_secs()
        ))
    }

    /// Endpoints of two clusters of etcd.
    pub(super) fn two_clusters(one: (&Endpoint, u64), other: (&Endpoint, u64)) -> Self {
        Self::tell(format!(
            "{} is of the etcd cluster {:x} and {} of {:x}: let store.endpoints name members of one cluster, the same on every node",
            one.0, one.1, other.0, other.1
        ))
    }

    /// A connection that could not be made.
    pub(super) fn connecting(
        endpoint: &Endpoint,
        options: &EtcdOptions,
        error: &(dyn Error + 'static),
    ) -> Self {
        Self::elsewhere(unreachable(endpoint, options, error))
    }

    /// An answer that is an error: etcd's own (`rpctypes/error.go`), or one of the connection.
    pub(super) fn answered(endpoint: &Endpoint, options: &EtcdOptions, status: &Status) -> Self {
        let user = options.user.as_ref().map_or("without a user", |(user, _)| user.as_str());
        let said = status.message();
        let login = || format!("etcd at {endpoint} no longer knows the login of {user}");
        match status.code() {
            Code::ResourceExhausted if said.contains("database space exceeded") => Self::tell(
                "etcd is out of space (alarm NOSPACE): make room with `etcdctl compact` and `etcdctl defrag`, or raise its --quota-backend-bytes, then run `etcdctl alarm disarm`",
            ),
            Code::ResourceExhausted if said.contains("too many requests") => {
                Self::elsewhere(format!("etcd at {endpoint} has too many requests: it is asked again"))
            }
            Code::DataLoss => Self::tell(format!(
                "etcd at {endpoint} says that its data is corrupt: see `etcdctl alarm list`, and restore the member"
            )),
            Code::Unauthenticated => Self::new(Then::Login, login()),
            // Users or roles were changed since the token was made.
            Code::InvalidArgument if said.contains("revision of auth store is old") => {
                Self::new(Then::Login, login())
            }
            Code::InvalidArgument if said.contains("invalid user ID or password") => Self::tell(format!(
                "etcd refuses the user {user} or the password: correct store.user and store.password_file"
            )),
            Code::InvalidArgument if said.contains("user name is empty") => Self::tell(
                "etcd asks for a user: set store.user and store.password_file, or a client certificate in store.cert_file",
            ),
            Code::PermissionDenied => Self::tell(format!(
                "etcd lets {} not use the keys of weft: run `etcdctl role grant-permission ROLE readwrite --prefix=true {}/v1/`",
                options.user.as_ref().map_or("this node's certificate", |(user, _)| user.as_str()),
                options.prefix
            )),
            Code::NotFound if said.contains("lease not found") => Self {
                then: Then::Lease,
                sentence: "the node's lease of etcd is gone: it is made again".into(),
            },
            Code::Unimplemented => Self::tell(format!(
                "{endpoint} is no etcd of version 3.4 or newer ({said}): correct store.endpoints"
            )),
            // etcd's own words: no leader, leader changed, request timed out, stopped.
            Code::Unavailable if said.starts_with("etcdserver:") => Self::elsewhere(format!(
                "etcd at {endpoint} cannot serve ({}): it works again once most members reach each other",
                said.trim_start_matches("etcdserver:").trim()
            )),
            _ => match status.source() {
                Some(source) => Self::elsewhere(unreachable(endpoint, options, source)),
                None => Self::elsewhere(format!("etcd at {endpoint} failed ({said}): look at its log")),
            },
        }
    }
}

/// Says why a member cannot be spoken to.
fn unreachable(endpoint: &Endpoint, options: &EtcdOptions, error: &(dyn Error + 'static)) -> String {
    if let Some(error) = find::<TlsError>(error) {
        return tls(endpoint, options, error);
    }
    let io = find::<io::Error>(error);
    if endpoint.tls() && io.is_some_and(|error| error.to_string().contains("tls handshake eof")) {
        return plain(endpoint);
    }
    let why = io.map_or_else(|| deepest(error), io::Error::to_string);
    if !endpoint.tls() && io.is_none_or(|error| error.kind() != io::ErrorKind::ConnectionRefused) {
        return format!(
            "etcd at {endpoint} cannot be reached ({why}): start it, or correct store.endpoints (https:// if it wants TLS)"
        );
    }
    format!("etcd at {endpoint} cannot be reached ({why}): start it, or correct store.endpoints")
}

fn tls(endpoint: &Endpoint, options: &EtcdOptions, error: &TlsError) -> String {
    use CertificateError as Bad;
    if let TlsError::InvalidCertificate(bad) = error
        && let Some(sentence) = mistrusted(&format!("etcd at {endpoint}"), "store.ca_file", bad)
    {
        return sentence;
    }
    match error {
        TlsError::InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. }) => format!(
            "the certificate of etcd at {endpoint} is not for {}: write a name of the certificate in store.endpoints",
            endpoint.host()
        ),
        TlsError::InvalidMessage(_) => plain(endpoint),
        // etcd 3.4 says "bad certificate" for a missing one as well.
        TlsError::AlertReceived(alert)
            if options.identity.is_none() && *alert != AlertDescription::ProtocolVersion =>
        {
            format!(
                "etcd at {endpoint} wants a client certificate ({alert:?}): set store.cert_file and store.key_file"
            )
        }
        TlsError::AlertReceived(alert) => format!(
            "etcd at {endpoint} refuses this node's certificate ({alert:?}): renew store.cert_file, or have it signed by a CA that etcd trusts, and compare the clocks"
        ),
        other => format!("etcd at {endpoint} cannot be spoken to through TLS ({other}): look at its log"),
    }
}

fn plain(endpoint: &Endpoint) -> String {
    format!(
        "etcd at {endpoint} does not speak TLS: write http:// in store.endpoints, or give it a certificate"
    )
}
