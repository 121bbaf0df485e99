//! The values that go into and come out of a [`Mesh`](super::Mesh).

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::forward::NotForwarded;
use crate::record::{NodeKey, NodeRecord, Verify};
use crate::seal::{KeyRing, OpenError};
use crate::site::{Admission, SiteKey};
use crate::types::{Epoch, NodeName, PublicKey, SiteName, Subnet};

/// What a [`Mesh`](super::Mesh) needs to start.
#[derive(Debug, Clone)]
pub struct MeshConfig {
    /// The cluster's id; it is part of every seal and signature.
    pub cluster: String,
    /// The node's name, which no other node of the mesh has.
    pub node: NodeName,
    /// The node's site.
    pub site: SiteName,
    /// The node's signing key.
    pub key: NodeKey,
    /// The cluster keys.
    pub ring: KeyRing,
    /// Where to look for a first peer, and for lost ones.
    pub seeds: Vec<SocketAddr>,
    /// Counts the starts of this node and is persisted: the first record version is `incarnation << 32`.
    /// A node whose count is lost (0) catches up from what its peers remember.
    pub incarnation: u64,
    /// How fast things happen.
    pub timing: Timing,
    /// Who verifies records: [`Each`](crate::record::Each) in a daemon.
    pub verify: Arc<dyn Verify>,
}

/// The intervals of the protocol; [`Timing::default`] suits a cluster of any size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timing {
    /// Between two probes; default 1 s.
    pub probe_interval: Duration,
    /// Between two questions of a gateway to another one of its site; default 150 ms.
    pub watch_interval: Duration,
    /// How long a probe waits for its direct answer; default 500 ms, less than `probe_interval`.
    pub probe_timeout: Duration,
    /// Between two rounds of gossip while there is something to tell; default 200 ms.
    pub gossip_interval: Duration,
    /// Between two anti-entropy exchanges with a random member; default 10 s.
    pub sync_interval: Duration,
    /// Between two exchanges while the last one found differences; default 300 ms.
    pub sync_fast: Duration,
    /// Between two attempts to reach a dead member or a seed; default 5 s.
    pub rejoin_interval: Duration,
    /// How long a dead or departed member is kept; default 10 min.
    pub reap: Duration,
    /// Suspicion lasts at least this many probe intervals, times log10 of the number of members; default 4.
    pub suspicion_factor: u32,
}

impl Timing {
    /// The same with no interval below 10 ms, so that time always moves on.
    pub(super) fn bounded(mut self) -> Self {
        let least = Duration::from_millis(10);
        for interval in [
            &mut self.probe_interval,
            &mut self.watch_interval,
            &mut self.probe_timeout,
            &mut self.gossip_interval,
            &mut self.sync_interval,
            &mut self.sync_fast,
            &mut self.rejoin_interval,
            &mut self.reap,
        ] {
            *interval = (*interval).max(least);
        }
        self
    }
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            probe_interval: Duration::from_secs(1),
            watch_interval: Duration::from_millis(150),
            probe_timeout: Duration::from_millis(500),
            gossip_interval: Duration::from_millis(200),
            sync_interval: Duration::from_secs(10),
            sync_fast: Duration::from_millis(300),
            rejoin_interval: Duration::from_secs(5),
            reap: Duration::from_secs(600),
            suspicion_factor: 4,
        }
    }
}

/// What a node needs to judge the records of other sites.
#[derive(Debug, Clone)]
pub struct Trust {
    /// The public key of the node's own site.
    pub site: PublicKey,
    /// The prefixes of the own site; no other site may announce any part of them.
    pub prefixes: Vec<Subnet>,
    /// The secret half, on the nodes that speak for the site.
    pub signer: Option<SiteKey>,
}

/// What is thought of another site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SiteView {
    /// Its name, as whoever let it in knows it.
    pub site: SiteName,
    /// Its key.
    pub key: PublicKey,
    /// Who let it in, or put it out.
    pub by: PublicKey,
    /// Whether its nodes are believed.
    pub standing: SiteStanding,
    /// What is wrong with it, as sentences for people.
    pub problems: Vec<String>,
}

impl SiteView {
    pub(super) fn new(admission: &Admission, standing: SiteStanding) -> Self {
        let Admission { site, key, by, .. } = admission;
        Self { site: site.clone(), key: *key, by: *by, standing, problems: Vec::new() }
    }
}

