//! The configuration: one TOML file, read strictly, resolved once, with what differs by node from the environment.
//!
//! Nothing else reads the file, and nothing inside sees text where a value is meant. Invariant: a
//! [`Config`] is valid; what the file gets wrong is one sentence with the line it stands on.

mod raw;

pub use raw::parse_duration;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use weft_ipam::carve::Carver;
use weft_ipam::store::{EtcdOptions, KubernetesOptions};
use weft_wire::types::{NodeName, PublicKey, SiteName, Subnet};

use crate::kernel::Implementation;
use crate::plan::model::Encryption;
use crate::relay::RelayLimits;

/// A valid configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The node itself.
    pub node: NodeConfig,
    /// What all nodes share.
    pub cluster: ClusterConfig,
    /// How other sites are judged.
    pub site: SiteConfig,
    /// Where leases are kept.
    pub store: StoreConfig,
    /// How nodes hear of each other.
    pub gossip: GossipConfig,
    /// The network between the nodes.
    pub underlay: UnderlayConfig,
    /// The network between the pods.
    pub overlay: OverlayConfig,
    /// What is encrypted.
    pub encryption: EncryptionConfig,
    /// What the node relays for others; `None` for nothing.
    pub relay: Option<RelayLimits>,
    /// What leaves the cluster.
    pub masquerade: MasqueradeConfig,
    /// The pods of the node.
    pub pods: PodsConfig,
    /// Where metrics are served; `None` for nowhere.
    pub metrics: Option<SocketAddr>,
    /// What is logged.
    pub log: LogConfig,
}

/// `[node]`.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// The node's name; by default the host's.
    pub name: NodeName,
    /// The node's site.
    pub site: SiteName,
    /// Where the daemon keeps its state.
    pub state_dir: PathBuf,
    /// Where the local socket is.
    pub socket: PathBuf,
    /// Who this daemon is among those of this node that take over from each other, in Kubernetes the pod's uid.
    pub instance: Option<String>,
}

/// `[site]`: how other sites are judged; nothing where all nodes share one store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SiteConfig {
    /// The public key of the node's site.
    pub key: Option<PublicKey>,
    /// The file with the secret half, on nodes that speak for the site.
    pub key_file: Option<PathBuf>,
    /// The nodes that carry what the site exchanges with others, with their weights, 0 to [`weft_wire::gateway::MAX_WEIGHT`]; none where each node
    /// does for itself.
    pub gateways: BTreeMap<NodeName, u8>,
}

/// `[cluster]`.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// The cluster's id.
    pub id: String,
    /// The file with the cluster keys.
    pub key_file: PathBuf,
    /// The pod ranges.
    pub carver: Carver,
}

/// `[store]`.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Which store.
    pub kind: StoreKind,
    /// How long a lease outlives its last renewal.
    pub lease_ttl: Duration,
}

/// The kinds of store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreKind {
    /// One SQLite file that the daemons of one machine share.
    Sqlite(PathBuf),
    /// An etcd cluster.
    Etcd(EtcdOptions),
    /// The API of a Kubernetes cluster.
    Kubernetes(KubernetesOptions),
    /// The operator names the node's subnets.
    Static(Vec<Subnet>),
}

/// `[gossip]`.
#[derive(Debug, Clone)]
pub struct GossipConfig {
    /// The UDP port.
    pub port: u16,
    /// Where to look for a first peer.
    pub seeds: Vec<SocketAddr>,
    /// Where other sites reach this node's gossip, if not at its own addresses.
    pub advertise: Vec<SocketAddr>,
    /// Between two probes.
    pub probe_interval: Duration,
}

/// `[underlay]`.
#[derive(Debug, Clone, Default)]
pub struct UnderlayConfig {
    /// The device; by default the one of the default route, or of `addresses`.
    pub device: Option<String>,
    /// The addresses that peers reach this node at, at most one a family; by default the device's.
    pub addresses: Vec<IpAddr>,
    /// The addresses are those that the cluster knew the node by, as the environment said: where it says others later,
    /// they are followed.
    pub of_cluster: bool,
    /// The MTU in bytes; by default the device's.
    pub mtu: Option<u32>,
}

/// `[overlay]`.
#[derive(Debug, Clone)]
pub struct OverlayConfig {
    /// The VXLAN network identifier.
    pub vni: u32,
    /// The VXLAN UDP port.
    pub port: u16,
    /// Whether peers on the same link are reached without a tunnel.
    pub direct_routing: bool,
    /// Whether the kernel leaves checksums to the network card inside the tunnel.
    pub tx_checksum: TxChecksum,
    /// The MTU of pods in bytes; by default what the underlay carries.
    pub mtu: Option<u32>,
}

/// What is encrypted between nodes.
#[derive(Debug, Clone)]
pub struct EncryptionConfig {
    /// Between which nodes pod traffic must be encrypted.
    pub policy: Encryption,
    /// Whether the node has tunnels: always where the policy asks for encryption.
    pub tunnels: bool,
    /// Who carries what is encrypted.
    pub implementation: Implementation,
    /// The UDP port of WireGuard.
    pub port: u16,
    /// The UDP port of the second way while keys change, where the kernel carries the tunnels.
    pub detour_port: u16,
    /// How long the node's tunnel key is used before it makes another.
    pub rotate_after: Duration,
    /// Whether handshakes need a secret made from a cluster key as well.
    pub preshared: bool,
}

