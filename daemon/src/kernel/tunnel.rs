//! The tunnels as the kernel's shell sees them: keys and peers to be made so.
//!
//! Which implementation carries them is decided here and nowhere else: the plan asks for a device of the tunnels, and this is
//! who knows what kind of device that is.

mod inside;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use weft_wire::types::NodeName;

use super::KernelError;
use super::wireguard::Wireguard;
use crate::handover::{Talk, Tunnels as Inherited};
use crate::plan::model::{self, DETOUR, LinkKind, Sessions};
use crate::tunnel::{Reason, Tunnel, TunnelConfig, TunnelMonitor, TunnelPeer, TunnelSecret, TunnelStatus};
use inside::Inside;
pub use inside::KernelMonitor;

/// Which implementation of WireGuard an operator chose.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Implementation {
    /// The kernel's where it has one, or else the daemon's.
    #[default]
    Auto,
    /// The kernel's.
    Kernel,
    /// The daemon's.
    UserSpace,
}

/// That of now, the one to come and the detour's, and one of a plan that was made before.
const SECRETS: usize = 4;

/// The node's tunnels.
#[derive(Debug)]
pub(super) struct Tunnels {
    config: TunnelConfig,
    /// The latest last; an older one is kept for a plan that was made before.
    secrets: Vec<TunnelSecret>,
    carrier: Carrier,
}

#[derive(Debug)]
enum Carrier {
    UserSpace(Box<UserSpace>),
    Kernel(Box<Kernel>),
}

/// The kernel's two devices. The second is there while keys change only.
#[derive(Debug)]
struct Kernel {
    main: Inside,
    detour: Inside,
}

impl Kernel {
    fn new(config: &TunnelConfig, detour_port: u16, socket: Option<Wireguard>) -> Self {
        Self {
            main: Inside::new(&config.device, config.port, socket),
            detour: Inside::new(DETOUR, detour_port, None),
        }
    }

    fn both(&mut self) -> [&mut Inside; 2] {
        [&mut self.main, &mut self.detour]
    }

    fn on(&mut self, device: &str) -> &mut Inside {
        if device == DETOUR { &mut self.detour } else { &mut self.main }
    }
}

#[derive(Debug, Default)]
struct UserSpace {
    running: Option<(Tunnel, model::Tunnels)>,
    /// Tunnels that another daemon, or this process under another control plane, carries until they are opened here.
    inherited: Inherited,
    /// Peers that had sessions with the last daemon.
    active: BTreeSet<NodeName>,
}

impl UserSpace {
    /// Makes the device, if it is not there, and begins to carry packets.
    fn open(&mut self, config: &TunnelConfig) -> Result<&mut (Tunnel, model::Tunnels), KernelError> {
        if self.running.is_none() {
            let tunnel = match std::mem::take(&mut self.inherited) {
                Inherited::None => Tunnel::open(config.clone()),
                Inherited::Running(tunnel) => Ok(*tunnel),
                Inherited::Offered(offered) => Tunnel::adopt(config.clone(), offered),
            };
            let tunnel = tunnel.map_err(|error| KernelError(error.to_string()))?;
            tunnel.ask_first(std::mem::take(&mut self.active));
            let key = config.secret.public();
            tracing::info!(%key, port = config.port, "tunnels carry packets");
            self.running = Some((tunnel, model::Tunnels { key, mtu: 0, peers: Default::default() }));
        }
        Ok(self.running.as_mut().expect("it was opened just now"))
    }

    /// Replaces the peers; returns what was left out and why, a sentence each.
    fn set(&mut self, config: &TunnelConfig, wanted: &model::Tunnels) -> Result<Vec<String>, KernelError> {
        let peers: Vec<TunnelPeer> = wanted
            .peers
            .iter()
            .map(|(key, peer)| TunnelPeer {
                node: peer.node.clone(),
                key: *key,
                endpoint: peer.endpoint,
                prefixes: peer.prefixes.clone(),
                preshared: peer.preshared.clone(),
            })
            .collect();
        let (tunnel, carried) = self.open(config)?;
        tunnel.set_secret(&config.secret);
        tunnel.set_mtu(wanted.mtu as usize);
        let refused = tunnel.set_peers(&peers);
        carried.clone_from(wanted);
        Ok(refused)
    }
}

/// Goes without what another daemon offers, and has that one let go of the device and the port.
fn dismiss(inherited: Inherited) {
    if let Inherited::Offered(mut offered) = inherited {
        let talk = offered.talk.take();
        drop(offered);
        talk.iter().for_each(Talk::finish);
    }
}

