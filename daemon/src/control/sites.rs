//! Other sites: what they say is remembered, and what they may announce belongs to the pod network. Pure.

use std::collections::BTreeSet;
use std::time::Instant;

use base64::Engine;
use base64::prelude::BASE64_STANDARD as BASE64;
use ipnet::IpNet;
use tracing::warn;
use weft_wire::mesh::{MemberState, SiteStanding, SiteView, Trust};
use weft_wire::site::SignedStatement;
use weft_wire::types::{SiteName, Subnet};

use super::{Control, REMEMBERED_PEER};
use crate::plan::model::Peer;

impl Control {
    /// Judges other sites by what they say, beginning with what an earlier run heard.
    pub(super) fn trust(&mut self, trust: Trust, now: Instant) {
        let read = |text: &String| {
            let bytes = BASE64.decode(text).ok()?;
            SignedStatement::from_bytes(&bytes, &self.config.cluster.id).ok()
        };
        // What does not hold is of another cluster id: it is heard again, or was never for this one.
        let remembered = self.memory.statements.iter().filter_map(read).collect();
        self.problems.site = self.mesh.set_trust(trust, remembered, now).err().map(|error| {
            warn!(err = %error, "the site has no word of its own");
            format!("the site cannot say what it announces: {error}; use at most eight cluster.cidrs")
        });
    }

    /// After a site said something new.
    pub(super) fn remember_statements(&mut self, now: Instant) {
        let statements = self.mesh.statements().map(|statement| BASE64.encode(statement.to_bytes()));
        self.memory.statements = statements.collect();
        self.touch_memory(now);
        self.wake(now);
    }

    /// Returns where pods are: in the ranges of this site's cluster, and in what other sites may announce.
    pub(super) fn pod_ranges(&self) -> Vec<IpNet> {
        let own = self.config.cluster.carver.cidrs().iter().map(|cidr| cidr.cidr);
        let others = self.mesh.sites().flat_map(prefixes).map(|prefix| prefix.net());
        own.chain(others).collect()
    }

    /// Notes since when somebody of each other site is heard.
    pub(super) fn note_heard_sites(&mut self, now: Instant) {
        let heard: BTreeSet<&SiteName> = self
            .mesh
            .members()
            .filter(|member| member.state == MemberState::Alive && member.verdict.is_accepted())
            .map(|member| member.site)
            .collect();
        self.sites_heard.retain(|site, _| heard.contains(site));
        for site in heard {
            if !self.sites_heard.contains_key(site) {
                self.sites_heard.insert(site.clone(), now);
            }
        }
    }

    /// Returns whether nobody of another site is heard, or only since so short a time that some of it may still be silent. What
    /// was known of it before holds as long: a site that is cut off has not gone.
    pub(super) fn has_just_heard(&self, site: &SiteName, now: Instant) -> bool {
        self.sites_heard.get(site).is_none_or(|since| now.duration_since(*since) < REMEMBERED_PEER)
    }

    /// Returns whether a peer of another site that an earlier run knew may still announce what it did; `None` for a peer
    /// that the store decides about.
    pub(super) fn site_of(&self, peer: &Peer) -> Option<bool> {
        if !self.mesh.judges_sites() || peer.site == self.config.node.site {
            return None;
        }
        let view = self.mesh.sites().find(|view| view.site == peer.site);
        let covered = |subnet: &Subnet| {
            view.iter().flat_map(|view| prefixes(view)).any(|prefix| prefix.covers(*subnet))
        };
        Some(peer.subnets.iter().all(covered))
    }
}

fn prefixes(view: &SiteView) -> impl Iterator<Item = Subnet> + '_ {
    let prefixes = match &view.standing {
        SiteStanding::Member { prefixes, .. } => &prefixes[..],
        SiteStanding::Unknown | SiteStanding::Expelled => &[],
    };
    prefixes.iter().copied()
}
