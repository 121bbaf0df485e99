//! What only Kubernetes can suffer: restarts, forgotten revisions, definitions of another version, Nodes that go.

use serde_json::{Value, json};
use weft_ipam::store::kubernetes::KubernetesOptions;

use super::apiserver::{self, Cluster};
use super::support::{Cable, copy};
use super::*;

pub(super) fn open(options: KubernetesOptions) -> KubernetesStore {
    KubernetesStore::open(options).expect("good options")
}

/// A lease of [`key`] of another node than n1.
pub(super) fn lease_of(node: &str, subnet: u8, number: u8) -> Vec<u8> {
    let value = LeaseValue::decode(key(subnet), &lease(subnet, number)).expect("a lease");
    LeaseValue { node: node.parse().expect("a name"), ..value }.encode()
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