/// Whether a site's nodes are believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SiteStanding {
    /// It is let in, but has not said (here) what it announces, or something that cannot be.
    Unknown,
    /// It is in.
    Member {
        /// What its nodes may announce subnets of.
        prefixes: Vec<Subnet>,
        /// Certificates with a lower serial number are void.
        least_serial: u64,
        /// Certificates of these node keys are void.
        void: BTreeSet<PublicKey>,
    },
    /// The own site put it out.
    Expelled,
    /// It has left.
    Left,
}

/// Who may announce a subnet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authority {
    /// The lease table of the shared store: an announcement needs a lease.
    Store(Arc<LeaseTable>),
    /// There is no shared view: the first claim that the node sees stays.
    Claims,
}

/// Who owns which subnet, as the shared store says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeaseTable {
    leases: BTreeMap<Subnet, Owner>,
    /// The highest epoch: a higher one may be of a lease that the table does not show yet.
    pub(super) latest: Epoch,
    owners: BTreeSet<(NodeName, PublicKey)>,
}

impl LeaseTable {
    /// Returns who owns a subnet.
    pub fn owner(&self, subnet: Subnet) -> Option<&Owner> {
        self.leases.get(&subnet)
    }

    /// Returns whether the store names this key as a node's.
    pub fn is_owner(&self, node: &NodeName, key: &PublicKey) -> bool {
        self.owners.contains(&(node.clone(), *key))
    }

    /// Returns the leases.
    pub fn leases(&self) -> &BTreeMap<Subnet, Owner> {
        &self.leases
    }
}

impl FromIterator<(Subnet, Owner)> for LeaseTable {
    fn from_iter<I: IntoIterator<Item = (Subnet, Owner)>>(leases: I) -> Self {
        let leases = BTreeMap::from_iter(leases);
        let latest = leases.values().map(|owner| owner.epoch).max().unwrap_or(Epoch(0));
        let owners = leases.values().map(|owner| (owner.node.clone(), owner.key)).collect();
        Self { leases, latest, owners }
    }
}

/// Who holds a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// The node.
    pub node: NodeName,
    /// The key that may announce the subnet.
    pub key: PublicKey,
    /// The epoch of the lease.
    pub epoch: Epoch,
}

/// What a member is thought to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MemberState {
    /// It answers.
    Alive,
    /// It did not answer a probe and has some seconds to object.
    Suspect,
    /// It did not object. Its routes stay until its lease goes away or it is reaped.
    Dead,
    /// It left the mesh on purpose. It has no routes.
    Left,
}

impl MemberState {
    /// Returns the state in lower case, for people and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Suspect => "suspect",
            Self::Dead => "dead",
            Self::Left => "left",
        }
    }
}

impl std::fmt::Display for MemberState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// Whether a member's subnets may be routed to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Every subnet of the record is the member's.
    Accepted,
    /// The record is ahead of the lease table; it is judged again with the next table.
    Pending {
        /// One sentence for people.
        why: String,
    },
    /// A subnet of the record is not the member's.
    Refused {
        /// One sentence for people.
        why: String,
    },
}

impl Verdict {
    /// Returns whether the member's routes may be installed.
    pub fn is_accepted(&self) -> bool {
        matches!(self, Self::Accepted)
    }
}

/// A peer as the node sees it.
#[derive(Debug, Clone)]
pub struct MemberView<'a> {
    /// Its name.
    pub node: &'a NodeName,
    /// Its site.
    pub site: &'a SiteName,
    /// Whether it answers.
    pub state: MemberState,
    /// Its latest record.
    pub record: &'a NodeRecord,
    /// The record whose routes are to be installed: `record` if it is accepted; while `record` is pending
    /// the last accepted one, as long as the authority does not contradict it; else none.
    pub routed: Option<&'a NodeRecord>,
    /// The smoothed round-trip time of direct probes, if one was ever answered.
    pub rtt: Option<Duration>,
    /// The smoothed share of direct probes without an answer, 0 to 1.
    pub loss: f32,
    /// When this node last received a datagram from it.
    pub last_seen: Option<Instant>,
    /// Whether its routes may be installed.
    pub verdict: &'a Verdict,
    /// Whether the own store or its site vouches for it; in a mesh without sites of their own keys always.
    pub vouched: bool,
}

