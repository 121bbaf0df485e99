//! Laws of the messages and of merging.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::seal::ClusterKey;
use crate::types::Epoch;

const CLUSTER: &str = "test";

fn ring() -> KeyRing {
    KeyRing::new(vec![ClusterKey::from_bytes([1; 32])]).expect("a ring")
}

fn start(node: &str, authority: Authority, now: Instant) -> Mesh {
    let config = MeshConfig {
        cluster: CLUSTER.into(),
        node: node.parse().expect("a name"),
        site: "s".parse().expect("a name"),
        key: NodeKey::from_secret([7; 32]),
        ring: ring(),
        seeds: Vec::new(),
        incarnation: 1,
        timing: Timing::default(),
        verify: Arc::new(crate::record::Each),
    };
    let mut mesh = Mesh::new(config, [3; 32], now);
    mesh.set_authority(authority, now);
    mesh
}

fn from() -> SocketAddr {
    "192.0.2.9:7117".parse().expect("an address")
}

fn seal(message: &proto::Datagram) -> Vec<u8> {
    ring().seal(CLUSTER, [0; 24], &message.encode_to_vec())
}

/// One of a few records of one of a few nodes: versions and two keys, the second endorsed by the first.
fn record(node: u8, version: u64, rotated: bool, left: bool) -> SignedRecord {
    let name: NodeName = format!("m{node}").parse().expect("a name");
    let first = NodeKey::from_secret([node + 1; 32]);
    let key = if rotated {
        NodeKey::from_secret([node + 101; 32]).endorsed_by(&first, CLUSTER, &name)
    } else {
        first
    };
    let subnet = format!("10.{node}.0.0/24").parse().expect("a subnet");
    let facts = Facts {
        subnets: vec![LeasedSubnet { subnet, epoch: Epoch(1) }],
        gossip: vec![from()],
        mtu: version as u16,
        ..Facts::default()
    };
    SignedRecord::sign(&key, CLUSTER, name, "s".parse().expect("a name"), version, facts, left)
}

fn arb_liveness() -> impl Strategy<Value = i32> {
    prop_oneof![Just(0), Just(1), Just(2)]
}

fn arb_news() -> impl Strategy<Value = proto::Update> {
    let rumor = (0..4u8, arb_liveness(), 0..4u64).prop_map(|(node, liveness, incarnation)| proto::Update {
        node: format!("m{node}"),
        liveness,
        incarnation,
        ..Default::default()
    });
    let full = (0..4u8, 1..5u64, any::<bool>(), any::<bool>(), arb_liveness(), 0..4u64).prop_map(
        |(node, version, rotated, left, liveness, incarnation)| proto::Update {
            liveness,
            incarnation,
            // A node signs with its second key only after its first.
            record: Some(record(node, version + u64::from(rotated) * 5, rotated, left).to_proto()),
            ..Default::default()
        },
    );
    prop_oneof![rumor, full]
}

/// What merging must agree on: records and liveness, not when things were heard.
fn merged(mesh: &Mesh) -> Vec<(String, u64, PublicKeyText, Liveness, u64)> {
    mesh.table
        .range(..)
        .map(|(_, member)| {
            let record = member.signed.record();
            (
                record.node.to_string(),
                record.version,
                record.key.to_string(),
                member.liveness,
                member.incarnation,
            )
        })
        .collect()
}

type PublicKeyText = String;

fn feed(mesh: &mut Mesh, news: &[proto::Update], now: Instant) {
    for update in news {
        let (checked, _) = mesh.check_update(update).expect("news that holds");
        mesh.apply(checked, from(), false);
        mesh.advance(now);
    }
    mesh.settle();
}

