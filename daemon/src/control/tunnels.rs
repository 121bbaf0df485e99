//! Paths put together with the mesh: who is who, what is said, and what this node relays for others. Pure.

use std::time::{Duration, Instant};

use tracing::{debug, info};
use weft_wire::mesh::{MemberState, MemberView, Mesh, PathWord, Reach, RelayRefusal, TunnelReach};
use weft_wire::types::NodeName;

use super::paths::{Act, GivenUp, Parties, Party, Seen};
use super::{Control, Output};
use crate::relay::pair::Member;

/// Between two looks at the tunnels while there is no peer of another site.
const ALONE: Duration = Duration::from_secs(2);
/// After a word about paths.
const CROWD: Duration = Duration::from_millis(50);

/// The mesh as the paths see it.
struct Known<'a> {
    mesh: &'a Mesh,
    own: Party,
}

fn party(view: &MemberView<'_>) -> Option<Party> {
    let facts = &view.record.facts;
    let tunnel = facts.tunnel.as_ref()?;
    let lives = matches!(view.state, MemberState::Alive | MemberState::Suspect);
    (view.state != MemberState::Left).then(|| Party {
        node: view.node.clone(),
        site: view.site.clone(),
        alive: lives,
        addresses: facts.underlay.clone(),
        behind: facts.reachability.reach == Reach::Behind,
        tunnel: Some((tunnel.key, tunnel.port)),
        reach: facts.tunnel_reach.clone(),
        rtt: view.rtt,
    })
}

impl Parties for Known<'_> {
    fn own(&self) -> Party {
        self.own.clone()
    }

    fn party(&self, node: &NodeName) -> Option<Party> {
        self.mesh.member(node).as_ref().and_then(party)
    }

    fn all(&self) -> Vec<Party> {
        self.mesh.members().filter_map(|view| party(&view)).collect()
    }
}

impl Control {
    fn own_party(&self) -> Party {
        let underlay = self.underlay.iter().flat_map(|underlay| &underlay.addresses);
        Party {
            node: self.config.node.name.clone(),
            site: self.config.node.site.clone(),
            alive: true,
            addresses: underlay.map(|address| address.addr()).collect(),
            behind: self.is_behind(),
            tunnel: self.tunnel_key().map(|key| (key, self.config.encryption.port)),
            reach: self.mesh.record().map(|record| record.facts.tunnel_reach.clone()).unwrap_or_default(),
            rtt: None,
        }
    }

    /// Whether unsolicited gossip does not reach this node.
    fn is_behind(&self) -> bool {
        self.mesh.record().is_some_and(|record| record.facts.reachability.reach == Reach::Behind)
    }

    /// Returns what the record says of how this node is reached.
    pub(super) fn reach(&self) -> TunnelReach {
        if self.tunnel_key().is_none() {
            return TunnelReach::default();
        }
        let reach = self.paths.reach(&self.own_party());
        let open = !reach.mapping.translates() && reach.reflexive.is_empty() && !self.is_behind();
        let relay_room = if open && self.config.relay.is_some() { self.relay_room } else { 0 };
        TunnelReach { relay_room, ..reach }
    }

    /// Takes how the tunnels are, after [`Output::LookAtTunnels`], and how many percent of the relay are free.
    pub fn handle_tunnels(&mut self, seen: &[Seen], in_kernel: bool, room: u8, now: Instant) {
        self.set_relay_room(room, now);
        let known = Known { mesh: &self.mesh, own: self.own_party() };
        let acts = self.paths.look(seen, in_kernel, &known, now);
        self.act(acts, now);
        self.tunnels_due = Some(self.paths.wake().unwrap_or(now + ALONE));
    }

    /// Takes what a member says of paths.
    pub(super) fn handle_path_word(&mut self, from: &NodeName, word: PathWord, now: Instant) {
        debug!(peer = %from, ?word, "path word");
        if let PathWord::RelayAsk(peer) = &word {
            return self.consider_relaying(from, peer, now);
        }
        let known = Known { mesh: &self.mesh, own: self.own_party() };
        let acts = self.paths.handle_word(from, word, &known, now);
        self.act(acts, now);
        // Words come in crowds.
        self.tunnels_due = self.tunnels_due.map(|due| due.min(now + CROWD));
    }

