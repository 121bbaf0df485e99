//! Splitting and gathering, with etherparse as the witness for what packets say and for their checksums.

use etherparse::{
    IpHeaders, IpNumber, Ipv4Header, Ipv6Header, NetSlice, PacketBuilder, SlicedPacket, TcpHeader,
    TransportSlice,
};
use proptest::collection::vec;
use proptest::prelude::*;

use super::checksum::Sum;
use super::*;

const NEEDS_CSUM: u8 = 1;
const TCPV4: u8 = 1;
const TCPV6: u8 = 4;
const UDP_L4: u8 = 5;
const ECN: u8 = 0x80;

/// What the packets of a flow have in common.
#[derive(Debug, Clone, Default)]
struct Flow {
    v6: bool,
    udp: bool,
    df: bool,
    port: u16,
    options: Vec<u8>,
}

impl Flow {
    /// A packet that etherparse makes; UDP takes no notice of `sequence` and `flags`.
    fn packet(&self, id: u16, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let ip = if self.v6 {
            let source = [0xfd, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7];
            let destination = [0xfd, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 9];
            IpHeaders::Ipv6(
                Ipv6Header { source, destination, hop_limit: 61, ..Ipv6Header::default() },
                Default::default(),
            )
        } else {
            let ip = Ipv4Header {
                identification: id,
                dont_fragment: self.df,
                time_to_live: 61,
                source: [10, 1, 0, 7],
                destination: [10, 2, 0, 9],
                ..Ipv4Header::default()
            };
            IpHeaders::Ipv4(ip, Default::default())
        };
        let builder = PacketBuilder::ip(ip);
        let mut packet = Vec::new();
        if self.udp {
            builder.udp(self.port, 53).write(&mut packet, payload).unwrap();
            return packet;
        }
        let mut tcp = TcpHeader::new(self.port, 443, sequence, 4321);
        tcp.acknowledgment_number = 77;
        tcp.set_options_raw(&self.options).unwrap();
        let bit = |mask: u8| flags & mask != 0;
        (tcp.fin, tcp.syn, tcp.rst, tcp.psh) = (bit(FIN), bit(2), bit(4), bit(PSH));
        (tcp.ack, tcp.urg, tcp.ece, tcp.cwr) = (bit(ACK), bit(0x20), bit(0x40), bit(CWR));
        builder.tcp_header(tcp).write(&mut packet, payload).unwrap();
        packet
    }

    fn transport_at(&self) -> usize {
        if self.v6 { 40 } else { 20 }
    }

    fn checksum_at(&self) -> usize {
        self.transport_at() + if self.udp { 6 } else { 16 }
    }

    fn header_len(&self) -> usize {
        self.transport_at() + if self.udp { 8 } else { 20 + self.options.len() }
    }

    /// What the kernel would say of a super-packet of this flow.
    fn vnet(&self, size: u16) -> VnetHeader {
        VnetHeader {
            flags: NEEDS_CSUM,
            gso_type: match (self.udp, self.v6) {
                (true, _) => UDP_L4,
                (false, false) => TCPV4,
                (false, true) => TCPV6,
            },
            hdr_len: self.header_len() as u16,
            gso_size: size,
            csum_start: self.transport_at() as u16,
            csum_offset: if self.udp { 6 } else { 16 },
        }
    }

    /// The header of a packet whose checksum is left to the device.
    fn partial(&self) -> VnetHeader {
        VnetHeader { gso_type: 0, gso_size: 0, ..self.vnet(0) }
    }
}

/// What etherparse reads in a packet, once its lengths and checksums are confirmed.
#[derive(Debug, PartialEq)]
struct Seen {
    id: u16,
    sequence: u32,
    flags: u8,
    ports: (u16, u16),
    payload: Vec<u8>,
}

fn witness(packet: &[u8]) -> Seen {
    let sliced = SlicedPacket::from_ip(packet).expect("an IP packet");
    let (mut id, mut v4, mut v6) = (0, None, None);
    match sliced.net.as_ref().expect("a network layer") {
        NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum(), "IPv4's checksum");
            assert_eq!(usize::from(header.total_len), packet.len());
            id = header.identification;
            v4 = Some((header.source, header.destination));
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header().to_header();
            assert_eq!(usize::from(header.payload_length) + 40, packet.len());
            v6 = Some((header.source, header.destination));
        }
        NetSlice::Arp(_) => panic!("no IP"),
    }
    match sliced.transport.expect("a transport") {
        TransportSlice::Tcp(tcp) => {
            let right = match (v4, v6) {
                (Some((from, to)), _) => tcp.calc_checksum_ipv4(from, to).unwrap(),
                (None, Some((from, to))) => tcp.calc_checksum_ipv6(from, to).unwrap(),
                (None, None) => panic!("no address"),
            };
            assert_eq!(tcp.checksum(), right, "TCP's checksum");
            Seen {
                id,
                sequence: tcp.sequence_number(),
                flags: tcp.slice()[13],
                ports: (tcp.source_port(), tcp.destination_port()),
                payload: tcp.payload().to_vec(),
            }
        }
        TransportSlice::Udp(udp) => {
            assert_eq!(usize::from(udp.length()), udp.payload().len() + 8);
            let header = udp.to_header();
            let right = match (v4, v6) {
                (Some((from, to)), _) => header.calc_checksum_ipv4_raw(from, to, udp.payload()).unwrap(),
                (None, Some((from, to))) => header.calc_checksum_ipv6_raw(from, to, udp.payload()).unwrap(),
                (None, None) => panic!("no address"),
            };
            assert_eq!(udp.checksum(), right, "UDP's checksum");
            let ports = (udp.source_port(), udp.destination_port());
            Seen { id, sequence: 0, flags: 0, ports, payload: udp.payload().to_vec() }
        }
        other => panic!("neither TCP nor UDP: {other:?}"),
    }
}

