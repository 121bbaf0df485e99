//! CHECK: is the attachment still as ADD made it?
//!
//! Reads only. The first thing that is wrong is reported, in the order in which a packet would meet it:
//! pod's end, address, route, neighbour, host's end, bridge.

use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};
use weft_wire::cni::{CniError, CniResult, Code, Interface};
use weft_wire::types::MacAddress;

use super::netns;
use super::rtnl::Conn;
use super::veth::{Link, any, family, link};
use super::{CheckPlan, PodAddress};

pub(super) fn check(plan: &CheckPlan) -> Result<(), CniError> {
    let (attachment, pod) = (&plan.attachment, &plan.request.pod);
    let netns = netns::open(&pod.netns)?;
    if netns.id != attachment.netns_id {
        return Err(wrong(format!(
            "{} is attached in another network namespace than {}",
            attachment.id,
            pod.netns.display()
        )));
    }
    let expected = expected(plan)?;
    let mut host = Conn::open()?;
    let bridge = link(&mut host, &plan.network.bridge)?
        .ok_or_else(|| wrong(format!("the bridge {} does not exist", plan.network.bridge)))?;
    let inner = netns.run(|| check_pod(plan, &expected, bridge.mac))?;
    check_host(plan, &mut host, &bridge, &inner)
}

/// What the runtime believes about the pod's end, after the later plugins of the chain.
struct Expected {
    mac: String,
    mtu: u32,
    addresses: Vec<ipnet::IpNet>,
}

fn expected(plan: &CheckPlan) -> Result<Expected, CniError> {
    let (attachment, previous) = (&plan.attachment, &plan.request.previous);
    let ifname = attachment.id.ifname();
    let sandbox = plan.request.pod.netns.to_string_lossy();
    let (index, interface) = find(previous, ifname, &sandbox).ok_or_else(|| {
        wrong(format!(
            "prevResult has no interface {ifname} in {sandbox}; it is not the result of this attachment"
        ))
    })?;
    let addresses: Vec<_> =
        previous.ips.iter().filter(|ip| ip.interface == Some(index)).map(|ip| ip.address).collect();
    if let Some(missing) = attachment.addresses.iter().find(|pod| !addresses.contains(&pod.address)) {
        return Err(wrong(format!(
            "prevResult does not name {}, the address that {} holds; it is not the result of this attachment",
            missing.address, attachment.id
        )));
    }
    // From 1.1.0 on a later plugin (tuning) reports the MTU that it set.
    let mtu = interface.mtu.unwrap_or(attachment.mtu);
    let mac =
        if interface.mac.is_empty() { attachment.mac.to_string() } else { interface.mac.to_lowercase() };
    Ok(Expected { mac, mtu, addresses })
}

fn find<'a>(result: &'a CniResult, name: &str, sandbox: &str) -> Option<(usize, &'a Interface)> {
    result
        .interfaces
        .iter()
        .enumerate()
        .find(|(_, interface)| interface.name == name && interface.sandbox.as_deref() == Some(sandbox))
}

fn check_pod(
    plan: &CheckPlan,
    expected: &Expected,
    bridge_mac: Option<MacAddress>,
) -> Result<Link, CniError> {
    let ifname = plan.attachment.id.ifname();
    let mut conn = Conn::open()?;
    let pod = link(&mut conn, ifname)?.ok_or_else(|| {
        wrong(format!("the container has no interface {ifname}; delete the pod, so that it is made anew"))
    })?;
    if !pod.veth {
        return Err(wrong(format!("the container's interface {ifname} is no end of a veth pair")));
    }
    if !pod.up {
        return Err(wrong(format!("the container's interface {ifname} is down")));
    }
    if pod.mtu != expected.mtu {
        return Err(wrong(format!(
            "the container's interface {ifname} has MTU {} and not {}",
            pod.mtu, expected.mtu
        )));
    }
    let mac = pod.mac.map(|mac| mac.to_string()).unwrap_or_default();
    if mac != expected.mac {
        return Err(wrong(format!(
            "the container's interface {ifname} has address {mac} and not {}",
            expected.mac
        )));
    }
    let held = addresses(&mut conn, pod.index)?;
    if let Some(missing) = expected.addresses.iter().find(|address| !held.contains(address)) {
        return Err(wrong(format!("the container's interface {ifname} does not hold {missing}")));
    }
    for address in &plan.attachment.addresses {
        check_route(&mut conn, address, &pod)?;
        check_neighbour(&mut conn, address.gateway, pod.index, bridge_mac, "the container", "its gateway")?;
    }
    Ok(pod)
}

