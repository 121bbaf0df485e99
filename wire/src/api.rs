//! The local socket's messages, as `proto/api.proto` documents them; the CLI's JSON is these messages too.
//!
//! A test holds these files against the `.proto`. Nothing here checks a value: the daemon does.

mod checks;
mod request;
mod tables;

use serde::Serialize;

pub use crate::cni::{CniReply, CniRequest};
pub use checks::{Check, Doctor, Hop, Pong, Trace};
pub use request::{
    ClusterKeyRequest, ForgetRequest, PingRequest, Request, RequestBody, SiteRequest, TraceRequest,
};
pub use tables::{Lease, Leases, Pod, Pods, Route, Routes};

/// The version of the CLI's JSON; it grows when a member changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;

/// The answer to one request.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Reply {
    /// What it carries.
    #[prost(oneof = "ReplyBody", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 15, 20")]
    pub body: Option<ReplyBody>,
}

/// The kinds of reply.
#[derive(Clone, PartialEq, prost::Oneof)]
#[expect(
    clippy::large_enum_variant,
    reason = "one reply exists at a time, and boxes would clutter every reader"
)]
pub enum ReplyBody {
    /// `cni`.
    #[prost(message, tag = "1")]
    Cni(CniReply),
    /// `status`.
    #[prost(message, tag = "2")]
    Status(Status),
    /// `peers`.
    #[prost(message, tag = "3")]
    Peers(Peers),
    /// `routes`.
    #[prost(message, tag = "4")]
    Routes(Routes),
    /// `leases`.
    #[prost(message, tag = "5")]
    Leases(Leases),
    /// `pods`.
    #[prost(message, tag = "6")]
    Pods(Pods),
    /// `trace`.
    #[prost(message, tag = "7")]
    Trace(Trace),
    /// `ping`.
    #[prost(message, tag = "8")]
    Ping(Pong),
    /// `doctor`.
    #[prost(message, tag = "9")]
    Doctor(Doctor),
    /// `done`.
    #[prost(message, tag = "10")]
    Done(Done),
    /// `cluster_keys`.
    #[prost(message, tag = "11")]
    ClusterKeys(ClusterKeys),
    /// `error`.
    #[prost(message, tag = "15")]
    Error(Error),
    /// `sites`.
    #[prost(message, tag = "20")]
    Sites(Sites),
}

/// Nothing more to say.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Empty {}

/// The sites of the mesh, as a node sees them.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Sites {
    /// The node's own site.
    #[prost(string, tag = "1")]
    pub site: String,
    /// Its key; empty where other sites are not judged by what they say.
    #[prost(string, tag = "2")]
    pub key: String,
    /// Whether this node has the secret key.
    #[prost(bool, tag = "3")]
    pub speaks: bool,
    /// What the own site announces.
    #[prost(string, repeated, tag = "4")]
    pub prefixes: Vec<String>,
    /// The other sites, by name.
    #[prost(message, repeated, tag = "5")]
    pub sites: Vec<Site>,
}

/// Another site.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Site {
    /// Its name.
    #[prost(string, tag = "1")]
    pub site: String,
    /// Its key.
    #[prost(string, tag = "2")]
    pub key: String,
    /// `member`, `unknown`, `expelled` or `left`.
    #[prost(string, tag = "3")]
    pub standing: String,
    /// What its nodes may announce subnets of.
    #[prost(string, repeated, tag = "4")]
    pub prefixes: Vec<String>,
    /// The site that let it in.
    #[prost(string, tag = "5")]
    pub admitted_by: String,
    /// How many of its nodes are known.
    #[prost(uint32, tag = "6")]
    pub nodes: u32,
    /// How many of these are alive.
    #[prost(uint32, tag = "7")]
    pub alive: u32,
    /// What is wrong with it.
    #[prost(string, repeated, tag = "8")]
    pub problems: Vec<String>,
    /// The paths to its nodes; nothing where none was measured.
    #[prost(message, optional, tag = "30")]
    pub path: Option<SitePath>,
}

/// What was measured of the paths to the nodes of a site.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct SitePath {
    /// `site`.
    #[prost(string, tag = "1")]
    pub site: String,
    /// Of how many of its nodes.
    #[prost(uint32, tag = "2")]
    pub nodes: u32,
    /// The median of their round trips.
    #[prost(double, tag = "3")]
    pub rtt_ms: f64,
    /// The mean of their loss, from 0 to 1.
    #[prost(double, tag = "4")]
    pub loss: f64,
    /// The least packet size that was measured inside a tunnel; nothing where none was.
    #[prost(uint32, optional, tag = "5")]
    pub path_mtu: Option<u32>,
}

