//! Which verbs weft needs and has not: asked of the API server itself, so that each is named before it is missed.

use std::time::Duration;

use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::Client;
use kube::api::{Api, PostParams};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use weft_ipam::store::KubernetesOptions;

use super::trouble::{self, Subject, Troubles};
use super::{DEADLINE, secret};

/// Between two reviews where nothing is missing, and where something is or the API server does not answer.
const AGAIN: (Duration, Duration) = (Duration::from_secs(600), Duration::from_secs(15));

/// Where a resource is.
#[derive(Clone, Copy)]
enum Place {
    Cluster,
    /// weft's own namespace.
    Own,
    /// Where Events of Nodes are.
    Default,
}

struct Need {
    verb: &'static str,
    group: &'static str,
    resource: &'static str,
    subresource: &'static str,
    place: Place,
    /// The object, where permission for that one is enough.
    name: Option<&'static str>,
}

const fn need(verb: &'static str, resource: &'static str, place: Place) -> Need {
    Need { verb, group: "", resource, subresource: "", place, name: None }
}

const fn lease(verb: &'static str) -> Need {
    Need { group: "weft.dev", ..need(verb, "podsubnets", Place::Cluster) }
}

const fn key(verb: &'static str) -> Need {
    Need { name: Some(secret::NAME), ..need(verb, "secrets", Place::Own) }
}

/// What the manifests grant.
const NEEDS: [Need; 16] = [
    lease("get"),
    lease("list"),
    lease("watch"),
    lease("create"),
    lease("update"),
    lease("delete"),
    Need {
        group: "apiextensions.k8s.io",
        name: Some("podsubnets.weft.dev"),
        ..need("get", "customresourcedefinitions", Place::Cluster)
    },
    Need { name: Some("kube-system"), ..need("get", "namespaces", Place::Cluster) },
    need("get", "nodes", Place::Cluster),
    need("watch", "nodes", Place::Cluster),
    Need { subresource: "status", ..need("patch", "nodes", Place::Cluster) },
    key("get"),
    key("watch"),
    need("create", "secrets", Place::Own),
    need("create", "events", Place::Default),
    need("patch", "events", Place::Default),
];

impl Need {
    fn ask(&self, options: &KubernetesOptions) -> ResourceAttributes {
        let text = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        ResourceAttributes {
            verb: text(self.verb),
            group: text(self.group),
            resource: text(self.resource),
            subresource: text(self.subresource),
            namespace: match self.place {
                Place::Cluster => None,
                Place::Own => Some(options.namespace.clone()),
                Place::Default => Some("default".into()),
            },
            // A node may be let at its own Node alone.
            name: match (self.resource, self.name) {
                ("nodes", _) => Some(options.node.to_string()),
                (_, name) => name.map(str::to_owned),
            },
            ..ResourceAttributes::default()
        }
    }

    fn shown(&self, options: &KubernetesOptions) -> String {
        let separated =
            |mark: &str, text: &str| if text.is_empty() { String::new() } else { format!("{mark}{text}") };
        let place = match self.place {
            Place::Cluster => String::new(),
            Place::Own => format!(" in {}", options.namespace),
            Place::Default => " in default".to_owned(),
        };
        let (group, subresource) = (separated(".", self.group), separated("/", self.subresource));
        format!("{} {}{group}{subresource}{place}", self.verb, self.resource)
    }
}

/// Reviews them for ever.
pub(super) async fn review(client: Client, options: KubernetesOptions, troubles: watch::Sender<Troubles>) {
    loop {
        let sentence = missing(&client, &options).await;
        let again = if matches!(sentence, Some(None)) { AGAIN.0 } else { AGAIN.1 };
        if let Some(sentence) = sentence {
            trouble::note(&troubles, Subject::Permissions, sentence);
        }
        sleep(again).await;
    }
}

/// Names what is missing; `None` where the API server does not say.
pub(super) async fn missing(client: &Client, options: &KubernetesOptions) -> Option<Option<String>> {
    let api: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let mut missing = Vec::new();
    for need in &NEEDS {
        let spec = SelfSubjectAccessReviewSpec {
            resource_attributes: Some(need.ask(options)),
            ..SelfSubjectAccessReviewSpec::default()
        };
        let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
        let answer = timeout(DEADLINE, api.create(&PostParams::default(), &review)).await.ok()?.ok()?;
        if !answer.status?.allowed {
            missing.push(need.shown(options));
        }
    }
    Some(sentence(&missing))
}

fn sentence(missing: &[String]) -> Option<String> {
    (!missing.is_empty())
        .then(|| format!("weft's account may not {}: apply weft's rbac.yaml", missing.join(", ")))
}

#[cfg(test)]
mod tests {
    use weft_ipam::store::kubernetes::Mode;

    use super::*;

    #[test]
    fn each_missing_verb_is_named_with_its_resource_and_namespace() {
        let options = KubernetesOptions {
            kubeconfig: None,
            namespace: "weft-system".into(),
            node: "n1".parse().expect("a name"),
            mode: Mode::WeftIpam,
        };
        let shown: Vec<_> = NEEDS.iter().map(|need| need.shown(&options)).collect();
        for verb in [
            "create podsubnets.weft.dev",
            "patch nodes/status",
            "get secrets in weft-system",
            "patch events in default",
        ] {
            assert!(shown.iter().any(|shown| shown == verb), "{verb}: {shown:?}");
        }
        let status =
            NEEDS.iter().find(|need| need.subresource == "status").expect("there is one").ask(&options);
        assert_eq!((status.name.as_deref(), status.namespace), (Some("n1"), None));
        assert_eq!(sentence(&[]), None);
        let two = sentence(&["get nodes".into(), "create events in default".into()]);
        assert_eq!(
            two.as_deref(),
            Some("weft's account may not get nodes, create events in default: apply weft's rbac.yaml")
        );
    }
}
