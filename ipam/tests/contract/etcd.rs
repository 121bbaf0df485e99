//! What only etcd can suffer: restarts, compaction, lost connections and members, a full disk.

use std::time::Instant;

use serde_json::json;
use weft_ipam::store::etcd::EtcdOptions;

use super::server::{self, Etcd, options};
use super::support::{Cable, copy};
use super::*;

pub fn open(options: EtcdOptions) -> EtcdStore {
    EtcdStore::open(options).expect("good options")
}

/// Opens the store of another node.
fn open_as(node: &str, options: EtcdOptions) -> EtcdStore {
    open(EtcdOptions { node: node.parse().expect("a name"), ..options })
}

/// Base64, as etcd's gateway wants keys and values.
pub fn base64(text: &str) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let chunk = |bytes: &[u8]| {
        let group =
            bytes.iter().fold(0_u32, |group, byte| group << 8 | u32::from(*byte)) << (8 * (3 - bytes.len()));
        let letter = |at: usize| char::from(LETTERS[(group >> (18 - 6 * at) & 63) as usize]);
        (0..4).map(|at| if at <= bytes.len() { letter(at) } else { '=' }).collect::<String>()
    };
    text.as_bytes().chunks(3).map(chunk).collect()
}

#[test]
fn entries_are_keys_of_etcd_under_the_prefix_and_share_the_nodes_lease() {
    if server::missing() {
        return;
    }
    let etcd = Etcd::start();
    runtime().block_on(async {
        let store = open(EtcdOptions { prefix: "/net/a".into(), ..etcd.options() });
        store.put_if(key(1), Expect::Absent, b"one".to_vec()).await.expect("absent");
        store.put_if(key(2), Expect::Absent, b"two".to_vec()).await.expect("absent");
        let other = open(etcd.options());
        assert!(other.list().await.expect("up").entries.is_empty(), "another prefix is another store");
    });
    let read = |name: &str| etcd.post("kv/range", &json!({"key": base64(name)}));
    let entry = &read("/net/a/v1/leases/10.32.1.0/24")["kvs"][0];
    assert_eq!(entry["value"], base64("one"));
    assert!(read("/net/a/v1/store")["kvs"][0]["lease"].is_null(), "the store's name stays");
    let leases = etcd.post("lease/leases", &json!({}));
    assert_eq!(leases["leases"].as_array().map(Vec::len), Some(1), "{leases}");
    assert_eq!(leases["leases"][0]["ID"], entry["lease"]);
    let lease = etcd.post("lease/timetolive", &json!({"ID": entry["lease"], "keys": true}));
    assert_eq!(lease["grantedTTL"], "604800");
    assert_eq!(lease["keys"].as_array().map(Vec::len), Some(2), "{lease}");
}

#[test]
fn entries_of_a_node_that_gives_no_sign_vanish_and_those_of_one_that_does_stay() {
    if server::missing() {
        return;
    }
    let etcd = Etcd::start();
    let short = || EtcdOptions { abandon_after: Duration::from_secs(3), ..etcd.options() };
    runtime().block_on(async {
        let gone = open_as("n2", short());
        gone.put_if(key(2), Expect::Absent, b"gone".to_vec()).await.expect("absent");
        drop(gone);
        let alive = open(short());
        alive.put_if(key(1), Expect::Absent, b"alive".to_vec()).await.expect("absent");
        let bound = Instant::now() + Duration::from_secs(60);
        while alive.list().await.expect("up").entries.contains_key(&key(2)) {
            assert!(Instant::now() < bound, "the abandoned entry is still there");
        }
        // Had lists been no signs of life, this one would have gone at most a second later.
        let until = Instant::now() + Duration::from_secs(5);
        while Instant::now() < until {
            assert!(alive.list().await.expect("up").entries.contains_key(&key(1)));
        }
    });
}

