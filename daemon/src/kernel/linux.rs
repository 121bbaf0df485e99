//! The kernel of the running thread's network namespace.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use nix::errno::Errno;
use weft_wire::mesh::Carrier;
use weft_wire::types::NodeName;

use super::netlink::{Conn, Refusal};
use super::offload::Ethtool;
use super::tunnel::Tunnels;
use super::{
    Implementation, Kernel, KernelError, Traffic, TunnelLook, UnderlayError, UnderlaySpec, nft, rtnl, sysctl,
};
use crate::handover::Tunnels as Inherited;
use crate::plan::model::{Actual, BRIDGE, DETOUR, Link, LinkKind, Op, Sessions, Underlay, WIREGUARD};
use crate::tunnel::{Tunnel, TunnelConfig, TunnelSecret};

/// The real kernel.
#[derive(Debug)]
pub struct Linux {
    conn: Conn,
    /// As of the last dump or change.
    known: rtnl::Known,
    nft: nft::Conn,
    /// Absent on kernels before 5.6, which have no ethtool over netlink: there the offload stays as it is.
    ethtool: Option<Ethtool>,
    /// Where the node may speak WireGuard.
    tunnels: Option<Tunnels>,
}

impl Linux {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Where the kernel gives none.
    pub fn open() -> io::Result<Self> {
        let nft = nft::Conn::open().map_err(io::Error::other)?;
        let (known, ethtool) = (rtnl::Known::default(), Ethtool::open().ok());
        Ok(Self { conn: Conn::open()?, known, nft, ethtool, tunnels: None })
    }

    /// Lets the node speak WireGuard, once a plan asks for it.
    #[must_use]
    pub fn with_tunnels(mut self, config: TunnelConfig, detour_port: u16, choice: Implementation) -> Self {
        self.tunnels = Some(Tunnels::new(config, detour_port, choice));
        self
    }

    /// Returns who carries the tunnels, or would if there were any.
    pub fn carrier(&self) -> Carrier {
        match &self.tunnels {
            Some(tunnels) if tunnels.in_kernel() => Carrier::Kernel,
            _ => Carrier::UserSpace,
        }
    }

    /// Takes tunnels over that are carried already, and whom the last daemon had sessions with.
    #[must_use]
    pub fn with_inherited(mut self, inherited: Inherited, active: BTreeSet<NodeName>) -> Self {
        if let Some(tunnels) = &mut self.tunnels {
            tunnels.inherit(inherited, active);
        }
        self
    }

    /// Whether the kernel is to carry what weftd carried before. Then the node needs another key: boringtun's clock of
    /// handshakes is 27 s ahead of the kernel's (`TAI64_BASE`, its noise/handshake.rs; whitepaper s5.4.2), so peers would
    /// refuse the kernel's under the same key for that long.
    ///
    /// # Errors
    /// Where the kernel does not answer.
    pub fn follows_user_space(&mut self) -> Result<bool, Refusal> {
        if !self.tunnels.as_ref().is_some_and(Tunnels::in_kernel) {
            return Ok(false);
        }
        let links = rtnl::links(&mut self.conn)?;
        Ok(links.iter().any(|link| link.name == WIREGUARD && link.is_tun()))
    }

    fn own_tunnels(&mut self) -> Result<&mut Tunnels, KernelError> {
        self.tunnels.as_mut().ok_or_else(|| KernelError("this node has no tunnel key".into()))
    }

