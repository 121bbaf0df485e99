//! From everything known to what the kernel should hold.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use weft_wire::mesh::{Carrier, TunnelFacts};
use weft_wire::pair;
use weft_wire::preshared::PresharedKey;
use weft_wire::types::{MacAddress, NodeName, Subnet, TunnelKey};

use super::model::{
    BRIDGE, DETOUR, Dataplane, Desired, Encryption, Inputs, Link, LinkKind, Peer, PlannedRoute, Route,
    Transport, TunnelPeer, Tunnels, VXLAN_V4, VXLAN_V6, Vxlan, WIREGUARD, metric,
};
use super::table::{Table, VERSION};

/// Ethernet (14) + VXLAN (8, RFC 7348) + UDP (8) + IPv4 (20), in bytes.
const OVERHEAD_V4: u32 = 50;
/// The same with IPv6 (40), in bytes.
const OVERHEAD_V6: u32 = 70;
/// WireGuard (32, whitepaper s5.4.6) + UDP (8) + IPv4 (20), in bytes; and with IPv6 (40). Padding stays within the MTU.
const WIREGUARD_V4: u32 = 60;
const WIREGUARD_V6: u32 = 80;

/// Computes what the kernel should hold. Total, and independent of the order of peers and pods.
pub fn desired(inputs: &Inputs) -> Desired {
    let mut plan =
        Desired { hairpin: inputs.dataplane.hairpin, strays: inputs.strays.clone(), ..Desired::default() };
    if inputs.subnets.is_empty() {
        return plan;
    }
    plan.pod_mtu = pod_mtu(inputs);
    plan_bridge(inputs, &mut plan);
    plan_tunnels(inputs, &mut plan);
    plan_wireguard(inputs, &mut plan);
    let hops = Hops::new(inputs);
    for peer in sorted(&inputs.peers) {
        let hop = hops.of(peer);
        for subnet in &peer.subnets {
            plan_subnet(inputs, (peer, hop), *subnet, &mut plan);
        }
    }
    if plan.state.tunnels.get(DETOUR).is_some_and(|tunnels| tunnels.peers.is_empty()) {
        plan.state.tunnels.remove(DETOUR);
        plan.state.addresses.retain(|(dev, _)| dev != DETOUR);
        plan.state.links.remove(DETOUR);
    }
    plan_sysctls(inputs, &mut plan);
    let table = Table {
        cluster: inputs.dataplane.cluster_cidrs.clone(),
        except: inputs.dataplane.non_masquerade.clone(),
        masquerade: inputs.dataplane.masquerade,
        vxlan_port: inputs.dataplane.vxlan_port,
        sealed: sealed(inputs),
        bridge: BRIDGE.into(),
        tunnels: [WIREGUARD.into(), DETOUR.into()],
        version: VERSION,
    };
    plan.state.nft = Some(table.digest());
    plan.nft = Some(table);
    plan.veths = inputs.attachments.iter().map(|veth| (veth.ifname.clone(), veth.mtu)).collect();
    plan
}

/// The peers that packets go to: each itself, or the gateway by which it is reached.
struct Hops<'a>(BTreeMap<&'a NodeName, &'a Peer>);

impl<'a> Hops<'a> {
    fn new(inputs: &'a Inputs) -> Self {
        Self(
            inputs
                .peers
                .iter()
                .filter(|peer| peer.gateway.is_some())
                .map(|peer| (&peer.node, peer))
                .collect(),
        )
    }

