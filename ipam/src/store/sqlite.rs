//! The embedded store: one SQLite file that several daemons of one machine share.
//!
//! Not for network file systems: WAL needs shared memory among its users. Every call runs on one thread of
//! the store's own, in order, each bounded by the busy timeout; a second thread polls for changes.
//!
//! Invariant: a write is conditional on the very store that was last listed. If the file was replaced in
//! between, the write fails and asks for a list, because revisions of two stores cannot be compared.
//! A file that was there and is gone is not created again until the next start: an empty store would give
//! away the subnets of nodes that are not there to claim them again.

use std::path::PathBuf;
use std::sync::mpsc as std_mpsc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::desk::Call;
use super::{Answer, Change, Expect, Key, PutError, Snapshot, Store, StoreError, Watch};
use file::File;

mod file;

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

/// A store in an SQLite file. Its threads end when it is dropped.
#[derive(Debug)]
pub struct SqliteStore {
    path: PathBuf,
    calls: std_mpsc::Sender<Call>,
    watchers: std_mpsc::Sender<mpsc::Sender<Change>>,
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
        let path = path.into();
        let (calls, called) = std_mpsc::channel();
        let mut file = File::new(path.clone(), options);
        spawn("weft-store", move || serve(&mut file, &called));
        let (watchers, watched) = std_mpsc::channel();
        let mut file = File::new(path.clone(), options);
        spawn("weft-store-watch", move || poll(&mut file, &watched, options.poll_every));
        Self { path, calls, watchers }
    }

    fn call<T: Send + 'static, E: From<StoreError> + Send + 'static>(
        &self,
        call: impl FnOnce(oneshot::Sender<Result<T, E>>) -> Call,
    ) -> Answer<Result<T, E>> {
        let (reply, answer) = oneshot::channel();
        // A thread that is gone drops `reply`, which the answer below reports.
        let _ = self.calls.send(call(reply));
        let path = self.path.clone();
        Box::pin(async move {
            answer.await.unwrap_or_else(|_| {
                let path = path.display();
                Err(StoreError(format!("the thread of the store {path} is gone: restart weftd")).into())
            })
        })
    }
}

impl Store for SqliteStore {
    fn kind(&self) -> &'static str {
        "sqlite"
    }

    fn list(&self) -> Answer<Result<Snapshot, StoreError>> {
        self.call(Call::List)
    }

    fn put_if(&self, key: Key, expect: Expect, value: Vec<u8>) -> Answer<Result<u64, PutError>> {
        self.call(|reply| Call::Put(key, expect, value, reply))
    }

    fn delete_if(&self, key: Key, revision: u64) -> Answer<Result<u64, PutError>> {
        self.call(|reply| Call::Delete(key, revision, reply))
    }

    fn watch(&self) -> Watch {
        let (sender, receiver) = mpsc::channel(1);
        let _ = self.watchers.send(sender);
        Watch::new(receiver)
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) {
    let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(work);
    if let Err(error) = spawned {
        tracing::error!(thread = name, err = %error, "cannot start a thread of the store");
    }
}

/// Answers calls until the store is dropped.
fn serve(file: &mut File, calls: &std_mpsc::Receiver<Call>) {
    while let Ok(call) = calls.recv() {
        // An asker that no longer waits changes nothing.
        match call {
            Call::List(reply) => drop(reply.send(file.list())),
            Call::Put(key, expect, value, reply) => drop(reply.send(file.put_if(key, expect, &value))),
            Call::Delete(key, revision, reply) => drop(reply.send(file.delete_if(key, revision))),
        }
    }
}

/// Wakes the watchers when the file's version changes, or the file itself does.
fn poll(file: &mut File, added: &std_mpsc::Receiver<mpsc::Sender<Change>>, every: Duration) {
    let mut watchers: Vec<mpsc::Sender<Change>> = Vec::new();
    let mut before = None;
    loop {
        match added.recv_timeout(every) {
            // Whatever was written since the asker's call is news to it.
            Ok(watcher) => {
                wake(&mut vec![watcher.clone()]);
                watchers.push(watcher);
                continue;
            }
            Err(std_mpsc::RecvTimeoutError::Disconnected) => return,
            Err(std_mpsc::RecvTimeoutError::Timeout) => {}
        }
        if watchers.is_empty() {
            continue;
        }
        let version = file.version();
        if version != before {
            wake(&mut watchers);
            before = version;
        }
    }
}

fn wake(watchers: &mut Vec<mpsc::Sender<Change>>) {
    watchers.retain(|watcher| {
        !matches!(watcher.try_send(Change::Relist), Err(mpsc::error::TrySendError::Closed(_)))
    });
}
