//! Verified records that all meshes of a simulation share: each is verified once and kept once.
//!
//! What a daemon does for its own records, thousands of meshes in one process would each do for all.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use weft_wire::record::{BadSignature, ClaimedRecord, Each, NodeRecord, SignedRecord, Verify};
use weft_wire::types::{NodeName, PublicKey};

/// Dropped records are cleared away when there are so many entries, and then at twice as many as are left.
const CLEAR_AT: usize = 1 << 14;

type Encoded = (Box<[u8]>, [u8; 64]);

/// The records.
#[derive(Debug, Default)]
pub struct SharedRecords(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    records: HashMap<Encoded, Weak<SignedRecord>>,
    clear_at: usize,
    /// By the whole record with its certificate: few are looked at twice in another form.
    certified: HashMap<(PublicKey, NodeName, u64), (NodeRecord, bool)>,
}

impl Verify for SharedRecords {
    fn verify(&self, claimed: ClaimedRecord, cluster: &str) -> Result<Arc<SignedRecord>, BadSignature> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (bytes, signature) = claimed.encoded();
        let encoded: Encoded = (bytes.into(), *signature);
        if let Some(record) = known.records.get(&encoded).and_then(Weak::upgrade) {
            return Ok(record);
        }
        let record = Arc::new(claimed.verify(cluster)?);
        if known.records.len() >= known.clear_at.max(CLEAR_AT) {
            known.records.retain(|_, record| record.strong_count() > 0);
            known.clear_at = known.records.len() * 2;
        }
        known.records.insert(encoded, Arc::downgrade(&record));
        Ok(record)
    }

    fn verify_certificate(&self, site: &PublicKey, cluster: &str, record: &NodeRecord) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let place = (*site, record.node.clone(), record.version);
        if let Some((seen, holds)) = known.certified.get(&place)
            && seen == record
        {
            return *holds;
        }
        let holds = Each.verify_certificate(site, cluster, record);
        known.certified.insert(place, (record.clone(), holds));
        holds
    }
}
