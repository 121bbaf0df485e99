//! What people are told of how other sites reach this node's gossip.

use weft_wire::api::{Count, Reach};
use weft_wire::mesh::{self, Mapping};

use super::Node;

/// What to do where nobody keeps a way open to this node.
pub(super) const OPEN_ONE: &str = "open UDP gossip.listen_port on one node, or forward a port to one and name it in its gossip.advertise; until then this node is \
     not reached by sites that it does not reach itself";

impl Node {
    /// Returns how other sites reach this node; nothing while none says.
    pub(super) fn reach(&self) -> Option<Reach> {
        let mesh = &self.control.mesh;
        let view = mesh.reach();
        if view.reach == mesh::Reach::Unsaid && view.reflexive.is_empty() {
            return None;
        }
        let counters = mesh.counters();
        let count =
            |(reason, count): (mesh::NotForwarded, u64)| Count { reason: reason.label().into(), count };
        Some(Reach {
            reach: match (view.reach, view.translated) {
                (mesh::Reach::Open, _) => "open",
                (mesh::Reach::Behind, Some(true)) => "behind-nat",
                (mesh::Reach::Behind, _) => "unproven",
                (mesh::Reach::Unsaid, _) => "unknown",
            }
            .into(),
            reflexive: view.reflexive.iter().map(ToString::to_string).collect(),
            mapping: match view.mapping {
                Mapping::Independent => "independent",
                Mapping::Dependent => "dependent",
                Mapping::Unknown => "unknown",
            }
            .into(),
            pause_ms: view.keepers.iter().map(|keeper| keeper.pause.as_millis() as u64).min().unwrap_or(0),
            keepers: view.keepers.into_iter().map(|keeper| keeper.node.to_string()).collect(),
            forwarded: counters.forwarded,
            dropped: counters.not_forwarded().filter(|(_, count)| *count > 0).map(count).collect(),
        })
    }

    /// Why other sites do not reach this node, if they do not. One that is not translated may well be reached, where it asked first.
    pub(super) fn unreached(&self) -> Vec<String> {
        let view = self.control.mesh.reach();
        let behind = view.reach == mesh::Reach::Behind && view.translated == Some(true);
        if !behind || !view.keepers.is_empty() {
            return Vec::new();
        }
        let seen = view
            .reflexive
            .first()
            .map_or_else(String::new, |seen| format!(" (other sites see it at {seen})"));
        vec![format!("this node is behind NAT{seen}, and no node of the mesh can be reached from outside")]
    }
}

/// How other sites reach the node, as one line.
pub(super) fn reach_sentence(reach: &Reach) -> String {
    match reach.reach.as_str() {
        "open" => "other sites reach this node".into(),
        "behind-nat" => format!("behind NAT, kept reachable by {}", reach.keepers.join(", ")),
        "unproven" => "seen at its own address; no other site has reached this node unasked".into(),
        _ => "no other site says how it reaches this node".into(),
    }
}
