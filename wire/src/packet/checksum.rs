//! The Internet checksum (RFC 1071): sums of words in one's complement.
//!
//! It adds and folds; which bytes count, and where the result goes, is the callers' matter. Words are
//! taken in the machine's order and turned round once, at the end (RFC 1071 §2 (B)), four bytes at a time
//! into lanes of 64 bits (§2 (C)), which the compiler makes vectors of. Invariant: sums of fewer than 2³²
//! bytes do not overflow.

use super::Transport;

/// A sum that is not folded yet, in the machine's byte order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sum(u64);

impl Sum {
    /// Sums `bytes`; an odd last byte counts as if a zero followed.
    pub(super) fn of(bytes: &[u8]) -> Self {
        let (blocks, rest) = bytes.as_chunks::<BLOCK>();
        let mut lanes = [0_u64; LANES];
        for block in blocks {
            add_block(&mut lanes, block);
        }
        let mut sum = lanes.iter().sum::<u64>();
        let (words, rest) = rest.as_chunks::<4>();
        for word in words {
            sum += u64::from(u32::from_ne_bytes(*word));
        }
        let mut last = [0; 4];
        for (byte, value) in last.iter_mut().zip(rest) {
            *byte = *value;
        }
        Self(sum + u64::from(u32::from_ne_bytes(last)))
    }

    /// Sums the pseudo header (RFC 9293 §3.1, RFC 8200 §8.1) of a packet with a complete IP header, whose
    /// transport header and payload are `length` bytes, at most 65,535.
    pub(super) fn pseudo_header(packet: &[u8], transport: Transport, length: usize) -> Self {
        let addresses = if packet[0] >> 4 == 4 { &packet[12..20] } else { &packet[8..40] };
        let protocol = u16::from(transport.protocol()).to_be();
        Self(Self::of(addresses).0 + u64::from(protocol) + u64::from((length as u16).to_be()))
    }

    /// Adds the sum of bytes that follow an even number of bytes.
    pub(super) fn plus(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// Folds to 16 bits, ready for `to_be_bytes`, and not complemented. It is 0 only where all bytes are 0.
    pub(super) fn fold(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::from_be(sum as u16)
    }
}

const LANES: usize = 8;
const BLOCK: usize = LANES * 4;

fn add_block(lanes: &mut [u64; LANES], block: &[u8; BLOCK]) {
    let (words, _) = block.as_chunks::<4>();
    for (lane, word) in lanes.iter_mut().zip(words) {
        *lane += u64::from(u32::from_ne_bytes(*word));
    }
}
