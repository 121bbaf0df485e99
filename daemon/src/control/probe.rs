//! Whether this kernel breaks checksums that it leaves to the card inside the tunnel: decided by asking a peer
//! through the tunnel, never by the kernel's version.
//!
//! A request goes through the tunnel from the node's gateway address to a peer's, as pods' packets do; the answer
//! comes over the underlay, so that the peer's kernel has no part in it. Answered: the offload stays on. Not answered: the offload goes off and the peer is asked again; only an answer then proves that the
//! offload was to blame. Not answered either way: something else is wrong, and the offload stays on.
//!
//! Pure: the loop sends what it is told and hands in what comes. The format is that of all probes (docs/protocol.md).
//! Invariant: an answer is no longer than its request.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// The UDP port of probes, on the nodes' gateway addresses. Answers to those of checksums go to the gossip port.
pub const PORT: u16 = 7119;

const MAGIC: &[u8; 8] = b"weftprb1";
/// The header, and all of a datagram that is not padded to a size, in bytes.
pub const LENGTH: usize = 64;

/// What a datagram is. Others are ignored, so that a later daemon may have more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Whether checksums survive the tunnel.
    Checksum = b'?' as isize,
    /// Its answer, over the underlay.
    ChecksumAnswer = b'!' as isize,
    /// Of the size that is asked about; answered through the tunnel.
    Echo = b'e' as isize,
    /// Its answer.
    EchoAnswer = b'r' as isize,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        [Self::Checksum, Self::ChecksumAnswer, Self::Echo, Self::EchoAnswer]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}
/// How long an answer may take; several requests go out meanwhile.
const PATIENCE: Duration = Duration::from_millis(1500);
const BETWEEN: Duration = Duration::from_millis(250);
/// How long until a peer is asked again after no answer either way.
const AGAIN: Duration = Duration::from_secs(60);

/// Where the question stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Waiting { until: Instant },
    Asking { peer: IpAddr, offload: bool, next: Instant, deadline: Instant },
    Decided { broken: bool },
}

/// The question of one node.
#[derive(Debug)]
pub struct Probe {
    stage: Stage,
    asked: bool,
    token: u64,
}

impl Probe {
    /// Starts undecided; `known_broken` is what an earlier run of the daemon proved on this boot.
    pub fn new(known_broken: bool, token: u64, now: Instant) -> Self {
        let stage =
            if known_broken { Stage::Decided { broken: true } } else { Stage::Waiting { until: now } };
        Self { stage, asked: false, token }
    }

    /// Whether the tunnel devices should have the offload now.
    pub fn offload(&self) -> bool {
        !matches!(self.stage, Stage::Asking { offload: false, .. } | Stage::Decided { broken: true })
    }

    /// Whether the offload was proved to break packets.
    pub fn is_broken(&self) -> bool {
        self.stage == Stage::Decided { broken: true }
    }

    /// Says what is known, for people.
    pub fn verdict(&self) -> &'static str {
        match self.stage {
            Stage::Decided { broken: false } => "a probe through the tunnel came back",
            Stage::Decided { broken: true } => "a probe came back only without it: this kernel breaks it",
            Stage::Asking { .. } => "a probe is under way",
            Stage::Waiting { .. } if self.asked => "no answer to a probe with or without it",
            Stage::Waiting { .. } => "not probed yet",
        }
    }

    /// When to call [`Probe::poll`] next; `None` once decided.
    pub fn wake(&self) -> Option<Instant> {
        match self.stage {
            Stage::Waiting { until } => Some(until),
            Stage::Asking { next, deadline, .. } => Some(next.min(deadline)),
            Stage::Decided { .. } => None,
        }
    }

    /// Does what is due: returns a request to send, if one is. `peer` is the gateway of a peer that lives and that a
    /// tunnel leads to.
    pub fn poll(&mut self, peer: Option<IpAddr>, now: Instant) -> Option<(SocketAddr, Vec<u8>)> {
        match self.stage {
            Stage::Waiting { until } if now >= until => match peer {
                Some(peer) => self.ask(peer, true, now),
                None => self.stage = Stage::Waiting { until: now + BETWEEN * 2 },
            },
            Stage::Asking { peer, offload: true, deadline, .. } if now >= deadline => {
                self.ask(peer, false, now)
            }
            Stage::Asking { offload: false, deadline, .. } if now >= deadline => {
                self.stage = Stage::Waiting { until: now + AGAIN };
            }
            _ => {}
        }
        let Stage::Asking { peer, next, .. } = &mut self.stage else { return None };
        if *next > now {
            return None;
        }
        *next = now + BETWEEN;
        Some((SocketAddr::new(*peer, PORT), message(Kind::Checksum, self.token, LENGTH)))
    }

    fn ask(&mut self, peer: IpAddr, offload: bool, now: Instant) {
        self.asked = true;
        self.token = self.token.wrapping_add(1);
        // Switching takes a pass over the kernel: the first request waits for it.
        let next = if offload { now } else { now + BETWEEN };
        self.stage = Stage::Asking { peer, offload, next, deadline: now + PATIENCE };
    }

    /// Takes an answer, which its token proves to be one to the question that is open.
    pub fn handle_answer(&mut self, datagram: &[u8]) {
        if let Stage::Asking { offload, .. } = self.stage
            && parse(datagram) == Some((Kind::ChecksumAnswer, self.token))
        {
            self.stage = Stage::Decided { broken: !offload };
        }
    }
}

