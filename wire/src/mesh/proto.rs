//! The messages of `proto/mesh.proto`, as prost sees them. Field comments are in that file.
//!
//! Nothing here is trusted: `record` and the parts of `mesh` check every value that they take out.

use prost::{Enumeration, Message, Oneof};

#[derive(Clone, PartialEq, Message)]
pub struct LeasedSubnet {
    #[prost(bytes = "vec", tag = "1")]
    pub subnet: Vec<u8>,
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct Endorsement {
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub signature: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Record {
    #[prost(string, tag = "1")]
    pub node: String,
    #[prost(string, tag = "2")]
    pub site: String,
    #[prost(bytes = "vec", tag = "3")]
    pub key: Vec<u8>,
    #[prost(uint64, tag = "4")]
    pub version: u64,
    #[prost(message, repeated, tag = "5")]
    pub subnets: Vec<LeasedSubnet>,
    #[prost(bytes = "vec", repeated, tag = "6")]
    pub gossip: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "7")]
    pub underlay: Vec<Vec<u8>>,
    #[prost(bytes = "vec", tag = "8")]
    pub vtep_v4: Vec<u8>,
    #[prost(bytes = "vec", tag = "9")]
    pub vtep_v6: Vec<u8>,
    #[prost(uint32, tag = "10")]
    pub vni: u32,
    #[prost(uint32, tag = "11")]
    pub vxlan_port: u32,
    #[prost(uint32, tag = "12")]
    pub mtu: u32,
    #[prost(uint64, tag = "13")]
    pub capabilities: u64,
    #[prost(message, repeated, tag = "14")]
    pub endorsements: Vec<Endorsement>,
    #[prost(bool, tag = "15")]
    pub left: bool,
    #[prost(bytes = "vec", tag = "16")]
    pub tunnel_key: Vec<u8>,
    #[prost(uint32, tag = "17")]
    pub tunnel_port: u32,
    #[prost(bytes = "vec", tag = "18")]
    pub tunnel_preshared: Vec<u8>,
    #[prost(bytes = "vec", tag = "19")]
    pub cluster_keys: Vec<u8>,
    #[prost(uint64, tag = "33")]
    pub ring_version: u64,
    #[prost(fixed64, tag = "34")]
    pub ring_tag: u64,
    #[prost(bytes = "vec", tag = "22")]
    pub certificate: Vec<u8>,
    #[prost(uint32, tag = "23")]
    pub tunnel_carrier: u32,
    #[prost(bytes = "vec", tag = "24")]
    pub detour_key: Vec<u8>,
    #[prost(uint32, tag = "25")]
    pub detour_port: u32,
    #[prost(bool, tag = "26")]
    pub detour_preferred: bool,
    #[prost(bytes = "vec", repeated, tag = "30")]
    pub tunnel_reflexive: Vec<Vec<u8>>,
    #[prost(uint32, tag = "31")]
    pub tunnel_mapping: u32,
    #[prost(uint32, tag = "32")]
    pub relay_room: u32,
    #[prost(bytes = "vec", tag = "35")]
    pub tunnel_pairs: Vec<u8>,
    #[prost(fixed64, repeated, tag = "27")]
    pub keepers: Vec<u64>,
    #[prost(uint32, tag = "28")]
    pub reach: u32,
    #[prost(bytes = "vec", repeated, tag = "29")]
    pub outside: Vec<Vec<u8>>,
    #[prost(uint32, tag = "45")]
    pub gateway: u32,
}

