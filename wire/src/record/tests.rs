//! Laws of the record encoding.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

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
            preshared: preshared.into_iter().map(KeyId).collect(),
        });
        let certificate = certificate.map(|(serial, signature)| {
            let bytes = [&u64::to_be_bytes(serial)[..], &signature].concat();
            Certificate::from_bytes(&bytes).expect("of the right length")
        });
        Facts { subnets, gossip, underlay, vtep_v4, vtep_v6, vni, vxlan_port, mtu, capabilities, keys, tunnel, gateway, certificate, reachability, tunnel_reach }
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
