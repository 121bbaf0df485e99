//! One super-packet of the kernel's into packets that the wire takes.

use super::checksum::{add, fold, of_header, pseudo_header};
use super::{TCP, UDP, put, u16_at, u32_at, version};

pub(super) const NEEDS_CSUM: u8 = 1;
pub(super) const GSO_TCPV4: u8 = 1;
pub(super) const GSO_TCPV6: u8 = 4;
pub(super) const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

pub(super) const FIN: u8 = 1;
pub(super) const PSH: u8 = 8;
const CWR: u8 = 0x80;

/// What a TUN device with `IFF_VNET_HDR` puts before each packet: `struct virtio_net_hdr` of linux/virtio_net.h, in the
/// machine's byte order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// Bit 0: the checksum is to be finished.
    pub flags: u8,
    /// Whether and of what this is a super-packet.
    pub gso_type: u8,
    /// The length of all headers, as far as the kernel knows.
    pub hdr_len: u16,
    /// The bytes of payload of each packet.
    pub gso_size: u16,
    /// From where to sum up.
    pub csum_start: u16,
    /// Where the checksum is, from there.
    pub csum_offset: u16,
}

impl VnetHeader {
    /// Its length in bytes.
    pub const LEN: usize = 10;

    /// Reads it.
    pub fn read(bytes: [u8; Self::LEN]) -> Self {
        let [flags, gso_type, a, b, c, d, e, f, g, h] = bytes;
        let [hdr_len, gso_size, csum_start, csum_offset] =
            [[a, b], [c, d], [e, f], [g, h]].map(u16::from_ne_bytes);
        Self { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset }
    }

    /// Writes it.
    pub fn write(self) -> [u8; Self::LEN] {
        let [[a, b], [c, d], [e, f], [g, h]] =
            [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset].map(u16::to_ne_bytes);
        [self.flags, self.gso_type, a, b, c, d, e, f, g, h]
    }
}

/// A packet of the device that cannot be sent. Nothing of it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadPacket {
    /// No IPv4 or IPv6.
    #[error("no IP packet")]
    NotIp,
    /// A kind of super-packet that was not asked for.
    #[error("a super-packet of kind {0}")]
    UnknownKind(u8),
    /// Lengths and offsets that the packet does not have.
    #[error("offsets beyond the packet")]
    Offsets,
}

/// Where the parts of a super-packet are.
struct Shape {
    /// Where the transport header begins, and the payload.
    transport: usize,
    payload: usize,
    protocol: u8,
    v4: bool,
}

/// Takes apart what one read of the device gave, and calls `each` for every packet in order, with right lengths, IPv4
/// identification and checksums. Returns how many there were.
///
/// `packet` and `scratch` are overwritten; `scratch` grows to the longest packet once.
///
/// # Errors
/// What is wrong; `each` has not been called then.
pub fn split(
    header: VnetHeader,
    packet: &mut [u8],
    scratch: &mut Vec<u8>,
    mut each: impl FnMut(&[u8]),
) -> Result<usize, BadPacket> {
    version(packet).ok_or(BadPacket::NotIp)?;
    let kind = header.gso_type & !GSO_ECN;
    if kind == 0 {
        if header.flags & NEEDS_CSUM != 0 {
            finish_checksum(packet, header)?;
        }
        each(packet);
        return Ok(1);
    }
    let shape = shape(header, kind, packet)?;
    let size = usize::from(header.gso_size);
    let (headers, payload) = packet.split_at_mut(shape.payload);
    let count = payload.len().div_ceil(size);
    let first = Fields::read(headers, &shape);
    for (number, part) in payload.chunks(size).enumerate() {
        scratch.clear();
        scratch.extend_from_slice(headers);
        scratch.extend_from_slice(part);
        first.write(scratch, &shape, number, size, number + 1 == count);
        each(scratch);
    }
    Ok(count)
}

/// What differs from packet to packet.
struct Fields {
    identification: u16,
    sequence: u32,
    flags: u8,
}

