//! What there is to say about a kernel, as far as weft cares. Plain values; no decisions.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use weft_wire::mesh::{Carrier, TunnelFacts};
use weft_wire::pair::PairSecret;
use weft_wire::preshared::PresharedKey;
use weft_wire::seal::KeyRing;
use weft_wire::types::{MacAddress, NodeName, SiteName, Subnet, TunnelKey};

use super::table::Table as NftTable;

/// The bridge that all pods of the node join.
pub const BRIDGE: &str = "weft0";
/// The WireGuard device.
pub const WIREGUARD: &str = "weft-wg";
/// A second one of the kernel, only while keys change (docs/decisions/0008-kernel-wireguard.md).
pub const DETOUR: &str = "weft-wg1";
/// The VXLAN device over an IPv4 underlay.
pub const VXLAN_V4: &str = "weft-vx4";
/// The VXLAN device over an IPv6 underlay.
pub const VXLAN_V6: &str = "weft-vx6";
/// Marks weft's routes (`rtm_protocol`, linux/rtnetlink.h; above 4 and unassigned there).
pub const PROTOCOL: u8 = 117;
/// The least metric of weft's routes, and by how many the greatest is above it. A person's or another program's route to
/// the same destination (they use 0, or 1024 for IPv6) stays in force: weft neither replaces it nor is replaced.
pub const METRICS: (u32, u32) = (2117, 4096);

/// Returns the metric of the route to a destination: always the same one, so that the route is replaced in place.
///
/// Not one for all, because the kernel looks for an equal next hop before it takes a new one, by a hash of device,
/// protocol, source and metric but not of the gateway (net/ipv4/fib_semantics.c, `fib_find_info`): with one metric each
/// route is compared with all before it. Subnets of one size that follow each other get metrics that do
/// (docs/decisions/0006-metrics-spread-next-hops.md).
pub fn metric(destination: IpNet) -> u32 {
    let (least, count) = METRICS;
    let host_bits = u32::from(destination.max_prefix_len() - destination.prefix_len());
    let number = match destination {
        IpNet::V4(net) => u128::from(u32::from(net.network())),
        IpNet::V6(net) => u128::from(net.network()),
    }
    .checked_shr(host_bits)
    .unwrap_or(0);
    least + u32::try_from(number % u128::from(count)).expect("a remainder is less than its divisor")
}

/// Returns whether a device name is one that weft gives to a pod's host end: `weft` and 8 hex digits.
pub fn is_host_veth(name: &str) -> bool {
    name.strip_prefix("weft")
        .is_some_and(|rest| rest.len() == 8 && rest.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Everything that a pass reads beside the kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct Inputs {
    /// The node.
    pub node: NodeName,
    /// Its site.
    pub site: SiteName,
    /// What the operator chose.
    pub dataplane: Dataplane,
    /// What carries the tunnels.
    pub underlay: Underlay,
    /// The node's own subnets.
    pub subnets: Vec<Subnet>,
    /// The peers to have routes to.
    pub peers: Vec<Peer>,
    /// The host ends of the pods.
    pub attachments: Vec<HostVeth>,
    /// Host ends that an earlier pass found and no pod accounts for: they go. A pod may be attached between
    /// the making of the inputs and the look at the kernel, so what one pass finds unknown is not a stray yet.
    pub strays: BTreeSet<String>,
    /// Whom there are sessions with; the kernel is asked for them while there is a detour.
    pub sessions: Sessions,
    /// Where the tunnels of peers are entered whose records do not say so.
    pub ways: BTreeMap<NodeName, SocketAddr>,
    /// Those of them whose sessions are of no use: they begin anew where the way is another.
    pub anew: BTreeSet<NodeName>,
}

/// What the operator chose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dataplane {
    /// The VXLAN network identifier.
    pub vni: u32,
    /// The VXLAN UDP port.
    pub vxlan_port: u16,
    /// Whether peers on the same link are reached without a tunnel.
    pub direct_routing: bool,
    /// Whether pods leave the cluster under the node's address.
    pub masquerade: bool,
    /// The pod ranges of the cluster.
    pub cluster_cidrs: Vec<IpNet>,
    /// Destinations outside that see pod addresses all the same.
    pub non_masquerade: Vec<IpNet>,
    /// The MTU of pods, where the operator chose one.
    pub mtu: Option<u32>,
    /// Whether the VXLAN devices leave checksums to the network card.
    pub tx_checksum: bool,
    /// Whether a pod reaches itself through a service address.
    pub hairpin: bool,
    /// Between which nodes pod traffic must be encrypted.
    pub encryption: Encryption,
    /// The cluster keys, where handshakes need a secret made from one.
    pub preshared: Option<KeyRing>,
    /// The secrets that this node's site shares with others, the latest first: mixed in as well.
    pub pairs: BTreeMap<SiteName, Vec<PairSecret>>,
    /// The key of the node's tunnels. With one, the WireGuard device is there and the MTU of pods leaves room for it.
    pub tunnel: Option<TunnelKey>,
    /// Who carries the tunnels, if there are any.
    pub carrier: Carrier,
    /// A second way, while keys change.
    pub detour: Option<OwnDetour>,
}

/// This node's second way into its tunnels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnDetour {
    /// The key there.
    pub key: TunnelKey,
    /// The node's other key is about to change: what goes and comes is to take this way.
    pub preferred: bool,
    /// Who may come this way.
    pub peers: BTreeSet<NodeName>,
}

