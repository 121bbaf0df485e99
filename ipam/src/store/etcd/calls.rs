//! The calls of the store as transactions of etcd.
//!
//! Keys, below `PREFIX/v1/`: `store` holds a random name, which changes when the store begins anew or was set
//! back; `leases/SUBNET` holds an entry; `deleted` the subnet whose entry was deleted last. Invariant: a write is one transaction that compares the name last
//! listed and the key's revision, so it fails on a store that was emptied or replaced since.

use std::sync::Arc;
use std::time::Instant;

use tokio_rustls::rustls::crypto::ring;

use super::access::EtcdOptions;
use super::link::{Link, Live};
use super::proto::{
    self, Compare, CompareResult, CompareTarget, DeleteRangeRequest, KeyValue, LeaseGrantRequest,
    LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, Op, Operand, PutRequest, RangeRequest,
    RequestOp, ResponseHeader, TxnRequest, TxnResponse,
};
use super::trouble::{Failed, Then, Trouble};
use crate::store::desk;
use crate::store::{Entry, Expect, Key, PutError, Snapshot, StoreError};

/// The lease of etcd is kept alive so many times within its time to live.
const SIGNS_OF_LIFE: u32 = 100;

/// Returns the key that holds the store's name.
pub(super) fn name_key(options: &EtcdOptions) -> Vec<u8> {
    format!("{}/v1/store", options.prefix).into_bytes()
}

/// Returns what the keys of entries begin with.
pub(super) fn leases_prefix(options: &EtcdOptions) -> Vec<u8> {
    format!("{}/v1/leases/", options.prefix).into_bytes()
}

/// Returns the first key after all that begin with `prefix`.
pub(super) fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    *end.last_mut().expect("a prefix has a slash at its end") += 1;
    end
}

/// Returns the subnet that a key names.
pub(super) fn subnet_of(options: &EtcdOptions, key: &[u8]) -> Option<Key> {
    let text =
        key.strip_prefix(leases_prefix(options).as_slice()).and_then(|key| std::str::from_utf8(key).ok());
    let subnet = text.and_then(|text| text.parse().ok());
    if subnet.is_none() {
        tracing::warn!(key = %String::from_utf8_lossy(key), "key of etcd is no subnet");
    }
    subnet
}

pub(super) fn unsigned(revision: i64) -> u64 {
    u64::try_from(revision).unwrap_or(0)
}

/// What the store remembers between calls.
pub(super) struct Calls {
    link: Arc<Link>,
    /// The store's name, once seen in this run.
    name: Option<Name>,
    /// The store, by cluster and name, that the asker's expectations are about.
    listed: Option<(u64, Vec<u8>)>,
    /// When the lease of etcd was last seen to live.
    alive: Option<Instant>,
}

#[derive(Clone, PartialEq, Eq)]
struct Name {
    cluster: u64,
    text: Vec<u8>,
    /// The highest revision seen under the name: a healthy etcd never answers with a lower one.
    revision: u64,
    /// The connection that the list came through: behind the next one may be a backup.
    connection: u64,
}

impl Calls {
    pub(super) fn new(link: Arc<Link>) -> Self {
        Self { link, name: None, listed: None, alive: None }
    }

    async fn list_once(&mut self) -> Result<Snapshot, Trouble> {
        let options = self.link.options.clone();
        let leases = leases_prefix(&options);
        let all = RangeRequest { range_end: prefix_end(&leases), key: leases };
        let both = || TxnRequest {
            success: vec![read(name_key(&options)), RequestOp { op: Some(Op::Range(all.clone())) }],
            ..TxnRequest::default()
        };
        loop {
            let live = self.link.live().await?;
            let answer = self.transact(&live, both()).await?;
            let header = answer.header.clone().unwrap_or_default();
            let mut ranges = ranges(answer);
            let (Some(entries), Some(name)) = (ranges.pop(), ranges.pop()) else {
                return Err(Trouble::tell("etcd left out a part of its answer: use version 3.4 or newer"));
            };
            let Some(name) = name.into_iter().next() else {
                self.begin().await?;
                continue;
            };
            if self.was_set_back(&header, &name) {
                self.rename(&name).await?;
                continue;
            }
            let snapshot = Snapshot {
                store_id: format!("etcd-{:x}-{}", header.cluster_id, String::from_utf8_lossy(&name.value)),
                revision: unsigned(header.revision),
                entries: entries
                    .into_iter()
                    .filter_map(|kv| {
                        let entry = Entry { revision: unsigned(kv.mod_revision), value: kv.value };
                        Some((subnet_of(&options, &kv.key)?, entry))
                    })
                    .collect(),
            };
            self.name = Some(Name {
                cluster: header.cluster_id,
                text: name.value,
                revision: snapshot.revision,
                connection: live.number,
            });
            self.give_sign().await;
            return Ok(snapshot);
        }
    }

