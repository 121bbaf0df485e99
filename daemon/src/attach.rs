//! Attaches pods: one veth pair, its addresses and its default routes, for one CNI call at a time.
//!
//! Synchronous and blocking: the loop calls these functions on a worker thread. They keep no state;
//! what is attached is written in the [`journal`](crate::journal) *before* [`add`] runs, and the
//! caller runs at most one function at a time for one [`AttachmentId`].
//!
//! Not here: which address a pod gets (`weft_ipam::pods`), and the bridge (the reconciler).
//!
//! Invariant: a function that fails leaves nothing behind that was not there before it ran.

mod check;
mod netns;
mod rtnl;
mod veth;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
pub use weft_wire::cni::{
    AttachmentId, CheckRequest, CniError, CniReply, CniRequest, CniResult, Code, Command, DelRequest,
    GcRequest, PodName, PodRequest, SpecVersion, StatusRequest, Success, Wishes,
};
use weft_wire::types::MacAddress;

pub use netns::NetnsId;

/// An address of a pod with what the pod needs to use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodAddress {
    /// The address with the prefix length of the node's subnet.
    pub address: IpNet,
    /// The bridge's address in that subnet.
    pub gateway: IpAddr,
}

/// What is the same for every pod of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// The bridge that the host's ends join (`weft0`).
    pub bridge: String,
    /// What the overlay carries, in bytes.
    pub mtu: u32,
    /// Whether a pod may reach itself through a service address (the bridge port's hairpin mode).
    pub hairpin: bool,
}

/// One attachment as the journal and the loop keep it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Which attachment.
    pub id: AttachmentId,
    /// The name of the CNI network configuration it was made with.
    pub network: String,
    /// The path of the container's network namespace at the time of the ADD.
    pub netns: PathBuf,
    /// The namespace behind the path.
    pub netns_id: NetnsId,
    /// Whose pod it is.
    pub pod: PodName,
    /// Its addresses, at most one a family.
    pub addresses: Vec<PodAddress>,
    /// The Ethernet address of the pod's end.
    pub mac: MacAddress,
    /// The MTU of both ends in bytes.
    pub mtu: u32,
    /// When it was made, in seconds since 1970.
    pub since_unix_s: u64,
}

impl Attachment {
    /// Returns the name of the host's end.
    pub fn host_ifname(&self) -> String {
        self.id.host_ifname()
    }
}

/// That an ADD may go on: its namespace exists and its id is not in use elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admission {
    /// The namespace behind `CNI_NETNS`.
    pub netns_id: NetnsId,
    /// Whether the journal holds this very attachment already: the ADD repeats an earlier one.
    pub repeated: bool,
}

/// Everything that an ADD needs, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddPlan {
    request: PodRequest,
    network: Network,
    attachment: Attachment,
}

/// Everything that a CHECK needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckPlan {
    /// What the runtime sent.
    pub request: CheckRequest,
    /// What every pod of the node has.
    pub network: Network,
    /// What the journal says.
    pub attachment: Attachment,
}

/// What became of an attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// The host's end exists.
    Attached,
    /// The host's end is gone, and the namespace is still there.
    Detached,
    /// The namespace and the host's end are gone: the address may be given to another pod.
    Gone,
}

/// Checks a call from the shim. Pure; see [`Command::parse`].
///
/// # Errors
/// A [`CniError`] of the spec's code.
pub fn parse(request: &CniRequest) -> Result<Command, CniError> {
    Command::parse(request)
}

/// Writes the reply to `request`.
pub fn reply(request: &CniRequest, outcome: Result<Success, CniError>) -> CniReply {
    CniReply::new(SpecVersion::of_input(&request.stdin), outcome)
}

/// Checks that an ADD may go on, before any state changes: the namespace exists and is another than the
/// daemon's, and `existing`, what the journal holds under this id, is not alive in another namespace.
///
/// Blocks for two `stat` calls; for one netlink request where `existing` names another namespace.
///
/// # Errors
/// [`Code::ContainerUnknown`] where the namespace is gone, [`Code::Conflict`] where the id is in use.
pub fn admit(request: &PodRequest, existing: Option<&Attachment>) -> Result<Admission, CniError> {
    let netns_id = netns::identify(&request.netns)?;
    let Some(existing) = existing else { return Ok(Admission { netns_id, repeated: false }) };
    if existing.netns_id == netns_id {
        return Ok(Admission { netns_id, repeated: true });
    }
    match veth::condition(&mut rtnl::Conn::open()?, existing)? {
        Condition::Attached => Err(CniError::new(
            Code::Conflict,
            format!(
                "{} is attached in {} already and cannot be attached in {} too; DEL it first",
                request.id,
                existing.netns.display(),
                request.netns.display()
            ),
        )),
        // The runtime lost its DEL (podman ignores the errors of one): the old namespace holds nothing of ours.
        Condition::Detached | Condition::Gone => Ok(Admission { netns_id, repeated: false }),
    }
}

