//! The calls of the store as requests to the API server.
//!
//! Invariant: a write is one request that names what it replaces: a creation, which fails where the name is taken, or an
//! update or deletion with the `resourceVersion` that was seen. Nothing is ever applied or patched.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};

use super::link::{Ask, Link};
use super::object::{self, DEFINITION, FIELDS, Object, Page, VERSION, name_of, revision_of};
use super::trouble::{Failed, Then, Trouble, undefined};
use crate::lease::LeaseValue;
use crate::store::desk;
use crate::store::{Entry, Expect, Key, PutError, Snapshot, StoreError};

/// Where the objects are.
pub(super) const PATH: &str = "/apis/weft.dev/v1/podsubnets";
/// How many entries a page of a list has: about a megabyte.
const PAGE: usize = 1000;
/// How often a list begins anew because the API server forgot the revision that it was reading at.
const MOST_LISTS: u32 = 3;

/// Who answers the calls.
pub(super) struct Calls(Arc<Link>);

impl Calls {
    pub(super) fn new(link: Arc<Link>) -> Self {
        Self(link)
    }

    /// Names the store: another cluster, or a definition that was made anew without its objects, has another name.
    async fn store_id(&self) -> Result<String, Trouble> {
        let path = "/api/v1/namespaces/kube-system";
        let cluster = Ask { metadata_only: true, ..Ask::new("get", "namespaces", path) };
        let cluster: Named = self.0.ask(&cluster).await?;
        let path = format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{DEFINITION}");
        let ask = Ask::new("get", "customresourcedefinitions.apiextensions.k8s.io", path);
        let definition: Value = match self.0.ask(&ask).await {
            Err(trouble) if trouble.then == Then::Absent => {
                return Err(Trouble::tell(undefined(&self.0.live().await?.server)));
            }
            definition => definition?,
        };
        check(&definition)?;
        let uid = definition["metadata"]["uid"].as_str().unwrap_or_default();
        Ok(format!("kubernetes-{}-{uid}", cluster.metadata.uid))
    }

    /// Returns the entries at one revision.
    async fn entries(&self) -> Result<(u64, BTreeMap<Key, Entry>), Trouble> {
        let mut entries = BTreeMap::new();
        let (mut next, mut anew) = (String::new(), 0);
        loop {
            // Without a resourceVersion the list is consistent: it includes every write before it.
            let path = match next.as_str() {
                "" => format!("{PATH}?limit={PAGE}"),
                next => format!("{PATH}?limit={PAGE}&continue={}", escaped(next)),
            };
            let page: Page = match self.0.ask(&Ask::new("list", DEFINITION, path)).await {
                Err(trouble) if trouble.then == Then::Anew && anew < MOST_LISTS => {
                    (next, anew) = (String::new(), anew + 1);
                    entries.clear();
                    continue;
                }
                page => page?,
            };
            entries.extend(page.items.into_iter().filter_map(Object::entry));
            next = page.metadata.r#continue;
            if next.is_empty() {
                return Ok((revision(&page.metadata.resource_version)?, entries));
            }
        }
    }

    /// Returns the entry under a key, if there is one.
    async fn current(&self, key: Key) -> Result<Option<Entry>, Trouble> {
        let path = format!("{PATH}/{}", name_of(key));
        match self.0.ask::<Object>(&Ask::new("get", DEFINITION, path)).await {
            Err(trouble) if trouble.then == Then::Absent => Ok(None),
            Err(trouble) => Err(trouble),
            Ok(object) => Ok(object.entry().map(|(_, entry)| entry)),
        }
    }

    /// Returns the uid of this node's Node object, which the entry goes with.
    async fn node_uid(&self) -> Result<String, Trouble> {
        let node = &self.0.options.node;
        let path = format!("/api/v1/nodes/{node}");
        let ask = Ask { metadata_only: true, ..Ask::new("get", "nodes", path) };
        match self.0.ask::<Named>(&ask).await {
            Err(trouble) if trouble.then == Then::Absent => Err(Trouble::tell(format!(
                "the cluster has no Node {node}, so it gets no subnet: set node.name to a name of `kubectl get nodes`, or let the kubelet register it"
            ))),
            named => Ok(named?.metadata.uid),
        }
    }

