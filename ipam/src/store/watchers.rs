//! Those who are told of changes: each with a bounded backlog, and told to list when it is full.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::Change;

/// How many changes wait for a watcher before it is told to list instead.
pub(super) const BACKLOG: usize = 64;

/// The first and the longest wait before a watch that failed begins anew.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// Where new watchers come from.
pub(super) type Joined = mpsc::UnboundedReceiver<mpsc::Sender<Change>>;

/// Those who are told.
#[derive(Default)]
pub(super) struct Watchers(Vec<mpsc::Sender<Change>>);

impl Watchers {
    /// Waits until there is a watcher; `false` once the store is gone.
    pub(super) async fn wanted(&mut self, joined: &mut Joined) -> bool {
        while self.0.is_empty() {
            match joined.recv().await {
                Some(watcher) => self.0.push(watcher),
                None => return false,
            }
        }
        true
    }

    /// Takes one more, for whom anything may be news.
    pub(super) fn join(&mut self, watcher: mpsc::Sender<Change>) {
        tell(&watcher, &Change::Relist);
        self.0.push(watcher);
    }

    pub(super) fn tell(&mut self, change: &Change) {
        self.0.retain(|watcher| tell(watcher, change));
    }

    /// Waits after the watch has failed, so many times in a row; `outage` times are an outage, of which watchers are told once: a
    /// list will tell the asker why.
    pub(super) async fn wait_out(&mut self, failures: u32, outage: u32) {
        if failures == outage {
            self.tell(&Change::Relist);
        }
        tokio::time::sleep(BACKOFF.0.saturating_mul(1 << failures.min(10)).min(BACKOFF.1)).await;
    }
}

/// Tells one watcher; the last place of its backlog is kept for a `Relist`, behind which nothing is lost.
fn tell(watcher: &mpsc::Sender<Change>, change: &Change) -> bool {
    let change = match watcher.capacity() {
        // What waits last is a `Relist` already.
        0 => return !watcher.is_closed(),
        1 => Change::Relist,
        _ => change.clone(),
    };
    !matches!(watcher.try_send(change), Err(TrySendError::Closed(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delete(revision: u64) -> Change {
        Change::Delete { key: "10.32.4.0/24".parse().expect("a subnet"), revision }
    }

    #[test]
    fn a_watcher_that_falls_behind_is_told_to_list_after_what_it_has() {
        let (sender, mut receiver) = mpsc::channel(4);
        for revision in 1..=10 {
            assert!(tell(&sender, &delete(revision)));
        }
        let waits: Vec<_> = std::iter::from_fn(|| receiver.try_recv().ok()).collect();
        assert_eq!(waits, [delete(1), delete(2), delete(3), Change::Relist]);
        assert!(tell(&sender, &delete(11)));
        assert_eq!(receiver.try_recv(), Ok(delete(11)));
        drop(receiver);
        assert!(!tell(&sender, &delete(12)), "one that is gone is forgotten");
    }
}
