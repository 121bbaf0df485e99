//! Sessions and handshakes by `boringtun::noise`, which keeps its transport keys to itself.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use boringtun::x25519::PublicKey;
use weft_wire::preshared::PresharedKey;
use weft_wire::types::TunnelKey;

use super::{Due, Examined, Noise, Sealed, Shaken};
use crate::tunnel::TunnelSecret;
use crate::tunnel::counters::Reason;

const DATA: u8 = 4;
/// Handshakes of all sources together in a second, before cookies are asked for (whitepaper s5.3).
const HANDSHAKES: u64 = 200;

/// Sessions with one peer; 11 KB.
pub(in crate::tunnel) struct Boringtun(Box<Tunn>);

impl Noise for Boringtun {
    fn new(own: &TunnelSecret, peer: TunnelKey, preshared: Option<&PresharedKey>, index: u32) -> Self {
        let preshared = preshared.map(|key| *key.secret());
        Self(Box::new(Tunn::new(own.0.clone(), PublicKey::from(peer.0), preshared, None, index, None)))
    }

    fn seal(&mut self, packet: &[u8], room: &mut [u8]) -> Sealed {
        sealed(&self.0.encapsulate(packet, room))
    }

    fn seal_kept(&mut self, room: &mut [u8]) -> Option<Sealed> {
        match self.0.decapsulate(None, &[], room) {
            TunnResult::Done => None,
            result => Some(sealed(&result)),
        }
    }

    fn open(
        &mut self,
        from: IpAddr,
        datagram: &[u8],
        room: &mut [u8],
    ) -> Result<Option<(usize, IpAddr)>, Reason> {
        match self.0.decapsulate(Some(from), datagram, room) {
            TunnResult::WriteToTunnelV4(packet, source) => Ok(Some((packet.len(), source.into()))),
            TunnResult::WriteToTunnelV6(packet, source) => Ok(Some((packet.len(), source.into()))),
            TunnResult::Done | TunnResult::WriteToNetwork(_) => Ok(None),
            TunnResult::Err(error) => Err(reason(&error)),
        }
    }

    fn shake(&mut self, from: IpAddr, datagram: &[u8], room: &mut [u8]) -> Result<Shaken, Reason> {
        match self.0.decapsulate(Some(from), datagram, room) {
            // An answer of kind 4 is the keepalive that confirms a session.
            TunnResult::WriteToNetwork(answer) if answer.first() == Some(&DATA) => {
                Ok(Shaken::Confirmed(answer.len()))
            }
            TunnResult::WriteToNetwork(answer) => Ok(Shaken::Answered(answer.len())),
            TunnResult::Err(error) => Err(reason(&error)),
            _ => Ok(Shaken::Cookie),
        }
    }

    fn initiate(&mut self, room: &mut [u8]) -> usize {
        match self.0.format_handshake_initiation(room, true) {
            TunnResult::WriteToNetwork(datagram) => datagram.len(),
            _ => 0,
        }
    }

    fn tick(&mut self, room: &mut [u8]) -> Due {
        match self.0.update_timers(room) {
            TunnResult::WriteToNetwork(datagram) => Due::Send(datagram.len()),
            TunnResult::Err(WireGuardError::ConnectionExpired) => Due::Expired,
            _ => Due::Send(0),
        }
    }

    fn age(&self) -> Option<Duration> {
        self.0.time_since_last_handshake()
    }
}

fn sealed(result: &TunnResult<'_>) -> Sealed {
    match result {
        TunnResult::WriteToNetwork(datagram) if datagram.first() == Some(&DATA) => {
            Sealed::Data(datagram.len())
        }
        TunnResult::WriteToNetwork(datagram) => Sealed::Kept(datagram.len()),
        _ => Sealed::Kept(0),
    }
}

fn reason(error: &WireGuardError) -> Reason {
    match error {
        WireGuardError::DuplicateCounter | WireGuardError::InvalidCounter => Reason::Replayed,
        WireGuardError::WrongTai64nTimestamp | WireGuardError::InvalidTai64nTimestamp => Reason::Replayed,
        WireGuardError::NoCurrentSession | WireGuardError::WrongIndex => Reason::UnknownSession,
        WireGuardError::InvalidMac => Reason::BadMac,
        WireGuardError::UnderLoad => Reason::Flood,
        WireGuardError::InvalidPacket | WireGuardError::IncorrectPacketLength => Reason::Malformed,
        _ => Reason::Forged,
    }
}

/// A key of the node's.
pub(in crate::tunnel) struct Identity {
    pub(in crate::tunnel) secret: TunnelSecret,
    pub(in crate::tunnel) public: TunnelKey,
    /// Its first MAC, and its cookies.
    limiter: RateLimiter,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({:?})", self.public)
    }
}

impl Identity {
    pub(in crate::tunnel) fn new(secret: &TunnelSecret) -> Self {
        let public = secret.public();
        let limiter = RateLimiter::new(&PublicKey::from(public.0), HANDSHAKES);
        Self { secret: secret.clone(), public, limiter }
    }

    /// Looks at a message that is no data, before any session is touched. A cookie is written where the node is under load.
    pub(in crate::tunnel) fn examine(
        &self,
        from: IpAddr,
        datagram: &[u8],
        cookie: &mut [u8; 64],
    ) -> Examined {
        match self.limiter.verify_packet(Some(from), datagram, cookie) {
            Ok(Packet::HandshakeInit(init)) => {
                match parse_handshake_anon(&self.secret.0, &PublicKey::from(self.public.0), &init) {
                    Ok(half) => Examined::From(TunnelKey(half.peer_static_public)),
                    Err(_) => Examined::Void(Reason::Forged),
                }
            }
            Ok(Packet::HandshakeResponse(response)) => Examined::About(response.receiver_idx),
            Ok(Packet::PacketCookieReply(reply)) => Examined::About(reply.receiver_idx),
            Ok(Packet::PacketData(_)) => Examined::Void(Reason::Malformed),
            Err(TunnResult::WriteToNetwork(cookie)) => Examined::Cookie(cookie.len()),
            Err(TunnResult::Err(WireGuardError::InvalidMac)) => Examined::Elsewhere(Reason::BadMac),
            Err(_) => Examined::Elsewhere(Reason::Malformed),
        }
    }

    /// Begins a second in which handshakes are counted.
    pub(in crate::tunnel) fn begin_second(&self) {
        self.limiter.reset_count();
    }
}