#[test]
fn a_restart_loses_nothing_and_says_what_to_do_meanwhile() {
    if server::missing() {
        return;
    }
    let mut etcd = Etcd::start();
    let store = open(etcd.options());
    runtime().block_on(async {
        let mut watch = store.watch();
        let first = store.put_if(key(1), Expect::Absent, b"a".to_vec()).await.expect("absent");
        learns_of(&mut watch, first).await;
        let before = store.list().await.expect("up");
        etcd.stop();
        let error = sentence(store.list().await);
        assert_eq!(
            error,
            format!(
                "etcd at {} cannot be reached (Connection refused (os error 111)): start it, or correct store.endpoints",
                etcd.url()
            )
        );
        assert!(matches!(store.put_if(key(2), Expect::Absent, vec![]).await, Err(PutError::Store(_))));
        etcd.launch();
        etcd.await_healthy();
        assert_eq!(listed(&store).await, before);
        let second = store.put_if(key(2), Expect::Absent, b"b".to_vec()).await.expect("absent");
        learns_of(&mut watch, second).await;
    });
}

#[test]
fn a_watch_goes_on_where_it_was_cut() {
    if server::missing() {
        return;
    }
    let etcd = Etcd::start();
    let cable = Cable::to(etcd.port);
    let (store, other) = (open(options(&[server::url(cable.port)])), open_as("n2", etcd.options()));
    runtime().block_on(async {
        let mut watch = store.watch();
        assert_eq!(changed(&mut watch).await, Some(Change::Relist));
        cable.cut();
        let mut written = Vec::new();
        for number in 1..=32 {
            let value = vec![number];
            let revision = other.put_if(key(number), Expect::Absent, value.clone()).await.expect("absent");
            written.push(Change::Put { key: key(number), entry: Entry { value, revision } });
        }
        cable.mend();
        for expected in &written {
            assert_eq!(data(&mut watch).await, *expected);
        }
    });
}

#[test]
fn a_watch_that_was_compacted_away_tells_to_list_and_begins_anew() {
    if server::missing() {
        return;
    }
    let etcd = Etcd::start();
    let cable = Cable::to(etcd.port);
    let (store, other) = (open(options(&[server::url(cable.port)])), open_as("n2", etcd.options()));
    runtime().block_on(async {
        let mut watch = store.watch();
        assert_eq!(changed(&mut watch).await, Some(Change::Relist));
        cable.cut();
        for number in 1..=3 {
            other.put_if(key(number), Expect::Absent, vec![]).await.expect("absent");
        }
        etcd.post("kv/compaction", &json!({"revision": etcd.revision().to_string(), "physical": true}));
        cable.mend();
        assert_eq!(changed(&mut watch).await, Some(Change::Relist));
        assert_eq!(listed(&store).await.entries.len(), 3);
        // What is written before the new watch began is not told either: write until something is.
        let mut revision = other.put_if(key(9), Expect::Absent, vec![]).await.expect("absent");
        let told = loop {
            match tokio::time::timeout(Duration::from_millis(200), data(&mut watch)).await {
                Ok(change) => break change,
                Err(_) => {
                    revision =
                        other.put_if(key(9), Expect::Revision(revision), vec![]).await.expect("current")
                }
            }
        };
        assert!(matches!(told, Change::Put { key: at, .. } if at == key(9)), "{told:?}");
    });
}

