//! How good the path to a peer is: round trip, jitter and loss. Pure: samples go in, figures come out.
//!
//! From probes inside the tunnel where these are fresh, and from gossip's own round trips otherwise. Whoever chooses
//! between paths asks [`Control::quality_of`]. Bounded: a peer has a fixed number of samples.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use weft_wire::mesh::MemberState;
use weft_wire::types::{NodeName, SiteName};

use super::Control;

/// How many round trips are kept.
const SAMPLES: usize = 32;
/// How many outcomes are kept, one bit each.
const OUTCOMES: u32 = 64;
/// The least number that loss is reckoned from: one of two says little.
const LEAST_OUTCOMES: u32 = 20;
/// So many lost probes in a row are no loss but a path, or a peer, that was away.
const AWAY: u32 = 3;
/// Probes that are older say nothing of now.
const FRESH: Duration = Duration::from_secs(60);

/// What was measured of the path to a peer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quality {
    /// The median round trip.
    pub rtt: Duration,
    /// How much one round trip differs from the next, smoothed (RFC 3550 s6.4.1); nothing where only gossip measured.
    pub jitter: Option<Duration>,
    /// The share of probes without an answer, from 0 to 1.
    pub loss: f32,
    /// Whether it is of packets inside the tunnel, and not of gossip beside it.
    pub in_tunnel: bool,
}

/// What was measured of the paths to a site.
#[derive(Debug, Clone, PartialEq)]
pub struct SiteQuality {
    /// The site.
    pub site: SiteName,
    /// How many of its nodes it is of.
    pub nodes: usize,
    /// The median of their round trips.
    pub rtt: Duration,
    /// The mean of their loss.
    pub loss: f32,
    /// The least packet size that was measured, in bytes; nothing where none was.
    pub path_mtu: Option<u32>,
}

/// The figures of one path.
#[derive(Debug, Clone, Default)]
pub struct Estimate {
    round_trips: VecDeque<Duration>,
    jitter: Duration,
    /// The latest outcome is the lowest bit; a lost probe is a 1.
    outcomes: u64,
    counted: u32,
    at: Option<Instant>,
}

impl Estimate {
    /// Takes a round trip.
    pub fn answered(&mut self, rtt: Duration, now: Instant) {
        if let Some(last) = self.round_trips.back() {
            let change = last.abs_diff(rtt);
            // J += (|D| - J) / 16, as RFC 3550 s6.4.1, with round trips in the place of transit times.
            self.jitter = (self.jitter * 15 + change) / 16;
        }
        if self.round_trips.len() == SAMPLES {
            self.round_trips.pop_front();
        }
        self.round_trips.push_back(rtt);
        self.at = Some(now);
    }

    /// Takes whether a probe that counts for the loss was lost. What was lost while nobody answered says nothing of a path that
    /// answers again.
    pub fn counted(&mut self, lost: bool) {
        let away = (1 << AWAY) - 1;
        if !lost && self.counted >= AWAY && self.outcomes & away == away {
            (self.outcomes, self.counted) = (0, 0);
        }
        self.outcomes = self.outcomes << 1 | u64::from(lost);
        self.counted = (self.counted + 1).min(OUTCOMES);
    }

    /// Whether anything was ever answered.
    pub fn heard(&self) -> bool {
        self.at.is_some()
    }

    /// The median round trip.
    pub fn rtt(&self) -> Option<Duration> {
        median(self.round_trips.iter().copied().collect())
    }

    /// The figures, where they are fresh.
    pub fn quality(&self, now: Instant) -> Option<Quality> {
        let fresh = self.at.is_some_and(|at| now.saturating_duration_since(at) < FRESH);
        let kept = if self.counted == OUTCOMES { u64::MAX } else { (1 << self.counted) - 1 };
        let lost = (self.outcomes & kept).count_ones() as f32;
        let jitter = (self.round_trips.len() > 1).then_some(self.jitter);
        let loss = lost / self.counted.max(LEAST_OUTCOMES) as f32;
        self.rtt().filter(|_| fresh).map(|rtt| Quality { rtt, jitter, loss, in_tunnel: true })
    }
}

