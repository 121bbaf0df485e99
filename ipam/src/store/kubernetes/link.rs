//! One client of the API server at a time, shared by the calls and the watch.
//!
//! Invariant: a request is sent once, or again only where the API server said that it did nothing (401); it is answered
//! within [`CALL`]. A client that failed is forgotten, and the next one reads its files anew.

use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request};
use kube::Client;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::{Mutex, watch};
use tokio::time::timeout;

use super::access::KubernetesOptions;
use super::trouble::{Then, Trouble};

/// How long the API server may take for a request.
pub(super) const CALL: Duration = Duration::from_secs(5);

/// The way to the API server.
pub(super) struct Link {
    pub(super) options: KubernetesOptions,
    state: Mutex<State>,
    /// Counts the clients that failed, so that the watch leaves a connection that a call found dead.
    lost: watch::Sender<u64>,
}

struct State {
    live: Option<Live>,
    made: u64,
}

/// A client, and whose it is.
#[derive(Clone)]
pub(super) struct Live {
    pub(super) client: Client,
    /// The API server's address.
    pub(super) server: String,
    /// Tells it from the clients before and after.
    number: u64,
}

/// A request, with what a sentence needs to say about it.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    /// The verb of RBAC: `get`, `list`, `watch`, `create`, `update`, `delete`.
    pub(super) verb: &'static str,
    /// The resource: `podsubnets.weft.dev`.
    pub(super) resource: &'static str,
    pub(super) path: String,
    /// `None` for nothing to send.
    pub(super) body: Option<Value>,
    /// Of an object only its metadata is asked for.
    pub(super) metadata_only: bool,
}

impl Ask {
    pub(super) fn new(verb: &'static str, resource: &'static str, path: impl Into<String>) -> Self {
        Self { verb, resource, path: path.into(), body: None, metadata_only: false }
    }

    pub(super) fn request(&self) -> Result<Request<Vec<u8>>, Trouble> {
        let method = match self.verb {
            "create" => Method::POST,
            "update" => Method::PUT,
            "delete" => Method::DELETE,
            _ => Method::GET,
        };
        let accept = match self.metadata_only {
            true => "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
            false => "application/json",
        };
        let body = self.body.as_ref().map(|body| body.to_string().into_bytes()).unwrap_or_default();
        Request::builder()
            .method(method)
            .uri(&self.path)
            .header("accept", accept)
            .header("content-type", "application/json")
            .header("user-agent", concat!("weftd/", env!("CARGO_PKG_VERSION")))
            .body(body)
            .map_err(|error| Trouble::tell(format!("{} cannot be asked for ({error})", self.path)))
    }
}

impl Link {
    pub(super) fn new(options: KubernetesOptions) -> Arc<Self> {
        let state = State { live: None, made: 0 };
        Arc::new(Self { options, state: Mutex::new(state), lost: watch::Sender::new(0) })
    }

    /// Returns the client, or makes one.
    pub(super) async fn live(&self) -> Result<Live, Trouble> {
        let mut state = self.state.lock().await;
        if let Some(live) = &state.live {
            return Ok(live.clone());
        }
        let (client, server) =
            self.options.connect().await.map_err(|error| Trouble::tell(error.to_string()))?;
        state.made += 1;
        let live = Live { client, server, number: state.made };
        state.live = Some(live.clone());
        Ok(live)
    }

    /// Forgets a client that failed.
    pub(super) async fn forget(&self, live: &Live) {
        let mut state = self.state.lock().await;
        if state.live.take_if(|current| current.number == live.number).is_some() {
            self.lost.send_modify(|lost| *lost += 1);
        }
    }

    /// Tells when a client was forgotten.
    pub(super) fn losses(&self) -> watch::Receiver<u64> {
        self.lost.subscribe()
    }

    /// Sends a request and reads its answer.
    pub(super) async fn ask<T: DeserializeOwned>(&self, ask: &Ask) -> Result<T, Trouble> {
        match self.ask_once(ask).await {
            // The token may have been renewed since the client read it.
            Err(trouble) if trouble.then == Then::Login => self.ask_once(ask).await,
            result => result,
        }
    }

    async fn ask_once<T: DeserializeOwned>(&self, ask: &Ask) -> Result<T, Trouble> {
        let live = self.live().await?;
        let result = match timeout(CALL, live.client.request_text(ask.request()?)).await {
            Err(_) => Err(Trouble::late(&live.server, CALL)),
            Ok(Err(error)) => Err(Trouble::answered(&live.server, &self.options, ask, &error)),
            Ok(Ok(text)) => serde_json::from_str(&text).map_err(|error| {
                Trouble::tell(format!(
                    "the API server at {} answered what is no {} ({error}): look at what stands between",
                    live.server, ask.resource
                ))
            }),
        };
        self.judge(&live, &result).await;
        result
    }

    pub(super) async fn judge<T>(&self, live: &Live, result: &Result<T, Trouble>) {
        if let Err(trouble) = result
            && matches!(trouble.then, Then::Reconnect | Then::Login)
        {
            self.forget(live).await;
        }
    }
}
