//! Steps of more than one command: what a container runtime, an operator, another program or a power cut does.
//!
//! Not the breaks of single objects, which are in `world`.
//! Invariant: a container that a step made and could not remove is remembered until a DEL of it succeeds.

use std::time::Duration;

use weft_tests::lab::{Lab, Request, wait_until};

use super::step::{Kind, Step};

/// Calls the shim as a runtime does. Arguments: command, container; the namespace has the container's name.
const CNI: &str = r#"cni() {
    echo '{"cniVersion":"1.0.0","name":"weft","type":"weft-cni"}' | CNI_COMMAND=$1 CNI_CONTAINERID=$2 \
        CNI_NETNS=/run/netns/$2 CNI_IFNAME=eth0 CNI_PATH=/opt/cni/bin timeout 20 /opt/cni/bin/weft-cni
}
"#;

/// Writes something that has weft's mark and that no plan has. Arguments: a number that makes it differ from others.
const PLANTS: [&str; 6] = [
    "ip route add 10.46.$0.0/24 dev weft0 proto 117",
    "ip -6 route add fd00:32:ffff:$0::/64 dev weft0 proto 117",
    "ip route add blackhole 10.45.$0.0/24 proto 117",
    "bridge fdb add 02:00:00:00:00:$(printf %02x $(($0 % 200))) dev weft-vx4 dst 192.0.2.250 self permanent",
    "ip neigh add 10.44.0.$(($0 % 200 + 1)) lladdr 02:00:00:00:00:01 dev weft-vx4 nud permanent",
    "nft add chain inet weft planted$0",
];

/// Changes something of weft's without deleting it.
const TWISTS: [&str; 8] = [
    "m=$(bridge fdb show dev weft-vx4 | awk '/dst/{print $1; exit}') && bridge fdb del $m dev weft-vx4 self; \
     bridge fdb add $m dev weft-vx4 dst 192.0.2.251 self permanent",
    "a=$(ip -o neigh show dev weft-vx4 nud permanent | awk '{print $1; exit}') && \
     ip neigh replace $a lladdr 02:00:00:00:00:02 dev weft-vx4 nud permanent",
    "sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0",
    "nft flush table inet weft",
    "ip link set weft-vx4 address 02:00:00:00:00:03",
    "ip link set weft0 mtu 1290; ip link set weft-vx4 mtu 1290",
    "nft flush chain inet weft clear_out; ip link set weft-wg mtu 1290",
    "for r in $(ip -o route show proto 117 | awk '{print $1}'); do ip route replace $r dev weft0 proto 117 metric 2117; done",
];

/// What the steps of this module leave to be undone.
#[derive(Debug, Default)]
pub struct Deeds {
    /// Node and container of calls whose DEL has not succeeded.
    left: Vec<(String, String)>,
    calls: usize,
    /// Nodes with a table of another program.
    tables: Vec<String>,
    boots: usize,
}

fn shell(lab: &Lab, node: &str, script: &str, argument: &str) -> bool {
    lab.exec(node, &["sh", "-c", script, argument]).status.success()
}

impl Deeds {
    /// Does a step of this module.
    pub fn apply(&mut self, lab: &Lab, names: &[String], step: Step, other: &str) {
        let node = names[step.node - 1].as_str();
        let choice = step.choice as usize;
        match step.kind {
            Kind::CutOneWay => {
                let state = lab.state();
                let mac = |name: &str| state.node(name).expect("the node exists").mac.clone();
                let rule = format!("nft add element bridge lab cut '{{ {} . {} }}'", mac(node), mac(other));
                shell(lab, "underlay", &rule, "");
            }
            Kind::Plant => {
                shell(lab, node, PLANTS[choice % PLANTS.len()], &(choice % 250).to_string());
            }
            Kind::Twist => {
                shell(lab, node, TWISTS[choice % TWISTS.len()], "");
            }
            Kind::AddForeignTable => {
                let script = "nft add table inet other && nft add chain inet other c '{ type filter hook forward priority 10; }' \
                              && nft add rule inet other c counter accept";
                if shell(lab, node, script, "") {
                    self.tables.push(node.to_owned());
                }
            }
            Kind::Calls => self.calls(lab, node),
            Kind::UnknownDel => {
                shell(lab, node, &format!("{CNI} cni DEL $0"), &format!("unknown{choice}"));
            }
            Kind::Reboot => self.reboot(lab, node),
            Kind::Return => leave_and_return(lab, node),
            Kind::RotateRing => rotate_ring(lab, names),
            other => unreachable!("{other:?} is a step of the world's"),
        }
    }

    /// The other program's table went with all the rules of a node.
    pub fn forget_tables(&mut self, node: &str) {
        self.tables.retain(|there| there != node);
    }

