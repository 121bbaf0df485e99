//! How a daemon takes over from one that runs: what the two say to each other, and the descriptors that go along.
//!
//! The control plane goes over as in any restart: the earlier daemon ends it whole and hands the lock of the state
//! directory over, which the later one then begins on. What may not pause goes over by `SCM_RIGHTS` (unix(7)): the local socket and
//! that of the metrics, in whose queues callers wait meanwhile, and the tunnels (`crate::tunnel`).
//! [Decision 9](../../docs/decisions/0009-hand-over.md) has the order and the reasons.
//!
//! Invariant: until the later daemon says [`Message::Done`], the earlier one can go on as if nothing had been.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};
use weft_wire::types::NodeName;

use crate::relay::Relay;
use crate::relay::handed::{Handed, HandedPair, Handing};
use crate::tunnel::{Tunnel, TunnelsOffered};

/// The socket in the state directory at which a daemon offers to be taken over from.
pub const SOCKET: &str = "handover.sock";
/// Of what is said here; a later daemon that says another number is refused.
const VERSION: u32 = 2;
/// The longest message. A session takes about 150 bytes, and they come in parts.
const MOST: usize = 1 << 20;
/// So many sessions are told in one message.
const PART: usize = 1000;
/// The most descriptors of a message: the lock, two listeners, the TUN device, a channel, a UDP socket a family.
const DESCRIPTORS: usize = 7;
/// So many pairs of the relay are told in one message: each has a socket a family.
const PAIRS: usize = DESCRIPTORS / 2;
/// How long either side waits for a message that the other has no reason to delay.
const PROMPT: Duration = Duration::from_secs(5);
/// How long the later daemon waits for the earlier one to come to rest, which gives up before.
const REST: Duration = Duration::from_secs(20);
/// The earlier daemon keeps its sessions at most so long after the later one has taken the descriptors.
const LINGER: Duration = Duration::from_secs(20);
/// Between two looks whether the daemon was told to stop.
const LOOK: Duration = Duration::from_millis(100);

/// What is said.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Message {
    /// The later daemon asks to take over.
    Hello {
        /// [`VERSION`] of its release.
        version: u32,
    },
    /// The earlier daemon goes on, for this reason.
    Refused(String),
    /// The earlier daemon's control plane has ended; with the descriptors, of which one is its lock.
    Offer(Offer),
    /// The later daemon knows its peers and reads from now on.
    Take,
    /// In answer: the earlier daemon no longer reads, and keeps these sessions.
    Sessions(Vec<Kept>),
    /// The later daemon relays from now on.
    TakeRelay,
    /// In answer: the earlier daemon no longer reads at the ports of these pairs; with their sockets.
    Pairs(Vec<HandedPair>),
    /// All sessions, or pairs, were told.
    Taken,
    /// Nothing more is asked of the earlier daemon.
    Done,
}

/// Which descriptors come, in this order: the lock and the local socket first.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Offer {
    /// The socket of the metrics.
    pub metrics: bool,
    /// What carries the tunnels.
    pub tunnels: Option<TunnelsOffer>,
    /// It relays for pairs of other nodes; a daemon that knows no hand-over of them ends them.
    #[serde(default)]
    pub relay: bool,
}

/// The descriptors of the tunnels: the TUN device, a channel to the earlier daemon, and these sockets.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TunnelsOffer {
    /// The device takes and gives super-packets of UDP.
    pub super_udp: bool,
    /// There is a socket for IPv4.
    pub v4: bool,
    /// There is a socket for IPv6.
    pub v6: bool,
}

/// A session that the earlier daemon keeps.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kept {
    /// With whom.
    pub node: NodeName,
    /// The upper 24 bits of its receiver indices.
    pub index: u32,
    /// Where the peer's packets came from last.
    pub endpoint: SocketAddr,
    /// It can seal; otherwise it is being asked for.
    pub ready: bool,
}

