//! The file as it is written: every key optional, every value still text or number.

mod store;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;
use weft_ipam::carve::{Carver, ClusterCidr};
use weft_wire::gateway::MAX_WEIGHT;
use weft_wire::types::{NodeName, PublicKey, SiteName};

use crate::kernel::Implementation;
use crate::plan::model::Encryption;
use crate::relay::RelayLimits;

use super::{
    ClusterConfig, Config, EncryptionConfig, GossipConfig, LogConfig, MasqueradeConfig, NodeConfig,
    OverlayConfig, Overrides, PodsConfig, SiteConfig, TxChecksum, UnderlayConfig,
};
use store::Store;

/// One VXLAN header, UDP, IPv6 and Ethernet around the least MTU that IPv6 allows (RFC 8200 s5).
const MTU_MIN: u32 = 1280;
const MTU_MAX: u32 = 65_535;
/// Each port of the relay takes a socket a family.
const MOST_RELAY_PORTS: usize = 1024;

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

impl Node {
    fn resolve(self, host: &str) -> Result<NodeConfig, String> {
        let Self { name, site, state_dir, socket } = self;
        let of_host = || {
            host.to_ascii_lowercase().parse().map_err(|_| {
                format!("the host name {host:?} is no node name; set node.name to 1 to 63 of a-z, 0-9, '-' and '.'")
            })
        };
        Ok(NodeConfig { name: name.map_or_else(of_host, Ok)?, site, state_dir, socket, instance: None })
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Site {
    key: Option<PublicKey>,
    key_file: Option<PathBuf>,
    gateways: BTreeMap<NodeName, u8>,
}

impl Site {
    fn resolve(self) -> Result<SiteConfig, String> {
        let Self { key, key_file, gateways } = self;
        match gateways.iter().find(|(_, weight)| **weight > MAX_WEIGHT) {
            Some((node, weight)) => Err(format!(
                "site.gateways: {node} has weight {weight}: use 0 to {MAX_WEIGHT}, 0 to drain it"
            )),
            None => Ok(SiteConfig { key, key_file, gateways }),
        }
    }
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

impl Cluster {
    fn resolve(self, store: &Store, state_dir: &Path) -> Result<ClusterConfig, String> {
        let Self { id, key_file, cidrs } = self;
        if id.is_empty() || id.len() > 64 {
            return Err("cluster.id must have 1 to 64 bytes".into());
        }
        let cidrs = cidrs.into_iter().map(|cidr| cidr.resolve(store.is_cut_elsewhere()));
        let carver = Carver::new(cidrs.collect::<Result<_, _>>()?);
        let carver = carver.map_err(|error| format!("cluster.cidrs: {error}"))?;
        Ok(ClusterConfig {
            id,
            key_file: key_file.unwrap_or_else(|| store.usual_key_file(state_dir)),
            carver,
        })
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

impl Gossip {
    fn resolve(self) -> Result<GossipConfig, String> {
        let Self { listen_port: port, seeds, advertise, probe_interval: Span(probe_interval) } = self;
        not_zero("gossip.listen_port", port)?;
        Ok(GossipConfig { port, seeds, advertise: advertised(advertise)?, probe_interval })
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

impl Underlay {
    fn resolve(self) -> Result<UnderlayConfig, String> {
        let Self { device, address: addresses, of_cluster, mtu } = self;
        check_mtu("underlay.mtu", mtu)?;
        let v4 = addresses.iter().filter(|address| address.is_ipv4()).count();
        if v4 > 1 || addresses.len() - v4 > 1 {
            return Err("underlay.address takes at most one IPv4 and one IPv6 address".into());
        }
        Ok(UnderlayConfig { device, addresses, of_cluster, mtu })
    }
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

impl Overlay {
    fn resolve(self) -> Result<OverlayConfig, String> {
        let Self { vni, port, direct_routing, tx_checksum, mtu } = self;
        if vni == 0 || vni >= 1 << 24 {
            return Err(format!("overlay.vni {vni} is out of range: use 1 to 16777215"));
        }
        not_zero("overlay.port", port)?;
        check_mtu("overlay.mtu", mtu)?;
        let tx_checksum = match tx_checksum {
            Checksum::Auto => TxChecksum::Auto,
            Checksum::On => TxChecksum::On,
            Checksum::Off => TxChecksum::Off,
        };
        Ok(OverlayConfig { vni, port, direct_routing, tx_checksum, mtu })
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

impl Encrypt {
    fn resolve(self) -> Result<EncryptionConfig, String> {
        let Self { policy, tunnels, implementation, port, detour_port, rotate_after, preshared } = self;
        let beside = if port == u16::MAX { u16::MAX - 1 } else { port + 1 };
        let detour_port = detour_port.unwrap_or(beside);
        if detour_port == port {
            return Err("encryption.detour_port must be another than encryption.port".into());
        }
        not_zero("encryption.detour_port", detour_port)?;
        not_zero("encryption.port", port)?;
        Ok(EncryptionConfig {
            policy,
            tunnels: tunnels || policy != Encryption::Never,
            implementation,
            port,
            detour_port,
            rotate_after: rotate_after.0,
            preshared,
        })
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
    /// Resolves it for a node that uses these ports for something else.
    fn resolve(self, used: &[u16]) -> Result<Option<RelayLimits>, String> {
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
        if !enabled {
            return Ok(None);
        }
        if let Some(port) = used.iter().find(|port| ports.contains(port)) {
            return Err(format!(
                "relay.ports {}-{} contains port {port}, which weft uses for something else; choose another range",
                ports.start(),
                ports.end()
            ));
        }
        let bytes = |mbit: u64| mbit.saturating_mul(125_000);
        Ok(Some(RelayLimits { ports, pair_bytes: bytes(pair_mbit), total_bytes: bytes(total_mbit) }))
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

impl Metrics {
    fn resolve(self) -> Result<Option<SocketAddr>, String> {
        match self.listen.as_str() {
            "off" => Ok(None),
            text => text.parse().map(Some).map_err(|_| {
                format!(
                    "metrics.listen {text:?} is no address with a port: write \"127.0.0.1:7118\", or \"off\""
                )
            }),
        }
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
        let node = self.node.resolve(host)?;
        let cluster = self.cluster.resolve(&self.store, &node.state_dir)?;
        let store = self.store.resolve(&node.name, &cluster.carver)?;
        let overlay = self.overlay.resolve()?;
        let encryption = self.encryption.resolve()?;
        let gossip = self.gossip.resolve()?;
        let relay = match encryption.tunnels {
            true => {
                self.relay.resolve(&[gossip.port, overlay.port, encryption.port, encryption.detour_port])?
            }
            // Nodes without tunnels know none that they could relay.
            false => self.relay.resolve(&[])?.and(None),
        };
        Ok(Config {
            site: self.site.resolve()?,
            underlay: self.underlay.resolve()?,
            metrics: self.metrics.resolve()?,
            masquerade: MasqueradeConfig { enabled: self.masquerade.enabled, except: self.masquerade.except },
            pods: PodsConfig { reserved: self.pods.reserved, hairpin: self.pods.hairpin },
            log: LogConfig { json: self.log.format == Format::Json, filter: self.log.filter },
            node,
            cluster,
            store,
            gossip,
            overlay,
            encryption,
            relay,
        })
    }
}

fn not_zero(key: &str, port: u16) -> Result<(), String> {
    if port == 0 { Err(format!("{key} must not be 0")) } else { Ok(()) }
}

fn check_mtu(key: &str, mtu: Option<u32>) -> Result<(), String> {
    match mtu.filter(|mtu| !(MTU_MIN..=MTU_MAX).contains(mtu)) {
        Some(mtu) => Err(format!("{key} {mtu} is out of range: use {MTU_MIN} to {MTU_MAX}")),
        None => Ok(()),
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