    fn of(&self, peer: &'a Peer) -> &'a Peer {
        peer.via.as_ref().and_then(|via| self.0.get(via)).copied().unwrap_or(peer)
    }
}

fn sorted(peers: &[Peer]) -> Vec<&Peer> {
    let mut peers: Vec<_> = peers.iter().collect();
    peers.sort_by(|a, b| a.node.cmp(&b.node));
    peers
}

/// Returns the name and the overhead of the VXLAN device of a family.
fn device_of(v4: bool) -> (&'static str, u32) {
    if v4 { (VXLAN_V4, OVERHEAD_V4) } else { (VXLAN_V6, OVERHEAD_V6) }
}

fn local(inputs: &Inputs, v4: bool) -> Option<IpNet> {
    inputs.underlay.addresses.iter().copied().find(|address| address.addr().is_ipv4() == v4)
}

fn pod_mtu(inputs: &Inputs) -> u32 {
    let v4 = local(inputs, true).is_some();
    let overhead = device_of(v4).1.max(inputs.dataplane.tunnel.map_or(0, |_| wireguard_overhead(v4)));
    inputs.dataplane.mtu.unwrap_or_else(|| inputs.underlay.mtu.saturating_sub(overhead))
}

fn plan_bridge(inputs: &Inputs, plan: &mut Desired) {
    let mac = MacAddress::derived(&inputs.node, "bridge");
    let bridge = Link { kind: LinkKind::Bridge, mtu: plan.pod_mtu, up: true, mac };
    plan.state.links.insert(BRIDGE.into(), bridge);
    for subnet in &inputs.subnets {
        let gateway = IpNet::new(subnet.gateway(), subnet.net().prefix_len())
            .expect("a subnet's prefix length fits its family");
        plan.state.addresses.insert((BRIDGE.into(), gateway));
    }
    if inputs.subnets.iter().any(|subnet| !subnet.is_ipv4()) {
        // The kernel makes this address by itself, but only once its link watch has run, up to a second after the
        // bridge came up; until then it cannot solicit a pod's address.
        plan.state.addresses.insert((BRIDGE.into(), link_local(mac)));
    }
}

/// Returns the link-local address of a device (RFC 4291 appendix A, modified EUI-64).
fn link_local(MacAddress([a, b, c, d, e, f]): MacAddress) -> IpNet {
    let address = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    IpNet::new(IpAddr::from(address), 64).expect("64 is a prefix length of IPv6")
}

fn plan_tunnels(inputs: &Inputs, plan: &mut Desired) {
    for v4 in [true, false] {
        let Some(local) = local(inputs, v4) else { continue };
        let (name, overhead) = device_of(v4);
        let vxlan = Vxlan {
            vni: inputs.dataplane.vni,
            port: inputs.dataplane.vxlan_port,
            local: local.addr(),
            underlay: inputs.underlay.index,
            learning: false,
        };
        let link = Link {
            kind: LinkKind::Vxlan(vxlan),
            mtu: inputs.underlay.mtu.saturating_sub(overhead),
            up: true,
            mac: MacAddress::derived(&inputs.node, if v4 { "v4" } else { "v6" }),
        };
        plan.state.links.insert(name.into(), link);
        plan.state.offloads.insert(name.into(), inputs.dataplane.tx_checksum);
    }
}

fn wireguard_overhead(v4: bool) -> u32 {
    if v4 { WIREGUARD_V4 } else { WIREGUARD_V6 }
}

fn plan_wireguard(inputs: &Inputs, plan: &mut Desired) {
    let overhead = wireguard_overhead(local(inputs, true).is_some());
    let mtu = inputs.underlay.mtu.saturating_sub(overhead);
    for (dev, key) in own_keys(inputs) {
        // It carries IP packets, not frames.
        let link = Link { kind: LinkKind::Tun, mtu, up: true, mac: MacAddress([0; 6]) };
        plan.state.links.insert(dev.into(), link);
        // kube-proxy has the node's own packets to Services, and those from outside, masqueraded as they leave. For IPv4 the
        // kernel takes an address of this device (inet_select_addr), and were there none an underlay address, which the peer
        // knows for no pod's and drops.
        for subnet in inputs.subnets.iter().filter(|subnet| subnet.is_ipv4()) {
            plan.state.addresses.insert((dev.into(), subnet.gateway().into()));
        }
        plan.state.tunnels.insert(dev.into(), Tunnels { key, mtu, peers: BTreeMap::new() });
    }
}

/// Returns the devices of the tunnels with this node's keys there. In user space one device takes packets under two keys, of
/// which the later one is told.
fn own_keys(inputs: &Inputs) -> Vec<(&'static str, TunnelKey)> {
    let Dataplane { tunnel, detour, carrier, .. } = &inputs.dataplane;
    match (tunnel, detour, carrier) {
        (None, ..) => Vec::new(),
        (Some(_), Some(detour), Carrier::UserSpace) => vec![(WIREGUARD, detour.key)],
        (Some(key), None, _) => vec![(WIREGUARD, *key)],
        (Some(key), Some(detour), Carrier::Kernel) => vec![(WIREGUARD, *key), (DETOUR, detour.key)],
    }
}

/// Returns what must not be sent or taken in clear.
fn sealed(inputs: &Inputs) -> Vec<IpNet> {
    let subnets = |peer: &Peer| peer.subnets.iter().map(|subnet| subnet.net()).collect::<Vec<_>>();
    match inputs.dataplane.encryption {
        // Whoever they turn out to be: also before a peer is known, and after it is forgotten.
        Encryption::Always => inputs.dataplane.cluster_cidrs.clone(),
        _ => {
            let hops = Hops::new(inputs);
            let is_sealed = |peer: &&Peer| must_encrypt(inputs, (peer, hops.of(peer)));
            sorted(&inputs.peers).into_iter().filter(is_sealed).flat_map(subnets).collect()
        }
    }
}

/// Returns the peer's endpoint of a usable family that both have, IPv4 first.
fn common_underlay(inputs: &Inputs, peer: &Peer, usable: impl Fn(bool) -> bool) -> Option<(bool, IpAddr)> {
    [true, false].into_iter().filter(|v4| usable(*v4)).find_map(|v4| {
        let endpoint = peer.underlay.iter().copied().find(|address| address.is_ipv4() == v4)?;
        local(inputs, v4).map(|_| (v4, endpoint))
    })
}

fn no_common_underlay(peer: &Peer) -> String {
    format!(
        "{} and this node have no underlay family in common; give both an IPv4 or IPv6 address",
        peer.node
    )
}

/// Whether packets of a peer must be encrypted on the way to a hop: by what this node, the peer or the hop demands of it.
fn must_encrypt(inputs: &Inputs, (owner, hop): (&Peer, &Peer)) -> bool {
    let policies = [inputs.dataplane.encryption, owner.encryption, hop.encryption];
    policies.into_iter().any(|policy| policy.demands(&inputs.site, &hop.site))
}

/// Returns the route to a subnet of a peer that clear packets must not go to, or why there is none.
fn encrypted_way(
    inputs: &Inputs,
    peer: &Peer,
    subnet: Subnet,
    plan: &mut Desired,
) -> Result<(Way, String), String> {
    let node = &peer.node;
    let Some(usual_key) = inputs.dataplane.tunnel else {
        return Err(format!(
            "{node} exchanges no clear pod traffic, and this node has no tunnels; set encryption.policy here as there"
        ));
    };
    let Some(facts) = &peer.tunnel else {
        return Err(format!(
            "pod traffic with {node} must be encrypted, and it announces no tunnel key; set encryption.policy there as here"
        ));
    };
    let found = inputs.ways.get(node).map(|way| (way.is_ipv4(), way.ip()));
    let Some((v4, address)) = found.or_else(|| common_underlay(inputs, peer, |_| true)) else {
        return Err(no_common_underlay(peer));
    };
    let own = inputs.dataplane.detour.as_ref();
    let prefers_detour = [own.map(|own| own.preferred), facts.detour.as_ref().map(|detour| detour.preferred)]
        .contains(&Some(true));
    let main = Entrance { key: facts.key, port: facts.port };
    let detour = detour_of(facts);
    let mut lead = |dev: &'static str, entrance: Entrance| -> Result<_, String> {
        let way = inputs.ways.get(node).filter(|_| entrance.port == main.port);
        let endpoint = way.copied().unwrap_or(SocketAddr::new(address, entrance.port));
        let entry = tunnel_to(inputs, peer, dev, (entrance.key, endpoint), plan)?;
        entry.prefixes.push(subnet.net());
        entry.anew = way.is_some() && inputs.anew.contains(node);
        let how = entry.preshared.as_ref().map(|key| {
            let pair = key.pair.map(|pair| format!(" and secret {pair} of the two sites"));
            format!(", with a secret from cluster key {}{}", key.from, pair.unwrap_or_default())
        });
        Ok((dev, format!("encrypted to {endpoint}{}", how.unwrap_or_default())))
    };
    let sessions = &inputs.sessions;
    let (dev, reason, pending) = match inputs.dataplane.carrier {
        Carrier::UserSpace => {
            let entrance = detour.filter(|_| prefers_detour).unwrap_or(main);
            let (dev, reason) = lead(WIREGUARD, entrance)?;
            // A session under the keys before is in use as long as there is no other.
            let key = own.map_or(usual_key, |own| own.key);
            let reached = sessions
                .iter()
                .any(|(_, theirs)| [Some(main.key), detour.map(|other| other.key)].contains(&Some(*theirs)));
            (dev, reason, own.is_some() && reached && !sessions.contains(&(key, entrance.key)))
        }
        Carrier::Kernel => {
            let usual = lead(WIREGUARD, main)?;
            let other = detour.filter(|_| own.is_some_and(|own| own.peers.contains(node)));
            // Where there can be no detour the usual way stays.
            match other.and_then(|entrance| Some((entrance, lead(DETOUR, entrance).ok()?))) {
                None => {
                    // It has yet to open its own.
                    let awaited =
                        facts.carrier == Some(Carrier::Kernel) && own.is_some_and(|own| own.preferred);
                    (usual.0, usual.1, awaited && sessions.contains(&(usual_key, main.key)))
                }
                Some((entrance, around)) => {
                    let via_detour = own.is_some_and(|own| sessions.contains(&(own.key, entrance.key)));
                    let (by_detour, pending) =
                        way(prefers_detour, (sessions.contains(&(usual_key, main.key)), via_detour));
                    let (dev, reason) = if by_detour { around } else { usual };
                    (dev, reason, pending)
                }
            }
        }
    };
    plan.pending += usize::from(pending);
    let room = Room::of(peer, peer.mtu.min(inputs.underlay.mtu), wireguard_overhead(v4));
    let mtu = room.limit(plan.pod_mtu);
    let route = Route { dev: dev.into(), via: None, source: source(inputs, subnet), mtu };
    Ok((Way { route, room }, reason))
}