/// The sessions that packets can go by, each named by this node's key and the peer's.
pub type Sessions = BTreeSet<(TunnelKey, TunnelKey)>;

/// Between which nodes pod traffic must be encrypted. A pair keeps the stricter of its two policies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encryption {
    /// None.
    #[default]
    Never,
    /// Nodes of different sites.
    CrossSite,
    /// All.
    Always,
}

impl fmt::Display for Encryption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Never => "never",
            Self::CrossSite => "cross-site",
            Self::Always => "always",
        })
    }
}

impl Encryption {
    /// Returns whether the policy asks for encryption between two sites.
    pub fn demands(self, one: &SiteName, other: &SiteName) -> bool {
        match self {
            Self::Never => false,
            Self::CrossSite => one != other,
            Self::Always => true,
        }
    }
}

/// The device that carries the tunnels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// Its name.
    pub device: String,
    /// Its index.
    pub index: u32,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// The node's addresses on it, at most one a family, with the prefix of the link.
    pub addresses: Vec<IpNet>,
    /// The host checks the source of all that comes in against its routes, strictly (RFC 3704 s2.2;
    /// `net.ipv4.conf.all.rp_filter` is 1).
    pub strict_sources: bool,
    /// The kind of the device, where it is a tunnel itself.
    pub tunnel: Option<String>,
}

/// Another node, as far as the kernel is concerned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its name.
    pub node: NodeName,
    /// Its pod subnets.
    pub subnets: Vec<Subnet>,
    /// Its tunnel endpoints, at most one a family.
    pub underlay: Vec<IpAddr>,
    /// The Ethernet address of its VXLAN device over IPv4.
    pub vtep_v4: Option<MacAddress>,
    /// The Ethernet address of its VXLAN device over IPv6.
    pub vtep_v6: Option<MacAddress>,
    /// Its VXLAN network identifier.
    pub vni: u32,
    /// Its VXLAN UDP port.
    pub vxlan_port: u16,
    /// The MTU of its underlay in bytes.
    pub mtu: u32,
    /// Its site.
    #[serde(default = "default_site")]
    pub site: SiteName,
    /// What it demands of its pairs.
    #[serde(default)]
    pub encryption: Encryption,
    /// How to speak WireGuard with it.
    #[serde(default)]
    pub tunnel: Option<TunnelFacts>,
    /// The node carries what its site exchanges with others: with this weight.
    #[serde(default)]
    pub gateway: Option<u8>,
    /// The node by which it is reached, if not by itself: a gateway of its site or of this one.
    #[serde(skip)]
    pub via: Option<NodeName>,
    /// What was measured that the path to it carries inside the tunnel, in bytes, where that is less than its devices do.
    #[serde(default)]
    pub path_mtu: Option<u32>,
}

/// The site of peers that were remembered before peers had sites.
fn default_site() -> SiteName {
    "default".parse().expect("a valid name")
}

/// The host's end of a pod's veth pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostVeth {
    /// Its name.
    pub ifname: String,
    /// Its MTU in bytes.
    pub mtu: u32,
}

