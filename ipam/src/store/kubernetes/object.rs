//! An entry as an object of the API, and back.
//!
//! The name says the subnet and nothing else, so that the API server refuses a second object for it: `10.32.4.0-24`, and
//! for IPv6 all digits, `fd00-0032-0000-0000-0000-0000-0000-0000-64`. The spec is the JSON of the lease, with `ttlMs` in
//! the spelling of Kubernetes. Invariant: a subnet has one name, and what is written comes back byte for byte.

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::lease::{LeaseValue, ValueError};
use crate::store::{Entry, Key};

/// The definition of the objects, and what it must keep of a spec.
pub(super) const DEFINITION: &str = "podsubnets.weft.dev";
pub(super) const VERSION: &str = "v1";
pub(super) const FIELDS: [&str; 10] =
    ["subnet", "node", "site", "key", "epoch", "ttlMs", "renewals", "boot", "gossip", "asked"];

/// What is read of an object.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Object {
    pub(super) metadata: Metadata,
    #[serde(default)]
    spec: Value,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Metadata {
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) resource_version: String,
    pub(super) deletion_timestamp: Option<String>,
}

/// A page of objects.
#[derive(Debug, Deserialize)]
pub(super) struct Page {
    #[serde(default)]
    pub(super) metadata: PageMetadata,
    #[serde(default)]
    pub(super) items: Vec<Object>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct PageMetadata {
    pub(super) resource_version: String,
    pub(super) r#continue: String,
}

/// Returns the name of the object of a subnet.
pub(super) fn name_of(subnet: Key) -> String {
    let length = subnet.net().prefix_len();
    match subnet.net() {
        IpNet::V4(net) => format!("{}-{length}", net.network()),
        IpNet::V6(net) => {
            let groups = net.network().segments().map(|group| format!("{group:04x}"));
            format!("{}-{length}", groups.join("-"))
        }
    }
}

/// Returns the subnet that an object is named after.
pub(super) fn subnet_of(name: &str) -> Option<Key> {
    let (address, length) = name.rsplit_once('-')?;
    let subnet: Key = format!("{}/{length}", address.replace('-', ":")).parse().ok()?;
    (name_of(subnet) == name).then_some(subnet)
}

/// Reads a revision, which the API calls opaque and which counts etcd's writes (KEP-5504 has made that a promise).
pub(super) fn revision_of(resource_version: &str) -> Option<u64> {
    resource_version.parse().ok().filter(|revision| *revision > 0)
}

/// Returns the object of a lease; `over` is the version that it replaces.
///
/// # Errors
/// The value is no lease of that subnet.
pub(super) fn object(
    key: Key,
    value: &[u8],
    node: (&str, &str),
    over: Option<u64>,
) -> Result<Value, ValueError> {
    let lease = LeaseValue::decode(key, value)?;
    let mut spec = serde_json::to_value(&lease).expect("a lease is JSON");
    rename(&mut spec, "ttl_ms", "ttlMs");
    let (name, uid) = node;
    let mut metadata = Map::new();
    metadata.insert("name".into(), name_of(key).into());
    // With the Node goes the entry. Not its controller, and nothing waits for the entry.
    let owner = json!([{"apiVersion": "v1", "kind": "Node", "name": name, "uid": uid}]);
    metadata.insert("ownerReferences".into(), owner);
    if let Some(revision) = over {
        metadata.insert("resourceVersion".into(), revision.to_string().into());
    }
    let api_version = format!("weft.dev/{VERSION}");
    Ok(json!({"apiVersion": api_version, "kind": "PodSubnet", "metadata": metadata, "spec": spec}))
}

impl Object {
    /// Returns what the object holds; `None` for one that is not named after a subnet.
    pub(super) fn entry(self) -> Option<(Key, Entry)> {
        let (Some(key), Some(revision)) =
            (subnet_of(&self.metadata.name), revision_of(&self.metadata.resource_version))
        else {
            tracing::warn!(name = self.metadata.name, "a PodSubnet is not named after its subnet");
            return None;
        };
        let mut spec = self.spec;
        rename(&mut spec, "ttlMs", "ttl_ms");
        let bytes = serde_json::to_vec(&spec).expect("JSON that was read");
        // In the order that it was written in; what is no lease is for the reader to say.
        let value = LeaseValue::decode(key, &bytes).map(|lease| lease.encode()).unwrap_or(bytes);
        Some((key, Entry { value, revision }))
    }
}

fn rename(spec: &mut Value, from: &str, to: &str) {
    if let Some(spec) = spec.as_object_mut()
        && let Some(value) = spec.remove(from)
    {
        spec.insert(to.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subnet_has_one_name_and_no_two_subnets_share_one() {
        for (subnet, name) in [
            ("10.32.4.0/24", "10.32.4.0-24"),
            ("0.0.0.0/0", "0.0.0.0-0"),
            ("fd00:32::/64", "fd00-0032-0000-0000-0000-0000-0000-0000-64"),
            ("::/0", "0000-0000-0000-0000-0000-0000-0000-0000-0"),
            ("::ffff:10.32.4.0/120", "0000-0000-0000-0000-0000-ffff-0a20-0400-120"),
        ] {
            let subnet: Key = subnet.parse().expect("a subnet");
            assert_eq!((name_of(subnet).as_str(), subnet_of(name)), (name, Some(subnet)));
        }
        for name in [
            "",
            "-",
            "10.32.4.0",
            "10.32.4.0-024",
            "10.32.4.1-24",
            "fd00-32-0-0-0-0-0-0-64",
            "fd00-0032---64",
            "FD00-0032-0000-0000-0000-0000-0000-0000-64",
            "n1",
        ] {
            assert_eq!(subnet_of(name), None, "{name}");
        }
    }

    #[test]
    fn a_lease_comes_back_byte_for_byte_in_whatever_order_the_api_keeps_it() {
        let key: Key = "10.32.4.0/24".parse().expect("a subnet");
        let digits = "ab".repeat(32);
        for extra in [
            String::new(),
            r#","gossip":["192.0.2.1:7117"]"#.to_owned(),
            format!(r#","gossip":["192.0.2.1:7117"],"asked":{{"key":"{digits}","boot":"b2"}}"#),
        ] {
            for ttl in ["", r#""ttl_ms":3600000,"#] {
                let text = format!(
                    r#"{{"subnet":"10.32.4.0/24","node":"n1","site":"s1","key":"{digits}","epoch":9223372036854775807,{ttl}"renewals":3,"boot":"b"{extra}}}"#
                );
                let mut object = object(key, text.as_bytes(), ("n1", "u"), Some(7)).expect("a lease");
                object["metadata"]["resourceVersion"] = "8".into();
                // serde_json keeps members by name, as the API server does.
                let read: Object = serde_json::from_value(object).expect("an object");
                let entry = Entry { value: text.into_bytes(), revision: 8 };
                assert_eq!(read.entry(), Some((key, entry)));
            }
        }
        assert!(object(key, b"{}", ("n1", "u"), None).is_err());
    }

    #[test]
    fn what_is_no_lease_is_given_to_the_reader_as_it_is() {
        let text = r#"{"metadata":{"name":"10.32.4.0-24","resourceVersion":"3"},"spec":{"later":"version"}}"#;
        let object: Object = serde_json::from_str(text).expect("an object");
        let (_, entry) = object.entry().expect("named after a subnet");
        assert_eq!(entry.value, br#"{"later":"version"}"#);
    }
}