/// A route, and how much room there is on it.
struct Way {
    route: Route,
    room: Room,
}

/// How large a packet may be on a way.
#[derive(Default)]
struct Room {
    /// By the devices at both ends, in bytes.
    devices: u32,
    /// What the way adds, in bytes.
    overhead: u32,
    /// As measured, where it is less.
    measured: Option<u32>,
}

impl Room {
    fn of(peer: &Peer, outside: u32, overhead: u32) -> Self {
        Self { devices: outside.saturating_sub(overhead), overhead, measured: peer.path_mtu }
    }

    /// The MTU that the route needs, if it is less than that of pods.
    fn limit(&self, pod_mtu: u32) -> Option<u32> {
        let room = self.measured.map_or(self.devices, |measured| measured.min(self.devices));
        (room < pod_mtu).then_some(room)
    }
}

/// Where a peer's tunnels are entered.
#[derive(Debug, Clone, Copy)]
struct Entrance {
    key: TunnelKey,
    port: u16,
}

/// Returns the entrance beside the usual one. Tunnels of user space take packets under two keys of this node at one place.
fn detour_of(facts: &TunnelFacts) -> Option<Entrance> {
    match (&facts.detour, facts.carrier) {
        (Some(detour), _) => Some(Entrance { key: detour.key, port: detour.port }),
        (None, Some(Carrier::UserSpace)) => Some(Entrance { key: facts.key, port: facts.port }),
        (None, _) => None,
    }
}

