//! Whose word tells this node what stands before it.

use std::collections::BTreeSet;
use std::time::Instant;

use weft_wire::mesh::TunnelMapping;
use weft_wire::types::NodeName;

use super::relays::mix;
use super::{Act, CALLED, Parties, Party, Paths, REMEMBERED, Seen};
use crate::tunnel::{Candidate, Keep, Rank};

impl Paths {
    /// Has sessions with two open nodes of other sites as long as it is not known that nothing stands before this node.
    pub(super) fn choose_observers(
        &mut self,
        seen: &[Seen],
        own: &Party,
        parties: &impl Parties,
        now: Instant,
        acts: &mut Vec<Act>,
    ) {
        self.mute.retain(|_, since| now.duration_since(*since) < REMEMBERED);
        let needed = if self.reach(own).mapping == TunnelMapping::None { 0 } else { 2 };
        let ready: BTreeSet<&NodeName> =
            seen.iter().filter(|look| look.ready).map(|look| &look.node).collect();
        let mute = &mut self.mute;
        self.observers.retain(|node, since| {
            let open = parties.party(node).is_some_and(|party| party.is_open());
            let late = !ready.contains(node) && now.duration_since(*since) >= CALLED;
            if late {
                mute.insert(node.clone(), now);
            }
            open && !late
        });
        while self.observers.len() > needed {
            self.observers.pop_last();
        }
        let relayed = |look: &&Seen| self.relay_at(&look.node, look.endpoint).is_none();
        let mut others: Vec<Party> = seen
            .iter()
            .filter(relayed)
            .filter(|look| !self.observers.contains_key(&look.node) && !self.mute.contains_key(&look.node))
            .filter(|_| self.observers.len() < needed)
            .filter_map(|look| parties.party(&look.node))
            .filter(|party| party.site != own.site && party.is_open())
            .collect();
        // Those that are known to be open, then those that there is a session with, then anyone, not the same for all nodes.
        others.sort_by_key(|party| {
            let known = party.reach.mapping == TunnelMapping::None;
            (!known, !ready.contains(&party.node), mix(&own.node, &party.node))
        });
        for party in others.into_iter().take(needed.saturating_sub(self.observers.len())) {
            self.observers.insert(party.node, now);
        }
        for node in self.observers.keys() {
            let Some(party) = parties.party(node) else { continue };
            let Some((key, _)) = party.tunnel else { continue };
            if !ready.contains(node) {
                acts.push(Act::Want(node.clone(), key));
            }
            let places = party.tunnels().into_iter().map(|at| Candidate { rank: Rank::Direct, at }).collect();
            if !self.pairs.contains_key(node) {
                let keep = Keep::Always;
                acts.push(Act::Candidates { node: node.clone(), key, places, keep, trial: false });
            }
        }
    }
}
