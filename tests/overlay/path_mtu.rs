//! A path that carries less than its devices say, and tells nobody: found, used, healed. The underlay drops packets that
//! are longer than the floor, and no ICMP comes back; the kernel's routes, ping and a TCP transfer judge.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use weft_tests::lab::{Backend, Families, Lab, LabOptions, wait_until};

const PATIENCE: Duration = Duration::from_secs(40);
/// What a transfer carries.
const BULK: usize = 4 << 20;

/// The MTU that a node's kernel has on its route to an address.
fn route_mtu(lab: &Lab, node: &str, to: IpAddr) -> Option<u64> {
    let route = lab.json(node, &["ip", "-j", "route", "get", &to.to_string()]);
    let metrics = route[0]["metrics"].as_array()?.first()?.clone();
    metrics["mtu"].as_u64()
}

/// One ping with this size of IP packet that may not be cut into pieces.
fn full_ping(lab: &Lab, from: &str, to: IpAddr, size: u64) -> bool {
    let payload = size - if to.is_ipv4() { 28 } else { 48 };
    let words =
        ["ping", "-n", "-q", "-c", "1", "-W", "1", "-M", "do", "-s", &payload.to_string(), &to.to_string()];
    lab.exec(from, &words).status.success()
}

/// Sends bytes from one pod to another over TCP and returns the longest pause that the receiver saw.
fn transfer(lab: &Lab, from: &str, to: &str, address: IpAddr, bytes: usize) -> Option<Duration> {
    let server = lab.background(to, &["python3", "-c", RECEIVE, &address.to_string(), &bytes.to_string()]);
    wait_until("the receiver listens", PATIENCE, || {
        lab.exec(to, &["sh", "-c", "ss -Hltn sport = 7000 | grep -q ."]).status.success()
    });
    let sent = lab.exec(from, &["python3", "-c", SEND, &address.to_string(), &bytes.to_string()]);
    let said = server.finish();
    let pause: f64 = said.trim().parse().ok()?;
    sent.status.success().then(|| Duration::from_secs_f64(pause))
}

const RECEIVE: &str = r#"
import socket, sys, time
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
server = socket.socket(family); server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind((sys.argv[1], 7000)); server.listen(); server.settimeout(60)
peer, _ = server.accept(); peer.settimeout(60)
left, last, pause = int(sys.argv[2]), time.monotonic(), 0
while left > 0:
    got = peer.recv(65536)
    if not got: sys.exit(1)
    now = time.monotonic(); pause = max(pause, now - last); last = now; left -= len(got)
print(pause)
"#;

const SEND: &str = r#"
import socket, sys, time
pace = float(sys.argv[3]) if len(sys.argv) > 3 else 0
out = socket.create_connection((sys.argv[1], 7000), 60)
left = int(sys.argv[2])
while left > 0:
    left -= out.send(b"x" * min(left, 16384))
    if pace: time.sleep(pace)
out.shutdown(socket.SHUT_WR); out.settimeout(60); out.recv(1)
"#;

/// What a packet may have over a floor: VXLAN's 50 bytes, or WireGuard's 60 and padding to 16.
fn inner(backend: Backend, floor: u64) -> u64 {
    match backend {
        Backend::Wireguard => (floor - 60) / 16 * 16,
        _ => floor - 50,
    }
}

fn floors_are_found(backend: Backend, name: &str) {
    for floor in [1280, 1296, 1368] {
        let lab = Lab::up(LabOptions::new(name).nodes(2).pods(1).overlay(Families::V4).backend(backend));
        let (a, b) = (lab.ip("n1", "a"), lab.ip("n2", "a"));
        lab.floor("n1", "n2", floor);
        // Tunnels that nothing uses are left alone.
        let talk = [lab.background_ping("n1/a", b), lab.background_ping("n2/a", a)];
        let size = inner(backend, floor.into());
        let expected = Some(size);
        let took = wait_until("both find the floor", PATIENCE, || {
            route_mtu(&lab, "n1", b) == expected && route_mtu(&lab, "n2", a) == expected
        });
        println!("{backend:?}, floor {floor}: found after {took:?}");
        drop(talk);
        assert!(full_ping(&lab, "n1/a", b, size), "the largest that fits");
        assert!(transfer(&lab, "n1/a", "n2/a", b, BULK).is_some(), "a transfer over {floor}");
        let shown = lab.weft("n1", &["peers"])["peers"][0].clone();
        assert_eq!(shown["mtu"].as_u64(), expected, "{shown}");
    }
}

#[test]
fn floors_of_1280_1296_and_1368_are_found_over_vxlan() {
    floors_are_found(Backend::Vxlan, "mtuvx");
}

#[test]
fn floors_of_1280_1296_and_1368_are_found_over_wireguard() {
    floors_are_found(Backend::Wireguard, "mtuwg");
}

#[test]
fn a_path_without_a_fault_gets_no_mtu_of_its_own() {
    let lab = Lab::up(LabOptions::new("mtuok").nodes(2).pods(1));
    let measured = || lab.weft("n1", &["peers"])["peers"][0]["path_mtu"].as_u64();
    wait_until("the path is measured", PATIENCE, || measured() == Some(1450));
    for to in lab.ips("n2", "a") {
        assert_eq!(route_mtu(&lab, "n1", to), None);
    }
    let began = Instant::now();
    lab.ping_all();
    println!("pinged within {:?}", began.elapsed());
}
