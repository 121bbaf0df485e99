//! One contract for every store, and what only the SQLite file can suffer.
//!
//! A new store joins by one line in `every_store`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};
use weft_ipam::lease::LeaseValue;
use weft_ipam::store::{
    Change, Entry, EtcdStore, Expect, Key, KubernetesStore, MemoryStore, PutError, Snapshot, SqliteStore,
    StaticStore, Store, StoreError, Watch,
};
use weft_wire::types::{Epoch, PublicKey};

#[path = "contract/admission.rs"]
mod admission;
#[path = "contract/apiserver.rs"]
mod apiserver;
#[path = "contract/authority.rs"]
mod authority;
#[path = "contract/certificates.rs"]
mod certificates;
#[path = "contract/etcd.rs"]
mod etcd;
#[path = "contract/kubernetes.rs"]
mod kubernetes;
#[path = "contract/leases.rs"]
mod leases;
#[path = "contract/objects.rs"]
mod objects;
#[path = "contract/refusals.rs"]
mod refusals;
#[path = "contract/secured.rs"]
mod secured;
#[path = "contract/server.rs"]
mod server;
#[path = "contract/sqlite.rs"]
mod sqlite;
#[path = "contract/support.rs"]
mod support;

use apiserver::Cluster;
use server::Etcd;
use support::Directory;

/// Longer than any call may take.
const BOUND: Duration = Duration::from_secs(13);

fn key(number: u8) -> Key {
    format!("10.32.{number}.0/24").parse().expect("a subnet")
}

