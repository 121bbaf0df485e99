//! Where a peer's packets go: the path in use, and the others that there are. Pure.
//!
//! Without other paths it is what WireGuard does: packets go where the last authentic one came from. With them, a path through a
//! relay does not take the place of a direct one that is heard; a path that stops answering is given up for one that answers; and
//! a better one is tried beside the one in use until packets come by it. Invariant: packets go to one place at any time.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// A path that brought a packet this recently works.
const FRESH: Duration = Duration::from_millis(1500);
/// Where data was sent and nothing came back for so long, all paths are asked. TCP repeats itself after 0.2, 0.6 and 1.4 s: the
/// third time there is another path.
const SILENT: Duration = Duration::from_millis(800);
/// A path that was asked and says nothing for so long is passed over.
const UNANSWERED: Duration = Duration::from_millis(600);
/// For so long.
const PASSED_OVER: Duration = Duration::from_secs(10);
/// Who gets data and has nothing to say says so after this long, so that the sender need not ask. WireGuard's ten seconds
/// (whitepaper s6.5) are too long for that.
const SAY: Duration = Duration::from_millis(400);
/// Between two packets to paths that are tried, where there is a session, and between two requests where there is none: the last
/// two of these may still be answered.
const TRY: Duration = Duration::from_millis(200);
const REQUEST: Duration = Duration::from_millis(500);
/// How long paths are tried after someone asked for it.
const TRIAL: Duration = Duration::from_secs(3);
/// A translator forgets a mapping after two minutes at the earliest, says RFC 4787 s4.3; many do after thirty seconds.
const KEEP: Duration = Duration::from_secs(20);
/// A pair that exchanged no data for so long needs no mapping.
const USED: Duration = Duration::from_secs(180);
/// The paths of a peer.
const MOST: usize = 12;

/// How good a path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rank {
    /// Without help.
    Direct,
    /// Through a relay.
    Relay,
}

/// A place where the peer may be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Candidate {
    /// How good the path is.
    pub rank: Rank,
    /// Where.
    pub at: SocketAddr,
}

/// How long mappings on the way are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Keep {
    /// There are none, or the peer keeps them.
    #[default]
    No,
    /// While the pair exchanges data.
    WhileUsed,
    /// As long as the peer is one.
    Always,
}

/// What came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard {
    /// A handshake: the peer asks, or answers.
    Handshake,
    /// Data.
    Data,
    /// An empty packet: the peer wants this path to be known to work.
    Empty,
}

/// What to send besides what there is to send.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Due {
    /// A request for a session, the same to all of these.
    pub(super) ask: Vec<SocketAddr>,
    /// An empty packet to each of these, or a request where there is no session.
    pub(super) try_at: Vec<SocketAddr>,
}

/// The paths to a peer.
#[derive(Debug)]
pub(super) struct Endpoints {
    announced: SocketAddr,
    current: SocketAddr,
    heard: Option<Instant>,
    candidates: Vec<Candidate>,
    /// Relays that are candidates no more: packets may still come by them, and they are no direct paths.
    former: Vec<SocketAddr>,
    keep: Keep,
    /// Since when data was sent and nothing came.
    unanswered: Option<Instant>,
    /// Since when data came and nothing was sent.
    owed: Option<Instant>,
    asked: Option<Instant>,
    passed_over: Option<(SocketAddr, Instant)>,
    trial: Option<Instant>,
    tried: Option<Instant>,
    sent: Option<Instant>,
    used: Option<Instant>,
    /// Relays that have yet to hear of this pair, and when they are told next.
    fresh: Vec<SocketAddr>,
    fresh_at: Option<Instant>,
    /// When the paths to fall back to were used last.
    kept: Option<Instant>,
}

impl Endpoints {
    pub(super) fn new(announced: SocketAddr) -> Self {
        Self {
            announced,
            current: announced,
            heard: None,
            candidates: Vec::new(),
            former: Vec::new(),
            keep: Keep::No,
            unanswered: None,
            owed: None,
            asked: None,
            passed_over: None,
            trial: None,
            tried: None,
            sent: None,
            used: None,
            fresh: Vec::new(),
            fresh_at: None,
            kept: None,
        }
    }

