//! A path that carries less than its devices say, and tells nobody: found, used, healed. The underlay drops packets that
//! are longer than the floor, and no ICMP comes back; the kernel's routes, ping and a TCP transfer judge.

use std::net::IpAddr;
use std::time::Duration;

use weft_tests::lab::{Backend, Background, Families, Lab, LabOptions, wait_until};

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

/// A transfer from one pod to another over TCP, so many bytes and so long after each piece.
struct Transfer(Background, Background);

impl Transfer {
    fn start(lab: &Lab, from: &str, to: &str, address: IpAddr, bytes: usize, pace: f64) -> Self {
        let (address, bytes, pace) = (address.to_string(), bytes.to_string(), pace.to_string());
        let receiver = lab.background(to, &["python3", "-c", RECEIVE, &address, &bytes]);
        wait_until("the receiver listens", PATIENCE, || {
            !lab.run(to, &["ss", "-Hltn", "sport = 7000"]).is_empty()
        });
        Self(lab.background(from, &["python3", "-c", SEND, &address, &bytes, &pace]), receiver)
    }

    /// The longest time in which the receiver got nothing.
    fn longest_pause(self) -> Duration {
        let said = self.1.finish();
        assert!(self.0.succeeded(), "the sender sent everything");
        Duration::from_secs_f64(said.trim().parse().expect("the receiver got everything"))
    }
}

/// Sends bytes from one pod to another over TCP.
fn transfer(lab: &Lab, from: &str, to: &str, address: IpAddr) -> Duration {
    Transfer::start(lab, from, to, address, BULK, 0.0).longest_pause()
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
pace = float(sys.argv[3])
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
        transfer(&lab, "n1/a", "n2/a", b);
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
    let peer = lab.weft("n1", &["peers"])["peers"][0].clone();
    assert!(peer["in_tunnel"] == true && peer["mtu"] == 1450 && peer["loss"] == 0.0, "{peer}");
    let doctor = lab.exec("n1", &["weft", "doctor"]);
    assert_eq!(doctor.status.code(), Some(0), "{}", String::from_utf8_lossy(&doctor.stdout));
}

/// The floor falls under a transfer that runs, and rises again afterwards.
fn heals_and_widens(backend: Backend, name: &str) {
    let lab = Lab::up(LabOptions::new(name).nodes(2).pods(1).overlay(Families::V4).backend(backend));
    let b = lab.ip("n2", "a");
    lab.floor("n1", "n2", 1500);
    let measured = || lab.weft("n1", &["peers"])["peers"][0]["path_mtu"].as_u64();
    let running = Transfer::start(&lab, "n1/a", "n2/a", b, 2 * BULK, 0.05);
    let whole = if backend == Backend::Wireguard { 1440 } else { 1450 };
    wait_until("the path is measured", PATIENCE, || measured() == Some(whole));
    let sockets = || lab.run("n1/a", &["ss", "-Htin", "dport = 7000"]);
    let acked = |text: &str| text.split_once("bytes_acked:")?.1.split_once(' ')?.0.parse::<usize>().ok();
    wait_until("the transfer is under way", PATIENCE, || acked(&sockets()) > Some(BULK / 8));
    lab.floor("n1", "n2", 1280);
    let expected = Some(inner(backend, 1280));
    let took = wait_until("the kernel has the floor", PATIENCE, || route_mtu(&lab, "n1", b) == expected);
    println!("{backend:?}: a floor that fell was found after {took:?}");
    let told = format!(" pmtu:{} ", inner(backend, 1280));
    wait_until("the transfer goes on with what fits", PATIENCE, || sockets().contains(&told));
    let pause = running.longest_pause();
    println!("{backend:?}: the transfer's longest pause was {pause:?}");
    let said = lab.exec("n1", &["weft", "doctor"]);
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("FAIL paths") && said.contains("the path to n2 carries packets of"), "{said}");
    // What was found outlives the daemon.
    lab.kill("n1");
    lab.start("n1");
    let passes = || lab.weft("n1", &["status"])["reconcile"]["passes"].as_u64();
    wait_until("the next daemon has looked at its kernel", PATIENCE, || passes() > Some(2));
    assert_eq!(route_mtu(&lab, "n1", b), expected);
    lab.floor("n1", "n2", 0);
    let talk = lab.background_ping("n1/a", b);
    let took = wait_until("the kernel has no floor", PATIENCE, || route_mtu(&lab, "n1", b).is_none());
    println!("{backend:?}: a floor that rose was found after {took:?}");
    // What pods were told, their kernels remember for ten minutes.
    for pod in ["n1/a", "n2/a"] {
        lab.run(pod, &["ip", "route", "flush", "cache"]);
    }
    wait_until("the largest packets pass again", PATIENCE, || full_ping(&lab, "n1/a", b, whole));
    drop(talk);
}