#[test]
fn a_quiet_watch_survives_compaction_because_etcd_tells_of_progress() {
    if server::missing() {
        return;
    }
    let etcd = Etcd::with(|_| vec!["--experimental-watch-progress-notify-interval=100ms".into()]);
    let cable = Cable::to(etcd.port);
    let (store, other) = (open(options(&[server::url(cable.port)])), open_as("n2", etcd.options()));
    runtime().block_on(async {
        let mut watch = store.watch();
        assert_eq!(changed(&mut watch).await, Some(Change::Relist));
        // Others use the same etcd: its revision grows, and no entry changes.
        for _ in 0..50 {
            etcd.post("kv/put", &json!({"key": base64("/other"), "value": ""}));
        }
        let revision = etcd.revision();
        // Progress is told once the watch was idle for the interval; there is no sign of it but this.
        let waits = tokio::time::timeout(Duration::from_secs(3), watch.changed()).await;
        assert!(waits.is_err(), "nothing of this store changed: {waits:?}");
        cable.cut();
        etcd.post("kv/compaction", &json!({"revision": revision.to_string(), "physical": true}));
        let revision = other.put_if(key(1), Expect::Absent, vec![]).await.expect("absent");
        cable.mend();
        // A watch that had to begin anew would not know it.
        let expected = Change::Put { key: key(1), entry: Entry { value: vec![], revision } };
        assert_eq!(data(&mut watch).await, expected);
    });
}

#[test]
fn a_deaf_member_is_noticed_within_the_bound_and_a_write_to_it_is_unknown() {
    if server::missing() {
        return;
    }
    let etcd = Etcd::start();
    let store = open(etcd.options());
    runtime().block_on(async {
        let mut watch = store.watch();
        let first = store.put_if(key(1), Expect::Absent, b"a".to_vec()).await.expect("absent");
        learns_of(&mut watch, first).await;
        etcd.pause(true);
        let asked = Instant::now();
        let result = store.put_if(key(2), Expect::Absent, b"b".to_vec()).await;
        assert!(asked.elapsed() < BOUND, "{:?}", asked.elapsed());
        let Err(PutError::Store(error)) = result else { panic!("{result:?} while etcd is stopped") };
        assert_eq!(
            error.to_string(),
            format!(
                "etcd at {} did not answer within 5 s: look at `etcdctl endpoint status --cluster`",
                etcd.url()
            )
        );
        let asked = Instant::now();
        sentence(store.list().await);
        assert!(asked.elapsed() < BOUND, "{:?}", asked.elapsed());
        etcd.pause(false);
        let entries = listed(&store).await.entries;
        assert!(entries.get(&key(2)).is_none_or(|entry| entry.value == b"b"), "{entries:?}");
        let last = store.delete_if(key(1), first).await.expect("current");
        learns_of(&mut watch, last).await;
    });
}

#[test]
fn a_full_etcd_says_so_and_goes_on_when_there_is_room() {
    if server::missing() {
        return;
    }
    let etcd = Etcd::with(|_| vec!["--quota-backend-bytes=200000".into()]);
    let store = open(etcd.options());
    runtime().block_on(async {
        let mut revision = store.put_if(key(1), Expect::Absent, vec![b'x'; 9_000]).await.expect("absent");
        let error = loop {
            match store.put_if(key(1), Expect::Revision(revision), vec![b'x'; 9_000]).await {
                Ok(next) => revision = next,
                Err(error) => break error,
            }
        };
        assert_eq!(
            error.to_string(),
            "etcd is out of space (alarm NOSPACE): make room with `etcdctl compact` and `etcdctl defrag`, or raise its --quota-backend-bytes, then run `etcdctl alarm disarm`"
        );
        let snapshot = store.list().await.expect("reading goes on");
        // etcd may do the very write that fills it, and answer that there is no space.
        let last = snapshot.entries[&key(1)].revision;
        assert!(last == revision || last == revision + 1, "{last} after {revision}");
        revision = last;
        // Else another node could delete as expired what its owner cannot renew.
        assert_eq!(store.delete_if(key(1), revision).await, Err(error));
        etcd.post("kv/compaction", &json!({"revision": etcd.revision().to_string(), "physical": true}));
        etcd.post("maintenance/defragment", &json!({}));
        let alarm = etcd.post("maintenance/alarm", &json!({"action": "GET"}))["alarms"][0].clone();
        assert_eq!(alarm["alarm"], "NOSPACE");
        let disarm = json!({"action": "DEACTIVATE", "memberID": alarm["memberID"], "alarm": "NOSPACE"});
        etcd.post("maintenance/alarm", &disarm);
        store.put_if(key(1), Expect::Revision(revision), vec![b'y']).await.expect("room again");
    });
}

