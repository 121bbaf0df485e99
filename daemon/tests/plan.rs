//! Laws of the plan, against a kernel in memory: a second pass finds nothing, order does not matter, what is not
//! weft's is never named.

#![allow(clippy::unwrap_used, reason = "a test that unwraps names its line")]

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use weft_daemon::kernel::memory::MemoryKernel;
use weft_daemon::kernel::{Kernel, purge};
use weft_daemon::plan::desired::desired;
use weft_daemon::plan::diff::diff;
use weft_daemon::plan::model::{
    Actual, Dataplane, Encryption, HostVeth, Inputs, LinkKind, METRICS, Op, OwnDetour, Peer, Transport,
    TunnelPeer, Underlay, VethState, metric,
};
use weft_wire::mesh::{Carrier, Detour, TunnelFacts};
use weft_wire::pair::PairSecret;
use weft_wire::seal::{ClusterKey, KeyRing};
use weft_wire::types::{MacAddress, NodeName, TunnelKey};

/// A kernel that knows the underlay of these inputs and holds `actual`.
fn kernel(inputs: &Inputs, actual: Actual) -> MemoryKernel {
    let mut kernel = MemoryKernel::new(Ok(inputs.underlay.clone()));
    kernel.actual = actual;
    kernel
}

/// Makes changes; the kernel must accept every one.
fn apply(kernel: &mut MemoryKernel, ops: &[Op]) {
    for (op, answer) in ops.iter().zip(kernel.apply(ops)) {
        assert_eq!(answer, Ok(()), "{op}");
    }
}

fn peer(number: u8, v4: bool, v6: bool, mtu: u32) -> Peer {
    let node = format!("p{number}").parse().unwrap();
    let mut underlay: Vec<std::net::IpAddr> = Vec::new();
    underlay.extend(v4.then(|| format!("192.0.2.{}", number + 10).parse::<std::net::IpAddr>().unwrap()));
    underlay.extend(
        v6.then(|| format!("2001:db8::{:x}", u16::from(number) + 16).parse::<std::net::IpAddr>().unwrap()),
    );
    Peer {
        subnets: vec![
            format!("10.32.{}.0/24", u16::from(number) + 1).parse().unwrap(),
            format!("fd00:32:0:{:x}::/64", u16::from(number) + 1).parse().unwrap(),
        ],
        underlay,
        vtep_v4: v4.then(|| MacAddress::derived(&node, "v4")),
        vtep_v6: v6.then(|| MacAddress::derived(&node, "v6")),
        vni: 1,
        vxlan_port: 8472,
        mtu,
        site: format!("s{}", number % 2).parse().unwrap(),
        encryption: [Encryption::Never, Encryption::CrossSite, Encryption::Never, Encryption::Always]
            [usize::from(number % 4)],
        path_mtu: number.is_multiple_of(7).then(|| 1200 + u32::from(number)),
        tunnel: (!number.is_multiple_of(5)).then(|| TunnelFacts {
            key: TunnelKey([number % 60; 32]),
            port: 51820,
            carrier: [None, Some(Carrier::Kernel), Some(Carrier::UserSpace)][usize::from(number % 3)],
            detour: number.is_multiple_of(2).then(|| Detour {
                key: TunnelKey([100 + number % 50; 32]),
                port: 51821,
                preferred: number.is_multiple_of(4),
            }),
            preshared: [&[][..], &[1], &[2, 1], &[3]][usize::from(number / 60)]
                .iter()
                .map(|key| ClusterKey::from_bytes([*key; 32]).id())
                .collect(),
            pairs: [&[][..], &[1], &[2, 1], &[3]][usize::from(number % 4)]
                .iter()
                .map(|generation| pair_secret(*generation).id())
                .collect(),
        }),
        gateway: number.is_multiple_of(7).then_some(number),
        via: (number % 7 > 4).then(|| format!("p{}", number / 7 * 7).parse().unwrap()),
        node,
    }
}

fn pair_secret(generation: u8) -> PairSecret {
    PairSecret::new(u32::from(generation), [generation; 32])
}

/// Whom a peer's packets go to.
fn hop<'a>(inputs: &'a Inputs, peer: &'a Peer) -> &'a Peer {
    let is_hop = |other: &&Peer| other.gateway.is_some() && Some(&other.node) == peer.via.as_ref();
    inputs.peers.iter().find(is_hop).unwrap_or(peer)
}

const OWN_DETOUR: TunnelKey = TunnelKey([251; 32]);