    async fn put(&self, key: Key, expect: Expect, value: &[u8]) -> Result<u64, Failed> {
        let node = &self.0.options.node;
        let lease = LeaseValue::decode(key, value);
        if !lease.is_ok_and(|lease| lease.node == *node) {
            return Err(Trouble::tell(format!(
                "the store in Kubernetes takes leases of {node} only, under their subnet, and was given something else for {key}"
            ))
            .into());
        }
        let uid = self.node_uid().await?;
        let over = match expect {
            Expect::Absent => None,
            Expect::Revision(revision) => Some(revision),
        };
        let body = object::object(key, value, (node.as_str(), &uid), over)
            .map_err(|error| Trouble::tell(error.to_string()))?;
        let ask = match expect {
            Expect::Absent => Ask::new("create", DEFINITION, PATH),
            Expect::Revision(_) => Ask::new("update", DEFINITION, format!("{PATH}/{}", name_of(key))),
        };
        match self.0.ask::<Object>(&Ask { body: Some(body), ..ask }).await {
            Ok(written) => Ok(revision(&written.metadata.resource_version)?),
            Err(trouble) => self.conflict(key, trouble).await,
        }
    }

    async fn delete(&self, key: Key, at: u64) -> Result<u64, Failed> {
        let path = format!("{PATH}/{}", name_of(key));
        let body = json!({
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"resourceVersion": at.to_string()},
            "propagationPolicy": "Background",
        });
        let ask = Ask { body: Some(body), ..Ask::new("delete", DEFINITION, path) };
        match self.0.ask::<Deleted>(&ask).await {
            Ok(deleted) if deleted.metadata.deletion_timestamp.is_some() => Err(Trouble::tell(format!(
                "the PodSubnet {} has a finalizer and stays: remove it with kubectl edit podsubnet {}",
                name_of(key),
                name_of(key)
            ))
            .into()),
            // The API server does not say which revision a deletion has; that of a list after it is not below.
            Ok(_) => Ok(self.revision().await?),
            Err(trouble) => self.conflict(key, trouble).await,
        }
    }

    async fn conflict(&self, key: Key, trouble: Trouble) -> Result<u64, Failed> {
        match trouble.then {
            Then::Absent => Err(Failed::Conflict(None)),
            Then::Conflict => Err(Failed::Conflict(self.current(key).await?)),
            _ => Err(trouble.into()),
        }
    }

    /// Returns the revision of now.
    async fn revision(&self) -> Result<u64, Trouble> {
        now(&self.0).await
    }
}

impl desk::Calls for Calls {
    async fn list(&mut self) -> Result<Snapshot, StoreError> {
        // The name first: of a definition made anew in between, the entries are missing and nothing is believed.
        let store_id = self.store_id().await?;
        let (revision, entries) = self.entries().await?;
        Ok(Snapshot { store_id, revision, entries })
    }

    async fn put_if(&mut self, key: Key, expect: Expect, value: Vec<u8>) -> Result<u64, PutError> {
        Ok(self.put(key, expect, &value).await?)
    }

    async fn delete_if(&mut self, key: Key, revision: u64) -> Result<u64, PutError> {
        Ok(self.delete(key, revision).await?)
    }

    fn late(&self) -> StoreError {
        StoreError(format!(
            "the API server did not answer within {} s: look at `kubectl get --raw '/readyz?verbose'`",
            desk::BOUND.as_secs()
        ))
    }
}

/// Returns the revision of now: that of a consistent list.
pub(super) async fn now(link: &Link) -> Result<u64, Trouble> {
    let page: Page = link.ask(&Ask::new("list", DEFINITION, format!("{PATH}?limit=1"))).await?;
    revision(&page.metadata.resource_version)
}

/// What is read of an object of another kind.
#[derive(Deserialize)]
struct Named {
    metadata: object::Metadata,
}

/// The answer to a deletion: a `Status`, or the object where something holds it.
#[derive(Deserialize)]
struct Deleted {
    #[serde(default)]
    metadata: object::Metadata,
}

/// Looks whether the definition keeps everything that is written: it drops in silence what it does not know.
fn check(definition: &Value) -> Result<(), Trouble> {
    let versions = definition["spec"]["versions"].as_array();
    let ours = |version: &&Value| version["name"] == VERSION && version["served"] == true;
    let wrong = |what: String| {
        Err(Trouble::tell(format!(
            "the definition {DEFINITION} is of another version of weft ({what}): apply deploy/kubernetes/base/crd.yaml of this one (kubectl apply -f crd.yaml)"
        )))
    };
    let Some(version) = versions.into_iter().flatten().find(ours) else {
        return wrong(format!("it does not serve {VERSION}"));
    };
    let known = &version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
    match FIELDS.iter().find(|field| known[**field].is_null()) {
        Some(missing) => wrong(format!("it does not know spec.{missing}")),
        None => Ok(()),
    }
}

fn revision(resource_version: &str) -> Result<u64, Trouble> {
    revision_of(resource_version).ok_or_else(|| {
        Trouble::tell(format!(
            "the API server counts its revisions in a way that weft cannot compare ({resource_version:?}): use one that keeps its objects in etcd"
        ))
    })
}

/// Escapes a token for a query (RFC 3986 s2.3).
fn escaped(token: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let one = |byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    token.bytes().map(one).collect()
}
