//! The node's pods: what CNI asks, the pool, the journal, and the worker threads that attach.
//!
//! It knows no peers. Invariants: an address is in the journal before `attach::add` runs and until
//! `attach::del` has succeeded; one attachment is worked on by at most one worker.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, oneshot};
use tracing::{debug, info, warn};
use weft_ipam::pods::{AssignError, PodAddresses, PodPool};
use weft_wire::api;
use weft_wire::types::Subnet;

use crate::attach::{
    self, AddPlan, Attachment, AttachmentId, CheckPlan, CniError, CniReply, CniRequest, CniResult, Code,
    Command, Condition, DelRequest, GcRequest, Network, PodRequest, Success,
};
use crate::journal::Journal;

/// Where the answer to a call goes.
pub type Answer = oneshot::Sender<api::Reply>;

/// The pods of one node.
#[derive(Debug)]
pub struct Pods {
    pool: PodPool,
    journal: Journal,
    attachments: BTreeMap<AttachmentId, Attachment>,
    busy: BTreeSet<AttachmentId>,
    /// Host ends that are being removed: no pod is attached under their names meanwhile.
    strays: BTreeSet<String>,
    done: mpsc::Sender<Done>,
}

/// What a worker thread finished.
#[derive(Debug)]
pub struct Done(Work);

#[derive(Debug)]
enum Work {
    Added { call: Call, id: AttachmentId, keep: bool, outcome: Result<CniResult, CniError> },
    Deleted { call: Call, ids: Vec<AttachmentId>, outcome: Result<(), CniError> },
    Checked { call: Call, outcome: Result<(), CniError> },
    Surveyed { surveyed: Vec<Attachment>, outcome: Result<Vec<Condition>, CniError> },
}

#[derive(Debug)]
struct Call {
    request: CniRequest,
    answer: Answer,
}

impl Call {
    fn reply(self, outcome: Result<Success, CniError>) {
        if let Err(error) = &outcome {
            info!(verb = self.request.verb, container = self.request.container_id, err = %error.message, "CNI call failed");
        }
        // A caller that hung up has its answer in the journal: a repeated ADD gets the same.
        let _ = self.answer.send(cni_reply(attach::reply(&self.request, outcome)));
    }
}

fn cni_reply(reply: CniReply) -> api::Reply {
    api::Reply { body: Some(api::ReplyBody::Cni(reply)) }
}

/// Whether pods can be attached now, and the network that they join.
pub type Readiness = Result<Network, String>;

impl Pods {
    /// Takes over what the journal recovered.
    pub fn new(
        mut pool: PodPool,
        journal: Journal,
        recovered: Vec<Attachment>,
        done: mpsc::Sender<Done>,
    ) -> Self {
        let mut attachments = BTreeMap::new();
        for attachment in recovered {
            let addresses: Vec<_> = attachment.addresses.iter().map(|a| a.address.addr()).collect();
            if let Err(error) = pool.adopt(&pool_id(&attachment.id), &addresses) {
                warn!(container = attachment.id.container(), err = %error, "journalled pod address is not of this node");
            }
            attachments.insert(attachment.id.clone(), attachment);
        }
        Self { pool, journal, attachments, busy: BTreeSet::new(), strays: BTreeSet::new(), done }
    }

    /// Returns the attachments, those in progress included.
    pub fn attachments(&self) -> impl Iterator<Item = &Attachment> {
        self.attachments.values()
    }

    /// Replaces the host ends that are being removed; returns those that no pod accounts for.
    pub fn set_strays(&mut self, mut strays: BTreeSet<String>) -> BTreeSet<String> {
        strays.retain(|name| !self.attachments.values().any(|attachment| attachment.host_ifname() == *name));
        self.strays.clone_from(&strays);
        strays
    }

    /// Returns whether no pod is worked on.
    pub fn is_idle(&self) -> bool {
        self.busy.is_empty()
    }

    /// Returns whether no pod holds an address.
    pub fn is_empty(&self) -> bool {
        self.attachments.is_empty()
    }

    /// Returns the pool, for status.
    pub fn pool(&self) -> &PodPool {
        &self.pool
    }

