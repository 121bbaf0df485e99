//! A lab that steps befall: it does them, remembers what it broke, and mends all of it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;
use weft_tests::lab::{Backend, Impairment, Lab, LabOptions, Ping, Request};

use super::deeds::Deeds;
use super::step::{Kind, Step};

/// How many nodes there are.
pub const NODES: usize = 6;
/// How many of them steps befall; the others look on, and lose no packet of each other's.
pub const BEFALLEN: usize = 4;
/// The most pods of a node.
const MOST_PODS: usize = 6;
/// Counts on the underlay what has a pod's address outside a tunnel, and VXLAN.
const CLEAR: &str = "nft -f - <<'END'
table bridge clear {
  chain forward {
    type filter hook forward priority 0
    ip saddr 10.32.0.0/12 counter
    ip daddr 10.32.0.0/12 counter
    udp dport 8472 counter
  }
}
END";

/// What the disk of a node's state holds, in KiB.
const DISK_KIB: u32 = 2048;

/// The lab, and what is broken in it.
pub struct World {
    pub lab: Lab,
    store_lost: bool,
    store_locked: bool,
    moved: [bool; NODES],
    pub foreign: [bool; NODES],
    next_pod: usize,
    /// What the steps of several commands have left.
    pub deeds: Deeds,
    /// All pod traffic must be encrypted.
    pub encrypted: bool,
}

fn name(node: usize) -> String {
    format!("n{node}")
}

impl World {
    /// All nodes with a pod each, and a small disk for the state of each.
    pub fn new() -> Self {
        // Two tests may have a lab at the same time.
        static LABS: AtomicUsize = AtomicUsize::new(0);
        let label = format!("chaos{}", LABS.fetch_add(1, Ordering::Relaxed));
        let encrypted = std::env::var("CHAOS_BACKEND").is_ok_and(|backend| backend == "wireguard");
        let backend = if encrypted { Backend::Wireguard } else { Backend::Vxlan };
        let options = LabOptions::new(&label).nodes(NODES).started(0).pods(1).backend(backend);
        // Without an address of its own in the configuration a node takes what the device has. The store has a
        // directory of its own behind a link, so that it goes and comes at once.
        let config = "[underlay]\naddress = []\n[store]\npath = \"/run/weft-lab/shared/store/store.db\"";
        let lab = Lab::up(options.config(config));
        lab.sh("n1", "cd /run/weft-lab/shared && mkdir real && ln -s real store");
        lab.sh("underlay", CLEAR);
        for node in 1..=NODES {
            let mount = format!("mount -t tmpfs -o size={DISK_KIB}k,mode=0755 weft-state /var/lib/weft");
            lab.sh(name(node).as_str(), &mount);
            lab.start(&name(node));
        }
        let (store_lost, store_locked, moved, foreign, deeds) = Default::default();
        Self { lab, store_lost, store_locked, moved, foreign, next_pod: 0, deeds, encrypted }
    }

    /// The names of all nodes.
    pub fn names() -> Vec<String> {
        (1..=NODES).map(name).collect()
    }

    /// Starts pings between the nodes that look on.
    pub fn watch(&self) -> Vec<Ping> {
        let (from, to) = (name(BEFALLEN + 1), name(BEFALLEN + 2));
        let pod = format!("{from}/a");
        self.lab.ips(&to, "a").into_iter().map(|ip| self.lab.background_ping(pod.as_str(), ip)).collect()
    }

    fn runs(&self, node: usize) -> Option<u32> {
        self.lab.state().node(&name(node)).expect("the node exists").daemon
    }

    /// Tells the lab something that may fail in the midst of trouble.
    fn try_to(&self, request: &Request) -> bool {
        self.lab.handle().request(request).is_ok()
    }

