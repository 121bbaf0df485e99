//! What one read of a TUN device gives, cut into packets for the wire: segmentation of TCP and UDP
//! super-packets (TSO, USO) and checksums that the kernel left to the device.
//!
//! It is not a fragmenter: a packet that is too long for the path and is no super-packet stays as it is.
//! Invariant: what is given out is a slice of the packet that was read, so nothing but one header is copied,
//! and each slice is complete in lengths, identification, sequence and checksums.

use super::checksum::Sum;
use super::{
    CWR, FIN, IPV6_HEADER, PSH, TCP_FLAGS_AT, TCP_HEADER, Transport, UDP_HEADER, ipv4_header_len, long,
    put_word, version, word, write_ip_length,
};

/// What the kernel puts in front of a packet of a TUN device with `IFF_VNET_HDR`.
///
/// Source: `struct virtio_net_hdr` of `include/uapi/linux/virtio_net.h`. The words are in the machine's byte
/// order, as TUN has them unless `TUNSETVNETLE` or `TUNSETVNETBE` was called; the device must stay without.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// Bit 0, `NEEDS_CSUM`: the checksum at `csum_start + csum_offset` holds the sum of the pseudo header
    /// only. Bit 1, `DATA_VALID`: the checksums were verified.
    pub flags: u8,
    /// 0 for a packet, 1 for TCP over IPv4, 4 for TCP over IPv6, 5 for UDP; and 0x80 for TCP with ECN.
    pub gso_type: u8,
    /// The bytes of the IP and transport headers. A hint from the kernel: forwarded packets may have the
    /// length of the whole first segment here.
    pub hdr_len: u16,
    /// The bytes of payload in each segment but the last, 1 to 65,534 with a `gso_type`.
    pub gso_size: u16,
    /// Where the bytes that the checksum covers begin, from the start of the IP header.
    pub csum_start: u16,
    /// Where the checksum is, from `csum_start`.
    pub csum_offset: u16,
}

impl VnetHeader {
    /// The bytes of the header, which is also what `TUNGETVNETHDRSZ` says of a new device.
    pub const LEN: usize = 10;

    pub(super) const NEEDS_CSUM: u8 = 1;
    pub(super) const GSO_NONE: u8 = 0;
    pub(super) const GSO_TCPV4: u8 = 1;
    pub(super) const GSO_TCPV6: u8 = 4;
    pub(super) const GSO_UDP_L4: u8 = 5;
    pub(super) const GSO_ECN: u8 = 0x80;

    /// Reads the header. Any bytes are one.
    pub fn read(bytes: [u8; Self::LEN]) -> Self {
        let [flags, gso_type, words @ ..] = bytes;
        let word = |at: usize| u16::from_ne_bytes([words[at], words[at + 1]]);
        Self {
            flags,
            gso_type,
            hdr_len: word(0),
            gso_size: word(2),
            csum_start: word(4),
            csum_offset: word(6),
        }
    }

