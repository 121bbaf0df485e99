//! The lease machine over real stores, driven as the daemon drives it.

use std::time::Instant;

use weft_ipam::carve::{Carver, ClusterCidr};
use weft_ipam::lease::{LeaseConfig, LeaseConflict, LeaseEvent, LeaseValue, Leasing, Output};
use weft_ipam::store::EtcdOptions;
use weft_wire::types::PublicKey;

use super::*;

fn node(number: u8, cidr: &str, node_prefix: u8) -> Leasing {
    Leasing::new(config(number, cidr, node_prefix), Vec::new(), [number; 32], Instant::now())
}

/// A node of Kubernetes, whose key is another one after it was reinstalled.
fn kept(number: u8, own_key: u8, cidr: &str) -> Leasing {
    let config = config(number, cidr, 24).kept_by_store();
    let boot = format!("boot-{number}-{own_key}");
    let config = LeaseConfig { key: PublicKey([own_key; 32]), boot, ..config };
    Leasing::new(config, Vec::new(), [own_key; 32], Instant::now())
}

fn config(number: u8, cidr: &str, node_prefix: u8) -> LeaseConfig {
    let cidr = ClusterCidr { cidr: cidr.parse().expect("a prefix"), node_prefix, reserved: Vec::new() };
    let carver = Carver::new(vec![cidr]).expect("a valid CIDR");
    let name = |text: &str| text.parse().expect("a name");
    let key = PublicKey([number; 32]);
    let node = name(&format!("n{number}"));
    let site = "default".parse().expect("a name");
    LeaseConfig::new(node, site, key, carver, format!("boot-{number}"))
}

/// Serves the machine until `done`, and returns what it told.
async fn drive(
    store: &dyn Store,
    leasing: &mut Leasing,
    done: impl Fn(&Leasing, &[LeaseEvent]) -> bool,
) -> Vec<LeaseEvent> {
    let mut watch = store.watch();
    let mut events = Vec::new();
    let bound = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < bound, "not done within 60 s: {leasing:?} {events:?}");
        let now = Instant::now();
        match leasing.poll_output(now) {
            Output::Event(event) => events.push(event),
            Output::List => match store.list().await {
                Ok(snapshot) => leasing.handle_snapshot(&snapshot, now),
                Err(_) => leasing.handle_store_error(now),
            },
            Output::Put { key, expect, value } => match store.put_if(key, expect, value).await {
                Ok(revision) => leasing.handle_put(key, Ok(revision), now),
                Err(PutError::Conflict(current)) => leasing.handle_put(key, Err(current), now),
                Err(PutError::Store(_)) => leasing.handle_store_error(now),
            },
            Output::Delete { key, revision } => match store.delete_if(key, revision).await {
                Ok(revision) => leasing.handle_delete(key, Ok(revision), now),
                Err(PutError::Conflict(current)) => leasing.handle_delete(key, Err(current), now),
                Err(PutError::Store(_)) => leasing.handle_store_error(now),
            },
            Output::Wait { .. } if done(leasing, &events) => return events,
            Output::Wait { until } => {
                let until = until.min(bound);
                if let Ok(Some(change)) = tokio::time::timeout_at(until.into(), watch.changed()).await {
                    leasing.handle_change(&change, Instant::now());
                }
            }
        }
    }
}

fn decided(leasing: &Leasing, events: &[LeaseEvent]) -> bool {
    !leasing.held().is_empty() || events.iter().any(|event| matches!(event, LeaseEvent::Exhausted { .. }))
}

#[test]
fn a_node_leases_and_releases_over_every_store() {
    every_store(async |store| {
        let mut leasing = node(1, "10.32.0.0/20", 24);
        drive(&*store, &mut leasing, decided).await;
        let held = leasing.held();
        assert_eq!(
            store.list().await.expect("up").entries.keys().copied().collect::<Vec<_>>(),
            [held[0].subnet]
        );
        leasing.release(Instant::now());
        drive(&*store, &mut leasing, |leasing, _| leasing.held().is_empty()).await;
        assert!(store.list().await.expect("up").entries.is_empty());
    });
}