#[test]
fn of_three_members_any_may_be_killed_the_leader_too() {
    if server::missing() {
        return;
    }
    let mut members = Etcd::three();
    let all = members.iter().map(Etcd::url).collect::<Vec<_>>();
    runtime().block_on(async {
        // The store talks to the member that is about to go.
        let leader = members.iter().position(Etcd::leads).expect("a healthy cluster has a leader");
        let mut endpoints = all.clone();
        endpoints.rotate_left(leader);
        let store = open(options(&endpoints));
        let mut watch = store.watch();
        let mut revision = store.put_if(key(1), Expect::Absent, vec![0]).await.expect("absent");
        learns_of(&mut watch, revision).await;
        let before = store.list().await.expect("up");
        members[leader].stop();
        let mut unknown = 0;
        for round in 1..=20 {
            // As the lease machine does it: what became of an unanswered write, a list tells.
            loop {
                match store.put_if(key(1), Expect::Revision(revision), vec![round]).await {
                    Ok(next) => revision = next,
                    Err(PutError::Store(_)) => {
                        unknown += 1;
                        revision = listed(&store).await.entries[&key(1)].revision;
                        continue;
                    }
                    Err(PutError::Conflict(entry)) => panic!("nobody else writes: {entry:?}"),
                }
                break;
            }
        }
        assert!(unknown < 20, "most writes went through: {unknown}");
        learns_of(&mut watch, revision).await;
        let after = listed(&store).await;
        assert_eq!(after.store_id, before.store_id);
        assert_eq!(after.entries[&key(1)].value, [20]);

        // The second one gone, nobody may decide.
        let second = (leader + 1) % 3;
        members[second].stop();
        let asked = Instant::now();
        let error = sentence(store.list().await);
        assert!(asked.elapsed() < BOUND, "{:?}", asked.elapsed());
        assert!(error.contains("etcd at"), "{error}");
        members[second].launch();
        members[second].await_healthy();
        assert_eq!(listed(&store).await.entries, after.entries);
    });
}

#[test]
fn endpoints_of_two_clusters_are_refused_and_nothing_is_written() {
    if server::missing() {
        return;
    }
    // With the same token and the same names etcd gives two clusters one identifier: the peers' addresses tell them apart.
    let (one, other) = (Etcd::start(), Etcd::start());
    runtime().block_on(async {
        let own = open(one.options());
        let revision = own.put_if(key(1), Expect::Absent, vec![1]).await.expect("absent");
        for endpoints in [[one.url(), other.url()], [other.url(), one.url()]] {
            let mixed = open_as("n2", options(&endpoints));
            let error = sentence(mixed.list().await);
            assert!(error.contains("of the etcd cluster"), "{error}");
            assert!(error.contains("members of one cluster"), "{error}");
            let write = mixed.put_if(key(2), Expect::Absent, vec![2]).await.expect_err("two clusters");
            assert!(write.to_string().contains("members of one cluster"), "{write}");
        }
        let left = listed(&own).await;
        assert_eq!((left.revision, left.entries.len()), (revision, 1), "nothing was written");
        assert!(listed(&open(other.options())).await.entries.is_empty());
    });
}

#[test]
fn a_watch_leaves_a_member_that_hangs_though_nobody_calls() {
    if server::missing() {
        return;
    }
    let members = Etcd::three();
    let follower = members.iter().position(|member| !member.leads()).expect("two follow");
    let mut endpoints = members.iter().map(Etcd::url).collect::<Vec<_>>();
    endpoints.rotate_left(follower);
    runtime().block_on(async {
        let store = open(options(&endpoints));
        let other = open_as("n2", options(&endpoints[1..]));
        let mut watch = store.watch();
        assert_eq!(changed(&mut watch).await, Some(Change::Relist));
        members[follower].pause(true);
        let revision = other.put_if(key(1), Expect::Absent, vec![]).await.expect("absent");
        // Keep-alive: 10 s and 5 s, then another member.
        learns_of(&mut watch, revision).await;
        members[follower].pause(false);
    });
}

