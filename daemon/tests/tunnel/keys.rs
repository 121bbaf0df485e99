//! Keys and secrets change under traffic, on one side and then on the other, and peers that have not heard of it come back.

use std::net::UdpSocket;

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use weft_wire::preshared::PresharedKey;
use weft_wire::seal::{ClusterKey, KeyRing};

use super::*;

/// Waits until some more packets have come by the tunnel, as the kernel counts them.
fn carries_on(weft: &Weft) {
    let count = || -> u64 {
        weft.place.sh("cat /proc/thread-self/net/dev | awk '/weft-wg/{print $3}'").trim().parse().unwrap()
    };
    let before = count();
    wait_until("packets come by the tunnel", || count() >= before + 40);
}

#[test]
fn a_key_is_rotated_under_traffic_without_a_lost_packet() {
    let Some((one, two)) = two() else { return };
    let [first, second] = [(one, 1), (two, 2)].map(|(place, number)| Weft::open(place, number));
    first.set_peers(&[peer(2, secret(2).public(), address(2))]);
    second.set_peers(&[peer(1, secret(1).public(), address(1))]);
    ping(&first.place, "10.77.2.1", 5);
    let pings =
        [(&first, "10.77.2.1"), (&second, "10.77.1.1")].map(|(from, to)| Pings::start(&from.place, to));
    for generation in 0..3 {
        carries_on(&first);
        let (next, began) = (secret(20 + generation), Instant::now());
        second.tunnel.lock().unwrap().set_secret(&next);
        second.set_peers(&[peer(1, secret(1).public(), address(1))]);
        // The record takes its time.
        carries_on(&first);
        first.set_peers(&[peer(2, next.public(), address(2))]);
        wait_until("there is a session under the new key", || {
            let status = first.status();
            status.key == next.public() && status.handshake.is_some_and(|age| age < began.elapsed())
        });
    }
    for ping in pings {
        ping.nothing_was_lost();
    }
    // The keys before are of no use any more.
    wait_until("the old sessions are gone", || {
        let before = second.dropped(Reason::BadMac) + second.dropped(Reason::UnknownKey);
        first.set_peers(&[peer(2, secret(2).public(), address(2))]);
        first.place.sh("ping -n -c 1 -W 1 10.77.2.1 || true");
        second.dropped(Reason::BadMac) + second.dropped(Reason::UnknownKey) > before
    });
}

/// What the pair 1 and 2 makes of rings of cluster keys, the node's own first.
fn pair_secret(ring: &[u8], theirs: &[u8], keys: [TunnelKey; 2]) -> Option<PresharedKey> {
    let ring_of = |keys: &[u8]| {
        KeyRing::new(keys.iter().map(|key| ClusterKey::from_bytes([*key; 32])).collect()).unwrap()
    };
    let theirs: Vec<_> = ring_of(theirs).ids().collect();
    let [one, other] = keys;
    PresharedKey::of_pair(&ring_of(ring), &theirs, one, other)
}

/// Tells one of nodes 1 and 2 of the other, and of the secret of the two.
fn knows(nodes: &[Weft; 2], node: usize, preshared: Option<PresharedKey>) {
    let other = u8::try_from(2 - node).unwrap();
    let wanted = TunnelPeer { preshared, ..peer(other, secret(other).public(), address(other)) };
    assert_eq!(nodes[node].set_peers(&[wanted]), Vec::<String>::new());
}