#[test]
fn of_daemons_racing_for_the_last_subnets_each_gets_its_own_or_is_told() {
    let directory = Directory::new();
    let file = directory.join("store.db");
    // Eight daemons, four blocks, and two of the daemons want them twice as large.
    let held: Vec<_> = std::thread::scope(|scope| {
        let racers: Vec<_> = (1..=8)
            .map(|number| {
                let file = file.clone();
                scope.spawn(move || {
                    let prefix = if number <= 2 { 23 } else { 24 };
                    let mut leasing = node(number, "10.32.0.0/22", prefix);
                    runtime().block_on(drive(&SqliteStore::open(file), &mut leasing, decided));
                    leasing.held()
                })
            })
            .collect();
        racers.into_iter().flat_map(|racer| racer.join().expect("a racer")).collect()
    });
    assert!((2..=4).contains(&held.len()), "{held:?}");
    for (at, one) in held.iter().enumerate() {
        assert!(held[..at].iter().all(|other| !one.subnet.overlaps(other.subnet)), "{held:?}");
    }
}

#[test]
fn of_daemons_racing_for_one_subnet_of_etcd_one_gets_it_and_the_others_are_told() {
    if server::missing() {
        return;
    }
    let etcd = Etcd::start();
    let held: Vec<_> = std::thread::scope(|scope| {
        let racers: Vec<_> = (1..=6)
            .map(|number| {
                let options =
                    EtcdOptions { node: format!("n{number}").parse().expect("a name"), ..etcd.options() };
                scope.spawn(move || {
                    let store = EtcdStore::open(options).expect("good options");
                    let mut leasing = node(number, "10.32.4.0/24", 24);
                    let events = runtime().block_on(drive(&store, &mut leasing, decided));
                    (number, leasing.held(), events)
                })
            })
            .collect();
        racers.into_iter().map(|racer| racer.join().expect("a racer")).collect()
    });
    let owners: Vec<_> = held.iter().filter(|(_, held, _)| !held.is_empty()).collect();
    let [(owner, lease, _)] = owners[..] else { panic!("{held:?}") };
    let store = EtcdStore::open(etcd.options()).expect("good options");
    let snapshot = runtime().block_on(store.list()).expect("up");
    let entry = &snapshot.entries[&lease[0].subnet];
    let value = LeaseValue::decode(lease[0].subnet, &entry.value).expect("a lease");
    assert_eq!(value.node.to_string(), format!("n{owner}"));
    assert_eq!(value.epoch, lease[0].epoch);
}

#[test]
fn a_node_whose_lease_expired_in_etcd_cannot_overwrite_the_new_owner() {
    if server::missing() {
        return;
    }
    let etcd = Etcd::start();
    let open = |node: &str, abandon_after| {
        let node = node.parse().expect("a name");
        EtcdStore::open(EtcdOptions { node, abandon_after, ..etcd.options() }).expect("good options")
    };
    runtime().block_on(async {
        let mut old = node(1, "10.32.4.0/24", 24);
        let store = open("n1", Duration::from_secs(2));
        drive(&store, &mut old, decided).await;
        let [before] = old.held()[..] else { panic!("{old:?}") };
        // Cut off from etcd for longer than etcd keeps its entry; it renews when it is back.
        drop(store);
        let mut new = node(2, "10.32.4.0/24", 24);
        let other = open("n2", Duration::from_secs(3600));
        drive(&other, &mut new, |leasing, _| !leasing.held().is_empty()).await;
        let [after] = new.held()[..] else { panic!("{new:?}") };
        assert!(after.subnet == before.subnet && after.epoch > before.epoch, "{before:?} {after:?}");

        // A renewal that was under way all the while names the revision that it knew.
        let store = open("n1", Duration::from_secs(3600));
        let entries = other.list().await.expect("up").entries;
        let late = store.put_if(before.subnet, Expect::Revision(before.epoch.0), b"mine".to_vec()).await;
        assert_eq!(late, Err(PutError::Conflict(Some(entries[&after.subnet].clone()))));
        // And the machine, told to write at once, finds that it lost.
        old.rotate_key(PublicKey([9; 32]), Instant::now());
        let events = drive(&store, &mut old, |leasing, _| leasing.held().is_empty()).await;
        let lost = LeaseEvent::Lost { subnet: before.subnet, to: Some("n2".parse().expect("a name")) };
        assert!(events.contains(&lost), "{events:?}");
        assert_eq!(other.list().await.expect("up").entries, entries, "nothing was written over");
    });
}

