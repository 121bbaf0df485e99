//! What the API server refuses a node, what is wrong with the way to it, and the sentences about both.

use serde_json::{Value, json};
use weft_ipam::store::kubernetes::KubernetesOptions;

use super::apiserver::{self, Cluster, kubeconfig, options, url};
use super::authority::{Authority, FUTURE, NOW, PAST, Validity};
use super::kubernetes::open;
use super::server::free_ports;
use super::*;

/// What a list fails with.
fn refusal(options: KubernetesOptions) -> String {
    runtime().block_on(async { sentence(open(options).list().await) })
}

/// What the store does not even begin with.
fn unusable(options: KubernetesOptions) -> String {
    KubernetesStore::open(options).expect_err("options that cannot work").to_string()
}

/// Lets weft do everything but one thing.
fn forbid(cluster: &Cluster, rules: &[Value], verb: &str, resource: &str) {
    let mut rules = rules.to_vec();
    let mut missing = 0;
    for rule in &mut rules {
        if rule["resources"].as_array().expect("resources").contains(&json!(resource)) {
            let verbs = rule["verbs"].as_array_mut().expect("verbs");
            missing += verbs.iter().filter(|known| *known == verb).count();
            verbs.retain(|known| known != verb);
        }
    }
    assert_eq!(missing, usize::from(!verb.is_empty()), "{verb} {resource} is in rbac.yaml");
    rules.retain(|rule| !rule["verbs"].as_array().expect("verbs").is_empty());
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": {"name": "weft"}, "rules": rules,
    });
    cluster.try_kubectl(&["replace", "-f", "-"], Some(&role.to_string())).expect("replaced");
}

/// Does something that takes a verb, and returns what it fails with. `written` is the revision of the lease of [`key`] 1; that of
/// 2 is not there. Nothing is written for good.
async fn failure(store: &dyn Store, (verb, resource): (&str, &str), written: u64, number: u8) -> String {
    let error = match (verb, resource) {
        // What stands there is read after a creation that failed.
        ("get", "podsubnets") => store.put_if(key(1), Expect::Absent, lease(1, number)).await.err(),
        ("create", _) | ("get", "nodes") => {
            let put = store.put_if(key(2), Expect::Absent, lease(2, number)).await;
            if let Ok(revision) = put {
                store.delete_if(key(2), revision).await.expect("current");
            }
            put.err()
        }
        // They name a revision of before: allowed or not, nothing is written.
        ("update", _) => store.put_if(key(1), Expect::Revision(written - 1), lease(1, number)).await.err(),
        ("delete", _) => store.delete_if(key(1), written - 1).await.err(),
        _ => store.list().await.err().map(PutError::Store),
    };
    error.map_or_else(|| "nothing is missing yet".into(), |error| error.to_string())
}

#[test]
fn each_verb_that_is_missing_is_named() {
    if apiserver::missing() {
        return;
    }
    let cluster = Cluster::start();
    let store = open(cluster.options("n1"));
    let role = cluster.kubectl(&["get", "clusterrole", "weft", "-o", "json"]);
    let role: Value = serde_json::from_str(&role).expect("JSON");
    let rules = role["rules"].as_array().expect("rules");
    let account = "system:serviceaccount:weft-system:weft";
    runtime().block_on(async {
        let written = store.put_if(key(1), Expect::Absent, lease(1, 1)).await.expect("absent");
        for (verb, resource) in [
            ("list", "podsubnets"),
            ("get", "podsubnets"),
            ("create", "podsubnets"),
            ("update", "podsubnets"),
            ("delete", "podsubnets"),
            ("get", "nodes"),
            ("get", "namespaces"),
            ("get", "customresourcedefinitions"),
        ] {
            forbid(&cluster, rules, verb, resource);
            let full = match resource {
                "podsubnets" => "podsubnets.weft.dev",
                "customresourcedefinitions" => "customresourcedefinitions.apiextensions.k8s.io",
                core => core,
            };
            let expected = format!(
                "{verb} {full} is forbidden for {account}: apply deploy/kubernetes/base/rbac.yaml of this version of weft (kubectl apply -f rbac.yaml)"
            );
            // RBAC works from a cache: what was taken away is so a moment later.
            let bound = Instant::now() + Duration::from_secs(60);
            let mut numbers = (11..=u8::MAX).cycle();
            loop {
                let number = numbers.next().expect("without end");
                let error = failure(&store, (verb, resource), written, number).await;
                if error == expected {
                    break;
                }
                assert!(Instant::now() < bound, "{error}\nshould be\n{expected}");
            }
        }
        forbid(&cluster, rules, "", "");
        assert!(listed(&store).await.entries.contains_key(&key(1)), "nothing was lost meanwhile");
    });
}

