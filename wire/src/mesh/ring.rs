//! The way from the cluster keys that a node has to those that are wanted everywhere, without a lost datagram.
//!
//! One text names the keys of all nodes (a ring that sites give each other, or the Secret of a Kubernetes cluster). Nodes learn of it at
//! different times, and another may come while they are on their way. So each goes in steps that fit whatever step its
//! peers are at: it opens with every new key at once; it seals with the first of them once every living peer says that it follows the
//! same text and opens with that key; it forgets the others some time after every living peer says that it follows the same text
//! and seals with that key. Peers say so in their records. A datagram for a member is sealed with the first key of the sender's
//! ring that the member says it opens with, and an answer with the key of the question where that is a wanted one.
//!
//! Why nobody is lost, however many changes overlap. A text has a name that no other has ([`RingName`]), and what a record says while it
//! names another text counts for nothing, so a record from before a change that was reversed is not mistaken for one of today. Let Q
//! be about to forget a key, and let F be the first key that is wanted. Each living peer P says that it follows the same text and seals
//! with F, so P had a record of Q with F in it, and has one as late since: of two records of a node the later holds. From then on P
//! seals for Q with F, as F is the first of P's ring; it puts another key before F only when Q says that it follows the same
//! later text and opens with that key, and then Q does. So P never chooses a key for Q that Q has forgotten, and by the same argument
//! Q none that P has. A peer that Q does not know of, or took for dead, may believe something else of Q; it asks with F, or
//! with what follows F, and is answered with that.
//!
//! A member that is dead holds no sealing up, or nobody could be expelled while a node is off; but for [`AWAY`] nothing is
//! forgotten that it needs. Who is not in is neither waited for nor remembered, nor are nodes that it makes up in the name of a site
//! that is: among sites those count that a store or a site has vouched for.
//!
//! Invariant: a node forgets no key as long as a living member that is in may seal with it; a peer that stands in the way is
//! named, and nothing goes on without it.

use std::time::{Duration, Instant};

use super::Mesh;
use super::api::{MemberState, SiteStanding, Verdict};
use super::membership::{Member, name_hash};
use crate::seal::{ClusterKey, KeyId, KeyRing, KeyRingError, RingName};
use crate::types::NodeName;

/// A node that hears nobody may just not have heard yet: it goes on alone only so long after its start.
const ALONE: Duration = Duration::from_secs(20);
/// After the last peer said that it seals with another key, its datagrams may be on their way.
const ON_THE_WAY: Duration = Duration::from_secs(30);
/// A tunnel makes its pre-shared secret anew at each handshake, at most two minutes apart while packets flow.
const HANDSHAKE: Duration = Duration::from_secs(180);
/// For a member that died before it followed, nothing is forgotten until so long after the change began.
const AWAY: Duration = Duration::from_secs(600);

/// What a node does next to have the cluster keys that are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RingStep {
    /// Nothing: it has them.
    There,
    /// Open with these, and seal with the first: persist them, then call [`Mesh::set_ring`].
    Take(KeyRing),
    /// Look again in a second.
    Wait {
        /// The living peers that stand in the way; nobody where only time does.
        for_peers: Vec<NodeName>,
    },
}

/// The way of one node.
#[derive(Debug)]
pub(super) struct Change {
    name: RingName,
    target: KeyRing,
    /// When the node began to go this way.
    since: Instant,
    /// Until when a node that hears nobody may just not have heard yet.
    alone_until: Instant,
    /// Since when no peer needs a key that is to be forgotten.
    unused: Option<Instant>,
}

/// What a member says of its keys.
#[derive(Debug, Clone)]
struct Said {
    node: NodeName,
    /// The keys that it opens with; it seals with the first.
    keys: Vec<KeyId>,
    follows: Option<RingName>,
    /// It is dead: it may come back.
    away: bool,
}

impl Change {
    fn new(name: RingName, target: KeyRing, alone_until: Instant, now: Instant) -> Self {
        Self { name, target, since: now, alone_until, unused: None }
    }

