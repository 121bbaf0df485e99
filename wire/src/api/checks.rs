//! What `weft trace`, `weft ping` and `weft doctor` found.

use serde::Serialize;

/// One step between two pods.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Hop {
    /// `what`.
    #[prost(string, tag = "1")]
    pub what: String,
    /// `ok`.
    #[prost(bool, tag = "2")]
    pub ok: bool,
    /// `detail`.
    #[prost(string, tag = "3")]
    pub detail: String,
}

/// `weft trace`.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Trace {
    /// `hops`.
    #[prost(message, repeated, tag = "1")]
    pub hops: Vec<Hop>,
    /// `verdict`.
    #[prost(string, tag = "2")]
    pub verdict: String,
    /// `ok`.
    #[prost(bool, tag = "3")]
    pub ok: bool,
}

/// `weft ping`.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Pong {
    /// `node`.
    #[prost(string, tag = "1")]
    pub node: String,
    /// `rtt_ms`.
    #[prost(double, tag = "2")]
    pub rtt_ms: f64,
}

/// One thing that `weft doctor` looked at.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Check {
    /// `name`.
    #[prost(string, tag = "1")]
    pub name: String,
    /// `ok`.
    #[prost(bool, tag = "2")]
    pub ok: bool,
    /// `detail`.
    #[prost(string, tag = "3")]
    pub detail: String,
    /// `advice`.
    #[prost(string, tag = "4")]
    pub advice: String,
}

/// `weft doctor`.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Doctor {
    /// `checks`.
    #[prost(message, repeated, tag = "1")]
    pub checks: Vec<Check>,
    /// `ok`.
    #[prost(bool, tag = "2")]
    pub ok: bool,
}
