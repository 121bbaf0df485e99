//! The Internet checksum (RFC 1071), summed in 32-bit words so that the compiler uses wide registers.

use super::{IPV4_HEADER, IPV6_HEADER};

/// Adds bytes to an unfolded sum; only the last part of several may have an odd length.
pub(super) fn add(sum: u64, bytes: &[u8]) -> u64 {
    // Any order of the words gives the same sum once folded, and so does any byte order if it is undone at the end
    // (RFC 1071 s2 B).
    let (chunks, rest) = bytes.as_chunks::<4>();
    let words = chunks.iter().map(|chunk| u64::from(u32::from_ne_bytes(*chunk))).sum::<u64>();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum + words + u64::from(u32::from_ne_bytes(last))
}

/// Folds a sum to 16 bits, in the byte order of the network, not complemented.
pub(super) fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::from_be_bytes((sum as u16).to_ne_bytes())
}

/// The sum of the pseudo-header (RFC 9293 s3.1, RFC 8200 s8.1) of a transport segment of `length` bytes.
pub(super) fn pseudo_header(packet: &[u8], protocol: u8, length: usize) -> u64 {
    let addresses = if packet[0] >> 4 == 4 { &packet[12..IPV4_HEADER] } else { &packet[8..IPV6_HEADER] };
    let length = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    add(add(add(0, addresses), &[0, 0, 0, protocol]), &length)
}

/// The checksum of an IPv4 header whose checksum field is zero.
pub(super) fn of_header(header: &[u8]) -> u16 {
    !fold(add(0, header))
}
