//! Packets that follow each other into one super-packet, so that the kernel's stack is passed once.
//!
//! One flow is gathered at a time: a sender's run of packets comes in order, and what lies between ends it. The rules are
//! those of the kernel's own receive offload (net/ipv4/tcp_offload.c `tcp_gro_receive`, net/ipv4/udp_offload.c), and a
//! packet whose checksum is wrong is handed on as it is: gathering would repair it.

use super::checksum::{add, fold, of_header, pseudo_header};
use super::segment::{GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, PSH, VnetHeader};
use super::{IPV4_HEADER, IPV6_HEADER, TCP, UDP, put, total_len, u16_at, u32_at};

const ACK: u8 = 16;
const DONT_FRAGMENT: u16 = 0x4000;
/// The longest super-packet: one IP packet.
const MOST: usize = 65_535;
/// The kernel counts segments of UDP in so many at most (`UDP_MAX_SEGMENTS`).
const MOST_UDP: usize = 64;

/// Gathers packets of one flow.
#[derive(Debug)]
pub struct Coalescer {
    udp: bool,
    gathered: Vec<u8>,
    /// Nothing where the gathered packet cannot grow.
    run: Option<Run>,
}

/// The packet gathered so far.
#[derive(Debug, Clone, Copy)]
struct Run {
    parts: Parts,
    size: usize,
    count: usize,
    next_sequence: u32,
    next_identification: u16,
}

/// Where the parts of a packet are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Parts {
    v4: bool,
    protocol: u8,
    transport: usize,
    payload: usize,
}

impl Coalescer {
    /// Gathers nothing yet. `udp`: the kernel takes super-packets of UDP (Linux 6.2).
    pub fn new(udp: bool) -> Self {
        Self { udp, gathered: Vec::with_capacity(MOST), run: None }
    }

    /// Takes a packet that arrived, and hands out what was gathered where it does not continue that.
    pub fn push(&mut self, packet: &[u8], write: &mut impl FnMut(VnetHeader, &[u8])) {
        let parts = self.parts(packet);
        if let (Some(run), Some(parts)) = (self.run, parts)
            && let Some(run) = self.append(run, parts, packet)
        {
            // A packet that ends a burst, or is shorter, is the last.
            let payload = packet.len() - parts.payload;
            let pushes = parts.protocol == TCP && packet[parts.transport + 13] & PSH != 0;
            self.run = Some(run);
            if payload < run.size || pushes {
                self.flush(write);
            }
            return;
        }
        self.flush(write);
        match parts {
            Some(parts) if can_begin(parts, packet) => {
                self.gathered.extend_from_slice(packet);
                self.run = Some(Run {
                    parts,
                    size: packet.len() - parts.payload,
                    count: 1,
                    next_sequence: sequence(parts, packet)
                        .wrapping_add((packet.len() - parts.payload) as u32),
                    next_identification: u16_at(packet, 4).unwrap_or(0).wrapping_add(1),
                });
            }
            _ => write(VnetHeader::default(), packet),
        }
    }

    /// Hands out what is gathered. To be called at the end of a batch.
    pub fn flush(&mut self, write: &mut impl FnMut(VnetHeader, &[u8])) {
        let Some(run) = self.run.take() else { return };
        let header = if run.count == 1 { VnetHeader::default() } else { self.complete(run) };
        write(header, &self.gathered);
        self.gathered.clear();
    }

    /// What a packet must be to be gathered at all; its checksum is right then.
    fn parts(&self, packet: &[u8]) -> Option<Parts> {
        if total_len(packet)? != packet.len() {
            return None;
        }
        let v4 = packet[0] >> 4 == 4;
        let (transport, protocol) = if v4 {
            // No options, no fragment.
            let plain = packet[0] == 0x45 && u16_at(packet, 6)? & !DONT_FRAGMENT == 0;
            let whole = plain && fold(add(0, &packet[..IPV4_HEADER])) == 0xffff;
            (whole.then_some(IPV4_HEADER)?, packet[9])
        } else {
            (IPV6_HEADER, packet[6])
        };
        let payload = match protocol {
            TCP => {
                let length = usize::from(packet.get(transport + 12)? >> 4) * 4;
                (length >= 20).then_some(transport + length)?
            }
            UDP if self.udp => {
                let told = usize::from(u16_at(packet, transport + 4)?) == packet.len() - transport;
                let summed = u16_at(packet, transport + 6)? != 0;
                (told && summed).then_some(transport + 8)?
            }
            _ => return None,
        };
        let sum = pseudo_header(packet, protocol, packet.len() - transport);
        let right = packet.len() > payload && fold(add(sum, &packet[transport..])) == 0xffff;
        right.then_some(Parts { v4, protocol, transport, payload })
    }

