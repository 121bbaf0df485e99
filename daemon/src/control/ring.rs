//! The way from the cluster keys that a node has to those that are wanted everywhere, without a lost datagram.
//!
//! Where one text names the keys of all nodes (the Secret of a Kubernetes cluster), nodes see it change at different
//! times. So each goes its way in steps that fit whatever step its peers are at: it first opens with every new key,
//! seals with the new first key once every living peer says that it opens with it, and forgets a key some time after
//! no living peer says that it seals with it. Peers say so in their records. Pure.
//!
//! Invariant: a node seals with a key only when every living peer that it knows of has it, and forgets none that one
//! of them seals with; a peer that stands in the way is named, and nothing goes on without it.

use std::time::{Duration, Instant};

use tracing::info;
use weft_wire::mesh::MemberState;
use weft_wire::seal::{ClusterKey, KeyId, KeyRing, KeyRingError};

use super::{Control, Output, RETRY};

/// Between two looks at what peers say while there is a way to go.
const LOOK: Duration = Duration::from_secs(1);
/// A node that hears nobody may just not have heard yet: it goes on alone only after this.
const ALONE: Duration = Duration::from_secs(20);
/// After the last peer said that it seals with another key, its datagrams may be on their way.
const ON_THE_WAY: Duration = Duration::from_secs(30);
/// A tunnel makes its pre-shared secret anew at each handshake, at most two minutes apart while packets flow.
const HANDSHAKE: Duration = Duration::from_secs(180);
/// Who stands in the way for less than this is no news.
const PATIENCE: Duration = Duration::from_secs(90);
/// So many peers that stand in the way are named.
const NAMED: usize = 3;

/// The way of one node.
#[derive(Debug)]
pub(super) struct Way {
    target: KeyRing,
    /// When the node began to go this way.
    since: Instant,
    /// Until when a node that hears nobody may just not have heard yet.
    alone_until: Instant,
    /// Since when no living peer seals with a key that is to be forgotten.
    unused: Option<Instant>,
    /// When to look again.
    look: Instant,
}

/// What a living peer says of its keys.
#[derive(Debug, Clone)]
struct Said {
    node: String,
    /// The keys that it opens with; it seals with the first.
    keys: Vec<KeyId>,
}

/// What follows from what peers say.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// The node has what is wanted.
    There,
    /// Open with these, and seal with the first.
    Take(KeyRing),
    /// These peers stand in the way; nobody where only time does.
    Wait { for_peers: Vec<String> },
}

impl Way {
    fn new(target: KeyRing, alone_until: Instant, now: Instant) -> Self {
        Self { target, since: now, alone_until, unused: None, look: now }
    }

    /// Returns what comes next for a node with this ring.
    fn step(
        &mut self,
        ring: &KeyRing,
        said: &[Said],
        tunnels: bool,
        now: Instant,
    ) -> Result<Step, KeyRingError> {
        if *ring == self.target {
            return Ok(Step::There);
        }
        let has = |ring: &KeyRing, key: &ClusterKey| ring.ids().any(|id| id == key.id());
        let missing: Vec<_> = self.target.keys().filter(|key| !has(ring, key)).cloned().collect();
        if !missing.is_empty() {
            self.unused = None;
            return KeyRing::new(ring.keys().cloned().chain(missing).collect()).map(Step::Take);
        }
        let first = self.target.ids().next().expect("a ring has a key");
        let obsolete: Vec<ClusterKey> = ring.keys().filter(|key| !has(&self.target, key)).cloned().collect();
        let alone = said.is_empty() && now < self.alone_until;
        let in_the_way = |with: &dyn Fn(&Said) -> bool| -> Vec<String> {
            said.iter().filter(|said| !with(said)).map(|said| said.node.clone()).collect()
        };
        if ring.ids().next() != Some(first) {
            let for_peers = in_the_way(&|said| said.keys.contains(&first));
            if alone || !for_peers.is_empty() {
                return Ok(Step::Wait { for_peers });
            }
            return KeyRing::new(self.target.keys().cloned().chain(obsolete).collect()).map(Step::Take);
        }
        if !obsolete.is_empty() {
            let gone = |id: &KeyId| obsolete.iter().all(|key| key.id() != *id);
            let for_peers = in_the_way(&|said| said.keys.first().is_some_and(gone));
            if alone || !for_peers.is_empty() {
                self.unused = None;
                return Ok(Step::Wait { for_peers });
            }
            let since = *self.unused.get_or_insert(now);
            if now.saturating_duration_since(since) < if tunnels { HANDSHAKE } else { ON_THE_WAY } {
                return Ok(Step::Wait { for_peers });
            }
        }
        // What is left is to forget keys, or to put the others in order.
        Ok(Step::Take(self.target.clone()))
    }
}

impl Control {
    /// Goes from the present cluster keys to these, as far and as fast as the peers do; each step is written first.
    pub fn follow_ring(&mut self, target: KeyRing, now: Instant) {
        if self.way.as_ref().is_some_and(|way| way.target == target) {
            return;
        }
        if *self.mesh.ring() != target {
            let ids: Vec<_> = target.ids().collect();
            info!(keys = ?ids, "other cluster keys are wanted");
        }
        self.problems.ring = None;
        self.way = Some(Way::new(target, self.started + ALONE, now));
    }

    /// Returns whether the cluster keys follow those that are wanted everywhere.
    pub fn follows(&self) -> bool {
        self.way.is_some()
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
        self.way.as_ref().filter(|way| way.target != *self.mesh.ring()).map(|way| way.look)
    }