    /// Replaces the subnets that new pods get addresses from.
    pub fn set_subnets(&mut self, subnets: &[Subnet]) {
        self.pool.set_subnets(subnets);
    }

    /// Answers a call of the shim, now or when a worker is done.
    pub fn handle_call(&mut self, request: CniRequest, answer: Answer, ready: Readiness) {
        let parsed = attach::parse(&request);
        let call = Call { request, answer };
        match parsed {
            Err(error) => call.reply(Err(error)),
            Ok(Command::Version(_)) => call.reply(Ok(Success::Versions)),
            Ok(Command::Status(_)) => call.reply(match ready {
                Ok(_) => Ok(Success::Done),
                Err(blocked) => Err(CniError::new(Code::NotAvailable, blocked)),
            }),
            Ok(Command::Add(pod)) if self.strays.contains(&pod.id.host_ifname()) => {
                call.reply(Err(in_progress(&pod.id)))
            }
            Ok(Command::Add(pod)) => self.add(call, pod, ready),
            Ok(Command::Del(request)) => self.del(call, request),
            Ok(Command::Check(request)) => self.check(call, request, ready),
            Ok(Command::Gc(request)) => self.collect_garbage(call, &request),
        }
    }

    fn add(&mut self, call: Call, request: PodRequest, ready: Readiness) {
        let id = request.id.clone();
        if self.busy.contains(&id) {
            return call.reply(Err(in_progress(&id)));
        }
        match self.prepare(request, ready) {
            Err(error) => call.reply(Err(error)),
            Ok((plan, keep)) => {
                self.busy.insert(id.clone());
                self.work(move || {
                    let outcome = attach::add(&plan);
                    Work::Added { call, id, keep, outcome }
                });
            }
        }
    }

    /// Assigns and journals; `keep` tells that the attachment existed before, so a failure must not free it.
    fn prepare(&mut self, request: PodRequest, ready: Readiness) -> Result<(AddPlan, bool), CniError> {
        let network = ready.map_err(|blocked| CniError::new(Code::TryAgainLater, blocked))?;
        let id = request.id.clone();
        let admission = attach::admit(&request, self.attachments.get(&id))?;
        let keep = self.attachments.contains_key(&id);
        let addresses = self
            .pool
            .assign(&pool_id(&id), &request.wishes.ips)
            .map_err(|error| CniError::new(code_of(&error), error.to_string()))?;
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let planned = AddPlan::new(request, admission, network, with_gateways(&addresses), since)
            .and_then(|plan| self.journal.insert(plan.attachment()).map(|()| plan).map_err(CniError::from));
        match planned {
            Ok(plan) => {
                self.attachments.insert(id, plan.attachment().clone());
                Ok((plan, keep))
            }
            Err(error) => {
                if !keep {
                    self.pool.release(&pool_id(&id));
                }
                Err(error)
            }
        }
    }

    fn del(&mut self, call: Call, request: DelRequest) {
        if self.busy.contains(&request.id) {
            return call.reply(Err(in_progress(&request.id)));
        }
        self.remove(call, vec![request.id]);
    }

    fn collect_garbage(&mut self, call: Call, request: &GcRequest) {
        let mut ids = attach::garbage(request, self.attachments.values());
        ids.retain(|id| !self.busy.contains(id));
        self.remove(call, ids);
    }

    fn remove(&mut self, call: Call, ids: Vec<AttachmentId>) {
        self.busy.extend(ids.iter().cloned());
        self.work(move || {
            // Every one is tried; the first that failed is told.
            let outcome = ids.iter().map(attach::del).fold(Ok(()), Result::and);
            Work::Deleted { call, ids, outcome }
        });
    }

    fn check(&mut self, call: Call, request: attach::CheckRequest, ready: Readiness) {
        let id = &request.pod.id;
        let planned = match (self.attachments.get(id), ready) {
            (None, _) => Err(CniError::new(
                Code::ContainerUnknown,
                format!("{id} is not attached to this node; ADD it first"),
            )),
            (_, Err(blocked)) => Err(CniError::new(Code::TryAgainLater, blocked)),
            (Some(attachment), Ok(network)) => {
                Ok(CheckPlan { attachment: attachment.clone(), network, request })
            }
        };
        match planned {
            Err(error) => call.reply(Err(error)),
            Ok(plan) => self.work(move || Work::Checked { call, outcome: attach::check(&plan) }),
        }
    }

