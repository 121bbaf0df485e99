//! What may go wrong between this node and the API server, as sentences that say what to do.

use std::io;
use std::time::Duration;

use kube::core::Status;
use tokio_rustls::rustls::{CertificateError, Error as TlsError};

use super::access::KubernetesOptions;
use super::link::Ask;
use super::object::DEFINITION;
use crate::store::cause::{deepest, find};
use crate::store::trouble::{self, mistrusted};

/// What follows from a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// Another connection may do better.
    Reconnect,
    /// The credentials are not valid any more; nothing was done.
    Login,
    /// What was asked for has gone (410): begin anew.
    Anew,
    /// There is no such object; nothing was done.
    Absent,
    /// Another writer was first; nothing was done.
    Conflict,
    /// A new connection is no help.
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

    /// A request that took too long.
    pub(super) fn late(server: &str, bound: Duration) -> Self {
        Self::new(
            Then::Reconnect,
            format!(
                "the API server at {server} did not answer within {} s: look at `kubectl get --raw '/readyz?verbose'`",
                bound.as_secs()
            ),
        )
    }

    /// A request that failed.
    pub(super) fn answered(
        server: &str,
        options: &KubernetesOptions,
        ask: &Ask,
        error: &kube::Error,
    ) -> Self {
        match error {
            kube::Error::Api(status) => Self::status(server, options, ask, status),
            error => Self::new(Then::Reconnect, unreachable(server, options, error)),
        }
    }

    /// An answer that is an error: `metav1.Status`.
    pub(super) fn status(server: &str, options: &KubernetesOptions, ask: &Ask, status: &Status) -> Self {
        let Ask { verb, resource, .. } = ask;
        let said = one_line(&status.message);
        match status.code {
            401 => Self::new(
                Then::Login,
                format!(
                    "the API server at {server} does not accept the credentials in {} (Unauthorized): renew the token or the certificate, and compare the clocks if it was made just now",
                    options.source()
                ),
            ),
            403 if said.contains("denied request") => Self::tell(denied(ask, &said)),
            403 => Self::tell(format!(
                "{verb} {resource} is forbidden for {}: apply deploy/kubernetes/base/rbac.yaml of this version of weft (kubectl apply -f rbac.yaml)",
                user(&said).unwrap_or("these credentials")
            )),
            // What is missing is the kind itself, or one object of it.
            404 if status.details.as_ref().is_none_or(|details| details.name.is_empty()) => {
                Self::new(Then::Tell, undefined(server))
            }
            404 => {
                Self::new(Then::Absent, format!("the API server at {server} has no such {resource} ({said})"))
            }
            409 => Self::new(Then::Conflict, format!("another writer of {resource} was first ({said})")),
            410 => Self::new(
                Then::Anew,
                format!("the API server at {server} has forgotten what it was asked to go on from"),
            ),
            422 => Self::tell(format!(
                "the API server refuses the entry ({said}): apply deploy/kubernetes/base/crd.yaml of this version of weft (kubectl apply -f crd.yaml)"
            )),
            429 => Self::tell(format!(
                "the API server at {server} has too many requests ({said}): it is asked again"
            )),
            code => Self::tell(format!(
                "the API server at {server} cannot {verb} {resource} ({code}: {said}): look at `kubectl get --raw '/readyz?verbose'`"
            )),
        }
    }
}

/// Says that the cluster does not know the kind of the entries.
pub(super) fn undefined(server: &str) -> String {
    format!(
        "the API server at {server} does not know {DEFINITION}: apply deploy/kubernetes/base/crd.yaml (kubectl apply -f crd.yaml)"
    )
}

/// Says what a policy of admission said: after "denied request: " it is weft's own sentence, where it is weft's policy.
fn denied(ask: &Ask, said: &str) -> String {
    let why = said.split_once("denied request: ").map_or(said, |(_, why)| why);
    format!("the API server does not let this node {} {}: {why}", ask.verb, ask.resource)
}

fn user(said: &str) -> Option<&str> {
    Some(said.split_once("User \"")?.1.split_once('"')?.0)
}

fn one_line(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.chars().take(400).collect()
}

/// Says why the API server cannot be spoken to.
fn unreachable(server: &str, options: &KubernetesOptions, error: &kube::Error) -> String {
    if let Some(error) = find::<TlsError>(error) {
        return tls(server, options, error);
    }
    let why = find::<io::Error>(error).map_or_else(|| deepest(error), io::Error::to_string);
    match &options.kubeconfig {
        Some(path) => format!(
            "the API server at {server} cannot be reached ({why}): start it, or correct the server in store.kubeconfig {}",
            path.display()
        ),
        None => format!(
            "the API server at {server} cannot be reached ({why}): start it; if only its service address fails, set KUBERNETES_SERVICE_HOST in the pod to an address that needs no kube-proxy"
        ),
    }
}

fn tls(server: &str, options: &KubernetesOptions, error: &TlsError) -> String {
    use CertificateError as Bad;
    let source = options.source();
    if let TlsError::InvalidCertificate(bad) = error
        && let Some(sentence) = mistrusted(&format!("the API server at {server}"), &source, bad)
    {
        return sentence;
    }
    match error {
        TlsError::InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. }) => format!(
            "the certificate of the API server is not for {server}: write a name of the certificate in {source}"
        ),
        TlsError::AlertReceived(alert) => format!(
            "the API server at {server} refuses the client certificate in {source} ({alert:?}): renew it, and compare the clocks"
        ),
        other => format!(
            "the API server at {server} cannot be spoken to through TLS ({other}): look at what answers there"
        ),
    }
}
