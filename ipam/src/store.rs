//! The shared store that leases live in: a compare-and-swap map from subnet to value.
//!
//! It is not a lease manager: it knows nothing of owners, epochs or expiry. Its one promise is that
//! `put_if` and `delete_if` are atomic against every other writer, and that a successful write gets a
//! revision above all earlier ones. Everything safe about leases is built on that (`lease`).
//!
//! Invariant of every implementation: each call is answered exactly once and within a bound, also when
//! the disk hangs or the file is gone. An answer `StoreError` to a write means "unknown": the write may
//! have happened, so the asker lists before it writes again.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;

use tokio::sync::mpsc;
use weft_wire::types::Subnet;

mod cause;
mod desk;
pub mod etcd;
pub mod kubernetes;
pub mod memory;
pub mod sqlite;
pub mod static_;
mod trouble;
mod watchers;

pub use etcd::{EtcdOptions, EtcdStore};
pub use kubernetes::{KubernetesOptions, KubernetesStore};
pub use memory::MemoryStore;
pub use sqlite::SqliteStore;
pub use static_::StaticStore;

/// The name of an entry: the subnet, written canonically (`10.32.4.0/24`).
pub type Key = Subnet;

/// What a store call returns: a future that borrows nothing, so the loop can keep it beside its state.
///
/// Dropping it does not undo the call.
pub type Answer<T> = Pin<Box<dyn Future<Output = T> + Send + 'static>>;

/// One value of the store and the revision that wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What was written; opaque to the store.
    pub value: Vec<u8>,
    /// The store revision of the write.
    pub revision: u64,
}

/// All entries at one revision.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Names the store's history: it changes when the store was emptied or replaced by another.
    pub store_id: String,
    /// The revision of the last write that the snapshot includes.
    pub revision: u64,
    /// The entries.
    pub entries: BTreeMap<Key, Entry>,
}

/// What a conditional write expects to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// No entry of that key.
    Absent,
    /// An entry last written at this revision.
    Revision(u64),
}

/// What a watcher learns. It wakes; it may be late or coalesced, never a full history.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// Something changed, or the watcher fell behind: list.
    Relist,
    /// One entry was written; for stores whose watch carries data.
    Put {
        /// The entry's key.
        key: Key,
        /// The entry as written.
        entry: Entry,
    },
    /// One entry was deleted; for stores whose watch carries data.
    Delete {
        /// The entry's key.
        key: Key,
        /// The revision of the deletion.
        revision: u64,
    },
}

/// A store that did not answer as it should. Whether a write happened is unknown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StoreError(
    /// One sentence: what happened, where, and what to do.
    pub String,
);

/// A conditional write that did not happen, or may not have happened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PutError {
    /// The store holds something else under the key. The store is unchanged.
    #[error("another writer was first")]
    Conflict(
        /// What the store holds now; `None` if nothing.
        Option<Entry>,
    ),
    /// The store failed. The write may or may not have happened: list before writing again.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A compare-and-swap store that several nodes share.
///
/// Calls return at once and are answered in the order made. None blocks the caller's thread: a store
/// that touches a disk does so on a thread of its own.
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// Names the kind of store for status: `sqlite`, `etcd`, `kubernetes`, `static`, `memory`.
    fn kind(&self) -> &'static str;

    /// Returns all entries at one revision that includes every write answered before the call.
    fn list(&self) -> Answer<Result<Snapshot, StoreError>>;

    /// Writes `value` if the key is as `expect` says, and returns the revision of the write.
    fn put_if(&self, key: Key, expect: Expect, value: Vec<u8>) -> Answer<Result<u64, PutError>>;

    /// Deletes the entry if it was last written at `revision`, and returns the revision of the deletion.
    fn delete_if(&self, key: Key, revision: u64) -> Answer<Result<u64, PutError>>;

    /// Returns a new watcher; it sees every write after this call, perhaps coalesced.
    fn watch(&self) -> Watch;
}

/// Receives the changes of a store. Cancel-safe.
#[derive(Debug)]
pub struct Watch(mpsc::Receiver<Change>);

impl Watch {
    /// Wraps a receiver. A sender that finds it full drops the change if a `Relist` already waits in it.
    pub fn new(receiver: mpsc::Receiver<Change>) -> Self {
        Self(receiver)
    }

    /// Waits for the next change; `None` once the store is gone.
    pub async fn changed(&mut self) -> Option<Change> {
        self.0.recv().await
    }
}