/// Why nothing was taken over.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    /// The earlier daemon goes on.
    #[error("the weftd that runs is not taken over from: {0}")]
    Refused(String),
    /// The earlier daemon does not speak, or ended meanwhile; whether it goes on is not known.
    #[error("the weftd that runs did not hand over: {0}; see its log, and try again")]
    Lost(#[source] io::Error),
}

/// One end of a conversation.
#[derive(Debug)]
pub struct Talk(UnixStream);

impl Talk {
    /// Takes a connected socket, blocking or not.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PROMPT))?;
        stream.set_write_timeout(Some(PROMPT))?;
        Ok(Self(stream))
    }

    /// Says something, with descriptors.
    pub fn say(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let body = serde_json::to_vec(message).expect("a message is plain data");
        let length = u32::try_from(body.len()).expect("a message is short").to_le_bytes();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let sent = sendmsg(&self.0, &[IoSlice::new(&length)], &mut rights, SendFlags::NOSIGNAL)?;
        (&self.0).write_all(&length[sent..])?;
        (&self.0).write_all(&body)
    }

    /// Hears the next message, with its descriptors.
    pub fn hear(&self) -> io::Result<(Message, Vec<OwnedFd>)> {
        let mut length = [0; 4];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut length)];
        let got = recvmsg(&self.0, &mut slices, &mut rights, RecvFlags::CMSG_CLOEXEC)?.bytes;
        let mut fds = Vec::new();
        for message in rights.drain() {
            if let RecvAncillaryMessage::ScmRights(given) = message {
                fds.extend(given);
            }
        }
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        (&self.0).read_exact(&mut length[got..])?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MOST {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long"));
        }
        let mut body = vec![0; length];
        (&self.0).read_exact(&mut body)?;
        let message = serde_json::from_slice(&body).map_err(io::Error::other)?;
        Ok((message, fds))
    }

    /// Hears the later daemon's first word; returns whether the two can speak.
    pub fn greeted(&self) -> io::Result<()> {
        match self.hear()? {
            (Message::Hello { version: VERSION }, _) => Ok(()),
            _ => {
                let why = "it speaks another version of the hand-over; stop it, then start this one";
                self.say(&Message::Refused(why.into()), &[])?;
                Err(io::Error::other("another version"))
            }
        }
    }

    /// Says that nothing more is asked of the earlier daemon, and waits until it is gone.
    pub fn finish(&self) {
        if self.say(&Message::Done, &[]).is_ok() {
            // Its end closes the connection; one that takes longer is none of the later daemon's business.
            drop(self.hear());
        }
    }

    /// Waits for a message to come, or the end of the connection.
    fn speaks(&self, patience: Duration) -> bool {
        let millis = u16::try_from(patience.as_millis()).unwrap_or(u16::MAX);
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, millis).is_ok_and(|ready| ready > 0)
    }

    /// Tells what sessions are kept.
    fn say_sessions(&self, sessions: &[Kept]) -> io::Result<()> {
        for part in sessions.chunks(PART) {
            self.say(&Message::Sessions(part.to_vec()), &[])?;
        }
        self.say(&Message::Taken, &[])
    }

    /// Tells what pairs are relayed for, with their sockets.
    pub fn say_pairs(&self, pairs: &[Handing]) -> io::Result<()> {
        for part in pairs.chunks(PAIRS) {
            let told = part.iter().map(|pair| pair.told.clone()).collect();
            let fds: Vec<_> = part.iter().flat_map(Handing::descriptors).collect();
            self.say(&Message::Pairs(told), &fds)?;
        }
        self.say(&Message::Taken, &[])
    }

    /// Asks the earlier daemon to relay no more; returns the pairs that it relayed for.
    pub fn take_relay(&self) -> io::Result<Vec<Handed>> {
        self.say(&Message::TakeRelay, &[])?;
        let mut all = Vec::new();
        loop {
            match self.hear()? {
                (Message::Pairs(part), fds) => {
                    let mut fds = fds.into_iter();
                    for told in part {
                        let mut next = |there: bool| if there { fds.next() } else { None };
                        let (v4, v6) = (next(told.v4), next(told.v6));
                        all.push(Handed { told, v4, v6 });
                    }
                }
                (Message::Taken, _) => return Ok(all),
                (other, _) => return Err(io::Error::other(format!("unexpected {other:?}"))),
            }
        }
    }

    /// Asks the earlier daemon to read no more; returns the sessions that it keeps.
    pub fn take(&self) -> io::Result<Vec<Kept>> {
        self.say(&Message::Take, &[])?;
        let mut kept = Vec::new();
        loop {
            match self.hear()?.0 {
                Message::Sessions(part) => kept.extend(part),
                Message::Taken => return Ok(kept),
                other => return Err(io::Error::other(format!("unexpected {other:?}"))),
            }
        }
    }
}

