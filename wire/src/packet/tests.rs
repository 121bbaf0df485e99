//! Laws of taking apart and putting together, with etherparse as the witness of lengths and checksums.

use etherparse::{NetHeaders, PacketBuilder, PacketHeaders, TransportHeader};
use proptest::collection::vec;
use proptest::prelude::*;

use super::segment::{GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM};
use super::*;

/// A packet of a flow: its own checksums are right.
fn packet(v4: bool, tcp: bool, port: u16, number: u32, payload: &[u8]) -> Vec<u8> {
    let builder = if v4 {
        let header = etherparse::Ipv4Header {
            source: [10, 32, 0, 5],
            destination: [10, 33, 0, 9],
            time_to_live: 63,
            identification: number as u16,
            dont_fragment: true,
            ..Default::default()
        };
        PacketBuilder::ip(etherparse::IpHeaders::Ipv4(header, Default::default()))
    } else {
        PacketBuilder::ipv6([0xfd; 16], [0xfe; 16], 63)
    };
    let mut bytes = Vec::new();
    if tcp {
        let sequence = u32::MAX - 3000 + number * payload.len() as u32;
        let builder = builder.tcp(port, 80, sequence, 502).ack(77);
        builder.write(&mut bytes, payload).expect("the packet is whole");
    } else {
        builder.udp(port, 53).write(&mut bytes, payload).expect("the packet is whole");
    }
    bytes
}

/// The super-packet that the kernel would hand over: the checksum is the sum of the pseudo-header.
fn super_packet(v4: bool, tcp: bool, payload: &[u8], size: u16) -> (VnetHeader, Vec<u8>) {
    let mut bytes = packet(v4, tcp, 1000, 0, payload);
    let transport = if v4 { 20 } else { 40 };
    let (protocol, csum_offset) = if tcp { (TCP, 16) } else { (UDP, 6) };
    let sum = checksum::fold(checksum::pseudo_header(&bytes, protocol, bytes.len() - transport));
    put(&mut bytes, transport + csum_offset, &sum.to_be_bytes());
    let gso_type = match (tcp, v4) {
        (true, true) => GSO_TCPV4,
        (true, false) => GSO_TCPV6,
        _ => GSO_UDP_L4,
    };
    let header = VnetHeader {
        flags: NEEDS_CSUM,
        gso_type,
        hdr_len: 0,
        gso_size: size,
        csum_start: transport as u16,
        csum_offset: csum_offset as u16,
    };
    (header, bytes)
}

/// Panics unless an independent parser finds the packet whole with right checksums; returns its payload.
fn witnessed(bytes: &[u8]) -> Vec<u8> {
    let headers = PacketHeaders::from_ip_slice(bytes).expect("it parses");
    let payload = headers.payload.slice();
    let net = headers.net.expect("there is an IP header");
    if let NetHeaders::Ipv4(header, _) = &net {
        assert_eq!(usize::from(header.total_len), bytes.len());
        assert_eq!(header.header_checksum, header.calc_header_checksum());
    }
    let (told, computed) = match (&net, headers.transport.expect("there is a transport header")) {
        (NetHeaders::Ipv4(ip, _), TransportHeader::Tcp(tcp)) => {
            (tcp.checksum, tcp.calc_checksum_ipv4(ip, payload))
        }
        (NetHeaders::Ipv6(ip, _), TransportHeader::Tcp(tcp)) => {
            (tcp.checksum, tcp.calc_checksum_ipv6(ip, payload))
        }
        (NetHeaders::Ipv4(ip, _), TransportHeader::Udp(udp)) => {
            (udp.checksum, udp.calc_checksum_ipv4(ip, payload))
        }
        (NetHeaders::Ipv6(ip, _), TransportHeader::Udp(udp)) => {
            (udp.checksum, udp.calc_checksum_ipv6(ip, payload))
        }
        other => panic!("no such packet was made: {other:?}"),
    };
    assert_eq!(told, computed.expect("the length is in range"));
    payload.to_vec()
}

fn taken_apart(header: VnetHeader, packet: &[u8]) -> Result<Vec<Vec<u8>>, BadPacket> {
    let (mut packet, mut scratch, mut parts) = (packet.to_vec(), Vec::new(), Vec::new());
    let count = split(header, &mut packet, &mut scratch, |part| parts.push(part.to_vec()))?;
    assert_eq!(count, parts.len());
    Ok(parts)
}

fn put_together(packets: &[Vec<u8>]) -> Vec<(VnetHeader, Vec<u8>)> {
    let (mut coalescer, mut written) = (Coalescer::new(true), Vec::new());
    let mut write = |header, packet: &[u8]| written.push((header, packet.to_vec()));
    packets.iter().for_each(|packet| coalescer.push(packet, &mut write));
    coalescer.flush(&mut write);
    written
}

