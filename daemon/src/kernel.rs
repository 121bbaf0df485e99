//! The kernel behind one seam: dump what is there, apply changes. Everything below blocks and belongs on a
//! thread of its own; everything above is pure.

#[cfg(fuzzing)]
pub mod fuzz;
pub mod linux;
pub mod memory;
pub mod monitor;
pub mod netlink;
pub mod nft;
mod offload;
pub mod preflight;
mod rtnl;
pub(crate) mod sysctl;
mod tlv;
mod tunnel;
mod wireguard;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use weft_wire::types::NodeName;

use crate::plan::model::{Actual, Desired, Op, Sessions, Underlay};
use crate::tunnel::{Tunnel, TunnelSecret};

pub use tunnel::{Implementation, KernelMonitor, TunnelLook};

/// A kernel, real or in memory.
pub trait Kernel: fmt::Debug + Send {
    /// Reads everything that carries weft's mark, and the settings named.
    fn dump(&mut self, settings: &BTreeSet<String>) -> Result<Actual, KernelError>;

    /// Makes changes in order; one answer for each. A change that fails does not stop those after it.
    fn apply(&mut self, ops: &[Op]) -> Vec<Result<(), KernelError>>;

    /// Finds the device that carries the tunnels.
    fn underlay(&mut self, spec: &UnderlaySpec) -> Result<Underlay, UnderlayError>;

    /// Returns whom there are tunnels with that carry packets now.
    fn sessions(&mut self) -> Sessions {
        Sessions::default()
    }

    /// Returns a look at the tunnels, while there are any.
    fn tunnels(&self) -> Option<TunnelLook> {
        None
    }

    /// Gives the tunnels away that weftd carries itself, running as they are: for a daemon that takes over.
    fn surrender(&mut self) -> Option<Tunnel> {
        None
    }

    /// Whether what was set is no longer so in a place that the kernel tells nobody of. Cheap: it is asked every few seconds.
    fn strayed(&mut self) -> bool {
        false
    }

    /// Knows one more secret of the node's tunnels, for a plan that names its key.
    fn add_tunnel_secret(&mut self, _secret: TunnelSecret) {}

    /// Returns whom packets were sent to lately. Cheap: it is asked every second.
    fn traffic(&mut self) -> Traffic {
        Traffic::default()
    }

    /// Looks for what cuts pods off though weft did its part; one sentence each.
    fn obstacles(&mut self, cluster: &[IpNet]) -> Vec<String>;
}

/// Whom packets were sent to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Traffic {
    /// How long ago something went to a VXLAN endpoint.
    pub endpoints: BTreeMap<IpAddr, Duration>,
    /// How many bytes went into each peer's encrypted tunnel.
    pub tunnels: BTreeMap<NodeName, u64>,
}

/// Something that the kernel refused, in words for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct KernelError(pub String);

/// How to find the underlay.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnderlaySpec {
    /// The device; by default the one that holds `addresses`, or that of the default route.
    pub device: Option<String>,
    /// The addresses, at most one a family; by default the device's first of each.
    pub addresses: Vec<IpAddr>,
    /// The cluster says the addresses, and not a person.
    pub of_cluster: bool,
    /// The MTU in bytes; by default the device's.
    pub mtu: Option<u32>,
}

/// Why there is no underlay; each says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnderlayError {
    /// The device is not there.
    #[error("underlay.device {0} does not exist; set it to one of `ip link`")]
    NoDevice(String),
    /// No device holds the address.
    #[error("no device has the address {0} of underlay.address; set it to one of `ip address`")]
    NoAddress(IpAddr),
    /// No device holds the address that the cluster says.
    #[error(
        "no device has the address {0} that the Node of this node has: give the machine that address, or see that its kubelet runs and tells the Node another; weft follows"
    )]
    NoNodeAddress(IpAddr),
    /// There is no default route to tell the device by.
    #[error("there is no default route to tell the underlay by; set underlay.device or underlay.address")]
    NoDefaultRoute,
    /// The device has no usable address.
    #[error("the underlay {0} has no global address; give it one, or set underlay.address")]
    NoGlobalAddress(String),
    /// The device is down.
    #[error("the underlay {0} is down; bring it up with `ip link set {0} up`")]
    Down(String),
    /// The kernel does not answer.
    #[error("the kernel does not answer over netlink: {0}")]
    Kernel(String),
}

/// Removes everything that carries weft's mark; returns what could not be removed.
pub fn purge(kernel: &mut dyn Kernel) -> Vec<String> {
    match kernel.dump(&BTreeSet::new()) {
        Err(error) => vec![error.to_string()],
        Ok(actual) => {
            let nothing = Desired { strays: actual.veths.keys().cloned().collect(), ..Desired::default() };
            let ops = crate::plan::diff::diff(&nothing, &actual);
            let answers = kernel.apply(&ops);
            ops.iter()
                .zip(answers)
                .filter_map(|(op, answer)| answer.err().map(|e| format!("{op}: {e}")))
                .collect()
        }
    }
}

/// Returns the settings that a plan is about.
pub fn settings_of(plan: &Desired) -> BTreeSet<String> {
    plan.state.sysctls.keys().chain(plan.amend.keys()).cloned().collect()
}