#[test]
fn the_secret_of_a_pair_changes_under_traffic_without_a_lost_packet() {
    let Some((one, two)) = two() else { return };
    let keys = [secret(1).public(), secret(2).public()];
    let nodes = [(one, 1), (two, 2)].map(|(place, number)| Weft::open(place, number));
    let known = |node: usize, preshared| knows(&nodes, node, preshared);
    let (mut last, mut changed) = (pair_secret(&[1], &[1], keys), Instant::now());
    known(0, last.clone());
    known(1, last.clone());
    ping(&nodes[0].place, "10.77.2.1", 5);
    let pings = [(0, "10.77.2.1"), (1, "10.77.1.1")].map(|(from, to)| Pings::start(&nodes[from].place, to));
    // A ring turned, a key forgotten: first on one node, then on the other, and the other way round.
    for (first, own, theirs) in [
        (0, &[2_u8, 1][..], &[1_u8, 2][..]),
        (1, &[2, 1], &[2, 1]),
        (0, &[2], &[2, 1]),
        (1, &[3, 2], &[3, 2]),
    ] {
        let (now, then) = (pair_secret(own, theirs, keys), pair_secret(theirs, own, keys));
        assert_eq!(now, then);
        if now != last {
            (last, changed) = (now.clone(), Instant::now());
        }
        known(first, now);
        carries_on(&nodes[0]);
        known(1 - first, then);
        wait_until("both have a session under the secret", || {
            nodes.iter().all(|node| node.status().handshake.is_some_and(|age| age < changed.elapsed()))
        });
        carries_on(&nodes[0]);
    }
    for ping in pings {
        ping.nothing_was_lost();
    }
    // A node whose secret is another has no session once the present one is gone.
    known(0, pair_secret(&[9], &[9], keys));
    nodes[0].set_peers(&[]);
    known(0, pair_secret(&[9], &[9], keys));
    nodes[1].set_peers(&[]);
    known(1, pair_secret(&[3], &[3], keys));
    let before = nodes[0].dropped(Reason::Forged);
    nodes[0].place.sh("! ping -n -q -c 2 -i 0.2 -W 1 10.77.2.1");
    assert!(nodes[0].dropped(Reason::Forged) > before, "the answer does not open");
    assert_eq!(nodes[0].status().handshake, None);
    known(1, pair_secret(&[9], &[9], keys));
    ping(&nodes[0].place, "10.77.2.1", 3);
}

#[test]
fn a_peer_that_has_not_heard_of_a_new_key_is_answered_under_the_one_before() {
    let Some((one, two)) = two() else { return };
    let [first, second] = [(one, 1), (two, 2)].map(|(place, number)| Weft::open(place, number));
    second.set_peers(&[peer(1, secret(1).public(), address(1))]);
    first.set_peers(&[peer(2, secret(2).public(), address(2))]);
    // There never was a session, and the peer does not know the key of today.
    let rotate = |number| {
        second.tunnel.lock().unwrap().set_secret(&secret(number));
        second.set_peers(&[peer(1, secret(1).public(), address(1))]);
    };
    rotate(20);
    ping(&first.place, "10.77.2.1", 3);
    ping(&second.place, "10.77.1.1", 3);
    // It does not know that its peer rotated either, and asks first.
    first.set_peers(&[]);
    first.set_peers(&[peer(2, secret(20).public(), address(2))]);
    ping(&first.place, "10.77.2.1", 3);
    rotate(21);
    first.set_peers(&[]);
    first.set_peers(&[peer(2, secret(20).public(), address(2))]);
    ping(&second.place, "10.77.1.1", 3);
    // One that missed two rotations is not heard until it has the news.
    rotate(22);
    rotate(23);
    first.set_peers(&[]);
    first.set_peers(&[peer(2, secret(20).public(), address(2))]);
    let before = second.dropped(Reason::BadMac);
    first.place.sh("! ping -n -q -c 1 -W 1 10.77.2.1");
    assert!(second.dropped(Reason::BadMac) > before);
    first.set_peers(&[peer(2, secret(23).public(), address(2))]);
    ping(&first.place, "10.77.2.1", 3);
}

#[test]
fn both_nodes_rotate_at_once_and_again_and_neither_loses_a_packet() {
    let Some((one, two)) = two() else { return };
    let nodes = [(one, 1), (two, 2)].map(|(place, number)| Weft::open(place, number));
    nodes[0].set_peers(&[peer(2, secret(2).public(), address(2))]);
    nodes[1].set_peers(&[peer(1, secret(1).public(), address(1))]);
    ping(&nodes[0].place, "10.77.2.1", 5);
    let pings = [(0, "10.77.2.1"), (1, "10.77.1.1")].map(|(from, to)| Pings::start(&nodes[from].place, to));
    let mut keys = [1, 2];
    for generation in 0..3_u8 {
        let next = [40 + generation, 50 + generation];
        // Each goes over while it knows the other's key of before.
        for node in 0..2 {
            nodes[node].tunnel.lock().unwrap().set_secret(&secret(next[node]));
            let other = u8::try_from(2 - node).unwrap();
            nodes[node].set_peers(&[peer(other, secret(keys[1 - node]).public(), address(other))]);
        }
        carries_on(&nodes[0]);
        for node in 0..2 {
            let other = u8::try_from(2 - node).unwrap();
            nodes[node].set_peers(&[peer(other, secret(next[1 - node]).public(), address(other))]);
            carries_on(&nodes[0]);
        }
        keys = next;
        wait_until("there is a session under the new keys", || {
            nodes.iter().all(|node| node.status().handshake.is_some())
        });
    }
    for ping in pings {
        ping.nothing_was_lost();
    }
}

