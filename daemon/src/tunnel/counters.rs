//! What the data path counts: packets and bytes, and a reason for every packet that it drops.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! reasons {
    ($($(#[doc = $doc:expr])* $name:ident = $word:literal,)*) => {
        /// Why a packet was dropped.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Reason { $($(#[doc = $doc])* $name,)* }

        impl Reason {
            /// Every reason, in the order of the counters.
            pub const ALL: &[Reason] = &[$(Reason::$name,)*];
        }

        impl fmt::Display for Reason {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $(Self::$name => $word,)* })
            }
        }
    };
}

reasons! {
    /// From the TUN: no IP packet, or offsets that do not fit it.
    NotIp = "not_ip",
    /// From the TUN: its destination belongs to no peer.
    NoPeer = "no_peer",
    /// From the TUN: no session yet, and enough wait for one already.
    NoSession = "no_session",
    /// From either side: the daemon before this one did not take it in time while it handed over.
    HandOver = "hand_over",
    /// To the underlay: the kernel did not take it.
    NotSent = "not_sent",
    /// From the underlay: no message of WireGuard.
    Malformed = "malformed",
    /// From the underlay: names a session that this node does not have.
    UnknownSession = "unknown_session",
    /// From the underlay: a handshake of a key that is no peer's.
    UnknownKey = "unknown_key",
    /// From the underlay: too many handshakes from one source.
    Flood = "flood",
    /// From the underlay: the first MAC of a handshake is wrong.
    BadMac = "bad_mac",
    /// From the underlay: not sealed by the peer, or an old session's.
    Forged = "forged",
    /// From the underlay: came before, or too late to tell.
    Replayed = "replayed",
    /// From the underlay: the peer may not use the source address within.
    WrongSource = "wrong_source",
    /// To the TUN: the kernel did not take it.
    NotWritten = "not_written",
}

/// Counters that any thread may add to.
#[derive(Debug, Default)]
pub(super) struct Counters {
    dropped: [AtomicU64; Reason::ALL.len()],
}

impl Counters {
    pub(super) fn drop(&self, reason: Reason) {
        self.drop_many(reason, 1);
    }

    pub(super) fn drop_many(&self, reason: Reason, count: usize) {
        self.dropped[reason as usize].fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Returns how many were dropped for each reason.
    pub(super) fn drops(&self) -> Vec<(Reason, u64)> {
        let count = |reason: &Reason| self.dropped[*reason as usize].load(Ordering::Relaxed);
        Reason::ALL.iter().map(|reason| (*reason, count(reason))).collect()
    }
}

/// Packets and bytes of one peer, within the tunnel.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    pub(super) sent: AtomicU64,
    pub(super) sent_bytes: AtomicU64,
    pub(super) received: AtomicU64,
    pub(super) received_bytes: AtomicU64,
}