/// A lease of a subnet of ours; another one for each number. Every store takes it.
fn lease(subnet: u8, number: u8) -> Vec<u8> {
    let value = LeaseValue {
        subnet: key(subnet),
        node: "n1".parse().expect("a name"),
        site: "default".parse().expect("a name"),
        key: PublicKey([1; 32]),
        epoch: Epoch(u64::from(number)),
        ttl: None,
        renewals: u64::from(number),
        boot: "b".into(),
        gossip: vec!["192.0.2.1:7117".parse().expect("an address")],
        asked: None,
    };
    value.encode()
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Runs one law against each store, on the kind of loop that the daemon has.
fn every_store(law: impl AsyncFn(Arc<dyn Store>)) {
    let directory = Directory::new();
    let mut stores: Vec<Arc<dyn Store>> = vec![
        Arc::new(MemoryStore::new()),
        Arc::new(SqliteStore::open(directory.join("store.db"))),
        Arc::new(StaticStore::new((0..=255).map(key).collect())),
    ];
    let etcd = (!server::missing()).then(Etcd::start);
    if let Some(etcd) = &etcd {
        stores.push(Arc::new(EtcdStore::open(etcd.options()).expect("good options")));
    }
    let cluster = (!apiserver::missing()).then(Cluster::start);
    if let Some(cluster) = &cluster {
        stores.push(Arc::new(KubernetesStore::open(cluster.options("n1")).expect("good options")));
    }
    for store in stores {
        eprintln!("store: {}", store.kind());
        runtime().block_on(law(store));
    }
}

/// Waits until a watcher learns of what was written at a revision, or is told to list.
async fn learns_of(watch: &mut Watch, revision: u64) {
    loop {
        match changed(watch).await.expect("the store is there") {
            Change::Put { entry, .. } if entry.revision < revision => {}
            Change::Delete { revision: earlier, .. } if earlier < revision => {}
            _ => return,
        }
    }
}

/// Asks until the store answers, and returns what it said.
async fn listed(store: &dyn Store) -> Snapshot {
    let bound = Instant::now() + Duration::from_secs(60);
    loop {
        match store.list().await {
            Ok(snapshot) => return snapshot,
            Err(error) => assert!(Instant::now() < bound, "no answer within 60 s: {error}"),
        }
    }
}

/// Waits for the next change that is more than a wake-up.
async fn data(watch: &mut Watch) -> Change {
    loop {
        match changed(watch).await.expect("the store is there") {
            Change::Relist => {}
            change => return change,
        }
    }
}

/// Is [`learns_of`] for the deletion of an entry, whose revision is at most the one that the store answered with.
async fn learns_of_deletion(watch: &mut Watch, at_most: u64) {
    loop {
        match changed(watch).await.expect("the store is there") {
            Change::Put { .. } => {}
            Change::Delete { revision, .. } => return assert!(revision <= at_most),
            _ => return,
        }
    }
}

async fn changed(watch: &mut Watch) -> Option<Change> {
    tokio::time::timeout(Duration::from_secs(30), watch.changed()).await.expect("a change within 30 s")
}

/// Others write to the same etcd of Kubernetes all the time, so that a list may be of a later revision.
fn is_of(store: &dyn Store, listed: u64, last: u64) -> bool {
    listed == last || store.kind() == "kubernetes" && listed > last
}

#[test]
fn an_empty_store_lists_nothing_and_keeps_its_name() {
    every_store(async |store| {
        let first = store.list().await.expect("up");
        assert!(first.entries.is_empty() && !first.store_id.is_empty());
        let second = store.list().await.expect("up");
        assert_eq!(second, Snapshot { revision: second.revision, ..first.clone() });
        assert!(is_of(&*store, second.revision, first.revision));
    });
}

#[test]
fn a_write_happens_only_if_the_key_is_as_expected() {
    every_store(async |store| {
        let first = store.put_if(key(1), Expect::Absent, lease(1, 1)).await.expect("absent");
        let entry = Entry { value: lease(1, 1), revision: first };
        let conflict = || Err(PutError::Conflict(Some(entry.clone())));
        assert_eq!(store.put_if(key(1), Expect::Absent, lease(1, 2)).await, conflict());
        assert_eq!(store.put_if(key(1), Expect::Revision(first + 1), lease(1, 2)).await, conflict());
        assert_eq!(store.delete_if(key(1), first + 1).await, conflict());
        let none = Err(PutError::Conflict(None));
        assert_eq!(store.put_if(key(2), Expect::Revision(first), lease(2, 2)).await, none);
        assert_eq!(store.delete_if(key(2), first).await, none);
        let snapshot = store.list().await.expect("up");
        assert!(is_of(&*store, snapshot.revision, first));
        assert_eq!(snapshot.entries.into_iter().collect::<Vec<_>>(), [(key(1), entry)]);
    });
}

#[test]
fn revisions_only_grow_also_by_deletions() {
    every_store(async |store| {
        let mut last = 0;
        for round in 0..5_u8 {
            let put = store.put_if(key(round), Expect::Absent, lease(round, 1)).await.expect("absent");
            let over =
                store.put_if(key(round), Expect::Revision(put), lease(round, 2)).await.expect("current");
            let deleted = store.delete_if(key(round), over).await.expect("current");
            assert!(last < put && put < over && over < deleted, "{last} {put} {over} {deleted}");
            last = deleted;
            assert!(is_of(&*store, store.list().await.expect("up").revision, last));
        }
    });
}

#[test]
fn calls_are_answered_in_the_order_made_and_need_no_polling_to_happen() {
    every_store(async |store| {
        let first = store.put_if(key(1), Expect::Absent, lease(1, 1));
        drop(store.put_if(key(2), Expect::Absent, lease(2, 2)));
        let listed = store.list();
        let (listed, first) = (listed.await.expect("up"), first.await.expect("absent"));
        assert_eq!(listed.entries[&key(1)].revision, first);
        assert_eq!(listed.entries.len(), 2, "dropping an answer does not undo the call");
    });
}

#[test]
fn any_bytes_come_back_as_written_or_are_refused_with_a_sentence() {
    every_store(async |store| {
        let values = [vec![], vec![0, 255, 0], "ü\"'; --".as_bytes().to_vec(), vec![b'x'; 100_000]];
        for (number, value) in (0..).zip(&values) {
            let written = store.put_if(key(number), Expect::Absent, value.clone()).await;
            if store.kind() != "kubernetes" {
                written.expect("absent");
                continue;
            }
            let error =
                written.expect_err("a PodSubnet has fields, and these bytes are not them").to_string();
            assert!(error.starts_with("the store in Kubernetes takes leases of n1 only"), "{error}");
        }
        let snapshot = store.list().await.expect("up");
        let written = if store.kind() == "kubernetes" { &[] } else { &values[..] };
        assert!(snapshot.entries.values().map(|entry| &entry.value).eq(written));
    });
}

#[test]
fn every_watcher_wakes_for_a_write_and_a_deletion() {
    every_store(async |store| {
        let (mut one, mut two) = (store.watch(), store.watch());
        let revision = store.put_if(key(1), Expect::Absent, lease(1, 1)).await.expect("absent");
        learns_of(&mut one, revision).await;
        learns_of(&mut two, revision).await;
        drop(two);
        let deleted = store.delete_if(key(1), revision).await.expect("current");
        learns_of_deletion(&mut one, deleted).await;
    });
}

#[test]
fn of_many_racing_writers_one_wins_each_round() {
    every_store(async |store| {
        for round in 0..20 {
            let racers: Vec<_> =
                (0..8).map(|racer| store.put_if(key(round), Expect::Absent, lease(round, racer))).collect();
            let mut won = 0;
            for racer in racers {
                won += u32::from(racer.await.is_ok());
            }
            assert_eq!(won, 1);
        }
    });
}

#[test]
fn a_static_store_takes_only_the_subnets_that_the_operator_named() {
    let store = StaticStore::new(vec![key(1)]);
    let error = runtime().block_on(store.put_if(key(2), Expect::Absent, vec![])).expect_err("not named");
    assert_eq!(
        error.to_string(),
        "10.32.2.0/24 is not among this node's static subnets: name it in [store] subnets, or use another store type"
    );
}

#[test]
fn faults_of_the_memory_store_lose_the_call_or_only_its_answer() {
    use weft_ipam::store::memory::Fault;
    let store = MemoryStore::new();
    runtime().block_on(async {
        store.fault_next(Fault::Refuse, 1);
        assert!(matches!(store.put_if(key(1), Expect::Absent, vec![]).await, Err(PutError::Store(_))));
        assert!(store.list().await.expect("up again").entries.is_empty());
        store.fault_next(Fault::LoseAnswer, 1);
        assert!(matches!(store.put_if(key(1), Expect::Absent, vec![]).await, Err(PutError::Store(_))));
        assert_eq!(store.list().await.expect("up again").entries.len(), 1);
        store.set_fault(Some(Fault::Refuse));
        assert!(store.list().await.is_err() && store.list().await.is_err());
        store.set_fault(None);
        let before = store.list().await.expect("up again");
        store.wipe();
        let after = store.list().await.expect("up");
        assert!(after.entries.is_empty() && after.store_id != before.store_id);
    });
}

fn sentence(result: Result<impl std::fmt::Debug, StoreError>) -> String {
    result.expect_err("the store is broken").to_string()
}