/// Whether a device encrypts.
fn encrypts(dev: &str) -> bool {
    ["weft-wg", "weft-wg1"].contains(&dev)
}

fn ring(keys: &[u8]) -> KeyRing {
    KeyRing::new(keys.iter().map(|key| ClusterKey::from_bytes([*key; 32])).collect()).unwrap()
}

prop_compose! {
    fn any_inputs()(
        numbers in prop::collection::btree_set(0_u8..200, 0..20),
        encryption in prop::sample::select(vec![Encryption::Never, Encryption::CrossSite, Encryption::Always]),
        tunnel in proptest::option::of(Just(TunnelKey([250; 32]))),
        preshared in proptest::option::of(prop::sample::select(vec![ring(&[1]), ring(&[1, 2]), ring(&[3])])),
        pairs in prop::sample::select(vec![vec![], vec![1], vec![2, 1], vec![3, 2]]),
        families in prop::collection::vec((any::<bool>(), any::<bool>()), 20),
        mtus in prop::collection::vec(prop::sample::select(vec![1280_u32, 1400, 1500, 9000]), 20),
        kernel in any::<bool>(),
        detour in proptest::option::of((any::<bool>(), prop::collection::btree_set(0_u8..200, 0..60))),
        sessions in prop::collection::btree_set((any::<bool>(), 0_u8..150), 0..60),
        direct in any::<bool>(),
        masquerade in any::<bool>(),
        leased in any::<bool>(),
        vni in 1_u32..4,
        own in (any::<bool>(), any::<bool>()),
        pods in prop::collection::btree_set(any::<u32>(), 0..5),
        strays in prop::collection::btree_set(any::<u32>(), 0..3),
    ) -> Inputs {
        let mut addresses: Vec<IpNet> = Vec::new();
        addresses.extend((own.0 || !own.1).then(|| "192.0.2.1/24".parse::<IpNet>().unwrap()));
        addresses.extend(own.1.then(|| "2001:db8::1/64".parse::<IpNet>().unwrap()));
        let veth = |number: &u32| format!("weft{number:08x}");
        Inputs {
            node: "n1".parse().unwrap(),
            site: "s1".parse().unwrap(),
            dataplane: Dataplane {
                vni,
                vxlan_port: 8472,
                direct_routing: direct,
                masquerade,
                cluster_cidrs: vec!["10.32.0.0/12".parse().unwrap(), "fd00:32::/48".parse().unwrap()],
                non_masquerade: Vec::new(),
                mtu: None,
                tx_checksum: true,
                hairpin: true,
                encryption,
                tunnel,
                carrier: if kernel { Carrier::Kernel } else { Carrier::UserSpace },
                detour: detour.map(|(preferred, peers)| OwnDetour {
                    key: OWN_DETOUR,
                    preferred,
                    peers: peers.iter().map(|number| format!("p{number}").parse().unwrap()).collect(),
                }),
                preshared,
                pairs: [("s0".parse().unwrap(), pairs.into_iter().map(pair_secret).collect())].into(),
            },
            sessions: sessions
                .iter()
                .map(|(detour, key)| (if *detour { OWN_DETOUR } else { TunnelKey([250; 32]) }, TunnelKey([*key; 32])))
                .collect(),
            underlay: Underlay { device: "eth0".into(), index: 2, mtu: 1500, addresses, strict_sources: false, tunnel: None },
            subnets: if leased {
                vec!["10.32.250.0/24".parse().unwrap(), "fd00:32:0:fa::/64".parse().unwrap()]
            } else {
                Vec::new()
            },
            peers: numbers
                .iter()
                .zip(families)
                .zip(mtus)
                .map(|((number, (v4, v6)), mtu)| peer(*number, v4, v6, mtu))
                .collect(),
            ways: BTreeMap::new(),
            anew: BTreeSet::new(),
            attachments: pods.iter().map(|number| HostVeth { ifname: veth(number), mtu: 1450 }).collect(),
            strays: strays.difference(&pods).map(veth).collect(),
        }
    }
}

