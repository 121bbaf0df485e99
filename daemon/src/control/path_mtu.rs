//! The largest packet that reaches one peer: RFC 8899's search, inside the tunnel. Pure: it says which sizes to ask with,
//! and takes which were answered.
//!
//! Unlike a transport's search it asks with several sizes at once, since a probe in a tunnel delays nobody else's packets: a
//! narrow path is known after a round trip or two, and not after one for each step. A size is believed lost only where a
//! small packet was answered meanwhile: a peer that is away, or whose daemon knows no such probes, teaches nothing.
//!
//! Invariants: a size is in force only after it was answered; where nothing is wrong there is no limit at all.

use std::time::{Duration, Instant};

/// Wire sizes of links and tunnels that are common on the way, and of clouds that were seen to drop more without a word.
const STEPS: [u32; 22] = [
    576, 800, 1000, 1200, 1260, 1280, 1296, 1340, 1368, 1390, 1400, 1420, 1440, 1450, 1460, 1472, 1480, 1492,
    1500, 4000, 8900, 9000,
];
/// How often a size is asked with before it counts as lost (RFC 8899 s5.1.2, MAX_PROBES).
const TRIES: u32 = 3;
/// After the first answer, how long those that were sent at the same time may still take.
const SETTLE: Duration = Duration::from_millis(50);
/// A search ends where it knows the size this closely, in bytes.
const CLOSE: u32 = 16;
/// How many sizes a round between two known ones has.
const BETWEEN: u32 = 7;
/// How long until a peer that answered nothing is asked again: at first, for its daemon or its tunnel may be starting, and at
/// most, the interval doubling.
const SILENT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// A sign that a path is wide again brings the next question forward by this factor.
const HINT: u32 = 16;
/// How long until a narrow path is asked whether it is wide again: at first, for it may have been so for a moment only, and at
/// most, the interval doubling (RFC 8899 s5.1.1, PMTU_RAISE_TIMER).
const RAISE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(600));

/// What to send now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ask {
    /// Packets of these sizes, in bytes.
    pub sizes: Vec<u32>,
    /// And one as small as can be.
    pub small: bool,
}

/// Why sizes are asked with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Round {
    /// Whether the largest that there can be passes.
    Whole,
    /// Whether the size in force still passes.
    Doubt,
    /// What passes between one size that does and one that does not.
    Between { low: u32, high: u32 },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Rest { again: Option<Instant> },
    Asking { round: Round, sizes: Vec<u32>, tries: u32, due: Instant, heard: bool, best: u32 },
}

/// The search towards one peer.
#[derive(Debug, Clone)]
pub struct Search {
    /// What a packet may have by all that is known without asking.
    ceiling: u32,
    /// What the tunnel adds.
    overhead: u32,
    /// What the tunnel pads packets to.
    align: u32,
    /// The size that was answered last.
    confirmed: Option<u32>,
    /// Not even the smallest step passes.
    closed: bool,
    raise: Duration,
    silent: Duration,
    phase: Phase,
}

impl Search {
    /// Starts a search below `ceiling`. What an earlier run found stays in force until this one knows better.
    pub fn new(ceiling: u32, (overhead, align): (u32, u32), remembered: Option<u32>, now: Instant) -> Self {
        let confirmed = remembered.filter(|size| *size < ceiling);
        let phase = Phase::Rest { again: Some(now) };
        Self { ceiling, overhead, align, confirmed, closed: false, raise: RAISE.0, silent: SILENT.0, phase }
    }

    /// The limit to set, where the path carries less than the ceiling.
    pub fn limit(&self) -> Option<u32> {
        self.confirmed.filter(|size| *size < self.ceiling)
    }

    /// The size that was found to pass; nothing where none was asked with and answered.
    pub fn measured(&self) -> Option<u32> {
        self.confirmed
    }

    /// Whether small packets are answered and none of the steps is.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether sizes are being asked with.
    pub fn is_asking(&self) -> bool {
        matches!(self.phase, Phase::Asking { .. })
    }

