//! The store of a cluster without one: the operator names each node's subnets in its configuration.
//!
//! It lives in this process alone, so it cannot see what other nodes claim; the mesh catches conflicts.

use weft_wire::types::Subnet;

use super::{Answer, Expect, Key, MemoryStore, PutError, Snapshot, Store, StoreError, Watch};

/// A private store that only takes the operator's subnets.
#[derive(Debug)]
pub struct StaticStore {
    subnets: Vec<Subnet>,
    map: MemoryStore,
}

impl StaticStore {
    /// Returns a store for the subnets that the operator chose for this node.
    pub fn new(subnets: Vec<Subnet>) -> Self {
        Self { subnets, map: MemoryStore::new() }
    }
}

impl Store for StaticStore {
    fn kind(&self) -> &'static str {
        "static"
    }

    fn list(&self) -> Answer<Result<Snapshot, StoreError>> {
        self.map.list()
    }

    fn put_if(&self, key: Key, expect: Expect, value: Vec<u8>) -> Answer<Result<u64, PutError>> {
        if self.subnets.contains(&key) {
            return self.map.put_if(key, expect, value);
        }
        let error = StoreError(format!(
            "{key} is not among this node's static subnets: name it in [store] subnets, or use another store type"
        ));
        Box::pin(std::future::ready(Err(error.into())))
    }

    fn delete_if(&self, key: Key, revision: u64) -> Answer<Result<u64, PutError>> {
        self.map.delete_if(key, revision)
    }

    fn watch(&self) -> Watch {
        self.map.watch()
    }
}
