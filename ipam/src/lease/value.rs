//! What a lease looks like in the store: one JSON object an entry.
//!
//! ```json
//! {"subnet":"10.32.4.0/24","node":"n1","site":"default","key":"<64 hex>","epoch":17,
//!  "ttl_ms":3600000,"renewals":4,"boot":"<text>","gossip":["192.0.2.1:7117"]}
//! ```
//! Unknown members are ignored, so later versions may add some; `gossip` may be missing, as it is in what earlier
//! versions wrote. Without `ttl_ms` the lease does not expire: the store removes it with its node. `asked` is there while
//! a daemon that lost its key asks whether the owner still runs
//! (docs/decisions/0011-kubernetes-store.md). There is no time of day in it: expiry is
//! judged by each observer's own clock (docs/decisions/0002-lease-expiry-without-clocks.md).

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};
use weft_wire::types::{Epoch, NodeName, PublicKey, SiteName, Subnet};

/// Epochs from outside stay below this, so that there is always a later one.
pub(super) const MOST_EPOCH: u64 = 1 << 63;
/// The most gossip addresses that are read from an entry: as many as a node's record names.
const MOST_GOSSIP: usize = weft_wire::record::MAX_GOSSIP;

/// One lease as written in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseValue {
    /// The leased subnet; the same as the entry's key.
    pub subnet: Subnet,
    /// The owner.
    pub node: NodeName,
    /// The owner's site.
    pub site: SiteName,
    /// The key that signs the owner's records.
    pub key: PublicKey,
    /// The fencing number of this tenure; unchanged by renewals.
    pub epoch: Epoch,
    /// How long the lease outlives its last write, in milliseconds in the JSON; `None` if only the store ends it.
    #[serde(rename = "ttl_ms", default, skip_serializing_if = "Option::is_none", with = "millis")]
    pub ttl: Option<Duration>,
    /// Counts the writes of this tenure, so that every renewal differs.
    pub renewals: u64,
    /// Names the run of the owner's daemon that wrote it.
    pub boot: String,
    /// Where the owner receives gossip, for nodes that know nobody yet: a hint, which proves nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "addresses")]
    pub gossip: Vec<SocketAddr>,
    /// Another daemon under the owner's name, which asks whether the owner still runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked: Option<Asked>,
}

/// Who asks the owner of a lease for a sign of life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// The key of who asks.
    pub key: PublicKey,
    /// Names the run of who asks.
    pub boot: String,
}

/// An entry that is no lease of this version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// The bytes are not the JSON of a lease.
    #[error("the value is no lease: {0}")]
    Json(String),
    /// The epoch is none that a store ever gave: there must be later ones.
    #[error("the epoch {0} is out of range")]
    Epoch(Epoch),
    /// The value names another subnet than its key.
    #[error("the value is for {0}")]
    OtherSubnet(Subnet),
}

impl LeaseValue {
    /// Writes the JSON.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a lease value has only text keys and finite numbers")
    }

    /// Reads the JSON of the entry `key`.
    pub fn decode(key: Subnet, bytes: &[u8]) -> Result<Self, ValueError> {
        let value: Self =
            serde_json::from_slice(bytes).map_err(|error| ValueError::Json(error.to_string()))?;
        if value.epoch.0 >= MOST_EPOCH {
            return Err(ValueError::Epoch(value.epoch));
        }
        if value.subnet == key { Ok(value) } else { Err(ValueError::OtherSubnet(value.subnet)) }
    }
}

/// Reads what is an address with a port and leaves the rest out: a lease is no worse for a hint that cannot be used.
fn addresses<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<SocketAddr>, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    let texts = value.as_array().into_iter().flatten().filter_map(serde_json::Value::as_str);
    Ok(texts.filter_map(|text| text.parse().ok()).filter(is_somewhere).take(MOST_GOSSIP).collect())
}

/// Returns whether another node can be there at all.
fn is_somewhere(address: &SocketAddr) -> bool {
    let ip = address.ip();
    address.port() != 0 && !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast()
}

mod millis {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        let millis = duration.map(|duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX));
        millis.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(deserializer)?.map(Duration::from_millis))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_read_with_any_gossip_addresses_or_none() {
        let key: Subnet = "10.32.4.0/24".parse().expect("a subnet");
        let read = |gossip: &str| {
            let text = format!(
                r#"{{"subnet":"10.32.4.0/24","node":"n1","site":"s1","key":"{}","epoch":1,"ttl_ms":1,"renewals":0,"boot":"b"{gossip}}}"#,
                "ab".repeat(32)
            );
            let value = LeaseValue::decode(key, text.as_bytes()).expect("a lease");
            assert_eq!(LeaseValue::decode(key, &value.encode()), Ok(value.clone()));
            value.gossip.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert!(read("").is_empty());
        assert!(read(r#","gossip":null"#).is_empty());
        assert!(read(r#","gossip":{"no":"list"}"#).is_empty());
        let mixed = r#","gossip":["n1","192.0.2.1:0","0.0.0.0:7117","127.0.0.1:7117","224.0.0.1:7117",7,"192.0.2.1:7117"]"#;
        assert_eq!(read(mixed), ["192.0.2.1:7117"]);
        assert_eq!(read(r#","gossip":["192.0.2.1:7117","[2001:db8::1]:7117"]"#).len(), 2);
        assert_eq!(
            read(&format!(r#","gossip":[{}"[2001:db8::1]:7117"]"#, r#""192.0.2.1:7117","#.repeat(9))).len(),
            MOST_GOSSIP
        );
    }

    #[test]
    fn an_epoch_that_no_later_one_could_follow_is_refused() {
        let text = |epoch: u64| {
            format!(
                r#"{{"subnet":"10.32.4.0/24","node":"n1","site":"s1","key":"{}","epoch":{epoch},"ttl_ms":1,"renewals":0,"boot":"b"}}"#,
                "ab".repeat(32)
            )
        };
        let key: Subnet = "10.32.4.0/24".parse().expect("a subnet");
        assert!(LeaseValue::decode(key, text(MOST_EPOCH - 1).as_bytes()).is_ok());
        for epoch in [MOST_EPOCH, u64::MAX] {
            let refused = LeaseValue::decode(key, text(epoch).as_bytes());
            assert_eq!(refused, Err(ValueError::Epoch(Epoch(epoch))));
        }
    }
}
