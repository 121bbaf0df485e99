//! Against implementations that no one here wrote: Debian's wireguard-go, boringtun-cli and gotatun, each configured by `wg`.

use std::path::{Path, PathBuf};

use weft_wire::preshared::PresharedKey;
use weft_wire::seal::{ClusterKey, KeyRing};

use super::*;

/// Whom weft is tried with.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    WireguardGo,
    Boringtun,
    Gotatun,
}

impl Kind {
    fn command(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::WireguardGo => ("wireguard-go", &["-f"]),
            // A socket that is connected to where a peer was does not hear it from elsewhere.
            Self::Boringtun => {
                ("boringtun-cli", &["-f", "--disable-drop-privileges", "--disable-connected-udp"])
            }
            Self::Gotatun => ("gotatun", &["-f", "--disable-drop-privileges"]),
        }
    }

    /// Returns its executable, or says where it comes from.
    fn executable(self) -> Option<PathBuf> {
        let (name, _) = self.command();
        let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home)?;
        let path = std::env::var_os("PATH")?;
        let places = std::env::split_paths(&path).chain([cache.join("weft-tests/bin")]);
        let found = places.map(|place| place.join(name)).find(|path| path.exists());
        if found.is_none() {
            let reason = format!("{name} is not here; `make deps peers` installs it");
            assert!(std::env::var_os("CI").is_none(), "{reason}");
            println!("SKIP: {reason}");
        }
        found
    }
}

/// Where weft is.
const AT: &str = "endpoint 192.0.2.1:51820";

/// Another implementation in a namespace; it ends with this value.
pub struct Other {
    pub place: Netns,
    pub device: String,
    process: Child,
}

impl Other {
    /// Starts it with the secret and the addresses of a number, and weft's number 1 as its peer.
    pub fn start(kind: Kind, place: Netns, number: u8, peer: TunnelKey) -> Option<Self> {
        // The name is also that of a socket outside the namespace.
        let device = format!("owg{}", place.tid);
        let process = launch(kind, &place, &device)?;
        let other = Self { place, device, process };
        other.configure(number, number, peer);
        Some(other)
    }

    fn configure(&self, key: u8, number: u8, peer: TunnelKey) {
        let key = TunnelKey(secret(key).to_bytes());
        self.set(&format!("private-key /dev/stdin listen-port 51820 <<< '{key}'"));
        self.know(peer, AT);
        inside(&self.place, &self.device, number);
    }

    /// Ends it, and starts it again with the secret of a number.
    fn restart(&mut self, kind: Kind, key: u8, number: u8, peer: TunnelKey) {
        self.end();
        self.process = launch(kind, &self.place, &self.device).expect("it was there before");
        self.configure(key, number, peer);
    }

    fn end(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
        drop(std::fs::remove_file(format!("/var/run/wireguard/{}.sock", self.device)));
    }

    pub fn set(&self, what: &str) {
        self.place.sh(&format!("bash -ec \"wg set {} {what}\"", self.device));
    }

    /// Knows weft's number 1 by a key. boringtun-cli ends when a peer is changed: it has to be made anew.
    fn know(&self, peer: TunnelKey, more: &str) {
        self.set(&format!("peer {peer} allowed-ips 10.77.1.0/24,fd77::1:0/112 {more}"));
    }

    fn forget(&self, peer: TunnelKey) {
        self.set(&format!("peer {peer} remove"));
    }

    /// What `wg` shows of the only peer, in its numbers.
    fn shown(&self, what: &str) -> Vec<String> {
        let shown = self.place.sh(&format!("wg show {} {what}", self.device));
        shown.split_ascii_whitespace().skip(1).map(str::to_owned).collect()
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.end();
    }
}

fn launch(kind: Kind, place: &Netns, device: &str) -> Option<Child> {
    let (program, (_, arguments), name) = (kind.executable()?, kind.command(), device.to_owned());
    let process = place.run(move || {
        let mut command = Command::new(program);
        command.args(arguments).arg(name).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    });
    let socket = format!("/var/run/wireguard/{device}.sock");
    wait_until("the other implementation listens", || Path::new(&socket).exists());
    Some(process)
}

/// Moves twenty megabytes by TCP, and checks that they came.
fn transfer(from: &Netns, to: &Netns, address: &'static str) {
    to.sh("iperf3 -s -1 -D; for i in $(seq 100); do ss -Hltn sport = :5201 | grep -q 5201 && break; sleep 0.05; done");
    from.sh(&format!("timeout 30 iperf3 -n 20M -c {address}"));
}