impl Tunnels {
    /// Chooses; the device is made later, when a plan asks for it. What the kernel has is looked at once: tunnels that run do
    /// not change their implementation because someone loads a module.
    pub(super) fn new(config: TunnelConfig, detour_port: u16, choice: Implementation) -> Self {
        let asked = |socket: std::io::Result<Option<Wireguard>>| {
            socket.unwrap_or_else(|error| {
                tracing::warn!(err = %error, "kernel not asked for WireGuard");
                None
            })
        };
        let kernel = |socket| Carrier::Kernel(Box::new(Kernel::new(&config, detour_port, socket)));
        let carrier = match choice {
            Implementation::UserSpace => Carrier::UserSpace(Box::default()),
            Implementation::Kernel => kernel(asked(Wireguard::open())),
            Implementation::Auto => match asked(Wireguard::open()) {
                Some(socket) => kernel(Some(socket)),
                None => Carrier::UserSpace(Box::default()),
            },
        };
        Self { secrets: vec![config.secret.clone()], config, carrier }
    }

    /// Takes over what another daemon carries. The kernel cannot: there the device is made anew.
    pub(super) fn inherit(&mut self, inherited: Inherited, active: BTreeSet<NodeName>) {
        match &mut self.carrier {
            Carrier::UserSpace(own) => (own.inherited, own.active) = (inherited, active),
            Carrier::Kernel(_) => dismiss(inherited),
        }
    }

    /// Goes without what another daemon offered.
    pub(super) fn forgo(&mut self) {
        if let Carrier::UserSpace(own) = &mut self.carrier
            && matches!(own.inherited, Inherited::Offered(_))
        {
            dismiss(std::mem::take(&mut own.inherited));
        }
    }

    /// Gives the tunnels away as they run; those of the kernel stay where they are.
    pub(super) fn surrender(&mut self) -> Option<Tunnel> {
        let Carrier::UserSpace(own) = &mut self.carrier else { return None };
        let inherited = std::mem::take(&mut own.inherited);
        match (own.running.take(), inherited) {
            (Some((tunnel, _)), _) => Some(tunnel),
            (None, Inherited::Running(tunnel)) => Some(*tunnel),
            (None, _) => None,
        }
    }

    pub(super) fn add_secret(&mut self, secret: TunnelSecret) {
        self.secrets.push(secret);
        self.secrets.drain(..self.secrets.len().saturating_sub(SECRETS));
    }

    /// Whether the kernel makes the device and carries the packets.
    pub(super) fn in_kernel(&self) -> bool {
        matches!(self.carrier, Carrier::Kernel(_))
    }

    /// Returns what a device that was found is to this node: one of the other implementation is something else.
    pub(super) fn kind(&self, found: &LinkKind) -> LinkKind {
        match (found, self.in_kernel()) {
            (LinkKind::Other(kind), true) if kind == "wireguard" => LinkKind::Tun,
            (LinkKind::Tun, true) => LinkKind::Other("tun".into()),
            _ => found.clone(),
        }
    }

    /// Returns what each device carries; nothing where no tunnels run.
    pub(super) fn carried(&mut self) -> BTreeMap<String, model::Tunnels> {
        match &mut self.carrier {
            Carrier::Kernel(kernel) => kernel
                .both()
                .into_iter()
                .filter_map(|inside| Some((inside.device().to_owned(), inside.carried()?)))
                .collect(),
            Carrier::UserSpace(own) => {
                if let Some(why) = own.running.as_ref().and_then(|(tunnel, _)| tunnel.failure()) {
                    tracing::warn!(err = why, "tunnels ended");
                    own.running = None;
                }
                let carried = own.running.as_ref().map(|(_, carried)| carried.clone());
                carried.map(|carried| (self.config.device.clone(), carried)).into_iter().collect()
            }
        }
    }

    /// Returns whom there are sessions with.
    pub(super) fn sessions(&mut self) -> Sessions {
        match &mut self.carrier {
            Carrier::Kernel(kernel) => kernel.both().into_iter().flat_map(Inside::sessions).collect(),
            Carrier::UserSpace(own) => {
                own.running.as_ref().map(|(tunnel, _)| tunnel.sessions()).unwrap_or_default()
            }
        }
    }