/// What the caller does next.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Send the datagram; losing it does no harm.
    Send {
        /// The receiver.
        to: SocketAddr,
        /// At most 1,200 bytes.
        datagram: Vec<u8>,
    },
    /// Something that the rest of the node wants to know.
    Event(MeshEvent),
    /// Nothing more: call `handle_timeout` at `until`, or earlier input.
    Wait {
        /// When.
        until: Instant,
        /// What happens then, for logs.
        reason: &'static str,
    },
}

/// How many members there may be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bound {
    /// Of all sites: 65,536.
    Table,
    /// Of a site that is certified by it: [`MOST_OF_SITE`](super::MOST_OF_SITE), or fewer where large sites share what is left.
    Site(SiteName),
    /// In a mesh of sites, that no site has certified: [`MOST_UNCERTIFIED`](super::MOST_UNCERTIFIED).
    Uncertified,
}

/// Something that the rest of the node wants to know.
#[derive(Debug, Clone, PartialEq)]
pub enum MeshEvent {
    /// The accepted set, an accepted record or its liveness changed: coalesce and plan again.
    RoutesChanged,
    /// A member came, went, or is thought to be in another state.
    MemberChanged {
        /// The member.
        node: NodeName,
        /// Its state now.
        state: MemberState,
    },
    /// The answer to [`Mesh::ping`](super::Mesh::ping).
    Pong {
        /// Who answered.
        node: NodeName,
        /// What `ping` was called with.
        token: u64,
        /// The round-trip time.
        rtt: Duration,
    },
    /// Two nodes claim addresses of one subnet. Reported once a claim.
    Conflict {
        /// The subnet that was refused.
        subnet: Subnet,
        /// Who keeps it here.
        kept: NodeName,
        /// Whose record was refused.
        refused: NodeName,
    },
    /// Another living node has the name of this one and another key. Reported at most every ten seconds.
    /// The one that started later must not announce.
    DuplicateName {
        /// Where the other node receives gossip, or who told.
        from: SocketAddr,
        /// The other node's key.
        key: PublicKey,
    },
    /// A statement of a site is new: persist [`Mesh::statements`](super::Mesh::statements).
    StatementsChanged,
    /// The mesh is to have these cluster keys: persist them, then go there ([`Mesh::follow_ring`](super::Mesh::follow_ring)).
    RingWanted {
        /// For [`Mesh::set_wanted_ring`](super::Mesh::set_wanted_ring) of a later run.
        version: u64,
        /// The keys.
        ring: KeyRing,
    },
    /// The secrets that the own site shares with others changed: persist [`Mesh::pair_secrets`](super::Mesh::pair_secrets).
    PairSecretsChanged,
    /// How [`Mesh::join`](super::Mesh::join) ended: which site let this one in, or why not, one sentence.
    JoinEnded(Result<SiteName, String>),
    /// A site that an invitation was for could not be let in; one sentence.
    JoinRefused(String),
    /// The clocks of another site that joins or lets in differ from this node's by so many seconds.
    ClocksApart {
        /// The other site.
        site: SiteName,
        /// How far.
        seconds: u64,
    },
    /// A site that this one, for which this node speaks, had let in has left.
    SiteLeft {
        /// The site.
        site: SiteName,
    },
    /// Another node that speaks for the own site gives it another name than this one does.
    OtherName {
        /// The other name.
        site: SiteName,
    },
    /// Two sites have a node of one name. Reported at most every ten seconds.
    TwoSites {
        /// The node.
        node: NodeName,
        /// Whose record is used here.
        kept: SiteName,
        /// Whose is not.
        other: SiteName,
    },
    /// Nodes are not taken in since there are as many as there may be. Reported at most every ten seconds a bound.
    TooMany(Bound),
    /// A member said something about the paths between tunnels.
    PathWord {
        /// Who, as whoever has a cluster key may claim.
        from: NodeName,
        /// What.
        word: super::PathWord,
    },
    /// Datagrams come that no key of the ring opens. Reported at most every ten seconds.
    WrongKey {
        /// Who sent the latest one.
        from: SocketAddr,
    },
}

