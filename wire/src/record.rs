//! What a node says about itself, signed with its ed25519 key.
//!
//! A record is parsed once and kept beside the bytes that its node signed, so that it can be relayed as it
//! is, with fields that this version does not know. Whether the node may own the subnets it names is not
//! decided here (`mesh::routes`). Invariant: a [`SignedRecord`] has been verified, or was signed here.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ed25519_dalek::{Signature, Signer, VerifyingKey};
use prost::Message;
use serde::{Deserialize, Serialize};

use crate::gateway::MAX_WEIGHT;
use crate::mesh::proto;
use crate::pair::MAX_PAIRS;
use crate::seal::{KeyId, MAX_KEYS, RingName};
use crate::site::{Certificate, Certified};
use crate::types::{Epoch, MacAddress, NodeName, PublicKey, SiteName, Subnet, TunnelKey};

mod bytes;
#[cfg(fuzzing)]
pub mod fuzz;
mod key;
mod reach;

use bytes::{ip_from_bytes, ip_to_bytes, mac_from_bytes};
pub(crate) use bytes::{parse_all, socket_from_bytes, socket_to_bytes, subnet_from_bytes, subnet_to_bytes};
use key::endorsement_statement;
pub use key::{NodeKey, NodeKeyError};
pub use reach::{MAX_KEEPERS, MAX_OUTSIDE, Reach, Reachability};

/// The most bytes of a signed record: one fits a datagram beside any other content.
pub const MAX_RECORD: usize = 880;
/// The most subnets that a record names.
pub const MAX_SUBNETS: usize = 8;
/// The most gossip addresses that a record names.
pub const MAX_GOSSIP: usize = 4;
/// The most tunnel endpoints that a record names: one a family.
pub const MAX_UNDERLAY: usize = 2;
/// The most endorsements that a record carries: so many key rotations may an absent node miss.
pub const MAX_ENDORSEMENTS: usize = 3;

const SIGNATURE: usize = 64;
const RECORD_DOMAIN: &[u8] = b"weft record v1\0";

/// What a node offers to its peers; [`crate::mesh::Mesh::announce`] signs it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// The pod subnets, each with the epoch of its lease; at most [`MAX_SUBNETS`].
    pub subnets: Vec<LeasedSubnet>,
    /// Where the node receives gossip, IPv4 or IPv6, the preferred first; at most [`MAX_GOSSIP`].
    pub gossip: Vec<SocketAddr>,
    /// The tunnel endpoints, at most one a family.
    pub underlay: Vec<IpAddr>,
    /// The Ethernet address of the VXLAN device over IPv4.
    pub vtep_v4: Option<MacAddress>,
    /// The Ethernet address of the VXLAN device over IPv6.
    pub vtep_v6: Option<MacAddress>,
    /// The VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// The UDP port of VXLAN.
    pub vxlan_port: u16,
    /// The MTU of the underlay, in bytes.
    pub mtu: u16,
    /// What the node can do.
    pub capabilities: Capabilities,
    /// The cluster keys that the node opens datagrams with, the one that it seals with first; at most [`MAX_KEYS`]. The mesh puts
    /// them in.
    pub keys: Vec<KeyId>,
    /// Which cluster keys the node goes to, or has, where something says which. The mesh puts it in.
    pub follows: Option<RingName>,
    /// How to speak WireGuard with the node, if it does.
    pub tunnel: Option<TunnelFacts>,
    /// The node carries what its site exchanges with others, with this weight; 0 while it is being drained. At most
    /// [`MAX_WEIGHT`].
    pub gateway: Option<u8>,
    /// The word of the node's site for the key and the subnets; the mesh puts it in.
    pub certificate: Option<Certificate>,
    /// How other sites reach the node. The mesh puts in all but what the operator says (`outside`).
    pub reachability: Reachability,
    /// How the node's tunnels are reached from other sites.
    pub tunnel_reach: TunnelReach,
}

/// How a node's tunnels are reached from other sites. Nobody's word is behind it but the node's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TunnelReach {
    /// Where its packets come from, at most one a family; empty where nothing translates them.
    pub reflexive: Vec<SocketAddr>,
    /// What stands before it.
    pub mapping: TunnelMapping,
    /// How much room its relay has, in percent; 0 where it relays for nobody.
    pub relay_room: u8,
}