fn arb_update() -> impl Strategy<Value = proto::Update> {
    let garbage = (".{0,20}", any::<i32>(), any::<u64>(), vec(".{0,20}", 0..6)).prop_map(
        |(node, liveness, incarnation, accusers)| proto::Update {
            node,
            liveness,
            incarnation,
            accusers,
            ..Default::default()
        },
    );
    let record = (vec(any::<u8>(), 0..200), vec(any::<u8>(), 60..68)).prop_map(|(record, signature)| {
        proto::Update { record: Some(proto::SignedRecord { record, signature }), ..Default::default() }
    });
    let statement =
        (vec(any::<u8>(), 0..200), vec(any::<u8>(), 60..68)).prop_map(|(statement, signature)| {
            proto::Update {
                statement: Some(proto::SignedStatement { statement, signature }),
                ..Default::default()
            }
        });
    prop_oneof![arb_news(), garbage, record, statement]
}

fn arb_body() -> impl Strategy<Value = Body> {
    let item = (any::<u64>(), any::<u64>(), any::<u32>(), any::<u64>(), any::<bool>()).prop_map(
        |(name_hash, version, tag, incarnation, dead)| proto::SyncItem {
            name_hash,
            version,
            tag,
            incarnation,
            dead,
        },
    );
    prop_oneof![
        any::<(u64, u64, u32)>().prop_map(|(token, have, again_ms)| Body::Ping(proto::Ping {
            token,
            have,
            again_ms,
            padding: Vec::new(),
        })),
        (any::<u64>(), any::<u64>(), prop_oneof![vec(any::<u8>(), 0..20), vec(any::<u8>(), 6)], any::<u64>())
            .prop_map(|(token, have, seen, challenge)| Body::Ack(proto::Ack {
                token,
                have,
                seen,
                challenge
            })),
        any::<u64>().prop_map(|token| Body::Nack(proto::Nack { token })),
        (any::<u64>(), ".{0,9}|m[0-3]")
            .prop_map(|(token, target)| Body::PingRequest(proto::PingRequest { token, target })),
        any::<bool>().prop_map(|sync| Body::Push(proto::Push { sync })),
        any::<(u64, u32, u64, bool)>().prop_map(|(hash, count, statements, answers)| {
            Body::SyncRoot(proto::SyncRoot { hash, count, statements, answers })
        }),
        vec(any::<u8>(), 70..74).prop_map(|certificate| Body::Certify(proto::Certify { certificate })),
        (0..3u32, 0..20u32, vec(any::<u64>(), 15..18), vec(any::<u32>(), 15..18)).prop_map(
            |(depth, prefix, hashes, counts)| {
                Body::SyncBuckets(proto::SyncBuckets { depth, prefix, hashes, counts })
            }
        ),
        (any::<u64>(), any::<u64>(), vec(item, 0..9)).prop_map(|(first, last, mut items)| {
            items.sort_by_key(|item| item.name_hash);
            Body::SyncItems(proto::SyncItems { first, last, items })
        }),
        vec(any::<u64>(), 0..99).prop_map(|name_hashes| Body::SyncWant(proto::SyncWant { name_hashes })),
        vec(any::<u8>(), 0..99).prop_map(|datagram| Body::Forward(proto::Forward { datagram })),
        ("m[0-3]|peer|me", "me|m[0-3]|", 0..3u64, any::<u64>(), vec(arb_update(), 0..2)).prop_map(
            |(from, to, session, seq, updates)| {
                let body = Some(Body::Ping(proto::Ping { token: seq, ..Default::default() }));
                let inner = proto::Datagram { from, to, session, seq, updates, body, ..Default::default() };
                Body::Forward(proto::Forward { datagram: inner.encode_to_vec() })
            }
        ),
    ]
}

prop_compose! {
    fn arb_datagram()(
        from in "m[0-3]|peer|.{0,9}",
        to in "|me|other",
        session in 0..3u64,
        seq in any::<u64>(),
        version in prop_oneof![0..9u64, any::<u64>()],
        incarnation in prop_oneof![0..9u64, any::<u64>()],
        updates in vec(arb_update(), 0..3),
        body in proptest::option::of(arb_body()),
    ) -> proto::Datagram {
        proto::Datagram { from, to, session, seq, version, incarnation, updates, body }
    }
}

