//! Which peers of other sites are reached through a gateway: of this site, or of theirs. Pure.
//!
//! Invariant: this node and the nodes at the other end choose the same gateway once they have heard the same records.

use std::collections::BTreeMap;

use weft_wire::gateway::choose;
use weft_wire::mesh::MemberState;
use weft_wire::types::{NodeName, SiteName};

use super::Control;
use crate::plan::model::Peer;

impl Control {
    /// Says of each peer of another site through which gateway it is reached, if any.
    pub(super) fn through_gateways(&self, peers: &mut [Peer]) {
        let own = &self.config.node.site;
        let weight = self.config.site.gateways.get(&self.config.node.name);
        let mut gateways: BTreeMap<SiteName, Vec<Gateway>> = BTreeMap::new();
        for peer in peers.iter() {
            if let Some(weight) = peer.gateway {
                let gateway = Gateway { node: peer.node.clone(), weight, up: self.is_up(&peer.node) };
                gateways.entry(peer.site.clone()).or_default().push(gateway);
            }
        }
        let through_own = weight.is_none().then(|| gateways.get(own)).flatten();
        for peer in peers.iter_mut().filter(|peer| peer.site != *own) {
            peer.via = match (through_own, peer.gateway, gateways.get(&peer.site)) {
                (Some(ours), ..) => pick(ours, &self.config.node.name, &peer.site),
                (None, None, Some(theirs)) => pick(theirs, &peer.node, own),
                (None, ..) => None,
            };
        }
    }

    /// A gateway that may be dead is left at once: whoever waits for certainty waits for many seconds.
    fn is_up(&self, node: &NodeName) -> bool {
        self.mesh.member(node).is_some_and(|member| member.state == MemberState::Alive)
    }
}

#[derive(Debug)]
struct Gateway {
    node: NodeName,
    weight: u8,
    up: bool,
}

/// Chooses among those that answer; among all where none does.
fn pick(gateways: &[Gateway], node: &NodeName, other: &SiteName) -> Option<NodeName> {
    let any = gateways.iter().any(|gateway| gateway.up && gateway.weight > 0);
    let usable = gateways.iter().filter(|gateway| gateway.up || !any);
    choose(usable.map(|gateway| (&gateway.node, gateway.weight)), node, other).cloned()
}