/// What is done about TX checksum offload on the VXLAN devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TxChecksum {
    /// On, unless a probe through the tunnel shows that this kernel breaks it.
    Auto,
    /// On.
    On,
    /// Off.
    Off,
}

/// `[masquerade]`.
#[derive(Debug, Clone)]
pub struct MasqueradeConfig {
    /// Whether pods leave the cluster under the node's address.
    pub enabled: bool,
    /// Destinations outside the cluster that see pod addresses all the same.
    pub except: Vec<IpNet>,
}

/// `[pods]`.
#[derive(Debug, Clone)]
pub struct PodsConfig {
    /// Addresses that no pod gets.
    pub reserved: Vec<IpNet>,
    /// Whether a pod reaches itself through a service address.
    pub hairpin: bool,
}

/// `[log]`.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// Whether lines are JSON.
    pub json: bool,
    /// What is logged, in the syntax of `tracing-subscriber`'s `EnvFilter`.
    pub filter: String,
}

/// A configuration that cannot be used: one sentence, with file and line where there is one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{}: {message}", file.display(), line.map(|line| format!(":{line}")).unwrap_or_default())]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// The line, counted from 1.
    pub line: Option<usize>,
    /// What is wrong and what to do.
    pub message: String,
}

/// What takes the place of the file's words: what differs by node where all nodes share one file, as in Kubernetes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// For `node.name`.
    pub node: Option<NodeName>,
    /// For `underlay.address`: at most one a family.
    pub addresses: Option<Vec<IpAddr>>,
    /// For `metrics.listen`.
    pub metrics: Option<String>,
    /// See [`NodeConfig::instance`]; the file has no word for it.
    pub instance: Option<String>,
}

/// The variable that names a daemon among those of its node; [`NodeConfig::instance`].
pub const INSTANCE: &str = "WEFT_INSTANCE";

impl Overrides {
    /// Reads `WEFT_NODE_NAME`, `WEFT_INSTANCE`, `WEFT_METRICS_LISTEN`, and `WEFT_NODE_ADDRESSES`: addresses with commas between, in the order of
    /// preference. An empty variable counts as none.
    ///
    /// # Errors
    /// A sentence that names the variable.
    pub fn from_environment(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, String> {
        let text = |name: &str| match variable(name).map(OsString::into_string) {
            None => Ok(None),
            Some(Ok(text)) => Ok(Some(text.trim().to_owned()).filter(|text| !text.is_empty())),
            Some(Err(_)) => Err(format!("{name} is no text; set it to UTF-8, or unset it")),
        };
        let node = match text("WEFT_NODE_NAME")? {
            None => None,
            Some(name) => Some(name.parse().map_err(|error| format!("WEFT_NODE_NAME: {error}"))?),
        };
        let (instance, metrics) = (text(INSTANCE)?, text("WEFT_METRICS_LISTEN")?);
        let list = text("WEFT_NODE_ADDRESSES")?.unwrap_or_default();
        let mut listed: Vec<IpAddr> = Vec::new();
        for word in list.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            listed.push(word.parse().map_err(|_| {
                format!(
                    "WEFT_NODE_ADDRESSES: {word:?} is no IP address; write one a family with commas between, as in status.hostIPs"
                )
            })?);
        }
        let addresses = first_of_each_family(&listed);
        Ok(Self {
            node,
            addresses: Some(addresses).filter(|addresses| !addresses.is_empty()),
            metrics,
            instance,
        })
    }
}

/// A node may have more addresses of a family than its pods' network takes: the first is the preferred one.
pub fn first_of_each_family(listed: &[IpAddr]) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in listed {
        if !addresses.iter().any(|known| known.is_ipv4() == address.is_ipv4()) {
            addresses.push(*address);
        }
    }
    addresses
}

impl Config {
    /// Reads and resolves a file, with [`Overrides`] from the environment.
    ///
    /// # Errors
    /// What is wrong with it; the first thing found.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError {
            file: path.into(),
            line: None,
            message: format!("cannot be read: {error}; name another file with --config"),
        })?;
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let overrides = Overrides::from_environment(|name| std::env::var_os(name))
            .map_err(|message| ConfigError { file: "the environment".into(), line: None, message })?;
        Self::parse_with(&text, path, host.trim(), overrides)
    }

    /// Resolves the text of a file; `host` is the node's name where the text gives none.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, path: &Path, host: &str) -> Result<Self, ConfigError> {
        Self::parse_with(text, path, host, Overrides::default())
    }

    /// Is [`Config::parse`] where something takes the place of what the text says.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse_with(
        text: &str,
        path: &Path,
        host: &str,
        overrides: Overrides,
    ) -> Result<Self, ConfigError> {
        let error = |line, message| ConfigError { file: path.into(), line, message };
        let mut raw = raw::read(text).map_err(|(line, message)| error(line, message))?;
        let instance = overrides.instance.clone();
        raw.replace(overrides);
        let mut config = raw.resolve(host).map_err(|message| error(None, message))?;
        config.node.instance = instance;
        Ok(config)
    }
}

#[cfg(test)]
mod tests;
