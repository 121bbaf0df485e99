use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

fn subnet(text: &str) -> Subnet {
    text.parse().expect("a subnet")
}

fn id(number: usize) -> AttachmentId {
    AttachmentId { container: format!("c{number}"), ifname: "eth0".to_owned() }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn text(addresses: &PodAddresses) -> String {
    addresses.to_string()
}

#[test]
fn an_attachment_gets_one_address_of_each_family_and_keeps_it() {
    let mut pool = PodPool::new(&[subnet("fd00::/64"), subnet("10.32.4.0/24")], &[], 0);
    let first = pool.assign(&id(1), &[]).expect("free");
    assert_eq!(text(&first), "10.32.4.2, fd00::2");
    assert_eq!(first.0[1].subnet, subnet("fd00::/64"));
    assert_eq!(pool.assign(&id(1), &[]).expect("held"), first);
    let other = AttachmentId { ifname: "eth1".to_owned(), ..id(1) };
    assert_eq!(text(&pool.assign(&other, &[]).expect("free")), "10.32.4.3, fd00::3");
    assert_eq!(pool.owner(ip("fd00::3")), Some(&other));
}

#[test]
fn exhaustion_says_so_and_costs_the_other_family_nothing() {
    let (small, large) = (subnet("10.32.4.0/29"), subnet("fd00::/64"));
    let mut pool = PodPool::new(&[small, large], &["10.32.4.4/32".parse().expect("a prefix")], 0);
    assert_eq!(pool.capacity(small), 4);
    for number in 0..4 {
        pool.assign(&id(number), &[]).expect("free");
    }
    let free = pool.free(large);
    let error = pool.assign(&id(9), &[]).expect_err("full");
    assert_eq!(
        error.to_string(),
        "10.32.4.0/29 has no free pod address: all 4 are in use; delete pods on this node, or give nodes larger blocks (a smaller node_prefix)"
    );
    assert_eq!((pool.free(small), pool.free(large)), (0, free));
    pool.release(&id(2)).expect("held");
    assert_eq!(text(&pool.assign(&id(9), &[]).expect("free")), "10.32.4.5, fd00::6");
}

#[test]
fn requested_addresses_are_given_or_refused_with_the_reason() {
    let mut pool = PodPool::new(&[subnet("10.32.4.0/24"), subnet("fd00::/64")], &[], 0);
    let got = pool.assign(&id(1), &[ip("10.32.4.9")]).expect("free");
    assert_eq!(text(&got), "10.32.4.9, fd00::2");
    let mut refused = |number, addresses: &[&str]| {
        let addresses: Vec<IpAddr> = addresses.iter().map(|text| ip(text)).collect();
        pool.assign(&id(number), &addresses).expect_err("refused").to_string()
    };
    assert_eq!(
        refused(2, &["10.32.4.9"]),
        "10.32.4.9 is in use by c1/eth0: delete that pod first, or request another address"
    );
    assert_eq!(
        refused(2, &["10.32.5.9"]),
        "10.32.5.9 is not in this node's pod subnets (10.32.4.0/24, fd00::/64): request another, or none"
    );
    for special in ["10.32.4.0", "10.32.4.1", "10.32.4.255"] {
        assert_eq!(
            refused(2, &[special]),
            format!(
                "{special} is the network, gateway, broadcast or a reserved address of 10.32.4.0/24: request another"
            )
        );
    }
    assert_eq!(
        refused(2, &["10.32.4.7", "10.32.4.8"]),
        "10.32.4.7 and 10.32.4.8 are of one family: an interface has at most one address a family"
    );
    assert_eq!(
        refused(1, &["10.32.4.10"]),
        "c1/eth0 already has 10.32.4.9, fd00::2, not 10.32.4.10: delete the attachment before adding it differently"
    );
    assert_eq!(pool.held().count(), 1);
}

#[test]
fn adopted_addresses_are_not_assigned_again_even_outside_the_subnets() {
    let mut pool = PodPool::new(&[subnet("10.32.4.0/29")], &[], 0);
    let adopted = pool.adopt(&id(1), &[ip("10.32.4.3"), ip("10.99.0.7")]);
    assert!(matches!(adopted, Err(AssignError::OneAFamily { .. })));
    pool.adopt(&id(1), &[ip("10.32.4.3")]).expect("free");
    let outside = pool.adopt(&id(2), &[ip("10.99.0.7"), ip("fd00::7")]).expect("free");
    assert_eq!(outside.0[0].subnet, subnet("10.99.0.7/32"));
    assert!(matches!(pool.adopt(&id(3), &[ip("10.99.0.7")]), Err(AssignError::InUse { .. })));
    let rest: Vec<_> = (10..14).map(|n| text(&pool.assign(&id(n), &[]).expect("free"))).collect();
    assert_eq!(rest, ["10.32.4.2", "10.32.4.4", "10.32.4.5", "10.32.4.6"]);
    assert!(pool.assign(&id(20), &[]).is_err());
    pool.release(&id(1)).expect("held");
    pool.release(&id(2)).expect("held");
    assert_eq!(text(&pool.assign(&id(20), &[]).expect("free")), "10.32.4.3");
}

#[test]
fn a_new_subnet_serves_new_pods_and_the_old_ones_keep_theirs() {
    let mut pool = PodPool::new(&[subnet("10.32.4.0/24")], &[], 0);
    pool.assign(&id(1), &[]).expect("free");
    pool.set_subnets(&[subnet("10.32.5.0/24")]);
    assert_eq!(text(&pool.assign(&id(1), &[]).expect("held")), "10.32.4.2");
    assert_eq!(text(&pool.assign(&id(2), &[]).expect("free")), "10.32.5.2");
    pool.set_subnets(&[subnet("10.32.4.0/24"), subnet("10.32.5.0/24")]);
    assert_eq!(pool.free(subnet("10.32.4.0/24")), 252);
    pool.set_subnets(&[]);
    assert_eq!(pool.assign(&id(3), &[]), Err(AssignError::NoSubnet));
}

#[test]
fn a_huge_reserved_range_costs_one_step() {
    let reserved = ["fd00::/65".parse().expect("a prefix")];
    let mut pool = PodPool::new(&[subnet("fd00::/64")], &reserved, 0);
    assert_eq!(text(&pool.assign(&id(1), &[]).expect("free")), "fd00::8000:0:0:0");
    assert_eq!(pool.capacity(subnet("fd00::/64")), 1 << 63);
}

#[test]
fn released_addresses_of_a_huge_subnet_do_not_pile_up() {
    let mut pool = PodPool::new(&[subnet("fd00::/64")], &[], 0);
    for _ in 0..70_000 {
        pool.assign(&id(1), &[]).expect("free");
        pool.release(&id(1)).expect("held");
    }
    let next = pool.assign(&id(1), &[]).expect("free").0[0].address;
    assert!(crate::ranges::number(next) <= crate::ranges::number(ip("fd00::2")) + 65_536, "{next}");
}

#[derive(Debug, Clone)]
enum Step {
    Assign(usize),
    Request(usize, u8),
    Release(usize),
    Adopt(usize, u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0usize..24).prop_map(Step::Assign),
        1 => (0usize..24, any::<u8>()).prop_map(|(who, host)| Step::Request(who, host % 36)),
        3 => (0usize..24).prop_map(Step::Release),
        1 => (0usize..24, any::<u8>()).prop_map(|(who, host)| Step::Adopt(who, host % 36)),
    ]
}

