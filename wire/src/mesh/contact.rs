//! What is remembered about the datagrams of one sender: freshness, address, quality.
//!
//! Invariant: within a session a sequence number is taken once, and one too old to tell is not taken.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// The last 128 sequence numbers of a session (compare RFC 4303 s3.4.3).
#[derive(Debug, Clone, Default)]
pub(super) struct Window {
    top: u64,
    /// Bit i: `top - i` was taken.
    taken: u128,
}

impl Window {
    pub(super) fn is_fresh(&self, seq: u64) -> bool {
        match self.top.checked_sub(seq) {
            None => true,
            Some(age) => age < 128 && self.taken >> age & 1 == 0,
        }
    }

    pub(super) fn top(&self) -> u64 {
        self.top
    }

    pub(super) fn take(&mut self, seq: u64) {
        if seq > self.top {
            let ahead = seq - self.top;
            self.taken = if ahead < 128 { self.taken << ahead } else { 0 };
            self.top = seq;
        }
        let age = self.top - seq;
        if age < 128 {
            self.taken |= 1 << age;
        }
    }
}

/// One sender's session, and how well it is reached.
#[derive(Debug, Clone)]
pub(super) struct Contact {
    pub(super) session: u64,
    pub(super) window: Window,
    /// Where its latest datagram that came straight was sent from, if it answers there.
    pub(super) heard: Option<Heard>,
    pub(super) last_seen: Instant,
    /// Which of the record's gossip addresses answered last.
    pub(super) preferred: Option<u8>,
    pub(super) rtt: Option<Duration>,
    pub(super) loss: f32,
    pub(super) challenge: Option<Challenge>,
    /// What it is asked before it is sent more than it sends.
    pub(super) asked: Option<Question>,
    /// It answered in this session, and from where straight, the latest first.
    proven: bool,
    places: [Option<SocketAddr>; 2],
    /// It was told less than it asked for, as it had not answered yet.
    pub(super) stinted: bool,
    /// No other session is taken without a challenge, not even a later one.
    pub(super) strict: bool,
}

/// Where a sender was heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Heard {
    pub(super) at: SocketAddr,
    pub(super) when: Instant,
}

/// A question that only the living sender of a session answers: its session is older than the one known,
/// so it is a replay, or the node lost its count of starts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Challenge {
    pub(super) session: u64,
    pub(super) token: u64,
    pub(super) at: Instant,
    /// Where it went straight.
    pub(super) to: Option<SocketAddr>,
}

/// A question that tells a sender that is there from a datagram that somebody repeats from its address, or from another's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Question {
    pub(super) token: u64,
    /// Where it goes straight.
    pub(super) to: Option<SocketAddr>,
    pub(super) drawn: Instant,
    /// When it went out last.
    pub(super) sent: Option<Instant>,
}

impl Contact {
    pub(super) fn new(session: u64, now: Instant) -> Self {
        Self {
            session,
            window: Window::default(),
            heard: None,
            last_seen: now,
            preferred: None,
            rtt: None,
            loss: 0.0,
            challenge: None,
            strict: false,
            asked: None,
            proven: false,
            places: [None; 2],
            stinted: false,
        }
    }

    /// Whether it answered in this session: at this address, or anywhere.
    pub(super) fn is_proven(&self, at: Option<SocketAddr>) -> bool {
        self.proven && at.is_none_or(|at| self.places.contains(&Some(at)))
    }

    /// Takes that it answered, and at which address straight.
    pub(super) fn prove(&mut self, at: Option<SocketAddr>) {
        self.proven = true;
        if at.is_some() && !self.places.contains(&at) {
            self.places = [at, self.places[0]];
        }
        if self.asked.is_some_and(|asked| asked.to == at) {
            self.asked = None;
        }
    }

    /// Takes a fresh sequence number, and where it came from straight, if it answers there. An address moves only with the latest of them: one that
    /// was held back on its way moves nothing.
    pub(super) fn take(&mut self, seq: u64, straight: Option<SocketAddr>, now: Instant) {
        if let Some(at) = straight.filter(|at| self.is_proven(Some(*at)))
            && (seq >= self.window.top() || self.heard.is_none_or(|heard| heard.at == at))
        {
            self.heard = Some(Heard { at, when: now });
        }
        self.window.take(seq);
        self.last_seen = now;
    }

    /// Takes a round-trip time into the smoothed one (RFC 6298 s2: one eighth).
    pub(super) fn on_rtt(&mut self, sample: Duration) {
        self.rtt = Some(self.rtt.map_or(sample, |rtt| rtt * 7 / 8 + sample / 8));
    }

    /// Takes the outcome of a direct probe into the smoothed loss.
    pub(super) fn on_probe(&mut self, answered: bool) {
        let lost = if answered { 0.0 } else { 1.0 };
        self.loss += (lost - self.loss) / 8.0;
        if self.loss < 0.001 {
            self.loss = 0.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_number_is_taken_once_in_any_order() {
        let mut window = Window::default();
        for seq in [5, 3, 4, 200, 199, 100, 1, 1000, u64::MAX - 1, u64::MAX] {
            let fresh = window.is_fresh(seq);
            assert_eq!(fresh, seq != 1, "{seq}");
            if fresh {
                window.take(seq);
            }
            assert!(!window.is_fresh(seq), "{seq}");
        }
    }
}
