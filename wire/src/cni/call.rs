//! One plugin call as it crosses the local socket: the part of the daemon's interface that the shim needs.
//!
//! `Request` and `Reply` here are subsets of the messages in `proto/api.proto`, with the same tags, so
//! that the shim links no more than it uses.

use super::{CniError, Code, SpecVersion, Success};

/// A request to the daemon, as far as the shim makes one.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// What is asked.
    #[prost(oneof = "RequestBody", tags = "1")]
    pub body: Option<RequestBody>,
}

/// The requests that the shim makes.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum RequestBody {
    /// One call of the CNI plugin.
    #[prost(message, tag = "1")]
    Cni(CniRequest),
}

/// A reply of the daemon, as far as the shim reads one.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Reply {
    /// What is answered.
    #[prost(oneof = "ReplyBody", tags = "1, 15")]
    pub body: Option<ReplyBody>,
}

/// The replies that the shim understands.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum ReplyBody {
    /// The outcome of a CNI call, failures of the spec included.
    #[prost(message, tag = "1")]
    Cni(CniReply),
    /// The daemon could not take the request at all.
    #[prost(message, tag = "15")]
    Error(Failure),
}

/// Why the daemon took no request.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Failure {
    /// One sentence for a person.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// The environment and the standard input of one plugin call, unchecked.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CniRequest {
    /// `CNI_COMMAND`.
    #[prost(string, tag = "1")]
    pub verb: String,
    /// `CNI_CONTAINERID`; empty where it is not set.
    #[prost(string, tag = "2")]
    pub container_id: String,
    /// `CNI_NETNS`; empty where it is not set.
    #[prost(string, tag = "3")]
    pub netns: String,
    /// `CNI_IFNAME`; empty where it is not set.
    #[prost(string, tag = "4")]
    pub ifname: String,
    /// `CNI_ARGS`; empty where it is not set.
    #[prost(string, tag = "5")]
    pub args: String,
    /// `CNI_PATH`; empty where it is not set.
    #[prost(string, tag = "6")]
    pub path: String,
    /// The network configuration.
    #[prost(bytes = "vec", tag = "7")]
    pub stdin: Vec<u8>,
}

/// What the shim writes and how it ends.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CniReply {
    /// What goes to standard output: a result, an error, or nothing.
    #[prost(bytes = "vec", tag = "1")]
    pub stdout: Vec<u8>,
    /// The exit status of the plugin: 0 or 1.
    #[prost(uint32, tag = "2")]
    pub exit_code: u32,
    /// Whether `stdout` is an error of the spec.
    #[prost(bool, tag = "3")]
    pub is_error: bool,
}

impl CniReply {
    /// Writes an outcome in the form of the spec version that the call asked for.
    pub fn new(version: SpecVersion, outcome: Result<Success, CniError>) -> Self {
        match outcome {
            Ok(success) => Self { stdout: success.to_json(version), exit_code: 0, is_error: false },
            Err(error) => Self { stdout: error.to_json(version), exit_code: 1, is_error: true },
        }
    }

    /// Returns whether this is the error [`Code::TryAgainLater`].
    pub fn asks_again(&self) -> bool {
        let code = || serde_json::from_slice::<serde_json::Value>(&self.stdout).ok()?.get("code")?.as_u64();
        self.is_error && code() == Some(u64::from(Code::TryAgainLater as u32))
    }
}

impl Reply {
    /// Reads a reply.
    ///
    /// # Errors
    /// Where the bytes are no such message.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, prost::DecodeError> {
        prost::Message::decode(bytes)
    }

    /// Takes the plugin's reply out of the daemon's.
    ///
    /// # Errors
    /// [`Code::TryAgainLater`] where the daemon took no request, or answered something else.
    pub fn into_cni(self) -> Result<CniReply, CniError> {
        match self.body {
            Some(ReplyBody::Cni(reply)) => Ok(reply),
            Some(ReplyBody::Error(failure)) => Err(CniError::new(
                Code::TryAgainLater,
                format!("weftd did not take the request: {}", failure.message),
            )),
            None => Err(CniError::new(
                Code::TryAgainLater,
                "weftd sent a reply that weft-cni does not know; install weftd and weft-cni of the same release",
            )),
        }
    }
}
