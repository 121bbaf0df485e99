//! What a successful call prints.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::SpecVersion;

/// A call that did what it should.
#[derive(Debug, Clone, PartialEq)]
pub enum Success {
    /// ADD: the attachment.
    Attached(CniResult),
    /// DEL, CHECK, GC, STATUS: nothing to say.
    Done,
    /// VERSION: the supported versions.
    Versions,
}

/// The result of an ADD, or a `prevResult`, without its version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CniResult {
    /// The interfaces that were made: bridge, host's end, pod's end.
    #[serde(default)]
    pub interfaces: Vec<Interface>,
    /// The addresses.
    #[serde(default)]
    pub ips: Vec<IpConfig>,
    /// The routes in the container.
    #[serde(default)]
    pub routes: Vec<RouteEntry>,
    /// What the runtime should write into `resolv.conf`.
    #[serde(default)]
    pub dns: Dns,
}

/// An interface of a result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// The name of the interface.
    pub name: String,
    /// Its Ethernet address as text.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// Its MTU in bytes; from version 1.1.0 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The path of the namespace it is in; none for the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
}

/// An address of a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpConfig {
    /// `"4"` or `"6"`; only in version 0.4.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// The index of the interface that holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
    /// The address with the length of its subnet's prefix.
    pub address: IpNet,
    /// The gateway of its subnet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
}

/// A route of a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteEntry {
    /// Where it leads.
    pub dst: IpNet,
    /// The next hop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
}

/// Name resolution, as the network configuration gives it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Name servers in order of preference.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// The local domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Search domains.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Options of the resolver.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl CniResult {
    /// Writes the result in the form of one spec version.
    pub fn to_json(&self, version: SpecVersion) -> Vec<u8> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Body {
            cni_version: &'static str,
            #[serde(flatten)]
            result: CniResult,
        }
        let mut result = self.clone();
        if version < SpecVersion::V1_1_0 {
            result.interfaces.iter_mut().for_each(|interface| interface.mtu = None);
        }
        for ip in &mut result.ips {
            let family = if ip.address.addr().is_ipv4() { "4" } else { "6" };
            ip.version = (version == SpecVersion::V0_4_0).then(|| family.into());
        }
        pretty(&Body { cni_version: version.as_str(), result })
    }
}

impl Success {
    /// Writes what goes to standard output; nothing for [`Success::Done`].
    pub fn to_json(&self, version: SpecVersion) -> Vec<u8> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Versions {
            cni_version: &'static str,
            supported_versions: [&'static str; 3],
        }
        match self {
            Self::Attached(result) => result.to_json(version),
            Self::Done => Vec::new(),
            Self::Versions => pretty(&Versions {
                cni_version: version.as_str(),
                supported_versions: SpecVersion::ALL.map(SpecVersion::as_str),
            }),
        }
    }
}

pub(super) fn pretty(body: &impl Serialize) -> Vec<u8> {
    let mut json = serde_json::to_vec_pretty(body).expect("these types have text keys only");
    json.push(b'\n');
    json
}
