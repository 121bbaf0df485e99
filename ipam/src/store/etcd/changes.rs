//! The watch: etcd's events as changes, over as many connections as it takes.
//!
//! Invariant: between two connections no event is missed: a watch goes on at the revision after the last one
//! seen, and where etcd cannot (compacted, set back, another cluster) the watchers are told to list.

use std::sync::Arc;

use tonic::Streaming;

use super::calls::{leases_prefix, prefix_end, subnet_of, unsigned};
use super::link::{Link, Live};
use super::proto::{self, EventKind, WatchCreateRequest, WatchEvent, WatchRequest, WatchResponse};
use super::trouble::{Then, Trouble};
use crate::store::watchers::{Joined, Watchers};
use crate::store::{Change, Entry};

/// So many failures in a row are an outage. Not the first: when a member goes, all its nodes move on, and all of them listing at
/// once is the last thing that etcd needs.
const OUTAGE: u32 = 2;

/// Where a watch goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    cluster: u64,
    revision: i64,
}

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
            Ok(()) => return std::future::pending().await,
            Err(trouble) => trouble,
        };
        failures += 1;
        tracing::debug!(err = %trouble, failures, "the watch of etcd ended");
        watchers.wait_out(failures, OUTAGE).await;
    }
}

/// Follows one watch to its end; `Ok` once the store is gone.
async fn follow(
    link: &Link,
    joined: &mut Joined,
    watchers: &mut Watchers,
    seen: &mut Option<Seen>,
    failures: &mut u32,
) -> Result<(), Trouble> {
    let mut losses = link.losses();
    let live = link.live().await?;
    let result = async {
        let mut stream = open(link, &live, watchers, seen).await?;
        if std::mem::take(failures) >= OUTAGE {
            // A sign of life for those whose calls failed.
            watchers.tell(&Change::Relist);
        }
        loop {
            tokio::select! {
                message = stream.message() => take(link, &live, message, watchers, seen)?,
                watcher = joined.recv() => match watcher {
                    // Whatever was written since the asker's call is news to it.
                    Some(watcher) => watchers.join(watcher),
                    None => return Ok(()),
                },
                // A call found the connection dead before the watch did.
                Ok(()) = losses.changed() => {
                    return Err(Trouble::elsewhere(format!("etcd at {} was left", live.endpoint)));
                }
            }
        }
    }
    .await;
    match &result {
        Err(trouble) if trouble.then == Then::Elsewhere => link.forget(&live).await,
        Err(trouble) if trouble.then == Then::Login => drop(link.login_again(&live).await?),
        _ => {}
    }
    result
}

/// Begins the watch, where the last one ended if etcd still can.
async fn open(
    link: &Link,
    live: &Live,
    watchers: &mut Watchers,
    seen: &mut Option<Seen>,
) -> Result<Streaming<WatchResponse>, Trouble> {
    let leases = leases_prefix(&link.options);
    let create = WatchCreateRequest {
        range_end: prefix_end(&leases),
        key: leases,
        start_revision: seen.map_or(0, |seen| seen.revision + 1),
        progress_notify: true,
        fragment: true,
    };
    let mut stream = link.stream(live, proto::WATCH, WatchRequest { create: Some(create) }).await?;
    let created: WatchResponse = link.next(live, &mut stream).await?;
    refused(link, &created, seen)?;
    let header = created.header.unwrap_or_default();
    let now = Seen { cluster: header.cluster_id, revision: header.revision };
    match *seen {
        Some(before) if before.cluster == now.cluster && before.revision <= now.revision => {}
        Some(_) => {
            // etcd would wait for a revision that this history may never reach, or that means something else.
            *seen = None;
            watchers.tell(&Change::Relist);
            return Err(Trouble::elsewhere("etcd was set back: the watch begins anew"));
        }
        None => {
            *seen = Some(now);
            watchers.tell(&Change::Relist);
        }
    }
    Ok(stream)
}

fn take(
    link: &Link,
    live: &Live,
    message: Result<Option<WatchResponse>, tonic::Status>,
    watchers: &mut Watchers,
    seen: &mut Option<Seen>,
) -> Result<(), Trouble> {
    let response = link.message(live, message)?;
    refused(link, &response, seen)?;
    let header = response.header.unwrap_or_default();
    // A watch that catches up gets its events in parts, each under the revision of now: the events count. Without
    // any it says how far all is told.
    let last = response.events.iter().filter_map(|event| Some(event.kv.as_ref()?.mod_revision)).max();
    for change in response.events.into_iter().filter_map(|event| change(link, event)) {
        watchers.tell(&change);
    }
    // A part of a revision is not the revision: the rest would be skipped should it not come.
    if !response.fragment {
        *seen = Some(Seen { cluster: header.cluster_id, revision: last.unwrap_or(header.revision) });
    }
    Ok(())
}

/// Tells why etcd will not go on with a watch.
fn refused(link: &Link, response: &WatchResponse, seen: &mut Option<Seen>) -> Result<(), Trouble> {
    if response.compact_revision > 0 {
        *seen = None;
        return Err(Trouble::tell("etcd was compacted beyond what the watch had seen: it begins anew"));
    }
    if response.canceled {
        // etcd 3.4 says "permission denied" for a token that ran out as well.
        let sentence =
            format!("etcd refuses to watch {}/v1/ ({})", link.options.prefix, response.cancel_reason);
        return Err(Trouble { then: Then::Login, sentence });
    }
    Ok(())
}

fn change(link: &Link, event: WatchEvent) -> Option<Change> {
    let kind = event.kind();
    let kv = event.kv?;
    let key = subnet_of(&link.options, &kv.key)?;
    let revision = unsigned(kv.mod_revision);
    Some(match kind {
        EventKind::Put => Change::Put { key, entry: Entry { value: kv.value, revision } },
        EventKind::Delete => Change::Delete { key, revision },
    })
}