    fn dump_all(&mut self, settings: &BTreeSet<String>) -> Result<Actual, Refusal> {
        let mut actual = Actual::default();
        let links = rtnl::links(&mut self.conn)?;
        rtnl::read_links(&links, &mut actual);
        for device in [WIREGUARD, DETOUR] {
            if let (Some(tunnels), Some(link)) = (&self.tunnels, actual.state.links.get_mut(device)) {
                link.kind = tunnels.kind(&link.kind);
            }
        }
        self.known.index = links.iter().map(|link| (link.name.clone(), link.index)).collect();
        self.known.links = actual.state.links.clone();
        rtnl::read_addresses(&mut self.conn, &links, &mut actual.state)?;
        rtnl::read_neighbours(&mut self.conn, &links, &mut actual.state)?;
        rtnl::read_routes(&mut self.conn, &links, &mut actual.state)?;
        for (name, link) in &actual.state.links {
            if let (LinkKind::Vxlan(_), Some(ethtool)) = (&link.kind, &mut self.ethtool)
                && let Ok(on) = ethtool.tx_checksum(name)
            {
                actual.state.offloads.insert(name.clone(), on);
            }
        }
        for name in settings {
            if let Some(value) = sysctl::read(name) {
                actual.state.sysctls.insert(name.clone(), value);
            }
        }
        Ok(actual)
    }

    /// Makes the changes of one run of netlink operations.
    fn apply_batch(&mut self, ops: &[Op], answers: &mut Vec<Result<(), KernelError>>) {
        let mut messages = Vec::with_capacity(ops.len());
        let counts: Vec<Option<usize>> = ops
            .iter()
            .map(|op| {
                let encoded = rtnl::encode(op, &self.known)?;
                let count = encoded.len();
                messages.extend(encoded);
                Some(count)
            })
            .collect();
        let mut told = self.conn.change(messages).into_iter();
        for (op, count) in ops.iter().zip(counts) {
            let Some(count) = count else {
                answers.push(Err(KernelError(format!("{op}: its device is gone"))));
                continue;
            };
            let refused = told.by_ref().take(count).fold(None, |first, answer| first.or(answer.err()));
            answers.push(match refused {
                Some(refusal) if !rtnl::tolerated(op, refusal.errno) => Err(explain(op, &refusal)),
                _ => Ok(()),
            });
        }
    }
}

fn explain(op: &Op, refusal: &Refusal) -> KernelError {
    KernelError(match (refusal.errno, op) {
        (Errno::EPERM, _) => {
            format!("{refusal}: weftd needs the capability CAP_NET_ADMIN; run it as root, or grant it")
        }
        (Errno::EOPNOTSUPP, Op::AddLink(name, _)) if name == WIREGUARD || name == DETOUR => format!(
            "{refusal}: this kernel has no wireguard devices; load the module (modprobe wireguard), or set encryption.implementation to \"user-space\""
        ),
        (Errno::EOPNOTSUPP, Op::AddLink(name, _)) => format!(
            "{refusal}: this kernel has no {} devices; load the module ({}), or use a kernel that has it",
            if name.contains("vx") { "vxlan" } else { "bridge" },
            if name.contains("vx") { "modprobe vxlan" } else { "modprobe bridge" },
        ),
        (Errno::EEXIST, Op::AddLink(name, _)) if name.contains("vx") => format!(
            "{refusal}: another VXLAN device has this VNI and port; set overlay.vni or overlay.port to another value on all nodes"
        ),
        _ => refusal.to_string(),
    })
}

impl Kernel for Linux {
    fn dump(&mut self, settings: &BTreeSet<String>) -> Result<Actual, KernelError> {
        let mut actual = self.dump_all(settings).map_err(|refusal| KernelError(refusal.to_string()))?;
        actual.state.nft = nft::dump(&mut self.nft).map_err(|error| KernelError(error.to_string()))?;
        actual.state.tunnels = self.tunnels.as_mut().map(Tunnels::carried).unwrap_or_default();
        Ok(actual)
    }