/// Returns whether to take the detour, and whether that is against the preference, because only the other way has a session.
/// Both ends take packets from both ways, so each changes when it likes, and nothing waits for a handshake.
fn way(prefers_detour: bool, (usual, around): (bool, bool)) -> (bool, bool) {
    let (preferred, other) = if prefers_detour { (around, usual) } else { (usual, around) };
    let against = other && !preferred;
    (prefers_detour != against, against)
}

/// Returns the peer's entry on a device, or why there can be none.
fn tunnel_to<'a>(
    inputs: &Inputs,
    peer: &Peer,
    dev: &str,
    (theirs, endpoint): (TunnelKey, SocketAddr),
    plan: &'a mut Desired,
) -> Result<&'a mut TunnelPeer, String> {
    let node = &peer.node;
    let Some(Tunnels { peers, key, .. }) = plan.state.tunnels.get_mut(dev) else {
        return Err(format!("this node has no {dev}"));
    };
    if theirs.0 == [0; 32] {
        return Err(format!(
            "{node} announces a tunnel key of zeros; restart its daemon with a key of its own"
        ));
    }
    if theirs == *key {
        return Err(format!("{node} announces this node's own tunnel key; run `weft rotate-key` on it"));
    }
    let preshared = preshared(inputs, peer, (*key, theirs))?;
    let entry = peers.entry(theirs).or_insert_with(|| TunnelPeer {
        node: node.clone(),
        endpoint,
        anew: false,
        prefixes: Vec::new(),
        preshared,
    });
    if entry.node != *node {
        return Err(format!(
            "{node} announces the tunnel key of {}; run `weft rotate-key` on one of them",
            entry.node
        ));
    }
    Ok(entry)
}

