//! Handshakes from sources that are made up: what a node can be made to compute by strangers.

use std::io::IoSlice;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrIn6, sendmsg};

use super::*;

/// What established traffic is offered, and must keep half of, in bits a second. More than that measures the machine, which
/// other tests use meanwhile.
const OFFERED: f64 = 20e6;

/// What a stream of two seconds brings through the tunnel, in bits a second.
fn rate(from: &Netns, to: &Netns) -> f64 {
    to.sh("iperf3 -s -1 -D; for i in $(seq 100); do ss -Hltn sport = :5201 | grep -q 5201 && break; sleep 0.05; done");
    let said = from.sh(&format!("timeout 30 iperf3 -J -t 2 -b {OFFERED} -c 10.77.1.1"));
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    said["end"]["sum_received"]["bits_per_second"].as_f64().unwrap()
}

/// Requests for a session with the owner of a key by someone whom nobody knows: right in every byte.
fn requests(of: TunnelKey) -> Vec<Vec<u8>> {
    let stranger = StaticSecret::from([77; 32]);
    let mut tunn = Tunn::new(stranger, PublicKey::from(of.0), None, None, 1, None);
    let mut request = || {
        let mut room = [0; 148];
        match tunn.format_handshake_initiation(&mut room, true) {
            TunnResult::WriteToNetwork(datagram) => datagram.to_vec(),
            other => panic!("no request: {other:?}"),
        }
    };
    (0..64).map(|_| request()).collect()
}

/// Sends requests, each from another subscriber's network of 2001:db8:f::/48, until it is stopped; returns how many.
fn spoof(requests: &[Vec<u8>], to: SocketAddrV6, stop: &AtomicBool) -> u64 {
    let socket = std::net::UdpSocket::bind("[::]:0").unwrap();
    let to = SockaddrIn6::from(to);
    let mut sent = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let network = u16::try_from(sent * 7919 % 65_536).unwrap();
        let source = Ipv6Addr::new(0x2001, 0xdb8, 0xf, network, 0, 0, 0, 1);
        let info = nix::libc::in6_pktinfo {
            ipi6_addr: nix::libc::in6_addr { s6_addr: source.octets() },
            ipi6_ifindex: 0,
        };
        let datagram = [IoSlice::new(&requests[usize::try_from(sent).unwrap() % requests.len()])];
        let control = [ControlMessage::Ipv6PacketInfo(&info)];
        sendmsg(socket.as_raw_fd(), &datagram, &control, MsgFlags::empty(), Some(&to)).unwrap();
        sent += 1;
        if sent.is_multiple_of(20) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    sent
}

#[test]
fn requests_from_made_up_sources_leave_established_traffic_half_of_its_rate_and_more() {
    let Some((one, two)) = two() else { return };
    let weft = [(one, 1), (two, 2)].map(|(place, number)| Weft::open(place, number));
    weft[0].set_peers(&[peer(2, secret(2).public(), address(2))]);
    weft[1].set_peers(&[peer(1, secret(1).public(), address(1))]);
    weft[0].place.sh("ip route add 2001:db8:f::/48 via 2001:db8::2");
    weft[1].place.sh("sysctl -qw net.ipv6.ip_nonlocal_bind=1; ip route add local 2001:db8:f::/48 dev lo");
    ping(&weft[1].place, "10.77.1.1", 3);
    let calm = rate(&weft[1].place, &weft[0].place);
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, requests) = (Arc::clone(&stop), requests(secret(1).public()));
    let flood = weft[1].place.run(move || {
        std::thread::spawn(move || spoof(&requests, "[2001:db8::1]:51820".parse().unwrap(), &stopped))
    });
    let refused = || weft[0].dropped(Reason::Flood) + weft[0].dropped(Reason::UnknownKey);
    wait_until("the flood arrives", || refused() > 1000);
    let flooded = rate(&weft[1].place, &weft[0].place);
    // Nor does it keep a peer that is one from a new session.
    weft[0].set_peers(&[]);
    weft[0].set_peers(&[peer(2, secret(2).public(), address(2))]);
    ping(&weft[0].place, "10.77.2.1", 3);
    stop.store(true, Ordering::Relaxed);
    let sent = flood.join().unwrap();
    println!(
        "{sent} requests; {:.1} Mbit/s before, {:.1} under them; {:?}",
        calm / 1e6,
        flooded / 1e6,
        weft[0].drops()
    );
    assert!(calm > OFFERED * 0.8 && flooded > calm / 2.0, "{calm} before, {flooded} under {sent} requests");
    // A request costs a multiplication on the curve: all but some hundreds a second are answered with a cookie before it.
    assert!(weft[0].dropped(Reason::UnknownKey) < sent / 4, "{:?}", weft[0].drops());
}
