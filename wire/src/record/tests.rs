//! Laws of the record encoding.

use ipnet::IpNet;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::types::to_hex;

const CLUSTER: &str = "test";

fn arb_ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)]
}

fn arb_socket() -> impl Strategy<Value = SocketAddr> {
    (arb_ip(), any::<u16>()).prop_map(SocketAddr::from)
}

fn arb_subnet() -> impl Strategy<Value = LeasedSubnet> {
    (arb_ip(), 0u8..=128, any::<u64>()).prop_map(|(ip, length, epoch)| {
        let length = if ip.is_ipv4() { length % 33 } else { length };
        let net = IpNet::new(ip, length).expect("a length of the family").trunc();
        LeasedSubnet { subnet: net.try_into().expect("no host bits"), epoch: Epoch(epoch) }
    })
}

fn arb_mac() -> impl Strategy<Value = Option<MacAddress>> {
    proptest::option::of(any::<[u8; 6]>().prop_map(MacAddress))
}

prop_compose! {
    fn arb_tunnel_reach()(reflexive in vec(arb_socket(), 0..=MAX_UNDERLAY), mapping in 0..4_usize, relay_room in 0..=100_u8) -> TunnelReach {
        let mapping = [TunnelMapping::Unknown, TunnelMapping::None, TunnelMapping::Independent, TunnelMapping::Dependent][mapping];
        TunnelReach { reflexive, mapping, relay_room }
    }
}

prop_compose! {
    fn arb_reachability()(
        reach in prop_oneof![Just(Reach::Unsaid), Just(Reach::Open), Just(Reach::Behind)],
        keepers in vec(any::<u64>(), 0..=MAX_KEEPERS),
        outside in vec(arb_socket(), 0..=MAX_OUTSIDE),
    ) -> Reachability {
        Reachability { reach, keepers, outside }
    }
}

prop_compose! {
    fn arb_facts()(
        subnets in vec(arb_subnet(), 0..=MAX_SUBNETS),
        gossip in vec(arb_socket(), 0..=MAX_GOSSIP),
        underlay in vec(arb_ip(), 0..=MAX_UNDERLAY),
        (vtep_v4, vtep_v6) in (arb_mac(), arb_mac()),
        vni in 0u32..1 << 24,
        vxlan_port in any::<u16>(),
        mtu in any::<u16>(),
        capabilities in any::<u64>().prop_map(Capabilities),
        keys in vec(any::<[u8; 4]>().prop_map(KeyId), 0..=MAX_KEYS),
        follows in proptest::option::of((any::<u64>(), 1..=u64::MAX)),
        gateway in proptest::option::of(0..=MAX_WEIGHT),
        certificate in proptest::option::of((any::<u64>(), vec(any::<u8>(), SIGNATURE))),
        tunnel in proptest::option::of((any::<[u8; 32]>(), 1..=u16::MAX, vec(any::<[u8; 4]>(), 0..=MAX_KEYS))),
        carrier in proptest::option::of(any::<bool>()),
        detour in proptest::option::of((any::<[u8; 32]>(), 1..=u16::MAX, any::<bool>())),
        tunnel_reach in arb_tunnel_reach(),
        reachability in arb_reachability(),
    ) -> Facts {
        let detour = detour.map(|(key, port, preferred)| Detour { key: TunnelKey(key), port, preferred });
        let tunnel = tunnel.map(|(key, port, preshared)| TunnelFacts {
            carrier: carrier.map(|kernel| if kernel { Carrier::Kernel } else { Carrier::UserSpace }),
            detour: detour.clone(),
            key: TunnelKey(key),
            port,
            preshared: preshared.iter().copied().map(KeyId).collect(),
            pairs: preshared.into_iter().rev().map(KeyId).collect(),
        });
        let certificate = certificate.map(|(serial, signature)| {
            let bytes = [&u64::to_be_bytes(serial)[..], &signature].concat();
            Certificate::from_bytes(&bytes).expect("of the right length")
        });
        let follows = follows.map(|(version, tag)| RingName { version, tag });
        Facts { subnets, gossip, underlay, vtep_v4, vtep_v6, vni, vxlan_port, mtu, capabilities, keys, follows, tunnel, gateway, certificate, reachability, tunnel_reach }
    }
}

