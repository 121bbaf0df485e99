//! By which path each peer of another site is reached: directly, through a mapping that both open at once, or by a relay. Pure.
//!
//! Traffic decides who needs a path: a pair without any costs nothing but the record. The tunnels choose among the paths that
//! they are told of, packet by packet (`tunnel/endpoints.rs`); here it is decided which there are. What peers say is a hint: a
//! path is used once authentic packets came by it. Invariants: everything that is remembered is bounded by the number of members;
//! a peer is said at most one call and one request a second.

mod kernel;
mod observers;
mod party;
mod places;
mod reach;
mod relays;

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use weft_wire::mesh::{PathWord, TunnelMapping, TunnelReach};
use weft_wire::types::NodeName;

use crate::tunnel::{Candidate, Keep, Rank};
use kernel::{Need, Signs};
pub use party::{Act, Parties, Party, Seen};
use places::{direct, is_hopeless, is_known_at, relay_at_address};
pub use reach::Observations;
pub use relays::GivenUp;
use relays::{Grant, Relays};

/// Between two looks while a path is wanted.
const SOON: Duration = Duration::from_millis(200);
/// The same while there are peers of other sites. Asking the kernel costs more than asking the daemon's own tunnels.
const LATER: Duration = Duration::from_millis(300);
const LATER_IN_KERNEL: Duration = Duration::from_millis(1000);
/// Data that went unanswered for so long needs another path: TCP repeats itself after 0.2, 0.6, 1.4 and 3 s, and is to find one
/// the third time.
const SILENT: Duration = Duration::from_millis(600);
/// Fewer unanswered bytes may be a keepalive, which nobody answers.
const MORE_THAN_A_KEEPALIVE: u64 = 200;
/// So long both ends try without a relay.
const PUNCH: Duration = Duration::from_millis(600);
/// Between two calls of a peer.
const CALL: Duration = Duration::from_secs(1);
/// A peer's call says for so long that it needs a path.
const CALLED: Duration = Duration::from_secs(4);
/// Between two attempts to do without a relay: at first, and at most.
const UPGRADE: Duration = Duration::from_secs(5);
const UPGRADE_MOST: Duration = Duration::from_secs(80);
/// What a call named is a way to the peer for so long.
const NAMED: Duration = Duration::from_secs(120);
/// A pair that needed a path is looked after for so long after its last packet.
const REMEMBERED: Duration = Duration::from_secs(300);
/// Between two times that a peer is told where its packets come from, while nothing changes.
const TOLD: Duration = Duration::from_secs(240);

/// A peer that needed a path.
#[derive(Debug, Default)]
struct Pair {
    /// Since when it needs one; nothing while packets are answered.
    needs: Option<Instant>,
    /// When the peer called last.
    called: Option<Instant>,
    /// What a kernel's tunnel does not say.
    kernel: Signs,
    /// When it was called last.
    calls: Option<Instant>,
    /// What the peer named in its last call.
    named: Option<(Vec<SocketAddr>, Instant)>,
    grants: Vec<Grant>,
    /// When it is tried next to do without a relay, and how long after that.
    upgrade: Option<(Instant, Duration)>,
    /// What both ends said of themselves when that was decided.
    known: Option<(TunnelReach, TunnelReach)>,
    last: Option<Instant>,
}

/// What was seen of a peer's tunnel.
#[derive(Debug)]
struct Flow {
    sent: u64,
    received: u64,
    endpoint: SocketAddr,
    /// Since when bytes went unanswered, and from which count on.
    silent: Option<(Instant, u64)>,
    /// When more bytes were sent last.
    rose: Option<Instant>,
    told: Option<(SocketAddr, Instant)>,
    /// Which endpoint was looked for among the members' addresses, and when.
    looked_for: Option<(SocketAddr, Instant)>,
}

/// By which path each peer is reached.
#[derive(Debug, Default)]
pub struct Paths {
    pairs: BTreeMap<NodeName, Pair>,
    flows: BTreeMap<NodeName, Flow>,
    observations: Observations,
    relays: Relays,
    /// Those whose word tells this node what stands before it, and since when they are asked.
    observers: BTreeMap<NodeName, Instant>,
    /// Those that did not answer when they were to be observers.
    mute: BTreeMap<NodeName, Instant>,
    ways: BTreeMap<NodeName, SocketAddr>,
    /// Those whose sessions are of no use where they are, if they go elsewhere.
    anew: BTreeSet<NodeName>,
    /// Whether the kernel carries the tunnels: then one path at a time is set.
    in_kernel: bool,
    next: Option<Instant>,
}