/// What a daemon starts with besides its state directory.
#[derive(Debug, Default)]
pub struct Heritage {
    /// The lock of the state directory, from an earlier daemon or to a later one.
    pub lock: Option<OwnedFd>,
    /// The local socket, whose callers wait.
    pub local: Option<UnixListener>,
    /// The socket of the metrics.
    pub metrics: Option<TcpListener>,
    /// Tunnels that run, or that another daemon carries until they are taken.
    pub tunnels: Tunnels,
    /// What is relayed for pairs of other nodes.
    pub relay: Relays,
    /// The earlier daemon, until it is told that it is no longer needed.
    pub talk: Option<Talk>,
}

/// Where a daemon has its tunnels from.
#[derive(Debug, Default)]
pub enum Tunnels {
    /// It makes its own.
    #[default]
    None,
    /// They run in this very process.
    Running(Box<Tunnel>),
    /// Another daemon carries them.
    Offered(TunnelsOffered),
}

/// Where a daemon has the pairs from that it relays for.
#[derive(Debug, Default)]
pub enum Relays {
    /// There are none.
    #[default]
    None,
    /// They are relayed for in this very process, or were until another daemon took them.
    Running(Relay),
    /// Another daemon relays for them.
    Offered,
}

impl Heritage {
    /// Carries on with what runs in this process. The lock must be held: another daemon that lives would do the same.
    pub fn resume(&mut self) {
        if let Tunnels::Running(tunnel) = &mut self.tunnels
            && let Err(error) = tunnel.resume()
        {
            warn!(err = %error, "tunnels do not go on, they are opened anew");
            self.tunnels = Tunnels::None;
        }
        if let Relays::Running(relay) = &mut self.relay {
            relay.resume();
        }
    }
}

/// Asks the daemon that runs on a state directory to hand over; nothing where none offers it.
///
/// Blocks until that daemon has come to rest.
///
/// # Errors
/// [`TakeOverError`]; the other daemon goes on.
pub fn take_over(state_dir: &Path) -> Result<Option<Heritage>, TakeOverError> {
    // No socket, or none that listens: no daemon, or one that knows no hand-over. The lock tells which.
    let Ok(stream) = UnixStream::connect(state_dir.join(SOCKET)) else { return Ok(None) };
    let talk = Talk::new(stream).map_err(TakeOverError::Lost)?;
    talk.say(&Message::Hello { version: VERSION }, &[]).map_err(TakeOverError::Lost)?;
    talk.0.set_read_timeout(Some(REST)).map_err(TakeOverError::Lost)?;
    let heard = talk.hear().map_err(TakeOverError::Lost)?;
    talk.0.set_read_timeout(Some(PROMPT)).map_err(TakeOverError::Lost)?;
    let (offer, fds) = match heard {
        (Message::Offer(offer), fds) => (offer, fds),
        (Message::Refused(why), _) => return Err(TakeOverError::Refused(why)),
        (other, _) => return Err(TakeOverError::Lost(io::Error::other(format!("unexpected {other:?}")))),
    };
    let missing = || TakeOverError::Lost(io::Error::other("a descriptor is missing"));
    let mut fds = fds.into_iter();
    let lock = fds.next().ok_or_else(missing)?;
    let local = UnixListener::from(fds.next().ok_or_else(missing)?);
    let metrics = match offer.metrics {
        true => Some(TcpListener::from(fds.next().ok_or_else(missing)?)),
        false => None,
    };
    let tunnels = match offer.tunnels {
        None => Tunnels::None,
        Some(tunnels) => {
            let mut next = |there: bool| match there {
                true => fds.next().ok_or_else(missing).map(Some),
                false => Ok(None),
            };
            Tunnels::Offered(TunnelsOffered {
                device: next(true)?.ok_or_else(missing)?,
                channel: next(true)?.ok_or_else(missing)?,
                super_udp: tunnels.super_udp,
                v4: next(tunnels.v4)?,
                v6: next(tunnels.v6)?,
                talk: None,
            })
        }
    };
    let relay = if offer.relay { Relays::Offered } else { Relays::None };
    Ok(Some(Heritage { lock: Some(lock), local: Some(local), metrics, tunnels, relay, talk: Some(talk) }))
}

