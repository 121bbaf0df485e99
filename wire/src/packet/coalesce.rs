//! Packets that arrive one after another in one flow, gathered into one super-packet for one write.
//!
//! As GRO does it in the kernel, with one slot: it is not a table of flows, and it never holds a packet back
//! behind another. Invariant: only what [`super::split`] can undo is gathered; all else passes on alone and
//! as it is, bad checksums included, for a super-packet's checksum is computed anew and would repair them.

use super::checksum::Sum;
use super::{
    ACK, DONT_FRAGMENT, IPV4_HEADER, IPV6_HEADER, PSH, TCP_FLAGS_AT, TCP_HEADER, Transport, UDP_HEADER,
    VnetHeader, long, put_word, total_len, version, word, write_ip_length,
};

/// The most bytes of a super-packet: what IPv4's total length can say.
const MAX_BYTES: usize = 0xffff;

/// Gathers packets into super-packets.
///
/// Packets follow one another in a super-packet where all of this holds: they are TCP with no flags but ACK,
/// the last perhaps with PSH, or UDP; they have neither IP options, nor extension headers, nor fragments, nor
/// padding; their headers are the same but for lengths, checksums, TCP's sequence number and IPv4's
/// identification; TCP's sequence numbers follow one another; the payloads are as long as the first, the last
/// perhaps shorter, and none is empty; all checksums are there and right.
///
/// What is kept: the order of all packets, and every byte of them once [`super::split`], or the kernel, has
/// segmented the super-packet again. The one exception is IPv4's identification. Without DF it must count up
/// and is kept; with DF it has no meaning (RFC 6864 §4.1), may be anything, and counts up from the first
/// packet's afterwards.
#[derive(Debug)]
pub struct Coalescer {
    udp: bool,
    /// The super-packet so far, its header the first packet's but for PSH. Empty without `gathered`.
    bytes: Vec<u8>,
    gathered: Option<Gathered>,
}

/// What is known of the super-packet so far.
#[derive(Debug)]
struct Gathered {
    shape: Shape,
    /// The bytes of payload in the first packet.
    size: usize,
    packets: u16,
}

impl Coalescer {
    /// Makes an empty one, with a buffer of 64 KiB and no allocation later.
    ///
    /// `udp`: whether the kernel takes UDP super-packets (Linux 6.2: `TUNSETOFFLOAD` with `TUN_F_USO4` and
    /// `TUN_F_USO6` succeeds).
    pub fn new(udp: bool) -> Self {
        Self { udp, bytes: Vec::with_capacity(MAX_BYTES), gathered: None }
    }

    /// Takes a packet that arrived; calls `write` with the header and the (super-)packet when the one being
    /// gathered cannot grow, then for this one if it cannot be gathered (as one above 65,535 bytes cannot).
    ///
    /// `packet` should end where [`total_len`] says. One packet alone is written unchanged, with
    /// [`VnetHeader::default`]. Any bytes are legal input, and pass alone where they are no IP packet.
    pub fn push(&mut self, packet: &[u8], write: &mut impl FnMut(VnetHeader, &[u8])) {
        let Some(shape) = Shape::of(packet, self.udp) else {
            self.flush(write);
            return write(VnetHeader::default(), packet);
        };
        if self.fits(&shape, packet) && shape.has_right_checksums(packet) {
            return self.append(&shape, packet, write);
        }
        self.flush(write);
        // PSH asks that nothing more is waited for.
        if shape.pushes || !shape.has_right_checksums(packet) {
            return write(VnetHeader::default(), packet);
        }
        self.bytes.extend_from_slice(packet);
        self.gathered = Some(Gathered { shape, size: packet.len() - shape.payload_at, packets: 1 });
    }

    /// Gives out what is gathered, if anything; call at the end of every batch.
    pub fn flush(&mut self, write: &mut impl FnMut(VnetHeader, &[u8])) {
        let Some(gathered) = self.gathered.take() else { return };
        let header = if gathered.packets == 1 {
            VnetHeader::default()
        } else {
            gathered.shape.make_super_packet(&mut self.bytes, gathered.size)
        };
        write(header, &self.bytes);
        self.bytes.clear();
    }

    /// Says whether `packet` may follow what is gathered, its checksums apart.
    fn fits(&self, shape: &Shape, packet: &[u8]) -> bool {
        let Some(gathered) = &self.gathered else { return false };
        let payload = packet.len() - shape.payload_at;
        gathered.shape.is_like(shape)
            && payload <= gathered.size
            && self.bytes.len() + payload <= MAX_BYTES
            && shape.same_ip_header(&self.bytes, packet, gathered.packets)
            && shape.same_transport_header(&self.bytes, packet)
    }

    fn append(&mut self, shape: &Shape, packet: &[u8], write: &mut impl FnMut(VnetHeader, &[u8])) {
        let Some(gathered) = &mut self.gathered else { return };
        let payload = &packet[shape.payload_at..];
        self.bytes.extend_from_slice(payload);
        gathered.packets += 1;
        if shape.pushes {
            self.bytes[shape.transport_at + TCP_FLAGS_AT] |= PSH;
        }
        if shape.pushes || payload.len() < gathered.size {
            self.flush(write);
        }
    }
}