    async fn write(&mut self, key: Key, expect: Expect, work: Vec<Op>) -> Result<u64, Failed> {
        let options = self.link.options.clone();
        // Behind a new connection may be a backup: it is listed first.
        let (live, name) = loop {
            let live = self.link.live().await?;
            match self.name.clone().filter(|name| name.connection == live.number) {
                Some(name) => break (live, name),
                None => drop(self.list_once().await?),
            }
        };
        let replaced = Trouble::tell(format!(
            "the store {} in etcd was emptied or replaced: its leases are read again",
            options.prefix
        ));
        // Equal revisions of two stores mean nothing.
        if self.listed.as_ref().is_some_and(|listed| *listed != (name.cluster, name.text.clone())) {
            return Err(replaced.into());
        }
        let path = entry_key(&options, key);
        let mut compare = vec![is(name_key(&options), Operand::Value(name.text.clone()))];
        match expect {
            // An absent key has version and revision 0.
            Expect::Absent => compare.push(is(path.clone(), Operand::ModRevision(0))),
            Expect::Revision(revision) => {
                let revision = i64::try_from(revision).unwrap_or(i64::MAX);
                compare.push(is(path.clone(), Operand::ModRevision(revision)));
                compare.push(exists(path.clone()));
            }
        }
        let request = TxnRequest {
            compare,
            success: work.into_iter().map(|op| RequestOp { op: Some(op) }).collect(),
            failure: vec![read(name_key(&options)), read(path)],
        };
        let answer = self.transact(&live, request).await?;
        let header = answer.header.clone().unwrap_or_default();
        if answer.succeeded {
            self.name = Some(Name { revision: unsigned(header.revision), ..name });
            return Ok(unsigned(header.revision));
        }
        let mut ranges = ranges(answer);
        let (Some(entry), Some(found)) = (ranges.pop(), ranges.pop()) else {
            return Err(Trouble::tell("etcd left out a part of its answer: use version 3.4 or newer").into());
        };
        if found.first().is_none_or(|found| found.value != name.text || header.cluster_id != name.cluster) {
            return Err(replaced.into());
        }
        let entry = entry.into_iter().next();
        Err(Failed::Conflict(entry.map(|kv| Entry { revision: unsigned(kv.mod_revision), value: kv.value })))
    }

    /// Performs a transaction on a connection; a login that ran out is renewed and the call made again.
    async fn transact(&self, live: &Live, request: TxnRequest) -> Result<TxnResponse, Trouble> {
        let result = match self.link.call(live, proto::TXN, request.clone()).await {
            Err(trouble) if trouble.then == Then::Login => {
                let renewed = self.link.login_again(live).await?;
                self.link.call(&renewed, proto::TXN, request).await
            }
            result => result,
        };
        self.judge(live, result).await
    }

    async fn judge<T>(&self, live: &Live, result: Result<T, Trouble>) -> Result<T, Trouble> {
        if let Err(trouble) = &result
            && matches!(trouble.then, Then::Elsewhere | Then::Login)
        {
            self.link.forget(live).await;
        }
        result
    }

    /// Names a store that has no name: an empty one, unless it had one before.
    async fn begin(&mut self) -> Result<(), Trouble> {
        let options = &self.link.options;
        if self.name.is_some() {
            return Err(Trouble::tell(format!(
                "the store {} in etcd was emptied: restore it, or restart weftd to begin an empty one",
                options.prefix
            )));
        }
        let absent = is(name_key(options), Operand::Version(0));
        self.put_name(absent).await
    }

    /// Returns whether etcd answers from before what it answered already: it was restored from a backup.
    fn was_set_back(&self, header: &ResponseHeader, name: &KeyValue) -> bool {
        self.name.as_ref().is_some_and(|seen| {
            seen.cluster == header.cluster_id
                && seen.text == name.value
                && unsigned(header.revision) < seen.revision
        })
    }

    /// Gives a store that was set back another name, so that every node sees that its history is another.
    async fn rename(&mut self, name: &KeyValue) -> Result<(), Trouble> {
        tracing::warn!("etcd was set back to an earlier revision: the store gets a new name");
        let same = is(name.key.clone(), Operand::Value(name.value.clone()));
        self.put_name(same).await
    }

    async fn put_name(&mut self, condition: Compare) -> Result<(), Trouble> {
        let mut random = [0; 16];
        let filled = ring::default_provider().secure_random.fill(&mut random);
        filled.map_err(|_| Trouble::tell("the system gives no random numbers"))?;
        let value = random.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into_bytes();
        let put = Op::Put(PutRequest { key: name_key(&self.link.options), value, lease: 0 });
        // Of several daemons one is first; the list that follows reads what it wrote.
        let request = TxnRequest {
            compare: vec![condition],
            success: vec![RequestOp { op: Some(put) }],
            failure: Vec::new(),
        };
        let live = self.link.live().await?;
        self.transact(&live, request).await.map(drop)
    }