fn split_all(header: VnetHeader, packet: &[u8]) -> Result<Vec<Vec<u8>>, BadPacket> {
    let mut packets = Vec::new();
    let count = split(header, &mut packet.to_vec(), &mut Vec::new(), |packet| packets.push(packet.to_vec()))?;
    assert_eq!(count, packets.len());
    Ok(packets)
}

type Written = Vec<(VnetHeader, Vec<u8>)>;

fn gather_all<'a>(udp: bool, packets: impl IntoIterator<Item = &'a Vec<u8>>) -> Written {
    let mut coalescer = Coalescer::new(udp);
    let mut written = Written::new();
    let mut write = |header, packet: &[u8]| written.push((header, packet.to_vec()));
    for packet in packets {
        coalescer.push(packet, &mut write);
    }
    coalescer.flush(&mut write);
    coalescer.flush(&mut write);
    written
}

/// RFC 1071 as it is written: big-endian words, one after the other.
fn plain_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The sum of the pseudo header of a packet without options or extension headers.
fn plain_pseudo(packet: &[u8]) -> u16 {
    let (mut bytes, protocol, at) = match packet[0] >> 4 {
        4 => (packet[12..20].to_vec(), packet[9], 20),
        _ => (packet[8..40].to_vec(), packet[6], 40),
    };
    bytes.extend_from_slice(&((packet.len() - at) as u32).to_be_bytes());
    bytes.extend_from_slice(&[0, 0, 0, protocol]);
    plain_sum(&bytes)
}

/// Makes the checksums right again after a header was changed, where there still are some.
fn mend(packet: &mut [u8]) {
    let Some(version) = version(packet) else { return };
    let at = if version == 4 { 20 } else { 40 };
    if version == 4 {
        put_word(packet, 10, 0);
        let sum = plain_sum(&packet[..20]);
        put_word(packet, 10, !sum);
    }
    let field = match if version == 4 { packet[9] } else { packet[6] } {
        6 => at + 16,
        17 => at + 6,
        _ => return,
    };
    if packet.len() >= field + 2 {
        put_word(packet, field, plain_pseudo(packet));
        let sum = plain_sum(&packet[at..]);
        put_word(packet, field, !sum);
    }
}

fn bytes(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 8) as u8 ^ seed)).collect()
}

fn arb_flow() -> impl Strategy<Value = Flow> {
    (any::<[bool; 3]>(), 1..4_u16, 0..=10_usize).prop_map(|([v6, udp, df], port, words)| Flow {
        v6,
        udp,
        df: df && !v6,
        port,
        options: bytes(words * 4, 1),
    })
}

fn arb_any_vnet() -> impl Strategy<Value = VnetHeader> {
    let kind = prop_oneof![Just(0), Just(1), Just(4), Just(5), Just(0x81), Just(0x84), any::<u8>()];
    let place = || prop_oneof![Just(0_u16), Just(6), Just(16), Just(20), Just(40), 0..100_u16, any::<u16>()];
    (0..4_u8, kind, any::<u16>(), place(), place(), place()).prop_map(
        |(flags, gso_type, hdr_len, gso_size, csum_start, csum_offset)| VnetHeader {
            flags,
            gso_type,
            hdr_len,
            gso_size,
            csum_start,
            csum_offset,
        },
    )
}

/// One step of a stream: what the next packet of a flow is, and what happens to it.
#[derive(Debug, Clone)]
struct Step {
    flow: usize,
    size: usize,
    flags: u8,
    skip: bool,
    changes: Vec<(usize, u8)>,
    mended: bool,
}