fn check_host(plan: &CheckPlan, host: &mut Conn, bridge: &Link, pod: &Link) -> Result<(), CniError> {
    let name = plan.attachment.host_ifname();
    let port = link(host, &name)?.ok_or_else(|| wrong(format!("the host has no interface {name}")))?;
    if port.peer != Some(pod.index) || pod.peer != Some(port.index) {
        return Err(wrong(format!("the host's interface {name} is not the other end of the container's")));
    }
    if port.master != Some(bridge.index) {
        return Err(wrong(format!(
            "the host's interface {name} is not on the bridge {}",
            plan.network.bridge
        )));
    }
    if !port.up {
        return Err(wrong(format!("the host's interface {name} is down")));
    }
    if port.mtu != plan.attachment.mtu {
        return Err(wrong(format!(
            "the host's interface {name} has MTU {} and not {}",
            port.mtu, plan.attachment.mtu
        )));
    }
    if port.hairpin != Some(plan.network.hairpin) {
        let is = if plan.network.hairpin { "off and should be on" } else { "on and should be off" };
        return Err(wrong(format!("the hairpin mode of the bridge port {name} is {is}")));
    }
    if !bridge.up {
        return Err(wrong(format!("the bridge {} is down", plan.network.bridge)));
    }
    let held = addresses(host, bridge.index)?;
    for address in &plan.attachment.addresses {
        if !held.iter().any(|net| net.addr() == address.gateway) {
            return Err(wrong(format!(
                "the bridge {} does not hold {}, the container's gateway",
                plan.network.bridge, address.gateway
            )));
        }
        check_neighbour(host, address.address.addr(), bridge.index, pod.mac, "the host", "the pod")?;
    }
    Ok(())
}

fn addresses(conn: &mut Conn, index: u32) -> Result<Vec<ipnet::IpNet>, CniError> {
    let mut held = Vec::new();
    for message in conn.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))? {
        let RouteNetlinkMessage::NewAddress(message) = message else { continue };
        if message.header.index != index {
            continue;
        }
        // For IPv4 the local address is in its own attribute; IPv6 has only the other one.
        let local = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        });
        let address = local.or_else(|| {
            message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            })
        });
        held.extend(address.and_then(|address| ipnet::IpNet::new(address, message.header.prefix_len).ok()));
    }
    Ok(held)
}

fn check_route(conn: &mut Conn, pod: &PodAddress, link: &Link) -> Result<(), CniError> {
    let mut query = RouteMessage::default();
    query.header.address_family = family(pod.gateway);
    let mut elsewhere = false;
    for message in conn.dump(RouteNetlinkMessage::GetRoute(query))? {
        let RouteNetlinkMessage::NewRoute(route) = message else { continue };
        let is_default = route.header.destination_prefix_length == 0
            && route.header.table == RouteHeader::RT_TABLE_MAIN
            && route.header.kind == RouteType::Unicast
            && route.header.address_family == family(pod.gateway);
        if !is_default {
            continue;
        }
        let gateway = RouteAddress::from(pod.gateway);
        let via =
            route.attributes.iter().any(|a| matches!(a, RouteAttribute::Gateway(via) if *via == gateway));
        let here =
            route.attributes.iter().any(|a| matches!(a, RouteAttribute::Oif(index) if *index == link.index));
        if via && here {
            return Ok(());
        }
        // Another attachment of the container came first and has the default route.
        elsewhere |= !here;
    }
    if elsewhere {
        return Ok(());
    }
    Err(wrong(format!(
        "the container has no route {} via {} on {}",
        any(pod.gateway),
        pod.gateway,
        link.name
    )))
}

/// A neighbour that is not known yet is fine: the kernel asks. One that is wrong or does not answer is not.
fn check_neighbour(
    conn: &mut Conn,
    address: IpAddr,
    index: u32,
    mac: Option<MacAddress>,
    who: &str,
    whom: &str,
) -> Result<(), CniError> {
    let mut query = NeighbourMessage::default();
    query.header.family = family(address);
    query.header.ifindex = index;
    query.attributes = vec![NeighbourAttribute::Destination(match address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    })];
    let Some(RouteNetlinkMessage::NewNeighbour(found)) =
        conn.get(RouteNetlinkMessage::GetNeighbour(query))?
    else {
        return Ok(());
    };
    if found.header.state == NeighbourState::Failed {
        return Err(wrong(format!("{whom} at {address} does not answer {who}'s neighbour requests")));
    }
    let known = found.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(known) => {
            <[u8; 6]>::try_from(known.as_slice()).ok().map(MacAddress)
        }
        _ => None,
    });
    match (known, mac) {
        (Some(known), Some(mac)) if known != mac && found.header.state != NeighbourState::Incomplete => {
            Err(wrong(format!("{who} believes that {whom} at {address} is {known}, and it is {mac}")))
        }
        _ => Ok(()),
    }
}

fn wrong(message: String) -> CniError {
    CniError::new(Code::CheckFailed, message)
}
