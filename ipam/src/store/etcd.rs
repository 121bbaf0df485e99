//! The store of a cluster that runs etcd, version 3.4 or newer.
//!
//! Not a cache, and not an owner of truth: every list is a linearizable read. All calls run in order on one
//! thread of the store's own; beside them the same thread follows etcd's watch.
//!
//! Invariant: each call is answered within [`BOUND`], whatever etcd does. A write is sent once, or again only
//! where etcd said that it did nothing; what became of a write that was not answered is unknown.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::{Answer, Change, Expect, Key, PutError, Snapshot, Store, StoreError, Watch};
use calls::Calls;
use link::Link;

mod access;
mod calls;
mod changes;
mod link;
mod proto;
mod trouble;

pub use access::{Endpoint, EtcdOptions, EtcdOptionsError};

/// The bound of a call, whatever it goes through.
const BOUND: Duration = Duration::from_secs(12);

/// A store in etcd. Its thread ends when it is dropped.
#[derive(Debug)]
pub struct EtcdStore {
    calls: mpsc::UnboundedSender<Call>,
    watchers: mpsc::UnboundedSender<mpsc::Sender<Change>>,
}

enum Call {
    List(oneshot::Sender<Result<Snapshot, StoreError>>),
    Put(Key, Expect, Vec<u8>, oneshot::Sender<Result<u64, PutError>>),
    Delete(Key, u64, oneshot::Sender<Result<u64, PutError>>),
}

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
        let (calls, called) = mpsc::unbounded_channel();
        let (watchers, joined) = mpsc::unbounded_channel();
        let spawned = std::thread::Builder::new()
            .name("weft-store".to_owned())
            .spawn(move || run(Link::new(options), called, joined));
        if let Err(error) = spawned {
            tracing::error!(err = %error, "cannot start the thread of the store");
        }
        Ok(Self { calls, watchers })
    }

    fn call<T: Send + 'static, E: From<StoreError> + Send + 'static>(
        &self,
        call: impl FnOnce(oneshot::Sender<Result<T, E>>) -> Call,
    ) -> Answer<Result<T, E>> {
        let (reply, answer) = oneshot::channel();
        // A thread that is gone drops `reply`, which the answer below reports.
        let _ = self.calls.send(call(reply));
        Box::pin(async move {
            answer.await.unwrap_or_else(|_| {
                Err(StoreError("the thread of the store in etcd is gone: restart weftd".to_owned()).into())
            })
        })
    }
}

impl Store for EtcdStore {
    fn kind(&self) -> &'static str {
        "etcd"
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
        let (sender, receiver) = mpsc::channel(changes::BACKLOG);
        let _ = self.watchers.send(sender);
        Watch::new(receiver)
    }
}

/// Runs the store's thread until the store is dropped.
fn run(
    link: Arc<Link>,
    called: mpsc::UnboundedReceiver<Call>,
    joined: mpsc::UnboundedReceiver<mpsc::Sender<Change>>,
) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(err = %error, "cannot start the store: raise the limit of open files");
            return;
        }
    };
    runtime.block_on(async {
        tokio::select! {
            () = serve(Calls::new(Arc::clone(&link)), called) => {}
            () = changes::run(link, joined) => {}
        }
    });
    // A name that is being looked up cannot be called off; nobody waits for it.
    runtime.shutdown_background();
}

/// Answers calls, in the order made, until the store is dropped.
async fn serve(mut calls: Calls, mut called: mpsc::UnboundedReceiver<Call>) {
    while let Some(call) = called.recv().await {
        // An asker that no longer waits changes nothing.
        match call {
            Call::List(reply) => {
                let result = timeout(BOUND, calls.list()).await;
                drop(reply.send(result.unwrap_or_else(|_| Err(late()))));
            }
            Call::Put(key, expect, value, reply) => {
                let result = timeout(BOUND, calls.put_if(key, expect, value)).await;
                drop(reply.send(result.unwrap_or_else(|_| Err(late().into()))));
            }
            Call::Delete(key, revision, reply) => {
                let result = timeout(BOUND, calls.delete_if(key, revision)).await;
                drop(reply.send(result.unwrap_or_else(|_| Err(late().into()))));
            }
        }
    }
}

fn late() -> StoreError {
    StoreError(format!(
        "etcd did not answer within {} s: look at `etcdctl endpoint status --cluster`",
        BOUND.as_secs()
    ))
}
