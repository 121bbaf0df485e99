//! Any bytes as what the kernel tells of a WireGuard device: reading ends and stays inside, and a peer that weft writes is read
//! as the very same.
//!
//! The first byte says which of the two.
#![no_main]

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use libfuzzer_sys::fuzz_target;
use weft_daemon::kernel::fuzz;

/// Takes so many bytes off the input; zeros follow its end.
fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let mut out = [0; N];
    let (taken, rest) = bytes.split_at(N.min(bytes.len()));
    out[..taken.len()].copy_from_slice(taken);
    *bytes = rest;
    out
}

fn address(bytes: &mut &[u8], v4: bool) -> IpAddr {
    if v4 { take::<4>(bytes).into() } else { take::<16>(bytes).into() }
}

fn net(bytes: &mut &[u8]) -> IpNet {
    let [how] = take(bytes);
    let v4 = how & 0x80 == 0;
    let net = IpNet::new(address(bytes, v4), (how & 0x7f) % if v4 { 33 } else { 128 });
    net.expect("a length of the family").trunc()
}

fuzz_target!(|bytes: &[u8]| {
    let Some((how, mut rest)) = bytes.split_first() else { return };
    if how % 2 == 0 {
        let (peers, prefixes) = fuzz::wireguard_device(rest);
        // Each takes at least its attributes' headers.
        assert!(peers * 40 <= rest.len() && prefixes * 16 <= rest.len());
        return;
    }
    let key = take(&mut rest);
    let endpoint = SocketAddr::new(address(&mut rest, how & 2 == 0), u16::from_be_bytes(take(&mut rest)));
    let keepalive = u16::from_be_bytes(take(&mut rest));
    let count = usize::from(u16::from_be_bytes(take(&mut rest)) % 1024);
    let prefixes: Vec<IpNet> = (0..count).map(|_| net(&mut rest)).collect();
    assert!(fuzz::wireguard_reads_back(key, endpoint, keepalive, &prefixes));
});
