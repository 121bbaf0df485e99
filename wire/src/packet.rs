//! IP packets on their way through a TUN device with offloads: what they say of themselves, super-packets
//! split into packets for the wire ([`split`]), and packets gathered into super-packets ([`Coalescer`]).
//!
//! The data path of the user-space tunnel stands on it: the device is opened with `IFF_VNET_HDR` and with
//! TSO and USO on, so that one read or write moves up to 64 KiB. It is no firewall and no TCP: it keeps no
//! state beyond one super-packet, and what it does not understand it passes on as it is. It reads and
//! writes nothing itself.
//!
//! Invariants: any bytes are legal input, and none panics, loops without end or allocates by its own word;
//! no packet overtakes another; a packet that was gathered and split again is the same, byte for byte, but
//! for the IPv4 identification of packets with DF ([`Coalescer`] says why).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub use coalesce::Coalescer;
pub use segment::{BadPacket, VnetHeader, split};

mod checksum;
mod coalesce;
mod segment;
#[cfg(test)]
mod tests;

/// Returns the IP version, 4 or 6, of a packet that holds at least the fixed header (20 or 40 bytes).
///
/// Source: RFC 791 §3.1, RFC 8200 §3.
pub fn version(packet: &[u8]) -> Option<u8> {
    match packet.first()? >> 4 {
        4 if packet.len() >= IPV4_HEADER => Some(4),
        6 if packet.len() >= IPV6_HEADER => Some(6),
        _ => None,
    }
}

/// Returns the destination address, where [`version`] is known. Routing headers are not followed.
pub fn destination(packet: &[u8]) -> Option<IpAddr> {
    match version(packet)? {
        4 => ipv4_at(packet, 16),
        _ => ipv6_at(packet, 24),
    }
}

/// Returns the length in bytes that the IP header gives the packet: IPv4's total length, or 40 and IPv6's
/// payload length. What lies beyond it is padding of the tunnel.
///
/// `None` where [`version`] is unknown, where the length is more than `packet` holds, or where it does not
/// cover the header (for IPv4 with its options). A jumbogram (RFC 2675) counts as its header alone.
pub fn total_len(packet: &[u8]) -> Option<usize> {
    let (length, header) = match version(packet)? {
        4 => (usize::from(word(packet, 2)), ipv4_header_len(packet)?),
        _ => (IPV6_HEADER + usize::from(word(packet, 4)), IPV6_HEADER),
    };
    (header..=packet.len()).contains(&length).then_some(length)
}

/// The bytes of an IPv4 header without options.
const IPV4_HEADER: usize = 20;
/// The bytes of an IPv6 header.
const IPV6_HEADER: usize = 40;
/// The bytes of a TCP header without options.
const TCP_HEADER: usize = 20;
/// The bytes of a UDP header.
const UDP_HEADER: usize = 8;

/// DF of IPv4's flags and fragment offset, as one word.
const DONT_FRAGMENT: u16 = 0x4000;
/// Where the flags are in a TCP header.
const TCP_FLAGS_AT: usize = 13;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const CWR: u8 = 0x80;

/// A transport protocol that the kernel cuts and gathers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Tcp,
    Udp,
}

impl Transport {
    /// By the number in the IP header.
    fn from_protocol(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }

    fn protocol(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// Where the checksum is in the transport header.
    fn checksum_at(self) -> usize {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }
}

/// The bytes of an IPv4 header with its options: 20 to 60, or `None` below 20. The fixed header is there.
fn ipv4_header_len(packet: &[u8]) -> Option<usize> {
    let length = usize::from(packet[0] & 0xf) * 4;
    (length >= IPV4_HEADER).then_some(length)
}

/// Makes an IP header say how long `packet` is and, for IPv4, seals the `header` bytes with their checksum.
/// The packet is at most 65,535 bytes, with IPv6 40 more.
fn write_ip_length(packet: &mut [u8], header: usize) {
    let length = packet.len();
    if packet[0] >> 4 == 4 {
        put_word(packet, 2, length as u16);
        put_word(packet, 10, 0);
        let sum = checksum::Sum::of(&packet[..header]).fold();
        put_word(packet, 10, !sum);
    } else {
        put_word(packet, 4, (length - IPV6_HEADER) as u16);
    }
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn put_word(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

fn long(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn ipv4_at(packet: &[u8], at: usize) -> Option<IpAddr> {
    let octets: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
    Some(Ipv4Addr::from(octets).into())
}

fn ipv6_at(packet: &[u8], at: usize) -> Option<IpAddr> {
    let octets: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
    Some(Ipv6Addr::from(octets).into())
}
