//! One object of the cluster, by its name: as it is, and then every change of it.
//!
//! Invariant: one object is in memory at a time, whatever the cluster holds; an answer is late, never wrong: after any
//! trouble the object is read anew.

use std::fmt::Debug;
use std::pin::pin;
use std::time::Duration;

use kube::api::{Api, WatchEvent, WatchParams};
use kube::{Error, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt as _;
use tracing::debug;

use super::DEADLINE;
use super::trouble::{Ask, sentence};

/// The server ends a watch after so long, and another begins.
const WATCH_S: u32 = 240;
/// A watch that says nothing for longer, not even its end, is over.
const SILENCE: Duration = Duration::from_secs(260);
/// The first and the longest wait after trouble; in between it doubles.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(20));

/// The object, or that there is none, or why that is not known.
pub(super) type Answer<K> = Result<Option<K>, String>;

/// Follows the object until nobody listens any more.
pub(super) async fn follow<K>(api: Api<K>, name: &str, what: &'static str, tell: mpsc::Sender<Answer<K>>)
where
    K: Resource + Clone + DeserializeOwned + Debug,
{
    let mut wait = BACKOFF.0;
    loop {
        let answer = match timeout(DEADLINE, api.get_opt(name)).await {
            Ok(answer) => answer.map_err(|error| sentence(&Ask { verb: "get", what }, &error)),
            Err(_) => Err(format!("the API server did not answer within {} s", DEADLINE.as_secs())),
        };
        let failed = answer.is_err();
        let version = match &answer {
            Ok(Some(object)) => object.resource_version().unwrap_or_default(),
            // What is there by then is told first.
            _ => String::new(),
        };
        if tell.send(answer).await.is_err() {
            return;
        }
        if !failed {
            match watch(&api, name, version, &tell).await {
                Over::Told => return,
                // A watch that ended in order, or whose place in history is gone, begins anew at once.
                Over::Anew => wait = BACKOFF.0,
                Over::Failed(error) => {
                    debug!(what, %error, "a watch ended");
                    if matches!(&error, Error::Api(status) if status.code == 403) {
                        let refused = Err(sentence(&Ask { verb: "watch", what }, &error));
                        if tell.send(refused).await.is_err() {
                            return;
                        }
                    }
                }
            }
        }
        sleep(wait).await;
        wait = (wait * 2).min(BACKOFF.1);
    }
}

enum Over {
    /// Who listens has had enough.
    Told,
    Anew,
    Failed(Error),
}

async fn watch<K>(api: &Api<K>, name: &str, version: String, tell: &mpsc::Sender<Answer<K>>) -> Over
where
    K: Resource + Clone + DeserializeOwned + Debug,
{
    let params = WatchParams::default().fields(&format!("metadata.name={name}")).timeout(WATCH_S);
    let stream = match timeout(DEADLINE, api.watch(&params, &version)).await {
        Err(_) => return Over::Anew,
        Ok(Err(error)) => return Over::Failed(error),
        Ok(Ok(stream)) => stream,
    };
    let mut stream = pin!(stream);
    let mut known = version;
    loop {
        let object = match timeout(SILENCE, stream.next()).await {
            Err(_) | Ok(None) => return Over::Anew,
            Ok(Some(Err(error))) => return Over::Failed(error),
            // 410: what changed since is forgotten.
            Ok(Some(Ok(WatchEvent::Error(_)))) => return Over::Anew,
            Ok(Some(Ok(WatchEvent::Bookmark(_)))) => continue,
            Ok(Some(Ok(WatchEvent::Deleted(_)))) => None,
            Ok(Some(Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)))) => Some(object),
        };
        if let Some(object) = &object {
            let version = object.resource_version().unwrap_or_default();
            if std::mem::replace(&mut known, version.clone()) == version {
                continue;
            }
        }
        if tell.send(Ok(object)).await.is_err() {
            return Over::Told;
        }
    }
}