/// What stands before a node's tunnels (RFC 4787 s4.1).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum TunnelMapping {
    /// Nobody has said.
    #[default]
    Unknown,
    /// Nothing that translates.
    None,
    /// The same address and port for every destination.
    Independent,
    /// Others for other destinations: what one peer sees is of no use to another.
    Dependent,
}

impl TunnelMapping {
    /// Whether the addresses of the record are of no use to other sites.
    pub fn translates(self) -> bool {
        matches!(self, Self::Independent | Self::Dependent)
    }

    /// Returns the mapping as people are told of it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::None => "none",
            Self::Independent => "endpoint-independent",
            Self::Dependent => "endpoint-dependent",
        }
    }
}

/// How to speak WireGuard with a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelFacts {
    /// Its public key.
    pub key: TunnelKey,
    /// Its UDP port, at each of its tunnel endpoints; not 0.
    pub port: u16,
    /// The cluster keys that it makes pre-shared keys from, the sealing one first; none where it uses no such keys. At most
    /// [`MAX_KEYS`].
    #[serde(default)]
    pub preshared: Vec<KeyId>,
    /// The secrets that its site shares with others and that it makes pre-shared keys from; at most [`MAX_PAIRS`]. The mesh puts
    /// them in.
    #[serde(default)]
    pub pairs: Vec<KeyId>,
    /// Who carries its tunnels, where it says so.
    #[serde(default)]
    pub carrier: Option<Carrier>,
    /// Another key at which it is reached while keys change.
    #[serde(default)]
    pub detour: Option<Detour>,
}

/// Who carries a node's tunnels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Carrier {
    /// The daemon: its tunnels take packets under two keys of a node at once.
    UserSpace,
    /// The kernel: a device takes the packets of an address under one key.
    Kernel,
}

impl fmt::Display for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::UserSpace => "user-space",
            Self::Kernel => "kernel",
        })
    }
}

/// A second way into a node's tunnels, while keys change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detour {
    /// The public key there.
    pub key: TunnelKey,
    /// The UDP port; not 0.
    pub port: u16,
    /// The node's other key is about to change: peers are to come this way.
    pub preferred: bool,
}

/// A pod subnet and the fencing epoch of the lease on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeasedSubnet {
    /// The subnet.
    pub subnet: Subnet,
    /// The epoch of its lease.
    pub epoch: Epoch,
}

/// A set of things a node can do; bits that this version does not know are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// Carries pod traffic over VXLAN.
    pub const VXLAN: Self = Self(1);
    /// Routes pod traffic without a tunnel to a peer that is one hop away.
    pub const DIRECT: Self = Self(1 << 1);
    /// Exchanges clear pod traffic with no other node.
    pub const ENCRYPT_ALWAYS: Self = Self(1 << 2);
    /// Exchanges clear pod traffic with no node of another site.
    pub const ENCRYPT_CROSS_SITE: Self = Self(1 << 3);

    /// Returns whether all of `other` is in the set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for Capabilities {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// A node's record, as its signer wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    /// Whose record it is.
    pub node: NodeName,
    /// The node's site.
    pub site: SiteName,
    /// The key that signed the record.
    pub key: PublicKey,
    /// Orders the records of a node: a higher version replaces a lower one.
    pub version: u64,
    /// What the node offers.
    pub facts: Facts,
    /// How earlier keys of the node vouch for `key`, the latest first.
    pub endorsements: Vec<Endorsement>,
    /// Whether the node has left the mesh on purpose.
    pub left: bool,
}

impl NodeRecord {
    /// Returns whether the record's key follows `earlier` through its endorsements.
    pub fn succeeds(&self, earlier: &PublicKey) -> bool {
        self.endorsements.iter().any(|endorsement| endorsement.key == *earlier)
    }

    /// Gives up one thing that the record says, the least needed first; returns whether there was one.
    fn shorten(&mut self) -> bool {
        let Facts { tunnel_reach, reachability, tunnel, gossip, .. } = &mut self.facts;
        self.endorsements.pop().is_some()
            || tunnel.as_mut().is_some_and(|tunnel| tunnel.pairs.pop().is_some())
            // The names, subnets and addresses of few nodes are that long: they are reached through relays then.
            || tunnel_reach.reflexive.pop().is_some()
            || reachability.shorten()
            // And fewer have many keys at once: a pair takes its secret from one of the first.
            || tunnel.as_mut().is_some_and(|tunnel| drop_last_but_one(&mut tunnel.preshared))
            || drop_last_but_one(gossip)
    }
}

