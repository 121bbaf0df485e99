//! A relay between ends that know nothing of weft: Debian's wireguard-go, whose endpoint is the relay's port.

use weft_daemon::relay::pair::Member;
use weft_daemon::relay::{Relay, RelayLimits};
use weft_wire::mesh::RelayRefusal;

use super::interop::{Kind, Other};
use super::*;

const PORT: u16 = 51_900;

fn member(number: u8) -> Member {
    Member { node: format!("n{number}").parse().unwrap(), keys: vec![secret(number).public()] }
}

fn limits(most: u16) -> RelayLimits {
    RelayLimits { ports: PORT..=PORT + most - 1, pair_bytes: 1 << 30, total_bytes: 1 << 30 }
}

/// A namespace with a bridge at 192.0.2.3, and two with a cable to it at .1 and .2.
fn three() -> Option<(Netns, [Netns; 2])> {
    let (relay, ends) = (Netns::new()?, [Netns::new()?, Netns::new()?]);
    relay.sh("ip link set lo up; ip link add br0 type bridge; ip link set br0 up; ip addr add 192.0.2.3/24 dev br0");
    for (place, last) in ends.iter().zip(1..) {
        relay.sh(&format!(
            "ip link add e{last} type veth peer name eth0 netns {}; ip link set e{last} master br0; ip link set e{last} up",
            place.tid
        ));
        place.sh(&format!("ip link set eth0 up; ip addr add 192.0.2.{last}/24 dev eth0"));
    }
    Some((relay, ends))
}

#[test]
fn two_of_another_implementation_reach_each_other_through_a_relay_and_move_without_it_knowing_them() {
    let Some((place, [one, two])) = three() else { return };
    let mut relay = place.run(|| Relay::new(limits(2), Instant::now())).unwrap();
    let (port, mut relay) =
        place.run(move || (relay.allocate([member(1), member(2)], Instant::now()), relay));
    let port = port.unwrap();
    let Some(one) = Other::start(Kind::WireguardGo, one, 1, secret(2).public()) else { return };
    let Some(two) = Other::start(Kind::WireguardGo, two, 2, secret(1).public()) else { return };
    for (end, other) in [(&one, 2), (&two, 1)] {
        end.set(&format!(
            "peer {} endpoint 192.0.2.3:{port} allowed-ips 10.77.{other}.0/24 persistent-keepalive 1",
            secret(other).public()
        ));
    }
    wait_until("both are heard", || relay.status()[0].legs.iter().all(Option::is_some));
    // Both began at once, and ask again after five seconds where that went wrong.
    let pings = |place: &Netns, to: &str| {
        let script = format!("ping -n -q -c 1 -w 2 {to} >/dev/null && echo yes || echo no");
        place.sh(&script).trim() == "yes"
    };
    wait_until("they have a session", || pings(&one.place, "10.77.2.1"));
    ping(&one.place, "10.77.2.1", 5);
    ping(&two.place, "10.77.1.1", 5);

    // Another port, as a translator that forgot would give it.
    let before = relay.status()[0].legs;
    one.set("listen-port 40000");
    wait_until("the end is known by its session", || relay.status()[0].legs != before);
    ping(&two.place, "10.77.1.1", 5);

    // A stranger is heard, and neither answered nor forwarded for.
    let counts = relay.counts();
    place.sh(&format!("bash -c 'for i in $(seq 20); do echo hello > /dev/udp/127.0.0.1/{port}; done'"));
    wait_until("the stranger is counted", || relay.counts().refused() >= counts.refused() + 20);

    // The pair keeps its port, and there is no third.
    let now = Instant::now();
    let (again, mut relay) = place.run(move || (relay.allocate([member(2), member(1)], now), relay));
    assert_eq!(again, Ok(port));
    let (more, relay) = place.run(move || {
        let more = [(3, 4), (5, 6)].map(|(a, b)| relay.allocate([member(a), member(b)], now));
        (more, relay)
    });
    assert_eq!(more, [Ok(PORT + 1), Err(RelayRefusal::Full)]);
    assert!(relay.counts().bytes > 0 && relay.room() == 0);
}
