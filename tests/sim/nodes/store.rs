//! The lease store that all machines share, and each machine's way to it: late, deaf, forgetful or behind.

use std::collections::VecDeque;

use weft_daemon::control::{StoreAnswer, StoreRequest};
use weft_ipam::lease::LeaseValue;
use weft_ipam::store::memory::MemoryMap;
use weft_ipam::store::{PutError, Snapshot, StoreError};

/// How many old snapshots a replica that is behind may answer with.
const BEHIND: usize = 6;

/// The store.
#[derive(Debug, Default)]
pub struct SharedStore {
    map: MemoryMap,
    /// Earlier states, the latest last.
    past: VecDeque<Snapshot>,
}

/// One machine's way to the store.
#[derive(Debug, Clone, Copy, Default)]
pub struct Link {
    /// Requests do not arrive.
    pub down: bool,
    /// So many requests to come are performed, and their answers lost.
    pub lost_answers: u32,
    /// Lists come from a replica so many writes behind,
    pub behind: usize,
    /// so many times: a store may answer late, not for ever.
    pub stale_lists: u32,
}

impl SharedStore {
    /// Returns what the store really holds.
    pub fn truth(&self) -> Snapshot {
        self.map.list("sim")
    }

    /// Returns the leases that the store really holds.
    pub fn leases(&self) -> Vec<LeaseValue> {
        let truth = self.truth();
        truth
            .entries
            .iter()
            .map(|(key, entry)| LeaseValue::decode(*key, &entry.value).expect("only leases are written"))
            .collect()
    }

    /// Performs a request that came over this way.
    pub fn perform(&mut self, request: StoreRequest, link: &mut Link) -> StoreAnswer {
        if link.down {
            return failed(request, "the store cannot be reached");
        }
        let asked = request.clone();
        let answer = match request {
            StoreRequest::List => {
                let stale = link.behind > 0 && link.stale_lists > 0;
                link.stale_lists = link.stale_lists.saturating_sub(1);
                let behind = self.past.len().checked_sub(link.behind).filter(|_| stale);
                let old = behind.and_then(|place| self.past.get(place)).cloned();
                StoreAnswer::Listed(Ok(old.unwrap_or_else(|| self.truth())))
            }
            StoreRequest::Put { key, expect, value } => {
                self.keep();
                StoreAnswer::Put(key, self.map.put_if(key, expect, value).map_err(PutError::Conflict))
            }
            StoreRequest::Delete { key, revision } => {
                self.keep();
                StoreAnswer::Deleted(key, self.map.delete_if(key, revision).map_err(PutError::Conflict))
            }
        };
        if link.lost_answers > 0 {
            link.lost_answers -= 1;
            return failed(asked, "the store's answer was lost");
        }
        answer
    }

    fn keep(&mut self) {
        self.past.push_back(self.truth());
        if self.past.len() > BEHIND {
            self.past.pop_front();
        }
    }
}

fn failed(request: StoreRequest, why: &str) -> StoreAnswer {
    let error = StoreError(why.to_owned());
    match request {
        StoreRequest::List => StoreAnswer::Listed(Err(error)),
        StoreRequest::Put { key, .. } => StoreAnswer::Put(key, Err(error.into())),
        StoreRequest::Delete { key, .. } => StoreAnswer::Deleted(key, Err(error.into())),
    }
}