#[test]
fn a_node_outlives_its_store_and_proves_its_lease_when_it_is_back() {
    let directory = Directory::new();
    let (file, away) = (directory.join("store.db"), directory.join("away.db"));
    let store = SqliteStore::open(&file);
    let mut leasing = node(1, "10.32.0.0/20", 24);
    runtime().block_on(async {
        drive(&store, &mut leasing, decided).await;
        let held = leasing.held();
        std::fs::rename(&file, &away).expect("moved");
        // The watch tells; the machine asks and fails.
        drive(&store, &mut leasing, |leasing, _| leasing.failures() > 0).await;
        assert_eq!(leasing.held(), held);
        std::fs::rename(&away, &file).expect("moved");
        drive(&store, &mut leasing, |leasing, _| leasing.failures() == 0).await;
        assert_eq!(leasing.held(), held);
    });
}

fn in_kubernetes(cluster: &Cluster, number: u8) -> KubernetesStore {
    KubernetesStore::open(cluster.options(&format!("n{number}"))).expect("good options")
}

#[test]
fn of_daemons_racing_for_one_subnet_of_kubernetes_one_gets_it_and_the_others_are_told() {
    if apiserver::missing() {
        return;
    }
    let cluster = Cluster::start();
    let held: Vec<_> = std::thread::scope(|scope| {
        let racers: Vec<_> = (1..=3)
            .map(|number| {
                let store = in_kubernetes(&cluster, number);
                scope.spawn(move || {
                    // Each under its own credentials.
                    let mut leasing = kept(number, number, "10.32.4.0/24");
                    runtime().block_on(drive(&store, &mut leasing, decided));
                    (number, leasing.held())
                })
            })
            .collect();
        racers.into_iter().map(|racer| racer.join().expect("a racer")).collect()
    });
    let owners: Vec<_> = held.iter().filter(|(_, held)| !held.is_empty()).collect();
    let [(owner, lease)] = owners[..] else { panic!("{held:?}") };
    let rows =
        cluster.kubectl(&["get", "psn", "-o", "jsonpath={.items[*].spec.node} {.items[*].spec.epoch}"]);
    assert_eq!(rows, format!("n{owner} {}", lease[0].epoch));
}

#[test]
fn a_node_of_kubernetes_that_was_reinstalled_has_its_subnet_back_unless_the_former_one_runs() {
    if apiserver::missing() {
        return;
    }
    let cluster = Cluster::start();
    let holds = |leasing: &Leasing, _: &[LeaseEvent]| !leasing.held().is_empty();
    runtime().block_on(async {
        let (store, other) = (in_kubernetes(&cluster, 1), in_kubernetes(&cluster, 1));
        let mut first = kept(1, 1, "10.32.4.0/24");
        drive(&store, &mut first, holds).await;
        let before = first.held();
        // A clone of its disk from before weft made a key: the same credentials, and both run.
        let mut clone = kept(1, 2, "10.32.4.0/24");
        let told = |wanted: fn(&LeaseConflict) -> bool| {
            move |_: &Leasing, events: &[LeaseEvent]| {
                events.iter().any(|event| matches!(event, LeaseEvent::Conflict(conflict) if wanted(conflict)))
            }
        };
        let asked = told(|conflict| {
            matches!(conflict, LeaseConflict::NameAsked { key, .. } if *key == PublicKey([2; 32]))
        });
        let runs = told(|conflict| {
            matches!(conflict, LeaseConflict::DuplicateName { key, .. } if *key == PublicKey([1; 32]))
        });
        tokio::join!(drive(&store, &mut first, asked), drive(&other, &mut clone, runs));
        assert_eq!((first.held(), clone.held()), (before.clone(), Vec::new()));
        drop((first, clone));
        // Reinstalled: nobody answers for what it was.
        let mut after = kept(1, 3, "10.32.4.0/24");
        drive(&other, &mut after, holds).await;
        let held = after.held();
        assert!(held[0].subnet == before[0].subnet && held[0].epoch > before[0].epoch, "{before:?} {held:?}");
    });
    let row = cluster.kubectl(&["get", "psn", "-o", "jsonpath={.items[*].spec.key} {.items[*].spec.asked}"]);
    assert_eq!(row.trim(), "03".repeat(32));
}
