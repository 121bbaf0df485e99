//! Who reaches whom, and with which address.

use std::net::IpAddr;
use std::time::Duration;

use weft_tests::lab::{Backend, Families, Lab, LabOptions, Store, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);

/// Counts the echo requests a pod gets, and those of them that come from this address.
fn count_pings(lab: &Lab, place: &str, from: IpAddr) {
    let family = if from.is_ipv4() { "ip" } else { "ip6" };
    lab.sh(
        place,
        &format!(
            "nft -f - <<'END'
table inet witness
delete table inet witness
table inet witness {{
  counter sender {{ }}
  counter anyone {{ }}
  chain input {{
    type filter hook input priority 0;
    icmp type echo-request counter name anyone
    icmpv6 type echo-request counter name anyone
    {family} saddr {from} icmp{six} type echo-request counter name sender
  }}
}}
END",
            six = if from.is_ipv4() { "" } else { "v6" }
        ),
    );
}

fn counted(lab: &Lab, place: &str, name: &str) -> u64 {
    let answer = lab.json(place, &["nft", "-j", "list", "counter", "inet", "witness", name]);
    let objects = answer["nftables"].as_array().expect("nft lists objects");
    objects.iter().find_map(|object| object["counter"]["packets"].as_u64()).expect("the counter is there")
}

fn pods_see_each_others_own_addresses(lab: &Lab) {
    for (from, to) in [(("n1", "a"), ("n2", "a")), (("n2", "b"), ("n3", "a")), (("n1", "a"), ("n1", "b"))] {
        let (sender, receiver) = (format!("{}/{}", from.0, from.1), format!("{}/{}", to.0, to.1));
        for ip in lab.ips(to.0, to.1) {
            let own = lab.ips(from.0, from.1).into_iter().find(|own| own.is_ipv4() == ip.is_ipv4());
            count_pings(lab, &receiver, own.expect("both pods have the family"));
            lab.run(
                sender.as_str(),
                &["ping", "-n", "-q", "-c", "3", "-i", "0.1", "-W", "2", &ip.to_string()],
            );
            assert_eq!(counted(lab, &receiver, "anyone"), 3, "{sender} -> {receiver} ({ip})");
            assert_eq!(
                counted(lab, &receiver, "sender"),
                3,
                "{receiver} sees another address than {sender}'s own"
            );
        }
    }
}

fn nodes_and_pods_reach_each_other(lab: &Lab) {
    let state = lab.state();
    for (owner, pod) in state.pods() {
        for ip in &pod.ips {
            for node in &state.nodes {
                assert!(
                    lab.ping(node.name.as_str(), *ip),
                    "node {} -> {}/{} ({ip})",
                    node.name,
                    owner.name,
                    pod.name
                );
            }
        }
        let place = format!("{}/{}", owner.name, pod.name);
        for node in &state.nodes {
            for address in &node.underlay {
                if pod.ips.iter().any(|ip| ip.is_ipv4() == address.is_ipv4()) {
                    assert!(lab.ping(place.as_str(), *address), "{place} -> node {} ({address})", node.name);
                }
            }
        }
    }
}

/// The largest packet that the pod's MTU allows crosses whole, in both directions and families.
fn full_size_packets_cross(lab: &Lab, mtu: u64) {
    for (from, to) in [(("n1", "a"), ("n2", "a")), (("n3", "b"), ("n1", "b"))] {
        let place = format!("{}/{}", from.0, from.1);
        let link = lab.json(place.as_str(), &["ip", "-j", "link", "show", "eth0"]);
        assert_eq!(link[0]["mtu"].as_u64(), Some(mtu), "{place}");
        for ip in lab.ips(to.0, to.1) {
            let size = mtu - if ip.is_ipv4() { 28 } else { 48 };
            lab.run(
                place.as_str(),
                &[
                    "ping",
                    "-n",
                    "-q",
                    "-c",
                    "2",
                    "-i",
                    "0.1",
                    "-W",
                    "2",
                    "-M",
                    "do",
                    "-s",
                    &size.to_string(),
                    &ip.to_string(),
                ],
            );
        }
    }
}

/// At least so many bits a second.
fn bulk_data_crosses(lab: &Lab, least: f64) {
    for ip in lab.ips("n2", "a") {
        let server = lab.background("n2/a", &["iperf3", "-s", "-1"]);
        weft_tests::lab::wait_until("the server listens", std::time::Duration::from_secs(10), || {
            lab.run("n2/a", &["ss", "-Hltn", "sport = :5201"]).contains("5201")
        });
        let report = lab.json("n1/a", &["iperf3", "-J", "-t", "1", "-c", &ip.to_string()]);
        let bits = report["end"]["sum_received"]["bits_per_second"].as_f64().unwrap_or_default();
        println!("n1/a -> n2/a over {ip}: {:.2} Gbit/s", bits / 1e9);
        // A tunnel with wrong sizes or checksums lets pings through and next to nothing else.
        assert!(bits > least, "{ip}: {bits} bit/s: {report:#}");
        server.finish();
    }
}