/// Returns whether a daemon listens for others on a state directory.
pub fn runs(state_dir: &Path) -> bool {
    UnixStream::connect(state_dir.join(SOCKET)).is_ok()
}

/// Hands over what a daemon left when it came to rest. Blocks until the later daemon needs nothing more.
///
/// # Errors
/// Everything, to go on with, where the later daemon ended too early and this one was not told to stop.
pub fn hand_over(mut heritage: Heritage, told_to_stop: &AtomicBool) -> Result<(), Heritage> {
    let Some(talk) = heritage.talk.take() else { return Err(heritage) };
    match give(&mut heritage, &talk, told_to_stop) {
        Ok(()) => Ok(()),
        Err(error) if told_to_stop.load(Ordering::Relaxed) => {
            warn!(err = %error, "the later daemon is gone, and this one was told to stop");
            Ok(())
        }
        Err(error) => {
            warn!(err = %error, "the later daemon did not take over");
            Err(heritage)
        }
    }
}

fn give(heritage: &mut Heritage, talk: &Talk, told_to_stop: &AtomicBool) -> io::Result<()> {
    offer(heritage, talk)?;
    let mut until: Option<Instant> = None;
    loop {
        if !talk.speaks(LOOK) {
            // Before anything was taken there is no hurry: this process still carries everything.
            if until.is_none() && told_to_stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                warn!("sessions are given up: the later daemon has not said that it needs them no more");
                return Ok(());
            }
            continue;
        }
        match talk.hear()?.0 {
            Message::Take => {
                let kept = match &mut heritage.tunnels {
                    Tunnels::Running(tunnel) => tunnel.linger().map_err(io::Error::other)?,
                    _ => Vec::new(),
                };
                info!(sessions = kept.len(), "another daemon reads, sessions are kept for it");
                until = Some(Instant::now() + LINGER);
                talk.say_sessions(&kept)?;
            }
            Message::TakeRelay => {
                let pairs = match &mut heritage.relay {
                    Relays::Running(relay) => relay.hand_over(Instant::now()),
                    _ => Vec::new(),
                };
                info!(pairs = pairs.len(), "another daemon relays");
                talk.say_pairs(&pairs)?;
            }
            Message::Done => {
                info!("another daemon has taken over");
                return Ok(());
            }
            other => return Err(io::Error::other(format!("unexpected {other:?}"))),
        }
    }
}

