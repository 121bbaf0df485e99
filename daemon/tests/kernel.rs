//! Passes of the reconciler over a real kernel, in network namespaces of the tests' own, judged by `ip -j`,
//! `bridge -j`, `nft -j` and `ethtool`.

#![allow(clippy::unwrap_used, reason = "a test that unwraps names its line")]

mod netns;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use netns::Netns;
use serde_json::Value;
use weft_daemon::kernel::linux::Linux;
use weft_daemon::kernel::{Kernel, UnderlaySpec, purge};
use weft_daemon::plan::desired::desired;
use weft_daemon::plan::diff::diff;
use weft_daemon::plan::model::{Dataplane, Encryption, HostVeth, Inputs, Peer};
use weft_daemon::reconcile::{Report, reconcile};
use weft_wire::mesh::Carrier;
use weft_wire::types::{MacAddress, NodeName};

/// Runs a test on a thread with a network namespace of its own that has an underlay, `eth0`.
fn on_a_node(test: impl FnOnce(&mut Linux) + Send + 'static) {
    let Some(node) = Netns::new() else { return };
    node.run(move || {
        run("ip link add eth0 type veth peer name wire");
        run("ip addr add 192.0.2.1/24 dev eth0");
        run("ip addr add 2001:db8::1/64 dev eth0 nodad");
        run("ip link set wire up");
        run("ip link set eth0 up");
        test(&mut Linux::open().expect("the kernel speaks netlink"));
    });
}

fn run(line: &str) -> String {
    let mut words = line.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output().expect("the tool is there");
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(line: &str) -> Vec<Value> {
    let text = run(line);
    if text.trim().is_empty() { Vec::new() } else { serde_json::from_str(&text).unwrap() }
}

fn name(node: &str) -> NodeName {
    node.parse().unwrap()
}

/// What `ip monitor` tells about routes.
struct Ear {
    monitor: std::process::Child,
    lines: mpsc::Receiver<String>,
}

impl Ear {
    /// Starts it, and returns once it hears.
    fn new() -> Self {
        let mut monitor = Command::new("ip")
            .args(["monitor", "route"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("ip is there");
        let output = BufReader::new(monitor.stdout.take().unwrap());
        let (tell, lines) = mpsc::channel();
        // It ends with the monitor.
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
        let ear = Self { monitor, lines };
        ear.hear("203.0.113.1");
        ear
    }

    /// Makes a route until it is heard of, and returns what came before.
    fn hear(&self, marker: &str) -> Vec<String> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut heard = Vec::new();
        let mut mtu = 1000;
        while Instant::now() < deadline {
            // A replacement by the same is not told.
            mtu += 1;
            run(&format!("ip route replace {marker} dev lo mtu {mtu}"));
            while let Ok(line) = self.lines.recv_timeout(Duration::from_millis(100)) {
                if line.starts_with(marker) {
                    return heard;
                }
                heard.push(line);
            }
        }
        panic!("the monitor is deaf");
    }

    fn finish(self) -> Vec<String> {
        let mut heard = self.hear("203.0.113.2");
        heard.retain(|line| !line.contains("203.0.113.1"));
        heard
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        // Also where a test fails: a monitor ends by no other means.
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
    }
}

/// Peer number `i`, with a subnet and an endpoint of each family.
fn peer(i: u32) -> Peer {
    let node = name(&format!("p{i}"));
    let [_, _, high, low] = i.to_be_bytes();
    Peer {
        subnets: vec![
            format!("10.{}.{low}.0/24", 40 + u32::from(high)).parse().unwrap(),
            format!("fd00:32:0:{i:x}::/64").parse().unwrap(),
        ],
        underlay: vec![
            IpAddr::from(Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 0, 0)) + i)),
            IpAddr::from(Ipv6Addr::from(
                u128::from("2001:db8::1000".parse::<Ipv6Addr>().unwrap()) + u128::from(i),
            )),
        ],
        vtep_v4: Some(MacAddress::derived(&node, "v4")),
        vtep_v6: Some(MacAddress::derived(&node, "v6")),
        node,
        vni: 1,
        vxlan_port: 8472,
        mtu: 1500,
        site: "default".parse().expect("a valid name"),
        encryption: Encryption::Never,
        tunnel: None,
        gateway: None,
        via: None,
        path_mtu: None,
    }
}

