//! The thread of a store behind a network: it answers calls in the order made, and follows a watch beside them.
//!
//! It knows nothing of what the store is. Invariant: each call is answered exactly once and within [`BOUND`]; the
//! thread ends when the desk is dropped.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::watchers::{self, Joined};
use super::{Answer, Change, Expect, Key, PutError, Snapshot, StoreError, Watch};

/// The bound of a call, whatever it goes through.
pub(super) const BOUND: Duration = Duration::from_secs(12);

/// What answers the calls. Each may be dropped unfinished, and then what became of a write is unknown.
pub(super) trait Calls {
    async fn list(&mut self) -> Result<Snapshot, StoreError>;
    async fn put_if(&mut self, key: Key, expect: Expect, value: Vec<u8>) -> Result<u64, PutError>;
    async fn delete_if(&mut self, key: Key, revision: u64) -> Result<u64, PutError>;
    /// Says that a call took longer than [`BOUND`].
    fn late(&self) -> StoreError;
}

/// Where calls are left, and answers come from.
#[derive(Debug)]
pub(super) struct Desk {
    /// Names the store in sentences: `etcd`.
    what: &'static str,
    calls: mpsc::UnboundedSender<Call>,
    watchers: mpsc::UnboundedSender<mpsc::Sender<Change>>,
}

/// A call, with where its answer goes.
pub(super) enum Call {
    List(oneshot::Sender<Result<Snapshot, StoreError>>),
    Put(Key, Expect, Vec<u8>, oneshot::Sender<Result<u64, PutError>>),
    Delete(Key, u64, oneshot::Sender<Result<u64, PutError>>),
}

impl Desk {
    /// Starts the thread; `begin` runs on it and returns who answers the calls, and what follows the watch.
    pub(super) fn open<C: Calls, F: Future<Output = ()>>(
        what: &'static str,
        begin: impl FnOnce(Joined) -> (C, F) + Send + 'static,
    ) -> Self {
        let (calls, called) = mpsc::unbounded_channel();
        let (watchers, joined) = mpsc::unbounded_channel();
        let spawned = std::thread::Builder::new()
            .name("weft-store".to_owned())
            .spawn(move || run(|| begin(joined), called));
        if let Err(error) = spawned {
            tracing::error!(err = %error, "cannot start the thread of the store");
        }
        Self { what, calls, watchers }
    }

    pub(super) fn list(&self) -> Answer<Result<Snapshot, StoreError>> {
        self.call(Call::List)
    }

    pub(super) fn put_if(&self, key: Key, expect: Expect, value: Vec<u8>) -> Answer<Result<u64, PutError>> {
        self.call(|reply| Call::Put(key, expect, value, reply))
    }

    pub(super) fn delete_if(&self, key: Key, revision: u64) -> Answer<Result<u64, PutError>> {
        self.call(|reply| Call::Delete(key, revision, reply))
    }

    pub(super) fn watch(&self) -> Watch {
        let (sender, receiver) = mpsc::channel(watchers::BACKLOG);
        let _ = self.watchers.send(sender);
        Watch::new(receiver)
    }

    fn call<T: Send + 'static, E: From<StoreError> + Send + 'static>(
        &self,
        call: impl FnOnce(oneshot::Sender<Result<T, E>>) -> Call,
    ) -> Answer<Result<T, E>> {
        let (reply, answer) = oneshot::channel();
        // A thread that is gone drops `reply`, which the answer below reports.
        let _ = self.calls.send(call(reply));
        let what = self.what;
        Box::pin(async move {
            answer.await.unwrap_or_else(|_| {
                Err(StoreError(format!("the thread of the store in {what} is gone: restart weftd")).into())
            })
        })
    }
}

/// Runs the thread until the desk is dropped.
fn run<C: Calls, F: Future<Output = ()>>(
    begin: impl FnOnce() -> (C, F),
    called: mpsc::UnboundedReceiver<Call>,
) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(err = %error, "cannot start the store: raise the limit of open files");
            return;
        }
    };
    runtime.block_on(async {
        let (calls, watch) = begin();
        tokio::select! {
            () = serve(calls, called) => {}
            () = watch => {}
        }
    });
    // A name that is being looked up cannot be called off; nobody waits for it.
    runtime.shutdown_background();
}

/// Answers calls, in the order made, until the desk is dropped.
async fn serve(mut calls: impl Calls, mut called: mpsc::UnboundedReceiver<Call>) {
    while let Some(call) = called.recv().await {
        // An asker that no longer waits changes nothing.
        match call {
            Call::List(reply) => {
                let result = timeout(BOUND, calls.list()).await;
                drop(reply.send(result.unwrap_or_else(|_| Err(calls.late()))));
            }
            Call::Put(key, expect, value, reply) => {
                let result = timeout(BOUND, calls.put_if(key, expect, value)).await;
                drop(reply.send(result.unwrap_or_else(|_| Err(calls.late().into()))));
            }
            Call::Delete(key, revision, reply) => {
                let result = timeout(BOUND, calls.delete_if(key, revision)).await;
                drop(reply.send(result.unwrap_or_else(|_| Err(calls.late().into()))));
            }
        }
    }
}
