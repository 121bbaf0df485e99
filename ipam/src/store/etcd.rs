//! The store of a cluster that runs etcd, version 3.4 or newer.
//!
//! Not a cache, and not an owner of truth: every list is a linearizable read. All calls run in order on one
//! thread of the store's own; beside them the same thread follows etcd's watch.
//!
//! Invariant: each call is answered within 12 s, whatever etcd does. A write is sent once, or again only
//! where etcd said that it did nothing; what became of a write that was not answered is unknown.

use std::sync::Arc;

use super::desk::Desk;
use super::{Answer, Expect, Key, PutError, Snapshot, Store, StoreError, Watch};
use calls::Calls;
use link::Link;

mod access;
mod calls;
mod changes;
mod link;
mod proto;
mod trouble;

pub use access::{Endpoint, EtcdOptions, EtcdOptionsError};

/// A store in etcd. Its thread ends when it is dropped.
#[derive(Debug)]
pub struct EtcdStore(Desk);

impl EtcdStore {
    /// Starts the store's thread; reads the files of the options, but connects to nothing yet.
    ///
    /// # Errors
    /// Options that cannot work, a file that is missing or is not what it should be.
    pub fn open(options: EtcdOptions) -> Result<Self, EtcdOptionsError> {
        options.check()?;
        options.check_files()?;
        if options.user.is_some() && options.endpoints.iter().any(|endpoint| !endpoint.tls()) {
            tracing::warn!("the password for etcd crosses the network unencrypted: use https endpoints");
        }
        Ok(Self(Desk::open("etcd", move |joined| {
            let link = Link::new(options);
            (Calls::new(Arc::clone(&link)), changes::run(link, joined))
        })))
    }
}

impl Store for EtcdStore {
    fn kind(&self) -> &'static str {
        "etcd"
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