fn median(mut values: Vec<Duration>) -> Option<Duration> {
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}

impl Control {
    /// Returns how good the path to a peer is, where anything was measured.
    pub fn quality_of(&self, peer: &NodeName, now: Instant) -> Option<Quality> {
        let member = self.mesh.member(peer)?;
        let gossip = |rtt| Quality { rtt, jitter: None, loss: member.loss, in_tunnel: false };
        self.path_probes.quality(peer, now).or_else(|| member.rtt.map(gossip))
    }

    /// Returns how good the paths to the nodes of each site are, where anything was measured.
    pub fn quality_of_sites(&self, now: Instant) -> Vec<SiteQuality> {
        let mut sites: BTreeMap<&SiteName, (Vec<Quality>, Option<u32>)> = BTreeMap::new();
        for member in self.mesh.members().filter(|member| member.state == MemberState::Alive) {
            let Some(quality) = self.quality_of(member.node, now) else { continue };
            let (qualities, least) = sites.entry(member.site).or_default();
            qualities.push(quality);
            *least = [*least, self.path_probes.measured(member.node)].into_iter().flatten().min();
        }
        let told = sites.into_iter().filter_map(|(site, (qualities, path_mtu))| {
            let loss = qualities.iter().map(|quality| quality.loss).sum::<f32>() / qualities.len() as f32;
            let rtt = median(qualities.iter().map(|quality| quality.rtt).collect())?;
            Some(SiteQuality { site: site.clone(), nodes: qualities.len(), rtt, loss, path_mtu })
        });
        told.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_path_that_was_never_answered_has_no_quality() {
        let mut estimate = Estimate::default();
        estimate.counted(true);
        assert_eq!(estimate.quality(Instant::now()), None);
    }

    #[test]
    fn the_median_ignores_a_single_slow_answer_and_old_figures_are_not_told() {
        let (mut estimate, now) = (Estimate::default(), Instant::now());
        [10, 11, 900, 10, 12].into_iter().for_each(|rtt| estimate.answered(ms(rtt), now));
        let quality = estimate.quality(now).unwrap();
        assert_eq!(quality.rtt, ms(11));
        assert!(quality.jitter.unwrap() > ms(50) && quality.in_tunnel);
        assert_eq!(estimate.quality(now + FRESH), None);
    }

    #[test]
    fn jitter_of_a_steady_path_fades_to_nothing() {
        let (mut estimate, now) = (Estimate::default(), Instant::now());
        [10, 50].into_iter().chain([50; 200]).for_each(|rtt| estimate.answered(ms(rtt), now));
        assert!(estimate.quality(now).unwrap().jitter.unwrap() < ms(1));
    }

    #[test]
    fn a_path_that_was_away_and_answers_again_has_no_loss() {
        let (mut estimate, now) = (Estimate::default(), Instant::now());
        estimate.answered(ms(1), now);
        (0..60).for_each(|_| estimate.counted(false));
        (0..30).for_each(|_| estimate.counted(true));
        assert!(estimate.quality(now).unwrap().loss > 0.4);
        estimate.counted(false);
        assert_eq!(estimate.quality(now).unwrap().loss, 0.0);
        [true, true, false].into_iter().for_each(|lost| estimate.counted(lost));
        assert_eq!(estimate.quality(now).unwrap().loss, 0.1, "two in a row are loss");
    }

    #[test]
    fn loss_is_of_the_last_64_probes() {
        let (mut estimate, now) = (Estimate::default(), Instant::now());
        estimate.answered(ms(1), now);
        (0..20).for_each(|probe| estimate.counted(probe % 2 == 0));
        assert_eq!(estimate.quality(now).unwrap().loss, 0.5);
        (0..64).for_each(|_| estimate.counted(false));
        assert_eq!(estimate.quality(now).unwrap().loss, 0.0);
        (0..64).for_each(|_| estimate.counted(true));
        assert_eq!(estimate.quality(now).unwrap().loss, 1.0);
    }
}