/// How pod traffic reaches a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// Routed over the common link.
    Direct,
    /// In VXLAN.
    Vxlan,
    /// Encrypted in WireGuard.
    WireGuard,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Direct => "direct",
            Self::Vxlan => "vxlan",
            Self::WireGuard => "wireguard",
        })
    }
}

/// A route that the plan wants, with why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedRoute {
    /// The destination.
    pub prefix: IpNet,
    /// Whose subnet it is.
    pub node: NodeName,
    /// How it is reached.
    pub transport: Transport,
    /// The route as the kernel has it; nothing where there is no way.
    pub route: Option<Route>,
    /// What a packet may have by the devices at both ends, in bytes.
    pub room: u32,
    /// What the way adds to a packet, in bytes.
    pub overhead: u32,
    /// Why it is so, for people.
    pub reason: String,
}

/// What the kernel should hold.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Desired {
    /// The objects.
    pub state: State,
    /// The nftables table whose digest is in `state`.
    pub nft: Option<NftTable>,
    /// Every peer subnet with its way.
    pub routes: Vec<PlannedRoute>,
    /// The MTU of pods in bytes.
    pub pod_mtu: u32,
    /// The host ends that should be there; they are mended, never made.
    pub veths: BTreeMap<String, u32>,
    /// The host ends to remove.
    pub strays: BTreeSet<String>,
    /// Whether host ends reflect to themselves.
    pub hairpin: bool,
    /// Settings that change only where they have a certain value: from what, to what.
    pub amend: BTreeMap<String, (String, String)>,
    /// How many peers do not go the way that they should yet, since there is no session on it.
    pub pending: usize,
    /// What a person should hear.
    pub warnings: Vec<String>,
}

/// What the kernel holds, as far as it carries weft's mark, and the devices that matter to it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Actual {
    /// The objects with weft's mark.
    pub state: State,
    /// The host ends of pods.
    pub veths: BTreeMap<String, VethState>,
}

/// The objects of weft's kinds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct State {
    /// The bridge and the VXLAN devices, by name.
    pub links: BTreeMap<String, Link>,
    /// The addresses on them: device and address with its prefix length.
    pub addresses: BTreeSet<(String, IpNet)>,
    /// The permanent neighbours on them: (device, address) to Ethernet address.
    pub neighbours: BTreeMap<(String, IpAddr), MacAddress>,
    /// The permanent forwarding entries of the VXLAN devices: (device, Ethernet address) to endpoint.
    pub fdb: BTreeMap<(String, MacAddress), IpAddr>,
    /// The routes with weft's protocol number, by destination and metric.
    pub routes: BTreeMap<(IpNet, u32), Route>,
    /// Whether the VXLAN devices leave checksums to the card, by name.
    pub offloads: BTreeMap<String, bool>,
    /// Kernel settings by path below `/proc/sys`.
    pub sysctls: BTreeMap<String, String>,
    /// The digest of the nftables table.
    pub nft: Option<String>,
    /// The tunnels of each WireGuard device; nothing where none run.
    pub tunnels: BTreeMap<String, Tunnels>,
}

/// The tunnels of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tunnels {
    /// The node's own key.
    pub key: TunnelKey,
    /// The MTU of the device in bytes.
    pub mtu: u32,
    /// The peers by their keys.
    pub peers: BTreeMap<TunnelKey, TunnelPeer>,
}

/// A peer of the WireGuard device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelPeer {
    /// Its name.
    pub node: NodeName,
    /// Where it listens.
    pub endpoint: SocketAddr,
    /// Where the endpoint is another than before, what there is of a session is of no use.
    pub anew: bool,
    /// What is routed to it, and what its packets may come from.
    pub prefixes: Vec<IpNet>,
    /// Mixed into handshakes with it.
    pub preshared: Option<PresharedKey>,
}

/// A device of weft's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// What it is.
    pub kind: LinkKind,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// Its Ethernet address.
    pub mac: MacAddress,
}

/// The kinds of device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// The pods' bridge.
    Bridge,
    /// A VXLAN device; none of these can be changed once it exists.
    Vxlan(Vxlan),
    /// The device of the tunnels: WireGuard's where the kernel carries them, or else a TUN, which weftd makes and reads.
    /// Which of them, the kernel's shell knows; one of the other kind is something else.
    Tun,
    /// Something else with weft's name: it is replaced.
    Other(String),
}

