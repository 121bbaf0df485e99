//! The lease machine over real stores, driven as the daemon drives it.

use std::time::Instant;

use weft_ipam::carve::{Carver, ClusterCidr};
use weft_ipam::lease::{LeaseConfig, LeaseEvent, Leasing, Output};
use weft_wire::types::PublicKey;

use super::*;

fn node(number: u8, cidr: &str, node_prefix: u8) -> Leasing {
    let cidr = ClusterCidr { cidr: cidr.parse().expect("a prefix"), node_prefix, reserved: Vec::new() };
    let carver = Carver::new(vec![cidr]).expect("a valid CIDR");
    let name = |text: &str| text.parse().expect("a name");
    let key = PublicKey([number; 32]);
    let node = name(&format!("n{number}"));
    let site = "default".parse().expect("a name");
    let config = LeaseConfig::new(node, site, key, carver, format!("boot-{number}"));
    Leasing::new(config, Vec::new(), [number; 32], Instant::now())
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
