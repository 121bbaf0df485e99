//! What the shim and the CLI ask for.

use serde::Serialize;

use super::Empty;
use crate::cni::CniRequest;

/// A request of the shim or of the CLI.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// What it carries.
    #[prost(oneof = "RequestBody", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 20, 21")]
    pub body: Option<RequestBody>,
}

/// The kinds of request.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum RequestBody {
    /// `cni`.
    #[prost(message, tag = "1")]
    Cni(CniRequest),
    /// `status`.
    #[prost(message, tag = "2")]
    Status(Empty),
    /// `peers`.
    #[prost(message, tag = "3")]
    Peers(Empty),
    /// `routes`.
    #[prost(message, tag = "4")]
    Routes(Empty),
    /// `leases`.
    #[prost(message, tag = "5")]
    Leases(Empty),
    /// `pods`.
    #[prost(message, tag = "6")]
    Pods(Empty),
    /// `trace`.
    #[prost(message, tag = "7")]
    Trace(TraceRequest),
    /// `ping`.
    #[prost(message, tag = "8")]
    Ping(PingRequest),
    /// `doctor`.
    #[prost(message, tag = "9")]
    Doctor(Empty),
    /// `leave`.
    #[prost(message, tag = "10")]
    Leave(Empty),
    /// `cluster_key`.
    #[prost(message, tag = "11")]
    ClusterKey(ClusterKeyRequest),
    /// `rotate_node_key`.
    #[prost(message, tag = "12")]
    RotateNodeKey(Empty),
    /// `forget`.
    #[prost(message, tag = "13")]
    Forget(ForgetRequest),
    /// `sites`.
    #[prost(message, tag = "20")]
    Sites(Empty),
    /// `site`.
    #[prost(message, tag = "21")]
    Site(SiteRequest),
}

/// Which pods to trace between.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct TraceRequest {
    /// A pod's name, NAMESPACE/NAME, container id, or an address.
    #[prost(string, tag = "1")]
    pub source: String,
    /// `destination`.
    #[prost(string, tag = "2")]
    pub destination: String,
}

/// Whom to ping.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct PingRequest {
    /// `node`.
    #[prost(string, tag = "1")]
    pub node: String,
}

/// Whom to forget.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct ForgetRequest {
    /// `node`.
    #[prost(string, tag = "1")]
    pub node: String,
}

/// What the node's site says of another one, or of its own nodes.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct SiteRequest {
    /// `admit`, `expel`, `void`, `invite`, `join`, `leave` or `rekey`.
    #[prost(string, tag = "1")]
    pub action: String,
    /// Admit and expel: the other site.
    #[prost(string, tag = "2")]
    pub site: String,
    /// Admit: its key, 64 hexadecimal digits.
    #[prost(string, tag = "3")]
    pub key: String,
    /// Admit: what it may announce.
    #[prost(string, repeated, tag = "4")]
    pub prefixes: Vec<String>,
    /// Void: the node whose key is void; empty for all certificates so far.
    #[prost(string, tag = "5")]
    pub node: String,
    /// Invite: for how many seconds the token is good.
    #[prost(uint64, tag = "35")]
    pub valid_s: u64,
    /// Invite: where the joiner finds this node, before what the node announces.
    #[prost(string, repeated, tag = "36")]
    pub addresses: Vec<String>,
    /// Join: what the other site's invite printed.
    #[prost(string, tag = "37")]
    pub token: String,
}

/// What to do with the cluster keys.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct ClusterKeyRequest {
    /// `action`.
    #[prost(string, tag = "1")]
    pub action: String,
    /// Add: 64 hexadecimal digits; use and remove: the key's id.
    #[prost(string, tag = "2")]
    pub key: String,
}
