//! The watch: the API's events as changes, over as many connections as it takes.
//!
//! Invariant: between two connections no event is missed: a watch goes on at the revision after the last one seen, which
//! bookmarks move while nothing changes; where the API server cannot (410, set back) the watchers are told to list.

use std::sync::Arc;
use std::time::Duration;

use kube::core::WatchEvent;
use tokio::time::{Instant, timeout};
use tokio_stream::{Stream, StreamExt};

use super::calls::{self, PATH};
use super::link::{Ask, CALL, Link, Live};
use super::object::{DEFINITION, Object, revision_of};
use super::trouble::{Then, Trouble};
use crate::store::Change;
use crate::store::watchers::{Joined, Watchers};

/// The API server is asked to end a watch after so long, so that watches move to one that is new.
const LIFE: Duration = Duration::from_secs(290);
/// It sends a bookmark about every minute; one that sends nothing for so long hangs.
const SILENCE: Duration = Duration::from_secs(90);
/// A watch that ends sooner than this did not serve.
const BRIEF: Duration = Duration::from_secs(1);
/// So many failures in a row, three seconds of them, are an outage. Not fewer: when an API server is restarted its watches come
/// back, and all nodes listing at once is the last thing that it needs then.
const OUTAGE: u32 = 5;

/// Watches while there are watchers. Dropped with the store.
pub(super) async fn run(link: Arc<Link>, mut joined: Joined) {
    let mut watchers = Watchers::default();
    let mut seen = None;
    let mut failures = 0;
    loop {
        if !watchers.wanted(&mut joined).await {
            return std::future::pending().await;
        }
        let trouble = match follow(&link, &mut joined, &mut watchers, &mut seen, &mut failures).await {
            Ok(End::Store) => return std::future::pending().await,
            Ok(End::Watch) => continue,
            Err(trouble) => trouble,
        };
        if trouble.then == Then::Anew {
            seen = None;
        }
        failures += 1;
        tracing::debug!(err = %trouble, failures, "the watch of Kubernetes ended");
        watchers.wait_out(failures, OUTAGE).await;
    }
}

/// How a watch came to its end.
enum End {
    /// The API server ended it in its time.
    Watch,
    /// Nobody wants it any more.
    Store,
}

/// Follows one watch to its end.
async fn follow(
    link: &Link,
    joined: &mut Joined,
    watchers: &mut Watchers,
    seen: &mut Option<u64>,
    failures: &mut u32,
) -> Result<End, Trouble> {
    let mut losses = link.losses();
    let live = link.live().await?;
    // A watch from a revision that was not reached yet waits for it without a word, and after a restore of etcd that may
    // be for ever.
    let now = calls::now(link).await?;
    let from = match seen.filter(|seen| *seen <= now) {
        Some(revision) => revision,
        None => {
            *seen = Some(now);
            watchers.tell(&Change::Relist);
            now
        }
    };
    let path = format!(
        "{PATH}?watch=1&resourceVersion={from}&allowWatchBookmarks=true&timeoutSeconds={}",
        LIFE.as_secs()
    );
    let ask = Ask::new("watch", DEFINITION, path);
    let result = async {
        let began = Instant::now();
        let mut events = open(link, &live, &ask).await?;
        if std::mem::take(failures) >= OUTAGE {
            // A sign of life for those whose calls failed.
            watchers.tell(&Change::Relist);
        }
        loop {
            tokio::select! {
                event = timeout(SILENCE, events.next()) => match event {
                    Err(_) => return Err(Trouble::late(&live.server, SILENCE)),
                    Ok(None) if began.elapsed() < BRIEF => {
                        return Err(Trouble::new(Then::Tell, "the API server ended the watch at once"));
                    }
                    Ok(None) => return Ok(End::Watch),
                    Ok(Some(Err(error))) => {
                        return Err(Trouble::answered(&live.server, &link.options, &ask, &error));
                    }
                    Ok(Some(Ok(event))) => take(link, &live, &ask, event, watchers, seen)?,
                },
                watcher = joined.recv() => match watcher {
                    // Whatever was written since the asker's call is news to it.
                    Some(watcher) => watchers.join(watcher),
                    None => return Ok(End::Store),
                },
                // A call found the API server gone before the watch did.
                Ok(()) = losses.changed() => {
                    return Err(Trouble::tell(format!("the API server at {} was left", live.server)));
                }
            }
        }
    }
    .await;
    link.judge(&live, &result).await;
    result
}

async fn open(
    link: &Link,
    live: &Live,
    ask: &Ask,
) -> Result<impl Stream<Item = Result<WatchEvent<Object>, kube::Error>> + Unpin + use<>, Trouble> {
    let opened = timeout(CALL, live.client.request_events::<Object>(ask.request()?)).await;
    let events = opened
        .map_err(|_| Trouble::late(&live.server, CALL))?
        .map_err(|error| Trouble::answered(&live.server, &link.options, ask, &error))?;
    Ok(Box::pin(events))
}

fn take(
    link: &Link,
    live: &Live,
    ask: &Ask,
    event: WatchEvent<Object>,
    watchers: &mut Watchers,
    seen: &mut Option<u64>,
) -> Result<(), Trouble> {
    let (object, deleted) = match event {
        WatchEvent::Added(object) | WatchEvent::Modified(object) => (object, false),
        WatchEvent::Deleted(object) => (object, true),
        WatchEvent::Bookmark(bookmark) => {
            *seen = revision_of(&bookmark.metadata.resource_version).or(*seen);
            return Ok(());
        }
        WatchEvent::Error(status) => {
            return Err(Trouble::status(&live.server, &link.options, ask, &status));
        }
    };
    *seen = revision_of(&object.metadata.resource_version).or(*seen);
    if let Some((key, entry)) = object.entry() {
        watchers.tell(&match deleted {
            true => Change::Delete { key, revision: entry.revision },
            false => Change::Put { key, entry },
        });
    }
    Ok(())
}
