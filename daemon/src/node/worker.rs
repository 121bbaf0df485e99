//! The thread that owns the kernel: it takes a job at a time and sends back what it did.
//!
//! It decides nothing. Netlink calls block, so they happen here and never on the loop's thread.

use std::net::IpAddr;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::kernel::{Kernel, Traffic, UnderlayError, UnderlaySpec, purge};
use crate::plan::model::{Inputs, Underlay};
use crate::reconcile::{Report, reconcile};
use crate::tunnel::{Tunnel, TunnelSecret};

/// Between two looks whom packets are sent to.
const LOOK: Duration = Duration::from_secs(1);
/// How many of these there are for one look for what the kernel sends no notice of.
const LOOKS: u32 = 2;

/// What the loop asks of the kernel thread.
#[derive(Debug)]
pub enum Job {
    /// Look for the underlay, and if it is as the inputs say, bring the kernel to what they ask for.
    Reconcile(Box<Inputs>),
    /// Look for these addresses first, which the cluster says that the node has now.
    Addresses(Vec<IpAddr>),
    /// Know one more secret of the tunnels, for the passes that follow.
    TunnelSecret(TunnelSecret),
    /// Remove everything that carries weft's mark.
    Purge,
    /// Give the tunnels away, and end.
    Surrender,
}

/// What the kernel thread did.
#[derive(Debug)]
pub enum Done {
    /// A pass; no report where the underlay was not as the inputs said.
    Reconciled {
        /// The underlay as found.
        underlay: Result<Underlay, UnderlayError>,
        /// What was done.
        report: Option<Box<Report>>,
    },
    /// Something is not as it was left.
    Strayed,
    /// Whom packets were sent to.
    Traffic(Traffic),
    /// Everything with the mark is gone, but for what the list names.
    Purged(Vec<String>),
    /// The tunnels, if there are any that the daemon carries itself; the thread has ended.
    Surrendered(Option<Box<Tunnel>>),
}

/// Starts the thread; it ends when the returned sender is dropped.
pub fn spawn(
    mut kernel: Box<dyn Kernel>,
    spec: UnderlaySpec,
    done: mpsc::Sender<Done>,
) -> std::io::Result<std::sync::mpsc::Sender<Job>> {
    let (jobs, inbox) = std::sync::mpsc::channel();
    thread::Builder::new().name("kernel".into()).spawn(move || {
        let mut said = None;
        let (mut next, mut looks) = (Instant::now() + LOOK, 0u32);
        loop {
            let left = next.saturating_duration_since(Instant::now());
            let answer = match inbox.recv_timeout(left) {
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    next = Instant::now() + LOOK;
                    looks = looks.wrapping_add(1);
                    if looks.is_multiple_of(LOOKS) && kernel.strayed() {
                        Done::Strayed
                    } else {
                        Done::Traffic(kernel.traffic())
                    }
                }
                Ok(Job::Reconcile(inputs)) => {
                    let underlay = look(&mut *kernel, said.as_ref(), &spec);
                    let same = underlay.as_ref().is_ok_and(|found| *found == inputs.underlay);
                    let report = same.then(|| Box::new(reconcile(&mut *kernel, &inputs)));
                    Done::Reconciled { underlay, report }
                }
                Ok(Job::Addresses(addresses)) => {
                    said = Some(UnderlaySpec { addresses, ..spec.clone() });
                    continue;
                }
                Ok(Job::TunnelSecret(secret)) => {
                    kernel.add_tunnel_secret(secret);
                    continue;
                }
                Ok(Job::Purge) => Done::Purged(purge(&mut *kernel)),
                Ok(Job::Surrender) => {
                    let _ = done.blocking_send(Done::Surrendered(kernel.surrender().map(Box::new)));
                    return;
                }
            };
            if done.blocking_send(answer).is_err() {
                return;
            }
        }
    })?;
    Ok(jobs)
}

/// Looks for the underlay. What the cluster says counts where the machine has it; where neither that nor what the daemon began
/// with is there, the cluster's is what is missed.
fn look(
    kernel: &mut dyn Kernel,
    said: Option<&UnderlaySpec>,
    begun: &UnderlaySpec,
) -> Result<Underlay, UnderlayError> {
    let Some(said) = said else { return kernel.underlay(begun) };
    kernel.underlay(said).or_else(|error| kernel.underlay(begun).map_err(|_| error))
}
