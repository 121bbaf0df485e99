//! What the policies of admission let a node do: change what is its own, and nothing of another's.

use serde_json::{Value, json};
use weft_ipam::store::kubernetes::KubernetesOptions;

use super::apiserver::{self, Cluster};
use super::kubernetes::{lease_of, open};
use super::*;

#[test]
fn a_node_changes_its_own_records_and_no_others() {
    if apiserver::missing() {
        return;
    }
    let cluster = Cluster::start();
    let (one, two) = (open(cluster.options("n1")), open(cluster.options("n2")));
    runtime().block_on(async {
        let own = one.put_if(key(1), Expect::Absent, lease(1, 1)).await.expect("its own");
        let others = two.put_if(key(2), Expect::Absent, lease_of("n2", 2, 1)).await.expect("its own");
        // What weft itself would be told.
        let deletion = one.delete_if(key(2), others).await.expect_err("another's").to_string();
        assert_eq!(
            deletion,
            "the API server does not let this node delete podsubnets.weft.dev: the entry 10.32.2.0-24 is of n2, and the node n1 may not change it: its block is free when the Node object n2 is deleted"
        );
        // With n1's token in its hands and another name in its configuration.
        let posing = KubernetesOptions { node: "n2".parse().expect("a name"), ..cluster.options("n1") };
        let posing = open(posing);
        let update = posing.put_if(key(2), Expect::Revision(others), lease_of("n2", 2, 2)).await;
        let create = posing.put_if(key(3), Expect::Absent, lease_of("n2", 3, 1)).await;
        for error in [update.expect_err("another's"), create.expect_err("another's")] {
            let error = error.to_string();
            assert!(error.contains("the node n1 may write entries of its own, and this one is of n2"), "{error}");
        }
        one.delete_if(key(1), own).await.expect("its own");
        assert_eq!(listed(&one).await.entries[&key(2)].revision, others, "nothing was changed");
    });
    // What a thief would try by hand.
    let refused = |arguments: &[&str], input: &str| {
        let error = cluster.kubectl_as("n1", arguments, input).expect_err("another's");
        assert!(error.contains("denied request") || error.contains("forbidden"), "{arguments:?}: {error}");
        error
    };
    let object = |subnet: &str, node: &str, owner: &str| {
        cluster.object(&format!("10.32.{subnet}.0/24"), &format!("10.32.{subnet}.0-24"), node, owner, 9)
    };
    refused(&["delete", "psn", "10.32.2.0-24"], "");
    refused(&["delete", "psn", "--all"], "");
    refused(&["replace", "-f", "-"], &object("2", "n2", "n2"));
    refused(&["create", "-f", "-"], &object("5", "n2", "n2"));
    refused(&["create", "-f", "-"], &object("5", "n1", "n2"));
    // To steal a block by writing over it is refused by the definition too, whoever tries.
    let error = cluster.kubectl_as("n1", &["replace", "-f", "-"], &object("2", "n1", "n1"));
    assert!(error.expect_err("another's").contains("only by deletion and creation"));
    let error = cluster.try_kubectl(&["replace", "-f", "-"], Some(&object("2", "n1", "n1")));
    assert!(error.expect_err("another's").contains("only by deletion and creation"));
    // Nor may an entry stay when its Node goes.
    let change = |edit: &dyn Fn(&mut Value)| {
        let mut value: Value = serde_json::from_str(&object("6", "n1", "n1")).expect("JSON");
        edit(&mut value);
        value.to_string()
    };
    let ownerless = change(&|object| object["metadata"]["ownerReferences"] = json!([]));
    let finalizer = change(&|object| object["metadata"]["finalizers"] = json!(["weft.dev/stay"]));
    for object in [ownerless, finalizer] {
        let error = refused(&["create", "-f", "-"], &object);
        assert!(error.contains("must have its Node object as the only owner, and no finalizer"), "{error}");
    }
    // Who is on no node, as with a token made by hand, may change nothing.
    let token = cluster.kubectl(&["create", "token", "weft", "-n", "weft-system"]);
    cluster.write_kubeconfig("unbound", &json!({"token": token.trim()}));
    let error = cluster.kubectl_with("unbound", &["create", "-f", "-"], Some(&object("7", "n1", "n1")));
    let error = error.expect_err("no node");
    assert!(error.contains("the token of weft does not say which node it is of"), "{error}");
    let left = cluster.kubectl(&["get", "psn", "-o", "name"]);
    assert_eq!(left.trim(), "podsubnet.weft.dev/10.32.2.0-24");
}

