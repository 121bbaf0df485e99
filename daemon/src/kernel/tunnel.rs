//! The tunnels as the kernel's shell sees them: keys and peers to be made so.
//!
//! Which implementation carries them is decided here and nowhere else.

use std::collections::BTreeSet;

use weft_wire::types::NodeName;

use super::KernelError;
use crate::handover::{Talk, Tunnels as Inherited};
use crate::plan::model;
use crate::tunnel::{Tunnel, TunnelConfig, TunnelMonitor, TunnelPeer, TunnelSecret};

/// The node's tunnels.
#[derive(Debug)]
pub(super) struct Tunnels {
    config: TunnelConfig,
    /// The latest last; an older one is kept for a plan that was made before.
    secrets: Vec<TunnelSecret>,
    running: Option<(Tunnel, model::Tunnels)>,
    /// Tunnels that another daemon, or this process under another control plane, carries until they are opened here.
    inherited: Inherited,
    /// Peers that had sessions with the last daemon.
    active: BTreeSet<NodeName>,
}

impl Tunnels {
    pub(super) fn new(config: TunnelConfig) -> Self {
        let secrets = vec![config.secret.clone()];
        Self { secrets, config, running: None, inherited: Inherited::None, active: BTreeSet::new() }
    }

    pub(super) fn inherit(&mut self, inherited: Inherited, active: BTreeSet<NodeName>) {
        (self.inherited, self.active) = (inherited, active);
    }

    /// Goes without what another daemon offered, and has that one let go of the device.
    pub(super) fn forgo(&mut self) {
        if let Inherited::Offered(offered) = &self.inherited {
            offered.talk.iter().for_each(Talk::finish);
            self.inherited = Inherited::None;
        }
    }

    /// Gives the tunnels away as they run.
    pub(super) fn surrender(&mut self) -> Option<Tunnel> {
        let inherited = std::mem::take(&mut self.inherited);
        match (self.running.take(), inherited) {
            (Some((tunnel, _)), _) => Some(tunnel),
            (None, Inherited::Running(tunnel)) => Some(*tunnel),
            (None, _) => None,
        }
    }

    pub(super) fn add_secret(&mut self, secret: TunnelSecret) {
        self.secrets.push(secret);
        self.secrets.drain(..self.secrets.len().saturating_sub(2));
    }

    /// Returns what is carried; nothing where no tunnels run.
    pub(super) fn carried(&mut self) -> Option<model::Tunnels> {
        if let Some(why) = self.running.as_ref().and_then(|(tunnel, _)| tunnel.failure()) {
            tracing::warn!(err = why, "tunnels ended");
            self.close();
        }
        self.running.as_ref().map(|(_, carried)| carried.clone())
    }

    pub(super) fn monitor(&self) -> Option<TunnelMonitor> {
        self.running.as_ref().map(|(tunnel, _)| tunnel.monitor())
    }

    /// Makes the device, if it is not there, and begins to carry packets.
    pub(super) fn open(&mut self) -> Result<&mut (Tunnel, model::Tunnels), KernelError> {
        if self.running.is_none() {
            let config = self.config.clone();
            let tunnel = match std::mem::take(&mut self.inherited) {
                Inherited::None => Tunnel::open(config),
                Inherited::Running(tunnel) => Ok(*tunnel),
                Inherited::Offered(offered) => Tunnel::adopt(config, offered),
            };
            let tunnel = tunnel.map_err(|error| KernelError(error.to_string()))?;
            tunnel.ask_first(std::mem::take(&mut self.active));
            let key = self.config.secret.public();
            tracing::info!(%key, port = self.config.port, "tunnels carry packets");
            self.running = Some((tunnel, model::Tunnels { key, mtu: 0, peers: Default::default() }));
        }
        Ok(self.running.as_mut().expect("it was opened just now"))
    }

    pub(super) fn set(&mut self, wanted: &model::Tunnels) -> Result<(), KernelError> {
        let secret = self.secrets.iter().find(|secret| secret.public() == wanted.key).cloned();
        let secret =
            secret.ok_or_else(|| KernelError(format!("the secret of key {} is not known", wanted.key)))?;
        self.config.secret = secret.clone();
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
        let (tunnel, carried) = self.open()?;
        tunnel.set_secret(&secret);
        tunnel.set_mtu(wanted.mtu as usize);
        let refused = tunnel.set_peers(&peers);
        carried.clone_from(wanted);
        if refused.is_empty() { Ok(()) } else { Err(KernelError(refused.join("; "))) }
    }

    /// Ends the tunnels; the device stays for the reconciler to remove.
    pub(super) fn close(&mut self) {
        self.running = None;
    }
}
