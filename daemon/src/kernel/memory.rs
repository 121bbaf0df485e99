//! A kernel in memory, for tests: what the real one does with operations, as far as the plan can see.
//!
//! Invariants: it refuses what the real kernel refuses (a device twice, a route over a device that is not there or
//! from an address that is not the node's), it takes along what the real kernel takes along when something goes,
//! and it refuses every operation on an object without weft's mark.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::{Kernel, KernelError, UnderlayError, UnderlaySpec};
use crate::plan::model::{
    Actual, BRIDGE, DETOUR, Op, Sessions, State, Underlay, VXLAN_V4, VXLAN_V6, WIREGUARD, is_host_veth,
};

/// The kernel of one machine.
#[derive(Debug, Clone)]
pub struct MemoryKernel {
    /// What carries weft's mark, and the host ends of pods.
    pub actual: Actual,
    /// What carries the tunnels.
    pub underlay: Result<Underlay, UnderlayError>,
    /// Whom there are sessions with.
    pub sessions: Sessions,
    /// So many of the operations to come are refused for want of memory.
    pub refusals: usize,
    /// So many of the dumps to come fail.
    pub failed_dumps: usize,
}

impl MemoryKernel {
    /// A kernel that holds nothing of weft's.
    pub fn new(underlay: Result<Underlay, UnderlayError>) -> Self {
        Self {
            actual: Actual::default(),
            underlay,
            sessions: Sessions::default(),
            refusals: 0,
            failed_dumps: 0,
        }
    }

    /// Removes a device as anyone may, with what hangs on it.
    pub fn remove_link(&mut self, name: &str) -> bool {
        let state = &mut self.actual.state;
        if state.links.remove(name).is_none() {
            return false;
        }
        let lost: Vec<_> = state.addresses.extract_if(.., |(dev, _)| dev == name).collect();
        lost.iter().for_each(|(_, address)| forget_source(state, *address));
        state.neighbours.retain(|(dev, _), _| dev != name);
        state.fdb.retain(|(dev, _), _| dev != name);
        state.routes.retain(|_, route| route.dev != name);
        state.offloads.remove(name);
        state.tunnels.remove(name);
        state.sysctls.retain(|path, _| !path.contains(&format!("/{name}/")));
        if name == BRIDGE {
            self.actual.veths.values_mut().for_each(|veth| veth.bridged = false);
        }
        true
    }

    fn is_known_device(&self, name: &str) -> bool {
        let underlay = self.underlay.as_ref().is_ok_and(|underlay| underlay.device == name);
        underlay || self.actual.state.links.contains_key(name)
    }

    fn perform(&mut self, op: &Op) -> Result<(), String> {
        check_mark(op, self.underlay.as_ref().ok())?;
        match op.clone() {
            Op::AddLink(name, link) => {
                if self.actual.state.links.contains_key(&name) {
                    return Err(format!("{name} exists"));
                }
                self.actual.state.links.insert(name, link);
            }
            Op::SetLink(name, link) => {
                let state = &mut self.actual.state;
                let found = state.links.get_mut(&name).ok_or("no such device")?;
                if found.kind != link.kind {
                    return Err(format!("{name} cannot become another kind of device"));
                }
                if found.mac != link.mac {
                    state.neighbours.retain(|(dev, _), _| *dev != name);
                }
                *found = link;
            }
            Op::DelLink(name) => some(self.remove_link(&name))?,
            Op::AddAddress(dev, net) => {
                self.has_link(&dev)?;
                self.actual.state.addresses.insert((dev, net));
            }
            Op::DelAddress(dev, net) => {
                some(self.actual.state.addresses.remove(&(dev, net)))?;
                forget_source(&mut self.actual.state, net);
            }
            Op::SetNeighbour(dev, to, mac) => {
                self.has_link(&dev)?;
                self.actual.state.neighbours.insert((dev, to), mac);
            }
            Op::DelNeighbour(dev, to) => some(self.actual.state.neighbours.remove(&(dev, to)).is_some())?,
            Op::SetFdb(dev, mac, to) => {
                self.has_link(&dev)?;
                self.actual.state.fdb.insert((dev, mac), to);
            }
            Op::DelFdb(dev, mac, _) => some(self.actual.state.fdb.remove(&(dev, mac)).is_some())?,
            Op::SetRoute(prefix, metric, route) => {
                if !self.is_known_device(&route.dev) {
                    return Err(format!("no device {}", route.dev));
                }
                let own = |source| self.actual.state.addresses.iter().any(|(_, net)| net.addr() == source);
                if route.source.is_some_and(|source| !own(source)) {
                    return Err("the source is no address of this node".into());
                }
                self.actual.state.routes.insert((prefix, metric), route);
            }
            Op::DelRoute(prefix, metric, _) => {
                some(self.actual.state.routes.remove(&(prefix, metric)).is_some())?;
            }
            Op::SetOffload(dev, on) => {
                self.has_link(&dev)?;
                self.actual.state.offloads.insert(dev, on);
            }
            Op::SetSysctl(path, value) => drop(self.actual.state.sysctls.insert(path, value)),
            Op::SetNft(table) => self.actual.state.nft = Some(table.digest()),
            Op::DelNft => some(self.actual.state.nft.take().is_some())?,
            Op::SetTunnel(dev, tunnels) => {
                self.has_link(&dev)?;
                self.actual.state.tunnels.insert(dev, tunnels);
            }
            Op::DelTunnel(dev) => some(self.actual.state.tunnels.remove(&dev).is_some())?,
            Op::SetVeth(name, veth) => {
                if veth.bridged {
                    self.has_link(BRIDGE)?;
                }
                *self.actual.veths.get_mut(&name).ok_or("no such device")? = veth;
            }
            Op::DelVeth(name) => some(self.actual.veths.remove(&name).is_some())?,
        }
        Ok(())
    }