/// Why a request was not carried out.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Error {
    /// 1 refused, 2 not found, 3 not permitted, 4 try again.
    #[prost(uint32, tag = "1")]
    pub code: u32,
    /// One sentence: what happened and what to do.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// A request was carried out.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Done {
    /// `message`.
    #[prost(string, tag = "1")]
    pub message: String,
}

/// `weft status`.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Status {
    /// `node`.
    #[prost(string, tag = "1")]
    pub node: String,
    /// `site`.
    #[prost(string, tag = "2")]
    pub site: String,
    /// `subnets`.
    #[prost(string, repeated, tag = "3")]
    pub subnets: Vec<String>,
    /// `store`.
    #[prost(message, optional, tag = "4")]
    pub store: Option<Store>,
    /// `peers`.
    #[prost(message, optional, tag = "5")]
    pub peers: Option<PeerCounts>,
    /// `reconcile`.
    #[prost(message, optional, tag = "6")]
    pub reconcile: Option<Reconcile>,
    /// `warnings`.
    #[prost(string, repeated, tag = "7")]
    pub warnings: Vec<String>,
    /// `ready`.
    #[prost(bool, tag = "8")]
    pub ready: bool,
    /// The step that keeps pods from being attached; empty when ready.
    #[prost(string, tag = "9")]
    pub blocked: String,
    /// `version`.
    #[prost(string, tag = "10")]
    pub version: String,
    /// `uptime_s`.
    #[prost(uint64, tag = "11")]
    pub uptime_s: u64,
    /// `underlay`.
    #[prost(string, repeated, tag = "12")]
    pub underlay: Vec<String>,
    /// `pod_mtu`.
    #[prost(uint32, tag = "13")]
    pub pod_mtu: u32,
    /// On, off, and why.
    #[prost(string, tag = "14")]
    pub tx_checksum: String,
    /// The node's public key.
    #[prost(string, tag = "15")]
    pub key: String,
    /// `pods`.
    #[prost(uint32, tag = "16")]
    pub pods: u32,
    /// Between which nodes pod traffic must be encrypted: `never`, `cross-site` or `always`.
    #[prost(string, tag = "17")]
    pub encryption: String,
    /// The WireGuard tunnels that the daemon carries; nothing where none run.
    #[prost(message, optional, tag = "18")]
    pub tunnels: Option<Tunnels>,
    /// Which of this node's daemons it is (`WEFT_INSTANCE`); empty where none was named.
    #[prost(string, tag = "19")]
    pub instance: String,
    /// What was measured of the paths to the nodes of each site, its own included.
    #[prost(message, repeated, tag = "30")]
    pub paths: Vec<SitePath>,
    /// What the underlay is, where it is a tunnel itself; else empty.
    #[prost(string, tag = "31")]
    pub underlay_tunnel: String,
    /// What stands before its tunnels, as peers see it.
    #[prost(string, tag = "25")]
    pub mapping: String,
    /// Where peers see its tunnels, where that is elsewhere.
    #[prost(string, repeated, tag = "26")]
    pub reflexive: Vec<String>,
    /// What it relays for others; nothing where it relays for nobody.
    #[prost(message, optional, tag = "27")]
    pub relaying: Option<Relaying>,
    /// How other sites reach its gossip; nothing while none says.
    #[prost(message, optional, tag = "22")]
    pub reach: Option<Reach>,
    /// Records of other nodes that gossip brought and that were not taken in, by reason.
    #[prost(message, repeated, tag = "36")]
    pub refused_records: Vec<Count>,
    /// What its site shares with each other that is in; empty where its tunnels use no such secrets.
    #[prost(message, repeated, tag = "34")]
    pub pair_secrets: Vec<PairSecret>,
}

/// The secret that two sites share, which their tunnels are made from beside the cluster key.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct PairSecret {
    /// The other site.
    #[prost(string, tag = "1")]
    pub site: String,
    /// The id of the latest one that the node has; empty where it has none.
    #[prost(string, tag = "2")]
    pub id: String,
    /// Its generation.
    #[prost(uint32, tag = "3")]
    pub generation: u32,
    /// The living nodes there whose tunnels to this one do without.
    #[prost(string, repeated, tag = "4")]
    pub without: Vec<String>,
}