    /// Does a step; one that makes no sense now does nothing.
    pub fn apply(&mut self, step: Step) {
        let node = name(step.node);
        let choice = step.choice as usize;
        let other = name(1 + (step.node + choice % (NODES - 1)) % NODES);
        if let Some((list, command)) = removal(step.kind) {
            return self.delete(&node, choice, list, command);
        }
        match step.kind {
            Kind::Kill | Kind::Stop => {
                let request =
                    if step.kind == Kind::Kill { Request::Kill { node } } else { Request::Stop { node } };
                self.try_to(&request);
            }
            Kind::Start | Kind::StartAhead => {
                let ahead_s = if step.kind == Kind::Start { 0 } else { 3600 * (1 + step.choice as u64) };
                // Without its store a node that never had a lease would wait for long.
                if self.runs(step.node).is_none() && !self.store_lost && !self.store_locked {
                    self.try_to(&Request::Start { node, ahead_s });
                }
            }
            Kind::Pause => {
                if let Some(pid) = self.runs(step.node) {
                    let pause = Duration::from_millis(200 + 3 * u64::from(step.choice));
                    let script =
                        format!("kill -STOP {pid}; sleep {:.3}; kill -CONT {pid}", pause.as_secs_f64());
                    self.lab.exec(node.as_str(), &["sh", "-c", &script]);
                }
            }
            Kind::Cut => drop(self.try_to(&Request::Cut { a: node, b: other })),
            Kind::Heal => self.heal(),
            Kind::Delay => {
                self.try_to(&Request::Delay { a: node, b: other, ms: 5 + u64::from(step.choice) / 5 });
            }
            Kind::FlushRuleset => {
                self.deeds.forget_tables(&node);
                self.quietly(&node, "nft flush ruleset");
            }
            Kind::AddForeign => {
                self.foreign[step.node - 1] = true;
                self.quietly(
                    &node,
                    "ip link add foreign0 type bridge; ip address add 172.30.0.1/24 dev foreign0; ip link set foreign0 up; \
                     ip route replace 172.31.0.0/24 dev foreign0 proto 99 metric 7",
                );
            }
            Kind::BounceUnderlay => {
                self.quietly(&node, "ip link set eth0 down; sleep 0.1; ip link set eth0 up")
            }
            // The first two are everyone's seeds.
            Kind::MoveUnderlay if step.node <= 2 => {}
            Kind::MoveUnderlay => {
                let (old, new) = (
                    address(step.node, self.moved[step.node - 1]),
                    address(step.node, !self.moved[step.node - 1]),
                );
                self.moved[step.node - 1] ^= true;
                self.quietly(
                    &node,
                    &format!("ip address del {old}/24 dev eth0; ip address add {new}/24 dev eth0"),
                );
            }
            Kind::ResizeUnderlay => {
                let mtu = [1500, 1400, 1450][choice % 3];
                self.quietly(&node, &format!("ip link set eth0 mtu {mtu}"));
            }
            Kind::AddPod | Kind::RemovePod | Kind::VanishPod => self.change_pods(step),
            Kind::LoseStore if !self.store_lost && !self.store_locked => {
                self.store_lost = true;
                self.quietly("n1", "cd /run/weft-lab/shared && ln -s gone new && mv -T new store");
            }
            Kind::LockStore if !self.store_lost && !self.store_locked => {
                // Only where the file system knows the attribute.
                self.store_locked = true;
                self.quietly("n1", "chattr +i /run/weft-lab/shared/store/store.db*");
            }
            Kind::LoseStore | Kind::LockStore => {}
            Kind::FindStore => self.find_store(),
            Kind::FillDisk => self.quietly(&node, "dd if=/dev/zero of=/var/lib/weft/fill bs=1k 2>/dev/null"),
            Kind::FreeDisk => self.quietly(&node, "rm -f /var/lib/weft/fill"),
            Kind::RotateKey => {
                self.lab.exec(node.as_str(), &["weft", "rotate-key"]);
            }
            kind => {
                if kind == Kind::Reboot {
                    self.foreign[step.node - 1] = false;
                }
                self.deeds.apply(&self.lab, &Self::names(), step, &other);
            }
        }
    }

    fn change_pods(&mut self, step: Step) {
        let (node, choice) = (name(step.node), step.choice as usize);
        if step.kind == Kind::AddPod {
            let pods = self.lab.state().node(&node).expect("the node exists").pods.len();
            if pods < MOST_PODS && self.runs(step.node).is_some() {
                self.next_pod += 1;
                self.try_to(&Request::PodAdd { node, pod: format!("p{}", self.next_pod) });
            }
        } else if let Some(pod) = self.pod(&node, choice) {
            if step.kind == Kind::VanishPod {
                self.quietly(&node, &format!("ip netns delete {pod}"));
            }
            self.try_to(&Request::PodRemove { node, pod });
        }
    }

    fn quietly(&self, node: &str, script: &str) {
        self.lab.exec(node, &["sh", "-c", &format!("{{ {script}; }} >/dev/null 2>&1")]);
    }