    /// Returns what comes next for a node with this ring.
    fn step(
        &mut self,
        ring: &KeyRing,
        said: &[Said],
        tunnels: bool,
        now: Instant,
    ) -> Result<RingStep, KeyRingError> {
        if *ring == self.target {
            return Ok(RingStep::There);
        }
        let missing: Vec<_> = self.target.keys().filter(|key| !ring.has(key.id())).cloned().collect();
        if !missing.is_empty() {
            self.unused = None;
            return KeyRing::new(ring.keys().cloned().chain(missing).collect()).map(RingStep::Take);
        }
        let first = self.target.first();
        let alone = now < self.alone_until && said.iter().all(|said| said.away);
        let opens = |said: &Said| said.follows == Some(self.name) && said.keys.contains(&first);
        let seals = |said: &Said| said.follows == Some(self.name) && said.keys.first() == Some(&first);
        let obsolete: Vec<ClusterKey> =
            ring.keys().filter(|key| !self.target.has(key.id())).cloned().collect();
        if ring.first() != first {
            let for_peers = without(said, opens);
            if alone || !for_peers.is_empty() {
                return Ok(RingStep::Wait { for_peers });
            }
            return KeyRing::new(self.target.keys().cloned().chain(obsolete).collect()).map(RingStep::Take);
        }
        if !obsolete.is_empty() {
            let for_peers = without(said, seals);
            let away = now < self.since + AWAY && said.iter().any(|said| said.away && !seals(said));
            if alone || away || !for_peers.is_empty() {
                self.unused = None;
                return Ok(RingStep::Wait { for_peers });
            }
            let since = *self.unused.get_or_insert(now);
            if now.saturating_duration_since(since) < if tunnels { HANDSHAKE } else { ON_THE_WAY } {
                return Ok(RingStep::Wait { for_peers });
            }
        }
        // What is left is to forget keys, or to put the others in order.
        Ok(RingStep::Take(self.target.clone()))
    }
}

/// The living among them that do not do so.
fn without(said: &[Said], does: impl Fn(&Said) -> bool) -> Vec<NodeName> {
    said.iter().filter(|said| !said.away && !does(said)).map(|said| said.node.clone()).collect()
}

impl Mesh {
    /// Goes to these cluster keys from now on, and says so; [`Mesh::ring_step`] tells the steps.
    pub fn follow_ring(&mut self, name: RingName, ring: KeyRing, now: Instant) {
        self.advance(now);
        if self.follows() != Some(name) {
            self.change = Some(Change::new(name, ring, self.started + ALONE, self.now));
            self.resign();
        }
        self.settle();
    }

    /// Returns the name of the cluster keys that the node goes to.
    pub fn follows(&self) -> Option<RingName> {
        self.change.as_ref().map(|change| change.name)
    }

    /// Returns the cluster keys that the node goes to, or has where it goes nowhere.
    pub fn final_ring(&self) -> &KeyRing {
        self.change.as_ref().map_or(&self.config.ring, |change| &change.target)
    }

    /// Returns what comes next on the way to the cluster keys that the node follows. `tunnels` says whether secrets of tunnels are made from
    /// them.
    ///
    /// # Errors
    /// Where the keys that are wanted and the present ones are too many for one ring.
    pub fn ring_step(&mut self, tunnels: bool, now: Instant) -> Result<RingStep, KeyRingError> {
        self.advance(now);
        let said = self.said();
        match &mut self.change {
            Some(change) => change.step(&self.config.ring, &said, tunnels, self.now),
            None => Ok(RingStep::There),
        }
    }

    /// What those members say of their keys that are to have the wanted ones: that are in, and not made up.
    fn said(&self) -> Vec<Said> {
        let members = self.table.range(..).filter(|(id, member)| {
            Some(*id) != self.table.me && member.state() != MemberState::Left && self.is_to_have_keys(member)
        });
        members
            .map(|(_, member)| Said {
                node: member.name().clone(),
                keys: member.signed.record().facts.keys.clone(),
                follows: member.signed.record().facts.follows,
                away: member.state() == MemberState::Dead,
            })
            .collect()
    }

