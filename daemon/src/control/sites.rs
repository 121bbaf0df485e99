//! Other sites: what they say is remembered, and what they may announce belongs to the pod network. Pure.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD as BASE64;
use ipnet::IpNet;
use tracing::{debug, info, warn};
use weft_wire::invite::Token;
use weft_wire::mesh::{
    Bound, JoinError, MOST_OF_SITE, MOST_UNCERTIFIED, MemberState, MeshEvent, SiteStanding, SiteView, Trust,
    WordError,
};
use weft_wire::seal::{ClusterKey, KeyId, KeyRing};
use weft_wire::site::SignedStatement;
use weft_wire::types::{SiteName, Subnet};

use super::{Control, Output, REMEMBERED_PEER};
use crate::plan::model::Peer;
use crate::state::MeshKeys;

/// After a site left, the others have so long to hear of it under the old cluster keys.
const PARTING: Duration = Duration::from_secs(5);
/// What went wrong between sites is told for so long, and so many of these at most.
const TOLD: Duration = Duration::from_secs(600);
const MOST_TOLD: usize = 16;
const NOT_JOINED: &str = "this site has not joined";

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

    /// Goes on with the cluster keys that sites gave each other before this run.
    pub(super) fn recall_mesh_keys(&mut self, now: Instant) {
        if let Some(MeshKeys { version, ring }) = self.memory.mesh_keys.clone() {
            self.mesh.set_wanted_ring(version, ring.clone(), now);
            self.follow_ring(version, ring, now);
        }
    }

    /// Brings the own site into the mesh that the token is of; [`Output::Joined`] says how that went.
    ///
    /// # Errors
    /// One sentence, where it cannot succeed.
    pub fn join_sites(&mut self, token: Token, now: Instant) -> Result<(), JoinError> {
        let addresses = token.addresses.clone();
        self.mesh.join(token, now)?;
        self.asked_at = addresses;
        Ok(())
    }

    /// Takes the own site out of the mesh of sites.
    ///
    /// # Errors
    /// On a node that does not speak for it.
    pub fn leave_sites(&mut self, now: Instant) -> Result<(), WordError> {
        self.mesh.leave_sites(now)?;
        self.memory.site_seeds.clear();
        self.touch_memory(now);
        self.part_at = Some(now + PARTING);
        Ok(())
    }

    /// Gives the mesh a new cluster key, which those who are not in any more do not get.
    ///
    /// # Errors
    /// On a node that does not speak for its site.
    pub fn renew_mesh_key(&mut self, now: Instant) -> Result<KeyId, WordError> {
        let key = ClusterKey::from_bytes(super::random(&mut self.draws));
        let id = key.id();
        self.mesh.rekey(KeyRing::new(vec![key]).expect("one key is a ring"), now)?;
        Ok(id)
    }

    /// Changes the keys of a site that has left, once the others have heard of it.
    pub(super) fn part_if_due(&mut self, now: Instant) -> bool {
        let due = self.part_at.take_if(|at| *at <= now).is_some();
        if due && let Err(error) = self.renew_mesh_key(now) {
            warn!(err = %error, "the site keeps the cluster keys that it had");
        }
        due
    }

    /// Returns where to look for other sites: only with the cluster key that they have.
    pub(super) fn other_sites_seeds(&self) -> Vec<SocketAddr> {
        let wanted = self.memory.mesh_keys.as_ref().map(|keys| keys.ring.first());
        if wanted == Some(self.mesh.ring().first()) {
            return self.memory.site_seeds.clone();
        }
        Vec::new()
    }

    /// Returns the sites that are in, this one among them; nothing where other sites are not judged.
    pub(super) fn sites_within(&self) -> Option<BTreeSet<SiteName>> {
        let member = |view: &&SiteView| matches!(view.standing, SiteStanding::Member { .. });
        let others = self.mesh.sites().filter(member).map(|view| view.site.clone());
        let own = std::iter::once(self.config.node.site.clone());
        self.mesh.judges_sites().then(|| own.chain(others).collect())
    }

    /// Returns who tells whether nodes of a site are to be heard and answered.
    pub fn sites_that_are_in(&self) -> impl Fn(&SiteName) -> bool + use<> {
        let within = self.sites_within();
        move |site| within.as_ref().is_none_or(|within| within.contains(site))
    }

    /// Returns whether a site was put out or has left, or this one has: its nodes are nobody's trouble.
    pub fn is_out(&self, site: &SiteName) -> bool {
        let standing = self.mesh.sites().find(|view| view.site == *site).map(|view| &view.standing);
        let left = self.mesh.has_left_sites() && *site != self.config.node.site;
        left || matches!(standing, Some(SiteStanding::Expelled | SiteStanding::Left))
    }

    /// Returns whether gossip under another key comes from a node of a site that is out, which has such keys.
    pub(super) fn is_of_site_that_is_out(&self, from: SocketAddr) -> bool {
        let mut members = self.mesh.members().filter(|member| self.is_out(member.site));
        members.any(|member| member.record.facts.gossip.contains(&from))
    }

    /// Takes what the mesh tells of sites.
    pub(super) fn handle_site_event(&mut self, event: MeshEvent, now: Instant) {
        match event {
            MeshEvent::RingWanted { version, ring } => {
                self.memory.mesh_keys = Some(MeshKeys { version, ring: ring.clone() });
                self.remember_first(true);
                self.follow_ring(version, ring, now);
            }
            MeshEvent::JoinEnded(outcome) => self.handle_join_ended(outcome, now),
            MeshEvent::JoinRefused(sentence) => self.note_site_problem(sentence, now),
            MeshEvent::ClocksApart { site, seconds } => {
                let sentence = format!(
                    "the clocks of site {site} and of this node are {} apart: nothing here depends on it, but set one of them right",
                    span(seconds)
                );
                self.note_site_problem(sentence, now);
            }
            MeshEvent::SiteLeft { site } => {
                info!(%site, "a site has left");
                if let Err(error) = self.renew_mesh_key(now) {
                    warn!(err = %error, "the cluster key stays as it was");
                }
            }
            MeshEvent::OtherName { site } => {
                let sentence = format!(
                    "another node of this site calls it {site} and this one {}: give all nodes of the site one name",
                    self.config.node.site
                );
                self.note_site_problem(sentence, now);
            }
            MeshEvent::TwoSites { node, kept, other } => {
                let sentence = format!(
                    "a node {node} is in two sites, {kept} and {other}: only that of {kept} is reached; give one of the two another node.name"
                );
                self.note_site_problem(sentence, now);
            }
            MeshEvent::TooMany(bound) => self.note_site_problem(too_many(&bound), now),
            other => debug!(event = ?other, "event of the mesh"),
        }
    }

    fn handle_join_ended(&mut self, outcome: Result<SiteName, String>, now: Instant) {
        let asked_at = std::mem::take(&mut self.asked_at);
        let said = match outcome {
            Ok(site) => {
                info!(%site, "this site has joined");
                self.problems.sites.retain(|sentence, _| !sentence.starts_with(NOT_JOINED));
                self.memory.site_seeds = asked_at;
                self.part_at = None;
                self.remember_first(true);
                self.wake(now);
                Ok(format!(
                    "this site has joined the mesh of site {site}; its nodes go over to the mesh's cluster keys by themselves, and `weft sites` shows who is in"
                ))
            }
            Err(why) => {
                self.note_site_problem(format!("{NOT_JOINED}: {why}"), now);
                Err(why)
            }
        };
        self.outputs.push_back(Output::Joined(said));
    }

    /// Keeps a sentence about sites for people.
    pub(crate) fn note_site_problem(&mut self, sentence: String, now: Instant) {
        let sites = &mut self.problems.sites;
        sites.retain(|_, at| now.saturating_duration_since(*at) < TOLD);
        while sites.len() >= MOST_TOLD {
            let oldest = sites.iter().min_by_key(|(_, at)| **at).map(|(sentence, _)| sentence.clone());
            oldest.and_then(|oldest| sites.remove(&oldest));
        }
        if sites.insert(sentence.clone(), now).is_none() {
            warn!("{sentence}");
        }
    }

    /// Returns what went wrong between sites lately.
    pub fn site_troubles(&self, now: Instant) -> impl Iterator<Item = String> + '_ {
        let recent = move |at: &Instant| now.saturating_duration_since(*at) < TOLD;
        self.problems.sites.iter().filter(move |(_, at)| recent(at)).map(|(sentence, _)| sentence.clone())
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

