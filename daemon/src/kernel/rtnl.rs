//! Between rtnetlink's messages and the plan's values (linux/rtnetlink.h, if_link.h, neighbour.h).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVxlan, LinkAttribute, LinkFlags,
    LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use weft_wire::types::MacAddress;

use super::netlink::{Conn, Refusal};
use crate::plan::model::{
    Actual, BRIDGE, DETOUR, Link, LinkKind, Op, PROTOCOL, Route, State, VXLAN_V4, VXLAN_V6, VethState, Vxlan,
    WIREGUARD, is_host_veth,
};

/// The bit of the MTU among the metrics that are locked (`RTAX_LOCK`, linux/rtnetlink.h).
const LOCKED_MTU: u32 = 1 << 2;

/// Kinds of device that are tunnels, as `ip link` has them.
const TUNNELS: [&str; 14] = [
    "wireguard",
    "gre",
    "gretap",
    "erspan",
    "ip6gre",
    "ip6gretap",
    "ipip",
    "ip6tnl",
    "sit",
    "vti",
    "vti6",
    "xfrm",
    "geneve",
    "ppp",
];

/// A device as dumped.
#[derive(Debug)]
pub(super) struct Found {
    pub name: String,
    pub index: u32,
    pub mtu: u32,
    pub up: bool,
    mac: MacAddress,
    controller: u32,
    hairpin: bool,
    kind: LinkKind,
}

impl Found {
    pub(super) fn is_tun(&self) -> bool {
        self.kind == LinkKind::Tun
    }

    /// The device's kind, where it carries packets inside other packets.
    pub(super) fn tunnel(&self) -> Option<String> {
        match &self.kind {
            LinkKind::Tun => Some("tun".into()),
            LinkKind::Vxlan(_) => Some("vxlan".into()),
            LinkKind::Other(kind) => TUNNELS.contains(&kind.as_str()).then(|| kind.clone()),
            LinkKind::Bridge => None,
        }
    }
}

pub(super) fn is_ours(name: &str) -> bool {
    matches!(name, BRIDGE | VXLAN_V4 | VXLAN_V6 | WIREGUARD | DETOUR)
}

fn family(v4: bool) -> AddressFamily {
    if v4 { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// Dumps all devices.
pub(super) fn links(conn: &mut Conn) -> Result<Vec<Found>, Refusal> {
    let found = conn.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    Ok(found
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(read_link(&link)),
            _ => None,
        })
        .collect())
}

pub(super) fn read_link(message: &LinkMessage) -> Found {
    let mut found = Found {
        name: String::new(),
        index: message.header.index,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        mac: MacAddress([0; 6]),
        controller: 0,
        hairpin: false,
        kind: LinkKind::Other(String::new()),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => found.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => found.mtu = *mtu,
            LinkAttribute::Address(bytes) => found.mac = mac(bytes).unwrap_or(found.mac),
            LinkAttribute::Controller(index) => found.controller = *index,
            LinkAttribute::LinkInfo(infos) => infos.iter().for_each(|info| read_info(info, &mut found)),
            _ => {}
        }
    }
    found
}

fn read_info(info: &LinkInfo, found: &mut Found) {
    match info {
        LinkInfo::Kind(InfoKind::Bridge) => found.kind = LinkKind::Bridge,
        LinkInfo::Kind(InfoKind::Tun) => found.kind = LinkKind::Tun,
        LinkInfo::Kind(InfoKind::Vxlan) => {}
        LinkInfo::Kind(kind) => found.kind = LinkKind::Other(kind.to_string()),
        LinkInfo::Data(InfoData::Vxlan(attributes)) => found.kind = LinkKind::Vxlan(read_vxlan(attributes)),
        LinkInfo::PortData(InfoPortData::BridgePort(ports)) => {
            found.hairpin = ports.iter().any(|port| matches!(port, InfoBridgePort::HairpinMode(true)));
        }
        _ => {}
    }
}

fn read_vxlan(attributes: &[InfoVxlan]) -> Vxlan {
    let mut vxlan = Vxlan { vni: 0, port: 0, local: IpAddr::from([0; 4]), underlay: 0, learning: false };
    for attribute in attributes {
        match attribute {
            InfoVxlan::Id(vni) => vxlan.vni = *vni,
            InfoVxlan::Port(port) => vxlan.port = *port,
            InfoVxlan::Local(address) => vxlan.local = (*address).into(),
            InfoVxlan::Local6(address) => vxlan.local = (*address).into(),
            InfoVxlan::Link(index) => vxlan.underlay = *index,
            InfoVxlan::Learning(learning) => vxlan.learning = *learning,
            _ => {}
        }
    }
    vxlan
}

