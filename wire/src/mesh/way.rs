//! Which way a datagram takes to a member.
//!
//! Members of one site share a network and use the addresses of the record. A member of another site that is behind NAT is
//! answered where it was heard while that is recent, and is sent to through its keepers otherwise: the addresses that it has
//! inside its site may be of this node's neighbours.

use std::net::SocketAddr;
use std::time::Duration;

use super::membership::{Id, Member};
use super::proto::{self, Body};
use super::{MemberState, Mesh};
use crate::record::Reach;

/// Where a member behind NAT was heard it is reached for so long: below the 30 s that many NATs keep a mapping (RFC 4787 REQ-5 asks
/// for two minutes).
const HEARD: Duration = Duration::from_secs(25);
/// The same for a member that keeps its mapping to this node, with its longest pause and time for a few more Pings.
pub(super) const KEPT: Duration = Duration::from_secs(150);

/// The way to a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    At(SocketAddr),
    /// This member keeps a way to it.
    Through(Id),
}

impl Mesh {
    /// The way to a member now.
    pub(super) fn way(&self, id: Id) -> Option<Way> {
        let member = self.table.at(id);
        if !self.is_behind(member) {
            return self.straight(id).map(Way::At);
        }
        let heard = member.contact.as_ref().and_then(|contact| contact.heard);
        let bound = if self.keeps(id) { KEPT } else { HEARD };
        if let Some(heard) = heard.filter(|heard| heard.when + bound > self.now) {
            return Some(Way::At(heard.at));
        }
        let keepers = self.keepers_of(id);
        match keepers.len() {
            0 if self.keeps(id) => None,
            0 => heard.map(|heard| heard.at).or(self.straight(id)).map(Way::At),
            // In turn: a keeper that lives may have lost its way to the member.
            count => Some(Way::Through(keepers[self.seq as usize % count])),
        }
    }

    /// Every way to a member, for when one did not lead to it.
    pub(super) fn ways(&self, id: Id) -> Vec<Way> {
        let member = self.table.at(id);
        let heard = member.contact.as_ref().and_then(|contact| contact.heard);
        let mut ways = Vec::new();
        if self.is_behind(member) {
            ways.extend(self.keepers_of(id).into_iter().map(Way::Through));
            ways.extend(heard.filter(|heard| heard.when + KEPT > self.now).map(|heard| Way::At(heard.at)));
        }
        if ways.is_empty() {
            let facts = &member.signed.record().facts;
            let mut addresses = facts.reachability.outside.clone();
            addresses.extend(&facts.gossip);
            // A translated address is in no record.
            addresses.extend(heard.map(|heard| heard.at).filter(|at| !addresses.contains(at)));
            ways.extend(addresses.into_iter().map(Way::At));
        }
        ways
    }

    /// Whether the addresses of the record are no way to the member.
    fn is_behind(&self, member: &Member) -> bool {
        let record = member.signed.record();
        if record.site == self.config.site {
            return false;
        }
        let facts = &record.facts;
        let heard = member.contact.as_ref().and_then(|contact| contact.heard);
        match facts.reachability.reach {
            Reach::Behind => true,
            Reach::Open => false,
            // Before it knows itself: from where it announces nothing.
            Reach::Unsaid => heard.is_some_and(|heard| !facts.gossip.contains(&heard.at)),
        }
    }

    /// The living members, but for this node, that a member keeps a way open to.
    fn keepers_of(&self, id: Id) -> Vec<Id> {
        let named = &self.table.at(id).signed.record().facts.reachability.keepers;
        let found = named.iter().filter_map(|hash| self.table.find(*hash));
        let lives = |keeper: &Id| {
            let member = self.table.at(*keeper);
            *keeper != id
                && self.table.me != Some(*keeper)
                && matches!(member.state(), MemberState::Alive | MemberState::Suspect)
                && !self.is_behind(member)
        };
        let mut keepers: Vec<Id> = found.filter(lives).collect();
        if keepers.iter().any(|keeper| self.table.at(*keeper).state() == MemberState::Alive) {
            keepers.retain(|keeper| self.table.at(*keeper).state() == MemberState::Alive);
        }
        keepers
    }

    /// Where a member is reached by what its record says: the address that answered last, else the first outside its site, else its
    /// first of a family that this node has too, else its first.
    pub(super) fn straight(&self, id: Id) -> Option<SocketAddr> {
        let member = self.table.at(id);
        let record = member.signed.record();
        let addresses = &record.facts.gossip;
        let contact = member.contact.as_deref();
        let outside =
            if record.site == self.config.site { &[][..] } else { &record.facts.reachability.outside };
        if !outside.is_empty() {
            return outside.iter().find(|address| self.has_family(address)).or(outside.first()).copied();
        }
        let answered = contact.and_then(|contact| addresses.get(usize::from(contact.preferred?)));
        let common = || addresses.iter().find(|address| self.has_family(address));
        let heard = contact.and_then(|contact| contact.heard).map(|heard| heard.at);
        answered.or_else(common).or(addresses.first()).copied().or(heard)
    }

    fn has_family(&self, address: &SocketAddr) -> bool {
        let own = self.facts.iter().flat_map(|facts| &facts.gossip);
        own.into_iter().any(|own| own.is_ipv4() == address.is_ipv4())
    }

    pub(super) fn send_to_member(&mut self, id: Id, body: Body, first: Vec<proto::Update>) {
        if let Some(way) = self.way(id) {
            self.send_by(way, id, body, first);
        }
    }

    pub(super) fn send_by(&mut self, way: Way, id: Id, body: Body, first: Vec<proto::Update>) {
        let name = self.table.at(id).name().to_string();
        match way {
            Way::At(to) => self.send(to, &name, body, first),
            Way::Through(keeper) => self.send_through(keeper, &name, body, first),
        }
    }
}
