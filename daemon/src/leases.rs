//! The shell of the lease store: it performs the requests that the control plane asks for.
//!
//! It decides nothing. Invariant: every request is answered exactly once.

use std::sync::Arc;

use tokio::sync::mpsc;
use weft_ipam::store::Store;

use crate::control::{StoreAnswer, StoreRequest};

/// The store of the leases, with where its answers go.
#[derive(Debug)]
pub struct Leases {
    store: Box<dyn Store>,
    answers: mpsc::Sender<StoreAnswer>,
    /// One count is kept here, and one by each request under way.
    asked: Arc<()>,
}

impl Leases {
    /// Starts to watch the store; answers and changes go to `answers`.
    pub fn new(store: Box<dyn Store>, answers: mpsc::Sender<StoreAnswer>) -> Self {
        let mut watch = store.watch();
        let changed = answers.clone();
        tokio::spawn(async move {
            while let Some(change) = watch.changed().await {
                if changed.send(StoreAnswer::Changed(change)).await.is_err() {
                    return;
                }
            }
        });
        Self { store, answers, asked: Arc::new(()) }
    }

    /// Names the kind of store.
    pub fn kind(&self) -> &'static str {
        self.store.kind()
    }

    /// Whether no request is under way.
    pub fn is_idle(&self) -> bool {
        Arc::strong_count(&self.asked) == 1
    }

    /// Starts a request.
    pub fn ask(&self, request: StoreRequest) {
        match request {
            StoreRequest::List => {
                let answer = self.store.list();
                self.perform(async { StoreAnswer::Listed(answer.await) });
            }
            StoreRequest::Put { key, expect, value } => {
                let answer = self.store.put_if(key, expect, value);
                self.perform(async move { StoreAnswer::Put(key, answer.await) });
            }
            StoreRequest::Delete { key, revision } => {
                let answer = self.store.delete_if(key, revision);
                self.perform(async move { StoreAnswer::Deleted(key, answer.await) });
            }
        }
    }

    fn perform(&self, request: impl Future<Output = StoreAnswer> + Send + 'static) {
        let (answers, asked) = (self.answers.clone(), Arc::clone(&self.asked));
        tokio::spawn(async move {
            // A closed channel means that the loop has ended and no one waits for the answer.
            let _ = answers.send(request.await).await;
            drop(asked);
        });
    }
}
