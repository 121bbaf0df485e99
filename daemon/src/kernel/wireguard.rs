//! WireGuard devices of the kernel, by generic netlink (include/uapi/linux/wireguard.h): read whole, changed by the
//! difference.
//!
//! It neither makes the device nor chooses it: that is rtnetlink's and `tunnel.rs`'s part. Invariants: a peer that is as it
//! should be is not mentioned to the kernel, so its session goes on; a message stays below the 64 KiB that a nest of
//! attributes can have, however many peers and prefixes there are.

#[cfg(fuzzing)]
pub mod fuzz;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use weft_wire::types::TunnelKey;

use super::tlv::{ACK, Conversation, DUMP, Writer, find};

const NETLINK_GENERIC: isize = 16;
const CONTROLLER: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
const GET_DEVICE: u8 = 0;
const SET_DEVICE: u8 = 1;

/// How old a session can be (`REJECT_AFTER_TIME`, whitepaper s6.1).
const SESSION: Duration = Duration::from_secs(180);
/// What makes the kernel ask for a session at once when it is set, in seconds; it is taken back right after.
const NUDGE: u16 = 25;

/// A device as the kernel has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Device {
    /// Nothing as long as it has no secret.
    pub key: Option<TunnelKey>,
    pub port: u16,
    pub fwmark: u32,
    pub peers: BTreeMap<TunnelKey, FoundPeer>,
}

/// A peer as the kernel has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct FoundPeer {
    /// Where its packets came from last, or what was set.
    pub endpoint: Option<SocketAddr>,
    pub keepalive: u16,
    pub preshared: [u8; 32],
    pub prefixes: BTreeSet<IpNet>,
    /// When the last handshake was, by the wall clock.
    pub handshake: Option<SystemTime>,
    /// Bytes on the underlay.
    pub received: u64,
    pub sent: u64,
}

impl FoundPeer {
    /// Returns the time since the last handshake, as long as there can be a session by it.
    pub(super) fn session(&self, wall: SystemTime) -> Option<Duration> {
        // A clock that was set back shows a handshake to come: that is a fresh one.
        let age = self.handshake.map(|at| wall.duration_since(at).unwrap_or_default());
        age.filter(|age| *age < SESSION)
    }
}

/// A peer as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WantedPeer {
    pub endpoint: SocketAddr,
    /// A session from before is of no use at another endpoint.
    pub anew: bool,
    pub preshared: [u8; 32],
    pub prefixes: BTreeSet<IpNet>,
}

/// What to tell the kernel of one peer; what is absent stays as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    pub key: TunnelKey,
    pub kind: ChangeKind,
    pub endpoint: Option<SocketAddr>,
    pub keepalive: Option<u16>,
    pub preshared: Option<[u8; 32]>,
    pub prefixes: Vec<IpNet>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChangeKind {
    /// Made, if it is not there; the prefixes are added.
    Add,
    /// Changed, if it is there; the prefixes are added.
    Update,
    /// Changed, if it is there; it has these prefixes and no others.
    Replace,
    /// Removed.
    Remove,
}

impl Change {
    fn new(key: TunnelKey, kind: ChangeKind) -> Self {
        Self { key, kind, endpoint: None, keepalive: None, preshared: None, prefixes: Vec::new() }
    }

    fn is_empty(&self) -> bool {
        *self == Self::new(self.key, ChangeKind::Update)
    }
}

/// Compares a device with what it should be; `announced` is where peers were announced to be when they were last set.
///
/// What is new comes first: prefixes move to their new owner in one step, before the old one goes. An endpoint that the peer's
/// packets taught the kernel stays, until another is announced, or as long as there is a session to say that it is right. A peer that
/// is to begin anew at another endpoint is removed and made again: the kernel asks a peer that it knows once in five seconds
/// (`REKEY_TIMEOUT`), and goes on with a session for 15 seconds before it asks for another, and a relay must hear that question.
pub(super) fn changes(
    found: &Device,
    wanted: &BTreeMap<TunnelKey, WantedPeer>,
    announced: &BTreeMap<TunnelKey, SocketAddr>,
    wall: SystemTime,
) -> Vec<Change> {
    let mut changes = Vec::new();
    for (key, peer) in wanted {
        let add = || Change {
            endpoint: Some(peer.endpoint),
            preshared: Some(peer.preshared).filter(|secret| *secret != [0; 32]),
            prefixes: peer.prefixes.iter().copied().collect(),
            ..Change::new(*key, ChangeKind::Add)
        };
        let Some(there) = found.peers.get(key) else {
            changes.push(add());
            continue;
        };
        let moved = announced.get(key).is_some_and(|before| *before != peer.endpoint);
        if peer.anew && moved && there.endpoint != Some(peer.endpoint) {
            changes.extend([Change::new(*key, ChangeKind::Remove), add()]);
            continue;
        }
        let lost = there.endpoint != Some(peer.endpoint) && there.session(wall).is_none();
        let extra = there.prefixes.difference(&peer.prefixes).next().is_some();
        let change = Change {
            kind: if extra { ChangeKind::Replace } else { ChangeKind::Update },
            endpoint: (moved || lost).then_some(peer.endpoint),
            keepalive: (there.keepalive != 0).then_some(0),
            preshared: (there.preshared != peer.preshared).then_some(peer.preshared),
            prefixes: peer
                .prefixes
                .iter()
                .filter(|net| extra || !there.prefixes.contains(net))
                .copied()
                .collect(),
            key: *key,
        };
        if !change.is_empty() {
            changes.push(change);
        }
    }
    let gone = found.peers.keys().filter(|key| !wanted.contains_key(key));
    changes.extend(gone.map(|key| Change::new(*key, ChangeKind::Remove)));
    changes
}