#[test]
fn an_emptied_store_begins_anew_only_with_a_new_run() {
    if server::missing() {
        return;
    }
    let etcd = Etcd::start();
    runtime().block_on(async {
        let store = open(etcd.options());
        let revision = store.put_if(key(1), Expect::Absent, vec![]).await.expect("absent");
        let before = store.list().await.expect("up");
        etcd.post("kv/deleterange", &json!({"key": base64("/weft/"), "range_end": base64("/weft0")}));
        let expected =
            "the store /weft in etcd was emptied: restore it, or restart weftd to begin an empty one";
        assert_eq!(sentence(store.list().await), expected);
        let write = store.put_if(key(2), Expect::Absent, vec![]).await.expect_err("not in this store");
        assert_eq!(
            write.to_string(),
            "the store /weft in etcd was emptied or replaced: its leases are read again"
        );
        let after = open_as("n2", etcd.options()).list().await.expect("a new run begins");
        assert!(after.entries.is_empty() && after.store_id != before.store_id);
        let write = store.put_if(key(1), Expect::Revision(revision), vec![]).await;
        assert!(matches!(write, Err(PutError::Store(_))), "{write:?}");
        assert_eq!(store.list().await.expect("up"), after);
    });
}

#[test]
fn a_store_set_back_to_a_backup_is_another_history_to_every_node() {
    if server::missing() {
        return;
    }
    let mut etcd = Etcd::start();
    let (data, backup) = (etcd.directory().join("data"), etcd.directory().join("backup"));
    runtime().block_on(async {
        let store = open(etcd.options());
        let mut watch = store.watch();
        let old = store.put_if(key(1), Expect::Absent, b"old".to_vec()).await.expect("absent");
        learns_of(&mut watch, old).await;
        etcd.stop();
        copy(&data, &backup);
        etcd.restart();
        listed(&store).await;
        let new = store.put_if(key(1), Expect::Revision(old), b"new".to_vec()).await.expect("current");
        let mut after = 0;
        for number in 10..20 {
            after = store.put_if(key(number), Expect::Absent, b"after".to_vec()).await.expect("absent");
        }
        learns_of(&mut watch, after).await;
        let before = store.list().await.expect("up");
        etcd.stop();
        std::fs::remove_dir_all(&data).expect("our own");
        std::fs::rename(&backup, &data).expect("our own");
        etcd.restart();
        // Whoever writes before he has listed again writes nothing.
        loop {
            let blind = store.put_if(key(1), Expect::Revision(new), b"blind".to_vec()).await;
            let Err(PutError::Store(error)) = blind else { panic!("{blind:?} in another history") };
            if error.to_string().contains("was emptied or replaced") {
                break;
            }
        }
        let restored = listed(&store).await;
        assert!(restored.revision < before.revision && restored.store_id != before.store_id);
        assert_eq!(restored.entries[&key(1)].value, b"old");
        let late = store.put_if(key(1), Expect::Revision(new), b"late".to_vec()).await;
        assert!(matches!(late, Err(PutError::Conflict(Some(entry))) if entry.value == b"old"));
        let other = open_as("n2", etcd.options()).list().await.expect("up");
        assert_eq!(other.store_id, restored.store_id, "the new name is the store's, not the node's");
        let last = store.put_if(key(3), Expect::Absent, vec![]).await.expect("absent");
        assert!(last < before.revision, "the watch cannot wait for a revision of the other history");
        learns_of(&mut watch, last).await;
    });
}