    /// Nodes whose kernel has lost the table of another program.
    pub fn lost_tables(&self, lab: &Lab) -> Vec<&str> {
        let there = |node: &&str| {
            let output = lab.exec(*node, &["nft", "list", "table", "inet", "other"]);
            String::from_utf8_lossy(&output.stdout).contains("counter")
        };
        self.tables.iter().map(String::as_str).filter(|node| !there(node)).collect()
    }

    /// Three ADDs at once, one of them again, and all DELs at once, one of them again.
    fn calls(&mut self, lab: &Lab, node: &str) {
        self.calls += 1;
        let names: Vec<String> = (1..=3).map(|index| format!("call{}-{index}", self.calls)).collect();
        let list = names.join(" ");
        let script = format!(
            "{CNI} for c in {list}; do ip netns add $c; done
             for c in {list}; do cni ADD $c & done; wait
             cni ADD {first}
             for c in {list}; do cni DEL $c & done; cni DEL {first} & wait",
            first = names[0]
        );
        shell(lab, node, &script, "");
        self.left.extend(names.into_iter().map(|name| (node.to_owned(), name)));
    }

    /// A node loses power: its kernel's objects, what is in memory, its pods and its boot id are gone.
    fn reboot(&mut self, lab: &Lab, node: &str) {
        lab.handle().request(&Request::Kill { node: node.into() }).ok();
        self.boots += 1;
        self.forget_tables(node);
        let script = format!(
            "nft flush ruleset
             for n in $(ls /run/netns); do ip netns delete $n; done
             for d in $(ls /sys/class/net | grep -E '^weft|^foreign0$'); do ip link del $d; done
             ip route flush proto 117; ip -6 route flush proto 117
             sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0
             rm -rf /run/weft
             umount /proc/sys/kernel/random/boot_id
             printf '%08x-0000-4000-8000-000000000000\\n' {} > /run/boot-id
             mount --bind /run/boot-id /proc/sys/kernel/random/boot_id",
            self.boots
        );
        shell(lab, node, &format!("{{ {script}; }} >/dev/null 2>&1"), "");
    }

    /// Repeats the DELs that a runtime still owes.
    ///
    /// # Panics
    /// When one fails although nothing is broken any more.
    pub fn settle(&mut self, lab: &Lab) {
        shell(lab, "underlay", "nft flush set bridge lab cut", "");
        for (node, container) in self.left.drain(..) {
            let script = format!("{CNI} cni DEL $0 && ! {{ [ -e /run/netns/$0 ] && ! ip netns delete $0; }}");
            let output = lab.exec(node.as_str(), &["sh", "-c", &script, &container]);
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(
                output.status.success(),
                "{node}: the DEL of {container} fails in a whole cluster: {said}"
            );
        }
    }
}

/// An operator takes a node out of the cluster and starts it again.
fn leave_and_return(lab: &Lab, node: &str) {
    let state = lab.state();
    let view = state.node(node).expect("the node exists");
    if view.daemon.is_none() {
        return;
    }
    for pod in &view.pods {
        lab.handle().request(&Request::PodRemove { node: node.into(), pod: pod.name.clone() }).ok();
    }
    if lab.exec(node, &["timeout", "10", "weft", "leave"]).status.success() {
        let ended = || lab.tell(Request::Status).node(node).is_ok_and(|view| view.daemon.is_none());
        wait_until("the daemon that leaves has ended", Duration::from_secs(20), ended);
    }
}

/// An operator changes the key of the cluster, and stops where a step of it fails.
fn rotate_ring(lab: &Lab, names: &[String]) {
    if lab.state().nodes.iter().any(|node| node.daemon.is_none()) {
        return;
    }
    let weft = |node: &str, words: &[&str]| {
        let mut all = vec!["timeout", "10", "weft", "-o", "json", "cluster-key"];
        all.extend(words);
        lab.exec(node, &all)
    };
    let ids = |node: &str| -> Vec<String> {
        let list: serde_json::Value =
            serde_json::from_slice(&weft(node, &["list"]).stdout).unwrap_or_default();
        let ids = list["ids"].as_array().cloned().unwrap_or_default();
        ids.iter().filter_map(|id| id.as_str().map(str::to_owned)).collect()
    };
    let all = |words: &[&str]| names.iter().all(|node| weft(node, words).status.success());
    let generated = lab.exec(names[0].as_str(), &["timeout", "10", "weft", "cluster-key", "generate"]);
    let secret = String::from_utf8_lossy(&generated.stdout).trim().to_owned();
    let before = ids(&names[0]);
    if !all(&["add", &secret]) {
        return;
    }
    let Some(new) = ids(&names[0]).into_iter().find(|id| !before.contains(id)) else { return };
    if !all(&["use", &new]) {
        return;
    }
    // What a slow path still carries under the old key comes before the answer to a ping.
    for node in names {
        lab.exec(node.as_str(), &["timeout", "3", "weft", "ping"]);
    }
    for node in names {
        for old in ids(node).into_iter().filter(|id| *id != new) {
            weft(node, &["remove", &old]);
        }
    }
}