fn arb_steps() -> impl Strategy<Value = Vec<Step>> {
    let size = prop_oneof![8 => Just(100_usize), 1 => Just(0_usize), 2 => 1..101_usize, 1 => 101..1500_usize];
    let flags = prop_oneof![12 => Just(ACK), 2 => Just(ACK | PSH), 1 => any::<u8>()];
    let changes = prop_oneof![8 => Just(Vec::new()), 1 => vec((0..1600_usize, any::<u8>()), 1..3),
        3 => vec((0..64_usize, any::<u8>()), 1..3)];
    let burst =
        (0..4_usize, vec((size, flags, proptest::bool::weighted(0.1), changes, any::<bool>()), 1..12))
            .prop_map(|(flow, packets)| {
                let step =
                    |(size, flags, skip, changes, mended)| Step { flow, size, flags, skip, changes, mended };
                packets.into_iter().map(step).collect::<Vec<_>>()
            });
    vec(burst, 1..12).prop_map(|bursts| bursts.concat())
}

/// The packets of a stream of flows, in order.
fn stream(flows: &[Flow], steps: &[Step]) -> Vec<Vec<u8>> {
    let mut at = vec![(0xfff8_u16, 0xffff_fe00_u32); flows.len()];
    let mut packets = Vec::new();
    for (number, step) in steps.iter().enumerate() {
        let flow = step.flow % flows.len();
        let (id, sequence) = &mut at[flow];
        let mut packet = flows[flow].packet(*id, *sequence, step.flags, &bytes(step.size, number as u8));
        *id = id.wrapping_add(1 + u16::from(step.skip));
        *sequence = sequence.wrapping_add(step.size as u32 + u32::from(step.skip));
        for (place, value) in &step.changes {
            let place = place % packet.len();
            packet[place] = *value;
        }
        if step.mended {
            mend(&mut packet);
        }
        packets.push(packet);
    }
    packets
}

/// Splits what was written again. In super-packets with DF the identification is not kept, and set to 0 here.
fn undo(written: &Written, sent: &[Vec<u8>]) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let (mut got, mut expected) = (Vec::new(), Vec::new());
    let mut sent = sent.iter();
    for (header, packet) in written {
        let lone = *header == VnetHeader::default();
        let packets = if lone { vec![packet.clone()] } else { split_all(*header, packet).unwrap() };
        assert!(lone || packets.len() > 1);
        for mut packet in packets {
            let mut was = sent.next().cloned().unwrap_or_default();
            for packet in [&mut packet, &mut was] {
                if !lone && packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
                    put_word(packet, 4, 0);
                    put_word(packet, 10, 0);
                }
            }
            got.push(packet);
            expected.push(was);
        }
    }
    expected.extend(sent.cloned());
    (got, expected)
}