    /// Returns the paths to the same peer for a session under other keys: what leads to it does not depend on them. All are tried at
    /// once, and a record that says nothing new sends nobody elsewhere.
    pub(super) fn for_other_keys(&self, announced: SocketAddr, now: Instant) -> Self {
        let mut other = Self::new(announced);
        if announced == self.announced {
            other.current = self.current;
        }
        other.set_candidates(&self.candidates, self.keep, !self.candidates.is_empty(), now);
        other
    }

    pub(super) fn current(&self) -> SocketAddr {
        self.current
    }

    /// Takes what the record says: only a change of it outweighs what packets taught, and not of a path that works or of a relay, since
    /// a peer behind a translator that maps by destination has another address for each peer.
    pub(super) fn follow(&mut self, announced: SocketAddr, now: Instant) {
        if self.announced == announced {
            return;
        }
        self.announced = announced;
        let works = self.is_fresh(now) || self.rank(self.current) == Rank::Relay;
        if !(self.is_managed() && works) {
            self.move_to(announced);
        }
    }

    fn is_fresh(&self, now: Instant) -> bool {
        self.heard.is_some_and(|heard| now.duration_since(heard) < FRESH)
    }

    /// Goes on where another daemon heard the peer.
    pub(super) fn move_to(&mut self, at: SocketAddr) {
        if self.current != at {
            self.current = at;
            self.heard = None;
        }
    }

    /// Takes where else the peer may be; with `trial` these paths are tried for some seconds.
    pub(super) fn set_candidates(&mut self, candidates: &[Candidate], keep: Keep, trial: bool, now: Instant) {
        let before = std::mem::take(&mut self.candidates);
        self.candidates = candidates.iter().take(MOST).copied().collect();
        self.keep = keep;
        self.former.extend(before.iter().filter(|other| other.rank == Rank::Relay).map(|relay| relay.at));
        self.former.retain(|at| !self.candidates.iter().any(|candidate| candidate.at == *at));
        let excess = self.former.len().saturating_sub(MOST);
        self.former.drain(..excess);
        // A relay knows a pair by its handshakes. One to fall back to is told while another is in use, and else when it is needed.
        if self.rank(self.current) == Rank::Relay {
            let relays =
                self.candidates.iter().filter(|other| other.rank == Rank::Relay && !before.contains(other));
            self.fresh = relays.map(|relay| relay.at).filter(|at| *at != self.current).collect();
            self.fresh_at = Some(now);
        }
        if trial {
            self.trial = Some(now + TRIAL);
            self.tried = None;
        }
    }

    fn rank(&self, at: SocketAddr) -> Rank {
        match self.candidate(at) {
            Some(candidate) => candidate.rank,
            None if self.former.contains(&at) => Rank::Relay,
            // Where a translator put the peer nobody announced, and it is as direct as any.
            None => Rank::Direct,
        }
    }

    fn is_known(&self, at: SocketAddr) -> bool {
        self.candidate(at).is_some() || self.former.contains(&at)
    }

    fn candidate(&self, at: SocketAddr) -> Option<&Candidate> {
        self.candidates.iter().find(|candidate| candidate.at == at)
    }

    /// Takes that something authentic came from there.
    pub(super) fn heard(&mut self, from: SocketAddr, what: Heard, now: Instant) {
        self.unanswered = None;
        self.asked = None;
        self.fresh.retain(|at| *at != from);
        if what == Heard::Data {
            self.used = Some(now);
            self.owed.get_or_insert(now);
        }
        if self.passed_over.is_some_and(|(at, _)| at == from) && what != Heard::Handshake {
            // Its packets come by it, and this node's do not arrive: the handshake that asks elsewhere decides.
            return;
        }
        if from == self.current {
            self.heard = Some(now);
            return;
        }
        let is_fresh = self.is_fresh(now);
        let (theirs, ours) = (self.rank(from), self.rank(self.current));
        let keeps = match what {
            // The peer asks there because it is not answered elsewhere.
            Heard::Handshake => false,
            Heard::Data | Heard::Empty => {
                is_fresh && (theirs > ours || (theirs == ours && self.is_known(from)))
            }
        };
        if !keeps {
            self.current = from;
            self.heard = Some(now);
        }
    }

