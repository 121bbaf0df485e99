//! What only Kubernetes can suffer: restarts, forgotten revisions, verbs that are missing, definitions of another
//! version, and nodes that reach for what is another's.

use serde_json::{Value, json};
use weft_ipam::store::kubernetes::KubernetesOptions;

use super::apiserver::{self, Cluster, kubeconfig, options, url};
use super::authority::{Authority, FUTURE, NOW, PAST, Validity};
use super::server::free_ports;
use super::support::{Cable, copy};
use super::*;

fn open(options: KubernetesOptions) -> KubernetesStore {
    KubernetesStore::open(options).expect("good options")
}

/// A lease of [`key`] of another node than n1.
fn lease_of(node: &str, subnet: u8, number: u8) -> Vec<u8> {
    let value = LeaseValue::decode(key(subnet), &lease(subnet, number)).expect("a lease");
    LeaseValue { node: node.parse().expect("a name"), ..value }.encode()
}

/// What a list fails with.
fn refusal(options: KubernetesOptions) -> String {
    runtime().block_on(async { sentence(open(options).list().await) })
}

/// What the store does not even begin with.
fn unusable(options: KubernetesOptions) -> String {
    KubernetesStore::open(options).expect_err("options that cannot work").to_string()
}

#[test]
fn an_entry_is_an_object_that_a_person_can_read_and_that_belongs_to_its_node() {
    if apiserver::missing() {
        return;
    }
    let cluster = Cluster::start();
    let store = open(cluster.options("n1"));
    let six: Key = "fd00:32:0:4::/64".parse().expect("a subnet");
    runtime().block_on(async {
        store.put_if(key(4), Expect::Absent, lease(4, 7)).await.expect("absent");
        let value = LeaseValue::decode(key(4), &lease(4, 7)).expect("a lease");
        let asked = weft_ipam::lease::Asked { key: PublicKey([9; 32]), boot: "other".into() };
        let value = LeaseValue {
            subnet: six,
            ttl: Some(Duration::from_secs(3600)),
            gossip: Vec::new(),
            asked: Some(asked),
            ..value
        };
        store.put_if(six, Expect::Absent, value.encode()).await.expect("absent");
        let entries = store.list().await.expect("up").entries;
        assert_eq!(entries[&key(4)].value, lease(4, 7));
        assert_eq!(entries[&six].value, value.encode(), "every field comes back");
    });
    let table = cluster.kubectl(&["get", "psn"]);
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["NAME", "SUBNET", "NODE", "SITE", "EPOCH", "AGE"]);
    assert_eq!(rows[1][..5], ["10.32.4.0-24", "10.32.4.0/24", "n1", "default", "7"]);
    assert_eq!(rows[2][..2], ["fd00-0032-0000-0004-0000-0000-0000-0000-64", "fd00:32:0:4::/64"]);
    let object = cluster.kubectl(&["get", "psn", "10.32.4.0-24", "-o", "json"]);
    let object: Value = serde_json::from_str(&object).expect("JSON");
    let owner = json!([{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": cluster.uid("n1")}]);
    assert_eq!(object["metadata"]["ownerReferences"], owner);
}

#[test]
fn the_api_server_refuses_an_object_whose_name_is_not_its_subnet() {
    if apiserver::missing() {
        return;
    }
    let cluster = Cluster::start();
    let create = |subnet: &str, name: &str| {
        let object = cluster.object(subnet, name, "n1", "n1", 1);
        cluster.try_kubectl(&["create", "-f", "-"], Some(&object))
    };
    for (subnet, name) in [
        ("10.32.4.0/24", "10.32.5.0-24"),
        ("10.32.4.0/24", "10.32.4.0-25"),
        ("10.32.4.1/24", "10.32.4.1-24"),
        ("10.32.4.0/24", "anything"),
        ("fd00:32::/64", "fd00-0032-0000-0000-0000-0000-0000-0001-64"),
        ("fd00:32::/64", "fd00-32-0-0-0-0-0-0-64"),
        ("no subnet", "10.32.4.0-24"),
    ] {
        let error = create(subnet, name).expect_err(name);
        assert!(error.contains("invalid") || error.contains("Invalid"), "{error}");
    }
    create("fd00:32::/64", "fd00-0032-0000-0000-0000-0000-0000-0000-64").expect("it is its name");
    create("10.32.4.0/24", "10.32.4.0-24").expect("it is its name");
    // A block is leased once, whoever asks.
    let object = cluster.object("10.32.4.0/24", "10.32.4.0-24", "n2", "n2", 2);
    let error = cluster.kubectl_as("n2", &["create", "-f", "-"], &object).expect_err("it is taken");
    assert!(error.contains("already exists"), "{error}");
}

#[test]
fn a_restart_loses_nothing_and_says_what_to_do_meanwhile() {
    if apiserver::missing() {
        return;
    }
    let mut cluster = Cluster::start();
    let store = open(cluster.options("n1"));
    runtime().block_on(async {
        let mut watch = store.watch();
        let first = store.put_if(key(1), Expect::Absent, lease(1, 1)).await.expect("absent");
        learns_of(&mut watch, first).await;
        let before = store.list().await.expect("up");
        cluster.stop();
        let error = sentence(store.list().await);
        assert_eq!(
            error,
            format!(
                "the API server at {} cannot be reached (Connection refused (os error 111)): start it, or correct the server in store.kubeconfig {}",
                cluster.url(),
                cluster.kubeconfig("n1").display()
            )
        );
        let write = store.put_if(key(2), Expect::Absent, lease(2, 1)).await;
        assert!(matches!(write, Err(PutError::Store(_))), "{write:?}");
        cluster.launch();
        cluster.await_ready();
        let after = listed(&store).await;
        assert_eq!((after.store_id, after.entries), (before.store_id, before.entries));
        let second = store.put_if(key(2), Expect::Absent, lease(2, 2)).await.expect("absent");
        learns_of(&mut watch, second).await;
    });
}

#[test]
fn a_watch_goes_on_where_it_was_cut() {
    if apiserver::missing() {
        return;
    }
    let cluster = Cluster::start();
    let cable = Cable::to(cluster.port);
    let store = open(cluster.options_through("n1", cable.port));
    let other = open(cluster.options("n2"));
    runtime().block_on(async {
        let mut watch = store.watch();
        assert_eq!(changed(&mut watch).await, Some(Change::Relist));
        // The first list says only that the watch begins: an event says that it has begun.
        let first = other.put_if(key(99), Expect::Absent, lease_of("n2", 99, 1)).await.expect("absent");
        let entry = Entry { value: lease_of("n2", 99, 1), revision: first };
        assert_eq!(data(&mut watch).await, Change::Put { key: key(99), entry });
        cable.cut();
        let mut written = Vec::new();
        for number in 1..=32 {
            let value = lease_of("n2", number, number);
            let revision = other.put_if(key(number), Expect::Absent, value.clone()).await.expect("absent");
            written.push(Change::Put { key: key(number), entry: Entry { value, revision } });
        }
        let deleted = other.delete_if(key(99), first).await.expect("current");
        cable.mend();
        for expected in &written {
            assert_eq!(data(&mut watch).await, *expected);
        }
        let change = data(&mut watch).await;
        let of_the_deletion =
            |change: &Change| matches!(change, Change::Delete { key: at, revision } if *at == key(99) && (first..=deleted).contains(revision));
        assert!(of_the_deletion(&change), "{change:?}");
    });
}

#[test]
fn a_watch_whose_revision_was_forgotten_tells_to_list_and_begins_anew() {
    if apiserver::missing() {
        return;
    }
    let mut cluster = Cluster::start();
    let cable = Cable::to(cluster.port);
    let store = open(cluster.options_through("n1", cable.port));
    let other = open(cluster.options("n2"));
    runtime().block_on(async {
        let mut watch = store.watch();
        assert_eq!(changed(&mut watch).await, Some(Change::Relist));
        let first = other.put_if(key(99), Expect::Absent, lease_of("n2", 99, 1)).await.expect("absent");
        learns_of(&mut watch, first).await;
        cable.cut();
        for number in 1..=3 {
            let value = lease_of("n2", number, number);
            other.put_if(key(number), Expect::Absent, value).await.expect("absent");
        }
        // The API server remembers what it has seen since it began, and etcd what it was not told to forget: 410.
        cluster.stop();
        let compact = json!({"revision": cluster.etcd.revision().to_string(), "physical": true});
        cluster.etcd.post("kv/compaction", &compact);
        cluster.launch();
        cluster.await_ready();
        cable.mend();
        assert_eq!(changed(&mut watch).await, Some(Change::Relist));
        assert_eq!(listed(&store).await.entries.len(), 4);
        // What is written before the new watch began is not told either: write until something is.
        let mut revision = listed(&other).await.entries[&key(99)].revision;
        let mut number = 1;
        let told = loop {
            match tokio::time::timeout(Duration::from_millis(200), data(&mut watch)).await {
                Ok(change) => break change,
                Err(_) => {
                    number += 1;
                    let value = lease_of("n2", 99, number);
                    revision =
                        other.put_if(key(99), Expect::Revision(revision), value).await.expect("current");
                }
            }
        };
        assert!(matches!(told, Change::Put { key: at, .. } if at == key(99)), "{told:?}");
    });
}

#[test]
fn a_deaf_api_server_is_noticed_within_the_bound_and_a_write_to_it_is_unknown() {
    if apiserver::missing() {
        return;
    }
    let cluster = Cluster::start();
    let store = open(cluster.options("n1"));
    runtime().block_on(async {
        let mut watch = store.watch();
        let first = store.put_if(key(1), Expect::Absent, lease(1, 1)).await.expect("absent");
        learns_of(&mut watch, first).await;
        cluster.pause(true);
        let asked = Instant::now();
        let result = store.put_if(key(2), Expect::Absent, lease(2, 1)).await;
        assert!(asked.elapsed() < BOUND, "{:?}", asked.elapsed());
        let Err(PutError::Store(error)) = result else { panic!("{result:?} while nobody serves") };
        assert_eq!(
            error.to_string(),
            format!(
                "the API server at {} did not answer within 5 s: look at `kubectl get --raw '/readyz?verbose'`",
                cluster.url()
            )
        );
        let asked = Instant::now();
        sentence(store.list().await);
        assert!(asked.elapsed() < BOUND, "{:?}", asked.elapsed());
        cluster.pause(false);
        let entries = listed(&store).await.entries;
        assert!(entries.get(&key(2)).is_none_or(|entry| entry.value == lease(2, 1)), "{entries:?}");
        let last = store.delete_if(key(1), first).await.expect("current");
        learns_of_deletion(&mut watch, last).await;
    });
}

#[test]
fn a_list_of_several_pages_is_of_one_revision() {
    if apiserver::missing() {
        return;
    }
    let cluster = Cluster::start();
    let store = open(cluster.options("n1"));
    // As the API server stores them, past it: a thousand and more objects take a while through it.
    let owner = json!([{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": cluster.uid("n1")}]);
    let count = 2_345;
    let mut uid = 0;
    for number in 0..count {
        uid += 1;
        let subnet = format!("10.{}.{}.0", 64 + number / 256, number % 256);
        let name = format!("{subnet}-24");
        let object = json!({
            "apiVersion": "weft.dev/v1", "kind": "PodSubnet",
            "metadata": {
                "name": name, "uid": format!("00000000-0000-0000-0000-{uid:012}"), "generation": 1,
                "creationTimestamp": "2026-01-01T00:00:00Z", "ownerReferences": owner,
            },
            "spec": {
                "subnet": format!("{subnet}/24"), "node": "n1", "site": "default", "key": "ab".repeat(32),
                "epoch": 1, "renewals": 0, "boot": "b",
            },
        });
        let put = json!({
            "key": super::etcd::base64(&format!("/registry/weft.dev/podsubnets/{name}")),
            "value": super::etcd::base64(&object.to_string()),
        });
        cluster.etcd.post("kv/put", &put);
    }
    let written = cluster.etcd.revision();
    runtime().block_on(async {
        let snapshot = store.list().await.expect("up");
        assert_eq!(snapshot.entries.len(), count);
        assert!(snapshot.revision >= written, "{} includes {written}", snapshot.revision);
        assert!(snapshot.entries.values().all(|entry| entry.revision <= snapshot.revision));
    });
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
    let all = role["rules"].as_array().expect("rules").clone();
    // Lets weft do everything but one thing.
    let without = |verb: &str, resource: &str| {
        let mut rules = all.clone();
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
    };
    let account = "system:serviceaccount:weft-system:weft";
    let expected = |verb: &str, resource: &str| {
        format!(
            "{verb} {resource} is forbidden for {account}: apply deploy/kubernetes/base/rbac.yaml of this version of weft (kubectl apply -f rbac.yaml)"
        )
    };
    runtime().block_on(async {
        let revision = store.put_if(key(1), Expect::Absent, lease(1, 1)).await.expect("absent");
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
            without(verb, resource);
            let full = match resource {
                "podsubnets" => "podsubnets.weft.dev",
                "customresourcedefinitions" => "customresourcedefinitions.apiextensions.k8s.io",
                core => core,
            };
            // RBAC works from a cache: what was taken away is so a moment later.
            let bound = Instant::now() + Duration::from_secs(60);
            let mut number = 10;
            loop {
                number += 1;
                let error = match (verb, resource) {
                    // What stands there is read after a creation that failed.
                    ("get", "podsubnets") => store
                        .put_if(key(1), Expect::Absent, lease(1, number))
                        .await
                        .expect_err("it is there")
                        .to_string(),
                    ("create", _) | ("get", "nodes") => {
                        match store.put_if(key(2), Expect::Absent, lease(2, number)).await {
                            Ok(revision) => {
                                store.delete_if(key(2), revision).await.expect("current");
                                continue;
                            }
                            Err(error) => error.to_string(),
                        }
                    }
                    // It names a revision of before: allowed or not, nothing is written.
                    ("update", _) => store
                        .put_if(key(1), Expect::Revision(revision - 1), lease(1, number))
                        .await
                        .expect_err("not current")
                        .to_string(),
                    ("delete", _) => {
                        store.delete_if(key(1), revision - 1).await.expect_err("not current").to_string()
                    }
                    _ => match store.list().await {
                        Ok(_) => "nothing is missing yet".into(),
                        Err(error) => error.to_string(),
                    },
                };
                if error == expected(verb, full) {
                    break;
                }
                assert!(Instant::now() < bound, "{error}\nshould be\n{}", expected(verb, full));
            }
        }
        without("", "");
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
fn a_definition_that_is_missing_or_of_another_version_is_named_before_anything_is_written() {
    if apiserver::missing() {
        return;
    }
    let cluster = Cluster::start();
    let apply = "apply deploy/kubernetes/base/crd.yaml";
    let store = open(cluster.options("n1"));
    runtime().block_on(async {
        let before = store.list().await.expect("up");
        // An older one, which would drop in silence what it does not know.
        let path = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/asked";
        let patch = json!([{"op": "remove", "path": path}]).to_string();
        cluster.kubectl(&["patch", "crd", "podsubnets.weft.dev", "--type=json", "-p", &patch]);
        let error = sentence(store.list().await);
        assert_eq!(
            error,
            format!(
                "the definition podsubnets.weft.dev is of another version of weft (it does not know spec.asked): {apply} of this one (kubectl apply -f crd.yaml)"
            )
        );
        cluster.kubectl(&["annotate", "crd", "podsubnets.weft.dev", "weft.dev/delete=with-all-leases"]);
        cluster.kubectl(&["delete", "crd", "podsubnets.weft.dev"]);
        let missing = format!(
            "the API server at {} does not know podsubnets.weft.dev: {apply} (kubectl apply -f crd.yaml)",
            cluster.url()
        );
        assert_eq!(sentence(store.list().await), missing);
        // The API server takes a moment to forget where the objects were.
        let bound = Instant::now() + Duration::from_secs(60);
        loop {
            let write = store.put_if(key(1), Expect::Absent, lease(1, 1)).await;
            let error = write.expect_err("there is no such kind").to_string();
            if error == missing {
                break;
            }
            assert!(Instant::now() < bound, "{error}");
        }
        cluster.apply("crd.yaml");
        let after = listed(&store).await;
        assert_ne!(after.store_id, before.store_id, "entries may be gone with the definition");
        let revision = loop {
            match store.put_if(key(1), Expect::Absent, lease(1, 1)).await {
                Ok(revision) => break revision,
                Err(error) => assert!(Instant::now() < bound, "{error}"),
            }
        };
        assert!(revision > before.revision, "epochs go on");
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

#[test]
fn a_store_set_back_to_a_backup_is_seen_by_its_revision_and_watched_again() {
    if apiserver::missing() {
        return;
    }
    let mut cluster = Cluster::start();
    let (data, backup) = (cluster.etcd.directory().join("data"), cluster.etcd.directory().join("backup"));
    let store = open(cluster.options("n1"));
    runtime().block_on(async {
        let mut watch = store.watch();
        let old = store.put_if(key(1), Expect::Absent, lease(1, 1)).await.expect("absent");
        learns_of(&mut watch, old).await;
        cluster.stop();
        cluster.etcd.stop();
        copy(&data, &backup);
        cluster.etcd.restart();
        cluster.restart();
        listed(&store).await;
        let new = store.put_if(key(1), Expect::Revision(old), lease(1, 2)).await.expect("current");
        // The API server's own writes must not catch up while it starts.
        for _ in 0..200 {
            cluster.etcd.post("kv/put", &json!({"key": super::etcd::base64("/other"), "value": ""}));
        }
        let last = store.put_if(key(2), Expect::Absent, lease(2, 1)).await.expect("absent");
        learns_of(&mut watch, last).await;
        let before = store.list().await.expect("up");
        cluster.stop();
        cluster.etcd.stop();
        std::fs::remove_dir_all(&data).expect("our own");
        std::fs::rename(&backup, &data).expect("our own");
        cluster.etcd.restart();
        cluster.restart();
        let restored = listed(&store).await;
        assert!(restored.revision < before.revision, "{} {}", restored.revision, before.revision);
        assert_eq!(restored.entries[&key(1)].revision, old);
        let late = store.put_if(key(1), Expect::Revision(new), lease(1, 3)).await;
        assert!(matches!(late, Err(PutError::Conflict(Some(entry))) if entry.revision == old));
        // The watch cannot wait for a revision of the other history: write until it tells.
        let mut revision = old;
        let bound = Instant::now() + Duration::from_secs(60);
        for number in 10.. {
            revision =
                store.put_if(key(1), Expect::Revision(revision), lease(1, number)).await.expect("current");
            let told = tokio::time::timeout(Duration::from_millis(500), data_of(&mut watch, revision)).await;
            if told.is_ok() {
                return;
            }
            assert!(Instant::now() < bound, "the watch does not come back");
        }
    });
}

/// Waits until a watcher is told of the very write at a revision.
async fn data_of(watch: &mut Watch, revision: u64) {
    loop {
        match data(watch).await {
            Change::Put { entry, .. } if entry.revision == revision => return,
            _ => {}
        }
    }
}

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

#[test]
fn the_entries_of_a_node_that_is_deleted_go_with_it_and_others_stay() {
    if apiserver::without_controllers() {
        return;
    }
    let mut cluster = Cluster::start();
    cluster.control("garbage-collector-controller");
    let (one, two) = (open(cluster.options("n1")), open(cluster.options("n2")));
    runtime().block_on(async {
        let mut watch = one.watch();
        one.put_if(key(1), Expect::Absent, lease(1, 1)).await.expect("absent");
        two.put_if(key(2), Expect::Absent, lease_of("n2", 2, 1)).await.expect("absent");
        cluster.kubectl(&["delete", "node", "n2"]);
        let bound = Instant::now() + Duration::from_secs(120);
        while listed(&one).await.entries.contains_key(&key(2)) {
            assert!(Instant::now() < bound, "the entry of a Node that is gone is still there");
        }
        loop {
            match tokio::time::timeout_at(bound.into(), data(&mut watch)).await.expect("told") {
                Change::Delete { key: at, .. } => break assert_eq!(at, key(2)),
                Change::Put { .. } => {}
                change => panic!("{change:?}"),
            }
        }
        assert!(listed(&one).await.entries.contains_key(&key(1)));
        // Its daemon, if one still runs, leases nothing for a Node that is not there.
        let error = two.put_if(key(2), Expect::Absent, lease_of("n2", 2, 2)).await.expect_err("no Node");
        assert_eq!(
            error.to_string(),
            "the cluster has no Node n2, so it gets no subnet: set node.name to a name of `kubectl get nodes`, or let the kubelet register it"
        );
        // Another node may have the block, and the Node may come back.
        one.put_if(key(2), Expect::Absent, lease(2, 3)).await.expect("free");
    });
}
