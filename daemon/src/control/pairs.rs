//! The secrets that the site shares with others (`weft_wire::mesh`, pairs): remembered, told to the plan, and who goes without. Pure.
//!
//! Invariant: a tunnel uses only a secret that this node announces, so the peer finds the same.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use weft_wire::mesh::{MemberState, MemberView};
use weft_wire::pair::{self, PairSecret};
use weft_wire::seal::KeyId;
use weft_wire::types::{NodeName, SiteName};

use super::Control;
use crate::state::PairSecrets;

/// So long a peer may go without before people hear of it: sites that just met, and nodes that were away.
const PATIENCE: Duration = Duration::from_secs(300);
/// So many of such peers are named.
const NAMED: usize = 3;

/// How tunnels to the nodes of a site are with regard to the secret that the two sites share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairView {
    /// The other site.
    pub site: SiteName,
    /// The latest secret that this node has, if any.
    pub latest: Option<PairSecret>,
    /// The living nodes there whose tunnels do without.
    pub without: Vec<NodeName>,
}

impl Control {
    /// Goes on with the secrets of an earlier run.
    pub(super) fn recall_pair_secrets(&mut self, now: Instant) {
        self.mesh.rotate_pair_secrets_after(self.config.encryption.rotate_after);
        let remembered = self.memory.pair_secrets.clone();
        self.mesh.set_pair_secrets(remembered.into_iter().map(|(other, secrets)| (other, secrets.0)), now);
    }

    /// After they changed: they are on the disk before a peer hears of them.
    pub(super) fn remember_pair_secrets(&mut self, now: Instant) {
        let secrets = self.mesh.pair_secrets();
        self.memory.pair_secrets =
            secrets.map(|(other, secrets)| (other, PairSecrets(secrets.to_vec()))).collect();
        self.remember_first(true);
        self.wake(now);
    }

    /// Returns the secrets of this node with each other site, the latest first, as far as it announces them.
    pub(super) fn announced_pair_secrets(&self) -> BTreeMap<SiteName, Vec<PairSecret>> {
        let tunnel = self.mesh.record().map(|record| record.facts.tunnel.as_ref());
        // Before it announces anything it goes on with what peers heard of the run before.
        let announced: Option<&[KeyId]> =
            tunnel.map(|tunnel| tunnel.map_or(&[][..], |tunnel| &tunnel.pairs[..]));
        let is_announced = |secret: &&PairSecret| announced.is_none_or(|ids| ids.contains(&secret.id()));
        let of = |site: &SiteName| self.mesh.pair_secrets_with(site).iter().filter(is_announced).cloned();
        let sites = self.mesh.sites().map(|view| (view.site.clone(), of(&view.site).collect::<Vec<_>>()));
        sites.filter(|(_, secrets)| !secrets.is_empty()).collect()
    }

    /// Notes since when each peer goes without a secret of the two sites.
    pub(super) fn note_pairless(&mut self, now: Instant) {
        let without: BTreeSet<NodeName> =
            self.pair_views().into_iter().flat_map(|view| view.without).collect();
        self.pairless.retain(|node, _| without.contains(node));
        for node in without {
            self.pairless.entry(node).or_insert(now);
        }
    }

    /// Returns how it is with each other site that is in.
    pub fn pair_views(&self) -> Vec<PairView> {
        let uses = self.tunnel_key().is_some() && self.config.encryption.preshared;
        let Some(within) = self.sites_within().filter(|_| uses) else { return Vec::new() };
        let own = self.announced_pair_secrets();
        let mut without: BTreeMap<&SiteName, Vec<NodeName>> = BTreeMap::new();
        let living = |member: &MemberView<'_>| member.state == MemberState::Alive && member.routed.is_some();
        for member in self.mesh.members().filter(living) {
            let tunnel = member.record.facts.tunnel.as_ref().filter(|tunnel| !tunnel.preshared.is_empty());
            let secrets = own.get(member.site).map_or(&[][..], |secrets| secrets);
            if tunnel.is_some_and(|tunnel| pair::common(secrets, &tunnel.pairs).is_none()) {
                without.entry(member.site).or_default().push(member.node.clone());
            }
        }
        let view = |site: SiteName| {
            let mut without = without.remove(&site).unwrap_or_default();
            without.sort();
            PairView { latest: own.get(&site).and_then(|secrets| secrets.first().cloned()), without, site }
        };
        within.into_iter().filter(|site| *site != self.config.node.site).map(view).collect()
    }

    /// Returns whose tunnels have done without the secret of the two sites for long, a sentence a site.
    pub fn pair_troubles(&self, now: Instant) -> Vec<String> {
        let late = |node: &NodeName| {
            self.pairless.get(node).is_some_and(|since| now.saturating_duration_since(*since) >= PATIENCE)
        };
        let sentence = |view: PairView| {
            let late: Vec<&str> =
                view.without.iter().filter(|node| late(node)).map(NodeName::as_str).collect();
            (!late.is_empty()).then(|| without(&view.site, &late))
        };
        self.pair_views().into_iter().filter_map(sentence).collect()
    }
}

fn without(site: &SiteName, nodes: &[&str]) -> String {
    let named = nodes[..nodes.len().min(NAMED)].join(", ");
    let more = match nodes.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!(
        "the tunnels to {named}{more} of site {site} do without a secret of the two sites, every other site has what theirs is made from: see that a node that speaks for each of the two sites lives, and that all run a version that knows such secrets"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_nodes_without_a_secret_are_named() {
        let site: SiteName = "far".parse().expect("a name");
        assert!(without(&site, &["a"]).starts_with("the tunnels to a of site far do without "));
        let many = ["a", "b", "c", "d", "e"];
        assert!(without(&site, &many).starts_with("the tunnels to a, b, c and 2 more of site far "));
    }
}
