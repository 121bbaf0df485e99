//! The short exchanges of one pod over the kernel's batch writer, with each step in words for the runtime.

use std::fmt;

use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;
use weft_wire::cni::{CniError, Code};

use crate::kernel::netlink;

/// A socket in the namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Conn(netlink::Conn);

/// One change.
#[derive(Debug, Clone)]
pub(super) struct Step {
    /// What a person reads when it fails: "cannot ...".
    pub what: &'static str,
    /// The message.
    pub message: RouteNetlinkMessage,
    /// Flags beside REQUEST and ACK.
    pub flags: u16,
    /// An error that counts as success.
    pub tolerated: Option<Errno>,
}

/// What the kernel refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    /// Which step: its index.
    pub step: usize,
    /// The step in words.
    pub what: &'static str,
    /// The kernel's error.
    pub errno: Errno,
    /// The kernel's own words (NETLINK_EXT_ACK), or nothing.
    pub words: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.errno.desc())?;
        if self.words.is_empty() { Ok(()) } else { write!(f, ": {}", self.words) }
    }
}

impl From<Refusal> for CniError {
    fn from(refusal: Refusal) -> Self {
        let message = match refusal.errno {
            Errno::EPERM => format!("weftd may not {}; it needs the capability CAP_NET_ADMIN", refusal.what),
            Errno::ENOMEM | Errno::ENOBUFS => format!("the kernel has no memory left to {}", refusal.what),
            _ => format!("the kernel refused to {}", refusal.what),
        };
        Self::new(Code::Kernel, message).with_details(refusal)
    }
}

impl Conn {
    /// Opens a socket in the namespace of the calling thread.
    pub(super) fn open() -> Result<Self, CniError> {
        let broken = |error: std::io::Error| {
            CniError::new(Code::Kernel, "no netlink socket can be opened").with_details(error)
        };
        netlink::Conn::open().map(Self).map_err(broken)
    }

    /// Makes changes in order, all in one message to the kernel, which goes on after a refusal.
    ///
    /// Returns the first refusal that is not tolerated.
    pub(super) fn change(&mut self, steps: &[Step]) -> Result<(), Refusal> {
        let answers = self.0.change(steps.iter().map(|step| (step.message.clone(), step.flags)).collect());
        for (place, (step, answer)) in steps.iter().zip(answers).enumerate() {
            match answer {
                Err(refusal) if step.tolerated != Some(refusal.errno) => {
                    let netlink::Refusal { errno, words } = refusal;
                    return Err(Refusal { step: place, what: step.what, errno, words });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Asks for one object; `None` where it does not exist.
    pub(super) fn get(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> Result<Option<RouteNetlinkMessage>, CniError> {
        match self.0.get(message) {
            Ok(found) => Ok(Some(found)),
            Err(refusal) if matches!(refusal.errno, Errno::ENODEV | Errno::ENOENT | Errno::ESRCH) => Ok(None),
            Err(refusal) => Err(unanswered(&refusal)),
        }
    }

    /// Asks for all objects of a kind.
    pub(super) fn dump(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, CniError> {
        self.0.dump(message).map_err(|refusal| unanswered(&refusal))
    }
}

fn unanswered(refusal: &netlink::Refusal) -> CniError {
    CniError::new(Code::Kernel, "the kernel does not answer over netlink").with_details(refusal)
}