proptest! {
    #[test]
    fn an_address_has_one_owner_and_the_longest_free_one_is_next(
        steps in proptest::collection::vec(step(), 1..200), seed: u64,
    ) {
        let (net, v6) = (subnet("10.32.4.0/28"), subnet("fd00::/123"));
        let reserved: IpNet = "10.32.4.6/31".parse().expect("a prefix");
        let mut pool = PodPool::new(&[net, v6], &[reserved], seed);
        // The model: who has what, and when each address was last freed (0: never used).
        let mut model: HashMap<AttachmentId, PodAddresses> = HashMap::new();
        let mut freed: HashMap<IpAddr, usize> = HashMap::new();
        for (at, step) in steps.into_iter().enumerate() {
            let host = |host: u8| IpAddr::from([10, 32, 4, host]);
            match step {
                Step::Assign(who) => {
                    let before = model.get(&id(who)).cloned();
                    let used: Vec<IpAddr> = model.values().flat_map(|a| a.0.iter().map(|p| p.address)).collect();
                    let Ok(got) = pool.assign(&id(who), &[]) else {
                        prop_assert!(pool.free(net) == 0 || pool.free(v6) == 0);
                        prop_assert!(before.is_none());
                        continue;
                    };
                    if let Some(before) = before {
                        prop_assert_eq!(&before, &got);
                        continue;
                    }
                    prop_assert_eq!(got.0.len(), 2);
                    let v4 = got.0[0].address;
                    prop_assert!((2..15).any(|n| host(n) == v4) && !reserved.contains(&v4));
                    prop_assert!(got.0.iter().all(|p| !used.contains(&p.address)));
                    let oldest = (2u8..15).map(host).filter(|a| !reserved.contains(a) && !used.contains(a))
                        .map(|a| freed.get(&a).copied().unwrap_or(0)).min();
                    prop_assert_eq!(freed.get(&v4).copied().unwrap_or(0), oldest.expect("one was free"));
                    model.insert(id(who), got);
                }
                Step::Request(who, number) => {
                    let before = pool.held().count();
                    match pool.assign(&id(who), &[host(number)]) {
                        Ok(got) => {
                            prop_assert!(got.contains(host(number)));
                            prop_assert!(model.iter().all(|(o, a)| *o == id(who) || !a.contains(host(number))));
                            model.insert(id(who), got);
                        }
                        Err(_) => prop_assert_eq!(pool.held().count(), before),
                    }
                }
                Step::Release(who) => {
                    let got = pool.release(&id(who));
                    prop_assert_eq!(&got, &model.remove(&id(who)));
                    got.iter().flat_map(|a| &a.0).for_each(|p| { freed.insert(p.address, at + 1); });
                }
                Step::Adopt(who, number) => if let Ok(got) = pool.adopt(&id(who), &[host(number)]) {
                    model.insert(id(who), got);
                },
            }
            let in_use = |s: Subnet| model.values().flat_map(|a| &a.0)
                .filter(|p| s.contains(p.address) && !reserved.contains(&p.address)
                    && (s != net || (2..15).any(|n| host(n) == p.address))).count() as u128;
            prop_assert_eq!(pool.free(net), 11 - in_use(net));
            prop_assert_eq!(pool.free(v6), 30 - in_use(v6));
            prop_assert_eq!(pool.held().count(), model.len());
        }
    }
}