    /// Appends the payload of a packet that continues the run; returns the longer run.
    fn append(&mut self, run: Run, parts: Parts, packet: &[u8]) -> Option<Run> {
        let payload = packet.len() - parts.payload;
        let follows = parts == run.parts
            && payload <= run.size
            && self.gathered.len() + payload <= MOST
            && same_headers(&self.gathered, packet, parts)
            && continues(run, parts, packet);
        if !follows {
            return None;
        }
        self.gathered.extend_from_slice(&packet[parts.payload..]);
        if parts.protocol == TCP {
            self.gathered[parts.transport + 13] |= packet[parts.transport + 13] & PSH;
        }
        Some(Run {
            count: run.count + 1,
            next_sequence: run.next_sequence.wrapping_add(payload as u32),
            next_identification: run.next_identification.wrapping_add(1),
            ..run
        })
    }

    /// Writes the headers of the gathered packet: lengths, and the sum of the pseudo-header alone.
    fn complete(&mut self, run: Run) -> VnetHeader {
        let Parts { v4, protocol, transport, payload } = run.parts;
        let packet = &mut self.gathered;
        let length = packet.len();
        if v4 {
            put(packet, 2, &(length as u16).to_be_bytes());
            put(packet, 10, &[0, 0]);
            let sum = of_header(&packet[..transport]);
            put(packet, 10, &sum.to_be_bytes());
        } else {
            put(packet, 4, &((length - IPV6_HEADER) as u16).to_be_bytes());
        }
        let (gso_type, csum_offset) = match (protocol, v4) {
            (TCP, true) => (GSO_TCPV4, 16),
            (TCP, false) => (GSO_TCPV6, 16),
            _ => (GSO_UDP_L4, 6),
        };
        if protocol == UDP {
            put(packet, transport + 4, &((length - transport) as u16).to_be_bytes());
        }
        let sum = fold(pseudo_header(packet, protocol, length - transport));
        put(packet, transport + usize::from(csum_offset), &sum.to_be_bytes());
        VnetHeader {
            flags: NEEDS_CSUM,
            gso_type,
            hdr_len: payload as u16,
            gso_size: run.size as u16,
            csum_start: transport as u16,
            csum_offset,
        }
    }
}

fn sequence(parts: Parts, packet: &[u8]) -> u32 {
    if parts.protocol == TCP { u32_at(packet, parts.transport + 4).unwrap_or(0) } else { 0 }
}

/// Whether a packet may be the first of several.
fn can_begin(parts: Parts, packet: &[u8]) -> bool {
    parts.protocol == UDP || packet[parts.transport + 13] == ACK
}

/// Whether everything but lengths, checksums, identification, sequence and the push flag is the same.
fn same_headers(one: &[u8], other: &[u8], parts: Parts) -> bool {
    let same = |from: usize, to: usize| one[from..to] == other[from..to];
    let at = parts.transport;
    let ip = if parts.v4 {
        // Version, length, TOS; flags, TTL, protocol; addresses.
        same(0, 2) && same(6, 10) && same(12, at)
    } else {
        // Version, class, label; next header, hop limit, addresses.
        same(0, 4) && same(6, at)
    };
    let transport = match parts.protocol {
        // Ports; acknowledgement and length; flags but for the push; window; urgent pointer and options.
        TCP => {
            same(at, at + 4)
                && same(at + 8, at + 13)
                && (one[at + 13] | PSH) == (other[at + 13] | PSH)
                && same(at + 14, at + 16)
                && same(at + 18, parts.payload)
        }
        _ => same(at, at + 4),
    };
    ip && transport
}

/// Whether a packet is the next one of the run.
fn continues(run: Run, parts: Parts, packet: &[u8]) -> bool {
    // Taking the run apart counts the identification up from the first.
    let identified = !parts.v4 || u16_at(packet, 4) == Some(run.next_identification);
    identified
        && match parts.protocol {
            TCP => sequence(parts, packet) == run.next_sequence,
            _ => run.count < MOST_UDP,
        }
}