proptest! {
    #[test]
    fn sums_are_those_of_rfc_1071(bytes in vec(any::<u8>(), 0..300), from in 0..8_usize) {
        let bytes = &bytes[from.min(bytes.len())..];
        prop_assert_eq!(Sum::of(bytes).fold(), plain_sum(bytes));
        let (head, tail) = bytes.split_at(bytes.len() / 4 * 2);
        prop_assert_eq!(Sum::of(head).plus(Sum::of(tail)).fold(), plain_sum(bytes));
    }

    #[test]
    fn vnet_header_survives_a_round_trip(raw: [u8; 10]) {
        prop_assert_eq!(VnetHeader::read(raw).write(), raw);
    }

    #[test]
    fn split_gives_packets_that_the_witness_confirms(
        flow in arb_flow(), id: u16, sequence: u32, flags: u8, length in 1..20_000_usize, size in 1..3000_u16,
        hdr_len: u16, ecn: bool, partial: bool,
    ) {
        let payload = bytes(length, id as u8);
        let packet = flow.packet(id, sequence, flags, &payload);
        let mut header = VnetHeader { hdr_len, ..flow.vnet(size) };
        if ecn && !flow.udp {
            header.gso_type |= ECN;
        }
        if !partial {
            (header.flags, header.csum_start, header.csum_offset) = (2, 0, 0);
        }
        let size = usize::from(size);
        let packets = split_all(header, &packet).unwrap();
        prop_assert_eq!(packets.len(), length.div_ceil(size));
        let mut joined = Vec::new();
        for (index, packet) in packets.iter().enumerate() {
            let seen = witness(packet);
            let (first, last) = (index == 0, index + 1 == packets.len());
            prop_assert_eq!(seen.payload.len(), if last { length - index * size } else { size });
            if !flow.v6 {
                prop_assert_eq!(seen.id, id.wrapping_add(index as u16));
            }
            if !flow.udp {
                prop_assert_eq!(seen.sequence, sequence.wrapping_add((index * size) as u32));
                let kept = flags & !(if last { 0 } else { FIN | PSH }) & !(if first { 0 } else { CWR });
                prop_assert_eq!(seen.flags, kept);
                prop_assert_eq!(&packet[flow.transport_at() + 20..flow.header_len()], &flow.options);
            }
            prop_assert_eq!(seen.ports.0, flow.port);
            joined.extend(seen.payload);
        }
        prop_assert_eq!(joined, payload);
    }

    #[test]
    fn checksum_left_to_the_device_is_finished(
        flow in arb_flow(), flags: u8, payload in vec(any::<u8>(), 0..2000),
    ) {
        let whole = flow.packet(1, 2, flags, &payload);
        let mut partial = whole.clone();
        put_word(&mut partial, flow.checksum_at(), plain_pseudo(&whole));
        prop_assert_eq!(split_all(flow.partial(), &partial).unwrap(), [whole]);
    }

    #[test]
    fn split_then_gathered_is_the_super_packet(
        flow in arb_flow(), id: u16, sequence: u32, push: bool, length in 1..60_000_usize,
        size in 100..9000_u16,
    ) {
        let payload = bytes(length, id as u8);
        let flags = if push { ACK | PSH } else { ACK };
        let mut packet = flow.packet(id, sequence, flags, &payload);
        let packets = split_all(flow.vnet(size), &packet).unwrap();
        let written = gather_all(true, &packets);
        prop_assert_eq!(written.len(), 1);
        if packets.len() > 1 {
            let pseudo = plain_pseudo(&packet);
            put_word(&mut packet, flow.checksum_at(), pseudo);
            prop_assert_eq!(written[0].0, flow.vnet(size));
        } else {
            prop_assert_eq!(written[0].0, VnetHeader::default());
        }
        prop_assert_eq!(&written[0].1, &packet);
    }

    #[test]
    fn gathered_then_split_is_what_was_sent(
        flows in vec(arb_flow(), 1..4), steps in arb_steps(), udp: bool,
    ) {
        let sent = stream(&flows, &steps);
        let written = gather_all(udp, &sent);
        for (header, packet) in written.iter().filter(|(header, _)| *header != VnetHeader::default()) {
            prop_assert!(packet.len() <= 65_535);
            prop_assert!(udp || header.gso_type != UDP_L4);
            // The whole is one right packet once its checksum is finished, as the kernel does without GSO.
            let alone = VnetHeader { gso_type: 0, ..*header };
            witness(&split_all(alone, packet).unwrap()[0]);
        }
        let (got, expected) = undo(&written, &sent);
        prop_assert_eq!(got, expected);
    }

    #[test]
    fn any_bytes_are_legal_input(
        header in arb_any_vnet(), mut packet in vec(any::<u8>(), 0..300),
        first in prop_oneof![Just(0x45), Just(0x60), any::<u8>()], flow in arb_flow(),
        changes in vec((0..120_usize, any::<u8>()), 0..4), cut in 0..400_usize, mended: bool,
    ) {
        if let Some(byte) = packet.first_mut() {
            *byte = first;
        }
        let mut near = flow.packet(1, 2, ACK, &bytes(200, 0));
        for (place, value) in changes {
            let place = place % near.len();
            near[place] = value;
        }
        near.truncate(cut);
        if mended {
            mend(&mut near);
        }
        for packet in [&packet, &near] {
            let most = packet.len().max(1);
            for header in [header, flow.vnet(header.gso_size), flow.partial()] {
                if let Ok(packets) = split_all(header, packet) {
                    prop_assert!((1..=most).contains(&packets.len()));
                    prop_assert!(packets.iter().all(|part| part.len() <= packet.len()));
                }
            }
            prop_assert_eq!(destination(packet).is_some(), version(packet).is_some());
            prop_assert_eq!(destination(packet).is_some(), version(packet).is_some());
            prop_assert!(total_len(packet).is_none_or(|length| length <= packet.len() && length >= 20));
        }
        let sent = [near.clone(), packet.clone(), packet, near];
        let (got, expected) = undo(&gather_all(true, &sent), &sent);
        prop_assert_eq!(got, expected);
    }
}

#[test]
fn header_says_version_addresses_and_length() {
    let v4 = Flow { udp: true, port: 1, ..Flow::default() }.packet(1, 0, 0, b"hello");
    let v6 = Flow { v6: true, port: 1, ..Flow::default() }.packet(1, 0, ACK, b"hello");
    assert_eq!((version(&v4), version(&v6)), (Some(4), Some(6)));
    assert_eq!(destination(&v4), "10.2.0.9".parse().ok());
    assert_eq!(destination(&v6), "fd00:0:0:2::9".parse().ok());
    for mut packet in [v4, v6] {
        let (length, fixed) = (packet.len(), if packet[0] == 0x45 { 20 } else { 40 });
        packet.extend_from_slice(&[0; 11]);
        assert_eq!(total_len(&packet), Some(length), "padding does not count");
        assert_eq!(total_len(&packet[..length - 1]), None, "cut short");
        assert_eq!(version(&packet[..fixed - 1]), None);
        assert_eq!(destination(&packet[..fixed - 1]), None);
    }
    let mut short = Flow::default().packet(1, 0, ACK, b"");
    put_word(&mut short, 2, 19);
    assert_eq!(total_len(&short), None, "less than the header");
    put_word(&mut short, 2, 20);
    assert_eq!(total_len(&short), Some(20));
    short[0] = 0x46;
    assert_eq!(total_len(&short), None, "less than the header with its options");
    short[0] = 0x44;
    assert_eq!(total_len(&short), None, "a header of 16 bytes");
    assert_eq!((version(&[]), version(&[0x50; 60])), (None, None));
}

