//! The moments at which the mesh wants to be woken.
//!
//! Nothing is cancelled: whoever handles a timer looks whether it still matters.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    Probe,
    /// The direct answer to the probe with this token is late.
    ProbeLate(u64),
    Gossip,
    Sync,
    Rejoin,
    /// Suspicion of the member with this name hash may be over.
    Suspicion(u64),
    /// Nobody else may know that the member with this name hash is suspect.
    Accuse(u64),
    /// The member, or tombstone, with this name hash may be dropped.
    Reap(u64),
    /// The request with this token is given up.
    Expire(u64),
    /// Members wait for a certificate.
    Certify,
    /// What sites say has changed.
    Judge,
    /// Another node gave the own site another name.
    Rename,
    /// See whether other gateways of the own site live.
    Watch,
    /// Look at how this node is reached.
    Reach,
    /// Answer the member with this name hash once more.
    Again(u64),
    /// Members or sites wait for the cluster keys of the mesh.
    Grant,
    /// A question of this site's joining has no answer yet.
    Join,
    /// Secrets of two sites are to be made, offered or forgotten.
    Pairs,
}

impl Timer {
    fn reason(self) -> &'static str {
        match self {
            Self::Probe => "probe the next member",
            Self::ProbeLate(_) => "probe through others",
            Self::Gossip => "gossip",
            Self::Sync => "compare with a random member",
            Self::Rejoin => "look for lost members",
            Self::Suspicion(_) => "judge a suspect",
            Self::Accuse(_) => "tell a suspect again",
            Self::Reap(_) => "drop a member that is long gone",
            Self::Expire(_) => "give up a request",
            Self::Grant => "give cluster keys",
            Self::Join => "ask to be let in",
            Self::Pairs => "see to the secrets of pairs of sites",
            Self::Certify => "certify nodes of the own site",
            Self::Judge => "judge members of other sites again",
            Self::Rename => "say the name of the own site again",
            Self::Watch => "watch other gateways of the site",
            Self::Reach => "look at how this node is reached",
            Self::Again(_) => "answer once more, as asked",
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Timers {
    heap: BinaryHeap<Reverse<(Instant, u64, Timer)>>,
    count: u64,
}

impl Timers {
    pub(super) fn set(&mut self, at: Instant, timer: Timer) {
        self.count += 1;
        self.heap.push(Reverse((at, self.count, timer)));
    }

    pub(super) fn next(&self) -> Option<(Instant, &'static str)> {
        self.heap.peek().map(|Reverse((at, _, timer))| (*at, timer.reason()))
    }

    pub(super) fn pop_due(&mut self, now: Instant) -> Option<(Instant, Timer)> {
        if self.heap.peek()?.0.0 > now {
            return None;
        }
        self.heap.pop().map(|Reverse((at, _, timer))| (at, timer))
    }
}