    /// When to call [`Search::poll`].
    pub fn wake(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Rest { again } => *again,
            Phase::Asking { due, .. } => Some(*due),
        }
    }

    /// Says what to send now; `patience` is how long answers may take.
    pub fn poll(&mut self, patience: Duration, now: Instant) -> Option<Ask> {
        if self.wake().is_none_or(|wake| wake > now) {
            return None;
        }
        if let Phase::Rest { .. } = self.phase {
            self.begin(Round::Whole, vec![self.ceiling], now);
        }
        self.expire(now);
        let Phase::Asking { sizes, tries, due, heard, best, .. } = &mut self.phase else { return None };
        *tries += 1;
        *due = now + patience;
        let sizes = sizes.iter().copied().filter(|size| size > best).collect();
        Some(Ask { sizes, small: !*heard })
    }

    /// Takes that a packet of this size was answered.
    pub fn handle_answer(&mut self, size: u32, now: Instant) {
        if let Phase::Asking { due, heard, best, sizes, .. } = &mut self.phase {
            *heard = true;
            if sizes.contains(&size) {
                *best = (*best).max(size);
            }
            *due = (*due).min(now + SETTLE);
            let largest = sizes.iter().max() == Some(best);
            if largest {
                *due = now;
            }
        }
        self.silent = SILENT.0;
        // Whatever was thought lost is not. The first of several answers is not the largest, so it sets no limit.
        if size == self.ceiling || self.confirmed.is_some_and(|known| size > known && size < self.ceiling) {
            self.confirmed = Some(size);
            self.closed = false;
        }
    }

    /// Takes that a packet of the size in force had no answer: it is asked with again at once, and if small packets are
    /// answered and these are not, the path is a black hole (RFC 8899 s4.3).
    pub fn doubt(&mut self, now: Instant) {
        if let (Phase::Rest { .. }, Some(size)) = (&self.phase, self.confirmed) {
            self.begin(Round::Doubt, vec![size], now);
            // One was lost already.
            if let Phase::Asking { tries, .. } = &mut self.phase {
                *tries = 1;
            }
        }
    }

    /// Takes that a packet of this size came from the peer: where it can send it, the way back may carry it too.
    pub fn hint(&mut self, size: u32, now: Instant) {
        let soon = now + self.raise / HINT;
        if let (Phase::Rest { again: Some(again) }, true) =
            (&mut self.phase, self.confirmed.is_some_and(|own| size > own))
        {
            *again = soon.min(*again);
        }
    }

    /// The packet inside that makes at most this size outside.
    fn inner(&self, wire: u32) -> u32 {
        let room = wire.saturating_sub(self.overhead);
        room - room % self.align
    }

    fn begin(&mut self, round: Round, sizes: Vec<u32>, now: Instant) {
        self.phase = Phase::Asking { round, sizes, tries: 0, due: now, heard: false, best: 0 };
    }

    /// Draws the conclusion of a round whose time is over, or of one that has its answer.
    fn expire(&mut self, now: Instant) {
        let Phase::Asking { round, sizes, tries, heard, best, .. } = self.phase.clone() else { return };
        let answered = sizes.iter().max() == Some(&best);
        if tries == 0 || (tries < TRIES && !answered) {
            // What passes is used at once; what more there is turns out later.
            if let (Round::Between { low, .. }, true) = (round, best > 0) {
                self.confirmed = Some(best.max(low));
            }
            return;
        }
        match round {
            Round::Whole | Round::Doubt if answered => self.rest(now),
            _ if !heard => {
                self.phase = Phase::Rest { again: Some(now + self.silent) };
                self.silent = (self.silent * 2).min(SILENT.1);
            }
            Round::Whole => self.narrow(self.confirmed.unwrap_or(0), self.ceiling, now),
            Round::Doubt => self.narrow(0, best.max(sizes[0]), now),
            Round::Between { low, high } => {
                let low = low.max(best);
                self.closed = low == 0;
                self.confirmed = Some(low).filter(|low| *low > 0).or(self.confirmed);
                let high = sizes.into_iter().filter(|size| *size > low).min().unwrap_or(high);
                self.narrow(low, high, now);
            }
        }
    }

    /// Goes on between a size that passes and one that does not.
    fn narrow(&mut self, low: u32, high: u32, now: Instant) {
        let mut sizes: Vec<u32> =
            STEPS.iter().map(|step| self.inner(*step)).filter(|size| *size > low && *size < high).collect();
        if sizes.is_empty() && high - low > CLOSE {
            let step = (high - low).div_ceil(BETWEEN + 1).max(self.align);
            sizes = (1..=BETWEEN).map(|place| low + place * step).filter(|size| *size < high).collect();
        }
        sizes.dedup();
        if sizes.is_empty() || (low == 0 && self.closed) {
            return self.rest(now);
        }
        self.begin(Round::Between { low, high }, sizes, now);
    }

    /// Ends the search; a path that carries less than it might is asked again later.
    fn rest(&mut self, now: Instant) {
        if self.confirmed == Some(self.ceiling) {
            self.raise = RAISE.0;
            self.phase = Phase::Rest { again: None };
        } else {
            self.phase = Phase::Rest { again: Some(now + self.raise) };
            self.raise = (self.raise * 2).min(RAISE.1);
        }
    }
}

#[cfg(test)]
mod tests;