/// A handshake initiation of a stranger, its key being of 32 bytes of 66, to node 1.
fn request() -> Vec<u8> {
    let (stranger, of) = (StaticSecret::from([66; 32]), PublicKey::from(secret(1).public().0));
    let mut room = [0; 148];
    match Tunn::new(stranger, of, None, None, 1, None).format_handshake_initiation(&mut room, true) {
        TunnResult::WriteToNetwork(datagram) => datagram.to_vec(),
        other => panic!("no request: {other:?}"),
    }
}

fn stranger() -> TunnelKey {
    TunnelKey(PublicKey::from(&StaticSecret::from([66; 32])).to_bytes())
}

fn socket(place: &Netns) -> UdpSocket {
    let socket = place.run(|| UdpSocket::bind("192.0.2.2:51820")).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Waits for the next message of node 1; returns its kind and its sender's index.
fn next(socket: &UdpSocket) -> (u8, [u8; 4]) {
    let mut room = [0; 2048];
    let (length, from) = socket.recv_from(&mut room).expect("a message comes");
    assert!(length >= 92 && from == address(1), "a handshake or its answer, not {length} bytes of {from}");
    (room[0], [room[4], room[5], room[6], room[7]])
}

#[test]
fn who_asked_before_it_was_known_is_asked_as_soon_as_it_is() {
    let Some((one, two)) = two() else { return };
    let first = Weft::open(one, 1);
    let socket = socket(&two);
    socket.send_to(&request(), address(1)).unwrap();
    wait_until("the stranger was heard", || first.dropped(Reason::UnknownKey) == 1);
    // Of two that become known at once only it is asked: nobody has anything to send.
    first.set_peers(&[peer(2, stranger(), address(2)), peer(3, secret(3).public(), address(3))]);
    assert_eq!(next(&socket).0, 1, "a handshake initiation");
    let waiting = first.tunnel.lock().unwrap().monitor().status();
    assert!(waiting.iter().all(|peer| peer.sent.0 == 0), "{waiting:?}");
}

#[test]
fn a_session_that_came_to_nothing_for_another_secret_is_asked_for_as_soon_as_the_secret_is_known() {
    let Some((one, two)) = two() else { return };
    let first = Weft::open(one, 1);
    let socket = socket(&two);
    let known = |preshared| {
        first.set_peers(&[TunnelPeer { preshared, ..peer(2, stranger(), address(2)) }]);
    };
    let of = |ring: &[u8]| pair_secret(ring, ring, [secret(1).public(), stranger()]);
    // Nobody asked yet, so another secret is no reason to.
    known(None);
    known(of(&[1]));
    // The peer asks, and is answered under a secret that it does not have yet, or no longer.
    socket.send_to(&request(), address(1)).unwrap();
    let (kind, answered) = next(&socket);
    assert_eq!(kind, 2, "an answer, and no request before it");
    known(of(&[2]));
    let (kind, asked) = next(&socket);
    assert_eq!((kind, asked == answered), (1, false), "under the new secret");
    // The peer does not answer, as it cannot open what it is asked under: the same the other way round.
    known(of(&[3]));
    wait_until("it is asked anew", || next(&socket).1[1..] != asked[1..]);
}

#[test]
fn packets_wait_for_a_session_under_whichever_secret_there_is_one() {
    let Some((one, two)) = two() else { return };
    let keys = [secret(1).public(), secret(2).public()];
    let nodes = [(one, 1), (two, 2)].map(|(place, number)| Weft::open(place, number));
    let known = |node: usize, ring: &[u8]| knows(&nodes, node, pair_secret(ring, ring, keys));
    known(0, &[1]);
    known(1, &[2]);
    let ping = nodes[0].place.run(|| {
        let words = ["-n", "-q", "-c", "10", "-i", "0.1", "-W", "10", "10.77.2.1"];
        Command::new("ping").args(words).stdout(Stdio::piped()).spawn().unwrap()
    });
    wait_until("the answer does not open", || nodes[0].dropped(Reason::Forged) > 0);
    assert!(nodes[0].status().waiting > 0);
    known(0, &[2]);
    let said = ping.wait_with_output().unwrap().stdout;
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains("10 packets transmitted, 10 received"), "{said}");
}