impl AddPlan {
    /// Puts a plan together from what the runtime asks, what the node gives, and the pod's addresses.
    ///
    /// # Errors
    /// [`Code::InvalidConfiguration`] where the MTU asked for does not fit; [`Code::TryAgainLater`] where there is no
    /// address. State is unchanged.
    pub fn new(
        request: PodRequest,
        admission: Admission,
        network: Network,
        addresses: Vec<PodAddress>,
        since_unix_s: u64,
    ) -> Result<Self, CniError> {
        if addresses.is_empty() {
            return Err(CniError::new(
                Code::TryAgainLater,
                "this node has no pod subnet yet; `weft status` names the step that is blocked",
            ));
        }
        let mtu = request.wishes.mtu.unwrap_or(network.mtu);
        if mtu > network.mtu {
            return Err(CniError::new(
                Code::InvalidConfiguration,
                format!(
                    "mtu {mtu} in the network configuration is more than the {} that the overlay carries; leave mtu out or lower it",
                    network.mtu
                ),
            ));
        }
        if mtu < 1280 && addresses.iter().any(|a| a.gateway.is_ipv6()) {
            return Err(CniError::new(
                Code::InvalidConfiguration,
                format!("mtu {mtu} is too small for IPv6, which needs 1280 (RFC 8200 s5)"),
            ));
        }
        let attachment = Attachment {
            id: request.id.clone(),
            network: request.network.clone(),
            netns: request.netns.clone(),
            netns_id: admission.netns_id,
            pod: request.pod.clone(),
            addresses,
            mac: request.wishes.mac.unwrap_or_else(|| request.id.pod_mac()),
            mtu,
            since_unix_s,
        };
        Ok(Self { request, network, attachment })
    }

    /// Returns what the journal must hold before [`add`] runs.
    pub fn attachment(&self) -> &Attachment {
        &self.attachment
    }
}

/// Attaches a pod. Repeating it gives the same result; a half-made earlier attempt is replaced.
///
/// Blocks for about a millisecond.
///
/// # Errors
/// A [`CniError`] that names the step; the pod's namespace and the host are as they were before.
pub fn add(plan: &AddPlan) -> Result<CniResult, CniError> {
    veth::add(plan)
}

/// Removes an attachment; one that does not exist is no error.
///
/// Blocks for some tens of milliseconds, which the kernel needs to retire a device.
///
/// # Errors
/// [`Code::Kernel`] where the kernel refuses.
pub fn del(id: &AttachmentId) -> Result<(), CniError> {
    veth::del(id)
}

/// Verifies that an attachment is as it was made: both ends, bridge, addresses, routes, neighbours, MTU.
///
/// # Errors
/// [`Code::CheckFailed`] with the first thing that is wrong; [`Code::ContainerUnknown`] where the namespace is gone.
pub fn check(plan: &CheckPlan) -> Result<(), CniError> {
    check::check(plan)
}

/// Tells what became of attachments, in their order; for the start of the daemon and now and then after.
///
/// # Errors
/// [`Code::Kernel`] where the kernel does not answer.
pub fn survey(attachments: &[Attachment]) -> Result<Vec<Condition>, CniError> {
    let mut conn = rtnl::Conn::open()?;
    attachments.iter().map(|attachment| veth::condition(&mut conn, attachment)).collect()
}

/// Returns the attachments that a GC call lets go: those of its network that it does not list. Pure.
pub fn garbage<'a>(
    request: &GcRequest,
    attachments: impl IntoIterator<Item = &'a Attachment>,
) -> Vec<AttachmentId> {
    let valid: BTreeSet<&AttachmentId> = request.valid.iter().collect();
    attachments
        .into_iter()
        .filter(|attachment| attachment.network == request.network && !valid.contains(&attachment.id))
        .map(|attachment| attachment.id.clone())
        .collect()
}

/// Removes the host's ends that no attachment accounts for, such as a crash leaves; returns their names.
///
/// `known` holds the host interface names of all attachments, those in progress included.
///
/// # Errors
/// [`Code::Kernel`] where the kernel refuses.
pub fn sweep(bridge: &str, known: &BTreeSet<String>) -> Result<Vec<String>, CniError> {
    veth::sweep(bridge, known)
}