    /// Looks for attachments whose pod vanished without a DEL; their addresses come back through [`Done`].
    pub fn survey(&mut self) {
        let attachments: Vec<_> =
            self.attachments.values().filter(|a| !self.busy.contains(&a.id)).cloned().collect();
        if attachments.is_empty() {
            return;
        }
        self.work(move || Work::Surveyed { outcome: attach::survey(&attachments), surveyed: attachments });
    }

    /// Takes what a worker finished; returns whether the set of attachments changed.
    pub fn handle_done(&mut self, Done(work): Done) -> bool {
        match work {
            Work::Added { call, id, keep, outcome } => {
                self.busy.remove(&id);
                if outcome.is_err() && !keep {
                    self.free(&id);
                }
                if outcome.is_ok() {
                    info!(container = id.container(), ifname = id.ifname(), "pod attached");
                }
                call.reply(outcome.map(Success::Attached));
                true
            }
            Work::Deleted { call, ids, outcome } => {
                for id in &ids {
                    self.busy.remove(id);
                    if outcome.is_ok() {
                        self.free(id);
                    }
                }
                call.reply(outcome.map(|()| Success::Done));
                true
            }
            Work::Checked { call, outcome } => {
                call.reply(outcome.map(|()| Success::Done));
                false
            }
            Work::Surveyed { surveyed, outcome } => {
                let conditions = outcome.unwrap_or_else(|error| {
                    debug!(err = %error.message, "pods not surveyed");
                    Vec::new()
                });
                let mut changed = false;
                for (attachment, condition) in surveyed.iter().zip(conditions) {
                    let id = &attachment.id;
                    // A DEL and an ADD may have come in between: then this is another attachment.
                    if self.attachments.get(id) != Some(attachment) {
                        continue;
                    }
                    if condition == Condition::Gone && !self.busy.contains(id) {
                        info!(container = id.container(), "pod vanished without a DEL, its address is free");
                        self.free(id);
                        changed = true;
                    }
                }
                changed
            }
        }
    }

    fn free(&mut self, id: &AttachmentId) {
        if let Err(error) = self.journal.remove(id) {
            warn!(container = id.container(), err = %error, "journal entry not removed yet");
        }
        self.pool.release(&pool_id(id));
        if self.attachments.remove(id).is_some() {
            info!(container = id.container(), ifname = id.ifname(), "pod address freed");
        }
    }

    fn work(&self, work: impl FnOnce() -> Work + Send + 'static) {
        let done = self.done.clone();
        tokio::task::spawn_blocking(move || {
            // A closed channel means that the daemon is stopping; the journal holds what matters.
            let _ = done.blocking_send(Done(work()));
        });
    }
}

fn code_of(error: &AssignError) -> Code {
    match error {
        AssignError::NoSubnet => Code::TryAgainLater,
        AssignError::InUse { .. } | AssignError::Differs { .. } => Code::Conflict,
        _ => Code::Exhausted,
    }
}

fn in_progress(id: &AttachmentId) -> CniError {
    CniError::new(
        Code::TryAgainLater,
        format!("another call for {id} is still at work; call again when it ended"),
    )
}

fn with_gateways(addresses: &PodAddresses) -> Vec<attach::PodAddress> {
    addresses
        .0
        .iter()
        .map(|given| attach::PodAddress {
            address: ipnet::IpNet::new(given.address, given.subnet.net().prefix_len())
                .expect("a subnet's prefix length fits its family"),
            gateway: given.subnet.gateway(),
        })
        .collect()
}

fn pool_id(id: &AttachmentId) -> weft_ipam::pods::AttachmentId {
    weft_ipam::pods::AttachmentId { container: id.container().into(), ifname: id.ifname().into() }
}