    /// Writes the header as [`VnetHeader::read`] reads it.
    pub fn write(self) -> [u8; Self::LEN] {
        let mut bytes = [self.flags, self.gso_type, 0, 0, 0, 0, 0, 0, 0, 0];
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset];
        for (place, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// Why a packet of the TUN cannot be sent. Nothing of it was given out; the caller drops it and goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadPacket {
    /// The packet ends before one of its headers does.
    #[error("the packet ends inside a header")]
    Truncated,
    /// The packet is neither IPv4 nor IPv6.
    #[error("the packet is neither IPv4 nor IPv6")]
    NotIp,
    /// The packet is longer than an IP header can say: 65,535 bytes, with IPv6 40 more.
    #[error("the packet is longer than IP allows")]
    TooLong,
    /// The super-packet is of a type that was not asked for.
    #[error("the kernel gave a super-packet of the unknown type {0:#04x}")]
    UnknownGso(u8),
    /// The super-packet's IP header does not say what its type does: another version or protocol, a
    /// fragment, or an IPv6 routing header, under which the checksum covers another address.
    #[error("the super-packet is not of the version and protocol that its type says")]
    WrongProtocol,
    /// A header's length, or the place of the checksum, contradicts the packet.
    #[error("the packet's headers and the offsets for its checksum disagree")]
    BadOffsets,
    /// The super-packet has no payload, or its segments have none.
    #[error("the super-packet or its segments have no payload")]
    NoPayload,
}

/// Splits what one read of the TUN gave; calls `each` for every packet in order, complete with lengths, IPv4
/// identification and checksums, and returns how many there were, at least 1.
///
/// `packet` is what followed the header, at most 65,535 bytes, with IPv6 40 more; its bytes are used up.
/// `scratch` holds one header, so that after the first super-packets nothing is allocated. A packet without
/// offloads is given out as it is, whatever its lengths say.
///
/// As Linux segments: the identification counts up, FIN and PSH stay with the last segment, CWR with the
/// first (`tcp_gso_segment`), and UDP's checksum is never 0 (RFC 768).
///
/// # Errors
/// [`BadPacket`], before `each` was called at all. Any header and any bytes are legal input.
pub fn split(
    header: VnetHeader,
    packet: &mut [u8],
    scratch: &mut Vec<u8>,
    mut each: impl FnMut(&[u8]),
) -> Result<usize, BadPacket> {
    let most = match version(packet) {
        Some(4) => 0xffff,
        Some(_) => IPV6_HEADER + 0xffff,
        None if packet.first().is_none_or(|first| matches!(first >> 4, 4 | 6)) => {
            return Err(BadPacket::Truncated);
        }
        None => return Err(BadPacket::NotIp),
    };
    if packet.len() > most {
        return Err(BadPacket::TooLong);
    }
    if header.gso_type == VnetHeader::GSO_NONE {
        if header.flags & VnetHeader::NEEDS_CSUM != 0 {
            finish_checksum(header, packet)?;
        }
        each(packet);
        return Ok(1);
    }
    let cut = Cut::plan(header, packet)?;
    scratch.clear();
    scratch.extend_from_slice(&packet[..cut.payload_at]);
    let size = usize::from(header.gso_size);
    let payload = packet.len() - cut.payload_at;
    let count = payload.div_ceil(size);
    for index in 0..count {
        // The header goes right in front of the segment's payload, over payload that was given out before.
        let start = index * size;
        let end = packet.len().min(start + cut.payload_at + size);
        let segment = &mut packet[start..end];
        segment[..cut.payload_at].copy_from_slice(scratch);
        cut.finish(segment, start, index, index + 1 == count);
        each(segment);
    }
    Ok(count)
}

/// Finishes the checksum of a packet that is not a super-packet, as `skb_checksum_help` does. The transport
/// may be any, also one inside a tunnel: only the offsets say.
fn finish_checksum(header: VnetHeader, packet: &mut [u8]) -> Result<(), BadPacket> {
    let start = usize::from(header.csum_start);
    let at = start + usize::from(header.csum_offset);
    let ip_header = match version(packet) {
        Some(4) => ipv4_header_len(packet).ok_or(BadPacket::BadOffsets)?,
        _ => IPV6_HEADER,
    };
    if start < ip_header || at + 2 > packet.len() {
        return Err(BadPacket::BadOffsets);
    }
    let mut sum = !Sum::of(&packet[start..]).fold();
    // The place tells UDP from TCP, for which 0 is a checksum like others.
    if sum == 0 && usize::from(header.csum_offset) == Transport::Udp.checksum_at() {
        sum = 0xffff;
    }
    put_word(packet, at, sum);
    Ok(())
}

/// How a super-packet is cut: found once, used for every segment.
struct Cut {
    transport: Transport,
    transport_at: usize,
    payload_at: usize,
}

impl Cut {
    /// Checks the header against the packet, which has a complete fixed IP header.
    fn plan(header: VnetHeader, packet: &[u8]) -> Result<Self, BadPacket> {
        let wanted = match header.gso_type {
            VnetHeader::GSO_UDP_L4 => (None, Transport::Udp),
            other => match other & !VnetHeader::GSO_ECN {
                VnetHeader::GSO_TCPV4 => (Some(4), Transport::Tcp),
                VnetHeader::GSO_TCPV6 => (Some(6), Transport::Tcp),
                _ => return Err(BadPacket::UnknownGso(other)),
            },
        };
        let (version, transport) = wanted;
        if version.is_some_and(|version| version != packet[0] >> 4) {
            return Err(BadPacket::WrongProtocol);
        }
        let (protocol, transport_at) = find_transport(packet)?;
        if Transport::from_protocol(protocol) != Some(transport) {
            return Err(BadPacket::WrongProtocol);
        }
        // A super-packet whose checksum was verified already has DATA_VALID, and no offsets.
        let partial = header.flags & VnetHeader::NEEDS_CSUM != 0;
        let offsets = (usize::from(header.csum_start), usize::from(header.csum_offset));
        if partial && offsets != (transport_at, transport.checksum_at()) {
            return Err(BadPacket::BadOffsets);
        }
        let payload_at = transport_at + transport_header_len(transport, &packet[transport_at..])?;
        if header.gso_size == 0 || packet.len() <= payload_at {
            return Err(if packet.len() < payload_at { BadPacket::Truncated } else { BadPacket::NoPayload });
        }
        Ok(Self { transport, transport_at, payload_at })
    }