#[test]
fn a_watch_that_is_forbidden_is_told_by_the_lists_and_begins_when_it_is_allowed() {
    if apiserver::missing() {
        return;
    }
    let cluster = Cluster::start();
    let watchless = json!([{"op": "replace", "path": "/rules/0/verbs", "value": ["get", "list", "create", "update", "delete"]}]);
    cluster.kubectl(&["patch", "clusterrole", "weft", "--type=json", "-p", &watchless.to_string()]);
    let store = open(cluster.options("n1"));
    runtime().block_on(async {
        let mut watch = store.watch();
        assert_eq!(changed(&mut watch).await, Some(Change::Relist));
        cluster.apply("rbac.yaml");
        // Nobody says when the watch has begun: write until it tells.
        let mut revision = listed(&store).await.revision;
        let mut expect = Expect::Absent;
        let bound = Instant::now() + Duration::from_secs(60);
        for number in 1.. {
            revision = store.put_if(key(1), expect, lease(1, number)).await.expect("current").max(revision);
            expect = Expect::Revision(revision);
            match tokio::time::timeout(Duration::from_millis(500), data(&mut watch)).await {
                Ok(change) => return assert!(matches!(change, Change::Put { .. }), "{change:?}"),
                Err(_) => assert!(Instant::now() < bound, "the watch does not begin"),
            }
        }
    });
}

#[test]
fn credentials_that_ended_are_told_and_new_ones_are_used_without_a_restart() {
    if apiserver::missing() {
        return;
    }
    let cluster = Cluster::start();
    let store = open(cluster.options("n1"));
    runtime().block_on(async {
        let mut watch = store.watch();
        let revision = store.put_if(key(1), Expect::Absent, lease(1, 1)).await.expect("absent");
        learns_of(&mut watch, revision).await;
        // A token ends with its time, or with its pod.
        cluster.kubectl(&[
            "delete",
            "pod",
            "weft-n1",
            "-n",
            "weft-system",
            "--force",
            "--grace-period=0",
        ]);
        let bound = Instant::now() + Duration::from_secs(60);
        let error = loop {
            match store.list().await {
                Ok(_) => assert!(Instant::now() < bound, "the token of a pod that is gone still works"),
                Err(error) => break error.to_string(),
            }
        };
        assert_eq!(
            error,
            format!(
                "the API server at {} does not accept the credentials in store.kubeconfig {} (Unauthorized): renew the token or the certificate, and compare the clocks if it was made just now",
                cluster.url(),
                cluster.kubeconfig("n1").display()
            )
        );
        cluster.add_pod("n1");
        std::fs::write(cluster.token_file("n1"), cluster.token("n1")).expect("a file");
        assert_eq!(listed(&store).await.entries[&key(1)].revision, revision);
        store.delete_if(key(1), revision).await.expect("current");
    });
}