    fn act(&mut self, acts: Vec<Act>, now: Instant) {
        for act in acts {
            match act {
                Act::Say(node, word) => {
                    debug!(peer = %node, ?word, "says of paths");
                    // Who is no member any more needs no word.
                    drop(self.mesh.say(&node, &word, now));
                }
                Act::Candidates { key, places, keep, trial, .. } => {
                    self.outputs.push_back(Output::Paths { key, places, keep, trial });
                }
                Act::Want(_, key) => self.outputs.push_back(Output::WantSession(key)),
                Act::Announce => {
                    let TunnelReach { mapping, reflexive, .. } = self.reach();
                    info!(mapping = mapping.as_str(), ?reflexive, "peers see this node's tunnels elsewhere");
                    self.announce(now);
                }
                Act::Ways => self.wake(now),
            }
        }
    }

    /// Has the shell look at the tunnels if it is time; returns whether it is.
    pub(super) fn look_at_tunnels(&mut self, now: Instant) -> bool {
        if self.tunnels_due.is_none_or(|due| due > now) {
            return false;
        }
        self.tunnels_due = None;
        self.outputs.push_back(Output::LookAtTunnels);
        true
    }

    /// Returns when to look at the tunnels next.
    pub(super) fn tunnels_wake(&self) -> Option<Instant> {
        self.tunnels_due
    }

    fn consider_relaying(&mut self, from: &NodeName, peer: &NodeName, now: Instant) {
        let member = |node: &NodeName| {
            let view = self.mesh.member(node).filter(|view| view.verdict.is_accepted())?;
            let tunnel = view.record.facts.tunnel.as_ref()?;
            let keys = std::iter::once(tunnel.key).chain(tunnel.detour.iter().map(|detour| detour.key));
            Some((view.site.clone(), Member { node: node.clone(), keys: keys.collect() }))
        };
        let refuse = if self.reach().relay_room == 0 && self.relay_room > 0 {
            Some(RelayRefusal::Unwilling)
        } else {
            None
        };
        match (refuse, member(from), member(peer)) {
            (None, Some((site, one)), Some((other_site, other))) if site != other_site => {
                self.outputs.push_back(Output::Relay([one, other]));
            }
            (refuse, ..) => {
                let why = refuse.unwrap_or(RelayRefusal::Unknown);
                self.relay_refusals[why as usize] += 1;
                let word = PathWord::RelayRefuse(peer.clone(), why);
                self.act(vec![Act::Say(from.clone(), word)], now);
            }
        }
    }

    /// Takes the port that the relay gave to a pair, or why it gave none, after [`Output::Relay`].
    pub fn handle_relay(
        &mut self,
        [one, other]: &[Member; 2],
        outcome: Result<u16, RelayRefusal>,
        room: u8,
        now: Instant,
    ) {
        self.set_relay_room(room, now);
        if let Err(why) = outcome {
            self.relay_refusals[why as usize] += 1;
        }
        let say = |to: &Member, of: &Member| {
            let word = match outcome {
                Ok(port) => PathWord::RelayGrant(of.node.clone(), port),
                Err(why) => PathWord::RelayRefuse(of.node.clone(), why),
            };
            Act::Say(to.node.clone(), word)
        };
        // The first asked; a refusal is nothing to the other.
        let mut acts = vec![say(one, other)];
        if outcome.is_ok() {
            acts.push(say(other, one));
        }
        self.act(acts, now);
    }

    /// Announces roughly how much room there is: a record is not signed for each pair.
    fn set_relay_room(&mut self, room: u8, now: Instant) {
        let room = room.min(100).next_multiple_of(25);
        if self.relay_room != room {
            self.relay_room = room;
            self.announce(now);
        }
    }

    /// Returns which relay packets to a peer go by.
    pub fn relay_of(&self, node: &NodeName, endpoint: std::net::SocketAddr) -> Option<&NodeName> {
        self.paths.relay_at(node, endpoint)
    }

    /// Returns how many times this node refused to relay for a pair, for each reason.
    pub fn relay_refusals(&self) -> impl Iterator<Item = (RelayRefusal, u64)> {
        RelayRefusal::ALL.into_iter().zip(self.relay_refusals)
    }

    /// Returns the relays that promised and did not carry.
    pub fn relays_given_up(&self, now: Instant) -> Vec<GivenUp> {
        self.paths.given_up(now)
    }

    /// Returns what peers see of this node's tunnels.
    pub fn own_reach(&self) -> TunnelReach {
        self.reach()
    }
}