fn mac(bytes: &[u8]) -> Option<MacAddress> {
    bytes.try_into().ok().map(MacAddress)
}

/// Sorts the dumped devices into weft's own and the host ends of pods.
pub(super) fn read_links(links: &[Found], actual: &mut Actual) {
    let bridge = links.iter().find(|link| link.name == BRIDGE).map(|link| link.index);
    for link in links {
        if is_ours(&link.name) {
            let Found { kind, mtu, up, mac, .. } = link;
            let state = Link { kind: kind.clone(), mtu: *mtu, up: *up, mac: *mac };
            actual.state.links.insert(link.name.clone(), state);
        } else if is_host_veth(&link.name) {
            let state = VethState {
                bridged: bridge == Some(link.controller),
                hairpin: link.hairpin,
                up: link.up,
                mtu: link.mtu,
            };
            actual.veths.insert(link.name.clone(), state);
        }
    }
}

fn name_of(links: &[Found], index: u32) -> Option<&str> {
    links.iter().find(|link| link.index == index).map(|link| link.name.as_str())
}

/// Dumps all addresses with the index of their device.
pub(super) fn addresses(conn: &mut Conn) -> Result<Vec<(u32, IpNet)>, Refusal> {
    let found = conn.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    Ok(found
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewAddress(address) => read_address(&address),
            _ => None,
        })
        .collect())
}

pub(super) fn read_address(message: &AddressMessage) -> Option<(u32, IpNet)> {
    let pick = |local: bool| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(address) if local => Some(*address),
            AddressAttribute::Address(address) if !local => Some(*address),
            _ => None,
        })
    };
    // On a point-to-point device ADDRESS is the other end; LOCAL, where there is one, is the device's own.
    let address = pick(true).or_else(|| pick(false))?;
    IpNet::new(address, message.header.prefix_len).ok().map(|net| (message.header.index, net))
}

pub(super) fn read_addresses(conn: &mut Conn, links: &[Found], state: &mut State) -> Result<(), Refusal> {
    for (index, address) in addresses(conn)? {
        let link_local = matches!(address.addr(), IpAddr::V6(address) if address.is_unicast_link_local());
        // The tunnels' link-local addresses are the kernel's own.
        if let Some(name) =
            name_of(links, index).filter(|name| is_ours(name) && (*name == BRIDGE || !link_local))
        {
            state.addresses.insert((name.to_owned(), address));
        }
    }
    Ok(())
}

/// Reads the permanent neighbours and forwarding entries of weft's devices.
pub(super) fn read_neighbours(conn: &mut Conn, links: &[Found], state: &mut State) -> Result<(), Refusal> {
    for kind in [AddressFamily::Unspec, AddressFamily::Bridge] {
        let mut request = NeighbourMessage::default();
        request.header.family = kind;
        for message in conn.dump(RouteNetlinkMessage::GetNeighbour(request))? {
            let RouteNetlinkMessage::NewNeighbour(entry) = message else { continue };
            let Some(name) = name_of(links, entry.header.ifindex).filter(|name| is_ours(name)) else {
                continue;
            };
            if entry.header.state != NeighbourState::Permanent && kind == AddressFamily::Unspec {
                continue;
            }
            read_neighbour(&entry, name, state);
        }
    }
    Ok(())
}

pub(super) fn read_neighbour(entry: &NeighbourMessage, name: &str, state: &mut State) {
    let address = entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(IpAddr::from(*address)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(IpAddr::from(*address)),
        // The family of a forwarding entry is the bridge's, so only the length tells the family of its endpoint.
        NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => endpoint(bytes),
        _ => None,
    });
    let lladdr = entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => mac(bytes),
        _ => None,
    });
    let (Some(address), Some(lladdr)) = (address, lladdr) else { return };
    if entry.header.family == AddressFamily::Bridge {
        if name != BRIDGE {
            state.fdb.insert((name.to_owned(), lladdr), address);
        }
    } else {
        state.neighbours.insert((name.to_owned(), address), lladdr);
    }
}