    /// Takes that something was sent by the path in use.
    pub(super) fn sent(&mut self, is_data: bool, now: Instant) {
        self.sent = Some(now);
        self.owed = None;
        if is_data {
            self.used = Some(now);
            self.unanswered.get_or_insert(now);
        }
    }

    /// Whether other paths are known, so that what comes and goes is worth noting.
    pub(super) fn is_managed(&self) -> bool {
        !self.candidates.is_empty() || self.keep != Keep::No
    }

    /// Whether an answer is waited for, so that time matters.
    pub(super) fn is_urgent(&self) -> bool {
        (self.unanswered.is_some() && !self.candidates.is_empty()) || self.trial.is_some()
    }

    /// Returns what is due. `ready` says whether there is a session.
    pub(super) fn due(&mut self, ready: bool, now: Instant) -> Due {
        let mut due = Due::default();
        self.trial = self.trial.filter(|until| *until > now);
        self.passed_over = self.passed_over.filter(|(_, since)| now.duration_since(*since) < PASSED_OVER);
        if ready && !self.candidates.is_empty() {
            self.ask_if_silent(&mut due, now);
            self.introduce(&mut due, now);
        }
        if ready
            && !self.candidates.is_empty()
            && self.owed.is_some_and(|since| now.duration_since(since) >= SAY)
        {
            self.sent(false, now);
            due.try_at.push(self.current);
        }
        self.try_others(&mut due, ready, now);
        let lapses = self.sent.is_none_or(|sent| now.duration_since(sent) >= KEEP);
        let used = self.used.is_some_and(|used| now.duration_since(used) < USED);
        if ready && lapses && (self.keep == Keep::Always || (self.keep == Keep::WhileUsed && used)) {
            self.sent = Some(now);
            due.try_at.push(self.current);
        }
        let unkept = self.kept.is_none_or(|kept| now.duration_since(kept) >= KEEP);
        if ready && used && unkept && self.rank(self.current) == Rank::Relay {
            self.kept = Some(now);
            let relays = self.candidates.iter().filter(|other| other.rank == Rank::Relay);
            due.try_at.extend(relays.map(|relay| relay.at).filter(|relay| *relay != self.current));
        }
        due
    }

    /// Tries other paths for as long as somebody wants it.
    fn try_others(&mut self, due: &mut Due, ready: bool, now: Instant) {
        let is_fresh = self.is_fresh(now);
        let pause = if ready && is_fresh { TRY } else { REQUEST };
        let turn = self.tried.is_none_or(|tried| now.duration_since(tried) >= pause);
        if self.trial.is_none() || !turn {
            return;
        }
        self.tried = Some(now);
        if ready && !is_fresh {
            // The peer may be asking because it is not heard here: who only answers would never know. A relay knows a pair by
            // handshakes of both.
            if due.ask.is_empty() {
                due.ask = self.all();
            }
            return;
        }
        let ours = self.rank(self.current);
        let better =
            |candidate: &&Candidate| candidate.at != self.current && (!ready || candidate.rank < ours);
        due.try_at.extend(self.candidates.iter().filter(better).map(|candidate| candidate.at));
        if !ready {
            due.try_at.push(self.current);
        }
    }

    /// Has the relays to fall back to hear of the pair, for as long as paths are tried.
    fn introduce(&mut self, due: &mut Due, now: Instant) {
        if self.trial.is_none() {
            self.fresh.clear();
        }
        if due.ask.is_empty() && !self.fresh.is_empty() && self.fresh_at.is_none_or(|at| at <= now) {
            self.fresh_at = Some(now + REQUEST);
            due.ask.clone_from(&self.fresh);
        }
    }