#[test]
fn a_node_tells_of_its_own_network_and_of_nothing_else() {
    if apiserver::missing() {
        return;
    }
    let cluster = Cluster::start();
    let patch = |node: &str, patch: Value| {
        let client = runtime().block_on(async {
            let client = cluster.options("n1").client().await.expect("good options");
            let request = http::Request::patch(format!("/api/v1/nodes/{node}/status"))
                .header("content-type", "application/strategic-merge-patch+json")
                .body(patch.to_string().into_bytes());
            client.request_text(request.expect("a request")).await.map_err(|error| error.to_string())
        });
        client.map(drop)
    };
    let condition = |kind: &str| {
        json!({"status": {"conditions": [{
            "type": kind, "status": "False", "reason": "Weft", "message": "m",
            "lastHeartbeatTime": "2026-01-01T00:00:00Z", "lastTransitionTime": "2026-01-01T00:00:00Z",
        }]}})
    };
    patch("n1", condition("NetworkUnavailable")).expect("its own");
    for (node, change) in [
        ("n2", condition("NetworkUnavailable")),
        ("n1", condition("Ready")),
        ("n1", json!({"status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.9"}]}})),
        ("n1", json!({"status": {"capacity": {"cpu": "64"}}})),
        ("n1", json!({"status": {"allocatable": {"cpu": "64"}}})),
        ("n1", json!({"status": {"nodeInfo": {"bootID": "b"}}})),
        ("n1", json!({"status": {"images": [{"names": ["a"], "sizeBytes": 1}]}})),
        ("n1", json!({"status": {"runtimeHandlers": [{"name": "r"}]}})),
        ("n1", json!({"metadata": {"labels": {"a": "b"}}})),
        ("n1", json!({"metadata": {"annotations": {"a": "b"}}})),
        ("n1", json!({"metadata": {"finalizers": ["weft.dev/stay"]}})),
    ] {
        let error = patch(node, change.clone()).expect_err(&format!("{node} {change}"));
        assert!(error.contains("denied request: weftd on n1 may change"), "{change}: {error}");
    }
    let conditions =
        cluster.kubectl(&["get", "nodes", "-o", "jsonpath={.items[*].status.conditions[*].type}"]);
    assert_eq!(conditions.trim(), "NetworkUnavailable");
}

#[test]
fn a_node_makes_the_secret_with_the_cluster_key_and_no_other_and_changes_none() {
    if apiserver::missing() {
        return;
    }
    let cluster = Cluster::start();
    let secret = |name: &str, kind: &str| {
        let annotations = json!({"kubernetes.io/service-account.name": "weft"});
        let metadata = json!({"name": name, "namespace": "weft-system", "annotations": annotations});
        json!({"apiVersion": "v1", "kind": "Secret", "type": kind, "metadata": metadata}).to_string()
    };
    let denied = "weftd may make the Secret weft-cluster-key of type Opaque, and change or delete none";
    let refused = |arguments: &[&str], input: &str| {
        let error = cluster.kubectl_as("n1", arguments, input).expect_err("not its own");
        assert!(error.contains(denied), "{arguments:?} {input}: {error}");
    };
    // What the permissions let pass: a token of an account is made by making a Secret.
    let create = ["create", "-f", "-"];
    refused(&create, &secret("another", "Opaque"));
    refused(&create, &secret("weft-cluster-key", "kubernetes.io/service-account-token"));
    cluster
        .kubectl_as("n1", &create, &secret("weft-cluster-key", "Opaque"))
        .expect("the first node makes it");
    let again = cluster.kubectl_as("n1", &create, &secret("weft-cluster-key", "Opaque"));
    assert!(again.expect_err("made already").contains("already exists"));
    // What the permissions refuse, the policy refuses alone.
    let wider = ["create", "role", "wider", "-n", "weft-system", "--verb=*", "--resource=secrets"];
    cluster.kubectl(&wider);
    let account = "--serviceaccount=weft-system:weft";
    cluster.kubectl(&["create", "rolebinding", "wider", "-n", "weft-system", "--role=wider", account]);
    let bound = Instant::now() + Duration::from_secs(60);
    let may = ["auth", "can-i", "delete", "secrets", "-n", "weft-system"];
    while cluster.kubectl_as("n1", &may, "").is_err() {
        assert!(Instant::now() < bound, "the wider role does not come into force");
    }
    let named = ["secret", "weft-cluster-key", "-n", "weft-system"];
    refused(&[&["delete"][..], &named].concat(), "");
    refused(&[&["label"][..], &named, &["a=b"]].concat(), "");
    let left = cluster.kubectl(&["get", "secrets", "-n", "weft-system", "-o", "name"]);
    assert_eq!(left.trim(), "secret/weft-cluster-key");
}

#[test]
fn the_definition_of_the_leases_goes_only_when_its_deletion_is_meant() {
    if apiserver::missing() {
        return;
    }
    let cluster = Cluster::start();
    let store = open(cluster.options("n1"));
    let write = || async { store.put_if(key(1), Expect::Absent, lease(1, 1)).await };
    let revision = runtime().block_on(write()).expect("absent");
    let manifest = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/weft.yaml");
    let delete = ["delete", "--wait=false", "--ignore-not-found", "-f", &manifest.display().to_string()];
    let error = cluster.try_kubectl(&delete, None).expect_err("the definition stays");
    assert!(error.contains("with podsubnets.weft.dev go the leases of all nodes"), "{error}");
    assert!(error.contains("weft.dev/delete=with-all-leases"), "{error}");
    let left = cluster.kubectl(&["get", "psn", "-o", "jsonpath={.items[*].metadata.resourceVersion}"]);
    assert_eq!(left.trim(), revision.to_string(), "the lease is as it was");
}

#[test]
fn the_policies_of_admission_fit_what_they_are_about() {
    if apiserver::without_controllers() {
        return;
    }
    let mut cluster = Cluster::start();
    cluster.control("validatingadmissionpolicy-status-controller");
    let bound = Instant::now() + Duration::from_secs(60);
    loop {
        let all = cluster.kubectl(&["get", "validatingadmissionpolicies", "-o", "json"]);
        let all: Value = serde_json::from_str(&all).expect("JSON");
        let policies = all["items"].as_array().expect("a list");
        assert!(!policies.is_empty());
        let warnings: Vec<_> =
            policies.iter().map(|policy| &policy["status"]["typeChecking"]["expressionWarnings"]).collect();
        assert!(warnings.iter().all(|warnings| warnings.is_null()), "{warnings:?}");
        if policies.iter().all(|policy| policy["status"]["observedGeneration"].is_number()) {
            return;
        }
        assert!(Instant::now() < bound, "nobody checked the policies: {all}");
    }
}