    fn has_link(&self, name: &str) -> Result<(), String> {
        some(self.actual.state.links.contains_key(name))
    }
}

fn some(found: bool) -> Result<(), String> {
    if found { Ok(()) } else { Err("no such object".into()) }
}

/// An IPv4 route goes with its source address, an IPv6 route goes on without it (net/ipv4/fib_semantics.c
/// `fib_sync_down_addr`, net/ipv6/route.c `rt6_remove_prefsrc`).
fn forget_source(state: &mut State, gone: IpNet) {
    let gone = gone.addr();
    if state.addresses.iter().any(|(_, net)| net.addr() == gone) {
        return;
    }
    if gone.is_ipv4() {
        state.routes.retain(|_, route| route.source != Some(gone));
    }
    for route in state.routes.values_mut().filter(|route| route.source == Some(gone)) {
        route.source = None;
    }
}

/// Tells which object without weft's mark an operation is about.
fn check_mark(op: &Op, underlay: Option<&Underlay>) -> Result<(), String> {
    let ours = |dev: &str| [BRIDGE, VXLAN_V4, VXLAN_V6, WIREGUARD, DETOUR].contains(&dev);
    let marked = match op {
        Op::AddLink(dev, _)
        | Op::SetLink(dev, _)
        | Op::DelLink(dev)
        | Op::AddAddress(dev, _)
        | Op::DelAddress(dev, _)
        | Op::SetNeighbour(dev, ..)
        | Op::DelNeighbour(dev, _)
        | Op::SetFdb(dev, ..)
        | Op::DelFdb(dev, ..)
        | Op::SetOffload(dev, _)
        | Op::SetTunnel(dev, _)
        | Op::DelTunnel(dev) => ours(dev),
        Op::SetVeth(dev, _) | Op::DelVeth(dev) => is_host_veth(dev),
        Op::SetSysctl(path, _) => {
            let parts: Vec<_> = path.split('/').collect();
            match parts[..] {
                ["net", "ipv4", "ip_forward"] | ["net", "ipv6", "conf", "all", "forwarding"] => true,
                ["net", "ipv6", "conf", dev, "accept_ra"] => {
                    ours(dev) || underlay.is_some_and(|underlay| underlay.device == dev)
                }
                ["net", "ipv4" | "ipv6", "conf", dev, _] => ours(dev),
                _ => false,
            }
        }
        // Routes and the table bear their mark by what they are.
        Op::SetRoute(..) | Op::DelRoute(..) | Op::SetNft(_) | Op::DelNft => true,
    };
    if marked { Ok(()) } else { Err(format!("{op}: not weft's")) }
}

impl Kernel for MemoryKernel {
    fn dump(&mut self, _settings: &BTreeSet<String>) -> Result<Actual, KernelError> {
        if self.failed_dumps > 0 {
            self.failed_dumps -= 1;
            return Err(KernelError("the dump was interrupted; it is tried again".into()));
        }
        Ok(self.actual.clone())
    }

    fn apply(&mut self, ops: &[Op]) -> Vec<Result<(), KernelError>> {
        let mut answer = |op| {
            if self.refusals > 0 {
                self.refusals -= 1;
                return Err(KernelError("out of memory".into()));
            }
            self.perform(op).map_err(KernelError)
        };
        ops.iter().map(&mut answer).collect()
    }

    fn sessions(&mut self) -> Sessions {
        self.sessions.clone()
    }

    fn underlay(&mut self, _spec: &UnderlaySpec) -> Result<Underlay, UnderlayError> {
        self.underlay.clone()
    }

    fn obstacles(&mut self, _cluster: &[IpNet]) -> Vec<String> {
        Vec::new()
    }
}