fn drop_last_but_one<T>(list: &mut Vec<T>) -> bool {
    list.len() > 1 && list.pop().is_some()
}

/// An earlier key's signature over the key that follows it.
#[derive(Clone, PartialEq, Eq)]
pub struct Endorsement {
    /// The earlier key.
    pub key: PublicKey,
    /// Its signature over the node's name and the next key.
    pub signature: [u8; SIGNATURE],
}

impl fmt::Debug for Endorsement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endorsement(by {:?})", self.key)
    }
}

/// A record and the bytes that its node signed.
#[derive(Clone, PartialEq, Eq)]
pub struct SignedRecord {
    record: NodeRecord,
    bytes: Box<[u8]>,
    signature: [u8; SIGNATURE],
}

impl SignedRecord {
    /// Signs what the node says about itself.
    ///
    /// Surplus addresses and subnets (see the limits of [`Facts`]) are left out, and so is what is needed least, the oldest
    /// endorsements first, if the record would be longer than [`MAX_RECORD`].
    pub fn sign(
        key: &NodeKey,
        cluster: &str,
        node: NodeName,
        site: SiteName,
        version: u64,
        mut facts: Facts,
        left: bool,
    ) -> Self {
        facts.subnets.truncate(MAX_SUBNETS);
        facts.gossip.truncate(MAX_GOSSIP);
        facts.underlay.truncate(MAX_UNDERLAY);
        facts.keys.truncate(MAX_KEYS);
        facts.tunnel_reach.reflexive.truncate(MAX_UNDERLAY);
        facts.tunnel.iter_mut().for_each(|tunnel| tunnel.pairs.truncate(MAX_PAIRS));
        facts.reachability.truncate();
        let endorsements = key.endorsements.clone();
        let mut record = NodeRecord { node, site, key: key.public(), version, facts, endorsements, left };
        let mut bytes = to_proto(&record).encode_to_vec();
        while bytes.len() + SIGNATURE > MAX_RECORD && record.shorten() {
            bytes = to_proto(&record).encode_to_vec();
        }
        let signature = key.secret.sign(&signed_statement(cluster, &bytes)).to_bytes();
        Self { record, bytes: bytes.into(), signature }
    }

    /// Returns the record.
    pub fn record(&self) -> &NodeRecord {
        &self.record
    }

    /// Orders two records of one key: the version, then the signature's first bytes, so that every node
    /// picks the same of two records that a node signed by mistake with one version.
    pub(crate) fn order(&self) -> (u64, u32) {
        (self.record.version, tag(&self.signature))
    }

    pub(crate) fn to_proto(&self) -> proto::SignedRecord {
        proto::SignedRecord { record: self.bytes.to_vec(), signature: self.signature.to_vec() }
    }
}

impl fmt::Debug for SignedRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SignedRecord({} v{} by {:?})", self.record.node, self.record.version, self.record.key)
    }
}

/// A record that parses, whose signature has not been looked at: checking it costs about 50 us.
#[derive(Debug, Clone)]
pub struct ClaimedRecord(SignedRecord);

impl ClaimedRecord {
    /// Returns what the record claims.
    pub fn claim(&self) -> &NodeRecord {
        &self.0.record
    }

    /// Verifies the signature and every endorsement.
    pub fn verify(self, cluster: &str) -> Result<SignedRecord, BadSignature> {
        let Self(signed) = self;
        let record = &signed.record;
        check(&record.key, &signed_statement(cluster, &signed.bytes), &signed.signature)?;
        let mut next = record.key;
        for endorsement in &record.endorsements {
            let statement = endorsement_statement(cluster, record.node.as_str(), &next);
            check(&endorsement.key, &statement, &endorsement.signature)?;
            next = endorsement.key;
        }
        Ok(signed)
    }

    /// Returns the record as it was encoded and its signature: what tells it from every other.
    pub fn encoded(&self) -> (&[u8], &[u8; SIGNATURE]) {
        (&self.0.bytes, &self.0.signature)
    }