fn arb_signed() -> impl Strategy<Value = SignedRecord> {
    let name = "[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?";
    (name, name, any::<[u8; 32]>(), 0..5usize, any::<u64>(), arb_facts(), any::<bool>()).prop_map(
        |(node, site, secret, rotations, version, facts, left)| {
            let node: NodeName = node.parse().expect("a name");
            let mut key = NodeKey::from_secret(secret);
            for rotation in 0..rotations {
                key = NodeKey::from_secret([rotation as u8; 32]).endorsed_by(&key, CLUSTER, &node);
            }
            SignedRecord::sign(&key, CLUSTER, node, site.parse().expect("a name"), version, facts, left)
        },
    )
}

fn sign_with(key: &NodeKey) -> SignedRecord {
    let (node, site) = ("n1".parse().expect("a name"), "s1".parse().expect("a name"));
    SignedRecord::sign(key, CLUSTER, node, site, 1, Facts::default(), false)
}

/// Everything that a record may say, each thing as long as it may be.
fn most_of_all() -> Facts {
    let ip = IpAddr::from([0xfd; 16]);
    let socket = SocketAddr::new(ip, u16::MAX);
    let keys = vec![KeyId([7; 4]); MAX_KEYS];
    let subnet = IpNet::new(ip, 128).expect("a length of the family").try_into().expect("no host bits");
    let detour = Detour { key: TunnelKey([9; 32]), port: u16::MAX, preferred: true };
    Facts {
        subnets: vec![LeasedSubnet { subnet, epoch: Epoch(u64::MAX) }; MAX_SUBNETS],
        gossip: vec![socket; MAX_GOSSIP],
        underlay: vec![ip; MAX_UNDERLAY],
        vtep_v4: Some(MacAddress([2; 6])),
        vtep_v6: Some(MacAddress([2; 6])),
        vni: (1 << 24) - 1,
        vxlan_port: u16::MAX,
        mtu: u16::MAX,
        capabilities: Capabilities(u64::MAX),
        keys: keys.clone(),
        follows: Some(RingName { version: u64::MAX, tag: u64::MAX }),
        tunnel: Some(TunnelFacts {
            key: TunnelKey([8; 32]),
            port: u16::MAX,
            preshared: keys,
            pairs: vec![KeyId([7; 4]); MAX_PAIRS],
            carrier: Some(Carrier::Kernel),
            detour: Some(detour),
        }),
        gateway: Some(MAX_WEIGHT),
        certificate: Certificate::from_bytes(&[0xff; 8 + SIGNATURE]),
        reachability: Reachability {
            reach: Reach::Behind,
            keepers: vec![u64::MAX; MAX_KEEPERS],
            outside: vec![socket; MAX_OUTSIDE],
        },
        tunnel_reach: TunnelReach {
            reflexive: vec![socket; MAX_UNDERLAY],
            mapping: TunnelMapping::Dependent,
            relay_room: 100,
        },
    }
}

#[test]
fn the_largest_record_keeps_its_limit_and_gives_up_what_is_needed_least() {
    let name = "x".repeat(63);
    let (node, site): (NodeName, SiteName) = (name.parse().expect("a name"), name.parse().expect("a name"));
    let mut key = NodeKey::from_secret([0; 32]);
    for rotation in 1..=MAX_ENDORSEMENTS {
        key = NodeKey::from_secret([rotation as u8; 32]).endorsed_by(&key, CLUSTER, &node);
    }
    let wanted = most_of_all();
    assert!(wanted.certificate.is_some());
    let signed = SignedRecord::sign(&key, CLUSTER, node, site, u64::MAX, wanted.clone(), true);
    let length = signed.bytes.len() + SIGNATURE;
    assert!(length <= MAX_RECORD, "{length}");
    // What nobody can do without is all there, and one of each list of addresses and keys.
    let facts = &signed.record.facts;
    let tunnel = facts.tunnel.as_ref().expect("not given up");
    assert!(!facts.gossip.is_empty() && !tunnel.preshared.is_empty());
    let restored = Facts {
        gossip: wanted.gossip.clone(),
        tunnel: wanted.tunnel.clone(),
        reachability: wanted.reachability.clone(),
        tunnel_reach: wanted.tunnel_reach.clone(),
        ..facts.clone()
    };
    assert_eq!(restored, wanted);
    let claimed = ClaimedRecord::parse(signed.to_proto()).expect("others take it");
    assert_eq!(claimed.verify(CLUSTER), Ok(signed));
}

