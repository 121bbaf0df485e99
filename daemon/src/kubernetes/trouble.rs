//! What goes wrong between the daemon and the API server, as sentences.

use std::collections::BTreeMap;
use std::error::Error as _;

use kube::Error;
use tokio::sync::watch;

use super::events::{Reason, Remark};

/// What was asked of the API server.
pub(super) struct Ask {
    pub(super) verb: &'static str,
    /// The resource, as permissions name it.
    pub(super) what: &'static str,
}

/// What a sentence is about: it replaces the last one about the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Subject {
    Permissions,
    Node,
    Secret,
    Condition,
    Events,
}

/// What is wrong at the moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Troubles(BTreeMap<Subject, String>);

impl Troubles {
    /// Returns each sentence once, as an operator should hear it.
    pub(super) fn remarks(&self) -> Vec<Remark> {
        let mut remarks: Vec<Remark> = Vec::new();
        for (subject, sentence) in &self.0 {
            let reason = match subject {
                Subject::Permissions => Reason::MissingPermission,
                Subject::Secret => Reason::ClusterKey,
                Subject::Node | Subject::Condition | Subject::Events => Reason::ApiServer,
            };
            if remarks.iter().all(|remark| remark.sentence != *sentence) {
                remarks.push(Remark { reason, sentence: sentence.clone() });
            }
        }
        remarks
    }
}

/// Replaces what is wrong with a subject; nothing where it went well.
pub(super) fn note(troubles: &watch::Sender<Troubles>, subject: Subject, sentence: Option<String>) {
    troubles.send_if_modified(|troubles| {
        let before = troubles.0.get(&subject).cloned();
        match &sentence {
            Some(sentence) => drop(troubles.0.insert(subject, sentence.clone())),
            None => drop(troubles.0.remove(&subject)),
        }
        before != sentence
    });
}

/// Says what happened, and what to do.
pub(super) fn sentence(ask: &Ask, error: &Error) -> String {
    let Ask { verb, what } = ask;
    match error {
        Error::Api(status) => match status.code {
            401 => "the API server does not accept weft's credentials: renew the token or the certificate, and see that this node's clock is right".to_owned(),
            403 => format!("the API server does not let weft {verb} {what}: apply weft's rbac.yaml"),
            404 => format!("there is no {what} in the cluster: install weft's manifests"),
            429 => "the API server is too busy to answer weft: it is asked again".to_owned(),
            code => format!(
                "the API server refuses to {verb} {what} ({code} {}): {}",
                status.reason,
                status.message.lines().next().unwrap_or_default()
            ),
        },
        error => format!("the API server cannot be reached ({}): see that it runs and that this node has a way to it", deepest(error)),
    }
}

fn deepest(error: &Error) -> String {
    let mut deepest: &dyn std::error::Error = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    // Only the first words: what the server or the TLS library adds may be long.
    let text = if error.source().is_some() { deepest.to_string() } else { error.to_string() };
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn a_missing_verb_is_named() {
        let mut status = Status::failure("nodes \"n1\" is forbidden: User ...", "Forbidden");
        status.code = 403;
        let said = sentence(&Ask { verb: "patch", what: "nodes/status" }, &Error::Api(status.boxed()));
        assert_eq!(said, "the API server does not let weft patch nodes/status: apply weft's rbac.yaml");
    }

    #[test]
    fn one_sentence_about_several_things_is_told_once() {
        let (troubles, seen) = watch::channel(Troubles::default());
        note(&troubles, Subject::Node, Some("gone".into()));
        note(&troubles, Subject::Condition, Some("gone".into()));
        note(&troubles, Subject::Secret, Some("nonsense".into()));
        assert_eq!(
            seen.borrow().remarks().iter().map(|remark| &*remark.sentence).collect::<Vec<_>>(),
            ["gone", "nonsense"]
        );
        note(&troubles, Subject::Node, None);
        assert_eq!(seen.borrow().remarks().len(), 2);
    }
}