    /// Makes a packet of the super-packet's header and one part of its payload, which `offset` bytes and
    /// `index` segments precede.
    fn finish(&self, segment: &mut [u8], offset: usize, index: usize, last: bool) {
        if segment[0] >> 4 == 4 {
            let id = word(segment, 4).wrapping_add(index as u16);
            put_word(segment, 4, id);
        }
        write_ip_length(segment, self.transport_at);
        let length = segment.len() - self.transport_at;
        let pseudo = Sum::pseudo_header(segment, self.transport, length);
        let segment = &mut segment[self.transport_at..];
        match self.transport {
            Transport::Tcp => {
                let sequence = long(segment, 4).wrapping_add(offset as u32);
                segment[4..8].copy_from_slice(&sequence.to_be_bytes());
                let first = index == 0;
                let dropped = if last { 0 } else { FIN | PSH } | if first { 0 } else { CWR };
                segment[TCP_FLAGS_AT] &= !dropped;
            }
            Transport::Udp => put_word(segment, 4, length as u16),
        }
        put_word(segment, self.transport.checksum_at(), 0);
        let mut sum = !pseudo.plus(Sum::of(segment)).fold();
        if sum == 0 && self.transport == Transport::Udp {
            sum = 0xffff;
        }
        put_word(segment, self.transport.checksum_at(), sum);
    }
}

/// Finds what follows the IP header, its options and extension headers: the protocol's number, and where it
/// begins, which lies inside the packet or at its end.
fn find_transport(packet: &[u8]) -> Result<(u8, usize), BadPacket> {
    let (protocol, at) = if packet[0] >> 4 == 4 {
        if word(packet, 6) & 0x3fff != 0 {
            return Err(BadPacket::WrongProtocol);
        }
        (packet[9], ipv4_header_len(packet).ok_or(BadPacket::BadOffsets)?)
    } else {
        let (mut next, mut at) = (packet[6], IPV6_HEADER);
        // Hop-by-hop options, routing header, destination options. Each is at least 8 bytes.
        while matches!(next, 0 | 43 | 60) {
            let extension = packet.get(at..at + 8).ok_or(BadPacket::Truncated)?;
            let segments_left = extension[3];
            if next == 43 && segments_left != 0 {
                return Err(BadPacket::WrongProtocol);
            }
            next = extension[0];
            at += 8 * (1 + usize::from(extension[1]));
        }
        (next, at)
    };
    if at <= packet.len() { Ok((protocol, at)) } else { Err(BadPacket::Truncated) }
}

/// The bytes of a transport header, options included; the packet may still be shorter.
fn transport_header_len(transport: Transport, bytes: &[u8]) -> Result<usize, BadPacket> {
    match transport {
        Transport::Udp => Ok(UDP_HEADER),
        Transport::Tcp => {
            let length = usize::from(bytes.get(12).ok_or(BadPacket::Truncated)? >> 4) * 4;
            if length >= TCP_HEADER { Ok(length) } else { Err(BadPacket::BadOffsets) }
        }
    }
}
