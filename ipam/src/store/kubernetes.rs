//! The store of a cluster that runs Kubernetes: one PodSubnet object an entry, with the Node as its owner.
//!
//! Not a cache, and not an owner of truth: every list is a consistent one. It writes this node's leases and nothing else
//! (`docs/decisions/0011-kubernetes-store.md`). Entries of a Node that is deleted are removed by the cluster.
//!
//! Invariant: each call is answered within 12 s, whatever the API server does. A write is sent once; what became of
//! one that was not answered is unknown. A write of what is there already is none, and has the revision that is there.

use std::sync::Arc;

use super::desk::Desk;
use super::{Answer, Expect, Key, PutError, Snapshot, Store, StoreError, Watch};
use calls::Calls;
use link::Link;

mod access;
mod calls;
mod changes;
mod link;
mod object;
mod trouble;

pub use access::{KubernetesOptions, KubernetesOptionsError, Mode};

/// A store in the API of Kubernetes. Its thread ends when it is dropped.
#[derive(Debug)]
pub struct KubernetesStore(Desk);

impl KubernetesStore {
    /// Starts the store's thread; reads the files of the options, but connects to nothing yet.
    ///
    /// # Errors
    /// Options that cannot work, a file that is missing or is not what it should be.
    pub fn open(options: KubernetesOptions) -> Result<Self, KubernetesOptionsError> {
        options.check()?;
        options.check_files()?;
        Ok(Self(Desk::open("Kubernetes", move |joined| {
            let link = Link::new(options);
            (Calls::new(Arc::clone(&link)), changes::run(link, joined))
        })))
    }
}

impl Store for KubernetesStore {
    fn kind(&self) -> &'static str {
        "kubernetes"
    }

    fn list(&self) -> Answer<Result<Snapshot, StoreError>> {
        self.0.list()
    }

    fn put_if(&self, key: Key, expect: Expect, value: Vec<u8>) -> Answer<Result<u64, PutError>> {
        self.0.put_if(key, expect, value)
    }

    fn delete_if(&self, key: Key, revision: u64) -> Answer<Result<u64, PutError>> {
        self.0.delete_if(key, revision)
    }

    fn watch(&self) -> Watch {
        self.0.watch()
    }
}
