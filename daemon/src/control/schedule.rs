//! When a pass over the kernel is due, and what its report means for the node.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tracing::{info, warn};
use weft_wire::types::Subnet;

use super::{Control, Output};
use crate::attach::Network;
use crate::kernel::UnderlayError;
use crate::plan::model::{BRIDGE, Underlay};
use crate::reconcile::Report;

/// Changes that come together are planned together.
const COALESCE: Duration = Duration::from_millis(50);
/// Between two passes that changes in the kernel ask for.
const KERNEL_QUIET: Duration = Duration::from_millis(200);
/// Between two looks at the kernel when nothing woke the node.
const RESYNC: Duration = Duration::from_secs(30);
/// After a pass with failures.
const RETRY: Duration = Duration::from_secs(1);

/// Where the reconciler stands.
#[derive(Debug, Default)]
pub struct Pass {
    /// Whether one is under way.
    pub running: bool,
    /// When the next one begins, where something asked for it.
    pub due: Option<Instant>,
    /// The last report.
    pub report: Option<Report>,
    /// When one last ended without a failure.
    pub last_ok: Option<Instant>,
    /// How many have ended.
    pub passes: u64,
    resync: Option<Instant>,
    ended: Option<Instant>,
}

impl Control {
    /// Asks for a pass soon.
    pub(super) fn wake(&mut self, now: Instant) {
        let due = now + COALESCE;
        self.pass.due = Some(self.pass.due.map_or(due, |earlier| earlier.min(due)));
    }

    /// Takes that something of ours or of the underlay may have changed in the kernel.
    ///
    /// A foreign program that changes it all the time gets a pass five times a second.
    pub fn handle_kernel_change(&mut self, now: Instant) {
        let earliest = self.pass.ended.map_or(now, |ended| ended + KERNEL_QUIET);
        let due = earliest.max(now + COALESCE);
        self.pass.due = Some(self.pass.due.map_or(due, |earlier| earlier.min(due)));
    }

    /// Returns when the next pass begins; nothing where one runs, or none follows.
    pub(super) fn pass_wake(&self) -> Option<Instant> {
        let next = [self.pass.due, self.pass.resync].into_iter().flatten().min();
        next.filter(|_| !self.pass.running && !self.leaving)
    }

    /// Has a pass made if one is due; returns whether one is.
    pub(super) fn start_pass(&mut self, now: Instant) -> bool {
        if self.pass_wake().is_none_or(|due| due > now) {
            return false;
        }
        let inputs = self.inputs(now);
        self.pass.due = None;
        self.pass.resync = Some(now + RESYNC);
        self.pass.running = true;
        self.job = Some(Box::new(inputs));
        true
    }

    /// Takes what a pass found and did; no report where the underlay was not as the inputs said.
    pub fn handle_pass(
        &mut self,
        found: Result<Underlay, UnderlayError>,
        report: Option<Report>,
        now: Instant,
    ) {
        self.pass.running = false;
        self.pass.ended = Some(now);
        self.pass.passes += 1;
        match found {
            Err(error) => {
                let error = error.to_string();
                if self.problems.underlay.as_ref() != Some(&error) {
                    warn!(err = error, "no underlay");
                }
                if self.underlay.is_err() {
                    self.underlay = Err(error.clone());
                }
                // What the kernel carries stays: the underlay may come back as it was.
                self.problems.underlay = Some(error);
                self.pass.due = Some(now + RETRY);
                return;
            }
            Ok(found) => {
                self.problems.underlay = None;
                if self.underlay.as_ref() != Ok(&found) {
                    info!(device = found.device, mtu = found.mtu, addresses = ?found.addresses, "underlay found");
                    self.underlay = Ok(found);
                    self.underlay_changed(now);
                }
            }
        }
        let Some(report) = report else { return self.wake(now) };
        self.tell_tunnel_keys(report.pending, now);
        if report.failed.is_empty() {
            self.pass.last_ok = Some(now);
        } else {
            for failure in &report.failed {
                warn!(what = failure.what, err = failure.error, "kernel refused a change");
            }
            self.pass.due.get_or_insert(now + RETRY);
        }
        self.strays = report.unknown_veths.iter().cloned().collect();
        if !self.strays.is_empty() {
            self.pass.due.get_or_insert(now + RETRY);
        }
        self.pass.report = Some(report);
        self.follow_routes(now);
    }

    /// After the underlay changed: gossip listens there, and peers hear of it.
    fn underlay_changed(&mut self, now: Instant) {
        let Ok(underlay) = &self.underlay else { return };
        let addresses: Vec<_> = underlay.addresses.iter().map(|address| address.addr()).collect();
        let gossip = addresses.iter().map(|address| SocketAddr::new(*address, self.config.gossip.port));
        self.leasing.set_gossip(gossip.collect(), now);
        self.outputs.push_back(Output::Listen(addresses));
        self.announce(now);
        self.wake(now);
    }

    /// Tells whether pods can be attached, and if not, which step is missing.
    pub fn ready(&self) -> Result<Network, String> {
        if self.leaving {
            return Err("the node is leaving the cluster; no more pods are attached".into());
        }
        if let Some(subnet) = self.leasing.giving_back() {
            return Err(format!(
                "{subnet} is being given back for another subnet; pods are attached once that is done"
            ));
        }
        if self.subnets().is_empty() {
            let why = self
                .problems
                .lease
                .keys()
                .next()
                .or(self.problems.chosen.first())
                .cloned()
                .or_else(|| self.store_error.clone())
                .unwrap_or_else(|| "the store has not answered yet".into());
            return Err(format!("the node has no pod subnet: {why}"));
        }
        // A pod gets its addresses when it is attached, and no other later.
        let getting = self.leasing.getting();
        if let (Some(family), None) = (getting.first(), &self.store_error) {
            return Err(format!("the node has no {family} subnet yet: its lease is on the way"));
        }
        if let Err(why) = &self.underlay {
            return Err(format!("the node has no underlay: {why}"));
        }
        // An earlier pass may not have known the underlay or all subnets: then the bridge is not there for pods yet.
        let covers = |report: &&Report| report.pod_mtu > 0 && report.subnets == self.subnets();
        let Some(report) = self.pass.report.as_ref().filter(covers).filter(|_| self.pass.last_ok.is_some())
        else {
            let failed = self.pass.report.iter().flat_map(|report| &report.failed).next();
            let why = failed.map_or_else(
                || "the first pass is under way".to_owned(),
                |failure| format!("{}: {}", failure.what, failure.error),
            );
            return Err(format!("the kernel is not programmed yet: {why}"));
        };
        Ok(Network { bridge: BRIDGE.into(), mtu: report.pod_mtu, hairpin: self.config.pods.hairpin })
    }

    /// Returns the node's subnets: those whose leases it holds.
    pub fn subnets(&self) -> Vec<Subnet> {
        self.leasing.held().iter().map(|held| held.subnet).collect()
    }
}