impl Paths {
    /// Returns what this node announces of how it is reached, but for its relay.
    pub fn reach(&self, own: &Party) -> TunnelReach {
        self.observations.reach(&own.tunnels())
    }

    /// Returns the endpoints that the plan takes instead of those of the records.
    pub fn ways(&self) -> &BTreeMap<NodeName, SocketAddr> {
        &self.ways
    }

    /// Returns the peers whose tunnels begin anew where their way has changed: the kernel asks there at once, and not five seconds
    /// after it asked elsewhere.
    pub fn anew(&self) -> &BTreeSet<NodeName> {
        &self.anew
    }

    /// Returns which relay an endpoint of a peer is at.
    pub fn relay_at(&self, node: &NodeName, endpoint: SocketAddr) -> Option<&NodeName> {
        let grants = self.pairs.get(node).map(|pair| &pair.grants[..]).unwrap_or_default();
        grants.iter().find(|grant| grant.places.contains(&endpoint)).map(|grant| &grant.relay)
    }

    /// Returns the relays that promised and did not carry.
    pub fn given_up(&self, now: Instant) -> Vec<GivenUp> {
        self.relays.given_up(now)
    }

    /// Returns when to look next.
    pub fn wake(&self) -> Option<Instant> {
        self.next
    }

    /// Looks at how the tunnels are, and decides.
    pub fn look(&mut self, seen: &[Seen], in_kernel: bool, parties: &impl Parties, now: Instant) -> Vec<Act> {
        self.in_kernel = in_kernel;
        let own = parties.own();
        let before = self.reach(&own);
        let mut acts = Vec::new();
        let mut others = false;
        let members = OnceCell::new();
        for look in seen {
            let Some(party) = parties.party(&look.node).filter(|party| party.site != own.site) else {
                continue;
            };
            others = true;
            let silent = self.note_flow(look, now);
            if silent.is_none() && look.heard {
                self.note_relay_of_peer(
                    look,
                    (&own, &party),
                    || members.get_or_init(|| parties.all()),
                    now,
                    &mut acts,
                );
            }
            if look.ready && look.heard {
                self.tell_observed(look, &party, now, &mut acts);
            }
            self.look_at_pair(look, silent, (&own, &party), parties, now, &mut acts);
        }
        let names: BTreeSet<&NodeName> = seen.iter().map(|look| &look.node).collect();
        self.flows.retain(|node, _| names.contains(node));
        self.pairs.retain(|node, pair| {
            names.contains(node) && pair.last.is_some_and(|last| now.duration_since(last) < REMEMBERED)
        });
        self.observations.expire(&names, now);
        if others {
            self.choose_observers(seen, &own, parties, now, &mut acts);
        }
        if self.reach(&own) != before {
            acts.push(Act::Announce);
        }
        self.set_ways(seen, &own, parties, now, &mut acts);
        let urgent = self.pairs.values().any(|pair| pair.needs.is_some() || !pair.grants.is_empty());
        let pause = match (urgent, in_kernel) {
            (true, _) => SOON,
            (false, false) => LATER,
            (false, true) => LATER_IN_KERNEL,
        };
        self.next = others.then(|| now + pause);
        acts
    }

