//! What must hold: of one node after everything that it does, of all nodes at every moment, and of all once it is quiet.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use weft_daemon::control::Control;
use weft_daemon::kernel::memory::MemoryKernel;
use weft_daemon::plan::model::{DETOUR, Encryption, VXLAN_V4, WIREGUARD, metric};
use weft_daemon::reconcile::reconcile;
use weft_ipam::lease::{HeldLease, LeaseValue};
use weft_ipam::store::Snapshot;
use weft_wire::mesh::MemberState;
use weft_wire::types::{MacAddress, NodeName};

use super::machine::{Machine, host_ifname};

/// A node that is fenced never announces: what it tells peers is what it holds, at the epoch that it holds it at.
pub fn announces_only_what_it_holds(control: &Control) -> Option<String> {
    let record = control.mesh.record()?;
    let held = control.leasing.held();
    let backed = |subnet, epoch| held.iter().any(|lease| lease.subnet == subnet && lease.epoch == epoch);
    let excess = record.facts.subnets.iter().find(|leased| !backed(leased.subnet, leased.epoch))?;
    (!record.left).then(|| format!("{} announces {} without its lease", record.node, excess.subnet))
}

/// A node that has seen another own its subnet does not hold it any more.
pub fn heeds_the_store(control: &Control, seen: &Snapshot) -> Option<String> {
    let node = &control.config.node.name;
    // An answer older than what the node knows teaches nothing.
    control.leasing.held().iter().find_map(|lease| {
        let entry = seen.entries.get(&lease.subnet)?;
        let value = LeaseValue::decode(lease.subnet, &entry.value).ok()?;
        (value.node != *node && value.epoch > lease.epoch)
            .then(|| format!("{node} holds {} though it saw {} own it", lease.subnet, value.node))
    })
}

/// Of two nodes that hold what overlaps, the store backs at most one.
pub fn live_leases_never_overlap(machines: &[&Machine], truth: &[LeaseValue]) -> Option<String> {
    let backed = |machine: &Machine, lease: &HeldLease| {
        truth.iter().any(|value| {
            (value.subnet, value.epoch) == (lease.subnet, lease.epoch)
                && value.node == machine.config.node.name
        })
    };
    let mut live: Vec<(&NodeName, HeldLease)> = Vec::new();
    for machine in machines {
        let Some(daemon) = &machine.daemon else { continue };
        for lease in daemon.control.leasing.held().into_iter().filter(|lease| backed(machine, lease)) {
            let name = &machine.config.node.name;
            if let Some((other, _)) = live.iter().find(|(_, other)| other.subnet.overlaps(lease.subnet)) {
                return Some(format!("{other} and {name} hold {}", lease.subnet));
            }
            live.push((name, lease));
        }
    }
    None
}

/// No address is in two pods, but for pods of a node whose lease another has taken.
pub fn no_address_is_used_twice(machines: &[&Machine], truth: &[LeaseValue]) -> Option<String> {
    let mut users = BTreeMap::new();
    for machine in machines {
        let name = &machine.config.node.name;
        for (id, pod) in &machine.pods {
            for address in &pod.addresses.0 {
                let own =
                    truth.iter().any(|value| value.node == *name && value.subnet.contains(address.address));
                if own && let Some(other) = users.insert(address.address, (name, id)) {
                    return Some(format!("{} is of {other:?} and of {name} {id}", address.address));
                }
            }
        }
    }
    None
}

/// What still differs from a whole network in which every machine of `machines` runs and no other does.
pub fn unsettled(machines: &[&Machine], truth: &[LeaseValue]) -> Option<String> {
    let running: Vec<_> = machines.iter().copied().filter(|machine| machine.daemon.is_some()).collect();
    let names: BTreeSet<_> = running.iter().map(|machine| machine.config.node.name.clone()).collect();
    for machine in &running {
        let name = &machine.config.node.name;
        let control = &machine.daemon.as_ref()?.control;
        let wrong = leases(machine, control, truth)
            .or_else(|| members(control, &names))
            .or_else(|| routes(machine, &running))
            .or_else(|| machine.pods_differ())
            .or_else(|| control.pass.running.then(|| "a pass runs".to_owned()));
        if let Some(wrong) = wrong {
            return Some(format!("{name}: {wrong}"));
        }
    }
    None
}

fn leases(machine: &Machine, control: &Control, truth: &[LeaseValue]) -> Option<String> {
    let held = control.leasing.held();
    let families = machine.config.cluster.carver.cidrs().len();
    let backed = |lease: &&HeldLease| {
        truth.iter().any(|value| value.subnet == lease.subnet && value.epoch == lease.epoch)
    };
    let count = held.iter().filter(backed).count();
    (count != families || held.len() != families).then(|| format!("holds {held:?} of {families} families"))
}

fn members(control: &Control, running: &BTreeSet<NodeName>) -> Option<String> {
    let alive = |state| matches!(state, MemberState::Alive);
    let known: BTreeSet<_> =
        control.mesh.members().filter(|m| alive(m.state)).map(|m| m.node.clone()).collect();
    let others: BTreeSet<_> =
        running.iter().filter(|name| **name != control.config.node.name).cloned().collect();
    (known != others).then(|| format!("thinks that {known:?} live"))
}