    /// Picks a line of a list and hands it to a command.
    fn delete(&self, node: &str, choice: usize, list: &str, command: &str) {
        let output = self.lab.exec(node, &["sh", "-c", list]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        if lines.is_empty() {
            return;
        }
        let line = lines[choice % lines.len()].replace(" linkdown", "");
        // The family is an option of ip itself.
        let script = match line.strip_prefix("-6 ") {
            Some(line) => format!("{} {line}", command.replacen("ip ", "ip -6 ", 1)),
            None => format!("{command} {line}"),
        };
        self.quietly(node, &script);
    }

    fn pod(&self, node: &str, choice: usize) -> Option<String> {
        let state = self.lab.state();
        let pods = &state.node(node).expect("the node exists").pods;
        (!pods.is_empty()).then(|| pods[choice % pods.len()].name.clone())
    }

    fn heal(&self) {
        let state = self.lab.state();
        for (a, b) in state.cuts {
            self.try_to(&Request::Heal { a, b });
        }
        for Impairment { from, to, .. } in state.impairments {
            self.try_to(&Request::Delay { a: from, b: to, ms: 0 });
        }
    }

    fn find_store(&mut self) {
        if std::mem::take(&mut self.store_lost) {
            self.quietly("n1", "cd /run/weft-lab/shared && ln -s real new && mv -T new store");
        }
        if std::mem::take(&mut self.store_locked) {
            self.quietly("n1", "chattr -i /run/weft-lab/shared/store/store.db*");
        }
    }

    /// Ends all trouble: what is left to do is weft's.
    pub fn become_quiet(&mut self) {
        self.heal();
        self.find_store();
        for node in 1..=NODES {
            self.quietly(&name(node), "rm -f /var/lib/weft/fill; ip link set eth0 up mtu 1500");
        }
        for node in 1..=NODES {
            if self.runs(node).is_none() {
                self.lab.start(&name(node));
            }
        }
        self.deeds.settle(&self.lab);
        // A runtime repeats a DEL that failed.
        for node in self.lab.state().nodes {
            for pod in node.pods {
                let path = format!("/run/netns/{}", pod.name);
                if !self.lab.exec(node.name.as_str(), &["test", "-e", &path]).status.success() {
                    self.lab.tell(Request::PodRemove { node: node.name.clone(), pod: pod.name });
                }
            }
        }
    }

    /// How many packets of pods crossed the underlay in clear, or in VXLAN.
    pub fn clear_packets(&self) -> u64 {
        let script = "nft list table bridge clear | grep -o 'packets [0-9]*' | cut -d' ' -f2";
        self.lab.sh("underlay", script).lines().filter_map(|line| line.parse::<u64>().ok()).sum()
    }

    /// What weft says of a node's pods: the container of each.
    pub fn known_pods(&self, node: &str) -> Vec<String> {
        let pods = self.lab.weft(node, &["pods"]);
        let pods = pods["pods"].as_array().cloned().unwrap_or_default();
        pods.iter().filter_map(|pod| pod["id"].as_str().map(str::to_owned)).collect()
    }

    /// The addresses in the namespace of a pod, as the kernel tells.
    pub fn addresses(&self, node: &str, pod: &str) -> Vec<String> {
        let devices = self
            .lab
            .json(node, &["ip", "-n", pod, "-j", "address", "show", "dev", "eth0", "scope", "global"]);
        let infos =
            devices.as_array().into_iter().flatten().flat_map(|device| device["addr_info"].as_array());
        infos.flatten().filter_map(|info: &Value| info["local"].as_str().map(str::to_owned)).collect()
    }
}

fn address(node: usize, moved: bool) -> String {
    format!("192.0.2.{}", if moved { 100 + node } else { node })
}

/// What lists the objects of a kind in the kernel, and what one of them is handed to; nothing for a step of another kind.
fn removal(kind: Kind) -> Option<(&'static str, &'static str)> {
    let devices = "ls /sys/class/net | grep -E '^weft(0|-vx[46]|-wg)$'";
    match kind {
        Kind::DeleteRoute => Some((
            "ip -o route show proto 117; ip -o -6 route show proto 117 | sed 's/^/-6 /'",
            "ip route del",
        )),
        Kind::DeleteNeighbour => Some((
            "for d in weft-vx4 weft-vx6; do ip -o neigh show dev $d nud permanent | sed \"s/ .*/ dev $d/\"; done",
            "ip neigh del",
        )),
        Kind::DeleteFdb => Some((
            "for d in weft-vx4 weft-vx6; do bridge fdb show dev $d | grep dst | sed \"s/ .*/ dev $d/\"; done",
            "bridge fdb del",
        )),
        Kind::DeleteAddress => {
            Some(("ip -o address show dev weft0 | awk '{print $4, \"dev weft0\"}'", "ip address del"))
        }
        Kind::DeleteLink => Some((devices, "ip link del")),
        Kind::DownLink => Some((devices, "ip link set down dev")),
        Kind::Unbridge => {
            Some(("ls /sys/class/net | grep -E '^weft[0-9a-f]{8}$'", "ip link set nomaster dev"))
        }
        _ => None,
    }
}