proptest! {
    #[test]
    fn what_is_taken_apart_is_whole_and_in_order(
        v4: bool, tcp: bool, payload in vec(any::<u8>(), 1..9000), size in 1u16..2000,
    ) {
        prop_assume!(payload.len() / usize::from(size) < 200);
        let (header, bytes) = super_packet(v4, tcp, &payload, size);
        let parts = taken_apart(header, &bytes).expect("the super-packet is well made");
        let payloads: Vec<Vec<u8>> = parts.iter().map(|part| witnessed(part)).collect();
        prop_assert_eq!(payloads.concat(), payload);
        let (last, others) = payloads.split_last().expect("there is a payload");
        prop_assert!(others.iter().all(|part| part.len() == usize::from(size)) && last.len() <= usize::from(size));
        if v4 {
            let numbers: Vec<u16> = parts.iter().map(|part| u16_at(part, 4).expect("a header")).collect();
            prop_assert!(numbers.windows(2).all(|pair| pair[1] == pair[0].wrapping_add(1)));
        }
        if tcp {
            let at = if v4 { 20 } else { 40 };
            let flags: Vec<u8> = parts.iter().map(|part| part[at + 13]).collect();
            prop_assert!(flags.iter().all(|flags| *flags == 16));
            let sequences: Vec<u32> = parts.iter().map(|part| u32_at(part, at + 4).expect("a header")).collect();
            prop_assert!(sequences.windows(2).all(|pair| pair[1] == pair[0].wrapping_add(size.into())));
        }
    }

    #[test]
    fn a_super_packet_comes_back_from_its_parts(
        v4: bool, tcp: bool, payload in vec(any::<u8>(), 1..9000), size in 200u16..2000,
    ) {
        prop_assume!(tcp || payload.len().div_ceil(usize::from(size)) <= 64);
        let (header, bytes) = super_packet(v4, tcp, &payload, size);
        let parts = taken_apart(header, &bytes).expect("the super-packet is well made");
        let whole = put_together(&parts);
        prop_assert_eq!(whole.len(), 1);
        if parts.len() > 1 {
            prop_assert_eq!(&whole[0].1, &bytes);
            prop_assert_eq!(VnetHeader { hdr_len: 0, ..whole[0].0 }, header);
        }
    }

    #[test]
    fn any_stream_comes_back_as_it_was(
        stream in vec((any::<bool>(), any::<bool>(), 0u16..2, 0u32..4, 1usize..4, any::<bool>()), 1..60),
    ) {
        let packets: Vec<Vec<u8>> = stream
            .iter()
            .scan([[[0u32; 2]; 2]; 2], |next, (v4, tcp, port, skip, length, spoil)| {
                let number = &mut next[usize::from(*v4)][usize::from(*tcp)][usize::from(*port)];
                // Now and then one is lost, and lengths differ.
                *number += if *skip == 0 { 2 } else { 1 };
                let mut bytes = packet(*v4, *tcp, *port, *number, &vec![*number as u8; if *length == 1 { 50 } else { 100 }]);
                if *spoil && *skip == 3 {
                    *bytes.last_mut().expect("a packet has bytes") ^= 1;
                }
                Some(bytes)
            })
            .collect();
        let whole = put_together(&packets);
        let back: Vec<Vec<u8>> = whole
            .iter()
            .flat_map(|(header, packet)| taken_apart(*header, packet).expect("what is put together is well made"))
            .collect();
        prop_assert_eq!(back, packets);
    }

    #[test]
    fn nothing_that_comes_from_a_device_panics(head: [u8; 10], mut bytes in vec(any::<u8>(), 0..200), kind in 0usize..7) {
        let mut header = VnetHeader::read(head);
        header.gso_type = [header.gso_type, 0, 1, 4, 5, 0x81, 3][kind];
        prop_assert_eq!(VnetHeader::read(header.write()), header);
        if let Some(first) = bytes.first_mut() {
            *first = if kind % 2 == 0 { 0x45 } else { 0x60 };
        }
        drop(taken_apart(header, &bytes));
        let whole = put_together(&[bytes.clone(), bytes.clone()]);
        prop_assert_eq!(whole.len(), 2);
        prop_assert!(source(&bytes).is_some() == version(&bytes).is_some());
    }
}

#[test]
fn only_the_last_packet_finishes_and_pushes() {
    let (header, mut bytes) = super_packet(true, true, &[7; 250], 100);
    bytes[20 + 13] |= 1 | 8 | 0x80; // FIN, PSH, CWR
    let parts = taken_apart(header, &bytes).expect("the super-packet is well made");
    let flags: Vec<u8> = parts.iter().map(|part| part[20 + 13]).collect();
    assert_eq!(flags, [16 | 0x80, 16, 16 | 1 | 8]);
}

#[test]
fn a_plain_packet_gets_the_rest_of_its_checksum() {
    for (v4, tcp) in [(true, true), (true, false), (false, true), (false, false)] {
        let (header, bytes) = super_packet(v4, tcp, b"hello", 0);
        let plain = VnetHeader { gso_type: 0, ..header };
        let parts = taken_apart(plain, &bytes).expect("the packet is well made");
        assert_eq!(witnessed(&parts[0]), b"hello");
    }
}

#[test]
fn a_wrong_checksum_is_not_mended() {
    let mut packets: Vec<Vec<u8>> = (0..4).map(|number| packet(true, true, 9, number, &[1; 100])).collect();
    packets[2][60] ^= 0x40;
    let whole = put_together(&packets);
    assert_eq!(whole.len(), 3);
    assert_eq!(whole[1], (VnetHeader::default(), packets[2].clone()));
}
