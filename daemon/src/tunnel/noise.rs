//! What the tunnels ask of an implementation of WireGuard's sessions: seal, open, shake hands, look at the clock.
//!
//! Who is asked when, what waits, where a peer is and which keys are in force is decided in `peer.rs`, which knows no more
//! of an implementation than this.

mod boringtun;

use std::net::IpAddr;
use std::time::Duration;

use weft_wire::preshared::PresharedKey;
use weft_wire::types::TunnelKey;

pub(super) use self::boringtun::{Boringtun, Identity};
use super::TunnelSecret;
use super::counters::Reason;

/// What WireGuard adds to a packet: header, counter and tag (whitepaper s5.4.6).
pub(super) const OVERHEAD: usize = 32;
/// The least room for anything that is to be sent: that of a handshake initiation.
pub(super) const LEAST_ROOM: usize = 148;

/// What a room holds that was to be filled with a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sealed {
    /// The sealed packet, of so many bytes.
    Data(usize),
    /// There is no session, so the packet is kept; to be sent is a request for one of so many bytes, or nothing (0).
    Kept(usize),
}

/// What came of a message that is no data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shaken {
    /// There is a session that this side asked for: so many bytes tell the peer.
    Confirmed(usize),
    /// The peer asked: so many bytes answer it, and its first packet makes the session one to send under.
    Answered(usize),
    /// A cookie, which does not say where the peer is.
    Cookie,
}

/// What is due by the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// So many bytes are to be sent; 0 for none.
    Send(usize),
    /// The sessions are too old to be of use, and asking for others was given up.
    Expired,
}

/// Sessions with one peer. Every `room` has [`LEAST_ROOM`] bytes at least.
pub(super) trait Noise {
    /// Knows the peer, and has no session. The lower 24 bits of `index` become the upper ones of all receiver indices.
    fn new(own: &TunnelSecret, peer: TunnelKey, preshared: Option<&PresharedKey>, index: u32) -> Self;

    /// Seals a packet of any content into a room that is [`OVERHEAD`] longer; without a session it is kept, up to some
    /// number. An empty packet is one too.
    fn seal(&mut self, packet: &[u8], room: &mut [u8]) -> Sealed;

    /// Seals the next of the packets that were kept; nothing if there is none.
    fn seal_kept(&mut self, room: &mut [u8]) -> Option<Sealed>;

    /// Opens a datagram of data; returns the length of the IP packet in the room and the source that it names, nothing for
    /// an empty one. The padding is taken off.
    ///
    /// # Errors
    /// Why it is not taken. Nothing is changed.
    fn open(
        &mut self,
        from: IpAddr,
        datagram: &[u8],
        room: &mut [u8],
    ) -> Result<Option<(usize, IpAddr)>, Reason>;

    /// Takes a handshake, an answer to one, or a cookie, and writes what is to be answered.
    ///
    /// # Errors
    /// Why it is not taken. Nothing is changed.
    fn shake(&mut self, from: IpAddr, datagram: &[u8], room: &mut [u8]) -> Result<Shaken, Reason>;

    /// Writes a request for a session, whether one is under way or not; returns its length, 0 for none.
    fn initiate(&mut self, room: &mut [u8]) -> usize;

    /// Does what is due by the clock.
    fn tick(&mut self, room: &mut [u8]) -> Due;

    /// Since the last handshake; nothing without a session.
    fn age(&self) -> Option<Duration>;
}

/// What a message that is no data says of itself, its first MAC being that of the identity (whitepaper s5.4.4).
pub(super) enum Examined {
    /// It asks for a session, and is of whoever has this key.
    From(TunnelKey),
    /// It is about what was given this receiver index.
    About(u32),
    /// The node is under load: to be answered with a cookie of so many bytes.
    Cookie(usize),
    /// The first MAC is not this identity's.
    Elsewhere(Reason),
    /// Nobody's.
    Void(Reason),
}
