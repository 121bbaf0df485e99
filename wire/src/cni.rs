//! The Container Network Interface: what a runtime says to a plugin, and what it hears back.
//!
//! Values only: the environment and the standard input of one plugin call come in as a
//! [`CniRequest`], are checked here once, and become a [`Command`]; an outcome becomes the bytes for
//! standard output. Nothing here opens a namespace or a socket.
//!
//! Spec: <https://www.cni.dev/docs/spec/>, versions 0.4.0, 1.0.0 and 1.1.0.
//!
//! Invariant: a [`Command`] is valid; every refusal carries one of the spec's codes and a sentence.

mod call;
mod command;
mod error;
mod outcome;

pub use call::{CniReply, CniRequest, Failure, Reply, ReplyBody, Request, RequestBody};
pub use command::{
    CheckRequest, Command, DelRequest, GcRequest, PodName, PodRequest, StatusRequest, Wishes, socket_of_input,
};
pub use error::{CniError, Code};
pub use outcome::{CniResult, Dns, Interface, IpConfig, RouteEntry, Success};

use std::fmt;
use std::str::FromStr;

/// Names the plugin in a network configuration: the name of its executable.
pub const PLUGIN_TYPE: &str = "weft-cni";

/// The longest standard input and `CNI_ARGS` together that weft reads, in bytes.
///
/// A GC call with 4,000 attachments stays below it.
pub const MAX_INPUT_BYTES: usize = 768 * 1024;

/// A version of the CNI specification that weft speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SpecVersion {
    /// 0.4.0: adds CHECK; results tell the family of an address.
    V0_4_0,
    /// 1.0.0: results no longer tell the family.
    V1_0_0,
    /// 1.1.0: adds STATUS and GC; interfaces tell their MTU.
    V1_1_0,
}

impl SpecVersion {
    /// All supported versions, oldest first.
    pub const ALL: [Self; 3] = [Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];
    /// The newest supported version.
    pub const NEWEST: Self = Self::V1_1_0;

    /// Returns the version as the spec writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// Returns the version that the input of a call names, for a reply that must not fail: the newest
    /// version where the input is broken or names one that weft does not speak.
    pub fn of_input(stdin: &[u8]) -> Self {
        serde_json::from_slice::<serde_json::Value>(stdin)
            .ok()
            .and_then(|config| config.get("cniVersion")?.as_str()?.parse().ok())
            .unwrap_or(Self::NEWEST)
    }
}

impl FromStr for SpecVersion {
    type Err = CniError;

    fn from_str(text: &str) -> Result<Self, CniError> {
        Self::ALL.into_iter().find(|version| version.as_str() == text).ok_or_else(|| {
            CniError::new(
                Code::IncompatibleVersion,
                format!(
                    "weft-cni does not speak CNI version {:?}; set cniVersion in the network configuration to 0.4.0, 1.0.0 or 1.1.0",
                    clip(text)
                ),
            )
        })
    }
}

impl fmt::Display for SpecVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A verb of the CNI specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verb {
    /// Attach a container.
    Add,
    /// Remove an attachment.
    Del,
    /// Verify an attachment.
    Check,
    /// Remove what the runtime no longer lists.
    Gc,
    /// Tell whether ADD would work.
    Status,
    /// Tell the supported versions.
    Version,
}

impl Verb {
    /// Returns the verb as `CNI_COMMAND` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }
}

impl FromStr for Verb {
    type Err = CniError;

    fn from_str(text: &str) -> Result<Self, CniError> {
        [Self::Add, Self::Del, Self::Check, Self::Gc, Self::Status, Self::Version]
            .into_iter()
            .find(|verb| verb.as_str() == text)
            .ok_or_else(|| {
                let what = if text.is_empty() { "is not set".into() } else { format!("is {:?}", clip(text)) };
                CniError::new(
                    Code::InvalidEnvironment,
                    format!("CNI_COMMAND {what}; it must be ADD, DEL, CHECK, GC, STATUS or VERSION"),
                )
            })
    }
}