    pub(crate) fn order(&self) -> (u64, u32) {
        self.0.order()
    }

    pub(crate) fn parse(signed: proto::SignedRecord) -> Result<Self, RecordError> {
        if signed.record.len() + SIGNATURE > MAX_RECORD {
            return Err(RecordError::TooLong);
        }
        let signature = signed.signature.try_into().map_err(|_| RecordError::Field("signature"))?;
        let record = proto::Record::decode(&signed.record[..]).map_err(|_| RecordError::Encoding)?;
        let record = from_proto(record)?;
        Ok(Self(SignedRecord { record, bytes: signed.record.into(), signature }))
    }
}

/// Who verifies the records that a mesh hears of.
pub trait Verify: fmt::Debug + Send + Sync {
    /// Verifies a record of this cluster.
    fn verify(&self, claimed: ClaimedRecord, cluster: &str) -> Result<Arc<SignedRecord>, BadSignature>;

    /// Verifies that a site certified a record of this cluster, by the certificate in it.
    fn verify_certificate(&self, site: &PublicKey, cluster: &str, record: &NodeRecord) -> bool {
        let certificate = record.facts.certificate;
        certificate.is_some_and(|held| held.verify(site, cluster, Certified::of(record)).is_ok())
    }
}

/// Verifies each record by itself, as a daemon does. Meshes that share a process may share the work.
#[derive(Debug, Clone, Copy)]
pub struct Each;

impl Verify for Each {
    fn verify(&self, claimed: ClaimedRecord, cluster: &str) -> Result<Arc<SignedRecord>, BadSignature> {
        claimed.verify(cluster).map(Arc::new)
    }
}

/// A signature of a record or of an endorsement that does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the record's signature does not hold")]
pub struct BadSignature;

/// Bytes that are no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Longer than [`MAX_RECORD`].
    #[error("the record is longer than {MAX_RECORD} bytes")]
    TooLong,
    /// Not a protobuf message of this shape.
    #[error("the record does not decode")]
    Encoding,
    /// A field has a value that it cannot have.
    #[error("the record's field {0} is out of range")]
    Field(&'static str),
}

pub(crate) fn tag(signature: &[u8; SIGNATURE]) -> u32 {
    u32::from_be_bytes([signature[0], signature[1], signature[2], signature[3]])
}

pub(crate) fn check(
    key: &PublicKey,
    statement: &[u8],
    signature: &[u8; SIGNATURE],
) -> Result<(), BadSignature> {
    let key = VerifyingKey::from_bytes(&key.0).map_err(|_| BadSignature)?;
    key.verify_strict(statement, &Signature::from_bytes(signature)).map_err(|_| BadSignature)
}

fn signed_statement(cluster: &str, record: &[u8]) -> Vec<u8> {
    [RECORD_DOMAIN, &(cluster.len() as u64).to_be_bytes(), cluster.as_bytes(), record].concat()
}