    /// Keeps the node's entries in etcd, now and then; a failure waits for the next time.
    async fn give_sign(&mut self) {
        let every = self.link.options.abandon_after / SIGNS_OF_LIFE;
        if self.alive.is_some_and(|alive| alive.elapsed() < every) {
            return;
        }
        match self.keep_alive().await {
            Ok(true) => self.alive = Some(Instant::now()),
            // No entry hangs on it; the next write makes it.
            Ok(false) => self.alive = None,
            Err(trouble) => tracing::debug!(err = %trouble, "the lease of etcd was not kept alive"),
        }
    }

    /// Sees to it that the node's lease of etcd exists.
    async fn ensure_lease(&mut self) -> Result<(), Trouble> {
        if !self.keep_alive().await? {
            let options = &self.link.options;
            let grant = LeaseGrantRequest { ttl: options.abandon_seconds(), id: options.lease_id() };
            let live = self.link.live().await?;
            let result = self.link.call::<_, LeaseGrantResponse>(&live, proto::LEASE_GRANT, grant).await;
            self.judge(&live, result).await?;
        }
        self.alive = Some(Instant::now());
        Ok(())
    }

    /// Returns whether the node's lease of etcd exists; if so it lives on for its whole time.
    async fn keep_alive(&self) -> Result<bool, Trouble> {
        let live = self.link.live().await?;
        let request = LeaseKeepAliveRequest { id: self.link.options.lease_id() };
        let result = async {
            let mut stream = self.link.stream(&live, proto::LEASE_KEEP_ALIVE, request).await?;
            let answer: LeaseKeepAliveResponse = self.link.next(&live, &mut stream).await?;
            Ok(answer.ttl > 0)
        };
        let result = result.await;
        self.judge(&live, result).await
    }
}

impl desk::Calls for Calls {
    async fn list(&mut self) -> Result<Snapshot, StoreError> {
        // A list changes nothing, so it may be asked of every member.
        let mut attempts = self.link.options.endpoints.len() + 1;
        loop {
            attempts -= 1;
            match self.list_once().await {
                Err(trouble) if trouble.then != Then::Tell && attempts > 0 => {}
                result => {
                    let snapshot = result?;
                    self.listed = self.name.as_ref().map(|name| (name.cluster, name.text.clone()));
                    return Ok(snapshot);
                }
            }
        }
    }

    async fn put_if(&mut self, key: Key, expect: Expect, value: Vec<u8>) -> Result<u64, PutError> {
        let options = &self.link.options;
        let lease = options.lease_id();
        let path = entry_key(options, key);
        let put = Op::Put(PutRequest { key: path, value, lease });
        if self.alive.is_none() {
            self.ensure_lease().await.map_err(StoreError::from)?;
        }
        match self.write(key, expect, vec![put.clone()]).await {
            Err(Failed::Trouble(trouble)) if trouble.then == Then::Lease => {
                self.ensure_lease().await.map_err(StoreError::from)?;
                self.write(key, expect, vec![put]).await
            }
            result => result,
        }
        .map_err(PutError::from)
    }

    async fn delete_if(&mut self, key: Key, revision: u64) -> Result<u64, PutError> {
        let options = &self.link.options;
        let delete = Op::Delete(DeleteRangeRequest { key: entry_key(options, key) });
        // An etcd that is out of space takes deletions and no renewals. A node must not delete as expired what its
        // owner cannot renew: with something to write, the deletion is refused as well.
        let last = format!("{}/v1/deleted", options.prefix).into_bytes();
        let note = Op::Put(PutRequest { key: last, value: key.to_string().into_bytes(), lease: 0 });
        Ok(self.write(key, Expect::Revision(revision), vec![delete, note]).await?)
    }

    fn late(&self) -> StoreError {
        StoreError(format!(
            "etcd did not answer within {} s: look at `etcdctl endpoint status --cluster`",
            desk::BOUND.as_secs()
        ))
    }
}

fn entry_key(options: &EtcdOptions, key: Key) -> Vec<u8> {
    format!("{}/v1/leases/{key}", options.prefix).into_bytes()
}

fn read(key: Vec<u8>) -> RequestOp {
    RequestOp { op: Some(Op::Range(RangeRequest { key, range_end: Vec::new() })) }
}

fn ranges(answer: TxnResponse) -> Vec<Vec<KeyValue>> {
    answer.responses.into_iter().filter_map(|response| Some(response.range?.kvs)).collect()
}

fn is(key: Vec<u8>, operand: Operand) -> Compare {
    let target = match operand {
        Operand::Version(_) => CompareTarget::Version,
        Operand::ModRevision(_) => CompareTarget::Mod,
        Operand::Value(_) => CompareTarget::Value,
    };
    Compare { result: CompareResult::Equal.into(), target: target.into(), key, operand: Some(operand) }
}

fn exists(key: Vec<u8>) -> Compare {
    Compare { result: CompareResult::Greater.into(), ..is(key, Operand::Version(0)) }
}
