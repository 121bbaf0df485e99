//! One pass: read the inputs and the kernel, compare, change, report. It knows no history.
//!
//! Invariant: a change that fails is reported and stops nothing else.

use std::net::IpAddr;

use ipnet::IpNet;
use weft_wire::types::{NodeName, Subnet};

use crate::kernel::{Kernel, TunnelLook, settings_of};
use crate::plan::desired::desired;
use crate::plan::diff::diff;
use crate::plan::model::{Desired, Inputs, Op, Transport};

/// What a pass did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// How many changes were made.
    pub applied: usize,
    /// The changes that the kernel refused.
    pub failed: Vec<Failure>,
    /// What a person should hear, one sentence each.
    pub warnings: Vec<String>,
    /// Every peer subnet with its way.
    pub routes: Vec<RouteStatus>,
    /// The MTU of pods in bytes; 0 where the underlay was not known.
    pub pod_mtu: u32,
    /// The node's subnets that the pass was about.
    pub subnets: Vec<Subnet>,
    /// Host ends that are in the kernel and not in the inputs.
    pub unknown_veths: Vec<String>,
    /// How many peers do not go the way that they should yet, since there is no session on it.
    pub pending: usize,
    /// A look at the tunnels, while there are any.
    pub tunnels: Option<TunnelLook>,
}

/// A change that the kernel refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The change.
    pub what: String,
    /// The kernel's reason, and what to do.
    pub error: String,
}

/// A peer subnet with its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteStatus {
    /// The subnet.
    pub prefix: IpNet,
    /// Whose it is.
    pub node: NodeName,
    /// How it is reached.
    pub transport: Transport,
    /// The device; empty where there is no way.
    pub dev: String,
    /// The next hop.
    pub via: Option<IpAddr>,
    /// What a packet may have at most, in bytes.
    pub mtu: u32,
    /// What it may have by the devices at both ends, in bytes.
    pub room: u32,
    /// What the way adds to a packet, in bytes.
    pub overhead: u32,
    /// Whether the kernel has the route.
    pub installed: bool,
    /// Why it is so.
    pub reason: String,
}

/// Brings the kernel to what the inputs ask for.
pub fn reconcile(kernel: &mut dyn Kernel, inputs: &Inputs) -> Report {
    let plan = if inputs.dataplane.detour.is_some() {
        desired(&Inputs { sessions: kernel.sessions(), ..inputs.clone() })
    } else {
        desired(inputs)
    };
    let mut report = Report {
        pending: plan.pending,
        pod_mtu: plan.pod_mtu,
        subnets: inputs.subnets.clone(),
        warnings: plan.warnings.clone(),
        ..Report::default()
    };
    let actual = match kernel.dump(&settings_of(&plan)) {
        Ok(actual) => actual,
        Err(error) => {
            report.failed.push(Failure { what: "read the kernel's state".into(), error: error.to_string() });
            return report;
        }
    };
    let ops = diff(&plan, &actual);
    let answers = kernel.apply(&ops);
    let mut refused = Vec::new();
    for (op, answer) in ops.iter().zip(answers) {
        match answer {
            Ok(()) => report.applied += 1,
            Err(error) => {
                if let Op::SetRoute(prefix, ..) = op {
                    refused.push((*prefix, error.to_string()));
                }
                report.failed.push(Failure { what: op.to_string(), error: error.to_string() });
            }
        }
    }
    if !ops.is_empty() {
        tracing::debug!(applied = report.applied, failed = report.failed.len(), "kernel changed");
    }
    report.routes = statuses(&plan, &refused);
    report.tunnels = kernel.tunnels();
    report.warnings.extend(kernel.obstacles(&inputs.dataplane.cluster_cidrs));
    let unknown =
        actual.veths.keys().filter(|name| !plan.veths.contains_key(*name) && !plan.strays.contains(*name));
    report.unknown_veths = unknown.cloned().collect();
    for name in plan.veths.keys().filter(|name| !actual.veths.contains_key(*name)) {
        tracing::debug!(iface = name, "host end of a pod is not there");
    }
    report
}

fn statuses(plan: &Desired, refused: &[(IpNet, String)]) -> Vec<RouteStatus> {
    let statuses = plan.routes.iter().map(|planned| {
        let refusal = refused.iter().find(|(prefix, _)| *prefix == planned.prefix);
        let way = planned.route.as_ref();
        RouteStatus {
            prefix: planned.prefix,
            node: planned.node.clone(),
            transport: planned.transport,
            dev: way.map(|way| way.dev.clone()).unwrap_or_default(),
            via: way.and_then(|way| way.via),
            mtu: way.and_then(|way| way.mtu).unwrap_or(plan.pod_mtu),
            room: planned.room,
            overhead: planned.overhead,
            installed: way.is_some() && refusal.is_none(),
            reason: refusal.map_or_else(|| planned.reason.clone(), |(_, error)| error.clone()),
        }
    });
    statuses.collect()
}
