//! Going from the cluster keys that the node has to those that are wanted everywhere: each step is on the disk before it is used.
//!
//! Which step is next the mesh tells ([`Mesh::ring_step`](weft_wire::mesh::Mesh::ring_step)), and why that loses nobody is said there. Pure.

use std::time::{Duration, Instant};

use tracing::info;
use weft_wire::mesh::RingStep;
use weft_wire::seal::{KeyRing, RingName};
use weft_wire::types::NodeName;

use super::{Control, Output, RETRY};

/// Between two looks at what peers say while there is a way to go.
const LOOK: Duration = Duration::from_secs(1);
/// Who stands in the way for less than this is no news.
const PATIENCE: Duration = Duration::from_secs(90);
/// So many peers that stand in the way are named.
const NAMED: usize = 3;

/// When the node began to go to other cluster keys, and when it looks again.
#[derive(Debug)]
pub(super) struct Way {
    since: Instant,
    look: Instant,
}

impl Control {
    /// Goes from the present cluster keys to these, as far and as fast as the peers do. `version` is what sites count them by, 0
    /// where they do not come from a site.
    pub fn follow_ring(&mut self, version: u64, ring: KeyRing, now: Instant) {
        let name = RingName::of(version, &ring);
        if self.mesh.follows() == Some(name) {
            return;
        }
        if *self.mesh.ring() != ring {
            let ids: Vec<_> = ring.ids().collect();
            info!(keys = ?ids, "other cluster keys are wanted");
        }
        self.problems.ring = None;
        self.way = Some(Way { since: now, look: now });
        self.mesh.follow_ring(name, ring, now);
    }

    /// Returns whether the cluster keys follow those that are wanted everywhere.
    pub fn follows(&self) -> bool {
        self.mesh.follows().is_some()
    }

    /// Takes how the last [`Output::KeepRing`] went.
    pub fn handle_ring_kept(&mut self, kept: Result<KeyRing, String>, now: Instant) {
        match kept {
            Ok(ring) => {
                let ids: Vec<_> = ring.ids().collect();
                info!(keys = ?ids, "cluster keys changed");
                self.problems.ring = None;
                self.use_ring(ring, now);
            }
            Err(error) => {
                self.problems.ring = Some(format!("the wanted cluster keys cannot be kept: {error}"));
                if let Some(way) = &mut self.way {
                    way.look = now + RETRY;
                }
            }
        }
    }

    /// Returns when to look at the peers' keys again.
    pub(super) fn ring_wake(&self) -> Option<Instant> {
        self.way.as_ref().filter(|_| self.mesh.final_ring() != self.mesh.ring()).map(|way| way.look)
    }

    /// Takes the next step if it is time; returns whether it was.
    pub(super) fn go_on_with_keys(&mut self, now: Instant) -> bool {
        if self.ring_wake().is_none_or(|look| look > now) {
            return false;
        }
        let tunnels = self.tunnel_key().is_some() && self.config.encryption.preshared;
        let Some(way) = &mut self.way else { return false };
        way.look = now + LOOK;
        match self.mesh.ring_step(tunnels, now) {
            Ok(RingStep::There) => {}
            Ok(RingStep::Take(ring)) => self.outputs.push_back(Output::KeepRing(ring)),
            Ok(RingStep::Wait { for_peers }) => {
                let late = now.saturating_duration_since(way.since) >= PATIENCE;
                self.problems.ring = (late && !for_peers.is_empty()).then(|| waits_for(&for_peers));
            }
            Err(error) => {
                self.problems.ring =
                    Some(format!("the wanted cluster keys cannot be taken beside the present ones: {error}"));
            }
        }
        true
    }
}

fn waits_for(peers: &[NodeName]) -> String {
    let named: Vec<_> = peers.iter().take(NAMED).map(ToString::to_string).collect();
    let more = match peers.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!(
        "the change of the cluster keys waits for {}{more}: see with `weft status` there what keeps the node from the keys, or stop it",
        named.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_peers_in_the_way_are_named() {
        let names: Vec<NodeName> =
            (1..=5).map(|number| format!("n{number}").parse().expect("a name")).collect();
        assert!(
            waits_for(&names).starts_with("the change of the cluster keys waits for n1, n2, n3 and 2 more: ")
        );
        assert!(waits_for(&names[..1]).starts_with("the change of the cluster keys waits for n1: "));
    }
}