impl Fields {
    fn read(headers: &[u8], shape: &Shape) -> Self {
        let tcp = shape.protocol == TCP;
        Self {
            identification: if shape.v4 { u16_at(headers, 4).unwrap_or(0) } else { 0 },
            sequence: if tcp { u32_at(headers, shape.transport + 4).unwrap_or(0) } else { 0 },
            flags: if tcp { headers[shape.transport + 13] } else { 0 },
        }
    }

    fn write(&self, packet: &mut [u8], shape: &Shape, number: usize, size: usize, last: bool) {
        let length = packet.len();
        let at = shape.transport;
        if shape.v4 {
            put(packet, 2, &(length as u16).to_be_bytes());
            put(packet, 4, &self.identification.wrapping_add(number as u16).to_be_bytes());
            put(packet, 10, &[0, 0]);
            let sum = of_header(&packet[..at]);
            put(packet, 10, &sum.to_be_bytes());
        } else {
            put(packet, 4, &((length - super::IPV6_HEADER) as u16).to_be_bytes());
        }
        let field = if shape.protocol == TCP {
            let sequence = self.sequence.wrapping_add((number * size) as u32);
            put(packet, at + 4, &sequence.to_be_bytes());
            let mut flags = self.flags;
            if !last {
                flags &= !(FIN | PSH);
            }
            if number > 0 {
                flags &= !CWR;
            }
            packet[at + 13] = flags;
            at + 16
        } else {
            put(packet, at + 4, &((length - at) as u16).to_be_bytes());
            at + 6
        };
        put(packet, field, &[0, 0]);
        let sum = pseudo_header(packet, shape.protocol, length - at);
        let mut sum = !fold(add(sum, &packet[at..]));
        if sum == 0 && shape.protocol == UDP {
            sum = 0xffff; // 0 says that there is none (RFC 768).
        }
        put(packet, field, &sum.to_be_bytes());
    }
}

fn shape(header: VnetHeader, kind: u8, packet: &[u8]) -> Result<Shape, BadPacket> {
    let v4 = packet[0] >> 4 == 4;
    let (protocol, field, fixed) = match (kind, v4) {
        (GSO_TCPV4, true) | (GSO_TCPV6, false) => (TCP, 16, 20),
        (GSO_UDP_L4, _) => (UDP, 6, 8),
        _ => return Err(BadPacket::UnknownKind(kind)),
    };
    let transport = usize::from(header.csum_start);
    // The kernel's own length of the headers is no more than a hint: the headers tell.
    let ends_ip = if v4 {
        transport == usize::from(packet[0] & 15) * 4 && packet[9] == protocol
    } else {
        transport >= super::IPV6_HEADER
    };
    let marked = header.flags & NEEDS_CSUM != 0 && header.csum_offset == field;
    if !ends_ip || !marked || packet.len() < transport + fixed {
        return Err(BadPacket::Offsets);
    }
    let headers = if protocol == TCP { usize::from(packet[transport + 12] >> 4) * 4 } else { fixed };
    let payload = transport + headers;
    let size = usize::from(header.gso_size);
    if headers < fixed || packet.len() <= payload || size == 0 || payload + size > usize::from(u16::MAX) {
        return Err(BadPacket::Offsets);
    }
    Ok(Shape { transport, payload, protocol, v4 })
}

/// The field holds the sum of the pseudo-header; the rest is added to it.
fn finish_checksum(packet: &mut [u8], header: VnetHeader) -> Result<(), BadPacket> {
    let start = usize::from(header.csum_start);
    let field = start + usize::from(header.csum_offset);
    if start >= packet.len() || field + 2 > packet.len() {
        return Err(BadPacket::Offsets);
    }
    let mut sum = !fold(add(0, &packet[start..]));
    if sum == 0 && header.csum_offset == 6 {
        sum = 0xffff;
    }
    put(packet, field, &sum.to_be_bytes());
    Ok(())
}