/// weft is number 1, the other number 2.
fn pair(kind: Kind) -> Option<(Weft, Other)> {
    let (one, two) = two()?;
    let other = Other::start(kind, two, 2, secret(1).public())?;
    let weft = Weft::open(one, 1);
    assert_eq!(weft.set_peers(&[peer(2, secret(2).public(), address(2))]), Vec::<String>::new());
    Some((weft, other))
}

fn both_ways(weft: &Weft, other: &Other) {
    for to in ["10.77.2.1", "fd77::2:1"] {
        ping(&weft.place, to, 3);
    }
    for to in ["10.77.1.1", "fd77::1:1"] {
        ping(&other.place, to, 3);
    }
}

/// Handshake and data, begun by either side.
fn data_flows(kind: Kind) {
    let Some((weft, other)) = pair(kind) else { return };
    // The other asks for the first session, weft for the next.
    ping(&other.place, "10.77.1.1", 5);
    let key = secret(1).public();
    weft.set_peers(&[]);
    weft.set_peers(&[peer(2, secret(2).public(), address(2))]);
    let before = other.shown("transfer");
    both_ways(&weft, &other);
    assert_ne!(other.shown("transfer"), before);
    transfer(&weft.place, &other.place, "10.77.2.1");
    transfer(&other.place, &weft.place, "fd77::1:1");
    let status = weft.status();
    assert!(status.handshake.is_some() && status.sent.0 > 10 && status.received.0 > 10, "{status:?}");

    // It loses its session and asks anew: a handshake beside the running one.
    other.forget(key);
    other.know(key, AT);
    ping(&other.place, "10.77.1.1", 3);
    ping(&weft.place, "10.77.2.1", 3);

    // Either may not use the addresses of another: it is dropped, and counted. So is what the kernel says of itself.
    let before = weft.dropped(Reason::WrongSource);
    other.place.sh("ip addr add 10.77.3.1/32 dev eth0; ! ping -n -c 3 -i 0.2 -W 1 -I 10.77.3.1 10.77.1.1");
    assert!(weft.dropped(Reason::WrongSource) >= before + 3, "{:?}", weft.drops());
    let before = weft.dropped(Reason::NoPeer);
    weft.place.sh("! ping -n -c 3 -i 0.2 -W 1 10.77.9.1");
    assert!(weft.dropped(Reason::NoPeer) >= before + 3, "{:?}", weft.drops());
    both_ways(&weft, &other);
}

/// Either side changes its key, and the secret of the pair.
fn keys_change(kind: Kind) {
    let Some((weft, mut other)) = pair(kind) else { return };
    both_ways(&weft, &other);
    // The other's key: weft learns of it, and asks.
    if matches!(kind, Kind::Gotatun) {
        // It opens its sockets anew for a key, and then does not always hear what comes to them.
        other.restart(kind, 3, 2, secret(1).public());
    } else {
        other.set(&format!("private-key /dev/stdin <<< '{}'", TunnelKey(secret(3).to_bytes())));
    }
    weft.set_peers(&[peer(2, secret(3).public(), address(2))]);
    ping(&weft.place, "10.77.2.1", 3);
    both_ways(&weft, &other);
    // weft's key: the other is told later, and goes on under the old session until then.
    weft.tunnel.lock().unwrap().set_secret(&secret(4));
    weft.set_peers(&[peer(2, secret(3).public(), address(2))]);
    both_ways(&weft, &other);
    other.forget(secret(1).public());
    other.know(secret(4).public(), AT);
    ping(&other.place, "10.77.1.1", 3);
    both_ways(&weft, &other);
    // A secret of the pair that the other does not have, and then has.
    let ring = KeyRing::new(vec![ClusterKey::from_bytes([9; 32])]).unwrap();
    let ids: Vec<_> = ring.ids().collect();
    let secret = PresharedKey::of_pair(&ring, &ids, secret(3).public(), secret(4).public()).unwrap();
    let wanted =
        TunnelPeer { preshared: Some(secret.clone()), ..peer(2, self::secret(3).public(), address(2)) };
    weft.set_peers(&[]);
    weft.set_peers(std::slice::from_ref(&wanted));
    weft.place.sh("! ping -n -q -c 2 -i 0.2 -W 1 10.77.2.1");
    assert_eq!(weft.status().handshake, None);
    let text = TunnelKey(*secret.secret());
    other.forget(self::secret(4).public());
    other.know(self::secret(4).public(), &format!("{AT} preshared-key /dev/stdin <<< '{text}'"));
    ping(&weft.place, "10.77.2.1", 3);
    both_ways(&weft, &other);
}

/// Moves eth0 to another address of its network; a secondary one would go with the first.
fn moved(from: u8, to: u8) -> String {
    format!("ip addr del 192.0.2.{from}/24 dev eth0; ip addr add 192.0.2.{to}/24 dev eth0")
}