proptest! {
    #[test]
    fn a_signed_record_survives_the_network(signed in arb_signed()) {
        let bytes = signed.to_proto().encode_to_vec();
        let decoded = proto::SignedRecord::decode(&bytes[..]).expect("it was encoded here");
        let claimed = ClaimedRecord::parse(decoded).expect("it was signed here");
        prop_assert_eq!(claimed.verify(CLUSTER), Ok(signed));
    }

    #[test]
    fn a_signed_record_keeps_its_limit(signed in arb_signed()) {
        prop_assert!(signed.bytes.len() + SIGNATURE <= MAX_RECORD);
    }

    #[test]
    fn no_bit_of_a_signed_record_can_change(signed in arb_signed(), bit in any::<prop::sample::Index>()) {
        let mut changed = signed.to_proto();
        let bit = bit.index((changed.record.len() + SIGNATURE) * 8);
        let (byte, mask) = (bit / 8, 1 << (bit % 8));
        match changed.record.get_mut(byte) {
            Some(target) => *target ^= mask,
            None => changed.signature[byte - signed.bytes.len()] ^= mask,
        }
        if let Ok(claimed) = ClaimedRecord::parse(changed) {
            prop_assert_eq!(claimed.verify(CLUSTER), Err(BadSignature));
        }
    }

    #[test]
    fn any_bytes_parse_or_fail_but_never_panic(record in vec(any::<u8>(), 0..1000), signature in vec(any::<u8>(), 0..70)) {
        if let Ok(claimed) = ClaimedRecord::parse(proto::SignedRecord { record, signature }) {
            let _ = claimed.verify(CLUSTER);
        }
    }

    #[test]
    fn a_changed_byte_of_a_record_never_panics(
        signed in arb_signed(), place in any::<prop::sample::Index>(), byte in any::<u8>(),
    ) {
        let mut changed = signed.to_proto();
        let place = place.index(changed.record.len());
        changed.record[place] = byte;
        let _ = ClaimedRecord::parse(changed).map(|claimed| claimed.verify(CLUSTER));
    }
}

#[test]
fn a_record_of_another_cluster_does_not_verify() {
    let signed = sign_with(&NodeKey::from_secret([1; 32]));
    let claimed = ClaimedRecord::parse(signed.to_proto()).expect("a record");
    assert_eq!(claimed.verify("other"), Err(BadSignature));
}

#[test]
fn an_endorsement_holds_for_one_node_one_cluster_and_one_key() {
    let (old, new) = (NodeKey::from_secret([1; 32]), NodeKey::from_secret([2; 32]));
    let endorsed_as = |cluster: &str, node: &str| {
        let key = new.clone().endorsed_by(&old, cluster, &node.parse().expect("a name"));
        ClaimedRecord::parse(sign_with(&key).to_proto()).expect("a record").verify(CLUSTER)
    };
    assert!(endorsed_as(CLUSTER, "n1").is_ok());
    assert_eq!(endorsed_as(CLUSTER, "n2"), Err(BadSignature));
    assert_eq!(endorsed_as("other", "n1"), Err(BadSignature));
    let mut stolen = NodeKey::from_secret([3; 32]);
    stolen.endorsements = new.endorsed_by(&old, CLUSTER, &"n1".parse().expect("a name")).endorsements;
    let claimed = ClaimedRecord::parse(sign_with(&stolen).to_proto()).expect("a record");
    assert_eq!(claimed.verify(CLUSTER), Err(BadSignature));
}

#[test]
fn a_node_key_survives_its_file_with_its_endorsements() {
    let node = "n1".parse().expect("a name");
    let mut key = NodeKey::from_secret([1; 32]);
    for generation in 2..7 {
        key = NodeKey::from_secret([generation; 32]).endorsed_by(&key, CLUSTER, &node);
    }
    assert_eq!(key.endorsements.len(), MAX_ENDORSEMENTS);
    let restored = NodeKey::from_secret_text(&key.to_secret_text()).expect("it was written here");
    assert_eq!((restored.public(), &restored.endorsements), (key.public(), &key.endorsements));
    assert!(!format!("{key:?}").contains(&to_hex(&[6; 32])));
    for bad in ["", "xyz", "00", &format!("{}\nnot an endorsement\n", "00".repeat(32))] {
        assert_eq!(NodeKey::from_secret_text(bad).err(), Some(NodeKeyError), "{bad:?}");
    }
}