/// How other sites reach a node's gossip.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Reach {
    /// `open`, `behind-nat`, `unproven` (nobody reached it unasked) or `unknown`.
    #[prost(string, tag = "1")]
    pub reach: String,
    /// Where members of other sites see it, the latest first.
    #[prost(string, repeated, tag = "2")]
    pub reflexive: Vec<String>,
    /// `independent`, `dependent` (on whom it sends to) or `unknown`.
    #[prost(string, tag = "3")]
    pub mapping: String,
    /// Members that it keeps a way open to.
    #[prost(string, repeated, tag = "4")]
    pub keepers: Vec<String>,
    /// The shortest pause after which it uses a mapping; 0 without keepers.
    #[prost(uint64, tag = "5")]
    pub pause_ms: u64,
    /// Datagrams passed on to members that it keeps.
    #[prost(uint64, tag = "6")]
    pub forwarded: u64,
    /// And those that were not, by reason.
    #[prost(message, repeated, tag = "7")]
    pub dropped: Vec<Count>,
}

/// What a node relays for others.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Relaying {
    /// Percent of its ports that are free.
    #[prost(uint32, tag = "1")]
    pub room: u32,
    /// The pairs.
    #[prost(message, repeated, tag = "2")]
    pub pairs: Vec<RelayedPair>,
    /// Messages of all pairs, also of those that are gone.
    #[prost(uint64, tag = "3")]
    pub forwarded: u64,
    /// Their bytes.
    #[prost(uint64, tag = "4")]
    pub bytes: u64,
    /// Messages that were not forwarded.
    #[prost(uint64, tag = "5")]
    pub refused: u64,
    /// Those, by reason.
    #[prost(message, repeated, tag = "6")]
    pub dropped: Vec<Count>,
    /// Handshakes among what came.
    #[prost(uint64, tag = "7")]
    pub handshakes: u64,
    /// Pairs that it refused to relay for, by reason.
    #[prost(message, repeated, tag = "8")]
    pub refused_pairs: Vec<Count>,
}

/// A pair that a node relays for.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct RelayedPair {
    /// The two.
    #[prost(string, repeated, tag = "1")]
    pub nodes: Vec<String>,
    /// At which port.
    #[prost(uint32, tag = "2")]
    pub port: u32,
    /// Where they are, as far as they were heard.
    #[prost(string, repeated, tag = "3")]
    pub legs: Vec<String>,
    /// Messages forwarded.
    #[prost(uint64, tag = "4")]
    pub forwarded: u64,
    /// Their bytes.
    #[prost(uint64, tag = "5")]
    pub bytes: u64,
    /// Messages that were not.
    #[prost(uint64, tag = "6")]
    pub refused: u64,
    /// Handshakes among what came.
    #[prost(uint64, tag = "7")]
    pub handshakes: u64,
}

/// The WireGuard tunnels that a daemon carries.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Tunnels {
    /// The node's public key, as `wg` shows it.
    #[prost(string, tag = "1")]
    pub key: String,
    /// How many packets were dropped, by reason.
    #[prost(message, repeated, tag = "2")]
    pub dropped: Vec<Count>,
    /// Who carries packets: `kernel` or `user-space`.
    #[prost(string, tag = "3")]
    pub implementation: String,
}

/// How often something happened, and what.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Count {
    /// `reason`.
    #[prost(string, tag = "1")]
    pub reason: String,
    /// `count`.
    #[prost(uint64, tag = "2")]
    pub count: u64,
}

/// The state of the lease store.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Store {
    /// `kind`.
    #[prost(string, tag = "1")]
    pub kind: String,
    /// `healthy`.
    #[prost(bool, tag = "2")]
    pub healthy: bool,
    /// Age of the view; absent before the first answer.
    #[prost(uint64, optional, tag = "3")]
    pub stale_ms: Option<u64>,
    /// `error`.
    #[prost(string, tag = "4")]
    pub error: String,
}

/// How many peers are in which state.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct PeerCounts {
    /// `alive`.
    #[prost(uint32, tag = "1")]
    pub alive: u32,
    /// `suspect`.
    #[prost(uint32, tag = "2")]
    pub suspect: u32,
    /// `dead`.
    #[prost(uint32, tag = "3")]
    pub dead: u32,
}

/// Where the reconciler stands.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Reconcile {
    /// `last_ok`.
    #[prost(bool, tag = "1")]
    pub last_ok: bool,
    /// `pending`.
    #[prost(uint32, tag = "2")]
    pub pending: u32,
    /// `failed`.
    #[prost(string, repeated, tag = "3")]
    pub failed: Vec<String>,
    /// How long ago.
    #[prost(uint64, optional, tag = "4")]
    pub last_ok_ms: Option<u64>,
    /// `passes`.
    #[prost(uint64, tag = "5")]
    pub passes: u64,
}