    /// Takes what a member said.
    pub fn handle_word(
        &mut self,
        from: &NodeName,
        word: PathWord,
        parties: &impl Parties,
        now: Instant,
    ) -> Vec<Act> {
        let own = parties.own();
        let mut acts = Vec::new();
        let Some(party) = parties.party(from) else { return acts };
        match word {
            PathWord::Observed(endpoint) if party.site != own.site && self.flows.contains_key(from) => {
                let before = self.reach(&own);
                self.observations.take(from, endpoint, now);
                if self.reach(&own) != before {
                    acts.push(Act::Announce);
                }
            }
            PathWord::Call { endpoints, answers } if party.site != own.site => {
                let pair = self.pairs.entry(from.clone()).or_default();
                // Who calls all the time does not make this node send all the time.
                if pair.called.is_some_and(|called| now.duration_since(called) < CALL / 2) {
                    return acts;
                }
                (pair.called, pair.last) = (Some(now), Some(now));
                pair.named = Some((endpoints, now));
                if self.in_kernel && !answers {
                    let received = self.flows.get(from).map_or(0, |flow| flow.received);
                    if pair.kernel.note_call(received, now) {
                        acts.extend(party.tunnel.map(|(key, _)| Act::Want(from.clone(), key)));
                    }
                }
                if !answers && pair.calls.is_none_or(|calls| now.duration_since(calls) >= CALL / 2) {
                    pair.calls = Some(now);
                    acts.push(Act::Say(from.clone(), self.call(&own, true)));
                }
                self.offer(&own, &party, true, now, &mut acts);
            }
            PathWord::RelayGrant(peer, port) => {
                let Some(other) = parties.party(&peer).filter(|other| other.site != own.site) else {
                    return acts;
                };
                if let Some(grant) = Grant::new(&own, &party, port, now) {
                    self.relays.granted(from, &peer);
                    let pair = self.pairs.entry(peer).or_default();
                    pair.last = Some(now);
                    pair.kernel.note_grant(now);
                    relays::take_grant(&mut pair.grants, grant);
                    self.offer(&own, &other, true, now, &mut acts);
                }
            }
            PathWord::RelayRefuse(peer, why) => self.relays.refused(from, &peer, why, now),
            PathWord::Observed(_) | PathWord::Call { .. } | PathWord::RelayAsk(_) => {}
        }
        acts
    }

    /// Returns for how long bytes to a peer went unanswered.
    fn note_flow(&mut self, look: &Seen, now: Instant) -> Option<Duration> {
        let Seen { sent, received, endpoint, .. } = *look;
        let rose = (sent > 0 && received == 0).then_some(now);
        let first = Flow { sent, received, endpoint, silent: None, rose, told: None, looked_for: None };
        let flow = self.flows.entry(look.node.clone()).or_insert(first);
        // What was not answered elsewhere says nothing of the path that the tunnel went over to. The kernel does not choose.
        let moved = look.endpoint != flow.endpoint && !self.in_kernel;
        flow.endpoint = look.endpoint;
        if look.received != flow.received || look.sent < flow.sent || moved {
            flow.silent = None;
        } else if look.sent > flow.sent {
            flow.silent.get_or_insert((now, flow.sent));
        }
        if look.sent > flow.sent {
            flow.rose = Some(now);
        }
        (flow.sent, flow.received) = (look.sent, look.received);
        let (since, from) = flow.silent?;
        (look.sent - from > MORE_THAN_A_KEEPALIVE).then(|| now.duration_since(since))
    }