    /// Whether a member is of a site that is in and real, as far as a store or that site vouched for it. All are where sites are not
    /// judged.
    fn is_to_have_keys(&self, member: &Member) -> bool {
        let is_in = |standing: &SiteStanding| matches!(standing, SiteStanding::Member { .. });
        let site = &member.signed.record().site;
        let within = *site == self.config.site
            || self.sites.views().get(site).is_some_and(|view| is_in(&view.standing));
        let real = member.once_vouched && !matches!(member.verdict, Verdict::Refused { .. });
        !self.sites.judges() || (within && real)
    }

    /// The key that seals what goes to whoever has this name, in answer to a datagram under the key `asked` or unasked.
    pub(super) fn key_for(&self, name: &str, asked: Option<KeyId>) -> KeyId {
        let ring = &self.config.ring;
        // A key that is to be forgotten may be in the hands of somebody who was put out: no question brings an answer under it.
        let wanted =
            |id: &KeyId| ring.has(*id) && self.change.as_ref().is_some_and(|change| change.target.has(*id));
        if let Some(asked) = asked.filter(wanted) {
            return asked;
        }
        let is_known = |member: &&Member| member.once_vouched && member.verdict.is_accepted();
        let member = self.table.find_member(name_hash(name)).filter(is_known);
        let keys = member.map_or(&[][..], |member| &member.signed.record().facts.keys);
        ring.ids().find(|id| keys.contains(id)).unwrap_or(ring.first())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> ClusterKey {
        ClusterKey::from_bytes([byte; 32])
    }

    fn ring(keys: &[u8]) -> KeyRing {
        KeyRing::new(keys.iter().map(|byte| key(*byte)).collect()).expect("a ring")
    }

    fn named(version: u64, keys: &[u8]) -> RingName {
        RingName::of(version, &ring(keys))
    }

    /// A change to key 2.
    fn change(now: Instant) -> Change {
        Change::new(named(1, &[2]), ring(&[2]), now + ALONE, now)
    }

    /// What a peer says that follows that.
    fn said(keys: &[u8]) -> Said {
        Said {
            node: format!("n{}", keys[0]).parse().expect("a name"),
            keys: keys.iter().map(|byte| key(*byte).id()).collect(),
            follows: Some(named(1, &[2])),
            away: false,
        }
    }

    fn take(keys: &[u8]) -> Result<RingStep, KeyRingError> {
        Ok(RingStep::Take(ring(keys)))
    }

    fn wait(for_peers: &[&str]) -> Result<RingStep, KeyRingError> {
        let for_peers = for_peers.iter().map(|name| name.parse().expect("a name")).collect();
        Ok(RingStep::Wait { for_peers })
    }

    #[test]
    fn keys_are_added_then_used_then_forgotten_as_the_peers_follow() {
        let now = Instant::now();
        let mut change = change(now);
        let mut step = |have: &[u8], peers: &[Said], now| change.step(&ring(have), peers, false, now);
        assert_eq!(step(&[1], &[said(&[1])], now), take(&[1, 2]));
        assert_eq!(step(&[1, 2], &[said(&[1])], now), wait(&["n1"]));
        assert_eq!(step(&[1, 2], &[said(&[1, 2]), said(&[1])], now), wait(&["n1"]));
        assert_eq!(step(&[1, 2], &[said(&[1, 2])], now), take(&[2, 1]));
        assert_eq!(step(&[2, 1], &[said(&[1, 2])], now), wait(&["n1"]));
        assert_eq!(step(&[2, 1], &[said(&[2, 1])], now), wait(&[]));
        assert_eq!(step(&[2, 1], &[said(&[2, 1])], now + ON_THE_WAY), take(&[2]));
        assert_eq!(step(&[2], &[said(&[2, 1])], now + ON_THE_WAY), Ok(RingStep::There));
    }

    #[test]
    fn a_peer_that_seals_with_the_old_key_again_begins_the_wait_anew() {
        let now = Instant::now();
        let mut change = change(now);
        assert_eq!(change.step(&ring(&[2, 1]), &[said(&[2])], true, now), wait(&[]));
        let later = now + HANDSHAKE;
        assert_eq!(change.step(&ring(&[2, 1]), &[said(&[2]), said(&[1, 2])], true, later), wait(&["n1"]));
        assert_eq!(change.step(&ring(&[2, 1]), &[said(&[2])], true, later), wait(&[]));
        assert_eq!(change.step(&ring(&[2, 1]), &[said(&[2])], true, later + HANDSHAKE), take(&[2]));
    }

    #[test]
    fn what_a_peer_said_while_it_followed_something_else_counts_for_nothing() {
        let now = Instant::now();
        let mut change = change(now);
        for follows in [None, Some(named(0, &[2])), Some(named(2, &[2])), Some(named(1, &[3]))] {
            let other = Said { follows, ..said(&[2, 1]) };
            assert_eq!(change.step(&ring(&[1, 2]), std::slice::from_ref(&other), false, now), wait(&["n2"]));
            assert_eq!(change.step(&ring(&[2, 1]), &[other], false, now + ON_THE_WAY), wait(&["n2"]));
        }
    }

    #[test]
    fn who_hears_nobody_goes_on_alone_after_a_while() {
        let now = Instant::now();
        let mut change = change(now);
        assert_eq!(change.step(&ring(&[1, 2]), &[], false, now), wait(&[]));
        assert_eq!(change.step(&ring(&[1, 2]), &[], false, now + ALONE), take(&[2, 1]));
    }

    #[test]
    fn for_who_is_away_nothing_is_forgotten_for_a_while_and_no_sealing_waits() {
        let now = Instant::now();
        let mut change = change(now);
        let peers = [said(&[2, 1]), Said { away: true, ..said(&[1]) }];
        assert_eq!(change.step(&ring(&[1, 2]), &peers, false, now), take(&[2, 1]));
        assert_eq!(change.step(&ring(&[2, 1]), &peers, false, now + AWAY / 2), wait(&[]));
        assert_eq!(change.step(&ring(&[2, 1]), &peers, false, now + AWAY), wait(&[]));
        assert_eq!(change.step(&ring(&[2, 1]), &peers, false, now + AWAY + ON_THE_WAY), take(&[2]));
        // Who died on its way after it had followed needs nothing else.
        let mut change = self::change(now);
        let peers = [said(&[2, 1]), Said { away: true, ..said(&[2, 1]) }];
        assert_eq!(change.step(&ring(&[2, 1]), &peers, false, now + ON_THE_WAY), wait(&[]));
        assert_eq!(change.step(&ring(&[2, 1]), &peers, false, now + ON_THE_WAY * 2), take(&[2]));
    }

    #[test]
    fn a_peer_that_says_nothing_of_its_keys_is_waited_for() {
        let now = Instant::now();
        let silent = Said { keys: Vec::new(), follows: None, ..said(&[9]) };
        let mut change = change(now);
        assert_eq!(change.step(&ring(&[1, 2]), std::slice::from_ref(&silent), false, now), wait(&["n9"]));
        assert_eq!(change.step(&ring(&[2, 1]), &[silent], false, now), wait(&["n9"]));
    }

    #[test]
    fn a_ring_that_is_full_takes_no_more_and_says_so() {
        let (now, most) = (Instant::now(), crate::seal::MAX_KEYS as u8);
        let mut change = Change::new(named(1, &[99]), ring(&[99]), now + ALONE, now);
        let full: Vec<u8> = (1..=most).collect();
        assert_eq!(change.step(&ring(&full), &[], false, now), Err(KeyRingError::TooMany));
    }
}