#[test]
fn packet_without_offloads_is_given_out_as_it_is() {
    let mut packet = Flow::default().packet(1, 0, ACK, b"hello");
    packet[30] ^= 1;
    assert_eq!(split_all(VnetHeader::default(), &packet).unwrap(), [packet.clone()]);
    let verified = VnetHeader { flags: 2, csum_start: 9, ..VnetHeader::default() };
    assert_eq!(split_all(verified, &packet).unwrap(), [packet]);
}

#[test]
fn udp_checksum_of_zero_is_sent_as_ones() {
    for v6 in [false, true] {
        let flow = Flow { v6, udp: true, port: 9, ..Flow::default() };
        let probe = flow.packet(5, 0, 0, &[0; 4]);
        let mut payload = [0; 4];
        payload[..2].copy_from_slice(&probe[flow.checksum_at()..][..2]);
        let whole = flow.packet(5, 0, 0, &payload);
        assert_eq!(word(&whole, flow.checksum_at()), 0xffff, "the witness knows");
        let mut partial = whole.clone();
        put_word(&mut partial, flow.checksum_at(), plain_pseudo(&whole));
        for header in [flow.partial(), flow.vnet(4)] {
            assert_eq!(split_all(header, &partial).unwrap().concat(), whole);
        }
        let next = flow.packet(6, 0, 0, &payload);
        let written = gather_all(true, [&whole, &next]);
        assert_eq!(written.len(), 1);
        assert_eq!(split_all(written[0].0, &written[0].1).unwrap(), [whole, next]);
    }
}

#[test]
fn ipv6_extension_headers_and_ipv4_options_stay_in_every_segment() {
    let flow = Flow { v6: true, port: 9, ..Flow::default() };
    let payload = bytes(2500, 3);
    let mut packet = flow.packet(0, 10, ACK, &payload);
    // Destination options of 16 bytes, then a routing header that is used up.
    let mut extensions = vec![43, 1, 1, 12];
    extensions.extend([0; 12]);
    extensions.extend([6, 0, 4, 0, 0, 0, 0, 0]);
    packet.splice(40..40, extensions.clone());
    packet[6] = 60;
    let header = VnetHeader { csum_start: 64, ..flow.vnet(1000) };
    let packets = split_all(header, &packet).unwrap();
    assert_eq!(packets.len(), 3);
    let joined: Vec<u8> = packets.iter().flat_map(|packet| witness(packet).payload).collect();
    assert_eq!(joined, payload);
    assert!(packets.iter().all(|packet| packet[40..64] == extensions));
    assert_eq!(split_all(flow.vnet(1000), &packet), Err(BadPacket::BadOffsets));
    packet[40 + 16 + 3] = 1;
    assert_eq!(split_all(header, &packet), Err(BadPacket::WrongProtocol), "another hop to go");

    let flow = Flow { udp: true, port: 9, ..Flow::default() };
    let mut packet = flow.packet(7, 0, 0, &payload);
    packet.splice(20..20, [1; 8]);
    packet[0] = 0x47;
    let packets = split_all(VnetHeader { csum_start: 28, ..flow.vnet(1000) }, &packet).unwrap();
    let joined: Vec<u8> = packets.iter().flat_map(|packet| witness(packet).payload).collect();
    assert_eq!(joined, payload);
    assert!(packets.iter().all(|packet| packet[20..28] == [1; 8]));
}