/// Returns the secret that handshakes with a peer need beside the two keys, if any; an error is why there can be no session.
fn preshared(
    inputs: &Inputs,
    peer: &Peer,
    (own, other): (TunnelKey, TunnelKey),
) -> Result<Option<PresharedKey>, String> {
    let node = &peer.node;
    let theirs = peer.tunnel.as_ref().map(|facts| &facts.preshared[..]).unwrap_or_default();
    match (&inputs.dataplane.preshared, theirs) {
        (None, []) => Ok(None),
        (None, _) => Err(format!(
            "{node} wants a secret from the cluster key in handshakes, and this node uses none; set encryption.preshared here as there"
        )),
        (Some(_), []) => Err(format!(
            "this node wants a secret from the cluster key in handshakes, and {node} uses none; set encryption.preshared there as here"
        )),
        (Some(ring), theirs) => {
            let alone = PresharedKey::of_pair(ring, theirs, own, other).ok_or_else(|| {
                format!("{node} and this node have no cluster key in common; `weft cluster-key list` on both shows what they have, `add` adds one")
            })?;
            // Until both have one they do without: a tunnel that waits for it would be of no use to anybody.
            let announced = peer.tunnel.as_ref().map_or(&[][..], |facts| &facts.pairs);
            let shared = inputs.dataplane.pairs.get(&peer.site);
            let common = shared.and_then(|shared| pair::common(shared, announced));
            Ok(Some(match common {
                Some(secret) => alone.mixed_with(secret),
                None => alone,
            }))
        }
    }
}

/// Plans the way to a subnet of a peer: to the hop that it is reached by.
fn plan_subnet(inputs: &Inputs, (owner, peer): (&Peer, &Peer), subnet: Subnet, plan: &mut Desired) {
    let tell = |plan: &mut Desired, transport, way: Option<Way>, reason: String| {
        let (route, room) = way.map(|way| (way.route, way.room)).unzip();
        if let Some(route) = &route {
            plan.state.routes.insert((subnet.net(), metric(subnet.net())), route.clone());
        }
        let (prefix, node) = (subnet.net(), owner.node.clone());
        let reason = match owner.node == peer.node {
            true => reason,
            false => format!("by gateway {}: {reason}", peer.node),
        };
        let Room { devices: room, overhead, .. } = room.unwrap_or_default();
        plan.routes.push(PlannedRoute { prefix, node, transport, route, room, overhead, reason });
    };
    if let Some(own) = inputs.subnets.iter().find(|own| own.overlaps(subnet)) {
        return tell(plan, Transport::Vxlan, None, format!("this node's own pods use {own}"));
    }
    if must_encrypt(inputs, (owner, peer)) {
        return match encrypted_way(inputs, peer, subnet, plan) {
            Ok((way, reason)) => tell(plan, Transport::WireGuard, Some(way), reason),
            Err(reason) => tell(plan, Transport::WireGuard, None, reason),
        };
    }
    if let Some(via) = direct_hop(inputs, peer, subnet) {
        let dev = inputs.underlay.device.clone();
        let room = Room::of(peer, peer.mtu.min(inputs.underlay.mtu), 0);
        let mtu = room.limit(plan.pod_mtu);
        let route = Route { dev, via: Some(via), source: source(inputs, subnet), mtu };
        return tell(plan, Transport::Direct, Some(Way { route, room }), "on the same link".into());
    }
    if (peer.vni, peer.vxlan_port) != (inputs.dataplane.vni, inputs.dataplane.vxlan_port) {
        return tell(
            plan,
            Transport::Vxlan,
            None,
            format!(
                "{} has overlay.vni {} and overlay.port {}, this node {} and {}; make them the same",
                peer.node, peer.vni, peer.vxlan_port, inputs.dataplane.vni, inputs.dataplane.vxlan_port
            ),
        );
    }
    let vtep = |v4: bool| if v4 { peer.vtep_v4 } else { peer.vtep_v6 };
    let common = common_underlay(inputs, peer, |v4| vtep(v4).is_some());
    let common = common.and_then(|(v4, endpoint)| Some((v4, endpoint, vtep(v4)?)));
    let Some((v4, endpoint, mac)) = common else {
        return tell(plan, Transport::Vxlan, None, no_common_underlay(peer));
    };
    let (dev, overhead) = device_of(v4);
    let room = Room::of(peer, peer.mtu.min(inputs.underlay.mtu), overhead);
    let mtu = room.limit(plan.pod_mtu);
    // The kernel refuses an IPv6 gateway that it would reach through another device, which the subnet's own address
    // is as long as the route through that device stands: a peer could not move between devices without a gap. The
    // link-local address of the peer's device has no such history.
    let via = if subnet.is_ipv4() { subnet.network() } else { link_local(mac).addr() };
    let route = Route { dev: dev.into(), via: Some(via), source: source(inputs, subnet), mtu };
    tell(plan, Transport::Vxlan, Some(Way { route, room }), format!("to {endpoint}"));
    plan.state.neighbours.insert((dev.into(), via), mac);
    plan.state.fdb.insert((dev.into(), mac), endpoint);
}