#[derive(Clone, PartialEq, Message)]
pub struct SignedStatement {
    #[prost(bytes = "vec", tag = "1")]
    pub statement: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub signature: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Statement {
    #[prost(bytes = "vec", tag = "1")]
    pub by: Vec<u8>,
    #[prost(string, tag = "2")]
    pub site: String,
    #[prost(bytes = "vec", tag = "3")]
    pub of: Vec<u8>,
    #[prost(uint64, tag = "4")]
    pub version: u64,
    #[prost(bytes = "vec", repeated, tag = "5")]
    pub prefixes: Vec<Vec<u8>>,
    #[prost(uint64, tag = "6")]
    pub least_serial: u64,
    #[prost(bytes = "vec", repeated, tag = "7")]
    pub void: Vec<Vec<u8>>,
    #[prost(bool, tag = "8")]
    pub expelled: bool,
    #[prost(bytes = "vec", tag = "9")]
    pub keys: Vec<u8>,
    #[prost(fixed64, tag = "10")]
    pub ring: u64,
    #[prost(bool, tag = "11")]
    pub left: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct SignedRecord {
    #[prost(bytes = "vec", tag = "1")]
    pub record: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub signature: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum Liveness {
    Alive = 0,
    Suspect = 1,
    Dead = 2,
    Forgotten = 3,
}

#[derive(Clone, PartialEq, Message)]
pub struct Update {
    #[prost(string, tag = "1")]
    pub node: String,
    #[prost(enumeration = "Liveness", tag = "2")]
    pub liveness: i32,
    #[prost(uint64, tag = "3")]
    pub incarnation: u64,
    #[prost(string, repeated, tag = "4")]
    pub accusers: Vec<String>,
    #[prost(message, optional, tag = "5")]
    pub record: Option<SignedRecord>,
    #[prost(message, optional, tag = "6")]
    pub statement: Option<SignedStatement>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Ping {
    #[prost(fixed64, tag = "1")]
    pub token: u64,
    #[prost(uint64, tag = "2")]
    pub have: u64,
    #[prost(uint32, tag = "3")]
    pub again_ms: u32,
    #[prost(bytes = "vec", tag = "4")]
    pub padding: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Ack {
    #[prost(fixed64, tag = "1")]
    pub token: u64,
    #[prost(uint64, tag = "2")]
    pub have: u64,
    #[prost(bytes = "vec", tag = "3")]
    pub seen: Vec<u8>,
    #[prost(fixed64, tag = "4")]
    pub challenge: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct Nack {
    #[prost(fixed64, tag = "1")]
    pub token: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct PingRequest {
    #[prost(fixed64, tag = "1")]
    pub token: u64,
    #[prost(string, tag = "2")]
    pub target: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct Push {
    #[prost(bool, tag = "1")]
    pub sync: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct SyncRoot {
    #[prost(fixed64, tag = "1")]
    pub hash: u64,
    #[prost(uint32, tag = "2")]
    pub count: u32,
    #[prost(fixed64, tag = "3")]
    pub statements: u64,
    #[prost(bool, tag = "4")]
    pub answers: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct SyncBuckets {
    #[prost(uint32, tag = "1")]
    pub depth: u32,
    #[prost(uint32, tag = "2")]
    pub prefix: u32,
    #[prost(fixed64, repeated, tag = "3")]
    pub hashes: Vec<u64>,
    #[prost(uint32, repeated, tag = "4")]
    pub counts: Vec<u32>,
}

#[derive(Clone, PartialEq, Message)]
pub struct SyncItem {
    #[prost(fixed64, tag = "1")]
    pub name_hash: u64,
    #[prost(uint64, tag = "2")]
    pub version: u64,
    #[prost(fixed32, tag = "3")]
    pub tag: u32,
    #[prost(uint64, tag = "4")]
    pub incarnation: u64,
    #[prost(bool, tag = "5")]
    pub dead: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct SyncItems {
    #[prost(fixed64, tag = "1")]
    pub first: u64,
    #[prost(fixed64, tag = "2")]
    pub last: u64,
    #[prost(message, repeated, tag = "3")]
    pub items: Vec<SyncItem>,
}

#[derive(Clone, PartialEq, Message)]
pub struct SyncWant {
    #[prost(fixed64, repeated, tag = "1")]
    pub name_hashes: Vec<u64>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Certify {
    #[prost(bytes = "vec", tag = "1")]
    pub certificate: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Observed {
    #[prost(bytes = "vec", tag = "1")]
    pub endpoint: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Call {
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub endpoints: Vec<Vec<u8>>,
    #[prost(bool, tag = "2")]
    pub answers: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct RelayAsk {
    #[prost(string, tag = "1")]
    pub peer: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct RelayGrant {
    #[prost(string, tag = "1")]
    pub peer: String,
    #[prost(uint32, tag = "2")]
    pub port: u32,
}

#[derive(Clone, PartialEq, Message)]
pub struct RelayRefuse {
    #[prost(string, tag = "1")]
    pub peer: String,
    #[prost(uint32, tag = "2")]
    pub reason: u32,
}

#[derive(Clone, PartialEq, Message)]
pub struct Forward {
    #[prost(bytes = "vec", tag = "1")]
    pub datagram: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Grant {
    #[prost(message, optional, tag = "1")]
    pub statement: Option<SignedStatement>,
}

#[derive(Clone, PartialEq, Message)]
pub struct PairOffer {
    #[prost(bytes = "vec", tag = "1")]
    pub other: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub latest: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct PairPart {
    #[prost(fixed64, tag = "1")]
    pub attempt: u64,
    #[prost(uint32, tag = "2")]
    pub part: u32,
    #[prost(bool, tag = "3")]
    pub answers: bool,
    #[prost(bytes = "vec", tag = "4")]
    pub content: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct PairQuestion {
    #[prost(bytes = "vec", tag = "1")]
    pub other: Vec<u8>,
    #[prost(uint32, tag = "2")]
    pub known: u32,
    #[prost(bytes = "vec", tag = "3")]
    pub key: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    pub signature: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct PairAnswer {
    #[prost(bytes = "vec", tag = "1")]
    pub sealed: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub signature: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Joining {
    #[prost(uint32, tag = "1")]
    pub step: u32,
    #[prost(fixed64, tag = "2")]
    pub attempt: u64,
    #[prost(bool, tag = "3")]
    pub answers: bool,
    #[prost(message, optional, tag = "4")]
    pub statement: Option<SignedStatement>,
    #[prost(bytes = "vec", tag = "5")]
    pub proof: Vec<u8>,
    #[prost(string, tag = "6")]
    pub refusal: String,
    #[prost(uint64, tag = "7")]
    pub clock: u64,
    #[prost(bytes = "vec", tag = "8")]
    pub padding: Vec<u8>,
    #[prost(uint64, tag = "9")]
    pub version: u64,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum Body {
    #[prost(message, tag = "8")]
    Ping(Ping),
    #[prost(message, tag = "9")]
    Ack(Ack),
    #[prost(message, tag = "10")]
    Nack(Nack),
    #[prost(message, tag = "11")]
    PingRequest(PingRequest),
    #[prost(message, tag = "12")]
    Push(Push),
    #[prost(message, tag = "13")]
    SyncRoot(SyncRoot),
    #[prost(message, tag = "14")]
    SyncBuckets(SyncBuckets),
    #[prost(message, tag = "15")]
    SyncItems(SyncItems),
    #[prost(message, tag = "16")]
    SyncWant(SyncWant),
    #[prost(message, tag = "17")]
    Certify(Certify),
    #[prost(message, tag = "25")]
    Observed(Observed),
    #[prost(message, tag = "26")]
    Call(Call),
    #[prost(message, tag = "27")]
    RelayAsk(RelayAsk),
    #[prost(message, tag = "28")]
    RelayGrant(RelayGrant),
    #[prost(message, tag = "29")]
    RelayRefuse(RelayRefuse),
    #[prost(message, tag = "20")]
    Forward(Forward),
    #[prost(message, tag = "35")]
    Grant(Grant),
    #[prost(message, tag = "43")]
    PairOffer(PairOffer),
    #[prost(message, tag = "44")]
    PairPart(PairPart),
}

#[derive(Clone, PartialEq, Message)]
pub struct Datagram {
    #[prost(string, tag = "1")]
    pub from: String,
    #[prost(string, tag = "2")]
    pub to: String,
    #[prost(fixed64, tag = "3")]
    pub session: u64,
    #[prost(uint64, tag = "4")]
    pub seq: u64,
    #[prost(uint64, tag = "5")]
    pub version: u64,
    #[prost(uint64, tag = "6")]
    pub incarnation: u64,
    #[prost(message, repeated, tag = "7")]
    pub updates: Vec<Update>,
    #[prost(
        oneof = "Body",
        tags = "8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 20, 25, 26, 27, 28, 29, 35, 43, 44"
    )]
    pub body: Option<Body>,
}