/// Where the parts of a packet are that may be gathered, as far as its own header tells.
#[derive(Debug, Clone, Copy)]
struct Shape {
    transport: Transport,
    /// 20 for IPv4, 40 for IPv6.
    transport_at: usize,
    payload_at: usize,
    /// Whether TCP's PSH is set.
    pushes: bool,
}

impl Shape {
    /// Looks at the headers; `None` for a packet that must pass alone. All that is read later is there then.
    fn of(packet: &[u8], udp: bool) -> Option<Self> {
        if total_len(packet)? != packet.len() || packet.len() > MAX_BYTES {
            return None;
        }
        let (protocol, transport_at) = match version(packet)? {
            // No options, and neither a fragment nor the reserved bit.
            4 if packet[0] == 0x45 && word(packet, 6) & !DONT_FRAGMENT == 0 => (packet[9], IPV4_HEADER),
            6 => (packet[6], IPV6_HEADER),
            _ => return None,
        };
        let header = &packet[transport_at..];
        let transport = Transport::from_protocol(protocol)?;
        let (length, pushes) = match transport {
            Transport::Tcp => {
                let flags = *header.get(TCP_FLAGS_AT)?;
                let length = usize::from(header[12] >> 4) * 4;
                if flags & !PSH != ACK || length < TCP_HEADER {
                    return None;
                }
                (length, flags & PSH != 0)
            }
            Transport::Udp => {
                let length = usize::from(u16::from_be_bytes(header.get(4..6)?.try_into().ok()?));
                if !udp || length != header.len() {
                    return None;
                }
                (UDP_HEADER, false)
            }
        };
        let shape = Self { transport, transport_at, payload_at: transport_at + length, pushes };
        (shape.payload_at < packet.len()).then_some(shape)
    }

    fn is_like(&self, other: &Self) -> bool {
        self.transport == other.transport
            && self.transport_at == other.transport_at
            && self.payload_at == other.payload_at
    }

    /// Compares addresses, traffic class, flow label, hop limit and DF with the first packet's, of which
    /// `packets` are gathered.
    fn same_ip_header(&self, first: &[u8], packet: &[u8], packets: u16) -> bool {
        if self.transport_at == IPV6_HEADER {
            return first[..4] == packet[..4] && first[6..IPV6_HEADER] == packet[6..IPV6_HEADER];
        }
        let counts = word(first, 4).wrapping_add(packets) == word(packet, 4);
        first[..2] == packet[..2]
            && first[6..10] == packet[6..10]
            && first[12..IPV4_HEADER] == packet[12..IPV4_HEADER]
            && (counts || word(packet, 6) & DONT_FRAGMENT != 0)
    }

    /// Compares ports and, for TCP, acknowledgment, window, urgent pointer and options with those of what is
    /// gathered, and the sequence number with its end.
    fn same_transport_header(&self, gathered: &[u8], packet: &[u8]) -> bool {
        let payload = gathered.len() - self.payload_at;
        let (first, next) = (&gathered[self.transport_at..], &packet[self.transport_at..self.payload_at]);
        first[..4] == next[..4]
            && (self.transport == Transport::Udp
                || long(first, 4).wrapping_add(payload as u32) == long(next, 4)
                    && first[8..13] == next[8..13]
                    && first[14..16] == next[14..16]
                    && first[18..next.len()] == next[18..])
    }

    /// Verifies the checksums of IPv4 and of the transport. 0xffff instead of 0, which is as right but is not
    /// what segmentation writes, counts as wrong, and so does UDP's 0 for none.
    fn has_right_checksums(&self, packet: &[u8]) -> bool {
        if self.transport_at == IPV4_HEADER {
            let right = Sum::of(&packet[..IPV4_HEADER]).fold() == 0xffff;
            if !right || word(packet, 10) == 0xffff {
                return false;
            }
        }
        let unusual = match self.transport {
            Transport::Tcp => 0xffff,
            Transport::Udp => 0,
        };
        let bytes = &packet[self.transport_at..];
        word(bytes, self.transport.checksum_at()) != unusual
            && Sum::pseudo_header(packet, self.transport, bytes.len()).plus(Sum::of(bytes)).fold() == 0xffff
    }

    /// Makes the header of the first of several packets that of the whole, and says what the kernel must
    /// know. As `tcp_gro_complete` and `udp_gro_complete` leave it, with the pseudo header's sum for a
    /// checksum.
    fn make_super_packet(&self, bytes: &mut [u8], size: usize) -> VnetHeader {
        write_ip_length(bytes, self.transport_at);
        let length = bytes.len() - self.transport_at;
        let pseudo = Sum::pseudo_header(bytes, self.transport, length).fold();
        let gso_type = match self.transport {
            Transport::Udp => VnetHeader::GSO_UDP_L4,
            Transport::Tcp if self.transport_at == IPV4_HEADER => VnetHeader::GSO_TCPV4,
            Transport::Tcp => VnetHeader::GSO_TCPV6,
        };
        if self.transport == Transport::Udp {
            put_word(bytes, self.transport_at + 4, length as u16);
        }
        put_word(bytes, self.transport_at + self.transport.checksum_at(), pseudo);
        // None is above 65,535: a super-packet is not.
        VnetHeader {
            flags: VnetHeader::NEEDS_CSUM,
            gso_type,
            hdr_len: self.payload_at as u16,
            gso_size: size as u16,
            csum_start: self.transport_at as u16,
            csum_offset: self.transport.checksum_at() as u16,
        }
    }
}
