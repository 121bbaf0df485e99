//! Where to look for peers without a configured seed: what the leases, and an earlier run, say of other nodes.
//!
//! An address from there is a hint: whoever answers must hold a cluster key, and is believed no more than its record.
//! Invariant: the mesh has at most [`HANDFUL`] such seeds at a time, drawn at random from all nodes that it does not
//! hear, so that neither a cluster that starts as a whole nor one full of dead entries makes a flood of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand_core::RngCore;
use weft_wire::mesh::MemberState;
use weft_wire::types::NodeName;

use super::Control;

/// So many seeds are drawn.
const HANDFUL: usize = 6;
/// Between two draws while the node hears nobody: the mesh asks each seed about twice in that time.
const ALONE: Duration = Duration::from_secs(2);
/// Between two draws otherwise. Nodes that are not heard then are few, or on the other side of a partition.
const AMONG_OTHERS: Duration = Duration::from_secs(30);

impl Control {
    /// Draws new seeds if it is time; returns whether it was.
    pub(super) fn draw_seeds(&mut self, now: Instant) -> bool {
        if self.seeds_due > now {
            return false;
        }
        let alone = self.mesh.living() == 0;
        self.seeds_due = now + if alone { ALONE } else { AMONG_OTHERS };
        let mut seeds = self.config.gossip.seeds.clone();
        let elsewhere = self.elsewhere(now);
        seeds.extend(self.other_sites_seeds());
        seeds.extend(draw(elsewhere, HANDFUL, &mut self.draws));
        seeds.sort_unstable();
        seeds.dedup();
        self.mesh.set_seeds(seeds, now);
        true
    }

    /// Draws at once where the node hears nobody: the store may have shown the first other node.
    pub(super) fn reconsider_seeds(&mut self, now: Instant) {
        if self.mesh.living() == 0 {
            self.seeds_due = now;
        }
    }

    /// Returns where the nodes receive gossip that this one does not hear.
    fn elsewhere(&self, now: Instant) -> Vec<Vec<SocketAddr>> {
        let lives =
            |node: &NodeName| self.mesh.member(node).is_some_and(|member| member.state != MemberState::Dead);
        let mut places: BTreeMap<NodeName, BTreeSet<SocketAddr>> = BTreeMap::new();
        let remembered = self.memory.peers.iter().map(|(node, peer)| (node.clone(), peer.gossip.clone()));
        let leased = self.lease_views(now).into_iter().filter(|view| !view.expired);
        for (node, gossip) in remembered.chain(leased.map(|view| (view.node, view.gossip))) {
            if node != self.config.node.name {
                places.entry(node).or_default().extend(gossip);
            }
        }
        places.retain(|node, gossip| !gossip.is_empty() && !lives(node));
        places.into_values().map(|gossip| gossip.into_iter().collect()).collect()
    }
}

/// Draws one address each of at most `most` nodes. An address that this node has no route to is as good as a dead
/// one: the next draw may take another of the same node.
fn draw(mut nodes: Vec<Vec<SocketAddr>>, most: usize, rng: &mut impl RngCore) -> Vec<SocketAddr> {
    let mut below = |count: usize| (rng.next_u64() % count as u64) as usize;
    let mut drawn = Vec::new();
    while drawn.len() < most && !nodes.is_empty() {
        let node = nodes.swap_remove(below(nodes.len()));
        drawn.push(node[below(node.len())]);
    }
    drawn
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha8Rng;
    use rand_core::SeedableRng;

    use super::*;

    #[test]
    fn a_draw_is_bounded_and_reaches_every_node_in_time() {
        let place = |number: usize| SocketAddr::from(([192, 0, 2, 1 + number as u8], 7117));
        let nodes: Vec<_> = (0..100).map(|number| vec![place(number), place(number + 100)]).collect();
        let mut rng = ChaCha8Rng::from_seed([3; 32]);
        let mut seen = BTreeSet::new();
        for _ in 0..400 {
            let drawn = draw(nodes.clone(), HANDFUL, &mut rng);
            assert_eq!(drawn.len(), HANDFUL);
            let different: BTreeSet<_> = drawn.iter().map(|seed| (seed.ip(), seed.port())).collect();
            assert_eq!(different.len(), HANDFUL);
            seen.extend(drawn);
        }
        assert_eq!(seen.len(), 200, "every address has its turn");
        assert_eq!(draw(nodes[..2].to_vec(), HANDFUL, &mut rng).len(), 2);
        assert!(draw(Vec::new(), HANDFUL, &mut rng).is_empty());
    }
}