fn endpoint(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// Reads how long ago each permanent forwarding entry with an endpoint was used (`struct nda_cacheinfo`, linux/neighbour.h).
pub(super) fn idle_endpoints(conn: &mut Conn) -> Result<BTreeMap<IpAddr, Duration>, Refusal> {
    let mut request = NeighbourMessage::default();
    request.header.family = AddressFamily::Bridge;
    let mut idle: BTreeMap<IpAddr, Duration> = BTreeMap::new();
    for message in conn.dump(RouteNetlinkMessage::GetNeighbour(request))? {
        let RouteNetlinkMessage::NewNeighbour(entry) = message else { continue };
        let found = entry.attributes.iter().fold((None, None), |(to, used), attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                (Some(IpAddr::from(*address)), used)
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                (Some(IpAddr::from(*address)), used)
            }
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => (endpoint(bytes), used),
            NeighbourAttribute::CacheInfo(info) => (to, Some(info.used)),
            _ => (to, used),
        });
        if let (Some(to), Some(used)) = found {
            // In hundredths of a second, whatever the kernel's own clock is (USER_HZ).
            let used = Duration::from_millis(u64::from(used) * 10);
            idle.entry(to).and_modify(|known| *known = used.min(*known)).or_insert(used);
        }
    }
    Ok(idle)
}

fn route_query(v4: bool) -> RouteNetlinkMessage {
    let mut request = RouteMessage::default();
    request.header.address_family = family(v4);
    RouteNetlinkMessage::GetRoute(request)
}

/// Reads the routes with weft's protocol number.
pub(super) fn read_routes(conn: &mut Conn, links: &[Found], state: &mut State) -> Result<(), Refusal> {
    for v4 in [true, false] {
        for message in conn.dump(route_query(v4))? {
            let RouteNetlinkMessage::NewRoute(route) = message else { continue };
            let main = route.header.table == RouteHeader::RT_TABLE_MAIN;
            // Of any type: a blackhole with weft's protocol number is weft's to remove.
            if !main || u8::from(route.header.protocol) != PROTOCOL {
                continue;
            }
            if let Some((key, route)) = read_route(&route, links, v4) {
                state.routes.insert(key, route);
            }
        }
    }
    Ok(())
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

pub(super) fn read_route(message: &RouteMessage, links: &[Found], v4: bool) -> Option<((IpNet, u32), Route)> {
    let unspecified = if v4 { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
    let mut destination = unspecified;
    let mut metric = 0;
    let mut route = Route { dev: String::new(), via: None, source: None, mtu: None };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address)?,
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Gateway(address) => route.via = ip(address),
            RouteAttribute::PrefSource(address) => route.source = ip(address),
            RouteAttribute::Oif(index) => route.dev = name_of(links, *index)?.to_owned(),
            RouteAttribute::Metrics(metrics) => route.mtu = read_mtu(metrics, v4),
            _ => {}
        }
    }
    let prefix = IpNet::new(destination, message.header.destination_prefix_length).ok()?;
    Some(((prefix, metric), route))
}

/// An IPv6 route's MTU binds packets that are forwarded only where it is locked (`ip6_dst_mtu_maybe_forward`,
/// include/net/ip6_route.h); one that is not reads as 0, which no plan wants.
fn read_mtu(metrics: &[RouteMetric], v4: bool) -> Option<u32> {
    let locked =
        metrics.iter().any(|metric| matches!(metric, RouteMetric::Lock(set) if set & LOCKED_MTU != 0));
    metrics.iter().find_map(|metric| match metric {
        RouteMetric::Mtu(mtu) => Some(if v4 || locked { *mtu } else { 0 }),
        _ => None,
    })
}

/// Returns the unicast routes that are not weft's, with their device; default routes and link-local ones left out.
pub(super) fn foreign_routes(conn: &mut Conn) -> Result<Vec<(u32, IpNet)>, Refusal> {
    let mut found = Vec::new();
    for v4 in [true, false] {
        for message in conn.dump(route_query(v4))? {
            let RouteNetlinkMessage::NewRoute(route) = message else { continue };
            let header = &route.header;
            if u8::from(header.protocol) == PROTOCOL
                || header.kind != RouteType::Unicast
                || header.destination_prefix_length == 0
            {
                continue;
            }
            let device = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            });
            let destination = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Destination(address) => ip(address),
                _ => None,
            });
            let prefix = destination.and_then(|to| IpNet::new(to, header.destination_prefix_length).ok());
            let link_local = matches!(destination, Some(IpAddr::V6(to)) if to.is_unicast_link_local());
            found.extend(device.zip(prefix).filter(|_| !link_local));
        }
    }
    Ok(found)
}