#[test]
fn fields_that_this_version_does_not_know_survive_relaying() {
    let key = NodeKey::from_secret([1; 32]);
    let mut signed = sign_with(&key);
    let mut bytes = signed.bytes.to_vec();
    // Field 99, a varint.
    bytes.extend_from_slice(&[0x98, 0x06, 0x2a]);
    signed.signature = key.secret.sign(&signed_statement(CLUSTER, &bytes)).to_bytes();
    signed.bytes = bytes.clone().into();
    let verified = ClaimedRecord::parse(signed.to_proto()).expect("a record").verify(CLUSTER);
    assert_eq!(verified.expect("a signature").to_proto().record, bytes);
}

/// What a node with everything announces: two families, tunnels with a detour, a certificate, keepers.
fn full_facts(pairs: usize) -> Facts {
    let socket = |text: &str| -> SocketAddr { text.parse().expect("an address") };
    let addresses = [socket("192.0.2.1:7117"), socket("[2001:db8::1]:7117")];
    let leased = |text: &str| LeasedSubnet { subnet: text.parse().expect("a subnet"), epoch: Epoch(1 << 20) };
    let key = |number: usize| KeyId((number as u32).to_be_bytes());
    Facts {
        subnets: vec![leased("10.32.1.0/24"), leased("fd00:32:0:1::/64")],
        gossip: addresses.to_vec(),
        underlay: addresses.iter().map(SocketAddr::ip).collect(),
        vtep_v4: Some(MacAddress([1; 6])),
        vtep_v6: Some(MacAddress([2; 6])),
        vni: 1,
        vxlan_port: 8472,
        mtu: 1500,
        capabilities: Capabilities::VXLAN,
        keys: vec![key(1), key(2)],
        follows: Some(RingName { version: 1 << 20, tag: u64::MAX }),
        tunnel: Some(TunnelFacts {
            key: TunnelKey([1; 32]),
            port: 51820,
            preshared: vec![key(1), key(2)],
            pairs: (0..pairs).map(key).collect(),
            carrier: Some(Carrier::Kernel),
            detour: Some(Detour { key: TunnelKey([2; 32]), port: 51821, preferred: true }),
        }),
        certificate: Certificate::from_bytes(&[1; 72]),
        reachability: Reachability {
            reach: Reach::Behind,
            keepers: vec![u64::MAX; MAX_KEEPERS],
            outside: Vec::new(),
        },
        tunnel_reach: TunnelReach {
            reflexive: addresses.to_vec(),
            mapping: TunnelMapping::Independent,
            relay_room: 0,
        },
        gateway: Some(MAX_WEIGHT),
    }
}

fn sign_full(pairs: usize, rotations: u8) -> Facts {
    let node: NodeName = "ip-10-0-12-34.eu-central-1.compute.internal".parse().expect("a name");
    let mut key = NodeKey::from_secret([1; 32]);
    for rotation in 0..rotations {
        key = NodeKey::from_secret([rotation + 2; 32]).endorsed_by(&key, CLUSTER, &node);
    }
    let site = "eu-central-1".parse().expect("a name");
    SignedRecord::sign(&key, CLUSTER, node, site, 1 << 40, full_facts(pairs), false).record().facts.clone()
}

fn named(facts: &Facts) -> usize {
    facts.tunnel.as_ref().map_or(0, |tunnel| tunnel.pairs.len())
}

#[test]
fn a_record_with_everything_has_room_for_the_secrets_of_fifty_sites_and_no_longer_one_loses_how_it_is_reached()
 {
    let fifty = sign_full(50, 0);
    assert_eq!(fifty, full_facts(50));
    let most = sign_full(2 * MAX_PAIRS, 3);
    let full = full_facts(0);
    assert!(named(&most) <= MAX_PAIRS);
    assert_eq!((most.reachability, most.tunnel_reach), (full.reachability, full.tunnel_reach));
}