/// One attachment of one container to a network: what a runtime names in every call.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttachmentId {
    container: Box<str>,
    ifname: Box<str>,
}

impl AttachmentId {
    /// Checks both names as the spec and the kernel want them.
    ///
    /// # Errors
    /// [`Code::InvalidEnvironment`] with the name and the rule it breaks.
    pub fn new(container: &str, ifname: &str) -> Result<Self, CniError> {
        check_container(container)?;
        check_ifname(ifname)?;
        Ok(Self { container: container.into(), ifname: ifname.into() })
    }

    /// Returns the runtime's name of the container (`CNI_CONTAINERID`).
    pub fn container(&self) -> &str {
        &self.container
    }

    /// Returns the name of the interface inside the container (`CNI_IFNAME`).
    pub fn ifname(&self) -> &str {
        &self.ifname
    }

    /// Derives the name of the host's end of the veth pair: `weft` and eight hexadecimal digits.
    pub fn host_ifname(&self) -> String {
        format!("weft{}", crate::types::to_hex(&self.digest()[..4]))
    }

    /// Derives the Ethernet address of the pod's end: locally administered, the same at every ADD.
    pub fn pod_mac(&self) -> crate::types::MacAddress {
        self.mac(4)
    }

    /// Derives the Ethernet address of the host's end.
    pub fn host_mac(&self) -> crate::types::MacAddress {
        self.mac(10)
    }

    fn mac(&self, at: usize) -> crate::types::MacAddress {
        let mut mac = [0; 6];
        mac.copy_from_slice(&self.digest()[at..at + 6]);
        mac[0] = mac[0] & 0xfe | 0x02;
        crate::types::MacAddress(mac)
    }

    fn digest(&self) -> [u8; 32] {
        use blake2::Digest;
        blake2::Blake2s256::new()
            .chain_update(b"weft attachment v1\0")
            .chain_update(self.container.as_bytes())
            .chain_update([0])
            .chain_update(self.ifname.as_bytes())
            .finalize()
            .into()
    }
}

impl fmt::Display for AttachmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.container, self.ifname)
    }
}

fn check_container(id: &str) -> Result<(), CniError> {
    if id.is_empty() {
        return Err(missing("CNI_CONTAINERID"));
    }
    if id.len() <= 256 && is_spec_name(id) {
        return Ok(());
    }
    Err(CniError::new(
        Code::InvalidEnvironment,
        format!(
            "CNI_CONTAINERID {:?} is not valid: it starts with a letter or digit and goes on with letters, digits, '_', '.' and '-', at most 256",
            clip(id)
        ),
    ))
}

/// What the kernel's `dev_valid_name` allows, and no colon (alias names).
fn check_ifname(name: &str) -> Result<(), CniError> {
    if name.is_empty() {
        return Err(missing("CNI_IFNAME"));
    }
    let rule = if name.len() > 15 {
        "the kernel allows 15 bytes"
    } else if name == "." || name == ".." {
        "'.' and '..' are not interface names"
    } else if name == "lo" {
        "lo is the loopback interface"
    } else if name == "all" || name == "default" {
        "the kernel keeps 'all' and 'default' for settings"
    } else if name.bytes().any(|c| c == b'/' || c == b':' || c == b'%' || c <= b' ' || c == 0x7f) {
        "'/', ':', '%' and white space are not allowed"
    } else {
        return Ok(());
    };
    Err(CniError::new(
        Code::InvalidEnvironment,
        format!("CNI_IFNAME {:?} is not an interface name: {rule}", clip(name)),
    ))
}

fn missing(variable: &str) -> CniError {
    CniError::new(
        Code::InvalidEnvironment,
        format!("{variable} is not set; the container runtime must set it for this call"),
    )
}

/// The pattern that the spec gives for network names and container ids.
fn is_spec_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|c| c.is_ascii_alphanumeric())
        && bytes.all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'.' | b'-'))
}

/// Keeps a foreign text short inside a sentence.
fn clip(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests;