proptest! {
    #[test]
    fn every_message_survives_the_network(message in arb_datagram()) {
        let bytes = message.encode_to_vec();
        prop_assert_eq!(proto::Datagram::decode(&bytes[..]), Ok(message));
    }

    #[test]
    fn any_bytes_decode_or_fail_but_never_panic(content in vec(any::<u8>(), 0..=crate::seal::MAX_CONTENT)) {
        let now = Instant::now();
        let mut mesh = start("me", Authority::Claims, now);
        let _ = mesh.handle_datagram(from(), &ring().seal(CLUSTER, [0; 24], &content), now);
        let _ = mesh.handle_datagram(from(), &content, now);
    }

    #[test]
    fn no_sealed_message_panics_and_a_rejected_one_changes_nothing(messages in vec(arb_datagram(), 1..30)) {
        let mut now = Instant::now();
        let mut mesh = start("me", Authority::Claims, now);
        mesh.announce(Facts { gossip: vec![from()], ..Facts::default() }, now);
        for message in messages.iter().filter(|message| message.encoded_len() <= crate::seal::MAX_CONTENT) {
            let before = merged(&mesh);
            let rejected: u64 = mesh.counters().rejections().map(|(_, count)| count).sum();
            if mesh.handle_datagram(from(), &seal(message), now).is_err() {
                prop_assert_eq!(before, merged(&mesh));
                prop_assert_eq!(
                    rejected + 1, mesh.counters().rejections().map(|(_, count)| count).sum::<u64>());
            }
            now += Duration::from_millis(300);
            mesh.handle_timeout(now);
            loop {
                match mesh.poll_output(now) {
                    Output::Send { datagram, .. } => prop_assert!(datagram.len() <= crate::seal::MAX_DATAGRAM),
                    Output::Event(_) => {}
                    Output::Wait { .. } => break,
                }
            }
        }
    }

    #[test]
    fn merging_is_commutative_and_idempotent(
        news in vec(arb_news(), 1..12), order in any::<prop::sample::Index>(), store in any::<bool>(),
    ) {
        let now = Instant::now();
        let authority = if store { Authority::Store(Arc::default()) } else { Authority::Claims };
        // Rumors about nodes without a record say nothing yet, so every node is known first.
        let known: Vec<proto::Update> = (0..4)
            .map(|node| proto::Update { record: Some(record(node, 1, false, false).to_proto()), ..Default::default() })
            .collect();
        let (mut a, mut b) = (start("me", authority.clone(), now), start("me", authority, now));
        feed(&mut a, &known, now);
        feed(&mut b, &known, now);
        feed(&mut a, &news, now);
        let mut other = news.clone();
        let middle = order.index(other.len());
        other.rotate_left(middle);
        other.reverse();
        feed(&mut b, &other, now);
        prop_assert_eq!(merged(&a), merged(&b));
        let once = merged(&a);
        feed(&mut a, &news, now);
        prop_assert_eq!(once, merged(&a));
    }
}

#[test]
fn a_site_that_was_renamed_says_so() {
    let now = Instant::now();
    let key = || SiteKey::from_secret([5; 32]);
    let prefixes = || vec!["10.0.0.0/16".parse().expect("a prefix")];
    let trust = || Trust { site: key().public(), prefixes: prefixes(), signer: Some(key()) };
    let mut before = start("n", Authority::Claims, now);
    before.set_trust(trust(), Vec::new(), now).expect("it speaks");
    let remembered: Vec<_> = before.statements().cloned().collect();
    let mut after = Mesh::new(
        MeshConfig { site: "renamed".parse().expect("a name"), ..before.config.clone() },
        [3; 32],
        now,
    );
    after.set_trust(trust(), remembered, now).expect("it speaks");
    let said = after.sites.own_record().expect("it has spoken");
    assert_eq!((said.site.as_str(), said.version), ("renamed", 2));
}