fn inputs(kernel: &mut Linux, peers: u32) -> Inputs {
    Inputs {
        node: name("n1"),
        site: "default".parse().expect("a valid name"),
        dataplane: Dataplane {
            vni: 1,
            vxlan_port: 8472,
            direct_routing: false,
            masquerade: true,
            cluster_cidrs: vec!["10.32.0.0/11".parse().unwrap(), "fd00:32::/48".parse().unwrap()],
            non_masquerade: Vec::new(),
            mtu: None,
            tx_checksum: true,
            hairpin: true,
            encryption: Encryption::Never,
            preshared: None,
            pairs: Default::default(),
            tunnel: None,
            carrier: Carrier::UserSpace,
            detour: None,
        },
        underlay: kernel
            .underlay(&UnderlaySpec { device: Some("eth0".into()), ..Default::default() })
            .unwrap(),
        subnets: vec!["10.32.1.0/24".parse().unwrap(), "fd00:32:0:f001::/64".parse().unwrap()],
        peers: (2..2 + peers).map(peer).collect(),
        attachments: Vec::new(),
        ways: BTreeMap::new(),
        anew: BTreeSet::new(),
        strays: BTreeSet::new(),
        sessions: BTreeSet::new(),
    }
}

/// The link-local address of a node's device over IPv4 (RFC 4291 appendix A).
fn link_local(node: &NodeName) -> Ipv6Addr {
    let MacAddress([a, b, c, d, e, f]) = MacAddress::derived(node, "v4");
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// A pass that must succeed.
fn pass(kernel: &mut Linux, inputs: &Inputs) -> Report {
    let report = reconcile(kernel, inputs);
    assert_eq!(report.failed, [], "the kernel refused nothing");
    report
}

#[test]
fn one_pass_programs_a_node_and_the_second_changes_nothing() {
    on_a_node(|kernel| {
        let inputs = inputs(kernel, 3);
        pass(kernel, &inputs);
        assert_eq!(pass(kernel, &inputs).applied, 0);
        // Another daemon after a restart finds the same.
        assert_eq!(pass(&mut Linux::open().unwrap(), &inputs).applied, 0);

        let vxlan = &json("ip -j -d link show dev weft-vx4")[0];
        let data = &vxlan["linkinfo"]["info_data"];
        assert_eq!(data["id"], 1);
        assert_eq!(data["port"], 8472);
        assert_eq!(data["local"], "192.0.2.1");
        assert_eq!(data["learning"], false);
        assert_eq!(vxlan["mtu"], 1450);
        assert_eq!(vxlan["address"], MacAddress::derived(&name("n1"), "v4").to_string());
        assert_eq!(json("ip -j -d link show dev weft-vx6")[0]["mtu"], 1430);
        assert_eq!(json("ip -j link show dev weft0")[0]["mtu"], 1450);

        let route = &json("ip -j -d route show 10.40.2.0/24")[0];
        assert_eq!((&route["dev"], &route["gateway"]), (&"weft-vx4".into(), &"10.40.2.0".into()));
        assert_eq!((&route["protocol"], &route["prefsrc"]), (&"117".into(), &"10.32.1.1".into()));
        let route = &json("ip -6 -j route show fd00:32:0:2::/64")[0];
        assert_eq!(route["dev"], "weft-vx4");
        assert!(route["gateway"].as_str().unwrap().starts_with("fe80::"), "{route}");
        for family in ["-4", "-6"] {
            let permanent = json(&format!("ip {family} -j neigh show dev weft-vx4 nud permanent"));
            assert_eq!(permanent.len(), 3, "{permanent:?}");
        }
        let mac = MacAddress::derived(&name("p2"), "v4").to_string();
        let fdb = json("bridge -j fdb show dev weft-vx4");
        let entry = fdb.iter().find(|entry| entry["mac"] == mac.as_str()).expect("p2 has an entry");
        assert_eq!(entry["dst"], "198.18.0.2");
        assert_eq!(entry["state"], "permanent");
        assert!(run("nft -j list table inet weft").contains("masquerade"));
        assert_eq!(run("sysctl -n net.ipv4.ip_forward").trim(), "1");
    });
}

#[test]
fn sources_are_checked_loosely_where_the_host_is_strict_and_else_not_at_all() {
    on_a_node(|kernel| {
        for (host, ours) in [("0", "0"), ("1", "2"), ("2", "0")] {
            run(&format!("sysctl -qw net.ipv4.conf.all.rp_filter={host}"));
            let inputs = inputs(kernel, 1);
            pass(kernel, &inputs);
            for device in ["weft0", "weft-vx4"] {
                let check = run(&format!("sysctl -n net.ipv4.conf.{device}.rp_filter"));
                assert_eq!(check.trim(), ours, "{device} where the host has {host}");
            }
        }
    });
}

#[test]
fn what_a_hand_changes_is_mended_in_one_pass() {
    on_a_node(|kernel| {
        let inputs = inputs(kernel, 2);
        pass(kernel, &inputs);
        let mac = MacAddress::derived(&name("p2"), "v4");
        let deletions = [
            "ip route del 10.40.2.0/24".to_owned(),
            "ip -6 route del fd00:32:0:2::/64".into(),
            "ip neigh del 10.40.2.0 dev weft-vx4".into(),
            format!("ip neigh del {} dev weft-vx4", link_local(&name("p2"))),
            format!("bridge fdb del {mac} dev weft-vx4 dst 198.18.0.2"),
            "ip addr del 10.32.1.1/24 dev weft0".into(),
            "ip addr del fd00:32:0:f001::1/64 dev weft0".into(),
            "ip link del weft-vx4".into(),
            "ip link del weft-vx6".into(),
            "ip link del weft0".into(),
            "ip link set weft0 down".into(),
            "ip link set weft-vx4 down".into(),
            "ip link set weft-vx4 mtu 1300".into(),
            "ip link set weft-vx4 address 02:00:00:00:00:77".into(),
            "nft delete table inet weft".into(),
            "nft flush chain inet weft prerouting".into(),
            "sysctl -qw net.ipv4.ip_forward=0".into(),
            "ip route add blackhole 10.45.0.0/24 proto 117".into(),
            "ip -6 route add unreachable fd00:32:0:45::/64 proto 117".into(),
            "ip route replace blackhole 10.40.2.0/24 proto 117".into(),
        ];
        let look = |kernel: &mut Linux| {
            let plan = desired(&inputs);
            let settings = weft_daemon::kernel::settings_of(&plan);
            diff(&plan, &kernel.dump(&settings).unwrap())
        };
        for deletion in &deletions {
            run(deletion);
            assert_ne!(look(kernel), [], "{deletion} is seen");
            pass(kernel, &inputs);
            assert_eq!(look(kernel), [], "one pass mends {deletion}");
        }
    });
}

#[test]
fn a_thousand_peers_come_and_go_and_foreign_objects_stay() {
    on_a_node(|kernel| {
        run("ip link add other type bridge");
        run("ip addr add 172.20.0.1/24 dev other");
        run("ip link set other up");
        run("ip route add 172.21.0.0/24 via 192.0.2.9");
        run("nft add table inet other");
        let full = inputs(kernel, 1000);
        let start = Instant::now();
        let report = pass(kernel, &full);
        eprintln!("1,000 peers of two families: {} changes in {:?}", report.applied, start.elapsed());
        assert!(report.routes.iter().all(|route| route.installed));
        assert_eq!(json("ip -j route show proto 117").len(), 1000);
        assert_eq!(json("ip -6 -j route show proto 117").len(), 1000);
        let start = Instant::now();
        assert_eq!(pass(kernel, &full).applied, 0);
        eprintln!("a pass that finds all in place: {:?}", start.elapsed());

        let one = Inputs { peers: vec![peer(2)], ..full };
        let start = Instant::now();
        pass(kernel, &one);
        eprintln!("999 peers removed: {:?}", start.elapsed());
        assert_eq!(json("ip -j route show proto 117").len(), 1);
        assert_eq!(pass(kernel, &one).applied, 0);

        assert_eq!(purge(kernel), Vec::<String>::new());
        let left: Vec<_> = json("ip -j link").iter().map(|link| link["ifname"].to_string()).collect();
        assert!(left.iter().all(|name| !name.contains("weft")), "{left:?}");
        assert_eq!(json("ip -j route show 172.21.0.0/24").len(), 1);
        assert_eq!(json("ip -j addr show dev other")[0]["addr_info"][0]["local"], "172.20.0.1");
        let tables = run("nft list tables");
        assert!(tables.contains("inet other") && !tables.contains("weft"), "{tables}");
    });
}

#[test]
fn a_changed_peer_is_replaced_in_place_and_leaves_nothing_old() {
    on_a_node(|kernel| {
        let mut inputs = inputs(kernel, 2);
        pass(kernel, &inputs);
        inputs.peers[0].underlay[0] = "198.18.9.9".parse().unwrap();
        pass(kernel, &inputs);
        let moved = run("bridge fdb show dev weft-vx4");
        assert!(moved.contains("198.18.9.9") && !moved.contains("198.18.0.2 "), "{moved}");

        let old = inputs.peers[0].vtep_v4.replace(MacAddress::derived(&name("other"), "v4")).unwrap();
        pass(kernel, &inputs);
        assert!(!run("bridge fdb show dev weft-vx4").contains(&old.to_string()));
        assert!(!run("ip neigh show dev weft-vx4").contains(&old.to_string()));

        // The underlay of IPv4 is gone from the peer: its routes move to the other device, never both, never none.
        let ear = Ear::new();
        inputs.peers[0].underlay.remove(0);
        pass(kernel, &inputs);
        assert_eq!(json("ip -j route show 10.40.2.0/24")[0]["dev"], "weft-vx6");
        assert_eq!(json("ip -6 -j route show fd00:32:0:2::/64")[0]["dev"], "weft-vx6");
        assert_eq!(json("ip -6 -j route show fd00:32:0:2::/64").len(), 1);
        let heard = ear.finish();
        assert!(heard.iter().any(|line| line.starts_with("10.40.2.0/24")), "{heard:?}");
        assert!(
            !heard.iter().any(|line| line.starts_with("Deleted")),
            "no moment without a route: {heard:?}"
        );
        assert_eq!(pass(kernel, &inputs).applied, 0);
    });
}

#[test]
fn routes_of_an_earlier_release_are_replaced_without_a_gap() {
    on_a_node(|kernel| {
        let inputs = inputs(kernel, 2);
        pass(kernel, &inputs);
        // That release had one metric for all.
        for family in ["-4", "-6"] {
            for route in json(&format!("ip {family} -j route show proto 117")) {
                let [dst, via, dev, source] =
                    ["dst", "gateway", "dev", "prefsrc"].map(|field| route[field].as_str().unwrap());
                run(&format!("ip {family} route del {dst} metric {}", route["metric"]));
                run(&format!(
                    "ip {family} route add {dst} via {via} dev {dev} onlink src {source} metric 2117 proto 117"
                ));
            }
        }
        let ear = Ear::new();
        pass(kernel, &inputs);
        let heard = ear.finish();
        for prefix in ["10.40.2.0/24", "10.40.3.0/24", "fd00:32:0:2::/64", "fd00:32:0:3::/64"] {
            let told: Vec<_> = heard.iter().filter(|line| line.contains(prefix)).collect();
            let [made, gone] = told[..] else { panic!("{prefix} is made anew and gone: {heard:?}") };
            assert!(made.starts_with(prefix) && !made.contains("metric 2117 "), "{heard:?}");
            assert!(gone.starts_with("Deleted") && gone.contains("metric 2117 "), "{heard:?}");
        }
        assert_eq!(pass(kernel, &inputs).applied, 0);
    });
}

#[test]
fn a_vxlan_device_of_other_identity_is_made_anew_with_its_peers() {
    on_a_node(|kernel| {
        let mut inputs = inputs(kernel, 5);
        pass(kernel, &inputs);
        inputs.dataplane.vni = 7;
        inputs.peers.iter_mut().for_each(|peer| peer.vni = 7);
        pass(kernel, &inputs);
        assert_eq!(json("ip -j -d link show dev weft-vx4")[0]["linkinfo"]["info_data"]["id"], 7);
        assert_eq!(json("ip -j route show proto 117").len(), 5);
        assert_eq!(pass(kernel, &inputs).applied, 0);
    });
}

#[test]
fn a_pods_host_end_is_mended_and_only_a_stray_goes() {
    on_a_node(|kernel| {
        let mut inputs = inputs(kernel, 0);
        for veth in ["weft00000001", "weft00000002", "weftmine"] {
            run(&format!("ip link add {veth} type veth peer name x{veth}"));
        }
        inputs.attachments = vec![
            HostVeth { ifname: "weft00000001".into(), mtu: 1450 },
            HostVeth { ifname: "weft0000abcd".into(), mtu: 1450 },
        ];
        let report = pass(kernel, &inputs);
        assert_eq!(report.unknown_veths, ["weft00000002"]);
        let port = &json("ip -j -d link show dev weft00000001")[0];
        assert_eq!((&port["master"], &port["mtu"]), (&"weft0".into(), &1450.into()));
        assert_eq!(port["linkinfo"]["info_slave_data"]["hairpin"], true);
        inputs.strays = ["weft00000002".to_owned()].into();
        pass(kernel, &inputs);
        let left = run("ip -br link");
        assert!(
            !left.contains("weft00000002") && left.contains("weftmine") && left.contains("weft00000001"),
            "{left}"
        );
        run("ip link del weft0");
        pass(kernel, &inputs);
        assert_eq!(json("ip -j link show dev weft00000001")[0]["master"], "weft0");
        assert_eq!(pass(kernel, &inputs).applied, 0);
    });
}

#[test]
fn checksum_offload_follows_the_configuration_both_ways() {
    on_a_node(|kernel| {
        let feature = |device: &str| {
            let all = run(&format!("ethtool -k {device}"));
            let line = all.lines().find(|line| line.trim().starts_with("tx-checksum-ip-generic:")).unwrap();
            line.trim().trim_start_matches("tx-checksum-ip-generic: ").to_owned()
        };
        let mut inputs = inputs(kernel, 1);
        pass(kernel, &inputs);
        assert_eq!(feature("weft-vx4"), "on");
        inputs.dataplane.tx_checksum = false;
        pass(kernel, &inputs);
        assert_eq!((feature("weft-vx4"), feature("weft-vx6")), ("off".into(), "off".into()));
        assert_eq!(pass(kernel, &inputs).applied, 0);
        // A device that is made anew gets it again.
        run("ip link del weft-vx4");
        pass(kernel, &inputs);
        assert_eq!(feature("weft-vx4"), "off");
        inputs.dataplane.tx_checksum = true;
        pass(kernel, &inputs);
        assert_eq!(feature("weft-vx4"), "on");
        assert_eq!(pass(kernel, &inputs).applied, 0);
    });
}

#[test]
fn forwarding_does_not_cost_the_node_its_advertised_routes() {
    on_a_node(|kernel| {
        let accept = "/proc/sys/net/ipv6/conf/eth0/accept_ra";
        let read = || std::fs::read_to_string(accept).unwrap().trim().to_owned();
        let inputs = inputs(kernel, 0);
        std::fs::write(accept, "1").unwrap();
        pass(kernel, &inputs);
        assert_eq!(read(), "2");
        std::fs::write(accept, "0").unwrap();
        pass(kernel, &inputs);
        assert_eq!(read(), "0", "off by choice stays off");
    });
}

#[test]
fn a_foreign_forward_drop_is_named_until_the_bridge_may_pass() {
    on_a_node(|kernel| {
        let inputs = inputs(kernel, 0);
        assert_eq!(pass(kernel, &inputs).warnings, Vec::<String>::new());
        run("nft add table ip fw");
        run("nft add chain ip fw forward {type filter hook forward priority 0;policy drop;}");
        let warnings = pass(kernel, &inputs).warnings;
        assert!(warnings.len() == 1 && warnings[0].contains("ip fw"), "{warnings:?}");
        run("nft insert rule ip fw forward iifname weft0 accept");
        run("nft insert rule ip fw forward oifname weft0 accept");
        assert_eq!(pass(kernel, &inputs).warnings, Vec::<String>::new());
    });
}

#[test]
fn a_change_of_weft_objects_is_heard() {
    on_a_node(|kernel| {
        let inputs = inputs(kernel, 2);
        pass(kernel, &inputs);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (tell, mut told) = tokio::sync::mpsc::channel(1);
            weft_daemon::kernel::monitor::watch(tell).unwrap();
            let mac = MacAddress::derived(&name("p2"), "v4");
            for deletion in [
                "ip route del 10.40.2.0/24",
                "ip -6 route del fd00:32:0:2::/64",
                "ip neigh del 10.40.2.0 dev weft-vx4",
                &format!("bridge fdb del {mac} dev weft-vx4 dst 198.18.0.2"),
                "ip addr del 10.32.1.1/24 dev weft0",
                "nft delete table inet weft",
                "ip link del weft-vx6",
            ] {
                run(deletion);
                tokio::time::timeout(Duration::from_secs(10), told.recv()).await.expect(deletion).unwrap();
                // What the deletion brought along is heard before the next.
                while tokio::time::timeout(Duration::from_millis(50), told.recv()).await.is_ok() {}
            }
        });
    });
}

/// Prints what a number of peers cost; `WEFT_PEERS` chooses it.
#[test]
fn many_peers_are_found_in_place_by_the_second_pass() {
    let count = std::env::var("WEFT_PEERS").ok().and_then(|count| count.parse().ok()).unwrap_or(300);
    on_a_node(move |kernel| {
        let full = inputs(kernel, count);
        let start = Instant::now();
        pass(kernel, &full);
        eprintln!("program {:?}", start.elapsed());
        let start = Instant::now();
        assert_eq!(pass(kernel, &full).applied, 0);
        eprintln!("look {:?}", start.elapsed());
        let none = Inputs { peers: Vec::new(), ..full };
        let start = Instant::now();
        pass(kernel, &none);
        eprintln!("remove {:?}", start.elapsed());
    });
}
