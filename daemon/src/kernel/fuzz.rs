//! What `tests/fuzz` needs of the kernel's readers and no daemon does: bytes in place of a socket.
//!
//! Built with `--cfg fuzzing` alone.

use ipnet::IpNet;
use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use weft_wire::types::MacAddress;

use super::nft::foreign::{accepts, passes};
use super::nft::{
    GET_ELEMENTS, INET, NEW_RULE, SUBSYSTEM, attr_comment, digest_of, generic, object, replacement,
};
use super::rtnl::{self, Found, Known};
use super::tlv::{self, Writer, find, find_text};
use super::{monitor, netlink};
use crate::plan::model::{Actual, BRIDGE, Link, LinkKind, Op, VXLAN_V4, VXLAN_V6};
use crate::plan::table::Table;

pub use super::wireguard::fuzz::{wireguard_device, wireguard_reads_back};

/// The devices that are there beside those of the input, by index from 1.
const DEVICES: [&str; 3] = [BRIDGE, VXLAN_V4, VXLAN_V6];

fn known() -> Known {
    let index = (1..).zip(DEVICES).map(|(index, name)| (name.to_owned(), index)).collect();
    Known { index, ..Known::default() }
}

fn devices() -> impl Iterator<Item = Found> {
    (1..).zip(DEVICES).filter_map(|(index, name)| {
        let link = Link { kind: LinkKind::Bridge, mtu: 1500, up: true, mac: MacAddress([2; 6]) };
        let written = rtnl::encode(&Op::AddLink(name.to_owned(), link), &known())?.pop()?;
        let RouteNetlinkMessage::NewLink(mut message) = written.0 else { return None };
        message.header.index = index;
        Some(rtnl::read_link(&message))
    })
}

/// Reads a datagram of the route family: whatever it says is there, is to change or is gone.
pub fn route(datagram: &[u8]) -> Actual {
    let mut actual = Actual::default();
    let mut messages = Vec::new();
    for answer in netlink::answers(datagram) {
        match answer.payload {
            NetlinkPayload::InnerMessage(message) => messages.push(message),
            NetlinkPayload::Error(error) => drop(netlink::words(&error.header)),
            _ => {}
        }
    }
    let mut links: Vec<Found> = messages
        .iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::SetLink(link) => {
                Some(rtnl::read_link(link))
            }
            _ => None,
        })
        .collect();
    rtnl::read_links(&links, &mut actual);
    links.extend(devices());
    let name = |index: u32| links.iter().find(|link| link.index == index).map(|link| link.name.clone());
    let state = &mut actual.state;
    for message in &messages {
        match message {
            RouteNetlinkMessage::NewAddress(entry) | RouteNetlinkMessage::DelAddress(entry) => {
                let read = rtnl::read_address(entry);
                state.addresses.extend(read.and_then(|(index, net)| Some((name(index)?, net))));
            }
            RouteNetlinkMessage::NewNeighbour(entry) | RouteNetlinkMessage::DelNeighbour(entry) => {
                let name = name(entry.header.ifindex).unwrap_or_default();
                rtnl::read_neighbour(entry, &name, state);
            }
            RouteNetlinkMessage::NewRoute(entry) | RouteNetlinkMessage::DelRoute(entry) => {
                let v4 = entry.header.address_family == AddressFamily::Inet;
                state.routes.extend(rtnl::read_route(entry, &links, v4));
            }
            _ => {}
        }
    }
    actual
}

/// Writes a change as it is sent, for [`route`] to read; nothing where its device is not there.
pub fn written(op: &Op) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (message, flags) in rtnl::encode(op, &known()).unwrap_or_default() {
        netlink::write(message, flags, 1, &mut bytes);
    }
    bytes
}

/// Reads a datagram as the answers to everything that [`dump`](super::nft::dump) and [`foreign_drops`](super::nft::foreign_drops) ask.
pub fn nft(datagram: &[u8]) -> Option<String> {
    let mut messages = Vec::new();
    let _ = tlv::take(datagram, 0, u32::MAX, &mut messages);
    let objects: Vec<_> = messages.iter().filter_map(|(kind, body)| Some((*kind, object(body)?))).collect();
    let cluster: [IpNet; 2] = [
        "10.32.0.0/12".parse().expect("a constant prefix"),
        "fd00:32::/48".parse().expect("a constant prefix"),
    ];
    for (kind, (family, body)) in &objects {
        if *kind == (SUBSYSTEM << 8) | NEW_RULE {
            passes(accepts(find(body, 4).unwrap_or_default()).as_slice(), *family, BRIDGE, &cluster);
        }
        tlv::attrs(body).for_each(|(_, value)| drop(attr_comment(value)));
    }
    digest_of(|kind, fill| {
        let mut filter = Writer::default();
        fill(&mut filter);
        // The answer to GET_X is NEW_X, the number before; elements are asked for by their set.
        let asked = objects.iter().filter(|(of, (_, body))| {
            *of == (SUBSYSTEM << 8) | (kind - 1)
                && (kind != GET_ELEMENTS || find_text(body, 2) == find_text(&filter.bytes, 2))
        });
        Ok(asked.map(|(_, object)| object.clone()).collect())
    })
    .expect("nothing was asked of a kernel")
}

/// Writes the table as it is sent, for [`nft`] to read as if the kernel gave it back.
pub fn table(table: &Table) -> Vec<u8> {
    let mut bytes = Writer::default();
    // First of all the table that may be there is removed.
    for (kind, flags, attributes) in replacement(table).messages.iter().skip(2) {
        bytes.message((SUBSYSTEM << 8) | kind, *flags, 1, &generic(INET, 0), |writer| {
            writer.bytes.extend_from_slice(&attributes.bytes);
        });
    }
    bytes.bytes
}

/// Tells whether the datagram is news.
pub fn matters(datagram: &[u8]) -> bool {
    monitor::matters(datagram)
}

/// Returns the attributes in `bytes`: kind without flags, and value.
pub fn attrs(bytes: &[u8]) -> Vec<(u16, &[u8])> {
    tlv::attrs(bytes).collect()
}
