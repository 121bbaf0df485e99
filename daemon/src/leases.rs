//! The shell of the lease core: it performs the store requests that `weft_ipam::lease` asks for.
//!
//! It decides nothing. Invariant: every request of the core is answered exactly once, through [`Done`].

use std::time::Instant;

use tokio::sync::mpsc;
use weft_ipam::lease::{LeaseEvent, Leasing, Output};
use weft_ipam::store::{Change, Key, PutError, Snapshot, Store, StoreError};

/// An answer of the store, or a change that it saw.
#[derive(Debug)]
pub enum Done {
    /// The answer to a list.
    Listed(Result<Snapshot, StoreError>),
    /// The answer to a conditional write.
    Put(Key, Result<u64, PutError>),
    /// The answer to a conditional delete.
    Deleted(Key, Result<u64, PutError>),
    /// Another writer changed something.
    Changed(Change),
}

/// The lease core with its store.
#[derive(Debug)]
pub struct Leases {
    /// The core.
    pub core: Leasing,
    store: Box<dyn Store>,
    done: mpsc::Sender<Done>,
    /// Why the store did not answer last time; `None` while it answers.
    pub error: Option<String>,
}

impl Leases {
    /// Starts to watch the store; answers and changes go to `done`.
    pub fn new(core: Leasing, store: Box<dyn Store>, done: mpsc::Sender<Done>) -> Self {
        let mut watch = store.watch();
        let changed = done.clone();
        tokio::spawn(async move {
            while let Some(change) = watch.changed().await {
                if changed.send(Done::Changed(change)).await.is_err() {
                    return;
                }
            }
        });
        Self { core, store, done, error: None }
    }

    /// Names the kind of store.
    pub fn kind(&self) -> &'static str {
        self.store.kind()
    }

    /// Hands an answer to the core.
    pub fn handle(&mut self, done: Done, now: Instant) {
        match done {
            Done::Listed(Ok(snapshot)) => {
                self.error = None;
                self.core.handle_snapshot(&snapshot, now);
            }
            Done::Put(key, Ok(revision)) => {
                self.error = None;
                self.core.handle_put(key, Ok(revision), now);
            }
            Done::Put(key, Err(PutError::Conflict(entry))) => self.core.handle_put(key, Err(entry), now),
            Done::Deleted(key, Ok(revision)) => self.core.handle_delete(key, Ok(revision), now),
            Done::Deleted(key, Err(PutError::Conflict(entry))) => {
                self.core.handle_delete(key, Err(entry), now);
            }
            Done::Changed(change) => self.core.handle_change(&change, now),
            Done::Listed(Err(error))
            | Done::Put(_, Err(PutError::Store(error)))
            | Done::Deleted(_, Err(PutError::Store(error))) => {
                self.error = Some(error.to_string());
                self.core.handle_store_error(now);
            }
        }
    }

    /// Starts what the core asks for; returns what it has to tell and when to call `handle_timeout`.
    pub fn drain(&mut self, now: Instant) -> (Vec<LeaseEvent>, Instant) {
        let mut events = Vec::new();
        loop {
            match self.core.poll_output(now) {
                Output::List => {
                    let answer = self.store.list();
                    self.perform(async { Done::Listed(answer.await) });
                }
                Output::Put { key, expect, value } => {
                    let answer = self.store.put_if(key, expect, value);
                    self.perform(async move { Done::Put(key, answer.await) });
                }
                Output::Delete { key, revision } => {
                    let answer = self.store.delete_if(key, revision);
                    self.perform(async move { Done::Deleted(key, answer.await) });
                }
                Output::Event(event) => events.push(event),
                Output::Wait { until } => return (events, until),
            }
        }
    }

    fn perform(&self, request: impl Future<Output = Done> + Send + 'static) {
        let done = self.done.clone();
        tokio::spawn(async move {
            // A closed channel means that the loop has ended and no one waits for the answer.
            let _ = done.send(request.await).await;
        });
    }
}
