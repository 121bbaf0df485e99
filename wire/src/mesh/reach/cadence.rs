//! How often a mapping must be used to stay: found by trying, as nothing on the way says it.
//!
//! RFC 4787 REQ-5 asks of a NAT to keep a UDP mapping for two minutes, and many keep it for thirty seconds. It begins below
//! those, and a trial lets the mapping rest for longer; what held is the next pause, what did not is never tried again.

use std::time::Duration;

/// What every mapping is assumed to live.
pub(in crate::mesh) const START: Duration = Duration::from_secs(20);
/// The longest pause that is tried.
pub(in crate::mesh) const LONGEST: Duration = Duration::from_secs(120);
/// The shortest, for mappings that live less than is assumed.
const SHORTEST: Duration = Duration::from_secs(5);
/// The search ends where so little is left to gain.
const STEP: Duration = Duration::from_secs(6);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::mesh) struct Cadence {
    /// A mapping lived so long.
    holds: Duration,
    /// It did not live so long.
    fails: Duration,
    /// The last trial had no outcome that could be told from a lost datagram.
    doubtful: Option<Duration>,
}

impl Default for Cadence {
    fn default() -> Self {
        Self { holds: START, fails: LONGEST + STEP, doubtful: None }
    }
}

impl Cadence {
    /// The pause after which the mapping is to be used: an eighth below what it was seen to live.
    pub(in crate::mesh) fn pause(&self) -> Duration {
        if self.holds <= START { self.holds } else { START.max(self.holds - self.holds / 8) }
    }

    /// The next pause to try, while there is something to gain.
    pub(in crate::mesh) fn trial(&self) -> Option<Duration> {
        let gain = self.fails.saturating_sub(self.holds);
        let middle = self.holds + gain / 2;
        (gain > STEP).then_some(self.doubtful.unwrap_or(middle).min(LONGEST))
    }

    /// The mapping rested so long and was still there.
    pub(in crate::mesh) fn held(&mut self, pause: Duration) {
        self.holds = self.holds.max(pause);
        self.fails = self.fails.max(self.holds);
        self.doubtful = None;
    }

    /// A trial had no answer. The first time it may be a lost datagram.
    pub(in crate::mesh) fn unanswered(&mut self, pause: Duration) {
        if self.doubtful.replace(pause) == Some(pause) {
            self.doubtful = None;
            self.fails = pause;
        }
    }

    /// The mapping was gone when it had not been used for so long.
    pub(in crate::mesh) fn lost(&mut self, pause: Duration) {
        self.fails = pause.min(self.fails);
        if self.holds >= self.fails {
            self.doubtful = None;
            self.holds = (self.fails / 2).clamp(SHORTEST, START);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Searches against a mapping that lives so long; returns the pause and the number of trials.
    fn search(lives: Duration) -> (Duration, u32) {
        let (mut cadence, mut trials) = (Cadence::default(), 0);
        while let Some(pause) = cadence.trial() {
            trials += 1;
            if pause < lives {
                cadence.held(pause)
            } else {
                cadence.unanswered(pause)
            }
            assert!(trials < 30, "the search ends");
        }
        (cadence.pause(), trials)
    }

    #[test]
    fn the_search_ends_close_below_what_the_mapping_lives() {
        for lives in [25, 30, 45, 60, 90, 119, 121, 300] {
            let lives = Duration::from_secs(lives);
            let (pause, trials) = search(lives);
            assert!(pause < lives && pause <= LONGEST, "{lives:?}: {pause:?}");
            assert!(pause >= START, "{lives:?}: {pause:?}");
            assert!(pause + pause / 7 + STEP * 2 >= lives.min(LONGEST), "{lives:?}: {pause:?}");
            assert!(trials <= 10, "{lives:?}: {trials} trials");
        }
    }

    #[test]
    fn one_lost_datagram_does_not_end_a_trial() {
        let mut cadence = Cadence::default();
        let pause = cadence.trial().expect("there is something to gain");
        cadence.unanswered(pause);
        assert_eq!(cadence.trial(), Some(pause));
        cadence.held(pause);
        assert!(cadence.trial().is_some_and(|next| next > pause));
    }

    #[test]
    fn a_mapping_that_was_found_lost_after_a_trial_does_not_hide_its_outcome() {
        let mut cadence = Cadence::default();
        let pause = cadence.trial().expect("there is something to gain");
        for _ in 0..2 {
            cadence.unanswered(pause);
            cadence.lost(pause + Duration::from_secs(4));
        }
        assert!(cadence.trial().is_some_and(|next| next < pause));
    }

    #[test]
    fn a_lost_mapping_shortens_the_pause_at_once_and_never_below_the_least() {
        let mut cadence = Cadence::default();
        cadence.held(Duration::from_secs(100));
        cadence.lost(Duration::from_secs(90));
        assert_eq!(cadence.pause(), START);
        for _ in 0..10 {
            cadence.lost(cadence.pause());
        }
        assert_eq!(cadence.pause(), SHORTEST);
        assert_eq!(cadence.trial(), None);
    }
}
