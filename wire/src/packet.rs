//! IP packets as the user-space tunnels see them: who they are from and for, and super-packets taken apart and put
//! together (linux/virtio_net.h, Documentation/networking/segmentation-offloads.rst).
//!
//! Not a parser for people: nothing here is kept or shown. Any bytes are legal input. Invariant: what is taken apart has
//! right lengths and checksums, and what is put together is what taking it apart gives back.

mod checksum;
mod coalesce;
mod segment;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub use coalesce::Coalescer;
pub use segment::{BadPacket, VnetHeader, split};

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const IPV4_HEADER: usize = 20;
pub(crate) const IPV6_HEADER: usize = 40;

/// Returns 4 or 6 for a packet that has the whole of the fixed header.
pub fn version(packet: &[u8]) -> Option<u8> {
    match packet.first()? >> 4 {
        4 if packet.len() >= IPV4_HEADER => Some(4),
        6 if packet.len() >= IPV6_HEADER => Some(6),
        _ => None,
    }
}

/// Returns where a packet says it is from.
pub fn source(packet: &[u8]) -> Option<IpAddr> {
    address(packet, 12, 8)
}

/// Returns where a packet is to go.
pub fn destination(packet: &[u8]) -> Option<IpAddr> {
    address(packet, 16, 24)
}

fn address(packet: &[u8], v4: usize, v6: usize) -> Option<IpAddr> {
    Some(match version(packet)? {
        4 => Ipv4Addr::from(packet[v4..].first_chunk::<4>().copied()?).into(),
        _ => Ipv6Addr::from(packet[v6..].first_chunk::<16>().copied()?).into(),
    })
}

/// Returns how long the packet is by its own word; nothing where there is less of it, or where it says less than its
/// header takes.
pub fn total_len(packet: &[u8]) -> Option<usize> {
    let (least, length) = match version(packet)? {
        4 => (IPV4_HEADER, usize::from(u16_at(packet, 2)?)),
        _ => (IPV6_HEADER, IPV6_HEADER + usize::from(u16_at(packet, 4)?)),
    };
    (least..=packet.len()).contains(&length).then_some(length)
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk::<2>().map(|bytes| u16::from_be_bytes(*bytes))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes))
}

/// Writes a field; the caller has made sure that it is there.
pub(crate) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

#[cfg(test)]
mod tests;