fn offer(heritage: &mut Heritage, talk: &Talk) -> io::Result<()> {
    let channel = match &mut heritage.tunnels {
        Tunnels::Running(tunnel) => Some(tunnel.channel()?),
        _ => None,
    };
    let missing = || io::Error::other("there is no lock, or no local socket");
    let lock = heritage.lock.as_ref().ok_or_else(missing)?.as_fd();
    let mut fds = vec![lock, heritage.local.as_ref().ok_or_else(missing)?.as_fd()];
    fds.extend(heritage.metrics.as_ref().map(AsFd::as_fd));
    let relay = matches!(heritage.relay, Relays::Running(_));
    let mut offer = Offer { metrics: heritage.metrics.is_some(), tunnels: None, relay };
    if let (Tunnels::Running(tunnel), Some(channel)) = (&heritage.tunnels, &channel) {
        let (super_udp, device, [v4, v6]) = tunnel.descriptors();
        offer.tunnels = Some(TunnelsOffer { super_udp, v4: v4.is_some(), v6: v6.is_some() });
        fds.extend([device, channel.as_fd()]);
        fds.extend([v4, v6].into_iter().flatten());
    }
    talk.say(&Message::Offer(offer), &fds)?;
    // It is the later daemon's alone: should that one end, whoever comes first has it.
    heritage.lock = None;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{StateDir, StateError};

    fn pair() -> (Talk, Talk) {
        let (one, other) = UnixStream::pair().unwrap();
        (Talk::new(one).unwrap(), Talk::new(other).unwrap())
    }

    #[test]
    fn descriptors_go_along_with_what_is_said() {
        let (earlier, later) = pair();
        let (mut inner, outer) = UnixStream::pair().unwrap();
        earlier.say(&Message::Offer(Offer::default()), &[outer.as_fd()]).unwrap();
        drop(outer);
        let (message, fds) = later.hear().unwrap();
        assert!(matches!(message, Message::Offer(_)));
        let [fd] = <[OwnedFd; 1]>::try_from(fds).unwrap();
        UnixStream::from(fd).write_all(b"through").unwrap();
        let mut text = String::new();
        inner.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn many_sessions_are_told_in_parts_and_another_version_is_refused() {
        let (earlier, later) = pair();
        let session = |index| Kept {
            node: format!("node-{index}").parse().unwrap(),
            index,
            endpoint: "[2001:db8::1]:51820".parse().unwrap(),
            ready: index % 2 == 0,
        };
        let all: Vec<Kept> = (0..2_500).map(session).collect();
        let teller = std::thread::spawn(move || {
            assert!(matches!(earlier.hear().unwrap().0, Message::Take));
            earlier.say_sessions(&all).unwrap();
            earlier.greeted().unwrap_err();
        });
        let kept = later.take().unwrap();
        assert_eq!(kept.len(), 2_500);
        assert!(kept.iter().zip(0..).all(|(kept, index)| kept.index == index));
        later.say(&Message::Hello { version: VERSION + 1 }, &[]).unwrap();
        assert!(matches!(later.hear().unwrap().0, Message::Refused(why) if why.contains("version")));
        teller.join().unwrap();
    }

    #[test]
    fn a_message_that_is_too_long_is_refused_and_an_end_is_told() {
        let (one, other) = pair();
        (&one.0).write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert_eq!(other.hear().unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(one);
        assert_eq!(other.hear().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_third_daemon_never_finds_the_lock_free_on_its_way() {
        let path = std::env::temp_dir().join(format!("weft-handover-lock-{}", std::process::id()));
        let dir = StateDir::open(&path).unwrap();
        let listener = UnixListener::bind(path.join(SOCKET)).unwrap();
        let third = || assert!(matches!(StateDir::open(&path), Err(StateError::Locked { .. })));
        let later = std::thread::spawn({
            let path = path.clone();
            move || take_over(&path).unwrap().unwrap()
        });
        let talk = Talk::new(listener.accept().unwrap().0).unwrap();
        talk.greeted().unwrap();
        third();
        let local = listener.try_clone().unwrap();
        let mut heritage =
            Heritage { lock: Some(dir.into_lock()), local: Some(local), ..Heritage::default() };
        offer(&mut heritage, &talk).unwrap();
        assert!(heritage.lock.is_none());
        third();
        let heritage = later.join().unwrap();
        third();
        let dir = StateDir::adopt(&path, heritage.lock.unwrap());
        third();
        drop(dir);
        drop(StateDir::open(&path).expect("it ended with who had it"));
        std::fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn where_no_daemon_offers_it_nothing_is_taken_over() {
        let path = std::env::temp_dir().join(format!("weft-handover-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        assert!(take_over(&path).unwrap().is_none());
        // What a daemon leaves that was killed.
        drop(UnixListener::bind(path.join(SOCKET)).unwrap());
        assert!(take_over(&path).unwrap().is_none());
        std::fs::remove_dir_all(&path).unwrap();
    }
}
