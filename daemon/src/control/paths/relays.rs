//! Which relay a pair asks, what was granted, and which relays are not asked again soon. Pure.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use weft_wire::mesh::RelayRefusal;
use weft_wire::types::NodeName;

use super::{Pair, Party};

/// An answer may take so long.
const ANSWER: Duration = Duration::from_millis(700);
/// A relay that was granted carries something within so long, or it is given up.
pub(super) const CARRIES: Duration = Duration::from_millis(2500);
/// For so long.
const GIVEN_UP: Duration = Duration::from_secs(60);
/// A relay that refused is asked again after so long.
const REFUSED: Duration = Duration::from_secs(10);
/// Relays whose round trip is within this of the shortest are as good.
const AS_NEAR: Duration = Duration::from_millis(10);
/// What is assumed of one whose round trip is not known.
const FAR: Duration = Duration::from_secs(1);
/// The relays that a pair knows.
const MOST_GRANTS: usize = 3;
/// The relays that are remembered as given up or asked.
const MOST: usize = 256;

/// A port of a relay for this node and one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Grant {
    pub(super) relay: NodeName,
    pub(super) places: Vec<SocketAddr>,
    pub(super) at: Instant,
    /// Packets of the pair came by it.
    pub(super) carried: bool,
}

impl Grant {
    /// Makes one of what a relay said; nothing where it says of itself that it relays for nobody, or cannot be reached.
    pub(super) fn new(own: &Party, relay: &Party, port: u16, now: Instant) -> Option<Self> {
        let places: Vec<_> = relay
            .addresses
            .iter()
            .filter(|address| own.addresses.iter().any(|own| own.is_ipv4() == address.is_ipv4()))
            .map(|address| SocketAddr::new(*address, port))
            .take(1)
            .collect();
        let willing = relay.reach.relay_room > 0 && relay.is_open() && !places.is_empty();
        willing.then(|| Self { relay: relay.node.clone(), places, at: now, carried: false })
    }

    /// Whether nothing need have come by it yet.
    pub(super) fn is_new(&self, now: Instant) -> bool {
        now.duration_since(self.at) < CARRIES
    }
}

/// Keeps the latest of a relay, and of few relays.
pub(super) fn take_grant(grants: &mut Vec<Grant>, grant: Grant) {
    match grants.iter_mut().find(|known| known.relay == grant.relay) {
        Some(known) if known.places == grant.places => known.at = grant.at,
        Some(known) => *known = grant,
        None => {
            if grants.len() == MOST_GRANTS {
                grants.remove(0);
            }
            grants.push(grant);
        }
    }
}

/// A relay that promised and did not carry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GivenUp {
    /// The relay.
    pub relay: NodeName,
    /// For whose packets.
    pub peer: NodeName,
    /// It carried once.
    pub carried: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// It carried, and does no longer.
    Stopped,
    /// It granted a port, and nothing came by it.
    Broken,
    /// It refused.
    Refused,
}

/// What is remembered of relays.
#[derive(Debug, Default)]
pub(super) struct Relays {
    faults: BTreeMap<NodeName, (Fault, NodeName, Instant)>,
    /// Whom a pair asked last, and when.
    asked: BTreeMap<NodeName, (NodeName, Instant)>,
}

impl Relays {
    pub(super) fn given_up(&self, now: Instant) -> Vec<GivenUp> {
        let recent = self
            .faults
            .iter()
            .filter(|(_, (fault, _, at))| *fault != Fault::Refused && now.duration_since(*at) < GIVEN_UP * 5);
        recent
            .map(|(relay, (fault, peer, _))| GivenUp {
                relay: relay.clone(),
                peer: peer.clone(),
                carried: *fault == Fault::Stopped,
            })
            .collect()
    }

    pub(super) fn give_up(&mut self, relay: &NodeName, peer: &NodeName, fault: Fault, now: Instant) {
        if self.faults.len() >= MOST && !self.faults.contains_key(relay) {
            self.faults.clear();
        }
        self.faults.insert(relay.clone(), (fault, peer.clone(), now));
        if self.asked.get(peer).is_some_and(|(asked, _)| asked == relay) {
            self.asked.remove(peer);
        }
    }

    pub(super) fn refused(&mut self, relay: &NodeName, peer: &NodeName, why: RelayRefusal, now: Instant) {
        tracing::debug!(%relay, %peer, %why, "relay refused");
        self.give_up(relay, peer, Fault::Refused, now);
    }

