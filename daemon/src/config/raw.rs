//! The file as it is written: every key optional, every value still text or number.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;
use weft_ipam::carve::{Carver, ClusterCidr};
use weft_ipam::store::etcd::EtcdOptionsError;
use weft_ipam::store::kubernetes::Mode;
use weft_ipam::store::{EtcdOptions, KubernetesOptions};
use weft_wire::gateway::MAX_WEIGHT;
use weft_wire::types::{NodeName, PublicKey, SiteName, Subnet};

use crate::kernel::Implementation;
use crate::plan::model::Encryption;
use crate::relay::RelayLimits;

use super::{
    ClusterConfig, Config, EncryptionConfig, GossipConfig, LogConfig, MasqueradeConfig, NodeConfig,
    OverlayConfig, Overrides, PodsConfig, SiteConfig, StoreConfig, StoreKind, TxChecksum, UnderlayConfig,
};

/// One VXLAN header, UDP, IPv6 and Ethernet around the least MTU that IPv6 allows (RFC 8200 s5).
const MTU_MIN: u32 = 1280;
const MTU_MAX: u32 = 65_535;
/// Each port of the relay takes a socket a family.
const MOST_RELAY_PORTS: usize = 1024;
/// Entries in etcd outlive the last sign of their node by this at least (docs/decisions/0010-etcd-store.md).
const ABANDON_LEAST: Duration = Duration::from_secs(7 * 24 * 3600);

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Raw {
    node: Node,
    cluster: Cluster,
    site: Site,
    store: Store,
    gossip: Gossip,
    underlay: Underlay,
    overlay: Overlay,
    encryption: Encrypt,
    relay: Relay,
    masquerade: Masquerade,
    pods: Pods,
    metrics: Metrics,
    log: Log,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Node {
    name: Option<NodeName>,
    site: SiteName,
    state_dir: PathBuf,
    socket: PathBuf,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            name: None,
            site: "default".parse().expect("a valid name"),
            state_dir: "/var/lib/weft".into(),
            socket: "/run/weft/weft.sock".into(),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Site {
    key: Option<PublicKey>,
    key_file: Option<PathBuf>,
    gateways: BTreeMap<NodeName, u8>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Cluster {
    id: String,
    key_file: Option<PathBuf>,
    cidrs: Vec<Cidr>,
}

impl Default for Cluster {
    fn default() -> Self {
        Self { id: "weft".into(), key_file: None, cidrs: Vec::new() }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cidr {
    cidr: IpNet,
    node_prefix: Option<u8>,
    #[serde(default)]
    reserved: Vec<IpNet>,
}

impl Cidr {
    /// Checks that the size of blocks is known; where they are cut `elsewhere` any will do.
    fn resolve(self, elsewhere: bool) -> Result<ClusterCidr, String> {
        let whole = self.cidr.prefix_len();
        let usual = if self.cidr.addr().is_ipv4() { whole.clamp(24, 30) } else { whole.clamp(64, 126) };
        let node_prefix = self.node_prefix.or(elsewhere.then_some(usual)).ok_or_else(|| {
            format!("cluster.cidrs: {} has no node_prefix: say how long the prefix of a node's block is, for example {usual}", self.cidr)
        })?;
        Ok(ClusterCidr { cidr: self.cidr, node_prefix, reserved: self.reserved })
    }
}

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Kind {
    #[default]
    Sqlite,
    Etcd,
    Kubernetes,
    Static,
}

impl Kind {
    fn name(&self) -> &'static str {
        match self {
            Self::Sqlite => "sqlite",
            Self::Etcd => "etcd",
            Self::Kubernetes => "kubernetes",
            Self::Static => "static",
        }
    }
}

/// `store.mode`.
#[derive(Debug, Clone, Copy, Deserialize)]
enum Chooser {
    #[serde(rename = "weft-ipam")]
    WeftIpam,
    #[serde(rename = "node-podcidr")]
    NodePodCidr,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Store {
    r#type: Kind,
    path: PathBuf,
    endpoints: Vec<String>,
    prefix: Option<String>,
    ca_file: Option<PathBuf>,
    cert_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
    user: Option<String>,
    password_file: Option<PathBuf>,
    mode: Option<Chooser>,
    kubeconfig: Option<PathBuf>,
    namespace: Option<String>,
    subnets: Vec<Subnet>,
    lease_ttl: Span,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            r#type: Kind::Sqlite,
            path: "/var/lib/weft/store.db".into(),
            endpoints: Vec::new(),
            prefix: None,
            ca_file: None,
            cert_file: None,
            key_file: None,
            user: None,
            password_file: None,
            mode: None,
            kubeconfig: None,
            namespace: None,
            subnets: Vec::new(),
            lease_ttl: Span(Duration::from_secs(3600)),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Gossip {
    listen_port: u16,
    seeds: Vec<SocketAddr>,
    advertise: Vec<SocketAddr>,
    probe_interval: Span,
}

impl Default for Gossip {
    fn default() -> Self {
        Self {
            listen_port: 7117,
            seeds: Vec::new(),
            advertise: Vec::new(),
            probe_interval: Span(Duration::from_secs(1)),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Underlay {
    device: Option<String>,
    address: Vec<IpAddr>,
    /// No key: the environment says the addresses.
    #[serde(skip)]
    of_cluster: bool,
    mtu: Option<u32>,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Checksum {
    #[default]
    Auto,
    On,
    Off,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Overlay {
    vni: u32,
    port: u16,
    direct_routing: bool,
    tx_checksum: Checksum,
    mtu: Option<u32>,
}

impl Default for Overlay {
    fn default() -> Self {
        Self { vni: 1, port: 8472, direct_routing: false, tx_checksum: Checksum::Auto, mtu: None }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Encrypt {
    policy: Encryption,
    tunnels: bool,
    implementation: Implementation,
    port: u16,
    detour_port: Option<u16>,
    rotate_after: Span,
    preshared: bool,
}

impl Default for Encrypt {
    fn default() -> Self {
        Self {
            policy: Encryption::Never,
            tunnels: false,
            implementation: Implementation::Auto,
            port: 51820,
            detour_port: None,
            rotate_after: Span(Duration::from_secs(24 * 3600)),
            preshared: true,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Relay {
    enabled: bool,
    ports: String,
    pair_mbit: u64,
    total_mbit: u64,
}

impl Default for Relay {
    fn default() -> Self {
        Self { enabled: true, ports: "51900-51963".into(), pair_mbit: 200, total_mbit: 1000 }
    }
}

impl Relay {
    fn resolve(self) -> Result<Option<RelayLimits>, String> {
        let Self { enabled, ports, pair_mbit, total_mbit } = self;
        let bound = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port > 0);
        let range = ports.split_once('-').and_then(|(first, last)| Some(bound(first)?..=bound(last)?));
        let range = range.filter(|range| !range.is_empty() && range.len() <= MOST_RELAY_PORTS);
        let ports = range.ok_or_else(|| {
            format!("relay.ports is \"{ports}\"; give a first and a last UDP port, at most {MOST_RELAY_PORTS} in all, for example \"51900-51963\"")
        })?;
        if pair_mbit == 0 || total_mbit == 0 {
            return Err("relay.pair_mbit and relay.total_mbit must be above 0; set relay.enabled = false to relay for nobody".into());
        }
        let bytes = |mbit: u64| mbit.saturating_mul(125_000);
        Ok(enabled.then_some(RelayLimits {
            ports,
            pair_bytes: bytes(pair_mbit),
            total_bytes: bytes(total_mbit),
        }))
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Masquerade {
    enabled: bool,
    except: Vec<IpNet>,
}

impl Default for Masquerade {
    fn default() -> Self {
        Self { enabled: true, except: Vec::new() }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Pods {
    reserved: Vec<IpNet>,
    hairpin: bool,
}

impl Default for Pods {
    fn default() -> Self {
        Self { reserved: Vec::new(), hairpin: true }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Metrics {
    listen: String,
}

impl Default for Metrics {
    fn default() -> Self {
        Self { listen: "127.0.0.1:7118".into() }
    }
}

#[derive(Debug, Default, Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Format {
    #[default]
    Text,
    Json,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Log {
    format: Format,
    filter: String,
}

impl Default for Log {
    fn default() -> Self {
        Self { format: Format::Text, filter: "info".into() }
    }
}

/// A duration as people write it: `500ms`, `30s`, `10m`, `1h`.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
struct Span(Duration);

impl TryFrom<String> for Span {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digits = text.chars().take_while(char::is_ascii_digit).count();
        let unit_ms = match &text[digits..] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => 0,
        };
        text[..digits]
            .parse::<u64>()
            .ok()
            .and_then(|count| count.checked_mul(unit_ms))
            .filter(|&ms| ms > 0)
            .map(|ms| Self(Duration::from_millis(ms)))
            .ok_or_else(|| format!("{text:?} is not a duration: write 500ms, 30s, 10m or 1h"))
    }
}

/// Reads a duration as people write it.
///
/// # Errors
/// One sentence that says how to write one.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    Span::try_from(text.to_owned()).map(|Span(duration)| duration)
}

/// Reads the text; an error is the line, counted from 1, and a sentence.
pub(super) fn read(text: &str) -> Result<Raw, (Option<usize>, String)> {
    toml::from_str(text).map_err(|error| {
        let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        (line, sentence(error.message()))
    })
}

/// Turns serde's list of known keys into the closest one.
fn sentence(message: &str) -> String {
    let mut words = message.split('`').skip(1).step_by(2);
    match (message.starts_with("unknown field"), words.next()) {
        (true, Some(unknown)) => {
            let closest = words.min_by_key(|known| distance(unknown, known));
            match closest {
                Some(known) => format!("unknown key {unknown:?}; did you mean {known:?}?"),
                None => format!("unknown key {unknown:?}; remove it"),
            }
        }
        _ => message.lines().collect::<Vec<_>>().join("; "),
    }
}

/// The Levenshtein distance: how many letters to change, add or drop.
fn distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, b) in to.bytes().enumerate() {
            let change = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

impl Store {
    fn resolve(self, node: &NodeName) -> Result<StoreKind, String> {
        let only = [
            ("endpoints", !self.endpoints.is_empty(), Kind::Etcd),
            ("prefix", self.prefix.is_some(), Kind::Etcd),
            ("ca_file", self.ca_file.is_some(), Kind::Etcd),
            ("cert_file", self.cert_file.is_some(), Kind::Etcd),
            ("key_file", self.key_file.is_some(), Kind::Etcd),
            ("user", self.user.is_some(), Kind::Etcd),
            ("password_file", self.password_file.is_some(), Kind::Etcd),
            ("mode", self.mode.is_some(), Kind::Kubernetes),
            ("kubeconfig", self.kubeconfig.is_some(), Kind::Kubernetes),
            ("namespace", self.namespace.is_some(), Kind::Kubernetes),
            ("subnets", !self.subnets.is_empty(), Kind::Static),
        ];
        if let Some((key, _, kind)) = only.iter().find(|(_, given, kind)| *given && self.r#type != *kind) {
            return Err(format!(
                "store.{key} belongs to store.type = {:?}; remove it, or change the type",
                kind.name()
            ));
        }
        match self.r#type {
            Kind::Sqlite => Ok(StoreKind::Sqlite(self.path)),
            Kind::Etcd => self.etcd(node).map(StoreKind::Etcd),
            Kind::Kubernetes => self.kubernetes(node).map(StoreKind::Kubernetes),
            Kind::Static if self.subnets.is_empty() => Err(
                "store.type = \"static\" needs the node's subnets: set store.subnets, for example [\"10.32.4.0/24\"]".into(),
            ),
            Kind::Static => Ok(StoreKind::Static(self.subnets)),
        }
    }

    fn kubernetes(self, node: &NodeName) -> Result<KubernetesOptions, String> {
        let options = KubernetesOptions {
            kubeconfig: self.kubeconfig,
            namespace: self.namespace.unwrap_or_else(|| "weft-system".into()),
            node: node.clone(),
            mode: match self.mode {
                None | Some(Chooser::WeftIpam) => Mode::WeftIpam,
                Some(Chooser::NodePodCidr) => Mode::NodePodCidr,
            },
        };
        options.check().map_err(|error| error.to_string())?;
        Ok(options)
    }

    fn etcd(self, node: &NodeName) -> Result<EtcdOptions, String> {
        let both = |first: &str, second: &str| {
            format!("store.{first} needs store.{second} too: set both, or neither")
        };
        let identity = match (self.cert_file, self.key_file) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            (Some(_), None) => return Err(both("cert_file", "key_file")),
            (None, Some(_)) => return Err(both("key_file", "cert_file")),
        };
        let user = match (self.user, self.password_file) {
            (Some(user), Some(file)) => Some((user, file)),
            (None, None) => None,
            (Some(_), None) => return Err(both("user", "password_file")),
            (None, Some(_)) => return Err(both("password_file", "user")),
        };
        let endpoints =
            self.endpoints.iter().map(|text| text.parse()).collect::<Result<_, EtcdOptionsError>>();
        let options = EtcdOptions {
            endpoints: endpoints.map_err(|error| error.to_string())?,
            prefix: self.prefix.unwrap_or_else(|| "/weft".into()),
            ca_file: self.ca_file,
            identity,
            user,
            node: node.clone(),
            abandon_after: ABANDON_LEAST.max(self.lease_ttl.0 * 24),
        };
        options.check().map_err(|error| error.to_string())?;
        Ok(options)
    }
}

impl Raw {
    /// Puts what the environment says in the place of what the text says.
    pub(super) fn replace(&mut self, overrides: Overrides) {
        self.node.name = overrides.node.or(self.node.name.take());
        self.metrics.listen = overrides.metrics.unwrap_or(std::mem::take(&mut self.metrics.listen));
        if let Some(addresses) = overrides.addresses {
            self.underlay.address = addresses;
            self.underlay.of_cluster = true;
        }
    }

    /// Checks what a single value cannot tell; an error is one sentence.
    pub(super) fn resolve(self, host: &str) -> Result<Config, String> {
        let name = match self.node.name {
            Some(name) => name,
            None => host.to_ascii_lowercase().parse::<NodeName>().map_err(|_| {
                format!("the host name {host:?} is no node name; set node.name to 1 to 63 of a-z, 0-9, '-' and '.'")
            })?,
        };
        if self.cluster.id.is_empty() || self.cluster.id.len() > 64 {
            return Err("cluster.id must have 1 to 64 bytes".into());
        }
        let elsewhere = matches!(self.store.mode, Some(Chooser::NodePodCidr));
        let cidrs = self.cluster.cidrs.into_iter().map(|cidr| cidr.resolve(elsewhere));
        let carver = Carver::new(cidrs.collect::<Result<_, _>>()?);
        let carver = carver.map_err(|error| format!("cluster.cidrs: {error}"))?;
        // Where a Secret names the keys the daemon writes the file, beside what else it remembers.
        let key_file = self.cluster.key_file.unwrap_or_else(|| match self.store.r#type {
            Kind::Kubernetes => self.node.state_dir.join("cluster.key"),
            Kind::Sqlite | Kind::Etcd | Kind::Static => "/etc/weft/cluster.key".into(),
        });
        let lease_ttl = self.store.lease_ttl.0;
        let kind = self.store.resolve(&name)?;
        if let StoreKind::Static(subnets) = &kind
            && let Some(outside) = subnets.iter().find(|subnet| !carver.allows(**subnet))
        {
            return Err(format!(
                "store.subnets: {outside} is not inside cluster.cidrs, or is reserved there; choose a subnet of the cluster"
            ));
        }
        if self.overlay.vni == 0 || self.overlay.vni >= 1 << 24 {
            return Err(format!("overlay.vni {} is out of range: use 1 to 16777215", self.overlay.vni));
        }
        let beside = if self.encryption.port == u16::MAX { u16::MAX - 1 } else { self.encryption.port + 1 };
        let detour_port = self.encryption.detour_port.unwrap_or(beside);
        if detour_port == self.encryption.port {
            return Err("encryption.detour_port must be another than encryption.port".into());
        }
        for (key, port) in [
            ("encryption.detour_port", detour_port),
            ("overlay.port", self.overlay.port),
            ("gossip.listen_port", self.gossip.listen_port),
            ("encryption.port", self.encryption.port),
        ] {
            if port == 0 {
                return Err(format!("{key} must not be 0"));
            }
        }
        let relay = self.relay.resolve()?.filter(|_| {
            // Nodes without tunnels know none that they could relay.
            self.encryption.tunnels || self.encryption.policy != Encryption::Never
        });
        let ports = [self.gossip.listen_port, self.overlay.port, self.encryption.port, detour_port];
        if let Some((relay, port)) = relay
            .as_ref()
            .and_then(|relay| Some((relay, ports.iter().find(|port| relay.ports.contains(port))?)))
        {
            return Err(format!(
                "relay.ports {}-{} contains port {port}, which weft uses for something else; choose another range",
                relay.ports.start(),
                relay.ports.end()
            ));
        }
        for (key, mtu) in [("underlay.mtu", self.underlay.mtu), ("overlay.mtu", self.overlay.mtu)] {
            if let Some(mtu) = mtu.filter(|mtu| !(MTU_MIN..=MTU_MAX).contains(mtu)) {
                return Err(format!("{key} {mtu} is out of range: use {MTU_MIN} to {MTU_MAX}"));
            }
        }
        if let Some((node, weight)) = self.site.gateways.iter().find(|(_, weight)| **weight > MAX_WEIGHT) {
            return Err(format!(
                "site.gateways: {node} has weight {weight}: use 0 to {MAX_WEIGHT}, 0 to drain it"
            ));
        }
        let v4 = self.underlay.address.iter().filter(|address| address.is_ipv4()).count();
        if v4 > 1 || self.underlay.address.len() - v4 > 1 {
            return Err("underlay.address takes at most one IPv4 and one IPv6 address".into());
        }
        let metrics = match self.metrics.listen.as_str() {
            "off" => None,
            text => Some(text.parse().map_err(|_| {
                format!(
                    "metrics.listen {text:?} is no address with a port: write \"127.0.0.1:7118\", or \"off\""
                )
            })?),
        };
        Ok(Config {
            node: NodeConfig {
                name,
                site: self.node.site,
                state_dir: self.node.state_dir,
                socket: self.node.socket,
                instance: None,
            },
            site: SiteConfig {
                key: self.site.key,
                key_file: self.site.key_file,
                gateways: self.site.gateways,
            },
            cluster: ClusterConfig { id: self.cluster.id, key_file, carver },
            store: StoreConfig { kind, lease_ttl },
            gossip: GossipConfig {
                port: self.gossip.listen_port,
                seeds: self.gossip.seeds,
                advertise: advertised(self.gossip.advertise)?,
                probe_interval: self.gossip.probe_interval.0,
            },
            underlay: UnderlayConfig {
                device: self.underlay.device,
                addresses: self.underlay.address,
                of_cluster: self.underlay.of_cluster,
                mtu: self.underlay.mtu,
            },
            overlay: OverlayConfig {
                vni: self.overlay.vni,
                port: self.overlay.port,
                direct_routing: self.overlay.direct_routing,
                tx_checksum: match self.overlay.tx_checksum {
                    Checksum::Auto => TxChecksum::Auto,
                    Checksum::On => TxChecksum::On,
                    Checksum::Off => TxChecksum::Off,
                },
                mtu: self.overlay.mtu,
            },
            encryption: EncryptionConfig {
                policy: self.encryption.policy,
                tunnels: self.encryption.tunnels || self.encryption.policy != Encryption::Never,
                implementation: self.encryption.implementation,
                port: self.encryption.port,
                detour_port,
                rotate_after: self.encryption.rotate_after.0,
                preshared: self.encryption.preshared,
            },
            relay,
            masquerade: MasqueradeConfig { enabled: self.masquerade.enabled, except: self.masquerade.except },
            pods: PodsConfig { reserved: self.pods.reserved, hairpin: self.pods.hairpin },
            metrics,
            log: LogConfig { json: self.log.format == Format::Json, filter: self.log.filter },
        })
    }
}

/// What `gossip.advertise` may say: an address that others can send to, one a family.
fn advertised(addresses: Vec<SocketAddr>) -> Result<Vec<SocketAddr>, String> {
    for (place, address) in addresses.iter().enumerate() {
        if address.ip().is_unspecified() || address.ip().is_multicast() || address.port() == 0 {
            return Err(format!(
                "gossip.advertise: nobody can send to {address}; write the address and port that other sites reach"
            ));
        }
        if addresses[..place].iter().any(|earlier| earlier.is_ipv4() == address.is_ipv4()) {
            return Err(format!(
                "gossip.advertise has {address} as a second address of its family; keep one"
            ));
        }
    }
    Ok(addresses)
}