    fn apply(&mut self, ops: &[Op]) -> Vec<Result<(), KernelError>> {
        let mut answers = Vec::with_capacity(ops.len());
        // Runs of netlink operations go out together; a new device ends a run, for its index is not known yet.
        let mut run = 0;
        for (place, op) in ops.iter().enumerate() {
            match op {
                Op::SetOffload(..)
                | Op::SetSysctl(..)
                | Op::SetNft(_)
                | Op::DelNft
                | Op::SetTunnel(..)
                | Op::DelTunnel(_) => {
                    self.apply_batch(&ops[run..place], &mut answers);
                    answers.push(self.apply_other(op));
                    run = place + 1;
                }
                Op::AddLink(name, link) if link.kind == LinkKind::Tun => {
                    self.apply_batch(&ops[run..place], &mut answers);
                    answers.push(self.add_tunnel_device(name, link));
                    run = place + 1;
                }
                Op::AddLink(name, _) => {
                    self.apply_batch(&ops[run..=place], &mut answers);
                    self.learn(name);
                    run = place + 1;
                }
                _ => {}
            }
        }
        self.apply_batch(&ops[run..], &mut answers);
        // Tunnels that another daemon carries still are opened by the first pass that has any, or there are none.
        if let Some(tunnels) = &mut self.tunnels
            && !ops.iter().any(|op| matches!(op, Op::SetTunnel(..)))
        {
            tunnels.forgo();
        }
        answers
    }

    fn underlay(&mut self, spec: &UnderlaySpec) -> Result<Underlay, UnderlayError> {
        find_underlay(&mut self.conn, spec)
    }

    fn sessions(&mut self) -> Sessions {
        self.tunnels.as_mut().map(Tunnels::sessions).unwrap_or_default()
    }

    fn tunnels(&self) -> Option<TunnelLook> {
        self.tunnels.as_ref().and_then(Tunnels::monitor)
    }

    fn surrender(&mut self) -> Option<Tunnel> {
        self.tunnels.as_mut().and_then(Tunnels::surrender)
    }

    fn strayed(&mut self) -> bool {
        self.tunnels.as_mut().is_some_and(Tunnels::strayed)
    }

    fn add_tunnel_secret(&mut self, secret: TunnelSecret) {
        if let Some(tunnels) = &mut self.tunnels {
            tunnels.add_secret(secret);
        }
    }

    fn traffic(&mut self) -> Traffic {
        let status = self.tunnels.as_ref().and_then(Tunnels::monitor).map(|look| look.status());
        let sent = status.into_iter().flatten().map(|tunnel| (tunnel.node, tunnel.sent.1));
        // Where the kernel does not say, peers are only sampled.
        Traffic {
            endpoints: rtnl::idle_endpoints(&mut self.conn).unwrap_or_default(),
            tunnels: sent.collect(),
        }
    }

    fn obstacles(&mut self, cluster: &[IpNet]) -> Vec<String> {
        nft::foreign_drops(&mut self.nft, BRIDGE, cluster).unwrap_or_else(|error| {
            tracing::debug!(err = %error, "foreign nftables chains not read");
            Vec::new()
        })
    }
}

impl Linux {
    /// Learns the index of a device that was just made.
    fn learn(&mut self, name: &str) {
        if let Ok(links) = rtnl::links(&mut self.conn) {
            let made = links.into_iter().find(|link| link.name == name);
            self.known.index.extend(made.map(|link| (link.name, link.index)));
        }
    }

    /// Makes the device of the tunnels: the kernel's own by rtnetlink, that of user space by who reads it.
    fn add_tunnel_device(&mut self, name: &str, link: &Link) -> Result<(), KernelError> {
        let tunnels = self.own_tunnels()?;
        // One that was read before is no longer there.
        tunnels.close(name);
        tunnels.open(name)?;
        let mut answers = Vec::new();
        if tunnels.in_kernel() {
            self.apply_batch(&[Op::AddLink(name.to_owned(), link.clone())], &mut answers);
            self.learn(name);
        } else {
            self.learn(name);
            self.apply_batch(&[Op::SetLink(name.to_owned(), link.clone())], &mut answers);
        }
        answers.pop().expect("there is an answer for each operation")
    }