/// A flow of pods is one entry of the connection tracking of each node: the tunnel's datagrams would be a second one.
fn tunnels_are_not_tracked(lab: &Lab) {
    let table = lab.run("n1", &["cat", "/proc/net/nf_conntrack"]);
    assert!(table.contains("dport=5201"), "the flows of the pods are not tracked:\n{table}");
    assert!(!table.contains("dport=8472"), "the tunnels are:\n{table}");
}

#[test]
fn pods_reach_pods_and_nodes_over_both_families_without_translation() {
    let lab = Lab::up(LabOptions::new("reach").underlay(Families::Dual));
    lab.ping_all();
    pods_see_each_others_own_addresses(&lab);
    nodes_and_pods_reach_each_other(&lab);
    full_size_packets_cross(&lab, 1450);
    bulk_data_crosses(&lab, 50e6);
    tunnels_are_not_tracked(&lab);
}

#[test]
fn an_underlay_without_ipv4_carries_both_families() {
    let lab = Lab::up(LabOptions::new("six").underlay(Families::V6));
    lab.ping_all();
    pods_see_each_others_own_addresses(&lab);
    full_size_packets_cross(&lab, 1430);
    bulk_data_crosses(&lab, 50e6);
    tunnels_are_not_tracked(&lab);
}

#[test]
fn encrypted_tunnels_carry_both_families_and_full_packets_over_either_underlay() {
    for (name, underlay, mtu) in [("enc4", Families::Dual, 1440), ("enc6", Families::V6, 1420)] {
        let lab = Lab::up(LabOptions::new(name).underlay(underlay).backend(Backend::Wireguard));
        lab.meet();
        pods_see_each_others_own_addresses(&lab);
        nodes_and_pods_reach_each_other(&lab);
        full_size_packets_cross(&lab, mtu);
        bulk_data_crosses(&lab, 1e6);
    }
}

#[test]
fn nodes_whose_subnets_the_operator_names_reach_each_other() {
    let lab = Lab::up(LabOptions::new("static").store(Store::Static));
    lab.ping_all();
    for (index, node) in ["n1", "n2", "n3"].iter().enumerate() {
        let expected = [format!("10.32.{}.0/24", index + 1), format!("fd00:32:0:{}::/64", index + 1)];
        assert_eq!(lab.subnets(node), expected.into_iter().collect(), "{node}");
    }
}

#[test]
fn traffic_that_leaves_the_cluster_has_the_nodes_address() {
    let lab = Lab::up(LabOptions::new("outside").nodes(2).pods(1));
    // The switch plays a host outside: it knows the underlay and nothing of pods.
    lab.sh("underlay", "ip address add 192.0.2.254/24 dev lab0");
    count_pings(&lab, "underlay", "192.0.2.1".parse().expect("an address"));
    lab.run("n1/a", &["ping", "-n", "-q", "-c", "3", "-i", "0.1", "-W", "2", "192.0.2.254"]);
    assert_eq!(counted(&lab, "underlay", "sender"), 3, "the outside sees another address than the node's");
    assert_eq!(counted(&lab, "underlay", "anyone"), 3);
}

#[test]
fn neighbours_that_are_one_hop_away_are_reached_without_a_tunnel_when_asked() {
    let lab = Lab::up(
        LabOptions::new("direct").underlay(Families::Dual).config("[overlay]\ndirect_routing = true"),
    );
    lab.ping_all();
    pods_see_each_others_own_addresses(&lab);
    let to = lab.ips("n2", "a");
    for ip in to {
        let route = lab.json("n1", &["ip", "-j", "route", "get", &ip.to_string()]);
        assert_eq!(route[0]["dev"], "eth0", "{ip} goes through a tunnel");
    }
}

#[test]
fn nodes_without_seeds_find_each_other_through_their_leases() {
    let lab = Lab::up(LabOptions::new("seedless").pods(1).started(2).config("[gossip]\nseeds = []"));
    lab.ping_all();
    // Nobody whom n3 knew is where it was: the one that it finds is at an address that n3 never had from anyone.
    lab.stop("n2");
    lab.sh("n1", "ip address del 192.0.2.1/24 dev eth0; ip address add 192.0.2.77/24 dev eth0");
    lab.sh("n1", "sed -i '/^address/s/192.0.2.1/192.0.2.77/' /etc/weft/weft.toml && grep 192.0.2.77 /etc/weft/weft.toml");
    lab.stop("n1");
    lab.start("n1");
    lab.start("n3");
    wait_until("n3 knows n1", PATIENCE, || lab.weft("n3", &["status"])["peers"]["alive"] == 1);
    lab.start("n2");
    let alive = |node: &str| lab.weft(node, &["status"])["peers"]["alive"] == 2;
    wait_until("all know each other", PATIENCE, || ["n1", "n2", "n3"].into_iter().all(alive));
    lab.meet();
}
