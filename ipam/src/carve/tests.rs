use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn cidr(cidr: &str, node_prefix: u8, reserved: &[&str]) -> ClusterCidr {
    let net = |text: &&str| text.parse().expect("a prefix");
    ClusterCidr { cidr: net(&cidr), node_prefix, reserved: reserved.iter().map(net).collect() }
}

fn carver(cidrs: &[ClusterCidr]) -> Carver {
    Carver::new(cidrs.to_vec()).expect("valid CIDRs")
}

/// Leases blocks until none is free.
fn all_blocks(carver: &Carver, family: Family, start: u64) -> Vec<Subnet> {
    let mut taken = Vec::new();
    while let Some(block) = carver.first_free(family, start, taken.iter().copied()) {
        taken.push(block);
    }
    taken
}

#[test]
fn every_block_is_found_once_and_the_count_is_the_capacity() {
    let carver = carver(&[
        cidr("10.32.0.0/21", 24, &["10.32.2.0/30", "10.32.2.128/25", "10.32.5.0/24"]),
        cidr("10.99.0.0/26", 27, &[]),
        cidr("fd00:32::/60", 64, &["fd00:32::/62"]),
    ]);
    for (family, count) in [(Family::V4, 8 - 2 + 2), (Family::V6, 12)] {
        for start in [0, 1, 5, u64::MAX] {
            let blocks = all_blocks(&carver, family, start);
            assert_eq!(blocks.len() as u128, count);
            assert_eq!(carver.capacity(family), count);
            assert_eq!(blocks.iter().collect::<BTreeSet<_>>().len(), blocks.len());
            assert!(blocks.iter().all(|block| carver.allows(*block)), "{blocks:?}");
        }
    }
}

#[test]
fn a_huge_range_costs_as_much_as_its_leases() {
    let carver = carver(&[cidr("fd00::/16", 112, &["fd00::/17"])]);
    assert_eq!(carver.capacity(Family::V6), 1 << 95);
    let blocks: Vec<_> = (0..200).fold(Vec::new(), |mut taken, _| {
        taken.push(carver.first_free(Family::V6, 7, taken.iter().copied()).expect("a free block"));
        taken
    });
    assert_eq!(blocks[0].to_string(), "fd00:8000::/112");
    assert_eq!(blocks[199].to_string(), "fd00:8000::c7:0/112");
}

#[test]
fn blocks_leased_with_another_prefix_length_are_left_alone() {
    let carver = carver(&[cidr("10.32.0.0/22", 24, &[])]);
    let taken = ["10.32.0.128/25", "10.32.2.0/23"].map(|text| text.parse().expect("a subnet"));
    let free = carver.first_free(Family::V4, 0, taken);
    assert_eq!(free, Some("10.32.1.0/24".parse().expect("a subnet")));
}

#[test]
fn one_block_can_be_the_whole_range() {
    let carver = carver(&[cidr("10.32.4.0/24", 24, &[])]);
    assert_eq!(all_blocks(&carver, Family::V4, 9), ["10.32.4.0/24".parse().expect("a subnet")]);
    assert_eq!(carver.capacity(Family::V6), 0);
    assert_eq!(carver.first_free(Family::V6, 0, []), None);
}

