//! The tunnels as the kernel's shell sees them: a set of peers to be made so.
//!
//! Which implementation carries them is decided here and nowhere else.

use std::collections::BTreeMap;

use weft_wire::types::TunnelKey;

use super::KernelError;
use crate::plan::model::TunnelPeer;
use crate::tunnel::{self, Tunnel, TunnelConfig};

/// The node's tunnels.
#[derive(Debug)]
pub(super) struct Tunnels {
    config: TunnelConfig,
    running: Option<Tunnel>,
    peers: BTreeMap<TunnelKey, TunnelPeer>,
}

impl Tunnels {
    pub(super) fn new(config: TunnelConfig) -> Self {
        Self { config, running: None, peers: BTreeMap::new() }
    }

    /// Returns the peers; nothing where no tunnels run.
    pub(super) fn peers(&mut self) -> Option<BTreeMap<TunnelKey, TunnelPeer>> {
        if let Some(why) = self.running.as_ref().and_then(Tunnel::failure) {
            tracing::warn!(err = why, "tunnels ended");
            self.close();
        }
        self.running.as_ref().map(|_| self.peers.clone())
    }

    /// Makes the device, if it is not there, and begins to carry packets.
    pub(super) fn open(&mut self) -> Result<&mut Tunnel, KernelError> {
        if self.running.is_none() {
            let tunnel = Tunnel::open(self.config.clone()).map_err(|error| KernelError(error.to_string()))?;
            tracing::info!(key = %self.config.secret.public(), port = self.config.port, "tunnels carry packets");
            self.running = Some(tunnel);
            self.peers.clear();
        }
        Ok(self.running.as_mut().expect("it was opened just now"))
    }

    pub(super) fn set(&mut self, peers: &BTreeMap<TunnelKey, TunnelPeer>) -> Result<(), KernelError> {
        let list: Vec<tunnel::TunnelPeer> = peers
            .iter()
            .map(|(key, peer)| tunnel::TunnelPeer {
                node: peer.node.clone(),
                key: *key,
                endpoint: peer.endpoint,
                prefixes: peer.prefixes.clone(),
                preshared: None,
            })
            .collect();
        let refused = self.open()?.set_peers(&list);
        self.peers.clone_from(peers);
        if refused.is_empty() { Ok(()) } else { Err(KernelError(refused.join("; "))) }
    }

    /// Ends the tunnels; the device stays for the reconciler to remove.
    pub(super) fn close(&mut self) {
        self.running = None;
        self.peers.clear();
    }
}