fn with_veths(mut actual: Actual, inputs: &Inputs) -> Actual {
    let loose = VethState { bridged: false, hairpin: false, up: true, mtu: 1500 };
    let names =
        inputs.attachments.iter().map(|veth| veth.ifname.clone()).chain(inputs.strays.iter().cloned());
    actual.veths.extend(names.map(|name| (name, loose.clone())));
    actual
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_second_pass_finds_nothing_from_any_state(before in any_inputs(), after in any_inputs()) {
        let mut kernel = kernel(&before, with_veths(Actual::default(), &before));
        let ops = diff(&desired(&before), &kernel.actual);
        apply(&mut kernel, &ops);
        kernel.actual = with_veths(kernel.actual, &after);
        let plan = desired(&after);
        let ops = diff(&plan, &kernel.actual);
        apply(&mut kernel, &ops);
        prop_assert_eq!(diff(&plan, &kernel.actual), Vec::new());
        prop_assert_eq!(&kernel.actual.state.routes, &plan.state.routes);
    }

    #[test]
    fn the_order_of_peers_and_pods_does_not_matter(inputs in any_inputs()) {
        let mut reversed = inputs.clone();
        reversed.peers.reverse();
        reversed.attachments.reverse();
        prop_assert_eq!(desired(&inputs), desired(&reversed));
    }

    #[test]
    fn every_route_has_what_it_needs_and_only_marked_devices_are_named(inputs in any_inputs()) {
        let plan = desired(&inputs);
        for route in plan.state.routes.values() {
            if encrypts(&route.dev) {
                prop_assert!(route.via.is_none() && plan.state.links.contains_key(&route.dev));
                continue;
            }
            let via = route.via.expect("every route that is not encrypted has a next hop");
            if route.dev == "eth0" {
                prop_assert!(inputs.dataplane.direct_routing);
                continue;
            }
            let mac = plan.state.neighbours.get(&(route.dev.clone(), via));
            let mac = *mac.expect("a tunnelled next hop has a neighbour");
            prop_assert!(plan.state.fdb.contains_key(&(route.dev.clone(), mac)));
            prop_assert!(plan.state.links.contains_key(&route.dev));
        }
        for name in plan.state.links.keys() {
            prop_assert!(["weft0", "weft-vx4", "weft-vx6"].contains(&name.as_str()) || encrypts(name));
        }
        let none = Actual::default();
        for op in diff(&plan, &none) {
            prop_assert!(!matches!(op, Op::DelLink(_) | Op::DelVeth(_) | Op::DelNft), "{op} on an empty kernel");
        }
    }

    #[test]
    fn what_must_be_encrypted_has_no_clear_route_and_its_peer_a_tunnel(inputs in any_inputs()) {
        let plan = desired(&inputs);
        for peer in &inputs.peers {
            let hop = hop(&inputs, peer);
            let policies = [inputs.dataplane.encryption, peer.encryption, hop.encryption];
            let demanded = policies.into_iter().any(|policy| match policy {
                Encryption::Never => false,
                Encryption::CrossSite => inputs.site != hop.site,
                Encryption::Always => true,
            });
            for planned in plan.routes.iter().filter(|planned| planned.node == peer.node) {
                let encrypted = planned.route.as_ref().is_some_and(|route| encrypts(&route.dev));
                prop_assert_eq!(encrypted, demanded && planned.route.is_some());
                if encrypted {
                    let dev = &planned.route.as_ref().expect("it is encrypted").dev;
                    let facts = hop.tunnel.as_ref().expect("an encrypted peer has a key");
                    let leads = |entry: &&TunnelPeer| entry.node == hop.node && entry.prefixes.contains(&planned.prefix);
                    let entry = plan.state.tunnels[dev].peers.values().find(leads);
                    let entry = entry.expect("the device knows whose the prefix is");
                    // Both use a secret from a key that both have, or neither uses one.
                    let used = entry.preshared.as_ref().map(|secret| secret.from);
                    prop_assert_eq!(used.is_some(), inputs.dataplane.preshared.is_some());
                    prop_assert_eq!(used.is_some(), !facts.preshared.is_empty());
                    prop_assert!(used.is_none_or(|id| facts.preshared.contains(&id)));
                    // And the latest secret of the two sites that both have; a node of the own site none.
                    let shared = inputs.dataplane.pairs.get(&hop.site).into_iter().flatten();
                    let common = shared.map(PairSecret::id).find(|id| facts.pairs.contains(id));
                    prop_assert_eq!(entry.preshared.as_ref().and_then(|secret| secret.pair), common.filter(|_| used.is_some()));
                    prop_assert!(common.is_none_or(|_| hop.site != inputs.site));
                }
                let sealed = &plan.nft.as_ref().expect("a node with subnets has a table").sealed;
                let guarded = sealed.iter().any(|net| net.contains(&planned.prefix));
                prop_assert!(guarded || !demanded, "{} may pass in clear", planned.prefix);
            }
        }
    }

    #[test]
    fn a_kernel_takes_a_peers_packets_on_either_way_and_sends_where_there_is_a_session(inputs in any_inputs()) {
        let inputs = Inputs { dataplane: Dataplane { carrier: Carrier::Kernel, ..inputs.dataplane }, ..inputs };
        let plan = desired(&inputs);
        let mut against = 0;
        for planned in plan.routes.iter().filter(|planned| planned.route.as_ref().is_some_and(|r| encrypts(&r.dev))) {
            let dev = &planned.route.as_ref().unwrap().dev;
            let peer = hop(&inputs, inputs.peers.iter().find(|peer| peer.node == planned.node).unwrap());
            let facts = peer.tunnel.as_ref().unwrap();
            let ways: Vec<_> = plan.state.tunnels.iter().filter_map(|(name, tunnels)| {
                let mut entries = tunnels.peers.iter();
                let (key, _) = entries.find(|(_, entry)| entry.prefixes.contains(&planned.prefix))?;
                Some((name, (tunnels.key, *key)))
            }).collect();
            prop_assert_eq!(ways[0].0, "weft-wg");
            let used = ways.iter().find(|(name, _)| *name == dev).unwrap();
            let Some(around) = ways.get(1) else {
                prop_assert_eq!(used.0, "weft-wg");
                continue;
            };
            let own = inputs.dataplane.detour.as_ref().unwrap();
            prop_assert!(own.peers.contains(&peer.node));
            prop_assert_eq!(around.1.0, own.key);
            let other = ways.iter().find(|(name, _)| *name != dev).unwrap();
            let preferred = own.preferred || facts.detour.as_ref().is_some_and(|detour| detour.preferred);
            let lives = |way: &(&String, (TunnelKey, TunnelKey))| inputs.sessions.contains(&way.1);
            if preferred != (dev == "weft-wg1") {
                against += 1;
                prop_assert!(lives(used) && !lives(other), "against the preference without need");
            }
            prop_assert!(lives(used) || !lives(other), "a session that lives is not left for none");
        }
        prop_assert!(plan.pending >= against);
    }

    #[test]
    fn no_route_leads_to_a_device_whose_peers_have_yet_to_come_or_went_before(before in any_inputs(), after in any_inputs()) {
        let after = Inputs { underlay: before.underlay.clone(), ..after };
        let mut kernel = kernel(&before, with_veths(Actual::default(), &before));
        let ops = diff(&desired(&before), &kernel.actual);
        apply(&mut kernel, &ops);
        kernel.actual = with_veths(kernel.actual, &after);
        let owns = |kernel: &MemoryKernel, prefix: &IpNet, dev: &str| {
            let tunnels = kernel.actual.state.tunnels.get(dev);
            tunnels.is_some_and(|tunnels| tunnels.peers.values().any(|peer| peer.prefixes.contains(prefix)))
        };
        let plan = desired(&after);
        for op in diff(&plan, &kernel.actual) {
            if let Op::SetRoute(prefix, _, route) = &op && encrypts(&route.dev) {
                prop_assert!(owns(&kernel, prefix, &route.dev), "{op} to a device that does not know whose it is");
            }
            // Who leaves for a device that stays as it is has left.
            if let Op::SetTunnel(dev, tunnels) = &op {
                for ((prefix, _), route) in plan.state.routes.iter().filter(|(_, route)| encrypts(&route.dev) && route.dev != *dev) {
                    let ready = kernel.actual.state.tunnels.get(&route.dev) == plan.state.tunnels.get(&route.dev);
                    let here = kernel.actual.state.routes.iter().any(|((to, _), now)| to == prefix && now.dev == *dev);
                    prop_assert!(!(ready && here), "{prefix} is still on {dev} when it gets {tunnels:?}");
                }
            }
            apply(&mut kernel, &[op]);
        }
    }

    #[test]
    fn a_tunnel_key_that_cannot_be_has_no_tunnel_and_disturbs_no_other(inputs in any_inputs(), zeros in any::<bool>()) {
        let own = TunnelKey([250; 32]);
        let mut inputs = Inputs { dataplane: Dataplane { tunnel: Some(own), detour: None, ..inputs.dataplane.clone() }, ..inputs };
        for facts in inputs.peers.iter_mut().filter_map(|peer| peer.tunnel.as_mut()) {
            facts.detour = None;
        }
        let before = desired(&inputs);
        let Some(bad) = inputs.peers.iter_mut().rev().find(|peer| peer.tunnel.is_some()) else { return Ok(()) };
        let node = bad.node.clone();
        if let Some(facts) = &mut bad.tunnel {
            facts.key = if zeros { TunnelKey([0; 32]) } else { own };
        }
        let after = desired(&inputs);
        let hop_of = |node: &NodeName| {
            let peer = inputs.peers.iter().find(|peer| peer.node == *node).expect("a route is to a peer");
            hop(&inputs, peer).node.clone()
        };
        for (was, is) in before.routes.iter().zip(&after.routes) {
            if hop_of(&is.node) != node {
                // One that shared the key of before is better off.
                prop_assert!(is == was || was.route.is_none());
            } else if was.transport == Transport::WireGuard && was.route.is_some() {
                prop_assert!(is.route.is_none() && is.reason.contains("tunnel key"), "{}", is.reason);
            }
        }
        let mut keys = after.state.tunnels.values().flat_map(|tunnels| tunnels.peers.keys());
        prop_assert!(keys.all(|key| *key != own && key.0 != [0; 32]));
    }

    #[test]
    fn a_route_of_an_earlier_release_goes_when_the_new_one_is_there(inputs in any_inputs()) {
        let mut kernel = kernel(&inputs, Actual::default());
        let plan = desired(&inputs);
        let ops = diff(&plan, &kernel.actual);
        apply(&mut kernel, &ops);
        // That release had one metric for all routes.
        let routes = std::mem::take(&mut kernel.actual.state.routes);
        kernel.actual.state.routes =
            routes.iter().map(|((prefix, _), route)| ((*prefix, METRICS.0), route.clone())).collect();
        for op in diff(&plan, &kernel.actual) {
            apply(&mut kernel, &[op]);
            for (prefix, _) in routes.keys() {
                let mut ways = kernel.actual.state.routes.keys().filter(|(to, _)| to == prefix);
                prop_assert!(ways.next().is_some(), "no moment without a route to {prefix}");
            }
        }
        prop_assert_eq!(&kernel.actual.state.routes, &routes);
    }

    #[test]
    fn a_purge_leaves_nothing_with_the_mark(inputs in any_inputs()) {
        let mut kernel = kernel(&inputs, with_veths(Actual::default(), &inputs));
        let ops = diff(&desired(&inputs), &kernel.actual);
        apply(&mut kernel, &ops);
        prop_assert_eq!(purge(&mut kernel), Vec::<String>::new());
        // Settings of the machine stay: others may have come to rely on them.
        kernel.actual.state.sysctls.clear();
        prop_assert_eq!(kernel.actual, Actual::default());
    }
}

