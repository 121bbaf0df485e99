//! The gossip mesh: who is in it, who lives, and what each node signed.
//!
//! A pure state machine: datagrams and `now` in, datagrams and events out. It opens no socket and reads no
//! clock, and it neither leases subnets nor programs routes. Drain [`Mesh::poll_output`] until
//! [`Output::Wait`] after every call. `docs/protocol.md` describes what crosses the network.
//!
//! Invariants: a member is a node whose record was verified; a datagram that is rejected changes nothing
//! but a counter; no datagram and no timeout costs time in proportion to the number of members.

mod api;
pub(crate) mod proto;

use std::net::SocketAddr;
use std::time::Instant;

pub use crate::record::{Capabilities, Facts, LeasedSubnet, NodeKey, NodeRecord};
pub use api::{
    Authority, Counters, MemberState, MemberView, MeshConfig, MeshEvent, Output, Owner, Rejected, Timing,
    UnknownNode, Verdict,
};

use crate::seal::KeyRing;
use crate::types::NodeName;

/// One node's view of the mesh.
#[derive(Debug)]
pub struct Mesh {
    config: MeshConfig,
    counters: Counters,
}

impl Mesh {
    /// Makes a mesh that knows only its seeds. `seed` comes from a cryptographic random number generator.
    pub fn new(config: MeshConfig, _seed: [u8; 32], _now: Instant) -> Self {
        Self { config, counters: Counters::default() }
    }

    /// Takes a datagram from the network. State is unchanged when this returns an error.
    pub fn handle_datagram(&mut self, _: SocketAddr, _: &[u8], _: Instant) -> Result<(), Rejected> {
        Ok(())
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, _now: Instant) {}

    /// Signs and spreads what the node offers, if it differs from the last announcement.
    pub fn announce(&mut self, _facts: Facts, _now: Instant) {}

    /// Replaces the view of who owns what, and judges all known records again.
    pub fn set_authority(&mut self, _authority: Authority, _now: Instant) {}

    /// Replaces the addresses to look for peers at.
    pub fn set_seeds(&mut self, seeds: Vec<SocketAddr>, _now: Instant) {
        self.config.seeds = seeds;
    }

    /// Replaces the cluster keys.
    pub fn set_ring(&mut self, ring: KeyRing, _now: Instant) {
        self.config.ring = ring;
    }

    /// Signs with another key from now on, which the present one endorses.
    pub fn rotate_key(&mut self, _key: NodeKey, _now: Instant) {}

    /// Returns the signing key with its endorsements, to be persisted after [`Mesh::rotate_key`].
    pub fn key(&self) -> &NodeKey {
        &self.config.key
    }

    /// Removes a dead member, here and on all nodes. Does nothing to a member that lives.
    pub fn forget(&mut self, _node: &NodeName) {}

    /// Sends a probe whose answer becomes [`MeshEvent::Pong`]; without an answer nothing happens.
    pub fn ping(&mut self, node: &NodeName, _token: u64, _now: Instant) -> Result<(), UnknownNode> {
        Err(UnknownNode(node.clone()))
    }

    /// Tells the mesh that the node goes away on purpose. Send what `poll_output` returns, then drop it.
    pub fn leave(&mut self, _now: Instant) {}

    /// Returns what to do next; call until it returns [`Output::Wait`].
    pub fn poll_output(&mut self, now: Instant) -> Output {
        Output::Wait { until: now + self.config.timing.probe_interval, reason: "probe" }
    }

    /// Returns the peers, without the node itself, in no particular order.
    pub fn members(&self) -> impl Iterator<Item = MemberView<'_>> {
        std::iter::empty()
    }

    /// Returns the record that the node announces, once it has.
    pub fn record(&self) -> Option<&NodeRecord> {
        None
    }

    /// Returns what was counted.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}
