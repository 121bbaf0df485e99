//! A packet from one pod to another, followed as far as this node can tell. Reads state, changes none.

use std::net::IpAddr;
use std::time::Instant;

use weft_wire::api::{Hop, Trace, TraceRequest};
use weft_wire::mesh::{MemberState, MemberView, Verdict};

use super::Node;
use crate::attach::Attachment;

/// What a packet has come by; the last hop may be where it ends.
#[derive(Debug, Default)]
struct Hops(Vec<Hop>);

impl Hops {
    /// Notes a hop; `None` where the packet ends there.
    fn pass(&mut self, what: &str, found: Result<String, String>) -> Option<()> {
        let ok = found.is_ok();
        let (Ok(detail) | Err(detail)) = found;
        self.0.push(Hop { what: what.into(), ok, detail });
        ok.then_some(())
    }
}

impl Node {
    /// Follows a packet from one pod to another, as far as this node can tell.
    pub(super) fn trace(&self, request: &TraceRequest, now: Instant) -> Trace {
        let mut hops = Hops::default();
        let ok = self.follow(request, now, &mut hops).is_some();
        let verdict = match hops.0.iter().find(|hop| !hop.ok) {
            Some(broken) => format!("broken at {}: {}", broken.what, broken.detail),
            None => {
                format!("{} reaches {} as far as this node can tell", request.source, request.destination)
            }
        };
        Trace { hops: hops.0, verdict, ok }
    }

    fn follow(&self, request: &TraceRequest, now: Instant, hops: &mut Hops) -> Option<()> {
        let TraceRequest { source, destination } = request;
        let from = self.find_pod(source).ok_or_else(|| {
            format!("{source} is no pod of this node; `weft pods` lists them, run the trace on its own node")
        });
        hops.pass("source pod", from.map(|pod| format!("{} on {}", addresses(pod), pod.host_ifname())))?;
        let bridge = self.control.ready();
        hops.pass("bridge", bridge.map(|network| format!("{}, mtu {}", network.bridge, network.mtu)))?;
        if let Some(local) = self.find_pod(destination) {
            let here = format!("{} on this node, {}", addresses(local), local.host_ifname());
            return hops.pass("destination pod", Ok(here));
        }
        let Ok(address) = destination.parse::<IpAddr>() else {
            let unknown =
                format!("{destination} is no pod of this node; give the address of a pod on another node");
            return hops.pass("destination pod", Err(unknown));
        };
        let owner = self.follow_lease(address, now, hops)?;
        let member = self.follow_record(address, owner, hops)?;
        self.follow_route(address, hops)?;
        let alive = matches!(member.state, MemberState::Alive | MemberState::Suspect);
        let heard = how_heard(&member, now);
        hops.pass("peer", if alive { Ok(heard) } else { Err(heard) })
    }

    /// Returns who has the lease of an address, or `no node` where nobody keeps leases.
    fn follow_lease(&self, address: IpAddr, now: Instant, hops: &mut Hops) -> Option<String> {
        let owner = self.control.lease_views(now).into_iter().find(|view| view.subnet.contains(address));
        match owner {
            Some(owner) => {
                let held = format!("{} is leased by {} (epoch {})", owner.subnet, owner.node, owner.epoch);
                hops.pass("lease", Ok(held))?;
                Some(owner.node.to_string())
            }
            None if self.leases.kind() == "static" => Some("no node".into()),
            None => {
                let none = format!(
                    "no lease covers {address}; it is no pod address, or its node's lease has expired"
                );
                hops.pass("lease", Err(none))?;
                None
            }
        }
    }

    /// Returns who announces an address.
    fn follow_record(&self, address: IpAddr, owner: String, hops: &mut Hops) -> Option<MemberView<'_>> {
        let announces = |member: &MemberView<'_>| {
            member.record.facts.subnets.iter().any(|leased| leased.subnet.contains(address))
        };
        let Some(member) = self.control.mesh.members().find(announces) else {
            let silent = format!("{owner} has announced no subnet with {address}; is weftd up there?");
            hops.pass("record", Err(silent))?;
            return None;
        };
        let record =
            |verdict: &str| format!("version {} of {}: {verdict}", member.record.version, member.node);
        let found = match member.verdict {
            Verdict::Accepted => Ok(record("accepted")),
            Verdict::Pending { why } | Verdict::Refused { why } => Err(record(why)),
        };
        hops.pass("record", found)?;
        Some(member)
    }

    fn follow_route(&self, address: IpAddr, hops: &mut Hops) -> Option<()> {
        let mut routes = self.control.pass.report.iter().flat_map(|report| &report.routes);
        let Some(route) = routes.find(|route| route.prefix.contains(&address)) else {
            return hops.pass("route", Err(format!("none to {address} in the kernel")));
        };
        let detail = format!(
            "{} by {} dev {} mtu {} {}",
            route.prefix, route.transport, route.dev, route.mtu, route.reason
        );
        hops.pass("route", if route.installed { Ok(detail) } else { Err(detail) })
    }

    /// Finds a pod of this node by name, NAMESPACE/NAME, container id or address.
    fn find_pod(&self, what: &str) -> Option<&Attachment> {
        let address: Option<IpAddr> = what.parse().ok();
        self.pods.attachments().find(|attachment| {
            let pod = &attachment.pod;
            attachment.id.container() == what
                || (!pod.name.is_empty() && pod.name == what)
                || what
                    .split_once('/')
                    .is_some_and(|(namespace, name)| pod.namespace == namespace && pod.name == name)
                || attachment.addresses.iter().any(|own| Some(own.address.addr()) == address)
        })
    }
}

fn how_heard(member: &MemberView<'_>, now: Instant) -> String {
    let seen = member.last_seen.map_or_else(
        || "never heard directly".to_owned(),
        |at| format!("heard {} ms ago", now.duration_since(at).as_millis()),
    );
    let rtt =
        member.rtt.map_or_else(String::new, |rtt| format!(", round trip {:.2} ms", rtt.as_secs_f64() * 1e3));
    format!("{} is {}, {seen}{rtt}", member.node, member.state)
}

fn addresses(attachment: &Attachment) -> String {
    let addresses: Vec<_> =
        attachment.addresses.iter().map(|address| address.address.addr().to_string()).collect();
    addresses.join(", ")
}
