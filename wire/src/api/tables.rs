//! What `weft routes`, `weft leases` and `weft pods` list.

use serde::Serialize;

/// `weft routes`.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Routes {
    /// `routes`.
    #[prost(message, repeated, tag = "1")]
    pub routes: Vec<Route>,
}

/// One route to a peer.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Route {
    /// `prefix`.
    #[prost(string, tag = "1")]
    pub prefix: String,
    /// `node`.
    #[prost(string, tag = "2")]
    pub node: String,
    /// `transport`.
    #[prost(string, tag = "3")]
    pub transport: String,
    /// `dev`.
    #[prost(string, tag = "4")]
    pub dev: String,
    /// `via`.
    #[prost(string, tag = "5")]
    pub via: String,
    /// `mtu`.
    #[prost(uint32, tag = "6")]
    pub mtu: u32,
    /// `installed`.
    #[prost(bool, tag = "7")]
    pub installed: bool,
    /// `reason`.
    #[prost(string, tag = "8")]
    pub reason: String,
}

/// `weft leases`.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Leases {
    /// `leases`.
    #[prost(message, repeated, tag = "1")]
    pub leases: Vec<Lease>,
}

/// One lease.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Lease {
    /// `subnet`.
    #[prost(string, tag = "1")]
    pub subnet: String,
    /// `node`.
    #[prost(string, tag = "2")]
    pub node: String,
    /// `site`.
    #[prost(string, tag = "3")]
    pub site: String,
    /// `epoch`.
    #[prost(uint64, tag = "4")]
    pub epoch: u64,
    /// `expires_in_s`; absent for a lease that lives as long as its node.
    #[prost(uint64, optional, tag = "5")]
    pub expires_in_s: Option<u64>,
    /// `own`.
    #[prost(bool, tag = "6")]
    pub own: bool,
}

/// `weft pods`.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Pods {
    /// `pods`.
    #[prost(message, repeated, tag = "1")]
    pub pods: Vec<Pod>,
}

/// One attached pod.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Pod {
    /// `id`.
    #[prost(string, tag = "1")]
    pub id: String,
    /// `namespace`.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// `name`.
    #[prost(string, tag = "3")]
    pub name: String,
    /// `ips`.
    #[prost(string, repeated, tag = "4")]
    pub ips: Vec<String>,
    /// `ifname`.
    #[prost(string, tag = "5")]
    pub ifname: String,
    /// `host_ifname`.
    #[prost(string, tag = "6")]
    pub host_ifname: String,
    /// Seconds since 1970.
    #[prost(uint64, tag = "7")]
    pub since: u64,
}