fn to_proto(record: &NodeRecord) -> proto::Record {
    let facts = &record.facts;
    let detour = facts.tunnel.as_ref().and_then(|tunnel| tunnel.detour.as_ref());
    proto::Record {
        node: record.node.to_string(),
        site: record.site.to_string(),
        key: record.key.0.to_vec(),
        version: record.version,
        subnets: facts
            .subnets
            .iter()
            .map(|leased| proto::LeasedSubnet {
                subnet: subnet_to_bytes(leased.subnet),
                epoch: leased.epoch.0,
            })
            .collect(),
        gossip: facts.gossip.iter().map(socket_to_bytes).collect(),
        underlay: facts.underlay.iter().map(ip_to_bytes).collect(),
        vtep_v4: facts.vtep_v4.map(|mac| mac.0.to_vec()).unwrap_or_default(),
        vtep_v6: facts.vtep_v6.map(|mac| mac.0.to_vec()).unwrap_or_default(),
        vni: facts.vni,
        vxlan_port: facts.vxlan_port.into(),
        mtu: facts.mtu.into(),
        capabilities: facts.capabilities.0,
        tunnel_key: facts.tunnel.as_ref().map(|tunnel| tunnel.key.0.to_vec()).unwrap_or_default(),
        tunnel_port: facts.tunnel.as_ref().map_or(0, |tunnel| tunnel.port.into()),
        tunnel_preshared: facts
            .tunnel
            .iter()
            .flat_map(|tunnel| &tunnel.preshared)
            .flat_map(|id| id.0)
            .collect(),
        cluster_keys: facts.keys.iter().flat_map(|id| id.0).collect(),
        ring_version: facts.follows.map_or(0, |name| name.version),
        ring_tag: facts.follows.map_or(0, |name| name.tag),
        tunnel_pairs: facts.tunnel.iter().flat_map(|tunnel| &tunnel.pairs).flat_map(|id| id.0).collect(),
        tunnel_carrier: match facts.tunnel.as_ref().and_then(|tunnel| tunnel.carrier) {
            None => 0,
            Some(Carrier::UserSpace) => 1,
            Some(Carrier::Kernel) => 2,
        },
        detour_key: detour.map(|detour| detour.key.0.to_vec()).unwrap_or_default(),
        detour_port: detour.map_or(0, |detour| detour.port.into()),
        detour_preferred: detour.is_some_and(|detour| detour.preferred),
        endorsements: record
            .endorsements
            .iter()
            .map(|endorsement| proto::Endorsement {
                key: endorsement.key.0.to_vec(),
                signature: endorsement.signature.to_vec(),
            })
            .collect(),
        left: record.left,
        certificate: facts.certificate.map(Certificate::to_bytes).unwrap_or_default(),
        tunnel_reflexive: facts.tunnel_reach.reflexive.iter().map(socket_to_bytes).collect(),
        tunnel_mapping: match facts.tunnel_reach.mapping {
            TunnelMapping::Unknown => 0,
            TunnelMapping::None => 1,
            TunnelMapping::Independent => 2,
            TunnelMapping::Dependent => 3,
        },
        relay_room: facts.tunnel_reach.relay_room.into(),
        keepers: facts.reachability.keepers.clone(),
        reach: facts.reachability.reach as u32,
        outside: facts.reachability.outside.iter().map(socket_to_bytes).collect(),
        gateway: facts.gateway.map_or(0, |weight| u32::from(weight.min(MAX_WEIGHT)) + 1),
    }
}

fn from_proto(record: proto::Record) -> Result<NodeRecord, RecordError> {
    use RecordError::Field;
    let limit = |length: usize, most: usize, field| if length > most { Err(Field(field)) } else { Ok(()) };
    limit(record.subnets.len(), MAX_SUBNETS, "subnets")?;
    limit(record.gossip.len(), MAX_GOSSIP, "gossip")?;
    limit(record.underlay.len(), MAX_UNDERLAY, "underlay")?;
    limit(record.endorsements.len(), MAX_ENDORSEMENTS, "endorsements")?;
    limit(record.tunnel_reflexive.len(), MAX_UNDERLAY, "tunnel_reflexive")?;
    let key = |bytes: Vec<u8>| bytes.try_into().map(PublicKey).map_err(|_| Field("key"));
    let subnets = record.subnets.iter().map(|leased| {
        let subnet = subnet_from_bytes(&leased.subnet).ok_or(Field("subnets"))?;
        Ok(LeasedSubnet { subnet, epoch: Epoch(leased.epoch) })
    });
    let tunnel = tunnel_from_proto(&record)?;
    let tunnel_reach = tunnel_reach_from_proto(&record)?;
    let reachability = Reachability::parse(&record)?;
    let facts = Facts {
        subnets: subnets.collect::<Result<_, _>>()?,
        gossip: parse_all(&record.gossip, socket_from_bytes).ok_or(Field("gossip"))?,
        underlay: parse_all(&record.underlay, ip_from_bytes).ok_or(Field("underlay"))?,
        vtep_v4: mac_from_bytes(record.vtep_v4).ok_or(Field("vtep_v4"))?,
        vtep_v6: mac_from_bytes(record.vtep_v6).ok_or(Field("vtep_v6"))?,
        vni: if record.vni < 1 << 24 { record.vni } else { return Err(Field("vni")) },
        vxlan_port: record.vxlan_port.try_into().map_err(|_| Field("vxlan_port"))?,
        mtu: record.mtu.try_into().map_err(|_| Field("mtu"))?,
        capabilities: Capabilities(record.capabilities),
        keys: ids_from_bytes(&record.cluster_keys, MAX_KEYS).ok_or(Field("cluster_keys"))?,
        follows: match (record.ring_version, record.ring_tag) {
            (0, 0) => None,
            (version, tag) => Some(RingName { version, tag }),
        },
        gateway: match record.gateway.checked_sub(1).map(u8::try_from) {
            None => None,
            Some(Ok(weight)) if weight <= MAX_WEIGHT => Some(weight),
            Some(_) => return Err(Field("gateway")),
        },
        certificate: match &record.certificate[..] {
            [] => None,
            bytes => Some(Certificate::from_bytes(bytes).ok_or(Field("certificate"))?),
        },
        tunnel,
        tunnel_reach,
        reachability,
    };
    let endorsements = record.endorsements.into_iter().map(|endorsement| {
        let signature = endorsement.signature.try_into().map_err(|_| Field("endorsements"))?;
        Ok(Endorsement { key: key(endorsement.key)?, signature })
    });
    Ok(NodeRecord {
        node: record.node.try_into().map_err(|_| Field("node"))?,
        site: record.site.try_into().map_err(|_| Field("site"))?,
        key: key(record.key)?,
        version: record.version,
        facts,
        endorsements: endorsements.collect::<Result<_, _>>()?,
        left: record.left,
    })
}