#[test]
fn subnets_that_follow_each_other_have_metrics_of_their_own() {
    let (least, count) = METRICS;
    let v4 = |number: u32| format!("10.{}.{}.0/24", 32 + number / 256, number % 256).parse().unwrap();
    let v6 = |number: u32| format!("fd00:32:0:{number:x}::/64").parse().unwrap();
    let families: [&dyn Fn(u32) -> IpNet; 2] = [&v4, &v6];
    for subnet in families {
        let metrics: BTreeSet<u32> = (0..count).map(|number| metric(subnet(number))).collect();
        assert_eq!(metrics, (least..least + count).collect());
    }
    for whole in ["0.0.0.0/0", "::/0"] {
        assert_eq!(metric(whole.parse().unwrap()), least);
    }
}

#[test]
fn a_device_that_must_be_another_is_replaced_with_everything_on_it() {
    let mut inputs = {
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        loop {
            let inputs = any_inputs().new_tree(&mut runner).unwrap().current();
            if inputs.subnets.len() == 2 && inputs.peers.len() > 3 && inputs.dataplane.vni == 1 {
                break inputs;
            }
        }
    };
    let mut kernel = kernel(&inputs, Actual::default());
    let ops = diff(&desired(&inputs), &kernel.actual);
    apply(&mut kernel, &ops);
    inputs.dataplane.vxlan_port = 4789;
    inputs.peers.iter_mut().for_each(|peer| peer.vxlan_port = 4789);
    let ops = diff(&desired(&inputs), &kernel.actual);
    assert!(ops.iter().any(|op| matches!(op, Op::DelLink(name) if name.starts_with("weft-vx"))));
    apply(&mut kernel, &ops);
    assert_eq!(diff(&desired(&inputs), &kernel.actual), []);
    let ports = kernel.actual.state.links.values().filter_map(|link| match &link.kind {
        LinkKind::Vxlan(vxlan) => Some(vxlan.port),
        _ => None,
    });
    assert!(ports.into_iter().all(|port| port == 4789));
}