#[test]
fn what_cannot_be_split_is_an_error() {
    let flow = Flow { port: 9, ..Flow::default() };
    let packet = flow.packet(1, 2, ACK, &bytes(300, 0));
    let good = flow.vnet(100);
    let changed = |at: usize, value: u8| {
        let mut packet = packet.clone();
        packet[at] = value;
        packet
    };
    let udp = Flow { udp: true, port: 9, ..Flow::default() };
    let v6 = Flow { v6: true, port: 9, ..Flow::default() };
    let mut long_extension = v6.packet(1, 2, ACK, &[0; 99]);
    (long_extension[6], long_extension[40], long_extension[41]) = (60, 6, 255);
    let mut no_extension = long_extension[..47].to_vec();
    no_extension[41] = 0;
    let cases = [
        (good, Vec::new(), BadPacket::Truncated),
        (good, packet[..19].to_vec(), BadPacket::Truncated),
        (good, packet[..32].to_vec(), BadPacket::Truncated),
        (good, packet[..39].to_vec(), BadPacket::Truncated),
        (good, packet[..40].to_vec(), BadPacket::NoPayload),
        (good, changed(0, 0x55), BadPacket::NotIp),
        (good, changed(0, 0x44), BadPacket::BadOffsets),
        (good, changed(0, 0x46), BadPacket::BadOffsets),
        (good, changed(9, 17), BadPacket::WrongProtocol),
        (good, changed(6, 0x20), BadPacket::WrongProtocol),
        (good, changed(7, 1), BadPacket::WrongProtocol),
        (good, changed(32, 0x40), BadPacket::BadOffsets),
        (good, packet.repeat(200), BadPacket::TooLong),
        (
            VnetHeader::default(),
            [packet.clone(), vec![0; 65_536 - packet.len()]].concat(),
            BadPacket::TooLong,
        ),
        (good, [&[0x4b], &packet[1..40]].concat(), BadPacket::Truncated),
        (v6.vnet(9), long_extension, BadPacket::Truncated),
        (v6.vnet(9), no_extension, BadPacket::Truncated),
        (VnetHeader { gso_size: 0, ..good }, packet.clone(), BadPacket::NoPayload),
        (VnetHeader { gso_type: 3, ..good }, packet.clone(), BadPacket::UnknownGso(3)),
        (VnetHeader { gso_type: ECN, ..good }, packet.clone(), BadPacket::UnknownGso(ECN)),
        (VnetHeader { gso_type: TCPV6, ..good }, packet.clone(), BadPacket::WrongProtocol),
        (VnetHeader { gso_type: UDP_L4, ..good }, packet.clone(), BadPacket::WrongProtocol),
        (VnetHeader { csum_start: 24, ..good }, packet.clone(), BadPacket::BadOffsets),
        (VnetHeader { csum_offset: 6, ..good }, packet.clone(), BadPacket::BadOffsets),
        (
            VnetHeader { gso_type: 0x85, ..udp.vnet(9) },
            udp.packet(1, 0, 0, b"a"),
            BadPacket::UnknownGso(0x85),
        ),
        (v6.vnet(9), packet.clone(), BadPacket::WrongProtocol),
        (VnetHeader { csum_start: 19, ..flow.partial() }, packet.clone(), BadPacket::BadOffsets),
        (VnetHeader { csum_start: 330, ..flow.partial() }, packet.clone(), BadPacket::BadOffsets),
        (
            VnetHeader { csum_start: 39, ..v6.partial() },
            v6.packet(1, 0, ACK, &[0; 99]),
            BadPacket::BadOffsets,
        ),
        (
            VnetHeader { csum_start: u16::MAX, csum_offset: u16::MAX, ..flow.partial() },
            packet.clone(),
            BadPacket::BadOffsets,
        ),
    ];
    for (index, (header, packet, error)) in cases.into_iter().enumerate() {
        assert_eq!(split_all(header, &packet), Err(error), "case {index}");
    }
}

#[test]
fn split_copies_headers_only_into_a_scratch_that_does_not_grow_again() {
    let flow = Flow { port: 9, options: bytes(12, 0), ..Flow::default() };
    let mut scratch = Vec::new();
    let packet = flow.packet(1, 2, ACK, &bytes(60_000, 0));
    split(flow.vnet(1400), &mut packet.clone(), &mut scratch, |_| ()).unwrap();
    let place = (scratch.as_ptr(), scratch.capacity());
    assert!(scratch.capacity() < 128);
    split(flow.vnet(1), &mut packet.clone(), &mut scratch, |_| ()).unwrap();
    assert_eq!(place, (scratch.as_ptr(), scratch.capacity()));
}

#[test]
fn wrong_checksums_pass_as_they_are() {
    for (v6, udp) in [(false, false), (false, true), (true, false), (true, true)] {
        let flow = Flow { v6, udp, port: 9, ..Flow::default() };
        let right: Vec<_> =
            (0..3).map(|i| flow.packet(i, u32::from(i) * 100, ACK, &bytes(100, i as u8))).collect();
        assert_eq!(gather_all(true, &right).len(), 1);
        for index in 0..3 {
            let mut packets = right.clone();
            let last = packets[index].len() - 1;
            packets[index][last] ^= 1;
            let written = gather_all(true, &packets);
            assert!(written.contains(&(VnetHeader::default(), packets[index].clone())));
            let (got, expected) = undo(&written, &packets);
            assert_eq!(got, expected);
        }
        // UDP without a checksum has nothing that could be verified.
        let mut packets = right.clone();
        put_word(&mut packets[1], flow.checksum_at(), 0);
        assert_eq!(gather_all(true, &packets).len(), 3);
        if !v6 {
            let mut packets = right;
            packets[2][10] ^= 1;
            assert_eq!(gather_all(true, &packets).len(), 2, "IPv4's own checksum");
        }
    }
}

