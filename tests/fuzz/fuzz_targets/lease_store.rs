//! What the store holds: any bytes under any key, and any order of answers to the lease machine. It never holds what
//! the store gives to another.
#![no_main]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use weft_ipam::carve::{Carver, ClusterCidr};
use weft_ipam::lease::{Asked, LeaseConfig, LeaseValue, Leasing, Output};
use weft_ipam::store::memory::MemoryMap;
use weft_ipam::store::{Change, Entry, Expect, Snapshot};
use weft_wire::mesh::NodeKey;

fn leasing(kept: bool, now: Instant) -> Leasing {
    let cidr = ClusterCidr {
        cidr: "10.32.0.0/28".parse().expect("a prefix"),
        node_prefix: 30,
        reserved: Vec::new(),
    };
    let carver = Carver::new(vec![cidr]).expect("the range is valid");
    let key = NodeKey::from_secret([1; 32]).public();
    let name = "n1".parse().expect("a name");
    let config = LeaseConfig::new(name, "s1".parse().expect("a name"), key, carver, "boot".into());
    let config = if kept { config.kept_by_store() } else { config.with_ttl(Duration::from_secs(60)) };
    Leasing::new(config, Vec::new(), [3; 32], now)
}

fuzz_target!(|bytes: &[u8]| {
    let mut now = Instant::now();
    let kept = bytes.first().is_some_and(|first| first % 2 == 1);
    let mut leasing = leasing(kept, now);
    let mut store = MemoryMap::default();
    let subnets: Vec<weft_wire::types::Subnet> =
        (0..4).map(|block| format!("10.32.0.{}/30", block * 4).parse().expect("a subnet")).collect();
    let mut parts = bytes.chunks(24);
    for _ in 0..200 {
        match leasing.poll_output(now) {
            Output::Event(_) => {}
            Output::Wait { until } => {
                let Some(part) = parts.next() else { break };
                now = if part[0] % 2 == 0 { until } else { now + Duration::from_secs(u64::from(part[0])) };
                // Someone else writes: nonsense, or a lease of another node.
                let key = subnets[usize::from(part[0] / 2) % 4];
                let entry = store.list("s").entries.get(&key).cloned();
                let value = match part.get(1) {
                    Some(owner) if owner % 3 > 0 => LeaseValue {
                        subnet: key,
                        // One of four is a namesake of ours.
                        node: [format!("m{}", owner % 4), "n1".into()][usize::from(owner % 4 == 1)]
                            .parse()
                            .expect("a name"),
                        site: "s1".parse().expect("a name"),
                        key: NodeKey::from_secret([*owner; 32]).public(),
                        epoch: weft_wire::types::Epoch(u64::from(*owner) + 1),
                        ttl: (!kept).then(|| Duration::from_secs(u64::from(*owner))),
                        renewals: 0,
                        boot: "other".into(),
                        gossip: Vec::new(),
                        asked: (owner % 7 == 1).then(|| Asked {
                            key: NodeKey::from_secret([7; 32]).public(),
                            boot: "asks".into(),
                        }),
                    }
                    .encode(),
                    _ => part[1.min(part.len())..].to_vec(),
                };
                drop(LeaseValue::decode(key, &value));
                // Others may take what is free, and overwrite only what is no live lease of ours.
                let held = leasing.held().iter().any(|held| held.subnet == key);
                let expect = entry.as_ref().map_or(Expect::Absent, |entry| Expect::Revision(entry.revision));
                if !held || part[0] % 5 == 0 {
                    drop(store.put_if(key, expect, value));
                    leasing.handle_change(&Change::Relist, now);
                }
                leasing.handle_timeout(now);
            }
            Output::List => {
                let snapshot: Snapshot = store.list("s");
                leasing.handle_snapshot(&snapshot, now);
                let readable: BTreeMap<_, _> = snapshot
                    .entries
                    .iter()
                    .filter_map(|(key, Entry { value, .. })| {
                        Some((*key, LeaseValue::decode(*key, value).ok()?))
                    })
                    .collect();
                for held in leasing.held() {
                    let owner = readable.get(&held.subnet).map(|value| value.node.as_str());
                    assert!(owner.is_none_or(|owner| owner == "n1"), "holds what {owner:?} owns");
                }
            }
            Output::Put { key, expect, value } => {
                let answer = store.put_if(key, expect, value);
                leasing.handle_put(key, answer, now);
            }
            Output::Delete { key, revision } => {
                let answer = store.delete_if(key, revision);
                leasing.handle_delete(key, answer, now);
            }
        }
    }
});
