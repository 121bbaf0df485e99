//! What a node knows of the store, and how long it has watched each entry stay the same.
//!
//! An entry's quiet time grows only while this node really watches: between two answers of the store at
//! most `most_gap` counts. After an outage of the store, or of this node, no lease looks expired only
//! because nobody could renew it or see it renewed.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use weft_wire::types::Subnet;

use super::{LeaseValue, ValueError};
use crate::store::{Entry, Key, Snapshot};

/// A lower revision is taken for an old answer so many times; then the store was restored from a backup.
const MOST_STALE: u32 = 5;

/// One entry as last seen.
#[derive(Debug, Clone)]
pub(super) struct Observed {
    pub(super) revision: u64,
    pub(super) value: Result<LeaseValue, ValueError>,
    /// How long this node has watched the entry stay at this revision.
    quiet: Duration,
    /// A snapshot has shown it: the time since then was watched.
    listed: bool,
}

impl Observed {
    fn new(key: Key, entry: &Entry) -> Self {
        let value = LeaseValue::decode(key, &entry.value);
        Self { revision: entry.revision, value, quiet: Duration::ZERO, listed: false }
    }

    /// Returns whether another node may take the subnet. What cannot be read never expires.
    pub(super) fn expired(&self) -> bool {
        self.value.as_ref().is_ok_and(|value| value.ttl.is_some_and(|ttl| self.quiet > ttl))
    }

    pub(super) fn quiet(&self) -> Duration {
        self.quiet
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Absorbed {
    Fresh,
    /// Another store than before, or a backup of it: what was written since may be gone.
    Replaced,
    /// Older than what is known; nothing was changed.
    Stale,
}

#[derive(Debug, Default)]
pub(super) struct View {
    store_id: Option<String>,
    pub(super) revision: u64,
    pub(super) entries: BTreeMap<Key, Observed>,
    pub(super) seen_at: Option<Instant>,
    stale: u32,
}

impl View {
    /// Knows nothing yet, but that the store wrote something at `revision`.
    ///
    /// An answer from before it says nothing of today. A lease's epoch is such a revision, in the store
    /// that gave it (`judge`): what a lagging replica had before the lease was made is not held against it.
    pub(super) fn since(revision: u64) -> Self {
        Self { revision, ..Self::default() }
    }

    pub(super) fn absorb(&mut self, snapshot: &Snapshot, now: Instant, most_gap: Duration) -> Absorbed {
        let same_store = self.store_id.as_ref().is_none_or(|known| *known == snapshot.store_id);
        if same_store && snapshot.revision < self.revision && self.stale < MOST_STALE {
            self.stale += 1;
            return Absorbed::Stale;
        }
        let replaced = !same_store || snapshot.revision < self.revision;
        let known = self.store_id.is_some();
        let watched = self.watched(now, most_gap);
        let mut before = std::mem::take(&mut self.entries);
        self.entries = snapshot
            .entries
            .iter()
            .map(|(&key, entry)| {
                let same = before.remove(&key).filter(|seen| seen.revision == entry.revision && !replaced);
                let mut seen = same.unwrap_or_else(|| Observed::new(key, entry));
                if std::mem::replace(&mut seen.listed, true) {
                    seen.quiet += watched;
                }
                (key, seen)
            })
            .collect();
        self.store_id = Some(snapshot.store_id.clone());
        self.revision = snapshot.revision;
        self.seen_at = Some(now);
        self.stale = 0;
        if replaced && known { Absorbed::Replaced } else { Absorbed::Fresh }
    }

    /// Forgets how long entries were quiet: a store that takes no writes lets nobody renew.
    pub(super) fn count_anew(&mut self) {
        self.entries.values_mut().for_each(|seen| seen.quiet = Duration::ZERO);
    }

    /// Takes what a conditional write found or left under a key.
    pub(super) fn set(&mut self, key: Key, entry: Option<&Entry>) {
        match entry {
            None => drop(self.entries.remove(&key)),
            Some(entry) => {
                self.revision = self.revision.max(entry.revision);
                if self.entries.get(&key).is_none_or(|seen| seen.revision != entry.revision) {
                    self.entries.insert(key, Observed::new(key, entry));
                }
            }
        }
    }

    /// Returns how much of the time since the last snapshot counts as watched.
    pub(super) fn watched(&self, now: Instant, most_gap: Duration) -> Duration {
        self.seen_at.map_or(Duration::ZERO, |seen| now.saturating_duration_since(seen).min(most_gap))
    }

    /// Returns the entries that share an address with `subnet`, its own key excepted.
    pub(super) fn overlapping(&self, subnet: Subnet) -> impl Iterator<Item = (&Key, &Observed)> {
        self.entries.iter().filter(move |(key, _)| **key != subnet && key.overlaps(subnet))
    }
}