    /// Takes that a relay granted what it was asked for.
    pub(super) fn granted(&mut self, relay: &NodeName, peer: &NodeName) {
        if self.asked.get(peer).is_some_and(|(asked, _)| asked == relay) {
            self.asked.remove(peer);
        }
    }

    /// Returns why a relay is not asked at the moment.
    fn fault(&self, relay: &NodeName, now: Instant) -> Option<Fault> {
        let (fault, _, at) = self.faults.get(relay)?;
        let pause = if *fault == Fault::Refused { REFUSED } else { GIVEN_UP };
        (now.duration_since(*at) < pause).then_some(*fault)
    }

    /// Gives up what was granted to a pair that still needs a path, and carried nothing.
    pub(super) fn mind_promises(
        &mut self,
        peer: &NodeName,
        pairs: &mut BTreeMap<NodeName, Pair>,
        now: Instant,
    ) {
        let Some(pair) = pairs.get_mut(peer) else { return };
        let since = pair.needs.unwrap_or(now);
        let broken = |grant: &Grant| now.duration_since(grant.at.max(since)) >= CARRIES;
        for grant in pair.grants.iter().filter(|grant| broken(grant)) {
            let fault = if grant.carried { Fault::Stopped } else { Fault::Broken };
            self.give_up(&grant.relay, peer, fault, now);
        }
        pair.grants.retain(|grant| !broken(grant));
    }

    /// Returns the relay that a pair is to ask now, besides those that it has; nothing while an answer is on the way.
    ///
    /// Of those that are as near as the nearest each pair takes another, those with more room more often. One that was given up
    /// has its turn only while a pair has none, and no other is to be had.
    pub(super) fn choose(
        &mut self,
        (own, party): (&Party, &Party),
        has: &[&NodeName],
        all: impl FnOnce() -> Vec<Party>,
        now: Instant,
    ) -> Option<NodeName> {
        let pause = if has.is_empty() { ANSWER } else { ANSWER * 8 };
        if self.asked.get(&party.node).is_some_and(|(_, at)| now.duration_since(*at) < pause) {
            return None;
        }
        // Who was asked and did not answer is not asked again at once.
        let silent = self.asked.get(&party.node).map(|(relay, _)| relay.clone());
        let silent = silent.filter(|relay| !has.contains(&relay));
        let mut relays: Vec<Party> = all();
        relays.retain(|relay| {
            let family = relay
                .addresses
                .iter()
                .any(|address| own.addresses.iter().any(|own| own.is_ipv4() == address.is_ipv4()));
            let willing = relay.alive && relay.reach.relay_room > 0 && relay.is_open() && family;
            let third = relay.node != own.node && relay.node != party.node && !has.contains(&&relay.node);
            willing && third && self.fault(&relay.node, now) != Some(Fault::Refused)
        });
        let is_good = |relay: &Party| self.fault(&relay.node, now).is_none();
        // Where there is no other, one that was given up is better than none: it may be the peer that was late.
        if !has.is_empty() || relays.iter().any(is_good) {
            relays.retain(is_good);
        }
        if relays.len() > 1 {
            relays.retain(|relay| Some(&relay.node) != silent.as_ref());
        }
        let nearest = relays.iter().map(|relay| relay.rtt.unwrap_or(FAR)).min()?;
        let near = relays.iter().filter(|relay| relay.rtt.unwrap_or(FAR) <= nearest * 3 / 2 + AS_NEAR);
        let pair = if own.node < party.node { (&own.node, &party.node) } else { (&party.node, &own.node) };
        let drawn = |relay: &Party| {
            let random = mix(pair.0, pair.1) ^ mix(&relay.node, pair.0);
            // Weighted: the larger the room the larger the root of the draw (Efraimidis and Spirakis, 2006).
            let share = (scramble(random) >> 11) as f64 / (1_u64 << 53) as f64;
            share.powf(100.0 / f64::from(relay.reach.relay_room))
        };
        let chosen = near.max_by(|a, b| drawn(a).total_cmp(&drawn(b)))?.node.clone();
        if self.asked.len() >= MOST && !self.asked.contains_key(&party.node) {
            self.asked.clear();
        }
        self.asked.insert(party.node.clone(), (chosen.clone(), now));
        Some(chosen)
    }
}

/// Returns a number that looks random and is the same at both ends of a pair.
pub(super) fn mix(one: &NodeName, other: &NodeName) -> u64 {
    let bytes = one.as_str().bytes().chain([0]).chain(other.as_str().bytes());
    // FNV-1a.
    scramble(
        bytes
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)),
    )
}

/// SplitMix64's step.
fn scramble(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}