    fn ask_if_silent(&mut self, due: &mut Due, now: Instant) {
        let Some(since) = self.unanswered.filter(|since| now.duration_since(*since) >= SILENT) else {
            return;
        };
        match self.asked {
            None => {
                self.asked = Some(now);
                due.ask = self.all();
            }
            Some(asked) if now.duration_since(asked) >= UNANSWERED => {
                // Who would answer there has not: perhaps only one direction is broken, so the peer is to be heard elsewhere. If
                // nothing is heard anywhere, all are asked again later.
                self.asked = Some(now);
                if now.duration_since(since) < SILENT + UNANSWERED * 3 && self.candidates.len() > 1 {
                    self.passed_over = Some((self.current, now));
                }
                due.ask = self.all();
                let passed_over = self.passed_over;
                due.ask.retain(|at| passed_over.is_none_or(|(over, _)| over != *at));
            }
            Some(_) => {}
        }
    }

    fn all(&self) -> Vec<SocketAddr> {
        let mut all = vec![self.current];
        let others = self.candidates.iter().map(|candidate| candidate.at).chain([self.announced]);
        for other in others {
            if !all.contains(&other) {
                all.push(other);
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(port: u16) -> SocketAddr {
        ([192, 0, 2, 1], port).into()
    }

    const DIRECT: u16 = 1;
    const RELAY: u16 = 2;
    const STANDBY: u16 = 3;

    fn candidates() -> Vec<Candidate> {
        [(Rank::Direct, DIRECT), (Rank::Relay, RELAY), (Rank::Relay, STANDBY)]
            .map(|(rank, port)| Candidate { rank, at: at(port) })
            .to_vec()
    }

    fn on(port: u16, now: Instant) -> Endpoints {
        let mut endpoints = Endpoints::new(at(DIRECT));
        endpoints.set_candidates(&candidates(), Keep::No, false, now);
        endpoints.heard(at(port), Heard::Handshake, now);
        assert_eq!(endpoints.current(), at(port));
        endpoints
    }

    #[test]
    fn without_other_paths_packets_go_where_the_last_one_came_from() {
        let now = Instant::now();
        let mut endpoints = Endpoints::new(at(DIRECT));
        endpoints.heard(at(7), Heard::Data, now);
        assert_eq!(endpoints.current(), at(7));
        endpoints.follow(at(DIRECT), now);
        assert_eq!(endpoints.current(), at(7));
        endpoints.follow(at(8), now);
        assert_eq!(endpoints.current(), at(8));
        endpoints.sent(true, now);
        assert_eq!(endpoints.due(true, now + SILENT), Due::default());
    }

    #[test]
    fn another_address_in_the_record_does_not_end_a_path_that_works_and_is_asked_once_it_does_not() {
        let now = Instant::now();
        for (port, quiet, follows) in [
            (DIRECT, FRESH / 2, false),
            (DIRECT, FRESH, true),
            (RELAY, FRESH / 2, false),
            (RELAY, FRESH, false),
        ] {
            let mut endpoints = on(port, now);
            endpoints.follow(at(8), now + quiet);
            assert_eq!(endpoints.current() == at(8), follows, "{port} after {quiet:?}");
            endpoints.sent(true, now + quiet);
            let asked = endpoints.due(true, now + quiet + SILENT).ask;
            assert!(asked.contains(&at(8)), "{asked:?}");
        }
    }

    #[test]
    fn other_keys_have_the_same_paths_and_ask_at_all_of_them() {
        let now = Instant::now();
        let endpoints = on(RELAY, now);
        let mut same = endpoints.for_other_keys(at(DIRECT), now);
        assert_eq!(same.current(), at(RELAY));
        assert_eq!(same.due(false, now).try_at, [at(DIRECT), at(STANDBY), at(RELAY)]);
        let mut moved = endpoints.for_other_keys(at(8), now);
        assert_eq!(moved.current(), at(8), "keys that are spoken for elsewhere");
        assert_eq!(moved.due(false, now).try_at, [at(DIRECT), at(RELAY), at(STANDBY), at(8)]);
        let mut plain = Endpoints::new(at(DIRECT)).for_other_keys(at(DIRECT), now);
        assert!(!plain.is_managed());
        assert_eq!(plain.due(false, now), Due::default());
    }

    #[test]
    fn a_relay_does_not_take_the_place_of_a_direct_path_that_is_heard() {
        let now = Instant::now();
        let mut endpoints = on(DIRECT, now);
        endpoints.heard(at(RELAY), Heard::Data, now + FRESH / 2);
        assert_eq!(endpoints.current(), at(DIRECT));
        endpoints.heard(at(RELAY), Heard::Data, now + FRESH);
        assert_eq!(endpoints.current(), at(RELAY));
    }

    #[test]
    fn a_direct_path_takes_the_place_of_a_relay_once_a_packet_came_by_it() {
        let now = Instant::now();
        let mut endpoints = on(RELAY, now);
        endpoints.set_candidates(&candidates(), Keep::No, true, now);
        let due = endpoints.due(true, now);
        assert_eq!(due, Due { ask: Vec::new(), try_at: vec![at(DIRECT)] });
        assert_eq!(endpoints.current(), at(RELAY), "the relay is used until then");
        endpoints.heard(at(DIRECT), Heard::Data, now);
        assert_eq!(endpoints.current(), at(DIRECT));
        assert_eq!(endpoints.due(true, now + TRY), Due::default());
    }

    #[test]
    fn a_relay_that_was_given_up_and_carries_again_is_still_no_direct_path() {
        let now = Instant::now();
        let mut endpoints = on(STANDBY, now);
        let others = [candidates()[0], candidates()[2]];
        endpoints.set_candidates(&others, Keep::No, false, now);
        endpoints.heard(at(RELAY), Heard::Data, now);
        assert_eq!(endpoints.current(), at(STANDBY), "it is no better than the relay in use");
        endpoints.heard(at(RELAY), Heard::Handshake, now);
        assert_eq!(endpoints.current(), at(RELAY), "the peer asks there");
        endpoints.set_candidates(&others, Keep::No, true, now);
        assert!(endpoints.due(true, now).try_at.contains(&at(DIRECT)), "a direct path is better");
        // What is remembered is bounded, and what is granted again is a candidate as any.
        for port in 100..200 {
            let granted = [Candidate { rank: Rank::Relay, at: at(port) }];
            endpoints.set_candidates(&granted, Keep::No, false, now);
        }
        assert_eq!(endpoints.former.len(), MOST);
        endpoints.set_candidates(&[Candidate { rank: Rank::Relay, at: at(150) }], Keep::No, false, now);
        assert!(!endpoints.former.contains(&at(150)));
    }

    #[test]
    fn a_path_that_stops_answering_is_left_before_tcp_repeats_itself_a_third_time() {
        let now = Instant::now();
        let mut endpoints = on(DIRECT, now);
        endpoints.sent(true, now);
        assert_eq!(endpoints.due(true, now + SILENT / 2), Due::default());
        let due = endpoints.due(true, now + SILENT);
        assert_eq!(due.ask, [at(DIRECT), at(RELAY), at(STANDBY)]);
        endpoints.heard(at(STANDBY), Heard::Handshake, now + SILENT);
        assert_eq!(endpoints.current(), at(STANDBY));
        assert_eq!(endpoints.due(true, now + SILENT).ask, []);
    }

    #[test]
    fn a_path_that_carries_one_direction_only_is_passed_over() {
        let now = Instant::now();
        let mut endpoints = on(DIRECT, now);
        endpoints.sent(true, now);
        assert_eq!(endpoints.due(true, now + SILENT).ask.len(), 3);
        let due = endpoints.due(true, now + SILENT + UNANSWERED);
        assert_eq!(due.ask, [at(RELAY), at(STANDBY)]);
        // The peer hears the question through the relay, and goes there though it hears the direct path too.
        let mut peer = on(DIRECT, now);
        peer.heard(at(RELAY), Heard::Handshake, now);
        assert_eq!(peer.current(), at(RELAY));
    }

    #[test]
    fn who_gets_data_and_sends_none_says_that_it_came() {
        let now = Instant::now();
        let mut endpoints = on(DIRECT, now);
        endpoints.heard(at(DIRECT), Heard::Data, now);
        assert_eq!(endpoints.due(true, now + SAY / 2), Due::default());
        assert_eq!(endpoints.due(true, now + SAY).try_at, [at(DIRECT)]);
        // Nobody answers that, or the two would never end.
        endpoints.heard(at(DIRECT), Heard::Empty, now + SAY);
        assert_eq!(endpoints.due(true, now + SAY * 3), Due::default());
    }

    #[test]
    fn who_only_answers_asks_as_well_once_the_peer_needs_another_path() {
        let now = Instant::now();
        let mut endpoints = on(DIRECT, now);
        endpoints.sent(true, now);
        endpoints.heard(at(DIRECT), Heard::Data, now);
        endpoints.sent(false, now);
        let later = now + FRESH;
        assert_eq!(endpoints.due(true, later), Due::default(), "nothing that it said went unanswered");
        endpoints.set_candidates(&candidates(), Keep::No, true, later);
        assert_eq!(endpoints.due(true, later).ask, [at(DIRECT), at(RELAY), at(STANDBY)]);
        assert_eq!(endpoints.due(true, later + TRY), Due::default());
        assert_eq!(endpoints.due(true, later + REQUEST).ask.len(), 3);
    }

    #[test]
    fn without_a_session_every_path_is_asked_at_once() {
        let now = Instant::now();
        let mut endpoints = Endpoints::new(at(9));
        endpoints.set_candidates(&candidates(), Keep::No, true, now);
        let due = endpoints.due(false, now);
        assert_eq!(due.try_at, [at(DIRECT), at(RELAY), at(STANDBY), at(9)]);
        assert_eq!(endpoints.due(false, now + TRY), Due::default());
        assert_eq!(endpoints.due(false, now + REQUEST).try_at.len(), 4);
        assert_eq!(endpoints.due(false, now + TRIAL), Due::default());
    }

    #[test]
    fn a_relay_to_fall_back_to_hears_of_the_pair_and_is_kept() {
        let now = Instant::now();
        let mut endpoints = Endpoints::new(at(RELAY));
        endpoints.set_candidates(&candidates()[..2], Keep::WhileUsed, true, now);
        endpoints.heard(at(RELAY), Heard::Handshake, now);
        endpoints.sent(true, now);
        endpoints.heard(at(RELAY), Heard::Empty, now);
        endpoints.set_candidates(&candidates(), Keep::WhileUsed, true, now);
        assert_eq!(endpoints.due(true, now).ask, [at(STANDBY)]);
        assert_eq!(endpoints.due(true, now + TRY).ask, []);
        assert_eq!(endpoints.due(true, now + REQUEST).ask, [at(STANDBY)]);
        endpoints.heard(at(STANDBY), Heard::Handshake, now + REQUEST);
        assert_eq!(endpoints.due(true, now + REQUEST * 2).ask, []);
        endpoints.sent(true, now + KEEP);
        endpoints.heard(at(STANDBY), Heard::Empty, now + KEEP);
        assert_eq!(
            endpoints.due(true, now + KEEP).try_at,
            [at(RELAY)],
            "its mappings are kept under traffic too"
        );
    }

    #[test]
    fn a_mapping_is_kept_while_the_pair_exchanges_data() {
        let now = Instant::now();
        let mut endpoints = on(DIRECT, now);
        endpoints.set_candidates(&candidates()[..1], Keep::WhileUsed, false, now);
        endpoints.sent(true, now);
        endpoints.heard(at(DIRECT), Heard::Empty, now);
        assert_eq!(endpoints.due(true, now + KEEP).try_at, [at(DIRECT)]);
        assert_eq!(endpoints.due(true, now + KEEP), Due::default());
        assert_eq!(endpoints.due(true, now + USED), Due::default());
    }
}