    /// Takes the next step if it is time; returns whether it was.
    pub(super) fn go_on_with_keys(&mut self, now: Instant) -> bool {
        if self.ring_wake().is_none_or(|look| look > now) {
            return false;
        }
        let said = self.said();
        let tunnels = self.tunnel_key().is_some() && self.config.encryption.preshared;
        let Some(way) = &mut self.way else { return false };
        way.look = now + LOOK;
        match way.step(self.mesh.ring(), &said, tunnels, now) {
            Ok(Step::There) => {}
            Ok(Step::Take(ring)) => self.outputs.push_back(Output::KeepRing(ring)),
            Ok(Step::Wait { for_peers }) => {
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

    fn said(&self) -> Vec<Said> {
        let living = |state| matches!(state, MemberState::Alive | MemberState::Suspect);
        // Whoever is put out or has left is not to have the keys, and is not waited for.
        let is_in = self.sites_that_are_in();
        let members = self.mesh.members().filter(|member| living(member.state) && is_in(member.site));
        members
            .map(|member| Said { node: member.node.to_string(), keys: member.record.facts.keys.clone() })
            .collect()
    }
}

fn waits_for(peers: &[String]) -> String {
    let named = peers[..peers.len().min(NAMED)].join(", ");
    let more = match peers.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!(
        "the change of the cluster keys waits for {named}{more}: see with `weft status` there what keeps the node from the keys, or stop it"
    )
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

    fn said(keys: &[u8]) -> Said {
        Said { node: format!("n{}", keys[0]), keys: keys.iter().map(|byte| key(*byte).id()).collect() }
    }

    fn wait(for_peers: &[&str]) -> Result<Step, KeyRingError> {
        Ok(Step::Wait { for_peers: for_peers.iter().map(ToString::to_string).collect() })
    }

    #[test]
    fn keys_are_added_then_used_then_forgotten_as_the_peers_follow() {
        let now = Instant::now();
        let mut way = Way::new(ring(&[2]), now + ALONE, now);
        let mut step = |have: &[u8], peers: &[Said], now| way.step(&ring(have), peers, false, now);
        assert_eq!(step(&[1], &[said(&[1])], now), Ok(Step::Take(ring(&[1, 2]))));
        assert_eq!(step(&[1, 2], &[said(&[1])], now), wait(&["n1"]));
        assert_eq!(step(&[1, 2], &[said(&[1, 2]), said(&[1])], now), wait(&["n1"]));
        assert_eq!(step(&[1, 2], &[said(&[1, 2])], now), Ok(Step::Take(ring(&[2, 1]))));
        assert_eq!(step(&[2, 1], &[said(&[1, 2])], now), wait(&["n1"]));
        assert_eq!(step(&[2, 1], &[said(&[2, 1])], now), wait(&[]));
        assert_eq!(step(&[2, 1], &[said(&[2, 1])], now + ON_THE_WAY), Ok(Step::Take(ring(&[2]))));
        assert_eq!(step(&[2], &[said(&[2, 1])], now + ON_THE_WAY), Ok(Step::There));
    }

    #[test]
    fn a_peer_that_seals_with_the_old_key_again_begins_the_wait_anew() {
        let now = Instant::now();
        let mut way = Way::new(ring(&[2]), now + ALONE, now);
        assert_eq!(way.step(&ring(&[2, 1]), &[said(&[2])], true, now), wait(&[]));
        let later = now + HANDSHAKE;
        assert_eq!(way.step(&ring(&[2, 1]), &[said(&[2]), said(&[1, 2])], true, later), wait(&["n1"]));
        assert_eq!(way.step(&ring(&[2, 1]), &[said(&[2])], true, later), wait(&[]));
        let forgotten = way.step(&ring(&[2, 1]), &[said(&[2])], true, later + HANDSHAKE);
        assert_eq!(forgotten, Ok(Step::Take(ring(&[2]))));
    }

    #[test]
    fn who_hears_nobody_goes_on_alone_after_a_while() {
        let now = Instant::now();
        let mut way = Way::new(ring(&[2, 1]), now + ALONE, now);
        assert_eq!(way.step(&ring(&[1, 2]), &[], false, now), wait(&[]));
        assert_eq!(way.step(&ring(&[1, 2]), &[], false, now + ALONE), Ok(Step::Take(ring(&[2, 1]))));
    }

    #[test]
    fn a_peer_that_says_nothing_of_its_keys_is_waited_for() {
        let now = Instant::now();
        let silent = Said { node: "old".into(), keys: Vec::new() };
        let mut way = Way::new(ring(&[2]), now + ALONE, now);
        assert_eq!(way.step(&ring(&[1, 2]), std::slice::from_ref(&silent), false, now), wait(&["old"]));
        assert_eq!(way.step(&ring(&[2, 1]), &[silent], false, now), wait(&["old"]));
    }

    #[test]
    fn a_ring_that_is_full_takes_no_more_and_says_so() {
        let (now, most) = (Instant::now(), weft_wire::seal::MAX_KEYS as u8);
        let mut way = Way::new(ring(&[99]), now + ALONE, now);
        let full: Vec<u8> = (1..=most).collect();
        assert_eq!(way.step(&ring(&full), &[], false, now), Err(KeyRingError::TooMany));
    }

    #[test]
    fn only_the_first_peers_in_the_way_are_named() {
        let names: Vec<String> = (1..=5).map(|number| format!("n{number}")).collect();
        assert!(
            waits_for(&names).starts_with("the change of the cluster keys waits for n1, n2, n3 and 2 more: ")
        );
        assert!(waits_for(&names[..1]).starts_with("the change of the cluster keys waits for n1: "));
    }
}