/// `weft peers`.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Peers {
    /// `peers`.
    #[prost(message, repeated, tag = "1")]
    pub peers: Vec<Peer>,
}

/// One peer.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Peer {
    /// `node`.
    #[prost(string, tag = "1")]
    pub node: String,
    /// `site`.
    #[prost(string, tag = "2")]
    pub site: String,
    /// `addresses`.
    #[prost(string, repeated, tag = "3")]
    pub addresses: Vec<String>,
    /// `state`.
    #[prost(string, tag = "4")]
    pub state: String,
    /// `transport`.
    #[prost(string, tag = "5")]
    pub transport: String,
    /// `rtt_ms`.
    #[prost(double, optional, tag = "6")]
    pub rtt_ms: Option<f64>,
    /// `loss`.
    #[prost(double, tag = "7")]
    pub loss: f64,
    /// What a pod's packet to it may have, in bytes; the MTU of its underlay where there is no route.
    #[prost(uint32, tag = "8")]
    pub mtu: u32,
    /// `subnets`.
    #[prost(string, repeated, tag = "9")]
    pub subnets: Vec<String>,
    /// `last_seen_ms`.
    #[prost(uint64, optional, tag = "10")]
    pub last_seen_ms: Option<u64>,
    /// Accepted, or why its routes are not.
    #[prost(string, tag = "11")]
    pub verdict: String,
    /// `key`.
    #[prost(string, tag = "12")]
    pub key: String,
    /// `version`.
    #[prost(uint64, tag = "13")]
    pub version: u64,
    /// Its WireGuard tunnel; nothing where there is none.
    #[prost(message, optional, tag = "14")]
    pub tunnel: Option<Tunnel>,
    /// The packet size that was found to reach it, inside the tunnel; nothing where none was asked with.
    #[prost(uint32, optional, tag = "30")]
    pub path_mtu: Option<u32>,
    /// How much one round trip differs from the next (RFC 3550 s6.4.1); nothing where only gossip measures.
    #[prost(double, optional, tag = "31")]
    pub jitter_ms: Option<f64>,
    /// Whether round trip and loss are of packets inside the tunnel, and not of gossip beside it.
    #[prost(bool, tag = "32")]
    pub in_tunnel: bool,
    /// The relay that packets to it go by; empty where they go by none.
    #[prost(string, tag = "25")]
    pub via: String,
    /// What stands before its tunnels: `unknown`, `none`, `endpoint-independent` or `endpoint-dependent`.
    #[prost(string, tag = "26")]
    pub mapping: String,
}

/// A peer's WireGuard tunnel.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Tunnel {
    /// The peer's public key, as `wg` shows it.
    #[prost(string, tag = "1")]
    pub key: String,
    /// Where its packets came from last.
    #[prost(string, tag = "2")]
    pub endpoint: String,
    /// Since the last handshake; nothing while there is no session.
    #[prost(uint64, optional, tag = "3")]
    pub handshake_ms: Option<u64>,
    /// Packets within the tunnel.
    #[prost(uint64, tag = "4")]
    pub sent: u64,
    /// Their bytes.
    #[prost(uint64, tag = "5")]
    pub sent_bytes: u64,
    /// Packets within the tunnel.
    #[prost(uint64, tag = "6")]
    pub received: u64,
    /// Their bytes.
    #[prost(uint64, tag = "7")]
    pub received_bytes: u64,
    /// Who carries it here: kernel or user-space.
    #[prost(string, tag = "8")]
    pub carrier: String,
    /// Who carries it there; empty where the peer does not say.
    #[prost(string, tag = "9")]
    pub peer_carrier: String,
}

/// The ids of the cluster keys.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct ClusterKeys {
    /// The first one seals.
    #[prost(string, repeated, tag = "1")]
    pub ids: Vec<String>,
}

impl Reply {
    /// Makes a reply that says why not.
    pub fn refusal(code: u32, message: impl Into<String>) -> Self {
        Self { body: Some(ReplyBody::Error(Error { code, message: message.into() })) }
    }

    /// Makes a reply that says what was done.
    pub fn done(message: impl Into<String>) -> Self {
        Self { body: Some(ReplyBody::Done(Done { message: message.into() })) }
    }
}

impl From<ReplyBody> for Reply {
    fn from(body: ReplyBody) -> Self {
        Self { body: Some(body) }
    }
}