/// Returns which peers to ask for a session at once, rather than when there is something to send: those who hold one with
/// this node that it can no longer use, and so would go on to send what it cannot open.
pub(super) fn to_ask(
    found: &Device,
    changes: &[Change],
    new_key: bool,
    known: &BTreeMap<TunnelKey, SocketAddr>,
    wall: SystemTime,
) -> Vec<TunnelKey> {
    let is_fresh = found.key.is_none();
    let in_use = |key: &TunnelKey| found.peers.get(key).is_some_and(|peer| peer.session(wall).is_some());
    let removed: Vec<&FoundPeer> = changes
        .iter()
        .filter(|change| change.kind == ChangeKind::Remove && in_use(&change.key))
        .filter_map(|change| found.peers.get(&change.key))
        .collect();
    let follows = |change: &&Change| {
        // The same node under a new key, or one that someone removed.
        let heir = |before: &&FoundPeer| change.prefixes.iter().any(|net| before.prefixes.contains(net));
        change.kind == ChangeKind::Add
            && (is_fresh || known.contains_key(&change.key) || removed.iter().any(heir))
    };
    let mut asked: Vec<TunnelKey> = changes.iter().filter(follows).map(|change| change.key).collect();
    let gone: BTreeSet<&TunnelKey> =
        changes.iter().filter(|change| change.kind == ChangeKind::Remove).map(|change| &change.key).collect();
    if new_key {
        asked.extend(found.peers.keys().filter(|key| in_use(key) && !gone.contains(key)));
    }
    asked
}

/// A socket to the kernel's WireGuard, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Wireguard {
    conversation: Conversation,
    family: u16,
}

fn command(command: u8) -> [u8; 4] {
    [command, 1, 0, 0]
}

impl Wireguard {
    /// Opens the socket; nothing where the kernel has no WireGuard. Asking for the family loads the module, where there is one
    /// (`MODULE_ALIAS_GENL_FAMILY`), and the module has the family exactly when it has the kind of device.
    pub(super) fn open() -> io::Result<Option<Self>> {
        let mut conversation = Conversation::open(NETLINK_GENERIC)?;
        let fill = |writer: &mut Writer| writer.text(FAMILY_NAME, "wireguard");
        let answers = match conversation.request(CONTROLLER, ACK, &command(GET_FAMILY), fill) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            answers => answers?,
        };
        let family = answers.iter().find_map(|(_, body)| find(body.get(4..)?, FAMILY_ID)?.try_into().ok());
        Ok(family.map(|family| Self { conversation, family: u16::from_ne_bytes(family) }))
    }

    /// Reads a device.
    ///
    /// # Errors
    /// ENODEV where there is none of that name, EOPNOTSUPP where it is of another kind.
    pub(super) fn read(&mut self, name: &str) -> io::Result<Device> {
        let fill = |writer: &mut Writer| writer.text(wire::DEVICE_NAME, name);
        let answers = self.conversation.request(self.family, DUMP, &command(GET_DEVICE), fill)?;
        let mut device = Device::default();
        for (_, body) in &answers {
            wire::merge(body.get(4..).unwrap_or_default(), &mut device);
        }
        Ok(device)
    }

    /// Gives the device its secret and port. A new secret ends what peers are sent under; what they send is still opened.
    pub(super) fn set_identity(&mut self, name: &str, secret: &[u8; 32], port: u16) -> io::Result<()> {
        let fill = |writer: &mut Writer| wire::identity(writer, name, secret, port);
        self.conversation.request(self.family, ACK, &command(SET_DEVICE), fill).map(drop)
    }

    /// Tells the kernel of peers, in as many messages as it takes.
    pub(super) fn set_peers(&mut self, name: &str, changes: &[Change]) -> io::Result<()> {
        for message in wire::messages(changes) {
            let fill = |writer: &mut Writer| wire::peers(writer, name, &message);
            self.conversation.request(self.family, ACK, &command(SET_DEVICE), fill)?;
        }
        Ok(())
    }

    /// Has the kernel ask peers for a session now. It has no command for it, but asks when a peer is given an interval to keep
    /// it alive and had none (`set_peer`, drivers/net/wireguard/netlink.c).
    pub(super) fn ask(&mut self, name: &str, peers: &[TunnelKey]) -> io::Result<()> {
        for interval in [NUDGE, 0] {
            let change = |key: &TunnelKey| Change {
                keepalive: Some(interval),
                ..Change::new(*key, ChangeKind::Update)
            };
            self.set_peers(name, &peers.iter().map(change).collect::<Vec<_>>())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