#[test]
fn invalid_ranges_are_refused_with_what_to_do() {
    let cases: &[(&[ClusterCidr], &str)] = &[
        (&[], "no cluster CIDR is configured: add one, for example 10.32.0.0/12 with node_prefix 24"),
        (
            &[cidr("10.32.0.0/26", 24, &[])],
            "cluster CIDR 10.32.0.0/26 is too small for one block of node_prefix 24: use a larger range, or a node_prefix of at least 26",
        ),
        (&[cidr("10.32.0.0/16", 31, &[])], "node_prefix 31 of 10.32.0.0/16 must be from 8 to 30"),
        (&[cidr("fd00::/64", 127, &[])], "node_prefix 127 of fd00::/64 must be from 16 to 126"),
        (&[cidr("10.32.0.1/16", 24, &[])], "10.32.0.1/16 has host bits set: write 10.32.0.0/16"),
        (
            &[cidr("10.0.0.0/8", 24, &[]), cidr("fd00::/48", 64, &[]), cidr("10.32.0.0/12", 24, &[])],
            "cluster CIDRs 10.0.0.0/8 and 10.32.0.0/12 overlap: remove one, or make them disjoint",
        ),
        (
            &[cidr("10.32.0.0/16", 24, &["10.33.0.0/24"])],
            "reserved range 10.33.0.0/24 is not part of cluster CIDR 10.32.0.0/16: remove it or correct it",
        ),
        (
            &[cidr("10.32.0.0/16", 24, &["10.32.0.0/17", "10.32.128.0/17"])],
            "the reserved ranges of 10.32.0.0/16 leave no block of node_prefix 24: reserve less",
        ),
        (
            &[cidr("0.0.0.0/0", 24, &[])],
            "cluster CIDR 0.0.0.0/0 overlaps 0.0.0.0/8, which hosts cannot use for pods: choose another range",
        ),
        (
            &[cidr("fe80::/32", 64, &[])],
            "cluster CIDR fe80::/32 overlaps fe80::/10, which hosts cannot use for pods: choose another range",
        ),
    ];
    for (cidrs, sentence) in cases {
        let error = Carver::new(cidrs.to_vec()).expect_err(sentence);
        assert_eq!(&error.to_string(), sentence);
    }
}

#[test]
fn nodes_start_at_different_places_and_always_at_the_same() {
    let starts: Vec<u64> =
        (1..=1000).map(|node| start_of(&format!("n{node}").parse().expect("a name"))).collect();
    let blocks: BTreeSet<u64> = starts.iter().map(|start| start % 4096).collect();
    // 1,000 random draws of 4,096 leave about 887 different ones.
    assert!(blocks.len() > 800, "{}", blocks.len());
    assert_eq!(starts[0], start_of(&"n1".parse().expect("a name")));
}

proptest! {
    #[test]
    fn carving_agrees_with_trying_every_block(
        prefix in 16u8..=24, extra in 0u8..=6, start: u64,
        reserved in proptest::collection::vec((0u32..=0xffff, 20u8..=32), 0..4),
        taken in proptest::collection::vec((0u32..=0xffff, 20u8..=30), 0..12),
    ) {
        let base = u32::from_be_bytes([10, 32, 0, 0]);
        let net = |(host, len): (u32, u8)| {
            IpNet::new(std::net::Ipv4Addr::from(base + host).into(), len).expect("a prefix").trunc()
        };
        let range = net((0, prefix));
        let reserved: Vec<IpNet> = reserved.into_iter().map(net).filter(|net| overlap(*net, range)).collect();
        let config = ClusterCidr { cidr: range, node_prefix: prefix + extra, reserved: reserved.clone() };
        let Ok(carver) = Carver::new(vec![config]) else { return Ok(()) };
        let taken: Vec<Subnet> = taken.into_iter().map(|t| net(t).try_into().expect("no host bits")).collect();
        let blocks: Vec<Subnet> = range.subnets(prefix + extra).expect("a longer prefix")
            .map(|net| net.try_into().expect("no host bits")).collect();
        let unreserved = |block: &Subnet| !reserved.iter().any(|net| overlap(*net, block.net()));
        prop_assert_eq!(carver.capacity(Family::V4), blocks.iter().filter(|b| unreserved(b)).count() as u128);
        let begin = usize::try_from(start % blocks.len() as u64).expect("small");
        let expected = blocks[begin..].iter().chain(&blocks[..begin]).copied()
            .find(|block| unreserved(block) && !taken.iter().any(|t| t.overlaps(*block)));
        prop_assert_eq!(carver.first_free(Family::V4, start, taken), expected);
    }
}