/// Where a daemon demands encryption no route leads to another node but through the device that encrypts.
pub fn nothing_leaves_in_clear(machine: &Machine) -> Option<String> {
    let daemon = machine.daemon.as_ref()?;
    if !daemon.fenced || daemon.config.encryption.policy != Encryption::Always {
        return None;
    }
    let routes = &machine.kernel.actual.state.routes;
    let ((prefix, _), route) =
        routes.iter().find(|(_, route)| ![WIREGUARD, DETOUR].contains(&route.dev.as_str()))?;
    Some(format!("{} sends to {prefix} in clear, by {}", machine.config.node.name, route.dev))
}

/// Returns whether packets between two machines must be encrypted.
fn must_encrypt(one: &Machine, other: &Machine) -> bool {
    let demands = |machine: &Machine| {
        machine.daemon.as_ref().is_some_and(|daemon| daemon.config.encryption.policy == Encryption::Always)
    };
    demands(one) || demands(other)
}

/// How the way to an encrypted peer is not as it should be.
fn sealed_way(machine: &Machine, peer: &Machine) -> Option<String> {
    let state = &machine.kernel.actual.state;
    let name = &peer.config.node.name;
    let Some(tunnels) = state.tunnels.get(WIREGUARD) else { return Some("no tunnels run".into()) };
    if tunnels.key != machine.disk.tunnel {
        return Some(format!("the tunnels use {}, which is not the node's key", tunnels.key));
    }
    let Some(known) = tunnels.peers.get(&peer.disk.tunnel) else {
        return Some(format!("no tunnel leads to {name} under its key"));
    };
    let endpoint = SocketAddr::new(peer.address.ip(), peer.config.encryption.port);
    let subnets = peer.daemon.as_ref()?.control.subnets();
    let right = known.endpoint == endpoint
        && known.prefixes.len() == subnets.len()
        && subnets.iter().all(|subnet| known.prefixes.contains(&subnet.net()));
    (!right).then(|| format!("the tunnel to {name} is {known:?}"))
}

/// The kernel leads to the subnets of the running machines, each by its own tunnel, and to no other.
fn routes(machine: &Machine, running: &[&Machine]) -> Option<String> {
    let state = &machine.kernel.actual.state;
    let mut wanted = BTreeSet::new();
    for peer in running.iter().filter(|peer| peer.number != machine.number) {
        let name = &peer.config.node.name;
        let sealed = must_encrypt(machine, peer);
        if sealed && let Some(wrong) = sealed_way(machine, peer) {
            return Some(wrong);
        }
        let mac = MacAddress::derived(name, "v4");
        if !sealed && state.fdb.get(&(VXLAN_V4.to_owned(), mac)) != Some(&peer.address.ip()) {
            return Some(format!("no forwarding entry leads to {name}"));
        }
        for subnet in peer.daemon.as_ref()?.control.subnets() {
            let prefix = subnet.net();
            wanted.insert((prefix, metric(prefix)));
            let Some(route) = state.routes.get(&(prefix, metric(prefix))) else {
                return Some(format!("no route to {prefix} of {name}"));
            };
            if sealed {
                if route.dev != WIREGUARD {
                    return Some(format!("the route to {prefix} of {name} goes by {}", route.dev));
                }
                continue;
            }
            let Some(via) = route.via else {
                return Some(format!("the route to {prefix} has no gateway"));
            };
            if route.dev != VXLAN_V4 || state.neighbours.get(&(VXLAN_V4.to_owned(), via)) != Some(&mac) {
                return Some(format!("the route to {prefix} does not lead to {name}"));
            }
        }
    }
    let partners: BTreeSet<_> = running
        .iter()
        .filter(|peer| peer.number != machine.number && must_encrypt(machine, peer))
        .map(|peer| peer.disk.tunnel)
        .collect();
    if let Some(stranger) =
        state.tunnels.values().flat_map(|tunnels| tunnels.peers.keys()).find(|key| !partners.contains(key))
    {
        return Some(format!("a tunnel leads to {stranger}, the key of no one"));
    }
    let excess = state.routes.keys().find(|key| !wanted.contains(key))?;
    Some(format!("a route to {} of no one", excess.0))
}

/// A second pass finds nothing to do.
pub fn a_pass_changes_nothing(machine: &Machine) -> Option<String> {
    let name = machine.config.node.name.clone();
    let inputs = machine.daemon.as_ref()?.last.clone()?;
    let mut kernel: MemoryKernel = machine.kernel.clone();
    let report = reconcile(&mut kernel, &inputs);
    (report.applied > 0 || !report.failed.is_empty())
        .then(|| format!("{name}: a pass after quiet made {} changes: {:?}", report.applied, report.failed))
}

impl Machine {
    /// How the journal, the pool, the pods and their host ends disagree.
    pub fn pods_differ(&self) -> Option<String> {
        let daemon = self.daemon.as_ref()?;
        let pods: BTreeSet<_> = self.pods.keys().collect();
        let journal: BTreeSet<_> = self.disk.journal.keys().collect();
        if pods != journal {
            return Some(format!("pods {pods:?}, journal {journal:?}"));
        }
        let ends: BTreeSet<_> = self.kernel.actual.veths.keys().cloned().collect();
        let wanted: BTreeSet<_> = self.pods.keys().map(host_ifname).collect();
        if ends != wanted {
            return Some(format!("host ends {ends:?}, pods {wanted:?}"));
        }
        if let Some((name, _)) = self.kernel.actual.veths.iter().find(|(_, veth)| !veth.bridged) {
            return Some(format!("{name} is no port of the bridge"));
        }
        daemon.leaked().map(|subnet| format!("{subnet} has lost an address"))
    }
}