/// Returns the device of the default route with the least metric, IPv4 first.
pub(super) fn default_device(conn: &mut Conn) -> Result<Option<u32>, Refusal> {
    for v4 in [true, false] {
        let mut best: Option<(u32, u32)> = None;
        for message in conn.dump(route_query(v4))? {
            let RouteNetlinkMessage::NewRoute(route) = message else { continue };
            let main = route.header.table == RouteHeader::RT_TABLE_MAIN;
            if route.header.destination_prefix_length != 0 || route.header.kind != RouteType::Unicast || !main
            {
                continue;
            }
            let mut metric = 0;
            let mut device = None;
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Priority(priority) => metric = *priority,
                    RouteAttribute::Oif(index) => device = Some(*index),
                    _ => {}
                }
            }
            if let Some(device) = device.filter(|_| best.is_none_or(|(least, _)| metric < least)) {
                best = Some((metric, device));
            }
        }
        if let Some((_, device)) = best {
            return Ok(Some(device));
        }
    }
    Ok(None)
}

/// Returns whether a refusal means that the change was not needed.
pub(super) fn tolerated(op: &Op, errno: Errno) -> bool {
    match op {
        Op::DelLink(_) | Op::DelVeth(_) => errno == Errno::ENODEV,
        Op::DelRoute(..) => matches!(errno, Errno::ESRCH | Errno::ENODEV),
        Op::DelNeighbour(..) | Op::DelFdb(..) => matches!(errno, Errno::ENOENT | Errno::ENODEV),
        Op::DelAddress(..) => matches!(errno, Errno::EADDRNOTAVAIL | Errno::ENODEV),
        Op::AddAddress(..) => errno == Errno::EEXIST,
        // A pod that goes away in this very moment takes its device along.
        Op::SetVeth(..) => errno == Errno::ENODEV,
        _ => false,
    }
}

/// What a change needs to know of the kernel beside itself: devices' indices, and weft's devices as they are.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub index: BTreeMap<String, u32>,
    pub links: BTreeMap<String, Link>,
}

/// Writes an operation as messages with their flags; `None` where its device is not there.
pub(super) fn encode(op: &Op, known: &Known) -> Option<Vec<(RouteNetlinkMessage, u16)>> {
    let set = NLM_F_CREATE | NLM_F_REPLACE;
    let of = |name: &String| known.index.get(name).copied();
    Some(vec![match op {
        Op::AddLink(name, link) => {
            (RouteNetlinkMessage::NewLink(new_link(name, link)), NLM_F_CREATE | NLM_F_EXCL)
        }
        Op::SetLink(name, link) => {
            let mut message = LinkMessage::default();
            message.header.index = of(name)?;
            shape(&mut message, link, known.links.get(name));
            (RouteNetlinkMessage::SetLink(message), 0)
        }
        Op::DelLink(name) | Op::DelVeth(name) => {
            let mut message = LinkMessage::default();
            message.header.index = of(name)?;
            (RouteNetlinkMessage::DelLink(message), 0)
        }
        Op::AddAddress(dev, net) => (RouteNetlinkMessage::NewAddress(address(of(dev)?, *net)), NLM_F_CREATE),
        Op::DelAddress(dev, net) => (RouteNetlinkMessage::DelAddress(address(of(dev)?, *net)), 0),
        Op::SetNeighbour(dev, to, mac) => {
            (RouteNetlinkMessage::NewNeighbour(neighbour(of(dev)?, *to, *mac)), set)
        }
        Op::DelNeighbour(dev, to) => {
            (RouteNetlinkMessage::DelNeighbour(neighbour(of(dev)?, *to, MacAddress([0; 6]))), 0)
        }
        Op::SetFdb(dev, mac, to) => (RouteNetlinkMessage::NewNeighbour(forward(of(dev)?, *mac, *to)), set),
        Op::DelFdb(dev, mac, to) => (RouteNetlinkMessage::DelNeighbour(forward(of(dev)?, *mac, *to)), 0),
        Op::SetRoute(prefix, metric, way) => {
            (RouteNetlinkMessage::NewRoute(route(*prefix, *metric, way, of(&way.dev)?)), set)
        }
        Op::DelRoute(prefix, metric, way) => {
            // A blackhole has no device, and an index of 0 stands for any.
            let index = if way.dev.is_empty() { 0 } else { of(&way.dev)? };
            let mut message = route(*prefix, *metric, way, index);
            // Any scope and type: others than weft makes are to go as well.
            message.header.scope = RouteScope::NoWhere;
            message.header.kind = RouteType::Unspec;
            (RouteNetlinkMessage::DelRoute(message), 0)
        }
        Op::SetVeth(name, state) => {
            let mut message = LinkMessage::default();
            message.header.index = of(name)?;
            message.header.flags = LinkFlags::Up;
            message.header.change_mask = LinkFlags::Up;
            message.attributes = vec![
                LinkAttribute::Mtu(state.mtu),
                LinkAttribute::Controller(known.index.get(BRIDGE).copied()?),
            ];
            // The port's own settings are taken only from a message that finds it a port (rtnl_newlink).
            let port = InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(state.hairpin)]);
            let mut second = LinkMessage::default();
            second.header.index = message.header.index;
            second.attributes = vec![LinkAttribute::LinkInfo(vec![
                LinkInfo::PortKind(InfoPortKind::Bridge),
                LinkInfo::PortData(port),
            ])];
            return Some(vec![
                (RouteNetlinkMessage::SetLink(message), 0),
                (RouteNetlinkMessage::NewLink(second), 0),
            ]);
        }
        Op::SetOffload(..)
        | Op::SetSysctl(..)
        | Op::SetNft(_)
        | Op::DelNft
        | Op::SetTunnel(..)
        | Op::DelTunnel(_) => return None,
    }])
}