/// Returns whether a datagram that came with the gossip is an answer.
pub fn is_answer(datagram: &[u8]) -> bool {
    parse(datagram).is_some_and(|(kind, _)| kind == Kind::ChecksumAnswer)
}

/// Writes a datagram, padded with zeros to a length.
pub fn message(kind: Kind, token: u64, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length.max(LENGTH));
    bytes.extend_from_slice(MAGIC);
    bytes.push(kind as u8);
    bytes.extend_from_slice(&token.to_be_bytes());
    bytes.resize(length.max(LENGTH), 0);
    bytes
}

/// Reads a datagram; nothing for what is none.
pub fn parse(datagram: &[u8]) -> Option<(Kind, u64)> {
    let rest = datagram.strip_prefix(MAGIC).filter(|_| datagram.len() >= LENGTH)?;
    let (kind, rest) = rest.split_first()?;
    // Only an echo has a size of its own.
    let kind = Kind::of(*kind).filter(|kind| *kind == Kind::Echo || datagram.len() == LENGTH)?;
    Some((kind, u64::from_be_bytes(rest.get(..8)?.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn answer(request: &[u8]) -> Vec<u8> {
        let (kind, token) = parse(request).unwrap();
        assert_eq!(kind, Kind::Checksum);
        message(Kind::ChecksumAnswer, token, LENGTH)
    }

    /// Runs a probe against a peer that answers while `answers(offload)`; returns it when nothing more is due for long.
    fn run(answers: impl Fn(bool) -> bool) -> Probe {
        let mut now = Instant::now();
        let peer: IpAddr = "10.32.4.1".parse().unwrap();
        let mut probe = Probe::new(false, 7, now);
        for _ in 0..100 {
            if let Some((to, request)) = probe.poll(Some(peer), now) {
                assert_eq!(to, SocketAddr::new(peer, PORT));
                let answer = answer(&request);
                assert_eq!(answer.len(), request.len());
                if answers(probe.offload()) {
                    probe.handle_answer(&answer);
                }
            }
            match probe.wake() {
                Some(wake) if wake < now + AGAIN / 2 => now = wake.max(now),
                _ => break,
            }
        }
        probe
    }

    #[test]
    fn an_answer_keeps_the_offload() {
        let probe = run(|_| true);
        assert!(probe.offload() && !probe.is_broken());
        assert_eq!(probe.wake(), None);
    }

    #[test]
    fn an_answer_only_without_the_offload_turns_it_off() {
        let probe = run(|offload| !offload);
        assert!(!probe.offload() && probe.is_broken());
    }

    #[test]
    fn no_answer_either_way_blames_nothing_and_asks_again_later() {
        let probe = run(|_| false);
        assert!(probe.offload() && !probe.is_broken());
        assert!(probe.wake().is_some());
    }

    #[test]
    fn garbage_and_foreign_answers_change_nothing() {
        let now = Instant::now();
        let mut probe = Probe::new(false, 7, now);
        let peer: IpAddr = "10.32.4.1".parse().unwrap();
        let (_, request) = probe.poll(Some(peer), now).unwrap();
        for datagram in [
            &request[..63],
            b"",
            b"weftprb1!",
            &message(Kind::ChecksumAnswer, 99, LENGTH),
            &message(Kind::Echo, 8, 100),
            &request,
        ] {
            probe.handle_answer(datagram);
            assert!(!is_answer(datagram) || datagram == message(Kind::ChecksumAnswer, 99, LENGTH));
        }
        assert!(probe.wake().is_some(), "still undecided");
    }

    proptest! {
        #[test]
        fn any_datagram_is_read_or_ignored_and_what_is_written_is_read(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), token in any::<u64>(), length in 0usize..3000,
        ) {
            for datagram in [bytes.clone(), [&MAGIC[..], &bytes].concat()] {
                if let Some((kind, token)) = parse(&datagram) {
                    // An answer is never longer than what it answers.
                    prop_assert!(datagram.len() >= message(kind, token, 0).len());
                }
            }
            let written = message(Kind::Echo, token, length);
            prop_assert_eq!(written.len(), length.max(LENGTH));
            prop_assert_eq!(parse(&written), Some((Kind::Echo, token)));
            let cut = &written[..LENGTH];
            prop_assert_eq!(parse(cut), Some((Kind::Echo, token)), "of a long one only the header is read");
        }
    }
}
