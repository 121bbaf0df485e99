//! A pair as one daemon tells another of it that goes on relaying in its place. What was counted stays behind, as with all counters
//! of a daemon.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use weft_wire::types::{NodeName, TunnelKey};

use super::{End, Leg, Member, Pair, RECENT};

/// A pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairState {
    ends: [EndState; 2],
    age_ms: u64,
    /// Since the last message was forwarded; nothing where none was.
    idle_ms: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct EndState {
    node: NodeName,
    keys: Vec<TunnelKey>,
    leg: Option<LegState>,
    asked: Vec<(u32, SocketAddr)>,
    indices: Vec<u32>,
    held: Option<Vec<u8>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct LegState {
    at: SocketAddr,
    silent_ms: u64,
    sure: bool,
}

fn since(then: Instant, now: Instant) -> u64 {
    u64::try_from(now.saturating_duration_since(then).as_millis()).unwrap_or(u64::MAX)
}

fn before(now: Instant, ms: u64) -> Instant {
    now.checked_sub(Duration::from_millis(ms)).unwrap_or(now)
}

impl End {
    fn state(&self, now: Instant) -> EndState {
        let leg = self.leg.map(|Leg { at, heard, sure }| LegState { at, silent_ms: since(heard, now), sure });
        EndState {
            node: self.member.node.clone(),
            keys: self.member.keys.clone(),
            leg,
            asked: self.asked.iter().copied().collect(),
            indices: self.indices.iter().copied().collect(),
            held: self.held.as_ref().map(|(held, _)| held.clone()),
        }
    }

    fn of(state: EndState, now: Instant) -> Self {
        let EndState { node, keys, leg, mut asked, mut indices, held } = state;
        asked.truncate(RECENT);
        indices.truncate(RECENT);
        let leg = leg.map(|leg| Leg { at: leg.at, heard: before(now, leg.silent_ms), sure: leg.sure });
        let held = held.map(|held| (held, now));
        Self { leg, asked: asked.into(), indices: indices.into(), held, ..Self::new(Member { node, keys }) }
    }
}

impl Pair {
    /// Returns what another daemon must know to go on.
    pub fn state(&self, now: Instant) -> PairState {
        PairState {
            ends: [0, 1].map(|end| self.ends[end].state(now)),
            age_ms: since(self.made, now),
            idle_ms: self.last.map(|last| since(last, now)),
        }
    }

    /// Goes on where another daemon was, with a full allowance of so many bytes a second.
    pub fn resume(state: PairState, bytes_a_second: u64, now: Instant) -> Self {
        let PairState { ends: [one, other], age_ms, idle_ms } = state;
        let members = [&one, &other].map(|end| Member { node: end.node.clone(), keys: end.keys.clone() });
        Self {
            ends: [one, other].map(|end| End::of(end, now)),
            made: before(now, age_ms),
            last: idle_ms.map(|ms| before(now, ms)),
            ..Self::new(members, bytes_a_second, now)
        }
    }
}