    fn apply_other(&mut self, op: &Op) -> Result<(), KernelError> {
        match op {
            Op::SetSysctl(name, value) => sysctl::write(name, value).map_err(|error| {
                KernelError(format!("{error}: /proc/sys, or WEFT_PROC_SYS, must be writable for weftd"))
            }),
            Op::SetOffload(device, on) => match &mut self.ethtool {
                Some(ethtool) => ethtool.set_tx_checksum(device, *on).map_err(|error| {
                    KernelError(format!("{error}: this kernel does not let the offload be switched"))
                }),
                None => Ok(()),
            },
            Op::SetNft(table) => {
                nft::apply(&mut self.nft, table).map_err(|error| KernelError(error.to_string()))
            }
            Op::DelNft => nft::remove(&mut self.nft).map_err(|error| KernelError(error.to_string())),
            Op::SetTunnel(device, wanted) => self.own_tunnels()?.set(device, wanted),
            Op::DelTunnel(device) => {
                self.own_tunnels()?.close(device);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

fn find_underlay(conn: &mut Conn, spec: &UnderlaySpec) -> Result<Underlay, UnderlayError> {
    let kernel = |refusal: Refusal| UnderlayError::Kernel(refusal.to_string());
    let absent = |address: IpAddr| match spec.of_cluster {
        true => UnderlayError::NoNodeAddress(address),
        false => UnderlayError::NoAddress(address),
    };
    let links = rtnl::links(conn).map_err(kernel)?;
    let addresses = rtnl::addresses(conn).map_err(kernel)?;
    let index = match (&spec.device, spec.addresses.first()) {
        (Some(name), _) => links.iter().find(|link| link.name == *name).map(|link| link.index),
        (None, Some(address)) => Some(
            addresses
                .iter()
                .find(|(_, held)| held.addr() == *address)
                .map(|(index, _)| *index)
                .ok_or_else(|| absent(*address))?,
        ),
        (None, None) => {
            Some(rtnl::default_device(conn).map_err(kernel)?.ok_or(UnderlayError::NoDefaultRoute)?)
        }
    };
    let link = links
        .iter()
        .find(|link| Some(link.index) == index)
        .ok_or_else(|| UnderlayError::NoDevice(spec.device.clone().unwrap_or_default()))?;
    if !link.up {
        return Err(UnderlayError::Down(link.name.clone()));
    }
    let own: Vec<IpNet> =
        addresses.iter().filter(|(index, _)| *index == link.index).map(|(_, address)| *address).collect();
    let chosen: Vec<IpNet> = if spec.addresses.is_empty() {
        [true, false]
            .into_iter()
            .filter_map(|v4| {
                own.iter().copied().find(|held| held.addr().is_ipv4() == v4 && is_global(held.addr()))
            })
            .collect()
    } else {
        spec.addresses
            .iter()
            .map(|wanted| {
                own.iter().copied().find(|held| held.addr() == *wanted).ok_or_else(|| absent(*wanted))
            })
            .collect::<Result<_, _>>()?
    };
    if chosen.is_empty() {
        return Err(UnderlayError::NoGlobalAddress(link.name.clone()));
    }
    Ok(Underlay {
        device: link.name.clone(),
        index: link.index,
        mtu: spec.mtu.unwrap_or(link.mtu),
        addresses: chosen,
        strict_sources: sysctl::read("net/ipv4/conf/all/rp_filter").as_deref() == Some("1"),
        tunnel: link.tunnel(),
    })
}

fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !address.is_loopback() && !address.is_link_local(),
        IpAddr::V6(address) => !address.is_loopback() && !address.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::model::LinkKind;
    use weft_wire::types::MacAddress;

    #[test]
    fn a_missing_capability_or_kernel_feature_is_named_with_what_to_do() {
        let link = Link { kind: LinkKind::Bridge, mtu: 1450, up: true, mac: MacAddress([2; 6]) };
        let said = |name: &str, errno: Errno| {
            explain(&Op::AddLink(name.into(), link.clone()), &Refusal::from(errno)).to_string()
        };
        for (name, errno, words) in [
            ("weft0", Errno::EPERM, "CAP_NET_ADMIN"),
            ("weft0", Errno::EOPNOTSUPP, "modprobe bridge"),
            ("weft-vx4", Errno::EOPNOTSUPP, "modprobe vxlan"),
            ("weft-vx4", Errno::EEXIST, "overlay.vni"),
        ] {
            assert!(said(name, errno).contains(words), "{}", said(name, errno));
        }
    }
}