#[test]
fn what_is_wrong_with_the_way_to_the_api_server_is_one_sentence() {
    if apiserver::missing() {
        return;
    }
    let mut cluster = Cluster::bare(NOW);
    cluster.await_ready();
    let directory = &cluster.directory;
    let shown = |name: &str| directory.join(name).display().to_string();
    let admin = json!({"token": "token-of-the-tests"});
    let write = |name: &str, text: &str| {
        std::fs::write(directory.join(name), text).expect("a file");
        options("n1", directory.join(name))
    };
    let ca = directory.join("ca.pem");
    assert_eq!(
        unusable(options("n1", directory.join("none"))),
        format!(
            "store.kubeconfig {} cannot be read (No such file or directory (os error 2)): put it there, or leave the key out to use the pod's service account",
            shown("none")
        )
    );
    assert!(unusable(write("words", "- no: [kubeconfig")).contains("is no kubeconfig ("));
    let noca = unusable(write("noca", &kubeconfig(&cluster.url(), &directory.join("away.pem"), &admin)));
    assert_eq!(
        noca,
        format!(
            "the CA {} of store.kubeconfig {} cannot be read (No such file or directory (os error 2)): put it there, or name another file",
            shown("away.pem"),
            shown("noca")
        )
    );
    let user = json!({"tokenFile": directory.join("no.token")});
    let error = unusable(write("notoken", &kubeconfig(&cluster.url(), &ca, &user)));
    assert!(
        error.starts_with(&format!("the token file {} of store.kubeconfig", shown("no.token"))),
        "{error}"
    );
    let user = json!({"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "aws", "interactiveMode": "Never"}});
    let error = unusable(write("exec", &kubeconfig(&cluster.url(), &ca, &user)));
    assert!(error.contains("gets its token from a program, which weftd does not run"), "{error}");
    let error = unusable(write("plain", &kubeconfig("http://127.0.0.1:1", &ca, &admin)));
    assert!(error.contains("is not safe for credentials: write https://"), "{error}");

    let [nobody] = free_ports();
    let error = refusal(write("nobody", &kubeconfig(&url(nobody), &ca, &admin)));
    assert!(error.contains("cannot be reached (Connection refused (os error 111))"), "{error}");
    Authority::new("another CA").write(directory, "other");
    let error = refusal(write("otherca", &kubeconfig(&cluster.url(), &directory.join("other.pem"), &admin)));
    assert_eq!(
        error,
        format!(
            "the certificate of the API server at {} is not signed by the CA in store.kubeconfig {}: name the CA that signed it",
            cluster.url(),
            shown("otherca")
        )
    );
    let error =
        refusal(write("othername", &kubeconfig(&format!("https://localhost:{}", cluster.port), &ca, &admin)));
    assert!(error.contains("is not for https://localhost:"), "{error}");
    let error = refusal(write("wrong", &kubeconfig(&cluster.url(), &ca, &json!({"token": "wrong"}))));
    assert!(error.contains("does not accept the credentials"), "{error}");
    let (cert, key) = cluster.sign("stranger");
    let user = json!({"client-certificate": cert, "client-key": key});
    let error = refusal(write("stranger.kubeconfig", &kubeconfig(&cluster.url(), &ca, &user)));
    assert!(
        error.contains("is forbidden for system:anonymous") || error.contains("does not accept"),
        "{error}"
    );
    // A CA of the same name was not told: who is admin, but of a cluster without weft.
    let error = refusal(write("good", &kubeconfig(&cluster.url(), &ca, &admin)));
    assert!(error.contains("does not know podsubnets.weft.dev"), "{error}");
}

#[test]
fn a_certificate_of_another_time_is_told_with_the_clock() {
    if apiserver::missing() {
        return;
    }
    let look = |validity: Validity, expected: &str| {
        let cluster = Cluster::bare(validity);
        let bound = Instant::now() + Duration::from_secs(60);
        loop {
            let error = refusal(options("n1", cluster.kubeconfig("admin")));
            if error == format!("the certificate of the API server at {} {expected}", cluster.url()) {
                return;
            }
            assert!(Instant::now() < bound, "{error}");
        }
    };
    look(PAST, "has expired by this node's clock: renew it, or set the clock");
    look(FUTURE, "is not valid yet by this node's clock: set the clock, or renew the certificate");
}