/// Returns the peer's address to route to without a tunnel, where that is wanted and it is one hop away.
fn direct_hop(inputs: &Inputs, peer: &Peer, subnet: Subnet) -> Option<IpAddr> {
    if !inputs.dataplane.direct_routing {
        return None;
    }
    let link = local(inputs, subnet.is_ipv4())?;
    let hop = peer.underlay.iter().copied().find(|address| address.is_ipv4() == subnet.is_ipv4())?;
    link.contains(&hop).then_some(hop)
}

/// Returns the address that the node's own packets to pods carry: the node's gateway, which peers route back.
fn source(inputs: &Inputs, subnet: Subnet) -> Option<IpAddr> {
    let mut own = inputs.subnets.iter().filter(|own| own.is_ipv4() == subnet.is_ipv4());
    own.next().map(|own| own.gateway())
}

fn plan_sysctls(inputs: &Inputs, plan: &mut Desired) {
    let mut set = |path: String, value: &str| plan.state.sysctls.insert(path, value.into());
    let families = |v4| inputs.subnets.iter().any(|subnet| subnet.is_ipv4() == v4);
    let devices = plan.state.links.keys();
    if families(true) {
        set("net/ipv4/ip_forward".into(), "1");
    }
    if families(false) {
        set("net/ipv6/conf/all/forwarding".into(), "1");
    }
    // The larger of the device's and the host's value counts. Packets of pods must not be checked strictly; a loose
    // check passes whatever the default route covers, and costs a route lookup a packet.
    let check = if inputs.underlay.strict_sources { "2" } else { "0" };
    for device in devices {
        set(format!("net/ipv4/conf/{device}/rp_filter"), check);
        set(format!("net/ipv6/conf/{device}/accept_ra"), "0");
        if families(false) {
            set(format!("net/ipv6/conf/{device}/disable_ipv6"), "0");
            // The addresses are the node's by lease: no probe may delay them.
            set(format!("net/ipv6/conf/{device}/accept_dad"), "0");
        }
    }
    if families(false) {
        // A host that forwards stops to hear router advertisements, and forgets the default routes that it has from
        // them, unless told otherwise (Documentation/networking/ip-sysctl.rst, accept_ra). Where they are off, by
        // choice or because a program does the kernel's part, they stay off.
        let path = format!("net/ipv6/conf/{}/accept_ra", inputs.underlay.device);
        plan.amend.insert(path, ("1".into(), "2".into()));
    }
}