#[test]
fn a_black_hole_that_opens_under_a_transfer_heals_over_vxlan() {
    heals_and_widens(Backend::Vxlan, "mtuhealvx");
}

#[test]
fn a_black_hole_that_opens_under_a_transfer_heals_over_wireguard() {
    heals_and_widens(Backend::Wireguard, "mtuhealwg");
}

#[test]
fn pods_of_both_families_are_told_what_is_too_big_and_those_that_hear_no_icmp_are_clamped() {
    let lab = Lab::up(LabOptions::new("mtudual").nodes(2).pods(1));
    lab.floor("n1", "n2", 1368);
    let ips = lab.ips("n2", "a");
    let talk = [lab.background_ping("n1/a", ips[0]), lab.background_ping("n2/a", lab.ip("n1", "a"))];
    for to in &ips {
        wait_until("the kernel has the floor", PATIENCE, || route_mtu(&lab, "n1", *to) == Some(1318));
        let payload = if to.is_ipv4() { "1400" } else { "1380" };
        let words = ["ping", "-n", "-c", "2", "-W", "2", "-M", "do", "-s", payload, &to.to_string()];
        let said = String::from_utf8_lossy(&lab.exec("n1/a", &words).stdout).into_owned();
        assert!(said.contains("mtu = 1318") || said.contains("mtu=1318"), "{said}");
        assert!(full_ping(&lab, "n1/a", *to, 1318), "the largest that fits");
    }
    // From here on no pod hears of it, and forgets what it heard.
    for pod in ["n1/a", "n2/a"] {
        lab.sh(pod, "nft add table inet deaf; nft add chain inet deaf in '{ type filter hook input priority 0; }'; \
                     nft add rule inet deaf in icmp type destination-unreachable drop; \
                     nft add rule inet deaf in icmpv6 type packet-too-big drop; ip route flush cache; ip -6 route flush cache");
    }
    for to in ips {
        let running = Transfer::start(&lab, "n1/a", "n2/a", to, BULK, 0.01);
        let sockets = || lab.run("n1/a", &["ss", "-Htin", "dport = 7000"]);
        let headers = if to.is_ipv4() { 40 } else { 60 };
        // With time stamps, 12 bytes of options.
        let mss = format!(" mss:{} ", 1318 - headers - 12);
        wait_until("segments are clamped", PATIENCE, || sockets().contains(&mss));
        running.longest_pause();
    }
    drop(talk);
}

#[test]
fn tcp_over_ipv6_passes_where_the_path_carries_less_than_ipv6_takes() {
    let lab = Lab::up(LabOptions::new("mtusix").nodes(2).pods(1).overlay(Families::Dual));
    lab.floor("n1", "n2", 1280);
    let six = lab.ips("n2", "a").into_iter().find(|ip| ip.is_ipv6()).expect("the pod has both families");
    let back = lab.ips("n1", "a").into_iter().find(|ip| ip.is_ipv6()).expect("the pod has both families");
    let talk = [lab.background_ping("n1/a", six), lab.background_ping("n2/a", back)];
    wait_until("both kernels have the floor", PATIENCE, || {
        route_mtu(&lab, "n1", six) == Some(1230) && route_mtu(&lab, "n2", back) == Some(1230)
    });
    transfer(&lab, "n1/a", "n2/a", six);
    drop(talk);
    let said = lab.exec("n1", &["weft", "doctor"]);
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("beside TCP it does not work there"), "{said}");
}
