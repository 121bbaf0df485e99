//! Any order of assigning, adopting and releasing against a simple list: no address twice, none lost.
#![no_main]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use libfuzzer_sys::fuzz_target;
use weft_ipam::pods::{AttachmentId, PodPool};

fuzz_target!(|bytes: &[u8]| {
    let subnets = ["10.32.0.0/28", "fd00::/64"].map(|subnet| subnet.parse().expect("a subnet"));
    let other = ["10.32.0.16/28".parse().expect("a subnet")];
    let mut pool = PodPool::new(&subnets, &["10.32.0.4/31".parse().expect("a prefix")], 5);
    let mut model: BTreeMap<AttachmentId, Vec<IpAddr>> = BTreeMap::new();
    for pair in bytes.chunks_exact(2) {
        let id = AttachmentId { container: format!("c{}", pair[1] % 24), ifname: "eth0".into() };
        let address = IpAddr::V4(Ipv4Addr::new(10, 32, 0, pair[1] % 40));
        let before = model.get(&id).cloned();
        let outcome = match pair[0] % 6 {
            0 | 1 => Some(pool.assign(&id, &[])),
            2 => Some(pool.assign(&id, &[address])),
            3 => Some(pool.adopt(&id, &[address])),
            4 => {
                assert_eq!(pool.release(&id).is_some(), model.remove(&id).is_some());
                None
            }
            _ => {
                pool.set_subnets(if pair[1] % 2 == 0 { &subnets } else { &other });
                None
            }
        };
        if let Some(Ok(given)) = outcome {
            let given: Vec<IpAddr> = given.0.iter().map(|pod| pod.address).collect();
            assert!(before.is_none_or(|before| before == given), "an attachment keeps its addresses");
            for (owner, held) in &model {
                assert!(
                    *owner == id || held.iter().all(|held| !given.contains(held)),
                    "an address is given twice"
                );
            }
            model.insert(id, given);
        }
        assert_eq!(pool.held().count(), model.len());
    }
    pool.set_subnets(&subnets);
    for id in model.keys() {
        assert!(pool.release(id).is_some());
    }
    for subnet in subnets {
        assert_eq!(pool.free(subnet), pool.capacity(subnet), "an address is lost");
    }
});
