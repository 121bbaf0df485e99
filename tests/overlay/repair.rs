//! Whatever of weft's is deleted by hand is back within a second, by the kernel's word and by ping.

use std::time::{Duration, Instant};

use serde_json::Value;
use weft_tests::lab::{Families, Lab, LabOptions, differences, wait_until};

/// The promise.
const REPAIR: Duration = Duration::from_secs(1);

/// Longer than the promise, so that a late repair is told from none.
const PATIENCE: Duration = Duration::from_secs(20);

struct Scene {
    lab: Lab,
    whole: Value,
}

impl Scene {
    fn new(name: &str, underlay: Families) -> Self {
        let lab = Lab::up(LabOptions::new(name).pods(1).underlay(underlay));
        lab.ping_all();
        let whole = lab.picture("n1");
        for part in ["links", "addresses", "neighbours", "fdb", "routes", "nft"] {
            assert!(
                whole[part].as_array().is_some_and(|part| !part.is_empty()),
                "n1 has no {part}: {whole:#}"
            );
        }
        Scene { lab, whole }
    }

    /// Breaks something on n1 and measures how long it takes until all is as before.
    fn repaired(&self, what: &str, script: &str) {
        let began = Instant::now();
        self.lab.sh("n1", script);
        let broken = Instant::now();
        let mut picture = Value::Null;
        while broken.elapsed() < PATIENCE {
            picture = self.lab.picture("n1");
            if picture == self.whole {
                break;
            }
        }
        let took = broken.elapsed();
        assert_eq!(
            differences(&self.whole, &picture),
            [""; 0],
            "{what}: not repaired after {PATIENCE:?} ({script})"
        );
        println!(
            "{what}: whole again after {} ms (the deletion took {} ms)",
            took.as_millis(),
            (broken - began).as_millis()
        );
        assert!(took < REPAIR, "{what}: repaired only after {took:?} ({script})");
        for node in ["n2", "n3"] {
            for ip in self.lab.ips(node, "a") {
                assert!(self.lab.ping("n1/a", ip), "{what}: n1/a no longer reaches {node}/a ({ip})");
            }
        }
    }

    /// The first entry of a part of the picture, cut at blanks, without quotes.
    fn first(&self, part: &str, with: &str) -> Vec<String> {
        let entries = self.whole[part].as_array().expect("the part is a list");
        let entry = entries.iter().filter_map(Value::as_str).find(|entry| entry.contains(with));
        let entry = entry.unwrap_or_else(|| panic!("no {part} with {with:?}: {entries:?}"));
        entry.split(' ').map(|word| word.trim_matches('"').to_owned()).collect()
    }
}

fn each_kind(scene: &Scene, device: &str) {
    for family in [".", ":"] {
        let prefix = &scene.first("routes", family)[0];
        let version = if family == "." { "-4" } else { "-6" };
        scene.repaired("route", &format!("ip {version} route del {prefix} proto 117"));
        let neighbour = scene.first("neighbours", family);
        scene.repaired("neighbour", &format!("ip neighbour del {} dev {}", neighbour[1], neighbour[0]));
        let addresses: Vec<Vec<String>> = ["weft0", device]
            .iter()
            .filter_map(|owner| {
                let entries = scene.whole["addresses"].as_array()?;
                let entry = entries
                    .iter()
                    .filter_map(Value::as_str)
                    .find(|entry| entry.contains(owner) && entry.contains(family))?;
                Some(entry.split(' ').map(|word| word.replace('"', "")).collect())
            })
            .collect();
        assert!(!addresses.is_empty(), "no address of family {family}");
        for address in addresses {
            scene.repaired(
                &format!("address of {}", address[0]),
                &format!("ip address del {} dev {}", address[1], address[0]),
            );
        }
    }
    let fdb = scene.first("fdb", device);
    scene.repaired("FDB entry", &format!("bridge fdb del {} dev {} dst {} self", fdb[1], fdb[0], fdb[2]));
    scene.repaired("VXLAN device", &format!("ip link del {device}"));
    scene.repaired("bridge", "ip link del weft0");
    scene.repaired("nftables table", "nft delete table inet weft");
}

#[test]
fn every_kind_of_deletion_is_repaired_within_a_second() {
    each_kind(&Scene::new("repair4", Families::V4), "weft-vx4");
}

#[test]
fn every_kind_of_deletion_is_repaired_within_a_second_over_ipv6() {
    each_kind(&Scene::new("repair6", Families::V6), "weft-vx6");
}

#[test]
fn changes_that_are_not_deletions_are_repaired_too() {
    let scene = Scene::new("repairx", Families::V4);
    scene.repaired("rules of the table", "nft flush table inet weft");
    scene.repaired("VXLAN device down", "ip link set weft-vx4 down");
    scene.repaired("bridge down", "ip link set weft0 down");
    scene.repaired("MTU of the bridge", "ip link set weft0 mtu 1300");
    scene.repaired(
        "port of the bridge",
        "ip link set $(ip -o link show master weft0 | sed 's/^[0-9]*: \\([^@:]*\\).*/\\1/;q') nomaster",
    );
    scene.repaired(
        "many things at once",
        "ip link del weft0; ip link del weft-vx4; nft delete table inet weft; ip route flush proto 117",
    );
}

#[test]
fn what_is_not_wefts_stays_as_it_is() {
    let lab = Lab::up(LabOptions::new("foreign").nodes(2).pods(1));
    lab.sh(
        "n1",
        "ip route add 198.51.100.0/24 dev eth0 proto 42
         ip route add 203.0.113.0/24 dev weft-vx4 proto 42 scope link
         ip link add foreign0 type bridge
         ip link set foreign0 up
         ip address add 198.51.100.1/32 dev foreign0
         nft add table inet foreign
         nft add chain inet foreign c '{ type filter hook forward priority 10; }'",
    );
    let foreign = || {
        lab.sh(
            "n1",
            "ip -o route show proto 42; ip -o address show dev foreign0 | sed 's/ *valid_lft.*//'; nft list table inet foreign",
        )
    };
    let before = foreign();
    // A repair passes over everything that is there.
    lab.sh("n1", "ip link del weft0");
    wait_until("the bridge is back", PATIENCE, || {
        lab.exec("n1", &["ip", "link", "show", "weft0"]).status.success()
    });
    lab.kill("n1");
    lab.start("n1");
    wait_until("routes are right", PATIENCE, || lab.weft_routes("n1").len() > 1);
    assert_eq!(foreign(), before);
}
