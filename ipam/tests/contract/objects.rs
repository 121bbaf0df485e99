//! What a cluster has for weft before any daemon runs, in the tests of the store and in the lab: the manifests of `deploy/`, the
//! account of the daemons, Nodes, and pods with their tokens.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// What of `deploy/` the API server is given.
pub const MANIFESTS: [&str; 3] = ["crd.yaml", "rbac.yaml", "admission.yaml"];

/// Where a manifest is.
pub fn manifest(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes/base").join(name)
}

/// Where `make kubernetes` puts what it builds.
pub fn built() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME")
        .or_else(|| Some(set("HOME")?.join(".cache")))
        .unwrap_or_else(|| "/root/.cache".into());
    cache.join("weft-tests/kubernetes")
}

/// The account of the daemons, and its namespace.
pub fn account() -> [Value; 2] {
    [
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "weft-system"}}),
        json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "weft", "namespace": "weft-system"},
        }),
    ]
}

/// A Node as a kubelet would make it.
pub fn node(name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": spec})
}

/// A pod of weft on a node, as the DaemonSet would make it.
pub fn pod(node: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": format!("weft-{node}"), "namespace": "weft-system"},
        "spec": {
            "serviceAccountName": "weft",
            "automountServiceAccountToken": false,
            "nodeName": node,
            "hostNetwork": true,
            "containers": [{"name": "weft", "image": "weft"}],
        },
    })
}

/// How kubectl is asked for what the kubelet of a node would put into that pod.
pub fn token(node: &str) -> Vec<String> {
    let words = "create token weft -n weft-system --bound-object-kind=Pod --bound-object-name";
    let words = words.split(' ').map(str::to_owned);
    words.chain([format!("weft-{node}")]).collect()
}

pub fn kubeconfig(server: &str, ca: &str, user: &Value) -> String {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": server, "certificate-authority": ca}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    })
    .to_string()
}
