//! What is made of a kernel's tunnel. It is given one path at a time, its handshakes and packets are counted together, it answers
//! where it is asked from, and it sends nothing unless it has packets: what it does not say is told by the peer's calls.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{PUNCH, Pair, SILENT, Seen};

/// It tries one direct place for so long.
const TURN: Duration = Duration::from_secs(2);
/// Calls this close to each other are of a peer that still has no path.
const PRESSING: Duration = Duration::from_secs(3);
/// After it was asked for a session it tries by itself for so long.
const ECHO: Duration = Duration::from_secs(100);
/// For so long a pair in need begins anew at each place.
const ANEW: Duration = Duration::from_secs(30);
/// Bytes that it sends at least so often are of one that tries (`REKEY_TIMEOUT`, whitepaper s6.1, and two seconds).
pub(super) const TRIES: Duration = Duration::from_secs(7);

/// What tells of a peer what its tunnel does not.
#[derive(Debug, Default)]
pub(super) struct Signs {
    /// When the peer called for a path last, and how many bytes had come from it by then.
    pressed: Option<(Instant, u64)>,
    /// It calls again, though nothing came from it since.
    pressing: bool,
    /// When the peer called last while nothing here wanted a path.
    prompted: Option<Instant>,
    /// Packets of this node want the path, and not the peer's call alone.
    pub(super) drives: bool,
}

/// Whether a pair needs a path.
#[derive(Debug, Clone, Copy)]
pub(super) struct Need {
    /// What was sent by the present path goes unanswered.
    pub(super) silent: bool,
    /// Packets wait for a session.
    pub(super) waits: bool,
    /// The peer would have answered by now if the path were good.
    pub(super) proven: bool,
}

impl Need {
    /// Of the daemon's own tunnels, which know their packets from their handshakes.
    pub(super) fn of(look: &Seen, silent: Option<Duration>) -> Self {
        Self { silent: silent.is_some_and(|silent| silent >= SILENT), waits: look.waits, proven: true }
    }

    pub(super) fn is_wanted(self) -> bool {
        self.silent || self.waits
    }
}

impl Signs {
    /// Takes that a peer calls for a path, so many bytes of which had come; returns whether the kernel is to ask for a session:
    /// what it sends opens the way for the peer's packets, and it sends nothing by itself.
    pub(super) fn note_call(&mut self, received: u64, now: Instant) -> bool {
        let last = self.pressed.replace((now, received));
        self.pressing =
            last.is_some_and(|(at, count)| now.duration_since(at) < PRESSING && count == received);
        if !self.drives {
            self.prompted = Some(now);
        }
        !self.drives
    }

    /// Takes that the peer has asked for a relay.
    pub(super) fn note_grant(&mut self, now: Instant) {
        self.pressing |= self.pressed.is_some_and(|(at, _)| now.duration_since(at) < PRESSING);
    }

    /// Takes that nothing is wanted.
    pub(super) fn rest(&mut self, ready: bool) {
        self.drives = false;
        if ready {
            self.prompted = None;
        }
    }

    /// Whether the peer calls again and again, and nothing has come from it: its path is dead, whatever session there is.
    fn is_pressed(&self, look: &Seen, now: Instant) -> bool {
        let recent = |(at, received): &(Instant, u64)| {
            now.duration_since(*at) < PRESSING && *received == look.received
        };
        look.ready && self.pressing && self.pressed.as_ref().is_some_and(recent)
    }

    /// Judges whether a pair needs a path that more bytes were sent by last at `rose`, and that has needed one since `needs`; what
    /// is to be called for by packets of this node, and what by the peer's call too.
    pub(super) fn judge(
        &self,
        look: &Seen,
        silent: Option<Duration>,
        rose: Option<Instant>,
        needs: Option<Instant>,
        now: Instant,
    ) -> (Need, Need) {
        let within = |at: Option<Instant>, span| at.is_some_and(|at| now.duration_since(at) < span);
        let own = Need::of(look, silent);
        // Handshakes that go unanswered are no data.
        let (silent, waits) = (own.silent && look.ready, own.waits && within(rose, TRIES));
        let pressed = self.is_pressed(look, now);
        // A kernel that only takes says so after ten seconds. The call has it say so now, before the path is blamed.
        let proven = pressed || needs.is_some_and(|since| now.duration_since(since) >= PUNCH);
        let own = Need { silent, waits: waits && !within(self.prompted, ECHO), proven };
        (own, Need { silent: silent || pressed, ..own })
    }
}

impl Pair {
    /// Whether the kernel is to forget what it has of the peer when it gets another place. It goes on trying for [`ECHO`] then,
    /// which looks like packets of its own: so this ends some time after these began, or with the peer's calls.
    pub(super) fn begins_anew(&self, now: Instant) -> bool {
        self.needs.is_some_and(|since| !self.kernel.drives || now.duration_since(since) < ANEW)
    }
}

/// Chooses the one path that the kernel is given. Both ends of a pair in need know the same relays, so they meet at the latest; the
/// direct places have their turn while there is none.
pub(super) fn way(
    look: &Seen,
    pair: &Pair,
    direct: &[SocketAddr],
    present: Option<SocketAddr>,
    now: Instant,
) -> Option<SocketAddr> {
    let relays = pair.grants.iter().flat_map(|grant| grant.places.iter().copied());
    let all: Vec<SocketAddr> = direct.iter().copied().chain(relays).collect();
    let present = present.filter(|present| all.contains(present));
    let is_asked =
        |since: &Instant| !(look.ready && pair.kernel.drives) || now.duration_since(*since) >= PUNCH;
    let Some(since) = pair.needs.filter(is_asked) else {
        // The kernel follows what the peer's packets taught it.
        let learned = Some(look.endpoint).filter(|at| all.contains(at));
        let known = if look.ready { learned.or(present) } else { present.or(learned) };
        return known.or(all.first().copied());
    };
    let granted = pair.grants.last().and_then(|grant| grant.places.first()).copied();
    let turn = now.duration_since(since).as_millis() / TURN.as_millis();
    let next = direct.get(usize::try_from(turn).unwrap_or(0) % direct.len().max(1)).copied();
    granted.or(next)
}