    /// Whether someone changed what the kernel carries: it sends no notice of that.
    pub(super) fn strayed(&mut self) -> bool {
        match &mut self.carrier {
            Carrier::Kernel(kernel) => {
                kernel.both().into_iter().any(|inside| inside.is_set() && inside.carried().is_none())
            }
            Carrier::UserSpace(_) => false,
        }
    }

    pub(super) fn monitor(&self) -> Option<TunnelLook> {
        match &self.carrier {
            Carrier::UserSpace(own) => {
                own.running.as_ref().map(|(tunnel, _)| TunnelLook::UserSpace(tunnel.monitor()))
            }
            Carrier::Kernel(kernel) => {
                let looks = [&kernel.main, &kernel.detour].map(Inside::monitor);
                looks[0].is_some().then(|| TunnelLook::Kernel(looks.into_iter().flatten().collect()))
            }
        }
    }

    /// Makes ready for a device to be there: in user space that makes it and begins to carry packets.
    pub(super) fn open(&mut self, device: &str) -> Result<(), KernelError> {
        match &mut self.carrier {
            Carrier::UserSpace(own) => own.open(&self.config).map(drop),
            Carrier::Kernel(kernel) => kernel.on(device).open(),
        }
    }

    pub(super) fn set(&mut self, device: &str, wanted: &model::Tunnels) -> Result<(), KernelError> {
        let secret = self.secrets.iter().find(|secret| secret.public() == wanted.key).cloned();
        let secret =
            secret.ok_or_else(|| KernelError(format!("the secret of key {} is not known", wanted.key)))?;
        let refused = match &mut self.carrier {
            Carrier::UserSpace(own) => {
                self.config.secret = secret;
                own.set(&self.config, wanted)?
            }
            Carrier::Kernel(kernel) => {
                let other = if device == DETOUR { &mut kernel.main } else { &mut kernel.detour };
                let in_use = other.sessions_of_nodes();
                let inside = kernel.on(device);
                inside.open()?;
                inside.set(&secret, wanted, &in_use)?
            }
        };
        if refused.is_empty() { Ok(()) } else { Err(KernelError(refused.join("; "))) }
    }

    /// Ends the tunnels of a device; the device stays for the reconciler to remove.
    pub(super) fn close(&mut self, device: &str) {
        match &mut self.carrier {
            Carrier::UserSpace(own) => own.running = None,
            Carrier::Kernel(kernel) => kernel.on(device).forget(),
        }
    }
}

/// A look at running tunnels, whoever carries them.
#[derive(Debug, Clone, PartialEq)]
pub enum TunnelLook {
    /// weftd does.
    UserSpace(TunnelMonitor),
    /// The kernel does, on one device or, while keys change, on two.
    Kernel(Vec<KernelMonitor>),
}

impl fmt::Display for TunnelLook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::UserSpace(_) => "user-space",
            Self::Kernel(_) => "kernel",
        })
    }
}

impl TunnelLook {
    /// Returns how each peer's tunnel is, in no particular order.
    pub fn status(&self) -> Vec<TunnelStatus> {
        match self {
            Self::UserSpace(monitor) => monitor.status(),
            Self::Kernel(monitors) => {
                // Of a peer that is on both the one with the later handshake is told; the usual one where none is.
                let mut latest: BTreeMap<NodeName, TunnelStatus> = BTreeMap::new();
                for status in monitors.iter().flat_map(KernelMonitor::status) {
                    let age = |status: &TunnelStatus| status.handshake.unwrap_or(Duration::MAX);
                    if latest.get(&status.node).is_none_or(|other| age(&status) < age(other)) {
                        latest.insert(status.node.clone(), status);
                    }
                }
                latest.into_values().collect()
            }
        }
    }

    /// Returns whom there are sessions with that end with the daemon; those of the kernel do not.
    pub fn active(&self) -> BTreeSet<NodeName> {
        match self {
            Self::UserSpace(monitor) => monitor.active(),
            Self::Kernel(_) => BTreeSet::new(),
        }
    }

    /// Whether the daemon before this one still keeps sessions.
    pub fn has_elder(&self) -> bool {
        match self {
            Self::UserSpace(monitor) => monitor.has_elder(),
            Self::Kernel(_) => false,
        }
    }

    /// Returns how many packets were dropped for each reason; the kernel tells none.
    pub fn drops(&self) -> Vec<(Reason, u64)> {
        match self {
            Self::UserSpace(monitor) => monitor.drops(),
            Self::Kernel(_) => Vec::new(),
        }
    }
}