/// Why a datagram was dropped. The state of the mesh is unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum Rejected {
    /// Longer than the budget.
    #[error("longer than 1,200 bytes")]
    TooLong,
    /// Too short for an envelope.
    #[error("truncated")]
    Truncated,
    /// Another envelope version.
    #[error("unknown envelope version")]
    Version,
    /// No key of the ring opens it.
    #[error("sealed with a key that is not in the ring")]
    UnknownKey,
    /// Its seal does not hold.
    #[error("forged, or of another cluster")]
    Forged,
    /// Its content does not decode, or a value is out of range.
    #[error("malformed")]
    Malformed,
    /// It was meant for another node.
    #[error("meant for another node")]
    Misdirected,
    /// It was received before, or is too old to tell.
    #[error("replayed")]
    Replayed,
    /// The node's own datagram came back.
    #[error("the node's own datagram")]
    Reflected,
    /// Its sender has the name of this node.
    #[error("sent by another node of the same name")]
    OwnName,
    /// A record in it has a signature that does not hold.
    #[error("a record's signature does not hold")]
    BadSignature,
}

impl Rejected {
    /// Every reason, in the order of the counters.
    pub const ALL: [Self; 11] = [
        Self::TooLong,
        Self::Truncated,
        Self::Version,
        Self::UnknownKey,
        Self::Forged,
        Self::Malformed,
        Self::Misdirected,
        Self::Replayed,
        Self::Reflected,
        Self::OwnName,
        Self::BadSignature,
    ];

    /// Returns a short name, for metric labels.
    pub fn label(self) -> &'static str {
        match self {
            Self::TooLong => "too_long",
            Self::Truncated => "truncated",
            Self::Version => "version",
            Self::UnknownKey => "unknown_key",
            Self::Forged => "forged",
            Self::Malformed => "malformed",
            Self::Misdirected => "misdirected",
            Self::Replayed => "replayed",
            Self::Reflected => "reflected",
            Self::OwnName => "own_name",
            Self::BadSignature => "bad_signature",
        }
    }
}

impl From<OpenError> for Rejected {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::TooLong => Self::TooLong,
            OpenError::Truncated => Self::Truncated,
            OpenError::Version(_) => Self::Version,
            OpenError::UnknownKey => Self::UnknownKey,
            OpenError::Forged => Self::Forged,
        }
    }
}

/// A node that is not in the mesh, or has no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("node {0} is not a member of the mesh; `weft peers` lists the members")]
pub struct UnknownNode(pub NodeName);

/// What the mesh counted since it was made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Datagrams handed in.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Datagrams handed out.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Probes of members.
    pub probes: u64,
    /// Probes without a direct or indirect answer.
    pub probes_failed: u64,
    /// How often a member came under suspicion here first.
    pub suspicions: u64,
    /// How often the node objected to being suspected or dead.
    pub refutations: u64,
    /// Signed records verified.
    pub verified: u64,
    /// Records dropped because another key holds their node's name.
    pub refused_keys: u64,
    /// Records of new nodes dropped because the table is full.
    pub refused_full: u64,
    /// And because their site has as many as it may.
    pub refused_site: u64,
    /// And because there are as many that no site has certified as there may be.
    pub refused_uncertified: u64,
    /// Anti-entropy exchanges started.
    pub syncs: u64,
    /// Records that anti-entropy sent or asked for.
    pub sync_differences: u64,
    /// Datagrams passed on to members that this node keeps.
    pub forwarded: u64,
    pub(super) not_forwarded: [u64; NotForwarded::ALL.len()],
    pub(super) rejected: [u64; Rejected::ALL.len()],
}

impl Counters {
    /// Returns how many datagrams were dropped for this reason.
    pub fn rejected(&self, reason: Rejected) -> u64 {
        self.rejected[reason as usize]
    }

    /// Returns every reason why a datagram was not passed on, with its count.
    pub fn not_forwarded(&self) -> impl Iterator<Item = (NotForwarded, u64)> + '_ {
        NotForwarded::ALL.into_iter().zip(self.not_forwarded)
    }

    /// Returns every reason with its count.
    pub fn rejections(&self) -> impl Iterator<Item = (Rejected, u64)> + '_ {
        Rejected::ALL.into_iter().zip(self.rejected)
    }
}
