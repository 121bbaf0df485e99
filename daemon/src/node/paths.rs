//! What the control plane wants of the tunnels and of the relay, done.

use std::time::Instant;

use weft_wire::api;
use weft_wire::mesh::RelayRefusal;
use weft_wire::types::TunnelKey;

use super::Node;
use crate::control::Seen;
use crate::control::paths::GivenUp;
use crate::kernel::TunnelLook;
use crate::relay::pair::Member;
use crate::relay::{PairStatus, Relay};
use crate::tunnel::{Candidate, Keep, TunnelStatus};

impl Node {
    /// Looks at the tunnels, and tells the control plane.
    pub(super) fn look_at_tunnels(&mut self, now: Instant) {
        let look = self.tunnels();
        let in_kernel = matches!(look, Some(TunnelLook::Kernel(_)));
        let status = look.map(TunnelLook::status).unwrap_or_default();
        let seen = status.into_iter().map(|tunnel| Seen {
            ready: tunnel.handshake.is_some(),
            // The kernel does not tell what waits; whether bytes still go to who has no session the control plane sees.
            waits: tunnel.waiting > 0 || in_kernel && tunnel.handshake.is_none() && tunnel.sent.1 > 0,
            sent: tunnel.sent.1,
            received: tunnel.received.1,
            endpoint: tunnel.endpoint,
            heard: tunnel.heard,
            node: tunnel.node,
        });
        let seen: Vec<Seen> = seen.collect();
        let room = self.relay.as_ref().map_or(0, Relay::room);
        self.control.handle_tunnels(&seen, in_kernel, room, now);
    }

    /// Tells the tunnels where a peer may be reached; the kernel is told by the plan.
    pub(super) fn set_paths(&self, key: &TunnelKey, places: &[Candidate], keep: Keep, trial: bool) {
        if let Some(TunnelLook::UserSpace(monitor)) = self.tunnels() {
            monitor.set_paths(key, places, keep, trial);
        }
    }

    pub(super) fn want_session(&self, key: &TunnelKey) {
        match self.tunnels() {
            Some(TunnelLook::UserSpace(monitor)) => monitor.want(key),
            Some(TunnelLook::Kernel(monitors)) => monitors.iter().for_each(|monitor| monitor.want(key)),
            None => {}
        }
    }

    /// Returns the relay that packets to a peer go by.
    pub(super) fn relay_to(&self, tunnel: &TunnelStatus) -> Option<String> {
        self.control.relay_of(&tunnel.node, tunnel.endpoint).map(ToString::to_string)
    }

    /// Returns what it relays for others.
    pub(super) fn relaying(&self) -> Option<api::Relaying> {
        let relay = self.relay.as_ref()?;
        let pair = |status: PairStatus| api::RelayedPair {
            nodes: status.nodes.iter().map(ToString::to_string).collect(),
            port: status.port.into(),
            legs: status.legs.iter().flatten().map(ToString::to_string).collect(),
            forwarded: status.counts.forwarded,
            bytes: status.counts.bytes,
            refused: status.counts.refused(),
            handshakes: status.counts.handshakes,
        };
        let count = |reason: &str, count| api::Count { reason: reason.into(), count };
        let counts = relay.counts();
        let refusals = self.control.relay_refusals();
        Some(api::Relaying {
            room: relay.room().into(),
            pairs: relay.status().into_iter().map(pair).collect(),
            forwarded: counts.forwarded,
            bytes: counts.bytes,
            refused: counts.refused(),
            dropped: counts.refusals().map(|(why, messages)| count(why.label(), messages)).collect(),
            handshakes: counts.handshakes,
            refused_pairs: refusals.map(|(why, pairs)| count(why.label(), pairs)).collect(),
        })
    }

    /// Returns the relays that promised and did not carry, a sentence each.
    pub(super) fn relay_problems(&self, now: Instant) -> Vec<String> {
        let sentence = |gone: GivenUp| match gone.carried {
            true => format!("relay {} stopped to carry packets for {}", gone.relay, gone.peer),
            false => {
                format!("relay {} gave a port for {}, and no packet came through it", gone.relay, gone.peer)
            }
        };
        self.control.relays_given_up(now).into_iter().map(sentence).collect()
    }

    /// Gives a pair a port of the relay, where there is one.
    pub(super) fn relay(&mut self, members: &[Member; 2], now: Instant) {
        let port = match &mut self.relay {
            Some(relay) => relay.allocate(members.clone(), now),
            None => Err(RelayRefusal::Unwilling),
        };
        let room = self.relay.as_ref().map_or(0, Relay::room);
        self.control.handle_relay(members, port, room, now);
    }
}