fn too_many(bound: &Bound) -> String {
    match bound {
        Bound::Table => "the table of nodes is full, and others are not taken in: `weft peers` lists those that are known; \
             give the cluster another key if somebody makes nodes up"
            .into(),
        Bound::Site(site) => format!(
            "site {site} has as many nodes as a site may ({MOST_OF_SITE}, or fewer where several large ones share the room), and others \
             of it are not taken in: expel it if it makes nodes up"
        ),
        Bound::Uncertified => format!(
            "{MOST_UNCERTIFIED} nodes are known that no site has certified, and others are not taken in: somebody with the cluster key \
             makes nodes up; `weft peers` lists them, and `weft site rekey` changes the key once who does it is out"
        ),
    }
}

/// A number of seconds as people say it.
fn span(seconds: u64) -> String {
    match seconds {
        172_800.. => format!("{} days", seconds / 86_400),
        7_200.. => format!("{} hours", seconds / 3_600),
        120.. => format!("{} minutes", seconds / 60),
        _ => format!("{seconds} seconds"),
    }
}

fn prefixes(view: &SiteView) -> impl Iterator<Item = Subnet> + '_ {
    let prefixes = match &view.standing {
        SiteStanding::Member { prefixes, .. } => &prefixes[..],
        SiteStanding::Unknown | SiteStanding::Expelled | SiteStanding::Left => &[],
    };
    prefixes.iter().copied()
}