    /// Takes that a peer's packets come by a relay that this node has no word of, or gave up: the peer has, and both use what
    /// works. What a relay's address says of the peer would mislead it and others.
    fn note_relay_of_peer<'a>(
        &mut self,
        look: &Seen,
        (own, party): (&Party, &Party),
        members: impl FnOnce() -> &'a Vec<Party>,
        now: Instant,
        acts: &mut Vec<Act>,
    ) {
        let at = look.endpoint;
        if !look.ready || is_known_at(party, at) || self.relay_at(&look.node, at).is_some() {
            return;
        }
        let Some(flow) = self.flows.get_mut(&look.node) else { return };
        if flow.looked_for.is_some_and(|(before, when)| before == at && now.duration_since(when) < UPGRADE) {
            return;
        }
        flow.looked_for = Some((at, now));
        if let Some(relay) = relay_at_address(at, [own, party], members()) {
            let pair = self.pairs.entry(look.node.clone()).or_default();
            pair.last = Some(now);
            let grant = Grant { relay: relay.node.clone(), places: vec![at], at: now, carried: true };
            relays::take_grant(&mut pair.grants, grant);
            self.offer(own, party, false, now, acts);
        }
    }

    /// Tells a peer where its packets come from, where that is news.
    fn tell_observed(&mut self, look: &Seen, party: &Party, now: Instant, acts: &mut Vec<Act>) {
        if self.relay_at(&look.node, look.endpoint).is_some() {
            return;
        }
        let Some(flow) = self.flows.get_mut(&look.node) else { return };
        let news = match flow.told {
            None => party.reach.mapping == TunnelMapping::Unknown || !is_known_at(party, look.endpoint),
            Some((endpoint, at)) => {
                endpoint != look.endpoint
                    || (now.duration_since(at) >= TOLD && !party.tunnels().contains(&look.endpoint))
            }
        };
        if news {
            flow.told = Some((look.endpoint, now));
            acts.push(Act::Say(look.node.clone(), PathWord::Observed(look.endpoint)));
        }
    }

    /// What packets of this node need, and what is needed in all.
    fn need(&self, look: &Seen, silent: Option<Duration>, now: Instant) -> (Need, Need) {
        let own = Need::of(look, silent);
        if !self.in_kernel {
            return (own, own);
        }
        let rose = self.flows.get(&look.node).and_then(|flow| flow.rose);
        match self.pairs.get(&look.node) {
            Some(pair) => pair.kernel.judge(look, silent, rose, pair.needs, now),
            None => Signs::default().judge(look, silent, rose, None, now),
        }
    }

    fn look_at_pair(
        &mut self,
        look: &Seen,
        silent: Option<Duration>,
        (own, party): (&Party, &Party),
        parties: &impl Parties,
        now: Instant,
        acts: &mut Vec<Act>,
    ) {
        let (own_need, need) = self.need(look, silent, now);
        let relayed = self.relay_at(&look.node, look.endpoint).cloned();
        let promised = |grant: &Grant| Some(&grant.relay) == relayed.as_ref();
        let grant =
            self.pairs.get(&look.node).and_then(|pair| pair.grants.iter().find(|grant| promised(grant)));
        let is_new = grant.is_some_and(|grant| grant.is_new(now)) && self.in_kernel;
        if need.silent
            && need.proven
            && !is_new
            && let Some(relay) = &relayed
        {
            let pair = self.pairs.entry(look.node.clone()).or_default();
            pair.grants.retain(|grant| grant.relay != *relay);
            self.relays.give_up(relay, &look.node, relays::Fault::Stopped, now);
        }
        let called = self.pairs.get(&look.node).and_then(|pair| pair.called);
        let called = called.is_some_and(|called| now.duration_since(called) < CALLED) && !look.ready;
        if !(need.is_wanted() || called) {
            if let Some(pair) = self.pairs.get_mut(&look.node) {
                pair.needs = None;
                pair.kernel.rest(look.ready);
                let flow = self.flows.get(&look.node);
                if flow.is_some_and(|flow| flow.silent.is_some()) || relayed.is_some() {
                    pair.last = Some(now);
                }
                if let Some(grant) =
                    pair.grants.iter_mut().find(|grant| Some(&grant.relay) == relayed.as_ref())
                {
                    grant.carried = true;
                }
            }
            if relayed.is_some() {
                self.look_after_relayed((own, party), parties, now, acts);
            }
            return;
        }
        let pair = self.pairs.entry(look.node.clone()).or_default();
        pair.last = Some(now);
        pair.kernel.drives = own_need.is_wanted();
        let since = *pair.needs.get_or_insert(now);
        // In the kernel only who has packets calls: two that call because they are called never end.
        if (own_need.is_wanted() || !self.in_kernel)
            && pair.calls.is_none_or(|calls| now.duration_since(calls) >= CALL)
        {
            pair.calls = Some(now);
            acts.push(Act::Say(look.node.clone(), self.call(own, false)));
            self.offer(own, party, true, now, acts);
        }
        if is_hopeless(own, party) || need.silent && need.proven || now.duration_since(since) >= PUNCH {
            self.relays.mind_promises(&look.node, &mut self.pairs, now);
            self.ask_relay((own, party), 1, since, parties, now, acts);
        }
    }

    /// Sees that a pair on a relay has another to fall back to, and does without one where it can.
    fn look_after_relayed(
        &mut self,
        (own, party): (&Party, &Party),
        parties: &impl Parties,
        now: Instant,
        acts: &mut Vec<Act>,
    ) {
        self.ask_relay((own, party), 2, now, parties, now, acts);
        let known = (self.reach(own), party.reach.clone());
        let pair = self.pairs.entry(party.node.clone()).or_default();
        if pair.known.as_ref().is_some_and(|before| *before != known) {
            pair.upgrade = Some((now, UPGRADE));
        }
        pair.known = Some(known);
        let (due, pause) = *pair.upgrade.get_or_insert((now + UPGRADE, UPGRADE));
        if due <= now {
            pair.upgrade = Some((now + pause, (pause * 2).min(UPGRADE_MOST)));
            pair.calls = Some(now);
            acts.push(Act::Say(party.node.clone(), self.call(own, false)));
            self.offer(own, party, true, now, acts);
        }
    }

    /// Asks for a relay, where the pair has fewer than that many.
    fn ask_relay(
        &mut self,
        (own, party): (&Party, &Party),
        wanted: usize,
        since: Instant,
        parties: &impl Parties,
        now: Instant,
        acts: &mut Vec<Act>,
    ) {
        // One of the two asks for both; the other when that one is late.
        if own.node > party.node && now.duration_since(since) < PUNCH * 2 && wanted == 1
            || wanted == 2 && own.node > party.node
        {
            return;
        }
        let grants = self.pairs.get(&party.node).map(|pair| &pair.grants[..]).unwrap_or_default();
        if grants.len() >= wanted {
            return;
        }
        let has: Vec<&NodeName> = grants.iter().map(|grant| &grant.relay).collect();
        if let Some(relay) = self.relays.choose((own, party), &has, || parties.all(), now) {
            acts.push(Act::Say(relay, PathWord::RelayAsk(party.node.clone())));
        }
    }

    fn call(&self, own: &Party, answers: bool) -> PathWord {
        PathWord::Call { endpoints: self.reach(own).reflexive, answers }
    }

    /// Tells the tunnels where a peer may be reached.
    fn offer(&mut self, own: &Party, party: &Party, trial: bool, now: Instant, acts: &mut Vec<Act>) {
        let Some((key, _)) = party.tunnel else { return };
        let mine = self.reach(own);
        let pair = self.pairs.entry(party.node.clone()).or_default();
        pair.named = pair.named.take().filter(|(_, at)| now.duration_since(*at) < NAMED);
        let named = pair.named.iter().flat_map(|(named, _)| named).copied();
        let direct = direct(own, &mine, party, named);
        let mut places: Vec<_> = direct.into_iter().map(|at| Candidate { rank: Rank::Direct, at }).collect();
        for grant in &pair.grants {
            places.extend(grant.places.iter().map(|at| Candidate { rank: Rank::Relay, at: *at }));
        }
        let keep = if !mine.reflexive.is_empty() || !pair.grants.is_empty() || party.is_translated() {
            Keep::WhileUsed
        } else {
            Keep::No
        };
        acts.push(Act::Candidates { node: party.node.clone(), key, places, keep, trial });
    }

    /// Chooses what the plan takes for the endpoints of peers whose records do not say where they are.
    fn set_ways(
        &mut self,
        seen: &[Seen],
        own: &Party,
        parties: &impl Parties,
        now: Instant,
        acts: &mut Vec<Act>,
    ) {
        let mine = self.reach(own);
        let (mut ways, mut anew) = (BTreeMap::new(), BTreeSet::new());
        for look in seen {
            let Some(party) = parties.party(&look.node).filter(|party| party.site != own.site) else {
                continue;
            };
            let pair = self.pairs.get(&look.node);
            let named =
                pair.and_then(|pair| pair.named.as_ref()).filter(|(_, at)| now.duration_since(*at) < NAMED);
            let named = named.filter(|_| self.in_kernel).into_iter().flat_map(|(named, _)| named).copied();
            let direct = direct(own, &mine, &party, named);
            let way = match pair.filter(|_| self.in_kernel) {
                Some(pair) => kernel::way(look, pair, &direct, self.ways.get(&look.node).copied(), now),
                None => direct.first().copied().filter(|_| party.is_translated()),
            };
            ways.extend(way.map(|way| (look.node.clone(), way)));
            if self.in_kernel && pair.is_some_and(|pair| pair.begins_anew(now)) {
                anew.insert(look.node.clone());
            }
        }
        if (&ways, &anew) != (&self.ways, &self.anew) {
            (self.ways, self.anew) = (ways, anew);
            acts.push(Act::Ways);
        }
    }
}

#[cfg(test)]
mod tests;
