//! What comes to a tunnel from either side: any datagram, and any (super-)packet of the device. Nothing panics, nothing opens
//! but what the peer sealed, and that once; what was split gathers to what it was.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_daemon::tunnel::fuzz::End;
use weft_wire::packet::{Coalescer, VnetHeader, split};

/// An ICMP echo request from 10.77.1.1 to 10.77.2.1 with a payload.
fn echo(payload: &[u8]) -> Vec<u8> {
    let length = 28 + payload.len() as u16;
    let mut packet =
        vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 10, 77, 1, 1, 10, 77, 2, 1, 8, 0, 0, 0, 0, 0, 0, 0];
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    packet.extend_from_slice(payload);
    packet
}

/// Two ends with a session between them.
fn met() -> (End, End) {
    let (mut one, mut two) = (End::new(1, 2), End::new(2, 1));
    let mut to_two = one.seal(VnetHeader::default(), &mut echo(b"hello"));
    for _ in 0..4 {
        let to_one: Vec<_> = to_two.iter().flat_map(|datagram| two.open(1, datagram).1).collect();
        to_two = to_one.iter().flat_map(|datagram| one.open(2, datagram).1).collect();
    }
    (one, two)
}

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, rest)) = bytes.split_first() else { return };
    match kind % 4 {
        0 => {
            let (mut one, _) = met();
            assert_eq!(one.open(2, rest).0, None, "nobody sealed this");
        }
        1 => {
            // Aimed at the session: a right receiver index, a right length.
            let (mut one, mut two) = met();
            let sealed = one.seal(VnetHeader::default(), &mut echo(&rest[..rest.len().min(1000)]));
            let datagram = sealed.first().expect("there is a session");
            let mut changed = datagram.clone();
            for pair in rest.chunks_exact(2).take(8) {
                let at = usize::from(pair[0]) % changed.len();
                changed[at] ^= pair[1];
            }
            let (opened, _) = two.open(1, &changed);
            assert!(opened.is_none() || changed == *datagram, "a changed datagram opens");
            if opened.is_none() && changed != *datagram {
                assert_eq!(two.open(1, datagram).0, Some(echo(&rest[..rest.len().min(1000)])));
            }
            assert_eq!(two.open(1, datagram).0, None, "it opens once");
        }
        2 => {
            let (mut one, mut two) = met();
            let Some((head, packet)) = rest.split_first_chunk::<{ VnetHeader::LEN }>() else { return };
            let sealed = one.seal(VnetHeader::read(*head), &mut packet.to_vec());
            for datagram in &sealed {
                assert!(datagram.len() <= 65_535 + 64);
                two.open(1, datagram);
            }
        }
        _ => {
            let Some((head, packet)) = rest.split_first_chunk::<{ VnetHeader::LEN }>() else { return };
            let mut parts: Vec<Vec<u8>> = Vec::new();
            let header = VnetHeader::read(*head);
            let mut scratch = Vec::new();
            if split(header, &mut packet.to_vec(), &mut scratch, |part| parts.push(part.to_vec())).is_err() {
                assert!(parts.is_empty(), "what is refused gives nothing");
                return;
            }
            let mut coalescer = Coalescer::new(true);
            let mut back: Vec<Vec<u8>> = Vec::new();
            let mut write = |header: VnetHeader, packet: &[u8]| {
                let split =
                    split(header, &mut packet.to_vec(), &mut Vec::new(), |part| back.push(part.to_vec()));
                assert!(header == VnetHeader::default() || split.is_ok(), "what is gathered can be split");
                if split.is_err() {
                    back.push(packet.to_vec());
                }
            };
            parts.iter().for_each(|part| coalescer.push(part, &mut write));
            coalescer.flush(&mut write);
            assert_eq!(back.len(), parts.len());
        }
    }
});