#[test]
fn ones_for_a_checksum_of_zero_pass_alone() {
    let flow = Flow { port: 9, ..Flow::default() };
    let probe = flow.packet(1, 100, ACK, &[0; 100]);
    let mut payload = [0; 100];
    payload[..2].copy_from_slice(&probe[36..38]);
    let mut zero = flow.packet(1, 100, ACK, &payload);
    assert_eq!(word(&zero, 36), 0);
    let first = flow.packet(0, 0, ACK, &[1; 100]);
    assert_eq!(gather_all(true, [&first, &zero]).len(), 1);
    put_word(&mut zero, 36, 0xffff);
    assert_eq!(gather_all(true, [&first, &zero])[1], (VnetHeader::default(), zero));

    // The same for IPv4's own checksum, by an identification that makes it 0.
    let probe = flow.packet(0, 100, ACK, &[1; 100]);
    let id = word(&probe, 10);
    let mut zero = flow.packet(id, 100, ACK, &[1; 100]);
    assert_eq!(word(&zero, 10), 0);
    let first = flow.packet(id.wrapping_sub(1), 0, ACK, &[1; 100]);
    assert_eq!(gather_all(true, [&first, &zero]).len(), 1);
    put_word(&mut zero, 10, 0xffff);
    assert_eq!(gather_all(true, [&first, &zero])[1], (VnetHeader::default(), zero));
}

#[test]
fn packets_that_differ_in_a_header_are_not_gathered() {
    let tcp4: &[usize] = &[1, 5, 6, 8, 12, 15, 16, 19, 20, 22, 24, 27, 28, 31, 34, 35, 38, 39, 40, 43];
    let tcp6: &[usize] = &[0, 1, 2, 3, 7, 8, 23, 24, 39, 40, 42, 44, 47, 48, 51, 54, 58, 60];
    let cases = [
        (false, false, tcp4),
        (true, false, tcp6),
        (false, true, &[1, 5, 6, 8, 12, 16, 20, 22]),
        (true, true, &[1, 3, 7, 8, 24, 40, 42]),
    ];
    for (v6, udp, places) in cases {
        let flow = Flow { v6, udp, port: 9, options: vec![1; 4], ..Flow::default() };
        let first = flow.packet(1, 0, ACK, &[1; 100]);
        let second = flow.packet(2, 100, ACK, &[2; 100]);
        assert_eq!(gather_all(true, [&first, &second]).len(), 1);
        for place in places {
            let mut other = second.clone();
            // The lowest bit but in IPv6's version and IPv4's flags, where it would mean something else.
            other[*place] ^= if *place == 6 { 0x40 } else { 1 };
            mend(&mut other);
            if v6 && *place == 0 {
                other = second.clone();
                other[0] |= 0x0f;
            }
            let written = gather_all(true, [&first, &other]);
            let alone = VnetHeader::default();
            assert_eq!(written, [(alone, first.clone()), (alone, other)], "v6 {v6} udp {udp} {place}");
        }
    }
}

#[test]
fn flags_other_than_ack_and_psh_pass_alone() {
    let flow = Flow { port: 9, ..Flow::default() };
    let first = flow.packet(1, 0, ACK, &[1; 100]);
    for flags in (0..=u8::MAX).filter(|flags| flags & !PSH != ACK) {
        let second = flow.packet(2, 100, flags, &[2; 100]);
        assert_eq!(gather_all(true, [&first, &second]).len(), 2, "{flags:#x}");
        assert_eq!(gather_all(true, [&flow.packet(0, 0, flags, &[1; 100]), &second]).len(), 2, "{flags:#x}");
    }
}

#[test]
fn fragments_options_padding_and_empty_packets_pass_alone() {
    let flow = Flow { port: 9, ..Flow::default() };
    let packets = [flow.packet(1, 0, ACK, &[1; 100]), flow.packet(2, 100, ACK, &[2; 100])];
    for (place, value) in [(6, 0x20), (6, 0x80), (7, 1), (9, 50), (32, 0x40)] {
        let mut packets = packets.clone();
        for packet in &mut packets {
            packet[place] = value;
            mend(packet);
        }
        assert_eq!(gather_all(true, &packets).len(), 2, "{place}");
    }
    let mut padded = packets.clone();
    padded[1].push(0);
    assert_eq!(gather_all(true, &padded).len(), 2);
    let empty = flow.packet(2, 100, ACK, &[]);
    assert_eq!(gather_all(true, [&packets[0], &empty]).len(), 2);
    assert_eq!(gather_all(true, [&empty, &flow.packet(3, 100, ACK, &[])]).len(), 2);
}

