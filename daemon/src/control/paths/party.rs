//! Who is in the mesh and how tunnels are, as [`Paths`](super::Paths) is told, and what it wants done.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use weft_wire::mesh::{PathWord, TunnelReach};
use weft_wire::types::{NodeName, SiteName, TunnelKey};

use crate::tunnel::{Candidate, Keep};

/// A member, as far as paths are concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Party {
    /// Its name.
    pub node: NodeName,
    /// Its site.
    pub site: SiteName,
    /// Whether it answers gossip.
    pub alive: bool,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Unsolicited gossip does not reach it.
    pub behind: bool,
    /// The key and port of its tunnels.
    pub tunnel: Option<(TunnelKey, u16)>,
    /// What it says of how it is reached.
    pub reach: TunnelReach,
    /// The round trip of gossip with it.
    pub rtt: Option<Duration>,
}

impl Party {
    /// Whether its addresses are of no use to other sites.
    pub fn is_translated(&self) -> bool {
        self.reach.mapping.translates() || !self.reach.reflexive.is_empty()
    }

    /// Whether it can be asked for help: packets that it did not ask for seem to reach it.
    pub fn is_open(&self) -> bool {
        !self.behind && !self.is_translated()
    }

    pub(super) fn tunnels(&self) -> Vec<SocketAddr> {
        let Some((_, port)) = self.tunnel else { return Vec::new() };
        self.addresses.iter().map(|address| SocketAddr::new(*address, port)).collect()
    }
}

/// Who is in the mesh.
pub trait Parties {
    /// Returns this node.
    fn own(&self) -> Party;
    /// Returns a member that lives and has tunnels.
    fn party(&self, node: &NodeName) -> Option<Party>;
    /// Returns all of them, in no order.
    fn all(&self) -> Vec<Party>;
}

/// How a peer's tunnel is, whoever carries it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The peer.
    pub node: NodeName,
    /// Where its packets go.
    pub endpoint: SocketAddr,
    /// Its packets come from there: it is no place that only a record names.
    pub heard: bool,
    /// There is a session.
    pub ready: bool,
    /// Packets wait for one.
    pub waits: bool,
    /// Bytes that were sent and received.
    pub sent: u64,
    /// The same, received.
    pub received: u64,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// Say this to a member.
    Say(NodeName, PathWord),
    /// The peer may be reached at these places; with `trial` they are tried at once.
    Candidates {
        /// The peer.
        node: NodeName,
        /// Its key.
        key: TunnelKey,
        /// The places.
        places: Vec<Candidate>,
        /// How long mappings are kept.
        keep: Keep,
        /// Whether to try them.
        trial: bool,
    },
    /// Have a session with the peer, that it can say where this node's packets come from.
    Want(NodeName, TunnelKey),
    /// What the record says of how this node is reached has changed.
    Announce,
    /// What the plan takes for a peer's endpoint has changed.
    Ways,
}