/// Either side comes from another port or address, or over the other family, and its traffic follows.
fn roams(kind: Kind) {
    let Some((weft, other)) = pair(kind) else { return };
    both_ways(&weft, &other);
    // Each time the one that moved speaks first, and is answered there.
    let port = match kind {
        // It opens its sockets anew, and now and then ends.
        Kind::Gotatun => 51820,
        _ => {
            other.set("listen-port 51999");
            51999
        }
    };
    ping(&other.place, "10.77.1.1", 3);
    assert_eq!(weft.status().endpoint, SocketAddr::from(([192, 0, 2, 2], port)));
    ping(&weft.place, "10.77.2.1", 3);
    other.place.sh(&moved(2, 22));
    if matches!(kind, Kind::WireguardGo) {
        // It holds on to the source address that it had, and sends nothing when that is gone.
        other.forget(secret(1).public());
        other.know(secret(1).public(), AT);
    }
    ping(&other.place, "10.77.1.1", 3);
    assert_eq!(weft.status().endpoint, SocketAddr::from(([192, 0, 2, 22], port)));
    ping(&weft.place, "10.77.2.1", 3);
    weft.place.sh(&moved(1, 11));
    ping(&weft.place, "10.77.2.1", 3);
    assert_eq!(other.shown("endpoints"), ["192.0.2.11:51820"]);
    ping(&other.place, "10.77.1.1", 3);
    // Over IPv6.
    other.forget(secret(1).public());
    other.know(secret(1).public(), "endpoint [2001:db8::1]:51820");
    ping(&other.place, "10.77.1.1", 3);
    assert_eq!(weft.status().endpoint, SocketAddr::new("2001:db8::2".parse().unwrap(), port));
    both_ways(&weft, &other);
    transfer(&weft.place, &other.place, "fd77::2:1");
    // What the record says outweighs what packets taught, once it changes.
    let elsewhere = SocketAddr::from(([192, 0, 2, 22], port));
    weft.set_peers(&[peer(2, secret(2).public(), elsewhere)]);
    assert_eq!(weft.status().endpoint, elsewhere);
    ping(&weft.place, "10.77.2.1", 3);
}

/// How long the sessions below are under traffic: beyond 120 s they are renewed in time (REKEY_AFTER_TIME, whitepaper s6.1).
fn length() -> Duration {
    let seconds = std::env::var("WEFT_TUNNEL_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(2))
}

/// Traffic goes on, and keepalives are taken for what they are.
fn lasts(kind: Kind) {
    let Some((weft, other)) = pair(kind) else { return };
    both_ways(&weft, &other);
    other.forget(secret(1).public());
    other.know(secret(1).public(), &format!("{AT} persistent-keepalive 1"));
    both_ways(&weft, &other);
    let arrived = || -> u64 {
        let counted = weft.place.sh("awk '/^Udp: [0-9]/ {print $2}' /proc/thread-self/net/snmp");
        counted.trim().parse().unwrap()
    };
    let (losses, received, before) = (weft.losses(), weft.status().received, arrived());
    wait_until("keepalives come", || arrived() >= before + 2);
    assert_eq!(
        (weft.losses(), weft.status().received),
        (losses, received),
        "they are no packets, and none was refused"
    );
    let (began, mut renewed, mut last) = (Instant::now(), 0, Duration::ZERO);
    let pings =
        [(&weft.place, "10.77.2.1"), (&other.place, "fd77::1:1")].map(|(from, to)| Pings::start(from, to));
    while began.elapsed() < length() {
        ping(&weft.place, "fd77::2:1", 20);
        let age = weft.status().handshake.expect("there is a session at every moment");
        renewed += u32::from(age < last);
        last = age;
    }
    for ping in pings {
        ping.nothing_was_lost();
    }
    let due = u32::try_from(length().as_secs() / 125).unwrap();
    assert!(renewed >= due, "{kind:?}: renewed {renewed} times in {:?}", length());
    println!("{kind:?}: {renewed} new sessions in {:?}", length());
}

macro_rules! with_each {
    ($($what:ident: $fact:ident),*) => {
        $(mod $fact {
            use super::*;

            #[test]
            fn with_wireguard_go() {
                $what(Kind::WireguardGo);
            }

            #[test]
            fn with_boringtun_cli() {
                $what(Kind::Boringtun);
            }

            #[test]
            fn with_gotatun() {
                $what(Kind::Gotatun);
            }
        })*
    };
}

with_each!(
    data_flows: data_flows_both_ways,
    keys_change: keys_change_on_either_side,
    roams: traffic_follows_whoever_moves,
    lasts: sessions_last_under_traffic_and_keepalives
);