#[test]
fn push_or_a_short_payload_ends_the_super_packet() {
    for (flags, size) in [(ACK | PSH, 100), (ACK, 99)] {
        let flow = Flow { port: 9, ..Flow::default() };
        let mut coalescer = Coalescer::new(false);
        let mut written = Written::new();
        let mut write = |header, packet: &[u8]| written.push((header, packet.to_vec()));
        coalescer.push(&flow.packet(1, 0, ACK, &[1; 100]), &mut write);
        coalescer.push(&flow.packet(2, 100, flags, &bytes(size, 0)), &mut write);
        coalescer.push(&flow.packet(3, 100 + size as u32, ACK, &[3; 50]), &mut write);
        assert_eq!(written.len(), 1, "written at once, and the next one begins anew");
        assert_eq!(written[0].1[33], flags);
        assert_eq!(written[0].0, flow.vnet(100));
    }
    let flow = Flow { port: 9, ..Flow::default() };
    let longer = [flow.packet(1, 0, ACK, &[1; 100]), flow.packet(2, 100, ACK, &[2; 101])];
    assert_eq!(gather_all(false, &longer).len(), 2);
    let pushed = [flow.packet(1, 0, ACK | PSH, &[1; 100]), flow.packet(2, 100, ACK, &[2; 100])];
    assert_eq!(gather_all(false, &pushed).len(), 2);
}

#[test]
fn udp_is_gathered_only_where_the_kernel_takes_it() {
    let flow = Flow { udp: true, port: 9, ..Flow::default() };
    let packets = [flow.packet(1, 0, 0, &[1; 100]), flow.packet(2, 0, 0, &[2; 100])];
    assert_eq!(gather_all(true, &packets).len(), 1);
    assert_eq!(gather_all(false, &packets).len(), 2);
}

#[test]
fn identification_counts_unless_df_makes_it_meaningless() {
    for df in [false, true] {
        let flow = Flow { df, port: 9, ..Flow::default() };
        let with = |ids: [u16; 3]| {
            let packet = |(i, id): (u32, u16)| flow.packet(id, i * 100, ACK, &[1; 100]);
            gather_all(false, &(0..).zip(ids).map(packet).collect::<Vec<_>>()).len()
        };
        assert_eq!(with([0xffff, 0, 1]), 1, "round the end");
        assert_eq!(with([0, 0, 0]), if df { 1 } else { 3 });
        assert_eq!(with([9, 3, 4]), if df { 1 } else { 2 });
    }
}

#[test]
fn super_packet_is_never_longer_than_ip_allows() {
    for (v6, udp) in [(false, false), (false, true), (true, false), (true, true)] {
        let flow = Flow { v6, udp, port: 9, ..Flow::default() };
        let sent: Vec<_> =
            (0..120).map(|i| flow.packet(i, u32::from(i) * 1400, ACK, &bytes(1400, i as u8))).collect();
        let written = gather_all(true, &sent);
        assert_eq!(written.len(), 3, "46 packets of 1,400 bytes fit, and 28 are left");
        assert!(written.iter().all(|(_, packet)| packet.len() <= 65_535));
        let (got, expected) = undo(&written, &sent);
        assert_eq!(got, expected);
        // Payloads of one byte: as many as there are, and no count overflows.
        let sent: Vec<_> = (0..u16::MAX).map(|i| flow.packet(i, i.into(), ACK, &[i as u8])).collect();
        assert_eq!(gather_all(true, &sent).len(), 2);
    }
    let flow = Flow { v6: true, port: 9, ..Flow::default() };
    let longest = flow.packet(0, 0, ACK, &vec![0; 65_515]);
    assert_eq!(longest.len(), 65_575);
    assert_eq!(gather_all(true, [&longest]), [(VnetHeader::default(), longest.clone())]);
    let packets = split_all(flow.vnet(1400), &longest).unwrap();
    assert_eq!(packets.iter().map(|packet| witness(packet).payload.len()).sum::<usize>(), 65_515);
}

#[test]
fn other_protocols_and_other_packets_pass_in_order() {
    let flow = Flow { port: 9, ..Flow::default() };
    let mut icmp = Vec::new();
    PacketBuilder::ipv4([10, 1, 0, 7], [10, 2, 0, 9], 64)
        .icmpv4_echo_request(1, 2)
        .write(&mut icmp, b"hello")
        .unwrap();
    let mut unknown = icmp.clone();
    unknown[9] = IpNumber::GRE.0;
    let data = |i: u32| flow.packet(i as u16, i * 100, ACK, &[1; 100]);
    let sent = [data(0), data(1), icmp, data(2), data(3), vec![], vec![1, 2, 3], unknown, data(4)];
    let written = gather_all(true, &sent);
    assert_eq!(written.len(), 7, "two pairs, and five alone");
    let (got, expected) = undo(&written, &sent);
    assert_eq!(got, expected);
}
