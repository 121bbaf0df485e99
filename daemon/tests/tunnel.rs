//! The user-space tunnels against implementations that no one here wrote, in network namespaces of their own.
#![allow(clippy::unwrap_used, reason = "a test that unwraps names its line")]

mod netns;

#[path = "tunnel/flood.rs"]
mod flood;
#[path = "tunnel/interop.rs"]
mod interop;
#[path = "tunnel/keys.rs"]
mod keys;
#[path = "tunnel/paths.rs"]
mod paths;
#[path = "tunnel/relay.rs"]
mod relay;

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use netns::{Netns, opened_again};
use weft_daemon::tunnel::{Reason, Tunnel, TunnelConfig, TunnelPeer, TunnelSecret, TunnelStatus};
use weft_wire::types::TunnelKey;

const PATIENCE: Duration = Duration::from_secs(20);

/// A secret key of some number.
fn secret(number: u8) -> TunnelSecret {
    TunnelSecret::from_bytes([number; 32])
}

fn address(last: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, last], 51820))
}

/// Two namespaces with a cable between them: .1 and .2 of 192.0.2.0/24 and 2001:db8::/64.
fn two() -> Option<(Netns, Netns)> {
    let (one, two) = (Netns::new()?, Netns::new()?);
    one.sh(&format!("ip link add eth0 type veth peer name eth0 netns {}", two.tid));
    for (place, last) in [(&one, 1), (&two, 2)] {
        place.sh(&format!(
            "ip link set eth0 up; ip addr add 192.0.2.{last}/24 dev eth0; ip addr add 2001:db8::{last}/64 dev eth0 nodad"
        ));
    }
    Some((one, two))
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// weft's tunnels in a namespace.
struct Weft {
    place: Netns,
    tunnel: Arc<Mutex<Tunnel>>,
}

impl Weft {
    /// Opens them with 10.77.N.1/16 and fd77:N::1/32 for the namespace itself.
    fn open(place: Netns, number: u8) -> Self {
        let config = TunnelConfig {
            device: "weft-wg".into(),
            port: 51820,
            secret: secret(number),
            seed: [number; 32],
        };
        let tunnel = place.run(move || Tunnel::open(config)).unwrap();
        inside(&place, "weft-wg", number);
        Self { place, tunnel: Arc::new(Mutex::new(tunnel)) }
    }

    fn set_peers(&self, peers: &[TunnelPeer]) -> Vec<String> {
        self.tunnel.lock().unwrap().set_peers(peers)
    }

    fn status(&self) -> TunnelStatus {
        self.tunnel.lock().unwrap().monitor().status().into_iter().next().expect("there is a peer")
    }

    fn drops(&self) -> Vec<(Reason, u64)> {
        self.tunnel.lock().unwrap().monitor().drops()
    }

    /// How much was dropped of what is not the kernel's own: that speaks to groups, which have no peer, and from addresses of none.
    fn losses(&self) -> u64 {
        let counts = |(reason, _): &(Reason, u64)| !matches!(reason, Reason::NoPeer | Reason::WrongSource);
        self.drops().into_iter().filter(counts).map(|(_, count)| count).sum()
    }

    fn dropped(&self, reason: Reason) -> u64 {
        self.drops().into_iter().find(|(found, _)| *found == reason).unwrap().1
    }
}

/// Gives a tunnel's device the addresses of a number.
fn inside(place: &Netns, device: &str, number: u8) {
    place.sh(&format!(
        "ip link set {device} mtu 1420 up; ip addr add 10.77.{number}.1/16 dev {device}
         ip addr add fd77::{number}:1/64 dev {device} nodad"
    ));
}

/// A peer with the prefixes of a number.
fn peer(number: u8, key: TunnelKey, endpoint: SocketAddr) -> TunnelPeer {
    let prefixes = [format!("10.77.{number}.0/24"), format!("fd77::{number}:0/112")];
    TunnelPeer {
        node: format!("n{number}").parse().unwrap(),
        key,
        endpoint,
        prefixes: prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect(),
        preshared: None,
    }
}

fn ping(place: &Netns, to: &str, count: u32) {
    place.sh(&format!("ping -n -q -i 0.05 -c {count} -w 10 {to}"));
}

/// Pings a hundred times a second until it is told to end.
struct Pings(Option<Child>);

impl Pings {
    fn start(from: &Netns, to: &'static str) -> Self {
        Self(from.run(move || {
            let words = ["-n", "-i", "0.01", to];
            Command::new("ping").args(words).stdout(Stdio::piped()).spawn().ok()
        }))
    }

    fn nothing_was_lost(mut self) {
        let ping = self.0.take().expect("ping was started");
        let pid = nix::unistd::Pid::from_raw(i32::try_from(ping.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
        let output = ping.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let after = |line: &str, word: &str| -> Option<usize> {
            line.split_once(word)?.1.split([' ', ',']).next()?.parse().ok()
        };
        let came: Vec<usize> = said.lines().filter_map(|line| after(line, "icmp_seq=")).collect();
        let sent = said.lines().find_map(|line| line.split_once(" packets transmitted")?.0.parse().ok());
        let said = said.lines().last().unwrap_or_default();
        let last = came.iter().copied().max().unwrap_or_default();
        let lost: Vec<usize> = (1..=last).filter(|number| !came.contains(number)).collect();
        assert!(came.len() >= 20 && lost.is_empty(), "{} came, not {lost:?}: {said}", came.len());
        // What is under way at the end gets no answer: on a busy machine that is half a second's.
        assert!(sent.is_some_and(|sent: usize| sent <= last + 50), "{last} of {sent:?} came: {said}");
    }
}

impl Drop for Pings {
    fn drop(&mut self) {
        if let Some(ping) = &mut self.0 {
            drop(ping.kill());
            drop(ping.wait());
        }
    }
}

#[test]
fn the_peer_that_starts_anew_is_heard_again_at_once() {
    let Some((one, two)) = two() else { return };
    let weft = [(one, 1), (two, 2)].map(|(place, number)| Weft::open(place, number));
    let set = |weft: &[Weft; 2]| {
        weft[0].set_peers(&[peer(2, secret(2).public(), address(2))]);
        weft[1].set_peers(&[peer(1, secret(1).public(), address(1))]);
    };
    set(&weft);
    ping(&weft[0].place, "10.77.2.1", 5);
    let [first, second] = weft;
    let Weft { place, tunnel } = second;
    drop(tunnel);
    let second = Weft {
        tunnel: Arc::new(Mutex::new(place.run(|| {
            let config =
                TunnelConfig { device: "weft-wg".into(), port: 51820, secret: secret(2), seed: [9; 32] };
            opened_again(|| Tunnel::open(config.clone()))
        }))),
        place,
    };
    second.set_peers(&[peer(1, secret(1).public(), address(1))]);
    // Only the other side speaks, under a session that is gone.
    let began = Instant::now();
    ping(&first.place, "10.77.2.1", 1);
    println!("answered after {:?}", began.elapsed());
}

/// The resident memory of this process in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn two_thousand_peers_are_known_at_once_and_cost_little_until_they_speak() {
    let Some((one, two)) = two() else { return };
    let [first, second] = [(one, 1), (two, 2)].map(|(place, number)| Weft::open(place, number));
    second.set_peers(&[peer(1, secret(1).public(), address(1))]);
    let peers: Vec<TunnelPeer> = (0..2000_u32)
        .map(|number| {
            let mut key = [7; 32];
            key[..4].copy_from_slice(&number.to_be_bytes());
            let [_, _, high, low] = number.to_be_bytes();
            TunnelPeer {
                node: format!("m{number}").parse().unwrap(),
                prefixes: vec![format!("10.{}.{low}.0/24", 100 + high).parse().unwrap()],
                ..peer(2, TunnelKey(key), address(200))
            }
        })
        .chain([peer(2, secret(2).public(), address(2))])
        .collect();
    let (before, began) = (resident(), Instant::now());
    assert_eq!(first.set_peers(&peers), Vec::<String>::new());
    let (known, took) = (resident().saturating_sub(before), began.elapsed());
    let again = Instant::now();
    first.set_peers(&peers[1..]);
    println!("2,001 peers: {known} KiB, {took:?}; one less: {:?}", again.elapsed());
    // A session of boringtun's takes 11 KB.
    assert!(known < 11 * 2000 / 2, "{known} KiB for 2,001 silent peers");
    ping(&first.place, "10.77.2.1", 5);
}

#[test]
fn keys_that_cannot_be_are_refused_by_name() {
    let Some((one, _two)) = two() else { return };
    let weft = Weft::open(one, 1);
    let mut twin = peer(4, secret(3).public(), address(4));
    twin.prefixes.clear();
    let mut greedy = peer(5, secret(5).public(), address(5));
    greedy.prefixes.push("10.77.0.0/16".parse().unwrap());
    let refused = weft.set_peers(&[
        peer(2, TunnelKey([0; 32]), address(2)),
        peer(3, secret(3).public(), address(3)),
        twin,
        peer(6, secret(1).public(), address(6)),
        greedy,
    ]);
    let said = refused.join("\n");
    for what in [
        "n2 announces a tunnel key of zeros",
        "n4 announces a tunnel key that another",
        "n6 announces this node's own",
        "overlaps 10.77.3.0/24 of n3",
    ] {
        assert!(said.contains(what), "{what:?} is missing in {said}");
    }
    assert_eq!(refused.len(), 4, "{said}");
    let config = TunnelConfig { device: "weft-wg2".into(), port: 51820, secret: secret(9), seed: [0; 32] };
    let error = weft.place.run(move || Tunnel::open(config)).unwrap_err().to_string();
    assert!(
        error.contains("UDP port 51820 of WireGuard cannot be used") && error.contains("encryption.port"),
        "{error}"
    );
}

#[test]
fn what_waits_for_a_session_is_bounded_and_goes_when_it_comes() {
    let Some((one, two)) = two() else { return };
    let first = Weft::open(one, 1);
    first.set_peers(&[peer(2, secret(2).public(), address(2))]);
    // Nobody is there yet.
    first.place.sh("ping -n -q -f -c 300 -i 0.002 -W 0.1 10.77.2.1 || true");
    assert!(first.dropped(Reason::NoSession) >= 200, "{:?}", first.tunnel.lock().unwrap().monitor().drops());
    let second = Weft::open(two, 2);
    second.set_peers(&[peer(1, secret(1).public(), address(1))]);
    wait_until("what waited arrives", || second.status().received.0 >= 30);
    ping(&first.place, "10.77.2.1", 3);
}

#[test]
fn a_flood_of_handshakes_and_of_noise_leaves_half_of_the_traffic_and_more() {
    let Some((one, two)) = two() else { return };
    let weft = [(one, 1), (two, 2)].map(|(place, number)| Weft::open(place, number));
    weft[0].set_peers(&[peer(2, secret(2).public(), address(2))]);
    weft[1].set_peers(&[peer(1, secret(1).public(), address(1))]);
    ping(&weft[0].place, "10.77.2.1", 3);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let flood = weft[1].place.run(move || {
        // From another thread of the same namespace: the namespace's own goes on.
        std::thread::spawn(move || {
            let socket = std::net::UdpSocket::bind("192.0.2.2:0").unwrap();
            let (mut sent, mut datagram) = (0_u32, [0_u8; 148]);
            datagram[0] = 1;
            while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                datagram[8..12].copy_from_slice(&sent.to_le_bytes());
                drop(socket.send_to(&datagram, "192.0.2.1:51820"));
                sent += 1;
                if sent.is_multiple_of(50) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            sent
        })
    });
    ping(&weft[1].place, "10.77.1.1", 100);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let sent = flood.join().unwrap();
    let refused = weft[0].dropped(Reason::Flood) + weft[0].dropped(Reason::BadMac);
    assert!(refused > 100, "{sent} were sent, {refused} refused");
    assert!(weft[0].dropped(Reason::BadMac) < u64::from(sent) / 4, "most are refused before any arithmetic");
}