fn tunnel_from_proto(record: &proto::Record) -> Result<Option<TunnelFacts>, RecordError> {
    use RecordError::Field;
    let proto::Record { tunnel_key, tunnel_port, tunnel_preshared, .. } = record;
    let proto::Record { tunnel_pairs, detour_key, detour_port, .. } = record;
    let key_of = |bytes: &[u8], name| bytes.try_into().map(TunnelKey).map_err(|_| Field(name));
    let port_of = |port: u32, name| u16::try_from(port).ok().filter(|port| *port > 0).ok_or(Field(name));
    let detour = match (detour_key.is_empty(), detour_port, record.detour_preferred) {
        (true, 0, false) => None,
        (.., preferred) => Some(Detour {
            key: key_of(detour_key, "detour_key")?,
            port: port_of(*detour_port, "detour_port")?,
            preferred,
        }),
    };
    let carrier = match record.tunnel_carrier {
        0 => None,
        1 => Some(Carrier::UserSpace),
        2 => Some(Carrier::Kernel),
        _ => return Err(Field("tunnel_carrier")),
    };
    if tunnel_key.is_empty() && *tunnel_port == 0 && tunnel_preshared.is_empty() && tunnel_pairs.is_empty() {
        return if (&carrier, &detour) == (&None, &None) { Ok(None) } else { Err(Field("tunnel_key")) };
    }
    let key = key_of(tunnel_key, "tunnel_key")?;
    let port = port_of(*tunnel_port, "tunnel_port")?;
    let preshared = ids_from_bytes(tunnel_preshared, MAX_KEYS).ok_or(Field("tunnel_preshared"))?;
    let pairs = ids_from_bytes(tunnel_pairs, MAX_PAIRS).ok_or(Field("tunnel_pairs"))?;
    Ok(Some(TunnelFacts { key, port, preshared, pairs, carrier, detour }))
}

fn tunnel_reach_from_proto(record: &proto::Record) -> Result<TunnelReach, RecordError> {
    let field = RecordError::Field;
    let mapping = match record.tunnel_mapping {
        1 => TunnelMapping::None,
        2 => TunnelMapping::Independent,
        3 => TunnelMapping::Dependent,
        // A kind that this version does not know says as much as none.
        _ => TunnelMapping::Unknown,
    };
    let reflexive = parse_all(&record.tunnel_reflexive, socket_from_bytes);
    let reflexive = reflexive.ok_or(field("tunnel_reflexive"))?;
    let room = u8::try_from(record.relay_room).ok().filter(|room| *room <= 100);
    Ok(TunnelReach { reflexive, mapping, relay_room: room.ok_or(field("relay_room"))? })
}

fn ids_from_bytes(bytes: &[u8], most: usize) -> Option<Vec<KeyId>> {
    let (ids, []) = bytes.as_chunks() else { return None };
    (ids.len() <= most).then(|| ids.iter().copied().map(KeyId).collect())
}

#[cfg(test)]
mod tests;