/// Writes what differs from what is there. An address that is only repeated would already make the kernel
/// forget all neighbours of the device, permanent ones too (`neigh_changeaddr`).
fn shape(message: &mut LinkMessage, link: &Link, found: Option<&Link>) {
    if link.up {
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
    }
    if found.is_none_or(|found| found.mtu != link.mtu) {
        message.attributes.push(LinkAttribute::Mtu(link.mtu));
    }
    // What carries IP packets has no address to set.
    if link.kind != LinkKind::Tun && found.is_none_or(|found| found.mac != link.mac) {
        message.attributes.push(LinkAttribute::Address(link.mac.0.to_vec()));
    }
}

fn new_link(name: &str, link: &Link) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.into()));
    shape(&mut message, link, None);
    let infos = match &link.kind {
        LinkKind::Bridge | LinkKind::Other(_) => vec![LinkInfo::Kind(InfoKind::Bridge)],
        // That of user space is made by /dev/net/tun, and never by these messages.
        LinkKind::Tun => vec![LinkInfo::Kind(InfoKind::Wireguard)],
        LinkKind::Vxlan(vxlan) => {
            let local = match vxlan.local {
                IpAddr::V4(address) => InfoVxlan::Local(address),
                IpAddr::V6(address) => InfoVxlan::Local6(address),
            };
            let mut attributes = vec![
                InfoVxlan::Id(vxlan.vni),
                local,
                InfoVxlan::Link(vxlan.underlay),
                InfoVxlan::Port(vxlan.port),
                InfoVxlan::Learning(vxlan.learning),
            ];
            if vxlan.local.is_ipv6() {
                // RFC 6935: tunnels over IPv6 need their checksum, as the inner packet is not protected end to end.
                attributes.push(InfoVxlan::UDPZeroCsumTX(false));
            }
            vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(attributes))]
        }
    };
    message.attributes.push(LinkAttribute::LinkInfo(infos));
    message
}

fn address(index: u32, net: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(net.addr().is_ipv4());
    message.header.prefix_len = net.prefix_len();
    message.header.index = index;
    if net.addr().is_ipv6() {
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    message.attributes = vec![AddressAttribute::Local(net.addr()), AddressAttribute::Address(net.addr())];
    if let IpNet::V4(net) = net {
        message.attributes.push(AddressAttribute::Broadcast(net.broadcast()));
    }
    message
}

fn destination(address: IpAddr) -> NeighbourAttribute {
    NeighbourAttribute::Destination(match address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    })
}

fn neighbour(index: u32, to: IpAddr, mac: MacAddress) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(to.is_ipv4());
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![destination(to), NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())];
    message
}

fn forward(index: u32, mac: MacAddress, to: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message.attributes = vec![NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()), destination(to)];
    message
}

fn route(prefix: IpNet, metric: u32, way: &Route, index: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(prefix.addr().is_ipv4());
    message.header.destination_prefix_length = prefix.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::from(PROTOCOL);
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![
        RouteAttribute::Destination(prefix.addr().into()),
        RouteAttribute::Oif(index),
        RouteAttribute::Priority(metric),
    ];
    if let Some(via) = way.via {
        message.header.flags = RouteFlags::Onlink;
        message.attributes.push(RouteAttribute::Gateway(via.into()));
    }
    message.attributes.extend(way.source.map(|source| RouteAttribute::PrefSource(source.into())));
    if let Some(mtu) = way.mtu {
        let lock = prefix.addr().is_ipv6().then_some(RouteMetric::Lock(LOCKED_MTU));
        message
            .attributes
            .push(RouteAttribute::Metrics(lock.into_iter().chain([RouteMetric::Mtu(mtu)]).collect()));
    }
    message
}
