//! The pairs of a relay on their way to another daemon of the node, which goes on with them at the same ports
//! ([decision 9](../../../docs/decisions/0009-hand-over.md)).
//!
//! Invariant: one of the two daemons reads a socket at any time; what arrives in between waits in the socket.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::pair::Pair;
use super::pair::state::PairState;
use super::{Place, Relay, lock};
use crate::tunnel::udp::Udp;

/// A pair, as it is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HandedPair {
    port: u16,
    /// There is a socket for IPv4.
    pub v4: bool,
    /// There is a socket for IPv6.
    pub v6: bool,
    pair: PairState,
}

/// A pair that is handed over, with its sockets.
#[derive(Debug)]
pub struct Handing {
    /// What is told of it.
    pub told: HandedPair,
    place: Arc<Place>,
}

impl Handing {
    /// Returns its sockets, that for IPv4 first.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.place.sockets().map(AsFd::as_fd)
    }
}

/// A pair that was handed over, with its sockets.
#[derive(Debug)]
pub struct Handed {
    /// What was told of it.
    pub told: HandedPair,
    /// Its socket for IPv4.
    pub v4: Option<OwnedFd>,
    /// Its socket for IPv6.
    pub v6: Option<OwnedFd>,
}

impl Relay {
    /// Reads no more, and returns the pairs for another daemon. [`Relay::resume`] takes it back.
    pub fn hand_over(&mut self, now: Instant) -> Vec<Handing> {
        self.pause();
        let handing = |place: &Arc<Place>| {
            let pair = lock(&place.pair).state(now);
            let told = HandedPair { port: place.port, v4: place.v4.is_some(), v6: place.v6.is_some(), pair };
            Handing { told, place: Arc::clone(place) }
        };
        lock(&self.shared.places).iter().map(handing).collect()
    }

    /// Goes on with pairs of another daemon; those at ports that are no longer of the relay end.
    pub fn adopt(&mut self, pairs: Vec<Handed>, now: Instant) {
        let mine = pairs.into_iter().filter(|pair| self.limits.ports.contains(&pair.told.port));
        let place = |Handed { told, v4, v6 }: Handed| {
            let pair = Mutex::new(Pair::resume(told.pair, self.limits.pair_bytes, now));
            Arc::new(Place { port: told.port, v4: v4.map(Udp::adopt), v6: v6.map(Udp::adopt), pair })
        };
        let places: Vec<_> = mine.map(place).collect();
        tracing::info!(pairs = places.len(), "goes on relaying for the daemon before this one");
        lock(&self.shared.places).extend(places);
        self.resume();
    }

    /// Reads again.
    pub fn resume(&mut self) {
        self.shared.stop.store(false, Ordering::Relaxed);
        if lock(&self.shared.places).is_empty() {
            return;
        }
        if let Err(error) = self.start() {
            tracing::warn!(err = %error, "no thread for the relay, its pairs find another one");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, UdpSocket};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::super::pair::tests::{data, initiation, member, response};
    use super::super::{Relay, RelayLimits};
    use super::*;
    use crate::handover::{Message, Talk};

    /// An end of a pair, on loopback.
    struct Wire(UdpSocket);

    impl Wire {
        fn new() -> Self {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            Self(socket)
        }

        fn hears(&self, message: &[u8]) {
            let mut buffer = [0; 200];
            let length = self.0.recv(&mut buffer).expect("it is relayed");
            assert_eq!(&buffer[..length], message);
        }
    }

    fn limits(port: u16) -> RelayLimits {
        RelayLimits { ports: port..=port, pair_bytes: 1 << 30, total_bytes: 1 << 30 }
    }

    #[test]
    fn pairs_go_over_to_another_daemon_and_come_back_without_a_lost_message() {
        let now = Instant::now();
        let [one, two] = [Wire::new(), Wire::new()];
        // A port that was free a moment ago.
        let free = UdpSocket::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port();
        let mut earlier = Relay::new(limits(free), now).unwrap();
        let port = earlier.allocate([member(1), member(2)], now).unwrap();
        let relay = SocketAddr::from(([127, 0, 0, 1], port));
        let send = |from: &Wire, message: &[u8]| from.0.send_to(message, relay).unwrap();
        send(&one, &initiation(2, 10));
        // Only one who was heard can be answered: the other waits for it.
        while earlier.status()[0].legs[0].is_none() {
            std::thread::yield_now();
        }
        send(&two, &initiation(1, 20));
        two.hears(&initiation(2, 10));
        send(&two, &response(1, 20, 10));
        one.hears(&response(1, 20, 10));

        let (stream, other) = UnixStream::pair().unwrap();
        let (talk, other) = (Talk::new(stream).unwrap(), Talk::new(other).unwrap());
        let (mut later, mut earlier) = std::thread::scope(|scope| {
            let gives = scope.spawn(|| {
                assert!(matches!(other.hear().unwrap().0, Message::TakeRelay));
                let pairs = earlier.hand_over(Instant::now());
                // It waits in the socket until somebody reads.
                send(&one, &data(20));
                other.say_pairs(&pairs).unwrap();
                earlier
            });
            let mut later = Relay::new(limits(free), now).unwrap();
            later.adopt(talk.take_relay().unwrap(), Instant::now());
            (later, gives.join().unwrap())
        });
        two.hears(&data(20));
        send(&two, &data(10));
        one.hears(&data(10));
        assert_eq!(later.counts().forwarded, 2);
        assert_eq!(later.allocate([member(2), member(1)], now), Ok(port), "the pair is known");

        // The later daemon ends without a word.
        drop(later);
        send(&one, &data(20));
        earlier.resume();
        two.hears(&data(20));
    }

    #[test]
    fn a_pair_at_a_port_that_is_no_longer_of_the_relay_ends() {
        let now = Instant::now();
        let free = UdpSocket::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port();
        let mut earlier = Relay::new(limits(free), now).unwrap();
        earlier.allocate([member(1), member(2)], now).unwrap();
        let handed = |pair: Handing| Handed { told: pair.told, v4: None, v6: None };
        let pairs: Vec<_> = earlier.hand_over(now).into_iter().map(handed).collect();
        assert_eq!(pairs.len(), 1);
        let mut later = Relay::new(limits(free.wrapping_add(1).max(1024)), now).unwrap();
        later.adopt(pairs, now);
        assert!(later.status().is_empty());
    }
}