/// The attributes of a VXLAN device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    /// The network identifier.
    pub vni: u32,
    /// The UDP port.
    pub port: u16,
    /// The source of the tunnels.
    pub local: IpAddr,
    /// The index of the underlay device.
    pub underlay: u32,
    /// Whether it learns addresses from traffic; weft's do not.
    pub learning: bool,
}

/// A route in the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The device; empty for what is found to have none, such as a blackhole.
    pub dev: String,
    /// The next hop; taken as on the link.
    pub via: Option<IpAddr>,
    /// The source address of the node's own packets.
    pub source: Option<IpAddr>,
    /// The MTU in bytes, where the route has its own.
    pub mtu: Option<u32>,
}

/// The host's end of a pod's pair, as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VethState {
    /// Whether it is a port of the bridge.
    pub bridged: bool,
    /// Whether its port reflects.
    pub hairpin: bool,
    /// Whether it is up.
    pub up: bool,
    /// Its MTU in bytes.
    pub mtu: u32,
}

/// One change to the kernel. Each is idempotent or names an object that was just seen.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// Make a device.
    AddLink(String, Link),
    /// Change MTU, address or state of a device in place.
    SetLink(String, Link),
    /// Remove a device.
    DelLink(String),
    /// Add an address.
    AddAddress(String, IpNet),
    /// Remove an address.
    DelAddress(String, IpNet),
    /// Add or replace a neighbour.
    SetNeighbour(String, IpAddr, MacAddress),
    /// Remove a neighbour.
    DelNeighbour(String, IpAddr),
    /// Add or replace a forwarding entry.
    SetFdb(String, MacAddress, IpAddr),
    /// Remove a forwarding entry.
    DelFdb(String, MacAddress, IpAddr),
    /// Add or replace a route.
    SetRoute(IpNet, u32, Route),
    /// Remove a route.
    DelRoute(IpNet, u32, Route),
    /// Switch TX checksum offload of a device.
    SetOffload(String, bool),
    /// Write a kernel setting.
    SetSysctl(String, String),
    /// Make or replace the nftables table, whole.
    SetNft(NftTable),
    /// Remove the nftables table.
    DelNft,
    /// Replace the peers of a WireGuard device, all at once; sessions of those that stay go on.
    SetTunnel(String, Tunnels),
    /// End the tunnels of a device.
    DelTunnel(String),
    /// Mend the host end of a pod: bridge, hairpin, state, MTU.
    SetVeth(String, VethState),
    /// Remove the host end of a pod that is gone.
    DelVeth(String),
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddLink(name, _) => write!(f, "add device {name}"),
            Self::SetLink(name, _) => write!(f, "set device {name}"),
            Self::DelLink(name) | Self::DelVeth(name) => write!(f, "remove device {name}"),
            Self::AddAddress(dev, address) => write!(f, "add address {address} dev {dev}"),
            Self::DelAddress(dev, address) => write!(f, "remove address {address} dev {dev}"),
            Self::SetNeighbour(dev, address, mac) => {
                write!(f, "set neighbour {address} lladdr {mac} dev {dev}")
            }
            Self::DelNeighbour(dev, address) => write!(f, "remove neighbour {address} dev {dev}"),
            Self::SetFdb(dev, mac, to) => write!(f, "set fdb {mac} dst {to} dev {dev}"),
            Self::DelFdb(dev, mac, _) => write!(f, "remove fdb {mac} dev {dev}"),
            Self::SetRoute(prefix, _, route) => write!(f, "set route {prefix} dev {}", route.dev),
            Self::DelRoute(prefix, ..) => write!(f, "remove route {prefix}"),
            Self::SetOffload(dev, on) => {
                write!(f, "set tx checksum offload {} dev {dev}", if *on { "on" } else { "off" })
            }
            Self::SetSysctl(path, value) => write!(f, "set sysctl {path} = {value}"),
            Self::SetNft(_) => write!(f, "set nftables table inet weft"),
            Self::DelNft => write!(f, "remove nftables table inet weft"),
            Self::SetTunnel(dev, tunnels) => write!(f, "set the {} peers of {dev}", tunnels.peers.len()),
            Self::DelTunnel(dev) => write!(f, "end the tunnels of {dev}"),
            Self::SetVeth(name, _) => write!(f, "set pod device {name}"),
        }
    }
}
