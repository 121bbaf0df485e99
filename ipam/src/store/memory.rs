//! A store in memory, shared by its clones: for tests, with faults on demand.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;

use super::{Answer, Change, Entry, Expect, Key, PutError, Snapshot, Store, StoreError, Watch};

/// The compare-and-swap map itself, without sharing or faults.
#[derive(Debug, Clone, Default)]
pub struct MemoryMap {
    revision: u64,
    entries: BTreeMap<Key, Entry>,
}

impl MemoryMap {
    /// Returns all entries.
    pub fn list(&self, store_id: &str) -> Snapshot {
        Snapshot { store_id: store_id.to_owned(), revision: self.revision, entries: self.entries.clone() }
    }

    /// Writes `value` if the key is as `expect` says, else returns what it holds.
    pub fn put_if(&mut self, key: Key, expect: Expect, value: Vec<u8>) -> Result<u64, Option<Entry>> {
        let current = self.entries.get(&key);
        let met = match expect {
            Expect::Absent => current.is_none(),
            Expect::Revision(revision) => current.is_some_and(|entry| entry.revision == revision),
        };
        if !met {
            return Err(current.cloned());
        }
        self.revision += 1;
        self.entries.insert(key, Entry { value, revision: self.revision });
        Ok(self.revision)
    }

    /// Deletes the entry if it was last written at `revision`, else returns what the key holds.
    pub fn delete_if(&mut self, key: Key, revision: u64) -> Result<u64, Option<Entry>> {
        match self.entries.get(&key) {
            Some(entry) if entry.revision == revision => {
                self.entries.remove(&key);
                self.revision += 1;
                Ok(self.revision)
            }
            other => Err(other.cloned()),
        }
    }
}

/// A fault that the next matching calls of a [`MemoryStore`] meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The call fails and does nothing.
    Refuse,
    /// The call does its work, and the answer is lost.
    LoseAnswer,
}

/// A store in memory. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore(Arc<Mutex<Shared>>);

#[derive(Debug, Default)]
struct Shared {
    map: MemoryMap,
    generation: u64,
    down: Option<Fault>,
    faults: u32,
    watchers: Vec<mpsc::Sender<Change>>,
}

impl MemoryStore {
    /// Returns an empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes every call meet `fault` until called with `None`.
    pub fn set_fault(&self, fault: Option<Fault>) {
        let mut shared = self.shared();
        shared.down = fault;
        shared.faults = u32::MAX;
    }

    /// Makes the next `calls` calls meet `fault`.
    pub fn fault_next(&self, fault: Fault, calls: u32) {
        let mut shared = self.shared();
        shared.down = Some(fault);
        shared.faults = calls;
    }

    /// Empties the store as if its disk had been replaced.
    pub fn wipe(&self) {
        let mut shared = self.shared();
        shared.map = MemoryMap::default();
        shared.generation += 1;
        shared.wake();
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call<T>(&self, work: impl FnOnce(&mut Shared) -> Result<T, PutError>) -> Result<T, PutError> {
        let mut shared = self.shared();
        let fault = shared.down.filter(|_| shared.faults > 0);
        if fault.is_some() && shared.faults != u32::MAX {
            shared.faults -= 1;
        }
        match fault {
            None => work(&mut shared),
            Some(Fault::Refuse) => Err(StoreError("the memory store is down".to_owned()).into()),
            Some(Fault::LoseAnswer) => {
                let _ = work(&mut shared);
                Err(StoreError("the memory store lost its answer".to_owned()).into())
            }
        }
    }
}

impl Shared {
    fn wake(&mut self) {
        self.watchers.retain(|watcher| {
            !matches!(watcher.try_send(Change::Relist), Err(mpsc::error::TrySendError::Closed(_)))
        });
    }
}

impl Store for MemoryStore {
    fn kind(&self) -> &'static str {
        "memory"
    }

    fn list(&self) -> Answer<Result<Snapshot, StoreError>> {
        let result = self.call(|shared| Ok(shared.map.list(&format!("memory-{}", shared.generation))));
        ready(result.map_err(|error| match error {
            PutError::Store(error) => error,
            PutError::Conflict(_) => StoreError("a list met a conflict".to_owned()),
        }))
    }

    fn put_if(&self, key: Key, expect: Expect, value: Vec<u8>) -> Answer<Result<u64, PutError>> {
        ready(self.call(|shared| {
            let revision = shared.map.put_if(key, expect, value).map_err(PutError::Conflict)?;
            shared.wake();
            Ok(revision)
        }))
    }

    fn delete_if(&self, key: Key, revision: u64) -> Answer<Result<u64, PutError>> {
        ready(self.call(|shared| {
            let revision = shared.map.delete_if(key, revision).map_err(PutError::Conflict)?;
            shared.wake();
            Ok(revision)
        }))
    }

    fn watch(&self) -> Watch {
        let (sender, receiver) = mpsc::channel(1);
        self.shared().watchers.push(sender);
        Watch::new(receiver)
    }
}

fn ready<T: Send + 'static>(value: T) -> Answer<T> {
    Box::pin(std::future::ready(value))
}
